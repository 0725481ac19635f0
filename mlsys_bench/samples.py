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
EARLY, LEAST_EARLY, EARLY_ALPHA = 0.25, 3, 0.003  # first visits at a level of their own: at most this share, at least so many, by chance


def kept_rounds(launches: Iterable[Launch]) -> list[Array]:
    """Return the samples that count, a block each: those not flagged, or all where every one of the launches is flagged."""
    return blocks_of([r for launch in launches for r in launch.rounds])


def blocks_of(rounds: Sequence[Round]) -> list[Array]:
    """Return the samples of these rounds that count, a block each."""
    clean = [np.asarray([v for v, bad in zip(r.values, r.flagged or itertools.repeat(False), strict=False) if not bad]) for r in rounds]
    chosen = clean if any(len(block) for block in clean) else [np.asarray(r.values) for r in rounds]
    return [block.astype(float) for block in chosen if len(block)]


def kept(m: Measurement) -> Array:
    """Return the samples of a measurement that count, in the order they were taken."""
    blocks = kept_rounds(m.launches)
    return np.concatenate(blocks) if blocks else np.zeros(0)


def unflagged(bench: Bench) -> Bench:
    """Return a record with only the samples that count, for readers of rounds and launches; the same samples as `kept` gives."""
    return dataclasses.replace(bench, measurements=tuple(map(_unflagged, bench.measurements)))


def _unflagged(m: Measurement) -> Measurement:
    clean = sum(map(len, kept_rounds(m.launches)))
    if clean == count(m):
        return m
    launches = tuple(dataclasses.replace(launch, rounds=tuple(r for r in map(_clean, launch.rounds) if r.values)) for launch in m.launches)
    return dataclasses.replace(m, launches=tuple(launch for launch in launches if launch.rounds))


def _clean(r: Round) -> Round:
    """Return a round without its flagged samples, every column alike."""
    columns = {f.name: getattr(r, f.name) for f in dataclasses.fields(r)}
    flags = r.flagged or (False,) * len(r.values)
    left = {name: tuple(itertools.compress(column, [not bad for bad in flags])) for name, column in columns.items() if column is not None}
    return Round(**left)


def flagged(m: Measurement) -> int:
    """Return how many samples were taken while something disturbed them."""
    return sum(sum(r.flagged or ()) for launch in m.launches for r in launch.rounds)


def count(m: Measurement) -> int:
    """Return how many samples there are, flagged ones too."""
    return sum(len(r.values) for launch in m.launches for r in launch.rounds)


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
    for i, r in enumerate(rounds):
        if not left:
            break
        left -= not all(r.flagged or (False,))
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
