"""AIPerf's and GenAI-Perf's `profile_export_*.json` and `.csv`: metrics by name, each with `unit`, `avg`, `p50`, `std` …

As in aiperf/common/models/export_models.py: every metric is a mapping with a unit; `inter_token_latency` there is
(request latency - time to first token) / (output tokens - 1), one value a request: our TPOT.  Trap: it counts tokens with a tokenizer of
its own, without the chat template; the server's `usage_…` counts stand beside and are taken.  The load stands in `input_config`:
`phases[…]` (0.13), `loadgen` (0.1 to 0.12) or `perf_analyzer.stimulus` (GenAI-Perf).  Trap: `concurrency` is the load of a phase of that
type alone; a trace replayed or a rate with a course has it as a cap.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mlsys_bench.errors import BadInput
from mlsys_bench.predict.readers.parts import STATS, Run, at, first, lengths, number, under_cap, whole, whole_or_none

NAME = "AIPerf"
_SCALE = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0}
_METRICS = {"time_to_first_token": "ttft", "inter_token_latency": "tpot", "request_latency": "e2e"}
_CSV_NAMES = {
    "time to first token": "time_to_first_token",
    "inter token latency": "inter_token_latency",
    "request latency": "request_latency",
    "output sequence length": "output_sequence_length",
    "input sequence length": "input_sequence_length",
    "request count": "request_count",
    "error request count": "error_request_count",
    "request throughput": "request_throughput",
}
_PROMPT, _OUTPUT = ("usage_prompt_tokens", "input_sequence_length"), ("usage_completion_tokens", "output_sequence_length")
_COUNTED_ALIKE = 0.02  # difference of two counts of an answer's tokens up to which they are one
_CHANGING = ("rate_series", "adaptive_scale")
_LAWS = {"poisson": "poisson", "constant": "constant"}


def knows(document: Any) -> bool:
    """Say whether this is such an export."""
    return isinstance(document, Mapping) and all(
        at(document, name, "avg") is not None for name in ("request_latency", "input_sequence_length")
    )


def from_csv(text: str) -> dict[str, Any] | None:
    """Return an exported table as the JSON export would give it, or None when it is no such table."""
    document: dict[str, Any] = {}
    header: list[str] = []
    for row in csv.reader(io.StringIO(text)):
        if row and row[0] == "Metric":
            header = row
        elif row and header:
            name, _, unit = row[0].partition(" (")
            key = _CSV_NAMES.get(name.strip().lower())
            if key:
                cells = {"avg" if k == "Value" else k: _float(v) for k, v in zip(header[1:], row[1:], strict=False)}
                document[key] = {"unit": unit.rstrip(")"), **cells}
    return document if knows(document) else None


def runs(document: Mapping[str, Any], where: str) -> list[Run]:
    """Return the one run of an export."""
    if document.get("is_complete") is False:
        raise BadInput(f"{where}: AIPerf says the run is not complete: {document.get('incomplete_reason')}; run it again")
    measured, recounted = _recounted(_measured(document, where), document)
    answered = whole_or_none(first(at(document, "request_count", "avg"), at(document, "request_latency", "count")), "request_count")
    phases = _phases(document)
    rate, arrivals, cap = _load(document, phases)
    uneven = _uneven(phases)
    rate, cap = (None, None) if uneven else (rate, cap)
    in_flight = (number(at(document, "request_throughput", "avg")) or 0.0) * measured.get("e2e_mean_s", 0.0)
    rate, concurrency, capped = under_cap(rate, cap, in_flight)
    notes = ("AIPerf was cancelled: figures of a part of the run",) if document.get("was_cancelled") else ()
    return [
        Run(
            prompt_tokens=_lengths(document, _PROMPT),
            output_tokens=_lengths(document, _OUTPUT),
            rate_per_s=rate,
            arrivals=arrivals,
            concurrency=concurrency,
            measured=measured,
            requests=answered,
            failed=whole(first(at(document, "error_request_count", "avg"), 0), "error_request_count"),
            duration_s=_duration_s(document),
            uneven=uneven,
            design=_design(document),
            notes=(*notes, *recounted, *capped),
        )
    ]


def _measured(document: Mapping[str, Any], where: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for metric, name in _METRICS.items():
        values = document.get(metric)
        if not isinstance(values, Mapping) or number(values.get("avg")) is None:
            continue
        scale = _SCALE.get(str(values.get("unit")).strip().lower())
        if scale is None:
            raise BadInput(f"{where}: {metric} has the unit {values.get('unit')!r}; known: {', '.join(_SCALE)}")
        stats = {"mean": number(values.get("avg")), **{p: number(values.get(p)) for p in STATS}}
        found |= {f"{name}_{stat}_s": value * scale for stat, value in stats.items() if value is not None}
    return found


def _recounted(measured: dict[str, float], document: Mapping[str, Any]) -> tuple[dict[str, float], tuple[str, ...]]:
    """Return the figures with TPOT by the tokens that the server counted, and what to say where AIPerf counted others."""
    own, server = (number(at(document, name, "avg")) for name in reversed(_OUTPUT))
    if own is None or server is None or min(own, server) <= 1 or abs(own / server - 1) <= _COUNTED_ALIKE:
        return measured, ()
    factor = (own - 1) / (server - 1)
    note = f"AIPerf's tokenizer counts {own:.4g} tokens an answer, the server {server:.4g}: the times per token are by the server's count"
    return {name: value * factor if name.startswith("tpot") else value for name, value in measured.items()}, (note,)


def _lengths(document: Mapping[str, Any], metrics: tuple[str, str]) -> Any:
    metric = next((name for name in metrics if at(document, name, "avg") is not None), metrics[-1])
    return lengths(float(at(document, metric, "avg") or 1.0), number(at(document, metric, "std")), number(at(document, metric, "max")))


def _phases(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the phases whose requests are in the figures; none where the file is older than phases."""
    config = document.get("input_config") or {}
    phases = config.get("phases") or ([config["profiling"]] if isinstance(config.get("profiling"), Mapping) else [])
    return [p for p in phases if "warmup" not in (p.get("name"), p.get("kind")) and not p.get("exclude_from_results")]


def _uneven(phases: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why no one load stands for these phases, None where one does."""
    if len(phases) > 1:
        return f"it had {len(phases)} phases in one set of figures"
    phase = phases[0] if phases else {}
    if phase.get("type") == "fixed_schedule":
        return "its requests followed the times of a trace"
    changed = next((name for name in _CHANGING if phase.get(name)), None)
    return f"its load changed on the way ({changed})" if changed else None


def _load(document: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> tuple[float | None, str, int | None]:
    """Return rate, arrivals and the most requests in flight as the input configuration gives them."""
    config = document.get("input_config") or {}
    phase = phases[0] if phases else {}
    loadgen, stimulus = config.get("loadgen") or {}, at(config, "perf_analyzer", "stimulus") or {}
    rate = number(first(phase.get("rate"), loadgen.get("request_rate"), stimulus.get("request_rate"), config.get("request_rate")))
    law = str(first(phase.get("type"), loadgen.get("arrival_pattern"), loadgen.get("request_rate_mode"), "poisson"))
    if law == "gamma":
        shape = first(number(phase.get("smoothness")), number(loadgen.get("arrival_smoothness")), 1.0)
        law = f"gamma:{shape**-0.5:.6g}"
    concurrency = first(phase.get("concurrency"), loadgen.get("concurrency"), stimulus.get("concurrency"), config.get("concurrency"))
    arrivals = law if law.startswith("gamma:") else _LAWS.get(law, "poisson")
    return rate, arrivals, whole_or_none(concurrency, "concurrency")


def _design(document: Mapping[str, Any]) -> dict[str, Any]:
    config = document.get("input_config") or {}
    names = first(at(config, "endpoint", "model_names"), config.get("model_names"), config.get("models"), config.get("model"))
    name = first(at(names, "items", 0, "name"), at(names, 0, "name"), at(names, 0), names)
    found = {"model": name if isinstance(name, str) else None, "device": _gpu(document)}
    return {key: value for key, value in found.items() if value}


def _duration_s(document: Mapping[str, Any]) -> float | None:
    """Return how long the requests took together, by their number and their rate."""
    n, rate = number(at(document, "request_count", "avg")), number(at(document, "request_throughput", "avg"))
    return n / rate if n and rate else None


def _gpu(document: Mapping[str, Any]) -> str | None:
    """Return the name of the GPU that telemetry saw, where it saw one kind."""
    ends = at(document, "telemetry_data", "endpoints") or {}
    names = {str(gpu.get("gpu_name")) for end in ends.values() for gpu in (end.get("gpus") or {}).values()}
    return names.pop() if len(names) == 1 else None


def _float(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None
