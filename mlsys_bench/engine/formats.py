"""Number formats of matrices, each in one logical layout that every backend packs for itself: `quantise` makes them, round-to-nearest.

| precision | kept as | activations of its products |
|---|---|---|
| `fp32`, `bf16` | `Dense` | float |
| `int8` | `Rows8`: int8, symmetric, one scale per output row | float |
| `w8a8` | the same | int8, symmetric, one scale per token |
| `int4g32`, `int4g64`, `int4g128` (`int4`) | `Groups4`: 4 bit, a 16-bit scale per 32, 64 or 128 inputs | float |
| `w4a8g32`, `w4a8g64`, `w4a8g128` (`w4a8`) | the same | int8, symmetric, one scale per token |
| `fp8` | `Rows8f`: e4m3, one scale per output row | on a GPU fp8, one scale per token; elsewhere float |

Four bits hold -8 .. 7.  The scale of a group is its value of the largest size, sign and all, divided by -8 (as in the Q4_0 of llama.cpp):
this value is then exact and all 16 levels are in use; max / 7 would leave one out.  The others are off by half a step at most, but those
that fall nearest to the missing 8: by a whole step at worst, for one just as large as the largest with the other sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlsys_bench import errors
from mlsys_bench.errors import BadInput
from mlsys_bench.models.precision import ENGINE_ALIASES, ENGINE_PRECISIONS

ZERO = 8  # the nibble that means 0 where a group names no other
FP8_MAX = 448.0  # of e4m3fn
# steps per largest value that are tried for a scale, the plain -8 first: of equals the first is taken
SEARCHED = (-8.0, -7.75, -7.5, -7.25, -7.0, -8.25, -8.5, -8.75, -9.0, -9.25, -9.5, -9.75, -10.0, -10.5)
_TINY = 1e-30  # a row of zeros is divided by this rather than by zero


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """What a precision's name says about matrices and their activations."""

    name: str
    weight: Literal["fp32", "bf16", "int8", "int4", "fp8"]
    group: int | None = None  # inputs per scale, of int4
    int8_input: bool = False  # activations are quantised to int8, one scale per token

    @property
    def activations(self) -> torch.dtype:
        """The type of activations between the matrices, and of the KV cache unless that is named apart."""
        return torch.float32 if self.weight == "fp32" else torch.bfloat16


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A matrix as it is.  weight: [N, K], fp32 or bf16."""

    weight: Tensor

    def dequantise(self) -> Tensor:
        """Return the fp32 weight [N, K]."""
        return self.weight.float()

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return _bytes(self.weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """A scale per output row: weight ~ kept * scale."""

    weight: Tensor
    scale: Tensor

    def dequantise(self) -> Tensor:
        """Return the fp32 weight [N, K]."""
        return self.weight.float() * self.scale[:, None]

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return _bytes(self.weight, self.scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows8(_Rows):
    """int8 with a scale per output row.  weight: [N, K] int8; scale: [N] fp32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups4:
    """4 bit with a scale per `group` inputs: weight ~ (nibble - zero) * scale.  The last group of a row may be shorter.

    weight: [N, K/2] uint8, the low nibble is the even input; scale: [N, ceil(K/group)] fp16; zero: the same in uint8, None where all are 8.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    group: int

    def integers(self) -> Tensor:
        """Return nibble - zero as int8 [N, K]: -15 .. 15, without zero points -8 .. 7."""
        nibbles = torch.stack((self.weight & 15, self.weight >> 4), dim=2).view(self.weight.shape[0], -1).to(torch.int8)
        return nibbles.sub_(ZERO if self.zero is None else spread(self.zero.to(torch.int8), self.group, nibbles.shape[1]))

    def dequantise(self) -> Tensor:
        """Return the fp32 weight [N, K]."""
        integers = self.integers()
        return integers.float().mul_(spread(self.scale.float(), self.group, integers.shape[1]))

    @property
    def nbytes(self) -> int:
        """What it takes in memory."""
        return _bytes(self.weight, self.scale, *(() if self.zero is None else (self.zero,)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows8f(_Rows):
    """fp8 with a scale per output row.  weight: [N, K] float8_e4m3fn; scale: [N] fp32."""


Logical = Dense | Rows8 | Groups4 | Rows8f


def precision(name: str) -> Precision:
    """Return what a name means; `int4` and `w4a8` are those in groups of 128.  Raises UnknownName."""
    full = ENGINE_ALIASES.get(name, name)
    if full not in ENGINE_PRECISIONS:
        raise errors.unknown("engine precision", name, (*ENGINE_PRECISIONS, *ENGINE_ALIASES))
    head, _, group = full.rpartition("g")
    if head in ("int4", "w4a8"):
        return Precision(name=full, weight="int4", group=int(group), int8_input=head == "w4a8")
    if full == "w8a8":
        return Precision(name=full, weight="int8", int8_input=True)
    kept: dict[str, Literal["fp32", "bf16", "int8", "fp8"]] = {"fp32": "fp32", "bf16": "bf16", "int8": "int8", "fp8": "fp8"}
    return Precision(name=full, weight=kept[full])


def quantise(weight: Tensor, name: str | Precision) -> Logical:
    """Return a matrix rounded to the nearest in a precision.  weight: [N, K] fp32."""
    to = precision(name) if isinstance(name, str) else name
    if to.group is not None:
        return groups4(weight, to.group)
    if to.weight == "int8":
        return rows8(weight)
    if to.weight == "fp8":
        return rows8f(weight)
    return Dense(weight=weight.to(to.activations))


def rows8(weight: Tensor) -> Rows8:
    """Return int8, symmetric per row.

    The scale is rounded to bf16 before it is used, so that a backend may store it in 16 bit without adding an error; 127 (1 + 2^-9) still
    rounds to 127.
    """
    scale = (weight.abs().amax(dim=1).clamp(min=_TINY) / 127).bfloat16().float()
    return Rows8(weight=torch.round(weight / scale[:, None]).to(torch.int8), scale=scale)


def rows8f(weight: Tensor) -> Rows8f:
    """Return fp8 e4m3 whose largest value per row is the format's largest."""
    scale = weight.abs().amax(dim=1).clamp(min=_TINY) / FP8_MAX
    return Rows8f(weight=(weight / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale=scale)


def groups4(weight: Tensor, group: int) -> Groups4:
    """Return 4 bit, symmetric per `group` inputs."""
    return with_scales(weight, scales4(weight, group), group)


def with_scales(weight: Tensor, scale: Tensor, group: int) -> Groups4:
    """Return 4 bit in steps of given scales [N, ceil(K/group)] fp16."""
    integers = nearest4(weight, spread(scale.float(), group, weight.shape[1]))
    return Groups4(weight=pack_nibbles(integers), scale=scale, zero=None, group=group)


def scales4(weight: Tensor, group: int) -> Tensor:
    """Return the fp16 scale of each group [N, ceil(K/group)]: its largest value by size, with its sign, / -8."""
    return (_largest(weight, group) / -8).to(torch.float16)


def searched_scales4(weight: Tensor, group: int, importance: Tensor) -> Tensor:
    """Return the fp16 scale of each group that rounds it with the least squared error, tried from the largest / -7 to the largest / -10.5.

    importance: [K] what an input's squared error counts: its mean square makes the error that of the outputs, were inputs independent.
    """
    largest, best = _largest(weight, group), torch.empty(0)
    least = torch.full_like(largest, torch.inf)
    for denominator in SEARCHED:
        scale = (largest / denominator).to(torch.float16)
        step = spread(scale.float(), group, weight.shape[1])
        error = grouped((nearest4(weight, step) * step - weight).square_() * importance, group).sum(dim=2)
        best = torch.where(error < least, scale, best) if len(best) else scale
        least = torch.minimum(least, error)
    return best


def _largest(weight: Tensor, group: int) -> Tensor:
    """Return the value of the largest size of each group, with its sign."""
    parts = grouped(weight, group)
    return parts.gather(2, parts.abs().argmax(dim=2, keepdim=True))[:, :, 0]


def nearest4(weight: Tensor, step: Tensor) -> Tensor:
    """Return the int8 values -8 .. 7 [N, K] that are nearest in steps [N, K]; 0 where a step is 0."""
    return torch.where(step == 0, 0.0, weight / step).round_().clamp_(-8, 7).to(torch.int8)


def pack_nibbles(integers: Tensor) -> Tensor:
    """Return values -8 .. 7 as nibbles: [N, K] int8 to [N, K/2] uint8, the low one first.  Raises BadInput for an odd K."""
    if integers.shape[1] % 2:
        raise BadInput(f"a matrix of {integers.shape[1]} inputs cannot be kept in 4 bit: two share a byte; take int8")
    nibbles = (integers + ZERO).to(torch.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4)


def grouped(weight: Tensor, group: int) -> Tensor:
    """Return [N, ceil(K/group), group], the last group filled up with zeros."""
    short = -weight.shape[1] % group
    return torch.nn.functional.pad(weight, (0, short)).view(weight.shape[0], -1, group)


def spread(per_group: Tensor, group: int, inputs: int) -> Tensor:
    """Return a value per group as one per input: [N, ceil(K/group)] to [N, K]."""
    return per_group.repeat_interleave(group, dim=1)[:, :inputs]


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
