"""The queueing truth table, for tests that have it beside this checkout."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

PATH = Path(__file__).parents[2] / "shared" / "data" / "queueing" / "truth.csv"


def rows() -> list[dict[str, str]]:
    """Return all rows; skip the test where the table is not there."""
    if not PATH.exists():
        pytest.skip("the queueing truth table is not beside this checkout")
    with PATH.open(newline="") as file:
        return list(csv.DictReader(file))
