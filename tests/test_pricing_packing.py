"""Whole instances for a fleet: the cheapest mix, against trying every mix there is."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import pricing
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.pricing import Market, Quota, Reservation, packing
from mlsys_bench.types import Offer, Provenance


def offer(devices: int, usd_per_h: float, term: str = "on-demand", region: str = "r", provider: str = "p") -> Offer:
    return Offer(
        provider=provider,
        instance=f"{devices}x",
        device="L4",
        devices=devices,
        region=region,
        term=term,  # type: ignore[arg-type]
        usd_per_h=usd_per_h,
        source="test",
        date="2026-11-01",
        provenance=Provenance.MEASURED,
    )


def brute_force(market: Market, size: int, replicas: int, within: str = "region") -> float | None:
    """Return the least new dollars over every count of every offer, committed ones free."""
    best = None
    places = {"region": lambda o: (o.provider, o.region), "provider": lambda o: o.provider, "anywhere": lambda o: 0}[within]
    for place in {places(o) for o in market.offers}:
        group = [o for o in market.offers if places(o) == place and o.devices >= size]
        tops = [replicas if (m := market.most(o)) is None else min(m, replicas) for o in group]
        for counts in itertools.product(*(range(top + 1) for top in tops)):
            held = sum(n * (o.devices // size) for n, o in zip(counts, group, strict=True))
            quotas = all(sum(n * o.devices for n, o in zip(counts, group, strict=True) if q.covers(o)) <= q.devices for q in market.quotas)
            if held < replicas or not quotas:
                continue
            usd = sum(max(n - market.committed(o), 0) * o.usd_per_h for n, o in zip(counts, group, strict=True))
            best = usd if best is None else min(best, usd)
    return best


prices = st.integers(50, 900).map(lambda cents: cents / 100)
shelf = st.lists(
    st.tuples(st.sampled_from([1, 2, 4, 8]), prices, st.sampled_from(["r", "s"])), min_size=1, max_size=4, unique_by=lambda t: t
)


@given(shelf, st.sampled_from([1, 2, 3, 4]), st.integers(1, 6))
def test_no_mix_of_sizes_is_cheaper(items: list[tuple[int, float, str]], size: int, replicas: int) -> None:
    market = Market(offers=tuple(offer(n, usd * n**0.8, region=region) for n, usd, region in items))
    found = pricing.pack("L4", size, replicas, market=market)
    least = brute_force(market, size, replicas)
    assert (found is None) == (least is None)
    if found is not None:
        assert found.usd_per_h == pytest.approx(least, abs=1e-5)
        assert sum(lot.instances * (lot.offer.devices // size) for lot in found.lots) >= replicas
        assert len({(lot.offer.provider, lot.offer.region) for lot in found.lots}) == 1


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.floats(0.1, 30)), min_size=1, max_size=5),
    size=st.integers(1, 4),
    replicas=st.integers(600, 900),
)
def test_what_is_bought_in_bulk_costs_as_little_as_one_by_one(items: list[tuple[int, float]], size: int, replicas: int) -> None:
    market = Market(offers=tuple(offer(n, usd) for n, usd in dict(items).items()))
    with pytest.MonkeyPatch.context() as patch:
        one_by_one = pricing.pack("L4", size, replicas, market=market)
        patch.setattr(packing, "_IN_FULL", 16 * 16)
        bulk = pricing.pack("L4", size, replicas, market=market)
    if one_by_one is None:
        assert bulk is None
        return
    assert bulk is not None
    assert bulk.usd_per_h == pytest.approx(one_by_one.usd_per_h, rel=1e-9)


def test_billions_of_replicas_have_a_price() -> None:
    """An eight costs less a device than a one, and the odd one stands alone."""
    fleet = pricing.pack("L4", 1, 8 * 10**9 + 1, market=Market(offers=(offer(8, 7.0), offer(1, 1.0))))
    assert fleet is not None
    assert fleet.usd_per_h == pytest.approx(7e9 + 1)


@settings(max_examples=40)
@given(shelf, st.sampled_from([1, 2]), st.integers(1, 6), st.integers(0, 24), st.integers(0, 3), st.sampled_from(["region", "anywhere"]))
def test_nor_within_quotas_and_commitments(
    items: list[tuple[int, float, str]], size: int, replicas: int, quota: int, committed: int, within: str
) -> None:
    listed = tuple(offer(n, usd * n, region=region) for n, usd, region in items)
    kept = offer(4, 3.0, term="reserved")
    market = Market(
        offers=(*listed, kept),
        reservations={kept: Reservation(term_months=12, committed=committed, at_most=committed)},
        quotas=(Quota(devices=quota, device="L4", region="r"),),
    )
    least = brute_force(market, size, replicas, within)
    if least is None:
        if any(o.devices >= size and (o.term == "on-demand" or committed) for o in market.offers):
            with pytest.raises(Infeasible, match="more than may be rented"):
                pricing.pack("L4", size, replicas, market=market, within=within)
        return
    found = pricing.pack("L4", size, replicas, market=market, within=within)
    assert found is not None
    assert found.new_usd_per_h == pytest.approx(least, abs=1e-4)
    assert sum(lot.devices for lot in found.lots if lot.offer.region == "r") <= quota


def test_nine_b200_are_an_eight_and_a_one_where_one_provider_sells_both() -> None:
    """Lambda: $53.52 for eight and $6.99 for one: 53.52 + 6.99 = $60.51; two eights of Nebius are $88.00, nine ones $62.91."""
    found = pricing.pack("B200-SXM", 1, 9)
    assert found is not None
    assert (str(found), found.usd_per_h) == ("1 x lambda gpu_8x_b200_sxm6 + 1 x lambda gpu_1x_b200_sxm6", 60.51)
    assert (found.devices, found.stranded, found.instances) == (9, 0, 2)
    one_kind = pricing.choose("B200-SXM", 1, 9)
    assert one_kind is not None
    assert one_kind[0].usd_per_h * one_kind[1] == pytest.approx(62.91)


def test_devices_that_no_replica_uses_are_shown() -> None:
    """Three replicas of three H100: two in one eight, one in another: $47.20 and seven of sixteen devices idle."""
    found = pricing.pack("H100-SXM", 3, 3)
    assert found is not None
    assert (str(found), found.usd_per_h, found.stranded) == ("2 x nebius gpu-h100-sxm_8gpu", 47.2, 7)


def test_what_is_committed_is_used_first_and_what_lies_idle_is_paid_for() -> None:
    """Two committed eights at $20.00: three replicas of four take both, half of one idle; one replica leaves one unused."""
    kept = offer(8, 20.0, term="reserved")
    market = Market(offers=(offer(4, 8.0), kept), reservations={kept: Reservation(term_months=12, committed=2, at_most=2)})
    three, one, five = (pricing.pack("L4", 4, n, market=market) for n in (3, 1, 5))
    assert three is not None
    assert one is not None
    assert five is not None
    assert (three.usd_per_h, three.new_usd_per_h, three.unused_usd_per_h, three.stranded) == (40.0, 0.0, 0.0, 4)
    assert (one.usd_per_h, one.new_usd_per_h, one.unused_usd_per_h) == (20.0, 0.0, 20.0)
    assert (five.usd_per_h, five.new_usd_per_h, str(five)) == (48.0, 8.0, "2 x p 8x + 1 x p 4x")


def test_a_quota_that_is_too_small_is_named() -> None:
    market = Market(offers=(offer(8, 20.0),), quotas=(Quota(devices=16, device="L4", provider="p", region="r"),))
    with pytest.raises(Infeasible, match=r"3 replicas of 8 L4 are more than may be rented \(16 L4 at p in r\); raise the quota to 24"):
        pricing.pack("L4", 8, 3, market=market)
    assert pricing.choose("L4", 8, 3, market=market) is None
    held = pricing.pack("L4", 8, 2, market=market)
    assert held is not None
    assert held.usd_per_h == 40.0


@pytest.mark.parametrize(
    ("replicas", "quota", "said"),
    [
        (4, 7, r"4 replicas of 1 L4 .*\(7 L4\); raise the quota to 8 or more devices$"),
        (13, 15, r"13 replicas of 1 L4 .*\(15 L4\); raise the quota to 16 or more devices$"),
    ],
)
def test_a_quota_is_raised_by_whole_instances(replicas: int, quota: int, said: str) -> None:
    """Instances hold eight: four replicas take one of them, thirteen take two.  There is one region, so nothing is said of others."""
    market = Market(offers=(offer(8, 20.0),), quotas=(Quota(devices=quota, device="L4"),))
    with pytest.raises(Infeasible, match=said):
        pricing.pack("L4", 1, replicas, market=market)
    assert (
        pricing.pack("L4", 1, replicas, market=dataclasses.replace(market, quotas=(Quota(devices=-(-replicas // 8) * 8, device="L4"),)))
        is not None
    )


def test_the_bound_that_binds_is_named() -> None:
    """Of two instances of eight 22 replicas need a third, within the quota of 24; with a quota of 16 as well both are in the way."""
    kept = offer(8, 20.0, term="reserved")
    market = Market(
        offers=(kept,), reservations={kept: Reservation(term_months=12, committed=1, at_most=2)}, quotas=(Quota(devices=24, device="L4"),)
    )
    with pytest.raises(Infeasible, match=r"\(at most 2 p 8x reserved\); raise at_most of 8x to 3 or more$"):
        pricing.pack("L4", 1, 22, "reserved", market)
    both = dataclasses.replace(market, quotas=(Quota(devices=16, device="L4"),))
    with pytest.raises(Infeasible, match=r"raise the quota to 24 or more devices and at_most of 8x to 3 or more$"):
        pricing.pack("L4", 1, 22, "reserved", both)
    with pytest.raises(Infeasible, match="more than is committed, and none is sold on-demand; name another term"):
        pricing.pack("L4", 1, 22, "on-demand", market)


def test_regions_are_spoken_of_where_another_one_would_help() -> None:
    here, there = offer(8, 20.0), offer(8, 22.0, region="s")
    quotas = tuple(Quota(devices=8, device="L4", region=r) for r in ("r", "s"))
    said = r"raise the quota of 8 L4 in r to 16 or more devices, or let the fleet spread over regions$"
    with pytest.raises(Infeasible, match=said):
        pricing.pack("L4", 8, 2, market=Market(offers=(here, there), quotas=quotas))
    with pytest.raises(Infeasible, match=r"to 24 or more devices$"):
        pricing.pack("L4", 8, 3, market=Market(offers=(here, there), quotas=quotas))


def test_a_fleet_may_spread_when_asked_to() -> None:
    """Eight devices here, eight there: two replicas of eight only anywhere."""
    market = Market(
        offers=(offer(8, 20.0), offer(8, 22.0, region="s")), quotas=tuple(Quota(devices=8, device="L4", region=r) for r in ("r", "s"))
    )
    with pytest.raises(Infeasible):
        pricing.pack("L4", 8, 2, market=market)
    spread = pricing.pack("L4", 8, 2, market=market, within="provider")
    assert spread is not None
    assert spread.usd_per_h == 42.0


def test_nothing_has_no_price() -> None:
    assert pricing.pack("MI300X", 1, 1) is None
    assert pricing.pack("L4", 2, 1) is None
    with pytest.raises(BadInput, match="both must be at least 1"):
        pricing.pack("L4", 0, 1)
    with pytest.raises(BadInput, match="a fleet spreads within a region or provider or anywhere"):
        pricing.pack("L4", 1, 1, within="planet")


@given(st.sampled_from(sorted({o.device for o in pricing.offers(term="on-demand")})), st.sampled_from([1, 2, 4, 8]), st.integers(1, 60))
def test_a_mix_never_costs_more_than_one_kind(device: str, size: int, replicas: int) -> None:
    mixed, one = pricing.pack(device, size, replicas), pricing.choose(device, size, replicas)
    assert (mixed is None) == (one is None)
    if mixed is not None and one is not None:
        assert mixed.usd_per_h <= one[0].usd_per_h * one[1] + 1e-6
        assert mixed.stranded >= 0
        assert math.isclose(mixed.usd_per_h, sum(lot.usd_per_h for lot in mixed.lots), abs_tol=1e-6)


def test_offers_are_values() -> None:
    """A market finds a reservation by its offer, so equal offers are one."""
    one = offer(8, 20.0, term="reserved")
    market = Market(offers=(one,), reservations={one: Reservation(term_months=12, committed=3)})
    assert market.committed(dataclasses.replace(one)) == 3
