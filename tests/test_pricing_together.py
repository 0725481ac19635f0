"""Instances shared by replicas of several sizes, and machines shared by those without a GPU: against every way to buy."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.pricing import Market, Quota, cpu_offers
from mlsys_bench.pricing.catalogue import CpuOffer
from mlsys_bench.pricing.machines import Pods, count_of, house, share_usd_per_h
from mlsys_bench.pricing.together import pack_together
from mlsys_bench.types import Offer, Provenance


def offer(devices: int, usd: float) -> Offer:
    return Offer(
        provider="p", instance=f"x{devices}", device="G", devices=devices, region="r", term="on-demand", usd_per_h=usd, source="t",
        date="2026-11-01", provenance=Provenance.MEASURED,
    )  # fmt: skip


def fits(instances: list[int], sizes: dict[int, int]) -> bool:
    """Say whether first fit, largest first, finds room: exact where each size divides the next."""
    room = sorted(instances)
    for size in sorted(sizes, reverse=True):
        for _ in range(sizes[size]):
            at = next((k for k, left in enumerate(room) if left >= size), None)
            if at is None:
                return False
            room[at] -= size
    return True


@settings(max_examples=30, deadline=None)
@example(sizes={1: 5, 2: 3, 4: 2}, prices=(101, 300, 601))
@given(
    sizes=st.fixed_dictionaries({1: st.integers(0, 5), 2: st.integers(0, 3), 4: st.integers(0, 2)}).filter(lambda s: any(s.values())),
    prices=st.tuples(st.integers(80, 120), st.integers(300, 420), st.integers(600, 800)),
)
def test_shared_instances_cost_what_the_cheapest_of_all_costs(sizes: dict[int, int], prices: tuple[int, ...]) -> None:
    kinds = [offer(1, prices[0] / 100), offer(4, prices[1] / 100), offer(8, prices[2] / 100)]
    found = pack_together("G", [sizes], market=Market(offers=tuple(kinds)))
    assert found is not None
    ways = itertools.product(range(6), range(6), range(4))  # up to 19 devices; only the size of 1 fits the smallest
    usd = min(
        sum(n * k.usd_per_h for n, k in zip(way, kinds, strict=True))
        for way in ways
        if fits([k.devices for n, k in zip(way, kinds, strict=True) for _ in range(n)], sizes)
    )
    assert found.usd_per_h == pytest.approx(usd, abs=1e-6)
    assert found.stranded == found.devices - sum(size * n for size, n in sizes.items())


def test_a_quota_counts_all_stages_of_a_device() -> None:
    """Three of one device and one of four fit 7 only together: a quota of 6 refuses what each stage alone would be granted."""
    market = Market(offers=(offer(1, 1.0), offer(4, 4.0)), quotas=(Quota(devices=6, device="G"),))
    assert pack_together("G", [{1: 3}], market=market) is not None
    assert pack_together("G", [{4: 1}], market=market) is not None
    with pytest.raises(Infeasible, match="6 G"):
        pack_together("G", [{1: 3, 4: 1}], market=market)
    with pytest.raises(BadInput, match="say nothing of zones"):
        pack_together("G", [{1: 1}, {1: 1}], market=market)
    assert pack_together("other", [{1: 1}], market=market) is None


def test_no_instance_serves_two_zones() -> None:
    """Two zones of half an instance each are two instances."""
    market = Market(offers=(offer(8, 8.0),))
    apart, together = pack_together("G", [{4: 1}, {4: 1}], market=market), pack_together("G", [{4: 2}], market=market)
    assert apart is not None
    assert together is not None
    assert (apart.instances, together.instances) == (2, 1)


def machine(name: str, vcpus: int, gib: float, usd: float) -> CpuOffer:
    return CpuOffer(
        provider="p", instance=name, region="r", vcpus=vcpus, memory_bytes=gib * 2**30, usd_per_h=usd, source="t", date="2026-11-01"
    )


def test_memory_fills_a_machine_as_vcpus_do() -> None:
    """4 vCPU with 16 GiB: four replicas of 1 vCPU fit, of 1 vCPU and 8 GiB only two; beside them what is left over is used."""
    small = machine("s", 4, 16, 0.1)
    assert count_of([Pods(count=4, vcpus=1)], small) == 1
    assert count_of([Pods(count=4, vcpus=1, memory_bytes=8 * 2**30)], small) == 2
    assert count_of([Pods(count=2, vcpus=1, memory_bytes=8 * 2**30), Pods(count=2, vcpus=1)], small) == 1
    assert share_usd_per_h(Pods(count=1, vcpus=1, memory_bytes=8 * 2**30), [small]) == pytest.approx(0.05)


def test_what_needs_much_memory_goes_to_machines_that_have_it() -> None:
    small, large = machine("s", 4, 16, 0.1), machine("l", 8, 64, 0.45)
    found = house([Pods(count=8, vcpus=1), Pods(count=1, vcpus=1, memory_bytes=60 * 2**30)], [small, large])
    assert found is not None
    assert {m.offer.instance: m.count for m in found} == {"s": 2, "l": 1}
    assert house([Pods(count=1, vcpus=1, memory_bytes=2**40)], [small, large]) is None
    assert house([], [small]) == ()


def one_by_one(pods: list[Pods], offer: CpuOffer) -> int:
    """First fit, largest first, a replica and a machine at a time."""
    room: list[list[float]] = []
    for pod in sorted(pods, key=lambda p: -p.share(offer)):
        for _ in range(pod.count):
            at = next((r for r in room if r[0] >= pod.vcpus - 1e-9 and r[1] >= pod.memory_bytes), None)
            if at is None:
                room.append(at := [float(offer.vcpus), offer.memory_bytes])
            at[0] -= pod.vcpus
            at[1] -= pod.memory_bytes
    return len(room)


@settings(max_examples=60, deadline=None)
@given(
    pods=st.lists(
        st.builds(
            Pods,
            count=st.integers(1, 40),
            vcpus=st.sampled_from([0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0]),
            memory_bytes=st.sampled_from([0.0, 2.0**28, 2.0**30, 5 * 2.0**30, 9 * 2.0**30]),
        ),
        max_size=5,
    )
)
def test_machines_filled_many_at_a_time_are_those_filled_one_by_one(pods: list[Pods]) -> None:
    offer = next(o for o in cpu_offers() if o.vcpus == 8)
    assert count_of(pods, offer) == one_by_one(pods, offer)


def test_a_hundred_million_replicas_are_housed_at_once() -> None:
    """Four of 2 vCPUs in a machine of 8; the small ones fill what the large ones leave."""
    offer = next(o for o in cpu_offers() if o.vcpus == 8)
    assert count_of([Pods(count=10**8, vcpus=2)], offer) == 25 * 10**6
    assert count_of([Pods(count=10**8, vcpus=5), Pods(count=3 * 10**8, vcpus=1)], offer) == 10**8
    assert count_of([Pods(count=10**8, vcpus=5), Pods(count=3 * 10**8 + 1, vcpus=1)], offer) == 10**8 + 1


def test_published_machines_are_sold_on_their_own_terms() -> None:
    assert {o.term for o in cpu_offers()} == {"on-demand"}
    assert cpu_offers("reserved") == ()
    spot = cpu_offers("spot")
    assert spot
    assert all(o.usd_per_h < next(d.usd_per_h for d in cpu_offers() if d.instance == o.instance) for o in spot)
