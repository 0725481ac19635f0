"""A bench record in long form: a row per sample, as columns of a Parquet file, and back without loss.

What a sample does not say (a measurement's work and error, when a launch began, telemetry) stands in the file's metadata as JSON; a row
points there by the number of its measurement, launch and round, and repeats name and parameters so that a data frame needs no join.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlsys_bench.types import Bench, Measurement, Round

if TYPE_CHECKING:
    import pyarrow as pa

_BESIDE = tuple(f.name for f in dataclasses.fields(Round) if f.name != "values")  # of a round, sample by sample where they are known
COLUMNS = ("measurement", "name", "unit", "parameters", "launch", "round", "value", *_BESIDE)


def schema() -> pa.Schema:
    """Return the columns with their types."""
    import pyarrow as pa

    i, s, b = pa.int64(), pa.string(), pa.bool_()
    kinds = {"measurement": i, "name": s, "unit": s, "parameters": s, "launch": i, "round": i, "involuntary": i, "flagged": b}
    return pa.schema([(name, kinds.get(name, pa.float64())) for name in COLUMNS])


def columns(bench: Bench) -> dict[str, list[Any]]:
    """Return the samples column by column."""
    rows = [row for at, m in enumerate(bench.measurements) for row in _rows(at, m)]
    return {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}


def skeleton(document: dict[str, Any]) -> dict[str, Any]:
    """Return a record's plain data with each round reduced to what it holds beside its samples: which of their columns are known."""
    measurements = [
        {**m, "launches": [{**launch, "rounds": [_known(r) for r in launch["rounds"]]} for launch in m["launches"]]}
        for m in document["measurements"]
    ]
    return {**document, "measurements": measurements}


def filled(document: dict[str, Any], rows: dict[str, Sequence[Any]]) -> dict[str, Any]:
    """Return the plain data of a record again, its rounds filled from the rows.  Raises KeyError or TypeError where they do not fit."""
    found: dict[tuple[int, int, int], dict[str, list[Any]]] = {}
    for at, key in enumerate(zip(rows["measurement"], rows["launch"], rows["round"], strict=True)):
        samples = found.setdefault(key, {name: [] for name in ("values", *_BESIDE)})
        samples["values"].append(rows["value"][at])
        for name in _BESIDE:
            samples[name].append(rows[name][at])
    measurements = [
        {**m, "launches": [
            {**launch, "rounds": [_round(r, found.get((i, j, k))) for k, r in enumerate(launch["rounds"])]}
            for j, launch in enumerate(m["launches"])
        ]}
        for i, m in enumerate(document["measurements"])
    ]  # fmt: skip
    return {**document, "measurements": measurements}


def _rows(at: int, m: Measurement) -> Iterator[tuple[Any, ...]]:
    parameters = json.dumps(m.parameters)
    for number, launch in enumerate(m.launches):
        for turn, samples in enumerate(launch.rounds):
            for i, value in enumerate(samples.values):
                beside = (None if (column := getattr(samples, name)) is None else column[i] for name in _BESIDE)
                yield (at, m.name, m.unit, parameters, number, turn, value, *beside)


def _known(samples: dict[str, Any]) -> dict[str, Any]:
    return {name: samples.get(name) is not None for name in _BESIDE}


def _round(known: dict[str, bool], samples: dict[str, list[Any]] | None) -> dict[str, Any]:
    """Return a round's samples: a round without any stays one."""
    if samples is None:
        return {"values": [], **{name: [] if known.get(name) else None for name in _BESIDE}}
    return {"values": samples["values"], **{name: samples[name] if known.get(name) else None for name in _BESIDE}}
