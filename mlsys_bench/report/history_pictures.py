"""Trends as a picture: each series' results with intervals over commits, lasting changes marked with commit and size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlsys_bench.histories import History, HistoryChange, HistorySeries
from mlsys_bench.report.figures import BLUE, GREEN, GREY, HEAD, PAPER, RED, _page, _plain, _styled
from mlsys_bench.report.histories import title, where
from mlsys_bench.report.parts import ratio, time_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TREND = "Results in the order they were measured, with 90 % intervals; dashed: lasting changes, with the first commit after each."
MOST = 8  # series on a page; those with changes come first
_TALL = 2.5  # inches of a panel
_TICKS = 8
_ROWS = 3  # of the words beside changes
_SHOWN = {"chain": "level, first baseline = 1", "fixed": "ratio to the baseline"}


@_styled
def trends(record: History, subtitle: str) -> Figure | None:
    """Draw the series, those with changes first; None without any."""
    shown = record.series[:MOST]
    if not shown:
        return None
    left = f"; {len(record.series) - len(shown)} more series in the table" if len(record.series) > len(shown) else ""
    page = _page("Results over commits", subtitle + left, HEAD + _TALL * len(shown))
    for panel, one in zip(page.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
        _series(panel, one)
    return page


def _series(panel: Axes, one: HistorySeries) -> None:
    scale, unit = _scale(one)
    values = [p.value / scale for p in one.points]
    at = range(len(values))
    known = [(x, p.interval[0] / scale, p.interval[1] / scale) for x, p in zip(at, one.points, strict=True) if p.interval]
    if known:
        xs, lows, highs = zip(*known, strict=True)
        panel.vlines(xs, lows, highs, color=BLUE, lw=1.2, alpha=0.45)
    panel.plot(at, values, "o", color=BLUE, ms=4.5, mec="white", mew=0.4)
    _levels(panel, one, values)
    low, high = panel.get_ylim()
    middle = (low + high) / 2
    half = max((high - low) / 2, 0.02 * abs(middle))  # noise of 0.1 % is no mountain
    rows = min(len(one.changes), _ROWS)
    panel.set_ylim(middle - half, middle + (1 + 0.3 * rows) * half)
    for number, change in enumerate(one.changes):
        _mark(panel, one, change, number % _ROWS)
    _axis(panel, one, unit)


def _levels(panel: Axes, one: HistorySeries, values: Sequence[float]) -> None:
    """Draw where the results stand between changes: their median, or in a chain the way itself."""
    if one.drawn == "chain":
        panel.plot(range(len(values)), values, color=BLUE, lw=1.0, alpha=0.6)
        return
    edges = [0, *(c.point for c in one.changes), len(values)]
    for start, end in itertools.pairwise(edges):
        inside = sorted(values[start:end])
        panel.hlines(inside[len(inside) // 2], start - 0.4, end - 0.6, color=BLUE, lw=1.8, alpha=0.8)


def _mark(panel: Axes, one: HistorySeries, change: HistoryChange, row: int) -> None:
    """Mark a change, its words in one of several rows so that neighbours do not write over each other."""
    colour = RED if change.worse else GREEN
    panel.axvline(change.point - 0.5, color=colour, lw=1.4, ls="--")
    right = change.point < 0.75 * len(one.points)
    text = _plain(f"{ratio(change.ratio)} at {where(one.points[change.point])}")
    panel.annotate(
        text, (change.point - 0.5, 0.99 - 0.11 * row), xycoords=("data", "axes fraction"), xytext=(5 if right else -5, 0),
        textcoords="offset points",
        ha="left" if right else "right", va="top", fontsize=10, color=colour, bbox=PAPER,
    )  # fmt: skip


def _axis(panel: Axes, one: HistorySeries, unit: str) -> None:
    step = max(1, -(-len(one.points) // _TICKS))
    ticks = list(range(0, len(one.points), step))
    panel.set_xticks(ticks, [_plain(where(one.points[i])[:8]) for i in ticks], fontsize=9)
    panel.set_xlim(-0.8, len(one.points) - 0.2)
    panel.set_ylabel(_SHOWN.get(one.drawn, unit), fontsize=10)
    panel.set_title(_plain(f"{title(one)}  ({one.better} is better; {one.machine_name})"), fontsize=10.5, loc="left")
    panel.grid(visible=False, axis="x")
    panel.tick_params(axis="x", colors=GREY)


def _scale(one: HistorySeries) -> tuple[float, str]:
    if one.drawn == "absolute" and one.unit == "s":
        return time_unit(one.points[-1].value)
    return 1.0, one.unit
