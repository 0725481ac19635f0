"""The C linears, every format on every level that this processor has, against float64."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mlsys_bench.engine import formats
from mlsys_bench.engine.formats import Groups4, Rows8
from mlsys_bench.engine.native import build, library, linears
from mlsys_bench.engine.native.linears import NativeLinear
from mlsys_bench.errors import BadInput, UnknownName

pytestmark = pytest.mark.skipif(library.load() is None, reason=f"no C kernels: {library.why_not()}")
PRECISIONS = ("fp32", "bf16", "int8", "w8a8", "int4g32", "int4g64", "int4g128", "w4a8g32", "w4a8g64", "w4a8g128")
FLOATS = ("fp32", "bf16")
# half a step of the integers that stand for activations, as a share of the row's largest; 2 % for the scale's own rounding
HALF_STEP = {True: 0.51 / 127, False: 0.51 / 32600}
ROUNDING = 2.0**-20  # of fp32 sums, as a share of the sum of |x||w|: k additions of 2^-24 each would be 2^-15, they cancel mostly
MARGIN = 3


EMULATED = "amx emulated"
PAIRS = library.level_of("avx512_bf16")  # from here on the processor multiplies pairs of bf16, in an order of its own


@pytest.fixture(params=[*library.LEVELS, EMULATED])
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each level of the kernels, where the processor has it; tiles also as plain C functions, on any."""
    if request.param == EMULATED:
        path = build.built(build.EMULATED).path
        assert path is not None
        emulated = library.opened(path)
        monkeypatch.setattr(library, "load", lambda: emulated)
    c, wanted = library.need(), library.level_of(request.param.split()[0])
    before = c.cpu_level()
    if c.cpu_use(wanted) != wanted:
        c.cpu_use(before)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    c.cpu_use(before)


def gaussian(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def product(linear: NativeLinear, x: Tensor, threads: int = 1) -> Tensor:
    """Return x W^T, computed into the middle of a poisoned tensor whose rim must stay as it was."""
    y = torch.full((len(x), linear.n + MARGIN), torch.nan)
    linears.run(linear.struct, x, y[:, : linear.n], threads)
    assert y[:, linear.n :].isnan().all(), "written beyond the last output"
    return y[:, : linear.n].contiguous()


def allowed(x: Tensor, weight: Tensor, precision: str, level: str) -> Tensor:
    """Return how far each output may be off: activations by half a step each, sums by their rounding.  [M, n]"""
    x, weight = x.double(), weight.double()
    if precision == "bf16" and library.level_of(level.split()[0]) >= PAIRS:
        return (2**-9 + ROUNDING) * (x.abs() @ weight.abs().T)  # activations are rounded to 8 bits
    rounding = ROUNDING * (x.abs() @ weight.abs().T) + 1e-30
    if precision in FLOATS:
        return rounding
    step = HALF_STEP[formats.precision(precision).int8_input] * x.abs().amax(1, keepdim=True)
    return rounding + step * weight.abs().sum(1)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_linear_agrees_with_float64(precision: str, level: str) -> None:
    """Ragged shapes, any number of rows and threads, with and without bias."""
    draw = random.Random(precision)
    for case in range(10):
        n, k, m = draw.randint(1, 130), 2 * draw.randint(1, 170), draw.choice([1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 24, 25, 37, 70])
        kept = formats.quantise(gaussian(case, n, k), precision)
        bias = gaussian(case + 1, n) if case % 2 else None
        x = gaussian(case + 2, m, k) * torch.logspace(-3, 3, m)[:, None]
        weight = kept.dequantise().double()
        want = x.double() @ weight.T + (0.0 if bias is None else bias.double())
        got = product(linears.pack(kept, precision, bias), x, threads=case % 3 + 1)
        assert bool(((got - want).abs() <= allowed(x, weight, precision, level) + 2**-23 * want.abs()).all()), (n, k, m)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_its_neighbours(precision: str, level: str) -> None:
    """Alone or among any others, on any number of threads: the same bits."""
    linear = linears.pack(formats.quantise(gaussian(1, 83, 192), precision), precision)
    x = gaussian(2, 70, 192)
    alone = torch.cat([product(linear, row[None]) for row in x])
    for m in (2, 3, 4, 5, 6, 7, 8, 12, 13, 14, 15, 16, 25, 31, 70):
        assert torch.equal(product(linear, x[:m], threads=m % 3 + 1), alone[:m])
        assert torch.equal(product(linear, x[-m:], threads=1), alone[-m:])


@pytest.mark.parametrize(("m", "n", "k"), [(29, 75, 320), (530, 83, 2400)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_levels_give_the_same_bits(precision: str, m: int, n: int, k: int) -> None:
    """They add in the same order, or integers; only pairs of bf16, in vectors or tiles, have an order of their own.

    The larger of the two is more than the ways for many rows take up at a time.
    """
    c = library.need()
    linear, x = linears.pack(formats.quantise(gaussian(3, n, k), precision), precision), gaussian(4, m, k)
    best = c.cpu_level()
    if c.cpu_best() < library.level_of("avx2"):
        pytest.skip("without fused multiply-add the portable kernels round twice")
    found = {}
    for number in range(c.cpu_best() + 1):
        c.cpu_use(number)
        found[number] = product(linear, x)
    c.cpu_use(best)
    if precision == "bf16":
        found = {number: y for number, y in found.items() if number < PAIRS}
    assert all(torch.equal(y, found[0]) for y in found.values())


@pytest.mark.parametrize("precision", ["w8a8", "w4a8g32"])
def test_activations_that_are_int8_already_lose_nothing(precision: str, level: str) -> None:
    x = torch.randint(-127, 128, (9, 96), generator=torch.Generator().manual_seed(5)).float()
    x[:, 7] = 127.0  # so that the scale is 1
    kept = formats.quantise(gaussian(6, 50, 96), precision)
    want = x.double() @ kept.dequantise().double().T
    assert torch.allclose(product(linears.pack(kept, precision), x).double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("precision", ["int4", "w4a8"])
def test_zero_points_are_taken_off(group: int, precision: str, level: str) -> None:
    draw = torch.Generator().manual_seed(group)
    n, k = 37, 3 * group + 20  # the last group is short
    kept = Groups4(
        weight=torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, generator=draw),
        scale=torch.rand(n, 4, generator=draw).half(),
        zero=torch.randint(0, 16, (n, 4), dtype=torch.uint8, generator=draw),
        group=group,
    )
    x, weight = gaussian(7, 6, k), kept.dequantise()
    got = product(linears.pack(kept, f"{precision}g{group}"), x, threads=2)
    assert bool(((got - x.double() @ weight.double().T).abs() <= allowed(x, weight, f"{precision}g{group}", level)).all())


@pytest.mark.parametrize("precision", ["int8", "w8a8", "int4g32"])
def test_a_row_that_is_not_finite_gives_nothing_finite_and_harms_no_other(precision: str, level: str) -> None:
    linear = linears.pack(formats.quantise(gaussian(8, 40, 64), precision), precision)
    x = gaussian(9, 5, 64)
    want = product(linear, x)
    x[1, 3], x[3, 9] = torch.nan, torch.inf
    got = product(linear, x)
    assert torch.equal(got[[0, 2, 4]], want[[0, 2, 4]])
    assert got[[1, 3]].isnan().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_of_zeros_and_of_tiny_numbers_stay_what_they_are(precision: str, level: str) -> None:
    linear = linears.pack(formats.quantise(gaussian(10, 20, 64), precision), precision)
    got = product(linear, torch.stack([torch.zeros(64), torch.full((64,), 1e-36)]))
    assert not got[0].any()
    assert bool((got[1].abs() < 1e-33).all())


def test_extreme_integers_do_not_overflow(level: str) -> None:
    """The longest row that is taken, all weights and inputs at the end of their range."""
    k = linears.MOST_INPUTS
    kept = Rows8(weight=torch.full((1, k), 127, dtype=torch.int8), scale=torch.ones(1))
    x = torch.stack([torch.ones(k), -torch.ones(k)])
    for precision in ("int8", "w8a8"):
        assert torch.allclose(product(linears.pack(kept, precision), x)[:, 0], torch.tensor([127.0 * k, -127.0 * k]), rtol=1e-6)


def test_called_as_a_linear_it_keeps_the_type_of_its_input() -> None:
    linear = linears.pack(formats.quantise(gaussian(11, 48, 64), "int8"), "int8")
    y = linear(gaussian(12, 3, 64).bfloat16())
    assert y.dtype == torch.bfloat16
    assert linear(torch.empty(0, 64)).shape == (0, 48)
    assert sum(t.numel() * t.element_size() for t in linear.tensors()) == 48 * 64 + 2 * 4 * 48


def test_four_bits_take_four_and_a_half() -> None:
    linear = linears.pack(formats.quantise(gaussian(13, 64, 256), "int4g32"), "int4g32")
    assert 8 * sum(t.numel() * t.element_size() for t in linear.tensors()) == 4.5 * 64 * 256


def test_what_the_kernels_do_not_compute_is_refused_with_the_way_out() -> None:
    with pytest.raises(BadInput, match="--backend torch"):
        linears.pack(formats.quantise(gaussian(14, 16, 32), "fp8"), "fp8")
    with pytest.raises(BadInput, match="65536"):
        linears.pack(Rows8(weight=torch.zeros(1, 65540, dtype=torch.int8), scale=torch.ones(1)), "int8")
    with pytest.raises(UnknownName, match="avx512"):
        library.level_of("avx51")
