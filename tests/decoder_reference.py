"""Small decoders of all kinds with random tensors, and what they compute, in float64 and without a cache."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mlsys_bench import models
from mlsys_bench.engine import spec, weights
from mlsys_bench.engine.native import linears
from mlsys_bench.engine.rope import Rope
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.models import Architecture

CPU = torch.device("cpu")
Read = Callable[..., Tensor]
Round = Callable[[Tensor], Tensor]


def shape(**changes: Any) -> Architecture:
    small = {"layers": 2, "hidden": 48, "heads": 4, "kv_heads": 2, "head_dim": 16, "ffn": 72, "vocab": 328, "max_context": 2048}
    return models.counted(dataclasses.replace(models.find("nano"), **{**small, **changes}))


def decoder(a: Architecture, **changes: Any) -> Decoder:
    return dataclasses.replace(spec.plain(a), **changes)


def kinds() -> dict[str, Decoder]:
    """Return a decoder of each kind that the C step computes."""
    a = shape()
    capped = {"attention_softcap": 5.0, "logit_softcap": 3.0, "attention_scale": 0.2}
    gemma = {"gain_offset": 1.0, "post_norms": True, "activation": "gelu_tanh", "embedding_scale": 7.0, "windows": (9, 0), **capped}
    return {
        "llama": decoder(a),
        "odd sizes": decoder(shape(hidden=50, heads=6, kv_heads=3, head_dim=10, ffn=37, vocab=321), rope=Rope(dim=10)),
        "one head": decoder(shape(heads=1, kv_heads=1, head_dim=80, layers=1), rope=Rope(dim=80)),
        "many share one head": decoder(shape(heads=70, kv_heads=1, head_dim=8, layers=1), rope=Rope(dim=8)),
        "tied": decoder(shape(tied_embeddings=True)),
        "window": decoder(a, windows=(70, 70)),
        "qwen": decoder(a, qk_norm=True, qkv_bias=True, norm_eps=1e-6),
        "every bias": decoder(a, qkv_bias=True, o_bias=True, mlp_bias=True),
        "part of a head turns": decoder(a, rope=Rope(dim=8, kind="linear", factor=4.0)),
        "gemma": decoder(a, rope=Rope(dim=16, theta=1e6), local_rope=Rope(dim=16), **gemma),
    }


def reader(d: Decoder, seed: int = 1) -> Read:
    """Return what gives each tensor by name: matrices as `weights.random` draws them, biases and gains far from 0 and 1."""

    def read(name: str, *size: int) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        if len(size) == 1:
            drawn = torch.empty(size).uniform_(-0.5, 0.5, generator=generator)
            return drawn if name.endswith("bias") else drawn + 1 - d.gain_offset
        return torch.empty(size).normal_(0.0, 1 / math.sqrt(size[1]), generator=generator)

    return read


def loaded(d: Decoder, precision: str = "fp32", *, native: bool, seed: int = 1) -> weights.Weights:
    """Return the decoder's weights, packed for C or for torch."""
    pack = (lambda logical: linears.pack(logical, precision)) if native else None
    return weights.build(d, weights.Tensors(reader(d, seed)), precision=precision, device=CPU, pack=pack)


def logits(d: Decoder, tokens: list[int], *, kept: Round = lambda x: x, seed: int = 1) -> Tensor:
    """Return the float64 logits [T, vocab] of a text; `kept` is what the cache makes of keys and values."""
    a, read = d.shape, reader(d, seed)

    def tensor(name: str, *size: int) -> Tensor:
        return read(name, *size).double()

    def norm(x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + d.norm_eps) * (tensor(f"{name}.weight", x.shape[-1]) + d.gain_offset)

    def linear(x: Tensor, name: str, rows: int, has_bias: bool) -> Tensor:
        y = x @ tensor(f"{name}.weight", rows, x.shape[-1]).T
        return y + tensor(f"{name}.bias", rows) if has_bias else y

    table = tensor("model.embed_tokens.weight", a.vocab, a.hidden)
    x = table[tokens] * d.embedding_scale
    for i in range(a.layers):
        at = f"model.layers.{i}"
        out = _attention(d, i, norm(x, f"{at}.input_layernorm"), linear, norm, kept)
        x = x + (norm(out, f"{at}.post_attention_layernorm") if d.post_norms else out)
        h = norm(x, f"{at}.pre_feedforward_layernorm" if d.post_norms else f"{at}.post_attention_layernorm")
        gate, up = (linear(h, f"{at}.mlp.{part}_proj", a.ffn, d.mlp_bias) for part in ("gate", "up"))
        gate = torch.nn.functional.silu(gate) if d.activation == "silu" else torch.nn.functional.gelu(gate, approximate="tanh")
        out = linear(gate * up, f"{at}.mlp.down_proj", a.hidden, d.mlp_bias)
        x = x + (norm(out, f"{at}.post_feedforward_layernorm") if d.post_norms else out)
    x = norm(x, "model.norm")
    y = x @ table.T if a.tied_embeddings else linear(x, "lm_head", a.vocab, False)
    return d.logit_softcap * torch.tanh(y / d.logit_softcap) if d.logit_softcap else y


def _attention(d: Decoder, i: int, x: Tensor, linear: Any, norm: Any, kept: Round) -> Tensor:
    a, at, count = d.shape, f"model.layers.{i}.self_attn", len(x)
    rope = (d.local_rope if d.window(i) else None) or d.rope

    def heads(part: str, n: int) -> Tensor:
        return linear(x, f"{at}.{part}_proj", n * a.head_dim, d.qkv_bias).view(count, n, a.head_dim)  # type: ignore[no-any-return]

    q, k, v = heads("q", a.heads), heads("k", a.kv_heads), heads("v", a.kv_heads)
    if d.qk_norm:
        q, k = norm(q, f"{at}.q_norm"), norm(k, f"{at}.k_norm")
    q, k = _turned(q, rope), _turned(k, rope)
    k, v = (kept(part).repeat_interleave(a.heads // a.kv_heads, dim=1) for part in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * d.scale
    if d.attention_softcap:
        scores = d.attention_softcap * torch.tanh(scores / d.attention_softcap)
    distance = torch.arange(count)[:, None] - torch.arange(count)
    hidden = (distance < 0) | ((distance >= d.window(i)) if d.window(i) else torch.tensor(False))
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(dim=-1), v)
    return linear(out.reshape(count, -1), f"{at}.o_proj", a.hidden, d.o_bias)  # type: ignore[no-any-return]


def _turned(x: Tensor, rope: Rope) -> Tensor:
    """Turn the first dimensions of each head.  x: [T, heads, head_dim]."""
    angle = torch.outer(torch.arange(len(x), dtype=torch.float64), torch.from_numpy(rope.angles()))[:, None]
    half = rope.dim // 2
    a, b, rest = x[..., :half], x[..., half : rope.dim], x[..., rope.dim :]
    cos, sin = angle.cos() * rope.amplitude, angle.sin() * rope.amplitude
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
