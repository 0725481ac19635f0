"""A number that people quote, and what it is when it is recomputed: the record of `mlsys claims`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys_bench.types import Provenance

Topic = Literal["memory", "queueing", "speed", "money", "statistics"]
Finding = Literal["holds", "holds only if", "wrong"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim.  `value` is what stands against the quoted figure, `low` and `high` its range over what the claim leaves open."""

    key: str
    topic: Topic
    claim: str  # as people say it
    quoted: str
    recomputed: str
    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    verdict: Finding
    because: str  # the condition, or the mistake, in a sentence
    formula: str
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """All claims that can be recomputed without measuring anything."""

    claims: tuple[Claim, ...]
