"""A load test as people read it: terminal, page, picture; and the same of repeated runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from mlsys_bench import loadtest, record, report, slo, summary
from mlsys_bench.errors import BadInput, NothingYet, RecordError
from mlsys_bench.journeys import load
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.report import content, courses, load_pictures, pictures, repeats, terminal
from mlsys_bench.types import LoadTest, RequestRecord, Requests, Validity
from tests.sample_records import head, machine
from tests.synthetic_runs import decaying, station

needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")


DEGRADED = Validity(verdict="degraded", reasons=("2.5 % of the requests failed: that much", "a second remark"))


def measured(seed: int = 0, load: float = 0.7, limits: str = "ttft_p99<500ms,e2e_p95<1s") -> LoadTest:
    """Return a minute of 20 requests/s against an M/M/4 station, every 40th of which fails."""
    run = station(np.random.default_rng(seed), 20, 60, 4, load * 4 / 20)
    failed = np.arange(len(run)) % 40 == 0
    settled = summary.settled(run, duration_s=60.0, warmup_s=None)
    counted = dataclasses.replace(
        run,
        outcome=np.where(failed, summary.columns.OUTCOMES.index("timeout"), 0),
        in_window=run.scheduled_s >= settled.warmup_s,
        sent_s=run.scheduled_s + 2e-4,
    )
    return summary.summarise(
        counted, source="loadtest", target="http://127.0.0.1:8000 (nano)", arrivals="poisson", offered_rate_per_s=20.0,
        slo=slo.parse(limits), validity=DEGRADED, window=(settled.warmup_s, 60.0), steadiness=settled,
    )  # fmt: skip


def printed(found: record.Record, width: int) -> str:
    out = io.StringIO()
    terminal.show(found, Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_a_load_test_fits_the_terminal_and_says_what_matters_first(width: int) -> None:
    text = printed(measured(), width)
    assert max(map(len, text.splitlines())) <= width
    top = " ".join(" ".join(text.splitlines()[:14]).split())
    for words in ("degraded", "20.0/s asked", "timeout", "prompt tokens/s", "and 1 remark more below", "/s for each user"):
        assert words in top, words


def test_the_table_shows_service_beside_latency_and_the_formulas_of_both() -> None:
    text = printed(measured(), 120)
    rows = ("TTFT  ", "TPOT", "ITL", "E2E  ", "service", "sent")
    first = [line.split()[0] for line in text.splitlines() if line.startswith(rows)][:7]
    assert first == ["TTFT", "TPOT", "ITL", "E2E", "service", "service", "sent"]
    assert "service_s = last token - own send" in " ".join(text.split())
    assert "worth" in text  # requests of a queue are worth fewer


def test_the_course_is_drawn_in_characters_with_the_window_below() -> None:
    lines = courses.drawing(measured())
    assert [line.split()[0] for line in lines[:3]] == ["offered", "completed", "failed"]
    assert "what counts" in lines[-1]
    assert max(map(len, lines)) <= 80
    assert set("".join(lines)) & set("▁▂▃▄▅▆▇█")


def test_the_window_in_the_drawing_lies_below_the_steps_it_names() -> None:
    """A run of 61 steps in 56 characters: the warm-up ends where the bars of its end stand, to a character."""
    found = measured()
    assert found.timeline is not None
    course = dataclasses.replace(found.timeline, window_s=(30.0, 60.0))
    line = courses.drawing(dataclasses.replace(found, timeline=course))[-1]
    characters = len(courses.drawing(found)[0].rstrip().rsplit(" ", 1)[0].rstrip()) - 14
    expected = 14 + 30.0 / (len(course.offered) * course.step_s) * characters
    assert abs(line.index("└") - expected) <= 1.5


def test_a_terminal_without_unicode_gets_plain_characters() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    terminal.show(measured(), Console(file=out, width=100, force_terminal=False))
    out.flush()
    text = raw.getvalue().decode("ascii")
    assert "?" not in "".join(line for line in text.splitlines() if line.startswith(("offered", "completed")))


def test_runs_are_dots_between_the_lowest_and_the_highest() -> None:
    assert repeats.strip([1.0, 2.0, 3.0]) == "●" + "·" * 11 + "●" + "·" * 10 + "●"
    assert repeats.strip([1.0, 1.0, 2.0]) == "2" + "·" * 22 + "●"
    assert repeats.strip([5.0]) == "●" + "·" * 23


def test_repeats_read_as_one_answer_then_a_run() -> None:
    together = summary.repeated([measured(seed) for seed in range(3)], range(3))
    text = printed(together, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "3 runs" in text.splitlines()[0]
    assert "standard deviation between runs" in text
    assert "seeds 0, 1, 2" in text
    assert "run 2: 2.5 % of the requests failed" in " ".join(text.split())
    assert [section.kind for section in content.describe(together)] == ["loadtests", "loadtest"]


@needs_matplotlib
def test_the_page_of_a_load_test_has_its_pictures_and_figures(tmp_path: Path) -> None:
    found = measured()
    page = report.write_html(tmp_path / "run.html", [("run.json", head(found), found)]).read_text()
    assert page.count("data:image/svg+xml") == 3
    assert 'class="tile"' in page
    assert "http://" not in page.replace("http://127.0.0.1:8000", "").replace("http://www.w3.org", "")


@needs_matplotlib
def test_pictures_stand_whatever_is_missing(tmp_path: Path) -> None:
    """No answer of two tokens, no limits, no failures, a single step."""
    run = decaying(np.random.default_rng(0), 0.0, 0.0, 5.0)
    bare = summary.summarise(
        run.where(np.arange(len(run)) < 3), source="loadtest", target="t", arrivals="constant", offered_rate_per_s=None, slo=None,
        validity=Validity(verdict="invalid"), window=(0.0, 1.0),
    )  # fmt: skip
    for found in (dataclasses.replace(bare, timeline=None, curves={}), summary.repeated([bare], [0])):
        assert report.write_png(tmp_path / "run.png", [("", head(found), found)]).stat().st_size > 1000
    drawn = pictures.draw([("run.json", head(bare), bare)])
    assert drawn is not None
    assert [picture.kind for picture in drawn] == ["loadtest"] * 3


@needs_matplotlib
def test_a_picture_for_a_slide_is_a_png_of_sixteen_to_nine(tmp_path: Path) -> None:
    found = measured()
    data = report.write_png(tmp_path / "run.png", [("", head(found), found)]).read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1920, 1080)


@needs_matplotlib
def test_a_limit_beyond_what_the_sample_can_say_stays_inside_its_panel() -> None:
    """A label outside the axes made the layout shrink the panel to half, and legends lay on each other."""
    found = measured(limits="e2e_p99.9<9s")
    assert found.e2e_s.p999 is None
    right = load_pictures.slide(dataclasses.replace(found, timeline=None))
    ladder = right.axes[0]
    assert "p99.9" in [label.get_text() for label in ladder.get_xticklabels()]
    assert ladder.get_xlim()[1] > 3  # three nines


def test_the_top_of_a_page_of_repeated_runs_is_of_all_runs() -> None:
    runs = [measured(seed) for seed in range(3)]
    section = repeats.repeats(summary.repeated(runs, range(3)))
    rate = sum(run.request_rate_per_s for run in runs) / 3
    assert section.tiles[0][:2] == ("Throughput, mean of runs", f"{rate:.1f}/s")
    assert all(tile[2] for tile in section.tiles), "each has its interval"


def test_repeats_stopped_before_an_answer_keep_the_runs_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done = measured()
    ran: list[int] = []

    def run(plan: loadtest.Options, *_: object) -> tuple[LoadTest, Requests]:
        ran.append(plan.seed)
        if len(ran) > 1:
            raise NothingYet("stopped after 0.0 s: nothing was answered yet")
        return done, Requests(t0_unix_s=0.0, requests=())

    monkeypatch.setattr(loadtest, "run", run)
    found = load.run(loadtest.Options(url="http://127.0.0.1:9", qps=1.0), out=tmp_path / "r.json", quiet=True, repeats=3)
    assert isinstance(found, LoadTests)
    assert found.runs == (done,)
    assert ran == [0, 1]
    assert (tmp_path / "r.json").is_file()
    ran.append(2)
    with pytest.raises(NothingYet):
        load.run(loadtest.Options(url="http://127.0.0.1:9", qps=1.0), out=None, quiet=True, repeats=3)


def test_a_picture_of_nothing_and_a_table_of_nothing_are_refused(tmp_path: Path) -> None:
    empty = Requests(t0_unix_s=0.0, requests=())
    with pytest.raises(BadInput, match="load test"):
        report.write_png(tmp_path / "x.png", [("", head(empty), empty)])
    found = measured()
    with pytest.raises(BadInput, match="requests"):
        report.write_csv(tmp_path / "x.csv", [("", head(found), found)])
    assert report.write_csv(tmp_path / "x.csv", [("", head(empty), empty)]).read_text().startswith("index,tenant")


def test_markdown_holds_the_course_as_text(tmp_path: Path) -> None:
    found = measured()
    text = report.write_markdown(tmp_path / "run.md", [("run.json", head(found), found)]).read_text()
    assert "what counts" in text
    assert "| service E2E |" in text.replace("**", "")
    assert machine().hard["cpu_model"] in text  # type: ignore[operator]


def test_p99_9_of_a_limit_is_the_figure_that_was_seen() -> None:
    """20,000 requests: the limit on p99.9 shows the value and its verdict, not a dash."""
    rng = np.random.default_rng(0)
    run = station(rng, 400, 60, 64, 0.1)
    found = summary.summarise(
        run, source="loadtest", target="t", arrivals="poisson", offered_rate_per_s=400.0, slo=slo.parse("ttft_p99.9<10s"),
        validity=Validity(verdict="valid"), window=(0.0, 60.0),
    )  # fmt: skip
    assert found.ttft_s.p999 is not None
    assert found.slo_met == {"ttft_p99.9": True}
    row = next(line for line in printed(found, 100).splitlines() if line.startswith("ttft_p99.9"))
    assert "—" not in row
    assert "ms" in row


def test_what_stands_beside_a_limit_is_what_it_was_held_against() -> None:
    """400 answers of 100 to 499 ms: with 40 that failed p50 is the 55th percentile of the answered and p95 is lost; p97 is no dash."""
    order = np.random.default_rng(2).permutation(400).tolist()
    rows = [
        RequestRecord(index=i, scheduled_s=float(i), token_s=(i + 0.1 + at / 1000,), tokens_per_event=(1,)) for i, at in enumerate(order)
    ]
    failed = [RequestRecord(index=i, scheduled_s=i + 0.5, done_s=i + 0.6, outcome="timeout") for i in range(0, 400, 10)]
    waiting = [RequestRecord(index=i, scheduled_s=i + 0.7, done_s=i + 30.0, outcome="unfinished") for i in (50, 150, 250, 350)]

    def seen(limits: str, *records: RequestRecord) -> str:
        found = summary.summarise(
            records, source="loadtest", target="t", arrivals="poisson", offered_rate_per_s=1.0, slo=slo.parse(limits),
            validity=Validity(verdict="valid"), window=(0.0, 400.0),
        )  # fmt: skip
        return next(line for line in printed(found, 100).splitlines() if line.startswith(limits.partition("<")[0]))

    assert seen("e2e_p97<1s", *rows).split() == ["e2e_p97<1s", "487", "ms", "✓"]
    assert seen("e2e_p50<400ms", *rows, *failed).split() == ["e2e_p50<400ms", "319", "ms", "✓"]
    assert seen("e2e_p95<1s", *rows, *failed).split() == ["e2e_p95<1s", "failed", "✗"]
    assert seen("e2e_mean<450ms", *rows, *waiting).split()[1:] == ["≥", "587", "ms", "?"]


def test_what_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    """Nothing listens at the address: the table is refused first."""
    plan = loadtest.Options(url="http://127.0.0.1:9", qps=1.0)
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match="cannot be written"):
        load.run(plan, out=None, quiet=True, csv=tmp_path / "file" / "run.csv")
    with pytest.raises(RecordError, match="it is a folder"):
        load.run(plan, out=tmp_path, quiet=True)
    with pytest.raises(BadInput, match="--repeats runs on this machine"):
        load.run(dataclasses.replace(plan, hosts=loadtest.Hosts()), out=None, quiet=True, repeats=2)
