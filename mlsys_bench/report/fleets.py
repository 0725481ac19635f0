"""Several scenarios on one pool: who is served how much, on which GPUs, hour by hour, and what is missing."""

from __future__ import annotations

from collections.abc import Iterator

from mlsys_bench import slo, units
from mlsys_bench.fleets import Fleet, FleetPlan, Hour, Option, Placed, Served
from mlsys_bench.report.parts import (
    NONE,
    Cell,
    Column,
    Fact,
    Section,
    Table,
    digits,
    joined,
    percent,
    span,
    usd_span,
    whole,
)
from mlsys_bench.units import count

BAR = 56  # characters of a bar
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def fleet(record: Fleet) -> Section:
    """Return a fleet file as it asks: the pool, and the scenarios with what is changed of them."""
    rows = tuple(
        (
            Cell(want.name, "strong", "" if want.name == want.scenario else want.scenario),
            Cell(f"{want.priority}"),
            Cell("its own" if want.rate_per_s is None else units.show_rate(want.rate_per_s)),
            Cell(want.arrivals or "its own"),
            Cell(slo.show(want.slo) or "its own"),
        )
        for want in record.wants
    )
    columns = (
        Column("scenario"), Column("priority", right=True), Column("rate", right=True), Column("arrivals", flexible=True),
        Column("limits", flexible=True),
    )  # fmt: skip
    return Section(
        kind="fleet",
        title=f"Fleet: {record.name}",
        lead=" ".join(record.description.split()),
        tag="assumed",
        facts=(Fact("Pool", pool(record.pool), "", "assumed"),),
        tables=(Table(title="Scenarios", columns=columns, rows=rows),),
        notes=(("Source", (record.source,)),),
    )


def plan(record: FleetPlan) -> Section:
    """Return the plan of a fleet as a manager reads it, then the hours and what each scenario would need alone."""
    tables = (_scenarios(record), _pool(record), _hours(record), _options(record))
    return Section(
        kind="fleet-plan",
        title=f"Fleet: {record.name}, {count(len(record.served), 'scenario')} on {pool(record.pool)}",
        lead=lead(record),
        tag=record.provenance.value,
        tone="good" if record.is_whole else "bad",
        tiles=_tiles(record),
        facts=tuple(_facts(record)),
        tables=tuple(table for table in tables if table is not None),
        notes=tuple((head, lines) for head, lines in (("Assumptions", record.assumptions), ("Notes", record.notes)) if lines),
        drawing=tuple(drawing(record)),
    )


def pool(gpus: dict[str, int]) -> str:
    """Print GPUs by kind: '8 x H100-SXM + 16 x L40S'."""
    return " + ".join(f"{n} x {gpu}" for gpu, n in gpus.items() if n) or "no GPU"


def lead(record: FleetPlan) -> str:
    """Return the answer in one sentence."""
    if record.is_whole:
        when = "The busiest hour takes" if len(record.hours) > 1 else "It takes"
        n = len(record.served)
        who = "The scenario is" if n == 1 else f"All {n} scenarios are"
        return f"{who} served in full. {when} {pool(_used(record.hours[record.busiest]))}."
    cut = [each for each in record.served if each.share < 1]
    told = ", ".join(f"{each.name} to {percent(100 * each.share)}" for each in cut)
    when = " in the worst hour" if len(record.hours) > 1 else ""
    return f"The pool is too small: it serves {told}{when}; {_cure(record.needs)}."


def _cure(needs: dict[str, int | None]) -> str:
    """Return what would make it whole: '2 more H100-SXM or 5 more L40S would do'."""
    known = [f"{n} more {gpu}" for gpu, n in needs.items() if n is not None]
    return f"{' or '.join(known)} would do" if known else "more of no one kind of GPU would do"


def _used(hour: Hour) -> dict[str, int]:
    return {gpu: sum(by.values()) for gpu, by in hour.gpus.items()}


def _tiles(record: FleetPlan) -> tuple[Fact, ...]:
    used, tag = sum(_used(record.hours[record.busiest]).values()), record.provenance.value
    ok = sum(each.share == 1 for each in record.served)
    return (
        Fact("served in full", f"{ok} of {len(record.served)}", "scenarios, every hour", tag),
        Fact("GPUs in the busiest hour", f"{used} of {sum(record.pool.values())}", pool(_used(record.hours[record.busiest])), tag),
        Fact("in use, per hour", units.show_usd(record.usd_per_hour), "on average" if len(record.hours) > 1 else "", tag),
        Fact("the whole pool, per hour", units.show_usd(record.pool_usd_per_hour), "", tag),
    )


def _facts(record: FleetPlan) -> Iterator[Fact]:
    tag, busiest = record.provenance.value, record.hours[record.busiest]
    several = len(record.hours) > 1
    yield Fact("Pool", pool(record.pool), f"{units.show_usd(record.pool_usd_per_hour)}/h, used or not", tag)
    when = f"at {_clock(busiest)}, the busiest hour" if several else "all day: traffic is steady"
    yield Fact("In use", pool(_used(busiest)), when, tag)
    cost = f"{units.show_usd(record.usd_per_hour)}/h of GPUs in use"
    at_peak = joined(
        f"{units.show_usd(record.busiest_usd_per_hour)}/h in the busiest hour" if several else "", usd_span(record.busiest_usd_interval)
    )
    yield Fact("Cost", cost, at_peak, tag)
    for each in record.served:
        if each.share < 1:
            yield Fact("Cut", f"{each.name}: {percent(100 * each.share)} served", _cure(each.needs), tag, "bad")
    if several:
        yield Fact("Sharing", *_sharing(record), tag)


def _sharing(record: FleetPlan) -> tuple[str, str]:
    """Return what all peaks at once would have taken, beside the busiest hour."""
    most = {gpu: max(_used(hour)[gpu] for hour in record.hours) for gpu in record.pool}
    if record.peaks_together is None:
        return "peaks at different hours use the same GPUs", "all peaks at once would not fit the pool"
    if sum(record.peaks_together.values()) <= sum(most.values()):
        return "peaks come together", "no GPU is saved by the hour"
    return f"{pool(most)} are enough by the hour", f"all peaks at once would take {pool(record.peaks_together)}"


def _clock(hour: Hour) -> str:
    day, rest = divmod(hour.start_s, 86400)
    return (f"day {int(day) + 1}, " if day else "") + f"{int(rest // 3600):02}:00"


def _scenarios(record: FleetPlan) -> Table:
    rows = tuple(
        (
            Cell(each.name, "strong", each.model),
            Cell(f"{each.priority}"),
            Cell(units.show_rate(each.rate_per_s), "", "at its peak" if len(record.hours) > 1 else ""),
            Cell(percent(100 * each.share), "good" if each.share == 1 else "bad", span(_apart(each), 100, " %")),
            Cell(" + ".join(f"{p.replicas} x {_each(p)}{p.gpu}" for p in each.placed) or NONE),
            Cell(units.show_usd(math_sum(p.usd_per_hour for p in each.placed))),
            Cell("" if each.share == 1 else _cure(each.needs), "muted"),
        )
        for each in record.served
    )
    columns = (
        Column("scenario"), Column("priority", right=True), Column("rate", right=True), Column("served", right=True),
        Column("replicas", flexible=True), Column("$/h", right=True, wide=True), Column("to make it whole", flexible=True),
    )  # fmt: skip
    kept = columns if any(each.share < 1 for each in record.served) else columns[:-1]
    return Table(
        title="Scenarios", columns=kept, rows=tuple(row[: len(kept)] for row in rows),
        note="served: share of the traffic in its worst hour, with its interval (90 % or wider); replicas in the busiest hour"
        if len(record.hours) > 1
        else "served: share of the traffic, with its interval (90 % or wider)",
    )  # fmt: skip


def _each(placed: Placed) -> str:
    return f"{placed.gpus // placed.replicas} " if placed.gpus > placed.replicas else ""


def _apart(each: Served) -> tuple[float, float] | None:
    return each.share_interval if each.share_interval[0] < each.share_interval[1] else None


def math_sum(values: Iterator[float | None]) -> float | None:
    """Return the sum, None where one of them is not known."""
    known = list(values)
    return None if any(value is None for value in known) else sum(value for value in known if value is not None)


def _pool(record: FleetPlan) -> Table:
    used = _used(record.hours[record.busiest])
    rows = tuple(
        (
            Cell(gpu, "strong"),
            Cell(f"{there:,}"),
            Cell(f"{used[gpu]:,}"),
            Cell(f"{there - used[gpu]:,}", "" if there > used[gpu] else "muted"),
            Cell(", ".join(f"{name} {n}" for name, n in record.hours[record.busiest].gpus[gpu].items()) or NONE),
            Cell("" if record.is_whole else NONE if record.needs.get(gpu) is None else f"+{record.needs[gpu]}"),
        )
        for gpu, there in record.pool.items()
    )
    columns = (
        Column("GPU"), Column("there", right=True), Column("in use", right=True), Column("free", right=True),
        Column("by", flexible=True), Column("enough for all", right=True),
    )  # fmt: skip
    kept = columns[:-1] if record.is_whole else columns
    return Table(title="The pool in the busiest hour", columns=kept, rows=tuple(row[: len(kept)] for row in rows))


def _hours(record: FleetPlan) -> Table | None:
    if len(record.hours) < 2:
        return None
    names = [each.name for each in record.served]
    rows = tuple(
        (
            Cell(_clock(hour), "strong" if i == record.busiest else ""),
            *(Cell(f"{digits(hour.rates_per_s[name])}/s", "" if hour.shares[name] == 1 else "bad", _gpus_of(hour, name)) for name in names),
            *(Cell(f"{n} of {record.pool[gpu]}") for gpu, n in _used(hour).items()),
        )
        for i, hour in enumerate(record.hours)
    )
    columns = (Column("hour"), *(Column(name, right=True) for name in names), *(Column(gpu, right=True) for gpu in record.pool))
    return Table(
        title="Hour by hour", columns=columns, rows=rows, note="rates until the lead after each hour; below each its GPUs", detail=True
    )


def _gpus_of(hour: Hour, name: str) -> str:
    own = " + ".join(f"{by[name]} {gpu}" for gpu, by in hour.gpus.items() if name in by) or "none"
    return own if hour.shares[name] == 1 else f"{own}, {percent(100 * hour.shares[name])}"


def _options(record: FleetPlan) -> Table:
    rows = tuple(_option(each, option, i == 0) for each in record.served for i, option in enumerate(each.options))
    columns = (
        Column("scenario"), Column("GPU"), Column("replicas", right=True), Column("GPUs", right=True), Column("one carries", right=True),
        Column("$/h", right=True), Column("binds", flexible=True),
    )  # fmt: skip
    return Table(title="What each would need alone, at its peak", columns=columns, rows=rows, detail=True)


def _option(each: Served, option: Option, first: bool) -> tuple[Cell, ...]:
    name = Cell(each.name if first else "", "strong")
    if option.replicas is None or option.devices_per_replica is None:
        return (name, Cell(option.gpu), Cell(NONE), Cell(NONE), Cell(NONE), Cell(NONE), Cell(option.why_not or "", "muted"))
    usd = None if option.usd_per_replica_h is None else option.usd_per_replica_h * option.replicas
    return (
        name, Cell(option.gpu, "", option.precision or ""), Cell(f"{option.replicas:,}", "", whole(option.replicas_interval)),
        Cell(f"{option.replicas * option.devices_per_replica:,}"), Cell(units.show_rate(option.each_per_s)), Cell(units.show_usd(usd)),
        Cell(option.binds or "", "muted"),
    )  # fmt: skip


def drawing(record: FleetPlan) -> Iterator[str]:
    """Yield the pool in the busiest hour as bars of letters, one for each scenario, dots for what is free."""
    letters = {each.name: LETTERS[i % len(LETTERS)] for i, each in enumerate(record.served)}
    width = max(map(len, record.pool))
    for gpu, there in record.pool.items():
        by = record.hours[record.busiest].gpus[gpu]
        scale = min(1.0, BAR / max(there, 1))
        bar = "".join(letters[name] * max(1, round(n * scale)) for name, n in by.items())
        yield f"{gpu:{width}}  {bar + '.' * max(0, round(there * scale) - len(bar))}  {sum(by.values())} of {there}"
    yield " " * width + "  " + ", ".join(f"{letter} {name}" for name, letter in letters.items()) + ", . free"
