"""Matrices packed for the C kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlsys_bench.engine import formats
from mlsys_bench.engine.formats import Dense, Groups4, Logical, Rows8
from mlsys_bench.engine.native import library
from mlsys_bench.engine.native.library import BF16, F32, I4, I8, ActStruct, LinearStruct
from mlsys_bench.errors import BadInput

PANEL = 16
GROUPS = (32, 64, 128)  # inputs that share a scale, in 4 bit
MOST_INPUTS = 1 << 16  # sums of u8 * s8 products stay within int32
CACHE_LINE = 64
LARGE_PAGE = 1 << 21


class NativeLinear:
    """A packed matrix.  `struct` is what C sees; it points into the tensors, which live as long as this."""

    __slots__ = ("_held", "k", "n", "struct")

    def __init__(self, struct: LinearStruct, held: Sequence[Tensor]) -> None:
        self.struct, self._held, self.n, self.k = struct, tuple(held), struct.n, struct.k

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T in the type of x.  x: [M, k]; returns [M, n].  Computes on as many threads as torch does."""
        rows = x.float().contiguous()
        y = rows.new_empty(len(rows), self.n)
        if len(rows):
            run(self.struct, rows, y, torch.get_num_threads())
        return y.to(x.dtype)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all that it holds in memory."""
        return self._held


def run(struct: LinearStruct, x: Tensor, y: Tensor, threads: int) -> None:
    """Fill y with x W^T.  x: [M, k] and y: [M, n], fp32, their rows in one piece each."""
    c = library.need()
    room = aligned(c.act_bytes(struct, len(x)))
    act = ActStruct(x=x.data_ptr(), ldx=x.stride(0), m=len(x), room=room.data_ptr())
    c.linear_run(struct, act, y.data_ptr(), y.stride(0), threads)


def aligned(size: int, to: int = CACHE_LINE) -> Tensor:
    """Return bytes that begin at a cache line, or another multiple."""
    raw = torch.empty(size + to, dtype=torch.uint8)
    return raw[-raw.data_ptr() % to :][:size]


def pack(logical: Logical, precision: str, bias: Tensor | None = None) -> NativeLinear:
    """Return a matrix packed for the C kernels.  Raises BadInput for a format they do not compute.

    bias: fp32 [n], added to every row.
    """
    library.need()
    held = [] if bias is None else [bias.detach().float().contiguous()]
    struct = LinearStruct(bias=held[0].data_ptr() if held else None)
    struct.int8_input = int(formats.precision(precision).int8_input)
    if isinstance(logical, Dense):
        held += _dense(struct, logical)
    elif isinstance(logical, Rows8):
        held += _rows8(struct, logical)
    elif isinstance(logical, Groups4):
        held += _groups4(struct, logical)
    else:
        raise BadInput(f"precision {precision}: the C kernels compute no {type(logical).__name__}; use --backend torch")
    return NativeLinear(struct, held)


def _shape(struct: LinearStruct, form: int, n: int, k: int, group: int = 0) -> int:
    """Set the shape; return the padded number of inputs."""
    if k > MOST_INPUTS:
        raise BadInput(f"a matrix of {k} inputs: the C kernels add up to {MOST_INPUTS} in 32 bit; use --backend torch")
    struct.format, struct.n, struct.k, struct.group = form, n, k, group
    return int(library.need().linear_padded_k(form, group, k))


def _panels(n: int) -> int:
    return -(-n // PANEL)


def _is_whole(n: int, k: int, padded: int) -> bool:
    return n % PANEL == 0 and k == padded


def room(size: int, *, is_filled: bool = False) -> Tensor:
    """Return bytes at a cache line, on large pages where the system has them; zeroed unless all of them will be written."""
    raw = aligned(size, LARGE_PAGE if size >= LARGE_PAGE else CACHE_LINE)  # what is never touched beside it takes no memory
    library.need().advise_large_pages(raw.data_ptr(), size)
    return raw if is_filled else raw.zero_()


def _dense(struct: LinearStruct, logical: Dense) -> list[Tensor]:
    weight = logical.weight.contiguous()
    form, size = (BF16, 2) if weight.dtype == torch.bfloat16 else (F32, 4)
    n, k = weight.shape
    padded = _shape(struct, form, n, k)
    packed = room(_panels(n) * PANEL * padded * size, is_filled=_is_whole(n, k, padded))
    library.need().pack_rows(weight.data_ptr(), n, k, size, padded, packed.data_ptr())
    struct.weight = packed.data_ptr()
    return [packed]


def _rows8(struct: LinearStruct, logical: Rows8) -> list[Tensor]:
    weight = logical.weight.contiguous()
    n, k = weight.shape
    padded = _shape(struct, I8, n, k)
    packed = room(_panels(n) * PANEL * padded, is_filled=_is_whole(n, k, padded))
    scale, start = (room(_panels(n) * PANEL * 4) for _ in range(2))
    scale.view(torch.float32)[:n] = logical.scale
    library.need().pack_rows(weight.data_ptr(), n, k, 1, padded, packed.data_ptr())
    library.need().pack_starts(weight.data_ptr(), n, k, start.data_ptr())
    struct.weight, struct.scale, struct.start = packed.data_ptr(), scale.data_ptr(), start.data_ptr()
    return [packed, scale, start]


def _groups4(struct: LinearStruct, logical: Groups4) -> list[Tensor]:
    weight, group = logical.weight.contiguous(), logical.group
    if group not in GROUPS:
        raise BadInput(f"groups of {group} inputs: the C kernels know groups of {', '.join(map(str, GROUPS))}; use --backend torch")
    n, k = len(weight), 2 * weight.shape[1]
    groups, padded = -(-k // group), _shape(struct, I4, n, k, group)
    panels, padded_groups = _panels(n), padded // group
    packed = room(panels * PANEL * padded // 2, is_filled=_is_whole(n, k, padded))
    scale = room(panels * PANEL * 2 * padded_groups)
    c = library.need()
    c.pack_nibbles(weight.data_ptr(), n, k, padded, packed.data_ptr())
    c.pack_groups(logical.scale.contiguous().data_ptr(), n, groups, 2, padded_groups, scale.data_ptr())
    struct.weight, struct.scale = packed.data_ptr(), scale.data_ptr()
    if logical.zero is None:
        return [packed, scale]
    zero = room(panels * PANEL * padded_groups)
    c.pack_groups(logical.zero.contiguous().data_ptr(), n, groups, 1, padded_groups, zero.data_ptr())
    struct.zero = zero.data_ptr()
    return [packed, scale, zero]
