"""From a request to a plan: what fits -> what theory says -> what simulation confirms -> what it costs, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mlsys_bench import models, pricing, slo
from mlsys_bench.errors import Infeasible
from mlsys_bench.plan import candidates, confirm, demand, floors, intervals, sizing, words
from mlsys_bench.plan.analytic import Replica, memory_slots
from mlsys_bench.plan.candidates import Candidate, Misfit
from mlsys_bench.plan.confirm import Trial
from mlsys_bench.plan.demand import Demand
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import Request, check
from mlsys_bench.plan.search import Bound, Search
from mlsys_bench.plan.sizing import Design
from mlsys_bench.types import SLO, FleetItem, Limit, Plan, Provenance

CONFIRMED = 3  # designs that are simulated at most


def plan(request: Request) -> Plan:
    """Return the cheapest fleet that serves the traffic within the limits.

    Raises BadInput (a limit below the physics floor of every candidate is one), Infeasible when no candidate keeps the limits, and
    NotComparable for a profile of another layout.
    """
    check(request)
    fitting, misfits = candidates.every(request)
    traffic = demand.of(request.workload)
    bounds, too_small = _bounds(request, fitting, traffic)
    misfits = (*misfits, *too_small)
    if not bounds:
        raise Infeasible(words.nothing_fits(request, misfits))
    floors.check(request.slo, [b.candidate for b in bounds], traffic)
    search, trial = _decide(request, bounds, misfits)
    return _assemble(request, search, search.designs[0], trial)


def _decide(request: Request, bounds: Sequence[Bound], misfits: Sequence[Misfit]) -> tuple[Search, Trial]:
    """Return the search with its designs as simulation left them, the winner first, and the winner's simulation.

    Only when simulation makes the few that were sized dearer than one passed over, all are sized.
    """
    for enough in sorted({CONFIRMED, max(CONFIRMED, len(bounds))}):
        search = _search(request, bounds, misfits, enough)
        if not search.designs:
            raise Infeasible(words.nothing_meets(search))
        judged, trial = _confirm(request, search)
        if trial is not None and not any(bound.sort_key() < judged.designs[0].sort_key() for bound in judged.passed_over):
            break
    if trial is None:
        raise Infeasible(words.nothing_confirmed(request, search))
    return judged, trial


# ---------------------------------------------------------------- theory


def _bounds(request: Request, fitting: Sequence[Candidate], traffic: Demand) -> tuple[list[Bound], list[Misfit]]:
    """Return every candidate with its capacity, cheapest possible first; and those whose cache holds no average request."""
    bounds, misfits = [], []
    for candidate in fitting:
        served = traffic.fitting(candidate.limits)
        if served.share <= 0 or memory_slots(candidate.limits, served) < 1:
            why_not = f"no room for an average request: {candidate.memory}"
            misfits.append(Misfit(gpu=candidate.gpu, precision=candidate.precision, tp=candidate.tp, why_not=why_not))
            continue
        replica = Replica(candidate.profile, candidate.limits, served)
        replicas = sizing.fewest(replica, _served_per_s(request, replica), request.headroom)
        price = sizing.price(candidate, replicas, request.term)
        bounds.append(Bound(candidate=candidate, replica=replica, replicas=replicas, usd_per_h=price.usd_per_h if price else None))
    return sorted(bounds, key=Bound.sort_key), misfits


def _served_per_s(request: Request, replica: Replica) -> float:
    return request.workload.rate_per_s * replica.demand.share


def _search(request: Request, bounds: Sequence[Bound], misfits: Sequence[Misfit], enough: int) -> Search:
    """Size candidates in order of the least they can cost, until that exceeds what enough designs do cost: none beyond can be better."""
    designs: list[Design] = []
    missed: list[tuple[Bound, float, Limit]] = []
    passed_over: list[Bound] = []
    for bound in bounds:
        if _cannot_win(bound, designs, enough):
            passed_over.append(bound)
            continue
        rate_per_s = _served_per_s(request, bound.replica)
        design = sizing.size(bound.candidate, bound.replica, request.slo, rate_per_s, request.headroom, request.term)
        if design is not None:
            designs.append(design)
        else:
            excess, limit = sizing.worst(sizing.idle(bound.replica), request.slo)
            assert limit is not None
            missed.append((bound, excess, limit))
    designs.sort(key=Design.sort_key)
    return Search(designs=tuple(designs), missed=tuple(missed), passed_over=tuple(passed_over), misfits=tuple(misfits))


def _cannot_win(bound: Bound, designs: Sequence[Design], enough: int) -> bool:
    """Say whether enough designs are known that cost no more than this candidate's least."""
    keys = sorted(design.sort_key() for design in designs)
    return len(keys) >= enough and keys[enough - 1] <= bound.sort_key()


# ---------------------------------------------------------------- simulation


def _confirm(request: Request, search: Search) -> tuple[Search, Trial | None]:
    """Return the search with designs resized by simulation, best first, those it refused apart; and the best one's simulation.

    A design is simulated only if it could still be cheaper than the best confirmed one: theory may be too pessimistic about it,
    so it counts with the replicas that its capacity asks for.
    """
    confirmed: list[tuple[Design, Trial]] = []
    unconfirmed: list[Design] = []
    left: list[Design] = []
    for design in search.designs:
        best = min(confirmed, key=lambda c: c[0].sort_key(), default=None)
        if best is not None and (len(confirmed) >= CONFIRMED or not _could_beat(design, best[0], request.term)):
            left.append(design)
            continue
        found = confirm.confirm(design, request.workload, request.slo, request.term, request.seed)
        if found is None:
            unconfirmed.append(design)
        else:
            confirmed.append(found)
    if not confirmed:
        return dataclasses.replace(search, designs=(), unconfirmed=tuple(unconfirmed)), None
    confirmed.sort(key=lambda c: c[0].sort_key())
    winner, trial = confirmed[0]
    others = sorted([*(design for design, _ in confirmed[1:]), *left], key=Design.sort_key)
    return dataclasses.replace(search, designs=(winner, *others), unconfirmed=tuple(unconfirmed)), trial


def _could_beat(design: Design, best: Design, term: str) -> bool:
    return sizing.resized(design, min(design.fewest, design.replicas), term).sort_key() < best.sort_key()


# ---------------------------------------------------------------- the answer


def _assemble(request: Request, search: Search, design: Design, trial: Trial) -> Plan:
    candidate, limits = design.candidate, request.slo
    latencies = design.replica.predict(design.each_per_s)
    analytic = _analytic(design, latencies, limits)
    predicted = trial.keys(limits)
    spread = intervals.of(design, trial, analytic, limits, request.headroom, request.term, request.seed)
    usd = design.price.usd_per_h if design.price else None
    return Plan(
        model=models.find(request.model).id,
        workload=request.workload,
        slo=slo.show(limits),
        fleet=(_fleet_item(design),),
        replicas=design.replicas,
        gpus=design.devices,
        gpu=candidate.gpu,
        devices_per_replica=candidate.tp,
        usd_per_hour=usd,
        usd_per_month=None if usd is None else pricing.usd_per_month(usd),
        usd_per_million_tokens=None if usd is None else _usd_per_million(usd, design),
        utilisation=design.replica.utilisation(design.each_per_s),
        binding_constraint=_binding(request, design, predicted),
        headroom=_headroom(design, limits, predicted, analytic),
        provenance=_provenance(design),
        predicted=predicted,
        intervals=_with_cost_per_token(spread.intervals, design),
        analytic=analytic,
        alternatives=tuple(words.alternatives(request, search, design)),
        profile=candidate.profile,
        capacity_per_replica_per_s=design.replica.capacity_per_s,
        max_batch=candidate.limits.max_seqs,
        kv_tokens_per_replica=candidate.kv_tokens,
        assumptions=tuple(words.assumptions(request, design)),
        prices=() if design.price is None else (design.price.offer,),
        notes=tuple(words.notes(request, search, design, trial, spread)),
    )


def _analytic(design: Design, latencies: Latencies, limits: SLO) -> dict[str, float]:
    rates = {
        "throughput_tokens_per_s": design.each_per_s * design.replica.demand.mean_output,
        "request_rate_per_s": design.each_per_s,
    }
    return latencies.keys(limits) | rates


def _fleet_item(design: Design) -> FleetItem:
    candidate, price = design.candidate, design.price
    return FleetItem(
        stage="llm",
        gpu=candidate.gpu,
        precision=candidate.precision,
        tp=candidate.tp,
        pp=1,
        replicas=design.replicas,
        instances=price.instances if price else design.replicas,
        instance=f"{price.offer.provider} {price.offer.instance}" if price else None,
        usd_per_hour=price.usd_per_h if price else None,
    )


def _usd_per_million(usd: float, design: Design) -> float:
    """Return the price of a million output tokens at the average load, idle time paid for."""
    return pricing.usd_per_million_tokens(usd, design.rate_per_s * design.replica.demand.mean_output)


def _with_cost_per_token(found: dict[str, tuple[float, float]], design: Design) -> dict[str, tuple[float, float]]:
    if "usd_per_hour" not in found:
        return found
    low, high = (_usd_per_million(usd, design) for usd in found["usd_per_hour"])
    month = tuple(pricing.usd_per_month(usd) for usd in found["usd_per_hour"])
    return {**found, "usd_per_month": (month[0], month[1]), "usd_per_million_tokens": (low, high)}


def _provenance(design: Design) -> Provenance:
    inputs = [design.candidate.profile.provenance]
    return Provenance.weakest(*inputs, *([design.price.offer.provenance] if design.price else []))


def _binding(request: Request, design: Design, predicted: dict[str, float]) -> str:
    """Return what keeps the fleet from being one replica smaller."""
    if design.replicas == 1:
        return "the smallest fleet (1 replica)"
    if design.replicas > design.fewest:
        limit = design.binds or _nearest(request.slo, predicted)
        if limit is not None:
            return slo.show_limit(limit)
    what = sizing.bottleneck(design)
    return f"{100 * request.headroom:g} % headroom over {what}" if request.headroom > 1 - sizing.MOST else what


def _nearest(limits: SLO, predicted: dict[str, float]) -> Limit | None:
    """Return the limit that the prediction comes nearest to."""
    shares = [(predicted.get(f"{slo.key(limit)}_s", 0.0) / limit.limit, limit) for limit in slo.latencies(limits)]
    return max(shares, key=lambda s: s[0], default=(0.0, None))[1]


def _headroom(design: Design, limits: SLO, predicted: dict[str, float], analytic: dict[str, float]) -> float:
    """Return the extra traffic, as a share, until a limit breaks or replicas saturate: theory, scaled to agree with simulation today."""
    corrections = confirm.corrections(predicted, analytic, limits)
    most_per_s, _ = sizing.highest_rate(design.replica, slo.latencies(limits), sizing.MOST, corrections)
    return max(0.0, most_per_s / design.each_per_s - 1)
