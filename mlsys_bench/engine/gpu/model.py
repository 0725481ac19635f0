"""The decoder on one GPU: six kernels a layer in decode, whole decode steps replayed as CUDA graphs, tokens chosen on the device.

`forward` gives logits, as every backend does.  `launch` starts a step and returns at once: its tokens may feed the next launch before
anyone has read them, so that the host plans step k + 1 while the device computes step k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsys_bench.engine import formats
from mlsys_bench.engine.flight import Picks, greedy
from mlsys_bench.engine.gpu import attention, graphs, small, tri
from mlsys_bench.engine.gpu.attention import Heads
from mlsys_bench.engine.gpu.kv import GpuKV
from mlsys_bench.engine.gpu.linears import GpuLinear, Norm, Plain
from mlsys_bench.engine.kv import Blocks
from mlsys_bench.engine.quant import Linear
from mlsys_bench.engine.runner import Int32, Step
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.weights import Layer, Weights


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLayer:
    """A layer's matrices, and the vectors that go with them."""

    qkv: GpuLinear
    o: GpuLinear
    gate_up: GpuLinear
    down: GpuLinear
    before_attention: Norm
    before_mlp: Norm
    qkv_bias: Tensor | None
    gains: tuple[Tensor, Tensor] | None  # of q and k norms
    window: int


def misfit(d: Decoder, device: torch.device) -> str | None:
    """Return what keeps these kernels from computing this, None where nothing does."""
    if not tri.IS_INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not tri.is_interpreted():
        return f"its kernels run on a CUDA device, not on {device.type}"
    if not d.is_llama_like:
        return "it is no plain Llama, Qwen or Mistral"
    return "heads of an odd number of dimensions" if d.shape.head_dim % 2 else None


class GpuModel:
    """The decoder: weights, rope tables, and its captured decode steps."""

    backend = "triton"

    def __init__(
        self, decoder: Decoder, weights: Weights, *, precision: str, max_context: int, max_batch: int, device: torch.device,
        allowed: Tensor | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """Take weights packed by `linears.pack`.

        allowed: [vocab] uint8, the tokens that may be chosen, None for all; dtype: of activations, by default the precision's.
        """
        a = decoder.shape
        self.decoder, self.weights, self.device, self.max_context = decoder, weights, device, max_context
        self.dtype = dtype or formats.precision(precision).activations
        self.heads = Heads(heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim, norm_eps=decoder.norm_eps)
        self.cos, self.sin = (torch.from_numpy(table).to(device) for table in decoder.rope.tables(max_context))
        self.layers = tuple(_layer(decoder, layer, i, self.dtype) for i, layer in enumerate(weights.layers))
        self.head = _gpu(weights.head, a.vocab, a.hidden, self.dtype)
        self.last_norm = Norm(eps=decoder.norm_eps, gain=weights.gain)
        self.allowed = allowed
        self.last = torch.zeros(tri.power_of_2(max_batch), dtype=torch.int32, device=device)
        self.graphs = graphs.Graphs(self, max_batch)

    @torch.inference_mode()
    def forward(self, step: Step, cache: Blocks) -> Tensor:
        """Compute a step, write its K and V to the cache, and return the fp32 logits [sampled, vocab], valid until the next step."""
        assert isinstance(cache, GpuKV), "this model reads only its own kind of cache"
        rows = len(step.tokens)
        if _is_decode(step) and rows <= len(self.last):
            self.graphs.start(step, cache, greedy(rows), None)
            return self.graphs.logits(rows)
        return self._mixed(step, cache)

    @torch.inference_mode()
    def launch(self, step: Step, cache: GpuKV, how: Picks | None = None, feed: Int32 | None = None) -> graphs.Handle:
        """Start a step and return what will hold the tokens it chooses, see `flight.Launches`.

        Decode steps are replayed, and their logits stay in `graphs.logits` until the next step.
        """
        if _is_decode(step) and len(step.tokens) <= len(self.last):
            return self.graphs.start(step, cache, how or greedy(len(step.tokens)), feed)
        rows = len(step.sampled)
        logits = self._mixed(step, cache, feed)
        if rows:
            self._choose(logits, how or greedy(rows), self.last[:rows])
        return graphs.handle_of(self.last[:rows])

    @torch.inference_mode()
    def warm_up(self, cache: GpuKV) -> None:
        """Capture all decode steps and compile what chunks need, of every number of rows that has kernels of its own.  Writes no cache."""
        self.graphs.warm_up(cache)
        for rows in (1, 2, 3, 16, 17, 33, 65):
            for singles in (0, 1) if rows <= self.max_context else ():
                self.launch(nobody(rows, singles, tri.cdiv(self.max_context, cache.block_tokens)), cache).tokens()

    @torch.inference_mode()
    def choose(self, logits: Tensor, how: Picks) -> list[int]:
        """Return the tokens that a launch would choose from these logits [S, vocab]."""
        tokens = torch.empty(len(logits), dtype=torch.int32, device=self.device)
        self._choose(logits, how, tokens)
        return tokens.tolist()

    def _choose(self, logits: Tensor, how: Picks, tokens: Tensor) -> None:
        temperature, seeds, places = (torch.from_numpy(np.ascontiguousarray(v)).to(self.device) for v in how)
        small.choose(logits, temperature, seeds, places, tokens, allowed=self.allowed)

    def _mixed(self, step: Step, cache: GpuKV, feed: Int32 | None = None) -> Tensor:
        """Compute chunks of prompts, and single tokens beside them."""
        fed = np.full(len(step.tokens), -1, dtype=np.int32) if feed is None else feed
        x = small.embed(self._ints(step.tokens), self._ints(fed), self.last, self.weights.embedding)
        positions, slots, table = self._ints(step.positions), self._ints(step.slots), self._ints(attention.padded(step.block_table))
        singles = int(np.count_nonzero(np.diff(step.first) == 1))
        tiles = self._ints(attention.tiles_of(step.first, step.positions, singles))
        lengths = positions[:singles] + 1
        longest = int(step.positions[:singles].max(initial=0)) + 1
        splits = attention.splits_of(max(1, singles), self.heads.kv_heads, longest, self.device)

        def attend(i: int, qkv: Tensor, out: Tensor) -> None:
            window = self.layers[i].window
            if singles:
                attention.decode(self.heads, qkv, table, lengths, cache, i, out, splits=splits, window=window)
            if len(tiles):
                attention.prefill(self.heads, qkv, table, tiles, cache, i, out, window=window)

        x = self._through(x, positions, slots, cache, attend)
        if not len(step.sampled):
            return x.new_empty(0, self.decoder.shape.vocab)
        normed = small.rms_norm(x, self.last_norm.eps, self.last_norm.gain, self.dtype, pick=self._ints(step.sampled))
        return self.head.run(normed, dtype=torch.float32)

    def decode(self, x: Tensor, positions: Tensor, slots: Tensor, table: Tensor, lengths: Tensor, cache: GpuKV, splits: int) -> Tensor:
        """Return the fp32 logits [B, vocab] of one token per sequence; nothing here waits for the host, so that it can be captured."""

        def attend(i: int, qkv: Tensor, out: Tensor) -> None:
            attention.decode(self.heads, qkv, table, lengths, cache, i, out, splits=splits, window=self.layers[i].window)

        return self.head.run(self._through(x, positions, slots, cache, attend), norm=self.last_norm, dtype=torch.float32)

    def _through(self, x: Tensor, positions: Tensor, slots: Tensor, cache: GpuKV, attend: graphs.Attend) -> Tensor:
        """Take the residual stream x [T, hidden] fp32 through all layers, in place."""
        out = torch.empty(len(x), self.heads.heads * self.heads.head_dim, dtype=self.dtype, device=x.device)
        for i, layer in enumerate(self.layers):
            qkv = layer.qkv.run(x, norm=layer.before_attention, bias=layer.qkv_bias, dtype=self.dtype)
            attention.rope_write(self.heads, qkv, self.cos, self.sin, positions, slots, cache, i, layer.gains)
            attend(i, qkv, out)
            layer.o.run(out, onto=x)
            layer.down.run(layer.gate_up.run(x, norm=layer.before_mlp, gated=True, dtype=self.dtype), onto=x)
        return x

    def _ints(self, values: npt.NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device, non_blocking=True)


def nobody(rows: int, singles: int, width: int) -> Step:
    """Return a step that writes nothing (its slots are -1) and reads block 0: a chunk, which samples, after sequences of one token."""
    chunk = np.arange(rows, dtype=np.int32)
    positions = np.concatenate([np.zeros(singles, dtype=np.int32), chunk])
    first = np.array([*range(singles + 1), singles + rows], dtype=np.int32)
    return Step.of(
        tokens=np.zeros_like(positions), positions=positions, slots=np.full_like(positions, -1),
        sequence_of=np.concatenate([np.arange(singles, dtype=np.int32), np.full_like(chunk, singles)]), first=first,
        block_table=np.zeros((singles + 1, width), dtype=np.int32), sampled=first[-1:] - 1,
    )  # fmt: skip


def _is_decode(step: Step) -> bool:
    rows = len(step.tokens)
    return len(step.first) == rows + 1 and len(step.sampled) == rows


def _layer(d: Decoder, layer: Layer, i: int, dtype: torch.dtype) -> GpuLayer:
    a = d.shape
    assert layer.gate_up is not None, "layers of experts are not computed here"
    assert layer.down is not None, "layers of experts are not computed here"
    gains = None if layer.q_gain is None or layer.k_gain is None else (layer.q_gain, layer.k_gain)
    inner = a.heads * a.head_dim
    return GpuLayer(
        qkv=_gpu(layer.qkv, inner + 2 * a.kv_heads * a.head_dim, a.hidden, dtype),
        o=_gpu(layer.o, a.hidden, inner, dtype),
        gate_up=_gpu(layer.gate_up, 2 * a.ffn, a.hidden, dtype),
        down=_gpu(layer.down, a.hidden, a.ffn, dtype),
        before_attention=Norm(eps=d.norm_eps, gain=layer.attention_gain),
        before_mlp=Norm(eps=d.norm_eps, gain=layer.mlp_gain),
        qkv_bias=layer.qkv_bias, gains=gains, window=d.window(i),
    )  # fmt: skip


def _gpu(held: Linear, n: int, k: int, dtype: torch.dtype) -> GpuLinear:
    """Return a matrix that can fuse; one that cannot (columns in another order, formats stacked) with its neighbours around it."""
    return held if isinstance(held, GpuLinear) else Plain(held, n, k, dtype)
