"""Measure this machine and the built-in engine on it: `run` -> Bench, `table` -> rows for the reader.

parent.py    one child process per launch, pinned; collects rounds, survives Ctrl-C.  Imports no torch
worker.py    the child: builds tasks, visits them in random order, round after round, within the budget
harness.py   warm-up, samples with CPU time and context switches, rounds
kernels.py   memory.read, memory.copy, gemm, linear
steps.py     engine.step and engine.coldstart, through the real `Engine.step()`
companion.py a neighbour on the next core while steps are timed, as a served engine has one
turns.py     a benchmark in turns, for `gate run`: the worker's side of its protocol;  gated.py  those of the engine
quality.py   quality.loss: the trained byte model in every number format
rows.py      medians, intervals, and the share of this machine's own ceilings
"""

from __future__ import annotations

from mlsys_bench.bench.options import SUITES, Options, catalogue
from mlsys_bench.bench.parent import Progress, run
from mlsys_bench.bench.rows import Row, table

__all__ = ["SUITES", "Options", "Progress", "Row", "catalogue", "run", "table"]
