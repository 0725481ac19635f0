"""Google Benchmark's JSON (`--benchmark_out=FILE --benchmark_out_format=json`, or `--benchmark_format=json`).

Every entry is one repetition: the mean time of its iterations.  All repetitions come from one process, so a file is one launch;
aggregates (mean, median, stddev, cv, complexity) are left out.  CPU time goes with each sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mlsys_bench.gate.readers.parts import TIME_S, Reading, finite, is_number, measurement, named, skipped, text
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round, Scalar

NAME = "google-benchmark"
HOW = "write one with --benchmark_out=FILE --benchmark_out_format=json"
_OWN = {
    "name", "family_index", "per_family_instance_index", "run_name", "run_type", "repetitions", "repetition_index", "threads",
    "iterations", "real_time", "cpu_time", "time_unit", "label", "error_occurred", "error_message", "skipped", "skip_message",
    "aggregate_name", "aggregate_unit", "net_heap_growth",
}  # fmt: skip
# of the library's own counters the better end is known; of a program's own it is not
_RATES = {"bytes_per_second": "bytes/s", "items_per_second": "items/s"}
_COSTS = {
    "allocs_per_iter": "allocations", "max_bytes_used": "bytes", "total_allocated_bytes": "bytes", "INSTRUCTIONS": "instructions",
    "CYCLES": "cycles", "BRANCHES": "branches", "BRANCH-MISSES": "misses", "CACHE-MISSES": "misses",
}  # fmt: skip
_COUNTED = {"allocs_per_iter", "max_bytes_used", "total_allocated_bytes"}  # the same program gives the same value
_SUFFIXES = ("_mean", "_median", "_stddev", "_cv", "_BigO", "_RMS")  # of aggregates, before entries had a run_type


def knows(document: Any) -> bool:
    """Say whether this is such a result."""
    context = document.get("context") if isinstance(document, Mapping) else None
    return isinstance(context, Mapping) and "library_build_type" in context and isinstance(document.get("benchmarks"), list)


def reading(document: Mapping[str, Any], where: str, folder: Path | None) -> Reading:
    """Return every benchmark as a measurement of one launch, and each of its counters whose better end is known."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for entry in document["benchmarks"]:
        if not _is_aggregate(entry):
            groups.setdefault(entry.get("run_name", entry["name"]), []).append(entry)
    found = tuple(m for name, entries in groups.items() for m in _measurements(name, entries))
    return Reading(
        tool=NAME,
        where=where,
        bench=Bench(measurements=found),
        machine=_machine(document["context"]),
        notes=_notes(document, groups),
    )


def _measurements(name: str, entries: Sequence[Mapping[str, Any]]) -> Iterator[Measurement]:
    broken = next((e for e in entries if e.get("error_occurred") or e.get("skipped")), None)
    if broken is not None:
        yield skipped(name, str(broken.get("error_message") or broken.get("skip_message") or "it says nothing more"))
        return
    scale = [TIME_S[e["time_unit"]] for e in entries]
    times = Round(
        values=tuple(finite(e["real_time"]) * s for e, s in zip(entries, scale, strict=True)),
        cpu_s=tuple(finite(e["cpu_time"]) * s for e, s in zip(entries, scale, strict=True)),
    )
    launch = Launch(started_s=0.0, rounds=(times,))
    yield Measurement(name=name, unit="s", better="lower", parameters={}, launches=(launch,))
    for counter, unit in (_RATES | _COSTS).items():
        values = [e[counter] for e in entries if is_number(e.get(counter))]
        if values and len(values) == len(entries):
            better: Literal["lower", "higher"] = "higher" if counter in _RATES else "lower"
            counted = counter in _COUNTED and len(set(values)) == 1
            parameters: dict[str, Scalar] = {"counter": counter}
            yield measurement(name, [values], unit=unit, better=better, parameters=parameters, deterministic=counted)


def _is_aggregate(entry: Mapping[str, Any]) -> bool:
    kind = entry.get("run_type")
    return kind == "aggregate" if kind is not None else str(entry["name"]).endswith(_SUFFIXES)


def _notes(document: Mapping[str, Any], groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[str, ...]:
    counters = sorted({k for entries in groups.values() for e in entries for k, v in e.items() if is_number(v)} - _OWN - {*_RATES, *_COSTS})
    only_aggregates = () if groups or not document["benchmarks"] else ("it holds aggregates only: leave out --benchmark_*aggregates_only",)
    debug = document["context"]["library_build_type"] == "debug"
    return (
        *only_aggregates,
        *named(counters, "counters left out, as the file does not say whether more of them is better"),
        *(("the benchmark library was built for debugging: its own overhead is in the times",) if debug else ()),
    )


def _machine(context: Mapping[str, Any]) -> Machine:
    caches = ", ".join(f"L{c['level']} {c['type']} {c['size']} x {c['num_sharing']}" for c in context.get("caches") or ())
    hard: dict[str, Scalar] = {
        "cpu_name": None,
        "cpus": context.get("num_cpus"),
        "caches": caches or None,
        "library_build_type": text(context.get("library_build_type")),
    }
    soft = {"host": text(context.get("host_name")), "cpu_scaling": text(context.get("cpu_scaling_enabled"))}
    return Machine(hard=hard, soft=dict(soft))
