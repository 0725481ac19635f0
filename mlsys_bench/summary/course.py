"""A run over time, and how its latencies are spread: what pictures are drawn from without every request at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench import stats
from mlsys_bench.summary.columns import OUTCOMES, Columns
from mlsys_bench.timelines import Curve, Timeline

Floats = npt.NDArray[np.float64]

MOST_STEPS = 300
LEAST_STEPS = 20
STEPS_S = tuple(base * 10.0**e for e in range(-2, 5) for base in (1, 2, 5))
SHARES = (0.0, 0.001, 0.005, *(i / 50 for i in range(1, 48)), 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.999, 1.0)
_BINS = 48
_MUCH = 5.0  # times
_MOST = 1000.0  # times, between the ends of a histogram
_LEAST_S = 1e-7
_DECIMALS = 9  # a nanosecond is finer than any clock here


def timeline(run: Columns, window: tuple[float, float]) -> Timeline | None:
    """Return how a run went, in at most 300 steps of a second where that fits; None without requests."""
    if not len(run):
        return None
    end_s = float(np.max(run.end_s))
    step_s = step_of(end_s)
    steps = int(end_s // step_s) + 1
    ok, ends = run.ok, run.end_s
    ttft, e2e = (_by_step(run.scheduled_s[ok], values[ok], step_s, steps) for values in (run.ttft_s, run.e2e_s))
    late = _by_step(run.scheduled_s, run.lateness_s, step_s, steps)
    failed = {name: _counts(ends[run.outcome == i], step_s, steps) for i, name in enumerate(OUTCOMES) if name != "ok"}
    return Timeline(
        step_s=step_s,
        window_s=window,
        offered=_counts(run.scheduled_s, step_s, steps),
        completed=_counts(ends[ok], step_s, steps),
        failed={name: counts for name, counts in failed.items() if any(counts)},
        in_flight=_rounded(in_flight(run.scheduled_s, ends, step_s * np.arange(steps + 1, dtype=np.float64))),
        ttft_p50_s=_quantiles(ttft, 0.5),
        ttft_p95_s=_quantiles(ttft, 0.95),
        e2e_p50_s=_quantiles(e2e, 0.5),
        e2e_p95_s=_quantiles(e2e, 0.95),
        output_tokens_per_s=_rounded(
            np.bincount(_steps(run.token_s, step_s, steps), None if run.one_by_one else run.tokens, minlength=steps) / step_s
        ),
        lateness_max_s=_quantiles(late, 1.0),
    )


def step_of(length_s: float) -> float:
    """Return the step of a timeline: a second, longer where that would be too many steps, shorter where it would be too few."""
    least = next((s for s in STEPS_S if length_s / s < MOST_STEPS), STEPS_S[-1])
    return max(least, next((s for s in reversed(STEPS_S) if s <= 1 and length_s / s >= LEAST_STEPS), STEPS_S[0]))


def resampled(times_s: Sequence[float], values: Sequence[float], course: Timeline) -> tuple[float | None, ...]:
    """Return samples taken at some times of the run as a column of its timeline: the mean of each step, None where none was taken."""
    steps = len(course.offered)
    times, seen = np.asarray(times_s, dtype=np.float64), np.asarray(values, dtype=np.float64)
    inside = (times >= 0) & (times < steps * course.step_s) & np.isfinite(seen)
    at = _steps(times[inside], course.step_s, steps)
    counts, sums = np.bincount(at, minlength=steps), np.bincount(at, seen[inside], minlength=steps)
    return tuple(float(total / n) if n else None for total, n in zip(sums, counts, strict=True))


def in_flight(starts_s: Floats, ends_s: Floats, edges_s: Floats) -> Floats:
    """Return the mean number of open requests between neighbouring edges: the area under their number / the length."""
    area = _area(starts_s, edges_s) - _area(ends_s, edges_s)
    found: Floats = np.maximum(np.diff(area) / np.diff(edges_s), 0.0)
    return found


def _area(times_s: Floats, edges_s: Floats) -> Floats:
    """Return the sum of (edge - time) over the times before each edge."""
    ordered = np.sort(times_s)
    before = np.searchsorted(ordered, edges_s)
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    found: Floats = edges_s * before - sums[before]
    return found


def curve(values: Floats) -> Curve | None:
    """Return how values are spread, or None where there are too few to draw."""
    if len(values) < 2:
        return None
    ordered = np.sort(values)
    low, high = (max(q, _LEAST_S) for q in stats.quantiles_of_sorted(ordered, (0.005, 0.995)))
    edges = _edges(max(0.95 * low, high / _MOST), 1.05 * high)
    below = np.searchsorted(ordered, edges)
    below[0], below[-1] = 0, len(ordered)  # what lies beyond is counted in the outermost
    counts = np.diff(below)
    return Curve(
        shares=SHARES,
        quantiles_s=_rounded(stats.quantiles_of_sorted(ordered, SHARES)),
        edges_s=_rounded(edges),
        counts=tuple(int(n) for n in counts),
    )


def _edges(low: float, high: float) -> Floats:
    """Return the edges of a histogram: of equal width, or of equal ratio where values differ much."""
    return np.geomspace(low, high, _BINS + 1) if high > _MUCH * low else np.linspace(low, high, _BINS + 1)


def _steps(times_s: Floats, step_s: float, steps: int) -> npt.NDArray[np.int64]:
    return np.clip(times_s / step_s, 0, steps - 1).astype(np.int64)


def _counts(times_s: Floats, step_s: float, steps: int) -> tuple[int, ...]:
    return tuple(int(n) for n in np.bincount(_steps(times_s, step_s, steps), minlength=steps))


def _by_step(times_s: Floats, values: Floats, step_s: float, steps: int) -> list[Floats]:
    """Return the known values of each step; `times_s` in order."""
    known = ~np.isnan(values)
    at = _steps(times_s[known], step_s, steps)
    return np.split(values[known], np.searchsorted(at, np.arange(1, steps)))


def _quantiles(groups: Sequence[Floats], p: float) -> tuple[float | None, ...]:
    return tuple(round(stats.quantile(group, p), _DECIMALS) if len(group) else None for group in groups)


def _rounded(values: Sequence[float] | Floats) -> tuple[float, ...]:
    return tuple(round(float(v), _DECIMALS) for v in values)
