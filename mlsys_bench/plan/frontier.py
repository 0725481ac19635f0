"""Cost against latency: fleets of which none is both cheaper and faster than another (Pareto's frontier), by theory.

The plan is the cheapest fleet that keeps the limits; what faster answers would cost is the next question in every budget meeting.  Of each
candidate that may lie on the frontier a few fleets are worked out, from the smallest that keeps the headroom to those where more replicas
no longer shorten anything.  All of them keep every limit; the latency shown is that of the limit which is nearest to being missed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from mlsys_bench import slo
from mlsys_bench.plan import sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.candidates import Candidate
from mlsys_bench.plan.demand import Demand
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.search import Bound, Search
from mlsys_bench.plan.sizing import Design
from mlsys_bench.types import FrontierPoint, Limit

LOOKED_AT = 4  # candidates beside the winner and what was sized
DEARER = 6.0  # times the plan's price: nobody looks further
_GROWTH = 1.5  # from a fleet to the next larger one
_FLEETS = 4  # of one candidate
_SHORTER = 0.97  # times the latency, or a dearer fleet is not worth showing
_SAMPLES = 256
_DEFAULT = Limit(metric="e2e", stat="p95", limit=math.inf)


def of(request: Request, found: Search, winner: Design, simulated: Mapping[str, float]) -> tuple[FrontierPoint, ...]:
    """Return the frontier, cheapest first; empty without a price, and for a trace, of which theory knows the mean only.

    All latencies are multiplied by what simulation said of the winner over what theory says of it.
    """
    if winner.price is None or request.trace is not None:
        return ()
    limit, most_usd = _nearest(winner, request), DEARER * winner.price.usd_per_h
    points: list[FrontierPoint] = []
    for design in found.designs[:LOOKED_AT]:
        points += _fleets(request, design.candidate, design.replica.demand, design.replicas, limit, most_usd, math.inf)
    for bound in _worth_a_look(found.passed_over, limit, most_usd):
        points += _fleets(request, bound.candidate, bound.demand, bound.replicas, limit, most_usd, 1.0)
    if not points:
        return ()
    scale = simulated.get(points[0].figure, points[0].latency_s) / points[0].latency_s  # the first is the winner's own
    return tuple(dataclasses.replace(point, latency_s=scale * point.latency_s) for point in frontier(points))


def frontier(points: Sequence[FrontierPoint]) -> tuple[FrontierPoint, ...]:
    """Return the points that no other undercuts in price without being slower, cheapest first."""
    kept: list[FrontierPoint] = []
    for point in sorted(points, key=lambda p: (p.usd_per_hour, p.latency_s)):
        if not kept or point.latency_s < _SHORTER * kept[-1].latency_s:
            kept.append(point)
    return tuple(kept)


def _nearest(winner: Design, request: Request) -> Limit:
    """Return the latency limit that the plan is nearest to missing; E2E p95 where none is promised."""
    promised = [limit for limit in slo.latencies(request.slo) if limit.tenant is None]
    worst = winner.replica.predict(winner.each_per_s).excesses(tuple(promised))
    return max(worst, key=lambda w: w[0])[1] if worst else _DEFAULT


def _worth_a_look(passed_over: Sequence[Bound], limit: Limit, most_usd: float) -> Iterator[Bound]:
    """Yield candidates whose least price and latency without traffic no other's undercut, cheapest first."""
    best_s, left = math.inf, LOOKED_AT
    for bound in sorted(passed_over, key=Bound.sort_key):
        alone_s = bound.alone.value(limit.metric, limit.stat)
        if alone_s is None or bound.price is None or bound.price.usd_per_h > most_usd or alone_s >= _SHORTER * best_s or not left:
            continue
        best_s, left = alone_s, left - 1
        yield bound


def _fleets(
    request: Request, candidate: Candidate, demand: Demand, least: int, limit: Limit, most_usd: float, excess: float
) -> Iterator[FrontierPoint]:  # fmt: skip
    """Yield fleets of one candidate, from one of `least` replicas on, that keep all limits or exceed them less than `excess` times.

    What is rented holds the replicas to spare as well; latencies are those without them.
    """
    replica = Replica(candidate.profile, candidate.limits, demand, samples=_SAMPLES)
    rate_per_s, before_s = request.workload.rate_per_s * demand.share, math.inf
    replicas = max(least, math.floor(replica.utilisation(rate_per_s)) + 1)  # a bound may promise more than the replica can do
    for _ in range(_FLEETS):
        price, seen = sizing.price(candidate, replicas, request.shelf), replica.predict(rate_per_s / replicas)
        latency_s = seen.value(limit.metric, limit.stat)
        if price is None or price.usd_per_h > most_usd or latency_s is None or latency_s > _SHORTER * before_s:
            return
        if all(each < excess for each, _ in seen.excesses(request.slo)):
            rented = price.replicas // candidate.layout.pp  # a pipeline is bought stage by stage
            yield FrontierPoint(
                gpu=candidate.gpu, precision=candidate.precision, devices_per_replica=candidate.devices, replicas=rented,
                spare=rented - replicas, usd_per_hour=price.usd_per_h, figure=f"{limit.metric}_{limit.stat}_s", latency_s=latency_s,
            )  # fmt: skip
        replicas, before_s = max(replicas + 1, math.ceil(_GROWTH * replicas)), latency_s
