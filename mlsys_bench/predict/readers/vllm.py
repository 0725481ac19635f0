"""`vllm bench serve --save-result` and its relatives (`sglang.bench_serving`, older `benchmark_serving.py`): one JSON object a run.

Field names as in vllm/benchmarks/serve.py: `mean_ttft_ms`, `median_tpot_ms`, `p99_itl_ms`, `p99_e2el_ms` (sglang: `mean_e2e_latency_ms`),
`request_rate` ("inf" for none), `max_concurrency`, `burstiness`, `total_input_tokens`, `completed`, `failed`; with `--save-detailed` also
`input_lens`, `output_lens`, `ttfts` and `itls` per request, in seconds.  `--append-result` puts one object on each line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mlsys_bench.predict.readers.parts import Run, figures, first, lengths, lengths_of, number, without_chunk_gaps

NAME = "vllm bench serve"
_FIGURE = re.compile(r"(mean|median|p\d+(?:\.\d+)?)_(ttft|tpot|itl|e2el|e2e_latency)_ms")
_METRIC = {"e2el": "e2e", "e2e_latency": "e2e"}
_ENGINES = {
    **dict.fromkeys(("vllm", "vllm-chat"), "vllm"),
    **dict.fromkeys(("sglang", "sglang-oai", "sglang-native"), "sglang"),
    "tensorrt-llm": "trtllm",
}
_ALL_SEATS = 0.9  # of the allowed concurrency in use: the cap, not the rate, sets the load


def knows(document: Any) -> bool:
    """Say whether this is such a result."""
    return isinstance(document, Mapping) and {"completed", "total_input_tokens", "mean_ttft_ms"} <= set(document)


def runs(document: Mapping[str, Any], where: str) -> list[Run]:
    """Return the one run of the object."""
    measured, prompts, outputs = _detailed(document) or _summary(document)
    measured, notes = without_chunk_gaps(measured)
    completed = int(document["completed"])
    rate, cap = number(document.get("request_rate")), document.get("max_concurrency")
    if rate is not None and cap and _in_flight(document, measured) >= _ALL_SEATS * cap:
        notes = (*notes, f"{cap} requests were in flight nearly all the time: the cap, not {rate:g}/s, was the load")
        rate = None
    return [
        Run(
            prompt_tokens=prompts,
            output_tokens=outputs,
            rate_per_s=rate,
            arrivals=_arrivals(number(document.get("burstiness"))),
            concurrency=None if rate is not None or not cap else int(cap),
            measured=measured,
            requests=completed,
            failed=int(first(document.get("failed"), max(0, int(document.get("num_prompts") or completed) - completed))),
            duration_s=number(document.get("duration")),
            design=_design(document),
            notes=notes,
        )
    ]


def _detailed(document: Mapping[str, Any]) -> tuple[dict[str, float], Any, Any] | None:
    """Return figures and lengths from the values of each request, where the file has them."""
    if not all(document.get(name) for name in ("input_lens", "output_lens", "ttfts", "itls")):
        return None
    rows = zip(document["input_lens"], document["output_lens"], document["ttfts"], document["itls"], strict=True)
    ok = [(int(i), int(o), float(t), sum(g), g) for i, o, t, g in rows if o and t]
    measured = {
        **figures("ttft", [t for _, _, t, _, _ in ok]),
        **figures("tpot", [total / (o - 1) for _, o, _, total, _ in ok if o > 1]),
        **figures("itl", [gap for row in ok for gap in row[4]]),
        **figures("e2e", [t + total for _, _, t, total, _ in ok]),
    }
    return measured, lengths_of([row[0] for row in ok]), lengths_of([row[1] for row in ok])


def _summary(document: Mapping[str, Any]) -> tuple[dict[str, float], Any, Any]:
    measured = {}
    for key, value in document.items():
        found, ms = _FIGURE.fullmatch(key), number(value)
        if found and isinstance(value, str):
            raise ValueError(f"{key} is {value!r}, no number")
        if found and ms:
            stat = "p50" if found[1] == "median" else found[1]
            measured[f"{_METRIC.get(found[2], found[2])}_{stat}_s"] = ms / 1e3
    n = int(document["completed"]) or 1
    return measured, lengths(document["total_input_tokens"] / n), lengths(document["total_output_tokens"] / n)


def _in_flight(document: Mapping[str, Any], measured: Mapping[str, float]) -> float:
    """Return the mean number of requests in flight, by Little's law; 0 where it cannot be told."""
    throughput, tpot = number(document.get("request_throughput")), measured.get("tpot_mean_s")
    if throughput is None or tpot is None or "ttft_mean_s" not in measured:
        return 0.0
    outputs: float = document["total_output_tokens"] / (int(document["completed"]) or 1)
    return throughput * measured.get("e2e_mean_s", measured["ttft_mean_s"] + tpot * (outputs - 1))


def _arrivals(burstiness: float | None) -> str:
    """Return the arrival law: burstiness is the shape of gamma gaps, 1 is Poisson."""
    return "poisson" if burstiness is None or burstiness == 1 or burstiness <= 0 else f"gamma:{1 / math.sqrt(burstiness):.6g}"


def _design(document: Mapping[str, Any]) -> dict[str, Any]:
    backend = str(first(document.get("backend"), document.get("endpoint_type"), ""))
    found = {"model": first(document.get("model_id"), document.get("model")), "engine": _ENGINES.get(backend)}
    return {name: value for name, value in found.items() if value}
