"""How many replicas, and how many candidates at once: what is found quickly is what is found one by one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mlsys_bench import hardware, latency, models, slo, workload
from mlsys_bench.batching import Limits
from mlsys_bench.plan import demand, screen, sizing
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.types import LatencyProfile

LLAMA = models.find("llama-3-8b")
CHAT = demand.of(workload.synthetic(1, prompt="lognormal:512:1.0:4096", output="lognormal:128:1.0:1024"))
LIMITS = Limits(64, 1024, 16, 20_000, 8192)


def profile(gpu: str, tp: int = 1) -> LatencyProfile:
    return latency.roofline(LLAMA, hardware.find(gpu), precision="bf16", tp=tp)


@pytest.mark.parametrize("limits", ["ttft_p95<60ms", "ttft_p99<2s,tpot_p99<30ms", "tpot_p95<8ms", "ttft_p95<90ms,e2e_p95<3s"])
@pytest.mark.parametrize("rate_per_s", [11.0, 90.0])
def test_as_many_replicas_are_needed_as_counting_upwards_finds(limits: str, rate_per_s: float) -> None:
    replica, wanted = Replica(profile("h100-sxm"), LIMITS, CHAT, samples=256), slo.parse(limits)
    least = sizing.fewest(replica.capacity_per_s, rate_per_s, 0.2)
    found = sizing.needed(replica, wanted, rate_per_s, least)
    assert found is not None
    replicas, binds = found
    counted = next(n for n in range(least, 1000) if sizing.worst(replica.predict(rate_per_s / n), wanted)[0] < 1)
    assert replicas == counted
    assert (binds is None) == (counted == least), "the limit that one fewer misses, none where headroom decides"
    assert sizing.needed(replica, wanted, rate_per_s, least, most=counted) == found
    assert counted == least or sizing.needed(replica, wanted, rate_per_s, least, most=counted - 1) is None


def test_of_a_large_fleet_the_last_half_percent_is_not_searched() -> None:
    replica, wanted = Replica(profile("h100-sxm"), LIMITS, CHAT, samples=256), slo.parse("ttft_p95<80ms,tpot_p95<9ms")
    rate_per_s = 5000.0
    least = sizing.fewest(replica.capacity_per_s, rate_per_s, 0.2)
    found = sizing.needed(replica, wanted, rate_per_s, least)
    assert found is not None
    assert found[0] > 1.1 * least
    keeps, misses = (sizing.worst(replica.predict(rate_per_s / n), wanted)[0] for n in (found[0], round(0.994 * found[0])))
    assert keeps < 1 <= misses


def test_no_number_of_replicas_helps_where_an_idle_one_misses_a_limit() -> None:
    replica = Replica(profile("l4"), LIMITS, CHAT, samples=256)
    least = sizing.fewest(replica.capacity_per_s, 10.0, 0.2)
    assert sizing.needed(replica, slo.parse("tpot_p50<1ms"), 10.0, least) is None


def test_the_highest_rate_is_as_close_as_halving_would_find_it() -> None:
    replica, wanted = Replica(profile("h100-sxm"), LIMITS, CHAT, samples=256), slo.parse("ttft_p95<80ms")
    low, high = 0.0, 0.8 * replica.capacity_per_s
    for _ in range(12):
        middle = (low + high) / 2
        low, high = (middle, high) if sizing.worst(replica.predict(middle), wanted)[0] < 1 else (low, middle)
    found, binds = sizing.highest_rate(replica, wanted, 0.8)
    assert found == pytest.approx(low, abs=0.8 * replica.capacity_per_s / 2**7)
    assert found <= high
    assert binds == wanted[0]


# ---------------------------------------------------------------- many at once


def test_profiles_of_many_layouts_are_those_of_each() -> None:
    asked = [(hardware.find(gpu), tp, pp) for gpu in ("h100-sxm", "l4", "mi300x") for tp, pp in ((1, 1), (8, 2))]
    found = latency.rooflines(LLAMA, [(device, latency.Spread(precision="fp8", tp=tp, pp=pp)) for device, tp, pp in asked])
    each = [latency.roofline(LLAMA, device, precision="fp8", tp=tp, pp=pp) for device, tp, pp in asked]
    assert found == each
    assert latency.rooflines(LLAMA, []) == []


def test_candidates_screened_together_are_as_those_screened_alone() -> None:
    """Roofs of different sharpness, steps of different sizes, and a mixture of experts among them."""
    sharp = dataclasses.replace(profile("l40s"), constants={**profile("l40s").constants, "roof_norm": 0.0})
    mixture = latency.roofline(models.find("mixtral-8x7b"), hardware.find("h200-sxm"), precision="fp8", tp=2)
    profiles = [profile("h100-sxm"), sharp, mixture, profile("a100-80gb-sxm", tp=4)]
    limits = [LIMITS, LIMITS._replace(max_step_tokens=256), LIMITS._replace(max_seqs=8), LIMITS._replace(blocks=2000)]
    clocks = screen.Clocks(profiles)
    assert clocks.most_per_s(limits, CHAT) == pytest.approx(
        [screen.most_per_s(one, its, CHAT) for one, its in zip(profiles, limits, strict=True)], rel=1e-12
    )
    for together, one, its in zip(clocks.alone(limits, CHAT), profiles, limits, strict=True):
        apart = screen.alone(one, its, CHAT)
        assert together.ttft_s == pytest.approx(apart.ttft_s, rel=1e-12)
        assert together.itl_s == pytest.approx(apart.itl_s, rel=1e-12)
        prompt = CHAT.prompt[:1]
        if prompt[0] <= its.max_step_tokens:
            step_s = latency.step_s(one, (0.0, 0.0, float(prompt[0]), float(prompt[0]) ** 2 / 2, 1.0))
            overhead_s = latency.overhead(one).seconds(float(prompt[0]))
            assert together.ttft_s[0] == pytest.approx(step_s + overhead_s, rel=1e-9)
    assert np.isfinite([x for one in clocks.alone(limits, CHAT) for x in one.ttft_s]).all()
