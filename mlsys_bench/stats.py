"""Statistics of samples: quantiles with intervals, means, shares, bootstrap, burstiness.

Every interval is two-sided at `level`.  Where a sample is too small for what is asked, the answer is None.
scipy.special is imported where it is used: planning must start fast.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Samples = Sequence[float] | npt.NDArray[np.float64]
LEVEL = 0.9  # of every interval a person reads, unless it says otherwise


def quantile(values: Samples, p: float) -> float:
    """Return the p-quantile, linearly between order statistics (Hyndman and Fan's type 7, numpy's default)."""
    return quantiles(values, (p,))[0]


def quantiles(values: Samples, probabilities: Sequence[float]) -> list[float]:
    """Return several quantiles, as `quantile` does.

    To the last bit what np.quantile gives, which takes ten times as long for small samples and imports numpy.ma on first use.
    """
    return quantiles_of_sorted(np.sort(np.asarray(values, dtype=float)), probabilities)


def quantiles_of_sorted(ordered: npt.NDArray[np.float64], probabilities: Sequence[float]) -> list[float]:
    """Return several quantiles of values that are in order already."""
    last = len(ordered) - 1
    if last < 0:
        raise ValueError("an empty sample has no quantiles")
    found = []
    for p in probabilities:
        at = last * p
        below = int(at)
        low, high = float(ordered[below]), float(ordered[min(below + 1, last)])
        share = at - below
        found.append(low + (high - low) * share if share < 0.5 else high - (high - low) * (1 - share))
    return found


def quantile_interval(values: Samples, p: float, level: float = LEVEL) -> tuple[float, float] | None:
    """Return a distribution-free interval of the p-quantile from order statistics, or None when the sample is too small.

    The number of samples below the quantile is Binomial(n, p); the interval takes the order statistics at its equal-tail
    points.  Holds for independent samples of any continuous law.
    """
    ordered = np.sort(np.asarray(values, dtype=float))
    ranks = quantile_ranks(len(ordered), p, level)
    return None if ranks is None else (float(ordered[ranks[0]]), float(ordered[ranks[1]]))


def quantile_ranks(n: int, p: float, level: float = LEVEL) -> tuple[int, int] | None:
    """Return the places of those two among n ordered samples, or None when n is too small."""
    from scipy.special import bdtr

    tail = (1 - level) / 2
    reach = 12 + 12 * math.sqrt(n * p * (1 - p))  # beyond which nothing of weight lies
    start, end = max(0, int(n * p - reach)), min(n, int(n * p + reach) + 1)
    below = bdtr(np.arange(start, end), n, p) if n else np.zeros(0)  # P(N <= k), k = start..end-1
    low = start + int(np.searchsorted(below, tail, side="right")) - 1  # largest k with P(N <= k) <= tail
    high = start + int(np.searchsorted(below, 1 - tail, side="left"))  # least k with P(N <= k) >= 1 - tail
    return None if low < 0 or high >= n else (low, high)


def enough_for_quantile(p: float, level: float = LEVEL) -> int:
    """Return the least sample size for which `quantile_interval` has an answer at p >= 0.5."""
    tail = (1 - level) / 2
    return math.ceil(math.log(tail) / math.log(max(p, 1 - p)))


def mean_interval(values: Samples, level: float = LEVEL) -> tuple[float, float] | None:
    """Return Student's interval of the mean, or None below two samples."""
    from scipy.special import stdtrit

    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return None
    half = float(stdtrit(len(data) - 1, (1 + level) / 2)) * float(data.std(ddof=1)) / math.sqrt(len(data))
    return float(data.mean()) - half, float(data.mean()) + half


def wilson(successes: float, n: int, level: float = LEVEL) -> tuple[float, float] | None:
    """Return Wilson's interval of a share, or None without trials.  Source: Wilson (1927), JASA 22."""
    from scipy.special import ndtri

    if n == 0:
        return None
    z = float(ndtri((1 + level) / 2))
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half  # exact there, but for rounding
    return max(0.0, low), min(1.0, high)


def bootstrap(
    values: Samples, statistic: Callable[[npt.NDArray[np.float64]], float], level: float = LEVEL, resamples: int = 1000, seed: int = 0
) -> tuple[float, float] | None:
    """Return the percentile bootstrap interval of any statistic of independent samples, or None below two."""
    data = np.asarray(values, dtype=float)
    if len(data) < 2:
        return None
    rng = np.random.default_rng(seed)
    drawn = [statistic(data[rng.integers(0, len(data), len(data))]) for _ in range(resamples)]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def scv(values: Samples) -> float:
    """Return the squared coefficient of variation: variance / mean**2.  1 for an exponential law, 0 for a constant."""
    data = np.asarray(values, dtype=float)
    return float(data.var(ddof=1) / data.mean() ** 2) if len(data) > 1 else 0.0


def index_of_dispersion(times_s: Samples, window_s: float) -> float:
    """Return variance / mean of the counts in windows of this length.  1 for a Poisson process at every window.

    Needs two full windows; the part after the last full one is left out.
    """
    times = np.asarray(times_s, dtype=float)
    times = times - times.min()
    windows = int(times.max() // window_s)
    if windows < 2:
        raise ValueError(f"{times.max():g} s of arrivals hold fewer than two windows of {window_s:g} s")
    counts = np.bincount((times[times < windows * window_s] // window_s).astype(int), minlength=windows)
    return float(counts.var(ddof=1) / counts.mean())
