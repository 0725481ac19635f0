"""The cache as GPU kernels read it: in a block, all keys of a head lie in one piece, then all its values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlsys_bench.engine.kv import Blocks, token_bytes
from mlsys_bench.models import Architecture

SCALED = {torch.int8: 127, torch.float8_e4m3fn: 448}  # types of cache that have a scale per token and head, and their largest number


class GpuKV(Blocks):
    """Keys and values of all layers.  data: [layers, blocks, kv_heads, 2, block_tokens, head_dim]; scale: without the last, fp32."""

    __slots__ = ("block_stride", "data", "scale", "scale_stride", "top")

    def __init__(self, shape: Architecture, *, blocks: int, block_tokens: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate.  dtype: of the cached values."""
        super().__init__(shape, blocks=blocks, block_tokens=block_tokens, dtype=dtype, device=device)
        block_bytes = block_tokens * token_bytes(shape, dtype) // shape.layers
        sizes = (shape.kv_heads, 2, block_tokens)
        values = math.prod(sizes) * shape.head_dim
        self.data: Tensor = self.raw[..., : values * dtype.itemsize].view(dtype).view(shape.layers, blocks, *sizes, shape.head_dim)
        self.top = SCALED.get(dtype, 0)
        self.scale: Tensor | None = self.raw[..., values:].view(torch.float32).view(shape.layers, blocks, *sizes) if self.top else None
        self.block_stride, self.scale_stride = block_bytes // dtype.itemsize, block_bytes // 4

    def layer_scale(self, layer: int) -> Tensor | None:
        """Return the scales of a layer, None where the cache has none."""
        return None if self.scale is None else self.scale[layer]

    def token(self, layer: int, slot: int) -> tuple[Tensor, Tensor]:
        """Return the key and the value [kv_heads, head_dim] of a slot, in fp32."""
        block, place = divmod(slot, self.block_tokens)
        kv = self.data[layer, block, :, :, place].float()
        if self.scale is not None:
            kv = kv * self.scale[layer, block, :, :, place, None]
        return kv[:, 0], kv[:, 1]
