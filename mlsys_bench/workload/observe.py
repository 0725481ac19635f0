"""What requests show, and the workload that stands in for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlsys_bench import stats
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Lengths, LengthSummary, Provenance, TrafficSummary, Workload
from mlsys_bench.workload import course, prefix
from mlsys_bench.workload.burstiness import Dispersion, counts_of
from mlsys_bench.workload.course import Counts
from mlsys_bench.workload.schedule import Floats, Ints, Schedule, nominal_s, rate_per_s, take
from mlsys_bench.workload.trace import Trace, resolution_s

DISPERSION_WINDOWS_S = (1.0, 10.0, 60.0)  # shown; the law is fitted to those between and above as well
_BY_HOUR = "the dispersion is about the mean of each hour; the hours are in the series"
_MOST_BLOCKS = 5_000_000  # a cache of a given size is followed block by block: a minute of CPU
_CACHE_TOKENS = (100_000, 1_000_000, 10_000_000)
_STEP_S = 1.0  # of the counts
_MOST_S = 366 * 86400.0  # of a trace, which is counted by the second


def of_trace(trace: Trace, path: Path) -> Workload:
    """Return the workload of a trace, with all that was seen of it.

    The laws keep the rate, the bursts, the mean, CV and maximum of the lengths and their correlation; `observed` keeps what laws cannot.
    """
    plan = trace.schedule
    if not np.ptp(nominal_s(plan)) > 0:
        raise BadInput(f"{path}: all requests arrive at the same time; a rate needs a trace that lasts")
    if np.ptp(nominal_s(plan)) > _MOST_S:
        lasts = f"its requests come over {np.ptp(nominal_s(plan)) / 86400:,.0f} days, at most {_MOST_S / 86400:g} are read"
        raise BadInput(f"{path}: {lasts}; are its times in another unit? (`mlsys workload {path.name} --time-unit ms`)")
    counts = counts_of_trace(trace)
    if not len(counts.counts):
        within = f"its requests come within {np.ptp(nominal_s(plan)):.3g} s, and rates are counted by the second; give a longer trace"
        raise BadInput(f"{path}: {within}, or are its times in another unit? (`mlsys workload {path.name} --time-unit s`)")
    found = course.dispersions(counts, 3 * resolution_s(nominal_s(plan)))
    seen = summarise(trace, counts, found)
    rate, arrivals = course.law(counts, found, seen.gap_scv, len(plan) - 1)
    assert seen.prompt_tokens is not None
    assert seen.output_tokens is not None
    return Workload(
        rate_per_s=rate if counts.is_long else seen.rate_per_s,
        arrivals=arrivals,
        prompt_tokens=law_of(seen.prompt_tokens),
        output_tokens=law_of(seen.output_tokens),
        provenance=Provenance.MEASURED,
        source=f"{path.name}: {seen.requests:,} requests in {seen.duration_s:,.0f} s",
        length_correlation=round(seen.length_correlation or 0.0, 3),
        prefix_hit_share=seen.prefix_hit_share,
        observed=seen,
    )


def counts_of_trace(trace: Trace) -> Counts:
    """Return the requests of each second from the first on; times on a grid are spread over it, for a window would show the grid."""
    times_s = np.sort(nominal_s(trace.schedule))
    if grid_s := resolution_s(times_s):
        times_s = np.sort(times_s + np.random.default_rng(0).uniform(0, grid_s, len(times_s)))
    return Counts(start_s=trace.start_unix_s or 0.0, step_s=_STEP_S, counts=counts_of(times_s, _STEP_S))


def summarise(trace: Trace, counts: Counts, found: Sequence[Dispersion]) -> TrafficSummary:
    """Return what these requests show.  Gaps are left out where times stand on a grid: they would show the grid."""
    arrive_s = nominal_s(trace.schedule)
    order = np.argsort(arrive_s, kind="stable")
    plan, times_s = take(trace.schedule, order), arrive_s[order]
    shown = [d for d in found if d.window_s in DISPERSION_WINDOWS_S]
    step_s, series = course.series(counts)
    return TrafficSummary(
        requests=len(plan),
        duration_s=float(times_s[-1] - times_s[0]),
        rate_per_s=rate_per_s(plan),
        peak_rate_per_s=max((r for r in series if r is not None), default=rate_per_s(plan)),
        series_step_s=step_s,
        series_per_s=series,
        gap_scv=None if resolution_s(times_s) else stats.scv(np.diff(times_s)),
        dispersion={f"{d.window_s:g}s": d.index for d in shown},
        dispersion_intervals={f"{d.window_s:g}s": (d.low, d.high) for d in shown},
        prompt_tokens=lengths_of(plan.prompt_tokens),
        output_tokens=lengths_of(plan.output_tokens),
        length_correlation=rank_correlation(plan.prompt_tokens, plan.output_tokens),
        prefix_hit_share=prefix.hit_share(plan) if plan.prefix_hashes is not None else None,
        prefix_hits_by_cache_tokens=_hits(plan),
        sessions=None if plan.session is None else len(np.unique(plan.session)),
        tenants={} if plan.tenant is None else {t: float(np.mean(plan.tenant == i)) for i, t in enumerate(plan.tenants)},
        notes=(*trace.schedule.notes, *((_BY_HOUR,) if counts.is_long else ())),
    )


def lengths_of(tokens: Ints) -> LengthSummary:
    """Return mean, spread and percentiles of token counts."""
    values = tokens.astype(float)
    p50, p90, p99 = stats.quantiles(values, (0.5, 0.9, 0.99))
    return LengthSummary(mean=float(values.mean()), cv=math.sqrt(stats.scv(values)), p50=p50, p90=p90, p99=p99, max=int(tokens.max()))


def law_of(seen: LengthSummary) -> Lengths:
    """Return the lognormal law that has the mean and CV seen, before it is cut at the maximum seen."""
    if seen.cv < 1e-9:
        return Lengths(mean=max(seen.mean, 1.0), max=seen.max)
    return Lengths(dist="lognormal", mean=max(seen.mean, 1.0), cv=seen.cv, max=None if seen.max is None else max(seen.max, 1))


def rank_correlation(a: Ints, b: Ints) -> float:
    """Return Spearman's correlation, ties at their middle rank; 0 where one side never changes."""
    x, y = _ranks(a), _ranks(b)
    spread = float(x.std() * y.std())
    return float(np.mean((x - x.mean()) * (y - y.mean()))) / spread if spread > 0 else 0.0


def _ranks(values: Ints) -> Floats:
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[at])


def _hits(plan: Schedule) -> dict[str, float]:
    if plan.prefix_hashes is None or len(plan.prefix_hashes) > _MOST_BLOCKS:
        return {}
    return {f"{tokens:,}": prefix.hit_share(plan, tokens) for tokens in _CACHE_TOKENS}
