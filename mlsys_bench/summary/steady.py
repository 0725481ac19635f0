"""Where a run settled: the warm-up that is left out, and whether what is left is steady.

Warm-up: MSER (White 1997, Simulation 69; on batch means as White, Cobb and Spratt 2000, Winter Simulation Conference) proposes the cut
that makes the mean of the rest most precise, for TTFT and for E2E, and a comparison of means must confirm it (alone, MSER also cuts most
runs that need no cut); and a server starts empty, so the requests in flight must have reached their later level.  The latest of these
counts, at most half of the run.

Steadiness: Mann-Kendall's test for a trend on the means of 20 blocks of the rest, its variance widened for blocks that resemble their
neighbours (Hamed and Rao 1998, Journal of Hydrology 204), and the trend must also matter: 15 % of the level across the window, for
requests in flight 2 % of all arrivals and a quarter of their number.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench import units
from mlsys_bench.summary.columns import Columns
from mlsys_bench.summary.course import in_flight
from mlsys_bench.summary.intervals import batch_means, effective, neighbours
from mlsys_bench.timelines import Steadiness
from mlsys_bench.types import RequestRecord

Floats = npt.NDArray[np.float64]

LEAST_REQUESTS = 100  # answered; fewer say nothing of steadiness
MOST_CUT = 0.5  # of a run
BLOCKS = 20  # of the test for a trend
CHANCE = 0.002  # below which a trend is not one of a steady run
MATTERS = 0.15  # of the level, across the window
BACKLOG = 0.02  # of the arrivals of the window
HEAP = 0.25  # of those in flight: less is slower answers, not a queue without end
MUCH = 0.1  # of the arrivals: a backlog that needs no more than a likely trend
LIKELY = 0.05
_FINEST = 400  # batches of a series
_NEAR = 0.9  # of the later level of requests in flight
_WORTH_A_CUT = 0.02  # of the mean
_CLEAR = 5.0  # standard errors between what is cut and what stays
_STEEPEST = 0.5  # of neighbouring blocks: more is the trend itself


def settled(run: Columns, *, duration_s: float, warmup_s: float | None, stationary: bool = True, open_loop: bool = True) -> Steadiness:
    """Return the warm-up of a run, found in the data where `warmup_s` is None, and whether the rest is steady.

    `stationary`: the load is meant to stay the same; a ramp or a trace has no warm-up that could be told from its own course.
    """
    sent = _Sent.of(run, duration_s)
    answered = _Answered.of(run, duration_s)
    if not stationary:
        given = warmup_s or 0.0
        said = "arrivals follow a schedule of their own: no warm-up is told apart, and figures are averages over its course"
        return Steadiness(verdict="too_short" if len(answered.ttft_s) < LEAST_REQUESTS else "steady", warmup_s=given,
                          decided_by="given" if warmup_s is not None else "nothing", reasons=(said,))  # fmt: skip
    if len(answered.ttft_s) < LEAST_REQUESTS:
        cut_s = min(0.1 * duration_s, 5.0) if warmup_s is None else warmup_s
        said = f"{len(answered.ttft_s)} answers are too few to test for steadiness, {LEAST_REQUESTS} are needed"
        if warmup_s is None and not (answered.scheduled_s >= cut_s).any():
            cut_s = 0.0  # nothing would be left: users who all wait for their first answer
        by = f"the first {units.show_s(cut_s)}, a tenth: too few answers to find one" if warmup_s is None else "given"
        return Steadiness(verdict="too_short", warmup_s=cut_s, decided_by=by, reasons=(said,))
    if warmup_s is not None:
        return dataclasses.replace(_judged(sent, answered, warmup_s, duration_s, open_loop), decided_by="given")
    filled_s = _filled(sent, duration_s)
    found = _judged(sent, answered, filled_s or 0.0, duration_s, open_loop)
    if found.verdict == "over_saturated":
        return dataclasses.replace(found, warmup_s=0.0)  # no part of a growing queue is more right than another
    if filled_s is None:  # it grows by chance: an answer's time is what filling takes
        filled_s = float(np.median(answered.e2e_s))
    cut_s, by = _cut(answered, filled_s, MOST_CUT * duration_s)
    return dataclasses.replace(_judged(sent, answered, cut_s, duration_s, open_loop), decided_by=by)


class _Sent(NamedTuple):
    """When requests were due and when they were over."""

    scheduled_s: Floats
    end_s: Floats

    @classmethod
    def of(cls, run: Columns, duration_s: float) -> _Sent:
        due = run.scheduled_s < duration_s
        return cls(run.scheduled_s[due], run.end_s[due])


class _Answered(NamedTuple):
    """The latencies of answers, in the order of their schedule."""

    scheduled_s: Floats
    ttft_s: Floats
    e2e_s: Floats

    @classmethod
    def of(cls, run: Columns, duration_s: float) -> _Answered:
        chosen = (run.scheduled_s < duration_s) & run.ok & (run.events > 0)
        ttft_s, e2e_s = run.ttft_s[chosen], run.e2e_s[chosen]
        return cls(run.scheduled_s[chosen], np.where(np.isnan(ttft_s), e2e_s, ttft_s), e2e_s)  # an embedding has no first token

    def since(self, start_s: float) -> _Answered:
        """Return those due from a moment on."""
        first = int(np.searchsorted(self.scheduled_s, start_s))
        return _Answered(*(column[first:] for column in self))


def windowed(records: Sequence[RequestRecord], warmup_s: float) -> list[RequestRecord]:
    """Return records of which those due before the end of the warm-up do not count."""
    return [dataclasses.replace(r, in_window=False) if r.in_window and r.scheduled_s < warmup_s else r for r in records]


# ---------------------------------------------------------------- warm-up


def _filled(sent: _Sent, duration_s: float) -> float | None:
    """Return when the requests in flight first come near their level of the second half, or None when not in the first half.

    A server starts empty: it takes an answer's time until as many come as go.
    """
    edges = np.linspace(0, duration_s, min(_FINEST, max(BLOCKS, len(sent.end_s) // 5)) + 1)
    busy = in_flight(sent.scheduled_s, sent.end_s, edges)
    level = float(np.median(busy[len(busy) // 2 :]))
    first = int(np.argmax(busy >= _NEAR * level))
    return float(edges[first]) if first <= len(busy) * MOST_CUT else None


def _cut(answered: _Answered, filled_s: float, most_s: float) -> tuple[float, str]:
    """Return the end of the warm-up and the series that decided it."""
    found = {"requests in flight": filled_s}
    for name, values in (("TTFT", answered.ttft_s), ("E2E", answered.e2e_s)):
        batches = min(_FINEST, len(values) // 5)
        cut = truncation(batch_means(values, batches))
        found[name] = float(answered.scheduled_s[len(values) % batches + cut * (len(values) // batches)]) if cut else 0.0
    name = max(found, key=lambda n: found[n])
    return (min(found[name], most_s), name) if found[name] > 0 else (0.0, "nothing")


def truncation(values: Floats) -> int:
    """Return how many values at the start belong to a warm-up: MSER's proposal where the means differ clearly, else 0."""
    n = len(values)
    most = int(n * MOST_CUT)
    if most < 1:
        return 0
    left = n - np.arange(most + 1)
    sums, squares = (np.cumsum(part[::-1])[::-1][: most + 1] for part in (values, values**2))
    marginal = (squares / left - (sums / left) ** 2) / left  # MSER: variance of the rest / its length
    cut = int(np.argmin(marginal))
    return cut if cut and _differ(values[:cut], values[cut:]) else 0


def _differ(head: Floats, rest: Floats) -> bool:
    """Say whether the mean of the head is clearly not that of the rest, both worth as many independent values as the rest shows."""
    worth, _ = effective(rest)
    error = float(rest.std()) * math.sqrt(1 / max(1.0, worth * len(head) / len(rest)) + 1 / worth)
    apart = abs(float(head.mean() - rest.mean()))
    return apart > _CLEAR * error and apart > _WORTH_A_CUT * abs(float(rest.mean()))


# ---------------------------------------------------------------- the rest


def _judged(sent: _Sent, answered: _Answered, warmup_s: float, duration_s: float, open_loop: bool) -> Steadiness:
    kept = answered.since(warmup_s)
    edges = np.linspace(warmup_s, duration_s, BLOCKS + 1)
    busy = in_flight(sent.scheduled_s, sent.end_s, edges)
    arrivals = int((sent.scheduled_s >= warmup_s).sum())
    served = int(((sent.end_s >= warmup_s) & (sent.end_s < duration_s)).sum()) / max(arrivals, 1)
    grew = _slope(busy) * (BLOCKS - 1)
    series = {"TTFT": batch_means(kept.ttft_s, BLOCKS), "E2E": batch_means(kept.e2e_s, BLOCKS)} if len(kept.ttft_s) >= 2 * BLOCKS else {}
    trends = {name: trend(values) for name, values in series.items()} | {"requests in flight": trend(busy)}
    rises = {name: _slope(values) * (BLOCKS - 1) / float(np.median(values)) for name, values in series.items()}
    figures = {"warmup_s": warmup_s, "decided_by": "nothing", "in_flight_grew": grew, "served_share": served, "trends": trends}
    chance = CHANCE if grew < MUCH * arrivals else LIKELY
    piles_up = grew > BACKLOG * arrivals and grew > HEAP * float(np.median(busy))
    if open_loop and piles_up and trends["requests in flight"] < chance:
        rate = arrivals / (duration_s - warmup_s)
        said = (
            f"over-saturated: {served * rate:.4g} of {rate:.4g} requests/s were served and {grew:,.0f} more were left waiting at the end; "
            f"latencies are those of a queue that grows and depend on how long the run lasts: lower the rate below {served * rate:.3g}/s "
            "or add replicas"
        )
        return Steadiness(verdict="over_saturated", reasons=(said,), **figures)  # type: ignore[arg-type]
    moving = [name for name, rise in rises.items() if abs(rise) > MATTERS and trends[name] < CHANCE]
    if not moving:
        return Steadiness(verdict="steady", **figures)  # type: ignore[arg-type]
    name = max(moving, key=lambda n: abs(rises[n]))
    how, cure = ("rises", "a longer run shows where it ends") if rises[name] > 0 else ("falls", "give a longer --warmup and --duration")
    said = f"not steady: {name} still {how}, by {abs(rises[name]):.0%} across the window; {cure}"
    return Steadiness(verdict="not_steady", reasons=(said,), **figures)  # type: ignore[arg-type]


def trend(values: Floats) -> float:
    """Return Mann and Kendall's two-sided chance that values without a trend are in so much order as these, + or -."""
    n = len(values)
    signs = np.sign(values[None, :] - values[:, None])
    score = float(np.triu(signs, 1).sum())
    left = values - _slope(values) * np.arange(n)
    r = min(max(neighbours(left), 0.0), _STEEPEST)
    variance = n * (n - 1) * (2 * n + 5) / 18 * (1 + r) / (1 - r)
    z = max(abs(score) - 1, 0.0) / math.sqrt(variance)
    return math.erfc(z / math.sqrt(2))


def _slope(values: Floats) -> float:
    """Return Sen's slope, the median of those between all pairs of values."""
    i, j = np.triu_indices(len(values), 1)
    return float(np.median((values[j] - values[i]) / (j - i)))
