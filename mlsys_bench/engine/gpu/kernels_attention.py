"""Attention over paged KV, softmax in one pass (Dao et al., 2022, arXiv 2205.14135), scores in base 2.

A block of a layer's cache is [kv_heads, 2, block_tokens, D], blocks are block_stride elements apart: a head's keys of a block lie in one
piece, its values behind them, so that a gather by block table reads long runs.  int8 and fp8 caches have a scale per key and value vector,
[kv_heads, 2, block_tokens] a block, scale_stride apart, which is applied to scores and probabilities, never to vectors.
"""

from __future__ import annotations

from mlsys_bench.engine.gpu.tri import jit, tl


@jit
def attend_tile(
    q, kv, kv_scale, block_stride, scale_stride, blocks, t, key_ok, seen, head, m, weight, acc, to_base_2,
    D: tl.constexpr, DP: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Let q [R, DP] see the keys t [BT] of a head, as far as seen [R, BT]; return the running maximum, sum and weighted values."""
    block = tl.load(blocks + t // BLOCK_TOKENS, mask=key_ok, other=0).to(tl.int64)
    inside = head * (2 * BLOCK_TOKENS) + t % BLOCK_TOKENS
    row = kv + block * block_stride + inside * D
    d = tl.arange(0, DP)
    d_ok = d < D
    k = tl.load(row[None, :] + d[:, None], mask=key_ok[None, :] & d_ok[:, None], other=0.0)
    score = tl.dot(q, k.to(q.dtype), input_precision="ieee") * to_base_2
    if kv_scale is not None:
        score *= tl.load(kv_scale + block * scale_stride + inside, mask=key_ok, other=0.0)[None, :]
    score = tl.where(seen, score, float("-inf"))
    peak = tl.maximum(m, tl.max(score, axis=1))
    reach = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen nothing yet
    p = tl.exp2(score - reach[:, None])
    fade = tl.exp2(m - reach)
    v = tl.load(row[:, None] + (BLOCK_TOKENS * D + d)[None, :], mask=key_ok[:, None] & d_ok[None, :], other=0.0)
    sum_p = tl.sum(p, axis=1)
    if kv_scale is not None:
        p *= tl.load(kv_scale + block * scale_stride + inside + BLOCK_TOKENS, mask=key_ok, other=0.0)[None, :]
    acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc * fade[:, None], input_precision="ieee")
    return peak, weight * fade + sum_p, acc


@jit
def paged_decode(
    q, q_stride, kv, kv_scale, block_stride, scale_stride, table, width, lengths, out, parts, parts_m, parts_l, arrived, to_base_2, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, R: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BT: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Attend one query per sequence; the heads that share a KV head are the R rows.  Grid: (sequences, kv_heads, SPLITS).

    Every split takes an equal share of whole tiles; the last of a head to arrive merges all, in their order.  A length of 0 is no sequence.
    """
    PER: tl.constexpr = HEADS // KV_HEADS
    b, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b)
    begin = tl.maximum(length - window, 0) if window > 0 else 0
    share = tl.cdiv(tl.cdiv(length - begin, BT), SPLITS) * BT
    low = begin + split * share
    high = tl.minimum(low + share, length)
    r = tl.arange(0, R)
    d = tl.arange(0, DP)
    at = (head * PER + r)[:, None] * D + d[None, :]
    ok = (r < PER)[:, None] & (d < D)[None, :]
    query = tl.load(q + b.to(tl.int64) * q_stride + at, mask=ok, other=0.0)
    m = tl.full((R,), float("-inf"), tl.float32)
    weight = tl.zeros((R,), tl.float32)
    acc = tl.zeros((R, DP), tl.float32)
    blocks = table + b.to(tl.int64) * width
    for t0 in range(low, high, BT):
        t = t0 + tl.arange(0, BT)
        key_ok = t < high
        m, weight, acc = attend_tile(
            query,
            kv,
            kv_scale,
            block_stride,
            scale_stride,
            blocks,
            t,
            key_ok,
            key_ok[None, :],
            head,
            m,
            weight,
            acc,
            to_base_2,
            D,
            DP,
            BLOCK_TOKENS,
        )
    if SPLITS == 1:
        final = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
        tl.store(out + b.to(tl.int64) * HEADS * D + at, final, mask=ok)
    else:
        pair = b * KV_HEADS + head
        first = pair.to(tl.int64) * SPLITS
        tile = r[:, None] * DP + d[None, :]
        tl.store(parts + (first + split) * R * DP + tile, acc)
        tl.store(parts_m + (first + split) * R + r, m)
        tl.store(parts_l + (first + split) * R + r, weight)
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == SPLITS - 1:
            peak = tl.full((R,), float("-inf"), tl.float32)
            total = tl.zeros((R,), tl.float32)
            merged = tl.zeros((R, DP), tl.float32)
            for s in range(SPLITS):
                m_s = tl.load(parts_m + (first + s) * R + r, cache_modifier=".cg")
                l_s = tl.load(parts_l + (first + s) * R + r, cache_modifier=".cg")
                acc_s = tl.load(parts + (first + s) * R * DP + tile, cache_modifier=".cg")
                higher = tl.maximum(peak, m_s)
                reach = tl.where(higher == float("-inf"), 0.0, higher)
                fade, grow = tl.exp2(peak - reach), tl.exp2(m_s - reach)
                total = total * fade + l_s * grow
                merged = merged * fade[:, None] + acc_s * grow[:, None]
                peak = higher
            final = merged / tl.where(total == 0.0, 1.0, total)[:, None]
            tl.store(out + b.to(tl.int64) * HEADS * D + at, final, mask=ok)
            tl.atomic_xchg(arrived + pair, 0)


@jit
def paged_prefill(
    q, q_stride, kv, kv_scale, block_stride, scale_stride, table, width, tiles, out, to_base_2, window,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Attend tiles of up to BQ neighbouring queries to their past and each other, causally.  Grid: (tiles, HEADS).

    tiles: [tiles, 4] sequence, first query in the step, number of queries, position of the first.
    """
    tile, head = tl.program_id(0), tl.program_id(1)
    sequence = tl.load(tiles + 4 * tile)
    first = tl.load(tiles + 4 * tile + 1)
    count = tl.load(tiles + 4 * tile + 2)
    position = tl.load(tiles + 4 * tile + 3)
    i = tl.arange(0, BQ)
    d = tl.arange(0, DP)
    ok = (i < count)[:, None] & (d < D)[None, :]
    query = tl.load(q + (first + i).to(tl.int64)[:, None] * q_stride + head * D + d[None, :], mask=ok, other=0.0)
    m = tl.full((BQ,), float("-inf"), tl.float32)
    weight = tl.zeros((BQ,), tl.float32)
    acc = tl.zeros((BQ, DP), tl.float32)
    blocks = table + sequence.to(tl.int64) * width
    begin = tl.maximum(position - window + 1, 0) // BT * BT if window > 0 else 0
    end = position + count
    for t0 in range(begin, end, BT):
        t = t0 + tl.arange(0, BT)
        seen = t[None, :] <= (position + i)[:, None]
        if window > 0:
            seen = seen & (t[None, :] > (position + i - window)[:, None])
        m, weight, acc = attend_tile(
            query,
            kv,
            kv_scale,
            block_stride,
            scale_stride,
            blocks,
            t,
            t < end,
            seen,
            head // (HEADS // KV_HEADS),
            m,
            weight,
            acc,
            to_base_2,
            D,
            DP,
            BLOCK_TOKENS,
        )
    final = acc / tl.where(weight == 0.0, 1.0, weight)[:, None]
    tl.store(out + (first + i).to(tl.int64)[:, None] * (HEADS * D) + head * D + d[None, :], final, mask=ok)
