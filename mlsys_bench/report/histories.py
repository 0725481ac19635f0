"""Results over commits in words and in characters: how each metric went, and where it changed for good."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from mlsys_bench.histories import Drawn, History, HistoryChange, HistoryPoint, HistorySeries
from mlsys_bench.record import write_csv as table_to
from mlsys_bench.report.courses import BARS
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, joined, parameters, percent, quantity, ratio
from mlsys_bench.units import count

COURSE = 24  # characters of a line over time
SHORT = 10  # characters of a commit
BREAK = "│"
_LEAST = 0.02  # of a logarithm: what is drawn at full height at least, so that no noise looks like a mountain
CSV = (
    "metric", "parameters", "unit", "better", "machine", "drawn", "created", "label", "commit", "branch",
    "base_commit", "launches", "measured", "ratio", "value", "low", "high", "change",
)  # fmt: skip
DRAWN = {
    "chain": "level by ratios: each candidate stands at its baseline's level times the ratio of the two, which ran side by side",
    "fixed": "ratios to the one baseline that all results share",
    "absolute": "what was measured, result by result: other days may differ though the program does not",
}
FOUND: tuple[tuple[set[Drawn], str], ...] = (
    ({"chain"}, "in a chain, a change is a run whose own ratio differs from 1 beyond chance, all runs of the series taken together (Holm)"),
    (
        {"fixed", "absolute"},
        "a level that jumps at a price, wanders with the machine, and takes a value beyond three sds for an outlier; in noise alone at "
        "most one series of 100 results in twenty shows a change; counters change wherever their value does",
    ),
)
_COLUMNS = (
    Column("metric", flexible=True),
    Column("results", right=True),
    Column("course"),
    Column("latest", right=True),
    Column("over all", right=True),
    Column("drawn", wide=True),
    Column("noise", right=True, wide=True),
)
_CHANGES = (Column("since"), Column("metric", flexible=True), Column("change", right=True), Column("between commits"))


def history(record: History) -> Section:
    """Return the courses of all series, their changes, and what is drawn."""
    changes = [(one, change) for one in record.series for change in one.changes]
    worse = sum(change.worse for _, change in changes)
    return Section(
        kind="gate-history",
        title="Results over commits",
        lead=_lead(record, len(changes), worse),
        tag="measured",
        tone="bad" if worse else "good" if record.series else "unsure",
        facts=tuple(_facts(record)),
        tables=(_changes(changes), _courses(record.series)) if changes else (_courses(record.series),) if record.series else (),
        notes=tuple(_notes(record)),
    )


def title(series: HistorySeries) -> str:
    """Return a series' metric with what tells it from others of that name."""
    return joined(series.name, parameters(series.parameters))


def commit(text: str | None, otherwise: str = "unknown") -> str:
    """Return the beginning of a commit, as people write it."""
    return text[:SHORT] if text else otherwise


def where(point: HistoryPoint) -> str:
    """Return what a result is called: its commit, else its label."""
    return commit(point.commit, point.label)


def _lead(record: History, changes: int, worse: int) -> str:
    if not record.series:
        return f"Nothing to show: no result since {record.since}." if record.since else "Nothing to show: the results hold no metric."
    held = f"{count(record.results, 'result')} in {len(record.series)} series"
    if not changes:
        return f"No lasting change found in {held}."
    return f"{count(changes, 'lasting change')} in {held}: {worse} for the worse, {changes - worse} for the better."


def _facts(record: History) -> Iterator[Fact]:
    yield Fact("Database", record.database, f"since {record.since}" if record.since else "")
    if record.machines > 1:
        yield Fact("Machines", f"{record.machines} classes, never joined", "a series for each: their hard fields differ")
    ends = [p.created for one in record.series for p in (one.points[0], one.points[-1])]
    if ends:
        yield Fact("From, to", f"{min(ends)[:10]} to {max(ends)[:10]}")


def _changes(found: Sequence[tuple[HistorySeries, HistoryChange]]) -> Table:
    latest_first = sorted(found, key=lambda pair: pair[1].created, reverse=True)
    return Table(title="Lasting changes", columns=_CHANGES, rows=tuple(_change(one, change) for one, change in latest_first))


def _change(series: HistorySeries, change: HistoryChange) -> tuple[Cell, ...]:
    sure = _between(change.interval) or "exact"
    here = series.points[change.point]
    between = f"{commit(change.after_commit, '?')}..{where(here)}" if change.after_commit else where(here)
    return (
        Cell(change.created[:10]),
        Cell(series.name, "strong", parameters(series.parameters)),
        Cell(ratio(change.ratio), "bad" if change.worse else "good", sure),
        Cell(between),
    )


def _courses(series: Sequence[HistorySeries]) -> Table:
    note = f"{BREAK} marks a lasting change; a line is as high as its own range, at least {percent(100 * _LEAST)}"
    several = len({one.machine for one in series}) > 1
    return Table(title="Courses", columns=_COLUMNS, rows=tuple(_row(one, one.machine if several else "") for one in series), note=note)


def _row(one: HistorySeries, machine: str) -> tuple[Cell, ...]:
    latest = quantity(one.points[-1].measured, one.unit)[0]
    noise = NONE if one.noise is None else percent(100 * one.noise)
    drift = f"drift {percent(100 * one.drift)}" if one.drift else ""
    name = Cell(one.name, "strong", joined(parameters(one.parameters), machine))
    return (
        name,
        Cell(f"{len(one.points)}"),
        Cell(course(one)),
        Cell(latest),
        Cell(ratio(one.total), "", _between(one.total_interval)),
        Cell(one.drawn),
        Cell(noise, "", drift),
    )


def _between(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"{100 * (interval[0] - 1):+.1f} to {ratio(interval[1])}"


def course(one: HistorySeries) -> str:
    """Return a series as a line of bars, a break before the first result after each change."""
    size = -(-len(one.points) // COURSE)
    groups = [one.points[i : i + size] for i in range(0, len(one.points), size)]
    logs = [_level([p.value for p in group]) for group in groups]
    low, high = min(logs), max(logs)
    short = max(0.0, _LEAST - (high - low)) / 2
    low, high = low - short, high + short
    breaks = {c.point // size for c in one.changes}
    bars = (BARS[1 + round((log - low) / (high - low) * (len(BARS) - 2))] for log in logs)
    return "".join(BREAK * (i in breaks) + bar for i, bar in enumerate(bars))


def _level(values: Sequence[float]) -> float:
    """Return a mean on a scale on which equal ratios are equal steps, where there is one."""
    if min(values) > 0:
        return math.fsum(math.log(v) for v in values) / len(values)
    return math.fsum(values) / len(values)


def _notes(record: History) -> Iterator[tuple[str, tuple[str, ...]]]:
    used = {one.drawn for one in record.series}
    drawn = tuple(f"{name}: {text}" for name, text in DRAWN.items() if name in used)
    if not drawn:
        return
    yield "What is drawn", drawn
    yield "How changes are found", (*(text for kinds, text in FOUND if used & kinds), "intervals: 90 %")
    said = tuple(f"{title(one)}: {note}" for one in record.series for note in one.notes)
    if said:
        yield "Notes", said


def write_csv(path: Path, record: History) -> Path:
    """Write every result of every series as a row, and return the path.  Raises RecordError."""
    rows = [row for one in record.series for row in _rows(one)]
    return table_to(path, CSV, rows)


def _rows(one: HistorySeries) -> Iterator[tuple[object, ...]]:
    changed = {c.point: c.ratio for c in one.changes}
    for at, p in enumerate(one.points):
        low, high = p.interval or (None, None)
        yield (
            one.name, parameters(one.parameters), one.unit, one.better, one.machine, one.drawn, p.created, p.label, p.commit, p.branch,
            p.base_commit, p.launches, p.measured, p.ratio, p.value, low, high, changed.get(at),
        )  # fmt: skip
