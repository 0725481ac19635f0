"""An availability kept by spot and on-demand replicas together, for the least money.

Every zone has one pool of spot capacity, and a reclaim takes all its replicas at once; pools are reclaimed independently of each other.
Of its time a pool is there

    life / (life + away),      away = refill - notice, at least 0:

it lives `life` on average, `refill` passes until other capacity is found and started, and the search begins with the notice.  A replica
that is not reclaimed still fails like any other.  The share of time with enough replicas up is the exact sum of `plan.availability` over
which zones and which pools are there.

For each number of on-demand replicas, from as many as keep the objective alone down to none, the fewest spot ones beside them are
counted; of these pairs the cheapest is bought, both kinds in one region of one provider.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mlsys_bench import pricing, units
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan import availability, cold_start
from mlsys_bench.plan.availability import Case
from mlsys_bench.plan.given import assumed
from mlsys_bench.plan.reliability import Spot, Zones, replaced
from mlsys_bench.pricing import Fleet, Market
from mlsys_bench.pricing.packing import merged, spread
from mlsys_bench.surroundings import Secured

WRITTEN = "life=6h,notice=2min,refill=30min"
NEAR = 4  # pairs whose instances are counted, of all that may be cheapest by the price of a replica
MOST = 3  # times the replicas needed, in every zone: more spot ones are not looked at


def parse(text: str) -> Spot:
    """Return how spot goes and comes: 'life=6h,notice=2min,refill=30min', or rate=0.2/h in place of a life."""
    pairs = dict(part.strip().partition("=")[::2] for part in text.split(","))
    if set(pairs) - {"life", "rate", "notice", "refill"} or {"life", "rate"} <= set(pairs):
        raise BadInput(f"--spot {text}: write {WRITTEN}; rate=0.2/h in place of life=5h, what is left out is assumed")
    found: dict[str, Any] = {}
    if "rate" in pairs:
        rate_per_s = units.per_s(pairs["rate"], "--spot rate")
        if not rate_per_s > 0:
            raise BadInput(f"--spot rate={pairs['rate']}: pools that are never reclaimed are on demand; give a rate above 0, e.g. 0.2/h")
        found["life"] = assumed(1 / rate_per_s, "given")
    for name in {"life", "notice", "refill"} & set(pairs):
        found[name] = assumed(units.seconds(pairs[name], f"--spot {name}"), "given")
    return Spot(**found)


@functools.lru_cache(maxsize=4096)
def _case(objective: float, zones: Zones, gpus: int, weights_bytes: float, needed: int) -> Case:
    reliability = replaced(cold_start.of(weights_bytes))
    return Case(needs=((needed, 1.0),), objective=objective, gpus=gpus, reliability=reliability, zones=zones, crews=None)


def pools(count: int, zones: int) -> tuple[int, ...]:
    """Return spot replicas by zone, most where on-demand ones are fewest."""
    return tuple(reversed(spread(count, zones)))


def pairs(case: Case, needed: int, spot: Spot) -> Iterator[tuple[int, int]]:
    """Yield (on demand, spot) that keep the objective, as few spot ones as do: from those that need none down to none on demand."""
    firm, rented = case.fewest(needed), 0
    yield firm, 0
    for steady in range(firm - 1, -1, -1):
        while case.held(steady, pools(rented, case.zones.count), spot.up) < case.objective:
            rented += 1
            if rented > MOST * case.zones.count * needed:
                return
        yield steady, rented


@functools.lru_cache(maxsize=4096)
def _pairs(objective: float, zones: Zones, spot: Spot, gpus: int, weights_bytes: float, needed: int) -> tuple[tuple[int, int], ...]:
    return tuple(pairs(_case(objective, zones, gpus, weights_bytes, needed), needed, spot))


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What is rented where so many are needed: on demand and spot, its order, and that of on-demand replicas alone (None: unpriced)."""

    needed: int
    steady: int
    spot: int
    fleet: Fleet
    firm: int
    firm_usd_per_h: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rent:
    """How a fleet is rented whose availability spot may keep."""

    objective: float
    zones: Zones
    spot: Spot
    market: Market

    def __call__(self, gpu: str, devices: int, stages: int, weights_bytes: float, needed: int) -> Fleet | None:
        """Return the cheapest order; None where spot or the rest has no price."""
        found = self.split(gpu, devices, stages, weights_bytes, needed)
        return None if found is None else found.fleet

    def split(self, gpu: str, devices: int, stages: int, weights_bytes: float, needed: int) -> Split | None:
        """Return the cheapest split of a fleet of replicas on so many devices, in so many nodes in a row each."""
        size, known = devices // stages, _pairs(self.objective, self.zones, self.spot, devices, weights_bytes, needed)
        tried = (
            (fleet, *pair)
            for place in _places(self.market, gpu)
            for pair in self._near(place, gpu, size, stages, needed, known)
            if (fleet := self._usd(place, gpu, size, stages, *pair)) is not None
        )
        best = min(tried, key=lambda found: (found[0].new_usd_per_h, found[2]), default=None)
        if best is None:
            return None
        alone = self._ordered(self.market, gpu, size, stages, known[0][0], "on-demand")
        return Split(
            needed=needed, steady=best[1], spot=best[2], fleet=best[0], firm=known[0][0], firm_usd_per_h=alone.usd_per_h if alone else None
        )  # fmt: skip

    def _near(
        self, place: Market, gpu: str, size: int, stages: int, needed: int, known: tuple[tuple[int, int], ...]
    ) -> list[tuple[int, int]]:
        """Return the few pairs that may be cheapest, by what a replica costs where all are of its kind."""
        alike = [self._usd(place, gpu, size, stages, *pair) for pair in ((needed, 0), (0, needed))]
        each = [math.inf if fleet is None else fleet.new_usd_per_h for fleet in alike]
        about = {pair: sum(count * usd for count, usd in zip(pair, each, strict=True) if count) for pair in known}
        return sorted((pair for pair in known if about[pair] < math.inf), key=about.__getitem__)[:NEAR]

    def secured(self, devices: int, weights_bytes: float, split: Split) -> Secured:
        """Return what a split keeps, beside what its on-demand replicas keep alone."""
        case = _case(self.objective, self.zones, devices, weights_bytes, split.needed)
        found = availability.of(case, split.needed, split.steady, pools(split.spot, self.zones.count) if split.spot else (), self.spot)
        return replace(found, binds="objective", floor_availability=case.held(split.steady))

    def _usd(self, place: Market, gpu: str, size: int, stages: int, steady: int, rented: int) -> Fleet | None:
        """Return the order of so many replicas on demand and so many spot ones; None where a kind that is wanted has no price."""
        orders = [
            self._ordered(place, gpu, size, stages, count, term) for count, term in ((steady, "on-demand"), (rented, "spot")) if count
        ]
        known = [order for order in orders if order is not None]
        return merged(known) if known and len(known) == len(orders) else None

    def _ordered(self, place: Market, gpu: str, size: int, stages: int, count: int, term: str) -> Fleet | None:
        by_zone = pools(count, self.zones.count) if term == "spot" else spread(count, self.zones.count)
        zones = [n * stages for n in by_zone if n] if self.zones.count > 1 else []
        try:
            return pricing.pack(gpu, size, count * stages, term, place, "region", zones)
        except Infeasible:  # a quota: another split may do
            return None


def _places(market: Market, gpu: str) -> Iterator[Market]:
    """Yield the regions of providers that have the device, each a market of its own."""
    offers = market.of(gpu)
    for place in dict.fromkeys((offer.provider, offer.region) for offer in offers):
        yield replace(market, offers=tuple(offer for offer in offers if (offer.provider, offer.region) == place))


def words(rent: Rent, split: Split) -> Iterator[str]:
    """Yield what the plan takes for granted about spot."""
    spot = rent.spot
    yield (
        f"spot: all replicas of a zone are reclaimed together every {units.show_s(spot.life.value)} ({spot.life.source}), zone by zone "
        f"independently; others stand {units.show_s(spot.away_s)} later ({units.show_s(spot.refill.value)} to find and start them, "
        f"{units.show_s(spot.notice.value)} of notice)"
    )


def compared(split: Split) -> str:
    """Return what spot saves against the same availability on demand."""
    mix = f"{split.steady} on demand and {split.spot} spot replicas for {units.show_usd(split.fleet.usd_per_h)}/h"
    if not split.spot:
        return f"no spot replica is cheaper than the on-demand one it replaces: {split.firm} on demand keep the objective alone"
    alone = "unpriced" if split.firm_usd_per_h is None else f"{units.show_usd(split.firm_usd_per_h)}/h"
    return f"{mix}; on demand alone {split.firm} replicas would do, {alone}"
