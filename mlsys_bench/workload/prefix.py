"""How much of the prompts a prefix cache has seen before: of any size, or of a given one."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.workload.schedule import Ints, Schedule


def hit_share(plan: Schedule, cache_tokens: float | None = None) -> float:
    """Return the share of prompt tokens found in a cache that keeps every block (None), or so many tokens' worth of them.

    Requests are looked up in order of arrival, as if each were done before the next: what runs at the same time is not yet shared in a
    real server, so this is an upper bound.  The block used least recently goes first, of one prompt the last block before the first.
    """
    if plan.prefix_offsets is None or plan.prefix_hashes is None or not plan.prefix_block_tokens:
        raise BadInput("this traffic says nothing of prefixes; a trace with hash_ids does")
    size = plan.prefix_block_tokens
    if cache_tokens is None:
        return _endless(plan, plan.prefix_offsets, plan.prefix_hashes) / float(plan.prompt_tokens.sum())
    capacity = cache_tokens // size
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for row in range(len(plan)):
        blocks = plan.prefix_hashes[plan.prefix_offsets[row] : plan.prefix_offsets[row + 1]].tolist()
        found = next((i for i, block in enumerate(blocks) if block not in cache), len(blocks))
        hits += min(found * size, int(plan.prompt_tokens[row]))
        for block in reversed(blocks):
            cache[block] = None
            cache.move_to_end(block)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits / float(plan.prompt_tokens.sum())


def with_answers(plan: Schedule) -> tuple[Ints, Ints]:
    """Return the prefix hashes of requests, and where those of each begin and end: with the blocks that answers fill, where they are known.

    A server keeps the blocks of an answer as it keeps those of a prompt.  What they are is known of a turn whose session goes on: the next
    prompt begins with this prompt and its answer.  Hashes are chained, so that the last full block of a prompt tells of all before it.
    """
    assert plan.prefix_offsets is not None
    assert plan.prefix_hashes is not None
    offsets, hashes = plan.prefix_offsets, plan.prefix_hashes
    size, prompt, ends = plan.prefix_block_tokens, plan.prompt_tokens.astype(np.int64), plan.prompt_tokens + plan.output_tokens
    if plan.session is None or not size or not len(hashes):
        return offsets, hashes
    turn = np.arange(len(plan)) if plan.turn is None else plan.turn
    order = np.lexsort((turn, plan.session))
    here, after = order[:-1], order[1:]
    goes_on = (plan.session[here] == plan.session[after]) & (prompt[after] >= ends[here])
    here, after = here[goes_on], after[goes_on]
    counts, full = np.diff(offsets), prompt[here] // size
    known = (counts[here] >= full) & (counts[after] >= full)
    here, after, full = here[known], after[known], full[known]
    last = np.maximum(full - 1, 0)
    same = (full == 0) | (hashes[np.minimum(offsets[here] + last, len(hashes) - 1)] == hashes[offsets[after] + last])
    here, after = here[same], after[same]
    begins = offsets[:-1].astype(np.int64)
    begins[here] = offsets[after]
    counts[here] = np.minimum(counts[after], np.maximum((ends[here] - 1) // size, -(-prompt[here] // size) + 1))
    made = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return made, hashes[np.arange(made[-1]) + np.repeat(begins - made[:-1], counts)]


def in_blocks(plan: Schedule, block_tokens: int) -> Schedule:
    """Return a schedule whose prefix blocks are at least so long, where its own make such: the last of several stands for them."""
    size = plan.prefix_block_tokens
    if plan.prefix_offsets is None or plan.prefix_hashes is None or not size or size >= block_tokens or block_tokens % size:
        return plan
    times = block_tokens // size
    counts = np.diff(plan.prefix_offsets) // times
    made = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    within = np.arange(made[-1]) - np.repeat(made[:-1], counts)
    at = np.repeat(plan.prefix_offsets[:-1], counts) + (within + 1) * times - 1
    return dataclasses.replace(plan, prefix_offsets=made, prefix_hashes=plan.prefix_hashes[at], prefix_block_tokens=block_tokens)


def _endless(plan: Schedule, offsets: Ints, hashes: Ints) -> float:
    """Return the prompt tokens that a cache which forgets nothing has seen: leading blocks that an earlier request had."""
    row = np.repeat(np.arange(len(plan)), np.diff(offsets))
    _, first, which = np.unique(hashes, return_index=True, return_inverse=True)
    missed = np.append(0, np.cumsum(row[first][which] >= row))
    leading = missed[1:] == np.repeat(missed[offsets[:-1]], np.diff(offsets))
    found = np.bincount(row[leading], minlength=len(plan))
    return float(np.minimum(found * plan.prefix_block_tokens, plan.prompt_tokens).sum())
