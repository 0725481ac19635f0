"""What the GPU engine decides and lays out on the host: packed words, ways, tiles, inputs of a step, its cache.  No GPU, no Triton."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from mlsys_bench import models
from mlsys_bench.engine import backend, build, flight, formats, kv, memory, spec
from mlsys_bench.engine.gpu import attention, graphs, linears, small, tri, ways
from mlsys_bench.engine.gpu import kernels_linear as kernels
from mlsys_bench.engine.gpu import model as gpu_model
from mlsys_bench.engine.gpu.kv import GpuKV
from mlsys_bench.engine.gpu.linears import Norm
from mlsys_bench.engine.gpu.ways import Way
from mlsys_bench.engine.requests import Sequence
from mlsys_bench.engine.runner import Step
from mlsys_bench.engine.sampling import sampling
from mlsys_bench.engine.tokenizer import ByteTokenizer
from mlsys_bench.errors import BadInput, MlsysError

CPU = torch.device("cpu")
NANO = models.find("nano")


# ---------------------------------------------------------------- packed words


@given(st.sampled_from([4, 8]), st.integers(1, 5), st.integers(1, 100), st.integers(0, 2**31))
def test_packed_words_hold_every_input_where_the_kernels_look(bits: int, rows: int, inputs: int, seed: int) -> None:
    """Field j of word c of a chunk is input 4 j + c of it; beyond the last input there are zeros."""
    integers = torch.randint(0, 1 << bits, (rows, inputs), generator=torch.Generator().manual_seed(seed))
    words = linears.pack_words(integers.to(torch.int16), bits).numpy().view(np.uint32)
    fields = 32 // bits
    at = np.arange(words.shape[1])
    assert words.shape[1] % 4 == 0
    for field in range(fields):
        k = at // 4 * 4 * fields + 4 * field + at % 4
        want = np.where(k < inputs, np.take(integers.numpy(), np.minimum(k, inputs - 1), axis=1), 0)
        assert ((words >> (bits * field) & ((1 << bits) - 1)) == want).all()


def test_a_masked_word_is_a_float_that_is_linear_in_its_field() -> None:
    """The kernels multiply subnormals and first normals as they are: bits below 2^24 read as a float are the integer times 2^-149."""
    bits = torch.tensor([0, 1, 15 << 20, 255 << 16, (1 << 24) - 1], dtype=torch.int32)
    assert torch.equal(bits.view(torch.float32).double(), bits.double() * 2.0**-149)


# ---------------------------------------------------------------- ways


@given(st.sampled_from(["int8", "int4", "fp8", "dense"]), st.integers(1, 200), st.integers(1, 200_000), st.integers(1, 30_000))
def test_every_product_has_a_way_that_covers_it(form: str, rows: int, n: int, k: int) -> None:
    way = ways.default(form, rows, n, k)
    if way.kind == "wide":
        assert rows > ways.SOME
        return
    assert way.bm >= rows
    for size in (way.bm, way.bn, way.bk):
        assert size == tri.power_of_2(size)
    assert way.kind == ("gemv" if rows <= ways.FEW[form] else "gemm")
    assert 1 <= way.splits <= 16


def test_fp32_never_takes_tensor_cores() -> None:
    assert {ways.default("dense", rows, 4096, 4096, element_bytes=4).kind for rows in range(1, 100)} == {"gemv", "wide"}


@pytest.mark.parametrize(("form", "k"), [("int8", 4096), ("int4", 4096), ("dense", 4096)])
def test_one_row_of_an_8b_matrix_fills_an_h200(form: str, k: int) -> None:
    """Enough programs for four on each multiprocessor, each thread with several 16-byte loads in flight."""
    way = ways.default(form, 1, 4096, k)
    assert 4096 // way.bn >= 3 * ways.SMS
    assert way.bn >= 4


# ---------------------------------------------------------------- matrices without Triton


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "w8a8", "int4g32", "fp8"])
def test_without_a_gpu_torch_multiplies_and_everything_around_it_is_there(precision: str) -> None:
    """Relative errors: bf16 rounds activations and results to 2^-9 each, W8A8 activations to 1/127 of the largest."""
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0)) / 8
    kept = formats.quantise(weight, precision)
    held = linears.Plain(linears.quant.pack(kept, precision, CPU), 24, 64, formats.precision(precision).activations)
    x, bias = torch.randn(3, 64), torch.randn(24)
    gain = torch.rand(64)
    normed = x.double() / (x.double().square().sum(1, keepdim=True) + 64e-5).sqrt() * gain
    want = normed @ kept.dequantise().double().T + bias
    loose = 1e-5 if precision == "fp32" else 0.03

    def off(got: Tensor, right: Tensor) -> float:
        return float((got.double() - right).norm() / right.norm())

    norm = Norm(eps=1e-5, gain=gain)
    assert off(held.run(x, norm=norm, bias=bias, dtype=torch.float32), want) < loose
    gate, up = want.chunk(2, dim=1)
    assert off(held.run(x, norm=norm, bias=bias, gated=True, dtype=torch.float32), functional.silu(gate) * up) < 2 * loose
    seen = torch.randn(3, 24)
    total = seen.double() + x.double() @ kept.dequantise().double().T
    assert held.run(x, onto=seen) is seen
    assert off(seen, total) < loose


def test_the_norm_without_triton_adds_and_picks() -> None:
    x, delta = torch.randn(4, 8), torch.randn(4, 8)
    total = (x + delta).double()
    want = total / (total.square().sum(1, keepdim=True) + 8e-6).sqrt()
    got = small.rms_norm(x, 1e-6, None, torch.float32, delta=delta, pick=torch.tensor([2, 0], dtype=torch.int32))
    assert torch.allclose(got.double(), want[[2, 0]], atol=1e-6)


@pytest.mark.skipif(tri.IS_INSTALLED, reason="Triton is installed")
def test_a_kernel_without_triton_says_what_is_missing() -> None:
    with pytest.raises(MlsysError, match=r"gemv_words needs Triton.*--backend torch"):
        kernels.gemv_words[(1,)]()


@pytest.mark.skipif(torch.cuda.is_available() or tri.is_interpreted(), reason="here it can")
def test_the_engine_refuses_the_backend_where_it_cannot_run() -> None:
    with pytest.raises(BadInput, match="backend triton cannot compute nano on cpu"):
        backend.choose("triton", spec.plain(NANO), precision="bf16", device=CPU, kv=torch.bfloat16)


def test_the_engine_on_a_cpu_loads_neither_triton_nor_this_package() -> None:
    code = (
        "import sys\nfrom mlsys_bench import models\nfrom mlsys_bench.engine import Engine, default_limits\na = models.find('nano')\n"
        "Engine(a, limits=default_limits(a, max_batch=1, max_context=32))\n"
        "print(sorted(m for m in sys.modules if m == 'triton' or m.startswith('mlsys_bench.engine.gpu')))"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------- cache, tiles, inputs


@pytest.mark.parametrize("name", ["nano", "tinyllama-1.1b", "llama-3-8b"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_the_cache_takes_what_the_formula_says(name: str, kind: torch.dtype) -> None:
    """As many bytes as the CPU's cache, and no slot of one block reaches into the next."""
    shape = dataclasses.replace(models.find(name), layers=2)
    cache = GpuKV(shape, blocks=3, block_tokens=4, dtype=kind, device=CPU)
    assert cache.allocated_bytes == 3 * 4 * kv.token_bytes(shape, kind)
    assert cache.data.shape == (2, 3, shape.kv_heads, 2, 4, shape.head_dim)
    assert cache.data.stride(1) == cache.block_stride
    if cache.scale is not None:
        assert cache.scale.stride(1) == cache.scale_stride
        cache.scale.fill_(2.0)
    cache.data.view(torch.uint8)[1, 1, :, 1, 2] = 0  # bytes of the third value vector
    key, value = cache.token(1, 4 + 2)
    assert key.shape == value.shape == (shape.kv_heads, shape.head_dim)
    assert not value.any()


def test_blocks_of_the_cache_move_whole() -> None:
    cache = GpuKV(dataclasses.replace(NANO, layers=2), blocks=4, block_tokens=2, dtype=torch.int8, device=CPU)
    cache.raw.random_(0, 255)
    before = cache.raw[:, [3, 1]].clone()
    saved = cache.copy_out([3, 1])
    cache.raw.zero_()
    cache.copy_in([0, 2], saved)
    assert torch.equal(cache.raw[:, [0, 2]], before)


def test_tiles_cover_every_query_once_in_order() -> None:
    first = np.array([0, 1, 1 + 150, 152], dtype=np.int32)
    positions = np.concatenate([[9], np.arange(20, 170), [4]]).astype(np.int32)
    tiles = attention.tiles_of(first, positions, since=1)
    assert tiles.tolist() == [[1, 1, 64, 20], [1, 65, 64, 84], [1, 129, 22, 148], [2, 151, 1, 4]]
    assert attention.tiles_of(first[:2], positions, since=1).shape == (0, 4)


@given(st.integers(1, 300), st.integers(1, 16), st.integers(1, 200_000))
def test_splits_fill_the_machine_but_leave_every_program_a_tile(sequences: int, kv_heads: int, longest: int) -> None:
    splits = attention.splits_of(sequences, kv_heads, longest, CPU)
    assert splits == tri.power_of_2(splits), "any number would be a kernel of its own"
    assert 1 <= splits <= attention.MOST_SPLITS
    assert splits == 1 or (splits - 1) * attention.TILE < longest


def decode_step(rows: int, width: int) -> Step:
    ints = np.arange(rows, dtype=np.int32)
    return Step.of(
        tokens=ints + 50, positions=ints + 7, slots=ints + 90, sequence_of=ints, first=np.arange(rows + 1, dtype=np.int32),
        block_table=np.arange(rows * width, dtype=np.int32).reshape(rows, width), sampled=ints,
    )  # fmt: skip


def test_the_inputs_of_a_bucket_hold_a_step_and_nobody_beyond_it() -> None:
    """Rows beyond the batch write nothing (slot -1) and read nothing (length 0), whatever the step before had there."""
    inputs, picks = graphs.Inputs(8, 5, CPU), flight.greedy(6)
    inputs.fill(decode_step(6, 3), picks._replace(temperature=np.full(6, 0.5, dtype=np.float32), seeds=np.arange(6) + 2**40), None)
    inputs.fill(decode_step(2, 3), flight.greedy(2), np.array([1, 0], dtype=np.int32))
    got = {name: column.tolist() for name, column in inputs.column.items()}
    assert got["tokens"][:2] == [50, 51]
    assert got["positions"][:2] == [7, 8]
    assert got["lengths"] == [8, 9] + [0] * 6
    assert got["slots"] == [90, 91] + [-1] * 6
    assert got["feed"] == [1, 0] + [-1] * 6
    assert inputs.temperature.tolist() == [0.0] * 8
    assert inputs.table[:2, :3].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert inputs.seeds[:2].tolist() == [0, 0]


@given(st.integers(1, 130), st.integers(1, 40))
def test_inputs_and_tables_never_ask_for_a_kernel_of_their_own(rows: int, blocks: int) -> None:
    """Triton compiles anew for pointers that are no multiple of 16 bytes, and for sizes that are 1 or no multiple of 16."""
    width = attention.table_width(blocks)
    inputs = graphs.Inputs(rows, width, CPU)
    offsets = [t.storage_offset() * t.element_size() for t in (inputs.seeds, inputs.temperature, inputs.table, *inputs.column.values())]
    assert not any(offset % 16 for offset in offsets)
    assert width >= blocks
    assert width % 16 == 0
    assert attention.padded(np.ones((2, blocks), dtype=np.int32)).shape == (2, width)
    ends = sorted((t.storage_offset() * t.element_size(), t.numel() * t.element_size()) for t in (inputs.seeds, *inputs.column.values()))
    assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(ends)), "columns overlap"


def test_a_device_is_named_as_its_tensors_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workspaces are kept by device: `cuda` and `cuda:0` would be two."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert memory.device_of("cuda") == torch.device("cuda", 0)


def test_what_may_be_chosen_is_what_the_tokenizer_says() -> None:
    tokenizer = ByteTokenizer()
    may = build.allowed(tokenizer, 320, CPU)
    assert may is not None
    assert may.nonzero().flatten().tolist() == [t for t in range(tokenizer.generated) if t not in tokenizer.silent]


def test_warming_up_is_for_nobody() -> None:
    step = gpu_model.nobody(5, 1, 3)
    assert step.slots.tolist() == [-1] * 6
    assert step.first.tolist() == [0, 1, 6]
    assert step.sampled.tolist() == [5]
    assert step.positions.tolist() == [0, 0, 1, 2, 3, 4]


def test_only_requests_that_need_nothing_but_a_draw_are_simple() -> None:
    assert flight.is_simple(sampling())
    assert flight.is_simple(sampling(temperature=0.7, seed=3, stop=("x",)))
    assert not flight.is_simple(sampling(temperature=1e-6)), "its logits would leave fp32 no room for noise"
    for options in ({"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"logprobs": 0}, {"presence_penalty": 1.0}, {"logit_bias": {3: 1.0}}):
        assert not flight.is_simple(sampling(temperature=0.7, **options))


def test_seeds_beyond_a_signed_integer_keep_their_bits() -> None:
    asked = [
        Sequence(id=i, row=i, tokens=[1], given=1, sampling=sampling(temperature=1.0), seed=seed, ignore_eos=False, text=None, hashes=None)
        for i, seed in enumerate((2**64 - 1, 7))
    ]
    made = flight.picks(asked, [0, 5])
    assert made.seeds.view(np.uint64).tolist() == [2**64 - 1, 7]
    assert made.places.tolist() == [0, 5]


def test_a_way_says_what_it_is() -> None:
    assert Way("wide").splits == 1
    assert ways.words_of("int8", 17) == 8
    assert ways.words_of("int4", 33) == 8
