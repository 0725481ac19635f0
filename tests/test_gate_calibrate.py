"""What a runner can see: noise, false alarms and the smallest effect from launches of one program, by ways that do not know each other."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import hardware, record
from mlsys_bench.errors import BadInput, MeasurementFailed, NotComparable, RecordError
from mlsys_bench.gate import resolution, sequence
from mlsys_bench.gate.resolution import Apart
from mlsys_bench.journeys.gating import calibrating
from mlsys_bench.journeys.gating.run import Asked
from mlsys_bench.report import content
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round
from mlsys_bench.verdicts import Conditions, GateCalibration, Policy
from tests import sample_gates as sample


def apart(logs: Any, name: str = "m", tolerance: float = 0.05) -> Apart:
    return Apart(name=name, parameters={}, unit="s", logs=tuple(map(float, logs)), tolerance=tolerance)


def normal(n: int, sd: float, seed: int = 0) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(0.0, sd, n)


# ---------------------------------------------------------------- the noise


def test_the_sd_and_its_interval_are_the_textbooks() -> None:
    """1 … 10 have sd 3.0277; chi-squared of 9 degrees of freedom has 3.3251 below 5 % and 16.9190 below 95 %."""
    low, high = resolution.sd_interval(range(1, 11))
    assert resolution.sd(range(1, 11)) == pytest.approx(3.02765, abs=1e-5)
    assert low == pytest.approx(3.02765 * math.sqrt(9 / 16.9190), rel=1e-4)
    assert high == pytest.approx(3.02765 * math.sqrt(9 / 3.32511), rel=1e-4)


def test_nine_calibrations_in_ten_hold_the_true_sd() -> None:
    """Of 400 calibrations 90 % +- four standard errors."""
    inside = [low <= 0.02 <= high for seed in range(400) for low, high in [resolution.sd_interval(normal(12, 0.02, seed).tolist())]]
    assert abs(np.mean(inside) - 0.9) < 4 * math.sqrt(0.9 * 0.1 / 400)


# ---------------------------------------------------------------- false alarms


def test_the_same_program_hardly_ever_fails_a_build() -> None:
    found = resolution.resolve([apart(normal(20, 0.02))], pairs=20)[0]
    assert found.false_alarms <= 0.01
    assert found.false_alarm_interval[0] <= found.false_alarms <= found.false_alarm_interval[1]
    assert found.false_alarm_interval[1] >= 0.002  # none in a thousand runs is not never


def test_what_a_session_leaned_to_is_no_false_alarm() -> None:
    """Every pair 8 % apart to the same side: with sides swapped by a coin that is noise, and says so by its sd, not by alarms."""
    leaned = resolution.resolve([apart(0.08 + normal(20, 0.005))], pairs=20)[0]
    assert leaned.false_alarms <= 0.02
    assert leaned.finest_tolerance > 0.05


def test_a_calibration_is_the_same_twice() -> None:
    noise = [apart(normal(12, 0.02))]
    assert resolution.resolve(noise, pairs=20, seed=3) == resolution.resolve(noise, pairs=20, seed=3)


def test_too_few_pairs_say_nothing() -> None:
    with pytest.raises(MeasurementFailed, match=r"5 launch pair\(s\) .* give 6 or more: a longer --budget"):
        resolution.resolve([apart(normal(5, 0.02))], pairs=20)


# ---------------------------------------------------------------- what is seen


def test_the_finest_tolerance_agrees_with_drawing_from_the_normal_law() -> None:
    """Six pairs, one look: it passes where mean + t s / sqrt(6) lies below the tolerance; 90 % of draws must."""
    from scipy.special import stdtrit

    sd = 0.02
    found = resolution.finest_tolerance(normal(4000, sd, 5), pairs=6)
    draws = np.random.default_rng(6).normal(0, sd, (40_000, 6))
    upper = draws.mean(axis=1) + stdtrit(5, 1 - sequence.LEVELS[6]) * draws.std(axis=1, ddof=1) / math.sqrt(6)
    assert math.log1p(found) == pytest.approx(float(np.quantile(upper, 0.9)), rel=0.08)  # 400 draws know it to 5 %


def test_a_detectable_slowdown_is_found_nine_times_in_ten_by_the_decision_itself() -> None:
    noise = normal(2000, 0.02, 1)
    smallest = resolution.detectable(noise, 0.05, 20, 1)
    rates = []
    for effect in (0.6 * smallest, smallest, 1.5 * smallest):
        drawn = np.random.default_rng(9).normal(math.log1p(effect), 0.02, (600, 1, 20))
        limits = np.full((600, 1), math.log1p(0.05))
        track = sequence.follow(
            lambda a, b, level, jobs, d=drawn, d1=limits: sequence.bounds(d[jobs, :, a:b], d1[jobs] / 5, level),  # type: ignore[misc]
            20, limits, np.ones((600, 1), dtype=bool),
        )  # fmt: skip
        rates.append(float((track.state == sequence.REGRESSION).mean()))
    assert rates[0] < 0.8 < rates[2]
    assert rates[1] == pytest.approx(0.9, abs=0.07)  # 400 and 600 jobs: 1.5 % and 1.2 % of error


def test_twice_the_noise_needs_twice_the_tolerance() -> None:
    noise = normal(20, 0.01, 2)
    once, twice = (math.log1p(resolution.finest_tolerance(k * noise, pairs=20)) for k in (1.0, 2.0))
    assert twice / once == pytest.approx(2.0, rel=0.04)


def test_more_pairs_never_see_less() -> None:
    noise = normal(20, 0.03, 4)
    finest = [resolution.finest_tolerance(noise, pairs=n) for n in (6, 10, 20)]
    assert finest[0] > finest[1] > finest[2]
    assert resolution.finest_tolerance(noise, pairs=5) == resolution.MOST  # before the first look nothing is decided


def test_without_noise_the_finest_tolerance_is_the_floor() -> None:
    found = resolution.resolve([apart([0.0] * 8)], pairs=20)[0]
    assert found.finest_tolerance == resolution.FINEST
    assert (found.launch_sd, found.false_alarms) == (0.0, 0.0)


def test_a_large_family_finds_less_than_a_lone_metric() -> None:
    noise = normal(20, 0.03, 4)
    assert resolution.detectable(noise, 0.05, 20, family=20) > resolution.detectable(noise, 0.05, 20, family=1)


# ---------------------------------------------------------------- from launches


def measured(name: str, values: list[float], better: Any = "lower", **more: Any) -> Measurement:
    launches = tuple(Launch(started_s=0.0, rounds=(Round(values=(v,) * 3),), pair=i) for i, v in enumerate(values, start=1))
    return Measurement(name=name, unit=more.pop("unit", "s"), better=better, parameters={}, launches=launches, **more)


def test_pairs_are_told_apart_with_plus_for_worse_and_what_may_not_fail_left_out() -> None:
    base = Bench(measurements=(
        measured("time", [1.0, 2.0]), measured("rate", [4.0, 4.0], "higher", unit="1/s"), measured("loss", [1.0, 1.0], unit="nats"),
        measured("bytes", [5.0], unit="bytes", deterministic=True), measured("gone", [1.0, 1.0]),
    ))  # fmt: skip
    cand = Bench(measurements=(
        measured("time", [1.1, 1.0]), measured("rate", [2.0, 8.0], "higher", unit="1/s"), measured("loss", [2.0, 2.0], unit="nats"),
        measured("bytes", [6.0], unit="bytes", deterministic=True),
    ))  # fmt: skip
    found = {a.name: a for a in resolution.apart(base, cand, Policy(tolerances={"rate": 0.1}, reported=("loss",)))}
    assert set(found) == {"time", "rate"}
    assert found["time"].logs == pytest.approx([math.log(1.1), math.log(0.5)])
    assert found["rate"].logs == pytest.approx([math.log(2), -math.log(2)])
    assert (found["time"].tolerance, found["rate"].tolerance) == (0.05, 0.1)


def test_a_pair_takes_the_time_from_its_start_to_the_next() -> None:
    """Starts at 1, 4 and 9: 3 and 5 between, their median 4; the sides of a pair start together or not."""
    starts = [(1, 1.5), (1, 1.0), (2, 4.0), (2, 4.5), (3, 9.0), (3, 9.9)]
    seen = tuple(Conditions(pair=pair, side="base", started_s=s, wall_s=0.5) for pair, s in starts)
    assert calibrating.pair_s(sample.run(conditions=seen)) == pytest.approx(4.0)
    assert calibrating.pair_s(sample.run(conditions=seen[:2], wall_s=7.0)) == 7.0


def test_a_run_of_launches_becomes_a_calibration() -> None:
    found = calibrating.resolved(sample.calibration({"engine.step": 0.006, "planner.plan": 0.018}).run, budget_s=82.0)
    assert [r.name for r in found.resolutions] == ["engine.step", "engine.step.cpu", "planner.plan", "planner.plan.cpu"]
    assert found.pair_s == pytest.approx(4.1)
    by_name = {r.name: r for r in found.resolutions}
    assert by_name["engine.step"].finest_tolerance < by_name["planner.plan"].finest_tolerance
    low, high = by_name["planner.plan"].sd_interval
    assert low < 0.018 < high  # the sd its launches were drawn with


@pytest.mark.parametrize(
    ("found", "status"),
    [
        (sample.calibration(), 0),
        (sample.calibration(tolerance=0.02), 1),
        (sample.calibration(resolutions=()), 3),
        (sample.calibration(run=sample.run(ended="interrupted")), 130),
    ],
)
def test_exit_statuses(found: GateCalibration, status: int) -> None:
    assert calibrating.exit_status(found) == status


# ---------------------------------------------------------------- a gate that asks for too much


def kept(tmp_path: Path, found: GateCalibration, machine: Machine | None = None) -> Path:
    return record.write(tmp_path / "calibration.json", found, machine or hardware.machine())


def test_a_tolerance_that_the_runner_cannot_decide_is_refused_with_the_figure(tmp_path: Path) -> None:
    path = kept(tmp_path, sample.calibration())
    calibrating.check(path, Policy(tolerance=0.05), None)
    with pytest.raises(BadInput) as caught:
        calibrating.check(path, Policy(tolerance=0.03), None)
    assert "cannot decide 3 % of serve.ttft in 82.0 s, its finest tolerance there is 4.1 %" in str(caught.value)
    assert "--metric serve.ttft=4.1%" in str(caught.value)
    calibrating.check(path, Policy(tolerance=0.03, tolerances={"serve.*": 0.05}), None)
    calibrating.check(path, Policy(tolerance=0.03, reported=("serve.ttft",)), None)


def test_a_shorter_budget_is_judged_by_the_same_launches_anew(tmp_path: Path) -> None:
    """Twenty pairs decide 5 %; the six that fit into 25 s do not."""
    path = kept(tmp_path, calibrating.resolved(sample.calibration({"m": 0.03}).run, 82.0))
    calibrating.check(path, Policy(tolerance=0.05), 82.0)
    with pytest.raises(BadInput, match=r"cannot decide 5 % of m in 25\.0 s"):
        calibrating.check(path, Policy(tolerance=0.05), 25.0)


def test_a_runner_that_can_decide_nothing_says_so(tmp_path: Path) -> None:
    blind = sample.calibration({"m": 0.5})
    blind = dataclasses.replace(blind, resolutions=(dataclasses.replace(blind.resolutions[0], finest_tolerance=1.0, detectable=1.0),))
    with pytest.raises(BadInput, match="nor any tolerance"):
        calibrating.check(kept(tmp_path, blind), Policy(), None)
    lead = content.describe(blind)[0].lead
    assert lead == "This runner cannot decide 5 % of m in 82.0 s: no tolerance can be decided."


def test_a_calibration_of_another_machine_is_not_comparable(tmp_path: Path) -> None:
    path = kept(tmp_path, sample.calibration(), Machine(hard={"cpu_model": "another"}, soft={}))
    with pytest.raises(NotComparable, match="was made on another machine"):
        calibrating.check(path, Policy(), None)


def test_a_calibration_of_too_few_launches_says_nothing(tmp_path: Path) -> None:
    empty = sample.calibration(resolutions=())
    with pytest.raises(BadInput, match="says nothing of this runner"):
        calibrating.check(kept(tmp_path, empty), Policy(), None)
    section = content.describe(empty)[0]
    assert "Tolerance" not in {f.label for f in section.facts}
    assert dict(section.notes)["What to do"][0].startswith("give it a longer --budget: 6 launch pairs take 30.0 s or so")  # 6 x 4.1 s x 1.2


def test_another_record_is_no_calibration(tmp_path: Path) -> None:
    path = record.write(tmp_path / "run.json", sample.run(), hardware.machine())
    with pytest.raises(RecordError, match="holds a 'gate' record; --calibration takes what"):
        calibrating.check(path, Policy(), None)


@pytest.mark.parametrize("options", [{"read": "pyperf"}, {"command": "true", "bench": "planner"}, {"command": "true", "worker": "x"}])
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        calibrating.itself(asked=Asked(), **options)


# ---------------------------------------------------------------- the words


def test_a_runner_that_is_too_noisy_is_told_what_to_do() -> None:
    section = content.describe(sample.calibration(tolerance=0.02, budget_s=41.0))[0]
    assert section.lead == "This runner cannot decide 2 % of serve.ttft in 41.0 s: its finest tolerance is 4.1 %."
    cures = dict(section.notes)["What to do"]
    assert cures[0] == "ask for --tolerance 5% on this runner"
    assert any("taskset" in line for line in cures)
    assert any("--budget, 180 s or so" in line or "--budget, 3.00 min or so" in line for line in cures)  # 41 s x (4.08 / 2)^2 = 171 s


def test_a_longer_budget_is_not_advised_where_the_last_look_is_in_reach() -> None:
    cures = dict(content.describe(sample.calibration(tolerance=0.02))[0].notes)["What to do"]
    assert not any("--budget" in line for line in cures)


# ---------------------------------------------------------------- real processes


@pytest.mark.e2e
def test_a_command_is_measured_past_the_point_where_a_gate_would_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tolerance of 90 % is decided at the first look; a calibration goes on to its own last."""
    monkeypatch.setattr(calibrating, "LOOKS", (6, 8))
    out = tmp_path / "calibration.json"
    found = calibrating.itself(command="true", asked=Asked(policy=Policy(tolerance=0.9), budget_s=60.0, out=out, quiet=True))
    assert record.read(out, GateCalibration) == found
    wall = next(r for r in found.resolutions if r.name == "command.wall")
    assert (found.run.ended, wall.pairs) == ("last_look", 8)
    assert wall.launch_sd > 0
