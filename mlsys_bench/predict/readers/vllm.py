"""`vllm bench serve --save-result` and its relatives (`sglang.bench_serving`, older `benchmark_serving.py`): one JSON object a run.

Field names as in vllm/benchmarks/serve.py: `mean_ttft_ms`, `median_tpot_ms`, `p99_itl_ms`, `p99_e2el_ms` (sglang: `mean_e2e_latency_ms`),
`request_rate` ("inf" for none), `max_concurrency`, `burstiness`, `total_input_tokens`, `completed`, `failed`; with `--save-detailed` also
`input_lens`, `output_lens`, `ttfts` and `itls` per request, in seconds.  `--append-result` puts one object on each line.

Without a rate all requests are sent at once: a closed loop of as many users as the cap lets in, or as there are requests.  Traps: with
`ramp_up_strategy` the rate is "inf", too, and rises; so it is with vLLM's timed traces, of which only `max_concurrent_requests` tells
(sglang writes "trace").  sglang counts no failures, and keeps what the server said of itself in `server_info`.  Drafted tokens: vLLM's
`spec_decode_...` fields, sglang's `accept_length`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from mlsys_bench.predict.readers.parts import (
    Run,
    at,
    figures,
    first,
    lengths,
    lengths_of,
    number,
    under_cap,
    whole,
    whole_or_none,
    without_chunk_gaps,
)

NAME = "vllm bench serve"
_FIGURE = re.compile(r"(mean|median|p\d+(?:\.\d+)?)_(ttft|tpot|itl|e2el|e2e_latency)_ms")
_METRIC = {"e2el": "e2e", "e2e_latency": "e2e"}
_ENGINES = {
    **dict.fromkeys(("vllm", "vllm-chat"), "vllm"),
    **dict.fromkeys(("sglang", "sglang-oai", "sglang-native"), "sglang"),
    "tensorrt-llm": "trtllm",
}
_METADATA = {  # keys that people give with --metadata, as texts
    "tp": ("tensor_parallel_size", "tp_size", "tp"), "pp": ("pipeline_parallel_size", "pp_size", "pp"),
    "device": ("gpu", "gpu_name", "gpu_type"),
}  # fmt: skip
_SAID = {"model": "model_path", "tp": "tp_size", "pp": "pp_size", "ep": "ep_size"}  # by sglang's server of itself
_AT_ONCE = 0.5  # of the users in flight at the peak: fewer, and requests were not sent as soon as they could be
_DRAFTED = ("spec_decode_acceptance_length", "spec_decode_acceptance_rate", "spec_decode_num_drafts")


def knows(document: Any) -> bool:
    """Say whether this is such a result."""
    return isinstance(document, Mapping) and {"completed", "total_input_tokens", "mean_ttft_ms"} <= set(document)


def runs(document: Mapping[str, Any], where: str) -> list[Run]:
    """Return the one run of the object."""
    completed = whole(document["completed"], "completed")
    failed = first(whole_or_none(document.get("failed"), "failed"), max(0, _sent(document, completed) - completed))
    if not completed:
        return [Run(prompt_tokens=lengths(1.0), output_tokens=lengths(1.0), measured={}, requests=0, failed=failed)]
    measured, prompts, outputs = _detailed(document) or _summary(document)
    measured, notes = without_chunk_gaps(measured)
    cap = whole_or_none(document.get("max_concurrency"), "max_concurrency")
    rate, users, capped = under_cap(_rate(document["request_rate"]), cap, _in_flight(document, measured))
    sent = completed + failed
    users = None if rate is not None else min(users or sent, sent)
    uneven = _uneven(document, users)
    return [
        Run(
            prompt_tokens=prompts,
            output_tokens=outputs,
            rate_per_s=rate,
            arrivals=_arrivals(document.get("burstiness")),
            concurrency=None if uneven else users,
            sent=sent,
            measured=measured,
            requests=completed,
            failed=failed,
            duration_s=number(document.get("duration")),
            design=_design(document),
            uneven=uneven,
            notes=(*notes, *capped),
        )
    ]


def _rate(value: Any) -> float | None:
    """Return the rate asked for, None where there was none.  Raises ValueError for what is no rate."""
    if value == math.inf or str(value) in ("inf", "trace"):
        return None
    if number(value) is None:
        raise ValueError(f"request_rate is {value!r}, no rate")
    return number(value)


def _uneven(document: Mapping[str, Any], users: int | None) -> str | None:
    """Return why neither a rate nor a number of users stands for the run, None where one does."""
    if document.get("ramp_up_strategy"):
        return f"its rate rose from {document.get('ramp_up_start_rps')} to {document.get('ramp_up_end_rps')}/s"
    if document["request_rate"] == "trace":
        return "its requests followed the times of a trace"
    peak = number(document.get("max_concurrent_requests"))
    if users is not None and peak and peak < _AT_ONCE * users:
        return f"at most {peak:.0f} of {users} requests were in flight, so they were not sent at once but by times of their own"
    return None


def _sent(document: Mapping[str, Any], completed: int) -> int:
    asked = document.get("num_prompts")
    return whole(asked, "num_prompts") if asked else max(completed, len(document.get("output_lens") or ()))


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


def _arrivals(burstiness: Any) -> str:
    """Return the arrival law: burstiness is the shape of gamma gaps, 1 is Poisson, without end it is a metronome."""
    if burstiness == math.inf or str(burstiness) == "inf":
        return "constant"
    shape = number(burstiness)
    return "poisson" if shape is None or shape == 1 or shape <= 0 else f"gamma:{1 / math.sqrt(shape):.6g}"


def _design(document: Mapping[str, Any]) -> dict[str, Any]:
    backend = str(first(document.get("backend"), document.get("endpoint_type"), ""))
    said = {name: at(document, "server_info", key) for name, key in _SAID.items()}
    named = first(document.get("model_id"), document.get("model"), said["model"])
    found = {**said, "model": named, "engine": _ENGINES.get(backend), **_metadata(document)}
    drafted = any(number(document.get(name)) is not None for name in _DRAFTED) or (number(document.get("accept_length")) or 0.0) > 1
    return {name: value for name, value in found.items() if value not in (None, "")} | ({"speculative": "drafts"} if drafted else {})


def _metadata(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `--metadata KEY=VALUE` says of the system.  Raises ValueError where two keys differ."""
    found: dict[str, Any] = {}
    for name, keys in _METADATA.items():
        said = {str(document[key]) for key in keys if document.get(key) not in (None, "")}
        if len(said) > 1:
            raise ValueError(f"{' and '.join(keys)} are {' and '.join(sorted(said))}")
        for value in said:
            found[name] = value if name == "device" else int(value)
    return found
