"""Work spread over workers: the same results whoever does it, errors as themselves, and nothing left behind."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import plan, simulate, slo, workers, workload
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, MeasurementFailed, Overload
from mlsys_bench.journeys import backtest, comparing, progress, simulation
from mlsys_bench.plan.graph import GraphRequest, plan_graph
from mlsys_bench.workers.local import Processes
from tests import sample_records
from tests.stage_graphs import graph, law

HERE = Path(__file__).parent
sys.path.append(str(HERE))  # whose processes find it there, too
pieces: Any = importlib.import_module("worker_pieces")
SEEDS = list(range(7))


class Awkward(Exception):
    """An error that cannot be made again from its arguments."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


class Backwards(Executor):
    """An executor that does the last piece first, to show that order is nobody's business but the items'."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Future[Any], Any, tuple[Any, ...]]] = []

    def submit(self, function: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep a piece; the last of them sets all off."""
        future: Future[Any] = Future()
        self.waiting.append((future, function, args))
        if len(self.waiting) == len(SEEDS):
            for late, what, given in reversed(self.waiting):
                late.set_result(what(*given))
        return future


def test_results_are_those_of_one_process_in_the_order_of_the_items() -> None:
    alone = workers.each(pieces.drawn, SEEDS, shared=2.0)
    assert alone == [pieces.drawn(2.0, seed) for seed in SEEDS]
    with ThreadPoolExecutor(3) as threads:
        assert workers.each(pieces.drawn, SEEDS, shared=2.0, executor=threads) == alone
    assert workers.each(pieces.drawn, SEEDS, shared=2.0, executor=Backwards()) == alone


def test_processes_give_the_same_bits_and_are_gone_after_it() -> None:
    with Processes(2) as crew:
        found = workers.each(pieces.drawn, SEEDS, shared=2.0, executor=crew)
        pids = set(workers.each(pieces.of_process, SEEDS, shared=None, executor=crew))
    assert found == workers.each(pieces.drawn, SEEDS, shared=2.0)
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids
    assert not any(lives(pid) for pid in pids)


def lives(pid: int) -> bool:
    """Say whether a process runs; a zombie that waits for its parent does not."""
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("where", ["here", "threads", "processes"])
def test_the_error_of_the_first_item_comes_back_as_itself(where: str) -> None:
    crews: dict[str, Any] = {"here": contextlib.nullcontext, "threads": lambda: ThreadPoolExecutor(2), "processes": lambda: Processes(1)}
    with pytest.raises(Overload) as caught, crews[where]() as crew:
        workers.each(pieces.refusing, SEEDS, shared=3, executor=crew)
    assert (caught.value.utilisation, caught.value.enough) == (3.0, 3)


def test_an_error_that_cannot_travel_comes_back_in_words() -> None:
    assert str(workers.sendable(Awkward(1, 2))) == "Awkward: 1 and 2"
    kept = BadInput("as it is")
    assert workers.sendable(kept) is kept
    again = pickle.loads(pickle.dumps(Overload(1.5, servers=2, enough=3)))
    assert (again.utilisation, again.servers, again.enough, str(again)) == (1.5, 2, 3, str(Overload(1.5, servers=2, enough=3)))


def test_a_worker_that_dies_is_told_in_one_line() -> None:
    with pytest.raises(MeasurementFailed, match="memory"), Processes(1) as crew:
        workers.each(pieces.dying, SEEDS, shared=None, executor=crew)


def test_progress_counts_every_piece_wherever_it_is_done() -> None:
    told: list[tuple[int, int]] = []
    workers.each(pieces.drawn, SEEDS, shared=1.0, told=lambda done, of: told.append((done, of)))
    with ThreadPoolExecutor(2) as crew:
        workers.each(pieces.drawn, SEEDS, shared=1.0, executor=crew, told=lambda done, of: told.append((done, of)))
    assert told == 2 * [(done, 7) for done in range(1, 8)]


def test_a_caller_who_stops_calls_off_what_was_not_begun() -> None:
    begun, gate = list[int](), threading.Event()

    def held(_: None, item: int) -> int:
        begun.append(item)
        assert item == 0 or gate.wait(30)
        return item

    with ThreadPoolExecutor(1) as crew:
        results = workers.as_done(held, SEEDS, shared=None, executor=crew)
        assert next(results) == (0, 0)
        results.close()  # type: ignore[attr-defined]
        gate.set()
    assert begun in ([0], [0, 1])  # the second may have begun before anybody stopped


def test_little_work_starts_no_process_and_much_work_does(monkeypatch: pytest.MonkeyPatch) -> None:
    local = workers.Local(count=2)
    assert local.worth(0.0, 0, 100) is None  # nothing is known yet
    assert local.worth(0.01, 1, 100) is None  # a second is left
    assert workers.Local(count=1).worth(5.0, 1, 100) is None
    assert local.worth(5.0, 1, 2) is None  # one piece is done as fast here
    monkeypatch.setattr(workers, "STARTING_S", 0.0)
    with workers.Local(count=2) as crew:
        pids = workers.each(pieces.of_process, SEEDS, shared=None, executor=crew)
    assert pids[0] == os.getpid()  # the first is done here, to see how long one takes
    assert os.getpid() not in pids[1:]


def test_the_line_of_a_long_job_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", shown.append)
    clock = iter([10.0, 13.0, 319.0, 400.0])
    tell = progress.Line().counted("systems", clock=lambda: next(clock))
    for done in range(1, 5):
        tell(done, 4)
    assert [text.removeprefix("\r\x1b[2K") for text in shown] == [
        "1 of 4 systems", "2 of 4 systems, about 6 s left", "3 of 4 systems, about 3 min left", "4 of 4 systems",
    ]  # fmt: skip


# ---------------------------------------------------------------- ends

SLEEPS = """
    import os, sys, threading, time
    from mlsys_bench import workers
    from mlsys_bench.workers.local import Processes

    def held(_, item):
        print(os.getpid(), flush=True)
        end = time.monotonic() + 60
        while time.monotonic() < end:  # at work, as a kernel is
            pass

    if __name__ == "__main__":
        with Processes(2) as crew:
            workers.each(held, list(range(8)), shared=None, executor=crew)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_its_parent_however_that_ends(how: signal.Signals, tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(textwrap.dedent(SLEEPS))
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    os.killpg(parent.pid, how) if how == signal.SIGINT else parent.kill()  # Ctrl-C reaches the whole group
    _, said = parent.communicate(timeout=20)
    wait_until(lambda: not any(lives(pid) for pid in pids))
    assert said.count("Traceback") == said.count("KeyboardInterrupt") == (how == signal.SIGINT)  # the parent's own


def wait_until(holds: Any, seconds: float = 10.0) -> None:
    """Wait for something that happens soon, without sleeping through it."""
    end, pause = time.monotonic() + seconds, threading.Event()
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        pause.wait(0.02)


# ---------------------------------------------------------------- a real cluster


@contextlib.contextmanager
def dask_cluster(count: int = 2) -> Iterator[str]:
    """Give the address of a real scheduler with worker processes, all on this machine."""
    pytest.importorskip("distributed", reason="needs the extra `cluster`")
    quiet = {**os.environ, "DASK_DISTRIBUTED__DASHBOARD__ENABLED": "False", "PYTHONPATH": str(HERE)}
    piped: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "env": quiet, "start_new_session": True}
    with contextlib.ExitStack() as all_of_them:

        def started(*command: str) -> subprocess.Popen[str]:
            process = subprocess.Popen([sys.executable, "-m", *command], **piped)
            all_of_them.callback(ended, process)
            return process

        scheduler = started("distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--no-show")
        address = said_by(scheduler, "Scheduler at:")
        members = [started("distributed.cli.dask_worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard") for _ in range(count)]
        for member in members:
            said_by(member, "Registered to:")
        yield address


def said_by(process: subprocess.Popen[str], what: str) -> str:
    assert process.stderr is not None
    for line in process.stderr:
        if what in line:
            return line.rpartition(what)[2].strip()
    raise AssertionError(f"{process.args!r} ended")


def ended(process: subprocess.Popen[str]) -> None:
    """End a process of the cluster: nothing of it is worth a farewell."""
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Give the address of a cluster that several tests share: it takes seconds to start."""
    with dask_cluster() as found:
        yield found


def test_a_cluster_of_two_processes_gives_the_same_bits_and_keeps_its_workers(address: str) -> None:
    """A real scheduler and two worker processes: shared once each, errors as themselves, and there for the next job."""
    matrix = np.random.default_rng(1).normal(size=1000)
    with workers.hired(address) as crew:
        found = workers.each(pieces.drawn, SEEDS, shared=2.0, executor=crew)
        seen = workers.each(pieces.first_of, SEEDS, shared=matrix, executor=crew)
        pids = set(workers.each(pieces.of_process, list(range(40)), shared=None, executor=crew))
        with pytest.raises(Overload) as caught:
            workers.each(pieces.refusing, SEEDS, shared=3, executor=crew)
    with workers.hired(address) as again:
        assert workers.each(pieces.drawn, SEEDS, shared=2.0, executor=again) == found
    assert found == workers.each(pieces.drawn, SEEDS, shared=2.0)
    assert [value for _, value in seen] == matrix[: len(SEEDS)].tolist()
    assert len({where for where, _ in seen}) <= 2  # each worker unpacked it once
    assert len(pids) == 2
    assert os.getpid() not in pids
    assert (caught.value.utilisation, caught.value.enough) == (3.0, 3)


def test_a_cluster_forgets_what_was_called_off(address: str) -> None:
    """Two workers hold a piece each; the caller stops, and none of the other pieces is ever begun."""
    with workers.hired(address) as crew:
        results = workers.as_done(pieces.slow_but_first, list(range(20)), shared=None, executor=crew)
        first = next(results)
        results.close()  # type: ignore[attr-defined]
        begun = workers.each(pieces.begun, [0] * 8, shared=None, executor=crew)
    assert first[1] == first[0]
    assert sum(dict(begun).values()) < 20  # what every worker process has begun, counted once each


def test_commands_give_the_same_bits_on_a_cluster_on_processes_and_alone(address: str, tmp_path: Path) -> None:
    """Independent simulations, a back-test and a plan."""
    asked = simulation.Asked(qps=4.0, model="llama-3-8b", gpu="l4", requests=120, runs=3)
    alone, apart = (simulation.simulate(replace(asked, cluster=where)) for where in (None, address))
    assert alone == apart

    rows = "model,parameters,quantity,value,precision_abs,source\n" + "".join(
        f"M/M/c,c={c};rho=0.9;mean_service=1,wait_{q},,,\n" for c in (1, 2, 3) for q in ("mean", "p99")
    )
    table = tmp_path / "truth.csv"
    table.write_text(rows)
    settings: dict[str, Any] = {"out": None, "tolerance": "1%", "budget": "1s", "seed": 0}
    assert backtest.queueing(table, **settings) == backtest.queueing(table, **settings, cluster=address)

    request = plan.Request(
        model="llama-3-8b", workload=workload.synthetic(20.0, prompt="256", output="32"), slo=slo.parse("ttft_p95<500ms"),
        gpus=("l4", "a10g", "h100-sxm"), precisions=("bf16",),
    )  # fmt: skip
    assert comparing.planned(request, cluster=address) == plan.plan(request)
    staged = GraphRequest(graph=graph(f"a: {{{law('10ms')}}}"))
    assert comparing.planned(staged, cluster=address) == plan_graph(staged)
    with Processes(2) as crew:
        many = simulate.run_many(**RUNS, executor=crew)
    assert [s.requests for s in many] == [s.requests for s in simulate.run_many(**RUNS)]


RUNS: dict[str, Any] = {
    "traffic": workload.synthetic(4.0, prompt="64", output="8"), "profile": sample_records.cpu_profile(),
    "limits": Limits(8, 512, 16, 500, 2048), "replicas": 2, "runs": 3, "requests_per_run": 50,
}  # fmt: skip


def test_a_cluster_that_is_not_there_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlsys_bench.workers import remote

    pytest.importorskip("distributed", reason="needs the extra `cluster`")
    monkeypatch.setattr(remote, "ANSWERS_S", 0.2)
    with pytest.raises(BadInput, match="no Dask scheduler answers there"), workers.hired("tcp://127.0.0.1:9"):
        raise AssertionError
    with pytest.raises(BadInput, match=r"e\.g\. tcp://127\.0\.0\.1:9"), workers.hired("127.0.0.1:9"):
        raise AssertionError
    with pytest.raises(BadInput, match="no Dask scheduler"), workers.hired("tcp://:x"):
        raise AssertionError


def test_without_dask_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(BadInput, match=r"mlsys-bench\[cluster\]"), workers.hired("tcp://127.0.0.1:9"):
        raise AssertionError
