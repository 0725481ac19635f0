"""A stage graph under a trace, under changes, and by workers: known queues, and the same answer whoever does the work."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import scenario
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import comparing, graph_plans
from mlsys_bench.plan.graph import GraphRequest, allocation, changes, plan_graph, problem, works
from mlsys_bench.plan.graph.allocation import simulate
from mlsys_bench.report import content
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Plan
from tests.stage_graphs import graph, law, written

FAILS = "retries: {max: 1}, failure: {p: 1%, source: x}"
TWO = f"a: {{{law('40ms')}, next: b}}\nb: {{{law('20ms')}, cache: {{hit: 50%, source: x}}, {FAILS}}}"


@pytest.fixture(autouse=True)
def short_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Play a fifth of the visits: nothing here is about the tails of a simulation."""
    monkeypatch.setattr(allocation, "VISITS", 10_000)
    monkeypatch.setattr(allocation, "_LEAST", 1000)


def two(**changed: Any) -> GraphRequest:
    return GraphRequest(graph=graph(TWO, rate=40, slo="{e2e_p95: 300ms}", headroom="10%"), **changed)


def options(path: Path, **given: Any) -> dict[str, Any]:
    return {"scenario": str(path), "term": "on-demand", "seed": 0, **given}


def trace(path: Path, due_s: np.ndarray) -> Path:
    """Write a trace of requests with a token each."""
    lines = ["time,prompt_tokens,output_tokens", *(f"{t:.6f},10,5" for t in due_s)]
    path.write_text("\n".join(lines) + "\n")
    return path


# ---------------------------------------------------------------- traces


def test_a_trace_of_poisson_arrivals_is_planned_as_their_law_is(tmp_path: Path) -> None:
    due_s = np.cumsum(np.random.default_rng(1).exponential(1 / 40, 4000))
    by_law, by_trace = usual(), plan_graph(two(due_s=due_s))
    assert {s.stage: s.replicas for s in by_trace.stages} == {s.stage: s.replicas for s in by_law.stages}
    for key, value in by_law.predicted.items():
        assert by_trace.predicted[key] == pytest.approx(value, rel=0.2), key


def test_the_requests_of_a_trace_come_when_they_came() -> None:
    """Every tenth of a second three at once, at one server that takes 20 ms: waits of 0, 20 and 40 ms, to the digit."""
    due_s = np.repeat(np.arange(300) / 10, 3)
    asked = GraphRequest(graph=graph(f"a: {{{law('20ms', 'constant')}}}", rate=30), due_s=due_s)
    found = simulate(problem(asked.graph, works(asked), due_s=due_s), {"a": 1})
    assert sorted({round(t, 9) for t in found.all.e2e_s.tolist()}) == [0.02, 0.04, 0.06]
    assert len(found.all.e2e_s) == len(due_s)


def test_of_a_long_trace_the_busiest_stretch_is_played() -> None:
    """60,000 requests a second apart but for 10,000 that come ten times as fast."""
    gaps = np.ones(60_000)
    gaps[30_000:40_000] = 0.1
    asked = GraphRequest(graph=graph(f"a: {{{law('50ms', 'constant')}}}", rate=1), due_s=np.cumsum(gaps))
    played = simulate(problem(asked.graph, works(asked), due_s=asked.due_s), {"a": 1}).played
    assert len(played.due_s) == 10_000
    assert float(played.due_s[-1]) == pytest.approx(999.9)


def test_bursts_in_a_trace_need_more_than_its_mean_rate() -> None:
    """Forty at once every second, against forty spread over it."""
    together, apart = np.repeat(np.arange(100.0), 40), np.arange(4000) / 40
    few, many = (plan_graph(two(due_s=due_s)).replicas for due_s in (apart, together))
    assert many > 2 * few


def test_a_trace_is_read_from_the_command_line(tmp_path: Path) -> None:
    path, file = tmp_path / "g.yaml", trace(tmp_path / "t.csv", np.arange(1000) / 20)
    path.write_text(written(f"a: {{{law('10ms')}}}"))
    found = graph_plans.asked(options(path, trace=file, speed=2.0))
    assert found is not None
    assert found.due_s is not None
    assert found.due_s[-1] == pytest.approx(999 / 40)
    assert found.graph.workload.rate_per_s == pytest.approx(40, rel=0.01)
    assert found.graph.headroom == 0
    made = plan_graph(found)
    assert any("the trace's 1,000 requests come at their own times, all of them" in line for line in made.assumptions)


def test_what_a_trace_does_not_say_stands_in_the_plan(tmp_path: Path) -> None:
    path, file = tmp_path / "g.yaml", trace(tmp_path / "t.csv", np.floor(np.arange(600) / 20))
    path.write_text(written(f"a: {{{law('10ms')}}}"))
    found = graph_plans.asked(options(path, trace=file))
    assert found is not None
    assert any("arrival times stand on a grid of about 1 s" in note for note in plan_graph(found).notes)


def test_what_a_trace_rules_out_is_told(tmp_path: Path) -> None:
    path, file = tmp_path / "g.yaml", trace(tmp_path / "t.csv", np.arange(100) / 20)
    path.write_text(written(f"a: {{{law('10ms')}}}"))
    with pytest.raises(BadInput, match="--arrivals is a law"):
        graph_plans.asked(options(path, trace=file, arrivals="poisson"))
    with pytest.raises(BadInput, match="tell no percentile of a graph"):
        plan_graph(graph_plans.asked(options(path, trace=file)))  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="leave --autoscale and --growth out"):
        plan_graph(two(due_s=np.arange(1000) / 20, around=True))
    with pytest.raises(BadInput, match="--speed plays a trace faster"):
        graph_plans.asked(options(path, speed=2.0))


# ---------------------------------------------------------------- changes


@functools.cache
def usual() -> Plan:
    return plan_graph(two())


def by_name(request: GraphRequest) -> dict[str, GraphRequest]:
    return {v.what: v.requests[0] for v in changes.variants(request, usual())}


def test_each_change_changes_one_thing() -> None:
    asked = two()
    found = by_name(asked)
    assert list(found) == [
        "10 % more traffic", "e2e_p95 1 ms later", "e2e_p95 10 % later", "a 10 % slower", "b 10 % slower", "60 % hits at b for 50 %",
        "no hits at b", "no retries at b",
    ]  # fmt: skip
    assert found["10 % more traffic"].graph.workload.rate_per_s == pytest.approx(44)
    assert found["e2e_p95 1 ms later"].graph.slo[0].limit == pytest.approx(0.301)
    slower = found["a 10 % slower"].graph.stage("a").service
    assert slower is not None
    assert slower.assumed is not None
    assert slower.assumed.mean_s == pytest.approx(0.044)
    assert found["no retries at b"].graph.stage("b").retries is None
    for name, request in found.items():
        same = [s.name for s, other in zip(asked.graph.stages, request.graph.stages, strict=True) if s == other]
        assert len(same) >= len(asked.graph.stages) - 1, name


def test_more_hits_never_need_more_and_none_never_less() -> None:
    asked = two()
    found, now = by_name(asked), usual().replicas
    assert plan_graph(found["60 % hits at b for 50 %"]).replicas <= now <= plan_graph(found["no hits at b"]).replicas
    assert plan_graph(found["10 % more traffic"]).replicas >= now


def test_a_trace_gets_faster_with_its_law() -> None:
    asked = two(due_s=np.arange(1000) / 40)
    faster = by_name(asked)["10 % more traffic"]
    assert faster.due_s is not None
    assert faster.due_s[-1] == pytest.approx(999 / 44)


def test_a_measured_time_is_stretched_in_its_profile() -> None:
    asked = two()
    profile = usual().stages[0].profile
    assert profile is not None
    bound = dataclasses.replace(asked, profiles={"a": profile})
    slower = changes.slower(bound, asked.graph.stage("a"), profile)
    before_s, longer = (works(request)["a"].service_s for request in (bound, slower))
    assert longer == pytest.approx(1.1 * before_s)
    assert slower.graph == asked.graph


def test_the_plan_of_a_graph_shows_its_changes_and_is_the_same_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    every = changes.variants
    monkeypatch.setattr(changes, "variants", lambda *given: itertools.islice(every(*given), 2))
    made = comparing.planned(two(), changes=True, quiet=True)
    assert isinstance(made, Plan)
    assert {row.what for row in made.sensitivity} == {"10 % more traffic", "e2e_p95 1 ms later"}
    assert any("What a change would save or cost" in section.title for section in content.describe(made))
    bare = dataclasses.replace(made, sensitivity=())
    with ProcessPoolExecutor(2) as crew:
        assert plan_graph(two(), crew) == bare == usual()


def test_a_cascade_of_one_model_is_not_asked_of_a_graph() -> None:
    with pytest.raises(BadInput, match="a graph says in its escalations"):
        comparing.planned(two(), changes=True, small="llama-3.2-1b", quiet=True)


@pytest.mark.parametrize("name", ["rag-support-bot", "recsys-feed", "embed-service", "llm-chat"])
def test_every_shipped_graph_has_changes_that_can_be_planned(name: str) -> None:
    """Only the requests are looked at: each is a graph whose checks still hold."""
    found = scenario.load(name)
    if not isinstance(found, StageGraph):
        pytest.skip(f"{name} has one stage")
    plan = usual()
    stages = {stage.name: dataclasses.replace(plan.stages[0], stage=stage.name) for stage in found.stages}
    told = [v.what for v in changes.variants(GraphRequest(graph=found), dataclasses.replace(plan, stages=tuple(stages.values())))]
    assert len(told) == len(set(told)) > 5
