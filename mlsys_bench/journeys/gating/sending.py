"""What a request costs the load generator, without a network and without a hub to wait for."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable
from typing import Any

from mlsys_bench.bench.harness import Spec
from mlsys_bench.bench.turns import Benchmark
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.loadtest import endpoints, job, payloads
from mlsys_bench.loadtest.alarm import READ, WRITE
from mlsys_bench.loadtest.sender import Sender
from mlsys_bench.types import Scalar

REQUESTS, EVENTS = 8, 32  # of an iteration; of each answer


def sender() -> Benchmark:
    """Return what a request costs the load generator: made, sent over a loopback socket, its stream taken in, read and written down.

    The sender, its connections and its readers are the load worker's own.  The hub is not gevent's: callbacks are called in the order in
    which a hub would, so that nothing is waited for, and all that is timed is work.
    """
    ours = Sending()
    parameters: dict[str, Scalar] = {"endpoint": "completions", "tokens": EVENTS, "prompt_chars": 512}
    return Benchmark(
        spec=Spec(name="loadtest.sender", unit="s", better="lower", parameters=parameters),
        work=ours.go,
        per=REQUESTS,
    )


class Sending:
    """A sender, and beside it the server end of its one connection."""

    def __init__(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        work = job.Job(
            scheme="http", host="127.0.0.1", address="127.0.0.1", port=listener.getsockname()[1],
            endpoint=endpoints.Spec(name="completions", path="/v1/completions", model="tiny"),
            payload=payloads.Spec(prompt_chars=[512], output_tokens=[EVENTS], seed=1), api_key=None, scheduled_s=[0.0], users=None,
            duration_s=1e9, warmup_s=0.0, timeout_s=10.0, drain_s=5.0, connections=1, core=None, seed=1, rows="",
        )  # fmt: skip
        self._loop, self.rows, self._count = _ByHand(), _Counted(), 0
        self.sender = Sender(work, self._loop, self.rows, lambda *_: None)  # type: ignore[arg-type]  # of a file it only writes
        self.sender.links.fill(1, lambda: None)
        self._loop.call(WRITE)
        self._server = listener.accept()[0]
        self._server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # each event by itself, as servers send them
        listener.close()
        self._chunks = [_STREAM, *(_chunk(_TOKEN) for _ in range(EVENTS)), _END]

    def close(self) -> None:
        """Close both ends."""
        self.sender.close()
        self._server.close()

    def go(self) -> None:
        """Send requests, one after the other, and write down what came of them.  Raises MeasurementFailed for one that failed."""
        done = self.sender.ok
        for _ in range(REQUESTS):
            flight = self.sender.prepare(self._count, 0.0)
            self._count += 1
            self.sender.launch(flight)
            self._server.recv(65536)
            for chunk in self._chunks:
                self._server.sendall(chunk)
                self._loop.call(READ)
            self._loop.call(_IDLE)
        self.sender.flush()
        if self.sender.ok != done + REQUESTS:
            raise MeasurementFailed(f"loadtest.sender: {done + REQUESTS - self.sender.ok} of {REQUESTS} requests were not answered")


_IDLE = -1
PATIENCE_S = 5.0  # with a loopback connection
_STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_TOKEN = b'data: {"id":"cmpl-1","object":"text_completion","created":0,"choices":[{"index":0,"text":"a","finish_reason":null}]}\n\n'


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_END = (
    _chunk(b'data: {"choices":[],"usage":{"prompt_tokens":128,"completion_tokens":%d}}\n\n' % EVENTS)
    + _chunk(b"data: [DONE]\n\n")
    + b"0\r\n\r\n"
)  # fmt: skip


class _Counted:
    """A file whose bytes are only counted."""

    def __init__(self) -> None:
        self.length = 0

    def write(self, data: bytes) -> int:
        """Take bytes."""
        self.length += len(data)
        return len(data)


class _Watcher:
    """What calls back while it is started."""

    priority = 0

    def __init__(self, kind: int, fd: int = -1) -> None:
        self.kind, self.fd = kind, fd
        self.callback: Callable[[], Any] | None = None

    def start(self, callback: Callable[..., Any], *args: Any) -> None:
        """Begin, or go on with another callback."""
        self.callback = (lambda: callback(*args)) if args else callback

    def stop(self) -> None:
        """Call no more."""
        self.callback = None

    close = stop


class _ByHand:
    """The face of a hub that calls when it is told to."""

    def __init__(self) -> None:
        self._watchers: list[_Watcher] = []

    def io(self, fd: int, events: int) -> _Watcher:
        """Return a watcher of a connection."""
        return self._new(events, fd)

    def timer(self, _after: float) -> _Watcher:
        """Return a watcher of time, which never comes."""
        return self._new(0)

    def idle(self) -> _Watcher:
        """Return a watcher of rest."""
        return self._new(_IDLE)

    def prepare(self) -> _Watcher:
        """Return a watcher of a turn's end, which never comes."""
        return self._new(0)

    def call(self, kind: int) -> None:
        """Call the one of this kind that was made last and is started, as soon as its connection is ready."""
        for watcher in reversed(self._watchers):
            if watcher.kind == kind and watcher.callback is not None:
                if kind == READ:
                    select.select([watcher.fd], [], [], PATIENCE_S)
                watcher.callback()
                return

    def _new(self, kind: int, fd: int = -1) -> _Watcher:
        self._watchers.append(_Watcher(kind, fd))
        return self._watchers[-1]
