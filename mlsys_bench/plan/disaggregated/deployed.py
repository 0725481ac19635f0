"""A plan of two pools on its way to production: each pool as a plan of its own, and how its engine is started."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from mlsys_bench import pricing
from mlsys_bench.errors import BadInput
from mlsys_bench.plan import command
from mlsys_bench.plan.command import Deployment
from mlsys_bench.plan.flags import Engine
from mlsys_bench.types import FleetItem, Plan

_VLLM = {"prefill": "kv_producer", "decode": "kv_consumer"}  # docs.vllm.ai, NixlConnector usage guide, read 2026-11-21


def halves(plan: Plan) -> tuple[Plan, Plan]:
    """Return a plan of two pools as the plans of either, latencies and limits those of both together."""
    assert plan.apart is not None
    first, second = (_half(plan, item) for item in plan.fleet)
    return first, second


def _half(plan: Plan, item: FleetItem) -> Plan:
    assert plan.apart is not None
    pool = next(pool for pool in plan.apart.pools if pool.stage == item.stage)
    usd = item.usd_per_hour
    return dataclasses.replace(
        plan, fleet=(item,), replicas=pool.replicas, gpus=pool.replicas * pool.devices_per_replica,
        devices_per_replica=pool.devices_per_replica, usd_per_hour=usd, usd_per_month=None if usd is None else pricing.usd_per_month(usd),
        utilisation=pool.utilisation, binding_constraint=pool.binds, capacity_per_replica_per_s=pool.capacity_per_replica_per_s,
        max_batch=pool.max_batch, max_step_tokens=pool.max_step_tokens, kv_tokens_per_replica=pool.kv_tokens_per_replica, apart=None,
    )  # fmt: skip


def deployments(plan: Plan, engine: Engine = "vllm") -> tuple[Deployment, Deployment]:
    """Return how a replica of either pool is started.

    Raises BadInput for an engine that reads its role from a file.
    """
    first, second = (_deployment(half, engine) for half in halves(plan))
    return first, second


def _deployment(half: Plan, engine: Engine) -> Deployment:
    stage = half.fleet[0].stage
    if engine == "vllm":
        told = json.dumps({"kv_connector": "NixlConnector", "kv_role": _VLLM[stage]}, separators=(",", ":"))
        role = {"--kv-transfer-config": told}
    elif engine == "sglang":
        role = {"--disaggregation-mode": stage}
    else:
        raise BadInput(f"{engine} takes prefill and decode pools from a file; name vllm or sglang, or plan with --disaggregate never")
    own = command.of_plan(half, engine)
    return dataclasses.replace(own, other={**own.other, **role})


def lines(plan: Plan, engine: Engine = "vllm") -> Iterator[str]:
    """Yield the command line of either pool, and what it needs beside it."""
    for item, deployment in zip(plan.fleet, deployments(plan, engine), strict=True):
        yield f"planned {item.stage} ({item.replicas} x): {command.command(deployment)}"
        yield from (f"  note: {note}" for note in command.notes(plan, deployment) if "kinds of replicas" not in note)
