"""One run of a command: how long it took, what it used, how it ended.  Nothing of it is left behind.

| figure        | counts                                                                                                            |
|---------------|-------------------------------------------------------------------------------------------------------------------|
| wall          | from the start of the command to the end of its first process                                                     |
| CPU           | user and system time of that process and of every descendant that was waited for (wait4(2)); not of daemons        |
| peak memory   | the largest resident set of any one of these processes, not their sum; None below what the stopwatch itself has   |
| involuntary   | how often they were forced off a CPU                                                                              |
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlsys_bench import hardware
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys.gating import interrupts
from mlsys_bench.types import Machine

_STOPWATCH = Path(__file__).with_name("stopwatch.py")
_OPERATORS = set("|&;<>()")
_PATIENCE_S = 2.0  # for a group that was asked to end
_WORDS = 400  # characters of last words


@functools.cache
def here() -> Machine:
    """Return this machine, looked at once: both sides run on it, or are loaded from it."""
    return hardware.machine()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """What one run used."""

    wall_s: float
    cpu_s: float
    peak_bytes: int | None
    involuntary: int
    status: int  # exit status, or -N for signal N
    last_words: str
    left_behind: bool  # processes that outlived it, which were ended


def words(text: str, option: str = "--command") -> list[str]:
    """Return a command as typed in words.  No shell reads it: what only a shell understands is refused.  Raises BadInput."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise BadInput(f"{option} {text!r}: {str(error).lower()}") from None
    if not found:
        raise BadInput(f"{option} is empty: name a program, e.g. 'python bench.py'")
    operator = _operator(text)
    if operator is not None:
        raise BadInput(f"{option} {text!r}: {operator!r} needs a shell, and none is used; write sh -c {shlex.quote(text)}")
    if "=" in found[0].partition("/")[0]:
        raise BadInput(f"{option} {text!r}: {found[0]!r} is no program; write env {text}")
    return found


def _operator(text: str) -> str | None:
    """Return the first character that a shell would act on: neither quoted nor escaped."""
    quote, is_escaped = "", False
    for at in text:
        if is_escaped:
            is_escaped = False
        elif at == "\\" and quote != "'":
            is_escaped = True
        elif at in "'\"" and quote in ("", at):
            quote = "" if quote else at
        elif at in _OPERATORS and not quote:
            return at
    return None


def run(
    command: Sequence[str],
    *,
    folder: Path,
    environment: Mapping[str, str],
    timeout_s: float,
    on_start: Callable[[int], None] = lambda _: None,
    sweeps: bool = True,
) -> Ran:
    """Run a command to its end.  Raises BadInput where there is no such program, TimeoutError where it takes too long.

    It has a session of its own, an empty standard input, and files for what it writes.  Ctrl-C, like the timeout, ends all of the session's
    processes; so does the command's end, unless it is there to start others (`sweeps` is false).
    """
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as told, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as trouble:
        child: subprocess.Popen[bytes] | None = None
        try:
            with interrupts.held():  # none comes between the start and the note of it
                child = _started(command, folder, environment, writing, out, trouble)
            on_start(child.pid)
            said = _heard(told, timeout_s)
        except BaseException:
            if child is not None:
                with interrupts.held():
                    end_group(child)
            raise
        left_behind = _sweep(child, sweeps)
        last_words = last_line(trouble) or last_line(out)
    return _ran(said, command, folder, last_words, left_behind)


def _started(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], told: int, out: IO[bytes], trouble: IO[bytes]
) -> subprocess.Popen[bytes]:
    """Start the stopwatch, which starts the command; our end of what it writes to is closed."""
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", str(_STOPWATCH), str(told), *command],
            cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=out, stderr=trouble,
            pass_fds=[told], start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(told)


def _heard(told: IO[bytes], timeout_s: float) -> str:
    """Return what the stopwatch wrote at the end."""
    with selectors.DefaultSelector() as selector:
        selector.register(told, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            raise TimeoutError(f"ran longer than {timeout_s:g} s")
    return told.read().decode()


def _ran(said: str, command: Sequence[str], folder: Path, last_words: str, left_behind: bool) -> Ran:
    if said.startswith("error "):
        raise BadInput(f"{command[0]!r} cannot be run in {folder}: {said.removeprefix('error ').lower()}")
    if not said:
        return Ran(wall_s=0.0, cpu_s=0.0, peak_bytes=None, involuntary=0, status=-9, last_words=last_words, left_behind=left_behind)
    wall_s, user_s, system_s, peak, floor, involuntary, status = (float(word) for word in said.split())
    return Ran(
        wall_s=wall_s,
        cpu_s=user_s + system_s,
        peak_bytes=int(peak) if peak > floor else None,
        involuntary=int(involuntary),
        status=os.waitstatus_to_exitcode(int(status)),
        last_words=last_words,
        left_behind=left_behind,
    )


# ---------------------------------------------------------------- ends


def end_group(child: subprocess.Popen[bytes]) -> None:
    """End a process and all of its group: asked, then killed.  A stopped one is woken, else it could not hear."""
    for number in (signal.SIGTERM, signal.SIGCONT):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)
    try:
        child.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        pass  # it is killed below
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def _sweep(child: subprocess.Popen[bytes], sweeps: bool) -> bool:
    """End what outlived the command, and say whether there was any."""
    child.wait()
    try:
        os.killpg(child.pid, signal.SIGKILL if sweeps else 0)
    except ProcessLookupError:
        return False
    return True


def last_line(file: IO[bytes]) -> str:
    """Return the last line with text in it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 4 * _WORDS))
    lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:_WORDS] if lines else ""
