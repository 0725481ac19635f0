"""The search over designs: its bounds hold, nothing cheaper is passed over, engine settings and layouts are found, traces are replayed."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import hardware, latency, models, simulate, slo, stats, summary, workload
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.plan import Request, candidates, confirm, demand, mixed, plan, planner, screen, search, sizing, words
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.trial import BATCHES, Trial, of_tracks
from mlsys_bench.simulate import core
from mlsys_bench.types import SLO, Plan

CHAT = workload.synthetic(50, prompt="lognormal:1155:0.96:8192", output="lognormal:211:0.77:1024")


def request(**changes: object) -> Request:
    base = Request(
        model="llama-3-8b", workload=CHAT, slo=slo.parse("ttft_p95<500ms,tpot_p99<50ms"), gpus=("h100-sxm", "l40s", "a100-80gb-sxm")
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


# ---------------------------------------------------------------- bounds


@settings(max_examples=12, deadline=None)
@given(
    gpu=st.sampled_from(("h100-sxm", "a100-80gb-sxm", "l40s", "b200-sxm", "mi300x")),
    model=st.sampled_from(("llama-3-8b", "mixtral-8x7b", "qwen3-30b-a3b")),
    prompt=st.sampled_from(("64", "lognormal:1155:0.96:8192", "lognormal:4000:1:16000")),
    output=st.sampled_from(("2", "lognormal:211:0.77:1024", "800")),
    seqs=st.sampled_from((8, 64, 256)),
)
def test_no_replica_does_better_than_its_bound(gpu: str, model: str, prompt: str, output: str, seqs: int) -> None:
    arch, device = models.find(model), hardware.find(gpu)
    profile = latency.roofline(arch, device, precision="bf16", tp=2)
    limits = Limits(seqs, 2048, 16, 20_000, 32_768)
    served = demand.of(workload.synthetic(1, prompt=prompt, output=output)).fitting(limits)
    replica = Replica(profile, limits, served)
    assert replica.capacity_per_s <= screen.most_per_s(profile, limits, served)
    at_rest = replica.predict(1e-3 * replica.capacity_per_s)
    alone = screen.alone(profile, limits, served)
    for metric in ("ttft", "tpot", "e2e"):
        told, seen = alone.value(metric, "p95"), at_rest.value(metric, "p95")
        assert told is not None
        assert seen is not None
        assert told <= search.SURELY * seen, metric


@pytest.mark.parametrize("limits", ["ttft_p95<500ms,tpot_p99<50ms", "ttft_p95<300ms,tpot_p99<14ms"])
def test_nothing_that_is_passed_over_would_be_cheaper(limits: str) -> None:
    """By theory, over every candidate and setting: exhaustive sizing against the search."""
    asked = request(slo=slo.parse(limits), precisions=("bf16",), max_batch=128)
    fitting, misfits = candidates.every(asked)
    bounds, _ = search.bounds(asked, fitting, demand.of(asked.workload))
    found = search.search(asked, bounds, misfits, planner.CONFIRMED)
    everything = []
    for bound in bounds:
        for setting in (bound.candidate, *candidates.settings(asked, bound.candidate, batches=False)):
            replica = Replica(setting.profile, setting.limits, bound.demand)
            design = sizing.size(setting, replica, asked.slo, asked.workload.rate_per_s, asked.headroom, asked.shelf)
            everything += [design] if design is not None else []
    best = min(everything, key=sizing.Design.sort_key)
    assert best.price is not None
    assert found.designs[0].price is not None
    assert found.designs[0].price.usd_per_h == pytest.approx(best.price.usd_per_h)
    assert len(found.passed_over) > 0


def test_what_has_a_price_comes_before_what_has_none_whatever_its_number() -> None:
    """GH200 is let singly: replicas of two have no price, and no number of single ones ever comes after them."""
    asked = request(gpus=("gh200-96gb",))
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], demand.of(CHAT))
    priced = next(bound for bound in bounds if bound.price is not None)
    unpriced = next(bound for bound in bounds if bound.price is None)
    assert search._most(asked, priced, unpriced.sort_key()) is None
    most = search._most(asked, priced, sizing.rank(priced.candidate, sizing.price(priced.candidate, 90, asked.shelf), 90))
    assert most == 89


def test_a_sample_of_a_huge_fleet_gets_its_share_of_arrivals_of_any_law() -> None:
    asked = request(
        workload=workload.synthetic(1e6, arrivals="gamma:2", prompt="100", output="10"), gpus=("h100-sxm",), precisions=("bf16",)
    )
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], demand.of(asked.workload))
    design = sizing.resized(search.search(asked, bounds[:1], (), 1).designs[0], 100_000, asked.shelf)
    mine = confirm.of_sample(design, asked.workload, 1, 1500, seed=1).scheduled_s
    assert len(mine) == 1500
    gaps = np.diff(mine)
    assert 1 / gaps.mean() == pytest.approx(design.each_per_s, rel=4 / 1500**0.5)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(1.0, abs=0.3)  # one request of a hundred thousand: Poisson


def test_smaller_steps_are_found_where_gaps_between_tokens_must_be_short() -> None:
    """With 2,048 prompt tokens in a step a gap is long at p99; with 512 it is shorter, and fewer replicas do."""
    asked = request(
        gpus=("h100-sxm",), precisions=("bf16",), slo=slo.parse("itl_p99<20ms"), workload=dataclasses.replace(CHAT, rate_per_s=100)
    )
    fixed = dataclasses.replace(asked, max_batch=256, max_step_tokens=2048)
    costs = []
    for each in (asked, fixed):
        fitting, misfits = candidates.every(each)
        bounds, _ = search.bounds(each, fitting, demand.of(each.workload))
        costs.append(search.search(each, bounds, misfits, 3).designs[0])
    searched, default = costs
    assert searched.candidate.limits.max_step_tokens < 2048
    assert searched.price is not None
    assert default.price is not None
    assert searched.price.usd_per_h < default.price.usd_per_h


# ---------------------------------------------------------------- layouts


def test_experts_may_be_shared_out_with_attention_copied() -> None:
    """DeepSeek-R1 on 8 H200: experts are spread either way, attention is whole on each rank, so less is left for the cache of one."""
    fitting, _ = candidates.every(request(model="deepseek-r1", gpus=("h200-sxm",), precisions=("fp8",)))
    split, shared = sorted(fitting, key=lambda c: c.layout.ep)
    assert (split.layout.tp, split.devices, split.name) == (8, 8, "H200-SXM fp8 tp 8")
    assert (shared.layout.ep, shared.layout.attention_dp, shared.devices, shared.name) == (8, 8, 8, "H200-SXM fp8 dp 8 ep 8")
    assert shared.kv_tokens > 4 * split.kv_tokens, "a latent cache is whole on each rank of tp 8, and apart on ranks of their own"


def test_a_model_larger_than_a_node_gets_several_nodes_in_a_row() -> None:
    asked = request(model="deepseek-r1", gpus=("a100-80gb-sxm",), precisions=("bf16",))
    fitting, misfits = candidates.every(asked)
    assert [c.name for c in fitting] == ["A100-80GB-SXM bf16 tp 8 pp 4"]
    assert any(m.name == "A100-80GB-SXM bf16 tp 8" for m in misfits)
    found = sizing.price(fitting[0], 2, asked.shelf)
    assert found is not None
    assert found.devices == 2 * 32


def test_precisions_are_searched_where_none_is_named() -> None:
    fitting, _ = candidates.every(request(gpus=("h100-sxm",)))
    assert {c.precision for c in fitting} == {"bf16", "fp8"}


# ---------------------------------------------------------------- traces


def trace() -> workload.Schedule:
    return workload.schedule(dataclasses.replace(CHAT, rate_per_s=60.0, arrivals="gamma:2"), n=700, seed=3)


def replayed() -> Request:
    law = dataclasses.replace(CHAT, rate_per_s=60.0)
    return request(
        gpus=("l40s",), precisions=("bf16",), max_batch=64, max_step_tokens=2048, headroom=0.0, workload=law, trace=trace(),
        slo=slo.parse("ttft_p95<350ms,tpot_p99<120ms"),
    )  # fmt: skip


def test_a_trace_that_is_over_before_its_fleet_has_begun_is_refused() -> None:
    """700 requests within a nanosecond keep no billions of replicas busy; simulating those never ended."""
    short = workload.sped_up(trace(), 1e10)
    law = dataclasses.replace(CHAT, rate_per_s=workload.rate_per_s(short))
    with pytest.raises(BadInput, match=r"700 requests in .* ns, .* it is over before most of them see one; play it slower"):
        plan(dataclasses.replace(replayed(), workload=law, trace=short))


def test_the_fleet_of_a_trace_serves_it_and_one_replica_fewer_does_not() -> None:
    """Held against the public simulator, request by request."""
    left_out = "12 requests without prompt or output tokens (failed) left out, also of the rate"
    asked = dataclasses.replace(replayed(), trace=dataclasses.replace(trace(), notes=(left_out,)))
    found = plan(asked)
    assert left_out in found.notes
    (candidate,) = [c for c in candidates.every(asked)[0] if c.layout == found.profile.layout]

    def p95_and_p99(replicas: int) -> tuple[float, float]:
        run = simulate.run(trace(), candidate.profile, candidate.limits, replicas=replicas, routing="random", seed=0)
        ok = [r for r in run.requests if r.outcome == "ok"]
        per_token = [t for r in ok if (t := summary.tpot_s(r)) is not None]
        return stats.quantile([summary.ttft_s(r) or 0.0 for r in ok], 0.95), stats.quantile(per_token, 0.99)

    ttft_s, tpot_s = p95_and_p99(found.replicas)
    assert ttft_s < 0.35
    assert tpot_s < 0.12
    assert found.predicted["ttft_p95_s"] == pytest.approx(ttft_s, rel=0.02)
    fewer = p95_and_p99(found.replicas - 1)
    assert fewer[0] >= 0.35 or fewer[1] >= 0.12
    assert 0 <= found.headroom <= 1 / (found.replicas - 1)
    assert found.analytic == {}


@pytest.mark.parametrize(("routing", "seed"), [("random", 0), ("power_of_two", 1)])
def test_a_trace_keeps_its_limits_whatever_the_router_s_luck(routing: str, seed: int) -> None:
    """The limit lies between what the first luck shows and what the others do: the plan's fleet keeps it with all, one smaller does not."""
    asked = dataclasses.replace(replayed(), routing=routing, seed=seed)
    bounds, _ = search.bounds(asked, candidates.every(asked)[0], demand.of_trace(trace()))

    def seen(made: Plan, replicas: int, limits: SLO) -> list[float]:
        (design,) = [d for d in search.search(asked, bounds, (), 99).designs if d.candidate.layout == made.profile.layout]
        each = sizing.resized(design, replicas, asked.shelf)
        return [confirm.worst(confirm.replay(each, trace(), routing, seed + luck), limits) for luck in range(confirm.LUCKS)]

    usual = plan(asked)
    first, *others = seen(usual, usual.replicas, slo.parse("ttft_p99<1s"))
    assert first < max(others), "the first luck must not be the worst"
    tight = slo.parse(f"ttft_p99<{(first + max(others)) / 2:.9g}s")
    found = plan(dataclasses.replace(asked, slo=tight))
    assert max(seen(found, found.replicas, tight)) < 1
    assert max(seen(found, found.replicas - 1, tight)) >= 1
    assert any(f"kept with each of {confirm.LUCKS} lucks of the router" in line for line in found.assumptions)


def test_runs_of_several_lucks_are_judged_by_the_worst_and_shown_together() -> None:
    limits = slo.parse("ttft_p50<1s")

    def run(ttft_s: float) -> Trial:
        batch = Latencies(ttft_s=np.full(9, ttft_s), tpot_s=np.full(9, 0.1), e2e_s=np.full(9, ttft_s), itl_s=np.full(9, 0.1))
        return Trial(batches=(batch,) * BATCHES, tokens_per_s=(ttft_s,) * BATCHES, requests_per_s=(1.0,) * BATCHES, preempted=ttft_s / 10)

    def judged(by_seed: dict[int, float], routing: str = "random") -> Trial:
        return confirm.by_luck(lambda seed: run(by_seed[seed]), request(routing=routing, seed=5, slo=limits))

    three = judged({5: 0.8, 6: 1.2, 7: 0.9})
    assert (three.runs, confirm.worst(three, limits)) == (3, pytest.approx(1.2))
    assert three.keys(limits)["ttft_p50_s"] == 0.9
    assert (three.preempted, three.keys(limits)["throughput_tokens_per_s"]) == (pytest.approx(0.29 / 3), pytest.approx(2.9 / 3))
    assert [each.keys(limits)["ttft_p50_s"] for each in three.apart()] == [0.8, 1.2, 0.9]
    assert judged({5: 0.7}).runs == 1, "far from its limit"
    assert judged({5: 1.01}).runs == 1, "misses it already"
    assert judged({5: 0.9}, "least_loaded").runs == 1, "draws nothing"


def test_a_plan_names_the_router_it_was_asked_for() -> None:
    (line,) = [x for x in plan(request(routing="least_loaded", gpus=("h100-sxm",))).assumptions if "own queue" in x]
    assert line.endswith(", routed least_loaded")


def test_a_router_that_looks_at_load_needs_no_more_replicas_than_chance() -> None:
    """16 seats and a limit that chance breaks first."""
    tight = request(
        gpus=("h100-sxm",), precisions=("bf16",), max_batch=16, max_step_tokens=2048, headroom=0.0, slo=slo.parse("ttft_p99<250ms"),
        workload=dataclasses.replace(CHAT, rate_per_s=20.0),
    )  # fmt: skip
    chance, loads = (plan(dataclasses.replace(tight, routing=routing)).replicas for routing in ("random", "least_loaded"))
    assert loads < chance


def test_an_unknown_routing_is_refused_with_its_neighbour() -> None:
    with pytest.raises(UnknownName, match="unknown routing 'least-loaded'; did you mean least_loaded"):
        plan(request(routing="least-loaded"))


def test_what_a_trial_says_is_what_the_records_of_the_same_run_say() -> None:
    schedule = trace()
    profile = latency.roofline(models.find("llama-3-8b"), hardware.find("h100-sxm"), precision="bf16")
    limits = Limits(32, 1024, 16, 4000, 16_384)
    tracks = core.play(schedule, limits, profile=profile, replicas=3, routing="random", seed=1, keep_tokens=True)
    run = simulate.run(schedule, profile, limits, replicas=3, routing="random", seed=1)
    found = of_tracks(tracks, schedule, [(0, 300), (300, 700)], 3, latency.overhead(profile))
    gaps = [b - a for r in run.requests[300:] for a, b in itertools.pairwise(r.token_s)]
    assert np.sort(found.batches[1].itl_s) == pytest.approx(np.sort(gaps), abs=1e-9)
    assert found.batches[0].ttft_s == pytest.approx([summary.ttft_s(r) for r in run.requests[:300]], abs=1e-9)
    per_token = [np.nan if (t := summary.tpot_s(r)) is None else t for r in run.requests]
    assert found.all.tpot_s == pytest.approx(np.array(per_token), abs=1e-9, nan_ok=True)


def test_a_limit_that_one_request_keeps_and_an_idle_replica_misses_is_told_so() -> None:
    """It read '392 ms > 400 ms at any replica count'."""
    limits = slo.parse("ttft_p99<400ms")
    alone = Latencies(ttft_s=np.array([0.392]), tpot_s=np.array([0.01]), e2e_s=np.array([2.0]), itl_s=np.array([0.01]))
    late = dataclasses.replace(alone, ttft_s=np.array([0.6]))
    assert words._exceeds(alone, 1.0, limits[0], limits) == "ttft_p99 392 ms alone, beyond 400 ms beside others"
    assert words._exceeds(late, 1.5, limits[0], limits) == "ttft_p99 600 ms > 400 ms"


# ---------------------------------------------------------------- several kinds


def test_the_program_finds_the_cheapest_assignment_of_buckets() -> None:
    """Against all 3^4 assignments, replicas rounded up per pool: buckets of one kind that others separate are two pools."""
    rng = np.random.default_rng(5)
    for _ in range(20):
        usd, rates = rng.uniform(1, 5, 3), rng.uniform(0.5, 20, 4)
        carried = rng.uniform(0.5, 8, (3, 4)) * (rng.random((3, 4)) < 0.85)
        carried[0] = np.maximum(carried[0], 0.3)

        def cost(chosen: tuple[int, ...], usd=usd, rates=rates, carried=carried) -> float:  # type: ignore[no-untyped-def]
            if any(carried[g, b] <= 0 for b, g in enumerate(chosen)):
                return float("inf")
            runs = [(g, [b for b, _ in run]) for g, run in itertools.groupby(enumerate(chosen), key=lambda pair: pair[1])]
            return float(sum(usd[g] * np.ceil(sum(rates[b] / carried[g, b] for b in buckets) - 1e-9) for g, buckets in runs))

        best = min(cost(chosen) for chosen in itertools.product(range(3), repeat=4))
        found = mixed.assign(usd, carried, rates)
        assert found is not None
        assert cost(tuple(found)) == pytest.approx(best)


def test_of_a_device_the_candidate_that_carries_most_takes_part() -> None:
    """34/s are 1.6 H100 in bf16, 1.2 in FP8, and cost two in either: with one in FP8 an L40S is enough for the rest, $4.50 for $5.90."""
    traffic = workload.synthetic(34, prompt="lognormal:1000:2", output="200")
    asked = request(workload=traffic, slo=slo.parse("ttft_p95<1s,tpot_p95<100ms"), gpus=("h100-sxm", "l40s"), precisions=("bf16", "fp8"))
    fitting, misfits = candidates.every(asked)
    bounds, _ = search.bounds(asked, fitting, demand.of(traffic))
    single = search.search(asked, bounds, misfits, 3).designs[0]
    found = mixed.mixed(asked, bounds, single)
    assert single.price is not None
    assert found is not None
    assert (single.price.usd_per_h, round(found.usd_per_h, 2)) == (5.90, 4.50)
    assert [pool.design.candidate.precision for pool in found.pools] == ["fp8", "fp8"]


def test_pools_share_out_all_prompts_once_and_cost_less_than_one_kind() -> None:
    """Two H100 are more than 16 requests a second need, one is too few; an L40S takes the longest prompts off it."""
    traffic = workload.synthetic(16, prompt="lognormal:2500:1.5:30000", output="lognormal:60:0.5:256")
    asked = request(
        workload=traffic, slo=slo.parse("ttft_p95<2s"), gpus=("h100-sxm", "l40s"), precisions=("bf16",), max_batch=64, max_step_tokens=2048
    )
    fitting, misfits = candidates.every(asked)
    bounds, _ = search.bounds(asked, fitting, demand.of(traffic))
    single = search.search(asked, bounds, misfits, 3).designs[0]
    found = mixed.mixed(asked, bounds, single)
    assert found is not None
    assert single.price is not None
    assert found.usd_per_h < single.price.usd_per_h
    assert {pool.design.candidate.gpu for pool in found.pools} == {"H100-SXM", "L40S"}
    assert sum(pool.share for pool in found.pools) == pytest.approx(single.replica.demand.share)
    assert (found.pools[0].above_tokens, found.pools[-1].most_tokens) == (0.0, float("inf"))
    assert all(one.most_tokens == after.above_tokens for one, after in itertools.pairwise(found.pools))
