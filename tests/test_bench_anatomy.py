"""A decode step taken apart: by operators timed alone, and by the engine's own clock; and how a replica starts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import anatomy, models
from mlsys_bench.bench import alone, coldstart, operators, steps
from mlsys_bench.bench import anatomy as by_clock
from mlsys_bench.bench.harness import Task
from mlsys_bench.bench.options import SUITES, Options
from mlsys_bench.engine import Engine
from mlsys_bench.engine.native.linears import NativeLinear
from mlsys_bench.engine.rope import Rope
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.types import Launch, Measurement, Round, Scalar, Work
from tests.sample_checkpoints import LLAMA, llama_tensors, write

RUN: dict[str, Scalar] = {"device": "cpu", "threads": 1, "model": "nano", "precision": "bf16"}
LAYERS = 6

# ---------------------------------------------------------------- arithmetic


def measured(name: str, value: float, unit: str = "s", work: Work | None = None, **parameters: Scalar) -> Measurement:
    return of_cell(name, value, parameters, unit, work)


def of_cell(name: str, value: float, parameters: dict[str, Scalar], unit: str = "s", work: Work | None = None) -> Measurement:
    launches = (Launch(started_s=0, rounds=(Round(values=(value,)),)),)
    better: Literal["lower", "higher"] = "lower" if unit == "s" else "higher"
    return Measurement(name=name, unit=unit, better=better, parameters=RUN | parameters, launches=launches, work=work)


def features(batch: int, context: float) -> dict[str, Scalar]:
    kv_tokens, n = float(batch * context), float(batch)
    return {"decode_seqs": n, "decode_kv_tokens": kv_tokens, "prefill_tokens": 0.0, "prefill_pairs": 0.0, "sampled_tokens": n}


def step(batch: int, context: float, took_s: float) -> Measurement:
    return of_cell("engine.step", took_s, features(batch, context))


def linears(m: int, each_s: float) -> list[Measurement]:
    return [measured("op.linear", each_s, work=Work(bytes=1e6), layer=layer, m=m) for layer in ("qkv", "out", "gate_up", "down", "head")]


def test_rows_and_residual_of_a_step_by_hand() -> None:
    """4 x 6 matrices and a head of 100 us, 6 attentions of 50 us at this context: 2.8 ms of a step of 3.5 ms."""
    reads = measured("memory.read", 20e9, "B/s")
    attention = measured("op.attention.decode", 50e-6, batch=1, context_tokens=512)
    (found,) = anatomy.tables([step(1, 512, 3.5e-3), reads, *linears(1, 100e-6), attention])
    rows = {row.operator: row for row in found.rows}
    assert {name: row.count for name, row in rows.items()} == {
        "qkv": LAYERS, "out": LAYERS, "gate_up": LAYERS, "down": LAYERS, "head": 1, "attention": LAYERS,
    }  # fmt: skip
    assert found.predicted_s == pytest.approx(25 * 100e-6 + 6 * 50e-6)
    assert found.residual_s == pytest.approx(0.7e-3)
    assert found.explained == pytest.approx(0.8)
    assert rows["qkv"].bytes_per_s == pytest.approx(10e9)
    assert rows["qkv"].of_read == pytest.approx(0.5)
    assert rows["attention"].bytes_per_s is None
    assert found.missing == ("norm", "rope_append", "swiglu", "embedding", "sample", "scheduler")
    assert all(row.is_measured for row in found.rows)
    assert found.group_s("linears") == pytest.approx(2.5e-3)


times = st.floats(1e-9, 1.0)


@given(step_s=times, each_s=times, attention_s=times, batch=st.integers(1, 64), context=st.integers(1, 4096))
def test_rows_and_residual_always_add_up_to_the_step(step_s: float, each_s: float, attention_s: float, batch: int, context: int) -> None:
    attention = [measured("op.attention.decode", attention_s * c, batch=1, context_tokens=c) for c in (512, 8192)]
    (found,) = anatomy.tables([*parted(batch, context, step_s), *linears(1, each_s), *linears(64, 3 * each_s), *attention])
    assert sum(row.total_s for row in found.rows) + found.residual_s == pytest.approx(step_s, abs=1e-9 * (step_s + found.predicted_s))
    assert sum(row.share for row in found.rows) == pytest.approx(found.explained, rel=1e-9)


def parted(batch: int, context: int, step_s: float) -> list[Measurement]:
    """Return a step that the engine's clock took apart, so that there is a table whatever its batch."""
    shares = {"step": 1.0, "linears": 0.7, "between": 0.2, "host": 0.1}
    return [of_cell("engine.part", share * step_s, features(batch, context) | {"part": name}) for name, share in shares.items()]


def test_steps_that_the_clock_took_apart_are_the_ones_shown_small_batches_first() -> None:
    every = [*parted(8, 512, 4e-3), *parted(1, 512, 3e-3), step(1, 700, 3e-3), *linears(1, 1e-4), *linears(8, 1.1e-4)]
    found = anatomy.tables(every)
    assert [(t.batch, t.context_tokens) for t in found] == [(1, 512), (8, 512)]
    assert found[0].parts == pytest.approx({"linears": 2.1e-3, "between": 0.6e-3, "host": 0.3e-3})
    assert found[1].rows[0].each_s == pytest.approx(1.1e-4)


def test_a_record_without_the_clock_shows_the_longest_step_of_one_sequence() -> None:
    found = anatomy.tables([step(1, 100, 2e-3), step(1, 700, 3e-3), step(8, 900, 4e-3), *linears(1, 1e-4)])
    assert [(t.batch, t.context_tokens) for t in found] == [(1, 700)]
    assert found[0].parts == {}


def test_a_step_that_others_interrupted_says_so() -> None:
    whole, *parts = parted(1, 512, 4e-3)
    taken = Round(values=(4e-3, 5e-3, 4e-3, 9e-3), flagged=(False, True, False, True))
    disturbed = dataclasses.replace(whole, launches=(Launch(started_s=0, rounds=(taken,)),))
    (found,) = anatomy.tables([disturbed, *parts, *linears(1, 1e-4)])
    assert found.interrupted == 0.5
    assert found.step_s == pytest.approx(4e-3)  # of the others


def test_the_scheduler_is_a_step_without_a_model_less_the_choice_of_tokens_in_it() -> None:
    host, chosen = measured("engine.host", 120e-6, m=1, context_tokens=512), measured("op.sample", 20e-6, m=1, policy="argmax")
    nucleus = measured("op.sample", 900e-6, m=1, policy="top_p")
    rows = {row.operator: row.each_s for row in anatomy.tables([*parted(1, 512, 4e-3), host, chosen, nucleus])[0].rows}
    assert rows == pytest.approx({"scheduler": 100e-6, "sample": 20e-6})


def test_between_two_batches_a_matrix_is_on_the_line_and_says_so() -> None:
    found = anatomy.tables([*parted(8, 512, 4e-3), *linears(4, 100e-6), *linears(16, 160e-6)])[0]
    assert found.rows[0].each_s == pytest.approx(120e-6)
    assert not found.rows[0].is_measured


def test_beyond_the_batches_that_were_measured_nothing_is_guessed() -> None:
    assert anatomy.tables([*parted(32, 512, 4e-3), *linears(4, 100e-6), *linears(16, 160e-6)]) == ()


@pytest.mark.parametrize(
    ("batch", "context", "each_s", "is_measured"),
    [
        (1, 512, 50e-6, True),
        (1, 508, 49.6e-6, True),  # within 2 % of one that was measured
        (1, 256, 25e-6, False),  # from nothing at no context
        (1, 1024, 90e-6, False),  # on the line to the next
        (1, 4096, 260e-6, False),  # in proportion, no farther than twice
        (4, 384, 130e-6, False),  # by the tokens of all sequences: as one of 1,536
    ],
)
def test_attention_grows_with_what_is_attended_to(batch: int, context: int, each_s: float, is_measured: bool) -> None:
    attention = [measured("op.attention.decode", s, batch=1, context_tokens=c) for c, s in ((512, 50e-6), (1536, 130e-6), (2048, 130e-6))]
    (row,) = anatomy.tables([*parted(batch, context, 4e-3), *attention])[0].rows
    assert row.each_s == pytest.approx(each_s, rel=1e-3)
    assert row.is_measured is is_measured


def test_attention_is_not_guessed_beyond_twice_the_longest_context() -> None:
    attention = measured("op.attention.decode", 50e-6, batch=1, context_tokens=512)
    assert anatomy.tables([*parted(1, 1100, 4e-3), attention]) == ()


@pytest.mark.parametrize("other", [{"model": "small-160m"}, {"precision": "int8"}, {"threads": 2}, {"device": "cuda:0"}])
def test_operators_of_another_model_or_layout_explain_nothing(other: dict[str, Scalar]) -> None:
    strangers = [dataclasses.replace(m, parameters=m.parameters | other) for m in linears(1, 1e-4)]
    assert anatomy.tables([*parted(1, 512, 4e-3), *strangers]) == ()


def test_an_alias_of_a_precision_is_the_same_precision() -> None:
    aliased = [dataclasses.replace(m, parameters=m.parameters | {"precision": "int4"}) for m in parted(1, 512, 4e-3)]
    own_linears = [dataclasses.replace(m, parameters=m.parameters | {"precision": "int4g128"}) for m in linears(1, 1e-4)]
    assert len(anatomy.tables([*aliased, *own_linears])[0].rows) == 5


def test_a_rate_is_turned_into_the_time_of_its_work() -> None:
    """1 GFLOP at 10 TFLOP/s is 100 us; so is 1 MB at 10 GB/s."""
    rate = measured("op.linear", 10e12, "FLOP/s", Work(flops=1e9), layer="qkv", m=1)
    moved = measured("op.linear", 10e9, "B/s", Work(bytes=1e6), layer="out", m=1)
    rows = anatomy.tables([*parted(1, 512, 4e-3), rate, moved])[0].rows
    assert [row.each_s for row in rows] == pytest.approx([100e-6, 100e-6])


def test_a_model_nobody_knows_has_no_table() -> None:
    gone = [dataclasses.replace(m, parameters=m.parameters | {"model": "gone"}) for m in [*parted(1, 512, 4e-3), *linears(1, 1e-4)]]
    assert anatomy.tables(gone) == ()


# ---------------------------------------------------------------- the engine's own clock


def engine_bench(**change: object) -> steps.Bench:
    options = Options(model="nano", device="cpu", max_batch=2, max_step_tokens=64, max_context=160, **change)  # type: ignore[arg-type]
    suite = dataclasses.replace(SUITES["quick"], anatomy=((1, 64), (2, 48), (2, 500)), decode_steps=4)
    made = steps.engine_of(models.find("nano"), options, "fp32", "cpu")
    return steps.Bench(made, dict(RUN), suite, one_thread=True, seed=0)


@pytest.fixture(scope="module")
def bench() -> steps.Bench:
    made = engine_bench()
    steps.copy_block(made)
    return made


def test_parts_add_up_to_each_step(bench: steps.Bench) -> None:
    tasks = [task for task in by_clock.tasks(bench) if task.specs[0].name == anatomy.PART]
    assert len(tasks) == 2  # 500 tokens are more than the engine's longest
    for task in tasks:
        (spec, whole), *parts = task.visit()
        assert [s.parameters["part"] for s, _ in ((spec, whole), *parts)] == list(by_clock.names(bench.engine._model))
        assert all(s.parameters | {"part": 0} == spec.parameters | {"part": 0} for s, _ in parts)
        assert np.sum([r.values for _, r in parts], axis=0) == pytest.approx(whole.values, rel=1e-9)
        assert all(v > 0 for _, r in parts for v in r.values)
        assert not bench.engine.busy


def test_the_cell_lies_around_the_context_that_was_asked_for(bench: steps.Bench) -> None:
    spec, _ = by_clock.tasks(bench)[0].visit()[0]
    assert float(spec.parameters["decode_kv_tokens"] or 0) == pytest.approx(64, abs=2)


def test_a_step_without_a_model_is_timed_for_each_cell(bench: steps.Bench) -> None:
    tasks = [task for task in by_clock.tasks(bench) if task.specs[0].name == anatomy.HOST]
    assert [task.specs[0].parameters["m"] for task in tasks] == [1, 2]
    ((_, taken),) = tasks[1].visit()
    assert len(taken.values) == bench.suite.decode_steps
    assert not bench.engine.busy


def test_a_stand_in_reads_the_last_matrices_of_a_step_as_far_as_caches_hold_them_several_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nano's head in fp32 is 320 x 512, and `down` before it 512 x 1536."""
    matrices = [linear for linear in all_linears(engine_bench()) if isinstance(linear, NativeLinear)]
    if not matrices:
        pytest.skip("no C compiler on this machine")
    head, down = (linear.n * linear.k * 4 for linear in reversed(matrices[-2:]))
    assert by_clock._last(matrices, 0) == by_clock._last(matrices, head) == matrices[-1:]
    assert by_clock._last(matrices, head + down) == matrices[-2:]
    assert by_clock._last(matrices, 1e12) == matrices


def all_linears(bench: steps.Bench) -> list[object]:
    weights = bench.engine._model.weights
    return [*(linear for layer in weights.layers for linear in layer.linears()), weights.head]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_stand_in_reads_of_either_backend_and_leaves_the_cache_as_it_was(backend: str) -> None:
    own_bench = engine_bench(backend=backend)
    held = own_bench.engine._cache.raw.clone()
    by_clock.reader(own_bench, 2, 64)()
    assert torch.equal(own_bench.engine._cache.raw, held)


def test_torch_does_not_tell_its_products_apart() -> None:
    torch_bench = engine_bench(backend="torch")
    (_, whole), (first, model), (second, host) = by_clock.tasks(torch_bench)[0].visit()
    assert (first.parameters["part"], second.parameters["part"]) == ("model", "host")
    assert np.add(model.values, host.values) == pytest.approx(whole.values)


def taken(task: Task) -> list[Measurement]:
    return [
        Measurement(
            name=spec.name, unit=spec.unit, better=spec.better, parameters=spec.parameters, work=spec.work,
            launches=(Launch(started_s=0, rounds=(found,)),),
        )
        for spec, found in task.visit()
    ]  # fmt: skip


def test_every_operator_of_a_step_has_a_row_by_the_names_it_is_measured_under(bench: steps.Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real operators of the real model, small copies of their weights: nothing is missing, and rows and residual are the step."""
    monkeypatch.setattr(operators, "COLD", 0)
    kind = bench.engine._cache.dtype
    decoder = Decoder(shape=bench.engine.shape, rope=Rope(dim=bench.engine.shape.head_dim))
    who = alone.computes(decoder, precision="fp32", kv=kind, device=torch.device("cpu"), asked="auto", threads=1)
    ops = operators.Operators(decoder, who, precision="fp32", kv=kind, common={"device": "cpu", "threads": 1}, device="cpu", threads=1)
    alone_tasks = [*ops.linears((1,)), ops.decode(64, 1), ops.norm(1), ops.rope_append(1), ops.swiglu(1), ops.embedding(1)]
    fp32 = dataclasses.replace(SUITES["quick"], anatomy=((1, 64),), decode_steps=3)
    inside = steps.Bench(bench.engine, RUN | {"precision": "fp32"}, fp32, one_thread=True, seed=0)
    every = [*alone_tasks, ops.sample(1, "argmax"), ops.sample(1, "top_p"), *by_clock.tasks(inside)]
    (found,) = anatomy.tables([m for task in every for m in taken(task)])
    assert found.missing == ()
    assert [row.operator for row in found.rows if not row.is_measured] == []
    assert len(found.rows) == 12
    assert sum(row.total_s for row in found.rows) + found.residual_s == pytest.approx(found.step_s)


# ---------------------------------------------------------------- contexts that are laid, not computed


def test_laid_contexts_are_those_of_computed_ones(bench: steps.Bench) -> None:
    """The scheduler holds the same, and the next step reports the same features."""
    lengths, found = [50, 33], []
    for is_laid in (True, False):
        ids = bench.lay(lengths) if is_laid else computed(bench, lengths)
        found.append((bench.engine.free_blocks, bench.engine.step().features))
        bench.drop(ids)
    assert found[0] == found[1]


def computed(bench: steps.Bench, lengths: list[int]) -> list[int]:
    ids = [bench.add(tokens, bench.engine.limits.max_context - tokens) for tokens in lengths]
    while bench.engine.step().features.decode_seqs < len(ids):
        pass
    return ids


def test_every_block_holds_what_the_model_wrote_to_one() -> None:
    own_bench = engine_bench()
    steps.copy_block(own_bench)
    raw = own_bench.engine._cache.raw
    assert bool(raw[:, 0].any())
    assert bool((raw == raw[:, :1]).all())


# ---------------------------------------------------------------- cold starts


def test_a_start_is_steady_with_the_first_four_steps_that_are_no_slower_than_later_ones() -> None:
    """9 + 5 + 1.05 + 1 + 1 ms: the median of the last four of them, 1.025 ms, is within 10 % of the later half's."""
    took_ms = [9, 5, 1.05, 1, 1, 1, 1, 1, 1, 1]
    assert coldstart.steady_s([t / 1e3 for t in took_ms]) == pytest.approx(17.05e-3)
    assert coldstart.steady_s([1e-3] * 8) == pytest.approx(4e-3)
    assert coldstart.steady_s([2e-3]) == pytest.approx(2e-3)


def test_phases_of_a_start_add_up_to_its_total_and_weights_come_at_a_rate(tmp_path: Path) -> None:
    """A real checkpoint in two files; its load is what it weighs over the time of the phase."""
    folder = write(tmp_path / "llama", LLAMA, llama_tensors(LLAMA), shards=2)
    options = Options(model=str(folder), device="cpu", max_batch=1, max_context=64)
    phases = coldstart.Phases(0.0)
    phases.end("process")
    phases.end("import")

    def make() -> Engine:
        return steps.engine_of(models.find(str(folder)), options, "fp32", "cpu")

    engine, took_s = coldstart.start(make, phases, folder)
    parts = [phases.seconds[name] for name in ("process", "import", "weights", "first_token")]
    assert sum(parts) == pytest.approx(phases.seconds["total"])
    assert phases.seconds["steady"] <= sum(took_s)
    assert not engine.busy
    *cold, (load, rate) = coldstart.sampled(phases, engine, {"model": "x"}, folder)
    assert [s.parameters["phase"] for s, _ in cold] == list(phases.seconds)
    held = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    assert load.parameters == {"model": "x", "source": "checkpoint", "page_cache": "dropped"}
    assert rate.values[0] == pytest.approx(held / phases.seconds["weights"])
    (task,) = coldstart.reloading(make, engine, {"model": "x"}, folder, cost_s=1.0)
    assert task.visit()[0][0].parameters["page_cache"] == "kept"


def test_random_weights_have_no_files_to_load() -> None:
    made = engine_bench().engine
    spec = coldstart.load_spec({}, None, coldstart.bytes_of(made, None), cache="dropped")
    assert spec.parameters == {"source": "random"}
    assert coldstart.reloading(lambda: None, made, {}, None, cost_s=1.0) == []


def test_a_step_must_read_its_weights_and_cache(bench: steps.Bench) -> None:
    """Nano in fp32: 14.71 M parameters and 100 tokens of 6 layers x 2 x 2 x 64 values, of 4 bytes each; packed with its tied head once."""
    work = bench.work(1, 100, 0, 0, 1)
    assert work.bytes == pytest.approx((models.linear_params(models.find("nano")) + 100 * LAYERS * 2 * 2 * 64) * 4, rel=0.02)
    assert work.flops == pytest.approx(
        2 * models.linear_params(models.find("nano")) + 100 * models.attention_flops_per_pair(bench.engine.shape)
    )
