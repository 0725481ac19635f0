"""Copies of matrices, to be multiplied with in turn: so many that caches hold of them no more than in a step, in memory they share.

Memory that a virtual machine has not used yet comes at some 0.5 GB/s: copies of each matrix in memory of its own took most of the first
visits of a suite.  Here those of one shape lie side by side, and those of the next shape over them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mlsys_bench.engine.native.library import LinearStruct
from mlsys_bench.engine.native.linears import CACHE_LINE, NativeLinear, room

KINDS = ("weight", "scale", "zero", "start")  # of tensors that a packed matrix may have


class Shared:
    """The memory: a piece for each kind of tensor, filled with what the first matrix had of it.

    Copies hold wrong values of the right kind, then: numbers where there should be, none that a processor is slow with.
    """

    def __init__(self, likely_bytes: int) -> None:
        """Reserve so much for each kind, more where it does not suffice; what is not filled takes no memory."""
        self._likely_bytes, self._rooms, self._filled = likely_bytes, dict[str, Tensor](), dict[str, int]()

    def copy(self, first: NativeLinear, number: int) -> NativeLinear:
        """Return a matrix of the shape of the first, in memory apart from copies of other numbers, counted from 1."""
        struct, held = LinearStruct.from_buffer_copy(first.struct), []
        for kind, like in _tensors(first).items():
            whole_lines = torch.cat([like, like[: -len(like) % CACHE_LINE]]) if len(like) % CACHE_LINE else like
            each = len(whole_lines)
            held.append(self._room(kind, whole_lines, each * number)[each * (number - 1) :][: len(like)])
            setattr(struct, kind, held[-1].data_ptr())
        return NativeLinear(struct, held)

    def _room(self, kind: str, like: Tensor, size: int) -> Tensor:
        """Return the piece for a kind of tensor, so much of it filled."""
        if kind not in self._rooms or len(self._rooms[kind]) < size:
            self._rooms[kind], self._filled[kind] = room(max(2 * size, self._likely_bytes), is_filled=True), 0
        whole = self._rooms[kind]
        while self._filled[kind] < size:
            part = whole[self._filled[kind] :][: len(like)]
            part.copy_(like[: len(part)])
            self._filled[kind] += len(part)
        return whole


def pieces(held: Sequence[NativeLinear], first: int) -> Iterator[tuple[int, int]]:
    """Yield address and bytes of what a matrix and its copies hold, in pieces as large as they come, from matrix `first` round to it."""
    for run in (held[first:], held[:1], held[1:first]) if first else (held[:1], held[1:]):
        for kind, last in _tensors(run[-1]).items() if run else ():
            begin: int = getattr(run[0].struct, kind)
            apart = last.data_ptr() - begin
            if apart == (len(run) - 1) * -(-len(last) // CACHE_LINE) * CACHE_LINE:
                yield begin, apart + len(last)
            else:  # the room grew meanwhile: some lie in the one before
                yield from ((getattr(one.struct, kind), len(last)) for one in run)


def _tensors(packed: NativeLinear) -> dict[str, Tensor]:
    """Return the bytes of each kind of tensor that a matrix has."""
    by_address = {t.data_ptr(): t for t in packed.tensors()}
    return {kind: by_address[address] for kind in KINDS if (address := getattr(packed.struct, kind)) is not None}
