"""Benchmarks and the gate's verdicts, in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlsys_bench import stats
from mlsys_bench.report.parts import (
    NONE,
    Cell,
    Column,
    Fact,
    Section,
    Table,
    Tone,
    count,
    joined,
    parameters,
    percent,
    quantity,
    ratio,
    scalar,
)
from mlsys_bench.types import Bench, Measurement, Scalar
from mlsys_bench.verdicts import Finding, Verdict

VERDICT_TONE: dict[str, Tone] = {
    "regression": "bad", "improved": "good", "pass": "good", "inconclusive": "unsure", "suspect": "unsure", "not_comparable": "unsure",
}  # fmt: skip
MEANING = {
    "regression": "The candidate is slower: a regression.",
    "improved": "The candidate is faster.",
    "pass": "The candidate is no slower than the tolerance allows.",
    "inconclusive": "Nothing can be said either way.",
    "suspect": "The candidate looks slower; single launches cannot prove it.",
    "not_comparable": "The two sides must not be compared.",
}


def bench(record: Bench, rows: Sequence[Any] | None = None) -> Section:
    """Return every benchmark with its median and interval; ready-made `rows` also say what was achieved of this machine's best.

    The rows are those of `bench.table`, which the words may not import.
    """
    ran = [m for m in record.measurements if m.skipped is None]
    skipped = Counter(f"{m.name}: {m.skipped}" for m in record.measurements if m.skipped is not None)
    launches = max((len(m.launches) for m in ran), default=0)
    everywhere = _common(ran)
    table = _given(rows) if rows is not None else _own(ran, everywhere)
    return Section(
        kind="bench",
        title=f"Benchmarks: {len(ran):,}",
        lead=f"{count(len(ran), 'benchmark')} in {launches} launch{'es' * (launches != 1)}"
        + f", {skipped.total()} skipped" * bool(skipped)
        + ".",
        tag="measured",
        facts=(Fact("Steps of", parameters(everywhere)),) if everywhere and rows is None else (),
        tables=(table,),
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
        Cell(row.name, "strong"), Cell(row.what, "muted"), Cell(median, "", interval), achieved,
        Cell(share, "", row.bound or ""), Cell(f"{row.samples:,}", "", times),
    )  # fmt: skip


def _own(measurements: Sequence[Measurement], everywhere: Mapping[str, Scalar]) -> Table:
    columns = (Column("benchmark"), Column("parameters", flexible=True), Column("median", right=True), Column("samples", right=True))
    rows = tuple((Cell(m.name, "strong"), Cell(_short(m.parameters, everywhere), "muted"), *_figures(m)) for m in measurements)
    return Table(title="", columns=columns, rows=rows, note="below each median its 90 % interval, within launches")


def _short(values: Mapping[str, Scalar], everywhere: Mapping[str, Scalar]) -> str:
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


# ---------------------------------------------------------------- the gate


def verdict(record: Verdict) -> Section:
    """Return the gate's verdict, its reasons, and every metric with its change."""
    word = record.verdict.replace("_", " ")
    changed = tuple(f for f in record.findings if f.ratio is not None)
    better, worse = (sum(1 for f in changed if f.verdict == v) for v in ("improved", "regression"))
    facts = [Fact("Verdict", word, f"tolerance {100 * record.tolerance:g} %", "", VERDICT_TONE[record.verdict])]
    if changed:
        facts.append(
            Fact(
                "Metrics",
                f"{worse} regressed, {better} improved",
                f"of {len(changed)} compared",
                "measured",
            )
        )
    notes = (
        ("Reasons", record.reasons),
        ("Fingerprint differences", record.fingerprint_differences),
        ("Metric by metric", _why(record.findings)),
    )
    return Section(
        kind="verdict",
        title=f"Gate: {word}",
        lead=MEANING[record.verdict],
        tag="measured",
        tone=VERDICT_TONE[record.verdict],
        facts=tuple(facts),
        tables=(_findings(record.findings),) if record.findings else (),
        notes=tuple((head, lines) for head, lines in notes if lines),
    )


def _why(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Return each reason once, with the metrics it is of."""
    names: dict[str, list[str]] = {}
    for f in findings:
        names.setdefault(f.reason, []).append(f.name)
    return tuple(
        f"{', '.join(f'{name} ({n} x)' if n > 1 else name for name, n in Counter(of).items())}: {reason}" for reason, of in names.items()
    )


def _findings(findings: Sequence[Finding]) -> Table:
    columns = (
        Column("metric", flexible=True), Column("baseline", right=True), Column("candidate", right=True), Column("change", right=True),
        Column("verdict"),
    )  # fmt: skip
    return Table(title="", columns=columns, rows=tuple(map(_finding, findings)), note="change: candidate over baseline, its interval below")


def _finding(f: Finding) -> tuple[Cell, ...]:
    interval = None if f.interval is None else (100 * (f.interval[0] - 1), 100 * (f.interval[1] - 1))
    ends = "" if interval is None else f"{interval[0]:+.1f} to {interval[1]:+.1f} %"
    return (
        Cell(f.name, "strong", _short(f.parameters, {})),
        Cell(quantity(f.baseline, f.unit)[0]),
        Cell(quantity(f.candidate, f.unit)[0]),
        Cell(ratio(f.ratio), "", ends),
        Cell(f.verdict.replace("_", " "), VERDICT_TONE[f.verdict]),
    )
