"""The processes that sent a load test: what each did, how busy it was, how far its clock lay from the others'."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Sender:
    """One process and its share of a load test.  Clocks: this host's minus the master's; None where all share one clock."""

    share: int
    host: str
    core: int | None
    sent: int
    cpu_share: float | None  # of one core; None: it died before it could say
    lateness_p99_s: float | None
    ended: str  # "done", "stopped", or how it died
    polled_share: float | None = None  # of the run, spent looking for events in vain; not in `cpu_share`.  None: it slept meanwhile
    clock_offset_s: float | None = None  # of the wall clocks
    clock_error_s: float | None = None  # the offset is right to so much: half of the quickest round trip
    clock_drift_s: float | None = None  # how far the clocks moved apart between the start and the end
