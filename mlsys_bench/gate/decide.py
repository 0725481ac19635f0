"""The arithmetic of recorded files whose launches are no pairs: numbers of launches in, a decision out.  + is worse, in logarithms.

Two processes of one program differ persistently (log sd 2-3 % on a noisy two-core machine), so the launch is the unit of evidence:
samples never enter n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from mlsys_bench.gate import sequence

ENOUGH_LAUNCHES = 6
ONE_SIDED = 0.995  # of each bound
FAMILY = 0.02  # chance that any of all metrics of one program is called slower: as much as the looks of a live gate add up to
POWER = 0.9  # at which an effect counts as detectable
MOST_LAUNCHES = 1000  # beyond this many nobody will run them


class Bounds(NamedTuple):
    """A log ratio, its one-sided bounds, and the smallest slowdown these launches would have found nine times in ten."""

    estimate: float
    low: float
    high: float
    sd: float  # between launches, both sides pooled
    detectable: float
    chance: float = 1.0  # of so much from a candidate that is no slower than d0


def welch(base: Sequence[float], cand: Sequence[float], tolerance: float) -> Bounds:
    """Return the bounds of mean(cand) - mean(base) of log numbers, one per launch.  Source: Welch (1947), Biometrika 34."""
    from scipy.special import stdtr, stdtrit

    b, c = np.asarray(base, dtype=float), np.asarray(cand, dtype=float)
    share_b, share_c = float(b.var(ddof=1)) / len(b), float(c.var(ddof=1)) / len(c)
    error = math.sqrt(share_b + share_c)
    d1 = math.log1p(tolerance)
    estimate = float(c.mean() - b.mean())
    sd = math.sqrt((float(b.var(ddof=1)) + float(c.var(ddof=1))) / 2)
    if error == 0:
        return Bounds(estimate, estimate, estimate, sd, d1, float(estimate <= d1 / 5))
    df = (share_b + share_c) ** 2 / (share_b**2 / (len(b) - 1) + share_c**2 / (len(c) - 1))
    half, reach = float(stdtrit(df, ONE_SIDED)) * error, float(stdtrit(df, POWER)) * error
    found = max(d1 / 5 + half + reach, d1 - half + reach)  # beyond d0, and not a pass
    return Bounds(estimate, estimate - half, estimate + half, sd, found, float(stdtr(df, (d1 / 5 - estimate) / error)))


def beyond_chance(chances: Sequence[float]) -> list[bool]:
    """Say of each metric, by its `Bounds.chance`, whether it is slower beyond what chance does to one of so many.

    Holm's procedure at FAMILY, and each alone at ONE_SIDED: of up to four metrics it asks no more than of one.
    """
    p = np.asarray(chances, dtype=float)[None, :]
    found = sequence.rejected(p, FAMILY, np.ones(p.shape, dtype=bool)) & (p <= 1 - ONE_SIDED)
    return [bool(each) for each in found[0]]


def decide(low: float, high: float, tolerance: float) -> Literal["regression", "improved", "pass", "inconclusive"]:
    """Return the verdict on bounds of the log slowdown: pass first, then regression; improved is regression with the sides swapped.

    Pass is tested first because with a quiet machine a true +2 % under a tolerance of 5 % would otherwise always fail.
    """
    d1 = math.log1p(tolerance)
    d0 = d1 / 5
    if high < -d0 and not low > -d1:
        return "improved"
    if high < d1:
        return "pass"
    if low > d0:
        return "regression"
    return "inconclusive"


def launches_needed(sd: float, tolerance: float) -> int | None:
    """Return the launches a side needs to find a slowdown of `tolerance` nine times in ten, or None when too many."""
    from scipy.special import stdtrit

    n = np.arange(ENOUGH_LAUNCHES, MOST_LAUNCHES + 1)
    reach = (stdtrit(2 * n - 2, ONE_SIDED) + stdtrit(2 * n - 2, POWER)) * sd * np.sqrt(2 / n)
    found = np.flatnonzero(reach <= 0.8 * math.log1p(tolerance))
    return int(n[found[0]]) if len(found) else None
