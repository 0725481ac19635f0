"""What a scheduler knows, as flat arrays without objects, so that its loops can be compiled; and the limits and rules it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput

Int32 = npt.NDArray[np.int32]
Bool = npt.NDArray[np.bool_]

FREE, WAITING, RUNNING, SWAPPED = range(4)  # status of a row; SWAPPED waits too, its cache kept in host memory
NOWHERE, ON_DEVICE, ON_HOST = range(3)  # where a prefix block is
NOBODY = -1  # end of a linked list

# counters of one replica
(
    SEATED, QUEUED, FIRST, LAST,  # running, waiting; ends of the waiting list
    BLOCKS, IDLE, IDLE_FIRST, IDLE_LAST,  # blocks to be had; of these, cached prefixes nobody uses, longest unused first
    HOST, HOST_FIRST, HOST_LAST,  # prefix blocks in host memory
    PREFIX_TOKENS, PREFIX_BLOCKS,  # of a prefix block: tokens and KV blocks; 0 where requests carry no hashes
    EVEN,  # all those seated got a token in the step before, so that each has just this one to compute
    GATE,  # how many may still be admitted to the batch being gathered
    MOVED,  # KV blocks moved between host and device for the step being planned
    LUCK,  # state of the random numbers
    ROWS,  # free rows
    HIT_TOKENS, ASKED_TOKENS, PREEMPTIONS,  # totals: found in the cache and looked for, by admissions; preemptions
) = range(21)  # fmt: skip
SEATS, OUT_ROW, OUT_START, OUT_TOKENS, VICTIMS, ENDED = range(6)  # of slots; SEATS by rank, within one in order of admission
SLOTS = 6
# of rows: tokens given; given and generated; given and to be generated; in the KV cache.  KV blocks; neighbours in the waiting list; where
# its hashes begin and where those end that can be cached; how many of them are its own or shared.  Then two for simulators.  RANK: who
# has a lower one goes first, 0 where nobody does
STATUS, PROMPT, KNOWN, FINAL, COMPUTED, HELD, AFTER, BEFORE, HASH_AT, HASH_END, CACHED, FATE, TOKEN_AT, RANK = range(14)
FIELDS = 14
BLOCK, OWNED = range(2)  # of hashes: number of the prefix block; whether the request holds on to it
# of prefix blocks: rows that hold on to it; where it is; neighbours in the list of idle ones or of the host; its physical block
USERS, PLACE, NEWER, OLDER, HOME = range(5)
COUNTERS = 32  # room for those of a simulator, which begin at 21
OPEN = 1 << 30  # GATE where batches are not gathered


class Limits(NamedTuple):
    """What one replica can hold: sequences running at once, tokens per step, and `blocks` KV blocks of `block_tokens` tokens."""

    max_seqs: int
    max_step_tokens: int
    block_tokens: int
    blocks: int
    max_context: int


class Policy(NamedTuple):
    """The rules of a scheduler; the defaults are those of vLLM V1.

    `chunked`: prompts are cut to the budget of a step.  `prefill_first`: while prompts can be computed, decodes stand back, or join them
    (`mixed`).  `reserve`: share of the output still to come, of all those seated, for which memory must be there when one is admitted: 0
    takes blocks on demand, 1 never preempts; clients ask for at least `reserve_output` tokens, however few they get.  `swap`: preempted
    sequences keep their cache in host memory instead of computing it anew.  `move_s`: seconds to move a block between host and device.
    `prefix_cache`: blocks with the same hash are computed once and kept until their room is needed, then in `host_blocks` of host memory.
    `drafts` tokens are guessed for each decode; each is right with `acceptance` if those before it are.  `gather`: a batch is admitted
    only when nobody runs, once it is full or its oldest has waited `gather_s`.
    """

    chunked: int = 1
    prefill_first: int = 0
    mixed: int = 0
    reserve: float = 0.0
    reserve_output: int = 0
    swap: int = 0
    move_s: float = 0.0
    prefix_cache: int = 1
    host_blocks: int = 0
    drafts: int = 0
    acceptance: float = 0.0
    gather: int = 0
    gather_s: float = 0.0


class Arrays(NamedTuple):
    """All that a scheduler knows, in few arrays: compiling takes long with many.  Replicas may share `rows` and hold different ones."""

    counts: Any  # [COUNTERS]
    slots: Any  # [SLOTS, max_seqs] lists of rows: those seated, the step being planned, those preempted in it, those who end with it
    rows: Any  # [FIELDS, rows] by row, what is known of a request
    hashes: Any  # [2, hashes] BLOCK, OWNED: prefix blocks of the requests, one request after another
    prefixes: Any  # [5, prefix blocks] USERS, PLACE, NEWER, OLDER, HOME
    # physical blocks; empty in a simulator, which only counts them
    block_table: Any  # [rows, width] numbers of the blocks held; beyond rows[HELD][row] meaningless
    free_blocks: Any  # [blocks] a stack of counts[BLOCKS] - counts[IDLE] block numbers
    free_rows: Any  # [rows] a stack of counts[ROWS] row numbers


class StepFeatures(NamedTuple):
    """The size of a step, as latency profiles measure it."""

    decode_seqs: int
    decode_kv_tokens: int  # read by decodes, the new one included
    prefill_tokens: int
    prefill_pairs: float  # sum of chunk * (past + chunk / 2)
    sampled_tokens: int


def check_limits(limits: Limits) -> None:
    """Raise BadInput for a replica that could hold nothing."""
    for name, value in zip(Limits._fields, limits, strict=True):
        if value < 1:
            raise BadInput(f"{name} is {value}: a replica needs at least 1")


def check_policy(policy: Policy) -> None:
    """Raise BadInput for rules that make no sense."""
    for name in ("reserve", "acceptance"):
        if not 0 <= getattr(policy, name) <= 1:
            raise BadInput(f"{name} is {getattr(policy, name):g}: a share lies between 0 and 1")
    for name in ("reserve_output", "move_s", "host_blocks", "drafts", "gather_s"):
        if not getattr(policy, name) >= 0:
            raise BadInput(f"{name} is {getattr(policy, name):g}: it cannot be negative")


def check_ranks(policy: Policy, ranked: bool) -> None:
    """Raise BadInput for a scheduler that knows no priorities, where requests have some."""
    if ranked and (policy.prefill_first or policy.gather):
        raise BadInput(
            "requests have priorities, and a scheduler that gathers batches or lets prompts go first serves them as they come; "
            "take the policy of vllm-v1, or give all tenants one priority"
        )


def misfit(limits: Limits, policy: Policy, prompt_tokens: int, output_limit: int) -> str | None:
    """Return why a request could never run, or None."""
    if prompt_tokens < 1 or output_limit < 1:
        return f"a request has at least one prompt token and one output token, not {prompt_tokens} and {output_limit}"
    final = prompt_tokens + output_limit
    asked = f"{prompt_tokens} prompt tokens + at most {output_limit} output tokens = {final}"
    if final > limits.max_context:
        return f"{asked}: the context ends at {limits.max_context}; shorten the prompt or ask for fewer tokens"
    if final > limits.blocks * limits.block_tokens:
        return f"{asked}: the KV cache holds {limits.blocks * limits.block_tokens}; shorten the request or give it more memory"
    if not policy.chunked and prompt_tokens > limits.max_step_tokens:
        return f"{prompt_tokens} prompt tokens: without chunked prefill a step of {limits.max_step_tokens} must hold them all"
    return None


Make = Callable[[int, int], Any]  # so many integer arrays of this length, all zero


def fresh(limits: Limits, make: Make, *, rows: int, hashes: int = 0, prefixes: int = 0, prefix_tokens: int = 0) -> Arrays:
    """Return the arrays of an empty scheduler that counts blocks, made by `make`."""
    return Arrays(
        counts=reset(make(1, COUNTERS)[0], limits, prefix_tokens),
        slots=make(SLOTS, limits.max_seqs),
        rows=make(FIELDS, rows),
        hashes=make(2, hashes),
        prefixes=make(5, prefixes),
        block_table=make(0, 0),
        free_blocks=make(1, 0)[0],
        free_rows=make(1, 0)[0],
    )


def reset(counts: Any, limits: Limits, prefix_tokens: int = 0) -> Any:
    """Set the counters to those of an empty replica, and return them."""
    for i in range(len(counts)):
        counts[i] = 0
    if prefix_tokens % limits.block_tokens:
        raise BadInput(f"prefix blocks of {prefix_tokens} tokens are not made of KV blocks of {limits.block_tokens}; use a divisor")
    counts[BLOCKS], counts[GATE], counts[LUCK] = limits.blocks, OPEN, 1
    counts[PREFIX_TOKENS], counts[PREFIX_BLOCKS] = prefix_tokens, prefix_tokens // limits.block_tokens
    for end in (FIRST, LAST, IDLE_FIRST, IDLE_LAST, HOST_FIRST, HOST_LAST):
        counts[end] = NOBODY
    return counts
