"""What users got, out of a metrics server: latencies from histograms, with intervals; replicas, requests in flight, memory in use.

A histogram knows how many requests took at most each of its edges.  The p-quantile of what was counted lies between two of them.  What
was counted is a sample: an edge is below the quantile of the law if the share under it is less than p for sure, above if it is at least
p for sure (90 %, both ends together).  Requests of one time see the same queue, so the share under an edge is uncertain by how it differs
between tenths of the range, not only by the number of requests: that ratio of variances divides the sample (the design effect).
Source: Kish (1965), Survey Sampling, ch. 8; Wilson (1927), JASA 22, for the shares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mlsys_bench import stats
from mlsys_bench.workload import counters
from mlsys_bench.workload.counters import Series
from mlsys_bench.workload.metrics import Engine, Metrics, wanted_names
from mlsys_bench.workload.schedule import Floats, Ints

BLOCKS = 10  # of time, whose spread is the uncertainty
_LEAST_BLOCKS = 3
MEMBER = ("job", "namespace", "pod", "instance", "engine", "dp_rank")  # labels that tell servers apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 90 % interval.  `value` is None beyond the last bucket; an end that the data leave open is None."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """A histogram of times in seconds, by block of time: requests up to each edge [block, edge], the sum of their times [block]."""

    edges: Floats
    up_to: Floats
    sum_s: Floats

    @property
    def count(self) -> int:
        """Return how many were counted."""
        return round(float(self.up_to[:, -1].sum()))


def latency_names(engine: Engine) -> tuple[str, ...]:
    """Return the names that tell what users got, and those that tell of traffic."""
    bases = [name for name in (engine.ttft, engine.tpot, *engine.itl, engine.e2e) if name]
    histograms = [f"{base}{part}" for base in bases for part in ("_bucket", "_sum", "_count")]
    return tuple(dict.fromkeys([*wanted_names(engine), *histograms, engine.running, *engine.kv]))


def histograms(seen: Metrics) -> dict[str, Histogram]:
    """Return the histograms there are, by metric: ttft, tpot, itl, e2e."""
    engine = seen.engine
    names = {"ttft": (engine.ttft,), "tpot": (engine.tpot,), "itl": engine.itl, "e2e": (engine.e2e,)}
    found = {metric: [h for base in bases if base and (h := _histogram(seen, base))] for metric, bases in names.items()}
    return {metric: some[0] for metric, some in found.items() if some}


def _histogram(seen: Metrics, base: str) -> Histogram | None:
    """Return a histogram of the range, None where nothing was counted."""
    by_edge: dict[float, list[Floats]] = {}
    for one in seen[f"{base}_bucket"]:
        by_edge.setdefault(float(one.labels["le"]), []).append(_grown_by_block(seen, one))
    most = max((len(servers) for servers in by_edge.values()), default=0)
    edges = np.array(sorted(edge for edge, servers in by_edge.items() if len(servers) == most))  # versions may differ in their edges
    if len(edges) < 2:
        return None
    up_to = np.maximum.accumulate(np.stack([np.sum(by_edge[edge], axis=0) for edge in edges], axis=1), axis=1)
    if not up_to[:, -1].sum() > 0:
        return None
    sum_s = sum((_grown_by_block(seen, one) for one in seen[f"{base}_sum"]), np.zeros(BLOCKS))
    return Histogram(edges=edges, up_to=up_to, sum_s=sum_s)


def quantile(histogram: Histogram, p: float) -> Estimate:
    """Return the p-quantile: as Prometheus interpolates it, and the edges between which it lies."""
    edges, total = histogram.edges, histogram.up_to.sum(axis=0)
    shares = [_share(histogram, column) for column in range(len(edges))]
    below = [edge for edge, (_, high) in zip(edges, shares, strict=True) if high < p]
    above = [edge for edge, (low, _) in zip(edges, shares, strict=True) if low >= p and math.isfinite(edge)]
    at = int(np.searchsorted(total, p * total[-1]))
    lower, before = (float(edges[at - 1]), float(total[at - 1])) if at else (0.0, 0.0)
    value = None
    if math.isfinite(edges[at]):
        value = lower + (float(edges[at]) - lower) * (p * float(total[-1]) - before) / max(float(total[at]) - before, 1e-12)
    return Estimate(value=value, low=float(max(below, default=0.0)), high=float(min(above)) if above else None)


def _share(histogram: Histogram, column: int) -> tuple[float, float]:
    """Return the 90 % interval of the share of requests up to an edge."""
    up_to, counts = histogram.up_to[:, column], histogram.up_to[:, -1]
    n = float(counts.sum())
    share = float(up_to.sum()) / n
    effect = 1.0
    blocks = int((counts > 0).sum())
    if 0 < share < 1 and blocks >= _LEAST_BLOCKS:
        variance = blocks / (blocks - 1) * float(((up_to - share * counts) ** 2).sum()) / n**2
        effect = max(1.0, variance / (share * (1 - share) / n))
    low, high = stats.wilson(share * n / effect, max(1, round(n / effect))) or (0.0, 1.0)
    return low, high


def mean(histogram: Histogram) -> Estimate:
    """Return the mean time, which a histogram knows exactly, with the interval of a ratio over blocks of time."""
    counts, sums = histogram.up_to[:, -1], histogram.sum_s
    n = float(counts.sum())
    value = float(sums.sum()) / n
    blocks = int((counts > 0).sum())
    if blocks < _LEAST_BLOCKS or value <= 0:
        return Estimate(value=value, low=None, high=None)
    sd = math.sqrt(blocks / (blocks - 1) * float(((sums - value * counts) ** 2).sum())) / n
    half = _student(blocks) * sd
    return Estimate(value=value, low=max(value - half, 0.0), high=value + half)


def _student(blocks: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(blocks - 1, (1 + stats.LEVEL) / 2))


def _grown_by_block(seen: Metrics, one: Series) -> Floats:
    return np.asarray(np.bincount(_block(seen, one), counters.increments(one, seen.start_s), minlength=BLOCKS), dtype=np.float64)


def _block(seen: Metrics, one: Series) -> Ints:
    """Return the tenth of the range that each sample lies in."""
    first, last = _span(seen)
    return np.clip(((one.times_s - first) / max(last - first, 1e-9) * BLOCKS).astype(np.int64), 0, BLOCKS - 1)


def _span(seen: Metrics) -> tuple[float, float]:
    """Return the times between which requests are counted."""
    return min(float(s.times_s[0]) for s in seen.arrived), max(float(s.times_s[-1]) for s in seen.arrived)


# ---------------------------------------------------------------- servers


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """The servers of a range: how many on average, and the rate of the busiest over the mean.  `is_told`: labels tell them apart."""

    mean: float
    busiest_share: float | None
    is_told: bool


def members(seen: Metrics) -> Members:
    """Return the servers that counted requests, each for as long as it was there."""
    scrape_s = counters.scrape_s(seen.arrived) or 0.0
    first, last = _span(seen)
    by_member: dict[tuple[str | None, ...], list[Series]] = {}
    for one in seen.arrived:
        by_member.setdefault(tuple(one.labels.get(label) for label in MEMBER), []).append(one)
    seconds = [max(float(s.times_s[-1]) for s in some) - min(float(s.times_s[0]) for s in some) + scrape_s for some in by_member.values()]
    served = [sum(float(counters.increments(s, seen.start_s).sum()) for s in some) for some in by_member.values()]
    rates = np.array(served) / np.maximum(seconds, 1e-9)
    overall = sum(served) / max(sum(seconds), 1e-9)
    return Members(
        mean=sum(seconds) / max(last - first + scrape_s, 1e-9),
        busiest_share=float(rates.max() / overall) if len(rates) > 1 and overall > 0 else None,
        is_told=any(one.labels.get("instance") or one.labels.get("pod") for one in seen.arrived),
    )


def in_flight(seen: Metrics) -> Estimate | None:
    """Return the mean number of requests that a server holds, running and waiting; None where no gauge tells."""
    running = _mean_by_block(seen, seen[seen.engine.running])
    waiting = [blocks for name in seen.engine.waiting if (blocks := _mean_by_block(seen, seen[name])) is not None]
    if running is None or not waiting:
        return None
    values = (running + waiting[0])[np.isfinite(running + waiting[0])]
    value, spread = float(values.mean()), stats.mean_interval(values) if len(values) >= _LEAST_BLOCKS else None
    return Estimate(value=value, low=max(spread[0], 0.0) if spread else None, high=spread[1] if spread else None)


def _mean_by_block(seen: Metrics, series: Sequence[Series]) -> Floats | None:
    """Return the mean sample of a gauge by block, nan where there is none; None without samples."""
    if not series:
        return None
    block, values = np.concatenate([_block(seen, s) for s in series]), np.concatenate([s.values for s in series])
    counts = np.bincount(block, minlength=BLOCKS).astype(np.float64)
    return np.where(counts > 0, np.bincount(block, values, minlength=BLOCKS) / np.maximum(counts, 1), np.nan)


def kv_share(seen: Metrics) -> tuple[float, float] | None:
    """Return the share of a server's cache in use, mean and most; None where no gauge tells."""
    samples = [s.values for name in seen.engine.kv for s in seen[name]]
    return (float(np.concatenate(samples).mean()), float(np.concatenate(samples).max())) if samples else None


def output_tokens_per_s(seen: Metrics) -> Estimate | None:
    """Return the tokens that all servers made per second, None where nobody counted them."""
    grown = [_grown_by_block(seen, one) for one in seen[seen.engine.output_total]]
    first, last = _span(seen)
    if not grown or last <= first:
        return None
    rates = np.sum(grown, axis=0) / ((last - first) / BLOCKS)
    spread = stats.mean_interval(rates)
    return Estimate(value=float(rates.mean()), low=max(spread[0], 0.0) if spread else None, high=spread[1] if spread else None)
