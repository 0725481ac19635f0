"""What lies between the matrices, launched: Triton's kernels where they run, torch's operations elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench.engine.gpu import kernels_small as kernels
from mlsys_bench.engine.gpu import tri


def runs_triton(x: Tensor) -> bool:
    """Whether kernels can be launched on this tensor."""
    return tri.IS_INSTALLED and (x.is_cuda or tri.is_interpreted())


def rms_norm(
    x: Tensor, eps: float, gain: Tensor | None, dtype: torch.dtype, *, delta: Tensor | None = None, pick: Tensor | None = None
) -> Tensor:
    """Return x / sqrt(sum x^2 + H eps), times gain.  x: [T, H], to which delta is added first, in place; pick: rows of x, [S] int32."""
    hidden = x.shape[1]
    if not runs_triton(x):
        if delta is not None:
            x += delta
        rows = (x if pick is None else x.index_select(0, pick)).float()
        y = rows / (rows.square().sum(dim=1, keepdim=True) + hidden * eps).sqrt()
        return (y if gain is None else y * gain).to(dtype)
    count = len(x) if pick is None else len(pick)
    y = torch.empty(count, hidden, dtype=dtype, device=x.device)
    wide = tri.power_of_2(hidden)
    kernels.rms_norm[(count,)](x, delta, gain, pick, y, hidden, hidden * eps, BH=wide, num_warps=min(16, max(1, wide // 1024)))
    return y


def swiglu(gate_up: Tensor, dtype: torch.dtype) -> Tensor:
    """Return silu(gate) * up of [T, 2 F]: [T, F]."""
    if not runs_triton(gate_up):
        gate, up = gate_up.float().chunk(2, dim=1)
        return (functional.silu(gate) * up).to(dtype)
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty(rows, inner, dtype=dtype, device=gate_up.device)
    kernels.swiglu[(rows, tri.cdiv(inner, 1024))](gate_up.contiguous(), y, inner, BF=1024)
    return y


def embed(tokens: Tensor, feed: Tensor, last: Tensor, table: Tensor) -> Tensor:
    """Return the rows of the table in fp32, [T, H].  Where feed is not negative, the token is last[feed]."""
    x = torch.empty(len(tokens), table.shape[1], dtype=torch.float32, device=table.device)
    kernels.embed[(len(tokens),)](tokens, feed, last, table, x, table.shape[1], BH=1024)
    return x


def choose(logits: Tensor, temperature: Tensor, seeds: Tensor, places: Tensor, tokens: Tensor, *, allowed: Tensor | None = None) -> None:
    """Write the token of each row: the likeliest, or above temperature 0 a draw by the row's seed and place in its answer.

    logits: [S, V] fp32; temperature: [S] fp32; seeds: [S] int64; places: [S] int32; tokens: [S] int32; allowed: [V] uint8, None for all.
    """
    rows, vocabulary = logits.shape
    parts = min(32, tri.power_of_2(tri.cdiv(vocabulary, 1024)))
    values = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    indices = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    kernels.best_of_part[(rows, parts)](
        logits, allowed, temperature, seeds, places, values, indices, vocabulary, logits.stride(0), PARTS=parts, BV=1024
    )
    kernels.best_of_row[(rows,)](values, indices, tokens, vocabulary, PARTS=parts, num_warps=1)
