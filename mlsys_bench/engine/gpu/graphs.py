"""Decode steps as CUDA graphs, one per batch bucket (1, 2, 4, 8, ...), and what feeds and reads them without waiting.

A graph reads its inputs from fixed memory: one copy from pinned host memory fills tokens, positions, slots, lengths, block table and seeds.
Rows beyond the batch have slot -1 (nothing is written) and length 0 (nothing is read).  Where there is no CUDA (Triton's interpreter) the
same code runs as it is, step by step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mlsys_bench.engine.flight import Picks
from mlsys_bench.engine.gpu import attention, linears, small, tri
from mlsys_bench.engine.gpu.kv import GpuKV
from mlsys_bench.engine.runner import Int32, Step

if TYPE_CHECKING:
    from mlsys_bench.engine.gpu.model import GpuModel

Attend = Callable[[int, Tensor, Tensor], None]
COLUMNS = ("tokens", "feed", "positions", "slots", "lengths", "places", "temperature")  # of int32 size, one value per row
RING = 3  # host buffers: one that is filled, and two of launches that are not read yet


@dataclass(frozen=True, slots=True)
class Handle:
    """A step under way."""

    chosen: Tensor  # [rows] int32 in host memory, filled when `done`
    done: torch.cuda.Event | None

    def tokens(self) -> list[int]:
        """Wait for the step and return the token of each row."""
        if self.done is not None:
            self.done.synchronize()
        taken: list[int] = self.chosen.tolist()
        return taken


def handle_of(tokens: Tensor) -> Handle:
    """Have tokens [rows] int32 copied back, after all that was started before."""
    if tokens.device.type != "cuda":
        return Handle(tokens.clone(), None)
    chosen = torch.empty(len(tokens), dtype=torch.int32, pin_memory=True)
    chosen.copy_(tokens, non_blocking=True)
    return Handle(chosen, _mark(tokens.device))


def _mark(device: torch.device) -> torch.cuda.Event:
    """Return an event of this moment in the device's work."""
    done = torch.cuda.Event()  # type: ignore[no-untyped-call]
    done.record(torch.cuda.current_stream(device))
    return done


class Inputs:
    """The inputs of a bucket as one piece of int32 memory: seeds (two words each), the columns, the block table.

    All of them begin at multiples of 16 bytes: Triton compiles a kernel anew for pointers that do not.
    """

    def __init__(self, rows: int, width: int, device: torch.device, *, pinned: bool = False) -> None:
        """Allocate."""
        room = 4 * tri.cdiv(rows, 4)
        self.all = torch.zeros(room * (2 + len(COLUMNS)) + rows * width, dtype=torch.int32, device=device, pin_memory=pinned)
        self.seeds = self.all[: 2 * rows].view(torch.int64)
        self.column = {name: self.all[(2 + i) * room :][:rows] for i, name in enumerate(COLUMNS)}
        self.temperature = self.column["temperature"].view(torch.float32)
        self.table = self.all[(2 + len(COLUMNS)) * room :].view(rows, width)

    def fill(self, step: Step, how: Picks, feed: Int32 | None) -> None:
        """Write a step; host memory only."""
        rows = len(step.tokens)
        values = (step.tokens, np.full(rows, -1) if feed is None else feed, step.positions, step.slots, step.positions + 1, how.places)
        for name, value, beyond in zip(COLUMNS[:-1], values, (0, -1, 0, -1, 0, 0), strict=True):
            column = self.column[name].numpy()
            column[:rows], column[rows:] = value, beyond
        self.temperature.numpy()[:rows], self.temperature.numpy()[rows:] = how.temperature, 0.0
        self.seeds.numpy()[:rows] = how.seeds
        width = min(step.block_table.shape[1], self.table.shape[1])
        self.table.numpy()[:rows, :width] = step.block_table[:, :width]


class Bucket:
    """A decode step of up to `rows` sequences: its inputs, its logits, and the graph that computes these from those."""

    def __init__(self, model: GpuModel, cache: GpuKV, rows: int) -> None:
        """Allocate its inputs; `capture` makes the graph."""
        width = attention.table_width(tri.cdiv(model.max_context, cache.block_tokens))
        self.model, self.cache, self.rows = model, cache, rows
        self.inputs = Inputs(rows, width, model.device)
        self.inputs.column["slots"].fill_(-1)
        self.inputs.column["feed"].fill_(-1)
        is_cuda = model.device.type == "cuda"
        self.host = tuple(Inputs(rows, width, torch.device("cpu"), pinned=is_cuda) for _ in range(RING))
        self.chosen = tuple(torch.zeros(rows, dtype=torch.int32, pin_memory=is_cuda) for _ in range(RING))
        self.splits = attention.splits_of(rows, model.heads.kv_heads, model.max_context, model.device)
        self.logits: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.held: object = None  # memory the graph points to

    def compute(self) -> None:
        """Run the step on what the inputs hold; its tokens go where the next step finds them."""
        at, model = self.inputs.column, self.model
        x = small.embed(at["tokens"], at["feed"], model.last, model.weights.embedding)
        self.logits = model.decode(x, at["positions"], at["slots"], self.inputs.table, at["lengths"], self.cache, self.splits)
        small.choose(self.logits, self.inputs.temperature, self.inputs.seeds, at["places"], model.last[: self.rows], allowed=model.allowed)

    def capture(self, pool: object) -> None:
        """Record the step as a graph, after kernels have been compiled by runs outside."""
        side = torch.cuda.Stream(self.model.device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self.model.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self.compute()
        torch.cuda.current_stream(self.model.device).wait_stream(side)
        torch.cuda.synchronize(self.model.device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):  # type: ignore[arg-type]
            self.compute()
        self.held = linears.workspace(self.model.device, 0, 0)

    def run(self) -> None:
        """Replay the graph, or compute where there is none."""
        if self.graph is None:
            self.compute()
        else:
            self.graph.replay()


class Graphs:
    """The buckets of a model, made when first wanted or by `warm_up`, all in one memory pool."""

    def __init__(self, model: GpuModel, max_batch: int, *, captures: bool = True) -> None:
        """Know the model.  captures: whether steps become graphs on a CUDA device; without, every kernel is launched by itself."""
        self.model, self.max_batch = model, max_batch
        self.captures = captures and model.device.type == "cuda"
        self.buckets: dict[int, Bucket] = {}
        self.pool: object = None
        self.turn = 0
        self.done: list[torch.cuda.Event | None] = [None] * RING
        self.current: Bucket | None = None

    def warm_up(self, cache: GpuKV) -> None:
        """Make all buckets up to the largest batch, the largest first, so that smaller ones fit into its memory."""
        largest = tri.power_of_2(self.max_batch)
        for exponent in reversed(range(largest.bit_length())):
            self.bucket(1 << exponent, cache)

    def bucket(self, rows: int, cache: GpuKV) -> Bucket:
        """Return the smallest bucket for so many rows."""
        size = tri.power_of_2(rows)
        found = self.buckets.get(size)
        if found is None or found.cache is not cache:
            found = self.buckets[size] = Bucket(self.model, cache, size)
            if self.captures:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                last = self.model.last.clone()  # the runs before a capture choose tokens, which are nobody's
                found.capture(self.pool)
                self.model.last.copy_(last)
        return found

    def start(self, step: Step, cache: GpuKV, how: Picks, feed: Int32 | None) -> Handle:
        """Copy a step's inputs, start it, and have its tokens copied back; nothing waits."""
        rows = len(step.tokens)
        bucket = self.current = self.bucket(rows, cache)
        self.turn = (self.turn + 1) % RING
        before = self.done[self.turn]
        if before is not None:  # three launches ago: as a rule long over, and its host memory is free
            before.synchronize()
        host, chosen = bucket.host[self.turn], bucket.chosen[self.turn]
        host.fill(step, how, feed)
        bucket.inputs.all.copy_(host.all, non_blocking=True)
        bucket.run()
        chosen.copy_(self.model.last[: bucket.rows], non_blocking=True)
        done = self.done[self.turn] = _mark(self.model.device) if self.model.device.type == "cuda" else None
        return Handle(chosen[:rows], done)

    def logits(self, rows: int) -> Tensor:
        """Return the fp32 logits of the step started last."""
        assert self.current is not None, "no step was started"
        assert self.current.logits is not None, "no step was started"
        return self.current.logits[:rows]
