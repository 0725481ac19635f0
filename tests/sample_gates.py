"""Gates with realistic numbers: launches in pairs drawn with a known noise, and the findings that go with them."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round
from mlsys_bench.verdicts import Conditions, Contention, Finding, GateCalibration, GateRun, Policy, Resolution, Subject, Verdict, Word

STEP = {"model": "nano", "precision": "int8", "device": "cpu", "threads": 1, "decode_seqs": 8, "decode_kv_tokens": 2048}


def finding(name: str = "engine.step", verdict: Word = "regression", change: float = 0.061, **changes: Any) -> Finding:
    """Return a finding whose candidate is that much higher, with an interval of 1.3 % to each side."""
    usual = Finding(
        name=name, parameters={}, unit="s", better="lower", baseline=0.0021, candidate=0.0021 * (1 + change), ratio=1 + change,
        interval=(1 + change - 0.013, 1 + change + 0.013), verdict=verdict, reason=f"10 launch pairs, {verdict}", pairs=10, launch_sd=0.021,
        tolerance=0.03, detectable=0.055, pairs_needed=24,
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


Launches = tuple[Launch, ...]


def launches(
    seed: int, pairs: int, base: float = 0.0021, change: float = 0.0, tail: float = 0.2, rounds: int = 8, sd: float = 0.02
) -> tuple[Launches, Launches]:
    """Return launches of both sides: lognormal samples, an own speed for each launch, and one sample in twenty longer by `tail`."""
    rng = np.random.default_rng(seed)

    def launch(pair: int, slower: float, tail: float) -> Launch:
        speed = base * math.exp(rng.normal(slower, sd / math.sqrt(2)))
        values = speed * np.exp(rng.normal(0, 0.03, (rounds, 10))) * (1 + tail * (rng.random((rounds, 10)) < 0.05))
        made = tuple(Round(values=tuple(row), cpu_s=tuple(0.97 * v for v in row), involuntary=(0,) * 10) for row in values.tolist())
        return Launch(started_s=4.1 * pair, rounds=made, pair=pair)

    sides = [(launch(i, 0.0, 0.2), launch(i, math.log1p(change), tail)) for i in range(1, pairs + 1)]
    return tuple(b for b, _ in sides), tuple(c for _, c in sides)


def benches(findings: tuple[Finding, ...], pairs: int) -> tuple[Bench, Bench]:
    """Return what was measured of each finding, in pairs."""
    both = []
    for seed, f in enumerate(findings):
        sign = 1 if f.better == "lower" else -1
        made = launches(seed, pairs, f.baseline or 1.0, (f.ratio or 1.0) - 1, 0.5 if sign > 0 else 0.2)
        both.append([Measurement(name=f.name, unit=f.unit, better=f.better, parameters=f.parameters, launches=side) for side in made])
    return Bench(measurements=tuple(b for b, _ in both)), Bench(measurements=tuple(c for _, c in both))


def conditions(pairs: int, gpu: bool = False) -> tuple[Conditions, ...]:
    """Return what surrounded each launch."""
    clocks: dict[str, Any] | None = {"sm_clock_mhz": 1755, "power_w": 412.5, "temperature_c": 61, "throttle": "none"} if gpu else None
    return tuple(
        Conditions(
            pair=i, side=side, started_s=4.1 * i, wall_s=2.0, cpu_s=1.9, involuntary=3 * i, steal_share=0.004, load=1.2,
            other_cpu_share=0.03, gpu=clocks,
        )
        for i in range(1, pairs + 1)
        for side in ("base", "cand")
    )  # fmt: skip


def machine() -> Machine:
    return Machine(hard={"cpu_model": "AMD EPYC 7B13", "cores": 2}, soft={"kernel": "6.1.0", "load": 0.31})


FINDINGS = (
    finding("engine.step", parameters=STEP),
    finding("planner.plan", "inconclusive", 0.022, baseline=0.31, candidate=0.317, interval=(0.985, 1.061), tolerance=0.05),
    finding("serve.throughput", "improved", 0.084, better="higher", unit="requests/s", baseline=212.0, candidate=229.8, tolerance=0.05),
    finding("memory.peak", "pass", 0.004, unit="bytes", baseline=1.21e9, candidate=1.215e9, interval=(1.001, 1.007), tolerance=0.1),
    finding("kernel.launches", "pass", 0.0, unit="launches", baseline=1204.0, candidate=1204.0, ratio=1.0, interval=None, kind="counter",
            tolerance=0.01, reason="the same count on both sides", pairs=1, launch_sd=None, detectable=None, pairs_needed=None),
    finding("engine.step.tail", "inconclusive", 0.19, interval=(0.93, 1.52), may_fail=False, kind="tail", reason="p99 of 1,200 samples"),
)  # fmt: skip


def verdict(findings: tuple[Finding, ...] = FINDINGS, word: Word = "regression") -> Verdict:
    return Verdict(verdict=word, findings=findings, tolerance=0.03, reasons=("1 regression, 2 inconclusive, 1 improved, 2 pass",))


def run(findings: tuple[Finding, ...] = FINDINGS, word: Word = "regression", pairs: int = 10, **changes: Any) -> GateRun:
    """Two refs, ten pairs, one regression."""
    base, cand = benches(tuple(f for f in findings if f.kind in ("relative", "counter") and f.ratio is not None), pairs)
    usual = GateRun(
        base=Subject(kind="ref", label="main", commit="36db52b0a6b1f0c39c2f1d8e9b7a4c5d6e7f8091"),
        cand=Subject(kind="ref", label="HEAD", commit="9735cbb1c2d3e4f5061728394a5b6c7d8e9fa0b1", environment="the same as the baseline"),
        base_bench=base, cand_bench=cand, base_machine=machine(), cand_machine=machine(),
        policy=Policy(tolerance=0.03, tolerances={"planner.*": 0.05, "memory.peak": 0.1}, reported=("engine.step.tail",)),
        conditions=conditions(pairs), contention=Contention(verdict="quiet"), ended="decided", wall_s=4.1 * pairs,
        verdict=verdict(findings, word),
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)


def calibration(sds: dict[str, float] | None = None, pairs: int = 20, tolerance: float = 0.05, **changes: Any) -> GateCalibration:
    """Return the engine's step, the planner and a load test against themselves."""
    sds = sds or {"engine.step": 0.006, "planner.plan": 0.018, "serve.ttft": 0.034}
    noise = {name: launches(seed, pairs, sd=sd) for seed, (name, sd) in enumerate(sds.items(), start=7)}
    found = tuple(
        finding(name, "pass", 0.001, interval=(1 - sd, 1 + sd), launch_sd=sd, tolerance=tolerance, pairs=pairs) for name, sd in sds.items()
    )
    sides = [
        Bench(
            measurements=tuple(Measurement(name=n, unit="s", better="lower", parameters={}, launches=both[i]) for n, both in noise.items())
        )
        for i in (0, 1)
    ]
    head = Subject(kind="ref", label="HEAD", commit="9735cbb1c2d3e4f5061728394a5b6c7d8e9fa0b1")
    same = run(found, "pass", pairs, base=head, cand=head, base_bench=sides[0], cand_bench=sides[1], policy=Policy(tolerance=tolerance))
    usual = GateCalibration(
        run=same, budget_s=82.0, pair_s=4.1,
        resolutions=tuple(
            Resolution(
                name=name, parameters={}, unit="s", pairs=pairs, launch_sd=sd, sd_interval=(0.8 * sd, 1.35 * sd), false_alarms=0.002,
                false_alarm_interval=(0.0, 0.008), detectable=tolerance + 0.9 * sd, finest_tolerance=1.2 * sd,
            )
            for name, sd in sds.items()
        ),
    )  # fmt: skip
    return dataclasses.replace(usual, **changes)
