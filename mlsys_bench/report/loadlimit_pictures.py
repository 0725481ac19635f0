"""Sweeps and searches as pictures: latency and goodput against rate, and the interval of the highest rate closing in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlsys_bench.loadlimits import LoadMax, LoadSweep, Probe, SweptLevel
from mlsys_bench.report.figures import BLUE, GREEN, GREY, INK, ORANGE, RED, SILENT, _page, _plain_ticks, _styled
from mlsys_bench.report.latencies import name
from mlsys_bench.report.loadlimits import score_of
from mlsys_bench.report.parts import digits, time

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE = "Latency and completed requests against the rate that was offered; bands are 90 % intervals, the line is the knee."
SEARCH = "What each level showed of its limits, and how the 90 % interval of the highest rate closed in."
_STATS = (("p50", BLUE, "o"), ("p95", ORANGE, "^"), ("p99", RED, "s"))
_COLOURS = (BLUE, ORANGE, GREEN, RED)


@_styled
def curve(record: LoadSweep, subtitle: str) -> Figure | None:
    """Draw TTFT, TPOT and E2E percentiles, and completions and goodput, over the offered rate; levels that fell behind are left open."""
    metrics = [m for m in ("ttft", "tpot", "e2e") if any(getattr(s.test, f"{m}_s").p50 is not None for s in record.levels)]
    if len(record.levels) < 2 or not metrics:
        return None
    page = _page("Latency and goodput against rate", subtitle, 8.6)
    panels = page.subplots(2, 2).ravel()
    for panel, metric in zip(panels, metrics, strict=False):
        _latency(panel, record.levels, metric)
    _throughput(panels[len(metrics)], record)
    for panel in panels[len(metrics) + 1 :]:
        panel.set_visible(False)
    for panel in panels[: len(metrics) + 1]:
        panel.set_xlabel("offered, requests/s")
        panel.set_xlim(left=0)
        if record.knee is not None:
            panel.axvline(record.knee.rate_per_s, color=GREY, lw=1.4, ls="--", label=SILENT)
    return page


def _latency(panel: Axes, levels: Sequence[SweptLevel], metric: str) -> None:
    kept = [s for s in levels if not s.over]
    for stat, colour, marker in _STATS:
        found = [(s.rate_per_s, getattr(s.test, f"{metric}_s")) for s in kept]
        shown = [(rate, 1e3 * getattr(of, stat), of.intervals.get(stat)) for rate, of in found if getattr(of, stat) is not None]
        if not shown:
            continue
        panel.plot([r for r, _, _ in shown], [v for _, v, _ in shown], marker=marker, color=colour, ms=5, lw=1.6, label=stat)
        banded = [(r, 1e3 * ends[0], 1e3 * ends[1]) for r, _, ends in shown if ends is not None]
        if banded:
            at, low, high = zip(*banded, strict=True)
            panel.fill_between(at, low, high, color=colour, alpha=0.16, lw=0)
    for s in levels:
        if s.over:
            panel.axvspan(s.rate_per_s * 0.995, s.rate_per_s * 1.005, color=RED, alpha=0.25, lw=0, label=SILENT)
    panel.set_yscale("log")
    _plain_ticks(panel, "y")
    panel.set(title=metric.upper(), ylabel="ms")
    panel.legend(loc="upper left", ncols=3, columnspacing=0.8, handlelength=1.2)


def _throughput(panel: Axes, record: LoadSweep) -> None:
    rates = [s.rate_per_s for s in record.levels]
    panel.plot([0, max(rates)], [0, max(rates)], color=GREY, lw=1, ls=":", label="offered")
    panel.plot(rates, [s.test.request_rate_per_s for s in record.levels], "o-", color=BLUE, ms=5, lw=1.6, label="completed")
    good = [(s.rate_per_s, s.test.goodput_per_s) for s in record.levels if s.test.goodput_per_s is not None]
    if good:
        panel.plot(*zip(*good, strict=True), "D-", color=GREEN, ms=5, lw=1.6, label="within all limits")
    panel.set(title="Throughput" if not good else "Throughput and goodput", ylabel="requests/s", ylim=(0, None))
    panel.legend(loc="upper left")


@_styled
def closing_in(record: LoadMax, subtitle: str) -> Figure | None:
    """Draw each level's figures over their limits by rate, and beside it the interval of the highest rate level by level."""
    if not record.probes or record.rate_per_s is None:
        return None
    page = _page(f"Highest rate: {digits(record.rate_per_s)} requests/s", subtitle, 4.8)
    scores, interval = page.subplots(1, 2)
    _scores(scores, record)
    _intervals(interval, record.probes)
    return page


def _scores(panel: Axes, record: LoadMax) -> None:
    keys = [s.limit for s in record.probes[0].shown] or [s.limit for s in record.idle]
    for key, colour in zip(keys, _COLOURS, strict=False):
        rows = [(p, score) for p in record.probes for s in p.shown if s.limit == key and (score := score_of(record, s)) is not None]
        for trusted, filled in ((True, colour), (False, "white")):
            points = [(p.rate_per_s, 100 * score) for p, score in rows if p.trusted is trusted and not p.over]
            if points:
                panel.plot(*zip(*points, strict=True), "o", mfc=filled, color=colour, ms=7, label=name(key) if trusted else "client late")
    for p in record.probes:
        if p.over:
            panel.axvline(p.rate_per_s, color=RED, lw=1.4, ls=":", label=SILENT)
    panel.axhline(100, color=INK, lw=1.2)
    if record.interval_per_s is not None:
        panel.axvspan(*record.interval_per_s, color=BLUE, alpha=0.14, lw=0, label="90 % interval")
    panel.set_yscale("log")
    _plain_ticks(panel, "y")
    panel.set(xlabel="offered, requests/s; dotted: fell behind", ylabel="share of the limit, %")
    panel.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")


def _intervals(panel: Axes, probes: Sequence[Probe]) -> None:
    at = range(1, len(probes) + 1)
    low, high = zip(*(p.interval_per_s for p in probes), strict=True)
    panel.fill_between(at, low, high, color=BLUE, alpha=0.2, lw=0, label="90 % interval")
    panel.plot(at, [p.highest_per_s for p in probes], color=BLUE, lw=2, label="highest rate")
    panel.plot(at, [p.rate_per_s for p in probes], "o", color=ORANGE, ms=6, label="level tried")
    spent_s = sum(p.duration_s for p in probes)
    panel.set(xlabel=f"levels, {time(spent_s)} of load in all", ylabel="requests/s")
    panel.set_xticks([i for i in at if len(probes) <= 12 or i % 2])
    panel.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none")
