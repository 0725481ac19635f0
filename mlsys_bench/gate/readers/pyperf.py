"""pyperf's JSON (`-o FILE`), file format 1.0 and the 6 before it.

As in pyperf/_bench.py: every run is a worker process of its own, hence a launch; `values` are seconds (or bytes) per iteration, already
divided by the loops; warm-ups stand apart and are left out, as are runs without values, which only calibrated.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlsys_bench.gate.readers.parts import Reading, measurement, minor, named, text
from mlsys_bench.types import Bench, Machine, Measurement, Scalar

NAME = "pyperf"
HOW = "write one with pyperf … -o FILE"
_VERSIONS = ("1.0", 6)
_UNITS = {"second": "s", "byte": "bytes", "integer": "count"}  # pyperf takes less for better in all of them
_FEW = 2


def knows(document: Any) -> bool:
    """Say whether this is such a result."""
    benchmarks = document.get("benchmarks") if isinstance(document, Mapping) else None
    return isinstance(benchmarks, list) and document.get("version") in _VERSIONS and all("runs" in b for b in benchmarks)


def reading(document: Mapping[str, Any], where: str, folder: Path | None) -> Reading:
    """Return every benchmark as a measurement with a launch for each process that measured."""
    common = document.get("metadata") or {}
    benchmarks = [({**common, **(b.get("metadata") or {})}, b["runs"]) for b in document["benchmarks"]]
    found = tuple(_measurement(metadata, runs) for metadata, runs in benchmarks if any(run.get("values") for run in runs))
    single = [m.name for m in found if len(m.launches) < _FEW]
    notes = named(single, "measured in one process, a single launch; pyperf's --processes makes more")
    metadata = {**_first_run(benchmarks), **(benchmarks[0][0] if benchmarks else {})}
    return Reading(tool=NAME, where=where, bench=Bench(measurements=found), machine=_machine(metadata), notes=notes)


def _measurement(metadata: Mapping[str, Any], runs: Sequence[Mapping[str, Any]]) -> Measurement:
    measured = [run for run in runs if run.get("values")]
    first: Mapping[str, Any] = {**metadata, **(measured[0].get("metadata") or {})}
    unit = _UNITS[first.get("unit", "second")]
    return measurement(first["name"], [run["values"] for run in measured], unit=unit, started_s=_started_s(measured))


def _started_s(runs: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return when each process ended, from the first on, by the dates in the file; none where there are none."""
    dates = [(run.get("metadata") or {}).get("date") for run in runs]
    if not all(isinstance(date, str) for date in dates):
        return []
    times = [datetime.datetime.fromisoformat(str(date)) for date in dates]
    return [(time - times[0]).total_seconds() for time in times]


def _first_run(benchmarks: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]]) -> Mapping[str, Any]:
    return next((run["metadata"] for _, runs in benchmarks for run in runs if run.get("values") and run.get("metadata")), {})


def _machine(metadata: Mapping[str, Any]) -> Machine:
    hard: dict[str, Scalar] = {
        "cpu_name": text(metadata.get("cpu_model_name")),
        "cpus": metadata.get("cpu_count"),
        # pyperf says which cores only where they are not all
        "cpu_affinity": text(metadata.get("cpu_affinity")) or ("all" if metadata.get("cpu_count") else None),
        "python": minor(metadata.get("python_version")),
        "python_implementation": text(metadata.get("python_implementation")),
    }
    soft = {"host": text(metadata.get("hostname")), "platform": text(metadata.get("platform")), "aslr": text(metadata.get("aslr"))}
    return Machine(hard=hard, soft=dict(soft))
