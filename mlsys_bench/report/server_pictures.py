"""The server's side of a load test as a picture: what it did, second by second, below what the client offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench.report.figures import BLUE, GREEN, GREY, INK, ORANGE, RED, SILENT, _page, _styled
from mlsys_bench.report.serversides import named
from mlsys_bench.serversides import ServerSeries, ServerSide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PANELS = (
    ("requests", ("running", "waiting")),
    ("tokens/s", ("generation_tokens", "prompt_tokens")),
    ("share, %", ("kv_cache", "prefix_hits")),
    ("mean, ms", ("ttft", "queue")),
)
_COLOURS = (BLUE, ORANGE, GREEN, RED, INK)


@_styled
def over_time(side: ServerSide, window_s: tuple[float, float] | None, subtitle: str) -> Figure | None:
    """Draw the server's own figures over the run, a panel for each unit, the window marked; None without any."""
    panels = [(label, [s for name in wanted if (s := named(side, name)) is not None]) for label, wanted in _PANELS]
    panels.append(("power, W", [s for s in side.series if s.name == "power"]))
    panels = [(label, found) for label, found in panels if any(v is not None for s in found for v in s.values)]
    if not panels:
        return None
    page = _page("What the server said of itself", subtitle, 1.1 + 1.75 * len(panels))
    axes = page.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, (label, found) in zip(axes, panels, strict=True):
        for colour, series in zip(_COLOURS, found, strict=False):
            _line(axis, series, side.step_s, colour)
        axis.set(ylabel=label, ylim=(0, None))
        axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)
        for edge in window_s or ():
            axis.axvline(edge, color=GREY, lw=1, ls="--", label=SILENT)
    axes[-1].set_xlabel("s since the start; dashed: the window that counts" if window_s else "s since the start")
    return page


def _line(axis: Axes, series: ServerSeries, step_s: float, colour: str) -> None:
    scale = {"share": 100.0, "s": 1e3}.get(series.unit, 1.0)
    values = scale * np.array([np.nan if v is None else v for v in series.values])
    name = series.device or series.name.replace("_", " ").replace("kv ", "KV ").replace("ttft", "TTFT").replace(" tokens", "")
    axis.plot(step_s * (np.arange(len(values)) + 0.5), values, color=colour, lw=1.6, label=name)
