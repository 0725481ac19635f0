"""The data that flows through the house: frozen dataclasses, SI units in the names, nothing else.

Measurement -> LatencyProfile -> Plan -> Report; nothing is changed on the way.  What has no value is None, never 0 or -1.
Each class here that is a file of its own is listed in `record.KINDS`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from mlsys_bench.apart import Apart
from mlsys_bench.askings import Asked, ScenarioResult
from mlsys_bench.billing import Beside, Sensitivity
from mlsys_bench.provenance import Provenance as Provenance
from mlsys_bench.senders import Sender
from mlsys_bench.serversides import ServerSide
from mlsys_bench.stage_fleets import StageFleet
from mlsys_bench.surroundings import Autoscaled, Backpressure, MixedFleet, Outlook, Secured
from mlsys_bench.tenancy import Tenancy
from mlsys_bench.timelines import Curve, Steadiness, Timeline
from mlsys_bench.timelines import FleetUse as FleetUse

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a machine is.  `hard` fields must match before two results may be compared, `soft` ones only warn."""

    hard: dict[str, Scalar]
    soft: dict[str, Scalar]


# ---------------------------------------------------------------- bench


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Samples taken in one go.  `cpu_s` and `involuntary` (context switches), when known, go sample by sample with `values`."""

    values: tuple[float, ...]
    cpu_s: tuple[float, ...] | None = None
    involuntary: tuple[int, ...] | None = None
    flagged: tuple[bool, ...] | None = None  # taken while throttled, preempted or beside a neighbour: kept, counted, left out of medians
    crowding: tuple[float, ...] | None = None  # around the sample: how slow the core was to do things side by side, against a chain of them
    clock_hz: tuple[float, ...] | None = None  # of the slowest measuring core, right after the visit


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one call of a benchmark must move and compute, whoever does it: the bytes that physics cannot spare it, and its FLOPs."""

    bytes: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """All rounds of one process.  The launch, not the sample, is the unit of evidence."""

    started_s: float
    rounds: tuple[Round, ...]
    pair: int | None = None  # of a gate: the launch of the other side with this number ran beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One benchmark: every sample, by launch and round.  `skipped` says why `launches` holds none."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    parameters: dict[str, Scalar]
    launches: tuple[Launch, ...]
    skipped: str | None = None
    deterministic: bool = False  # a counter: the same program gives the same value
    work: Work | None = None
    ended: Literal["settled", "budget", "drifting"] | None = None  # of its worst launch: why samples were no longer taken
    error: float | None = None  # relative, against a reference computed in the same run
    tolerance: float | None = None  # what that error may be
    drifted: tuple[Launch, ...] = ()  # launches whose time changed while it was taken: no median stands for them, a fit may weigh them


@dataclass(frozen=True, slots=True, kw_only=True)
class Telemetry:
    """What the machine did while a launch measured: by name with its unit (`sm_clock_hz`, `power_w`, `steal_share`) a value per `at_s`."""

    at_s: tuple[float, ...]  # since the launch began
    series: dict[str, tuple[float | None, ...]]
    totals: dict[str, float] = field(default_factory=dict)  # over the launch: `energy_j`, `involuntary`, `throttled_s`


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The record of one `mlsys bench` run."""

    measurements: tuple[Measurement, ...]
    contended: tuple[str, ...] = ()  # what else used this machine meanwhile, in words; empty: nothing seen
    telemetry: tuple[Telemetry, ...] = ()  # a launch each
    unread: tuple[str, ...] = ()  # what this machine does not tell, and why
    stopped: str | None = None  # in words, where a Ctrl-C ended it


# ---------------------------------------------------------------- requests and their summary

Outcome = Literal["ok", "rejected", "timeout", "connect", "reset", "bad_response", "cancelled", "unfinished"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One request, measured or simulated.  Times are seconds since the run's start; latency counts from `scheduled_s`."""

    index: int
    scheduled_s: float
    sent_s: float | None = None
    headers_s: float | None = None
    token_s: tuple[float, ...] = ()  # arrival of each event that carried tokens
    tokens_per_event: tuple[int, ...] = ()
    done_s: float | None = None
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    token_source: Literal["usage", "chunks", "tokenizer", "simulated"] | None = None
    outcome: Outcome = "ok"
    http_status: int | None = None
    attempt: int = 1
    tenant: str | None = None
    session: str | None = None
    stage_s: dict[str, float] = field(default_factory=dict)
    in_window: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Requests:
    """Every request of one run.  Stored as Parquet, one row each."""

    t0_unix_s: float
    requests: tuple[RequestRecord, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """A latency in seconds.  A percentile the sample is too small for is None and named in `too_few`.

    `intervals` holds 90 % intervals by statistic.
    """

    count: int
    mean: float | None
    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    intervals: dict[str, tuple[float, float]]
    too_few: tuple[str, ...] = ()
    p999: float | None = None  # 99.9 %, where the sample allows it
    effective_count: float | None = None  # so many independent samples would say as much of the mean; None: taken as independent


STOPPED = "stopped by hand"  # so begins the reason of a run that Ctrl-C ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Validity:
    """Whether a run may be believed, and why not."""

    verdict: Literal["valid", "degraded", "invalid"]
    reasons: tuple[str, ...] = ()

    @property
    def is_stopped(self) -> bool:
        """Say whether Ctrl-C ended the run: it is less than was asked for."""
        return any(reason.startswith(STOPPED) for reason in self.reasons)


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantUse:
    """What the users of one tenant saw."""

    name: str
    requests: int
    ok: int
    goodput_ratio: float | None
    ttft_s: LatencySummary
    tpot_s: LatencySummary
    e2e_s: LatencySummary


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """What the users of one run saw, from a load test or a simulation."""

    source: Literal["loadtest", "simulation"]
    target: str
    arrivals: str
    offered_rate_per_s: float | None  # None in a closed loop
    requests: int  # in the window, whatever became of them
    ok: int
    errors: dict[str, int]
    duration_s: float  # of the window
    request_rate_per_s: float  # completed per second
    output_tokens_per_s: float
    goodput_per_s: float | None  # None without an SLO
    goodput_ratio: float | None
    goodput_interval: tuple[float, float] | None  # Wilson, 90 %, of the ratio
    slo: str | None
    slo_met: dict[str, bool | None]  # per limit; None where the sample is too small
    lateness_s: LatencySummary | None  # how late the client itself sent; None in a simulation
    ttft_s: LatencySummary
    tpot_s: LatencySummary
    itl_s: LatencySummary
    e2e_s: LatencySummary
    validity: Validity
    requests_file: str | None = None
    formulas: dict[str, str] = field(default_factory=dict)
    output_tokens_interval: tuple[float, float] | None = None  # 90 %, of the rate per second; None where arrivals follow no law
    tenants: tuple[TenantUse, ...] = ()
    fleet: FleetUse | None = None  # of a simulation
    service_ttft_s: LatencySummary | None = None  # from the real send, of a load test
    service_s: LatencySummary | None = None  # real send to last token
    chunk_gap_s: LatencySummary | None = None  # raw gaps between events, however many tokens they carried
    token_sources: dict[str, int] = field(default_factory=dict)  # answered requests by who counted their tokens
    prompt_tokens_per_s: float | None = None
    mean_prompt_tokens: float | None = None
    mean_output_tokens: float | None = None
    timeline: Timeline | None = None
    steadiness: Steadiness | None = None
    curves: dict[str, Curve] = field(default_factory=dict)  # by metric
    senders: tuple[Sender, ...] = ()  # the processes of a load test
    asked: Asked | None = None  # of a load test
    scenario: ScenarioResult | None = None  # of MLPerf, where the load test was one
    server: ServerSide | None = None  # what the server said of itself during a load test
    slo_seen: dict[str, float | None] = field(default_factory=dict)  # what each limit was held against, failed requests last


# ---------------------------------------------------------------- latency


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a latency profile belongs to.  A profile of another layout is refused."""

    model: str
    precision: str
    device: str
    threads: int | None = None
    pinned_cores: tuple[int, ...] | None = None
    tp: int = 1
    pp: int = 1
    ep: int = 1  # devices that experts are shared out over; 1: they are split like other matrices
    attention_dp: int = 1  # copies of the attention weights, each with requests of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyProfile:
    """How long one engine step (`form='step'`) or one request (`form='service'`) takes in one layout.

    `terms` names the coefficients (`latency` documents each, with its unit), `covariance` is that of their logarithms.
    `constants` holds what is known and not fitted (bytes, FLOPs, bandwidth, peak).
    `valid` is the measured range of each feature.  `residual_log_sd` is the sd of log(measured / predicted).
    """

    form: Literal["step", "service"]
    layout: Layout
    stage: str | None
    terms: tuple[str, ...]
    coefficients: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...]
    constants: dict[str, float]
    residual_log_sd: float
    valid: dict[str, tuple[float, float]]
    provenance: Provenance
    note: str | None = None

    def __post_init__(self) -> None:
        """Raise ValueError where names, coefficients and covariance do not fit together: whoever reads a record says in which file."""
        terms, rows = len(self.terms), [len(row) for row in self.covariance]
        if len(set(self.terms)) < terms:
            raise ValueError(f"terms: {', '.join(self.terms)} names one twice; fit the profile again")
        if len(self.coefficients) != terms:
            raise ValueError(f"coefficients: {len(self.coefficients)} beside {terms} terms; each term has one: fit the profile again")
        if rows != [terms] * terms:
            raise ValueError(f"covariance: rows of {rows} beside {terms} terms; it is {terms} x {terms}: fit the profile again")


# ---------------------------------------------------------------- promises and traffic

Metric = Literal["ttft", "tpot", "itl", "e2e", "goodput", "availability"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One promise: `ttft p95 < 0.5` seconds, or a share such as `goodput > 0.99` (then `stat` is 'ratio'); to one tenant, or to all."""

    metric: Metric
    stat: str
    limit: float
    tenant: str | None = None


SLO = tuple[Limit, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthsPart:
    """A law of token counts as a part of a mixture."""

    share: float
    dist: Literal["constant", "lognormal", "uniform", "normal"] = "constant"
    mean: float
    cv: float = 0.0
    max: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Token counts of requests: a constant, or a law by mean and coefficient of variation, before it is cut at [1, max].

    A mixture takes each of its `parts` with the probability of its share; mean and cv are those of all together.
    """

    dist: Literal["constant", "lognormal", "uniform", "normal", "mixture"] = "constant"
    mean: float
    cv: float = 0.0
    max: int | None = None
    parts: tuple[LengthsPart, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSummary:
    """Token counts that were seen.  From a histogram the mean is exact; `cv_bounds` then says between which values the cv must lie."""

    mean: float
    cv: float
    p50: float
    p90: float
    p99: float
    max: int | None  # None where nobody counted it
    cv_bounds: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSummary:
    """What was seen of traffic.  `dispersion` is variance / mean of the counts in windows of so many seconds; 1 for a Poisson process.

    `dispersion_intervals` are 90 % intervals.  `series_per_s` is the rate in steps of `series_step_s`, None where nothing is known.
    """

    requests: int
    duration_s: float
    rate_per_s: float
    peak_rate_per_s: float  # of the busiest step
    series_step_s: float
    series_per_s: tuple[float | None, ...]
    gap_scv: float | None  # None where only counts are known
    dispersion: dict[str, float]
    dispersion_intervals: dict[str, tuple[float, float]]
    prompt_tokens: LengthSummary | None
    output_tokens: LengthSummary | None
    length_correlation: float | None  # of ranks
    prefix_hit_share: float | None  # of prompt tokens, with a cache that forgets nothing, or as the servers counted it
    prefix_hits_by_cache_tokens: dict[str, float] = field(default_factory=dict)  # least recently used blocks go first
    sessions: int | None = None
    tenants: dict[str, float] = field(default_factory=dict)  # share of the requests
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError where a dispersion is of no window, or an interval of no dispersion."""
        for window in self.dispersion:
            if not re.fullmatch(r"\d+(\.\d+)?(e[+-]\d+)?s", window):
                raise ValueError(f"dispersion: {window!r} is no window in seconds; write it like 60s")
        beside = sorted(self.dispersion_intervals.keys() - self.dispersion.keys())
        if beside:
            raise ValueError(f"dispersion_intervals: {', '.join(beside)} is in no window of dispersion; leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """A share of the traffic with lengths of its own.  What it is promised are the limits that name it.  Priority 1 goes first."""

    name: str
    share: float  # of the requests
    prompt_tokens: Lengths
    output_tokens: Lengths
    priority: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Traffic: how requests arrive and how long they are.  `arrivals` is a law as `workload.arrivals` lists them, e.g. `gamma:1.5`.

    `length_correlation` ties prompt and output lengths: the correlation of their ranks, 0 for lengths that know nothing of each other.
    """

    rate_per_s: float
    arrivals: str
    prompt_tokens: Lengths
    output_tokens: Lengths
    provenance: Provenance = Provenance.ASSUMED
    source: str | None = None
    length_correlation: float = 0.0
    prefix_hit_share: float | None = None
    observed: TrafficSummary | None = None
    tenants: tuple[Tenant, ...] = ()  # the lengths above are then those of all together, by mean and coefficient of variation


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """An instance that can be rented, at a dated, sourced price."""

    provider: str
    instance: str
    device: str  # catalogue id of hardware
    devices: int
    region: str
    term: Literal["on-demand", "spot", "reserved"]
    usd_per_h: float
    source: str
    date: str
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A system, its traffic and its promises, as read from YAML."""

    name: str
    description: str
    model: str
    precision: tuple[str, ...]
    gpus: tuple[str, ...]
    workload: Workload
    slo: SLO
    max_batch: int
    headroom: float  # share of a replica's capacity that stays free
    source: str


# ---------------------------------------------------------------- plan


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetItem:
    """So many replicas of one stage on one device."""

    stage: str
    gpu: str
    precision: str
    tp: int
    pp: int
    replicas: int
    instances: int
    instance: str | None
    usd_per_hour: float | None
    ep: int = 1
    attention_dp: int = 1
    devices: int | None = None  # rented, those that no replica uses among them; None where nothing is said of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A design that was considered, and why it is not the plan."""

    gpu: str
    precision: str
    tp: int
    replicas: int | None
    usd_per_hour: float | None
    predicted: dict[str, float]
    why_not: str
    pp: int = 1
    ep: int = 1
    attention_dp: int = 1
    max_batch: int | None = None
    max_step_tokens: int | None = None
    is_least: bool = False  # no fewer replicas can carry the traffic, and that is dearer already: how many keep the limits was not asked


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierPoint:
    """A fleet that keeps all limits and that no other undercuts in price without being slower; `figure` such as 'ttft_p95_s', by theory.

    `replicas` are those that are rented; the latency is that of the others while those to spare are away.
    """

    gpu: str
    precision: str
    devices_per_replica: int
    replicas: int
    usd_per_hour: float
    figure: str
    latency_s: float
    spare: int = 0  # of the replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    """One stage of a planned stage graph.  `latencies_s` are of its visits, wait included, as simulated: p50, p95 and p99."""

    stage: str
    visits: float  # per request of the scenario
    calls: float  # likewise, that its replicas work for: without the hits of a cache before it, with retries
    replicas: int  # of each of its shards
    shards: int
    servers: int  # requests or batches in work at once, of each shard; 0 for a language model, which says max_batch
    service_s: float  # mean, alone
    utilisation: float
    latencies_s: dict[str, float]
    usd_per_hour: float | None
    binds: str  # what one replica fewer would break
    provenance: Provenance
    source: str
    profile: LatencyProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The answer: a fleet, its cost, what its users will see, with intervals (90 %) and the limit that binds."""

    model: str
    workload: Workload
    slo: str
    fleet: tuple[FleetItem, ...]
    replicas: int
    gpus: int
    gpu: str | None  # None when the fleet is mixed
    devices_per_replica: int
    usd_per_hour: float | None
    usd_per_month: float | None
    usd_per_million_tokens: float | None
    utilisation: float
    binding_constraint: str
    headroom: float  # extra traffic, as a share of today's, before the first limit breaks
    provenance: Provenance
    predicted: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    analytic: dict[str, float]  # the same keys by queueing theory, beside the simulation in `predicted`
    alternatives: tuple[Alternative, ...]
    profile: LatencyProfile
    capacity_per_replica_per_s: float
    max_batch: int
    kv_tokens_per_replica: int
    assumptions: tuple[str, ...]
    prices: tuple[Offer, ...] = ()
    notes: tuple[str, ...] = ()
    max_step_tokens: int | None = None  # prompt and answer tokens in one step of the engine
    scenario: str | None = None
    stages: tuple[StagePlan, ...] = ()  # of a stage graph
    bottleneck: str | None = None  # its busiest stage
    stage_fleet: StageFleet | None = None  # of a stage graph: bill, spares, hours, months
    secured: Secured | None = None  # its spares are among `replicas`; the headroom is that of the replicas needed
    survivors: dict[str, float] = field(default_factory=dict)  # as `predicted`, with only the replicas needed up
    scaled: Autoscaled | None = None
    pressure: Backpressure | None = None
    outlook: Outlook | None = None
    mixed: MixedFleet | None = None
    apart: Apart | None = None  # prefill and decode on pools of their own: the two items of the fleet
    tenancy: Tenancy | None = None
    baseline: Beside | None = None
    sensitivity: tuple[Sensitivity, ...] = ()
    frontier: tuple[FrontierPoint, ...] = ()  # cost against latency
    day_mean_per_s: float | None = None  # requests, over the day whose busiest time `workload` is; None where it is the same all day

    @property
    def mean_per_s(self) -> float:
        """Requests per second on average, which share the bill."""
        return self.workload.rate_per_s if self.day_mean_per_s is None else self.day_mean_per_s
