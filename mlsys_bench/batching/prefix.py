"""Prefix blocks that requests share, by the hash of all tokens up to their end: loops over integer arrays.

A block whose tokens are computed, or will be in the step being planned, is published under its hash.  Those who come later and begin with
the same hashes hold on to it instead of computing it.  What nobody holds on to stays, idle, until its room is needed: longest unused first,
of one request the end before the beginning.  Then it moves to host memory, if there is such a tier, and from there back at a price.
Idle blocks count as blocks to be had, as in vLLM (`vllm/v1/core/kv_cache_manager.py`), whose one queue of free blocks holds those without a
hash as well: there a cached block may go while a plain one is free.

A block may be found in the very step that computes it: a model writes K and V of all tokens of a step before any of them attends.  Where
there are physical blocks, a prefix block has one of them, its HOME, and those that count as to be had but are idle are not on the stack.
"""

from __future__ import annotations

from mlsys_bench.batching.arrays import (
    ASKED_TOKENS,
    BLOCK,
    BLOCKS,
    CACHED,
    COMPUTED,
    HASH_AT,
    HASH_END,
    HELD,
    HIT_TOKENS,
    HOME,
    HOST,
    HOST_FIRST,
    HOST_LAST,
    IDLE,
    IDLE_FIRST,
    IDLE_LAST,
    KNOWN,
    MOVED,
    NEWER,
    NOWHERE,
    OLDER,
    ON_DEVICE,
    ON_HOST,
    OWNED,
    PLACE,
    PREFIX_BLOCKS,
    PREFIX_TOKENS,
    USERS,
    Arrays,
    Policy,
)
from mlsys_bench.batching.lists import append, remove


def lookup(a: Arrays, row: int) -> tuple[int, int, int]:
    """Return how many prefix blocks at the beginning of a row are cached, and of their KV blocks those on the device and those idle.

    At least one token is left to compute, since there is nothing to sample from otherwise.
    """
    first = a.rows[HASH_AT][row]
    most = min(a.rows[HASH_END][row] - first, (a.rows[KNOWN][row] - 1) // a.counts[PREFIX_TOKENS])
    hits = on_device = idle = 0
    while hits < most:
        block = a.hashes[BLOCK][first + hits]
        if a.prefixes[PLACE][block] == NOWHERE:
            break
        hits += 1
        if a.prefixes[PLACE][block] == ON_DEVICE:
            on_device += 1
            idle += a.prefixes[USERS][block] == 0
    width = a.counts[PREFIX_BLOCKS]
    return hits, on_device * width, idle * width


def adopt(a: Arrays, row: int, start: int) -> None:
    """Let a row that is being seated hold on to the blocks it found; those on the host move to the device."""
    counts, first = a.counts, a.rows[HASH_AT][row]
    width, moved = counts[PREFIX_BLOCKS], 0
    if a.rows[COMPUTED][row] > 0:  # its cache came along
        a.rows[CACHED][row] = 0
        return
    counts[ASKED_TOKENS] += a.rows[KNOWN][row]
    counts[HIT_TOKENS] += start
    found = start // counts[PREFIX_TOKENS]
    for i in range(found):
        block = a.hashes[BLOCK][first + i]
        if a.prefixes[PLACE][block] == ON_HOST:
            remove(counts, a.prefixes[OLDER], a.prefixes[NEWER], HOST_FIRST, HOST_LAST, block)
            counts[HOST] -= 1
            a.prefixes[PLACE][block] = ON_DEVICE
            moved += width
        elif a.prefixes[USERS][block] == 0:
            remove(counts, a.prefixes[OLDER], a.prefixes[NEWER], IDLE_FIRST, IDLE_LAST, block)
            counts[IDLE] -= width
            counts[BLOCKS] -= width
        a.prefixes[USERS][block] += 1
        a.hashes[OWNED][first + i] = 1
        if len(a.free_blocks) > 0:
            a.block_table[row, i] = a.prefixes[HOME][block]
    a.rows[CACHED][row] = found
    a.rows[HELD][row] = found * width - moved  # the rest is taken with the blocks of the step
    counts[MOVED] += moved


def publish(a: Arrays, row: int, tokens: int) -> None:
    """Put the blocks of a row's first `tokens` tokens under their hashes, unless somebody else's are there."""
    counts, first = a.counts, a.rows[HASH_AT][row]
    full = min(tokens // counts[PREFIX_TOKENS], a.rows[HASH_END][row] - first)
    i = a.rows[CACHED][row]
    while i < full:
        block = a.hashes[BLOCK][first + i]
        if a.prefixes[PLACE][block] != ON_DEVICE:
            if a.prefixes[PLACE][block] == ON_HOST:
                remove(counts, a.prefixes[OLDER], a.prefixes[NEWER], HOST_FIRST, HOST_LAST, block)
                counts[HOST] -= 1
            a.prefixes[PLACE][block] = ON_DEVICE
            a.prefixes[USERS][block] = 1
            a.hashes[OWNED][first + i] = 1
            if len(a.free_blocks) > 0:
                a.prefixes[HOME][block] = a.block_table[row, i]
        i += 1
    if full > a.rows[CACHED][row]:
        a.rows[CACHED][row] = full


def owns(a: Arrays, row: int, i: int) -> bool:
    """Say whether the i-th block of a row is one that it holds on to as a prefix block, and not its own alone."""
    return bool(i < a.rows[CACHED][row] and a.hashes[OWNED][a.rows[HASH_AT][row] + i] == 1)


def let_go(a: Arrays, row: int) -> int:
    """Let a row let go of its prefix blocks; return how many of its KV blocks are still cached.  Those nobody uses now are to be had."""
    counts, first = a.counts, a.rows[HASH_AT][row]
    width, kept = counts[PREFIX_BLOCKS], 0
    i = a.rows[CACHED][row]
    while i > 0:
        i -= 1
        if a.hashes[OWNED][first + i]:
            a.hashes[OWNED][first + i] = 0
            kept += width
            block = a.hashes[BLOCK][first + i]
            a.prefixes[USERS][block] -= 1
            if a.prefixes[USERS][block] == 0:
                append(counts, a.prefixes[OLDER], a.prefixes[NEWER], IDLE_FIRST, IDLE_LAST, block)
                counts[IDLE] += width
                counts[BLOCKS] += width
    a.rows[CACHED][row] = 0
    return kept


def forget_oldest(a: Arrays, leaving: int) -> int:
    """Forget the block that nobody has used for longest, and return it."""
    counts = a.counts
    block = counts[IDLE_FIRST]
    if len(a.free_blocks) > 0:
        a.free_blocks[counts[BLOCKS] + leaving - counts[IDLE]] = a.prefixes[HOME][block]
    remove(counts, a.prefixes[OLDER], a.prefixes[NEWER], IDLE_FIRST, IDLE_LAST, block)
    counts[IDLE] -= counts[PREFIX_BLOCKS]
    a.prefixes[PLACE][block] = NOWHERE
    return int(block)


def evict(a: Arrays, policy: Policy, leaving: int = 0) -> None:
    """Forget idle blocks, or move them to the host, until those left fit among the blocks to be had.

    Of the physical blocks that are free, `leaving` are no longer counted though they lie on the stack still.
    """
    counts = a.counts
    while counts[IDLE] > counts[BLOCKS]:
        block = forget_oldest(a, leaving)
        if policy.host_blocks >= counts[PREFIX_BLOCKS]:
            append(counts, a.prefixes[OLDER], a.prefixes[NEWER], HOST_FIRST, HOST_LAST, block)
            a.prefixes[PLACE][block] = ON_HOST
            counts[HOST] += 1
            if counts[HOST] * counts[PREFIX_BLOCKS] > policy.host_blocks:
                block = counts[HOST_FIRST]
                remove(counts, a.prefixes[OLDER], a.prefixes[NEWER], HOST_FIRST, HOST_LAST, block)
                counts[HOST] -= 1
                a.prefixes[PLACE][block] = NOWHERE
