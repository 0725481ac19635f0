"""Which number format each part of a model is kept in when it is served in a precision: what published checkpoints do.

| precision | kept in it | the rest in 16 bit |
|---|---|---|
| `fp32`, `bf16`, `fp16` | everything | |
| `int8`, `w8a8` | every linear layer, scales neglected; `w8a8`: activations of products are int8 too | router, head, embedding |
| `int4` | every linear layer, a 16-bit scale per group of 128; Kimi K2: its routed experts only, groups of 32 | the rest |
| `int4g32`, `int4g64`, `int4g128` | every linear layer, a 16-bit scale per group of so many | the rest |
| `w4a8`, `w4a8g32`, `w4a8g64`, `w4a8g128` | the same as int4 of that group; activations of products are int8 | the rest |
| `fp8` | every linear layer, scales neglected; Llama 4: MLPs only | router, head, embedding (Llama 4: attention too) |
| `fp4` | NVFP4, an fp8 scale per 16: all linear layers of a dense model, MLPs of a mixture | the rest |
| `fp4` of gpt-oss | MXFP4, a scale per 32: experts, as published; asked for fp8 or int4 it is the same | the rest |

Sources: `exclude_modules` of nvidia/DeepSeek-V3-0324-NVFP4 (`self_attn*`, `mlp.gate`, `lm_head`); `quantization_config` of Kimi-K2.5
(ignores attention, shared experts, dense MLPs, head); gpt-oss model card (arXiv 2508.10925: MoE weights in 4.25 bits); DeepSeek-V3 report
(arXiv 2412.19437: embedding, head, gating in 16 bit); llm-compressor's recipe for
Llama 4 (ignores `self_attn`, `router`, `lm_head`); nvidia/MiniMax-M2.5-NVFP4 (recipe nvfp4_experts_only).
"""

from __future__ import annotations

from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.models.architecture import Architecture, Group

_GROUPED = tuple(f"{kept}g{group}" for kept in ("int4", "w4a8") for group in (32, 64, 128))
_EIGHT_BIT = ("int8", "w8a8")
ENGINE_PRECISIONS = ("fp32", "bf16", *_EIGHT_BIT, *_GROUPED, "fp8")  # of the built-in engine
ENGINE_ALIASES = {"int4": "int4g128", "w4a8": "w4a8g128"}
QUANTIZED = (*_EIGHT_BIT, "fp8", "int4", "w4a8", *_GROUPED, "fp4")  # of linear layers: embedding, norms and KV cache stay in 16 bit
PRECISIONS = ("fp32", "bf16", "fp16", *QUANTIZED)
BYTES = {
    "fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "w8a8": 1.0, "fp8": 1.0, "int4": 0.5 + 2 / 128, "w4a8": 0.5 + 2 / 128,
    **{name: 0.5 + 2 / int(name.partition("g")[2]) for name in _GROUPED},
    "fp4": 0.5 + 1 / 16, "nvfp4": 0.5 + 1 / 16, "mxfp4": 0.5 + 1 / 32,
}  # fmt: skip
_GROUPS: tuple[Group, ...] = ("attention", "mlp", "router", "experts", "shared", "head", "embedding")
_MLPS: tuple[Group, ...] = ("mlp", "experts", "shared")
_LINEARS: tuple[Group, ...] = ("attention", *_MLPS)


def bytes_per_param(precision: str) -> float:
    """Return the bytes one weight of a linear layer takes, scales included."""
    if precision not in BYTES:
        raise BadInput(f"unknown precision {precision!r}{did_you_mean(precision, PRECISIONS)}")
    return BYTES[precision]


def formats(a: Architecture, precision: str) -> dict[Group, str]:
    """Return the number format of each group of matrices, by the table on top of this file."""
    bytes_per_param(precision)  # an unknown one says so
    spared = "bf16" if precision in QUANTIZED else precision
    quantized, kept = _quantized(a, precision)
    of: dict[Group, str] = {group: kept if group in quantized else spared for group in _GROUPS}
    if a.quantized_head and not a.tied_embeddings:
        of["head"] = kept
    return of


def group_bytes(a: Architecture, precision: str) -> dict[Group, float]:
    """Return the bytes of one parameter of each group."""
    return {group: BYTES[kept] for group, kept in formats(a, precision).items()}


def spared_bytes(precision: str) -> float:
    """Return the bytes of one value that is not quantized: activations, norms, embedding, KV cache."""
    return 2.0 if precision in QUANTIZED else bytes_per_param(precision)


def _quantized(a: Architecture, precision: str) -> tuple[tuple[Group, ...], str]:
    if precision not in QUANTIZED:
        return _GROUPS, precision
    if a.family == "gpt_oss" and precision not in _EIGHT_BIT:
        return ("experts",), "mxfp4"
    if a.family in ("kimi_k2", "kimi_k25") and precision == "int4":
        return ("experts",), "int4g32"
    if precision == "fp4":
        return _MLPS if a.experts else _LINEARS, "nvfp4"
    return _MLPS if a.family.startswith("llama4") and precision == "fp8" else _LINEARS, precision
