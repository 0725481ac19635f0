"""What `scheduler` does with numpy, row by row: the same, and sooner where rows are few.

Between the steps of a large model caches are cold: a step of one sequence calls some sixty operators of numpy, each of which then costs
3 to 5 us, a tenth of the time that TinyLlama's step takes beside its products (ADR 26).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlsys_bench.batching import kernel, prefix
from mlsys_bench.batching.arrays import (
    BLOCKS,
    CACHED,
    COMPUTED,
    EVEN,
    FINAL,
    HELD,
    KNOWN,
    PREFIX_TOKENS,
    PROMPT,
    RUNNING,
    SEATED,
    SEATS,
    STATUS,
    Arrays,
    Int32,
    Limits,
    Policy,
    StepFeatures,
)

ROWS = 4  # no more of them than these
_NOBODY = np.zeros(0, dtype=np.int32)


def seated(a: Arrays, policy: Policy, limits: Limits) -> tuple[Int32, Int32, Int32, int] | None:
    """Return rows, start and tokens of all that run, and the budget left, if that and the blocks suffice for all of them."""
    counts, known, held = a.counts, a.rows[KNOWN], a.rows[HELD]
    rows = a.slots[SEATS][: counts[SEATED]].tolist()
    start = [a.rows[COMPUTED][row] for row in rows]
    tokens = [known[row] - begin for row, begin in zip(rows, start, strict=True)]
    budget = limits.max_step_tokens - sum(tokens)
    needs = [max(0, -(-known[row] // limits.block_tokens) - held[row]) for row in rows]
    if budget < 0 or sum(needs) > counts[BLOCKS]:
        return None
    for row, need in zip(rows, needs, strict=True):
        if need:
            kernel.take(a, policy, row, need)
    if counts[PREFIX_TOKENS]:
        for row in rows:
            if known[row] // limits.block_tokens > a.rows[CACHED][row]:
                prefix.publish(a, row, known[row])
    laid = np.array([rows, start, tokens], dtype=np.int32)
    return laid[0], laid[1], laid[2], budget


def update(a: Arrays, plan: Any, new: Int32 | None) -> Int32:
    """Record that a step was computed; return the rows that reached their output limit."""
    ended, sampled = list[int](), 0
    computed, known, final = a.rows[COMPUTED], a.rows[KNOWN], a.rows[FINAL]
    for i, (row, tokens, samples) in enumerate(zip(plan.rows.tolist(), plan.tokens.tolist(), plan.samples.tolist(), strict=True)):
        if a.rows[STATUS][row] != RUNNING:
            continue
        computed[row] += tokens
        if samples:
            sampled += 1
            known[row] += 1 if new is None else int(new[i])
            computed[row] = known[row] - 1
            assert known[row] <= final[row], "a finished request was scheduled: remove it first"
            if known[row] == final[row]:
                ended.append(row)
    a.counts[EVEN] = sampled == a.counts[SEATED]
    return np.array(ended, dtype=np.int32) if ended else _NOBODY


def features(a: Arrays, plan: Any) -> StepFeatures:
    """Return the size of a step without drafts."""
    decodes, read, computed, pairs = 0, 0, 0, 0.0
    for row, begin, tokens in zip(plan.rows.tolist(), plan.start.tolist(), plan.tokens.tolist(), strict=True):
        if tokens > 1 or begin < a.rows[PROMPT][row]:
            computed += tokens
            pairs += tokens * (begin + 0.5 * tokens)
        else:
            decodes += 1
            read += begin + 1
    return StepFeatures(decodes, read, computed, pairs, sum(plan.samples.tolist()))
