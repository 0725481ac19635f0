"""A hub of the standard library with the face of gevent's: it runs the load worker's callbacks where gevent must not be imported."""

# ruff: noqa: D102  its methods are gevent's

from __future__ import annotations

import selectors
import time
from collections.abc import Callable
from typing import Any


class Watcher:
    """Something that calls back while it is started."""

    def __init__(self, hub: Hub, fd: int, events: int, after: float) -> None:
        self._hub, self.fd, self.events, self.after = hub, fd, events, after
        self.priority = 0
        self.due = 0.0
        self.call: Callable[[], Any] | None = None

    def start(self, callback: Callable[..., Any], *args: Any) -> None:
        self.call = lambda: callback(*args)
        self.due = time.monotonic() + self.after
        self._hub.watchers[self] = None

    def stop(self) -> None:
        self.call = None
        self._hub.watchers.pop(self, None)

    close = stop


class Hub:
    """Prepare, select, then call: files by priority, timers that are due, and who is idle when there was nothing else."""

    def __init__(self) -> None:
        self.watchers: dict[Watcher, None] = {}

    def io(self, fd: int, events: int) -> Watcher:
        return Watcher(self, fd, events, 0.0)

    def timer(self, after: float) -> Watcher:
        return Watcher(self, -1, 0, after)

    def idle(self) -> Watcher:
        return Watcher(self, -2, 0, 0.0)

    def prepare(self) -> Watcher:
        return Watcher(self, -3, 0, 0.0)

    def run(self, until: Callable[[], bool], within_s: float = 20.0) -> None:
        """Turn until something is so."""
        end = time.monotonic() + within_s
        while not until():
            assert time.monotonic() < end, "nothing came of it"
            self._turn()

    def _turn(self) -> None:
        for watcher in [w for w in self.watchers if w.fd == -3]:
            if watcher.call is not None:
                watcher.call()
        waiting = list(self.watchers)
        with selectors.DefaultSelector() as selector:
            for fd in {w.fd for w in waiting if w.fd >= 0}:
                selector.register(fd, sum({w.events for w in waiting if w.fd == fd}))
            is_idle = any(w.fd == -2 for w in waiting)
            ready = {key.fd: events for key, events in selector.select(0 if is_idle else 0.002)}
        called = [w for w in waiting if ready.get(w.fd, 0) & w.events or (w.fd == -1 and w.due <= time.monotonic())]
        for watcher in sorted(called, key=lambda w: -w.priority) or [w for w in waiting if w.fd == -2]:
            if watcher.call is not None:
                watcher.call()
