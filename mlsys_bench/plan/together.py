"""Spares of several groups of replicas, stages of a graph or pools of a fleet, chosen together: an objective for the whole at least cost.

A group is held while enough of its replicas are up in the zones that are there.  The whole is held unless all groups of a cut are away:

    A = sum over the zones that are up of P(these) x P(no cut is wholly away | these)

exactly: given the zones, groups fail independently.  Groups that are a cut by themselves multiply; the others are enumerated.

Spares are added where they add most to ln A per dollar, the rule for a series of groups whose costs add up, then taken away or exchanged
for cheaper ones while the objective is kept.  Tests hold it against brute force.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan.availability import check_reachable, up_law
from mlsys_bench.plan.reliability import Reliability, Zones
from mlsys_bench.pricing.packing import spread
from mlsys_bench.queueing.mmc import least

MOST_ZONES = 8
_STEPS = 20_000
_SURELY_AWAY = math.nextafter(1.0, 0.0)  # a group so large that some of it is always away: the logarithm of 0 is none
Counts = dict[str, int]
Usd = Callable[[Mapping[str, int]], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Replicas of one kind: how many must be up, of each of its shards, and how they fail."""

    name: str
    needed: int
    reliability: Reliability
    gpus: int = 0
    shards: int = 1


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Groups, the cuts of the whole, and the zones that all of them are spread over."""

    groups: tuple[Group, ...]
    cuts: tuple[tuple[str, ...], ...]
    zones: Zones

    def __post_init__(self) -> None:
        """Refuse more zones than can be enumerated."""
        if self.zones.count > MOST_ZONES:
            raise BadInput(f"{self.zones.count} zones: spares of several groups are planned over at most {MOST_ZONES}")

    def held(self, replicas: Mapping[str, int]) -> float:
        """Return the share of time in which no cut is wholly away."""
        return self._over_zones(replicas, self._of_cuts)

    def whole(self, replicas: Mapping[str, int]) -> float:
        """Return the share of time in which every group is held."""
        return self._over_zones(replicas, lambda p: math.prod(p.values()))

    def alone(self, name: str, replicas: int) -> float:
        """Return the share of time in which one group is held."""
        return self._over_zones({**dict.fromkeys(self._by_name, 0), name: replicas}, lambda p: p[name])

    def guide(self, replicas: Mapping[str, int]) -> float:
        """Return what a search goes by: ln A as if groups knew nothing of each other's zones, so that each one's part shows."""
        away = [math.prod(1 - self._alone(name, replicas[name]) for name in cut) for cut in self.cuts]
        return math.fsum(math.log1p(-min(p, _SURELY_AWAY)) for p in away)

    def _alone(self, name: str, replicas: int) -> float:
        if (name, replicas) not in self._held_alone:
            self._held_alone[name, replicas] = self.alone(name, replicas)
        return self._held_alone[name, replicas]

    @cached_property
    def _held_alone(self) -> dict[tuple[str, int], float]:
        return {}

    def steps(self, group: Group, now: int) -> list[int]:
        """Return how many replicas of a group may be tried next: one more, and those that outlive the loss of one zone, of two, ..."""
        z, found = self.zones.count, {now + 1}
        for lost in range(1, z):
            n = group.needed
            while n - sum(sorted(spread(n, z))[z - lost :]) < group.needed:
                n += 1
            found |= {k for k in (n, n + 1) if k > now}
        return sorted(found)

    def survives(self, group: Group, replicas: int) -> bool:
        """Say whether a group is held without its largest zone, where that is asked for."""
        return not self.zones.survive or replicas - max(spread(replicas, self.zones.count)) >= group.needed

    def at(self, end: str) -> Standing:
        """Return it with every figure at the end of its interval where more fails ('low') or less ('high')."""
        groups = tuple(replace(group, reliability=group.reliability.at(end)) for group in self.groups)
        return replace(self, groups=groups, zones=self.zones.at(end))

    def _over_zones(self, replicas: Mapping[str, int], of: Callable[[dict[str, float]], float]) -> float:
        z, up = self.zones.count, self.zones.up
        sizes = {name: spread(replicas[name], z) for name in self._by_name}
        parts = []
        for there in itertools.product((True, False), repeat=z):
            n = sum(there)
            chance = up**n * (1 - up) ** (z - n)
            standing = {name: sum(size for size, is_up in zip(own, there, strict=True) if is_up) for name, own in sizes.items()}
            parts.append(chance * of({name: self._enough(name, k) for name, k in standing.items()}))
        return min(math.fsum(parts), 1.0)

    def _enough(self, name: str, standing: int) -> float:
        """Return P(enough of the replicas that stand are up), of every shard."""
        if (name, standing) not in self._known:
            group = self._by_name[name]
            law = up_law(standing, group.reliability.mtbf_s(group.gpus), group.reliability.repair_s(group.gpus))
            self._known[name, standing] = min(float(law[group.needed :].sum()), 1.0) ** group.shards
        return self._known[name, standing]

    def _of_cuts(self, p: dict[str, float]) -> float:
        alone = math.prod(p[cut[0]] for cut in self.cuts if len(cut) == 1)
        names, patterns = self._alternatives
        if not names:
            return alone
        up = np.array([p[name] for name in names])
        return alone * float(np.prod(np.where(patterns, up, 1 - up), axis=1).sum())

    @cached_property
    def _alternatives(self) -> tuple[tuple[str, ...], np.ndarray]:
        """Return the groups that others stand in for, and every pattern of them up in which no cut is wholly away."""
        several = [cut for cut in self.cuts if len(cut) > 1]
        names = tuple(dict.fromkeys(name for cut in several for name in cut))
        if not names:
            return (), np.ones((1, 0), dtype=bool)
        patterns = np.array(list(itertools.product((True, False), repeat=len(names))), dtype=bool)
        at = {name: k for k, name in enumerate(names)}
        away = [(~patterns[:, [at[name] for name in cut]]).all(axis=1) for cut in several]
        return names, patterns[~np.any(away, axis=0)]

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @cached_property
    def _known(self) -> dict[tuple[str, int], float]:
        return {}


def secure(standing: Standing, objective: float, usd: Usd) -> tuple[Counts, str]:
    """Return replicas of each group that keep the objective for the least found, and what asked for spares: objective, zone or peak.

    Raises Infeasible where the zones alone are away too long.
    """
    if not 0 < objective < 1:
        raise BadInput(f"an availability of {100 * objective:g} %: it lies between 0 % and 100 %, e.g. 99.9%")
    check_reachable(objective, standing.zones)
    first = {
        group.name: least(lambda n, g=group: standing.survives(g, n), first=group.needed, most=group.needed * 2 + 2)  # type: ignore[misc]
        for group in standing.groups
    }
    found = _exchanged(standing, objective, _raised(standing, objective, first, usd), first, usd)
    binds = "objective" if found != first else "zone" if any(first[g.name] > g.needed for g in standing.groups) else "peak"
    return found, binds


def _raised(standing: Standing, objective: float, first: Counts, usd: Usd) -> Counts:
    """Return the first counts with spares added where they gain most per dollar: one, or as many as outlive some zones."""
    now = dict(first)
    for _ in range(_STEPS):
        if standing.held(now) >= objective:
            return now
        before, paid = standing.guide(now), usd(now)
        tries = []
        for group in standing.groups:
            for n in standing.steps(group, now[group.name]):
                more = {**now, group.name: n}
                gained = standing.guide(more) - before
                tries.append((gained / max(usd(more) - paid, 1e-9), -n, group.name, more))
        gain, *_, more = max(tries, key=lambda tried: tried[:3])
        if gain <= 0:
            break
        now = more
    raise Infeasible(f"no number of spares found is available {100 * objective:g} %; spread over more zones, or ask for less")


def _exchanged(standing: Standing, objective: float, start: Counts, first: Counts, usd: Usd) -> Counts:
    """Return the start without what it can do without, and with cheaper spares in the place of dearer ones."""
    now, paid = dict(start), usd(start)
    while True:
        better = min(
            ((usd(other), other) for other in _neighbours(now, first) if usd(other) < paid - 1e-9 and standing.held(other) >= objective),
            key=lambda found: found[0],
            default=None,
        )
        if better is None:
            return now
        paid, now = better


def _neighbours(now: Counts, first: Counts) -> Sequence[Counts]:
    """Return what one or two fewer of one group, and up to two more of another, would be."""
    found: list[Counts] = []
    for name in now:
        for fewer in (1, 2):
            if now[name] - fewer < first[name]:
                break
            base = {**now, name: now[name] - fewer}
            found.append(base)
            found += [{**base, other: base[other] + more} for other in now if other != name for more in (1, 2)]
    return found
