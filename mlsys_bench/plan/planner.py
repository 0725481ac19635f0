"""From a request to a plan: what fits -> what theory says -> what simulation confirms -> what it costs, with intervals."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from concurrent.futures import Executor

from mlsys_bench import jit, models, pricing, slo
from mlsys_bench.errors import Infeasible
from mlsys_bench.plan import candidates, confirm, demand, floors, frontier, intervals, search, sizing, words
from mlsys_bench.plan.ahead import Ahead
from mlsys_bench.plan.candidates import Misfit
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import Request, check, whole_only
from mlsys_bench.plan.search import Bound, Search
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial, corrections
from mlsys_bench.pricing import Shelf
from mlsys_bench.types import SLO, FleetItem, Limit, Plan, Provenance

CONFIRMED = 3  # designs that are simulated at most
WIDE = 0.1  # of the replicas


def plan(request: Request, executor: Executor | None = None) -> Plan:
    """Return the cheapest fleet that serves the traffic within the limits; an executor confirms several designs at a time.

    Raises BadInput (a limit below the physics floor of every candidate is one), Infeasible when no candidate keeps the limits, and
    NotComparable for a profile of another layout.
    """
    check(request)
    other = whole_only(request)
    if request.disaggregate == "auto" and other is not None:
        made = plan(dataclasses.replace(request, disaggregate="never"), executor)
        note = f"prefill and decode on pools of their own are not weighed together with {other}"
        return dataclasses.replace(made, notes=(*made.notes, note))
    if request.workload.tenants or any(limit.tenant is not None for limit in request.slo):
        from mlsys_bench.plan import tenants

        return tenants.plan(request, functools.partial(planned, executor=executor))
    return planned(request, executor)[0]


def planned(request: Request, executor: Executor | None = None) -> tuple[Plan, Design, Trial]:
    """Return the plan of one fleet, its design and its simulation."""
    fitting, misfits = candidates.every(request)
    traffic = demand.of(request.workload) if request.trace is None else demand.of_trace(request.trace)
    bounds, too_small = search.bounds(request, fitting, traffic)
    misfits = (*misfits, *too_small)
    if not bounds:
        raise Infeasible(words.nothing_fits(request, misfits))
    floors.check(request.slo, [b.candidate for b in bounds], traffic)
    whole = functools.partial(_whole, request, bounds, misfits, executor)
    if request.disaggregate == "never":
        return whole()
    from mlsys_bench.plan import disaggregated

    return disaggregated.weighed(request, bounds, traffic, whole)


def _whole(
    request: Request, bounds: Sequence[Bound], misfits: Sequence[Misfit], executor: Executor | None
) -> tuple[Plan, Design, Trial]:  # fmt: skip
    """Return the plan of replicas that prefill and decode, its design and its simulation."""
    found, trial = _surer(request, *_decide(request, bounds, misfits, executor))
    winner = found.designs[0]
    if winner.price is None:
        sizing.order(winner.candidate, winner.replicas, request.shelf)  # raises where quotas are why it has no price
    made = _surrounded(request, winner, _assemble(request, found, winner, trial))
    if not request.mixed:
        return made, winner, trial
    from mlsys_bench.plan import pools

    return pools.beside(made, request, bounds, winner), winner, trial


def _decide(
    request: Request, bounds: Sequence[Bound], misfits: Sequence[Misfit], executor: Executor | None
) -> tuple[Search, Trial]:  # fmt: skip
    """Return the search with its designs as simulation left them, the winner first, and the winner's simulation.

    Only when simulation makes the few that were sized dearer than one passed over, all are sized.
    """
    for enough in sorted({CONFIRMED, max(CONFIRMED, len(bounds))}):
        found = search.search(request, bounds, misfits, enough)
        if not found.designs:
            raise Infeasible(words.nothing_meets(found))
        judged, trial = _confirm(request, found, executor)
        if trial is not None and not any(bound.sort_key() < judged.designs[0].sort_key() for bound in judged.passed_over):
            break
    if trial is None:
        raise Infeasible(words.nothing_confirmed(request, found))
    return judged, trial


# ---------------------------------------------------------------- simulation


def _surer(request: Request, found: Search, trial: Trial) -> tuple[Search, Trial]:
    """Return the search with its winner held against longer simulations, and the one of the winner, which is what the plan shows.

    Where they ask for more replicas than the short one did, and that makes the next design the cheaper one, it is held against them too.
    """
    if request.trace is not None:
        return found, trial
    longer = trial if trial.effort >= confirm.surest() else confirm.trial(request, found.designs[0], confirm.surest())
    judged: list[tuple[Design, Trial]] = []
    missing: list[Design] = []
    for i, design in enumerate(found.designs[:CONFIRMED]):
        if judged and not design.sort_key() < min(d.sort_key() for d, _ in judged):
            break
        one = _longer(request, design, trial, longer) if i == 0 else confirm.confirm(design, request, confirm.surest())
        if one is None:
            missing.append(design)
        else:
            judged.append(one)
    if not judged:
        return found, longer  # none keeps its limits for so long: the plan shows which it misses
    judged.sort(key=lambda each: each[0].sort_key())
    left = found.designs[len(judged) + len(missing) :]
    others = sorted([*(design for design, _ in judged[1:]), *left], key=Design.sort_key)
    unconfirmed = (*found.unconfirmed, *missing)
    return dataclasses.replace(found, designs=(judged[0][0], *others), unconfirmed=unconfirmed), judged[0][1]


def _longer(request: Request, winner: Design, trial: Trial, longer: Trial) -> tuple[Design, Trial] | None:
    """Return the winner with its longer simulation; resized by such runs where it misses a limit there, or its replicas are uncertain.

    The latter only where simulation is compiled (extra `fast`); if that leaves them uncertain, by still longer runs.
    """
    uncertain = jit.HAVE_NUMBA and _is_wide(winner, trial, request)
    if not uncertain and confirm.keeps(winner, longer, request.slo):
        return winner, longer
    found = confirm.confirm(winner, request, confirm.surest(), {winner.replicas: longer})
    if found is not None and confirm.can_be_surer(*found) and _is_wide(*found, request):
        return confirm.confirm(found[0], request, confirm.SUREST)
    return found


def _is_wide(design: Design, trial: Trial, request: Request) -> bool:
    low, high = intervals.of(design, trial, _theory(design, request), request).intervals["replicas"]
    return high - low > max(1.0, WIDE * high)


def _theory(design: Design, request: Request) -> dict[str, float]:
    """Return what theory says of a law of arrivals."""
    return _analytic(design, design.replica.predict(design.each_per_s), request.slo)


def _confirm(request: Request, found: Search, executor: Executor | None) -> tuple[Search, Trial | None]:
    """Return the search with designs resized by simulation, best first, those it refused apart; and the best one's simulation.

    A design is simulated only if it could still be cheaper than the best confirmed one: theory may be too pessimistic about it,
    so it counts with the replicas that its capacity asks for.
    """
    confirmed: list[tuple[Design, Trial]] = []
    unconfirmed: list[Design] = []
    left: list[Design] = []
    judge = Ahead(request, found.designs, executor)
    for i, design in enumerate(found.designs):
        best = min((d for d, _ in confirmed), key=Design.sort_key, default=None)
        may_win = functools.partial(_could_beat, best=best, shelf=request.shelf)
        if len(confirmed) >= CONFIRMED or not may_win(design):
            left.append(design)
            continue
        judged = judge.confirmed(i, CONFIRMED - len(confirmed) - 1, may_win)
        if judged is None:
            unconfirmed.append(design)
        else:
            confirmed.append(judged)
    if not confirmed:
        return dataclasses.replace(found, designs=(), unconfirmed=tuple(unconfirmed)), None
    confirmed.sort(key=lambda c: c[0].sort_key())
    winner, trial = confirmed[0]
    others = sorted([*(design for design, _ in confirmed[1:]), *left], key=Design.sort_key)
    return dataclasses.replace(found, designs=(winner, *others), unconfirmed=tuple(unconfirmed)), trial


def _could_beat(design: Design, best: Design | None, shelf: Shelf) -> bool:
    return best is None or sizing.resized(design, min(design.fewest, design.replicas), shelf).sort_key() < best.sort_key()


# ---------------------------------------------------------------- the answer


def _assemble(request: Request, found: Search, design: Design, trial: Trial) -> Plan:
    candidate, limits = design.candidate, request.slo
    analytic = {} if request.trace is not None else _theory(design, request)  # theory knows a trace's mean only
    predicted = trial.keys(limits)
    spread = intervals.of(design, trial, analytic, request)
    usd = design.price.usd_per_h if design.price else None
    return Plan(
        model=models.find(request.model).id,
        workload=request.workload,
        slo=slo.show(limits),
        fleet=(fleet_item(design),),
        replicas=design.replicas,
        gpus=design.devices,
        gpu=candidate.gpu,
        devices_per_replica=candidate.devices,
        usd_per_hour=usd,
        usd_per_month=None if usd is None else pricing.usd_per_month(usd),
        usd_per_million_tokens=None if usd is None else _usd_per_million(usd, design, request),
        utilisation=design.replica.utilisation(design.each_per_s),
        binding_constraint=_binding(request, design, predicted),
        headroom=_headroom(request, design, predicted, analytic),
        provenance=_provenance(design),
        predicted=predicted,
        intervals=_with_cost_per_token(spread.intervals, design, request),
        analytic=analytic,
        alternatives=tuple(words.alternatives(request, found, design)),
        frontier=frontier.of(request, found, design, predicted),
        profile=candidate.profile,
        capacity_per_replica_per_s=design.replica.capacity_per_s,
        max_batch=candidate.limits.max_seqs,
        max_step_tokens=candidate.limits.max_step_tokens,
        kv_tokens_per_replica=candidate.kv_tokens,
        assumptions=tuple(words.assumptions(request, design)),
        prices=() if design.price is None else tuple(lot.offer for lot in design.price.lots),
        notes=(
            *words.notes(request, found, design, trial, spread),
            *intervals.beyond(design, spread.intervals["replicas"], request.shelf),
        ),
        day_mean_per_s=request.day_mean_per_s,
    )


def _surrounded(request: Request, design: Design, made: Plan) -> Plan:
    """Return the plan with its spares and what else was asked for around it: loaded only then."""
    if request.spares is not None:
        from mlsys_bench.plan import spare

        made = spare.with_spares(made, request, design)
    if request.spares is None and request.day is None and request.growth is None and not request.around:
        return made
    from mlsys_bench.plan import around

    scaling = corrections(made.survivors or made.predicted, made.analytic, request.slo)
    each_per_s = sizing.carried_per_s(design, request.slo, request.headroom, scaling)
    return around.surrounded(made, request, lambda rate_per_s: max(1, math.ceil(rate_per_s / each_per_s - 1e-9)))


def _analytic(design: Design, latencies: Latencies, limits: SLO) -> dict[str, float]:
    rates = {
        "throughput_tokens_per_s": design.each_per_s * design.replica.demand.mean_output,
        "request_rate_per_s": design.each_per_s,
    }
    return latencies.keys(limits) | rates


def fleet_item(design: Design, stage: str = "llm") -> FleetItem:
    """Return a design as an item of a fleet."""
    candidate, price = design.candidate, design.price
    return FleetItem(
        stage=stage,
        gpu=candidate.gpu,
        precision=candidate.precision,
        tp=candidate.tp,
        pp=candidate.layout.pp,
        ep=candidate.layout.ep,
        attention_dp=candidate.layout.attention_dp,
        replicas=design.replicas,
        instances=price.instances if price else design.replicas,
        instance=price.instance if price else None,
        usd_per_hour=price.usd_per_h if price else None,
        devices=price.devices if price else None,
    )


def _usd_per_million(usd: float, design: Design, request: Request) -> float:
    """Return the price of a million output tokens at the average load of the day, idle time paid for."""
    return pricing.usd_per_million_tokens(usd, request.usual_share * design.rate_per_s * design.replica.demand.mean_output)


def _with_cost_per_token(
    found: dict[str, tuple[float, float]], design: Design, request: Request
) -> dict[str, tuple[float, float]]:  # fmt: skip
    if "usd_per_hour" not in found:
        return found
    low, high = (_usd_per_million(usd, design, request) for usd in found["usd_per_hour"])
    month = tuple(pricing.usd_per_month(usd) for usd in found["usd_per_hour"])
    return {**found, "usd_per_month": (month[0], month[1]), "usd_per_million_tokens": (low, high)}


def _provenance(design: Design) -> Provenance:
    inputs = [design.candidate.profile.provenance]
    return Provenance.weakest(*inputs, *(offer.offer.provenance for offer in (design.price.lots if design.price else ())))


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


def _headroom(request: Request, design: Design, predicted: dict[str, float], analytic: dict[str, float]) -> float:
    """Return the extra traffic, as a share, until a limit breaks or replicas saturate: theory, scaled to agree with simulation today.

    A trace is played faster instead, until a limit breaks.
    """
    limits = request.slo
    if request.trace is not None:
        return confirm.headroom(design, request, request.trace)
    most_per_s, _ = sizing.highest_rate(design.replica, slo.latencies(limits), sizing.MOST, corrections(predicted, analytic, limits))
    return max(0.0, most_per_s / design.each_per_s - 1)
