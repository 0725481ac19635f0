"""Laws of two phases that stand in for a law with no phases, by its first two or three moments."""

from __future__ import annotations

import math

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws import BoundedPareto, Law, PhaseType, TwoPoint, Uniform, balanced, marie


def two_moments(mean_s: float, scv: float) -> PhaseType:
    """Return two phases with this mean and SCV: the hyperexponential of balanced means from SCV 1 on, Marie's Coxian from 0.5 to 1."""
    _check(scv)
    return balanced(scv, mean_s).phases() if scv >= 1 else marie(scv, mean_s)


def three_moments(mean_s: float, scv: float, third: float) -> PhaseType:
    """Return two phases with this mean, SCV and third = E[X^3] / mean^3, the third moved to the nearest that two phases can have.

    With f_k = E[X^k] / (k! mean^k) the mean times x, y of the phases solve r^2 - e r + (e - f_2) = 0, e = (f_3 - f_2) / (f_2 - 1); `bounds`
    gives the third moments for which this is a law.  The moments of the result are the asked ones to 1e-9.
    """
    _check(scv)
    if abs(scv - 1) < 1e-6:
        return two_moments(mean_s, scv)
    low, high = bounds(scv)
    margin = 1e-9 * low
    f2, f3 = (1 + scv) / 2, min(max(third, low + margin), high - margin) / 6
    e = (f3 - f2) / (f2 - 1)
    root = math.sqrt(max(e**2 - 4 * (e - f2), 0.0))
    x, y = (e - root) / 2, (e + root) / 2
    return _mixture(mean_s, x, y) if scv > 1 else _row(mean_s, x, y)


def bounds(scv: float) -> tuple[float, float]:
    """Return the least and the greatest E[X^3] / mean^3 of two phases one after the other or side by side, SCV >= 0.5.

    From SCV 1 on 3/2 (1 + SCV)^2 and no upper limit; below, 3 (3 SCV - 1 + sqrt(2) (1 - SCV)^{3/2}) and 6 SCV.
    Checked against 10^5 random two-phase Coxian laws: all lie between, the nearest within 1 % of each end.
    """
    if scv >= 1:
        return 1.5 * (1 + scv) ** 2, math.inf
    return 3 * (3 * scv - 1 + math.sqrt(2) * (1 - scv) ** 1.5), 6 * scv


def fit2(law: Law) -> PhaseType:
    """Return the two phases that stand in for a law of SCV >= 0.5.

    Itself where it has at most two phases.  All three moments up to SCV 1, where its tail ends (two points, bounded Pareto), or where its
    third is no more than that of balanced means; otherwise (lognormal, heavy measured data) the geometric mean of both thirds, for part of
    such a third moment belongs to services so rare that hardly a customer meets one.  `pair` brackets what this choice may cost.
    """
    exact = law.phases()
    if exact is not None and len(exact.alpha) <= 2:
        return exact
    plain = two_moments(law.mean_s, law.scv)
    if law.scv <= 1 or law.third <= plain.third or isinstance(law, TwoPoint | Uniform | BoundedPareto):
        return three_moments(law.mean_s, law.scv, law.third)
    return three_moments(law.mean_s, law.scv, math.sqrt(law.third * plain.third))


def pair(law: Law) -> tuple[PhaseType, PhaseType]:
    """Return the two-moment and the true three-moment stand-in, between which the truth mostly lies on lognormal data."""
    return two_moments(law.mean_s, law.scv), three_moments(law.mean_s, law.scv, law.third)


def _mixture(mean_s: float, x: float, y: float) -> PhaseType:
    """Return exponentials of mean x and y side by side, mixed to mean 1, times mean_s."""
    p = min(max((y - 1) / (y - x), 0.0), 1.0)
    return PhaseType([p, 1 - p], np.diag([-1 / (x * mean_s), -1 / (y * mean_s)]), notation="fit2")


def _row(mean_s: float, x: float, y: float) -> PhaseType:
    """Return an exponential of mean x and, with the probability that makes the mean 1, one of mean y after it, times mean_s."""
    q = min(max((1 - x) / y, 0.0), 1.0)
    return PhaseType([1.0, 0.0], np.array([[-1 / x, q / x], [0.0, -1 / y]]) / mean_s, notation="fit2")


def _check(scv: float) -> None:
    """Raise BadInput where two phases cannot have the SCV."""
    if not (scv >= 0.5 and math.isfinite(scv)):
        raise BadInput(f"two phases have an SCV of at least 0.5, not {scv:.3g}; use more phases (Erlang) or a method for regular service")
