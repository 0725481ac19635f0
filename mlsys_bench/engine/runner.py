"""Turn a plan of `batching` into the work of one step: plain integer arrays that every model reads, whatever it computes with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench.batching import StepPlan
from mlsys_bench.engine.kv import Blocks

Ints = npt.NDArray[np.signedinteger]
Int32 = npt.NDArray[np.int32]


class Step(NamedTuple):
    """The tokens of one step, T of S sequences, laid end to end, each array contiguous.  Those that compute one token come first."""

    tokens: Int32  # [T]
    positions: Int32  # [T] each in its own sequence, from 0
    slots: Int32  # [T] where their K and V go: block * block_tokens + place in the block
    sequence_of: Int32  # [T] in 0 .. S-1
    first: Int32  # [S + 1] sequence s computes the tokens first[s] .. first[s + 1] - 1
    block_table: Int32  # [S, width] the blocks of each in order of position; beyond those of its last position meaningless
    sampled: Int32  # [S'] the places in T whose logits are wanted


def order_of(plan: StepPlan) -> StepPlan:
    """Return the plan with its rows in the order of the step: those with one token first, the shorter the earlier; others as planned."""
    if len(plan.rows) < 2:
        return plan
    is_single = plan.tokens == 1
    order = np.lexsort((np.where(is_single, plan.start, 0), ~is_single))
    return plan._replace(rows=plan.rows[order], start=plan.start[order], tokens=plan.tokens[order], samples=plan.samples[order])


def step_input(plan: StepPlan, known: Mapping[int, Sequence[int]], block_table: Ints, cache: Blocks, wanted: Ints | None = None) -> Step:
    """Return the step of a plan that is in the order of `order_of`; its logits come row by row in that order, each row's by position.

    known: by row, the tokens given, generated and drafted so far; wanted: [rows] of how many of its last tokens each row's logits are
    wanted, by default of 1 where it samples.
    """
    if len(plan.rows) == 1 and plan.tokens[0] == 1 and wanted is None:
        return _lone(plan, known, block_table, cache.block_tokens)
    rows, start, tokens, block_tokens = plan.rows, plan.start, plan.tokens, cache.block_tokens
    first = np.zeros(len(rows) + 1, dtype=np.int32)
    tokens.cumsum(out=first[1:])
    laid = np.empty((4, int(first[-1])), dtype=np.int32)
    ids, positions, slots, sequence_of = laid
    work = zip(rows.tolist(), start.tolist(), tokens.tolist(), strict=True)
    ids[:] = [token for row, begin, length in work for token in known[row][begin : begin + length]]
    if len(ids) == len(rows):
        sequence_of[:], positions[:] = np.arange(len(rows)), start
    else:
        sequence_of[:] = np.arange(len(rows)).repeat(tokens)
        positions[:] = np.arange(len(ids)) + (start - first[:-1])[sequence_of]
    blocks, places = np.divmod(positions, block_tokens)
    table = block_table[rows, : int(np.maximum.reduce(blocks, initial=-1)) + 1]
    slots[:] = table[sequence_of, blocks] * block_tokens + places
    sampled = first[1:][plan.samples] - 1 if wanted is None else _last(first, wanted)
    return Step(ids, positions, slots, sequence_of, first, np.ascontiguousarray(table, dtype=np.int32), sampled)


def _lone(plan: StepPlan, known: Mapping[int, Sequence[int]], block_table: Ints, block_tokens: int) -> Step:
    """Return the step of one token: the same arrays with a tenth of the calls, which cost 80 us where caches are cold."""
    row, position = int(plan.rows[0]), int(plan.start[0])
    block, place = divmod(position, block_tokens)
    table = block_table[row : row + 1, : block + 1].astype(np.int32)
    token, at, slot, of = np.array([[known[row][position]], [position], [int(table[0, block]) * block_tokens + place], [0]], dtype=np.int32)
    return Step(token, at, slot, of, np.array([0, 1], dtype=np.int32), table, np.zeros(int(plan.samples[0]), dtype=np.int32))


def _last(first: Int32, wanted: Ints) -> Int32:
    """Return the places of the last `wanted` tokens of each sequence."""
    ends = wanted.cumsum()
    places: Int32 = (np.arange(int(wanted.sum())) + (first[1:] - ends).repeat(wanted)).astype(np.int32)
    return places
