"""A plan beside a baseline, and what changes would save or cost, in words."""

from __future__ import annotations

from collections.abc import Iterator

from mlsys_bench import units
from mlsys_bench.billing import Beside, Cause, Sensitivity
from mlsys_bench.report.costs import changes_table, comparison_table, dollars
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, Tone, percent, weakest
from mlsys_bench.types import Plan
from mlsys_bench.units import count


def sections(plan: Plan) -> Iterator[Section]:
    """Yield a section for each that was asked for."""
    if plan.baseline is not None:
        yield _beside(plan.baseline)
    if plan.sensitivity:
        yield _sensitivity(plan.sensitivity)


def by_size(rows: tuple[Sensitivity, ...]) -> tuple[Sensitivity, ...]:
    """Return the changes with the largest first, those that could not be planned last."""
    return tuple(sorted(rows, key=lambda row: (row.usd_per_hour is None, -abs(row.change_usd_per_month or 0.0))))


def _beside(found: Beside) -> Section:
    tag = found.provenance.value
    facts = [Fact("Baseline", found.baseline, found.file, tag)]
    if found.per_request_usd_per_month is not None:
        more = found.per_request_usd_per_month
        why = "for this traffic, beside the baseline's price per request"
        facts.append(Fact("Per request", f"{dollars(more)} a month", why, tag, _tone(more)))
    notes = [("Before you compare", found.differences)] if found.differences else []
    return Section(
        kind="baseline",
        title="Beside the baseline",
        lead=_lead(found),
        tag=tag,
        facts=tuple(facts),
        tables=(*((_causes(found.causes),) if found.causes else ()), comparison_table(found.figures, title="Side by side")),
        notes=(*notes, ("Causes", (found.method,))),
    )


def _lead(found: Beside) -> str:
    month = found.change_usd_per_month
    if month is None:
        return "One of the two has no price, so only their replicas can be compared."
    if month == 0:
        return "The plan costs what the baseline does."
    low, high = found.change_interval or (month, month)
    sure = "" if low == high else f" ({dollars(low)} to {dollars(high)}: {'clear' if low * high > 0 else 'may be none'})"
    share = "" if found.change is None else f", {percent(100 * found.change, signed=True)}"
    return f"The plan {'saves' if month < 0 else 'adds'} {units.show_usd(abs(month))} a month{share}{sure}."


def _causes(causes: tuple[Cause, ...]) -> Table:
    rows = tuple(
        (
            Cell(cause.cause, "strong"),
            Cell("; ".join(cause.changes)),
            Cell(f"{cause.replicas:+,}" if cause.replicas else "0"),
            Cell(NONE if cause.usd_per_month is None else dollars(cause.usd_per_month), _tone(cause.usd_per_month)),
        )
        for cause in causes
    )
    columns = (Column("cause"), Column("what changed", flexible=True), Column("replicas", right=True), Column("a month", right=True))
    return Table(title="Why", columns=columns, rows=rows)


def _tone(month: float | None) -> Tone:
    return "" if not month else "good" if month < 0 else "bad"


def _sensitivity(rows: tuple[Sensitivity, ...]) -> Section:
    rows = by_size(rows)
    known = [row for row in rows if row.change_usd_per_month]
    lead = "None of these changes moves the cost: replicas are whole." if not known else _largest(known[0])
    planned = [row.provenance for row in rows if row.provenance is not None]
    left_out = tuple(f"{row.what} {row.method.partition('; ')[2]}" for row in rows if "; " in row.method)
    how = f"{count(len(rows), 'change')}, each planned again from the start and simulated as the plan was; none is scaled"
    return Section(
        kind="sensitivity",
        title="What a change would save or cost",
        lead=lead,
        tag=weakest(planned) if planned else "",
        tables=(changes_table(rows, title=""),),
        notes=(("How", (how, *left_out)),),
    )


def _largest(row: Sensitivity) -> str:
    month = row.change_usd_per_month or 0.0
    sure = "" if row.clear is not False else ", which lies within the plan's own interval"
    return f"Most moves with {row.what}: {dollars(month)} a month{sure}."
