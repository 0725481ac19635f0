"""Linear layers against a float64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.engine.quant import FEW_ROWS, PRECISIONS, SMALL_M, activation_dtype, pack, quantise
from mlsys_bench.errors import UnknownName

CPU = torch.device("cpu")
# Share of the output's norm.  fp32: rounding of sums.  bf16: weight, input and output rounded to 8 bits, 2^-9 / sqrt(3) each = 0.2 %.
# int8: a step of max / 127 is 0.7 % of a Gaussian row's size rms (max ~ 3.3 sd, step / sqrt(12)), plus bf16 input and output.
TOLERANCE = {"fp32": 1e-6, "bf16": 4e-3, "int8": 1e-2}
ROWS = sorted({1, 2, FEW_ROWS[0], SMALL_M, SMALL_M + 1, FEW_ROWS[-1] + 1, 200})


def gaussian(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 768), (1152, 512), (64, 320)])
def test_a_linear_agrees_with_float64(precision: str, rows: int, inputs: int, outputs: int) -> None:
    weight, x = gaussian(1, outputs, inputs), gaussian(2, rows, inputs)
    got = pack(weight, precision, CPU)(x.to(activation_dtype(precision)))
    assert got.shape == (rows, outputs)
    assert got.dtype == activation_dtype(precision)
    assert got.is_contiguous()
    assert relative_error(got, x.double() @ weight.double().T) < TOLERANCE[precision]


@pytest.mark.parametrize("rows", ROWS)
def test_int8_multiplies_exactly_what_it_stores(rows: int) -> None:
    """Apart from quantisation only bf16 rounding of the output is left, whichever kernel runs."""
    weight, x = gaussian(3, 300, 128), gaussian(4, rows, 128).bfloat16()
    stored, scale = quantise(weight)
    want = x.double() @ (stored.double() * scale.double()[:, None]).T
    assert relative_error(pack(weight, "int8", CPU)(x), want) < 2**-8


@settings(deadline=None)
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6), st.integers(1, 40), st.integers(1, 40))
def test_quantising_is_off_by_half_a_step_at_most(seed: int, size: float, outputs: int, inputs: int) -> None:
    weight = gaussian(seed, outputs, inputs) * size
    stored, scale = quantise(weight)
    step = scale.double()[:, None]
    assert stored.abs().max() <= 127
    assert bool(((stored.double() * step - weight.double()).abs() <= 0.5001 * step).all())
    assert bool((scale.double() * 127 <= weight.abs().amax(1).double() * 1.01).all()), "the scale is not larger than it must be"


def test_a_row_of_zeros_stays_zero() -> None:
    stored, scale = quantise(torch.zeros(2, 8))
    assert not stored.any()
    assert bool(torch.isfinite(scale).all())


def test_int8_holds_one_byte_per_weight_and_two_per_row() -> None:
    held = pack(gaussian(5, 64, 256), "int8", CPU).tensors()
    assert sum(t.numel() * t.element_size() for t in held) == 64 * 256 + 2 * 64


def test_an_unknown_precision_names_the_known() -> None:
    with pytest.raises(UnknownName, match="int8"):
        activation_dtype("int7")
