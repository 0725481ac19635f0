"""What devices cost to rent: dated, sourced offers and the arithmetic of cost.

Prices come from `data/gpu_prices.csv`.  A row with a dated source is a published fact; one that is assumed (the demo's CPU) or
older than 18 months says so in its provenance.  A device without a row has no price, and nothing here invents one.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from dataclasses import dataclass
from typing import Literal

from mlsys_bench import resources
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.types import Offer, Provenance
from mlsys_bench.units import HOURS_PER_MONTH

Term = Literal["on-demand", "spot", "reserved"]
TERMS: tuple[Term, ...] = ("on-demand", "spot", "reserved")
STALE_MONTHS = 18
_TERM_OF_KIND: dict[str, Term] = {"on_demand": "on-demand", "assumed_share": "on-demand", "capacity_block": "reserved"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiPrice:
    """What a hosted model asks per million tokens."""

    model: str
    provider: str
    mode: str
    input_usd_per_million: float
    output_usd_per_million: float
    source: str
    date: str


def offers(device_id: str | None = None, term: str | None = None) -> tuple[Offer, ...]:
    """Return the offers of a device (its catalogue id), or of all; on one term, or on all.  Empty where nothing has a price."""
    if term is not None:
        _check_term(term)
    return tuple(o for o in _offers() if (device_id is None or o.device.lower() == device_id.lower()) and (term is None or o.term == term))


def cheapest(device_id: str, devices: int, term: str = "on-demand") -> tuple[Offer, int] | None:
    """Return the offer with the lowest price per replica of so many devices, and the replicas one instance holds; None if unpriced.

    A replica stays within one instance; devices that no whole replica fits on are paid for and stranded.
    """
    _check_counts(devices, 1)
    fitting = [o for o in offers(device_id, term) if o.devices >= devices]
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


def choose(device_id: str, devices_per_replica: int, replicas: int, term: str = "on-demand") -> tuple[Offer, int] | None:
    """Return the offer that holds so many replicas for the fewest dollars, and how many instances of it; None if unpriced.

    One kind of instance per fleet; of equal prices the fewest idle devices.
    """
    _check_counts(devices_per_replica, replicas)
    fits = [o for o in offers(device_id, term) if o.devices >= devices_per_replica]
    counted = [(o, instances_for(o, devices_per_replica, replicas)) for o in fits]
    return min(counted, key=lambda c: (c[0].usd_per_h * c[1], c[0].devices * c[1], c[0].provider, c[0].instance), default=None)


def usd_per_month(usd_per_h: float) -> float:
    """Return the price of a month of 730 hours."""
    return usd_per_h * HOURS_PER_MONTH


def usd_per_million_tokens(usd_per_h: float, tokens_per_s: float) -> float:
    """Return the price of a million tokens at this throughput.  Raises BadInput without throughput."""
    if not tokens_per_s > 0:
        raise BadInput(f"{tokens_per_s:g} tokens per second: without throughput a token has no price")
    return usd_per_h / (tokens_per_s * 3600) * 1e6


def api_prices() -> tuple[ApiPrice, ...]:
    """Return what hosted models ask per million tokens."""
    with resources.catalogue("api_prices.csv").open(newline="", encoding="utf-8") as file:
        return tuple(
            ApiPrice(
                model=row["model"],
                provider=row["provider"],
                mode=row["mode"],
                input_usd_per_million=float(row["input_usd_per_1m"]),
                output_usd_per_million=float(row["output_usd_per_1m"]),
                source=row["source"],
                date=row["date"],
            )
            for row in csv.DictReader(file)
        )


# ---------------------------------------------------------------- catalogue


@functools.cache
def _offers() -> tuple[Offer, ...]:
    with resources.catalogue("gpu_prices.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["gpu"]]  # CPU instances are there for the source of the CPU row's price
    newest = max(_months(row["date"]) for row in rows)
    return tuple(offer for row in rows for offer in _offers_of(row, newest))


def _offers_of(row: dict[str, str], newest_months: int) -> list[Offer]:
    """Return the offers of one row: its own term, and spot where a spot price is given."""
    stale = newest_months - _months(row["date"]) > STALE_MONTHS
    provenance = Provenance.ASSUMED if stale or row["kind"] == "assumed_share" else Provenance.MEASURED
    priced: list[tuple[Term, str]] = [(_TERM_OF_KIND[row["kind"]], row["on_demand_usd_h"]), ("spot", row["spot_usd_h_median_seen"])]
    return [
        Offer(
            provider=row["provider"],
            instance=row["instance"],
            device=row["gpu"],
            devices=int(row["gpu_count"]),
            region=row["region"],
            term=term,
            usd_per_h=float(price),
            source=row["source"],
            date=row["date"],
            provenance=provenance,
        )
        for term, price in priced
        if price
    ]


def _months(date: str) -> int:
    """Return the month a date names ('… read 2026-11-20', '2024-Q4'), counted from year 0."""
    day = re.search(r"(\d{4})-(\d{2})", date)
    if day:
        return int(day[1]) * 12 + int(day[2]) - 1
    quarter = re.search(r"(\d{4})-Q([1-4])", date)
    if not quarter:
        raise BadInput(f"gpu_prices.csv: {date!r} is no date; a price needs one, like 2026-11-20 or 2024-Q4")
    return int(quarter[1]) * 12 + int(quarter[2]) * 3 - 1


def _check_term(term: str) -> None:
    if term not in TERMS:
        raise BadInput(f"unknown term {term!r}{did_you_mean(term, TERMS)}")


def _check_counts(devices: int, replicas: int) -> None:
    if devices < 1 or replicas < 1:
        raise BadInput(f"{replicas} replica(s) of {devices} device(s): both must be at least 1")
