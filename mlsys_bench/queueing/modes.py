"""What one busy server does, in a few modes: a small linear system that stands for a law of service (or of the time between arrivals).

A server busy in steady state has some residual life x, with density p(x) = P(S > x) / E[S].  Any other density u of its residual life has
a place in the inner product <u, v> = integral of u v / p, in which a renewal process cannot grow.  The law becomes matrices by projection
on a few orthonormal functions (Galerkin's method), the first of them p itself.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from mlsys_bench.queueing.laws import Empirical, Law, PhaseType
from mlsys_bench.queueing.times import Floats

RATES = (0.0, 0.3, 3.0, 0.03, 10.0, 1.0, 0.1, 0.01, 30.0)  # per mean service: at which the law is met, the telling ones first
DISTINCT = 1e-4  # a function nearer than this to the span of those before it says nothing new
PER_DECADE = 150  # grid points
INSIDE_A_JUMP = 160
OFTEN = 0.002  # share of the samples from which on equal ones are a jump


class Modes(NamedTuple):
    """Rows are measures in an orthonormal basis that starts with p: the first coordinate is the mass.  Until an end, row' = row `moves`."""

    moves: Floats  # [k, k] per second
    start: Floats  # [k] a fresh service
    ends: Floats  # [k] rate at which a service ends, per second


def leading(modes: Modes, count: int) -> Modes:
    """Return the first few modes: the projection on them alone, since each is orthogonal to those before it."""
    return Modes(modes.moves[:count, :count], modes.start[:count], modes.ends[:count])


def poisson(rate_per_s: float) -> Modes:
    """Return the one mode of exponential times."""
    return Modes(np.array([[-rate_per_s]]), np.ones(1), np.array([rate_per_s]))


def of_phases(law: PhaseType) -> Modes:
    """Return all modes of a phase-type law, exactly: as many as phases, the telling ones first as in `of_law`."""
    p = np.linalg.solve(-law.S.T, law.alpha)
    used = p > 1e-14 * p.sum()  # a phase never entered has no place in the inner product
    alpha, S, p = law.alpha[used], law.S[np.ix_(used, used)], p[used] / p[used].sum()
    root = np.sqrt(p)
    met = [np.linalg.solve(rate / law.mean_s * np.eye(len(p)) - S.T, p) / root for rate in RATES[: len(p) - 1]]
    Q = _orthonormal(np.column_stack([root, *met, np.eye(len(p))]), DISTINCT)
    U, back = Q.T * root, Q / root[:, None]
    return Modes(U @ S @ back, alpha @ back, U @ -S.sum(axis=1))


@lru_cache(maxsize=64)
def of_law(law: Law) -> Modes:
    """Return up to ten modes for any law of positive time: the equilibrium residual life p, and p met after exponential times of `RATES`.

    With v = integral of e^{-a x} P(S > t + x) dx the motion v' = a v - P(S > t) stays among these functions, so all that is approximated
    is the start.  Mean and SCV are kept (rate 0), and E[e^{-aS}] is met near every a.  Numerics: P(S > t) linear between points of a grid.
    Checked against M/G/1 (`single.mg1`) at rho 0.3 to 0.97: percentiles to p99 within 0.4 % up to SCV 10, 0.05 % up to SCV 4.
    """
    t, over = _grid(law)
    met = np.array([over, *(_met(t, over, rate / law.mean_s) for rate in RATES)])
    return _projected(t, over, met.T, law.mean_s)


def _orthonormal(columns: Floats, distinct: float) -> Floats:
    """Return orthonormal columns that span the given ones, in their order, without those that are nearly in the span of the ones before."""
    kept: list[Floats] = []
    for column in (columns / np.linalg.norm(columns, axis=0)).T:
        rest = column
        for _ in range(2):
            for q in kept:
                rest = rest - q * float(q @ rest)
        size = float(np.linalg.norm(rest))
        if size > distinct:
            kept.append(rest / size)
    return np.array(kept).T


def _met(t: Floats, over: Floats, rate: float) -> Floats:
    """Return v(t) = integral over x > 0 of e^{-rate x} P(S > t + x), backwards over the grid, exact for P(S > t) linear in each cell."""
    from scipy.linalg import solve_banded

    width = np.diff(t)
    x = rate * width
    fall = np.exp(-x)
    small = x < 1e-4
    safe = np.where(small, 1.0, x)
    share = np.where(small, 1 - x / 2, (1 - fall) / safe)  # mean of e^{-rate x} over a cell
    left = width * np.where(small, 0.5 - x / 6, (1 - share) / safe)
    right = width * np.where(small, 0.5 - x / 3, (share - fall) / safe)
    bands, known = np.ones((2, len(t))), np.zeros(len(t))
    bands[0, 1:] = -fall
    known[:-1] = left * over[:-1] + right * over[1:]
    return np.asarray(solve_banded((0, 1), bands, known), dtype=np.float64)


def _projected(t: Floats, over: Floats, met: Floats, mean_s: float) -> Modes:
    """Return the matrices of the projection on the columns of `met` (functions on the grid, the first P(S > t)).

    <u, v'> splits into minus a sum of squares, -(u(0) v(0) / p(0) + p(0) E[(u/p)(v/p) at S]) / 2, and a skew part.  Each is integrated so
    that its sign survives rounding: the system cannot grow, however few the points.
    """
    width = np.diff(t)
    weight = np.zeros(len(t))
    weight[:-1] += width / 2
    weight[1:] += width / 2
    alive = over > 0
    root = np.zeros(len(t))
    root[alive] = np.sqrt(weight[alive] * mean_s / over[alive])
    Q = _orthonormal(met * root[:, None], DISTINCT)
    q = np.zeros_like(Q)
    q[alive] = Q[alive] / root[alive, None]
    q[:, 0] = over / mean_s
    first, last, drop = over[:-1], over[1:], over[:-1] - over[1:]
    start, square = np.zeros(q.shape[1]), np.zeros((q.shape[1], q.shape[1]))
    nodes, weights = np.polynomial.legendre.leggauss(4)
    for node, part in zip((nodes + 1) / 2, weights / 2, strict=True):
        ratio = (q[:-1] + (q[1:] - q[:-1]) * node) / (first - drop * node)[:, None]
        start += mean_s * (drop * part) @ ratio
        square += mean_s * (ratio.T * (drop * part)) @ ratio
    ends = q[0].copy()
    relative = np.where(last > 0, drop / first, 0.0)
    tiny = relative < 1e-6
    slope = np.where(tiny, (1 + relative / 2) / first, -np.log1p(-relative) / np.where(tiny, 1.0, drop)) * (last > 0)
    turn = (q[:-1] * slope[:, None]).T @ q[1:]
    moves = -0.5 * (mean_s * np.outer(ends, ends) + square) + 0.5 * mean_s * (turn.T - turn)
    start[0] = 1.0
    moves[0, :], moves[:, 0] = -start / mean_s, -ends  # mass ends where services end; p loses a fresh service's worth
    return Modes(moves, start, ends)


def _grid(law: Law) -> tuple[Floats, Floats]:
    """Return times and P(S > t) there, dense where the law bends and out to where the mean residual life holds 1e-13 of the mean."""
    if law.atoms:
        return _stairs(law)
    mean_s = law.mean_s
    if isinstance(law, Empirical):
        return _of_samples(law)
    end_s = mean_s
    while float(law.stop_loss_s(np.array([end_s]))[0]) > 1e-13 * mean_s:
        end_s *= 1.3
    decades = math.log10(end_s / mean_s) + 9
    t = np.unique(
        np.concatenate(
            [
                [0.0],
                mean_s * 10 ** np.linspace(-9.0, decades - 9, int(PER_DECADE * decades)),
                law.quantiles(np.linspace(0.0005, 0.9995, 600)),
                np.linspace(0.0, end_s if law.scv < 0.5 else mean_s, 300),
            ]
        )
    )
    over = np.asarray(law.survival(t), dtype=np.float64)
    n = int((over > 1e-15).sum()) + 1
    return t[:n], over[:n]


def _of_samples(law: Empirical) -> tuple[Floats, Floats]:
    """Return the grid of measured times, many of them different: lines between a thousand of them.

    A time measured so often that a line would smear it (a timeout, a cache hit, 0) stays a jump, as steep as those of `_stairs`.
    """
    values_s, counts = np.unique(law.samples_s, return_counts=True)
    shares = counts / len(law.samples_s)
    x = np.unique(np.append(law.quantiles((np.arange(1000) + 0.5) / 1000), law.samples_s[-1]))
    often = values_s[shares > OFTEN]
    once = np.setdiff1d(x[x > 0], often)
    times, overs = [np.zeros(1), once], [np.ones(1), (law.survival(once) + law.survival(once * (1 - 1e-12))) / 2]
    for value_s, share in zip(often, shares[shares > OFTEN], strict=True):
        below = float(law.survival(np.array([value_s]))[0])
        falls = _falls(below + share, below if below > 1e-12 else 0.0)
        at_s = max(float(value_s), 1e-9 * law.mean_s)
        times.append(at_s * (1 - 1e-7) + 2e-7 * at_s * (below + share - falls) / share)
        overs.append(falls)
    t, first = np.unique(np.concatenate(times), return_index=True)
    over = np.minimum.accumulate(np.concatenate(overs)[first])
    over[-1] = 0.0
    fine = np.unique(np.concatenate([t, np.linspace(0.0, float(t[-1]), 1500)]))
    return fine, np.interp(fine, t, over)


def _falls(above: float, below: float) -> Floats:
    """Return P(S > t) on its way down a jump, in steps fine enough for a fall by any factor."""
    falls = above * np.exp(np.linspace(0.0, math.log(max(below / above, 1e-5)), INSIDE_A_JUMP))
    return falls if below else np.append(falls, 0.0)


def _stairs(law: Law) -> tuple[Floats, Floats]:
    """Return the grid of a law on few points: each jump spread over a 1e-7th of its time, in steps fine enough for a fall by any factor."""
    times, overs, above = [np.zeros(1)], [np.ones(1)], 1.0
    for at_s, share in sorted((max(at_s, 1e-9 * law.mean_s), share) for at_s, share in law.atoms):
        since_s, edge_s = float(times[-1][-1]), at_s * (1 - 1e-7)
        steps = np.unique(np.concatenate([np.linspace(0, 1, 400)[1:], np.exp(np.linspace(-12, 0, 200))]))
        below = above - share if above - share > 1e-12 else 0.0
        falls = _falls(above, below)[1:]
        times += [since_s + (edge_s - since_s) * steps, edge_s + 2e-7 * at_s * (above - falls) / (above - below)]
        overs += [np.full(len(steps), above), falls]
        above = below
    return np.concatenate(times), np.concatenate(overs)
