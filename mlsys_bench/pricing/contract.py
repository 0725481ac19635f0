"""A user's own prices, from a file such as `prices.yaml`: what was negotiated, committed, granted and paid for already.

    mlsys: 1                     version of this format
    kind: prices
    source, date                 where the prices are from, and of which day
    catalogue: merge | replace   whether published offers stay beside these; the same instance, region and term is this file's
    offers:                      provider, instance, device, devices, region; on_demand and/or spot: $…/h
    commitments:                 the same five; price: $…/h over the whole term, upfront and later payments together; term: 12month or 1y;
                                 upfront: share of the term's price that is due at its start; committed: instances paid for already;
                                 at_most: instances in all (left out: as many as wanted)
    discounts:                   less: 12%, of offers (not of commitments) with this provider, device, instance, term; several multiply
    quotas:                      device, devices: the most there may be, with this provider, region
    rates:                       storage: $…/GB/month, egress: $…/GB, vcpu: $…/h

What is left out does not bound: a discount without a device is for all devices.  Every price keeps the file's source and date.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlsys_bench import documents, units
from mlsys_bench.documents import Node
from mlsys_bench.errors import BadInput
from mlsys_bench.pricing import catalogue
from mlsys_bench.pricing.catalogue import TERMS, Term
from mlsys_bench.pricing.market import Market, Quota, Rates, Reservation, published
from mlsys_bench.types import Offer, Provenance

VERSION = 1
_LONGEST_MONTHS = 240.0  # of a commitment: more is a slip of the pen
_DEAREST_USD_PER_H = 1e5  # of an instance: no published one asks a hundredth of that
_TOP = ("mlsys", "kind", "source", "date", "catalogue")
_LISTS = ("offers", "commitments", "discounts", "quotas", "rates")
_INSTANCE = ("provider", "instance", "device", "devices", "region")
_RATES: dict[str, Callable[[Any, str], float]] = {
    "storage": units.usd_per_byte_month,
    "egress": units.usd_per_byte,
    "vcpu": units.usd_per_h,
}
Devices = Callable[[str], str]


def read(path: Path, device_id: Devices, today: str) -> Market:
    """Return the market of a price file.  Raises BadInput naming file and key.

    `device_id` turns the name of a device into its catalogue id or raises; `today` decides what is stale.
    """
    return _market(documents.read(path), device_id, today)


def parse(text: str, where: str, device_id: Devices, today: str) -> Market:
    """Return the market of a price file's text."""
    return _market(documents.parse(text, where), device_id, today)


def _market(document: Node, device_id: Devices, today: str) -> Market:
    top = document.section(_TOP, _LISTS)
    if top["mlsys"].whole() != VERSION:
        raise BadInput(f"{top['mlsys'].where}: {top['mlsys'].value!r} is a version this mlsys cannot read; it reads {VERSION}")
    top["kind"].choice(["prices"])
    stamp = _Stamp.of(top, today)
    own = [offer for node in _list(top, "offers") for offer in _offers(node, device_id, stamp)]
    commitments = [_commitment(node, device_id, stamp) for node in _list(top, "commitments")]
    reserved = dict(commitments)
    _check_unique([_key(offer) for offer in own], document.file)
    _check_unique([(*_key(offer), f"{offer.usd_per_h:g} $/h") for offer, _ in commitments], document.file)
    listed = _merged(own, top["catalogue"].choice(["merge", "replace"]) == "merge")
    discounts = [_Discount.of(node, device_id) for node in _list(top, "discounts")]
    quotas = tuple(_quota(node, device_id) for node in _list(top, "quotas"))
    offers = (*(_discounted(offer, discounts) for offer in listed), *reserved)
    idle = [
        *(f"discounts[{i}]" for i, discount in enumerate(discounts) if not any(map(discount.matches, listed))),
        *(f"quotas[{i}]" for i, quota in enumerate(quotas) if not any(map(quota.covers, offers))),
    ]
    return Market(
        offers=offers,
        reservations=reserved,
        quotas=quotas,
        rates=_rates(top.get("rates"), stamp),
        notes=(*stamp.notes(document.file), *(f"{document.file}: {what} is for no offer, so it changes nothing" for what in idle)),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Stamp:
    """Where a file's prices come from, and how old they are."""

    source: str
    date: str
    stale: bool
    is_to_come: bool

    @classmethod
    def of(cls, top: Mapping[str, Node], today: str) -> _Stamp:
        source, date = top["source"].text(), top["date"].text()
        top["date"].named(lambda text: str(catalogue.months(text)))
        to_come = catalogue.months(date) > catalogue.months(today)
        return cls(source=source, date=date, stale=catalogue.is_stale(date, today), is_to_come=to_come)

    @property
    def provenance(self) -> Provenance:
        """Stated by a dated contract, or assumed to hold still."""
        return Provenance.ASSUMED if self.stale or self.is_to_come else Provenance.MEASURED

    def notes(self, file: str) -> tuple[str, ...]:
        if self.is_to_come:
            return (f"{file}: its prices are of {self.date}, which is yet to come: is the year right?",)
        return (f"{file}: its prices are of {self.date}, more than {catalogue.STALE_MONTHS} months old",) if self.stale else ()


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Discount:
    """A share off the list price of matching offers; None matches any."""

    less: float
    provider: str | None
    device: str | None
    instance: str | None
    term: str | None

    @classmethod
    def of(cls, node: Node, device_id: Devices) -> _Discount:
        found = node.section(("less",), ("provider", "device", "instance", "term"))
        return cls(
            less=found["less"].quantity(units.fraction, most=1.0),
            provider=_optional(found, "provider"),
            device=found["device"].named(device_id) if "device" in found else None,
            instance=_optional(found, "instance"),
            term=found["term"].choice(TERMS) if "term" in found else None,
        )

    def matches(self, offer: Offer) -> bool:
        asked = ((self.provider, offer.provider), (self.device, offer.device), (self.instance, offer.instance), (self.term, offer.term))
        return all(wanted in (None, is_) for wanted, is_ in asked)


def _discounted(offer: Offer, discounts: list[_Discount]) -> Offer:
    """Return the offer at its price after every discount that is for it; several multiply, as they do on a bill."""
    left = 1.0
    for discount in discounts:
        left *= 1 - discount.less if discount.matches(offer) else 1.0
    if left == 1.0:
        return offer
    return dataclasses.replace(offer, usd_per_h=offer.usd_per_h * left, source=f"{offer.source}, less {1 - left:.4g} by contract")


def _offers(node: Node, device_id: Devices, stamp: _Stamp) -> list[Offer]:
    found = node.section(_INSTANCE, ("on_demand", "spot"))
    terms: tuple[tuple[Term, str], ...] = (("on-demand", "on_demand"), ("spot", "spot"))
    priced = [(term, found[key]) for term, key in terms if key in found]
    if not priced:
        raise BadInput(f"{node.where}: has no price; give on_demand or spot, e.g. on_demand: $3.20/h")
    return [_offer(found, term, _price(price), device_id, stamp) for term, price in priced]


def _price(node: Node) -> float:
    return node.quantity(
        units.usd_per_h, most=_DEAREST_USD_PER_H, why=f": above ${_DEAREST_USD_PER_H:,.0f}/h for one instance; is it per hour?"
    )


def _commitment(node: Node, device_id: Devices, stamp: _Stamp) -> tuple[Offer, Reservation]:
    found = node.section((*_INSTANCE, "price", "term"), ("upfront", "committed", "at_most"))
    committed = found["committed"].whole() if "committed" in found else 0
    at_most = found["at_most"].whole() if "at_most" in found else None
    if at_most is not None and at_most < committed:
        raise BadInput(f"{found['at_most'].where}: {at_most} is less than the {committed} committed")
    months = found["term"].quantity(units.months, least=1.0, most=_LONGEST_MONTHS)
    if not months.is_integer():
        raise BadInput(f"{found['term'].where}: {found['term'].value} is no whole number of months")
    reservation = Reservation(
        term_months=int(months),
        upfront_share=found["upfront"].quantity(units.fraction, most=1.0) if "upfront" in found else 0.0,
        committed=committed,
        at_most=at_most,
    )
    return _offer(found, "reserved", _price(found["price"]), device_id, stamp), reservation


def _offer(found: Mapping[str, Node], term: Term, usd_per_h: float, device_id: Devices, stamp: _Stamp) -> Offer:
    return Offer(
        provider=found["provider"].text(),
        instance=found["instance"].text(),
        device=found["device"].named(device_id),
        devices=found["devices"].whole(1),
        region=found["region"].text(),
        term=term,
        usd_per_h=usd_per_h,
        source=stamp.source,
        date=stamp.date,
        provenance=stamp.provenance,
    )


def _quota(node: Node, device_id: Devices) -> Quota:
    found = node.section(("device", "devices"), ("provider", "region"))
    return Quota(
        devices=found["devices"].whole(),
        device=found["device"].named(device_id),
        provider=_optional(found, "provider"),
        region=_optional(found, "region"),
    )


def _rates(node: Node | None, stamp: _Stamp) -> Rates:
    found = {} if node is None else node.section((), tuple(_RATES))
    usd: dict[str, float | None] = {key: value.quantity(_RATES[key]) for key, value in found.items()}
    return Rates(
        storage_usd_per_byte_month=usd.get("storage"),
        egress_usd_per_byte=usd.get("egress"),
        vcpu_usd_per_h=usd.get("vcpu"),
        source=stamp.source,
        date=stamp.date,
    )


def _merged(own: list[Offer], keeps: bool) -> list[Offer]:
    """Return the file's offers, and the published ones it does not replace."""
    if not keeps:
        return own
    mine = {_key(offer) for offer in own}
    return [*own, *(offer for offer in published().offers if _key(offer) not in mine)]


def _check_unique(keys: list[tuple[str, ...]], file: str) -> None:
    twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
    if twice is not None:
        raise BadInput(f"{file}: {' '.join(twice)} is priced twice; keep one of them")


def _key(offer: Offer) -> tuple[str, ...]:
    return offer.provider, offer.instance, offer.region, offer.term


def _list(top: Mapping[str, Node], name: str) -> list[Node]:
    return top[name].items() if name in top else []


def _optional(found: Mapping[str, Node], key: str) -> str | None:
    return found[key].text() if key in found else None
