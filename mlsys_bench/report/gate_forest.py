"""The forest of a gate: every metric's ratio with its interval, and the lines it was held against."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlsys_bench.report import gates
from mlsys_bench.report.figures import BLUE, GREEN, GREY, HEAD, INK, ORANGE, RED, _page, _plain, _styled
from mlsys_bench.report.parts import ratio
from mlsys_bench.verdicts import WORST_FIRST, Finding, Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

FOREST = (
    "Each metric's ratio with the interval of its last look (98 % or more), worst on top. Right of 0 is worse; a metric passes where its "
    "interval ends left of the solid line, its tolerance, and fails where it begins right of the dotted one and does not."
)
MOST_ROWS = 24
WIDEST = 36  # characters of a label's line
LOOKS: dict[str, tuple[str, str, str]] = {  # colour, marker, its filling
    "regression": (RED, ">", RED), "suspect": (ORANGE, "^", "white"), "inconclusive": (ORANGE, "D", "white"),
    "improved": (GREEN, "<", GREEN), "pass": (BLUE, "o", BLUE), "not_comparable": (GREY, "x", GREY),
}  # fmt: skip


@_styled
def forest(record: Verdict, subtitle: str) -> Figure | None:
    """Draw every metric's ratio with its interval, and the lines it was held against; None where none has a ratio."""
    shown = with_ratio(record)[:MOST_ROWS]
    if not shown:
        return None
    left_out = len(with_ratio(record)) - len(shown)
    page = _page("Candidate against baseline", subtitle + f"; {left_out} more below these" * bool(left_out), HEAD + 1.3 + 0.44 * len(shown))
    forest_panel(page.subplots(), shown, record.tolerance, WIDEST)
    return page


def with_ratio(record: Verdict) -> list[Finding]:
    """Return the findings that can be drawn, worst first."""
    return [f for f in gates.ordered(record.findings) if f.ratio is not None and f.ratio > 0]


def forest_panel(panel: Axes, shown: Sequence[Finding], tolerance: float, widest: int) -> None:
    """Draw one row for each finding."""
    left, right = _edges(shown, tolerance)
    for at, f in enumerate(shown):
        _lines(panel, at, f.tolerance or tolerance, f.limit is None)
        _whisker(panel, at, f, left, right)
        said = ("same" if f.ratio == 1 else ratio(f.ratio)) + (f"  ({gates.ends(f)})" if f.interval else "")
        panel.text(
            1.03,
            at,
            said,
            transform=panel.get_yaxis_transform(),
            va="center",
            fontsize=10.5,
            fontweight="bold" if f.verdict == "regression" else "normal",
        )
    panel.axvline(0, color=INK, lw=1.1, zorder=1)
    panel.set_yticks(range(len(shown)), [row_label(name, f, widest) for name, f in zip(gates.labels(shown), shown, strict=True)])
    panel.set(ylim=(len(shown) - 0.45, -0.6), xlim=(left, right))
    panel.grid(visible=False, axis="y")
    panel.tick_params(axis="y", length=0, pad=9)
    panel.xaxis.set_major_formatter(lambda v, _: f"{v:+g}" if v else "0")
    panel.set_xlabel("← better        worse by, %        worse →")
    _legend(panel.figure, shown)


def _edges(shown: Sequence[Finding], tolerance: float) -> tuple[float, float]:
    """Return where the axis ends, in percent: tolerances and most estimates inside, the widest intervals cut."""
    counted = [f for f in shown if f.may_fail] or shown
    lines = max(100 * (f.tolerance or tolerance) for f in shown)
    middle = _most([abs(_percent(gates.badness(f))) for f in counted])
    widths = _most([max(abs(_percent(end)) for end in _worse(f)) for f in counted])
    furthest = 1.12 * max(1.35 * lines, middle, min(widths, 3 * max(lines, middle)))
    low, high = (1.12 * _percent(pick(end for f in shown for end in _worse(f))) for pick in (min, max))
    return -min(furthest, max(1.35 * lines, -low)), min(furthest, max(1.35 * lines, high))


def _most(values: Sequence[float]) -> float:
    """Return what four in five do not exceed; of three or fewer the largest."""
    return sorted(values)[int(0.8 * (len(values) - 1))] if len(values) > 3 else max(values)


def _worse(f: Finding) -> tuple[float, float]:
    """Return the ends of an interval in logarithms, + for worse; of a metric without one its ratio twice."""
    if f.interval is None or min(f.interval) <= 0:
        return gates.badness(f), gates.badness(f)
    low, high = sorted(math.log(end) * (1 if f.better == "lower" else -1) for end in f.interval)
    return low, high


def _percent(log: float) -> float:
    return 100 * math.expm1(min(log, 10.0))


def _lines(panel: Axes, at: int, tolerance: float, relative: bool) -> None:
    """Draw what a row is held against: its tolerance, and a fifth of it, beyond which a regression must lie whole."""
    if not relative:
        return
    top, bottom = at - 0.5, at + 0.5
    d1 = math.log1p(tolerance)
    panel.fill_betweenx((top, bottom), _percent(-d1), _percent(d1), color=BLUE, alpha=0.07, lw=0, zorder=0)
    panel.vlines(_percent(d1), top, bottom, color=INK, lw=1.3, zorder=1)
    panel.vlines(_percent(d1 / 5), top, bottom, color=INK, lw=1.1, ls=(0, (1, 2)), zorder=1)


def _whisker(panel: Axes, at: int, f: Finding, left: float, right: float) -> None:
    colour, marker, filling = LOOKS[f.verdict]
    low, high = (_percent(end) for end in _worse(f))
    middle = _percent(gates.badness(f))
    faded = 1.0 if f.may_fail else 0.55
    panel.hlines(at, max(low, left), min(high, right), color=colour, lw=2.4, alpha=faded, zorder=2)
    for end, beyond, arrow in ((left, low < left, "<"), (right, high > right, ">")):
        if beyond:
            panel.plot(end, at, arrow, color=colour, ms=7, clip_on=False, alpha=faded, zorder=4)
    if left <= middle <= right:
        panel.plot(middle, at, marker, color=colour, mfc=filling, mec=colour, mew=1.8, ms=8.5, alpha=faded, zorder=3)


def row_label(name: str, f: Finding, widest: int) -> str:
    """Return what stands left of a row: the name in at most two lines, and which way is better where that is upwards."""
    lines = _wrapped(_plain(name), widest)
    more = [word for word, holds in (("higher is better", f.better == "higher"), ("only reported", not f.may_fail)) if holds]
    return "\n".join(lines) + (f"\n({', '.join(more)})" if more else "")


def _legend(page: Figure | SubFigure, shown: Sequence[Finding]) -> None:
    from matplotlib.lines import Line2D

    said = [word for word in WORST_FIRST if any(f.verdict == word for f in shown)]
    handles = [
        Line2D([], [], color=colour, marker=marker, mfc=filling, mec=colour, mew=1.8, ms=8, lw=2.4, label=gates.word(word))
        for word, (colour, marker, filling) in ((word, LOOKS[word]) for word in said)
    ]
    handles.append(Line2D([], [], color=INK, lw=1.3, label="tolerance"))
    handles.append(Line2D([], [], color=INK, lw=1.1, ls=(0, (1, 2)), label="a fifth of it"))
    page.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)))


def _wrapped(text: str, widest: int) -> list[str]:
    """Break a name behind a dot, a dash or a space, into at most two lines; what is longer loses its middle."""
    if len(text) > 2 * widest:
        text = f"{text[: widest - 2]}…{text[-widest + 4 :]}"
    parts = re.findall(r"[^.,/_ -]*[.,/_ -]?", text)
    lines = [""]
    for part in parts:
        lines = [*lines[:-1], lines[-1] + part] if len(lines[-1]) + len(part.rstrip()) <= widest or len(lines) == 2 else [*lines, part]
    return [line.strip() for line in lines]
