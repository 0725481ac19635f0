"""Bills to the cent: every figure here was computed by hand first."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import pricing
from mlsys_bench.errors import BadInput
from mlsys_bench.pricing import Line, Load, Rates, energy
from mlsys_bench.pricing.energy import Site
from mlsys_bench.types import Provenance

RATES = Rates(storage_usd_per_byte_month=1e-10, egress_usd_per_byte=9e-11, vcpu_usd_per_h=0.03, source="contract", date="2026-10-01")
LOAD = Load(requests_per_s=2.0, input_tokens=1000.0, output_tokens=250.0, input_s=1e-5, output_s=1e-4)


def line(usd_per_h: float, provenance: Provenance = Provenance.MEASURED) -> Line:
    return Line(what="devices", usd_per_h=usd_per_h, source="test", date="2026-11-01", provenance=provenance)


def test_an_hour_makes_a_month_a_year_and_a_request() -> None:
    """$27.00 and $9.00 an hour at two requests a second: $26,280.00 a month, $315,360.00 a year, 36 / 7,200 = half a cent a request."""
    found = pricing.bill([line(27.0), line(9.0)], LOAD)
    assert (found.usd_per_h, found.usd_per_month, found.usd_per_year) == (36.0, 26_280.0, 315_360.0)
    assert found.usd_per_request == pytest.approx(0.005)


def test_tokens_share_the_bill_by_machine_time() -> None:
    """7.2 M in and 1.8 M out an hour take 72 s and 180 s of machine: of $36.00 inputs bear 2/7, $10.29: $1.43 a million, outputs $14.29.

    36 x 1e-5 / 252 x 1e6 = $1.428571, 36 x 1e-4 / 252 x 1e6 = $14.285714; 7.2 x 1.428571 + 1.8 x 14.285714 = $36.00.  Both together:
    36 / 9 M = $4.00.
    """
    found = pricing.bill([line(36.0)], LOAD)
    assert found.usd_per_million_input_tokens == pytest.approx(10 / 7)
    assert found.usd_per_million_output_tokens == pytest.approx(100 / 7)
    assert found.usd_per_million_tokens == pytest.approx(4.0)


@given(st.floats(0.01, 1e4), st.floats(0.01, 1e3), st.floats(0, 1e4), st.floats(1, 1e4), st.floats(0, 1e-2), st.floats(1e-7, 1e-1))
def test_the_two_kinds_of_tokens_add_up_to_the_bill(usd: float, rate: float, i: float, o: float, i_s: float, o_s: float) -> None:
    load = Load(requests_per_s=rate, input_tokens=i, output_tokens=o, input_s=i_s, output_s=o_s)
    input_usd, output_usd = pricing.usd_per_token(usd, load)
    assert output_usd is not None
    assert (input_usd or 0.0) * rate * 3600 * i + output_usd * rate * 3600 * o == pytest.approx(usd)


def test_idle_time_is_paid_for() -> None:
    """A third of the load, three times the price of everything."""
    full, third = (
        pricing.bill([line(36.0)], Load(requests_per_s=r, input_tokens=9, output_tokens=3, input_s=1, output_s=1)) for r in (3, 1)
    )
    assert third.usd_per_request == pytest.approx(3 * full.usd_per_request)
    assert third.usd_per_million_output_tokens == pytest.approx(3 * (full.usd_per_million_output_tokens or 0.0))


def test_a_bill_is_as_weak_as_its_weakest_line() -> None:
    sure = Load(requests_per_s=1, input_tokens=1, output_tokens=1, input_s=1, output_s=1, provenance=Provenance.CALIBRATED)
    assert pricing.bill([line(1.0)], sure).provenance is Provenance.CALIBRATED
    assert pricing.bill([line(1.0), line(1.0, Provenance.ASSUMED)], sure, ["egress"]).provenance is Provenance.ASSUMED
    assert pricing.bill([line(1.0)], sure, ["egress"]).unpriced == ("egress",)


def test_no_requests_no_price() -> None:
    with pytest.raises(BadInput, match="without requests none of them has a price"):
        pricing.bill([line(1.0)], Load(requests_per_s=0, input_tokens=1, output_tokens=1, input_s=1, output_s=1))
    none = Load(requests_per_s=1, input_tokens=0, output_tokens=0, input_s=1, output_s=1)
    assert pricing.usd_per_token(1.0, none) == (None, None)
    assert pricing.bill([line(1.0)], none).usd_per_million_tokens is None


# ---------------------------------------------------------------- beside devices


def test_ten_million_vectors_of_1536_kept_twice() -> None:
    """10 M x 1,536 x 4 B = 61.44 GB; twice at $0.10 a GB and month: $12.29 a month; with HNSW links of M = 16 62.72 GB: $12.54."""
    plain, linked = pricing.vector_bytes(10e6, 1536), pricing.vector_bytes(10e6, 1536, links=16)
    assert (plain, linked) == (61.44e9, 62.72e9)
    months = [round(730 * line.usd_per_h, 2) for b in (plain, linked) if (line := pricing.storage(RATES, b, 2))]
    assert months == [12.29, 12.54]


def test_what_leaves_is_paid_by_the_gigabyte() -> None:
    """100 requests a second of 50 kB: 18 GB an hour at $0.09: $1.62."""
    found = pricing.network(RATES, 100.0, 50_000.0)
    assert found is not None
    assert (round(found.usd_per_h, 2), found.source, found.date) == (1.62, "contract", "2026-10-01")


def test_vcpus_are_the_contracts_or_the_cheapest_published() -> None:
    """16 at $0.03: $0.48.  Published: four of Nebius at $0.0992 are $0.0248 each: 16 are $0.3968, assumed to be the kind that is meant."""
    own, published = pricing.vcpus(RATES, 16), pricing.vcpus(Rates(), 16, pricing.cpu_offers()[0])
    assert own is not None
    assert published is not None
    assert (own.usd_per_h, own.provenance) == (0.48, Provenance.MEASURED)
    assert (round(published.usd_per_h, 4), published.provenance) == (0.3968, Provenance.ASSUMED)
    assert [round(o.usd_per_vcpu_h, 4) for o in pricing.cpu_offers()] == [0.0248, 0.0408, 0.0565, 0.0565]


def test_what_nobody_prices_is_not_invented() -> None:
    assert pricing.storage(Rates(), 1e12, 1) is None
    assert pricing.network(Rates(), 1.0, 1.0) is None
    assert pricing.vcpus(Rates(), 4) is None


# ---------------------------------------------------------------- energy


def test_eight_h100_at_half_their_load() -> None:
    """700 W x (0.17 + 0.83 / 2) = 409.5 W each, 3,276 W together; PUE 1.25: 4,095 W, 2,989.35 kWh a month, 35,872.2 a year.

    At $0.08 $239.15 a month; at 400 g a kWh 1,195.74 kg; ten requests a second: 4,095 / 36,000 = 0.11375 Wh each.
    """
    site = Site(pue=1.25, usd_per_kwh=0.08, co2_g_per_kwh=400.0, source="own hall")
    found = energy.draw(700.0, 8, 0.5, site=site, requests_per_s=10.0)
    assert found is not None
    assert found.watts == pytest.approx(4095.0)
    assert (found.kwh_per_month, found.kwh_per_year) == pytest.approx((2989.35, 35_872.2))
    assert (round(found.usd_per_month or 0, 2), round(found.co2_kg_per_month or 0, 2)) == (239.15, 1195.74)
    assert found.wh_per_request == pytest.approx(0.11375)
    assert found.provenance is Provenance.ASSUMED
    assert found.assumed == ("a busy device draws its TDP", "an idle one 17% of it", "PUE 1.25 (own hall)")


def test_nothing_is_said_of_a_grid_nobody_named() -> None:
    """Two stranded devices idle at a measured 100 W, one host of 400 W, one device at full 700 W, PUE 1.58: 1,300 x 1.58 = 2,054 W."""
    found = energy.draw(700.0, 1, 1.0, site=Site(host_w=400.0), hosts=1, stranded=2, idle_w=100.0)
    assert found is not None
    assert found.watts == pytest.approx(2054.0)
    assert (found.co2_kg_per_month, found.usd_per_month, found.wh_per_request) == (None, None, None)
    assert found.assumed == ("a busy device draws its TDP", "PUE 1.58 (Uptime Institute survey 2023)")
    without = energy.draw(700.0, 8, 1.0, hosts=1)
    assert without is not None
    assert "hosts count for nothing, for want of their watts" in without.assumed
    assert energy.draw(None, 8, 0.5) is None


@pytest.mark.parametrize(
    ("site", "complaint"),
    [(Site(pue=0.9), "PUE of 0.9"), (Site(co2_g_per_kwh=-1.0), "co2_g_per_kwh of -1"), (Site(host_w=float("nan")), "host_w of nan")],
)
def test_a_site_that_cannot_be_is_refused(site: Site, complaint: str) -> None:
    with pytest.raises(BadInput, match=complaint):
        energy.check_site(site)
    assert energy.check_site(Site(pue=1.1)).pue == 1.1


def test_a_device_is_used_between_never_and_always() -> None:
    with pytest.raises(BadInput, match="a share from 0 to 1"):
        energy.device_w(700.0, 1.2)
    assert (energy.device_w(700.0, 1.0), energy.device_w(700.0, 0.0)) == pytest.approx((700.0, 119.0))
