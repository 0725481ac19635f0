"""What surrounds a plan, from its record: every part fits the plan it was made from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from mlsys_bench.plan import around
from mlsys_bench.plan.growth import Growth
from mlsys_bench.plan.reliability import Zones
from mlsys_bench.types import Plan
from tests import sample_records


def a_plan(**changes: Any) -> Plan:
    """200/s on 8 replicas of one H100, 31/s each at most, with an availability among its limits."""
    plan = sample_records.plan()
    return dataclasses.replace(plan, slo=f"{plan.slo},availability>99.95%", capacity_per_replica_per_s=35.0, **changes)


def test_the_plans_own_rate_takes_the_plans_own_replicas() -> None:
    fewest = around.fewest_of(a_plan())
    assert [fewest(rate) for rate in (0.1, 25.0, 25.1, 200.0, 200.1)] == [1, 1, 2, 8, 9]
    price = around.price_of(a_plan())
    assert [price(n) for n in (1, 8, 9)] == [55.04, 55.04, 110.08]
    assert around.price_of(a_plan(prices=()))(3) is None
    pairs = a_plan(devices_per_replica=16)
    assert around.price_of(pairs)(1) == pytest.approx(110.08)


def test_everything_around_a_day_in_three_zones() -> None:
    plan = a_plan()
    day = dataclasses.replace(plan.workload, rate_per_s=125.0, arrivals="diurnal:24h:60%")
    found = around.around(plan, traffic=day, zones=Zones(count=3, survive=True), grows=Growth(per_month=0.05, low=0.02, high=0.1))
    assert found.secured is not None
    assert found.secured.objective == pytest.approx(0.9995)
    assert found.secured.needed == 8
    assert found.secured.zones == (4, 4, 4)
    assert found.secured.availability >= 0.9995
    assert found.scaled is not None
    static, scheduled, followed = (found.scaled.use(way).replica_h for way in ("static", "scheduled", "followed"))
    assert static == 24 * (8 + found.secured.spare)
    assert max(scheduled, followed) < static
    assert found.scaled.rule.least == 1 + found.secured.spare
    assert found.outlook is not None
    assert found.outlook.full_at_per_s == pytest.approx(242)  # the plan's headroom is 21 %
    assert found.outlook.full_month == pytest.approx(math.log(1.21) / math.log(1.05))
    assert found.outlook.months[0].replicas == 8
    lines = list(around.in_words(found))
    assert [line.split()[0].rstrip(":") for line in lines] == ["availability", "autoscaling", "backpressure", "growth"]
    assert "8 + 4 over 3 zones (4, 4, 4)" in lines[0]


def test_steady_traffic_needs_no_autoscaling_and_no_objective_no_spares() -> None:
    found = around.around(sample_records.plan(capacity_per_replica_per_s=35.0))
    assert found.secured is None
    assert found.scaled is None
    assert found.outlook is None
    assert found.pressure is not None
    assert found.cold.weights.value == pytest.approx(15e9 / 0.8e9)


def test_a_queue_limit_leaves_the_promise_what_the_plan_predicts() -> None:
    """Slots at capacity: service = slots / capacity; what the plan's own TTFT leaves of the limit is for the queue."""
    plan = a_plan()
    found = around.pressure(plan)
    assert found is not None
    assert found.last_place_s <= 0.5
    assert found.rate_per_s == pytest.approx(200 * 1.21)
    assert around.pressure(a_plan(predicted={**plan.predicted, "ttft_p95_s": 0.6})) is None
    assert around.pressure(dataclasses.replace(plan, slo="tpot_p99<50ms")) is None
    assert around.serving_of(a_plan(predicted={})) is None
