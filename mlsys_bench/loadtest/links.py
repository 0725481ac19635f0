"""Connections of the load worker: they open step by step on the hub (TCP, a proxy's tunnel, TLS, WebSocket), wait idle, carry one request.

Nothing in here blocks and no greenlet is spent: sockets are the plain ones of the standard library, for gevent's would switch to the hub.
"""

from __future__ import annotations

import _socket  # the C socket itself: once gevent has patched `socket`, its class wraps every call in Python
import errno
from collections.abc import Callable, Iterator
from typing import Protocol

from mlsys_bench.loadtest import wire
from mlsys_bench.loadtest.alarm import READ, WRITE, Loop, Watcher, clock
from mlsys_bench.loadtest.layers import Layer, Tunnel, Way

SPARE = 4  # idle connections to keep in hand while a run goes on
_AT_ONCE = 32  # connections that open at the same time before the start; more overflow a small server's backlog
_READ_BYTES = 65536


class Rider(Protocol):
    """What a connection carries."""

    def received(self, data: bytes, at: float) -> None:
        """Take bytes that came at a moment."""
        ...

    def ended(self) -> None:
        """Take note that nothing more will come."""
        ...


class Link:
    """One connection.  `rider` is who gets what comes in; None: it is idle, and whatever comes ends it."""

    __slots__ = ("_layers", "_links", "_pending", "_reader", "_sock", "_then", "_unsent", "_writer", "rider")

    def __init__(self, links: Links, then: Callable[[Link | None], None]) -> None:
        """Open.  `then` is called once: with the link when it can be used, with None when it cannot be had."""
        self._links, self._then = links, then
        self._unsent = b""
        self._layers: list[Layer] = []
        self._pending: Iterator[Layer] = links.way.layers()
        self.rider: Rider | None = None
        self._reader: Watcher | None = None
        self._sock = _socket.socket(links.way.family, _socket.SOCK_STREAM)
        self._sock.setblocking(False)
        self._sock.setsockopt(_socket.IPPROTO_TCP, _socket.TCP_NODELAY, 1)
        self._writer: Watcher | None = links.loop.io(self._sock.fileno(), WRITE)
        code = self._sock.connect_ex(links.way.peer)
        if code in (0, errno.EINPROGRESS):
            self._writer.start(self._connected)
        else:
            self._writer.start(self._fail)  # in the next turn: who opens us is not ready to hear of it

    @property
    def is_open(self) -> bool:
        """Whether it still stands, as far as is known."""
        return self._reader is not None

    def send(self, data: bytes) -> bool:
        """Send all of it, now or as soon as the other side takes it; say whether the connection still stands."""
        for layer in reversed(self._layers):
            data = layer.wrap(data)
        return self._push(data)

    def close(self) -> None:
        """Close at once."""
        self._links.opening.discard(self)
        for watcher in (self._reader, self._writer):
            if watcher is not None:
                watcher.stop()
                watcher.close()
        self._reader = self._writer = self.rider = None
        self._sock.close()

    def _push(self, data: bytes) -> bool:
        if self._unsent:
            self._unsent += data
            return True
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            return False
        if sent < len(data):
            self._unsent = data[sent:]
            self._writer = self._links.loop.io(self._sock.fileno(), WRITE)
            self._writer.start(self._push_rest)
        return True

    def _push_rest(self) -> None:
        try:
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self._unsent = b""  # the reader will hear of it
        else:
            self._unsent = self._unsent[sent:]
        if not self._unsent:
            self._end_writer()

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.stop()
            self._writer.close()
            self._writer = None

    # ------------------------------------------------------------ opening

    def _connected(self) -> None:
        self._end_writer()
        if self._sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_ERROR):
            self._fail()
            return
        self._reader = self._links.loop.io(self._sock.fileno(), READ)
        self._reader.start(self._opening_readable)
        self._advance()

    def _opening_readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
            if not data or (self._through_layers(data) and not self._links.way.greets):
                raise ConnectionError
        except BlockingIOError:
            return
        except (OSError, wire.WireError):
            self._fail()
            return
        self._advance()

    def _advance(self) -> None:
        """Put on layer after layer as each is open; with the last the connection is."""
        while not self._layers or self._layers[-1].is_open:
            layer = next(self._pending, None)
            if layer is None:
                self._layers = [layer for layer in self._layers if not isinstance(layer, Tunnel)]
                assert self._reader is not None
                self._reader.start(self._layered_readable if self._layers else self._readable)
                self._links.opening.discard(self)
                self._links.opened += 1
                self._then(self)
                return
            first = layer.begin()
            for below in reversed(self._layers):
                first = below.wrap(first)
            self._layers.append(layer)
            if first and not self._push(first):
                self._fail()
                return

    def _fail(self) -> None:
        self.close()
        self._then(None)

    # ------------------------------------------------------------ carrying

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        at = clock()
        if data and self.rider is not None:
            self.rider.received(data, at)
        else:
            self._over()

    def _layered_readable(self) -> None:
        try:
            data = self._sock.recv(_READ_BYTES)
            at = clock()
            messages = self._through_layers(data) if data else []
        except BlockingIOError:
            return
        except (OSError, wire.WireError):
            data, messages, at = b"", [], clock()
        rider = self.rider
        for message in messages:
            if rider is None and self._links.way.greets:
                continue
            if rider is None or self.rider is not rider:
                self._over()  # more than was asked for
                return
            rider.received(message, at)
            if self._reader is None:
                return  # it closed us
        if not data or any(layer.is_over for layer in self._layers):
            self._over()

    def _over(self) -> None:
        if self.rider is None:
            self._links.lose(self)
        else:
            self.rider.ended()

    def _through_layers(self, data: bytes) -> list[bytes]:
        messages = [data]
        for depth, layer in enumerate(self._layers):
            came: list[bytes] = []
            for message in messages:
                inside, back = layer.unwrap(message)
                came += inside
                for below in reversed(self._layers[:depth]):
                    back = below.wrap(back) if back else back
                if back:
                    self._push(back)
            messages = came
        return messages


class Links:
    """The connections of one worker to one server, opened before they are needed."""

    def __init__(self, loop: Loop, way: Way, *, keeps: bool = True) -> None:
        """Have none yet.  `keeps` false: every request opens its own, as a client without keep-alive does."""
        self.loop, self.way, self._keeps = loop, way, keeps
        self._idle: dict[Link, None] = {}  # the last one given is the first one taken: it is warm
        self._kept: dict[int, Link] = {}
        self.opening: set[Link] = set()
        self._refills = 0  # of those that open, how many nobody waits for
        self.opened = self.opened_late = 0
        self._is_closed = False

    def fill(self, count: int, then: Callable[[], None]) -> None:
        """Open connections before the start, then call.  A refusal ends it: the requests themselves will tell."""
        left = count if self._keeps else 0
        pending = 0
        is_told = False

        def tell() -> None:
            nonlocal is_told
            if not is_told and (left <= 0 and not pending):
                is_told = True
                then()

        def more(link: Link | None) -> None:
            nonlocal left, pending
            pending -= 1
            left = left if link is not None else 0
            self._came(link)
            go()

        def go() -> None:
            nonlocal left, pending
            while left > 0 and pending < _AT_ONCE:
                left, pending = left - 1, pending + 1
                self.open(more)
            tell()

        go()

    def open(self, then: Callable[[Link | None], None]) -> Link | None:
        """Open one more.  `then` gets it, or None; so does who calls, to be able to give up."""
        try:
            link = Link(self, then)
        except OSError:  # no more sockets
            then(None)
            return None
        self.opening.add(link)
        return link

    def idle(self) -> Link | None:
        """Return an open connection at once, or None when there is none; see that there will be one for the next."""
        if not self._keeps:
            return None
        link = self._idle.popitem()[0] if self._idle else None
        for _ in range(SPARE - len(self._idle) - self._refills):
            self._refills += 1
            self.open(self._refilled)
        return link

    def give(self, link: Link) -> None:
        """Put a connection back that can carry another request."""
        if self._keeps and not self._is_closed:
            self._idle[link] = None
        else:
            link.close()

    def keep(self, link: Link, index: int) -> None:
        """Hold a connection for the request of this index: a session goes on where it was."""
        if self._keeps and not self._is_closed:
            self._kept[index] = link
        else:
            link.close()

    def kept(self, index: int) -> Link | None:
        """Return the connection that was held for a request, unless the other side has ended it."""
        link = self._kept.pop(index, None)
        return link if link is not None and link.is_open else None

    def lose(self, link: Link) -> None:
        """Forget an idle connection that the other side ended."""
        self._idle.pop(link, None)
        link.close()

    def close(self) -> None:
        """Close what is idle and what is opening."""
        self._is_closed = True
        while self._idle:
            self._idle.popitem()[0].close()
        while self._kept:
            self._kept.popitem()[1].close()
        for link in [*self.opening]:
            link.close()

    def _refilled(self, link: Link | None) -> None:
        self._refills -= 1
        self._came(link)

    def _came(self, link: Link | None) -> None:
        if link is not None:
            self.give(link)
