"""Tenants of a plan: what each sees beside its limits, and what fleets of their own would cost."""

from __future__ import annotations

from dataclasses import replace

from mlsys_bench import slo, units
from mlsys_bench.report import latencies
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Table, digits, mark, percent
from mlsys_bench.tenancy import Division, Precedence, Tenancy, TenantFleet, TenantPlan
from mlsys_bench.types import Limit, Plan, Tenant


def tables(plan: Plan) -> tuple[Table, ...]:
    """Return a row for each limit of each tenant, and the ways to divide tenants over fleets; nothing where there are none."""
    if plan.tenancy is None:
        return ()
    found = [seen(plan)]
    if plan.tenancy.precedence is not None and plan.tenancy.precedence.surges:
        found.append(_surges(plan.tenancy.precedence))
    return (*found, _divisions(plan.tenancy.divisions)) if plan.tenancy.divisions else tuple(found)


def facts(plan: Plan) -> tuple[Fact, ...]:
    """Return in a line whether the tenants share a fleet, what the other way would cost, and likewise of priorities."""
    if plan.tenancy is None:
        return ()
    return (*_shared(plan, plan.tenancy), *_first(plan, plan.tenancy.precedence))


def _shared(plan: Plan, tenancy: Tenancy) -> tuple[Fact, ...]:
    if len(tenancy.divisions) < 2:
        return ()
    first, other = tenancy.divisions[0], tenancy.divisions[1]
    who = " | ".join(map(_who, first.fleets))
    what = f"{who} on one fleet" if len(first.fleets) == 1 else f"{who}, each on a fleet of its own"
    instead = " | ".join(map(_who, other.fleets)) or "the other way"
    return (Fact("Tenants", what, f"{instead}: {other.why}", plan.provenance.value),)


def _first(plan: Plan, order: Precedence | None) -> tuple[Fact, ...]:
    if order is None:
        return ()
    who = ", then ".join(" and ".join(names) for names in order.classes)
    count = f" ({order.fifo_replicas} replicas for {order.replicas})" if order.fifo_replicas not in (None, order.replicas) else ""
    return (Fact("Priorities", who, f"first come, first served: {order.why}{count}", plan.provenance.value),)


def _surges(order: Precedence) -> Table:
    """Return who keeps its limits when more comes than was planned for."""
    columns = (
        Column("traffic", right=True), Column("busy", right=True),
        *(Column(name, right=True) for names in order.classes for name in names), Column("first come, first served", flexible=True),
    )  # fmt: skip
    rows = tuple(
        (
            Cell(f"{surge.times:g} x", "strong"),
            Cell(percent(100 * surge.utilisation)),
            *(_kept(surge.excess[name]) for names in order.classes for name in names),
            Cell(_together(surge.fifo_excess), "muted"),
        )
        for surge in order.surges
    )
    note = "the planned fleet simulated with more traffic: the figure that is farthest from its limit, below 1 x all are kept"
    return Table(title="When more comes: who keeps its limits", columns=columns, rows=rows, note=note)


def _kept(excess: float | None) -> Cell:
    return Cell("waits without end", "bad") if excess is None else Cell(f"{digits(excess)} x its limit", "good" if excess < 1 else "bad")


def _together(excess: dict[str, float | None]) -> str:
    if all(value is None for value in excess.values()):
        return "all wait without end"
    return "; ".join(f"{name} {_kept(value).text}" for name, value in excess.items())


def value_of(limit: Limit, plan: Plan) -> float | None:
    """Return what was predicted for a limit, for its tenant where it names one."""
    rows = {row.name: row.predicted for row in plan.tenancy.tenants} if plan.tenancy else {}
    return latencies.value_of(replace(limit, tenant=None), rows.get(limit.tenant or "", plan.predicted))


def seen(plan: Plan) -> Table:
    """Return what each tenant sees of what it was promised, by simulation and by theory."""
    assert plan.tenancy is not None
    columns = (
        Column("tenant"), Column("share", right=True), Column("limit"), Column("predicted", right=True), Column("met"),
        Column("theory", right=True, wide=True),
    )  # fmt: skip
    rows = tuple(row for tenant in plan.tenancy.tenants for row in _rows(tenant))
    return Table(title="Tenants", columns=columns, rows=rows, note="below each figure its 90 % interval")


def _rows(tenant: TenantPlan) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for i, limit in enumerate(slo.parse(tenant.slo)):
        key = limit.metric if limit.metric in slo.SHARES else f"{slo.key(limit)}_s"
        value = tenant.predicted.get(key)
        rows.append((
            Cell(tenant.name if i == 0 else "", "strong", "binds" if i == 0 and tenant.binds else ""),
            Cell(percent(100 * tenant.share) if i == 0 else "", "", f"{digits(tenant.rate_per_s)}/s" if i == 0 else ""),
            Cell(slo.show_limit(limit)),
            latencies.figure(key, value, tenant.intervals.get(key)),
            mark(None if value is None else slo.meets(limit, value)),
            latencies.figure(key, tenant.analytic.get(key), None),
        ))  # fmt: skip
    return rows


def _divisions(divisions: tuple[Division, ...]) -> Table:
    columns = (
        Column("fleets", flexible=True),
        Column("replicas", flexible=True),
        Column("$/h", right=True),
        Column("by"),
        Column("why", flexible=True),
    )
    rows = tuple(
        (
            Cell(" | ".join(map(_who, division.fleets)) or NONE, "strong" if i == 0 else ""),
            Cell(" + ".join(map(_what, division.fleets)) or NONE),
            Cell(units.show_usd(division.usd_per_hour)),
            Cell(division.by),
            Cell(division.why, "good" if i == 0 else "muted"),
        )
        for i, division in enumerate(divisions)
    )
    return Table(title="One fleet, or fleets of their own", columns=columns, rows=rows)


def _who(fleet: TenantFleet) -> str:
    return " + ".join(fleet.tenants)


def _what(fleet: TenantFleet) -> str:
    each = f"{fleet.devices_per_replica} x " if fleet.devices_per_replica > 1 else ""
    return f"{fleet.replicas} x {each}{fleet.gpu}"


def lengths(tenants: tuple[Tenant, ...]) -> Table | None:
    """Return the tenants of a traffic, None where there are none; their priorities where they differ."""
    ranked = len({tenant.priority for tenant in tenants}) > 1
    rows = tuple(
        (
            Cell(tenant.name, "strong"),
            Cell(percent(100 * tenant.share)),
            *([Cell(f"{tenant.priority}")] if ranked else []),
            *(
                Cell(f"{law.mean:,.0f} tokens", "", f"{law.dist}{f', cv {law.cv:g}' if law.cv else ''}")
                for law in (tenant.prompt_tokens, tenant.output_tokens)
            ),
        )
        for tenant in tenants
    )
    titles = ("share", *(("priority",) if ranked else ()), "prompt", "output")
    columns = (Column("tenant"), *(Column(title, right=True) for title in titles))
    return Table(title="Tenants", columns=columns, rows=rows) if rows else None
