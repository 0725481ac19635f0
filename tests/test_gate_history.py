"""Results over commits: added once however often, read back as they were, joined only on one class of machine, and never lost."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from mlsys_bench import record
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.gate import history, trends
from mlsys_bench.histories import History
from mlsys_bench.report import html, markdown, pictures
from mlsys_bench.report.histories import BREAK, COURSE, course
from mlsys_bench.report.histories import history as in_words
from mlsys_bench.types import Bench
from mlsys_bench.verdicts import Finding, Verdict
from mlsys_cli.main import app
from tests import sample_histories as sample


def results(numbers: range, slow: dict[int, float] | None = None, **more: object) -> list[history.Result]:
    return [
        history.of_run(sample.gate_run(n, (slow or {}).get(n, 0.0), **more), created=sample.created(n), source="gate run")  # type: ignore[arg-type]
        for n in numbers
    ]


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "made" / "gate.sqlite"


# ---------------------------------------------------------------- the file


def test_a_result_comes_back_as_it_was_added(db: Path) -> None:
    made = results(range(1, 4))
    assert history.add(db, made) == history.Added(new=3, known=0, results=3)
    assert list(history.load(db)) == made


def test_adding_the_same_results_again_changes_nothing(db: Path, tmp_path: Path) -> None:
    """Whether they come from the run itself or from the file it wrote later."""
    run = sample.gate_run(1)
    history.add(db, [history.of_run(run, created=sample.created(1), source="gate run")])
    before = history.load(db)
    again = history.results_of([sample.write(tmp_path, 1, run), sample.write(tmp_path, 2, run)])
    assert history.add(db, again) == history.Added(new=0, known=2, results=1)
    assert history.load(db) == before


def test_a_run_keeps_itself_as_its_file_would(db: Path, tmp_path: Path) -> None:
    run = sample.gate_run(1)
    assert history.keep(db, run, branch="main").new == 1
    assert history.add(db, history.results_of([sample.write(tmp_path, 1, run)])) == history.Added(new=0, known=1, results=1)
    assert history.load(db)[0].branch == "main"


def test_one_number_is_kept_for_each_launch_pair_by_pair(db: Path) -> None:
    run = sample.gate_run(3, 0.05)
    (metric,) = history.of_run(run, created=sample.created(3), source="").metrics
    by_hand = [launch.rounds[0].values[0] for launch in run.cand_bench.measurements[0].launches]
    assert metric.paired
    assert metric.cand == pytest.approx(by_hand)
    assert history.log_ratios(metric) == pytest.approx(np.log(metric.cand) - np.log(metric.base))


def test_two_writers_lose_nothing(db: Path, tmp_path: Path) -> None:
    """Two processes add twenty results each, one transaction for each, while the file is being made."""
    files = [sample.write(tmp_path, n, sample.gate_run(n)) for n in range(40)]
    code = (
        "import sys, pathlib\nfrom mlsys_bench.gate import history\nfor f in sys.argv[2:]:\n"
        "    history.add(pathlib.Path(sys.argv[1]), history.results_of([pathlib.Path(f)]))"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(db), *map(str, files[i::2])]) for i in (0, 1)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    assert {r.source for r in history.load(db)} == {f.name for f in files}


def test_a_writer_that_dies_half_way_leaves_what_was_there(db: Path, tmp_path: Path) -> None:
    history.add(db, results(range(1, 3)))
    before = history.load(db)
    code = (
        "import os, sys, pathlib\nfrom mlsys_bench.gate import history\n"
        "with history._open(pathlib.Path(sys.argv[1]), create=True) as connection:\n"
        "    history._insert(connection, history.results_of([pathlib.Path(sys.argv[2])])[0])\n    os._exit(9)"
    )
    file = sample.write(tmp_path, 3, sample.gate_run(3))
    assert subprocess.run([sys.executable, "-c", code, str(db), str(file)], check=False).returncode == 9
    assert history.load(db) == before
    assert history.add(db, history.results_of([file])).new == 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: path.write_bytes(b"no database, but long enough to be one" * 30), "is no SQLite database"),
        (lambda path: path.write_bytes(path.read_bytes()[:5000] + b"\xff" * 9000), "is damaged"),
        (lambda path: run_sql(path, "PRAGMA user_version = 2"), "made by a newer mlsys"),
        (lambda path: run_sql(path, "PRAGMA application_id = 1"), "of another program"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_and_left_alone(db: Path, spoil: object, said: str) -> None:
    history.add(db, results(range(1, 9)))
    spoil(db)  # type: ignore[operator]
    before = db.read_bytes()
    for use in (lambda: history.add(db, results(range(20, 21))), lambda: history.load(db)):
        with pytest.raises(BadInput, match=said) as raised:
            use()
        assert raised.value.exit_status == 2
    assert db.read_bytes() == before


def run_sql(path: Path, statement: str) -> None:
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_history_that_is_not_there_is_not_made_by_looking(db: Path) -> None:
    with pytest.raises(BadInput, match="there is no such history; `mlsys gate history add"):
        trends.trends(db)
    assert not db.exists()


def test_a_folder_that_may_not_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="cannot be"):
        history.check(tmp_path / "file" / "gate.sqlite")


def test_other_records_are_refused_by_name(tmp_path: Path) -> None:
    empty = History(database="x", results=0, machines=0, series=())
    with pytest.raises(BadInput, match="holds a 'gate-history' record"):
        history.results_of([record.write(tmp_path / "x.json", empty, sample.machine())])


# ---------------------------------------------------------------- series


def test_a_chain_finds_the_commit_though_days_differ_by_fifteen_percent(db: Path) -> None:
    history.add(db, results(range(1, 31), {12: np.log(1.08)}))
    (series,) = trends.trends(db).series
    (change,) = series.changes
    assert series.drawn == "chain"
    assert (change.commit, change.after_commit, change.worse) == (sample.commit(12), sample.commit(11), True)
    assert change.interval is not None
    assert change.interval[0] < 1.08 < change.interval[1]
    assert np.std([np.log(p.measured) for p in series.points if p.measured]) > 0.1  # what days alone would have shown


def test_a_chain_multiplies_the_ratios_along_its_commits(db: Path) -> None:
    """Level of a commit = level of its baseline times their ratio, whatever was measured in between."""
    runs = {1: 0, 2: 1, 3: 1, 4: 2}
    history.add(db, [history.of_run(sample.gate_run(n, base=b), created=sample.created(n), source="") for n, b in runs.items()])
    (series,) = trends.trends(db).series
    level = {0: 1.0}
    for point, (n, base) in zip(series.points, runs.items(), strict=True):
        assert point.ratio is not None
        level[n] = level[base] * point.ratio
        assert point.value == pytest.approx(level[n])
    assert series.total == pytest.approx(level[4])


def test_runs_of_the_same_two_commits_are_one_step_with_more_pairs(db: Path) -> None:
    runs = [sample.gate_run(2, seed=seed) for seed in (1, 2)]
    history.add(db, [history.of_run(run, created=sample.created(n), source="") for n, run in enumerate(runs)])
    (series,) = trends.trends(db).series
    (point,) = series.points
    assert point.launches == 2 * sample.PAIRS


def test_results_against_one_baseline_are_drawn_as_ratios_to_it(db: Path) -> None:
    lasting = {n: np.log(1.06) for n in range(20, 41)}
    history.add(db, results(range(1, 41), lasting, base=0))
    (series,) = trends.trends(db).series
    assert series.drawn == "fixed"
    assert [abs(change.point - 19) <= 2 for change in series.changes] == [True]


def test_single_files_are_drawn_as_they_were_measured(db: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    benches = [sample.bench(0.002 * (1.08 if n >= 15 else 1) * np.exp(rng.normal(0, 0.01, 3))) for n in range(30)]
    files = [sample.write(tmp_path, n, bench) for n, bench in enumerate(benches)]
    for n, file in enumerate(files):
        history.add(db, history.results_of([file], commit=sample.commit(n)))
    (series,) = trends.trends(db).series
    assert series.drawn == "absolute"
    assert [c.commit for c in series.changes] == [sample.commit(15)]
    assert series.points[3].value == pytest.approx(series.points[3].measured)


def test_a_counter_changes_wherever_its_value_does(db: Path, tmp_path: Path) -> None:
    values = [100.0, 100.0, 101.0, 101.0]
    files = [sample.write(tmp_path, n, sample.bench(np.array([v]), "blocks", counted=True)) for n, v in enumerate(values)]
    history.add(db, history.results_of(files))
    (series,) = trends.trends(db).series
    (change,) = series.changes
    assert (change.point, change.interval) == (2, None)
    assert change.ratio == pytest.approx(1.01)


def test_a_verdict_leaves_its_two_figures(db: Path, tmp_path: Path) -> None:
    finding = Finding(
        name="step", parameters={}, unit="s", better="lower", baseline=0.1, candidate=0.2, ratio=2.0, interval=None, verdict="suspect",
        reason="",
    )  # fmt: skip
    verdict = Verdict(verdict="suspect", findings=(finding,), tolerance=0.05, reasons=())
    history.add(db, history.results_of([sample.write(tmp_path, 1, verdict)], commit="abc"))
    (point,) = trends.trends(db).series[0].points
    assert (point.ratio, point.measured) == pytest.approx((2.0, 0.2))
    assert point.commit == "abc"


def test_other_machines_are_other_series(db: Path) -> None:
    elsewhere = sample.machine(cpu_name="Another")
    history.add(db, [*results(range(1, 4)), *results(range(4, 7), on=elsewhere)])
    found = trends.trends(db)
    assert found.machines == 2
    assert [len(series.points) for series in found.series] == [3, 3]
    assert len({series.machine for series in found.series}) == 2


def test_metrics_dates_and_branches_narrow_what_is_shown(db: Path) -> None:
    named = [dataclasses.replace(r, branch="main" if n < 4 else "topic") for n, r in enumerate(results(range(1, 11), {9: 0.2}))]
    history.add(db, named)
    now = datetime.datetime(2026, 8, 11, 13, tzinfo=datetime.UTC)
    assert len(trends.trends(db, branch="topic").series[0].points) == 6
    later = trends.trends(db, since="2d", now=now).series[0]
    assert [p.created[:10] for p in later.points] == ["2026-08-10", "2026-08-11"]
    assert [c.point for c in later.changes] == [0]
    assert trends.trends(db, since="2026-08-10", metrics=["engine.*"]).series == (later,)
    with pytest.raises(UnknownName, match=r"unknown metric 'engine.stop'; did you mean engine.step\?"):
        trends.trends(db, metrics=["engine.stop"])
    with pytest.raises(BadInput, match="is no date"):
        trends.trends(db, since="last week")
    with pytest.raises(BadInput, match="no result of branch 'gone'"):
        trends.trends(db, branch="gone")


def test_values_at_zero_are_shown_and_not_judged(db: Path, tmp_path: Path) -> None:
    files = [sample.write(tmp_path, n, sample.bench(np.array([n - 5.0]), "balance")) for n in range(12)]
    history.add(db, history.results_of(files))
    (series,) = trends.trends(db).series
    assert (series.changes, series.points[0].value) == ((), -5.0)
    assert "at or below zero" in series.notes[0]
    assert course(series)


# ---------------------------------------------------------------- what people read


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, History]:
    db = tmp_path_factory.mktemp("history") / "gate.sqlite"
    history.add(db, results(range(1, 31), {12: np.log(1.08), 24: np.log(0.9)}))
    return db, trends.trends(db)


def test_a_record_comes_back_from_its_file(shown: tuple[Path, History], tmp_path: Path) -> None:
    path = record.write(tmp_path / "history.json", shown[1], sample.machine())
    assert record.read(path, History) == shown[1]


def test_the_terminal_says_where_it_changed_in_eighty_columns(shown: tuple[Path, History]) -> None:
    done = CliRunner().invoke(app, ["gate", "history", "show", "--db", str(shown[0])])
    assert done.exit_code == 0, done.output
    assert "2 lasting changes in 30 results in 1 series: 1 for the worse, 1 for the better." in done.output
    assert f"{sample.commit(11)[:10]}..{sample.commit(12)[:10]}" in done.output
    assert max(map(len, done.output.splitlines())) <= 80
    (series,) = shown[1].series
    assert len(course(series).replace(BREAK, "")) <= COURSE
    assert course(series).count(BREAK) == 2


def test_the_page_holds_the_picture_and_the_words(shown: tuple[Path, History]) -> None:
    items = [("history.json", record.envelope(shown[1], sample.machine()), shown[1])]
    (picture,) = pictures.draw(items) or ()
    assert (picture.kind, picture.uri[:26]) == ("gate-history", "data:image/svg+xml;base64,")
    assert picture.uri in html.render(items)
    assert in_words(shown[1]).lead in markdown.render(items)


def test_commands_add_and_show_and_write_tables(tmp_path: Path) -> None:
    db, table = tmp_path / "gate.sqlite", tmp_path / "out.csv"
    files = [str(sample.write(tmp_path, n, sample.gate_run(n))) for n in (1, 2)]
    run = CliRunner()
    added = run.invoke(app, ["gate", "history", "add", *files, "--db", str(db), "--branch", "main"])
    assert added.output.strip() == f"{db}: 2 added, 0 already there, 2 in all"
    shown = run.invoke(app, ["gate", "history", "show", "--db", str(db), "--json", "--csv", str(table)])
    document = json.loads(shown.output)
    assert (document["kind"], document["results"]) == ("gate-history", 2)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    assert [(row["metric"], row["branch"], row["commit"]) for row in rows] == [("engine.step", "main", sample.commit(n)) for n in (1, 2)]
    assert float(rows[1]["value"]) == pytest.approx(float(rows[0]["value"]) * float(rows[1]["ratio"]))


def test_a_commit_is_not_said_twice(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the run says itself which commit"):
        history.results_of([sample.write(tmp_path, 1, sample.gate_run(1))], commit="abc")


def test_an_empty_file_is_a_history_that_begins(db: Path) -> None:
    db.parent.mkdir()
    db.touch()
    with pytest.raises(BadInput, match="is empty"):
        history.load(db)
    assert history.add(db, results(range(1, 2))).results == 1
    assert [path.name for path in db.parent.iterdir()] == ["gate.sqlite"]  # one file, nothing beside it


def test_a_benchmark_that_was_skipped_leaves_nothing(tmp_path: Path) -> None:
    bench = sample.bench(np.array([1.0]))
    skipped = Bench(measurements=(dataclasses.replace(bench.measurements[0], skipped="no GPU", launches=()),))
    (result,) = history.results_of([sample.write(tmp_path, 1, skipped)])
    assert result.metrics == ()
