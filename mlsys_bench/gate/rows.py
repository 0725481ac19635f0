"""From two benches measured in launch pairs to what is tested: one row per metric, with a log ratio (+ is worse) for each pair.

A measurement gives a row by its numbers (see `summary.launches`), one by its CPU time where that is known, and one by its 99 % quantile
where a launch holds enough requests.  The p99 of a launch is one number like any other: resampling launches and rounds of all requests
together gives intervals 1.8 times as wide, see docs/adr/0021-looks-of-the-gate.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mlsys_bench import stats
from mlsys_bench.gate import policy as rules
from mlsys_bench.gate import sequence
from mlsys_bench.gate.sequence import Evidence, Floats
from mlsys_bench.summary import launches
from mlsys_bench.types import Launch, Measurement, Scalar
from mlsys_bench.verdicts import Kind, Policy

Pair = tuple[Launch, Launch]
Numbers = tuple[float, float]

TAIL = 0.99
SOME_FOR_A_TAIL = stats.enough_for_quantile(TAIL, 0.99)  # requests a launch: a p99 of fewer has no interval of its own
ENOUGH_FOR_A_TAIL = 1000  # requests a launch: with fewer a tail is never called a pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One metric of both sides: the numbers of baseline and candidate, pair by pair, and their log ratios."""

    name: str
    parameters: dict[str, Scalar]
    unit: str
    better: Literal["lower", "higher"]
    kind: Kind
    may_fail: bool
    tolerance: float
    pairs: tuple[Pair, ...]
    numbers: tuple[Numbers, ...]
    logs: Floats
    statistic: str  # what the numbers are, in words
    may_pass: bool = True

    @property
    def accepted(self) -> float:
        """Return d1, the log slowdown that may pass."""
        return math.log1p(self.tolerance)

    @property
    def sign(self) -> int:
        """Return what turns a log ratio into a log slowdown."""
        return 1 if self.better == "lower" else -1

    def evidence(self, start: int, stop: int, level: float) -> Evidence:
        """Return what these pairs say, each bound at this one-sided level."""
        seen = sequence.bounds_of_one(self.logs[start:stop], self.accepted / 5, level)
        return seen if self.may_pass else seen._replace(high=np.array(math.inf))


def paired(base: Measurement, cand: Measurement) -> tuple[Pair, ...]:
    """Return the launches that ran beside each other, in the order of their pairs; a launch without its fellow is left out."""
    after = {launch.pair: launch for launch in cand.launches}
    couples = [(launch.pair, launch, after[launch.pair]) for launch in base.launches if launch.pair is not None and launch.pair in after]
    return tuple((a, b) for _, a, b in sorted(couples, key=lambda couple: couple[0]))


def of(base: Measurement, cand: Measurement, policy: Policy) -> Iterator[Row]:
    """Yield the rows of a measurement that both sides hold; none where a launch has no number above zero, so no ratio."""
    pairs = paired(base, cand)
    if not all(len(launches.samples(launch)) for pair in pairs for launch in pair):
        return
    numbers, statistic = _by_launch(pairs, base.better)
    if min((n for pair in numbers for n in pair), default=1.0) <= 0:
        return
    yield _row(base, policy, "", "relative", pairs, numbers, statistic)
    if base.unit == "s" and base.better == "lower" and (cpu := _each(pairs, launches.cpu_s)):
        yield _row(base, policy, ".cpu", "relative", pairs, cpu, "CPU time, median")
    fewest = min((len(launches.samples(launch)) for pair in pairs for launch in pair), default=0)
    if fewest >= SOME_FOR_A_TAIL and (tails := _each(pairs, lambda launch: _tail(launch, base.better))):
        statistic = f"{'p99' if base.better == 'lower' else 'p1'} of {fewest:,} or more"
        yield _row(base, policy, ".p99", "tail", pairs, tails, statistic, may_pass=fewest >= ENOUGH_FOR_A_TAIL)


def _row(
    m: Measurement, policy: Policy, ending: str, kind: Kind, pairs: tuple[Pair, ...], numbers: tuple[Numbers, ...], statistic: str,
    may_pass: bool = True,
) -> Row:  # fmt: skip
    name, sign = m.name + ending, 1 if m.better == "lower" else -1
    logs = np.array([sign * math.log(after / before) for before, after in numbers])
    return Row(
        name=name, parameters=m.parameters, unit="s" if ending == ".cpu" else m.unit, better=m.better, kind=kind, pairs=pairs,
        numbers=numbers, logs=logs, statistic=statistic, tolerance=rules.tolerance_of(policy, name), may_pass=may_pass,
        may_fail=rules.may_fail(policy, name) and (kind != "tail" or policy.tails == "fail"),
    )  # fmt: skip


def _by_launch(pairs: tuple[Pair, ...], better: Literal["lower", "higher"]) -> tuple[tuple[Numbers, ...], str]:
    """Return the numbers of each pair, the same statistic on both its sides, and its name."""
    used = [launches.statistic_for(pair) for pair in pairs]
    numbers = tuple(
        _shares(base, cand)
        if statistic == "share"
        else (launches.number(base, statistic, better), launches.number(cand, statistic, better))
        for statistic, (base, cand) in zip(used, pairs, strict=True)
    )
    return numbers, " or ".join(dict.fromkeys(used))


def _shares(base: Launch, cand: Launch) -> Numbers:
    among = min(len(launches.samples(launch)) for launch in (base, cand))
    return launches.share(base, among), launches.share(cand, among)


def _each(pairs: tuple[Pair, ...], of_launch: Callable[[Launch], float | None]) -> tuple[Numbers, ...] | None:
    """Return what every launch has, or None where one has it not, or none above zero."""
    found: list[Numbers] = []
    for base, cand in pairs:
        before, after = of_launch(base), of_launch(cand)
        if before is None or after is None or min(before, after) <= 0:
            return None
        found.append((before, after))
    return tuple(found) or None


def _tail(launch: Launch, better: Literal["lower", "higher"]) -> float | None:
    values = launches.samples(launch)
    if bool(np.isin(values, (0.0, 1.0)).all()):
        return None  # a share of good requests has no tail
    return stats.quantile(values, TAIL if better == "lower" else 1 - TAIL)
