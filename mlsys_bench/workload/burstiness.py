"""How bursty traffic is: the index of dispersion of counts at several windows, and the two-phase bursts that have the same.

The SCV of gaps does not tell: the Azure trace of 2023 has 1.2, and 16 times the variance of a Poisson process in minutes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlsys_bench.workload.arrivals import Bursts, show_bursts
from mlsys_bench.workload.schedule import Floats

LEAST_WINDOWS = 20  # full windows that an index of dispersion is fitted to
_RESAMPLES = 400
_LEVEL = 0.9
_SHARES = (0.02, 0.98)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dispersion:
    """Counts in windows of one length: variance over mean with its 90 % interval, and the third factorial cumulant.

    `stretch_s` is how much traffic each mean was taken from: bursts that last as long raise the mean instead of the variance.
    """

    window_s: float
    stretch_s: float
    index: float
    low: float
    high: float
    windows: int
    third: float


def counts_of(times_s: Floats, window_s: float) -> Floats:
    """Return how many times lie in each full window from the first one on."""
    since = times_s - times_s[0]
    windows = int(since[-1] // window_s)
    return np.bincount((since[since < windows * window_s] // window_s).astype(int), minlength=windows).astype(float)


def joined(counts: Floats, k: int) -> Floats:
    """Return the counts of k neighbouring windows together; nan where one of them is."""
    whole = len(counts) // k * k
    return np.asarray(counts[:whole].reshape(-1, k).sum(axis=1))


def dispersion(counts: Floats, window_s: float, level_s: float = math.inf) -> Dispersion | None:
    """Return the dispersion of counts (nan where nothing is known) about their mean: of all, or of each stretch of `level_s`.

    sum (count - mean)^2 / sum mean, with one degree of freedom less for each mean.  The interval resamples blocks of n^(1/3)
    neighbouring windows: it is too narrow where bursts last longer than that.  None below two windows.
    """
    known = np.isfinite(counts)
    c = counts[known]
    stretch = np.minimum(np.flatnonzero(known) * (window_s / level_s), len(counts)).astype(np.int64)
    n = np.bincount(stretch)
    if len(c) - (n > 0).sum() < 1 or not c.mean() > 0:
        return None
    m = (np.bincount(stretch, c) / np.maximum(n, 1))[stretch]
    squares = (c - m) ** 2 * (len(c) / (len(c) - (n > 0).sum()))
    low, high = _block_bootstrap(squares, m)
    central = float(np.mean((c - m) ** 3))
    index = float(squares.sum() / m.sum())
    third = central - 3 * index * float(m.mean()) + 2 * float(m.mean())
    stretch_s = min(level_s, window_s * len(counts))
    return Dispersion(window_s=window_s, stretch_s=stretch_s, index=index, low=low, high=high, windows=len(c), third=third)


def excess(bursts: Sequence[Bursts], rate_per_s: float, window_s: float) -> float:
    """Return the index of dispersion of counts above that of a Poisson process, for bursts that multiply.

    The level's covariance is C(u) = prod_k (1 + v_k exp(-s_k u)) - 1, a sum of exponentials c exp(-s u) over the subsets of bursts, and
    Var N(t) = rate t + 2 rate^2 int_0^t (t - u) C(u) du, so each adds 2 rate c / s (1 - (1 - exp(-s t)) / (s t)).
    Source: D. R. Cox and P. A. W. Lewis (1966), The Statistical Analysis of Series of Events (doubly stochastic Poisson processes).
    """
    total = 0.0
    for size in range(1, len(bursts) + 1):
        for chosen in itertools.combinations(bursts, size):
            decay = sum(b.decay_per_s for b in chosen)
            total += 2 * rate_per_s * math.prod(b.variance for b in chosen) / decay * _grown(decay * window_s)
    return total


def expected_index(bursts: Sequence[Bursts], rate_per_s: float, seen: Dispersion) -> float:
    """Return the index of dispersion that these bursts show on average when the mean is taken from n windows, not known.

    E sum (c - mean)^2 / (n - 1) = (Var c - Var(sum c) / n^2) n / (n - 1).
    """
    n = seen.stretch_s / seen.window_s
    own, whole = excess(bursts, rate_per_s, seen.window_s), excess(bursts, rate_per_s, seen.stretch_s)
    return 1 + (own - whole / n) * n / (n - 1)


def fit_bursts(rate_per_s: float, seen: Sequence[Dispersion]) -> tuple[Bursts, ...]:
    """Return one or two kinds of bursts with these indices of dispersion; none where no window is burstier than a Poisson process.

    Weighted least squares in the logarithm of the excess.  A second kind is taken where one misses some window's interval and two miss
    fewer.  How high the bursts of the stronger kind are, at the same variance, follows from the third cumulant of counts.
    """
    usable = [d for d in seen if d.index > 1 and d.windows >= LEAST_WINDOWS]
    if not any(d.low > 1 for d in usable):
        return ()
    one = _fit(rate_per_s, usable, 1)
    if len(usable) < 3 or _missed(one, rate_per_s, usable) == 0:
        return one
    two = _fit(rate_per_s, usable, 2)
    return two if _missed(two, rate_per_s, usable) < _missed(one, rate_per_s, usable) else one


def arrivals_like(rate_per_s: float, gap_scv: float | None, gaps: int, seen: Sequence[Dispersion]) -> str:
    """Return the law of arrivals that is as bursty as what was seen: poisson or constant, gamma where gaps tell all, else mmpp."""
    calm = gap_scv is None or abs(gap_scv - 1) < 4 * math.sqrt(8 / max(gaps, 1))  # var of the SCV of n exponential gaps: 8 / n
    by_gaps = "poisson" if gap_scv is None or calm else "constant" if gap_scv < 1e-6 else f"gamma:{math.sqrt(gap_scv):.4g}"
    explained = 1.0 if gap_scv is None else max(1.0, gap_scv)
    if all(d.low <= explained for d in seen if d.windows >= LEAST_WINDOWS):
        return by_gaps
    return "*".join(show_bursts(b) for b in fit_bursts(rate_per_s, seen)) or by_gaps


def _grown(x: float) -> float:
    """Return 1 - (1 - exp(-x)) / x."""
    return x / 2 - x * x / 6 if x < 1e-4 else 1 + math.expm1(-x) / x


def _fit(rate_per_s: float, seen: Sequence[Dispersion], kinds: int) -> tuple[Bursts, ...]:
    from scipy.optimize import least_squares

    windows, n = np.array([d.window_s for d in seen]), np.array([d.stretch_s / d.window_s for d in seen])
    weight = np.sqrt([d.windows for d in seen])
    target = np.log([d.index - 1 for d in seen])

    def misses(p: Floats) -> Floats:
        pairs = np.exp(p).reshape(kinds, 2)
        own, whole = (np.array([_excess_of(pairs, rate_per_s, t) for t in times]) for times in (windows, windows * n))
        shown = np.maximum((own - whole / n) * n / (n - 1), 1e-9 * own)
        return np.asarray(weight * (np.log(shown) - target))

    slow, fast = math.log(0.05 / windows.max()), math.log(20 / windows.min())
    starts = np.log(np.geomspace(0.5 / windows.max(), 1 / windows.min(), kinds + 2)[1:-1])
    first = np.column_stack([np.full(kinds, math.log(0.1)), starts]).ravel()
    bounds = (np.tile([math.log(1e-6), slow], kinds), np.tile([math.log(50.0), fast], kinds))
    pairs = np.exp(least_squares(misses, first, bounds=bounds).x).reshape(kinds, 2)
    strongest = int(np.argmax([_excess_of(pair[None, :], rate_per_s, float(np.median(windows))) for pair in pairs]))
    return tuple(
        _bursts(v, decay, _skew(rate_per_s, v, decay, seen) if k == strongest else 0.0) for k, (v, decay) in enumerate(pairs.tolist())
    )


def _excess_of(pairs: Floats, rate_per_s: float, window_s: float) -> float:
    """Return `excess` of (variance, decay) pairs."""
    total = 0.0
    for size in range(1, len(pairs) + 1):
        for chosen in itertools.combinations(pairs, size):
            decay = sum(float(pair[1]) for pair in chosen)
            total += 2 * rate_per_s * math.prod(float(pair[0]) for pair in chosen) / decay * _grown(decay * window_s)
    return total


def _skew(rate_per_s: float, variance: float, decay_per_s: float, seen: Sequence[Dispersion]) -> float:
    """Return the sum of the two levels about the mean that gives the third cumulant seen in the window nearest to 1 / decay.

    For two levels x about the mean, x^2 = variance + skew x, so that E[x(0) x(u) x(u+w)] = skew variance exp(-decay (u+w)) and the third
    cumulant of counts, its factorial part, is 6 rate^3 skew variance int_0^t (t - s) s exp(-decay s) ds.
    """
    best = min(seen, key=lambda d: abs(math.log(d.window_s * decay_per_s)))
    t, x = best.window_s, best.window_s * decay_per_s
    grown = t * (1 - math.exp(-x) * (1 + x)) / decay_per_s**2 - (2 - math.exp(-x) * (x * x + 2 * x + 2)) / decay_per_s**3
    return best.third / (6 * rate_per_s**3 * variance * max(grown, 1e-12 * t**3))


def _bursts(variance: float, decay_per_s: float, skew: float) -> Bursts:
    """Return bursts whose two levels about the mean have this variance and this sum, as far as no rate is negative."""
    root = math.sqrt(skew**2 + 4 * variance)
    low = max((skew - root) / 2, -1.0)
    share = float(min(max(low**2 / (low**2 + variance), _SHARES[0]), _SHARES[1], 1 / (1 + variance)))
    high = math.sqrt(variance * (1 - share) / share)
    return Bursts(peak=1 + high, share=share, burst_s=1 / (decay_per_s * (1 - share)))


def _missed(bursts: Sequence[Bursts], rate_per_s: float, seen: Sequence[Dispersion]) -> int:
    return sum(not d.low <= expected_index(bursts, rate_per_s, d) <= d.high for d in seen)


def _block_bootstrap(squares: Floats, expected: Floats) -> tuple[float, float]:
    """Return the interval of sum(squares) / sum(expected); draws of blocks in which nothing was expected say nothing, and are left out."""
    length = max(1, round(len(squares) ** (1 / 3)))
    blocks = len(squares) // length
    tops = squares[: blocks * length].reshape(blocks, length).sum(axis=1)
    bottoms = expected[: blocks * length].reshape(blocks, length).sum(axis=1)
    rng = np.random.default_rng(0)
    sums = [(tops[at].sum(), bottoms[at].sum()) for at in (rng.integers(0, blocks, blocks) for _ in range(_RESAMPLES))]
    drawn = [top / bottom for top, bottom in sums if bottom > 0] or [squares.sum() / expected.sum()]
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
