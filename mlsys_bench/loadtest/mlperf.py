"""MLPerf's four scenarios: how they send, what their figure is, and how long a run must be for it to count.

| scenario      | queries                                       | samples a query | figure                                       |
|---------------|-----------------------------------------------|-----------------|----------------------------------------------|
| single-stream | the next as soon as the last is answered      | 1               | p90 latency, early-stopping estimate         |
| multi-stream  | the next as soon as the last is answered      | 8               | p99 latency of a query, likewise             |
| server        | Poisson arrivals                              | 1               | the rate, if p99 is within every limit       |
| offline       | all samples at the start, in one query        | 24,576 or more  | samples per second                           |

Each lasts 600 seconds at least.  Early stopping: with n queries of which t are the slowest, the n - t + 1 others bound the percentile p at
99 % confidence if the chance of at most t of n queries being over the p-quantile is at most 1 %; the estimate leaves the t - 1 slowest out.
Source: MLPerf Inference Rules, sections "Scenarios" and "Appendix Early Stopping", github.com/mlcommons/inference_policies, commit 848b9ab.
A figure of this tool is no MLPerf result: that takes their load generator, their models, their data and their review.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlsys_bench import errors, stats, summary, units
from mlsys_bench.askings import ScenarioResult
from mlsys_bench.types import SLO, Limit, RequestRecord

CONFIDENCE = 0.99
PERCENTILE = 0.99  # of the server scenario
LEAST_S = 600.0
OFFLINE_SAMPLES = 24_576
SERVER_NEEDS = '--slo "ttft_p99<2s,tpot_p99<200ms" (or a limit on e2e)'
SOURCE = "MLPerf Inference Rules, inference_policies@848b9ab; no MLPerf result"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One of the four, by what sets it apart."""

    name: str
    samples: int = 1  # of a query
    percentile: float | None = None


SCENARIOS = {
    each.name: each
    for each in (
        Scenario(name="single-stream", percentile=0.90),
        Scenario(name="multi-stream", samples=8, percentile=0.99),
        Scenario(name="server", percentile=0.99),
        Scenario(name="offline", samples=OFFLINE_SAMPLES),
    )
}


def named(name: str) -> Scenario:
    """Return a scenario.  Raises UnknownName naming its nearest neighbours."""
    if name not in SCENARIOS:
        raise errors.unknown("preset", name, SCENARIOS, "--preset")
    return SCENARIOS[name]


def judge(
    scenario: Scenario, records: Sequence[RequestRecord], *, offered_per_s: float | None, slo: SLO | None, lasted_s: float
) -> ScenarioResult:
    """Return the scenario's figure, from every request of the run: the rules know no warm-up."""
    asked = [r for r in records if r.in_window]
    failed = sum(r.outcome != "ok" for r in asked)
    shortfalls = [f"{failed} of {len(asked)} requests failed: the rules want every one answered"] if failed else []
    if lasted_s < LEAST_S:
        cure = "more --requests" if scenario.name == "offline" else "--duration 600s"
        shortfalls.append(f"the run lasted {units.show_s(lasted_s)}, the rules ask for {units.show_s(LEAST_S)}: {cure}")
    if scenario.name == "offline":
        return _offline(asked, shortfalls, lasted_s)
    if scenario.name == "server":
        return _server(asked, offered_per_s, slo, shortfalls, lasted_s)
    latencies = _queries_s(asked, scenario.samples)
    assert scenario.percentile is not None
    least = least_queries(scenario.percentile, 1)
    value = early_stopping_s(latencies, scenario.percentile)
    if value is None:
        shortfalls.append(f"{len(latencies)} queries were answered, {least} are the least that early stopping needs: a longer --duration")
    return ScenarioResult(
        scenario=scenario.name,
        metric=f"p{100 * scenario.percentile:.0f} latency, early-stopping estimate",
        unit="s",
        value=value,
        plain_value=stats.quantile(np.array(latencies), scenario.percentile) if latencies else None,
        queries=len(latencies),
        samples_per_query=scenario.samples,
        least_queries=least,
        lasted_s=lasted_s,
        least_s=LEAST_S,
        shortfalls=tuple(shortfalls),
        source=SOURCE,
    )


def early_stopping_s(latencies_s: Sequence[float], percentile: float) -> float | None:
    """Return the estimate of a percentile that the rules report: the slowest once t - 1 slower ones are left out; None for too few."""
    over = most_over(len(latencies_s), percentile)
    return sorted(latencies_s)[len(latencies_s) - over] if over else None


def most_over(queries: int, percentile: float) -> int:
    """Return the most queries t of so many that may be over the limit while 99 % confidence in the percentile is kept."""
    low, high = 0, queries
    while low < high:
        middle = (low + high + 1) // 2
        if middle < queries and least_queries(percentile, middle) <= queries:
            low = middle
        else:
            high = middle - 1
    return low


def least_queries(percentile: float, over: int) -> int:
    """Return the least queries of which so many may be over: the smallest h + t with I(p; h, t + 1) <= 1 - c.

    I(p; h, t + 1) is the regularised incomplete beta function: the chance that at most t of h + t queries are over the p-quantile.
    """
    from scipy.special import betainc

    low, high = 1, 64
    while float(betainc(high, over + 1, percentile)) > 1 - CONFIDENCE:
        low, high = high, 2 * high
    while low < high:
        middle = (low + high) // 2
        if float(betainc(middle, over + 1, percentile)) <= 1 - CONFIDENCE:
            high = middle
        else:
            low = middle + 1
    return low + over


def _queries_s(records: Sequence[RequestRecord], samples: int) -> list[float]:
    """Return the time of each whole query: from when it was due to its last sample's end."""
    ends: dict[int, list[float]] = {}
    due: dict[int, float] = {}
    for r in records:
        if r.outcome == "ok" and r.done_s is not None:
            ends.setdefault(r.index // samples, []).append(r.done_s)
            due[r.index // samples] = min(r.scheduled_s, due.get(r.index // samples, math.inf))
    return [max(times) - due[query] for query, times in ends.items() if len(times) == samples]


def _server(
    records: Sequence[RequestRecord], offered_per_s: float | None, slo: SLO | None, shortfalls: list[str], lasted_s: float
) -> ScenarioResult:
    """Return the rate that was offered, if for every limit no more queries than may be were over it."""
    given = [limit for limit in slo or () if limit.metric in _LIMITED]
    ok = [r for r in records if r.outcome == "ok"]
    failed = sum(r.outcome not in ("ok", "cancelled") for r in records)
    missed = [text for limit in given if (text := _missed(limit, ok, failed)) is not None]
    latencies = _queries_s(ok, 1)
    return ScenarioResult(
        scenario="server",
        metric="rate with p99 latency within the limit",
        unit="queries/s",
        value=offered_per_s if given and not missed else None,
        plain_value=stats.quantile(np.array(latencies), PERCENTILE) if latencies else None,
        queries=len(latencies),
        samples_per_query=1,
        least_queries=least_queries(PERCENTILE, 0),
        lasted_s=lasted_s,
        least_s=LEAST_S,
        shortfalls=(*shortfalls, *missed, *(() if given else (f"no latency limit was given: {SERVER_NEEDS}",))),
        source=SOURCE,
    )


def _missed(limit: Limit, ok: Sequence[RequestRecord], failed: int) -> str | None:
    """Say how a limit was missed, or None: it is on p99 by the rules, whatever percentile was written.  A query that failed was over it."""
    values = [value for r in ok if (value := _LIMITED[limit.metric](r)) is not None]
    over, queries = sum(value > limit.limit for value in values) + failed, len(values) + failed
    needed = least_queries(PERCENTILE, over)
    if queries >= needed:
        return None
    what = {"ttft": "a TTFT", "tpot": "a TPOT", "e2e": "an E2E"}[limit.metric]
    slow = f"{over} of {queries} queries had {what} above {units.show_s(limit.limit)}{', or failed' if failed else ''}"
    return f"{slow}; with so many over, {needed:,} queries are needed"


_LIMITED: dict[str, Callable[[RequestRecord], float | None]] = {"ttft": summary.ttft_s, "tpot": summary.tpot_s, "e2e": summary.e2e_s}


def _offline(records: Sequence[RequestRecord], shortfalls: list[str], lasted_s: float) -> ScenarioResult:
    """Return the samples per second of one query of all of them."""
    done = [r.done_s for r in records if r.outcome == "ok" and r.done_s is not None]
    if len(records) < OFFLINE_SAMPLES:
        shortfalls.append(f"{len(records):,} samples, the rules ask for {OFFLINE_SAMPLES:,}: --requests {OFFLINE_SAMPLES}")
    return ScenarioResult(
        scenario="offline",
        metric="throughput",
        unit="samples/s",
        value=len(done) / max(done) if done and max(done) > 0 else None,
        plain_value=None,
        queries=1,
        samples_per_query=len(records),
        least_queries=1,
        lasted_s=lasted_s,
        least_s=LEAST_S,
        shortfalls=tuple(shortfalls),
        source=SOURCE,
    )
