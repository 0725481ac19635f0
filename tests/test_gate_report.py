"""What people see of a gate: the table, what to do next, and the pictures."""

from __future__ import annotations

import dataclasses
import io
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlsys_bench import report
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import policy, sequence
from mlsys_bench.record import Record
from mlsys_bench.report import content, gate_forest, gate_launches, gate_pictures, gate_slides, gates, html, markdown, pictures, terminal
from mlsys_bench.types import Bench, Launch, Measurement, Round
from mlsys_bench.verdicts import WORST_FIRST, Contention, Finding, GateRun, Policy, Subject, Verdict, Word
from tests import sample_gates as sample
from tests.sample_records import head, items

WORDS: tuple[Word, ...] = get_args(Word)


def printed(record: Record, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False)
    terminal.show(record, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def facts(record: Record) -> dict[str, str]:
    return {f.label: f"{f.text} {f.detail}".strip() for f in content.describe(record)[0].facts}


def every_verdict() -> tuple[Finding, ...]:
    return tuple(sample.finding(f"metric.{word}", word, 0.01 * i) for i, word in enumerate(WORDS))


MANY = tuple(
    sample.finding(f"bench.a.rather.long.name.of.a.metric.number_{i}.of.the.engine", WORDS[i % 5], 0.002 * i, parameters={"batch": i})
    for i in range(20)
)
UNCOMPARED = sample.finding("engine.step", "not_comparable", ratio=None, interval=None, candidate=None)
CASES: dict[str, GateRun] = {
    "usual": sample.run(),
    "one metric": sample.run(sample.FINDINGS[:1]),
    "all verdicts": sample.run(every_verdict()),
    "twenty with long names": sample.run(MANY),
    "one pair": sample.run((sample.finding("command.wall", "suspect", 0.09, pairs=1, interval=None),), "suspect", 1),
    "not comparable": sample.run((UNCOMPARED,), "not_comparable"),
    "nothing": sample.run((), "not_comparable"),
}


# ---------------------------------------------------------------- the table


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("case", CASES)
def test_every_gate_fits_the_terminal(case: str, width: int) -> None:
    text = printed(CASES[case], width)
    assert max(map(len, text.splitlines())) <= width
    assert "None" not in text
    assert not re.search(r"\bnan\b", text)


def test_eighty_columns_hold_verdict_change_and_both_numbers() -> None:
    line = next(line for line in printed(CASES["usual"]).splitlines() if line.startswith("engine.step "))
    assert line.split() == ["engine.step", "regression", "+6.1", "%", "2.10", "ms", "2.23", "ms"]
    assert "too wide" not in printed(CASES["usual"])


def test_the_worst_stands_first_and_what_may_not_fail_behind_its_fellows() -> None:
    order = [f.name for f in gates.ordered(sample.FINDINGS)]
    assert order[:3] == ["engine.step", "planner.plan", "engine.step.tail"]
    assert [f.verdict for f in gates.ordered(every_verdict())] == list(WORST_FIRST)


def test_what_the_report_knows_of_the_gate_is_what_the_gate_does() -> None:
    """The two rooms do not import each other: looks and derived metrics are written down in both."""
    assert sequence.LOOKS[0] == gates.FIRST_LOOK
    assert sequence.LOOKS[-1] == gates.LAST_LOOK
    assert set(gate_launches._OF_LAUNCH) == set(policy.DERIVED)


@settings(max_examples=30)
@given(st.permutations(sample.FINDINGS))
def test_the_order_does_not_depend_on_that_of_the_record(findings: list[Finding]) -> None:
    assert gates.ordered(findings) == gates.ordered(sample.FINDINGS)


def test_worse_is_worse_whichever_way_is_better() -> None:
    """Throughput down by 8 % is worse than latency up by 6 %."""
    slower = sample.finding("latency", change=0.06)
    fewer = sample.finding("throughput", change=-0.08, better="higher")
    assert [f.name for f in gates.ordered([slower, fewer])] == ["throughput", "latency"]
    assert gates.badness(fewer) == pytest.approx(-np.log(0.92))


def test_improvements_stand_beside_regressions() -> None:
    assert facts(CASES["usual"])["Metrics"].startswith("1 worse, 1 better, 2 within tolerance")


def test_a_parameter_is_shown_where_metrics_of_one_name_differ_in_it() -> None:
    both = [sample.finding(parameters={"batch": n, "model": "nano"}) for n in (1, 8)]
    assert gates.labels(both) == ("engine.step, batch 1", "engine.step, batch 8")
    assert gates.labels(both[:1]) == ("engine.step",)


def test_a_working_tree_with_changes_says_so() -> None:
    dirty = Subject(kind="ref", label=".", commit="a" * 40 + "-dirty", environment="this environment")
    assert gates.origin(dirty) == f"commit {'a' * 12}, with changes that are not committed, this environment"


def test_a_contended_run_says_so() -> None:
    disturbed = Contention(verdict="contended", reasons=("steal of 12 % on 3 of 20 launches",))
    text = printed(sample.run(contention=disturbed))
    assert "others disturbed the run" in text
    assert "steal of 12 % on 3 of 20 launches" in text


def test_the_surroundings_of_both_sides_stand_side_by_side() -> None:
    section = content.describe(sample.run(conditions=sample.conditions(10, gpu=True)))[0]
    rows = {row[0].text: (row[1].text, row[2].text) for row in section.tables[-1].rows}
    assert rows["GPU SM clock, MHz"] == ("1,755", "1,755")
    assert rows["steal"] == ("0.4 %", "0.4 %")
    assert rows["involuntary switches"][0] == "16"  # the median of 3, 6 … 30, rounded to even


# ---------------------------------------------------------------- what next


def undecided(**changes: Any) -> GateRun:
    return sample.run((sample.finding("planner.plan", "inconclusive", 0.02, **changes),), "inconclusive")


def test_an_open_question_says_how_many_pairs_and_how_long() -> None:
    """24 are needed, 10 are there, one takes 4.1 s: 57.4 s, rounded up."""
    assert facts(undecided())["Next"] == "run 14 more launch pairs (about 58.0 s) to decide 3 %"


def test_a_hopeless_question_sends_to_the_calibration() -> None:
    said = facts(undecided(pairs_needed=None, detectable=0.31))["Next"]
    assert said == "planner.plan is too noisy here; these pairs find 31 %: mlsys gate calibrate says what this machine can decide"


def test_a_run_that_looked_for_the_last_time_asks_for_no_pairs_that_no_run_takes() -> None:
    said = facts(undecided(pairs=20, pairs_needed=141, detectable=0.129))["Next"]
    start = "planner.plan is too noisy here: these pairs find 13 %, 141 would find 3 %, a run takes 20"
    assert said == f"{start}; mlsys gate calibrate says what this machine can decide"


def test_one_launch_of_live_servers_asks_for_more_launches() -> None:
    url = Subject(kind="url", label="http://127.0.0.1:8001")
    worse, open_ = sample.finding("ttft", "suspect", 0.9, pairs=1), sample.finding("ttft", "inconclusive", 0.02, pairs=1)
    for found in (worse, open_):
        measured = sample.run((found,), found.verdict, 1, base=url, cand=url, ended="last_look")
        assert "--base-restart and --cand-restart" in facts(measured)["Next"]


def test_a_run_that_never_came_to_its_first_look_says_what_it_takes() -> None:
    """Two pairs of 4.1 s are there, four more to go: 16.4 s."""
    found = sample.run((sample.finding("planner.plan", "inconclusive", 0.02, pairs=2, pairs_needed=None),), "inconclusive", 2)
    assert facts(found)["Next"] == "give it a longer --budget: 4 more launch pairs (about 17.0 s) to the first look"


def test_enough_pairs_without_an_answer_ask_for_a_longer_budget() -> None:
    assert "run it again with a longer --budget" in facts(undecided(pairs_needed=9))["Next"]


@pytest.mark.parametrize(
    ("case", "said"),
    [("usual", "start with engine.step"), ("one pair", "prove it: a longer --budget"), ("not comparable", "see why, metric by metric")],
)
def test_each_verdict_has_a_next_step(case: str, said: str) -> None:
    assert facts(CASES[case])["Next"].startswith(said)


def test_different_machines_send_to_one_machine() -> None:
    record = Verdict(
        verdict="not_comparable", findings=(), tolerance=0.05, reasons=("1 hard field",), fingerprint_differences=("cores: 2 -> 4",)
    )  # fmt: skip
    assert facts(record)["Next"] == "measure both sides on one machine, in one run: mlsys gate run"
    assert "cores: 2 -> 4" in printed(record)


def test_a_pass_needs_nothing() -> None:
    assert "Next" not in facts(sample.run(sample.FINDINGS[3:4], "pass"))


def test_rules_that_are_not_the_default_are_listed() -> None:
    strict = Policy(budgets=("ttft_p95<500ms",), tails="fail", counter_tolerance=0.02)
    rules = dict(content.describe(sample.run(policy=strict))[0].notes)["Rules"]
    assert rules == ("limit ttft_p95<500ms", "tails may fail the build", "counters: 2 %")
    assert "Rules" not in dict(content.describe(sample.run(policy=Policy()))[0].notes)


# ---------------------------------------------------------------- launches, pair by pair


def launch(values: list[float], pair: int | None, **more: Any) -> Launch:
    return Launch(started_s=0.0, rounds=(Round(values=tuple(values), **more),), pair=pair)


def gate_of(base: tuple[Launch, ...], cand: tuple[Launch, ...], **changes: Any) -> tuple[GateRun, Finding]:
    """Return a gate of these launches of one metric, and its finding."""
    found = sample.finding("m", **changes)
    sides = [
        Bench(measurements=(Measurement(name="m", unit=found.unit, better=found.better, parameters={}, launches=side),))
        for side in (base, cand)
    ]
    return sample.run((found,), base_bench=sides[0], cand_bench=sides[1]), found


def test_pairs_are_those_that_both_sides_have_in_order_of_time() -> None:
    base = (launch([2.0] * 3, 3), launch([1.0] * 3, 1), launch([9.0] * 3, 2))
    cand = (launch([1.1] * 3, 1), launch([3.0] * 3, 3), launch([8.0] * 3, 4))
    found = gate_launches.series(*gate_of(base, cand))
    assert found is not None
    assert found.pairs == (1, 3)
    assert found.changes == pytest.approx([0.1, 0.5])


def test_launches_without_a_number_pair_by_their_place() -> None:
    found = gate_launches.series(*gate_of((launch([1.0], None), launch([2.0], None)), (launch([1.5], None), launch([2.0], None))))
    assert found is not None
    assert found.changes == pytest.approx([0.5, 0.0])


def test_a_launch_is_drawn_by_the_number_that_decides() -> None:
    """With 20 undisturbed samples their median; a preempted one does not count."""
    quiet = launch([1.0] * 20 + [50.0], 1, involuntary=(0,) * 20 + (3,))
    found = gate_launches.series(*gate_of((quiet,), (launch([1.2] * 20, 1, involuntary=(0,) * 20),)))
    assert found is not None
    assert (found.before[0], found.after[0]) == (1.0, 1.2)


@pytest.mark.parametrize(("name", "expected"), [("m.cpu", 0.25), ("m.p99", 1.0)])
def test_cpu_time_and_tail_are_drawn_from_their_metric(name: str, expected: float) -> None:
    base = (launch([1.0] * 30, 1, cpu_s=(0.4,) * 30),)
    cand = (launch([2.0] * 30, 1, cpu_s=(0.5,) * 30),)
    record, found = gate_of(base, cand)
    derived = gate_launches.series(record, dataclasses.replace(found, name=name))
    assert derived is not None
    assert derived.changes == pytest.approx([expected])
    assert gate_launches.quantiles(derived) is None


def test_shares_of_good_requests_are_drawn_as_shares() -> None:
    """Nine of ten against eight of ten."""
    base, cand = (launch([1.0] * good + [0.0] * (10 - good), 1) for good in (9, 8))
    found = gate_launches.series(*gate_of((base,), (cand,), unit="share", better="higher"))
    assert found is not None
    assert (found.before[0], found.after[0]) == pytest.approx((0.9, 0.8))


def test_counters_and_metrics_of_one_side_are_not_drawn() -> None:
    record, found = gate_of((launch([1.0], 1),), (launch([1.0], 1),))
    assert gate_launches.series(record, dataclasses.replace(found, kind="counter")) is None
    assert gate_launches.series(record, dataclasses.replace(found, name="other")) is None
    assert gate_launches.series(*gate_of((launch([0.0], 1),), (launch([1.0], 1),))) is None


# ---------------------------------------------------------------- quantiles


def in_pairs(n: int, change: Any) -> gate_launches.Series:
    """Return n pairs whose candidate's samples are the baseline's, changed."""
    rng = np.random.default_rng(3)
    base = [np.sort(rng.lognormal(0, 0.2, 400)) for _ in range(n)]
    both = [(launch(b.tolist(), i), launch(change(b).tolist(), i)) for i, b in enumerate(base)]
    found = gate_launches.series(*gate_of(tuple(b for b, _ in both), tuple(c for _, c in both)))
    assert found is not None
    return found


def test_a_shift_is_a_level_line() -> None:
    known = gate_launches.quantiles(in_pairs(5, lambda v: 1.05 * v))
    assert known is not None
    assert known.ratios == pytest.approx(np.full(len(known.ratios), 1.05))
    assert known.low == pytest.approx(known.ratios)


def test_a_slow_tail_rises_at_its_end_alone() -> None:
    known = gate_launches.quantiles(in_pairs(5, lambda v: np.where(np.arange(len(v)) >= 380, 1.5 * v, v)))
    assert known is not None
    assert known.ratios[known.shares < 0.94] == pytest.approx(np.ones(int((known.shares < 0.94).sum())))
    assert known.ratios[-1] == pytest.approx(1.5)
    assert known.shares[-1] * 400 <= 398  # at least two samples of each launch lie beyond


def test_the_band_is_students_over_pairs() -> None:
    """Four pairs at +0, +2, +4, +6 % in logarithms: mean 3 %, sd 2.58 %, t of 3 at 95 % is 2.353."""
    base = [launch(np.linspace(1, 2, 50).tolist(), i) for i in range(4)]
    cand = [launch((np.linspace(1, 2, 50) * np.exp(0.02 * i)).tolist(), i) for i in range(4)]
    found = gate_launches.series(*gate_of(tuple(base), tuple(cand)))
    assert found is not None
    known = gate_launches.quantiles(found)
    assert known is not None
    assert known.high is not None
    half = 2.3534 * np.std([0.0, 0.02, 0.04, 0.06], ddof=1) / 2
    assert np.log(known.high) == pytest.approx(np.full(len(known.high), 0.03 + half), abs=1e-5)


def test_few_samples_or_pairs_promise_nothing() -> None:
    few = gate_launches.series(*gate_of((launch([1.0] * 9, 1),), (launch([1.0] * 9, 1),)))
    assert few is not None
    assert gate_launches.quantiles(few) is None
    lone = gate_launches.quantiles(in_pairs(2, lambda v: v))
    assert lone is not None
    assert lone.low is None


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("case", CASES)
def test_each_gate_draws_what_it_can(case: str) -> None:
    record = CASES[case]
    forest = gate_forest.forest(record.verdict, "measured")
    drawable = [f for f in record.verdict.findings if f.ratio is not None]
    assert (forest is None) == (not drawable)
    if forest is not None:
        panel = forest.axes[0]
        assert len(panel.get_yticks()) == len(drawable)
        assert "%" in panel.get_xlabel()
        low, high = panel.get_xlim()
        assert min(-low, high) > max(100 * (f.tolerance or 0.0) for f in drawable)
        assert all(len(label.get_text().splitlines()) <= 3 for label in panel.get_yticklabels())


def test_no_picture_of_a_gate_overlaps_itself_or_leaves_its_page() -> None:
    """Labels, rows and what stands beside them keep apart, also with twenty metrics of long names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    page = gate_forest.forest(CASES["twenty with long names"].verdict, "measured")
    assert page is not None
    FigureCanvasAgg(page).draw()  # type: ignore[no-untyped-call]
    panel = page.axes[0]
    boxes = [t.get_window_extent() for t in panel.get_yticklabels()]
    assert all(not a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    frame = panel.get_window_extent()
    assert all(box.x1 <= frame.x0 and box.x0 >= 0 for box in boxes)
    beside = [t.get_window_extent() for t in panel.texts]
    assert all(box.x0 >= frame.x1 and box.x1 <= page.bbox.x1 for box in beside)


def test_launches_and_quantiles_name_their_units() -> None:
    page = gate_pictures.launches(CASES["usual"], "measured")
    assert page is not None
    assert [axes.get_ylabel() for axes in page.axes] == ["ms", "change, %", "ms", "change, %", "requests/s", "change, %", "GB", "change, %"]
    curves = gate_pictures.quantiles(CASES["usual"], "measured")
    assert curves is not None
    assert {axes.get_ylabel() for axes in curves.axes} == {"change, %"}


def test_one_pair_is_one_dot() -> None:
    page = gate_pictures.launches(CASES["one pair"], "measured")
    assert page is not None
    assert [np.size(line.get_xdata()) for line in page.axes[0].lines] == [1, 1]


def test_what_equal_programs_differ_by_stands_against_the_tolerance() -> None:
    record = sample.calibration()
    page = gate_pictures.same(record, "measured")
    assert page is not None
    dots = [line for line in page.axes[0].lines if line.get_marker() == "o"]
    assert [np.size(line.get_xdata()) for line in dots] == [20, 20, 20]
    widths = [np.ptp(np.asarray(line.get_xdata())) for line in dots]
    assert widths == sorted(widths, reverse=True)  # the noisiest on top
    assert gate_pictures.same(sample.calibration(resolutions=()), "measured") is None


def test_dots_that_would_cover_each_other_stand_on_one_another() -> None:
    heights = gate_pictures._stacked(np.array([0.0, 0.0, 0.0, 5.0]), 10.0)
    assert len(set(heights[:3])) == 3
    assert heights[:3].mean() == pytest.approx(0.0)
    assert heights[3] == 0.0


def test_pictures_stand_in_the_page_and_hostile_names_stay_text() -> None:
    hostile = '<script>alert(1)</script>" onload="x| $b$ `'
    subject = dataclasses.replace(sample.run().base, label=hostile)
    record = sample.run((sample.finding(hostile, reason=hostile),), base=subject, cand=subject)
    text = html.render([(hostile, head(record), record)])
    assert text.count('<img src="data:image/svg+xml;base64,') == 3  # forest, launches, quantiles
    assert "<script" not in text
    assert 'onload="x' not in text
    assert not re.search(r"(?<!\\)<script", markdown.render(items(record)))


def test_each_kind_has_its_pictures() -> None:
    drawn = pictures.draw(items(sample.calibration({"m": 0.02}), sample.verdict()))
    assert drawn is not None
    assert [p.kind for p in drawn] == ["gate-calibration"] * 2 + ["verdict"]
    assert all(p.caption for p in drawn)


def test_a_slide_of_each_kind_is_a_png(tmp_path: Path) -> None:
    slides: dict[str, Record] = {"run": CASES["one metric"], "calibration": sample.calibration({"m": 0.02}), "verdict": sample.verdict()}
    for name, record in slides.items():
        data = report.write_png(tmp_path / f"{name}.png", items(record)).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert name != "run" or (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (1920, 1080)


def test_a_slide_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="nothing to draw"):
        gate_slides.write_png(tmp_path / "x.png", CASES["not comparable"])
