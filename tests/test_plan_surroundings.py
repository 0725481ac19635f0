"""Plans with an availability, a day and growth: spares in fleet, price and intervals; what surrounds them, in records and reports."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlsys_bench import record, report, slo, workload
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.journeys import deploying, planning
from mlsys_bench.plan import around, candidates, plan, sizing
from mlsys_bench.plan.growth import Growth
from mlsys_bench.plan.reliability import Spot
from mlsys_bench.plan.request import Request
from mlsys_bench.pricing import Market, Reservation, pack
from mlsys_bench.report import content
from mlsys_bench.types import Plan
from tests import sample_records

CHAT = workload.synthetic(150.0, arrivals="poisson", prompt="lognormal:512:1:8192", output="lognormal:128:1:1024")
LATENCY = "ttft_p95<500ms,tpot_p95<50ms"


def request(limits: str = LATENCY, **changes: Any) -> Request:
    return Request(model="llama-3-8b", workload=CHAT, slo=slo.parse(limits), gpus=("H100",), precisions=("fp8",), max_batch=256, **changes)


@functools.cache
def bare() -> Plan:
    return plan(request())


@functools.cache
def zoned() -> Plan:
    return plan(request(f"{LATENCY},availability>99.9%", zones=3, survive_zone=True, growth=Growth(per_month=0.05)))


def test_a_zone_may_go_and_the_fleet_is_larger_by_what_that_takes() -> None:
    """The replicas of three zones, the largest of them gone, are those of the plan without spares: counted, not in proportion."""
    found, needed = zoned(), bare().replicas
    assert found.secured is not None
    assert found.secured.needed == needed
    assert found.replicas == next(n for n in range(needed, 99) if n - math.ceil(n / 3) >= needed)
    assert found.replicas == sum(found.secured.zones) == found.fleet[0].replicas
    assert found.gpus == found.replicas * found.devices_per_replica
    assert "one of 3 zones" in found.binding_constraint


def test_those_left_hold_the_limits_and_all_together_are_faster() -> None:
    found = zoned()
    assert found.survivors == bare().predicted
    for limit in slo.latencies(slo.parse(found.slo)):
        assert found.predicted[f"{slo.key(limit)}_s"] < found.survivors[f"{slo.key(limit)}_s"] < limit.limit
    assert found.utilisation == pytest.approx(bare().utilisation * bare().replicas / found.replicas)
    assert found.headroom == bare().headroom  # of the replicas needed: the spares are no room for traffic


def test_price_and_intervals_are_those_of_the_larger_fleet() -> None:
    """One replica to a GPU here: dollars are instances times price, by hand, at both ends of the interval too."""
    found = zoned()
    (offer,), (item,) = found.prices, found.fleet
    on_one = offer.devices // found.devices_per_replica
    assert found.usd_per_hour == pytest.approx(math.ceil(found.replicas / on_one) * offer.usd_per_h)
    assert item.instances == math.ceil(found.replicas / on_one)
    low, high = found.intervals["replicas"]
    assert low <= found.replicas <= high
    assert low > bare().intervals["replicas"][0]
    usd_low, usd_high = found.intervals["usd_per_hour"]
    assert found.usd_per_hour is not None
    assert usd_low <= found.usd_per_hour <= usd_high
    assert usd_high == pytest.approx(math.ceil(high / on_one) * offer.usd_per_h)


def test_without_an_availability_nothing_changes() -> None:
    assert (bare().secured, bare().scaled, bare().pressure, bare().outlook, bare().survivors) == (None, None, None, None, {})
    alone = plan(request(f"{LATENCY},availability>90%"))
    assert alone.secured is not None
    assert (alone.replicas, alone.usd_per_hour, alone.secured.spare) == (bare().replicas, bare().usd_per_hour, 0)
    assert alone.binding_constraint == bare().binding_constraint
    assert any("in one zone (--zones says more)" in line for line in alone.assumptions)


def test_every_design_is_priced_with_its_spares() -> None:
    asked = request(f"{LATENCY},availability>99.9%", zones=2, survive_zone=True)
    (candidate, *_), _ = candidates.every(asked)
    assert sizing.rented(candidate, 3, asked.shelf) == 6  # two zones, each holding all three
    with_spares, without = sizing.price(candidate, 3, asked.shelf), sizing.price(candidate, 6, request().shelf)
    assert with_spares is not None
    assert without is not None
    assert with_spares.usd_per_h == without.usd_per_h
    assert candidate.weights_bytes == pytest.approx(around.weights_bytes(bare()))


def test_what_zones_rule_out_and_zones_without_an_availability_are_refused() -> None:
    with pytest.raises(Infeasible, match="spread over more zones"):
        plan(request(f"{LATENCY},availability>99.999%"))
    with pytest.raises(BadInput, match="--availability"):
        plan(request(zones=3))
    with pytest.raises(BadInput, match="at least two"):
        plan(request(f"{LATENCY},availability>99.9%", survive_zone=True))


def test_two_plans_that_differ_in_zones_differ_by_their_limits() -> None:
    found = deploying.compared(bare(), zoned())
    assert found.new.replicas == zoned().replicas
    (step,) = [step for step in found.steps if step.cause == "limits"]
    assert step.replicas == zoned().replicas - bare().replicas
    assert {"zones: 1 -> 3", "any zone may go: False -> True"} < set(step.changes)


def test_an_instance_serves_no_two_zones() -> None:
    """Four replicas over three zones are 2 + 1 + 1: three instances of four GPUs where one would hold them all; or four of one GPU."""
    four = sample_records.plan().prices[0]
    four = dataclasses.replace(four, device="L4", devices=4, usd_per_h=10.0, term="on-demand")
    one = dataclasses.replace(four, instance="one", devices=1, usd_per_h=6.0)
    large, both = Market(offers=(four,)), Market(offers=(four, one))
    assert [_usd(large, zones) for zones in ((), (2, 1, 1))] == [10.0, 30.0]
    assert [_usd(both, zones) for zones in ((), (2, 1, 1))] == [10.0, 22.0]  # 10 + 6 + 6
    committed = Market(offers=(four,), reservations={four: Reservation(term_months=12, committed=1)})
    with pytest.raises(BadInput, match="say nothing of zones"):
        _usd(committed, (2, 1, 1))


def _usd(market: Market, zones: tuple[int, ...]) -> float:
    found = pack("L4", 1, 4, market=market, zones=zones)
    assert found is not None
    return found.usd_per_h


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"term": "on-demand", "spot": Spot()}, "give --term spot and an --availability"),
        ({"zones": 3, "survive_zone": True}, "everybody wants the spot capacity"),
        ({"growth": Growth(per_month=0.05)}, "leave out --autoscale, --growth, --mixed"),
    ],
)
def test_what_spot_cannot_promise_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        plan(request(f"{LATENCY},availability>99.9%", **{"term": "spot", **changes}))


def test_growth_tells_the_month_and_keeps_spares() -> None:
    found = zoned()
    assert found.outlook is not None
    assert found.outlook.full_month == pytest.approx(math.log1p(found.headroom) / math.log(1.05))
    assert found.outlook.months[0].replicas == found.replicas
    assert found.outlook.months[0].usd_per_h == pytest.approx(found.usd_per_hour)
    assert [m.replicas for m in found.outlook.months] == sorted(m.replicas for m in found.outlook.months)


@functools.cache
def daily() -> Plan:
    options: dict[str, Any] = dict.fromkeys(("scenario", "slo", "precision", "max_batch", "headroom", "prompt_tokens", "output_tokens"))
    asked = planning.ask(
        **options, qps=90.0, measured=[], model="llama-3-8b", gpu="H100", arrivals="diurnal:24h:60%", term="on-demand", seed=0,
        availability="99.9%", zones=3, survive=True, growth="5%",
    )  # fmt: skip
    return planning.plan(asked)


def test_a_day_is_planned_by_the_hour_without_being_asked() -> None:
    found = daily()
    assert found.scaled is not None
    assert found.secured is not None
    assert len(found.scaled.hours) == 24
    static = found.scaled.use("static").replica_h
    assert static == 24 * found.replicas
    assert found.scaled.use("scheduled").replica_h < static
    assert max(hour.scheduled for hour in found.scaled.hours) == found.replicas
    assert found.pressure is not None
    assert found.pressure.last_place_s <= 0.5


def test_records_keep_all_of_it_and_reports_show_it(tmp_path: Path) -> None:
    found = daily()
    record.write(tmp_path / "plan.json", found, sample_records.machine())
    assert record.read(tmp_path / "plan.json", Plan) == found
    titles = [section.title for section in content.describe(found)]
    assert [title.split()[0].rstrip(":") for title in titles] == ["Plan", "Availability", "Autoscaling", "Protection", "Growth"]
    items = [("plan.json", sample_records.head(found), found)]
    report.write_html(tmp_path / "plan.html", items)
    report.write_markdown(tmp_path / "plan.md", items)
    for name in ("plan.html", "plan.md"):
        text = (tmp_path / name).read_text()
        assert all(word in text for word in ("only the needed up", "Replicas by the hour", "refused by the queue limit", "Growth of 5.0 %"))


def test_manifests_carry_spares_and_rule(tmp_path: Path) -> None:
    found = daily()
    deploying.exported(found, f"k8s:{tmp_path}")
    deploying.exported(found, f"keda:{tmp_path}")
    deployment = next(d for d in yaml.safe_load_all((tmp_path / "llama-3-8b-k8s.yaml").read_text()) if d["kind"] == "Deployment")
    assert deployment["spec"]["replicas"] == found.replicas
    (scaled,) = yaml.safe_load_all((tmp_path / "llama-3-8b-keda.yaml").read_text())
    assert found.scaled is not None
    assert found.secured is not None
    assert found.scaled.rule.least == 1 + found.secured.spare
    assert scaled["spec"]["minReplicaCount"] == found.replicas, "an availability counts against the peak all day"


def test_a_course_too_short_to_follow_is_told() -> None:
    found = planning.plan(dataclasses.replace(request(), workload=dataclasses.replace(CHAT, arrivals="diurnal:10m:1,2")))
    assert found.scaled is None
    assert any("autoscaling: the course of the traffic lasts 10.0 min" in note for note in found.notes)


def test_steady_traffic_is_told_that_a_rule_gains_nothing() -> None:
    found = plan(dataclasses.replace(request(), around=True))
    assert found.scaled is None
    assert found.pressure is not None
    assert any("the same all day" in note for note in found.notes)
