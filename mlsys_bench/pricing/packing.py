"""Plans buy instances, not devices: the cheapest mix of instance sizes that holds a fleet, and the devices it strands.

    minimise    sum_i usd_i x_i            x_i instances of offer i, whole
    such that   sum_i k_i x_i >= replicas  k_i = floor(devices_i / devices per replica): a replica stays within one instance
                sum_(i in q) devices_i x_i <= quota_q,   x_i <= at_most_i

Without bounds this is a covering knapsack, solved exactly by dynamic programming over replicas; with bounds an integer program, solved by
HiGHS.  What is committed is paid in any case, so it costs nothing more to use and is used first; its price still stands on the bill.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.pricing.market import Market, published
from mlsys_bench.types import Offer

_WITHIN = {"region": 2, "provider": 1, "anywhere": 0}  # how much of (provider, region) the instances of a fleet share
TIE = 1e-9  # dollars an hour a device counts for among equal prices: far below what the prices can differ by
Hold = Callable[[Sequence[Offer], Market], "Counter[Offer] | None"]  # the cheapest order of some offers that holds what is asked for
_IN_FULL = 4096  # replicas: what is beyond them is bought in bulk; more than two sorts of instances multiplied


@dataclass(frozen=True, slots=True, kw_only=True)
class Lot:
    """So many instances of one offer.  `committed` of them were paid for before anybody planned."""

    offer: Offer
    instances: int
    committed: int = 0

    @property
    def usd_per_h(self) -> float:
        """Dollars per hour, committed ones at their own price."""
        return self.offer.usd_per_h * self.instances

    @property
    def devices(self) -> int:
        """Devices rented."""
        return self.offer.devices * self.instances


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """What is rented for so many replicas, and what of it no replica uses."""

    lots: tuple[Lot, ...]
    replicas: int
    devices_per_replica: int
    usd_per_h: float  # of all that is used, committed or not
    new_usd_per_h: float  # what comes on top of the commitments
    unused_usd_per_h: float  # commitments of this device that the fleet leaves idle: paid as well

    @property
    def instances(self) -> int:
        """Instances rented."""
        return sum(lot.instances for lot in self.lots)

    @property
    def devices(self) -> int:
        """Devices rented."""
        return sum(lot.devices for lot in self.lots)

    @property
    def stranded(self) -> int:
        """Devices rented that no replica uses."""
        return self.devices - self.replicas * self.devices_per_replica

    @property
    def offer(self) -> Offer:
        """The offer that most of its devices are rented by."""
        return max(self.lots, key=lambda lot: lot.devices).offer

    @property
    def instance(self) -> str:
        """The kind of instance where there is one, else the order."""
        return f"{self.offer.provider} {self.offer.instance}" if len(self.lots) == 1 else str(self)

    def __str__(self) -> str:
        """Print it as on an order: '2 x aws p5.48xlarge + 1 x aws p5.4xlarge'; spot is named beside other terms."""
        several = len({lot.offer.term for lot in self.lots}) > 1
        named = [" spot" if several and lot.offer.term == "spot" else "" for lot in self.lots]
        return " + ".join(f"{n.instances} x {n.offer.provider} {n.offer.instance}{term}" for n, term in zip(self.lots, named, strict=True))


def pack(
    device_id: str, devices_per_replica: int, replicas: int, term: str = "on-demand", market: Market | None = None, within: str = "region",
    zones: Sequence[int] = (),
) -> Fleet | None:  # fmt: skip
    """Return the cheapest instances that hold so many replicas; None where the device has no price on this term.

    `within` says how far a fleet may spread: one 'region' of one provider, one 'provider', or 'anywhere'.  Commitments of the device are
    used whatever the term.  `zones` says how many of the replicas stand in each: no instance then serves two.  Raises Infeasible, naming
    the bound, where quotas leave too few, and BadInput for zones beside commitments or quotas, which say nothing of zones.
    """
    if devices_per_replica < 1 or replicas < 1:
        raise BadInput(f"{replicas} replica(s) of {devices_per_replica} device(s): both must be at least 1")
    market = market or published()
    usable = [o for o in market.of(device_id) if (o.term == term or market.committed(o)) and o.devices >= devices_per_replica]
    if not usable:
        return None
    if len(zones) > 1 and (market.reservations or market.quotas):
        raise BadInput("commitments and quotas say nothing of zones; plan without --zones, or with prices that have neither")
    places = Counter(zones or (replicas,))  # zones that hold as many are alike

    def hold(group: Sequence[Offer], sold: Market) -> Counter[Offer] | None:
        return _in_zones(group, devices_per_replica, places, term, sold)

    counts = (hold(group, market) for group in groups(usable, within))
    fleets = [fleet_of(found, devices_per_replica, replicas, market, device_id) for found in counts if found is not None]
    if not fleets:
        raise Infeasible(too_few(usable, device_id, devices_per_replica, replicas, term, market, within, hold))
    return min(fleets, key=lambda f: (f.new_usd_per_h, f.devices, f.instances, str(f)))


def merged(fleets: Sequence[Fleet]) -> Fleet:
    """Return what is rented for parts of one fleet, on different terms, as one order."""
    return Fleet(
        lots=tuple(lot for fleet in fleets for lot in fleet.lots),
        replicas=sum(fleet.replicas for fleet in fleets),
        devices_per_replica=fleets[0].devices_per_replica,
        usd_per_h=_exact(fleet.usd_per_h for fleet in fleets),
        new_usd_per_h=_exact(fleet.new_usd_per_h for fleet in fleets),
        unused_usd_per_h=_exact(fleet.unused_usd_per_h for fleet in fleets),
    )


def spread(replicas: int, zones: int) -> tuple[int, ...]:
    """Return replicas by zone, as even as they go."""
    return tuple(replicas // zones + (z < replicas % zones) for z in range(zones))


def groups(offers: Sequence[Offer], within: str) -> Iterator[list[Offer]]:
    """Yield the offers that one fleet may mix."""
    by: dict[tuple[str, ...], list[Offer]] = {}
    for offer in offers:
        by.setdefault(place(offer, within), []).append(offer)
    yield from by.values()


def place(offer: Offer, within: str) -> tuple[str, ...]:
    """Return what the offers that one fleet may mix have in common: provider and region, provider, or nothing."""
    if within not in _WITHIN:
        raise BadInput(f"a fleet spreads within a {' or '.join(_WITHIN)}, not within {within!r}")
    return (offer.provider, offer.region)[: _WITHIN[within]]


def _in_zones(group: Sequence[Offer], size: int, places: Counter[int], term: str, market: Market) -> Counter[Offer] | None:
    """Return how many of each offer hold the replicas of every zone apart."""
    total: Counter[Offer] = Counter()
    for replicas, times in places.items():
        found = cheapest_of(group, size, replicas, term, market)
        if found is None:
            return None
        total.update({offer: n * times for offer, n in found.items()})
    return total


def cheapest_of(group: Sequence[Offer], size: int, replicas: int, term: str, market: Market) -> Counter[Offer] | None:
    """Return how many of each offer, committed ones first and at no cost; None where bounds leave too few."""
    items = items_of(group, term, market)
    bounded = any(item.most is not None for item in items) or any(q.covers(o) for q in market.quotas for o in group)
    return _program(items, size, replicas, market) if bounded else _knapsack(items, size, replicas)


def items_of(group: Sequence[Offer], term: str, market: Market) -> list[Item]:
    """Return what may be taken: committed instances for nothing, others at their price."""
    held = [Item(o, 0.0, market.committed(o)) for o in group if market.committed(o)]
    return [*held, *(Item(o, o.usd_per_h, _buyable(o, market)) for o in group if o.term == term)]


@dataclass(frozen=True, slots=True)
class Item:
    """An offer at what one more of it costs, and how many more there may be."""

    offer: Offer
    usd_per_h: float
    most: int | None


def _buyable(offer: Offer, market: Market) -> int | None:
    held = market.reservations.get(offer)
    return None if held is None or held.at_most is None else held.at_most - held.committed


def _knapsack(items: Sequence[Item], size: int, replicas: int) -> Counter[Offer]:
    """Return the cheapest cover: best(n) = min over i of usd_i + best(n - k_i), best(n <= 0) = 0.

    Of a large fleet most are on the instance that costs least a replica: as many others as that has places for can be swapped for it, for
    among them there are some that together fill a whole number of these.
    """
    best: list[tuple[float, int]] = [(0.0, -1)]
    steps = [(item.usd_per_h + TIE * item.offer.devices, item.offer.devices // size) for item in items]
    cheapest = min(range(len(steps)), key=lambda i: steps[i][0] / steps[i][1])
    bulk = max(0, replicas - _IN_FULL) // steps[cheapest][1]
    left = replicas - bulk * steps[cheapest][1]
    for n in range(1, left + 1):
        best.append(min((best[max(n - k, 0)][0] + usd, i) for i, (usd, k) in enumerate(steps)))
    found: Counter[Offer] = Counter({items[cheapest].offer: bulk} if bulk else {})
    while left > 0:
        i = best[left][1]
        found[items[i].offer] += 1
        left = max(left - steps[i][1], 0)
    return found


def _program(items: Sequence[Item], size: int, replicas: int, market: Market) -> Counter[Offer] | None:
    """Return the cheapest cover within quotas and bounds, by HiGHS; None where there is none."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp

    devices = np.array([float(item.offer.devices) for item in items])
    usd = np.array([item.usd_per_h for item in items]) + TIE * devices
    rows = [LinearConstraint(devices // size, lb=replicas)]
    rows += [LinearConstraint(devices * [quota.covers(item.offer) for item in items], ub=quota.devices) for quota in market.quotas]
    most = [np.inf if item.most is None else item.most for item in items]
    found = milp(usd, constraints=rows, bounds=Bounds(0, most), integrality=[1] * len(items), options={"mip_rel_gap": 0.0})
    if found.x is None:
        return None
    counts = [round(x) for x in found.x]
    for i in sorted(range(len(items)), key=lambda i: -items[i].offer.devices):  # what is free may be more than is needed
        surplus = sum(n * (item.offer.devices // size) for n, item in zip(counts, items, strict=True)) - replicas
        counts[i] -= min(counts[i], surplus // (items[i].offer.devices // size))
    return by_offer(items, counts)


def by_offer(items: Sequence[Item], counts: Sequence[int]) -> Counter[Offer]:
    """Return the instances of each offer: a commitment and what is bought beyond it are one."""
    found: Counter[Offer] = Counter()
    for item, n in zip(items, counts, strict=True):
        found[item.offer] += n
    return found


def fleet_of(counts: Counter[Offer], size: int, replicas: int, market: Market, device_id: str) -> Fleet:
    """Return the fleet of so many instances of each offer, with what it costs."""
    chosen = sorted((o for o in counts if counts[o]), key=lambda o: (-o.devices, o.provider, o.instance, o.term))
    lots = tuple(Lot(offer=o, instances=counts[o], committed=min(counts[o], market.committed(o))) for o in chosen)
    committed = {o: market.committed(o) for o in market.of(device_id)}
    return Fleet(
        lots=lots,
        replicas=replicas,
        devices_per_replica=size,
        usd_per_h=_exact(lot.usd_per_h for lot in lots),
        new_usd_per_h=_exact(lot.offer.usd_per_h * (lot.instances - lot.committed) for lot in lots),
        unused_usd_per_h=_exact(o.usd_per_h * (n - min(n, counts[o])) for o, n in committed.items()),
    )


def _exact(dollars: Iterable[float]) -> float:
    """Return a sum of prices without the dust of adding floats: prices are read with six digits at most."""
    return round(math.fsum(dollars), 6)


# ---------------------------------------------------------------- what is in the way


def too_few(usable: Sequence[Offer], device_id: str, size: int, replicas: int, term: str, market: Market, within: str, hold: Hold) -> str:
    """Return which bounds leave too few replicas, and to what they would have to be raised.

    Bounds are lifted, quotas first, until the replicas fit on the fewest devices; those that this exceeds are the ones in the way.
    """
    counted = _by_devices(market)
    free = dataclasses.replace(
        counted, reservations={o: dataclasses.replace(held, at_most=None) for o, held in counted.reservations.items()}
    )  # fmt: skip
    for lifted in (dataclasses.replace(counted, quotas=()), free, dataclasses.replace(free, quotas=())):
        offers = [_priced_by_devices(o) for o in usable]
        found = [counts for group in groups(offers, within) if (counts := hold(group, lifted)) is not None]
        if found:
            break
    wanted = f"{replicas} replicas of {size} {device_id}"
    if not found:
        return f"{wanted} are more than is committed, and none is sold {term}; name another term"
    least = min(found, key=_devices)
    over = list(_exceeded(least, counted, len({q for q in market.quotas if any(q.covers(o) for o in usable)}) > 1))
    if not over:  # sizes that are bought for apart: the fewest devices would do, the cheapest of each size do not
        return f"{wanted} are more than may be rented; raise the quotas and at_most of their instances"
    places = {(o.provider, o.region) for o in usable}
    apart = ", or let the fleet spread over regions" if len(places) > 1 and hold(list(usable), market) is not None else ""
    return f"{wanted} are more than may be rented ({'; '.join(b for b, _ in over)}); raise {' and '.join(c for _, c in over)}{apart}"


def _exceeded(counts: Counter[Offer], market: Market, several: bool) -> Iterator[tuple[str, str]]:
    """Yield each bound that so many instances exceed, and what to raise to what; a quota is named where there are several."""
    for quota in market.quotas:
        needed = sum(o.devices * n for o, n in counts.items() if quota.covers(o))
        if needed > quota.devices:
            yield str(quota), f"the quota{f' of {quota}' if several else ''} to {needed} or more devices"
    for offer, n in counts.items():
        held = market.reservations.get(offer)
        if held is not None and held.at_most is not None and n > held.at_most:
            yield f"at most {held.at_most} {offer.provider} {offer.instance} {offer.term}", f"at_most of {offer.instance} to {n} or more"


def _devices(counts: Counter[Offer]) -> int:
    return sum(o.devices * n for o, n in counts.items())


def _by_devices(market: Market) -> Market:
    """Return a market on which the cheapest order is the one of the fewest devices; what is committed still goes first."""
    return dataclasses.replace(
        market,
        offers=tuple(_priced_by_devices(o) for o in market.offers),
        reservations={_priced_by_devices(o): held for o, held in market.reservations.items()},
    )


def _priced_by_devices(offer: Offer) -> Offer:
    return dataclasses.replace(offer, usd_per_h=float(offer.devices))
