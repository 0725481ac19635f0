"""Benchmarks in words: what the machine delivers, where the time goes, every figure with its interval and its place under the roofs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from mlsys_bench import anatomy, readings
from mlsys_bench.readings import Row
from mlsys_bench.report import anatomies, qualities
from mlsys_bench.report.parts import (
    NONE,
    Cell,
    Column,
    Fact,
    Section,
    Table,
    digits,
    joined,
    parameters,
    percent,
    quantity,
    scalar,
    time,
)
from mlsys_bench.types import Bench, Machine, Measurement, Scalar
from mlsys_bench.units import count

WITHIN = (
    "±: half of the 95 % interval of the median, within these launches (— too few samples); two launches of the same program differ by 2 "
    "to 2.6 % (sd) even on a quiet machine.  Of ceiling: share of what this machine itself reads or multiplies at best, and what binds; "
    "latency: below half of it; above 100 % the engine's own kernels beat the library that sets the ceiling"
)
BEST = ("memory.read", "memory.copy", "memory.triad")


def bench(record: Bench, extra: object = None) -> Section:
    """Return every benchmark of a record.  `extra`: rows made already, or the machine they are made for."""
    rows = tuple(extra) if isinstance(extra, tuple | list) else readings.table(record, extra if isinstance(extra, Machine) else None)
    ran = [row for row in rows if row.skipped is None]
    taken = anatomy.tables(record.measurements)
    lead = f"{count(len(ran), 'benchmark')} in {_launches(ran)}{_skipped_words(rows)}{f'; {record.stopped}' if record.stopped else ''}."
    return Section(
        kind="bench",
        title=f"Benchmarks: {_of(record.measurements) or f'{len(ran):,}'}",
        lead=f"CONTENDED, measure again before you rely on this: {'; '.join(record.contended)}. {lead}" if record.contended else lead,
        tag="measured",
        tone="bad" if record.contended else "",
        tiles=tuple(_tiles(ran, taken)),
        facts=(*_facts(ran, taken), *_layout(record.measurements)),
        tables=(*map(anatomies.table, taken), *_tables(ran, record)),
        notes=tuple((heading, lines) for heading, lines in _notes(record, rows) if lines),
    )


def _of(measurements: Sequence[Measurement]) -> str:
    """Return what all of it is of: 'small-160m int8 on cpu, 1 thread'."""
    every = [m.parameters for m in measurements]
    devices, threads = (_values(every, name) for name in ("device", "threads"))
    models, formats = (_values([p for p in every if "model" in p], name) for name in ("model", "precision"))
    if not devices:
        return ""
    what = f"{models} {formats} on {devices}" if models and formats else devices
    return what + (f", {threads} thread{'s' * (threads != '1')}" if threads else "")


def _values(every: Sequence[Mapping[str, Scalar]], name: str) -> str:
    return ", ".join(dict.fromkeys(str(p[name]) for p in every if p.get(name) is not None))


def _launches(rows: Sequence[Row]) -> str:
    most = max((row.launches for row in rows), default=0)
    return f"{most} launch{'es' * (most != 1)}"


def _skipped_words(rows: Sequence[Row]) -> str:
    skipped = sum(row.skipped is not None for row in rows)
    return f", {skipped} skipped" if skipped else ""


# ---------------------------------------------------------------- ten seconds


def _tiles(rows: Sequence[Row], taken: Sequence[anatomy.Anatomy]) -> Iterator[Fact]:
    """Give the figures of a slide: bandwidth, peak, the fastest decode and prefill."""
    read, peak = _named(rows, "memory.read"), _best(rows, "gemm")
    if read:
        yield Fact("Memory reads", _text(read), _of_sheet(read))
    if peak:
        yield Fact("Products, at best", _text(peak), str(peak.parameters.get("precision", "")))
    for label, row in (("Decodes", _decode(rows)), ("Prefills", _prefill(rows))):
        if row is not None and row.tokens_per_s:
            yield Fact(label, f"{digits(row.tokens_per_s)} tokens/s", row.what.rpartition(": ")[2])
    if taken:
        yield Fact("Operators explain", percent(100 * taken[0].explained), f"of a decode step, {time(taken[0].step_s)}")


def _facts(rows: Sequence[Row], taken: Sequence[anatomy.Anatomy]) -> Iterator[Fact]:
    memory = [f"{row.name.removeprefix('memory.')} {_text(row)}" for name in BEST for row in rows if row.name == name]
    if memory:
        yield Fact("Memory", ", ".join(memory), _of_sheet(_named(rows, "memory.read")))
    products = [f"{row.parameters.get('precision', '')} {_text(row)}".strip() for row in rows if row.name == "gemm"]
    if products:
        yield Fact("Products", ", ".join(products), _of_sheet(_best(rows, "gemm")))
    for label, found in (("Decode", _decode(rows)), ("Prefill", _prefill(rows))):
        if found is not None and found.tokens_per_s:
            detail = joined(found.what.rpartition(": ")[2].partition(" ")[2], time(found.median), _near(found))
            yield Fact(label, f"{digits(found.tokens_per_s)} tokens/s", detail)
    if taken:
        yield anatomies.fact(taken[0])
    far = [row for row in rows if row.group == "operators" and row.bound == "latency"]
    if far:
        names = dict.fromkeys(row.name.removeprefix("op.") for row in far)
        operators = sum(row.group == "operators" and row.bound is not None for row in rows)
        yield Fact("Far from both", f"{len(far)} of {count(operators, 'operator')} below half of either roof", ", ".join(names))
    yield from _trust(rows)


def _trust(rows: Sequence[Row]) -> Iterator[Fact]:
    """Say how far the figures are to be believed: what did not settle, what was disturbed."""
    open_ended = [row for row in rows if row.ended == "budget"]
    if open_ended:
        widest = max((row.half_width for row in open_ended if row.half_width is not None), default=None)
        text = f"{len(open_ended)} of {len(rows)} ended with the budget"
        yield Fact("Not settled", text, "" if widest is None else f"the widest interval is ±{100 * widest:.1f} %", tone="unsure")
    flagged, whole = sum(row.flagged for row in rows), sum(row.flagged + row.samples + row.other_clocks for row in rows)
    if flagged:
        text = f"{flagged:,} of {count(whole, 'sample')} taken while something disturbed them"
        yield Fact("Flagged", text, "left out of medians", tone="unsure" if flagged > whole / 10 else "")
    clocks = sorted(f"{row.clock_hz / 1e9:.1f}" for row in rows if row.clock_hz)
    if clocks:
        others = sum(row.other_clocks for row in rows)
        moved = f"at other times another one: {others:,} of {count(whole, 'sample')}, left out of medians" if others else ""
        yield Fact("Clock", f"{clocks[0] if clocks[0] == clocks[-1] else f'{clocks[0]} to {clocks[-1]}'} GHz by benchmark", moved)
    wrong = [row for row in rows if row.error is not None and row.tolerance is not None and row.error > row.tolerance]
    if wrong:
        yield Fact("Wrong", f"{count(len(wrong), 'output')} beyond tolerance: " + ", ".join(row.name for row in wrong), tone="bad")


def _decode(rows: Sequence[Row]) -> Row | None:
    return max((row for row in _steps(rows) if not row.parameters.get("prefill_tokens")), key=_speed, default=None)


def _prefill(rows: Sequence[Row]) -> Row | None:
    return max((row for row in _steps(rows) if not row.parameters.get("decode_seqs")), key=_speed, default=None)


def _steps(rows: Sequence[Row]) -> Sequence[Row]:
    return [row for row in rows if row.name == "engine.step"]


def _speed(row: Row) -> float:
    return row.tokens_per_s or 0.0


def _named(rows: Sequence[Row], name: str) -> Row | None:
    return next((row for row in rows if row.name == name), None)


def _best(rows: Sequence[Row], name: str) -> Row | None:
    return max((row for row in rows if row.name == name and row.median), key=lambda row: row.median or 0.0, default=None)


def _text(row: Row) -> str:
    return quantity(row.median, row.unit)[0]


def _near(row: Row) -> str:
    return "" if row.share is None or row.roof is None else f"{100 * row.share:.0f} % of the {row.roof} ceiling"


def _of_sheet(row: Row | None) -> str:
    return "" if row is None or row.of_sheet is None else f"{100 * row.of_sheet:.0f} % of the data sheet"


# ---------------------------------------------------------------- every figure


def _tables(rows: Sequence[Row], record: Bench) -> Iterator[Table]:
    """Give a table per group, in the catalogue's order; losses have one of their own."""
    note = WITHIN
    for group, title in readings.GROUPS.items():
        mine = [row for row in rows if row.group == group and row.name != qualities.NAME]
        if mine:
            yield _table(title, mine, note)
            note = ""
    losses = [m for m in record.measurements if m.name == qualities.NAME and m.skipped is None]
    if losses:
        yield qualities.table(losses)


def _table(title: str, rows: Sequence[Row], note: str) -> Table:
    """Return a group's figures.  Benchmarks with several rows have a heading of their own, what all rows share stands in the title."""
    prefix = _shared(rows)
    columns: list[tuple[Column, Callable[[Row], Cell]]] = [
        (Column("median", right=True), _median),
        (Column("±", right=True), lambda row: _share(row.half_width) if row.half_width is not None else Cell(NONE, "muted")),
        (Column("tokens/s", right=True), lambda row: _figure(row.tokens_per_s if row.unit == "s" else None)),
        (Column("achieved", right=True), lambda row: _rate(row, nearer=True)),
        (Column("of ceiling", right=True), _standing),
        (Column("error", right=True), _error),
        (Column("J/token", right=True), lambda row: _figure(row.joules_per_token)),
        (Column("tokens/s/W", right=True, wide=True), lambda row: _figure(row.tokens_per_s_per_w)),
        (Column("also", right=True, wide=True), lambda row: _rate(row, nearer=False)),
        (Column("of data sheet", right=True, wide=True), lambda row: _share(row.of_sheet)),
        (Column("samples", right=True, wide=True), _samples),
        (Column("costs", wide=True), lambda row: Cell(row.costs or NONE, "muted")),
    ]
    known = [(column, cell) for column, cell in columns if any(cell(row).text != NONE for row in rows)]
    lines = [line for name in dict.fromkeys(row.name for row in rows) for line in _block(rows, name, prefix, [cell for _, cell in known])]
    heads = (Column("benchmark", flexible=True), *(column for column, _ in known))
    return Table(title=f"{title}: {prefix}" if prefix else title, columns=heads, rows=tuple(lines), note=note)


def _block(rows: Sequence[Row], name: str, prefix: str, cells: Sequence[Callable[[Row], Cell]]) -> Iterator[tuple[Cell, ...]]:
    """Give a benchmark's lines: one with its name alone where several follow."""
    mine = [row for row in rows if row.name == name]
    if len(mine) > 1:
        yield (Cell(_label(name), "strong"), *(Cell("") for _ in cells))
    for row in mine:
        at = _without(row.what, prefix)
        first = Cell(f"  {at}") if len(mine) > 1 else Cell(joined(_label(name), at), "strong")
        yield (first, *(cell(row) for cell in cells))


def _shared(rows: Sequence[Row]) -> str:
    """Return model and precision where all rows that have both have the same: said once, not in every row."""
    found = {f"{p['model']} {p['precision']}" for row in rows if {"model", "precision"} <= (p := row.parameters).keys()}
    return found.pop() if len(found) == 1 else ""


def _without(what: str, prefix: str) -> str:
    """Return the words of a row without what its table's title says."""
    if not prefix:
        return what
    precision = prefix.rpartition(" ")[2]
    return ", ".join(part for part in what.removeprefix(f"{prefix}: ").split(", ") if part != precision)


def _label(name: str) -> str:
    return name.removeprefix("op.")


def _median(row: Row) -> Cell:
    return Cell(NONE, "muted") if row.median is None else Cell(quantity(row.median, row.unit)[0])


def _rate(row: Row, *, nearer: bool) -> Cell:
    """Return the rate of the nearer roof, or the other one; a median that says so itself is not said again."""
    by = {"B/s": row.bytes_per_s, "FLOP/s": row.flops_per_s}
    first = "FLOP/s" if row.roof == "compute" or not row.bytes_per_s else "B/s"
    unit = first if nearer else next(name for name in by if name != first)
    return Cell(NONE, "muted") if by[unit] is None or unit == row.unit else Cell(quantity(by[unit], unit)[0])


def _standing(row: Row) -> Cell:
    if row.share is None or row.bound is None:
        return Cell(NONE, "muted")
    return Cell(f"{100 * row.share:.0f} % {row.bound}", "unsure" if row.bound == "latency" else "")


def _error(row: Row) -> Cell:
    """Return the relative error; in the colour of trouble beyond its tolerance."""
    if row.error is None:
        return Cell(NONE, "muted")
    return Cell(_small(row.error), "bad" if row.tolerance is not None and row.error > row.tolerance else "")


def _small(value: float) -> str:
    return "0" if value == 0 else f"{value:.0e}" if value < 1e-3 else f"{100 * value:.2g} %"


def _figure(value: float | None) -> Cell:
    return Cell(NONE, "muted") if value is None else Cell(digits(value))


def _share(value: float | None) -> Cell:
    return Cell(NONE, "muted") if value is None else Cell(percent(100 * value))


def _samples(row: Row) -> Cell:
    flagged = f"{row.flagged:,} flagged" if row.flagged else ""
    others = f"{row.other_clocks:,} at other clocks" if row.other_clocks else ""
    launches = f"{row.launches} launches" if row.launches > 1 else ""
    return Cell(joined(f"{row.samples:,}", flagged, others, launches, row.ended if row.ended != "settled" else ""))


# ---------------------------------------------------------------- notes


def _layout(measurements: Sequence[Measurement]) -> tuple[Fact, ...]:
    """Return what every engine step shares: said once, not in every row."""
    steps = [m.parameters for m in measurements if m.name == "engine.step"]
    first = steps[0] if len(steps) > 1 else {}
    everywhere = {name: value for name, value in first.items() if all(p.get(name) == value for p in steps)}
    return (Fact("Steps of", parameters(everywhere)),) if everywhere else ()


def _notes(record: Bench, rows: Sequence[Row]) -> Iterator[tuple[str, tuple[str, ...]]]:
    skipped = Counter(f"{_which(row)}: {row.skipped}" for row in rows if row.skipped is not None)
    yield "Skipped", tuple(f"{n} x {line}" if n > 1 else line for line, n in skipped.items())
    yield "What this machine does not tell", record.unread


def _which(row: Row) -> str:
    """Return what was skipped: of a benchmark that drifted which of its rows did, for the others may stand."""
    return joined(row.name, row.what) if row.ended == "drifting" else row.name


# ---------------------------------------------------------------- of the gate


def short(values: Mapping[str, Scalar], everywhere: Mapping[str, Scalar]) -> str:
    """Print parameters without those said already; the five features of an engine step in their own words."""
    if "decode_kv_tokens" not in values:
        return parameters({k: v for k, v in values.items() if everywhere.get(k) != v})
    decode, prefill = values.get("decode_seqs"), values.get("prefill_tokens")
    words = (
        f"decode {scalar(decode)} seqs, {scalar(values['decode_kv_tokens'])} KV tokens" if decode else "",
        f"prefill {scalar(prefill)} tokens, {scalar(values.get('prefill_pairs'))} pairs" if prefill else "",
    )
    known = {*everywhere, "decode_seqs", "decode_kv_tokens", "prefill_tokens", "prefill_pairs", "sampled_tokens"}
    return joined(*words, parameters({k: v for k, v in values.items() if k not in known}))
