"""Where a series of results changed for good.  Pure functions over logarithms.

Two questions, for two kinds of series.  `steps` is for values measured one by one: it fits a level that stands still, wanders with the
machine, or jumps at a price, to noisy values of which some are outliers.  `jumps` is for ratios of two sides that ran side by side:
there each ratio alone is the evidence for what lies between its two commits, and neighbours add nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ENOUGH = 10  # values, to know their noise and look for steps
FALSE_ALARMS = 0.01  # per series of ratios, by the formula; what is estimated in it makes up to 0.05 of that
OUTLIER_SD = 3.0  # beyond this a value says no more than that it is far away
LOW_PRICE = 17.0  # while it is decided whether the level wanders: a jump must not be taken for that
PRICE = 32.0  # of a jump, in squared sds: set by simulation, see docs/adr/0022-change-points.md
FLOOR_SD = 5e-4  # of logarithms: quieter series are taken to be this noisy
_EFFICIENCY = 0.37  # of a spread that is told from a median of absolute values, against one from squares
_MAD = 1.4826  # median absolute deviation of a normal law, to its sd
_DRIFTS = (0.0, 0.1, 0.2, 0.4, 0.8)  # of the level from one value to the next, in units of the noise
_CELLS_A_SD = 4  # of the grid of levels
_MOST_CELLS = 300
_NEAR = 10  # values on each side that tell the size of a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """The first value after a change, its size as a logarithm and the standard error of that."""

    at: int
    size: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """How values scatter around their level, and how the level wanders from one value to the next (sds of logarithms)."""

    sd: float
    drift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """The steps of a series, and the noise they stand out of."""

    changes: tuple[Change, ...]
    noise: Noise


def steps(logs: Sequence[float] | Floats, *, price: float = PRICE) -> Fit | None:
    """Return the lasting steps of a series, or None for one of fewer than ENOUGH values.

    Minimises the sum of bounded squares of what is left, plus the square of each wandering, plus `price` for each jump, over levels on
    a grid, exactly.  A value beyond three sds counts as three, so a single outlier is cheaper to leave than to follow (Fearnhead and
    Rigaill (2019), JASA 114).  A level that wanders makes a slow drift cheaper to follow than to break (Romano, Rigaill, Runge and
    Fearnhead (2022), JASA 117); how far it does is what makes the series likeliest (Harvey (1989), the local level model).
    """
    y = np.asarray(logs, dtype=float)
    if len(y) < ENOUGH:
        return None
    sd = _MAD * float(np.median(np.abs(np.diff(y)))) / math.sqrt(2)  # between neighbours, few of which lie across a jump
    drift = min(_DRIFTS, key=lambda drift: _fitted(y, _noise(sd, drift), LOW_PRICE)[0] + len(y) * _unlikely(drift))
    seen = _noise(sd, drift)
    _, found = _fitted(y, seen, price)
    edges = [0, *found, len(y)]
    sizes = (_size(y, before, at, after, seen.sd) for before, at, after in zip(edges, found, edges[2:], strict=False))
    return Fit(changes=tuple(sizes), noise=seen)


def _noise(between_sd: float, drift: float) -> Noise:
    """Return the noise that makes neighbours differ by so much where the level wanders by `drift` noises."""
    sd = max(FLOOR_SD, between_sd / math.sqrt(1 + drift**2 / 2))
    return Noise(sd=sd, drift=drift * sd)


def _unlikely(drift: float) -> float:
    """Return -2 log likelihood a value of the local level model, beyond the squares: the log of a prediction's variance."""
    ahead = (drift**2 + math.sqrt(drift**4 + 4 * drift**2)) / 2  # of the level, before the value is seen, in squared noises
    return math.log((1 + ahead) / (1 + drift**2 / 2))


def _fitted(y: Floats, seen: Noise, price: float) -> tuple[float, list[int]]:
    """Return what the best way costs, and the first value after each of its jumps."""
    cost, jumped = _fit(y / seen.sd, _levels(y, seen.sd) / seen.sd, seen.drift / seen.sd, price)
    return cost, [int(t) for t in np.flatnonzero(jumped)]


def _levels(y: Floats, sd: float) -> Floats:
    """Return the levels a series may stand at: from its lowest to its highest value, each value but the two ends' outliers."""
    inner = np.sort(y)[1:-1]
    cells = min(_MOST_CELLS, max(3, math.ceil((inner[-1] - inner[0]) / sd * _CELLS_A_SD) + 1))
    return np.linspace(inner[0], inner[-1], cells)


def _fit(y: Floats, levels: Floats, drift: float, price: float) -> tuple[float, npt.NDArray[np.bool_]]:
    """Return the cost of the cheapest way through the levels and where it jumps, by dynamic programming.  In units of the noise."""
    cell = float(levels[1] - levels[0]) or 1.0
    cells = np.arange(len(levels))
    moves = ((cells[:, None] - cells) * cell / drift) ** 2 if drift else None  # what it costs to get to a cell [i, from j]
    came = np.zeros((len(y), len(levels)), dtype=np.intp)
    jumped = np.zeros((len(y), len(levels)), dtype=bool)
    cost = _bounded(y[0] - levels)
    for t in range(1, len(y)):
        cheapest = int(cost.argmin())
        came[t] = cells if moves is None else (cost + moves).argmin(axis=1)
        best = cost if moves is None else cost[came[t]] + moves[cells, came[t]]
        jumped[t] = best > cost[cheapest] + price
        came[t][jumped[t]] = cheapest
        cost = np.minimum(best, cost[cheapest] + price) + _bounded(y[t] - levels)
    return float(cost.min()), _way_back(int(cost.argmin()), came, jumped)


def _bounded(residual: Floats) -> Floats:
    return np.minimum(residual**2, OUTLIER_SD**2)


def _way_back(last: int, came: npt.NDArray[np.intp], jumped: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    flags = np.zeros(len(came), dtype=bool)
    for t in range(len(came) - 1, 0, -1):
        flags[t] = jumped[t, last]
        last = int(came[t, last])
    return flags


def _size(y: Floats, before: int, at: int, after: int, sd: float) -> Change:
    """Return how far the values just after a step lie from those just before it: with a drift, far ones tell less."""
    left, right = (_inliers(part, sd) for part in (y[max(before, at - _NEAR) : at], y[at : min(after, at + _NEAR)]))
    return Change(at=at, size=float(right.mean() - left.mean()), error=sd * math.sqrt(1 / len(left) + 1 / len(right)))


def _inliers(values: Floats, sd: float) -> Floats:
    return values[np.abs(values - np.median(values)) <= max(OUTLIER_SD * sd, float(np.abs(values - np.median(values)).min()))]


# ---------------------------------------------------------------- ratios of two sides that ran side by side


def pooled_sd(sds: Sequence[float], pairs: Sequence[int]) -> float:
    """Return the usual sd between pairs of launches: the median of the runs' variances, each without its small sample's bias."""
    from scipy.special import chdtri

    freedom = np.asarray(pairs, dtype=float) - 1
    several = freedom >= 1
    if not several.any():
        return 0.0
    squares = np.asarray(sds, dtype=float)[several] ** 2
    return math.sqrt(float(np.median(squares * freedom[several] / chdtri(freedom[several], 0.5))))


class Errors(NamedTuple):
    """The standard error of each run's mean log ratio, and the degrees of freedom that these are known by."""

    each: Floats
    freedom: float


def errors_of(ratios: Sequence[float], sds: Sequence[float], pairs: Sequence[int]) -> Errors:
    """Return how sure the mean log ratios of some runs are.

    At least as unsure as the usual sd says, so that six pairs that agree by chance do not pass for certain.  Where the runs scatter by
    more than their own pairs explain (the two sides of a day differ by themselves), that comes on top: the variance with which the
    median of the ratios, in their errors, is that of a normal law (Paule and Mandel (1982), with medians: real changes are few).
    """
    usual = pooled_sd(sds, pairs)
    own = np.array([max(sd, usual, FLOOR_SD) / math.sqrt(n) for sd, n in zip(sds, pairs, strict=True)])
    inside = max(1.0, _EFFICIENCY * sum(n - 1 for n in pairs))
    if len(own) < ENOUGH:
        return Errors(own, inside)
    between = _between(np.abs(np.asarray(ratios, dtype=float)), own**2)
    typical = float(np.median(own**2))
    freedom = (typical + between) ** 2 / (typical**2 / inside + between**2 / (_EFFICIENCY * len(own)))
    return Errors(np.sqrt(own**2 + between), freedom)


def _between(sizes: Floats, own: Floats) -> float:
    """Return the variance that the runs' own leave unexplained, by halving; 0 where they explain all."""

    def scatter(more: float) -> float:
        return _MAD * float(np.median(sizes / np.sqrt(own + more)))

    low, high = 0.0, float((_MAD * np.median(sizes)) ** 2)
    if scatter(0.0) <= 1:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if scatter(middle) > 1 else (low, middle)
    return high


def jumps(ratios: Sequence[float], errors: Errors) -> tuple[Change, ...]:
    """Return the runs whose mean log ratio differs from 0: Student's t, Holm (1979) over the series, FALSE_ALARMS in a quiet one."""
    from scipy.special import stdtr

    chances = [2 * float(stdtr(errors.freedom, -abs(r) / e)) for r, e in zip(ratios, errors.each, strict=True)]
    order = sorted(range(len(chances)), key=chances.__getitem__)
    kept: list[int] = []
    for rank, at in enumerate(order):
        if chances[at] > FALSE_ALARMS / (len(order) - rank):
            break
        kept.append(at)
    return tuple(Change(at=at, size=float(ratios[at]), error=float(errors.each[at])) for at in sorted(kept))
