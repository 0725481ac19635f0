"""RequestRecords -> TTFT, TPOT, ITL, E2E, throughput and goodput: one set of definitions for load tests and simulations.

Latency counts from when a request should have gone out (`scheduled_s`), so a server that stalls cannot hide its own delay.
Failed requests are counted by outcome; they are in no latency and meet no SLO.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlsys_bench import slo as limits
from mlsys_bench import stats
from mlsys_bench.types import SLO, LatencySummary, Limit, LoadTest, RequestRecord, Validity

Floats = npt.NDArray[np.float64]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
FORMULAS = {
    "ttft_s": "first event with tokens - scheduled send; answered requests of the window",
    "tpot_s": "(last token - first token) / (output tokens - 1), one value per request; none for a single token",
    "itl_s": "gap between neighbouring tokens; k tokens in one event are k gaps of gap / k; the first event gives no gap",
    "e2e_s": "last token - scheduled send",
    "lateness_s": "own send - scheduled send, without the time to connect",
    "request_rate_per_s": "answers completed inside the window / its length, whenever they were sent",
    "output_tokens_per_s": "tokens that arrived inside the window / its length, whenever their request was sent",
    "goodput_per_s": "requests scheduled in the window that were answered and kept every latency limit of the SLO themselves / its length; "
    "an ITL limit holds for that statistic of the request's own gaps",
    "intervals": "90 %: Student for means, order statistics for percentiles (taking requests as independent), Wilson for goodput, "
    "bootstrap over requests for ITL, whose values within a request depend on each other",
}
Z_90 = 1.6449  # of a two-sided normal interval
_BLOCKS = 200  # of neighbouring requests, resampled together
_RESAMPLES = 200
_BINS = 4096  # of equal count, only for the bootstrap: p99 is still resolved to 1/40 of its tail


def summarise(
    records: Sequence[RequestRecord],
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
) -> LoadTest:
    """Return what the users of one run saw.  `window` (start, end) in seconds of the run; None: all of it.

    `itl` is put in place of a summary of the gaps between tokens, for callers that have one of their own: most of the work is theirs.
    Records with `in_window` false add to the throughput inside the window and to nothing else.
    """
    inside = [r for r in records if r.in_window]
    ok = sorted((r for r in inside if r.outcome == "ok"), key=lambda r: r.scheduled_s)
    start_s, end_s = window or _span(inside)
    duration_s = end_s - start_s
    answered = sum(r.outcome == "ok" and start_s <= _end_s(r) <= end_s for r in records)
    met = sum(meets_all(r, slo) for r in ok) if slo else None
    samples = _samples(ok)
    gaps = [itl_s(r) for r in ok] if itl is None or any(limit.metric == "itl" for limit in slo or ()) else []
    late = _present(lateness_s(r) for r in inside)
    return LoadTest(
        source=source,
        target=target,
        arrivals=arrivals,
        offered_rate_per_s=offered_rate_per_s,
        requests=len(inside),
        ok=len(ok),
        errors=dict(sorted(Counter(r.outcome for r in inside if r.outcome != "ok").items())),
        duration_s=duration_s,
        request_rate_per_s=_per_s(answered, duration_s),
        output_tokens_per_s=_per_s(_tokens_between(records, start_s, end_s), duration_s),
        goodput_per_s=None if met is None else _per_s(met, duration_s),
        goodput_ratio=None if met is None or not inside else met / len(inside),
        goodput_interval=None if met is None else stats.wilson(met, len(inside)),
        slo=limits.show(slo) if slo else None,
        slo_met={limits.key(limit): _judged(limit, inside, ok, slo or (), samples, gaps) for limit in slo or ()},
        lateness_s=summary(late) if source == "loadtest" else None,
        ttft_s=summary(samples["ttft"]),
        tpot_s=summary(samples["tpot"]),
        itl_s=pooled_summary(gaps) if itl is None else itl,
        e2e_s=summary(samples["e2e"]),
        validity=validity,
        requests_file=requests_file,
        formulas=dict(FORMULAS),
        output_tokens_interval=token_rate_interval([r.output_tokens or 0 for r in ok], arrivals, duration_s),
    )


def token_rate_interval(output_tokens: Sequence[int], arrivals: str, duration_s: float) -> tuple[float, float] | None:
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


# ---------------------------------------------------------------- one request


def ttft_s(record: RequestRecord) -> float | None:
    """Return the time from the scheduled send to the first token."""
    return record.token_s[0] - record.scheduled_s if record.token_s else None


def e2e_s(record: RequestRecord) -> float | None:
    """Return the time from the scheduled send to the last token."""
    return record.token_s[-1] - record.scheduled_s if record.token_s else None


def tpot_s(record: RequestRecord) -> float | None:
    """Return the mean time per token after the first, or None for a single token."""
    tokens = record.output_tokens if record.output_tokens is not None else sum(record.tokens_per_event)
    return (record.token_s[-1] - record.token_s[0]) / (tokens - 1) if record.token_s and tokens > 1 else None


def itl_s(record: RequestRecord) -> Floats:
    """Return the gaps between neighbouring tokens.  An event with k tokens gives k gaps of gap / k.

    Tokens beyond the first in the first event arrived with it: when they were made cannot be known, so they give no gap.
    """
    gaps = np.diff(np.asarray(record.token_s, dtype=float))
    counts = np.asarray(record.tokens_per_event[1 : 1 + len(gaps)], dtype=int)
    return np.repeat(gaps / np.maximum(counts, 1), counts)


def lateness_s(record: RequestRecord) -> float | None:
    """Return how late the client itself was; the time to connect is the server's and the network's."""
    return None if record.sent_s is None else record.sent_s - record.scheduled_s - record.stage_s.get("connect", 0.0)


def meets_all(record: RequestRecord, slo: SLO) -> bool:
    """Say whether one answered request kept every latency limit itself.  What a request does not have cannot break a limit."""
    values = {"ttft": ttft_s(record), "tpot": tpot_s(record), "e2e": e2e_s(record)}
    for limit in limits.latencies(slo):
        if limit.tenant not in (None, record.tenant):
            continue
        value = _stat(itl_s(record), limit.stat) if limit.metric == "itl" else values[limit.metric]
        if value is not None and not limits.meets(limit, value):
            return False
    return True


# ---------------------------------------------------------------- many


def summary(values: Floats) -> LatencySummary:
    """Return mean and percentiles of independent values with their intervals, and say which the sample is too small for."""
    intervals = {name: stats.quantile_interval(values, p) for name, p in QUANTILES.items()}
    intervals["mean"] = stats.mean_interval(values)
    return _latency_summary(values, intervals)


def pooled_summary(groups: Sequence[Floats]) -> LatencySummary:
    """Return the same of values that depend on each other within a group, here the gaps of one request.

    Intervals come from a bootstrap over blocks of neighbouring requests, each request its own block up to 200 of them.
    """
    filled = [group for group in groups if len(group)]
    values = np.concatenate(filled) if filled else np.zeros(0)
    if len(filled) < stats.enough_for_quantile(0.5):
        return _latency_summary(values, {})
    enough = {name: p for name, p in QUANTILES.items() if len(values) >= stats.enough_for_quantile(p)}
    return _latency_summary(values, _block_bootstrap(filled, values, enough))


def _latency_summary(values: Floats, intervals: dict[str, tuple[float, float] | None]) -> LatencySummary:
    known = {name: interval for name, interval in intervals.items() if interval is not None}
    enough = len(values) >= 2
    figures = {name: stats.quantile(values, p) for name, p in QUANTILES.items() if enough and (name == "p50" or name in known)}
    if enough:
        figures["mean"] = float(values.mean())
    return LatencySummary(
        count=len(values),
        **{name: figures.get(name) for name in ("mean", *QUANTILES)},
        intervals=known,
        too_few=tuple(name for name in ("mean", *QUANTILES) if name not in figures),
    )


def _block_bootstrap(groups: Sequence[Floats], values: Floats, quantiles: dict[str, float]) -> dict[str, tuple[float, float] | None]:
    """Return bootstrap intervals of mean and quantiles, resampling blocks of groups.  values: the groups, one after another."""
    blocks = min(len(groups), _BLOCKS)
    block = np.repeat(np.arange(len(groups)) * blocks // len(groups), [len(group) for group in groups])
    order = np.argsort(values, kind="stable")
    bins = min(len(values), _BINS)
    at = np.arange(len(values)) * bins // len(values)  # bin of each ordered value
    top = values[order][np.append(np.flatnonzero(np.diff(at)), len(values) - 1)]  # largest value of each bin
    counts = np.bincount(block[order] * bins + at, minlength=blocks * bins).reshape(blocks, bins)
    drawn = np.random.default_rng(0).multinomial(blocks, np.full(blocks, 1 / blocks), size=_RESAMPLES)  # [R, blocks]
    below = np.cumsum(drawn.astype(float) @ counts, axis=1)  # [R, bins]
    found = {name: top[np.argmax(below >= p * below[:, -1:], axis=1)] for name, p in quantiles.items()}
    found["mean"] = (drawn @ np.bincount(block, values, minlength=blocks)) / below[:, -1]
    tail = (1 - stats.LEVEL) / 2
    return {name: (float(low), float(high)) for name, (low, high) in ((n, np.quantile(v, [tail, 1 - tail])) for n, v in found.items())}


def _samples(ok: Sequence[RequestRecord]) -> dict[str, Floats]:
    return {"ttft": _present(ttft_s(r) for r in ok), "tpot": _present(tpot_s(r) for r in ok), "e2e": _present(e2e_s(r) for r in ok)}


def _judged(
    limit: Limit,
    inside: Sequence[RequestRecord],
    ok: Sequence[RequestRecord],
    slo: SLO,
    samples: dict[str, Floats],
    gaps: Sequence[Floats],
) -> bool | None:
    """Say whether a limit was kept, for the requests of its tenant where it names one."""
    if limit.tenant is not None:
        inside, ok = ([r for r in some if r.tenant == limit.tenant] for some in (inside, ok))
        samples, gaps = _samples(ok), [itl_s(r) for r in ok] if limit.metric == "itl" else []
    met = sum(meets_all(r, slo) for r in ok) if limit.metric == "goodput" else None
    return _kept(limit, samples, gaps, len(inside), len(ok), met)


def _kept(limit: Limit, samples: dict[str, Floats], gaps: Sequence[Floats], requests: int, ok: int, met: int | None) -> bool | None:
    """Say whether a limit was kept, or None where the sample is too small to say."""
    if limit.metric in limits.SHARES:
        good = met if limit.metric == "goodput" else ok
        return limits.meets(limit, good / requests) if requests and good is not None else None
    values = np.concatenate([*gaps, np.zeros(0)]) if limit.metric == "itl" else samples[limit.metric]
    needed = 2 if limit.stat in ("mean", "p50") else stats.enough_for_quantile(_p(limit.stat))
    value = _stat(values, limit.stat) if len(values) >= needed else None
    return None if value is None else limits.meets(limit, value)


def _stat(values: Floats, stat: str) -> float | None:
    if not len(values):
        return None
    return float(values.mean()) if stat == "mean" else stats.quantile(values, _p(stat))


def _p(stat: str) -> float:
    return float(stat.removeprefix("p")) / 100


def _tokens_between(records: Sequence[RequestRecord], start_s: float, end_s: float) -> int:
    """Return the tokens that arrived in the window, of every request, failed ones too: the server did make them."""
    return sum(k for r in records for t, k in zip(r.token_s, r.tokens_per_event, strict=True) if start_s <= t <= end_s)


def _span(records: Sequence[RequestRecord]) -> tuple[float, float]:
    """Return from the first scheduled send to the last thing that happened."""
    if not records:
        return 0.0, 0.0
    return min(r.scheduled_s for r in records), max(_end_s(r) for r in records)


def _end_s(record: RequestRecord) -> float:
    """Return when a request was over, as far as is known."""
    return max((record.scheduled_s, record.done_s or 0.0, *record.token_s[-1:]))


def _present(values: Iterable[float | None]) -> Floats:
    return np.array([v for v in values if v is not None], dtype=np.float64)


def _per_s(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 and math.isfinite(duration_s) else 0.0
