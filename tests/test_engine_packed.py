"""AWQ, GPTQ and compressed-tensors matrices against a dequantisation by their definitions, one weight at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.engine import packed
from mlsys_bench.errors import BadInput
from tests.sample_checkpoints import words

shapes = st.tuples(st.integers(1, 4), st.integers(1, 5), st.sampled_from((8, 16, 32)), st.integers(0, 10_000))


def drawn(shape: tuple[int, int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Return q [K, N] and z [K/g, N] in 0 .. 15, s [K/g, N] in fp16, and g."""
    n, groups, group, seed = shape
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (groups * group, 8 * n), generator=generator)
    z = torch.randint(0, 16, (groups, 8 * n), generator=generator)
    return q, z, (torch.rand(groups, 8 * n, generator=generator) * 0.1).half(), group


def expected(q: torch.Tensor, z: torch.Tensor, s: torch.Tensor, group_of: Callable[[int], int]) -> torch.Tensor:
    """Return (q - z) s, weight by weight: [N, K] fp64."""
    inputs, outputs = q.shape
    value = [[(int(q[k, n]) - int(z[group_of(k), n])) * float(s[group_of(k), n]) for k in range(inputs)] for n in range(outputs)]
    return torch.tensor(value, dtype=torch.float64)


@settings(max_examples=12)
@given(shapes)
def test_awq_is_read_as_it_was_meant(shape: tuple[int, int, int, int]) -> None:
    """AutoAWQ's gemm layout: the nibbles of a word are outputs 0, 2, 4, 6, 1, 3, 5, 7."""
    q, z, s, group = drawn(shape)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    got = packed.awq(words(q, order), words(z, order), s)
    assert got.group == group
    assert torch.equal(got.dequantise().double(), expected(q, z, s, lambda k: k // group))


@settings(max_examples=12)
@given(shapes, st.booleans())
def test_gptq_is_read_as_it_was_meant(shape: tuple[int, int, int, int], is_v2: bool) -> None:
    """Eight inputs in a word; the first version stores zero points less one, of which 0 is no valid one."""
    q, z, s, group = drawn(shape)
    z = z if is_v2 else z.clamp(min=1)
    got, order = packed.gptq(words(q.t()).t(), words(z if is_v2 else z - 1), s, None, is_v2=is_v2, name="m")
    assert order is None
    assert torch.equal(got.dequantise().double(), expected(q, z, s, lambda k: k // group))


@settings(max_examples=12)
@given(shapes)
def test_gptq_with_act_order_gives_columns_in_an_order_of_their_own(shape: tuple[int, int, int, int]) -> None:
    q, z, s, group = drawn(shape)
    g_idx = (torch.arange(len(q)) // group)[torch.randperm(len(q), generator=torch.Generator().manual_seed(shape[3]))]
    got, order = packed.gptq(words(q.t()).t(), words(z), s, g_idx.int(), is_v2=True, name="m")
    columns = got.dequantise().double()
    if order is not None:
        columns = torch.empty_like(columns).index_copy_(1, order, columns)
    assert torch.equal(columns, expected(q, z, s, lambda k: int(g_idx[k])))


def test_symmetric_matrices_need_no_zero_points() -> None:
    q, z, s, _ = drawn((2, 3, 16, 1))
    assert packed.awq(words(q), words(torch.full_like(z, 8)), s).zero is None
    assert packed.gptq(words(q.t()).t(), words(torch.full_like(z, 7)), s, None, is_v2=False, name="m")[0].zero is None
    assert packed.awq(words(q), words(z), s).zero is not None


def test_groups_of_unequal_size_are_refused() -> None:
    q, z, s, _ = drawn((1, 2, 8, 1))
    with pytest.raises(BadInput, match=r"layer\.g_idx: groups of 7 to 9 inputs; all of a matrix must have 8"):
        packed.gptq(words(q.t()).t(), words(z), s, torch.tensor([0] * 9 + [1] * 7), is_v2=True, name="layer")


@settings(max_examples=12)
@given(shapes, st.booleans())
def test_compressed_int4_is_read_as_it_was_meant(shape: tuple[int, int, int, int], has_zeros: bool) -> None:
    """Signed values with 8 added, inputs in words of eight; zero points the same, eight outputs in a word."""
    q, z, s, group = drawn(shape)
    z = z if has_zeros else torch.full_like(z, 8)
    zeros = words(z).t().contiguous() if has_zeros else None
    got = packed.compressed4(words(q.t()), s.t().contiguous(), zeros, inputs=len(q))
    assert torch.equal(got.dequantise().double(), expected(q, z, s, lambda k: k // group))


@pytest.mark.parametrize("scales", [(5, 1), (1,)])
def test_compressed_fp8_is_read_as_it_was_meant(scales: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, scale = torch.randn(5, 12, generator=generator).to(torch.float8_e4m3fn), torch.rand(scales, generator=generator)
    got = packed.compressed8f(weight, scale).dequantise()
    assert torch.equal(got, weight.float() * scale.reshape(-1, 1))
