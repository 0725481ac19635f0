"""Who sends when: an open loop follows the schedule, a closed loop waits for its answers.  Driven by the hub's callbacks.

Each loop has lanes: one for the schedule, one for each user.  A Locust user stands for a lane: it waits until the lane has ended.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

from mlsys_bench.loadtest import endpoints, job
from mlsys_bench.loadtest.alarm import clock
from mlsys_bench.loadtest.sender import Flight, Sender

_PREPARE_S = 0.001  # a request is built so long before it is due, which also wakes a sleeping core
_AT_A_TIME = 16  # overdue requests in a row before answers get a turn
_AFTER_FAILURE_S = 0.1  # pause of a closed-loop user: a server that is gone would be asked 10,000 times a second


class Lane(Protocol):
    """One of those who send."""

    def begin(self, then: Callable[[], None]) -> None:
        """Send from second zero on; call when nothing new will be sent."""
        ...


def lanes(sender: Sender, work: job.Job) -> list[Lane]:
    """Return the lanes of a job."""
    if not work.users:
        return [Schedule(sender, work)]
    numbers = itertools.count(work.share, work.shares)
    return [User(sender, work, numbers) for _ in range(work.users)]


class Schedule:
    """The open loop: each request goes out when it is due, whatever became of the others."""

    def __init__(self, sender: Sender, work: job.Job) -> None:
        self._sender, self._work = sender, work
        self._rest = iter(range(work.share, len(work.scheduled_s), work.shares))
        self._index = next(self._rest, -1)
        self._flight: Flight | None = None
        self._ahead_s = _PREPARE_S
        self._then: Callable[[], None] | None = None

    def begin(self, then: Callable[[], None]) -> None:
        """Send from second zero on; call when nothing new will be sent."""
        self._then = then
        self._go()

    def _go(self) -> None:
        """Send what is due, and come back for the next."""
        sender, scheduled_s, t0 = self._sender, self._work.scheduled_s, self._sender.t0
        for _ in range(_AT_A_TIME):
            if sender.is_stopped or self._index < 0:
                break
            due = t0 + scheduled_s[self._index]
            if self._flight is None:
                began = clock()
                if due - began > 3 * self._ahead_s:
                    sender.alarm.at(due - self._ahead_s, self._go)
                    return
                self._flight = sender.prepare(self._index, scheduled_s[self._index])
                self._ahead_s = max(_PREPARE_S, 0.9 * self._ahead_s, 2 * (clock() - began))  # half a megabyte takes its time
            if clock() < due:
                sender.alarm.at(due, self._go)
                return
            flight, self._flight = self._flight, None
            flight.then = self._follow if sender.order.waits else None
            sender.launch(flight)
            self._index = next(self._rest, -1)
        if self._then is not None and (sender.is_stopped or self._index < 0):
            sender.alarm.at(t0 + self._work.duration_s, self._then)
        else:
            sender.alarm.at(clock(), self._go)

    def _follow(self, flight: Flight) -> None:
        following = next_turn(self._sender, flight)
        if following is not None:
            send_at(self._sender, self._work, following, self._follow, lambda: None)


class User:
    """One user of a closed loop: a request, or several at once, the answers, a think; nothing new after the end."""

    def __init__(self, sender: Sender, work: job.Job, numbers: itertools.count[int]) -> None:
        self._sender, self._work, self._numbers = sender, work, numbers
        self._then: Callable[[], None] = lambda: None
        self._awaited = 0
        self._failed = False
        self._last = 0

    def begin(self, then: Callable[[], None]) -> None:
        """Send from second zero on; call when nothing new will be sent."""
        self._then = then
        self._sender.alarm.at(self._sender.t0, self._ask)

    def _ask(self) -> None:
        sender, work = self._sender, self._work
        if sender.is_stopped or sender.now_s() >= work.duration_s:
            self._then()
            return
        self._failed = False
        number = next(self._numbers)
        self._awaited = work.at_once
        due_s = None if work.at_once == 1 else sender.now_s()
        flights = [sender.prepare(sender.order.first(number * work.at_once + i), due_s) for i in range(work.at_once)]
        for flight in flights:
            flight.then = self._answered
            sender.launch(flight)

    def _answered(self, flight: Flight) -> None:
        following = next_turn(self._sender, flight) if self._sender.order.waits else None
        if following is not None:
            send_at(self._sender, self._work, following, self._answered, self._then)
            return
        self._awaited -= 1
        self._failed = self._failed or flight.outcome != "ok" or not endpoints.is_answer(self._work.endpoint, flight.response.status)
        if self._awaited:
            return
        pause_s = self._work.think.after(self._work.seed, flight.index)
        if self._failed:
            pause_s = max(pause_s, _AFTER_FAILURE_S)
        if pause_s:
            self._sender.alarm.at(clock() + pause_s, self._ask)
        else:
            self._ask()


Turn = tuple[int, float, tuple[str, ...]]  # index, seconds of the run when it is due, the answers before it


def next_turn(sender: Sender, flight: Flight) -> Turn | None:
    """Return the request of the same session that waited for this answer, or None: there is none, or the session failed."""
    following = sender.order.after(flight.index)
    if following is None:
        return None
    sender.read_answer(flight)
    index, gap_s = following
    if flight.outcome != "ok" or flight.answer is None:
        link = sender.links.kept(index)  # nobody will ask for it
        if link is not None:
            sender.links.give(link)
        return None
    return index, flight.done - sender.t0 + gap_s, (*flight.said, flight.answer.text)


def send_at(sender: Sender, work: job.Job, turn: Turn, answered: Callable[[Flight], None], too_late: Callable[[], None]) -> None:
    """Send the next turn of a session when it is due, or say that the run is over by then."""
    index, due_s, said = turn

    def send() -> None:
        if sender.is_stopped:
            too_late()
            return
        flight = sender.prepare(index, due_s, said)
        flight.then = answered
        sender.launch(flight)

    sender.alarm.at(sender.t0 + min(due_s, work.duration_s), too_late if due_s >= work.duration_s else send)
