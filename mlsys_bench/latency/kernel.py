"""The clock of a simulator: one step's time from an array of numbers.  Plain scalar code, so that numba can compile it.

`step.table` fills the array; `step.step_s` evaluates the same formula for many steps at once, and a test holds the two together.
"""

from __future__ import annotations

import math
from typing import Any

(
    FIXED, PER_TOKEN, PER_SAMPLE, PER_DECODE, HIDDEN,
    ATTENTION_READ, ATTENTION_FLOPS, DENSE_READ, DENSE_FLOPS, HEAD_READ, HEAD_FLOPS, EXPERT_READ, EXPERT_FLOPS, MISSED,
    PACK, PACK_TOKENS, PASS, PASS_TOKENS, NORM,
    KV, KV_FLOPS, KV_WINDOW, WINDOW, PAIR, PAIR_WINDOW,
    STAIR, STAIR_END, TILE,
) = range(28)  # fmt: skip
SIZE = 32


def seconds(
    t: Any, decode_seqs: float, decode_kv_tokens: float, prefill_tokens: float, prefill_pairs: float, sampled_tokens: float
) -> float:
    """Return the time of one step in seconds."""
    tokens = decode_seqs + prefill_tokens
    if t[STAIR] > 0.0 and prefill_tokens == 0.0 and t[STAIR] < tokens <= t[STAIR_END]:
        tokens = t[STAIR] * math.ceil(tokens / t[STAIR])
    norm = t[NORM]
    read = t[DENSE_READ]
    if tokens > t[PACK_TOKENS]:
        read += t[PACK]
    if tokens > t[PASS_TOKENS]:
        read += t[PASS]
    compute = t[DENSE_FLOPS] * tokens
    if t[HEAD_READ] == 0.0:  # the head is counted with the matrices
        compute += t[HEAD_FLOPS] * sampled_tokens
    busy = _roof(read, compute, norm)
    if t[ATTENTION_READ] > 0.0:
        busy += _roof(t[ATTENTION_READ], t[ATTENTION_FLOPS] * tokens, norm)
    if t[HEAD_READ] > 0.0 and sampled_tokens > 0.0:
        busy += _roof(t[HEAD_READ], t[HEAD_FLOPS] * sampled_tokens, norm)
    if t[EXPERT_READ] > 0.0:
        hit = 1.0 - t[MISSED] ** tokens
        rows = tokens
        if t[TILE] > 0.0 and hit > 0.0:  # each expert that is hit computes whole tiles of rows
            chosen = 1.0 - t[MISSED]
            rows += 0.5 * t[TILE] * hit / chosen * (1.0 + math.exp(-2.0 * tokens * chosen / (hit * t[TILE])))
        busy += _roof(t[EXPERT_READ] * hit, t[EXPERT_FLOPS] * rows, norm)
    busy += max(t[KV], t[KV_FLOPS]) * decode_kv_tokens + t[PAIR] * prefill_pairs + t[PER_DECODE] * decode_seqs
    if t[WINDOW] > 0.0:
        busy += t[KV_WINDOW] * min(decode_kv_tokens, t[WINDOW] * decode_seqs)
        busy += t[PAIR_WINDOW] * min(prefill_pairs, t[WINDOW] * prefill_tokens)
    busy += t[PER_TOKEN] * tokens
    if busy < t[HIDDEN]:  # the host prepares the next step meanwhile; the longer of the two counts
        busy = t[HIDDEN]
    return float(t[FIXED] + t[PER_SAMPLE] * sampled_tokens + busy)


def _roof(read: float, compute: float, norm: float) -> float:
    """Return the longer of two times that overlap, or their p-norm."""
    if read > compute:
        read, compute = compute, read
    if norm > 0.0 and compute > 0.0:
        return float(compute * (1.0 + (read / compute) ** norm) ** (1.0 / norm))
    return compute
