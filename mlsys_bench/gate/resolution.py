"""What a runner can see, from pairs of launches of the same program: its noise, its false alarms, the smallest effect it finds.

Gate runs are played by resampling these pairs, each with its sides swapped by a coin, and going through the very looks that decide a
build (`sequence.follow`).  Swapping takes away what this one session leaned to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mlsys_bench import stats
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.gate import rows, sequence, words
from mlsys_bench.gate.sequence import Bools, Evidence, Floats, Ints, Track
from mlsys_bench.summary import launches
from mlsys_bench.types import Bench, Scalar
from mlsys_bench.verdicts import Policy, Resolution

LEAST_PAIRS = sequence.LOOKS[0]  # with fewer no gate decides, and an sd means little
OFTEN = 0.9  # what is found, or decided, so often counts
MOST = 1.0  # a tolerance or a slowdown of 100 %: beyond it nobody asks
FINEST = 1e-4  # of tolerances
_JOBS = 1000  # gate runs played for the false alarms
_TRIALS = 400  # gate runs played for each step of a bisection: 90 % is then known to 1.5 %
_STEPS = 9  # of a bisection: two digits
_SESSIONS = 30  # calibrations played, for the interval of the false alarms
_RUNS = 200  # gate runs played in each of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """What the two sides of each pair differed by, though the same: log ratios in order of time, + is worse."""

    name: str
    parameters: dict[str, Scalar]
    unit: str
    logs: tuple[float, ...]
    tolerance: float


def apart(base: Bench, cand: Bench, policy: Policy) -> tuple[Apart, ...]:
    """Return what the sides differed by, of all that is decided launch by launch and may fail the build.  Counters differ by nothing."""
    couples = [(b, c) for b, c in words.matched(base, cand) if b is not None and c is not None and words.unmatched(b, c) is None]
    timed = [(b, c) for b, c in couples if not (b.deterministic or c.deterministic)]
    found = (row for b, c in timed if all(map(launches.usable, rows.paired(b, c))) for row in rows.of(b, c, policy))
    return tuple(
        Apart(name=r.name, parameters=r.parameters, unit=r.unit, logs=tuple(r.logs.tolist()), tolerance=r.tolerance)
        for r in found
        if r.may_fail and len(r.logs)
    )


def resolve(found: Sequence[Apart], pairs: int, seed: int = 0) -> tuple[Resolution, ...]:
    """Return what this runner sees of each metric in gate runs of so many pairs.  Raises MeasurementFailed with too few launches."""
    n = min((len(f.logs) for f in found), default=0)
    if n < LEAST_PAIRS:
        cure = f"give {LEAST_PAIRS} or more: a longer --budget"
        raise MeasurementFailed(f"{n} launch pair(s) of the same program say nothing of its noise; {cure}")
    logs = np.array([f.logs[:n] for f in found])
    alarms, spans = _false_alarms(logs, found, pairs, np.random.default_rng(seed))
    return tuple(
        Resolution(
            name=f.name, parameters=f.parameters, unit=f.unit, pairs=len(f.logs), launch_sd=sd(f.logs), sd_interval=sd_interval(f.logs),
            false_alarms=alarms[m], false_alarm_interval=spans[m], detectable=detectable(logs[m], f.tolerance, pairs, len(found), seed),
            finest_tolerance=finest_tolerance(logs[m], pairs, seed),
        )
        for m, f in enumerate(found)
    )  # fmt: skip


def sd(logs: Sequence[float]) -> float:
    """Return the standard deviation of the log ratio, from pair to pair."""
    return float(np.std(np.asarray(logs), ddof=1))


def sd_interval(logs: Sequence[float]) -> tuple[float, float]:
    """Return its 90 % interval, from the chi-squared law that the variance of normal values follows."""
    from scipy.special import chdtri

    df = len(logs) - 1
    low, high = (math.sqrt(df / float(chdtri(df, p))) for p in (0.05, 0.95))
    return sd(logs) * low, sd(logs) * high


def detectable(logs: Floats, tolerance: float, pairs: int, family: int, seed: int = 0) -> float:
    """Return the smallest slowdown that fails the build nine times in ten, as a share; MOST where none below does."""

    def found(effect: float) -> bool:
        return float((_alone(logs, math.log1p(effect), tolerance, pairs, family, seed) == sequence.REGRESSION).mean()) >= OFTEN

    return _smallest(found, tolerance / 10, MOST)


def finest_tolerance(logs: Floats, pairs: int, seed: int = 0) -> float:
    """Return the smallest tolerance within which the same program is proven to be nine times in ten; MOST where none below is."""

    def decided(tolerance: float) -> bool:
        return float(np.isin(_alone(logs, 0.0, tolerance, pairs, 1, seed), (sequence.PASS, sequence.IMPROVED)).mean()) >= OFTEN

    return _smallest(decided, FINEST, MOST)


# ---------------------------------------------------------------- gate runs, played


def _false_alarms(
    logs: Floats, found: Sequence[Apart], pairs: int, rng: np.random.Generator
) -> tuple[list[float], list[tuple[float, float]]]:
    """Return, by metric, the share of runs that fail the build through it, and its 90 % interval.

    The wider of two: over calibrations like this one, and Wilson's of the runs that were played.
    """
    share = _failed(logs, found, pairs, _JOBS, rng)
    n = logs.shape[1]
    others = [_failed(logs[:, rng.integers(0, n, n)], found, pairs, _RUNS, rng) for _ in range(_SESSIONS)]
    spans = []
    for s, low, high in zip(share, *np.quantile(np.array(others), (0.05, 0.95), axis=0), strict=True):
        played = stats.wilson(round(float(s) * _JOBS), _JOBS, level=0.9)
        assert played is not None
        spans.append((min(float(low), played[0]), max(float(high), played[1])))
    return [float(s) for s in share], spans


def _failed(logs: Floats, found: Sequence[Apart], pairs: int, jobs: int, rng: np.random.Generator) -> Floats:
    drawn = _played(logs, jobs, pairs, rng)
    d1 = np.broadcast_to(np.log1p([f.tolerance for f in found]), drawn.shape[:2])
    track = _follow(drawn, d1, np.ones(drawn.shape[:2], dtype=bool))
    return np.asarray((track.state == sequence.REGRESSION).mean(axis=0))


def _played(logs: Floats, jobs: int, pairs: int, rng: np.random.Generator) -> Floats:
    """Return [jobs, metrics, pairs]: pairs drawn with replacement, sides swapped by a coin, the metrics of a pair kept together."""
    many = min(pairs, sequence.MOST_PAIRS)
    drawn = logs[:, rng.integers(0, logs.shape[1], (jobs, many))] * rng.choice((-1.0, 1.0), (jobs, many))
    return np.moveaxis(drawn, 0, 1)


def _follow(drawn: Floats, d1: Floats, counts: Bools) -> Track:
    """Go through the looks.  Metrics beyond those drawn are at rest: each passes, and takes its part in Holm's procedure."""
    at_rest = Evidence(estimate=0.0, low=0.0, high=-math.inf, worse=1.0, better=1.0)  # type: ignore[arg-type]  # one value for all of them
    rest = ((0, 0), (0, d1.shape[1] - drawn.shape[1]))

    def look(start: int, end: int, level: float, jobs: Ints) -> Evidence:
        seen = sequence.bounds(drawn[jobs, :, start:end], d1[jobs, : drawn.shape[1]] / 5, level)
        return Evidence(*(np.pad(field, rest, constant_values=value) for field, value in zip(seen, at_rest, strict=True)))

    return sequence.follow(look, drawn.shape[2], d1, counts)


def _alone(logs: Floats, effect: float, tolerance: float, pairs: int, family: int, seed: int) -> Ints:
    """Return where runs end for one metric that is slower by `effect`, the others of its family at rest; the same draws for any effect."""
    drawn = _played(logs[None, :], _TRIALS, pairs, np.random.default_rng(seed + 1)) + effect
    shape = (_TRIALS, family)
    return np.asarray(_follow(drawn, np.full(shape, math.log1p(tolerance)), np.ones(shape, dtype=bool)).state[:, 0])


def _smallest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the smallest value at which something that holds for all larger ones holds, by bisection in logarithms."""
    if holds(low):
        return low
    if not holds(high):
        return high
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
