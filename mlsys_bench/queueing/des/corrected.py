"""A simulated time corrected by controls: what was simulated beside it, under the same fortunes, and is known exactly.

Where the controls came out high by chance, so did the time in question: regression over the groups of runs says by how much, and what
the controls explain leaves both the estimate and its interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mlsys_bench.queueing.des.tally import LEVEL, WIDER, Estimate, Measured, around, student
from mlsys_bench.queueing.times import Floats, Time, check_share

SHARES = (1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002, 0.001)  # of those who wait


class Control:
    """A time that was simulated and is known: counts by group, and the exact law."""

    def __init__(self, measured: Measured, exact: Time) -> None:
        self.measured, self.exact = measured, exact
        self._quantiles: dict[float, float] = {}

    def excess(self, p: float) -> Floats:
        """Return how many more of each group than expected lie above about the exact p-quantile.

        The threshold is the nearest edge of a bin: there counts are exact, and so is the law, whatever atoms it has.
        """
        if p not in self._quantiles:
            self._quantiles[p] = self.exact.quantile_s(p)
        edges_s = self.measured.edges_s
        k = min(int(np.searchsorted(edges_s, self._quantiles[p])), len(edges_s) - 1)
        return self.measured.above_edge(k) - self.measured.n * self.exact.p_over(float(edges_s[k]))

    def excess_s(self) -> Floats:
        """Return how much more than expected the times of each group add up to."""
        return self.measured.sums_s - self.measured.n * self.exact.mean_s


@dataclass(frozen=True, slots=True)
class Fit:
    """An estimate without what the controls explain: `value` per customer, `error` its standard error, `explained` what was taken off."""

    value: float
    error: float
    explained: float
    freedom: int

    def half(self, level: float) -> float:
        """Return the half-width of Student's interval."""
        return WIDER * student(self.freedom, level) * self.error


def regress(sums: Floats, n: Floats, excess: Sequence[Floats]) -> Fit:
    """Return sum(sums) / sum(n) less what `excess` (of mean 0, one array over groups per control) explains of it.

    Least squares over groups of sums - ratio n on excess - its share.  The standard error is the jackknife's: what the estimate would move
    without each group in turn.  A group with a rare long backlog pulls the slopes to itself and leaves no residual; a plain error,
    measured on M/H2/16, was then half of what it should be.
    """
    total, groups = float(n.sum()), len(n)
    x = sums - sums.sum() / total * n
    away = np.array([one.sum() for one in excess])
    Y = np.column_stack(excess) - np.outer(n, away / total) if excess else np.zeros((groups, 0))
    size = np.sqrt((Y**2).sum(axis=0))
    used = size > 1e-9 * np.sqrt(n.sum() * np.maximum(np.abs(away), 1.0))
    Y, away = Y[:, used] / size[used], away[used] / size[used]
    left, values, right = np.linalg.svd(Y, full_matrices=False)
    kept = values > 1e-6 * values.max(initial=0.0)
    left, values, right = left[:, kept], values[kept], right[kept]
    slopes = (left.T @ x) / values  # along the kept directions
    turned = right @ away
    freedom = max(groups - 1 - int(kept.sum()), 1)
    explained = float(slopes @ turned) / total
    weights = (1 - left @ (turned / values)) / total  # of each group in the estimate
    pull = np.minimum((left**2).sum(axis=1) + 1 / groups, 0.99)  # of each group on the slopes
    error = float(np.sqrt(np.sum((weights * (x - left @ (left.T @ x)) / (1 - pull)) ** 2)))
    return Fit(float(sums.sum()) / total - explained, error, explained, freedom)


class Corrected(Estimate):
    """A time from counts, less what its controls explain.

    `controls` are times of their own; `linear` holds excesses [groups] of anything else of known mean.  A percentile is where the
    corrected share of customers above it is 1 - p, so its interval is that of a share.  Between percentiles P(T > t) is the counted share
    times a smooth correction.  The variance is as counted.
    """

    def __init__(self, own: Measured, controls: Sequence[Control], linear: Sequence[Floats]) -> None:
        self.own, self.controls, self.linear = own, controls, linear
        self._mean = regress(own.sums_s, own.n, [*(c.excess_s() for c in controls), *linear])
        self.mean_s = max(self._mean.value, 0.0)
        self.variance_s2 = own.variance_s2
        self._found: dict[float, tuple[float, Fit]] = {}

    def _fit(self, t_s: float, p: float) -> Fit:
        """Return P(T > t), corrected by the controls at their p-quantiles."""
        return regress(self.own.above(t_s), self.own.n, [*(c.excess(p) for c in self.controls), *self.linear])

    def _solved(self, p: float) -> tuple[float, Fit]:
        """Return the counted share above the p-quantile, and the fit there."""
        if p not in self._found:
            raw = 1 - p
            for _ in range(4):
                fit = self._fit(self.own.at(1 - raw), p)
                raw = min((1 - p) / max(1 - fit.explained / raw, 0.2), 1 - 1e-12)
            self._found[p] = raw, fit
        return self._found[p]

    def quantile_s(self, p: float) -> float:
        """Return the corrected p-quantile."""
        return self.own.at(1 - self._solved(check_share(p))[0])

    def interval_s(self, p: float, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval of the p-quantile."""
        raw, fit = self._solved(check_share(p))
        less, more = around(raw, fit.half(level))
        return self.own.at(1 - more), self.own.at(1 - less)

    def mean_interval_s(self, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval of the mean."""
        half = self._mean.half(level)
        return self.mean_s - half, self.mean_s + half

    def _over(self, t_s: float) -> Fit:
        share = float(self.own.survival(np.array([t_s]))[0])
        return self._fit(t_s, min(max(1 - share, 1e-9), 1 - 1e-9))

    def p_over(self, t_s: float) -> float:
        """Return P(T > t)."""
        return 1.0 if t_s < 0 else min(max(self._over(t_s).value, 0.0), 1.0)

    def p_over_interval(self, t_s: float, level: float = LEVEL) -> tuple[float, float]:
        """Return the interval of P(T > t)."""
        fit = self._over(t_s)
        return max(fit.value - fit.half(level), 0.0), min(fit.value + fit.half(level), 1.0)

    @cached_property
    def _correction(self) -> tuple[Floats, Floats]:
        """Logarithms of counted shares, rising, and of the corrected ones over them."""
        most = self.p_over(0.0)
        shares = [min(most * part, 1 - 1e-6) for part in SHARES if most > 0]
        pairs = [(np.log(self._solved(1 - share)[0]), np.log(share)) for share in shares]
        raw, corrected = np.array(sorted(pairs)).reshape(-1, 2).T
        return raw, corrected - raw

    def survival(self, t_s: Floats) -> Floats:
        """Return the counted P(T > t), smoothly corrected."""
        share, (at, by) = self.own.survival(t_s), self._correction
        if not len(at):
            return np.zeros_like(share)
        with np.errstate(divide="ignore"):
            corrected = share * np.exp(np.interp(np.log(share), at, by))
        return np.asarray(np.where(share >= 1, 1.0, np.minimum(corrected, 1.0)), dtype=np.float64)

    def gain(self, p: float) -> float:
        """Return how many times narrower the interval of the p-quantile is than without controls."""
        low, high = self.own.interval_s(p)
        corrected_low, corrected_high = self.interval_s(p)
        return (high - low) / (corrected_high - corrected_low) if corrected_high > corrected_low else np.inf
