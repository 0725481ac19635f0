"""Prefill and decode on pools of their own, as a plan's record holds them: what a pool does, and the link between the two."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench.provenance import Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUse:
    """One pool of a plan: the item of the fleet of the same `stage`, how it is set and how busy it is."""

    stage: str  # prefill or decode
    replicas: int
    devices_per_replica: int
    utilisation: float
    capacity_per_replica_per_s: float  # requests
    max_batch: int
    max_step_tokens: int
    kv_tokens_per_replica: int
    binds: str  # what one replica fewer would break
    provenance: Provenance


@dataclass(frozen=True, slots=True, kw_only=True)
class Apart:
    """Two pools, and the way of a prompt's KV cache from one to the other."""

    pools: tuple[PoolUse, PoolUse]
    kv_bytes_per_prompt: float  # mean, on the device that moves most
    transfer_s: float  # mean, on an idle link
    link_bytes_per_s: float  # of a device
    link_latency_s: float
    link_source: str
    link_provenance: Provenance

    @property
    def prefill(self) -> PoolUse:
        """The pool that computes prompts."""
        return self.pools[0]

    @property
    def decode(self) -> PoolUse:
        """The pool that computes answers."""
        return self.pools[1]
