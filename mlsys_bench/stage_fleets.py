"""What a plan of several stages says beside its stages, as its record holds it: the bill, spares, autoscaling, growth, engines.

`plan.graph` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mlsys_bench.provenance import Provenance
from mlsys_bench.surroundings import Autoscaled

NO_END_S = 1e9  # the upper end of a latency that may grow without end, as the time of a request that gets no answer


# ---------------------------------------------------------------- the bill


@dataclass(frozen=True, slots=True, kw_only=True)
class Rented:
    """Instances of one kind, and the stages whose replicas stand on them."""

    stages: tuple[str, ...]
    provider: str
    instance: str
    region: str
    term: str
    instances: float  # whole ones; vCPUs where they are paid one by one
    committed: int  # of them, paid for before anybody planned
    unit: str  # a device of the catalogue, or vCPU
    holds: float  # units rented
    usd_per_hour: float
    source: str
    date: str
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a stage costs beside machines: storage, or traffic that leaves."""

    stage: str
    what: str
    usd_per_hour: float
    source: str
    date: str
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class StageBill:
    """What is rented for all stages together, and what is paid beside; the sum is the plan's price.

    `stranded` are devices, by their name, that no replica uses.
    """

    rented: tuple[Rented, ...]
    beside: tuple[Beside, ...]
    stranded: dict[str, float]
    unpriced: tuple[str, ...]  # what the sum leaves out


# ---------------------------------------------------------------- availability


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpare:
    """One stage with its replicas to spare, of each shard."""

    stage: str
    needed: int
    replicas: int
    shards: int
    zones: tuple[int, ...]
    availability: float  # share of time with enough up
    replica_mtbf_s: float
    replica_repair_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesSecured:
    """Replicas to spare in every stage, so that requests are answered within the limits for the share of time asked for.

    `cuts` are the sets of stages without which no request is answered: one stage, or several that stand in for each other.
    """

    objective: float
    availability: float  # share of time with an answer
    interval: tuple[float, float]  # every figure at the bad end of its 90 % interval, and at the good one
    whole: float  # share of time with nothing missing: no fallback in use
    downtime_min_per_year: float
    downtime_interval: tuple[float, float]
    zones: int
    survives_zone: bool
    binds: str  # objective or zone, or peak where nothing is to spare
    spare_usd_per_hour: float | None
    cuts: tuple[tuple[str, ...], ...]
    stages: tuple[StageSpare, ...]
    provenance: Provenance
    assumptions: tuple[str, ...]


# ---------------------------------------------------------------- hours and months


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRule:
    """How a stage may follow its load: desired = ceil(load / target), load in flight or in calls per second."""

    metric: str
    target: float  # what one replica should carry
    share: float  # of what it carries within the limits
    least: int
    most: int
    lead_s: float  # a look and a cold start
    growth: float  # of the rate within one lead, at its steepest


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesScaled:
    """Every stage by the hour of a day: the replicas of each of its shards that hold the limits, with headroom and spares.

    `rules` follow the load instead; those of language models were played, and `engines` says how that went.  Dollars are of one period,
    launches a cold start ahead among them.
    """

    start_s: tuple[float, ...]  # of each hour, or step
    rates_per_s: tuple[float, ...]  # its highest
    replicas: dict[str, tuple[int, ...]]
    rules: dict[str, StageRule]
    engines: dict[str, Autoscaled]
    period_s: float
    static_replica_h: float
    scheduled_replica_h: float
    static_usd: float | None
    scheduled_usd: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMonth:
    """One month from now: its traffic, replicas by stage that hold it with headroom and spares, their price."""

    month: int
    rate_per_s: float
    replicas: dict[str, int]
    usd_per_h: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesOutlook:
    """What growth does.  Months count from now; None: never, or not within a hundred years."""

    per_month: float
    full_at_per_s: float  # where the first limit breaks
    full_month: float | None
    first: str  # the stage that is full then
    why: str  # what breaks there
    stages: dict[str, float | None]  # the month in which each stage alone has too few replicas
    months: tuple[StageMonth, ...]


# ---------------------------------------------------------------- all


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEngine:
    """How the engine of a stage is set."""

    model: str
    max_batch: int
    max_step_tokens: int | None
    kv_tokens_per_replica: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageFleet:
    """All of it; None where it was not asked for.  `replicas` are 90 % intervals by stage, of each shard.

    `carried` is the share of a replica's capacity that it may use within headroom and limits, by stage.
    """

    bill: StageBill
    entry: str = ""  # the stage where requests come in, where it does work
    promises: dict[str, str] = field(default_factory=dict)  # limits of single stages
    components: dict[str, str] = field(default_factory=dict)
    carried: dict[str, float] = field(default_factory=dict)
    replicas: dict[str, tuple[float, float]] = field(default_factory=dict)
    engines: dict[str, StageEngine] = field(default_factory=dict)
    memory_bytes: dict[str, float] = field(default_factory=dict)
    secured: StagesSecured | None = None
    scaled: StagesScaled | None = None
    outlook: StagesOutlook | None = None
