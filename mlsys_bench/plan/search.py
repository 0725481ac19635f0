"""Which candidates theory takes to be best: looked at in order of the least they can cost, until that exceeds what enough do cost.

A few readings of its clock (`screen`) bound what a candidate can do, so that of hundreds some ten are worked out in full.  Where the
engine's settings are open, the defaults are tried first; candidates whose bound is still below the best design get other steps, then other
batches: smaller steps shorten gaps between tokens, smaller batches all of TPOT, larger ones carry more.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlsys_bench.plan import candidates, screen, sizing
from mlsys_bench.plan.analytic import Replica, memory_slots
from mlsys_bench.plan.candidates import Candidate, Misfit
from mlsys_bench.plan.demand import Demand
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.pricing import Fleet
from mlsys_bench.types import Limit

SURELY = 1.25  # times a limit: what even a request alone exceeds so far is missed without further question
TUNED = 4  # candidates whose engine settings are searched
WORTHWHILE = 1.03  # another setting carries that much more, or the default stays
_ROUGH = 256  # samples of a first look at a setting
_HALVINGS = 6  # of its highest rate


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


def bounds(request: Request, fitting: Sequence[Candidate], traffic: Demand) -> tuple[list[Bound], list[Misfit]]:
    """Return every candidate with the least it can cost, cheapest first; and those whose cache holds no average request."""
    found, misfits = [], []
    for candidate in fitting:
        served = traffic.fitting(candidate.limits)
        if served.share <= 0 or memory_slots(candidate.limits, served) < 1:
            why_not = f"no room for an average request: {candidate.memory}"
            misfits.append(Misfit(gpu=candidate.gpu, layout=candidate.layout, why_not=why_not))
        else:
            found.append(_bound(request, candidate, served))
    return sorted(found, key=Bound.sort_key), misfits


def _bound(request: Request, candidate: Candidate, served: Demand) -> Bound:
    widest = candidates.widest(request, candidate)
    most_per_s = max(screen.most_per_s(candidate.profile, limits, served) for limits in {candidate.limits, widest})
    replicas = sizing.fewest(most_per_s, request.workload.rate_per_s * served.share, request.headroom)
    price = sizing.price(candidate, replicas, request.shelf)
    alone = screen.alone(candidate.profile, widest, served)
    return Bound(candidate=candidate, demand=served, alone=alone, replicas=replicas, price=price)


def search(request: Request, found: Sequence[Bound], misfits: Sequence[Misfit], enough: int) -> Search:
    """Return the designs of a search that goes on until `enough` are known that nothing left can beat."""
    designs: dict[int, Design] = {}
    missed: dict[int, tuple[Bound, float, Limit]] = {}
    passed_over: dict[int, Bound] = {}
    for i, bound in enumerate(found):
        excess, limit = sizing.worst(bound.alone, request.slo)
        if limit is not None and excess > SURELY:
            missed[i] = (bound, excess, limit)
        elif _cannot_win(bound, designs.values(), enough):
            passed_over[i] = bound
        elif (design := _sized(request, bound, bound.candidate)) is not None:
            designs[i] = design
        elif limit is not None:
            missed[i] = (bound, max(excess, 1.0), limit)
    _tune(request, {i: found[i] for i in sorted({*designs, *missed}) if i not in missed or missed[i][1] <= SURELY}, designs)
    return Search(
        designs=tuple(sorted(designs.values(), key=Design.sort_key)),
        missed=tuple(miss for i, miss in missed.items() if i not in designs),
        passed_over=tuple(passed_over.values()),
        misfits=tuple(misfits),
    )


def _cannot_win(bound: Bound, designs: Iterable[Design], enough: int) -> bool:
    """Say whether enough designs are known that cost no more than this candidate's least."""
    keys = sorted(design.sort_key() for design in designs)
    return len(keys) >= enough and keys[enough - 1] <= bound.sort_key()


def _sized(request: Request, bound: Bound, candidate: Candidate) -> Design | None:
    """Return the candidate's design, or None where even an idle replica misses a limit."""
    replica = Replica(candidate.profile, candidate.limits, bound.demand)
    rate_per_s = request.workload.rate_per_s * bound.demand.share
    return sizing.size(candidate, replica, request.slo, rate_per_s, request.headroom, request.shelf)


# ---------------------------------------------------------------- engine settings


def _tune(request: Request, looked_at: Mapping[int, Bound], designs: dict[int, Design]) -> None:
    """Give the candidates that could still be cheaper than the best design better engine settings, in place."""
    for i, bound in itertools.islice(looked_at.items(), TUNED):
        best = min((design.sort_key() for design in designs.values()), default=None)
        if best is not None and best <= bound.sort_key():
            break
        carries = designs[i].most_per_s if i in designs else 0.0
        setting = _better_setting(request, bound, carries)
        design = None if setting is None else _sized(request, bound, setting)
        if design is not None and design.most_per_s > carries:
            designs[i] = design


def _better_setting(request: Request, bound: Bound, carries_per_s: float) -> Candidate | None:
    """Return the setting that carries most at a rough look, other steps first, then other batches; None where the default does."""
    best: tuple[float, Candidate | None] = (carries_per_s * WORTHWHILE, None)
    for batches in (False, True):
        middle = best[1] or bound.candidate
        for setting in candidates.settings(request, middle, batches):
            replica = Replica(setting.profile, setting.limits, bound.demand, samples=_ROUGH)
            rate, _ = sizing.highest_rate(replica, request.slo, sizing.usable(request.headroom), halvings=_HALVINGS)
            best = max(best, (rate, setting), key=lambda b: b[0])
    return best[1]
