"""The servers that proofs hold the load client against: ours, and the C reference where it and gcc exist; and the machine's noise."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlsys_bench.loadtest import calibrate
from mlsys_bench.loadtest.truth import Behaviour

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "tools" / "truth_server.py"
SERVER_CORE = calibrate.server_core()


def has_reference() -> bool:
    """Say whether the C server can be built and run here."""
    return REFERENCE.is_file() and shutil.which("gcc") is not None


class Reference:
    """The C server, running; asked as ours is."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stats(self) -> dict[str, Any]:
        """Return what it did since the last reset."""
        return dict(json.loads(self._get("/stats")))

    def arrivals(self) -> Any:
        """Return (arrived, due) of each request in unix seconds; due is 0 where the client did not say."""
        return np.array([line.split() for line in self._get("/arrivals").decode().splitlines()], dtype=float).reshape(-1, 2)

    def reset(self) -> None:
        """Make it forget."""
        self._get("/reset")

    def _get(self, path: str) -> bytes:
        with closing(http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)) as connection:
            connection.request("GET", path)
            return connection.getresponse().read()


@contextmanager
def reference(how: Behaviour) -> Iterator[Reference]:
    """Give the C server with this behaviour."""
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    flags = {"--ttft": 1e3 * how.ttft_s, "--itl": 1e3 * how.itl_s, "--nsdelay": 1e3 * how.whole_s, "--tokens": how.tokens or 32}
    command = [sys.executable, str(REFERENCE), "--port", str(port), *(str(part) for pair in flags.items() for part in pair)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, preexec_fn=pin_to_server_core) as process:
        try:
            assert process.stderr is not None
            process.stderr.readline()
            yield Reference(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


def pin_to_server_core() -> None:
    """Give this process the server's core alone, where there are two."""
    if SERVER_CORE is not None:
        os.sched_setaffinity(0, {SERVER_CORE})


def pin_to_client_cores() -> None:
    """Give this process the cores that are not the server's."""
    if SERVER_CORE is not None:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {SERVER_CORE})


class Noise:
    """What else the machine did: other people's load and time that a hypervisor took."""

    def __init__(self) -> None:
        self._before = _ticks()

    def said(self) -> str:
        """Return it in words, since this was made."""
        steal, total = (now - before for now, before in zip(_ticks(), self._before, strict=True))
        share = f", {steal / total:.1%} stolen" if total else ""
        return f"load {os.getloadavg()[0]:.1f}{share}"


def _ticks() -> tuple[int, int]:
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0, 0
    numbers = [int(n) for n in stat.read_text().splitlines()[0].split()[1:9]]
    return numbers[7], sum(numbers)
