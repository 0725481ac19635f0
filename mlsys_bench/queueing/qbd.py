"""c servers whose work, and arrivals whose gaps, run in phases: quasi-birth-death chains with the law of the wait as a matrix exponential.

Levels n count customers.  pi_n = pi_{n+1} B_{n+1} below c, eliminated from the bottom; from c on pi_{n+1} = pi_n R.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.crowd import COSTS, Crowd, affordable, ladder
from mlsys_bench.queueing.laws import Law, PhaseType
from mlsys_bench.queueing.modes import Modes, leading, of_phases, poisson
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.station import Bursts
from mlsys_bench.queueing.times import Floats, MatrixExponential, Time, Zero, total

NEGLIGIBLE = 6.5  # standard deviations below the mean number busy where the chain is started
TELLING, COARSE, FEW = 1 + len(COSTS), 7, 32  # modes kept of a service of many phases; and of one before more than FEW servers
NOBODY = 1e-13  # a chance to wait below which rounding leaves nothing of it


def mphc(rate_per_s: float, service: PhaseType, servers: int) -> Queue:
    """Return M/PH/c, first come first served.  Raises Overload at or above saturation.

    The servers' phases are kept in modes (`crowd`), not one by one: two phases need 31 states at any c, not c + 1.  While all are busy they
    move by S0 (nothing ends) and S1 (one ends, the next begins); G is the first passage one level down, T = S0 + lambda G,
    R = lambda (lambda - T)^{-1}, and P(W > t) = pi_c (I - R)^{-1} e^{Tt} 1, for F(t) = sum R^k P(k or fewer ends in t) solves F' = F T.
    The sojourn adds the service's phases.  Of more than two phases all states are kept while they are few, then the most telling:
    `cut_error` says what that may cost.
    Checked against the truth table (truth.csv): worst relative error 3e-11 over its 362 rows (two phases, c to 100).
    """
    check(rate_per_s, service, servers)
    if rate_per_s == 0:
        raise BadInput("M/PH/c needs a positive arrival rate, not 0")
    modes = leading(of_phases(service), TELLING if servers <= FEW else COARSE)
    wait = crowd_wait(poisson(rate_per_s), Crowd(modes, ladder(*kept(len(modes.start), servers))), servers, rate_per_s * service.mean_s)
    return answer(rate_per_s, wait, service, servers)


@lru_cache(maxsize=256)
def kept(modes: int, servers: int) -> tuple[tuple[float, ...], float, int]:
    """Return the ladder for so many modes: everything while it fits, else the cheapest excitations."""
    if modes <= 2:
        return (1.0,) * (modes - 1), min(servers, 30), servers
    if math.comb(servers + modes - 1, modes - 1) <= 350:
        return (1.0,) * (modes - 1), servers, servers
    if modes > 5:
        return COSTS[: modes - 1], 4.0, servers
    room = 90 if servers <= 16 else 75
    return COSTS[: modes - 1], affordable(COSTS[: modes - 1], servers, room), servers


def cut_error(service: PhaseType, servers: int) -> float:
    """Return the relative error that cutting off modes and excitations may cost `mphc`.

    None for two phases or where all states are kept; otherwise it falls by some 4.2 with each excitation kept (3.2 beyond SCV 4),
    measured on laws of two to eight phases, c = 4 to 100.  Cutting off modes of a long row of phases costs far less than said here.
    """
    phases = len(service.alpha)
    if phases > (TELLING if servers <= FEW else COARSE):
        return 2e-3
    _, budget, _ = kept(phases, servers)
    if phases <= 2 or budget >= servers:
        return 0.0
    return 0.2 * float(4.2**-budget) if service.scv <= 4 else float(3.2**-budget)


def check(rate_per_s: float, service: Law, servers: int) -> None:
    """Raise BadInput for what is no station, Overload for one without a steady state."""
    if servers < 1 or not (rate_per_s >= 0 and math.isfinite(rate_per_s)):
        raise BadInput(f"a station needs a server and a finite arrival rate, not {servers} and {rate_per_s} per second")
    offered = rate_per_s * service.mean_s
    if offered >= servers:
        raise Overload(offered / servers, servers, enough=math.floor(offered) + 1)


def answer(rate_per_s: float, wait: Time, service: Law, servers: int) -> Queue:
    """Return what a wait says of the station, the sojourn being the wait and then a service."""
    if wait.p_over(0.0) < NOBODY:
        wait = Zero()
    return Queue(
        utilisation=rate_per_s * service.mean_s / servers,
        p_wait=wait.p_over(0.0),
        wait=wait,
        sojourn=total(wait, service),
        throughput_per_s=rate_per_s,
    )


def crowd_wait(arrivals: Modes, crowd: Crowd, servers: int, offered: float, *, reach: float = NEGLIGIBLE) -> MatrixExponential:
    """Return the wait of renewal arrivals in modes before a crowd of servers: P(W > t) = x (I - R)^{-1} e^{Tt} 1.

    x is the servers' state in which an arrival finds all busy and nobody waiting, R takes it one customer on, and T = S0 + R S1.  Levels
    more than `reach` standard deviations below the mean number busy are left out.
    """
    k, m = len(arrivals.start), crowd.size
    gap, come, one = np.eye(k), np.outer(arrivals.ends, arrivals.start), np.eye(m)
    S0, S1 = crowd.within(servers), crowd.swaps(servers)
    local, up, down = kron(arrivals.moves, one) + kron(gap, S0), kron(come, one), kron(gap, S1)
    N = np.linalg.inv(-local - up @ first_passage(up, local, down))
    last, held = _below(arrivals, crowd, servers, offered, reach)
    mass = np.eye(1, k * m)[0]
    busy = np.linalg.solve(np.eye(k * m) - up @ N, mass)
    balance = last + up @ N @ down
    balance[:, 0] = busy  # one balance equation follows from the others: the share of time with all busy is set to 1 instead
    law = np.linalg.solve(balance.T, np.eye(1, k * m)[0])
    share = 1.0 + float(law @ held)
    rate = 1 / float(np.linalg.solve(-arrivals.moves.T, arrivals.start)[0])  # arrivals per second
    ends = kron(arrivals.ends[:, None], one)
    R = kron(arrivals.start[None, :], one) @ N @ ends
    first = np.linalg.solve((one - R).T, law @ ends / (share * rate))
    return _with_ones(np.asarray(first, dtype=np.float64), S0 + R @ S1)


def _below(arrivals: Modes, crowd: Crowd, servers: int, offered: float, reach: float) -> tuple[Floats, Floats]:
    """Return the balance of level c when all below it are eliminated, and what a state of level c adds to the time spent below it.

    From pi_{n-1} = pi_n B_n, B_n = -down balance_{n-1}^{-1}.  Arrivals start afresh, `up` is of low rank, so few columns are solved for.
    """
    k, m = len(arrivals.start), crowd.size
    gap, out = np.eye(k), kron(arrivals.moves, np.eye(m))
    spread = math.sqrt(offered * max(1.0, (1 + _scv(arrivals)) / 2))
    lowest = max(0, min(int(offered - reach * spread), servers - 1))
    balance, mass, held = out + kron(gap, crowd.within(lowest)), np.eye(1, k * m)[0], np.zeros(k * m)
    for n in range(lowest + 1, servers + 1):
        known = np.column_stack([kron(arrivals.ends[:, None], crowd.up(n - 1)), mass + held])
        found = np.linalg.solve(balance, known).reshape(k, m, -1)
        step = -(crowd.down(n) @ found).reshape(k * m, -1)
        held = step[:, -1]
        balance = out + kron(gap, crowd.within(n)) + (step[:, None, :-1] * arrivals.start[None, :, None]).reshape(k * m, -1)
    return balance, held


def kron(a: Floats, b: Floats) -> Floats:
    """Return the Kronecker product of two matrices (numpy's own takes ten times as long on small ones)."""
    if a.size == 1:
        return np.asarray(a[0, 0] * b, dtype=np.float64)
    return np.asarray((a[:, None, :, None] * b[None, :, None, :]).reshape(len(a) * len(b), -1), dtype=np.float64)


def _scv(modes: Modes) -> float:
    """Return variance over mean squared of a law in modes."""
    first = np.linalg.solve(-modes.moves.T, modes.start)
    return 2 * float(np.linalg.solve(-modes.moves.T, first)[0]) / float(first[0]) ** 2 - 1


def _with_ones(row: Floats, T: Floats) -> MatrixExponential:
    """Return row e^{Tt} e_1 in another basis, where the closing vector is 1 instead of e_1."""
    more = np.ones(len(row))
    more[0] = 0.0
    back = T.copy()
    back[:, 0] -= T @ more  # T (I - more e_1')
    back += np.outer(more, back[0])
    start = row.copy()
    start[0] -= float(row @ more)
    return MatrixExponential(start, back)


def first_passage(up: Floats, local: Floats, down: Floats) -> Floats:
    """Return G, the states in which the level first falls by one: up G^2 + local G + down = 0, by logarithmic reduction."""
    one = np.eye(len(up))
    inverse = np.linalg.inv(-local)
    H, L = inverse @ up, inverse @ down
    G, reach = L.copy(), H.copy()
    for _ in range(64):
        both = np.linalg.inv(one - H @ L - L @ H)
        H, L = both @ (H @ H), both @ (L @ L)
        more = reach @ L
        G, reach = G + more, reach @ H
        if float(np.abs(more).max()) < 1e-14:
            break
    return np.asarray(G, dtype=np.float64)


def mmpp_mc(bursts: Bursts, service_s: float, servers: int) -> Queue:
    """Return MMPP/M/c, first come first served, as its customers see it (weighted by arrivals).  Raises Overload at or above saturation.

    An arrival that finds c + k waits for k + 1 ends at rate c mu, so P(W > t) = pi_c e^{-c mu (I - R) t} (I - R)^{-1} Lambda 1 / lambda
    with the rates Lambda of the phases and their mean lambda.  Any number of phases; some may be silent.
    Checked against the truth table (truth.csv): worst relative error 6e-13 over its 18 rows.
    """
    if servers < 1 or not (service_s > 0 and math.isfinite(service_s)):
        raise BadInput(f"a station needs a server and a positive, finite service time, not {servers} and {service_s} s")
    rate, m = bursts.rate_per_s, len(bursts.rates_per_s)
    if rate <= 0:
        raise BadInput("bursts without arrivals: at least one phase needs a positive rate")
    if rate * service_s >= servers:
        raise Overload(rate * service_s / servers, servers, enough=math.floor(rate * service_s) + 1)
    mu = 1 / service_s
    come = np.diag(np.array(bursts.rates_per_s, dtype=np.float64))
    phases = np.array(bursts.switches_per_s, dtype=np.float64)
    np.fill_diagonal(phases, 0.0)
    local = phases - np.diag(phases.sum(axis=1)) - come
    one, top = np.eye(m), servers * mu
    G = first_passage(come, local - top * one, top * one)
    R = come @ np.linalg.inv(top * one - local - come @ G)
    balance, steps = local, []
    for n in range(1, servers + 1):
        steps.append(-n * mu * np.linalg.inv(balance))
        balance = local - n * mu * one + steps[-1] @ come
    closing = np.vstack([(balance + top * R).T, np.linalg.solve(one - R, np.ones(m))])
    law = np.linalg.lstsq(closing, np.append(np.zeros(m), 1.0), rcond=None)[0]
    below, share = law, 1.0
    for step in reversed(steps):
        below = below @ step
        share += float(below.sum())
    seen = np.asarray(np.linalg.solve(one - R, come @ np.ones(m)) / rate, dtype=np.float64)
    wait = _seen_by_arrivals(law / share, R, seen, top)
    sojourn = wait.then(MatrixExponential(np.ones(1), np.array([[-mu]])))
    return Queue(utilisation=rate / top, p_wait=wait.p_over(0.0), wait=wait, sojourn=sojourn, throughput_per_s=rate)


def _seen_by_arrivals(law: Floats, R: Floats, seen: Floats, top: float) -> MatrixExponential:
    """Return law e^{-top (I - R) t} seen, in the basis in which `seen` is 1; no way leads back from a silent phase, where `seen` is 0."""
    on = seen > 0
    S = -top * (np.eye(len(R)) - R)[np.ix_(on, on)]
    return MatrixExponential(law[on] * seen[on], S * seen[None, on] / seen[on, None])
