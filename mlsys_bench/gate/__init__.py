"""The gate: two sets of measurements of the same thing -> a verdict a build can stand on."""

from __future__ import annotations

from mlsys_bench.gate.compare import compare, exit_status, verdict_of
from mlsys_bench.gate.judge import Standing, judge

__all__ = ["Standing", "compare", "exit_status", "judge", "verdict_of"]
