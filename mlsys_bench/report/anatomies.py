"""A decode step taken apart, in words: its operators from the longest on, what they leave over, and the engine's own clock beside them."""

from __future__ import annotations

from mlsys_bench.anatomy import RESIDUAL, Anatomy, Row
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Table, percent, quantity, time

FULL = 20  # characters of a bar that is the whole step
_COLUMNS = (
    Column("operator"), Column("times", right=True), Column("together", right=True), Column("of step", right=True),
    Column("achieved", right=True), Column("of reads", right=True), Column("", wide=True),
)  # fmt: skip


def table(taken: Anatomy) -> Table:
    """Return the operator table of a step: rows and the residual add up to the step."""
    rows = (*(_row(row) for row in taken.rows), _rest(taken), _whole(taken))
    return Table(title=f"Where a decode step goes: {of(taken)}", columns=_COLUMNS, rows=rows, note=_note(taken))


def fact(taken: Anatomy) -> Fact:
    """Return the step in a line: matrices, attention, the rest, what is left over."""
    linears = taken.group_s("linears")
    attention = sum(row.total_s for row in taken.rows if row.operator == "attention")
    other = taken.predicted_s - linears - attention
    parts = (("matrices", linears), ("attention", attention), ("other operators", other), ("overhead", taken.residual_s))
    return Fact("A step's time", ", ".join(f"{name} {100 * s / taken.step_s:.0f} %" for name, s in parts), of(taken))


def of(taken: Anatomy) -> str:
    """Return which step it is: model, precision, batch x context."""
    return f"{taken.model} {taken.precision}, {taken.batch} x {taken.context_tokens:,.0f}"


def _row(row: Row) -> tuple[Cell, ...]:
    rate = Cell(quantity(row.bytes_per_s, "B/s")[0]) if row.bytes_per_s else Cell(NONE, "muted")
    reads = Cell(percent(100 * row.of_read)) if row.of_read else Cell(NONE, "muted")
    name = Cell(row.operator, "strong", "" if row.is_measured else "between neighbours")
    times = Cell(f"{row.count:,}x {time(row.each_s)}")  # all columns in 80
    return name, times, *_part(row.total_s, row.share), rate, reads, Cell(bar(row.share), "muted")


def _rest(taken: Anatomy) -> tuple[Cell, ...]:
    share = taken.residual_s / taken.step_s
    blank = Cell("")
    return Cell(RESIDUAL, "unsure"), blank, *_part(taken.residual_s, share), blank, blank, Cell(bar(share), "unsure")


def _whole(taken: Anatomy) -> tuple[Cell, ...]:
    blank = Cell("")
    return Cell("the step, measured", "strong"), blank, *_part(taken.step_s, 1.0), blank, blank, blank


def _part(seconds: float, share: float) -> tuple[Cell, Cell]:
    text = time(abs(seconds))
    return Cell(f"-{text}" if seconds < 0 else text), Cell(percent(100 * share))


def bar(share: float) -> str:
    """Return a share as a bar; nothing for one below 0."""
    return "█" * round(FULL * max(0.0, min(1.0, share)))


def _note(taken: Anatomy) -> str:
    told = [f"operators timed alone explain {100 * taken.explained:.0f} % of the step"]
    if taken.parts:
        names = {"linears": "matrices", "between": "between them", "host": "outside the model"}
        told.append("the engine's own clock says " + ", ".join(f"{names.get(k, k)} {time(s)}" for k, s in taken.parts.items()))
    if taken.interrupted > 0.5:
        told.append("other processes had its core in most samples: the overhead holds their time too")
    if taken.missing:
        told.append(f"not measured, so in the overhead: {', '.join(taken.missing)}")
    return "; ".join(told)
