"""Absolute limits as rows of the test: a budget on a metric of the candidate, launch by launch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mlsys_bench import errors, slo, stats
from mlsys_bench.gate import budgets, sequence, words
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate.budgets import Budget
from mlsys_bench.gate.rows import Pair, paired
from mlsys_bench.gate.sequence import Evidence, Floats
from mlsys_bench.summary import launches
from mlsys_bench.types import Launch, Measurement, Round
from mlsys_bench.verdicts import Finding, Policy, Word

AVAILABILITY = "availability"  # of a server: a 1 for each request that was answered, a 0 for one that failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """One limit on one metric, with the launches that are held against it.  `logs` is None where a share of samples is."""

    budget: Budget
    base: Measurement
    cand: Measurement
    pairs: tuple[Pair, ...]
    logs: Floats | None
    may_fail: bool

    @property
    def accepted(self) -> float:
        """Return what may lie above the limit: nothing."""
        return 0.0

    def evidence(self, start: int, stop: int, level: float) -> Evidence:
        """Return what these launches of the candidate say, + is beyond the limit."""
        if self.logs is not None:
            seen = sequence.bounds_of_one(self.logs[start:stop], 0.0, level)
            return seen._replace(better=np.array(1.0))  # a limit is kept or not, never improved
        return budgets.share(self.budget, self.candidates(start, stop)).evidence(level)

    def candidates(self, start: int, stop: int) -> list[Launch]:
        """Return the candidate's launches of these pairs."""
        return [after for _, after in self.pairs[start:stop]]


def of(both: Sequence[tuple[Measurement, Measurement]], policy: Policy) -> Iterator[Limit | Finding]:
    """Yield each limit of the policy on each metric that it names: to be tested, or decided at once where the metric is a counter.

    Raises UnknownName where nothing of that name was measured on both sides, UnitError where the limit measures something else.
    """
    for text in policy.budgets:
        budget = budgets.parse(text)
        named = [couple for couple in both if couple[0].name == budget.metric]
        if not named:
            raise errors.unknown("metric", budget.metric, {base.name for base, _ in both}, f"budget {text!r}")
        for base, cand in named:
            budgets.fits(budget, cand.unit)
            answered = next((m for _, m in both if m.name == AVAILABILITY), None) if budget.metric in slo.LATENCIES else None
            yield _limit(budget, base, cand, rules.may_fail(policy, budget.name), answered)


def _limit(budget: Budget, base: Measurement, cand: Measurement, may_fail: bool, answered: Measurement | None) -> Limit | Finding:
    pairs = paired(base, cand)
    if answered is not None and budget.quantile is not None:
        pairs = tuple((before, _with_failed(after, answered)) for before, after in pairs)
    if cand.deterministic:
        return _at_once(budget, base, cand, may_fail)
    if any(not len(launches.samples(after)) for _, after in pairs):
        return finding(budget, base, cand, may_fail, "not_comparable", "a launch of the candidate holds no sample", 0)
    by_share = budget.quantile is not None or (cand.unit == "share" and budget.stat is None)
    numbers = [] if by_share else _numbers(budget, cand, [after for _, after in pairs])
    if not by_share and min(numbers, default=1.0) <= 0:
        return finding(budget, base, cand, may_fail, "not_comparable", words.NO_RATIO, 0)
    sign = 1 if budget.sign == "<" else -1
    logs = None if by_share else np.array([sign * math.log(x / budget.limit) for x in numbers])
    return Limit(budget=budget, base=base, cand=cand, pairs=pairs, logs=logs, may_fail=may_fail)


def _with_failed(launch: Launch, answered: Measurement) -> Launch:
    """Return a launch of a server's latencies with an infinite one for each request that failed, round by round: it kept no limit."""
    asked = next((each for each in answered.launches if each.pair == launch.pair), None)
    if asked is None or len(asked.rounds) != len(launch.rounds):
        return launch
    rounds = (_round_with_failed(*each) for each in zip(launch.rounds, asked.rounds, strict=True))
    return dataclasses.replace(launch, rounds=tuple(rounds))


def _round_with_failed(seen: Round, asked: Round) -> Round:
    ok = sum(asked.values)
    lost = round((len(asked.values) - ok) * len(seen.values) / ok) if ok else 0  # gaps between tokens are several a request
    return Round(values=(*seen.values, *(math.inf,) * lost))


def _numbers(budget: Budget, m: Measurement, ran: Sequence[Launch]) -> list[float]:
    """Return the mean of each launch, or the number it goes by."""
    if budget.stat == "mean":
        return [float(launches.samples(launch).mean()) for launch in ran]
    statistic = launches.statistic_for(ran)
    return [launches.number(launch, statistic, m.better) for launch in ran]


def _at_once(budget: Budget, base: Measurement, cand: Measurement, may_fail: bool) -> Finding:
    values = [float(v) for launch in cand.launches for v in launches.samples(launch)]
    if not values:
        return finding(budget, base, cand, may_fail, "inconclusive", "the candidate holds no value", 0)
    worst = max(values) if budget.sign == "<" else min(values)
    kept = worst < budget.limit if budget.sign == "<" else worst > budget.limit
    said: Word = "pass" if kept else "regression"
    return finding(budget, base, cand, may_fail, said, "a counter: the same program gives the same value", len(cand.launches))


def finding(budget: Budget, base: Measurement, cand: Measurement, may_fail: bool, verdict: Word, reason: str, pairs: int) -> Finding:
    """Return a limit as the verdict holds it; the figures of both sides are those of all their samples."""
    figures = [_figure(budget, m) for m in (base, cand)]
    return Finding(
        name=budget.name, parameters=cand.parameters, unit=cand.unit, better="lower" if budget.sign == "<" else "higher",
        baseline=figures[0], candidate=figures[1], ratio=None, interval=None, verdict=verdict, reason=reason, kind="budget",
        may_fail=may_fail, limit=budget.limit, pairs=pairs,
    )  # fmt: skip


def _figure(budget: Budget, m: Measurement) -> float | None:
    values = [v for launch in m.launches for r in launch.rounds for v in r.values]
    if not values:
        return None
    if budget.quantile is not None:
        return stats.quantile(values, budget.quantile)
    return float(np.mean(values)) if budget.stat == "mean" or m.unit == "share" else stats.quantile(values, 0.5)
