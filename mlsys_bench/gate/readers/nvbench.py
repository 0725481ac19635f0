"""NVBench's `--json FILE` and `--jsonbin FILE`.

As NVBench's own python/scripts/nvbench_compare.py reads them: a summary has a tag and data of {name, type, value}, numbers written as
text.  With `--jsonbin` the GPU time of every cold sample lies in a file beside it, 32-bit floats, in seconds; else only their mean is
known.  One process measures everything, so a file is one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlsys_bench.gate.readers.parts import Reading, measurement, named, skipped, text
from mlsys_bench.types import Bench, Machine, Measurement, Scalar

NAME = "nvbench"
HOW = "write one with --jsonbin FILE"
_SAMPLES = "nv/json/bin:nv/cold/sample_times"
_MEAN = "nv/cold/time/gpu/mean"


def knows(document: Any) -> bool:
    """Say whether this is such a result."""
    benchmarks = document.get("benchmarks") if isinstance(document, Mapping) else None
    return isinstance(benchmarks, list) and "devices" in document and all("states" in b and "axes" in b for b in benchmarks)


def reading(document: Mapping[str, Any], where: str, folder: Path | None) -> Reading:
    """Return every state of every benchmark as a measurement of one launch."""
    devices = {device["id"]: device for device in document["devices"] or ()}
    found = tuple(m for b in document["benchmarks"] for m in _measurements(b, devices, folder))
    bare = [m.name for m in found if m.launches and len(m.launches[0].rounds[0].values) == 1]
    notes = named(list(dict.fromkeys(bare)), "only a mean is in the file; --jsonbin keeps the samples")
    return Reading(tool=NAME, where=where, bench=Bench(measurements=found), machine=_machine(devices), notes=notes)


def _measurements(benchmark: Mapping[str, Any], devices: Mapping[int, Any], folder: Path | None) -> Iterator[Measurement]:
    for state in benchmark["states"] or ():
        parameters: dict[str, Scalar] = {axis["name"]: str(axis["value"]) for axis in state.get("axis_values") or ()}
        if len(devices) > 1:
            parameters["device"] = state["device"]
        summaries = {s["tag"]: {d["name"]: d["value"] for d in s["data"]} for s in state.get("summaries") or () if "tag" in s}
        times = _samples(summaries, folder) or ([float(summaries[_MEAN]["value"])] if _MEAN in summaries else [])
        if state.get("is_skipped") or not times:
            yield skipped(benchmark["name"], state.get("skip_reason") or "no GPU time is in the file", parameters)
        else:
            yield measurement(benchmark["name"], [times], parameters=parameters)


def _samples(summaries: Mapping[str, Mapping[str, Any]], folder: Path | None) -> list[float]:
    """Return the samples of the file beside the result, none where it is gone."""
    if _SAMPLES not in summaries or folder is None:
        return []
    named_file, count = Path(str(summaries[_SAMPLES]["filename"])), int(summaries[_SAMPLES]["size"])
    places = [folder / named_file, folder / named_file.parent.name / named_file.name]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        return []
    values = np.fromfile(path, dtype="<f4")
    if len(values) != count:
        raise ValueError(f"{path.name} holds {len(values)} samples where {count} are announced")
    return [float(value) for value in values]


def _machine(devices: Mapping[int, Mapping[str, Any]]) -> Machine:
    names = sorted({str(device["name"]) for device in devices.values()})
    hard: dict[str, Scalar] = {
        "gpu": ", ".join(names) or None,
        "gpu_count": len(devices),
        "gpu_driver": None,
        "ecc": text([device.get("ecc_state") for device in devices.values()]),
    }
    return Machine(hard=hard, soft={})
