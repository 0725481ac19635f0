"""Load tests as pictures: how a run went with the window that counts, its percentiles with intervals, how gaps are spread, runs as dots.

Drawn from the record alone: no file of requests is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench import slo, units
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.report import latencies, slides
from mlsys_bench.report.figures import (
    BLUE,
    GREEN,
    GREY,
    HEAD,
    INK,
    ORANGE,
    PAPER,
    RED,
    SILENT,
    _page,
    _plain_ticks,
    _styled,
)
from mlsys_bench.report.parts import digits, percent, time, time_unit
from mlsys_bench.timelines import Curve, Timeline
from mlsys_bench.types import LatencySummary, LoadTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRICS = (("ttft", "TTFT", BLUE, "o"), ("e2e", "E2E", ORANGE, "^"), ("tpot", "TPOT", GREEN, "s"))
_LADDER = (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99), ("p999", 0.999))
_LEAST = 0.02  # share from which a line is drawn: the luckiest request says little and takes much room
_FAILURES = (RED, "#CC79A7", "#56B4E9", "#F0E442", INK, GREY, ORANGE)
_VERDICT = {"valid": GREEN, "degraded": ORANGE, "invalid": RED}


@_styled
def over_time(run: LoadTest, subtitle: str) -> Figure | None:
    """Draw offered, completed and failed requests, those in flight, and latencies over time; None without a timeline."""
    course = run.timeline
    if course is None:
        return None
    page = _page("How the run went", subtitle, HEAD + (8.8 if course.extra else 7.4))
    panels = page.subplots(5 if course.extra else 4, 1, sharex=True, height_ratios=(1.2, 1, 1.6, 0.8, 0.8)[: 5 if course.extra else 4])
    _rates(panels[0], course)
    _in_flight(panels[1], course)
    _latencies(panels[2], course, run)
    _lateness(panels[3], course)
    if course.extra:
        _extra(panels[4], course)
    _finish(panels, course)
    return page


@_styled
def percentiles(run: LoadTest, subtitle: str) -> Figure | None:
    """Draw each latency over its percentile, intervals as whiskers, limits as marks; None without curves."""
    if not run.curves:
        return None
    page = _page("Percentiles, counted from the schedule", subtitle, HEAD + 4.6)
    _ladder(page.subplots(), run)
    return page


@_styled
def gaps(run: LoadTest, subtitle: str) -> Figure | None:
    """Draw how the gaps between tokens are spread; None where there are none."""
    curve = run.curves.get("itl")
    if curve is None:
        return None
    page = _page("Gaps between tokens", subtitle, HEAD + 3.4)
    _histogram(page.subplots(), curve, run.itl_s)
    return page


@_styled
def runs(record: LoadTests, subtitle: str) -> Figure | None:
    """Draw each run as a dot beside the mean of runs and its interval, a panel for each latency."""
    page = _page("Every run, and the mean of runs", subtitle, HEAD + 3.8)
    panels = page.subplots(1, 3)
    for panel, (name, label, colour, _) in zip(panels, _METRICS, strict=True):
        _dots(panel, record, name, label, colour)
    return page


@_styled
def slide(run: LoadTest) -> Figure:
    """Draw the whole run on one page of a presentation."""
    page = slides.page()
    _head(page, run)
    left, right = page.subfigures(1, 2, squeeze=False, width_ratios=(1.25, 1))[0]
    if run.timeline is not None:
        panels = left.subplots(3, 1, sharex=True, height_ratios=(1.1, 0.9, 1.7))
        _rates(panels[0], run.timeline)
        _in_flight(panels[1], run.timeline)
        _latencies(panels[2], run.timeline, run)
        _finish(panels, run.timeline)
    upper, lower = right.subplots(2, 1, height_ratios=(1.7, 1))
    _ladder(upper, run)
    curve = run.curves.get("itl")
    if curve is not None:
        _histogram(lower, curve, run.itl_s)
        lower.set_title("Gaps between tokens", fontsize=12, loc="left")
    else:
        lower.set_axis_off()
    return page


def write_png(path: Path, run: LoadTest | LoadTests) -> Path:
    """Write the slide of a run, or of repeated runs their dots, as a PNG, and return its path.  Raises BadInput."""
    figure = slide(run) if isinstance(run, LoadTest) else runs(run, f"{len(run.runs)} runs of {run.runs[0].target}")
    assert figure is not None  # `runs` always draws
    return slides.write(path, figure)


# ---------------------------------------------------------------- panels over time


def _rates(panel: Axes, course: Timeline) -> None:
    edges = course.step_s * np.arange(len(course.offered) + 1)
    panel.stairs(np.array(course.offered) / course.step_s, edges, color=INK, lw=1.4, label="offered")
    panel.stairs(np.array(course.completed) / course.step_s, edges, color=BLUE, fill=True, alpha=0.35, label="answered")
    below = np.zeros(len(course.offered))
    for (kind, counts), colour in zip(course.failed.items(), _FAILURES, strict=False):
        rate = np.array(counts) / course.step_s
        panel.bar(edges[:-1], rate, course.step_s, bottom=below, align="edge", color=colour, label=f"{kind} ({sum(counts):,})")
        below += rate
    panel.set(ylabel="requests/s", ylim=(0, None))
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=5, borderaxespad=0.0)


def _in_flight(panel: Axes, course: Timeline) -> None:
    edges = course.step_s * np.arange(len(course.in_flight) + 1)
    panel.stairs(course.in_flight, edges, color=ORANGE, fill=True, alpha=0.3)
    panel.stairs(course.in_flight, edges, color=ORANGE, lw=1.4)
    panel.set(ylabel="in flight", ylim=(0, None))


def _latencies(panel: Axes, course: Timeline, run: LoadTest) -> None:
    at = course.step_s * (np.arange(len(course.offered)) + 0.5)
    for name, low, high, colour in (
        ("TTFT", course.ttft_p50_s, course.ttft_p95_s, BLUE),
        ("E2E", course.e2e_p50_s, course.e2e_p95_s, ORANGE),
    ):
        median, tail = _ms(low), _ms(high)
        panel.fill_between(at, median, tail, color=colour, alpha=0.22, lw=0)
        panel.plot(at, median, color=colour, lw=1.8, label=f"{name} p50 to p95")
        panel.plot(at, tail, color=colour, lw=0.8)
    for limit in slo.parse(run.slo) if run.slo else ():
        if limit.metric in ("ttft", "e2e") and limit.tenant is None:
            panel.axhline(1e3 * limit.limit, color=RED, lw=1.2, ls=":", label=slo.show_limit(limit))
    panel.set(ylabel="latency, ms", yscale="log")
    _plain_ticks(panel, "y")
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, borderaxespad=0.0)


def _lateness(panel: Axes, course: Timeline) -> None:
    edges = course.step_s * np.arange(len(course.offered) + 1)
    panel.stairs(np.nan_to_num(_ms(course.lateness_max_s)), edges, color=GREY, fill=True, alpha=0.6)
    panel.set(ylabel="latest\nsend, ms", ylim=(0, None))


def _extra(panel: Axes, course: Timeline) -> None:
    """Draw what was seen beside the requests in one panel; of several units the first."""
    unit = course.extra[0].unit
    scale, shown = (100.0, "CPU, %\nof a core") if unit == "share of a core" else (1.0, unit)
    at = course.step_s * (np.arange(len(course.offered)) + 0.5)
    for series, colour in zip((s for s in course.extra if s.unit == unit), (BLUE, ORANGE, GREEN, RED, INK, GREY), strict=False):
        known = [(x, scale * v) for x, v in zip(at, series.values, strict=True) if v is not None]
        panel.plot([x for x, _ in known], [v for _, v in known], color=colour, lw=1.4, label=series.name)
    panel.set(ylabel=shown, ylim=(0, None))
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.98), ncols=4, borderaxespad=0.0)


def _finish(panels: Sequence[Axes], course: Timeline) -> None:
    """Shade what does not count, and name it once."""
    end_s = course.step_s * len(course.offered)
    start, stop = course.window_s
    for panel in panels:
        for low, high in ((0.0, start), (stop, end_s)):
            if high > low:
                panel.axvspan(low, high, color=GREY, alpha=0.18, lw=0, label=SILENT)
        panel.set_xlim(0, end_s)
        panel.grid(visible=False, axis="x")
    for low, high, word in ((0.0, start, "warm-up"), (stop, end_s, "drain")):
        if high - low > 0.1 * end_s:
            panels[1].text((low + high) / 2, 0.9, word, ha="center", va="top", fontsize=10, transform=panels[1].get_xaxis_transform())
    panels[-1].set_xlabel("s since the start; shaded: not in the figures")


def _ms(values: Sequence[float | None]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return 1e3 * np.array([np.nan if v is None else v for v in values])


# ---------------------------------------------------------------- percentiles


def _ladder(panel: Axes, run: LoadTest) -> None:
    if not run.curves:
        panel.set_axis_off()
        return
    tallest = 0.5
    for name, label, colour, marker in _METRICS:
        curve, summary = run.curves.get(name), getattr(run, f"{name}_s")
        if curve is None or summary is None:
            continue
        shown = [(stat, p) for stat, p in _LADDER if getattr(summary, stat) is not None]
        tallest = max([tallest, *(p for _, p in shown)])
        _line(panel, curve, colour, max((p for _, p in shown), default=0.5), "-", label)
        for stat, p in shown:
            _point(panel, summary, stat, _rung(p), colour, marker)
    service = run.curves.get("service")
    if service is not None:
        _line(panel, service, GREY, tallest, "--", "E2E from the real send")
    furthest = max(tallest, _limits(panel, run))  # a limit beyond what the sample can say stands there, with nothing below it
    ticks = [(_rung(p), f"p{100 * p:g}") for _, p in _LADDER if p <= furthest]
    panel.set_xticks([x for x, _ in ticks], [name for _, name in ticks])
    panel.set(yscale="log", ylabel="latency, ms", xlim=(0, _rung(furthest) + (0.12 if furthest == tallest else 0.2)))
    panel.set_ylim(top=1.35 * panel.get_ylim()[1])
    _plain_ticks(panel, "y")
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=4, borderaxespad=0.2)


def _rung(p: float) -> float:
    """Return where a percentile stands: each nine takes as much room as the one before."""
    return float(-np.log10(1 - p))


def _line(panel: Axes, curve: Curve, colour: str, most: float, style: str, label: str) -> None:
    points = [(_rung(p), 1e3 * q) for p, q in zip(curve.shares, curve.quantiles_s, strict=True) if _LEAST <= p <= most]
    panel.plot([x for x, _ in points], [y for _, y in points], color=colour, lw=1.8, ls=style, label=label)


def _point(panel: Axes, summary: LatencySummary, stat: str, x: float, colour: str, marker: str) -> None:
    value = 1e3 * getattr(summary, stat)
    interval = summary.intervals.get(stat)
    if interval is not None:
        panel.vlines(x, 1e3 * interval[0], 1e3 * interval[1], color=colour, lw=5, alpha=0.35)
    panel.plot(x, value, marker, color=colour, ms=7, mec="white")
    panel.annotate(f"{digits(value)}", (x, value), xytext=(6, -13 if marker == "o" else 5), textcoords="offset points", fontsize=10)


def _limits(panel: Axes, run: LoadTest) -> float:
    """Draw each limit at its percentile, and return the furthest of them (a share; 0 without one)."""
    furthest = 0.0
    for limit in slo.parse(run.slo) if run.slo else ():
        if limit.metric in ("ttft", "tpot", "e2e") and limit.tenant is None and limit.stat.startswith("p"):
            furthest = max(furthest, share := float(limit.stat[1:]) / 100)
            x = _rung(share)
            panel.hlines(1e3 * limit.limit, x - 0.14, x + 0.14, color=RED, lw=2.5)
            panel.text(x - 0.17, 1e3 * limit.limit, slo.show_limit(limit), ha="right", va="center", fontsize=10, color=RED, bbox=PAPER)
    return furthest


def _histogram(panel: Axes, curve: Curve, summary: LatencySummary) -> None:
    length, unit = time_unit(summary.p50 or curve.quantiles_s[len(curve.quantiles_s) // 2])
    counts, edges = np.array(curve.counts, dtype=float), np.array(curve.edges_s) / length
    panel.stairs(100 * counts / max(counts.sum(), 1), edges, color=GREEN, fill=True, alpha=0.4)
    for stat, style in (("p50", "-"), ("p99", "--")):
        value = getattr(summary, stat)
        if value is not None:
            panel.axvline(value / length, color=INK, lw=1.2, ls=style, label=f"{stat} {time(value)}")
    panel.set(xlabel=f"gap, {unit}", ylabel="share of gaps, %", ylim=(0, None))
    if edges[2] - edges[1] < 0.9 * (edges[-1] - edges[-2]):  # of equal ratio
        panel.set_xscale("log")
        _plain_ticks(panel, "x")
    panel.legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, borderaxespad=0.2)


# ---------------------------------------------------------------- runs, and the head of the slide


def _dots(panel: Axes, record: LoadTests, metric: str, label: str, colour: str) -> None:
    keys = [key for stat in ("p50", "p95", "p99") if (key := f"{metric}_{stat}_s") in record.spread]
    keys = [key for key in keys if record.spread[key].mean is not None]
    length, unit = time_unit(max((record.spread[key].mean or 0.0 for key in keys), default=1.0))
    for at, key in enumerate(keys):
        spread = record.spread[key]
        known = np.array([v for v in spread.values if v is not None]) / length
        sideways = at + 0.22 * (np.arange(len(known)) - (len(known) - 1) / 2) / max(len(known), 1)
        panel.plot(sideways, known, "o", color=colour, ms=7, mec="white", alpha=0.85)
        panel.hlines((spread.mean or 0.0) / length, at - 0.3, at + 0.3, color=INK, lw=1.6)
        if spread.interval is not None:
            low, high = (max(end, 0.0) / length for end in spread.interval)
            panel.fill_between((at - 0.3, at + 0.3), low, high, color=GREY, alpha=0.25, lw=0)
    low, high = panel.get_ylim()
    panel.set_ylim(max(0.0, low - 0.06 * (high - low)), high + 0.06 * (high - low))
    panel.set_xticks(range(len(keys)), [latencies.name(key).split()[-1] for key in keys])
    panel.set(ylabel=unit, xlim=(-0.6, max(len(keys), 1) - 0.4))
    panel.set_title(label, fontsize=13)
    panel.grid(visible=False, axis="x")


def _head(page: Figure, run: LoadTest) -> None:
    asked = "closed loop" if run.offered_rate_per_s is None else f"{units.show_rate(run.offered_rate_per_s)} asked"
    said = f"{run.arrivals}, {asked}; window of {time(run.duration_s)}; {run.ok:,} of {run.requests:,} requests answered"
    verdict = run.validity.verdict
    slides.head(page, f"Load test of {run.target}", said, (verdict, _VERDICT[verdict]), _figures(run))


def _figures(run: LoadTest) -> Mapping[str, str]:
    found = {"answered": units.show_rate(run.request_rate_per_s), "output tokens": f"{digits(run.output_tokens_per_s)}/s"}
    for name, label, _, _ in _METRICS:
        summary: LatencySummary = getattr(run, f"{name}_s")
        stats = [s for s in ("p50", "p99", "p95") if getattr(summary, s) is not None][:2]
        found |= {f"{label} {s}": time(getattr(summary, s)) for s in stats}
    if run.goodput_ratio is not None:
        found["within all limits"] = percent(100 * run.goodput_ratio)
    return found
