"""Measuring: real child processes, what they leave behind, and how a reader sees it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import bench, hardware, latency, models, record
from mlsys_bench.batching import Limits
from mlsys_bench.bench import companion, harness, steps, worker
from mlsys_bench.bench.options import SUITES, checked, wants
from mlsys_bench.engine import Engine
from mlsys_bench.errors import BadInput, MeasurementFailed, UnknownName
from mlsys_bench.readings.catalogue import CATALOGUE
from mlsys_bench.types import Bench, Launch, Measurement, Round, Scalar

SMALL = bench.Options(device="cpu", max_batch=2, max_step_tokens=64, max_context=128, kv_tokens=512, budget_s=25.0)

# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"suite": "quik"}, "did you mean quick"),
        ({"only": ("gem", "memry")}, "unknown benchmark 'memry'"),
        ({"precisions": ("int3",)}, "does not run in 'int3'"),
        ({"precisions": ()}, "no precision"),
        ({"device": "gpu"}, "auto, cpu or cuda:0"),
        ({"launches": 0}, "launches is 0"),
        ({"budget_s": -1.0}, "budget_s is -1"),
        ({"threads": 0}, "threads is 0"),
        ({"model": "nono"}, "unknown model 'nono'"),
    ],
)
def test_options_that_cannot_be_measured_are_refused_before_anything_starts(change: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        bench.run(bench.Options(**change))


def test_a_model_is_kept_under_its_catalogue_name() -> None:
    assert checked(bench.Options(model="TinyLlama")).model == "tinyllama-1.1b"


def test_names_are_chosen_whole_or_by_their_beginning() -> None:
    names = [entry.name for entry in CATALOGUE if entry.line]
    assert [n for n in names if wants(("memory", "engine.step"), n)] == ["memory.read", "memory.copy", "memory.triad", "engine.step"]
    assert all(wants((), n) for n in names)


# ---------------------------------------------------------------- the harness


def test_samples_carry_time_processor_time_and_switches() -> None:
    samples = harness.Samples(one_thread=True)
    for _ in range(3):
        samples.take(lambda: sum(range(20_000)))
    taken = samples.round(lambda seconds: 1 / seconds)
    assert len(taken.values) == len(taken.cpu_s or ()) == len(taken.involuntary or ()) == 3
    assert all(0 < cpu_s <= wall_s * 1.5 for cpu_s, wall_s in zip(taken.cpu_s or (), samples.values, strict=True))


def test_warming_up_ends_after_its_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that never overlap: every call takes twice as long as the one before."""
    calls = itertools.count()
    monkeypatch.setattr(harness, "_times", lambda work, count, deadline: [2.0 ** next(calls) for _ in range(count)])
    assert harness.warm_up(lambda: None, block=2, tries=3) == (2.0**4 + 2.0**5) / 2
    assert next(calls) == 6


# ---------------------------------------------------------------- steps of the real engine


@pytest.fixture(scope="module")
def engine_bench() -> steps.Bench:
    limits = Limits(max_seqs=4, max_step_tokens=64, block_tokens=16, blocks=48, max_context=192)
    suite = dataclasses.replace(SUITES["quick"], contexts=(24, 64), chunks=(8, 32), decode_steps=2, prefill_steps=2)
    engine = Engine(models.find("nano"), precision="fp32", device="cpu", limits=limits, seed=0, threads=1)
    common: dict[str, Scalar] = {"model": "nano", "precision": "fp32", "device": "cpu", "threads": 1}
    return steps.Bench(engine, common, suite, one_thread=True, seed=0)


def test_each_cell_measures_the_step_it_names(engine_bench: steps.Bench) -> None:
    """The engine reports the features: the sequences and chunk that were asked for, and contexts that grew by the steps in between."""
    tasks = steps.tasks(engine_bench)
    assert len(tasks) == 2 + 2 * 2 + 1  # contexts, chunks x past, and the one mixture that fits
    for task in tasks:
        sampled = task.visit()
        assert not engine_bench.engine.busy
        for planned, (measured, taken) in zip(task.specs, sampled, strict=True):
            for name in ("decode_seqs", "prefill_tokens", "prefill_pairs", "sampled_tokens"):
                assert measured.parameters[name] == planned.parameters[name]
            grown = float(measured.parameters["decode_kv_tokens"] or 0) - float(planned.parameters["decode_kv_tokens"] or 0)
            assert 0 <= grown <= 24 * float(planned.parameters["decode_seqs"] or 0)
            assert len(taken.values) == 2


def test_a_batch_spreads_evenly_around_its_context() -> None:
    """Between half and one and a half times, whatever part of the batch is left after halving it."""
    assert steps.uneven(100, 8) == [100, 50, 125, 75, 112, 62, 138, 88]
    assert steps.uneven(1, 2) == [1, 1]
    for batch in (1, 2, 4, 8, 16):
        lengths = steps.uneven(1000, batch)
        assert min(lengths) >= 500
        assert max(lengths) <= 1500
        assert abs(sum(lengths) / batch - 1000) <= 250


def test_batches_lie_so_close_that_a_change_of_kernels_is_found() -> None:
    """MKL takes 40 % more from four tokens on: a grid of 8, 4, 2, 1 cannot tell where between two and four that is."""
    assert steps.sizes(8) == [8, 6, 4, 3, 2, 1]
    assert steps.sizes(12) == [12, 9, 6, 4, 3, 2, 1]
    assert steps.sizes(1) == [1]


def test_cells_are_the_same_in_every_round_and_launch(engine_bench: steps.Bench) -> None:
    """Launches are merged by name and parameters, so the features must not depend on what ran before."""
    task = steps.tasks(engine_bench)[0]
    once, again = task.visit(), task.visit()
    assert [s.parameters for s, _ in once] == [s.parameters for s, _ in again]


def test_logits_that_are_no_numbers_end_the_measurement() -> None:
    limits = Limits(max_seqs=1, max_step_tokens=64, block_tokens=16, blocks=8, max_context=64)
    engine = Engine(models.find("nano"), precision="fp32", device="cpu", limits=limits, seed=0, threads=1)
    broken = steps.Bench(engine, {"precision": "fp32"}, SUITES["quick"], one_thread=True, seed=0)
    steps.refuse_nan(broken)
    engine._model.weights.gain.fill_(float("nan"))
    with pytest.raises(MeasurementFailed, match="NaN logits"):
        steps.refuse_nan(broken)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def small() -> Bench:
    """Two launches of a small engine, everything but the model's own matrices; the budget is for a machine that is very busy."""
    suite = ("memory.read", "gemm", "engine.step", "engine.coldstart")
    return bench.run(dataclasses.replace(SMALL, max_context=256, only=suite, launches=2, rounds=1, budget_s=600.0))


@pytest.mark.e2e
def test_a_run_keeps_every_sample_by_launch_and_round(small: Bench) -> None:
    names = {m.name for m in small.measurements}
    assert names == {"memory.read", "gemm", "engine.coldstart", "engine.step"}
    for m in (m for m in small.measurements if m.parameters.get("precision") != "fp8"):  # for which a CPU has no units
        assert m.skipped is None
        assert len(m.launches) == 2
        assert all(v > 0 for launch in m.launches for r in launch.rounds for v in r.values)
    step = next(m for m in small.measurements if m.name == "engine.step")
    assert step.launches[0].started_s < step.launches[1].started_s
    assert step.parameters["max_batch"] == 2
    assert step.parameters["kv_tokens"] == 512
    assert step.parameters["pinned_cores"] == str(min(os.sched_getaffinity(0)))


@pytest.mark.e2e
def test_a_run_survives_its_file(small: Bench, tmp_path: Path) -> None:
    path = record.write(tmp_path / "bench.json", small, hardware.machine())
    assert record.read(path, Bench) == small


@pytest.mark.e2e
def test_a_reader_sees_the_share_of_what_the_machine_can_do(small: Bench) -> None:
    rows = bench.table(small)
    assert [r.name for r in rows[:2]] == ["memory.read", "gemm"]
    assert rows[0].share == 1.0
    assert max(r.share or 0.0 for r in rows if r.name == "gemm") == 1.0
    for row in (r for r in rows if r.name == "engine.step"):
        assert row.median is not None
        assert row.share is not None
        assert row.bound is not None
        assert row.interval is None or row.interval[0] <= row.median <= row.interval[1]


def test_a_decode_row_counts_weights_and_cache_by_hand() -> None:
    """14.71 M linear parameters of 4 bytes and 100 cached tokens of 6 layers x 2 x 2 x 64 x 4 bytes, in 10 ms."""
    a = models.find("nano")
    parameters: dict[str, Scalar] = {"model": "nano", "precision": "fp32", "decode_seqs": 1.0, "decode_kv_tokens": 100.0}
    parameters |= {"prefill_tokens": 0.0, "prefill_pairs": 0.0, "sampled_tokens": 1.0}
    launches = (Launch(started_s=0, rounds=(Round(values=(0.01,)),)),)
    step = Measurement(name="engine.step", unit="s", better="lower", parameters=parameters, launches=launches)
    read = Measurement(
        name="memory.read", unit="B/s", better="higher", parameters={}, launches=(Launch(started_s=0, rounds=(Round(values=(10e9,)),)),)
    )
    row = bench.table(Bench(measurements=(step, read)))[1]
    assert row.bytes_per_s == pytest.approx((models.linear_params(a) * 4 + 100 * 6 * 2 * 2 * 64 * 4) / 0.01)
    assert row.bound == "memory"
    assert row.share == pytest.approx((row.bytes_per_s or 0) / 10e9)
    assert row.what == "nano fp32: decode 1 x 100"


@pytest.mark.e2e
def test_a_run_can_be_fitted_and_tells_its_layout(small: Bench) -> None:
    """Prefill of two lengths, batches 2 and 1, two contexts: enough for a profile, whose floor the cells respect."""
    assert {m.skipped for m in small.measurements if m.name == "engine.step"} == {None}
    profile = latency.fit(small)
    assert profile.layout.model == "nano"
    assert profile.layout.threads == 1
    assert profile.constants["max_step_tokens"] == 64
    for r in latency.residuals(profile, small):
        assert r.measured_s >= latency.floor_s(profile, r.features) * (1 - 1e-9)


@pytest.mark.e2e
def test_what_the_budget_did_not_allow_is_named() -> None:
    found = bench.run(dataclasses.replace(SMALL, only=("engine.step",), budget_s=0.05))
    assert found.measurements
    for m in found.measurements:
        assert m.launches == ()
        assert "within the budget of 0.05 s" in (m.skipped or "")


@pytest.mark.e2e
def test_a_device_that_is_not_there_is_bad_input_of_the_parent_too() -> None:
    if not isinstance(hardware.nvml_gpus(), str):
        pytest.skip("this machine has a GPU")
    with pytest.raises(BadInput, match="no CUDA device"):
        bench.run(dataclasses.replace(SMALL, device="cuda:0", only=("gemm",)))


@pytest.mark.e2e
def test_a_child_that_breaks_is_a_failed_measurement_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torch that cannot be imported stands for any crash of the child."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('no kernel image is available')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(MeasurementFailed, match=r"ended early \(exit 1\): RuntimeError: no kernel image is available"):
        bench.run(dataclasses.replace(SMALL, only=("gemm",)))


INTERRUPTED = """
import dataclasses, os, signal, sys
from mlsys_bench import bench, hardware, record
small = {"max_batch": 2, "max_step_tokens": 64, "max_context": 128}
options = bench.Options(device="cpu", only=("memory", "engine.step"), budget_s=900.0, launches=3, **small)
def show(p):
    if p.rounds == 3:
        print("child", *[c for c in open(f"/proc/self/task/{os.getpid()}/children").read().split()], flush=True)
        os.kill(os.getpid(), signal.SIGINT)
found = bench.run(options, show)
sys.stdout.write(record.dumps(found, hardware.machine()))
"""


@pytest.mark.e2e
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from /proc")
def test_ctrl_c_keeps_what_was_measured_and_leaves_no_child() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, _, rest = done.stdout.partition("\n")
    children = [int(pid) for pid in first.split()[1:]]
    assert len(children) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(children[0], 0)
    _, found = record.loads(rest, "bench.json")
    assert isinstance(found, Bench)
    kept = [m for m in found.measurements if m.launches]
    assert kept
    assert all(m.skipped is None for m in kept)
    assert {m.skipped for m in found.measurements if not m.launches} == {"interrupted"}
    assert found.stopped == "stopped by hand in launch 1 of 3"
    assert json.loads(rest)["kind"] == "bench"


@pytest.mark.e2e
def test_the_child_ends_when_nobody_listens() -> None:
    """A parent that is killed cannot end its child: the broken pipe does."""
    request = {"options": dataclasses.asdict(dataclasses.replace(SMALL, only=("memory.read",))), "launch": 0, "spawned_s": 0.0}
    child = subprocess.Popen([sys.executable, "-m", worker.__name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdout.close()
    child.stdin.write(json.dumps(request))
    child.stdin.close()
    assert child.wait(timeout=60) in (1, 120, -signal.SIGPIPE)


def test_a_name_nobody_knows_is_an_unknown_name() -> None:
    with pytest.raises(UnknownName):
        checked(bench.Options(only=("nothing",)))


# ---------------------------------------------------------------- the neighbour


def test_the_neighbour_sits_on_the_core_after_the_engine() -> None:
    assert companion.spare("0", (0, 1, 2)) == (1,)
    assert companion.spare("2,3", (2, 3)) == ()
    assert companion.spare(None, (0, 1)) == ()


def test_the_neighbour_passes_tokens_on() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert companion.pass_on(ours, theirs, 66) == "B"


@pytest.mark.e2e
def test_the_neighbour_works_while_it_is_wanted_and_leaves_nothing_behind() -> None:
    with companion.beside((max(os.sched_getaffinity(0)),)) as is_there:
        assert is_there
    with companion.beside(()) as is_there:
        assert not is_there
