"""What computing a decoder needs to know beyond its shape: norms, rope, windows, activation, experts.

`plain` is Llama 2 of a given shape; `of_config` reads a Hugging Face config.json and refuses what the engine does not compute.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mlsys_bench import models
from mlsys_bench.engine.rope import Rope, of_parameters
from mlsys_bench.errors import BadInput
from mlsys_bench.models import Architecture

Activation = Literal["silu", "gelu_tanh"]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "gemma", "gemma2", "gemma3_text", "gemma3")
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """A decoder-only transformer as the engine computes it."""

    shape: Architecture
    rope: Rope
    local_rope: Rope | None = None  # of layers with a window, where they have their own
    windows: tuple[int, ...] = ()  # by layer: a token sees so many tokens, itself included; 0 is all.  () is 0 for every layer
    norm_eps: float = 1e-5
    gain_offset: float = 0.0  # a norm multiplies by gain + this: 1 in Gemma
    post_norms: bool = False  # what attention and MLP give is normed before it is added (Gemma 2 and 3)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each head's query and key before the rope
    activation: Activation = "silu"
    attention_scale: float = 0.0  # of q k^T; 0 is head_dim ** -0.5
    attention_softcap: float = 0.0  # c tanh(score / c), before the mask; 0 is none
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    sparse: tuple[bool, ...] = ()  # by layer: whether it has experts; () is no layer
    norm_topk: bool = True  # whether the shares of the chosen experts are made to sum to 1

    @property
    def scale(self) -> float:
        """What q k^T is multiplied with."""
        return self.attention_scale or self.shape.head_dim**-0.5

    def window(self, layer: int) -> int:
        """Return how many tokens a token of this layer sees, itself included; 0 is all."""
        return self.windows[layer] if self.windows else 0

    def is_sparse(self, layer: int) -> bool:
        """Return whether this layer's MLP is a mixture of experts."""
        return bool(self.sparse) and self.sparse[layer]

    @property
    def is_llama_like(self) -> bool:
        """Whether it is what Llama, Qwen 2/3 dense and Mistral share: one rope, SwiGLU, two norms a layer, no softcap.

        Windows, q/k/v biases, q/k norms and every kind of rope may differ; all of a head turns.
        """
        odd = self.local_rope or self.post_norms or self.o_bias or self.mlp_bias or any(self.sparse) or self.activation != "silu"
        capped = self.attention_softcap or self.logit_softcap or self.attention_scale
        return not odd and not capped and self.embedding_scale == 1 and self.rope.dim == self.shape.head_dim


def plain(shape: Architecture) -> Decoder:
    """Return a shape as Llama 2 computes it: theta 10,000, norms with 1e-5.  Raises BadInput for a shape that is no dense Llama."""
    if not shape.is_plain:
        raise BadInput(
            f"{shape.id}: only dense Llama shapes have random weights: nano, small-160m, tinyllama-1.1b; or give a checkpoint's folder"
        )
    return Decoder(shape=shape, rope=Rope(dim=shape.head_dim))


def of_config(path: str | Path) -> Decoder:
    """Return the decoder that a config.json, or the folder it lies in, describes.  Raises BadInput for what is not computed."""
    where = Path(path)
    shape = models.from_config(where)
    file = where / "config.json" if where.is_dir() else where
    keys = json.loads(file.read_text(encoding="utf-8"))
    keys = {**keys, **(keys.get("text_config") or {})}
    family = str(keys.get("model_type") or "")
    _refuse(shape, family, str(file))
    common: dict[str, Any] = {
        "shape": shape,
        "windows": _windows(keys, shape, family, models.layer_kinds(where)),
        "norm_eps": float(keys.get("rms_norm_eps") or 1e-6),
        "qkv_bias": bool(keys.get("attention_bias", family == "qwen2")),
        "o_bias": bool(keys.get("attention_bias", False)) and family != "qwen2",
        "mlp_bias": bool(keys.get("mlp_bias", False)),
        "qk_norm": family in ("qwen3", "qwen3_moe", "gemma3", "gemma3_text"),
        "activation": _activation(keys, family, str(file)),
        "sparse": _sparse(keys, shape),
        "norm_topk": bool(keys.get("norm_topk_prob", family != "qwen3_moe")),
    }
    return Decoder(**common, **_ropes(keys, shape, family, str(file)), **_gemma(keys, shape, family))


def _refuse(shape: Architecture, family: str, where: str) -> None:
    has = {
        "latent attention (MLA)": shape.is_mla, "linear attention layers": bool(shape.linear_layers),
        "gated attention": shape.gated_attention, "an MLP without a gate": shape.mlp_matrices != 3,
        "shared experts": bool(shape.shared_ffn),
    }  # fmt: skip
    odd = next((what for what, it_has in has.items() if it_has), None)
    if odd is not None or family not in FAMILIES:
        why = f"has {odd}" if odd else f"is of model_type {family!r}"
        raise BadInput(f"{where}: {why}, which the built-in engine does not compute; it computes {', '.join(FAMILIES)}")


def _windows(keys: Mapping[str, Any], shape: Architecture, family: str, kinds: list[str]) -> tuple[int, ...]:
    size = int(keys.get("sliding_window") or 0)
    if family in ("qwen2", "qwen3", "qwen3_moe") and "layer_types" not in keys:
        first = min(int(keys.get("max_window_layers") or 0), shape.layers) if keys.get("use_sliding_window") else shape.layers
        kinds = ["full_attention"] * first + ["sliding_attention"] * (shape.layers - first)
    if len(kinds) != shape.layers:
        raise BadInput(f"{shape.id}: layer_types names {len(kinds)} layers, and there are {shape.layers}")
    windows = tuple(size if kind == "sliding_attention" else 0 for kind in kinds)
    return windows if any(windows) else ()


def _activation(keys: Mapping[str, Any], family: str, where: str) -> Activation:
    if family.startswith("gemma"):  # the first Gemma's files say "gelu", and mean the tanh form its authors computed
        return "gelu_tanh"
    name = str(keys.get("hidden_act") or "silu")
    if name not in _ACTIVATIONS:
        raise BadInput(f"{where}: hidden_act is {name!r}; the built-in engine computes {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _sparse(keys: Mapping[str, Any], shape: Architecture) -> tuple[bool, ...]:
    if not shape.experts:
        return ()
    every, dense = int(keys.get("decoder_sparse_step") or 1), set(keys.get("mlp_only_layers") or ())
    return tuple(i not in dense and (i + 1) % every == 0 for i in range(shape.layers))


def _ropes(keys: Mapping[str, Any], shape: Architecture, family: str, where: str) -> dict[str, Any]:
    """Read transformers 5's `rope_parameters`, by kind of layer or for all, or the `rope_theta` and `rope_scaling` of before."""

    def rope(parameters: Mapping[str, Any], theta: float) -> Rope:
        if not isinstance(parameters, Mapping):
            raise BadInput(f"{where}: rope parameters {parameters!r}; they must be an object")
        share = float(keys.get("partial_rotary_factor") or 1.0)
        return of_parameters(parameters, head_dim=shape.head_dim, theta=theta, share=share, context=shape.max_context or 0, where=where)

    is_gemma3 = family in ("gemma3", "gemma3_text")
    theta = float(keys.get("rope_theta") or (1_000_000.0 if is_gemma3 else 10_000.0))
    found = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if "full_attention" in found:
        local = found.get("sliding_attention")
        return {"rope": rope(found["full_attention"], theta), "local_rope": rope(local, 10_000.0) if local else None}
    local_theta = float(keys.get("rope_local_base_freq") or 10_000.0)
    return {"rope": rope(found, theta), "local_rope": rope({}, local_theta) if is_gemma3 else None}


def _gemma(keys: Mapping[str, Any], shape: Architecture, family: str) -> dict[str, Any]:
    if not family.startswith("gemma"):
        return {}
    own: dict[str, Any] = {"gain_offset": 1.0, "embedding_scale": shape.hidden**0.5}
    if family == "gemma":
        return own
    is_second = family == "gemma2"
    return own | {
        "post_norms": True,
        "attention_scale": float(keys.get("query_pre_attn_scalar") or 256) ** -0.5,
        "attention_softcap": float(keys.get("attn_logit_softcapping", 50.0 if is_second else 0.0) or 0.0),
        "logit_softcap": float(keys.get("final_logit_softcapping", 30.0 if is_second else 0.0) or 0.0),
    }
