"""The queueing truth table, for tests that have it beside this checkout."""

from __future__ import annotations

import csv
import functools
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "shared" / "data" / "queueing" / "truth.csv"


def rows() -> list[dict[str, str]]:
    """Return all rows; skip the test where the table is not there."""
    if not PATH.exists():
        pytest.skip("the queueing truth table is not beside this checkout")
    with PATH.open(newline="") as file:
        return list(csv.DictReader(file))


@functools.cache
def by_parameters(model: str) -> dict[str, list[tuple[str, float, float]]]:
    """Return (quantity, value, precision) of one model's rows, by parameters."""
    grouped: dict[str, list[tuple[str, float, float]]] = {}
    for row in rows():
        if row["model"] == model:
            grouped.setdefault(row["parameters"], []).append((row["quantity"], float(row["value"]), float(row["precision_abs"])))
    assert grouped
    return grouped
