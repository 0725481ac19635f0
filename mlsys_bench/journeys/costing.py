"""cost: a plan record priced from every side that was asked for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

from mlsys_bench import models, pricing, slo, units, workers
from mlsys_bench import plan as planner
from mlsys_bench.billing import BreakEven, Costs, Line, Mix, Sensitivity
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import planning, progress
from mlsys_bench.plan import costs
from mlsys_bench.plan.sensitivity import sensitivity, smaller
from mlsys_bench.pricing import Market, compare, energy, mix
from mlsys_bench.pricing.energy import Site
from mlsys_bench.pricing.mix import Terms
from mlsys_bench.pricing.spot import Reclaims
from mlsys_bench.types import FleetItem, Plan, Provenance
from mlsys_bench.units import count

_COUNT = re.compile(r"\d{1,12}", re.ASCII)


def cost(
    file: Path,
    *,
    prices: Path | None = None,
    requests_per_s: float | None = None,
    apis: Sequence[str] = (),
    cached: str | None = None,
    batched: str | None = None,
    least: int = 1,
    baseline: Path | None = None,
    vectors: str | None = None,
    egress: str | None = None,
    vcpus: float = 0.0,
    hours: str | None = None,
    floor: int | None = None,
    spot: str | None = None,
    site: Site | None = None,
    what_if: bool = False,
    small: str | None = None,
    quiet: bool = False,
) -> Costs:
    """Return what the plan of a record costs.  Shares and sizes are text with units, as typed; `hours` are replicas, hour by hour."""
    market = pricing.published() if prices is None else planning.market(prices)
    plan, bought = _on(planning.stored(file), prices, market)
    rate = _mean_rate(plan, requests_per_s)
    extra, unpriced = _extra(market, rate, vectors, egress, vcpus)
    found = Costs(
        plan=_fleet(plan),
        requests_per_s=rate,
        bill=costs.bill(plan, extra, unpriced, rate),
        energy=costs.draw(plan, None if site is None else energy.check_site(site), requests_per_s=rate),
        apis=tuple(_api(plan, name, cached, batched, least, None if prices is None else market) for name in apis),
        mix=None if hours is None else _mix(plan, _sold(plan, market, prices), hours, floor, spot),
        sensitivity=changes(plan, costs.market_of(plan) if prices is None else market, small, progress.Line(quiet)) if what_if else (),
        notes=(*bought, *market.notes, *map(_api_note, dict.fromkeys(apis))),
    )
    return found if baseline is None else beside(found, plan, _on(planning.stored(baseline), prices, market)[0])


def _on(plan: Plan, prices: Path | None, market: Market) -> tuple[Plan, tuple[str, ...]]:
    """Return a plan as its fleet is bought on the prices of a file, if one is named, and what that changes of its record."""
    if prices is None:
        return plan, ()
    again = costs.rebought(plan, market)
    if again is None:
        return plan, (
            f"{prices}: stages, several kinds and zones are billed as they were bought; plan again with --prices to buy them there",
        )
    if again.usd_per_hour == plan.usd_per_hour:
        return again, ()
    if again.usd_per_hour is None:
        return again, (f"{prices} sells no {plan.fleet[0].gpu} on the plan's term, so the fleet has no price here",)
    here, there = (units.show_usd(each.usd_per_hour) for each in (plan, again))
    return again, (f"bought on {prices} the fleet costs {there} an hour; the plan's record says {here}",)


def _mean_rate(plan: Plan, given: float | None) -> float:
    """Return the requests per second that share the bill, by default the plan's mean.

    Raises BadInput for more than the plan was made for: it would not carry them.
    """
    planned = plan.workload.rate_per_s
    if given is not None and given > planned * (1 + 1e-9):
        raise BadInput(f"--qps {given:g}: the plan is for {planned:g} requests/s and no more; plan again for {given:g}/s, then price that")
    return plan.mean_per_s if given is None else given


def beside(found: Costs, plan: Plan, old: Plan) -> Costs:
    """Return the costs of a plan with the comparison to another plan."""
    return dataclasses.replace(
        found,
        comparison=compare.compare(old, plan),
        saving_usd_per_month=compare.saving_usd_per_month(old, plan),
        differences=compare.incomparable(old, plan),
    )


def _fleet(plan: Plan) -> str:
    if plan.stages:
        return f"{plan.scenario or plan.model}, {count(plan.replicas, 'replica')} of {count(len(plan.stages), 'stage')}"
    return f"{plan.model}, {', '.join(f'{_kind(item)} for {item.stage}' for item in plan.fleet)}"


def _kind(item: FleetItem) -> str:
    """Return such as '6 replicas of 2 x H100-SXM'."""
    devices = max(item.tp * item.attention_dp, item.ep) * item.pp
    return f"{count(item.replicas, 'replica')} of {f'{devices} x ' if devices > 1 else ''}{item.gpu}"


def _extra(market: Market, rate: float, vectors: str | None, egress: str | None, vcpus: float) -> tuple[list[Line | None], list[str]]:
    """Return the lines beside devices, and what was asked for and has no price."""
    asked: list[tuple[str, Line | None]] = []
    if vectors is not None:
        count, dimensions, copies = _vectors(vectors)
        asked.append(("storage of vectors", pricing.storage(market.rates, pricing.vector_bytes(count, dimensions), copies)))
    if egress is not None:
        sent_bytes = units.size_bytes(egress, "--egress")
        if sent_bytes < 0:
            raise BadInput(f"--egress {egress}: no request sends less than nothing; write what leaves per request, e.g. 50kB")
        asked.append(("network egress", pricing.network(market.rates, rate, sent_bytes)))
    if not 0 <= vcpus < math.inf:
        raise BadInput(f"--vcpus {vcpus:g}: a finite number from 0 up is needed")
    if vcpus:
        asked.append((f"{vcpus:g} vCPU", pricing.vcpus(market.rates, vcpus, pricing.cpu_offers()[0])))
    return [line for _, line in asked], [what for what, line in asked if line is None]


def _vectors(text: str) -> tuple[float, int, int]:
    """Return count, dimensions and copies of '10000000x1536' or '10000000x1536x2'."""
    parts = text.split("x")
    if len(parts) not in (2, 3) or not all(_COUNT.fullmatch(part) and int(part) for part in parts):
        raise BadInput(f"--vectors {text}: write count x dimensions, and copies where there are several: 10000000x1536x2")
    return float(parts[0]), int(parts[1]), int(parts[2]) if len(parts) == 3 else 1


def _api(plan: Plan, model: str, cached: str | None, batched: str | None, least: int, market: Market | None) -> BreakEven:
    shares = {name: units.fraction(text, f"--{name}") if text else 0.0 for name, text in (("cached", cached), ("batched", batched))}
    found = costs.versus_api(plan, model, cached_share=shares["cached"], batch_share=shares["batched"], market=market, least=least)
    if found is None:
        raise BadInput(f"--api {model}: the plan's fleet has no price, or is of several kinds: there is nothing to compare with")
    return found


def _api_note(model: str) -> str:
    """Return where the price of a hosted model is from, and whether it can still be had."""
    price = pricing.api_price(model)
    known = f"{price.model}: {price.source}, {price.date}"
    if price.withdrawn is None:
        return known
    is_gone = price.withdrawn <= price.date[-10:]
    return f"{known}; {'it was' if is_gone else 'it is'} withdrawn on {price.withdrawn}{': nobody sells it any more' * is_gone}"


# ---------------------------------------------------------------- changes


def changes(plan: Plan, market: Market, small: str | None, line: progress.Line | None = None) -> tuple[Sensitivity, ...]:
    """Return what changes would make of a plan: made again on its own kind of device, with the usual headroom, as it is and changed."""
    if plan.stages or plan.gpu is None or plan.apart:
        raise BadInput("--what-if: the plan is of several stages or kinds of device; plan the changed scenario and compare with --baseline")
    request = planner.Request(
        model=plan.model,
        workload=plan.workload,
        slo=slo.parse(plan.slo),
        gpus=(plan.gpu,),
        precisions=(plan.fleet[0].precision,),
        profiles=() if plan.profile.provenance is Provenance.ROOFLINE else (plan.profile,),
        term=costs.term_of(plan, market),
        market=market,
    )
    told = None if line is None else line.counted("changes planned")
    first = smaller(plan.model) if small is None else models.find(small).id
    try:
        with workers.Local() as crew:
            return sensitivity(request, planner.plan(request), planner.plan, first, crew, told)
    finally:
        if line is not None:
            line.clear()


# ---------------------------------------------------------------- terms


def _mix(plan: Plan, market: Market, hours: str, floor: int | None, spot: str | None) -> Mix:
    """Return the cheapest terms for the plan's kind of instance: each hour's replicas in whole instances of it."""
    if plan.gpu is None or not plan.prices or plan.apart:
        raise BadInput("--hours: the plan is of several kinds or has no price; terms are compared for one kind of instance")
    offer = plan.prices[0]
    each = max(offer.devices // plan.devices_per_replica, 1)
    wanted = [-(-replicas // each) for replicas in replicas_by_hour(hours)]
    kept = plan.replicas if floor is None else floor
    return mix.best(wanted, -(-kept // each), _terms(market, offer.provider, offer.instance, offer.region), _reclaims(spot))


def _sold(plan: Plan, market: Market, prices: Path | None) -> Market:
    """Return the market that terms are compared on.  Raises BadInput where the plan was bought on another one that nobody named."""
    if prices is None and costs.market_of(plan) is not market:
        raise BadInput("--hours: the plan's prices are not the catalogue's, and its record has those of one term alone; name --prices FILE")
    return market


def _terms(market: Market, provider: str, instance: str, region: str) -> Terms:
    """Return what one kind of instance costs on each term."""
    same = [o for o in market.offers if (o.provider, o.instance, o.region) == (provider, instance, region)]
    usd = {term: min((o for o in same if o.term == term), key=lambda o: o.usd_per_h, default=None) for term in pricing.TERMS}
    on_demand, reserved, spot = usd["on-demand"], usd["reserved"], usd["spot"]
    if on_demand is None:
        raise BadInput(f"--hours: {provider} {instance} in {region} has no on-demand price to compare terms with")
    held = None if reserved is None else market.reservations.get(reserved)
    return Terms(
        on_demand_usd_per_h=on_demand.usd_per_h,
        reserved_usd_per_h=None if reserved is None else reserved.usd_per_h,
        spot_usd_per_h=None if spot is None else spot.usd_per_h,
        committed=0 if held is None else held.committed,
        reserved_at_most=None if held is None else held.at_most,
    )


def replicas_by_hour(text: str) -> list[int]:
    """Return numbers of replicas: '2,4,10', or '2x8,4x8,10x8' for eight hours each."""
    found: list[int] = []
    for part in text.split(","):
        replicas, _, times = part.strip().partition("x")
        if not _COUNT.fullmatch(replicas) or not _COUNT.fullmatch(times or "1"):
            raise BadInput(f"--hours {text}: write replicas hour by hour, as 2,4,10 or, for eight hours each, as 2x8,4x8,10x8")
        if len(found) + int(times or "1") > 24 * 366:
            raise BadInput(f"--hours {text}: is more than the hours of a year; give those of a day, a week or a year")
        found += [int(replicas)] * int(times or "1")
    if not any(found):
        raise BadInput(f"--hours {text}: no replica runs in any hour, and there is nothing to price; write replicas x hours, as 2x8,4x16")
    return found


_SPOT = {"life": "mean_life_s", "start": "start_s", "refill": "refill_s", "waste": "waste_s"}


def _reclaims(text: str | None) -> Reclaims | None:
    """Return how spot goes and comes: 'life=6h,pools=3,start=5min,refill=10min,waste=30s'."""
    if text is None:
        return None
    pairs = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if set(pairs) - {*_SPOT, "pools"} or not {"life", "pools", "start", "refill"} <= set(pairs) or not _COUNT.fullmatch(pairs["pools"]):
        raise BadInput(f"--spot {text}: write life=6h,pools=3,start=5min,refill=10min and, where work is lost, waste=30s")
    times = {_SPOT[name]: units.seconds(value, f"--spot {name}") for name, value in pairs.items() if name != "pools"}
    return Reclaims(pools=int(pairs["pools"]), source="given", **times)


def site(pue: float | None, host_w: float | None, co2_g_per_kwh: float | None, usd_per_kwh: float | None) -> Site:
    """Return where machines stand, as far as it was said."""
    named = Site(host_w=host_w, co2_g_per_kwh=co2_g_per_kwh, usd_per_kwh=usd_per_kwh)
    return named if pue is None else dataclasses.replace(named, pue=pue)
