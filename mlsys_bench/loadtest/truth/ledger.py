"""What the server really did: stamps taken right before each write, and the figures made of them when somebody asks."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

clock = time.monotonic
_CPU_EVERY_S = 0.1  # asking for the CPU time of a process is no small call everywhere


class Entry:
    """One generation request; seconds of the monotonic clock."""

    __slots__ = ("arrived", "done", "due_unix_s", "first", "tokens")

    def __init__(self, arrived: float, due_unix_s: float | None) -> None:
        self.arrived, self.due_unix_s = arrived, due_unix_s
        self.first: float | None = None
        self.done: float | None = None
        self.tokens = 0


class Ledger:
    """Everything since the last reset."""

    def __init__(self) -> None:
        self.connections = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was recorded."""
        self.entries: list[Entry] = []
        self.gaps = array("d")  # between neighbouring token events of a stream
        self.late = array("d")  # writes after they were due
        self.accepted = self.left = self.in_service = self.peak_in_service = self.peak_connections = 0
        self._unix = time.time() - clock()
        self._first: tuple[float, float] | None = None  # (wall, CPU) when the first request came
        self._last: tuple[float, float] | None = None  # and when the last one was done

    def came(self, entry: Entry) -> None:
        """Write a request down."""
        self.entries.append(entry)
        self._first = self._first or (entry.arrived, time.process_time())

    def went(self, entry: Entry, now: float, tokens: int) -> None:
        """Write down that a request was answered."""
        entry.done, entry.tokens = now, tokens
        if self._last is None or now - self._last[0] > _CPU_EVERY_S:
            self._last = now, time.process_time()

    def rows(self) -> list[dict[str, Any]]:
        """Return every request in the order of arrival, as `truth.Row` has it."""
        return [
            {
                "due_unix_s": e.due_unix_s,
                "arrived_unix_s": e.arrived + self._unix,
                "first_s": None if e.first is None else e.first - e.arrived,
                "done_s": None if e.done is None else e.done - e.arrived,
                "tokens": e.tokens,
            }
            for e in self.entries
        ]

    def stats(self) -> dict[str, Any]:
        """Return the truth in figures; times in milliseconds."""
        arrived = np.array([e.arrived for e in self.entries])
        ended = [e for e in self.entries if e.done is not None]
        gaps_s = np.diff(arrived)
        span_s = float(arrived[-1] - arrived[0]) if len(arrived) else 0.0
        return {
            "requests": len(arrived),
            "span_s": span_s,
            "arrivals_per_s": (len(arrived) - 1) / span_s if span_s > 0 else None,
            "gap_cv": float(gaps_s.std() / gaps_s.mean()) if span_s > 0 else None,
            "tokens": sum(e.tokens for e in self.entries),
            "answered": len(ended),
            "left": self.left,
            "peak_in_service": self.peak_in_service,
            "connections_accepted": self.accepted,
            "peak_connections": self.peak_connections,
            "ttft_ms": _quantiles([e.first - e.arrived for e in self.entries if e.first is not None]),
            "itl_ms": _quantiles(self.gaps),
            "e2e_ms": _quantiles([e.done - e.arrived for e in ended if e.done is not None]),
            "client_late_ms": _quantiles([e.arrived + self._unix - e.due_unix_s for e in self.entries if e.due_unix_s is not None]),
            "server_late_ms": _quantiles(self.late),
            "cpu_share": self._cpu_share(),
        }

    def _cpu_share(self) -> float:
        """Return the share of a core that was used between the first request and the last answer."""
        if self._first is None or self._last is None or self._last[0] <= self._first[0]:
            return 0.0
        return (self._last[1] - self._first[1]) / (self._last[0] - self._first[0])


def _quantiles(values_s: Sequence[float]) -> dict[str, float] | None:
    """Return mean, p50, p90, p99 and max in milliseconds; None of nothing."""
    if not len(values_s):
        return None
    values = 1e3 * np.asarray(values_s)
    p50, p90, p99 = (float(q) for q in np.quantile(values, (0.5, 0.9, 0.99)))
    return {"mean": float(values.mean()), "p50": p50, "p90": p90, "p99": p99, "max": float(values.max())}
