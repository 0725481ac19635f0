"""The decisions of a scheduler, as loops over integer arrays: who computes how many tokens in the next step, and who gives way.

Run by the engine as they stand, over memoryviews, and by the simulator over lists or compiled.  All that a request is, is a row.
Where rows have ranks, lower ones go first: into a seat, into a step; and the last of the highest rank gives way when memory is full, as
under vLLM's policy `priority`.  Nobody loses a seat to one that waits.
"""

from __future__ import annotations

from mlsys_bench.batching.arrays import (
    AFTER,
    BEFORE,
    BLOCKS,
    COMPUTED,
    FINAL,
    FIRST,
    FREE,
    GATE,
    HELD,
    IDLE,
    KNOWN,
    LAST,
    MOVED,
    NOBODY,
    OUT_ROW,
    OUT_START,
    OUT_TOKENS,
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
    VICTIMS,
    WAITING,
    Arrays,
    Limits,
    Policy,
)
from mlsys_bench.batching.lists import insert, remove
from mlsys_bench.batching.prefix import adopt, evict, let_go, lookup, owns, publish

ALL, PREFILLS, DECODES = range(3)  # which of those seated compute


def plan(a: Arrays, limits: Limits, policy: Policy, done: int, budget: int) -> tuple[int, int]:
    """Plan a step into `a.slots`, where `done` rows, all those seated, are planned already; return rows planned and rows preempted."""
    aside = _decoding(a) if policy.prefill_first and policy.mixed else 0
    n, preempted, there = done, 0, a.counts[SEATED]
    budget -= aside
    for turn in range(2):
        kind = PREFILLS if policy.prefill_first else ALL
        if turn > 0:
            if n > 0 and not policy.mixed:
                break
            kind, budget = (DECODES, budget + aside) if n > 0 else (ALL, limits.max_step_tokens)
        if turn > 0 or done == 0:
            n, budget, more = _seated(a, limits, policy, kind, there, n, budget)
            preempted += more
        if turn == 0 and preempted == 0:
            n, budget = _admit(a, limits, policy, n, budget)
        if not policy.prefill_first:
            break
    if policy.mixed and preempted > 0:
        n = _still_seated(a, n)
    return n, preempted


def _seated(a: Arrays, limits: Limits, policy: Policy, kind: int, there: int, n: int, budget: int) -> tuple[int, int, int]:
    """Plan those of one kind among the first `there` seated, after the n planned; return rows planned, budget left and rows preempted."""
    counts, seats, known, computed, held = a.counts, a.slots[SEATS], a.rows[KNOWN], a.rows[COMPUTED], a.rows[HELD]
    block_tokens = limits.block_tokens
    out_row, out_start, out_tokens = a.slots[OUT_ROW], a.slots[OUT_START], a.slots[OUT_TOKENS]
    publishes = counts[PREFIX_TOKENS] > 0 and policy.prefix_cache
    plain = kind == ALL and policy.drafts == 0
    there = min(there, counts[SEATED])
    preempted = i = 0
    while budget > 0 and i < there:
        row = seats[i]
        i += 1
        start = computed[row]
        tokens = known[row] - start
        if not plain:
            decodes = tokens == 1 and start >= a.rows[PROMPT][row]
            if (kind == PREFILLS and decodes) or (kind == DECODES and not decodes):
                continue
            if decodes:
                tokens += min(policy.drafts, a.rows[FINAL][row] - known[row] - 1)
        if tokens > budget:
            tokens = budget
        need = (start + tokens + block_tokens - 1) // block_tokens - held[row]
        if need > 0:
            while need > counts[BLOCKS] and counts[SEATED] >= i:  # from the end, at worst itself
                counts[SEATED] -= 1
                a.slots[VICTIMS][preempted] = seats[counts[SEATED]]
                preempt(a, policy, seats[counts[SEATED]])
                preempted += 1
            if counts[SEATED] < i:
                break
            there = min(there, counts[SEATED])
            take(a, policy, row, need)
        if publishes:
            publish(a, row, min(start + tokens, known[row]))
        out_row[n], out_start[n], out_tokens[n] = row, start, tokens
        budget -= tokens
        n += 1
    return n, budget, preempted


def _admit(a: Arrays, limits: Limits, policy: Policy, n: int, budget: int) -> tuple[int, int]:
    """Seat and plan those who wait, in order, while seats, budget and blocks suffice; return rows planned and budget left."""
    counts, block_tokens = a.counts, limits.block_tokens
    while budget > 0 and counts[QUEUED] > 0 and counts[SEATED] < limits.max_seqs and counts[GATE] > 0:
        row = counts[FIRST]
        fits, start = fit(a, limits, policy, row, budget)
        if not fits:
            break
        unlink(a, row)
        swapped = a.rows[STATUS][row] == SWAPPED
        a.rows[STATUS][row] = RUNNING
        _seat(a, row)
        counts[GATE] -= policy.gather
        if counts[PREFIX_TOKENS] > 0 and policy.prefix_cache:
            adopt(a, row, start)
        a.rows[COMPUTED][row] = start
        tokens = min(a.rows[KNOWN][row] - start, budget)
        take(a, policy, row, (start + tokens + block_tokens - 1) // block_tokens - a.rows[HELD][row])
        if swapped:
            counts[MOVED] += (start + block_tokens - 1) // block_tokens
        if counts[PREFIX_TOKENS] > 0 and policy.prefix_cache:
            publish(a, row, start + tokens)
        a.slots[OUT_ROW][n] = row
        a.slots[OUT_START][n] = start
        a.slots[OUT_TOKENS][n] = tokens
        budget -= tokens
        n += 1
    return n, budget


def _seat(a: Arrays, row: int) -> None:
    """Give a row the seat behind those of its rank."""
    seats, rank, i = a.slots[SEATS], a.rows[RANK], a.counts[SEATED]
    while i > 0 and rank[seats[i - 1]] > rank[row]:
        seats[i] = seats[i - 1]
        i -= 1
    seats[i] = row
    a.counts[SEATED] += 1


def fit(a: Arrays, limits: Limits, policy: Policy, row: int, budget: int) -> tuple[bool, int]:
    """Say whether a waiting row could be seated now, and how many of its tokens are or would be in the cache."""
    counts, block_tokens = a.counts, limits.block_tokens
    start, shared, idle = a.rows[COMPUTED][row], 0, 0
    if start == 0 and counts[PREFIX_TOKENS] > 0 and policy.prefix_cache:
        hits, on_device, idle = lookup(a, row)
        start = hits * counts[PREFIX_TOKENS]
        shared = on_device
    tokens = a.rows[KNOWN][row] - start
    if tokens > budget:
        if not policy.chunked and (budget < limits.max_step_tokens or a.rows[KNOWN][row] <= limits.max_step_tokens):
            return False, start
        tokens = budget
    need = (start + tokens + block_tokens - 1) // block_tokens - shared + idle
    if policy.reserve > 0.0 and counts[SEATED] > 0:
        ahead = _to_come(a, limits, policy, row) - shared + idle
        for i in range(counts[SEATED]):
            other = a.slots[SEATS][i]
            ahead += max(_to_come(a, limits, policy, other) - a.rows[HELD][other], 0)
        need = max(need, ahead)
    return need <= counts[BLOCKS], start


def _to_come(a: Arrays, limits: Limits, policy: Policy, row: int) -> int:
    """Return the blocks a row holds in the end, as far as the policy looks ahead."""
    final = min(
        max(a.rows[FINAL][row], a.rows[PROMPT][row] + policy.reserve_output), limits.max_context, limits.blocks * limits.block_tokens
    )
    return int(a.rows[KNOWN][row] + policy.reserve * (final - a.rows[KNOWN][row]) + limits.block_tokens - 1) // limits.block_tokens


def _decoding(a: Arrays) -> int:
    """Return how many of those seated decode."""
    n = 0
    for i in range(a.counts[SEATED]):
        row = a.slots[SEATS][i]
        n += a.rows[KNOWN][row] - a.rows[COMPUTED][row] == 1 and a.rows[COMPUTED][row] >= a.rows[PROMPT][row]
    return n


def _still_seated(a: Arrays, n: int) -> int:
    """Drop those from the plan who were preempted after they had been planned; return how many are left."""
    kept = 0
    for i in range(n):
        if a.rows[STATUS][a.slots[OUT_ROW][i]] == RUNNING:
            a.slots[OUT_ROW][kept], a.slots[OUT_START][kept], a.slots[OUT_TOKENS][kept] = (
                a.slots[OUT_ROW][i],
                a.slots[OUT_START][i],
                a.slots[OUT_TOKENS][i],
            )
            kept += 1
    return kept


def preempt(a: Arrays, policy: Policy, row: int) -> None:
    """Take the cache of a row that has lost its seat, and put it in front of those of its rank who wait."""
    counts = a.counts
    counts[PREEMPTIONS] += 1
    counts[MOVED] += a.rows[HELD][row] * policy.swap
    release(a, policy, row)
    if policy.swap:
        a.rows[STATUS][row] = SWAPPED
    else:
        a.rows[COMPUTED][row] = 0
        a.rows[STATUS][row] = WAITING
    after, rank, earlier = a.rows[AFTER], a.rows[RANK], NOBODY
    later = counts[FIRST]
    while later != NOBODY and rank[later] < rank[row]:
        earlier, later = later, after[later]
    insert(counts, a.rows[BEFORE], after, FIRST, LAST, row, earlier)
    counts[QUEUED] += 1


# ---------------------------------------------------------------- in and out


def enter(a: Arrays, row: int, prompt_tokens: int, output_tokens: int, cached_tokens: int) -> None:
    """Put a request behind those of its rank who wait; of what it knows, `cached_tokens` come with it."""
    counts = a.counts
    a.rows[STATUS][row] = WAITING
    a.rows[PROMPT][row] = prompt_tokens
    a.rows[KNOWN][row] = prompt_tokens
    a.rows[FINAL][row] = prompt_tokens + output_tokens
    a.rows[COMPUTED][row] = cached_tokens
    a.rows[HELD][row] = 0
    before, rank, earlier = a.rows[BEFORE], a.rows[RANK], counts[LAST]
    while earlier != NOBODY and rank[earlier] > rank[row]:
        earlier = before[earlier]
    insert(counts, before, a.rows[AFTER], FIRST, LAST, row, earlier)
    counts[QUEUED] += 1


def unlink(a: Arrays, row: int) -> None:
    """Take a row out of the waiting list."""
    remove(a.counts, a.rows[BEFORE], a.rows[AFTER], FIRST, LAST, row)
    a.counts[QUEUED] -= 1


def leave(a: Arrays, policy: Policy, row: int) -> None:
    """Forget a row, whatever it was doing, and give its blocks back."""
    counts, seats = a.counts, a.slots[SEATS]
    if a.rows[STATUS][row] == RUNNING:
        i = 0
        while seats[i] != row:
            i += 1
        counts[SEATED] -= 1
        while i < counts[SEATED]:
            seats[i] = seats[i + 1]
            i += 1
    else:
        unlink(a, row)
    release(a, policy, row)
    a.rows[STATUS][row] = FREE
    if len(a.free_rows) > 0:
        a.free_rows[counts[ROWS]] = row
        counts[ROWS] += 1


# ---------------------------------------------------------------- blocks


def take(a: Arrays, policy: Policy, row: int, need: int) -> None:
    """Give a row `need` of the blocks to be had."""
    counts, held = a.counts, a.rows[HELD][row]
    a.rows[HELD][row] = held + need
    counts[BLOCKS] -= need
    if counts[PREFIX_TOKENS] > 0:
        evict(a, policy, need)
    if len(a.free_blocks) > 0:
        top = counts[BLOCKS] + need - counts[IDLE]
        for i in range(need):
            a.block_table[row, held + i] = a.free_blocks[top - 1 - i]


def release(a: Arrays, policy: Policy, row: int) -> None:
    """Put a row's blocks back, the first one on top; cached prefixes stay to be had."""
    counts, held = a.counts, a.rows[HELD][row]
    caches = counts[PREFIX_TOKENS] > 0 and policy.prefix_cache
    if caches and held > 0:
        publish(a, row, a.rows[COMPUTED][row])
    if len(a.free_blocks) > 0:
        top = counts[BLOCKS] - counts[IDLE]
        for i in range(held - 1, -1, -1):
            if not (caches and owns(a, row, i)):
                a.free_blocks[top] = a.block_table[row, i]
                top += 1
    kept = let_go(a, row) if caches else 0
    counts[BLOCKS] += held - kept
    a.rows[HELD][row] = 0
