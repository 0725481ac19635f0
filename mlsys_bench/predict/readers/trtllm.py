"""`trtllm-bench throughput|latency --report_json`: one run with its engine and machine.

As in tensorrt_llm/bench/dataclasses/reporting.py: `engine`, `machine`, `world_info`, `request_info`, `performance`, and with streaming
`streaming_metrics`.  Its percentiles are in milliseconds under minimum, maximum, average, p50, p90, p95, p99.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlsys_bench.errors import BadInput
from mlsys_bench.predict.readers.parts import STATS, Run, at, first, lengths, number, whole

NAME = "trtllm-bench"
_PRECISION = {"FP8": "fp8", "NVFP4": "fp4", "W4A16_AWQ": "int4", "W4A16": "int4", "W8A8_SQ_PER_CHANNEL": "int8", "INT8": "int8"}
_DTYPE = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def knows(document: Any) -> bool:
    """Say whether this is such a report."""
    return all(isinstance(at(document, name), Mapping) for name in ("engine", "world_info", "request_info", "performance"))


def runs(document: Mapping[str, Any], where: str) -> list[Run]:
    """Return the one run of a report."""
    asked, streaming = document["request_info"], document.get("streaming_metrics") or {}
    in_flight = number(asked.get("avg_num_concurrent_requests"))
    if in_flight is None:
        raise BadInput(f"{where}: request_info.avg_num_concurrent_requests is missing; which load was it?")
    measured = _percentiles("e2e", at(document, "performance", "request_latency_percentiles_ms"))
    measured |= _percentiles("ttft", streaming.get("ttft_percentiles")) | _percentiles("tpot", streaming.get("tpot_percentiles"))
    notes = () if streaming else ("run without --streaming: no TTFT and no TPOT, only end-to-end latency",)
    return [
        Run(
            prompt_tokens=lengths(float(asked["avg_input_length"])),
            output_tokens=lengths(float(asked["avg_output_length"])),
            concurrency=max(1, round(in_flight)),
            measured=measured,
            requests=whole(asked["num_requests"], "num_requests"),
            design=_design(document),
            notes=notes,
        )
    ]


def _percentiles(metric: str, values: Any) -> dict[str, float]:
    if not isinstance(values, Mapping):
        return {}
    figures = {"mean": number(values.get("average")), **{p: number(values.get(p)) for p in STATS}}
    return {f"{metric}_{stat}_s": ms / 1e3 for stat, ms in figures.items() if ms}


def _design(document: Mapping[str, Any]) -> dict[str, Any]:
    engine, world = document["engine"], document["world_info"]
    drafts = at(document, "decoding_stats", "mode")
    found = {
        "model": engine.get("model"),
        "device": at(document, "machine", "name"),
        "engine": "trtllm",
        "engine_version": engine.get("version"),
        "precision": first(_PRECISION.get(str(engine.get("quantization")).upper()), _DTYPE.get(str(engine.get("dtype")))),
        "tp": world.get("tp_size"),
        "pp": world.get("pp_size"),
        "ep": world.get("ep_size"),
        "max_seqs": world.get("max_batch_size"),
        "max_step_tokens": world.get("max_num_tokens"),
        "speculative": str(drafts).lower() if drafts else None,
    }
    return {name: value for name, value in found.items() if value is not None}
