"""What surrounds a plan, in words: availability, replicas by the hour, limits that protect the tail, growth.  A section each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mlsys_bench import units
from mlsys_bench.report import latencies
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, digits, joined, percent, span, time, weakest
from mlsys_bench.surroundings import Autoscaled, Backpressure, MixedFleet, Month, Outlook, PoolPlan, Secured, Use
from mlsys_bench.types import Plan
from mlsys_bench.units import count

HOUR_S = 3600.0
WAYS = {"static": "static, for the peak", "scheduled": "by the schedule", "followed": "by the rule"}


def sections(record: Plan) -> Iterator[Section]:
    """Yield a section for each part that was asked for."""
    if record.secured is not None:
        yield _secured(record, record.secured)
    if record.scaled is not None:
        yield _scaled(record.scaled)
    if record.pressure is not None:
        yield _pressure(record.pressure)
    if record.outlook is not None:
        yield _outlook(record, record.outlook)
    if record.mixed is not None:
        yield _mixed(record, record.mixed)


# ---------------------------------------------------------------- availability


def _secured(plan: Plan, found: Secured) -> Section:
    tag = found.provenance.value
    zones = " + ".join(map(str, found.zones)) + (" on-demand" if found.spot else "")
    survives = "any one may go and the others hold the limits at peak" if found.survives_zone else "the loss of a zone is not survived"
    where = joined(f"{zones} replicas" if len(found.zones) > 1 else "all replicas in one; --zones spreads them", survives)
    facts = (
        Fact("Replicas", f"{found.replicas} = {found.needed} needed + {found.spare} to spare", _asked_by(found), tag),
        Fact("Zones", count(len(found.zones), "zone"), where, tag),
        *([_reclaimed(found, tag)] if found.spot else []),
        Fact("Promised", share(found.objective), f"{digits((1 - found.objective) * 525_600)} min a year without enough", tag),
        Fact("Downtime", f"{digits(found.downtime_min_per_year)} min a year", f"{span(found.downtime_interval)} min", tag),
        Fact("One replica", share(found.replica_availability), _failures(found), tag),
    )
    table = _survivors(plan) if found.spare else None
    return Section(
        kind="around",
        title=f"Availability: {share(found.availability)}",
        lead=f"With {count(found.replicas, 'replica')}, enough are up to hold the limits at peak {share(found.availability)} of the time "
        f"({share(found.interval[0])} to {share(found.interval[1])}).",
        tag=tag,
        tone="good" if found.availability >= found.objective else "bad",
        facts=facts,
        tables=() if table is None else (table,),
    )


def _reclaimed(found: Secured, tag: str) -> Fact:
    spot, steady = " + ".join(map(str, found.spot)), sum(found.zones)
    alone = f"the {steady} on demand alone are enough {share(found.floor_availability)} of the time" if steady else "none is on demand"
    return Fact("Spot", f"{sum(found.spot)} of {found.replicas} replicas", f"{spot} by zone, reclaimed together; {alone}", tag)


def _asked_by(found: Secured) -> str:
    asked = {"objective": "the availability asks for the last one", "zone": "the zone that may go asks for the last one"}
    return asked.get(found.binds, "the traffic alone asks for as many")


def _failures(found: Secured) -> str:
    return f"fails every {units.show_s(found.replica_mtbf_s)}, back after {units.show_s(found.replica_repair_s)}"


def _survivors(plan: Plan) -> Table:
    """Return latencies with all replicas up beside those with the needed ones only."""
    keys = [key for key in plan.survivors if key.partition("_")[0] in latencies.METRICS and key.endswith("_s") and key in plan.predicted]
    rows = tuple((Cell(latencies.name(k)), Cell(time(plan.predicted[k])), Cell(time(plan.survivors[k], plan.predicted[k]))) for k in keys)
    columns = (Column("latency at peak"), Column("all up", right=True), Column("only the needed up", right=True))
    return Table(title="", columns=columns, rows=rows, note="limits hold in both columns")


def share(value: float) -> str:
    """Print a share of time with as many nines as tell it from 1."""
    if value > 1 - 1e-6:
        return "more than 99.9999 %"
    return f"{100 * value:.{max(1, -math.floor(math.log10(1 - value)))}f} %"


# ---------------------------------------------------------------- autoscaling


def _scaled(found: Autoscaled) -> Section:
    static, followed = found.use("static"), found.use("followed")
    is_good = followed.violation_min == 0 and followed.replica_h < static.replica_h
    best = followed if is_good else found.use("scheduled")
    saved = 100 * (1 - best.replica_h / static.replica_h)
    steep = f"goes from nothing to {units.show_rate(found.from_nothing_per_s)}"
    grows = steep if found.from_nothing_per_s else f"grows by {100 * (found.growth - 1):.0f} %"
    facts = (
        Fact("Rule", f"{found.rule.metric} of {digits(found.rule.target)} a replica", _rule(found), found.provenance.value),
        Fact("Lead", units.show_s(found.lead_s), f"a look and a cold start; the rate {grows} within it"),
        Fact("Cascade", "yes" if found.cascades else "no", "starting replicas count as there", "", "bad" if found.cascades else "good"),
    )
    return Section(
        kind="around",
        title="Autoscaling",
        lead=_lead(found, best, saved),
        tag=found.provenance.value,
        tone="good" if is_good else "unsure",
        facts=facts,
        tables=(_uses(found.uses), _hours(found)),
        notes=(("Autoscaling", found.notes),) if found.notes else (),
    )


def _rule(found: Autoscaled) -> str:
    rule = found.rule
    every = units.show_s(rule.interval_s)
    return f"{100 * found.threshold:.0f} % of what it carries; {rule.least} to {rule.most} replicas, a look every {every}"


def _lead(found: Autoscaled, best: Use, saved: float) -> str:
    """Return the answer in one sentence: the rule where it keeps the limits and saves, else the schedule where that saves."""
    static, broken_min = found.use("static"), found.use("followed").violation_min
    why = f"breaks limits for {broken_min:.3g} min" if broken_min else "saves nothing"
    if saved <= 0:
        return f"No schedule runs fewer than the {_hours_of(static)} replica-hours a period of the static fleet; a rule {why}."
    says = f"{_hours_of(best)} replica-hours a period in place of {_hours_of(static)} ({-saved:+.0f} %)"
    if best.way == "followed":
        return f"By the rule {says}, limits broken for 0 min."
    return f"By the schedule {says}; a rule that follows the load {why}."


def _hours_of(use: Use) -> str:
    return f"{use.replica_h:,.0f}" if use.replica_h >= 10 else digits(use.replica_h)


def _uses(uses: Sequence[Use]) -> Table:
    rows = tuple(
        (
            Cell(WAYS[use.way], "strong"),
            Cell(f"{use.replica_h:,.1f}", "", span(use.replica_h_interval) if use.way == "followed" else ""),
            Cell(f"{use.violation_min:.3g}", "", span(use.violation_min_interval) if use.way == "followed" else ""),
            Cell(f"{use.most_replicas:,}"),
        )
        for use in uses
    )
    columns = (Column("fleet"), Column("replica-hours", right=True), Column("minutes broken", right=True), Column("most", right=True))
    return Table(title="", columns=columns, rows=rows)


def _hours(found: Autoscaled) -> Table:
    rows = tuple(
        (Cell(_clock(h.start_s)), Cell(units.show_rate(h.rate_per_s)), Cell(f"{h.scheduled:,}"), Cell(f"{h.followed:.1f}"))
        for h in found.hours
    )
    columns = (Column("from"), Column("highest rate", right=True), Column("schedule", right=True), Column("rule, mean", right=True))
    return Table(title="Replicas by the hour", columns=columns, rows=rows)


def _clock(start_s: float) -> str:
    return f"{int(start_s // HOUR_S):02d}:{int(start_s % HOUR_S // 60):02d}"


# ---------------------------------------------------------------- protection and growth


def _pressure(found: Backpressure) -> Section:
    rows = tuple(
        (Cell(f"{o.load:g} x"), Cell(_refused(o.rejected_by_queue)), Cell(_refused(o.rejected_by_rate)), Cell(time(o.first_token_s)))
        for o in found.loads
    )
    columns = (
        Column("of the peak"), Column("refused by the queue limit", right=True), Column("by the rate limit", right=True),
        Column("first token", right=True),
    )  # fmt: skip
    tokens = f"{found.tokens_per_min:,.0f} tokens a minute" if found.tokens_per_min is not None else ""
    return Section(
        kind="around",
        title="Protection",
        lead=f"At most {count(found.queue_limit, 'request')} waiting on a replica, and {units.show_rate(found.rate_per_s)} in all.",
        tag=found.provenance.value,
        facts=(
            Fact("Queue limit", f"{found.queue_limit} a replica", f"first token in the last place {time(found.last_place_s)}"),
            Fact("Rate limit", units.show_rate(found.rate_per_s), joined(f"bursts of {found.burst:,}", tokens)),
        ),
        tables=(Table(title="", columns=columns, rows=rows, note="each limit alone"),),
        notes=(("Protection", found.notes),) if found.notes else (),
    )


def _refused(value: float) -> str:
    return "none" if value < 5e-7 else f"{100 * value:.2g} %"


def _outlook(plan: Plan, found: Outlook) -> Section:
    full = "never at this growth" if found.full_month is None else f"in month {found.full_month:.1f}"
    rows = tuple(_month(month) for month in found.months)
    columns = (Column("month", right=True), Column("rate", right=True), Column("replicas", right=True), Column("$/h", right=True))
    return Section(
        kind="around",
        title=f"Growth of {percent(100 * found.per_month)} a month",
        lead=f"The fleet is full {full}, at {units.show_rate(found.full_at_per_s)}.",
        tag=weakest([plan.provenance, plan.workload.provenance]),
        tables=(Table(title="", columns=columns, rows=rows, note="replicas and cost keep headroom and spares"),),
    )


def _month(month: Month) -> tuple[Cell, ...]:
    cost = NONE if month.usd_per_h is None else units.show_usd(month.usd_per_h)
    return Cell(str(month.month)), Cell(units.show_rate(month.rate_per_s)), Cell(f"{month.replicas:,}"), Cell(cost)


# ---------------------------------------------------------------- several kinds


def _mixed(plan: Plan, found: MixedFleet) -> Section:
    rows = tuple(
        (
            Cell(pool.gpu + (f" x{pool.devices_per_replica}" if pool.devices_per_replica > 1 else ""), "", pool.precision),
            Cell(_prompts(pool)),
            Cell(percent(100 * pool.share)),
            Cell(f"{pool.replicas:,}" if not pool.spare else f"{pool.replicas - pool.spare:,} + {pool.spare:,}"),
            Cell(percent(100 * pool.utilisation)),
            Cell(units.show_usd(pool.usd_per_hour)),
        )
        for pool in found.pools
    )
    columns = (
        Column("pool"), Column("prompt tokens", right=True), Column("requests", right=True), Column("replicas", right=True),
        Column("in use", right=True), Column("$/h", right=True),
    )  # fmt: skip
    return Section(
        kind="around",
        title="Several kinds, split by prompt length",
        lead=f"{units.show_usd(found.usd_per_hour)} an hour, {100 * found.saving:.0f} % less than the plan; a router splits by length.",
        tag=found.provenance.value,
        facts=_kept(found),
        tables=(Table(title="", columns=columns, rows=rows, note="each pool simulated at its own requests"), _everybody(plan, found)),
    )


def _kept(found: MixedFleet) -> tuple[Fact, ...]:
    if found.availability is None or found.availability_interval is None:
        return ()
    low, high = found.availability_interval
    return (
        Fact("Availability", share(found.availability), f"{share(low)} to {share(high)}: every pool with enough replicas up", "assumed"),
    )


def _prompts(pool: PoolPlan) -> str:
    low = f"{pool.above_tokens + 1:,.0f}"
    return f"{low} and more" if pool.most_tokens is None else f"{low} to {pool.most_tokens:,.0f}"


def _everybody(plan: Plan, found: MixedFleet) -> Table:
    """Return latencies of all requests together beside those of the plan."""
    keys = [key for key in found.predicted if key.partition("_")[0] in latencies.METRICS and key.endswith("_s")]
    rows = tuple((Cell(latencies.name(k)), Cell(time(found.predicted[k])), Cell(time(plan.predicted.get(k)))) for k in keys)
    columns = (Column("all requests together"), Column("several kinds", right=True), Column("the plan", right=True))
    return Table(title="", columns=columns, rows=rows)
