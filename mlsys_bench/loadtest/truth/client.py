"""Start a truth server in a process of its own, and ask it what it did."""

from __future__ import annotations

import http.client
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import msgspec

from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.loadtest.truth import Behaviour, Row
from mlsys_bench.loadtest.truth.__main__ import flags

_START_S = 60.0  # on a machine that is busy


class Truth:
    """A server that runs."""

    def __init__(self, url: str) -> None:
        self.url = url

    def stats(self) -> dict[str, Any]:
        """Return what it did since the last reset, in figures."""
        return dict(msgspec.json.decode(self._get("/stats")))

    def rows(self) -> list[Row]:
        """Return every request since the last reset."""
        return msgspec.json.decode(self._get("/requests"), type=list[Row])

    def reset(self) -> None:
        """Make it forget."""
        self._get("/reset")

    def _get(self, path: str) -> bytes:
        with closing(http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=30)) as connection:
            connection.request("GET", path, headers={"Connection": "close"})
            return connection.getresponse().read()


@contextmanager
def serving(how: Behaviour, core: int | None = None) -> Iterator[Truth]:
    """Give a server that behaves so, on a core of its own; it ends with the block, or when this process dies."""
    command = [sys.executable, "-m", "mlsys_bench.loadtest.truth", "--port=0", "--until-stdin-closes", *flags(how)]
    pinned = [] if core is None else [f"--core={core}"]
    with subprocess.Popen([*command, *pinned], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Truth(_url(process))
        finally:
            process.terminate()


def _url(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        said = process.stdout.readline() if selector.select(_START_S) else ""
    if not said.startswith("truth server on "):
        process.kill()
        raise MeasurementFailed(f"the truth server did not start: {process.stderr.read().strip() or 'it said nothing'}")
    return said.split()[-1]
