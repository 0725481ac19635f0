"""Machines without a GPU for many small replicas of several stages: whole ones, filled by vCPUs and by memory.

Putting replicas of several sizes into machines is vector bin packing.  First fit, largest first: of each replica the larger of its shares
of a machine's vCPUs and memory decides the order.  Tried are every kind of machine for all, and for each replica the kind on which its
share costs least; the cheapest of these is taken.  What the operating system and the cluster need for themselves is not taken off.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from mlsys_bench.pricing.catalogue import CpuOffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Pods:
    """So many equal replicas, and what each takes."""

    count: int
    vcpus: float
    memory_bytes: float = 0.0

    def share(self, offer: CpuOffer) -> float:
        """Return the share of a machine that one takes, by what is scarcer; above 1 it does not fit."""
        return max(self.vcpus / offer.vcpus, self.memory_bytes / offer.memory_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machines:
    """So many machines of one kind."""

    offer: CpuOffer
    count: int

    @property
    def usd_per_h(self) -> float:
        """Dollars per hour."""
        return round(self.offer.usd_per_h * self.count, 6)


def share_usd_per_h(pod: Pods, offers: Sequence[CpuOffer]) -> float | None:
    """Return what the share of a machine costs that one replica takes, on the kind where it costs least; None where it fits on none."""
    return min((pod.share(o) * o.usd_per_h for o in offers if pod.share(o) <= 1), default=None)


def house(pods: Sequence[Pods], offers: Sequence[CpuOffer]) -> tuple[Machines, ...] | None:
    """Return the cheapest machines found for all of them; None where one fits on no machine, or nothing is sold."""
    return _house(tuple(pod for pod in pods if pod.count), tuple(offers))


@functools.lru_cache(maxsize=4096)
def _house(pods: tuple[Pods, ...], offers: tuple[CpuOffer, ...]) -> tuple[Machines, ...] | None:
    if not pods:
        return ()
    own = [min((o for o in offers if pod.share(o) <= 1), key=lambda o: pod.share(o) * o.usd_per_h, default=None) for pod in pods]
    ways = [[offer] * len(pods) for offer in offers if all(pod.share(offer) <= 1 for pod in pods)]
    ways += [[offer for offer in own if offer is not None]] if None not in own else []
    fleets = [_filled(pods, way) for way in ways]
    return min(fleets, key=lambda fleet: (sum(m.usd_per_h for m in fleet), sum(m.count for m in fleet)), default=None)


def _filled(pods: Sequence[Pods], way: Sequence[CpuOffer]) -> tuple[Machines, ...]:
    kinds = dict.fromkeys(way)
    chosen = [(kind, [pod for pod, offer in zip(pods, way, strict=True) if offer == kind]) for kind in kinds]
    return tuple(Machines(offer=kind, count=count_of(group, kind)) for kind, group in chosen)


def count_of(pods: Sequence[Pods], offer: CpuOffer) -> int:
    """Return the machines of one kind that first fit, largest first, fills with these replicas."""
    room: list[list[float]] = []
    for pod in sorted(pods, key=lambda p: -p.share(offer)):
        first = 0  # equal replicas: what has no room for one has none for the next
        for _ in range(pod.count):
            while first < len(room) and not _fits(room[first], pod):
                first += 1
            if first == len(room):
                room.append([float(offer.vcpus), offer.memory_bytes])
            room[first][0] -= pod.vcpus
            room[first][1] -= pod.memory_bytes
    return len(room)


def _fits(room: Sequence[float], pod: Pods) -> bool:
    return room[0] >= pod.vcpus - 1e-9 and room[1] >= pod.memory_bytes * (1 - 1e-12)
