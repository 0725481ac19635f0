"""What a change would save or cost: the plan made again under it.

One more millisecond of a limit, a tenth more traffic, INT8 weights, a cache that answers three requests in ten, a small model that answers
seven in ten.  Each is a request of its own, planned as the first was; replicas are whole, so a change that frees less than one frees
nothing, and a difference inside the plan's own interval is said to be none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from mlsys_bench import pricing, slo
from mlsys_bench.billing import Sensitivity
from mlsys_bench.errors import MlsysError
from mlsys_bench.plan.request import Request
from mlsys_bench.types import Limit, Plan

MORE_S = 0.001
MORE_SHARE = 0.1
CACHED_SHARE = 0.3  # of requests that a cache answers
ESCALATED_SHARE = 0.3  # of a cascade's requests that its small model passes on


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A change of what is asked for.  Fleets of all its requests together do the work."""

    what: str
    requests: tuple[Request, ...]


def sensitivity(request: Request, plan: Plan, replan: Callable[[Request], Plan], small_model: str | None = None) -> tuple[Sensitivity, ...]:
    """Return what each change makes of a plan; `replan` plans a request as this one was."""
    return tuple(_row(plan, variant, replan) for variant in variants(request, small_model))


def variants(request: Request, small_model: str | None = None) -> Iterator[Variant]:
    """Yield the changes: every limit a millisecond and a tenth later, traffic, INT8, a cache; a cascade where a small model is named.

    A trace is replayed as it is, so its traffic is not changed.
    """
    for limit in slo.latencies(request.slo):
        yield Variant(what=f"{slo.key(limit)} 1 ms later", requests=(_later(request, limit, limit.limit + MORE_S),))
        yield Variant(what=f"{slo.key(limit)} 10 % later", requests=(_later(request, limit, limit.limit * (1 + MORE_SHARE)),))
    if request.precisions != ("int8",):
        yield Variant(what="INT8 weights", requests=(dataclasses.replace(request, precisions=("int8",)),))
    if request.trace is not None:
        return
    yield Variant(what="10 % more traffic", requests=(_scaled(request, 1 + MORE_SHARE),))
    yield Variant(what="a cache that answers 30 %", requests=(_scaled(request, 1 - CACHED_SHARE),))
    if small_model is not None:
        small = dataclasses.replace(request, model=small_model, profiles=())
        yield Variant(what=f"{small_model} first, 30 % passed on", requests=(small, _scaled(request, ESCALATED_SHARE)))


def _row(plan: Plan, variant: Variant, replan: Callable[[Request], Plan]) -> Sensitivity:
    try:
        made = [replan(request) for request in variant.requests]
    except MlsysError as error:  # a change may be impossible: that is what is to be known of it
        return Sensitivity(
            what=variant.what, replicas=None, usd_per_hour=None, change_usd_per_month=None, change=None, clear=None,
            binding_constraint=None, why_not=str(error),
        )  # fmt: skip
    usd = _total(made)
    difference = None if usd is None or plan.usd_per_hour is None else usd - plan.usd_per_hour
    return Sensitivity(
        what=variant.what,
        replicas=sum(new.replicas for new in made),
        usd_per_hour=usd,
        change_usd_per_month=None if difference is None else pricing.usd_per_month(difference),
        change=None if difference is None or not plan.usd_per_hour else difference / plan.usd_per_hour,
        clear=_clear(plan, usd),
        binding_constraint="; ".join(dict.fromkeys(new.binding_constraint for new in made)),
    )


def _clear(plan: Plan, usd: float | None) -> bool | None:
    interval = plan.intervals.get("usd_per_hour")
    return None if usd is None or interval is None else not interval[0] <= usd <= interval[1]


def _total(plans: Sequence[Plan]) -> float | None:
    prices = [plan.usd_per_hour for plan in plans]
    return None if None in prices else sum(usd for usd in prices if usd is not None)


def _later(request: Request, limit: Limit, limit_s: float) -> Request:
    limits = tuple(dataclasses.replace(one, limit=limit_s) if one == limit else one for one in request.slo)
    return dataclasses.replace(request, slo=limits)


def _scaled(request: Request, times: float) -> Request:
    workload = dataclasses.replace(request.workload, rate_per_s=request.workload.rate_per_s * times, observed=None)
    return dataclasses.replace(request, workload=workload)
