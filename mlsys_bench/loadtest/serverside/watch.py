"""Looking at servers and devices once a second while a load test runs, without a part in it.

Each source has a thread of its own in the parent process, kept off the load workers' cores, with its own clock.  A look may take up to
a hundredth of a core here and a tenth of the time there: sources that cost more are looked at less often.  Nothing that a source does
(hang, break, send garbage) reaches the run; it is written down, and the run's end waits for no answer.
"""

from __future__ import annotations

import os
import threading
import time
from array import array
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlsys_bench.loadtest.serverside.page import MissedError
from mlsys_bench.loadtest.serverside.text import Key

INTERVAL_S = 1.0
TIMEOUT_S = 5.0
_LAST_LOOK_S = 0.4  # of waiting at the end of the run
_CPU_SHARE = 0.01  # of a core, here
_ANSWER_SHARE = 0.1  # of the time, there
_LONGEST_PAUSE_S = 30.0  # after failures in a row


class Source(Protocol):
    """Something that can be looked at."""

    where: str
    bytes: int

    def look(self, timeout_s: float) -> dict[Key, float]:
        """Return samples.  Raises MissedError."""
        ...

    def close(self) -> None:
        """End a look that is under way, from another thread."""
        ...

    def release(self) -> None:
        """Give everything back, from the thread that looks."""
        ...


@dataclass(slots=True, kw_only=True)
class Looks:
    """What came of looking at one source.  Times are Unix seconds of the moment between question and answer."""

    where: str
    times_s: array[float] = field(default_factory=lambda: array("d"))
    took_s: array[float] = field(default_factory=lambda: array("d"))
    samples: dict[Key, tuple[array[float], array[float]]] = field(default_factory=dict)  # times and values
    failed: int = 0
    missed: str | None = None  # why the last failure failed
    bytes: int = 0
    cpu_s: float = 0.0
    lasted_s: float = 0.0  # the whole watch

    def add(self, at_s: float, took_s: float, found: dict[Key, float], size: int) -> None:
        """Keep what a look brought."""
        self.times_s.append(at_s)
        self.took_s.append(took_s)
        self.bytes += size
        for key, value in found.items():
            if key not in self.samples:
                self.samples[key] = (array("d"), array("d"))
            times, values = self.samples[key]
            times.append(at_s)
            values.append(value)


class Watch:
    """Threads that look at sources until they are told to stop.  `may_be_absent`: sources that are tried once and then left alone."""

    def __init__(
        self, sources: Sequence[tuple[Source, bool]], *, avoid_cores: Collection[int] = (), interval_s: float = INTERVAL_S
    ) -> None:
        self._over, self._began = threading.Event(), time.monotonic()
        self._interval_s, self._cores = interval_s, _cores_beside(avoid_cores)
        self._offset_s = time.time() - time.monotonic()  # one reading: a clock that is set during the run must not bend the line of time
        self._sources = [source for source, _ in sources]
        self.looks = [Looks(where=source.where) for source in self._sources]
        self._threads = [
            threading.Thread(target=self._follow, args=(source, looks, may_be_absent), name="mlsys-metrics", daemon=True)
            for (source, may_be_absent), looks in zip(sources, self.looks, strict=True)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[Looks]:
        """Take one last look where that takes no time, end the threads and return what was seen."""
        self._over.set()
        until = time.monotonic() + _LAST_LOOK_S
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        for source, thread in zip(self._sources, self._threads, strict=True):
            if thread.is_alive():
                source.close()
                thread.join(_LAST_LOOK_S)
        for looks in self.looks:
            looks.lasted_s = time.monotonic() - self._began
        return self.looks

    def _follow(self, source: Source, looks: Looks, may_be_absent: bool) -> None:
        _pin(self._cores)
        due = time.monotonic()
        failures = 0
        try:
            while True:
                is_last = self._over.is_set()
                if is_last and (failures or not looks.times_s):
                    return
                failures = 0 if self._look(source, looks, _LAST_LOOK_S if is_last else TIMEOUT_S) else failures + 1
                if is_last or (failures and may_be_absent and not looks.times_s):
                    return
                due = max(due + self._interval_s, time.monotonic() + self._pause_s(looks, failures))
                self._over.wait(max(0.0, due - time.monotonic()))
        finally:
            source.release()
            looks.cpu_s = time.thread_time()

    def _look(self, source: Source, looks: Looks, timeout_s: float) -> bool:
        asked_s = time.monotonic()
        try:
            found = source.look(timeout_s)
        except MissedError as missed:
            if not self._over.is_set():  # what the end of the run breaks off is no fault
                looks.failed += 1
                looks.missed = str(missed)
            return False
        answered_s = time.monotonic()
        looks.add((asked_s + answered_s) / 2 + self._offset_s, answered_s - asked_s, found, source.bytes)
        looks.cpu_s = time.thread_time()
        return True

    def _pause_s(self, looks: Looks, failures: int) -> float:
        """Return how long to leave a source alone: by what it costs, or by how often it failed."""
        if failures:
            return min(self._interval_s * 2.0**failures, _LONGEST_PAUSE_S)
        each_s = looks.cpu_s / max(len(looks.times_s), 1)
        return max(each_s / _CPU_SHARE, looks.took_s[-1] / _ANSWER_SHARE) if len(looks.times_s) > 1 else 0.0


def _cores_beside(avoid: Collection[int]) -> set[int]:
    """Return the cores this process may use and the load workers do not, empty where that leaves none."""
    return set(os.sched_getaffinity(0)) - set(avoid) if hasattr(os, "sched_getaffinity") else set()


def _pin(cores: set[int]) -> None:
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # 0: this thread alone
