"""Where a server's limits lie: the records of `mlsys loadtest --sweep` and `--find-max`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys_bench.types import LoadTest


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """The rate at which `figure` has grown by `factor` over what the lowest level shows.  `interval_per_s`: from the figure's own, 90 %,
    None where levels around it have none.
    """

    figure: str  # e.g. 'e2e_p95'
    factor: float
    rate_per_s: float
    interval_per_s: tuple[float, float] | None
    value_s: float  # of the figure, there


@dataclass(frozen=True, slots=True, kw_only=True)
class SweptLevel:
    """One rate of a sweep.  `over`: the server fell behind and the level was ended early; its latencies would grow with its length."""

    rate_per_s: float
    over: bool
    in_flight: int  # at the end of sending
    test: LoadTest


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSweep:
    """Latency and goodput against the rate that is offered.  Levels rise."""

    target: str
    arrivals: str
    slo: str | None
    seed: int
    levels: tuple[SweptLevel, ...]
    knee: Knee | None  # None where latency did not grow so far, or at too few levels
    capacity_per_s: float | None  # most that was completed where the server was never idle; None: it never was
    ended: Literal["done", "saturated", "stopped", "budget"]
    took_s: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a level shows of one limit.  `value` is in seconds, or a share; None where requests failed beyond it."""

    limit: str  # e.g. 'ttft_p99'
    value: float | None
    misses: int  # requests beyond the limit, or failed
    requests: int
    effective: float  # so many independent requests would say as much


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One level of the search, and what was known of the highest rate after it."""

    rate_per_s: float
    duration_s: float
    completed_per_s: float
    over: bool  # the server fell behind; ended early
    trusted: bool  # False: the client itself was late, it says nothing of the server
    shown: tuple[Shown, ...]
    highest_per_s: float
    interval_per_s: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMax:
    """The highest rate within an SLO, with its 90 % interval."""

    target: str
    arrivals: str
    slo: str
    seed: int
    rate_per_s: float | None  # None: not even lone requests keep the limits, or nothing was learned
    interval_per_s: tuple[float, float] | None
    binding: str | None  # the limit that most likely breaks first
    ended: Literal["narrow", "budget", "client", "stopped", "no rate holds"]
    idle: tuple[Shown, ...]  # lone requests
    capacity_per_s: float | None  # completed with `users` requests always in flight
    users: int
    probes: tuple[Probe, ...]
    needed_requests: int  # that a level needs for its percentiles
    budget_s: float
    took_s: float
    notes: tuple[str, ...] = ()
