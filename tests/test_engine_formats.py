"""Number formats: how far rounding moves a weight, what a format takes in memory, and what names mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import models
from mlsys_bench.engine import formats
from mlsys_bench.engine.formats import Groups4, Rows8, precision, quantise
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.models.precision import ENGINE_ALIASES, ENGINE_PRECISIONS

SIZES = st.tuples(st.integers(1, 40), st.integers(1, 100).map(lambda half: 2 * half))


def gaussian(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), SIZES)
def test_int8_is_off_by_half_a_step_at_most(seed: int, size: float, shape: tuple[int, int]) -> None:
    weight = gaussian(seed, *shape) * size
    kept = formats.rows8(weight)
    step = kept.scale.double()[:, None]
    assert kept.weight.abs().max() <= 127
    assert bool(((kept.dequantise().double() - weight.double()).abs() <= 0.5001 * step).all())
    assert bool((kept.scale.double() * 127 <= weight.abs().amax(1).double() * 1.01).all()), "the scale is not larger than it must be"
    assert torch.equal(kept.scale, kept.scale.bfloat16().float()), "a backend may keep it in 16 bit"


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-3, 1e3), SIZES, st.sampled_from([32, 64, 128]))
def test_int4_is_off_by_half_a_step_but_near_the_level_that_is_missing(
    seed: int, size: float, shape: tuple[int, int], group: int
) -> None:  # fmt: skip
    """In steps of its scale a weight lies in [-8, 8], up to 2^-11 of 8 steps by which the scale is rounded; 7 is the last level."""
    weight = gaussian(seed, *shape) * size
    kept = formats.groups4(weight, group)
    scale = formats.spread(kept.scale.double(), group, shape[1])
    steps = weight.double() / scale
    off = (kept.dequantise().double() - weight.double()).abs() / scale.abs()
    assert bool((off <= torch.where(steps > 7.5, steps - 7, torch.tensor(0.5)) + 0.005).all())
    assert bool((off <= 1.005).all())


def test_the_largest_weight_of_a_group_is_kept_exactly_where_its_eighth_is_a_number_of_16_bit() -> None:
    weight = torch.tensor([[4.0, -1.0, 0.5, 0.0, -8.0, 7.0, 8.0, 1.0]])
    kept = formats.groups4(weight, 4)
    assert kept.scale.tolist() == [[-0.5, 1.0]]
    assert kept.dequantise().tolist() == [[4.0, -1.0, 0.5, 0.0, -8.0, 7.0, 7.0, 1.0]], "8 is not among -8 .. 7"
    assert kept.weight.tolist() == [[0xA0, 0x87, 0xF0, 0x9F]], "value + 8, the even input in the low nibble"


def test_zero_points_are_taken_off() -> None:
    kept = Groups4(
        weight=torch.tensor([[0x10, 0xFE]], dtype=torch.uint8), scale=torch.tensor([[2.0, 0.5]], dtype=torch.float16),
        zero=torch.tensor([[1, 15]], dtype=torch.uint8), group=2,
    )  # fmt: skip
    assert kept.dequantise().tolist() == [[-2.0, 0.0, -0.5, 0.0]]
    assert kept.nbytes == 2 + 2 * 2 + 2


@settings(deadline=None)
@given(st.integers(0, 10_000), SIZES)
def test_fp8_is_off_by_a_sixteenth_of_a_weight_at_most(seed: int, shape: tuple[int, int]) -> None:
    """e4m3 has 3 bits after the point: half a step is 2^-4 of a normal value, and 2^-10 of the scale for those below 2^-6."""
    weight = gaussian(seed, *shape)
    kept = formats.rows8f(weight)
    bound = torch.maximum(weight.abs().double() / 16, kept.scale.double()[:, None] * 2**-10)
    assert bool(((kept.dequantise().double() - weight.double()).abs() <= bound * 1.001).all())


@pytest.mark.parametrize("name", ENGINE_PRECISIONS)
def test_zeros_stay_zeros(name: str) -> None:
    assert not quantise(torch.zeros(3, 64), name).dequantise().any()


@pytest.mark.parametrize("name", [*ENGINE_PRECISIONS, *ENGINE_ALIASES])
def test_a_format_takes_what_is_counted_for_it(name: str) -> None:
    """The count of `models` leaves out a scale per row: 4 bytes in 1024."""
    kept = quantise(gaussian(1, 256, 1024), name)
    assert kept.nbytes == pytest.approx(models.bytes_per_param(name) * 256 * 1024, rel=0.005)
    assert kept.nbytes >= models.bytes_per_param(name) * 256 * 1024


def test_the_last_group_of_a_row_may_be_short() -> None:
    weight = gaussian(2, 5, 192)
    kept = quantise(weight, "int4g128")
    assert isinstance(kept, Groups4)
    assert kept.scale.shape == (5, 2)
    tail = quantise(weight[:, 128:].contiguous(), "int4g64").dequantise()
    assert torch.equal(kept.dequantise()[:, 128:], tail)


def test_an_odd_number_of_inputs_is_refused_in_4_bit() -> None:
    with pytest.raises(BadInput, match="two share a byte"):
        quantise(torch.zeros(2, 33), "int4g32")


@pytest.mark.parametrize(
    ("name", "weight", "group", "int8_input"),
    [("int8", "int8", None, False), ("w8a8", "int8", None, True), ("int4g64", "int4", 64, False), ("int4", "int4", 128, False),
     ("w4a8g32", "int4", 32, True), ("w4a8", "int4", 128, True), ("fp8", "fp8", None, False), ("bf16", "bf16", None, False)],
)  # fmt: skip
def test_a_name_says_weights_groups_and_activations(name: str, weight: str, group: int | None, int8_input: bool) -> None:
    found = precision(name)
    assert (found.weight, found.group, found.int8_input) == (weight, group, int8_input)
    assert found.activations == torch.bfloat16


def test_only_fp32_has_activations_in_fp32() -> None:
    assert [name for name in ENGINE_PRECISIONS if precision(name).activations == torch.float32] == ["fp32"]


@pytest.mark.parametrize(("wrong", "near"), [("int4g46", "int4g64"), ("w8a16", "w8a8"), ("fp16", "fp8|bf16")])
def test_an_unknown_precision_names_its_neighbours(wrong: str, near: str) -> None:
    with pytest.raises(UnknownName, match=near):
        precision(wrong)


def test_w8a8_keeps_the_same_weights_as_int8() -> None:
    weight = gaussian(3, 20, 70)
    one, other = quantise(weight, "int8"), quantise(weight, "w8a8")
    assert isinstance(one, Rows8)
    assert isinstance(other, Rows8)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.scale, other.scale)
