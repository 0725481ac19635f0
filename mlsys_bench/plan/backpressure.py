"""The queue limit and the rate limit that protect the tail, and how many requests they turn away.

Queue limit.  A replica with c slots, all taken, ends requests at the rate r = c / service.  Whoever takes place k of its queue waits for k
ends: Erlang (k, r) where ends come as a Poisson process, as they do from M/M/c and nearly from many slots at once.  With `scv` of the time
between ends other than 1 it is the gamma law of the same mean k / r and variance k scv / r^2, exact for renewals with gamma gaps.  K is the
largest place whose p-quantile and the time to the first token stay within the limit: a promise to each one admitted, at any overload.
Rejected: M/M/c/c+K, exact for exponential service.

Rate limit.  A bucket fills at the rate the fleet carries within its limits and holds `burst` = replicas x K requests: a burst that meets
a full fleet and is spread evenly takes no place beyond K.  What it refuses of Poisson arrivals is exact: the deficit of the bucket falls at
the rate of refill and grows by one with each arrival let in, as the work in M/D/1/burst with service 1 / rate does, so it refuses what that
queue blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mlsys_bench import units
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.queueing.finite import mg1k
from mlsys_bench.queueing.laws import Deterministic
from mlsys_bench.queueing.mmc import mmck
from mlsys_bench.surroundings import Backpressure, Overload
from mlsys_bench.types import Provenance

LOADS = (1.0, 1.2, 2.0)
EXACT_BURST = 256  # larger buckets: M/D/1/K takes K^2 steps, and what they refuse is the excess alone
MOST_PLACES = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """One replica at a full load: slots, the mean time a request holds one, and the limit to protect.

    `first_s`: from a slot to the first token, at the same percentile.  `scv`: of the time between ends.
    """

    slots: int
    service_s: float
    limit_s: float  # on the time to first token
    p: float
    first_s: float
    scv: float = 1.0

    def __post_init__(self) -> None:
        """Refuse what makes no sense."""
        if self.slots < 1 or not (self.service_s > 0 and self.limit_s > 0 and self.first_s >= 0 and self.scv >= 0 and 0 < self.p < 1):
            raise BadInput(f"a queue limit needs slots, times above zero and a percentile between 0 and 1: {self}")

    @property
    def ends_per_s(self) -> float:
        """How fast a full replica ends requests."""
        return self.slots / self.service_s

    @property
    def wait_s(self) -> float:
        """What the limit leaves for the queue."""
        return self.limit_s - self.first_s


def backpressure(
    tail: Tail,
    *,
    replicas: int,
    peak_per_s: float,
    most_per_s: float,
    tokens_per_request: float | None = None,
    provenance: Provenance = Provenance.ASSUMED,
) -> Backpressure:
    """Return the limits that keep the time to first token of whoever is admitted, and the shares refused at 1, 1.2 and 2 times the peak.

    `most_per_s`: what one replica carries within all its limits; arrivals are split evenly at random.  Raises Infeasible where even an
    empty queue misses the limit.
    """
    places = queue_limit(tail)
    rate = replicas * most_per_s
    burst = max(1, replicas * places)
    return Backpressure(
        queue_limit=places,
        last_place_s=tail.first_s + wait_in_place_s(tail, places),
        rate_per_s=rate,
        burst=burst,
        tokens_per_min=None if tokens_per_request is None else 60 * rate * tokens_per_request,
        loads=tuple(_overload(tail, places, replicas, load, load * peak_per_s, rate, burst) for load in LOADS),
        provenance=provenance,
        notes=tuple(_notes(tail, places, peak_per_s, rate)),
    )


def queue_limit(tail: Tail) -> int:
    """Return the largest number of waiting requests whose last keeps the limit; 0: only free slots."""
    if tail.wait_s < 0:
        raise Infeasible(
            f"the first token takes {units.show_s(tail.first_s)} in a free slot, more than the limit of {units.show_s(tail.limit_s)}: "
            "no queue limit helps; allow more time or a faster design"
        )
    low, high = 0, 1
    while high <= MOST_PLACES and wait_in_place_s(tail, high) <= tail.wait_s:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if wait_in_place_s(tail, middle) <= tail.wait_s else (low, middle)
    return low


def wait_in_place_s(tail: Tail, place: int) -> float:
    """Return the p-quantile of the wait of whoever is number `place` in the queue, 0 in front of it."""
    from scipy.special import gammaincinv

    if place == 0:
        return 0.0
    if tail.scv == 0:
        return place / tail.ends_per_s
    return float(gammaincinv(place / tail.scv, tail.p)) * tail.scv / tail.ends_per_s


def refused_by_bucket(rate_per_s: float, refill_per_s: float, burst: int) -> float:
    """Return the share of Poisson arrivals that find less than one token: blocking of M/D/1/burst; of large buckets the excess alone."""
    if burst > EXACT_BURST:
        return max(0.0, 1 - refill_per_s / rate_per_s)
    return max(0.0, mg1k(rate_per_s, Deterministic(1 / refill_per_s), burst).p_blocked)


def _overload(tail: Tail, places: int, replicas: int, load: float, rate_per_s: float, refill_per_s: float, burst: int) -> Overload:
    queue = mmck(rate_per_s / replicas, tail.service_s, tail.slots, tail.slots + places)
    return Overload(
        load=load,
        rejected_by_queue=queue.p_blocked,
        rejected_by_rate=refused_by_bucket(rate_per_s, refill_per_s, burst),
        first_token_s=tail.first_s + queue.wait.quantile_s(tail.p),
    )


def _notes(tail: Tail, places: int, peak_per_s: float, rate: float) -> Iterator[str]:
    percent = f"{100 * tail.p:g} %"
    yield f"whoever is admitted sees a first token within {units.show_s(tail.limit_s)} in {percent} of cases, in the last place too"
    yield "rejections by M/M/c/K: exponential service and arrivals split evenly at random; a router that sees queues rejects fewer"
    if places == 0:
        yield "no request may wait: refuse those that find no free slot"
    if peak_per_s > rate:
        peak, most = units.show_rate(peak_per_s), units.show_rate(rate)
        yield f"the peak of {peak} is above the {most} the fleet carries: the rate limiter refuses the rest"
