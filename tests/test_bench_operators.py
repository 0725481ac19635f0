"""Operators, the machine and its links by themselves: each held against float64, and the checks against kernels that are wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import select
import signal
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mlsys_bench import models
from mlsys_bench.bench import alone, collectives, harness, kernels, machine, operators, paged
from mlsys_bench.bench.alone import Call
from mlsys_bench.bench.alone_gpu import Triton
from mlsys_bench.bench.harness import Task
from mlsys_bench.bench.operators import Operators
from mlsys_bench.bench.options import Options, checked
from mlsys_bench.engine import formats, spec
from mlsys_bench.engine.gpu import tri
from mlsys_bench.engine.kv import KINDS
from mlsys_bench.engine.native import library
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.models import Architecture

TINY = dataclasses.replace(models.find("nano"), id="tiny", hidden=96, heads=6, kv_heads=2, head_dim=16, ffn=80, vocab=100)
NATIVE = pytest.param("native", marks=pytest.mark.skipif(library.load() is None, reason="no C compiler on this machine"))
NATIVE_OR_TORCH = "torch" if library.load() is None else "native"
PRECISIONS = ("fp32", "bf16", "int8", "w8a8", "int4g32", "int4g128", "w4a8g64", "fp8")


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a cache so small that what rotates is small too."""
    monkeypatch.setattr(operators, "cache_bytes", lambda device: 2**15)


def made(backend: str, precision: str = "fp32", kv: str = "bf16", threads: int = 1, a: Architecture = TINY) -> Operators:
    d = spec.plain(a)
    who = alone.computes(d, precision=precision, kv=KINDS[kv], device=torch.device("cpu"), asked=backend, threads=threads)
    return Operators(d, who, precision=precision, kv=KINDS[kv], common={}, device="cpu", threads=threads)


def error(task: Task) -> float:
    assert task.check is not None
    assert task.tolerance is not None
    return task.check()


# ---------------------------------------------------------------- what comes out


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_matrix_is_within_its_formats_tolerance_of_fp32(backend: str, precision: str) -> None:
    if backend == "native" and precision == "fp8":
        pytest.skip("the C kernels have no fp8")
    ops = made(backend, precision)
    errors = {(t.specs[0].parameters["layer"], t.specs[0].parameters["m"]): (error(t), t.tolerance) for t in ops.linears((1, 5))}
    assert len(errors) == 2 * len(operators.LAYERS)
    assert all(found <= (bar or 0) for found, bar in errors.values()), errors
    assert precision == "fp32" or all(found > 1e-4 for found, _ in errors.values())  # what the format costs is seen


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
@pytest.mark.parametrize("kv", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("threads", [1, 2])
def test_attention_sees_what_float64_sees(backend: str, kv: str, threads: int) -> None:
    ops = made(backend, kv=kv, threads=threads)
    for task in (ops.decode(70, 1), ops.decode(33, 3), ops.decode(1100, 1), ops.prefill(40), ops.prefill(700)):
        assert error(task) <= (task.tolerance or 0), task.specs[0]


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
@pytest.mark.parametrize("m", [1, 3])
def test_what_lies_between_the_matrices_is_right(backend: str, m: int) -> None:
    ops = made(backend, "bf16")
    for task in (ops.norm(m), ops.swiglu(m), ops.rope_append(m), ops.embedding(m), ops.sample(m, "argmax"), ops.sample(m, "top_p")):
        assert error(task) <= (task.tolerance or 0), task.specs[0]
        assert task.visit()[0][1].values[0] > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_a_gated_family_and_partial_rope_are_computed_as_they_are(threads: int) -> None:
    """Gemma's activation and a rope that turns half of each head, by torch and, where there is a compiler, in C."""
    d = dataclasses.replace(spec.plain(TINY), activation="gelu_tanh", rope=dataclasses.replace(spec.plain(TINY).rope, dim=8))
    for backend in ("torch", *(["native"] if library.load() is not None else [])):
        who = alone.computes(d, precision="fp32", kv=torch.float32, device=torch.device("cpu"), asked=backend, threads=threads)
        ops = Operators(d, who, precision="fp32", kv=torch.float32, common={}, device="cpu", threads=threads)
        for task in (ops.swiglu(2), ops.rope_append(2)):
            assert error(task) <= 1e-5, (backend, task.specs[0])


def test_without_triton_the_gpus_holders_compute_with_torch() -> None:
    """Of the GPU's operators those that need no kernel are checked on any machine."""
    d = spec.plain(TINY)
    who = Triton(d, precision="bf16", kv=torch.bfloat16, device=torch.device("cpu"))
    ops = Operators(d, who, precision="bf16", kv=torch.bfloat16, common={}, device="cpu", threads=1)
    tasks = [*ops.linears((2,)), ops.norm(2), ops.swiglu(2)]
    for task in tasks:
        assert error(task) <= (task.tolerance or 0), task.specs[0]


@pytest.mark.skipif(not tri.is_interpreted(), reason="Triton, or TRITON_INTERPRET=1, is not here: its kernels cannot run without a GPU")
def test_the_gpus_kernels_are_right_in_the_interpreter() -> None:
    d = spec.plain(TINY)
    who = Triton(d, precision="fp32", kv=torch.float32, device=torch.device("cpu"))
    ops = Operators(d, who, precision="fp32", kv=torch.float32, common={}, device="cpu", threads=1)
    for task in (ops.decode(70, 2), ops.prefill(40), ops.rope_append(2), ops.embedding(2)):
        assert error(task) <= (task.tolerance or 0), task.specs[0]


# ---------------------------------------------------------------- what would be wrong


def test_a_product_that_writes_nothing_or_one_wrong_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """int4 may be 15 % off fp32, and yet a column off by so little is found: the kernel is held against the weights as they are kept."""
    ops = made("torch", "int4g32")

    def spoilt(spoil: Any) -> float:
        real = alone.computes(ops.d, precision="int4g32", kv=ops.kv, device=torch.device("cpu"), asked="torch", threads=1)
        right = real.linear

        def linear(held: Any, x: Any) -> Call:
            call = right(held, x)
            return dataclasses.replace(call, once=lambda: spoil(call.once()))

        monkeypatch.setattr(ops.who, "linear", linear)
        return error(next(iter(ops.linears((4,)))))

    def one_column(y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[:, 17] = 0
        return y

    def one_missing(y: torch.Tensor) -> torch.Tensor:
        y = y.clone()
        y[2, 5] = math.nan
        return y

    assert spoilt(lambda y: y) <= 0.15
    assert spoilt(one_column) == math.inf
    assert spoilt(one_missing) == math.inf


@pytest.mark.skipif(library.load() is None, reason="no C compiler on this machine")
def test_outputs_are_poisoned_before_they_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does nothing the second time would leave the first time's right output."""
    ops = made("native")
    held, x = [ops.who.pack(formats.quantise(ops.gaussian(32, 96), "fp32"))], ops.gaussian(2, 96)
    call = ops.who.linear(held, x)
    assert not call.once().isnan().any()
    monkeypatch.setattr(ops.who, "_c", types.SimpleNamespace(alone_linear=lambda *given: None))
    assert call.once().isnan().all()


def test_attention_by_multiplicities_is_plain_attention() -> None:
    """The reference itself: the same softmax over every key gathered one by one."""
    ops = made("torch", kv="fp32")
    pool = paged.Pool(ops.d, ops.who, ops.gaussian, blocks=70, block_tokens=16)
    a, context = ops.d.shape, 900
    step = paged.decode_steps(pool, context, 1)[0]
    qkv = ops.gaussian(1, (a.heads + 2 * a.kv_heads) * a.head_dim)
    places = [int(step.block_table[0, j // 16]) % paged.RANDOM_BLOCKS * 16 + j % 16 for j in range(context)]
    k, v = (t[places].repeat_interleave(3, dim=1).transpose(0, 1) for t in (pool.k, pool.v))  # [heads, keys, head_dim]
    q = qkv[0, : a.heads * a.head_dim].double().view(a.heads, 1, a.head_dim)
    plain = ((q @ k.transpose(1, 2)) * ops.d.scale).softmax(-1) @ v
    torch.testing.assert_close(paged.attended(ops.d, pool, step, qkv, 0), plain.flatten(), rtol=1e-12, atol=1e-12)


def test_the_tables_of_a_pool_share_no_block() -> None:
    ops = made("torch", kv="fp32")
    pool = paged.Pool(ops.d, ops.who, ops.gaussian, blocks=70, block_tokens=16)
    tables = pool.tables(3, 50)  # 4 blocks each
    assert tables.shape == (5, 3, 4)
    assert len(np.unique(tables)) == tables.size


# ---------------------------------------------------------------- what is counted


def test_the_work_of_a_matrix_by_hand() -> None:
    """int4 in groups of 32, 160 outputs of 96 inputs: half a byte each and 2 bytes per group; activations of 2 bytes in torch."""
    ops = made("torch", "int4g32")
    task = next(t for t in ops.linears((3,)) if t.specs[0].parameters["layer"] == "gate_up")
    work = task.specs[0].work
    assert work is not None
    assert work.bytes == 160 * 96 / 2 + 2 * 160 * 3 + 2 * 3 * (160 + 96)
    assert work.flops == 2 * 3 * 160 * 96


def test_the_work_of_attention_by_hand() -> None:
    """bf16, 2 KV heads of 16: 128 bytes a token.  A chunk of 512 after 188 sees 188 keys and, on average, half of itself."""
    ops = made("torch")
    decode, prefill = ops.decode(100, 3).specs[0].work, ops.prefill(700).specs[0].work
    assert decode is not None
    assert prefill is not None
    act = ops.who.act_bytes
    assert decode.bytes == 3 * 100 * 128 + 2 * 3 * 96 * act
    assert decode.flops == 4 * 300 * 96
    assert prefill.flops == 4 * 96 * (512 * 188 + 512 * 513 / 2)


def test_a_step_reads_its_layers_the_head_and_the_cache_by_hand() -> None:
    """fp32: 6 layers of 160 x 96, 96 x 96, 160 x 96, 96 x 80, the head 100 x 96; 3 x 50 tokens of 6 x 2 x 2 x 16 values of 2 bytes."""
    ops = made("torch")
    assert ops.step_bytes(3, 50) == 4 * (6 * (160 * 96 + 96 * 96 + 160 * 96 + 96 * 80) + 100 * 96) + 3 * 50 * 6 * 2 * 2 * 16 * 2


def test_weights_of_a_large_model_rotate_beyond_the_caches_each_in_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "cache_bytes", lambda device: 2**17)
    ops = made("torch", "fp32")
    held, _, _ = ops.matrices("out", 1)
    assert len(held) == math.ceil(3 * 2**17 / (4 * 96 * 96))
    assert len({t.data_ptr() for h in held for t in h.tensors()}) == len(held)
    assert ops.notes == []


def test_what_a_small_model_reads_in_a_step_is_what_rotates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches keep a part of it from step to step, and so they do here; more tokens bring more of the cache, and more copies."""
    monkeypatch.setattr(operators, "cache_bytes", lambda device: 2**24)
    ops = made(NATIVE_OR_TORCH, "fp32")
    one, many = (len(ops.matrices("out", m)[0]) for m in (1, 8))
    assert [one, many] == [math.ceil(ops.step_bytes(m, operators.CONTEXT) / (4 * 96 * 96)) for m in (1, 8)]
    assert len(ops.matrices("out", 1)[0]) == one
    assert len(ops.matrices("out", operators.CHUNK)[0]) == one  # a prompt's, which is one sequence
    ops.decode(64, 2)  # it reserves its blocks
    assert len(paged.decode_steps(ops.pool, 64, 2)) >= math.ceil(ops.step_bytes(2, 64) / ops.attention_bytes(64, 2))
    attend, _ = ops._attend(64, 2, 1)
    assert attend.before is not None
    ran = list[int]()
    warm = ops._as_warm(Call(run=lambda: ran.append(1), once=attend.once, times=4), 10, 2, 64)
    assert warm.before is not None
    warm.before()
    assert len(ran) == 3  # of four copies each


def test_what_no_cache_keeps_is_not_gone_through_before_a_visit() -> None:
    ops = made("torch", "fp32")
    ops.decode(64, 2)  # it reserves its blocks
    assert ops._linear("out", 1)[0].before is None
    assert ops._attend(64, 2, 1)[0].before is None


def test_short_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "free_bytes", lambda device: 2**17)
    ops = made("torch", "fp32")
    assert ops.cold_bytes(1, 512) < 3 * 2**15
    assert "caches may help" in ops.notes[0]


# ---------------------------------------------------------------- all that is offered


def offered(**change: Any) -> kernels.Offered:
    options = checked(Options(device="cpu", **change))
    return kernels.offered(options, device="cpu", common={"device": "cpu", "threads": options.threads}, cores=(0, 1))


@pytest.mark.parametrize("suite", ["quick", "full"])
def test_nothing_is_offered_twice_and_all_of_a_suite_is_there(suite: str) -> None:
    found = offered(suite=suite, precisions=("fp32", "int4"))
    specs = [s for t in found.tasks for s in t.specs] + [s for s, _ in found.lacking]
    keys = [json.dumps([s.name, s.parameters], sort_keys=True) for s in specs]
    assert len(set(keys)) == len(keys)
    names = {s.name for s in specs}
    assert {*operators.NAMES, "memory.read", "memory.copy", "memory.triad", "gemm", "pool.handoff", "device.launch"} <= names
    if suite == "full":
        cells = {(s.parameters["context_tokens"], s.parameters["batch"]) for s in specs if s.name == "op.attention.decode"}
        assert {(2**i, batch) for i in range(9, 16) for batch in (1, 8, 32)} <= cells
        assert {s.parameters["m"] for s in specs if s.name == "op.linear"} >= {1, 4, 16, 64, 512}


def test_ceilings_come_first_however_short_the_budget() -> None:
    """Without them a reader cannot tell a slow kernel from a slow machine: tasks are begun in the order of what they should cost."""
    tasks = sorted(offered().tasks, key=lambda task: task.cost_s)
    assert {task.specs[0].name for task in tasks[:6]} == {"memory.read", "memory.copy", "memory.triad", "gemm"}


def test_only_what_is_asked_for_is_offered() -> None:
    found = offered(only=("op.norm", "memory"))
    assert {t.specs[0].name for t in found.tasks} == {"op.norm", "memory.read", "memory.copy", "memory.triad"}
    assert not found.lacking


def test_what_a_machine_lacks_is_named_with_the_reason() -> None:
    why = {s.name: reason for s, reason in offered().lacking}
    assert "no GPU" in why["copy.h2d"]
    assert "threads 2" in why["pool.handoff"] or "no threads of its own" in why["pool.handoff"]
    assert "fp8" in why["gemm"]


def test_one_core_has_nobody_to_talk_to() -> None:
    options = checked(Options(device="cpu", only=("collective",)))
    found = kernels.offered(options, device="cpu", common={}, cores=(0,))
    assert not found.tasks
    assert {reason for _, reason in found.lacking} == {"there is one core, and so nobody to talk to"}


def test_shapes_that_the_engine_has_no_weights_for_are_measured_and_those_it_cannot_compute_say_why() -> None:
    assert isinstance(kernels.decoder_of("llama-3-8b"), spec.Decoder)
    mla = next(a.id for a in models.every() if a.is_mla)
    assert "latent attention" in str(kernels.decoder_of(mla))


def test_keys_and_values_beyond_memory_are_refused_with_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "free_bytes", lambda device: 2**20)
    why = [reason for s, reason in offered(only=("op.attention.decode",), suite="full").lacking if s.parameters["context_tokens"] == 2**15]
    assert len(why) == 3
    assert all("GiB" in reason for reason in why)


# ---------------------------------------------------------------- the machine


def test_memory_is_read_copied_and_added_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the C kernels, and with torch's functions."""
    monkeypatch.setattr(machine, "MEMORY_BYTES", 3 * 2**16)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 2**10)
    for loaded in {alone.kernels(), None}:
        monkeypatch.setattr(machine, "kernels", lambda loaded=loaded: loaded)
        for threads in (1, 2):
            for task in machine.memory("cpu", {}, threads):
                assert isinstance(task, Task)
                assert error(task) == 0
                assert task.specs[0].work is not None
                assert task.specs[0].work.bytes == 3 * 2**16


def test_sums_of_the_most_that_is_read_are_exact_in_every_lane() -> None:
    """Whole numbers are, up to 2 to the 24th; a thread adds in 32 lanes."""
    assert machine.MOST_MEMORY_BYTES / 4 / 32 * float(machine._values().mean()) < 2**24


def test_a_copy_that_stops_short_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "MEMORY_BYTES", 2**16)
    monkeypatch.setattr(machine, "cache_bytes", lambda: 2**10)
    room = machine._Memory("cpu")
    a, b = room.parts(2)
    assert math.isnan(room.checked(2, lambda: a[:-1].copy_(b[:-1]), 1.0))
    assert room.checked(2, lambda: a.copy_(b), 1.0) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_products_are_right(precision: str) -> None:
    if machine.misfit(precision, "cpu") is not None:
        pytest.skip(f"torch has no {precision} product here")
    assert machine.Product(precision, 96, "cpu").error() <= machine.GEMM_TOLERANCE[precision]


@pytest.mark.skipif(library.load() is None, reason="no C compiler on this machine")
def test_a_handoff_is_one_of_those_in_a_call() -> None:
    task = next(iter(machine.handoff({}, 2)))
    assert isinstance(task, Task)
    assert 0 < task.visit()[0][1].values[0] < 1


# ---------------------------------------------------------------- links


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """doc/PERFORMANCE.md: 2 (n - 1) / n, (n - 1) / n and 1."""
    assert [collectives.bus_factor(op, 4) for op in collectives.OPS] == [1.5, 0.75, 1.0]
    assert [collectives.bus_factor(op, 2) for op in collectives.OPS] == [1.0, 0.5, 1.0]


@pytest.fixture
def ranks() -> Iterator[collectives.Ranks]:
    if not torch.distributed.is_available():
        pytest.skip("this torch has no torch.distributed")
    started = collectives.Ranks(2, "gloo", sorted(os.sched_getaffinity(0)))
    yield started
    started.close()


@pytest.mark.e2e
def test_two_processes_give_right_results_and_both_rates(ranks: collectives.Ranks) -> None:
    for task in collectives.tasks(ranks, (1024, 4100), {}):
        assert error(task) == 0
        (_, algbw), (busbw_spec, busbw) = task.visit()
        assert busbw_spec.parameters["rate"] == "busbw"
        factor = collectives.bus_factor(busbw_spec.name.removeprefix("collective."), 2)
        assert busbw.values == pytest.approx([factor * value for value in algbw.values])
    children = list(ranks._children)
    children[1].kill()
    with pytest.raises(MeasurementFailed, match="rank"):
        ranks.ask("all_reduce", 1024, 1)
    assert all(child.poll() is not None for child in children)


@pytest.mark.e2e
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="ends of foreign processes are awaited by pidfd, which is Linux's")
def test_ranks_do_not_outlive_a_parent_that_is_killed() -> None:
    program = (
        "import sys, time; from mlsys_bench.bench import collectives as c\n"
        "r = c.Ranks(2, 'gloo', ()); r.ask('send_recv', 64, 1)\n"
        "print(*[p.pid for p in r._children], flush=True); r.ask('all_reduce', 2**22, 10**6)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        ends = [os.pidfd_open(int(pid)) for pid in parent.stdout.readline().split()]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(ends) == 2
    for end in ends:
        assert select.select([end], [], [], 20)[0], "a rank is still there"
        os.close(end)


class Refusals:
    """What was refused, and why."""

    def __init__(self) -> None:
        self.why: list[str] = []
        self.heard: list[object] = []

    def sampled(self, planned: harness.Spec, sampled: harness.Sampled) -> None:
        """Note a round of samples."""
        self.heard.append((planned, sampled))

    def checked(self, planned: harness.Spec, error: float, tolerance: float | None) -> None:
        """Note an error."""
        self.heard.append((planned, error, tolerance))

    def progressed(self, done: int, of: int, left_s: float) -> None:
        """Note how far it is."""
        self.heard.append((done, of, left_s))

    def refused(self, planned: harness.Spec, why: str) -> None:
        """Note it."""
        self.why.append(f"{planned.name}: {why}")


def test_ranks_that_cannot_meet_are_a_row_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else is measured all the same."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    between, heard = collectives.Ranks(2, "gloo", (0,)), Refusals()
    task = collectives.tasks(between, (1024,), {})[0]
    harness.visit_all([task], rounds=1, deadline=math.inf, rng=np.random.default_rng(0), hearer=heard)
    assert len(heard.why) == 2
    assert "rank 0 of 2 (gloo) ended without an answer" in heard.why[0]


# ---------------------------------------------------------------- who else is on a core


def test_this_machine_tells_how_crowded_it_is_alike_from_look_to_look() -> None:
    """The least of many looks is a property of the processor: it repeats within the range that tells a neighbour."""
    look = alone.core(1)
    if look is None:
        pytest.skip("no C kernels, or a processor they do not know")
    least = [min(look().crowding for _ in range(300)) for _ in range(12)]  # a neighbour who comes or goes in between moves some of them
    assert 0.5 < min(least) < 20
    assert any(second == pytest.approx(first, rel=0.1) for first, second in itertools.pairwise(least))
