"""A plan and the profile it stands on, in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from mlsys_bench import slo, units
from mlsys_bench.checked import Check
from mlsys_bench.report import apart, latencies, tenants, traffic
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
    span,
    time,
    time_span,
    usd_span,
    weakest,
    whole,
)
from mlsys_bench.report.surroundings import share
from mlsys_bench.types import Alternative, FleetItem, FrontierPoint, LatencyProfile, Layout, Limit, Offer, Plan, Provenance
from mlsys_bench.units import count

Z90 = 1.6448536269514722  # two-sided 90 % of a normal law
OCCUPIED = "share of capacity in use"


def plan(record: Plan) -> Section:
    """Return the plan as about ten lines for a manager, then its details."""
    tables = (
        latencies.predicted(record), *tenants.tables(record), _other_limits(record), latencies.two_ways(record),
        _alternatives(record), _frontier(record), _prices(record.prices),
    )  # fmt: skip
    return Section(
        kind="plan",
        title=f"Plan: {record.model} at {scalar(record.workload.rate_per_s)}/s",
        lead=lead(record),
        tag=record.provenance.value,
        tone="bad" if missed(record) else "good",
        tiles=_tiles(record),
        facts=tuple(_facts(record)),
        tables=tuple(t for t in tables if t is not None),
        notes=tuple((head, lines) for head, lines in (("Assumptions", record.assumptions), ("Notes", record.notes)) if lines),
    )


def lead(record: Plan) -> str:
    """Return the answer in one sentence."""
    fleet = " + ".join(_fleet(item) + (f" for {item.stage}" if record.apart else "") for item in record.fleet)
    cost = "unpriced" if record.usd_per_hour is None else f"{units.show_usd(record.usd_per_hour)} an hour"
    carry = "carries" if record.replicas == 1 else "carry"
    bind = "bind" if record.apart else "binds"
    said = f"{fleet} {carry} {traffic.requests(record.workload.rate_per_s)} for {cost}; {record.binding_constraint} {bind}."
    beyond = ", ".join(slo.show_limit(limit) for limit in missed(record))
    return (
        f"{said} Simulated for longer it misses {beyond}, as do all fleets tried: take a looser limit or a faster device."
        if beyond
        else said
    )


def _fleet(item: FleetItem) -> str:
    devices = devices_of(item)
    each = f"{devices} x {item.gpu}" if devices > 1 else item.gpu
    return f"{count(item.replicas, 'replica')} on {each} ({item.precision}{split(item)})"


def devices_of(x: FleetItem | Alternative) -> int:
    """Return the devices of one replica."""
    return max(x.tp * x.attention_dp, x.ep) * x.pp


def split(x: FleetItem | Alternative | Layout) -> str:
    """Return how a replica is spread over its devices, such as ', tp 2', or nothing for one device."""
    degrees = (("tp", x.tp), ("pp", x.pp), ("ep", x.ep), ("attention dp", x.attention_dp))
    return "".join(f", {name} {n}" for name, n in degrees if n > 1)


def _tiles(p: Plan) -> tuple[Fact, ...]:
    hourly = _cost_tag(p)
    tiles = [
        Fact("replicas", f"{p.replicas:,}", whole(p.intervals.get("replicas")) or _gpus(p), p.profile.provenance.value),
        Fact("per hour", units.show_usd(p.usd_per_hour), usd_span(p.intervals.get("usd_per_hour")), hourly),
        Fact(
            "per 1M output tokens",
            units.show_usd(p.usd_per_million_tokens),
            usd_span(p.intervals.get("usd_per_million_tokens")),
            _unit_cost_tag(p),
        ),
    ]
    key = next((f"{m}_{s}_s" for m in ("ttft", "e2e") for s in ("p95", "p99", "p50") if f"{m}_{s}_s" in p.predicted), None)
    if key is not None:
        name = key.removesuffix("_s").replace("_", " ").upper().replace(" P", " p")
        tiles.append(Fact(name, time(p.predicted[key]), time_span(p.intervals.get(key), p.predicted[key]), p.profile.provenance.value))
    busy = span(p.intervals.get("utilisation"), 100, " %")
    tiles.append(Fact("utilisation", percent(100 * p.utilisation), busy, p.profile.provenance.value))
    return tuple(tiles)


def _gpus(p: Plan) -> str:
    return f"{p.gpus:,} x {p.gpu}" if p.gpu else f"{p.gpus:,} devices, mixed"


def _facts(p: Plan) -> list[Fact]:
    facts = [*(_fleet_fact(p, item) for item in p.fleet), *apart.facts(p.apart)]
    facts += [_cost_fact(p), _unit_cost_fact(p), *traffic.facts(p.workload)]
    facts += [
        Fact("Utilisation", percent(100 * p.utilisation), _utilisation_detail(p), p.profile.provenance.value),
        Fact("Binds", p.binding_constraint, tag=p.profile.provenance.value),
        Fact(
            "Headroom",
            f"{100 * p.headroom:+.0f} % traffic",
            joined(span(p.intervals.get("headroom"), 100, " %"), "before the first limit breaks"),
            p.profile.provenance.value,
        ),
    ]
    facts += tenants.facts(p)
    best = next_best(p)
    if best is not None:
        facts.append(Fact("Next best", _alternative_name(best), joined(_dearer(p, best), best.why_not), p.provenance.value))
    return facts


def _fleet_fact(p: Plan, item: FleetItem) -> Fact:
    mixed = item.instance is not None and " + " in item.instance  # an order of several kinds says how many itself
    rented = "no instance priced" if not item.instance else f"as {item.instance}" if mixed else f"as {item.instances:,} x {item.instance}"
    interval = whole(p.intervals.get(f"{item.stage}_replicas" if len(p.fleet) > 1 else "replicas"))
    return Fact(
        item.stage.capitalize() if len(p.fleet) > 1 else "Fleet",
        _fleet(item),
        joined(interval and f"{interval} replicas", rented),
        p.profile.provenance.value,
    )


def _cost_fact(p: Plan) -> Fact:
    if p.usd_per_hour is None:
        return Fact("Cost", "unpriced", "no offer for this device is known, so it is not ranked by cost", "", "unsure")
    text = f"{units.show_usd(p.usd_per_hour)}/h = {units.show_usd(p.usd_per_month)}/month"
    interval = usd_span(p.intervals.get("usd_per_hour"))
    dated = sorted({o.date for o in p.prices})
    terms = " and ".join(sorted({o.term for o in p.prices}))
    price = "price" if terms == "on-demand" else f"{terms} price"
    return Fact("Cost", text, joined(interval and f"{interval}/h", dated and f"{price}: {dated[-1]}"), _cost_tag(p))


def _unit_cost_fact(p: Plan) -> Fact:
    interval = usd_span(p.intervals.get("usd_per_million_tokens"))
    return Fact(
        "Unit cost",
        f"{units.show_usd(p.usd_per_million_tokens)} per 1M output tokens",
        interval,
        _unit_cost_tag(p),
    )


def _cost_tag(p: Plan) -> str:
    """Return how sure a cost is: as weak as its replicas and its prices; a price without a source is assumed."""
    return weakest([p.provenance, *([o.provenance for o in p.prices] or [Provenance.ASSUMED])])


def _unit_cost_tag(p: Plan) -> str:
    """Return how sure a cost per token is: the traffic, which spreads the cost over tokens, counts too."""
    return weakest([Provenance(_cost_tag(p)), p.workload.provenance])


def _utilisation_detail(p: Plan) -> str:
    if p.apart:
        return joined(span(p.intervals.get("utilisation"), 100, " %"), apart.busy(p.apart))
    capacity = f"of {digits(p.capacity_per_replica_per_s)} requests/s a replica"
    return joined(
        span(p.intervals.get("utilisation"), 100, " %"), f"{capacity}, batch {p.max_batch:,}, {p.kv_tokens_per_replica:,} KV tokens"
    )


def next_best(p: Plan) -> Alternative | None:
    """Return the cheapest alternative that would do, else the first that was considered."""
    feasible = [a for a in p.alternatives if a.replicas is not None and a.usd_per_hour is not None]
    return min(feasible, key=lambda a: a.usd_per_hour or math.inf) if feasible else next(iter(p.alternatives), None)


def least(a: Alternative) -> str:
    """Return the sign before replicas and price that are bounds: more of them may be needed to keep the limits."""
    return "≥ " if a.is_least else ""


def _alternative_name(a: Alternative) -> str:
    fleet = f"{least(a)}{a.replicas:,} x " if a.replicas is not None else ""
    cost = f" at {least(a)}{units.show_usd(a.usd_per_hour)}/h" if a.usd_per_hour is not None else ""
    return f"{fleet}{a.gpu} ({a.precision}{split(a)}){cost}"


def _dearer(p: Plan, a: Alternative) -> str:
    """'5.2 % dearer', unless the reason says so itself."""
    if (
        not p.usd_per_hour
        or a.usd_per_hour is None
        or abs(a.usd_per_hour / p.usd_per_hour - 1) < 5e-4
        or any(word in a.why_not for word in ("%", "dearer", "cost"))
    ):
        return ""
    return f"{percent(100 * (a.usd_per_hour / p.usd_per_hour - 1), signed=True)} cost"


def _other_limits(p: Plan) -> Table | None:
    """Return the limits that the latency table does not show: shares, and statistics without a prediction."""
    limits = [x for x in latencies.promised(p.slo) if x.metric in slo.SHARES and x.tenant is None]
    rows = tuple((Cell(slo.show_limit(x)), _predicted(p, x), _met(p, x)) for x in limits)
    return Table(title="", columns=(Column("limit"), Column("predicted", right=True), Column("met")), rows=rows) if rows else None


def _predicted(p: Plan, limit: Limit) -> Cell:
    if limit.metric == "availability" and p.secured is not None:
        low, high = p.secured.interval
        return Cell(share(p.secured.availability), "", f"{share(low)} to {share(high)}")
    return latencies.figure(slo.key(limit), latencies.value_of(limit, p.predicted), p.intervals.get(slo.key(limit)))


def _met(p: Plan, limit: Limit) -> Cell:
    value = latencies.value_of(limit, p.predicted)
    if limit.metric == "availability" and p.secured is not None:  # kept, not just missed, at the objective itself
        return mark(p.secured.availability >= limit.limit)
    return mark(None if value is None else slo.meets(limit, value))


def missed(p: Plan) -> tuple[Limit, ...]:
    """Return the limits that the plan's own prediction misses: none, but where only short simulations keep them."""
    known = [(x, tenants.value_of(x, p)) for x in latencies.promised(p.slo)]
    return tuple(limit for limit, value in known if value is not None and not slo.meets(limit, value))


def _alternatives(p: Plan) -> Table | None:
    keys = [k for k in ("ttft_p95_s", "tpot_p95_s", "e2e_p95_s") if any(k in a.predicted for a in p.alternatives)]
    rows = tuple(
        (
            Cell(a.gpu + (f" x{devices_of(a)}" if devices_of(a) > 1 else "")),
            Cell(a.precision),
            Cell(NONE if a.replicas is None else f"{least(a)}{a.replicas:,}"),
            Cell(f"{least(a) if a.usd_per_hour else ''}{units.show_usd(a.usd_per_hour)}"),
            *(Cell(time(a.predicted.get(k))) for k in keys),
            Cell(a.why_not, "muted"),
        )
        for a in p.alternatives
    )
    columns = (
        Column("device"), Column("precision"), Column("replicas", right=True), Column("$/h", right=True),
        *(Column(k.removesuffix("_s").replace("_", " ").upper().replace(" P", " p"), right=True, wide=True) for k in keys),
        Column("why not", flexible=True),
    )  # fmt: skip
    return Table(title="What else was considered", columns=columns, rows=rows, detail=True) if rows else None


def _frontier(p: Plan) -> Table | None:
    """Return cost against latency: what faster answers would cost."""
    rows = tuple(
        (
            Cell(
                f"{point.replicas} x {point.gpu}" + (f" x{point.devices_per_replica}" if point.devices_per_replica > 1 else ""),
                "",
                f"{point.replicas - point.spare} + {point.spare} to spare" if point.spare else "",
            ),
            Cell(point.precision),
            Cell(units.show_usd(point.usd_per_hour)),
            Cell(time(point.latency_s)),
        )
        for point in p.frontier
    )
    if len(rows) < 2:
        return None
    name = latencies.name(p.frontier[0].figure)
    columns = (Column("fleet"), Column("precision"), Column("$/h", right=True), Column(name, right=True))
    away = " with its spares away" if any(point.spare for point in p.frontier) else ""
    return Table(
        title=f"What a shorter {name} costs: theory, scaled to the simulation of the plan{away}",
        columns=columns,
        rows=rows,
        note="" if any(is_the_plan(point, p) for point in p.frontier) else _beside_frontier(p),
        detail=True,
    )


def is_the_plan(point: FrontierPoint, p: Plan) -> bool:
    """Say whether a point of the frontier is the fleet that was chosen: of equal prices that may be a slower one that keeps more bits."""
    chosen = (p.gpu, p.fleet[0].precision, p.devices_per_replica, p.replicas)
    return (point.gpu, point.precision, point.devices_per_replica, point.replicas) == chosen


def _beside_frontier(p: Plan) -> str:
    latency_s = (p.survivors or p.predicted).get(p.frontier[0].figure)
    return f"the plan itself, {_fleet(p.fleet[0])}, takes {time(latency_s)} for {units.show_usd(p.usd_per_hour)}/h"


def _prices(prices: tuple[Offer, ...]) -> Table | None:
    rows = tuple(
        (
            Cell(o.provider, "", o.region),
            Cell(o.instance, "", f"{o.devices} x {o.device}"),
            Cell(f"{units.show_usd(o.usd_per_h)}/h", "", o.term),
            Cell(o.source, "muted", f"{o.date}; {o.provenance}"),
        )
        for o in prices
    )
    columns = (
        Column("provider"),
        Column("instance"),
        Column("price", right=True),
        Column("source and date", flexible=True),
    )
    return Table(title="Prices", columns=columns, rows=rows, detail=True) if rows else None


# ---------------------------------------------------------------- profile


def profile(record: LatencyProfile, beside: Sequence[Check] = ()) -> Section:
    """Return a latency profile: layout, coefficients with their 90 % bands, residual, range, physics floor, and the rows behind it."""
    spread, of = record.residual_log_sd, "steps" if record.form == "step" else "times"
    facts = [
        Fact("Layout", *_layout(record)),
        Fact("Form", f"time of one {'engine step' if record.form == 'step' else 'request'}", record.stage or ""),
    ]
    facts.append(
        Fact(
            "Residual",
            f"{100 * math.expm1(spread):.1f} % (one sd)" if spread else "none: physics, not fitted",
            f"90 % of {of} within {100 * math.expm1(-Z90 * spread):.0f} to {100 * math.expm1(Z90 * spread):+.0f} %" if spread else "",
            record.provenance.value,
        )
    )
    if record.form == "step":
        facts.append(Fact("Floor", *_floor(record), "roofline"))
    return Section(
        kind="profile",
        title=f"Latency profile: {record.layout.model}, {record.layout.precision}, {record.layout.device}",
        lead=f"A {record.form} profile, {record.provenance.value}" + (f", good to {100 * math.expm1(spread):.1f} %." if spread else "."),
        tag=record.provenance.value,
        facts=tuple(facts),
        tables=tuple(t for t in (_terms(record), _valid(record), _beside(beside), _constants(record)) if t is not None),
        notes=(("Note", (record.note,)),) if record.note else (),
    )


def _layout(p: LatencyProfile) -> tuple[str, str]:
    at = p.layout
    pinned = f"pinned to {', '.join(map(str, at.pinned_cores))}" if at.pinned_cores else ""
    return f"{at.model}, {at.precision}, {at.device}{split(at)}", joined(at.threads and count(at.threads, "thread"), pinned)


def _floor(p: LatencyProfile) -> tuple[str, str]:
    """Return the fastest step physics allows, and of what it is made, where the constants say."""
    k = p.constants
    speed = k.get("bandwidth_bytes_per_s")
    if not k.get("dense_bytes") or not speed:
        return "not known", "the profile carries no bytes and bandwidth"
    moved = sum(k.get(f"{part}_bytes", 0.0) for part in ("dense", "attention", "head"))
    return f"{time(moved / speed)} a step", f"{units.show_bytes(moved)} of weights at {units.show_scaled(speed, 'B/s')}"


def _terms(p: LatencyProfile) -> Table:
    rows = tuple(
        (Cell(name, "strong"), *_coefficient(name, value, math.sqrt(max(0.0, p.covariance[i][i])) if p.covariance else 0.0))
        for i, (name, value) in enumerate(zip(p.terms, p.coefficients, strict=True))
    )
    return Table(title="Coefficients", columns=(Column("term"), Column("value", right=True), Column("90 % band", right=True)), rows=rows)


def _coefficient(name: str, value: float, log_sd: float) -> tuple[Cell, Cell]:
    band = (value * math.exp(-Z90 * log_sd), value * math.exp(Z90 * log_sd)) if log_sd else None
    if name.endswith("_s"):
        return Cell(time(value)), Cell(time_span(band, value) or NONE)
    return Cell(digits(value)), Cell(span(band) or NONE)


def _valid(p: LatencyProfile) -> Table | None:
    rows = tuple((Cell(name.replace("_", " ")), Cell(f"{low:,.0f}"), Cell(f"{high:,.0f}")) for name, (low, high) in p.valid.items())
    columns = (Column("feature of a step"), Column("from", right=True), Column("to", right=True))
    return Table(title="Valid range", columns=columns, rows=rows, note="outside it the profile extrapolates") if rows else None


def _beside(rows: Sequence[Check]) -> Table | None:
    return dataclasses.replace(latencies.checks(rows), title="Measured beside predicted") if rows else None


def _constants(p: LatencyProfile) -> Table | None:
    rows = tuple((Cell(name.replace("_", " ")), Cell(scalar(value))) for name, value in p.constants.items())
    return (
        Table(title="Constants", columns=(Column("known, not fitted"), Column("value", right=True)), rows=rows, detail=True)
        if rows
        else None
    )
