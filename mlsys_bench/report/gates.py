"""The gate in words: verdicts worst first, what stands behind them, what it cost, and what to do next."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mlsys_bench import units
from mlsys_bench.report.benches import short
from mlsys_bench.report.parts import (
    NONE,
    Cell,
    Column,
    Fact,
    Section,
    Table,
    Tone,
    digits,
    joined,
    quantity,
    ratio,
)
from mlsys_bench.types import Scalar
from mlsys_bench.units import count
from mlsys_bench.verdicts import WORST_FIRST, Conditions, Finding, GateRun, Policy, Subject, Verdict

TONE: dict[str, Tone] = {
    "regression": "bad", "improved": "good", "pass": "good", "inconclusive": "unsure", "suspect": "unsure", "not_comparable": "unsure",
}  # fmt: skip
MEANING: dict[str, str] = {
    "regression": "The candidate is worse: a regression.",
    "improved": "The candidate is better.",
    "pass": "The candidate is no worse than the tolerance allows.",
    "inconclusive": "Nothing can be said either way.",
    "suspect": "The candidate looks worse; single launches cannot prove it.",
    "not_comparable": "The two sides must not be compared.",
}
ENDED = {
    "decided": "decided",
    "last_look": "the last look was reached",
    "budget": "the budget ran out",
    "interrupted": "stopped by hand",
    "failed": "a side died",
}
FIRST_LOOK, LAST_LOOK = 6, 20  # launch pairs, see `gate.sequence`
LONGEST = 34  # characters of a label in a title
CONTENDED: dict[str, Tone] = {"quiet": "good", "contended": "unsure", "unknown": "muted"}
_COLUMNS = (
    Column("metric", flexible=True), Column("verdict"), Column("change", right=True), Column("baseline", right=True),
    Column("candidate", right=True), Column("launches", right=True, wide=True), Column("sd of pairs", right=True, wide=True),
)  # fmt: skip


def verdict(record: Verdict) -> Section:
    """Return the gate's verdict on recorded files, its reasons, and every metric with its change."""
    facts = (_said(record), *_counted(record.findings), *_next(record, None))
    return _section("verdict", f"Gate: {word(record.verdict)}", record, facts, (), _notes(record))


def run(record: GateRun) -> Section:
    """Return the verdict of a gate that measured, what each side was, how it was measured, and what it cost."""
    found = record.verdict
    facts = (
        _said(found),
        *_counted(found.findings),
        Fact("Baseline", record.base.label, origin(record.base)),
        Fact("Candidate", record.cand.label, origin(record.cand)),
        effort(record),
        contention(record),
        *_next(found, record),
    )
    title = ", ".join(filter(None, (f"Gate: {word(found.verdict)}", sides(record))))
    notes = (*_notes(found), *_rules(record.policy), ("Contention", record.contention.reasons[1:]), ("Seen on the way", record.remarks))
    return _section("gate", title, found, facts, _tiles(record), notes, _surroundings(record.conditions))


# ---------------------------------------------------------------- shared with the pictures


def word(verdict: str) -> str:
    """Print a verdict as people say it."""
    return verdict.replace("_", " ")


def sides(record: GateRun) -> str:
    """Return what stands against what, where that fits a title."""
    text = f"{brief(record.cand.label)} against {brief(record.base.label)}"
    return text if len(text) <= 2 * LONGEST else ""


def brief(label: str) -> str:
    """Return a label that fits a line: a commit by its beginning, a long command by its end."""
    if len(label) == 40 and all(c in "0123456789abcdef" for c in label):
        return label[:10]
    return label if len(label) <= LONGEST else "…" + label[1 - LONGEST :]


def share(value: float) -> str:
    """Print a share as people write tolerances: 0.05 -> '5 %', 0.0312 -> '3.1 %'."""
    return f"{100 * value:.2g} %" if value < 1 else f"{100 * value:,.0f} %"


def badness(finding: Finding) -> float:
    """Return the log ratio, + for worse; minus infinity where there is none."""
    if finding.ratio is None or finding.ratio <= 0:
        return -math.inf
    return math.log(finding.ratio) * (1 if finding.better == "lower" else -1)


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Return the findings worst first; what may not fail the build after what may."""
    return tuple(sorted(findings, key=lambda f: (WORST_FIRST.index(f.verdict), not f.may_fail, -badness(f))))


def labels(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Return what each metric is called: its name, and the parameters in which it differs from others of that name."""
    return tuple(joined(f.name, _apart(f, findings)) for f in findings)


def _apart(f: Finding, findings: Sequence[Finding]) -> str:
    same = [other.parameters for other in findings if other.name == f.name]
    return short({k: v for k, v in f.parameters.items() if any(p.get(k) != v for p in same)}, {}) if len(same) > 1 else ""


# ---------------------------------------------------------------- the verdict


def _section(
    kind: str, title: str, record: Verdict, facts: tuple[Fact, ...], tiles: tuple[Fact, ...], notes: Iterable[tuple[str, tuple[str, ...]]],
    tables: tuple[Table, ...] = (),
) -> Section:  # fmt: skip
    return Section(
        kind=kind,
        title=title,
        lead=MEANING[record.verdict] + _worst(record),
        tag="measured",
        tone=TONE[record.verdict],
        tiles=tiles,
        facts=facts,
        tables=(*((_findings(record),) if record.findings else ()), *tables),
        notes=tuple((head, lines) for head, lines in notes if lines),
    )


def _worst(record: Verdict) -> str:
    """Name the metric that decided."""
    decided = [f for f in ordered(record.findings) if f.verdict == record.verdict and f.ratio is not None and f.may_fail]
    if not decided or record.verdict not in ("regression", "suspect", "improved"):
        return ""
    worst = decided[-1] if record.verdict == "improved" else decided[0]
    return f" {labels(decided)[decided.index(worst)]}: {ratio(worst.ratio)}{f' ({ends(worst)})' if worst.interval else ''}."


def ends(f: Finding) -> str:
    """Print the interval of a change: '+4.9 to +7.4 %'; a wide one without decimals."""
    if f.interval is None:
        return ""
    low, high = (100 * (end - 1) for end in f.interval)
    places = 1 if max(-low, high) < 100 else 0
    return f"{low:+.{places}f} to {high:+,.{places}f} %"


def _said(record: Verdict) -> Fact:
    return Fact("Verdict", word(record.verdict), f"tolerance {share(record.tolerance)}", "", TONE[record.verdict])


def _counted(findings: Sequence[Finding]) -> tuple[Fact, ...]:
    """Print improvements beside regressions: findings on one side only are the mark of a broken gate."""
    if not findings:
        return ()
    counts = Counter(f.verdict for f in findings)
    said = f"{counts['regression']} worse, {counts['improved']} better, {counts['pass']} within tolerance"
    rest = joined(*(f"{counts[w]} {word(w)}" for w in ("inconclusive", "suspect", "not_comparable") if counts[w]))
    only = sum(not f.may_fail for f in findings)
    return (Fact("Metrics", said, joined(rest, f"{only} only reported" if only else ""), "measured"),)


def _findings(record: Verdict) -> Table:
    rows = ordered(record.findings)
    note = "change: candidate over baseline, below it its interval, 98 % or more; below each verdict the tolerance"
    return Table(title="", columns=_COLUMNS, rows=tuple(_finding(f, record) for f in rows), note=note)


def _finding(f: Finding, record: Verdict) -> tuple[Cell, ...]:
    tone = TONE[f.verdict] if f.may_fail or f.verdict in ("pass", "improved") else "unsure"
    before, after = _both(f)
    return (
        Cell(f.name, "strong", _apart(f, record.findings)),
        Cell(word(f.verdict), tone, _measure(f, record)),
        Cell("same" if f.ratio == 1 else ratio(f.ratio), "", ends(f)),
        Cell(before),
        Cell(after),
        Cell(NONE if f.pairs is None else str(f.pairs)),
        Cell(NONE if f.launch_sd is None else f"{100 * f.launch_sd:.1f} %"),
    )


def _both(f: Finding) -> tuple[str, str]:
    """Return the numbers of both sides, their unit once where it is the same and long."""
    before, after = quantity(f.baseline, f.unit)[0], quantity(f.candidate, f.unit)[0]
    number, _, unit = before.partition(" ")
    return number if len(unit) > 3 and after.endswith(f" {unit}") else before, after


def _measure(f: Finding, record: Verdict) -> str:
    """Return what the verdict was held against."""
    if not f.may_fail:
        return "reported only"
    return f"limit {quantity(f.limit, f.unit)[0]}" if f.limit is not None else f"of {share(f.tolerance or record.tolerance)}"


def _notes(record: Verdict) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return (
        ("Reasons", record.reasons),
        ("Fingerprint differences", record.fingerprint_differences),
        ("Why, metric by metric", _why(ordered(record.findings))),
        ("Measured with", tuple(dict.fromkeys(f"{f.name}: {said}" for f in record.findings if (said := short(f.parameters, {}))))),
    )


def _why(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Return each reason once, with the metrics it is of."""
    names: dict[str, list[str]] = {}
    for f, label in zip(findings, labels(findings), strict=True):
        names.setdefault(f.reason, []).append(label)
    return tuple(f"{'; '.join(of)}: {reason}" for reason, of in names.items())


# ---------------------------------------------------------------- how it was measured


def origin(subject: Subject) -> str:
    """Say what a side was, as far as its label does not."""
    commit = f"commit {subject.commit[:12]}" if subject.commit and not subject.commit.startswith(subject.label) else ""
    changed = "with changes that are not committed" if (subject.commit or "").endswith("-dirty") else ""
    return joined(subject.kind if subject.kind != "ref" else "", commit, changed, subject.environment)


def launch_pairs(record: GateRun) -> int:
    """Return how many pairs of launches were measured."""
    held = {launch.pair for m in record.base_bench.measurements for launch in m.launches if launch.pair is not None}
    return len(held) or max((len(m.launches) for m in record.base_bench.measurements), default=0)


def effort(record: GateRun) -> Fact:
    """Say what the run cost, and why it ended."""
    n = launch_pairs(record)
    each = f"{units.show_s(record.wall_s / n)} a pair; " if n else ""
    return Fact("Measured", f"{count(n, 'launch pair')} in {units.show_s(record.wall_s)}", each + ENDED[record.ended], "measured")


def contention(record: GateRun) -> Fact:
    """Say whether others disturbed the run."""
    said = record.contention
    text = {"quiet": "the machine was quiet", "contended": "others disturbed the run", "unknown": "unknown"}
    return Fact("Contention", text[said.verdict], said.reasons[0] if said.reasons else "", "", CONTENDED[said.verdict])


def _tiles(record: GateRun) -> tuple[Fact, ...]:
    found = record.verdict
    counts = Counter(f.verdict for f in found.findings)
    worst = next((f for f in ordered(found.findings) if f.ratio is not None), None)
    tiles = [Fact("Verdict", word(found.verdict), f"tolerance {share(found.tolerance)}", "measured", TONE[found.verdict])]
    if worst is not None:
        tiles.append(Fact(f"Worst: {worst.name}", ratio(worst.ratio), ends(worst), "measured"))
    tiles.append(Fact("Worse / better", f"{counts['regression']} / {counts['improved']}", f"of {count(len(found.findings), 'metric')}"))
    n = launch_pairs(record)
    tiles.append(Fact("Launch pairs", f"{n}", f"in {units.show_s(record.wall_s)}; {word(record.contention.verdict)}", "measured"))
    return tuple(tiles)


def _rules(policy: Policy) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Return the rules that were not the default."""
    lines = [f"{name}: {share(value)}" for name, value in (policy.tolerances or {}).items()]
    lines += [f"{name}: only reported" for name in policy.reported] + [f"limit {text}" for text in policy.budgets]
    lines += ["tails may fail the build"] * (policy.tails == "fail")
    lines += [f"counters: {share(policy.counter_tolerance)}"] * (policy.counter_tolerance != Policy().counter_tolerance)
    return (("Rules", tuple(lines)),) if lines else ()


def _next(record: Verdict, measured: GateRun | None) -> tuple[Fact, ...]:
    """Return the one thing to do now; nothing where all is well."""
    text = {
        "regression": _cause,
        "suspect": _prove,
        "inconclusive": _more,
        "not_comparable": _alike,
    }.get(record.verdict)
    return (Fact("Next", text(record, measured)),) if text else ()


def _alike(record: Verdict, measured: GateRun | None) -> str:
    return (
        "measure both sides on one machine, in one run: mlsys gate run" if record.fingerprint_differences else "see why, metric by metric"
    )


def _cause(record: Verdict, measured: GateRun | None) -> str:
    found = [f for f in ordered(record.findings) if f.verdict == "regression" and f.may_fail]
    if not found:
        return "see why, metric by metric"
    return f"start with {labels(found)[0]}" + (f", the worst of {len(found)}" if len(found) > 1 else "")


def _prove(record: Verdict, measured: GateRun | None) -> str:
    if measured is None:
        return "prove it: mlsys gate run measures both sides launch by launch"
    if measured.base.kind == "url":
        return "prove it: --base-restart and --cand-restart, or --base-serve and --cand-serve, make launches of live servers"
    return "prove it: a longer --budget gives more launch pairs"


def _more(record: Verdict, measured: GateRun | None) -> str:
    """Say how many launch pairs would decide, and how long they take; or that no number will."""
    undecided = [f for f in ordered(record.findings) if f.verdict == "inconclusive" and f.may_fail and f.pairs is not None]
    if not undecided:
        return "see why, metric by metric"
    fewest = min(f.pairs or 0 for f in undecided)
    if measured is None and fewest < FIRST_LOOK:
        return f"have {FIRST_LOOK} launches of each side: a folder of {FIRST_LOOK} files, or mlsys gate run, which measures in pairs"
    if measured is not None and fewest < FIRST_LOOK:
        if measured.base.kind == "url" and measured.ended == "last_look":
            return "--base-restart and --cand-restart make launches of live servers: one launch each proves nothing"
        start = "run it again" if measured.ended == "interrupted" else "give it a longer --budget"
        return f"{start}: {_pairs(FIRST_LOOK - fewest, measured)} to the first look"
    hopeless = [f for f in undecided if f.pairs_needed is None]
    if hopeless:
        finds = max((f.detectable for f in hopeless if f.detectable is not None), default=None)
        seen = f"; these pairs find {share(finds)}" if finds is not None else ""
        return f"{hopeless[0].name} is too noisy here{seen}: mlsys gate calibrate says what this machine can decide"
    worst = max(undecided, key=lambda f: (f.pairs_needed or 0) - (f.pairs or 0))
    more, tolerance = (worst.pairs_needed or 0) - (worst.pairs or 0), share(worst.tolerance or record.tolerance)
    if measured is not None and more > 0 and ((worst.pairs or 0) >= LAST_LOOK or (worst.pairs_needed or 0) > 2 * LAST_LOOK):
        so_far = f"these pairs find {share(worst.detectable)}, " if worst.detectable is not None else ""
        needed = f"{so_far}{worst.pairs_needed} would find {tolerance}, a run takes {LAST_LOOK}"
        return f"{worst.name} is too noisy here: {needed}; mlsys gate calibrate says what this machine can decide"
    if more <= 0:
        return f"run it again with a longer --budget: these launches should decide {tolerance} nine times in ten"
    return f"run {_pairs(more, measured)} to decide {tolerance}"


def _pairs(more: int, measured: GateRun | None) -> str:
    if measured is None:
        return f"{more:,} more launch{'es' * (more != 1)} of each side"
    n = launch_pairs(measured)
    took = f" (about {units.show_s(rounded(more * measured.wall_s / n))})" if n else ""
    return f"{more:,} more launch pair{'s' * (more != 1)}{took}"


def rounded(value_s: float) -> float:
    """Round up to two digits: nobody plans by the third."""
    step = 10.0 ** (math.floor(math.log10(value_s)) - 1) if value_s > 0 else 1.0
    return math.ceil(value_s / step) * step


# ---------------------------------------------------------------- what surrounded the launches

_Reading = Callable[[Conditions], float | None]


def _surroundings(conditions: Sequence[Conditions]) -> tuple[Table, ...]:
    """Return, side by side, what surrounded the launches of each: the same, or the comparison limps."""
    readings: tuple[tuple[str, _Reading, Callable[[float], str]], ...] = (
        ("time of a launch", lambda c: c.wall_s, units.show_s),
        ("CPU time", lambda c: c.cpu_s, units.show_s),
        ("involuntary switches", lambda c: c.involuntary, lambda v: f"{v:,.0f}"),
        ("steal", lambda c: c.steal_share, units.show_share),
        ("CPU taken by others", lambda c: c.other_cpu_share, units.show_share),
        ("load, a minute", lambda c: c.load, digits),
        ("GPU SM clock, MHz", _gpu("sm_clock_mhz"), lambda v: f"{v:,.0f}"),
        ("GPU power, W", _gpu("power_w"), lambda v: f"{v:,.0f}"),
        ("GPU temperature, °C", _gpu("temperature_c"), lambda v: f"{v:,.0f}"),
    )
    rows = tuple(row for name, of, shown in readings for row in _reading(conditions, name, of, shown))
    columns = (Column("", flexible=True), Column("baseline", right=True), Column("candidate", right=True))
    note = "median over launches, lowest and highest below"
    return (Table(title="What surrounded the launches", columns=columns, rows=rows, note=note, detail=True),) if rows else ()


def _gpu(key: str) -> _Reading:
    def of(c: Conditions) -> float | None:
        value: Scalar = (c.gpu or {}).get(key)
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None

    return of


def _reading(conditions: Sequence[Conditions], name: str, of: _Reading, shown: Callable[[float], str]) -> tuple[tuple[Cell, ...], ...]:
    sides = [[v for c in conditions if c.side == side and (v := of(c)) is not None] for side in ("base", "cand")]
    if not any(sides):
        return ()
    cells = (Cell(shown(float(np.median(v))), "", _range(shown(min(v)), shown(max(v)))) if v else Cell(NONE, "muted") for v in sides)
    return ((Cell(name, "strong"), *cells),)


def _range(low: str, high: str) -> str:
    return f"{low} to {high}" if low != high else ""
