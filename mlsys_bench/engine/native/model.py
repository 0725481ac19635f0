"""A decoder whose every step is one call into the C kernels: fp32 activations, paged attention in place, batch-invariant throughout."""

from __future__ import annotations

import ctypes
import dataclasses
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from mlsys_bench.engine.kv import Blocks
from mlsys_bench.engine.native import library
from mlsys_bench.engine.native.library import BF16, F32, LinearStruct
from mlsys_bench.engine.native.linears import NativeLinear, aligned, room
from mlsys_bench.engine.rope import Rope
from mlsys_bench.engine.runner import Step
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.weights import Layer, Weights

KV_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # kv.h


class LayerStruct(ctypes.Structure):
    """`layer_t` of step.h."""

    _fields_ = (
        ("qkv", LinearStruct),
        ("o", LinearStruct),
        ("gate_up", LinearStruct),
        ("down", LinearStruct),
        ("attention_gain", c_void_p),
        ("mlp_gain", c_void_p),
        ("post_attention_gain", c_void_p),
        ("post_mlp_gain", c_void_p),
        ("q_gain", c_void_p),
        ("k_gain", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("window", c_int32),
    )


class DecoderStruct(ctypes.Structure):
    """`decoder_t` of step.h."""

    _fields_ = (
        *((name, c_int32) for name in ("layers", "hidden", "heads", "kv_heads", "head_dim", "rope_dim", "ffn", "vocab")),
        *((name, c_int32) for name in ("gelu", "embedding_format", "embedding_packed")),
        *((name, c_float) for name in ("eps", "scale", "softcap", "embedding_scale")),
        ("embedding", c_void_p),
        ("gain", c_void_p),
        ("head", LinearStruct),
        ("layer", POINTER(LayerStruct)),
    )


class CacheStruct(ctypes.Structure):
    """`cache_t` of kv.h."""

    _fields_ = (
        ("data", c_void_p),
        ("layer_bytes", c_int64),
        ("block_bytes", c_int64),
        *((name, c_int32) for name in ("format", "block_tokens", "kv_heads", "head_dim")),
    )


def misfit(d: Decoder, weights: Weights | None = None) -> str | None:
    """Return what keeps the C step from computing this decoder (with these weights), None where nothing does."""
    if any(d.sparse):
        return "it has experts"
    if d.local_rope is not None and d.local_rope.dim != d.rope.dim:
        return "its two ropes turn different shares of a head"
    if d.shape.head_dim % 2:
        return "its heads have an odd number of dimensions"
    linears = [] if weights is None else [weights.head, *(linear for layer in weights.layers for linear in layer.linears())]
    if not all(isinstance(linear, NativeLinear) for linear in linears):
        return "some of its matrices are stored in an order or in parts of their own"
    return None


class NativeModel:
    """The decoder: the structs that C reads, and all that they point to."""

    backend = "native"

    def __init__(self, decoder: Decoder, weights: Weights, *, max_context: int, threads: int) -> None:
        """Take weights whose matrices are all `NativeLinear`.  A tied embedding is read out of the head; the table itself is given up."""
        self.decoder, self.shape, self.threads = decoder, decoder.shape, threads
        self._c = _functions()
        self._held: list[Tensor] = []
        self.weights = self._tied(weights)
        self._tables: dict[Rope, tuple[int, int]] = {}
        layers = (LayerStruct * decoder.shape.layers)()
        for i, layer in enumerate(self.weights.layers):
            self._fill(layers[i], layer, i, max_context)
        self._struct = self._decoder(layers)
        self._workspace, self._room_tokens = aligned(0), 0
        self._logits_rows, self.reuses_logits = -1, False
        self._linears_ns = 0
        self._of: Blocks | None = None  # the cache that the struct is of

    @property
    def linears_s(self) -> float:
        """Return the seconds that products with weights took, in all steps so far."""
        return self._linears_ns * 1e-9

    def forward(self, step: Step, cache: Blocks) -> Tensor:
        """Compute a step, write its K and V to the cache, and return the fp32 logits [sampled, vocab].

        Where `reuses_logits` is set, they are valid until the next step.
        """
        total = max(step.rows, step.wanted)
        if total > self._room_tokens:
            self._workspace = room(self._c.step_workspace_bytes(self._struct, total, self.threads), is_filled=True)
            self._workspace_at, self._room_tokens = self._workspace.data_ptr(), total
        if not self.reuses_logits or self._logits_rows != step.wanted:
            self._logits = torch.empty(step.wanted, self.shape.vocab)
            self._logits_at, self._logits_rows = self._logits.data_ptr(), step.wanted
        logits = self._logits
        if self._of is not cache:
            self._of, self._cache = cache, _cache(cache)
        laid = c_int32.from_buffer(step.laid)  # type: ignore[arg-type] # an array is a buffer, whatever its stubs say
        self._linears_ns += self._c.step_run(self._struct, self._cache, laid, self.threads, self._workspace_at, self._logits_at)
        cap = self.decoder.logit_softcap
        return logits.div_(cap).tanh_().mul_(cap) if cap else logits

    def _tied(self, weights: Weights) -> Weights:
        """Return the weights without an embedding table that the head holds too, unrounded."""
        self._is_packed = self.shape.tied_embeddings and _struct(weights.head).format in (F32, BF16)
        if not self._is_packed:
            return weights
        return dataclasses.replace(weights, embedding=weights.embedding.new_empty(0, self.shape.hidden))

    def _decoder(self, layers: ctypes.Array[LayerStruct]) -> DecoderStruct:
        d, a, head = self.decoder, self.shape, _struct(self.weights.head)
        table, is_packed = self.weights.embedding, self._is_packed
        return DecoderStruct(
            layers=a.layers, hidden=a.hidden, heads=a.heads, kv_heads=a.kv_heads, head_dim=a.head_dim, rope_dim=d.rope.dim, ffn=a.ffn,
            vocab=a.vocab, gelu=d.activation == "gelu_tanh", embedding_packed=is_packed,
            embedding_format=head.format if is_packed else F32 if table.dtype == torch.float32 else BF16,
            eps=d.norm_eps, scale=d.scale, softcap=d.attention_softcap, embedding_scale=d.embedding_scale,
            embedding=head.weight if is_packed else self._pointer(table), gain=self._pointer(self.weights.gain), head=head, layer=layers,
        )  # fmt: skip

    def _fill(self, to: LayerStruct, layer: Layer, i: int, max_context: int) -> None:
        window = self.decoder.window(i)
        rope = (self.decoder.local_rope if window else None) or self.decoder.rope
        assert layer.gate_up is not None, "a dense layer has an MLP"
        assert layer.down is not None
        to.qkv, to.o = self._with_bias(layer.qkv, layer.qkv_bias), self._with_bias(layer.o, layer.o_bias)
        to.gate_up, to.down = self._with_bias(layer.gate_up, layer.gate_up_bias), self._with_bias(layer.down, layer.down_bias)
        for name in ("attention_gain", "mlp_gain", "post_attention_gain", "post_mlp_gain", "q_gain", "k_gain"):
            setattr(to, name, self._pointer(getattr(layer, name)))
        to.window, (to.cos, to.sin) = window, self._rope(rope, max_context)

    def _with_bias(self, linear: object, bias: Tensor | None) -> LinearStruct:
        struct = _struct(linear)
        if bias is not None:
            struct.bias = self._pointer(bias)
        return struct

    def _rope(self, rope: Rope, max_context: int) -> tuple[int, int]:
        if rope not in self._tables:
            cos, sin = (self._pointer(torch.from_numpy(table)) for table in rope.tables(max_context))
            self._tables[rope] = (cos or 0, sin or 0)
        return self._tables[rope]

    def _pointer(self, tensor: Tensor | None) -> int | None:
        """Return the address of a tensor in one piece, which is kept for as long as the model."""
        if tensor is None:
            return None
        self._held.append(tensor.contiguous() if tensor.dtype == torch.bfloat16 else tensor.float().contiguous())
        return self._held[-1].data_ptr()


def _struct(linear: object) -> LinearStruct:
    """Return a copy of what C sees of a matrix."""
    assert isinstance(linear, NativeLinear), "see misfit"
    return LinearStruct.from_buffer_copy(linear.struct)


def _functions() -> ctypes.CDLL:
    c = library.need()
    c.step_workspace_bytes.restype, c.step_workspace_bytes.argtypes = c_int64, (POINTER(DecoderStruct), c_int32, c_int32)
    c.step_run.restype = c_int64
    c.step_run.argtypes = (POINTER(DecoderStruct), POINTER(CacheStruct), POINTER(c_int32), c_int32, c_void_p, c_void_p)
    return c


def _cache(cache: Blocks) -> CacheStruct:
    layers, blocks, block_bytes = cache.raw.shape
    assert layers, "a decoder has layers"
    return CacheStruct(
        cache.raw.data_ptr(), blocks * block_bytes, block_bytes, KV_KINDS[cache.dtype], cache.block_tokens, cache.kv_heads, cache.head_dim
    )
