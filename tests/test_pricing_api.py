"""Hosted models: what a request costs there, and from where an own fleet is cheaper."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import pricing
from mlsys_bench.errors import BadInput, UnknownName


def usd(model: str, input_tokens: float, output_tokens: float, **kind: float) -> float:
    return pricing.api_usd_per_request(pricing.api_price(model), input_tokens, output_tokens, **kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "input_tokens", "output_tokens", "dollars"),
    [
        ("gpt-4", 750, 250, 37_500),  # a million requests: 750 x $30 + 250 x $60
        ("gpt-4", 500, 500, 45_000),
        ("gpt-4", 1000, 1000, 90_000),
        ("gpt-4o", 1000, 1000, 12_500),
        ("gpt-4o-mini", 1000, 1000, 750),
    ],
)
def test_a_million_requests_by_hand(model: str, input_tokens: int, output_tokens: int, dollars: int) -> None:
    assert 1e6 * usd(model, input_tokens, output_tokens) == pytest.approx(dollars)


def test_cached_input_by_hand() -> None:
    """gpt-4o, 2,100 in (2,000 cached), 300 out: 100 x 2.5 + 2,000 x 1.25 + 300 x 10 = 5,750 against 8,250 millionths: 30 % less."""
    assert (usd("gpt-4o", 2100, 300), usd("gpt-4o", 2100, 300, cached_tokens=2000)) == pytest.approx((0.00825, 0.00575))


def test_writing_the_cache_costs_where_it_is_priced() -> None:
    """claude-sonnet-4-5 asks $3.75 to write what costs $3.00 unread: 2,000 x 3.75 + 100 x 3 + 300 x 15 = 12,300; gpt-4o no more."""
    assert usd("claude-sonnet-4-5", 2100, 300, written_tokens=2000) == pytest.approx(0.0123)
    assert usd("gpt-4o", 2100, 300, written_tokens=2000) == usd("gpt-4o", 2100, 300)


def test_batches_by_hand() -> None:
    """gpt-4o at half price for the 40 % that can wait: 0.6 x 8,250 + 0.4 x 4,125 = 6,600 millionths."""
    assert usd("gpt-4o", 2100, 300, batch_share=0.4) == pytest.approx(0.0066)


def test_what_is_not_sold_is_refused() -> None:
    with pytest.raises(BadInput, match="gpt-4: openai publishes no price for cached input"):
        usd("gpt-4", 100, 100, cached_tokens=50)
    with pytest.raises(BadInput, match="gpt-4: openai publishes no price for batches"):
        usd("gpt-4", 100, 100, batch_share=0.5)
    with pytest.raises(BadInput, match="a part exceeds the whole"):
        usd("gpt-4o", 100, 100, cached_tokens=101)
    with pytest.raises(BadInput, match="batch share of 2"):
        usd("gpt-4o", 100, 100, batch_share=2)
    with pytest.raises(UnknownName, match="did you mean gpt-4o"):
        pricing.api_price("gpt-4oo")


# ---------------------------------------------------------------- break-even


def test_the_quoted_break_even_by_hand() -> None:
    """$30,000 a month of 30 days is $1,000 a day; at $0.09 a request 11,111 a day, if one fleet carries that many."""
    found = pricing.break_even(0.09, 1e6, lambda n: n * 1000 / 24)
    assert (found.from_per_day, found.replicas, found.idle_usd_per_day) == pytest.approx((11_111.11, 1, 1000.0), rel=1e-5)


def test_the_least_fleet_moves_the_break_even() -> None:
    """Two replicas at least, $240 a day each, 10,000 a day each, $0.03 a request: 480 / 0.03 = 16,000, not 8,000.

    From 20,000 on a third replica makes it $720 against $600, cheaper again from 24,000 on; a fourth $960 against $900 at 30,000, cheaper
    from 32,000 on; a fifth $1,200 against $1,200 at 40,000: from 32,000 on for good.
    """
    found = pricing.break_even(0.03, 10_000, lambda n: 10.0 * n, least=2)
    assert found.from_per_day == pytest.approx(16_000)
    assert found.for_good_per_day == pytest.approx(32_000)
    assert pricing.break_even(0.03, 10_000, lambda n: 10.0 * n).from_per_day == pytest.approx(8_000)


def test_an_api_below_the_price_of_a_full_fleet_always_wins() -> None:
    found = pricing.break_even(0.02, 10_000, lambda n: 10.0 * n)
    assert (found.from_per_day, found.for_good_per_day, found.replicas) == (None, None, None)
    free = pricing.break_even(0.0, 10_000, lambda n: 10.0 * n)
    assert free.from_per_day is None


def cheaper(rate: float, api_usd: float, capacity: float, step: float, least: int) -> bool:
    replicas = max(least, math.ceil(rate / capacity - 1e-9))  # 40 times a capacity is not always 40 capacities
    return 24 * step * replicas <= rate * api_usd * (1 + 1e-12)


@settings(max_examples=40)
@given(st.floats(0.01, 0.1), st.floats(500, 3000), st.floats(0.2, 5.0), st.integers(1, 4))
def test_break_even_is_where_walking_up_the_rates_finds_it(api_usd: float, capacity: float, step: float, least: int) -> None:
    """Rates in steps of a fiftieth of a replica, the largest fleet 40 replicas."""
    found = pricing.break_even(api_usd, capacity, lambda n: step * n, least=least, most=40)
    rates = [capacity * i / 50 for i in range(1, 40 * 50 + 1)]
    won = [rate for rate in rates if cheaper(rate, api_usd, capacity, step, least)]
    if found.from_per_day is None:
        assert not won or abs(24 * step - capacity * api_usd) < 1e-6 * capacity
        return
    assert won
    assert won[0] == pytest.approx(found.from_per_day, abs=capacity / 50 + 1e-6)
    if found.for_good_per_day is not None:
        assert max(set(rates) - set(won), default=0.0) <= found.for_good_per_day + capacity / 50


def test_nonsense_is_refused() -> None:
    with pytest.raises(BadInput, match="none may be below zero"):
        pricing.break_even(0.1, 0.0, lambda n: 1.0)
