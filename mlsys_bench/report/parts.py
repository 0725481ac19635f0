"""What a report is made of, whoever paints it: sections of facts and tables, and the printing of numbers with their intervals.

`content.describe` turns a record into sections; `terminal`, `html` and `markdown` only paint them, so the three cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from mlsys_bench import units
from mlsys_bench.stage_fleets import NO_END_S
from mlsys_bench.types import Provenance, Scalar

Tone = Literal["", "good", "bad", "unsure", "muted", "strong"]
Interval = tuple[float, float]
NONE = "—"


class Cell(NamedTuple):
    """One cell of a table.  `sub` is a second, quieter line: an interval, a limit."""

    text: str
    tone: Tone = ""
    sub: str = ""


class Column(NamedTuple):
    """One column.  A `wide` one is left out where the page is narrow; a `flexible` one may break its lines."""

    title: str
    right: bool = False
    wide: bool = False
    flexible: bool = False


class Fact(NamedTuple):
    """One labelled statement.  `tag` is its provenance, `detail` goes quietly after the text."""

    label: str
    text: str
    detail: str = ""
    tag: str = ""
    tone: Tone = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows under a title.  `detail` marks what a manager may skip."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    detail: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One record in words: the answer in a line, facts, tables, notes.  `tiles` are the figures for a slide."""

    kind: str
    title: str
    lead: str
    tag: str = ""
    tone: Tone = ""
    tiles: tuple[Fact, ...] = ()
    facts: tuple[Fact, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[tuple[str, tuple[str, ...]], ...] = ()  # heading, lines
    drawing: tuple[str, ...] = ()  # in characters of one width, for pages that cannot show a picture
    course: tuple[str, ...] = ()  # likewise, below the first table: how a run went


# ---------------------------------------------------------------- numbers


def digits(value: float) -> str:
    """Print three significant digits, thousands marked: 1234.5 -> '1,234', 0.01234 -> '0.0123'; nothing of what is beyond any number."""
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return NONE
    decimals = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-12))
    return f"{value:,.{min(decimals, 9)}f}"


def time_unit(value_s: float) -> tuple[float, str]:
    """Return the natural unit of a time and its length in seconds."""
    for length, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if abs(value_s) >= length * 0.9995:
            return length, unit
    return (1e-9, "ns") if value_s else (1.0, "s")


def time(value_s: float | None, like: float | None = None) -> str:
    """Print a duration, in the unit of `like` when given."""
    if value_s is None:
        return NONE
    if value_s >= NO_END_S:
        return "no answer"
    length, unit = time_unit(value_s if like is None else like)
    return f"{digits(value_s / length)} {unit}"


def time_span(interval: Interval | None, like: float | None = None) -> str:
    """Print an interval of durations in one unit: '45.0–60.2 ms'; nothing when there is none."""
    if interval is None:
        return ""
    if interval[1] >= NO_END_S:
        return f"{time(interval[0])} and more"
    length, unit = time_unit(max(interval) if like is None else like)
    return f"{digits(interval[0] / length)}–{digits(interval[1] / length)} {unit}"


def time_cell(value_s: float | None, interval: Interval | None = None, tone: Tone = "") -> Cell:
    """Return a duration with its interval below it."""
    return Cell(time(value_s), tone, time_span(interval, value_s)) if value_s is not None else Cell(NONE, "muted")


def whole(interval: Interval | None) -> str:
    """Print an interval of counts: '7–10'."""
    return "" if interval is None else f"{interval[0]:,.0f}–{interval[1]:,.0f}" if interval[0] != interval[1] else ""


def span(interval: Interval | None, scale: float = 1.0, unit: str = "") -> str:
    """Print an interval: '0.28–0.35', '62.0–75.0 %'; nothing when there is none."""
    if interval is None:
        return ""
    low, high = (digits(end * scale) for end in interval)
    return f"{low}–{high}{unit}"


def usd_span(interval: Interval | None) -> str:
    """Print an interval of dollars: '$55.04–$110.08'."""
    return "" if interval is None or interval[0] == interval[1] else "–".join(units.show_usd(end) for end in interval)


def quantity(value: float | None, unit: str, interval: Interval | None = None) -> tuple[str, str]:
    """Return a number in a benchmark's own unit, and its interval, both readable: ('2.10 ms', '2.05–2.20 ms').

    Seconds take their natural unit, units with a rate or a size a decimal prefix.
    """
    if value is None:
        return NONE, ""
    if unit == "s":
        return time(value), time_span(interval, value)
    scale, prefix = _decimal(value) if unit.startswith(("B", "FLOP", "token", "bytes")) else (1.0, "")
    name = f" {prefix}{'B' + unit[5:] if unit.startswith('bytes') else unit}".rstrip()
    return digits(value / scale) + name, span(interval, 1 / scale, name)


def _decimal(value: float) -> tuple[float, str]:
    return next(((s, p) for p, s in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if abs(value) >= s * 0.9995), (1.0, ""))


def percent(value: float | None, signed: bool = False) -> str:
    """Print a figure that already is in percent: 12.34 -> '12.3 %'."""
    return NONE if value is None else f"{value:{'+' if signed else ''}.1f} %"


def ratio(value: float | None) -> str:
    """Print candidate / baseline as a change: 1.052 -> '+5.2 %'."""
    return NONE if value is None else f"{100 * (value - 1):+.1f} %"


def mark(holds: bool | None) -> Cell:
    """Return ✓, ✗, or ? where nothing could be said."""
    return Cell("?", "unsure") if holds is None else Cell("✓", "good") if holds else Cell("✗", "bad")


def weakest(provenances: Iterable[Provenance]) -> str:
    """Return the weakest of some provenances as a tag, '' for none."""
    found = list(provenances)
    return Provenance.weakest(*found).value if found else ""


def scalar(value: Scalar) -> str:
    """Print any parameter: whole numbers whole, others with three digits."""
    if value is None:
        return NONE
    if isinstance(value, bool | str):
        return ("yes" if value else "no") if isinstance(value, bool) else value
    return f"{value:,.0f}" if float(value).is_integer() else digits(value)


def parameters(values: Mapping[str, Scalar]) -> str:
    """Print parameters in a line, zeros and unknowns left out: 'm 512, n 512, precision bf16'."""
    return ", ".join(f"{name} {scalar(v)}" for name, v in values.items() if v is not None and (isinstance(v, bool) or v != 0))


def joined(*parts: object) -> str:
    """Return what there is, with commas."""
    return ", ".join(str(part) for part in parts if part)
