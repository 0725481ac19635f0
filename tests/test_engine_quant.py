"""Linear layers of torch against float64, over ragged shapes, and how far each is from exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from mlsys_bench.engine import formats, quant
from mlsys_bench.engine.formats import Dense, Groups4
from mlsys_bench.engine.quant import FEW_ROWS, SMALL_M, activation_dtype, pack
from mlsys_bench.errors import UnknownName
from mlsys_bench.models.precision import ENGINE_PRECISIONS

CPU = torch.device("cpu")
# Error allowed against float64 on just what is stored, as a share of the norm.  fp32: rounding of sums.  Where torch's kernel or the type
# of x is bf16: input and output rounded to 8 bits, 2^-9 / sqrt(3) each at most = 0.16 %.  int4: its scales are rounded to bf16 too.
COMPUTING = {"fp32": 1e-6, "bf16": 4e-3, "int8": 4e-3, "w8a8": 4e-3, "fp8": 4e-3, "int4": 6e-3, "w4a8": 6e-3}
# And against a Gaussian weight before it was rounded.  int8: a step of max / 127 is 0.7 % of a row's size rms (max ~ 3.3 sd, step /
# sqrt(12)), w8a8 that twice; int4: scale is max / 8, max of 128 ~ 2.8 sd, step / sqrt(12) = 10 %; fp8: half of 2^-3 / sqrt(12) = 2.6 %.
# A row of 130 outputs shows that with a spread of 1 / sqrt(130) = 9 %: three of those on top.
ROUNDING = {"fp32": 1e-6, "bf16": 4e-3, "int8": 1e-2, "w8a8": 1.4e-2, "fp8": 3.4e-2, "int4": 0.13, "w4a8": 0.13}
ROWS = sorted({1, 2, FEW_ROWS[0], SMALL_M, SMALL_M + 1, FEW_ROWS[-1] + 1, 200})


def gaussian(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def bound(bounds: dict[str, float], precision: str) -> float:
    return bounds[precision.partition("g")[0]]


def stored_product(weight: torch.Tensor, x: torch.Tensor, precision: str) -> torch.Tensor:
    """Return in float64 what a linear should compute: the weight as stored and, in w8a8 and w4a8, activations as rounded."""
    if formats.precision(precision).int8_input:
        scale = x.float().abs().amax(1, keepdim=True) / 127  # in fp32: x = max / 2 is a tie, and falls where fp32 lets it
        x = (x.float() / scale).round().double() * scale.double()
    return x.double() @ formats.quantise(weight, precision).dequantise().double().T


@pytest.mark.parametrize("precision", ENGINE_PRECISIONS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("inputs", "outputs"), [(384, 192), (1152, 130), (48, 320)])
def test_a_linear_agrees_with_float64(precision: str, rows: int, inputs: int, outputs: int) -> None:
    weight, x = gaussian(1, outputs, inputs), gaussian(2, rows, inputs).to(activation_dtype(precision))
    got = pack(weight, precision, CPU)(x)
    assert got.shape == (rows, outputs)
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    assert relative_error(got, stored_product(weight, x, precision)) < bound(COMPUTING, precision)
    assert relative_error(got, x.double() @ weight.double().T) < bound(ROUNDING, precision)


@pytest.mark.parametrize("precision", ENGINE_PRECISIONS)
def test_wide_blocks_of_a_matrix_are_put_together_again(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = gaussian(20, 330, 96), gaussian(21, SMALL_M + 5, 96)
    whole = pack(weight, precision, CPU)(x)
    monkeypatch.setattr(quant, "WIDENED_ELEMENTS", 96 * 70)
    assert relative_error(pack(weight, precision, CPU)(x), whole.double()) < 1e-6


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(ENGINE_PRECISIONS), st.integers(1, 40), st.integers(1, 90), st.integers(1, 150), st.booleans(), st.integers(0, 9999))
def test_any_shape_agrees_with_float64(precision: str, rows: int, outputs: int, pairs: int, is_wide: bool, seed: int) -> None:
    """Ragged in every direction, in both types of x; single outputs may cancel, so the norm of all is the measure."""
    weight = gaussian(seed, outputs, 2 * pairs)
    x = gaussian(seed + 1, rows, 2 * pairs).to(torch.float32 if is_wide else torch.bfloat16)
    want = stored_product(weight, x, precision)
    size = float(x.double().norm() * weight.double().norm())  # no product is larger
    allowed = bound(COMPUTING, precision) if is_wide else max(4e-3, bound(COMPUTING, precision))
    assert float((pack(weight, precision, CPU)(x).double() - want).norm()) < 2 * allowed * size


@pytest.mark.parametrize("precision", ["w8a8", "w4a8g32"])
def test_rows_of_very_different_size_are_rounded_each_by_its_own_scale(precision: str) -> None:
    weight, x = gaussian(3, 96, 256), gaussian(4, 6, 256) * torch.tensor([1e-4, 1.0, 1e4, 3.0, 1e-2, 0.0])[:, None]
    got, want = pack(weight, precision, CPU)(x), x.double() @ weight.double().T
    errors = [(float((g - w).norm() / w.norm())) for g, w in zip(got.double()[:5], want, strict=False)]
    assert max(errors) < bound(ROUNDING, precision)
    assert not got[5].any(), "a row of zeros gives zeros"


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
def test_w8a8_adds_integers_exactly(rows: int) -> None:
    """With scales of 1 the result is a sum of integers below 2^24, so fp32 holds it exactly; extremes are among the values."""
    weight = torch.randint(-127, 128, (37, 515), generator=torch.Generator().manual_seed(rows), dtype=torch.int8)
    x = torch.randint(-127, 128, (rows, 515), generator=torch.Generator().manual_seed(rows + 1)).float()
    weight[0], x[:, 0], x[0] = 127, 127.0, -127.0
    kept = formats.Rows8(weight=weight, scale=torch.ones(37))
    assert torch.equal(pack(kept, "w8a8", CPU)(x).double(), x.double() @ weight.double().T)


@pytest.mark.skipif(not quant.exact_ways(), reason="no library is exact on this processor")
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_two_digits_keep_activations_to_15_bits(rows: int) -> None:
    """A step is max / 32385; max ~ 3 sd of 300 values, so rounding is 3 / 32385 / sqrt(12) = 2.7e-5 of a row's size."""
    weight, x = gaussian(22, 70, 300), gaussian(23, rows, 300)
    assert relative_error(pack(weight, "int8", CPU)(x), stored_product(weight, x, "int8")) < 6e-5


def test_the_largest_activation_of_a_row_is_in_both_digits() -> None:
    """All of a row the same, of either sign: each is the row's largest."""
    x = torch.ones(2, 64) * torch.tensor([[3.7], [-0.01]])
    got = pack(torch.ones(5, 64), "int8", CPU)(x)
    assert relative_error(got, (64 * x[:, :1]).double().expand(2, 5)) < 1e-2


@pytest.mark.parametrize("rows", [3, 40])
def test_int8_without_an_exact_operator_computes_the_same(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's kernel, which is in bf16, and widened; 320 inputs suit the kernel, 300 do not."""
    monkeypatch.setattr(quant, "exact_ways", lambda: ())
    for inputs in (320, 300):
        weight, x = gaussian(24, 70, inputs), gaussian(25, rows, inputs)
        assert relative_error(pack(weight, "int8", CPU)(x), stored_product(weight, x, "int8")) < COMPUTING["int8"]


@pytest.mark.parametrize("rows", [1, 4, 33])
def test_libraries_give_the_same_bits(rows: int) -> None:
    """Sums are exact, and both multiply them by one scale."""
    weight = torch.randint(-127, 128, (70, 515), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    q, scale = torch.randint(-127, 128, (rows, 515), generator=torch.Generator().manual_seed(2)).float(), gaussian(3, 70, 1)[:, 0].abs()
    found = [way(weight, scale)(q.clone()) for way in quant.exact_ways()]
    wanted = (q.double() @ weight.double().T * scale.double()).float()
    assert all(torch.equal(y, found[0]) and relative_error(y, wanted.double()) < 1e-7 for y in found)


@pytest.mark.skipif(quant.Onednn not in quant.exact_ways(), reason="oneDNN is not exact on this processor")
@pytest.mark.parametrize("tiles", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_onednn_is_exact_with_signed_and_with_unsigned_bytes(rows: int, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles take signed bytes, VNNI unsigned ones with a zero point and four rows at least: each is right everywhere, if not fast."""
    monkeypatch.setattr(quant, "has_tiles", lambda: tiles)
    weight = torch.randint(-127, 128, (70, 515), generator=torch.Generator().manual_seed(4), dtype=torch.int8)
    q = torch.randint(-127, 128, (rows, 515), generator=torch.Generator().manual_seed(5)).float()
    got = quant.Onednn(weight, torch.ones(70))(q.clone())
    assert torch.equal(got.double(), q.double() @ weight.double().T)


def test_w8a8_without_an_exact_operator_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = gaussian(5, 70, 300), gaussian(6, 9, 300)
    by_library = pack(weight, "w8a8", CPU)(x)
    monkeypatch.setattr(quant, "exact_ways", lambda: ())
    assert relative_error(pack(weight, "w8a8", CPU)(x), by_library.double()) < 1e-6


@pytest.mark.parametrize("precision", ["int4g32", "w4a8g128"])
def test_int4_without_torch_s_kernel_computes_the_same(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = gaussian(7, 70, 300), gaussian(8, 3, 300).bfloat16()
    by_kernel = pack(weight, precision, CPU)(x)
    monkeypatch.setattr(quant, "int4_kernel_reads_blocks", lambda: False)
    assert relative_error(pack(weight, precision, CPU)(x), by_kernel.double()) < 4e-3


@pytest.mark.parametrize("rows", [2, 60])
def test_int4_with_zero_points_agrees_with_float64(rows: int) -> None:
    """An offset is rounded to bf16 as well: 2^-9 of up to 8 steps, beside a step / sqrt(12)."""
    drawn = torch.Generator().manual_seed(9)
    kept = Groups4(
        weight=torch.randint(0, 256, (50, 64), generator=drawn, dtype=torch.uint8), scale=torch.rand(50, 4, generator=drawn).half(),
        zero=torch.randint(0, 17, (50, 4), generator=drawn, dtype=torch.uint8), group=32,
    )  # fmt: skip
    x = gaussian(10, rows, 128)
    assert relative_error(pack(kept, "int4g32", CPU)(x), x.double() @ kept.dequantise().double().T) < 6e-3


def test_a_matrix_kept_in_another_format_stays_in_it() -> None:
    """Checkpoints leave their head in 16 bit."""
    linear = pack(Dense(weight=gaussian(11, 8, 16).bfloat16()), "int4g32", CPU)
    assert isinstance(linear, quant.Bf16)
    assert not isinstance(linear, quant.Fp32)


@pytest.mark.parametrize(
    ("precision", "wanted"), [("int8", 64 * 256 + 4 * 64), ("w8a8", 64 * 256 + 4 * 64), ("int4g32", 64 * (128 + 4 * 8))]
)
def test_a_holder_takes_the_memory_it_says(precision: str, wanted: int) -> None:
    held = pack(gaussian(12, 64, 256), precision, CPU).tensors()
    assert sum(t.numel() * t.element_size() for t in held) == wanted


def test_activations_are_rounded_to_the_nearest_of_255_levels() -> None:
    x = torch.tensor([[12.7, -12.7, 0.04, 0.06], [0.0, 0.0, 0.0, 0.0]])
    q, scale = quant.quantise_tokens(x)
    assert q.tolist() == [[127.0, -127.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert scale.tolist() == [[pytest.approx(0.1)], [pytest.approx(quant.LEAST_SCALE)]]


def test_an_unknown_precision_names_the_known() -> None:
    with pytest.raises(UnknownName, match="int8"):
        activation_dtype("int7")


def test_blocks_are_rows_of_low_and_high_halves() -> None:
    nibbles = torch.arange(64, dtype=torch.uint8)[:, None].repeat(1, 2) % 16
    assert quant.pack_blocks(nibbles).view(2, 32)[0].tolist() == [(n % 16) * 17 for n in range(32)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ENGINE_PRECISIONS)
@pytest.mark.parametrize("rows", [1, 20, 200])
def test_a_linear_on_a_gpu_agrees_with_float64(precision: str, rows: int) -> None:
    """fp8 rounds activations as well there: 2.6 % twice."""
    device = torch.device("cuda:0")
    weight, x = gaussian(13, 768, 512), gaussian(14, rows, 512).to(activation_dtype(precision))
    got = pack(weight, precision, device)(x.to(device)).cpu()
    assert relative_error(got, x.double() @ weight.double().T) < 1.5 * bound(ROUNDING, precision)


def test_poison_in_fresh_memory_does_not_reach_the_result() -> None:
    """Padding of inputs and outputs is written, not left as it was: memory is filled with NaN and given back before each product."""
    weight, x = gaussian(15, 33, 70), gaussian(16, 5, 70)
    for precision in ENGINE_PRECISIONS:
        linear = pack(weight, precision, CPU)
        for size in (5 * 33, 5 * 64, 5 * 70, 5 * 96, 5 * 128, 33 * 70):
            torch.full((size,), torch.nan)
        assert bool(torch.isfinite(linear(x)).all()), precision


def test_padding_of_x_is_not_multiplied_with_what_lies_beside_it() -> None:
    """A view into a wider, poisoned buffer gives what its own values give, but for the order of sums, which is a library's own affair."""
    wide = torch.full((7, 200), torch.nan)
    wide[:, :70] = gaussian(17, 7, 70)
    weight = gaussian(18, 40, 70)
    for precision in ENGINE_PRECISIONS:
        linear = pack(weight, precision, CPU)
        assert relative_error(linear(wide[:, :70]), linear(wide[:, :70].clone()).double()) < 1e-6, precision


def test_a_holder_of_a_matrix_that_is_no_whole_block_gives_back_its_own_outputs() -> None:
    kept = formats.groups4(gaussian(19, 65, 32), 32)
    one = pack(kept, "int4g32", CPU)(torch.eye(32))
    many = pack(dataclasses.replace(kept), "int4g32", CPU)(functional.pad(torch.eye(32), (0, 0, 0, 30)))
    assert one.shape == (32, 65)
    assert relative_error(many[:32], one.double()) < 6e-3
