"""Ways of batching on the real engine: the same requests, other groups."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import models
from mlsys_bench.bench import energy, policies, steps
from mlsys_bench.bench.options import SUITES, Options
from mlsys_bench.bench.policies import Request
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.hardware.devices import Nvml, Rapl

SEATS = 2


@pytest.fixture(scope="module")
def bench() -> steps.Bench:
    options = Options(model="nano", device="cpu", max_batch=SEATS, max_step_tokens=32, max_context=64)
    engine = steps.engine_of(models.find("nano"), options, "fp32", "cpu")
    return steps.Bench(engine, {"model": "nano"}, SUITES["quick"], one_thread=True, seed=3)


def asked(*outputs: int) -> list[Request]:
    return [Request((65, 66), output) for output in outputs]


def test_a_static_batch_is_computed_until_its_longest_answer_ends() -> None:
    given_to = [[r.output for r in group] for group in policies.groups("static", asked(3, 9, 4), SEATS)]
    assert given_to == [[9, 9], [4]]


def test_a_dynamic_batch_is_whoever_waits_and_a_continuous_one_is_all() -> None:
    assert [[r.output for r in g] for g in policies.groups("dynamic", asked(3, 9, 4), SEATS)] == [[3, 9], [4]]
    assert [[r.output for r in g] for g in policies.groups("continuous", asked(3, 9, 4), SEATS)] == [[3, 9, 4]]


def test_steps_that_each_way_takes_by_hand(bench: steps.Bench) -> None:
    """Answers of 2, 8, 8 tokens on two seats.  Static and dynamic: 8 steps, then 8.  Continuous: the third takes the first one's seat
    after 2 steps and ends 8 later: 10.
    """
    taken = {}
    for policy in policies.POLICIES:
        before, counted = bench.engine.step, itertools.count()

        def step(count: itertools.count[int] = counted, real: object = before) -> object:
            next(count)
            return real()  # type: ignore[operator]

        bench.engine.step = step  # type: ignore[method-assign,assignment]
        try:
            given_tokens = policies.serve(bench.engine, policy, asked(2, 8, 8))
        finally:
            bench.engine.step = before  # type: ignore[method-assign]
        taken[policy] = (next(counted), given_tokens)
    assert taken == {"static": (16, 24), "dynamic": (16, 18), "continuous": (10, 18)}
    assert {p: policies.steps_of(p, asked(2, 8, 8), SEATS) for p in taken} == {"static": 16, "dynamic": 16, "continuous": 17}


def test_tokens_nobody_asked_for_do_not_count(bench: steps.Bench) -> None:
    """Each way's rate is the tokens that were asked for over its time, and nothing is left behind."""
    for task in policies.tasks(bench, 6):
        ((spec, taken),) = task.visit()
        assert spec.unit == "token/s"
        assert taken.values[0] > 0
        assert spec.parameters["requests"] == 6
        assert not bench.engine.busy
    assert [t.specs[0].parameters["policy"] for t in policies.tasks(bench, 6)] == list(policies.POLICIES)


def test_energy_stands_beside_where_the_machine_counts_it(bench: steps.Bench) -> None:
    """A counter that has grown by 50 J after each run."""
    counter = itertools.count(0, 50)
    task = policies.tasks(bench, 4, joules=lambda: float(next(counter)))[0]
    (_, _), (spec, taken) = task.visit()
    assert spec.unit == "J/token"
    assert taken.values == (50 / float(spec.parameters["output_tokens"] or 0),)


def powercap(root: Path, microjoules: int) -> Path:
    for folder, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "core"), ("intel-rapl:0:1", "dram")):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / "name").write_text(name)
        (root / folder / "max_energy_range_uj").write_text("1000000000")
        (root / folder / "energy_uj").write_text(str(microjoules))
    return root


def test_a_cpu_is_counted_by_package_and_memory(tmp_path: Path) -> None:
    """The cores lie inside the package and count once; a counter that begins anew has grown."""
    joules = energy.counter("cpu", rapl=Rapl(powercap(tmp_path, 900_000_000)))
    assert joules is not None
    assert joules() == pytest.approx(1800)
    powercap(tmp_path, 100_000_000)
    assert joules() == pytest.approx(1800 + 2 * 200)


def test_a_machine_that_counts_no_energy_has_no_counter(tmp_path: Path) -> None:
    assert energy.counter("cpu", rapl=Rapl(tmp_path / "none")) is None
    assert energy.counter("cuda:0", nvml=Nvml(drivers=())) is None


@pytest.mark.parametrize(("visible", "index"), [("", "1"), ("3,5", "5"), ("GPU-1,GPU-2", "1"), ("7", "1")])
def test_the_driver_counts_gpus_that_torch_does_not_see(visible: str, index: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert energy._nvml_index("cuda:1") == index


def test_an_engine_without_room_for_a_batch_has_no_policies() -> None:
    options = Options(model="nano", device="cpu", max_batch=SEATS, max_context=64, kv_tokens=16)
    engine = steps.engine_of(models.find("nano"), options, "fp32", "cpu")
    assert policies.tasks(steps.Bench(engine, {}, SUITES["quick"], one_thread=True, seed=0), 4) == []


def test_a_pool_too_small_is_told(bench: steps.Bench) -> None:
    """Two long answers outgrow a pool of three blocks: one must give way, which would be timed with the rest."""
    options = Options(model="nano", device="cpu", max_batch=SEATS, max_context=48, kv_tokens=48)
    engine = steps.engine_of(models.find("nano"), options, "fp32", "cpu")
    with pytest.raises(MeasurementFailed, match="more kv_tokens"):
        policies.serve(engine, "continuous", asked(40, 40))


@given(count=st.integers(1, 200), longest=st.integers(2, 256), seed=st.integers(0, 9))
def test_requests_fit_and_are_the_same_for_a_seed(count: int, longest: int, seed: int) -> None:
    found = policies.requests(count, vocab=320, longest=longest, seed=seed)
    assert found == policies.requests(count, vocab=320, longest=longest, seed=seed)
    assert len(found) == count
    assert all(len(r.prompt) >= 1 and r.output >= 1 and len(r.prompt) + r.output <= longest for r in found)


def test_lengths_are_exponential_without_luck_in_their_mean() -> None:
    found = policies.requests(256, vocab=320, longest=10_000, seed=1)
    outputs = sorted(r.output for r in found)
    assert sum(outputs) / 256 == pytest.approx(policies.MEAN_TOKENS, rel=0.03)
    assert outputs[128] == pytest.approx(policies.MEAN_TOKENS * 0.693, abs=1)  # its median is ln 2 of the mean
