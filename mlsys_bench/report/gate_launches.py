"""Of a gate that measured: the number of every launch, pair by pair, and how the two sides differ at each quantile of their samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from mlsys_bench import stats
from mlsys_bench.summary import launches
from mlsys_bench.types import Bench, Launch, Measurement
from mlsys_bench.verdicts import Finding, GateRun

Floats = npt.NDArray[np.float64]
LEAST = 10  # samples a launch from which quantiles are worth drawing
BEYOND = 2  # samples of a launch that must lie beyond a quantile on either side
Pair = tuple[Launch, Launch]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One metric, pair by pair in order of time: the launches of both sides and their numbers."""

    finding: Finding
    pairs: tuple[int, ...]
    before: Floats
    after: Floats
    launches: tuple[Pair, ...]

    @property
    def changes(self) -> Floats:
        """The candidate over the baseline, less one, of each pair."""
        return self.after / self.before - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """Candidate over baseline at each share of the samples, with its interval over pairs where there are enough of them."""

    shares: Floats
    ratios: Floats
    low: Floats | None
    high: Floats | None


def series(record: GateRun, finding: Finding) -> Series | None:
    """Return a metric pair by pair; None where it was not measured on both sides, or is a counter."""
    sides = [_measured(bench, finding) for bench in (record.base_bench, record.cand_bench)]
    base, cand = sides
    if base is None or cand is None or finding.kind in ("counter", "budget") or base.deterministic:
        return None
    pairs = _paired(base.launches, cand.launches)
    numbers = [_numbers(pair, finding, base.name != finding.name) for _, pair in pairs]
    known = [n for n in numbers if n is not None]
    if not known or len(known) < len(pairs):
        return None
    before, after = np.array(known).T
    return Series(finding=finding, pairs=tuple(n for n, _ in pairs), before=before, after=after, launches=tuple(p for _, p in pairs))


def quantiles(found: Series) -> Quantiles | None:
    """Return how the sides differ at each quantile: a shift moves all alike, a slow tail only the last.  None where samples are few.

    Of each launch pair the ratio of the launches' quantiles; then the geometric mean over pairs, and Student's 90 % interval.
    """
    if any(found.finding.name.endswith(ending) for ending in _OF_LAUNCH):
        return None  # its samples are drawn already, with the metric it is derived from
    pools = [[launches.samples(launch) for launch in pair] for pair in found.launches]
    fewest = min(len(pool) for pair in pools for pool in pair)
    if fewest < LEAST or min(float(pool.min()) for pair in pools for pool in pair) <= 0:
        return None
    shares = np.array([p for p in _grid() if min(p, 1 - p) * fewest >= BEYOND])
    logs = np.array([np.log(np.quantile(after, shares) / np.quantile(before, shares)) for before, after in pools])
    middle, half = logs.mean(axis=0), _half_width(logs)
    ends = (None, None) if half is None else (np.exp(middle - half), np.exp(middle + half))
    return Quantiles(shares=shares, ratios=np.exp(middle), low=ends[0], high=ends[1])


def _grid() -> Floats:
    """Return shares that lie closer in the tail, where each nine takes as much room as the one before."""
    return np.concatenate([np.linspace(0.02, 0.5, 25), 1 - 10.0 ** -np.linspace(0.32, 3, 60)])


def _half_width(logs: Floats) -> Floats | None:
    from scipy.special import stdtrit

    n = len(logs)
    if n < 3:
        return None
    return np.asarray(float(stdtrit(n - 1, 0.95)) * logs.std(axis=0, ddof=1) / math.sqrt(n), dtype=float)


def _measured(bench: Bench, finding: Finding) -> Measurement | None:
    """Return the measurement a finding is about; CPU time and the tail are of the metric whose name they begin with."""
    names = (finding.name, *(finding.name.removesuffix(ending) for ending in _OF_LAUNCH if finding.name.endswith(ending)))
    found = {m.name: m for m in bench.measurements if m.parameters == finding.parameters and m.skipped is None and m.launches}
    return next((found[name] for name in names if name in found), None)


def _paired(base: Sequence[Launch], cand: Sequence[Launch]) -> list[tuple[int, Pair]]:
    """Return the pairs that both sides have, in order; launches without a number by their place."""
    sides = [
        {x.pair if x.pair is not None else i: x for i, x in enumerate(side, start=1) if len(launches.samples(x))} for side in (base, cand)
    ]
    return [(n, (sides[0][n], sides[1][n])) for n in sorted(sides[0].keys() & sides[1].keys())]


def _numbers(pair: Pair, finding: Finding, is_derived: bool) -> tuple[float, float] | None:
    """Return the numbers of both launches of a pair, as the gate makes them; None where they have none above zero."""
    ending = next((e for e in _OF_LAUNCH if finding.name.endswith(e)), "") if is_derived else ""
    if ending:
        found = [_OF_LAUNCH[ending](launch, finding.better) for launch in pair]
    else:
        statistic = launches.statistic_for(pair)
        found = [launches.number(launch, statistic, finding.better) for launch in pair]
    before, after = found
    return None if before is None or after is None or min(before, after) <= 0 else (before, after)


def _tail(launch: Launch, better: Literal["lower", "higher"]) -> float | None:
    return stats.quantile(launches.samples(launch), 0.99 if better == "lower" else 0.01)


_OF_LAUNCH: dict[str, Callable[[Launch, Literal["lower", "higher"]], float | None]] = {
    ".cpu": lambda launch, _: launches.cpu_s(launch),
    ".p99": _tail,
}  # how the names of what is derived from a measurement end, see `gate.rows`
