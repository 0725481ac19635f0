"""The pictures of a report, each a matplotlib Figure made without pyplot, so that nothing global is touched.

Colours are Okabe and Ito's, which colour-blind readers tell apart; shapes and hatches say the same again.  Every picture names its
units and, in the line under the title, where its numbers come from.
"""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from mlsys_bench import summary
from mlsys_bench.checked import Check
from mlsys_bench.report import comparisons, costs, latencies, plans
from mlsys_bench.report.parts import Interval, digits, time, time_unit
from mlsys_bench.types import Alternative, Bench, LatencyProfile, Plan, RequestRecord, Requests

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")
BLUE, ORANGE, GREEN, RED, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8F98", "#1F2430"
WIDTH = 9.0  # inches; with 12 point text it fills half a slide readably
HEAD = 0.85  # inches for title and subtitle
STYLE: Any = {
    "font.size": 12, "axes.labelsize": 12, "xtick.labelsize": 11, "ytick.labelsize": 11, "legend.fontsize": 11, "axes.spines.top": False,
    "axes.spines.right": False, "axes.edgecolor": GREY, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "axes.grid": True, "grid.color": "#E4E7EB", "axes.axisbelow": True, "legend.frameon": False, "hatch.linewidth": 0.8,
    "svg.fonttype": "path", "svg.hashsalt": "mlsys", "figure.facecolor": "white", "axes.facecolor": "white",
}  # fmt: skip
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}  # behind text, so that no grid line runs through it
SILENT = "_"  # matplotlib leaves labels that begin so out of the legend
MANY = 1500  # points beyond which a scatter is stored as a bitmap inside the SVG


def uri(figure: Figure) -> str:
    """Return a picture as a data URI (SVG): nothing beside the page is needed to show it."""
    import matplotlib

    out = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(out, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def _styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw with our style, and leave the user's as it was."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> R:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def _page(title: str, subtitle: str, height: float) -> Figure:
    """Return an empty figure with its head: title, and where the numbers come from."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    page = Figure(figsize=(WIDTH, height))
    page.set_layout_engine(ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - HEAD / height)))
    page.text(0.012, 1 - 0.12 / height, _plain(title), fontsize=15, fontweight="bold", va="top")
    page.text(0.012, 1 - 0.45 / height, _plain(subtitle), fontsize=11, color="#5A616C", va="top")
    return page


def _plain(text: str) -> str:
    """Escape what matplotlib would read as mathematics: '$3/h … $5/h'."""
    return text.replace("$", r"\$")


# ---------------------------------------------------------------- (1) prediction beside measurement


@_styled
def prediction(checks: Sequence[Check], subtitle: str) -> Figure:
    """Draw each predicted interval as a bar and the measured value as a dot, one panel for each latency."""
    groups = {m: [c for c in checks if c.key.startswith(f"{m}_") and c.key.endswith("_s")] for m in latencies.METRICS}
    groups = {m: found for m, found in groups.items() if found}
    page = _page("Prediction beside measurement", subtitle, 4.4)
    panels = page.subplots(1, max(1, len(groups)), squeeze=False)[0]
    for panel, (metric, found) in zip(panels, groups.items(), strict=False):
        _prediction_panel(panel, metric, found)
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        page.legend(handles, labels, loc="outside lower center", ncols=len(handles))
    return page


def _prediction_panel(panel: Axes, metric: str, checks: Sequence[Check]) -> None:
    length, unit = time_unit(max(c.predicted for c in checks))
    for at, c in enumerate(checks):
        first = at == 0
        if c.low is not None and c.high is not None:
            label = "predicted, 90 % interval" if first else SILENT
            panel.bar(at, (c.high - c.low) / length, bottom=c.low / length, width=0.46, color=BLUE, alpha=0.28, label=label)
        panel.hlines(c.predicted / length, at - 0.23, at + 0.23, color=BLUE, lw=2.5, label="predicted" if first else SILENT)
        if c.measured is not None:
            _dot(panel, at, c, length, "measured" if first else SILENT)
    panel.set_xticks(range(len(checks)), [c.key.removeprefix(f"{metric}_").removesuffix("_s") for c in checks])
    panel.set_xlim(-0.6, len(checks) - 0.4)
    tops = [v for c in checks for v in (c.predicted, c.high, c.measured, c.measured_high) if v is not None]
    panel.set_ylim(0, 1.15 * max(tops) / length)
    panel.grid(visible=False, axis="x")
    panel.set_title(metric.upper(), fontsize=13)
    panel.set_ylabel(unit)


def _dot(panel: Axes, at: float, c: Check, length: float, label: str) -> None:
    """Draw a measured value: its interval as whiskers, its error in percent beside it."""
    assert c.measured is not None
    if c.measured_low is not None and c.measured_high is not None:
        panel.vlines(at, c.measured_low / length, c.measured_high / length, color=RED, lw=1.6)
    panel.plot(at, c.measured / length, "o", color=RED, ms=8, mec="white", label=label)
    if c.error_percent:
        where = (at, max(c.measured, c.measured_high or 0, c.high or 0) / length)
        panel.annotate(f"{c.error_percent:+.0f} %", where, xytext=(0, 5), textcoords="offset points", ha="center", fontsize=11)


# ---------------------------------------------------------------- (2) the fit of the step time


@_styled
def step_fit(bench: Bench, profile: LatencyProfile, subtitle: str) -> Figure | None:
    """Draw measured against predicted step times, the residual's band, and the physics floor; None without cells of this layout."""
    from mlsys_bench import latency

    rows = latency.residuals(profile, bench)
    if not rows:
        return None
    page = _page("How well the profile knows a step", subtitle, 5.4)
    panel = page.subplots()
    predicted = np.array([r.predicted_s for r in rows]) * 1e3
    measured = np.array([r.measured_s for r in rows]) * 1e3
    floor = np.array([latency.floor_s(profile, r.features) for r in rows]) * 1e3
    prefill = np.array([r.features[2] > 0 for r in rows])
    ends = np.array([min(predicted.min(), measured.min()) * 0.7, max(predicted.max(), measured.max()) * 1.4])
    band = np.exp(1.645 * profile.residual_log_sd)
    panel.fill_between(ends, ends / band, ends * band, color=BLUE, alpha=0.15, lw=0, label=f"90 % of steps (×/÷ {band:.2f})")
    panel.plot(ends, ends, color=BLUE, lw=1.2, label="perfect")
    order = np.argsort(predicted)
    panel.plot(predicted[order], floor[order], "_", color=GREY, ms=11, mew=2, label="physics floor of that step")
    for kind, mask, marker, color in (("decode", ~prefill, "o", RED), ("prefill", prefill, "s", GREEN)):
        if mask.any():
            panel.plot(predicted[mask], measured[mask], marker, color=color, ms=7, mec="white", ls="", label=f"{kind}, measured")
    panel.set(xscale="log", yscale="log", xlabel="predicted time of a step, ms", ylabel="measured, ms", xlim=ends)
    _plain_ticks(panel)
    panel.legend(loc="upper left")
    return page


def _plain_ticks(panel: Axes, axes: str = "xy") -> None:
    """Print 1, 2, 5, 10 … on a log axis instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (getattr(panel, f"{name}axis") for name in axes):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())


# ---------------------------------------------------------------- (3) what the alternatives cost


@_styled
def alternatives(plan: Plan, subtitle: str, most: int = 9) -> Figure | None:
    """Draw the cost of every design: the chosen one in full colour, infeasible ones hatched with the reason; None without any."""
    from matplotlib.ticker import MaxNLocator

    if not plan.alternatives or plan.usd_per_hour is None:
        return None
    others = sorted(plan.alternatives, key=lambda a: (not _feasible(a), a.usd_per_hour is None, a.usd_per_hour or 0.0))[:most]
    page = _page("What it costs, and what else was considered", subtitle, HEAD + 0.9 + 0.46 * (1 + len(others)))
    panel = page.subplots()
    longest = max([plan.usd_per_hour, *(a.usd_per_hour or 0.0 for a in others)])
    chosen = " + ".join(f"{item.replicas} × {item.gpu} {item.precision}{plans.split(item)}" for item in plan.fleet)
    panel.barh(0, plan.usd_per_hour, color=BLUE, height=0.66)
    _bar_text(panel, 0, plan.usd_per_hour, longest, f"${plan.usd_per_hour:,.2f}/h  chosen", bold=True)
    for at, a in enumerate(others, start=1):
        _alternative(panel, at, a, longest)
    panel.set_yticks(range(len(others) + 1), [_plain(chosen), *(_plain(_label(a)) for a in others)])
    panel.invert_yaxis()
    panel.set_xlim(0, longest * 1.9)
    ticks = [t for t in MaxNLocator(5).tick_values(0, longest) if t <= longest * 1.05]
    panel.set_xticks(ticks, [_plain(f"${t:,.6g}") for t in ticks])
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("cost, US dollars an hour")
    return page


def _feasible(a: Alternative) -> bool:
    return a.replicas is not None and not a.why_not.startswith("infeasible")


def _label(a: Alternative) -> str:
    return f"{f'{plans.least(a)}{a.replicas} × ' if a.replicas is not None else ''}{a.gpu} {a.precision}{plans.split(a)}"


def _alternative(panel: Axes, at: int, a: Alternative, longest: float) -> None:
    length = a.usd_per_hour or longest * 0.04
    if _feasible(a):
        panel.barh(at, length, color="#B8C4D0", height=0.66)
    else:
        panel.barh(at, length, facecolor="white", edgecolor=RED, hatch="///", height=0.66)
    cost = f"${a.usd_per_hour:,.2f}/h  " if a.usd_per_hour is not None else "" if a.replicas is None else "unpriced  "
    _bar_text(panel, at, length, longest, cost + a.why_not)


def _bar_text(panel: Axes, at: int, length: float, longest: float, text: str, bold: bool = False) -> None:
    room = int(40 * (1.9 - length / longest))
    text = text if len(text) <= room else text[: room - 1].rstrip() + "…"
    panel.text(length + longest * 0.015, at, _plain(text), va="center", fontsize=11, fontweight="bold" if bold else "normal", bbox=PAPER)


@_styled
def frontier(plan: Plan, subtitle: str) -> Figure | None:
    """Draw cost against latency, a step from each fleet to the next faster one; None where there is nothing to choose."""
    if len(plan.frontier) < 2:
        return None
    points, name = plan.frontier, latencies.name(plan.frontier[0].figure)
    page = _page(f"What a shorter {name} costs", subtitle, HEAD + 4.4)
    panel = page.subplots()
    cost, ms = [p.usd_per_hour for p in points], [1e3 * p.latency_s for p in points]
    panel.step(ms, cost, where="post", color="#B8C4D0", linewidth=2)
    panel.scatter(ms, cost, color=[BLUE if plans.is_the_plan(p, plan) else "#5C6B7A" for p in points], s=64, zorder=3)
    beside_s = (plan.survivors or plan.predicted).get(points[0].figure)
    if beside_s is not None and plan.usd_per_hour is not None and not any(plans.is_the_plan(p, plan) for p in points):
        ms.append(1e3 * beside_s)
        panel.scatter(ms[-1:], [plan.usd_per_hour], color=BLUE, s=64, zorder=3)
        said = f"the plan, {plan.replicas} × {plan.gpu} {plan.fleet[0].precision}"
        panel.annotate(_plain(said), (ms[-1], plan.usd_per_hour), (7, -15), textcoords="offset points", fontsize=10)
    for i, (point, x) in enumerate(zip(points, ms, strict=False)):
        devices = f" ×{point.devices_per_replica}" if point.devices_per_replica > 1 else ""
        said = f"{point.replicas} × {point.gpu}{devices} {point.precision}, ${point.usd_per_hour:,.2f}"
        crowded = i > 0 and point.usd_per_hour - cost[i - 1] < 0.06 * max(cost)
        panel.annotate(_plain(said), (x, point.usd_per_hour), (7, -15 if crowded else 6), textcoords="offset points", fontsize=10)
    panel.set_xlim(0, 1.35 * max(ms))
    panel.set_ylim(0, 1.12 * max(cost))
    panel.set_xlabel(f"{name}, milliseconds: theory, scaled to the simulation of the plan")
    panel.set_ylabel("cost, US dollars an hour")
    return page


@_styled
def tornado(plan: Plan, subtitle: str) -> Figure | None:
    """Draw what each change saves, to the left, or costs, to the right, the largest on top; None where none has a price."""
    from matplotlib.ticker import MaxNLocator

    known = [row for row in comparisons.by_size(plan.sensitivity) if row.change_usd_per_month is not None]
    if not known:
        return None
    page = _page("What a change would save or cost", subtitle, HEAD + 0.9 + 0.46 * len(known))
    panel = page.subplots()
    longest = max(abs(row.change_usd_per_month or 0.0) for row in known) or 1.0
    for at, row in enumerate(known):
        month = row.change_usd_per_month or 0.0
        panel.barh(at, month, color=GREEN if month < 0 else RED, alpha=0.35 if row.clear is False else 1.0, height=0.66)
        beside = "no change" if not month else f"{costs.dollars(month)}, {row.replicas} replicas"
        away, side = longest * 0.03, "right" if month < 0 else "left"
        panel.text(month + (-away if month < 0 else away), at, _plain(beside), va="center", ha=side, fontsize=11, bbox=PAPER)
    panel.axvline(0, color=INK, linewidth=1)
    panel.set_yticks(range(len(known)), [_plain(row.what) for row in known])
    panel.invert_yaxis()
    room = 2.7 * longest
    panel.set_xlim(-room if any((row.change_usd_per_month or 0.0) < 0 for row in known) else -0.05 * room, room)
    ticks = [t for t in MaxNLocator(3).tick_values(-longest, longest) if abs(t) <= longest * 1.2]
    panel.set_xticks(ticks, [_plain(f"{'-' if t < 0 else ''}${abs(t):,.6g}") for t in ticks])
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("change of the cost, US dollars a month")
    return page


# ---------------------------------------------------------------- (4) latency over time, and its distribution


@_styled
def timeline(requests: Requests, subtitle: str) -> Figure | None:
    """Draw TTFT and E2E of every request when it was due, the part outside the window shaded, errors marked."""
    rows = requests.requests
    if not rows:
        return None
    page = _page("Latency over time", subtitle, 4.6)
    panel = page.subplots()
    for name, of, color, marker in (("TTFT", summary.ttft_s, BLUE, "o"), ("E2E", summary.e2e_s, ORANGE, "^")):
        points = [(r.scheduled_s, 1e3 * value) for r in rows if r.outcome == "ok" for value in [of(r)] if value is not None and value > 0]
        if points:
            panel.plot(*zip(*points, strict=True), marker, color=color, ms=4, alpha=0.75, ls="", label=name, rasterized=len(points) > MANY)
    panel.set_yscale("log")
    failed = [r.scheduled_s for r in rows if r.outcome != "ok"]
    if failed:
        panel.plot(
            failed,
            [0.97] * len(failed),
            "x",
            color=RED,
            ms=8,
            mew=2,
            transform=panel.get_xaxis_transform(),
            label=f"no answer ({len(failed)})",
        )
    _shade_outside(panel, rows)
    panel.set(xlabel="scheduled send, s since the start", ylabel="latency, ms")
    _plain_ticks(panel, "y")
    panel.legend(loc="lower right", ncols=4, bbox_to_anchor=(1, 1))
    return page


def _shade_outside(panel: Axes, rows: Sequence[RequestRecord]) -> None:
    """Shade what lies before and after the window that counts."""
    inside = [r.scheduled_s for r in rows if r.in_window]
    start, end = min(r.scheduled_s for r in rows), max(r.scheduled_s for r in rows)
    if not inside or len(inside) == len(rows):
        return
    label = "warm-up, not counted"
    for low, high in ((start, min(inside)), (max(inside), end)):
        if high > low:
            panel.axvspan(low, high, color=GREY, alpha=0.18, lw=0, label=label)
            label = SILENT


@_styled
def distribution(requests: Requests, predicted: Mapping[str, float], intervals: Mapping[str, Interval], subtitle: str) -> Figure | None:
    """Draw the measured distribution of TTFT and E2E with the predicted percentiles on it; None without a full answer."""
    good = [r for r in requests.requests if r.in_window and r.outcome == "ok"]
    samples = {
        "ttft": [v for r in good if (v := summary.ttft_s(r)) is not None],
        "e2e": [v for r in good if (v := summary.e2e_s(r)) is not None],
    }
    samples = {name: values for name, values in samples.items() if values}
    if not samples:
        return None
    page = _page("Measured distribution, predicted percentiles" if predicted else "Measured distribution", subtitle, 4.6)
    panels = page.subplots(1, len(samples), sharey=True, squeeze=False)[0]
    for panel, (metric, values) in zip(panels, samples.items(), strict=True):
        panel.ecdf(np.array(values) * 1e3, color=INK, lw=1.8, label=f"measured, n = {len(values):,}")
        _predicted_marks(panel, metric, predicted, intervals)
        panel.set(xscale="log", xlabel=f"{metric.upper()}, ms", ylim=(0, 1.02))
        _plain_ticks(panel, "x")
        panel.legend(loc="lower right")
    panels[0].set_ylabel("share of requests at or below")
    return page


def _predicted_marks(panel: Axes, metric: str, predicted: Mapping[str, float], intervals: Mapping[str, Interval]) -> None:
    label = "predicted, 90 % interval"
    for stat, share in (("p50", 0.5), ("p90", 0.9), ("p95", 0.95), ("p99", 0.99)):
        key = f"{metric}_{stat}_s"
        if key in predicted:
            low, high = intervals.get(key, (predicted[key], predicted[key]))
            panel.hlines(share, low * 1e3, high * 1e3, color=BLUE, lw=5, alpha=0.45)
            panel.plot(predicted[key] * 1e3, share, "D", color=BLUE, ms=7, mec="white", ls="", label=label)
            label = SILENT


# ---------------------------------------------------------------- (5) throughput and load


@_styled
def load(requests: Requests, subtitle: str) -> Figure | None:
    """Draw output tokens per second and requests in flight over time; None when nothing was answered."""
    rows = [r for r in requests.requests if r.sent_s is not None]
    tokens = [(t, n) for r in rows for t, n in zip(r.token_s, r.tokens_per_event, strict=False)]
    if not tokens:
        return None
    end = max(t for t, _ in tokens)
    width_s = max(end / 60, 1e-3)
    per_bin, edges = np.histogram([t for t, _ in tokens], bins=np.arange(0, end + width_s, width_s), weights=[n for _, n in tokens])
    page = _page("Throughput and load", f"{subtitle}; in bins of {time(width_s)}", 5.2)
    top, bottom = page.subplots(2, 1, sharex=True)
    top.stairs(per_bin / width_s, edges, color=BLUE, fill=True, alpha=0.35)
    top.stairs(per_bin / width_s, edges, color=BLUE, lw=1.4)
    top.set(ylabel="output tokens/s", ylim=(0, None))
    at, level = _in_flight(rows, end)
    bottom.step(at, level, where="post", color=ORANGE, lw=1.4)
    bottom.fill_between(at, level, step="post", color=ORANGE, alpha=0.25, lw=0)
    bottom.set(ylabel="requests in flight", xlabel="s since the start", ylim=(0, None))
    mean = float(np.sum(np.diff(at) * level[:-1]) / (at[-1] - at[0])) if len(at) > 1 and at[-1] > at[0] else 0.0
    bottom.axhline(mean, color=INK, lw=1, ls="--", label=f"mean {digits(mean)}")
    bottom.legend(loc="upper right")
    for panel in (top, bottom):
        _shade_outside(panel, requests.requests)
    return page


def _in_flight(rows: Sequence[RequestRecord], end: float) -> tuple[Any, Any]:
    """Return when the number of open requests changes, and to what."""
    known = [(r.sent_s, end if r.done_s is None else r.done_s) for r in rows if r.sent_s is not None and _end_is_known(r)]
    starts, ends = zip(*known, strict=True)
    at = np.array([*starts, *ends])
    order = np.argsort(at, kind="stable")
    return at[order], np.cumsum(np.array([1] * len(starts) + [-1] * len(ends))[order])


def _end_is_known(r: RequestRecord) -> bool:
    """Say whether it is known when a request left: it did, or it was still open when the run ended."""
    return r.done_s is not None or r.outcome == "unfinished"
