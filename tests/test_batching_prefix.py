"""Blocks that requests share: whatever is scheduled, every token of the cache that a row reads is its own."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import batching
from mlsys_bench.batching import Limits, Policy, SchedulerState, StepPlan, kernel, prefix
from mlsys_bench.batching.arrays import (
    BLOCK,
    BLOCKS,
    CACHED,
    HASH_AT,
    HASH_END,
    IDLE,
    OUT_ROW,
    OUT_START,
    OUT_TOKENS,
    STATUS,
    SWAPPED,
    VICTIMS,
    fresh,
)

LIMITS = Limits(max_seqs=4, max_step_tokens=24, block_tokens=4, blocks=24, max_context=64)


def hashes(tokens: list[int], block_tokens: int) -> list[int]:
    """Return what stands for each full block and all before it: the tokens themselves, so that nothing can collide."""
    return [hash(tuple(tokens[: end + 1])) for end in range(block_tokens - 1, len(tokens), block_tokens)]


@dataclass
class Machine:
    """A scheduler and a cache that keeps tokens where an engine keeps K and V of them."""

    limits: Limits
    policy: Policy = field(default_factory=Policy)
    shares: bool = True
    fails: float = 0.0  # share of the steps that fail half-way
    seed: int = 0
    tokens: dict[int, list[int]] = field(default_factory=dict)  # by row
    answers: dict[int, list[int]] = field(default_factory=dict)  # by row: what is going to be generated
    swapped: dict[int, list[int]] = field(default_factory=dict)  # by row: the cache of those swapped out
    did: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("swaps", "preemptions", "drafts", "wrong", "failures"), 0))

    def __post_init__(self) -> None:
        self.state: SchedulerState = batching.new_state(self.limits, 1, policy=self.policy, shares=self.shares)
        self.cache = np.full((self.limits.blocks, self.limits.block_tokens), -1)
        self.rng = np.random.default_rng(self.seed)

    def come(self, prompt: list[int], answer: list[int]) -> int:
        """Take in a request."""
        known = hashes(prompt, self.limits.block_tokens) if self.shares else []
        row = batching.add(self.state, self.limits, len(prompt), len(answer), known)
        self.tokens[row], self.answers[row] = list(prompt), list(answer)
        return row

    def leave(self, row: int) -> None:
        """Forget a request."""
        batching.remove(self.state, row)
        del self.tokens[row], self.answers[row]
        self.swapped.pop(row, None)

    def at(self, row: int, positions: range) -> tuple[np.ndarray, np.ndarray]:
        """Return blocks and places of positions."""
        where = np.array(positions, dtype=np.int64)
        return self.state.block_table[row, where // self.limits.block_tokens], where % self.limits.block_tokens

    def step(self) -> StepPlan:
        """Schedule, move what is swapped, write, read, grow."""
        self.before = self.state.computed.copy()
        plan = batching.schedule(self.state, self.limits)
        batching.check(self.state, self.limits)
        self.did["preemptions"] += len(plan.preempted)
        for row in plan.preempted.tolist():
            if self.state.arrays.rows[STATUS][row] == SWAPPED:
                if self.rng.random() < 0.2:  # the host has no room
                    batching.forget(self.state, row)
                else:
                    self.swapped[row] = self.cache[self.at(row, range(self.state.computed[row]))].tolist()
                    self.did["swaps"] += 1
        if self.rng.random() < self.fails:
            self.fail(plan)
            return plan
        new = self.compute(plan)
        for row in batching.update(self.state, self.limits, plan, new).tolist():
            self.leave(row)
        for row in plan.rows.tolist():
            if self.shares and row in self.tokens:
                known = hashes(self.tokens[row], self.limits.block_tokens)
                batching.extend(self.state, row, known[batching.hashed(self.state)[row] :])
        batching.check(self.state, self.limits)
        return plan

    def compute(self, plan: StepPlan) -> np.ndarray:
        """Write all tokens of the step, then let every row read; return how many tokens each got."""
        new, drafted = np.ones(len(plan.rows), dtype=np.int32), {}
        for i, (row, start, tokens) in enumerate(zip(plan.rows.tolist(), plan.start.tolist(), plan.tokens.tolist(), strict=True)):
            if row in self.swapped:
                saved = self.swapped.pop(row)
                assert len(saved) == start
                self.write(row, 0, saved)
            known = self.tokens[row]
            drafts = max(start + tokens - len(known), 0)
            right = int(self.rng.integers(0, drafts + 1))
            to_come = self.answers[row][len(known) - self.state.prompt[row] :]
            drafted[row] = known + to_come[:right] + [-7] * (drafts - right)
            self.write(row, start, drafted[row][start : start + tokens])
            new[i] += right
            self.did["drafts"] += drafts
            self.did["wrong"] += drafts - right
        for i, (row, end) in enumerate(zip(plan.rows.tolist(), (plan.start + plan.tokens).tolist(), strict=True)):
            assert self.cache[self.at(row, range(end))].tolist() == drafted[row][:end], "a row reads what is not its own"
            if plan.samples[i]:
                known = self.tokens[row]
                known += self.answers[row][len(known) - self.state.prompt[row] :][: new[i]]
        return new

    def write(self, row: int, start: int, values: list[int]) -> None:
        """Write tokens.  Nobody else may have had anything computed in these blocks before the step."""
        blocks, places = self.at(row, range(start, start + len(values)))
        for other in self.tokens:
            done = -(-self.before[other] // self.limits.block_tokens)
            theirs = self.state.block_table[other, : min(done, self.state.blocks_held[other])]
            assert other == row or not set(theirs.tolist()) & set(blocks.tolist()), "a shared block is written"
        self.cache[blocks, places] = values

    def fail(self, plan: StepPlan) -> None:
        """Leave rubbish where the step would have written, and start again."""
        for row, start, tokens in zip(plan.rows.tolist(), plan.start.tolist(), plan.tokens.tolist(), strict=True):
            self.cache[self.at(row, range(start, start + tokens))] = -99
        batching.restart(self.state)
        self.swapped.clear()
        batching.check(self.state, self.limits)
        assert batching.running(self.state) == 0
        assert batching.free_blocks(self.state) == self.limits.blocks
        self.did["failures"] += 1


def text(rng: np.random.Generator, stems: list[list[int]], most: int) -> list[int]:
    """Return tokens that often begin as others do."""
    stem = stems[rng.integers(len(stems))]
    own = rng.integers(0, 3, rng.integers(0, 12)).tolist()
    return [*stem[: rng.integers(0, len(stem) + 1)], *own, 1][:most]


def play(seed: int, policy: Policy, *, shares: bool = True, fails: float = 0.0) -> tuple[Machine, dict[int, list[int]]]:
    """Serve twenty requests at random, some of which are cancelled."""
    rng = np.random.default_rng(seed)
    block_tokens = int(rng.integers(1, 6))
    limits = Limits(
        max_seqs=int(rng.integers(2, 7)), max_step_tokens=int(rng.integers(2, 30)), block_tokens=block_tokens,
        blocks=-(-int(rng.integers(50, 80)) // block_tokens), max_context=48,
    )  # fmt: skip
    machine = Machine(limits, policy, shares=shares, fails=fails, seed=seed)
    stems = [rng.integers(0, 3, 24).tolist() for _ in range(2)]
    coming = 20
    for _ in range(3000):
        while coming and rng.random() < 0.4:
            prompt = text(rng, stems, 30)
            machine.come(prompt, rng.integers(0, 3, rng.integers(1, 18)).tolist())
            coming -= 1
        if machine.tokens and rng.random() < 0.05:
            machine.leave(int(rng.choice(sorted(machine.tokens))))
        machine.step()
        if not coming and not machine.tokens:
            break
    assert not machine.tokens, "requests are left"
    assert batching.free_blocks(machine.state) == limits.blocks
    return machine, machine.answers


POLICIES = {
    "recompute": Policy(),
    "swap": Policy(swap=1),
    "drafts": Policy(drafts=3),
    "swap and drafts": Policy(swap=1, drafts=2),
    "static batches": Policy(gather=1),
}


@pytest.mark.parametrize("name", POLICIES)
@given(seed=st.integers(0, 2**32 - 1), fails=st.sampled_from([0.0, 0.0, 0.05]), shares=st.booleans())
@settings(max_examples=4, deadline=None)
def test_a_row_reads_its_own_tokens_and_never_writes_what_is_shared(name: str, seed: int, fails: float, shares: bool) -> None:
    """Which is why blocks are never copied on write: arrivals, cancels, preemptions, drafts and failures at random."""
    machine, _ = play(seed, POLICIES[name], shares=shares, fails=fails)
    assert shares or machine.state.hit_tokens == 0


def test_the_games_above_did_share_swap_and_draft() -> None:
    """Otherwise they would say little."""
    swapping, plain = (play(seed, policy, fails=0.03)[0] for seed, policy in ((0, POLICIES["swap and drafts"]), (6, POLICIES["recompute"])))
    assert min(m.state.hit_tokens for m in (swapping, plain)) > 50
    assert swapping.did["swaps"] > 2
    assert plain.did["preemptions"] > 2
    assert swapping.did["wrong"] > 20
    assert min(m.did["failures"] for m in (swapping, plain)) > 1


def test_a_second_request_computes_only_what_it_does_not_share() -> None:
    machine = Machine(LIMITS)
    machine.come(list(range(10)), [50, 51])
    machine.step()
    second = machine.come([*range(8), 60, 61, 62], [70])
    plan = machine.step()
    at = plan.rows.tolist().index(second)
    assert (plan.start[at], plan.tokens[at]) == (8, 3)
    assert (machine.state.hit_tokens, machine.state.asked_tokens) == (8, 10 + 11)


def test_requests_of_one_step_share_already() -> None:
    """The second attends to what the first writes in this very step."""
    machine = Machine(LIMITS._replace(max_step_tokens=64))
    rows = [machine.come([1] * 12 + [i], [9]) for i in range(3)]
    plan = machine.step()
    assert plan.rows.tolist() == rows
    assert plan.start.tolist() == [0, 12, 12]


def test_a_prompt_that_is_cached_to_the_end_computes_its_last_block_again() -> None:
    """There must be a token to sample from."""
    machine = Machine(LIMITS)
    for _ in range(2):
        machine.come(list(range(8)), [1])
        plan = machine.step()
    assert (plan.start.tolist(), plan.tokens.tolist()) == ([4], [4])


def test_an_answer_is_found_by_the_next_turn_of_its_conversation() -> None:
    machine = Machine(LIMITS)
    machine.come([1, 2, 3], [4, 5, 6, 7, 8, 9])
    while machine.tokens:
        machine.step()
    machine.come([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [1])
    assert machine.step().start.tolist() == [8]


def test_what_is_idle_makes_room_oldest_first() -> None:
    machine = Machine(LIMITS._replace(blocks=6))
    for first in (0, 100):
        machine.come(list(range(first, first + 9)), [1])
        machine.step()
    assert batching.free_blocks(machine.state) == 6
    assert machine.state.arrays.counts[IDLE] == 4
    machine.come(list(range(200, 213)), [1])  # takes four: two are free, the two oldest go, of one request the end first
    machine.step()
    machine.come([*range(100, 109)], [1])
    assert machine.step().start.tolist() == [8]
    machine.come([*range(9)], [1])
    assert machine.step().start.tolist() == [0]


def test_numbers_of_prefix_blocks_are_used_again() -> None:
    """A server that runs for a day sees any number of different blocks."""
    machine = Machine(LIMITS)
    rng = np.random.default_rng(0)
    for _ in range(300):
        machine.come(rng.integers(0, 1000, 20).tolist(), [1])
        machine.step()
    assert machine.state.arrays.prefixes.shape[1] <= 128
    assert len(machine.state.numbers) <= 128


def test_a_row_that_is_not_swapped_out_cannot_forget() -> None:
    machine = Machine(LIMITS)
    row = machine.come([1, 2], [3])
    with pytest.raises(AssertionError, match="not swapped out"):
        batching.forget(machine.state, row)


@given(seed=st.integers(0, 2**32 - 1), drafts=st.sampled_from([0, 2]))
@settings(max_examples=10, deadline=None)
def test_blocks_that_are_counted_are_planned_as_those_that_are_there(seed: int, drafts: int) -> None:
    """A simulator only counts; an engine has blocks in hand.  The plans are the same."""
    rng = np.random.default_rng(seed)
    limits = Limits(max_seqs=4, max_step_tokens=20, block_tokens=3, blocks=16, max_context=40)
    policy = Policy(drafts=drafts)
    real = batching.new_state(limits, 32, policy=policy, shares=True)
    counted = fresh(
        limits, lambda count, size: np.zeros((count, size), dtype=np.int64), rows=32, hashes=32 * 16, prefixes=4096, prefix_tokens=3
    )
    stems = [rng.integers(0, 3, 18).tolist() for _ in range(2)]
    for _ in range(20):
        prompt, output = text(rng, stems, 24), int(rng.integers(1, 12))
        row = batching.add(real, limits, len(prompt), output, hashes(prompt, 3))
        kernel.enter(counted, row, len(prompt), output, 0)
        counted.rows[HASH_AT, row], counted.rows[CACHED, row] = 16 * row, 0
        own = real.arrays.hashes[BLOCK, real.arrays.rows[HASH_AT, row] : real.arrays.rows[HASH_END, row]]
        counted.rows[HASH_END, row] = 16 * row + len(own)
        counted.hashes[BLOCK, 16 * row : 16 * row + len(own)] = own
    for _ in range(200):
        plan = batching.schedule(real, limits)
        n, preempted = kernel.plan(counted, limits, policy, 0, limits.max_step_tokens)
        assert [plan.rows.tolist(), plan.start.tolist(), plan.tokens.tolist()] == counted.slots[
            [OUT_ROW, OUT_START, OUT_TOKENS], :n
        ].tolist()
        assert plan.preempted.tolist() == counted.slots[VICTIMS, :preempted].tolist()
        assert real.arrays.counts[[BLOCKS, IDLE]].tolist() == counted.counts[[BLOCKS, IDLE]].tolist()
        new = np.ones(len(plan.rows), dtype=np.int32)
        ended = batching.update(real, limits, plan, new).tolist()
        counted.rows[1:5, :32] = real.arrays.rows[1:5, :32]
        for row in ended:
            batching.remove(real, row)
            kernel.leave(counted, policy, row)
    assert batching.running(real) == 0
    assert prefix.owns(counted, 0, 0) is False
