"""Two recorded benchmark files -> a Verdict.

Files with at least six launches on both sides are decided launch by launch.  With fewer, at most `suspect` is said: two processes of
the same program differ by more than the samples inside them, so one launch can neither pass nor fail a build.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from mlsys_bench import stats
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import decide as arithmetic
from mlsys_bench.gate import fingerprint
from mlsys_bench.record import Envelope
from mlsys_bench.types import Bench, Measurement, Scalar
from mlsys_bench.verdicts import Finding, Verdict, Word

Key = tuple[str, tuple[tuple[str, Scalar], ...]]
EXIT: dict[Word, int] = {"pass": 0, "improved": 0, "regression": 1, "inconclusive": 3, "suspect": 3, "not_comparable": 4}
NEW, GONE = "new: ", "gone: "  # how the reason of a metric on one side only begins
WORST_FIRST: tuple[Word, ...] = ("regression", "not_comparable", "suspect", "inconclusive", "improved", "pass")


def compare(base: tuple[Envelope, Bench], cand: tuple[Envelope, Bench], *, tolerance: float = 0.05) -> Verdict:
    """Return what can be said of the candidate against the baseline.  `tolerance` is the slowdown that may pass."""
    if not 0 < tolerance < 1:
        raise BadInput(f"a tolerance of {tolerance:g} cannot be used; give a share between 0 and 1, e.g. 0.05")
    (base_head, base_bench), (cand_head, cand_bench) = base, cand
    different = fingerprint.differences(base_head.machine, cand_head.machine)
    if different:
        reason = f"{len(different)} hard field(s) of the machines differ or are known on one side only: measure both sides on one machine"
        return Verdict(verdict="not_comparable", findings=(), tolerance=tolerance, reasons=(reason,), fingerprint_differences=different)
    findings = _findings(base_bench, cand_bench, tolerance)
    reasons = (*_reasons(findings), *fingerprint.remarks(base_head.machine, cand_head.machine))
    return Verdict(verdict=_overall(findings), findings=findings, tolerance=tolerance, reasons=reasons)


def exit_status(verdict: Verdict) -> int:
    """Return what the command ends with: 0 pass or improved, 1 regression, 3 inconclusive or suspect, 4 not comparable."""
    return EXIT[verdict.verdict]


def _findings(base: Bench, cand: Bench, tolerance: float) -> tuple[Finding, ...]:
    before, after = _by_key(base, "baseline"), _by_key(cand, "candidate")
    return tuple(
        _finding(before.get(key), after.get(key), tolerance)
        for key in dict.fromkeys((*before, *after))
        if any(m is not None and m.skipped is None for m in (before.get(key), after.get(key)))
    )


def _by_key(bench: Bench, side: str) -> dict[Key, Measurement]:
    found: dict[Key, Measurement] = {}
    for m in bench.measurements:
        key = (m.name, tuple(sorted(m.parameters.items())))
        if key in found:
            raise BadInput(f"the {side} holds {m.name} twice with the same parameters {m.parameters}; give each run its own file")
        found[key] = m
    return found


def _finding(base: Measurement | None, cand: Measurement | None, tolerance: float) -> Finding:
    if base is None or base.skipped is not None:
        assert cand is not None
        return _only(cand, "candidate", "not_comparable", NEW + _absence(base, "baseline"))
    if cand is None or cand.skipped is not None:
        return _only(base, "baseline", "inconclusive", GONE + _absence(cand, "candidate"))
    if (base.unit, base.better) != (cand.unit, cand.better):
        reason = f"the baseline is in {base.unit} ({base.better} is better), the candidate in {cand.unit} ({cand.better} is better)"
        return _only(base, "baseline", "not_comparable", reason)
    if any(not _usable(m) for m in (base, cand)):
        return _only(base, "baseline", "not_comparable", "holds no samples, or values at or below zero: a ratio means nothing")
    return _decided(base, cand, tolerance)


def _decided(base: Measurement, cand: Measurement, tolerance: float) -> Finding:
    """Both sides are there and alike: one number per launch, then the decision that so many launches allow."""
    launches = (*base.launches, *cand.launches)
    statistic = arithmetic.statistic_for(launches)
    before = [arithmetic.number(launch, statistic, base.better) for launch in base.launches]
    after = [arithmetic.number(launch, statistic, cand.better) for launch in cand.launches]
    if min(len(before), len(after)) < arithmetic.ENOUGH_LAUNCHES:
        ratio, interval, verdict, reason = _from_few(base, cand, before, after, statistic, tolerance)
    else:
        ratio, interval, verdict, reason = _from_many(before, after, base.better, statistic, tolerance)
    return Finding(
        name=base.name, parameters=base.parameters, unit=base.unit, better=base.better, baseline=_centre(before),
        candidate=_centre(after), ratio=ratio, interval=interval, verdict=verdict, reason=reason,
    )  # fmt: skip


def _from_many(
    before: list[float], after: list[float], better: str, statistic: str, tolerance: float
) -> tuple[float, tuple[float, float], Word, str]:
    sign = 1 if better == "lower" else -1
    logs = [[sign * math.log(v) for v in side] for side in (before, after)]
    bounds = arithmetic.welch(logs[0], logs[1], tolerance)
    verdict = arithmetic.decide(bounds.low, bounds.high, tolerance)
    ends = sorted(math.exp(sign * end) for end in (bounds.low, bounds.high))
    counts = f"{len(before)} against {len(after)} launches ({statistic} of each), launch sd {100 * bounds.sd:.1f} %"
    if verdict == "inconclusive":
        needed = arithmetic.launches_needed(bounds.sd, tolerance)
        counts += f"; finds a slowdown of {100 * math.expm1(bounds.detectable):.1f} % nine times in ten, " + (
            f"{needed} launches a side would find {100 * tolerance:g} %" if needed else f"too noisy for {100 * tolerance:g} %"
        )
    if verdict == "pass" and bounds.low > math.log1p(tolerance) / 5:
        counts = f"slower, within tolerance; {counts}"
    return math.exp(sign * bounds.estimate), (ends[0], ends[1]), verdict, counts


def _from_few(
    base: Measurement, cand: Measurement, before: list[float], after: list[float], statistic: str, tolerance: float
) -> tuple[float, tuple[float, float] | None, Word, str]:
    ratio = _centre(after) / _centre(before)
    interval = _within_launches(base, cand, statistic)
    worse, bound = (ratio, interval and interval[0]) if base.better == "lower" else (1 / ratio, interval and 1 / interval[1])
    suspicious = worse > 1 + tolerance and bound is not None and bound > 1
    few = min(len(before), len(after))
    start = "single launch" if few == 1 else f"{few} launches"
    reason = (
        f"{start}: needs at least {arithmetic.ENOUGH_LAUNCHES} launch pairs; run mlsys gate run; the interval is the spread within launches"
    )
    return ratio, interval, "suspect" if suspicious else "inconclusive", reason


def _within_launches(base: Measurement, cand: Measurement, statistic: str) -> tuple[float, float] | None:
    """Return the bootstrap interval of the ratio over samples.  It knows nothing of how launches differ."""
    pick = arithmetic.undisturbed if statistic == "median" else arithmetic.samples
    pools = [np.concatenate([np.asarray(pick(launch)) for launch in m.launches]) for m in (base, cand)]
    if statistic == "median":
        found = stats.median_ratio_interval(pools[0], pools[1])
        return found and found[1:]
    p = 0.1 if base.better == "lower" else 0.9
    ends = [stats.quantile_interval(pool, p, level=math.sqrt(stats.LEVEL)) for pool in pools]
    if ends[0] is None or ends[1] is None:
        return None
    return ends[1][0] / ends[0][1], ends[1][1] / ends[0][0]


def _centre(numbers: Iterable[float]) -> float:
    """Return the geometric mean: the ratio of two of them is the mean log difference, and swapping sides inverts it."""
    return math.exp(float(np.mean([math.log(v) for v in numbers])))


def _usable(m: Measurement) -> bool:
    values = [arithmetic.samples(launch) for launch in m.launches]
    return bool(values) and all(len(v) > 0 and float(v.min()) > 0 for v in values)


def _only(m: Measurement, side: str, verdict: Word, reason: str) -> Finding:
    """Return the finding of a metric that has no ratio; what the one side measured is kept."""
    pools = [arithmetic.samples(launch) for launch in m.launches if launch.rounds]
    middle = float(np.median(np.concatenate(pools))) if pools and sum(map(len, pools)) else None
    here, there = (middle, None) if side == "baseline" else (None, middle)
    return Finding(
        name=m.name, parameters=m.parameters, unit=m.unit, better=m.better, baseline=here, candidate=there, ratio=None,
        interval=None, verdict=verdict, reason=reason,
    )  # fmt: skip


def _absence(m: Measurement | None, side: str) -> str:
    return f"not in the {side}" if m is None else f"the {side} skipped it ({m.skipped})"


def _overall(findings: Iterable[Finding]) -> Word:
    """Return the worst verdict; a metric that is merely new does not count, no common metric at all is not comparable."""
    said = {f.verdict for f in findings if not _is_new(f)}
    return next((word for word in WORST_FIRST if word in said), "not_comparable")


def _is_new(finding: Finding) -> bool:
    return finding.reason.startswith(NEW)


def _reasons(findings: tuple[Finding, ...]) -> tuple[str, ...]:
    if not findings:
        return ("the two files have no measurement in common",)
    counts = Counter(f.verdict for f in findings if not _is_new(f))
    lines = [", ".join(f"{counts[word]} {word.replace('_', ' ')}" for word in WORST_FIRST if counts[word])] if counts else []
    for start, text in ((NEW, "only in the candidate"), (GONE, "missing from the candidate")):
        names = [f.name for f in findings if f.reason.startswith(start)]
        if names:
            lines.append(f"{text}: {', '.join(dict.fromkeys(names))}")
    if not any(f.ratio is not None for f in findings):
        lines.append("the two files have no comparable measurement in common")
    return tuple(lines)
