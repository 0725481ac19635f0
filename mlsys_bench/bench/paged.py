"""A paged cache of one layer to measure attention with: filled with random keys and values, its blocks in random order."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlsys_bench.bench.alone import Computes
from mlsys_bench.engine.runner import Int32, Step
from mlsys_bench.engine.spec import Decoder

RANDOM_BLOCKS = 32  # that differ: what attention sees can then be counted, and float64 has less to do


class Pool:
    """The cache, and what its blocks hold: block b what block b % RANDOM_BLOCKS does.  k, v: [tokens, kv_heads, head_dim] of those."""

    def __init__(self, d: Decoder, who: Computes, gaussian: Callable[..., Tensor], *, blocks: int, block_tokens: int) -> None:
        """Fill it through the operator that stores keys and values, none of them turned."""
        a, tokens = d.shape, RANDOM_BLOCKS * block_tokens
        self.blocks, self.block_tokens = blocks, block_tokens
        self.cache = who.cache(blocks, block_tokens)
        qkv = gaussian(tokens, (a.heads + 2 * a.kv_heads) * a.head_dim)
        half = d.rope.dim // 2
        places = np.arange(tokens, dtype=np.int32)
        who.place(qkv, torch.ones(tokens, half), torch.zeros(tokens, half), places, places[None], self.cache).once()
        self.k, self.v = qkv.double().view(tokens, -1, a.head_dim)[:, a.heads :].chunk(2, dim=1)
        for at in range(RANDOM_BLOCKS, blocks, RANDOM_BLOCKS):
            piece = self.cache.raw[:, at : at + RANDOM_BLOCKS]
            piece.copy_(self.cache.raw[:, : piece.shape[1]])
        self.order = np.random.default_rng(0).permutation(blocks).astype(np.int32)

    def tables(self, batch: int, context: int) -> npt.NDArray[np.int32]:
        """Return block tables of such sequences, as many as the cache holds apart: [count, batch, width]."""
        width = math.ceil(context / self.block_tokens)
        count = self.blocks // (batch * width)
        return self.order[: count * batch * width].reshape(count, batch, width)

    def slots(self, m: int) -> Int32:
        """Return places of m tokens, in blocks of their own as far as there are so many: [count, m]."""
        apart = max(1, min(self.blocks // m, 4096))
        return (self.order[np.arange(apart * m) % self.blocks].astype(np.int32) * self.block_tokens).reshape(apart, m)


def decode_steps(pool: Pool, context: int, batch: int) -> list[Step]:
    """Return steps of one token in each of some sequences, the same but for their blocks."""
    at = np.arange(batch, dtype=np.int32)
    positions = np.full(batch, context - 1, dtype=np.int32)
    first = np.arange(batch + 1, dtype=np.int32)
    return [
        Step.of(tokens=at, positions=positions, slots=at, sequence_of=at, first=first, block_table=table, sampled=at)
        for table in pool.tables(batch, context)
    ]


def prefill_steps(pool: Pool, context: int, chunk: int) -> list[Step]:
    """Return steps of the last chunk of one prompt."""
    at = np.arange(chunk, dtype=np.int32)
    positions, first = at + np.int32(context - chunk), np.array([0, chunk], dtype=np.int32)
    return [
        Step.of(tokens=at, positions=positions, slots=at, sequence_of=0 * at, first=first, block_table=table, sampled=at[-1:])
        for table in pool.tables(1, context)
    ]


def attended(d: Decoder, pool: Pool, step: Step, qkv: Tensor, token: int) -> Tensor:
    """Return what one token of a step sees, in float64 by plain arithmetic: [heads head_dim].

    Keys of blocks that hold the same count as often as they are seen: softmax with multiplicities.
    """
    a = d.shape
    keys = np.arange(int(step.positions[token]) + 1)
    held_by = step.block_table[step.sequence_of[token], keys // pool.block_tokens] % RANDOM_BLOCKS
    often = np.bincount(held_by * pool.block_tokens + keys % pool.block_tokens, minlength=len(pool.k))
    q = qkv[token, : a.heads * a.head_dim].double().view(a.kv_heads, -1, a.head_dim)
    scores = torch.einsum("hgd,nhd->hgn", q, pool.k) * d.scale
    if d.attention_softcap:
        scores = torch.tanh(scores / d.attention_softcap) * d.attention_softcap
    weights = torch.exp(scores - scores.amax(dim=2, keepdim=True)) * torch.from_numpy(often)
    return (torch.einsum("hgn,nhd->hgd", weights, pool.v) / weights.sum(dim=2, keepdim=True)).flatten()
