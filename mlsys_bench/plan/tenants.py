"""Tenants: one fleet that keeps the limits of each of them, beside what fleets of their own would cost.

In one fleet all wait in the same queues: the demand is the mixture, steps and queues are those of the mixture, and a tenant's TTFT, TPOT
and E2E are those of requests with its own lengths in them.  Where tenants have priorities, those of the first wait behind nobody else's
(`plan.priority`), and what that saves is told (`plan.precedence`).  Theory and simulation are judged alike: a limit that names a tenant
is held against its requests alone.

A fleet for all needs fewer spare replicas; but it keeps the tightest limit for everybody's requests, and the prompts of one tenant stand
in the way of the other's tokens.  So a class with a tight limit and few requests may be cheaper apart.  Looked at are one fleet for all,
one for each, and each one tenant apart from the others: by theory, and whichever costs less than the fleet for all is simulated too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlsys_bench import slo, units, workload
from mlsys_bench.errors import BadInput, Infeasible, unknown
from mlsys_bench.plan import candidates, demand, floors, precedence, search
from mlsys_bench.plan.divided import Part, joined, summed
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial
from mlsys_bench.tenancy import Division, TenantFleet
from mlsys_bench.types import SLO, Alternative, Plan

CENT = 0.005  # dollars an hour: fleets that cost as much are one fleet for all
Names = tuple[str, ...]
Groups = tuple[Names, ...]
Judged = tuple[Plan, Design, Trial]
PlanOne = Callable[[Request], Judged]


def resolved(limits: SLO, names: Sequence[str]) -> SLO:
    """Return limits that each name a tenant: its own, or those of all where it has none; an availability is that of the fleet."""
    for limit in limits:
        if limit.tenant is not None and not names:
            raise BadInput(f"SLO {slo.show_limit(limit)}: the traffic has no tenants; name them in a scenario, or drop {limit.tenant}:")
        if limit.tenant is not None and limit.tenant not in names:
            raise unknown("tenant", limit.tenant, names, f"SLO {slo.show_limit(limit)}")
    common = [limit for limit in limits if limit.tenant is None and limit.metric != "availability"]
    found: list[tuple[str, SLO]] = [
        (name, tuple(x for x in limits if x.tenant == name) or tuple(dataclasses.replace(x, tenant=name) for x in common)) for name in names
    ]
    for name, own in found:
        if not own:
            raise BadInput(f"the tenant {name} has no limit, and there is none for all; give it one, e.g. {name}:ttft_p95<500ms")
    return (*(x for _, own in found for x in own), *(x for x in limits if x.metric == "availability"))


def overridden(given: SLO, base: SLO, names: Sequence[str]) -> SLO:
    """Return a scenario's limits with those given in place of them: a tenant that is not named keeps its own, or those of all.

    Limits of all take the place of those of all.  Raises BadInput where every tenant of `names` has its own: they would bind nobody.
    """
    own = tuple(x for x in base if x.tenant is not None and x.tenant not in {y.tenant for y in given})
    for_all = [x for x in given if x.tenant is None and x.metric != "availability"]
    bound = {x.tenant for x in (*given, *own)}
    if names and for_all and bound.issuperset(names):
        raise BadInput(
            f"SLO {slo.show(tuple(for_all))}: every tenant has limits of its own ({', '.join(names)}), so it would bind nobody; say whose "
            f"it is, e.g. {names[0]}:{slo.show_limit(for_all[0])}"
        )
    if for_all or not names:
        return (*given, *own)
    replaced = {slo.key(x) for x in given}
    return (*given, *(x for x in base if x.tenant is None and slo.key(x) not in replaced), *own)


def names_of(request: Request) -> Names:
    """Return the tenants of a request: of its traffic, or of its trace."""
    if request.trace is not None:
        return request.trace.tenants if request.trace.tenant is not None else ()
    return tuple(tenant.name for tenant in request.workload.tenants)


def plan(request: Request, plan_one: PlanOne) -> Plan:
    """Return the cheaper of one fleet for all and fleets of their own, with a row for each tenant.  `plan_one` plans a fleet.

    Raises Infeasible, naming the tenant, where neither keeps the limits.
    """
    names = names_of(request)
    asked = dataclasses.replace(request, slo=resolved(request.slo, names))
    alike = _uncomparable(request)
    if alike is None and len(names) > 1:
        parts, divisions = _cheapest(asked, names, plan_one)
    else:
        parts, divisions = [_planned(asked, names, plan_one)], ()
    made = joined(asked, parts, divisions)
    assert made.tenancy is not None
    made = dataclasses.replace(made, tenancy=dataclasses.replace(made.tenancy, precedence=precedence.worth(asked, parts)))
    if len(parts) > 1:
        return dataclasses.replace(made, alternatives=_alternatives(divisions[1:]))
    return made if alike is None else dataclasses.replace(made, notes=(*made.notes, f"fleets of their own were not compared: {alike}"))


def _uncomparable(request: Request) -> str | None:
    """Return why fleets of their own are not set beside the one for all, None where they are."""
    for given, why in (
        (request.trace is not None, "a trace is replayed on one fleet"),
        (request.market is not None, "what a contract commits to would count for each of them"),
        (request.spares is not None, "replicas to spare are worked out for one fleet"),
        (request.around or request.growth is not None or request.mixed, "what surrounds a plan is worked out for one fleet"),
    ):
        if given:
            return why
    return None


def _planned(request: Request, names: Names, plan_one: PlanOne) -> Part:
    made, design, trial = plan_one(request)
    return Part(names=names, plan=made, design=design, trial=trial)


# ---------------------------------------------------------------- fleets of their own


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One division by theory: the fleet of each group, None where no candidate keeps its limits."""

    groups: Groups
    designs: tuple[Design | None, ...]

    @property
    def is_possible(self) -> bool:
        """Whether every group has a fleet."""
        return all(design is not None for design in self.designs)

    @property
    def usd_per_h(self) -> float | None:
        """What its fleets cost, None where one has no price."""
        return summed([design.price.usd_per_h if design and design.price else None for design in self.designs])


def _cheapest(request: Request, names: Names, plan_one: PlanOne) -> tuple[list[Part], tuple[Division, ...]]:
    """Return the cheapest fleets as simulation confirms them, one for all among equals, and all divisions.  Raises Infeasible.

    Divisions are simulated in the order of what they cost by theory, until no other could cost less than the best.
    """
    ways = sorted(_ways(request, names), key=lambda way: (way.usd_per_h is None, round(way.usd_per_h or 0.0, 2), len(way.groups)))
    tried: dict[Groups, list[Part] | None] = {}
    best: list[Part] = []
    for way in ways:
        if way.is_possible and (not best or _is_cheaper(way.usd_per_h, _cost(best))):
            parts = tried[way.groups] = _confirmed(request, way.groups, plan_one)
            best = parts if parts and (not best or _is_cheaper(_cost(parts), _cost(best))) else best
    if not best:
        return [_planned(request, names, plan_one)], ()  # which says what is in the way
    return best, tuple(_divisions(best, sorted(ways, key=lambda way: len(way.groups) > 1), tried))


def _ways(request: Request, names: Names) -> list[Way]:
    """Return one fleet for all, a fleet for each, and each tenant apart from the others.  Raises BadInput for a limit below its floor."""
    traffic = demand.of(request.workload)
    bounds, _ = search.bounds(request, candidates.every(request)[0], traffic)
    if bounds:
        floors.check(request.slo, [bound.candidate for bound in bounds], traffic)
    each: Groups = tuple((name,) for name in names)
    one = [((name,), tuple(other for other in names if other != name)) for name in names] if len(names) > 2 else []
    known = {group: _by_theory(request, group) for groups in ((names,), each, *one) for group in groups}
    return [Way(groups=groups, designs=tuple(known[group] for group in groups)) for groups in ((names,), each, *one)]


def only(request: Request, names: Names) -> Request:
    """Return what is asked for some of the tenants alone."""
    traffic = workload.only(request.workload, names)
    kept = tuple(x for x in request.slo if x.tenant is None or x.tenant in names)
    limits = kept if traffic.tenants else tuple(dataclasses.replace(x, tenant=None) for x in kept)
    return dataclasses.replace(request, workload=traffic, slo=limits)


def _by_theory(request: Request, names: Names) -> Design | None:
    """Return the cheapest fleet of some tenants by theory; None where no candidate keeps their limits."""
    own = only(request, names)
    bounds, misfits = search.bounds(own, candidates.every(own)[0], demand.of(own.workload))
    return next(iter(search.search(own, bounds, misfits, 1).designs), None)


def _confirmed(request: Request, groups: Groups, plan_one: PlanOne) -> list[Part] | None:
    """Return the fleets of a division as simulation confirms them; None where it does not."""
    try:
        return [_planned(only(request, group), group, plan_one) for group in groups]
    except Infeasible:  # the division is out; its row says that theory found it
        return None


def _cost(parts: Sequence[Part]) -> float | None:
    return summed([part.plan.usd_per_hour for part in parts])


def _is_cheaper(price: float | None, usd: float | None) -> bool:
    return price is not None and usd is not None and price < usd - CENT


# ---------------------------------------------------------------- what is said of them


def _divisions(best: Sequence[Part], ways: Sequence[Way], tried: dict[Groups, list[Part] | None]) -> Iterator[Division]:
    """Yield the plan's own division, then the others, each with why it is not."""
    chosen = tuple(part.names for part in best)
    yield Division(fleets=_fleets(best), usd_per_hour=_cost(best), by="simulation", why="the plan")
    for way in ways:
        if way.groups != chosen:
            yield _passed_over(way, tried.get(way.groups, ()), _cost(best), sum(part.plan.replicas for part in best))


def _alternatives(divisions: Sequence[Division]) -> tuple[Alternative, ...]:
    """Return the divisions that have a price, as alternatives to a plan of several fleets."""
    return tuple(
        Alternative(
            gpu=" + ".join(dict.fromkeys(fleet.gpu for fleet in way.fleets)),
            precision="/".join(dict.fromkeys(fleet.precision for fleet in way.fleets)),
            tp=max(fleet.devices_per_replica for fleet in way.fleets), replicas=way.replicas, usd_per_hour=way.usd_per_hour, predicted={},
            why_not=f"{' | '.join(' + '.join(fleet.tenants) for fleet in way.fleets)}: {way.why}",
        )
        for way in divisions if way.fleets
    )  # fmt: skip


def _passed_over(way: Way, parts: Sequence[Part] | None, usd: float | None, replicas: int) -> Division:
    """Return a division that is not the plan's; `parts` are empty where it was not simulated, None where simulation refused it."""
    if not way.is_possible:
        names, whole = way.groups[way.designs.index(None)], len(way.groups) == 1
        what = "one fleet for all" if whole else f"a fleet for {' and '.join(names)}"
        return Division(fleets=(), usd_per_hour=None, by="theory", why=f"{what} keeps its limits on no device considered")
    if parts:
        return Division(fleets=_fleets(parts), usd_per_hour=_cost(parts), by="simulation", why=_more(_cost(parts), usd))
    fleets = tuple(_by_design(names, design) for names, design in zip(way.groups, way.designs, strict=True) if design)
    count = sum(fleet.replicas for fleet in fleets)
    why = "cheaper by theory, missed a limit in simulation" if parts is None else _more(way.usd_per_h, usd)
    return Division(fleets=fleets, usd_per_hour=way.usd_per_h, by="theory", why=f"{why}{_because(way, fleets, count, replicas)}")


def _because(way: Way, fleets: Sequence[TenantFleet], count: int, replicas: int) -> str:
    """Return what makes a division dearer, where that is plain."""
    if len(way.groups) == 1 and fleets[0].binds != "headroom":
        return f": {fleets[0].binds} then binds for all requests"
    return f": {count} replicas for {replicas}, each fleet rounds up and keeps room of its own" if count > replicas else ""


def _more(price: float | None, usd: float | None) -> str:
    if price is None or usd is None:
        return "unpriced"
    more = price - usd
    return "as dear" if abs(more) <= CENT else f"{units.show_usd(abs(more))}/h {'more' if more > 0 else 'less'}"


def _by_design(names: Names, design: Design) -> TenantFleet:
    at = design.candidate
    return TenantFleet(
        tenants=names, gpu=at.gpu, precision=at.precision, devices_per_replica=at.devices, replicas=design.replicas,
        usd_per_hour=design.price.usd_per_h if design.price else None, max_batch=at.limits.max_seqs,
        utilisation=design.replica.utilisation(design.each_per_s),
        binds=slo.show_limit(design.binds) if design.binds else "headroom", provenance=at.profile.provenance,
    )  # fmt: skip


def _fleets(parts: Sequence[Part]) -> tuple[TenantFleet, ...]:
    return tuple(
        TenantFleet(
            tenants=part.names, gpu=part.design.candidate.gpu, precision=part.design.candidate.precision,
            devices_per_replica=part.plan.devices_per_replica, replicas=part.plan.replicas, usd_per_hour=part.plan.usd_per_hour,
            max_batch=part.plan.max_batch, utilisation=part.plan.utilisation, binds=part.plan.binding_constraint,
            provenance=part.plan.provenance,
        )
        for part in parts
    )  # fmt: skip
