"""A server that answers the probe and then does what it is told: faults of every kind, and a ledger of which request got which."""

# ruff: noqa: D102  methods are named for what they do

from __future__ import annotations

import http.client
import json
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def token(finish: str | None = None) -> bytes:
    return chunk(b"data: " + json.dumps({"choices": [{"index": 0, "text": "a", "finish_reason": finish}]}).encode() + b"\n\n")


class FaultServer(socketserver.ThreadingTCPServer):
    """`plan(n)` names what is done to the n-th streamed request."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(self, plan: Callable[[int], str], tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.tls = plan, tls
        self.ledger: list[tuple[float, str]] = []  # (due by the header, what was done)
        self.lock, self.over = threading.Lock(), threading.Event()

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        return (self.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False) if self.tls else sock), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that leave or refuse our certificate are part of these tests."""

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.server_address[1]}"


class Ends(Protocol):
    """A server of socketserver's whose answers may wait for an end."""

    over: threading.Event

    def serve_forever(self, poll_interval: float = 0.5) -> None: ...

    def shutdown(self) -> None: ...

    def server_close(self) -> None: ...


S = TypeVar("S", bound=Ends)


@contextmanager
def answering(server: S) -> Iterator[S]:
    """Let a server answer in a thread of its own; at the end those who wait for it are let go."""
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving(plan: Callable[[int], str], tls: ssl.SSLContext | None = None) -> Iterator[FaultServer]:
    with answering(FaultServer(plan, tls)) as server:
        yield server


class Connection(socketserver.StreamRequestHandler):
    """One connection: requests with JSON bodies, one after the other, as long as `answer` says that it stays open."""

    disable_nagle_algorithm = True
    wbufsize = 0

    def handle(self) -> None:
        while line := self.rfile.readline():
            headers = http.client.parse_headers(self.rfile)
            body = json.loads(self.rfile.read(int(headers.get("Content-Length") or 0)) or b"{}")
            if not self.answer(line, headers, body):
                return

    def answer(self, line: bytes, headers: Any, body: dict[str, Any]) -> bool:
        raise NotImplementedError


class Handler(Connection):
    """Does what the plan says; a method returns whether the connection stays open."""

    server: FaultServer

    def answer(self, line: bytes, headers: Any, body: dict[str, Any]) -> bool:
        if line.startswith(b"GET"):
            return self.whole(200, {"data": [{"id": "tiny"}]})
        if not body.get("stream"):
            usage = {"prompt_tokens": len(body.get("prompt", "")), "completion_tokens": 1}
            return self.whole(200, {"choices": [{"text": "a", "finish_reason": "length"}], "usage": usage})
        with self.server.lock:
            kind = self.server.plan(len(self.server.ledger))
            self.server.ledger.append((float(headers["x-mlsys-sched"]), kind))
        return bool(getattr(self, kind)())

    def whole(self, status: int, body: object, more: bytes = b"") -> bool:
        data = json.dumps(body).encode()
        head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n%b\r\n" % (status, len(data), more)
        self.wfile.write(head + data)
        return True

    def ok(self) -> bool:
        self.wfile.write(HEAD + token() + token() + token("length") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return True

    def hang_up(self) -> bool:
        return False

    def reset(self) -> bool:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        return False

    def reset_in_the_stream(self) -> bool:
        self.wfile.write(HEAD + token())
        return self.reset()

    def half_a_stream(self) -> bool:
        self.wfile.write(HEAD + token() + token()[:-7])
        return False

    def garbage(self) -> bool:
        self.wfile.write(bytes(range(256)) * 4)
        return False

    def garbage_in_the_stream(self) -> bool:
        self.wfile.write(HEAD + token() + b"\xff\x00zz\r\n\r\n" * 8)
        return False

    def garbage_in_an_event(self) -> bool:
        self.wfile.write(HEAD + token() + chunk(b"data: \xff\xfe\x00{]\n\n") + b"0\r\n\r\n")
        return True

    def status_500(self) -> bool:
        return self.whole(500, {"error": {"message": "boom"}})

    def status_429(self) -> bool:
        return self.whole(429, {"error": {"message": "later"}}, b"Retry-After: 1\r\n")

    def slow_headers(self) -> bool:
        """Drip the head, a byte every 50 ms: it would take seconds."""
        for byte in HEAD * 3:
            self.wfile.write(bytes([byte]) if byte not in b"\r\n" else b"x")
            if self.server.over.wait(0.05):
                break
        return False

    def endless_head(self) -> bool:
        self.wfile.write(b"HTTP/1.1 200 OK\r\n" + b"X-More: 1\r\n" * 10_000)
        return False

    def other_json(self) -> bool:
        return self.whole(200, {"status": "fine", "choices": 3})

    def list_for_an_event(self) -> bool:
        self.wfile.write(HEAD + chunk(b"data: [1, 2]\n\n") + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return True

    def page(self) -> bool:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 15\r\n\r\n<html>hi</html>")
        return True

    def short_body(self) -> bool:
        self.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 5000\r\n\r\ndata: {"choices": []}\n\n')
        return False

    def silence(self) -> bool:
        self.server.over.wait()
        return False


EXPECTED = {
    "ok": "ok", "hang_up": "reset", "reset": "reset", "reset_in_the_stream": "reset", "half_a_stream": "reset", "garbage": "bad_response",
    "garbage_in_the_stream": "bad_response", "garbage_in_an_event": "bad_response", "status_500": "bad_response", "status_429": "rejected",
    "slow_headers": "timeout", "endless_head": "bad_response", "other_json": "bad_response", "list_for_an_event": "bad_response",
    "page": "bad_response", "short_body": "reset", "silence": "timeout",
}  # fmt: skip
