"""The types of a system of several stages: what a request visits, in which order, and what each visit takes.

`scenario` reads them from YAML: the key of a field is its name without its unit (`timeout_s` is `timeout: 60ms`), and the unit is the
one named in its type.  The JSON Schema of the format is made from these classes too, so the three cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mlsys_bench.types import SLO, Lengths, Workload

DONE = "done"  # the request, or the branch of a parallel stage, ends here

Seconds = Annotated[float, "duration"]  # 20ms
Bytes = Annotated[float, "size"]  # 40GB
UsdPerHour = Annotated[float, "price"]  # $6.88/h
Share = Annotated[float, "share"]  # 30%, or 0.3
Number = Annotated[float, "number"]  # above zero, no unit
Count = Annotated[int, "count"]  # whole, above zero
Target = Annotated[str, "stage"]  # a stage, or `done`


# ---------------------------------------------------------------- what a visit takes


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumed:
    """A time nobody measured here, with its source.  A batch of n takes `mean` + n x `per_item`, varied by dist and cv.

    `spread`: the true time is taken to lie between time / spread and time x spread, at 90 %; 2 unless said.
    """

    dist: Literal["constant", "exponential", "lognormal", "gamma", "uniform"]
    mean_s: Seconds
    cv: Number | None = None  # standard deviation / mean; where the law has one to choose
    per_item_s: Seconds = 0.0
    spread: Number | None = None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A latency profile (a record of `mlsys fit`), its path beside the scenario's own."""

    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """An LLM served with continuous batching, its step times from physics; `--from STAGE=FILE` puts a measured profile in its place.

    Lengths not given here are those of the traffic.
    """

    model: str
    precision: tuple[str, ...]
    max_batch: Count
    prompt: Lengths | None = None
    output: Lengths | None = None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """How long a visit takes: exactly one of the three."""

    assumed: Assumed | None = None
    measured: Measured | None = None
    roofline: Roofline | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batching:
    """A replica takes up to `max` waiting requests at once; it starts when they are there or the oldest has waited `wait`."""

    max: Count
    wait_s: Seconds = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """What one replica runs on: vCPUs, or `gpus` devices of one of the GPUs named; `storage` is what it keeps beside its machine."""

    vcpu: Number | None = None
    memory_bytes: Bytes | None = None
    storage_bytes: Bytes | None = None
    gpu: tuple[str, ...] = ()
    gpus: Count = 1


# ---------------------------------------------------------------- where a request goes next


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One of several ways on, each with its share of the requests."""

    to: dict[str, Share]
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Popularity:
    """Which items are asked for: Zipf's law of exponent `zipf` over `items`, of which the cache holds `size`, least recently used out."""

    zipf: Number
    items: Count
    size: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A share of the visits is answered from a cache: given as `hit`, or computed from `popularity`.

    Without `on_miss` the cache stands before the stage's own work, and a hit skips it.  With `on_miss` the stage is the cache: its
    service is the lookup, which every visit takes.
    """

    hit: Share | None = None
    popularity: Popularity | None = None
    on_hit: Target = DONE
    on_miss: Target | None = None
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """When a parallel stage goes on: when all have answered or, after `by` (at once where none is given), `k` of them."""

    k: Count
    of: Count
    by_s: Seconds | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Escalate:
    """After its work a share of the requests goes to another stage instead; it may lie earlier."""

    to: Target
    p: Share
    source: str


# ---------------------------------------------------------------- what may go wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """At most `limit` requests wait per replica; who comes later is rejected."""

    limit: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A share of the attempts ends in an error after the work is done."""

    p: Share
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """An attempt that was rejected, timed out or failed is made again, up to `max` times, `backoff` later (doubled each time).

    Retries of the stage never exceed `budget` of its first attempts.
    """

    max: Count
    backoff_s: Seconds = 0.0
    budget: Share = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hedge:
    """An attempt without an answer after this time is sent a second time; the first answer counts."""

    after_s: Seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Fallback:
    """Where a request goes on whose attempts were all rejected, timed out or failed."""

    to: Target


# ---------------------------------------------------------------- the graph


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage: its work, the replicas that do it, and the way on (none given: the request ends here).

    `concurrency` is how many requests a replica works on at once.  `timeout` is that of each attempt, from when it is sent; work that
    nobody waits for any more is still finished.  `shards` is into how many parts its data is split: each visit asks all of them.
    An `async` stage is visited without waiting for it, nor for what comes after it.  `egress` leaves the network with each of its answers.
    """

    name: str
    component: str | None = None
    service: Service | None = None
    concurrency: Count = 1
    batching: Batching | None = None
    shards: Count = 1
    queue: Queue | None = None
    timeout_s: Seconds | None = None
    retries: Retries | None = None
    failure: Failure | None = None
    hedge: Hedge | None = None
    fallback: Fallback | None = None
    cache: Cache | None = None
    parallel: tuple[str, ...] = ()
    join: Join | None = None  # None: all
    next: Target | None = None
    route: Route | None = None
    escalate: Escalate | None = None
    is_async: bool = False
    resources: Resources | None = None
    egress_bytes: Bytes | None = None
    slo: SLO = ()

    @property
    def engine(self) -> Roofline | None:
        """The language model served here, None for any other stage."""
        return self.service.roofline if self.service else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What nobody sells by the catalogue: a vCPU hour, with its source."""

    usd_per_vcpu_h: UsdPerHour
    source: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StageGraph:
    """A scenario of several stages: a system, its traffic and its promises, as read from YAML.

    `headroom` is the share of every stage's capacity that stays free.  Requests that carry no tokens have lengths of mean 0.
    """

    name: str
    description: str
    source: str
    workload: Workload
    slo: SLO
    headroom: float
    entry: str
    stages: tuple[Stage, ...]
    cost: Cost | None = None

    def stage(self, name: str) -> Stage:
        """Return the stage of this name."""
        return next(stage for stage in self.stages if stage.name == name)

    @property
    def engines(self) -> tuple[Stage, ...]:
        """The stages that serve a language model."""
        return tuple(stage for stage in self.stages if stage.engine is not None)
