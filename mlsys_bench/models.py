"""Transformer architectures, and the bytes and FLOPs that one step of them costs.

Shapes come from `data/models.csv`, each row with source and date.  Parameters are counted by formula from the shape; only
architectures whose attention the shape does not describe (MLA) take their counts from the catalogue.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
from dataclasses import dataclass

from mlsys_bench import resources
from mlsys_bench.errors import BadInput, did_you_mean, unknown

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8", "int4")
QUANTIZED = ("int8", "fp8", "int4")  # of the linear layers only: embedding, norms and KV cache stay in 16 bit
_BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "int8": 1.0, "fp8": 1.0, "int4": 0.5 + 2 / 128}  # int4: an fp16 scale per group of 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The shape of a decoder-only transformer.  `experts` is 0 for a dense model, `ffn` then the whole MLP, else one expert's."""

    id: str
    hf_id: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_context: int | None
    experts: int
    experts_per_token: int
    tied_embeddings: bool
    attention: str
    params: float
    active_params: float
    source: str
    date: str
    mlp_matrices: int = 3  # gate, up, down; 2 where the MLP has no gate
    mla_kv_bytes_per_token: float | None = None  # 16-bit latent cache of multi-head latent attention, from the catalogue


def find(name: str) -> Architecture:
    """Return the architecture of a name: catalogue id, alias or Hugging Face id, in any case.  Raises UnknownName."""
    found = _index().get(_plain(name))
    if found is None:
        raise unknown("model", name, [a.id for a in every()])
    return found


def every() -> tuple[Architecture, ...]:
    """Return the whole catalogue."""
    return tuple(a for a, _ in _rows())


def aliases(a: Architecture) -> tuple[str, ...]:
    """Return the names `find` knows it by."""
    return next(names for known, names in _rows() if known.id == a.id)


def bytes_per_param(precision: str) -> float:
    """Return the bytes one weight of a linear layer takes, scales included."""
    if precision not in _BYTES:
        raise BadInput(f"unknown precision {precision!r}{did_you_mean(precision, PRECISIONS)}")
    return _BYTES[precision]


def linear_params(a: Architecture) -> int:
    """Return the parameters of all matrices a step may read: every layer's, all experts, and the output head; no embedding table."""
    if a.mla_kv_bytes_per_token is not None:
        return round(a.params) - a.vocab * a.hidden
    return a.layers * (_attention_params(a) + max(a.experts, 1) * _mlp_params(a) + a.hidden * a.experts) + a.vocab * a.hidden


def weight_bytes(a: Architecture, precision: str) -> float:
    """Return what all weights take in memory.  Quantizing spares the embedding table, which is also the head where they are tied."""
    spared = _spared_bytes_per_param(precision)
    quantized = _quantized_params(a)
    return quantized * bytes_per_param(precision) + (a.params - quantized) * spared


def step_weight_bytes(a: Architecture, precision: str, tokens: float = 1) -> float:
    """Return the bytes of weights that a step of so many tokens reads: layers and head, not the embedding table.

    A mixture reads the experts that at least one token is sent to: E (1 - (1 - k/E)^tokens) of E, were routing uniform.
    """
    head = a.vocab * a.hidden
    head_bytes = head * (_spared_bytes_per_param(precision) if a.tied_embeddings else bytes_per_param(precision))
    hit = experts_hit(a, tokens)
    layers = linear_params(a) - head - (a.experts - hit) * _expert_params(a)
    return layers * bytes_per_param(precision) + head_bytes


def experts_hit(a: Architecture, tokens: float) -> float:
    """Return how many experts of a layer so many tokens are expected to use, routed uniformly; 0 for a dense model."""
    if not a.experts:
        return 0.0
    missed = float((1 - a.experts_per_token / a.experts) ** tokens)
    return a.experts * (1 - missed)


def kv_bytes_per_token(a: Architecture, precision: str) -> float:
    """Return what one token takes in the KV cache: 16 bit for every precision but fp32, quantized weights or not."""
    scale = _spared_bytes_per_param(precision) / 2
    if a.mla_kv_bytes_per_token is not None:
        return a.mla_kv_bytes_per_token * scale
    return 2 * a.layers * a.kv_heads * a.head_dim * 2 * scale


def linear_flops_per_token(a: Architecture) -> float:
    """Return the FLOPs of the layers' matrices for one token: 2 per parameter that the token meets, head apart."""
    head = a.vocab * a.hidden
    idle = (a.experts - a.experts_per_token) * _expert_params(a)
    return 2.0 * (linear_params(a) - head - idle)


def head_flops(a: Architecture) -> float:
    """Return the FLOPs of the output head for one sampled token."""
    return 2.0 * a.hidden * a.vocab


def attention_flops_per_pair(a: Architecture) -> float:
    """Return the FLOPs of QK^T and PV for one query and one key, over all layers.

    For MLA this takes the head as 128 wide in both products and so is a lower bound.
    """
    return 4.0 * a.layers * a.heads * a.head_dim


def counted(a: Architecture) -> Architecture:
    """Return the architecture with its parameters counted from its shape: matrices, embedding, two norms a layer and one more.

    Biases and the extra norms of Qwen and Gemma are left out: below 0.03 % of any model in the catalogue.
    """
    norms = (2 * a.layers + 1) * a.hidden
    embedding = 0 if a.tied_embeddings else a.vocab * a.hidden
    total = linear_params(a) + embedding + norms
    idle = a.layers * max(a.experts - a.experts_per_token, 0) * _mlp_params(a)
    return dataclasses.replace(a, params=float(total), active_params=float(total - idle))


# ---------------------------------------------------------------- counting


def _attention_params(a: Architecture) -> int:
    return a.hidden * a.head_dim * (a.heads + 2 * a.kv_heads) + a.heads * a.head_dim * a.hidden


def _mlp_params(a: Architecture) -> int:
    return a.mlp_matrices * a.hidden * a.ffn


def _expert_params(a: Architecture) -> float:
    """Return the parameters of one expert, summed over layers; 0 for a dense model.

    Total and active parameters differ by the experts that stay idle, whatever else the model holds.
    """
    if not a.experts:
        return 0.0
    return (a.params - a.active_params) / (a.experts - a.experts_per_token)


def _quantized_params(a: Architecture) -> int:
    return linear_params(a) - (a.vocab * a.hidden if a.tied_embeddings else 0)


def _spared_bytes_per_param(precision: str) -> float:
    return 2.0 if precision in QUANTIZED else bytes_per_param(precision)


# ---------------------------------------------------------------- catalogue


@functools.cache
def _rows() -> tuple[tuple[Architecture, tuple[str, ...]], ...]:
    with resources.catalogue("models.csv").open(newline="", encoding="utf-8") as file:
        return tuple((_architecture(row), _names(row)) for row in csv.DictReader(file))


@functools.cache
def _index() -> dict[str, Architecture]:
    return {_plain(name): a for a, names in _rows() for name in names}


def _names(row: dict[str, str]) -> tuple[str, ...]:
    hub = row["hf_id"] if "/" in row["hf_id"] and "(" not in row["hf_id"] else ""
    names = [row["id"], hub, hub.rpartition("/")[2], *row["aliases"].split(";")]
    return tuple(dict.fromkeys(name for name in names if name))


def _plain(name: str) -> str:
    """Return a name as it is compared: no case, no separators, none of the suffixes that leave the shape as it is."""
    text = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("meta-llama/").removeprefix("meta-")
    for suffix in ("-hf", "-instruct", "-chat", "-it"):
        text = text.removesuffix(suffix)
    return text.replace("-", "")


def _architecture(row: dict[str, str]) -> Architecture:
    def number(key: str) -> int:
        return int(row[key] or 0)

    is_mla = row["attention"].startswith("mla")
    a = Architecture(
        id=row["id"], hf_id=row["hf_id"], layers=number("layers"), hidden=number("hidden"), heads=number("heads"),
        kv_heads=number("kv_heads"), head_dim=number("head_dim"), ffn=number("ffn_or_moe_ffn"), vocab=number("vocab"),
        max_context=number("max_context") or None, experts=number("experts"), experts_per_token=number("experts_per_token"),
        tied_embeddings=row["tied_embeddings"] == "True", attention=row["attention"], params=float(row["params_b"]) * 1e9,
        active_params=float(row["active_params_b"]) * 1e9, source=row["source"], date=row["date"],
        mlp_matrices=number("mlp_matrices"), mla_kv_bytes_per_token=float(row["kv_bytes_per_token_fp16"]) if is_mla else None,
    )  # fmt: skip
    return a if is_mla else counted(a)
