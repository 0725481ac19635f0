"""Ends of a load test that nobody planned: Ctrl-C, a killed parent, a worker that dies; what was measured is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlsys_bench import loadtest, record
from mlsys_bench.errors import MeasurementFailed, RecordError
from mlsys_bench.journeys import load
from mlsys_bench.loadtest import endpoints, job, payloads, spool
from mlsys_bench.loadtest.payloads.think import Think
from mlsys_bench.types import Requests
from tests.planned_server import children, needs_proc, options, serving, wait_for_exit

PARENT = """
import sys
from pathlib import Path
from mlsys_bench import loadtest
from mlsys_bench.types import Lengths
asked = loadtest.Options(url=sys.argv[1], qps=40, arrivals="constant", duration_s=60, warmup_s=0, prompt_tokens=Lengths(mean=50),
                         output_tokens=Lengths(mean=4), requests_file=Path(sys.argv[2]))
found, requests = loadtest.run(asked, lambda progress: print("progress", progress.sent, flush=True))
print("verdict", found.validity.verdict, found.ok, " | ".join(found.validity.reasons))
"""


@contextmanager
def running_parent(url: str, file: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a load test in a process of its own; give it, once it made progress, and its worker's pid."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, url, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline().startswith("progress")
            yield parent, children(parent.pid)[0]
        finally:
            parent.kill()


@pytest.mark.e2e
@needs_proc
def test_ctrl_c_keeps_what_was_measured_and_leaves_no_process(tmp_path: Path) -> None:
    """Every fourth answer hangs: those are in flight when the person has had enough."""
    file = tmp_path / "r.parquet"
    with serving(plan=lambda i: "ok" if i % 4 else "hang") as server, running_parent(server.url, file) as (parent, worker):
        parent.send_signal(signal.SIGINT)
        out, err = parent.communicate(timeout=20)
        assert wait_for_exit(worker, 5)
    assert (parent.returncode, err) == (0, "")
    assert "stopped by hand after" in out
    kept = record.read(file, Requests).requests
    assert {r.outcome for r in kept} == {"ok", "cancelled"}
    assert all(r.in_window == (r.outcome == "ok") for r in kept)
    assert [r.index for r in kept] == list(range(len(kept)))
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


@pytest.mark.e2e
@needs_proc
def test_a_parent_that_is_killed_takes_its_worker_along_and_leaves_the_rows(tmp_path: Path) -> None:
    with serving() as server, running_parent(server.url, tmp_path / "r.parquet") as (parent, worker):
        parent.kill()
        assert wait_for_exit(worker, 10)
    from mlsys_bench.loadtest.shards import read_rows

    (rows,) = tmp_path.iterdir()
    assert len(read_rows(rows)) >= 10


@pytest.mark.e2e
@needs_proc
def test_a_worker_that_dies_is_a_failed_measurement_and_its_rows_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "r.parquet"
    with serving() as server, pytest.raises(MeasurementFailed, match=r"died by SIGKILL; \d+ requests are kept in .*r\.parquet"):
        loadtest.run(
            options(server.url, qps=40, duration_s=60.0, requests_file=file), lambda _: os.kill(children(os.getpid())[-1], signal.SIGKILL)
        )
    assert len(record.read(file, Requests).requests) >= 10
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


BROKEN = """
from mlsys_bench.loadtest import sender, worker
usual = sender.Sender.prepare
def prepare(self, index, *more):
    if index == 5:
        raise KeyError("no such prompt")
    return usual(self, index, *more)
sender.Sender.prepare = prepare
worker.main()
"""


@pytest.mark.e2e
def test_a_flaw_in_a_callback_ends_the_worker_loudly_and_the_rows_are_kept(tmp_path: Path) -> None:
    """Gevent would print it and go on, with a schedule that never ends."""
    rows = tmp_path / "rows"
    with serving() as server, subprocess.Popen([sys.executable, "-c", BROKEN], stdin=-1, stdout=-1, stderr=-1) as worker:
        work = job.Job(
            scheme="http", host="127.0.0.1", address="127.0.0.1", port=int(server.url.rpartition(":")[2]),
            endpoint=endpoints.Spec(name="completions", path="/v1/completions", model="tiny"),
            payload=payloads.Spec(prompt_chars=[9], output_tokens=[2], seed=0), api_key=None, scheduled_s=[i / 50 for i in range(3000)],
            users=None, duration_s=60.0, warmup_s=0.0, timeout_s=9.0, drain_s=0.0, connections=2, core=None, seed=0,
            rows=str(rows),
        )  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(job.encode(work) + b"\n")
        worker.stdin.flush()
        assert job.decode_said(worker.stdout.readline()).ready
        worker.stdin.write(job.start_line(time.monotonic()))
        worker.stdin.flush()
        assert worker.stderr is not None
        wrote = worker.stderr.read()
    assert worker.returncode == 1
    assert wrote.splitlines()[-1] == b"KeyError: 'no such prompt'"
    assert [r.index for r in spool.read(rows)] == [0, 1, 2, 3, 4]


@pytest.mark.e2e
def test_a_run_whose_requests_were_all_in_the_warm_up_says_so() -> None:
    with serving() as server, pytest.raises(MeasurementFailed, match=r"all of 1 requests were due in the warm-up of 500 ms"):
        loadtest.run(options(server.url, users=1, think=Think(mean_s=5.0), duration_s=0.8, warmup_s=0.5))


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
@pytest.mark.parametrize("quiet", [False, True])
def test_a_full_disk_costs_the_file_and_not_the_figures(quiet: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with serving() as server, pytest.raises(RecordError, match="No space left on device"):
        load.run(options(server.url, qps=40, duration_s=0.5), out=Path("/dev/full"), quiet=quiet)
    told = capsys.readouterr().out
    assert (json.loads(told)["ok"] == 20) if quiet else ("20 of 20 requests answered" in told)
