"""The shipped architectures, `data/models.csv`, each row with source and date, and how they are found by name."""

from __future__ import annotations

import csv
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

from mlsys_bench import resources
from mlsys_bench.errors import unknown
from mlsys_bench.models.architecture import Architecture
from mlsys_bench.models.cost import counted

_QUANTIZED_COPY = re.compile(  # how copies in another number format, or of another date, are named: the shape is the same
    r"-(?:fp8|fp4|nvfp4|mxfp4|awq|gptq|int[48]|w\d+a\d+|quantized\.w\d+a\d+|bf16|dynamic|block|kv|hf|instruct|chat|it|\d{4})$"
)

_SAID = {  # by such names of the weights; of 'gptq-int8' the bits count
    "fp4": "fp4", "fp8": "fp8", "w8a8": "w8a8", "w4a8": "w4a8", "int8|w8a16": "int8", "awq|gptq|int4|w4a16": "int4", "bf16": "bf16",
}  # fmt: skip


def named(name: str) -> Architecture:
    """Return the architecture of a name: id, alias, Hugging Face id or that of a quantized copy, in any case.  Raises UnknownName."""
    found = _index().get(_plain(name)) or _index().get(_plain(_original(name)))
    if found is None:
        raise unknown("model", name, [a.id for a in every()])
    kept = _kept(name)
    return found if kept is None else dataclasses.replace(found, native_precision=kept)


def is_named(name: str) -> bool:
    """Say whether the catalogue knows a name."""
    return _plain(name) in _index() or _plain(_original(name)) in _index()


def every() -> tuple[Architecture, ...]:
    """Return the whole catalogue."""
    return tuple(a for a, _ in _rows())


def aliases(a: Architecture) -> tuple[str, ...]:
    """Return the names `find` knows it by; none for a shape that is not of the catalogue."""
    return next((names for known, names in _rows() if known.id == a.id), ())


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


def _kept(name: str) -> str | None:
    """Return the number format that a copy's name says its weights are kept in; None where it says none."""
    suffixes = name.strip().lower().replace("_", "-").rpartition("/")[2].removeprefix(_original(name))
    return next((kept for said, kept in _SAID.items() if re.search(said, suffixes)), None)


def _original(name: str) -> str:
    """Return the name of the model that a quantized copy was made of: no owner, no suffix that names a format."""
    text = name.strip().lower().replace("_", "-").rpartition("/")[2]
    while (shorter := _QUANTIZED_COPY.sub("", text)) != text:
        text = shorter
    return text


def _architecture(row: dict[str, str]) -> Architecture:
    """Return one row as a shape.  Every column that names a field is read by the field's type; an empty cell means its default."""
    fields: dict[str, Any] = {
        field.name: _READ[str(field.type)](row[field.name])
        for field in dataclasses.fields(Architecture)
        if row.get(field.name) and field.name not in _COUNTED
    }
    tower = float(row["tower_params_b"] or 0) * 1e9
    return counted(Architecture(**{**_ABSENT, **fields, "tower_params": tower}))


_COUNTED = {"params": 0.0, "active_params": 0.0}
_ABSENT = {"hf_id": "", "max_context": None, "experts": 0, "experts_per_token": 0, "tied_embeddings": False, **_COUNTED}
_READ: dict[str, Callable[[str], Any]] = {"str": str, "int": int, "float": float, "int | None": int, "bool": "True".__eq__}
