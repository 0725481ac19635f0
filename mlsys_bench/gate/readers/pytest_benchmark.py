"""pytest-benchmark's `--benchmark-json FILE` (and files of `--benchmark-save` with `--benchmark-save-data`).

As in pytest_benchmark/stats.py: `stats.data` holds one value a round, already divided by the iterations of a round, in seconds; all
rounds of all tests come from one pytest process, so a file is one launch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlsys_bench.gate.readers.parts import Reading, measurement, minor, named, skipped, text
from mlsys_bench.types import Bench, Machine, Measurement, Scalar

NAME = "pytest-benchmark"
HOW = "write one with pytest --benchmark-json=FILE"
_NO_DATA = "the file has only statistics: write it with --benchmark-json, or add --benchmark-save-data"


def knows(document: Any) -> bool:
    """Say whether this is such a result."""
    return isinstance(document, Mapping) and {"machine_info", "commit_info", "benchmarks"} <= set(document)


def reading(document: Mapping[str, Any], where: str, folder: Path | None) -> Reading:
    """Return every test as a measurement of one launch."""
    found = tuple(_measurement(benchmark) for benchmark in document["benchmarks"])
    notes = named([m.name for m in found if m.skipped], _NO_DATA)
    return Reading(tool=NAME, where=where, bench=Bench(measurements=found), machine=_machine(document["machine_info"]), notes=notes)


def _measurement(benchmark: Mapping[str, Any]) -> Measurement:
    data = benchmark["stats"].get("data")
    if not data:
        return skipped(benchmark["fullname"], _NO_DATA)
    return measurement(benchmark["fullname"], [data])


def _machine(info: Mapping[str, Any]) -> Machine:
    cpu: Mapping[str, Any] = info.get("cpu") or {}
    hard: dict[str, Scalar] = {
        "architecture": text(info.get("machine")),
        "os": text(info.get("system")),
        "python": minor(info.get("python_version")),
        "python_implementation": text(info.get("python_implementation")),
        "cpu_name": text(cpu.get("brand_raw") or cpu.get("brand")),
        "cpu_vendor": text(cpu.get("vendor_id_raw") or cpu.get("vendor_id")),
        "cpu_family": text(cpu.get("family")),
        "cpu_model": text(cpu.get("model")),
        "cpu_stepping": text(cpu.get("stepping")),
        "cpus": cpu.get("count"),
    }
    return Machine(hard=hard, soft={"host": text(info.get("node")), "kernel": text(info.get("release"))})
