"""Read one HTTP/1.1 response, bytes in, stamped pieces of body out.  No socket and no clock in here.

Small on purpose: what a load generator needs of RFC 9112 on the client's side, cheap enough for 10^5 events a second.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_HEAD_LIMIT = 65536
_FEW = 8  # reads that are framed one by one
_HELD = 64  # reads left unframed at most: their framing takes 0.1 ms
_NOTHING: Mapping[str, str] = MappingProxyType({})


class WireError(ValueError):
    """What came is no HTTP/1.1 response."""


class _Head(NamedTuple):
    """A parsed head.  Servers repeat themselves: most heads of a run are the same bytes, so they are parsed once (see `_head_of`)."""

    status: int
    headers: Mapping[str, str]  # names in lower case; shared by all responses with this head
    keep_alive: bool
    is_chunked: bool
    length: int  # of the body; -1: until the connection closes


class Response:
    """One response.  Feed it bytes as they come until `feed` (or `take`) says it is whole."""

    _has_body = True
    __slots__ = ("_buffer", "_held", "_in_chunk", "_is_lazy", "_left", "_state", "headers", "headers_at", "keep_alive", "pieces", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = _NOTHING
        self.headers_at: float | None = None
        self.pieces: list[tuple[float, bytes]] = []  # (moment of the recv, body bytes)
        self.keep_alive = False
        self._buffer = b""
        self._held: list[tuple[float, bytes]] = []  # taken, not fed yet
        self._is_lazy = False
        self._state = Response._head  # the class's function, not a bound method: no reference cycle to collect
        self._left = -1  # bytes of body or chunk still to come; -1: until the connection closes
        self._in_chunk = False

    def take(self, data: bytes, at: float) -> bool:
        """Do as `feed`, but leave chunks unread until their end may have come: while streams run, only the stamps are urgent."""
        if self._is_lazy:
            self._held.append((at, data))
            if len(data) >= 4 and not data.endswith(b"\r\n\r\n") and len(self._held) < _HELD:
                return False
            return self.settle()
        is_whole = self.feed(data, at)
        self._is_lazy = not is_whole and self._state is Response._chunks
        return is_whole

    def settle(self) -> bool:
        """Feed what was only taken; say whether the response is whole.  Raises WireError."""
        held, self._held = self._held, []
        if len(held) > _FEW and not self._in_chunk and not self._buffer and self._state is Response._chunks:
            held = self._one_each(held)
        is_whole = False
        for at, data in held:
            if is_whole:
                self.keep_alive = False  # more than one response: this connection can no longer be trusted
                break
            is_whole = self.feed(data, at)
        return is_whole

    def feed(self, data: bytes, at: float) -> bool:
        """Take bytes that came at a moment; say whether the response is whole.  Raises WireError."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        return self._state(self, data, at)

    @property
    def events(self) -> int:
        """Return how often something came, read or only taken."""
        return len(self.pieces) + len(self._held)

    def closed(self) -> bool:
        """Say whether a connection closed now ends the response properly: only a body without a length may end so."""
        return self._state is Response._body and self._left < 0

    def body(self) -> bytes:
        """Return all of the body so far."""
        return b"".join(piece for _, piece in self.pieces)

    def _head(self, data: bytes, at: float) -> bool:
        end = data.find(b"\r\n\r\n")
        if end < 0:
            if len(data) > _HEAD_LIMIT or not b"HTTP/1.".startswith(data[:7]):
                raise WireError(f"no HTTP response: {data[:40]!r}")
            self._buffer = data
            return False
        head = _head_of(data[:end])
        rest = data[end + 4 :]
        if head.status < 200:  # an interim response; the real one follows
            return self._head(rest, at)
        self.status, self.headers, self.keep_alive, is_chunked, self._left = head
        self.headers_at = at
        if not self._has_body:
            is_chunked, self._left = False, 0
        self._state = Response._chunks if is_chunked else Response._body
        return self._state(self, rest, at)

    def _body(self, data: bytes, at: float) -> bool:
        if 0 <= self._left < len(data):
            self.keep_alive = False  # more than was announced: this connection can no longer be trusted
            data = data[: self._left]
        if data:
            self.pieces.append((at, data))
        if self._left > 0:
            self._left -= len(data)
        return self._left == 0

    def _chunks(self, data: bytes, at: float) -> bool:
        """Read chunks.  What came in one recv becomes one piece, however many chunks it held.

        Usually whole chunks come without a line end in them: then lines alternate between sizes and bodies, and each body has its size,
        which proves it.  Split at once, that is a third of the time of going chunk by chunk.
        """
        parts = data.split(b"\r\n")
        rest = parts.pop()
        if self._in_chunk or len(parts) % 2 or len(rest) > _HEAD_LIMIT:
            return self._chunk_by_chunk(data, at)
        bodies = parts[1::2]
        try:
            sizes = list(map(_chunk_size, parts[::2]))
        except WireError:
            return self._chunk_by_chunk(data, at)
        if sizes != list(map(len, bodies)) or 0 in sizes[:-1]:
            return self._chunk_by_chunk(data, at)
        if whole := b"".join(bodies):
            self.pieces.append((at, whole))
        if sizes and not sizes[-1]:
            self.keep_alive = self.keep_alive and not rest
            return True
        self._buffer = rest
        return False

    def _one_each(self, held: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
        """Read chunks that came one in each recv, all but the last at once; return what is left to feed, everything where it is not so."""
        data = [came for _, came in held[:-1]]
        parts = b"".join(data).split(b"\r\n")
        heads, bodies = parts[:-1:2], parts[1::2]
        lengths = list(map(len, bodies))
        if (
            parts[-1]
            or len(bodies) != len(data)
            or [n + 4 + len(head) for n, head in zip(lengths, heads, strict=True)] != list(map(len, data))
        ):
            return held
        try:
            if lengths != list(map(_chunk_size, heads)) or 0 in lengths:
                return held
        except WireError:
            return held
        self.pieces += zip([at for at, _ in held], bodies, strict=False)
        return held[-1:]

    def _chunk_by_chunk(self, data: bytes, at: float) -> bool:
        position, size = 0, len(data)
        bodies: list[bytes] = []
        find, size_of = data.find, _chunk_size
        if self._in_chunk:
            position = self._left + 2
            if position > size:  # its end is still to come
                body = data[: self._left]
                self._left -= len(body)
                self._buffer = data[len(body) :]
                if body:
                    self.pieces.append((at, body))
                return False
            if data[self._left : position] != b"\r\n":
                raise WireError("a chunk is longer than it said")
            bodies.append(data[: self._left])
            self._in_chunk = False
        while True:
            end = find(b"\r\n", position)
            if end < 0:
                if size - position > _HEAD_LIMIT:
                    raise WireError("a chunk has no size")
                self._buffer = data[position:]
                break
            length = size_of(data[position:end])
            start = end + 2
            stop = start + length
            if stop + 2 > size or not length:
                position = start
                break
            if data[stop : stop + 2] != b"\r\n":
                raise WireError("a chunk is longer than it said")
            bodies.append(data[start:stop])
            position = stop + 2
        if end >= 0 and length:
            body = data[position:stop]
            bodies.append(body)
            self._in_chunk, self._left, self._buffer = True, length - len(body), data[position + len(body) :]
        whole = bodies[0] if len(bodies) == 1 else b"".join(bodies)
        if whole:
            self.pieces.append((at, whole))
        if end < 0 or length:
            return False
        self._state = Response._trailer
        return self._trailer(data[position:], at)

    def _trailer(self, data: bytes, at: float) -> bool:
        while (end := data.find(b"\r\n")) > 0:
            data = data[end + 2 :]
        if end == 0:
            self.keep_alive = self.keep_alive and len(data) == 2
            return True
        self._buffer = data
        return False


class Bodiless(Response):
    """The answer to a HEAD request: it ends with its head, whatever length that names."""

    _has_body = False
    __slots__ = ()


@functools.lru_cache(maxsize=256)
def _head_of(data: bytes) -> _Head:
    first, *lines = data.decode("latin-1").split("\r\n")
    version, _, rest = first.partition(" ")
    if not version.startswith("HTTP/1.") or not rest[:3].isdecimal():
        raise WireError(f"no HTTP response: {first[:40]!r}")
    status = int(rest[:3])
    pairs = (line.partition(":") for line in lines)
    headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
    connection = headers.get("connection", "").lower()
    keep_alive = "close" not in connection and (version != "HTTP/1.0" or "keep-alive" in connection)
    length = headers.get("content-length")
    if "chunked" in headers.get("transfer-encoding", "").lower():
        return _Head(status, headers, keep_alive, True, 0)
    if status in (204, 304):
        return _Head(status, headers, keep_alive, False, 0)
    if length is None:
        return _Head(status, headers, False, False, -1)
    if not length.isdecimal():
        raise WireError(f"content-length is {length!r}")
    return _Head(status, headers, keep_alive, False, int(length))


@functools.lru_cache(maxsize=4096)
def _chunk_size(line: bytes) -> int:
    text = line.split(b";", 1)[0].strip()
    if not text or text.strip(b"0123456789abcdefABCDEF"):
        raise WireError(f"no chunk size: {line[:40]!r}")
    return int(text, 16)
