"""Moments of the monotonic clock, on the hub of the load worker: call me then, and how late was the hub itself.

Knows the hub only as a `Loop` handed in, so that nothing here imports gevent.
"""

from __future__ import annotations

import contextlib
import ctypes
import heapq
import itertools
import math
import os
import struct
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any, Protocol

clock = time.monotonic
_TICK_S = 0.01
_LEARNT = 501  # turns, about two milliseconds
READ, WRITE = 1, 2


class Watcher(Protocol):
    """Calls back from the hub."""

    priority: int  # what is due in the same turn of the hub is called in this order

    def start(self, callback: Callable[..., Any], *args: Any) -> Any:
        """Begin, or go on with another callback."""
        ...

    def stop(self) -> Any:
        """Call no more."""
        ...

    def close(self) -> Any:
        """Give up for good."""
        ...


class Loop(Protocol):
    """What we use of gevent's hub."""

    def io(self, fd: int, events: int) -> Watcher:
        """Return a watcher of a file descriptor."""
        ...

    def timer(self, after: float) -> Watcher:
        """Return a watcher of time that passes."""
        ...

    def idle(self) -> Watcher:
        """Return a watcher that is called when nothing else is to do."""
        ...

    def prepare(self) -> Watcher:
        """Return a watcher that is called when all that was due in a turn has been called."""
        ...


class Alarm:
    """Calls back at moments.  timerfd where there is one: the hub's own timers are late by half a millisecond."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._set_to = math.inf
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC) if self._libc else -1
        self._watcher: Watcher | None = None
        if self._fd >= 0:
            self._watcher = loop.io(self._fd, READ)
            self._watcher.priority = 2  # a request that is due goes before answers that came
            self._watcher.start(self._ring)

    def at(self, moment: float, callback: Callable[[], None]) -> None:
        """Call back at a moment, or in the next turn of the hub when it is past."""
        heapq.heappush(self._due, (moment, next(self._order), callback))
        if moment < self._set_to:
            self._set(moment)

    def next_s(self) -> float:
        """Return the seconds until the next call."""
        return self._due[0][0] - clock() if self._due else math.inf

    def close(self) -> None:
        """Give the timer back; who waits is not called any more."""
        self._due.clear()
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        if self._fd >= 0:
            os.close(self._fd)

    def _ring(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.read(self._fd, 8)
        self._set_to = math.inf
        last = next(self._order)  # who is added from here on waits for the next turn: answers get theirs
        due = self._due
        while due and due[0][0] <= clock() and due[0][1] < last:
            heapq.heappop(due)[2]()
        if due and due[0][0] < self._set_to:
            self._set(due[0][0])

    def _set(self, moment: float) -> None:
        self._set_to = moment
        if self._libc is not None and self._fd >= 0:
            whole = int(moment)
            setting = struct.pack("@qqqq", 0, 0, whole, max(1, int((moment - whole) * 1e9)))
            self._libc.timerfd_settime(self._fd, 1, setting, None)  # 1: absolute
            return
        if self._watcher is not None:
            self._watcher.stop()
            self._watcher.close()
        self._watcher = self._loop.timer(max(0.0, moment - clock()))
        self._watcher.start(self._ring)


class Awake:
    """Keeps the hub from sleeping: it looks for events all the time, for a core of its own, and adds up the time it looked in vain.

    A sleeping process is woken 50 to 100 us late, on virtual machines more.  What was spent in vain is no work: a turn of the hub counts
    as such where it took no longer than three times the median of the first turns, in which nothing is to do yet.
    """

    def __init__(self, loop: Loop) -> None:
        self._watcher = loop.idle()
        self._first: list[float] = []
        self._last = self._most_s = self.vain_s = 0.0

    def start(self) -> None:
        """Sleep no more."""
        self._last = clock()
        self._watcher.start(self._learn)

    def close(self) -> None:
        """Sleep again."""
        self._watcher.stop()
        self._watcher.close()

    def _learn(self) -> None:
        now = clock()
        self._first.append(now - self._last)
        self._last = now
        if len(self._first) == _LEARNT:
            self._most_s = 3 * sorted(self._first)[_LEARNT // 2]
            self.vain_s = sum(turn_s for turn_s in self._first if turn_s <= self._most_s)
            self._watcher.stop()
            self._watcher.start(self._turn)

    def _turn(self) -> None:
        now = clock()
        turn_s = now - self._last
        self._last = now
        if turn_s <= self._most_s:
            self.vain_s += turn_s


class Pulse:
    """A beat every 10 ms: how late each is, once the answers that came with it are stamped, is the lag of the hub, which stamps share.

    Alarms go before answers, so a stamp taken in the alarm itself would leave out the answers' own wait.  And a hub that stands still for
    a second is a hundred beats late, as the answers of that second are: one late beat would hide it from a p99.
    """

    def __init__(self, alarm: Alarm, loop: Loop) -> None:
        self._alarm = alarm
        self._late = array("f")
        self._beats: list[Callable[[float], None]] = []
        self._next = math.inf
        self._turn = loop.prepare()

    def each_beat(self, callback: Callable[[float], None]) -> None:
        """Have something called at every beat with its moment."""
        self._beats.append(callback)

    def start(self) -> None:
        """Begin to beat."""
        self._next = clock() + _TICK_S
        self._alarm.at(self._next, self._beat)

    def close(self) -> None:
        """Beat no more."""
        self._turn.stop()
        self._turn.close()

    def lag_p99_s(self) -> float:
        """Return the lag that 99 of 100 beats kept below."""
        if not self._late:
            return 0.0
        late = sorted(self._late)  # of ranks, without numpy: its import would be a tenth of the worker's start
        return late[len(late) * 99 // 100]

    def _beat(self) -> None:
        now = clock()
        for callback in self._beats:
            callback(now)
        self._turn.start(self._turned)

    def _turned(self) -> None:
        """Take the lag of this beat, and of those that were missed meanwhile; go on with the first that is still to come."""
        self._turn.stop()
        now = clock()
        while self._next <= now:
            self._late.append(now - self._next)
            self._next += _TICK_S
        self._alarm.at(self._next, self._beat)
