"""The plan of tenants: of one fleet for all, or of several fleets taken together, with a row for each tenant."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mlsys_bench import pricing, slo
from mlsys_bench.plan.mixed import together
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial
from mlsys_bench.tenancy import Division, Tenancy, TenantPlan
from mlsys_bench.types import FleetItem, Plan, Provenance

V = TypeVar("V")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Tenants with a fleet of their own, planned."""

    names: tuple[str, ...]
    plan: Plan
    design: Design
    trial: Trial


def summed(values: Sequence[float | None]) -> float | None:
    """Return the sum, None where one of them is not known."""
    known = [value for value in values if value is not None]
    return round(sum(known), 6) if len(known) == len(values) else None


def joined(request: Request, parts: Sequence[Part], divisions: tuple[Division, ...]) -> Plan:
    """Return the plan of the fleets, with a row for each tenant; figures of all requests stay at the top."""
    rows = {row.name: row for part in parts for row in _rows(request, part)}
    tenancy = Tenancy(tenants=tuple(rows[name] for name in _shares(request)), divisions=divisions)
    made = _lifted(parts[0].plan) if len(parts) == 1 else _together(request, parts)
    return dataclasses.replace(
        made, workload=request.workload, slo=slo.show(request.slo), tenancy=tenancy,
        day_mean_per_s=request.day_mean_per_s,
    )  # fmt: skip


def _rows(request: Request, part: Part) -> Iterator[TenantPlan]:
    """Yield what each tenant of a fleet sees."""
    shares = _shares(request)
    alone = len(part.names) == 1
    for name in part.names:
        limits = tuple(x for x in request.slo if x.tenant == name)
        yield TenantPlan(
            name=name, share=shares[name], rate_per_s=shares[name] * request.workload.rate_per_s,
            slo=slo.show(tuple(dataclasses.replace(x, tenant=None) for x in limits)),
            binds=any(slo.show_limit(x) in part.plan.binding_constraint for x in limits) or (alone and "<" in part.plan.binding_constraint),
            predicted=_own(part.plan.predicted, name, alone), intervals=_own(part.plan.intervals, name, alone),
            analytic=_own(part.plan.analytic, name, alone),
        )  # fmt: skip


def _shares(request: Request) -> dict[str, float]:
    if request.trace is not None and request.trace.tenant is not None:
        return {name: float((request.trace.tenant == i).mean()) for i, name in enumerate(request.trace.tenants)}
    return {tenant.name: tenant.share for tenant in request.workload.tenants}


def _own(figures: Mapping[str, V], name: str, alone: bool) -> dict[str, V]:
    """Return the figures of one tenant under the usual keys."""
    if alone:
        return {key: value for key, value in figures.items() if key.partition("_")[0] in (*slo.LATENCIES, "goodput")}
    return {key.removeprefix(f"{name}:"): value for key, value in figures.items() if key.startswith(f"{name}:")}


def _lifted(made: Plan) -> Plan:
    """Return a plan whose figures are those of all requests: those of tenants have rows of their own."""
    return dataclasses.replace(
        made,
        predicted=_of_all(made.predicted),
        intervals=_of_all(made.intervals),
        analytic=_of_all(made.analytic),
        survivors=_of_all(made.survivors),
    )


def _of_all(figures: Mapping[str, V]) -> dict[str, V]:
    return {key: value for key, value in figures.items() if ":" not in key}


def _together(request: Request, parts: Sequence[Part]) -> Plan:
    """Return several fleets as one plan: sums, and what all requests together see.  Settings of an engine are those of the dearest."""
    first = max(parts, key=lambda part: (part.plan.usd_per_hour or 0.0, part.plan.gpus)).plan
    usd, gpus = summed([part.plan.usd_per_hour for part in parts]), {part.plan.gpu for part in parts}
    shares = [part.design.rate_per_s / sum(p.design.rate_per_s for p in parts) for part in parts]
    outputs = [part.design.replica.demand.mean_output for part in parts]
    seen = together([part.trial.all for part in parts], shares, outputs)
    theory = together([part.design.replica.predict(part.design.each_per_s) for part in parts], shares, outputs)
    devices = sum(part.plan.gpus for part in parts)
    tokens_per_s = request.usual_share * sum(part.design.rate_per_s * output for part, output in zip(parts, outputs, strict=True))
    predicted = seen.keys(())
    return dataclasses.replace(
        first,
        fleet=tuple(_item(part, item) for part in parts for item in part.plan.fleet),
        replicas=sum(part.plan.replicas for part in parts),
        gpus=devices,
        gpu=next(iter(gpus)) if len(gpus) == 1 else None,
        usd_per_hour=usd,
        usd_per_month=None if usd is None else pricing.usd_per_month(usd),
        usd_per_million_tokens=None if usd is None else pricing.usd_per_million_tokens(usd, tokens_per_s),
        utilisation=sum(part.plan.utilisation * part.plan.gpus for part in parts) / devices,
        binding_constraint="; ".join(f"{' + '.join(part.names)}: {part.plan.binding_constraint}" for part in parts),
        headroom=min(part.plan.headroom for part in parts),
        provenance=Provenance.weakest(*(part.plan.provenance for part in parts)),
        predicted=predicted,
        intervals=_intervals(parts, predicted, usd, tokens_per_s),
        analytic=theory.keys(()),
        alternatives=(),
        assumptions=tuple(dict.fromkeys(line for part in parts for line in part.plan.assumptions)),
        prices=tuple({offer.instance: offer for part in parts for offer in part.plan.prices}.values()),
        notes=(
            "engine settings, profile and capacity of a replica are those of the dearest fleet; each is deployed on its own",
            *dict.fromkeys(line for part in parts for line in part.plan.notes),
        ),
        scaled=None, pressure=None, outlook=None, secured=None,
    )  # fmt: skip


def _item(part: Part, item: FleetItem) -> FleetItem:
    return dataclasses.replace(item, stage=" + ".join(part.names))


def _intervals(
    parts: Sequence[Part], predicted: Mapping[str, float], usd: float | None, tokens_per_s: float
) -> dict[str, tuple[float, float]]:
    """Return intervals of sums as sums of ends, and of latencies as wide as the widest among the fleets."""

    def ends(key: str) -> tuple[float, float]:
        found = [part.plan.intervals[key] for part in parts]
        return sum(low for low, _ in found), sum(high for _, high in found)

    made = {"replicas": ends("replicas")} | {f"{' + '.join(part.names)}_replicas": part.plan.intervals["replicas"] for part in parts}
    if usd is not None:
        hourly = ends("usd_per_hour")
        month, million = (tuple(map(f, hourly)) for f in (pricing.usd_per_month, lambda x: pricing.usd_per_million_tokens(x, tokens_per_s)))
        made |= {"usd_per_hour": hourly, "usd_per_month": (month[0], month[1]), "usd_per_million_tokens": (million[0], million[1])}
    devices = sum(part.plan.gpus for part in parts)
    busy = [tuple(end * part.plan.gpus / devices for end in part.plan.intervals["utilisation"]) for part in parts]
    made["utilisation"] = (sum(low for low, _ in busy), sum(high for _, high in busy))
    for key, value in predicted.items():
        known = [(part.plan.predicted[key], part.plan.intervals[key]) for part in parts if part.plan.predicted.get(key)]
        if known:
            made[key] = (value * min(low / x for x, (low, _) in known), value * max(high / x for x, (_, high) in known))
    return made
