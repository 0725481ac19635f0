"""Products y = x W^T of few rows, where reading W is all the work: 8 and 4 bit words, and rows of bf16, fp32 or fp8.

`gemv_*` multiply in fp32 without tensor cores, for a few rows: a tile of W is in registers, 16 bytes a load, all loads in flight at once,
and x is spread over the threads.  `gemm_*` use tensor cores, W as the wide operand and x^T as the narrow one.  All four can

    NORM   divide by hypot(|x|, sqrt(K eps)) first: RMSNorm whose gain is in W's columns, or in `gain`
    GATED  take the rows n and n + half of W together and return silu(gate) * up
    ADD    add to what y holds: the residual stream

Packed words: W's integers, unsigned, in chunks of 4 words of 32 bits.  Field j (of 8 or 4 bit) of word c of a chunk is the input 4 j + c of
it, so that the thread that holds a chunk (one 16-byte load) reads x in runs of 4, and one scale belongs to the whole chunk.

Fields become floats without a conversion instruction, which is several times slower than a multiplication.  `tiny`: a word masked to one
field within its lower 24 bits IS the float field * 2^(shift - 149), for subnormals and the first normals have one spacing; GPUs multiply
them at full speed, and x brings 2^(100 - shift) so that products are ordinary.  One AND and one FFMA a weight.  What integers are off for
being unsigned (128, 8 or the zero) is taken from a chunk's sum by the sum of its x.  Tensor cores need the value itself: bits put into the
mantissa of 2^e are 2^e + field, less the offset.
"""

from __future__ import annotations

from mlsys_bench.engine.gpu.tri import jit, tl


@jit
def rows_of_tile(N, half, BN: tl.constexpr, GATED: tl.constexpr):
    """Return the rows of W in this program's tile and whether they exist: BN neighbours, or BN/2 gates and then their BN/2 ups."""
    i = tl.arange(0, BN)
    if GATED:
        n = tl.program_id(0) * (BN // 2) + i % (BN // 2)
        return n + (i // (BN // 2)) * half, n < half
    n = tl.program_id(0) * BN + i
    return n, n < N


@jit
def tiny(p, J: tl.constexpr, BITS: tl.constexpr):
    """Field J of words as floats times 2^(shift - 149), shift = BITS J, less 8 above the lower 24 bits."""
    if BITS * J >= 24:
        return ((p >> 8) & (((1 << BITS) - 1) << (BITS * J - 8))).to(tl.float32, bitcast=True)
    else:  # noqa: RET505  only one of the two is compiled
        return (p & (((1 << BITS) - 1) << (BITS * J))).to(tl.float32, bitcast=True)


@jit
def exact8(p, J: tl.constexpr):
    """Byte J of words less 128 as floats, of odd bytes 256 times that: they stay where they are.  2^23 + byte less 2^23 + 128 is exact."""
    if J >= 2:
        p = p >> 16
    if J % 2 == 0:
        return ((p & 0xFF) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0
    return ((p & 0xFF00) | 0x4B000000).to(tl.float32, bitcast=True) - 8421376.0


@jit
def offset4(p, J: tl.constexpr):
    """Nibble J of words as floats plus 256 (even J) or 16 (odd J): shifted to the bits 15..18 or 19..22 of the mantissa."""
    if J < 2:
        q = p << 15
    elif J < 4:
        q = p << 7
    elif J < 6:
        q = p >> 1
    else:
        q = p >> 9
    if J % 2 == 0:
        return ((q & 0x00078000) | 0x43800000).to(tl.float32, bitcast=True)
    return ((q & 0x00780000) | 0x41800000).to(tl.float32, bitcast=True)


@jit
def finish(y, acc, bias, half, N, n, row_ok, row, row_is_there, BN: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr):
    """Write one row's acc [BN]: bias, then SwiGLU or the residual.  y: [M, N], of GATED [M, half]."""
    if bias is not None:
        acc += tl.load(bias + n, mask=row_ok, other=0.0)
    if GATED:
        pairs = tl.reshape(acc, (2, BN // 2))
        is_gate = tl.arange(0, 2)[:, None] == 0
        gate = tl.sum(tl.where(is_gate, pairs, 0.0), axis=0)
        up = tl.sum(tl.where(is_gate, 0.0, pairs), axis=0)
        n_out = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(y + row * half + n_out, gate / (1.0 + tl.exp(-gate)) * up, mask=row_is_there & (n_out < half))
    else:
        if ADD:
            acc += tl.load(y + row * N + n, mask=row_ok & row_is_there, other=0.0)
        tl.store(y + row * N + n, acc, mask=row_ok & row_is_there)


@jit
def gemv_words(
    x, gain, w, scale, zero, bias, y, M, N, K, half, eps_k,
    FIELDS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Compute y [M, N] of packed words, M <= BM.  FIELDS 4: int8, a scale per row; 8: int4, a scale and maybe a zero per GROUP inputs."""
    CHUNK: tl.constexpr = 4 * FIELDS
    BITS: tl.constexpr = 32 // FIELDS
    CENTRE: tl.constexpr = 8.0 if FIELDS == 8 else 128.0
    words = tl.cdiv(K, CHUNK) * 4
    groups = tl.cdiv(K, GROUP) if FIELDS == 8 else 1
    n, row_ok = rows_of_tile(N, half, BN, GATED)
    base = w + n.to(tl.int64)[:, None] * words
    acc = ()
    squares = ()
    for _ in tl.static_range(BM):
        acc = acc + (tl.zeros((BN, BW // 4), tl.float32),)
        squares = squares + (tl.zeros((BW,), tl.float32),)
    for w0 in range(0, words, BW):
        at = w0 + tl.arange(0, BW)
        p = tl.load(base + at[None, :], mask=row_ok[:, None] & (at < words)[None, :], other=0, eviction_policy="evict_first")
        if FIELDS == 8:
            chunk = w0 // 4 + tl.arange(0, BW // 4)
            is_there = row_ok[:, None] & (chunk * CHUNK < K)[None, :]
            group = n[:, None] * groups + (chunk * CHUNK // GROUP)[None, :]
            s = tl.load(scale + group, mask=is_there, other=0.0).to(tl.float32)
            if zero is not None:
                z = tl.load(zero + group, mask=is_there, other=8).to(tl.float32)
        acc_before, squares_before = acc, squares
        acc = ()
        squares = ()
        for i in tl.static_range(BM):
            part = tl.zeros((BN, BW), tl.float32)
            total = tl.zeros((BW,), tl.float32)
            square = squares_before[i]
            for j in tl.static_range(FIELDS):
                k = (at // 4) * CHUNK + 4 * j + at % 4
                xj = tl.load(x + i * K + k, mask=(k < K) & (i < M), other=0.0).to(tl.float32)
                if NORM:
                    square += xj * xj
                    if gain is not None:
                        xj = xj * tl.load(gain + k, mask=k < K, other=0.0)
                total += xj
                part += tiny(p, j, BITS) * (xj * 2.0 ** (100 - BITS * j + (8 if BITS * j >= 24 else 0)))[None, :]
            total = tl.sum(tl.reshape(total, (BW // 4, 4)), axis=1)
            sums = tl.sum(tl.reshape(part, (BN, BW // 4, 4)), axis=2) * 562949953421312.0  # 2^49
            if zero is not None:
                sums -= z * total[None, :]
            else:
                sums -= (total * CENTRE)[None, :]
            if FIELDS == 8:
                sums *= s
            acc = acc + (acc_before[i] + sums,)
            squares = squares + (square,)
    for i in tl.static_range(BM):
        out = tl.sum(acc[i], axis=1)
        if FIELDS == 4:
            out *= tl.load(scale + n, mask=row_ok, other=0.0)
        if NORM:
            out = out / tl.sqrt(tl.sum(squares[i], axis=0) + eps_k)
        finish(y, out, bias, half, N, n, row_ok, i, i < M, BN, GATED, ADD)


@jit
def gemv_rows(
    x, gain, w, scale, bias, y, M, N, K, half, eps_k,
    VEC: tl.constexpr, NORM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute y [M, N] of rows [N, K] in bf16, fp16, fp32, or fp8 with a scale per row, M <= BM.  VEC: elements in 16 bytes."""
    n, row_ok = rows_of_tile(N, half, BN, GATED)
    base = w + n.to(tl.int64)[:, None] * K
    acc = ()
    squares = ()
    for _ in tl.static_range(BM):
        acc = acc + (tl.zeros((BN, BK // VEC), tl.float32),)
        squares = squares + (tl.zeros((BK,), tl.float32),)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        p = tl.load(base + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first").to(tl.float32)
        acc_before, squares_before = acc, squares
        acc = ()
        squares = ()
        for i in tl.static_range(BM):
            xi = tl.load(x + i * K + k, mask=(k < K) & (i < M), other=0.0).to(tl.float32)
            squares = squares + (squares_before[i] + xi * xi,)
            if gain is not None:
                xi = xi * tl.load(gain + k, mask=k < K, other=0.0)
            acc = acc + (acc_before[i] + tl.sum(tl.reshape(p * xi[None, :], (BN, BK // VEC, VEC)), axis=2),)
    for i in tl.static_range(BM):
        out = tl.sum(acc[i], axis=1)
        if scale is not None:
            out *= tl.load(scale + n, mask=row_ok, other=0.0)
        if NORM:
            out = out / tl.sqrt(tl.sum(squares[i], axis=0) + eps_k)
        finish(y, out, bias, half, N, n, row_ok, i, i < M, BN, GATED, ADD)


@jit
def finish_tile(y, acc, scale, bias, half, M, N, n, row_ok, m, BN: tl.constexpr, BM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr):
    """Write acc [BN, BM] to y [M, N], of GATED [M, half]: scale and bias, then SwiGLU or the residual."""
    if scale is not None:
        acc *= tl.load(scale + n, mask=row_ok, other=0.0)[:, None]
    if bias is not None:
        acc += tl.load(bias + n, mask=row_ok, other=0.0)[:, None]
    if GATED:
        pairs = tl.reshape(acc, (2, BN // 2, BM))
        is_gate = tl.arange(0, 2)[:, None, None] == 0
        gate = tl.sum(tl.where(is_gate, pairs, 0.0), axis=0)
        up = tl.sum(tl.where(is_gate, 0.0, pairs), axis=0)
        n_out = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        at = y + m[None, :] * half + n_out[:, None]
        tl.store(at, gate / (1.0 + tl.exp(-gate)) * up, mask=(n_out < half)[:, None] & (m < M)[None, :])
    else:
        at = y + m[None, :] * N + n[:, None]
        ok = row_ok[:, None] & (m < M)[None, :]
        if ADD:
            acc += tl.load(at, mask=ok, other=0.0)
        tl.store(at, acc, mask=ok)


@jit
def gather_splits(
    acc, parts, arrived, y, scale, bias, half, M, N, n, row_ok, m,
    SPLITS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Finish acc [BN, BM], or, of several splits along K, hand it in: the last to arrive adds all in their order, so sums never vary."""
    if SPLITS == 1:
        finish_tile(y, acc, scale, bias, half, M, N, n, row_ok, m, BN, BM, GATED, ADD)
    else:
        tile = parts + tl.program_id(0).to(tl.int64) * SPLITS * BN * BM + tl.arange(0, BN)[:, None] * BM + m[None, :]
        tl.store(tile + tl.program_id(1) * BN * BM, acc)
        tl.debug_barrier()
        if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == SPLITS - 1:
            total = tl.zeros((BN, BM), tl.float32)
            for split in range(SPLITS):
                total += tl.load(tile + split * BN * BM, cache_modifier=".cg")
            finish_tile(y, total, scale, bias, half, M, N, n, row_ok, m, BN, BM, GATED, ADD)
            tl.atomic_xchg(arrived + tl.program_id(0), 0)


@jit
def gemm_words(
    x, w, scale, zero, bias, y, parts, arrived, M, N, K, half,
    FIELDS: tl.constexpr, GROUP: tl.constexpr, GATED: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Compute y [M, N] of packed words by tensor cores, x normed.  Integers of 8 bit are exact in x's type; 4-bit ones are scaled first."""
    CHUNK: tl.constexpr = 4 * FIELDS
    words = tl.cdiv(K, CHUNK) * 4
    n, row_ok = rows_of_tile(N, half, BN, GATED)
    m = tl.arange(0, BM)
    base = w + n.to(tl.int64)[:, None] * words
    share = tl.cdiv(tl.cdiv(words, BW), SPLITS) * BW
    begin = tl.program_id(1) * share
    acc = tl.zeros((BN, BM), tl.float32)
    if FIELDS == 8:
        groups = tl.cdiv(K, GROUP)
    for w0 in range(begin, tl.minimum(begin + share, words), BW):
        at = w0 + tl.arange(0, BW)
        ok = row_ok[:, None] & (at < words)[None, :]
        p = tl.load(base + at[None, :], mask=ok, other=0, eviction_policy="evict_first")
        if FIELDS == 8:
            group = n[:, None] * groups + ((at // 4) * CHUNK // GROUP)[None, :]
            s = tl.load(scale + group, mask=ok, other=0.0).to(tl.float32)
            centre = 8.0 if zero is None else tl.load(zero + group, mask=ok, other=8).to(tl.float32)
            below_even = -(256.0 + centre) * s
            below_odd = -(16.0 + centre) * s
        for j in tl.static_range(FIELDS):
            k = (at // 4) * CHUNK + 4 * j + at % 4
            xj = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
            if FIELDS == 4:
                a = exact8(p, j) * (1.0 if j % 2 == 0 else 0.00390625)
            else:
                a = offset4(p, j) * s + (below_even if j % 2 == 0 else below_odd)
            acc = tl.dot(a.to(xj.dtype), xj, acc)
    row_scale = scale if FIELDS == 4 else None
    gather_splits(acc, parts, arrived, y, row_scale, bias, half, M, N, n, row_ok, m, SPLITS, BN, BM, GATED, ADD)


@jit
def gemm_rows(
    x, w, scale, bias, y, parts, arrived, M, N, K, half,
    GATED: tl.constexpr, ADD: tl.constexpr, SPLITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute y [M, N] of rows [N, K] by tensor cores, x already normed."""
    n, row_ok = rows_of_tile(N, half, BN, GATED)
    m = tl.arange(0, BM)
    base = w + n.to(tl.int64)[:, None] * K
    share = tl.cdiv(tl.cdiv(K, BK), SPLITS) * BK
    begin = tl.program_id(1) * share
    acc = tl.zeros((BN, BM), tl.float32)
    for k0 in range(begin, tl.minimum(begin + share, K), BK):
        k = k0 + tl.arange(0, BK)
        p = tl.load(base + k[None, :], mask=row_ok[:, None] & (k < K)[None, :], other=0.0, eviction_policy="evict_first")
        xk = tl.load(x + m[None, :] * K + k[:, None], mask=(m < M)[None, :] & (k < K)[:, None], other=0.0)
        acc = tl.dot(p.to(xk.dtype), xk, acc)
    gather_splits(acc, parts, arrived, y, scale, bias, half, M, N, n, row_ok, m, SPLITS, BN, BM, GATED, ADD)


@jit
def widen_words(w, scale, zero, out, N, K, FIELDS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr):
    """Write to out [N, K] the weights of packed words as floats, for a library's product of many rows."""
    CHUNK: tl.constexpr = 4 * FIELDS
    words = tl.cdiv(K, CHUNK) * 4
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    at = tl.program_id(1) * BW + tl.arange(0, BW)
    ok = (n < N)[:, None] & (at < words)[None, :]
    p = tl.load(w + n.to(tl.int64)[:, None] * words + at[None, :], mask=ok, other=0, eviction_policy="evict_first")
    if FIELDS == 8:
        group = n[:, None] * tl.cdiv(K, GROUP) + ((at // 4) * CHUNK // GROUP)[None, :]
        s = tl.load(scale + group, mask=ok, other=0.0).to(tl.float32)
    else:
        s = tl.load(scale + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    for j in tl.static_range(FIELDS):
        k = (at // 4) * CHUNK + 4 * j + at % 4
        if FIELDS == 4:
            a = exact8(p, j) * (1.0 if j % 2 == 0 else 0.00390625)
        elif zero is not None:
            a = offset4(p, j) - (256.0 if j % 2 == 0 else 16.0) - tl.load(zero + group, mask=ok, other=8).to(tl.float32)
        else:
            a = offset4(p, j) - (264.0 if j % 2 == 0 else 24.0)
        tl.store(out + n.to(tl.int64)[:, None] * K + k[None, :], a * s, mask=ok & (k < K)[None, :])
