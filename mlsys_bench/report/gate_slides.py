"""A gate as one picture for a slide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mlsys_bench import units
from mlsys_bench.errors import BadInput
from mlsys_bench.report import gate_launches, gate_pictures, gates, slides
from mlsys_bench.report.figures import _styled
from mlsys_bench.report.gate_forest import LOOKS, forest, forest_panel, with_ratio
from mlsys_bench.report.gate_pictures import changes_panel, numbers_panel, quantile_panel, run_subtitle, titles, worst
from mlsys_bench.verdicts import GateCalibration, GateRun, Verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_png(path: Path, record: GateRun | GateCalibration | Verdict) -> Path:
    """Write a gate as one picture for a slide, and return its path.  Raises BadInput."""
    figure = slide(record)
    if figure is None:
        raise BadInput(f"{path}: nothing to draw: no metric of the record has a ratio")
    return slides.write(path, figure)


def slide(record: GateRun | GateCalibration | Verdict) -> Figure | None:
    """Return the one picture that says it all; None where there is nothing to draw."""
    if isinstance(record, GateCalibration):
        return gate_pictures.same(record, gate_pictures.calibration_subtitle(record))
    if isinstance(record, GateRun) and worst(record):
        return _slide(record)
    found = record.verdict if isinstance(record, GateRun) else record
    return forest(found, f"tolerance {gates.share(found.tolerance)}")


@_styled
def _slide(record: GateRun) -> Figure:
    page = slides.page()
    _head(page, record)
    left, right = page.subfigures(1, 2, squeeze=False, width_ratios=(1.15, 1))[0]
    forest_panel(left.subplots(), with_ratio(record.verdict)[:12], record.verdict.tolerance, 26)
    first = worst(record)[0]
    has_curve = gate_launches.quantiles(first) is not None
    panels = right.subplots(2 + has_curve, 1, height_ratios=(1.2, 1, 1.1)[: 2 + has_curve])
    numbers_panel(panels[0], first, titles([first])[0])
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 0.99), ncols=2, borderaxespad=0.1)
    changes_panel(panels[1], first, record.verdict.tolerance)
    panels[1].set_xlabel("launch pair, in order of time")
    if has_curve:
        quantile_panel(panels[2], first, "at each quantile", record.verdict.tolerance)
    return page


def _head(page: Figure, record: GateRun) -> None:
    found = record.verdict
    said = {f.verdict: sum(g.verdict == f.verdict for g in found.findings) for f in gates.ordered(found.findings)}
    figures = {"tolerance": gates.share(found.tolerance), **{gates.word(name): str(n) for name, n in said.items()},
               "launch pairs": str(gates.launch_pairs(record)), "took": units.show_s(record.wall_s)}  # fmt: skip
    verdict = gates.word(found.verdict), LOOKS[found.verdict][0]
    slides.head(page, gates.sides(record) or "Candidate against baseline", run_subtitle(record), verdict, figures, room=6)
