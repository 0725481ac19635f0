"""What lies between a socket and a request: a proxy's tunnel, TLS, WebSocket.  Bytes in, bytes out; no socket and no clock in here."""

from __future__ import annotations

import _socket
import ssl
from collections.abc import Iterator
from typing import Protocol

from mlsys_bench.loadtest import job, wire
from mlsys_bench.loadtest.client import authorization, tls_context
from mlsys_bench.loadtest.heads import host_and_port

_READ_BYTES = 65536


class Layer(Protocol):
    """What lies between the socket and a rider, such as TLS: bytes in, bytes out."""

    def begin(self) -> bytes:
        """Return the first bytes to send."""
        ...

    def unwrap(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Return what came for the rider and what must be sent back.  Raises OSError or WireError when it cannot go on."""
        ...

    def wrap(self, data: bytes) -> bytes:
        """Return what to send for a rider's bytes."""
        ...

    @property
    def is_open(self) -> bool:
        """Say whether a rider may send."""
        ...

    @property
    def is_over(self) -> bool:
        """Say whether the other side said its goodbye."""
        ...


class Way:
    """How a server is reached: its address, or that of a proxy, and the layers on top."""

    def __init__(self, work: job.Job) -> None:
        self._work = work
        self._tls = tls_context(work.client) if work.scheme == "https" else None
        address, port = (work.proxy.host, work.proxy.port) if work.proxy else (work.address, work.port)
        self.family = _socket.AF_INET6 if ":" in address else _socket.AF_INET
        self.peer = (address, port)
        self.greets = work.transport == "websocket"  # such a server may speak before it is asked

    def layers(self) -> Iterator[Layer]:
        """Yield the layers of one connection, from the socket up."""
        work = self._work
        if work.proxy is not None and (self._tls is not None or work.transport == "websocket"):
            yield Tunnel(work)
        if self._tls is not None:
            yield Tls(self._tls, work.host)
        if work.transport == "websocket":
            from mlsys_bench.loadtest.websocket import Frames

            yield Frames(work)


class Tunnel:
    """The way through a proxy, by CONNECT."""

    def __init__(self, work: job.Job) -> None:
        self._work = work
        self._response = wire.Response()
        self.is_open = self.is_over = False

    def begin(self) -> bytes:
        """Return the request for a tunnel."""
        there = host_and_port(self._work)
        lines = [f"CONNECT {there} HTTP/1.1", f"Host: {there}", *(f"{n}: {v}" for n, v in authorization(self._work.proxy))]
        return "\r\n".join([*lines, "", ""]).encode("latin-1")

    def unwrap(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Take the proxy's answer."""
        if self.is_open:
            return [data], b""
        self._response.feed(data, 0.0)
        if self._response.status and self._response.status // 100 != 2:
            raise wire.WireError(f"the proxy refuses a tunnel: {self._response.status}")
        self.is_open = bool(self._response.status)
        return [], b""

    def wrap(self, data: bytes) -> bytes:
        """Return the bytes as they are."""
        return data


class Tls:
    """TLS in memory, so that it needs no socket of its own."""

    def __init__(self, context: ssl.SSLContext, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)
        self.is_open = self.is_over = False

    def begin(self) -> bytes:
        """Return the client's hello."""
        self._shake()
        return self._outgoing.read()

    def unwrap(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Return what was sent in secret.  Raises ssl.SSLError, an OSError."""
        self._incoming.write(data)
        if not self.is_open:
            self._shake()
        return list(self._plain()) if self.is_open else [], self._outgoing.read()

    def wrap(self, data: bytes) -> bytes:
        """Return the bytes as nobody else can read them."""
        self._object.write(data)
        return self._outgoing.read()

    def _shake(self) -> None:
        try:
            self._object.do_handshake()
            self.is_open = True
        except ssl.SSLWantReadError:
            return

    def _plain(self) -> Iterator[bytes]:
        try:
            while data := self._object.read(_READ_BYTES):
                yield data
            self.is_over = True
        except ssl.SSLWantReadError:
            return
        except ssl.SSLZeroReturnError:
            self.is_over = True
