"""What machines cost: dated, sourced offers, and the arithmetic of every bill.

catalogue.py   published prices, and when they are too old to be believed
market.py      what can be bought; the cheapest one kind of instance
contract.py    a user's own prices: commitments, discounts, quotas, rates
packing.py     the cheapest mix of instance sizes, and the devices it strands
together.py    the same for replicas of several sizes, which share instances
machines.py    whole machines without a GPU, filled by vCPUs and memory
mix.py         reserved for the base load, on demand and spot above it
spot.py        what reclaims, spares and lost work make of a spot price
bill.py        per hour, month, year, request and million tokens; storage, network, vCPU
energy.py      watts, kilowatt-hours, CO2
api.py         what hosted models ask, and the break-even with an own fleet
compare.py     a plan beside a baseline
"""

from __future__ import annotations

from mlsys_bench.billing import Bill, BreakEven, Line
from mlsys_bench.pricing.api import ApiPrice, api_price, api_prices, api_usd_per_request, break_even
from mlsys_bench.pricing.bill import (
    Load,
    bill,
    network,
    storage,
    usd_per_million_tokens,
    usd_per_month,
    usd_per_token,
    usd_per_year,
    vcpus,
    vector_bytes,
)
from mlsys_bench.pricing.catalogue import STALE_MONTHS, TERMS, CpuOffer, Term, cpu_offers
from mlsys_bench.pricing.market import Market, Quota, Rates, Reservation, Shelf, cheapest, choose, instances_for, offers, published
from mlsys_bench.pricing.packing import Fleet, Lot, pack, spread

__all__ = [
    "STALE_MONTHS",
    "TERMS",
    "ApiPrice",
    "Bill",
    "BreakEven",
    "CpuOffer",
    "Fleet",
    "Line",
    "Load",
    "Lot",
    "Market",
    "Quota",
    "Rates",
    "Reservation",
    "Shelf",
    "Term",
    "api_price",
    "api_prices",
    "api_usd_per_request",
    "bill",
    "break_even",
    "cheapest",
    "choose",
    "cpu_offers",
    "instances_for",
    "network",
    "offers",
    "pack",
    "published",
    "spread",
    "storage",
    "usd_per_million_tokens",
    "usd_per_month",
    "usd_per_token",
    "usd_per_year",
    "vcpus",
    "vector_bytes",
]
