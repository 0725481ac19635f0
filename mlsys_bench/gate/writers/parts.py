"""What all writers say of a verdict: order, names, figures and the one sentence on top."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from mlsys_bench import units
from mlsys_bench.gate.words import NEW
from mlsys_bench.types import Scalar
from mlsys_bench.verdicts import Finding, GateRun, Subject, Verdict, Word

Record = Verdict | GateRun
# what a finding is to a build: `reported` is a regression of a metric that may not fail it
Outcome = Literal["regression", "not_comparable", "suspect", "inconclusive", "reported", "improved", "pass"]

WORST_FIRST: tuple[Outcome, ...] = ("regression", "not_comparable", "suspect", "inconclusive", "reported", "improved", "pass")
WORDS: dict[Outcome, str] = {
    "regression": "regression",
    "not_comparable": "not comparable",
    "suspect": "suspect",
    "inconclusive": "inconclusive",
    "reported": "reported-only regression",
    "improved": "improved",
    "pass": "pass",
}


def verdict_of(record: Record) -> Verdict:
    """Return the verdict of a record."""
    return record.verdict if isinstance(record, GateRun) else record


def outcome(finding: Finding) -> Outcome:
    """Return what a finding is to a build."""
    return "reported" if finding.verdict == "regression" and not finding.may_fail else finding.verdict


def is_new(finding: Finding) -> bool:
    """Say whether only the candidate has this metric: that is no fault."""
    return finding.verdict == "not_comparable" and finding.reason.startswith(NEW)


def ordered(findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings with the worst first; among alike ones the largest slowdown, merely new ones after all that failed."""
    return sorted(findings, key=lambda f: (is_new(f), WORST_FIRST.index(outcome(f)), -slowdown(f), label(f)))


def slowdown(finding: Finding) -> float:
    """Return by how much worse the candidate is, as a log ratio; 0 where that is unknown."""
    if finding.ratio is None or finding.ratio <= 0:
        return 0.0
    return math.log(finding.ratio) * (1 if finding.better == "lower" else -1)


def label(finding: Finding) -> str:
    """Return a metric's name with its parameters, alike from run to run: 'engine.step (decode_seqs=8, precision=bf16)'."""
    told = ", ".join(f"{name}={_scalar(value)}" for name, value in finding.parameters.items() if value is not None)
    limit = f" < {value(finding.limit, finding.unit)}" if finding.kind == "budget" and finding.limit is not None else ""
    return f"{finding.name} ({told}){limit}" if told else finding.name + limit


def labels(findings: Sequence[Finding]) -> list[str]:
    """Return a name for each finding that no other has: two of the same name are told apart by kind, then by number."""
    shared = Counter(map(label, findings))
    kinds = [f"{label(f)} [{f.kind}]" if shared[label(f)] > 1 else label(f) for f in findings]
    seen: Counter[str] = Counter()
    names = []
    for name in kinds:
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return names


def value(number: float | None, unit: str) -> str:
    """Print a number in its unit, three digits."""
    if number is None:
        return "—"
    if unit == "s":
        return units.show_s(number)
    if unit == "share":
        return units.show_share(number)
    return units.show_scaled(number, f"B{unit[5:]}" if unit.startswith("bytes") else unit).rstrip()


def change(ratio: float | None) -> str:
    """Print a ratio as a change: 1.052 -> '+5.2 %'; in multiples where percent say little."""
    if ratio is None:
        return "—"
    return f"x {ratio:.3g}" if ratio >= 10 else f"{100 * (ratio - 1):+.1f} %"


def bounds(finding: Finding) -> str:
    """Print the interval of the change: '+4.1 to +7.4 %'; nothing where there is none."""
    if finding.interval is None:
        return ""
    low, high = finding.interval
    return f"{change(low)} to {change(high)}" if high >= 10 else f"{100 * (low - 1):+.1f} to {100 * (high - 1):+.1f} %"


def figures(finding: Finding) -> str:
    """Return both values and the change: '12.3 ms -> 13.0 ms, +5.7 % (+4.1 to +7.4 %)'; nothing where nothing was measured."""
    if finding.baseline is None and finding.candidate is None:
        return ""
    both = f"{value(finding.baseline, finding.unit)} -> {value(finding.candidate, finding.unit)}"
    if finding.ratio is None:
        return both
    sure, better = bounds(finding), ", more is better" if finding.better == "higher" else ""
    return f"{both}, {change(finding.ratio)}{f' ({sure})' if sure else ''}{better}"


def sentence(finding: Finding) -> str:
    """Return figures and reason in one line."""
    return "; ".join(filter(None, (figures(finding), finding.reason))) or WORDS[outcome(finding)]


def headline(verdict: Verdict) -> str:
    """Return the verdict in a sentence: 'Worse than the tolerance of 5 % allows: 2 of 14 metrics; 1 improved.'"""
    counts = Counter(outcome(f) for f in verdict.findings if not is_new(f))
    total, word = sum(counts.values()), verdict.verdict
    if not counts:
        return _EMPTY.get(word, "No metric was compared.")
    if word == "pass":
        kept = counts["pass"] + counts["improved"]
        many = _metrics(total) if kept == total else f"{kept} of {_metrics(total)}"
        return f"{many} within a tolerance of {100 * verdict.tolerance:g} %{_beside(counts, 'reported', 'inconclusive')}."
    tolerance = f" than the tolerance of {100 * verdict.tolerance:g} % allows" if word == "regression" else ""
    others = _beside(counts, *(w for w in WORST_FIRST if w not in (word, "pass")))
    return f"{_MEANS[word]}{tolerance}: {counts[word] or total} of {_metrics(total)}{others}."


def subject(of: Subject) -> str:
    """Return one side as a person wrote it, with its commit where that says more."""
    if of.commit is None:
        return of.label
    short = of.commit[:10] + "-dirty" * of.commit.endswith("-dirty")
    return short if of.commit.startswith(of.label) else f"{of.label} ({short})"


def circumstances(record: Record) -> list[str]:
    """Return how a gate was measured: pairs, time, contention; nothing of a comparison of files."""
    if not isinstance(record, GateRun):
        return []
    pairs = {launch.pair for m in record.cand_bench.measurements for launch in m.launches if launch.pair is not None}
    said = [f"{len(pairs)} launch pair{'s' * (len(pairs) != 1)}", f"{record.wall_s:.0f} s"]
    if record.ended in _ENDED:
        said.append(_ENDED[record.ended])
    if record.contention.verdict == "contended":
        said.append(f"contended ({'; '.join(record.contention.reasons)})" if record.contention.reasons else "contended")
    return said


_ENDED = {"interrupted": "stopped by hand", "budget": "the time was up", "failed": "a side failed: what was measured until then"}
_EMPTY: dict[Word, str] = {"not_comparable": "The two sides cannot be compared."}
_MEANS: dict[Word, str] = {
    "regression": "Worse",
    "not_comparable": "Not comparable",
    "suspect": "Perhaps worse, with too few launches to say",
    "inconclusive": "Undecided",
    "improved": "Better",
    "pass": "Within tolerance",
}


def _beside(counts: Counter[Outcome], *words: Outcome) -> str:
    said = [f"{counts[word]} {WORDS[word]}" for word in words if counts[word]]
    return f"; {', '.join(said)}" if said else ""


def _metrics(n: int) -> str:
    return f"{n} metric{'s' * (n != 1)}"


def _scalar(item: Scalar) -> str:
    return f"{item:g}" if isinstance(item, float) else str(item)
