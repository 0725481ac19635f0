"""Kolmogorov's forward equations of M_t/M/c_t: the law of the number in system along a course, and the one a period leaves unchanged."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.mmc import birth_death
from mlsys_bench.queueing.schedule import Plan
from mlsys_bench.queueing.times import Floats

MOST_STATES = 20_000  # beyond that a law of the number in system takes minutes
EDGE = 1e-12  # most probability allowed in the last state kept


def course(plan: Plan, law: Floats, times_s: Sequence[float], tolerance: float = 1e-9) -> list[Floats]:
    """Return the law of the number in system at each time, from `law` at time 0.  Raises TooFew when states run out."""
    found = {0.0: law}
    wanted = sorted({t for t in times_s if t > 0})
    for begin_s, end_s in plan.pieces(0.0, max(wanted, default=0.0)):
        stops = [t for t in wanted if begin_s < t < end_s] + [end_s]
        for t, p in zip(stops, _piece(plan, law, begin_s, stops, tolerance), strict=True):
            found[t] = law = p
    return [found[t] for t in times_s]


def _piece(plan: Plan, law: Floats, begin_s: float, stops: list[float], tolerance: float) -> Floats:
    """Return the law at each stop of a stretch without jumps [stops, states]."""
    from scipy.integrate import solve_ivp

    leaves = np.minimum(np.arange(len(law)), plan.servers(begin_s)) * plan.mu
    rate = plan.rate_between(begin_s, stops[-1])
    enters = np.ones(len(law))
    enters[-1] = 0.0  # the last state turns arrivals away

    def slope(t: float, p: Floats) -> Floats:
        up, down = rate(t) * (enters * p), leaves * p
        change = -up - down
        change[1:] += up[:-1]
        change[:-1] += down[1:]
        return change

    def bands(t: float, p: Floats) -> Floats:
        up = rate(t) * enters
        jacobian = np.zeros((3, len(p)))
        jacobian[0, 1:], jacobian[1], jacobian[2, :-1] = leaves[1:], -up - leaves, up[:-1]
        return jacobian

    run = solve_ivp(slope, (begin_s, stops[-1]), law, "LSODA", stops, rtol=tolerance, atol=1e-3 * tolerance, jac=bands, lband=1, uband=1)
    if not run.success:
        raise BadInput(f"the equations of the queue could not be solved from {begin_s:g} s on: {run.message}")
    if run.y[-1].max() > max(EDGE, 1e-3 * tolerance):
        raise TooFew
    laws = np.maximum(run.y.T, 0.0)
    return np.asarray(laws / laws.sum(axis=1, keepdims=True), dtype=np.float64)


class TooFew(Exception):
    """The last state kept has a probability above EDGE."""


def growing(solve: Callable[[Floats], list[Floats]], law: Floats) -> list[Floats]:
    """Return the first solution that has enough states, from `law` and empty states beyond it."""
    while len(law) <= MOST_STATES:
        try:
            return solve(law)
        except TooFew:
            law = np.concatenate([law, np.zeros(len(law) // 2)])
    raise BadInput(
        f"the queue grows beyond {MOST_STATES} requests: the load stays above capacity for too long; add servers, or look at a shorter time"
    )


def fluid_states(plan: Plan, end_s: float, start: float = 0.0) -> int:
    """Return a first guess of the states needed: the peak of the fluid x' = lambda - min(x, c) mu, and a margin."""
    steps = 2000
    width_s = end_s / steps
    x = peak = start
    for k in range(steps):
        t = (k + 0.5) * width_s
        c = plan.servers(t)
        goal = plan.rate(t) / plan.mu
        x = goal + (x - goal) * math.exp(-plan.mu * width_s) if x <= c else max(x + (plan.rate(t) - c * plan.mu) * width_s, min(x, goal))
        peak = max(peak, x)
    most = plan.most_servers
    return int(max(peak, most) + 8 * math.sqrt(max(peak, most)) + 40)


def stationary(plan: Plan, rate_per_s: float, states: int) -> Floats:
    """Return the law of M/M/c under the servers of time 0, on at least `states` states."""
    c = plan.servers(0.0)
    if rate_per_s >= c * plan.mu:
        raise Overload(rate_per_s / (c * plan.mu), c, enough=math.floor(rate_per_s / plan.mu) + 1)
    while True:
        law = birth_death(rate_per_s / plan.mu, np.minimum(np.arange(1, states), c).astype(np.float64))
        if law[-1] <= EDGE or states > MOST_STATES:
            return law
        states *= 2


def periodic(plan: Plan, period_s: float, phases_s: Sequence[float]) -> list[Floats]:
    """Return the laws of the periodic regime at some phases: a rough fixed point first, then a fine one from there."""
    grid_s = (np.arange(1000) + 0.5) * period_s / 1000
    load = sum(plan.rate(t) for t in grid_s) / plan.mu / 1000
    capacity = sum(plan.servers(t) for t in grid_s) / 1000
    if load >= capacity:
        raise Overload(load / capacity, math.floor(capacity), enough=math.floor(load) + 1)
    watched = sorted({*phases_s, *(period_s * k / 16 for k in range(1, 17))})

    cycle_s = period_s * math.ceil(4 / (plan.mu * period_s))

    def rough(law: Floats) -> list[Floats]:
        return [_fixed_point(lambda p: course(plan, p, [cycle_s], 1e-6)[0], law, 1e-5)]

    def fine(law: Floats) -> list[Floats]:
        law = _fixed_point(lambda p: course(plan, p, [cycle_s])[0], law, 5e-10)
        by_phase = dict(zip(watched, course(plan, law, watched), strict=True))
        return [by_phase[t] for t in phases_s]

    guess = stationary(plan, min(load, 0.98 * plan.servers(0.0)) * plan.mu, fluid_states(plan, 2 * period_s, load))
    return growing(fine, growing(rough, guess)[0])


def _fixed_point(step: Callable[[Floats], Floats], law: Floats, tolerance: float) -> Floats:
    """Return the law that a step leaves unchanged, by cycles of eight plain steps and a reduced-rank extrapolation from them.

    The combination sum g_j u_j of the iterates, sum g_j = 1, whose own change is least: what a slow mode would take hundreds of periods
    to lose is gone after a cycle or two.  Done when a step moves the law by less than `tolerance` (sum over states), or when a whole
    cycle brings it no closer: what is left then is the error of the integration.
    """
    before = math.inf
    for _ in range(40):
        iterates = [law]
        for _ in range(8):
            iterates.append(step(iterates[-1]))
            change = float(np.abs(iterates[-1] - iterates[-2]).sum())
            if change < tolerance:
                return iterates[-1]
        if before < 100 * tolerance and change > before / 2:
            return iterates[-1]
        before = change
        changes = np.diff(np.array(iterates), axis=0)
        mix = np.linalg.lstsq(np.diff(changes, axis=0).T, changes[-1], rcond=1e-9)[0]
        law = np.maximum(iterates[-1] - mix @ changes[1:], 0.0)
        law = law / law.sum()
    raise BadInput(f"the regime that repeats itself was not found: a period still moves the law by {before:.1g}; the load is near capacity")
