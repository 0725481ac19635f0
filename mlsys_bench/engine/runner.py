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
    """The tokens of one step, T of S sequences, laid end to end.  Those that compute one token come first.

    All its integers are one array, as `native/csrc/step.h` reads it: what C reads is not laid twice, nor an address asked for twice.
    """

    laid: Int32  # the counts below, then the parts in the order of these properties
    rows: int  # T
    sequences: int  # S
    wanted: int  # S'
    width: int

    @property
    def tokens(self) -> Int32:
        """Return the tokens, [T]."""
        return self._part(0, self.rows)

    @property
    def positions(self) -> Int32:
        """Return where each stands in its own sequence, from 0, [T]."""
        return self._part(self.rows, self.rows)

    @property
    def slots(self) -> Int32:
        """Return where their K and V go, [T]: block * block_tokens + place in the block."""
        return self._part(2 * self.rows, self.rows)

    @property
    def sequence_of(self) -> Int32:
        """Return whose each is, [T] in 0 .. S-1."""
        return self._part(3 * self.rows, self.rows)

    @property
    def first(self) -> Int32:
        """Return where sequences begin, [S + 1]: sequence s computes the tokens first[s] .. first[s + 1] - 1."""
        return self._part(4 * self.rows, self.sequences + 1)

    @property
    def block_table(self) -> Int32:
        """Return the blocks of each in order of position, [S, width]; beyond those of its last position meaningless."""
        return self._part(4 * self.rows + self.sequences + 1, self.sequences * self.width).reshape(self.sequences, self.width)

    @property
    def sampled(self) -> Int32:
        """Return the places in T whose logits are wanted, [S']."""
        return self.laid[len(self.laid) - self.wanted :]

    def _part(self, start: int, length: int) -> Int32:
        return self.laid[_COUNTS + start : _COUNTS + start + length]

    @staticmethod
    def empty(rows: int, sequences: int, wanted: int, width: int) -> Step:
        """Return a step of that size, whose parts are to be filled."""
        laid = np.empty(_COUNTS + 4 * rows + sequences + 1 + sequences * width + wanted, dtype=np.int32)
        laid[:_COUNTS] = rows, sequences, wanted, width
        return Step(laid, rows, sequences, wanted, width)

    @staticmethod
    def of(*, tokens: Ints, positions: Ints, slots: Ints, sequence_of: Ints, first: Ints, block_table: Ints, sampled: Ints) -> Step:
        """Return the step of these parts."""
        step = Step.empty(len(tokens), len(first) - 1, len(sampled), block_table.shape[1])
        step.tokens[:], step.positions[:], step.slots[:], step.sequence_of[:] = tokens, positions, slots, sequence_of
        step.first[:], step.block_table[:], step.sampled[:] = first, block_table, sampled
        return step


_COUNTS = 4
_LONE = _COUNTS + 6  # where the blocks of a lone token begin


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
    ends = tokens.cumsum()
    width = int(np.maximum.reduce((start + tokens - 1) // block_tokens, initial=-1)) + 1
    asked = int((plan.samples if wanted is None else wanted).sum())
    step = Step.empty(int(ends[-1]) if len(ends) else 0, len(rows), asked, width)
    first, ids, positions, sequence_of = step.first, step.tokens, step.positions, step.sequence_of
    first[0], first[1:] = 0, ends
    work = zip(rows.tolist(), start.tolist(), tokens.tolist(), strict=True)
    ids[:] = [token for row, begin, length in work for token in known[row][begin : begin + length]]
    if len(ids) == len(rows):
        sequence_of[:], positions[:] = np.arange(len(rows)), start
    else:
        sequence_of[:] = np.arange(len(rows)).repeat(tokens)
        positions[:] = np.arange(len(ids)) + (start - first[:-1])[sequence_of]
    blocks, places = np.divmod(positions, block_tokens)
    table = step.block_table
    table[:] = block_table[rows, :width]
    step.slots[:] = table[sequence_of, blocks] * block_tokens + places
    step.sampled[:] = first[1:][plan.samples] - 1 if wanted is None else _last(first, wanted)
    return step


def _lone(plan: StepPlan, known: Mapping[int, Sequence[int]], block_table: Ints, block_tokens: int) -> Step:
    """Return the step of one token: the same integers with a tenth of the calls, which cost 80 us where caches are cold."""
    row, position, wanted = int(plan.rows[0]), int(plan.start[0]), int(plan.samples[0])
    block, place = divmod(position, block_tokens)
    table = block_table[row, : block + 1]
    step = Step(np.empty(_LONE + len(table) + wanted, dtype=np.int32), 1, 1, wanted, len(table))
    slot = int(table[block]) * block_tokens + place
    step.laid[:_LONE] = 1, 1, wanted, len(table), known[row][position], position, slot, 0, 0, 1
    step.laid[_LONE : _LONE + len(table)] = table
    step.laid[_LONE + len(table) :] = 0
    return step


def _last(first: Int32, wanted: Ints) -> Int32:
    """Return the places of the last `wanted` tokens of each sequence."""
    ends = wanted.cumsum()
    places: Int32 = (np.arange(int(wanted.sum())) + (first[1:] - ends).repeat(wanted)).astype(np.int32)
    return places
