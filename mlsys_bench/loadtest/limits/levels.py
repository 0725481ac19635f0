"""Which rates a sweep tries, and where its curve bends.

The knee is the rate at which the p95 of E2E latency is twice that of the lowest level, on the line between the two levels around it
(latencies by their logarithm; a level that falls behind counts as past it).  Kneedle (Satopää et al. 2011, Finding a "Kneedle" in a
Haystack) is not used: it scales both axes to the range it is given, so its knee moves with the highest rate that happened to be tried
(on M/M/1 from a load of 0.68 to 0.89 as the last level goes from 0.90 to 0.99).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from mlsys_bench import units
from mlsys_bench.errors import BadInput, UnitError
from mlsys_bench.loadlimits import Knee, SweptLevel

POINTS = 10
FACTOR = 2.0  # of the knee
_LOWEST, _HIGHEST = 0.1, 1.1  # of what a full server completes
_CROWDED = 1.6  # rates are closer together the nearer they are to capacity
_FURTHER, _STEP = 6, 1.5  # levels beyond the grid where the capacity is only known to be higher


def parse(text: str, points: int = POINTS) -> tuple[float, ...]:
    """Return the rates of '1,2,4,8' or of '1..64': so many, each by the same factor above the one before."""
    low, dots, high = text.partition("..")
    try:
        rates = [units.plain(part.strip()) for part in ((low, high) if dots else text.split(","))]
    except ValueError:
        raise BadInput(f"--rates {text}: write rates per second, 1,2,4,8 or 1..64") from None
    if not all(math.isfinite(rate) and rate > 0 for rate in rates):
        raise BadInput(f"--rates {text}: a rate must be above zero")
    if dots and rates[0] >= rates[1]:
        raise BadInput(f"--rates {text}: the second rate must be above the first")
    return tuple(np.geomspace(rates[0], rates[1], points).tolist()) if dots else tuple(sorted(set(rates)))


def seconds(text: str, option: str) -> float:
    """Return a duration above zero.  Raises UnitError, BadInput."""
    value = units.seconds(text, option)
    if value <= 0:
        raise UnitError(f"{option} {text}: must be above zero")
    return value


def around(capacity_per_s: float, points: int = POINTS) -> tuple[float, ...]:
    """Return rates from a tenth of what a full server completes to a tenth beyond it, low ones first, closer near the top."""
    x = np.linspace(0.0, 1.0, points)
    shares = _LOWEST + (_HIGHEST - _LOWEST) * (1 - (1 - x) ** _CROWDED)
    return tuple((capacity_per_s * shares).tolist())


def beyond(rates: Sequence[float]) -> tuple[float, ...]:
    """Return further rates, for a server that was never full."""
    return tuple(rates[-1] * _STEP ** (i + 1) for i in range(_FURTHER))


def knee(levels: Sequence[SweptLevel], factor: float = FACTOR) -> Knee | None:
    """Return where the p95 of E2E has grown by a factor, or None where it has not, or too few levels show it."""
    levels = [level for level in levels if level.over or level.test.validity.verdict != "invalid"]
    base = next((ends for level in levels if not level.over and (ends := _p95(level)) is not None), None)
    if base is None or len(levels) < 3:
        return None
    limit = factor * base[0]
    found = [_crossing([(level.rate_per_s, _at_least(level, i, limit)) for level in levels], limit) for i in (0, 1, 2)]
    if found[0] is None:
        return None
    early, late = found[2] or found[0], found[1] or levels[-1].rate_per_s
    between = (min(early, found[0]), max(late, found[0]))
    within = between if between[0] < between[1] else None
    return Knee(figure="e2e_p95", factor=factor, rate_per_s=found[0], interval_per_s=within, value_s=limit)


def _p95(level: SweptLevel) -> tuple[float, float, float] | None:
    """Return p95 of E2E with the ends of its interval."""
    value, ends = level.test.e2e_s.p95, level.test.e2e_s.intervals.get("p95")
    return None if value is None else (value, *(ends or (value, value)))


def _at_least(level: SweptLevel, end: int, limit: float) -> float | None:
    """Return p95 of a level or an end of its interval; where it is not known the median, once that is past the limit itself."""
    known = None if level.over else _p95(level)
    if known is not None:
        return known[end]
    if level.over:
        return max(2 * limit, level.test.e2e_s.p50 or 0.0)  # it grows for as long as the level lasts
    median = level.test.e2e_s.p50
    return median if median is not None and median >= limit else None


def _crossing(curve: Sequence[tuple[float, float | None]], limit: float) -> float | None:
    """Return the rate at which a curve first passes a limit, or None."""
    known = [(rate, value) for rate, value in curve if value is not None]
    for (rate, value), (further, higher) in itertools.pairwise(known):
        if value < limit <= higher:
            share = math.log(limit / value) / math.log(higher / value)
            return rate + share * (further - rate)
    return known[0][0] if known and known[0][1] >= limit else None


def share_out(total_s: float, rates: Sequence[float], least_s: float) -> tuple[float, ...]:
    """Return how long each level lasts: low rates longer, by the root of the rate, so that their percentiles have samples too."""
    weights = np.asarray(rates, dtype=float) ** -0.5
    shares = np.maximum(total_s * weights / weights.sum(), least_s)
    return tuple(shares.tolist())
