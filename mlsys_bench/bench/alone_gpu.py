"""Single operators on a GPU: the kernels of `engine.gpu`, several in one captured graph, as a decode step launches them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mlsys_bench.bench.alone import Call
from mlsys_bench.engine import formats, quant
from mlsys_bench.engine.gpu import attention, linears, small, tri
from mlsys_bench.engine.gpu.attention import Heads
from mlsys_bench.engine.gpu.kv import GpuKV
from mlsys_bench.engine.kv import Blocks
from mlsys_bench.engine.runner import Int32, Step
from mlsys_bench.engine.spec import Decoder

TIMES, MOST_TIMES = 16, 256  # operators in a graph: one launch from the host is then little beside them


class Triton:
    """Triton's kernels, or cuBLAS's where rows are many."""

    backend = "triton"

    def __init__(self, d: Decoder, *, precision: str, kv: torch.dtype, device: torch.device) -> None:
        a = d.shape
        self._d, self._kv, self._device = d, kv, device
        self._dtype = formats.precision(precision).activations
        self.act_bytes = self._dtype.itemsize
        self._pack = linears.packer(precision, device)
        self._heads = Heads(heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim, norm_eps=d.norm_eps)

    def pack(self, logical: formats.Logical) -> quant.Linear:
        """Return a matrix on the device."""
        return self._pack(logical)

    def copy(self, first: quant.Linear, number: int, again: Callable[[], formats.Logical]) -> quant.Linear:
        """Pack it again."""
        del first, number
        return self.pack(again())

    def linear(self, held: Sequence[quant.Linear], x: Tensor) -> Call:
        """Multiply."""
        rows = self._taken(x)
        return self._captured(lambda turn: held[turn % len(held)](rows), times=max(TIMES, min(len(held), MOST_TIMES)))

    def norm(self, x: Tensor, added: Tensor) -> Call:
        """Add and norm."""
        stream, more, nothing = x.to(self._device), added.to(self._device), torch.zeros_like(x, device=self._device)
        eps, dtype = self._d.norm_eps, self._dtype
        call = self._captured(lambda turn: small.rms_norm(stream, eps, None, dtype, delta=nothing))
        return dataclasses.replace(call, once=lambda: _double(small.rms_norm(stream.clone(), eps, None, dtype, delta=more)))

    def gate(self, wide: Tensor) -> Call:
        """Gate."""
        rows = self._taken(wide)
        return self._captured(lambda turn: small.swiglu(rows, self._dtype))

    def embed(self, table: Tensor, tokens: Int32) -> Call:
        """Read rows."""
        kept, turns = self._taken(table), [self._ints(row) for row in tokens]
        none, last = self._ints(np.full(tokens.shape[1], -1, dtype=np.int32)), self._ints(np.zeros(1, dtype=np.int32))
        return self._captured(lambda turn: small.embed(turns[turn % len(turns)], none, last, kept))

    def cache(self, blocks: int, block_tokens: int) -> GpuKV:
        """Allocate."""
        shape = dataclasses.replace(self._d.shape, layers=1)
        return GpuKV(shape, blocks=blocks, block_tokens=block_tokens, dtype=self._kv, device=self._device)

    def place(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Int32, slots: Int32, cache: Blocks) -> Call:
        """Turn and store."""
        assert isinstance(cache, GpuKV), "made by `cache`"
        rows, at = self._taken(qkv).clone(), self._ints(positions)
        tables, turns = (cos.to(self._device), sin.to(self._device)), [self._ints(row) for row in slots]
        turned = (self._d.shape.heads + self._d.shape.kv_heads) * self._d.shape.head_dim

        def compute(turn: int) -> Tensor:
            attention.rope_write(self._heads, rows, *tables, at, turns[turn % len(turns)], cache, 0)
            return rows[:, :turned]

        def once() -> Tensor:
            rows.copy_(qkv)
            return _double(compute(0))

        return dataclasses.replace(self._captured(compute), once=once)

    def attend(self, qkv: Tensor, steps: Sequence[Step], cache: Blocks) -> Call:
        """Attend, single tokens as they decode, chunks as prompts."""
        assert isinstance(cache, GpuKV), "made by `cache`"
        rows, a = self._taken(qkv), self._d.shape
        out = torch.empty(len(qkv), a.heads * a.head_dim, dtype=self._dtype, device=self._device)
        launches = [self._attention(rows, step, cache, out) for step in steps]

        def compute(turn: int) -> Tensor:
            launches[turn % len(launches)]()
            return out

        def once() -> Tensor:
            out.fill_(torch.nan)
            return _double(compute(0))

        return dataclasses.replace(self._captured(compute), once=once)

    def _attention(self, rows: Tensor, step: Step, cache: GpuKV, out: Tensor) -> Callable[[], None]:
        table = self._ints(step.block_table)
        if len(step.first) == len(step.tokens) + 1:
            lengths, longest = self._ints(step.positions + 1), int(step.positions.max()) + 1
            splits = attention.splits_of(len(lengths), self._heads.kv_heads, longest, self._device)
            return lambda: attention.decode(self._heads, rows, table, lengths, cache, 0, out, splits=splits)
        tiles = self._ints(attention.tiles_of(step.first, step.positions))
        return lambda: attention.prefill(self._heads, rows, table, tiles, cache, 0, out)

    def _captured(self, compute: Callable[[int], Tensor], times: int = TIMES) -> Call:
        """Return the call that replays `times` of an operator as one graph; where nothing can be captured it runs them as they are."""

        @torch.inference_mode()
        def every() -> None:
            for turn in range(times):
                compute(turn)

        @torch.inference_mode()
        def once() -> Tensor:
            return _double(compute(0))

        return Call(run=capture(every, self._device) if self._device.type == "cuda" else every, once=once, times=times)

    def _taken(self, x: Tensor) -> Tensor:
        return x.to(self._device, self._dtype)

    def _ints(self, values: Int32) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32)).to(self._device)


def capture(work: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return what replays work as a graph, after runs outside have compiled its kernels."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    space = linears.workspace(device, 0, 0) if tri.IS_INSTALLED else None  # memory the graph points to

    def replay() -> object:
        graph.replay()
        return space

    return replay


def _double(x: Tensor) -> Tensor:
    return x.to("cpu", torch.float64, copy=True)
