"""What hosted models ask, with cached input and batches, and from how many requests a day an own fleet costs less."""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

from mlsys_bench import resources
from mlsys_bench.billing import BreakEven
from mlsys_bench.errors import BadInput, unknown

HOURS_PER_DAY = 24.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiPrice:
    """What a hosted model asks per million tokens; None where it sells no such thing."""

    model: str
    provider: str
    mode: str
    input_usd_per_million: float
    output_usd_per_million: float
    cached_input_usd_per_million: float | None = None  # input that its cache has seen
    cache_write_usd_per_million: float | None = None  # input that is put into the cache; None: as other input
    batch_input_usd_per_million: float | None = None  # answered within a day
    batch_output_usd_per_million: float | None = None
    withdrawn: str | None = None  # the day from which it is no longer sold
    source: str
    date: str


@functools.cache
def api_prices() -> tuple[ApiPrice, ...]:
    """Return what hosted models ask per million tokens."""
    with resources.catalogue("api_prices.csv").open(newline="", encoding="utf-8") as file:
        return tuple(_api_price(row) for row in csv.DictReader(file))


def api_price(model: str) -> ApiPrice:
    """Return the price of a hosted model by name.  Raises UnknownName."""
    by_name = {price.model.lower(): price for price in api_prices()}
    if model.lower() not in by_name:
        raise unknown("hosted model", model, [price.model for price in api_prices()])
    return by_name[model.lower()]


def api_usd_per_request(
    price: ApiPrice,
    input_tokens: float,
    output_tokens: float,
    *,
    cached_tokens: float = 0.0,
    written_tokens: float = 0.0,
    batch_share: float = 0.0,
) -> float:
    """Return what an average request costs at an API.

    `cached_tokens` of the input are read from the provider's cache, `written_tokens` are put there; `batch_share` of the requests can
    wait and go by batch, at batch prices and without cache.  Raises BadInput where the model is not sold that way.

        (1 - b) ((in - cached - written) p_in + cached p_cached + written p_write + out p_out) / 1e6
        + b (in p_batch_in + out p_batch_out) / 1e6
    """
    _check_tokens(input_tokens, output_tokens, cached_tokens, written_tokens, batch_share)
    cached_usd = _sold(price, price.cached_input_usd_per_million, cached_tokens, "cached input")
    batch_in_usd = _sold(price, price.batch_input_usd_per_million, batch_share, "batches")
    batch_out_usd = _sold(price, price.batch_output_usd_per_million, batch_share, "batches")
    write_usd = price.input_usd_per_million if price.cache_write_usd_per_million is None else price.cache_write_usd_per_million
    fresh_tokens = input_tokens - cached_tokens - written_tokens
    asked = fresh_tokens * price.input_usd_per_million + cached_tokens * cached_usd + written_tokens * write_usd
    at_once = asked + output_tokens * price.output_usd_per_million
    by_batch = input_tokens * batch_in_usd + output_tokens * batch_out_usd
    return ((1 - batch_share) * at_once + batch_share * by_batch) / 1e6


def break_even(
    api_usd: float,
    capacity_per_day: float,
    fleet_usd_per_h: Callable[[int], float],
    *,
    least: int = 1,
    most: int = 2000,
) -> BreakEven:
    """Return the requests a day from which an own fleet costs no more than an API that asks `api_usd` a request.

    `capacity_per_day` is what one replica carries within its limits, `fleet_usd_per_h(n)` the price of n replicas (instances, so steps
    and all), `least` the fewest there may be: two zones, say.  With n replicas, rates up to n x capacity are served for
    24 h x usd(n); the API asks rate x api_usd.  The two cross at rate = 24 usd(n) / api_usd, if that rate needs n replicas.
    """
    if not (api_usd >= 0 and capacity_per_day > 0) or least < 1:
        raise BadInput(f"an API price of {api_usd:g}, {capacity_per_day:g} requests a day and {least} replica(s): none may be below zero")
    crossings = [
        (max(24 * fleet_usd_per_h(n) / api_usd, 0.0 if n == least else (n - 1) * capacity_per_day), n)
        for n in range(least, most + 1)
        if api_usd > 0 and HOURS_PER_DAY * fleet_usd_per_h(n) <= n * capacity_per_day * api_usd
    ]
    first = min(crossings, default=None)
    return BreakEven(
        from_per_day=None if first is None else first[0],
        for_good_per_day=_for_good(api_usd, capacity_per_day, fleet_usd_per_h, {n: rate for rate, n in crossings}, least, most),
        replicas=None if first is None else first[1],
        api_usd_per_request=api_usd,
        idle_usd_per_day=HOURS_PER_DAY * fleet_usd_per_h(least),
    )


def _for_good(
    api_usd: float, capacity_per_day: float, fleet_usd_per_h: Callable[[int], float], crossing: dict[int, float], least: int, most: int
) -> float | None:
    """Return the rate beyond which no step of the fleet is dearer than the API: walk down from the largest fleet to the first that is."""
    if most not in crossing:
        return None
    for n in range(most, least, -1):
        if n not in crossing:
            return n * capacity_per_day  # the whole of step n is dearer
        if HOURS_PER_DAY * fleet_usd_per_h(n) > (n - 1) * capacity_per_day * api_usd:
            return crossing[n]  # the beginning of step n is
    return crossing.get(least, least * capacity_per_day)


def _sold(price: ApiPrice, usd: float | None, wanted: float, what: str) -> float:
    if usd is None and wanted > 0:
        raise BadInput(f"{price.model}: {price.provider} publishes no price for {what}; leave it out or give another model")
    return usd or 0.0


def _check_tokens(input_tokens: float, output_tokens: float, cached_tokens: float, written_tokens: float, batch_share: float) -> None:
    values = (input_tokens, output_tokens, cached_tokens, written_tokens)
    if not all(math.isfinite(v) and v >= 0 for v in values) or cached_tokens + written_tokens > input_tokens:
        raise BadInput(
            f"{cached_tokens:g} cached and {written_tokens:g} written of {input_tokens:g} input tokens: a part exceeds the whole"
        )
    if not 0 <= batch_share <= 1:
        raise BadInput(f"a batch share of {batch_share:g} does not lie between 0 and 1")


def _api_price(row: dict[str, str]) -> ApiPrice:
    def optional(column: str) -> float | None:
        return float(row[column]) if row[column] else None

    return ApiPrice(
        model=row["model"],
        provider=row["provider"],
        mode=row["mode"],
        input_usd_per_million=float(row["input_usd_per_1m"]),
        output_usd_per_million=float(row["output_usd_per_1m"]),
        cached_input_usd_per_million=optional("cached_read_usd_per_1m"),
        cache_write_usd_per_million=optional("cache_write_usd_per_1m"),
        batch_input_usd_per_million=optional("batch_input_usd_per_1m"),
        batch_output_usd_per_million=optional("batch_output_usd_per_1m"),
        withdrawn=row["deprecation_date"] or None,
        source=row["source"],
        date=row["date"],
    )
