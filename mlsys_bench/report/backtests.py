"""Back-tests in words: predictions held against the values of a table."""

from __future__ import annotations

from collections.abc import Sequence

from mlsys_bench.backtests import Backtest, Choosing, Deciding, Errors, Score, Sizing
from mlsys_bench.report.parts import NONE, Cell, Column, Fact, Section, Table, Tone, digits, joined, percent
from mlsys_bench.units import count

COLUMNS = (
    Column("median error", right=True), Column("worst error", right=True), Column("bar", right=True), Column("within", right=True),
    Column("answered", right=True, wide=True), Column("worst of its bar", right=True, wide=True),
)  # fmt: skip
NOTE = "errors are relative to the value; simulated waits below 1 % of a service time to that; exact values to at least 1e-5"


def backtest(record: Backtest) -> Section:
    """Return a back-test in words: of queueing formulas, of predicted serving runs, of fleets planned for them, or of the gate's looks."""
    return {"llm": _llm, "plan": _plan, "queueing": _queueing, "gate": _gate}[record.table](record)


def _queueing(record: Backtest) -> Section:
    """Return how many rows were answered and, where values are given, the errors per model, then per model and quantity."""
    judged, within = sum(s.rows for s in record.scores), sum(s.within for s in record.scores)
    return Section(
        kind="backtest",
        title=f"Back-test of {record.source}",
        lead=_lead(record, judged, within),
        tone="" if not judged else "good" if within == judged else "bad",
        facts=_facts(record),
        tables=_tables(record) if judged else (),
        notes=_notes(record),
    )


def _lead(record: Backtest, judged: int, within: int) -> str:
    answered = f"{record.answered:,} of {count(record.rows, 'row')} answered"
    if not judged:
        return f"{answered}; the table gives no values to compare them with."
    return f"{answered}; {within:,} of {judged:,} with a value are within their bar ({percent(100 * within / judged)})."


def _facts(record: Backtest) -> tuple[Fact, ...]:
    methods = sorted(record.methods.items(), key=lambda item: -item[1])
    return (Fact("Methods", joined(*(f"{name} {rows:,}" for name, rows in methods))),) if methods else ()


def _tables(record: Backtest) -> tuple[Table, ...]:
    by_model = tuple((Cell(s.model, "strong"), *_figures(s)) for s in record.by_model)
    by_quantity = tuple((Cell(s.model, "strong"), Cell(s.quantity or ""), *_figures(s)) for s in record.scores)
    both = (Column("model", flexible=True), Column("quantity"), *COLUMNS)
    return (
        Table(title="by model", columns=(Column("model", flexible=True), *COLUMNS), rows=by_model, note=NOTE),
        Table(title="by model and quantity", columns=both, rows=by_quantity, detail=True),
    )


def _figures(s: Score) -> tuple[Cell, ...]:
    tone: Tone = "good" if s.within == s.rows else "bad"
    return (
        Cell(NONE if s.median_error is None else share(s.median_error)),
        Cell(NONE if s.worst_error is None else share(s.worst_error), tone),
        Cell(_bars(s.bars), "muted"),
        Cell(f"{s.within:,} of {s.rows:,}", tone),
        Cell(f"{s.answered:,}", "" if s.answered == s.rows else "unsure"),
        Cell(NONE if s.worst_of_bar is None else f"{100 * s.worst_of_bar:,.0f} %"),
    )


def share(error: float) -> str:
    """Print a relative error: '1.23 %', and '2e-09' where a percentage would be zeros."""
    return f"{error:.0e}" if error < 5e-6 and error else f"{digits(100 * error)} %" if error else "0"


def _bars(bars: tuple[float, float]) -> str:
    return f"{'–'.join(f'{100 * bar:g}' for bar in dict.fromkeys(bars))} %"


def _notes(record: Backtest) -> tuple[tuple[str, tuple[str, ...]], ...]:
    misses = sorted((s for s in record.scores if (s.worst_of_bar or 0) > 1), key=lambda s: -(s.worst_of_bar or 0))
    lines = tuple(f"{s.model} {s.quantity} at {s.worst_parameters}: {digits(s.worst_of_bar or 0)} times its bar" for s in misses[:12])
    reasons = sorted(record.unanswered.items(), key=lambda item: -item[1])
    why = tuple(f"{rows:,} x {reason}" if rows > 1 else reason for reason, rows in reasons[:12])
    rest = f"{len(reasons) - 12} more reasons, see the column method" if len(reasons) > 12 else ""
    found = (("Furthest outside their bars", lines), ("Not answered", (*why, rest) if rest else why))
    return tuple((title, entries) for title, entries in found if entries)


# ---------------------------------------------------------------- serving runs

SPLITS = {
    "all": "all rows", "gpu": "by GPU", "model": "by model", "engine": "by engine", "seen": "by what was learned from before",
    "speculation": "by speculation", "serving": "by where prefill runs",
}  # fmt: skip
ERRORS = (
    Column("result"), Column("rows", right=True), Column("mean error", right=True), Column("90 % interval", right=True, wide=True),
    Column("median", right=True), Column("p90", right=True), Column("bias", right=True), Column("inside", right=True),
)  # fmt: skip
ERROR_NOTE = (
    "errors are relative to the result; rows counts results (independent experiments); 'inside' is the share of experiments whose "
    "result lies in its 90 % interval"
)
PEER_SPLITS = ("all", "gpu", "model", "engine")
PEERS = (
    Column("result"), Column("simulator", flexible=True), Column("rows", right=True), Column("its error", right=True),
    Column("ours there", right=True),
)  # fmt: skip


def _llm(record: Backtest) -> Section:
    """Return how many rows were predicted and, where results are given, the errors by GPU, model and engine, beside those of others."""
    answered = f"{record.answered:,} of {count(record.rows, 'row')} predicted"
    judged = bool(record.errors)
    methods = sorted(record.methods.items(), key=lambda item: -item[1])
    return Section(
        kind="backtest",
        title=f"Back-test of {record.source}",
        lead=f"{answered}." if judged else f"{answered}; the tables give no results to compare them with.",
        facts=(Fact("Provenance", joined(*(f"{name} {rows:,}" for name, rows in methods))),) if methods else (),
        tables=tuple(
            table
            for split in SPLITS
            if any(e.split == split for e in record.errors)
            for table in (_error_table(record, split), *_peer_tables(record, split))
        ),
        notes=_llm_notes(record),
    )


def _error_table(record: Backtest, split: str) -> Table:
    errors = [e for e in record.errors if e.split == split]
    columns = ERRORS if split == "all" else _by(split, ERRORS, spared=("median", "p90"))
    rows = tuple((*(() if split == "all" else (Cell(e.value, "strong"),)), *_error_cells(e)) for e in errors)
    return Table(
        title=SPLITS[split], columns=columns, rows=rows, note=ERROR_NOTE if split == "all" else "", detail=split in ("model", "engine")
    )


def _by(split: str, columns: Sequence[Column], *, spared: Sequence[str]) -> tuple[Column, ...]:
    """Return columns after the one of a split; where the page is narrow that costs the spared ones, not the last."""
    return Column(split, flexible=True), *(c._replace(wide=c.wide or c.title in spared) for c in columns)


def _error_cells(e: Errors) -> tuple[Cell, ...]:
    low_high = NONE if e.mape_interval is None else f"{digits(100 * e.mape_interval[0])}–{digits(100 * e.mape_interval[1])} %"
    kept: Tone = "" if e.coverage_interval is None or e.coverage_interval[0] <= 0.9 <= e.coverage_interval[1] else "unsure"
    return (
        Cell(e.column),
        Cell(f"{e.rows:,} ({e.groups:,})"),
        Cell(share(e.mape)),
        Cell(low_high, "muted"),
        Cell(share(e.median)),
        Cell(share(e.p90)),
        Cell(f"{100 * e.bias:+.1f} %"),
        Cell(f"{100 * e.coverage:.0f} %", kept),
    )


def _peer_tables(record: Backtest, split: str) -> tuple[Table, ...]:
    """Return what other simulators reach on the rows that they predict, beside ours on the same rows: means, as percentiles are noisy."""
    means = [e for e in record.errors if e.split == split and "mean" in e.column]
    beside = [(e, name, *found) for e in means for name, found in sorted(e.peers.items(), key=lambda p: p[1])]
    if not beside or split not in PEER_SPLITS:
        return ()
    rows = tuple(
        (
            *(() if split == "all" else (Cell(e.value, "strong"),)),
            Cell(e.column),
            Cell(name),
            Cell(f"{rows:,}"),
            Cell(share(theirs)),
            Cell(share(ours), "good" if ours < theirs else "bad"),
        )
        for e, name, theirs, ours, rows in beside
    )
    columns = PEERS if split == "all" else _by(split, PEERS, spared=("rows",))
    return (Table(title=f"beside other simulators, {SPLITS[split]}", columns=columns, rows=rows, detail=split != "all"),)


def _llm_notes(record: Backtest) -> tuple[tuple[str, tuple[str, ...]], ...]:
    reasons = sorted(record.unanswered.items(), key=lambda item: -item[1])
    why = tuple(f"{rows:,} x {reason}" if rows > 1 else reason for reason, rows in reasons)
    return tuple((title, lines) for title, lines in (("Not predicted", why), ("Remarks", record.notes)) if lines)


# ---------------------------------------------------------------- plans

LIMITS = {"e2e": "E2E", "tpot": "TPOT", "ttft": "TTFT"}
FLEETS = (
    Column("limit on"), Column("rows", right=True), Column("fleet", right=True), Column("within 10 %", right=True),
    Column("limit kept", right=True), Column("in interval", right=True), Column("safe fleet", right=True, wide=True),
    Column("kept by it", right=True, wide=True), Column("median error", right=True, wide=True), Column("p90", right=True, wide=True),
)  # fmt: skip
FLEET_NOTE = (
    "fleet: replicas planned over those that the measurement shows to be needed, median; limit kept: no fewer than needed; safe fleet: the "
    "interval's upper end; rows counts plans (independent experiments)"
)
PLAN_SPLITS = {"all": "all rows", "steepness": "by how much a tenth more load adds to the latency", **SPLITS}
CHOICES = (
    Column("table", flexible=True), Column("configurations", right=True), Column("regret, median", right=True), Column("p90", right=True),
    Column("mean", right=True, wide=True), Column("first choice misses", right=True),
)  # fmt: skip
CHOICE_NOTE = "regret: what the configuration chosen by prediction costs more than the cheapest that truly keeps limits, which are drawn"


def _plan(record: Backtest) -> Section:
    """Return how fleets were sized and what choices cost."""
    answered = f"{record.answered:,} of {count(record.rows, 'row')} planned"
    methods = sorted(record.methods.items(), key=lambda item: -item[1])
    choices = (Table(title="what a choice costs", columns=CHOICES, rows=tuple(map(_choice, record.choosing)), note=CHOICE_NOTE),)
    return Section(
        kind="backtest",
        title=f"Back-test of plans on {record.source}",
        lead=f"{answered}; {_sized_in_short(record)}.",
        facts=(Fact("Provenance", joined(*(f"{name} {rows:,}" for name, rows in methods))),) if methods else (),
        tables=(
            *(_fleets(record, split) for split in PLAN_SPLITS if any(s.split == split for s in record.sizing)),
            *(choices if record.choosing else ()),
        ),
        notes=_llm_notes(record),
    )


def _sized_in_short(record: Backtest) -> str:
    first = next((s for s in record.sizing if s.split == "all"), None)
    if first is None:
        return "the tables give no results to compare them with"
    limit = LIMITS.get(first.limit, first.limit)
    within, kept = (percent(100 * part / first.rows) for part in (first.within, first.kept))
    return f"by {limit} {within} of fleets are within one replica of ten, {kept} keep the limit"


def _fleets(record: Backtest, split: str) -> Table:
    found = [s for s in record.sizing if s.split == split]
    head = "latency" if split == "steepness" else split
    columns = FLEETS if split == "all" else (Column(head, flexible=True), *FLEETS)
    rows = tuple((*(() if split == "all" else (Cell(s.value, "strong"),)), *_fleet_cells(s)) for s in found)
    return Table(
        title=PLAN_SPLITS[split],
        columns=columns,
        rows=rows,
        note=FLEET_NOTE if split == "all" else "",
        detail=split in ("gpu", "model", "engine"),
    )


def _fleet_cells(s: Sizing) -> tuple[Cell, ...]:
    kept: Tone = "" if s.coverage_interval is None or s.coverage_interval[0] <= 0.9 <= s.coverage_interval[1] else "unsure"
    return (
        Cell(LIMITS.get(s.limit, s.limit)),
        Cell(f"{s.rows:,} ({s.groups:,})"),
        Cell(f"{s.size:.2f}x"),
        Cell(_of(s.within, s.rows)),
        Cell(_of(s.kept, s.rows)),
        Cell(f"{100 * s.coverage:.0f} %", kept),
        Cell(f"{s.safe_size:.2f}x"),
        Cell(_of(s.safe, s.rows)),
        Cell(share(s.median_error)),
        Cell(share(s.p90_error)),
    )


def _of(part: int, rows: int) -> str:
    return f"{100 * part / rows:.0f} %"


def _choice(c: Choosing) -> tuple[Cell, ...]:
    def around(value: float, interval: tuple[float, float] | None) -> Cell:
        return Cell(share(value), "", "" if interval is None else f"{digits(100 * interval[0])}–{digits(100 * interval[1])} %")

    return (
        Cell(c.table, "strong", f"{c.decisions:,} decisions, {c.groups} groups"),
        Cell(f"{c.options:,}"),
        around(c.median, c.median_interval),
        around(c.p90, c.p90_interval),
        Cell(share(c.mean)),
        Cell(percent(100 * c.missed)),
    )


# ---------------------------------------------------------------- the gate

DECIDED = (
    Column("arm", flexible=True), Column("by"), Column("change", right=True), Column("sd of pairs", right=True, wide=True),
    Column("regression", right=True), Column("improved", right=True, wide=True), Column("pass", right=True),
    Column("inconclusive", right=True), Column("pairs", right=True),
)  # fmt: skip
DECIDED_NOTE = (
    "shares of jobs whose launch pairs are drawn from the sessions, below them 90 % intervals in % over sessions, or over jobs where those "
    "are wider; of the same program pairs are turned round at random, so that a regression there is a false alarm; 'all' fails where one "
    "of its metrics does; pairs: mean launches of each side; what is 'reported' fails no build"
)


def _gate(record: Backtest) -> Section:
    """Return how often the looks of the gate decide rightly, arm by arm."""
    groups = list(dict.fromkeys((d.source, d.tolerance) for d in record.deciding))
    alarms = [d for d in record.deciding if d.same and _decides(d, record)]
    worst = max((d.regression for d in alarms), default=None)
    told = "no arm is the same program" if worst is None else f"the same program fails in at most {_of_jobs(worst)} of jobs"
    return Section(
        kind="backtest",
        title=f"Back-test of the gate on {record.source}",
        lead=f"{record.rows:,} recorded rounds; {told}.",
        tables=tuple(_decided(source, tolerance, record, first=i == 0) for i, (source, tolerance) in enumerate(groups)),
        notes=(("Recorded", record.notes),) if record.notes else (),
    )


def _decided(source: str, tolerance: float, record: Backtest, first: bool) -> Table:
    rows = tuple(_deciding(d) for d in record.deciding if (d.source, d.tolerance) == (source, tolerance))
    return Table(title=f"{source} at a tolerance of {100 * tolerance:g} %", columns=DECIDED, rows=rows, note=DECIDED_NOTE if first else "")


def _decides(d: Deciding, record: Backtest) -> bool:
    """Say whether this is what a build would see: all metrics that may fail it together, or the one there is."""
    if not d.may_fail:
        return False
    return d.metric is None or not any(o.metric is None and (o.source, o.arm) == (d.source, d.arm) for o in record.deciding)


def _deciding(d: Deciding) -> tuple[Cell, ...]:
    def rate(value: float, interval: tuple[float, float], tone: Tone = "") -> Cell:
        return Cell(_of_jobs(value), tone, f"{_short(interval[0])}–{_short(interval[1])}")

    return (
        Cell(d.arm, "strong", "same" if d.same else ""),
        Cell(d.metric or "all", "", "" if d.may_fail else "reported"),
        Cell(f"{100 * d.change:+.1f} %", "muted"),
        Cell(f"{100 * d.sd:.1f} %", "muted"),
        rate(d.regression, d.regression_interval, "bad" if d.same and d.regression > 0 else ""),
        rate(d.improved, d.improved_interval),
        rate(d.passed, d.passed_interval),
        rate(d.inconclusive, d.inconclusive_interval, "unsure" if d.inconclusive > 0 else ""),
        Cell(f"{d.pairs:.1f}", "", f"{d.pairs_interval[0]:.1f}–{d.pairs_interval[1]:.1f}"),
    )


def _short(end: float) -> str:
    """Return the end of an interval in percent: two digits after the point where they matter."""
    return f"{100 * end:.{2 if end < 0.01 or end > 0.99 else 1}f}".rstrip("0").rstrip(".")


def _of_jobs(share_of: float) -> str:
    return f"{100 * share_of:.2f} %" if share_of < 0.1 or share_of > 0.9 else f"{100 * share_of:.1f} %"
