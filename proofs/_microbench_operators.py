"""Part `operators` of `microbench.py`: operators timed alone against decode steps, and against the engine's own clock inside them.

    python proofs/_microbench_operators.py [--models nano:fp32,small-160m:bf16,tinyllama-1.1b:w8a8] [--threads 2] [--seconds 40]

Each model is measured in a process of its own, operators and steps in turns, in random order.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlsys_bench import anatomy, record
from mlsys_bench.anatomy import Anatomy
from mlsys_bench.bench.harness import Spec, Task
from mlsys_bench.types import Bench, Launch, Measurement, Round, Scalar

if TYPE_CHECKING:
    from mlsys_bench.engine import Engine

MODELS = "nano:fp32,small-160m:bf16,tinyllama-1.1b:w8a8"
BATCHES, CONTEXT, ROOM = (1, 4, 8), 512, 768
NEAR, EXPLAINED = 0.10, 0.90  # how far a prediction may be off, and the least share of a step that rows account for
THREADS, SECONDS = 2, 40.0


def operators(models: str = MODELS, threads: int = THREADS, seconds: float = SECONDS) -> bool:
    """Print each step taken apart beside the bars; return whether all of them are reached."""
    many = min(threads, len(os.sched_getaffinity(0)))
    good = True
    for name in models.split(","):
        model, precision = name.split(":")
        for taken in anatomy.tables(_measured(model, precision, many, seconds).measurements):
            good &= _shown(taken, many)
    return good


def _shown(taken: Anatomy, threads: int) -> bool:
    off = taken.explained - 1
    print(f"\n{taken.model} {taken.precision}, {threads} threads, {taken.batch} x {taken.context_tokens:,.0f}: {_ms(taken.step_s)} a step")
    for row in taken.rows:
        reads = f"{row.bytes_per_s / 1e9:6.1f} GB/s" if row.bytes_per_s else ""
        of_read = f"{row.of_read:4.0%} of reads" if row.of_read else ""
        print(f"    {row.operator:12} {row.count:3} x {_ms(row.each_s)} = {_ms(row.total_s)}  {row.share:5.1%}  {reads} {of_read}")
    print(f"    {anatomy.RESIDUAL:31} {_ms(taken.residual_s)}  {taken.residual_s / taken.step_s:5.1%}")
    for group in ("linears", "between", "host"):
        if group in taken.parts:
            print(f"    {group:12} alone {_ms(taken.group_s(group))}, by the engine's clock {_ms(taken.parts[group])}")
    near = _beside("the prediction is off by", f"{off:+.1%}", f"<= {NEAR:.0%}", abs(off) <= NEAR)
    return _beside("operators explain", f"{taken.explained:.1%}", f">= {EXPLAINED:.0%}", taken.explained >= EXPLAINED) and near


def _beside(what: str, figure: str, bar: str, kept: bool) -> bool:
    print(f"    {what:28} {figure:>8}   bar {bar:8} {'ok' if kept else 'MISSED'}", flush=True)
    return kept


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:9.4f} ms"


# ---------------------------------------------------------------- the process that measures


def _measured(model: str, precision: str, threads: int, seconds: float) -> Bench:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.json"
        command = [sys.executable, __file__, "--child", str(path), model, precision, str(threads), str(seconds)]
        env = os.environ | {"OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, env=env)
        return record.read(path, Bench)


def _child(path: str, model: str, precision: str, threads: int, seconds: float) -> None:
    """Measure, and write the record."""
    from mlsys_bench import hardware

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    tasks = list(_tasks(model, precision, threads))
    for task in tasks:
        _refuse_wrong(task)
    record.write(Path(path), Bench(measurements=tuple(_visited(tasks, seconds))), hardware.machine())


def _refuse_wrong(task: Task) -> None:
    error = task.check() if task.check is not None else 0.0
    if not error <= (task.tolerance or 0.0):
        raise SystemExit(f"{task.specs[0].name} {task.specs[0].parameters}: its output is off by {error:g}, {task.tolerance:g} is let pass")


def _tasks(model: str, precision: str, threads: int) -> Iterator[Task]:
    from mlsys_bench import models
    from mlsys_bench.bench import anatomy as by_clock
    from mlsys_bench.bench import steps
    from mlsys_bench.bench.options import SUITES, Options

    common: dict[str, Scalar] = {"device": "cpu", "threads": threads}
    options = Options(model=model, device="cpu", threads=threads, max_context=ROOM)
    engine = steps.engine_of(models.find(model), options, precision, "cpu")
    suite = dataclasses.replace(SUITES["full"], anatomy=tuple((batch, CONTEXT) for batch in BATCHES), decode_steps=8)
    bench = steps.Bench(engine, common | {"model": model, "precision": precision}, suite, one_thread=threads == 1, seed=0)
    steps.warm(bench)
    yield from by_clock.tasks(bench)
    yield from _operators(engine, common, threads)


def _operators(engine: Engine, common: dict[str, Scalar], threads: int) -> Iterator[Task]:
    from mlsys_bench.bench import alone, machine, operators

    model: Any = engine._model
    kv, d = engine._cache.dtype, model.decoder
    who = alone.computes(d, precision=engine.precision, kv=kv, device=engine._cache.device, asked="auto", threads=threads)
    ops = operators.Operators(d, who, precision=engine.precision, kv=kv, common=common, device="cpu", threads=threads)
    yield from (t for t in machine.memory("cpu", common, threads) if isinstance(t, Task) and t.specs[0].name == anatomy.READ)
    yield from ops.linears(BATCHES)
    for batch in BATCHES:
        yield from (ops.decode(CONTEXT, batch), ops.norm(batch), ops.rope_append(batch), ops.swiglu(batch))
        yield from (ops.embedding(batch), ops.sample(batch, "argmax"))


def _visited(tasks: list[Task], seconds: float) -> Iterator[Measurement]:
    """Visit tasks in random order, round after round, until the time is over; yield what each of their specs gave."""
    rng, deadline = np.random.default_rng(0), time.monotonic() + seconds
    found: dict[tuple[int, int], tuple[Spec, list[Round]]] = {}
    while time.monotonic() < deadline or len(next(iter(found.values()), (None, []))[1]) < 3:
        for i in rng.permutation(len(tasks)):
            for k, (spec, taken) in enumerate(tasks[i].visit()):
                found.setdefault((int(i), k), (spec, []))[1].append(taken)
    for spec, rounds in found.values():
        yield Measurement(
            name=spec.name, unit=spec.unit, better=spec.better, parameters=spec.parameters, work=spec.work,
            launches=(Launch(started_s=0.0, rounds=tuple(rounds)),),
        )  # fmt: skip


def main() -> int:
    """Run alone, with options; return 1 where a bar is missed."""
    if sys.argv[1:2] == ["--child"]:
        path, model, precision, threads, seconds = sys.argv[2:]
        _child(path, model, precision, int(threads), float(seconds))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    chosen = parser.parse_args()
    return int(not operators(chosen.models, chosen.threads, chosen.seconds))


if __name__ == "__main__":
    sys.exit(main())
