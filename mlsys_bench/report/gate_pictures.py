"""The launches of a gate as pictures: in pairs by time, at each quantile, and what equal programs differ by on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench.report import gate_calibrations, gate_launches, gates
from mlsys_bench.report.figures import BLUE, GREY, HEAD, INK, PAPER, RED, _page, _plain, _styled
from mlsys_bench.report.gate_forest import LOOKS, MOST_ROWS, WIDEST, row_label
from mlsys_bench.report.gate_launches import Series
from mlsys_bench.report.parts import quantity, ratio, time_unit
from mlsys_bench.units import count
from mlsys_bench.verdicts import GateCalibration, GateRun, Resolution

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

LAUNCHES = "Each launch is one dot: a drift moves both sides, a process with two speeds jumps; beside it the change of each pair."
QUANTILES = "Where in the distribution the sides differ: a level line is a shift, a line that rises at its end is the tail alone."
SAME = "What two launches of the same program differ by on this machine; what lies outside the band would look like a change of that size."
MOST_SERIES = 4  # of launches and quantiles


@_styled
def launches(record: GateRun, subtitle: str) -> Figure | None:
    """Draw the launches of the worst metrics in order of time, and the change of each pair beside them; None without any."""
    found = worst(record)
    if not found:
        return None
    page = _page("Launch by launch", subtitle, HEAD + 0.7 + 2.5 * len(found))
    panels = page.subplots(len(found), 2, squeeze=False, width_ratios=(1.5, 1), sharex="row")
    for (left, right), each, label in zip(panels, found, titles(found), strict=True):
        numbers_panel(left, each, label)
        changes_panel(right, each, record.verdict.tolerance)
    for panel in panels[-1]:
        panel.set_xlabel("launch pair, in order of time")
    page.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return page


@_styled
def quantiles(record: GateRun, subtitle: str) -> Figure | None:
    """Draw how the sides of the worst metrics differ at each quantile; None where launches have few samples."""
    found = [each for each in worst(record) if gate_launches.quantiles(each) is not None]
    if not found:
        return None
    columns = min(2, len(found))
    rows = math.ceil(len(found) / columns)
    page = _page("A shift, or only the tail?", subtitle, HEAD + 0.3 + 3.1 * rows)
    panels = page.subplots(rows, columns, squeeze=False).ravel()
    for panel, each, label in zip(panels, found, titles(found), strict=False):
        quantile_panel(panel, each, label, record.verdict.tolerance)
    for panel in panels[len(found) :]:
        panel.set_axis_off()
    return page


@_styled
def same(record: GateCalibration, subtitle: str) -> Figure | None:
    """Draw what launches of one program differ by, metric by metric, with the tolerance as a band; None without any."""
    found = _apart(record)[:MOST_ROWS]
    if not found:
        return None
    page = _page("The same program twice, on this machine", subtitle, HEAD + 1.2 + _row_height(len(found)) * len(found))
    _same(page.subplots(), record, found)
    return page


def run_subtitle(record: GateRun) -> str:
    """Say under the title where the numbers come from."""
    pairs = count(gates.launch_pairs(record), "launch pair")
    return f"measured; {', '.join(filter(None, (gates.sides(record), pairs, gates.word(record.contention.verdict))))}"


def calibration_subtitle(record: GateCalibration) -> str:
    """Say under the title what was run twice."""
    pairs = count(gates.launch_pairs(record.run), "launch pair")
    return f"measured; {gates.brief(record.run.base.label)} on both sides, {pairs}, {gates.word(record.run.contention.verdict)}"


def worst(record: GateRun) -> tuple[Series, ...]:
    """Return the metrics worth drawing launch by launch: the worst first, counters left out."""
    every = (gate_launches.series(record, f) for f in gates.ordered(record.verdict.findings))
    return tuple(each for each in every if each is not None)[:MOST_SERIES]


# ---------------------------------------------------------------- launch by launch


def numbers_panel(panel: Axes, found: Series, label: str) -> None:
    """Draw the number of each launch, the two of a pair joined."""
    scale, unit = _unit(found)
    before, after = found.before / scale, found.after / scale
    panel.vlines(found.pairs, before, after, color=GREY, lw=1.2, zorder=1)
    panel.plot(found.pairs, before, "o", color=BLUE, ms=7, mec="white", label="baseline", zorder=2)
    panel.plot(found.pairs, after, "^", color=RED, ms=7.5, mec="white", label="candidate", zorder=3)
    panel.set_title(_short(label, 44), fontsize=12, loc="left")
    panel.set_ylabel(unit)
    _whole_pairs(panel, found)


def changes_panel(panel: Axes, found: Series, tolerance: float) -> None:
    """Draw the change of each pair, the ratio with its interval, and the tolerance."""
    f = found.finding
    panel.axhline(0, color=INK, lw=1.1)
    accepted = f.tolerance or tolerance
    limit = 100 * accepted if f.better == "lower" else 100 * (1 / (1 + accepted) - 1)
    panel.axhline(limit, color=INK, lw=1.3, ls=(0, (5, 2)))
    colour = LOOKS[f.verdict][0]
    if f.interval is not None:
        panel.axhspan(*(100 * (end - 1) for end in f.interval), color=colour, alpha=0.2, lw=0)
    if f.ratio is not None:
        panel.axhline(100 * (f.ratio - 1), color=colour, lw=1.8)
    panel.plot(found.pairs, 100 * found.changes, "o", color=INK, ms=5.5, mec="white")
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, 1.25 * limit, -0.25 * abs(limit)), max(high, 1.25 * limit, 0.25 * abs(limit)))
    panel.set_title(f"{gates.word(f.verdict)}, {ratio(f.ratio)}", fontsize=12, loc="left", color=colour, fontweight="bold")
    panel.set_ylabel("change, %")
    _whole_pairs(panel, found)
    panel.annotate("tolerance", (1, limit), xycoords=panel.get_yaxis_transform(), xytext=(-2, 3), textcoords="offset points", ha="right",
                   fontsize=9.5, bbox=PAPER | {"pad": 0.5, "alpha": 0.7})  # fmt: skip


def _whole_pairs(panel: Axes, found: Series) -> None:
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    panel.set_xlim(found.pairs[0] - 0.6, found.pairs[-1] + 0.6)
    panel.grid(visible=False, axis="x")


def _unit(found: Series) -> tuple[float, str]:
    """Return by what numbers are divided, and what that is called."""
    top = float(max(found.before.max(), found.after.max()))
    if found.finding.unit == "s":
        return time_unit(top)
    text = quantity(top, found.finding.unit)[0]
    shown = float(text.partition(" ")[0].replace(",", ""))
    powers = (1.0, 1e3, 1e6, 1e9, 1e12, 1e15)
    return min(powers, key=lambda p: abs(math.log(max(shown, 1e-300) * p / top))), text.partition(" ")[2] or found.finding.unit


# ---------------------------------------------------------------- quantiles


def quantile_panel(panel: Axes, found: Series, label: str, tolerance: float) -> None:
    """Draw the change at each quantile, with its interval over pairs."""
    known = gate_launches.quantiles(found)
    assert known is not None
    accepted = found.finding.tolerance or tolerance
    x = -np.log10(1 - known.shares)
    panel.axhspan(100 * (1 / (1 + accepted) - 1), 100 * accepted, color=BLUE, alpha=0.08, lw=0)
    panel.axhline(0, color=INK, lw=1.1)
    if known.low is not None and known.high is not None:
        panel.fill_between(x, 100 * (known.low - 1), 100 * (known.high - 1), color=RED, alpha=0.2, lw=0)
    panel.plot(x, 100 * (known.ratios - 1), color=RED, lw=2)
    marks = [(p, f"p{100 * p:g}") for p in (0.1, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999) if known.shares[0] <= p <= known.shares[-1]]
    panel.set_xticks([-math.log10(1 - p) for p, _ in marks], [name for _, name in marks])
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, -150 * accepted), max(high, 150 * accepted))
    panel.set_title(_short(label, 40), fontsize=12, loc="left")
    panel.set(xlabel="quantile of the samples of a launch", ylabel="change, %")


# ---------------------------------------------------------------- the same program twice


def _apart(record: GateCalibration) -> list[tuple[Resolution, Series]]:
    """Return the metrics with their launches, the noisiest first."""
    found = []
    for r in sorted(record.resolutions, key=lambda r: -r.launch_sd):
        finding = next((f for f in record.run.verdict.findings if (f.name, f.parameters) == (r.name, r.parameters)), None)
        series = gate_launches.series(record.run, finding) if finding is not None else None
        if series is not None:
            found.append((r, series))
    return found


def _row_height(rows: int) -> float:
    """Return the inches of a row: a lone one has room for its shape."""
    return 2.2 if rows == 1 else 1.2 if rows <= 3 else 0.75


def _same(panel: Axes, record: GateCalibration, found: Sequence[tuple[Resolution, Series]]) -> None:
    changes = [np.sort(100 * series.changes) for _, series in found]
    tolerances = [100 * gate_calibrations.asked(record, r) for r, _ in found]
    edge = 1.1 * max(max(1.3 * t for t in tolerances), max(float(np.abs(c).max()) for c in changes))
    for at, ((r, _), values, tolerance) in enumerate(zip(found, changes, tolerances, strict=True)):
        _band(panel, at, tolerance)
        panel.plot(values, at + _stacked(values, edge), "o", color=BLUE, ms=7 if len(found) <= 3 else 5.5, mec="white", mew=0.6, zorder=3)
        panel.errorbar(0, at + 0.41, xerr=100 * r.launch_sd, color=INK, lw=1.8, capsize=3.5, capthick=1.8, zorder=3)
        fine = 100 * r.finest_tolerance <= tolerance
        said = f"sd {100 * r.launch_sd:.1f} %, decides {gate_calibrations.finest(r)}" + "\ntoo noisy" * (not fine)
        panel.text(1.03, at, said, transform=panel.get_yaxis_transform(), va="center", fontsize=10.5, color=INK if fine else RED)
    panel.axvline(0, color=INK, lw=1.0, zorder=1)
    panel.set_yticks(range(len(found)), titles([series for _, series in found], wrapped=True))
    panel.set(ylim=(len(found) - 0.45, -0.55), xlim=(-edge, edge), xlabel="launch of one side against the other, %")
    panel.tick_params(axis="y", length=0)
    panel.grid(visible=False, axis="y")
    panel.xaxis.set_major_formatter(lambda v, _: f"{v:+g}" if v else "0")
    _same_legend(panel.figure)


def _band(panel: Axes, at: int, tolerance: float) -> None:
    """Draw what a tolerance in percent accepts, to both sides."""
    low = -100 * (1 - 1 / (1 + tolerance / 100))
    panel.fill_betweenx((at - 0.5, at + 0.5), low, tolerance, color=BLUE, alpha=0.1, lw=0)
    panel.vlines((low, tolerance), at - 0.5, at + 0.5, color=INK, lw=1.3)


def _stacked(values: np.ndarray[tuple[int], np.dtype[np.float64]], edge: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return how far above and below its row each dot stands, so that dots that would cover each other stand on one another."""
    width = edge / 60
    bins = np.round(values / width).astype(int)
    heights = np.zeros(len(values))
    for b in np.unique(bins):
        inside = np.flatnonzero(bins == b)
        heights[inside] = np.arange(len(inside)) - (len(inside) - 1) / 2
    tallest = max(float(np.abs(heights).max()), 3.0)
    return heights * 0.36 / tallest


def _same_legend(page: Figure | SubFigure) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [
        Line2D([], [], color=BLUE, marker="o", mec="white", ls="", ms=7, label="a launch pair"),
        Line2D([], [], color=INK, marker="|", mew=1.8, lw=1.8, label="± sd of pairs"),
        Patch(facecolor=BLUE, alpha=0.2, label="tolerance"),
    ]
    page.legend(handles=handles, loc="outside lower center", ncols=3)


# ---------------------------------------------------------------- words


def titles(found: Sequence[Series], wrapped: bool = False) -> list[str]:
    """Return what stands over a panel, or beside a row."""
    names = gates.labels([each.finding for each in found])
    return [row_label(name, each.finding, WIDEST) if wrapped else _plain(name) for name, each in zip(names, found, strict=True)]


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"
