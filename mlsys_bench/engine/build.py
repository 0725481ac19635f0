"""From a shape, a precision and a device to a model and its cache, once it is known that they fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mlsys_bench.batching import Limits, Policy
from mlsys_bench.engine import checkpoint as checkpoints
from mlsys_bench.engine import formats, linear, memory, schemes, spec, speculate, weights
from mlsys_bench.engine.backend import Computes, OneByOne, choose, prefer_large_pages, threads_at_start
from mlsys_bench.engine.kv import Blocks, KVCache, kind_of, token_bytes
from mlsys_bench.engine.model import Model
from mlsys_bench.engine.native.model import NativeModel, misfit
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.speculate import Drafter, Speculation
from mlsys_bench.engine.tokenizer import Tokenizer
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.models import Architecture


class Loaded(NamedTuple):
    """What computes a step, and where its keys and values go."""

    model: Computes
    cache: Blocks


def load(
    shape: Architecture,
    *,
    precision: str,
    device: str,
    limits: Limits,
    seed: int,
    state_dict: Mapping[str, torch.Tensor] | None,
    checkpoint: Path | None = None,
    host_blocks: int = 0,
    backend: str = "auto",
    kv: str = "auto",
    deterministic: bool = False,
    threads: int | None = None,
    quantise: weights.Quantise | None = None,
    tokenizer: Tokenizer | None = None,
) -> Loaded:
    """Allocate a model and its cache.  Weights are those of a folder, of a Llama state dict, or random by `seed`.

    quantise: how the matrices of a state dict are rounded, by default to the nearest.  tokenizer: says what a model that chooses tokens
    itself may choose.
    """
    kept, where, many = kind_of(kv, precision), memory.device_of(device), threads or threads_at_start()
    prefer_large_pages(backend, where)
    opened = None if checkpoint is None else checkpoints.open_folder(checkpoint)
    decoder = spec.plain(shape) if opened is None else opened.decoder
    weights_bytes = weights.drawn_bytes(decoder, precision) if opened is None else checkpoints.planned_bytes(opened, precision)
    need = memory.Need(
        name=shape.id, precision=precision, weights_bytes=weights_bytes, token_bytes=token_bytes(shape, kept),
        tokens=limits.blocks * limits.block_tokens, host_tokens=host_blocks * limits.block_tokens,
    )  # fmt: skip
    memory.refuse_misfit(need, where)
    torch.set_num_threads(many)
    chosen = choose(backend, decoder, precision=precision, device=where, kv=kept, deterministic=deterministic)
    pack = linear.packer(chosen, precision, where)
    if opened is not None:
        loaded = checkpoints.load(opened, precision=precision, device=where, pack=pack)
    elif state_dict is not None:
        loaded = weights.from_state_dict(decoder, state_dict, precision=precision, device=where, pack=pack, quantise=quantise)
    else:
        loaded = weights.random(decoder, precision=precision, device=where, seed=seed, pack=pack)
    why = misfit(decoder, loaded) if chosen == "native" else None
    if why is not None and backend == "native":
        raise BadInput(f"backend native cannot compute {shape.id} in {precision}: {why}; use --backend torch")
    if chosen == "native" and why is None:
        return _native(decoder, loaded, limits, kept, many)
    if chosen == "triton":
        may = None if tokenizer is None else allowed(tokenizer, shape.vocab, where)
        return _triton(decoder, loaded, limits, kept, precision=precision, device=where, deterministic=deterministic, allowed=may)
    compute = formats.precision(precision).activations
    model = Model(decoder, loaded, precision=precision, max_context=limits.max_context, device=where)
    cache = KVCache(shape, blocks=limits.blocks, block_tokens=limits.block_tokens, dtype=kept, device=where, compute=compute)
    return Loaded(OneByOne(model) if deterministic else model, cache)


def _native(decoder: Decoder, loaded: weights.Weights, limits: Limits, kv: torch.dtype, threads: int) -> Loaded:
    """Return the model whose steps are computed in C.  Its threads and torch's would wait for each other's cores, so torch gets one."""
    torch.set_num_threads(1)
    cache = Blocks(decoder.shape, blocks=limits.blocks, block_tokens=limits.block_tokens, dtype=kv, device=torch.device("cpu"))
    return Loaded(NativeModel(decoder, loaded, max_context=limits.max_context, threads=threads), cache)


def _triton(
    decoder: Decoder, loaded: weights.Weights, limits: Limits, kv: torch.dtype, *,
    precision: str, device: torch.device, deterministic: bool, allowed: torch.Tensor | None,
) -> Loaded:  # fmt: skip
    """Return the model whose steps are Triton kernels, its decode steps captured as graphs."""
    from mlsys_bench.engine.gpu.kv import GpuKV
    from mlsys_bench.engine.gpu.model import GpuModel

    cache = GpuKV(decoder.shape, blocks=limits.blocks, block_tokens=limits.block_tokens, dtype=kv, device=device)
    model = GpuModel(
        decoder, loaded, precision=precision, max_context=limits.max_context, max_batch=limits.max_seqs, device=device, allowed=allowed
    )
    if device.type == "cuda":
        model.warm_up(cache)
    return Loaded(OneByOne(model) if deterministic else model, cache)


def policy(preempt: str, speculative: Speculation | None, *, static_batches: bool) -> Policy:
    """Return the rules of the scheduler.  Raises BadInput."""
    if preempt not in ("recompute", "swap"):
        raise unknown("way to preempt", preempt, ["recompute", "swap"])
    return Policy(swap=int(preempt == "swap"), drafts=speculative.drafts if speculative else 0, gather=int(static_batches))


def drafter(how: Speculation | None, tokenizer: Tokenizer, precision: str, vocab: int, *, limits: Limits, **on: Any) -> Drafter | None:
    """Return who guesses.  A model does it on the same device, in the same blocks and, unless it says otherwise, in the same precision."""
    if isinstance(how, speculate.NGram):
        return speculate.TextDrafter(how)
    if how is None:
        return None
    refuse_shape(how.shape, limits, tokenizer, has_config=how.checkpoint is not None)
    if how.shape.vocab < vocab:
        raise BadInput(
            f"{how.shape.id}: with a vocabulary of {how.shape.vocab} it cannot guess for a model of {vocab}; use one of the same family"
        )
    precision = precision_of(how.precision or precision, how.checkpoint)
    model, cache = load(
        how.shape, precision=precision, seed=how.seed, state_dict=how.state_dict, checkpoint=how.checkpoint, limits=limits, **on
    )
    return speculate.ModelDrafter(lambda step: only_text(model.forward(step, cache), tokenizer), cache)


_FEW = 16  # places that are written one by one


class OnlyText:
    """Leaves of logits what may be generated: a token that has no text never is.

    A model that gives its logits in the same tensor every time is asked for views of it once.  Where the weights of a step have just gone
    through the caches, an operator of torch costs 50 us, one of numpy 30, and writing through a memoryview next to nothing.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._silent, self._generated = list(tokenizer.silent), tokenizer.generated
        self._seen: torch.Tensor | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return [S, generated], with -inf in place of tokens without text; written into the same memory."""
        if logits is not self._seen:
            self._seen, self._text = logits, logits[:, : self._generated]
            rows: Any = logits if logits.is_cuda else logits.numpy()
            is_few = not logits.is_cuda and len(logits) * len(self._silent) <= _FEW
            self._places: list[Any] = [(slice(None), self._silent)] if self._silent else []
            if is_few:
                self._places = [(row, token) for row in range(len(logits)) for token in self._silent]
            self._rows: Any = memoryview(rows) if is_few else rows
        for place in self._places:
            self._rows[place] = -math.inf
        return self._text


def only_text(logits: torch.Tensor, tokenizer: Tokenizer) -> torch.Tensor:
    """Return the logits of what may be generated, as `OnlyText` does."""
    return OnlyText(tokenizer)(logits)


def allowed(tokenizer: Tokenizer, vocab: int, device: torch.device) -> torch.Tensor | None:
    """Return a 1 for each token that may be generated, [vocab] uint8; None where that is all of them.  See `only_text`."""
    if tokenizer.generated >= vocab and not tokenizer.silent:
        return None
    may = torch.zeros(vocab, dtype=torch.uint8)
    may[: tokenizer.generated] = 1
    may[list(tokenizer.silent)] = 0
    return may.to(device)


def default_limits(
    shape: Architecture,
    *,
    max_batch: int = 8,
    max_context: int | None = None,
    max_step_tokens: int = 512,
    block_tokens: int = 16,
    kv_tokens: int | None = None,
) -> Limits:
    """Return limits under which `max_batch` sequences of `max_context` tokens fit at once, unless `kv_tokens` says otherwise."""
    context = max_context or min(shape.max_context or 2048, 2048)
    tokens = kv_tokens or max_batch * math.ceil(context / block_tokens) * block_tokens
    return Limits(
        max_seqs=max_batch,
        max_step_tokens=max(max_step_tokens, max_batch),
        block_tokens=block_tokens,
        blocks=max(1, tokens // block_tokens),
        max_context=context,
    )


def refuse_shape(shape: Architecture, limits: Limits, tokenizer: Tokenizer, *, has_config: bool = False) -> None:
    """Raise BadInput for a shape that the engine does not compute, or not with this tokenizer and context.

    has_config: there is a config.json that says how it is computed.
    """
    if not (shape.is_plain or has_config):
        raise BadInput(f"{shape.id}: the built-in engine computes dense Llama-family models; try nano, small-160m or tinyllama-1.1b")
    if shape.vocab < tokenizer.generated:
        raise BadInput(f"{shape.id}: a vocabulary of {shape.vocab} has no room for the tokenizer's {tokenizer.generated}")
    if shape.max_context is not None and limits.max_context > shape.max_context:
        raise BadInput(f"{shape.id}: a context of {limits.max_context} tokens is more than its {shape.max_context}")


def precision_of(name: str, checkpoint: Path | None) -> str:
    """Return a precision's name; auto is that of the checkpoint, and fp32 without one."""
    if name != "auto":
        return name
    return "fp32" if checkpoint is None else schemes.own_precision(checkpoint)


def check_threads(threads: int | None) -> None:
    """Raise BadInput for no threads at all."""
    if threads is not None and threads < 1:
        raise BadInput(f"threads is {threads}: the engine needs at least 1")
