"""The simulator: timelines by hand, queues with closed forms, and what no simulation may do."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import batching, hardware, latency, models, simulate, stats, summary, workload
from mlsys_bench.batching import Limits, StepFeatures
from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.simulate import Simulation
from mlsys_bench.types import Lengths, RequestRecord, Validity, Workload
from mlsys_bench.workload import Schedule
from tests.simulated import linear, profile, requests

ROOMY = Limits(max_seqs=8, max_step_tokens=64, block_tokens=4, blocks=1000, max_context=400)
SURE = 0.999  # level of the intervals that a theory must fall into


def play(*rows: tuple[float, int, int], limits: Limits = ROOMY, **options: object) -> tuple[RequestRecord, ...]:
    return simulate.run(requests(*rows), profile(), limits, clock=linear, **options).requests  # type: ignore[arg-type]


# ---------------------------------------------------------------- by hand


def test_a_lone_request_takes_its_prefill_and_then_a_step_a_token() -> None:
    (r,) = play((1.0, 10, 3))
    assert r.token_s == pytest.approx((1.020, 1.032, 1.044))
    assert (summary.ttft_s(r), summary.tpot_s(r)) == pytest.approx((0.020, 0.012))
    assert r.done_s == pytest.approx(1.044)
    assert (r.outcome, r.http_status, r.output_tokens, r.prompt_tokens, r.token_source) == ("ok", 200, 3, 10, "simulated")
    assert (r.sent_s, r.tokens_per_event, r.stage_s) == (1.0, (1, 1, 1), {"queue": 0.0})


def test_a_request_that_comes_during_a_step_joins_the_next_one() -> None:
    """A: prefill to 20 ms.  B waits from 5 ms, shares a step of 10 + 5 + 2 ms with A's decode, then both decode."""
    a, b = play((0.0, 10, 3), (0.005, 5, 2))
    assert a.token_s == pytest.approx((0.020, 0.037, 0.051))
    assert b.token_s == pytest.approx((0.037, 0.051))
    assert b.stage_s["queue"] == pytest.approx(0.015)


def test_requests_of_one_moment_share_their_first_step() -> None:
    assert [r.token_s for r in play((0.0, 10, 1), (0.0, 10, 1))] == [pytest.approx((0.030,))] * 2


def test_a_request_that_comes_just_as_a_step_ends_is_in_the_next_one() -> None:
    end_s = play((0.0, 10, 1))[0].token_s[0]
    a, b = play((0.0, 10, 2), (end_s, 5, 1))
    assert a.token_s[1] == b.token_s[0] == pytest.approx(0.037)


def test_a_long_prompt_is_prefilled_in_chunks_and_queued_ones_wait_for_the_budget() -> None:
    a, b = play((0.0, 100, 1), (0.0, 10, 1))
    assert a.token_s == pytest.approx((0.010 + 0.064 + 0.010 + 0.046,))
    assert a.token_s == b.token_s
    assert b.stage_s["queue"] == pytest.approx(0.074)


def test_overheads_shift_the_way_in_and_the_way_out_only() -> None:
    there_and_back = profile(request_overhead_s=0.5, token_overhead_s=0.25)
    (r,) = simulate.run(requests((1.0, 10, 3)), there_and_back, ROOMY, clock=linear).requests
    assert r.token_s == pytest.approx((1.770, 1.782, 1.794))
    assert (r.scheduled_s, r.sent_s, r.done_s) == (1.0, 1.0, r.token_s[-1])


def test_a_full_replica_answers_429_and_an_impossible_request_400() -> None:
    tight = ROOMY._replace(max_seqs=1)
    fates = play((0.0, 10, 2), (0.001, 10, 1), (0.002, 10, 1), (0.003, 500, 1), limits=tight, queue_limit=1)
    assert [r.http_status for r in fates] == [200, 200, 429, 429]
    assert [r.outcome for r in fates] == ["ok", "ok", "rejected", "rejected"]
    assert fates[2].token_s == ()
    assert [r.http_status for r in play((0.0, 10, 2), (0.003, 500, 1))] == [200, 400]


def test_a_run_that_is_stopped_leaves_requests_unfinished() -> None:
    a, b, c = play((0.0, 10, 3), (0.030, 5, 3), (9.0, 5, 3), until_s=0.040)
    assert [r.outcome for r in (a, b, c)] == ["unfinished"] * 3
    assert len(a.token_s) == 2
    assert (b.token_s, b.done_s, b.http_status) == ((), None, None)
    assert (c.sent_s, c.stage_s) == (None, {})


def test_round_robin_takes_turns_and_least_loaded_avoids_the_busy_one() -> None:
    long_then_short = [(0.0, 10, 50), (0.1, 10, 1), (0.2, 10, 1), (0.3, 10, 1)]
    alone = pytest.approx(0.020)
    assert [summary.ttft_s(r) for r in play(*long_then_short, replicas=2, routing="round_robin")][2] != alone
    assert [summary.ttft_s(r) for r in play(*long_then_short, replicas=2, routing="least_loaded")] == [alone] * 4


def test_the_timeline_says_what_each_step_held() -> None:
    s = simulate.run(requests((0.0, 10, 3), (0.005, 5, 2)), profile(), ROOMY._replace(max_seqs=1), clock=linear)
    (t,) = s.timelines
    assert t.end_s == pytest.approx([0.020, 0.032, 0.044, 0.059, 0.071])
    assert t.batch.tolist() == [1] * 5
    assert t.kv_tokens.tolist() == [12, 12, 12, 8, 8]
    assert t.waiting.tolist() == [0, 1, 1, 0, 0]
    assert s.busy_s == s.end_s == pytest.approx(0.071)
    assert s.steps == 5
    assert s.utilisation == pytest.approx(1.0)


def test_the_clock_is_the_profile_unless_another_is_given() -> None:
    roofline = latency.roofline(models.find("llama-3-8b"), hardware.find("H100"), precision="bf16")
    limits = Limits(max_seqs=8, max_step_tokens=512, block_tokens=16, blocks=1000, max_context=8192)
    (r,) = simulate.run(requests((0.0, 100, 2)), roofline, limits).requests
    prefill = latency.step_s(roofline, StepFeatures(0, 0, 100, 100 * 50.0, 1))
    decode = latency.step_s(roofline, StepFeatures(1, 101, 0, 0.0, 1))
    ways_s = latency.overhead(roofline).seconds(100)
    assert r.token_s == pytest.approx((ways_s + prefill, ways_s + prefill + decode))


def test_what_makes_no_sense_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="least_loaded"):
        play((0.0, 1, 1), routing="least_loadd")
    with pytest.raises(BadInput, match="0 replicas"):
        play((0.0, 1, 1), replicas=0)
    with pytest.raises(BadInput, match="order of time"):
        play((1.0, 1, 1), (0.0, 1, 1))
    with pytest.raises(BadInput, match="form 'step'"):
        simulate.run(requests((0.0, 1, 1)), dataclasses.replace(profile(), form="service"), ROOMY)


def test_the_first_tenth_is_warm_up_unless_a_time_is_given() -> None:
    rows = [(float(i), 1, 1) for i in range(20)]
    assert [r.in_window for r in play(*rows)] == [False] * 2 + [True] * 18
    assert [r.in_window for r in play(*rows, warmup_s=7.0)] == [False] * 7 + [True] * 13
    assert simulate.run(requests(*rows), profile(), ROOMY, clock=linear).window == (2.0, 19.0)


def test_nothing_to_do_is_no_error() -> None:
    none = Schedule(scheduled_s=np.zeros(0), prompt_tokens=np.zeros(0, dtype=np.int64), output_tokens=np.zeros(0, dtype=np.int64))
    s = simulate.run(none, profile(), ROOMY, clock=linear)
    assert (s.requests, s.steps, s.busy_s, s.utilisation, s.window) == ((), 0, 0.0, 0.0, (0.0, 0.0))


# ---------------------------------------------------------------- whatever comes


@st.composite
def designs(draw: st.DrawFn) -> tuple[Schedule, Limits, dict[str, object]]:
    n = draw(st.integers(1, 25))
    rows = [(draw(st.floats(0, 0.5)), draw(st.integers(1, 40)), draw(st.integers(1, 30))) for _ in range(n)]
    limits = Limits(
        max_seqs=draw(st.integers(1, 6)),
        max_step_tokens=draw(st.integers(1, 40)),
        block_tokens=4,
        blocks=draw(st.integers(10, 40)),
        max_context=60,
    )
    options = {
        "replicas": draw(st.integers(1, 3)), "routing": draw(st.sampled_from(simulate.ROUTINGS)), "seed": draw(st.integers(0, 9)),
        "queue_limit": draw(st.none() | st.integers(0, 3)), "until_s": draw(st.none() | st.floats(0, 1)),
    }  # fmt: skip
    return requests(*sorted(rows)), limits, options


@given(designs())
@settings(max_examples=50, deadline=None)
def test_every_request_ends_exactly_once_and_time_only_goes_forward(design: tuple[Schedule, Limits, dict[str, object]]) -> None:
    schedule, limits, options = design
    s = simulate.run(schedule, profile(), limits, clock=linear, **options)  # type: ignore[arg-type]
    assert [r.index for r in s.requests] == list(range(len(schedule.scheduled_s)))
    for r, asked, prompt in zip(s.requests, schedule.output_tokens.tolist(), schedule.prompt_tokens.tolist(), strict=True):
        times = (r.scheduled_s, *r.token_s)
        assert all(b > a for a, b in itertools.pairwise(times))
        if r.outcome == "ok":
            assert len(r.token_s) == r.output_tokens == asked
            assert r.done_s == r.token_s[-1]
        else:
            assert len(r.token_s) < asked
            assert r.outcome == ("rejected" if r.http_status in (400, 429) else "unfinished")
            assert (r.http_status == 400) == (prompt + asked > 4 * limits.blocks or prompt + asked > 60) or r.http_status in (429, None)
    if options["until_s"] is None:
        assert not any(r.outcome == "unfinished" for r in s.requests)
        assert sum(t.batch.sum() for t in s.timelines) >= sum(r.output_tokens or 0 for r in s.requests)
    for t in s.timelines:
        assert (np.diff(t.end_s) >= 0.010).all()  # no step overlaps the next
        assert t.batch.max(initial=0) <= limits.max_seqs
        assert t.kv_tokens.max(initial=0) <= limits.blocks * 4
    again = simulate.run(schedule, profile(), limits, clock=linear, **options)  # type: ignore[arg-type]
    assert again.requests == s.requests


def step_by_step(schedule: Schedule, limits: Limits) -> tuple[dict[int, list[float]], list[tuple[float, int, int, int]]]:
    """One replica that plans each step anew and jumps over none: token times by request, and (end, batch, KV tokens, waiting) by step."""
    state, at_s, due = batching.new_state(limits), 0.0, deque(enumerate(schedule.scheduled_s.tolist()))
    who: dict[int, int] = {}
    token_s: dict[int, list[float]] = {i: [] for i, _ in due}
    steps = []
    while due or who:
        at_s = at_s if who else max(at_s, due[0][1])
        while due and due[0][1] <= at_s:
            i, _ = due.popleft()
            if schedule.prompt_tokens[i] + schedule.output_tokens[i] <= min(limits.max_context, limits.blocks * limits.block_tokens):
                who[batching.add(state, limits, int(schedule.prompt_tokens[i]), int(schedule.output_tokens[i]))] = i
        if not who:
            continue
        plan = batching.schedule(state, limits)
        at_s += linear(batching.features(state, plan))
        held = (limits.blocks - batching.free_blocks(state)) * limits.block_tokens
        steps.append((at_s, len(plan.rows), held, batching.waiting(state)))
        for row in plan.rows[plan.samples].tolist():
            token_s[who[row]].append(at_s)
        for row in batching.update(state, limits, plan).tolist():
            batching.remove(state, row)
            del who[row]
        batching.check(state, limits)
    return token_s, steps


@given(designs())
@settings(max_examples=60, deadline=None)
def test_jumping_over_steps_that_only_decode_changes_nothing(design: tuple[Schedule, Limits, dict[str, object]]) -> None:
    schedule, limits, _ = design
    token_s, steps = step_by_step(schedule, limits)
    s = simulate.run(schedule, profile(), limits, clock=linear)
    (t,) = s.timelines
    assert {r.index: list(r.token_s) for r in s.requests} == token_s  # to the last bit
    assert list(zip(t.end_s.tolist(), t.batch.tolist(), t.kv_tokens.tolist(), t.waiting.tolist(), strict=True)) == steps


def test_memory_that_is_too_small_for_the_seats_preempts_and_still_finishes() -> None:
    tight = Limits(max_seqs=8, max_step_tokens=64, block_tokens=4, blocks=20, max_context=80)
    rows = [(0.001 * i, 10, 40) for i in range(12)]
    short, ample = (simulate.run(requests(*rows), profile(), limits, clock=linear) for limits in (tight, ROOMY))
    assert short.preemptions > 0
    assert ample.preemptions == 0
    assert {r.outcome for r in short.requests} == {"ok"}
    assert short.busy_s > ample.busy_s  # recomputing is work


# ---------------------------------------------------------------- queues with closed forms


def one_at_a_time(rho: float, prompts: npt.NDArray[np.int64], rng: np.random.Generator) -> Schedule:
    """Poisson arrivals to a server that takes 1 ms a prompt token; mean prompt 1000."""
    at_s = np.cumsum(rng.exponential(1 / rho, len(prompts)))
    return Schedule(scheduled_s=at_s, prompt_tokens=prompts, output_tokens=np.ones(len(prompts), dtype=np.int64))


SERVER = Limits(max_seqs=1, max_step_tokens=10**6, block_tokens=10**6, blocks=1, max_context=10**6)


def waits_s(s: Simulation) -> npt.NDArray[np.float64]:
    return np.array([r.stage_s["queue"] for r in s.requests if r.in_window])


def replicate(simulated: Callable[[int], float], runs: int) -> tuple[float, float]:
    """Return an interval of the mean over independent runs, so sure that it does not miss the truth by chance."""
    interval = stats.mean_interval([simulated(seed) for seed in range(runs)], SURE)
    assert interval is not None
    return interval


@pytest.mark.parametrize(("law", "wait_s"), [("exponential", 0.7 / 0.3), ("constant", 0.7 / 0.6)])
def test_one_seat_waits_as_pollaczek_and_khinchine_say(law: str, wait_s: float) -> None:
    """Mean wait rho (1 + scv) / 2 / (1 - rho) services: M/M/1 and M/D/1 at 70 % load."""

    def mean_wait_s(seed: int) -> float:
        rng, n = np.random.default_rng(seed), 1500 if law == "exponential" else 700
        prompts = np.ceil(rng.exponential(1000, n)) if law == "exponential" else np.full(n, 1000)
        schedule = one_at_a_time(0.7, prompts.astype(np.int64), rng)
        return float(waits_s(simulate.run(schedule, profile(), SERVER, clock=lambda f: 0.001 * f.prefill_tokens)).mean())

    low, high = replicate(mean_wait_s, 12)
    assert low < wait_s < high
    assert high - low < wait_s  # a wide interval would prove nothing


def starts_s(at_s: list[float], services_s: list[float], servers: int) -> list[float]:
    """Return when each customer of a first-come-first-served queue with equal servers begins: Kiefer and Wolfowitz (1955)."""
    free_s = [0.0] * servers
    heapq.heapify(free_s)
    begun = []
    for at, service in zip(at_s, services_s, strict=True):
        begun.append(max(at, free_s[0]))
        heapq.heapreplace(free_s, begun[-1] + service)
    return begun


@pytest.mark.parametrize("seed", range(3))
def test_seats_of_a_batch_serve_as_equal_servers_do(seed: int) -> None:
    """With steps of constant length, n tokens hold a seat for n steps: request by request the G/G/8 queue, but for the wait for a step."""
    step_s, seats, n = 0.01, 8, 400
    limits = Limits(max_seqs=seats, max_step_tokens=1000, block_tokens=10**4, blocks=seats, max_context=10**4)
    rng = np.random.default_rng(seed)
    at_s, outputs = np.cumsum(rng.exponential(1 / 15, n)), rng.geometric(1 / 50, n)  # 94 % load
    schedule = Schedule(scheduled_s=at_s, prompt_tokens=np.ones(n, dtype=np.int64), output_tokens=outputs)
    simulated = simulate.run(schedule, profile(), limits, clock=lambda _: step_s).requests
    begun_s = np.array([r.scheduled_s + r.stage_s["queue"] for r in simulated])
    late_s = begun_s - np.array(starts_s(at_s.tolist(), (outputs * step_s).tolist(), seats))
    assert late_s.min() > -1e-9
    assert late_s.max() < step_s + 1e-9  # the wait for a step does not pile up
    assert (begun_s - at_s).max() > 20 * step_s  # and there was a queue to get wrong


def test_random_routing_splits_a_stream_into_lone_queues_and_least_loaded_beats_it() -> None:
    """Each of four replicas is an M/M/1 of its own; joining the shortest queue waits less on the very same requests."""

    def both(seed: int) -> tuple[float, float]:
        rng = np.random.default_rng(seed)
        schedule = one_at_a_time(4 * 0.7, np.ceil(rng.exponential(1000, 1200)).astype(np.int64), rng)
        runs = [
            simulate.run(schedule, profile(), SERVER, replicas=4, routing=how, seed=seed, clock=lambda f: 0.001 * f.prefill_tokens)
            for how in ("random", "least_loaded")
        ]
        return float(waits_s(runs[0]).mean()), float(waits_s(runs[1]).mean())

    pairs = np.array([both(seed) for seed in range(8)])
    low, high = stats.mean_interval(pairs[:, 0], SURE) or (0.0, 0.0)
    assert low < mmc(0.7, 1.0, 1).wait_s < high
    gain = stats.mean_interval(pairs[:, 0] - pairs[:, 1], SURE)
    assert gain is not None
    assert gain[0] > 0


def test_no_simulation_is_faster_than_the_work_allows() -> None:
    """Each request costs p prompt tokens, o - 1 decodes, and its share of o steps of at most max_seqs: that bounds the throughput."""
    p, o, n, replicas = 20, 30, 300, 2
    most_per_s = replicas / (0.001 * p + 0.002 * (o - 1) + 0.010 * o / ROOMY.max_seqs)
    for rate_per_s in (0.5 * most_per_s, most_per_s, 4 * most_per_s):
        rows = [(i / rate_per_s, p, o) for i in range(n)]
        s = simulate.run(requests(*rows), profile(), ROOMY, replicas=replicas, clock=linear)
        assert n / s.end_s <= most_per_s
        assert s.utilisation <= 1
    assert n / s.end_s > 0.9 * most_per_s  # and a flood comes near it


# ---------------------------------------------------------------- many runs

TRAFFIC = Workload(
    rate_per_s=8.0, arrivals="poisson", prompt_tokens=Lengths(dist="lognormal", mean=20, cv=0.5, max=60), output_tokens=Lengths(mean=10)
)


def test_runs_differ_from_each_other_and_repeat_by_seed() -> None:
    def many(seed: int) -> list[Simulation]:
        return simulate.run_many(TRAFFIC, profile(), ROOMY, replicas=1, runs=3, requests_per_run=60, seed=seed, clock=linear)

    first = many(1)
    assert [s.requests for s in first] == [s.requests for s in many(1)]
    assert first[0].requests != first[1].requests
    assert first[0].requests != many(2)[0].requests


def test_percentiles_are_the_mean_of_the_runs_with_student_s_interval() -> None:
    """Prompts of 10, 20 and 60 tokens make TTFTs of 20, 30 and 70 ms: mean 40, sd 26.46, t(2, 95 %) = 2.920."""
    runs = [simulate.run(requests((0.0, p, 2), (1.0, p, 2)), profile(), ROOMY, clock=linear) for p in (10, 20, 60)]
    found = simulate.percentiles(runs, ["ttft_p50_s", "ttft_p99.9_s", "tpot_mean_s"])
    half = 2.91999 * 0.0264575 / 3**0.5
    assert found["ttft_p50_s"] == pytest.approx((0.040, 0.040 - half, 0.040 + half), rel=1e-4)
    assert found["ttft_p99.9_s"] == pytest.approx(found["ttft_p50_s"])
    assert found["tpot_mean_s"] == pytest.approx((0.012, 0.012, 0.012))


def test_percentiles_leave_out_what_a_run_does_not_have() -> None:
    runs = [simulate.run(requests((0.0, 5, n), (1.0, 5, n)), profile(), ROOMY, clock=linear) for n in (1, 2)]
    assert set(simulate.percentiles(runs, ["tpot_p50_s", "e2e_p50_s"])) == {"e2e_p50_s"}
    with pytest.raises(BadInput, match="at least 2"):
        simulate.percentiles(runs[:1], ["ttft_p50_s"])
    with pytest.raises(BadInput, match="ttft_p95_s"):
        simulate.percentiles(runs, ["tfft_p95_s"])


def test_a_summary_of_a_simulation_agrees_with_its_own_figures() -> None:
    """`summary` reads simulated requests as it reads measured ones."""
    s = simulate.run(workload.schedule(TRAFFIC, n=200, seed=3), profile(), ROOMY, clock=linear)
    told = summary.summarise(
        s.requests, source="simulation", target="hand-made", arrivals="poisson", offered_rate_per_s=8.0, slo=None,
        window=s.window, validity=Validity(verdict="valid"),
    )  # fmt: skip
    found = simulate.percentiles([s, s], ["ttft_p95_s", "e2e_p50_s", "throughput_tokens_per_s"])
    assert (told.requests, told.ok, told.errors) == (180, 180, {})
    assert told.ttft_s.p95 == pytest.approx(found["ttft_p95_s"][0])
    assert told.e2e_s.p50 == pytest.approx(found["e2e_p50_s"][0])
    assert told.output_tokens_per_s == pytest.approx(found["throughput_tokens_per_s"][0])
