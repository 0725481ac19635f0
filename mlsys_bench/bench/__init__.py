"""Measure this machine and the built-in engine on it: `run` -> Bench; `readings.table` makes rows of it for the reader.

parent.py    one child process per launch, pinned; collects rounds, survives Ctrl-C.  Imports no torch
worker.py    the child: builds tasks, visits them in random order, round after round, within the budget
harness.py   warm-up, samples, flags, rounds until each has settled, which `mlsys_bench.samples` tells
telemetry.py what the machine did meanwhile, and whether it was contended
kernels.py   all that lies below the engine: machine.py memory, products, ways between devices;  collectives.py links between processes;
             operators.py op.*, on a cache that paged.py fills;  alone*.py  who computes them: C, torch or Triton
steps.py     engine.step, through the real `Engine.step()`;  stand_ins.py  what takes its model's place meanwhile
anatomy.py   engine.part and engine.host: a decode step by the engine's own clock;  coldstart.py  a start phase by phase, engine.load
policies.py  engine.policy: static, dynamic and continuous batches;  energy.py  joules of a device
companion.py a neighbour on the next core while steps are timed, as a served engine has one
turns.py     a benchmark in turns, for `gate run`: the worker's side of its protocol;  gated.py  those of the engine
quality.py   quality.loss: the trained byte model in every number format
"""

from __future__ import annotations

from mlsys_bench.bench.options import SUITES, Options
from mlsys_bench.bench.parent import Progress, run
from mlsys_bench.readings import Row, table

__all__ = ["SUITES", "Options", "Progress", "Row", "run", "table"]
