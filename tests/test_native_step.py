"""The decoder's step in C: right against float64, blind to what is not its own, and the same bits however it is cut up."""

from __future__ import annotations

import dataclasses
import functools
import mmap
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mlsys_bench.batching import StepPlan
from mlsys_bench.engine import kv, runner
from mlsys_bench.engine.kv import Blocks, KVCache
from mlsys_bench.engine.model import Model
from mlsys_bench.engine.native import library
from mlsys_bench.engine.native.model import NativeModel, misfit
from mlsys_bench.engine.spec import Decoder
from tests import decoder_reference, steps
from tests.decoder_reference import CPU, kinds

pytestmark = pytest.mark.skipif(library.load() is None, reason="no C compiler on this machine")
SEQUENCES, CONTEXT = 5, 1300
Work = list[tuple[int, int, int]]  # (sequence, start, tokens)


@pytest.fixture
def without_pairs() -> Iterator[None]:
    """Keep the processor from multiplying pairs of bf16, which rounds queries and weights."""
    c = library.need()
    before = c.cpu_level()
    c.cpu_use(min(before, library.level_of("avx512")))
    yield
    c.cpu_use(before)


@functools.cache
def texts() -> dict[int, list[int]]:
    rng = np.random.default_rng(3)
    return {i: rng.integers(0, 256, CONTEXT).tolist() for i in range(SEQUENCES)}


class Bench:
    """A model with a cache whose blocks lie anywhere, and hold NaN until they are written."""

    def __init__(self, d: Decoder, *, precision: str = "fp32", kept: str = "fp32", block_tokens: int = 16, threads: int = 1) -> None:
        self.model = native_model(d, precision, threads)
        blocks = SEQUENCES * -(-CONTEXT // block_tokens)
        self.cache = Blocks(d.shape, blocks=blocks, block_tokens=block_tokens, dtype=kv.KINDS[kept], device=CPU)
        self.cache.raw.fill_(255)  # NaN in fp32, bf16 and the scales of int8
        self.table = np.random.default_rng(block_tokens).permutation(blocks).reshape(SEQUENCES, -1).astype(np.int32)

    def step(self, work: Work) -> runner.Step:
        """Return the step of this work, the logits of every token wanted."""
        row, start, tokens = np.array(work, dtype=np.int32).T
        plan = runner.order_of(StepPlan(row, start, tokens, np.ones(len(work), dtype=bool), np.zeros(0, dtype=np.int32)))
        return runner.step_input(plan, texts(), self.table, self.cache, plan.tokens)

    def logits(self, work: Work) -> dict[tuple[int, int], Tensor]:
        """Compute a step; return the logits of each (sequence, position)."""
        row, start, tokens = np.array(work).T
        step = self.step(work)
        ordered = runner.order_of(StepPlan(row, start, tokens, np.ones(len(work), dtype=bool), np.zeros(0, dtype=np.int32)))
        places = [(int(r), int(s) + i) for r, s, n in zip(*ordered[:3], strict=True) for i in range(n)]
        return dict(zip(places, self.model.forward(step, self.cache), strict=True))


@functools.cache
def native_model(d: Decoder, precision: str, threads: int) -> NativeModel:
    return NativeModel(d, decoder_reference.loaded(d, precision, native=True), max_context=CONTEXT, threads=threads)


def ragged(rng: np.random.Generator, lengths: list[int]) -> list[Work]:
    """Return steps that compute these sequences, some tokens of some of them at a time."""
    done, steps = [0] * len(lengths), []
    while done != lengths:
        work = []
        for i in rng.permutation(len(lengths)).tolist():
            tokens = min(lengths[i] - done[i], int(rng.choice([0, 1, 1, 3, 40, 300])))
            if tokens:
                work.append((i, done[i], tokens))
                done[i] += tokens
        if work:
            steps.append(work)
    return steps


def close(got: Tensor, want: Tensor) -> float:
    """Return the error by the size of what is right."""
    return float((got.double() - want).norm() / want.norm())


# ---------------------------------------------------------------- right


@pytest.mark.parametrize("kind", kinds())
def test_each_kind_of_decoder_agrees_with_float64(kind: str) -> None:
    """Chunks and single tokens, ragged, blocks of any size; fp32 rounds by 6e-8, and a few hundred roundings add up to 1e-5 at most."""
    d = kinds()[kind]
    rng = np.random.default_rng(len(kind))
    lengths = [150, 1, 31, 64, 7]
    bench = Bench(d, block_tokens=int(rng.choice([1, 5, 16, 32])), threads=int(rng.integers(1, 4)))
    want = [decoder_reference.logits(d, texts()[i][:n]) for i, n in enumerate(lengths)]
    seen = 0
    for work in ragged(rng, lengths):
        for (i, position), got in bench.logits(work).items():
            assert close(got, want[i][position]) < 1e-5
            seen += 1
    assert seen == sum(lengths)
    assert want[0].std() > 0.3, "logits of one size would agree whatever was computed"


def kept_as(name: str) -> decoder_reference.Round:
    """Return what a cache makes of keys or values [T, heads, head_dim]."""
    if name != "int8":
        return lambda x: x.to(kv.KINDS[name]).double()

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(dim=-1, keepdim=True) / 127
        return torch.round(x / scale) * scale

    return rounded


@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-3), ("int8", 3e-3)])
def test_each_kind_of_cache_keeps_what_it_should(name: str, tolerance: float, without_pairs: None) -> None:
    """What was computed in fp32 may round to the other side of a tie: one step of 2^-8 or 1/127, seldom."""
    d = kinds()["llama"]
    want = decoder_reference.logits(d, texts()[0][:90], kept=kept_as(name))
    exact = decoder_reference.logits(d, texts()[0][:90])
    got = in_two_pieces(d, name, 90)
    assert close(got, want) < tolerance
    assert name == "fp32" or close(got, exact) > 2 * close(got, want), "the rounding itself must show"


def test_attention_in_pairs_of_bf16_costs_no_more_than_keeping_the_cache_in_bf16() -> None:
    """Queries and weights are rounded as keys and values are: the two errors are of one size."""
    d = kinds()["llama"]
    exact = decoder_reference.logits(d, texts()[0][:90])
    kept = decoder_reference.logits(d, texts()[0][:90], kept=kept_as("bf16"))
    assert close(in_two_pieces(d, "bf16", 90), exact) < 2 * close(kept, exact)


def in_two_pieces(d: Decoder, kept: str, n: int) -> Tensor:
    """Return the logits of the first text, computed as a chunk of 60 and then token by token."""
    bench = Bench(d, kept=kept, block_tokens=7)
    return torch.stack([*bench.logits([(0, 0, 60)]).values(), *(bench.logits([(0, i, 1)])[0, i] for i in range(60, n))])


def test_contexts_beyond_one_part_agree_with_float64() -> None:
    """Parts of 512 keys that threads share, merged: one sequence, few heads, more threads than heads."""
    d = kinds()["llama"]
    want = decoder_reference.logits(d, texts()[0])
    for threads in (1, 3):
        bench = Bench(d, threads=threads)
        bench.logits([(0, 0, CONTEXT - 2)])
        for position in (CONTEXT - 2, CONTEXT - 1):
            assert close(bench.logits([(0, position, 1)])[0, position], want[position]) < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "w8a8", "int4g32", "w4a8g32"])
@pytest.mark.parametrize("kind", ["qwen", "gemma"])
def test_c_and_torch_agree(kind: str, precision: str) -> None:
    """In fp32 but for rounding; else torch keeps activations in bf16: about 1 % a matrix, over 2 layers of 4."""
    d = kinds()[kind]
    bench, compute = Bench(d, precision=precision, kept="bf16" if precision != "fp32" else "fp32"), None
    model = Model(d, decoder_reference.loaded(d, precision, native=False), precision=precision, max_context=CONTEXT, device=CPU)
    cache = KVCache(d.shape, blocks=len(bench.cache.raw[0]), block_tokens=16, dtype=bench.cache.dtype, device=CPU, compute=compute)
    for work in ragged(np.random.default_rng(7), [40, 9, 3]):
        step = bench.step(work)
        want = model.forward(step, cache).double()
        assert close(bench.model.forward(step, bench.cache), want) < (2e-5 if precision == "fp32" else 0.08)


# ---------------------------------------------------------------- one by one or in a crowd: the same bits


def alone(d: Decoder, length: int, **options: Any) -> list[Tensor]:
    """Return the logits of each token of the first text, computed in one piece."""
    return list(Bench(d, **options).logits([(0, 0, length)]).values())


@pytest.mark.parametrize("kept", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "w8a8", "int4g32", "w4a8g32"])
def test_a_token_gets_the_same_bits_in_any_company(precision: str, kept: str) -> None:
    """Alone or among others, in one piece or in chunks of any size, with any number of threads, in blocks of any size."""
    d, length = kinds()["qwen"], 100
    want = alone(d, length, precision=precision, kept=kept)
    for seed, (threads, block_tokens) in enumerate([(1, 3), (2, 16), (3, 32)]):
        bench = Bench(d, precision=precision, kept=kept, block_tokens=block_tokens, threads=threads)
        for work in ragged(np.random.default_rng(seed), [length, 17, 2, 90]):
            for (i, position), got in bench.logits(work).items():
                assert i or torch.equal(got, want[position])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("kind", "precision"), [*((kind, "fp32") for kind in kinds()), *(("qwen", p) for p in ("bf16", "int8", "w8a8", "int4g32", "w4a8g32"))]
)
def test_a_lone_token_gets_what_it_gets_in_a_chunk(kind: str, precision: str, threads: int) -> None:
    """Every thread norms and quantises it for itself, and places and attends to whole heads: the same bits."""
    d, length = kinds()[kind], 12
    want = alone(d, length, precision=precision)
    bench = Bench(d, precision=precision, threads=threads, block_tokens=5)
    for position in range(length):
        assert torch.equal(bench.logits([(0, position, 1)])[0, position], want[position])


LONG = [("window", "fp32"), ("gemma", "fp32"), ("many share one head", "fp32"), ("odd sizes", "fp32"), ("window", "bf16"), ("qwen", "int8")]


@pytest.mark.parametrize(("kind", "kept"), LONG)
def test_long_contexts_get_the_same_bits_in_any_company(kind: str, kept: str) -> None:
    """Beyond a part of 512 keys, where threads may share a context."""
    d = kinds()[kind]
    want = alone(d, CONTEXT, kept=kept)
    for threads in (1, 4):
        bench = Bench(d, kept=kept, threads=threads, block_tokens=16 if threads == 1 else 9)
        bench.logits([(0, 0, 700), (1, 0, 30)])
        for work in ([(0, 700, 1)], [(0, 701, 1), (1, 30, 1)], [(0, 702, 5)], [(1, 31, 9), (0, 707, 590)], [(0, 1297, 1)]):
            for (i, position), got in bench.logits(work).items():
                assert i or torch.equal(got, want[position])


def test_heads_of_odd_size_are_left_to_torch() -> None:
    """Keys lie as pairs of dimensions."""
    d = kinds()["llama"]
    assert misfit(d) is None
    odd = dataclasses.replace(d, shape=dataclasses.replace(d.shape, head_dim=17))
    assert misfit(odd) == "its heads have an odd number of dimensions"


def test_a_large_pool_is_empty_and_lies_at_a_large_page() -> None:
    cache = Blocks(kinds()["llama"].shape, blocks=4000, block_tokens=16, dtype=torch.float32, device=CPU)
    assert cache.allocated_bytes > 1 << 24
    assert not cache.raw.any()
    assert not hasattr(mmap, "MADV_HUGEPAGE") or cache.raw.data_ptr() % (1 << 21) == 0


# ---------------------------------------------------------------- blind to the rest


def test_what_is_not_a_sequences_own_never_leaks() -> None:
    """Every other block, and the unwritten rest of its last one, is NaN (see Bench); neighbours in the batch are NaN as well."""
    d = kinds()["window"]
    want = alone(d, 40)
    bench = Bench(d)
    bench.cache.raw[:, bench.table[1]] = 255
    got = bench.logits([(0, 0, 40), (1, 5, 30), (2, 600, 1)])
    assert all(torch.equal(got[0, i], want[i]) for i in range(40))
    assert got[1, 34].isnan().all(), "and one's own NaN is not hidden"


def test_a_step_without_samples_fills_the_cache_just_the_same() -> None:
    d = kinds()["llama"]
    first, second = Bench(d), Bench(d)
    first.logits([(0, 0, 50)])
    silent = steps.changed(second.step([(0, 0, 50)]), sampled=np.zeros(0, dtype=np.int32))
    assert second.model.forward(silent, second.cache).shape == (0, d.shape.vocab)
    assert torch.equal(first.cache.raw, second.cache.raw)


def test_logits_come_for_the_places_that_are_asked_for() -> None:
    d = kinds()["llama"]
    every = alone(d, 20)
    bench = Bench(d)
    step = steps.changed(bench.step([(0, 0, 20)]), sampled=np.array([19, 3, 3, 7], dtype=np.int32))
    assert torch.equal(bench.model.forward(step, bench.cache), torch.stack([every[i] for i in (19, 3, 3, 7)]))


def test_products_are_timed_apart() -> None:
    bench = Bench(kinds()["llama"])
    before = bench.model.linears_s
    bench.logits([(0, 0, 20)])
    assert bench.model.linears_s > before
