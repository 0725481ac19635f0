"""What fewer launches than a decision takes allow to say: at most `suspect`.

Two processes of one program differ by more than the samples inside them, so one launch can neither pass nor fail a build.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mlsys_bench import stats
from mlsys_bench.gate import decide as arithmetic
from mlsys_bench.summary import launches
from mlsys_bench.summary.launches import Statistic
from mlsys_bench.types import Launch
from mlsys_bench.verdicts import Word

# what two launches of one program differ by once in a hundred, at the launch sd of a noisy machine, 2.6 %: all that can be said of samples
# too few for an interval of their own
FAR = math.exp(2.326 * math.sqrt(2) * 0.026)


def said(
    base: Sequence[Launch], cand: Sequence[Launch], better: str, statistic: Statistic,
    numbers: tuple[Sequence[float], Sequence[float]], tolerance: float,
) -> tuple[float, tuple[float, float] | None, Word, str]:  # fmt: skip
    """Return the ratio, its spread within launches, and the verdict with its reason."""
    ratio = centre(numbers[1]) / centre(numbers[0])
    interval = _within_launches(base, cand, statistic, better)
    worse, bound = (ratio, interval and interval[0]) if better == "lower" else (1 / ratio, interval and 1 / interval[1])
    suspicious = worse > 1 + tolerance and (bound > 1 if bound is not None else worse > FAR * (1 + tolerance))
    number = min(map(len, numbers))
    start = "single launch" if number == 1 else f"{number} launches"
    spread = "; the interval is the spread within launches" if interval else ""
    reason = f"{start}: needs at least {arithmetic.ENOUGH_LAUNCHES} launch pairs{spread}"
    return ratio, interval, "suspect" if suspicious else "inconclusive", reason


def centre(numbers: Iterable[float]) -> float:
    """Return the geometric mean: the ratio of two of them is the mean log difference, and swapping sides inverts it."""
    return math.exp(float(np.mean([math.log(v) for v in numbers])))


def figure(measured: Sequence[Launch], numbers: Sequence[float], statistic: str) -> float:
    """Return the one figure of a side that a person reads: of shares the share itself, without what keeps a launch's number above zero."""
    if statistic == "share":
        return float(np.mean(np.concatenate([np.asarray(launches.samples(launch)) for launch in measured])))
    return centre(numbers)


def _within_launches(base: Sequence[Launch], cand: Sequence[Launch], statistic: Statistic, better: str) -> tuple[float, float] | None:
    """Return the interval of the ratio from that of each side over its samples.  It knows nothing of how launches differ."""
    pick = launches.undisturbed if statistic == "median" else launches.samples
    pools = [np.concatenate([np.asarray(pick(launch)) for launch in side]) for side in (base, cand)]
    level = math.sqrt(stats.LEVEL)
    if statistic == "share":
        ends = [stats.wilson(float(pool.sum()), len(pool), level=level) for pool in pools]
    else:
        p = 0.5 if statistic == "median" else 0.1 if better == "lower" else 0.9
        ends = [stats.quantile_interval(pool, p, level=level) for pool in pools]
    if ends[0] is None or ends[1] is None or ends[0][0] <= 0:
        return None
    return ends[1][0] / ends[0][1], ends[1][1] / ends[0][0]
