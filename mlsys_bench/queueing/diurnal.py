"""Load and servers that change with time: M_t/M/c_t by Kolmogorov's equations, a cold start, and the day without a limit on servers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.queueing.kolmogorov import course, fluid_states, growing, periodic, stationary
from mlsys_bench.queueing.mmc import check_service, fewest, mmc
from mlsys_bench.queueing.schedule import Plan, Rate, Sinusoid, Steps
from mlsys_bench.queueing.times import Floats, Time, check_share
from mlsys_bench.queueing.virtual_wait import VirtualWait

if TYPE_CHECKING:
    from mlsys_bench.queueing.laws import Law

__all__ = ["Moment", "Rate", "Sinusoid", "Steps", "backlog", "cold_start", "mt_g_inf", "mt_m_c", "recovery_s", "staffing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The queue at one time."""

    time_s: float
    law: Floats  # P(n in system), n = 0, 1 …
    virtual_wait: Time  # of a customer arriving now, given the servers in force now and later

    @property
    def p_delay(self) -> float:
        """Probability that a customer arriving now has to wait."""
        return self.virtual_wait.p_over(0.0)

    @property
    def mean_requests(self) -> float:
        """Mean number in system."""
        return float(self.law @ np.arange(len(self.law)))


def mt_m_c(
    rate: Rate,
    service_s: float,
    servers: int | Steps,
    times_s: Sequence[float],
    *,
    period_s: float | None = None,
    stationary_at_per_s: float = 0.0,
) -> tuple[Moment, ...]:
    """Return the M_t/M/c_t queue at each of `times_s`: rate(t) arrivals per second (Poisson), exponential service, servers(t) servers.

    With `period_s` the regime that repeats itself (rate and servers are read within one period, times modulo it).  Without, the course
    from time 0, where the queue is stationary under `stationary_at_per_s` and the servers of time 0; 0 means empty.
    Kolmogorov's forward equations p_n' = lambda p_(n-1) + min(n+1, c) mu p_(n+1) - (lambda + min(n, c) mu) p_n, by LSODA with a banded
    Jacobian (relative tolerance 1e-9), as many states as keep the last below 1e-12; the periodic regime is the fixed point of one
    period, by Anderson's acceleration.  Servers taken away hand their customers back to the head of the queue.
    Checked against truth.csv: worst relative error 3e-8 over 40 rows (printed to 1e-6), 0.1 to 0.7 s each.
    Raises Overload when the mean load of a period is at or above the mean capacity, BadInput above 20,000 states.
    """
    check_service(service_s)
    plan = Plan(rate, service_s, servers if isinstance(servers, Steps) else Steps(values=(servers,), at_s=()), period_s)
    if not times_s or min(times_s) < 0:
        raise BadInput("times must be one or more numbers from 0 up")
    if period_s is not None:
        laws = periodic(plan, period_s, [t % period_s for t in times_s])
    else:
        laws = growing(lambda p: course(plan, p, times_s), stationary(plan, stationary_at_per_s, fluid_states(plan, max(times_s))))
    return tuple(Moment(time_s=t, law=p, virtual_wait=VirtualWait(p, plan, t)) for t, p in zip(times_s, laws, strict=True))


def cold_start(
    *, before_per_s: float, after_per_s: float, service_s: float, servers: int, servers_after: int, cold_s: float, times_s: Sequence[float]
) -> tuple[Moment, ...]:
    """Return the queue at times after the load steps from `before` to `after` at time 0, more servers arriving `cold_s` later.

    M_t/M/c_t from the stationary queue of the old load.  At the very moment they arrive the new servers are in force.
    Checked against truth.csv: worst relative error 2e-9 over 10 rows (printed to 1e-6), 0.05 s each.
    """
    replicas = Steps(values=(servers, servers_after), at_s=(cold_s,))
    return mt_m_c(Steps(values=(after_per_s,), at_s=()), service_s, replicas, times_s, stationary_at_per_s=before_per_s)


def backlog(*, before_per_s: float, after_per_s: float, service_s: float, servers: int, cold_s: float) -> float:
    """Return the fluid backlog of a cold start: requests beyond the `servers` when the new ones arrive.

    x' = after - min(x, c) mu from x = before / mu: the load first fills the servers, then the queue.  A lower bound of the mean.
    """
    goal, start = after_per_s * service_s, before_per_s * service_s
    if goal <= servers:
        return 0.0
    filled_s = service_s * math.log((goal - start) / (goal - servers)) if start < servers else 0.0
    return max(start - servers, 0.0) + max(cold_s - filled_s, 0.0) * (after_per_s - servers / service_s)


def recovery_s(
    *,
    before_per_s: float,
    after_per_s: float,
    service_s: float,
    servers: int,
    servers_after: int,
    cold_s: float,
    limit_s: float,
    p: float = 0.99,
) -> float:
    """Return when, after the step in load at time 0, the p-quantile of the wait is back within `limit_s` for good; 0 when it never leaves.

    The last time that P(wait > limit) crosses 1 - p, on a course of M_t/M/c_t followed until near its new rest, read between points by
    linear interpolation of the logarithm: about 1e-3 of the time asked for.  Raises Infeasible when the new rest itself misses the limit.
    """
    share = 1 - check_share(p)
    rest = mmc(after_per_s, service_s, servers_after)
    if rest.wait_p(limit_s) > share:
        raise Infeasible(f"{servers_after} servers never bring p{100 * p:g} of the wait under {limit_s:g} s at {after_per_s:g} per second")
    crowd = backlog(before_per_s=before_per_s, after_per_s=after_per_s, service_s=service_s, servers=servers, cold_s=cold_s)
    drain_per_s = servers_after / service_s - after_per_s
    end_s = cold_s + 2 * (crowd + 3 * math.sqrt(crowd + servers_after)) / drain_per_s + 5 * service_s
    while True:
        times = np.union1d(np.linspace(0, cold_s, 40), np.linspace(cold_s, end_s, 400))
        moments = cold_start(
            before_per_s=before_per_s,
            after_per_s=after_per_s,
            service_s=service_s,
            servers=servers,
            servers_after=servers_after,
            cold_s=cold_s,
            times_s=[float(t) for t in times],
        )
        over = np.array([m.virtual_wait.p_over(limit_s) for m in moments])
        above = np.flatnonzero(over > share)
        if len(above) == 0:
            return 0.0
        last = int(above[-1])
        if last < len(times) - 1 and times[last] < (cold_s + end_s) / 2:
            return _crossing(times[last : last + 2], over[last : last + 2], share)
        end_s = cold_s + 2 * (end_s - cold_s)


def _crossing(times: Floats, values: Floats, level: float) -> float:
    logs = np.log(np.maximum(values, 1e-300)) - math.log(level)
    return float(times[0] + (times[1] - times[0]) * logs[0] / (logs[0] - logs[1]))


def mt_g_inf(rate: Rate, service: Law, times_s: Sequence[float]) -> Floats:
    """Return the mean number in system of M_t/G/inf at each time: the load if nobody ever waited.  The number itself is Poisson.

    m(t) = integral of rate(t - u) P(S > u) du, the stream running since ever.  For a `Sinusoid` in closed form, from the transform of
    the service: m(t) = mean E[S] (1 + swing Im(e^{i w t} (1 - E[e^{-i w S}]) / (i w E[S]))); for exponential service that is
    mean s (1 + swing (sin wt - w s cos wt) / (1 + w^2 s^2)).  Other rates by adaptive quadrature between jumps (1e-9).
    Source: S. G. Eick, W. A. Massey, W. Whitt, M_t/G/inf queues with sinusoidal arrival rates, Management Science 39 (1993) 241-252
    (the abstract read: the formula was derived, not copied).  Checked against truth.csv: worst relative error 3e-16 over 2 rows.
    """
    if isinstance(rate, Sinusoid):
        w = 2 * math.pi / rate.period_s
        times = np.asarray(times_s, dtype=np.float64)
        spread = complex(service.lst(np.array([1j * w]))[0])
        excess = (1 - spread) / (1j * w * service.mean_s)
        return np.asarray(rate.mean_per_s * service.mean_s * (1 + rate.swing * np.imag(np.exp(1j * w * times) * excess)))
    return np.array([_load(rate, service, t) for t in times_s])


def _load(rate: Rate, service: Law, t_s: float) -> float:
    from scipy.integrate import quad

    jumps = [t_s - at for at in rate.at_s] if isinstance(rate, Steps) else []
    reach_s = service.mean_s
    while float(service.stop_loss_s(np.array([reach_s]))[0]) > 1e-12 * service.mean_s:
        reach_s *= 2
    halves = [reach_s / 2**k for k in range(12)]
    cuts = sorted({0.0, *halves, *(u for u in jumps if 0 < u < reach_s), *(at for at, _ in service.atoms if at < reach_s)})

    def integrand(u: float) -> float:
        return rate(t_s - u) * service.p_over(u)

    return sum(quad(integrand, a, b, epsabs=0.0, epsrel=1e-10, limit=200)[0] for a, b in itertools.pairwise(cuts))


def staffing(rate: Rate, service: Law, times_s: Sequence[float], *, limit_s: float = 0.0, p: float = 0.9) -> tuple[int, ...]:
    """Return, for each time, the fewest servers that keep P(wait > limit) at or under 1 - p by the modified offered load.

    M/M/c under the load m(t) of `mt_g_inf` at that time: a first guess, which `mt_m_c` then confirms or corrects.  It puts the peak of
    servers after the peak of arrivals, by about one service time.
    Source: O. B. Jennings, A. Mandelbaum, W. A. Massey, W. Whitt, Server staffing to meet time-varying demand, Management Science 42
    (1996) 1383-1394 (the abstract read: means from infinitely many servers, checked against M_t/M/s_t).
    """
    return tuple(fewest(float(m) / service.mean_s, service.mean_s, limit_s, p) for m in mt_g_inf(rate, service, times_s))
