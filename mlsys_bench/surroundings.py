"""What surrounds a plan, as its record holds it: replicas to spare, autoscaling, limits that protect it, growth.  `plan` computes them."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench.provenance import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Secured:
    """A fleet with replicas to spare.  `zones` are those that are never reclaimed, `spot` the others, by zone."""

    needed: int  # hold the limits at peak
    replicas: int
    spare: int
    zones: tuple[int, ...]
    spot: tuple[int, ...]
    survives_zone: bool = False  # asked for: any one zone may go
    binds: str  # objective, zone or floor: what asked for the last replica
    objective: float
    availability: float  # share of time with enough replicas up
    interval: tuple[float, float]  # every figure at the bad end of its own 90 % interval, and at the good one: wider than 90 %
    downtime_min_per_year: float
    downtime_interval: tuple[float, float]
    floor_availability: float  # the same for what is held without spot; with no spot the same
    replica_availability: float
    replica_mtbf_s: float
    replica_repair_s: float
    provenance: Provenance
    assumptions: tuple[str, ...]


# ---------------------------------------------------------------- autoscaling


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """The rule of a fleet that follows its load: desired = ceil(load / target), load in flight or per second, a look every interval."""

    metric: str
    target: float  # what one replica should carry
    least: int
    most: int
    interval_s: float
    cold_start_s: float
    down_delay_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """One hour (or step) of the course: its highest rate, the scheduled replicas, and those the rule had on average."""

    start_s: float
    rate_per_s: float
    scheduled: int
    followed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one way of running the fleet costs and breaks in one period of the course.  Intervals are 90 %, over runs."""

    way: str  # static, scheduled or followed
    replica_h: float
    replica_h_interval: tuple[float, float]
    violation_min: float
    violation_min_interval: tuple[float, float]
    most_replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaled:
    """A fleet that changes with its traffic."""

    rule: Rule
    threshold: float  # share of what a replica carries within the limits
    lead_s: float
    growth: float  # of the rate within one lead, at its steepest
    hours: tuple[Hour, ...]
    uses: tuple[Use, ...]  # static, scheduled, followed
    cascades: bool  # whether the rule ever had more than a tenth above what the peak asks for
    provenance: Provenance
    notes: tuple[str, ...]
    from_nothing_per_s: float = 0.0  # the highest rate within one lead of none at all

    def use(self, way: str) -> Use:
        """Return one of the ways."""
        return next(u for u in self.uses if u.way == way)


# ---------------------------------------------------------------- protection


@dataclass(frozen=True, slots=True, kw_only=True)
class Overload:
    """What happens at so many times the planned peak."""

    load: float
    rejected_by_queue: float  # share, with the queue limit alone
    rejected_by_rate: float  # share, with the rate limit alone
    first_token_s: float  # p-quantile of those admitted by the queue limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Backpressure:
    """Settings for the engine or gateway (queue limit, of one replica) and for the rate limiter (of the fleet)."""

    queue_limit: int
    last_place_s: float  # p-quantile of the time to first token in the last place
    rate_per_s: float
    burst: int
    tokens_per_min: float | None  # the same rate in tokens, where their mean is known
    loads: tuple[Overload, ...]
    provenance: Provenance
    notes: tuple[str, ...]


# ---------------------------------------------------------------- growth


@dataclass(frozen=True, slots=True, kw_only=True)
class Month:
    """One month from now: its traffic, the replicas that hold it, their price; `replicas_interval` where growth has one."""

    month: int
    rate_per_s: float
    replicas: int
    replicas_interval: tuple[int, int] | None
    usd_per_h: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What growth does to a fleet.  Months count from now, 0 is today; None: never."""

    per_month: float = 0.0  # growth
    fleet: int
    full_at_per_s: float  # the highest rate the fleet holds
    full_month: float | None
    full_interval: tuple[float | None, float | None] | None  # earliest (fastest growth), latest
    months: tuple[Month, ...]


# ---------------------------------------------------------------- a fleet of several kinds


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPlan:
    """Replicas of one kind for prompts of `above_tokens` < tokens <= `most_tokens` (None: any longer), as simulated."""

    gpu: str
    precision: str
    devices_per_replica: int
    replicas: int
    instances: int
    instance: str | None
    usd_per_hour: float
    above_tokens: float
    most_tokens: float | None
    share: float  # of all requests
    utilisation: float
    predicted: dict[str, float]  # of its own requests
    provenance: Provenance
    spare: int = 0  # of its replicas: the others hold the limits at peak


@dataclass(frozen=True, slots=True, kw_only=True)
class MixedFleet:
    """Pools of several kinds that a router fills by prompt length.  `predicted` is of all requests together.

    With an availability every pool has replicas to spare; latencies and utilisation are those without them.
    """

    pools: tuple[PoolPlan, ...]
    usd_per_hour: float
    saving: float  # share of the plan's cost
    predicted: dict[str, float]
    provenance: Provenance
    availability: float | None = None  # share of time in which every pool has enough replicas up; None where nobody asked
    availability_interval: tuple[float, float] | None = None
