"""What surrounds the plan of several stages, in words: availability, stages by the hour of a day, growth.  A section each; and the bill."""

from __future__ import annotations

from collections.abc import Iterator

from mlsys_bench import units
from mlsys_bench.report import latencies
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, digits, joined, percent, span, time, weakest
from mlsys_bench.report.surroundings import share
from mlsys_bench.stage_fleets import Rented, StageBill, StagesOutlook, StagesScaled, StagesSecured
from mlsys_bench.types import Plan
from mlsys_bench.units import count

HOUR_S = 3600.0
MONTHS = (0, 1, 2, 3, 6, 9, 12, 18, 24)


def sections(record: Plan) -> Iterator[Section]:
    """Yield a section for each part that was asked for."""
    fleet = record.stage_fleet
    if fleet is None:
        return
    if fleet.secured is not None:
        yield _secured(record, fleet.secured)
    if fleet.scaled is not None:
        yield _scaled(fleet.scaled)
    if fleet.outlook is not None:
        yield _outlook(record, fleet.outlook)


# ---------------------------------------------------------------- the bill


def bill(found: StageBill) -> Table | None:
    """Return what is rented and paid beside, a line each, with where its price is from."""
    rows = [
        (
            Cell(_what(line), "strong", joined(line.region if line.region != "any" else "", line.term)),
            Cell(_used(found, line)),
            Cell(f"{units.show_usd(line.usd_per_hour)}", "", f"{units.show_usd(line.usd_per_hour / line.instances)} each"),
            Cell(_stages(line.stages)),
            Cell(line.source, "muted", line.date),
        )
        for line in found.rented
    ]
    rows += [
        (
            Cell(line.what, "strong"),
            Cell(NONE),
            Cell(units.show_usd(line.usd_per_hour)),
            Cell(line.stage),
            Cell(line.source, "muted", line.date),
        )
        for line in found.beside
    ]
    columns = (
        Column("rented"), Column("holds", right=True), Column("$/h", right=True), Column("for", flexible=True),
        Column("source and date", wide=True),
    )  # fmt: skip
    return Table(title="The bill", columns=columns, rows=tuple(rows)) if rows else None


def _what(line: Rented) -> str:
    if line.instance == "1 vCPU":
        return f"{line.instances:g} vCPU"
    return f"{line.instances:g} x {line.provider} {line.instance}"


def _used(found: StageBill, line: Rented) -> str:
    idle = found.stranded.get(line.unit, 0.0)
    return f"{line.holds:g} {line.unit}" + (f", {idle:g} idle" if idle else "")


def _stages(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{count(len(names), 'stage')}: {', '.join(names)}"


# ---------------------------------------------------------------- availability


def _secured(plan: Plan, found: StagesSecured) -> Section:
    tag = found.provenance.value
    spare = sum((s.replicas - s.needed) * s.shards for s in found.stages)
    survives = "any one may go and the others hold the limits at peak" if found.survives_zone else "the loss of a zone is not survived"
    several = [" or ".join(cut) for cut in found.cuts if len(cut) > 1]
    free = [s.stage for s in found.stages if not any(s.stage in cut for cut in found.cuts)]
    cost = None if found.spare_usd_per_hour is None else f"{units.show_usd(found.spare_usd_per_hour)}/h of the price"
    facts = (
        Fact("Replicas", f"{plan.replicas} = {plan.replicas - spare} needed + {spare} to spare", cost or "", tag),
        Fact("Zones", count(found.zones, "zone"), survives if found.zones > 1 else "all replicas in one; --zones spreads them", tag),
        Fact("Promised", share(found.objective), f"{digits((1 - found.objective) * 525_600)} min a year without an answer", tag),
        Fact("Downtime", f"{digits(found.downtime_min_per_year)} min a year", f"{span(found.downtime_interval)} min", tag),
        Fact("Nothing missing", share(found.whole), "of the time: every stage up, no fallback in use", tag),
        *((Fact("Stand in", "; ".join(several), "one of them answers while the other is away", tag),) if several else ()),
        *((Fact("Not needed", ", ".join(free), "answers come without: skipped, or nobody waits", tag),) if free else ()),
    )
    rows = tuple(
        (
            Cell(s.stage, "strong"),
            Cell(f"{s.needed} + {s.replicas - s.needed}" + (f" x {s.shards} shards" if s.shards > 1 else "")),
            Cell(" + ".join(map(str, s.zones)) if found.zones > 1 else NONE),
            Cell(share(s.availability)),
            Cell(units.show_s(s.replica_mtbf_s), "", f"back in {units.show_s(s.replica_repair_s)}"),
        )
        for s in found.stages
    )
    columns = (
        Column("stage"), Column("needed + spare", right=True), Column("by zone", right=True), Column("enough up", right=True),
        Column("a replica fails every", right=True),
    )  # fmt: skip
    tables = (Table(title="", columns=columns, rows=rows), *([_survivors(plan)] if spare and plan.survivors else []))
    return Section(
        kind="around",
        title=f"Availability: {share(found.availability)}",
        lead=f"Requests are answered within the limits {share(found.availability)} of the time "
        f"({share(found.interval[0])} to {share(found.interval[1])}).",
        tag=tag,
        tone="good" if found.availability >= found.objective else "bad",
        facts=facts,
        tables=tables,
    )


def _survivors(plan: Plan) -> Table:
    keys = [key for key in plan.survivors if key.partition("_")[0] in latencies.METRICS and key.endswith("_s") and key in plan.predicted]
    rows = tuple((Cell(latencies.name(k)), Cell(time(plan.predicted[k])), Cell(time(plan.survivors[k], plan.predicted[k]))) for k in keys)
    columns = (Column("latency at peak"), Column("all up", right=True), Column("only the needed up", right=True))
    return Table(title="", columns=columns, rows=rows, note="limits hold in both columns")


# ---------------------------------------------------------------- hours and months


def _scaled(found: StagesScaled) -> Section:
    moving = [name for name, hours in found.replicas.items() if len(set(hours)) > 1]
    still = [name for name in found.replicas if name not in moving]
    saved = 100 * (1 - found.scheduled_replica_h / found.static_replica_h)
    money = ""
    if found.static_usd is not None and found.scheduled_usd is not None:
        money = f"; {units.show_usd(found.scheduled_usd)} in place of {units.show_usd(found.static_usd)} a period"
    rows = tuple(
        (Cell(_clock(start)), Cell(units.show_rate(rate)), *(Cell(f"{found.replicas[name][k]:,}") for name in moving))
        for k, (start, rate) in enumerate(zip(found.start_s, found.rates_per_s, strict=True))
    )
    columns = (Column("from"), Column("highest rate", right=True), *(Column(name, right=True) for name in moving))
    rules = tuple(
        (
            Cell(name, "strong"),
            Cell(f"{digits(rule.target)}{'/s' if rule.metric == 'rate' else ' in flight'}"),
            Cell(percent(100 * rule.share)),
            Cell(f"{rule.least} to {rule.most}"),
            Cell(units.show_s(rule.lead_s)),
        )
        for name, rule in found.rules.items()
        if name in moving
    )
    rule_columns = (
        Column("rule"), Column("target a replica", right=True), Column("of what it carries", right=True), Column("replicas", right=True),
        Column("lead", right=True),
    )  # fmt: skip
    tables = [Table(title="Replicas by the hour", columns=columns, rows=rows)] if moving else []
    tables += [Table(title="To follow the load instead", columns=rule_columns, rows=rules)] if rules else []
    return Section(
        kind="around",
        title="Autoscaling",
        lead=f"By the schedule {found.scheduled_replica_h:,.0f} replica-hours a period in place of {found.static_replica_h:,.0f} "
        f"({-saved:+.0f} %){money}.",
        tag="assumed",
        tone="good" if saved > 0 else "unsure",
        facts=(Fact("The same all day", ", ".join(still)),) if still else (),
        tables=tuple(tables),
        notes=tuple((f"Rule of {name}", played.notes) for name, played in found.engines.items() if played.notes),
    )


def _clock(start_s: float) -> str:
    return f"{int(start_s // HOUR_S):02d}:{int(start_s % HOUR_S // 60):02d}"


def _outlook(plan: Plan, found: StagesOutlook) -> Section:
    last = found.months[-1].replicas
    moving = [name for name, n in found.months[0].replicas.items() if last[name] != n]
    rows = tuple(
        (
            Cell(str(m.month)),
            Cell(units.show_rate(m.rate_per_s)),
            *(Cell(f"{m.replicas[name]:,}") for name in moving),
            Cell(NONE if m.usd_per_h is None else units.show_usd(m.usd_per_h)),
        )
        for m in found.months
        if m.month in MONTHS
    )
    columns = (
        Column("month", right=True), Column("rate", right=True), *(Column(name, right=True) for name in moving), Column("$/h", right=True),
    )  # fmt: skip
    order = sorted(((month, name) for name, month in found.stages.items() if month is not None and month <= found.months[-1].month))
    later = "; ".join(f"{name} in month {month:.1f}" for month, name in order if name != found.first)
    when = "never at this growth" if found.full_month is None else f"in month {found.full_month:.1f}"
    return Section(
        kind="around",
        title=f"Growth of {percent(100 * found.per_month)} a month",
        lead=f"{found.first} is full first, {when}, at {units.show_rate(found.full_at_per_s)}: {_breaks(found.why)}.",
        tag=weakest([plan.provenance, plan.workload.provenance]),
        facts=(Fact("Full next", later or "no other stage within two years", "each with enough of all the others"),),
        tables=(
            Table(title="", columns=columns, rows=rows, note="replicas and cost keep headroom and spares; stages left out keep theirs"),
        ),
    )


def _breaks(why: str) -> str:
    return why if why.endswith("saturates") else f"{why} breaks"
