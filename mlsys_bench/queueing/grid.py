"""A time known by P(T > t) on an even grid, with an exponential tail past its end, and power series by FFT."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlsys_bench.queueing.laws import Law
from mlsys_bench.queueing.times import Time, check_share

Floats = npt.NDArray[np.float64]


class Grid(Time):
    """P(T > k h) = `over`[k] for k = 0, 1, 2 …: log-linear between grid points, falling on at the rate of its last tenth beyond them.

    P(T > 0) may be less than 1 (an atom at 0).  The error between points is about h^2 / 8 times the curvature of log P.
    """

    def __init__(self, over: Floats, step_s: float, *, mean_s: float, variance_s2: float) -> None:
        logs = np.log(np.maximum(np.minimum.accumulate(over), 1e-300))
        last = _trusted(logs)
        self.over = over
        self._logs, self.step_s = logs[: last + 1], step_s
        back = max(1, last // 10)
        self._fall_per_s = (self._logs[last - back] - self._logs[last]) / (back * step_s) or 1 / step_s
        self.end_s, self.mean_s, self.variance_s2 = last * step_s, mean_s, variance_s2

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t)."""
        t = np.asarray(t_s, dtype=np.float64)
        points = np.minimum(t / self.step_s, len(self._logs) - 1.0)
        k = np.minimum(points.astype(np.int64), len(self._logs) - 2)
        logs = self._logs[k] + (self._logs[k + 1] - self._logs[k]) * (points - k)
        return np.asarray(np.exp(logs - self._fall_per_s * np.maximum(t - self.end_s, 0.0)))

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile, by search in the table."""
        goal = float(np.log1p(-check_share(p)))
        if self._logs[0] <= goal:
            return 0.0
        if self._logs[-1] > goal:
            return float(self.end_s + (self._logs[-1] - goal) / self._fall_per_s)
        k = int(np.searchsorted(-self._logs, -goal))
        return float(self.step_s * (k - (goal - self._logs[k]) / (self._logs[k - 1] - self._logs[k])))


def _trusted(logs: Floats) -> int:
    """Return the last index before the table falls into rounding noise (1e-11), at least 1."""
    return max(1, int(np.searchsorted(-logs, 25.3)) - 1)


def series_ratio(above: Floats, below: Floats) -> Floats:
    """Return the first n coefficients of above(z) / below(z), both of n coefficients, for below(z) without zeros in |z| < 1.

    By FFT on a circle a little inside 1: what wraps around is 1e-10 of the largest coefficient.
    """
    from scipy.fft import irfft, next_fast_len, rfft

    n = len(above)
    size = next_fast_len(2 * n, real=True)
    damp = np.exp(np.log(1e-10) / size * np.arange(n))
    ratio = rfft(above * damp, size) / rfft(below * damp, size)
    return np.asarray(irfft(ratio, size)[:n] / damp)


def series_product(a: Floats, b: Floats) -> Floats:
    """Return the first n coefficients of a(z) b(z), both of n coefficients."""
    from scipy.fft import irfft, next_fast_len, rfft

    size = next_fast_len(2 * len(a), real=True)
    return np.asarray(irfft(rfft(a, size) * rfft(b, size), size)[: len(a)])


class Steps(Grid):
    """A time that takes no other values than 0, h, 2h …"""

    def __init__(self, over: Floats, step_s: float, *, mean_s: float, variance_s2: float) -> None:
        super().__init__(over, step_s, mean_s=mean_s, variance_s2=variance_s2)

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t), the same from a point to the next."""
        return super().survival(np.floor(np.asarray(t_s) / self.step_s + 1e-9) * self.step_s)

    def quantile_s(self, p: float) -> float:
        """Return the least point t with P(T > t) <= 1 - p."""
        return math.ceil(super().quantile_s(p) / self.step_s - 1e-9) * self.step_s


class DelayedSojourn(Time):
    """Wait + service, the wait on a grid: P(T > t) = P(W = 0) P(S > t) + P(W + S > t, W > 0), the second on the same grid.

    P(W + S > t, W > 0) = P(W > t) + int_0^t P(S > t - x) dP(W <= x), each cell of the wait spread evenly: the mean of P(S > .) over a
    cell comes from E[(S - t)+], so jumps of the service law cost nothing.  Worked out when first asked for.
    """

    def __init__(self, wait: Grid, p_wait: float, service: Law) -> None:
        self.wait, self.p_wait, self.service = wait, p_wait, service
        self.mean_s, self.variance_s2 = wait.mean_s + service.mean_s, wait.variance_s2 + service.variance_s2

    @cached_property
    def _delayed(self) -> Grid:
        over, step_s = self.wait.over, self.wait.step_s
        loss = self.service.stop_loss_s(np.asarray(np.arange(len(over) + 1) * step_s, dtype=np.float64))
        falls = np.append(0.0, -np.diff(over))
        busy = np.minimum(over + series_product(falls, -np.diff(loss) / step_s), over[0])
        return Grid(busy, step_s, mean_s=0.0, variance_s2=0.0)

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t)."""
        return (1 - self.p_wait) * self.service.survival(t_s) + self._delayed.survival(t_s)
