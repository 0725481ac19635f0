"""Transformer architectures, and the bytes and FLOPs that one step of them costs.

architecture.py   the shape, and the matrices that follow from it
precision.py      which number format each part is kept in
cost.py           parameters, bytes, FLOPs, KV cache
catalogue.py      shipped shapes, found by name
config.py         any shape, from a Hugging Face config.json
memory.py         tokens that a replica can cache
"""

from __future__ import annotations

from pathlib import Path

from mlsys_bench.models.architecture import Architecture, Part, parts
from mlsys_bench.models.catalogue import aliases, every, is_named, named
from mlsys_bench.models.config import from_config, layer_kinds
from mlsys_bench.models.cost import (
    AttentionKind,
    attention_flops_per_pair,
    attention_kinds,
    counted,
    experts_hit,
    head_flops,
    kv_bytes,
    kv_bytes_per_token,
    linear_flops_per_token,
    linear_params,
    shard_weight_bytes,
    state_bytes,
    step_weight_bytes,
    weight_bytes,
)
from mlsys_bench.models.memory import ENGINES, KvBudget, activation_bytes, kv_budget_tokens
from mlsys_bench.models.precision import (
    BYTES,
    ENGINE_ALIASES,
    ENGINE_PRECISIONS,
    PRECISIONS,
    QUANTIZED,
    bytes_per_param,
    formats,
    group_bytes,
)

__all__ = [
    "BYTES",
    "ENGINES",
    "ENGINE_ALIASES",
    "ENGINE_PRECISIONS",
    "PRECISIONS",
    "QUANTIZED",
    "Architecture",
    "AttentionKind",
    "KvBudget",
    "Part",
    "activation_bytes",
    "aliases",
    "attention_flops_per_pair",
    "attention_kinds",
    "bytes_per_param",
    "counted",
    "every",
    "experts_hit",
    "find",
    "folder",
    "formats",
    "from_config",
    "group_bytes",
    "head_flops",
    "kv_budget_tokens",
    "kv_bytes",
    "kv_bytes_per_token",
    "layer_kinds",
    "linear_flops_per_token",
    "linear_params",
    "parts",
    "shard_weight_bytes",
    "state_bytes",
    "step_weight_bytes",
    "weight_bytes",
]


def find(name: str) -> Architecture:
    """Return the shape that a name means: a JSON file is a config, a folder a checkpoint, anything else a name.

    Raises BadInput for a file that cannot be read as one, UnknownName for a name nobody knows.

    Names are the catalogue's ids, aliases and Hugging Face ids in any case, and those of quantized copies.
    """
    path = Path(name)
    is_file = path.suffix == ".json" or name.startswith((".", "/", "~"))
    return from_config(path.expanduser()) if is_file or folder(name) else named(name)


def folder(name: str) -> Path | None:
    """Return the folder that a name means: a checkpoint; None for a file or a name of the catalogue."""
    path = Path(name).expanduser()
    is_meant = bool(name) and path.is_dir() and ((path / "config.json").exists() or not is_named(name))
    return path if is_meant or (name.startswith((".", "/", "~")) and path.is_dir()) else None
