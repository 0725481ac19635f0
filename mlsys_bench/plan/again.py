"""A plan's predictions made anew at another traffic, with the plan's own profile and engine settings."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench import models, slo, stats
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.plan import confirm, demand, intervals
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.candidates import BLOCK_TOKENS, UNBOUNDED_CONTEXT, Candidate
from mlsys_bench.plan.request import MAX_STEP_TOKENS, Request
from mlsys_bench.plan.sizing import MOST, Design, drawn
from mlsys_bench.types import Limit, Plan, Workload

MEANS = tuple(Limit(metric=metric, stat="mean", limit=float("inf")) for metric in ("ttft", "tpot", "itl", "e2e"))  # predicted as well


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """What one replica does at a traffic, with 90 % intervals; no figures where it would be overloaded.  `share` of requests fit."""

    predicted: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    rate_per_s: float  # of one replica
    capacity_per_s: float  # of one replica
    capacity_interval: tuple[float, float]
    utilisation: float
    share: float


def foresee(plan: Plan, traffic: Workload, replicas: int, *, seed: int = 0) -> Foreseen:
    """Return what one replica of the plan does as one of so many at this traffic of the fleet.

    Raises BadInput where none of the requests fits a replica.
    """
    design = _design(plan, traffic, replicas)
    utilisation = design.replica.utilisation(design.each_per_s)
    if utilisation >= MOST:
        return _foreseen(design, {}, {}, seed)
    limits = (*(limit for limit in slo.parse(plan.slo) if limit.tenant is None), *MEANS)
    request = Request(model=plan.model, workload=traffic, slo=limits, profiles=(plan.profile,), seed=seed)
    trial = confirm.trial(request, design, confirm.surest())
    analytic = design.replica.predict(design.each_per_s).keys(limits)
    spread = intervals.of(design, trial, analytic, request)
    return _foreseen(design, trial.keys(limits), spread.intervals, seed)


def _foreseen(design: Design, predicted: dict[str, float], around: dict[str, tuple[float, float]], seed: int) -> Foreseen:
    capacity, profiles = design.replica.capacity_per_s, drawn(design.candidate.profile, intervals.DRAWS, seed)
    capacities = [Replica(p, design.replica.limits, design.replica.demand, samples=1).capacity_per_s for p in profiles]
    low, high = stats.quantiles([capacity, *capacities], intervals.TAILS)
    return Foreseen(
        predicted=predicted,
        intervals=around,
        rate_per_s=design.each_per_s,
        capacity_per_s=capacity,
        capacity_interval=(min(low, capacity), max(high, capacity)),
        utilisation=design.replica.utilisation(design.each_per_s),
        share=design.replica.demand.share,
    )


def _design(plan: Plan, traffic: Workload, replicas: int) -> Design:
    """Return the plan's design with so many replicas, nothing of it searched for."""
    item, limits = plan.fleet[0], _limits(plan)
    fitting = demand.of(traffic).fitting(limits)
    if not len(fitting.prompt):
        raise BadInput(f"no request of this traffic fits a replica of the plan, which holds {plan.kv_tokens_per_replica:,} KV tokens")
    replica = Replica(plan.profile, limits, fitting)
    candidate = Candidate(
        gpu=item.gpu, precision=item.precision, tp=item.tp, profile=plan.profile, limits=limits, device=None, memory="as planned"
    )
    rate_per_s = traffic.rate_per_s * fitting.share
    return Design(
        candidate=candidate,
        replica=replica,
        rate_per_s=rate_per_s,
        replicas=replicas,
        fewest=replicas,
        binds=None,
        price=None,
    )


def _limits(plan: Plan) -> Limits:
    """Return what a replica of the plan holds."""
    constants = plan.profile.constants
    block_tokens = int(constants.get("block_tokens", BLOCK_TOKENS))
    step_tokens = plan.max_step_tokens or int(constants.get("max_step_tokens", MAX_STEP_TOKENS))
    context = int(constants.get("max_context", _longest_context(plan.model)))
    context = min(context, plan.kv_tokens_per_replica // plan.fleet[0].attention_dp)
    return Limits(plan.max_batch, step_tokens, block_tokens, plan.kv_tokens_per_replica // block_tokens, context)


def _longest_context(model: str) -> int:
    try:
        return models.find(model).max_context or UNBOUNDED_CONTEXT
    except MlsysError:  # a checkpoint of another machine
        return UNBOUNDED_CONTEXT
