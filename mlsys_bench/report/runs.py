"""Load tests, verifications, demos and raw requests, in words."""

from __future__ import annotations

from collections import Counter

from mlsys_bench import stats, summary, units
from mlsys_bench.checked import Check, Demo, Verification
from mlsys_bench.report import askings, courses, latencies, plans, senders, serversides, simulations, whys
from mlsys_bench.report.parts import (
    Cell,
    Column,
    Fact,
    Section,
    Table,
    Tone,
    digits,
    percent,
    span,
    time,
    time_cell,
    time_span,
)
from mlsys_bench.types import LatencySummary, LoadTest, RequestRecord, Requests, Validity
from mlsys_bench.units import count

VERDICT_TONE: dict[str, Tone] = {"valid": "good", "degraded": "unsure", "invalid": "bad"}


def loadtest(record: LoadTest) -> Section:
    """Return what the users of a run saw."""
    tag = "measured" if record.source == "loadtest" else "simulated"
    return Section(
        kind="loadtest",
        title=f"{'Load test' if record.source == 'loadtest' else 'Simulation'} of {record.target}",
        lead=_lead(record),
        tag=tag,
        tone=VERDICT_TONE[record.validity.verdict],
        tiles=_tiles(record),
        facts=tuple(_facts(record, tag)),
        course=courses.drawing(record),
        tables=tuple(
            t
            for t in (
                latencies.percentiles(record),
                latencies.kept(record),
                *simulations.tables(record),
                *_server_tables(record),
                *senders.tables(record.senders),
            )
            if t is not None
        ),
        notes=tuple(
            (head, lines)
            for head, lines in (
                ("Good to know" if record.validity.verdict == "valid" else "Why it may not be believed", record.validity.reasons),
                ("Server's side", serversides.notes(record.server) if record.server else ()),
                ("Formulas", tuple(f"{k} = {v}" for k, v in record.formulas.items())),
            )
            if lines
        ),
    )


def _server_tables(r: LoadTest) -> tuple[Table, ...]:
    return serversides.tables(r.server) if r.server else ()


def _lead(r: LoadTest) -> str:
    good = f", {percent(100 * r.goodput_ratio)} within all limits" if r.goodput_ratio is not None else ""
    open_ = [name for name, kept in r.slo_met.items() if kept is None]
    waiting = r.errors.get("unfinished", 0)
    why = f"With {waiting:,} still on their way at the end nobody can decide" if waiting else "Too few independent answers to decide"
    undecided = f" {why} {', '.join(open_)}." if open_ and r.source == "loadtest" else ""
    return f"{r.ok:,} of {count(r.requests, 'request')} answered{f' in {time(r.duration_s)}' if r.duration_s else ''}{good}.{undecided}"


def _rate(r: LoadTest, per_s: float | None) -> str:
    """Print a rate of a run; none where all its requests are due at one moment."""
    return units.show_rate(per_s if r.duration_s else None)


def _facts(r: LoadTest, tag: str) -> list[Fact]:
    asked = "closed loop" if r.offered_rate_per_s is None else f"{units.show_rate(r.offered_rate_per_s)} asked"
    errors = ", ".join(f"{n:,} {kind}" for kind, n in r.errors.items() if n)
    facts = [
        Fact(
            "Rate",
            f"{asked}, {_rate(r, r.request_rate_per_s)} completed",
            f"{r.arrivals}{'' if r.offered_rate_per_s is None else ' arrivals'}, window of {time(r.duration_s)}",
            tag,
        ),
        Fact("Requests", f"{r.ok:,} of {r.requests:,} ok", errors or "no errors", tag, "bad" if errors else ""),
    ]
    if r.duration_s:
        facts.append(Fact("Tokens", f"{digits(r.output_tokens_per_s)} output{_prompts(r)} tokens/s", courses.tokens(r), tag))
    if r.goodput_ratio is not None:
        interval = span(r.goodput_interval, 100, " %")
        facts.append(
            Fact(
                "Goodput",
                f"{_rate(r, r.goodput_per_s)} = {percent(100 * r.goodput_ratio)}" if r.duration_s else percent(100 * r.goodput_ratio),
                interval,
                tag,
            )
        )
    facts += courses.facts(r)
    if r.lateness_s is not None and r.lateness_s.count:
        worst = next((s for s in ("p99", "p95", "p90", "p50", "mean") if getattr(r.lateness_s, s) is not None), None)
        if worst is not None:
            late = time_span(r.lateness_s.intervals.get(worst), getattr(r.lateness_s, worst))
            facts.append(Fact("Sent late", f"{worst} {time(getattr(r.lateness_s, worst))}", late or "by the client itself", tag))
    facts += senders.facts(r.senders)
    facts += askings.facts(r)
    if r.fleet is not None:
        facts += simulations.facts(r.fleet)
    if r.server is not None:
        facts += serversides.facts(r.server)
    verdict = _validity(r.validity)
    return [verdict, *facts] if r.source == "loadtest" else [*facts, verdict]


def _prompts(r: LoadTest) -> str:
    return f", {digits(r.prompt_tokens_per_s)} prompt" if r.prompt_tokens_per_s else ""


def _tiles(r: LoadTest) -> tuple[Fact, ...]:
    """Return the figures for a slide: of each latency the highest percentile that the sample allows."""
    if r.source != "loadtest":
        return ()
    tiles = [Fact("Throughput", units.show_rate(r.request_rate_per_s), f"{digits(r.output_tokens_per_s)} output tokens/s", "measured")]
    for name in ("ttft", "tpot", "e2e"):
        summary: LatencySummary = getattr(r, f"{name}_s")
        stat = next((s for s in ("p99", "p95", "p90", "p50") if getattr(summary, s) is not None), None)
        if stat is not None:
            value = getattr(summary, stat)
            tiles.append(Fact(f"{name.upper()} {stat}", time(value), time_span(summary.intervals.get(stat), value), "measured"))
    if r.goodput_ratio is not None:
        tiles.append(Fact("Goodput", percent(100 * r.goodput_ratio), span(r.goodput_interval, 100, " %"), "measured"))
    return tuple(tiles)


def _validity(v: Validity) -> Fact:
    more = f" (and {count(len(v.reasons) - 1, 'remark')} more below)" if len(v.reasons) > 1 else ""
    return Fact("Validity", v.verdict, f"{v.reasons[0]}{more}" if v.reasons else "", "", VERDICT_TONE[v.verdict])


# ---------------------------------------------------------------- predictions held against measurements


def verification(record: Verification) -> tuple[Section, ...]:
    """Return the checks of a plan, then the load test they stand on."""
    decided = bool(record.missed) or (record.measured.validity.verdict != "invalid" and any(c.inside is not None for c in record.checks))
    section = Section(
        kind="verify",
        title=f"Verification of {record.plan_file}",
        lead=_verdict(record),
        tag="measured",
        tone="good" if record.holds and decided else "bad" if decided else "unsure",
        facts=(
            Fact("Target", record.target, f"one replica at {units.show_rate(record.rate_per_s)}", "measured"),
            _validity(record.measured.validity),
        ),
        tables=(latencies.checks(record.checks), *whys.table(record.causes)),
        notes=tuple((head, lines) for head, lines in (("The machine", whys.machine(record.causes)), ("Notes", record.notes)) if lines),
    )
    return section, loadtest(record.measured)


def _verdict(record: Verification) -> str:
    """Return the answer in a line: a load test that cannot be believed, or is too short, decides nothing."""
    if record.missed:
        return f"The plan does not hold: {', '.join(record.missed)} missed{_lost(record.measured)}; {_inside(record.checks)}."
    if record.measured.validity.verdict == "invalid":
        return f"Undecided: the load test cannot be believed ({_inside(record.checks)})."
    if all(c.inside is None for c in record.checks):
        return "Undecided: too few answers came to measure any figure."
    return f"The plan {'holds' if record.holds else 'does not hold'}: {_inside(record.checks)}."


def _lost(r: LoadTest) -> str:
    return f", {percent(100 * (1 - r.ok / r.requests))} of the requests failed" if r.ok < r.requests else ""


def _inside(checks: tuple[Check, ...]) -> str:
    said = Counter(c.inside for c in checks)
    return f"{said[True]} of {count(said[True] + said[False], 'figure')} inside the 90 % interval" + f", {said[None]} not measured" * bool(
        said[None]
    )


def demo(record: Demo) -> tuple[Section, ...]:
    """Return the whole loop: prediction beside measurement, then the plan and the load test."""
    worst = max(record.checks, key=lambda c: abs(c.error_percent or 0.0), default=None)
    lead = _inside(record.checks) + "."
    if worst is not None and worst.error_percent is not None:
        name = latencies.name(worst.key)
        lead = f"{plans.lead(record.plan)} Measured: {lead} Largest error: {name} {percent(worst.error_percent, signed=True)}."
        lead += whys.most(record.causes)
    section = Section(
        kind="demo",
        title="Demo: prediction beside measurement",
        lead=lead,
        tag="measured",
        tone="good" if all(c.inside is not False for c in record.checks) else "unsure",
        tiles=_error_tiles(record.checks),
        tables=(latencies.checks(record.checks), *whys.table(record.causes), *_errors(record)),
        notes=tuple(
            (head, lines)
            for head, lines in (("The machine", whys.machine(record.causes)), ("Files", _files(record)), ("Time taken", (_took(record),)))
            if lines
        ),
    )
    return section, plans.plan(record.plan), loadtest(record.measured)


def _error_tiles(checks: tuple[Check, ...]) -> tuple[Fact, ...]:
    wanted = [c for c in checks if c.error_percent is not None and c.key.endswith("p50_s")][:3]
    return tuple(
        Fact(
            f"{latencies.name(c.key)} error",
            percent(c.error_percent, signed=True),
            f"{time(c.predicted)} against {time(c.measured)}",
            "measured",
        )
        for c in wanted
    )


def _errors(record: Demo) -> tuple[Table, ...]:
    """Return the errors that no check carries already."""
    left = {k: v for k, v in record.prediction_error_percent.items() if k not in {c.key for c in record.checks}}
    rows = tuple((Cell(latencies.name(key)), Cell(percent(value, signed=True))) for key, value in left.items())
    return (Table(title="Other errors", columns=(Column("figure"), Column("error", right=True)), rows=rows),) if rows else ()


def _files(record: Demo) -> tuple[str, ...]:
    return tuple(f"{name}: {path}" for name, path in record.files.items())


def _took(record: Demo) -> str:
    stages = ", ".join(f"{name} {time(seconds)}" for name, seconds in record.took_s.items() if name != "total")
    return f"{stages}; {time(record.took_s.get('total', sum(record.took_s.values())))} in all"


# ---------------------------------------------------------------- raw requests


def requests(record: Requests) -> Section:
    """Return what a file of requests holds: outcomes, and latencies inside the window."""
    window = [r for r in record.requests if r.in_window]
    outcomes = Counter(r.outcome for r in record.requests)
    ok = [r for r in window if r.outcome == "ok"]
    simulated = "simulated" in {r.token_source for r in record.requests}
    tag = "simulated" if simulated else "measured"
    facts = (
        Fact("Requests", f"{len(record.requests):,}, {len(window):,} of them in the window", _span_of(record.requests), tag),
        Fact(
            "Outcomes", ", ".join(f"{n:,} {kind}" for kind, n in outcomes.most_common()), "", tag, "" if set(outcomes) <= {"ok"} else "bad"
        ),
        Fact("Tokens", f"{sum(r.output_tokens or 0 for r in ok):,} out", f"{sum(r.prompt_tokens or 0 for r in ok):,} in", tag),
    )
    return Section(
        kind="requests",
        title=f"Requests: {len(record.requests):,}",
        lead=f"{outcomes['ok']:,} of {count(len(record.requests), 'request')} ok.",
        tag=tag,
        facts=facts,
        tables=(
            _quantiles(
                {
                    "TTFT": [t for r in ok if (t := summary.ttft_s(r)) is not None],
                    "E2E": [t for r in ok if (t := summary.e2e_s(r)) is not None],
                }
            ),
        ),
    )


def _span_of(records: tuple[RequestRecord, ...]) -> str:
    return f"sent over {time(max(r.scheduled_s for r in records) - min(r.scheduled_s for r in records))}" if records else "none"


def _quantiles(samples: dict[str, list[float]]) -> Table:
    rows = tuple((Cell(name, "strong"), Cell(f"{len(s):,}"), *(_quantile(s, p) for p in (0.5, 0.95, 0.99))) for name, s in samples.items())
    columns = (Column("in the window"), Column("n", right=True), *(Column(s, right=True) for s in ("p50", "p95", "p99")))
    return Table(title="", columns=columns, rows=rows, note="below each figure its 90 % interval")


def _quantile(samples: list[float], p: float) -> Cell:
    interval = stats.quantile_interval(samples, p)
    return Cell("too few", "muted") if interval is None else time_cell(stats.quantile(samples, p), interval)
