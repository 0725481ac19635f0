"""What priorities between tenants are worth: the same plan first come, first served, and who keeps promises in a surge.

The fleet for all is sized once more without priorities, by theory, and the best few by simulation.  In a surge more comes than the fleet
carries: it is simulated with the replicas it has, once in order of priority and once as requests come.  A class whose own traffic, with
all that goes before it, is more than the fleet completes waits without end whatever the run shows; it is what a queue limit would shed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mlsys_bench import slo, units, workload
from mlsys_bench.plan import candidates, confirm, demand, search, sizing
from mlsys_bench.plan.divided import Part
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial
from mlsys_bench.tenancy import Precedence, Surge
from mlsys_bench.types import SLO, Workload

SURGES = (1.25, 1.5, 2.0)  # times the traffic that is planned for
TRIED = 3  # designs that are simulated without priorities, at most


def worth(request: Request, parts: Sequence[Part]) -> Precedence | None:
    """Return what priorities change; None where all tenants have the same."""
    if workload.ranks(request.workload.tenants) is None:
        return None
    usd = [part.plan.usd_per_hour for part in parts]
    paid = None if None in usd else sum(price for price in usd if price is not None)
    fifo = _first_come(request)
    return Precedence(
        classes=classes(request.workload),
        replicas=sum(part.plan.replicas for part in parts),
        usd_per_hour=paid,
        fifo_replicas=fifo[0].replicas if fifo else None,
        fifo_usd_per_hour=_usd(fifo[0]) if fifo else None,
        why="no fleet keeps the limits" if fifo is None else _told(paid, _usd(fifo[0]), fifo[1], request.slo),
        surges=tuple(_surge(request, parts[0].design, times) for times in SURGES) if len(parts) == 1 and request.trace is None else (),
    )


def classes(traffic: Workload) -> tuple[tuple[str, ...], ...]:
    """Return the tenants by priority, those that go first first."""
    levels = sorted({tenant.priority for tenant in traffic.tenants})
    return tuple(tuple(tenant.name for tenant in traffic.tenants if tenant.priority == level) for level in levels)


def _first_come(request: Request) -> tuple[Design, Trial] | None:
    """Return the cheapest fleet for all without priorities, and its simulation; None where there is none."""
    asked = dataclasses.replace(request, workload=workload.first_come(request.workload))
    bounds, misfits = search.bounds(asked, candidates.every(asked)[0], demand.of(asked.workload))
    best: tuple[Design, Trial] | None = None
    for design in search.search(asked, bounds, misfits, TRIED).designs[:TRIED]:
        if best is None or sizing.resized(design, design.fewest, asked.shelf).sort_key() < best[0].sort_key():
            found = [best, confirm.confirm(design, asked)]
            best = min((each for each in found if each is not None), key=lambda each: each[0].sort_key(), default=None)
    return best


def _usd(design: Design) -> float | None:
    return design.price.usd_per_h if design.price else None


def _told(paid: float | None, usd: float | None, seen: Trial, limits: SLO) -> str:
    if paid is None or usd is None:
        return "unpriced"
    more = usd - paid
    if abs(more) < 0.005:
        return "as dear: priorities then decide who is served in a surge, and who waits least"
    _, nearest = max(seen.all.excesses(limits), key=lambda found: found[0])
    return f"{units.show_usd(abs(more))}/h {'more' if more > 0 else 'less'}, to keep {slo.show_limit(nearest)}"


# ---------------------------------------------------------------- a surge


def _surge(request: Request, design: Design, times: float) -> Surge:
    """Return who keeps all limits at so many times the traffic, by priority and as requests come."""
    more = dataclasses.replace(request.workload, rate_per_s=times * request.workload.rate_per_s)
    endless = _endless(design, times)
    whole = design.replica.utilisation(times * design.each_per_s) >= 1
    by_rank = _kept(request, design, times, more)
    by_turn = _kept(request, design, times, workload.first_come(more))
    return Surge(
        times=times,
        utilisation=design.replica.utilisation(times * design.each_per_s),
        excess={name: None if name in endless else excess for name, excess in by_rank.items()},
        fifo_excess={name: None if whole else excess for name, excess in by_turn.items()},
    )


def _kept(request: Request, design: Design, times: float, traffic: Workload) -> dict[str, float]:
    """Return the largest value / limit of each tenant in a simulation of the design's replicas."""
    busier = dataclasses.replace(design, rate_per_s=times * design.rate_per_s)
    found = confirm.trial(dataclasses.replace(request, workload=traffic), busier).all.excesses(request.slo)
    names = [tenant.name for tenant in request.workload.tenants]
    return {name: max((excess for excess, limit in found if limit.tenant == name), default=0.0) for name in names}


def _endless(design: Design, times: float) -> set[str]:
    """Return the tenants that would wait without end: what goes before them, with their own, is more than the fleet completes."""
    demand, order = design.replica.demand, design.replica.order
    if order is None or demand.tenant is None:
        return set()
    load = times * design.replica.utilisation(design.each_per_s) * order.upto
    return {name for i, name in enumerate(demand.tenants) if (load[demand.tenant == i] >= 1).any()}
