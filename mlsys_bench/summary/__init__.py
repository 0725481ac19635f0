"""RequestRecords -> TTFT, TPOT, ITL, E2E, throughput and goodput: one set of definitions for load tests and simulations.

Latency counts from when a request should have gone out (`scheduled_s`), so a server that stalls cannot hide its own delay.
Failed requests are counted by outcome; they are in no latency and meet no SLO.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo as limits
from mlsys_bench import stats
from mlsys_bench.summary import columns
from mlsys_bench.summary.columns import Columns
from mlsys_bench.summary.course import curve, resampled, timeline
from mlsys_bench.summary.intervals import QUANTILES, Z_90, pooled, pooled_summary, series_summary, share_interval, summary
from mlsys_bench.summary.promises import judged, keeps_all
from mlsys_bench.summary.repeats import repeated
from mlsys_bench.summary.requests import e2e_s, itl_s, lateness_s, meets_all, service_s, tpot_s, ttft_s
from mlsys_bench.summary.steady import settled, windowed
from mlsys_bench.timelines import Curve, Steadiness
from mlsys_bench.types import SLO, LatencySummary, LoadTest, RequestRecord, TenantUse, Validity

__all__ = [
    "FORMULAS",
    "QUANTILES",
    "Columns",
    "columns",
    "e2e_s",
    "itl_s",
    "lateness_s",
    "meets_all",
    "pooled_summary",
    "predicted_keys",
    "repeated",
    "resampled",
    "series_summary",
    "service_s",
    "settled",
    "summarise",
    "summary",
    "token_rate_interval",
    "tpot_s",
    "ttft_s",
    "windowed",
]  # fmt: skip

Floats = npt.NDArray[np.float64]

FORMULAS = {
    "ttft_s": "first event with tokens - scheduled send; answered requests of the window",
    "tpot_s": "(last token - first token) / (output tokens - 1), one value per request; none for a single token or one event",
    "itl_s": "gap between neighbouring tokens; k tokens in one event are k gaps of gap / k; the first event gives no gap",
    "e2e_s": "last token - scheduled send",
    "lateness_s": "own send - scheduled send, without the time to connect",
    "request_rate_per_s": "answers completed inside the window / its length, whenever they were sent",
    "output_tokens_per_s": "tokens that arrived inside the window / its length, whenever their request was sent",
    "goodput_per_s": "requests scheduled in the window that were answered and kept every latency limit of the SLO themselves / its length; "
    "an ITL limit holds for that statistic of the request's own gaps",
    "slo_met": "a percentile is held against that of all requests, those that failed last; a mean against that of the answered; undecided "
    "where too few independent requests, or those still on their way at the end, leave it open",
    "intervals": "90 %: Student for means, order statistics for percentiles, both of as many independent samples as the series is worth "
    "(batch means: requests that share a queue resemble each other); Wilson of as many for goodput; bootstrap over blocks of "
    "neighbouring requests for ITL",
}
OF_A_LOADTEST = {
    "unfinished": "an answer still on its way at the end counts in TTFT, E2E and service times with what it had taken by then: a figure "
    "that reaches so far is at least that",
    "service_ttft_s": "first event with tokens - own send",
    "service_s": "last token - own send; E2E is this, the client's lateness and a late connection",
    "chunk_gap_s": "gap between neighbouring events, however many tokens they carry",
}


def summarise(
    records: Sequence[RequestRecord] | Columns,
    *,
    source: Literal["loadtest", "simulation"],
    target: str,
    arrivals: str,
    offered_rate_per_s: float | None,
    slo: SLO | None,
    validity: Validity,
    window: tuple[float, float] | None,
    requests_file: str | None = None,
    itl: LatencySummary | None = None,
    steadiness: Steadiness | None = None,
) -> LoadTest:
    """Return what the users of one run saw.  `window` (start, end) in seconds of the run; None: all of it.

    `itl` is put in place of a summary of the gaps between tokens, for callers that have one of their own: most of the work is theirs.
    Records with `in_window` false add to the throughput inside the window and to nothing else.
    A load test also gets its service times, its timeline and curves of its latencies.
    """
    run = records if isinstance(records, Columns) else columns.of(records)
    inside = run.where(run.in_window)
    ok = inside.where(inside.ok)
    start_s, end_s = window or _span(inside)
    duration_s = end_s - start_s
    measured = source == "loadtest"
    asked = inside.where(inside.outcome != columns.OUTCOMES.index("cancelled")) if measured else inside
    kept = np.zeros(len(asked))
    kept[asked.ok] = keeps_all(ok, slo or ())
    met = int(kept.sum()) if slo else None
    told = series_summary if measured else summary
    timed = inside.where(inside.told) if measured else ok
    held = judged(inside, slo or (), independent=not measured)
    found = LoadTest(
        source=source,
        target=target,
        arrivals=arrivals,
        offered_rate_per_s=offered_rate_per_s,
        requests=len(inside),
        ok=len(ok),
        errors=_errors(inside),
        duration_s=duration_s,
        request_rate_per_s=_per_s(int((run.ok & (start_s <= run.end_s) & (run.end_s <= end_s)).sum()), duration_s),
        output_tokens_per_s=_per_s(int(run.tokens[(start_s <= run.token_s) & (run.token_s <= end_s)].sum()), duration_s),
        goodput_per_s=None if met is None else _per_s(met, duration_s),
        goodput_ratio=None if met is None or not len(asked) else met / len(asked),
        goodput_interval=None if met is None else share_interval(kept, _known(ok.e2e_s)) if measured else stats.wilson(met, len(inside)),
        slo=limits.show(slo) if slo else None,
        slo_met={key: each.met for key, each in held.items()},
        slo_seen={key: each.seen for key, each in held.items()},
        lateness_s=series_summary(_known(inside.lateness_s)) if measured else None,
        ttft_s=told(_known(timed.ttft_s)),
        tpot_s=told(_known(ok.tpot_s)),
        itl_s=pooled(*ok.gaps_s) if itl is None else itl,
        e2e_s=told(_known(timed.e2e_s)),
        validity=validity,
        requests_file=requests_file,
        formulas=dict(FORMULAS),
        output_tokens_interval=token_rate_interval(np.nan_to_num(ok.output_tokens), arrivals, duration_s),
    )
    return _detailed(found, run, inside, ok, (start_s, end_s), slo, steadiness) if measured else found


def _detailed(
    found: LoadTest, run: Columns, inside: Columns, ok: Columns, window: tuple[float, float], slo: SLO | None, steadiness: Steadiness | None
) -> LoadTest:
    """Return a load test with what only a measured run has."""
    named = np.bincount(ok.source + 1, minlength=len(columns.SOURCES) + 1)[1:]
    timed = inside.where(inside.told)
    return dataclasses.replace(
        found,
        formulas={**found.formulas, **OF_A_LOADTEST},
        tenants=tuple(_tenant(name, inside.where(inside.tenant == i), slo) for i, name in enumerate(inside.tenants)),
        service_ttft_s=series_summary(_known(timed.first_so_far_s - timed.sent_s)),
        service_s=series_summary(_known(timed.last_so_far_s - timed.sent_s)),
        chunk_gap_s=found.itl_s if ok.one_by_one else pooled(*ok.chunk_gaps_s),
        token_sources={name: int(count) for name, count in zip(columns.SOURCES, named, strict=True) if count},
        prompt_tokens_per_s=_per_s(float(np.nansum(ok.prompt_tokens)), found.duration_s),
        mean_prompt_tokens=_mean(ok.prompt_tokens),
        mean_output_tokens=_mean(ok.output_tokens),
        timeline=timeline(run, window),
        steadiness=steadiness,
        curves=_curves(ok, timed),
    )


def _curves(ok: Columns, timed: Columns) -> dict[str, Curve]:
    service_s = timed.last_so_far_s - timed.sent_s
    samples = {"ttft": timed.ttft_s, "tpot": ok.tpot_s, "itl": ok.gaps_s[0], "e2e": timed.e2e_s, "service": service_s}
    drawn = {name: curve(_known(values)) for name, values in samples.items()}
    return {name: found for name, found in drawn.items() if found is not None}


def _tenant(name: str, inside: Columns, slo: SLO | None) -> TenantUse:
    ok, timed = inside.where(inside.ok), inside.where(inside.told)
    asked = int((inside.outcome != columns.OUTCOMES.index("cancelled")).sum())
    promised = bool(slo and limits.latencies(slo)) and asked > 0
    return TenantUse(
        name=name,
        requests=len(inside),
        ok=len(ok),
        goodput_ratio=float(keeps_all(ok, slo or ()).sum()) / asked if promised else None,
        ttft_s=series_summary(_known(timed.ttft_s)),
        tpot_s=series_summary(_known(ok.tpot_s)),
        e2e_s=series_summary(_known(timed.e2e_s)),
    )


def _errors(inside: Columns) -> dict[str, int]:
    counts = np.bincount(inside.outcome, minlength=len(columns.OUTCOMES))
    return {name: int(n) for name, n in sorted(zip(columns.OUTCOMES, counts, strict=True)) if n and name != "ok"}


def token_rate_interval(output_tokens: Sequence[int] | Floats, arrivals: str, duration_s: float) -> tuple[float, float] | None:
    """Return the 90 % interval of the output tokens per second that this traffic brings in the long run.

    A window holds a random number of requests of random length: Var(total) = n Var(X) + scv n E[X]**2, with `scv` of the gaps
    (renewal reward; for Poisson arrivals that is n E[X**2], the compound Poisson law).  None for arrivals of no such law.
    """
    scv = _scv_of_gaps(arrivals)
    if scv is None or len(output_tokens) < 2 or duration_s <= 0:
        return None
    tokens = np.asarray(output_tokens, dtype=float)
    total, half = float(tokens.sum()), Z_90 * math.sqrt(len(tokens) * (tokens.var(ddof=1) + scv * tokens.mean() ** 2))
    return max(0.0, (total - half) / duration_s), (total + half) / duration_s


def _scv_of_gaps(arrivals: str) -> float | None:
    if arrivals.startswith("gamma:"):
        return float(arrivals.removeprefix("gamma:")) ** 2
    return {"poisson": 1.0, "constant": 0.0}.get(arrivals)


def predicted_keys(loadtest: LoadTest) -> dict[str, float]:
    """Return `ttft_p50_s` … `e2e_p99_s` and `throughput_tokens_per_s`; a figure the sample is too small for is left out."""
    found = {
        f"{metric}_{stat}_s": getattr(getattr(loadtest, f"{metric}_s"), stat)
        for metric in limits.LATENCIES
        for stat in ("p50", "p95", "p99")
    }
    return {**{key: value for key, value in found.items() if value is not None}, "throughput_tokens_per_s": loadtest.output_tokens_per_s}


def _span(inside: Columns) -> tuple[float, float]:
    """Return from the first scheduled send to the last thing that happened."""
    return (float(inside.scheduled_s.min()), float(inside.end_s.max())) if len(inside) else (0.0, 0.0)


def _known(values: Floats) -> Floats:
    unknown = np.isnan(values)
    known: Floats = values[~unknown] if unknown.any() else values
    return known


def _mean(values: Floats) -> float | None:
    known = _known(values)
    return float(known.mean()) if len(known) else None


def _per_s(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 and math.isfinite(duration_s) else 0.0
