"""The built-in engine: decoders of several families, quantised, over paged KV, stepped by `batching`.

    spec.py, rope.py             what computing a decoder needs to know beyond its shape
    checkpoint.py, schemes.py, packed.py    a model in a folder, also one that others have quantised
    weights.py, formats.py       a model's matrices and vectors, and the formats they are kept in
    tokenizer.py, vocabulary.py  text to tokens and back, as bytes or by a model's own tokenizer
    model.py, quant.py           the decoder in torch;  native/ in C;  gpu/ in Triton;  encoder.py  embeddings
    kv.py, runner.py, sampler.py the cache; a plan of `batching` as arrays; the choice of tokens
    memory.py, build.py          what this machine can hold; from a name to a model and its cache
    prefix.py, swap.py, speculate.py    blocks that are shared, moved to the host; guesses, verified together
    train.py, corpus.py          a small model that is trained here;  quality.py  what formats cost it;  gptq.py  rounding that costs less
    engine.py, requests.py       the loop: schedule, guess, compute, choose, grow

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
