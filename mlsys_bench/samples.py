"""Samples of a measurement: those that count, the interval of their median, whether they drift.  See docs/bench.md and ADR 0027.

A *block* is what one visit took: samples of one visit share what the machine did meanwhile, so they are not independent.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench.types import Bench, Launch, Measurement, Round

Array = npt.NDArray[np.float64]
Ended = Literal["settled", "budget", "drifting"]

LEVEL = 0.95  # of the interval that is reported
WITHIN = 0.01  # half of an interval's width, relative to the median: settled
STRICT_LEVEL = 0.999  # of the interval that decides to stop: it is asked many times, the reported one once
LEAST_BLOCKS = 20  # below, a trend is not told from noise
DRIFT_ALPHA, DRIFT_CHANGE = 0.01, 0.02  # a trend is refused when so unlikely by chance, and so large from the first third to the last
HINT_ALPHA = 0.25  # ... and watched further from here
CROWDED = 1.1  # a core is shared from so much of its least crowding on: alone it varies by 1 to 4 %, beside a neighbour it is 1.18 to 1.26
ALONE = 0.02  # ... and this quantile of a launch's crowding is its least: the very lowest may be an accident
SAME_CLOCK = 0.012  # two clocks are one from here on: steps of 100 MHz at 4 GHz are 2.4 % apart, readings of one differ by 0.3 %
LEAST_AT_CLOCK = 6  # samples of a launch at a clock, below which it has no median there
LEAST_VISITS = 5  # at the usual clock, below which samples at any count: what is left out costs more than the clock does
EARLY, LEAST_EARLY, EARLY_ALPHA = 0.25, 3, 0.003  # first visits at a level of their own: at most this share, at least so many, by chance


def kept_rounds(launches: Iterable[Launch]) -> list[Array]:
    """Return the samples that count, a block each: of those not flagged the ones at the usual clock of these launches."""
    of_each = [launch.rounds for launch in launches]
    return blocks_of([r for rounds in of_each for r in rounds], usual_clock(of_each))


def blocks_of(rounds: Sequence[Round], clock_hz: float | None = None) -> list[Array]:
    """Return the samples of these rounds that count, a block each: not flagged, at this clock or the usual one; all if all are flagged."""
    return [block for block in _counting(rounds, clock_hz) if len(block)]


def _counting(rounds: Sequence[Round], clock_hz: float | None = None) -> list[Array]:
    """Return the samples of each round that count, none of some."""
    clean = [_clean(r) for r in rounds]
    at_hz = clock_hz if clock_hz is not None else usual_clock([rounds])
    for chosen in ([_at_clock(r, at_hz) for r in clean], clean):
        if any(r.values for r in chosen):
            return [np.asarray(r.values, dtype=float) for r in chosen]
    return [np.asarray(r.values, dtype=float) for r in rounds]


def kept(m: Measurement) -> Array:
    """Return the samples of a measurement that count, in the order they were taken."""
    blocks = kept_rounds(m.launches)
    return np.concatenate(blocks) if blocks else np.zeros(0)


def unflagged(bench: Bench) -> Bench:
    """Return a record with only the samples that nothing disturbed, whatever their clock, for readers of rounds and launches."""
    return dataclasses.replace(bench, measurements=tuple(_left(m, None) for m in bench.measurements))


def comparable(base: Bench, cand: Bench) -> tuple[Bench, Bench]:
    """Return two records with only the samples that may be held against each other: nothing disturbed them, and the clock was the same.

    A measurement whose launches have no clock in common, or of which no clock is known, keeps all its undisturbed samples.
    """
    sides = [{_key(m): m for m in bench.measurements} for bench in (base, cand)]
    clocks = {
        key: common_clock([launch.rounds for side in sides for launch in side[key].launches]) for key in sides[0].keys() & sides[1].keys()
    }
    found = {key: [_left(side[key], clock_hz) for side in sides] for key, clock_hz in clocks.items()}
    alike = {key for key, (before, after) in found.items() if bool(before.launches) == bool(after.launches)}
    left = [
        tuple(found[_key(m)][i] if _key(m) in alike else _left(m, None) for m in bench.measurements) for i, bench in enumerate((base, cand))
    ]
    return dataclasses.replace(base, measurements=left[0]), dataclasses.replace(cand, measurements=left[1])


def _key(m: Measurement) -> tuple[str, str]:
    return m.name, repr(sorted(m.parameters.items()))


def _left(m: Measurement, clock_hz: float | None) -> Measurement:
    """Return a measurement with only what counts at a clock, at any where there is none; whole where every sample is flagged."""
    launches = tuple(near for launch in m.launches if (near := _near(launch, clock_hz)) is not None)
    return m if not launches and clock_hz is None else dataclasses.replace(m, launches=launches)


def medians(launches: Sequence[Launch]) -> list[float]:
    """Return the median of each of these launches that has one at the clock they have in common, in their order."""
    clock_hz = common_clock([launch.rounds for launch in launches])
    found = (_near(launch, clock_hz) for launch in launches)
    return [float(np.median([v for r in launch.rounds for v in r.values])) for launch in found if launch is not None]


def _near(launch: Launch, clock_hz: float | None) -> Launch | None:
    """Return a launch with only what counts at a clock, None where that is too little for a median."""
    clean = [r for r in map(_clean, launch.rounds) if r.values]
    near = [r for r in (_at_clock(r, clock_hz) for r in clean) if r.values]
    return dataclasses.replace(launch, rounds=tuple(near)) if near and _size(near) >= min(LEAST_AT_CLOCK, _size(clean) / 2) else None


def _size(rounds: Iterable[Round]) -> int:
    return sum(len(r.values) for r in rounds)


def _clean(r: Round) -> Round:
    """Return a round without its flagged samples, every column alike."""
    return _where(r, [not bad for bad in r.flagged]) if r.flagged else r


def _where(r: Round, wanted: Sequence[bool]) -> Round:
    columns = {f.name: getattr(r, f.name) for f in dataclasses.fields(r)}
    left = {name: tuple(itertools.compress(column, wanted)) for name, column in columns.items() if column is not None}
    return Round(**left)


def flagged(m: Measurement) -> int:
    """Return how many samples were taken while something disturbed them."""
    return sum(sum(r.flagged or ()) for launch in m.launches for r in launch.rounds)


def at_other_clocks(m: Measurement) -> int:
    """Return how many samples nothing disturbed that do not count, for the clock was another one then."""
    return max(0, count(m) - flagged(m) - len(kept(m)))


def count(m: Measurement) -> int:
    """Return how many samples there are, flagged ones too."""
    return _size(r for launch in m.launches for r in launch.rounds)


# ---------------------------------------------------------------- the clock


def common_clock(launches: Sequence[Sequence[Round]]) -> float | None:
    """Return the clock, in Hz, at which most launches have a median, and of such clocks that of most samples; None where none is known.

    Of one launch that is its usual clock.  On a shared host a core's clock follows what all others do: at one clock products of two
    launches agree within 1 %, at whatever clocks there were they lie 4 to 10 % apart (ADR 43).
    """
    of_each = [_clocks([_clean(r) for r in rounds]) for rounds in launches]
    every = np.concatenate(of_each) if of_each else np.zeros(0)
    if not len(every):
        return None
    candidates = np.unique(every)
    low, high = candidates * (1 - SAME_CLOCK), candidates * (1 + SAME_CLOCK)
    counts = np.array([np.searchsorted(c, high, "right") - np.searchsorted(c, low, "left") for c in of_each])
    enough = np.array([min(LEAST_AT_CLOCK, len(c) / 2) for c in of_each])[:, None]
    best = np.lexsort((counts.sum(axis=0), (counts >= np.maximum(enough, 1)).sum(axis=0)))[-1]
    return float(candidates[best])


def usual_clock(launches: Sequence[Sequence[Round]]) -> float | None:
    """Return the clock at which the samples that count were taken, None where too few visits were at one, or nobody knows."""
    clock_hz = common_clock(launches)
    near = (_at_clock(_clean(r), clock_hz) for rounds in launches for r in rounds if r.clock_hz)
    return clock_hz if sum(bool(r.values) for r in near) >= LEAST_VISITS else None


def _at_clock(r: Round, clock_hz: float | None) -> Round:
    """Return a round's samples at this clock, and all where it is not given or where nobody knows the round's."""
    near = r.clock_hz and clock_hz and [abs(at_hz / clock_hz - 1) <= SAME_CLOCK for at_hz in r.clock_hz]
    return r if not near or all(near) else _where(r, near)


def _clocks(rounds: Sequence[Round]) -> Array:
    """Return the clocks of all samples, sorted."""
    return np.sort(np.asarray([at_hz for r in rounds for at_hz in r.clock_hz or ()], dtype=float))


# ---------------------------------------------------------------- crowded cores


def least_crowding(seen: Sequence[float]) -> float:
    """Return the crowding of a launch's cores while nobody shared them, as far as it ever was so; infinite where nothing was seen."""
    return float(np.quantile(seen, ALONE)) if len(seen) else math.inf


def crowded(r: Round, least: float) -> bool:
    """Say whether a neighbour shared a core around any of these samples."""
    return r.crowding is not None and max(r.crowding, default=0.0) > CROWDED * least


def without_crowded(rounds: Sequence[Round], least: float) -> list[Round]:
    """Return the rounds of a launch, flagged where a neighbour shared a core."""
    return [dataclasses.replace(r, flagged=(True,) * len(r.values)) if crowded(r, least) else r for r in rounds]


# ---------------------------------------------------------------- the interval of the median


def interval(m: Measurement, level: float = LEVEL) -> tuple[float, float] | None:
    """Return the interval of a measurement's median within its launches, or None below what order statistics need."""
    return median_interval(kept_rounds(m.launches), level)


def median_interval(blocks: Sequence[Array], level: float = LEVEL) -> tuple[float, float] | None:
    """Return the interval of the median between two order statistics, or None where the sample is too small.

    Ranks n/2 + 1/2 -+ z sqrt(n d)/2: the normal approximation of Binomial(n, 1/2) with its continuity correction, linear between
    neighbouring samples.  d is `design_effect`, for samples of one block are alike.
    """
    if not blocks:
        return None
    ordered = np.sort(np.concatenate(blocks))
    n = len(ordered)
    z = NormalDist().inv_cdf((1 + level) / 2)
    rank = (n + 1) / 2 - z * math.sqrt(n * design_effect(blocks)) / 2  # counted from 1
    if rank < 1:
        return None
    low, high = np.interp([rank - 1, n - rank], np.arange(n), ordered)
    return float(low), float(high)


def design_effect(blocks: Sequence[Array]) -> float:
    """Return by how much grouping widens the variance of the median's rank, at least 1; 1 for a single block.

    The variance of (samples at or below the median) over blocks, against n/4 of independent ones.  Source: Kish (1965), Survey Sampling.
    """
    if len(blocks) < 2:
        return 1.0
    median = np.median(np.concatenate(blocks))
    above = [float((np.sign(block - median)).sum()) / 2 for block in blocks]
    total = sum(map(len, blocks))
    between = len(blocks) / (len(blocks) - 1) * sum(a * a for a in above)
    return max(1.0, between / (total / 4))


def half_width(blocks: Sequence[Array], level: float) -> float:
    """Return half of the interval's width relative to the median; infinite where there is none."""
    found = median_interval(blocks, level)
    if found is None:
        return math.inf
    middle = abs(float(np.median(np.concatenate(blocks))))
    width = found[1] - found[0]
    return 0.0 if width == 0 else math.inf if middle == 0 else width / 2 / middle


# ---------------------------------------------------------------- drift


class Drift(NamedTuple):
    """A trend over blocks: how likely so much by chance, and the median of the last third against that of the first."""

    p: float
    change: float


def drift(blocks: Sequence[Array]) -> Drift | None:
    """Return the trend of the blocks' medians, None below six: Mann and Kendall's test, and how far apart first and last third are."""
    medians = np.array([np.median(block) for block in blocks])
    n, third = len(medians), len(medians) // 3
    if n < 6 or (first := float(np.median(medians[:third]))) == 0:
        return None
    i, j = np.triu_indices(n, 1)
    s = float(np.sign(medians[j] - medians[i]).sum())
    sd = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    p = 2 * (1 - NormalDist().cdf(max(0.0, abs(s) - 1) / sd))
    return Drift(p=p, change=float(np.median(medians[-third:])) / first - 1)


def early(blocks: Sequence[Array]) -> int:
    """Return how many of the first blocks lie at a level that all others have left: warm-up that nobody waited for; 0 where there is none.

    The split at which the ranks of the medians before and after differ most (Mann and Whitney's statistic, as in Pettitt 1979), if it is
    early, that unlikely by chance, and of the size that makes a drift.
    """
    medians, n = np.array([np.median(block) for block in blocks]), len(blocks)
    if n < LEAST_BLOCKS:
        return 0
    k = np.arange(LEAST_EARLY, n - LEAST_EARLY + 1)
    before = np.cumsum(np.argsort(np.argsort(medians, kind="stable")) + 1)[k - 1]
    z = (before - k * (n + 1) / 2) / np.sqrt(k * (n - k) * (n + 1) / 12)
    best = int(np.argmax(np.abs(z)))
    at, least = int(k[best]), NormalDist().inv_cdf(1 - EARLY_ALPHA / 2)
    first, rest = float(np.median(medians[:at])), float(np.median(medians[at:]))
    is_early = at <= EARLY * n and abs(z[best]) > least and abs(first - rest) > DRIFT_CHANGE * abs(rest)
    return at if is_early else 0


def without_early(rounds: Sequence[Round]) -> list[Round]:
    """Return the rounds of a launch, the first ones flagged where they lie at a level that all others have left."""
    left, marked = early(blocks_of(rounds)), list(rounds)
    for i, (r, block) in enumerate(zip(rounds, _counting(rounds), strict=True)):
        if not left:
            break
        left -= len(block) > 0
        marked[i] = dataclasses.replace(r, flagged=(True,) * len(r.values))
    return marked


def ended(blocks: Sequence[Array]) -> Ended:
    """Say how it stands with the blocks of one launch: settled, drifting, or neither, which the budget then ends."""
    trend = drift(blocks) if len(blocks) >= LEAST_BLOCKS else None
    if trend is None:
        return "budget"
    if trend.p < DRIFT_ALPHA and abs(trend.change) > DRIFT_CHANGE:
        return "drifting"
    if first := early(blocks):
        return "budget" if len(blocks) < first + LEAST_BLOCKS else ended(blocks[first:])
    return "settled" if trend.p >= HINT_ALPHA and half_width(blocks, STRICT_LEVEL) <= WITHIN else "budget"
