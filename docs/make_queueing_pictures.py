"""Draw the pictures of docs/queueing.md: `mlsys backtest queueing truth.csv -o p.csv && python docs/make_queueing_pictures.py p.csv`.

The points are the rows of the back-test, the truth beside them the table's; curves are computed here.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mlsys_bench import queueing as q
from mlsys_bench.journeys.truth import scores
from mlsys_bench.journeys.truth.parameters import Parameters
from mlsys_bench.queueing import laws
from mlsys_bench.report.figures import BLUE, GREEN, GREY, INK, ORANGE, RED, STYLE

IMAGES = Path(__file__).parent / "images"
LEAST = 1e-15  # errors below are drawn here
Row = dict[str, str]


def main(path: Path) -> None:
    """Draw every picture from the predictions of a back-test."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["predicted"] and row["value"]]
    pictures: dict[str, Callable[[], Figure]] = {
        "errors": lambda: errors(rows),
        "two-moments": lambda: two_moments(rows),
        "promised": lambda: promised(rows),
        "law": lambda: law(rows),
        "load": load,
    }
    for name, draw in pictures.items():
        with rc_context(STYLE):
            draw().savefig(IMAGES / f"queueing-{name}.svg", metadata={"Date": None})


def page(title: str, subtitle: str, width: float = 9.0, height: float = 5.0) -> tuple[Figure, Axes]:
    """Return an empty picture with its message on top."""
    figure = Figure(figsize=(width, height))
    figure.text(0.015, 1 - 0.14 / height, title, fontsize=14, fontweight="bold", va="top")
    figure.text(0.015, 1 - 0.46 / height, subtitle, fontsize=11, color="#5A616C", va="top")
    axes = figure.add_axes((0.11, 0.62 / height, 0.85, 1 - 1.6 / height))
    return figure, axes


def compared(row: Row) -> scores.Miss:
    """Return a row's error and its bar."""
    return scores.compare(row, float(row["value"]), float(row["precision_abs"] or 0), float(row["predicted"]))


# ---------------------------------------------------------------- errors against the truth


def errors(rows: list[Row]) -> Figure:
    """Draw the error of every row, model by model, on a logarithmic scale."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    misses = [compared(row) for row in rows]
    outside = sum((m.of_bar or 0) > 1 for m in misses)
    figure, axes = page(
        f"{len(rows) - outside:,} of {len(rows):,} quantities are within their bar",
        "relative error against the truth table, one dot per quantity; ticks: the bars (0.01 % for exact values)",
        height=0.235 * len(models) + 1.9,
    )
    axes.set_position((0.2, 0.62 / figure.get_figheight(), 0.76, 1 - 1.6 / figure.get_figheight()))
    rng = np.random.default_rng(0)
    for at, model in enumerate(models):
        own = [m for m in misses if m.model == model]
        for kept, colour, size in ((True, BLUE, 9), (False, RED, 26)):
            drawn = [max(m.error or 0, LEAST) for m in own if ((m.of_bar or 0) <= 1) is kept]
            axes.scatter(drawn, at + rng.uniform(-0.27, 0.27, len(drawn)), s=size, color=colour, alpha=0.55 if kept else 0.9, lw=0)
        for bar in sorted({m.bar for m in own}):
            axes.vlines(bar, at - 0.4, at + 0.4, color=INK, lw=1.6)
    axes.set(xscale="log", xlim=(LEAST / 2, 1.0), ylim=(len(models) - 0.4, -0.6), xlabel="relative error")
    axes.set_yticks(range(len(models)), [m.replace(" (split, no queue)", "").replace(" README", "") for m in models], fontsize=10)
    axes.set_xticks([1e-15, 1e-12, 1e-9, 1e-6, 1e-4, 1e-2, 1], ["0", "1e-12", "1e-9", "1e-6", "0.01 %", "1 %", "100 %"])
    axes.minorticks_off()
    return figure


# ---------------------------------------------------------------- against formulas of two moments


def two_moments(rows: list[Row]) -> Figure:
    """Draw the error of p99 waits over the SCV of service, ours and that of the formula found in most tools."""
    found = [
        row for row in rows if row["model"] in ("M/D/c", "M/PH/c", "M/G/c") and row["quantity"] == "wait_p99" and float(row["value"]) > 0.05
    ]
    scv, common, ours = [], [], []
    for row in found:
        p = Parameters(row["parameters"])
        service, servers, rho = p.law("service", 1.0), p.whole("c"), p.number("rho")
        scv.append(service.scv)
        common.append(allen_cunneen(servers, rho, service.scv) / float(row["value"]) - 1)
        ours.append(float(row["predicted"]) / float(row["value"]) - 1)
    figure, axes = page(
        f"Two moments miss the p99 wait by up to {100 * max(map(abs, common)):.0f} %, we by {100 * max(map(abs, ours)):.1f} %",
        f"{len(found)} stations of the truth table with Poisson arrivals, 1 to 500 servers",
    )
    for values, colour, marker, label in (
        (common, ORANGE, "s", "Allen-Cunneen mean, exponential tail"),
        (ours, BLUE, "o", "mlsys_bench.queueing"),
    ):
        axes.scatter(scv, 100 * np.array(values), s=26, c=colour, marker=marker, alpha=0.75, lw=0, label=label)
    axes.axhline(0, color=GREY, lw=1)
    axes.set(xscale="symlog", xlabel="SCV of the service time", ylabel="error of the p99 wait, %", xlim=(-0.05, 14))
    axes.set_xscale("symlog", linthresh=0.5)
    axes.set_xticks([0, 0.25, 0.5, 1, 2, 4, 10], ["0", "0.25", "0.5", "1", "2", "4", "10"])
    axes.minorticks_off()
    axes.legend(loc="upper left")
    return figure


def allen_cunneen(servers: int, rho: float, scv: float) -> float:
    """Return the p99 wait with the mean scaled by (1 + SCV) / 2 and an exponential tail, as two-moment tools have it."""
    p_wait = q.erlang_c(servers, rho * servers)
    mean_of_those_who_wait = (1 + scv) / 2 / (servers * (1 - rho))
    return max(0.0, mean_of_those_who_wait * math.log(p_wait / 0.01))


# ---------------------------------------------------------------- promised and kept


def promised(rows: list[Row]) -> Figure:
    """Draw the error that was there over the error that was announced, for what is not exact."""
    inexact = [row for row in rows if float(row["expected_error"]) > 1e-5 and noise(row) < float(row["expected_error"]) / 2]
    expected = np.array([float(row["expected_error"]) for row in inexact])
    seen = np.array([max(compared(row).error or 0, 1e-5) for row in inexact])
    inside = seen <= np.hypot(expected, [noise(row) for row in inexact])
    figure, axes = page(
        f"{100 * inside.mean():.0f} % of the inexact answers are as near as they say",
        f"{len(inexact)} quantities found by approximation or simulation, whose truth is known at least twice as well",
    )
    low, high = 1e-5, max(expected.max(), seen.max()) * 1.5
    axes.fill_between([low, high], [low, high], [low, low], color=GREEN, alpha=0.10, lw=0)
    axes.plot([low, high], [low, high], color=GREY, lw=1)
    axes.scatter(expected[inside], seen[inside], s=16, c=BLUE, alpha=0.6, lw=0, label="as near as announced")
    if not inside.all():
        axes.scatter(expected[~inside], seen[~inside], s=22, c=RED, marker="D", alpha=0.8, lw=0, label="further off")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="expected error, as announced with the answer", ylabel="error against the truth")
    marks = [1e-5, 1e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1]
    axes.set_yticks([m for m in marks if f"{m:e}"[0] == "1"], ["0.001 %", "0.01 %", "0.1 %", "1 %", "10 %"])
    axes.set_xticks(marks, [f"{100 * m:g} %" for m in marks])
    axes.set(xlim=(expected.min() / 1.3, high), ylim=(low, high))
    axes.minorticks_off()
    axes.legend(loc="lower right")
    return figure


def noise(row: Row) -> float:
    """Return the relative half-width of the table's own value."""
    return float(row["precision_abs"] or 0) / max(abs(float(row["value"])), 1e-9)


# ---------------------------------------------------------------- a whole law


def law(rows: list[Row]) -> Figure:
    """Draw P(sojourn > t) of lognormal stations beside the percentiles of the table."""
    figure, axes = page(
        "Formulas give the whole law, not one number",
        "latency of M/G/c with lognormal service, SCV 4: curves by formula, dots from simulations of 32 million requests",
    )
    cases = [("c=4;rho=0.8", BLUE, "4 servers, 80 % busy"), ("c=16;rho=0.7", ORANGE, "16 servers, 70 % busy")]
    for start, colour, label in cases:
        own = [row for row in rows if row["model"] == "M/G/c" and row["parameters"].startswith(start) and "logn:4" in row["parameters"]]
        p = Parameters(own[0]["parameters"])
        servers, rho = p.whole("c"), p.number("rho")
        station = q.Station(arrivals=laws.Exponential(1 / (rho * servers)), service=laws.Lognormal(4.0, 1.0), servers=servers)
        sojourn = q.solve(station, tolerance=math.inf).queue.sojourn
        t = np.geomspace(0.1, 40, 200)
        axes.plot(t, [sojourn.p_over(float(x)) for x in t], color=colour, lw=2, label=label)
        points = [(float(row["value"]), 1 - int(row["quantity"][-2:]) / 100) for row in own if row["quantity"].startswith("sojourn_p")]
        axes.scatter(*zip(*points, strict=True), color=colour, s=55, edgecolor="white", zorder=3)
    alone = laws.Lognormal(4.0, 1.0)
    axes.plot(t, [alone.p_over(float(x)) for x in t], color=GREY, lw=1.5, ls=(0, (4, 3)), label="service alone")
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(0.1, 40),
        ylim=(2e-3, 1.1),
        xlabel="t, in mean service times",
        ylabel="share of requests slower than t",
    )
    axes.set_xticks([0.1, 0.3, 1, 3, 10, 30], ["0.1", "0.3", "1", "3", "10", "30"])
    axes.set_yticks([1, 0.5, 0.1, 0.05, 0.01], ["all", "p50", "p90", "p95", "p99"])
    axes.minorticks_off()
    axes.legend(loc="lower left")
    return figure


def load() -> Figure:
    """Draw the p99 latency over the load for fleets of several sizes."""
    figure, axes = page(
        "How busy a fleet may be depends on its size",
        "p99 latency of M/G/c with lognormal service, SCV 1, in mean service times",
    )
    busy = 1 - np.geomspace(0.7, 0.004, 90)
    limit = 8.0
    for servers, colour, beside in ((1, RED, (34, -17)), (4, ORANGE, (-6, 8)), (16, GREEN, (-6, 8)), (100, BLUE, (-8, -30))):
        p99 = np.array([p99_s(servers, float(rho)) for rho in busy])
        axes.plot(busy, p99, color=colour, lw=2.2, label=f"{servers} server{'s' * (servers > 1)}")
        if p99[0] < limit:
            knee = float(np.interp(limit, p99, busy))
            axes.plot([knee], [limit], "o", color=colour, ms=7)
            axes.annotate(
                f"{100 * knee:.0f} %", (knee, limit), beside, textcoords="offset points", ha="right", color=colour, fontweight="bold"
            )
    axes.axhline(limit, color=GREY, lw=1, ls=(0, (4, 3)))
    axes.set(xlim=(0.3, 1.0), ylim=(0, 20), xlabel="utilisation", ylabel="p99 latency")
    axes.set_yticks(range(0, 21, 4))
    axes.set_xticks([0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [f"{x} %" for x in range(30, 101, 10)])
    axes.legend(loc="upper left")
    return figure


def p99_s(servers: int, rho: float) -> float:
    """Return the p99 latency of a station with lognormal service."""
    station = q.Station(arrivals=laws.Exponential(1 / (rho * servers)), service=laws.Lognormal(1.0, 1.0), servers=servers)
    return q.solve(station, tolerance=math.inf).queue.sojourn_quantile_s(0.99)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
