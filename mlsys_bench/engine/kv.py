"""The KV cache: one pool of equal blocks for all sequences, preallocated.  Who holds which block is `batching`'s business."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mlsys_bench.models import Architecture


class Room(NamedTuple):
    """Where the KV of some sequences is copied to, to lie in one piece."""

    blocks: Tensor  # [sequences * n], each one's blocks in order
    copy: Tensor
    k: Tensor  # [sequences, kv_heads, keys, head_dim], a view of the copy
    v: Tensor


class KVCache:
    """Keys and values of all layers.  A token's slot is block * block_tokens + its place in the block.

    K and V of a token lie side by side, so that one copy writes both and one gather reads both.
    """

    __slots__ = ("_blocks", "_scratch", "_slots", "block_tokens", "data", "head_dim", "kv_heads")

    def __init__(self, shape: Architecture, *, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_tokens, self.kv_heads, self.head_dim = block_tokens, shape.kv_heads, shape.head_dim
        # zeros, not empty: a masked slot still goes through the products, and NaN * 0 is NaN
        self.data = torch.zeros(shape.layers, blocks, block_tokens, 2, shape.kv_heads, shape.head_dim, dtype=dtype, device=device)
        width = 2 * shape.kv_heads * shape.head_dim
        self._slots = tuple(layer.view(-1, width) for layer in self.data)
        self._blocks = tuple(layer.view(blocks, -1) for layer in self.data)
        self._scratch = self.data.new_empty(0, block_tokens * width)

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes of the pool."""
        return self.data.numel() * self.data.element_size()

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store tokens.  slots: [T]; kv: [T, 2 kv_heads head_dim], keys first."""
        self._slots[layer].index_copy_(0, slots, kv)

    def room(self, sequences: int, blocks: Tensor, keys: int) -> Room:
        """Return a place to gather sequences with equally many blocks each.  blocks: [sequences * n].

        All rooms are one memory, kept from step to step (fresh pages cost more than the copy): read one before filling the next.
        """
        if len(self._scratch) < len(blocks):
            self._scratch = self.data.new_empty(2 * len(blocks), self._blocks[0].shape[1])
        copy = self._scratch[: len(blocks)]
        k, v = copy.view(sequences, -1, 2, self.kv_heads, self.head_dim)[:, :keys].permute(2, 0, 3, 1, 4)
        return Room(blocks, copy, k, v)

    def gather(self, layer: int, room: Room) -> None:
        """Copy a layer's keys and values to the room, to be read through its k and v."""
        torch.index_select(self._blocks[layer], 0, room.blocks, out=room.copy)
