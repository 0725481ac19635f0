"""Replicas of a stage graph: against exact theory and brute force, honest about what cannot be done, priced to the cent."""

from __future__ import annotations

import dataclasses
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from mlsys_bench import record, scenario
from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.journeys import graph_plans
from mlsys_bench.plan.graph import GraphRequest, allocate, plan_graph, problem, works
from mlsys_bench.plan.graph.allocation import excesses, fewest, simulate
from mlsys_bench.queueing import Station, Target, servers_for
from mlsys_bench.queueing.laws import Exponential
from mlsys_bench.queueing.networks import tandem_of_mmc
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import LatencyProfile, Layout, Provenance
from tests.stage_graphs import graph, law


def asked(g: StageGraph):  # type: ignore[no-untyped-def]
    return problem(g, works(GraphRequest(graph=g)))


def test_one_stage_gets_the_servers_that_theory_asks_for() -> None:
    """M/M/c at 40 erlangs, p99 of the sojourn under 5.5 services: within one of the exact number."""
    g = graph(f"a: {{{law('1s')}}}", rate=40, slo="{e2e_p99: 5.5s}", headroom="1%")
    exact = servers_for(Target(station=Station(arrivals=Exponential(1 / 40), service=Exponential(1.0)), limit_s=5.5, p=0.99)).servers
    assert abs(allocate(asked(g)).replicas["a"] - exact) <= 1


def test_large_steps_of_the_search_are_taken_back() -> None:
    """M/M/c at 100 erlangs, p99 of the sojourn under 5 services: within two of the exact number, whatever the steps were."""
    g = graph(f"a: {{{law('1s')}}}", rate=100, slo="{e2e_p99: 5s}", headroom="1%")
    exact = servers_for(Target(station=Station(arrivals=Exponential(1 / 100), service=Exponential(1.0)), limit_s=5.0, p=0.99)).servers
    assert abs(allocate(asked(g)).replicas["a"] - exact) <= 2


def test_two_stages_cost_what_the_best_of_all_pairs_costs() -> None:
    """Dear replicas at a, cheap ones at b: brute force over the exact law of M/M/c in line, within one cheap replica."""
    dear = law("250ms").replace("vcpu: 1", "vcpu: 4")
    g = graph(f"a: {{{dear}, next: b}}\nb: {{{law('100ms')}}}", slo="{e2e_p95: 1200ms}", headroom="1%")
    cost = {
        (a, b): 4 * a + b
        for a, b in product(range(3, 9), range(2, 9))
        if tandem_of_mmc(10.0, ((0.25, a), (0.1, b)))[0].sojourn_quantile_s(0.95) < 1.2
    }
    found = allocate(asked(g)).replicas
    assert 4 * found["a"] + found["b"] <= min(cost.values()) + 1
    assert (found["a"] + 1, found["b"] + 1) in cost


def test_theory_of_stages_in_line_is_that_of_the_product_form() -> None:
    """M/M/3 then M/M/2: p50, p95 and p99 of the whole within 3 % of the exact law."""
    g = graph(f"a: {{{law('240ms')}, next: b}}\nb: {{{law('140ms')}}}")
    exact = tandem_of_mmc(10.0, ((0.24, 3), (0.14, 2)))[0]
    found = asked(g).estimate({"a": 3, "b": 2}).whole
    for p in (50, 95, 99):
        assert found.value("e2e", f"p{p}") == pytest.approx(exact.sojourn_quantile_s(p / 100), rel=0.03)


def test_theory_and_simulation_agree_where_stages_hardly_wait() -> None:
    """Fan-out, caches, k of n, retries and escalation with twenty servers each: p50 and p95 within 5 %."""
    g = graph(f"""
        a: {{parallel: [b, c], join: {{k: 1, of: 2, by: 15ms}}, next: d}}
        b: {{{law('10ms')}, shards: 3}}
        c: {{{law('20ms', 'gamma', 0.5)}, cache: {{hit: 30%, source: x}}}}
        d: {{{law('30ms')}, timeout: 60ms, retries: {{max: 1}}, fallback: {{to: e}}, escalate: {{to: d, p: 20%, source: x}}, next: e}}
        e: {{{law('5ms', 'lognormal', 1.5)}}}
    """, rate=100)  # fmt: skip
    p, n = asked(g), dict.fromkeys("bcde", 20)
    theory, seen = p.estimate(n).whole, simulate(p, n).all
    for stat in ("p50", "p95"):
        assert theory.value("e2e", stat) == pytest.approx(seen.value("e2e", stat), rel=0.05)


def test_the_fleet_keeps_its_limits_in_another_simulation_and_not_with_one_replica_fewer() -> None:
    """The limit binds, not the headroom: with one replica fewer of any stage that has more than its load asks for, it breaks."""
    g = graph(f"a: {{{law('100ms')}, next: b}}\nb: {{{law('100ms')}}}", rate=50, slo="{e2e_p99: 800ms}", headroom="1%")
    p = asked(g)
    found = allocate(p)
    other = simulate(dataclasses.replace(p, seed=7), found.replicas, 3)
    assert max(excesses(p, other.all, other.stages).values()) < 1.05
    least = fewest(p)
    assert any(n > least[name] for name, n in found.replicas.items())
    for name, n in found.replicas.items():
        if n > least[name]:
            fewer = simulate(p, {**found.replicas, name: n - 1}, 3)
            assert max(excesses(p, fewer.all, fewer.stages).values()) > 0.95


def test_a_limit_of_one_stage_is_kept_beside_those_of_the_whole() -> None:
    stages = f"a: {{{law('50ms')}%s, next: b}}\nb: {{{law('10ms')}}}"
    loose = allocate(asked(graph(stages % "", rate=40))).replicas["a"]
    tight = allocate(asked(graph(stages % ", slo: {e2e_p99: 260ms}", rate=40))).replicas["a"]
    assert tight > loose


def test_what_no_number_of_replicas_can_do_says_which_limit_and_what_helps() -> None:
    with pytest.raises(Infeasible, match=r"e2e_p95<100ms is missed by \d+ % with any number of replicas: .* most of it at b; allow"):
        allocate(asked(graph(f"a: {{{law('1ms')}, next: b}}\nb: {{{law('90ms')}}}", slo="{e2e_p95: 100ms}")))
    with pytest.raises(Infeasible, match="too many requests get no answer at all; loosen a timeout, or give a fallback"):
        allocate(asked(graph(f"a: {{{law('90ms')}, timeout: 50ms}}")))


def test_every_cost_is_the_sum_by_hand() -> None:
    """3 replicas of 2 vCPU in 2 shards and one of 1 vCPU at $0.10: $1.30 an hour, $949.00 a month."""
    wide = law("230ms").replace("vcpu: 1", "vcpu: 2")
    plan = plan_graph(GraphRequest(graph=graph(f"a: {{{wide}, shards: 2, next: b}}\nb: {{{law('10ms')}}}")))
    assert {s.stage: (s.replicas, s.shards) for s in plan.stages} == {"a": (3, 2), "b": (1, 1)}
    assert (plan.usd_per_hour, plan.usd_per_month) == (pytest.approx(1.30), pytest.approx(949.0))
    assert plan.replicas == 7
    assert (plan.bottleneck, plan.provenance) == ("a", Provenance.ASSUMED)
    assert plan.usd_per_million_tokens is None
    assert set(plan.predicted) == {"e2e_p50_s", "e2e_p95_s", "e2e_p99_s"}
    assert all(plan.intervals[key][0] <= value <= plan.intervals[key][1] for key, value in plan.predicted.items())


def test_a_graph_without_work_is_nothing_to_plan() -> None:
    with pytest.raises(BadInput, match="no stage does any work"):
        plan_graph(GraphRequest(graph=graph("a: {route: {to: {done: 1}, source: x}}")))


def test_a_gpu_stage_buys_whole_instances() -> None:
    """Two replicas of one L4 each: the cheapest published instances that hold them."""
    from mlsys_bench import pricing

    g = graph(f"a: {{{law('150ms').replace('vcpu: 1', 'gpu: l4')}}}")
    plan = plan_graph(GraphRequest(graph=g))
    offer, count = pricing.choose("L4", 1, 2) or (None, 0)
    assert offer is not None
    assert (plan.gpus, plan.gpu, plan.fleet[0].instances) == (2, "L4", count)
    assert plan.usd_per_hour == pytest.approx(offer.usd_per_h * count)


@pytest.mark.parametrize("name", ["recsys-feed", "embed-service"])
def test_a_shipped_scenario_is_planned_within_its_limits(name: str) -> None:
    read = scenario.load(name)
    assert isinstance(read, StageGraph)
    plan = plan_graph(GraphRequest(graph=read))
    for limit in read.slo:
        assert plan.predicted[f"{limit.metric}_{limit.stat}_s"] < limit.limit
    assert all(stage.utilisation < 1 - read.headroom + 0.02 for stage in plan.stages)
    assert plan.headroom > 0
    assert len(plan.fleet) == len(plan.stages) == len([s for s in read.stages if s.service])


def test_a_measured_profile_takes_the_place_of_what_was_assumed(tmp_path: Path) -> None:
    """A profile of twice the time, bound to its stage, doubles the replicas; unknown and repeated stages are refused."""
    g = graph(f"a: {{{law('1s')}, next: b}}\nb: {{{law('1ms')}}}", rate=20)
    slow = LatencyProfile(
        form="service", layout=Layout(model="a", precision="", device="vcpu"), stage="a", terms=("service_s", "scv"),
        coefficients=(2.0, 1.0), covariance=((0.0, 0.0), (0.0, 0.0)), constants={}, residual_log_sd=0.0, valid={},
        provenance=Provenance.CALIBRATED,
    )  # fmt: skip
    measured = works(GraphRequest(graph=g, profiles={"a": slow}))["a"]
    assert (measured.service_s, measured.provenance) == (2.0, Provenance.CALIBRATED)
    assert fewest(problem(g, works(GraphRequest(graph=g, profiles={"a": slow}))))["a"] == 45
    with pytest.raises(BadInput, match="no such stage"):
        works(GraphRequest(graph=g, profiles={"c": slow}))
    from mlsys_bench import hardware

    path = record.write(tmp_path / "a.json", slow, hardware.machine())
    assert graph_plans.profiles([Path(f"a={path}")], g) == {"a": slow}
    with pytest.raises(BadInput, match="the stage a is bound twice"):
        graph_plans.profiles([Path(f"a={path}"), Path(f"a={path}")], g)
    with pytest.raises(BadInput, match="say which one, --from a="):
        graph_plans.profiles([path], g)


def test_more_traffic_never_needs_fewer_replicas() -> None:
    def replicas(rate: float) -> int:
        g = graph(f"a: {{{law('50ms')}, next: b}}\nb: {{{law('20ms', 'constant', per_item='5ms')}, batching: {{max: 8}}}}", rate=rate)
        return sum(fewest(asked(g)).values())

    counts = [replicas(rate) for rate in (10, 20, 40, 80, 160)]
    assert counts == sorted(counts)


def test_a_capacity_of_batches_is_that_of_full_ones() -> None:
    g = graph(f"a: {{{law('20ms', 'constant', per_item='5ms')}, batching: {{max: 8, wait: 5ms}}}}")
    assert works(GraphRequest(graph=g))["a"].capacity_per_s(3) == pytest.approx(3 * 8 / 0.06)
    assert np.isclose(works(GraphRequest(graph=g))["a"].service_s, 0.025)
