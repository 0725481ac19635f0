"""The way of a KV cache from the replica that computed it to the one that decodes: how many bytes, over what, how long.

Every device sends, or receives, its share of the cache over a link of its own; the pool with fewer shards moves more bytes a device and
sets the pace.  KV heads are split over a tensor-parallel group and repeated beyond their number, a latent cache is whole on each device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlsys_bench import hardware, models, units
from mlsys_bench.plan.candidates import Candidate
from mlsys_bench.plan.demand import Floats
from mlsys_bench.provenance import Provenance

NETWORK_BYTES_PER_S = 12.5e9  # 100 Gb/s a device: what clouds give each GPU of an instance with NVLink at least
PLAIN_BYTES_PER_S = 1.25e9  # 10 Gb/s: instances of GPUs without
PLAIN = "the network between small instances (assumed)"
LATENCY_S = 0.002  # to set up a transfer and to tell both schedulers


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One device's link between two pools, and the caches that go over it."""

    bytes_per_s: float
    latency_s: float
    source: str
    provenance: Provenance
    model: str
    precision: str
    shards: tuple[tuple[int, int], ...]  # tensor and pipeline degree of either pool

    @property
    def is_guess(self) -> bool:
        """Whether nothing is known of it: small instances differ by ten times in what their network carries, and share it."""
        return self.source == PLAIN

    def bytes_of(self, prompt_tokens: Floats) -> Floats:
        """Return the bytes of each prompt's cache on the device that holds most of it."""
        arch = models.find(self.model)
        bends = [float(bound) for kind in models.attention_kinds(arch) if (bound := kind.window_tokens or kind.topk)]
        lengths = np.unique([0.0, *bends, float(prompt_tokens.max(initial=1.0))])  # straight in between
        each = [max(models.kv_bytes(arch, self.precision, n, tp=tp) / pp for tp, pp in self.shards) for n in lengths.tolist()]
        return np.interp(prompt_tokens, lengths, each)

    def seconds(self, prompt_tokens: Floats) -> Floats:
        """Return how long each prompt's cache takes on an idle link."""
        return np.asarray(self.latency_s + self.bytes_of(prompt_tokens) / self.bytes_per_s)

    def __str__(self) -> str:
        """Print it as the assumption it is."""
        speed = units.show_scaled(self.bytes_per_s, "B/s")
        return f"the KV cache of a prompt goes over {self.source}, {speed} a device and {units.show_s(self.latency_s)} to set up"


def between(prefill: Candidate, decode: Candidate, given_bytes_per_s: float | None = None) -> Link:
    """Return the link between two pools: the one given, the catalogue's where it reaches beyond an instance, else a network, assumed."""
    bytes_per_s, source, provenance = _named(prefill.device, decode.device, given_bytes_per_s)
    return Link(
        bytes_per_s=bytes_per_s, latency_s=LATENCY_S, source=source, provenance=provenance, model=decode.layout.model,
        precision=decode.precision, shards=tuple((c.layout.tp, c.layout.pp) for c in (prefill, decode)),
    )  # fmt: skip


def _named(first: hardware.Device | None, second: hardware.Device | None, given: float | None) -> tuple[float, str, Provenance]:
    if given is not None:
        return given, "the link given", Provenance.ASSUMED
    racks = [d for d in (first, second) if d is not None and d.link_devices > 8]  # a board of 8 is one instance: pools may stand on two
    if len(racks) == 2 and racks[0] == racks[1]:
        return racks[0].interconnect_bytes_per_s, f"the interconnect of {racks[0].id} (catalogue)", Provenance.ROOFLINE
    joined = all(d is not None and d.interconnect_bytes_per_s > 0 for d in (first, second))
    if not joined:
        return PLAIN_BYTES_PER_S, PLAIN, Provenance.ASSUMED
    return NETWORK_BYTES_PER_S, "the network between instances (assumed)", Provenance.ASSUMED
