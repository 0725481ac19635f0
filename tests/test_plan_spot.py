"""An availability kept by spot and on-demand replicas: enumerated, simulated, and priced to the cent."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from mlsys_bench import record, slo, workload
from mlsys_bench.errors import BadInput
from mlsys_bench.plan import plan, spot
from mlsys_bench.plan.availability import Case
from mlsys_bench.plan.given import measured
from mlsys_bench.plan.reliability import Reliability, Spot, Zones
from mlsys_bench.plan.request import Request
from mlsys_bench.plan.spot import Rent
from mlsys_bench.pricing import Market
from mlsys_bench.report import content
from mlsys_bench.types import Offer, Plan, Provenance
from tests.sample_records import machine

ALWAYS = Zones(count=2, mtbf=measured(1.0, "t"), mttr=measured(0.0, "t"))


def case(needed: int, objective: float, zones: Zones, mtbf_s: float = 900.0, repair_s: float = 100.0) -> Case:
    rel = Reliability(
        gpu_mtbf=measured(mtbf_s, "t"), process_mtbf=measured(1e18, "t"), repair=measured(repair_s, "t"), restart=measured(1.0, "t")
    )
    return Case(needs=((needed, 1.0),), objective=objective, gpus=1, reliability=rel, zones=zones, crews=None)


def given(life_s: float, refill_s: float, notice_s: float = 0.0) -> Spot:
    return Spot(life=measured(life_s, "t"), refill=measured(refill_s, "t"), notice=measured(notice_s, "t"))


def offer(term: str, usd: float, region: str = "here") -> Offer:
    return Offer(
        provider="p", instance=f"one-{term}", device="L4", devices=1, region=region, term=term, usd_per_h=usd, source="t",  # type: ignore[arg-type]
        date="2026-11-22", provenance=Provenance.ASSUMED,
    )  # fmt: skip


def test_notice_shortens_the_time_a_pool_is_away() -> None:
    assert given(900, 100).up == pytest.approx(0.9)
    assert given(900, 100, 40).up == pytest.approx(900 / 960)
    assert given(900, 100, 200).up == 1.0


def test_two_pools_by_hand() -> None:
    """Replicas that never fail: 2 needed, 1 on demand in each of two zones (1, 0) and one spot in each: held unless both pools are away.

    On demand 1, spot (1, 1), a pool there 9 times in 10: enough are up with probability 1 - 0.1^2 = 0.99; without spot never.
    """
    law = case(2, 0.99, ALWAYS, mtbf_s=1e18)
    assert law.held(1, (1, 1), 0.9) == pytest.approx(0.99)
    assert law.held(1) == 0.0
    assert list(spot.pairs(law, 2, given(900, 100))) == [(2, 0), (1, 2), (0, 4)]


def test_the_share_held_is_that_of_every_state_added_up() -> None:
    """Three zones that may be away, three pools, replicas that fail: 2^3 x 2^3 states, binomial within."""
    zones = Zones(count=3, mtbf=measured(95.0, "t"), mttr=measured(5.0, "t"))
    steady, rented, needed, up = (2, 1, 1), (1, 1, 2), 4, 0.8
    found = case(needed, 0.5, zones).held(4, rented, up)
    total = 0.0
    for there, pools in itertools.product(itertools.product((0, 1), repeat=3), repeat=2):
        p = float(np.prod([0.95 if z else 0.05 for z in there]) * np.prod([up if x else 1 - up for x in pools]))
        n = sum(z * (s + x * r) for z, x, s, r in zip(there, pools, steady, rented, strict=True))
        total += p * sum(
            float(np.prod([0.9 if x else 0.1 for x in state])) for state in itertools.product((0, 1), repeat=n) if sum(state) >= needed
        )
    assert found == pytest.approx(total, rel=1e-12)


def test_reclaims_simulated_one_by_one_agree() -> None:
    """Two pools that live 6 h and are away half an hour, exponential and constant; 3 on demand, 2 + 2 spot, 5 needed."""
    rng, hours = np.random.default_rng(3), 400_000.0
    grid = np.arange(0.0, hours, 0.05)
    pools = []
    for _ in range(2):
        ends = np.cumsum(np.stack([rng.exponential(6.0, 80_000), np.full(80_000, 0.5)], axis=1).ravel())
        pools.append(np.searchsorted(ends, grid, side="right") % 2 == 0)
    up = 3 + 2 * pools[0] + 2 * pools[1]
    found = case(5, 0.9, ALWAYS, mtbf_s=1e18).held(3, (2, 2), given(6 * 3600, 1800).up)
    seen = float((up >= 5).mean())
    assert abs((1 - found) - (1 - seen)) < 4 * ((1 - found) * 0.5 / hours) ** 0.5
    assert found == pytest.approx(1 - (0.5 / 6.5) ** 2)


def test_the_cheapest_split_is_that_of_all_splits_to_the_cent() -> None:
    """On demand $1.00, spot $0.31: every split of up to 12 + 24 replicas is tried by hand."""
    market = Market(offers=(offer("on-demand", 1.0), offer("spot", 0.31)))
    rent = Rent(objective=0.9995, zones=Zones(count=3), spot=Spot(), market=market)
    found = rent.split("L4", 1, 1, 16e9, 8)
    assert found is not None
    law = spot._case(0.9995, Zones(count=3), 1, 16e9, 8)
    prices = [
        round(d * 1.0 + s * 0.31, 2)
        for d, s in itertools.product(range(13), range(25))
        if law.held(d, spot.pools(s, 3), Spot().up) >= 0.9995
    ]
    assert round(found.fleet.usd_per_h, 2) == min(prices)
    assert found.fleet.usd_per_h == pytest.approx(found.steady * 1.0 + found.spot * 0.31)
    assert found.fleet.replicas == found.steady + found.spot
    assert found.firm_usd_per_h == pytest.approx(found.firm * 1.0)
    assert rent.secured(1, 16e9, found).availability >= 0.9995


def test_spot_that_costs_as_much_is_not_bought() -> None:
    market = Market(offers=(offer("on-demand", 1.0), offer("spot", 1.0)))
    found = Rent(objective=0.999, zones=Zones(count=3), spot=Spot(), market=market).split("L4", 1, 1, 16e9, 5)
    assert found is not None
    assert (found.spot, found.steady) == (0, found.firm)


def test_both_kinds_are_rented_in_one_region() -> None:
    market = Market(offers=(offer("on-demand", 1.0), offer("spot", 0.2, "there")))
    rent = Rent(objective=0.9995, zones=Zones(count=3), spot=given(6 * 3600, 600), market=market)
    found = rent.split("L4", 1, 1, 16e9, 5)
    assert found is not None
    assert {lot.offer.region for lot in found.fleet.lots} in ({"here"}, {"there"})


def test_a_plan_on_spot_keeps_its_availability_for_less(tmp_path: Path) -> None:
    asked = Request(
        model="llama-3-8b", workload=workload.synthetic(400.0, prompt="lognormal:512:1:8192", output="lognormal:128:1:1024"),
        slo=slo.parse("ttft_p95<500ms,tpot_p95<50ms,availability>99.95%"), gpus=("H100",), precisions=("fp8",), max_batch=256, zones=3,
        term="spot", spot=spot.parse("rate=0.1/h,notice=2min,refill=12min"),
    )  # fmt: skip
    made = plan(asked)
    firm = plan(dataclasses.replace(asked, term="on-demand", spot=None))
    found = made.secured
    assert found is not None
    assert firm.secured is not None
    assert found.needed == firm.secured.needed
    assert found.replicas == made.replicas == sum(found.zones) + sum(found.spot)
    assert found.spot
    assert found.availability >= 0.9995 > found.floor_availability
    usd = {o.term: o.usd_per_h for o in made.prices}
    assert made.usd_per_hour == pytest.approx(sum(found.zones) * usd.get("on-demand", 0.0) + sum(found.spot) * usd["spot"], abs=0.005)
    assert (made.usd_per_hour or 0.0) < (firm.usd_per_hour or 0.0)
    assert any(f"on demand alone {firm.replicas} replicas would do" in note for note in made.notes)
    assert any("reclaimed together every 10.0 h" in line for line in made.assumptions)
    kept = record.read(record.write(tmp_path / "plan.json", made, machine()), Plan)
    assert kept == made
    facts = [fact for section in content.describe(kept) for fact in section.facts if fact.label == "Spot"]
    assert f"{sum(found.spot)} of {found.replicas} replicas" in facts[0].text


@pytest.mark.parametrize("text", ["life=6h,rate=0.2/h", "lives=6h", "rate=0/h", "life=0s", "notice=2"])
def test_what_is_no_way_to_go_and_come_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"--spot|live no time"):
        spot.parse(text)
