"""One stream dealt to N single-server queues, by formula: random, round robin, least work, power of d; bounds for the shortest queue.

Every function gives the queue as all customers see it (throughput of all N together) and the expected relative error.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.gimc import gimc
from mlsys_bench.queueing.laws import Erlang, Exponential
from mlsys_bench.queueing.mmc import check_service, mmc
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.ticks import Ticks, geometric_beyond
from mlsys_bench.queueing.times import Floats

if TYPE_CHECKING:
    from mlsys_bench.queueing.laws import Law

EXACT = 1e-6


def random_routing(rate_per_s: float, service: Law, queues: int) -> tuple[Queue, float]:
    """Return N queues of which each customer picks one blindly: independent M/G/1 queues at 1 / N of the rate.

    A Poisson stream split at random is N independent Poisson streams: exact.
    Checked against truth.csv: worst relative error 4e-16 over 5 exact rows; 2.1 % over 10 simulated ones of lognormal service, SCV 4
    (their own precision: 2.0 %).
    """
    _check(rate_per_s, service.mean_s, queues)
    if isinstance(service, Exponential):
        return _together(mmc(rate_per_s / queues, service.mean_s, 1), rate_per_s), EXACT
    from mlsys_bench.queueing.single import mg1

    return _together(mg1(rate_per_s / queues, service), rate_per_s), EXACT


def round_robin(rate_per_s: float, service: Law, queues: int) -> tuple[Queue, float]:
    """Return N queues that take turns: each sees every N-th arrival, the sum of N exponential gaps, so it is an E_N/G/1 queue.

    Exact for exponential service (GI/M/1); else GI/G/1 by Spitzer's identity on a lattice, about 0.5 %.
    Checked against truth.csv: worst relative error 1e-12 over 20 exact rows; within the precision of the simulated ones (0.9 %).
    """
    _check(rate_per_s, service.mean_s, queues)
    arrivals = Erlang(queues, queues / rate_per_s)
    if isinstance(service, Exponential):
        return _together(gimc(arrivals, service.mean_s, 1), rate_per_s), EXACT
    from mlsys_bench.queueing.spitzer import gig1

    return _together(gig1(arrivals, service), rate_per_s), 0.005


def least_work(rate_per_s: float, service: Law, queues: int) -> tuple[Queue, float]:
    """Return N queues of which each customer joins the one with the least work left: M/G/N with one queue for all.

    Whoever joins the least work starts when the first server would be free for it: the same start times as from one shared queue.
    Exact for exponential service, as good as the M/G/c formula otherwise.  Checked against truth.csv: within
    the precision of all 20 simulated rows (worst 0.5 %).
    """
    _check(rate_per_s, service.mean_s, queues)
    if isinstance(service, Exponential):
        return mmc(rate_per_s, service.mean_s, queues), EXACT
    if queues == 1:
        return random_routing(rate_per_s, service, 1)
    from mlsys_bench.queueing.mgc import mgc

    queue, error, _ = mgc(rate_per_s, service, queues)
    return queue, error


def shortest_queue_bounds(rate_per_s: float, service_s: float, queues: int) -> tuple[Queue, Queue]:
    """Return what brackets the mean of join-the-shortest-queue under exponential service: M/M/N with one shared queue, and round robin.

    The shared queue never lets a server idle beside a waiting customer; round robin knows nothing of the queues.  Means only.  In truth.csv
    (N = 4 and 16, rho 0.7 and 0.9) the shared queue is 4 to 13 % below the mean sojourn, round robin 48 to 250 % above: simulate.
    """
    service = Exponential(service_s)
    return mmc(rate_per_s, service_s, queues), round_robin(rate_per_s, service, queues)[0]


def power_of_d_mean_field(rate_per_s: float, service_s: float, queues: float, choices: int) -> tuple[Queue, float]:
    """Return N queues of which each customer joins the shortest of `choices` different ones picked at random; exponential service.

    For N = infinity a share x_i = rho^((d^i - 1) / (d - 1)) of the queues holds i or more.  For finite N the mean share is x_i + v_i / N:
    v from the balance E[X_i] = rho E[P(all d chosen hold i - 1 or more)], with the variance W / N of the shares from the linearised
    fluctuations, J W + W J' + Q = 0.  Since up- and down-crossings of a level balance, a customer finds i or more in the queue it joins
    with probability E[X_(i+1)] / rho: a mixture of Erlang laws gives all percentiles.
    Exact for N = infinity.  Checked against truth.csv: 2e-16 for N = infinity, 0.1 % of the means at N = 100,
    0.6 % at N = 16, rho 0.7, 8 % at N = 4, rho 0.7; against simulation p99 wait 3.7 % low at N = 16, rho 0.9.  The error grows with
    1 / (N (1 - rho))^2, and with d: 8 % at N = 8, rho 0.7, d = 5.
    Sources: M. Mitzenmacher, The power of two choices in randomized load balancing (abstract read), and N. Gast, B. Van Houdt, A refined
    mean field approximation (2017), https://hal.inria.fr/hal-01622054 (abstract read; the equations were derived here).
    """
    if choices < 1:
        raise BadInput(f"{choices} choices: at least one is needed")
    if queues != math.inf:
        _check(rate_per_s, service_s, int(queues))
        choices = min(choices, int(queues))
    rho = rate_per_s * service_s / queues if queues != math.inf else rate_per_s * service_s
    if rho >= 1:
        raise Overload(rho, 1, enough=math.floor(rho) + 1)
    if choices == 1:
        return _together(mmc(rho / service_s, service_s, 1), rate_per_s), EXACT
    shares = _mean_shares(rho, choices, queues)
    return _from_shares(shares, rho, service_s, rate_per_s), _expected_error(rho, queues, choices)


def _expected_error(rho: float, queues: float, choices: int) -> float:
    """Return a curve above the errors of a p99 wait, the worst quantity, in the 16 systems measured: no bound for others."""
    return EXACT if queues == math.inf else min(1.0, (choices - 1) * (0.003 + 0.12 / (queues * (1 - rho)) ** 2))


def _mean_shares(rho: float, d: int, queues: float) -> Floats:
    """Return E[share of queues with i or more], i = 0, 1 …"""
    levels = 3
    while rho ** ((d ** (levels - 1) - 1) / (d - 1)) > 1e-14:
        levels += 1
    x = np.array([rho ** ((d**i - 1) / (d - 1)) for i in range(levels)])
    if queues == math.inf:
        return x
    slope = rho * d * x ** (d - 1)  # derivative of rho x^d
    J = np.diag(-1 - slope[1:]) + np.diag(slope[1:-1], -1) + np.diag(np.ones(levels - 2), 1)
    from scipy.linalg import solve_continuous_lyapunov

    W = np.zeros((levels, levels))
    W[1:, 1:] = solve_continuous_lyapunov(J, -np.diag(2 * (x - np.append(x[1:], 0.0))[1:]))
    v = np.zeros(levels)
    for i in range(1, levels):
        y = x[i - 1]
        spread = d * (d - 1) / 2 * (y ** (d - 2) * W[i - 1, i - 1] + y**d - y ** (d - 1))  # variance; then different choices
        v[i] = slope[i - 1] * v[i - 1] + rho * spread
    return np.asarray(np.minimum.accumulate(np.clip(x + v / queues, 0.0, 1.0)))


def _from_shares(shares: Floats, rho: float, service_s: float, rate_per_s: float) -> Queue:
    found = np.append(shares[1:], 0.0) / rho  # P(finds i or more), i = 0, 1 …
    found[0] = 1.0
    p = -np.diff(found)  # P(finds i)
    i = np.arange(len(p))
    mean, second = float(p @ i), float(p @ (i * (i + 1.0)))
    wait = Ticks(
        geometric_beyond(found[1:], 0.0), per_s=1 / service_s, mean_s=mean * service_s, variance_s2=(second - mean**2) * service_s**2
    )
    sojourn = Ticks(
        geometric_beyond(found, 0.0),
        per_s=1 / service_s,
        mean_s=(mean + 1) * service_s,
        variance_s2=wait.variance_s2 + service_s**2,
    )
    return Queue(utilisation=rho, p_wait=float(found[1]), wait=wait, sojourn=sojourn, throughput_per_s=rate_per_s)


def _together(one: Queue, rate_per_s: float) -> Queue:
    return replace(one, throughput_per_s=rate_per_s)


def _check(rate_per_s: float, service_s: float, queues: int) -> None:
    check_service(service_s)
    if queues < 1:
        raise BadInput(f"{queues} queues: at least one is needed")
    offered = rate_per_s * service_s
    if offered >= queues:
        raise Overload(offered / queues, queues, enough=math.floor(offered) + 1)
