"""Limits that physics forbids: below bytes / bandwidth or FLOPs / peak no software and no number of replicas helps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlsys_bench import latency, slo, stats, units
from mlsys_bench.errors import BadInput
from mlsys_bench.plan.candidates import Candidate
from mlsys_bench.plan.demand import Demand, Floats
from mlsys_bench.types import SLO, Limit


def check(limits: SLO, candidates: Sequence[Candidate], demand: Demand) -> None:
    """Raise BadInput naming limit, floor and device when a limit lies below the floor of every candidate."""
    for limit in slo.latencies(limits):
        least_s, best = min(((floor_s(c, demand, limit), c) for c in candidates), key=lambda found: found[0])
        if limit.limit < least_s:
            raise BadInput(
                f"SLO {slo.show_limit(limit)} is below the physics floor: {_what(limit)} takes at least {units.show_s(least_s)} on "
                f"{best.name}, the fastest considered, at full bandwidth and peak; allow more time or name a faster device"
            )


def floor_s(candidate: Candidate, demand: Demand, limit: Limit) -> float:
    """Return the least value that a latency's statistic can take on this candidate, alone on the replica."""
    demand = demand.of_tenant(limit.tenant)
    token_s = float(latency.floor_s(candidate.profile, (1.0, 0.0, 0.0, 0.0, 1.0)))
    if limit.metric in ("tpot", "itl"):
        return token_s if demand.mean_output > 1 else 0.0
    prompt = demand.prompt
    one = np.ones_like(prompt)
    first: Floats = latency.floor_s(candidate.profile, (0 * one, 0 * one, prompt, prompt**2 / 2, one))
    samples = first if limit.metric == "ttft" else first + (demand.output - 1) * token_s
    return float(samples.mean()) if limit.stat == "mean" else stats.quantile(samples, float(limit.stat[1:]) / 100)


def _what(limit: Limit) -> str:
    return {"ttft": "prefilling such a prompt", "tpot": "reading the weights once", "itl": "reading the weights once"}.get(
        limit.metric, "prefilling and decoding such a request"
    )
