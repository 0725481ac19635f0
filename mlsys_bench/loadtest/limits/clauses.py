"""What one level of load shows of each limit, in the one form that a search decides by: a figure of scores below 1.

A score is a request's latency over its limit, so `ttft_p99<500ms` is kept where the 99th percentile of TTFT / 500 ms is below 1.
`goodput>99%` is the 99th percentile of each request's worst score.  A request that failed has kept no limit: its score is infinite,
or a server that turns requests away would seem to carry any rate.  One that the client gave up on purpose has no score.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo as limits
from mlsys_bench import stats, summary
from mlsys_bench.errors import BadInput
from mlsys_bench.types import SLO, Limit, RequestRecord

Floats = npt.NDArray[np.float64]
_WAITS = ("ttft", "e2e")  # latencies that a queue adds its wait to, second by second
_MOST = 50_000  # scores a figure is taken from: gaps between tokens are many


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Clause:
    """One limit as a figure of scores: the quantile `p`, or the mean where it is None.

    `wait_s` is the limit in seconds of waiting, None where a queue does not add its wait to this latency.
    """

    limit: Limit
    p: float | None
    wait_s: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """What a level shows of one limit.  `score` is the figure over its limit; `effective` the number of independent requests."""

    score: float
    misses: int
    requests: int
    effective: float


def clauses(slo: SLO) -> tuple[Clause, ...]:
    """Return the limits in the form of scores.  Raises BadInput for what one run of one traffic cannot decide."""
    for limit in slo:
        if limit.tenant is not None:
            raise BadInput(f"{limits.show_limit(limit)}: limits of one tenant cannot be searched for; leave {limit.tenant!r} out")
    if any(limit.metric == "goodput" for limit in slo) and not limits.latencies(slo):
        raise BadInput("goodput counts requests within latency limits, and there is none: add one, e.g. ttft_p95<500ms,goodput>99%")
    return tuple(_clause(limit, slo) for limit in slo)


def _clause(limit: Limit, slo: SLO) -> Clause:
    if limit.metric in limits.SHARES:
        waits = [each.limit for each in limits.latencies(slo) if each.metric in _WAITS]
        wait_s = min(waits) if waits and limit.metric == "goodput" else None
        return Clause(limit=limit, p=limit.limit, wait_s=wait_s)
    p = None if limit.stat == "mean" else float(limit.stat.removeprefix("p")) / 100
    return Clause(limit=limit, p=p, wait_s=limit.limit if limit.metric in _WAITS else None)


def scores(clause: Clause, slo: SLO, records: Sequence[RequestRecord]) -> Floats:
    """Return the scores of the requests of the window, in the order they were due."""
    inside = sorted((r for r in records if r.in_window and r.outcome != "cancelled"), key=lambda r: r.scheduled_s)
    metric = clause.limit.metric
    if metric == "availability":
        return np.array([0.0 if r.outcome == "ok" else math.inf for r in inside])
    if metric == "goodput":
        found = [_scores_of(each, inside) for each in limits.latencies(slo) if each.metric != "itl"]
        gaps = [_own_gaps(each, inside) for each in limits.latencies(slo) if each.metric == "itl"]
        return np.asarray(np.max([*found, *gaps], axis=0))
    return _pooled_gaps(clause.limit, inside) if metric == "itl" else _scores_of(clause.limit, inside)


def _scores_of(limit: Limit, inside: Sequence[RequestRecord]) -> Floats:
    value = {"ttft": summary.ttft_s, "tpot": summary.tpot_s, "e2e": summary.e2e_s}[limit.metric]
    return np.array([math.inf if r.outcome != "ok" else (value(r) or 0.0) / limit.limit for r in inside])


def _own_gaps(limit: Limit, inside: Sequence[RequestRecord]) -> Floats:
    """Return the limit's statistic of each request's own gaps, as `summary.meets_all` judges it."""
    p = None if limit.stat == "mean" else float(limit.stat.removeprefix("p")) / 100
    gaps = [summary.itl_s(r) if r.outcome == "ok" else None for r in inside]
    return np.array([math.inf if g is None else figure_of(g, p) / limit.limit if len(g) else 0.0 for g in gaps])


def _pooled_gaps(limit: Limit, inside: Sequence[RequestRecord]) -> Floats:
    gaps = [summary.itl_s(r) / limit.limit if r.outcome == "ok" else np.array([math.inf]) for r in inside]
    return np.concatenate([*gaps, np.zeros(0)])


def figure(clause: Clause, values: Floats) -> Figure:
    """Return the figure that a clause is about.  values: scores in the order the requests were due."""
    if not len(values):
        return Figure(score=math.inf, misses=0, requests=0, effective=0.0)
    thinned = values[:: max(1, len(values) // _MOST)]
    return Figure(
        score=figure_of(thinned, clause.p), misses=int((values >= 1).sum()), requests=len(values),
        effective=len(values) / correlation_time(thinned),
    )  # fmt: skip


def figure_of(values: Floats, p: float | None) -> float:
    """Return the p-quantile, or the mean for None; infinite where infinite values reach into it."""
    if p is None:
        return float(values.mean())
    ordered = np.sort(values)
    above = min(math.floor(p * (len(ordered) - 1)) + 1, len(ordered) - 1)  # the quantile lies between this one and the one before
    return math.inf if np.isinf(ordered[above]) else stats.quantile(ordered, p)


def correlation_time(values: Floats) -> float:
    """Return how many neighbouring values say as much as one: the integrated autocorrelation time, at least 1.

    Sums the autocorrelations in pairs until a pair is negative.  Source: Geyer (1992), Practical Markov Chain Monte Carlo,
    Statistical Science 7, initial positive sequence.  Of logarithms, so that a few long waits do not decide it.
    """
    n = len(values)
    logs = np.log(np.clip(values, 1e-6, 1e3))
    logs = logs - logs.mean()
    power = float(logs @ logs)
    if n < 4 or power <= 1e-12 * n:
        return 1.0
    spectrum = np.fft.rfft(logs, 2 * n)
    rho = np.fft.irfft(spectrum * spectrum.conj())[:n] / power
    pairs = rho[0 : n - n % 2 : 2] + rho[1 : n - n % 2 : 2]
    ends = np.flatnonzero(pairs <= 0)
    kept = pairs[: ends[0]] if len(ends) else pairs
    return float(min(max(2 * kept.sum() - 1, 1.0), n))
