"""The KV cache: one pool of equal blocks for all sequences, preallocated.  Who holds which block is `batching`'s business.

Kept in fp32, bf16, int8 or fp8 (e4m3); the last two with an fp32 scale for each token and head, of its key and of its value.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mlsys_bench import errors
from mlsys_bench.engine import formats
from mlsys_bench.errors import BadInput
from mlsys_bench.models import Architecture

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: formats.FP8_MAX}  # of the types that need a scale
_SCALE_BYTES = 4
_LARGE_PAGE = 1 << 21


def kind_of(name: str, precision: str) -> torch.dtype:
    """Return the type that a name of `--kv` means; `auto` is fp32 for fp32, else bf16.  Raises UnknownName."""
    if name == "auto":
        return formats.precision(precision).activations
    if name not in KINDS:
        raise errors.unknown("KV cache type", name, ("auto", *KINDS))
    return KINDS[name]


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a type of cache."""
    return next(name for name, kind in KINDS.items() if kind == dtype)


def token_bytes(shape: Architecture, dtype: torch.dtype) -> int:
    """Return what one token takes in all layers, its scales included."""
    return shape.layers * 2 * shape.kv_heads * (shape.head_dim * dtype.itemsize + (_SCALE_BYTES if dtype in _LARGEST else 0))


class Blocks:
    """The memory of a cache and the moving of whole blocks, however a block is laid out inside."""

    __slots__ = ("block_tokens", "device", "dtype", "head_dim", "kv_heads", "raw")

    def __init__(self, shape: Architecture, *, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate.  dtype: of the cached values, one of `KINDS`."""
        if dtype in _LARGEST and shape.head_dim % 2:
            raise BadInput(f"{shape.id}: heads of {shape.head_dim} dimensions have no {name_of(dtype)} cache; use --kv bf16")
        self.block_tokens, self.kv_heads, self.head_dim, self.dtype, self.device = (
            block_tokens, shape.kv_heads, shape.head_dim, dtype, device,
        )  # fmt: skip
        # zeros, not empty: torch lets a masked slot go through its products, and NaN * 0 is NaN
        block_bytes = block_tokens * token_bytes(shape, dtype) // shape.layers
        self.raw = _zeros((shape.layers, blocks, block_bytes), device)

    @property
    def allocated_bytes(self) -> int:
        """Return the bytes of the pool."""
        return self.raw.numel()

    def copy_out(self, blocks: Sequence[int]) -> tuple[Tensor, ...]:
        """Return a copy of these blocks in host memory."""
        return (self.raw.index_select(1, self._index(blocks)).cpu(),)

    def copy_in(self, blocks: Sequence[int], saved: tuple[Tensor, ...]) -> None:
        """Write what `copy_out` gave to these blocks."""
        self.raw.index_copy_(1, self._index(blocks), saved[0].to(self.device))

    def copy(self, blocks: Sequence[int], to: Sequence[int]) -> None:
        """Copy blocks to others."""
        self.raw.index_copy_(1, self._index(to), self.raw.index_select(1, self._index(blocks)))

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.device)


def _zeros(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Return bytes of 0, on a CPU on large pages where the system has them: blocks lie anywhere, and each would miss the TLB."""
    size = math.prod(sizes)
    if device.type != "cpu" or size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(sizes, dtype=torch.uint8, device=device)
    memory = mmap.mmap(-1, size + _LARGE_PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    first = -raw.data_ptr() % _LARGE_PAGE
    return raw[first : first + size].zero_().view(sizes)


class Room(NamedTuple):
    """Where the KV of some sequences is copied to, to lie in one piece."""

    blocks: Tensor  # [sequences * n], each one's blocks in order
    copy: Tensor
    k: Tensor  # [sequences, kv_heads, keys, head_dim], a view of the copy
    v: Tensor


class KVCache(Blocks):
    """Keys and values of all layers as torch reads them.  A token's slot is block * block_tokens + its place in the block.

    K and V of a token lie side by side, so that one copy writes both and one gather reads both; the scales of a block come after them.
    """

    __slots__ = ("_blocks", "_scratch", "_slots", "compute", "data", "scale")

    def __init__(
        self,
        shape: Architecture,
        *,
        blocks: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        compute: torch.dtype | None = None,
    ) -> None:
        """Allocate.  compute: the type in which attention reads, by default that of the cache, bf16 where it has scales."""
        super().__init__(shape, blocks=blocks, block_tokens=block_tokens, dtype=dtype, device=device)
        has_scale = dtype in _LARGEST
        self.compute = compute or (torch.bfloat16 if has_scale else dtype)
        sizes, values = (block_tokens, 2, shape.kv_heads, shape.head_dim), math.prod((block_tokens, 2, shape.kv_heads, shape.head_dim))
        self.data = self.raw[..., : values * dtype.itemsize].view(dtype).view(shape.layers, blocks, *sizes)  # [layers, blocks, *sizes]
        self.scale = self.raw[..., values:].view(torch.float32).view(shape.layers, blocks, *sizes[:3]) if has_scale else None
        width = 2 * shape.kv_heads * shape.head_dim
        self._slots = () if has_scale else tuple(layer.view(-1, width) for layer in self.data)
        self._blocks = () if self._is_converted else tuple(layer.view(blocks, -1) for layer in self.data)
        self._scratch = torch.empty(0, values, dtype=self.compute, device=device)

    @property
    def _is_converted(self) -> bool:
        return self.dtype != self.compute

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store tokens.  slots: [T]; kv: [T, 2 kv_heads head_dim], keys first."""
        if self.scale is None:
            self._slots[layer].index_copy_(0, slots, kv.to(self.dtype))
            return
        at = (slots // self.block_tokens, slots % self.block_tokens)
        values = kv.float().view(-1, 2, self.kv_heads, self.head_dim)
        scale = values.abs().amax(dim=-1).div_(_LARGEST[self.dtype])
        scaled = values / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        codes = (scaled.round() if self.dtype == torch.int8 else scaled).to(self.dtype)
        self.data.view(torch.uint8)[layer].index_put_(at, codes.view(torch.uint8))
        self.scale[layer].index_put_(at, scale)

    def room(self, sequences: int, blocks: Tensor, keys: int) -> Room:
        """Return a place to gather sequences with equally many blocks each.  blocks: [sequences * n].

        All rooms are one memory, kept from step to step (fresh pages cost more than the copy): read one before filling the next.
        """
        if len(self._scratch) < len(blocks):
            self._scratch = self._scratch.new_empty(2 * len(blocks), self._scratch.shape[1])
        copy = self._scratch[: len(blocks)]
        k, v = copy.view(sequences, -1, 2, self.kv_heads, self.head_dim)[:, :keys].permute(2, 0, 3, 1, 4)
        return Room(blocks, copy, k, v)

    def gather(self, layer: int, room: Room) -> None:
        """Copy a layer's keys and values to the room, to be read through its k and v."""
        if not self._is_converted:
            torch.index_select(self._blocks[layer], 0, room.blocks, out=room.copy)
            return
        values = self.data[layer].view(torch.uint8 if self.dtype.itemsize == 1 else self.dtype)[room.blocks].view(self.dtype).float()
        if self.scale is not None:
            values *= self.scale[layer][room.blocks][..., None]
        room.copy.copy_(values.flatten(1))
