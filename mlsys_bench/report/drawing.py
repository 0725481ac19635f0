"""A stage graph as a drawing: boxes in layers, the ways between them, in text and as SVG from the same layout.

Drawn are the usual ways: next, routes, misses of a cache, parallel branches and what follows their join.  Hits that end the request,
escalations, timeouts and fallbacks stand in the box they start from.
"""

from __future__ import annotations

import base64
import html
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mlsys_bench import units
from mlsys_bench.report.parts import digits, percent
from mlsys_bench.scenario import Flow, flows
from mlsys_bench.scenario.popularity import hit
from mlsys_bench.stages import DONE, Stage, StageGraph

WIDTH = 98  # columns of the whole
INNER = 28  # columns inside a box
KEPT = "\u00a0"  # a space at which no line breaks
GAP = 3  # between boxes
CHAR_W, LINE_H = 8, 17  # of the SVG, in pixels


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A stage at its place: the column and row of its upper left corner, inner width, and lines of text."""

    name: str
    column: int
    row: int
    width: int
    lines: tuple[str, ...]

    @property
    def centre(self) -> int:
        """The column in the middle."""
        return self.column + (self.width + 2) // 2

    @property
    def bottom(self) -> int:
        """The row of the lower border."""
        return self.row + len(self.lines) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A line from one box down to another: corners as (column, row), an arrow at its end, and a label beside it."""

    corners: tuple[tuple[int, int], ...]
    arrow: bool = True
    label: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Boxes and ways on a grid of characters."""

    boxes: tuple[Box, ...]
    ways: tuple[Way, ...]
    columns: int
    rows: int


# ---------------------------------------------------------------- layout


def layout(graph: StageGraph) -> Drawing:
    """Return where every stage stands: in the row after the last of those that lead to it."""
    edges = _edges(graph)
    layers = _layers(graph, edges)
    found = flows(graph.stages, graph.entry)
    rows: list[list[str]] = [[] for _ in range(max(layers.values()) + 1)]
    for name in layers:
        rows[layers[name]].append(name)
    lines = {
        stage.name: tuple(part for line in _lines(stage, found[stage.name]) for part in textwrap.wrap(line, INNER))
        for stage in graph.stages
    }
    paths = [_Path(names=(a, b), label=label) for (a, b), label in edges.items()]
    _pass_through(paths, layers, rows)
    _in_order(rows, paths)
    columns = _columns(rows, lines)
    return _placed(rows, lines, paths, columns)


@dataclass(slots=True)
class _Path:
    """A way through the layers: the two stages, and the points it passes between them."""

    names: tuple[str, ...]
    label: str
    through: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[str]:
        return [self.names[0], *self.through, self.names[-1]]


def _edges(graph: StageGraph) -> dict[tuple[str, str], str]:
    """Return the ways that are drawn, each with a label; a parallel stage leads on from the ends of its branches."""
    found: dict[tuple[str, str], str] = {}
    for stage in graph.stages:
        if stage.cache is not None and stage.cache.on_miss is not None:
            share = hit(stage.cache)
            found[stage.name, stage.cache.on_miss] = f"miss {percent(100 * (1 - share))}"
            found[stage.name, stage.cache.on_hit] = f"hit {percent(100 * share)}"
        for branch in stage.parallel:
            found[stage.name, branch] = ""
        starts = _ends(graph, stage) if stage.parallel else [stage.name]
        onward = {stage.next: ""} if stage.next else {}
        onward |= {target: percent(100 * p) for target, p in (stage.route.to if stage.route else {}).items()}
        for target, label in onward.items():
            for start in starts:
                found.setdefault((start, str(target)), label)
    reached = {target for _, target in found} | {graph.entry}
    for stage in graph.stages:  # detours are drawn where nothing else leads, and none that goes back up
        detours = (
            (stage.fallback.to, "falls back") if stage.fallback else None,
            (stage.escalate.to, "escalates") if stage.escalate else None,
        )
        for target, label in filter(None, detours):
            if target not in reached and not _leads(found, target, stage.name):
                found[stage.name, target] = label
    return {edge: label for edge, label in found.items() if DONE not in edge}


def _leads(edges: Mapping[tuple[str, str], str], start: str, end: str) -> bool:
    """Say whether the ways drawn lead from one stage to another."""
    found, left = {start}, [start]
    while left:
        stage = left.pop()
        onward = {b for a, b in edges if a == stage} - found
        found |= onward
        left += onward
    return end in found


def _ends(graph: StageGraph, fork: Stage) -> list[str]:
    """Return the stages at which the branches of a parallel stage end."""
    found: list[str] = []
    left = list(fork.parallel)
    while left:
        stage = graph.stage(left.pop(0))
        onward = [t for t in ([stage.next] if stage.next else list(stage.route.to) if stage.route else []) if t != DONE]
        if stage.parallel and not onward:
            onward = list(stage.parallel)
        if not onward and stage.name not in found:
            found.append(stage.name)
        left += onward
    return found


def _layers(graph: StageGraph, edges: Mapping[tuple[str, str], str]) -> dict[str, int]:
    """Return the row of every stage: one below the lowest that leads to it."""
    layers = {stage.name: 0 for stage in graph.stages}
    for _ in graph.stages:
        for a, b in edges:
            layers[b] = max(layers[b], layers[a] + 1)
    return layers


def _pass_through(paths: Sequence[_Path], layers: Mapping[str, int], rows: list[list[str]]) -> None:
    """Give a way that skips rows a point in each of them."""
    for i, path in enumerate(paths):
        first, last = (layers[name] for name in path.names)
        for row in range(first + 1, last):
            path.through.append(f"|{i}.{row}")
            rows[row].append(path.through[-1])


def _in_order(rows: list[list[str]], paths: Sequence[_Path]) -> None:
    """Order each row by where its ways come from, so that few cross."""
    for row in range(1, len(rows)):
        above = {name: i for i, name in enumerate(rows[row - 1])}
        into: dict[str, list[int]] = {}
        for path in paths:
            for a, b in zip(path.all, path.all[1:], strict=False):
                if a in above:
                    into.setdefault(b, []).append(above[a])
        mean = {name: sum(into[name]) / len(into[name]) if name in into else len(above) for name in rows[row]}
        rows[row].sort(key=lambda name: mean[name])


def _columns(rows: Sequence[Sequence[str]], lines: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the middle column of every box and point, each row centred."""
    width = {name: _width(name, lines) for row in rows for name in row}
    whole = min(max(sum(width[n] for n in row) + GAP * (len(row) - 1) for row in rows), WIDTH)
    found = {}
    for row in rows:
        at = (whole - sum(width[n] for n in row) - GAP * (len(row) - 1)) // 2
        for name in row:
            found[name] = at + width[name] // 2
            at += width[name] + GAP
    return found


def _width(name: str, lines: Mapping[str, Sequence[str]]) -> int:
    return INNER + 2 if name in lines else 1


def _placed(
    rows: Sequence[Sequence[str]], lines: Mapping[str, tuple[str, ...]], paths: Sequence[_Path], columns: Mapping[str, int]
) -> Drawing:
    boxes, ways, at = [], [], 0
    tops: dict[str, int] = {}
    bottoms: dict[str, int] = {}
    for i, row in enumerate(rows):
        steps = [(a, b, p) for p in paths for a, b in zip(p.all, p.all[1:], strict=False) if b in row] if i else []
        tracks = _tracks(steps, columns)
        top = at + (len(set(tracks.values())) + 2 if steps else 0)
        height = max(len(lines.get(name, ())) + 2 for name in row)
        for name in row:
            if name in lines:
                boxes.append(
                    Box(name=name, column=columns[name] - (INNER + 2) // 2, row=top, width=INNER, lines=_padded(lines[name], height - 2))
                )
            tops[name], bottoms[name] = top, top + height - 1
        for a, b, path in steps:
            start, end = (columns[a], bottoms[a] + 1), (columns[b], top - 1)
            turn = at + 1 + tracks[a, b] if columns[a] != columns[b] else start[1]
            corners = (start, (columns[a], turn), (columns[b], turn), end)
            label = path.label if b == path.names[-1] else ""
            ways.append(Way(corners=corners, arrow=b in lines, label=label))
            if b not in lines:  # straight on beside the boxes of this row
                ways.append(Way(corners=((columns[b], top), (columns[b], top + height - 1)), arrow=False))
        at = top + height
    return Drawing(boxes=tuple(boxes), ways=tuple(ways), columns=max(b.column + b.width + 2 for b in boxes), rows=at)


def _padded(lines: tuple[str, ...], height: int) -> tuple[str, ...]:
    return (*lines, *[""] * (height - len(lines)))


def _tracks(steps: Sequence[tuple[str, str, _Path]], columns: Mapping[str, int]) -> dict[tuple[str, str], int]:
    """Return the row of the gap in which each way turns: one for all that meet in one stage or start from one, else one each."""
    turning = [(a, b) for a, b, _ in steps if columns[a] != columns[b]]
    groups: list[set[tuple[str, str]]] = []
    for edge in turning:
        mates = [g for g in groups if any(edge[0] == a or edge[1] == b for a, b in g)]
        merged = {edge}.union(*mates)
        if len({a for a, _ in merged}) > 1 and len({b for _, b in merged}) > 1:
            groups.append({edge})  # two starts and two ends on one line could not be told apart
        else:
            groups = [g for g in groups if g not in mates] + [merged]
    return {edge: i for i, group in enumerate(groups) for edge in group}


# ---------------------------------------------------------------- words in a box


def _lines(stage: Stage, flow: Flow) -> Iterator[str]:
    yield stage.name + (f" x{stage.shards} shards" if stage.shards > 1 else "") + (" (nobody waits)" if stage.is_async else "")
    if stage.component:
        yield stage.component
    yield from _service(stage)
    yield f"{digits(flow.visits)} visits" + (f", {digits(flow.calls)} calls" if abs(flow.calls - flow.visits) > 1e-9 and flow.calls else "")
    resources = stage.resources
    if resources is not None:
        count = f"{resources.gpus} x " if resources.gpus > 1 else ""
        yield f"{resources.vcpu:g} vCPU" if resources.vcpu is not None else f"{count}{' or '.join(resources.gpu)}"
    yield from _detours(stage)


def _service(stage: Stage) -> Iterator[str]:
    service = stage.service
    if service is None:
        if stage.parallel:
            join = stage.join
            by = f" by{KEPT}{units.show_s(join.by_s).replace(' ', KEPT)}" if join and join.by_s else ""
            yield "all at once, joins " + (f"{join.k} of {join.of}{by}" if join else "all")
        return
    if service.assumed is not None:
        law = service.assumed
        each = f" + {units.show_s(law.per_item_s)} n" if law.per_item_s else ""
        yield f"{units.show_s(law.mean_s)}{each}, {law.dist}" + (f"{KEPT}{law.cv:g}" if law.cv is not None else "")
    elif service.roofline is not None:
        yield f"{service.roofline.model}, {' or '.join(service.roofline.precision)}"
    elif service.measured is not None:
        yield f"measured: {service.measured.file.rpartition('/')[2]}"
    if stage.batching is not None:
        yield f"batches to {stage.batching.max}, wait {units.show_s(stage.batching.wait_s)}"
    if stage.concurrency > 1:
        yield f"{stage.concurrency} at once"


def _detours(stage: Stage) -> Iterator[str]:
    if stage.cache is not None and (stage.cache.on_miss is None or stage.cache.on_hit == DONE):
        yield f"hit {percent(100 * hit(stage.cache))} > {stage.cache.on_hit}"
    if stage.escalate is not None:
        yield f"{percent(100 * stage.escalate.p)} escalate > {stage.escalate.to}"
    if stage.queue is not None:
        yield f"queue of {stage.queue.limit}"
    if stage.timeout_s is not None:
        yield f"timeout {units.show_s(stage.timeout_s)}"
    if stage.hedge is not None:
        yield f"hedge after {units.show_s(stage.hedge.after_s)}"
    if stage.failure is not None:
        yield f"fails {percent(100 * stage.failure.p)}"
    if stage.retries is not None:
        tries = "1 retry" if stage.retries.max == 1 else f"{stage.retries.max} retries"
        yield f"{tries}, budget {percent(100 * stage.retries.budget)}"
    if stage.fallback is not None:
        yield f"falls back > {stage.fallback.to}"


# ---------------------------------------------------------------- text

_UP, _DOWN, _LEFT, _RIGHT = 1, 2, 4, 8
_LINES = {3: "│", 12: "─", 10: "┌", 6: "┐", 9: "└", 5: "┘", 11: "├", 7: "┤", 14: "┬", 13: "┴", 15: "┼", 1: "│", 2: "│", 4: "─", 8: "─"}


def text(graph: StageGraph) -> tuple[str, ...]:
    """Return the drawing in box-drawing characters, line by line."""
    drawing = layout(graph)
    grid = [[" "] * (drawing.columns + 14) for _ in range(drawing.rows)]
    for (column, row), strokes in _strokes(drawing.ways).items():
        grid[row][column] = _LINES[strokes]
    for way in drawing.ways:
        column, row = way.corners[-1]
        if way.arrow:
            grid[row][column] = "▼"
        _write(grid, row, column + 2, way.label)
    for box in drawing.boxes:
        _frame(grid, box)
    return tuple(line.rstrip() for line in map("".join, grid))


def _strokes(ways: Sequence[Way]) -> dict[tuple[int, int], int]:
    """Return for every cell which of its four sides lines leave by."""
    found: dict[tuple[int, int], int] = {}

    def stroke(cell: tuple[int, int], side: int) -> None:
        found[cell] = found.get(cell, 0) | side

    for way in ways:
        for (c0, r0), (c1, r1) in zip(way.corners, way.corners[1:], strict=False):
            for row in range(min(r0, r1), max(r0, r1)):
                stroke((c0, row), _DOWN)
                stroke((c0, row + 1), _UP)
            for column in range(min(c0, c1), max(c0, c1)):
                stroke((column, r0), _RIGHT)
                stroke((column + 1, r0), _LEFT)
        stroke(way.corners[0], _UP)
        stroke(way.corners[-1], _DOWN)
    return found


def _write(grid: list[list[str]], row: int, column: int, words: str) -> None:
    for i, letter in enumerate(words):
        if column + i < len(grid[row]) and grid[row][column + i] == " ":
            grid[row][column + i] = letter


def _frame(grid: list[list[str]], box: Box) -> None:
    edge = "─" * box.width
    rows = [f"┌{edge}┐", *(f"│{_cut(line, box.width):^{box.width}}│" for line in box.lines), f"└{edge}┘"]
    for i, line in enumerate(rows):
        grid[box.row + i][box.column : box.column + box.width + 2] = list(line)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else f"{line[: width - 1]}…"


# ---------------------------------------------------------------- SVG


def svg(graph: StageGraph) -> str:
    """Return the drawing as an SVG image, whole in itself."""
    drawing = layout(graph)
    width, height = (drawing.columns + 4) * CHAR_W, (drawing.rows + 1) * LINE_H
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="DejaVu Sans, Helvetica, Arial, sans-serif" font-size="12">',
        '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#1F2430"/></marker></defs>',
        *(_svg_way(way) for way in drawing.ways),
        *(_svg_box(box) for box in drawing.boxes),
        "</svg>",
    ]
    return "".join(parts)


def uri(graph: StageGraph) -> str:
    """Return the image as a data URI: nothing beside the page is needed to show it."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg(graph).encode()).decode()


def _x(column: int) -> float:
    return (column + 2) * CHAR_W


def _y(row: float) -> float:
    return (row + 1) * LINE_H


def _svg_way(way: Way) -> str:
    points = [(c, r + 0.5) for c, r in way.corners]
    first, last = points[0], points[-1]
    points = [(first[0], first[1] - 1.0), *points[1:-1], (last[0], last[1] + 0.5)]  # from border to border
    shape = " ".join(f"{_x(c)},{_y(r - 0.5)}" for c, r in points)
    arrow = ' marker-end="url(#a)"' if way.arrow else ""
    line = f'<polyline points="{shape}" fill="none" stroke="#1F2430" stroke-width="1.2"{arrow}/>'
    if not way.label:
        return line
    return f'{line}<text x="{_x(last[0]) + 6}" y="{_y(last[1] - 0.5)}" fill="#1F2430">{html.escape(way.label)}</text>'


def _svg_box(box: Box) -> str:
    x, y, w, h = _x(box.column), _y(box.row - 0.5), (box.width + 2) * CHAR_W, (len(box.lines) + 1.4) * LINE_H
    frame = f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="6" fill="#F4F8FB" stroke="#0072B2" stroke-width="1.4"/>'
    words = "".join(_svg_line(line, x + w / 2, y + (i + 1.15) * LINE_H, "bold" if i == 0 else "normal") for i, line in enumerate(box.lines))
    return frame + words


def _svg_line(line: str, x: float, y: float, weight: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="middle" fill="#1F2430" font-weight="{weight}">{html.escape(line)}</text>'
