"""What a plan costs, in words: the bill, energy, APIs, terms, a baseline, what a change would do."""

from __future__ import annotations

import math
from collections.abc import Iterator

from mlsys_bench import units
from mlsys_bench.billing import Bill, BreakEven, Comparison, Costs, Energy, Mix, Sensitivity
from mlsys_bench.report.parts import Cell, Column, Fact, Section, Table, Tone, digits, joined, percent, scalar, usd_span

LESS: dict[bool, Tone] = {True: "good", False: "bad"}
_NAMES = {
    "usd_per_hour": "$/h", "usd_per_month": "$ a month", "usd_per_request": "$ a request",
    "usd_per_million_tokens": "$ per 1M output tokens", "gpus": "GPUs", "requests_per_s": "requests/s",
}  # fmt: skip


def costs(record: Costs) -> Section:
    """Return the costs of a plan, the bill first."""
    return Section(
        kind="costs",
        title=f"Costs: {record.plan}",
        lead=_lead(record),
        tag=record.bill.provenance.value if record.bill else "",
        facts=tuple(_facts(record)),
        tables=tuple(_tables(record)),
        notes=tuple(_notes(record)),
    )


def _lead(record: Costs) -> str:
    if record.bill is None:
        return "The fleet has no published price, so nothing here is in dollars."
    month, year = units.show_usd(record.bill.usd_per_month), units.show_usd(record.bill.usd_per_year)
    return (
        f"{units.show_usd(record.bill.usd_per_h)} an hour, {month} a month, {year} a year, at {digits(record.requests_per_s)} requests/s."
    )


def _facts(record: Costs) -> Iterator[Fact]:
    if record.bill is not None:
        yield from _unit_costs(record.bill)
    if record.energy is not None:
        yield _energy(record.energy)
    for even in record.apis:
        yield _api(even, record)
    if record.mix is not None:
        yield _mix(record.mix)
    if record.saving_usd_per_month is not None:
        saved = record.saving_usd_per_month
        words = f"{units.show_usd(abs(saved))} a month {'less' if saved >= 0 else 'more'} than the baseline"
        yield Fact("Baseline", words, "at its price per request", "", LESS[saved >= 0])


def _unit_costs(bill: Bill) -> Iterator[Fact]:
    tag = bill.provenance.value
    thousand = _small(1000 * bill.usd_per_request, 4)
    yield Fact("Request", _small(bill.usd_per_request, 6), f"{thousand} a thousand, idle time included", tag)
    if bill.usd_per_million_tokens is not None:
        kinds = ((bill.usd_per_million_input_tokens, "in"), (bill.usd_per_million_output_tokens, "out"))
        split = joined(*(f"{_usd(usd)} {kind}" for usd, kind in kinds if usd is not None))
        yield Fact("1M tokens", split, f"{_usd(bill.usd_per_million_tokens)} of both alike; shared by machine time", tag)


def _energy(energy: Energy) -> Fact:
    more = joined(
        None if energy.wh_per_request is None else f"{digits(energy.wh_per_request)} Wh a request",
        None if energy.usd_per_month is None else f"{units.show_usd(energy.usd_per_month)} a month",
        None if energy.co2_kg_per_month is None else f"{digits(energy.co2_kg_per_month)} kg CO2 a month",
    )
    return Fact("Energy", f"{digits(energy.watts)} W, {digits(energy.kwh_per_month)} kWh a month", more, energy.provenance.value)


def _api(even: BreakEven, record: Costs) -> Fact:
    asked = f"{even.model} asks ${even.api_usd_per_request:.6f} a request{_this_traffic(even, record)}"
    tag = record.bill.provenance.value if record.bill else ""
    if even.from_per_day is None:
        return Fact("API", f"{even.model} is cheaper at every rate", asked, tag, "unsure")
    good = even.for_good_per_day
    beyond = "" if good is None or good <= even.from_per_day * 1.001 else f"; for good from {good:,.0f}"
    least = f"the least fleet costs {units.show_usd(even.idle_usd_per_day)} a day"
    return Fact("API", f"own is cheaper from {even.from_per_day:,.0f} requests a day{beyond}", f"{asked}; {least}", tag)


def _this_traffic(even: BreakEven, record: Costs) -> str:
    """Return what the plan's own traffic costs there and here."""
    if record.bill is None:
        return ""
    there = even.api_usd_per_request * record.requests_per_s * 3600 * units.HOURS_PER_MONTH
    return f": {units.show_usd(there)} a month for this traffic, {units.show_usd(record.bill.usd_per_month)} by the fleet"


def _mix(mix: Mix) -> Fact:
    parts = joined(
        f"{mix.reserved} reserved" if mix.reserved else None,
        f"{mix.firm - mix.reserved} on demand at most" if mix.firm > mix.reserved else None,
        f"{mix.spot} spot at most, {mix.spot_spares} of them spare" if mix.spot else None,
    )
    less = f"{percent(abs(100 * mix.saving))} {'less' if mix.saving >= 0 else 'more'}"
    saved = f"{less} than all on demand ({units.show_usd(mix.all_on_demand_usd_per_h)}/h)"
    return Fact("Terms", f"{units.show_usd(mix.usd_per_h)}/h on average, by instances: {parts}", saved)


def _tables(record: Costs) -> Iterator[Table]:
    if record.bill is not None:
        yield _lines(record.bill)
    if record.comparison:
        yield comparison_table(record.comparison)
    if record.sensitivity:
        yield changes_table(record.sensitivity)


def _lines(bill: Bill) -> Table:
    rows = tuple(
        (
            Cell(line.what, "strong", line.provenance.value),
            Cell(_usd(line.usd_per_h)),
            Cell(units.show_usd(730 * line.usd_per_h)),
            Cell(line.source, "", line.date),
        )
        for line in bill.lines
    )
    note = f"without a price, and not in it: {', '.join(bill.unpriced)}" if bill.unpriced else ""
    columns = (Column("bill", flexible=True), Column("$/h", right=True), Column("$/month", right=True), Column("source", flexible=True))
    return Table(title="The bill", columns=columns, rows=rows, note=note)


def comparison_table(rows: tuple[Comparison, ...], title: str = "Beside the baseline") -> Table:
    """Return the figures of a plan beside those of a baseline."""
    columns = (Column(""), Column("baseline", right=True), Column("plan", right=True), Column("change", right=True))
    cells = tuple(
        (
            Cell(_NAMES.get(row.what, row.what.replace("_", " ")), "strong"),
            Cell(_figure(row.what, row.baseline)),
            Cell(_figure(row.what, row.plan)),
            Cell("—" if row.change is None else percent(100 * row.change, signed=True)),
        )
        for row in rows
    )
    return Table(title=title, columns=columns, rows=cells)


def changes_table(rows: tuple[Sensitivity, ...], title: str = "What a change would save or cost") -> Table:
    """Return what changes make of a plan, a row each."""
    columns = (Column("what if", flexible=True), Column("replicas", right=True), Column("$/h", right=True), Column("a month", right=True))
    return Table(
        title=title,
        columns=(*columns, Column("", flexible=True)),
        rows=tuple(_change(row) for row in rows),
    )


def _change(row: Sensitivity) -> tuple[Cell, ...]:
    month = row.change_usd_per_month
    none_of_it = "within the plan's own interval" if row.clear is False and month else ""
    around = usd_span(row.usd_interval) if row.usd_interval and row.usd_interval[0] < row.usd_interval[1] else ""
    return (
        Cell(row.what, "strong"),
        Cell("—" if row.replicas is None else f"{row.replicas:,}"),
        Cell("—" if row.usd_per_hour is None else units.show_usd(row.usd_per_hour), "", around),
        Cell("—" if month is None else dollars(month), _tone(month)),
        Cell(row.why_not or none_of_it, "muted"),
    )


def dollars(month: float) -> str:
    """Print a difference in dollars with its sign."""
    return f"{'+' if month > 0 else '-' if month < 0 else ''}{units.show_usd(abs(month))}"


def _tone(month: float | None) -> Tone:
    return "" if not month else LESS[month < 0]


def _notes(record: Costs) -> Iterator[tuple[str, tuple[str, ...]]]:
    if record.differences:
        yield "Before you compare", record.differences
    if record.energy is not None:
        yield "Energy is assumed", record.energy.assumed
    more = (*(record.mix.notes if record.mix else ()), *record.notes)
    if more:
        yield "Notes", more


def _figure(what: str, value: float | None) -> str:
    if value is None:
        return "—"
    if what.startswith("usd"):
        return _small(value, 6) if what == "usd_per_request" else units.show_usd(value)
    return percent(100 * value) if what == "utilisation" else scalar(value)


def _small(value: float, decimals: int) -> str:
    """Print a price with so many decimals, or more where it would have fewer than two digits."""
    return f"${value:.{max(decimals, 1 - math.floor(math.log10(value))) if value > 0 else decimals}f}"


def _usd(value: float) -> str:
    """Print dollars with the digits that small prices need."""
    return f"${value:.4f}" if value < 1 else units.show_usd(value)
