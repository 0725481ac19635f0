"""Two recorded benchmark files -> a Verdict.

Launches that ran in pairs are judged as `gate run` judges them.  Other files with at least six launches on both sides are decided launch
by launch.  With fewer, at most `suspect` is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlsys_bench import samples
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import decide as arithmetic
from mlsys_bench.gate import few, fingerprint, words
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate.judge import judge
from mlsys_bench.record import Envelope
from mlsys_bench.summary import launches
from mlsys_bench.types import Bench, Machine, Measurement
from mlsys_bench.verdicts import Finding, Policy, Verdict, Word


def compare(
    base: tuple[Envelope, Bench], cand: tuple[Envelope, Bench], *, tolerance: float = 0.05, policy: Policy | None = None
) -> Verdict:
    """Return what can be said of the candidate against the baseline.  `tolerance` is the slowdown that may pass where no policy says it.

    Raises BadInput where a policy has absolute limits and the files hold no launch pairs to decide them by.
    """
    policy = policy or Policy(tolerance=tolerance)
    tolerance = policy.tolerance
    if not 0 < tolerance < 1:
        raise BadInput(f"a tolerance of {tolerance:g} cannot be used; give a share between 0 and 1, e.g. 0.05")
    (base_head, base_bench), (cand_head, cand_bench) = base, cand
    if in_pairs(base_bench) and in_pairs(cand_bench):  # beside each other, so at the same clock, whatever it was
        return verdict_of(
            samples.unflagged(base_bench), samples.unflagged(cand_bench), policy, base_head.machine, cand_head.machine
        )  # fmt: skip
    other = _other_machine(base_head.machine, cand_head.machine, tolerance)
    if other is not None:
        return other
    if policy.budgets:
        raise BadInput(
            f"the limit {policy.budgets[0]} needs launch pairs or load tests, which these files do not hold: measure with gate run"
        )
    findings = _findings(*samples.comparable(base_bench, cand_bench), policy)
    reasons = (*words.counted(findings), *fingerprint.remarks(base_head.machine, cand_head.machine))
    return Verdict(verdict=words.overall(findings), findings=findings, tolerance=tolerance, reasons=reasons)


def verdict_of(base: Bench, cand: Bench, policy: Policy, base_machine: Machine, cand_machine: Machine) -> Verdict:
    """Return the verdict on launch pairs and the machines they ran on: what a gate records, and what re-decides its record."""
    other = _other_machine(base_machine, cand_machine, policy.tolerance)
    if other is not None:
        return other
    said = judge(base, cand, policy).verdict
    return Verdict(
        verdict=said.verdict, findings=said.findings, tolerance=said.tolerance,
        reasons=(*said.reasons, *fingerprint.remarks(base_machine, cand_machine)),
    )  # fmt: skip


def exit_status(verdict: Verdict) -> int:
    """Return what the command ends with: 0 pass or improved, 1 regression, 3 inconclusive or suspect, 4 not comparable."""
    return words.EXIT[verdict.verdict]


def in_pairs(bench: Bench) -> bool:
    """Say whether a bench was measured beside another one, launch by launch."""
    ran = [launch for m in bench.measurements for launch in m.launches]
    return bool(ran) and all(launch.pair is not None for launch in ran)


def _other_machine(base: Machine, cand: Machine, tolerance: float) -> Verdict | None:
    different = fingerprint.differences(base, cand)
    if not different:
        return None
    reason = f"{len(different)} hard field(s) of the machines differ or are known on one side only: measure both sides on one machine"
    return Verdict(verdict="not_comparable", findings=(), tolerance=tolerance, reasons=(reason,), fingerprint_differences=different)


def _findings(base: Bench, cand: Bench, policy: Policy) -> tuple[Finding, ...]:
    found = (_finding(before, after, policy) for before, after in words.matched(base, cand))
    return words.together([(words.ruled(finding, policy), chance) for finding, chance in found])


def _finding(base: Measurement | None, cand: Measurement | None, policy: Policy) -> tuple[Finding, float | None]:
    alone = words.unmatched(base, cand)
    if alone is not None:
        return alone, None
    assert base is not None
    assert cand is not None
    if not launches.usable((*base.launches, *cand.launches)):
        return words.only(base, "baseline", "not_comparable", words.NO_RATIO), None
    return _decided(base, cand, rules.tolerance_of(policy, base.name))


def _decided(base: Measurement, cand: Measurement, tolerance: float) -> tuple[Finding, float | None]:
    """Both sides are there and alike: one number per launch, then the decision that so many launches allow, and its chance."""
    statistic = launches.statistic_for((*base.launches, *cand.launches))
    before = [launches.number(launch, statistic, base.better) for launch in base.launches]
    after = [launches.number(launch, statistic, cand.better) for launch in cand.launches]
    found, needed, chance = None, None, None
    if min(len(before), len(after)) < arithmetic.ENOUGH_LAUNCHES:
        ratio, interval, verdict, reason = few.said(base.launches, cand.launches, base.better, statistic, (before, after), tolerance)
    else:
        bounds = _bounds(before, after, base.better, tolerance)
        ratio, interval, verdict, reason = _from_many(bounds, f"{len(before)} against {len(after)}", base.better, statistic, tolerance)
        found, needed = math.expm1(min(bounds.detectable, 50.0)), arithmetic.launches_needed(bounds.sd, tolerance)
        chance = bounds.chance
    finding = Finding(
        name=base.name, parameters=base.parameters, unit=base.unit, better=base.better, ratio=ratio, interval=interval,
        baseline=few.figure(base.launches, before, statistic), candidate=few.figure(cand.launches, after, statistic),
        verdict=verdict, reason=reason, pairs=min(len(before), len(after)), detectable=found, pairs_needed=needed,
    )  # fmt: skip
    return finding, chance


def _bounds(before: Sequence[float], after: Sequence[float], better: str, tolerance: float) -> arithmetic.Bounds:
    sign = 1 if better == "lower" else -1
    logs = [[sign * math.log(v) for v in side] for side in (before, after)]
    return arithmetic.welch(logs[0], logs[1], tolerance)


def _from_many(
    bounds: arithmetic.Bounds, numbers: str, better: str, statistic: str, tolerance: float
) -> tuple[float, tuple[float, float], Word, str]:
    sign = 1 if better == "lower" else -1
    verdict = arithmetic.decide(bounds.low, bounds.high, tolerance)
    ends = sorted(math.exp(sign * end) for end in (bounds.low, bounds.high))
    counts = f"{numbers} launches ({statistic} of each), launch sd {100 * bounds.sd:.1f} %"
    if verdict == "inconclusive":
        needed = arithmetic.launches_needed(bounds.sd, tolerance)
        counts += f"; finds a slowdown of {100 * math.expm1(bounds.detectable):.1f} % nine times in ten, " + (
            f"{needed} launches a side would find {100 * tolerance:g} %" if needed else f"too noisy for {100 * tolerance:g} %"
        )
    if verdict == "pass" and bounds.low > math.log1p(tolerance) / 5:
        counts = f"slower, within tolerance; {counts}"
    return math.exp(sign * bounds.estimate), (ends[0], ends[1]), verdict, counts
