"""Attention over the paged cache, launched: rope and write, one query per sequence, chunks of prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mlsys_bench.engine.gpu import kernels_attention, kernels_small, linears, tri
from mlsys_bench.engine.gpu.kv import GpuKV
from mlsys_bench.engine.runner import Int32

TILE = 64  # keys that a program reads at a time
QUERIES = 64  # of a prompt's chunk that a program computes
MOST_SPLITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """What attention needs to know of a model, the same in all layers."""

    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float

    @property
    def width(self) -> int:
        """Return the columns of q, k and v together."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim


def rope_write(
    a: Heads, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, cache: GpuKV, layer: int,
    gains: tuple[Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Turn q in place and write the turned k and v of every token to its slot; -1 is none.

    qkv: [T, width]; cos, sin: [positions, head_dim / 2] fp32; positions, slots: [T] int32.  gains: of q and k norms, sqrt(D) in them.
    """
    kernels_small.rope_write[(len(positions), a.heads + 2 * a.kv_heads)](
        qkv, gains[0] if gains else None, gains[1] if gains else None, cos, sin, positions, slots, cache.data[layer],
        cache.layer_scale(layer), cache.block_stride, cache.scale_stride, a.head_dim * a.norm_eps,
        HEADS=a.heads, KV_HEADS=a.kv_heads, D=a.head_dim, HALF=tri.power_of_2(a.head_dim // 2), BLOCK_TOKENS=cache.block_tokens,
        TOP=cache.top, num_warps=1,
    )  # fmt: skip


def table_width(blocks: int) -> int:
    """Return how wide a block table is made: a multiple of 16, for which all kernels are the same."""
    return 16 * tri.cdiv(max(blocks, 1), 16)


def padded(table: Int32) -> Int32:
    """Return a block table in such a width."""
    return np.pad(table, ((0, 0), (0, table_width(table.shape[1]) - table.shape[1])))


def splits_of(sequences: int, kv_heads: int, longest: int, device: torch.device) -> int:
    """Return among how many programs a head's keys are divided: so many that each multiprocessor has about two, while each has a tile.

    A power of two, as every other number would be a kernel of its own, compiled in the middle of serving.
    """
    wanted = tri.cdiv(2 * linears.multiprocessors(device), sequences * kv_heads)
    most = max(1, min(wanted, tri.cdiv(longest, TILE), MOST_SPLITS))
    return 1 << (most.bit_length() - 1)


def decode(
    a: Heads, qkv: Tensor, table: Tensor, lengths: Tensor, cache: GpuKV, layer: int, out: Tensor, *, splits: int, window: int = 0
) -> None:
    """Write what one query per sequence sees to the first rows of out [.., heads head_dim].

    qkv: [.., width], of which q is read; table: [B, blocks] int32; lengths: [B] int32, this token included, 0 for no sequence.
    """
    per = max(16, tri.power_of_2(a.heads // a.kv_heads))
    dp = max(16, tri.power_of_2(a.head_dim))
    batch = len(lengths)
    programs = batch * a.kv_heads * splits
    space, arrived = linears.workspace(qkv.device, programs * per * (dp + 2), batch * a.kv_heads)
    peaks, sums = space[programs * per * dp :], space[programs * per * (dp + 1) :]
    kernels_attention.paged_decode[(batch, a.kv_heads, splits)](
        qkv, a.width, cache.data[layer], cache.layer_scale(layer), cache.block_stride, cache.scale_stride, table, table.shape[1], lengths,
        out, space, peaks, sums, arrived, math.log2(math.e) / math.sqrt(a.head_dim), window,
        HEADS=a.heads, KV_HEADS=a.kv_heads, D=a.head_dim, DP=dp, R=per, BLOCK_TOKENS=cache.block_tokens, BT=TILE, SPLITS=splits,
        num_warps=4, num_stages=_stages(dp, qkv.dtype),
    )  # fmt: skip


def _stages(dp: int, dtype: torch.dtype) -> int:
    """Return how many tiles of keys and values are on their way at a time: three, where shared memory (227 KiB of an H200) holds them."""
    return 3 if 2 * TILE * dp * dtype.itemsize * 3 <= 128 * 1024 else 2


def tiles_of(first: Int32, positions: Int32, since: int = 0) -> Int32:
    """Return the tiles of `prefill` for sequences from `since` on: [tiles, 4] sequence, first query, number of queries, its position."""
    tiles = [
        (s, at, min(QUERIES, int(first[s + 1]) - at), int(positions[at]))
        for s in range(since, len(first) - 1)
        for at in range(int(first[s]), int(first[s + 1]), QUERIES)
    ]
    return np.array(tiles, dtype=np.int32).reshape(-1, 4)


def prefill(a: Heads, qkv: Tensor, table: Tensor, tiles: Tensor, cache: GpuKV, layer: int, out: Tensor, *, window: int = 0) -> None:
    """Write what the queries of tiles see, causally, to their rows of out [T, heads head_dim].  qkv: [T, width]; tiles: of `tiles_of`."""
    dp = max(16, tri.power_of_2(a.head_dim))
    kernels_attention.paged_prefill[(len(tiles), a.heads)](
        qkv, a.width, cache.data[layer], cache.layer_scale(layer), cache.block_stride, cache.scale_stride, table, table.shape[1], tiles,
        out, math.log2(math.e) / math.sqrt(a.head_dim), window,
        HEADS=a.heads, KV_HEADS=a.kv_heads, D=a.head_dim, DP=dp, BQ=QUERIES, BLOCK_TOKENS=cache.block_tokens,
        BT=TILE, num_warps=4, num_stages=_stages(dp, qkv.dtype),
    )  # fmt: skip
