"""`mlsys gate run` on commands and servers, as processes: what is found, how it ends, what is left."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from mlsys_bench import record
from mlsys_bench.loadtest import calibrate
from mlsys_bench.loadtest.truth import Behaviour
from mlsys_bench.loadtest.truth.client import serving
from mlsys_bench.verdicts import GateRun

if TYPE_CHECKING:
    from conftest import Cli

pytestmark = pytest.mark.e2e
PATIENCE_S = 120.0


def burning(seconds: float) -> str:
    """Return a command that uses so much CPU time, whatever its neighbours do."""
    return shlex.join(
        [sys.executable, "-I", "-S", "-c", f"import time\nheld = bytearray(20_000_000)\nwhile time.process_time() < {seconds}: pass"]
    )


def recorded(path: Path) -> GateRun:
    _, value = record.load(path)
    assert isinstance(value, GateRun)
    return value


def text_of(said: subprocess.CompletedProcess[str]) -> str:
    return f"{said.stdout}\n{said.stderr}"


# ---------------------------------------------------------------- commands


def test_a_planted_slowdown_of_a_command_fails_the_build(mlsys: Cli, tmp_path: Path) -> None:
    """30 % more work in each run: the CPU time says so on the busiest machine, and the file decides the same again."""
    said = mlsys("gate", "run", "--base-command", burning(0.06), "--cand-command", burning(0.078), "--tolerance", "10%", "-o", "gate.json")
    assert said.returncode == 1, text_of(said)
    found = recorded(tmp_path / "gate.json")
    words = {f.name: f.verdict for f in found.verdict.findings}
    assert "regression" in (words["command.wall"], words["command.wall.cpu"])
    assert words["command.peak_memory"] == "pass"
    assert (found.base.kind, found.base.label) == ("command", burning(0.06))
    assert found.contention.verdict in ("quiet", "contended", "unknown")
    assert {c.side for c in found.conditions} == {"base", "cand"}
    assert mlsys.alive() == []


def test_a_command_against_itself_is_no_regression(mlsys: Cli, tmp_path: Path) -> None:
    said = mlsys(
        "gate", "run", "--base-command", burning(0.03), "--cand-command", burning(0.03), "--tolerance", "15%", "--budget", "3s",
        "-o", "gate.json",
    )  # fmt: skip
    assert said.returncode in (0, 3), text_of(said)
    assert recorded(tmp_path / "gate.json").verdict.verdict in ("pass", "improved", "inconclusive")


def test_a_command_that_fails_is_no_measurement(mlsys: Cli) -> None:
    said = mlsys("gate", "run", "--base-command", "true", "--cand-command", "sh -c 'echo no such kernel >&2; exit 9'")
    assert said.returncode == 5
    assert "the candidate ended with status 9: no such kernel" in said.stderr


def test_ctrl_c_keeps_whole_pairs_and_leaves_no_process(mlsys: Cli, tmp_path: Path) -> None:
    """The seventh run takes a minute; it is under way when the person has enough."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    run = shlex.join(["sh", "-c", "echo x >> log; echo $$ > fifo; test $(wc -l < log) -lt 7 || exec sleep 60"])
    with (
        os.fdopen(os.open(fifo, os.O_RDWR), "rb") as told,
        mlsys.start(
            "gate", "run", "--base-command", run, "--cand-command", run, "--warm-runs", 0, "--no-instructions", "-o", "gate.json"
        ) as process,
    ):
        pids = [int(told.readline()) for _ in range(7)]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, f"{out}\n{err}"
    found = recorded(tmp_path / "gate.json")
    assert found.ended == "interrupted"
    assert [len(m.launches) for m in found.base_bench.measurements if m.name == "command.wall"] == [3]
    assert mlsys.alive() == []
    assert not Path(f"/proc/{pids[-1]}").exists()


# ---------------------------------------------------------------- servers


CORE = calibrate.server_core()  # these servers watch the clock closely: on the client's own core they keep it from its schedule
PINNED = () if CORE is None else ("--core", str(CORE))


def command(ttft: str) -> str:
    """Return a server that answers after so long, by an absolute schedule."""
    return shlex.join(
        [sys.executable, "-m", "mlsys_bench.loadtest.truth", "--port", "{port}", "--ttft", ttft, "--itl", "2ms", "--tokens", "8", *PINNED]
    )


def believed(mlsys: Cli, *args: object) -> subprocess.CompletedProcess[str]:
    """Run a gate of servers, once more where neighbours kept the load client from its schedule: the gate then says nothing, and rightly."""
    said = mlsys(*args)
    return mlsys(*args) if said.returncode == 5 and "the load test is invalid" in said.stderr else said


SHORT = ("--qps", 100, "--duration-each", "500ms", "--turns", 1, "--warm-runs", 0, "--prompt-tokens", 8, "--output-tokens", 8)


@pytest.mark.measures
def test_live_servers_are_at_most_suspect(mlsys: Cli, tmp_path: Path) -> None:
    """One launch each: how much two launches of the same differ is not measured, however far these are apart."""
    with serving(Behaviour(ttft_s=0.03, itl_s=0.002), CORE) as base, serving(Behaviour(ttft_s=0.09, itl_s=0.002), CORE) as cand:
        said = believed(mlsys, "gate", "run", "--base", base.url, "--cand", cand.url, *SHORT, "-o", "gate.json")
    assert said.returncode == 3, text_of(said)
    found = recorded(tmp_path / "gate.json")
    assert {f.name: f.verdict for f in found.verdict.findings}["ttft"] == "suspect"
    assert (found.base.kind, found.base.label) == ("url", base.url)
    assert "one launch each" in found.remarks[0]


@pytest.mark.measures
def test_a_slower_server_fails_the_build(mlsys: Cli, tmp_path: Path) -> None:
    """50 instead of 30 ms to the first token: found from fresh launches of both, a turn of load each."""
    said = believed(
        mlsys, "gate", "run", "--base-serve", command("30ms"), "--cand-serve", command("50ms"), *SHORT, "--slo", "ttft_p50<40ms",
        "--tolerance", "20%", "-o", "gate.json",
    )  # fmt: skip
    assert said.returncode == 1, text_of(said)
    found = recorded(tmp_path / "gate.json")
    words = {f.name: f.verdict for f in found.verdict.findings if f.kind == "relative"}
    assert words["ttft"] == "regression"
    assert {m.name for m in found.base_bench.measurements} == {"ttft", "tpot", "itl", "e2e", "availability", "goodput"}
    assert "a pair of launches takes" in said.stderr
    assert mlsys.alive() == []
