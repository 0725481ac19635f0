"""A decoder over paged KV, in torch: RMSNorm, RoPE, grouped-query attention, a gated MLP or a mixture of experts.

One forward takes the tokens of many sequences, laid end to end: first those that compute one token, then the chunks.  Matrices see all
tokens at once; attention sees the single tokens in groups of about equal length, each padded, and each chunk alone.

What families differ in is in `spec.Decoder`; what a family lacks costs it nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench.engine import formats
from mlsys_bench.engine.groups import Chunk, Grouped, Singles, grouped
from mlsys_bench.engine.kv import KVCache
from mlsys_bench.engine.rope import Rope
from mlsys_bench.engine.runner import Step
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.weights import Experts, Layer, Weights

Tables = tuple[Tensor, Tensor]  # cos and sin: [positions, 1, dim] as `rotate` wants them


class Model:
    """The decoder: weights and the tables that go with them."""

    backend = "torch"

    def __init__(self, decoder: Decoder, weights: Weights, *, precision: str, max_context: int, device: torch.device) -> None:
        self.decoder, self.shape, self.weights = decoder, decoder.shape, weights
        self.dtype = formats.precision(precision).activations
        layers = range(decoder.shape.layers)
        # a window as long as the context is none
        self._windows = tuple(window if (window := decoder.window(i)) < max_context else 0 for i in layers)
        self._ropes = tuple((decoder.local_rope if decoder.window(i) else None) or decoder.rope for i in layers)
        self._tables = {rope: tables(rope, max_context, self.dtype, device) for rope in set(self._ropes)}
        self._eps = torch.tensor((decoder.shape.hidden * decoder.norm_eps) ** 0.5, device=device)
        self._head_eps = torch.tensor((decoder.shape.head_dim * decoder.norm_eps) ** 0.5, device=device)

    @torch.inference_mode()
    def forward(self, step: Step, cache: KVCache) -> Tensor:
        """Compute a step, write its K and V to the cache, and return the fp32 logits [sampled, vocab]."""
        d = self.decoder
        by_window = {window: grouped(step, cache, window=window) for window in set(self._windows)}
        at = next(iter(by_window.values()))
        x = functional.embedding(at.tokens, self.weights.embedding).float()  # the residual stream stays in fp32: [T, hidden]
        if d.embedding_scale != 1.0:
            x *= d.embedding_scale
        turns = {rope: (cos.index_select(0, at.positions), sin.index_select(0, at.positions)) for rope, (cos, sin) in self._tables.items()}
        for i, layer in enumerate(self.weights.layers):
            seen, turn = by_window[self._windows[i]], turns[self._ropes[i]]
            x += self._after(self._attention(i, layer, self._norm(x, layer.attention_gain), turn, seen, cache), layer.post_attention_gain)
            x += self._after(self._mlp(layer, self._norm(x, layer.mlp_gain)), layer.post_mlp_gain)
        if at.sampled is not None:
            x = x.index_select(0, at.sampled)
        logits = self.weights.head(self._norm(x, self.weights.gain)).float()
        return capped(logits, d.logit_softcap) if d.logit_softcap else logits

    def _norm(self, x: Tensor, gain: Tensor | None = None) -> Tensor:
        """RMSNorm without sqrt(H), which the gain or the next matrix brings: x / hypot(|x|, sqrt(H eps)) = x / sqrt(H (mean(x^2) + eps)).

        8 µs instead of the 25 of functional.rms_norm (one row, torch 2.13 on a CPU).
        """
        return unit(x, self._eps, gain).to(self.dtype)

    def _after(self, x: Tensor, gain: Tensor | None) -> Tensor:
        """Norm what is added to the residual stream, in families that do."""
        return x if gain is None else unit(x.float(), self._eps, gain)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        if layer.experts is not None:
            return self._mixture(layer.experts, x)
        assert layer.gate_up is not None, "a layer has an MLP or experts"
        assert layer.down is not None
        return _plus(layer.down(self._gated(_plus(layer.gate_up(x), layer.gate_up_bias))), layer.down_bias)

    def _gated(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (functional.silu(gate) if self.decoder.activation == "silu" else functional.gelu(gate, approximate="tanh")).mul_(up)

    def _mixture(self, experts: Experts, x: Tensor) -> Tensor:
        """Send each token to the experts its router likes best; they add up in the order of their numbers.  x: [T, hidden].

        Tokens are sorted by expert, so that each matrix that is hit is read once, others never, and a GPU is waited for once a layer.
        """
        each = self.shape.experts_per_token
        share, chosen = functional.linear(x.float(), experts.router).softmax(dim=-1).topk(each, dim=-1)
        if self.decoder.norm_topk:
            share /= share.sum(dim=-1, keepdim=True)
        chosen, order = chosen.sort(dim=-1)
        share = share.gather(1, order)
        by_expert = chosen.flatten().argsort(stable=True)
        sent = x.index_select(0, by_expert // each)
        counts = torch.bincount(chosen.flatten(), minlength=len(experts.down)).tolist()
        hit = [(e, rows) for e, rows in enumerate(sent.split_with_sizes(counts)) if len(rows)]
        given = torch.cat([experts.down[e](self._gated(experts.gate_up[e](rows))) for e, rows in hit]).float()
        back = torch.empty_like(given).index_copy_(0, by_expert, given).view(len(x), each, -1)
        out = back[:, 0] * share[:, :1]
        for i in range(1, each):
            out += back[:, i] * share[:, i, None]
        return out

    def _attention(self, i: int, layer: Layer, x: Tensor, turn: Tables, step: Grouped, cache: KVCache) -> Tensor:
        a = self.shape
        qkv = _plus(layer.qkv(x), layer.qkv_bias)  # [T, (heads + 2 kv_heads) head_dim]
        heads = qkv.view(x.shape[0], -1, a.head_dim)
        if layer.q_gain is not None and layer.k_gain is not None:
            for part, gain in ((heads[:, : a.heads], layer.q_gain), (heads[:, a.heads : a.heads + a.kv_heads], layer.k_gain)):
                part.copy_(unit(part.float(), self._head_eps, gain))
        rotate(heads[:, : a.heads + a.kv_heads, : turn[0].shape[-1]], *turn)
        q = qkv[:, : a.heads * a.head_dim]
        cache.write(i, step.slots, qkv[:, a.heads * a.head_dim :])
        parts = [self._attend_singles(i, q, singles, cache) for singles in step.singles]
        parts += [self._attend_chunk(i, q, chunk, cache) for chunk in step.chunks]
        return _plus(layer.o(parts[0] if len(parts) == 1 else torch.cat(parts)), layer.o_bias)

    def _attend_singles(self, i: int, q: Tensor, singles: Singles, cache: KVCache) -> Tensor:
        """Let one query per sequence see its cache.  The heads that share a KV head stand in the query axis."""
        a = self.shape
        cache.gather(i, singles.room)
        q = q[singles.first : singles.first + singles.count].view(singles.count, a.kv_heads, a.heads // a.kv_heads, a.head_dim)
        return self._attend(q, singles.room.k, singles.room.v, singles.mask).reshape(singles.count, -1)

    def _attend_chunk(self, i: int, q: Tensor, chunk: Chunk, cache: KVCache) -> Tensor:
        """Let a chunk see its past and itself, causally."""
        a, room = self.shape, chunk.room
        cache.gather(i, room)
        q = q[chunk.first : chunk.first + chunk.tokens].view(1, chunk.tokens, a.heads, a.head_dim).transpose(1, 2)
        return self._attend(q, room.k, room.v, chunk.mask, is_causal=chunk.mask is None).transpose(1, 2).reshape(chunk.tokens, -1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, is_causal: bool = False) -> Tensor:
        """Return softmax(q k^T scale + mask) v, scores capped where the family does.  q: [B, heads, M, D]; k, v: [B, kv_heads, keys, D]."""
        scale, cap = self.decoder.scale, self.decoder.attention_softcap
        if cap:
            return capped_attention(q, k, v, mask, scale=scale, cap=cap, is_causal=is_causal)
        is_grouped = q.shape[1] != k.shape[1]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=is_grouped)


def tables(rope: Rope, positions: int, dtype: torch.dtype, device: torch.device) -> Tables:
    """Return cos and sin for `rotate`; the sign that belongs to the first half is in the sin already."""
    cos, sin = (torch.from_numpy(table).to(device) for table in rope.tables(positions))
    return cos.repeat(1, 2)[:, None].to(dtype), torch.cat([-sin, sin], dim=1)[:, None].to(dtype)


def unit(x: Tensor, eps: Tensor, gain: Tensor | None = None) -> Tensor:
    """Return gain * x / hypot(|x|, eps), by rows of the last dimension."""
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(eps)
    return x if gain is None else x.mul_(gain)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Apply RoPE in place, pairing dimension i with i + dim / 2 as Hugging Face does.  x: [T, heads, dim]."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    x.mul_(cos).addcmul_(swapped, sin)


def capped(x: Tensor, cap: float) -> Tensor:
    """Return cap * tanh(x / cap), in place."""
    return x.div_(cap).tanh_().mul_(cap)


def capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, scale: float, cap: float, is_causal: bool) -> Tensor:
    """Return softmax(capped(q k^T scale) + mask) v, which the library's attention does not compute.  Shapes as in `Model._attend`."""
    shared = q.shape[1] // k.shape[1]
    k, v = (k, v) if shared == 1 else (k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1))
    scores = capped((q @ k.transpose(-1, -2)).float() * scale, cap)
    if is_causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    if mask is not None:
        scores += mask
    return scores.softmax(dim=-1).to(v.dtype) @ v


def _plus(x: Tensor, bias: Tensor | None) -> Tensor:
    return x if bias is None else x.add_(bias)
