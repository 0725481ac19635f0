"""Prefill and decode on pools of their own, in words: how each pool is set and how busy it is, and the link between them."""

from __future__ import annotations

from mlsys_bench import units
from mlsys_bench.apart import Apart, PoolUse
from mlsys_bench.report.parts import Fact, digits, percent, time


def facts(record: Apart | None) -> tuple[Fact, ...]:
    """Return the lines that only a plan of two pools has."""
    if record is None:
        return ()
    speed = units.show_scaled(record.link_bytes_per_s, "B/s")
    over = f"over {record.link_source}, {speed} a device; {units.show_bytes(record.kv_bytes_per_prompt)} a prompt on average"
    return (
        *(Fact(f"{pool.stage.capitalize()} pool", _pool(pool), "", pool.provenance.value) for pool in record.pools),
        Fact("KV transfer", time(record.transfer_s), over, record.link_provenance.value),
    )


def _pool(pool: PoolUse) -> str:
    """Return such as '14.2 requests/s a replica at most, 4,096 tokens a step'."""
    capacity = f"{digits(pool.capacity_per_replica_per_s)} requests/s a replica at most"
    if pool.stage == "prefill":
        return f"{capacity}, {pool.max_step_tokens:,} tokens a step"
    return f"{capacity}, batch {pool.max_batch:,}, {pool.kv_tokens_per_replica:,} KV tokens"


def busy(record: Apart) -> str:
    """Return how busy either pool is; the plan's own figure is that of the busier one."""
    return ", ".join(f"{pool.stage} {percent(100 * pool.utilisation)}" for pool in record.pools)
