"""From the metrics of LLM servers to a workload: which names mean what, and what counters can tell of traffic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.types import Lengths, LengthSummary, Provenance, TrafficSummary, Workload
from mlsys_bench.workload import counters, course
from mlsys_bench.workload.burstiness import Dispersion
from mlsys_bench.workload.counters import Series
from mlsys_bench.workload.course import Counts
from mlsys_bench.workload.observe import law_of

_ASSUMED_CV = 1.0
_QUEUED_SHARE = 0.05  # of the time: beyond it the counts show the servers' pace, not the users'


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """What a server calls its metrics, the name preferred first; `_` may stand for `:` after a relay that allows no colons.

    `arrived` are counters of requests, taken as early in a request's life as there are; `at` says when that is.
    """

    name: str
    arrived: tuple[tuple[str, str], ...]
    prompt: str  # histograms of tokens
    output: str
    prompt_total: str
    output_total: str
    hits: tuple[tuple[str, str], ...]  # pairs of counters: found in the cache, looked up
    hit_gauges: tuple[str, ...]
    waiting: tuple[str, ...]
    e2e: str
    ttft: str  # histograms of seconds
    tpot: str | None  # of a request's mean, None where the engine has none
    itl: tuple[str, ...]  # of each gap; the name preferred first
    running: str
    kv: tuple[str, ...]  # gauges of the share of the cache in use
    selector: dict[str, str] = field(default_factory=dict)  # label -> the only values that count, by regular expression


ENGINES = (
    Engine(
        name="vllm",
        arrived=(("vllm:time_to_first_token_seconds_count", "at the first token"), ("vllm:request_success_total", "at the end")),
        prompt="vllm:request_prompt_tokens",
        output="vllm:request_generation_tokens",
        prompt_total="vllm:prompt_tokens_total",
        output_total="vllm:generation_tokens_total",
        hits=(
            ("vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
            ("vllm:gpu_prefix_cache_hits_total", "vllm:gpu_prefix_cache_queries_total"),  # 0.8 to 0.9
        ),
        hit_gauges=("vllm:gpu_prefix_cache_hit_rate",),  # before 0.8
        waiting=("vllm:num_requests_waiting",),
        e2e="vllm:e2e_request_latency_seconds",
        ttft="vllm:time_to_first_token_seconds",
        tpot="vllm:request_time_per_output_token_seconds",
        itl=("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),  # the second before 0.11: of each gap, too
        running="vllm:num_requests_running",
        kv=("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    ),
    Engine(
        name="sglang",
        arrived=(("sglang:time_to_first_token_seconds_count", "at the first token"), ("sglang:num_requests_total", "at the end")),
        prompt="sglang:prompt_tokens_histogram",
        output="sglang:generation_tokens_histogram",
        prompt_total="sglang:prompt_tokens_total",
        output_total="sglang:generation_tokens_total",
        hits=(("sglang:cached_tokens_total", "sglang:prompt_tokens_total"),),
        hit_gauges=("sglang:cache_hit_rate",),
        waiting=("sglang:num_queue_reqs",),
        e2e="sglang:e2e_request_latency_seconds",
        ttft="sglang:time_to_first_token_seconds",
        tpot=None,  # its time_per_output_token_seconds is another thing in every version
        itl=("sglang:inter_token_latency_seconds",),
        running="sglang:num_running_reqs",
        kv=("sglang:token_usage",),
        selector={"tp_rank": "0|"},  # ranks of one server count the same requests
    ),
    Engine(
        name="mlsys",
        arrived=(("mlsys_requests_received_total", "on arrival"), ("mlsys_requests_total", "at the end")),
        prompt="mlsys_request_prompt_tokens",
        output="mlsys_request_generation_tokens",
        prompt_total="mlsys_prompt_tokens_total",
        output_total="mlsys_generation_tokens_total",
        hits=(),
        hit_gauges=(),
        waiting=("mlsys_waiting",),
        e2e="mlsys_e2e_seconds",
        ttft="mlsys_ttft_seconds",
        tpot="mlsys_tpot_seconds",
        itl=(),
        running="mlsys_running",
        kv=(),
        selector={"outcome": "ok|rejected|cancelled|error|"},
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The series of one model's servers in a range of time: the requests at the resolution of the scrapes, the rest as it comes."""

    engine: Engine
    start_s: float
    end_s: float
    arrived_name: str
    arrived_at: str
    arrived: tuple[Series, ...]
    others: Mapping[str, tuple[Series, ...]]  # by canonical name

    def __getitem__(self, name: str) -> tuple[Series, ...]:
        """Return the series of a name, none where there are none."""
        return self.others.get(name, ())


def canonical(name: str) -> str:
    """Return a metric's name as its server spells it: relays without colons write vllm_… for vllm:…"""
    for engine in ("vllm", "sglang"):
        if name.startswith(f"{engine}_"):
            return f"{engine}:{name[len(engine) + 1 :]}"
    return name


def engine_of(names: Sequence[str], wanted: str | None, where: str) -> tuple[Engine, str, str]:
    """Return whose metrics these are, and which of them counts requests, and when.  Raises MeasurementFailed with the names looked for."""
    present = {canonical(name) for name in names}
    known = [e for e in ENGINES if wanted in (None, e.name)]
    if not known:
        raise BadInput(f"--engine {wanted}: it is one of {', '.join(e.name for e in ENGINES)}")
    found = [(e, name, at) for e in known for name, at in e.arrived if name in present]
    engines = list(dict.fromkeys(e.name for e, _, _ in found))
    if not found:
        looked_for = ", ".join(name for e in known for name, _ in e.arrived)
        near = sorted(n for n in present if n.startswith(("vllm:", "sglang:", "mlsys_")))[:5]
        seen = f"; of these servers it has only {', '.join(near)}" if near else ""
        raise MeasurementFailed(f"{where}: no requests are counted there; looked for {looked_for}{seen}; check the range and the selector")
    if len(engines) > 1:
        raise BadInput(f"{where}: holds metrics of {' and '.join(engines)}; choose one with --engine")
    return found[0]


def check_one_model(series: Sequence[Series], where: str) -> str | None:
    """Return the name of the one model that was served, None where no label tells.  Raises BadInput on several."""
    models = sorted({s.labels["model_name"] for s in series if "model_name" in s.labels})
    if len(models) > 1:
        raise BadInput(f"{where}: holds metrics of {len(models)} models ({', '.join(models)}); choose one with --model")
    return models[0] if models else None


def workload(seen: Metrics, where: str) -> Workload:
    """Return the workload that the metrics show.  Raises MeasurementFailed where they show none."""
    scrape_s = counters.scrape_s(seen.arrived)
    if scrape_s is None:
        raise MeasurementFailed(f"{where}: {seen.arrived_name} has fewer than two samples in the range; take a longer --range")
    counts, total = counters.counted(seen.arrived, seen.start_s, seen.end_s, scrape_s)
    if not total > 0 or not counts.rate_per_s > 0:
        raise MeasurementFailed(f"{where}: {seen.arrived_name} did not grow in the range: no traffic to describe")
    prompt, output = (_lengths(seen, name) for name in (seen.engine.prompt, seen.engine.output))
    found = course.dispersions(counts)
    rate, arrivals = course.law(counts, found)
    summary = _summary(seen, counts, round(total), found, prompt, output)
    model = check_one_model(seen.arrived, where)
    guessed = prompt is None or output is None
    return Workload(
        rate_per_s=rate,
        arrivals=arrivals,
        prompt_tokens=_law(seen, prompt, seen.engine.prompt_total, total),
        output_tokens=_law(seen, output, seen.engine.output_total, total),
        provenance=Provenance.ASSUMED if guessed else Provenance.MEASURED,
        source=f"{where}: {f'{model}, ' if model else ''}{summary.requests:,} requests in {summary.duration_s / course.HOUR_S:,.3g} h",
        prefix_hit_share=summary.prefix_hit_share,
        observed=summary,
    )


def _lengths(seen: Metrics, name: str) -> LengthSummary | None:
    return counters.histogram(seen[f"{name}_bucket"], seen[f"{name}_sum"], seen[f"{name}_count"], seen.start_s)


def _law(seen: Metrics, summary: LengthSummary | None, total: str, requests: float) -> Lengths:
    """Return the law of lengths: from the histogram, or with the mean of the totals and an assumed spread."""
    if summary is not None:
        return law_of(summary)
    tokens = _grown(seen, total)
    if not tokens:
        raise MeasurementFailed(f"neither {total} nor a histogram of it counts tokens there: lengths are not known")
    return Lengths(dist="lognormal", mean=max(tokens / requests, 1.0), cv=_ASSUMED_CV)


def _grown(seen: Metrics, name: str) -> float:
    return sum(float(counters.increments(one, seen.start_s).sum()) for one in seen[name])


def _summary(
    seen: Metrics, counts: Counts, requests: int, found: Sequence[Dispersion], prompt: LengthSummary | None, output: LengthSummary | None
) -> TrafficSummary:
    step_s, series = course.series(counts)
    known = [rate for rate in series if rate is not None]
    return TrafficSummary(
        requests=requests,
        duration_s=counts.known_s,
        rate_per_s=counts.rate_per_s,
        peak_rate_per_s=max(known, default=counts.rate_per_s),
        series_step_s=step_s,
        series_per_s=series,
        gap_scv=None,
        dispersion={f"{d.window_s:g}s": d.index for d in found},
        dispersion_intervals={f"{d.window_s:g}s": (d.low, d.high) for d in found},
        prompt_tokens=prompt,
        output_tokens=output,
        length_correlation=None,
        prefix_hit_share=_hit_share(seen),
        notes=tuple(_notes(seen, counts, prompt, output)),
    )


def _hit_share(seen: Metrics) -> float | None:
    for hits, queries in seen.engine.hits:
        if looked_up := _grown(seen, queries):
            return min(_grown(seen, hits) / looked_up, 1.0) if seen[hits] else None
    gauges = [s.values for name in seen.engine.hit_gauges for s in seen[name]]
    rates = np.concatenate(gauges) if gauges else np.zeros(0)
    rates = rates[rates >= 0]  # vLLM says -1 where the cache is off
    return float(rates.mean()) if len(rates) else None


def mean_e2e_s(seen: Metrics) -> float | None:
    """Return the mean time of a request, None where nobody counted."""
    n = _grown(seen, f"{seen.engine.e2e}_count")
    return _grown(seen, f"{seen.engine.e2e}_sum") / n if n else None


def _notes(seen: Metrics, counts: Counts, prompt: LengthSummary | None, output: LengthSummary | None) -> list[str]:
    notes = [f"requests are counted {seen.arrived_at} ({seen.arrived_name}), every {counts.step_s:g} s: shorter bursts are not seen"]
    e2e_s = mean_e2e_s(seen)
    if seen.arrived_at == "at the end" and e2e_s is not None and e2e_s > counts.step_s:
        notes.append(f"requests last {e2e_s:.3g} s on average, which smooths what is counted at their end in windows as short")
    if counts.is_long:
        notes.append("the dispersion is about the mean of each hour; the hours are in the series")
    gaps_s = (len(counts.counts) - 2) * counts.step_s - counts.known_s
    if gaps_s > 10 * counts.step_s:
        notes.append(
            f"nothing is known of {gaps_s / course.HOUR_S:.3g} h of the range: no samples; they count neither as traffic nor as time"
        )
    notes += [_spread_note(what, s) for what, s in (("prompt", prompt), ("output", output))]
    notes.append("metrics do not tell how prompt and output lengths go together: they are taken as independent")
    queued = _queued_share(seen)
    if queued is not None and queued > _QUEUED_SHARE:
        notes.append(f"requests waited in {100 * queued:.0f} % of the samples: counts show what was served, arrivals may burst more")
    return notes


def _spread_note(what: str, summary: LengthSummary | None) -> str:
    if summary is None:
        return f"no histogram of {what} lengths: their mean is exact, a cv of {_ASSUMED_CV:g} is assumed"
    if summary.cv_bounds is None:
        return f"some {what} lengths are beyond the last bucket of the histogram: cv and percentiles are a guess there"
    low, high = summary.cv_bounds
    return f"the cv of {what} lengths comes from histogram buckets: it lies between {low:.2f} and {high:.2f}"


def _queued_share(seen: Metrics) -> float | None:
    samples = [s.values for name in seen.engine.waiting for s in seen[name]]
    return float(np.mean(np.concatenate(samples) > 0)) if samples else None


def wanted_names(engine: Engine) -> tuple[str, ...]:
    """Return the names, beside the counter of requests, that tell something of traffic."""
    histograms = [f"{h}{s}" for h in (engine.prompt, engine.output) for s in ("_bucket", "_sum", "_count")]
    pairs = [name for pair in engine.hits for name in pair]
    others = [
        engine.prompt_total,
        engine.output_total,
        *pairs,
        *engine.hit_gauges,
        *engine.waiting,
        f"{engine.e2e}_sum",
        f"{engine.e2e}_count",
    ]
    return tuple(dict.fromkeys([*histograms, *others]))
