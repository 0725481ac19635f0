"""Stages that share a kind of device are bought for together: their replicas fill the same instances and count against the same quotas.

    minimise    sum_i usd_i x_i                                 x_i instances of offer i, whole
    such that   sum_i floor(D_i / s_j) x_i >= sum_(l: s_l >= s_j) n_l s_l / s_j      for each size s_j of a replica, n_j of them
                quotas and bounds as in `packing`

Where each size divides the next larger one this is exact: put in largest first, in whatever way, an instance of D devices that holds m
of size s_l has floor(D / s) - m s_l / s places left for the next size s.  Sizes that do not divide each other are bought for apart.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.pricing import packing
from mlsys_bench.pricing.market import Market, published
from mlsys_bench.pricing.packing import Fleet
from mlsys_bench.types import Offer

Sizes = Mapping[int, int]  # replicas by their number of devices


def pack_together(
    device_id: str, zones: Sequence[Sizes], term: str = "on-demand", market: Market | None = None, within: str = "region"
) -> Fleet | None:
    """Return the cheapest instances that hold the replicas of every zone, no instance serving two; None where the device has no price.

    `replicas` and `devices_per_replica` of the fleet are devices and 1.  Raises Infeasible and BadInput as `packing.pack` does.
    """
    market = market or published()
    places = [{size: n for size, n in sizes.items() if n} for sizes in zones]
    places = [place for place in places if place]
    if not places or min(min(place) for place in places) < 1:
        raise BadInput(f"{device_id}: no replicas to buy for")
    if len(places) > 1 and (market.reservations or market.quotas):
        raise BadInput("commitments and quotas say nothing of zones; plan without --zones, or with prices that have neither")
    smallest, largest = min(min(place) for place in places), max(max(place) for place in places)
    usable = [o for o in market.of(device_id) if (o.term == term or market.committed(o)) and o.devices >= smallest]
    if not any(o.devices >= largest for o in usable):
        return None
    used = sum(size * n for place in places for size, n in place.items())

    def hold(group: Sequence[Offer], sold: Market) -> Counter[Offer] | None:
        return _group(group, places, term, sold)

    counts = (hold(group, market) for group in packing.groups(usable, within))
    fleets = [packing.fleet_of(found, 1, used, market, device_id) for found in counts if found is not None]
    if not fleets:
        raise Infeasible(packing.too_few(usable, device_id, 1, used, term, market, within, hold))
    return min(fleets, key=lambda f: (f.new_usd_per_h, f.devices, f.instances, str(f)))


def _group(offers: Sequence[Offer], places: Sequence[Sizes], term: str, market: Market) -> Counter[Offer] | None:
    total: Counter[Offer] = Counter()
    for place in places:
        found = _place(offers, place, term, market)
        if found is None:
            return None
        total.update(found)
    return total


def _place(offers: Sequence[Offer], place: Sizes, term: str, market: Market) -> Counter[Offer] | None:
    """Return the instances of one zone."""
    sizes = sorted(place)
    if len(sizes) == 1:
        return _apart(offers, sizes[0], place[sizes[0]], term, market)
    if all(b % a == 0 for a, b in itertools.pairwise(sizes)):
        return _program(packing.items_of(offers, term, market), place, market)
    apart = [_apart(offers, size, place[size], term, market) for size in sizes]
    if any(found is None for found in apart):
        return None
    total = sum((found for found in apart if found is not None), Counter[Offer]())
    return total if all(_within(total, quota.devices, quota.covers) for quota in market.quotas) and _sold(total, market) else None


def _apart(offers: Sequence[Offer], size: int, replicas: int, term: str, market: Market) -> Counter[Offer] | None:
    large = [offer for offer in offers if offer.devices >= size]
    return packing.cheapest_of(large, size, replicas, term, market) if large else None


def _within(counts: Counter[Offer], most: int, covers: Callable[[Offer], bool]) -> bool:
    return sum(o.devices * n for o, n in counts.items() if covers(o)) <= most


def _sold(counts: Counter[Offer], market: Market) -> bool:
    """Say whether no offer is taken more often than it may be."""
    return all((most := market.most(offer)) is None or n <= most for offer, n in counts.items())


def _program(items: Sequence[packing.Item], place: Sizes, market: Market) -> Counter[Offer] | None:
    """Return the cheapest instances that hold replicas of several sizes, by HiGHS; None where bounds leave too few."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    devices = np.array([float(item.offer.devices) for item in items])
    usd = np.array([item.usd_per_h for item in items]) + packing.TIE * devices
    needs = [(size, sum(n * large // size for large, n in place.items() if large >= size)) for size in sorted(place)]
    rows = [LinearConstraint(devices // size, lb=need) for size, need in needs]
    rows += [LinearConstraint(devices * [quota.covers(item.offer) for item in items], ub=quota.devices) for quota in market.quotas]
    most = [np.inf if item.most is None else item.most for item in items]
    found = milp(usd, constraints=rows, bounds=Bounds(0, most), integrality=[1] * len(items), options={"mip_rel_gap": 0.0})
    return None if found.x is None else packing.by_offer(items, [round(x) for x in found.x])
