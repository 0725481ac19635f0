"""What every comparison of the gate says alike: exit statuses, metrics on one side only, the verdict over all, and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.gate import decide
from mlsys_bench.gate import policy as rules
from mlsys_bench.summary import launches
from mlsys_bench.types import Bench, Measurement, Scalar
from mlsys_bench.verdicts import WORST_FIRST, Finding, Policy, Word

Key = tuple[str, tuple[tuple[str, Scalar], ...]]
EXIT: dict[Word, int] = {"pass": 0, "improved": 0, "regression": 1, "inconclusive": 3, "suspect": 3, "not_comparable": 4}
NEW, GONE = "new: ", "gone: "  # how the reason of a metric on one side only begins
NO_RATIO = "holds no samples, or values at or below zero: a ratio means nothing"


def by_key(bench: Bench, side: str) -> dict[Key, Measurement]:
    """Return the measurements by name and parameters.  Raises BadInput where one comes twice."""
    found: dict[Key, Measurement] = {}
    for m in bench.measurements:
        key = (m.name, tuple(sorted(m.parameters.items())))
        if key in found:
            raise BadInput(f"the {side} holds {m.name} twice with the same parameters {m.parameters}; give each run its own file")
        found[key] = m
    return found


def matched(base: Bench, cand: Bench) -> list[tuple[Measurement | None, Measurement | None]]:
    """Return the measurements of both sides that belong together, those that both skipped left out."""
    before, after = by_key(base, "baseline"), by_key(cand, "candidate")
    couples = [(before.get(key), after.get(key)) for key in dict.fromkeys((*before, *after))]
    return [couple for couple in couples if any(m is not None and not _is_empty(m) for m in couple)]


def _is_empty(m: Measurement) -> bool:
    """Say whether nothing was measured."""
    return m.skipped is not None or not m.launches


def unmatched(base: Measurement | None, cand: Measurement | None) -> Finding | None:
    """Return the finding of a metric that has no ratio, or None where both sides can be held against each other."""
    if base is None or _is_empty(base):
        assert cand is not None
        return only(cand, "candidate", "not_comparable", NEW + absence(base, "baseline"))
    if cand is None or _is_empty(cand):
        return only(base, "baseline", "inconclusive", GONE + absence(cand, "candidate"))
    if (base.unit, base.better) != (cand.unit, cand.better):
        reason = f"the baseline is in {base.unit} ({base.better} is better), the candidate in {cand.unit} ({cand.better} is better)"
        return only(base, "baseline", "not_comparable", reason)
    return None


def ruled(finding: Finding, policy: Policy) -> Finding:
    """Return a finding with what the policy says of its metric: whether it may fail, and its tolerance where that is one of its own."""
    own = rules.tolerance_of(policy, finding.name)
    differs = finding.kind == "relative" and own != policy.tolerance
    return replace(finding, may_fail=rules.may_fail(policy, finding.name), tolerance=own if differs else None)


def together(found: Sequence[tuple[Finding, float | None]]) -> tuple[Finding, ...]:
    """Return findings with their chances (`decide.Bounds.chance`; None: decided otherwise), as many metrics of one comparison allow.

    Of fifty metrics of one program one is often slower beyond its own chance: what is not beyond that of all that may fail is suspect.
    """
    tested = [(i, chance) for i, (f, chance) in enumerate(found) if chance is not None and f.may_fail]
    stands = dict(zip((i for i, _ in tested), decide.beyond_chance([chance for _, chance in tested]), strict=True))
    of_many = f"beyond its own chance, not beyond that of {len(tested)} metrics together; "
    return tuple(
        replace(f, verdict="suspect", reason=of_many + f.reason) if f.verdict == "regression" and not stands.get(i, True) else f
        for i, (f, _) in enumerate(found)
    )


def only(m: Measurement, side: str, verdict: Word, reason: str) -> Finding:
    """Return the finding of a metric that has no ratio; what the one side measured is kept."""
    pools = [launches.samples(launch) for launch in m.launches if launch.rounds]
    middle = float(np.median(np.concatenate(pools))) if pools and sum(map(len, pools)) else None
    here, there = (middle, None) if side == "baseline" else (None, middle)
    return Finding(
        name=m.name, parameters=m.parameters, unit=m.unit, better=m.better, baseline=here, candidate=there, ratio=None,
        interval=None, verdict=verdict, reason=reason,
    )  # fmt: skip


def absence(m: Measurement | None, side: str) -> str:
    """Say why a metric is not on a side."""
    if m is not None and m.skipped is None:
        return f"the {side} holds no launch of it"
    return f"not in the {side}" if m is None else f"the {side} skipped it ({m.skipped})"


def overall(findings: Iterable[Finding]) -> Word:
    """Return the worst verdict of what may fail; a metric that is merely new does not count, no common metric at all is not comparable."""
    known = [f for f in findings if not is_new(f)]
    said = {f.verdict for f in known if f.may_fail}
    return next((word for word in WORST_FIRST if word in said), "pass" if known else "not_comparable")


def is_new(finding: Finding) -> bool:
    """Say whether a metric is in the candidate only."""
    return finding.reason.startswith(NEW)


def _plural(word: Word, count: int) -> str:
    return "regressions" if word == "regression" and count != 1 else word.replace("_", " ")


def counted(findings: Sequence[Finding]) -> tuple[str, ...]:
    """Return the lines that count verdicts, and name what is on one side only."""
    if not findings:
        return ("the two files have no measurement in common",)
    counts = Counter(f.verdict for f in findings if not is_new(f))
    lines = [", ".join(f"{counts[word]} {_plural(word, counts[word])}" for word in WORST_FIRST if counts[word])] if counts else []
    for start, text in ((NEW, "only in the candidate"), (GONE, "missing from the candidate")):
        names = [f.name for f in findings if f.reason.startswith(start)]
        if names:
            lines.append(f"{text}: {', '.join(dict.fromkeys(names))}")
    if not any(f.ratio is not None for f in findings):
        lines.append("the two files have no comparable measurement in common")
    return tuple(lines)
