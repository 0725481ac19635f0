"""Processes that are started before it is known what they will be told: nobody waits for what they import.

Only the standard library, and nothing of ours: a command calls `start` as its first act, half a second before it could import who needs it.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import tempfile
from typing import IO, NamedTuple


class Started(NamedTuple):
    """A process that reads lines and writes lines; what it complains of goes to a file."""

    process: subprocess.Popen[bytes]
    errors: IO[bytes]


_waiting: dict[str, Started] = {}


def start(module: str) -> None:
    """Start a module now; the first `process` of that module is this one.  One that nobody takes ends with us."""
    if module not in _waiting:
        _waiting[module] = _started([module])


def process(module: str, *arguments: str) -> Started:
    """Return a process that runs a module, with pipes, in a session of its own."""
    waiting = None if arguments else _waiting.pop(module, None)
    if waiting is not None and waiting.process.poll() is None:
        return waiting
    if waiting is not None:
        waiting.errors.close()
    return _started([module, *arguments])


def end() -> None:
    """Leave none that nobody took."""
    while _waiting:
        _, (left, errors) = _waiting.popitem()
        left.kill()
        left.communicate()
        errors.close()


def _started(words: list[str]) -> Started:
    errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
    made = subprocess.Popen(
        [sys.executable, "-m", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
    )
    return Started(made, errors)


atexit.register(end)
