"""Poisson arrivals, c equal servers, exponential service: Erlang's formulas and what follows from them, finite queues included.

Notation: a = rate x service is the offered load in erlangs, rho = a / c the utilisation, mu = 1 / service,
theta = c mu - lambda the rate at which a queue drains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench.errors import BadInput, Infeasible, Overload
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.ticks import Ticks, geometric_beyond
from mlsys_bench.queueing.times import Floats, Time, Zero, check_share

if TYPE_CHECKING:
    from mlsys_bench.queueing.laws import Law


def erlang_b(servers: int, offered: float) -> float:
    """Return the share of customers lost when `servers` take an offered load (erlangs) and nobody waits (M/G/c/c).

    1 / B = sum over k of c (c - 1) … (c - k + 1) / a^k, k = 0 … c: a sum of positive numbers, so nothing cancels, and where it
    overflows B is 0 to double precision.  It solves the recursion B_c = a B_(c-1) / (c + a B_(c-1)).  Insensitive to the law of service.
    Source: Wolfram Language reference, ErlangB (the recursion), https://reference.wolfram.com/language/ref/ErlangB.html.
    Checked against truth.csv: worst relative error 6e-16 over 7 rows, c to 1000; against exact fractions in the tests.
    """
    check_load(servers, offered)
    if offered == 0:
        return 0.0
    with np.errstate(over="ignore"):
        return float(1 / (1 + np.cumprod(np.arange(servers, 0, -1) / offered).sum()))


def erlang_c(servers: int, offered: float) -> float:
    """Return the probability that a customer waits in M/M/c.  Raises Overload when offered >= servers.

    C = B / (1 - rho (1 - B)) with Erlang's B of the same servers and load.
    Source: Wolfram Language reference, ErlangB (its relation to ErlangC), https://reference.wolfram.com/language/ref/ErlangB.html;
    M. Marzolla, the queueing package for GNU Octave, erlangc, https://mmarzolla.github.io/queueing/erlangc.html (the sum itself).
    Checked against truth.csv: worst relative error 1e-13 over 6 rows, c to 500.
    """
    check_load(servers, offered)
    if offered >= servers:
        raise Overload(offered / servers, servers, enough=math.floor(offered) + 1)
    blocking = erlang_b(servers, offered)
    return blocking / (1 - offered / servers * (1 - blocking))


def mmc(rate_per_s: float, service_s: float, servers: int) -> Queue:
    """Return the M/M/c queue, first come first served.  Raises Overload at or above saturation.

    The wait is 0 with probability 1 - C (Erlang's C), else exponential with rate theta = c mu - lambda; the service is independent.
    Exact for Poisson arrivals and exponential service.  Service that varies less waits less, heavier tails wait longer:
    for those this is no bound.
    Checked against truth.csv: worst relative error 2e-13 over the exact ones of its 70 rows, c to 500.
    """
    check_service(service_s)
    p_wait = erlang_c(servers, rate_per_s * service_s)
    wait = Delayed(p_wait, servers / service_s - rate_per_s)
    return Queue(
        utilisation=rate_per_s * service_s / servers,
        p_wait=p_wait,
        wait=wait,
        sojourn=DelayedThenServed(wait, service_s),
        throughput_per_s=rate_per_s,
    )


class Delayed(Time):
    """The wait of M/M/c and GI/M/c: 0 with probability 1 - p_wait, else exponential with rate `drain_per_s`."""

    def __init__(self, p_wait: float, drain_per_s: float) -> None:
        self.p_wait, self.drain_per_s = p_wait, drain_per_s
        self.mean_s = p_wait / drain_per_s
        self.variance_s2 = p_wait * (2 - p_wait) / drain_per_s**2

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t) = p_wait exp(-theta t)."""
        return np.asarray(self.p_wait * np.exp(-self.drain_per_s * t_s))

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile: ln(p_wait / (1 - p)) / theta, 0 when P(no wait) >= p."""
        share = 1 - check_share(p)
        return math.log(self.p_wait / share) / self.drain_per_s if self.p_wait > share else 0.0


class DelayedThenServed(Time):
    """A `Delayed` wait and an independent exponential service after it."""

    def __init__(self, wait: Delayed, service_s: float) -> None:
        self.wait, self.service_s = wait, service_s
        self.mean_s = wait.mean_s + service_s
        self.variance_s2 = wait.variance_s2 + service_s**2

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t) = exp(-mu t) + p_wait mu (exp(-mu t) - exp(-theta t)) / (theta - mu).

        Written with expm1 so that theta -> mu, where those who wait see an Erlang-2 law, needs no special case and loses no digits.
        """
        mu, theta = 1 / self.service_s, self.wait.drain_per_s
        gap = abs(theta - mu)
        blend_s = -np.expm1(-gap * t_s) / gap if gap > 0 else t_s
        return np.asarray(np.exp(-mu * t_s) + self.wait.p_wait * mu * np.exp(-min(mu, theta) * t_s) * blend_s)


def loss(rate_per_s: float, service: Law, servers: int) -> Queue:
    """Return the loss system M/G/c/c: whoever finds all servers busy is turned away, the others do not wait.

    Erlang's B; exact for any law of service, at any load.  Error: see `erlang_b`.
    """
    offered = rate_per_s * service.mean_s
    blocked = erlang_b(servers, offered)
    return Queue(
        utilisation=offered / servers,
        p_wait=0.0,
        wait=Zero(),
        sojourn=service,
        throughput_per_s=rate_per_s * (1 - blocked),
        p_blocked=blocked,
    )


def mmck(rate_per_s: float, service_s: float, servers: int, capacity: int) -> Queue:
    """Return the M/M/c/K queue: at most `capacity` customers inside, the rest turned away.  Any load; the law is of those accepted.

    The number inside is a birth-death chain, pi_n = pi_0 prod lambda / (min(k, c) mu), taken in logarithms.  Whoever is accepted
    behind n >= c others waits for k = n - c + 1 departures at rate c mu: the wait is a mixture of Erlang laws.  On a clock that
    ticks at rate c mu the wait takes exactly k ticks, and each tick after them is the customer's own end of service with probability 1 / c.
    Checked against truth.csv: worst relative error 5e-14 over 44 rows.
    """
    check_service(service_s)
    check_load(servers, rate_per_s * service_s)
    if capacity < servers:
        raise BadInput(f"a capacity of {capacity} is less than the {servers} servers")
    offered, clock_per_s = rate_per_s * service_s, servers / service_s
    law = birth_death(offered, np.minimum(np.arange(1, capacity + 1), servers).astype(np.float64))
    blocked = float(law[-1])
    found = law[:-1] / law[:-1].sum()
    queued = found[servers:]  # waits for 1, 2 … K - c departures
    free = float(found[:servers].sum())
    wait = erlang_mixture(queued, clock_per_s)
    sojourn = Ticks(
        geometric_beyond(_ticks_to_the_end(np.concatenate([[free], queued]), servers), 1 - 1 / servers),
        per_s=clock_per_s,
        mean_s=wait.mean_s + service_s,
        variance_s2=wait.variance_s2 + service_s**2,
    )
    return Queue(
        utilisation=offered / servers,
        p_wait=float(queued.sum()),
        wait=wait,
        sojourn=sojourn,
        throughput_per_s=rate_per_s * (1 - blocked),
        p_blocked=blocked,
    )


def _ticks_to_the_end(stages: Floats, servers: int) -> Floats:
    """Return P(more than i ticks) for a wait of k ticks with probability stages[k] and a service that each tick after ends with 1 / c."""
    still_waiting = np.append(np.cumsum(stages[:0:-1])[::-1], 0.0)
    stays = 1 - 1 / servers
    in_service = list(itertools.accumulate(stages.tolist(), lambda there, more: stays * there + more))  # scipy.signal takes 1 s to import
    return np.asarray(still_waiting + in_service, dtype=np.float64)


def erlang_mixture(weights: Floats, per_s: float) -> Time:
    """Return a time that is Erlang with k stages of rate `per_s` with probability weights[k-1], else 0."""
    if not len(weights):
        return Zero()
    k = np.arange(1, len(weights) + 1)
    mean_s = float(weights @ k) / per_s
    second_s2 = float(weights @ (k * (k + 1.0))) / per_s**2
    survivors = np.append(np.cumsum(weights[::-1])[::-1], 0.0)
    return Ticks(geometric_beyond(survivors, 0.0), per_s=per_s, mean_s=mean_s, variance_s2=second_s2 - mean_s**2)


def birth_death(birth: float, deaths: Floats) -> Floats:
    """Return the stationary law pi_0 … pi_K of a birth-death chain with one birth rate and the given death rates, by logarithms."""
    with np.errstate(divide="ignore"):  # no births: log 0 = -inf puts all mass on the empty state
        logs = np.concatenate([[0.0], np.cumsum(np.log(birth) - np.log(deaths))])
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum(), dtype=np.float64)


def fewest(rate_per_s: float, service_s: float, limit_s: float, p: float) -> int:
    """Return the fewest servers of M/M/c whose p-quantile of the wait is at most `limit_s`; `sizing.servers_for` is for any station."""
    check_share(p)
    return least(lambda servers: mmc(rate_per_s, service_s, servers).wait_p(limit_s) <= 1 - p, first=math.floor(rate_per_s * service_s) + 1)


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


def check_load(servers: int, offered: float) -> None:
    """Raise BadInput for fewer than one server or an offered load that is no finite number from 0 up."""
    if servers < 1:
        raise BadInput(f"{servers} servers: at least one is needed")
    if not (offered >= 0 and math.isfinite(offered)):
        raise BadInput(f"an offered load of {offered} erlangs is not a finite number from 0 up")


def check_service(service_s: float) -> None:
    """Raise BadInput for a service time that is not positive and finite."""
    if not (service_s > 0 and math.isfinite(service_s)):
        raise BadInput(f"a service time of {service_s} s is not positive and finite")
