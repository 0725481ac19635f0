"""The highest rate within limits: two ways to it agree, limits bind, beams cost what they compute, and measured rates teach."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mlsys_bench import hardware, latency, models, predict
from mlsys_bench.errors import UnknownName
from mlsys_bench.latency import step
from mlsys_bench.predict import Experiment, saturation
from mlsys_bench.simulate import core
from mlsys_bench.types import LatencyProfile, Lengths, Provenance

SERVER = Experiment(
    key="k", group="g", model="llama-3-8b", device="H100-SXM", engine="trtllm", precision="fp8", replicas=8, max_seqs=64,
    prompt_tokens=Lengths(dist="lognormal", mean=150, cv=1.0, max=1024), output_tokens=Lengths(dist="lognormal", mean=60, cv=0.5, max=200),
    slo=(("ttft_p99_s", 0.3), ("tpot_p99_s", 0.02)),
)  # fmt: skip
OFFLINE = replace(SERVER, slo=())


def profile_of(e: Experiment) -> LatencyProfile:
    arch, device = models.find(e.model), hardware.find(e.device)
    return latency.roofline(arch, device, precision=e.precision, tp=e.tp, engine=e.engine)


def found(e: Experiment) -> saturation.Saturation:
    answer = saturation.saturation(e, profile_of(e))
    assert answer is not None
    return answer


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs have few requests, the same ones at all rates: so few that compiling, half a minute in a fresh checkout, never pays."""
    monkeypatch.setattr(saturation, "MOST_REQUESTS", 3000)
    monkeypatch.setattr(core, "COMPILE_FROM", 10**12)


def test_only_what_has_no_load_is_asked_for_its_rate() -> None:
    assert saturation.asks_for_rate(SERVER)
    assert not saturation.asks_for_rate(replace(SERVER, rate_per_s=1.0))
    assert not saturation.asks_for_rate(replace(SERVER, concurrency=1))


def test_without_limits_the_simulated_throughput_is_that_of_the_mean_field() -> None:
    """Two ways: a simulated run with everything waiting, and n requests over the time of one balanced step with all slots taken.

    Prompts are short: long ones come in lumps, and a step that is bound by reading or computing in turn takes longer than a balanced one.
    """
    asked = replace(OFFLINE, prompt_tokens=Lengths(mean=30), output_tokens=Lengths(dist="lognormal", mean=200, cv=0.5, max=800))
    prompt, output, n = 30.0, 200.0, 64.0
    begun, context = n / output, prompt + output * (1 + 0.5**2) / 2
    step_s = latency.step_s(profile_of(asked), (n, n * context, begun * prompt, begun * prompt**2 / 2, n + begun))
    assert found(asked).rate_per_s == pytest.approx(8 * n / (output * step_s), rel=0.04)
    assert found(OFFLINE).rate_per_s < 8 * 64 / (60 * latency.step_s(profile_of(OFFLINE), (64, 64 * 187, 160, 160 * 150, 65)))


def test_the_rate_keeps_its_limits_and_one_of_three_percent_more_does_not() -> None:
    replica = saturation._replica(SERVER, profile_of(SERVER))
    rate = found(SERVER).rate_per_s / SERVER.replicas
    kept = saturation._kept(replica, saturation.MOST_REQUESTS, rate)
    assert kept is not None
    assert kept["ttft_p99_s"] <= 0.3
    assert kept["tpot_p99_s"] <= 0.02
    assert saturation._kept(replica, saturation.MOST_REQUESTS, 1.03 * rate) is None


def test_the_highest_rate_lies_below_the_throughput_and_near_it_when_slots_bind() -> None:
    """With time to wait and fast steps only a full system breaks the limits."""
    most = found(OFFLINE).rate_per_s
    assert 0.85 * most < found(SERVER).rate_per_s < 1.02 * most


def test_stricter_limits_allow_less() -> None:
    profile = profile_of(SERVER)
    alone_s = latency.step_s(profile, (1, 200, 0, 0, 1))
    strict = [found(replace(SERVER, slo=(("tpot_p99_s", share * alone_s),))).rate_per_s for share in (1.3, 1.6, 4.0)]
    assert strict == sorted(strict)
    assert strict[0] < 0.9 * strict[-1]


def test_a_limit_that_one_request_alone_breaks_has_no_rate() -> None:
    asked = replace(SERVER, slo=(("tpot_p99_s", 1e-4),))
    assert saturation.saturation(asked, profile_of(asked)) is None
    (answer,) = saturation.predict([asked], profile_of, saturation.Rates())
    assert answer.figures == {}
    assert answer.notes == ("no rate keeps the limits",)


def test_a_replica_of_few_slots_may_keep_them_full_where_waiting_is_allowed() -> None:
    """The mean field, which wants a free slot for 99 % of arrivals, begins too low there."""
    few = replace(SERVER, max_seqs=4, slo=(("ttft_p99_s", 60.0),))
    assert found(few).rate_per_s == pytest.approx(found(replace(few, slo=())).rate_per_s, rel=0.15)


def test_a_limit_on_an_unknown_figure_is_named() -> None:
    with pytest.raises(UnknownName, match="ttft_p98_s"):
        found(replace(SERVER, slo=(("ttft_p98_s", 1.0),)))


def test_a_model_that_does_not_fit_has_no_rate() -> None:
    asked = replace(OFFLINE, model="llama-2-70b", device="L40S", precision="fp8")
    assert saturation.max_rate_per_s(asked, profile_of(asked)) is None


def test_twice_the_replicas_take_twice_the_rate() -> None:
    assert found(replace(SERVER, replicas=16)).rate_per_s == pytest.approx(2 * found(SERVER).rate_per_s)


def test_no_rate_asks_for_more_than_the_gpus_compute_at_their_peak() -> None:
    a, gpu = models.find(SERVER.model), hardware.find(SERVER.device)
    tokens = SERVER.prompt_tokens.mean + SERVER.output_tokens.mean
    most = OFFLINE.gpus * hardware.compute_flops_per_s(gpu, "fp8") / (tokens * models.linear_flops_per_token(a))
    assert found(OFFLINE).rate_per_s < most


def test_a_step_of_beams_takes_what_all_its_sequences_take() -> None:
    """7 requests of 4 beams, 800 prompt and 30 further tokens each, beside a prompt of 400: the same time in tokens and in units of 4."""
    profile = profile_of(replace(SERVER, model="gpt-j-6b"))
    b, n, prompt, so_far, chunk = 4, 7, 800, 30, 400
    constants = profile.constants | {"decode_flops_per_pair": 0.0}  # the cache is bound by its bytes
    in_tokens = latency.step_s(
        replace(profile, constants=constants), (b * n, n * (prompt + b * so_far), chunk, chunk**2 / 2, b * n)
    )  # fmt: skip
    unit = chunk / b
    in_units = latency.step_s(
        saturation.in_units(replace(profile, constants=constants), b), (n, n * (prompt / b + so_far), unit, unit**2 / 2, n)
    )  # fmt: skip
    assert in_units == pytest.approx(in_tokens, rel=1e-9)


def test_each_beam_reads_the_prompt_that_it_shares() -> None:
    """4 beams over a cache of prompts alone: what one reads from memory, four read from the L2 cache at twice its rate."""
    profile = profile_of(replace(SERVER, model="gpt-j-6b"))
    empty, full = (0, 0, 0, 0, 0), (0, 1000, 0, 0, 0)

    def read_s(prompt_share: float) -> float:
        units = saturation.in_units(profile, 4, prompt_share)
        return latency.step_s(units, full) - latency.step_s(units, empty)

    assert read_s(1.0) == pytest.approx(4 / 2 * read_s(0.0))
    assert read_s(0.5) == pytest.approx((read_s(0.0) + read_s(1.0)) / 2)


def test_beams_of_a_mixture_hit_as_many_experts_as_their_tokens() -> None:
    profile = profile_of(replace(SERVER, model="mixtral-8x7b"))
    in_tokens, in_units = latency.step_s(profile, (4, 400, 0, 0, 4)), latency.step_s(saturation.in_units(profile, 4), (1, 100, 0, 0, 1))
    assert in_units == pytest.approx(in_tokens, rel=1e-9)


def test_more_beams_take_longer() -> None:
    """Up to four times as long: prompts are computed once."""
    assert 0.25 < found(replace(OFFLINE, beams=4)).rate_per_s / found(OFFLINE).rate_per_s < 0.8


def test_lengths_keep_their_mean_though_they_are_cut() -> None:
    lengths = Lengths(dist="lognormal", mean=300, cv=0.7, max=1024)
    drawn = saturation._lengths(lengths, 20_000, 1)
    assert drawn.max() == 1024
    assert drawn.mean() == pytest.approx(300, rel=0.01)


# ---------------------------------------------------------------- intervals, and what measured rates teach


def test_the_spread_of_the_rate_is_that_of_rates_at_drawn_coefficients() -> None:
    """Two ways: slopes of the mean field by the coefficients' covariance, and rates simulated at profiles drawn from it."""
    profile = profile_of(OFFLINE)
    rng = np.random.default_rng(4)
    above = [4.0 if name in step.MULTIPLIERS else 1.0 for name in profile.terms]  # so that no draw meets the physics floor
    free = replace(profile, coefficients=tuple((np.array(profile.coefficients) * above).tolist()))
    small = replace(free, covariance=tuple(tuple(0.04 * v for v in row) for row in profile.covariance))
    logs = [np.log(_rate(OFFLINE, latency.draw(small, rng))) for _ in range(24)]
    own = np.sqrt(saturation._sd(OFFLINE, small) ** 2 - saturation.UNKNOWN_SD**2 - small.residual_log_sd**2)
    assert own == pytest.approx(np.std(logs, ddof=1), rel=0.45)  # 24 draws: the sd of an sd is 15 %


def _rate(e: Experiment, profile: LatencyProfile) -> float:
    answer = saturation.saturation(e, profile)
    assert answer is not None
    return answer.rate_per_s


def measured(e: Experiment, factor: float, group: str = "g") -> Experiment:
    return replace(e, group=group, measured={"max_rate_per_s": factor * found(e).rate_per_s})


def deviation(e: Experiment, known: saturation.Rates) -> float:
    answer = saturation.max_rate_per_s(e, profile_of(e), known)
    assert answer is not None
    return float(np.log(answer[0] / found(e).rate_per_s))


def test_a_measured_rate_says_most_of_its_own_system_and_less_the_less_there_is_in_common() -> None:
    known = saturation.learn([measured(OFFLINE, 0.6, "first")], profile_of)
    others = [
        replace(OFFLINE, group="first"),
        replace(OFFLINE, group="second"),
        replace(OFFLINE, group="second", device="H200-SXM"),
        replace(OFFLINE, group="second", device="H200-SXM", model="llama-2-7b", engine="vllm"),
    ]
    said = [deviation(e, known) for e in others]
    assert said == sorted(said)
    assert np.log(0.6) < said[0] < 0.8 * np.log(0.6)
    assert -0.3 < said[-1] < 0


def test_intervals_shrink_with_measured_rates_and_hold_the_point() -> None:
    profile = profile_of(OFFLINE)
    widths = []
    for n in (0, 1, 6):
        known = saturation.learn([measured(OFFLINE, 0.7, f"system {i}") for i in range(n)], profile_of)
        answer = saturation.max_rate_per_s(OFFLINE, profile, known)
        assert answer is not None
        assert answer[1] < answer[0] < answer[2]
        widths.append(np.log(answer[2] / answer[1]))
    assert widths[0] > 1.2 * widths[1] > 1.3 * widths[2]


def test_one_absurd_rate_moves_a_prediction_no_further_than_a_far_one() -> None:
    usual = [measured(OFFLINE, 0.9, f"system {i}") for i in range(6)]
    far, absurd = (saturation.learn([*usual, measured(OFFLINE, factor, "odd")], profile_of) for factor in (0.05, 1e-4))
    assert deviation(OFFLINE, absurd) == pytest.approx(deviation(OFFLINE, far), abs=0.02)


def test_what_has_no_rate_teaches_nothing() -> None:
    assert saturation.learn([SERVER, replace(measured(OFFLINE, 1.0), rate_per_s=3.0)], profile_of) == saturation.Rates()


def test_predict_answers_loads_and_rates_together_and_in_order() -> None:
    """One call for rows of all kinds; a measured rate of the layout makes the answer calibrated and no other figure worse."""
    loaded = replace(SERVER, key="load", concurrency=16, slo=())
    knowledge = predict.learn([])
    answers = predict.predict([SERVER, loaded, replace(OFFLINE, key="all")], knowledge)
    assert [p.key for p in answers] == ["k", "load", "all"]
    assert {"max_rate_per_s", "output_tokens_per_s", "ttft_p99_s", "tpot_p50_s", "e2e_mean_s"} <= set(answers[0].figures)
    assert "max_rate_per_s" not in answers[1].figures
    assert set(answers[2].figures) == {"max_rate_per_s", "output_tokens_per_s"}
    rate, tokens = answers[2].figures["max_rate_per_s"], answers[2].figures["output_tokens_per_s"]
    assert tokens == pytest.approx([60 * r for r in rate])
    assert answers[2].provenance is Provenance.ROOFLINE
    taught = predict.learn([replace(OFFLINE, measured={"max_rate_per_s": 0.7 * rate[0]})])
    (again,) = predict.predict([OFFLINE], taught)
    assert again.provenance is Provenance.CALIBRATED
    assert 0.7 * rate[0] < again.figures["max_rate_per_s"][0] < 0.85 * rate[0]
