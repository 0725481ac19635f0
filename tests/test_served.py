"""A profile from the served engine: its step log, what HTTP adds, and a simulator that replays what was served."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlsys_bench import hardware, latency, loadtest, models, serve, simulate, stats, summary, workload
from mlsys_bench.batching import Limits, StepFeatures
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys import served
from mlsys_bench.plan import agreement
from mlsys_bench.serve import steplog
from mlsys_bench.serve.steplog import StepLog, Steps
from mlsys_bench.types import Bench, LatencyProfile, Launch, Layout, Measurement, RequestRecord, Requests, Round
from mlsys_bench.workload import Schedule

TRAFFIC = workload.synthetic(1.0, prompt="lognormal:96:0.6:384", output="lognormal:40:0.6:160")
LIMITS = Limits(max_seqs=8, max_step_tokens=256, block_tokens=16, blocks=512, max_context=1024)
TRUE = latency.roofline(models.find("nano"), hardware.find("cpu-2core"), precision="fp32")
HEALTH = {
    "layout": {"model": "nano", "precision": "fp32", "device": "cpu", "threads": 1, "pinned_cores": [0]},
    "limits": LIMITS._asdict(),
}


# ---------------------------------------------------------------- the log


def test_a_log_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    log = StepLog.open(str(path))
    assert log is not None
    log.write(10.0, 10.25, False, 2, (0, 0, 32, 512.0, 2), 0.24)
    log.write(10.25, 10.5, True, 0, (2, 34, 0, 0.0, 2), 0.1)
    log.close()
    found = steplog.read(path)
    assert found.step_s == pytest.approx([0.25, 0.25])
    assert np.diff(found.begun_unix_s) == pytest.approx([0.25], abs=1e-5)
    assert found.added.tolist() == [2, 0]
    assert found.was_busy.tolist() == [0, 1]
    assert found.features.tolist() == [[0, 0, 32, 512, 2], [2, 34, 0, 0, 2]]
    assert found.cpu_s == pytest.approx([0.24, 0.1])
    middle = float(found.begun_unix_s[0]) + 0.1
    assert found.between(middle, middle + 1).features.tolist() == [[2, 34, 0, 0, 2]]


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "steps.csv"
    path.write_text(",".join(steplog.COLUMNS) + "\n1,0.5,0,1,0,0,8,32,1,0.5\n2,0.5,1,0,1,9,")
    assert steplog.read(path).step_s.tolist() == [0.5]


def test_another_file_is_no_step_log(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="--step-log"):
        steplog.read(path)


def test_a_log_in_no_folder_says_so(tmp_path: Path) -> None:
    assert StepLog.open(None) is None
    with pytest.raises(BadInput, match="cannot be written"):
        StepLog.open(str(tmp_path / "nowhere" / "steps.csv"))


# ---------------------------------------------------------------- what HTTP adds


def log_of(begun: list[float], step_s: list[float], busy: list[int], added: list[int], sampled: list[int]) -> Steps:
    features = np.zeros((len(begun), 5))
    features[:, 4] = sampled
    return Steps(
        begun_unix_s=np.array(begun), step_s=np.array(step_s), was_busy=np.array(busy, dtype=float), added=np.array(added, dtype=float),
        features=features, cpu_s=np.array(step_s),
    )  # fmt: skip


def test_the_way_there_and_back_by_hand() -> None:
    """Requests due at 0 and 5 reach an idle engine 3 ms later; one due at 5.05 meets a step; tokens come 2 and 4 ms after their steps."""
    log = log_of([100.003, 105.003, 105.103], [0.1, 0.1, 0.1], [0, 0, 1], [1, 1, 1], [1, 1, 2])
    requests = Requests(
        t0_unix_s=100.0,
        requests=(
            RequestRecord(index=0, scheduled_s=0.0, sent_s=0.0, token_s=(0.105,)),
            RequestRecord(index=1, scheduled_s=5.0, sent_s=5.0, token_s=(5.105, 5.207)),
            RequestRecord(index=2, scheduled_s=5.05, sent_s=5.05, token_s=(5.207,)),
        ),
    )
    there_s, back_s = served.overheads(log, requests)
    assert there_s == pytest.approx(0.003)
    assert back_s == pytest.approx((0.002 + 0.002 + 0.004 + 0.004) / 4)


def test_somebody_else_s_requests_in_the_log_are_noticed() -> None:
    log = log_of([100.0, 101.0], [0.1, 0.1], [0, 0], [1, 1], [1, 1])
    one = Requests(t0_unix_s=100.0, requests=(RequestRecord(index=0, scheduled_s=0.0, sent_s=0.0, token_s=(0.11,)),))
    with pytest.raises(MeasurementFailed, match="anybody else"):
        served.overheads(log, one)


def test_a_ramp_grows_from_nothing_to_its_peak() -> None:
    times = served.ramp(TRAFFIC, 200.0, 20.0, seed=1).scheduled_s
    assert (np.diff(times) >= 0).all()
    assert len(times) == 2000
    assert times[-1] == pytest.approx(20.0, rel=0.1)
    assert (times < 10).mean() == pytest.approx(0.25, abs=0.05), "half the time, a quarter of the requests"


# ---------------------------------------------------------------- fit and replay, with the truth known


def window(true: LatencyProfile, factor: float, seed: int) -> served.Window:
    """Return what a calibration would log if the engine took `factor` times what a profile says, give or take 3 %."""
    rng, seen = np.random.default_rng(seed), list[tuple[StepFeatures, float]]()
    tell = latency.clock(true)

    def clock(features: StepFeatures) -> float:
        seen.append((features, factor * tell(features) * float(np.exp(rng.normal(0, 0.03)))))
        return seen[-1][1]

    peak = served.saturation_per_s(TRAFFIC, true, LIMITS, n=300)
    simulate.run(served.ramp(TRAFFIC, peak, 200 / peak, seed), true, LIMITS, clock=clock)
    features, period_s = zip(*seen, strict=True)
    return served.Window(
        begun_unix_s=0.0, features=np.array(features, dtype=float), period_s=np.array(period_s), own_s=np.array(period_s),
        request_s=0.002, token_s=0.001, flood_per_s=peak,
    )  # fmt: skip


@pytest.fixture(scope="module")
def fitted() -> LatencyProfile:
    """Two calibrations 10 % apart, on a machine that showed twice the speed of its steps."""
    speeds = {"memory.read": 2 * TRUE.constants["bandwidth_bytes_per_s"], "gemm": 2 * TRUE.constants["peak_flops_per_s"]}
    ceilings = tuple(
        Measurement(name=name, unit="1/s", better="higher", parameters={"device": "cpu", "threads": 1, "precision": "fp32"},
                    launches=(Launch(started_s=0.0, rounds=(Round(values=(value,)),)),))
        for name, value in speeds.items()
    )  # fmt: skip
    return served.fit(HEALTH, [window(TRUE, 1.0, 1), window(TRUE, 1.1, 2)], Bench(measurements=ceilings))


def figures(records: tuple[RequestRecord, ...], metric: Callable[[RequestRecord], float | None]) -> tuple[float, float]:
    values = [v for r in records if r.in_window and (v := metric(r)) is not None]
    return stats.quantile(values, 0.5), stats.quantile(values, 0.95)


def test_a_fitted_profile_replays_traffic_it_has_not_seen(fitted: LatencyProfile) -> None:
    """p50 and p95 of all three latencies within 6 % of those with the true clock, 5 % slower as the two windows were on average."""
    rate = 0.6 * served.saturation_per_s(TRAFFIC, TRUE, LIMITS, n=300)
    traffic = dataclasses.replace(TRAFFIC, rate_per_s=rate)
    tell = latency.clock(TRUE)
    truth = simulate.run(workload.schedule(traffic, n=250, seed=9), fitted, LIMITS, clock=lambda f: 1.05 * tell(f))
    again = served.replayed(Requests(t0_unix_s=0.0, requests=truth.requests), fitted, LIMITS)
    for metric in (summary.ttft_s, summary.tpot_s, summary.e2e_s):
        assert figures(again, metric) == pytest.approx(figures(truth.requests, metric), rel=0.06)


def test_windows_that_differ_are_drift_and_widen_the_profile(fitted: LatencyProfile) -> None:
    """10 % between two windows is a log sd of log(1.1) / sqrt 2, common to all coefficients."""
    found = re.search(r"drift ([0-9.]+) %", str(fitted.note))
    assert found
    assert float(found[1]) == pytest.approx(100 * np.log(1.1) / 2**0.5, abs=0.5)
    rng, usual = np.random.default_rng(0), (6, 700, 0, 0, 6)
    drawn = np.log([latency.step_s(latency.draw(fitted, rng), usual) for _ in range(20_000)])
    assert drawn.std() > 0.06  # of 0.067: some draws stop at the physics floor; so many know their sd to half a per cent


def test_between_two_calibrations_the_profile_is_as_fast_as_they_were(fitted: LatencyProfile) -> None:
    usual = (3, 400, 0, 0, 3)
    late = served.around(fitted, [dataclasses.replace(window(TRUE, 1.3, 4), request_s=0.004)])
    assert latency.step_s(late, usual) == pytest.approx(1.3 * latency.step_s(TRUE, usual), rel=0.04)
    assert late.constants["request_overhead_s"] == pytest.approx(0.004)
    assert served.stretch(late, window(TRUE, 1.3, 5)) == pytest.approx(1.0, rel=0.01)


def test_the_overheads_of_http_are_in_the_profile(fitted: LatencyProfile) -> None:
    assert fitted.constants["request_overhead_s"] == pytest.approx(0.002)
    assert fitted.constants["token_overhead_s"] == pytest.approx(0.001)
    assert fitted.layout.threads == 1
    assert fitted.constants["max_batch"] == 8


def test_stretching_never_beats_the_hardware() -> None:
    faster = served.stretched(TRUE, 0.01)
    latency.check(faster)
    slower = latency.step_s(served.stretched(TRUE, 2.0), (4, 400, 0, 0, 4))
    assert slower == pytest.approx(2 * latency.step_s(TRUE, (4, 400, 0, 0, 4)), rel=0.01)


def test_a_stall_of_the_machine_does_not_stretch_the_profile() -> None:
    quiet = window(TRUE, 1.0, 3)
    times_s = np.append(quiet.period_s[:-1], 100 * quiet.period_s[-1])
    stalled = dataclasses.replace(quiet, period_s=times_s, own_s=times_s)
    assert served.stretch(TRUE, stalled) == pytest.approx(served.stretch(TRUE, quiet), rel=0.01)


def test_a_step_whose_core_others_had_counts_by_its_cpu_time() -> None:
    """10 ms of which 4 were computed count 4; 10 of which 9.8 count 10; the loop after a step counts no more than three times the usual."""
    log = log_of([0.0, 0.0101, 0.0202, 0.0303, 0.0453], [0.010] * 5, [0, 1, 1, 1, 1], [0] * 5, [0] * 5)
    log = dataclasses.replace(log, cpu_s=np.array([0.0098, 0.004, 0.0100, 0.0099, 0.012]))
    assert served._periods(log) == pytest.approx([0.0101, 0.0101, 0.0101, 0.0150, 0.0100])
    assert served._own(log) == pytest.approx([0.0101, 0.0041, 0.0101, 0.0103, 0.0100])


def shared(quiet: served.Window, share: float) -> served.Window:
    """Return the window as a log would show it if others had the core for this share of every step's time."""
    return dataclasses.replace(quiet, period_s=quiet.own_s / (1 - share))


def test_what_others_took_of_one_calibration_only_widens_the_profile() -> None:
    """One thread on a CPU, half of the second calibration's time others': the same profile, said and with wider intervals."""
    quiet = window(TRUE, 1.0, 1)
    alone, busy = (served.fit(HEALTH, [quiet, other]) for other in (quiet, shared(quiet, 0.5)))
    assert busy.coefficients == alone.coefficients
    assert "others" not in str(alone.note)
    assert "others had the engine's core for 0 % to 50 % of its steps' time" in str(busy.note)
    assert busy.covariance[0][0] - alone.covariance[0][0] == pytest.approx(
        served._drift_variance(np.log(2) / 2**0.5, 2) - 0.026**2, rel=0.01
    )


def test_what_others_take_of_every_calibration_is_the_machine_s_way() -> None:
    """A core of which others always have a third makes steps half again as long; so do threads that wait for each other, by the wall."""
    quiet = window(TRUE, 1.0, 1)
    wide = {**HEALTH, "layout": {"model": "nano", "precision": "fp32", "device": "cpu", "threads": 2, "pinned_cores": [0, 1]}}
    usual = (3, 400, 0, 0, 3)
    for health in (HEALTH, wide):
        profile = served.fit(health, [shared(quiet, 1 / 3), shared(quiet, 0.4)])
        expected = 1.5 if health is HEALTH else (1.5 / 0.6) ** 0.5
        assert latency.step_s(profile, usual) == pytest.approx(expected * latency.step_s(TRUE, usual), rel=0.06)


def test_a_load_test_s_steps_are_set_beside_the_profile(tmp_path: Path) -> None:
    """Ten steps of twice the profile's time, half of which others had: a time longer than told, and half of it waited."""
    served_on = dataclasses.replace(TRUE, layout=Layout(model="nano", precision="fp32", device="cpu", threads=1))
    on_gpu = dataclasses.replace(TRUE, layout=Layout(model="nano", precision="fp32", device="cuda:0"))
    step, told_s, path = (1, 60, 0, 0.0, 1), latency.step_s(TRUE, (1, 60, 0, 0, 1)), tmp_path / "steps.csv"
    lines = [f"{100 + 2 * told_s * i},{2 * told_s},1,0,{','.join(map(str, step))},{told_s}" for i in range(10)]
    path.write_text("\n".join([",".join(steplog.COLUMNS), *lines, ""]))
    run = Requests(t0_unix_s=100.0, requests=(RequestRecord(index=0, scheduled_s=0.0, done_s=20 * told_s),))
    seen = served.of_run(path, run)
    assert served.stretch(served_on, dataclasses.replace(seen, own_s=seen.period_s)) == pytest.approx(2.0, rel=1e-3)
    assert served.waited(served_on, seen) == pytest.approx(0.5, rel=1e-3)
    assert served.waited(on_gpu, seen) == 0.0


def test_two_calibrations_that_agree_by_chance_do_not_prove_a_steady_machine() -> None:
    """The prior counts as one difference more: sd sqrt((0.03² + 0) / 2 · 3/2) at no drift, sqrt((0.03² + d²) / 2 · 3/2) at drift d."""
    assert served._drift_variance(0.0, 2) == pytest.approx(0.026**2, rel=0.01)
    assert served._drift_variance(0.06, 2) == pytest.approx((0.03**2 + 0.06**2) / 2 * 1.5)
    assert served._drift_variance(0.06, 50) == pytest.approx(0.06**2, rel=0.02)


def test_a_replay_keeps_arrivals_lengths_and_window() -> None:
    records = tuple(
        RequestRecord(index=i, scheduled_s=s, sent_s=s, prompt_tokens=p, output_tokens=o, token_s=(s + 1,), in_window=w)
        for i, (s, p, o, w) in enumerate([(0.5, 30, 3, True), (0.1, 20, 2, False)])
    )
    found = served.replayed(Requests(t0_unix_s=7.0, requests=records), TRUE, LIMITS)
    assert [(r.scheduled_s, r.prompt_tokens, r.output_tokens, r.in_window) for r in found] == [(0.1, 20, 2, False), (0.5, 30, 3, True)]


def test_simulated_saturation_is_the_capacity_that_theory_gives() -> None:
    flood = served.saturation_per_s(TRAFFIC, TRUE, LIMITS, n=900)
    assert flood == pytest.approx(agreement.of(TRUE, LIMITS, TRAFFIC).capacity_per_s, rel=0.05)


# ---------------------------------------------------------------- a real server


@pytest.mark.e2e
def test_a_real_server_logs_every_step_of_its_requests(tmp_path: Path) -> None:
    log = tmp_path / "steps.csv"
    options = serve.Options(port=0, device="cpu", step_log=str(log))
    with serve.start(options) as server:
        due = Schedule(scheduled_s=np.linspace(0, 0.5, 6), prompt_tokens=np.full(6, 30), output_tokens=np.full(6, 5))
        _, run = loadtest.run(loadtest.Options(url=server.url, trace=due, duration_s=1.0, warmup_s=0.0, drain_s=30.0))
        steps = steplog.read(log)
        window = served.logged(log, [run], 12.0)
    during = steps.between(run.t0_unix_s, run.t0_unix_s + 1e6)
    answered = [r for r in run.requests if r.outcome == "ok"]
    assert answered
    assert during.features[:, 4].sum() == sum(r.output_tokens or 0 for r in answered), "a token for each that was sampled"
    assert during.features[:, 2].sum() == sum(r.prompt_tokens or 0 for r in answered), "every prompt token once"
    assert window.features.tolist() == during.features.tolist()
    assert (window.period_s >= during.step_s - 1e-6).all(), "a period reaches to the next step, where that follows at once"
    assert window.request_s > -0.005
    assert window.token_s > -0.005
