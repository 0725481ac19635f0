"""Replicas to spare: hand computations, the repair chain against its closed forms and against a simulation of failures."""

from __future__ import annotations

import heapq
import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import comb
from scipy.stats import chi2

from mlsys_bench import stats
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.plan import availability, cold_start
from mlsys_bench.plan.availability import secured, standing, up_law, zone_law
from mlsys_bench.plan.given import Given, assumed, measured
from mlsys_bench.plan.reliability import DAY_S, GPU_MTBF, Reliability, Spot, Zones, replaced
from mlsys_bench.pricing import spread
from mlsys_bench.types import Provenance


def plain(mtbf_s: float, repair_s: float) -> Reliability:
    """One GPU whose failures are all there is: the process as good as never fails."""
    return Reliability(
        gpu_mtbf=measured(mtbf_s, "test"),
        process_mtbf=measured(1e18, "test"),
        repair=measured(repair_s, "test"),
        restart=measured(1.0, "test"),
    )


def one_zone() -> Zones:
    return Zones(mtbf=measured(1.0, "test"), mttr=measured(0.0, "a zone that never fails"))


# ---------------------------------------------------------------- by hand


def test_two_of_three_replicas_by_hand() -> None:
    """A = 0.9: at least two of three are up with probability 3 x 0.81 x 0.1 + 0.729 = 0.972; two alone only 0.81."""
    found = secured(0.95, 20, lambda rate: math.ceil(rate / 10), gpus=1, reliability=plain(90, 10), zones=one_zone())
    assert (found.needed, found.replicas, found.spare, found.binds) == (2, 3, 1, "objective")
    assert found.availability == pytest.approx(0.972, abs=1e-12)
    assert found.downtime_min_per_year == pytest.approx(0.028 * 525_600)
    assert found.replica_availability == pytest.approx(0.9)
    assert found.provenance is Provenance.MEASURED


def test_failure_rates_add_over_the_gpus_of_a_replica_and_its_process() -> None:
    """8 GPUs of 1,000 h and a process of 500 h fail every 1 / (8/1000 + 1/500) = 100 h; 80 % of it hardware, away 5 h, else 1 h: 4.2 h."""
    h = 3600.0
    rel = Reliability(
        gpu_mtbf=measured(1000 * h, "t"), process_mtbf=measured(500 * h, "t"), repair=measured(5 * h, "t"), restart=measured(1 * h, "t")
    )
    assert rel.mtbf_s(8) == pytest.approx(100 * h)
    assert rel.repair_s(8) == pytest.approx(4.2 * h)


def test_the_default_gpu_mtbf_is_the_published_count_with_its_exact_poisson_interval() -> None:
    gpu_s = 16_384 * 54 * DAY_S
    low, high = chi2.ppf(0.05, 2 * 419) / 2, chi2.ppf(0.95, 2 * 420) / 2
    assert pytest.approx(gpu_s / 419) == GPU_MTBF.value
    assert GPU_MTBF.low == pytest.approx(gpu_s / high, rel=1e-3)
    assert GPU_MTBF.high == pytest.approx(gpu_s / low, rel=1e-3)
    assert GPU_MTBF.provenance is Provenance.ASSUMED
    assert "419" in GPU_MTBF.source


def test_surviving_a_zone_takes_what_the_largest_zone_holds() -> None:
    """10 needed over 3 zones: 15 = 5 + 5 + 5, for 14 = 5 + 5 + 4 leaves 9; over 2 zones 20."""
    for zones, wanted in ((3, (5, 5, 5)), (2, (10, 10)), (6, (2, 2, 2, 2, 2, 2))):
        found = secured(0.9, 100, lambda r: math.ceil(r / 10), gpus=1, reliability=plain(1e9, 1), zones=Zones(count=zones, survive=True))
        assert found.zones == wanted
        assert found.binds == "zone"
        assert found.replicas - max(found.zones) >= 10
        assert sum(wanted) - 1 - max(spread(sum(wanted) - 1, zones)) < 10


def test_two_zones_by_hand() -> None:
    """One replica in each of two zones up 0.99, replicas up 0.9: at least one with 1 - (1 - 0.891)^2."""
    area = Zones(count=2, mtbf=measured(99, "t"), mttr=measured(1, "t"))
    found = secured(0.98, 1, lambda _: 1, gpus=1, reliability=plain(90, 10), zones=area)
    assert found.zones == (1, 1)
    assert found.availability == pytest.approx(1 - (1 - 0.99 * 0.9) ** 2, abs=1e-12)


def test_more_than_the_zones_can_give_is_infeasible() -> None:
    with pytest.raises(Infeasible, match="more zones"):
        secured(0.9999, 1, lambda _: 1, gpus=1, reliability=plain(1e9, 1), zones=Zones())


def test_a_course_needs_less_at_night() -> None:
    """Half the day 1 replica of 2 suffices: 0.5 x (1 - 0.1^2) + 0.5 x 0.9^2 = 0.9."""
    found = secured(0.9, 20, lambda r: math.ceil(r / 10), gpus=1, reliability=plain(90, 10), zones=one_zone(), course_per_s=[20.0, 10.0])
    assert found.replicas == 2
    assert found.availability == pytest.approx(0.9, abs=1e-12)


def test_spot_never_carries_the_floor() -> None:
    """Half of the peak is held without spot at the objective; spot brings it to the peak, and one pool more when it goes."""

    def fewest(rate: float) -> int:
        return math.ceil(rate / 10)

    area = Zones(count=3, mtbf=measured(1.0, "t"), mttr=measured(0.0, "t"))
    found = secured(0.99, 120, fewest, gpus=1, reliability=plain(900, 100), zones=area, spot=Spot(floor=0.5))
    alone = secured(0.99, 60, fewest, gpus=1, reliability=plain(900, 100), zones=area)
    assert found.needed == 12
    assert sum(found.zones) == alone.replicas >= 6
    assert found.floor_availability == alone.availability >= 0.99
    assert sum(found.zones) + sum(found.spot) - max(found.spot) >= 12
    whole = secured(0.99, 120, fewest, gpus=1, reliability=plain(900, 100), zones=area, spot=Spot(floor=1.0))
    assert whole.spot == ()


def test_intervals_come_from_those_of_the_failure_rates() -> None:
    rel = Reliability(
        gpu_mtbf=assumed(100, "t", 50, 200), process_mtbf=measured(1e18, "t"), repair=measured(10, "t"), restart=measured(1, "t")
    )
    found = secured(0.5, 1, lambda _: 1, gpus=1, reliability=rel, zones=one_zone())
    assert found.interval == pytest.approx((50 / 60, 200 / 210))
    assert found.downtime_interval == pytest.approx(((1 - 200 / 210) * 525_600, (1 - 50 / 60) * 525_600))


def test_bad_requests_are_told() -> None:
    with pytest.raises(BadInput, match="availability of 100"):
        secured(1.0, 1, lambda _: 1, gpus=1, reliability=plain(9, 1))
    with pytest.raises(BadInput, match="at least two"):
        Zones(count=1, survive=True)
    with pytest.raises(BadInput, match="spot floor"):
        Spot(floor=0.0)
    with pytest.raises(BadInput, match="finite"):
        assumed(-1.0, "t")
    with pytest.raises(BadInput, match="outside its own interval"):
        Given(value=1.0, low=2.0, provenance=Provenance.ASSUMED, source="t")


def test_a_cold_start_is_the_sum_of_its_parts() -> None:
    """140 GB at 0.8 GB/s take 175 s, a 10 GB image at 100 MB/s 100 s; restarting on the node needs neither node nor image."""
    cold = cold_start.of(140e9)
    assert cold.weights.value == pytest.approx(175)
    assert cold.image.value == pytest.approx(100)
    assert cold.total_s == pytest.approx(150 + 100 + 175 + 60 + 10)
    assert cold.restart_s == pytest.approx(175 + 60 + 10)
    assert cold.provenance is Provenance.ASSUMED
    assert "weights 2.92 min (assumed)" in cold.in_words()
    assert replaced(cold).repair.value == pytest.approx(60 + cold.total_s)


# ---------------------------------------------------------------- two ways


@settings(max_examples=40)
@given(st.integers(1, 40), st.floats(1, 1e6), st.floats(0.01, 1e5))
def test_a_crew_for_each_is_the_binomial(n: int, mtbf: float, repair: float) -> None:
    a = mtbf / (mtbf + repair)
    wanted = [comb(n, j) * a**j * (1 - a) ** (n - j) for j in range(n + 1)]
    assert up_law(n, mtbf, repair) == pytest.approx(wanted, abs=1e-12)
    assert up_law(n, mtbf, repair, crews=n) == pytest.approx(wanted, abs=1e-12)


@settings(max_examples=40)
@given(st.integers(1, 30), st.floats(1, 1e4), st.floats(0.1, 1e3), st.integers(1, 5))
def test_crews_keep_the_balance_of_the_chain(n: int, mtbf: float, repair: float, crews: int) -> None:
    """What goes down comes up: n p_n / MTBF summed equals min(down, crews) p / MTTR summed."""
    law = up_law(n, mtbf, repair, crews)
    up = np.arange(n + 1)
    assert law.sum() == pytest.approx(1)
    assert float(law @ up) / mtbf == pytest.approx(float(law @ np.minimum(n - up, crews)) / repair)
    assert float(law @ up) <= float(up_law(n, mtbf, repair, crews + 1) @ up) + 1e-9


def test_zones_equal_the_sum_over_every_state_of_them() -> None:
    zones = [zone_law(2, 0.9, 1, 0.8), zone_law(2, 0.9), zone_law(1, 0.9)]
    brute: dict[int, float] = {}
    for states in product(*(zone.items() for zone in zones)):
        n, p = sum(s[0] for s in states), math.prod(s[1] for s in states)
        brute[n] = brute.get(n, 0.0) + p
    assert standing(zones) == pytest.approx(brute)


@settings(max_examples=40)
@given(st.integers(1, 12), st.floats(0.5, 0.999), st.integers(1, 4))
def test_more_replicas_are_never_less_available(need: int, objective: float, count: int) -> None:
    area = Zones(count=count, mtbf=measured(999, "t"), mttr=measured(1, "t"))
    if objective >= 1 - 0.001**count:
        return
    found = secured(objective, need, lambda r: math.ceil(r), gpus=1, reliability=plain(90, 10), zones=area)
    assert found.availability >= objective
    assert found.replicas >= need
    if found.replicas > need:
        less = secured(objective / 2, need, lambda r: math.ceil(r), gpus=1, reliability=plain(90, 10), zones=area)
        assert less.replicas <= found.replicas


def simulated(n: int, mtbf_s: float, repair_s: float, crews: int, needed: int, until_s: float, seed: int, constant: bool) -> float:
    """Return the share of time with enough replicas up: failures drawn one by one, those that find no crew wait in line."""
    rng = np.random.default_rng(seed)
    events = [(rng.exponential(mtbf_s), 0) for _ in range(n)]  # (when, 0 fails / 1 is repaired)
    heapq.heapify(events)
    up, busy, waiting, now, held = n, 0, 0, 0.0, 0.0
    while now < until_s:
        at, what = heapq.heappop(events)
        held += (min(at, until_s) - now) * (up >= needed)
        now = at
        if what == 0:
            up, waiting = up - 1, waiting + 1
        else:
            up, busy = up + 1, busy - 1
            heapq.heappush(events, (now + rng.exponential(mtbf_s), 0))
        while waiting and busy < crews:
            waiting, busy = waiting - 1, busy + 1
            heapq.heappush(events, (now + (repair_s if constant else rng.exponential(repair_s)), 1))
    return held / until_s


@pytest.mark.parametrize(("crews", "constant"), [(12, True), (12, False), (2, False)])
def test_a_simulation_of_failures_agrees(crews: int, constant: bool) -> None:
    """10 of 12 replicas, up 90 % each: with a crew for each the law of the repair does not matter, with two crews it is exponential."""
    runs = [simulated(12, 90.0, 10.0, crews, 10, 20_000.0, seed, constant) for seed in range(12)]
    interval = stats.mean_interval(runs, 0.999)
    assert interval is not None
    assert interval[0] <= float(up_law(12, 90.0, 10.0, crews)[10:].sum()) <= interval[1]


def test_a_simulated_planned_fleet_keeps_its_objective() -> None:
    """The planned number keeps 99 % of the time, one fewer does not: seen in failures drawn one by one."""
    found = secured(0.99, 10, lambda r: math.ceil(r), gpus=1, reliability=plain(95, 5), zones=one_zone())
    shares = {
        n: stats.mean_interval([simulated(n, 95.0, 5.0, n, 10, 20_000.0, s, False) for s in range(8)], 0.99)
        for n in (found.replicas, found.replicas - 1)
    }
    planned, fewer = shares[found.replicas], shares[found.replicas - 1]
    assert planned is not None
    assert fewer is not None
    assert planned[0] <= found.availability <= planned[1]
    assert fewer[1] < 0.99


def test_assumptions_name_every_figure_with_its_source() -> None:
    found = secured(
        0.999, 100, lambda r: math.ceil(r / 10), gpus=8, reliability=replaced(cold_start.of(140e9)), zones=Zones(count=3), crews=1
    )
    text = "\n".join(found.assumptions)
    assert "419 unexpected interruptions" in text
    assert "1 repair(s) at a time" in text
    assert found.interval[0] <= found.availability <= found.interval[1]
    assert availability.YEAR_MIN == 525_600
