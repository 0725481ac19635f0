"""What surrounds a plan: spare replicas, autoscaling, backpressure and growth, from the plan's own record.

fewest(rate)   replicas in proportion to the plan's own load of one, rounded up: exact at the plan's rate, elsewhere at most one more
stay           mean TTFT + (mean output tokens - 1) x mean TPOT, medians standing for means: the mean time of a request in a replica
slots, service of a full replica: sequences at once, as many as the cache holds of average requests; slots / capacity
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlsys_bench import slo, units, workload
from mlsys_bench.errors import Infeasible
from mlsys_bench.plan import autoscale, availability, backpressure, candidates, cold_start, growth
from mlsys_bench.plan import course as courses
from mlsys_bench.plan.autoscale import Serving
from mlsys_bench.plan.backpressure import Tail
from mlsys_bench.plan.cold_start import ColdStart
from mlsys_bench.plan.course import Course
from mlsys_bench.plan.growth import Growth
from mlsys_bench.plan.reliability import Reliability, Spot, Zones, replaced
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.spare import Spares
from mlsys_bench.pricing import spread
from mlsys_bench.surroundings import Autoscaled, Backpressure, Outlook, Secured
from mlsys_bench.types import Limit, Offer, Plan, Workload

Fewest = Callable[[float], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What was asked for around a plan; None where it was not, or the plan tells too little."""

    cold: ColdStart
    secured: Secured | None
    scaled: Autoscaled | None
    pressure: Backpressure | None
    outlook: Outlook | None


def around(
    plan: Plan,
    *,
    traffic: Workload | None = None,
    objective: float | None = None,
    zones: Zones | None = None,
    reliability: Reliability | None = None,
    crews: int | None = None,
    spot: Spot | None = None,
    grows: Growth | None = None,
    cold: ColdStart | None = None,
    seed: int = 0,
    fewest: Fewest | None = None,
) -> Around:
    """Return what surrounds a plan.  `traffic` is the day the plan was made for the peak of; a steady one needs no autoscaling.

    `objective`: share of time, by default the availability among the plan's limits; a plan with its spares keeps them.  `fewest`: how
    many replicas hold the limits at a rate, by default in proportion to the plan's.
    """
    start = cold or cold_start.of(weights_bytes(plan))
    share = objective if objective is not None else _availability(plan)
    day = courses.of(traffic or plan.workload)
    needed, peak = fewest or fewest_of(plan), max(plan.workload.rate_per_s, day.peak_per_s)
    secured = plan.secured
    if secured is None and share is not None:
        secured = availability.secured(
            share, peak, needed, gpus=plan.devices_per_replica, reliability=reliability or replaced(start), zones=zones, crews=crews,
            spot=spot, course_per_s=day.rates_per_s,
        )  # fmt: skip
    return Around(
        cold=start,
        secured=secured,
        scaled=scaled(plan, day, start, secured, seed, needed),
        pressure=pressure(plan),
        outlook=ahead(plan, grows, needed) if grows else None,
    )


def surrounded(plan: Plan, request: Request, fewest: Fewest) -> Plan:
    """Return the plan with what was asked for around it."""
    found = around(plan, traffic=request.day, grows=request.growth, seed=request.seed, fewest=fewest)
    day, steady = courses.of(request.day or plan.workload), None
    if not day.varies:
        steady = "autoscaling: the traffic is the same all day, so a fleet that follows it is the static one" if request.around else None
    elif found.scaled is None:
        steady = autoscale.too_brief(day, found.cold.total_s)
    return dataclasses.replace(
        plan,
        scaled=found.scaled,
        pressure=found.pressure,
        outlook=found.outlook,
        notes=(*plan.notes, *([] if steady is None else [steady])),
    )


def needed_of(plan: Plan) -> int:
    """Return the replicas that hold the limits at peak, without those to spare."""
    return plan.secured.needed if plan.secured else plan.replicas


def fewest_of(plan: Plan) -> Fewest:
    """Return how many replicas hold the limits at a rate, in proportion to the plan's."""
    each_per_s = plan.workload.rate_per_s / needed_of(plan)
    return lambda rate_per_s: max(1, math.ceil(rate_per_s / each_per_s - 1e-9))


def price_of(plan: Plan) -> Callable[[int], float | None]:
    """Return dollars an hour of so many replicas: whole instances of the plan's first kind, None where it has no price."""
    offer = offer_of(plan)
    if offer is None:
        return lambda replicas: None
    on_one = max(1, offer.devices // plan.devices_per_replica)
    nodes = math.ceil(plan.devices_per_replica / offer.devices)
    zones = len(plan.secured.zones) if plan.secured else 1

    def usd_per_h(replicas: int) -> float:
        instances = sum(math.ceil(n / on_one) for n in spread(replicas, zones))  # none serves two zones
        return round(instances * nodes * offer.usd_per_h, 6)

    return usd_per_h


def offer_of(plan: Plan) -> Offer | None:
    """Return the offer that a plan's first kind of replicas is rented by; the largest where sizes are mixed."""
    name = plan.fleet[0].instance
    named = (o for o in plan.prices if name in (o.instance, f"{o.provider} {o.instance}"))
    return next(named, plan.prices[0] if plan.prices and len(plan.fleet) == 1 else None)


def serving_of(plan: Plan) -> Serving | None:
    """Return what one replica carries; None where the plan predicts no latencies."""
    ttft, tpot = (plan.predicted.get(f"{metric}_p50_s") for metric in ("ttft", "tpot"))
    if ttft is None:
        return None
    stay_s = ttft + (workload.mean_tokens(plan.workload.output_tokens) - 1) * (tpot or 0.0)
    each_per_s = plan.workload.rate_per_s / needed_of(plan)
    return Serving(most_per_s=each_per_s, capacity_per_s=max(plan.capacity_per_replica_per_s, each_per_s), stay_s=stay_s)


def scaled(
    plan: Plan, day: Course, cold: ColdStart, secured: Secured | None, seed: int = 0, fewest: Fewest | None = None
) -> Autoscaled | None:
    """Return the fleet that follows its day, its spare replicas always there; None for traffic that is steady, or too brief to follow."""
    serving = serving_of(plan)
    if serving is None or not day.varies or autoscale.too_brief(day, cold.total_s):
        return None
    spare = secured.spare if secured else 0
    return autoscale.autoscaled(day, serving, fewest or fewest_of(plan), cold, least=1 + spare, spare=spare, seed=seed)


def ahead(plan: Plan, grows: Growth, fewest: Fewest | None = None) -> Outlook:
    """Return what growth does: full when the first limit breaks, which uses up the headroom; each month's replicas and spares keep it."""
    rate_per_s, needed = plan.workload.rate_per_s, fewest or fewest_of(plan)

    def rented(rate_per_s: float) -> int:
        found = plan.secured
        if found is None:
            return needed(rate_per_s)
        spares = Spares(objective=found.objective, zones=Zones(count=len(found.zones), survive=found.survives_zone))
        return spares.rented(plan.devices_per_replica, weights_bytes(plan), needed(rate_per_s))

    return growth.outlook(
        rate_per_s, grows, rented, fleet=plan.replicas, usd_per_h=price_of(plan), holds_per_s=rate_per_s * (1 + plan.headroom)
    )


def pressure(plan: Plan) -> Backpressure | None:
    """Return the limits that protect the strictest promise on the time to first token; None where there is none, or no room for a queue."""
    promises = [limit for limit in slo.parse(plan.slo) if limit.metric == "ttft" and limit.stat.startswith("p")]
    if not promises:
        return None
    tail = tail_of(plan, min(promises, key=lambda limit: limit.limit))
    try:
        return backpressure.backpressure(
            tail, replicas=plan.replicas, peak_per_s=plan.workload.rate_per_s,
            most_per_s=plan.workload.rate_per_s * (1 + plan.headroom) / needed_of(plan), provenance=plan.provenance,
            tokens_per_request=sum(workload.mean_tokens(n) for n in (plan.workload.prompt_tokens, plan.workload.output_tokens)),
        )  # fmt: skip
    except Infeasible:  # the plan's own TTFT has no room left for any queue
        return None


def tail_of(plan: Plan, limit: Limit) -> Tail:
    """Return a full replica and the promise to protect."""
    prompt, output = (workload.mean_tokens(n) for n in (plan.workload.prompt_tokens, plan.workload.output_tokens))
    slots = max(1, min(plan.max_batch, math.floor(plan.kv_tokens_per_replica / (prompt + output / 2))))
    rows = {} if plan.tenancy is None else {row.name: row.predicted for row in plan.tenancy.tenants}
    own = rows.get(limit.tenant or "", plan.predicted).get(f"{limit.metric}_{limit.stat}_s")
    first_s = plan.predicted.get(f"{slo.key(limit)}_s", plan.predicted.get("ttft_p50_s", 0.0)) if own is None else own
    return Tail(
        slots=slots, service_s=slots / plan.capacity_per_replica_per_s, limit_s=limit.limit, p=float(limit.stat[1:]) / 100, first_s=first_s
    )


def weights_bytes(plan: Plan) -> float:
    """Return the bytes of weights of one replica, from what its profile reads."""
    return candidates.weights_bytes(plan.profile, plan.devices_per_replica)


def in_words(found: Around) -> Iterator[str]:
    """Yield what a manager reads, a line each."""
    if (secured := found.secured) is not None:
        where = f" over {len(secured.zones)} zones ({', '.join(map(str, secured.zones))})" if len(secured.zones) > 1 else ""
        low, high = secured.downtime_interval
        yield (
            f"availability {_percent(secured.availability)} with {secured.replicas} replicas, {secured.needed} + {secured.spare}{where}: "
            f"{secured.downtime_min_per_year:.3g} min a year without enough ({low:.3g} to {high:.3g}, {secured.provenance})"
        )
    if (grown := found.scaled) is not None:
        static, scheduled, followed = (grown.use(way).replica_h for way in ("static", "scheduled", "followed"))
        yield (
            f"autoscaling: {scheduled:.0f} replica-hours a day by the schedule, {followed:.0f} by the rule, {static:.0f} static; "
            f"{grown.rule.metric} of {grown.rule.target:.3g} a replica ({100 * grown.threshold:.0f} % of what it carries), "
            f"{grown.use('followed').violation_min:.3g} min broken; lead {units.show_s(grown.lead_s)}"
        )
    if (held := found.pressure) is not None:
        shares = ", ".join(f"{100 * o.rejected_by_queue:.2g} % at {o.load:g} x" for o in held.loads)
        rate = f"{units.show_rate(held.rate_per_s)} in all with bursts of {held.burst}"
        yield f"backpressure: at most {held.queue_limit} waiting on a replica, {rate}; rejected {shares}"
    if (ahead := found.outlook) is not None:
        yield f"growth: the fleet holds {units.show_rate(ahead.full_at_per_s)} and is full {_when(ahead)}"


def _percent(share: float) -> str:
    """Return a share with as many nines as tell it from 1, up to five."""
    if share > 0.99999:
        return "more than 99.999 %"
    return f"{100 * share:.{max(1, -math.floor(math.log10(1 - share)) - 1)}f} %"


def _when(ahead: Outlook) -> str:
    if ahead.full_month is None:
        return "never at this growth"
    if ahead.full_month == 0:
        return "today"
    ends = ahead.full_interval
    between = "" if ends is None else f" ({_month(ends[0])} to {_month(ends[1])})"
    return f"in month {ahead.full_month:.1f}{between}"


def _month(month: float | None) -> str:
    return "never" if month is None else f"{month:.1f}"


def _availability(plan: Plan) -> float | None:
    return next((limit.limit for limit in slo.parse(plan.slo) if limit.metric == "availability"), None)
