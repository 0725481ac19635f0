"""A plan held against production's own metrics: the record of `mlsys verify PLAN --prometheus`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys_bench.checked import Check


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One figure of the traffic: as planned and as production shows it, with its 90 % interval.  `alike`: the plan was made for it."""

    name: str
    unit: str
    planned: float
    seen: float
    low: float | None
    high: float | None
    alike: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """One limit of the plan beside what production shows of it.  `kept` is None where the metrics cannot tell."""

    limit: str
    low: float | None
    high: float | None
    kept: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Production:
    """A plan held against a range of production's metrics.

    `checks` hold the plan's own predictions against it.  Where production's traffic is not the plan's, `remade` holds predictions made
    anew with the plan's profile, at the load and the lengths that one replica of production saw; they decide then.
    """

    plan_file: str
    source: str
    engine: str
    start_unix_s: float
    duration_s: float  # in which something is known
    requests: int
    replicas: float  # mean over the range
    replicas_planned: int
    replicas_counted: bool  # False: no label tells them apart, those planned are assumed
    rate_per_s: float  # of the fleet
    busiest_share: float | None  # rate of the busiest replica over the mean of all
    traffic: tuple[Seen, ...]
    as_planned: bool
    utilisation: float  # as the plan has it
    utilisation_seen: float | None  # offered load over predicted capacity, at production's traffic; None where nothing was made anew
    kv_share: tuple[float, float] | None  # of the cache in use: mean and most
    checks: tuple[Check, ...]
    remade: tuple[Check, ...]
    limits: tuple[Kept, ...]
    verdict: Literal["holds", "does not hold", "undecided"]
    notes: tuple[str, ...] = ()
