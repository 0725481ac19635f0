"""A small byte-level Llama, trained here: the model whose loss tells what a number format costs.

Random weights have nothing to lose; a trained model has.  This one has 1.7 million parameters and learns the source of Python's standard
library by a fixed recipe from a fixed seed, in a few minutes of one core.  It is kept in the user's cache as a checkpoint like any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from mlsys_bench import models
from mlsys_bench.engine.corpus import Corpus, corpus
from mlsys_bench.engine.native.build import cache_folder
from mlsys_bench.engine.tokenizer import VOCAB
from mlsys_bench.models import Architecture

CONTEXT = 256
NORM_EPS, ROPE_THETA = 1e-5, 10_000.0  # as in spec.plain
Progress = Callable[[int, int, float], None]  # (steps done, steps in all, loss of the last one in bit per byte)
_VERSION = 1  # of this file's arithmetic: models of another one are trained again


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How the model is trained: AdamW, its rate rising over `warmup` steps and falling on a line to zero from there."""

    steps: int = 620
    batch: int = 16
    rate: float = 4e-3
    warmup: int = 30
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteModel:
    """A trained model: its shape, its tensors under Hugging Face's names, and the text it comes from."""

    shape: Architecture
    tensors: dict[str, Tensor]
    corpus: Corpus
    recipe: Recipe
    folder: Path  # config.json and model.safetensors; it reads and writes bytes, so there is no tokenizer.json


def byte_shape() -> Architecture:
    """Return the model's shape."""
    return models.counted(
        Architecture(
            id="byte-llama", hf_id="", layers=4, hidden=192, heads=6, kv_heads=2, head_dim=32, ffn=512, vocab=VOCAB, max_context=CONTEXT,
            experts=0, experts_per_token=0, tied_embeddings=False, attention="gqa", params=0.0, active_params=0.0,
            source="mlsys_bench/engine/train.py", date="2026-11-22", quantized_head=True,
        )
    )  # fmt: skip


def byte_model(
    recipe: Recipe | None = None,
    *,
    shape: Architecture | None = None,
    text: Corpus | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> ByteModel:
    """Return the model of a recipe, from the cache or trained now.

    It is written after the last step, all of it or nothing: who is interrupted begins again.
    """
    how, learnt, size = recipe or Recipe(), text or corpus(), shape or byte_shape()
    kept = cached(how, size, learnt, folder)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent, prefix="training-") as room:  # what cannot be written says so before minutes pass
            _save(kept, Path(room) / kept.name, size, train(size, learnt.train, how, progress))
    return ByteModel(shape=size, tensors=load_file(kept / "model.safetensors"), corpus=learnt, recipe=how, folder=kept)


def cached(recipe: Recipe, shape: Architecture, text: Corpus, folder: Path | None = None) -> Path:
    """Return where the model of a recipe, a shape and a text is kept once it is trained."""
    digest = hashlib.sha256(repr((_VERSION, recipe, shape, text.digest)).encode()).hexdigest()[:16]
    return (folder or cache_folder()) / f"byte-llama-{digest}"


def _save(folder: Path, fresh: Path, shape: Architecture, tensors: Mapping[str, Tensor]) -> None:
    fresh.mkdir()
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, fresh / "model.safetensors")
    (fresh / "config.json").write_text(json.dumps(_config(shape), indent=2) + "\n", encoding="utf-8")
    if not folder.exists():  # another process may have been faster
        fresh.rename(folder)


def _config(shape: Architecture) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_dim, "vocab_size": shape.vocab, "tie_word_embeddings": False,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": NORM_EPS, "rope_theta": ROPE_THETA, "torch_dtype": "float32",
    }  # fmt: skip


# ---------------------------------------------------------------- training


def train(shape: Architecture, text: bytes, recipe: Recipe, progress: Progress | None = None) -> dict[str, Tensor]:
    """Return the tensors of a Llama of this shape that has learnt a text, on one thread, so that a seed gives the same everywhere alike."""
    with _one_thread():
        tensors = fresh(shape, recipe.seed)
        matrices = [t for t in tensors.values() if t.dim() == 2]
        vectors = [t for t in tensors.values() if t.dim() == 1]
        optimiser = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.rate, betas=recipe.betas, fused=True,
        )  # fmt: skip
        for step, tokens in enumerate(_batches(text, recipe)):
            for group in optimiser.param_groups:
                group["lr"] = recipe.rate * _share_of_rate(step, recipe)
            loss = functional.cross_entropy(logits(shape, tensors, tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(tensors.values(), recipe.clip)
            optimiser.step()
            if progress is not None:
                progress(step + 1, recipe.steps, loss.item() / math.log(2))
        return {name: tensor.detach() for name, tensor in tensors.items()}


def fresh(shape: Architecture, seed: int) -> dict[str, Tensor]:
    """Return tensors to begin with: Gaussian of variance 1 / inputs, less where they write to the residual stream; an even output."""
    a, drawn = shape, torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, sd: float | None = None) -> Tensor:
        return torch.empty(rows, columns).normal_(0.0, columns**-0.5 if sd is None else sd, generator=drawn).requires_grad_()

    def gain() -> Tensor:
        return torch.ones(a.hidden).requires_grad_()

    q, kv, residual_sd = a.heads * a.head_dim, a.kv_heads * a.head_dim, (2 * a.layers) ** -0.5
    tensors = {"model.embed_tokens.weight": matrix(a.vocab, a.hidden, 0.5), "lm_head.weight": matrix(a.vocab, a.hidden, 0.02)}
    for i in range(a.layers):
        at = f"model.layers.{i}"
        tensors |= {
            f"{at}.input_layernorm.weight": gain(), f"{at}.post_attention_layernorm.weight": gain(),
            f"{at}.self_attn.q_proj.weight": matrix(q, a.hidden), f"{at}.self_attn.k_proj.weight": matrix(kv, a.hidden),
            f"{at}.self_attn.v_proj.weight": matrix(kv, a.hidden),
            f"{at}.self_attn.o_proj.weight": matrix(a.hidden, q, residual_sd * q**-0.5),
            f"{at}.mlp.gate_proj.weight": matrix(a.ffn, a.hidden), f"{at}.mlp.up_proj.weight": matrix(a.ffn, a.hidden),
            f"{at}.mlp.down_proj.weight": matrix(a.hidden, a.ffn, residual_sd * a.ffn**-0.5),
        }  # fmt: skip
    return tensors | {"model.norm.weight": gain()}


def logits(shape: Architecture, tensors: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """Return the logits after each token, as the textbook computes them.  tokens: [B, T]; returns [B, T, vocab]."""
    turn = _rope(tokens.shape[1], shape.head_dim)
    x = functional.embedding(tokens, tensors["model.embed_tokens.weight"])
    for i in range(shape.layers):
        at = f"model.layers.{i}"
        x = x + _attention(shape, tensors, f"{at}.self_attn", _norm(x, tensors[f"{at}.input_layernorm.weight"]), turn)
        x = x + _mlp(tensors, f"{at}.mlp", _norm(x, tensors[f"{at}.post_attention_layernorm.weight"]))
    return functional.linear(_norm(x, tensors["model.norm.weight"]), tensors["lm_head.weight"])


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return functional.rms_norm(x, gain.shape, gain, NORM_EPS)


def _mlp(tensors: Mapping[str, Tensor], at: str, x: Tensor) -> Tensor:
    gate, up = (functional.linear(x, tensors[f"{at}.{name}_proj.weight"]) for name in ("gate", "up"))
    return functional.linear(functional.silu(gate) * up, tensors[f"{at}.down_proj.weight"])


def _attention(shape: Architecture, tensors: Mapping[str, Tensor], at: str, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    def heads(name: str) -> Tensor:
        projected = functional.linear(x, tensors[f"{at}.{name}_proj.weight"])
        return projected.view(*x.shape[:2], -1, shape.head_dim).transpose(1, 2)  # [B, heads, T, head_dim]

    q, k, v = _rotated(heads("q"), turn), _rotated(heads("k"), turn), heads("v")
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return functional.linear(out.transpose(1, 2).flatten(2), tensors[f"{at}.o_proj.weight"])


def _rope(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [tokens, dim / 2]."""
    frequency = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angle = torch.outer(torch.arange(tokens, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def _rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    one, other = x.chunk(2, dim=-1)
    return torch.cat((one * cos - other * sin, other * cos + one * sin), dim=-1)


def _batches(text: bytes, recipe: Recipe) -> Iterator[Tensor]:
    """Yield [batch, CONTEXT + 1] tokens from anywhere in the text."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    drawn = torch.Generator().manual_seed(recipe.seed + 1)
    for _ in range(recipe.steps):
        starts = torch.randint(0, len(data) - CONTEXT - 1, (recipe.batch,), generator=drawn)
        yield data[starts[:, None] + torch.arange(CONTEXT + 1)].long()


def _share_of_rate(step: int, recipe: Recipe) -> float:
    warmup = min(recipe.warmup, recipe.steps // 4)
    return min((step + 1) / max(warmup, 1), (recipe.steps - step) / max(recipe.steps - warmup, 1))


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
