"""The sequential test of many metrics: log ratios of launch pairs in, one state per metric out.

Arrays are [jobs, metrics]: one job live, thousands in a back-test or a simulation, by the same source.  + is worse, in logarithms.
d1 = log(1 + tolerance) may pass, d0 = d1 / 5 is what nobody minds.  docs/adr/0021-looks-of-the-gate.md: levels and their error rates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench.verdicts import Word

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

LOOKS = (6, 10, 15, 20)  # launch pairs
LEVELS = {
    6: 0.005,
    10: 0.0025,
    15: 0.0025,
    20: 0.01,
}  # one-sided, of each look: 2 % in all; much where most runs end, most where most is known
CONFIRMING = {6: 0.0125, 10: 0.0125, 15: 0.0125, 20: 0.0125}  # one-sided, of each look of a second batch: 5 % in all
MOST_PAIRS = 2 * LOOKS[-1]
COUNTS = tuple(sorted({*LOOKS, *(first + k for first in LOOKS for k in LOOKS)}))  # of pairs, at which something may be decided
BEYOND = 0.85  # of d1: what all pairs together must make of a small regression for it to fail
OUTLYING = 6.0  # median absolute deviations, scaled to the sd of a normal law
_MAD_TO_SD = 1.4826

PLAIN_LEVEL = 0.005  # one-sided, of bounds that no look has asked for
POWER = 0.9  # at which an effect counts as detectable
MOST_ANYBODY_RUNS = 1000

OPEN, PASS, IMPROVED, REGRESSION, DOUBTED, INCONCLUSIVE = range(6)
WORDS: dict[int, Word] = {PASS: "pass", IMPROVED: "improved", REGRESSION: "regression"}  # all others: inconclusive


class Evidence(NamedTuple):
    """What some pairs say of each metric.  `worse` and `better` are one-sided p-values of 'no slower than d0' and 'no faster than -d0'."""

    estimate: Floats
    low: Floats
    high: Floats
    worse: Floats
    better: Floats


class Track(NamedTuple):
    """Where each metric has come to: state, pairs that decided it, and the pairs of its first batch where a second was needed (or 0)."""

    state: Ints
    pairs: Ints
    first: Ints
    settled: Bools  # by job: more pairs would change nothing


Look = Callable[[int, int, float, Ints], Evidence]  # pairs from, to, level, jobs -> [those jobs, metrics]


def follow(look: Look, available: int, d1: Floats, counts: Bools) -> Track:
    """Go through all looks that so many pairs allow.  d1, counts: [jobs, metrics].

    What does not count is tested alone, and nobody waits for it.
    """
    jobs, metrics = d1.shape
    none = np.zeros((jobs, metrics), dtype=np.int64)
    track = Track(none, none.copy(), none.copy(), np.zeros(jobs, dtype=bool))
    for n in (n for n in COUNTS if n <= available):
        _first_batch(look, n, d1, counts, track)
        for first in LOOKS:
            _second_batch(look, first, n, d1, track)
        waiting = np.isin(track.state, (OPEN, DOUBTED)) & counts
        track.settled[:] |= ~waiting.any(axis=1) | ((track.state == REGRESSION) & counts).any(axis=1)
        if track.settled.all():
            break
    return track


def next_look(track: Track, available: int) -> int | None:
    """Return the least number of pairs, above those there are, at which the one job of this track may be decided further."""
    if track.settled[0]:
        return None
    open_, doubted = (track.state[0] == OPEN).any(), set(track.first[0][track.state[0] == DOUBTED].tolist())
    coming = {n for n in LOOKS if open_} | {first + k for first in doubted for k in LOOKS}
    return min((n for n in coming if n > available), default=None)


def _first_batch(look: Look, n: int, d1: Floats, counts: Bools, track: Track) -> None:
    """Test pass first: with a quiet machine a true +2 % under a tolerance of 5 % would otherwise always fail."""
    open_ = track.state == OPEN
    jobs = np.flatnonzero(~track.settled & open_.any(axis=1))
    if n not in LOOKS or not len(jobs):
        return
    seen, limit, family = look(0, n, LEVELS[n], jobs), d1[jobs], counts[jobs]
    passes = seen.high < limit
    improved = passes & rejected(seen.better, LEVELS[n], family) & ~(seen.low > -limit)
    worse = ~passes & rejected(seen.worse, LEVELS[n], family)
    clear = (seen.estimate >= 2 * limit) & (seen.low > limit)  # twice the tolerance, and proven to be beyond it
    said = np.select(
        [improved, passes, worse & clear, worse], [IMPROVED, PASS, REGRESSION, DOUBTED],
        default=INCONCLUSIVE if n == LOOKS[-1] else OPEN,
    )  # fmt: skip
    track.first[jobs] = np.where(open_[jobs] & (said == DOUBTED), n, track.first[jobs])
    _note(track, jobs, open_[jobs], said, n)


def _second_batch(look: Look, first: int, n: int, d1: Floats, track: Track) -> None:
    """Ask for a small regression to be seen again in pairs of its own.

    All pairs together may still prove that it is within tolerance, and it fails only where their estimate is near the tolerance or above.
    """
    size, asked = n - first, (track.state == DOUBTED) & (track.first == first)
    jobs = np.flatnonzero(~track.settled & asked.any(axis=1))
    if size not in LOOKS or not len(jobs):
        return
    again, pooled = look(first, n, CONFIRMING[size], jobs), look(0, n, LEVELS[size], jobs)
    confirmed = (again.worse <= CONFIRMING[size]) & (pooled.estimate > BEYOND * d1[jobs])
    said = np.select([pooled.high < d1[jobs], confirmed], [PASS, REGRESSION], default=INCONCLUSIVE if size == LOOKS[-1] else DOUBTED)
    _note(track, jobs, asked[jobs], said, n)


def _note(track: Track, jobs: Ints, which: Bools, said: Ints, n: int) -> None:
    track.pairs[jobs] = np.where(which, n, track.pairs[jobs])
    track.state[jobs] = np.where(which, said, track.state[jobs])


def rejected(p: Floats, level: float, family: Bools) -> Bools:
    """Return which hypotheses Holm's procedure rejects among those of the family; others are tested alone.  p: [jobs, metrics].

    Source: Holm (1979), Scandinavian Journal of Statistics 6.
    """
    inside = np.where(family, np.nan_to_num(p, nan=1.0), 2.0)
    order = np.argsort(inside, axis=1, kind="stable")
    left = np.maximum(family.sum(axis=1, keepdims=True) - np.arange(p.shape[1]), 1)
    steps = np.logical_and.accumulate(np.take_along_axis(inside, order, axis=1) <= level / left, axis=1)
    found = np.zeros(p.shape, dtype=bool)
    np.put_along_axis(found, order, steps, axis=1)
    return np.where(family, found, p <= level)


def alone(logs: npt.ArrayLike, tolerance: float) -> tuple[Word, int]:
    """Return what the looks say of one metric's log ratios, and after how many pairs."""
    d, d1 = np.asarray(logs, dtype=float), np.array([[math.log1p(tolerance)]])
    track = follow(lambda start, stop, level, _: bounds(d[None, None, start:stop], d1 / 5, level), len(d), d1, np.ones((1, 1), dtype=bool))
    return WORDS.get(int(track.state[0, 0]), "inconclusive"), int(track.pairs[0, 0]) or len(d)


def detectable(sd: float, pairs: int, tolerance: float) -> float:
    """Return the log slowdown that fails nine times in ten within so many pairs when their sd is this; infinite before the first look.

    The easier of failing at once and of being slower in a first batch and again in a second; `resolution` plays the same and agrees.
    """
    d1 = math.log1p(tolerance)

    def beyond(limit: float, n: int, level: float) -> float:
        return limit + (_reach(n, level) + _reach(n, 1 - POWER)) * sd / math.sqrt(n)

    def at_least(limit: float, n: int) -> float:
        return limit + _reach(n, 1 - POWER) * sd / math.sqrt(n)

    def no_pass(n: int, level: float) -> float:
        return d1 - (_reach(n, level) - _reach(n, 1 - POWER)) * sd / math.sqrt(n)

    at_once = (max(at_least(2 * d1, n), beyond(d1, n, LEVELS[n])) for n in LOOKS if n <= pairs)
    again = (
        max(
            beyond(d1 / 5, first, LEVELS[first]), no_pass(first, LEVELS[first]), beyond(d1 / 5, size, CONFIRMING[size]),
            at_least(BEYOND * d1, first + size), no_pass(first + size, LEVELS[size]),
        )
        for first in LOOKS for size in LOOKS if first + size <= pairs
    )  # fmt: skip
    return min((*at_once, *again), default=math.inf)


@functools.cache
def _reach(n: int, level: float) -> float:
    """Return how many standard errors off the mean of n pairs its one-sided bound lies."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - level))


def pairs_needed(sd: float, tolerance: float) -> int | None:
    """Return the pairs that find a slowdown of `tolerance` nine times in ten, or None when nobody would run so many.

    Where those of a run do not, the pairs that one look at PLAIN_LEVEL would take.
    """
    from scipy.special import stdtrit

    d1 = math.log1p(tolerance)
    if within := next((n for n in COUNTS if detectable(sd, n, tolerance) <= d1), None):
        return within
    n = np.arange(MOST_PAIRS + 1, MOST_ANYBODY_RUNS + 1)
    reach = (stdtrit(n - 1, 1 - PLAIN_LEVEL) + stdtrit(n - 1, POWER)) * sd / np.sqrt(n)
    found = np.flatnonzero(reach <= 0.8 * d1)
    return int(n[found[0]]) if len(found) else None


# ---------------------------------------------------------------- bounds of a mean log ratio


def bounds(d: Floats, d0: Floats, level: float) -> Evidence:
    """Return what log ratios say, pairs along the last axis: Student's bounds; with an outlying pair Wilcoxon's too, the wider counts."""
    from scipy.special import stdtr, stdtrit

    n = d.shape[-1]
    if n < 2:
        return _nothing(d)
    estimate, error = d.mean(axis=-1), d.std(axis=-1, ddof=1) / math.sqrt(n)
    half = float(stdtrit(n - 1, 1 - level)) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        worse, better = (stdtr(n - 1, -_ratio(side * estimate - d0, error)) for side in (1, -1))
    seen = Evidence(estimate, estimate - half, estimate + half, worse, better)
    odd = has_outlier(d)
    return _widened(seen, d, np.broadcast_to(d0, odd.shape), odd, level) if odd.any() else seen


def bounds_of_one(logs: Floats, d0: float, level: float) -> Evidence:
    """Return what the log ratios of one metric say."""
    return Evidence(*(field[0] for field in bounds(logs[None, :], np.array([d0]), level)))


def _ratio(distance: Floats, error: Floats) -> Floats:
    """Return distance / error; with no spread at all a distance is infinitely many errors, and none is none."""
    return np.where(error > 0, distance / error, np.where(distance == 0, 0.0, np.copysign(np.inf, distance)))


def _nothing(d: Floats) -> Evidence:
    """One pair has no spread to go by."""
    shape = d.shape[:-1]
    middle = d.mean(axis=-1) if d.shape[-1] else np.full(shape, np.nan)
    return Evidence(middle, np.full(shape, -np.inf), np.full(shape, np.inf), np.ones(shape), np.ones(shape))


def has_outlier(d: Floats) -> Bools:
    """Say where a pair lies more than six scaled median absolute deviations off the median of its fellows."""
    ordered = np.sort(d, axis=-1)
    away = np.sort(np.abs(ordered - _middle(ordered)[..., None]), axis=-1)
    return np.asarray(away[..., -1] > OUTLYING * _MAD_TO_SD * _middle(away), dtype=bool)


def _middle(ordered: Floats) -> Floats:
    """Return the median of values in order; np.median takes three times as long."""
    n = ordered.shape[-1]
    return np.asarray((ordered[..., (n - 1) // 2] + ordered[..., n // 2]) / 2)


def _widened(seen: Evidence, d: Floats, d0: Floats, odd: Bools, level: float) -> Evidence:
    """Bring in the signed-rank bounds where a pair is outlying.

    Where all pairs lie on one side, ranks agree as far as so few can: Student's p-value decides.
    """
    ranked, least = wilcoxon(d[odd], d0[odd], level), 0.5 ** d.shape[-1]
    wide = Evidence(*(field.copy() for field in seen))
    wide.low[odd], wide.high[odd] = np.minimum(seen.low[odd], ranked.low), np.maximum(seen.high[odd], ranked.high)
    for ours, theirs in ((wide.worse, ranked.worse), (wide.better, ranked.better)):
        ours[odd] = np.where(theirs > least, np.maximum(ours[odd], theirs), ours[odd])
    return wide


def wilcoxon(d: Floats, d0: Floats, level: float) -> Evidence:
    """Return the signed-rank bounds of the centre of log ratios [rows, pairs].

    Where so few pairs have none at this level they are the extremes.
    Source: Hollander and Wolfe, Nonparametric Statistical Methods, ch. 3: order statistics of the means of all pairs of values.
    """
    n = d.shape[-1]
    i, j = np.triu_indices(n)
    means = np.sort((d[:, i] + d[:, j]) / 2, axis=-1)
    cdf = signed_rank_cdf(n)
    cut = max(0, int(np.searchsorted(cdf, level, side="right")) - 1)  # the largest sum of ranks this unlikely
    worse, better = (cdf[count] for count in ((means <= d0[:, None]).sum(axis=-1), (means >= -d0[:, None]).sum(axis=-1)))
    return Evidence(np.median(means, axis=-1), means[:, cut], means[:, -1 - cut], worse, better)


def signed_rank_cdf(n: int) -> Floats:
    """Return P(T <= t) of the sum of the ranks of one sign among n pairs, t = 0 .. n(n+1)/2, when signs are fair coins."""
    ways = np.zeros(n * (n + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, n + 1):
        ways[rank:] = ways[rank:] + ways[:-rank]
    return np.cumsum(ways) / 2.0**n
