"""Stage graphs as pictures: nothing missing, nothing cut, nothing wider than a terminal."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest

from mlsys_bench import scenario
from mlsys_bench.report import drawing
from mlsys_bench.stages import StageGraph
from tests.stage_graphs import graph, law

STAGED = [name for name in scenario.names() if isinstance(scenario.load(name), StageGraph)]


def load(name: str) -> StageGraph:
    read = scenario.load(name)
    assert isinstance(read, StageGraph)
    return read


@pytest.mark.parametrize("name", STAGED)
def test_a_drawing_shows_every_stage_once_within_a_hundred_columns(name: str) -> None:
    lines = drawing.text(load(name))
    assert max(map(len, lines)) <= 100
    picture = drawing.layout(load(name))
    assert sorted(box.name for box in picture.boxes) == sorted(stage.name for stage in load(name).stages)
    assert "…" not in "\n".join(lines)


@pytest.mark.parametrize("name", STAGED)
def test_boxes_do_not_overlap_and_ways_do_not_run_through_them(name: str) -> None:
    picture = drawing.layout(load(name))
    cells: dict[tuple[int, int], str] = {}
    for box in picture.boxes:
        for row in range(box.row, box.bottom + 1):
            for column in range(box.column, box.column + box.width + 2):
                assert (column, row) not in cells, (box.name, cells[column, row])
                cells[column, row] = box.name
    for way in picture.ways:
        for (c0, r0), (c1, r1) in zip(way.corners, way.corners[1:], strict=False):
            for row in range(min(r0, r1), max(r0, r1) + 1):
                for column in range(min(c0, c1), max(c0, c1) + 1):
                    assert (column, row) not in cells


def test_a_fork_and_its_join_are_drawn_as_one_line_each() -> None:
    lines = drawing.text(graph(f"a: {{parallel: [b, c], next: d}}\nb: {{{law('1ms')}}}\nc: {{{law('2ms')}}}\nd: {{{law('3ms')}}}"))
    assert sum("┌─" in line and "┴" in line and "┐" in line for line in lines) == 1
    assert sum("└─" in line and "┬" in line and "┘" in line for line in lines) == 1
    assert sum(line.count("▼") for line in lines) == 3


def test_shares_stand_beside_their_ways_and_detours_in_their_box() -> None:
    text = "\n".join(drawing.text(load("llm-cascade")))
    for words in ("miss 90.0 %", "70.0 %", "30.0 %", "hit 10.0 % > done", "8.0 % escalate > large", "0.320 visits"):
        assert words in text


def test_a_way_past_a_row_goes_beside_its_boxes() -> None:
    g = graph(f"a: {{route: {{to: {{b: 50%, c: 50%}}, source: x}}}}\nb: {{{law('1ms')}, next: c}}\nc: {{{law('1ms')}}}")
    lines = drawing.text(g)
    assert any(line.count("│") == 3 and " b " in line for line in lines)


@pytest.mark.parametrize("name", STAGED)
def test_the_image_is_sound_and_says_the_same(name: str) -> None:
    root = ElementTree.fromstring(drawing.svg(load(name)))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {stage.component for stage in load(name).stages if stage.component} <= set(words)
    assert drawing.uri(load(name)).startswith("data:image/svg+xml;base64,")


def test_a_way_back_after_an_escalation_is_drawn_and_its_detour_stands_in_the_box() -> None:
    """A model hands some on to a reviewer, who hands all of them back."""
    g = graph(f"a: {{{law('1ms')}, escalate: {{to: b, p: 10%, source: x}}}}\nb: {{{law('2ms')}, next: a}}")
    picture = drawing.layout(g)
    assert sorted(box.name for box in picture.boxes) == ["a", "b"]
    assert len(picture.ways) == 1
    assert "10.0 % escalate > b" in "\n".join(drawing.text(g))
