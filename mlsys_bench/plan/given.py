"""A figure that a plan takes from elsewhere: its value, where it comes from, and between which values it lies, when that is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlsys_bench.errors import BadInput
from mlsys_bench.types import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """One figure in SI units.  `low` and `high` are its 90 % interval, None where nobody has given one."""

    value: float
    provenance: Provenance
    source: str
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        """Refuse what is no finite number from 0 up, and an interval that leaves the value out."""
        if not (self.value >= 0 and math.isfinite(self.value)):
            raise BadInput(f"{self.value:g} ({self.source}): it must be a finite number from 0 up")
        if not (self.value if self.low is None else self.low) <= self.value <= (self.value if self.high is None else self.high):
            raise BadInput(f"{self.value:g} ({self.source}) lies outside its own interval, {self.low} to {self.high}")


def assumed(value: float, source: str, low: float | None = None, high: float | None = None) -> Given:
    """Return a figure that nobody measured here."""
    return Given(value=value, provenance=Provenance.ASSUMED, source=source, low=low, high=high)


def measured(value: float, source: str, low: float | None = None, high: float | None = None) -> Given:
    """Return a figure that was measured."""
    return Given(value=value, provenance=Provenance.MEASURED, source=source, low=low, high=high)
