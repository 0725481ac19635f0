"""Losses of a model in number formats, beside each other: the difference from fp32 is taken window by window."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench import models, stats
from mlsys_bench.report.parts import NONE, Cell, Column, Table
from mlsys_bench.types import Measurement, Scalar

NAME = "quality.loss"
_BESIDE = ("model", "steps", "corpus")  # what must agree for two losses to be of the same windows of the same model


def table(measurements: Sequence[Measurement]) -> Table:
    """Return precision, quantizer and KV cache with their loss, and what it is above that of fp32."""
    columns = (
        Column("precision"), Column("quantizer"), Column("KV cache"), Column("bytes/weight", right=True), Column("bit/byte", right=True),
        Column("against fp32", right=True), Column("windows", right=True, wide=True),
    )  # fmt: skip
    note = "loss on held-out text; below each difference its 90 % interval, window by window"
    return Table(title="Loss of the byte model", columns=columns, rows=tuple(_row(m, measurements) for m in measurements), note=note)


def difference(m: Measurement, base: Measurement) -> npt.NDArray[np.float64]:
    """Return the loss of each window above that of another way to keep the model."""
    return _values(m) - _values(base)


def _row(m: Measurement, measurements: Sequence[Measurement]) -> tuple[Cell, ...]:
    p, values = m.parameters, _values(m)
    base = next((b for b in measurements if _is_exact(b.parameters) and _same(b, m)), None)
    rounded = NONE if p.get("precision") == "fp32" else _text(p, "quantizer")
    kept = (Cell(_text(p, "precision"), "strong"), Cell(rounded), Cell(_text(p, "kv")))
    size, count = Cell(f"{models.bytes_per_param(_text(p, 'precision')):.2f}"), Cell(f"{len(values):,}")
    loss = Cell(f"{values.mean():.4f}")
    if base is None or base is m:
        return (*kept, size, loss, Cell(NONE, "muted"), count)
    above = difference(m, base)
    interval = stats.mean_interval(above.tolist())
    span = "" if interval is None else f"{interval[0]:+.4f} .. {interval[1]:+.4f}"
    return (*kept, size, loss, Cell(f"{above.mean():+.4f}", "", span), count)


def _is_exact(p: dict[str, Scalar]) -> bool:
    return p.get("precision") == "fp32" and p.get("kv") == "auto"


def _same(one: Measurement, other: Measurement) -> bool:
    alike = all(one.parameters.get(name) == other.parameters.get(name) for name in _BESIDE)
    return alike and len(_values(one)) == len(_values(other))


def _values(m: Measurement) -> npt.NDArray[np.float64]:
    return np.array([v for launch in m.launches for r in launch.rounds for v in r.values])


def _text(p: dict[str, Scalar], name: str) -> str:
    return str(p.get(name) or NONE)
