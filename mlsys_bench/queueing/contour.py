"""Times known by the Laplace transform of P(T > t), when all its singularities lie on the negative real axis."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mlsys_bench.queueing.times import Complexes, Floats, Time, check_share

POINTS = 24


def _contour() -> tuple[Complexes, Complexes]:
    """Return the upper half of Talbot's contour z and its weights e^z z' / POINTS, for t = 1."""
    theta = np.pi * (np.arange(POINTS // 2) + 0.5) * 2 / POINTS
    cot = 1 / np.tan(0.6407 * theta)
    z = POINTS * (0.5017 * theta * cot - 0.6122 + 0.2645j * theta)
    slope = POINTS * (0.5017 * cot - 0.5017 * 0.6407 * theta * (1 + cot**2) + 0.2645j)
    return z, np.exp(z) * slope * 2 / POINTS


Z, WEIGHTS = _contour()


class Contour(Time):
    """P(T > t) from F(s) = integral of exp(-s t) P(T > t), by 12 values of F on Talbot's contour scaled to t.

    `transform` takes a complex array.  Absolute error about 1e-11, at any t, for F analytic off the negative real axis, as where a
    reversible chain, or one whose transform continues like one, is absorbed; elsewhere use `times.Transform`.
    Source of the method and its rate: L. N. Trefethen, J. A. C. Weideman and T. Schmelzer, Talbot quadratures and rational
    approximations, BIT 46 (2006) 653-670 (abstract, https://fr.scribd.com/document/378703195/s10543-006-0077-9); of the four numbers:
    improved_talbot.m in https://github.com/laura-hajzokova/Laplace-transform-inversion.  The tests put it beside uniformisation.
    """

    def __init__(self, transform: Callable[[Complexes], Complexes], *, p_positive: float, mean_s: float, variance_s2: float) -> None:
        self._transform, self._p_positive, self.mean_s, self.variance_s2 = transform, p_positive, mean_s, variance_s2

    def _over(self, t_s: float) -> float:
        if t_s <= 0:
            return self._p_positive
        return min(1.0, max(0.0, float(np.imag(WEIGHTS @ self._transform(Z / t_s)) / t_s)))

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t)."""
        return np.array([self._over(float(t)) for t in t_s])

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile, bracketed by doubling and then by secants on the logarithm."""
        share = 1 - check_share(p)
        if self._p_positive <= share:
            return 0.0
        from scipy.optimize import brentq

        def excess(t_s: float) -> float:
            return math.log(max(self._over(t_s), 1e-300) / share)

        low, high = 0.0, -self.mean_s * math.log(share)
        while excess(high) > 0:
            low, high = high, 2 * high
        while low == 0.0 and excess(high / 2) <= 0:
            high /= 2
        return float(brentq(excess, max(low, high / 2), high, xtol=1e-300, rtol=1e-13))
