"""A server as a child process, for programs that want one for a while."""

from __future__ import annotations

import http.client
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from types import TracebackType
from typing import IO, Any
from urllib.parse import urlsplit

import msgspec

from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.serve.options import Options, check

_STOP_S = 10.0
_TAIL_BYTES = 600


class ServerProcess:
    """A running server.  It ends with `stop`, at the end of a `with` block, and when this process is gone, however that happened."""

    def __init__(self, process: subprocess.Popen[bytes], stderr: IO[bytes], ready_line: str) -> None:
        self.process, self.ready_line = process, ready_line
        self.url = ready_line.rpartition(" at ")[2]
        self._stderr = stderr

    def health(self) -> dict[str, Any]:
        """Return what `/health` says: layout, limits, free blocks."""
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=10)  # unlike urllib, through no proxy
        try:
            connection.request("GET", "/health")
            body: dict[str, Any] = json.load(connection.getresponse())
        finally:
            connection.close()
        return body

    def stderr_tail(self) -> str:
        """Return the last that the server and its engine had to say."""
        return _tail(self._stderr)

    def stop(self) -> int:
        """End the server and its engine; return its exit status."""
        status = _end(self.process)
        self._stderr.close()
        return status

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def start(options: Options, *, timeout_s: float = 120.0) -> ServerProcess:
    """Start a server and wait until it answers.  `port=0` takes a free one.  Raises MeasurementFailed with what it said last."""
    check(options)
    stderr = tempfile.TemporaryFile()  # noqa: SIM115  a pipe nobody reads would fill up; closed in `stop`
    command = [sys.executable, "-m", "mlsys_bench.serve", msgspec.json.encode(replace(options, stop_with_stdin=True)).decode()]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr)
    try:
        line = _first_line(process, timeout_s)
        if " at http" not in line:
            _end(process)
            raise MeasurementFailed(f"the server did not come up within {timeout_s:g} s: {_tail(stderr) or 'it said nothing'}")
    except BaseException:
        _end(process)
        stderr.close()
        raise
    return ServerProcess(process, stderr, line)


def _first_line(process: subprocess.Popen[bytes], timeout_s: float) -> str:
    """Return the first line of a process's output, or what there is of it when time is up or the process has ended."""
    assert process.stdout is not None
    number, line = process.stdout.fileno(), b""
    deadline_s = time.monotonic() + timeout_s
    while not line.endswith(b"\n"):
        is_there, _, _ = select.select([number], [], [], max(deadline_s - time.monotonic(), 0))
        data = os.read(number, 4096) if is_there else b""
        if not data:
            break
        line += data
    return line.decode(errors="replace").strip()


def _end(process: subprocess.Popen[bytes]) -> int:
    """End a process in order, or by force; the engine it started sees the pipe close and ends too."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    return process.returncode


def _tail(stderr: IO[bytes]) -> str:
    """Return the last that was said, in one line."""
    stderr.seek(0, os.SEEK_END)
    stderr.seek(max(stderr.tell() - _TAIL_BYTES, 0))
    return " | ".join(line.strip() for line in stderr.read().decode(errors="replace").splitlines() if line.strip())
