"""What a simulation does where two of its rules meet: memory and queue limits, batches and closed loops, sessions and caches, failures."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import simulate
from mlsys_bench.batching import Limits, Policy
from mlsys_bench.latency import ways
from mlsys_bench.simulate import Conditions, Failures, Retries, Simulation, outcome
from mlsys_bench.workload import Schedule, prefix
from tests.simulated import linear, profile, requests

ROOMY = Limits(max_seqs=8, max_step_tokens=4096, block_tokens=16, blocks=1000, max_context=4000)
PATIENT = Conditions(timeout_s=1e9)  # patience without end goes event by event


def run(schedule: Schedule, limits: Limits = ROOMY, **more: Any) -> Simulation:
    return simulate.run(schedule, profile(), limits, clock=linear, **more)


def fates(s: Simulation) -> list[tuple[str, int | None]]:
    return [(r.outcome, r.http_status) for r in sorted(s.requests, key=lambda r: r.index)]


# ---------------------------------------------------------------- queues


@pytest.mark.parametrize("conditions", [Conditions(), PATIENT])
def test_who_waits_for_memory_stands_in_the_queue_though_seats_are_free(conditions: Conditions) -> None:
    """A fills all four blocks until 0.041 + 8 x 0.012 s.  B waits, C finds the one place taken, D comes when both are done."""
    full = Limits(max_seqs=8, max_step_tokens=1000, block_tokens=10, blocks=4, max_context=40)
    rows = [(0.0, 31, 9), (0.05, 31, 2), (0.08, 31, 2), (1.0, 31, 2)]
    found = run(requests(*rows), full, queue_limit=1, conditions=conditions)
    assert fates(found) == [("ok", 200), ("ok", 200), ("rejected", 429), ("ok", 200)]
    assert fates(run(requests(*rows), full, queue_limit=2, conditions=conditions))[2] == ("ok", 200)


@pytest.mark.parametrize("conditions", [Conditions(), PATIENT])
def test_who_gets_a_seat_in_the_next_step_does_not_wait(conditions: Conditions) -> None:
    """Four come within a step and no place is in the queue: three of four seats are free, and the fourth of them finds none."""
    rows = [(0.0, 10, 5), (0.001, 10, 5), (0.002, 10, 5), (0.003, 10, 5), (0.004, 10, 5)]
    found = run(requests(*rows), ROOMY._replace(max_seqs=4), queue_limit=0, conditions=conditions)
    assert [status for _, status in fates(found)] == [200, 200, 200, 200, 429]


# ---------------------------------------------------------------- batches that wait to fill


@given(
    st.lists(st.tuples(st.floats(0, 3), st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=12),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.2, 60.0]),
)
@settings(max_examples=60, deadline=None)
def test_gathered_batches_are_the_same_in_one_call_and_event_by_event(
    rows: list[tuple[float, int, int]], seats: int, wait_s: float
) -> None:
    schedule, limits = requests(*sorted(rows)), ROOMY._replace(max_seqs=seats)
    once, events = (run(schedule, limits, policy=Policy(gather=1, gather_s=wait_s), conditions=c) for c in (Conditions(), PATIENT))
    assert [r.token_s for r in once.requests] == [pytest.approx(r.token_s) for r in events.requests]


@pytest.mark.parametrize("think_s", [0.0, 1e-9])
def test_a_closed_loop_of_fewer_users_than_seats_waits_for_the_batch_to_fill(think_s: float) -> None:
    """Two users of four seats: the server cannot know that nobody else comes, and holds each round for 2 s."""
    found = simulate.closed(
        profile(), ROOMY._replace(max_seqs=4), concurrency=2, prompt_tokens=[10] * 6, output_tokens=[1] * 6, n=6, think_s=think_s,
        window="all", clock=linear, policy=Policy(gather=1, gather_s=2.0),
    )  # fmt: skip
    assert [r.token_s[0] - r.scheduled_s for r in found.requests] == pytest.approx([2.030] * 6, abs=1e-6)


# ---------------------------------------------------------------- closed loops


@pytest.mark.parametrize("think_s", [0.0, 1e-12])
def test_what_was_learned_of_open_loops_is_left_out_of_closed_ones_whether_users_think_or_not(think_s: float) -> None:
    own = profile(**{ways.THERE: 0.001, ways.BACK: 0.002, ways.PROMPT: 0.1, ways.PLANNED: 3.0})
    found = simulate.closed(
        own, ROOMY, concurrency=1, prompt_tokens=[10] * 3, output_tokens=[2] * 3, n=3, think_s=think_s, window="all", clock=linear
    )
    assert [r.token_s[0] - r.scheduled_s for r in found.requests] == pytest.approx([0.001 + 0.020 + 0.002] * 3)


# ---------------------------------------------------------------- sessions and caches


def talk(*turns: tuple[int, int], block_tokens: int = 16, session: int = 0) -> Schedule:
    """Return one session of (prompt, output) turns, each prompt with all before it; its blocks are 0, 1, …"""
    counts = [prompt // block_tokens for prompt, _ in turns]
    return Schedule(
        scheduled_s=np.array([0.0, *(math.nan for _ in turns[1:])]), prompt_tokens=np.array([p for p, _ in turns]),
        output_tokens=np.array([o for _, o in turns]), prefix_offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        prefix_hashes=np.concatenate([np.arange(n) for n in counts]).astype(np.int64), prefix_block_tokens=block_tokens,
        session=np.full(len(turns), session, dtype=np.int32), turn=np.arange(len(turns), dtype=np.int32),
        gap_s=np.array([0.0, *(0.5 for _ in turns[1:])]),
    )  # fmt: skip


def test_a_turn_finds_the_answer_before_it_in_the_cache() -> None:
    """64 tokens and an answer of 640 fill 43 blocks, the last token not being computed: 688 of the next prompt's 768 tokens."""
    found = run(talk((64, 640), (768, 10)))
    assert (found.prefix_hit_tokens, found.prefix_asked_tokens) == (688, 64 + 768)
    other = talk((64, 640), (768, 10))
    assert other.prefix_hashes is not None
    other.prefix_hashes[4:] += 1000  # the agent has written its prompt anew
    assert run(other).prefix_hit_tokens == 0


@given(st.lists(st.tuples(st.integers(1, 70), st.integers(1, 90)), min_size=1, max_size=5), st.sampled_from([4, 16]))
@settings(max_examples=60, deadline=None)
def test_hashes_of_answers_are_those_of_the_next_prompt(asked: list[tuple[int, int]], block_tokens: int) -> None:
    """Where a prompt and its answer fill blocks beyond the prompt's last, their hashes are 0, 1, … as far as the next prompt tells."""
    turns, before = [], 0
    for new, output in asked:
        turns.append((before + new, output))
        before += new + output
    plan = talk(*turns, block_tokens=block_tokens)
    offsets, hashes = prefix.with_answers(plan)
    for i, (prompt, output) in enumerate(turns):
        own = hashes[offsets[i] : offsets[i + 1]].tolist()
        assert own == list(range(len(own)))
        following = turns[i + 1][0] // block_tokens if i + 1 < len(turns) else prompt // block_tokens
        assert prompt // block_tokens <= len(own) <= following
        if following > -(-prompt // block_tokens):
            assert len(own) >= min(following, (prompt + output - 1) // block_tokens)


def test_prefix_blocks_shorter_than_those_of_the_engine_are_taken_together() -> None:
    """Of chained hashes every second one stands for 32 tokens; a block that is not full is left out."""
    plan = talk((80, 5), (112, 5))
    wide = prefix.in_blocks(plan, 32)
    assert wide.prefix_block_tokens == 32
    assert wide.prefix_offsets is not None
    assert wide.prefix_hashes is not None
    assert (wide.prefix_offsets.tolist(), wide.prefix_hashes.tolist()) == ([0, 2, 5], [1, 3, 1, 3, 5])
    assert prefix.in_blocks(plan, 16) is plan
    assert prefix.in_blocks(plan, 24) is plan
    found = run(plan, ROOMY._replace(block_tokens=32, blocks=100))
    assert found.prefix_hit_tokens == 64


# ---------------------------------------------------------------- what is counted


def test_work_lost_in_a_failure_is_in_no_mean() -> None:
    """The only replica fails 1 s into the 9.01 s of a prompt: one sequence, for 1 s."""
    conditions = Conditions(failures=Failures(repair_s=1.0, times=((1.0, 0),)))
    found = run(requests((0.0, 9000, 1)), Limits(1, 10_000, 10_000, 1, 10_000), conditions=conditions)
    assert found.busy_s == pytest.approx(1.0)
    assert found.sequence_s == pytest.approx(1.0)
    assert found.kv_token_s == pytest.approx(10_000 * 1.0)


def test_a_replica_at_rest_is_not_shown_as_busy() -> None:
    """Two requests of 0.13 s now and two after 100 s: on average over the points as much runs as over time."""
    found = run(requests((0.0, 10, 10), (0.0, 10, 10), (100.0, 10, 10), (100.0, 10, 10)))
    used = outcome.fleet_use([found])
    assert float(np.mean(used.series["running"])) == pytest.approx(found.sequence_s / found.end_s, abs=0.04)
    assert max(used.series["running"][1:-1]) < 0.01


def test_a_thousand_retries_wait_no_longer_than_the_longest() -> None:
    assert Retries(attempts=2000).wait_s(1999, 0.0) == 8.0
