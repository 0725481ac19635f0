"""Read one HTTP/1.1 response, bytes in, stamped pieces of body out.  No socket and no clock in here.

Small on purpose: what a load generator needs of RFC 9112 on the client's side, cheap enough for 10^5 events a second.
"""

from __future__ import annotations

_HEAD_LIMIT = 65536


class WireError(ValueError):
    """What came is no HTTP/1.1 response."""


class Response:
    """One response.  Feed it bytes as they come until `feed` says it is whole."""

    __slots__ = ("_buffer", "_chunked", "_in_chunk", "_left", "_state", "headers", "headers_at", "keep_alive", "pieces", "status")

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.headers_at: float | None = None
        self.pieces: list[tuple[float, bytes]] = []  # (moment of the recv, body bytes)
        self.keep_alive = False
        self._buffer = b""
        self._state = Response._head  # the class's function, not a bound method: no reference cycle to collect
        self._left = -1  # bytes of body or chunk still to come; -1: until the connection closes
        self._chunked = False
        self._in_chunk = False

    def feed(self, data: bytes, at: float) -> bool:
        """Take bytes that came at a moment; say whether the response is whole.  Raises WireError."""
        if self._buffer:
            data = self._buffer + data
            self._buffer = b""
        return self._state(self, data, at)

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
        self._parse_head(data[:end])
        rest = data[end + 4 :]
        if self.status < 200:  # an interim response; the real one follows
            return self._head(rest, at)
        self.headers_at = at
        return self._begin_body(rest, at)

    def _parse_head(self, head: bytes) -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        if not version.startswith("HTTP/1.") or not rest[:3].isdigit():
            raise WireError(f"no HTTP response: {first[:40]!r}")
        self.status = int(rest[:3])
        pairs = (line.partition(":") for line in lines)
        self.headers = {name.strip().lower(): value.strip() for name, _, value in pairs}
        connection = self.headers.get("connection", "").lower()
        self.keep_alive = "close" not in connection and (version != "HTTP/1.0" or "keep-alive" in connection)

    def _begin_body(self, rest: bytes, at: float) -> bool:
        length = self.headers.get("content-length")
        if "chunked" in self.headers.get("transfer-encoding", "").lower():
            self._state = Response._chunks
        elif self.status in (204, 304):
            return True
        elif length is not None:
            if not length.isdigit():
                raise WireError(f"content-length is {length!r}")
            self._state, self._left = Response._body, int(length)
        else:
            self._state, self.keep_alive = Response._body, False
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
        position, size = 0, len(data)
        while True:
            if self._in_chunk:
                take = data[position : position + self._left]
                if take:
                    self.pieces.append((at, take))
                position += len(take)
                self._left -= len(take)
                if self._left or size - position < 2:
                    self._buffer = data[position:]
                    return False
                if data[position : position + 2] != b"\r\n":
                    raise WireError("a chunk is longer than it said")
                position += 2
                self._in_chunk = False
            end = data.find(b"\r\n", position)
            if end < 0:
                if size - position > _HEAD_LIMIT:
                    raise WireError("a chunk has no size")
                self._buffer = data[position:]
                return False
            self._left = _chunk_size(data[position:end])
            position = end + 2
            if self._left == 0:
                self._state = Response._trailer
                return self._trailer(data[position:], at)
            self._in_chunk = True

    def _trailer(self, data: bytes, at: float) -> bool:
        while (end := data.find(b"\r\n")) > 0:
            data = data[end + 2 :]
        if end == 0:
            self.keep_alive = self.keep_alive and len(data) == 2
            return True
        self._buffer = data
        return False


def _chunk_size(line: bytes) -> int:
    text = line.split(b";", 1)[0].strip()
    if not text or text.strip(b"0123456789abcdefABCDEF"):
        raise WireError(f"no chunk size: {line[:40]!r}")
    return int(text, 16)
