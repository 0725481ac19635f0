"""Simulated runs -> what users saw, with intervals that know of the order of requests, and how the fleet was used.

Waits of neighbouring requests resemble each other, so the intervals of `stats`, which take samples as independent, would be too narrow.
Here they come from groups: independent runs, or batches of neighbouring requests of one run (the method of batch means).  A mean has
Student's interval over the means of the groups.  A percentile q of all samples has that of the share of samples at or below q, group by
group, mapped back through the samples (batch means of the indicator, as for quantiles in Law, Simulation Modeling and Analysis, ch. 9);
never narrower than for independent samples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo as limits_of
from mlsys_bench import stats, summary
from mlsys_bench.simulate import kernel
from mlsys_bench.simulate.simulation import Simulation
from mlsys_bench.simulate.study import throughput_tokens_per_s
from mlsys_bench.summary import promises
from mlsys_bench.types import SLO, FleetUse, LatencySummary, LoadTest, RequestRecord, TenantUse, Validity

Floats = npt.NDArray[np.float64]

GROUPS = 20  # batches in all runs together
LEAST_IN_GROUP = 10
POINTS = 60  # of a series
FAILED_SHARE = 0.01  # of the requests: more, and a run is called degraded, as a load test is
FORMULA = (
    "90 %: over {groups} (Student for means; for percentiles, of the share of samples below them), never narrower than for "
    "independent samples; Wilson for goodput"
)


def loadtest(
    simulations: Sequence[Simulation],
    *,
    target: str,
    arrivals: str,
    offered_rate_per_s: float | None,
    slo: SLO | None,
    reasons: Sequence[str] = (),
    stopped: str | None = None,
    requests_file: str | None = None,
) -> LoadTest:
    """Return what the users of one or several runs of one design saw.

    `reasons`: what the result rests on; `stopped`: that these are fewer runs than were asked for, in words.
    """
    records = [r for s in simulations for r in s.requests]
    groups = [group for s in simulations for group in _groups(s, len(simulations))]
    together = summary.summarise(
        records, source="simulation", target=target, arrivals=arrivals, offered_rate_per_s=offered_rate_per_s, slo=slo,
        validity=_validity(simulations, reasons, stopped), window=simulations[0].window, requests_file=requests_file,
        itl=_gaps(simulations, groups),
    )  # fmt: skip
    rates = np.array([_rates(s) for s in simulations])
    inside = sum(r.in_window for r in records)
    duration_s = float(sum(s.window[1] - s.window[0] for s in simulations))
    good = None if together.goodput_ratio is None or duration_s <= 0 else together.goodput_ratio * inside / duration_s
    said = f"{len(groups)} runs" if len(simulations) > 1 and len(groups) == len(simulations) else f"{len(groups)} batches of requests"
    return dataclasses.replace(
        together,
        duration_s=duration_s,
        request_rate_per_s=float(rates[:, 0].mean()),
        output_tokens_per_s=float(rates[:, 1].mean()),
        goodput_per_s=good,
        ttft_s=latency([[summary.ttft_s(r) for r in group] for group in groups]),
        tpot_s=latency([[summary.tpot_s(r) for r in group] for group in groups]),
        e2e_s=latency([[summary.e2e_s(r) for r in group] for group in groups]),
        formulas={**together.formulas, "intervals": FORMULA.format(groups=said)},
        tenants=_tenants(records, slo),
        fleet=fleet_use(simulations),
    )


def latency(groups: Sequence[Sequence[float | None]]) -> LatencySummary:
    """Return mean and percentiles of all groups together, with intervals from what the groups differ in."""
    return _summary([np.array([v for v in group if v is not None], dtype=np.float64) for group in groups])


def _summary(groups: Sequence[Floats]) -> LatencySummary:
    filled = [values for values in groups if len(values)]
    samples = np.sort(np.concatenate(filled)) if filled else np.zeros(0)
    if len(samples) < 2:
        return summary.summary(samples)
    intervals = {name: quantile_interval(filled, samples, p) for name, p in summary.QUANTILES.items()}
    intervals["mean"] = _mean_interval(filled, samples)
    known = {name: interval for name, interval in intervals.items() if interval is not None}
    points = [_quantile(samples, p) for p in summary.QUANTILES.values()]
    figures = {name: v for name, v in zip(summary.QUANTILES, points, strict=True) if name == "p50" or name in known}
    figures["mean"] = float(samples.mean())
    return LatencySummary(
        count=len(samples),
        **{name: figures.get(name) for name in ("mean", *summary.QUANTILES)},
        intervals=known,
        too_few=tuple(name for name in ("mean", *summary.QUANTILES) if name not in figures),
    )


def quantile_interval(groups: Sequence[Floats], samples: Floats, p: float) -> tuple[float, float] | None:
    """Return the 90 % interval of the p-quantile of grouped samples (`samples`: all of them, sorted), None where they are too few."""
    n = len(samples)
    if n < stats.enough_for_quantile(p):
        return None
    value = _quantile(samples, p)
    below = np.array([np.count_nonzero(group <= value) / len(group) for group in groups])
    half = _half_width(below, np.array([len(group) for group in groups]), p * (1 - p) / n)
    low, high = p - half, p + half
    if high >= 1 - 0.5 / n:
        return None
    return _quantile(samples, max(low, 0.0)), _quantile(samples, high)


def _quantile(ordered: Floats, p: float) -> float:
    """Return what `stats.quantile` does, of samples in order."""
    at = (len(ordered) - 1) * p
    low, high = float(ordered[int(at)]), float(ordered[min(int(at) + 1, len(ordered) - 1)])
    return low + (high - low) * (at - int(at))


def _mean_interval(groups: Sequence[Floats], samples: Floats) -> tuple[float, float] | None:
    means, sizes = np.array([group.mean() for group in groups]), np.array([len(group) for group in groups])
    half = _half_width(means, sizes, float(samples.var(ddof=1)) / len(samples))
    middle = float(samples.mean())
    return (middle - half, middle + half) if math.isfinite(half) else None


def _half_width(of_groups: Floats, sizes: npt.NDArray[np.int64], independent: float) -> float:
    """Return half the 90 % interval of a weighted mean over groups; `independent`: its variance if all samples were."""
    from scipy.special import stdtrit

    n, total = len(of_groups), float(sizes.sum())
    if n < 2:
        return float(1.6449 * math.sqrt(independent))
    weights = sizes / total
    middle = float(weights @ of_groups)
    variance = n / (n - 1) * float((weights**2) @ (of_groups - middle) ** 2)
    return float(stdtrit(n - 1, (1 + stats.LEVEL) / 2)) * math.sqrt(max(variance, independent))


def _gaps_of(records: Sequence[RequestRecord]) -> Floats:
    """Return all gaps between neighbouring tokens of these requests."""
    if not all(len(r.token_s) == r.output_tokens for r in records):
        return np.concatenate([np.zeros(0), *(summary.itl_s(r) for r in records)])
    sizes = np.array([len(r.token_s) for r in records], dtype=np.int64)
    times = np.fromiter(itertools.chain.from_iterable(r.token_s for r in records), dtype=np.float64, count=int(sizes.sum()))
    starts = np.cumsum(sizes)[:-1]
    found: Floats = np.delete(np.diff(times), starts - 1) if len(times) else times
    return found


def _gaps(simulations: Sequence[Simulation], groups: Sequence[Sequence[RequestRecord]]) -> LatencySummary:
    """Return the gaps between tokens; from their histogram, to 0.2 % and without intervals, where a run was too long to keep each."""
    histograms = [s.gaps for s in simulations if s.gaps is not None]
    if not histograms:
        return _summary([_gaps_of(group) for group in groups])
    counts = np.sum(histograms, axis=0)
    middle_s = kernel.LEAST_S * np.exp((np.arange(len(counts)) - 0.5) / kernel.BINS_PER_E)
    middle_s[0] = 0.0
    total = int(counts.sum())
    at = np.searchsorted(np.cumsum(counts), [p * total for p in summary.QUANTILES.values()])
    return LatencySummary(
        count=total, mean=float(counts @ middle_s) / max(total, 1), intervals={},
        **dict(zip(summary.QUANTILES, middle_s[np.minimum(at, len(counts) - 1)].tolist(), strict=True)),
    )  # fmt: skip


def _groups(simulation: Simulation, runs: int) -> list[list[RequestRecord]]:
    """Return the answered requests of the window: one group where there are runs enough, else batches of neighbours."""
    answered = [r for r in simulation.requests if r.in_window and r.outcome == "ok"]
    parts = 1 if runs >= GROUPS // 2 else min(math.ceil(GROUPS / runs), len(answered) // LEAST_IN_GROUP)
    edges = [round(i * len(answered) / max(parts, 1)) for i in range(max(parts, 1) + 1)]
    return [answered[a:b] for a, b in itertools.pairwise(edges)]


def _rates(simulation: Simulation) -> tuple[float, float]:
    """Return answers and output tokens per second of the window, whoever they belong to."""
    start_s, end_s = simulation.window
    if end_s <= start_s:
        return 0.0, 0.0
    answered = sum(r.outcome == "ok" and start_s <= r.token_s[-1] <= end_s for r in simulation.requests)
    tokens = throughput_tokens_per_s(simulation) or 0.0
    return answered / (end_s - start_s), tokens


def _tenants(records: Sequence[RequestRecord], slo: SLO | None) -> tuple[TenantUse, ...]:
    names = sorted({r.tenant for r in records if r.tenant is not None})
    return tuple(_tenant(name, [r for r in records if r.tenant == name and r.in_window], slo) for name in names)


def _tenant(name: str, records: Sequence[RequestRecord], slo: SLO | None) -> TenantUse:
    ok = [r for r in records if r.outcome == "ok"]
    return TenantUse(
        name=name,
        requests=len(records),
        ok=len(ok),
        goodput_ratio=sum(summary.meets_all(r, slo) for r in ok) / len(records) if slo and limits_of.latencies(slo) and records else None,
        ttft_s=latency(_batches([summary.ttft_s(r) for r in ok])),
        tpot_s=latency(_batches([summary.tpot_s(r) for r in ok])),
        e2e_s=latency(_batches([summary.e2e_s(r) for r in ok])),
    )


def _batches(values: Sequence[float | None]) -> list[Sequence[float | None]]:
    parts = max(1, min(GROUPS, len(values) // LEAST_IN_GROUP))
    return [values[a:b] for a, b in itertools.pairwise(round(i * len(values) / parts) for i in range(parts + 1))]


# ---------------------------------------------------------------- may it be believed?


def _validity(simulations: Sequence[Simulation], reasons: Sequence[str], stopped: str | None) -> Validity:
    """Warn of a stop, of failures, of a window without length, which has no rates, and of a queue that grows to the end.

    In such a queue latencies depend on the duration.
    """
    growing = sum(is_growing(s) for s in simulations)
    warned = [] if stopped is None else [stopped]
    warned += _failures([r.outcome for s in simulations for r in s.requests if r.in_window])
    if all(start_s == end_s for start_s, end_s in (s.window for s in simulations)):
        why = "all requests that count are due at one moment: no rate can be told of them; simulate more --requests, or a --duration"
        warned.append(why)
    elif growing * 2 > len(simulations):
        why = "the queue still grows when the last requests come: the load is at or above capacity, and latencies depend on the duration"
        warned.append(why)
    return Validity(verdict="degraded" if warned else "valid", reasons=(*warned, *reasons))


def _failures(outcomes: Sequence[str]) -> list[str]:
    """Return that requests failed, as a load test says it, where latencies of the others say too little."""
    failed = Counter(outcome for outcome in outcomes if outcome not in ("ok", "cancelled", "unfinished"))
    share, said = promises.failures(failed, len(outcomes))
    return [said] if share > FAILED_SHARE else []


def is_growing(simulation: Simulation) -> bool:
    """Say whether ever more requests are in the system: more in each third of the window than in the one before."""
    start_s, end_s = simulation.window
    begun = np.sort([r.scheduled_s for r in simulation.requests if r.sent_s is not None])
    over = np.sort([math.inf if r.done_s is None else r.done_s for r in simulation.requests if r.sent_s is not None])
    times = np.linspace(start_s, end_s, 3 * POINTS + 1)[1:]
    inside = np.searchsorted(begun, times, side="right") - np.searchsorted(over, times, side="right")
    first, second, third = inside.reshape(3, -1).mean(axis=1).tolist()
    seats = max((int(t.batch.max(initial=0)) for t in simulation.timelines), default=0) * simulation.replicas
    return bool(third > 1.2 * second and second > 1.2 * first and third > 1.5 * seats)


# ---------------------------------------------------------------- the fleet


def _ratio(part: float, whole: float) -> float:
    """Return a mean over time, 0 where no time has passed: nothing came to a replica."""
    return part / whole if whole > 0 else 0.0


def fleet_use(simulations: Sequence[Simulation]) -> FleetUse:
    """Return how the replicas were used."""
    n = len(simulations)
    lines = [t for s in simulations for t in s.timelines if len(t.end_s)]
    busy_s, replica_s = (float(sum(getattr(s, name) for s in simulations)) for name in ("busy_s", "replica_s"))
    waited_s = sum(r.stage_s.get("queue", 0.0) for s in simulations for r in s.requests)
    lives = [life for s in simulations for life in s.lives]
    kv_tokens = max((s.kv_tokens for s in simulations), default=0) or 1
    return FleetUse(
        runs=n,
        replicas=simulations[0].replicas,
        most_replicas=max(most_ready(s) for s in simulations),
        replica_s=replica_s / n,
        utilisation=_ratio(busy_s, replica_s),
        batch_mean=_ratio(sum(s.sequence_s for s in simulations), busy_s),
        kv_mean=_ratio(sum(s.kv_token_s for s in simulations), busy_s) / kv_tokens,
        kv_peak=max((float(t.kv_tokens.max()) for t in lines), default=0.0) / kv_tokens,
        waiting_mean=_ratio(waited_s, replica_s),
        waiting_peak=max((int(t.waiting.max()) for t in lines), default=0),
        attempts=sum(s.attempts for s in simulations),
        retries=sum(s.retries for s in simulations),
        preemptions=sum(s.preemptions for s in simulations),
        failures=sum(life.why == "failed" for life in lives),
        launched=sum(life.launched_s > 0 and not life.repaired for life in lives),
        released=sum(life.why == "scaled down" for life in lives),
        prefix_hit_share=_hit_share(simulations),
        series_step_s=simulations[0].end_s / POINTS,
        series=_series(simulations[0], kv_tokens),
    )


def most_ready(simulation: Simulation) -> int:
    """Return the most replicas that were ready at one time."""
    if not simulation.lives:
        return simulation.replicas
    steps = [(life.ready_s, 1) for life in simulation.lives if life.ended_s is None or life.ended_s > life.ready_s]
    steps += [(life.ended_s, -1) for life in simulation.lives if life.ended_s is not None and life.ended_s > life.ready_s]
    return max(itertools.accumulate(change for _, change in sorted(steps)), default=0)


def _hit_share(simulations: Sequence[Simulation]) -> float | None:
    asked = sum(s.prefix_asked_tokens for s in simulations)
    return sum(s.prefix_hit_tokens for s in simulations) / asked if asked else None


def _series(simulation: Simulation, kv_tokens: int) -> dict[str, tuple[float, ...]]:
    """Return replicas, sequences running, requests waiting and KV share at points over the run.

    Between two steps of a timeline a replica computed for a share of the time, and held nothing for the rest.
    """
    end_s = simulation.end_s
    at_s = np.linspace(0, end_s, POINTS + 1)[1:]
    found = {name: np.zeros(POINTS) for name in ("replicas", "running", "waiting", "kv")}
    for line in simulation.timelines:
        if len(line.end_s):
            from_s = np.concatenate([[line.end_s[0] - line.busy_s[0]], line.end_s[:-1]])
            busy = np.clip(np.diff(line.busy_s, prepend=0.0) / np.maximum(line.end_s - from_s, 1e-12), 0.0, 1.0)
            at = np.searchsorted(line.end_s, at_s)
            inside = at < len(line.end_s)
            inside[inside] = from_s[at[inside]] < at_s[inside]
            for name, values in (("running", line.batch), ("waiting", line.waiting), ("kv", line.kv_tokens / kv_tokens)):
                found[name][inside] += (values * busy)[at[inside]]
    for life in simulation.lives:
        found["replicas"] += (life.ready_s <= at_s) & (at_s < (math.inf if life.ended_s is None else life.ended_s))
    if not simulation.lives:
        found["replicas"] += simulation.replicas
    found["kv"] /= np.maximum(found["replicas"], 1)
    return {name: tuple(values.tolist()) for name, values in found.items()}
