"""Linear layers on torch's own operators: what the engine computes with where there is no compiler and no Triton.

Each holder keeps one matrix of `formats` and maps x [M, in] to [M, out], in the type of x (fp32 or bf16).

| holder | few rows on a CPU | many rows on a CPU | on a GPU |
|---|---|---|---|
| `Fp32`, `Bf16` | F.linear | F.linear | F.linear |
| `Int8` | FBGEMM or oneDNN, activations in two digits; else torch's int8 kernel | the same; else widened | widened |
| `W8A8` | FBGEMM or oneDNN, else widened: exact integer sums | the same | `_int_mm` |
| `Int4`, also W4A8 | torch's int4 kernel | widened block by block | widened |
| `Fp8` | widened block by block | the same | `_scaled_mm` |
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench.engine import formats
from mlsys_bench.engine.formats import FP8_MAX, ZERO, Dense, Groups4, Logical, Precision, Rows8, Rows8f
from mlsys_bench.errors import BadInput

FEW_ROWS = range(4, 65)  # see Fp32
INT4_SMALL_M = 128  # the same of int4, which is dearer to widen
SMALL_M = 24  # up to here torch's kernels, which read int8 or int4 row by row, cost less than widening once (Cascade Lake, one thread)
WIDENED_ELEMENTS = 1 << 20  # a block of fp32 weights of 4 MB is reused out of the cache
UNSIGNED_ZERO = 128  # see Onednn
ONEDNN_ROWS = 4  # fewer are no faster, and two, a token of Int8, slower: 1 at 13 GB/s, 2 at 11, 4 at 15.5 (Zen 4, one thread)
LEAST_SCALE = 1e-30  # of activations: a row of zeros stays one
RADIX = 254  # digits -127 .. 127: see Int8


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
    return formats.precision(precision).activations


def pack(weight: Logical | Tensor, precision: str | Precision, device: torch.device) -> Linear:
    """Return the holder of a matrix in a number format, or of an fp32 tensor, which is rounded to the nearest in that precision.

    A matrix that is kept in another format than the precision's stays in it; 8- and 4-bit ones take int8 activations where the precision
    says so.
    """
    to = formats.precision(precision) if isinstance(precision, str) else precision
    kept = formats.quantise(weight, to) if isinstance(weight, Tensor) else weight
    if isinstance(kept, Dense):
        return (Fp32 if kept.weight.dtype == torch.float32 else Bf16)(kept.weight.to(device))
    if isinstance(kept, Rows8):
        return (W8A8 if to.int8_input else Int8)(kept, device)
    if isinstance(kept, Groups4):
        return (W4A8 if to.int8_input else Int4)(kept, device)
    return Fp8(kept, device)


def quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return activations as integers -127 .. 127, in fp32, and their scale: x ~ q * scale.  x: [M, K]; q: [M, K]; scale: [M, 1] fp32."""
    wide = x.float()
    scale = _scale(wide, 127)
    return (wide / scale).round_(), scale


def _scale(x: Tensor, levels: float) -> Tensor:
    """Return each row's largest size / levels, LEAST_SCALE at least.  x: [M, K] fp32; returns [M, 1].

    16 µs for 32 rows of 2,048 where `linalg.vector_norm` takes 180, whose largest is no vector code (torch 2.13, one thread of a Zen 4).
    """
    return x.abs().amax(dim=1, keepdim=True).div_(levels).clamp_(min=LEAST_SCALE)


class Bf16:
    """A weight as it is, multiplied by the library's own kernel."""

    __slots__ = ("weight",)

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        return functional.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the weight."""
        return (self.weight,)


class Fp32(Bf16):
    """A weight in full precision."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T; a few rows on a CPU as (W x^T)^T, which MKL does in 0.7 of the time (8 rows, Cascade Lake, one thread)."""
        wide = x.float()
        if x.shape[0] in FEW_ROWS and not x.is_cuda:
            return torch.mm(self.weight, wide.t().contiguous()).t().contiguous().to(x.dtype)
        return functional.linear(wide, self.weight).to(x.dtype)


class Int8:
    """int8 weights, activations as they are (W8A16): multiplied as two digits of 8 bit, which keep them to 2^-15 of the row's largest.

    The digits are rows of one product, and few rows cost what reading the weight costs, so the second digit is nearly free.  Where no
    library is exact: torch's kernel for few rows, which computes in bf16, and for many W widened block by block.
    """

    __slots__ = ("has_kernel", "product", "scale", "weight")

    def __init__(self, kept: Rows8, device: torch.device) -> None:
        ways = exact_ways() if device.type == "cpu" else ()
        self.product = ways[0](kept.weight.contiguous(), kept.scale) if ways else None
        # what a library has packed has a size here, but no address
        self.weight = kept.weight.contiguous().to("meta" if ways else device)
        self.scale = kept.scale.to(device)
        self.has_kernel = kept.weight.shape[1] % 32 == 0  # for 34 inputs torch's kernel reads beyond the matrix, and crashes

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        if self.product is not None:
            return self._by_digits(self.product, x.float()).to(x.dtype)
        if x.is_cuda:
            return functional.linear(x, self.weight.to(x.dtype)).mul_(self.scale)
        if self.has_kernel and x.shape[0] <= SMALL_M:
            return torch._weight_int8pack_mm(x.bfloat16().contiguous(), self.weight, self.scale.bfloat16()).to(x.dtype)
        return _times(x.float(), self.weight).mul_(self.scale).to(x.dtype)

    def _by_digits(self, product: Onednn | Fbgemm, x: Tensor) -> Tensor:
        scale = _scale(x, 127 * RADIX + 126)  # one more would be a tie, and go up to a digit of 128
        q = (x / scale).round_()
        high = (q / RADIX).round_()
        sums = product(torch.cat((high, q.sub_(high, alpha=RADIX))))
        return sums[len(x) :].add_(sums[: len(x)], alpha=RADIX).mul_(scale)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return weight and scales."""
        return self.weight, self.scale


class W8A8(Int8):
    """int8 weights and int8 activations, one scale per token: sums of integers, exact."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T, x rounded to 8 bit."""
        q, scale = quantise_tokens(x)
        if self.product is not None:
            return self.product(q).mul_(scale).to(x.dtype)
        sums = _integer_mm(q, self.weight) if x.is_cuda else _times(q, self.weight)
        return sums.mul_(self.scale).mul_(scale).to(x.dtype)


class Int4:
    """4-bit weights in groups, activations as they are (W4A16).

    Kept as torch's kernel wants them: blocks of 64 outputs, in each one row of 32 bytes per input, the low nibbles outputs 0 .. 31.  Its
    scales and offsets are bf16, which moves a weight by up to 2^-9 of its group's scale per step from zero; it computes in bf16.
    """

    __slots__ = ("group", "inputs", "offsets", "on_cpu", "outputs", "weight")

    def __init__(self, kept: Groups4, device: torch.device) -> None:
        outputs, inputs = kept.weight.shape[0], 2 * kept.weight.shape[1]
        self.outputs, self.inputs, self.group = outputs, inputs, kept.group
        short_k, short_n = -inputs % kept.group, -outputs % BLOCK
        nibbles = torch.stack((kept.weight & 15, kept.weight >> 4), dim=2).view(outputs, inputs)
        self.weight = pack_blocks(functional.pad(nibbles, (0, short_k, 0, short_n))).to(device)
        scale = kept.scale.float()
        offset = torch.zeros_like(scale) if kept.zero is None else (ZERO - kept.zero.float()) * scale
        offsets = functional.pad(torch.stack((scale, offset), dim=2), (0, 0, 0, 0, 0, short_n))  # [N, groups, 2]
        self.offsets = offsets.transpose(0, 1).contiguous().to(device=device, dtype=torch.bfloat16)
        self.on_cpu = device.type == "cpu"

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        x_padded = functional.pad(x, (0, -self.inputs % self.group))
        if self.on_cpu and x.shape[0] <= INT4_SMALL_M and int4_kernel_reads_blocks():
            y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_padded.bfloat16().contiguous(), self.weight, self.group, self.offsets)
            return y[:, : self.outputs].to(x.dtype).contiguous()
        wide = x_padded.float()
        y = torch.cat([wide @ some for some in self._widened()])  # [blocks, M, 64]
        return y.transpose(0, 1).flatten(1)[:, : self.outputs].to(x.dtype).contiguous()

    def _widened(self) -> Iterator[Tensor]:
        """Yield W^T in fp32, some blocks at a time: [blocks, K, 64]."""
        groups = self.offsets.shape[0]
        packed = self.weight.view(-1, groups, self.group, BLOCK // 2)
        for some, offsets in zip(*(torch.split(t, self._at_once()) for t in (packed, self._by_block())), strict=True):
            scale, offset = offsets.float().unsqueeze(2).unbind(dim=4)  # [blocks, groups, 1, 64]
            nibbles = torch.cat((some & 15, some >> 4), dim=3).float()
            yield torch.addcmul(offset.sub_(scale, alpha=ZERO), nibbles, scale).flatten(1, 2)

    def _at_once(self) -> int:
        return max(1, WIDENED_ELEMENTS // (self.offsets.shape[0] * self.group * BLOCK))

    def _by_block(self) -> Tensor:
        """Return scales and offsets [blocks, groups, 64, 2]."""
        return self.offsets.view(self.offsets.shape[0], -1, BLOCK, 2).transpose(0, 1)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return weight, scales and offsets."""
        return self.weight, self.offsets


class W4A8(Int4):
    """4-bit weights and int8 activations, one scale per token; integers to 127 are exact in bf16, so that `Int4` multiplies them."""

    __slots__ = ()

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T, x rounded to 8 bit."""
        q, scale = quantise_tokens(x)
        return super().__call__(q).mul_(scale).to(x.dtype)


class Fp8:
    """e4m3 weights with a scale per output.  On a GPU activations are fp8 too, one scale per token; elsewhere they stay as they are."""

    __slots__ = ("scale", "weight")

    def __init__(self, kept: Rows8f, device: torch.device) -> None:
        self.weight, self.scale = kept.weight.contiguous().to(device), kept.scale.to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        if x.is_cuda and _has_fp8_units(x.device) and not any(size % 16 for size in self.weight.shape):
            return self._scaled(x)
        return _times(x.float(), self.weight).mul_(self.scale).to(x.dtype)

    def _scaled(self, x: Tensor) -> Tensor:
        wide = x.float()
        scale = _scale(wide, FP8_MAX)
        rounded = (wide / scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        y = torch._scaled_mm(rounded, self.weight.t(), scale_a=scale, scale_b=self.scale[None], out_dtype=torch.bfloat16)
        return y.to(x.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return weight and scales."""
        return self.weight, self.scale


# ---------------------------------------------------------------- products


def _times(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T in fp32, W widened block by block: without AVX512-BF16 a GEMM in bf16 is slower than the conversion.  x: [M, K] fp32."""
    rows = max(1, WIDENED_ELEMENTS // weight.shape[1])
    return torch.cat([functional.linear(x, block.float()) for block in torch.split(weight, rows)], dim=1)


class Onednn:
    """An int8 matrix as oneDNN multiplies it: on VNNI, and on AMX, the fastest for many rows.

    Tiles multiply signed bytes and read a weight as fast for one row as for sixteen.  VNNI multiplies unsigned by signed (signed by signed
    falls to reference code there, 600 times slower), so integers go in with 128 added, named as their zero point, and in four rows.
    """

    __slots__ = ("no_zeros", "packed", "scale")

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        """Pack.  weight: int8 [N, K]; scale: fp32 [N]."""
        self.packed: Tensor = torch.ops.onednn.qlinear_prepack(weight, None)
        self.scale, self.no_zeros = scale, torch.zeros(len(scale), dtype=torch.int64)

    def __call__(self, q: Tensor) -> Tensor:
        """Return q W^T * scale in fp32.  q: integers -127 .. 127 in fp32, changed in place."""
        if has_tiles():
            return self._times(q.to(torch.int8), 0)
        unsigned = torch.zeros(max(ONEDNN_ROWS, len(q)), q.shape[1], dtype=torch.uint8)
        unsigned[: len(q)].copy_(q.add_(UNSIGNED_ZERO))
        return self._times(unsigned, UNSIGNED_ZERO)[: len(q)]

    def _times(self, q: Tensor, zero: int) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            q, 1.0, zero, self.packed, self.scale, self.no_zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )  # fmt: skip
        return y


class Fbgemm:
    """An int8 matrix as FBGEMM multiplies it: reads it 1.5 times as fast as oneDNN for few rows, and is 0.8 times as fast for many.

    The same bits, and one call instead of six.  torch means to give up the quantised tensors that it is packed from: then it is not exact.
    """

    __slots__ = ("packed",)

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        """Pack.  weight: int8 [N, K]; scale: fp32 [N]."""
        engines: Any = torch.backends.quantized  # its engine is a property of the module's class, which types do not tell
        before = engines.engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that they will be given up
            try:
                engines.engine = "fbgemm"
                stored = torch._make_per_channel_quantized_tensor(weight, scale.double(), torch.zeros(len(scale), dtype=torch.int64), 0)
                self.packed = torch.ops.quantized.linear_prepack(stored, None)
            finally:
                engines.engine = before

    def __call__(self, q: Tensor) -> Tensor:
        """Return q W^T * scale in fp32.  q: integers -127 .. 127 in fp32."""
        y: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(q, 1.0, UNSIGNED_ZERO, self.packed)
        return y


@functools.cache
def exact_ways() -> tuple[type[Onednn | Fbgemm], ...]:
    """Return the libraries whose products of bytes are exact on this processor (AVX2 saturates sums of two), the better one first."""
    found = tuple(way for way in (Fbgemm, Onednn) if _is_exact(way))
    return found[::-1] if has_tiles() else found  # FBGEMM knows no tiles


@functools.cache
def has_tiles() -> bool:
    """Say whether torch's libraries multiply bytes in AMX tiles here."""
    return bool(torch.cpu._is_amx_tile_supported())


def _is_exact(way: type[Onednn | Fbgemm]) -> bool:
    weight = torch.full((16, 64), 127, dtype=torch.int8)
    q = torch.tensor([[127.0], [-127.0], [-127.0]]).repeat(1, 64)
    want = q @ weight.float().T
    try:
        got = way(weight, torch.ones(16))(q)
    except (RuntimeError, AttributeError):  # this build of torch has no such operator: that, too, is a no
        return False
    return torch.equal(got, want)


def _integer_mm(q: Tensor, weight: Tensor) -> Tensor:
    """Return q W^T on a GPU in fp32, exact where its integer product takes the shape.  q: integers in fp32."""
    inputs, outputs = weight.shape[1], weight.shape[0]
    if inputs % 8 or outputs % 8:
        return functional.linear(q, weight.float())
    rows = q.shape[0]
    padded = functional.pad(q.to(torch.int8), (0, 0, 0, max(0, 32 - rows)))  # it takes more than 16 rows
    return torch._int_mm(padded, weight.t())[:rows].float()


def _has_fp8_units(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


# ---------------------------------------------------------------- blocks of torch's int4 kernel

BLOCK = 64


def pack_blocks(nibbles: Tensor) -> Tensor:
    """Return nibbles [N, K] (uint8, N a multiple of 64) as blocks of 64 outputs: [N, K/2]."""
    outputs, inputs = nibbles.shape
    if outputs % BLOCK:
        raise BadInput(f"{outputs} outputs are no whole blocks of {BLOCK}")
    across = nibbles.view(-1, BLOCK, inputs).transpose(1, 2)  # [blocks, K, 64]
    return (across[:, :, : BLOCK // 2] | (across[:, :, BLOCK // 2 :] << 4)).reshape(outputs, -1).contiguous()


@functools.cache
def int4_kernel_reads_blocks() -> bool:
    """Say whether torch's int4 kernel on this processor wants the layout of `pack_blocks`: it differs between instruction sets."""
    nibbles = torch.randint(0, 16, (2 * BLOCK, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    try:
        wanted = torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1)
    except (RuntimeError, AttributeError):
        return False
    return torch.equal(wanted, pack_blocks(nibbles))
