"""What every reader gives, and the little they share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round, Scalar

TIME_S = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A result of another tool.  Of its machine only what the file says for certain is known; `notes` belong beside a verdict."""

    tool: str
    where: str
    bench: Bench
    machine: Machine
    notes: tuple[str, ...] = ()


class Tool(Protocol):
    """One module of this package."""

    @property
    def NAME(self) -> str:  # noqa: N802  # a constant of the module
        """The name people give it by."""

    @property
    def HOW(self) -> str:  # noqa: N802
        """How such a file is made."""

    def knows(self, document: Any) -> bool:
        """Say whether this is such a result."""

    def reading(self, document: Any, where: str, folder: Path | None) -> Reading:
        """Return what it holds."""


def measurement(
    name: str,
    values: Iterable[Sequence[float]],
    *,
    unit: str = "s",
    better: Literal["lower", "higher"] = "lower",
    parameters: dict[str, Scalar] | None = None,
    started_s: Sequence[float] = (),
    deterministic: bool = False,
) -> Measurement:
    """Return a measurement with one launch for each group of values, each launch of one round."""
    launches = tuple(
        Launch(started_s=started_s[i] if started_s else 0.0, rounds=(Round(values=tuple(map(finite, group))),))
        for i, group in enumerate(values)
    )
    return Measurement(
        name=name, unit=unit, better=better, parameters=parameters or {}, launches=launches, deterministic=deterministic
    )  # fmt: skip


def skipped(name: str, why: str, parameters: dict[str, Scalar] | None = None, unit: str = "s") -> Measurement:
    """Return a measurement that is none, and why."""
    return Measurement(name=name, unit=unit, better="lower", parameters=parameters or {}, launches=(), skipped=why)


def finite(value: Any) -> float:
    """Return a measured number.  Raises ValueError for what is none: a result with holes is not guessed at."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} where a finite number is needed")
    return float(value)


def is_number(value: Any) -> bool:
    """Say whether this is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def text(value: Any) -> str | None:
    """Return what a file says in words or figures, None where it says nothing."""
    return None if value is None or value == "" else str(value)


def minor(version: Any) -> str | None:
    """Return '3.11' of '3.11.2 (64-bit)'."""
    return ".".join(str(version).split()[0].split(".")[:2]) if version else None


def named(names: Sequence[str], what: str) -> tuple[str, ...]:
    """Return one note about some names, none where there are none."""
    shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    return (f"{what}: {shown}",) if names else ()
