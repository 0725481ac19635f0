"""The loop of the truth server: one thread, sockets that do not block, a heap of what is due when."""

from __future__ import annotations

import contextlib
import gc
import heapq
import random
import select
import socket
import time
from collections import deque

import msgspec

from mlsys_bench.loadtest.truth import Behaviour, dialect
from mlsys_bench.loadtest.truth.ledger import Entry, Ledger, clock

_BATCH = 32  # timers served before arrivals are looked at again: their stamps must not wait
_READ_BYTES = 65536
_encode = msgspec.json.Encoder().encode


class Connection:
    """One client.  `turn` counts its requests, so that a timer of an older one is known."""

    __slots__ = (
        "asked",
        "buffer",
        "busy",
        "entry",
        "event",
        "events",
        "fd",
        "is_served",
        "last",
        "out",
        "sock",
        "start",
        "stays",
        "token",
        "turn",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.fd = sock, sock.fileno()
        self.buffer = self.out = self.token = b""
        self.busy, self.is_served, self.stays, self.turn = False, False, True, 0
        self.asked: dialect.Asked
        self.entry: Entry
        self.event = self.events = 0
        self.start = self.last = 0.0


class Server:
    """Listens, answers as `how` says, and keeps a ledger."""

    def __init__(self, how: Behaviour, listener: socket.socket) -> None:
        self._how, self._listener = how, listener
        self._streams = dialect.Streams(how)
        self._epoll = select.epoll()
        self._polled = (self._epoll.fileno(),)
        self._connections: dict[int, Connection] = {}
        self._heap: list[tuple[float, int, int, Connection]] = []  # (due, fd, turn, whose)
        self._waiting: deque[tuple[Connection, int]] = deque()
        self._rng = random.Random(how.seed)
        self.ledger = Ledger()
        self._watches: int | None = None

    def run(self, until_closes: int | None = None) -> None:
        """Serve until interrupted, or until the other end of this pipe closes."""
        gc.disable()  # nothing here makes cycles, and a collection would be a stall nobody asked for
        self._watches = until_closes
        for fd in (self._listener.fileno(), *([] if until_closes is None else [until_closes])):
            self._epoll.register(fd, select.EPOLLIN)
        stall = clock() + self._how.stall_every_s if self._how.stall_every_s else None
        while self._turn(stall):
            if stall is not None and clock() >= stall:
                time.sleep(self._how.stall_s)
                stall += self._how.stall_every_s or 0.0

    def close(self) -> None:
        """Close every socket."""
        for c in list(self._connections.values()):
            self._close(c)
        self._epoll.close()
        self._listener.close()

    def _turn(self, stall: float | None) -> bool:
        """Wait for what comes next and serve it; False when it is over."""
        due = self._heap[0][0] if self._heap else stall
        if due is not None and stall is not None and stall < due:
            due = stall
        ahead = None if due is None else due - clock()
        # select waits in microseconds; epoll.poll itself rounds up to whole milliseconds
        if (ahead is None or ahead > 0) and not select.select(self._polled, (), (), ahead)[0]:
            self._fire()
            return True
        for fd, mask in self._epoll.poll(0):
            if fd in self._connections:
                self._serve(self._connections[fd], mask)
            elif fd == self._watches:
                return False
            else:
                self._accept()
        self._fire()
        return True

    # ------------------------------------------------------------ sockets

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                sock, _ = self._listener.accept()
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._connections[sock.fileno()] = Connection(sock)
                self._epoll.register(sock.fileno(), select.EPOLLIN)
                self.ledger.accepted += 1
                self.ledger.peak_connections = max(self.ledger.peak_connections, len(self._connections))

    def _serve(self, c: Connection, mask: int) -> None:
        try:
            if mask & select.EPOLLOUT:
                self._flush(c)
            if mask & ~select.EPOLLOUT:
                data = c.sock.recv(_READ_BYTES)
                if not data:
                    self._close(c)
                    return
                c.buffer = c.buffer + data if c.buffer else data
                self._read(c, clock())
        except BlockingIOError:
            return
        except OSError:
            self._close(c)

    def _write(self, c: Connection, data: bytes) -> None:
        """Send, or keep what the socket does not take."""
        if not c.out:
            try:
                sent = c.sock.send(data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
            self._epoll.modify(c.fd, select.EPOLLIN | select.EPOLLOUT)
        c.out += data

    def _flush(self, c: Connection) -> None:
        c.out = c.out[c.sock.send(c.out) :]
        if c.out:
            return
        self._epoll.modify(c.fd, select.EPOLLIN)
        if not c.stays and not c.busy:
            self._close(c)

    def _close(self, c: Connection) -> None:
        if self._connections.pop(c.fd, None) is None:
            return
        self._epoll.unregister(c.fd)
        c.sock.close()
        if c.busy:
            self.ledger.left += 1
            self._free(c)

    # ------------------------------------------------------------ requests

    def _read(self, c: Connection, now: float) -> None:
        """Answer the requests in a buffer, one after the other."""
        while c.buffer and not c.busy and c.fd in self._connections:
            try:
                found = dialect.cut(c.buffer)
            except ValueError as error:
                self._write(c, dialect.error(b"400 Bad Request", str(error)))
                self._close(c)
                return
            if found is None:
                return
            request, size = found
            c.buffer, c.stays = c.buffer[size:], request.stays
            kind = request.kind()
            if kind is None:
                self._ended(c, self._tell(request))
            else:
                self._generate(c, request, kind, now)

    def _tell(self, request: dialect.Request) -> bytes:
        """Return the answer to anything but a request to generate."""
        match request.path:
            case b"/v1/models":
                return dialect.models()
            case b"/stats":
                return dialect.response(_encode(self.ledger.stats()))
            case b"/requests":
                return dialect.response(_encode(self.ledger.rows()))
            case b"/reset":
                self.ledger.reset()
                return dialect.response(b"{}")
            case b"/health" | b"/version":
                return dialect.response(b'{"version":"truth"}')
            case b"/metrics":
                return dialect.response(self._metrics(), kind=b"text/plain; version=0.0.4")
        return dialect.error(b"404 Not Found", f"no such path: {request.path.decode(errors='replace')}")

    def _metrics(self) -> bytes:
        running, tokens = self.ledger.in_service, sum(e.tokens for e in self.ledger.entries)
        rows = (("gauge", "vllm:num_requests_running", running), ("gauge", "vllm:num_requests_waiting", len(self._waiting)),
                ("counter", "vllm:generation_tokens_total", tokens))  # fmt: skip
        return "".join(f'# TYPE {name} {kind}\n{name}{{model_name="{dialect.MODEL}"}} {value}\n' for kind, name, value in rows).encode()

    def _generate(self, c: Connection, request: dialect.Request, kind: dialect.Kind, now: float) -> None:
        try:
            c.asked = dialect.asked(kind, request.body, self._how.tokens)
        except ValueError as error:
            self._ended(c, dialect.error(b"400 Bad Request", str(error)))
            return
        c.entry = Entry(now, request.due_unix_s)
        self.ledger.came(c.entry)
        if self._how.error_share and self._rng.random() < self._how.error_share:
            self._ended(c, dialect.error(b"500 Internal Server Error", "as asked"))
            return
        c.busy, c.turn, c.event = True, c.turn + 1, 0
        if c.asked.streams and (first := self._streams.on_arrival(c.asked)) and self._how.ttft_s > 0:
            self._write(c, first)
        if self._how.slots and self.ledger.in_service >= self._how.slots:
            self._waiting.append((c, c.turn))
        else:
            self._begin(c, now)

    def _begin(self, c: Connection, now: float) -> None:
        """Put a request into service."""
        ledger = self.ledger
        ledger.in_service += 1
        ledger.peak_in_service = max(ledger.peak_in_service, ledger.in_service)
        c.is_served, c.start = True, now
        after_s = self._how.whole_s
        if c.asked.streams:
            after_s, c.events, c.token = self._how.ttft_s, self._streams.events(c.asked), self._streams.token(c.asked)
        heapq.heappush(self._heap, (now + after_s, c.fd, c.turn, c))

    def _free(self, c: Connection) -> None:
        """End a request, and begin the next that waits for its slot."""
        c.busy = False
        if not c.is_served:
            return
        c.is_served = False
        self.ledger.in_service -= 1
        while self._waiting:
            following, turn = self._waiting.popleft()
            if following.busy and following.turn == turn:
                self._begin(following, clock())
                return

    def _ended(self, c: Connection, data: bytes) -> None:
        """Write the last bytes of an answer."""
        self._write(c, data)
        if not c.stays and not c.out:
            self._close(c)

    # ------------------------------------------------------------ what is due

    def _fire(self) -> None:
        """Serve what is due, a batch at most."""
        heap = self._heap
        for _ in range(_BATCH):
            if not heap or heap[0][0] > (now := clock()):
                return
            due, _, turn, c = heapq.heappop(heap)
            if c.turn != turn or not c.busy:
                continue  # its client left
            try:
                self._step(c, due, now)
            except OSError:
                self._close(c)

    def _step(self, c: Connection, due: float, now: float) -> None:
        """Write what is due of an answer.  The stamp is taken right before the write."""
        i, ledger = c.event, self.ledger
        ledger.late.append(now - due)
        if 0 < i < c.events - 1 and self._how.itl_s:
            self._write(c, c.token)
            ledger.gaps.append(now - c.last)
            c.entry.tokens += self._how.tokens_per_event
        elif not c.asked.streams:
            self._finish(c, dialect.whole(c.asked), now)
            return
        else:
            through = i + 1 if self._how.itl_s else c.events
            data = self._streams.event(c.asked, i) if self._how.itl_s else self._streams.at_once(c.asked, i)
            if i == 0:
                c.entry.first = now
                data = (b"" if self._how.ttft_s > 0 else self._streams.on_arrival(c.asked)) + data
            else:
                ledger.gaps.append(now - c.last)
            ledger.gaps.extend([0.0] * (through - i - 1))
            if through == c.events:
                self._finish(c, data, now)
                return
            self._write(c, data)
            c.entry.tokens += self._how.tokens_per_event
        c.event, c.last = i + 1, now
        heapq.heappush(self._heap, (c.start + self._how.ttft_s + (i + 1) * self._how.itl_s, c.fd, c.turn, c))

    def _finish(self, c: Connection, data: bytes, now: float) -> None:
        self.ledger.went(c.entry, now, c.asked.tokens)
        self._free(c)
        self._ended(c, data)
        if c.buffer:
            self._read(c, clock())
