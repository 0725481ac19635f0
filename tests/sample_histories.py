"""Gate runs of made-up programs whose true slowdown is known, and the files that hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mlsys_bench import record
from mlsys_bench.histories import History, HistoryChange, HistoryPoint, HistorySeries
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round
from mlsys_bench.verdicts import Contention, Finding, GateRun, Policy, Subject, Verdict

STEP_S = 0.010
PAIRS = 8
LAUNCH_SD = 0.02


def machine(**hard: str) -> Machine:
    return Machine(hard={"cpu_name": "A processor", "cores": "2", **hard}, soft={})


def commit(number: int) -> str:
    return f"{number:02d}" * 20


def gate_run(
    number: int, slowdown: float = 0.0, *, base: int | None = None, seed: int | None = None, on: Machine | None = None, level: float = 1.0
) -> GateRun:
    """Return the run of commit `number` against the one before it; a day's speed is the same for both sides."""
    rng = np.random.default_rng(number if seed is None else seed)
    day = rng.normal(0, 0.15)
    before, after = (STEP_S * level * np.exp(day + side + rng.normal(0, LAUNCH_SD / np.sqrt(2), PAIRS)) for side in (0.0, slowdown))
    base_number = number - 1 if base is None else base
    ratio = float(np.exp(np.mean(np.log(after) - np.log(before))))
    finding = Finding(
        name="engine.step", parameters={"batch": 8}, unit="s", better="lower", baseline=float(before.mean()), candidate=float(after.mean()),
        ratio=ratio, interval=(ratio * 0.98, ratio * 1.02), verdict="pass", reason="made up",
    )  # fmt: skip
    return GateRun(
        base=Subject(kind="ref", label=f"main~{base_number}", commit=commit(base_number)),
        cand=Subject(kind="ref", label="main", commit=commit(number)), base_bench=bench(before), cand_bench=bench(after),
        base_machine=on or machine(), cand_machine=on or machine(), policy=Policy(), conditions=(), contention=Contention(verdict="quiet"),
        ended="decided", wall_s=40.0 + float(rng.random()),
        verdict=Verdict(verdict="pass", findings=(finding,), tolerance=0.05, reasons=()),
    )  # fmt: skip


def bench(numbers: np.ndarray[tuple[int], np.dtype[np.float64]], name: str = "engine.step", *, counted: bool = False) -> Bench:
    """Return launches of 20 samples each, all at the launch's number."""
    launches = tuple(
        Launch(started_s=5.0 * i, pair=i, rounds=(Round(values=(float(v),) * 20, involuntary=(0,) * 20),)) for i, v in enumerate(numbers)
    )
    made = Measurement(name=name, unit="s", better="lower", parameters={"batch": 8}, launches=launches, deterministic=counted)
    return Bench(measurements=(made,))


def created(number: int) -> str:
    return f"2026-{8 + number // 28:02d}-{1 + number % 28:02d}T12:00:00+00:00"


def write(folder: Path, number: int, run: GateRun | Bench | Verdict, on: Machine | None = None) -> Path:
    """Write a record as if it had been made on the day of that number."""
    path = record.write(folder / f"gate{number:03d}.json", run, on or machine())
    head, _ = record.load(path)
    path.write_text(path.read_text().replace(head.created, created(number), 1))
    return path


def past() -> History:
    """Return a history of two series: a chain that got slower once, and a figure of single files."""
    levels = np.exp(0.01 * np.sin(np.arange(20)) + 0.06 * (np.arange(20) >= 12))
    chain = HistorySeries(
        name="engine.step", parameters={"batch": 8}, unit="s", better="lower", machine="399bd14a46cf", machine_name="A processor, 2 cores",
        drawn="chain", points=tuple(_point(n, float(level)) for n, level in enumerate(levels)),
        changes=(
            HistoryChange(
                point=12, created=created(12), commit=commit(12), after_commit=commit(11), ratio=1.061, interval=(1.048, 1.074), worse=True
            ),
        ), noise=0.007, total=1.071, total_interval=(1.02, 1.12),
    )  # fmt: skip
    files = HistorySeries(
        name="planner.plan", parameters={}, unit="s", better="lower", machine="399bd14a46cf", machine_name="A processor, 2 cores",
        drawn="absolute", points=chain.points[:8], changes=(), noise=None, notes=("8 results: from 10 on, changes are looked for",),
    )  # fmt: skip
    return History(database="gate.sqlite", results=28, machines=1, series=(chain, files))


def _point(number: int, value: float) -> HistoryPoint:
    return HistoryPoint(
        created=created(number), label="main", commit=commit(number), branch="main", value=value, interval=(value * 0.99, value * 1.01),
        launches=PAIRS, ratio=1.0, base_commit=commit(max(0, number - 1)), measured=STEP_S * value,
    )  # fmt: skip
