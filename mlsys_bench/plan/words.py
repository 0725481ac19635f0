"""What a plan says of itself in words: alternatives, assumptions, notes, and why there is no plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from mlsys_bench import jit, latency, models, slo, units
from mlsys_bench.batching import Limits
from mlsys_bench.plan import confirm, intervals, sizing
from mlsys_bench.plan.candidates import Candidate, Misfit
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.request import MAX_BATCH, Request
from mlsys_bench.plan.search import TOO_LONG, Bound, Search
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial
from mlsys_bench.pricing import Fleet, Shelf
from mlsys_bench.types import SLO, Alternative, Limit, Provenance

LISTED = 12  # alternatives in a plan
RECLAIMED = "spot replicas of a pool are reclaimed together: this plan promises nothing while they are away; --availability does"
NEAR_IDLE = 1.5  # times the latency without traffic: a limit below that hardly depends on the load


def alternatives(request: Request, search: Search, best: Design) -> Iterator[Alternative]:
    """Yield the next best and the others, each with why it is not the plan: priced ones by cost, then those that cannot."""
    rest: list[Alternative] = [_other_design(design, best, request.shelf) for design in search.designs[1:]]
    rest += [_passed_over(bound, best, request.shelf) for bound in search.passed_over]
    rest += [
        _alternative(d.candidate, None, None, {}, "missed a limit in simulation at every replica count tried") for d in search.unconfirmed
    ]
    rest += [_missed(*miss, request) for miss in sorted(search.missed, key=lambda m: m[1])]
    rest += [misfit.alternative() for misfit in search.misfits]
    for found in rest[:LISTED]:
        beyond = found.why_not.startswith("unpriced") and request.shelf.sells(found.gpu)
        yield dataclasses.replace(found, why_not="more than the quota lets one rent") if beyond else found


def _other_design(design: Design, best: Design, shelf: Shelf) -> Alternative:
    usd = design.price.usd_per_h if design.price else None
    return _alternative(
        design.candidate,
        sizing.rented(design.candidate, design.replicas, shelf),
        usd,
        design.replica.predict(design.each_per_s).keys(()),
        _dearer(design.candidate, design.price, best, design.devices),
    )


def _passed_over(bound: Bound, best: Design, shelf: Shelf) -> Alternative:
    why_not = _dearer(bound.candidate, bound.price, best, bound.replicas * bound.candidate.devices)
    usd = bound.price.usd_per_h if bound.price else None
    replicas = sizing.rented(bound.candidate, bound.replicas, shelf)
    found = _alternative(bound.candidate, replicas, usd, {}, f"at least {why_not}" if usd else why_not)
    return dataclasses.replace(found, is_least=True)


def _missed(bound: Bound, excess: float, limit: Limit, request: Request) -> Alternative:
    why_not = f"{_exceeds(bound.alone, excess, limit, request.slo)} at any replica count"
    return _alternative(bound.candidate, None, None, bound.alone.keys(()), why_not)


def _alternative(candidate: Candidate, replicas: int | None, usd: float | None, predicted: dict[str, float], why_not: str) -> Alternative:
    at = candidate.layout
    return Alternative(
        gpu=candidate.gpu,
        precision=candidate.precision,
        tp=candidate.tp,
        pp=at.pp,
        ep=at.ep,
        attention_dp=at.attention_dp,
        max_batch=candidate.limits.max_seqs,
        max_step_tokens=candidate.limits.max_step_tokens,
        replicas=replicas,
        usd_per_hour=usd,
        predicted=predicted,
        why_not=why_not,
    )


def _dearer(candidate: Candidate, price: Fleet | None, best: Design, devices: int) -> str:
    """Return by how much it costs more than the best, in new money, where some is committed and paid in any case; what else is worse."""
    if price is None:
        return "unpriced" if best.price else "unpriced, more devices"
    if best.price is None:
        return "priced, but not confirmed by simulation"
    more = price.new_usd_per_h - best.price.new_usd_per_h
    if more > 0.005:
        return f"{units.show_usd(more)}/h more"
    if more <= -0.005:
        return "cheaper by theory, missed a limit in simulation"
    if devices > best.devices:
        return "as dear, more devices"
    fewer_bits = models.bytes_per_param(candidate.precision) < models.bytes_per_param(best.candidate.precision)
    return (
        f"as dear; {best.candidate.precision} holds the limits without rounding to {candidate.precision}"
        if fewer_bits
        else "as dear, not better"
    )


def _exceeds(alone: Latencies, excess: float, limit: Limit, limits: SLO) -> str:
    """Return such as 'ttft_p95 0.9 s > 500 ms' of a request alone; or that it is the little load of an idle replica which is too much."""
    if limit.metric == "goodput":
        own = tuple(each for each in limits if each.tenant == limit.tenant)
        value, sign, most = units.show_share(alone.of_tenant(limit.tenant).goodput(own)), "<", units.show_share(limit.limit)
    else:
        value, sign, most = units.show_s(alone.value(limit.metric, limit.stat, limit.tenant)), ">", units.show_s(limit.limit)
    return f"{slo.key(limit)} {value} {sign} {most}" if excess > 1 else f"{slo.key(limit)} {value} alone, beyond {most} beside others"


def nothing_fits(request: Request, misfits: Sequence[Misfit]) -> str:
    """Return why no candidate holds the model."""
    seen = "; ".join(f"{m.name}: {m.why_not}" for m in misfits[-3:]) or "none has a price"
    if misfits and all(TOO_LONG in misfit.why_not for misfit in misfits[-3:]):
        return f"{request.model} serves no such traffic: {seen}; send shorter prompts and answers, or name a model of a longer context"
    large = request.max_batch is not None and request.max_batch > MAX_BATCH
    smaller = f", or a smaller --max-batch (it is {MAX_BATCH} when left out)" if large else ""
    return f"{request.model} runs on no device considered: {seen}; name devices with more memory, or another --precision{smaller}"


def nothing_meets(search: Search) -> str:
    """Return which limit no candidate keeps, by how much the nearest misses it, and what would help."""
    least = min(excess for _, excess, _ in search.missed)
    alike = [miss for miss in search.missed if miss[1] == least]  # such as several of which no request at all is good
    bound, excess, limit = min(alike, key=lambda miss: sizing.worst(miss[0].alone, slo.latencies(search.limits))[0])
    latencies = bound.alone
    if limit.metric == "goodput":
        cause, cure = _failing(latencies, limit, search.limits)
        by = f"{excess:.1f} times the failures allowed{cause}"
    else:
        cure, by = f"allow {units.show_s(limit.limit * excess * 1.05)}", f"{100 * (excess - 1):.0f} % over" if excess > 1 else "only just"
    return (
        f"no candidate keeps {slo.show_limit(limit)} at any replica count: the nearest, {bound.candidate.name}, has "
        f"{_exceeds(latencies, excess, limit, search.limits)} when idle ({by}); {cure}, or name a faster device or precision"
    )


def _failing(latencies: Latencies, goodput: Limit, limits: SLO) -> tuple[str, str]:
    """Return which latency limit requests fail by, as the goodput counts them one by one, and what would help."""
    own = [x for x in slo.latencies(limits) if x.tenant == goodput.tenant and x.metric != "itl"]
    if not own:
        return "", "allow more failures"
    seen = latencies.of_tenant(goodput.tenant)
    first = min(own, key=lambda each: seen.goodput((each,)))
    kept = f"{units.show_share(seen.goodput((first,)))} within the {units.show_s(first.limit)} of {slo.key(first)}"
    needed_s = seen.value(first.metric, f"p{100 * goodput.limit:g}")
    return f": {kept}", "allow more failures" if needed_s is None else f"allow {units.show_s(1.05 * needed_s)} there, or more failures"


def nothing_confirmed(request: Request, search: Search) -> str:
    """Return what to do when theory finds a fleet that simulation refuses."""
    design = search.designs[0]
    return (
        f"no design keeps {slo.show(request.slo)} in simulation; theory found {design.replicas} x {design.candidate.name} "
        f"just within it: loosen the limit nearest to breaking, or name a faster device"
    )


def assumptions(request: Request, design: Design) -> Iterator[str]:
    """Yield what the plan takes for granted."""
    candidate, limits = design.candidate, design.candidate.limits
    if candidate.profile.note:
        yield candidate.profile.note
    yield f"memory: {candidate.memory}"
    yield f"engine: at most {limits.max_seqs} sequences and {limits.max_step_tokens} tokens a step, KV blocks of {limits.block_tokens}"
    routed = "routed at random; a smarter router does better" if request.routing == "random" else f"routed {request.routing}"
    yield f"each replica has its own queue and gets {units.show_rate(design.each_per_s)}, {routed}"
    yield from lucks(request)
    yield "cost per million tokens: output tokens at the average load, idle time and idle devices paid for"
    whose = "over hours of such traffic" if request.trace is None else "for these very requests"
    yield f"intervals hold 90 % of the engines that the profile leaves possible, {whose}; one load test scatters beyond them"
    if request.limits_assumed:
        usual = ", ".join(slo.show_limit(x) for x in request.slo if x.metric != "availability")
        yield f"limits: none were given (--slo); {usual} are assumed"
    if request.workload.source is None and request.workload.provenance is Provenance.ASSUMED:
        yield "the traffic is assumed: rate, arrivals and lengths as given"


def lucks(request: Request) -> Iterator[str]:
    """Yield how a trace is judged whose router draws."""
    if request.trace is not None and request.routing in confirm.DRAWING:
        yield f"where the trace comes near a limit, it is kept with each of {confirm.LUCKS} lucks of the router"


def notes(request: Request, search: Search, design: Design, trial: Trial, spread: intervals.Spread) -> Iterator[str]:
    """Yield what a reader must know before acting on the plan."""
    if shape_note := models.find(request.model).note:
        yield shape_note
    if design.price is None:
        yield f"no {request.term} price is known for {design.candidate.gpu}: designs are ranked by devices"
    else:
        yield from _bought(design.price)
        if request.rent is None and any(lot.offer.term == "spot" for lot in design.price.lots):
            yield RECLAIMED
    yield from request.shelf.market.notes
    yield from request.trace.notes if request.trace is not None else ()
    share = design.replica.demand.share
    if share < 1:
        longest = _longest(design.candidate.limits)
        yield f"{100 * (1 - share):.2g} % of the requests exceed the {longest:,} tokens a replica can hold: refused, not planned for"
    yield from latency.outside(design.candidate.profile, _usual_step(design))
    if trial.preempted > 0.01:
        yield f"{100 * trial.preempted:.0f} % of simulated requests lost their cache to others: the KV pool is tight"
    low, high = spread.intervals["replicas"]
    if low < design.replicas:
        longer = "" if jit.HAVE_NUMBA else " (simulated for longer with the extra `fast`: pip install 'mlsys-bench[fast]')"
        yield f"{low:g} replicas may be enough and {high:g} may be needed: the profile and the simulation do not say more closely{longer}"
    yield from _near_idle(request, design)
    if spread.overloaded:
        share_of_draws = f"in {spread.overloaded} of {spread.draws} draws of the profile"
        yield f"{share_of_draws} these replicas are overloaded: upper ends are those at {sizing.MOST:.0%} load"
    if spread.infeasible:
        yield f"in {spread.infeasible} of {spread.draws} draws of the profile no sensible number of replicas keeps the limits"
    device = design.candidate.device
    if device is not None and not device.verified:
        yield f"the figures of {device.id} are unverified: {device.source}"
    if design.price is not None and design.price.offer.provenance is Provenance.ASSUMED:
        yield f"the price is assumed: {design.price.offer.source}, {design.price.offer.date}"
    hidden = _count_hidden(search) - LISTED
    if hidden > 0:
        yield f"{units.count(hidden, 'more alternative')} {'is' if hidden == 1 else 'are'} not listed"


def _near_idle(request: Request, design: Design) -> Iterator[str]:
    """Yield the limit that an idle replica all but misses: more replicas hardly help to keep it, so their number is hardly known."""
    if request.trace is not None or design.replicas == design.fewest:
        return
    at_rest = design.replica.predict(sizing.IDLE * design.replica.capacity_per_s)
    excess, limit = sizing.worst(at_rest, request.slo)
    if limit is not None and excess * NEAR_IDLE > 1:
        times = f"{1 / excess:.2f} times what an idle replica takes"
        yield f"{slo.show_limit(limit)} is {times}: a few percent of it are many replicas; a looser limit makes a surer and cheaper plan"


def _bought(fleet: Fleet) -> Iterator[str]:
    """Yield what of the bill is not plain: a mix of instances, devices that stand idle, what is committed."""
    if len(fleet.lots) > 1:
        yield f"instances: {fleet}"
    if fleet.stranded:
        yield f"{fleet.stranded} of the {fleet.devices} devices rented are used by no replica"
    committed = sum(lot.offer.usd_per_h * lot.committed for lot in fleet.lots)
    if committed:
        yield f"{units.show_usd(committed)}/h of it is committed and paid in any case; {units.show_usd(fleet.new_usd_per_h)}/h is new"
    if fleet.unused_usd_per_h:
        yield f"commitments of {units.show_usd(fleet.unused_usd_per_h)}/h on the same device stay unused and are paid as well"


def _usual_step(design: Design) -> tuple[float, ...]:
    """Return the features of a step at the mean batch into which an average prompt comes."""
    replica = design.replica
    stay_s = replica.predict(design.each_per_s).value("e2e", "mean") or 0.0
    batch = min(design.each_per_s * stay_s, replica.slots)
    prompt = min(replica.demand.mean_prompt, replica.limits.max_step_tokens)
    return (batch, batch * replica.context_tokens, prompt, prompt**2 / 2, batch + 1)


def _count_hidden(search: Search) -> int:
    return len(search.designs) - 1 + len(search.passed_over) + len(search.missed) + len(search.misfits) + len(search.unconfirmed)


def _longest(limits: Limits) -> int:
    return min(limits.max_context, limits.blocks * limits.block_tokens)
