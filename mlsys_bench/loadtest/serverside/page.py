"""A page of metrics over HTTP, on one kept connection, within a time and a size."""

from __future__ import annotations

import base64
import contextlib
import socket
import time
import urllib.parse
from collections.abc import Sequence

from mlsys_bench.errors import BadInput
from mlsys_bench.hardware.devices import MissedError as MissedError
from mlsys_bench.loadtest import wire
from mlsys_bench.loadtest.client import Client, authority, tls_context
from mlsys_bench.loadtest.serverside import names, text
from mlsys_bench.loadtest.serverside.text import Key

Headers = Sequence[tuple[str, str]]
_MOST_BYTES = 16 * 2**20
_MOST_MOVES = 3
_SPELLED = names.WANTED | {name.replace(":", "_") for name in names.WANTED}  # as a relay writes them that allows no colons
_CLOCK = time.monotonic


class Page:
    """The page behind a URL.  A key or a password goes nowhere but to this host and is never printed."""

    def __init__(self, url: str, *, headers: Headers = (), client: Client | None = None) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BadInput(f"--metrics {url.rpartition('@')[2]}: write auto, off, or an address like http://127.0.0.1:8000/metrics")
        self._host, self._tls = parts.hostname, tls_context(client or Client()) if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = urllib.parse.urlunsplit(("", "", parts.path or "/metrics", parts.query, ""))
        self.where = f"{parts.scheme}://{authority(self._host, self._port)}{parts.path or '/metrics'}"
        self._headers = (*_authorization(parts), *(f"{name}: {value}" for name, value in headers))
        self._sock: socket.socket | None = None
        self._is_closed = False
        self.bytes = 0  # of the last page

    def look(self, timeout_s: float) -> dict[Key, float]:
        """Return the samples that are wanted.  Raises MissedError."""
        deadline = _CLOCK() + timeout_s
        try:
            answer = self._ask(deadline)
        except TimeoutError:
            self._drop()
            raise MissedError(f"no answer within {timeout_s:g} s") from None
        except (OSError, wire.WireError) as error:
            self._drop()
            raise MissedError(getattr(error, "strerror", None) or str(error) or "the connection broke") from None
        if answer.status != 200:
            raise MissedError(f"HTTP {answer.status}")
        body = answer.body()
        self.bytes = len(body)
        page = body.decode("utf-8", errors="replace")
        found = text.samples(page, _SPELLED)
        if not found and text.is_page(page):
            raise MissedError("metrics, but none with a name of vLLM, SGLang, TGI, Triton, DCGM or mlsys")
        if not found:
            raise MissedError(f"no metrics but {answer.headers.get('content-type') or 'something without a type'}")
        return found

    def close(self) -> None:
        """End whatever is going on, also from another thread."""
        self._is_closed = True
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give the connection back, from the thread that looks."""
        self._drop()

    def _ask(self, deadline: float) -> wire.Response:
        """Ask on the kept connection; once more on a new one when the server had closed it meanwhile; follow where the page moved."""
        for _ in range(_MOST_MOVES):
            was_open = self._sock is not None
            try:
                answer = self._exchange(deadline)
            except (ConnectionError, wire.WireError):
                if not was_open or self._is_closed:
                    raise
                self._drop()
                answer = self._exchange(deadline)
            if answer.status not in (301, 302, 307, 308):
                return answer
            self._path = self._moved(answer.headers.get("location", ""))
        raise MissedError("it moves in a circle")

    def _exchange(self, deadline: float) -> wire.Response:
        sock = self._sock or self._open(deadline)
        head = (
            f"GET {self._path} HTTP/1.1",
            f"Host: {authority(self._host, self._port)}",
            "Accept: text/plain;version=0.0.4",
            "User-Agent: mlsys-loadtest",
        )
        sock.settimeout(_left(deadline))
        sock.sendall("\r\n".join([*head, *self._headers, "", ""]).encode())
        answer, size = wire.Response(), 0
        while True:
            sock.settimeout(_left(deadline))
            data = sock.recv(262_144)
            size += len(data)
            if size > _MOST_BYTES:
                raise OSError(f"more than {_MOST_BYTES // 2**20} MiB")
            if not data and not answer.closed():
                raise ConnectionResetError("the connection ended before the page did")
            if not data or answer.feed(data, 0.0):
                break
        if not data or not answer.keep_alive:
            self._drop()
        return answer

    def _open(self, deadline: float) -> socket.socket:
        if self._is_closed:
            raise ConnectionAbortedError("the run is over")
        sock = socket.create_connection((self._host, self._port), timeout=_left(deadline))
        if self._tls is not None:
            try:
                sock = self._tls.wrap_socket(sock, server_hostname=self._host)
            except OSError:
                sock.close()
                raise
        self._sock = sock
        return sock

    def _drop(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            sock.close()

    def _moved(self, location: str) -> str:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(self.where, location))
        if not location or parts.hostname != self._host or (parts.port or self._port) != self._port:
            raise MissedError(f"it moved to {location.rpartition('@')[2] or 'nowhere'}: give that address")
        return urllib.parse.urlunsplit(("", "", parts.path, parts.query, ""))


def _left(deadline: float) -> float:
    """Return the seconds left.  Raises TimeoutError when there are none."""
    left = deadline - _CLOCK()
    if left <= 0:
        raise TimeoutError
    return left


def _authorization(parts: urllib.parse.SplitResult) -> tuple[str, ...]:
    if not parts.username:
        return ()
    pair = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return ("Authorization: Basic " + base64.b64encode(pair.encode()).decode(),)
