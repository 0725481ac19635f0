"""Two bills beside each other: what a plan saves or costs against a stated baseline, per hour and per request."""

from __future__ import annotations

from mlsys_bench.billing import Comparison
from mlsys_bench.pricing.bill import SECONDS_PER_H, usd_per_month
from mlsys_bench.types import Plan


def compare(baseline: Plan, plan: Plan) -> tuple[Comparison, ...]:
    """Return the figures of a plan beside a baseline's, cost first; per request they may be compared whatever the traffic of each."""
    rows = (
        ("usd_per_hour", baseline.usd_per_hour, plan.usd_per_hour),
        ("usd_per_month", baseline.usd_per_month, plan.usd_per_month),
        ("usd_per_request", usd_per_request(baseline), usd_per_request(plan)),
        ("usd_per_million_tokens", baseline.usd_per_million_tokens, plan.usd_per_million_tokens),
        ("replicas", baseline.replicas, plan.replicas),
        ("gpus", baseline.gpus, plan.gpus),
        ("utilisation", baseline.utilisation, plan.utilisation),
        ("requests_per_s", baseline.workload.rate_per_s, plan.workload.rate_per_s),
    )
    return tuple(Comparison(what=what, baseline=old, plan=new, change=_change(old, new)) for what, old, new in rows)


def saving_usd_per_month(baseline: Plan, plan: Plan) -> float | None:
    """Return what a month of the plan's traffic costs less than at the baseline's price per request; None where one is unpriced."""
    old, new = usd_per_request(baseline), usd_per_request(plan)
    if old is None or new is None:
        return None
    return usd_per_month((old - new) * plan.mean_per_s * SECONDS_PER_H)


def incomparable(baseline: Plan, plan: Plan) -> tuple[str, ...]:
    """Return why the two are not the same promise at the same load: what a reader must know before the difference."""
    found = [
        (baseline.model != plan.model, f"the models differ: {baseline.model} and {plan.model}"),
        (baseline.slo != plan.slo, f"the limits differ: {baseline.slo} and {plan.slo}"),
        (
            baseline.workload.rate_per_s != plan.workload.rate_per_s,
            f"the traffic differs: {baseline.workload.rate_per_s:g}/s and {plan.workload.rate_per_s:g}/s; compare per request",
        ),
        (_lengths(baseline) != _lengths(plan), "the lengths of requests differ"),
        (
            {o.date for o in baseline.prices} != {o.date for o in plan.prices},
            f"the prices are of different days: {_dates(baseline)} and {_dates(plan)}",
        ),
    ]
    return tuple(why for differs, why in found if differs)


def usd_per_request(plan: Plan) -> float | None:
    """Return what a request of a plan costs, idle time included; None where the fleet has no price."""
    if plan.usd_per_hour is None or not plan.mean_per_s > 0:
        return None
    return plan.usd_per_hour / (plan.mean_per_s * SECONDS_PER_H)


def _change(old: float | None, new: float | None) -> float | None:
    return None if old is None or new is None or old == 0 else new / old - 1


def _lengths(plan: Plan) -> object:
    return plan.workload.prompt_tokens, plan.workload.output_tokens


def _dates(plan: Plan) -> str:
    return ", ".join(sorted({o.date for o in plan.prices})) or "no day"
