"""Tables of measured serving runs, read as experiments: each row's inputs, its results where it has some, and why not where it cannot be.

The kind of a table is told by its header; result columns may be empty or missing.  What the columns mean, and what had to be assumed, is
written in the module of each kind: `blis`, `closed_loop`, `inferencex`, `mlperf`; `layouts` for parallelism, `recipes` for how servers were
started.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlsys_bench import hardware, models, record, units
from mlsys_bench.errors import BadInput
from mlsys_bench.predict import floor
from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.predict.figures import precision_of
from mlsys_bench.predict.tables import blis, closed_loop, inferencex, mlperf
from mlsys_bench.predict.tables.mixture import mixed
from mlsys_bench.predict.tables.rows import Cells, Column, Figure, Format, Row, Unclear, counted

FORMATS = (blis.MEASURED, blis.RAW, closed_loop.FORMAT, inferencex.FORMAT, mlperf.FORMAT)

__all__ = [
    "FORMATS", "Column", "Figure", "Format", "Row", "Table", "calibration", "experiments", "predicted", "question", "read", "read_all",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A file of one kind: its columns as they stand, and its rows."""

    path: Path
    format: Format
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read(path: Path) -> Table:
    """Return the table of a CSV file.  Raises BadInput for a file that is none of the kinds, naming line and column of what is wrong."""
    return read_all([path])[0]


def read_all(paths: Sequence[Path]) -> list[Table]:
    """Return the tables of several files, as `read` does; what runs of one say of the version in use holds for the others as well."""
    found = [_read(path) for path in paths]
    dated = iter(inferencex.versioned([row for table in found if table.format is inferencex.FORMAT for row in table.rows]))
    return [
        dataclasses.replace(table, rows=tuple(next(dated) for _ in table.rows)) if table.format is inferencex.FORMAT else table
        for table in found
    ]


def _read(path: Path) -> Table:
    lines = record.csv_lines(path)
    if not lines:
        raise BadInput(f"{path}: is empty; the first line must name the columns")
    columns = tuple(map(str.strip, lines[0][1]))
    found = _format(path, columns)
    rows = [_row(path, found, columns, number, fields) for number, fields in lines[1:] if fields]
    if not rows:
        raise BadInput(f"{path}: has a header and no rows")
    if found is closed_loop.FORMAT:
        rows = closed_loop.joined(rows)
    return Table(path=path, format=found, columns=columns, rows=tuple(rows))


def experiments(table: Table) -> tuple[Experiment, ...]:
    """Return every experiment of the rows that are understood, each once; a row over two stages is two."""
    return tuple({experiment.key: experiment for row in table.rows for experiment, _ in row.parts}.values())


def calibration(table: Table) -> tuple[Experiment, ...]:
    """Return the experiments to learn from: those with a result of their own, each once.

    So not the parts of a summary, and not a summary that only repeats its one stage.  Raises BadInput for what no such system can have
    shown: a prediction would believe it.
    """
    for row in table.rows:
        for problem in filter(None, (floor.problem(experiment) for experiment, _ in row.parts)):
            causes = "are the units of the columns, the GPU, the model, the precision and the parallelism right?"
            raise BadInput(f"{table.path}: line {row.line}: {problem}: {causes}")
    measured = [experiment for experiment in experiments(table) if experiment.measured]
    return tuple({str((question(e), sorted(e.measured.items()))): e for e in reversed(measured)}.values())[::-1]


def question(experiment: Experiment) -> Experiment:
    """Return what is asked, without whose it is and what came out: equal for two rows that ask the same."""
    return dataclasses.replace(experiment, key="", group="", measured={})


def predicted(table: Table, row: Row, predictions: dict[str, Prediction]) -> dict[str, Figure]:
    """Return a row's predictions by result column, in the column's own unit.  A row over two stages is their mixture."""
    parts = [(experiment, predictions.get(experiment.key), share) for experiment, share in row.parts]
    if not parts or any(found is None for _, found, _ in parts):
        return {}
    figures = [(table.format.derive(experiment, dict(found.figures)), share) for experiment, found, share in parts if found]
    whole = figures[0][0] if len(figures) == 1 else mixed(figures)
    return {
        name: (whole[c.figure][0] * c.per_unit, whole[c.figure][1] * c.per_unit, whole[c.figure][2] * c.per_unit)
        for name, c in table.format.results.items()
        if c.figure in whole
    }


def _format(path: Path, columns: Sequence[str]) -> Format:
    for name in columns:
        if columns.count(name) > 1:
            raise BadInput(f"{path}: line 1: column {name!r} stands there twice")
        if name.startswith(("predicted_", "low_", "high_")) or name == "provenance":
            raise BadInput(f"{path}: line 1: column {name} would be overwritten by the predictions; remove or rename it")
    found = next((known for known in FORMATS if set(known.tells) <= set(columns)), None)
    if found is None:
        kinds = "; ".join(f"{known.name} has {', '.join(known.tells)}" for known in FORMATS)
        raise BadInput(f"{path}: line 1: these columns are of no table known here. {kinds}")
    return found


def _row(path: Path, found: Format, columns: Sequence[str], number: int, fields: Sequence[str]) -> Row:
    if len(fields) != len(columns):
        raise BadInput(f"{path}: line {number}: has {len(fields)} fields where the header has {len(columns)} columns")
    cells = Cells(number, dict(zip(columns, fields, strict=True)))
    try:
        row = found.read(cells, path.stem)
        for experiment, _ in row.parts:
            _check_fits(experiment)
            _check_count(cells.get(found.device), experiment)
        return row
    except Unclear as problem:
        return Row(line=number, cells=dict(cells.text), problem=str(problem))
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from error


def _check_fits(e: Experiment) -> None:
    """Raise Unclear where the weights of a replica are more than its devices have memory."""
    device, devices = hardware.find(e.device), e.stage_gpus * e.pp
    weights = models.weight_bytes(models.find(e.model), precision_of(e))
    if weights > devices * device.memory_bytes:
        size, room = units.show_bytes(weights), units.show_bytes(device.memory_bytes)
        raise Unclear(
            f"{size} of weights do not fit {devices} x {device.id} of {room}: is the parallelism missing, or another precision meant?"
        )


def _check_count(name: str, e: Experiment) -> None:
    """Raise Unclear where a device's name says how many there are, and the parallelism says otherwise."""
    count, _ = counted(name)
    if count is not None and count != e.gpus:
        raise Unclear(f"{name} are {count} GPUs, and the parallelism of the row takes {e.gpus}; which is it?")
