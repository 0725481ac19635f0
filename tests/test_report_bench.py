"""What people read of benchmarks: ten seconds on top, every figure below, the same on a terminal, in HTML, Markdown and as a picture."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from mlsys_bench import anatomy, readings, record, report
from mlsys_bench.errors import BadInput
from mlsys_bench.report import anatomies, benches, content, lists, terminal
from mlsys_bench.report.parts import Section
from mlsys_bench.types import Bench, Machine
from tests import sample_benches as sample

HERE = Machine(hard={"cpu_name": "AMD EPYC 9R14"}, soft={})


def printed(bench: Bench, width: int = 80) -> str:
    file = io.StringIO()
    terminal.show(bench, Console(file=file, width=width, color_system=None))
    return file.getvalue()


def section(bench: Bench) -> Section:
    (found,) = content.describe(bench, HERE)
    return found


def item(bench: Bench) -> report.Item:
    return "bench.json", record.envelope(bench, HERE), bench


# ---------------------------------------------------------------- ten seconds


def test_the_facts_say_what_the_machine_delivers_and_where_the_time_goes() -> None:
    facts = {f.label: f.text for f in section(sample.record()).facts}
    assert facts["Memory"] == "read 24.0 GB/s, copy 19.2 GB/s, triad 20.4 GB/s"
    assert facts["Products"] == "fp32 110 GFLOP/s, int8 420 GFLOP/s"
    assert facts["Decode"].endswith("tokens/s")
    assert re.fullmatch(r"matrices \d+ %, attention \d+ %, other operators \d+ %, overhead -?\d+ %", facts["A step's time"])
    assert facts["Far from both"].startswith("4 of 21 operators")


def test_a_contended_machine_is_the_first_thing_that_is_said() -> None:
    quiet, loud = section(sample.record()), section(sample.record(contended=("others took 41 % of the cores",)))
    assert loud.lead.startswith("CONTENDED, measure again before you rely on this: others took 41 % of the cores.")
    assert (quiet.tone, loud.tone) == ("", "bad")


def test_it_says_how_far_it_is_to_be_believed() -> None:
    facts = {f.label: f.text for f in section(sample.record()).facts}
    assert facts["Not settled"] == "1 of 31 ended with the budget"
    assert facts["Flagged"] == "31 of 1,054 samples taken while something disturbed them"
    assert any("two launches of the same program differ" in t.note for t in section(sample.record()).tables)


def test_an_output_beyond_its_tolerance_is_in_the_colour_of_trouble() -> None:
    bench = sample.record()
    wrong = tuple(dataclasses.replace(m, error=0.5) if m.name == "op.linear" else m for m in bench.measurements)
    found = section(dataclasses.replace(bench, measurements=wrong))
    assert next(f for f in found.facts if f.label == "Wrong").tone == "bad"


# ---------------------------------------------------------------- every figure


@pytest.mark.parametrize("width", [60, 80, 130, 200])
def test_every_measurement_has_its_line_and_none_is_wider_than_the_terminal(width: int) -> None:
    bench = sample.record(watts=40.0)
    text = printed(bench, width)
    assert max(map(len, text.splitlines())) <= width
    tables = [t for t in section(bench).tables if t.columns[0].title == "benchmark"]
    lines = [row for t in tables for row in t.rows if any(cell.text for cell in row[1:])]
    assert len(lines) == sum(m.skipped is None for m in bench.measurements)


def test_what_all_rows_share_is_said_once() -> None:
    table = next(t for t in section(sample.record()).tables if t.title.startswith("Operators"))
    assert table.title == "Operators of the model: small-160m int8"
    names = [row[0].text for row in table.rows]
    assert names[:3] == ["linear", "  qkv, m 1", "  qkv, m 16"]
    assert "norm, m 1" in names


def test_columns_that_nobody_fills_are_not_there() -> None:
    titles = {c.title for t in section(sample.record()).tables for c in t.columns}
    assert not titles & {"J/token", "tokens/s/W", "of data sheet", "costs"}
    assert {"J/token", "tokens/s/W"} <= {c.title for t in section(sample.record(watts=40.0)).tables for c in t.columns}


def test_what_was_skipped_stands_at_the_end_with_its_reason() -> None:
    notes = dict(section(sample.record()).notes)
    assert notes["Skipped"] == ("device.launch: no GPU: a kernel is called, not launched",)
    assert notes["What this machine does not tell"] == ("energy: no RAPL here, /sys/class/powercap is empty",)


def test_a_record_without_any_of_it_still_reads() -> None:
    assert section(Bench(measurements=())).title == "Benchmarks: 0"
    assert "1 skipped" in section(Bench(measurements=sample.record().measurements[-1:])).lead


# ---------------------------------------------------------------- a step taken apart


def test_the_operator_table_adds_up_to_the_step() -> None:
    (taken,) = anatomy.tables(sample.record().measurements)
    table = anatomies.table(taken)
    shares = [float(row[3].text.removesuffix(" %")) for row in table.rows]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.05 * len(shares))
    assert [row[0].text for row in table.rows[-2:]] == ["launch/Python overhead", "the step, measured"]
    assert "not measured, so in the overhead: embedding" in table.note


def test_a_bar_is_as_long_as_its_share() -> None:
    assert [len(anatomies.bar(share)) for share in (-0.1, 0.0, 0.5, 1.0, 1.2)] == [0, 0, 10, 20, 20]


# ---------------------------------------------------------------- pages and pictures


def test_html_and_markdown_say_the_same_as_the_terminal(tmp_path: Path) -> None:
    items = [item(sample.record())]
    page = report.write_html(tmp_path / "b.html", items).read_text()
    text = report.write_markdown(tmp_path / "b.md", items).read_text()
    for words in ("Where a decode step goes", "gate_up", "What this machine delivers", "no GPU: a kernel is called"):
        assert words in page
        assert words in text.replace("\\", "")
    assert page.count("<img ") == 2


def test_the_slide_is_a_picture(tmp_path: Path) -> None:
    path = report.write_png(tmp_path / "b.png", [item(sample.record())])
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BadInput, match="nothing to draw"):
        report.write_png(tmp_path / "c.png", [item(Bench(measurements=()))])


def test_a_point_lies_where_its_work_and_time_put_it() -> None:
    from mlsys_bench.report import bench_pictures

    rows = readings.table(sample.record())
    linear = next(row for row in rows if row.name == "op.linear")
    spot = next(s for s in bench_pictures.spots(rows) if s.kind == "matrices")
    assert linear.seconds is not None
    work = next(m.work for m in sample.record().measurements if m.name == "op.linear")
    assert work is not None
    assert (spot.x, spot.y) == (pytest.approx(work.flops / work.bytes), pytest.approx(work.flops / linear.seconds))


def test_no_label_of_the_roofline_lies_on_another() -> None:
    from mlsys_bench.report import bench_pictures

    figure = bench_pictures.roofline(sample.record(), HERE, "x")
    assert figure is not None
    labels = {s.label for s in bench_pictures.spots(readings.table(sample.record()))}
    boxes = [text.get_window_extent() for text in figure.axes[0].texts if text.get_text() in labels]
    assert len(boxes) >= len(labels)
    crossing = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.padded(-4).overlaps(b.padded(-4))]
    assert not crossing


def test_a_data_sheet_is_drawn_dashed_where_there_is_one() -> None:
    from mlsys_bench.report import bench_pictures

    on_gpu = [dataclasses.replace(m, parameters={**m.parameters, "device": "H200"}) for m in sample.record().measurements]
    for bench, dashed in ((sample.record(), False), (Bench(measurements=tuple(on_gpu)), True)):
        figure = bench_pictures.roofline(bench, HERE, "x")
        assert figure is not None
        assert any(line.get_linestyle() == "--" for line in figure.axes[0].lines) is dashed


def test_csv_is_written_of_a_bench_too(tmp_path: Path) -> None:
    lines = report.write_csv(tmp_path / "b.csv", [item(sample.record())]).read_text().splitlines()
    assert len(lines) == 1 + len(sample.record().measurements)


# ---------------------------------------------------------------- the list


def test_every_benchmark_is_in_the_list_once_with_its_unit() -> None:
    lines = lists.benchmarks().splitlines()
    for entry in readings.CATALOGUE:
        (line,) = [line for line in lines if line.split()[:1] == [entry.name]]
        assert line.split()[1] == entry.unit
        assert len(line) <= 140


def test_words_of_the_gate_leave_out_what_is_said_already() -> None:
    assert benches.short({"m": 4, "n": 8}, {"n": 8}) == "m 4"
