"""One queue, c equal servers, Poisson arrivals, exponential service: Erlang's formulas and what follows from them.

Notation: a = rate x service is the offered load in erlangs, rho = a / c the utilisation, mu = 1 / service,
theta = c mu - lambda the rate at which a queue drains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from mlsys_bench.errors import BadInput, Infeasible, Overload


def erlang_b(servers: int, offered: float) -> float:
    """Return the share of customers lost when `servers` take an offered load (erlangs) and nobody waits (M/G/c/c).

    Recursion B_k = a B_{k-1} / (k + a B_{k-1}), B_0 = 1: every step is a ratio of positive numbers below 1, so it neither
    overflows nor cancels; checked to c = 10^4.  Insensitive to the law of service.
    Source: Erlang (1917); the recursion as in Cooper, Introduction to Queueing Theory (1981), ch. 3.
    """
    _check(servers, offered)
    blocking = 1.0
    for k in range(1, servers + 1):
        blocking = offered * blocking / (k + offered * blocking)
    return blocking


def erlang_c(servers: int, offered: float) -> float:
    """Return the probability that a customer waits in M/M/c.  Raises Overload when offered >= servers.

    C = B / (1 - rho (1 - B)) with Erlang's B of the same servers and load.
    Source: Erlang (1917); Cooper (1981), ch. 3.
    """
    _check(servers, offered)
    if offered >= servers:
        raise Overload(offered / servers, servers, enough=math.floor(offered) + 1)
    blocking = erlang_b(servers, offered)
    return blocking / (1 - offered / servers * (1 - blocking))


@dataclass(frozen=True, slots=True)
class MMc:
    """The M/M/c queue, first come first served.  Raises Overload at or above saturation.

    Exact for Poisson arrivals and exponential service.  Service that varies less waits less, heavier tails wait longer:
    for those this is no bound.
    """

    rate_per_s: float
    service_s: float  # mean
    servers: int
    p_wait: float = field(init=False)  # Erlang C

    def __post_init__(self) -> None:
        if not (self.service_s > 0 and math.isfinite(self.service_s)):
            raise BadInput(f"a service time of {self.service_s} s is not positive and finite")
        object.__setattr__(self, "p_wait", erlang_c(self.servers, self.rate_per_s * self.service_s))

    @property
    def utilisation(self) -> float:
        """Offered load over capacity: rho = lambda / (c mu)."""
        return self.rate_per_s * self.service_s / self.servers

    @property
    def drain_per_s(self) -> float:
        """Rate of the exponential wait of those who wait: theta = c mu - lambda."""
        return self.servers / self.service_s - self.rate_per_s

    @property
    def wait_s(self) -> float:
        """Mean wait in queue, those who do not wait included: C / theta."""
        return self.p_wait / self.drain_per_s

    @property
    def sojourn_s(self) -> float:
        """Mean time from arrival to the end of service."""
        return self.wait_s + self.service_s

    def wait_p(self, t_s: float) -> float:
        """Return P(wait > t) = C exp(-theta t)."""
        return 1.0 if t_s < 0 else self.p_wait * math.exp(-self.drain_per_s * t_s)

    def wait_quantile_s(self, p: float) -> float:
        """Return the p-quantile of the wait over all customers: 0 when P(no wait) >= p."""
        _check_share(p)
        return max(0.0, math.log(self.p_wait / (1 - p)) / self.drain_per_s) if self.p_wait > 0 else 0.0

    def sojourn_p(self, t_s: float) -> float:
        """Return P(wait + service > t).

        The wait is 0 or Exp(theta), the service Exp(mu), independent: exp(-mu t) + C mu (exp(-mu t) - exp(-theta t)) / (theta - mu).
        Written with expm1 so that theta -> mu, where the law is Erlang-2, needs no special case and loses no digits.
        """
        if t_s < 0:
            return 1.0
        mu, theta = 1 / self.service_s, self.drain_per_s
        gap = abs(theta - mu)
        blend_s = -math.expm1(-gap * t_s) / gap if gap > 0 else t_s
        return math.exp(-mu * t_s) + self.p_wait * mu * math.exp(-min(mu, theta) * t_s) * blend_s

    def sojourn_quantile_s(self, p: float) -> float:
        """Return the p-quantile of wait + service."""
        _check_share(p)
        return quantile_of(self.sojourn_p, p, self.sojourn_s)


def servers_for(rate_per_s: float, service_s: float, limit_s: float, p: float, of: Literal["wait", "sojourn"] = "wait") -> int:
    """Return the fewest servers whose p-quantile of wait or sojourn is at most `limit_s` (M/M/c).

    Both fall with every server added, so doubling and halving finds the exact answer.
    Raises Infeasible when even an idle server would miss a sojourn limit.
    """
    _check_share(p)
    if of == "sojourn" and math.exp(-limit_s / service_s) > 1 - p:
        floor_s = -service_s * math.log(1 - p)
        raise Infeasible(f"no number of servers keeps p{100 * p:g} of the sojourn under {limit_s:g} s: service alone takes {floor_s:g} s")

    def meets(servers: int) -> bool:
        queue = MMc(rate_per_s, service_s, servers)
        exceeds = queue.wait_p(limit_s) if of == "wait" else queue.sojourn_p(limit_s)
        return exceeds <= 1 - p

    return least(meets, first=math.floor(rate_per_s * service_s) + 1)


def least(meets: Callable[[int], bool], first: int, most: int = 10**9) -> int:
    """Return the least integer >= first that meets a monotone condition, doubling the step and then halving it.

    Raises Infeasible when nothing up to `most` does.
    """
    if meets(first):
        return first
    low, step = first, 1
    while not meets(low + step):
        low, step = low + step, 2 * step
        if low + step > most:
            raise Infeasible(f"not even {low} are enough")
    high = low + step
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high


def quantile_of(survival: Callable[[float], float], p: float, scale_s: float) -> float:
    """Return the p-quantile of a law given P(T > t), by doubling `scale_s` and bisection to the last digit; 0 when P(T > 0) <= 1 - p."""
    if survival(0.0) <= 1 - p:
        return 0.0
    low, high = 0.0, scale_s
    while survival(high) > 1 - p:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if survival(middle) > 1 - p else (low, middle)
    return high


def _check(servers: int, offered: float) -> None:
    if servers < 1:
        raise BadInput(f"{servers} servers: at least one is needed")
    if not (offered >= 0 and math.isfinite(offered)):
        raise BadInput(f"an offered load of {offered} erlangs is not a finite number from 0 up")


def _check_share(p: float) -> None:
    if not 0 < p < 1:
        raise BadInput(f"a quantile needs a probability between 0 and 1, not {p}")
