"""What can be bought: the catalogue's offers or a contract's, and the one kind of instance that holds a fleet for the least.

A `Market` is what a plan buys on.  `CATALOGUE` is the published one; a contract (`contract.read`) makes another, with its own prices,
what is already paid for, and the quotas that bound it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlsys_bench.errors import BadInput
from mlsys_bench.pricing import catalogue
from mlsys_bench.types import Offer

if TYPE_CHECKING:
    from mlsys_bench.pricing.packing import Fleet


@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """The terms of a reserved offer: how long, what is paid at its start, how many are paid for already, how many there may be."""

    term_months: int
    upfront_share: float = 0.0  # of the whole term's price
    committed: int = 0  # instances that cost their price whether they are used or not
    at_most: int | None = None  # instances, the committed ones among them; None: as many as wanted

    def upfront_usd(self, offer: Offer, instances: int) -> float:
        """Return what is due at the start for so many instances: share x price x 730 h x months."""
        return self.upfront_share * offer.usd_per_h * 730 * self.term_months * instances


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """The most devices of one kind that an account may hold in a place; None stands for any."""

    devices: int
    device: str
    provider: str | None = None
    region: str | None = None

    def covers(self, offer: Offer) -> bool:
        """Say whether an offer counts against it."""
        return offer.device == self.device and self.provider in (None, offer.provider) and self.region in (None, offer.region)

    def __str__(self) -> str:
        """Print it as a person would: '64 H100-SXM at aws in us-east-1'."""
        at = f" at {self.provider}" if self.provider else ""
        return f"{self.devices} {self.device}{at}{f' in {self.region}' if self.region else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What is priced beside devices; None where nobody gave a price, and then it is left out of every bill, which says so."""

    storage_usd_per_byte_month: float | None = None
    egress_usd_per_byte: float | None = None
    vcpu_usd_per_h: float | None = None
    source: str = ""
    date: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Market:
    """Offers, the reservations among them, quotas, rates of other things, and notes for whoever reads the bill."""

    offers: tuple[Offer, ...]
    reservations: Mapping[Offer, Reservation] = field(default_factory=dict)
    quotas: tuple[Quota, ...] = ()
    rates: Rates = field(default_factory=Rates)
    notes: tuple[str, ...] = ()

    def of(self, device_id: str | None = None, term: str | None = None) -> tuple[Offer, ...]:
        """Return the offers of a device (its catalogue id), or of all; on one term, or on all.  Empty where nothing has a price."""
        if term is not None:
            catalogue.check_term(term)
        wanted = None if device_id is None else device_id.lower()
        return tuple(o for o in self.offers if wanted in (None, o.device.lower()) and term in (None, o.term))

    def most(self, offer: Offer) -> int | None:
        """Return how many instances of an offer may be held, None for as many as wanted."""
        held = self.reservations.get(offer)
        bounds = [quota.devices // offer.devices for quota in self.quotas if quota.covers(offer)]
        if held is not None and held.at_most is not None:
            bounds.append(held.at_most)
        return min(bounds, default=None)

    def committed(self, offer: Offer) -> int:
        """Return how many instances of an offer are paid for already."""
        held = self.reservations.get(offer)
        return 0 if held is None else held.committed


@dataclass(frozen=True, slots=True, kw_only=True)
class Shelf:
    """Where a plan buys: a market, the term it rents on, and how far a fleet may spread (see `packing.pack`).

    `rented(devices of a replica, bytes of its weights, replicas needed)` adds the replicas to spare; None: there are none.  `mix(device,
    devices of a replica, its nodes, bytes of its weights, replicas needed)` orders them on several terms together.
    """

    market: Market
    term: str = "on-demand"
    within: str = "region"
    rented: Callable[[int, float, int], int] | None = None
    zones: int = 1  # of one region, that replicas are spread over evenly
    mix: Callable[[str, int, int, float, int], Fleet | None] | None = None

    def sells(self, device_id: str) -> bool:
        """Say whether a device has a price here, or is paid for already."""
        return any(o.term == self.term or self.market.committed(o) for o in self.market.of(device_id))


@functools.cache
def published() -> Market:
    """Return the market of the catalogue: published prices, no commitments, no quotas."""
    return Market(offers=catalogue.every())


def offers(device_id: str | None = None, term: str | None = None) -> tuple[Offer, ...]:
    """Return the published offers of a device (its catalogue id), or of all; on one term, or on all."""
    return published().of(device_id, term)


def cheapest(device_id: str, devices: int, term: str = "on-demand", market: Market | None = None) -> tuple[Offer, int] | None:
    """Return the offer with the lowest price per replica of so many devices, and the replicas one instance holds; None if unpriced.

    A replica stays within one instance; devices that no whole replica fits on are paid for and stranded.
    """
    _check_counts(devices, 1)
    fitting = [o for o in (market or published()).of(device_id, term) if o.devices >= devices]
    if not fitting:
        return None
    best = min(fitting, key=lambda o: (o.usd_per_h / (o.devices // devices), o.devices, o.provider, o.instance))
    return best, best.devices // devices


def instances_for(offer: Offer, devices_per_replica: int, replicas: int) -> int:
    """Return how many instances of the offer hold so many replicas.  Raises BadInput when one replica does not fit."""
    _check_counts(devices_per_replica, replicas)
    if devices_per_replica > offer.devices:
        raise BadInput(f"{offer.instance} has {offer.devices} device(s); a replica needs {devices_per_replica}")
    return math.ceil(replicas / (offer.devices // devices_per_replica))


def choose(
    device_id: str, devices_per_replica: int, replicas: int, term: str = "on-demand", market: Market | None = None
) -> tuple[Offer, int] | None:
    """Return the offer that holds so many replicas for the fewest dollars, and how many instances of it; None if unpriced.

    One kind of instance per fleet, within quotas; of equal prices the fewest idle devices.  `packing.pack` mixes sizes.
    """
    _check_counts(devices_per_replica, replicas)
    market = market or published()
    fits = [o for o in market.of(device_id, term) if o.devices >= devices_per_replica]
    counted = [(o, instances_for(o, devices_per_replica, replicas)) for o in fits]
    allowed = [(o, n) for o, n in counted if (most := market.most(o)) is None or n <= most]
    return min(allowed, key=lambda c: (c[0].usd_per_h * c[1], c[0].devices * c[1], c[0].provider, c[0].instance), default=None)


def _check_counts(devices: int, replicas: int) -> None:
    if devices < 1 or replicas < 1:
        raise BadInput(f"{replicas} replica(s) of {devices} device(s): both must be at least 1")
