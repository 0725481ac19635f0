"""The harness against its bars: parts of `microbench.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import _one_thread  # noqa: F401
import numpy as np

from mlsys_bench import record, samples
from mlsys_bench.bench import harness, telemetry
from mlsys_bench.types import Bench, Launch, Round

CASES = 1000
LOW, HIGH = 0.93, 0.97
VISITS, PER_VISIT = 100, harness.VISIT_SAMPLES  # what the budget of a case allows
LONG = 4_000_001
REFUSED, FALSE_ALARM = 0.99, 0.02
OVERHEAD_S = 2e-6
TELEMETRY_SHARE = 0.005
QUICK_S, MODEL_160M = 60.0, "small-160m"
BUDGETS_S, BUDGET_APART = (20.0, 40.0, 80.0), 0.10
LAUNCHES, MOST_LAUNCHES, LAUNCHES_APART, LAUNCHED = 5, 40, 0.03, ("memory.read", "memory.copy", "gemm", "op.linear", "op.norm")
NOTHING_MEASURED = 5  # exit status where all that was asked for was refused; the record says why
CONTENDED_RUNS, CONTENDED, CONTENDED_S = 20, 0.95, 8.0

Draw = Callable[[np.random.Generator, int], samples.Array]


def told(text: str, *, ok: bool | None = None) -> bool:
    """Print a line with its verdict, none for a figure without a bar; return the verdict."""
    sys.stdout.write(f"  {'ok  ' if ok else '    ' if ok is None else 'MISS'} {text}\n")
    sys.stdout.flush()
    return ok is not False


# ---------------------------------------------------------------- coverage


class Shape(NamedTuple):
    """A law of samples; `median` of the long run where it is known exactly."""

    name: str
    draw: Draw
    median: float | None = None


def _modes(share: float, apart: float, noise: float) -> Draw:
    return lambda rng, n: np.where(rng.random(n) < share, 1.0, 1 + apart) + noise * rng.standard_normal(n)


SHAPES = (
    Shape("normal, sd 2 %", lambda rng, n: 1 + 0.02 * rng.standard_normal(n), 1.0),
    Shape("normal, sd 5 %", lambda rng, n: 1 + 0.05 * rng.standard_normal(n), 1.0),
    Shape("bimodal, equal modes 5 % apart", _modes(0.5, 0.05, 0.005), 1.025),
    Shape("bimodal, 60 : 40, 5 % apart", _modes(0.6, 0.05, 0.005)),
    Shape("heavy-tailed, Pareto of index 1.5", lambda rng, n: 1 + 0.03 * rng.pareto(1.5, n)),
    Shape("heavy-tailed, Student of 2 degrees", lambda rng, n: 1 + 0.01 * rng.standard_t(2, n), 1.0),
)
AT = np.arange(VISITS * PER_VISIT) / (VISITS * PER_VISIT)  # 0..1 of the budget
STEPS = (
    Shape("a step of 5 % after a tenth, sd 2 %", lambda rng, n: 1 + 0.05 * (AT[:n] < 0.1) + 0.02 * rng.standard_normal(n), 1.0),
    Shape("a step of -20 % after a 25th, sd 2 %", lambda rng, n: 1 - 0.2 * (AT[:n] < 0.04) + 0.02 * rng.standard_normal(n), 1.0),
    Shape("a step of 5 % after a seventh, sd 5 %", lambda rng, n: 1 + 0.05 * (AT[:n] < 1 / 7) + 0.05 * rng.standard_normal(n), 1.0),
)  # the level they stay at is what counts
DRIFTS = (
    Shape("linear, 10 % over the budget", lambda rng, n: 1 + 0.10 * AT[:n] + 0.01 * rng.standard_normal(n)),
    Shape("linear, -20 % over the budget, sd 2 %", lambda rng, n: 1 - 0.20 * AT[:n] + 0.02 * rng.standard_normal(n)),
    Shape("a clock that sinks by 10 %, half in a fifth", lambda rng, n: 1.1 - 0.1 * 0.5 ** (5 * AT[:n]) + 0.01 * rng.standard_normal(n)),
    Shape("a step of 5 % halfway, sd 5 %", lambda rng, n: 1 + 0.05 * (AT[:n] > 0.5) + 0.05 * rng.standard_normal(n)),
)  # fmt: skip


def visited(values: samples.Array) -> tuple[samples.Ended, list[samples.Array]]:
    """Take visits of a case until it settles or the budget ends, as the harness does."""
    blocks = list(values.reshape(-1, PER_VISIT))
    count = samples.LEAST_BLOCKS
    while (found := samples.ended(blocks[:count])) != "settled" and count < len(blocks):
        count = min(len(blocks), math.ceil(harness.CHECK_GROWTH * count))
    return found, blocks[samples.early(blocks[:count]) : count]


def coverage() -> bool:
    """Cover the long-run median in 93 to 97 % of cases of each shape, steps early in the run too, and refuse those that drift."""
    fine = [*map(_covered, SHAPES), *(_covered(shape, may_refuse=True) for shape in STEPS)]
    return all([*fine, *(_refused(shape) for shape in DRIFTS)])


def _covered(shape: Shape, *, may_refuse: bool = False) -> bool:
    """Judge one shape; may_refuse: it moves, so that refusing it is as right as finding the level it stays at."""
    median = shape.median if shape.median is not None else float(np.median(shape.draw(np.random.default_rng(1), LONG)))
    rng, inside, taken, alarms = np.random.default_rng(0), 0, list[int](), 0
    for _ in range(CASES):
        end, blocks = visited(shape.draw(rng, VISITS * PER_VISIT))
        low, high = samples.median_interval(blocks) or (math.inf, -math.inf)
        inside += low <= median <= high
        alarms += end == "drifting"
        taken.append(len(blocks) * PER_VISIT)
    share, alarm = inside / CASES, alarms / CASES
    many = statistics.median(taken)
    alarms_bar = "" if may_refuse else f" (<= {FALSE_ALARM:.0%})"
    line = f"{shape.name}: covered in {share:.1%} (93-97 %), {many:.0f} samples, refused {alarm:.1%}{alarms_bar}"
    return told(line, ok=LOW <= share <= HIGH and (may_refuse or alarm <= FALSE_ALARM))


def _refused(shape: Shape) -> bool:
    rng = np.random.default_rng(0)
    ends = [visited(shape.draw(rng, VISITS * PER_VISIT))[0] for _ in range(CASES)]
    share = ends.count("drifting") / CASES
    return told(f"{shape.name}: refused in {share:.1%} (>= {REFUSED:.0%})", ok=share >= REFUSED)


# ---------------------------------------------------------------- overhead


def overhead() -> bool:
    """Add at most 2 us to a sample of an empty call, spend no more between two, and look at the machine for half a percent of a core."""
    inside = [harness.on_cpu(int, 1) for _ in range(20_000)]
    visits, per_visit = 400, 50
    between_s = []
    task = harness._Repeated(float, int, lambda call, repeat: 0.0, None)
    task._repeat, task._samples = 1, per_visit
    for _ in range(visits):
        began = time.perf_counter()
        task.visit()
        between_s.append((time.perf_counter() - began) / per_visit)
    added_s, spent_s = statistics.median(inside), statistics.median(between_s)
    fine = told(f"inside a sample of one empty call: {added_s * 1e6:.2f} us (<= 2)", ok=added_s <= OVERHEAD_S)
    fine &= told(f"between two samples of a visit: {spent_s * 1e6:.2f} us (<= 2)", ok=spent_s <= OVERHEAD_S)
    share = _telemetry_share()
    return told(f"telemetry, of a core: {share:.2%} (<= {TELEMETRY_SHARE:.1%})", ok=share <= TELEMETRY_SHARE) and fine


def _telemetry_share() -> float:
    """Return what looking at the machine costs: CPU time of a look, times looks a second."""
    meter, looks = telemetry.Telemeter(), 200
    meter.start()
    before_s = time.thread_time()
    for _ in range(looks):
        meter._look()
    each_s = (time.thread_time() - before_s) / looks
    meter.stop(())
    return each_s / telemetry.EVERY_S


# ---------------------------------------------------------------- whole runs


def _run(*arguments: str) -> tuple[Bench, float]:
    """Run `mlsys bench gpu` and return its record and how long it took, start and end included."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bench.json"
        command = [sys.executable, "-m", "mlsys_cli", "bench", "gpu", "--device", "cpu", *arguments, "-o", str(out)]
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode not in (0, NOTHING_MEASURED):
            raise SystemExit(f"mlsys bench gpu ended with status {done.returncode}: {done.stderr.strip()}")
        return record.read(out, Bench), time.monotonic() - began


def quick() -> bool:
    """End the quick suite of a model of 160 M parameters within a minute, with every row reached."""
    found, took_s = _run("--suite", "quick", "--model", MODEL_160M)
    ends = [m.ended for m in found.measurements]
    missed = [m.name for m in found.measurements if m.skipped and "budget" in m.skipped]
    told(f"{ends.count('settled')} settled, {ends.count('budget')} ended by the budget, {ends.count('drifting')} refused as drifting")
    fine = told(f"not reached: {', '.join(sorted(set(missed))) or 'nothing'} (nothing)", ok=not missed)
    return told(f"{took_s:.1f} s (<= {QUICK_S:g})", ok=took_s <= QUICK_S) and fine


def budget() -> bool:
    """Take what was asked for, to a tenth; less only where everything has settled."""
    return all(_keeps(budget_s) for budget_s in BUDGETS_S)


def _keeps(budget_s: float) -> bool:
    found, took_s = _run("--model", MODEL_160M, "--budget", f"{budget_s:g}s")
    is_all_settled = all(m.ended in ("settled", None) or m.skipped for m in found.measurements)
    apart = took_s / budget_s - 1
    return told(
        f"--budget {budget_s:g}s took {took_s:.1f} s, {apart:+.1%} (within 10 %)",
        ok=apart <= BUDGET_APART and (apart >= -BUDGET_APART or is_all_settled),
    )


def launches() -> bool:
    """Give medians of five launches that agree within 3 % with those of five more: each row's first ten quiet ones that measured it.

    Two launches of one program differ by 2 to 2.6 % (sd), which is why one median of five is held against another, not each launch against
    all; how far single launches lie from their median is printed beside.  A launch whose own verdict is *contended* was not on a quiet
    machine; a row refused as drifting was not measured.  Both are tried again in the next launch: on a shared host others come and go.
    Medians are of samples at one clock, as the suite compares records (ADR 43); how far apart they lie at any clock is printed beside.
    """
    found_of: dict[str, list[Launch]] = {}
    absent: dict[str, str] = {}
    quiet = 0
    for number in range(MOST_LAUNCHES):
        found, _ = _run("--model", MODEL_160M, "--only", ",".join(LAUNCHED), "--budget", "60s")
        for m in found.measurements:
            name = f"{m.name} {_short(m.parameters)}"
            if m.skipped and m.skipped.startswith("no units"):  # of this machine: nothing that another launch would measure
                absent[name] = m.skipped
                continue
            had = found_of.setdefault(name, [])
            if m.launches and not found.contended and len(samples.medians(had)) < 2 * LAUNCHES:
                had.extend(m.launches)
        quiet += not found.contended
        short = [name for name, had in found_of.items() if len(samples.medians(had)) < 2 * LAUNCHES]
        seen = "; ".join(found.contended) or "nobody else seen"
        told(f"launch {number + 1}: {seen}; rows short of {2 * LAUNCHES} medians: {len(short)} of {len(found_of)}")
        if found_of and not short:
            break
    fine = [told_apart(name, had) for name, had in found_of.items() if name not in short]
    for name in absent.keys() - found_of.keys():
        told(f"not on this machine: {name}: {absent[name]}")
    told(f"measured in fewer than {2 * LAUNCHES} of {quiet} quiet launches: {'; '.join(short) or 'none'}", ok=not short)
    return all(fine) and not short


def told_apart(name: str, had: Sequence[Launch]) -> bool:
    """Print how far the median of the first half of launches lies from that of the second, and single ones from their median at most."""
    apart, alone = _apart(samples.medians(had)[: 2 * LAUNCHES])
    anyhow, _ = _apart([float(np.median(np.concatenate(samples.blocks_of(_clockless(launch))))) for launch in had])
    clock_hz = samples.common_clock([launch.rounds for launch in had])
    at = f"at {clock_hz / 1e9:.1f} GHz" if clock_hz else "at no known clock"
    beside = f"single launches up to {alone:.1%} from their median; {anyhow:.1%} apart at any clock"
    return told(f"{name}: {apart:.1%} apart {at} (<= 3 %); {beside}", ok=apart <= LAUNCHES_APART)


def _apart(values: Sequence[float]) -> tuple[float, float]:
    half = len(values) // 2
    first, second, middle = (statistics.median(part) for part in (values[:half], values[half:], values))
    return max(first, second) / min(first, second) - 1, max(abs(value / middle - 1) for value in values)


def _clockless(launch: Launch) -> list[Round]:
    return [dataclasses.replace(r, clock_hz=None) for r in launch.rounds]


def _short(parameters: Mapping[str, object]) -> str:
    return " ".join(str(parameters[name]) for name in ("precision", "layer", "m") if name in parameters)


def contended() -> bool:
    """Raise the flag under planted load, and not on a quiet machine, but for neighbours on a shared host, whom nobody can send away."""
    cores = tuple(sorted(os.sched_getaffinity(0)))[:1]
    asked = ("--only", "memory.read,gemm", "--budget", f"{CONTENDED_S:g}s")
    raised = quiet = shared = 0
    for i in range(CONTENDED_RUNS):  # by turns, so that both see the same hour
        with planted(cores):
            raised += bool(_run(*asked)[0].contended)
        whole = _run(*asked)[0].contended
        said = [why for why in whole if not why.startswith(telemetry.SOMEBODY)]
        quiet, shared = quiet + bool(said), shared + (len(whole) > len(said))
        if said:
            told(f"quiet run {i + 1}: {json.dumps(said)}")
    fine = told(f"raised in {raised} of {CONTENDED_RUNS} runs under load (>= 95 %)", ok=raised >= CONTENDED * CONTENDED_RUNS)
    told(f"another tenant on a measuring core in {shared} of {CONTENDED_RUNS} quiet runs")
    return told(f"raised in {quiet} of {CONTENDED_RUNS} quiet runs (<= 5 %)", ok=quiet <= (1 - CONTENDED) * CONTENDED_RUNS) and fine


@contextlib.contextmanager
def planted(cores: Sequence[int]) -> Iterator[None]:
    """Keep each of these cores busy meanwhile."""
    busy = "import os, sys\nos.sched_setaffinity(0, {int(sys.argv[1])})\nwhile True: pass"
    children = [subprocess.Popen([sys.executable, "-c", busy, str(core)]) for core in cores]
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.wait()
