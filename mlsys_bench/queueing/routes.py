"""Laws of a customer's whole way through a network: sums of stage laws along random routes, and one stage with feedback exactly."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from mlsys_bench.queueing.laws import Law
from mlsys_bench.queueing.mmc import birth_death, mmc
from mlsys_bench.queueing.ticks import Ticks
from mlsys_bench.queueing.times import Complexes, Floats, Formula, Lattice, Time

POINTS = 2**14
DAMPING = 1e-6  # what wraps around the end of the lattice is divided by 10^6; rounding grows by as much
CHUNK = 64


def added_up(P: Floats, entry: Floats, waits: list[Time], services: list[Law]) -> tuple[Time, Time]:
    """Return the total wait and the total sojourn over a random route, all visits independent, services known by their laws.

    On a lattice of 16,384 points: with transforms phi_i of one visit the sum has entry x, where x_i = phi_i (out_i + sum_j P_ij x_j).
    Percentiles to about 1e-4 of the longest time on the lattice; means and variances by the same equation for moments, exact.
    """
    visits = np.linalg.solve(np.eye(len(entry)) - P.T, entry)
    longest = np.array([wait.quantile_s(1 - 1e-6) + service.quantile_s(1 - 1e-6) for wait, service in zip(waits, services, strict=True)])
    reach_s = float(visits @ longest)
    while True:
        step_s = reach_s / POINTS
        waiting = [_wait_transform(wait, step_s) for wait in waits]
        both = [w * _transform(_service_masses(service, step_s)) for w, service in zip(waiting, services, strict=True)]
        sojourn = _along(P, entry, both, step_s)
        if sojourn.survival(np.array([0.98 * reach_s]))[0] < 1e-5:
            break
        reach_s *= 2
    first = [(wait.mean_s, wait.variance_s2) for wait in waits]
    whole = [(mean + service.mean_s, variance + service.variance_s2) for (mean, variance), service in zip(first, services, strict=True)]
    return _with_moments(_along(P, entry, waiting, step_s), P, entry, first), _with_moments(sojourn, P, entry, whole)


def never(P: Floats, entry: Floats, free: Floats) -> float:
    """Return the probability of a route without a wait, given the probability of none at each stage."""
    return float(entry @ np.linalg.solve(np.eye(len(free)) - free[:, None] * P, free * (1 - P.sum(axis=1))))


def _along(P: Floats, entry: Floats, visits: list[Complexes], step_s: float) -> Lattice:
    """Return the sum over a route from the transforms of one visit to each stage."""
    phi, out = np.array(visits), 1 - P.sum(axis=1)
    if not np.linalg.matrix_power(P, len(P)).any():  # nobody returns: as many rounds as stages
        x = np.zeros_like(phi)
        for _ in range(len(P)):
            x = phi * (out[:, None] + P @ x)
    else:
        x = np.concatenate([_solved(P, out, part) for part in np.array_split(phi, max(1, phi.size * len(P) // 2**21), axis=1)], axis=1)
    masses = np.fft.irfft(entry @ x, 2 * (phi.shape[1] - 1)) / _damping(POINTS)
    return Lattice(np.maximum(masses, 0.0), step_s)


def _solved(P: Floats, out: Floats, phi: Complexes) -> Complexes:
    A = np.eye(len(P)) - phi.T[:, :, None] * P
    return np.asarray(np.linalg.solve(A, (phi * out[:, None]).T[:, :, None])[:, :, 0].T)


def _damping(points: int) -> Floats:
    return np.asarray(DAMPING ** (np.arange(points) / points), dtype=np.float64)


def _transform(masses: Floats) -> Complexes:
    return np.asarray(np.fft.rfft(masses * _damping(len(masses))))


def _wait_transform(wait: Time, step_s: float) -> Complexes:
    """Return the transform of a wait: P(wait > t) at 240 points, its logarithm interpolated between them."""
    if wait.p_over(0.0) <= 1e-15:
        return np.ones(POINTS // 2 + 1, dtype=np.complex128)
    from scipy.interpolate import PchipInterpolator

    at = np.concatenate([[0.0], np.geomspace(step_s / 4, step_s * POINTS, 240)])
    logs = np.log(np.maximum(wait.survival(at), 1e-18))
    middles = (np.arange(POINTS) + 0.5) * step_s
    over = np.exp(PchipInterpolator(at, logs)(np.minimum(middles, at[-1])))
    return _transform(-np.diff(np.concatenate([[1.0], over])))


def _service_masses(service: Law, step_s: float) -> Floats:
    """Return the law on the lattice, each time split between its neighbours so that the mean is kept."""
    beyond = service.stop_loss_s(np.asarray(np.arange(POINTS + 1) * step_s, dtype=np.float64))
    slopes = np.diff(beyond) / step_s  # minus P(S > t), averaged over a step
    return np.asarray(np.diff(np.concatenate([[-1.0], slopes])), dtype=np.float64)


def _with_moments(law: Lattice, P: Floats, entry: Floats, visits: list[tuple[float, float]]) -> Time:
    mean, variance = np.array(visits).T
    system = np.eye(len(P)) - P
    first = np.linalg.solve(system, mean)
    second = np.linalg.solve(system, variance + mean**2 + 2 * mean * (P @ first))
    return Formula(law.survival, mean_s=float(entry @ first), variance_s2=float(entry @ second - (entry @ first) ** 2))


def with_feedback(rate_per_s: float, service_s: float, servers: int, again: float) -> tuple[Time, Time]:
    """Return the total wait and the whole sojourn at M/M/c whose customers return to the end of the queue with probability `again`.

    The chain one customer sees: a ahead and b behind while it waits, m others while it is served, ticking at lambda + c mu.  Those who
    arrive see the stationary M/M/c of rate lambda / (1 - again).  For the wait the clock stands still during service.
    Exact but for states of probability below 1e-11.
    """
    one = mmc(rate_per_s / (1 - again), service_s, servers)
    rho = one.utilisation
    states = servers + max(20, math.ceil(math.log(1e-11) / math.log(rho)))
    found = birth_death(rho * servers, np.minimum(np.arange(1, states), servers).astype(np.float64))
    clock_per_s = rate_per_s + servers / service_s
    up, mu = rate_per_s / clock_per_s, 1 / service_s / clock_per_s

    def law(mean_s: float, waiting_only: bool) -> Ticks:
        def variance() -> float:
            total, i = 0.0, 0
            for chunk in _feedback(found, up, mu, servers, again, waiting_only):
                total += float(chunk @ (i + 1 + np.arange(len(chunk))))
                i += len(chunk)
                if chunk[-1] * i * i < 1e-10:
                    break
            return 2 * total / clock_per_s**2 - mean_s**2

        return Ticks(_feedback(found, up, mu, servers, again, waiting_only), per_s=clock_per_s, mean_s=mean_s, variance_s2=variance)

    return law(one.wait_s / (1 - again), True), law(one.sojourn_s / (1 - again), False)


def _feedback(found: Floats, up: float, mu: float, c: int, again: float, waiting_only: bool) -> Iterator[Floats]:
    """Yield P(still there after i ticks).  served[m]: in service beside m others; queued[a - c, b]: a ahead, b behind."""
    n = len(found)
    m = np.arange(n)
    served, queued = np.where(m < c, found, 0.0), np.zeros((n - c, n))
    queued[:, 0] = found[c:]
    room = np.add.outer(np.arange(n - c), m) + c < n - 1  # arrivals are turned away where all kept states are full
    requeued = _requeued(n, up, mu, c, again) if waiting_only else np.zeros((0, 0))
    others = np.minimum(m, c - 1) * mu
    while True:
        alive = np.empty(CHUNK)
        for k in range(CHUNK):
            if waiting_only:
                queued[:, 0] += (served @ requeued)[c:]
                served = np.zeros(n)
            alive[k] = served.sum() + queued.sum()
            after = served * (1 - up - mu - others * (1 - again))
            after[-1] += served[-1] * up
            after[1:] += up * served[:-1]
            after[:-1] += (1 - again) * others[1:] * served[1:]
            after[:c] += again * mu * served[:c]
            waits = np.where(room, 0.0, up * queued) + (1 - up - c * mu) * queued
            waits[:, 1:] += np.where(room, up * queued, 0.0)[:, :-1]
            waits[:, 0] += again * mu * served[c:]
            leave, turn = (1 - again) * c * mu * queued, again * c * mu * queued
            waits[:-1] += leave[1:]
            waits[:-1, 1:] += turn[1:, :-1]
            after[c - 1 :] += leave[0, : n - c + 1]
            after[c:] += turn[0, : n - c]
            served, queued = after, waits
        yield alive


def _requeued(n: int, up: float, mu: float, c: int, again: float) -> Floats:
    """Return, for a customer in service beside m others, the probability that it next waits behind m' [n, n]; 0 for m' < c."""
    m = np.arange(n)
    others = np.minimum(m, c - 1) * mu * (1 - again)
    back = np.where(m < c, again * mu, 0.0)  # into service again at once
    rises = np.where(m < n - 1, up, 0.0)
    system = np.diag(rises + others + mu - back) - np.diag(rises[:-1], 1) - np.diag(others[1:], -1)
    return np.asarray(np.linalg.solve(system, np.diag(np.where(m >= c, again * mu, 0.0))))
