"""What a change would save or cost: the plan made again under it, simulation and all.

One more millisecond of a limit, a tenth more traffic, INT8 weights, a cache that answers three requests in ten or holds three tokens in ten
of each prompt, a small model that answers seven requests in ten.  Each is a request of its own, planned as the first was, by workers where
there are some; replicas are whole, so a change that frees less than one frees nothing, and a difference inside the plan's own interval is
said to be none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlsys_bench import models, pricing, slo, workers, workload
from mlsys_bench.billing import Sensitivity
from mlsys_bench.errors import MlsysError
from mlsys_bench.plan.request import Request
from mlsys_bench.types import Lengths, Limit, Plan, Provenance

MORE_S = 0.001
MORE_SHARE = 0.1
CACHED_SHARE = 0.3  # of requests that a cache answers, or of each prompt that is found in one
ESCALATED_SHARE = 0.3  # of a cascade's requests that its small model passes on
SMALLER = 0.45  # of a model's parameters, at most, has a small one that may answer first
AGAIN = "planned again and simulated"
Replan = Callable[[Any], Plan]
_MAKERS = re.compile("[a-z]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A change of what is asked for.  Fleets of all its requests together do the work."""

    what: str
    requests: tuple[Any, ...]  # of one model, or of a stage graph
    leaves_out: str = ""  # what planning it so does not see


def sensitivity(
    request: Request,
    plan: Plan,
    replan: Replan,
    small_model: str | None = None,
    executor: Executor | workers.Local | None = None,
    told: workers.Told | None = None,
) -> tuple[Sensitivity, ...]:
    """Return what each change makes of a plan; `replan` plans a request as this one was."""
    return rows(list(variants(request, small_model)), plan, replan, executor, told)


def rows(
    changes: Sequence[Variant],
    plan: Plan,
    replan: Replan,
    executor: Executor | workers.Local | None = None,
    told: workers.Told | None = None,
) -> tuple[Sensitivity, ...]:
    """Return what each of these changes makes of a plan."""
    return tuple(workers.each(_row, changes, shared=(plan, replan), executor=executor, told=told))


def smaller(model: str) -> str | None:
    """Return the model that may answer first in a cascade: the largest below half the size of the same series, else of the same makers."""
    large = models.find(model)
    makers, series = _MAKERS.match(large.id), large.id.rpartition("-")[0]
    kin = [m for m in models.every() if makers and m.id.startswith(makers[0]) and m.params <= SMALLER * large.params]
    return max(kin, key=lambda m: (m.id.rpartition("-")[0] == series, m.params)).id if kin else None


def variants(request: Request, small_model: str | None = None) -> Iterator[Variant]:
    """Yield the changes: every limit a millisecond and a tenth later, INT8, traffic, caches; a cascade where a small model is named."""
    for limit in slo.latencies(request.slo):
        yield Variant(what=f"{slo.key(limit)} 1 ms later", requests=(_later(request, limit, limit.limit + MORE_S),))
        yield Variant(what=f"{slo.key(limit)} 10 % later", requests=(_later(request, limit, limit.limit * (1 + MORE_SHARE)),))
    if request.precisions != ("int8",):
        yield Variant(
            what="INT8 weights", requests=(dataclasses.replace(request, precisions=("int8",)),), leaves_out="what INT8 does to answers"
        )
    yield Variant(what="10 % more traffic", requests=(_scaled(request, 1 + MORE_SHARE),))
    yield Variant(what="a cache that answers 30 %", requests=(_scaled(request, 1 - CACHED_SHARE),), leaves_out="the price of the cache")
    if not request.workload.tenants:
        yield Variant(
            what="30 % of each prompt cached",
            requests=(_shorter(request, 1 - CACHED_SHARE),),
            leaves_out="that cached tokens are still held and read: it saves this at most",
        )
    if small_model is not None:
        small = dataclasses.replace(request, model=small_model, profiles=(), gpus=request.gpus or _devices(request))
        yield Variant(
            what=f"{small_model} first, 30 % passed on",
            requests=(small, _scaled(request, ESCALATED_SHARE)),
            leaves_out="that a request passed on waits for both; each fleet keeps the limits alone",
        )


def _row(shared: tuple[Plan, Replan], variant: Variant) -> Sensitivity:
    plan, replan = shared
    how = f"{AGAIN}; leaves out {variant.leaves_out}" if variant.leaves_out else AGAIN
    try:
        made = [replan(request) for request in variant.requests]
    except MlsysError as error:  # a change may be impossible: that is what is to be known of it
        return Sensitivity(
            what=variant.what, replicas=None, usd_per_hour=None, change_usd_per_month=None, change=None, clear=None,
            binding_constraint=None, why_not=str(error), method=how,
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
        usd_interval=_together(made),
        provenance=Provenance.weakest(plan.provenance, *(new.provenance for new in made)),
        method=how,
    )


def _clear(plan: Plan, usd: float | None) -> bool | None:
    interval = plan.intervals.get("usd_per_hour")
    return None if usd is None or interval is None else not interval[0] <= usd <= interval[1]


def _total(plans: Sequence[Plan]) -> float | None:
    prices = [plan.usd_per_hour for plan in plans]
    return None if None in prices else sum(usd for usd in prices if usd is not None)


def _together(plans: Sequence[Plan]) -> tuple[float, float] | None:
    """Return the ends of all fleets' costs added up: they err together."""
    ends = [plan.intervals.get("usd_per_hour") for plan in plans]
    known = [end for end in ends if end is not None]
    return (sum(low for low, _ in known), sum(high for _, high in known)) if len(known) == len(ends) else None


# ---------------------------------------------------------------- changed requests


def _devices(request: Request) -> tuple[str, ...]:
    return tuple(dict.fromkeys(profile.layout.device for profile in request.profiles))


def _later(request: Request, limit: Limit, limit_s: float) -> Request:
    limits = tuple(dataclasses.replace(one, limit=limit_s) if one == limit else one for one in request.slo)
    return dataclasses.replace(request, slo=limits)


def _scaled(request: Request, times: float) -> Request:
    """Return the request with more of the same traffic, or with a part of it left out at random; of a trace the same requests, faster."""
    traffic = dataclasses.replace(request.workload, rate_per_s=request.workload.rate_per_s * times, observed=None)
    changed = dataclasses.replace(request, workload=traffic)
    if request.trace is None:
        return changed
    if times > 1:
        return dataclasses.replace(changed, trace=workload.sped_up(request.trace, times))
    kept = np.random.default_rng([request.seed, 2]).random(len(request.trace)) < times
    return dataclasses.replace(changed, trace=workload.take(request.trace, kept))


def _shorter(request: Request, times: float) -> Request:
    """Return the request with prompts of which so much is left to compute."""
    traffic = dataclasses.replace(request.workload, prompt_tokens=_scaled_lengths(request.workload.prompt_tokens, times), observed=None)
    changed = dataclasses.replace(request, workload=traffic)
    if request.trace is None:
        return changed
    tokens = np.maximum(np.rint(request.trace.prompt_tokens * times), 1).astype(request.trace.prompt_tokens.dtype)
    return dataclasses.replace(changed, trace=dataclasses.replace(request.trace, prompt_tokens=tokens))


def _scaled_lengths(lengths: Lengths, times: float) -> Lengths:
    most = None if lengths.max is None else max(round(lengths.max * times), 1)
    return dataclasses.replace(lengths, mean=max(lengths.mean * times, 1.0), max=most)
