"""A client that polls instead of sleeping, and what Ctrl-C ends a load test with."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import hardware, loadtest, record
from mlsys_bench.errors import INTERRUPTED, BadInput
from mlsys_bench.journeys import load
from mlsys_bench.loadtest import alarm, crew, trust, validity
from mlsys_bench.report import content
from mlsys_bench.types import LoadTest, RequestRecord, Validity
from tests import sample_records
from tests.planned_server import needs_proc, options, serving
from tests.sample_calibrations import calibration
from tests.sent_requests import OK, a_job, a_sender
from tests.sent_requests import serving as answering

# ---------------------------------------------------------------- time spent in vain


class Idle:
    """A hub of which only the idle watcher is asked for."""

    priority = 0

    def __init__(self) -> None:
        self.call: Callable[[], Any] | None = None

    def idle(self) -> Idle:
        """Return itself: a hub and its watcher in one."""
        return self

    def start(self, callback: Callable[[], Any]) -> None:
        """Call this from now on."""
        self.call = callback

    def stop(self) -> None:
        """Call nothing."""
        self.call = None

    close = stop


def test_only_turns_in_which_nothing_was_to_do_count_as_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty turns take 4 us; one with an answer to read takes 60, one in which the process was put aside 3,000."""
    now, hub = [100.0], Idle()
    monkeypatch.setattr(alarm, "clock", lambda: now[0])
    awake = alarm.Awake(hub)  # type: ignore[arg-type]
    awake.start()
    for turn_s in [4e-6] * 600 + [60e-6] * 50 + [3e-3] + [5e-6] * 100:
        now[0] += turn_s
        assert hub.call is not None
        hub.call()
    assert awake.vain_s == pytest.approx(600 * 4e-6 + 100 * 5e-6)
    awake.close()
    assert hub.call is None


@pytest.mark.parametrize("busy_poll", [True, False])
def test_a_sender_that_polls_says_how_long_and_one_that_sleeps_says_nothing(busy_poll: bool) -> None:
    with answering(OK) as server, a_sender(a_job(server.port, busy_poll=busy_poll)) as (made, hub, _, heard):
        made.start_clock(alarm.clock())
        made.launch(made.prepare(0))
        hub.run(lambda: bool(heard) and (not busy_poll or made.polled_s > 0))
        assert (made.polled_s > 0, heard) == (busy_poll, [("ok", 3)])


@pytest.mark.measures
@pytest.mark.skipif(crew.spare_cores(1) < 1, reason="needs two cores")
def test_a_run_that_polled_says_so_and_its_cpu_shares_leave_that_out() -> None:
    with serving() as server:
        found, _ = loadtest.run(options(server.url, qps=20, busy_poll=True))
    (sender,) = found.senders
    assert (found.ok, found.errors) == (20, {})
    assert sender.polled_share is not None
    assert sender.cpu_share is not None
    assert sender.polled_share > 0.1  # others may have had the core
    assert sender.polled_share + sender.cpu_share <= 1.05
    assert [fact.text for section in content.describe(found) for fact in section.facts if fact.label == "Busy poll"]


def test_polling_needs_a_core_to_spare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "_whole_cores", lambda: 2)
    with pytest.raises(BadInput, match=r"--busy-poll: 2 worker\(s\) would take a whole core each and leave none"):
        loadtest.run(options("http://127.0.0.1:9", qps=10, busy_poll=True, processes=2))


@pytest.mark.parametrize("may_poll", [True, False])
def test_lateness_is_answered_with_polling_where_cores_are_left(may_poll: bool) -> None:
    late = [RequestRecord(index=i, scheduled_s=i / 20, sent_s=i / 20 + 0.02, done_s=i / 20 + 0.1) for i in range(100)]
    found = validity.judge(late, cpu_share=0.1, asked_prompt_tokens=0, asked_output_tokens=0, may_poll=may_poll)
    assert any("sent late" in reason for reason in found.reasons)
    assert any("--busy-poll" in reason for reason in found.reasons) == may_poll


def test_a_calibration_of_a_client_that_polls_holds_for_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    polling = dataclasses.replace(calibration(), busy_poll=True)
    file = record.write(trust.cached(busy_poll=True), polling, hardware.machine())
    assert trust.load(None) is None
    assert trust.load(None, busy_poll=True) is not None
    with pytest.raises(BadInput, match="is of a client that polled"):
        trust.load(file)


# ---------------------------------------------------------------- Ctrl-C


def test_a_run_that_was_ended_by_hand_did_not_answer_unless_a_limit_was_missed() -> None:
    stopped = Validity(verdict="degraded", reasons=("stopped by hand after 3.0 of 60.0 s; requests in flight then are left out",))
    kept: LoadTest = dataclasses.replace(sample_records.loadtest(), validity=stopped, slo_met={"ttft_p95": True})
    assert load.exit_status(kept) == INTERRUPTED == 130
    assert load.exit_status(dataclasses.replace(kept, slo_met={"ttft_p95": False})) == 1


@pytest.mark.e2e
@needs_proc
def test_ctrl_c_on_the_command_ends_with_130_and_keeps_the_record(tmp_path: Path) -> None:
    sent, out = threading.Event(), tmp_path / "run.json"

    def plan(number: int) -> str:
        if number == 20:
            sent.set()
        return "ok"

    with serving(plan=plan) as server:
        command = [sys.executable, "-m", "mlsys_cli", "loadtest", server.url, "--qps", "40", "--duration", "60s", "--warmup", "0s"]
        with subprocess.Popen([*command, "-o", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            assert sent.wait(40)
            run.send_signal(signal.SIGINT)
            said, trouble = run.communicate(timeout=40)
    assert (run.returncode, "interrupted" in trouble) == (130, True), trouble
    assert "stopped by hand after" in said
    assert record.read(out, LoadTest).ok >= 15


@pytest.mark.e2e
@needs_proc
def test_ctrl_c_on_a_worker_that_waits_for_its_master_is_no_success() -> None:
    command = [sys.executable, "-m", "mlsys_cli", "loadtest", "--worker", "127.0.0.1:9"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr is not None
        assert "waiting for the master" in waiting.stderr.readline()
        waiting.send_signal(signal.SIGINT)
        _, trouble = waiting.communicate(timeout=40)
    assert waiting.returncode == 130, trouble
