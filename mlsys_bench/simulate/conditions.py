"""What happens around replicas: clients that give up and try again, failures, autoscaling, prefill and decode apart.  Data and small laws.

Defaults are those of real clients and orchestrators and name them; none is measured here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.types import LatencyProfile

Metric = Literal["in_flight", "queue", "kv", "rate"]
METRICS: tuple[str, ...] = get_args(Metric)
TOLERANCE = 0.1  # of the Kubernetes HorizontalPodAutoscaler: no change while |load / target - 1| is within it


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """Clients that try again after 429, 503, a timeout or a broken connection.

    Retry k waits min(first_s 2^(k-1), most_s) times a uniform factor in [1 - jitter, 1]: the openai Python client (its defaults: two
    retries, 0.5 s, 8 s, 0.25).  `budget` bounds all retries to `reserve` + budget x first attempts, as retry budgets of proxies do.
    """

    attempts: int = 3
    first_s: float = 0.5
    most_s: float = 8.0
    jitter: float = 0.25
    budget: float | None = None
    reserve: int = 10

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        _at_least("attempts", self.attempts, 1)
        _at_least("first_s", self.first_s, 0.0)
        _at_least("most_s", self.most_s, 0.0)
        if not 0 <= self.jitter <= 1:
            raise BadInput(f"retries: a jitter of {self.jitter:g}: it is a share of the wait, from 0 to 1")
        if self.budget is not None and self.budget < 0:
            raise BadInput(f"retries: a budget of {self.budget:g}: it is a share of first attempts, from 0 up")
        if self.first_s > self.most_s:
            why = f"the first wait of {self.first_s:g} s is above the longest of {self.most_s:g} s"
            raise BadInput(f"retries: {why}; raise most, or lower first")

    def wait_s(self, attempt: int, u: float) -> float:
        """Return the wait after a failed attempt, numbered from 1, with u uniform in [0, 1)."""
        return float(min(self.first_s * 2.0 ** min(attempt - 1, 60), self.most_s) * (1 - self.jitter * u))

    def affordable(self, retries: int, first_attempts: int) -> bool:
        """Say whether one more retry is within the budget."""
        return self.budget is None or retries < self.reserve + self.budget * first_attempts


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Replicas that fail, all at once with what they hold, and are back `repair_s` later, empty.

    After `mtbf_s` on average, exponentially distributed, from when a replica is ready; or at given `times` of (seconds, replica).
    """

    repair_s: float
    mtbf_s: float | None = None
    times: tuple[tuple[float, int], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        _at_least("repair time", self.repair_s, 0.0)
        if self.mtbf_s is not None and not self.mtbf_s > 0:
            raise BadInput(f"a mean time between failures of {self.mtbf_s:g} s: it must be above zero")
        if any(at_s < 0 or replica < 0 for at_s, replica in self.times):
            raise BadInput("failures: times and replica numbers begin at 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaling:
    """A fleet that follows its load: desired = ceil(total load / target), the rule of the Kubernetes HorizontalPodAutoscaler.

    Load by `metric`: in_flight requests that run or wait; queue: those that wait for a seat; kv: share of the KV memory held (0..1);
    rate: arrivals per second since the last look.  `target` is what one replica should carry.  A look every `interval_s`; a new replica
    takes requests after `cold_start_s`.  Those that are starting count, so a slow start does not cascade into ever more of them.
    Down only to the most that was desired within `down_delay_s`; those leaving finish what they hold.
    """

    metric: Metric = "in_flight"
    target: float
    least: int = 1
    most: int
    interval_s: float = 15.0
    cold_start_s: float
    down_delay_s: float = 300.0

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.metric not in METRICS:
            raise unknown("autoscaling metric", self.metric, METRICS)
        if not (self.target > 0 and math.isfinite(self.target) and self.interval_s > 0):
            raise BadInput(f"autoscaling: target {self.target:g} and interval {self.interval_s:g} s must be above zero")
        if not 1 <= self.least <= self.most:
            raise BadInput(f"autoscaling between {self.least} and {self.most} replicas: at least 1, and the most not below the least")
        _at_least("cold start", self.cold_start_s, 0.0)
        _at_least("scale-down delay", self.down_delay_s, 0.0)

    def desired(self, load: float, replicas: int) -> int:
        """Return how many replicas this total load asks for, given those there or coming."""
        near = replicas and abs(load / (replicas * self.target) - 1) <= TOLERANCE
        return min(max(replicas if near else math.ceil(load / self.target - 1e-9), self.least), self.most)


@dataclass(frozen=True, slots=True, kw_only=True)
class Disaggregation:
    """Prefill on replicas of its own: the prompt's KV cache then goes over a link to one of the others, which only decode.

    A transfer takes `latency_s` + prompt tokens x `kv_bytes_per_token` / `link_bytes_per_s`; those leaving one prefill replica follow
    each other.  The first token, computed by prefill, reaches the client when the cache has arrived.  `profile` and `limits` are those
    of the prefill replicas where they differ.
    """

    prefill_replicas: int
    kv_bytes_per_token: float
    link_bytes_per_s: float
    latency_s: float = 0.0
    profile: LatencyProfile | None = None
    limits: Limits | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        _at_least("prefill replicas", self.prefill_replicas, 1)
        _at_least("latency of a transfer", self.latency_s, 0.0)
        if not (self.kv_bytes_per_token >= 0 and self.link_bytes_per_s > 0):
            raise BadInput(f"disaggregation: {self.kv_bytes_per_token:g} bytes a token over {self.link_bytes_per_s:g} bytes/s cannot be")

    def transfer_s(self, prompt_tokens: int) -> float:
        """Return how long the cache of a prompt takes on an idle link."""
        return self.latency_s + prompt_tokens * self.kv_bytes_per_token / self.link_bytes_per_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """What a fleet lives under.  `timeout_s`: a client gives up an attempt so long after sending it, and the request is cancelled."""

    timeout_s: float | None = None
    retries: Retries | None = None
    failures: Failures | None = None
    autoscaling: Autoscaling | None = None
    disaggregation: Disaggregation | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise BadInput(f"a timeout of {self.timeout_s:g} s: it must be above zero")
        if self.disaggregation and (self.autoscaling or self.failures):
            raise BadInput("disaggregation with autoscaling or failures is not simulated; simulate them one at a time")

    @property
    def plain(self) -> bool:
        """Nothing happens around the replicas."""
        return self == Conditions()


def uniform(seed: int, *key: int) -> float:
    """Return a uniform draw that depends on nothing but the seed and the key, so that other events do not shift it."""
    return float(np.random.default_rng([seed, *key]).random())


def _at_least(name: str, value: float, least: float) -> None:
    if not (value >= least and math.isfinite(value)):
        raise BadInput(f"{name} of {value:g}: it must be a finite number, at least {least:g}")
