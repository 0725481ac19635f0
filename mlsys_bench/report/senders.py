"""The processes that sent a load test, a row each: where one is busier, later or lost, the load was not what was asked."""

from __future__ import annotations

from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Table, percent, time
from mlsys_bench.senders import Sender


def facts(senders: tuple[Sender, ...]) -> list[Fact]:
    """Return a line on several senders, and on polling; one that slept is told by its lateness and CPU share."""
    return [*_together(senders), *_polled(senders)]


def _polled(senders: tuple[Sender, ...]) -> list[Fact]:
    """Say that the client never slept: its stamps are truer than those of one that does, and it had a core to itself for that."""
    shares = [sender.polled_share for sender in senders if sender.polled_share is not None]
    if not shares:
        return []
    said = f"{percent(100 * max(shares))} of a core spent looking for events"
    return [Fact("Busy poll", said, "CPU shares are of the rest", "measured")]


def _together(senders: tuple[Sender, ...]) -> list[Fact]:
    if len(senders) < 2:
        return []
    hosts = len({sender.host for sender in senders})
    where = f"{len(senders)} workers on {hosts} host{'s' * (hosts > 1)}"
    lost = [sender for sender in senders if sender.ended != "done"]
    clocks = [sender.clock_error_s for sender in senders if sender.clock_error_s is not None]
    known = f"started together to within {time(max(clocks))}" if clocks else "started together, by one clock"
    return [Fact("Sent by", where, f"{len(lost)} did not come to the end" if lost else known, "measured", "bad" if lost else "")]


def tables(senders: tuple[Sender, ...]) -> tuple[Table, ...]:
    """Return a row for each of several senders."""
    if len(senders) < 2:
        return ()
    has_clocks = any(sender.clock_offset_s is not None for sender in senders)
    clocks = (Column("clock off by", right=True), Column("drift", right=True)) if has_clocks else ()
    heads = (
        Column("worker"), Column("host"), Column("core", right=True), Column("sent", right=True), Column("CPU", right=True),
        Column("late p99", right=True), *clocks, Column("ended", flexible=True),
    )  # fmt: skip
    return (Table(title="Workers", columns=heads, rows=tuple(_row(sender, has_clocks) for sender in senders)),)


def _row(s: Sender, has_clocks: bool) -> tuple[Cell, ...]:
    known = [
        Cell(str(s.share)), Cell(s.host), Cell("any" if s.core is None else str(s.core)), Cell(f"{s.sent:,}"),
        Cell(NONE if s.cpu_share is None else percent(100 * s.cpu_share)),
        Cell(NONE if s.lateness_p99_s is None else time(s.lateness_p99_s)),
    ]  # fmt: skip
    clocks = [_signed(s.clock_offset_s, s.clock_error_s), _signed(s.clock_drift_s, None)] if has_clocks else []
    return (*known, *clocks, Cell(s.ended, "" if s.ended == "done" else "bad"))


def _signed(seconds: float | None, error_s: float | None) -> Cell:
    if seconds is None:
        return Cell(NONE)
    return Cell(f"{'-' if seconds < 0 else '+'}{time(abs(seconds))}", "", "" if error_s is None else f"± {time(error_s)}")
