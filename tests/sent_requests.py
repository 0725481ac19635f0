"""The sender of the load worker on a hub of the standard library, against a server that gives the answers it is told."""

# ruff: noqa: D102  the server's methods are named for what they do

from __future__ import annotations

import io
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlsys_bench.loadtest import endpoints, job, loops, payloads, sender, spool
from mlsys_bench.loadtest.alarm import clock
from mlsys_bench.types import Outcome, RequestRecord
from tests.hub import Hub


def text(token: str, finish: str = "null") -> bytes:
    return b'data: {"choices":[{"index":0,"text":"%b","finish_reason":%b}]}\n\n' % (token.encode(), finish.encode())


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}\n\n'
END = chunk(USAGE) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
OK = STREAM + chunk(text("a")) + chunk(text("b")) + chunk(text("c", '"length"')) + END
Answer = Callable[[int, socket.socket, bytes], bool]  # number of the request, connection, head -> whether it stays open


def whole(status: int, body: bytes = b"{}", head: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\n%bContent-Length: %d\r\n\r\n%b" % (status, head, len(body), body)


class Server(socketserver.ThreadingTCPServer):
    """Answers the n-th request with the n-th answer, the last one again and again, and keeps the heads and bodies."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def __init__(self, answers: list[bytes | Answer], tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.tls = answers, tls
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.connections = self.gone = 0
        self.over = threading.Event()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, *_: object) -> None:
        """Clients of these tests leave as they like."""


class Handler(socketserver.BaseRequestHandler):
    """One connection of it."""

    server: Server

    def setup(self) -> None:
        self.server.connections += 1
        if self.server.tls is not None:
            self.request = self.server.tls.wrap_socket(self.request, server_side=True)

    def handle(self) -> None:
        while (got := read_request(self.request)) is not None:
            number = len(self.server.heads)
            self.server.heads.append(got[0])
            self.server.bodies.append(got[1])
            answer = self.server.answers[min(number, len(self.server.answers) - 1)]
            if isinstance(answer, bytes):
                self.request.sendall(answer)
            elif not answer(number, self.request, got[0]):
                return
        self.server.gone += 1

    def finish(self) -> None:
        self.request.close()


def read_request(sock: socket.socket) -> tuple[bytes, bytes] | None:
    data = b""
    while b"\r\n\r\n" not in data:
        got = sock.recv(65536)
        if not got:
            return None
        data += got
    head, _, body = data.partition(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")), 0)
    while len(body) < length:
        body += sock.recv(65536)
    return head, body


@contextmanager
def serving(*answers: bytes | Answer, tls: ssl.SSLContext | None = None) -> Iterator[Server]:
    with Server(list(answers), tls) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


def a_job(port: int, **more: Any) -> job.Job:
    usual: dict[str, Any] = {
        "scheme": "http", "host": "127.0.0.1", "address": "127.0.0.1", "port": port,
        "endpoint": endpoints.Spec(name="completions", path="/v1/completions", model="tiny"),
        "payload": payloads.Spec(prompt_chars=[20], output_tokens=[3], seed=1), "api_key": None, "scheduled_s": [0.0], "users": None,
        "duration_s": 0.1, "warmup_s": 0.0, "timeout_s": 10.0, "drain_s": 5.0, "connections": 1, "core": None, "seed": 1,
        "rows": "",
    }  # fmt: skip
    return job.Job(**{**usual, **more})


Heard = list[tuple[Outcome, int]]


@contextmanager
def a_sender(work: job.Job) -> Iterator[tuple[sender.Sender, Hub, io.BytesIO, Heard]]:
    hub, rows, heard = Hub(), io.BytesIO(), Heard()
    made = sender.Sender(work, hub, rows, lambda outcome, _at, _took, tokens: heard.append((outcome, tokens)))
    try:
        yield made, hub, rows, heard
    finally:
        made.close()


def sent(work: job.Job, tmp_path: Path) -> list[RequestRecord]:
    """Do a job from its connections to its last row."""
    with a_sender(work) as (made, hub, rows, heard):
        filled: list[bool] = []
        made.links.fill(work.connections, lambda: filled.append(True))
        hub.run(lambda: bool(filled))
        made.start_clock(clock() + 0.01)
        running = loops.lanes(made, work)
        ended: list[bool] = []
        for lane in running:
            lane.begin(lambda: ended.append(True))
        hub.run(lambda: len(ended) == len(running) and not made.in_flight)
        made.end_all("unfinished")
        path = tmp_path / "rows"
        path.write_bytes(rows.getvalue())
    found = spool.read(path)
    assert sorted(r.outcome for r in found) == sorted(outcome for outcome, _ in heard)
    return found


def one(work: job.Job, tmp_path: Path) -> RequestRecord:
    (record,) = sent(work, tmp_path)
    return record
