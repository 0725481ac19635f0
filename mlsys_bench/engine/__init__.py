"""The built-in engine: a Llama-family decoder, quantised, over paged KV, stepped by `batching`.

    tokenizer.py  text as bytes, whole or as a stream
    weights.py    random by seed, or from a state dict
    quant.py      linear layers in fp32, bf16, int8
    kv.py         the cache;  model.py  the decoder;  sampler.py  the choice of tokens
    runner.py     a plan of `batching` as tensors;  memory.py  what this machine can hold
    engine.py     the loop: schedule, compute, sample, update

Names are loaded when asked for, so that a process that only needs the tokenizer (the HTTP server) does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlsys_bench.engine.build import default_limits
    from mlsys_bench.engine.engine import Engine, StepReport
    from mlsys_bench.engine.tokenizer import ByteTokenizer

_HOME = {"Engine": "engine", "StepReport": "engine", "default_limits": "build", "ByteTokenizer": "tokenizer"}
__all__ = ["ByteTokenizer", "Engine", "StepReport", "default_limits"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
