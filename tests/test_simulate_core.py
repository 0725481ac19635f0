"""Whole runs in one call: compiled as plain, policies by hand, prefix blocks that add up, and what is kept of a million requests."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import batching, hardware, jit, latency, models
from mlsys_bench.batching import Limits, Policy, StepFeatures
from mlsys_bench.batching.arrays import BLOCKS, CACHED, HASH_AT, HELD, HOST, IDLE, ON_DEVICE, ON_HOST, OWNED, PLACE, SEATED, SEATS, USERS
from mlsys_bench.errors import BadInput
from mlsys_bench.simulate import core, kernel
from mlsys_bench.simulate.core import Tracks
from mlsys_bench.simulate.replica import Job, Replica
from mlsys_bench.types import LatencyProfile
from mlsys_bench.workload import Schedule

needs_numba = pytest.mark.skipif(not jit.HAVE_NUMBA, reason="numba is not installed (extra `fast`)")
WORKLOADS = int(os.environ.get("MLSYS_TWIN_WORKLOADS", "0"))  # of the comparisons below; `nox -s bench -- simulate` asks for 10,000
ROOMY = Limits(max_seqs=8, max_step_tokens=64, block_tokens=4, blocks=1000, max_context=400)


def linear(f: StepFeatures) -> float:
    """10 ms a step, 1 ms a prompt token, 2 ms a decode."""
    return 0.010 + 0.001 * f.prefill_tokens + 0.002 * f.decode_seqs


def requests(*rows: tuple[float, int, int], hashes: Sequence[Sequence[int]] | None = None, block_tokens: int = 0) -> Schedule:
    """Return a schedule of (scheduled_s, prompt tokens, output tokens)."""
    at_s, prompts, outputs = zip(*rows, strict=True)
    shared = {}
    if hashes is not None:
        shared = {
            "prefix_offsets": np.cumsum([0, *(len(h) for h in hashes)]),
            "prefix_hashes": np.array([h for of in hashes for h in of], dtype=np.int64),
            "prefix_block_tokens": block_tokens,
        }
    return Schedule(scheduled_s=np.array(at_s, dtype=float), prompt_tokens=np.array(prompts), output_tokens=np.array(outputs), **shared)  # type: ignore[arg-type]


def play(*rows: tuple[float, int, int], limits: Limits = ROOMY, policy: Policy = core.VLLM, **sharing: object) -> Tracks:
    return core.play(requests(*rows, **sharing), limits, clock=linear, policy=policy, keep_tokens=True)  # type: ignore[arg-type]


def tokens_s(tracks: Tracks) -> list[list[float]]:
    """Return the times of the tokens by request."""
    assert tracks.token_s is not None
    assert tracks.token_at is not None
    return [tracks.token_s[at : at + n].tolist() for at, n in zip(tracks.token_at, tracks.tokens, strict=True)]


# ---------------------------------------------------------------- policies by hand


def test_prefill_first_lets_decodes_stand_back_until_the_prompts_are_done() -> None:
    """SGLang: B's prompt has a step of its own, in which A, who decodes, gets nothing."""
    rows = [(0.0, 10, 3), (0.005, 5, 2)]
    mine, yours = (tokens_s(play(*rows, policy=Policy(prefill_first=p))) for p in (1, 0))
    assert mine == [pytest.approx([0.020, 0.049, 0.061]), pytest.approx([0.035, 0.049])]
    assert yours == [pytest.approx([0.020, 0.037, 0.051]), pytest.approx([0.037, 0.051])]


def test_mixed_chunks_take_decodes_along_with_the_prompts() -> None:
    mixed = tokens_s(play((0.0, 10, 3), (0.005, 5, 2), policy=Policy(prefill_first=1, mixed=1)))
    assert mixed == [pytest.approx([0.020, 0.037, 0.051]), pytest.approx([0.037, 0.051])]


def test_without_chunks_a_prompt_waits_for_a_step_that_holds_it_whole() -> None:
    """50 tokens do not fit beside the other 50 in a step of 64; with chunks 14 of them do."""
    rows = [(0.0, 50, 1), (0.0, 50, 1)]
    assert tokens_s(play(*rows, policy=Policy(chunked=0))) == [pytest.approx([0.060]), pytest.approx([0.120])]
    assert tokens_s(play(*rows)) == [pytest.approx([0.074]), pytest.approx([0.120])]
    assert play((0.0, 70, 1), policy=Policy(chunked=0)).fate.tolist() == [400]


def test_full_reservation_never_preempts_and_seats_fewer() -> None:
    """8 blocks of 4 tokens: each request ends with 12 tokens, so two are seated; on demand three are, and one is set back."""
    limits = Limits(max_seqs=4, max_step_tokens=64, block_tokens=4, blocks=8, max_context=32)
    rows = [(0.0, 4, 8)] * 3
    on_demand, full = (play(*rows, limits=limits, policy=Policy(reserve=r)) for r in (0.0, 1.0))
    assert (on_demand.preemptions > 0, full.preemptions) == (True, 0)
    assert np.isclose(on_demand.started_s, 0.0).all()
    assert (full.started_s > 0).tolist() == [False, False, True]
    assert full.started_s[2] == full.last_s[0]
    asked = play(*rows, limits=limits, policy=Policy(reserve=1.0, reserve_output=20))  # as if clients asked for 20: one at a time
    assert np.diff(asked.started_s) == pytest.approx(np.diff(asked.last_s))
    assert asked.started_s[1] == asked.last_s[0]


def test_swapped_sequences_go_on_where_they_were_and_pay_for_the_way() -> None:
    """Three blocks of two tokens, two requests of 2 + 3: B gives its block to A, and gets it back when A is done."""
    limits = Limits(max_seqs=4, max_step_tokens=16, block_tokens=2, blocks=3, max_context=6)
    rows = [(0.0, 2, 3), (0.0, 2, 3)]
    again, moved = (play(*rows, limits=limits, policy=Policy(swap=s, move_s=0.1)) for s in (0, 1))
    assert again.preemptions == moved.preemptions == 1
    step, alone = 0.014, 0.012
    a = [step, step + alone + 0.1, step + 2 * alone + 0.1]  # one block out in A's first decode
    assert tokens_s(moved) == [pytest.approx(a), pytest.approx([step, a[2] + alone + 0.1, a[2] + 2 * alone + 0.1])]  # and one in
    prefill = 0.013  # of the three tokens B knows by then
    a = [step, step + alone, step + 2 * alone]
    assert tokens_s(again) == [pytest.approx(a), pytest.approx([step, a[2] + prefill, a[2] + prefill + alone])]


def test_a_static_batch_waits_until_it_is_full_or_its_oldest_has_waited_enough() -> None:
    limits = ROOMY._replace(max_seqs=2)
    rows = [(0.0, 10, 2), (0.1, 10, 4), (0.15, 10, 1), (0.9, 10, 1)]
    tracks = play(*rows, limits=limits, policy=Policy(gather=1, gather_s=0.3))
    first_end = 0.1 + 0.030 + 0.014 + 0.012 + 0.012  # both prefill, both decode, B decodes twice alone
    assert tracks.started_s == pytest.approx([0.1, 0.1, 0.45, 1.2])  # C waits 0.3 s in vain, and D, for it cannot know to be the last
    assert tracks.last_s[1] == pytest.approx(first_end)
    assert tracks.last_s[2] == pytest.approx(0.47)
    dynamic = play((0.0, 10, 2), (0.01, 10, 1), (0.02, 10, 1), limits=limits, policy=Policy(gather=1, gather_s=math.inf))
    assert dynamic.started_s == pytest.approx([0.01, 0.01, dynamic.last_s[0]])


def test_drafts_that_are_all_right_give_so_many_tokens_a_step_and_none_that_are_wrong_only_cost() -> None:
    """Each decode carries k + 1 tokens: 10 + 2 (k + 1) ms; the last step drafts no further than the end."""
    right, wrong = (tokens_s(play((0.0, 10, 6), policy=Policy(drafts=2, acceptance=a))) for a in (1.0, 0.0))
    assert right == [pytest.approx([0.020, 0.036, 0.036, 0.036, 0.050, 0.050])]
    assert wrong == [pytest.approx([0.020, 0.036, 0.052, 0.068, 0.082, 0.094])]


def test_drafts_are_accepted_as_often_as_asked() -> None:
    """Of k = 3 drafts, a step gives 1 + a + a^2 + a^3 tokens on average."""
    a = 0.7
    tracks = play(*[(10.0 * i, 1, 301) for i in range(30)], policy=Policy(drafts=3, acceptance=a))
    decodes = tracks.steps - 30
    assert (tracks.tokens.sum() - 30) / decodes == pytest.approx(1 + a + a**2 + a**3, rel=0.02)


def test_which_drafts_are_right_depends_on_the_seed_and_the_replica_and_nothing_else() -> None:
    twice = requests((0.0, 10, 200), (0.0, 10, 200))
    how = {"clock": linear, "policy": Policy(drafts=3, acceptance=0.7)}
    ends = [core.play(twice, ROOMY, replicas=2, routing="round_robin", seed=s, **how).last_s.tolist() for s in (0, 0, 1, 2)]  # type: ignore[arg-type]
    assert ends[0] == ends[1]
    assert len({s for pair in ends for s in pair}) == 6  # two replicas, three seeds
    lone = requests((0.0, 10, 200))
    assert len({core.circulate(lone, ROOMY, users=1, seed=s, **how).last_s[0] for s in range(3)}) == 3  # type: ignore[arg-type]


# ---------------------------------------------------------------- prefix blocks


def test_a_prompt_that_was_seen_before_is_not_computed_again() -> None:
    """Two whole blocks of 8 are shared: the second prompt of 20 has 4 tokens to compute; of an equal one the last token is."""
    same = play((0.0, 20, 1), (1.0, 20, 1), (2.0, 16, 1), hashes=[[1, 2, 3], [1, 2, 4], [1, 2]], block_tokens=8)
    assert (same.first_s - same.arrived_s).tolist() == pytest.approx([0.030, 0.014, 0.018])
    assert (same.hit_tokens, same.asked_tokens) == (16 + 8, 56)
    off = play((0.0, 20, 1), (1.0, 20, 1), policy=Policy(prefix_cache=0), hashes=[[1, 2, 3], [1, 2, 4]], block_tokens=8)
    assert (off.first_s - off.arrived_s).tolist() == pytest.approx([0.030, 0.030])


def test_an_answer_can_be_the_prefix_of_the_next_turn() -> None:
    """Where the hashes go on beyond the prompt they are those of the answer, but for its last token, which is never computed."""
    turns = play((0.0, 8, 9), (1.0, 24, 1), hashes=[[1, 2], [1, 2, 3]], block_tokens=8)
    assert turns.hit_tokens == 16
    assert turns.first_s[1] - 1.0 == pytest.approx(0.010 + 0.008)


def test_the_block_longest_unused_is_forgotten_first_and_comes_back_from_the_host_at_a_price() -> None:
    """Five KV blocks of 4 hold two cached prompts of 8; a third of 12 tokens needs more than the one left."""
    limits = Limits(max_seqs=4, max_step_tokens=64, block_tokens=4, blocks=5, max_context=20)
    rows, hashes = [(0.0, 8, 1), (1.0, 8, 1), (2.0, 12, 1), (3.0, 9, 1), (4.0, 9, 1)], [[1, 2], [3, 4], [5, 6, 7], [3, 4], [1, 2]]
    gone = play(*rows, limits=limits, hashes=hashes, block_tokens=4)
    ttft_s = (gone.first_s - gone.arrived_s).tolist()
    assert ttft_s == pytest.approx([0.018, 0.018, 0.022, 0.011, 0.019])
    kept = play(*rows, limits=limits, policy=Policy(host_blocks=8, move_s=0.001), hashes=hashes, block_tokens=4)
    assert (kept.first_s - kept.arrived_s)[4] == pytest.approx(0.010 + 0.001 + 2 * 0.001)  # two blocks come back from the host


@st.composite
def shared_prompts(draw: st.DrawFn) -> tuple[Limits, Policy, list[tuple[float, int, int, tuple[int, ...]]]]:
    """Return requests that share prefixes in little memory, and policies of all kinds."""
    blocks = draw(st.integers(6, 30))
    limits = Limits(
        max_seqs=draw(st.integers(1, 5)), max_step_tokens=draw(st.integers(4, 40)), block_tokens=2, blocks=blocks, max_context=2 * blocks
    )
    policy = Policy(
        prefill_first=draw(st.integers(0, 1)), mixed=draw(st.integers(0, 1)), reserve=draw(st.sampled_from([0.0, 0.5, 1.0])),
        swap=draw(st.integers(0, 1)), move_s=0.001, host_blocks=draw(st.sampled_from([0, 6, 100])), drafts=draw(st.integers(0, 2)),
        acceptance=0.6,
    )  # fmt: skip
    rows = []
    for _ in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, 2 * blocks - 2))
        output = draw(st.integers(1, min(12, 2 * blocks - prompt)))
        path = draw(st.lists(st.integers(0, 1), min_size=prompt // 4, max_size=prompt // 4))
        hashes = tuple(hash(tuple(path[: i + 1])) for i in range(len(path)))
        rows.append((draw(st.floats(0, 0.3)), prompt, output, hashes))
    return limits, policy, sorted(rows)


@given(shared_prompts())
@settings(max_examples=150, deadline=None)
def test_blocks_add_up_whatever_happens_and_everybody_gets_an_answer(
    case: tuple[Limits, Policy, list[tuple[float, int, int, tuple[int, ...]]]],
) -> None:
    limits, policy, rows = case
    replica = Replica(limits, linear, policy, prefix_tokens=4)
    for i, (at_s, prompt, output, hashes) in enumerate(rows):
        replica.advance(at_s)
        replica.offer(Job(i, at_s), prompt, output, hashes=hashes)
        adds_up(replica)
        if i % 4 == 3 and replica.jobs:
            replica.cancel(next(iter(replica.jobs.values())))
            adds_up(replica)
    while replica.jobs:
        replica.advance(replica.next_s())
        adds_up(replica)
    assert replica.free_kv_tokens == limits.blocks * limits.block_tokens
    assert len(replica.done) == len(rows) - len(rows) // 4 or any(i % 4 == 3 for i in range(len(rows)))
    who, _ = replica.tokens()
    for job in replica.done:
        assert (who == job.index).sum() == rows[job.index][2]


def adds_up(replica: Replica) -> None:
    """Assert that every block is free, idle, shared or somebody's own."""
    a = replica._s.a
    counts, rows = a.counts, a.rows
    width = 2  # KV blocks of a prefix block
    assert counts[IDLE] == width * sum(p == ON_DEVICE and u == 0 for p, u in zip(a.prefixes[PLACE], a.prefixes[USERS], strict=True))
    assert counts[HOST] == sum(p == ON_HOST for p in a.prefixes[PLACE])
    seated = a.slots[SEATS][: counts[SEATED]]
    owned = {row: sum(a.hashes[OWNED][rows[HASH_AT][row] : rows[HASH_AT][row] + rows[CACHED][row]]) for row in seated}
    assert sum(owned.values()) == sum(a.prefixes[USERS])
    private = sum(rows[HELD][row] - width * owned[row] for row in seated)
    shared = width * sum(u > 0 for u in a.prefixes[USERS])
    assert counts[BLOCKS] == replica.limits.blocks - private - shared
    assert 0 <= counts[IDLE] <= counts[BLOCKS]


# ---------------------------------------------------------------- compiled and plain


def some_profile() -> LatencyProfile:
    return latency.roofline(models.find("llama-3-8b"), hardware.find("H100"), precision="bf16")


def anything(rng: np.random.Generator) -> tuple[Schedule, Limits, Policy, dict[str, object]]:
    """Return requests, limits, rules and routing drawn from all there is."""
    block_tokens, blocks, n = int(rng.integers(1, 6)), int(rng.integers(4, 60)), int(rng.integers(1, 30))
    most = block_tokens * blocks
    limits = Limits(int(rng.integers(1, 8)), int(rng.integers(1, 60)), block_tokens, blocks, int(rng.integers(2, most + 1)))
    prompts = rng.integers(1, max(2, min(most, 80)), n)
    outputs = rng.integers(1, 20, n)
    width = block_tokens * int(rng.integers(1, 4))
    counts = prompts // width
    hashes = [rng.integers(0, 2, c).cumsum() * 100 + np.arange(c) for c in counts]
    policy = Policy(
        chunked=int(rng.integers(0, 2)), prefill_first=int(rng.integers(0, 2)), mixed=int(rng.integers(0, 2)),
        reserve=float(rng.choice([0.0, 0.3, 1.0])), reserve_output=int(rng.choice([0, 10])), swap=int(rng.integers(0, 2)), move_s=1e-4,
        prefix_cache=int(rng.integers(0, 2)), host_blocks=int(rng.choice([0, 20])), drafts=int(rng.choice([0, 0, 3])), acceptance=0.7,
        gather=int(rng.random() < 0.2), gather_s=0.05,
    )  # fmt: skip
    schedule = Schedule(
        scheduled_s=np.sort(rng.exponential(0.05, n)), prompt_tokens=prompts, output_tokens=outputs,
        prefix_offsets=np.concatenate([[0], np.cumsum(counts)]), prefix_hashes=np.concatenate([*hashes, np.zeros(0)]).astype(np.int64),
        prefix_block_tokens=width,
    )  # fmt: skip
    how = {
        "replicas": int(rng.integers(1, 4)), "routing": str(rng.choice(list(core.ROUTINGS))), "seed": int(rng.integers(9)),
        "queue_limit": None if rng.random() < 0.7 else int(rng.integers(0, 5)), "stop_s": math.inf if rng.random() < 0.8 else 0.05,
    }  # fmt: skip
    return schedule, limits, policy, how


def differences(one: Tracks, other: Tracks) -> list[str]:
    """Return in what two runs differ, be it by the last bit."""
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in Tracks.__dataclass_fields__ if name != "timelines"]
    for a, b in zip(one.timelines, other.timelines, strict=True):
        pairs += [(name, getattr(a, name), getattr(b, name)) for name in ("end_s", "batch", "kv_tokens", "waiting", "stride")]
    return [name for name, a, b in pairs if not np.array_equal(a, b, equal_nan=isinstance(a, np.ndarray) and a.dtype.kind == "f")]


@needs_numba
def test_compiled_and_plain_runs_are_the_same_to_the_last_bit() -> None:
    """All policies, routings and closed loops."""
    rng, profile = np.random.default_rng(7), some_profile()
    for _ in range(WORKLOADS or 150):
        schedule, limits, policy, how = anything(rng)
        fast, slow = (
            core.play(schedule, limits, profile=profile, policy=policy, keep_tokens=True, compiled=c, **how)  # type: ignore[arg-type]
            for c in (True, False)
        )
        assert differences(fast, slow) == []
        users = int(rng.integers(1, 10))
        fast, slow = (
            core.circulate(schedule, limits, users=users, profile=profile, policy=policy, keep_tokens=True, compiled=c)
            for c in (True, False)
        )
        assert differences(fast, slow) == []


def test_steps_one_by_one_are_the_same_as_steps_jumped_over() -> None:
    """Under every policy, to the last bit."""
    rng, profile = np.random.default_rng(8), some_profile()
    for _ in range(WORKLOADS or 150):
        schedule, limits, policy, how = anything(rng)
        jumped = core.play(schedule, limits, profile=profile, policy=policy, keep_tokens=True, compiled=False, **how)  # type: ignore[arg-type]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "_jump", lambda *_: 0)
            stepped = core.play(schedule, limits, profile=profile, policy=policy, keep_tokens=True, compiled=False, **how)  # type: ignore[arg-type]
        assert differences(jumped, stepped) == []


def test_the_simulator_decides_as_the_engine_s_scheduler_does() -> None:
    """The engine's own calls, step by step under the same clock, give the same tokens at the same times, to the last bit."""
    rng, profile = np.random.default_rng(9), some_profile()
    for _ in range(WORKLOADS or 100):
        schedule, limits, _, _ = anything(rng)
        lone = dataclasses.replace(schedule, prefix_offsets=None, prefix_hashes=None)
        simulated = core.play(lone, limits, profile=profile, keep_tokens=True, compiled=False)
        assert engine_s(lone, limits, latency.clock(profile)) == tokens_s(simulated)


def engine_s(schedule: Schedule, limits: Limits, clock: Callable[[StepFeatures], float]) -> list[list[float]]:
    """Return when each request gets its tokens from the engine's scheduler."""
    state, now_s, coming = batching.new_state(limits), 0.0, 0
    token_s: list[list[float]] = [[] for _ in schedule.scheduled_s]
    who: dict[int, int] = {}
    at_s, prompts, outputs = (values.tolist() for values in (schedule.scheduled_s, schedule.prompt_tokens, schedule.output_tokens))
    while who or coming < len(at_s):
        if not who:
            now_s = max(now_s, at_s[coming])
        while coming < len(at_s) and at_s[coming] <= now_s:
            if batching.misfit(limits, Policy(), prompts[coming], outputs[coming]) is None:
                who[batching.add(state, limits, prompts[coming], outputs[coming])] = coming
            coming += 1
        if who:
            plan = batching.schedule(state, limits)
            now_s += clock(batching.features(state, plan))
            for row in plan.rows[plan.samples].tolist():
                token_s[who[row]].append(now_s)
            for row in batching.update(state, limits, plan).tolist():
                batching.remove(state, row)
                del who[row]
    return token_s


# ---------------------------------------------------------------- whole runs


def test_a_closed_loop_sends_the_next_request_when_one_has_ended() -> None:
    """Two users, one seat: each waits for the other, and a pause later its next request is there."""
    limits = ROOMY._replace(max_seqs=1)
    tracks = core.circulate(requests(*[(0.0, 10, 1)] * 5), limits, users=2, clock=linear, pause_s=0.005)
    assert tracks.arrived_s == pytest.approx([0.0, 0.0, 0.025, 0.045, 0.065])
    assert tracks.first_s == pytest.approx([0.020, 0.040, 0.060, 0.080, 0.100])


def test_a_request_that_can_never_run_does_not_stop_a_closed_loop() -> None:
    tracks = core.circulate(requests((0.0, 500, 1), (0.0, 10, 1), (0.0, 10, 1)), ROOMY, users=1, clock=linear)
    assert tracks.fate.tolist() == [400, 200, 200]


def test_throughput_is_what_the_steps_allow_and_no_more() -> None:
    profile, limits = some_profile(), Limits(max_seqs=32, max_step_tokens=2048, block_tokens=16, blocks=2000, max_context=8192)
    rng, n = np.random.default_rng(1), 300
    schedule = Schedule(scheduled_s=np.zeros(n), prompt_tokens=rng.integers(1, 900, n), output_tokens=rng.integers(1, 200, n))
    tracks = core.play(schedule, limits, profile=profile)
    most_per_s = max(b / latency.step_s(profile, StepFeatures(b, b, 0, 0.0, b)) for b in range(1, 33))
    assert tracks.tokens.sum() / tracks.busy_s < most_per_s
    assert tracks.sequence_s / tracks.busy_s <= 32
    assert tracks.kv_token_s / tracks.busy_s <= limits.blocks * limits.block_tokens


def test_gaps_between_tokens_are_counted_in_narrow_bins() -> None:
    rng, n = np.random.default_rng(2), 60
    rows = [
        (float(t), int(p), int(o))
        for t, p, o in zip(np.sort(rng.exponential(1, n)), rng.integers(1, 60, n), rng.integers(2, 40, n), strict=True)
    ]
    tracks = play(*rows)
    gaps = np.concatenate([np.diff(of) for of in tokens_s(tracks)])
    assert tracks.gaps.sum() == len(gaps)
    for p in (0.05, 0.5, 0.9, 0.99):
        assert tracks.gap_quantile_s(p) == pytest.approx(np.quantile(gaps, p, method="inverted_cdf"), rel=0.003)
        at_s = tracks.gap_quantile_s(p)
        assert np.mean(gaps <= 0.997 * at_s) <= core.share_of_gaps(tracks.gaps, at_s) <= np.mean(gaps <= 1.003 * at_s)
    assert core.share_of_gaps(tracks.gaps, 0.997 * gaps.min()) == 0
    assert core.share_of_gaps(tracks.gaps, 1.003 * gaps.max()) == 1
    assert tracks.worst_gap_s == pytest.approx([max(np.diff(of)) for of in tokens_s(tracks)])


def test_a_long_timeline_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [(0.01 * i, 5, 20) for i in range(30)]
    whole = play(*rows).timelines[0]
    monkeypatch.setattr(core, "LINES", 16)
    thin = play(*rows).timelines[0]
    assert thin.stride > 1
    assert 8 <= len(thin.end_s) <= 16
    np.testing.assert_array_equal(thin.end_s, whole.end_s[thin.stride - 1 :: thin.stride])
    np.testing.assert_array_equal(thin.kv_tokens, whole.kv_tokens[thin.stride - 1 :: thin.stride])


def test_power_of_two_choices_lies_between_random_and_least_loaded() -> None:
    rng, n = np.random.default_rng(3), 1500
    schedule = Schedule(
        scheduled_s=np.cumsum(rng.exponential(1 / 90, n)), prompt_tokens=np.full(n, 10), output_tokens=rng.geometric(1 / 10, n)
    )
    limits = ROOMY._replace(max_seqs=2)
    wait_s = {
        how: float(np.mean((t := core.play(schedule, limits, clock=linear, replicas=8, routing=how)).first_s - t.arrived_s))
        for how in ("random", "power_of_two", "least_loaded")
    }
    assert wait_s["least_loaded"] < wait_s["power_of_two"] < wait_s["random"]


@pytest.mark.parametrize(
    ("policy", "says"), [(Policy(reserve=1.5), "reserve"), (Policy(acceptance=-0.1), "acceptance"), (Policy(drafts=-1), "drafts")]
)
def test_rules_that_make_no_sense_are_refused_by_name(policy: Policy, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        play((0.0, 1, 1), policy=policy)


def test_what_cannot_be_simulated_is_refused_by_name() -> None:
    some = requests((0.0, 1, 1))
    with pytest.raises(BadInput, match="not made of KV blocks"):
        play((0.0, 9, 1), hashes=[[1]], block_tokens=6)
    with pytest.raises(BadInput, match="profile or a clock"):
        core.play(some, ROOMY)
    with pytest.raises(BadInput, match="0 users"):
        core.circulate(some, ROOMY, users=0, clock=linear)
    with pytest.raises(BadInput, match="least_loaded"):
        core.play(some, ROOMY, clock=linear, routing="least_lodaed")
    with pytest.raises(BadInput, match="in order of time"):
        play((1.0, 1, 1), (0.0, 1, 1))
    with pytest.raises(BadInput, match="wait for an answer"):
        play((0.0, 1, 1), (math.nan, 1, 1))


def test_an_endless_cache_finds_all_that_was_ever_published() -> None:
    """One request after another: what it shares with all before it, counted here with a set."""
    rng, width, n = np.random.default_rng(4), 8, 200
    paths = [rng.integers(0, 3, int(rng.integers(1, 6))) for _ in range(n)]
    hashes = [[hash(tuple(path[: i + 1].tolist())) for i in range(len(path))] for path in paths]
    prompts = [width * len(path) + int(rng.integers(1, width)) for path in paths]
    tracks = core.play(requests(*[(10.0 * i, p, 2) for i, p in enumerate(prompts)], hashes=hashes, block_tokens=width), ROOMY, clock=linear)
    seen, found = set[int](), 0
    for of in hashes:
        found += width * next((i for i, h in enumerate(of) if h not in seen), len(of))
        seen |= set(of)
    assert tracks.hit_tokens == found > 0
    assert tracks.asked_tokens == sum(prompts)
