"""Many commands in forks of one process that has the program imported: real processes and statuses, a third of the time.

Reads a JSON list of argument lists from stdin, runs each in the current folder, as many at once as there are cores, and writes a JSON list
of [status, stdout, stderr] to stdout.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from typing import IO

import mlsys_bench.plan
import mlsys_bench.report.terminal
import mlsys_bench.scenario
import mlsys_cli.main
from mlsys_bench.journeys import backtest, benchmark, fitting, limits, load, probe, production

_LOADED = (  # what most commands import, or what takes long
    mlsys_bench.plan, mlsys_bench.report.terminal, mlsys_bench.scenario, backtest, benchmark, fitting, limits, load, probe, production,
)  # fmt: skip

Said = tuple[int, str, str]


def main() -> None:
    """Run what stdin asks for."""
    asked: list[list[str]] = json.load(sys.stdin)
    said: list[Said] = [(0, "", "")] * len(asked)
    running: dict[int, tuple[int, IO[bytes], IO[bytes]]] = {}
    waiting = list(enumerate(asked))
    gc.freeze()  # the last collection of each fork would copy all that is imported, only to look at it: half of its time
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            number, arguments = waiting.pop(0)
            out, err = _file(), _file()
            running[_started(arguments, out, err)] = (number, out, err)
        process, status = os.wait()
        number, out, err = running.pop(process)
        said[number] = (os.waitstatus_to_exitcode(status), _read(out), _read(err))
    json.dump(said, sys.stdout)


def _started(arguments: list[str], out: IO[bytes], err: IO[bytes]) -> int:
    """Return the process of a fork that runs one command and ends as the program does."""
    process = os.fork()
    if process == 0:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = ["mlsys", *arguments]
        mlsys_cli.main.run()
        raise AssertionError("`run` ends its process")
    return process


def _file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _read(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode()


if __name__ == "__main__":
    main()
