"""The steps of a closed loop and the mean field of an open one, held against the real scheduler in virtual time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import latency, predict, workload
from mlsys_bench.batching import Limits, Policy, StepFeatures
from mlsys_bench.latency import clock as clock_of
from mlsys_bench.latency import coefficients as names
from mlsys_bench.latency.coefficients import NAMES
from mlsys_bench.predict import figures, mix
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.simulate import core
from mlsys_bench.types import Lengths
from mlsys_bench.workload import Schedule

WHOLE_PROMPTS_FIRST = Policy(prefill_first=1, mixed=0)
Clock = Callable[[StepFeatures], float]


def limits(budget: int, seats: int) -> Limits:
    return Limits(max_seqs=seats, max_step_tokens=budget, block_tokens=16, blocks=10**6, max_context=10**6)


def drawn(law: Lengths, n: int, rng: np.random.Generator, least: int = 1) -> npt.NDArray[np.int64]:
    return np.maximum(np.asarray(workload.draw_lengths(law, n, rng), dtype=np.int64), least)


def circled(
    clock: Clock, users: int, prompts: npt.NDArray[np.int64], outputs: npt.NDArray[np.int64], within: Limits, policy: Policy = core.VLLM
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return TTFT and time per further token of each request of a simulated closed loop."""
    times = np.where(np.arange(len(prompts)) < users, 0.0, np.nan)
    schedule = Schedule(scheduled_s=times, prompt_tokens=prompts, output_tokens=outputs)
    tracks = core.circulate(schedule, within, users=users, clock=clock, policy=policy)
    return tracks.first_s - tracks.arrived_s, (tracks.last_s - tracks.first_s) / (outputs - 1)


def sampled(
    clock: Clock, users: int, prompt: Lengths, output: Lengths, budget: int, seats: int, policy: Policy = core.VLLM
) -> tuple[float, float]:
    """Return the means over ten requests a client: the first ones as they are, the others by the sample that a mix follows."""
    every = 10 * users
    n, rng = max(min(every, 6 * users), users + 8), np.random.default_rng(0)
    prompts, outputs = drawn(prompt, n, rng), drawn(output, n, rng, 2)
    counted = max(n - users // 2, users + 1)
    means = (
        (users * np.mean(value[:users]) + (every - users) * np.mean(value[users:counted])) / every
        for value in circled(clock, users, prompts, outputs, limits(budget, seats), policy)
    )
    ttft, tpot = (float(mean) for mean in means)
    return ttft, tpot


def timed(found: mix.Mix, clock: Clock) -> tuple[float, float]:
    step_s = np.array([clock(StepFeatures(*row)) for row in found.features.tolist()])
    return float(found.first @ step_s), float(found.further @ step_s)


def one_second(_: StepFeatures) -> float:
    return 1.0


def by_size(f: StepFeatures) -> float:
    """Return a time in which each feature weighs about as much as on a GPU."""
    return 5e-3 + 1e-5 * f[0] + 2e-8 * f[1] + 4e-5 * f[2] + 3e-9 * f[3] + 1e-6 * f[4]


LOADS = {
    "one client": (1, Lengths(mean=100), Lengths(mean=20), 8192, 8),
    "a few": (4, Lengths(mean=1000), Lengths(mean=50), 8192, 8),
    "long prompts in chunks": (4, Lengths(mean=5000), Lengths(mean=50), 512, 8),
    "prompts of many steps": (8, Lengths(mean=3000), Lengths(mean=40), 256, 8),
    "fewer seats than clients": (32, Lengths(mean=200), Lengths(dist="uniform", mean=60, cv=0.3), 2048, 8),
    "uniform": (16, Lengths(dist="uniform", mean=900, cv=0.0642), Lengths(dist="uniform", mean=920, cv=0.0642), 8192, 256),
    "lognormal": (16, Lengths(dist="lognormal", mean=300, cv=1.0), Lengths(dist="lognormal", mean=100, cv=0.8), 1024, 12),
}


@pytest.mark.parametrize("load", LOADS.values(), ids=LOADS.keys())
@pytest.mark.parametrize("clock", [one_second, by_size])
def test_a_mix_adds_up_to_what_the_scheduler_gives(load: tuple[int, Lengths, Lengths, int, int], clock: Clock) -> None:
    """Steps of one second: how many a token waits for, exactly.  Steps by size: bins of batch and prefill size cost 1 % at most."""
    users, prompt, output, budget, seats = load
    found = mix.closed(users, prompt, output, max_step_tokens=budget, seats=seats)
    exactly = 1e-9 if clock is one_second else 0.01
    assert timed(found, clock) == pytest.approx(sampled(clock, users, prompt, output, budget, seats), rel=exactly)


@pytest.mark.parametrize("clock", [one_second, by_size])
@pytest.mark.parametrize("name", ["one client", "a few", "uniform"])
def test_whole_prompts_first_is_the_policy_of_that_name(name: str, clock: Clock) -> None:
    users, prompt, output, budget, seats = LOADS[name]
    found = mix.closed(users, prompt, output, max_step_tokens=budget, seats=seats, prefill_first=True)
    simulated = sampled(clock, users, prompt, output, budget, seats, WHOLE_PROMPTS_FIRST)
    assert timed(found, clock) == pytest.approx(simulated, rel=1e-9 if clock is one_second else 0.01)


@settings(max_examples=20, deadline=None)
@given(
    users=st.integers(1, 12),
    prompt=st.integers(1, 1500),
    output=st.integers(2, 60),
    cv=st.sampled_from([0.0, 0.5]),
    budget=st.integers(64, 2048),
    seats=st.integers(1, 16),
)
def test_any_closed_loop_waits_for_the_steps_of_its_mix(users: int, prompt: int, output: int, cv: float, budget: int, seats: int) -> None:
    lengths = (Lengths(dist="uniform", mean=float(prompt), cv=cv), Lengths(dist="uniform", mean=float(output), cv=cv))
    found = mix.closed(users, *lengths, max_step_tokens=budget, seats=seats)
    assert timed(found, one_second) == pytest.approx(sampled(one_second, users, *lengths, budget, seats), rel=1e-9)


@pytest.mark.parametrize("seats", [6, 256])
def test_a_finite_run_is_followed_from_its_start(seats: int) -> None:
    """Ten requests a client, all clients at once: the mean over all of a simulated run, to four standard errors of its lengths."""
    prompt, output = Lengths(dist="uniform", mean=900, cv=0.0642), Lengths(dist="uniform", mean=92, cv=0.0642)
    runs = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        ttft, tpot = circled(by_size, 16, drawn(prompt, 160, rng), drawn(output, 160, rng, 2), limits(2048, seats))
        runs.append((float(ttft.mean()), float(tpot.mean())))
    error = 4 * np.std(runs, axis=0, ddof=1)
    found = timed(mix.closed(16, prompt, output, max_step_tokens=2048, seats=seats, requests=160), by_size)
    assert (np.abs(np.array(found) - np.mean(runs, axis=0)) < np.maximum(error, 0.01 * np.mean(runs, axis=0))).all()


@pytest.mark.parametrize(("users", "seats"), [(4, 8), (16, 256), (32, 8)])
def test_requests_that_come_later_do_not_wait_for_the_rush_at_the_start(users: int, seats: int) -> None:
    """Steps of one second: how many the later requests of the same simulated run wait for, exactly."""
    prompt, output = Lengths(dist="uniform", mean=900, cv=0.0642), Lengths(dist="uniform", mean=60, cv=0.3)
    found = mix.closed(users, prompt, output, max_step_tokens=2048, seats=seats)
    n, rng = max(6 * users, users + 8), np.random.default_rng(0)
    ttft, _ = circled(one_second, users, drawn(prompt, n, rng), drawn(output, n, rng, 2), limits(2048, seats))
    last = n - users // 2
    assert found.later.sum() == pytest.approx(ttft[users + (last - users) // 2 : last].mean(), rel=1e-9)
    assert found.later.sum() < found.first.sum() or seats < users


@pytest.mark.parametrize(("users", "prompt"), [(16, 921), (64, 921), (32, 7372)])
def test_a_median_is_that_of_later_requests_and_a_mean_holds_the_first_ones(users: int, prompt: int) -> None:
    """Ten requests a client: one in ten waits for the prompts of all, so the median of a simulated run lies where `settled` says."""
    law = Lengths(dist="uniform", mean=prompt, cv=0.0642)
    e = replace(SPECULATING, speculative=None, draft_tokens=0, prompt_tokens=law, concurrency=users, requests=10 * users)
    clock, x = clock_by(e, 2.5)
    rng = np.random.default_rng(0)
    prompts, outputs = drawn(law, 10 * users, rng), drawn(e.output_tokens, 10 * users, rng, 2)
    ttft, _ = circled(clock, users, prompts, outputs, limits(8192, users))
    c = dict(zip(NAMES, np.exp(x).tolist(), strict=True))
    step_s = float(np.exp(figures.figures(figures.design([e]), x)[0][0]))
    around_s = c["first_s"] + c["client_s"] + c["prompt_token_s"] * prompt + c["wait_steps"] * step_s
    simulated = math.log((float(np.median(ttft)) + around_s) / (float(ttft.mean()) + around_s))
    assert simulated < -0.2
    assert float(figures.settled([e])[0]) == pytest.approx(simulated, abs=0.05)


# ---------------------------------------------------------------- tokens proposed


SPECULATING = Experiment(
    key="1", group="1", model="deepseek-v3", device="B200-SXM", engine="vllm", precision="fp8", tp=8, moe_tp=8, max_step_tokens=8192,
    prompt_tokens=Lengths(dist="uniform", mean=7372, cv=0.0642), output_tokens=Lengths(dist="uniform", mean=921, cv=0.0642),
    concurrency=64, requests=640, speculative="mtp", draft_tokens=3,
)  # fmt: skip


def clock_by(e: Experiment, tokens: float) -> tuple[Clock, npt.NDArray[np.float64]]:
    """Return the clock of an experiment's layout by the assumed coefficients, and these with so many tokens a step of three proposed."""
    x = names.ASSUMED_LOG.copy()
    x[NAMES.index("draft_tokens")] = math.log(tokens)
    k = figures.constants(e)
    terms = names.terms(dict(zip(NAMES, np.exp(x).tolist(), strict=True)), k)
    table = [np.asarray(entry, dtype=float) for entry in latency.entries(names.floored(terms, latency.MULTIPLIERS), k)]

    def step_s(f: StepFeatures) -> float:
        module = 1 + e.draft_tokens / k["layers"] if f[0] else 1.0
        return module * float(latency.many(table, np.asarray(f, dtype=float)))

    return step_s, x


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(("users", "prompt", "drafts"), [(4, 921, 3), (64, 921, 3), (16, 7372, 2), (64, 7372, 3), (64, 7372, 1)])
def test_a_token_of_several_takes_as_long_as_simulated(engine: str, users: int, prompt: int, drafts: int) -> None:
    """2.5 tokens a step of three proposed: fewer steps a token, but as many prompts, which at 64 users take most of the time."""
    law = Lengths(dist="uniform", mean=prompt, cv=0.0642)
    e = replace(SPECULATING, engine=engine, prompt_tokens=law, concurrency=users, requests=10 * users, draft_tokens=drafts)
    clock, x = clock_by(e, 2.5)
    (chance,) = (float(root.real) for root in np.roots([1, 1, 1, 1 - 2.5]) if abs(root.imag) < 1e-9)
    rng, n = np.random.default_rng(0), 4 * users + 64
    prompts, outputs = drawn(law, n, rng), drawn(e.output_tokens, n, rng, 2)
    policy = (WHOLE_PROMPTS_FIRST if engine == "sglang" else core.VLLM)._replace(drafts=drafts, acceptance=chance)
    _, simulated = circled(clock, users, prompts, outputs, limits(8192, users), policy)
    tpot = math.exp(float(figures.figures(figures.design([e]), x)[0][0]))
    assert tpot == pytest.approx(float(simulated[: n - users // 2].mean()), rel=0.03)


def test_who_is_looked_at_every_thirty_steps_waits_for_half_of_them() -> None:
    x = names.ASSUMED_LOG
    tpot, ttft = (np.exp(v) for v in figures.figures(figures.design([replace(SPECULATING, held_steps=n) for n in (0, 30)]), x))
    tokens = float(np.exp(x[NAMES.index("draft_tokens")]))
    assert tpot[0] == tpot[1]
    assert ttft[1] - ttft[0] == pytest.approx(15 * tokens * tpot[0])


def test_where_nobody_says_how_many_are_proposed_it_is_what_serves_best() -> None:
    few, many = (replace(SPECULATING, concurrency=n, requests=10 * n) for n in (1, 256))
    for e in (few, many):
        untold, *told = np.exp(
            figures.figures(figures.design([replace(e, draft_tokens=n) for n in (0, *figures.DRAFTS)]), names.ASSUMED_LOG)[0]
        )
        assert untold == min(told)


def test_a_decode_pool_runs_the_same_batches_without_prompts() -> None:
    """Eight clients, all of them decoding: weights add up to one step a token."""
    found = mix.decode_only(mix.closed(8, Lengths(mean=500), Lengths(mean=50), max_step_tokens=8192, seats=8))
    assert found.further.sum() == pytest.approx(1)
    assert not found.first.any()
    assert not found.features[:, 2:4].any()
    assert np.array_equal(found.features[:, 0], found.features[:, 4])
    assert found.features[:, 0].max() == 8


# ---------------------------------------------------------------- open loops

DESIGNS = {
    "llama-3-8b": Experiment(
        key="a", group="a", model="llama-3-8b", device="H100", prompt_tokens=Lengths(mean=500), output_tokens=Lengths(mean=200)
    ),
    "llama-3-70b": Experiment(
        key="b", group="b", model="llama-3-70b", device="H100", tp=4, prompt_tokens=Lengths(mean=1000), output_tokens=Lengths(mean=250)
    ),
    "mixtral-8x7b": Experiment(
        key="c", group="c", model="mixtral-8x7b", device="H100", tp=2, prompt_tokens=Lengths(mean=300), output_tokens=Lengths(mean=150)
    ),
}


@pytest.fixture(scope="module")
def nothing_measured() -> predict.Knowledge:
    return predict.learn([])


def simulated_itl_s(e: Experiment, knowledge: predict.Knowledge) -> float:
    """Return the mean time per token of 1,200 requests, the start and the end left out."""
    n, rate = 1200, e.rate_per_s or 0.0
    poisson = e.arrivals == "poisson"
    times = np.cumsum(np.random.default_rng(1).exponential(1 / rate, n)) if poisson else np.arange(n) / rate
    schedule = Schedule(
        scheduled_s=times,
        prompt_tokens=np.full(n, round(e.prompt_tokens.mean), dtype=np.int64),
        output_tokens=np.full(n, round(e.output_tokens.mean), dtype=np.int64),
    )
    tracks = core.play(schedule, limits(8192, 256), profile=predict.profile(e, knowledge))
    tpot = (tracks.last_s - tracks.first_s) / (schedule.output_tokens - 1)
    return float(tpot[n // 5 : -n // 10].mean())


@pytest.mark.parametrize("arrivals", ["constant", "poisson"])
@pytest.mark.parametrize("rate", [0.5, 2.0, 5.0])
@pytest.mark.parametrize("model", ["llama-3-8b", "llama-3-70b"])
def test_the_mean_field_of_an_open_loop_is_what_a_simulation_gives(
    model: str, rate: float, arrivals: str, nothing_measured: predict.Knowledge
) -> None:
    """From 0.6 to 27 requests at a time; the mean of Poisson arrivals over so many requests is sure to about 1 %."""
    e = replace(DESIGNS[model], rate_per_s=rate, arrivals=arrivals)
    (found,) = predict.predict([e], nothing_measured)
    assert found.figures["itl_mean_s"][0] == pytest.approx(simulated_itl_s(e, nothing_measured), rel=0.02)


@pytest.mark.parametrize(("arrivals", "within"), [("constant", 0.05), ("poisson", 0.1)])
@pytest.mark.parametrize("rate", [0.2, 1.0, 5.0])
def test_a_lone_sequence_of_a_mixture_is_not_half_a_sequence(
    rate: float, arrivals: str, within: float, nothing_measured: predict.Knowledge
) -> None:
    """With fewer than one request at a time on average, a step still reads the experts of a whole token.

    Experts hit grow ever slower with the batch, so that a fluctuating batch hits fewer than its mean would: up to 10 %, and
    5 % where only prompts come between (a step's time is mostly experts, and those are whole tiles).
    """
    e = replace(DESIGNS["mixtral-8x7b"], rate_per_s=rate, arrivals=arrivals)
    (found,) = predict.predict([e], nothing_measured)
    assert found.figures["itl_mean_s"][0] == pytest.approx(simulated_itl_s(e, nothing_measured), rel=within)


def test_a_first_token_of_an_idle_engine_waits_for_its_prompt_and_what_is_outside(nothing_measured: predict.Knowledge) -> None:
    e = replace(DESIGNS["llama-3-8b"], rate_per_s=1e-6)
    (found,) = predict.predict([e], nothing_measured)
    profile = predict.profile(e, nothing_measured)
    step_s = clock_of(profile)((0.0, 0.0, 500.0, 500.0**2 / 2, 1.0))
    outside_s = profile.constants["request_overhead_s"] + 500 * math.exp(nothing_measured.parts["open"].mean[NAMES.index("prompt_token_s")])
    base = figures.figures(figures.design([e]), nothing_measured.parts["open"].mean)[1][0]
    assert math.exp(base) == pytest.approx(step_s + outside_s, rel=0.03)
    assert found.figures["ttft_mean_s"][0] == pytest.approx(math.exp(base))
