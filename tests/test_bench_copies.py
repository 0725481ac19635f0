"""Copies of matrices in memory that all shapes share: apart from each other, numbers all of them, and gone through once in their order."""

from __future__ import annotations

import itertools

import pytest
import torch

from mlsys_bench.bench.copies import Shared, pieces
from mlsys_bench.engine import formats
from mlsys_bench.engine.native import library
from mlsys_bench.engine.native.linears import NativeLinear, pack

pytestmark = pytest.mark.skipif(library.load() is None, reason="no C compiler on this machine")
PRECISIONS = ("fp32", "bf16", "int8", "w8a8", "int4g32", "int4g128", "w4a8g64")


def matrix(n: int, k: int, precision: str) -> NativeLinear:
    return pack(formats.quantise(torch.randn(n, k, generator=torch.Generator().manual_seed(n)), precision), precision)


def spans(of: NativeLinear) -> list[range]:
    return [range(t.data_ptr(), t.data_ptr() + len(t)) for t in of.tensors()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_copies_give_what_the_first_gives_each_from_memory_of_its_own(precision: str) -> None:
    first, x = matrix(80, 128, precision), torch.randn(3, 128)
    shared = Shared(0)
    held = [first, *(shared.copy(first, number) for number in range(1, 8))]
    every = sorted((span for each in held for span in spans(each)), key=lambda span: span.start)
    assert all(a.stop <= b.start for a, b in itertools.pairwise(every))
    assert all(torch.equal(each(x), first(x)) for each in held[-3:])  # the last reservation's: it was filled with this shape


@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_shape_lies_over_them_and_gives_numbers(precision: str) -> None:
    shared, one, other = Shared(2**20), matrix(80, 128, precision), matrix(48, 96, precision)
    ours, theirs = ([shared.copy(first, number) for number in range(1, 9)] for first in (one, other))
    assert spans(theirs[0])[0].start == spans(ours[0])[0].start
    assert all(bool(each(torch.randn(5, 96)).isfinite().all()) for each in theirs)


def test_more_than_was_reserved_is_filled_anew() -> None:
    shared, first = Shared(2**12), matrix(64, 64, "bf16")
    copies = [shared.copy(first, number) for number in range(1, 20)]
    x = torch.randn(1, 64)
    assert all(torch.equal(each(x), first(x)) for each in copies)


def test_copies_on_either_side_of_a_room_that_grew_are_gone_through_and_nothing_between() -> None:
    shared, first = Shared(2**12), matrix(64, 64, "bf16")
    held = [first, *(shared.copy(first, number) for number in range(1, 20))]
    assert len({each.tensors()[0].untyped_storage().data_ptr() for each in held}) > 2
    for begin in (0, 7):
        found = [range(address, address + size) for address, size in pieces(held, begin)]
        own = [span for each in held for span in spans(each)]
        assert all(any(piece.start <= span.start and span.stop <= piece.stop for piece in found) for span in own)
        assert sum(map(len, found)) == pytest.approx(sum(map(len, own)), rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "int4g32"])
@pytest.mark.parametrize("begin", range(6))
def test_all_is_gone_through_once_from_where_a_visit_begins_round_to_it(precision: str, begin: int) -> None:
    shared, first = Shared(2**20), matrix(80, 128, precision)
    held = [first, *(shared.copy(first, number) for number in range(1, 6))]
    found = [range(address, address + size) for address, size in pieces(held, begin)]
    at = [
        {n for n, piece in enumerate(found) for span in spans(each) if piece.start <= span.start and span.stop <= piece.stop}
        for each in held
    ]
    turn = [at[i] for i in (*range(begin, 6), *range(begin))]
    assert all(len(where) == len(spans(first)) for where in at)
    assert turn == sorted(turn, key=min)
    assert sum(map(len, found)) == pytest.approx(sum(len(span) for each in held for span in spans(each)), rel=0.02)
