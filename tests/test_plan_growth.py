"""Growth: the month a fleet is full, by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput
from mlsys_bench.plan.growth import Growth, full_month, outlook


def ten(rate: float) -> int:
    return max(1, math.ceil(rate / 10 - 1e-9))


def test_ten_percent_a_month_doubles_in_seven_and_a_quarter() -> None:
    """5 replicas hold 50/s; 25/s growing by 10 % is there after ln 2 / ln 1.1 = 7.27 months; at 20 % after 3.80, at 5 % after 14.2."""
    found = outlook(25.0, Growth(per_month=0.1, low=0.05, high=0.2), ten, fleet=5, usd_per_h=lambda n: 2.0 * n, months=12)
    assert found.full_at_per_s == pytest.approx(50)
    assert found.full_month == pytest.approx(7.2725, abs=1e-4)
    assert found.full_interval == pytest.approx((3.8018, 14.2067), abs=1e-4)
    assert [m.replicas for m in found.months[:9]] == [3, 3, 4, 4, 4, 5, 5, 5, 6]
    assert found.months[8].usd_per_h == 12.0
    assert found.months[8].rate_per_s == pytest.approx(25 * 1.1**8)
    assert found.months[8].replicas_interval == (4, 11)
    assert len(found.months) == 13


def test_a_fleet_is_full_today_or_never() -> None:
    assert outlook(60.0, Growth(per_month=0.1), ten, fleet=5).full_month == 0
    still = outlook(25.0, Growth(per_month=0.0), ten, fleet=5)
    assert still.full_month is None
    assert still.full_interval is None
    shrinking = outlook(25.0, Growth(per_month=-0.1, low=-0.2, high=0.1), ten, fleet=5)
    assert shrinking.full_interval is not None
    assert shrinking.full_interval[0] == pytest.approx(7.2725, abs=1e-4)
    assert shrinking.full_interval[1] is None
    assert shrinking.months[-1].usd_per_h is None


def test_months_are_told_as_long_as_somebody_may_plan_for_them() -> None:
    """Eleven times as much each month is 1e25 times in two years: 11^2 = 121 is told, 11^3 = 1,331 is not."""
    assert [m.rate_per_s for m in outlook(1.0, Growth(per_month=10.0), ten, fleet=5).months] == pytest.approx([1.0, 11.0, 121.0])
    assert len(outlook(1.0, Growth(per_month=0.05, high=0.3), ten, fleet=5).months) == 25
    assert len(outlook(1.0, Growth(per_month=-0.5), ten, fleet=5).months) == 25


def test_bad_growth_is_refused() -> None:
    with pytest.raises(BadInput, match="above -100 %"):
        Growth(per_month=-1.0)
    with pytest.raises(BadInput, match="interval around it"):
        Growth(per_month=0.1, low=0.2)
    with pytest.raises(BadInput, match="above zero"):
        outlook(0.0, Growth(per_month=0.1), ten, fleet=5)


@settings(max_examples=40)
@given(st.floats(0.1, 1e4), st.floats(0.001, 2.0), st.integers(1, 500))
def test_just_before_the_month_the_fleet_does_and_just_after_it_does_not(rate: float, growth: float, fleet: int) -> None:
    found = outlook(rate, Growth(per_month=growth), ten, fleet=fleet, months=1)
    if found.full_month is None or found.full_month == 0:
        assert ten(rate) > fleet or full_month(rate, growth, 10.0 * fleet) is None or rate == pytest.approx(10 * fleet)
        return
    assert ten(rate * (1 + growth) ** (found.full_month * (1 - 1e-6))) <= fleet
    assert ten(rate * (1 + growth) ** (found.full_month + 1e-3)) > fleet
