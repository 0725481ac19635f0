"""The bill of a plan: what it costs at its average load, what it draws, and from when it is cheaper than an API."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from mlsys_bench import hardware, latency, pricing, workload
from mlsys_bench.billing import Bill, BreakEven, Energy, Line
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.pricing import Load, Market, energy
from mlsys_bench.pricing.energy import Site
from mlsys_bench.types import FleetItem, Offer, Plan


def check(plan: Plan) -> Plan:
    """Return the plan, or raise BadInput where its own figures cannot be: nothing can be priced by them, or compared."""
    workload.checked_rate(plan.workload.rate_per_s, "workload.rate_per_s")
    for name, value in (("replicas", plan.replicas), ("max_batch", plan.max_batch)):
        if value < 1:
            raise BadInput(f"{name} is {value}; a plan has at least 1")
    if plan.gpus < 0 or not plan.fleet:
        raise BadInput(f"a fleet of {plan.gpus} devices and {len(plan.fleet)} kinds; a plan has some")
    if plan.usd_per_hour is not None and not (plan.usd_per_hour >= 0 and math.isfinite(plan.usd_per_hour)):
        raise BadInput(f"usd_per_hour is {plan.usd_per_hour:g}; a price is from 0 up")
    if not plan.stages and plan.profile.form == "step":
        workload.checked_lengths(plan.workload.prompt_tokens, "workload.prompt_tokens")
        workload.checked_lengths(plan.workload.output_tokens, "workload.output_tokens")
        latency.check(plan.profile)
    return plan


def load(plan: Plan, requests_per_s: float | None = None) -> Load:
    """Return what a plan's fleet does on average: the rate asked for, else the mean of the day that was planned for.

    The machine time of a token is that of a step at the load of one replica: a prefill step of a mean prompt, shared by its tokens, and a
    decode step of as many sequences as run together (Little: rate x output tokens x TPOT), shared by those.  A system of several stages
    has a price per request alone: most of its stages have no tokens.
    """
    rate = plan.mean_per_s if requests_per_s is None else requests_per_s
    if plan.stages or plan.profile.form != "step":
        return Load(requests_per_s=rate, input_tokens=0, output_tokens=0, input_s=0, output_s=0, provenance=plan.provenance)
    prompt, output = plan.workload.prompt_tokens.mean, plan.workload.output_tokens.mean
    input_s, output_s = token_s(plan)
    return Load(
        requests_per_s=rate, input_tokens=prompt, output_tokens=output, input_s=input_s, output_s=output_s,
        provenance=plan.profile.provenance,
    )  # fmt: skip


def token_s(plan: Plan) -> tuple[float, float]:
    """Return the machine seconds of an input and of an output token on one replica at the planned load.  Raises BadInput for a service."""
    if plan.profile.form != "step":
        raise BadInput(f"tokens of a {plan.profile.form} profile have no steps to share a bill by; give a step profile")
    prompt, output = plan.workload.prompt_tokens.mean, plan.workload.output_tokens.mean
    together = plan.workload.rate_per_s / plan.replicas * output * plan.predicted.get("tpot_p50_s", 0.0)
    batch = min(max(1.0, together), float(plan.max_batch))
    decode = latency.step_s(plan.profile, (batch, batch * (prompt + output / 2), 0.0, 0.0, batch)) / batch
    prefill = latency.step_s(plan.profile, (0.0, 0.0, prompt, prompt**2 / 2, 1.0)) / prompt
    return prefill, decode


def bill(plan: Plan, extra: Sequence[Line | None] = (), unpriced: Sequence[str] = (), requests_per_s: float | None = None) -> Bill | None:
    """Return the bill of a plan with further lines (storage, network, vCPU); None where its fleet has no price.

    A line that is None has no price: name it in `unpriced`, so that the reader knows what the sum leaves out.
    """
    lines = fleet_lines(plan)
    if lines is None:
        return None
    return pricing.bill([*lines, *(line for line in extra if line is not None)], load(plan, requests_per_s), unpriced)


def fleet_lines(plan: Plan) -> list[Line] | None:
    """Return a line for each part of a plan's fleet, and for what stages pay beside; None where a part has no price."""
    lines = []
    for item in plan.fleet:
        if item.usd_per_hour is None:
            return None
        offer = _offer(plan, item.instance, item.gpu)
        lines.append(
            Line(
                what=f"{_rented(item)} ({item.stage}){_on_term(plan, item)}",
                usd_per_h=item.usd_per_hour,
                source=offer.source if offer else "the plan",
                date=offer.date if offer else "",
                provenance=offer.provenance if offer else plan.provenance,
            )
        )
    beside = plan.stage_fleet.bill.beside if plan.stage_fleet else ()
    return lines + [
        Line(what=f"{x.what} ({x.stage})", usd_per_h=x.usd_per_hour, source=x.source, date=x.date, provenance=x.provenance) for x in beside
    ]


def _on_term(plan: Plan, item: FleetItem) -> str:
    """Return ', spot' or the like where all that an item is bought by is on one term that is not the usual one."""
    terms = {offer.term for offer in plan.prices if offer.device == item.gpu}
    return f", {terms.pop()}" if len(terms) == 1 and "on-demand" not in terms else ""


def _rented(item: FleetItem) -> str:
    """Return what was ordered; an order of several kinds says how many of each itself."""
    mixed = item.instance is not None and " + " in item.instance
    return str(item.instance) if mixed else f"{item.instances} x {item.instance or item.gpu}"


def draw(plan: Plan, site: Site | None = None, idle_w: float | None = None, requests_per_s: float | None = None) -> Energy | None:
    """Return what the devices of a plan draw at its average load, or at the rate asked for; None where no device's watts are known.

    A device is as busy as the plan says at the rate it was made for, and less in proportion; stranded ones idle.
    """
    rate = plan.mean_per_s if requests_per_s is None else requests_per_s
    planned = workload.at_peak(plan.workload).rate_per_s if plan.stages else plan.workload.rate_per_s  # of stages the record keeps the mean
    busy = min(plan.utilisation * rate / planned, 1.0)
    parts: list[Energy] = []
    unknown: list[str] = []
    for item in plan.fleet:
        offer, used = _offer(plan, item.instance, item.gpu), item.replicas * max(item.tp * item.attention_dp, item.ep) * item.pp
        rented = item.devices if item.devices is not None else item.instances * offer.devices if offer else used
        drawn = energy.draw(
            _tdp_w(item.gpu), used, busy, site=site, hosts=item.instances, stranded=max(rented - used, 0),
            idle_w=idle_w, requests_per_s=rate,
        )  # fmt: skip
        parts += [drawn] if drawn is not None else []
        unknown += [f"{item.gpu} counts for nothing: nobody publishes its watts"] if drawn is None else []
    found = energy.together(parts)
    return None if found is None else dataclasses.replace(found, assumed=tuple(dict.fromkeys((*found.assumed, *unknown))))


def _tdp_w(device: str) -> float | None:
    """Return the watts of a catalogue device; None for what has none, such as a vCPU."""
    return next((known.tdp_w for known in hardware.every() if known.id == device), None)


# ---------------------------------------------------------------- on other prices


def market_of(plan: Plan) -> Market:
    """Return what a plan was bought on, as far as its record says: the catalogue, or else the offers of a contract that it holds."""
    return pricing.published() if set(plan.prices) <= set(pricing.offers()) else Market(offers=plan.prices)


def term_of(plan: Plan, market: Market) -> str:
    """Return the term that a plan rents on beside what is committed."""
    return next((offer.term for offer in plan.prices if not market.committed(offer)), "on-demand")


def rebought(plan: Plan, market: Market) -> Plan | None:
    """Return a plan with its fleet bought on other prices, what is committed first; None where the record does not say the whole order.

    That is so of several kinds of replicas and of several zones.  Without a price there the plan has none.  Raises Infeasible where quotas
    leave too few.
    """
    spread = plan.secured is not None and (len(plan.secured.zones) > 1 or bool(plan.secured.spot))
    if len(plan.fleet) > 1 or plan.stages or spread:
        return None
    item, size, times = plan.fleet[0], *_nodes(plan)
    found = pricing.pack(item.gpu, size, item.replicas * times, term_of(plan, market), market)
    usd = None if found is None else found.usd_per_h
    per_token = None if usd is None or not plan.usd_per_hour else usd / plan.usd_per_hour
    return dataclasses.replace(
        plan,
        fleet=(
            dataclasses.replace(
                item,
                instances=found.instances if found else item.replicas,
                instance=found.instance if found else None,
                usd_per_hour=usd,
                devices=found.devices if found else None,
            ),
        ),
        usd_per_hour=usd,
        usd_per_month=None if usd is None else pricing.usd_per_month(usd),
        usd_per_million_tokens=None
        if per_token is None or plan.usd_per_million_tokens is None
        else plan.usd_per_million_tokens * per_token,
        prices=tuple(lot.offer for lot in found.lots) if found else (),
    )


def _nodes(plan: Plan) -> tuple[int, int]:
    """Return the devices of a replica that must stand in one instance, and how many such parts it has: nodes of a pipeline stand apart."""
    nodes = plan.fleet[0].pp
    return plan.devices_per_replica // nodes, nodes


def versus_api(
    plan: Plan, model: str, *, cached_share: float = 0.0, batch_share: float = 0.0, market: Market | None = None, least: int = 1,
) -> BreakEven | None:  # fmt: skip
    """Return the requests a day from which the plan's kind of fleet beats an API on the plan's requests; None where it has no price.

    A replica carries what the plan says one does at most within the limits; `cached_share` of the prompt is read from the API's cache.
    Fleets are the cheapest mixes of instances on a market, that of the plan when left out; `least` is the fewest replicas there may be.
    """
    price = pricing.api_price(model)
    if price.mode != "chat":
        raise BadInput(f"{price.model} is sold for {price.mode} and writes no answers, as this plan does; name a chat model")
    prompt, output = plan.workload.prompt_tokens.mean, plan.workload.output_tokens.mean
    asked = pricing.api_usd_per_request(price, prompt, output, cached_tokens=cached_share * prompt, batch_share=batch_share)
    priced = _priced(plan, market or market_of(plan))
    if priced is None:
        return None
    most_per_s = plan.workload.rate_per_s * (1 + plan.headroom) / plan.replicas
    found = pricing.break_even(asked, most_per_s * 86_400, priced, least=least, most=max(4 * plan.replicas, 200))
    return dataclasses.replace(found, model=model)


def _priced(plan: Plan, market: Market) -> Callable[[int], float] | None:
    """Return the price of n replicas of the plan's kind on its own term, infinite beyond quotas; None where there is none."""
    if plan.gpu is None or not plan.prices or plan.stages or plan.apart:
        return None
    gpu, term, (size, times) = plan.gpu, term_of(plan, market), _nodes(plan)
    one = pricing.pack(gpu, size, times, term, market)
    if one is None:
        return None
    known = {1: one.usd_per_h}

    def usd_per_h(replicas: int) -> float:
        if replicas not in known:
            known[replicas] = math.inf if math.inf in known.values() else _usd_within(gpu, size, replicas * times, term, market)
        return known[replicas]

    return usd_per_h


def _usd_within(gpu: str, size: int, replicas: int, term: str, market: Market) -> float:
    try:
        fleet = pricing.pack(gpu, size, replicas, term, market)
    except Infeasible:
        return math.inf
    assert fleet is not None
    return fleet.usd_per_h


def _offer(plan: Plan, instance: str | None, gpu: str) -> Offer | None:
    """Return the offer that a part of the fleet was rented by."""
    named = [o for o in plan.prices if instance is not None and instance in (o.instance, f"{o.provider} {o.instance}")]
    return next((o for o in [*named, *plan.prices] if o.device == gpu), None)
