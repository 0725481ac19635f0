"""What a first token waits for outside its own steps: one set of constants in `predict`, theory, and both simulators."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from mlsys_bench import hardware, latency, models, predict, simulate, workload
from mlsys_bench.batching import Limits
from mlsys_bench.latency import coefficients, ways
from mlsys_bench.plan import agreement
from mlsys_bench.plan.trial import after_s
from mlsys_bench.predict import Experiment
from mlsys_bench.simulate import Conditions, core
from mlsys_bench.types import LatencyProfile, Lengths

LIMITS = Limits(max_seqs=128, max_step_tokens=2048, block_tokens=16, blocks=20_000, max_context=8192)
H100 = latency.roofline(models.find("llama-3-8b"), hardware.find("h100-sxm"), precision="bf16")
CHAT = workload.synthetic(1.0, prompt="lognormal:512:1.0:4096", output="lognormal:128:1.0:1024")


def with_constants(profile: LatencyProfile, **constants: float) -> LatencyProfile:
    return dataclasses.replace(profile, constants=profile.constants | constants)


def test_a_roofline_says_what_was_learned_and_how_sure_it_is() -> None:
    learned, sd = coefficients.stored()["open"]["coefficients"], dict(zip(coefficients.NAMES, coefficients.spread_log(), strict=True))
    found = latency.overhead(H100)
    assert found.there_s == pytest.approx(learned["first_s"])
    assert found.prompt_token_s == pytest.approx(learned["prompt_token_s"])
    assert found.planned_steps == pytest.approx(learned["wait_steps"] - 0.5)  # half a step is what an arrival finds in progress
    assert found.seconds(1000) == pytest.approx(learned["first_s"] + 1000 * learned["prompt_token_s"])
    wait_sd = sd["wait_steps"] * learned["wait_steps"]  # in steps, the same before and after half of one is taken off
    parts = sd["first_s"] * learned["first_s"], 500 * sd["prompt_token_s"] * learned["prompt_token_s"], wait_sd * 0.02
    assert found.spread_s(500, 0.02) == pytest.approx(math.hypot(*parts))


def test_a_profile_measured_on_a_server_carries_only_what_was_seen() -> None:
    bare = latency.engine_only(H100)
    assert latency.overhead(bare).spread_s(500, 0.02) == 0.0
    assert latency.overhead(bare).seconds(500) == 0.0
    served = with_constants(bare, request_overhead_s=0.004, token_overhead_s=0.001)
    assert latency.overhead(served).seconds(500) == pytest.approx(0.005)
    assert latency.overhead(served).planned_steps == 0.0
    assert latency.step_s(bare, (4, 400, 0, 0, 4)) == latency.step_s(H100, (4, 400, 0, 0, 4))


def test_steps_are_never_planned_ahead_by_less_than_none() -> None:
    logs = coefficients.learned_log().copy()
    logs[coefficients.NAMES.index("wait_steps")] = math.log(0.4)
    found = ways.constants(logs, coefficients.spread_log())
    assert found["planned_steps"] == found["planned_steps_log_sd"] == 0.0


def test_who_finds_the_engine_busy_waits_for_steps_as_long_as_its_own_and_who_finds_it_idle_does_not() -> None:
    schedule = workload.Schedule(
        scheduled_s=np.array([0.0, 0.05, 9.0]), prompt_tokens=np.array([100, 200, 300]), output_tokens=np.array([50, 21, 1])
    )
    outside = latency.overhead(with_constants(H100, prompt_token_s=1e-5, planned_steps=2.0))
    tracks = core.play(schedule, LIMITS, profile=H100)
    late_s = tracks.late_s(schedule.prompt_tokens, outside)
    own_step_s = (tracks.last_s[1] - tracks.first_s[1]) / 20
    assert late_s == pytest.approx([100e-5, 200e-5 + 2 * own_step_s, 300e-5])
    assert after_s(tracks, schedule, outside) == pytest.approx(outside.there_s + outside.back_s + late_s)


def test_both_simulators_add_the_same_on_top_of_the_steps() -> None:
    """Played in one call, and event by event, which a timeout nobody reaches asks for."""
    schedule = workload.schedule(dataclasses.replace(CHAT, rate_per_s=12.0), n=200, seed=3)
    at_once = simulate.run(schedule, H100, LIMITS, replicas=2, routing="round_robin", seed=1)
    events = simulate.run(schedule, H100, LIMITS, replicas=2, routing="round_robin", seed=1, conditions=Conditions(timeout_s=1e6))
    for one, other in zip(at_once.requests, sorted(events.requests, key=lambda r: r.index), strict=True):
        assert one.token_s == pytest.approx(other.token_s, abs=1e-9)
        assert one.done_s == pytest.approx(other.done_s, abs=1e-9)
    without = simulate.run(schedule, with_constants(H100, planned_steps=0.0), LIMITS, replicas=2, routing="round_robin", seed=1)
    later_s = [one.token_s[0] - other.token_s[0] for one, other in zip(at_once.requests, without.requests, strict=True)]
    assert min(later_s) == pytest.approx(0.0, abs=1e-9)
    assert max(later_s) > 0.005  # more than a step of 5 ms


@pytest.mark.parametrize("load", [0.3, 0.6, 0.85])
def test_theory_waits_as_long_as_the_simulation_where_steps_are_planned_ahead(load: float) -> None:
    replica = agreement.of(with_constants(H100, planned_steps=1.5), LIMITS, CHAT)
    found = agreement.compare(replica, CHAT, load, requests=6000, keys=("ttft_p50", "ttft_p95", "ttft_mean"))
    assert [f.key for f in found if not f.agrees(0.1)] == []


@pytest.mark.parametrize(("model", "device", "rate"), [("llama-3-8b", "H100-SXM", 8.0), ("qwen2.5-14b", "A100-80GB-SXM", 2.0)])
def test_predictions_theory_and_simulation_give_one_answer_where_nothing_was_measured(model: str, device: str, rate: float) -> None:
    """One code path: TTFT, time per token and E2E of `predict`, of a plan's theory and of its simulator, for the same requests."""
    e = Experiment(
        key="", group="", model=model, device=device, prompt_tokens=Lengths(mean=500), output_tokens=Lengths(mean=250), rate_per_s=rate,
        arrivals="constant", max_seqs=128, max_step_tokens=2048,
    )  # fmt: skip
    nothing = predict.learn([])
    (found,) = predict.predict([e], nothing)
    traffic = dataclasses.replace(workload.synthetic(rate, prompt="500", output="250"), arrivals="constant")
    replica = agreement.of(predict.profile(e, nothing), LIMITS, traffic)
    theory, seen = replica.predict(rate), agreement.simulated(replica.profile, LIMITS, traffic, 1200, 0)
    for metric, name in (("ttft", "ttft_mean_s"), ("tpot", "itl_mean_s"), ("e2e", "e2e_mean_s")):
        assert float(seen.latencies[metric].mean()) == pytest.approx(found.figures[name][0], rel=0.03), metric
        # theory takes arrivals as Poisson: prompts meet
        assert theory.value(metric, "mean") == pytest.approx(found.figures[name][0], rel=0.08), metric
    physics = latency.roofline(models.find(model), hardware.find(device), precision="bf16")
    ours, theirs = latency.overhead(physics), latency.overhead(replica.profile)
    assert ours.seconds(500) == pytest.approx(theirs.seconds(500))
    assert ours.planned_steps == pytest.approx(theirs.planned_steps)
    assert ours.spread_s(500, 0.02) == pytest.approx(theirs.spread_s(500, 0.02), rel=0.15)
