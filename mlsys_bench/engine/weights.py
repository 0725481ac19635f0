"""The weights of a Llama-family decoder: drawn at random from a seed, or taken from a state dict with Hugging Face's names.

Both ways name the same tensors and go through `_build`, matrix by matrix, so that never more than one layer exists in fp32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsys_bench.engine.quant import Bf16, Fp32, Linear, activation_dtype, pack
from mlsys_bench.errors import BadInput
from mlsys_bench.models import Architecture

LOGIT_SD = 3.0  # spread of the logits of random weights: top tokens stand out, and sampling has a choice
Read = Callable[..., Tensor]  # (name, *shape) -> fp32 tensor of that shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer: q, k, v in one matrix, gate and up in another.

    RMSNorm is gain * sqrt(H) * x / |x|; gain and sqrt(H) are in the columns of the matrix that reads it, so that x / |x| is all that is
    left to compute.
    """

    qkv: Linear  # [(heads + 2 kv_heads) head_dim, hidden]
    o: Linear  # [hidden, heads head_dim]
    gate_up: Linear  # [2 ffn, hidden]
    down: Linear  # [hidden, ffn]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All weights of a model."""

    embedding: Tensor  # [vocab, hidden], fp32 or bf16
    layers: tuple[Layer, ...]
    gain: Tensor  # [hidden], fp32, times sqrt(hidden)
    head: Linear  # [vocab, hidden]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return everything held in memory, each tensor once."""
        held = [self.embedding, self.gain, *self.head.tensors()]
        for layer in self.layers:
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                held += linear.tensors()
        return tuple({t.data_ptr(): t for t in held}.values())


def random(shape: Architecture, *, precision: str, device: torch.device, seed: int) -> Weights:
    """Return weights drawn from a seed, the same on every device and, up to rounding, in every precision.

    Matrices are Gaussian with the variance 1 / inputs, those that write to the residual stream 1 / (2 layers inputs), so that activations
    and logits keep a sane size at any depth.
    """

    def draw(name: str, *size: int) -> Tensor:
        if len(size) == 1:
            return torch.ones(size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        return torch.empty(size).normal_(0.0, _sd(shape, name, size[1]), generator=generator)

    return _build(shape, draw, precision=precision, device=device)


def _sd(shape: Architecture, name: str, inputs: int) -> float:
    if "embed_tokens" in name:
        return LOGIT_SD / math.sqrt(inputs) if shape.tied_embeddings else 1.0
    if "lm_head" in name:
        return LOGIT_SD / math.sqrt(inputs)
    writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return 1.0 / math.sqrt(inputs * (2 * shape.layers if writes_residual else 1))


def from_state_dict(shape: Architecture, tensors: Mapping[str, Tensor], *, precision: str, device: torch.device) -> Weights:
    """Return the weights of a Llama state dict.  Raises BadInput where a tensor is missing or has another shape."""

    def read(name: str, *size: int) -> Tensor:
        if name not in tensors:
            raise BadInput(f"{shape.id}: the checkpoint has no tensor {name}")
        if tuple(tensors[name].shape) != size:
            raise BadInput(f"{shape.id}: {name} is {list(tensors[name].shape)}; this shape needs {list(size)}")
        return tensors[name].detach().float()

    return _build(shape, read, precision=precision, device=device)


def _build(shape: Architecture, read: Read, *, precision: str, device: torch.device) -> Weights:
    dtype = activation_dtype(precision)
    embedding = read("model.embed_tokens.weight", shape.vocab, shape.hidden).to(device=device, dtype=dtype)
    as_it_is = Fp32 if precision == "fp32" else Bf16
    return Weights(
        embedding=embedding,
        layers=tuple(_layer(shape, read, f"model.layers.{i}", precision, device) for i in range(shape.layers)),
        gain=(read("model.norm.weight", shape.hidden) * math.sqrt(shape.hidden)).to(device),
        head=as_it_is(embedding) if shape.tied_embeddings else pack(read("lm_head.weight", shape.vocab, shape.hidden), precision, device),
    )


def _layer(shape: Architecture, read: Read, at: str, precision: str, device: torch.device) -> Layer:
    H, Q, KV = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim

    def after_norm(norm: str, *parts: tuple[str, int]) -> Linear:
        weight = torch.cat([read(f"{at}.{name}_proj.weight", rows, H) for name, rows in parts])
        return pack(weight.mul_(read(f"{at}.{norm}.weight", H) * math.sqrt(H)), precision, device)

    return Layer(
        qkv=after_norm("input_layernorm", ("self_attn.q", Q), ("self_attn.k", KV), ("self_attn.v", KV)),
        o=pack(read(f"{at}.self_attn.o_proj.weight", H, Q), precision, device),
        gate_up=after_norm("post_attention_layernorm", ("mlp.gate", shape.ffn), ("mlp.up", shape.ffn)),
        down=pack(read(f"{at}.mlp.down_proj.weight", H, shape.ffn), precision, device),
    )
