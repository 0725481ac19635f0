"""Sweeps and searches for the highest rate, in words."""

from __future__ import annotations

import math
import re

from mlsys_bench import slo as limits
from mlsys_bench import units
from mlsys_bench.loadlimits import LoadMax, LoadSweep, Probe, Shown, SweptLevel
from mlsys_bench.report.latencies import name
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, Tone, digits, mark, percent, span, time, time_span
from mlsys_bench.types import LatencySummary, Limit
from mlsys_bench.units import count

ENDED = {
    "narrow": "the interval is within 2.5 % of the rate",
    "budget": "the time was up before the interval was narrow",
    "client": "the client itself was late at these rates",
    "stopped": "stopped by hand",
    "no rate holds": "not even the lowest rate keeps the limits",
}
SWEEP_ENDED = {
    "done": "every rate was tried",
    "saturated": "the server fell behind, so higher rates were left out",
    "stopped": "stopped by hand",
    "budget": "the time was up",
}
_STATS = ("p50", "p95", "p99")
_NUMBER = re.compile(r"\d[\d.,]*( [mµn]s)?")
_METHOD = (
    "each level's arrivals are replayed through a queue of unknown capacity, slack and unevenness (Lindley's recursion); what capacity, "
    "slack and unevenness make of all levels at once, beside what completions of a full server say, is the interval",
    "a level is ended early when completions fall behind the rate (Wald's sequential test, 1 false alarm in 100 at critical load)",
    "the rate is that of a run without end: a short level that starts empty shows less waiting, and the model knows it",
    "a request that failed has kept no limit",
)


def highest(record: LoadMax) -> Section:
    """Return the highest rate within the limits, and how it was found."""
    return Section(
        kind="loadmax",
        title=f"Highest rate of {record.target}",
        lead=_lead(record),
        tag="measured",
        tone=_tone(record),
        tiles=_tiles(record),
        facts=tuple(_facts(record)),
        tables=(_probes(record),) if record.probes else (),
        notes=tuple((head, lines) for head, lines in (("Notes", record.notes), ("Method", _METHOD)) if lines),
    )


def _tone(r: LoadMax) -> Tone:
    return "good" if r.ended == "narrow" else "bad" if r.ended == "no rate holds" else "unsure"


def _lead(r: LoadMax) -> str:
    if r.rate_per_s is None or r.interval_per_s is None:
        if r.ended == "no rate holds":
            return f"No rate holds {r.slo}: {_idle(r)}."
        return f"Undecided: {ENDED[r.ended]} before anything was known of {r.slo}."
    binds = f"; {name(r.binding or '')} breaks first" if r.binding and "," in r.slo else ""
    return f"{rate(r.rate_per_s)} within {r.slo} ({span(r.interval_per_s)} with 90 % certainty){binds}."


def rate(value: float) -> str:
    """Print a rate to three digits."""
    return f"{digits(value)} requests/s"


def _idle(r: LoadMax) -> str:
    shown = [f"{name(s.limit)} {_figure(s)}" for s in r.idle]
    return f"lone requests show {', '.join(shown)}" if shown and not r.probes else "every level misses"


def _tiles(r: LoadMax) -> tuple[Fact, ...]:
    if r.rate_per_s is None:
        return ()
    return (Fact("Highest rate", f"{digits(r.rate_per_s)}/s", f"{span(r.interval_per_s)}/s", "measured"),)


def _facts(r: LoadMax) -> list[Fact]:
    facts = [Fact("Limits", r.slo, f"{r.arrivals} arrivals", "")]
    if r.capacity_per_s is not None:
        facts.append(
            Fact("When full", f"{units.show_rate(r.capacity_per_s)} completed", f"with {r.users} requests always in flight", "measured")
        )
    if r.idle:
        facts.append(Fact("When idle", ", ".join(f"{name(s.limit)} {_figure(s)}" for s in r.idle), "of lone requests", "measured"))
    ended: Tone = "good" if r.ended == "narrow" else "unsure"
    facts.append(Fact("Ended", ENDED[r.ended], f"after {time(r.took_s)}, {count(len(r.probes), 'level')}", "", ended))
    return facts


def _figure(shown: Shown) -> str:
    if shown.value is None:
        return NONE
    return percent(100 * shown.value) if shown.limit in limits.SHARES else time(shown.value)


def _probes(r: LoadMax) -> Table:
    keys = [s.limit for s in r.probes[0].shown] or [s.limit for s in r.idle]
    columns = (
        Column("level", right=True), Column("for", right=True), Column("completed", right=True, wide=True),
        *(Column(name(key), right=True) for key in keys), Column("kept"), Column("highest so far", right=True),
    )  # fmt: skip
    promised = {limits.key(limit): limit for limit in limits.parse(r.slo)}
    rows = tuple(_probe(p, keys, promised) for p in r.probes)
    return Table(title="Levels", columns=columns, rows=rows, note="below each figure its misses; below the highest rate its 90 % interval")


def _probe(p: Probe, keys: list[str], promised: dict[str, Limit]) -> tuple[Cell, ...]:
    shown = {s.limit: s for s in p.shown}
    kept = [s.value is not None and limits.meets(promised[s.limit], s.value) for s in p.shown]
    verdict = (
        Cell("client late", "unsure") if not p.trusted else Cell("falls behind", "bad") if p.over else mark(all(kept) if kept else None)
    )
    return (
        Cell(units.show_rate(p.rate_per_s), "strong"),
        Cell(time(p.duration_s)),
        Cell(units.show_rate(p.completed_per_s)),
        *(_shown(shown.get(key)) for key in keys),
        verdict,
        Cell(units.show_rate(p.highest_per_s), "", span(p.interval_per_s)),
    )


def _shown(shown: Shown | None) -> Cell:
    return Cell(NONE, "muted") if shown is None else Cell(_figure(shown), "", f"{shown.misses:,} of {shown.requests:,}")


# ---------------------------------------------------------------- the whole curve


def sweep(record: LoadSweep) -> Section:
    """Return latency and goodput against the offered rate."""
    return Section(
        kind="loadsweep",
        title=f"Latency against rate of {record.target}",
        lead=_sweep_lead(record),
        tag="measured",
        tone="good" if record.ended in ("done", "saturated") else "unsure",
        tiles=_sweep_tiles(record),
        facts=tuple(_sweep_facts(record)),
        tables=(_levels(record), *(_metric(record, metric) for metric in ("ttft", "tpot", "e2e"))),
        notes=tuple(
            (head, lines) for head, lines in (("Notes", record.notes), ("Why levels may not be believed", _doubts(record))) if lines
        ),
    )


def _sweep_lead(r: LoadSweep) -> str:
    last = r.levels[-1]
    top = max((s.rate_per_s for s in r.levels if not s.over), default=None)
    carried = "it falls behind at every rate tried" if top is None else f"it keeps up to {units.show_rate(top)}"
    if top is not None and last.over:
        carried += f" and falls behind at {units.show_rate(last.rate_per_s)}"
    if r.knee is None:
        return f"{carried[0].upper()}{carried[1:]}; latency never grew to twice that of the lowest level."
    return f"The knee is at {units.show_rate(r.knee.rate_per_s)}: {name(r.knee.figure)} doubles there; {carried}."


def _sweep_tiles(r: LoadSweep) -> tuple[Fact, ...]:
    if r.knee is None:
        return ()
    between = f"{span(r.knee.interval_per_s)}/s" if r.knee.interval_per_s else ""
    return (Fact("Knee", f"{digits(r.knee.rate_per_s)}/s", between, "measured"),)


def _sweep_facts(r: LoadSweep) -> list[Fact]:
    facts = [Fact("Traffic", f"{r.arrivals} arrivals", f"{count(len(r.levels), 'level')} in {time(r.took_s)}")]
    if r.knee is not None:
        between = f" ({span(r.knee.interval_per_s)})" if r.knee.interval_per_s else ""
        what = f"{name(r.knee.figure)} is {r.knee.factor:g} times that of the lowest level, {time(r.knee.value_s)}"
        facts.append(Fact("Knee", f"{units.show_rate(r.knee.rate_per_s)}{between}", what, "measured"))
    if r.capacity_per_s is not None:
        facts.append(Fact("When full", f"{units.show_rate(r.capacity_per_s)} completed", "in a closed loop of many users", "measured"))
    if r.slo:
        best = max((s.test.goodput_per_s or 0.0 for s in r.levels if not s.over), default=0.0)
        facts.append(Fact("Goodput", f"at most {units.show_rate(best)}", f"within {r.slo}", "measured"))
    facts.append(Fact("Ended", SWEEP_ENDED[r.ended]))
    return facts


def _levels(r: LoadSweep) -> Table:
    goodput = any(s.test.goodput_per_s is not None for s in r.levels)
    columns = (
        Column("offered", right=True), Column("completed", right=True), *((Column("goodput", right=True),) if goodput else ()),
        Column("TTFT p95", right=True), Column("E2E p50", right=True, wide=True), Column("E2E p95", right=True),
        Column("tokens/s", right=True, wide=True), Column("level"),
    )  # fmt: skip
    return Table(
        title="", columns=columns, rows=tuple(_level(s, goodput) for s in r.levels), note="below each percentile its 90 % interval"
    )


def _level(s: SweptLevel, goodput: bool) -> tuple[Cell, ...]:
    t = s.test
    within = Cell(units.show_rate(t.goodput_per_s), "", span(t.goodput_interval, 100, " %") if t.goodput_interval else "")
    verdict = (
        Cell("falls behind", "bad", f"{s.in_flight:,} in flight") if s.over else Cell(t.validity.verdict, VERDICT_TONE[t.validity.verdict])
    )
    return (
        Cell(units.show_rate(s.rate_per_s), "strong"),
        Cell(units.show_rate(t.request_rate_per_s)),
        *((within,) if goodput else ()),
        _percentile(t.ttft_s, "p95", s.over),
        _percentile(t.e2e_s, "p50", s.over),
        _percentile(t.e2e_s, "p95", s.over),
        Cell(digits(t.output_tokens_per_s)),
        verdict,
    )


VERDICT_TONE: dict[str, Tone] = {"valid": "good", "degraded": "unsure", "invalid": "bad"}


def _percentile(summary: LatencySummary, stat: str, over: bool) -> Cell:
    value: float | None = getattr(summary, stat)
    if value is None:
        return Cell("too few" if stat in summary.too_few else NONE, "muted")
    return Cell(
        f"{'over ' if over else ''}{time(value)}", "muted" if over else "", "" if over else time_span(summary.intervals.get(stat), value)
    )


def _metric(r: LoadSweep, metric: str) -> Table:
    """Return p50, p95 and p99 of one latency by rate."""
    columns = (Column("offered", right=True), *(Column(f"{metric.upper()} {stat}", right=True) for stat in _STATS), Column("n", right=True))
    rows = tuple(
        (
            Cell(units.show_rate(s.rate_per_s), "strong"),
            *(_percentile(getattr(s.test, f"{metric}_s"), stat, s.over) for stat in _STATS),
            Cell(f"{getattr(s.test, f'{metric}_s').count:,}"),
        )
        for s in r.levels
    )
    return Table(title=metric.upper(), columns=columns, rows=rows, detail=True)


def _doubts(r: LoadSweep) -> tuple[str, ...]:
    """Return what speaks against levels, each kind said once, of the highest rate it was said of."""
    said: dict[str, list[tuple[float, str]]] = {}
    for s in r.levels:
        for reason in s.test.validity.reasons if s.test.validity.verdict != "valid" else ():
            said.setdefault(_NUMBER.sub("#", reason), []).append((s.rate_per_s, reason))
    return tuple(f"{_at([rate for rate, _ in found], len(r.levels))}: {found[-1][1]}" for found in said.values())


def _at(rates: list[float], levels: int) -> str:
    if len(rates) == levels and levels > 1:
        return "at every level"
    more = f" and {count(len(rates) - 1, 'other level')}" if len(rates) > 1 else ""
    return f"at {units.show_rate(rates[-1])}{more}"


def score_of(record: LoadMax, shown: Shown) -> float | None:
    """Return a figure over its limit; for a share, what is lost over what may be."""
    limit = {limits.key(each): each for each in limits.parse(record.slo)}[shown.limit]
    if shown.value is None:
        return None
    found = (1 - shown.value) / (1 - limit.limit) if limit.metric in limits.SHARES else shown.value / limit.limit
    return found if math.isfinite(found) else None
