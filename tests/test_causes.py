"""The parts of a prediction's error, with the truth known: an engine whose decodes have slowed since it was calibrated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mlsys_bench import latency, simulate, stats, workload
from mlsys_bench.batching import StepFeatures
from mlsys_bench.checked import Causes, Check
from mlsys_bench.journeys import causes, served
from mlsys_bench.report import whys
from mlsys_bench.serve import steplog
from mlsys_bench.types import Requests
from tests.test_served import HEALTH, LIMITS, TRAFFIC, TRUE

SLOWER, BEGAN_S = 1.25, 1000.0
PREDICTED = 1.1  # times what a simulation of the very arrivals gives with the profile


@dataclasses.dataclass(frozen=True)
class Run:
    """A load test whose steps were logged, and predictions of its figures."""

    checks: tuple[Check, ...]
    log: Path
    requests: Requests


def run_of(folder: Path, decodes: Callable[[int], float], requests: int = 400) -> Run:
    """Serve traffic at 0.4 of saturation; log every step.  `decodes`: by how much the n-th step, a decode, exceeds the profile."""
    rows: list[tuple[StepFeatures, float]] = []
    tell = latency.clock(TRUE)

    def clock(step: StepFeatures) -> float:
        rows.append((step, tell(step) * (decodes(len(rows)) if step.prefill_tokens == 0 else 1.0)))
        return rows[-1][1]

    traffic = dataclasses.replace(TRAFFIC, rate_per_s=0.4 * served.saturation_per_s(TRAFFIC, TRUE, LIMITS, n=300))
    found = simulate.run(workload.schedule(traffic, n=requests, seed=5), TRUE, LIMITS, clock=clock, steady_clock=False).requests
    lines, now_s = [",".join(steplog.COLUMNS)], BEGAN_S
    for step, took_s in rows:  # one after the other: their begins matter only where a step follows at once
        lines.append(f"{now_s!r},{took_s!r},0,0,{','.join(map(str, step))},{took_s!r}")
        now_s += took_s
    log = folder / "steps.csv"
    log.write_text("\n".join([*lines, ""]))
    seen = Requests(t0_unix_s=BEGAN_S, requests=found)
    return Run(checks=tuple(checks_of(seen)), log=log, requests=seen)


def checks_of(seen: Requests) -> Iterator[Check]:
    again = served.replayed(seen, TRUE, LIMITS)
    for metric, value in causes.METRICS.items():
        for p in (50, 95):
            predicted, measured = (
                stats.quantile([v for r in records if r.in_window and (v := value(r)) is not None], p / 100)
                for records in (again, seen.requests)
            )
            yield Check(
                key=f"{metric}_p{p}_s", predicted=PREDICTED * predicted, low=None, high=None, measured=measured, measured_low=None,
                measured_high=None, error_percent=100 * (PREDICTED * predicted / measured - 1), inside=None,
            )  # fmt: skip


@pytest.fixture(scope="module")
def slowed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Causes]:
    run = run_of(tmp_path_factory.mktemp("slowed"), lambda _: SLOWER)
    found = causes.of(run.checks, TRUE, HEALTH, run.log, run.requests)
    assert found is not None
    return run, found


def test_the_parts_add_up_to_the_error(slowed: tuple[Run, Causes]) -> None:
    run, found = slowed
    assert [each.key for each in found.figures] == [check.key for check in run.checks]
    for each, check in zip(found.figures, run.checks, strict=True):
        assert each.arrivals_percent + each.steps_percent + each.rest_percent == pytest.approx(each.error_percent)
        assert each.error_percent == check.error_percent


def test_each_part_is_what_was_done(slowed: tuple[Run, Causes]) -> None:
    """The prediction is 10 % above a simulation of these arrivals; all else that differs is decodes which take a quarter longer."""
    run, found = slowed
    for each, check in zip(found.figures, run.checks, strict=True):
        assert check.measured
        assert each.arrivals_percent == pytest.approx(100 * (1 - 1 / PREDICTED) * check.predicted / check.measured, rel=0.01)
        assert each.rest_percent == pytest.approx(0.0, abs=0.01)
    tpot = next(each for each in found.figures if each.key == "tpot_p50_s")
    assert tpot.steps_percent < -10.0


def test_it_is_said_which_steps_have_slowed(slowed: tuple[Run, Causes]) -> None:
    _, found = slowed
    assert found.steps_longer["decode"] == pytest.approx(SLOWER - 1, abs=1e-6)
    assert found.steps_longer["prompt"] == pytest.approx(0.0, abs=1e-6)
    assert 0.0 < found.steps_longer["all"] < SLOWER - 1


def test_what_neither_arrivals_nor_steps_explain_is_left_over(slowed: tuple[Run, Causes]) -> None:
    """HTTP that takes 20 ms more than the profile says, of every first token and of nothing else."""
    run, _ = slowed
    checks = [dataclasses.replace(c, measured=c.measured + 0.02) for c in run.checks if c.key.startswith("ttft") and c.measured]
    found = causes.of(checks, TRUE, HEALTH, run.log, run.requests)
    assert found is not None
    for each, check in zip(found.figures, checks, strict=True):
        assert check.measured
        assert each.rest_percent == pytest.approx(-2.0 / check.measured, abs=0.01)


def test_requests_that_were_never_answered_leave_nothing_to_say(slowed: tuple[Run, Causes]) -> None:
    """Their steps are in the log, and nobody knows how long they would have been."""
    run, _ = slowed
    some = dataclasses.replace(run.requests, requests=run.requests.requests[::2])
    assert causes.of(run.checks, TRUE, HEALTH, run.log, some) is None


def test_an_engine_that_has_not_changed_leaves_no_part_to_its_steps(tmp_path: Path) -> None:
    run = run_of(tmp_path, lambda _: 1.0)
    found = causes.of(run.checks, TRUE, HEALTH, run.log, run.requests)
    assert found is not None
    assert found.steps_longer["all"] == pytest.approx(0.0, abs=1e-6)
    for each in found.figures:
        assert each.steps_percent == pytest.approx(0.0, abs=0.01)


def test_a_machine_that_changes_on_the_way_is_followed(tmp_path: Path) -> None:
    """Decodes as told for the first half of the steps, then half again as long with stalls: all of it is the steps' part."""
    run = run_of(tmp_path, lambda step: 1.0 if step < 3000 else 30.0 if step % 500 == 0 else 1.5)
    found = causes.of(run.checks, TRUE, HEALTH, run.log, run.requests)
    assert found is not None
    for each in found.figures:
        assert each.rest_percent == pytest.approx(0.0, abs=0.01)
    assert max(abs(each.steps_percent) for each in found.figures) > 20.0


@pytest.mark.parametrize(
    ("decode", "prompt", "named"), [(0.20, 0.01, True), (0.20, 0.10, False), (0.20, 0.18, False), (-0.01, -0.10, False)]
)
def test_memory_is_named_where_only_what_reads_it_has_slowed(decode: float, prompt: float, named: bool) -> None:
    said = " ".join(whys.machine(Causes(steps_longer={"all": 0.13, "decode": decode, "prompt": prompt}, others_share=0.0, figures=())))
    assert "took 13.0 % longer" in said
    assert f"{abs(100 * decode):.1f} % {'longer' if decode > 0 else 'less'}" in said
    assert ("memory was slower" in said) is named


def test_a_log_of_too_few_steps_says_nothing(tmp_path: Path) -> None:
    run = run_of(tmp_path, lambda _: 1.0, requests=2)
    assert causes.of(run.checks, TRUE, HEALTH, run.log, dataclasses.replace(run.requests, requests=())) is None
    other = tmp_path / "other.csv"
    other.write_text("a,b\n")
    assert causes.of(run.checks, TRUE, HEALTH, other, run.requests) is None
