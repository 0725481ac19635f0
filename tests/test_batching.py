"""The scheduler: known steps by hand, a plain twin in lists that must agree, and what must hold whatever happens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mlsys_bench import batching
from mlsys_bench.batching import Limits, Policy, SchedulerState, StepFeatures, few, kernel
from mlsys_bench.batching.arrays import OUT_ROW, OUT_START, OUT_TOKENS, VICTIMS
from mlsys_bench.errors import BadInput

ROOMY = Limits(max_seqs=8, max_step_tokens=64, block_tokens=4, blocks=100, max_context=200)


def step(state: SchedulerState, limits: Limits) -> tuple[dict[int, tuple[int, int, bool]], list[int], list[int]]:
    """One step with removal of what ended: {row: (start, tokens, samples)}, preempted rows, ended rows."""
    plan = batching.schedule(state, limits)
    ended = batching.update(state, limits, plan).tolist()
    for row in ended:
        batching.remove(state, row)
    work = zip(plan.start.tolist(), plan.tokens.tolist(), plan.samples.tolist(), strict=True)
    return dict(zip(plan.rows.tolist(), work, strict=True)), plan.preempted.tolist(), ended


# ---------------------------------------------------------------- by hand


def test_a_lone_request_is_prefilled_then_decoded_one_token_a_step() -> None:
    state = batching.new_state(ROOMY)
    a = batching.add(state, ROOMY, 10, 3)
    assert step(state, ROOMY) == ({a: (0, 10, True)}, [], [])
    assert step(state, ROOMY) == ({a: (10, 1, True)}, [], [])
    assert step(state, ROOMY) == ({a: (11, 1, True)}, [], [a])
    assert batching.running(state) == batching.waiting(state) == 0
    assert batching.free_blocks(state) == 100
    assert step(state, ROOMY) == ({}, [], [])


def test_a_long_prompt_is_cut_to_the_budget_that_decodes_leave() -> None:
    limits = ROOMY._replace(max_step_tokens=6)
    state = batching.new_state(limits)
    a = batching.add(state, limits, 4, 9)
    b = batching.add(state, limits, 11, 2)
    assert step(state, limits)[0] == {a: (0, 4, True), b: (0, 2, False)}
    assert step(state, limits)[0] == {a: (4, 1, True), b: (2, 5, False)}
    assert step(state, limits)[0] == {a: (5, 1, True), b: (7, 4, True)}
    assert step(state, limits) == ({a: (6, 1, True), b: (11, 1, True)}, [], [b])


def test_the_last_admitted_gives_way_and_is_computed_anew() -> None:
    """Three blocks of two tokens; two requests of 2 + 3: the second must stand back until the first has finished."""
    limits = Limits(max_seqs=4, max_step_tokens=16, block_tokens=2, blocks=3, max_context=6)
    state = batching.new_state(limits)
    a = batching.add(state, limits, 2, 3)
    b = batching.add(state, limits, 2, 3)
    assert step(state, limits) == ({a: (0, 2, True), b: (0, 2, True)}, [], [])
    assert step(state, limits) == ({a: (2, 1, True)}, [b], [])  # a takes the last block; b finds none and preempts itself
    assert batching.waiting(state) == 1
    assert state.computed[b] == state.blocks_held[b] == 0
    assert (state.known[b], state.generated[b]) == (3, 1)  # what it generated is kept
    assert step(state, limits) == ({a: (3, 1, True)}, [], [a])  # three known tokens need two blocks, one is free: b waits
    assert step(state, limits) == ({b: (0, 3, True)}, [], [])
    assert step(state, limits) == ({b: (3, 1, True)}, [], [b])
    batching.check(state, limits)


def test_nobody_new_is_admitted_in_a_step_that_preempted() -> None:
    limits = Limits(max_seqs=4, max_step_tokens=16, block_tokens=2, blocks=4, max_context=8)
    state = batching.new_state(limits)
    a, b = batching.add(state, limits, 4, 4), batching.add(state, limits, 4, 2)
    step(state, limits)
    c = batching.add(state, limits, 2, 1)
    plan = batching.schedule(state, limits)
    assert (plan.rows.tolist(), plan.preempted.tolist()) == ([a], [b])
    assert batching.free_blocks(state) == 1  # enough for c, which came last and still waits
    assert batching.waiting(state) == 2
    assert state.blocks_held[c] == 0


def test_seats_bound_how_many_run_and_come_free_in_order_of_arrival() -> None:
    limits = ROOMY._replace(max_seqs=2)
    state = batching.new_state(limits)
    a, b, c, d = (batching.add(state, limits, 2, n) for n in (3, 1, 2, 1))
    assert list(step(state, limits)[0]) == [a, b]
    assert list(step(state, limits)[0]) == [a, c]
    assert list(step(state, limits)[0]) == [a, c]
    assert list(step(state, limits)[0]) == [d]


def test_block_numbers_follow_the_positions_of_a_sequence() -> None:
    state = batching.new_state(ROOMY)
    a, b = batching.add(state, ROOMY, 9, 9), batching.add(state, ROOMY, 4, 9)
    step(state, ROOMY)
    assert state.block_table[a, : state.blocks_held[a]].tolist() == [0, 1, 2]
    assert state.block_table[b, : state.blocks_held[b]].tolist() == [3]
    step(state, ROOMY)
    assert state.block_table[b, : state.blocks_held[b]].tolist() == [3, 4]
    assert state.block_table.dtype == np.int32


def test_the_features_of_a_mixed_step_are_those_of_its_rows() -> None:
    limits = ROOMY._replace(max_step_tokens=8)
    state = batching.new_state(limits)
    batching.add(state, limits, 5, 4)
    batching.add(state, limits, 12, 4)
    plan = batching.schedule(state, limits)
    assert batching.features(state, plan) == StepFeatures(0, 0, 8, 5 * 2.5 + 3 * 1.5, 1)
    batching.update(state, limits, plan)
    plan = batching.schedule(state, limits)  # one decode reads five tokens and its own; seven tokens go on after three
    assert batching.features(state, plan) == StepFeatures(1, 6, 7, 7 * (3 + 3.5), 1)
    batching.update(state, limits, plan)
    plan = batching.schedule(state, limits)
    assert batching.features(state, plan) == StepFeatures(1, 7, 2, 2 * (10 + 1), 2)
    batching.update(state, limits, plan)
    assert batching.features(state, batching.schedule(state, limits)) == StepFeatures(2, 8 + 13, 0, 0.0, 2)


def test_an_empty_scheduler_plans_nothing() -> None:
    state = batching.new_state(ROOMY)
    plan = batching.schedule(state, ROOMY)
    assert len(plan.rows) == len(plan.preempted) == 0
    assert batching.features(state, plan) == StepFeatures(0, 0, 0, 0.0, 0)
    assert len(batching.update(state, ROOMY, plan)) == 0


@pytest.mark.parametrize(
    ("prompt", "output", "says"),
    [(0, 1, "at least one prompt token"), (1, 0, "at least one"), (150, 51, "context ends at 200"), (90, 11, "KV cache holds 100")],
)
def test_a_request_that_could_never_run_is_refused(prompt: int, output: int, says: str) -> None:
    limits = ROOMY._replace(blocks=25) if "KV" in says else ROOMY
    state = batching.new_state(limits)
    with pytest.raises(BadInput, match=says):
        batching.add(state, limits, prompt, output)
    assert batching.waiting(state) == 0
    batching.check(state, limits)


@pytest.mark.parametrize("field", Limits._fields)
def test_limits_below_one_are_refused_by_name(field: str) -> None:
    with pytest.raises(BadInput, match=field):
        batching.new_state(ROOMY._replace(**{field: 0}))


def test_a_row_removed_between_plan_and_update_is_passed_over() -> None:
    """A client may disconnect while the step runs; its row may even belong to somebody else already."""
    state = batching.new_state(ROOMY, capacity=2)
    a, b = batching.add(state, ROOMY, 4, 1), batching.add(state, ROOMY, 4, 1)
    plan = batching.schedule(state, ROOMY)
    batching.remove(state, a)
    c = batching.add(state, ROOMY, 7, 5)
    assert c == a
    assert batching.update(state, ROOMY, plan).tolist() == [b]
    assert (state.computed[c], state.known[c]) == (0, 7)
    batching.check(state, ROOMY)


def test_a_finished_request_must_be_removed_before_the_next_step() -> None:
    state = batching.new_state(ROOMY)
    batching.add(state, ROOMY, 4, 1)
    batching.update(state, ROOMY, batching.schedule(state, ROOMY))
    with pytest.raises(AssertionError, match="remove it first"):
        batching.update(state, ROOMY, batching.schedule(state, ROOMY))


def test_removing_twice_is_an_error() -> None:
    state = batching.new_state(ROOMY)
    row = batching.add(state, ROOMY, 4, 1)
    batching.remove(state, row)
    with pytest.raises(AssertionError, match="free already"):
        batching.remove(state, row)


# ---------------------------------------------------------------- against a plain twin


@dataclass
class Twin:
    """The same policy written with lists and deques, block by count only."""

    limits: Limits

    def __post_init__(self) -> None:
        self.waiting: deque[dict[str, int]] = deque()
        self.running: list[dict[str, int]] = []
        self.free = self.limits.blocks

    def add(self, name: int, prompt: int, output: int) -> None:
        """Join the queue."""
        self.waiting.append({"name": name, "prompt": prompt, "known": prompt, "final": prompt + output, "computed": 0, "blocks": 0})

    def fits(self, s: dict[str, int], tokens: int) -> bool:
        """Take the blocks for so many more tokens, if there are enough."""
        need = -(-(s["computed"] + tokens) // self.limits.block_tokens) - s["blocks"]
        if need > self.free:
            return False
        self.free -= need
        s["blocks"] += need
        return True

    def let_go(self, s: dict[str, int]) -> None:
        """Give all blocks back."""
        self.free += s["blocks"]
        s["blocks"] = s["computed"] = 0

    def schedule(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """Return (name, start, tokens) of those who compute, and who was preempted."""
        budget, work, preempted = self.limits.max_step_tokens, [], []
        self.plan: list[tuple[dict[str, int], int]] = []
        for s in list(self.running):
            if budget == 0 or s["name"] in preempted:
                break
            tokens = min(s["known"] - s["computed"], budget)
            while s in self.running and not self.fits(s, tokens):
                victim = self.running.pop()
                self.let_go(victim)
                self.waiting.appendleft(victim)
                preempted.append(victim["name"])
            if s not in self.running:
                break
            self.plan.append((s, tokens))
            budget -= tokens
        while not preempted and self.waiting and len(self.running) < self.limits.max_seqs and budget > 0:
            s = self.waiting[0]
            tokens = min(s["known"], budget)
            if not self.fits(s, tokens):
                break
            self.running.append(self.waiting.popleft())
            self.plan.append((s, tokens))
            budget -= tokens
        work = [(s["name"], s["computed"], tokens) for s, tokens in self.plan]
        return work, preempted

    def update(self) -> list[int]:
        """Finish the step; return who ended."""
        ended = []
        for s, tokens in self.plan:
            s["computed"] += tokens
            if s["computed"] == s["known"]:
                s["known"] += 1
                if s["known"] == s["final"]:
                    ended.append(s)
        for s in ended:
            self.running.remove(s)
            self.let_go(s)
        return [s["name"] for s in ended]


@st.composite
def traces(draw: st.DrawFn) -> tuple[Limits, list[tuple[int, int, int]]]:
    """Limits, tight or roomy, and requests (step of arrival, prompt, output) that each fit them."""
    block_tokens = draw(st.integers(1, 5))
    blocks = draw(st.integers(2, 30))
    limits = Limits(
        max_seqs=draw(st.integers(1, 6)),
        max_step_tokens=draw(st.integers(1, 24)),
        block_tokens=block_tokens,
        blocks=blocks,
        max_context=draw(st.integers(2, 60)),
    )
    most = min(limits.max_context, blocks * block_tokens)
    request = st.integers(1, most - 1).flatmap(lambda p: st.tuples(st.integers(0, 30), st.just(p), st.integers(1, most - p)))
    return limits, sorted(draw(st.lists(request, min_size=1, max_size=14)), key=lambda r: r[0])


@given(traces())
@settings(max_examples=100, deadline=None)
def test_it_decides_as_the_plain_twin_does(trace: tuple[Limits, list[tuple[int, int, int]]]) -> None:
    """Step by step the same rows, tokens, preemptions and ends; every request finishes with all its tokens; first come, first served."""
    limits, requests = trace
    state, twin = batching.new_state(limits, capacity=1), Twin(limits)
    name_of: dict[int, int] = {}
    sampled = dict.fromkeys(range(len(requests)), 0)
    first_step: dict[int, int] = {}
    ended: list[int] = []
    coming = deque(enumerate(requests))
    bound = 32 + sum(p + o for _, p, o in requests)  # the oldest is never set back and computes at least a token a step
    for now in range(bound):
        while coming and coming[0][1][0] <= now:
            name, (_, prompt, output) = coming.popleft()
            name_of[batching.add(state, limits, prompt, output)] = name
            twin.add(name, prompt, output)
        plan = batching.schedule(state, limits)
        batching.check(state, limits)
        names = [name_of[row] for row in plan.rows.tolist()]
        work = list(zip(names, plan.start.tolist(), plan.tokens.tolist(), strict=True))
        assert (work, [name_of[row] for row in plan.preempted.tolist()]) == twin.schedule()
        assert plan.tokens.sum() <= limits.max_step_tokens
        assert (plan.tokens > 0).all()
        assert len(names) > 0 or not name_of  # never idle while there is work
        for name, samples in zip(names, plan.samples.tolist(), strict=True):
            sampled[name] += samples
            first_step.setdefault(name, now)
        done = batching.update(state, limits, plan).tolist()
        assert [name_of[row] for row in done] == twin.update()
        for row in done:
            batching.remove(state, row)
            ended.append(name_of.pop(row))
        batching.check(state, limits)
        if not name_of and not coming:
            break
    assert sorted(ended) == list(range(len(requests)))
    assert [sampled[i] for i in range(len(requests))] == [o for _, _, o in requests]
    starts = [first_step[i] for i in range(len(requests))]
    assert starts == sorted(starts)
    assert batching.free_blocks(state) == limits.blocks


# ---------------------------------------------------------------- anything in any order


class AnyOrder(RuleBasedStateMachine):
    """Requests come, step, stop early and are cancelled in any order; the invariants hold after each."""

    limits = Limits(max_seqs=3, max_step_tokens=7, block_tokens=2, blocks=9, max_context=18)

    def __init__(self) -> None:
        super().__init__()
        self.state = batching.new_state(self.limits, capacity=1)
        self.alive: dict[int, tuple[int, int]] = {}

    @rule(prompt=st.integers(1, 12), output=st.integers(1, 6))
    def come(self, prompt: int, output: int) -> None:
        """Let a request arrive."""
        row = batching.add(self.state, self.limits, prompt, output)
        assert row not in self.alive
        self.alive[row] = (prompt, output)

    @rule()
    def run_a_step(self) -> None:
        """One step; what ended is removed."""
        plan = batching.schedule(self.state, self.limits)
        assert plan.tokens.sum() <= self.limits.max_step_tokens
        assert len(plan.rows) > 0 or not self.alive
        for row in batching.update(self.state, self.limits, plan).tolist():
            assert self.state.generated[row] == self.alive.pop(row)[1]
            batching.remove(self.state, row)

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Somebody disconnects, running or waiting."""
        row = data.draw(st.sampled_from(sorted(self.alive)))
        held, free = self.state.blocks_held[row], batching.free_blocks(self.state)
        batching.remove(self.state, row)
        assert batching.free_blocks(self.state) == free + held
        del self.alive[row]

    @invariant()
    def nothing_is_lost(self) -> None:
        """Everything adds up."""
        batching.check(self.state, self.limits)
        assert batching.running(self.state) + batching.waiting(self.state) == len(self.alive)
        for row, (prompt, _) in self.alive.items():
            assert self.state.prompt[row] == prompt

    def teardown(self) -> None:
        """When all have left, the pool is whole."""
        for row in self.alive:
            batching.remove(self.state, row)
        assert batching.free_blocks(self.state) == self.limits.blocks


AnyOrder.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestAnyOrder = AnyOrder.TestCase


@given(traces())
@settings(max_examples=100, deadline=None)
def test_the_short_cut_plans_what_the_loop_plans(trace: tuple[Limits, list[tuple[int, int, int]]]) -> None:
    """Planning all running rows at once must not differ from the loop that later gets compiled, blocks included."""
    limits, requests = trace
    quick, slow = batching.new_state(limits), batching.new_state(limits)
    for _, prompt, output in requests:
        assert batching.add(quick, limits, prompt, output) == batching.add(slow, limits, prompt, output)
    for _ in range(40):
        plan = batching.schedule(quick, limits)
        n, preempted = kernel.plan(slow.views, limits, Policy(), 0, limits.max_step_tokens)
        slots = slow.arrays.slots
        assert [plan.rows.tolist(), plan.start.tolist(), plan.tokens.tolist()] == slots[[OUT_ROW, OUT_START, OUT_TOKENS], :n].tolist()
        assert plan.preempted.tolist() == slots[VICTIMS, :preempted].tolist()
        for state in (quick, slow):
            for row in batching.update(state, limits, plan).tolist():
                batching.remove(state, row)
            batching.check(state, limits)
        for row in range(len(requests)):
            held = quick.blocks_held[row]
            assert held == slow.blocks_held[row]
            assert quick.block_table[row, :held].tolist() == slow.block_table[row, :held].tolist()


@given(traces(), st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_row_by_row_is_the_same_as_by_numpy(trace: tuple[Limits, list[tuple[int, int, int]]], seed: int) -> None:
    """Two schedulers with shared prefixes: one walks through all rows, one gives all to numpy.  Some rows leave between plan and update."""
    limits, requests = trace
    rng = np.random.default_rng(seed)
    states = [batching.new_state(limits, shares=True) for _ in range(2)]
    for _, prompt, output in requests:
        hashes = range(1, 1 + prompt // limits.block_tokens)
        assert len({batching.add(state, limits, prompt, output, hashes) for state in states}) == 1
    for _ in range(40):
        seen = []
        leaves = rng.random()
        for state, rows in zip(states, (0, 10**6), strict=True):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(few, "ROWS", rows)
                seen.append(_walked(state, limits, leaves))
        assert seen[0] == seen[1]
        batching.check(states[0], limits)
        for mine, theirs in zip(states[0].arrays, states[1].arrays, strict=True):
            assert np.array_equal(mine, theirs)


def _walked(state: SchedulerState, limits: Limits, leaves: float) -> list[object]:
    """Plan and record a step; where `leaves` says so, its first row is gone before it is recorded."""
    plan = batching.schedule(state, limits)
    found: list[object] = [batching.features(state, plan), *(array.tolist() for array in plan)]
    if len(plan.rows) and leaves < 0.1:
        batching.remove(state, int(plan.rows[0]))
    new = np.ones(len(plan.rows), dtype=np.int32) if leaves < 0.5 else None
    ended = batching.update(state, limits, plan, new).tolist()
    for row in ended:
        batching.remove(state, row)
    return [*found, ended]
