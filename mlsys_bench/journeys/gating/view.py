"""What a person sees while a gate measures: on a terminal a line per metric whose interval closes in, else a line per look."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mlsys_bench import units
from mlsys_bench.journeys.gating.pairs import Progress
from mlsys_bench.journeys.progress import Line
from mlsys_bench.verdicts import Finding

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 45  # of a bar, odd: no change is its middle
REACH = 2.0  # of a bar, in tolerances to either side
_COLOURS = {"regression": "red", "improved": "green", "pass": "green", "inconclusive": "yellow"}


class View:
    """Shows how a gate stands.  Use it as a context; `note` writes a line that stays."""

    def __init__(self, quiet: bool = False) -> None:
        """Be silent when asked to."""
        self._line = Line(quiet)
        self._quiet = quiet
        self._live: Any = None
        self._last_look = 0

    def __enter__(self) -> View:
        """Take the terminal."""
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.live import Live

            # no refresh of its own: its thread would compute while a side is timed
            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Write a line that stays."""
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._line.note(text)

    def show(self, progress: Progress) -> None:
        """Show where it stands after a pair."""
        if progress.pairs == 1:
            self.note(cost(progress))
        if self._live is not None:
            self._live.update(_table(progress), refresh=True)
        elif is_look(progress, self._last_look):
            self.note(look(progress))
        self._last_look = progress.standing.next_look or progress.pairs


def cost(progress: Progress) -> str:
    """Return what the run will take, told after its first pair."""
    affordable = 1 + int(max(0.0, progress.budget_s - progress.spent_s) / max(progress.pair_s, 1e-9))
    return (
        f"a pair of launches takes {units.show_s(progress.pair_s)}: the first look is after 6 pairs, the last after 20, or 40 to confirm a "
        f"small failure; the budget of {units.show_s(progress.budget_s)} is enough for {affordable}"
    )


def is_look(progress: Progress, due: int) -> bool:
    """Say whether this pair was one at which the gate may decide."""
    return progress.standing.decided or progress.standing.next_look is None or (due > 1 and progress.pairs == due)


def look(progress: Progress) -> str:
    """Return how it stands in a line."""
    found = "; ".join(_said(f) for f in progress.standing.verdict.findings if f.ratio is not None)
    after = f"after {_pairs(progress.pairs)}, {units.show_s(progress.spent_s)}"
    ahead = progress.standing.next_look
    if progress.standing.decided or ahead is None:
        return f"{after}: {found}"
    return f"{after}: {found}; next look after {ahead} pairs, in about {units.show_s(progress.left_s)}"


def _pairs(count: int) -> str:
    return f"{count} pair{'s' * (count != 1)}"


def _said(finding: Finding) -> str:
    low, high = finding.interval or (finding.ratio or 0.0, finding.ratio or 0.0)
    return f"{finding.name} {finding.ratio:.3f} ({low:.3f} to {high:.3f}) {finding.verdict}"


def _table(progress: Progress) -> Table:
    from rich.table import Table
    from rich.text import Text

    standing = progress.standing
    ahead = f"next look after {standing.next_look} pairs, in about {units.show_s(progress.left_s)}" if standing.next_look else "last look"
    table = Table(title=f"{_pairs(progress.pairs)}, {units.show_s(progress.spent_s)}; {ahead}", title_justify="left", box=None)
    for heading in ("metric", "candidate / baseline", "faster ← 1 → slower", "so far"):
        table.add_column(heading)
    for f in standing.verdict.findings:
        if f.ratio is not None:
            word = Text(f.verdict, style=_COLOURS.get(f.verdict, ""))
            low, high = f.interval or (f.ratio, f.ratio)
            table.add_row(f.name, f"{f.ratio:.3f} ({low:.3f} to {high:.3f})", bar(f, standing.verdict.tolerance), word)
    return table


def bar(finding: Finding, tolerance: float) -> str:
    """Return the interval of a metric drawn to scale, worse to the right: │ no change, ┊ a fifth of the tolerance, ┃ the tolerance."""
    d1 = math.log1p(finding.tolerance or tolerance)
    place = _scale(d1)
    cells = ["·"] * WIDTH
    cells[place(0.0)], cells[place(d1 / 5)], cells[place(d1)] = "│", "┊", "┃"
    if not finding.ratio or finding.ratio <= 0:
        return "".join(cells)
    sign = 1 if finding.better == "lower" else -1
    low, high = sorted(sign * math.log(end) if end > 0 else -math.inf * sign for end in finding.interval or (finding.ratio, finding.ratio))
    for at in range(place(low), place(high) + 1):
        cells[at] = "━" if cells[at] == "·" else cells[at]
    if low < -REACH * d1:
        cells[0] = "◀"
    if high > REACH * d1:
        cells[-1] = "▶"
    cells[place(sign * math.log(finding.ratio))] = "●"
    return "".join(cells)


def _scale(d1: float) -> Callable[[float], int]:
    """Return what places a log slowdown in a bar."""
    half = WIDTH // 2

    def place(value: float) -> int:
        share = min(1.0, max(-1.0, value / (REACH * d1)))
        return half + round(share * half)

    return place
