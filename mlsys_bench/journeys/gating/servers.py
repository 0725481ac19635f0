"""A server of one side, started afresh for a launch: on a port of its own, stopped while it is not its turn, ended with all it started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from mlsys_bench import units
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys.gating import running

PORT = "{port}"
_LOOK_S = 0.05


class Server:
    """A process group that answers on a port of 127.0.0.1."""

    def __init__(self, words: Sequence[str], *, folder: Path, environment: Mapping[str, str], name: str) -> None:
        self.port = free_port()
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        try:
            self.process = subprocess.Popen(
                [word.replace(PORT, str(self.port)) for word in words],
                cwd=folder, env=dict(environment), stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._log.close()
            raise BadInput(f"{words[0]!r} cannot be run in {folder}: {(error.strerror or str(error)).lower()}") from error

    @property
    def url(self) -> str:
        """Return where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until(self, is_ready: Callable[[], str | None], timeout_s: float) -> None:
        """Wait until it answers: until there is no reason left why not.  Raises MeasurementFailed with its last words."""
        wait_until(lambda: self._trouble() or is_ready(), timeout_s, self.name, self.check)

    def _trouble(self) -> str | None:
        with socket.socket() as sock:
            sock.settimeout(1.0)
            return None if sock.connect_ex(("127.0.0.1", self.port)) == 0 else f"nothing listens on port {self.port}"

    def check(self) -> None:
        """Raise MeasurementFailed when the process is gone."""
        status = self.process.poll()
        if status is not None:
            how = f"ended with status {status}" if status >= 0 else f"was killed by signal {-status}"
            raise MeasurementFailed(f"the server of the {self.name} {how}: {running.last_line(self._log) or 'it said nothing'}")

    def pause(self) -> None:
        """Stop all of its processes: an idle server may well be busy waiting, at the cost of the other side."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on.  Raises MeasurementFailed when it is gone."""
        self.check()
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """End it and what it started.  May be called again."""
        running.end_group(self.process)
        self._log.close()

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until(trouble: Callable[[], str | None], timeout_s: float, name: str, check: Callable[[], None] = lambda: None) -> None:
    """Wait until there is no trouble left.  Raises MeasurementFailed with the last one after so long."""
    deadline = time.monotonic() + timeout_s
    while (why := trouble()) is not None:
        check()
        if time.monotonic() > deadline:
            raise MeasurementFailed(f"the server of the {name} was not ready within {units.show_s(timeout_s)}: {why}")
        time.sleep(_LOOK_S)
