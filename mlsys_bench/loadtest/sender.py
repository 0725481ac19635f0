"""Requests of the load worker, from the moment they are due to the row that tells what came of them.

A request is a small state machine driven by the hub's callbacks: no greenlet, no timer of its own.  While answers come in, only stamps are
taken; what they say is read afterwards, between sends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import IO

import msgspec

from mlsys_bench.loadtest import endpoints, heads, job, payloads, spool, wire
from mlsys_bench.loadtest.alarm import Alarm, Awake, Loop, Pulse, clock
from mlsys_bench.loadtest.answers import Answer
from mlsys_bench.loadtest.client import Cancel
from mlsys_bench.loadtest.layers import Way
from mlsys_bench.loadtest.links import Link, Links
from mlsys_bench.types import Outcome

_BACKLOG = 256  # answers that may wait to be read; beyond it they are read at once, whatever is due
_READ_S = 0.0002  # of reading answers before the hub looks around again
_QUIET_S = 0.0003  # before a send nothing is read
_EVENT_S = 2e-6  # of reading, for each event; measured
_LONGEST_READ_S = 0.005  # half a beat of the pulse: the longest answers must be read, too
_REJECTED = (429, 503)
_FIRST_PAUSE_S = 0.1  # before a second attempt, doubled with each, where the server names no time
_LONGEST_PAUSE_S = 30.0


class Flight:
    """One request while it runs: what it asks and what is known of it so far.  Moments are of the monotonic clock."""

    __slots__ = (
        "answer", "attempt", "began", "born", "cancel_events", "connect_s", "done", "index", "link", "opening", "outcome", "request",
        "response", "retry_s", "said", "scheduled_s", "sender", "sent", "then",
    )  # fmt: skip

    def __init__(self, sender: Sender, index: int, scheduled_s: float, request: bytes, said: tuple[str, ...]) -> None:
        self.sender, self.index, self.scheduled_s, self.request, self.said = sender, index, scheduled_s, request, said
        self.response = sender.new_response()
        self.link: Link | None = None
        self.opening: Link | None = None  # a connection on its way
        self.then: Callable[[Flight], None] | None = None
        self.answer: Answer | None = None
        self.outcome: Outcome = "unfinished"
        self.born = self.began = self.done = 0.0  # first launch, last launch, end
        self.sent: float | None = None
        self.connect_s = self.retry_s = 0.0
        self.attempt = 1
        self.cancel_events = 0

    def received(self, data: bytes, at: float) -> None:
        """Take bytes of the answer."""
        try:
            is_whole = self.response.take(data, at)
        except wire.WireError:
            self.sender.end(self, "bad_response", at)
            return
        if is_whole:
            self.sender.end(self, "ok", at)
        elif self.cancel_events:
            self.cancel_events -= min(self.cancel_events, data.count(b"data:") or (self.response.status == 200))
            if not self.cancel_events:
                self.sender.end(self, "cancelled", at)

    def ended(self) -> None:
        """Take note that the connection was closed."""
        try:
            is_whole = self.response.settle() or self.response.closed()
        except wire.WireError:
            self.sender.end(self, "bad_response", clock())
            return
        self.sender.end(self, "ok" if is_whole else "reset", clock())


class Sender:
    """Sends requests and writes down what came of each."""

    def __init__(self, work: job.Job, loop: Loop, rows: IO[bytes], tell: Callable[[Outcome, float, float, int], None]) -> None:
        """Be ready.  `tell` hears of each request that ended: outcome, moment of the run, seconds it took, tokens."""
        self._work, self._rows, self._tell = work, rows, tell
        self.tell_first: Callable[[float], None] | None = None  # hears of each TTFT, where somebody looks
        payload = payloads.loaded(work.payload)
        self._endpoint, self._payload, self.order = endpoints.make(work.endpoint), payloads.make(payload), payloads.Order(payload)
        self._head = heads.head(work)
        self._length = b"x-mlsys-sched: %.6f\r\nContent-Length: %d\r\n\r\n"
        self.new_response = _responses(work, self._endpoint)
        self.alarm = Alarm(loop)
        self.pulse = Pulse(self.alarm, loop)
        self.pulse.each_beat(self._sweep)
        self.links = Links(loop, Way(work), keeps=work.client.keep_alive)
        self._idle = loop.idle()
        self._awake = Awake(loop) if work.busy_poll else None
        self._is_reading = False
        self._unread: deque[Flight] = deque()
        self._most_unread = min(work.users * work.at_once, _BACKLOG) if work.users else _BACKLOG
        self._written: list[bytes] = []
        self.flying: dict[Flight, None] = {}  # in the order of their launch, so that the first is the first to time out
        self._pausing: dict[Flight, None] = {}  # until the next attempt
        self.t0 = self.t0_unix_s = 0.0
        self.sent = self.ok = self.failed = self.retries = 0
        self.worst_late_s = 0.0
        self.is_stopped = False  # by hand

    def start_clock(self, at: float) -> None:
        """Make a moment of the monotonic clock the run's second zero."""
        self.t0, self.t0_unix_s = at, time.time() + at - clock()
        self.pulse.start()
        if self._awake is not None:
            self._awake.start()

    def now_s(self) -> float:
        """Return seconds since the run's start."""
        return clock() - self.t0

    @property
    def polled_s(self) -> float:
        """Return how long the hub looked for events that were not there, instead of sleeping."""
        return 0.0 if self._awake is None else self._awake.vain_s

    @property
    def in_flight(self) -> int:
        """Return how many requests are on their way or will try again."""
        return len(self.flying) + len(self._pausing)

    # ------------------------------------------------------------ sending

    def prepare(self, index: int, scheduled_s: float | None = None, said: tuple[str, ...] = ()) -> Flight:
        """Return a request that only waits for its moment; without a moment, it is due now."""
        body = self._endpoint.body(self._payload.ask(index, said))
        due_s = clock() - self.t0 if scheduled_s is None else scheduled_s
        request = body if self._head is None else b"%b%b%b" % (self._head, self._length % (self.t0_unix_s + due_s, len(body)), body)
        return Flight(self, index, due_s, request, said)

    def launch(self, flight: Flight) -> None:
        """Send a request this very moment."""
        flight.began = clock()
        flight.born = flight.born or flight.began
        self.flying[flight] = None
        link = (self.links.kept(flight.index) if self.order.waits else None) or self.links.idle()
        if link is not None:
            self._send(flight, link)
        else:
            flight.opening = self.links.open(lambda link: self._opened(flight, link))

    def _opened(self, flight: Flight, link: Link | None) -> None:
        flight.opening = None
        if link is None:
            self.end(flight, "connect", clock())
            return
        self.links.opened_late += 1
        self._send(flight, link, waited=True)

    def _send(self, flight: Flight, link: Link, waited: bool = False) -> None:
        link.rider, flight.link = flight, link
        now = clock()
        if flight.sent is None:
            flight.sent = now
            if waited or flight.attempt > 1:
                flight.connect_s = now - flight.born
            self.sent += 1
            late_s = now - self.t0 - flight.scheduled_s - flight.connect_s
            if late_s > self.worst_late_s:
                self.worst_late_s = late_s
        if self._work.client.cancel is not None:
            self._draw_cancel(flight, self._work.client.cancel)
        if not link.send(flight.request):
            self.end(flight, "reset", clock())

    def _draw_cancel(self, flight: Flight, cancel: Cancel) -> None:
        events, seconds = cancel.draw(self._work.seed, flight.index)
        flight.cancel_events = events or 0
        if seconds is not None:
            began = flight.began
            self.alarm.at(clock() + seconds, lambda: self._give_up(flight, began))

    def _give_up(self, flight: Flight, began: float) -> None:
        if flight in self.flying and flight.began == began:  # still the same attempt
            self.end(flight, "cancelled", clock())

    # ------------------------------------------------------------ ending

    def end(self, flight: Flight, outcome: Outcome, at: float) -> None:
        """Take a request out of the air.  `ok` still means no more than that its answer came whole."""
        del self.flying[flight]
        flight.outcome, flight.done = outcome, at
        self._release(flight)
        if flight.attempt <= self._work.client.retries and self._may_try_again(flight):
            self._pause(flight)
        else:
            self._land(flight)

    def _land(self, flight: Flight) -> None:
        self._unread.append(flight)
        if flight.then is not None:
            flight.then(flight)  # before reading: in a closed loop the next request goes out first
        if len(self._unread) > self._most_unread:
            self._read_one()
            self._read_one()
        else:
            self._go_on_reading()

    def end_all(self, outcome: Outcome) -> None:
        """End what is still on its way, and write everything down."""
        self.is_stopped = self.is_stopped or outcome == "cancelled"
        pausing, self._pausing = self._pausing, {}
        for flight in pausing:  # what became of the last attempt is all that will
            flight.then = None
            flight.outcome = "cancelled" if self.is_stopped else flight.outcome
            self._land(flight)
        for flight in [*self.flying]:
            flight.then = None
            self.end(flight, outcome, clock())
        while self._unread:
            self._read_one()
        self.flush()

    def close(self) -> None:
        """Let go of timers and connections."""
        self._idle.stop()
        self._idle.close()
        if self._awake is not None:
            self._awake.close()
        self.links.close()
        self.pulse.close()
        self.alarm.close()

    def _release(self, flight: Flight) -> None:
        link = flight.link or flight.opening
        flight.link = flight.opening = None
        if link is None:
            return
        link.rider = None
        if flight.outcome == "ok" and flight.response.keep_alive:
            following = self.order.after(flight.index) if self.order.waits else None
            if following is None:
                self.links.give(link)
            else:
                self.links.keep(link, following[0])
        else:
            link.close()

    def _sweep(self, now: float) -> None:
        """End what has taken too long, and write what was read."""
        client = self._work.client
        for flight in self._overdue(now - self._work.timeout_s):
            self.end(flight, "timeout" if flight.sent is not None else "connect", now)
        if client.connect_timeout_s is not None:
            for flight in [f for f in self._overdue(now - client.connect_timeout_s) if f.opening is not None]:
                self.end(flight, "connect", now)
        if client.first_byte_timeout_s is not None:
            for flight in [f for f in self._overdue(now - client.first_byte_timeout_s) if f.link is not None and not f.response.status]:
                self.end(flight, "timeout", now)
        self._go_on_reading()
        self.flush()

    def _overdue(self, before: float) -> list[Flight]:
        found = []
        for flight in self.flying:
            if flight.began > before:
                break
            found.append(flight)
        return found

    # ------------------------------------------------------------ trying again

    def _may_try_again(self, flight: Flight) -> bool:
        if flight.outcome == "ok":
            return flight.response.status in _REJECTED
        return flight.outcome in ("connect", "reset") and not flight.response.status

    def _pause(self, flight: Flight) -> None:
        pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (flight.attempt - 1))
        asked_s = heads.retry_after_s(flight.response.headers.get("retry-after"), time.time())
        flight.attempt += 1
        self.retries += 1
        self._pausing[flight] = None
        self.alarm.at(clock() + (pause_s if asked_s is None else asked_s), lambda: self._try_again(flight))

    def _try_again(self, flight: Flight) -> None:
        if flight in self._pausing:
            del self._pausing[flight]
            flight.response = self.new_response()
            flight.retry_s = self.now_s() - flight.scheduled_s
            self.launch(flight)

    # ------------------------------------------------------------ reading and writing

    def read_answer(self, flight: Flight) -> None:
        """Find what an answer says and what became of the request, once."""
        if flight.answer is not None:
            return
        response = flight.response
        try:
            response.settle()
            flight.answer = self._endpoint.read(response) if endpoints.is_answer(self._work.endpoint, response.status) else None
        except (ValueError, msgspec.MsgspecError, RecursionError):  # WireError is one; garbage finds every hole of a parser
            flight.outcome = "bad_response" if flight.outcome == "ok" else flight.outcome
        if flight.outcome == "ok":
            flight.outcome = _judge(response, flight.answer)

    def _read(self) -> None:
        """Read answers while nothing is due."""
        until = clock() + _READ_S
        while self._unread and clock() < until:
            takes_s = min(_EVENT_S * self._unread[0].response.events, _LONGEST_READ_S)
            if self.alarm.next_s() < _QUIET_S + takes_s:
                break  # the next answer, or beat, goes on; to stay would be to spin
            self._read_one()
        else:
            if self._unread:
                return
        self._idle.stop()
        self._is_reading = False

    def _go_on_reading(self) -> None:
        if self._unread and not self._is_reading:
            self._is_reading = True
            self._idle.start(self._read)

    def _read_one(self) -> None:
        if not self._unread:
            return
        flight = self._unread.popleft()
        self.read_answer(flight)
        self._written.append(spool.encode(self._row(flight)))
        good = flight.outcome == "ok"
        self.ok += good
        self.failed += not good
        tokens = flight.answer.output_tokens if flight.answer is not None else None
        self._tell(flight.outcome, flight.done - self.t0, flight.done - self.t0 - flight.scheduled_s, tokens or 0)
        if self.tell_first is not None and good and flight.answer is not None and flight.answer.token_s:
            self.tell_first(flight.answer.token_s[0] - self.t0 - flight.scheduled_s)

    def flush(self) -> None:
        """Write what was read; a row written is a row kept."""
        if self._written:
            self._rows.write(b"".join(self._written))
            self._written.clear()

    def _row(self, flight: Flight) -> spool.Row:
        t0, response, answer, outcome = self.t0, flight.response, flight.answer, flight.outcome
        return spool.Row(
            flight.index,
            flight.scheduled_s,
            None if flight.sent is None else flight.sent - t0,
            None if response.headers_at is None else response.headers_at - t0,
            tuple([at - t0 for at in answer.token_s]) if answer is not None else (),
            answer.tokens_per_event if answer is not None else (),
            flight.done - t0,
            answer.prompt_tokens if answer is not None else None,
            answer.output_tokens if answer is not None else None,
            answer.token_source if answer is not None else None,
            outcome,
            response.status or None,
            flight.attempt,
            self.order.tenant(flight.index),
            self.order.session(flight.index),
            _stages(flight),
            self._work.warmup_s <= flight.scheduled_s < self._work.duration_s and not (self.is_stopped and outcome == "cancelled"),
        )


def _stages(flight: Flight) -> dict[str, float]:
    if not flight.connect_s and not flight.retry_s:
        return {}
    return {name: value for name, value in (("connect", flight.connect_s), ("retry", flight.retry_s)) if value}


def _responses(work: job.Job, endpoint: endpoints.Endpoint) -> Callable[[], wire.Response]:
    if work.transport == "http":
        return wire.Bodiless if work.endpoint.form.method == "HEAD" else wire.Response
    from mlsys_bench.loadtest import websocket

    is_end = endpoint.is_end if isinstance(endpoint, endpoints.Conversation) else None
    return lambda: websocket.Messages(is_end)


def _judge(response: wire.Response, answer: Answer | None) -> Outcome:
    """Return what became of a response that came whole."""
    if response.status in _REJECTED:
        return "rejected"
    if answer is None or answer.is_whole:
        return "bad_response" if answer is None else "ok"
    return "reset" if response.closed() else "bad_response"  # a body without a length is cut off like this
