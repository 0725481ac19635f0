"""Quantities: read with their unit or not at all, printed in three digits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import units
from mlsys_bench.errors import UnitError


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (units.seconds, "500ms", 0.5),
        (units.seconds, " 1.5 s ", 1.5),
        (units.seconds, "2min", 120),
        (units.seconds, "1h", 3600),
        (units.seconds, "20us", 20e-6),
        (units.seconds, "20µs", 20e-6),
        (units.seconds, "1e-3s", 0.001),
        (units.size_bytes, "2.5GB", 2.5e9),
        (units.size_bytes, "1GiB", 1073741824),
        (units.size_bytes, "1_000 B", 1000),
        (units.per_s, "200/s", 200),
        (units.per_s, "60/min", 1),
        (units.per_s, "36/h", 0.01),
        (units.usd_per_h, "$3.20/h", 3.2),
        (units.usd_per_h, "$730/month", 1),
        (units.usd_per_h, "$24/d", 1),
        (units.fraction, "99.9%", 0.999),
        (units.fraction, "20 %", 0.2),
    ],
)
def test_a_quantity_is_read_in_si(parse: Callable[[str], float], text: str, value: float) -> None:
    assert parse(text) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("parse", "value", "says"),
    [
        (units.seconds, 500, "slo.ttft: 500 has no unit; a duration needs one, did you mean 500ms?"),
        (units.seconds, "500", "slo.ttft: '500' has no unit; a duration takes one of ns, us, µs, ms, s, min, m, h, d, e.g. 500ms"),
        (units.seconds, "5 apples", "slo.ttft: '5 apples' has the unit 'apples'"),
        (units.seconds, "5MB", "has the unit 'MB'; a duration takes one of"),
        (units.seconds, "", "'' is no duration; write it like 500ms"),
        (units.seconds, "fast", "'fast' is no duration"),
        (units.seconds, "nan s", "is no duration"),
        (units.seconds, "1e999s", "is not a finite duration"),
        (units.per_s, 20, "20 has no unit; a rate needs one, did you mean 20/s?"),
        (units.fraction, 0.2, "0.2 has no unit; a share needs one, did you mean 0.2%?"),
        (units.usd_per_h, 3, "3 has no unit; a price needs one, did you mean $3/h?"),
        (units.usd_per_h, "3.2/h", "'3.2/h' is no price; write it like $3.20/h"),
        (units.size_bytes, "$5GB", "'$5GB' is no size"),
    ],
)
def test_what_is_no_quantity_is_refused_with_the_cure(parse: Callable[[object, str], float], value: object, says: str) -> None:
    with pytest.raises(UnitError) as caught:
        parse(value, "slo.ttft")
    assert says in str(caught.value)
    assert str(caught.value).startswith("slo.ttft: ")


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (units.show_s(0.0123), "12.3 ms"),
        (units.show_s(1.0), "1.00 s"),
        (units.show_s(0.9994), "999 ms"),
        (units.show_s(90), "90.0 s"),
        (units.show_s(180), "3.00 min"),
        (units.show_s(7200), "2.00 h"),
        (units.show_s(4.2e-6), "4.20 µs"),
        (units.show_s(3e-9), "3.00 ns"),
        (units.show_s(0), "0 s"),
        (units.show_s(None), "—"),
        (units.show_s(float("nan")), "—"),
        (units.show_bytes(2.5e9), "2.50 GB"),
        (units.show_bytes(12), "12.0 B"),
        (units.show_usd(None), "unpriced"),
        (units.show_usd(0.0496), "$0.0496"),
        (units.show_usd(3.2), "$3.20"),
        (units.show_usd(12345.6), "$12,346"),
        (units.show_rate(12.34), "12.3/s"),
        (units.show_share(0.634), "63.4 %"),
        (units.show_scaled(1.2e12, "FLOP/s"), "1.20 TFLOP/s"),
    ],
)
def test_numbers_are_printed_for_people(shown: str, text: str) -> None:
    assert shown == text


@given(st.floats(1e-8, 1e8))
def test_a_printed_duration_reads_back_within_its_three_digits(value: float) -> None:
    assert units.seconds(units.show_s(value).replace(",", "")) == pytest.approx(value, rel=5.1e-3)


@given(st.floats(1e-6, 1e6), st.sampled_from(sorted(units.SECONDS)))
def test_a_unit_scales_and_does_nothing_else(value: float, unit: str) -> None:
    assert units.seconds(f"{value!r}{unit}") == pytest.approx(value * units.SECONDS[unit], rel=1e-12)


@given(st.text(max_size=12))
def test_any_text_is_a_duration_or_refused(text: str) -> None:
    try:
        value = units.seconds(text)
    except UnitError as error:
        assert "duration" in str(error)  # noqa: PT017  (both outcomes are right)
        return
    assert value == value
