"""Benchmarks as pictures: the roofline with every operator below it, and a decode step taken apart.

Solid roofs are what this machine was measured to deliver, dashed ones its data sheet.  Colour says the class of an operator, shape the
number format.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlsys_bench import anatomy, readings
from mlsys_bench.anatomy import RESIDUAL, Anatomy
from mlsys_bench.errors import BadInput
from mlsys_bench.readings import Roofs, Row
from mlsys_bench.report import anatomies, slides
from mlsys_bench.report.benches import bench as words
from mlsys_bench.report.figures import BLUE, GREEN, GREY, HEAD, INK, ORANGE, PAPER, RED, SILENT, _page, _plain, _styled
from mlsys_bench.report.parts import percent, quantity, time, time_unit
from mlsys_bench.types import Bench, Machine

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

ROOFLINE = (
    "What each operator computes per second, over how much it computes per byte.  Solid: what this machine was measured to read and "
    "multiply at best; dashed: its data sheet.  A point on a roof cannot get faster, one far below both is held up by something else."
)
STEP = "A measured decode step: its operators as they take when timed alone, and what they leave over."
_CLASSES = (  # name's beginning, in the legend, colour
    ("op.linear", "matrices", BLUE), ("op.attention", "attention", ORANGE), ("op.", "between them", GREEN),
    ("engine.step", "whole steps", RED),
)  # fmt: skip
_ON_HOST = ("op.sample", "op.tokenize")  # Python beside the model: four decades below the roofs, which they are not about
_SHAPES = "osD^vP*X"
_LEAD = 150  # letters of the line below a slide's title
_ROOM = 3.0  # times beyond the points that the axes reach
_PLACES = tuple((dx, dy) for dy in (0, 13, -13, 26, -26, 39, -39) for dx in (9, -9))  # of a label beside its point, in points


class Spot(NamedTuple):
    """A point of the roofline."""

    label: str
    kind: str
    precision: str
    x: float  # FLOP per byte
    y: float  # FLOP/s


@_styled
def roofline(record: Bench, machine: Machine | None, subtitle: str) -> Figure | None:
    """Draw the roofline with every operator and step of known work; None without a point or without a ceiling."""
    if not _has_roofline(record, machine):
        return None
    page = _page("Roofline", subtitle, HEAD + 5.6)
    _roofline(page.subplots(), record, machine)
    return page


@_styled
def step(taken: Anatomy, subtitle: str) -> Figure:
    """Draw a decode step as bars, one an operator, what is left over last."""
    page = _page("Where a decode step goes", subtitle, HEAD + 0.9 + 0.34 * (len(taken.rows) + 1))
    _bars(page.subplots(), taken)
    return page


def write_png(path: Path, record: Bench, machine: Machine | None = None) -> Path:
    """Write both on one page of a presentation, and return its path.  Raises BadInput where there is nothing to draw."""
    if not _has_roofline(record, machine):
        raise BadInput(f"{path}: nothing to draw: a roofline needs memory.read or gemm, and an operator or step below it")
    return slides.write(path, _slide(record, machine))


def subtitle(record: Bench) -> str:
    """Return where the numbers come from."""
    return f"measured: {words(record).title.removeprefix('Benchmarks: ')}" + "; CONTENDED" * bool(record.contended)


@_styled
def _slide(record: Bench, machine: Machine | None) -> Figure:
    page = slides.page()
    said = words(record, machine)
    verdict = ("contended", RED) if record.contended else ("measured", GREEN)
    slides.head(
        page,
        said.title.removeprefix("Benchmarks: "),
        textwrap.shorten(said.lead, _LEAD, placeholder=" …"),
        verdict,
        {t.label: t.text for t in said.tiles},
        room=5,
    )
    taken = anatomy.tables(record.measurements)[:1]
    parts = page.subfigures(1, 1 + len(taken), squeeze=False, width_ratios=(1.5, 1)[: 1 + len(taken)])[0]
    _roofline(parts[0].subplots(), record, machine)
    for part, one in zip(parts[1:], taken, strict=True):
        panel = part.subplots()
        _bars(panel, one)
        panel.set_title(_plain(f"A decode step, {anatomies.of(one)}"), fontsize=12, loc="left")
    return page


# ---------------------------------------------------------------- roofline


def _has_roofline(record: Bench, machine: Machine | None) -> bool:
    found = readings.measured(record, _device(record))
    return bool(spots(readings.table(record, machine))) and (found.bytes_per_s is not None or bool(found.flops_per_s))


def spots(rows: Sequence[Row]) -> list[Spot]:
    """Return the points: each operator and step that both moves and computes something."""
    found = []
    for row in rows:
        kind = next((label for begins, label, _ in _CLASSES if row.name.startswith(begins)), None)
        if kind is not None and row.name not in _ON_HOST and row.intensity is not None and row.flops_per_s is not None:
            precision = str(row.parameters.get("precision", ""))
            found.append(Spot(_label(row), kind, precision, row.intensity, row.flops_per_s))
    return found


def _label(row: Row) -> str:
    """Return what stands beside a point: points that share it are one cloud."""
    if row.name == "op.linear":
        return f"m = {row.parameters.get('m')}"
    if row.name == "engine.step":
        decodes, prefills = (bool(row.parameters.get(name)) for name in ("decode_seqs", "prefill_tokens"))
        return "decode and prefill" if decodes and prefills else "decode" if decodes else "prefill"
    return row.name.removeprefix("op.").replace("rope_append", "rope")


def _device(record: Bench) -> str:
    return next((str(m.parameters["device"]) for m in record.measurements if m.parameters.get("device")), "cpu")


def _roofline(panel: Axes, record: Bench, machine: Machine | None) -> None:
    found = spots(readings.table(record, machine))
    device = _device(record)
    own, sheet = readings.measured(record, device), readings.datasheet(device, machine)
    xs, ys = [s.x for s in found], [s.y for s in found]
    peaks = [*own.flops_per_s.values(), *(sheet.flops_per_s.values() if sheet else ())]
    ridge = max(peaks) / own.bytes_per_s if peaks and own.bytes_per_s else max(xs)
    left, right = min(xs) / _ROOM, max(*xs, ridge) * _ROOM * 2
    panel.set(xscale="log", yscale="log", xlim=(left, right), ylim=(min(ys) / _ROOM, max(*ys, *peaks, 1.0) * _ROOM))
    roofs = [(own, False), *([(sheet, True)] if sheet is not None else [])]
    for roof, is_sheet in roofs:
        _lines(panel, roof, is_sheet)
    _points(panel, found)
    panel.set(xlabel="FLOP per byte moved", ylabel="FLOP/s")
    panel.yaxis.set_major_formatter(lambda value, _: quantity(value, "FLOP/s")[0].replace(".00", "").replace(".0 ", " "))
    panel.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.legend(loc="lower right", fontsize=10)
    root = panel.get_figure(root=True)
    assert root is not None
    root.draw_without_rendering()  # only then is it known where on the page a point will be
    said = [text for roof, is_sheet in roofs for text in _names(panel, roof, is_sheet)]
    _label_clouds(panel, found, [point for roof, _ in roofs for point in _along(roof, panel.get_xlim())], said)


def _points(panel: Axes, found: Sequence[Spot]) -> None:
    shapes = dict(zip(dict.fromkeys(s.precision for s in found), itertools.cycle(_SHAPES), strict=False))
    for _, kind, colour in _CLASSES:
        hollow = kind == "whole steps"
        look: dict[str, Any] = {"mfc": "none", "mec": colour, "mew": 1.8, "ms": 10} if hollow else {"mec": "white", "ms": 8}
        for precision in dict.fromkeys(s.precision for s in found if s.kind == kind):
            mine = [s for s in found if (s.kind, s.precision) == (kind, precision)]
            name = kind if len(shapes) == 1 else f"{kind}, {precision}"
            panel.plot([s.x for s in mine], [s.y for s in mine], shapes[precision], color=colour, label=name, **look)


def _lines(panel: Axes, roofs: Roofs, is_sheet: bool) -> None:
    """Draw bandwidth as a slope up to the highest peak, and each peak from where the slope meets it."""
    start, end = panel.get_xlim()
    line, colour = _roof_look(is_sheet)
    top = max(roofs.flops_per_s.values(), default=None)
    if roofs.bytes_per_s:
        stop = top / roofs.bytes_per_s if top else end
        panel.plot([start, stop], [start * roofs.bytes_per_s, stop * roofs.bytes_per_s], line, color=colour, lw=1.8, label=SILENT)
    for rate in roofs.flops_per_s.values():
        meets = rate / roofs.bytes_per_s if roofs.bytes_per_s else start
        panel.plot([max(meets, start), end], [rate, rate], line, color=colour, lw=1.8, label=SILENT)


def _names(panel: Axes, roofs: Roofs, is_sheet: bool) -> Iterator[Text]:
    """Write what each roof is: those of the data sheet above them, the measured ones below."""
    start, end = panel.get_xlim()
    said, dy, va = ("data sheet: ", 4, "bottom") if is_sheet else ("", -4, "top")
    common: dict[str, Any] = {"textcoords": "offset points", "fontsize": 10, "color": _roof_look(is_sheet)[1], "va": va}
    if roofs.bytes_per_s:
        (x0, y0), (x1, y1) = (panel.transData.transform((x, x * roofs.bytes_per_s)) for x in (start, 2 * start))
        angle, at = float(np.degrees(np.arctan2(y1 - y0, x1 - x0))), 1.2 * start
        text = f"{said}{quantity(roofs.bytes_per_s, 'B/s')[0]}"
        yield panel.annotate(text, (at, at * roofs.bytes_per_s), xytext=(0, dy), rotation=angle, rotation_mode="anchor", **common)
    for form, rate in _apart(roofs.flops_per_s):
        yield panel.annotate(f"{said}{form} {quantity(rate, 'FLOP/s')[0]}", (end, rate), xytext=(-4, dy), ha="right", **common)


def _roof_look(is_sheet: bool) -> tuple[str, str]:
    return ("--", GREY) if is_sheet else ("-", INK)


def _apart(peaks: dict[str, float]) -> Iterator[tuple[str, float]]:
    """Give the peaks, those within 4 % of each other as one: 'fp16, bf16'."""
    ordered = sorted(peaks.items(), key=lambda item: item[1])
    while ordered:
        rate = ordered[0][1]
        near = [form for form, other in ordered if other <= 1.04 * rate]
        yield ", ".join(near), rate
        ordered = ordered[len(near) :]


def _label_clouds(panel: Axes, found: Sequence[Spot], roofs: Sequence[tuple[float, float]], said: Sequence[Text]) -> None:
    """Write each cloud's label beside its middle, where it covers neither a point, a roof nor other words."""
    to_page = panel.transData.transform
    taken = [(x - 6.0, y - 6.0, x + 6.0, y + 6.0) for x, y in map(to_page, (*((s.x, s.y) for s in found), *roofs))]
    taken += [text.get_window_extent().extents for text in said]
    scale = panel.figure.dpi / 72
    clouds = dict.fromkeys((s.label, s.kind) for s in found)
    for label, kind in clouds:
        mine = [s for s in found if (s.label, s.kind) == (label, kind)]
        middle = (_mean([s.x for s in mine]), _mean([s.y for s in mine]))
        x, y = to_page(middle)
        width, height = 6.0 * len(label) * scale, 12 * scale
        boxes = [((dx, dy), _box(x + dx * scale, y + dy * scale, width, height, dx)) for dx, dy in _PLACES]
        (dx, dy), box = min(boxes, key=lambda item: sum(_overlap(item[1], other) for other in taken))
        taken.append(box)
        colour = next(c for _, name, c in _CLASSES if name == kind)
        panel.annotate(
            label, middle, xytext=(dx, dy), textcoords="offset points", ha="left" if dx > 0 else "right", va="center", fontsize=9.5,
            color=colour, bbox=PAPER | {"alpha": 0.7},
        )  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    """Return the middle on a logarithmic axis."""
    return float(np.exp(np.mean(np.log(values))))


def _along(roofs: Roofs, ends: tuple[float, float]) -> list[tuple[float, float]]:
    """Return points along the roofs, close enough to each other that no label fits between."""
    xs = np.geomspace(*ends, 160)
    slope, flat = roofs.bytes_per_s or np.inf, tuple(roofs.flops_per_s.values())
    top = max(flat, default=np.inf)
    rising = [(float(x), float(x * slope)) for x in xs if x * slope < top]
    return rising + [(float(x), rate) for rate in flat for x in xs if x * slope > rate]


def _box(x: float, y: float, width: float, height: float, dx: float) -> tuple[float, float, float, float]:
    return (x if dx > 0 else x - width, y - height / 2, x + width if dx > 0 else x, y + height / 2)


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


# ---------------------------------------------------------------- a step


def _bars(panel: Axes, taken: Anatomy) -> None:
    colours = {"attention": ORANGE, **{row.operator: BLUE for row in taken.rows if row.group == "linears"}}
    named = [(row.operator, row.total_s, colours.get(row.operator, GREEN)) for row in taken.rows]
    named.append((RESIDUAL, taken.residual_s, GREY))
    unit_s, unit = time_unit(taken.step_s)
    for at, (_, seconds, colour) in enumerate(named):
        panel.barh(at, seconds / unit_s, color=colour, height=0.72)
        text = f"{'-' * (seconds < 0)}{time(abs(seconds))}, {percent(100 * seconds / taken.step_s)}"
        panel.annotate(text, (max(seconds, 0) / unit_s, at), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)
    panel.set_yticks(range(len(named)), [name for name, *_ in named])
    panel.invert_yaxis()
    panel.set_xlim(min(0.0, 1.1 * taken.residual_s / unit_s), 1.32 * max(s for _, s, _ in named) / unit_s)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel(f"{unit}, of {time(taken.step_s)}")
