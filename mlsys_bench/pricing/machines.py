"""Machines without a GPU for many small replicas of several stages: whole ones, filled by vCPUs and by memory.

Putting replicas of several sizes into machines is vector bin packing.  First fit, largest first: of each replica the larger of its shares
of a machine's vCPUs and memory decides the order.  Tried are every kind of machine for all, and for each replica the kind on which its
share costs least; the cheapest of these is taken.  What the operating system and the cluster need for themselves is not taken off.
"""

from __future__ import annotations

import dataclasses
import functools
import math
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
    rooms: list[_Rooms] = []
    for pod in sorted(pods, key=lambda p: -p.share(offer)):
        left, filled = pod.count, list[_Rooms]()
        for alike in rooms:
            left, after = alike.filled(pod, left)
            filled += after
        empty = _Rooms(count=1, vcpus=offer.vcpus, memory_bytes=offer.memory_bytes)
        more = math.ceil(left / max(1, empty.takes(pod, left)))
        rooms = [*filled, *dataclasses.replace(empty, count=more).filled(pod, left)[1]]
    return sum(alike.count for alike in rooms)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rooms:
    """So many machines in a row with the same room left: first fit makes a handful of these of millions of machines."""

    count: int
    vcpus: float
    memory_bytes: float

    def takes(self, pod: Pods, most: int) -> int:
        """Return how many of a pod, at most so many, one of these machines has room for."""
        by_vcpus = most if not pod.vcpus else math.floor((self.vcpus + 1e-9) / pod.vcpus)
        by_memory = most if not pod.memory_bytes else math.floor(self.memory_bytes / pod.memory_bytes + 1e-12)
        return max(0, min(most, by_vcpus, by_memory))

    def filled(self, pod: Pods, left: int) -> tuple[int, list[_Rooms]]:
        """Return how many of a pod find no place when these are filled one after another, and the machines then."""
        each = self.takes(pod, left)
        full = min(self.count, left // each) if each else 0
        left -= full * each
        last = int(full < self.count and 0 < left < each)
        after = [self._with(full, each, pod), self._with(last, left, pod), self._with(self.count - full - last, 0, pod)]
        return left * (1 - last), [alike for alike in after if alike.count]

    def _with(self, count: int, each: int, pod: Pods) -> _Rooms:
        return _Rooms(count=count, vcpus=self.vcpus - each * pod.vcpus, memory_bytes=self.memory_bytes - each * pod.memory_bytes)
