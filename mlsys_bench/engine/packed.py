"""Matrices that others have quantised, as logical formats: nothing is rounded again.

| layout | stored | weight |
|---|---|---|
| AWQ (`gemm`) | qweight int32 [K, N/8], qzeros int32 [K/g, N/8], scales [K/g, N]; nibbles of a word: outputs 0 2 4 6 1 3 5 7 | (q - z) s |
| GPTQ | qweight int32 [K/8, N], qzeros int32 [K/g, N/8], scales [K/g, N], g_idx int32 [K] | (q - z) s; v1 stores z - 1 |
| compressed int4 | weight_packed int32 [N, K/8], weight_scale [N, K/g], weight_zero_point int32 [N/8, K/g] or none | (q - z) s; z = 8 |
| compressed fp8 | weight float8_e4m3fn [N, K], weight_scale [N, 1] or [1] | w s |

g_idx names the group of each input.  With act-order it is no staircase: columns are then stored group by group, and inputs reordered.
Words are little-endian; scales become fp16, in which AWQ and GPTQ have them already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlsys_bench.engine.formats import ZERO, Groups4, Rows8f
from mlsys_bench.errors import BadInput

_AWQ_PLACE = (0, 4, 1, 5, 2, 6, 3, 7)  # output j of eight is nibble _AWQ_PLACE[j] of its word


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Groups4:
    """Return a matrix of AWQ's gemm layout."""
    nibbles = _in_awq_order(unpacked(qweight)).t().contiguous()
    return _groups4(_together(nibbles), scales, _in_awq_order(unpacked(qzeros)), inputs=nibbles.shape[1])


def gptq(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, is_v2: bool, name: str) -> tuple[Groups4, Tensor | None]:
    """Return a matrix of GPTQ's layout, and the order of its columns where that is not theirs in the file ([K] int64).

    Raises BadInput where g_idx leaves groups of unequal size.
    """
    inputs = 8 * qweight.shape[0]
    packed = qweight.t().contiguous().view(torch.uint8)  # [N, K/2]: eight inputs are four bytes, the low nibble first
    zeros = unpacked(qzeros) if is_v2 else (unpacked(qzeros) + 1) & 15
    order = None if g_idx is None else _order(g_idx, inputs // scales.shape[0], name)
    if order is not None:
        packed = _together(unpacked(packed)[:, order])
    return _groups4(packed, scales, zeros, inputs=inputs), order


def compressed4(weight: Tensor, scale: Tensor, zeros: Tensor | None, *, inputs: int) -> Groups4:
    """Return a matrix of compressed-tensors' 4-bit layout, symmetric where there are no zero points."""
    packed = weight.contiguous().view(torch.uint8)[:, : inputs // 2]
    per_group = None if zeros is None else unpacked(zeros.t().contiguous())  # [K/g, N]
    return _groups4(packed.contiguous(), scale.t(), per_group, inputs=inputs)


def compressed8f(weight: Tensor, scale: Tensor) -> Rows8f:
    """Return a matrix of fp8 with a scale per output, or one for all."""
    return Rows8f(weight=weight, scale=scale.float().reshape(-1).expand(weight.shape[0]).contiguous())


def unpacked(words: Tensor) -> Tensor:
    """Return the nibbles of words, low ones first: [..., n] of any integer type to uint8 [..., n * nibbles per word]."""
    octets = words.contiguous().view(torch.uint8)
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)


def _together(nibbles: Tensor) -> Tensor:
    """Return [N, K] nibbles as [N, K/2] bytes."""
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def _in_awq_order(nibbles: Tensor) -> Tensor:
    return nibbles.view(nibbles.shape[0], -1, 8)[:, :, _AWQ_PLACE].flatten(1)


def _groups4(packed: Tensor, scales: Tensor, zeros: Tensor | None, *, inputs: int) -> Groups4:
    """scales, zeros: [K/g, N]."""
    zero = None if zeros is None or bool((zeros == ZERO).all()) else zeros.t().contiguous()
    return Groups4(weight=packed, scale=scales.t().to(torch.float16).contiguous(), zero=zero, group=inputs // scales.shape[0])


def _order(g_idx: Tensor, group: int, name: str) -> Tensor | None:
    """Return which input stands at each place when columns are sorted by group; None where they are sorted."""
    groups = g_idx.long()
    if torch.equal(groups, torch.arange(len(groups)) // group):
        return None
    sizes = torch.bincount(groups, minlength=len(groups) // group)
    if not bool((sizes == group).all()):
        raise BadInput(f"{name}.g_idx: groups of {int(sizes.min())} to {int(sizes.max())} inputs; all of a matrix must have {group}")
    return groups.argsort(stable=True)
