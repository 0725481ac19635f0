"""Turn a plan of `batching` into the tensors of one step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsys_bench.batching import StepPlan
from mlsys_bench.engine.kv import KVCache
from mlsys_bench.engine.model import Chunk, Singles, StepInput

Ints = npt.NDArray[np.signedinteger]
# attention of one more group costs about as much as reading so many bytes of K and V: measured on a CPU, assumed for GPUs (three launches)
_GROUP_BYTES = {"cpu": 128 * 2**10, "cuda": 32 * 2**20}


def order_of(plan: StepPlan) -> StepPlan:
    """Return the plan with its rows in the order of the step: those with one token first, the shorter the earlier; others as planned."""
    is_single = plan.tokens == 1
    order = np.lexsort((np.where(is_single, plan.start, 0), ~is_single))
    return plan._replace(rows=plan.rows[order], start=plan.start[order], tokens=plan.tokens[order], samples=plan.samples[order])


def step_input(plan: StepPlan, known: Mapping[int, Sequence[int]], block_table: Ints, cache: KVCache) -> StepInput:
    """Return the tensors of a plan that is in the order of `order_of`; its logits come in that order too.

    known: by row, the tokens given and generated so far.
    """
    rows, start, tokens, samples, _ = plan
    device, block_tokens = cache.data.device, cache.block_tokens
    singles, total = int(np.count_nonzero(tokens == 1)), int(tokens.sum())
    ends = tokens.cumsum()
    is_all_singles = singles == total
    row_of = rows if is_all_singles else rows.repeat(tokens)
    positions = start if is_all_singles else np.arange(total) - (ends - tokens - start).repeat(tokens)
    laid = np.empty((3, total), dtype=np.int64)
    work = zip(rows.tolist(), start.tolist(), tokens.tolist(), strict=True)
    laid[0] = [token for row, first, count in work for token in known[row][first : first + count]]
    laid[1] = positions
    laid[2] = block_table[row_of, positions // block_tokens] * block_tokens + positions % block_tokens
    ids, at, slots = torch.from_numpy(laid).to(device)
    return StepInput(
        tokens=ids,
        positions=at,
        slots=slots,
        singles=tuple(_singles(block_table, rows[:singles], start[:singles] + 1, cache)) if singles else (),
        chunks=tuple(
            _chunk(block_table[rows[i]], int(ends[i] - tokens[i]), int(tokens[i]), int(start[i]), cache) for i in range(singles, len(rows))
        ),
        sampled=None if is_all_singles and samples.all() else torch.from_numpy(ends[samples] - 1).to(device),
    )


def _singles(block_table: Ints, rows: Ints, keys: Ints, cache: KVCache) -> Iterator[Singles]:
    """Yield neighbours that attend together, padded to the longest of them."""
    first = 0
    for end in group_ends(keys, _worth(cache)):
        longest = int(keys[end - 1])
        blocks = block_table[rows[first:end], : -(-longest // cache.block_tokens)]
        hidden = np.arange(longest) >= keys[first:end, None] if keys[first] < longest else None
        mask = None if hidden is None else _mask(hidden, cache)[:, None, None]
        yield Singles(first=first, count=end - first, room=cache.room(end - first, _indices(blocks, cache), longest), mask=mask)
        first = end


def _worth(cache: KVCache) -> float:
    """Return the keys of padding that cost as much as one more group."""
    bytes_per_key = 2 * cache.kv_heads * cache.head_dim * cache.data.element_size()
    return _GROUP_BYTES.get(cache.data.device.type, _GROUP_BYTES["cpu"]) / bytes_per_key


def group_ends(keys: Ints, worth: float) -> list[int]:
    """Return where groups end.  keys: ascending.  A group is cut where that saves most padding, while it saves more than `worth` keys."""
    saved = np.arange(1, len(keys)) * (keys[-1] - keys[:-1])
    if not len(saved) or saved.max() <= worth:
        return [len(keys)]
    cut = int(saved.argmax()) + 1
    return [*group_ends(keys[:cut], worth), *(cut + end for end in group_ends(keys[cut:], worth))]


def _chunk(table: Ints, first: int, tokens: int, past: int, cache: KVCache) -> Chunk:
    keys = past + tokens
    blocks = _indices(table[: -(-keys // cache.block_tokens)], cache)
    hidden = np.arange(keys) > np.arange(past, keys)[:, None]
    mask = _mask(hidden, cache) if past else None  # without a past the attention knows the triangle itself
    return Chunk(first=first, tokens=tokens, room=cache.room(1, blocks, keys), mask=mask)


def _indices(blocks: Ints, cache: KVCache) -> Tensor:
    return torch.from_numpy(blocks.reshape(-1).astype(np.int64)).to(cache.data.device)


def _mask(hidden: npt.NDArray[np.bool_], cache: KVCache) -> Tensor:
    """Return 0 where visible, -inf where hidden, in the type of the cache, as attention wants to add it."""
    return torch.zeros(hidden.shape, dtype=cache.data.dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf).to(cache.data.device)
