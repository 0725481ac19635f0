"""One run held against what the truth server really did, request by request.

A request and the server's row of it carry the same moment: the header x-mlsys-sched, when it was due.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlsys_bench import summary
from mlsys_bench.calibrations import Held
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.loadtest.truth import Row
from mlsys_bench.loadtests import Spread
from mlsys_bench.types import LoadTest, RequestRecord, Requests

_SAME_S = 2e-6  # the header has six digits


def hold(result: LoadTest, requests: Requests, rows: Sequence[Row], stats: Mapping[str, Any]) -> Held:
    """Return how far a run's figures lie from the truth.  Raises MeasurementFailed when too little of it can be matched."""
    pairs = match(requests, rows)
    ttft = [
        (reported, row.first_s)
        for record, row in pairs
        if record.outcome == "ok" and row.first_s is not None and (reported := summary.ttft_s(record)) is not None
    ]
    if len(ttft) < 2:
        raise MeasurementFailed(f"{len(ttft)} of {result.requests} requests are both in the records and in the truth server's: too few")
    reported, true = np.array(ttft).T
    late_s = np.array([late for record, _ in pairs if (late := summary.lateness_s(record)) is not None])
    return Held(
        requests=len(pairs),
        ttft_p50_error=_off(reported, true, 0.5),
        ttft_p99_error=_off(reported, true, 0.99),
        itl_p50_error=_itl_error(result, stats),
        bias_s=float(np.median(reported - true)),
        lateness_p50_s=float(np.quantile(late_s, 0.5)),
        lateness_p99_s=float(np.quantile(late_s, 0.99)),
        achieved=_achieved(requests, pairs),
        gap_cv=_cv(np.diff(np.sort([row.arrived_unix_s for _, row in pairs]))),
        client_cpu_share=max((s.cpu_share for s in result.senders if s.cpu_share is not None), default=None),
        server_cpu_share=float(stats["cpu_share"]),
        server_lateness_p99_s=stats["server_late_ms"]["p99"] / 1e3,
        verdict=result.validity.verdict,
    )


def match(requests: Requests, rows: Sequence[Row]) -> list[tuple[RequestRecord, Row]]:
    """Return the requests of the window with the server's row of each, in the order they were due."""
    by_moment: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        if row.due_unix_s is not None:
            by_moment[round(row.due_unix_s / _SAME_S)].append(row)
    pairs = []
    for record in sorted((r for r in requests.requests if r.in_window), key=lambda r: r.scheduled_s):
        key = round((requests.t0_unix_s + record.scheduled_s) / _SAME_S)
        found = next((bucket for k in (key, key - 1, key + 1) if (bucket := by_moment.get(k))), None)
        if found:
            pairs.append((record, found.pop(0)))
    return pairs


def spread(of: Callable[[Held], float], runs: Sequence[Held]) -> Spread:
    """Return a figure over runs."""
    return spread_of([of(run) for run in runs])


def spread_of(values: Sequence[float]) -> Spread:
    """Return values, their mean and Student's 90 % interval of it."""
    mean, sd = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None
    half = None if sd is None else _student_90(len(values) - 1) * sd / len(values) ** 0.5
    return Spread(values=tuple(values), mean=mean, sd=sd, interval=None if half is None else (mean - half, mean + half))


def _student_90(freedom: int) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, 0.95))


def _off(reported: Any, true: Any, p: float) -> float:
    """Return how far a reported percentile lies from the true one, as a share."""
    return float(np.quantile(reported, p) / np.quantile(true, p) - 1)


def _itl_error(result: LoadTest, stats: Mapping[str, Any]) -> float | None:
    if stats["itl_ms"] is None or not stats["itl_ms"]["p50"] or result.itl_s.p50 is None:
        return None
    return float(result.itl_s.p50 / (stats["itl_ms"]["p50"] / 1e3) - 1)


def _achieved(requests: Requests, pairs: Sequence[tuple[RequestRecord, Row]]) -> float:
    """Return the rate at the server's door as a share of the schedule's; what never came counts against it."""
    asked = [r.scheduled_s for r in requests.requests if r.in_window]
    came = [row.arrived_unix_s for _, row in pairs]
    spans_s = max(asked) - min(asked), max(came) - min(came)
    return len(pairs) / len(asked) * spans_s[0] / spans_s[1] if spans_s[1] > 0 else 0.0


def _cv(gaps_s: Any) -> float:
    return float(gaps_s.std() / gaps_s.mean()) if len(gaps_s) and gaps_s.mean() > 0 else 0.0
