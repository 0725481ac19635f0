"""Paint records on a terminal.  Fits 80 columns, says the same without colour, and leaves out what only a wide page can hold."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table as RichTable
from rich.text import Text

from mlsys_bench.record import Record
from mlsys_bench.report import content
from mlsys_bench.report.parts import Cell, Fact, Section, Table, Tone

STYLE: dict[Tone, str] = {"": "", "good": "green", "bad": "bold red", "unsure": "yellow", "muted": "dim", "strong": "bold"}
WIDE = 110  # columns from which the wide columns are shown
LABEL = 12
FLEXIBLE = 18  # least width of a column whose lines may break
ASCII = str.maketrans({
    "✓": "y", "✗": "n", "—": "-", "–": "-", "µ": "u", "×": "x", "─": "-", "━": "-", "…": ".", "│": "|", "▼": "v",
    **dict.fromkeys("┌┐└┘├┤┬┴┼", "+"), **dict(zip("▁▂▃▄▅▆▇█●·", "_.:-=+*##o.", strict=False)),
})  # fmt: skip


class Terminal(Console):
    """Standard output."""

    def on_broken_pipe(self) -> None:
        """Leave a reader who left to the command line: rich would end with status 1, which is an answer of ours."""
        raise BrokenPipeError


def show(record: Record, console: Console | None = None, *, extra: object = None, details: bool = True) -> None:
    """Print a record, and `extra` beside it (see `content.describe`); without `details` only what a manager reads."""
    console = console or Terminal()
    painted = renderable(record, width=console.width, extra=extra, details=details)
    if console.encoding.lower().startswith("utf"):
        console.print(painted)
        return
    with console.capture() as captured:
        console.print(painted)
    console.file.write(captured.get().translate(ASCII).encode(console.encoding, "replace").decode(console.encoding))


def renderable(record: Record, *, width: int = 80, extra: object = None, details: bool = True) -> RenderableType:
    """Return a record as something rich can print."""
    return Group(*(part for section in content.describe(record, extra) for part in _section(section, width, details)))


def _section(section: Section, width: int, details: bool) -> Iterator[RenderableType]:
    yield Rule(Text.assemble((section.title, "bold"), (f"  {section.tag}" * bool(section.tag), "dim")), align="left", style="dim")
    yield Text(section.lead, style=STYLE[section.tone])
    if section.facts:
        yield Padding(_facts(section.facts, width), (1, 0, 0, 0))
    if section.drawing:
        yield from _drawing(section.drawing, width)
    for at, table in enumerate(section.tables):
        if details or not table.detail:
            yield from _table(table, width)
        if at == 0 and section.course and max(map(len, section.course)) <= width:
            yield Text("\n" + "\n".join(section.course), no_wrap=True)
    for heading, lines in section.notes if details else ():
        yield Padding(Text(heading, style="bold"), (1, 0, 0, 0))
        yield _bullets(lines)
    yield Text("")


def _facts(facts: tuple[Fact, ...], width: int) -> RichTable:
    grid = RichTable.grid(padding=(0, 2, 0, 0))
    grid.add_column(min_width=LABEL, no_wrap=True, style="bold")
    grid.add_column(ratio=1)
    grid.add_column(no_wrap=True, style="dim", justify="right")
    grid.expand = True
    room = width - max(LABEL, *(len(f.label) for f in facts)) - max(len(f.tag) for f in facts) - 6
    for fact in facts:
        fits = len(fact.text) + len(fact.detail) + 2 <= room
        detail = f"{'  ' if fits else chr(10)}{fact.detail}" if fact.detail else ""
        text = Text.assemble((fact.text, STYLE[fact.tone]), (detail, "dim"))
        grid.add_row(Text(fact.label), text, Text(fact.tag))
    return grid


def _drawing(lines: tuple[str, ...], width: int) -> Iterator[RenderableType]:
    """Give a drawing as it is, or say how wide it is."""
    needed = max(map(len, lines))
    if needed > width:
        yield Text(f"\nthe drawing needs a terminal of {needed} columns, or --html FILE", style="dim italic")
        return
    yield Text("\n" + "\n".join(lines), no_wrap=True)


def _table(table: Table, width: int) -> Iterator[RenderableType]:
    keep = _fitting(table, width)
    painted = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), show_edge=False, header_style="dim", pad_edge=False)
    for i in keep:
        column = table.columns[i]
        justify = "right" if column.right else "left"
        painted.add_column(Text(column.title), justify=justify, no_wrap=not column.flexible, overflow="fold")  # type: ignore[arg-type]
    for row in table.rows:
        painted.add_row(*(_cell(row[i]) for i in keep))
    yield Padding(Text(table.title, style="bold") if table.title else Text(""), (1, 0, 0, 0) if table.title else (0, 0, 0, 0))
    yield painted
    left_out = [c.title for i, c in enumerate(table.columns) if i not in keep and not c.wide]
    for note in (table.note, f"too wide for this terminal, see --json: {', '.join(left_out)}" if left_out else ""):
        if note:
            yield Text(note, style="dim italic")


def _fitting(table: Table, width: int) -> list[int]:
    """Return the columns that fit: first without the wide ones, then as many as there is room for, from the left."""
    keep = [i for i, column in enumerate(table.columns) if width >= WIDE or not column.wide]
    while len(keep) > 2 and sum(_breadth(table, i) + 3 for i in keep) - 3 > width:
        keep.pop()
    return keep


def _breadth(table: Table, i: int) -> int:
    """Return the width a column needs at least."""
    column = table.columns[i]
    texts = [column.title, *(line for row in table.rows for line in (row[i].text, row[i].sub))]
    return min(FLEXIBLE, max(map(len, texts))) if column.flexible else max(map(len, texts))


def _cell(cell: Cell) -> Text:
    text = Text(cell.text, style=STYLE[cell.tone])
    return text.append(f"\n{cell.sub}", style="dim") if cell.sub else text


def _bullets(lines: tuple[str, ...]) -> RichTable:
    grid = RichTable.grid(padding=(0, 1, 0, 0))
    for line in lines:
        grid.add_row(Text("-"), Text(line, overflow="fold"))
    return grid
