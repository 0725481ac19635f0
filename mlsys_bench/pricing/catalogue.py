"""What devices cost to rent: the dated, sourced offers of `data/gpu_prices.csv`.

A row with a dated source is a published fact; one that is assumed (the demo's CPU) or older than 18 months says so in its provenance.
A device without a row has no price, and nothing here invents one.
"""

from __future__ import annotations

import csv
import functools
import re
from dataclasses import dataclass
from typing import Literal

from mlsys_bench import resources
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.types import Offer, Provenance

Term = Literal["on-demand", "spot", "reserved"]
TERMS: tuple[Term, ...] = ("on-demand", "spot", "reserved")
STALE_MONTHS = 18
_TERM_OF_KIND: dict[str, Term] = {"on_demand": "on-demand", "assumed_share": "on-demand", "capacity_block": "reserved"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuOffer:
    """An instance without a GPU: what an hour of its vCPUs costs."""

    provider: str
    instance: str
    region: str
    vcpus: int
    memory_bytes: float
    usd_per_h: float
    source: str
    date: str
    term: Term = "on-demand"

    @property
    def usd_per_vcpu_h(self) -> float:
        """Dollars per vCPU and hour, the memory that comes with it included."""
        return self.usd_per_h / self.vcpus


@functools.cache
def every() -> tuple[Offer, ...]:
    """Return the offers of all devices on all terms."""
    rows = [row for row in _rows() if row["gpu"]]
    newest = max(months(row["date"]) for row in rows)
    return tuple(offer for row in rows for offer in _offers_of(row, newest))


def cpu_offers(term: Term = "on-demand") -> tuple[CpuOffer, ...]:
    """Return the instances without a GPU sold on a term, the cheapest vCPU first; none are listed as reserved."""
    column = {"on-demand": "on_demand_usd_h", "spot": "spot_usd_h_median_seen"}.get(term, "")
    found = [
        CpuOffer(
            provider=row["provider"],
            instance=row["instance"],
            region=row["region"],
            vcpus=int(row["vcpus"]),
            memory_bytes=float(row["mem_gib"]) * 2**30,
            usd_per_h=float(row[column]),
            source=row["source"],
            date=row["date"],
            term=term,
        )
        for row in _rows()
        if row["kind"] == "cpu_on_demand" and row.get(column)
    ]
    return tuple(sorted(found, key=lambda o: (o.usd_per_vcpu_h, o.provider, o.instance)))


def is_stale(date: str, today: str) -> bool:
    """Say whether a price of one date is more than 18 months old on another."""
    return months(today) - months(date) > STALE_MONTHS


def months(date: str) -> int:
    """Return the month a date names ('… read 2026-11-20', '2024-Q4'), counted from year 0.  Raises BadInput where it names none."""
    day = re.search(r"(\d{4})-(\d{2})", date)
    if day and 1 <= int(day[2]) <= 12:
        return int(day[1]) * 12 + int(day[2]) - 1
    quarter = re.search(r"(\d{4})-Q([1-4])", date)
    if not quarter:
        raise BadInput(f"{date!r} is no date; a price needs one, like 2026-11-20 or 2024-Q4")
    return int(quarter[1]) * 12 + int(quarter[2]) * 3 - 1


def check_term(term: str) -> None:
    """Raise BadInput for a term nobody sells on."""
    if term not in TERMS:
        raise BadInput(f"unknown term {term!r}{did_you_mean(term, TERMS)}")


@functools.cache
def _rows() -> tuple[dict[str, str], ...]:
    with resources.catalogue("gpu_prices.csv").open(newline="", encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def _offers_of(row: dict[str, str], newest_months: int) -> list[Offer]:
    """Return the offers of one row: its own term, and spot where a spot price is given."""
    stale = newest_months - months(row["date"]) > STALE_MONTHS
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
