"""Single operators on torch's own functions, as `engine.model.Model` calls them: on any machine, with or without a compiler."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench.bench.alone import Call
from mlsys_bench.engine import formats, quant
from mlsys_bench.engine.groups import grouped
from mlsys_bench.engine.kv import Blocks, KVCache
from mlsys_bench.engine.model import Model, rotate
from mlsys_bench.engine.runner import Int32, Step
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.weights import Weights


class Torch:
    """What `Model` calls."""

    backend = "torch"

    def __init__(self, d: Decoder, *, precision: str, kv: torch.dtype, device: torch.device) -> None:
        self._d, self._precision, self._kv, self._device = d, precision, kv, device
        self._dtype = formats.precision(precision).activations
        self.act_bytes = self._dtype.itemsize
        nothing = torch.empty(0, d.shape.hidden, device=device)
        weights = Weights(embedding=nothing, layers=(), gain=nothing, head=quant.Bf16(nothing))
        self._model = Model(d, weights, precision=precision, max_context=1, device=device)

    def pack(self, logical: formats.Logical) -> quant.Linear:
        """Return a matrix as torch multiplies with it."""
        return quant.pack(logical, self._precision, self._device)

    def copy(self, first: quant.Linear, number: int, again: Callable[[], formats.Logical]) -> quant.Linear:
        """Pack it again."""
        del first, number
        return self.pack(again())

    def linear(self, held: Sequence[quant.Linear], x: Tensor) -> Call:
        """Multiply."""
        rows, turn = self._taken(x), itertools.cycle(held)
        return _call(lambda: next(turn)(rows), lambda: held[0](rows))

    def norm(self, x: Tensor, added: Tensor) -> Call:
        """Add and norm."""
        stream, more, nothing = x.to(self._device), added.to(self._device), torch.zeros_like(x, device=self._device)
        model = self._model
        return _call(lambda: model._norm(stream.add_(nothing)), lambda: model._norm(stream + more))

    def gate(self, wide: Tensor) -> Call:
        """Gate, in place as there."""
        rows = self._taken(wide)
        return _call(lambda: self._model._gated(rows))

    def embed(self, table: Tensor, tokens: Int32) -> Call:
        """Read rows."""
        kept = self._taken(table)
        turns = torch.from_numpy(tokens).long().to(self._device)
        turn = itertools.cycle(turns)
        return _call(lambda: functional.embedding(next(turn), kept).float(), lambda: functional.embedding(turns[0], kept).float())

    def cache(self, blocks: int, block_tokens: int) -> KVCache:
        """Allocate."""
        shape = dataclasses.replace(self._d.shape, layers=1)
        return KVCache(shape, blocks=blocks, block_tokens=block_tokens, dtype=self._kv, device=self._device, compute=self._dtype)

    def place(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Int32, slots: Int32, cache: Blocks) -> Call:
        """Turn and store."""
        assert isinstance(cache, KVCache), "made by `cache`"
        a, rows, at = self._d.shape, self._taken(qkv).clone(), torch.from_numpy(positions).long()
        inner = a.heads * a.head_dim
        c, s = (t[at].to(self._device) for t in (cos, sin))
        tables = c.repeat(1, 2)[:, None].to(self._dtype), torch.cat([-s, s], dim=1)[:, None].to(self._dtype)
        turns = itertools.cycle(torch.from_numpy(slots.astype(np.int64)).to(self._device))
        heads = rows.view(len(rows), -1, a.head_dim)

        def compute() -> Tensor:
            rotate(heads[:, : a.heads + a.kv_heads, : tables[0].shape[-1]], *tables)
            cache.write(0, next(turns), rows[:, inner:])
            return rows[:, : inner + a.kv_heads * a.head_dim]

        def once() -> Tensor:
            rows.copy_(qkv)
            return compute()

        return _call(compute, once)

    def attend(self, qkv: Tensor, steps: Sequence[Step], cache: Blocks) -> Call:
        """Gather and attend; where tokens stand in the cache is known to all layers of a step, and not counted here."""
        assert isinstance(cache, KVCache), "made by `cache`"
        a, model = self._d.shape, self._model
        q = self._taken(qkv)[:, : a.heads * a.head_dim]
        seen = [grouped(step, cache) for step in steps]
        turn = itertools.cycle(seen)

        def compute(at: Callable[[], object] = lambda: next(turn)) -> Tensor:
            step = at()
            parts = [model._attend_singles(0, q, singles, cache) for singles in step.singles]  # type: ignore[attr-defined]
            parts += [model._attend_chunk(0, q, chunk, cache) for chunk in step.chunks]  # type: ignore[attr-defined]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return _call(compute, lambda: compute(lambda: seen[0]))

    def _taken(self, x: Tensor) -> Tensor:
        return x.to(self._device, self._dtype)


def _call(compute: Callable[[], Tensor], once: Callable[[], Tensor] | None = None) -> Call:
    """Return the call of an operator that gives a new tensor each time: there is nothing to poison."""

    @torch.inference_mode()
    def run() -> object:
        return compute()

    @torch.inference_mode()
    def first() -> Tensor:
        return (once or compute)().to("cpu", torch.float64, copy=True)

    return Call(run=run, once=first)
