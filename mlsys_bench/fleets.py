"""Several scenarios on one pool of GPUs: the file that asks, and the plan that answers, as their records hold them."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlsys_bench.types import SLO, Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """One scenario of a fleet, with what the fleet changes of it: nothing where it is None or empty.  Priority 1 comes first."""

    name: str
    scenario: str  # a shipped name, or a file
    priority: int = 1
    rate_per_s: float | None = None
    arrivals: str | None = None
    slo: SLO = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Several scenarios on one pool: GPUs by catalogue id."""

    name: str
    description: str
    source: str
    pool: dict[str, int]
    wants: tuple[Want, ...]


# ---------------------------------------------------------------- the plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """What a scenario would need on one kind of GPU alone, at its peak; `why_not` where it cannot run there at all."""

    gpu: str
    precision: str | None = None
    devices_per_replica: int | None = None
    replicas: int | None = None
    replicas_interval: tuple[float, float] | None = None
    each_per_s: float | None = None  # of one replica, within limits and headroom
    usd_per_replica_h: float | None = None
    predicted: dict[str, float] = field(default_factory=dict)
    binds: str | None = None
    provenance: Provenance = Provenance.ASSUMED
    why_not: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Placed:
    """Replicas of a scenario on one kind of GPU."""

    gpu: str
    replicas: int
    gpus: int
    rate_per_s: float
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One scenario: how much of its traffic the pool serves.  `placed` is in the busiest hour of the fleet."""

    name: str
    scenario: str
    model: str
    priority: int
    slo: str
    rate_per_s: float  # at its peak
    share: float  # served in its worst hour
    share_interval: tuple[float, float]  # 90 % or wider
    share_of_requests: float  # served in all hours together
    placed: tuple[Placed, ...]
    options: tuple[Option, ...]
    needs: dict[str, int | None] = field(default_factory=dict)  # GPUs more, of one kind, that make it whole; None: no number does


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """One hour: what each scenario asks for, what share of it is served, and which GPUs work for it."""

    start_s: float
    rates_per_s: dict[str, float]
    shares: dict[str, float]
    gpus: dict[str, dict[str, int]]  # by kind, then by scenario


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetPlan:
    """The pool by scenario and hour; one hour alone where all traffic is steady."""

    name: str
    pool: dict[str, int]
    served: tuple[Served, ...]
    hours: tuple[Hour, ...]
    busiest: int  # of the hours
    is_whole: bool  # every scenario is served in full, every hour
    needs: dict[str, int | None]  # GPUs more, of one kind, that make all whole; empty where they are
    peaks_together: dict[str, int] | None  # GPUs, were all peaks to come at once; None where the pool could not hold that
    usd_per_hour: float | None  # of the GPUs in use, on average
    busiest_usd_per_hour: float | None
    busiest_usd_interval: tuple[float, float] | None
    pool_usd_per_hour: float | None  # of all there are
    lead_s: float
    provenance: Provenance
    assumptions: tuple[str, ...]
    notes: tuple[str, ...] = ()
