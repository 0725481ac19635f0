"""The scheduler as the engine uses it: rows that are handed out again, physical blocks, and plans as numpy arrays.

Only full blocks of equal tokens after equal tokens are ever shared, and a row writes only beyond what is computed, into blocks that it
took itself: what it shares it never writes, so nothing is copied on write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench.batching import few, kernel, prefix
from mlsys_bench.batching.arrays import (
    AFTER,
    ASKED_TOKENS,
    BLOCK,
    BLOCKS,
    CACHED,
    COMPUTED,
    EVEN,
    FINAL,
    FIRST,
    FREE,
    GATE,
    HASH_AT,
    HASH_END,
    HELD,
    HIT_TOKENS,
    HOME,
    IDLE,
    KNOWN,
    MOVED,
    NOBODY,
    NOWHERE,
    ON_DEVICE,
    OUT_ROW,
    OUT_START,
    OUT_TOKENS,
    OWNED,
    PLACE,
    PREEMPTIONS,
    PREFIX_TOKENS,
    PROMPT,
    QUEUED,
    RANK,
    ROWS,
    RUNNING,
    SEATED,
    SEATS,
    STATUS,
    SWAPPED,
    USERS,
    VICTIMS,
    WAITING,
    Arrays,
    Bool,
    Int32,
    Limits,
    Policy,
    StepFeatures,
    check_limits,
    check_policy,
    fresh,
    misfit,
)
from mlsys_bench.errors import BadInput

VLLM = Policy()
_NOBODY = np.zeros(0, dtype=np.int32)
_ONE = np.int32(1)


class StepPlan(NamedTuple):
    """The work of one step: row `rows[i]` computes `tokens[i]` tokens after the `start[i]` cached ones, and samples if `samples[i]`."""

    rows: Int32
    start: Int32
    tokens: Int32
    samples: Bool
    preempted: Int32  # rows that lost their cache in this step, in order of preemption


class SchedulerState:
    """Sequences and blocks of one replica.  `arrays` may be replaced by larger ones in `add`: do not keep them across it."""

    __slots__ = ("arrays", "asked_tokens", "hit_tokens", "numbers", "policy", "preemptions", "spare", "views")

    def __init__(self, arrays: Arrays, policy: Policy = VLLM) -> None:
        """Start with these."""
        self.policy = policy
        self.hit_tokens = self.asked_tokens = self.preemptions = 0  # since the beginning: found in the cache and looked for, by admissions
        self.numbers: dict[int, int] = {}  # of prefix blocks, by hash
        self.spare: list[int] = []  # numbers that mean nothing
        self.hold(arrays)

    def hold(self, arrays: Arrays) -> None:
        """Hold the arrays, and memoryviews of them for the kernel: their items are read faster than numpy's."""
        self.arrays = arrays
        named = zip(Arrays._fields, arrays, strict=True)
        self.views = Arrays(*(memoryview(a) if a.ndim == 1 or name == "block_table" else tuple(map(memoryview, a)) for name, a in named))

    @property
    def block_table(self) -> Int32:
        """[rows, width]: the first `blocks_held[row]` entries of a row are its physical blocks, in order of position."""
        return self.arrays.block_table  # type: ignore[no-any-return]

    @property
    def blocks_held(self) -> Int32:
        """[rows]."""
        return self.arrays.rows[HELD]  # type: ignore[no-any-return]

    @property
    def prompt(self) -> Int32:
        """[rows] tokens given."""
        return self.arrays.rows[PROMPT]  # type: ignore[no-any-return]

    @property
    def known(self) -> Int32:
        """[rows] tokens given and generated."""
        return self.arrays.rows[KNOWN]  # type: ignore[no-any-return]

    @property
    def computed(self) -> Int32:
        """[rows] tokens in the KV cache."""
        return self.arrays.rows[COMPUTED]  # type: ignore[no-any-return]

    @property
    def generated(self) -> Int32:
        """[rows] tokens generated."""
        return self.arrays.rows[KNOWN] - self.arrays.rows[PROMPT]  # type: ignore[no-any-return]


def free_blocks(state: SchedulerState) -> int:
    """Return how many blocks nobody holds."""
    return int(state.views.counts[BLOCKS])


def running(state: SchedulerState) -> int:
    """Return how many sequences have a seat."""
    return int(state.views.counts[SEATED])


def waiting(state: SchedulerState) -> int:
    """Return how many sequences wait for a seat, preempted ones included."""
    return int(state.views.counts[QUEUED])


# ---------------------------------------------------------------- in and out


def new_state(limits: Limits, capacity: int = 64, *, policy: Policy = VLLM, shares: bool = False) -> SchedulerState:
    """Return an empty scheduler with room for `capacity` requests; it grows when more come.

    `shares`: requests come with the hashes of their blocks, and those with equal ones share them.
    """
    check_limits(limits)
    check_policy(policy)
    assert not policy.prefill_first, "who is planned must not be preempted any more: its blocks are published already"
    assert not policy.host_blocks, "shared blocks stay on the device"
    rows = max(capacity, 1)
    arrays = fresh(
        limits, lambda count, size: np.zeros((count, size), dtype=np.int32), rows=rows, prefix_tokens=limits.block_tokens if shares else 0
    )
    arrays.counts[ROWS] = rows
    return SchedulerState(
        arrays._replace(
            hashes=np.zeros((2, rows), dtype=np.int32),
            block_table=np.zeros((rows, 1), dtype=np.int32),
            free_blocks=np.arange(limits.blocks - 1, -1, -1, dtype=np.int32),  # block 0 on top
            free_rows=np.arange(rows - 1, -1, -1, dtype=np.int32),
        ),
        policy,
    )


def add(state: SchedulerState, limits: Limits, prompt_tokens: int, output_limit: int, hashes: Sequence[int] = (), rank: int = 0) -> int:
    """Put a request behind those of its rank who wait, and return its row.  One that could never run is refused as BadInput.

    `hashes`: of the full blocks of its prompt, each of all tokens up to the block's end.  `rank`: lower ones go first.
    """
    refused = misfit(limits, state.policy, prompt_tokens, output_limit)
    if refused:
        raise BadInput(refused)
    _make_room(state, -(-(prompt_tokens + output_limit) // limits.block_tokens))
    a = state.views
    a.counts[ROWS] -= 1
    row = int(a.free_rows[a.counts[ROWS]])
    a.rows[RANK][row] = rank
    kernel.enter(a, row, prompt_tokens, output_limit, 0)
    a.rows[HASH_AT][row] = a.rows[HASH_END][row] = row * state.arrays.block_table.shape[1]
    a.rows[CACHED][row] = 0
    extend(state, row, hashes)
    return row


def extend(state: SchedulerState, row: int, hashes: Sequence[int]) -> None:
    """Add the hashes of blocks that a row's known tokens have filled since."""
    for value in hashes:
        number = state.numbers.get(value)
        if number is None:
            if not state.spare:
                _make_numbers(state)
            number = state.numbers[value] = state.spare.pop()
        a = state.views
        at = a.rows[HASH_END][row]
        a.hashes[BLOCK][at], a.hashes[OWNED][at] = number, 0
        a.rows[HASH_END][row] = at + 1


def hashed(state: SchedulerState) -> Int32:
    """Return how many blocks of each row have a hash, [rows]."""
    return state.arrays.rows[HASH_END] - state.arrays.rows[HASH_AT]  # type: ignore[no-any-return]


def _make_numbers(state: SchedulerState) -> None:
    """Take back the numbers of blocks that are neither cached nor of a request that is here; make more when these are few."""
    a = state.arrays
    size = a.prefixes.shape[1]
    idle = a.prefixes[PLACE] == NOWHERE
    for row in np.flatnonzero(a.rows[STATUS] != FREE):
        idle[a.hashes[BLOCK, a.rows[HASH_AT, row] : a.rows[HASH_END, row]]] = False
    state.numbers = {value: number for value, number in state.numbers.items() if not idle[number]}
    state.spare = np.flatnonzero(idle).tolist()
    if len(state.spare) <= size // 2:
        state.spare += range(size, 2 * size + 16)
        state.hold(a._replace(prefixes=np.pad(a.prefixes, ((0, 0), (0, size + 16)))))


def _make_room(state: SchedulerState, width: int) -> None:
    """See to it that one more row fits, `width` blocks wide."""
    a = state.arrays
    rows, columns = a.block_table.shape
    if a.counts[ROWS] and width <= columns:
        return
    new_rows = rows if a.counts[ROWS] else 2 * rows
    new_columns = columns if width <= columns else max(width, 2 * columns)
    table = np.zeros((new_rows, new_columns), dtype=np.int32)
    table[:rows, :columns] = a.block_table
    hashes = np.zeros((2, new_rows, new_columns), dtype=np.int32)
    hashes[:, :rows, :columns] = a.hashes.reshape(2, rows, columns)
    count = a.rows[HASH_END] - a.rows[HASH_AT]
    a.rows[HASH_AT] = np.arange(rows) * new_columns
    a.rows[HASH_END] = a.rows[HASH_AT] + count
    more = np.arange(new_rows - 1, rows - 1, -1, dtype=np.int32)
    free_rows = np.concatenate([a.free_rows[: a.counts[ROWS]], more])
    a.counts[ROWS] += len(more)
    by_row = np.pad(a.rows, ((0, 0), (0, new_rows - rows)))
    free_rows = np.pad(free_rows, (0, new_rows - len(free_rows)))
    state.hold(a._replace(rows=by_row, hashes=hashes.reshape(2, -1), block_table=table, free_rows=free_rows))


def remove(state: SchedulerState, row: int) -> None:
    """Forget a request, whatever it was doing, and give its blocks back."""
    assert state.views.rows[STATUS][row] != FREE, f"row {row} is free already"
    kernel.leave(state.views, state.policy, row)


def forget(state: SchedulerState, row: int) -> None:
    """Let a row that was swapped out be computed anew: its cache is not there any more."""
    a = state.views
    assert a.rows[STATUS][row] == SWAPPED, f"row {row} is not swapped out"
    a.rows[STATUS][row], a.rows[COMPUTED][row] = WAITING, 0


def restart(state: SchedulerState) -> None:
    """Forget all that is cached: nobody is seated, those who were wait first, in their order, and everything is computed anew.

    For when a step has failed, and what is in the cache is not known.
    """
    a, anew = state.views, state.policy._replace(swap=0)
    while a.counts[SEATED] > 0:
        a.counts[SEATED] -= 1
        row = a.slots[SEATS][a.counts[SEATED]]
        a.rows[COMPUTED][row] = 0
        kernel.preempt(a, anew, row)
    for row in _waiting_rows(state.arrays).tolist():
        a.rows[STATUS][row], a.rows[COMPUTED][row] = WAITING, 0
    while a.counts[IDLE] > 0:
        prefix.forget_oldest(a, 0)
    a.counts[EVEN] = 0


# ---------------------------------------------------------------- one step


def schedule(state: SchedulerState, limits: Limits) -> StepPlan:
    """Decide who computes how many tokens in the next step, take the blocks for it, and say who was preempted.

    Requests that reached their limit must have been removed.  The plan is empty only when nobody runs or waits.
    """
    counts, policy = state.views.counts, state.policy
    counts[EVEN] = counts[MOVED] = 0  # until `update`
    if policy.gather and counts[SEATED] == 0:
        counts[GATE] = min(counts[QUEUED], limits.max_seqs)
    rows, start, tokens, budget = _all_seated(state, limits) if policy.drafts == 0 else (_NOBODY, _NOBODY, _NOBODY, limits.max_step_tokens)
    seated, queued = counts[SEATED], counts[QUEUED]
    if seated and len(rows) == seated and (queued == 0 or seated == limits.max_seqs or budget == 0):
        return StepPlan(rows, start, tokens, np.ones(seated, dtype=np.bool_), _NOBODY)
    a, done = state.arrays, len(rows)
    a.slots[OUT_ROW][:done], a.slots[OUT_START][:done], a.slots[OUT_TOKENS][:done] = rows, start, tokens
    n, preempted = kernel.plan(state.views, limits, policy, done, budget)
    _count(state)
    rows, start, tokens = a.slots[OUT_ROW][:n].copy(), a.slots[OUT_START][:n].copy(), a.slots[OUT_TOKENS][:n].copy()
    samples = start + tokens >= a.rows[KNOWN][rows.astype(np.intp)]
    return StepPlan(rows, start, tokens, samples, a.slots[VICTIMS][:preempted].copy())


def update(state: SchedulerState, limits: Limits, plan: StepPlan, new: Int32 | None = None) -> Int32:
    """Record that the step was computed; return the rows that reached their output limit and now wait for `remove`.

    `new`: how many tokens each row that samples has got, one where it is None; of what was computed for drafts, that of wrong ones is not
    counted, and its place is written again.  Rows that were removed since the plan was made are passed over.
    """
    return few.update(state.views, plan, new) if len(plan.rows) <= few.ROWS else _update_many(state, plan, new)


def _update_many(state: SchedulerState, plan: StepPlan, new: Int32 | None) -> Int32:
    a = state.arrays
    rows, tokens, samples = plan.rows.astype(np.intp), plan.tokens, plan.samples
    lives = a.rows[STATUS][rows] == RUNNING
    if np.count_nonzero(lives) < len(rows):
        rows, tokens, samples, new = rows[lives], tokens[lives], samples[lives], None if new is None else new[lives]
    if np.count_nonzero(samples) < len(rows):
        a.rows[COMPUTED][rows] += tokens
        sampled, new = rows[samples], None if new is None else new[samples]
    else:
        sampled = rows
    known = a.rows[KNOWN][sampled] + (_ONE if new is None else new)
    a.rows[KNOWN][sampled] = known
    a.rows[COMPUTED][sampled] = known - 1
    final = a.rows[FINAL][sampled]
    assert not np.count_nonzero(known > final), "a finished request was scheduled: remove it first"
    state.views.counts[EVEN] = len(sampled) == state.views.counts[SEATED]
    ended: Int32 = sampled[known == final].astype(np.int32)
    return ended


def features(state: SchedulerState, plan: StepPlan) -> StepFeatures:
    """Return the size of a step.  A decode is one token after the whole prompt; everything else counts as prefill.

    Every draft counts as a decode and a sample of its own, as it does in a simulation.
    """
    rows, start, tokens, samples, _ = plan
    if len(rows) <= few.ROWS and not state.policy.drafts:
        return few.features(state.views, plan)
    index = rows.astype(np.intp)
    is_prefill = (tokens > 1) | (start < state.arrays.rows[PROMPT][index])
    if state.policy.drafts:
        is_prefill = (start < state.arrays.rows[PROMPT][index]) | (start < state.arrays.rows[KNOWN][index] - 1)
        decoded = tokens[~is_prefill]
        more = int(decoded.sum()) - len(decoded)
        start = np.where(is_prefill, start, start + tokens - 1)
    else:
        more = 0
    prefill = is_prefill.nonzero()[0]
    decodes, sampled = len(rows) - len(prefill), int(np.count_nonzero(samples)) + more
    read, computed, pairs = int(np.add.reduce(start)), 0, 0.0
    for chunk, past in zip(tokens[prefill].tolist(), start[prefill].tolist(), strict=True):
        read -= past
        computed += chunk
        pairs += chunk * (past + 0.5 * chunk)
    return StepFeatures(decodes + more, read + decodes, computed, pairs, sampled)


def _count(state: SchedulerState) -> None:
    """Add the totals of the arrays to those of the state, whose integers never overflow."""
    counts = state.views.counts
    state.hit_tokens += counts[HIT_TOKENS]
    state.asked_tokens += counts[ASKED_TOKENS]
    state.preemptions += counts[PREEMPTIONS]
    counts[HIT_TOKENS] = counts[ASKED_TOKENS] = counts[PREEMPTIONS] = 0


def _all_seated(state: SchedulerState, limits: Limits) -> tuple[Int32, Int32, Int32, int]:
    """Return rows, start and tokens of all that run, if budget and blocks suffice for all of them, else of none; and the budget left.

    A short cut through the first part of the kernel's loop, with the same result: most steps are of this kind.
    """
    a, counts = state.arrays, state.views.counts
    if counts[SEATED] <= few.ROWS:
        return few.seated(state.views, state.policy, limits) or (_NOBODY, _NOBODY, _NOBODY, limits.max_step_tokens)
    rows = a.slots[SEATS][: counts[SEATED]].copy()
    index = rows.astype(np.intp)
    start, known, held = a.rows[COMPUTED][index], a.rows[KNOWN][index], a.rows[HELD][index]
    tokens = known - start
    budget = limits.max_step_tokens - int(np.add.reduce(tokens))
    at = (known > held * limits.block_tokens).nonzero()[0]
    needs = ((known[at] - 1) // limits.block_tokens + 1 - held[at]).tolist()
    if budget < 0 or sum(needs) > counts[BLOCKS]:
        return _NOBODY, _NOBODY, _NOBODY, limits.max_step_tokens
    for row, need in zip(rows[at].tolist(), needs, strict=True):
        kernel.take(state.views, state.policy, row, need)
    if counts[PREFIX_TOKENS]:
        for i in (known // limits.block_tokens > a.rows[CACHED][index]).nonzero()[0].tolist():
            prefix.publish(state.views, int(rows[i]), int(known[i]))
    return rows, start, tokens, budget


# ---------------------------------------------------------------- what must always hold


def check(state: SchedulerState, limits: Limits) -> None:
    """Assert that every block is free, cached, or held once, that counters, queue and statuses agree, and that the limits are kept."""
    a, counts = state.arrays, state.arrays.counts
    seated, queued, free, rows = (int(counts[i]) for i in (SEATED, QUEUED, BLOCKS, ROWS))
    queue = _waiting_rows(a)
    everyone = np.concatenate([a.slots[SEATS][:seated], queue])
    own = [_own_blocks(a, row) for row in everyone]
    cached = np.flatnonzero(a.prefixes[PLACE] == ON_DEVICE)
    blocks = np.concatenate([a.free_blocks[: free - int(counts[IDLE])], a.prefixes[HOME][cached], *own])
    assert sorted(blocks.tolist()) == list(range(limits.blocks)), "a block is lost or held twice"
    assert int(counts[IDLE]) == np.count_nonzero(a.prefixes[USERS][cached] == 0), "a cached block that nobody uses is not to be had"
    assert a.prefixes[USERS].sum() == sum(int(a.rows[HELD][row]) - len(mine) for row, mine in zip(everyone, own, strict=True))
    assert seated <= limits.max_seqs
    assert len(queue) == queued
    assert len(set(everyone.tolist())) == len(everyone), "a row stands twice in the queue"
    assert sorted([*everyone.tolist(), *a.free_rows[:rows].tolist()]) == list(range(a.rows.shape[1])), "a row is lost"
    assert (a.rows[STATUS][a.slots[SEATS][:seated]] == RUNNING).all()
    assert ((a.rows[STATUS][queue] == WAITING) | (a.rows[STATUS][queue] == SWAPPED)).all()
    assert (a.rows[STATUS][a.free_rows[:rows]] == FREE).all()
    assert (a.rows[COMPUTED][everyone] <= a.rows[KNOWN][everyone]).all()
    assert (a.rows[KNOWN][everyone] <= a.rows[FINAL][everyone]).all()
    seats = a.slots[SEATS][:seated]
    assert (a.rows[COMPUTED][seats] <= a.rows[HELD][seats] * limits.block_tokens).all(), "more tokens cached than its blocks hold"
    assert not counts[EVEN] or (a.rows[COMPUTED][a.slots[SEATS][:seated]] == a.rows[KNOWN][a.slots[SEATS][:seated]] - 1).all()
    assert ((a.rows[COMPUTED][queue] == 0) | (a.rows[STATUS][queue] == SWAPPED)).all()
    assert (np.diff(a.rows[RANK][seats]) >= 0).all(), "a seat stands before one of a lower rank"
    assert (np.diff(a.rows[RANK][queue]) >= 0).all(), "one who waits stands before one of a lower rank"
    assert (a.rows[HELD][queue] == 0).all(), "a waiting row holds blocks"


def _own_blocks(a: Arrays, row: int) -> Int32:
    """Return the blocks that a row has for itself.  Those it shares must be where the cache says, and full."""
    held, first, shared = int(a.rows[HELD][row]), int(a.rows[HASH_AT][row]), int(a.rows[CACHED][row])
    owned = np.flatnonzero(a.hashes[OWNED, first : first + shared])
    prefixes = a.hashes[BLOCK, first + owned]
    assert (a.prefixes[PLACE][prefixes] == ON_DEVICE).all(), "a shared block is not cached"
    assert (a.prefixes[HOME][prefixes] == a.block_table[row, owned]).all(), "a shared block is not the one in the table"
    return np.delete(a.block_table[row, :held], owned)


def _waiting_rows(a: Arrays) -> npt.NDArray[np.intp]:
    """Return those who wait, in order."""
    rows: list[int] = []
    row = int(a.counts[FIRST])
    while row != NOBODY:
        assert len(rows) < a.rows.shape[1], "the waiting list runs in a circle"
        rows.append(row)
        row = int(a.rows[AFTER][row])
    return np.array(rows, dtype=np.intp)
