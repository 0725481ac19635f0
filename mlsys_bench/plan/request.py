"""What a plan is asked for, checked before anything is computed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlsys_bench import latency, models, slo, workload
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.pricing import TERMS
from mlsys_bench.types import SLO, LatencyProfile, Workload

MAX_BATCH = 256  # sequences at once, as engines set it by default
MAX_STEP_TOKENS = 2048  # tokens a step, likewise


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Traffic, promises, and what may be rented.

    `gpus` may be empty: then the layouts of `profiles`, or every priced GPU of the catalogue, are considered.  `precisions` empty means
    those of the profiles, or bf16.  A profile is used for the layout it was measured in, the roofline for all others; limits of
    its engine (`max_batch`, `kv_tokens` … among its constants) win over the ones here.  `headroom` is the share of a replica's
    capacity that stays free.
    """

    model: str
    workload: Workload
    slo: SLO
    gpus: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    profiles: tuple[LatencyProfile, ...] = ()
    max_batch: int = MAX_BATCH
    max_step_tokens: int = MAX_STEP_TOKENS
    headroom: float = 0.2
    term: str = "on-demand"
    seed: int = 0


def check(request: Request) -> Request:
    """Return the request, or raise BadInput in one line."""
    models.find(request.model)
    _check_traffic(request.workload)
    slo.check_unique(request.slo, "the SLO")
    for limit in request.slo:
        if not (math.isfinite(limit.limit) and limit.limit > 0):
            raise BadInput(f"SLO {slo.key(limit)}: a limit of {limit.limit:g} can never be met; it must be above zero")
    for precision in request.precisions:
        models.bytes_per_param(precision)
    for name, value in (("max_batch", request.max_batch), ("max_step_tokens", request.max_step_tokens)):
        if value < 1:
            raise BadInput(f"{name} is {value}: a replica takes at least 1")
    if not 0 <= request.headroom < 1:
        raise BadInput(f"headroom is {request.headroom:g}: it is the share of capacity kept free, from 0 to below 1, e.g. 20%")
    if request.term not in TERMS:
        raise BadInput(f"unknown term {request.term!r}{did_you_mean(request.term, TERMS)}")
    for profile in request.profiles:
        latency.check(profile)
    return request


def _check_traffic(traffic: Workload) -> None:
    workload.checked_rate(traffic.rate_per_s)
    workload.parse_arrivals(traffic.arrivals)
    workload.checked_lengths(traffic.prompt_tokens, "prompt lengths")
    workload.checked_lengths(traffic.output_tokens, "output lengths")
