"""Continuous batching over arrays: one scheduler, run by the engine with a model and by the simulator with a profile as its clock.

    row = add(state, limits, prompt_tokens, output_limit)     a request joins the queue
    plan = schedule(state, limits)                            who computes how many tokens in this step
    ended = update(state, limits, plan)                       the step is done: tokens are cached, one sampled per row that samples
    remove(state, row)                                        finished, stopped or cancelled: its blocks go back at once

Where only the size of steps matters, as in a simulator, `calm(state, limits)` says how many steps ahead hold nothing but one decode of
everyone seated, and `decode(state, limits, rows, steps)` does them at once.

The policy is that of vLLM V1 (`vllm/v1/core/sched/scheduler.py`): one budget of tokens per step; running sequences first, in order of
admission, each with all its tokens that are not yet computed (one in decode) as far as the budget goes; then waiting ones, first come
first served, while seats, budget and blocks suffice.  Long prompts are so computed in chunks.  KV memory is a pool of equal blocks, taken
on demand.  When a running sequence finds none, the last admitted one is preempted by recompute: it gives all its blocks back and waits at
the front, until the block is there or the sequence preempted itself; in such a step nobody new is admitted.

Since only the last admitted one is ever preempted, running and waiting sequences form ONE queue in order of arrival whose first part runs:
to admit is to move the border right, to preempt is to move it left.  The oldest sequence is never preempted for another one, so as long as
each fits the pool alone, all of them finish.

The functions named `_..._kernel` are loops over integer arrays without objects, so that they can be compiled; uncompiled they are given
memoryviews of the same arrays, whose items are read faster than numpy's.  Steps without preemption or admission take a vectorised way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput

Int32 = npt.NDArray[np.int32]
Rows = npt.NDArray[np.intp]  # row numbers that are an index: numpy takes these several times as fast as int32
Bool = npt.NDArray[np.bool_]

FREE, WAITING, RUNNING = 0, 1, 2  # status of a row
_NOBODY = np.zeros(0, dtype=np.int32)
HEAD, SEATED, QUEUED, BLOCKS, ROWS, EVEN = range(6)  # counters: start of the queue, running, waiting, free blocks, free rows; see `calm`


class Limits(NamedTuple):
    """What one replica can hold: sequences running at once, tokens per step, and `blocks` KV blocks of `block_tokens` tokens."""

    max_seqs: int
    max_step_tokens: int
    block_tokens: int
    blocks: int
    max_context: int


class StepPlan(NamedTuple):
    """The work of one step: row `rows[i]` computes `tokens[i]` tokens after the `start[i]` cached ones, and samples if `samples[i]`."""

    rows: Int32
    start: Int32
    tokens: Int32
    samples: Bool
    preempted: Int32  # rows that lost their cache in this step, in order of preemption


class StepFeatures(NamedTuple):
    """The size of a step, as latency profiles measure it."""

    decode_seqs: int
    decode_kv_tokens: int  # read by decodes, the new one included
    prefill_tokens: int
    prefill_pairs: float  # sum of chunk * (past + chunk / 2)
    sampled_tokens: int


class Calm(NamedTuple):
    """Steps ahead in which all those seated decode and nobody else computes: `steps` of them unless someone arrives or is removed."""

    steps: int  # the first of the rows ends in the last step, or the blocks do; 0: the next step is of another kind
    rows: Rows
    known: Int32
    room: Int32  # steps until the row needs a block
    kv_tokens: int  # read by the first step; each step reads len(rows) more


_RESTLESS = Calm(0, np.zeros(0, dtype=np.intp), _NOBODY, _NOBODY, 0)


class Arrays(NamedTuple):
    """All that a scheduler knows, as arrays.  Indexed by row unless said otherwise."""

    counts: Any  # [6] HEAD, SEATED, QUEUED, BLOCKS, ROWS, EVEN
    queue: Any  # [2 * rows] rows in order of arrival, from counts[HEAD]; the first counts[SEATED] run
    status: Any
    prompt: Any  # tokens given
    known: Any  # tokens given and generated
    final: Any  # tokens given and to be generated
    computed: Any  # tokens in the KV cache
    blocks_held: Any
    block_table: Any  # [rows, width] numbers of the blocks held; beyond blocks_held[row] meaningless
    free_blocks: Any  # [blocks] a stack of counts[BLOCKS] block numbers
    free_rows: Any  # [rows] a stack of counts[ROWS] row numbers
    out: Any  # [4, max_seqs] the step being planned: row, start, tokens, preempted row


class SchedulerState:
    """Sequences and blocks of one replica.  `arrays` may be replaced by larger ones in `add`: do not keep them across it."""

    __slots__ = ("arrays", "views")

    def __init__(self, arrays: Arrays) -> None:
        """Start with these."""
        self.hold(arrays)

    def hold(self, arrays: Arrays) -> None:
        """Hold the arrays, and memoryviews of them for the kernels; not of the blocks, which are moved by slices."""
        self.arrays = arrays
        views = Arrays(*(memoryview(a) for a in arrays))
        self.views = views._replace(block_table=arrays.block_table, free_blocks=arrays.free_blocks)

    @property
    def block_table(self) -> Int32:
        """[rows, width]: the first `blocks_held[row]` entries of a row are its physical blocks, in order of position."""
        return self.arrays.block_table  # type: ignore[no-any-return]

    @property
    def blocks_held(self) -> Int32:
        """[rows]."""
        return self.arrays.blocks_held  # type: ignore[no-any-return]

    @property
    def prompt(self) -> Int32:
        """[rows] tokens given."""
        return self.arrays.prompt  # type: ignore[no-any-return]

    @property
    def known(self) -> Int32:
        """[rows] tokens given and generated."""
        return self.arrays.known  # type: ignore[no-any-return]

    @property
    def computed(self) -> Int32:
        """[rows] tokens in the KV cache."""
        return self.arrays.computed  # type: ignore[no-any-return]

    @property
    def generated(self) -> Int32:
        """[rows] tokens generated."""
        return self.arrays.known - self.arrays.prompt  # type: ignore[no-any-return]


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


def new_state(limits: Limits, capacity: int = 64) -> SchedulerState:
    """Return an empty scheduler with room for `capacity` requests; it grows when more come."""
    for name, value in zip(Limits._fields, limits, strict=True):
        if value < 1:
            raise BadInput(f"{name} is {value}: a replica needs at least 1")
    rows = max(capacity, 1)
    free = np.arange(limits.blocks - 1, -1, -1, dtype=np.int32)  # block 0 on top
    return SchedulerState(
        Arrays(
            counts=np.array([0, 0, 0, limits.blocks, rows, 0], dtype=np.int32),
            queue=np.zeros(2 * rows, dtype=np.int32),
            status=np.zeros(rows, dtype=np.int32),
            prompt=np.zeros(rows, dtype=np.int32),
            known=np.zeros(rows, dtype=np.int32),
            final=np.zeros(rows, dtype=np.int32),
            computed=np.zeros(rows, dtype=np.int32),
            blocks_held=np.zeros(rows, dtype=np.int32),
            block_table=np.zeros((rows, 1), dtype=np.int32),
            free_blocks=free,
            free_rows=np.arange(rows - 1, -1, -1, dtype=np.int32),
            out=np.zeros((4, limits.max_seqs), dtype=np.int32),
        )
    )


def add(state: SchedulerState, limits: Limits, prompt_tokens: int, output_limit: int) -> int:
    """Put a request at the end of the queue and return its row.  One that could never run is refused as BadInput."""
    final = prompt_tokens + output_limit
    _refuse_misfits(limits, prompt_tokens, output_limit)
    _make_room(state, -(-final // limits.block_tokens))
    a = state.views
    counts = a.counts
    counts[ROWS] -= 1
    row = int(a.free_rows[counts[ROWS]])
    a.status[row] = WAITING
    a.prompt[row] = a.known[row] = prompt_tokens
    a.final[row] = final
    a.computed[row] = a.blocks_held[row] = 0
    a.queue[counts[HEAD] + counts[SEATED] + counts[QUEUED]] = row
    counts[QUEUED] += 1
    return row


def _refuse_misfits(limits: Limits, prompt_tokens: int, output_limit: int) -> None:
    """Raise BadInput for a request that would wait for ever."""
    if prompt_tokens < 1 or output_limit < 1:
        raise BadInput(f"a request has at least one prompt token and one output token, not {prompt_tokens} and {output_limit}")
    final = prompt_tokens + output_limit
    asked = f"{prompt_tokens} prompt tokens + at most {output_limit} output tokens = {final}"
    if final > limits.max_context:
        raise BadInput(f"{asked}: the context ends at {limits.max_context}; shorten the prompt or ask for fewer tokens")
    if final > limits.blocks * limits.block_tokens:
        raise BadInput(f"{asked}: the KV cache holds {limits.blocks * limits.block_tokens}; shorten the request or give it more memory")


def _make_room(state: SchedulerState, width: int) -> None:
    """See to it that one more row fits, `width` blocks wide, and that the queue has a place at its end."""
    a = state.arrays
    head, length = int(a.counts[HEAD]), int(a.counts[SEATED] + a.counts[QUEUED])
    if head + length == len(a.queue):
        a.queue[:length] = a.queue[head : head + length].copy()
        a.counts[HEAD] = 0
    rows, columns = a.block_table.shape
    if a.counts[ROWS] and width <= columns:
        return
    new_rows = rows if a.counts[ROWS] else 2 * rows
    new_columns = columns if width <= columns else max(width, 2 * columns)
    table = np.zeros((new_rows, new_columns), dtype=np.int32)
    table[:rows, :columns] = a.block_table
    fresh = np.arange(new_rows - 1, rows - 1, -1, dtype=np.int32)
    by_row = {name: _longer(getattr(a, name), new_rows) for name in ("status", "prompt", "known", "final", "computed", "blocks_held")}
    free_rows = np.concatenate([a.free_rows[: a.counts[ROWS]], fresh])
    a.counts[ROWS] += len(fresh)
    grown = a._replace(queue=_longer(a.queue, 2 * new_rows), block_table=table, free_rows=_longer(free_rows, new_rows), **by_row)
    state.hold(grown)


def _longer(a: Int32, size: int) -> Int32:
    """Return the array with zeros up to this size."""
    return np.concatenate([a, np.zeros(size - len(a), dtype=a.dtype)])


def remove(state: SchedulerState, row: int) -> None:
    """Forget a request, whatever it was doing, and give its blocks back."""
    assert state.views.status[row] != FREE, f"row {row} is free already"
    _remove_kernel(state.views, row)


# ---------------------------------------------------------------- one step


def schedule(state: SchedulerState, limits: Limits) -> StepPlan:
    """Decide who computes how many tokens in the next step, take the blocks for it, and say who was preempted.

    Requests that reached their limit must have been removed.  The plan is empty only when nobody runs or waits.
    """
    state.views.counts[EVEN] = 0  # until `update`
    rows, start, tokens, budget = _all_seated(state, limits)
    _, seated, queued, _, _, _ = state.views.counts
    if seated and len(rows) == seated and (queued == 0 or seated == limits.max_seqs or budget == 0):
        return StepPlan(rows, start, tokens, np.ones(seated, dtype=np.bool_), _NOBODY)
    out, done = state.arrays.out, len(rows)
    out[0, :done], out[1, :done], out[2, :done] = rows, start, tokens
    n, preempted = _schedule_kernel(state.views, limits.max_seqs, limits.block_tokens, done, budget)
    rows, start, tokens = out[:3, :n].copy()
    samples = start + tokens == state.arrays.known[rows.astype(np.intp)]
    return StepPlan(rows, start, tokens, samples, out[3, :preempted].copy())


def update(state: SchedulerState, limits: Limits, plan: StepPlan) -> Int32:
    """Record that the step was computed; return the rows that reached their output limit and now wait for `remove`.

    Rows that were removed since the plan was made are passed over.
    """
    a = state.arrays
    rows, tokens, samples = plan.rows.astype(np.intp), plan.tokens, plan.samples
    lives = a.status[rows] == RUNNING
    if np.count_nonzero(lives) < len(rows):
        rows, tokens, samples = rows[lives], tokens[lives], samples[lives]
    a.computed[rows] += tokens
    sampled = rows if np.count_nonzero(samples) == len(rows) else rows[samples]
    known = a.known[sampled] + 1
    a.known[sampled] = known
    final = a.final[sampled]
    assert not np.count_nonzero(known > final), "a finished request was scheduled: remove it first"
    state.views.counts[EVEN] = len(sampled) == state.views.counts[SEATED]
    ended: Int32 = sampled[known == final].astype(np.int32)
    return ended


def features(state: SchedulerState, plan: StepPlan) -> StepFeatures:
    """Return the size of a step.  A decode is one token after the whole prompt; everything else counts as prefill."""
    rows, start, tokens, samples, _ = plan
    prefill = ((tokens > 1) | (start < state.arrays.prompt[rows.astype(np.intp)])).nonzero()[0]
    decodes, sampled = len(rows) - len(prefill), int(np.count_nonzero(samples))
    read, computed, pairs = int(np.add.reduce(start)), 0, 0.0
    for chunk, past in zip(tokens[prefill].tolist(), start[prefill].tolist(), strict=True):
        read -= past
        computed += chunk
        pairs += chunk * (past + 0.5 * chunk)
    return StepFeatures(decodes, read + decodes, computed, pairs, sampled)


def calm(state: SchedulerState, limits: Limits) -> Calm:
    """Return the steps ahead that `decode` can do at once.

    EVEN says that all those seated got a token in the step before, so that each has just this one to compute.
    """
    a = state.arrays
    head, seated, _, free, _, even = state.views.counts
    if not even or not 0 < seated <= limits.max_step_tokens or _next_fits(state, limits):
        return _RESTLESS
    rows = a.queue[head : head + seated].astype(np.intp)
    known = a.known[rows]
    room = a.blocks_held[rows] * limits.block_tokens + 1 - known
    steps = int(np.minimum.reduce(a.final[rows] - known))
    while seated * -(-steps // limits.block_tokens) > free and _blocks(steps - room, limits) > free:
        steps //= 2
    return Calm(steps, rows, known, room, int(np.add.reduce(known)))


def decode(state: SchedulerState, limits: Limits, ahead: Calm, steps: int) -> tuple[Rows, list[int]]:
    """Do so many of the steps that `calm` found, as `schedule` and `update` would.

    Returns the rows that reached their output limit, which wait for `remove`, and by step how many blocks were taken.
    """
    a, counts, rows = state.arrays, state.views.counts, ahead.rows
    taken = [0] * steps
    needy = (ahead.room < steps).nonzero()[0]
    for row, first in zip(rows[needy].tolist(), ahead.room[needy].tolist(), strict=True):
        for step in range(first, steps, limits.block_tokens):
            counts[BLOCKS] = _take(state.views, row, 1, counts[BLOCKS])
            taken[step] += 1
    known = ahead.known + np.int32(steps)
    a.known[rows] = known
    a.computed[rows] = known - 1
    return rows[known == a.final[rows]], taken


def _next_fits(state: SchedulerState, limits: Limits) -> bool:
    """Say whether the first that waits could be admitted beside a decode of all those seated, their new blocks left aside."""
    a = state.views
    head, seated, queued, free, _, _ = a.counts
    budget = limits.max_step_tokens - seated
    if queued == 0 or seated == limits.max_seqs or budget <= 0:
        return False
    tokens = min(a.known[a.queue[head + seated]], budget)
    return bool(-(-tokens // limits.block_tokens) <= free)


def _blocks(tokens: Int32, limits: Limits) -> int:
    """Return the blocks that rows begin with so many tokens each, none with a number below 1."""
    return int(np.add.reduce((np.maximum(tokens, 0) + limits.block_tokens - 1) // limits.block_tokens))


def _all_seated(state: SchedulerState, limits: Limits) -> tuple[Int32, Int32, Int32, int]:
    """Return rows, start and tokens of all that run, if budget and blocks suffice for all of them, else of none; and the budget left.

    A short cut through the first part of the kernel's loop, with the same result: most steps are of this kind.
    """
    a = state.arrays
    head, seated, _, free, _, _ = state.views.counts
    rows = a.queue[head : head + seated].copy()
    index = rows.astype(np.intp)
    start, known, held = a.computed[index], a.known[index], a.blocks_held[index]
    tokens = known - start
    budget = limits.max_step_tokens - int(np.add.reduce(tokens))
    at = (known > held * limits.block_tokens).nonzero()[0]
    needs = ((known[at] - 1) // limits.block_tokens + 1 - held[at]).tolist()
    if budget < 0 or sum(needs) > free:
        return _NOBODY, _NOBODY, _NOBODY, limits.max_step_tokens
    for row, need in zip(rows[at].tolist(), needs, strict=True):
        free = _take(state.views, row, need, free)
    state.views.counts[BLOCKS] = free
    return rows, start, tokens, budget


def _schedule_kernel(a: Arrays, max_seqs: int, block_tokens: int, done: int, budget: int) -> tuple[int, int]:
    """Plan a step into `a.out`, where `done` rows are planned already; return how many rows compute and how many were preempted."""
    counts, queue, status, known, computed, held, out = a.counts, a.queue, a.status, a.known, a.computed, a.blocks_held, a.out
    head, seated, queued, free = counts[HEAD], counts[SEATED], counts[QUEUED], counts[BLOCKS]
    length = seated + queued
    n = done
    preempted = 0
    while budget > 0 and n < length:
        is_new = n >= seated
        if is_new and (preempted > 0 or seated >= max_seqs):
            break
        row = queue[head + n]
        start = computed[row]
        tokens = known[row] - start
        if tokens > budget:
            tokens = budget
        need = (start + tokens + block_tokens - 1) // block_tokens - held[row]
        if is_new:
            if need > free:
                break
            status[row] = RUNNING
            seated += 1
        while need > free and seated > n:  # only for one that runs: preempt from the end, at worst itself
            seated -= 1
            victim = queue[head + seated]
            free = _release(a, victim, free)
            computed[victim] = 0
            status[victim] = WAITING
            out[3, preempted] = victim
            preempted += 1
        if seated <= n:
            break
        if need > 0:
            free = _take(a, row, need, free)
        out[0, n] = row
        out[1, n] = start
        out[2, n] = tokens
        budget -= tokens
        n += 1
    counts[SEATED], counts[QUEUED], counts[BLOCKS] = seated, length - seated, free
    return n, preempted


def _remove_kernel(a: Arrays, row: int) -> None:
    """Take a row out of the queue, closing the gap from the front, where the running ones are few."""
    counts, queue = a.counts, a.queue
    head = counts[HEAD]
    at = head
    while queue[at] != row:
        at += 1
    queue[head + 1 : at + 1] = queue[head:at]
    counts[HEAD] = head + 1
    counts[SEATED if a.status[row] == RUNNING else QUEUED] -= 1
    counts[BLOCKS] = _release(a, row, counts[BLOCKS])
    a.status[row] = FREE
    a.free_rows[counts[ROWS]] = row
    counts[ROWS] += 1


def _take(a: Arrays, row: int, need: int, free: int) -> int:
    """Give a row `need` blocks off the stack; return how many are left."""
    held = a.blocks_held[row]
    if need == 1:  # as in most decodes
        a.block_table[row, held] = a.free_blocks[free - 1]
    else:
        a.block_table[row, held : held + need] = a.free_blocks[free - need : free][::-1]
    a.blocks_held[row] = held + need
    return free - need


def _release(a: Arrays, row: int, free: int) -> int:
    """Put a row's blocks back, the first one on top; return how many are free now."""
    held: int = a.blocks_held[row]
    a.free_blocks[free : free + held] = a.block_table[row, :held][::-1]
    a.blocks_held[row] = 0
    return free + held


# ---------------------------------------------------------------- what must always hold


def check(state: SchedulerState, limits: Limits) -> None:
    """Assert that every block is free or held exactly once, that counters, queue and statuses agree, and that the limits are kept."""
    a = state.arrays
    head, seated, queued, free, rows, even = (int(c) for c in a.counts)
    queue = a.queue[head : head + seated + queued]
    held = [a.block_table[row, : a.blocks_held[row]] for row in queue]
    blocks = np.concatenate([a.free_blocks[:free], *held])
    assert sorted(blocks.tolist()) == list(range(limits.blocks)), "a block is lost or held twice"
    assert seated <= limits.max_seqs
    assert len(set(queue.tolist())) == len(queue), "a row stands twice in the queue"
    assert sorted([*queue.tolist(), *a.free_rows[:rows].tolist()]) == list(range(len(a.status))), "a row is lost"
    assert (a.status[queue[:seated]] == RUNNING).all()
    assert (a.status[queue[seated:]] == WAITING).all()
    assert (a.status[a.free_rows[:rows]] == FREE).all()
    assert (a.computed[queue] <= a.known[queue]).all()
    assert (a.known[queue] <= a.final[queue]).all()
    assert (a.computed[queue] <= a.blocks_held[queue] * limits.block_tokens).all(), "more tokens cached than its blocks hold"
    assert not even or (a.computed[queue[:seated]] == a.known[queue[:seated]] - 1).all()
    assert (a.computed[queue[seated:]] == 0).all()
    assert (a.blocks_held[queue[seated:]] == 0).all(), "a waiting row holds blocks"
