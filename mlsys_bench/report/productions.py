"""A plan beside production, in words: is the traffic the one planned for, and do the predictions hold at the traffic there is."""

from __future__ import annotations

import datetime
from collections import Counter

from mlsys_bench import units
from mlsys_bench.checked import Check
from mlsys_bench.productions import Kept, Production, Seen
from mlsys_bench.report.latencies import METRICS, figure, name
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, Tone, digits, mark, percent, span, time, time_span
from mlsys_bench.units import count

CAPACITY = "capacity_per_s"
TONE: dict[str, Tone] = {"holds": "good", "does not hold": "bad", "undecided": "unsure"}
LIMIT: dict[bool | None, str] = {True: "kept", False: "missed", None: "cannot be told"}
NOTE = "below each figure its 90 % interval; of production's percentiles the edges they lie between, and below them about where"
STATS = ("mean", "p50", "p90", "p95", "p99")


def production(record: Production) -> Section:
    """Return what production says of a plan."""
    return Section(
        kind="production",
        title=f"{record.plan_file} beside production",
        lead=_lead(record),
        tag="measured",
        tone=TONE[record.verdict],
        facts=tuple(_facts(record)),
        tables=tuple(table for table in (_traffic(record), _figures(record), _limits(record)) if table is not None),
        notes=(("Notes", record.notes),) if record.notes else (),
    )


def deciding(record: Production) -> tuple[Check, ...]:
    """Return the checks that the verdict stands on: the plan's own where its traffic came, else those made anew."""
    if not record.as_planned:
        return tuple(sorted(record.remade, key=_order))
    own = {c.key for c in record.checks}
    return tuple(sorted((*record.checks, *(c for c in record.remade if c.key not in own)), key=_order))


def _lead(r: Production) -> str:
    if not r.requests:
        return "Undecided: no traffic in the range."
    missed = [limit.limit for limit in r.limits if limit.kept is False]
    limits = f"; missed: {', '.join(missed)}" if missed else ""
    traffic = "Production's traffic is the plan's" if r.as_planned else f"Production's traffic is not the plan's ({_differences(r)})"
    return f"{_verdict(r)} {traffic}; {_found(r)}{limits}."


def _found(r: Production) -> str:
    if any(c.key == CAPACITY for c in r.remade):
        return f"it is {units.show_share(r.utilisation_seen)} of what the plan's profile lets a replica carry, so nothing else is predicted"
    said = Counter(c.inside for c in deciding(r))
    coarse = sum(c.inside is None and _is_measured(c) for c in deciding(r))
    where = "" if r.as_planned else ", made anew for it,"
    return f"{said[True]} of {said[True] + said[False]} predictions{where} hold" + f", {coarse} cannot be decided" * bool(coarse)


def _verdict(r: Production) -> str:
    if r.verdict == "undecided":
        return "Undecided: too little is known."
    return f"The plan {r.verdict}." if r.as_planned else "The plan's model holds." if r.verdict == "holds" else "The plan does not hold."


def _differences(r: Production) -> str:
    other = [
        f"{s.name} {percent(100 * (s.seen / s.planned - 1), signed=True) if s.planned else digits(s.seen)}"
        for s in r.traffic
        if not s.alike
    ]
    return ", ".join(other) or "its arrivals come differently"


def _facts(r: Production) -> list[Fact]:
    start = datetime.datetime.fromtimestamp(r.start_unix_s, tz=datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    facts = [Fact("Source", r.source, f"{r.engine}, {count(r.requests, 'request')} in {_hours(r.duration_s)} from {start}", "measured")]
    if not r.requests:
        return facts
    counted = "counted by their labels" if r.replicas_counted else "no label tells them apart: as planned"
    facts.append(
        Fact("Replicas", digits(r.replicas), f"{r.replicas_planned} planned; {counted}", "measured" if r.replicas_counted else "assumed")
    )
    facts.append(Fact("Rate", units.show_rate(r.rate_per_s), f"{units.show_rate(r.rate_per_s / r.replicas)} a replica", "measured"))
    if r.utilisation_seen is not None:
        full: Tone = "bad" if r.utilisation_seen >= 1 else ""
        planned = f"{units.show_share(r.utilisation)} planned; offered load over predicted capacity"
        facts.append(Fact("Utilisation", units.show_share(r.utilisation_seen), planned, "", full))
    if r.kv_share is not None:
        facts.append(
            Fact("KV memory", f"{units.show_share(r.kv_share[0])} in use", f"at most {units.show_share(r.kv_share[1])}", "measured")
        )
    return facts


def _hours(seconds: float) -> str:
    return time(seconds) if seconds < 600 else f"{digits(seconds / 60)} min" if seconds < 7200 else f"{digits(seconds / 3600)} h"


def _traffic(r: Production) -> Table | None:
    """Return the traffic planned for beside the one that came."""
    columns = (
        Column("traffic"),
        Column("planned", right=True),
        Column("production", right=True),
        Column("difference", right=True),
        Column("alike"),
    )
    return Table(title="", columns=columns, rows=tuple(map(_traffic_row, r.traffic))) if r.traffic else None


def _traffic_row(s: Seen) -> tuple[Cell, ...]:
    between = "" if s.low is None else span((s.low, s.high), 1, s.unit) if s.high is not None else f"over {digits(s.low)}{s.unit}"
    return (
        Cell(s.name, "strong"),
        Cell(f"{digits(s.planned)}{s.unit}"),
        Cell(f"{digits(s.seen)}{s.unit}", "", between),
        Cell(percent(100 * (s.seen / s.planned - 1), signed=True) if s.planned else NONE),
        mark(s.alike),
    )


def _figures(r: Production) -> Table | None:
    """Return predictions beside production: as planned, and where the traffic is another, made anew."""
    judged = [c for c in deciding(r) if _is_measured(c)]
    if not judged:
        return None
    own = {c.key: c for c in r.checks}
    at: tuple[Column, ...] = (Column("predicted", right=True),)
    if not r.as_planned:
        at = (Column("planned", right=True), Column("made anew", right=True))
    columns = (Column("figure"), *at, Column("production", right=True), Column("error, holds", right=True))
    return Table(title="", columns=columns, rows=tuple(_row(c, () if r.as_planned else (own.get(c.key),)) for c in judged), note=NOTE)


def _order(c: Check) -> tuple[int, int]:
    metric, _, stat = c.key.removesuffix("_s").partition("_")
    return (METRICS.index(metric) if metric in METRICS else len(METRICS)), (STATS.index(stat) if stat in STATS else len(STATS))


def _row(c: Check, planned: tuple[Check | None, ...]) -> tuple[Cell, ...]:
    said = mark(c.inside)
    error = "in range" if c.error_percent == 0 else percent(c.error_percent, signed=True)
    return (
        Cell(name(c.key), "strong"),
        *(_predicted(p)._replace(sub="") for p in planned),
        _predicted(c),
        _seen(c),
        Cell(f"{error} {said.text}", said.tone, "" if c.inside is not None else "not refuted" if c.key == CAPACITY else "too coarse"),
    )


def _seen(c: Check) -> Cell:
    """Return what production shows: of a percentile the range it lies in, and below it about where."""
    value, between = figure(c.key, c.measured, None).text, _between(c)
    if c.key.removesuffix("_s").endswith(STATS[1:]):
        return Cell(between, "", "" if c.measured is None else f"about {value}")
    return Cell(value, "", between)


def _predicted(c: Check | None) -> Cell:
    if c is None:
        return Cell(NONE, "muted")
    return figure(c.key, c.predicted, None if c.low is None or c.high is None else (c.low, c.high))


def _is_measured(c: Check) -> bool:
    return c.measured is not None or c.measured_low is not None


def _between(c: Check) -> str:
    """Return between which values production's figure lies."""
    if c.measured_low is None:
        return ""
    if c.measured_high is None:
        return f"over {figure(c.key, c.measured_low, None).text}"
    return figure(c.key, c.measured_high, (c.measured_low, c.measured_high)).sub


def _limits(r: Production) -> Table | None:
    """Return the promises of the plan beside what production shows."""
    columns = (Column("limit"), Column("production", right=True), Column("kept"))
    return Table(title="Limits in production", columns=columns, rows=tuple(map(_limit, r.limits))) if r.limits else None


def _limit(limit: Kept) -> tuple[Cell, ...]:
    seen = NONE if limit.low is None else f"over {time(limit.low)}" if limit.high is None else time_span((limit.low, limit.high))
    return Cell(limit.limit), Cell(seen), mark(limit.kept)._replace(sub="" if limit.kept is not None else LIMIT[None])
