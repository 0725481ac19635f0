"""Calls of a stage graph that come of each other, hedges, retries, fallbacks and idle branches; and models nobody waits for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mlsys_bench.errors import BadInput
from mlsys_bench.plan.graph import GraphRequest, Problem, plan_graph, problem, works
from mlsys_bench.plan.graph.allocation import fewest, simulate
from mlsys_bench.plan.graph.answer import needed_alone
from mlsys_bench.plan.graph.estimate import estimate
from mlsys_bench.plan.graph.numbers import SAMPLES
from mlsys_bench.plan.graph.work import FEW, Served, Visits
from mlsys_bench.queueing.mmc import mmck
from mlsys_bench.report import latencies
from mlsys_bench.simulate.graph import Delay, play
from mlsys_bench.stages import Stage, StageGraph
from mlsys_bench.types import Limit
from tests.stage_graphs import graph, law

MODEL = (
    "service: {{roofline: {{model: llama-3.1-8b, precision: [fp8], max_batch: 32, prompt: 200, output: {output}, source: x}}}}, "
    "resources: {{gpu: [h100-sxm]}}"
)


def model(output: str = "30") -> str:
    """Return a language model as YAML."""
    return MODEL.format(output=output)


def asked(g: StageGraph) -> Problem:
    return problem(g, works(GraphRequest(graph=g)))


# ---------------------------------------------------------------- work that comes of work


def test_batches_of_one_take_the_time_of_one() -> None:
    """4 ms and 6 ms for each, one at a time: 10 ms by capacity, theory and simulation."""
    p = asked(graph(f"a: {{{law('4ms', 'constant', per_item='6ms')}, batching: {{max: 1}}}}", rate=1))
    assert p.works["a"].capacity_per_s(1) == pytest.approx(100.0)
    assert p.estimate({"a": 1}).whole.value("e2e", "p50") == pytest.approx(0.010)
    assert simulate(p, {"a": 1}).all.value("e2e", "p50") == pytest.approx(0.010)


def test_hedges_and_retries_are_calls_that_replicas_are_rented_for() -> None:
    """Exponential work of 100 ms.  Sent again after 100 ms: 1 + 1/e calls; given up at 200 ms, tried thrice: 1 + f + f^2, f = e^-2."""
    f = math.exp(-2)
    for more, calls in (("hedge: {after: 100ms}", 1 + math.exp(-1)), ("timeout: 200ms, retries: {max: 2}", 1 + f + f * f)):
        p = asked(graph(f"a: {{{law('100ms')}, {more}}}", rate=40, headroom="20%"))
        assert p.flow["a"].calls == pytest.approx(calls, rel=1e-3)
        assert fewest(p)["a"] == math.ceil(40 * 0.1 * calls / 0.8)
        use = simulate(p, {"a": 40}).played.stages["a"]  # nobody waits
        assert abs((use.calls + use.hedged) / use.visits - calls) < 4 * math.sqrt(calls / use.visits)


def test_shards_are_hedged_when_the_slowest_is_late() -> None:
    """Four shards of exponential work: a copy after one service time goes out for 1 - (1 - 1/e)^4 of the calls."""
    p = asked(graph(f"a: {{{law('10ms')}, shards: 4, hedge: {{after: 10ms}}}}", rate=1))
    assert p.flow["a"].calls == pytest.approx(2 - (1 - math.exp(-1)) ** 4, rel=1e-3)


def test_a_plan_keeps_its_headroom_although_calls_are_hedged() -> None:
    plan = plan_graph(GraphRequest(graph=graph(f"a: {{{law('100ms')}, hedge: {{after: 50ms}}}}", rate=40, headroom="20%")))
    assert plan.stages[0].calls == pytest.approx(1 + math.exp(-0.5), rel=0.1)
    assert plan.stages[0].utilisation == pytest.approx(4 * plan.stages[0].calls / plan.stages[0].replicas)
    assert plan.utilisation < 0.82


def test_headroom_ends_where_retries_bring_a_fleet_down() -> None:
    """Given up at 200 ms and tried thrice: 8 replicas keep p95 at 40/s, of 7 one request in six gets no answer; nor do 8 at 46/s."""
    g = graph(f"a: {{{law('100ms')}, timeout: 200ms, retries: {{max: 2}}}}", rate=40, slo="{e2e_p95: 5s}")
    plan = plan_graph(GraphRequest(graph=g))
    assert plan.stages[0].replicas == 8
    assert 0 < plan.headroom < 1 / 7 + 0.03
    shown = [cell.text for row in latencies.predicted(plan).rows for cell in row]
    assert shown[3] == "no answer"  # p99: more than 1 % get none


def test_a_full_queue_blocks_what_the_chain_says() -> None:
    """M/M/4 with room for 8: exactly; at twice the capacity at least half; and batches of a queue four times as long none."""
    (work,) = asked(graph(f"a: {{{law('360ms')}, queue: {{limit: 2}}}}")).works.values()
    assert isinstance(work, Served)
    assert work.blocked(4, 10.0) == pytest.approx(mmck(10.0, 0.36, 4, 12).p_blocked, rel=1e-6)
    assert work.blocked(4, 4 / 0.36 * 2) >= 0.5 - 1e-12
    (batched,) = asked(graph(f"a: {{{law('10ms', 'gamma', 0.2, '5ms')}, batching: {{max: 8}}, queue: {{limit: 32}}}}")).works.values()
    assert isinstance(batched, Served)
    assert batched.blocked(1, 0.8 * batched.capacity_per_s(1)) < 1e-4


def test_a_graph_whose_cache_answers_everybody_is_planned() -> None:
    """One replica stands there, nobody comes, and nobody takes any time."""
    plan = plan_graph(GraphRequest(graph=graph(f"a: {{{law('10ms')}, cache: {{hit: 100%, source: x}}}}")))
    (stage,) = plan.stages
    assert (stage.replicas, stage.visits, stage.calls, stage.utilisation) == (1, 1.0, 0.0, 0.0)
    assert plan.predicted["e2e_p99_s"] == 0.0
    assert plan.headroom > 100


def test_a_load_that_is_a_slip_of_a_unit_is_refused() -> None:
    """20 h for 20 ms: a hundred of them a second are 7.2 million at once."""
    with pytest.raises(BadInput, match=r"stage a: 100/s of 20\.0 h each ask for 9,000,000 replicas, and 100,000 can be planned for"):
        plan_graph(GraphRequest(graph=graph(f"a: {{{law('20h')}}}", rate=100, headroom="20%", slo="{e2e_p95: 300h}")))


# ---------------------------------------------------------------- models that stand in, race, or work unseen


def test_a_model_that_only_stands_in_is_planned() -> None:
    """Hardly any answer of `large` takes 20 s: `small` is sized for one request in a thousand, and said to be."""
    g = graph(f"large: {{{model()}, timeout: 20s, fallback: {{to: small}}}}\nsmall: {{{model()}}}", rate=2, entry="large")
    plan = plan_graph(GraphRequest(graph=g))
    assert {s.stage: s.replicas for s in plan.stages} == {"large": 1, "small": 1}
    assert any(line.startswith(f"small: no request is expected there; it is sized for {100 * FEW:g} %") for line in plan.assumptions)


def test_a_model_is_sized_for_what_times_out_before_it() -> None:
    """Half of the answers are longer than the time `large` has: `small` gets that half, in the equations as in its own plan."""
    long_answers = model("{dist: lognormal, mean: 400, cv: 1.0, max: 4000}")
    g = graph(f"large: {{{long_answers}, timeout: 2s, fallback: {{to: small}}}}\nsmall: {{{model()}}}", rate=2, entry="large")
    p = asked(g)
    late = p.works["large"].longer(2.0)
    assert 0.2 < late < 0.9
    assert p.flow["small"].calls == pytest.approx(late)
    assert p.works["small"].traffic.rate_per_s == pytest.approx(2 * late)  # type: ignore[union-attr]


def test_a_model_that_nobody_waits_for_keeps_no_limit_of_those_who_wait() -> None:
    g = graph(f"a: {{{law('5ms')}, next: sum}}\nsum: {{{model()}, async: true, next: b}}\nb: {{{law('5ms')}}}", slo="{e2e_p95: 100ms}")
    assert all(limit.limit > 1e6 for limit in needed_alone(g, g.stage("sum"), 1.0))
    waited = graph(f"a: {{{law('5ms')}, next: sum}}\nsum: {{{model()}}}", slo="{e2e_p95: 100ms}")
    assert needed_alone(waited, waited.stage("sum"), 1.0) == (Limit(metric="e2e", stat="p95", limit=0.1),)
    plan = plan_graph(GraphRequest(graph=g))
    assert plan.predicted["e2e_p95_s"] < 0.1
    assert "nobody waits for b either: requests come there by an async stage alone" in plan.assumptions
    with pytest.raises(BadInput, match="tpot needs a stage that writes tokens, and nobody waits for the one there is"):
        graph(f"a: {{{law('5ms')}, next: sum}}\nsum: {{{model()}, async: true}}", slo="{tpot_p99: 50ms}")


@dataclass
class Model:
    """A language model of which every answer is like the others."""

    stage: Stage
    delay: Delay

    def visits(self, *_: object) -> Visits:
        """Return that answer for everybody."""
        e2e_s, ttft_s, tpot_s = (np.full(SAMPLES, float(x[0])) for x in (self.delay.e2e_s, self.delay.ttft_s, self.delay.tpot_s))
        return Visits(e2e_s=e2e_s, ttft_s=ttft_s, tpot_s=tpot_s)


def test_the_tokens_of_a_race_are_those_of_the_model_that_wins() -> None:
    """One of two models is enough: 0.2 s to the first token and 1 s in all, by simulation and theory, whichever stands first."""
    delays = {name: Delay(ttft_s=np.array([t]), tpot_s=np.array([g]), e2e_s=np.array([e])) for name, t, g, e in (
        ("fast", 0.2, 0.01, 1.0), ("slow", 0.8, 0.05, 3.0))}  # fmt: skip
    for order in ("fast, slow", "slow, fast"):
        g = graph(f"a: {{parallel: [{order}], join: {{k: 1, of: 2}}}}\nfast: {{{law('1s')}}}\nslow: {{{law('1s')}}}")
        played = play(g, delays, np.arange(0.0, 50.0, 5.0))
        assert played.first_s - played.due_s == pytest.approx(0.2)
        assert played.tpot_s == pytest.approx(0.01)
        models: Any = {name: Model(g.stage(name), delay) for name, delay in delays.items()}
        made = estimate(g, models, dict.fromkeys(delays, 1), 1.0, 1.0).whole
        assert (made.value("ttft", "p50"), made.value("tpot", "p50"), made.value("e2e", "p50")) == pytest.approx((0.2, 0.01, 1.0))


def test_the_tokens_of_an_async_model_are_nobodys() -> None:
    """An answer of 1 s, its first token after 0.2 s; a summary of it for the log takes 3 s more."""
    g = graph(f"a: {{{law('1s')}, next: log}}\nlog: {{{law('1s')}, async: true}}")
    delays = {name: Delay(ttft_s=np.array([t]), tpot_s=np.array([g]), e2e_s=np.array([e])) for name, t, g, e in (
        ("a", 0.2, 0.01, 1.0), ("log", 0.8, 0.05, 3.0))}  # fmt: skip
    played = play(g, delays, np.arange(0.0, 50.0, 5.0))
    assert played.first_s - played.due_s == pytest.approx(0.2)
    assert played.tpot_s == pytest.approx(0.01)
