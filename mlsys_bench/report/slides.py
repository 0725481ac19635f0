"""The page of a presentation that a picture for a slide is drawn on: its head, the room below, and the way to a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mlsys_bench.errors import BadInput
from mlsys_bench.report.figures import STYLE, _plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = (16.0, 9.0)  # inches
_SOFT = "#5A616C"  # of text beside what matters
_EDGE, _TILES = 0.012, 0.976  # of the page's width: where text begins, and what figures share


def page() -> Figure:
    """Return an empty page; what is drawn on it stays below the head."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    made = Figure(figsize=SIZE)
    made.set_layout_engine(ConstrainedLayoutEngine(rect=(0.008, 0.008, 0.984, 0.80), w_pad=0.08, h_pad=0.06))
    return made


def head(on: Figure, title: str, subtitle: str, verdict: tuple[str, str], figures: Mapping[str, str], *, room: int = 1) -> None:
    """Write title, subtitle, the verdict (word, colour), and figures by name in a row with room for so many at least."""
    word, colour = verdict
    on.text(_EDGE, 0.975, _plain(title), fontsize=20, fontweight="bold", va="top")
    on.text(_EDGE, 0.925, _plain(subtitle), fontsize=12, color=_SOFT, va="top")
    on.text(1 - _EDGE, 0.972, word, fontsize=15, fontweight="bold", va="top", ha="right", color="white",
            bbox={"facecolor": colour, "edgecolor": "none", "boxstyle": "round,pad=0.4"})  # fmt: skip
    for at, (name, value) in enumerate(figures.items()):
        x = _EDGE + at * _TILES / max(len(figures), room)
        on.text(x, 0.878, name, fontsize=11, color=_SOFT, va="top")
        on.text(x, 0.853, value, fontsize=19, fontweight="bold", va="top")


def write(path: Path, figure: Figure) -> Path:
    """Write a picture as a PNG, and return its path.  Raises BadInput."""
    import matplotlib

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with matplotlib.rc_context(STYLE):
            figure.savefig(path, format="png", dpi=120, metadata={"Software": "mlsys"})
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror or error}") from error
    return path
