"""Benchmarks in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlsys_bench import stats
from mlsys_bench.report import qualities
from mlsys_bench.report.parts import (
    NONE,
    Cell,
    Column,
    Fact,
    Section,
    Table,
    count,
    joined,
    parameters,
    percent,
    quantity,
    scalar,
)
from mlsys_bench.types import Bench, Measurement, Scalar


def bench(record: Bench, rows: Sequence[Any] | None = None) -> Section:
    """Return every benchmark with its median and interval; ready-made `rows` also say what was achieved of this machine's best.

    The rows are those of `bench.table`, which the words may not import.
    """
    ran = [m for m in record.measurements if m.skipped is None]
    skipped = Counter(f"{m.name}: {m.skipped}" for m in record.measurements if m.skipped is not None)
    launches = max((len(m.launches) for m in ran), default=0)
    everywhere = _common(ran)
    losses = [m for m in ran if m.name == qualities.NAME]
    timed = [m for m in ran if m.name != qualities.NAME]
    table = _given(rows) if rows is not None else _own(timed, everywhere)
    tables = (*((table,) if table.rows or not losses else ()), *((qualities.table(losses),) if losses else ()))
    return Section(
        kind="bench",
        title=f"Benchmarks: {len(ran):,}",
        lead=f"{count(len(ran), 'benchmark')} in {launches} launch{'es' * (launches != 1)}"
        + f", {skipped.total()} skipped" * bool(skipped)
        + ".",
        tag="measured",
        facts=(Fact("Steps of", parameters(everywhere)),) if everywhere and rows is None else (),
        tables=tables,
        notes=(("Skipped", tuple(f"{n} x {line}" if n > 1 else line for line, n in skipped.items())),) if skipped else (),
    )


def _common(measurements: Sequence[Measurement]) -> dict[str, Scalar]:
    """Return the parameters that every engine step shares: said once, not in every row."""
    steps = [m.parameters for m in measurements if m.name == "engine.step"]
    first = steps[0] if len(steps) > 1 else {}
    return {name: value for name, value in first.items() if all(p.get(name) == value for p in steps)}


def _given(rows: Iterable[Any]) -> Table:
    columns = (
        Column("benchmark"), Column("parameters", flexible=True), Column("median", right=True), Column("achieved", right=True),
        Column("of this machine's best", right=True), Column("samples", right=True, wide=True),
    )  # fmt: skip
    cells = tuple(_row(row) for row in rows if row.skipped is None)
    return Table(title="", columns=columns, rows=cells, note="below each median its 90 % interval, within launches")


def _row(row: Any) -> tuple[Cell, ...]:
    median, interval = quantity(row.median, row.unit, row.interval)
    rates = [quantity(value, unit)[0] for value, unit in ((row.bytes_per_s, "B/s"), (row.flops_per_s, "FLOP/s")) if value is not None]
    share = NONE if row.share is None else percent(100 * row.share)
    times = f"{row.launches} launches" if row.launches > 1 else ""
    achieved = Cell(rates[0] if rates else NONE, "", rates[1] if len(rates) > 1 else "")
    return (
        Cell(row.name, "strong"), Cell(row.what, "muted", row.costs), Cell(median, "", interval), achieved,
        Cell(share, "", row.bound or ""), Cell(f"{row.samples:,}", "", times),
    )  # fmt: skip


def _own(measurements: Sequence[Measurement], everywhere: Mapping[str, Scalar]) -> Table:
    columns = (Column("benchmark"), Column("parameters", flexible=True), Column("median", right=True), Column("samples", right=True))
    rows = tuple((Cell(m.name, "strong"), Cell(short(m.parameters, everywhere), "muted"), *_figures(m)) for m in measurements)
    return Table(title="", columns=columns, rows=rows, note="below each median its 90 % interval, within launches")


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


def _figures(m: Measurement) -> tuple[Cell, Cell]:
    values = np.array([v for launch in m.launches for r in launch.rounds for v in r.values])
    if not len(values):
        return Cell(NONE, "muted"), Cell("0")
    text, interval = quantity(stats.quantile(values, 0.5), m.unit, stats.quantile_interval(values, 0.5))
    return Cell(text, "", interval or "too few"), Cell(f"{len(values):,}", "", f"{len(m.launches)} x" if len(m.launches) > 1 else "")
