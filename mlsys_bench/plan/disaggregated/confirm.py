"""Pairs confirmed by simulation, as long and as counted as fleets of whole replicas are: the fewest replicas of both pools.

The prefill pool is confirmed for TTFT on its own; then the decode pool behind it for all limits, end to end.  Limits on both may be
kept more cheaply with one replica more here and one fewer there: such neighbours are tried too.

Of a law of arrivals a sample of either pool is simulated: so many prefill replicas that they feed the decode replicas, several where there
are several, so that caches come to a decode replica from more than one.  A trace is played whole, on both pools whole, near a limit with
more than one luck of the routers.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency, workload
from mlsys_bench.plan import confirm as whole
from mlsys_bench.plan.confirm import SAMPLE
from mlsys_bench.plan.disaggregated.pairs import Pair, of_both, of_prefill
from mlsys_bench.plan.disaggregated.played import Prefilled, decoded, prefilled
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import BATCHES, Trial, of_tracks
from mlsys_bench.workload import Schedule

SENDERS = 3  # prefill replicas simulated at least, where there are as many
_TRIALS = 7  # replica counts tried for one pool
_MORE_PREFILL = 3  # prefill replicas added where no number of decode replicas is enough
_NEIGHBOURS = ((-1, 0), (0, -1), (-1, 1), (1, -1))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Play:
    """What is played: requests at the prefill replicas, those of them that reach the decode replicas simulated, batches of these."""

    schedule: Schedule
    kept: npt.NDArray[np.bool_]
    batches: list[tuple[int, int]]
    senders: int
    receivers: int


def confirmed(pair: Pair, request: Request) -> tuple[Pair, Trial] | None:
    """Return the pair with the fewest replicas that keep all limits in simulation, and that simulation; None where none is found."""
    prefill, efforts = pair.prefill, (1, whole.LONGER) if request.trace is None else (1,)
    if own := of_prefill(request.slo):

        def sent(design: Design, effort: int) -> Trial:
            asked = dataclasses.replace(request, slo=own)
            return _judged(asked, effort, lambda luck, n: first_tokens(_with(pair, design), luck, n))

        found = whole.fewest(prefill, own, request.shelf, sent, _TRIALS, efforts)
        if found is None:
            return None
        prefill = found[0] if not of_both(request.slo) else max(found[0], prefill, key=lambda design: design.replicas)
    for more in range(_MORE_PREFILL + 1):
        start = pair.resized(prefill.replicas + more, pair.decode.replicas, request.shelf)
        found = whole.fewest(start.decode, request.slo, request.shelf, functools.partial(_behind, start, request), _TRIALS, efforts)
        if found is not None:
            best = start.resized(start.prefill.replicas, found[0].replicas, request.shelf), found[1]
            return _neighbours(best, request) if of_both(request.slo) else best
    return None


def _with(pair: Pair, prefill: Design) -> Pair:
    return dataclasses.replace(pair, prefill=prefill)


def _behind(pair: Pair, request: Request, decode: Design, effort: int) -> Trial:
    """Simulate a pair with another decode pool."""
    return _judged(request, effort, lambda luck, n: played(dataclasses.replace(pair, decode=decode), luck, n))


def _judged(request: Request, effort: int, play: Callable[[Request, int], Trial]) -> Trial:
    """Return what is played; a trace that keeps its limits only just with other luck of the routers too."""
    if request.trace is None:
        return play(request, effort)
    return whole.by_luck(lambda seed: play(dataclasses.replace(request, seed=seed), effort), request)


def _neighbours(best: tuple[Pair, Trial], request: Request) -> tuple[Pair, Trial]:
    """Return the pair that no neighbour betters: one replica fewer, or one moved to the other pool."""
    tried = {(best[0].prefill.replicas, best[0].decode.replicas)}
    for _ in range(_TRIALS):
        pair = best[0]
        for more, other in _NEIGHBOURS:
            at = pair.prefill.replicas + more, pair.decode.replicas + other
            if at in tried or at[0] < pair.prefill.fewest or at[1] < pair.decode.fewest:
                continue
            near = pair.resized(*at, request.shelf)
            if near.sort_key() >= pair.sort_key():
                continue
            tried.add(at)
            trial = judged(near, request)
            if whole.worst(trial, request.slo) < 1:
                best = near, trial
                break
        else:
            return best
    return best


def judged(pair: Pair, request: Request) -> Trial:
    """Return a simulation of a pair as it is: a long one where a short one comes near a limit."""
    trial = _judged(request, 1, functools.partial(played, pair))
    near = abs(math.log(max(whole.worst(trial, request.slo), 1e-9))) < whole.CLOSE
    return played(pair, request, whole.LONGER) if near and request.trace is None else trial


def played(pair: Pair, request: Request, effort: int = 1) -> Trial:
    """Simulate a sample of both pools, or both whole under a trace.  The same seed and share give the same result."""
    play = _play(pair, request, effort)
    first = _first(pair, play, request)
    tracks = decoded(pair.decode.candidate, first, play.kept, play.receivers, request.routing, request.seed + 1)
    return of_tracks(tracks, workload.take(play.schedule, play.kept), play.batches, play.receivers, _overhead(pair))


def first_tokens(pair: Pair, request: Request, effort: int = 1) -> Trial:
    """Simulate the prefill pool alone: of the times only those of first tokens mean anything."""
    play = _play(pair, request, effort)
    first = _first(pair, play, request)
    after_s = first.handed_s - play.schedule.scheduled_s + _overhead(pair).seconds(play.schedule.prompt_tokens)
    rows = np.flatnonzero(play.kept)
    at = [(rows[a], rows[b - 1] + 1) for a, b in play.batches]
    return Trial(
        batches=tuple(
            Latencies(ttft_s=after_s[a:b], tpot_s=np.full(b - a, np.nan), e2e_s=after_s[a:b], itl_s=np.zeros(0)) for a, b in at
        ),
        tokens_per_s=(0.0,) * BATCHES, requests_per_s=(0.0,) * BATCHES, preempted=0.0,
    )  # fmt: skip


def headroom(pair: Pair, request: Request, trace: Schedule) -> float:
    """Return by how much faster the trace may be played, as a share, before a limit breaks: at most until one replica more would be due."""
    low, high = 0.0, 1 / max(min(pair.prefill.replicas, pair.decode.replicas) - 1, 1)
    for _ in range(4):
        middle = (low + high) / 2
        found = judged(pair, dataclasses.replace(request, trace=workload.sped_up(trace, 1 + middle)))
        low, high = (middle, high) if whole.worst(found, request.slo) < 1 else (low, middle)
    return low


def _first(pair: Pair, play: _Play, request: Request) -> Prefilled:
    return prefilled(pair.prefill.candidate, play.schedule, pair.link, play.senders, request.routing, request.seed)


def _overhead(pair: Pair) -> latency.Overhead:
    """Return the time outside both engines; of steps planned ahead by a pool of its own nothing is known."""
    return dataclasses.replace(latency.overhead(pair.decode.candidate.profile), planned_steps=0.0)


def _play(pair: Pair, request: Request, effort: int) -> _Play:
    """Return what is played of a pair: a trace whole, else about as many requests as of a whole replica."""
    if request.trace is not None:
        schedule = workload.take(request.trace, whole.holdable(pair.prefill, request.trace))
        borders = np.linspace(0, len(schedule), BATCHES + 1).astype(int).tolist()
        return _Play(
            schedule=schedule, kept=np.ones(len(schedule), dtype=bool), batches=list(itertools.pairwise(borders)),
            senders=pair.prefill.replicas, receivers=pair.decode.replicas,
        )  # fmt: skip
    receivers = 1 if request.routing == "random" else min(pair.decode.replicas, SAMPLE)
    before, counted, after = (receivers * n for n in whole.lengths(pair.decode, receivers, effort))
    fed = receivers * pair.prefill.replicas / pair.decode.replicas  # prefill replicas whose caches these receivers get
    senders = min(pair.prefill.replicas, max(math.ceil(fed - 1e-9), SENDERS))
    share, wanted = fed / senders, before + BATCHES * counted + after
    schedule = whole.of_sample(pair.prefill, request.workload, senders, math.ceil((wanted + 4 * wanted**0.5) / share), request.seed)
    kept = np.random.default_rng([request.seed, 2]).random(len(schedule)) < share
    last = int(np.flatnonzero(kept)[min(wanted, int(kept.sum())) - 1]) + 1
    counted = min(counted, (int(kept[:last].sum()) - before - after) // BATCHES)
    batches = [(at, at + counted) for at in range(before, before + BATCHES * counted, counted)]
    return _Play(schedule=workload.take(schedule, np.arange(last)), kept=kept[:last], batches=batches, senders=senders, receivers=receivers)
