"""Which candidates theory takes to be best: looked at in order of the least they can cost, until that exceeds what enough do cost.

A few readings of its clock (`screen`) bound what a candidate can do, so that of hundreds some ten are worked out in full.  Where the
engine's settings are open, the defaults are tried first; candidates whose bound is still below the best design get other steps, then other
batches: smaller steps shorten gaps between tokens, smaller batches all of TPOT, larger ones carry more.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mlsys_bench.plan import candidates, screen, sizing
from mlsys_bench.plan.analytic import Replica, memory_slots
from mlsys_bench.plan.candidates import Candidate, Misfit
from mlsys_bench.plan.demand import Demand
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.pricing import Fleet
from mlsys_bench.types import SLO, Limit

SURELY = 1.25  # times a limit: what even a request alone exceeds so far is missed without further question
TUNED = 4  # candidates whose engine settings are searched
WORTHWHILE = 1.03  # times as many replicas are needed with the default, or it stays
TOO_LONG = "beyond the longest context"
_ROUGH = 256  # samples of a first look at a setting


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A candidate and the least it can cost: the replicas that a bound on its capacity and the headroom ask for, latencies aside."""

    candidate: Candidate
    demand: Demand
    alone: Latencies
    replicas: int
    price: Fleet | None

    def sort_key(self) -> sizing.Rank:
        """Cheapest first, the unpriced last and by devices; of equals the one that keeps more of the model."""
        return sizing.rank(self.candidate, self.price, self.replicas)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """Everything that was looked at: designs that keep the limits, candidates that miss one, are passed over, or are too small."""

    designs: tuple[Design, ...]
    missed: tuple[tuple[Bound, float, Limit], ...]  # with value / limit of a request alone
    passed_over: tuple[Bound, ...]
    misfits: tuple[Misfit, ...]
    unconfirmed: tuple[Design, ...] = ()  # kept by theory, missed by simulation at every number of replicas tried
    limits: SLO = ()  # what was asked for


def bounds(request: Request, fitting: Sequence[Candidate], traffic: Demand) -> tuple[list[Bound], list[Misfit]]:
    """Return every candidate with the least it can cost, cheapest first; and those whose cache holds no average request."""
    totals = np.sort(traffic.prompt + traffic.output)
    served: dict[int, Demand] = {}  # by how many of the sample a replica can hold
    alike: dict[int, list[Candidate]] = {}
    misfits = []
    for candidate in fitting:
        held = int(np.searchsorted(totals, min(candidate.limits.max_context, candidate.kv_tokens), side="right"))
        if held not in served:
            served[held] = traffic.fitting(candidate.limits)
        if served[held].share <= 0 or memory_slots(candidate.limits, served[held]) < 1:
            why_not = f"no room for an average request: {candidate.memory}"
            if candidate.rank_tokens > candidate.limits.max_context < totals[0]:
                why_not = f"the shortest request has {totals[0]:,.0f} tokens, {TOO_LONG} of {candidate.limits.max_context:,}"
            misfits.append(Misfit(gpu=candidate.gpu, layout=candidate.layout, why_not=why_not))
        else:
            alike.setdefault(held, []).append(candidate)
    found = [bound for held, some in alike.items() for bound in _bounds(request, some, served[held])]
    place = {id(candidate): i for i, candidate in enumerate(fitting)}
    return sorted(found, key=lambda bound: (bound.sort_key(), place[id(bound.candidate)])), misfits


def _bounds(request: Request, some: Sequence[Candidate], served: Demand) -> Iterator[Bound]:
    """Yield the bounds of candidates that serve the same requests."""
    clocks, shelf = screen.Clocks([candidate.profile for candidate in some]), request.shelf
    widest = [candidates.widest(request, candidate) for candidate in some]
    most_per_s = np.maximum(clocks.most_per_s([candidate.limits for candidate in some], served), clocks.most_per_s(widest, served))
    for candidate, rate_per_s, alone in zip(some, most_per_s.tolist(), clocks.alone(widest, served), strict=True):
        replicas = sizing.fewest(rate_per_s, request.workload.rate_per_s * served.share, request.headroom)
        price = sizing.price(candidate, replicas, shelf)
        yield Bound(candidate=candidate, demand=served, alone=alone, replicas=replicas, price=price)


def search(request: Request, found: Sequence[Bound], misfits: Sequence[Misfit], enough: int) -> Search:
    """Return the designs of a search that goes on until `enough` are known that nothing left can beat."""
    designs: dict[int, Design] = {}
    ranks: list[sizing.Rank] = []  # of the designs, in order
    missed: dict[int, tuple[Bound, float, Limit]] = {}
    passed_over: dict[int, Bound] = {}
    for i, bound in enumerate(found):
        excess, limit = sizing.worst(bound.alone, request.slo)
        if limit is not None and excess > SURELY:
            missed[i] = (bound, excess, limit)
        elif len(ranks) >= enough and ranks[enough - 1] <= bound.sort_key():  # as many cost no more than its least
            passed_over[i] = bound
        elif (design := _sized(request, bound, bound.candidate)) is not None:
            designs[i] = design
            bisect.insort(ranks, design.sort_key())
        elif limit is not None:
            missed[i] = (bound, max(excess, 1.0), limit)
    _tune(request, {i: found[i] for i in sorted({*designs, *missed}) if i not in missed or missed[i][1] <= SURELY}, designs, enough)
    return Search(
        designs=tuple(sorted(designs.values(), key=Design.sort_key)),
        missed=tuple(miss for i, miss in missed.items() if i not in designs),
        passed_over=tuple(passed_over.values()),
        misfits=tuple(misfits),
        limits=request.slo,
    )


def _sized(request: Request, bound: Bound, candidate: Candidate) -> Design | None:
    """Return the candidate's design, or None where even an idle replica misses a limit."""
    replica = Replica(candidate.profile, candidate.limits, bound.demand)
    rate_per_s = request.workload.rate_per_s * bound.demand.share
    return sizing.size(candidate, replica, request.slo, rate_per_s, request.headroom, request.shelf)


# ---------------------------------------------------------------- engine settings


def _tune(request: Request, looked_at: Mapping[int, Bound], designs: dict[int, Design], enough: int) -> None:
    """Give the candidates that could still be cheaper than the best design better engine settings, in place."""
    for i, bound in itertools.islice(looked_at.items(), TUNED):
        keys = sorted(design.sort_key() for design in designs.values())
        if keys and keys[0] <= bound.sort_key():
            break
        most = _most(request, bound, keys[enough - 1] if len(keys) >= enough else None)
        if i in designs:
            most = min(most or designs[i].replicas, designs[i].replicas - 1, int(designs[i].replicas / WORTHWHILE))
        setting = None if most is not None and most < bound.replicas else _better_setting(request, bound, most)
        design = None if setting is None else _sized(request, bound, setting)
        if design is not None and (i not in designs or design.replicas < designs[i].replicas):
            designs[i] = design


def _most(request: Request, bound: Bound, rank: sizing.Rank | None) -> int | None:
    """Return the most replicas with which the candidate still comes before a rank; None for any number."""
    if rank is None or (rank[0] and bound.price is not None):  # whatever has a price comes before what has none
        return None

    def comes_before(replicas: int) -> bool:
        return sizing.rank(bound.candidate, sizing.price(bound.candidate, replicas, request.shelf), replicas) < rank

    few, many = bound.replicas, bound.replicas + 1  # the first does
    while comes_before(many):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if comes_before(middle) else (few, middle)
    return few


def _better_setting(request: Request, bound: Bound, most: int | None) -> Candidate | None:
    """Return the setting that takes the fewest replicas at a rough look, None where none keeps the limits with `most` of them.

    Other steps are tried first, then other batches with the steps that came nearest.
    """
    found: Candidate | None = None
    middle, nearest = bound.candidate, _Look(request, bound, bound.candidate).excess(most)
    for batches in (False, True):
        for setting in candidates.settings(request, middle, batches):
            look = _Look(request, bound, setting)
            excess = math.inf if most == 0 else look.excess(most)
            if excess < 1:
                found, middle, nearest, most = setting, setting, 1.0, look.needed(most) - 1
            elif excess < nearest:
                middle, nearest = setting, excess
    return found


class _Look:
    """A rough look at a setting."""

    def __init__(self, request: Request, bound: Bound, setting: Candidate) -> None:
        self.replica = Replica(setting.profile, setting.limits, bound.demand, samples=_ROUGH)
        self.slo, self.rate_per_s = request.slo, request.workload.rate_per_s * bound.demand.share
        self.least = sizing.fewest(self.replica.capacity_per_s, self.rate_per_s, request.headroom)

    def excess(self, replicas: int | None) -> float:
        """Return the largest value / limit of so many replicas, of idle ones for None; infinity where headroom is gone."""
        if replicas is not None and replicas < self.least:
            return math.inf
        rate_per_s = sizing.IDLE * self.replica.capacity_per_s if replicas is None else self.rate_per_s / replicas
        return sizing.worst(self.replica.predict(rate_per_s), self.slo)[0]

    def needed(self, most: int | None) -> int:
        """Return the fewest replicas where `most` are enough."""
        found = sizing.needed(self.replica, self.slo, self.rate_per_s, self.least, most)
        assert found is not None
        return found[0]
