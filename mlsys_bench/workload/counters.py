"""Counters and histograms as a metrics server keeps them: increments over resets, gaps and replicas that come and go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mlsys_bench.types import LengthSummary
from mlsys_bench.workload.course import Counts
from mlsys_bench.workload.schedule import Floats, Ints

GAP_SCRAPES = 5  # so many missed scrapes in a row leave a gap; fewer are bridged evenly
_POINTS = 200  # that stand for the lengths of one bucket
_ALWAYS = 0.9  # of its server's samples: a bucket with fewer was not there all the time
_BORN_WITH = 3.0  # a counter that appears with more than so many times its busiest step was running before


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Samples of one time series, in order of time."""

    name: str
    labels: dict[str, str]
    times_s: Floats
    values: Floats


def increments(series: Series, range_start_s: float) -> Floats:
    """Return what a counter counted up to each of its samples, since the one before.

    A value below the one before is a restart from zero.  A counter that appears later than the first scrapes of the range began at zero
    too, unless it appears with more than it ever counted in a few steps: then it ran before, unseen, and its start counts nothing.
    """
    values = series.values
    steps = np.diff(values)
    found = np.concatenate([[0.0], np.where(steps < 0, values[1:], steps)])
    is_new = len(values) > 1 and series.times_s[0] > range_start_s + 2 * _median_step_s(series.times_s)
    if is_new and values[0] <= max(10.0, _BORN_WITH * float(found[1:].max())):
        found[0] = values[0]
    return np.asarray(found)


def scrape_s(series: Iterable[Series]) -> float | None:
    """Return the time between scrapes, to the millisecond: the slowest series' median; None where no series has two samples."""
    found = [_median_step_s(s.times_s) for s in series if len(s.times_s) > 1]
    return max(round(max(found), 3), 0.001) if found else None


def counted(series: Sequence[Series], start_s: float, end_s: float, step_s: float) -> tuple[Counts, float]:
    """Return the increments of all series on one grid, and their total, which counts the gaps as well.

    Each series' samples are put into steps by their distance from its first, so that jitter of a scrape moves nothing; scrapes of
    replicas at different phases shift their counts by less than a step.
    """
    grid = np.zeros(max(1, math.ceil((end_s - start_s) / step_s) + 1))
    total = 0.0
    for one in series:
        found = increments(one, start_s)
        first = int((one.times_s[0] - start_s) // step_s)
        at = np.clip(first + np.rint((one.times_s - one.times_s[0]) / step_s).astype(np.int64), 0, len(grid) - 1)
        total += float(found.sum())
        _add(grid, at, found)
    return Counts(start_s=start_s, step_s=step_s, counts=_trimmed(grid, series, start_s, step_s)), total


def merged(parts: Sequence[Series]) -> list[Series]:
    """Return series joined from pieces of time, by name and labels; a sample that two pieces hold counts once."""
    by_key: dict[tuple[object, ...], list[Series]] = {}
    for part in parts:
        by_key.setdefault((part.name, *sorted(part.labels.items())), []).append(part)
    return [_joined(pieces) for pieces in by_key.values()]


def histogram(buckets: Sequence[Series], sums: Sequence[Series], counts: Sequence[Series], start_s: float) -> LengthSummary | None:
    """Return lengths from a histogram's increments: mean exact, the rest from its buckets.  None where nothing was counted."""
    n = sum(float(increments(one, start_s).sum()) for one in counts)
    total = sum(float(increments(one, start_s).sum()) for one in sums)
    edges, cumulative = _together(_by_server(buckets, start_s))
    if not n > 0 or not total > 0 or not len(edges):
        return None
    return _summary(edges, cumulative, total / n)


def _by_server(buckets: Iterable[Series], start_s: float) -> list[tuple[Floats, Floats]]:
    """Return each server's edges and how many of its lengths lie up to them.

    An edge that was there for a part of the time only, as where another version with other buckets took over, tells of that part: left out.
    """
    samples: dict[tuple[tuple[str, str], ...], dict[float, int]] = {}
    grown: dict[tuple[tuple[str, str], ...], dict[float, float]] = {}
    for one in buckets:
        server, edge = tuple(sorted((k, v) for k, v in one.labels.items() if k != "le")), float(one.labels["le"])
        n, more = samples.setdefault(server, {}), grown.setdefault(server, {})
        n[edge] = n.get(edge, 0) + len(one.values)  # one edge may be spelled twice: 1 by old servers of metrics, 1.0 by new ones
        more[edge] = more.get(edge, 0.0) + float(increments(one, start_s).sum())
    kept = {s: sorted(e for e, n in edges.items() if n >= _ALWAYS * max(edges.values())) for s, edges in samples.items()}
    return [(np.array(edges), np.maximum.accumulate([grown[server][e] for e in edges])) for server, edges in kept.items()]


def _together(servers: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Return the edges up to which every server's count is known, and the counts of all.

    Servers of one model may have other buckets: vLLM's end at the longest context.  Of a server without an edge the count up to there is
    known where none of its lengths lies in the bucket around it.
    """
    edges = np.unique(np.concatenate([own for own, _ in servers])) if servers else np.zeros(0)
    known, total = np.full(len(edges), True), np.zeros(len(edges))
    for own, up_to in servers:
        below = np.append(0.0, up_to)[np.searchsorted(own, edges, side="right")]
        above = up_to[np.minimum(np.searchsorted(own, edges, side="left"), len(own) - 1)]
        known &= below == above
        total += below
    return edges[known], total[known]


def _median_step_s(times_s: Floats) -> float:
    return float(np.median(np.diff(times_s)))


def _add(grid: Floats, at: Ints, found: Floats) -> None:
    """Add increments to the steps in which they end; where scrapes are missing, spread them, or leave a gap."""
    spans = np.diff(at, prepend=at[0] - 1)
    single = spans <= 1
    np.add.at(grid, at[single], found[single])
    for i in np.flatnonzero(~single):
        inside = slice(int(at[i] - spans[i] + 1), int(at[i]) + 1)
        grid[inside] += found[i] / spans[i] if spans[i] <= GAP_SCRAPES else np.nan


def _trimmed(grid: Floats, series: Sequence[Series], start_s: float, step_s: float) -> Floats:
    """Return the grid without the steps before the first sample of all and after the last: nobody counted then."""
    first = max(0, min(int((s.times_s[0] - start_s) // step_s) for s in series) + 1)  # a sample may come a little before the range
    last = max(-1, *(int((s.times_s[-1] - start_s) // step_s) for s in series))
    known = grid.copy()
    known[:first], known[last + 1 :] = np.nan, np.nan
    for step in _without_anybody(series, start_s, step_s, len(grid)):
        known[step] = np.nan
    return known


def _without_anybody(series: Sequence[Series], start_s: float, step_s: float, steps: int) -> Ints:
    """Return the steps that no series covers: every server was away, or the metrics server itself."""
    cover = np.zeros(steps + 1)
    for one in series:
        cover[min(steps, max(0, int((one.times_s[0] - start_s) // step_s)))] += 1
        cover[min(steps, max(0, int((one.times_s[-1] - start_s) // step_s) + 1))] -= 1
    return np.flatnonzero(np.cumsum(cover)[:steps] <= 0)


def _joined(pieces: list[Series]) -> Series:
    times_s, first = np.unique(np.concatenate([p.times_s for p in pieces]), return_index=True)
    values = np.concatenate([p.values for p in pieces])[first]
    return Series(name=pieces[0].name, labels=pieces[0].labels, times_s=times_s, values=values)


# ---------------------------------------------------------------- histograms


def _summary(edges: Floats, cumulative: Floats, mean: float) -> LengthSummary:
    """Return lengths whose buckets hold these cumulative counts and whose mean is known.

    Between the edges the distribution function is a monotone cubic in the logarithm of the length; the lengths of every bucket are then
    moved within it, all by the same odds, until the mean is the one known.
    """
    last = max(float(edges[np.isfinite(edges)].max(initial=1.0)), mean)
    upper = np.where(np.isfinite(edges), edges, 2 * last)
    lower = np.concatenate([[0.0], upper[:-1]])
    weight = np.diff(np.maximum.accumulate(cumulative), prepend=0.0)
    used = weight > 0
    a, b, p = lower[used], upper[used], weight[used] / weight[used].sum()
    points = _spread_within(np.append(lower[0], upper), np.append(0.0, np.cumsum(weight)) / weight.sum())[used]
    points = _moved(points, a, b, p, mean)
    low, high = _cv_bounds(a, b, p, mean)
    is_open = bool(used[-1]) and not math.isfinite(edges[-1])
    cv = min(max(math.sqrt(max(float(p @ (points**2).mean(axis=1)) / mean**2 - 1, 0.0)), low), high)
    p50, p90, p99 = (_quantile(points, p, q) for q in (0.5, 0.9, 0.99))
    top, bounds = (None, None) if is_open else (int(b[-1]), (low, high))
    return LengthSummary(mean=mean, cv=cv, p50=p50, p90=p90, p99=p99, max=top, cv_bounds=bounds)


def _spread_within(edges: Floats, shares: Floats) -> Floats:
    """Return, for each bucket, as shares of its width, equally likely points: [bucket, point]."""
    from scipy.interpolate import PchipInterpolator

    at = np.log(np.maximum(edges, edges[1] / 4))
    fine = np.linspace(at[:-1], at[1:], 101, axis=1)
    below = PchipInterpolator(at, shares)(fine)
    want = np.linspace(below[:, 0], below[:, -1], _POINTS + 1, axis=1)
    want = (want[:, 1:] + want[:, :-1]) / 2
    found = [np.exp(np.interp(w, y, x)) if y[-1] > y[0] else np.full(_POINTS, np.nan) for w, y, x in zip(want, below, fine, strict=True)]
    return np.asarray((np.array(found) - edges[:-1, None]) / np.diff(edges)[:, None])


def _moved(shares: Floats, a: Floats, b: Floats, p: Floats, mean: float) -> Floats:
    """Return lengths at these shares of their buckets, the odds of all shares multiplied by what gives the mean."""
    odds = np.clip(shares, 1e-6, 1 - 1e-6) / (1 - np.clip(shares, 1e-6, 1 - 1e-6))
    low, high, points = -20.0, 20.0, shares
    for _ in range(60):
        factor = math.exp((low + high) / 2)
        points = a[:, None] + (b - a)[:, None] * (factor * odds / (1 + factor * odds))
        low, high = ((low + high) / 2, high) if float(p @ points.mean(axis=1)) < mean else (low, (low + high) / 2)
    return np.asarray(points)


def _quantile(points: Floats, p: Floats, q: float) -> float:
    values, weights = points.ravel(), np.repeat(p / points.shape[1], points.shape[1])
    reached = np.cumsum(weights) - weights / 2
    return float(np.interp(q, reached, values))


def _cv_bounds(a: Floats, b: Floats, p: Floats, mean: float) -> tuple[float, float]:
    """Return the least and the greatest cv of any law with these buckets (a, b], shares p and mean.

    Least: all of a bucket at one point, which is the same for all as far as the buckets allow (E[X^2] is convex in the points).
    Greatest: all at the ends of the buckets, the ends of those that are farthest out filled first (E[X^2] is linear in the shares).
    """
    low, high = float(a.min()), float(b.max())
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(p @ np.clip(middle, a, b)) < mean else (low, middle)
    points = np.clip((low + high) / 2, a, b)
    least = float(p @ points**2)
    spare, greatest = mean - float(p @ a), float(p @ a**2)
    for i in np.argsort(-(a + b)):
        moved = min(max(spare, 0.0), float(p[i] * (b[i] - a[i])))
        greatest += moved * float(a[i] + b[i])
        spare -= moved
    lowest = math.sqrt(max(least / mean**2 - 1, 0.0))
    return lowest, max(lowest, math.sqrt(max(greatest / mean**2 - 1, 0.0)))
