"""What the record of a run holds beside its figures: its course, where it settled, how latencies are spread, how a fleet was used."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One more figure on the axis of a timeline: CPU of a load process, queue length of the server, watts of a GPU."""

    name: str
    unit: str
    values: tuple[float | None, ...]  # one a step; None where nothing is known


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """A run in steps of equal length from its second 0 to the end of its last answer.  Every column has one value a step.

    Percentiles are of the requests due in a step; None where there is none.
    """

    step_s: float
    window_s: tuple[float, float]  # what counts: after the warm-up, before the drain
    offered: tuple[int, ...]  # requests due
    completed: tuple[int, ...]  # answers that ended
    failed: dict[str, tuple[int, ...]]  # by outcome, when they failed
    in_flight: tuple[float, ...]  # due and not yet over, mean of the step
    ttft_p50_s: tuple[float | None, ...]
    ttft_p95_s: tuple[float | None, ...]
    e2e_p50_s: tuple[float | None, ...]
    e2e_p95_s: tuple[float | None, ...]
    output_tokens_per_s: tuple[float, ...]
    lateness_max_s: tuple[float | None, ...]
    extra: tuple[Series, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Steadiness:
    """Where a run settled, and whether what was left after that is steady.  Figures of the window."""

    verdict: Literal["steady", "not_steady", "over_saturated", "too_short"]
    warmup_s: float  # left out at the start
    decided_by: str  # the series that took longest to settle; 'given' where a person said; 'nothing' where none had to
    in_flight_grew: float | None = None  # over the window, along the line through it
    served_share: float | None = None  # answers / arrivals in the window
    trends: dict[str, float] | None = None  # chance of so clear a trend in a steady run, by series
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """How one latency is spread: quantiles at `shares`, and a histogram."""

    shares: tuple[float, ...]
    quantiles_s: tuple[float, ...]
    edges_s: tuple[float, ...]  # of the histogram, one more than counts
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetUse:
    """How a simulated fleet was used, over all runs."""

    runs: int
    replicas: int  # at the start
    most_replicas: int  # ready at one time
    replica_s: float  # of one run, from launch to end, starts and repairs included
    utilisation: float  # share of that in which a replica computes
    batch_mean: float  # sequences in a step, over the time replicas compute
    kv_mean: float  # share of the KV memory of a replica, likewise
    kv_peak: float  # of the fullest replica
    waiting_mean: float  # requests not yet begun, by replica
    waiting_peak: int
    attempts: int  # sent, retries included
    retries: int
    preemptions: int
    failures: int
    launched: int  # by the autoscaler
    released: int
    prefix_hit_share: float | None = None  # of prompt tokens
    series_step_s: float = 0.0  # of the first run
    series: dict[str, tuple[float, ...]] = field(default_factory=dict)  # replicas, running, waiting, kv
