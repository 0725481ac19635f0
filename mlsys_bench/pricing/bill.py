"""The bill: what a fleet costs an hour, a month, a year, a request and a million tokens of each kind, idle time included.

A month has 730 hours, a year 8,760.  Tokens and requests are those of the *average* load: machines that wait are paid for, so a fleet that
is used to a third makes its tokens three times as dear as a full one.

Input and output tokens share the bill by the machine time they take, idle time and all else in the same proportion (activity-based
costing: Cooper and Kaplan 1988).  With w_in and w_out seconds of machine per token and T_in and T_out tokens an hour,

    usd_in = usd_h w_in / (w_in T_in + w_out T_out)        usd_out = usd_h w_out / (w_in T_in + w_out T_out)

so that usd_in T_in + usd_out T_out = usd_h, to the cent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mlsys_bench.billing import Bill, Line
from mlsys_bench.errors import BadInput
from mlsys_bench.pricing.catalogue import CpuOffer
from mlsys_bench.pricing.market import Rates
from mlsys_bench.types import Provenance
from mlsys_bench.units import HOURS_PER_MONTH, HOURS_PER_YEAR

SECONDS_PER_H = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a fleet does on average.  `input_s` and `output_s` are the machine seconds that a token of each kind takes."""

    requests_per_s: float
    input_tokens: float  # of an average request
    output_tokens: float
    input_s: float
    output_s: float
    provenance: Provenance = Provenance.ASSUMED


def usd_per_month(usd_per_h: float) -> float:
    """Return the price of a month of 730 hours."""
    return usd_per_h * HOURS_PER_MONTH


def usd_per_year(usd_per_h: float) -> float:
    """Return the price of a year of 8,760 hours."""
    return usd_per_h * HOURS_PER_YEAR


def usd_per_million_tokens(usd_per_h: float, tokens_per_s: float) -> float:
    """Return the price of a million tokens at this throughput.  Raises BadInput without throughput."""
    if not tokens_per_s > 0:
        raise BadInput(f"{tokens_per_s:g} tokens per second: without throughput a token has no price")
    return usd_per_h / (tokens_per_s * SECONDS_PER_H) * 1e6


def usd_per_token(usd_per_h: float, load: Load) -> tuple[float | None, float | None]:
    """Return the price of an input and of an output token, by the machine time they take; None for a kind there is none of."""
    input_per_h, output_per_h = (load.requests_per_s * tokens * SECONDS_PER_H for tokens in (load.input_tokens, load.output_tokens))
    busy = load.input_s * input_per_h + load.output_s * output_per_h
    if not (busy > 0 and math.isfinite(busy)):
        return None, None
    return (usd_per_h * load.input_s / busy if input_per_h else None), (usd_per_h * load.output_s / busy if output_per_h else None)


def bill(lines: Sequence[Line], load: Load, unpriced: Sequence[str] = ()) -> Bill:
    """Return the bill of these lines at this load.  Raises BadInput where no request comes."""
    if not load.requests_per_s > 0:
        raise BadInput(f"{load.requests_per_s:g} requests per second: without requests none of them has a price")
    usd_per_h = math.fsum(line.usd_per_h for line in lines)
    input_usd, output_usd = usd_per_token(usd_per_h, load)
    tokens_per_s = load.requests_per_s * (load.input_tokens + load.output_tokens)
    return Bill(
        lines=tuple(lines),
        usd_per_h=usd_per_h,
        usd_per_month=usd_per_month(usd_per_h),
        usd_per_year=usd_per_year(usd_per_h),
        usd_per_request=usd_per_h / (load.requests_per_s * SECONDS_PER_H),
        usd_per_million_tokens=usd_per_million_tokens(usd_per_h, tokens_per_s) if tokens_per_s else None,
        usd_per_million_input_tokens=None if input_usd is None else 1e6 * input_usd,
        usd_per_million_output_tokens=None if output_usd is None else 1e6 * output_usd,
        unpriced=tuple(unpriced),
        provenance=Provenance.weakest(*(line.provenance for line in lines), load.provenance),
    )


# ---------------------------------------------------------------- beside devices


def vector_bytes(vectors: float, dimensions: int, value_bytes: float = 4.0, links: int = 0) -> float:
    """Return what vectors take: n (d value_bytes + 8 links): `links` is HNSW's M, 2 M neighbours of four bytes a vector."""
    if min(vectors, dimensions, value_bytes, links) < 0:
        raise BadInput(f"{vectors:g} vectors of {dimensions} dimensions: none may be below zero")
    return vectors * (dimensions * value_bytes + 8 * links)


def storage(rates: Rates, stored_bytes: float, replicas: int, what: str = "vectors") -> Line | None:
    """Return the line for bytes kept in so many copies: bytes x copies x $/byte-month / 730 h; None where storage has no price."""
    if rates.storage_usd_per_byte_month is None:
        return None
    usd = stored_bytes * replicas * rates.storage_usd_per_byte_month / HOURS_PER_MONTH
    return Line(
        what=f"storage of {what}, {replicas} {'copy' if replicas == 1 else 'copies'}",
        usd_per_h=usd,
        source=rates.source,
        date=rates.date,
        provenance=Provenance.MEASURED,
    )


def network(rates: Rates, requests_per_s: float, bytes_per_request: float) -> Line | None:
    """Return the line for bytes that leave: requests x bytes x $/byte; None where traffic has no price."""
    if rates.egress_usd_per_byte is None:
        return None
    usd = requests_per_s * SECONDS_PER_H * bytes_per_request * rates.egress_usd_per_byte
    return Line(what="network egress", usd_per_h=usd, source=rates.source, date=rates.date, provenance=Provenance.MEASURED)


def vcpus(rates: Rates, count: float, cheapest: CpuOffer | None = None) -> Line | None:
    """Return the line for so many vCPUs: at the contract's rate, else at the cheapest published instance's; None without either."""
    if rates.vcpu_usd_per_h is not None:
        usd, source, date, kind = rates.vcpu_usd_per_h, rates.source, rates.date, Provenance.MEASURED
    elif cheapest is not None:
        usd, source, date, kind = cheapest.usd_per_vcpu_h, f"{cheapest.instance}, {cheapest.source}", cheapest.date, Provenance.ASSUMED
    else:
        return None
    return Line(what=f"{count:g} vCPU", usd_per_h=usd * count, source=source, date=date, provenance=kind)
