"""hyperfine's `--export-json FILE`.

As in hyperfine's src/benchmark/benchmark_result.rs: every value of `times` is one run of the command, a process of its own, hence a
launch.  `user` and `system` are only means over all runs, so they carry no evidence and are left out.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlsys_bench.gate.readers.parts import Reading, measurement, named, skipped
from mlsys_bench.types import Bench, Machine, Measurement, Scalar

NAME = "hyperfine"
HOW = "write one with hyperfine --export-json FILE"
_KEYS = {"command", "mean", "median", "user", "system", "min", "max"}
_NO_TIMES = "the file has no times of single runs"


def knows(document: Any) -> bool:
    """Say whether this is such a result."""
    results = document.get("results") if isinstance(document, Mapping) else None
    return isinstance(results, list) and all(isinstance(r, Mapping) and set(r) >= _KEYS for r in results)


def reading(document: Mapping[str, Any], where: str, folder: Path | None) -> Reading:
    """Return every command as a measurement with a launch for each run; its peak memory, where the file has it, as another."""
    found = tuple(m for result in document["results"] for m in _measurements(result))
    failed = [m.name for m in found if m.parameters.get("exit_status")]
    notes = named(failed, "failed every time, as its parameter exit_status says: what was measured is how fast it fails")
    # hyperfine says nothing of the machine: two such files are compared with that as a remark
    machine = Machine(hard={"cpu_name": None, "cpus": None}, soft={})
    return Reading(tool=NAME, where=where, bench=Bench(measurements=found), machine=machine, notes=notes)


def _measurements(result: Mapping[str, Any]) -> Iterator[Measurement]:
    name, times = result["command"], result.get("times")
    parameters: dict[str, Scalar] = {key: str(value) for key, value in (result.get("parameters") or {}).items()}
    codes = Counter(result.get("exit_codes") or ())
    if not times or len(codes) > 1:
        yield skipped(name, _NO_TIMES if not times else f"its runs ended differently: {_shown(codes)}", parameters)
        return
    code = next(iter(codes), 0)
    if code != 0:  # a run that fails at once is fast: it is compared with runs that fail the same way, or not at all
        parameters["exit_status"] = "killed" if code is None else code
    started_s = [0.0, *itertools.accumulate(times[:-1])]
    yield measurement(name, [[time] for time in times], parameters=parameters, started_s=started_s)
    memory = result.get("memory_usage_byte")
    if memory and all(memory):
        yield measurement(f"{name} peak memory", [[b] for b in memory], unit="bytes", parameters=parameters, started_s=started_s)


def _shown(codes: Counter[int | None]) -> str:
    return ", ".join(f"{n} x {'killed by a signal' if code is None else f'exit status {code}'}" for code, n in codes.items())
