"""Stage graphs in words: the scenario with its drawing, and the plan of one stage by stage."""

from __future__ import annotations

from mlsys_bench import slo, units
from mlsys_bench.report import drawing, latencies, stage_fleets, surroundings, traffic
from mlsys_bench.report.parts import (
    NONE,
    Cell,
    Column,
    Fact,
    Section,
    Table,
    digits,
    joined,
    mark,
    percent,
    scalar,
    time,
    time_span,
    usd_span,
    weakest,
    whole,
)
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import FleetItem, Limit, Plan, Provenance, StagePlan
from mlsys_bench.units import count


def graph(record: StageGraph) -> Section:
    """Return a scenario of several stages: its drawing, traffic, promises, and where every stage's numbers are from."""
    return Section(
        kind="stages",
        title=f"Scenario: {record.name}",
        lead=" ".join(record.description.split()),
        tag="assumed",
        facts=(
            Fact("Stages", count(len(record.stages), "stage"), f"requests enter at {record.entry}", "assumed"),
            *traffic.facts(record.workload),
            Fact("Promises", ", ".join(map(slo.show_limit, record.slo)), _own_promises(record), "assumed"),
            Fact("Headroom", percent(100 * record.headroom), "of every stage's capacity stays free", "assumed"),
        ),
        drawing=drawing.text(record),
        notes=(("Source", (record.source, *_sources(record))),),
    )


def _own_promises(record: StageGraph) -> str:
    return ", ".join(f"{slo.show_limit(limit)} at {stage.name}" for stage in record.stages for limit in stage.slo)


def _sources(record: StageGraph) -> tuple[str, ...]:
    found = [f"traffic: {record.workload.source}"] if record.workload.source else []
    for stage in record.stages:
        service = stage.service
        given = (service.assumed or service.roofline) if service else None
        parts = [part.source for part in (given, stage.cache, stage.route, stage.escalate, stage.failure) if part is not None]
        found += [f"{stage.name}: {' '.join(source.split())}" for source in parts]
    return (*found, f"vCPU: {record.cost.source}") if record.cost else tuple(found)


# ---------------------------------------------------------------- the plan of one


def plan(record: Plan) -> Section:
    """Return the plan of a stage graph: the answer in a few lines, then every stage."""
    fleet = record.stage_fleet
    bill = None if fleet is None else stage_fleets.bill(fleet.bill)
    tables = (latencies.predicted(record), _shares(record), _stages(record), bill, latencies.two_ways(record))
    return Section(
        kind="plan",
        title=f"Plan: {record.scenario} at {scalar(record.workload.rate_per_s)}/s",
        lead=_lead(record),
        tag=record.provenance.value,
        tone="good" if all(_met(record, limit) is not False for limit in latencies.promised(record.slo)) else "bad",
        tiles=_tiles(record),
        facts=tuple(_facts(record)),
        tables=tuple(t for t in tables if t is not None),
        notes=tuple((head, lines) for head, lines in (("Assumptions", record.assumptions), ("Notes", record.notes)) if lines),
    )


def _lead(p: Plan) -> str:
    cost = "unpriced" if p.usd_per_hour is None else f"{units.show_usd(p.usd_per_hour)} an hour"
    return (
        f"{count(p.replicas, 'replica')} of {count(len(p.stages), 'stage')} carry {traffic.requests(p.workload.rate_per_s)} for {cost}; "
        f"{p.binding_constraint} binds."
    )


def _tiles(p: Plan) -> tuple[Fact, ...]:
    tag = p.provenance.value
    tiles = [
        Fact("replicas", f"{p.replicas:,}", whole(p.intervals.get("replicas")) or count(len(p.stages), "stage"), tag),
        Fact("per hour", units.show_usd(p.usd_per_hour), usd_span(p.intervals.get("usd_per_hour")), _cost_tag(p)),
        Fact("per 1M requests", units.show_usd(_per_million(p)), _span_per_million(p), _cost_tag(p)),
        Fact("busiest stage", percent(100 * p.utilisation), p.bottleneck or "", tag),
    ]
    key = next((k for k in ("e2e_p95_s", "e2e_p99_s", "e2e_p50_s") if k in p.predicted), None)
    if key is not None:
        tiles.append(Fact("E2E " + key[4:7], time(p.predicted[key]), time_span(p.intervals.get(key), p.predicted[key]), tag))
    return tuple(tiles)


def _per_million(p: Plan) -> float | None:
    """Return dollars per million requests at the planned rate, idle time paid for."""
    return None if p.usd_per_hour is None else p.usd_per_hour * _millions(p)


def _span_per_million(p: Plan) -> str:
    ends = p.intervals.get("usd_per_hour")
    return usd_span(ends and (ends[0] * _millions(p), ends[1] * _millions(p)))


def _millions(p: Plan) -> float:
    """Return the hours in which a million requests come."""
    return 1e6 / (p.workload.rate_per_s * 3600)


def _cost_tag(p: Plan) -> str:
    return weakest([p.provenance, *([o.provenance for o in p.prices] or [Provenance.ASSUMED])])


def _facts(p: Plan) -> list[Fact]:
    tag = p.provenance.value
    cost = "unpriced" if p.usd_per_hour is None else f"{units.show_usd(p.usd_per_hour)}/h = {units.show_usd(p.usd_per_month)}/month"
    interval = usd_span(p.intervals.get("usd_per_hour"))
    around = _span_per_million(p)
    unit = [f"{units.show_usd(_per_million(p))} per 1M requests"] if p.usd_per_hour is not None else []
    if p.usd_per_million_tokens is not None:
        unit.append(f"{units.show_usd(p.usd_per_million_tokens)} per 1M output tokens")
    return [
        Fact("Fleet", _fleet(p), joined(whole(p.intervals.get("replicas")) and f"{whole(p.intervals.get('replicas'))} replicas"), tag),
        Fact("Cost", cost, interval and f"{interval}/h", _cost_tag(p), "unsure" if p.usd_per_hour is None else ""),
        *([Fact("Unit cost", ", ".join(unit), joined(around and f"{around} per 1M requests"), _cost_tag(p))] if unit else []),
        *traffic.facts(p.workload),
        Fact("Bottleneck", f"{p.bottleneck}, {percent(100 * p.utilisation)} busy", "the stage that fills up first", tag),
        Fact("Binds", p.binding_constraint, tag=tag),
        Fact("Headroom", f"{100 * p.headroom:+.0f} % traffic", "before the first limit breaks or a stage saturates", tag),
    ]


def _fleet(p: Plan) -> str:
    """Print what is rented: '4 x L40S, 12 vCPU'."""
    devices: dict[str, int] = {}
    for item in p.fleet:
        if item.gpu != "vcpu":
            devices[item.gpu] = devices.get(item.gpu, 0) + item.replicas * item.tp * item.pp
    found = [f"{n:,} x {gpu}" for gpu, n in devices.items()]
    vcpus = sum(_vcpus(item) for item in p.fleet)
    return ", ".join([*found, *([f"{vcpus:g} vCPU"] if vcpus else [])]) + f" for {count(p.replicas, 'replica')}"


def _vcpus(item: FleetItem) -> float:
    return item.replicas * float((item.instance or "0").split()[0]) if item.gpu == "vcpu" else 0.0


def _stages(p: Plan) -> Table:
    items = {item.stage: item for item in p.fleet}
    columns = (
        Column("stage"), Column("replicas", right=True), Column("each on"), Column("visits", right=True), Column("busy", right=True),
        Column("p50", right=True, wide=True), Column("p95", right=True), Column("p99", right=True, wide=True), Column("$/h", right=True),
        Column("one fewer breaks", flexible=True), Column("source", wide=True),
    )  # fmt: skip
    note = "below replicas their 90 % interval; visits: of one request, below them calls where they differ; times: wait and work, simulated"
    return Table(title="Stages", columns=columns, rows=tuple(_row(p, s, items[s.stage]) for s in p.stages), note=note)


def _row(p: Plan, s: StagePlan, item: FleetItem) -> tuple[Cell, ...]:
    shards = f"{s.replicas:,} x {s.shards} shards" if s.shards > 1 else f"{s.replicas:,}"
    interval = p.stage_fleet.replicas.get(s.stage) if p.stage_fleet else None
    each = item.instance if item.gpu == "vcpu" else f"{item.tp * item.pp} x {item.gpu}" if item.tp * item.pp > 1 else item.gpu
    calls = f"{digits(s.calls)} calls" if abs(s.calls - s.visits) > 1e-3 * s.visits else ""
    return (
        Cell(s.stage, "strong"),
        Cell(shards, "", whole(interval) or ""),
        Cell(each or NONE, "", item.precision),
        Cell(digits(s.visits), "", calls),
        Cell(percent(100 * s.utilisation), "unsure" if s.stage == p.bottleneck else ""),
        *(Cell(time(s.latencies_s.get(stat))) for stat in ("p50", "p95", "p99")),
        Cell(units.show_usd(s.usd_per_hour)),
        Cell(s.binds, "muted"),
        Cell(s.provenance.value, "muted"),
    )


def _met(p: Plan, limit: Limit) -> bool | None:
    value = latencies.value_of(limit, p.predicted)
    return None if value is None else slo.meets(limit, value)


def _share(limit: Limit, p: Plan) -> Cell:
    """Return a share with its interval; of time with as many nines as tell it from 1."""
    value, interval = latencies.value_of(limit, p.predicted), p.intervals.get(slo.key(limit))
    if limit.metric != "availability" or value is None:
        return latencies.figure(slo.key(limit), value, interval)
    return Cell(
        surroundings.share(value), "", "" if interval is None else f"{surroundings.share(interval[0])} to {surroundings.share(interval[1])}"
    )


def _shares(p: Plan) -> Table | None:
    rows = tuple(
        (
            Cell(slo.show_limit(x)),
            _share(x, p),
            mark(_met(p, x)),
        )
        for x in latencies.promised(p.slo)
        if x.metric in slo.SHARES
    )
    return Table(title="", columns=(Column("limit"), Column("predicted", right=True), Column("met")), rows=rows) if rows else None
