"""loadtest --sweep and --find-max: many levels of load on one server -> one record."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from mlsys_bench import hardware, loadtest, record, units
from mlsys_bench import slo as promises
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys.progress import Line
from mlsys_bench.loadlimits import LoadMax, LoadSweep, Probe, Shown, SweptLevel
from mlsys_bench.loadtest import crew
from mlsys_bench.loadtest.caller import shown
from mlsys_bench.loadtest.limits import clauses, levels, search
from mlsys_bench.loadtest.limits.clauses import Clause, Figure
from mlsys_bench.loadtest.limits.running import LiveServer, Ran
from mlsys_bench.types import STOPPED, LoadTest, Validity

BUDGET_S = 120.0
_LEVELS = 6  # of the length that the percentile needs, for which a budget that nobody set is stretched
_SHORT_S = 15.0  # a level that needs longer is worth a word
_OVERHEAD_S = 2.0  # of a level, start and drain
_LEAST_LEVEL_S = 5.0
Ended = Literal["done", "saturated", "stopped", "budget"]
_ANY_RATE = 1.0  # for options that need one; every level sets its own


def rate_of_none(beside: Mapping[str, object]) -> float:
    """Return a rate that stands for none.  Raises BadInput for what means nothing where levels set the rate and the length themselves."""
    for option, value in beside.items():
        if value:
            raise BadInput(f"{option}: leave it out; --sweep and --find-max set the rate, length and number of their runs themselves")
    return _ANY_RATE


# ---------------------------------------------------------------- the highest rate


def find_max(plan: loadtest.Options, *, budget: str | None = None, out: Path | None = None, quiet: bool = False) -> LoadMax:
    """Search the highest rate within the SLO, with a live line; write the record when asked, also of a search that was ended."""
    if plan.slo is None:
        raise BadInput('--find-max needs limits to search for: --slo "ttft_p99<500ms,tpot_p95<50ms"')
    if out is not None:
        record.check_writable(out)
    asked = clauses.clauses(plan.slo)
    line = Line(quiet)
    server = _server(plan, BUDGET_S if budget is None else levels.seconds(budget, "--budget"), line)
    states: list[search.State] = []

    def on_state(state: search.State) -> None:
        states.append(state)
        line.note(_said(state, server))

    def on_need(rate_per_s: float, needed: int) -> None:
        level_s = search.level_s(rate_per_s, needed)
        wanted_s = _LEVELS * (level_s + _OVERHEAD_S) + server.took_s()
        if budget is None and wanted_s > server.budget_s:
            server.budget_s = wanted_s
        if level_s > _SHORT_S:
            line.note(_need(asked, needed, rate_per_s, server.budget_s, wanted_s))

    try:
        with crew.interrupts(server.on_interrupt):
            found = search.search(asked, server, users=server.users, on_state=on_state, on_need=on_need)
    finally:
        line.clear()
    result = _max(plan, asked, server, found, states)
    if out is not None:
        record.write(out, result, hardware.machine())
    return result


def _server(plan: loadtest.Options, budget_s: float, line: Line) -> LiveServer:
    noted: list[str] = []

    def once(text: str) -> None:
        if text not in noted:
            noted.append(text)
            line.note(text)

    return LiveServer(dataclasses.replace(plan, qps=None), budget_s, line.show, once)


def _need(asked: Sequence[Clause], needed: int, rate_per_s: float, budget_s: float, wanted_s: float) -> str:
    """Say how long the percentile takes at such a rate, before anything is spent on it."""
    tail = max((c.p for c in asked if c.p is not None), default=0.5)
    each = units.show_s(search.level_s(rate_per_s, needed))
    text = f"p{100 * tail:g} needs {needed} requests a level: {each} at about {units.show_rate(rate_per_s)}"
    if budget_s >= wanted_s:
        return f"{text}; the search takes up to {units.show_s(budget_s)}"
    return f"{text}; {_LEVELS} levels would take {units.show_s(wanted_s)}, --budget leaves {units.show_s(budget_s)}"


def _said(state: search.State, server: LiveServer) -> str:
    """Print how the search stands after a level."""
    last, (low, high) = state.levels[-1], state.interval_per_s
    what = "not to be trusted: the client was late" if not last.trusted else "falls behind" if last.over else _worst(last.figures)
    return (
        f"{len(state.levels):3}  {units.show_rate(last.rate_per_s):>8} for {last.duration_s:4.1f} s  {what:34}  "
        f"highest {state.rate_per_s:.4g}/s, 90 % within {low:.4g}–{high:.4g}  {max(server.left_s(), 0):.0f} s left"
    )


def _worst(figures: Sequence[Figure]) -> str:
    score = max((f.score for f in figures), default=math.inf)
    return f"{'holds' if score < 1 else 'misses'}, at {100 * score:.0f} % of the limit" if math.isfinite(score) else "requests fail"


def _max(
    plan: loadtest.Options, asked: Sequence[Clause], server: LiveServer, found: search.Found, states: Sequence[search.State]
) -> LoadMax:
    assert plan.slo is not None
    state, full = found.state, found.full
    known = state is not None and any(s.trusted for s in state.levels) and found.why != "no rate holds"
    return LoadMax(
        target=server.target,
        arrivals=plan.arrivals,
        slo=promises.show(plan.slo),
        seed=plan.seed,
        rate_per_s=state.rate_per_s if state is not None and known else None,
        interval_per_s=state.interval_per_s if state is not None and known else None,
        binding=promises.key(asked[state.binding].limit) if state is not None and known else None,
        ended=found.why,
        idle=_shown(asked, found.idle.figures) if found.idle is not None else (),
        capacity_per_s=full.completed_per_s if full is not None else None,
        users=server.users,
        probes=tuple(_probe(asked, each) for each in states),
        needed_requests=search.needed_requests(asked),
        budget_s=server.budget_s,
        took_s=server.took_s(),
        notes=_notes(found, states),
    )


def _probe(asked: Sequence[Clause], state: search.State) -> Probe:
    last = state.levels[-1]
    return Probe(
        rate_per_s=last.rate_per_s, duration_s=last.duration_s, completed_per_s=last.completed_per_s, over=last.over,
        trusted=last.trusted, shown=_shown(asked, last.figures), highest_per_s=state.rate_per_s, interval_per_s=state.interval_per_s,
    )  # fmt: skip


def _shown(asked: Sequence[Clause], figures: Sequence[Figure]) -> tuple[Shown, ...]:
    return tuple(
        Shown(limit=promises.key(c.limit), value=_value(c, f), misses=f.misses, requests=f.requests, effective=round(f.effective, 1))
        for c, f in zip(asked, figures, strict=False)
    )


def _value(clause: Clause, shown: Figure) -> float | None:
    """Return the figure in the limit's own unit: seconds, or the share that kept the limit."""
    if clause.limit.metric in promises.SHARES:
        return 1 - shown.misses / shown.requests if shown.requests else None
    return shown.score * clause.limit.limit if math.isfinite(shown.score) else None


def _notes(found: search.Found, states: Sequence[search.State]) -> tuple[str, ...]:
    """Return what to know about the answer, and what would make it better."""
    notes = []
    if found.why == "budget":
        notes.append("the time was up before the interval was within 2.5 %: a longer --budget narrows it")
    if found.why == "client":
        notes.append("the client was late at these rates, so nothing is known beyond: more --processes, or a client machine of its own")
    late = sum(not s.trusted for state in states[-1:] for s in state.levels)
    if late and found.why != "client":
        notes.append(f"{late} of {len(states)} levels were left out: the client itself sent late")
    trusted = [s for s in states[-1].levels if s.trusted] if states else []
    if trusted and all(s.over or any(f.score >= 1 for f in s.figures) for s in trusted):
        notes.append("no level was seen to hold: the rate is what levels above it imply")
    if trusted and not any(s.over or any(f.score >= 1 for f in s.figures) for s in trusted):
        notes.append("no level was seen to miss: the rate is what levels below it imply")
    return tuple(notes)


def max_status(result: LoadMax) -> int:
    """Return 0 for a rate with a narrow interval, 1 when no rate holds, 3 when the search ended before the interval was narrow."""
    return {"narrow": 0, "no rate holds": 1}.get(result.ended, 3)


# ---------------------------------------------------------------- the whole curve


def sweep(
    plan: loadtest.Options, *, rates: str | None = None, points: int | None = None, duration: str | None = None,
    budget: str | None = None, out: Path | None = None, quiet: bool = False,
) -> LoadSweep:  # fmt: skip
    """Load the server at rising rates with a live line; write the record, and every level's requests beside it, when asked."""
    if out is not None:
        record.check_writable(out)
    line, points = Line(quiet), points or levels.POINTS
    duration_s = levels.seconds(duration, "--duration") if duration else None
    budget_s = math.inf if duration_s is not None and budget is None else levels.seconds(budget or f"{BUDGET_S:g}s", "--budget")
    server = _server(plan, budget_s, line)
    given = levels.parse(rates, points) if rates else None
    swept: list[SweptLevel] = []
    try:
        with crew.interrupts(server.on_interrupt):
            ended, capacity_per_s = _levels(server, given, points, duration_s, swept, _files(out), line)
    finally:
        line.clear()
    if not swept and ended == "stopped":
        raise MeasurementFailed(f"{shown(plan.url)}: stopped by hand before the first level was complete; there is no curve yet")
    if not swept:
        raise MeasurementFailed(f"{shown(plan.url)}: no level was answered; is the server up, and can it carry the lowest rate?")
    result = LoadSweep(
        target=swept[0].test.target,
        arrivals=plan.arrivals,
        slo=promises.show(plan.slo) if plan.slo else None,
        seed=plan.seed,
        levels=tuple(swept),
        knee=levels.knee(swept),
        capacity_per_s=capacity_per_s,
        ended=ended,
        took_s=server.took_s(),
    )
    if out is not None:
        record.write(out, result, hardware.machine(), [Path(s.test.requests_file) for s in swept if s.test.requests_file])
    return result


def _files(out: Path | None) -> Callable[[int], Path | None]:
    return lambda i: None if out is None else out.with_name(f"{out.stem}.{i:02}.parquet")


def _levels(
    server: LiveServer, given: Sequence[float] | None, points: int, duration_s: float | None, swept: list[SweptLevel],
    file_of: Callable[[int], Path | None], line: Line,
) -> tuple[Ended, float | None]:  # fmt: skip
    """Run levels until the server falls behind, a person wants an end, or the time is up; return why it ended, and the capacity."""
    server.lone()
    capacity_per_s = None
    rates = given
    if rates is None and not server.is_stopped():
        capacity_per_s = server.full(server.users).completed_per_s
        rates = levels.around(capacity_per_s, points)
        rates = (*rates, *levels.beyond(rates))
    first = (rates or ())[: points if given is None else None]
    for i, rate in enumerate(rates or ()):
        each_s = duration_s or _length_s(server, first[i:] or (rate,))
        if server.is_stopped():
            return "stopped", capacity_per_s
        if server.is_stopped():
            return "stopped", capacity_per_s
        if i >= len(first) and any(level.over for level in swept):
            break  # the grid has shown where it ends
        if server.left_s() < each_s / 2:
            return "budget", capacity_per_s
        ran = server.offered(rate, each_s, file_of(i + 1))
        if server.is_stopped():  # a level that was cut by hand is no level
            return "stopped", capacity_per_s
        level = _swept(ran)
        if level is not None:
            swept.append(level)
            line.note(_level_said(level))
        if ran.seen.over or (len(swept) > 1 and swept[-1].over and swept[-2].over):
            return "saturated", capacity_per_s
    return "stopped" if server.is_stopped() else "done", capacity_per_s


def _length_s(server: LiveServer, rates: Sequence[float]) -> float:
    """Return how long the next of these levels lasts, so that there is time for all."""
    total_s = server.left_s() - server.overhead_s * (len(rates) - 1)
    return levels.share_out(max(total_s, 0.0), rates, _LEAST_LEVEL_S)[0]


def _swept(ran: Ran) -> SweptLevel | None:
    if ran.test is None:
        return None
    test = dataclasses.replace(ran.test, validity=_validity(ran.test, ran.seen.over), formulas={})
    grew = test.steadiness is not None and test.steadiness.verdict == "over_saturated"
    return SweptLevel(rate_per_s=ran.seen.rate_per_s, over=ran.seen.over or grew, in_flight=ran.in_flight, test=test)


def _validity(test: LoadTest, over: bool) -> Validity:
    """Return the verdict without what follows from our own early end."""
    reasons = tuple(r for r in test.validity.reasons if not (over and r.startswith(STOPPED)))
    return dataclasses.replace(test.validity, reasons=reasons)


def _level_said(level: SweptLevel) -> str:
    e2e = level.test.e2e_s
    how = f"falls behind, {level.in_flight} in flight" if level.over else f"E2E p50 {units.show_s(e2e.p50)}, p95 {units.show_s(e2e.p95)}"
    return f"{units.show_rate(level.rate_per_s):>10}  completes {units.show_rate(level.test.request_rate_per_s)}  {how}"


def sweep_status(result: LoadSweep) -> int:
    """Return 3 when it was stopped by hand or no level can be believed, else 0."""
    return 0 if result.ended != "stopped" and any(level.test.validity.verdict != "invalid" for level in result.levels) else 3
