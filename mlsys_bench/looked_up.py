"""What a person looks up, data beside that of `types`: what this machine can do, and the rows of a catalogue."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys_bench.types import Scalar


@dataclass(frozen=True, slots=True, kw_only=True)
class Ability:
    """One thing this machine can or cannot do, and what would change that."""

    name: str
    works: bool
    detail: str
    cure: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Doctor:
    """What this machine is and what can be measured on it."""

    abilities: tuple[Ability, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalog:
    """The rows of one catalogue, as printed: every one with its source and date."""

    catalog: Literal["gpus", "models", "prices", "apis"]
    rows: tuple[dict[str, Scalar], ...]
