"""The worker of `gate run` from inside: turns, warm-up, counters, and the conversation of a real process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mlsys_bench
from mlsys_bench.bench import gated, turns
from mlsys_bench.bench.harness import Spec
from mlsys_bench.bench.turns import Benchmark, Turns
from mlsys_bench.engine.native import library
from mlsys_bench.errors import UnknownName
from mlsys_bench.journeys.gating import benchmarks, sending
from mlsys_bench.readings.catalogue import CATALOGUE

TIME = Spec(name="work", unit="s", better="lower")
CALLS = Spec(name="work.calls", unit="calls", better="lower", deterministic=True)
PEAK = Spec(name="work.peak", unit="B", better="lower")


# ---------------------------------------------------------------- turns


def test_warm_is_three_block_medians_in_a_row_within_two_percent() -> None:
    assert not turns.settled([1.0, 1.0])
    assert turns.settled([1.0, 1.02, 1.01])
    assert not turns.settled([1.0, 1.021, 1.0])
    assert turns.settled([9.0, 1.0, 1.01, 1.0]), "what came before the last three does not count"


def test_a_turn_is_ten_iterations_or_twenty_milliseconds_and_never_long() -> None:
    assert turns.iterations(1e-4) == 200
    assert turns.iterations(1e-3) == 20
    assert turns.iterations(5e-3) == 10
    assert turns.iterations(0.02) == 3, "ten would take 200 ms"
    assert turns.iterations(3.0) == 1


def test_the_first_turn_warms_up_and_sets_the_state_back_and_all_do_the_same() -> None:
    """One warm-up of at least three blocks in the first turn; then a refill, one untimed call and the timed ones."""
    calls: list[str] = []
    ours = Turns(
        Benchmark(
            spec=TIME, work=lambda: calls.append("work"), iterations=4, before=lambda: calls.append("before"),
            counted=lambda: [(CALLS, 7.0)],
        )
    )  # fmt: skip
    first = ours.take(1)
    warm = calls[: len(calls) - 6]
    assert calls[len(warm) :] == ["before", *["work"] * 5], "set back after the warm-up, then one that is not timed"
    assert warm[0] == "before"
    assert warm.count("work") >= turns.AGREEING * turns.LEAST
    assert [(spec.name, len(taken.values)) for spec, taken in first] == [("work", 4), ("work.calls", 1)]
    calls.clear()
    second = ours.take(2)
    assert calls == ["work"] * 5, "a turn goes on where the last one ended"
    assert [spec.name for spec, _ in second] == ["work"], "counters are counted once a launch"


def test_samples_go_with_their_cpu_time_and_switches_and_are_shared_out_over_the_units_of_work() -> None:
    def spin() -> None:
        sum(range(20_000))

    whole, shared = (Turns(Benchmark(spec=TIME, work=spin, iterations=40, per=per)).take(1)[0][1] for per in (1, 1000))
    assert whole.cpu_s is not None
    assert whole.involuntary is not None
    assert len(whole.cpu_s) == len(whole.involuntary) == len(whole.values) == 40
    assert sum(whole.cpu_s) <= 1.05 * sum(whole.values) + 1e-3
    assert 300 < sorted(whole.values)[20] / sorted(shared.values)[20] < 3000


def test_work_that_takes_long_has_fewer_turns() -> None:
    ours = Turns(Benchmark(peaks=lambda: [(PEAK, 1.0)], turns=2))
    assert [len(ours.take(number)) for number in (1, 2, 3)] == [1, 1, 0]


def test_a_peak_is_asked_for_after_every_turn() -> None:
    asked = iter((10.0, 20.0))
    ours = Turns(Benchmark(peaks=lambda: [(PEAK, next(asked))]))
    assert [ours.take(number)[0][1].values for number in (1, 2)] == [(10.0,), (20.0,)]


# ---------------------------------------------------------------- this project's benchmarks


def test_the_counters_of_a_decode_step_are_those_of_its_batch_and_the_same_every_time() -> None:
    """Sequences of 48 tokens on average, each with the token just made: the keys a step attends to, and the blocks of 16 they fill."""
    ours = gated.decode()
    first, again = ({spec.name: value for spec, value in ours.counted()} for _ in range(2))
    assert first == again
    from mlsys_bench.bench import steps

    lengths = [tokens + 2 for tokens in steps.uneven(gated.CONTEXT, gated.BATCH)]  # the step after the one that filled the batch
    assert first["engine.decode.kv_tokens"] == pytest.approx(sum(lengths), abs=2 * gated.BATCH)
    assert first["engine.decode.kv_blocks"] == pytest.approx(sum(-(-n // 16) for n in lengths), abs=gated.BATCH)
    assert (first["engine.decode.operators"] == 1) == (library.load() is not None), "one call in C, or many operators of torch"
    assert all(spec.deterministic for spec, _ in ours.counted())


def test_int8_is_a_little_off_and_always_by_the_same() -> None:
    """A step of 1/127 of a row's largest weight is an error of under a percent a layer; fp32 against itself is exactly none."""
    (divergence, error), again = (gated.against("int8", prompts=2) for _ in range(2))
    assert (divergence, error) == again
    assert 0 < error < 0.1
    assert 0 < divergence < error, "a divergence is of second order in the error"
    assert gated.against("fp32", prompts=1) == (0.0, 0.0)


def test_the_sender_answers_every_request_of_an_iteration() -> None:
    ours = sending.Sending()
    ours.go()
    ours.go()
    assert (ours.sender.ok, ours.sender.failed, ours.sender.in_flight) == (2 * sending.REQUESTS, 0, 0)
    assert ours.rows.length > 2 * sending.REQUESTS * sending.EVENTS, "a row holds a stamp of every token"
    ours.close()


def test_the_plan_of_the_gate_costs_what_its_fleet_costs() -> None:
    figures = {spec.name: (value, spec.deterministic) for spec, value in benchmarks.planner().counted()}
    assert figures["planner.plan.replicas"][0] >= 1
    assert figures["planner.plan.usd_per_hour"][0] > 0
    assert all(is_counter for _, is_counter in figures.values())


def test_the_gates_benchmarks_are_listed_and_a_wrong_name_says_what_is_near() -> None:
    assert set(benchmarks.names()) <= {entry.name for entry in CATALOGUE}
    with pytest.raises(UnknownName, match=r"did you mean engine\.decode"):
        benchmarks.work("engine.decod")


# ---------------------------------------------------------------- the conversation


def worker(name: str, said: str) -> tuple[list[dict[str, object]], int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "mlsys_cli", "bench", "--worker", name], input=said, capture_output=True, text=True, check=False, timeout=120
    )
    return [json.loads(line) for line in done.stdout.splitlines()], done.returncode, done.stderr


@pytest.mark.e2e
def test_a_worker_says_hello_takes_turns_and_ends_with_its_input() -> None:
    (hello, first, second), status, _ = worker("loadtest.sender", "turn 1\nturn 2\n")
    assert status == 0
    assert (hello["protocol"], hello["benchmark"]) == (turns.PROTOCOL, "loadtest.sender")
    assert Path(str(hello["sources"])) == Path(mlsys_bench.__file__).parent
    assert isinstance(hello["machine"], dict)
    assert "cpu_model" in hello["machine"]["hard"]
    assert (first["turn"], second["turn"]) == (1, 2)
    samples = second["samples"]
    assert isinstance(samples, list)
    (sample,) = samples
    assert (sample["name"], sample["unit"], sample["better"]) == ("loadtest.sender", "s", "lower")
    assert min(sample["values"]) > 0
    assert len(sample["values"]) == len(sample["cpu_s"]) == len(sample["involuntary"])


@pytest.mark.e2e
def test_a_worker_that_is_told_nonsense_says_so_and_ends() -> None:
    (_, error), status, _ = worker("loadtest.sender", "measure now\n")
    assert status == 2
    assert error["error"] == "BadInput"
    assert "turn N" in str(error["text"])


def test_a_worker_of_no_such_benchmark_ends_as_for_a_wrong_option() -> None:
    said, status, trouble = worker("engine.dcode", "")
    assert (said, status) == ([], 2)
    assert "did you mean engine.decode" in trouble
