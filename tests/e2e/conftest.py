"""The command line as its users meet it: real processes in a folder of their own, and records made by the real commands."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

PATIENCE_S = 120.0  # for a command on a busy machine
LAYOUT = ("--max-batch", "2", "--max-step-tokens", "64", "--max-context", "256")  # a layout that is measured in seconds
BUDGETS = ("12s", "60s")  # of the measurement; the longer one only where a busy machine measures too little in the first
MARK = "MLSYS_E2E_RUN"  # every process of a run carries this variable, so those that outlive it are found
TRAFFIC = ("--qps", "2", "--prompt-tokens", "60", "--output-tokens", "12", "--slo", "ttft_p95<5s,tpot_p95<2s")


class Cli:
    """Runs `mlsys` in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mark = uuid.uuid4().hex

    def __call__(self, *args: object) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        with self.start(*args) as process:
            try:
                out, err = process.communicate(timeout=PATIENCE_S)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(list(map(str, args)), process.returncode, out, err)

    def warm(self, commands: Iterable[list[str]]) -> list[subprocess.CompletedProcess[str]]:
        """Run many short commands, each in a fork of a process that has the program imported (see warm.py)."""
        asked = list(commands)
        done = subprocess.run(
            [sys.executable, str(Path(__file__).parent / "warm.py")], input=json.dumps(asked), capture_output=True, text=True,
            cwd=self.folder, env=self._environment(), timeout=PATIENCE_S * len(asked), check=True,
        )  # fmt: skip
        return [subprocess.CompletedProcess(args, *said) for args, said in zip(asked, json.loads(done.stdout), strict=True)]

    def start(self, *args: object, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """Start a command."""
        return subprocess.Popen(
            [sys.executable, "-m", "mlsys_cli", *map(str, args)],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            env=self._environment(),
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "COLUMNS": "100", "OPENBLAS_NUM_THREADS": "1", MARK: self.mark}

    def alive(self) -> list[int]:
        """Return the processes of this folder's commands that still run, children of children included."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/environ"):
            try:
                if f"{MARK}={self.mark}".encode() in entry.read_bytes():
                    found.append(int(entry.parent.name))
            except OSError:
                continue  # it ended while we looked, or is another user's
        return found


@pytest.fixture
def mlsys(tmp_path: Path) -> Cli:
    """Return what runs `mlsys` in an empty folder."""
    return Cli(tmp_path)


@pytest.fixture(scope="session")
def cli_in() -> Callable[[Path], Cli]:
    """Return what makes a `Cli` of a folder."""
    return Cli


@pytest.fixture(scope="session")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with bench.json, profile.json and plan.json as the real commands make them, and what --json printed (*.printed).

    It is made once: pytest's workers have a common folder, and the first who comes makes it while the others wait.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "records"
    with (folder.parent / "records.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "plan.printed").exists():
            folder.mkdir(exist_ok=True)
            _measure_fit_and_plan(Cli(folder))
    return folder


def _measure_fit_and_plan(mlsys: Cli) -> None:
    for budget in BUDGETS:
        only = ("--only", "memory,gemm,engine.step")
        done = mlsys("bench", "gpu", *only, *LAYOUT, "--budget", budget, "--json", "-o", "bench.json")
        (mlsys.folder / "bench.printed").write_text(done.stdout)
        fitted = mlsys("fit", "bench.json", "--json", "-o", "profile.json")
        if fitted.returncode == 0:
            break
    assert (done.returncode, done.stderr) == (0, "")
    assert (fitted.returncode, fitted.stderr) == (0, "")
    (mlsys.folder / "profile.printed").write_text(fitted.stdout)
    planned = mlsys("plan", "--from", "profile.json", *TRAFFIC, "--json", "-o", "plan.json")
    assert (planned.returncode, planned.stderr) == (0, "")
    (mlsys.folder / "plan.printed").write_text(planned.stdout)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the URL of `mlsys serve`, as it prints it."""
    process = Cli(tmp_path_factory.mktemp("server")).start("serve", "nano", *LAYOUT, "--port", "0")
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert " at http://" in line, process.stderr.read() if process.stderr else line
    yield line.rpartition(" at ")[2]
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, err) == (0, "")
