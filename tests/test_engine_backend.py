"""Which code computes a step, what its cache keeps, and the mode in which no batch changes a bit."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import models
from mlsys_bench.batching import Limits, StepPlan
from mlsys_bench.engine import Engine, backend, build, default_limits, kv, runner, spec
from mlsys_bench.engine.backend import OneByOne
from mlsys_bench.engine.kv import Blocks, KVCache
from mlsys_bench.engine.model import Model
from mlsys_bench.engine.native import library
from mlsys_bench.errors import BadInput, UnknownName
from tests import decoder_reference, steps
from tests.decoder_reference import CPU, kinds, shape

has_compiler = pytest.mark.skipif(library.load() is None, reason="no C compiler on this machine")
TINY = models.counted(dataclasses.replace(shape(), id="tiny", max_context=128))
ROOMY = default_limits(TINY, max_batch=8)
TEN = (
    "nano", "small-160m", "tinyllama-1.1b", "llama-2-7b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-1b",
    "mistral-7b", "qwen2.5-7b", "qwen3-8b",
)  # fmt: skip


# ---------------------------------------------------------------- the cache


@pytest.mark.parametrize("name", TEN)
@pytest.mark.parametrize(("kept", "scale_bytes"), [("fp32", 0), ("bf16", 0), ("int8", 4), ("fp8", 4)])
def test_the_cache_takes_what_the_formula_says(name: str, kept: str, scale_bytes: int) -> None:
    """The model's own formula, and a 4-byte scale for each key and each value of a head where there are scales."""
    a = models.find(name)
    per_token = models.kv_bytes_per_token(a, "bf16", kept) + 2 * a.layers * a.kv_heads * scale_bytes
    assert kv.token_bytes(a, kv.KINDS[kept]) == per_token
    for make in (Blocks, KVCache):
        assert make(a, blocks=3, block_tokens=8, dtype=kv.KINDS[kept], device=CPU).allocated_bytes == per_token * 24


@pytest.mark.parametrize("kept", kv.KINDS)
def test_blocks_go_out_and_come_back_elsewhere(kept: str) -> None:
    cache = Blocks(TINY, blocks=9, block_tokens=4, dtype=kv.KINDS[kept], device=CPU)
    cache.raw.random_(0, 255, generator=torch.Generator().manual_seed(1))
    before = cache.raw.clone()
    saved = cache.copy_out([7, 2, 4])
    cache.raw[:, [7, 2, 4]] = 0
    cache.copy_in([1, 0, 7], saved)
    assert torch.equal(cache.raw[:, [1, 0, 7]], before[:, [7, 2, 4]])
    cache.copy([1, 3], [5, 6])
    assert torch.equal(cache.raw[:, [5, 6]], torch.stack([before[:, 7], before[:, 3]], dim=1))
    assert torch.equal(cache.raw[:, [3, 8]], before[:, [3, 8]]), "others stay as they are"


@pytest.mark.parametrize(("kept", "step"), [("fp32", 0.0), ("bf16", 2**-8), ("int8", 1 / 254), ("fp8", 2**-4)])
def test_what_torch_writes_it_reads_back(kept: str, step: float) -> None:
    """To within half a step of the format: of the value, or of the largest of the head where there is a scale."""
    cache = KVCache(TINY, blocks=6, block_tokens=4, dtype=kv.KINDS[kept], device=CPU, compute=torch.float32)
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(11, 2 * TINY.kv_heads * TINY.head_dim, generator=generator) * torch.logspace(-3, 3, 11)[:, None]
    blocks = torch.tensor([4, 0, 5])
    cache.write(1, (blocks[:, None] * 4 + torch.arange(4)).flatten()[:11], values)
    room = cache.room(1, blocks, 11)
    cache.gather(1, room)
    want = values.view(11, 2, TINY.kv_heads, TINY.head_dim)
    got = torch.stack([room.k[0], room.v[0]]).permute(2, 0, 1, 3)
    assert ((got - want).abs() <= want.abs().amax(dim=-1, keepdim=True) * step * 1.001).all()


def test_names_of_caches() -> None:
    assert (kv.kind_of("auto", "fp32"), kv.kind_of("auto", "w8a8"), kv.kind_of("int8", "fp32")) == (
        torch.float32, torch.bfloat16, torch.int8,
    )  # fmt: skip
    assert [kv.name_of(dtype) for dtype in kv.KINDS.values()] == list(kv.KINDS)
    with pytest.raises(UnknownName, match="int4"):
        kv.kind_of("int4", "fp32")


# ---------------------------------------------------------------- the step


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9)), min_size=1, max_size=6), st.integers(1, 9), st.data())
def test_a_step_lays_out_what_was_planned(work: list[tuple[int, int]], block_tokens: int, data: st.DataObject) -> None:
    """Token by token, by the slow and plain way of finding each."""
    rows = data.draw(st.permutations(range(len(work))))
    known = {row: np.random.default_rng(row).integers(0, 256, 70).tolist() for row in rows}
    table = np.random.default_rng(1).permutation(len(work) * 80).reshape(len(work), 80)
    wanted = np.array([data.draw(st.integers(0, tokens)) for _, tokens in work])
    cache = Blocks(TINY, blocks=1, block_tokens=block_tokens, dtype=torch.float32, device=CPU)
    start, tokens = np.array(work, dtype=np.int32).T
    plan = StepPlan(np.array(rows, dtype=np.int32), start, tokens, wanted > 0, np.zeros(0, dtype=np.int32))
    step = runner.step_input(plan, known, table, cache, wanted)
    place, ends = 0, []
    for s, (row, (first, count)) in enumerate(zip(rows, work, strict=True)):
        assert step.first[s] == place
        for position in range(first, first + count):
            assert (step.tokens[place], step.positions[place], step.sequence_of[place]) == (known[row][position], position, s)
            assert step.slots[place] == table[row, position // block_tokens] * block_tokens + position % block_tokens
            assert step.block_table[s, position // block_tokens] == table[row, position // block_tokens]
            place += 1
        ends += list(range(place - int(wanted[s]), place))
    assert step.first[-1] == place == len(step.tokens)
    assert step.sampled.tolist() == ends
    counts = [place, len(work), len(ends), step.block_table.shape[1]]
    parts = [np.ravel(getattr(step, name)).tolist() for name in steps.PARTS]
    assert step.laid.dtype == np.int32
    assert step.laid.tolist() == sum(parts, counts), "what C reads is these, one after another"


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 3), st.booleans()), min_size=1, max_size=2), st.integers(1, 9))
def test_one_logit_of_each_that_samples_is_wanted_by_default(work: list[tuple[int, int, bool]], block_tokens: int) -> None:
    """A lone token is laid by code of its own."""
    table = np.random.default_rng(1).permutation(len(work) * 80).reshape(len(work), 80)
    cache = Blocks(TINY, blocks=1, block_tokens=block_tokens, dtype=torch.float32, device=CPU)
    start, tokens, samples = (np.array(column) for column in zip(*work, strict=True))
    rows = np.arange(len(work), dtype=np.int32)
    plan = StepPlan(rows, start.astype(np.int32), tokens.astype(np.int32), samples.astype(bool), np.zeros(0, dtype=np.int32))
    known = {int(row): list(range(100, 170)) for row in rows}
    asked = runner.step_input(plan, known, table, cache, samples.astype(np.int32))
    assert runner.step_input(plan, known, table, cache).laid.tolist() == asked.laid.tolist()


# ---------------------------------------------------------------- who computes


def choose(name: str, d: spec.Decoder, **changes: Any) -> str:
    return backend.choose(name, d, **{"precision": "int8", "device": CPU, "kv": torch.bfloat16, **changes})


@has_compiler
@pytest.mark.parametrize(
    ("d", "changes", "why"),
    [
        (dataclasses.replace(kinds()["llama"], sparse=(True, False)), {}, "experts"),
        (kinds()["llama"], {"precision": "fp8"}, "no fp8 matrices"),
        (kinds()["llama"], {"kv": torch.float8_e4m3fn}, "no fp8 KV cache"),
        (kinds()["llama"], {"device": torch.device("meta")}, "on a CPU, not on meta"),
    ],
)
def test_what_c_cannot_torch_does(d: spec.Decoder, changes: dict[str, Any], why: str) -> None:
    assert choose("auto", d, **changes) == "torch"
    with pytest.raises(BadInput, match=why):
        choose("native", d, **changes)


@has_compiler
@pytest.mark.skipif(library.load() is not None and library.level() == "portable", reason="plain C is taken where it was measured faster")
def test_c_computes_where_it_can() -> None:
    assert {choose("auto", d) for d in kinds().values()} == {"native"}
    assert choose("torch", kinds()["llama"]) == "torch"
    assert Engine(TINY, limits=ROOMY).backend == "native"
    assert Engine(TINY, limits=ROOMY, backend="torch", kv="bf16").kv == "bf16"


def test_without_a_compiler_torch_computes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "load", lambda: None)
    monkeypatch.setattr(library, "why_not", lambda: "no C compiler on PATH")
    assert Engine(TINY, limits=ROOMY).backend == "torch"
    with pytest.raises(BadInput, match="no C compiler on PATH; use --backend torch"):
        Engine(TINY, limits=ROOMY, backend="native")


def test_an_unknown_backend_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName, match="nativ"):
        Engine(TINY, limits=ROOMY, backend="nativ")


# ---------------------------------------------------------------- deterministic


def answers(engine: Engine, prompts: list[list[int]], late: int) -> list[list[int]]:
    """Serve all, each joining `late` steps after the one before; return their tokens."""
    ids: list[int] = []
    tokens: dict[int, list[int]] = {}
    steps = 0
    while len(ids) < len(prompts) or engine.busy:
        if len(ids) < len(prompts) and steps >= late * len(ids):
            ids.append(engine.add(prompts[len(ids)], max_tokens=15, ignore_eos=True))
        for request, token in engine.step().tokens:
            tokens.setdefault(request, []).append(token)
        steps += 1
    return [tokens[i] for i in ids]


CRAMPED = Limits(max_seqs=3, max_step_tokens=9, block_tokens=4, blocks=26, max_context=128)


@pytest.mark.parametrize(("who", "precision", "kept"), [("torch", "bf16", "bf16"), ("torch", "int8", "int8"), ("auto", "w8a8", "int8")])
def test_deterministic_answers_do_not_depend_on_the_batch(who: str, precision: str, kept: str) -> None:
    """Alone in one piece, or chunked, batched and preempted: the same tokens, though random weights leave many a choice close."""
    rng = np.random.default_rng(4)
    prompts = [rng.integers(0, 256, n).tolist() for n in (20, 3, 31, 11)]

    def engine(limits: Limits) -> Engine:
        return Engine(TINY, precision=precision, limits=limits, backend=who, kv=kept, deterministic=True)

    want = [answers(engine(ROOMY), [prompt], 0)[0] for prompt in prompts]
    assert answers(engine(CRAMPED), prompts, 2) == want


def test_one_by_one_is_the_model_itself() -> None:
    """The same logits but for rounding, in the order asked for, also where one sequence reads what another writes in the same step."""
    d = kinds()["qwen"]
    model = Model(d, decoder_reference.loaded(d, native=False), precision="fp32", max_context=128, device=CPU)
    known = {0: list(range(30)), 1: list(range(20)) + list(range(40, 50))}
    table = np.array([[5, 1, 7], [5, 1, 3]], dtype=np.int32)  # the first 20 tokens are shared, and written by the first alone
    plan = StepPlan(np.array([0, 1]), np.array([0, 20]), np.array([30, 9]), np.array([True, True]), np.zeros(0, dtype=np.int32))
    caches = [KVCache(d.shape, blocks=8, block_tokens=10, dtype=torch.float32, device=CPU) for _ in range(2)]
    step = runner.step_input(plan, known, table, caches[0], np.array([3, 2]))
    want, got = model.forward(step, caches[0]), OneByOne(model).forward(step, caches[1])
    assert torch.allclose(got, want, atol=2e-5)
    assert torch.allclose(caches[0].data[:, [1, 3, 5, 7]], caches[1].data[:, [1, 3, 5, 7]], atol=2e-5)
    assert OneByOne(model).forward(steps.changed(step, sampled=np.zeros(0, dtype=np.int32)), caches[1]).shape == (0, d.shape.vocab)


@has_compiler
def test_torch_keeps_to_one_thread_beside_c() -> None:
    before = torch.get_num_threads()
    try:
        Engine(TINY, limits=ROOMY, threads=2)
        assert torch.get_num_threads() == 1
        Engine(TINY, limits=ROOMY, threads=2, backend="torch")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage/enabled").exists(), reason="no large pages on this system")
def test_without_a_compiler_weights_lie_on_large_pages() -> None:
    """In a process of its own, for torch asks once: matrices of 16 MB and more."""
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("this system gives no large pages")
    code = """
import dataclasses
from pathlib import Path
from mlsys_bench import models
from mlsys_bench.engine import Engine, default_limits
wide = models.counted(dataclasses.replace(models.find("nano"), id="wide", ffn=8192, layers=1))
engine = Engine(wide, precision="fp32", limits=default_limits(wide, max_batch=1), seed=0)
print(sum(int(line.split()[1]) for line in Path("/proc/self/smaps").read_text().splitlines() if line.startswith("AnonHugePages")))
"""
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | {"MLSYS_NATIVE": "0"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(ran.stdout) >= 2 << 10  # kB: a page, at least


def test_no_threads_are_refused() -> None:
    with pytest.raises(BadInput, match="threads is 0"):
        build.check_threads(0)
