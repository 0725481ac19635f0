"""A fleet of several kinds confirmed: each pool simulated at its own share of the traffic, all requests held against the limits.

With an availability every pool gets its spares, all of them chosen together: a request of any length must find its pool with enough up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from mlsys_bench import units
from mlsys_bench.errors import Infeasible
from mlsys_bench.plan import cold_start, confirm, sizing
from mlsys_bench.plan.mixed import Mixed, Pool, mixed, together
from mlsys_bench.plan.reliability import replaced
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.search import Bound
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial
from mlsys_bench.pricing import Fleet
from mlsys_bench.surroundings import MixedFleet, PoolPlan
from mlsys_bench.types import Alternative, Plan, Provenance

Judged = tuple[Pool, Design, Trial]


def beside(plan: Plan, request: Request, bounds: Sequence[Bound], single: Design) -> Plan:
    """Return the plan with a fleet of several kinds beside it, or with a note on why there is none."""
    found = mixed(request, bounds, single)
    if found is None:
        return _told(plan, "by theory no fleet of several kinds, split by prompt length, is cheaper")
    judged = confirmed(found, request)
    fleet = None if judged is None else fleet_of(judged, request)
    theory = " + ".join(f"{pool.design.replicas} x {pool.design.candidate.name}" for pool in found.pools)
    if fleet is None:
        return _told(plan, f"a fleet of {theory} keeps the limits by theory and misses one in simulation")
    if plan.usd_per_hour is None or fleet.usd_per_hour >= plan.usd_per_hour:
        return _told(plan, f"a fleet of {theory} takes {units.show_usd(fleet.usd_per_hour)}/h in simulation: no cheaper")
    saved = replace(fleet, saving=1 - fleet.usd_per_hour / plan.usd_per_hour)
    return replace(plan, mixed=saved, alternatives=(_alternative(saved), *plan.alternatives))


def _told(plan: Plan, note: str) -> Plan:
    return replace(plan, notes=(*plan.notes, note))


def confirmed(found: Mixed, request: Request) -> list[Judged] | None:
    """Return each pool as simulation resized it, at its own limits; None where one keeps them at no number of replicas."""
    judged: list[Judged] = []
    for pool in found.pools:
        own = confirm.confirm(pool.design, replace(request, slo=pool.limits))
        if own is None:
            return None
        judged.append((pool, *own))
    return judged


def fleet_of(judged: Sequence[Judged], request: Request) -> MixedFleet | None:
    """Return the fleet with what all its requests together see; None where they miss a limit, or a pool has no price."""
    shares = [pool.share for pool, _, _ in judged]
    outputs = [design.replica.demand.mean_output for _, design, _ in judged]
    seen = together([trial.all for _, _, trial in judged], shares, outputs)
    counts, held = _spared(judged, request)
    pools = tuple(_pools(judged, request, counts))
    if len(pools) < len(judged) or any(excess >= 1 for excess, _ in seen.excesses(request.slo)):
        return None
    return MixedFleet(
        pools=pools,
        usd_per_hour=sum(pool.usd_per_hour for pool in pools),
        saving=0.0,
        predicted=seen.keys(request.slo),
        provenance=Provenance.weakest(*(pool.provenance for pool in pools)),
        availability=held[0] if held else None,
        availability_interval=(held[1], held[2]) if held else None,
    )


def _spared(judged: Sequence[Judged], request: Request) -> tuple[list[int], tuple[float, float, float] | None]:
    """Return the replicas of each pool with those to spare, and the availability with its interval; None where none is asked for."""
    asked = request.spares
    if asked is None:
        return [design.replicas for _, design, _ in judged], None
    from mlsys_bench.plan import together
    from mlsys_bench.plan.together import Group, Standing

    named = {str(k): design for k, (_, design, _) in enumerate(judged)}
    groups = tuple(
        Group(
            name=name, needed=design.replicas, gpus=design.candidate.devices,
            reliability=replaced(cold_start.of(design.candidate.weights_bytes)),
        )
        for name, design in named.items()
    )  # fmt: skip
    stands = Standing(groups=groups, cuts=tuple((name,) for name in named), zones=asked.zones)
    each = {name: _usd_each(design, request) for name, design in named.items()}
    found, _ = together.secure(stands, asked.objective, lambda n: math.fsum(each[name] * count for name, count in n.items()))
    return [found[name] for name in named], (stands.held(found), stands.at("low").held(found), stands.at("high").held(found))


def _usd_each(design: Design, request: Request) -> float:
    """Return about what a replica costs: its share of the fleet as sized."""
    rented = sizing.rented(design.candidate, design.replicas, request.shelf)
    return design.price.usd_per_h / rented if design.price else 1.0


def _priced(design: Design, replicas: int, request: Request) -> Fleet | None:
    """Return what so many replicas of a pool cost, spares among them already."""
    try:
        return sizing.order(design.candidate, replicas, replace(request.shelf, rented=None))
    except Infeasible:  # beyond a quota: no such fleet, the plan of one kind stands
        return None


def _pools(judged: Sequence[Judged], request: Request, counts: Sequence[int]) -> Iterator[PoolPlan]:
    for (pool, design, trial), replicas in zip(judged, counts, strict=True):
        price, candidate = _priced(design, replicas, request), design.candidate
        if price is None:
            return
        most = pool.most_tokens
        yield PoolPlan(
            gpu=candidate.gpu,
            precision=candidate.precision,
            devices_per_replica=candidate.devices,
            replicas=replicas,
            instances=price.instances,
            instance=price.instance,
            usd_per_hour=price.usd_per_h,
            above_tokens=pool.above_tokens,
            most_tokens=None if math.isinf(most) else most,
            share=pool.share,
            utilisation=design.replica.utilisation(design.each_per_s),
            predicted=trial.keys(request.slo),
            provenance=candidate.profile.provenance,
            spare=replicas - design.replicas,
        )


def _alternative(fleet: MixedFleet) -> Alternative:
    first = fleet.pools[0]
    return Alternative(
        gpu=" + ".join(dict.fromkeys(pool.gpu for pool in fleet.pools)),
        precision="/".join(dict.fromkeys(pool.precision for pool in fleet.pools)),
        tp=1 if len({pool.devices_per_replica for pool in fleet.pools}) > 1 else first.devices_per_replica,
        replicas=sum(pool.replicas for pool in fleet.pools),
        usd_per_hour=fleet.usd_per_hour,
        predicted=fleet.predicted,
        why_not=in_words(fleet),
    )


def in_words(fleet: MixedFleet) -> str:
    """Return such as '2 kinds: 1 x H100 for prompts <= 5,722 tokens + 1 x L40S for longer: $4.50/h, 24 % cheaper'."""
    parts = [f"{pool.replicas} x {pool.gpu} for {_prompts(pool, i == 0)}" for i, pool in enumerate(fleet.pools)]
    kinds = len({(pool.gpu, pool.precision, pool.devices_per_replica) for pool in fleet.pools})
    return (
        f"{kinds} kinds, routed by prompt length: {' + '.join(parts)}: "
        f"{units.show_usd(fleet.usd_per_hour)}/h, {100 * fleet.saving:.0f} % cheaper"
    )


def _prompts(pool: PoolPlan, first: bool) -> str:
    if pool.most_tokens is None:
        return "longer"
    return f"prompts <= {pool.most_tokens:,.0f} tokens" if first else f"<= {pool.most_tokens:,.0f}"
