"""Mean and percentiles with 90 % intervals: of independent samples, of series whose neighbours resemble each other, of pooled groups.

Requests under load wait for the same queue, so their latencies are a series, and order statistics alone would claim too much: for waits
of an M/M/1 station at 80 % load they cover the true median in one run of four.  Here the variance of batch means says how many
independent samples a series is worth, for the mean and for each percentile (there of the share of samples at or below it), and the
interval is that of so many.

Sources: Fishman (1978), Grouping observations in digital simulation, Management Science 24 (batches grow until their means are no longer
correlated); Heidelberger and Lewis (1984), Quantile estimation in dependent sequences, Operations Research 32.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench import stats
from mlsys_bench.types import LatencySummary

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Interval = tuple[float, float]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
P999 = 0.999
Z_90 = 1.6449  # of a two-sided normal interval
BATCHES = (320, 160, 80, 40, 20, 10)  # the first whose means look independent is taken
LEAST_IN_BATCH = 2
LEAST_IN_SERIES = 40  # fewer are taken as independent
_SUSPECT = 0.84  # standard errors of a correlation beyond which neighbours count as dependent: 20 %, one-sided
_STEEPEST = 0.9
_ALIKE = 1e-6  # of the mean: what is left of constant values is rounding, whose order says nothing
_BLOCKS = 200  # of neighbouring requests, resampled together
_RESAMPLES = 200
_BINS = 4096  # of equal count, only for the bootstrap: p99.9 is still resolved to a quarter of its tail


def summary(values: Floats) -> LatencySummary:
    """Return mean and percentiles of independent values with their intervals, and say which the sample is too small for."""
    intervals = {name: stats.quantile_interval(values, p) for name, p in {**QUANTILES, "p999": P999}.items()}
    intervals["mean"] = stats.mean_interval(values)
    return _latency_summary(np.sort(values), intervals)


def series_summary(values: Floats) -> LatencySummary:
    """Return the same of values in the order of their time, which may resemble their neighbours.

    A percentile whose sample is large enough, but worth too few independent values for an interval, stands without one.
    """
    if len(values) < LEAST_IN_SERIES or float(values.std()) <= _ALIKE * abs(float(values.mean())):
        return summary(values)
    ordered = np.sort(values)
    names = {**QUANTILES, "p999": P999}
    figures = stats.quantiles(ordered, list(names.values()))
    bare = [name for name, p in names.items() if len(values) >= stats.enough_for_quantile(p)]
    intervals: dict[str, Interval | None] = {}
    worth, batches = effective(values)
    for (name, p), figure in zip(names.items(), figures, strict=True):
        intervals[name] = _ranked(ordered, p, _worth_at(values, figure, p, worth))
    middle, half = float(values.mean()), _student(batches) * Z_90 * float(values.std(ddof=1)) / worth**0.5
    intervals["mean"] = (middle - half, middle + half)
    return _latency_summary(ordered, intervals, bare, worth)


def _worth_at(values: Floats, figure: float, p: float, worth: float) -> float:
    """Return how many independent values a series is worth where its p-quantile lies, less what few batches cost; `worth`: of its mean."""
    own, of = effective((values <= figure).astype(float))
    if p > 0.5:  # few values lie beyond a tail: they alone would often seem independent by chance
        own = min(own, (own * worth) ** 0.5)
    return own / _student(of) ** 2


def worth_at(values: Floats, figures: Sequence[float], p: float) -> list[int]:
    """Return how many independent values a series is worth at each of some figures near its p-quantile, as `series_summary` counts them."""
    if len(values) < LEAST_IN_SERIES or float(values.std()) <= _ALIKE * abs(float(values.mean())):
        return [len(values) for _ in figures]
    worth, _ = effective(values)
    return [int(_worth_at(values, figure, p, worth)) for figure in figures]


def effective(values: Floats) -> tuple[float, int]:
    """Return how many independent samples a series is worth, at most its own number, and of how many batches that was learnt."""
    n, variance = len(values), float(values.var())
    if variance == 0:
        return float(n), BATCHES[0]
    means, r = values, 0.0
    for batches in BATCHES:
        if n // batches >= LEAST_IN_BATCH:
            means = batch_means(values, batches)
            r = neighbours(means)
            if r < _SUSPECT / batches**0.5:
                r = 0.0
                break
    spread = float(means.var(ddof=1)) * (n // len(means)) / variance  # 1 for independent values
    r = min(r, _STEEPEST)
    return n / max(1.0, spread * (1 + r) / (1 - r)), len(means)


def share_interval(kept: Floats, latency_s: Floats) -> Interval | None:
    """Return Wilson's interval of the share of requests (0 or 1, in the order of their time) that kept a limit; None without any.

    Of as many independent ones as they are worth: requests that share a queue break a limit together.  `latency_s` of the same requests
    tells how much they resemble each other where few break it, as in `series_summary`.
    """
    n, good = len(kept), float(kept.sum())
    if n < LEAST_IN_SERIES or good in (0, n):
        return stats.wilson(good, n)
    own, of = effective(kept)
    if len(latency_s) >= LEAST_IN_SERIES:
        own = min(own, (own * n * effective(latency_s)[0] / len(latency_s)) ** 0.5)
    worth = max(1, round(own / _student(of) ** 2))
    return stats.wilson(worth * good / n, worth)


def batch_means(values: Floats, batches: int) -> Floats:
    """Return the means of so many batches of neighbours; what does not fill a batch is left out at the start."""
    size = len(values) // batches
    found: Floats = values[len(values) - size * batches :].reshape(batches, size).mean(axis=1)
    return found


def neighbours(values: Floats) -> float:
    """Return the correlation of each value with the next."""
    apart = values - values.mean()
    total = float(apart @ apart)
    return float(apart[:-1] @ apart[1:]) / total if total else 0.0


def _student(batches: int) -> float:
    """Return how much wider Student's interval is than the normal one when the variance comes of so many batches."""
    from scipy.special import stdtrit

    return float(stdtrit(batches - 1, (1 + stats.LEVEL) / 2)) / Z_90


def _ranked(ordered: Floats, p: float, worth: float) -> Interval | None:
    """Return the order statistics that enclose a quantile when the sample is worth so many independent ones."""
    n, m = len(ordered), max(1, min(len(ordered), int(worth)))
    ranks = stats.quantile_ranks(m, p)
    if ranks is None:
        return None
    low, high = ranks[0] * n // m, -(-(ranks[1] + 1) * n // m) - 1
    return float(ordered[low]), float(ordered[high])


def pooled_summary(groups: Sequence[Floats]) -> LatencySummary:
    """Return the same of values that depend on each other within a group, here the gaps of one request.

    Intervals come from a bootstrap over blocks of neighbouring requests, each request its own block up to 200 of them.
    """
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    return pooled(np.concatenate([np.zeros(0), *groups]), sizes)


def pooled(values: Floats, sizes: Ints, ordered: Floats | None = None) -> LatencySummary:
    """Return `pooled_summary` of values that lie flat behind each other; `sizes` has the length of each group, `ordered` them sorted."""
    sizes = sizes[sizes > 0]
    ordered = np.sort(values) if ordered is None else ordered
    if len(sizes) < stats.enough_for_quantile(0.5):
        return _latency_summary(ordered, {})
    enough = {name: p for name, p in {**QUANTILES, "p999": P999}.items() if len(values) >= stats.enough_for_quantile(p)}
    return _latency_summary(ordered, _block_bootstrap(values, ordered, sizes, enough))


def _latency_summary(
    ordered: Floats, intervals: Mapping[str, Interval | None], bare: Collection[str] = (), effective_count: float | None = None
) -> LatencySummary:
    known = {name: interval for name, interval in intervals.items() if interval is not None}
    enough = len(ordered) >= 2
    shown = {name: p for name, p in {**QUANTILES, "p999": P999}.items() if enough and (name == "p50" or name in known or name in bare)}
    figures = dict(zip(shown, stats.quantiles_of_sorted(ordered, list(shown.values())) if enough else (), strict=True))
    if enough:
        figures["mean"] = float(ordered.mean())
    return LatencySummary(
        count=len(ordered),
        **{name: figures.get(name) for name in ("mean", *QUANTILES, "p999")},
        intervals=known,
        too_few=tuple(name for name in ("mean", *QUANTILES) if name not in figures),
        effective_count=effective_count,
    )


def _blocks(values: Floats, sizes: Ints) -> int:
    """Return the number of blocks of neighbouring groups whose means look independent, 20 at least where there are so many groups."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    means = np.add.reduceat(values, starts) / sizes
    blocks = min(len(sizes), _BLOCKS)
    while blocks >= 2 * BATCHES[-1] and neighbours(batch_means(means, blocks)) >= _SUSPECT / blocks**0.5:
        blocks //= 2
    return blocks


def _block_bootstrap(values: Floats, ordered: Floats, sizes: Ints, quantiles: Mapping[str, float]) -> dict[str, Interval | None]:
    """Return bootstrap intervals of mean and quantiles, resampling blocks of groups.  values: the groups, one after another."""
    drawn, _ = resampled(values, sizes, quantiles, ordered=ordered)
    tail = (1 - stats.LEVEL) / 2
    return {name: (float(low), float(high)) for name, (low, high) in ((n, np.quantile(v, [tail, 1 - tail])) for n, v in drawn.items())}


def resampled(
    values: Floats,
    sizes: Ints,
    quantiles: Mapping[str, float],
    *,
    ordered: Floats | None = None,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> tuple[dict[str, Floats], int]:
    """Return mean and quantiles of resampled blocks of neighbouring groups, and the number of blocks.  `sizes`: values of each group."""
    ordered = np.sort(values) if ordered is None else ordered
    blocks = _blocks(values, sizes)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    cuts = ends[np.arange(blocks + 1) * len(sizes) // blocks]  # first value of each block
    bins = min(len(values), _BINS)
    top = ordered[(np.arange(1, bins + 1) * len(values) // bins) - 1]  # largest value of each bin
    parts = [values[a:b] for a, b in itertools.pairwise(cuts)]
    counts = np.array([np.diff(np.searchsorted(np.sort(part), top, side="right"), prepend=0.0) for part in parts])  # [blocks, bins]
    drawn = np.random.default_rng(seed).multinomial(blocks, np.full(blocks, 1 / blocks), size=resamples)  # [R, blocks]
    below = np.cumsum(drawn.astype(float) @ counts, axis=1)  # [R, bins]
    found = {name: top[np.argmax(below >= p * below[:, -1:], axis=1)] for name, p in quantiles.items()}
    found["mean"] = (drawn @ np.array([part.sum() for part in parts])) / below[:, -1]
    return found, blocks
