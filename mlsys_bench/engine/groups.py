"""A step as torch attends to it: single tokens in groups of about equal length, each padded, and every chunk alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsys_bench.engine.kv import KVCache, Room
from mlsys_bench.engine.runner import Ints, Step

# attention of one more group costs about as much as reading so many bytes of K and V: measured on a CPU, assumed for GPUs (three launches)
_GROUP_BYTES = {"cpu": 128 * 2**10, "cuda": 32 * 2**20}


@dataclass(frozen=True, slots=True, kw_only=True)
class Singles:
    """Sequences of about equal length that compute one token each, from `first` on in the step."""

    first: int
    count: int
    room: Room  # as long as the longest
    mask: Tensor | None  # [count, 1, 1, keys] 0, or -inf beyond a sequence's end; None where all are equally long


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A sequence that computes several tokens, from `first` on in the step."""

    first: int
    tokens: int
    room: Room  # for past and chunk
    mask: Tensor | None  # [tokens, past + tokens]; None where there is no past


@dataclass(frozen=True, slots=True, kw_only=True)
class Grouped:
    """The tensors of a step of T tokens on the device of its cache, all int64."""

    tokens: Tensor  # [T]
    positions: Tensor  # [T]
    slots: Tensor  # [T]
    singles: tuple[Singles, ...]
    chunks: tuple[Chunk, ...]
    sampled: Tensor | None  # None for all


def grouped(step: Step, cache: KVCache, *, window: int = 0) -> Grouped:
    """Return the tensors of a step whose tokens see the last `window` tokens, themselves included; 0 is all."""
    first, table = step.first, step.block_table
    counts = np.diff(first)
    singles, total = int(np.count_nonzero(counts == 1)), len(step.tokens)
    assert (counts[:singles] == 1).all(), "single tokens come first in a step"
    ids, at, slots = torch.from_numpy(np.stack((step.tokens, step.positions, step.slots)).astype(np.int64)).to(cache.device)
    is_all = len(step.sampled) == total and (np.diff(step.sampled) == 1).all()
    chunks = (
        _chunk(table[s], int(first[s]), int(counts[s]), int(step.positions[first[s]]), cache, window) for s in range(singles, len(counts))
    )  # fmt: skip
    return Grouped(
        tokens=ids,
        positions=at,
        slots=slots,
        singles=tuple(_singles(table, step.positions[:singles] + 1, cache, window)) if singles else (),
        chunks=tuple(chunks),
        sampled=None if is_all else torch.from_numpy(step.sampled.astype(np.int64)).to(cache.device),
    )


def _singles(block_table: Ints, keys: Ints, cache: KVCache, window: int) -> Iterator[Singles]:
    """Yield neighbours that attend together, padded to the longest of them."""
    first = 0
    for end in group_ends(keys, _worth(cache)):
        count, longest, skip = end - first, int(keys[end - 1]), _unseen_blocks(int(keys[first]), window, cache)
        blocks = block_table[first:end, skip : -(-longest // cache.block_tokens)]
        hidden = _hidden(skip * cache.block_tokens, longest, keys[first:end] - 1, window)
        mask = None if hidden is None else _mask(hidden, cache)[:, None, None]
        room = cache.room(count, _indices(blocks, cache), longest - skip * cache.block_tokens)
        yield Singles(first=first, count=count, room=room, mask=mask)
        first = end


def _unseen_blocks(keys: int, window: int, cache: KVCache) -> int:
    """Return how many whole blocks lie before the window of the last of so many keys."""
    return max(0, keys - window) // cache.block_tokens if window else 0


def _hidden(begin: int, end: int, positions: Ints, window: int) -> npt.NDArray[np.bool_] | None:
    """Return which keys begin .. end - 1 a token at each position does not see: [positions, keys].  None where all see all."""
    keys = np.arange(begin, end)
    hidden = keys > positions[:, None]
    if window:
        hidden |= keys <= positions[:, None] - window
    return hidden if hidden.any() else None


def _worth(cache: KVCache) -> float:
    """Return the keys of padding that cost as much as one more group."""
    bytes_per_key = 2 * cache.kv_heads * cache.head_dim * cache.data.element_size()
    return _GROUP_BYTES.get(cache.device.type, _GROUP_BYTES["cpu"]) / bytes_per_key


def group_ends(keys: Ints, worth: float) -> list[int]:
    """Return where groups end.  keys: ascending.  A group is cut where that saves most padding, while it saves more than `worth` keys."""
    saved = np.arange(1, len(keys)) * (keys[-1] - keys[:-1])
    if not len(saved) or saved.max() <= worth:
        return [len(keys)]
    cut = int(saved.argmax()) + 1
    return [*group_ends(keys[:cut], worth), *(cut + end for end in group_ends(keys[cut:], worth))]


def _chunk(table: Ints, first: int, tokens: int, past: int, cache: KVCache, window: int) -> Chunk:
    keys, skip = past + tokens, _unseen_blocks(past + 1, window, cache)
    blocks, begin = _indices(table[skip : -(-keys // cache.block_tokens)], cache), skip * cache.block_tokens
    is_triangle = past == 0 and not 0 < window < keys  # the attention knows it itself
    hidden = None if is_triangle else _hidden(begin, keys, np.arange(past, keys), window)
    mask = None if hidden is None else _mask(hidden, cache)
    return Chunk(first=first, tokens=tokens, room=cache.room(1, blocks, keys - begin), mask=mask)


def _indices(blocks: Ints, cache: KVCache) -> Tensor:
    return torch.from_numpy(blocks.reshape(-1).astype(np.int64)).to(cache.device)


def _mask(hidden: npt.NDArray[np.bool_], cache: KVCache) -> Tensor:
    """Return 0 where visible, -inf where hidden, in the type that attention reads the cache in, as it wants to add it."""
    return torch.zeros(hidden.shape, dtype=cache.compute).masked_fill_(torch.from_numpy(hidden), -torch.inf).to(cache.device)
