"""Prices: dated and sourced, whole instances, and nothing where nobody published one."""

from __future__ import annotations

import csv
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import hardware, pricing, resources
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Offer, Provenance

ROWS = list(csv.DictReader(resources.catalogue("gpu_prices.csv").read_text(encoding="utf-8").splitlines()))
PRICED = sorted({offer.device for offer in pricing.offers(term="on-demand")})


def test_the_cheapest_h100_by_hand() -> None:
    """Nebius asks $2.95 for one and $23.60 for eight: one GPU is the smaller of two equal prices, four fit twice in eight."""
    one = pricing.cheapest("H100-SXM", 1)
    four = pricing.cheapest("H100-SXM", 4)
    assert one is not None
    assert four is not None
    assert (one[0].instance, one[0].usd_per_h, one[1]) == ("gpu-h100-sxm_1gpu", 2.95, 1)
    assert (four[0].instance, four[0].usd_per_h, four[1]) == ("gpu-h100-sxm_8gpu", 23.6, 2)


def test_devices_that_no_replica_fits_on_are_paid_for() -> None:
    """Three of eight H100 make a replica: two replicas an instance, two GPUs stranded; five replicas take three instances."""
    found = pricing.choose("H100-SXM", 3, 5)
    assert found is not None
    offer, instances = found
    assert (offer.instance, instances) == ("gpu-h100-sxm_8gpu", 3)
    assert pricing.instances_for(offer, 3, 5) == 3


def test_one_replica_takes_the_small_instance_and_nine_the_cheaper_total() -> None:
    """L40S: $1.5484 for one and $10.49264 for four (2.62 each): always ones."""
    assert [(c[0].instance, c[1]) for n in (1, 9) if (c := pricing.choose("L40S", 1, n))] == [
        ("gpu-l40s-a_1gpu-8vcpu", 1),
        ("gpu-l40s-a_1gpu-8vcpu", 9),
    ]


def test_a_big_instance_wins_only_when_it_is_filled() -> None:
    """Lambda's B200: $6.99 for one, Nebius' eight for $44.00: ones up to six, eights from seven."""
    fleet = {n: c for n in (1, 6, 7, 8) if (c := pricing.choose("B200-SXM", 1, n))}
    assert [fleet[n][0].devices for n in (1, 6, 7, 8)] == [1, 1, 8, 8]


def test_spot_is_its_own_term() -> None:
    spot = pricing.cheapest("L4", 1, "spot")
    assert spot is not None
    assert (spot[0].instance, spot[0].usd_per_h, spot[0].term) == ("g6.xlarge", 0.365, "spot")
    assert pricing.cheapest("A100-80GB-PCIe", 1, "spot") is None


def test_a_capacity_block_is_reserved_and_old() -> None:
    reserved = pricing.offers(term="reserved")
    assert len(reserved) == 3
    assert all(o.provenance is Provenance.ASSUMED and o.date == "2024-Q4" for o in reserved)


def test_the_cpu_costs_half_of_a_four_vcpu_instance_to_the_cent() -> None:
    whole = next(float(r["on_demand_usd_h"]) for r in ROWS if r["instance"] == "cpu-d3_4vcpu-16gb")
    found = pricing.cheapest("cpu-2core", 1)
    assert found is not None
    assert found[0].usd_per_h == whole / 2 == 0.0496
    assert round(pricing.usd_per_month(found[0].usd_per_h), 2) == 36.21
    assert found[0].provenance is Provenance.ASSUMED
    assert "half of nebius cpu-d3_4vcpu-16gb" in found[0].source


@pytest.mark.parametrize("device", ["H20", "T4", "MI300X", "RTX-4090", "H100-PCIe", "no such card"])
def test_a_device_nobody_prices_is_unpriced(device: str) -> None:
    assert pricing.cheapest(device, 1) is None
    assert pricing.choose(device, 1, 3) is None
    assert pricing.offers(device) == ()


def test_a_replica_larger_than_any_instance_has_no_price() -> None:
    assert pricing.cheapest("A100-80GB-SXM", 16) is None
    assert pricing.choose("A100-80GB-SXM", 9, 1) is None


def test_every_offer_is_dated_sourced_and_of_a_known_device() -> None:
    for offer in pricing.offers():
        assert offer.source
        assert offer.date
        assert offer.usd_per_h > 0
        assert hardware.find(offer.device).id == offer.device
        assert offer.provenance in (Provenance.MEASURED, Provenance.ASSUMED)


def test_cpu_instances_are_nobodys_gpu() -> None:
    assert not [o.instance for o in pricing.offers() if o.instance in ("m7g.xlarge", "r5a.2xlarge", "cpu-d3_4vcpu-16gb")]


def test_a_month_has_730_hours() -> None:
    assert pricing.usd_per_month(1.0) == 730


def test_a_million_tokens_by_hand() -> None:
    """$3.60 an hour at 1,000 tokens a second: 3.6 M tokens an hour, $1 a million."""
    assert pricing.usd_per_million_tokens(3.6, 1000) == pytest.approx(1.0)
    for nothing in (0, -1, math.nan):
        with pytest.raises(BadInput, match="without throughput a token has no price"):
            pricing.usd_per_million_tokens(3.6, nothing)


@pytest.mark.parametrize("term", ["ondemand", "", "on demand"])
def test_an_unknown_term_is_refused(term: str) -> None:
    with pytest.raises(BadInput, match="unknown term"):
        pricing.offers(term=term)


@pytest.mark.parametrize(("devices", "replicas"), [(0, 1), (1, 0), (-1, 2)])
def test_nothing_cannot_be_bought(devices: int, replicas: int) -> None:
    with pytest.raises(BadInput, match="must be at least 1"):
        pricing.choose("L4", devices, replicas)


def test_a_replica_must_fit_its_instance() -> None:
    offer = next(o for o in pricing.offers("L4") if o.devices == 1)
    with pytest.raises(BadInput, match=r"has 1 device\(s\); a replica needs 2"):
        pricing.instances_for(offer, 2, 1)


@given(st.sampled_from(PRICED), st.sampled_from([1, 2, 4, 8]), st.integers(1, 40))
def test_no_other_offer_holds_the_fleet_for_less(device: str, devices: int, replicas: int) -> None:
    """The choice against every offer, bought one instance at a time."""

    def total(offer: Offer) -> float:
        held, bought = 0, 0
        while held < replicas:
            held, bought = held + offer.devices // devices, bought + 1
        return bought * offer.usd_per_h

    fitting = [o for o in pricing.offers(device, "on-demand") if o.devices >= devices]
    found = pricing.choose(device, devices, replicas)
    assert (found is None) == (not fitting)
    if found is not None:
        assert found[0].usd_per_h * found[1] == pytest.approx(min(map(total, fitting)))
        assert found[0].term == "on-demand"


@given(st.sampled_from(PRICED), st.sampled_from([1, 2, 4, 8]), st.integers(1, 40))
def test_one_more_replica_is_never_cheaper(device: str, devices: int, replicas: int) -> None:
    costs = [c[0].usd_per_h * c[1] for n in (replicas, replicas + 1) if (c := pricing.choose(device, devices, n))]
    assert costs == sorted(costs)


def test_api_prices_are_read() -> None:
    prices = {p.model: p for p in pricing.api_prices()}
    assert (prices["gpt-4o-mini"].input_usd_per_million, prices["gpt-4o-mini"].output_usd_per_million) == (0.15, 0.6)
    assert len(prices) == 40
    assert all(p.source and p.date for p in prices.values())
