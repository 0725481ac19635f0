"""What lies between the matrices: embedding, RMSNorm, rope + KV write, SwiGLU, and the choice of the next token.  One program per row."""

from __future__ import annotations

from mlsys_bench.engine.gpu.tri import jit, tl


@jit
def embed(tokens, feed, last, table, x, H, BH: tl.constexpr):
    """Write to x [T, H] fp32 the rows of the table.  Where feed is not negative, the token is what the step before chose for that row."""
    t = tl.program_id(0)
    source = tl.load(feed + t)
    token = tl.load(tokens + t)
    if source >= 0:
        token = tl.load(last + source)
    for h0 in range(0, H, BH):
        h = h0 + tl.arange(0, BH)
        tl.store(x + t.to(tl.int64) * H + h, tl.load(table + token.to(tl.int64) * H + h, mask=h < H).to(tl.float32), mask=h < H)


@jit
def rms_norm(x, delta, gain, pick, y, H, eps_h, BH: tl.constexpr):
    """Write y [T, H] = x / hypot(|x|, sqrt(H eps)) times gain; first x += delta, where there is one.  pick: [T] rows of x, None for all."""
    t = tl.program_id(0).to(tl.int64)
    source = t if pick is None else tl.load(pick + t).to(tl.int64)
    h = tl.arange(0, BH)
    ok = h < H
    v = tl.load(x + source * H + h, mask=ok, other=0.0).to(tl.float32)
    if delta is not None:
        v += tl.load(delta + source * H + h, mask=ok, other=0.0).to(tl.float32)
        tl.store(x + source * H + h, v, mask=ok)
    v = v / tl.sqrt(tl.sum(v * v, axis=0) + eps_h)
    if gain is not None:
        v *= tl.load(gain + h, mask=ok, other=0.0)
    tl.store(y + t * H + h, v, mask=ok)


@jit
def swiglu(gate_up, y, F, BF: tl.constexpr):
    """Write y [T, F] = silu(gate) * up of [T, 2 F]."""
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    gate = tl.load(gate_up + t * 2 * F + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(gate_up + t * 2 * F + F + f, mask=f < F, other=0.0).to(tl.float32)
    tl.store(y + t * F + f, gate / (1.0 + tl.exp(-gate)) * up, mask=f < F)


@jit
def rope_write(
    qkv, q_gain, k_gain, cos, sin, positions, slots, kv, kv_scale, block_stride, scale_stride, eps_d,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, BLOCK_TOKENS: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Turn queries in place, turn keys, and write keys and values to the cache.  Grid: (T, HEADS + 2 KV_HEADS).

    Pairs are (i, i + D/2).  q_gain, k_gain: [D], RMSNorm of each head first.  TOP: the largest number of a cache with scales, 0 of one
    without.  A negative slot is nobody's.
    """
    t, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, HALF)
    ok = i < D // 2
    row = qkv + (t * (HEADS + 2 * KV_HEADS) + head) * D
    low = tl.load(row + i, mask=ok, other=0.0).to(tl.float32)
    high = tl.load(row + D // 2 + i, mask=ok, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        if q_gain is not None:
            shrink = 1.0 / tl.sqrt(tl.sum(low * low, axis=0) + tl.sum(high * high, axis=0) + eps_d)
            if head < HEADS:
                low *= shrink * tl.load(q_gain + i, mask=ok, other=0.0)
                high *= shrink * tl.load(q_gain + D // 2 + i, mask=ok, other=0.0)
            else:
                low *= shrink * tl.load(k_gain + i, mask=ok, other=0.0)
                high *= shrink * tl.load(k_gain + D // 2 + i, mask=ok, other=0.0)
        angle = tl.load(positions + t).to(tl.int64) * (D // 2) + i
        c = tl.load(cos + angle, mask=ok, other=0.0)
        s = tl.load(sin + angle, mask=ok, other=0.0)
        turned = low * c - high * s
        high = high * c + low * s
        low = turned
    if head < HEADS:
        tl.store(row + i, low, mask=ok)
        tl.store(row + D // 2 + i, high, mask=ok)
    else:
        slot = tl.load(slots + t).to(tl.int64)
        which = (head - HEADS) // KV_HEADS  # 0 key, 1 value
        block = slot // BLOCK_TOKENS
        inside = ((head - HEADS) % KV_HEADS * 2 + which) * BLOCK_TOKENS + slot % BLOCK_TOKENS
        vector = kv + block * block_stride + inside * D
        ok = ok & (slot >= 0)
        if TOP > 0:
            peak = tl.maximum(tl.max(tl.abs(low), axis=0), tl.max(tl.abs(high), axis=0))
            step = tl.maximum(peak, 1e-30) / TOP
            tl.store(kv_scale + block * scale_stride + inside, step, mask=slot >= 0)
            low, high = low / step, high / step
            if TOP == 127:  # a cast to int8 cuts off; rounding half away from zero
                low = tl.where(low < 0, low - 0.5, low + 0.5)
                high = tl.where(high < 0, high - 0.5, high + 0.5)
        tl.store(vector + i, low.to(kv.dtype.element_ty), mask=ok)
        tl.store(vector + D // 2 + i, high.to(kv.dtype.element_ty), mask=ok)


@jit
def gumbel(bits):
    """Return -log(-log(1 - v)) of 32 random bits, v = (bits + 1/2) / 2^32: Gumbel noise.

    Its large values come of small v, which fp32 resolves; of u = 1 - v near 1 it does not, and one token in 2^24 would win whatever its
    logit, in nearly one of a hundred draws from a vocabulary of 128,000.
    """
    v = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    e = tl.where(v < 0.001, v + v * v * 0.5 + v * v * v * 0.3333333333333333, -tl.log(tl.maximum(1.0 - v, 2.9802322387695312e-08)))
    return -tl.log(e)


@jit
def best_of_part(logits, allowed, temperature, seeds, places, values, indices, V, stride, PARTS: tl.constexpr, BV: tl.constexpr):
    """Find the best token of one part of a row.  Grid: (rows, PARTS).

    Above temperature 0 every logit / temperature gets Gumbel noise, its bits by Philox from the row's seed, its place in the answer
    and the token: the largest is then a draw from the softmax (Gumbel, 1954).
    """
    row, part = tl.program_id(0), tl.program_id(1)
    share = tl.cdiv(tl.cdiv(V, BV), PARTS) * BV
    heat = tl.load(temperature + row)
    seed, place = tl.load(seeds + row), tl.load(places + row)
    best = tl.full((BV,), float("-inf"), tl.float32)
    token = tl.full((BV,), 2147483647, tl.int32)
    for v0 in range(part * share, tl.minimum(part * share + share, V), BV):
        v = v0 + tl.arange(0, BV)
        ok = v < V
        if allowed is not None:
            ok = ok & (tl.load(allowed + v, mask=ok, other=0) != 0)
        x = tl.load(logits + row.to(tl.int64) * stride + v, mask=ok, other=float("-inf")).to(tl.float32)
        if heat > 0.0:
            bits, _, _, _ = tl.philox(seed, v, v * 0 + place, v * 0, v * 0)
            x = x / heat + gumbel(bits.to(tl.uint32, bitcast=True))
        token = tl.where(x > best, v, token)
        best = tl.maximum(x, best)
    top = tl.max(best, axis=0)
    tl.store(values + row * PARTS + part, top)
    tl.store(indices + row * PARTS + part, tl.min(tl.where(best == top, token, 2147483647), axis=0))


@jit
def best_of_row(values, indices, tokens, V, PARTS: tl.constexpr):
    """Find the best of a row's parts; of equals the first token.  Grid: (rows,).

    Of logits that are all NaN nothing is best; the token is then the last one, for the next step reads a row of the table at it.
    """
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    best = tl.load(values + row * PARTS + part)
    token = tl.load(indices + row * PARTS + part)
    first = tl.min(tl.where(best == tl.max(best, axis=0), token, 2147483647), axis=0)
    tl.store(tokens + row, tl.minimum(first, V - 1))
