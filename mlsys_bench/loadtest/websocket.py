"""WebSocket (RFC 6455) as another way to carry the same requests: one text message asks, stamped messages answer.

Framing is wsproto's.  Messages become the lines of an event stream, so that every kind of endpoint reads them as it reads HTTP's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from wsproto import ConnectionType, WSConnection, events
from wsproto.utilities import RemoteProtocolError

from mlsys_bench.loadtest import job
from mlsys_bench.loadtest.heads import host_header
from mlsys_bench.loadtest.wire import Response, WireError

_DONE = b"[DONE]"
_HEADERS = MappingProxyType({"content-type": "text/event-stream"})


class Frames:
    """One WebSocket on a connection: `is_open` once the server has agreed to speak it."""

    def __init__(self, work: job.Job) -> None:
        self._work = work
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self._text: list[str | bytes] = []  # of a message that comes in several frames
        self.is_open = self.is_over = False

    def begin(self) -> bytes:
        """Return the handshake."""
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in job.own_headers(self._work)]
        request = events.Request(host=host_header(self._work), target=self._work.endpoint.path, extra_headers=headers)
        return self._protocol.send(request)

    def unwrap(self, data: bytes) -> tuple[list[bytes], bytes]:
        """Return the messages that are whole now, and answers to pings and goodbyes.  Raises WireError."""
        messages, back = [], []
        try:
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                match event:
                    case events.AcceptConnection():
                        self.is_open = True
                    case events.RejectConnection():
                        raise WireError(f"the server refuses a WebSocket: {event.status_code}")
                    case events.Message():
                        self._text.append(event.data)
                        if event.message_finished:
                            messages.append(b"".join(text.encode() if isinstance(text, str) else bytes(text) for text in self._text))
                            self._text = []
                    case events.Ping():
                        back.append(self._protocol.send(event.response()))
                    case events.CloseConnection():
                        self.is_over = True
                        back.append(self._protocol.send(event.response()))
        except RemoteProtocolError as error:
            raise WireError(f"no WebSocket: {error}") from error
        return messages, b"".join(back)

    def wrap(self, data: bytes) -> bytes:
        """Return a text message, masked."""
        return self._protocol.send(events.TextMessage(data=data.decode()))


def is_done(message: bytes) -> bool:
    """Say whether a message is [DONE], the end where an endpoint has no word of its own for it."""
    return message.strip() == _DONE


class Messages(Response):
    """What came in answer to one message, in the shape of `wire.Response`.  It ends as the endpoint says, or with the connection."""

    __slots__ = ("_is_end",)

    def __init__(self, is_end: Callable[[bytes], bool] | None = None) -> None:
        super().__init__()
        self.headers = _HEADERS
        self._is_end = is_end or is_done

    def take(self, data: bytes, at: float) -> bool:
        """Take a message; say whether it is the last."""
        if self.headers_at is None:
            self.headers_at, self.status = at, 200
        is_last = self._is_end(data)
        self.pieces.append((at, b"data: %b\n\n" % data.replace(b"\n", b"\ndata: ")))
        self.keep_alive = is_last
        return is_last

    def settle(self) -> bool:
        """Say whether the answer is whole; messages need no more reading."""
        return self.keep_alive

    def closed(self) -> bool:
        """Say whether a connection closed now ends the answer properly: servers that say no [DONE] end like that."""
        return bool(self.pieces)
