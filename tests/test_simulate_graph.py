"""The simulated stage graph against what is known exactly: queues, losses, forks, caches, retries, and what constants force."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlsys_bench.plan.graph.work import served
from mlsys_bench.queueing import erlang_c
from mlsys_bench.queueing.batches import batches
from mlsys_bench.queueing.networks import tandem_of_mmc
from mlsys_bench.scenario import flows
from mlsys_bench.simulate.graph import Delay, Played, play
from mlsys_bench.stages import StageGraph
from mlsys_bench.workload import arrival_times
from tests.stage_graphs import graph, law

WARM = 0.1


def run(g: StageGraph, n: int = 12_000, seed: int = 0, **servers: int) -> Played:
    """Play n requests, every stage with one replica unless said otherwise."""
    stations = {s.name: served(s, None).station(servers.get(s.name, 1), 0.0) for s in g.stages if s.service}
    due = arrival_times(g.workload.rate_per_s, g.workload.arrivals, n=n, seed=seed)
    return play(g, stations, due, seed)


def took_s(played: Played) -> np.ndarray:
    times = played.done_s - played.due_s
    return times[int(WARM * len(times)) :]


STUDENT = 6.869  # the 99.9 % point (two-sided) of Student's law with 5 degrees of freedom: six runs each


def holds(values: list[float], truth: float) -> bool:
    """Say whether the truth lies within the 99.9 % interval of the mean of six independent runs."""
    assert len(values) == 6
    return abs(np.mean(values) - truth) <= STUDENT * np.std(values, ddof=1) / math.sqrt(6)


def test_one_stage_waits_as_erlang_says() -> None:
    """M/M/3 at 80 %: mean sojourn by Erlang C."""
    g = graph(f"a: {{{law('240ms')}}}")
    truth = erlang_c(3, 2.4) * 0.24 / (3 - 2.4) + 0.24
    assert holds([float(took_s(run(g, seed=s, a=3)).mean()) for s in range(6)], truth)


def test_two_stages_in_line_have_the_product_form() -> None:
    """Mean and p99 of M/M/2 then M/M/1 are those of the independent sum."""
    g = graph(f"a: {{{law('140ms')}, next: b}}\nb: {{{law('60ms')}}}")
    whole = tandem_of_mmc(10.0, ((0.14, 2), (0.06, 1)))[0]
    runs = [took_s(run(g, seed=s, a=2)) for s in range(6)]
    assert holds([float(r.mean()) for r in runs], whole.sojourn_s)
    assert holds([float(np.quantile(r, 0.99)) for r in runs], whole.sojourn_quantile_s(0.99))


def test_a_full_queue_turns_away_what_the_chain_says() -> None:
    """M/M/1 with 3 waiting places: the loss is that of five states."""
    g = graph(f"a: {{{law('90ms')}, queue: {{limit: 3}}}}")
    rho = 0.9
    truth = (1 - rho) * rho**4 / (1 - rho**5)
    runs = [run(g, seed=s) for s in range(6)]
    assert holds([r.stages["a"].rejected / len(r.due_s) for r in runs], truth)
    assert all(np.isinf(r.done_s).sum() == r.stages["a"].rejected for r in runs)


def test_a_fork_waits_for_the_slower_branch_as_flatto_and_hahn_say() -> None:
    """Two M/M/1 branches fed together: mean (12 - rho) / 8 times that of one."""
    g = graph(f"a: {{parallel: [b, c]}}\nb: {{{law('70ms')}}}\nc: {{{law('70ms')}}}")
    truth = (12 - 0.7) / 8 * 0.07 / (1 - 0.7)
    assert holds([float(took_s(run(g, seed=s)).mean()) for s in range(6)], truth)


def test_shards_of_a_stage_are_such_a_fork() -> None:
    g = graph(f"a: {{{law('70ms')}, shards: 2}}")
    truth = (12 - 0.7) / 8 * 0.07 / (1 - 0.7)
    assert holds([float(took_s(run(g, seed=s)).mean()) for s in range(6)], truth)


def test_batches_are_those_of_the_exact_chain() -> None:
    """One server, up to 8 at once, none waits for others: batch sizes and mean sojourn."""
    g = graph(f"a: {{{law('10ms', 'constant', per_item='2ms')}, batching: {{max: 8}}}}", rate=150)
    truth = batches(150.0, fixed_s=0.010, per_request_s=0.002, max_batch=8)
    runs = [run(g, seed=s) for s in range(6)]
    assert holds([float(took_s(r).mean()) for r in runs], truth.sojourn_s)
    assert holds([r.stages["a"].calls / r.stages["a"].batches for r in runs], truth.mean_batch)


def test_a_batch_waits_for_others_no_longer_than_it_may() -> None:
    """At 1/s and a wait of 100 ms nearly everyone waits 100 ms and is served alone."""
    g = graph(f"a: {{{law('10ms', 'constant', per_item='1ms')}, batching: {{max: 4, wait: 100ms}}}}", rate=1, arrivals="constant")
    assert took_s(run(g, n=50)) == pytest.approx(0.111)


def test_a_cache_before_the_work_skips_it_and_a_cache_of_its_own_is_looked_up() -> None:
    before = run(graph(f"a: {{{law('20ms', 'constant')}, cache: {{hit: 30%, source: assumed}}}}", rate=1, arrivals="constant"), n=4000)
    assert set(np.round(before.done_s - before.due_s, 9)) == {0.0, 0.02}
    own = run(
        graph(
            f"""
            a: {{{law('20ms', 'constant')}, cache: {{hit: 30%, on_miss: b, source: assumed}}}}
            b: {{{law('50ms', 'constant')}}}
            """,
            rate=1, arrivals="constant",
        ),
        n=4000,
    )  # fmt: skip
    assert set(np.round(own.done_s - own.due_s, 9)) == {0.02, 0.07}
    for played in (before, own):
        assert abs(played.stages["a"].hits - 1200) < 4 * math.sqrt(4000 * 0.3 * 0.7)


def test_a_join_goes_on_with_enough_answers_once_its_time_is_up() -> None:
    """Branches of 10, 30 and 90 ms; two of three suffice after 50 ms, at once, or never."""
    stages = "a: {{parallel: [b, c, d]{join}, next: e}}\n" + "\n".join(
        f"{name}: {{{{{law(mean, 'constant').replace('{', '{{').replace('}', '}}')}}}}}"
        for name, mean in (("b", "10ms"), ("c", "30ms"), ("d", "90ms"), ("e", "1ms"))
    )
    for join, ends in ((", join: {k: 2, of: 3, by: 50ms}", 0.051), (", join: {k: 2, of: 3}", 0.031), (", join: all", 0.091)):
        g = graph(stages.format(join=join), rate=1, arrivals="constant")
        assert took_s(run(g, n=20)) == pytest.approx(ends)


def test_what_nobody_waits_for_any_more_is_still_finished() -> None:
    """A call of 2 s times out after 0.5 s; the server works on, and the fallback answers."""
    g = graph(
        f"a: {{{law('2s', 'constant')}, timeout: 500ms, fallback: {{to: b}}}}\nb: {{{law('10ms', 'constant')}}}",
        rate=0.25, arrivals="constant",
    )  # fmt: skip
    played = run(g, n=20)
    assert played.done_s - played.due_s == pytest.approx(0.51)
    assert played.stages["a"].busy_s == pytest.approx(40.0)
    assert (played.stages["a"].timed_out, played.stages["a"].fell_back) == (20, 20)


def test_a_request_that_times_out_in_the_queue_leaves_it() -> None:
    """Three come at once to one server of 1 s and wait 1.5 s at most: the third is never served."""
    g = graph(f"a: {{{law('1s', 'constant')}, timeout: 1.5s}}")
    station = {"a": served(g.stages[0], None).station(1, 0.0)}
    played = play(g, station, np.array([0.0, 0.0, 0.0, 10.0]))
    assert played.done_s.tolist() == [1.0, math.inf, math.inf, 11.0]
    assert played.stages["a"].busy_s == pytest.approx(3.0)  # the second was at work when its time was up


def test_retries_repeat_what_fails_and_no_more_than_their_budget() -> None:
    """A third of the attempts fail: 1 + f + f^2 calls, f^3 of the requests lost; with a budget of 10 % no more than that."""
    fails = f"{law('1ms', 'constant')}, failure: {{p: 0.3, source: assumed}}"
    free = run(graph(f"a: {{{fails}, retries: {{max: 2, backoff: 10ms}}}}", rate=1, arrivals="constant"))
    n = len(free.due_s)
    assert abs(free.stages["a"].calls / n - 1.39) < 4 * math.sqrt(0.3 / n)
    assert abs(np.isinf(free.done_s).mean() - 0.027) < 4 * math.sqrt(0.027 / n)
    second = np.sort(free.done_s - free.due_s)
    assert {round(x, 6) for x in (second[0], *second[np.isfinite(second)][-1:])} == {0.001, 0.033}  # twice a backoff, doubled
    tight = run(graph(f"a: {{{fails}, retries: {{max: 2, budget: 10%}}}}"))
    assert tight.stages["a"].retried <= 0.1 * n + 1
    assert tight.stages["a"].retried > 0.09 * n


def test_a_hedge_takes_the_first_answer() -> None:
    """A delay of 1 s for one in two, 10 ms else; a second try after 20 ms halves the slow ones."""
    g = graph("a: {service: {measured: {file: gone.json}}, hedge: {after: 20ms}, resources: {vcpu: 1}}".replace(
        "service: {measured: {file: gone.json}}", law("1s", "constant").rpartition(", resources")[0]))  # fmt: skip
    delay = Delay(ttft_s=np.array([0.01, 1.0]), tpot_s=np.array([np.nan, np.nan]), e2e_s=np.array([0.01, 1.0]))
    played = play(g, {"a": delay}, np.arange(4000.0), seed=3)
    took = np.round(played.done_s - played.due_s, 6)
    assert set(took) == {0.01, 0.03, 1.0}
    assert abs((took == 1.0).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)


def test_nobody_waits_for_an_async_stage() -> None:
    g = graph(f"a: {{{law('10ms', 'constant')}, next: b}}\nb: {{{law('5s', 'constant')}, async: true}}", rate=0.1, arrivals="constant")
    played = run(g, n=20)
    assert played.done_s - played.due_s == pytest.approx(0.01)
    assert played.stages["b"].busy_s == pytest.approx(100.0)


def test_the_first_token_is_that_of_the_last_model_visited() -> None:
    """A draft of 1 s, then a final answer whose first token comes 0.2 s after 1 s; a check of 0.1 s follows."""
    g = graph(f"a: {{{law('1s', 'constant')}, next: b}}\nb: {{{law('1s', 'constant')}, next: c}}\nc: {{{law('100ms', 'constant')}}}")
    models = {n: Delay(ttft_s=np.array([0.2]), tpot_s=np.array([0.01]), e2e_s=np.array([1.0])) for n in ("a", "b")}
    stations = {**models, "c": served(g.stage("c"), None).station(1, 0.0)}
    played = play(g, stations, np.arange(0.0, 50.0, 5.0))
    assert played.first_s - played.due_s == pytest.approx(1.2)
    assert played.done_s - played.due_s == pytest.approx(2.1)


EVERYTHING = f"""
a: {{{law("5ms")}, cache: {{hit: 20%, on_hit: done, on_miss: b, source: assumed}}}}
b: {{{law("10ms")}, cache: {{hit: 25%, on_hit: c, source: assumed}}, route: {{to: {{c: 60%, d: 40%}}, source: assumed}}}}
c: {{{law("8ms")}, failure: {{p: 10%, source: assumed}}, retries: {{max: 1}}, fallback: {{to: f}}, next: e}}
d: {{parallel: [g, h], join: {{k: 1, of: 2}}, next: e}}
g: {{{law("3ms")}}}
h: {{{law("4ms")}, next: i}}
i: {{{law("2ms")}, shards: 3}}
e: {{{law("6ms")}, escalate: {{to: b, p: 15%, source: assumed}}, next: f}}
f: {{{law("1ms")}}}
"""


def test_simulated_visits_and_calls_are_those_of_the_routing_equations() -> None:
    """Caches, routes, branches, retries, fallbacks and escalations at once."""
    g = graph(EVERYTHING, rate=20)
    found = flows(g.stages, g.entry)
    runs = [run(g, n=8000, seed=s, a=2, b=2, c=2, e=2) for s in range(4)]
    for stage in g.stages:
        visits = [r.stages[stage.name].visits / len(r.due_s) for r in runs]
        assert abs(np.mean(visits) - found[stage.name].visits) < 5 * math.sqrt(max(found[stage.name].visits, 0.01) * 1.5 / 32_000)
        calls = [r.stages[stage.name].calls / len(r.due_s) for r in runs]
        if stage.service is not None:
            assert abs(np.mean(calls) - found[stage.name].calls) < 5 * math.sqrt(max(found[stage.name].calls, 0.01) * 1.5 / 32_000)


def test_every_request_ends_once_and_a_run_can_be_repeated() -> None:
    g = graph(EVERYTHING, rate=20)
    first, again, other = run(g, n=2000, seed=1, b=2), run(g, n=2000, seed=1, b=2), run(g, n=2000, seed=2, b=2)
    assert np.isfinite(first.done_s).all()
    assert (first.done_s >= first.due_s).all()
    assert (first.done_s == again.done_s).all()
    assert (first.done_s != other.done_s).any()
