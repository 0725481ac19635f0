"""A bench record as one flat table, a row per measurement with its parameters as columns: for spreadsheets and data frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mlsys_bench import record
from mlsys_bench.readings.rows import Row

BEFORE = ("name", "group", "unit", "better")
AFTER = (
    "median", "low", "high", "samples", "flagged", "clock_hz", "other_clocks", "launches", "seconds", "bytes_per_s", "flops_per_s",
    "tokens_per_s", "joules_per_token", "bound", "share_of_ceiling", "share_of_datasheet", "error", "tolerance", "ended", "skipped",
)  # fmt: skip


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    """Write the rows, an empty cell for what is not known, and return the path.  Raises RecordError."""
    parameters = tuple(name for name in dict.fromkeys(name for row in rows for name in row.parameters) if name not in (*BEFORE, *AFTER))
    return record.write_csv(path, (*BEFORE, *parameters, *AFTER), (tuple(_cells(row, parameters)) for row in rows))


def _cells(row: Row, parameters: Sequence[str]) -> Iterator[object]:
    yield from (row.name, row.group, row.unit, row.better)
    yield from (row.parameters.get(name) for name in parameters)
    yield row.median
    yield from row.interval or (None, None)
    yield from (row.samples, row.flagged, row.clock_hz, row.other_clocks, row.launches)
    yield from (row.seconds, row.bytes_per_s, row.flops_per_s, row.tokens_per_s)
    yield from (row.joules_per_token, row.bound, row.share, row.of_sheet, row.error, row.tolerance, row.ended, row.skipped)
