"""gate run on scratch repositories whose commits are as fast, slow or broken as a line of JSON says, with real worker processes."""

# ruff: noqa: D102  the methods of sources are named by their Protocol

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlsys_bench import gate, record
from mlsys_bench.errors import INTERRUPTED, BadInput, MeasurementFailed, NotComparable
from mlsys_bench.journeys.gating import environments, interrupts, run, subjects, view
from mlsys_bench.journeys.gating.pairs import Contest, Progress, Race
from mlsys_bench.journeys.gating.run import Asked
from mlsys_bench.journeys.gating.source import Metric, Sampled
from mlsys_bench.types import Machine, Round
from mlsys_bench.verdicts import Finding, GateRun, Policy, Subject

WORKER = "python -S bench_worker.py"  # it needs no package, and starts in a third of the time
TINY = Path(__file__).with_name("tiny_worker.py")


# ---------------------------------------------------------------- a scratch repository


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


class Repository:
    """A repository in which a tag is a version that says something else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        git(folder, "init", "-q", "-b", "main")
        git(folder, "config", "user.email", "nobody@example.org")
        git(folder, "config", "user.name", "nobody")
        shutil.copy(TINY, folder / "bench_worker.py")

    def say(self, **said: object) -> None:
        (self.folder / "said.json").write_text(json.dumps({"seconds": 1.0} | said))

    def tag(self, name: str, **said: object) -> None:
        self.say(**said)
        git(self.folder, "add", "-A")
        git(self.folder, "commit", "-q", "--allow-empty", "-m", name)
        git(self.folder, "tag", name)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Repository:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    made = Repository(tmp_path / "project")
    monkeypatch.chdir(made.folder)
    made.tag("base", log=str(tmp_path / "launches"))
    return made


def gated(base: str = "base", cand: str = "cand", **more: object) -> GateRun:
    asked = dataclasses.replace(Asked(quiet=True, seed=1), **more)  # type: ignore[arg-type]
    return run.refs(base, cand, worker=WORKER, asked=asked)


def leaves_nothing(repository: Repository) -> bool:
    is_clean = not git(repository.folder, "status", "--porcelain")
    return (
        is_clean
        and len(git(repository.folder, "worktree", "list").splitlines()) == 1
        and not list((repository.folder.parent / "tmp").iterdir())
    )


def launches(tmp_path: Path) -> list[int]:
    return [int(pid) for pid in (tmp_path / "launches").read_text().split()]


def is_running(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


# ---------------------------------------------------------------- verdicts


def test_the_same_program_passes_at_the_first_look_and_nothing_is_left(repository: Repository, tmp_path: Path) -> None:
    log = str(tmp_path / "launches")
    repository.tag("cand", log=log, note="only a comment")
    found = gated(out=tmp_path / "gate.json")
    assert (run.exit_status(found), found.ended, found.verdict.verdict) == (0, "decided", "pass")
    assert [len(m.launches) for m in found.base_bench.measurements] == [6, 6]
    assert [launch.pair for launch in found.cand_bench.measurements[0].launches] == [1, 2, 3, 4, 5, 6]
    assert all(len(launch.rounds) == 20 for launch in found.base_bench.measurements[0].launches)
    assert (found.base.label, found.base.commit) == ("base", git(repository.folder, "rev-parse", "base"))
    assert len(launches(tmp_path)) == 2 * (6 + 1), "six pairs of processes, and one to rehearse"
    assert len(found.conditions) == 2 * 6
    assert leaves_nothing(repository)
    stored = record.read(tmp_path / "gate.json", GateRun)
    assert stored == found
    again = gate.verdict_of(stored.base_bench, stored.cand_bench, stored.policy, stored.base_machine, stored.cand_machine)
    assert again == found.verdict, "re-decided from the file, to the bit"


def test_a_tenth_slower_is_a_regression(repository: Repository, tmp_path: Path) -> None:
    repository.tag("cand", seconds=1.1, log=str(tmp_path / "launches"))
    slower = gated()
    assert (run.exit_status(slower), slower.verdict.verdict) == (1, "regression")
    ratio = next(f.ratio for f in slower.verdict.findings if f.name == "tiny.work")
    assert ratio == pytest.approx(1.1, rel=0.02)


def test_a_counter_that_grew_fails_after_one_pair(repository: Repository, tmp_path: Path) -> None:
    repository.tag("cand", calls=102, log=str(tmp_path / "launches"))
    found = gated()
    assert (run.exit_status(found), found.ended) == (1, "decided")
    assert len(found.base_bench.measurements[0].launches) == 1


def test_a_metric_of_one_side_only_is_new_and_fails_nothing(repository: Repository, tmp_path: Path) -> None:
    repository.tag("cand", more=["tiny.bytes"], log=str(tmp_path / "launches"))
    found = gated(budget_s=0.001)
    assert next(f for f in found.verdict.findings if f.name == "tiny.bytes").reason.startswith("new")
    assert run.exit_status(found) == 3, "as without it: one pair decides nothing"


def test_a_budget_ends_a_run_undecided_before_the_pair_that_would_exceed_it(repository: Repository) -> None:
    repository.tag("cand")
    found = gated(budget_s=0.001)
    assert (run.exit_status(found), found.ended) == (3, "budget")
    assert len(found.base_bench.measurements[0].launches) == 1, "one pair at least, or nothing could be said"


def test_a_working_tree_is_measured_as_it_is_and_left_alone(repository: Repository, tmp_path: Path) -> None:
    repository.say(calls=120)
    (repository.folder / "new.txt").write_text("not committed")
    before = git(repository.folder, "status", "--porcelain")
    found = gated(cand=".")
    assert run.exit_status(found) == 1
    assert str(found.cand.commit).endswith("-dirty")
    assert git(repository.folder, "status", "--porcelain") == before
    assert not list((tmp_path / "tmp").iterdir())


def test_a_project_in_a_folder_of_its_repository_is_found_from_within(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    inner = repository.folder / "services" / "one"
    (inner / "docs").mkdir(parents=True)
    (inner / "pyproject.toml").write_text("[project]\nname = 'one'\n")
    for name in ("bench_worker.py", "said.json"):
        (repository.folder / name).rename(inner / name)
    monkeypatch.chdir(inner / "docs")
    with pytest.raises(BadInput, match=r"base has no folder services/one, where this was started"):
        gated(cand=".")
    git(repository.folder, "add", "-A")
    git(repository.folder, "commit", "-q", "-m", "moved")
    found = gated("HEAD", ".", budget_s=0.001)
    assert found.base_bench.measurements[0].name == "tiny.work"


# ---------------------------------------------------------------- what cannot be compared


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"protocol": 2}, "speaks protocol 2"),
        ({"sources": "/usr/lib"}, "not that of this side"),
        ({"cpu": "another"}, "cpu: one -> another"),
    ],
)
def test_other_protocols_other_code_and_other_machines_are_not_compared(
    repository: Repository, said: dict[str, object], words: str
) -> None:
    repository.tag("cand", **said)
    with pytest.raises(NotComparable, match=words) as caught:
        gated()
    assert caught.value.exit_status == 4
    assert leaves_nothing(repository)


def test_a_baseline_from_before_there_was_a_worker_is_not_comparable(repository: Repository) -> None:
    git(repository.folder, "rm", "-q", "bench_worker.py")
    git(repository.folder, "commit", "-q", "-m", "no worker")
    git(repository.folder, "tag", "before")
    with pytest.raises(NotComparable, match="has no worker"):
        gated("before", "base")
    assert leaves_nothing(repository)


# ---------------------------------------------------------------- what cannot be measured


def test_a_worker_that_dies_is_a_failed_measurement_with_its_last_words_and_whole_pairs_are_kept(
    repository: Repository, tmp_path: Path
) -> None:
    """Two launches rehearse, two are the first pair; the first of the second pair dies in its third turn."""
    repository.tag("cand", log=str(tmp_path / "launches"), dies_in_launch=5)
    with pytest.raises(MeasurementFailed, match=r"died \(exit 1\): out of luck") as caught:
        gated(out=tmp_path / "gate.json")
    assert caught.value.exit_status == 5
    kept = record.read(tmp_path / "gate.json", GateRun)
    assert (kept.ended, len(kept.base_bench.measurements[0].launches)) == ("failed", 1)
    assert leaves_nothing(repository)
    assert not any(map(is_running, launches(tmp_path)))


def test_nothing_measured_is_no_pass(repository: Repository) -> None:
    repository.tag("quiet", silent=True)
    repository.tag("cand", silent=True, note="x")
    with pytest.raises(MeasurementFailed, match="nothing was measured"):
        gated("quiet")


def test_a_side_alone_that_measured_nothing_is_no_undecided_question(repository: Repository, tmp_path: Path) -> None:
    repository.tag("cand", silent=True)
    with pytest.raises(MeasurementFailed, match="the candidate measured nothing"):
        gated(out=tmp_path / "gate.json")
    assert record.read(tmp_path / "gate.json", GateRun).verdict.verdict == "inconclusive"


# ---------------------------------------------------------------- what people mistype


def test_a_project_without_our_benchmarks_is_told_what_to_give(repository: Repository) -> None:
    repository.tag("cand", note="x")
    with pytest.raises(NotComparable, match=r"base: holds no mlsys_cli.*--command") as caught:
        run.refs("base", "cand", asked=Asked(quiet=True))
    assert caught.value.exit_status == 4


def test_an_unknown_ref_names_a_near_one(repository: Repository) -> None:
    with pytest.raises(BadInput, match="unknown git ref 'bas'; did you mean base"):
        gated("bas")


def test_a_ref_beyond_a_shallow_clone_says_how_to_fetch_it(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    repository.tag("cand")
    git(tmp_path, "clone", "-q", "--depth", "1", f"file://{repository.folder}", "shallow")
    monkeypatch.chdir(tmp_path / "shallow")
    with pytest.raises(BadInput, match=r"git fetch --depth 1 origin base"):
        gated()


def test_a_folder_without_a_repository_says_what_else_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="in no git repository"):
        gated()


def test_one_side_is_not_enough_and_our_benchmarks_have_names() -> None:
    with pytest.raises(BadInput, match="--base REF --cand REF"):
        run.refs("main", None, asked=Asked(quiet=True))
    with pytest.raises(BadInput, match=r"did you mean engine\.decode"):
        run.refs("main", ".", bench="engine.decod", asked=Asked(quiet=True))
    with pytest.raises(BadInput, match="above zero"):
        run.budget("0s")


# ---------------------------------------------------------------- Ctrl-C


@pytest.mark.e2e
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_the_partial_record_and_no_process(repository: Repository, tmp_path: Path, number: signal.Signals) -> None:
    """Launches are so different that nothing is decided before the last look; the signal comes after the first pair."""
    log = str(tmp_path / "launches")
    repository.tag("cand", log=log, sd=0.5)
    out = tmp_path / "gate.json"
    command = [sys.executable, "-m", "mlsys_cli", "gate", "run", "--base", "base", "--cand", "cand", "--worker", WORKER, "-o", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=repository.folder) as ours:
        assert ours.stderr is not None
        said = [next(line for line in ours.stderr if "a pair of launches takes" in line)]
        ours.send_signal(number)
        said += ours.stderr.readlines()
        status = ours.wait(30)
    assert status == INTERRUPTED, said
    kept = record.read(out, GateRun)
    assert kept.ended == "interrupted"
    assert len(kept.base_bench.measurements[0].launches) >= 1
    assert not any(map(is_running, launches(tmp_path)))
    assert leaves_nothing(repository)


def test_an_interrupt_is_held_back_until_what_was_begun_is_done() -> None:
    done = []

    def begin() -> None:
        with interrupts.terminable(), interrupts.held():
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            done.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert done == ["all of it"]
    with interrupts.held():
        done.append("again")
    assert done == ["all of it", "again"]


# ---------------------------------------------------------------- the loop


class Steady:
    """A source that takes note of what is done with it, and gives the same sample again and again."""

    def __init__(self, side: str, log: list[str], *, together: bool = True, turns: int = 3, value: float = 1.0) -> None:
        self.side, self.log, self.together, self.turns, self.value = side, log, together, turns, value
        self.subject = Subject(kind="command", label=side)

    def launch(self, pair: int) -> Steadily:
        self.log.append(f"open {self.side} {pair}")
        return Steadily(self)


class Steadily:
    """A launch of it."""

    pids: tuple[int, ...] = ()

    def __init__(self, of: Steady) -> None:
        self.of = of

    def hello(self) -> Machine:
        return Machine(hard={"cpu": "one"}, soft={})

    def turn(self, number: int) -> list[Sampled]:
        self.of.log.append(f"{self.of.side} {number}")
        metric = Metric(name="work", unit="s", better="lower")
        return [(metric, Round(values=(self.of.value,) * 10, involuntary=(0,) * 10))]

    def close(self) -> None:
        self.of.log.append(f"close {self.of.side}")


def raced(log: list[str], *, seed: int = 0, most_pairs: int | None = None, **how: object) -> Race:
    base, cand = (Steady(side, log, **how) for side in ("base", "cand"))  # type: ignore[arg-type]
    race = Race([Contest(base=base, cand=cand, most_pairs=most_pairs)], policy=Policy(), budget_s=1e6, seed=seed)
    race.run()
    return race


def test_each_round_has_one_turn_of_each_side_in_an_order_drawn_by_the_seed() -> None:
    log: list[str] = []
    raced(log)
    turns = [line for line in log if not line.startswith(("open", "close"))]
    orders = [tuple(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    assert all({side for side, _ in map(str.split, two)} == {"base", "cand"} for two in orders)
    assert all(len({number for _, number in map(str.split, two)}) == 1 for two in orders)
    assert len({two[0].split()[0] for two in orders}) == 2, "not always the same side first"
    again: list[str] = []
    raced(again)
    other: list[str] = []
    raced(other, seed=1)
    assert again == log
    assert other != log


def test_sides_that_cannot_be_open_together_take_whole_launches_by_turns() -> None:
    log: list[str] = []
    raced(log, together=False)
    opened: list[str] = []
    for line in log:
        if line.startswith("open"):
            opened.append(line.split()[1])
        if line.startswith("close"):
            opened.remove(line.split()[1])
        assert len(opened) <= 1
    firsts = [log[i].split()[1] for i in range(0, len(log), 10)]
    assert set(firsts) == {"base", "cand"}


def test_a_tenth_faster_is_an_improvement() -> None:
    base, cand = Steady("base", []), Steady("cand", [], value=0.9)
    race = Race([Contest(base=base, cand=cand)], policy=Policy(), budget_s=1e6)
    assert race.run() == "decided"
    assert race.standing is not None
    assert race.standing.verdict.verdict == "improved"


def test_where_launches_cannot_be_repeated_there_is_one_pair() -> None:
    race = raced([], most_pairs=1)
    assert (race.pairs, race.ended) == (1, "last_look")


def test_launches_are_closed_when_one_breaks() -> None:
    log: list[str] = []

    class Broken(Steady):
        """Its second launch never gets ready."""

        def launch(self, pair: int) -> Steadily:
            if pair == 2:
                raise MeasurementFailed("no memory left")
            return super().launch(pair)

    race = Race([Contest(base=Steady("base", log), cand=Broken("cand", log))], policy=Policy(), budget_s=1e6)
    with pytest.raises(MeasurementFailed, match="no memory"):
        race.run()
    assert sum(line.startswith("open") for line in log) == sum(line.startswith("close") for line in log)
    assert race.pairs == 1


# ---------------------------------------------------------------- environments


@pytest.fixture
def project(tmp_path: Path) -> Callable[[str], Path]:
    def make(dependencies: str, name: str = "a") -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        extras = '[project.optional-dependencies]\nengine = ["torch>=2"]\ndocs = ["mkdocs"]\n'
        (folder / "pyproject.toml").write_text(f'[project]\nname = "x"\ndependencies = [{dependencies}]\n{extras}')
        return folder

    return make


def test_only_what_a_program_depends_on_asks_for_another_environment(project: Callable[[str], Path]) -> None:
    folder = project('"numpy"')
    before = environments.of_folder(folder)
    (folder / "pyproject.toml").write_text((folder / "pyproject.toml").read_text() + "[tool.ruff]\nline-length = 80\n")
    assert environments.of_folder(folder).digest() == before.digest()
    assert before.requirements == ("numpy", "torch>=2"), "docs measure nothing"
    assert environments.of_folder(project('"numpy", "scipy"')).digest() != before.digest()
    (folder / "constraints.txt").write_text("numpy==2.0\n")
    assert environments.of_folder(folder).constraints == (folder / "constraints.txt",)


def test_an_environment_is_made_once_torch_first_and_alone(
    project: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[list[str]] = []

    def note(command: list[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        ran.append(command)

    monkeypatch.setattr(environments, "_run", note)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLSYS_TORCH", "torch==2.9.1 --index-url https://example.org/cpu")
    needs = environments.of_folder(project('"numpy"'))
    said: list[str] = []
    first, second = (environments.provide(needs, said.append) for _ in range(2))
    assert first.python == second.python
    assert len(ran) == 3, "the environment, torch, the rest: once"
    assert ran[1][-3:] == ["torch==2.9.1", "--index-url", "https://example.org/cpu"]
    assert ran[2][-2:] == ["numpy", "torch>=2"]
    assert any("which the budget does not count" in line for line in said)


def test_an_environment_that_pip_cannot_make_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        raise MeasurementFailed("pip install failed")

    monkeypatch.setattr(environments, "_run", fail)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(MeasurementFailed):
        environments.provide(environments.Needs(requirements=("numpy",)), lambda _: None)
    assert not list(environments.cached().iterdir())


def wheel(folder: Path, seconds: float) -> Path:
    """Return a wheel that holds nothing but the tiny worker."""
    name = f"tiny-{seconds:g}-py3-none-any.whl"
    info = f"tiny-{seconds:g}.dist-info"
    with zipfile.ZipFile(folder / name, "w") as made:
        made.write(TINY, "bench_worker.py")
        made.writestr("said.json", json.dumps({"seconds": seconds}))
        made.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {seconds:g}\n")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")
    return folder / name


@pytest.mark.e2e
def test_two_wheels_are_gated_like_two_refs(tmp_path: Path) -> None:
    found = run.refs(str(wheel(tmp_path, 1.0)), str(wheel(tmp_path, 1.2)), worker=WORKER, asked=Asked(quiet=True))
    assert run.exit_status(found) == 1
    assert (found.base.kind, found.base.label) == ("wheel", "tiny-1-py3-none-any.whl")


def test_what_is_no_wheel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_text("no zip")
    with pytest.raises(BadInput, match="is no wheel"):
        environments.of_wheel(tmp_path / "x.whl")


def test_a_workers_own_code_comes_first_whatever_the_person_has_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    (tmp_path / "cli").mkdir()
    side = subjects.Side(
        subject=Subject(kind="ref", label="x"), root=tmp_path, environment=environments.HERE, paths=(tmp_path / "cli", tmp_path)
    )  # fmt: skip
    assert side.variables()["PYTHONPATH"].split(os.pathsep) == [str(tmp_path / "cli"), str(tmp_path), "/elsewhere"]
    assert side.source("engine.decode").command.argv[1:] == ("-m", "mlsys_cli", "bench", "--worker", "engine.decode")
    assert side.source("x", "python3 w.py --fast").command.argv == (sys.executable, "w.py", "--fast", "x")


# ---------------------------------------------------------------- the view


def finding(ratio: float, low: float, high: float, **more: object) -> Finding:
    base = Finding(
        name="work", parameters={}, unit="s", better="lower", baseline=1.0, candidate=ratio, ratio=ratio, interval=(low, high),
        verdict="inconclusive", reason="",
    )  # fmt: skip
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def test_a_bar_is_drawn_to_scale_with_worse_to_the_right() -> None:
    """Middle: no change.  Half way out: the tolerance of 5 %.  The end: twice that."""
    half = view.WIDTH // 2
    bar = view.bar(finding(1.0, 1.0, 1.0), 0.05)
    assert len(bar) == view.WIDTH
    assert bar[half] == "●"
    assert bar[half + half // 2] == "┃"
    slower = view.bar(finding(1.05, 1.02, 1.3), 0.05)
    assert slower.index("●") == half + half // 2
    assert slower[-1] == "▶"
    assert slower[half] == "│"
    higher = view.bar(finding(1 / 1.05, 1 / 1.3, 1 / 1.02, better="higher"), 0.05)
    assert higher == slower, "a throughput that fell is worse, too"


def test_looks_are_told_when_they_are_due(capsys: pytest.CaptureFixture[str]) -> None:
    log: list[str] = []
    base, cand = Steady("base", log), Steady("cand", log, value=1.001)
    with view.View() as shown:
        Race([Contest(base=base, cand=cand)], policy=Policy(), budget_s=1e6, show=shown.show).run()
    said = capsys.readouterr().err.splitlines()
    assert "a pair of launches takes" in said[0]
    assert [line for line in said if line.startswith("after")] == [said[-1]], "one look was enough"
    assert "work 1.001" in said[-1]


def test_the_time_left_is_that_to_the_next_look_or_the_budgets() -> None:
    base, cand = Steady("base", []), Steady("cand", [])
    seen: list[Progress] = []
    Race([Contest(base=base, cand=cand)], policy=Policy(), budget_s=1e6, show=seen.append).run()
    assert seen[0].standing.next_look == 6
    at = dataclasses.replace(seen[0], pair_s=7.0, spent_s=10.0, budget_s=90.0)
    assert at.left_s == 35.0
    assert dataclasses.replace(at, spent_s=80.0).left_s == 10.0


@pytest.fixture(autouse=True)
def nothing_is_left_behind() -> Iterator[None]:
    """Handlers of signals are given back, whatever a run ended in."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    yield
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
