"""The gate: two sets of measurements of the same thing -> a verdict a build can stand on."""

from __future__ import annotations

from mlsys_bench.gate.compare import compare, exit_status

__all__ = ["compare", "exit_status"]
