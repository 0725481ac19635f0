"""What CI systems read of a verdict: JUnit XML, Markdown, annotations, values for trackers."""

from __future__ import annotations

import html.parser
import itertools
import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.gate import writers
from mlsys_bench.gate.writers import markdown, parts
from mlsys_bench.journeys.gating.outputs import Outputs, check, write, write_failure
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round
from mlsys_bench.verdicts import Contention, Finding, GateRun, Policy, Subject, Verdict, Word
from tests import sample_gates as sample

MLSYS = str(Path(sysconfig.get_path("scripts")) / "mlsys")
GOLDEN = Path(__file__).parent / "golden" / "gate_writers"
REASONS: dict[str, str] = {
    "regression": "7 launch pairs, launch sd 1.2 %", "not_comparable": "holds no samples", "suspect": "single launch",
    "inconclusive": "too noisy for 5 %", "improved": "7 launch pairs", "pass": "7 launch pairs",
}  # fmt: skip


def finding(name: str = "engine.step", verdict: Word = "pass", ratio: float | None = 1.0, **changes: Any) -> Finding:
    """Return a finding of 10 ms before and `ratio` times that after."""
    told: dict[str, Any] = {
        "name": name, "parameters": {}, "unit": "s", "better": "lower", "baseline": 0.01,
        "candidate": None if ratio is None else 0.01 * ratio, "ratio": ratio, "verdict": verdict,
        "interval": None if ratio is None else (ratio - 0.01, ratio + 0.01),
        "reason": REASONS[verdict],
    }  # fmt: skip
    return Finding(**(told | changes))


def verdict(*findings: Finding, word: Word | None = None, **changes: Any) -> Verdict:
    """Return a verdict as the worst of its findings."""
    order = ("regression", "not_comparable", "suspect", "inconclusive", "improved", "pass")
    worst: Any = word or next(w for w in order if any(f.verdict == w and f.may_fail for f in findings))
    told: dict[str, Any] = {"verdict": worst, "findings": findings, "tolerance": 0.05, "reasons": ()}
    return Verdict(**(told | changes))


EVERY = verdict(
    finding("planner.plan", "pass", 1.004, parameters={"fleet": "chat", "qps": 200}),
    finding("engine.step", "regression", 1.062, parameters={"decode_seqs": 8, "precision": "bf16"}),
    finding("engine.step", "regression", 1.118, parameters={"decode_seqs": 32, "precision": "bf16"}),
    finding("memory.peak", "regression", 1.2, unit="bytes", baseline=2.0e9, candidate=2.4e9, may_fail=False),
    finding("stream.copy", "improved", 1.09, unit="bytes/s", better="higher", baseline=40e9, candidate=43.6e9),
    finding("ttft", "inconclusive", 1.03, reason="p99 of 800 requests; needs 1,000"),
    finding("loadtest.send", "suspect", 1.3),
    finding("loss", "not_comparable", None, reason="the baseline is in nats, the candidate in bits"),
    finding("new.kernel", "not_comparable", None, baseline=None, candidate=0.002, reason="new: not in the baseline"),
    reasons=("2 regression, 1 not comparable, 1 suspect, 1 inconclusive, 1 improved, 1 pass",),
)


def run(found: Verdict = EVERY, **changes: Any) -> GateRun:
    """Return the record of a gate that said this after 3 pairs of launches."""
    launches = tuple(Launch(started_s=float(i), rounds=(Round(values=(0.01,)),), pair=i + 1) for i in range(3))
    bench = Bench(
        measurements=(Measurement(name="engine.step", unit="s", better="lower", parameters={}, launches=launches),)
    )  # fmt: skip
    here = Machine(hard={}, soft={})
    told: dict[str, Any] = {
        "base": Subject(kind="ref", label="main", commit="a" * 40), "cand": Subject(kind="ref", label="b" * 40, commit="b" * 40),
        "base_bench": bench, "cand_bench": bench, "base_machine": here, "cand_machine": here, "policy": Policy(), "conditions": (),
        "contention": Contention(verdict="contended", reasons=("others used 31 % of the machine",)), "ended": "last_look", "wall_s": 47.61,
        "verdict": found,
    }  # fmt: skip
    return GateRun(**(told | changes))


def golden(name: str, text: str) -> str:
    """Return the golden text of this name; MLSYS_UPDATE_GOLDEN=1 writes it anew."""
    path = GOLDEN / name
    if os.environ.get("MLSYS_UPDATE_GOLDEN"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return path.read_text(encoding="utf-8")


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)


# ---------------------------------------------------------------- JUnit XML

# junit-10.xsd of Jenkins' xunit plugin: attributes (required ones in capitals), and what may stand inside
RULES: dict[str, tuple[str, str]] = {
    "testsuites": ("name time tests failures errors", "testsuite"),
    "testsuite": (
        "NAME TESTS FAILURES ERRORS group time skipped timestamp hostname id package file log url",
        "testsuite properties testcase system-out system-err",
    ),
    "properties": ("", "property"),
    "property": ("NAME VALUE", ""),
    "testcase": ("NAME time classname group", "skipped error failure system-out system-err"),
    "failure": ("type message", ""),
    "error": ("type message", ""),
    "skipped": ("type message", ""),
    "system-out": ("", ""),
}
SUREFIRE_TIME = re.compile(r"(([0-9]{0,3},)*[0-9]{3}|[0-9]{0,3})*(\.[0-9]*)?")


def checked(text: str) -> ElementTree.Element:
    """Return JUnit XML after holding it against the schema's rules and its own counts."""
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    for element in root.iter():
        attributes, children = RULES[element.tag]
        assert set(element.attrib) <= set(attributes.lower().split()), element.tag
        assert {a.lower() for a in attributes.split() if a.isupper()} <= set(element.attrib), element.tag
        assert {child.tag for child in element} <= set(children.split()), element.tag
        assert SUREFIRE_TIME.fullmatch(element.get("time", ""))
    for suite in root.iter("testsuite"):
        counts = {"tests": "testcase", "failures": "testcase/failure", "errors": "testcase/error", "skipped": "testcase/skipped"}
        assert {key: len(suite.findall(path)) for key, path in counts.items()} == {key: int(suite.get(key, "-1")) for key in counts}
        names = [(case.get("classname"), case.get("name")) for case in suite.findall("testcase")]
        assert len(set(names)) == len(names), "GitLab drops test cases of the same name"
    return root


def cases(text: str) -> dict[str, str]:
    """Return test case -> its element, 'system-out' for those that passed."""
    return {str(case.get("name")): next(child.tag for child in case) for case in checked(text).iter("testcase")}


def test_junit_is_as_the_golden_file_says() -> None:
    text = writers.junit(run())
    checked(text)
    assert text == golden("junit.xml", text)


def test_a_regression_fails_a_broken_measurement_errs_and_the_undecided_is_skipped() -> None:
    told = cases(writers.junit(EVERY))
    assert told["engine.step (decode_seqs=8, precision=bf16)"] == "failure"
    assert told["loss"] == "error"
    assert {told[name] for name in ("ttft", "loadtest.send", "memory.peak", "new.kernel")} == {"skipped"}
    assert {told[name] for name in ("planner.plan (fleet=chat, qps=200)", "stream.copy")} == {"system-out"}


def test_failures_say_regression_as_their_type() -> None:
    types = {element.get("type") for element in checked(writers.junit(EVERY)).iter("failure")}
    assert types == {"regression"}


@pytest.mark.parametrize(
    ("word", "element"),
    [("not_comparable", "error"), ("regression", "failure"), ("suspect", "skipped"), ("inconclusive", "skipped"), ("pass", "system-out")],
)
def test_a_verdict_without_findings_is_a_test_case_of_its_own(word: Word, element: str) -> None:
    """A reader of the test cases alone must not see a pass where there is none."""
    assert cases(writers.junit(verdict(word=word, reasons=("other CPUs",)))) == {"verdict": element}


def test_a_verdict_worse_than_its_findings_is_told_too() -> None:
    """For instance after a second batch of launches was asked for and not measured."""
    told = cases(writers.junit(verdict(finding(verdict="pass"), word="inconclusive")))
    assert told == {"engine.step": "system-out", "verdict": "skipped"}


@settings(max_examples=60)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_any_name_and_reason_gives_valid_xml_that_holds_it(name: str, parameter: str, reason: str) -> None:
    found = finding(name, "regression", 1.1, parameters={"p": parameter}, reason=reason)
    case = next(checked(writers.junit(verdict(found), name)).iter("testcase"))
    seen = str(case.get("name"))
    allowed = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", "\ufffd", parts.label(found))
    assert seen == allowed


# ---------------------------------------------------------------- Markdown


class Page(html.parser.HTMLParser):
    """The rows of the tables of a page, the codes in it, its text, and the text outside of code."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.codes: list[str] = []
        self.tags: list[str] = []
        self.text = self.prose = ""
        self.open: list[str] = []
        self.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text))
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        """Begin a row, a cell or code."""
        self.tags.append(tag)
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag == "code":
            self.codes.append("")

    def handle_endtag(self, tag: str) -> None:
        """End an element."""
        self.open.remove(tag)

    def handle_data(self, data: str) -> None:
        """Keep text where it stands."""
        self.text += data
        if "code" in self.open:
            self.codes[-1] += data
        else:
            self.prose += data
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data


def test_the_comment_is_as_the_golden_file_says() -> None:
    text = writers.comment(run())
    assert text == golden("comment.md", text)


def test_the_comment_starts_with_its_hidden_marker_and_shows_the_worst_first() -> None:
    text = writers.comment(EVERY, "kernels")
    assert text.splitlines()[0] == "<!-- mlsys-gate: kernels -->"
    names = [row[1] for row in Page(text).rows if row[1] != "metric"]
    worst = ["engine.step (decode_seqs=32, precision=bf16)", "engine.step (decode_seqs=8, precision=bf16)", "loss", "loadtest.send", "ttft"]
    assert names[:5] == worst
    assert names[5:] == ["memory.peak", "stream.copy (more is better)", "planner.plan (fleet=chat, qps=200)", "new.kernel"]


def test_what_passed_is_folded_and_what_failed_is_not() -> None:
    shown, _, folded = writers.comment(EVERY).partition("<details>")
    assert "memory.peak" in shown
    assert "planner.plan" not in shown
    assert "stream.copy" in folded.partition("</details>")[0]


def test_a_gate_that_measured_says_what_how_long_and_what_disturbed_it() -> None:
    page = Page(writers.comment(run()))
    assert "main (aaaaaaaaaa) → bbbbbbbbbb · 3 launch pairs · 48 s · contended (others used 31 % of the machine)" in page.text
    assert "stopped by hand" in Page(writers.comment(run(ended="interrupted"))).text


@settings(max_examples=60)
@given(ANY_TEXT | st.text("a_*`|:~$[]()<>&#@- 1.\\", min_size=1, max_size=40), ANY_TEXT)
def test_any_name_is_shown_as_it_is_and_breaks_no_table(name: str, reason: str) -> None:
    found = finding(name, "regression", 1.1, reason=reason)
    page = Page(writers.comment(verdict(found, finding("other", "suspect"), reasons=(reason,)), name))
    shown = " ".join(parts.label(found).replace("\x00", "\ufffd").split())
    assert [len(row) for row in page.rows] == [6, 6, 6]
    assert page.rows[1][1] == (shown if len(shown) <= 160 else shown[:159] + "…")
    assert not re.search(r":[\w+-]+:", writers.comment(verdict(found)).partition("-->")[2]), "GitHub would draw an emoji"
    assert set(page.tags) <= {"h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "details", "summary", "ul", "li"}


@settings(max_examples=60)
@given(st.text("@#abc1 ", min_size=1, max_size=30))
def test_nobody_is_mentioned_and_no_issue_linked(reason: str) -> None:
    """GitHub links @name and #1 in text, not in code."""
    page = Page(writers.comment(verdict(finding("@team/a#1", "suspect", reason=reason), reasons=(reason,))))
    assert not re.search(r"@\w|#\d", page.prose)
    assert "@team/a#1" in page.codes


def many(n: int) -> Verdict:
    """Return a verdict with one regression, one suspect and so many passes, names long."""
    found = [finding(f"kernels.{'x' * 90}.{i:05}", "pass", 1 + i * 1e-6) for i in range(n)]
    return verdict(*found, finding("slow", "regression", 1.5), finding("odd", "suspect", 1.2))


def test_a_comment_never_exceeds_what_github_takes_and_says_what_is_left_out() -> None:
    found = many(1000)
    text = writers.comment(found)
    rows = [row for row in Page(text).rows if row[1] != "metric"]
    assert len(text) <= 65_536 - 1_000
    assert [row[1] for row in rows[:2]] == ["slow", "odd"]
    assert f"{1002 - len(rows)} more metrics are not shown for want of room ({1002 - len(rows)} pass)" in Page(text).text
    assert len(text) > 60_000, "as many as fit"


def test_a_step_summary_holds_more_than_a_comment_and_never_more_than_a_mebibyte() -> None:
    found = many(6000)
    text = writers.step_summary(found)
    assert 900_000 < len(text.encode()) <= 2**20
    assert "mlsys-gate:" not in text


def test_reasons_without_end_do_not_make_a_comment_too_long() -> None:
    found = verdict(
        *(finding(f"m{i}", "inconclusive", reason=f"{i} " + "why " * 5000) for i in range(300)), reasons=("because " * 20_000,) * 50
    )
    text = writers.comment(found)
    assert len(text) <= 65_536
    assert "and 281 more" in text.rpartition("<details>")[2]


def test_a_thousand_metrics_with_one_reason_do_not_make_a_comment_too_long() -> None:
    found = verdict(*(finding("x" * 150 + str(i), "inconclusive", reason="too noisy") for i in range(1000)))
    text = writers.comment(found)
    assert len(text) <= 65_536
    assert "and 992 more: too noisy" in text
    assert max(map(len, writers.annotated(found))) < 40_000


@pytest.mark.parametrize("name", ["a --> b", "a<!--b", "x\n# y", "--", "-->" * 3])
def test_a_marker_stays_one_comment_in_one_line(name: str) -> None:
    line = markdown.marker(name)
    inner = line.removeprefix("<!-- ").removesuffix(" -->")
    assert "\n" not in line
    assert "--" not in inner
    assert "<" not in inner
    assert ">" not in inner


# ---------------------------------------------------------------- annotations


def parsed(line: str) -> tuple[str, dict[str, str], str]:
    """Return command, properties and message as GitHub's runner reads a line."""
    assert line.startswith("::")
    head, _, data = line[2:].partition("::")
    name, _, told = head.partition(" ")
    properties = dict(item.split("=", 1) for item in told.split(","))
    for code, char in (("%3A", ":"), ("%2C", ","), ("%0D", "\r"), ("%0A", "\n"), ("%25", "%")):
        properties = {key: value.replace(code, char) for key, value in properties.items()}
        data = data.replace(code, char) if char not in ":," else data
    return name, properties, data


def test_annotations_are_one_for_each_slower_benchmark_and_one_for_each_other_trouble() -> None:
    lines = [parsed(line) for line in writers.annotated(EVERY)]
    told = [(level, told["title"]) for level, told, _ in lines]
    assert told == [
        ("error", "mlsys gate: regression in engine.step"),
        ("error", "mlsys gate: not comparable in 1 metric"),
        ("warning", "mlsys gate: suspect in 1 metric"),
        ("warning", "mlsys gate: inconclusive in 1 metric"),
        ("warning", "mlsys gate: reported-only regression in 1 metric"),
    ]
    assert (
        lines[0][2]
        .splitlines()[0]
        .startswith("engine.step (decode_seqs=32, precision=bf16): 10.0 ms -> 11.2 ms, +11.8 % (+10.8 to +12.8 %)")
    )


def test_nothing_is_annotated_when_all_pass() -> None:
    assert writers.annotated(verdict(finding(), finding("b", "improved", 0.9))) == ()


def test_sides_that_cannot_be_compared_are_annotated_with_what_differs() -> None:
    found = verdict(word="not_comparable", reasons=("1 hard field differs",), fingerprint_differences=("torch: 2.6 -> 2.7",))
    assert [parsed(line) for line in writers.annotated(found)] == [
        ("error", {"title": "mlsys gate: not comparable"}, "1 hard field differs\ntorch: 2.6 -> 2.7")
    ]


def test_github_shows_ten_annotations_a_step_so_there_are_never_more() -> None:
    lines = writers.annotated(verdict(*(finding(f"b{i:02}", "regression", 1.1 + i / 100) for i in range(25))))
    assert len(lines) == 10
    assert parsed(lines[-1])[1]["title"] == "mlsys gate: 16 more metrics"
    assert all(f"b{i:02}" in "".join(lines) for i in range(25))


@settings(max_examples=60)
@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_whatever_a_name_holds_an_annotation_is_one_line_that_says_it(name: str, label: str, reason: str) -> None:
    (line,) = writers.annotated(verdict(finding(name, "regression", 1.1, reason=reason)), label)
    assert "\n" not in line
    assert "\r" not in line
    level, told, message = parsed(line)
    assert level == "error"
    assert told == {"title": f"{label}: regression in {name}"}
    assert message.startswith(f"{name}: ")
    assert message.endswith(reason)


# ---------------------------------------------------------------- trackers

BMF = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {
            "type": "object",
            "properties": {name: {"type": "number"} for name in ("value", "lower_value", "upper_value")},
            "required": ["value"],
            "additionalProperties": False,
        },
    },
}  # as bencher.dev/bmf.json says, and no other keys
CUSTOM = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {"value": {"type": "number"}, **{name: {"type": "string"} for name in ("name", "unit", "range", "extra")}},
        "required": ["name", "unit", "value"],
        "additionalProperties": False,
    },
}  # as the README of github-action-benchmark says


def test_bencher_gets_latency_in_nanoseconds_throughput_and_the_rest_by_unit() -> None:
    document = json.loads(writers.bmf(EVERY))
    jsonschema.validate(document, BMF)
    step = document["engine.step (decode_seqs=8, precision=bf16)"]["latency"]
    assert step["value"] == pytest.approx(10.62e6)
    assert step["lower_value"] == pytest.approx(10.52e6)
    assert step["upper_value"] == pytest.approx(10.72e6)
    assert document["stream.copy"]["throughput"]["value"] == 43.6e9
    assert document["memory.peak"]["bytes"]["value"] == 2.4e9
    assert document["new.kernel"] == {"latency": {"value": pytest.approx(2e6)}}
    assert "loss" not in document


def test_bencher_takes_names_of_1024_characters_so_longer_ones_are_cut_and_kept_apart() -> None:
    names = ["x" * 1100 + end for end in "ab"]
    document = json.loads(writers.bmf(verdict(*(finding(name) for name in names))))
    assert len(document) == 2
    assert max(map(len, document)) == 1024


def test_what_is_better_when_bigger_is_kept_apart_and_never_inverted() -> None:
    small, big = (json.loads(text) for text in (writers.smaller_is_better(EVERY), writers.bigger_is_better(EVERY)))
    jsonschema.validate(small, CUSTOM)
    jsonschema.validate(big, CUSTOM)
    assert [(entry["name"], entry["unit"], entry["value"]) for entry in big] == [("stream.copy", "bytes/s", 43.6e9)]
    assert len(small) == 7
    assert small[0]["range"] == "0.01108 to 0.01128"


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([8, "8", 8.0, True, None])), max_size=8))
def test_no_two_metrics_share_a_name(metrics: list[tuple[str, Any]]) -> None:
    """Parameters that print alike, or the same metric judged in two ways, must not overwrite each other."""
    kinds = itertools.cycle(("relative", "tail", "counter"))
    found = [finding(name, parameters={"p": value}, kind=kind) for (name, value), kind in zip(metrics, kinds, strict=False)]
    names = parts.labels(found)
    assert len(set(names)) == len(found)
    assert len(json.loads(writers.bmf(verdict(*found, word="pass")))) == len(found)


# ---------------------------------------------------------------- files


def test_files_that_were_asked_for_are_written_and_the_step_summary_where_github_has_one(tmp_path: Path) -> None:
    asked = Outputs(
        junit=tmp_path / "new" / "junit.xml", comment=tmp_path / "comment.md", bmf=tmp_path / "bmf.json",
        smaller=tmp_path / "smaller.json", annotations=True, label="kernels",
    )  # fmt: skip
    summary = tmp_path / "summary.md"
    summary.write_text("what an earlier command said\n")
    lines = write(run(), asked, {"GITHUB_STEP_SUMMARY": str(summary)})
    assert asked.junit is not None
    checked(asked.junit.read_text())
    assert (tmp_path / "comment.md").read_text() == writers.comment(run(), "kernels")
    assert summary.read_text() == "what an earlier command said\n\n" + writers.step_summary(run(), "kernels")
    assert lines[:5] == writers.annotated(run(), "kernels")
    assert lines[5:] == (
        "smaller.json leaves out 1 metric(s) of which higher is better; --bigger-is-better FILE writes them",
        "wrote the summary of this step (GITHUB_STEP_SUMMARY is set)",
    )


def test_a_gate_without_a_verdict_replaces_what_an_earlier_run_left(tmp_path: Path) -> None:
    """Else a comment that says passed would stand beside a build that failed."""
    asked = Outputs(junit=tmp_path / "junit.xml", comment=tmp_path / "c.md", bmf=tmp_path / "bmf.json", annotations=True, label="kernels")
    summary = tmp_path / "summary.md"
    lines = write_failure(MeasurementFailed("engine.decode: died (exit 1): no <b>space</b>"), asked, {"GITHUB_STEP_SUMMARY": str(summary)})
    assert cases((tmp_path / "junit.xml").read_text()) == {"measurement": "error"}
    text = (tmp_path / "c.md").read_text()
    assert text.splitlines()[0] == markdown.marker("kernels")
    assert "kernels: failed" in Page(text).text
    assert "engine.decode: died (exit 1): no <b>space</b>" in Page(text).text
    assert parsed(lines[0])[1:] == ({"title": "kernels: failed"}, "engine.decode: died (exit 1): no <b>space</b>")
    assert summary.read_text() == "\n" + writers.failure("engine.decode: died (exit 1): no <b>space</b>", "kernels")
    assert not (tmp_path / "bmf.json").exists(), "no value is better than a wrong one"


def test_gate_compare_leaves_a_report_of_what_it_could_not_read(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("")
    done = subprocess.run(
        [MLSYS, "gate", "compare", "empty.json", "empty.json", "--junit", "junit.xml", "--annotations"],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"GITHUB_STEP_SUMMARY": ""},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines()[0].startswith("::error title=mlsys gate%3A failed::empty.json")
    assert cases((tmp_path / "junit.xml").read_text()) == {"measurement": "error"}


def test_two_gates_in_one_step_have_two_headings_in_its_summary(tmp_path: Path) -> None:
    summary = tmp_path / "summary.md"
    for label in ("kernels", "server"):
        write(EVERY, Outputs(label=label), {"GITHUB_STEP_SUMMARY": str(summary)})
    assert Page(summary.read_text()).tags.count("h3") == 2


def test_nothing_is_written_that_was_not_asked_for(tmp_path: Path) -> None:
    assert write(EVERY, Outputs(), {}) == ()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="it is a folder"):
        check(Outputs(junit=tmp_path))


def test_a_comment_says_that_a_working_tree_had_changes() -> None:
    run = sample.run(cand=Subject(kind="ref", label=".", commit="b" * 40 + "-dirty"))
    assert f". ({'b' * 10}-dirty)" in writers.comment(run)


def test_a_comment_counts_only_what_passed_as_within_the_tolerance() -> None:
    found = (sample.finding("a", "pass", 0.0), sample.finding("b", "inconclusive", 0.02, may_fail=False))
    text = writers.comment(sample.run(found, "pass"))
    assert "1 of 2 metrics within a tolerance of" in text
    assert "inconclusive, reported only" in text


def test_what_is_only_reported_and_undecided_is_no_annotation() -> None:
    """A warning on a build for what may never fail it is noise."""
    quiet = sample.finding("command.wall.cpu", "inconclusive", 0.02, may_fail=False)
    assert writers.annotated(sample.run((sample.finding(verdict="pass", change=0.0), quiet), "pass")) == ()
