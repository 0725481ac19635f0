"""Matrices on a GPU: `pack` makes of a logical format what its kernels read, and every matrix can fuse what stands before and after it.

| rows | int8 | int4 | fp8 | bf16, fp32 |
|---|---|---|---|---|
| few (`ways.FEW`) | Triton, fp32 products, 8-bit words | the same, 4-bit words | Triton, fp32 products | Triton, fp32 products |
| up to 64 | Triton, tensor cores on the same words | the same | Triton, tensor cores, activations in bf16 | the same; fp32: cuBLAS |
| more | words widened to bf16, cuBLAS | the same | `_scaled_mm`, activations fp8, a scale per token | cuBLAS |

W8A8 and W4A8, and every format where Triton is missing, are torch's holders of `quant`, with plain norms and activations around them.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench.engine import formats, quant
from mlsys_bench.engine.formats import Dense, Groups4, Logical, Precision, Rows8, Rows8f
from mlsys_bench.engine.gpu import kernels_linear as kernels
from mlsys_bench.engine.gpu import small, tri, ways
from mlsys_bench.engine.gpu.ways import Way


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """RMSNorm before a matrix: x / sqrt(sum x^2 + K eps), times gain where that is not in the columns."""

    eps: float
    gain: Tensor | None = None  # [K], fp32, times sqrt(K)


class GpuLinear(ABC):
    """A matrix [n, k] that multiplies rows on a GPU."""

    n: int
    k: int
    dtype: torch.dtype  # of what it gives

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T in the type of x.  x: [M, k]."""
        return self.run(x).to(x.dtype)

    @abstractmethod
    def run(
        self, x: Tensor, *, norm: Norm | None = None, gated: bool = False, onto: Tensor | None = None, bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """Return norm(x) W^T + bias, of `gated` silu(gate) * up [M, n/2]; or add it to `onto` [M, n] fp32, in place, and return that.

        x: [M, k] contiguous, fp32 or `dtype`, which is also the type of the result.
        """

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """Return all that it holds in memory."""


class Plain(GpuLinear):
    """Any holder, with its norm before and its activation or residual after in operations of their own."""

    def __init__(self, held: quant.Linear, n: int, k: int, dtype: torch.dtype) -> None:
        """Wrap what multiplies."""
        self.held, self.n, self.k, self.dtype = held, n, k, dtype

    def run(
        self, x: Tensor, *, norm: Norm | None = None, gated: bool = False, onto: Tensor | None = None, bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the product with all that is asked for around it."""
        return after(self.held(before(x, norm, self.dtype)), gated=gated, onto=onto, bias=bias, dtype=dtype or self.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return what is held."""
        return self.held.tensors()


def before(x: Tensor, norm: Norm | None, dtype: torch.dtype) -> Tensor:
    """Return x, normed if so asked, in the type of the products."""
    return x.to(dtype) if norm is None else small.rms_norm(x, norm.eps, norm.gain, dtype)


def after(y: Tensor, *, gated: bool, onto: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return a product with its bias, gated or added to the residual stream."""
    if bias is not None:
        y = y + bias.to(y.dtype)
    if onto is not None:
        return onto.add_(y)
    return small.swiglu(y, dtype) if gated else y.to(dtype)


class Triton(GpuLinear, ABC):
    """What the kernels of `kernels_linear` multiply; a subclass knows its layout, and the product of many rows."""

    form: str
    element_bytes = 2  # of a weight that is kept as it is

    def way(self, rows: int) -> Way:
        """Return how so many rows are multiplied."""
        return ways.default(self.form, rows, self.n, self.k, multiprocessors(self.tensors()[0].device), self.element_bytes)

    def run(
        self, x: Tensor, *, norm: Norm | None = None, gated: bool = False, onto: Tensor | None = None, bias: Tensor | None = None,
        dtype: torch.dtype | None = None, way: Way | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the product, in one kernel where rows are few.  way: another than its own, to be compared."""
        rows, kept = x.shape[0], dtype or self.dtype
        way = way or self.way(rows)
        if way.kind == "wide" or rows > way.bm:
            return after(self.wide(before(x, norm, self.dtype)), gated=gated, onto=onto, bias=bias, dtype=kept)
        y = onto if onto is not None else torch.empty(rows, self.n // 2 if gated else self.n, dtype=kept, device=x.device)
        common = {"half": self.n // 2, "GATED": gated, "ADD": onto is not None, "BM": way.bm, "BN": way.bn}
        tiles = tri.cdiv(self.n // 2, way.bn // 2) if gated and way.bn > 1 else tri.cdiv(self.n, way.bn)
        if way.kind == "gemv":
            if gated and way.bn == 1:
                way, tiles = Way("gemv", bm=way.bm, bn=2, bk=way.bk), self.n // 2
                common["BN"] = 2
            normed = {"gain": norm.gain if norm else None, "eps_k": self.k * norm.eps if norm else 0.0, "NORM": norm is not None}
            self.gemv((tiles,), way, x.contiguous(), bias, y, rows, {**common, **normed, "num_warps": way.warps})
            return y
        parts, arrived = workspace(x.device, tiles * way.splits * way.bn * way.bm, tiles)
        split = {"parts": parts, "arrived": arrived, "SPLITS": way.splits, "num_warps": way.warps, "num_stages": way.stages}
        self.gemm((tiles, way.splits), way, before(x, norm, self.dtype).contiguous(), bias, y, rows, {**common, **split})
        return y

    @abstractmethod
    def gemv(self, grid: tuple[int, ...], way: Way, x: Tensor, bias: Tensor | None, y: Tensor, rows: int, how: dict[str, Any]) -> None:
        """Launch the kernel without tensor cores."""

    @abstractmethod
    def gemm(self, grid: tuple[int, ...], way: Way, x: Tensor, bias: Tensor | None, y: Tensor, rows: int, how: dict[str, Any]) -> None:
        """Launch the kernel with tensor cores."""

    @abstractmethod
    def wide(self, x: Tensor) -> Tensor:
        """Return x W^T for many rows."""


class Words(Triton):
    """int8 or int4 in packed words.  words: [n, ...] int32; scale: [n] fp32, or [n, groups] fp16; zero: [n, groups] uint8."""

    def __init__(self, kept: Rows8 | Groups4, device: torch.device, dtype: torch.dtype) -> None:
        """Pack."""
        self.dtype = dtype
        if isinstance(kept, Rows8):
            integers, self.group, self.zero, self.fields, self.form = kept.weight.to(torch.int16) + 128, 0, None, 4, "int8"
            self.scale = kept.scale.float().to(device)
        else:
            integers = torch.stack((kept.weight & 15, kept.weight >> 4), dim=2).view(kept.weight.shape[0], -1).to(torch.int16)
            self.group, self.fields, self.form = kept.group, 8, "int4"
            self.zero = None if kept.zero is None else kept.zero.contiguous().to(device)
            self.scale = kept.scale.contiguous().to(device)
        self.n, self.k = integers.shape
        self.words = pack_words(integers, 32 // self.fields).to(device)

    def gemv(self, grid: tuple[int, ...], way: Way, x: Tensor, bias: Tensor | None, y: Tensor, rows: int, how: dict[str, Any]) -> None:
        """Launch gemv_words."""
        kernels.gemv_words[grid](
            x=x, w=self.words, scale=self.scale, zero=self.zero, bias=bias, y=y, M=rows, N=self.n, K=self.k,
            FIELDS=self.fields, GROUP=self.group, BW=way.bk, **how,
        )  # fmt: skip

    def gemm(self, grid: tuple[int, ...], way: Way, x: Tensor, bias: Tensor | None, y: Tensor, rows: int, how: dict[str, Any]) -> None:
        """Launch gemm_words."""
        kernels.gemm_words[grid](
            x=x, w=self.words, scale=self.scale, zero=self.zero, bias=bias, y=y, M=rows, N=self.n, K=self.k,
            FIELDS=self.fields, GROUP=self.group, BW=way.bk, **how,
        )  # fmt: skip

    def wide(self, x: Tensor) -> Tensor:
        """Return x W^T by cuBLAS, W widened first."""
        return functional.linear(x, self.widened(x.dtype))

    def widened(self, dtype: torch.dtype) -> Tensor:
        """Return W as floats [n, k]."""
        out = torch.empty(self.n, self.k, dtype=dtype, device=self.words.device)
        bn, bw = 16, 128
        grid = tri.cdiv(self.n, bn), tri.cdiv(self.words.shape[1], bw)
        kernels.widen_words[grid](
            w=self.words, scale=self.scale, zero=self.zero, out=out, N=self.n, K=self.k, FIELDS=self.fields, GROUP=self.group, BN=bn, BW=bw
        )
        return out

    def tensors(self) -> tuple[Tensor, ...]:
        """Return words, scales and zeros."""
        return (self.words, self.scale, *(() if self.zero is None else (self.zero,)))


class Rows(Triton):
    """A matrix as it is: bf16, fp16 or fp32, or fp8 with a scale per row."""

    def __init__(self, kept: Dense | Rows8f, device: torch.device, dtype: torch.dtype) -> None:
        """Hold it.  dtype: of activations; that of the matrix where it has no scale."""
        self.weight = kept.weight.contiguous().to(device)
        self.scale = kept.scale.float().to(device) if isinstance(kept, Rows8f) else None
        self.n, self.k = self.weight.shape
        self.form = "fp8" if isinstance(kept, Rows8f) else "dense"
        self.dtype = dtype if isinstance(kept, Rows8f) else self.weight.dtype
        self.element_bytes = self.weight.element_size() if self.scale is None else 2
        self.many: quant.Linear = (
            quant.Bf16(self.weight) if self.scale is None else quant.Fp8(Rows8f(weight=self.weight, scale=self.scale), device)
        )

    def gemv(self, grid: tuple[int, ...], way: Way, x: Tensor, bias: Tensor | None, y: Tensor, rows: int, how: dict[str, Any]) -> None:
        """Launch gemv_rows."""
        kernels.gemv_rows[grid](
            x=x, w=self.weight, scale=self.scale, bias=bias, y=y, M=rows, N=self.n, K=self.k,
            VEC=16 // self.weight.element_size(), BK=way.bk, **how,
        )  # fmt: skip

    def gemm(self, grid: tuple[int, ...], way: Way, x: Tensor, bias: Tensor | None, y: Tensor, rows: int, how: dict[str, Any]) -> None:
        """Launch gemm_rows."""
        kernels.gemm_rows[grid](x=x, w=self.weight, scale=self.scale, bias=bias, y=y, M=rows, N=self.n, K=self.k, BK=way.bk, **how)

    def wide(self, x: Tensor) -> Tensor:
        """Return x W^T by the library; of fp8 in fp8, where the processor and the shape allow."""
        return self.many(x)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return weight and scales."""
        return (self.weight,) if self.scale is None else (self.weight, self.scale)


def pack_words(integers: Tensor, bits: int) -> Tensor:
    """Return unsigned integers [N, K] as int32 words [N, 4 ceil(K / chunk)]; a chunk is 4 words, field j of word c its input 4 j + c."""
    fields = 32 // bits
    padded = functional.pad(integers, (0, -integers.shape[1] % (4 * fields)))
    chunks = padded.view(padded.shape[0], -1, fields, 4)
    words = torch.zeros(*chunks.shape[:2], 4, dtype=torch.int32, device=integers.device)
    for field in range(fields):
        words |= chunks[:, :, field].int() << (bits * field)
    return words.view(padded.shape[0], -1)


def pack(logical: Logical, precision: str | Precision, device: torch.device, dtype: torch.dtype | None = None) -> GpuLinear:
    """Return what multiplies a matrix on this device: Triton's kernels, or torch's holder where they have none or Triton is missing.

    dtype: of activations, by default the precision's.
    """
    to = formats.precision(precision) if isinstance(precision, str) else precision
    kept = dtype or to.activations
    if to.int8_input or not tri.IS_INSTALLED or not (device.type == "cuda" or tri.is_interpreted()):
        return Plain(quant.pack(logical, to, device), logical.weight.shape[0], inputs(logical), kept)
    if isinstance(logical, Rows8 | Groups4):
        return Words(logical, device, kept)
    return Rows(logical, device, kept)


def inputs(logical: Logical) -> int:
    """Return the K of a matrix."""
    return logical.weight.shape[1] * (2 if isinstance(logical, Groups4) else 1)


def packer(precision: str, device: torch.device, dtype: torch.dtype | None = None) -> Callable[[Logical], GpuLinear]:
    """Return `pack` for one precision and device, as `weights.build` wants it."""
    to = formats.precision(precision)
    return lambda logical: pack(logical, to, device, dtype)


_SPACE: dict[torch.device, tuple[Tensor, Tensor]] = {}


def workspace(device: torch.device, floats: int, counters: int) -> tuple[Tensor, Tensor]:
    """Return memory for partial sums, and counters that are 0 before and after every kernel.  Kernels of one stream share it."""
    parts, arrived = _SPACE.get(device, (None, None))
    if parts is None or arrived is None or len(parts) < floats or len(arrived) < counters:
        _SPACE[device] = parts, arrived = _fresh(device, max(floats, 1 << 22), max(counters, 1 << 16))
    return parts, arrived


def _fresh(device: torch.device, floats: int, counters: int) -> tuple[Tensor, Tensor]:
    return torch.empty(floats, dtype=torch.float32, device=device), torch.zeros(counters, dtype=torch.int32, device=device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many the device has; in the interpreter few, so that tests split work as a GPU would."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
