"""asv's results, `.asv/results/MACHINE/COMMIT-ENVIRONMENT.json`, file format 2.

As in asv/results.py: `result_columns` names the columns of each row of `results`; a benchmark with parameters has a list of results, in
the order of their product.  Samples (of `asv run --record-samples`) of all its processes lie in one list that does not say where one
process ends, so a file is one launch.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlsys_bench.gate.readers.parts import Reading, is_number, measurement, minor, named, skipped, text
from mlsys_bench.types import Bench, Machine, Measurement, Scalar

NAME = "asv"
HOW = "asv run --record-samples writes them below .asv/results"
_UNITS = {"time": "s", "timeraw": "s", "mem": "bytes", "peakmem": "bytes"}
_KIND = re.compile(r"(?:^|\.)(time|timeraw|mem|peakmem|track)_?[^.]*$", re.IGNORECASE)


def knows(document: Any) -> bool:
    """Say whether this is such a result."""
    return isinstance(document, Mapping) and {"result_columns", "results", "commit_hash", "env_name"} <= set(document)


def reading(document: Mapping[str, Any], where: str, folder: Path | None) -> Reading:
    """Return every benchmark of times or memory as a measurement of one launch."""
    columns, rows = document["result_columns"], document["results"]
    tables = {name: dict(zip(columns, row, strict=False)) for name, row in rows.items() if row}
    found = tuple(m for name, table in tables.items() if _unit(name) for m in _measurements(name, table))
    tracked = [name for name in tables if _unit(name) is None]
    notes = named(tracked, "left out, as the file does not say whether more of them is better")
    return Reading(tool=NAME, where=where, bench=Bench(measurements=found), machine=_machine(document), notes=notes)


def _unit(name: str) -> str | None:
    kind = _KIND.search(name)
    return _UNITS.get(kind[1].lower()) if kind else None


def _measurements(name: str, table: Mapping[str, Any]) -> Iterator[Measurement]:
    unit, values = _unit(name) or "s", table.get("params") or []
    chosen = list(itertools.product(*values)) or [()]
    results, samples = table.get("result") or [None] * len(chosen), table.get("samples") or [None] * len(chosen)
    for combination, result, drawn in zip(chosen, results, samples, strict=True):
        parameters: dict[str, Scalar] = {f"param{i + 1}": str(value) for i, value in enumerate(combination)}
        if not is_number(result):
            why = "skipped by the benchmark" if isinstance(result, float) and math.isnan(result) else "it failed"
            yield skipped(name, why, parameters, unit)
        else:
            yield measurement(name, [drawn or [result]], unit=unit, parameters=parameters)


def _machine(document: Mapping[str, Any]) -> Machine:
    said: Mapping[str, Any] = document.get("params") or {}
    hard: dict[str, Scalar] = {
        "cpu_name": text(said.get("cpu")),
        "cpus": text(said.get("num_cpu")),
        "architecture": text(said.get("arch")),
        "python": minor(document.get("python") or said.get("python")),
    }
    soft = {"host": text(said.get("machine")), "kernel": text(said.get("os")), "ram": text(said.get("ram"))}
    return Machine(hard=hard, soft=dict(soft))
