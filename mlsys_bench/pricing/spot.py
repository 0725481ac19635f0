"""What spot capacity really costs: reclaims, the work they throw away, the time until a replacement serves, and the spares that hold it.

An instance lives for L on average, then its pool — one (zone, type) — is reclaimed together.  Paid for is its life; useful of it is

    L - start - waste          start: until the replacement serves, waste: work lost and time drained, per reclaim
    waste = n - E[min(R, n)] + n P(R > n) + E[(S - n)+^2] / (2 E[S])

for requests of length S with a notice of n: nothing new is taken within the notice, so the place of a request whose rest R is shorter
stands idle from its end on, and a longer one is lost with all that was done for it.  R is the forward recurrence time of S,
P(R > r) = E[(S - r)+] / E[S]; age and rest of the request met at a random time have P(age > a, R > r) = E[(S - a - r)+] / E[S], which
integrates to the last term.  Source: Cox, Renewal Theory (1962), ch. 5.

Survivors: with z pools of k each, losing one leaves (z - 1) k, so m useful replicas take z ceil(m / (z - 1)); with one pool there is
nothing that survives, and spot holds nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlsys_bench.errors import BadInput


@dataclass(frozen=True, slots=True, kw_only=True)
class Reclaims:
    """How spot capacity goes and comes.  `pools` are the (zone, type) pairs it is spread over: what is lost together.

    Lives differ by type, zone and month; no published figure holds, so whoever plans gives them with a source.
    """

    mean_life_s: float
    pools: int
    start_s: float  # from launch until a replica serves
    refill_s: float  # from a reclaim until the pool sells again
    waste_s: float = 0.0  # of `wasted_s`, per reclaim
    source: str = "assumed"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        times = (self.start_s, self.refill_s, self.waste_s)
        if self.pools < 1 or not all(math.isfinite(t) and t >= 0 for t in times) or not 0 < self.mean_life_s < math.inf:
            raise BadInput(f"spot: {self.pools} pool(s), a life of {self.mean_life_s:g} s and times of {times}: none may be below zero")

    @property
    def useful_share(self) -> float:
        """Share of the paid time in which an instance does work that counts."""
        return max(0.0, 1 - (self.start_s + self.waste_s) / self.mean_life_s)

    @property
    def gone_share(self) -> float:
        """Share of time in which a pool cannot serve: (refill + start) / (life + refill)."""
        return min(1.0, (self.refill_s + self.start_s) / (self.mean_life_s + self.refill_s))

    @property
    def paid_share(self) -> float:
        """Share of time in which an instance of a pool is billed: life / (life + refill)."""
        return self.mean_life_s / (self.mean_life_s + self.refill_s)


def wasted_s(lengths_s: Sequence[float], notice_s: float) -> float:
    """Return the seconds of one place of a replica that a reclaim wastes on average: requests of these lengths, this notice."""
    if not lengths_s or min(lengths_s) < 0 or not sum(lengths_s) > 0 or notice_s < 0:
        raise BadInput("work lost to reclaims needs request lengths above zero and a notice from 0 up")
    total = math.fsum(lengths_s)
    longer = math.fsum(max(s - notice_s, 0.0) for s in lengths_s) / total  # P(R > n)
    done_in_notice = math.fsum(s * s - max(s - notice_s, 0.0) ** 2 for s in lengths_s) / (2 * total)  # E[min(R, n)]
    lost_age = math.fsum(max(s - notice_s, 0.0) ** 2 for s in lengths_s) / (2 * total)
    return notice_s - done_in_notice + notice_s * longer + lost_age


def instances_to_hold(replicas: int, pools: int) -> int | None:
    """Return the spot instances of which so many survive the loss of any one pool: z ceil(m / (z - 1)); None with a single pool."""
    if replicas == 0:
        return 0
    return None if pools < 2 else pools * math.ceil(replicas / (pools - 1))


def usd_per_useful_h(usd_per_h: float, reclaims: Reclaims) -> float:
    """Return the price of an hour of work that counts, spares apart: price / useful share; infinite where nothing counts."""
    return usd_per_h / reclaims.useful_share if reclaims.useful_share > 0 else math.inf


def share_short(reclaims: Reclaims, lost_pools: int = 2) -> float:
    """Return the share of time in which at least so many pools are gone at once: binomial, pools independent of each other."""
    p, z = reclaims.gone_share, reclaims.pools
    return math.fsum(math.comb(z, k) * p**k * (1 - p) ** (z - k) for k in range(lost_pools, z + 1))
