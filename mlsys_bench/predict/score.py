"""How far predictions lie from measurements, and whether their intervals keep what they say.

Errors are relative to the measurement.  Rows of one group (one experiment, one sweep) err together: every interval here is drawn over
groups, and a coverage counts groups, not rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench import stats, workers

Samples = npt.NDArray[np.float64]
RESAMPLES = 2000
BLOCKS = 8  # of them, each a piece of work


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """One prediction beside its measurement.  `tags` say what it may be split by: gpu, model, engine, seen, …"""

    figure: str
    measured: float
    predicted: float
    low: float
    high: float
    group: str
    tags: dict[str, str]

    @property
    def error(self) -> float:
        """The signed relative error."""
        return self.predicted / self.measured - 1.0

    @property
    def covered(self) -> bool:
        """Whether the interval holds the measurement."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The errors of some predictions.  Intervals are 90 %, over groups; None with one group only."""

    rows: int
    groups: int
    mape: float
    mape_interval: tuple[float, float] | None
    median: float
    p90: float
    bias: float  # mean signed error
    coverage: float  # mean over groups of the share of its rows that lie in their intervals
    coverage_interval: tuple[float, float] | None  # Wilson, groups as trials
    interval_score: float  # mean over groups, over what was predicted
    band_score: float  # the same for predicted x (1 ± mape): what a constant band would have earned


def summary(judged: Sequence[Judged], seed: int = 0) -> Summary:
    """Return the errors of at least one prediction."""
    errors = [abs(j.error) for j in judged]
    mape = float(np.mean(errors))
    covered = by_group(judged, lambda j: float(j.covered))
    return Summary(
        rows=len(judged),
        groups=len(covered),
        mape=mape,
        mape_interval=mean_interval(judged, seed=seed),
        median=stats.quantile(errors, 0.5),
        p90=stats.quantile(errors, 0.9),
        bias=float(np.mean([j.error for j in judged])),
        coverage=float(np.mean(covered)),
        coverage_interval=stats.wilson(sum(covered), len(covered)),
        interval_score=float(np.mean(by_group(judged, lambda j: interval_score(j.measured, j.low, j.high, j.predicted)))),
        band_score=float(np.mean(by_group(judged, lambda j: interval_score(j.measured, *band(j.predicted, mape), j.predicted)))),
    )


def mean_interval(judged: Sequence[Judged], *, level: float = stats.LEVEL, seed: int = 0) -> tuple[float, float] | None:
    """Return the bootstrap interval of the mean absolute relative error, whole groups drawn with replacement."""
    groups = _groups(judged, lambda j: abs(j.error))
    if len(groups) < 2:
        return None
    sums, counts = np.array([sum(errors) for errors in groups]), np.array([len(errors) for errors in groups])
    drawn = np.random.default_rng(seed).integers(0, len(groups), (RESAMPLES, len(groups)))
    low, high = stats.quantiles(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1), ((1 - level) / 2, (1 + level) / 2))
    return low, high


def interval(
    judged: Sequence[Judged],
    statistic: Callable[[Samples], float],
    *,
    level: float = stats.LEVEL,
    seed: int = 0,
    executor: Executor | workers.Local | None = None,
) -> tuple[float, float] | None:
    """Return the bootstrap interval of a statistic of the absolute relative errors, whole groups drawn with replacement.

    All draws are made before any is worked out, so an executor, whose statistic must have a name, changes nothing.
    """
    groups = [np.array(errors) for errors in _groups(judged, lambda j: abs(j.error))]
    if len(groups) < 2:
        return None
    drawn = np.random.default_rng(seed).integers(0, len(groups), (RESAMPLES, len(groups)))
    parts = workers.each(_resampled, np.array_split(drawn, BLOCKS), shared=(groups, statistic), executor=executor)
    low, high = stats.quantiles(np.concatenate(parts), ((1 - level) / 2, (1 + level) / 2))
    return low, high


def _resampled(shared: tuple[list[Samples], Callable[[Samples], float]], drawn: npt.NDArray[np.int64]) -> Samples:
    groups, statistic = shared
    return np.array([statistic(np.concatenate([groups[i] for i in row])) for row in drawn])


def by_group(judged: Iterable[Judged], value: Callable[[Judged], float]) -> list[float]:
    """Return the mean of a value in each group."""
    return [float(np.mean(values)) for values in _groups(judged, value)]


def interval_score(measured: float, low: float, high: float, over: float, level: float = stats.LEVEL) -> float:
    """Return the interval score over a weight: the width, and 2 / (1 - level) times what it misses by.  Lower is better.

    Proper where the weight is known before the measurement, as a prediction is: only the true quantiles then minimise the mean.  Over the
    measurement itself it is not: what is predicted too low costs less than its interval says (`docs/adr/0041`).
    Source: Gneiting and Raftery (2007), Strictly Proper Scoring Rules, JASA 102, eq. 43.
    """
    missed = max(low - measured, 0.0) + max(measured - high, 0.0)
    return (high - low + 2 / (1 - level) * missed) / over


def band(predicted: float, relative: float) -> tuple[float, float]:
    """Return a constant relative band around a prediction."""
    return predicted * (1 - relative), predicted * (1 + relative)


def best_band(judged: Sequence[Judged]) -> tuple[float, float]:
    """Return the constant relative band that would have scored best, chosen in hindsight, and its score: an opponent no one has."""
    widths = sorted({0.0, *(abs(j.error) / (1 + j.error) for j in judged if j.error > -1)})

    def earned(width: float) -> float:
        return float(np.mean(by_group(judged, lambda j: interval_score(j.measured, *band(j.predicted, width), j.predicted))))

    found, width = min((earned(width), width) for width in _thinned(widths))
    return width, found


def split(judged: Iterable[Judged], tag: str) -> dict[str, list[Judged]]:
    """Return the predictions by a tag, most first."""
    found: dict[str, list[Judged]] = {}
    for j in judged:
        found.setdefault(j.tags.get(tag, ""), []).append(j)
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def _groups(judged: Iterable[Judged], value: Callable[[Judged], float]) -> list[list[float]]:
    found: dict[str, list[float]] = {}
    for j in judged:
        found.setdefault(j.group, []).append(value(j))
    return list(found.values())


def _thinned(values: Sequence[float], most: int = 60) -> list[float]:
    """Return at most so many of the values, evenly by rank."""
    return [values[math.floor(i)] for i in np.linspace(0, len(values) - 1, min(most, len(values)))]
