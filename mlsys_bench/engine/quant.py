"""Linear layers in three precisions: fp32, bf16, and int8 weights with one scale per output row.

Each holder keeps its weight as [out, in] and maps x [M, in] to [M, out] in the precision of activations, which is fp32 or bf16.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench import errors

PRECISIONS = ("fp32", "bf16", "int8")
FEW_ROWS = range(4, 65)  # see Fp32
SMALL_M = 24  # where reading int8 row by row and widening it once cost the same (Cascade Lake, one thread)
DEQUANTISED_ELEMENTS = 1 << 20  # a block of fp32 weights of 4 MB is reused out of the cache


class Linear(Protocol):
    """A matrix that activations are multiplied with."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T.  x: [M, in]; returns [M, out]."""
        ...

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all that it holds in memory."""
        ...


def activation_dtype(precision: str) -> torch.dtype:
    """Return the type of activations and of the KV cache.  Raises UnknownName for a precision the engine does not compute in."""
    if precision not in PRECISIONS:
        raise errors.unknown("engine precision", precision, PRECISIONS)
    return torch.float32 if precision == "fp32" else torch.bfloat16


def pack(weight: Tensor, precision: str, device: torch.device) -> Linear:
    """Return the holder of an fp32 weight in this precision, on this device."""
    if precision == "int8":
        return Int8(*quantise(weight), device=device)
    dtype = activation_dtype(precision)
    return (Fp32 if precision == "fp32" else Bf16)(weight.to(device=device, dtype=dtype))


class Bf16:
    """A weight as it is, multiplied by the library's own kernel."""

    __slots__ = ("weight",)

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        return functional.linear(x, self.weight)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the weight."""
        return (self.weight,)


class Fp32(Bf16):
    """A weight in full precision."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T; a few rows on a CPU as (W x^T)^T, which MKL does in 0.7 of the time (8 rows, Cascade Lake, one thread)."""
        if x.shape[0] in FEW_ROWS and not x.is_cuda:
            return torch.mm(self.weight, x.t().contiguous()).t().contiguous()
        return functional.linear(x, self.weight)


class Int8:
    """A weight in int8, symmetric, with one scale per output row; activations stay in bf16."""

    __slots__ = ("on_cpu", "scale", "weight")

    def __init__(self, weight: Tensor, scale: Tensor, *, device: torch.device) -> None:
        self.weight, self.scale = weight.to(device), scale.to(device)
        self.on_cpu = device.type == "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T.  Few rows: a kernel that reads int8; many: blocks of W are widened and multiplied."""
        if not self.on_cpu:
            return functional.linear(x, self.weight.to(x.dtype)).mul_(self.scale)
        if x.shape[0] <= SMALL_M:
            return torch._weight_int8pack_mm(x.contiguous(), self.weight, self.scale)
        return self._widened(x)

    def _widened(self, x: Tensor) -> Tensor:
        """Multiply in fp32: without AVX512-BF16 a bf16 GEMM is slower than the conversion, see SMALL_M."""
        rows = max(1, DEQUANTISED_ELEMENTS // self.weight.shape[1])
        wide = x.float()
        parts = [functional.linear(wide, block.float()) for block in torch.split(self.weight, rows)]
        return torch.cat(parts, dim=1).mul_(self.scale).to(x.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return weight and scales."""
        return self.weight, self.scale


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (int8 [out, in], bf16 scale [out]) of an fp32 weight, symmetric per row: weight ~ int8 * scale.

    The scale is rounded to bf16 before it is used, so that storing it in 16 bit adds no error; 127 (1 + 2^-9) still rounds to 127.
    """
    scale = (weight.abs().amax(dim=1).clamp(min=1e-30) / 127).to(torch.bfloat16)
    return torch.round(weight / scale.float()[:, None]).to(torch.int8), scale
