"""How each metric came out, in words for the person who reads them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mlsys_bench.gate import budgets, few, limits, sequence, words
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate.limits import Limit
from mlsys_bench.gate.rows import Row
from mlsys_bench.gate.sequence import DOUBTED, INCONCLUSIVE, OPEN, PASS, PLAIN_LEVEL, REGRESSION, Track
from mlsys_bench.summary import launches
from mlsys_bench.types import Measurement
from mlsys_bench.verdicts import Finding, Policy, Word

UNDECIDED = "not decided yet"  # how the reason of what more pairs may decide begins
_PLAIN_TO_SEE = math.log(10.0)  # ten times as slow


def of(tested: Row | Limit, track: Track, at: int) -> Finding:
    """Return the finding of one metric from where the test has come to."""
    state, pairs, first = (int(field[0, at]) for field in (track.state, track.pairs, track.first))
    if isinstance(tested, Limit):
        return _held(tested, state, pairs)
    if len(tested.pairs) == 1 and tested.kind == "relative" and tested.statistic in ("median", "best tenth", "share"):
        return _single(tested)
    return _relative(tested, state, pairs, first)


def _relative(row: Row, state: int, decided_at: int, first: int) -> Finding:
    """Return a row's finding: the bounds are those of the look that decided, else of all pairs."""
    n, level = _shown(state, decided_at, first, len(row.pairs))
    seen = row.evidence(0, n, level)
    logs, used = row.logs[:n], row.numbers[:n]
    sd = float(logs.std(ddof=1)) if n > 1 else None
    reason = f"{_history(state, decided_at, first, float(seen.low), float(seen.high), row.accepted)}{_effort(row, n, sd)}"
    unsure = state in (OPEN, DOUBTED, INCONCLUSIVE)
    found = None if sd is None else _detectable(sd, n, row.tolerance)
    needed = None if sd is None else sequence.pairs_needed(sd, row.tolerance)
    if unsure and n >= sequence.LOOKS[0]:
        reason += (f"; finds a slowdown of {100 * found:.1f} % nine times in ten, " if found is not None else "; ") + (
            f"{needed} pairs would find {100 * row.tolerance:g} %" if needed else f"too noisy for {100 * row.tolerance:g} %"
        )
    ends = sorted(row.sign * float(end) for end in (seen.low, seen.high))
    return Finding(
        name=row.name, parameters=row.parameters, unit=row.unit, better=row.better, kind=row.kind, may_fail=row.may_fail,
        baseline=few.figure([b for b, _ in row.pairs[:n]], [b for b, _ in used], row.statistic) if used else None,
        candidate=few.figure([c for _, c in row.pairs[:n]], [c for _, c in used], row.statistic) if used else None,
        ratio=math.exp(row.sign * float(seen.estimate)) if n else None,
        interval=(math.exp(ends[0]), math.exp(ends[1])) if np.isfinite(ends).all() else None,
        verdict=sequence.WORDS.get(state, "inconclusive"), reason=reason, tolerance=row.tolerance, pairs=n, launch_sd=sd,
        detectable=found, pairs_needed=needed,
    )  # fmt: skip


def _detectable(sd: float, pairs: int, tolerance: float) -> float | None:
    """Return the slowdown, as a share, that so many pairs find nine times in ten; None where they find none, or what anybody sees."""
    log = sequence.detectable(sd, pairs, tolerance)
    return math.expm1(log) if log < _PLAIN_TO_SEE else None


def _shown(state: int, decided_at: int, first: int, available: int) -> tuple[int, float]:
    """Return the pairs and the level of the bounds that a person sees."""
    if state in sequence.WORDS:
        return decided_at, sequence.LEVELS[decided_at - first]
    return (decided_at if state == INCONCLUSIVE else available), PLAIN_LEVEL


def _history(state: int, decided_at: int, first: int, low: float, high: float, d1: float) -> str:
    if state == OPEN:
        return f"{UNDECIDED}: "
    if state == DOUBTED:
        return f"{UNDECIDED}: slower in the first {first} pairs, not clearly enough to fail at once, so others must show it again; "
    if state == REGRESSION and first:
        return f"slower in {first} pairs, and again in {decided_at - first} others; "
    if first:
        return f"slower in {first} pairs, not again in {decided_at - first} others; "
    if state == PASS and (low > d1 / 5 or high < -d1 / 5):
        return f"{'slower' if low > d1 / 5 else 'faster'}, within tolerance; "
    return ""


def _effort(row: Row, n: int, sd: float | None) -> str:
    spread = "" if sd is None else f", sd of pairs {100 * sd:.1f} %"
    few_for_tail = "" if row.may_pass else ", too few requests a launch to call a tail a pass"
    return f"{n} launch pair{'s' * (n != 1)} ({row.statistic} of each){spread}{few_for_tail}"


def _single(row: Row) -> Finding:
    """One pair alone: at most suspect, by the spread within its launches."""
    (base, cand), (before, after) = row.pairs[0], row.numbers[0]
    statistic = launches.statistic_for((base, cand))
    ratio, interval, verdict, reason = few.said([base], [cand], row.better, statistic, ([before], [after]), row.tolerance)
    return Finding(
        name=row.name, parameters=row.parameters, unit=row.unit, better=row.better, ratio=ratio, interval=interval,
        baseline=few.figure([base], [before], statistic), candidate=few.figure([cand], [after], statistic),
        verdict=verdict, reason=f"{UNDECIDED}: {reason}", kind=row.kind, may_fail=row.may_fail,
        tolerance=row.tolerance, pairs=1,
    )  # fmt: skip


# ---------------------------------------------------------------- limits and counters


def _held(limit: Limit, state: int, decided_at: int) -> Finding:
    n, level = _shown(state, decided_at, 0, len(limit.pairs))
    reason = f"{UNDECIDED}: " * (state == OPEN) + _against(limit, n, level)
    said: Word = sequence.WORDS.get(state, "inconclusive")
    return limits.finding(limit.budget, limit.base, limit.cand, limit.may_fail, said, reason, n)


def _against(limit: Limit, n: int, level: float) -> str:
    """Say what the launches show of a limit."""
    asked = f"{limit.budget.sign} {limit.budget.text}"
    if limit.logs is not None:
        seen = limit.evidence(0, n, level)
        side = 1 if limit.budget.sign == "<" else -1
        low, high = sorted(math.expm1(side * float(end)) for end in (seen.low, seen.high)) if n > 1 else (-math.inf, math.inf)
        return f"{n} launches: {100 * low:+.1f} % to {100 * high:+.1f} % of the limit ({asked})" if n > 1 else f"{n} launches ({asked})"
    if not n:
        return f"no launch ({asked})"
    found = budgets.share(limit.budget, limit.candidates(0, n))
    low, high = found.bounds(level)
    return (
        f"{100 * found.beyond:.3g} % of {found.samples:,} samples of {n} launches miss {asked}, {100 * found.allowed:.3g} % may; "
        f"as good as {found.effective:,.0f} independent ones: {100 * low:.3g} % to {100 * high:.3g} %"
    )


def counter(base: Measurement, cand: Measurement, policy: Policy) -> Finding:
    """Return the finding of a figure that the same program always repeats: one launch of each side decides."""
    tolerance = rules.counter_tolerance_of(policy, base.name)
    sides = [sorted({float(v) for launch in m.launches for v in launches.samples(launch)}) for m in (base, cand)]
    before, after = (float(np.median(side)) if side else None for side in sides)
    said, reason = _counted(sides, base.better, tolerance)
    return Finding(
        name=base.name, parameters=base.parameters, unit=base.unit, better=base.better, baseline=before, candidate=after,
        ratio=after / before if before and after is not None and before > 0 else None, interval=None, verdict=said, reason=reason,
        kind="counter", may_fail=rules.may_fail(policy, base.name), tolerance=tolerance, pairs=min(len(base.launches), len(cand.launches)),
    )  # fmt: skip


def _counted(sides: Sequence[Sequence[float]], better: str, tolerance: float) -> tuple[Word, str]:
    """Compare ranges of values: they should be points."""
    if not all(sides):
        return "inconclusive", "a counter without a value"
    worse_up = sides if better == "lower" else [[-v for v in reversed(side)] for side in sides]
    (low, high), (least, most) = ((side[0], side[-1]) for side in worse_up)
    room = tolerance * max(abs(low), abs(high))
    if least - high > room:
        return "regression", f"a counter: one launch decides, {100 * tolerance:g} % may pass"
    if low - most > room:
        return "improved", f"a counter: one launch decides, {100 * tolerance:g} % may pass"
    if most - low <= room:
        return "pass", f"a counter: one launch decides, {100 * tolerance:g} % may pass"
    return "inconclusive", f"said to be a counter, yet differs between launches of one side: {_span(sides[0])} and {_span(sides[1])}"


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if values[0] == values[-1] else f"{values[0]:g} to {values[-1]:g}"


# ---------------------------------------------------------------- all together


def reasons(findings: Sequence[Finding], pairs: int) -> tuple[str, ...]:
    """Return the lines above the findings: counts, improvements beside regressions, and what was reported only."""
    if not findings:
        return ("nothing was measured on both sides",)
    counts = Counter(f.verdict for f in findings)
    lines = list(words.counted(findings))
    if counts["regression"]:
        lines.append(
            f"{_many(counts['regression'], 'regression')} beside {_many(counts['improved'], 'improvement')} "
            f"in {_many(len(findings), 'metric')}, {_many(pairs, 'launch pair')}"
        )
    silent = [f.name for f in findings if not f.may_fail and f.verdict in ("regression", "inconclusive") and f.kind == "tail"]
    if silent:
        lines.append(f"tails that did not pass, reported only (--tails fail makes them count): {', '.join(dict.fromkeys(silent))}")
    worse = [f.name for f in findings if not f.may_fail and f.verdict == "regression" and f.kind != "tail"]
    if worse:
        lines.append(f"worse, but only reported: {', '.join(dict.fromkeys(worse))}")
    return tuple(lines)


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def cut_short(finding: Finding) -> Finding:
    """Say of what was still open why it stays so."""
    if not finding.reason.startswith(UNDECIDED):
        return finding
    return replace(finding, reason=finding.reason.replace(UNDECIDED, "not decided when another metric had failed", 1))
