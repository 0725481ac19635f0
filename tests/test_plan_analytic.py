"""One replica by theory: known answers at rest, properties, and agreement with the simulator of the scheduler."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import hardware, latency, models, simulate, slo, workload
from mlsys_bench.batching import Limits
from mlsys_bench.errors import Overload
from mlsys_bench.plan import agreement, analytic, demand, sizing
from mlsys_bench.plan.analytic import Replica, memory_slots
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.pricing import Shelf, published
from mlsys_bench.simulate import kernel
from mlsys_bench.types import LatencyProfile, Workload

SHELF = Shelf(market=published())

H100 = latency.roofline(models.find("llama-3-8b"), hardware.find("h100-sxm"), precision="bf16")
L4 = latency.roofline(models.find("llama-3-8b"), hardware.find("l4"), precision="bf16")
AMPLE = Limits(max_seqs=64, max_step_tokens=2048, block_tokens=16, blocks=25_000, max_context=8192)
CHAT = workload.synthetic(1, prompt="lognormal:512:1.0:4096", output="lognormal:128:1.0:1024")
LONG = workload.synthetic(1, prompt="lognormal:1155:0.96:8192", output="lognormal:211:0.77:1024")
FIXED = workload.synthetic(1, prompt="256", output="64")


def known(latencies: Latencies, metric: str, stat: str) -> float:
    value = latencies.value(metric, stat)
    assert value is not None
    return value


def overhead_s(profile: LatencyProfile) -> float:
    """Return the time outside the engine of a prompt of 256 tokens."""
    return latency.overhead(profile).seconds(256)


def replica(traffic: Workload, profile: LatencyProfile = H100, limits: Limits = AMPLE) -> Replica:
    return Replica(profile, limits, demand.of(traffic).fitting(limits))


def at_rest_of(one: Replica) -> Latencies:
    """Return what users see of a replica that as good as nobody uses."""
    return one.predict(1e-3 * one.capacity_per_s)


# ---------------------------------------------------------------- demand


def test_the_stratified_sample_has_the_moments_of_the_law() -> None:
    found = demand.of(CHAT)
    assert found.mean_prompt == pytest.approx(workload.mean_tokens(CHAT.prompt_tokens), rel=0.02)
    assert found.mean_output == pytest.approx(workload.mean_tokens(CHAT.output_tokens), rel=0.02)
    assert abs(np.corrcoef(found.prompt, found.output)[0, 1]) < 0.1


def test_a_request_of_fixed_lengths_holds_its_prompt_and_half_its_output() -> None:
    mean, sd = demand.of(FIXED).held_tokens
    assert mean == pytest.approx(256 + 32)
    assert sd == pytest.approx(64 / 12**0.5, rel=1e-3), "uniform over 0 … 64 tokens of output"


def test_memory_slots_by_hand() -> None:
    """100 blocks of 16 hold 1600 tokens; requests hold 288 + 8 each: five and a half on average, less one deviation for chance."""
    assert memory_slots(AMPLE._replace(blocks=100), demand.of(FIXED)) == 5
    assert memory_slots(AMPLE._replace(blocks=1), demand.of(FIXED)) == 0


def test_requests_that_never_fit_are_left_out_and_counted() -> None:
    kept = demand.of(CHAT).fitting(AMPLE._replace(max_context=512))
    assert 0.3 < kept.share < 0.8
    assert (kept.prompt + kept.output).max() <= 512


# ---------------------------------------------------------------- known answers


def test_an_idle_replica_answers_in_the_time_of_one_prefill_step() -> None:
    at_rest = at_rest_of(replica(FIXED))
    prefill_s = latency.step_s(H100, (0, 0, 256, 256**2 / 2, 1))
    assert at_rest.value("ttft", "p50") == pytest.approx(prefill_s + overhead_s(H100), rel=1e-6)


def test_an_idle_replica_decodes_in_the_time_of_a_step_of_one() -> None:
    at_rest = at_rest_of(replica(FIXED))
    decode_s = latency.step_s(H100, (1, 288, 0, 0, 1))
    assert at_rest.value("tpot", "p50") == pytest.approx(decode_s, rel=1e-3)
    assert at_rest.value("itl", "p50") == pytest.approx(decode_s, rel=1e-3)
    assert at_rest.value("e2e", "p50") == pytest.approx(known(at_rest, "ttft", "p50") + 63 * decode_s, rel=1e-3)


def test_the_engine_s_overheads_are_in_ttft_and_e2e_but_not_between_tokens() -> None:
    here_s = H100.constants["request_overhead_s"]
    slow = dataclasses.replace(H100, constants={**H100.constants, "request_overhead_s": 0.2, "token_overhead_s": 0.1 + here_s})
    for metric, more_s in (("ttft", 0.3), ("e2e", 0.3), ("tpot", 0.0)):
        with_s, without_s = (known(at_rest_of(replica(FIXED, p)), metric, "p50") for p in (slow, H100))
        assert with_s - without_s == pytest.approx(more_s, abs=1e-9)


def test_answers_of_one_token_have_no_time_per_token() -> None:
    one = replica(workload.synthetic(1, prompt="256", output="1"))
    found = one.predict(0.5 * one.capacity_per_s)
    assert found.value("tpot", "p99") is None
    assert found.value("itl", "p99") is None
    assert found.value("e2e", "p95") == found.value("ttft", "p95")
    assert found.excesses(slo.parse("tpot_p99<1ms")) == [(0.0, slo.parse("tpot_p99<1ms")[0])]


def test_quantiles_and_shares_of_a_sample_by_hand() -> None:
    sample = Latencies(
        ttft_s=np.array([0.1, 0.2, 0.3, 0.9]),
        tpot_s=np.array([0.01, np.nan, 0.03, 0.01]),
        e2e_s=np.ones(4),
        itl_s=np.array([1.0, 2.0, 3.0]),
        itl_weights=np.array([0.0, 3.0, 1.0]),
    )
    assert sample.value("ttft", "mean") == pytest.approx(0.375)
    assert sample.value("tpot", "p50") == pytest.approx(0.01)
    assert (sample.value("itl", "p50"), sample.value("itl", "p99"), sample.value("itl", "mean")) == (2.0, 3.0, 2.25)
    assert sample.goodput(slo.parse("ttft_p95<500ms,tpot_p99<20ms")) == 0.5
    assert sample.excesses(slo.parse("ttft_p50<500ms,goodput>90%"))[1][0] == pytest.approx(0.25 / 0.1)


# ---------------------------------------------------------------- properties

laws = st.builds(
    lambda prompt, output, cv: workload.synthetic(1, prompt=f"lognormal:{prompt}:{cv}:4000", output=f"lognormal:{output}:{cv}:2000"),
    st.integers(8, 3000),
    st.integers(2, 600),
    st.floats(0.1, 1.5),
)
engines = st.builds(
    lambda seqs, tokens, blocks: Limits(seqs, tokens, 16, blocks, 8192),
    st.integers(1, 128),
    st.sampled_from([128, 512, 2048]),
    st.integers(600, 30_000),
)


@settings(max_examples=12, deadline=None)
@given(laws, engines, st.floats(0.01, 5000), st.floats(0.0, 0.6))
def test_a_design_is_never_unstable_and_keeps_its_headroom(traffic: Workload, limits: Limits, rate_per_s: float, headroom: float) -> None:
    from mlsys_bench.plan.candidates import Candidate

    one = replica(traffic, L4, limits)
    candidate = Candidate(gpu="L4", precision="bf16", tp=1, profile=L4, limits=limits, device=None, memory="")
    design = sizing.size(candidate, one, slo.parse("ttft_p95<3s,tpot_p99<200ms"), rate_per_s, headroom, SHELF)
    if design is None:
        assert max(excess for excess, _ in at_rest_of(one).excesses(slo.parse("ttft_p95<3s,tpot_p99<200ms"))) >= 1
        return
    assert one.utilisation(design.each_per_s) <= min(1 - headroom, sizing.MOST) + 1e-9
    assert design.replicas >= design.fewest
    more = sizing.size(candidate, one, slo.parse("ttft_p95<3s,tpot_p99<200ms"), 1.7 * rate_per_s, headroom, SHELF)
    assert more is not None
    assert more.replicas >= design.replicas


@settings(max_examples=15, deadline=None)
@given(laws, engines)
def test_more_traffic_means_longer_latencies(traffic: Workload, limits: Limits) -> None:
    one = replica(traffic, L4, limits)
    found = [one.predict(share * one.capacity_per_s) for share in (0.05, 0.5, 0.95)]
    for metric in ("ttft", "tpot", "e2e"):
        means = [known(f, metric, "mean") for f in found]
        assert means[0] * 0.98 <= means[1] <= means[2] * 1.02, metric  # the sample is fixed, its prefills met are not


def test_at_capacity_there_is_no_steady_state() -> None:
    one = replica(CHAT)
    with pytest.raises(Overload, match="2 would do"):
        one.predict(1.2 * one.capacity_per_s)


# ---------------------------------------------------------------- against the simulator


@pytest.mark.parametrize(("traffic", "profile", "load"), [(CHAT, H100, 0.5), (CHAT, L4, 0.7), (FIXED, L4, 0.7), (FIXED, H100, 0.85)])
def test_theory_agrees_with_the_simulated_scheduler(traffic: Workload, profile: LatencyProfile, load: float) -> None:
    """Every figure within 10 %, or inside what runs of so few requests leave open; `proofs/agree.py` has the long ones."""
    one = agreement.of(profile, AMPLE._replace(max_seqs=32), traffic)
    assert one.binds == "slots"
    for found in agreement.compare(one, traffic, load, requests=2400, keys=(*agreement.KEYS, "tpot_p50", "tpot_p99", "e2e_p50")):
        assert found.agrees(0.10), f"{found.key}: {found.analytic_s} against {found.simulated_s} ({found.low_s} to {found.high_s})"


def test_a_percentile_between_two_kinds_of_step_may_be_of_either() -> None:
    """Of gaps of 8 and 30 ms half each, a few in a thousand decide of which the median is; its interval holds both."""

    def run(of_8_ms: int) -> agreement.Run:
        gaps = np.zeros(kernel.BINS, dtype=np.int64)
        for gap_s, many in ((0.008, of_8_ms), (0.030, 1000 - of_8_ms)):
            gaps[int(math.log(gap_s / kernel.LEAST_S) * kernel.BINS_PER_E) + 1] = many
        return agreement.Run(latencies={}, gap_s=0.019, gaps=gaps)

    found = agreement._of_gaps([run(n) for n in (503, 504, 505, 501)], "p50")
    assert found == pytest.approx((0.008, 0.008, 0.030), rel=0.003)
    assert agreement._of_gaps([run(n) for n in (603, 604, 605, 601)], "p50") == pytest.approx((0.008, 0.008, 0.008), rel=0.003)


def test_steps_that_carry_a_prompt_are_met_as_often_as_prompts_come() -> None:
    """Where prompts take a third of the time, a twentieth of the tokens or more sees a step several times as long as a decode."""
    nano = latency.roofline(models.find("nano"), hardware.find("cpu-2core"), precision="fp32")
    traffic = workload.synthetic(1, prompt="lognormal:96:0.6:384", output="lognormal:40:0.6:160")
    one = agreement.of(nano, Limits(8, 256, 16, 5000, 1024), traffic)
    found = {a.key: a for a in agreement.compare(one, traffic, 0.5, requests=2400)}
    assert found["itl_p99"].simulated_s > 4 * found["itl_p50"].simulated_s
    assert all(found[f"itl_{stat}"].agrees(0.12) for stat in ("mean", "p50", "p99"))


def test_what_binds_is_said_because_theory_is_for_slots() -> None:
    assert replica(CHAT).binds == "slots"
    assert replica(CHAT, limits=AMPLE._replace(blocks=1500)).binds == "memory"
    assert replica(CHAT, limits=AMPLE._replace(max_step_tokens=128)).binds == "budget"


def test_the_mean_of_the_shorter_of_two_by_hand() -> None:
    assert analytic._together(np.array([64.0, 64.0])) == pytest.approx(1.0), "all alike"
    assert analytic._together(np.array([1.0, 3.0])) == pytest.approx((1 + 2 / 4) / 2), "1 for sure, the other 2 only if both are long"


def test_gamma_variates_have_their_mean_and_variance() -> None:
    rng = np.random.default_rng(0)
    for shape in (0.2, 1.0, 7.5):
        drawn = analytic._gamma(np.full(200_000, shape), rng.standard_normal(200_000), rng.random(200_000))
        assert drawn.mean() == pytest.approx(shape, rel=0.02)
        assert drawn.var() == pytest.approx(shape, rel=0.05)


@pytest.mark.parametrize(
    ("traffic", "limits"),
    [(CHAT, AMPLE), (FIXED, AMPLE._replace(max_seqs=8)), (CHAT, AMPLE._replace(blocks=1500)), (LONG, AMPLE._replace(blocks=1500))],
)
def test_a_flooded_simulation_serves_the_analytic_capacity(traffic: Workload, limits: Limits) -> None:
    """The guard against plans that are not stable: slots, and memory with what is read again, as the bottleneck."""
    one = replica(traffic, L4, limits)
    schedule = workload.schedule(dataclasses.replace(traffic, rate_per_s=2.5 * one.capacity_per_s), n=len(one.demand.prompt), seed=5)
    lengths = {"prompt_tokens": one.demand.prompt, "output_tokens": one.demand.output}  # the law's, so that no luck is in them
    schedule = dataclasses.replace(schedule, **{name: np.rint(tokens).astype(np.int64) for name, tokens in lengths.items()})
    done = np.sort([r.done_s for r in simulate.run(schedule, one.profile, one.limits).requests if r.done_s is not None])
    middle = done[100:-150]  # neither filling up nor draining
    served_per_s = (len(middle) - 1) / (middle[-1] - middle[0])
    assert served_per_s == pytest.approx(one.capacity_per_s, rel=0.07)  # three quarters of the requests: 4 % of noise
    assert served_per_s >= 0.75 * one.capacity_per_s
