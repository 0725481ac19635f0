"""Continuous batching over arrays: one scheduler, run by the engine with a model and by the simulator with a profile as its clock.

    row = add(state, limits, prompt_tokens, output_limit)     a request joins the queue
    plan = schedule(state, limits)                            who computes how many tokens in this step
    ended = update(state, limits, plan)                       the step is done: tokens are cached, one sampled per row that samples
    remove(state, row)                                        finished, stopped or cancelled: its blocks go back at once
    extend(state, row, hashes)                                its text has filled more blocks, which others may share
    forget(state, row), restart(state)                        what was kept of it on the host is gone; a step has failed: all begin anew

The policy is by default that of vLLM V1 (`vllm/v1/core/sched/scheduler.py`): one budget of tokens per step; running sequences first, in
order of admission, each with all its tokens that are not yet computed (one in decode) as far as the budget goes; then waiting ones, first
come first served, while seats, budget and blocks suffice.  Long prompts are so computed in chunks.  KV memory is a pool of equal blocks,
taken on demand.  When a running sequence finds none, the last admitted one is preempted by recompute: it gives all its blocks back and
waits at the front, until the block is there or the sequence preempted itself; in such a step nobody new is admitted.  Since only the last
admitted one is ever preempted, the oldest is never set back, and as long as each fits the pool alone, all of them finish.

`Policy` says what other engines do differently, `presets` which engine does what by default.  The decisions are in `kernel` (who computes,
who gives way) and `prefix` (blocks that requests share): loops over integer arrays, which the engine (`scheduler`) reads as memoryviews and
`simulate` compiles.
"""

from __future__ import annotations

from mlsys_bench.batching.arrays import Arrays, Limits, Policy, StepFeatures, check_limits, check_policy, check_ranks, misfit
from mlsys_bench.batching.scheduler import (
    SchedulerState,
    StepPlan,
    add,
    check,
    extend,
    features,
    forget,
    free_blocks,
    hashed,
    new_state,
    remove,
    restart,
    running,
    schedule,
    update,
    waiting,
)

__all__ = [
    "Arrays", "Limits", "Policy", "SchedulerState", "StepFeatures", "StepPlan", "add", "check", "check_limits", "check_policy",
    "check_ranks",     "extend",
    "features", "forget", "free_blocks", "hashed", "misfit", "new_state", "remove", "restart", "running", "schedule", "update", "waiting",
]  # fmt: skip
