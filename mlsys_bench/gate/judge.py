"""Two benches measured in launch pairs -> what may be said now, and whether more pairs would change it.

Everything that decides is in the benches and the policy: the same record gives the same verdict to the last bit.  The test itself is in
`gate.sequence`, what is tested in `gate.rows`, absolute limits in `gate.budgets`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mlsys_bench.gate import findings, limits, rows, sequence, words
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate.limits import Limit
from mlsys_bench.gate.rows import Row
from mlsys_bench.gate.sequence import Evidence, Ints, Track
from mlsys_bench.types import Bench, Measurement
from mlsys_bench.verdicts import Finding, Policy, Verdict

Tested = Row | Limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """Where a gate has come to after so many pairs.  `next_look` is None where more pairs would change nothing."""

    verdict: Verdict
    decided: bool  # all that may fail the build is settled, or one of it has failed for good
    pairs: int
    next_look: int | None


def judge(base: Bench, cand: Bench, policy: Policy) -> Standing:
    """Return what the launch pairs of two benches allow to say.  What is not decided is inconclusive."""
    settled, tested = _sorted_out(base, cand, policy)
    available = max((len(t.pairs) for t in tested), default=0)
    track = _followed(tested, available)
    said = (*settled, *(findings.of(t, track, i) for i, t in enumerate(tested)))
    failed = any(f.verdict == "regression" and f.may_fail for f in said)
    known = bool(said) and not any(f.verdict in ("inconclusive", "suspect") and f.may_fail for f in said)
    if failed:
        said = tuple(findings.cut_short(f) for f in said)
    verdict = Verdict(verdict=words.overall(said), findings=said, tolerance=policy.tolerance, reasons=findings.reasons(said, available))
    return Standing(
        verdict=verdict, decided=failed or known, pairs=available, next_look=None if failed else sequence.next_look(track, available)
    )


def _sorted_out(base: Bench, cand: Bench, policy: Policy) -> tuple[list[Finding], list[Tested]]:
    """Return what can be said at once, and what the launch pairs must show."""
    settled: list[Finding] = []
    tested: list[Tested] = []
    both: list[tuple[Measurement, Measurement]] = []
    for before, after in words.matched(base, cand):
        alone = words.unmatched(before, after)
        if alone is not None:
            settled.append(replace(alone, may_fail=rules.may_fail(policy, alone.name)))
            continue
        assert before is not None
        assert after is not None
        both.append((before, after))
        if before.deterministic and after.deterministic:
            settled.append(findings.counter(before, after, policy))
        elif found := tuple(rows.of(before, after, policy)):
            tested.extend(found)
        else:
            alone = words.only(before, "baseline", "not_comparable", words.NO_RATIO)
            settled.append(replace(alone, may_fail=rules.may_fail(policy, alone.name)))
    for held in limits.of(both, policy):
        if isinstance(held, Finding):
            settled.append(held)
        else:
            tested.append(held)
    return settled, tested


# ---------------------------------------------------------------- the test


def _followed(tested: Sequence[Tested], available: int) -> Track:
    """Return where each metric has come to.  Where nothing may fail the build, all are waited for."""
    counts = np.array([[t.may_fail for t in tested]], dtype=bool)

    def look(start: int, stop: int, level: float, jobs: Ints) -> Evidence:
        return _evidence(tested, start, stop, level)

    return sequence.follow(look, available, np.array([[t.accepted for t in tested]]), counts if counts.any() else ~counts)


def _evidence(tested: Sequence[Tested], start: int, stop: int, level: float) -> Evidence:
    """Return what these pairs say of each metric, as arrays [1, metrics]; what has fewer pairs says nothing."""
    each = [t.evidence(start, stop, level) if len(t.pairs) >= stop else _SILENCE for t in tested]
    return Evidence(*(np.array([[float(value) for value in field]]) for field in zip(*each, strict=True)))


_SILENCE = Evidence(*(np.array(v) for v in (math.nan, -math.inf, math.inf, 1.0, 1.0)))
