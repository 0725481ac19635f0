"""Replicas to spare for every design that is compared: what an availability costs may change which design is cheapest.

A fleet of few large replicas needs a larger share to spare than one of many small ones, so designs are priced with their spares.  Replicas
needed are those that hold the limits at peak, all day: the spares do not rely on quiet hours.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlsys_bench import slo, units
from mlsys_bench.plan import availability, cold_start, confirm, intervals, sizing, words
from mlsys_bench.plan.reliability import Zones, replaced
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.surroundings import Secured
from mlsys_bench.types import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Spares:
    """An availability asked for, as a share of time, and the zones to spread over."""

    objective: float
    zones: Zones

    def rented(self, gpus: int, weights_bytes: float, needed: int) -> int:
        """Return the replicas there must be for so many to be up, each on so many GPUs with weights of so many bytes."""
        return self.secured(gpus, weights_bytes, needed).replicas

    def secured(self, gpus: int, weights_bytes: float, needed: int) -> Secured:
        """Return such a fleet.  Raises Infeasible where the zones alone are away too long."""
        return _secured(self.objective, self.zones, gpus, weights_bytes, needed)

    def words(self, found: Secured) -> str:
        """Return what the plan takes for granted about it in a line."""
        zones = "in one zone (--zones says more)" if self.zones.count == 1 else f"over {self.zones.count} zones"
        away = f"is replaced after {units.show_s(found.replica_repair_s)}"
        return (
            f"replicas stand {zones}; one fails every {units.show_s(found.replica_mtbf_s)} and {away}; "
            "available means that enough are up to hold the limits at peak, headroom kept"
        )


@functools.lru_cache(maxsize=4096)
def _secured(objective: float, zones: Zones, gpus: int, weights_bytes: float, needed: int) -> Secured:
    reliability = replaced(cold_start.of(weights_bytes))
    return availability.secured(objective, 1.0, lambda _: needed, gpus=gpus, reliability=reliability, zones=zones)


# ---------------------------------------------------------------- in the plan


def with_spares(plan: Plan, request: Request, design: Design) -> Plan:
    """Return the plan of the replicas needed, whose price holds the spares already, as one of the whole fleet.

    Latencies and utilisation become those of all replicas up; those with only the needed ones up stay as `survivors`.  Headroom stays
    that of the replicas needed: beyond it the promise breaks when spares are away.
    """
    asked = request.spares
    assert asked is not None
    candidate = design.candidate
    found, told, taken = _found(asked, request, design)
    counts = plan.intervals["replicas"]
    low, high = (float(sizing.rented(candidate, int(n), request.shelf)) for n in counts)
    made = replace(
        plan,
        secured=found,
        survivors=plan.predicted,
        predicted=plan.predicted | {"availability": found.availability},
        intervals=plan.intervals | {"replicas": (low, high), "availability": found.interval},
        assumptions=(*plan.assumptions, asked.words(found), *found.assumptions, *taken),
        notes=(*plan.notes, *told, *_shared(plan, found)),
    )
    return _all_up(made, request, design, found, (asked.words(found), *found.assumptions, *taken)) if found.spare else made


def _found(asked: Spares, request: Request, design: Design) -> tuple[Secured, tuple[str, ...], tuple[str, ...]]:
    """Return the fleet with its spares; what is to be told of it, and what is taken for granted, where some of them are spot."""
    candidate, rent = design.candidate, request.rent
    found = (
        None
        if rent is None
        else rent.split(candidate.gpu, candidate.devices, candidate.layout.pp, candidate.weights_bytes, design.replicas)
    )
    if rent is None or found is None:
        return asked.secured(candidate.devices, candidate.weights_bytes, design.replicas), (), ()
    from mlsys_bench.plan import spot

    return rent.secured(candidate.devices, candidate.weights_bytes, found), (spot.compared(found),), tuple(spot.words(rent, found))


def _shared(plan: Plan, found: Secured) -> Iterator[str]:
    """Yield a warning where an instance takes several replicas with it when it goes: the law of failures counts replicas apart."""
    item = plan.fleet[0]
    if item.instance and item.instances < found.replicas:
        yield f"{found.replicas} replicas stand on {item.instances} instances and go with them; failures are counted replica by replica"


def _all_up(plan: Plan, request: Request, design: Design, found: Secured, taken: tuple[str, ...]) -> Plan:
    """Return the plan with the figures of a fleet whose spares are up and share the traffic."""
    whole = replace(design, replicas=found.replicas)
    trial = confirm.once(whole, request)
    latencies = whole.replica.predict(whole.each_per_s)
    analytic = {key: value for key, value in latencies.keys(request.slo).items() if key in plan.analytic}
    rates = {"throughput_tokens_per_s": whole.each_per_s * whole.replica.demand.mean_output, "request_rate_per_s": whole.each_per_s}
    analytic |= {key: value for key, value in rates.items() if key in plan.analytic}
    spread = intervals.of(whole, trial, analytic, request).intervals
    kept = ("replicas", "usd_per_hour", "usd_per_month", "usd_per_million_tokens", "availability")
    item = plan.fleet[0]
    return replace(
        plan,
        replicas=found.replicas,
        gpus=whole.devices,
        fleet=(replace(item, replicas=found.replicas, instances=item.instances if item.instance else found.replicas),),
        utilisation=whole.replica.utilisation(whole.each_per_s),
        binding_constraint=_binding(request, found),
        predicted=trial.keys(request.slo) | {"availability": found.availability},
        assumptions=(*words.assumptions(request, whole), *taken),
        analytic=analytic,
        intervals={key: value for key, value in spread.items() if key not in kept} | {k: v for k, v in plan.intervals.items() if k in kept},
    )


def _binding(request: Request, found: Secured) -> str:
    """Return what asks for the last replica: the availability, or the zone that may go."""
    count = f"{found.needed} + {found.spare} replicas"
    if found.binds == "zone":
        return f"the loss of one of {len(found.zones)} zones ({count})"
    limit = next(limit for limit in request.slo if limit.metric == "availability")
    return f"{slo.show_limit(limit)} ({count})"
