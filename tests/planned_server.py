"""A server that answers streams by a plan of misdeeds, the options of a short run against it, and the processes of a run."""

# ruff: noqa: D102  methods are named for what they do

from __future__ import annotations

import json
import os
import select
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import loadtest
from mlsys_bench.types import Lengths
from tests.fault_server import Connection, answering

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir() or not hasattr(os, "pidfd_open"), reason="needs Linux's /proc and pidfd"
)


def event(choice: dict[str, Any] | None = None, **more: object) -> bytes:
    return b"data: " + json.dumps({"id": "x", "choices": [choice] if choice else [], **more}).encode() + b"\n\n"


def text(token: str, finish: str | None = None) -> bytes:
    return event({"index": 0, "text": token, "finish_reason": finish})


def usage(prompt: int, completion: int) -> bytes:
    return event(usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})


DONE = b"data: [DONE]\n\n"


class Server(socketserver.ThreadingTCPServer):
    """Answers streams by a plan of misdeeds and keeps a ledger: (due, kind) of each."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(
        self, plan: Callable[[int], str] = lambda _: "ok", count: Callable[[str], int] = len, refuses_ignore_eos: bool = False
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.count, self.refuses_ignore_eos = plan, count, refuses_ignore_eos
        self.ledger: list[tuple[float, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        return (self.tls.wrap_socket(sock, server_side=True) if self.tls else sock), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that leaves is part of these tests."""

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(**how: Any) -> Iterator[Server]:
    with answering(Server(**how)) as server:
        yield server


class Handler(Connection):
    """One connection."""

    server: Server

    def answer(self, line: bytes, headers: Any, body: dict[str, Any]) -> bool:
        if line.startswith(b"GET"):
            return self.json(200, {"data": [{"id": "tiny"}, {"id": "other"}]})
        if self.server.refuses_ignore_eos and "ignore_eos" in body:
            return self.json(400, {"error": {"message": "unknown field ignore_eos"}})
        prompt = self.server.count(body["prompt"] if "prompt" in body else body["messages"][0]["content"])
        if not body.get("stream"):
            return self.json(200, {"choices": [{"text": "a"}], "usage": {"prompt_tokens": prompt, "completion_tokens": 1}})
        with self.server.lock:
            kind = self.server.plan(len(self.server.ledger))
            self.server.ledger.append((float(headers["x-mlsys-sched"]), kind))
            self.server.bodies.append(body)
        return bool(getattr(self, kind)(prompt, body["max_tokens"]))

    def json(self, status: int, body: object) -> bool:
        data = json.dumps(body).encode()
        self.wfile.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data), data))
        return True

    def head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def ok(self, prompt: int, tokens: int) -> bool:
        self.head()
        for i in range(tokens):
            self.chunk(text("a", "length" if i + 1 == tokens else None))
        self.chunk(usage(prompt, tokens) + DONE)
        self.wfile.write(b"0\r\n\r\n")
        return True

    def ok_until_close(self, prompt: int, tokens: int) -> bool:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text("a") * tokens + usage(prompt, tokens) + DONE)
        return False

    def cut_until_close(self, *_: int) -> bool:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text("a"))
        return False

    def status_429(self, *_: int) -> bool:
        return self.json(429, {"error": {"message": "queue is full"}})

    def status_503(self, *_: int) -> bool:
        return self.json(503, {"error": {"message": "loading"}})

    def status_500(self, *_: int) -> bool:
        return self.json(500, {"error": {"message": "boom"}})

    def no_http(self, *_: int) -> bool:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        return False

    def no_stream(self, prompt: int, tokens: int) -> bool:
        return self.json(200, {"choices": [{"text": "a" * tokens, "finish_reason": "length"}], "usage": {"prompt_tokens": prompt}})

    def bad_json(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a") + b"data: {oops\n\n")
        self.wfile.write(b"0\r\n\r\n")
        return True

    def error_event(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a") + b'data: {"error": {"message": "engine died"}}\n\n')
        self.wfile.write(b"0\r\n\r\n")
        return True

    def early_end(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a"))
        self.wfile.write(b"0\r\n\r\n")
        return True

    def half(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a"))
        self.chunk(text("a"))
        return False

    def reset(self, *_: int) -> bool:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        return False

    def hang(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a"))
        self.server.over.wait()
        return False

    def leave(self, *_: int) -> bool:
        """Close the door: nobody else gets in, and this one gets nothing."""
        with suppress(OSError):  # somebody else did
            self.server.socket.shutdown(socket.SHUT_RDWR)
        self.server.socket.close()
        return False


def options(url: str, **more: Any) -> loadtest.Options:
    usual: dict[str, Any] = {
        "arrivals": "constant", "duration_s": 1.0, "warmup_s": 0.0, "prompt_tokens": Lengths(mean=50), "output_tokens": Lengths(mean=4),
        "timeout_s": 20.0,
    }  # fmt: skip
    return loadtest.Options(url=url, **{**usual, **more})


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def wait_for_exit(pid: int, within_s: float) -> bool:
    """Say whether a process that is not our child is gone, or goes, within some seconds."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], within_s)[0])
    finally:
        os.close(fd)
