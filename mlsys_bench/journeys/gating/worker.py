"""A side's worker process, from outside: started, asked for turns, ended.  What it says is in `bench/turns.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from mlsys_bench import errors
from mlsys_bench.bench.turns import PROTOCOL, TURNS
from mlsys_bench.errors import MeasurementFailed, NotComparable
from mlsys_bench.journeys.gating import running
from mlsys_bench.journeys.gating.source import Metric, Sampled
from mlsys_bench.types import Machine, Round
from mlsys_bench.verdicts import Subject

PATIENCE_S = 300.0  # with a worker that says nothing
_GRACE_S = 2.0
_LONGEST_LINE = 64 * 2**20  # bytes: a message of samples is far shorter
_USAGE = (2, 126, 127)  # how a program ends that does not know the benchmark, or is not there at all


class NoWorkerError(NotComparable):
    """A side that has no worker for this benchmark: it ended before it said hello, as for a wrong option."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """How the worker of one benchmark of one side is started.  `root` is where its code must come from."""

    argv: tuple[str, ...]
    root: Path
    folder: Path
    environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSource:
    """One benchmark of one side, a fresh process for every launch."""

    subject: Subject
    benchmark: str
    command: Command
    together: bool = True
    turns: int = TURNS

    def launch(self, pair: int) -> Process:
        """Start the worker; its imports go on while the other side's do."""
        return Process(self.subject, self.benchmark, self.command)


class Process:
    """A worker that runs."""

    def __init__(self, subject: Subject, benchmark: str, command: Command) -> None:
        self._who, self._command = f"{subject.label}: {benchmark}", command
        self._trouble: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  closed in `close`
        self._said = b""
        try:
            self._child = subprocess.Popen(
                command.argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._trouble,
                cwd=command.folder,
                env=dict(command.environment),
                start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends all of them
            )
        except OSError as error:
            self._trouble.close()
            raise NoWorkerError(f"{self._who}: cannot start {command.argv[0]}: {error.strerror or error}") from error

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the worker's process."""
        return (self._child.pid,)

    def hello(self) -> Machine:
        """Return what the worker runs on, once it is ready.

        Raises NotComparable where there is no such worker, it speaks another protocol, or measures code from elsewhere.
        """
        said = self._answer("hello", started=False)
        if said.get("protocol") != PROTOCOL:
            raise NotComparable(
                f"{self._who}: its worker speaks protocol {said.get('protocol')!r}, this mlsys speaks {PROTOCOL}; "
                "gate with the mlsys of the newer side, or from a newer baseline"
            )
        self._check_sources(said.get("sources"))
        machine: Machine = _convert(said.get("machine"), Machine, self._who)
        return machine

    def turn(self, number: int) -> list[Sampled]:
        """Return a round of each metric."""
        self._ask(f"turn {number}\n".encode())
        said = self._answer("turn")
        samples = said.get("samples")
        if said["turn"] != number or not isinstance(samples, list):
            raise MeasurementFailed(f"{self._who}: asked for turn {number}, its worker answered {json.dumps(said)[:120]}")
        return [self._sampled(sample) for sample in samples]

    def close(self) -> None:
        """End the worker and whatever it started."""
        if self._trouble.closed:
            return
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(_GRACE_S)  # its input has ended
        finally:
            running.end_group(self._child)
            self._child.stdout.close()
            self._trouble.close()

    def _check_sources(self, sources: object) -> None:
        root = self._command.root.resolve()
        if not isinstance(sources, str) or not Path(sources).resolve().is_relative_to(root):
            raise NotComparable(
                f"{self._who}: its worker measures the code in {sources!r}, not that of this side in {root}; "
                "the package must be imported from the folder the worker is started in"
            )

    def _ask(self, line: bytes) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(line)
            self._child.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _answer(self, kind: str, *, started: bool = True) -> dict[str, Any]:
        """Return the next message, of the kind that is due."""
        line = self._line()
        if not line:
            raise self._death() if started else self._absence()
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict) or ("error" not in said and kind not in said):
            raise MeasurementFailed(f"{self._who}: its worker wrote {line[:120]!r} where protocol {PROTOCOL} has {kind!r}")
        if "error" in said:
            raise _raised(said)(f"{self._who}: {said.get('text')}")
        return said

    def _line(self) -> bytes:
        """Return the next line, b'' at the end.  Raises MeasurementFailed when nothing comes for long."""
        assert self._child.stdout is not None
        fd = self._child.stdout.fileno()
        end = time.monotonic() + PATIENCE_S
        with selectors.DefaultSelector() as ready:
            ready.register(fd, selectors.EVENT_READ)
            while b"\n" not in self._said:
                if len(self._said) > _LONGEST_LINE:
                    raise MeasurementFailed(f"{self._who}: its worker wrote {len(self._said):,} bytes without an end of line")
                left_s = end - time.monotonic()
                if left_s <= 0 or not ready.select(left_s):
                    raise MeasurementFailed(f"{self._who}: its worker sent no line in {PATIENCE_S:g} s; last words: {self._last_words()}")
                got = os.read(fd, 65536)
                if not got:
                    return b""
                self._said += got
        line, _, self._said = self._said.partition(b"\n")
        return line

    def _sampled(self, sample: object) -> Sampled:
        """Return a metric and its round.  Keys that neither has are those of a newer protocol: the worker said it has none."""
        both = dict(sample) if isinstance(sample, dict) else {}
        taken = {name: both.pop(name, None) for name in ("values", "cpu_s", "involuntary")}
        if not taken["values"]:
            raise MeasurementFailed(f"{self._who}: its worker sent no values for {both.get('name')!r}")
        return _convert(both, Metric, self._who), _convert(taken, Round, self._who)

    def _death(self) -> MeasurementFailed:
        """Return the error of a worker that ended."""
        status = self._child.wait()
        how = f"exit {status}" if status >= 0 else f"killed by signal {-status}{', out of memory?' if status == -9 else ''}"
        return MeasurementFailed(f"{self._who}: its worker died ({how}): {self._last_words()}")

    def _absence(self) -> MeasurementFailed | NotComparable:
        """Return the error of a worker that never said hello: none of this name, or a broken one."""
        if self._child.wait() not in _USAGE:
            return self._death()
        return NoWorkerError(f"{self._who}: has no worker for it ({self._last_words()})")

    def _last_words(self) -> str:
        self._trouble.seek(0)
        said = (line.strip() for line in self._trouble.read().decode(errors="replace").splitlines())
        lines = [line for line in said if line and not line.startswith("USDT:")]  # torch's profiler says it began and ended
        return lines[-1] if lines else "it left no message"


def _raised(said: dict[str, Any]) -> type[errors.MlsysError]:
    """Return the class of an error that a worker names, a failed measurement where it is none of ours."""
    found = getattr(errors, str(said["error"]), None)
    if isinstance(found, type) and issubclass(found, errors.MlsysError) and found is not errors.Overload:  # that one is made of figures
        return found
    return MeasurementFailed


def _convert(data: object, cls: type[Any], who: str) -> Any:
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise MeasurementFailed(f"{who}: its worker sent what protocol {PROTOCOL} does not allow: {error}") from error
