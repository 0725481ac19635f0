"""Results of other benchmark tools -> a Bench the gate can judge, with what the file says of its machine.

Formats are told apart by content.  What counts is what one *launch* is: pyperf and hyperfine start a process per run, so one file holds
many launches; pytest-benchmark, Google Benchmark, asv and nvbench measure in one process, so one file is one launch, which can make a
change suspect and no more.  A folder of such files is one launch a file.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsys_bench.errors import BadInput, MeasurementFailed, unknown
from mlsys_bench.gate.readers import asv, google_benchmark, hyperfine, nvbench, pyperf, pytest_benchmark
from mlsys_bench.gate.readers.parts import Reading, Tool
from mlsys_bench.types import Bench, Measurement

__all__ = ["KNOWN", "Reading", "load", "merged", "parse", "read", "recognised"]

_TOOLS: tuple[Tool, ...] = (pytest_benchmark, google_benchmark, pyperf, hyperfine, asv, nvbench)
KNOWN = tuple(tool.NAME for tool in _TOOLS)
_SUFFIXES = (".json", ".json.gz", ".csv", ".jsonl")


def read(path: Path, tool: str | None = None) -> Bench:
    """Return what a result file, or a folder of them, measured.  `tool` is one of KNOWN; None: told by content."""
    return load(path, tool).bench


def load(path: Path, tool: str | None = None) -> Reading:
    """Return what a result file, or a folder of them, holds: measurements, machine, and what to know about them.  Raises BadInput."""
    if path.is_dir():
        return merged([load(file, tool) for file in files_of(path)])
    return parse(text_of(path), str(path), tool, path.parent)


def files_of(path: Path) -> list[Path]:
    """Return the results in a folder, by name, or the one file.  Raises BadInput for a folder without any, or with copies."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.is_file() and file.name.endswith(_SUFFIXES))
    if not found:
        raise BadInput(f"{path}: is a folder without any {' or '.join(_SUFFIXES)} file; give it one result of each launch")
    _check_no_copies(found)
    return found


def _check_no_copies(files: Sequence[Path]) -> None:
    """Raise BadInput for a file that is there twice: copies of a launch differ by nothing, and would prove anything."""
    seen: dict[bytes, Path] = {}
    for file in files:
        other = seen.setdefault(hashlib.sha256(text_of(file).encode()).digest(), file)
        if other is not file:
            raise BadInput(f"{file}: is a copy of {other.name}; each launch needs a result of its own")


def parse(text: str, where: str, tool: str | None = None, folder: Path | None = None) -> Reading:
    """Return what a result's text holds.  `folder` is where files beside it lie.  Raises BadInput; MeasurementFailed where it is empty."""
    return parse_document(document_of(text, where), where, tool, folder)


def parse_document(document: Any, where: str, tool: str | None = None, folder: Path | None = None) -> Reading:
    """Return what a result holds, its JSON as Python has it."""
    chosen = _named(tool) if tool is not None else recognised(document)
    if chosen is None:
        raise BadInput(f"{where}: is no result of a tool known here; known: {', '.join(KNOWN)}")
    if tool is not None and not chosen.knows(document):
        raise BadInput(f"{where}: is not what {tool} writes{_instead(document)}; {chosen.HOW}")
    try:
        reading = chosen.reading(document, where, folder)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadInput(f"{where}: looks like {chosen.NAME} but cannot be read: {error!r}; was the file cut or edited?") from error
    if not reading.bench.measurements:
        raise MeasurementFailed(f"{where}: holds no benchmark of {chosen.NAME} that can be compared{_why(reading)}")
    return reading


def recognised(document: Any) -> Tool | None:
    """Return the tool that wrote a document, None where it is none of these."""
    return next((tool for tool in _TOOLS if tool.knows(document)), None)


def merged(readings: Sequence[Reading]) -> Reading:
    """Return several results of the same benchmarks as one, each adding its launches.  Raises BadInput where tools or machines differ."""
    first, *others = readings
    for other in others:
        if other.tool != first.tool:
            raise BadInput(f"{other.where}: is of {other.tool}, {first.where} of {first.tool}; launches of one side come from one tool")
        if other.machine.hard != first.machine.hard:
            raise BadInput(f"{other.where}: was measured elsewhere than {first.where}{_difference(first, other)}; keep them apart")
    found: dict[str, Measurement] = {}
    for measurement in (m for reading in readings for m in reading.bench.measurements):
        key = json.dumps([measurement.name, measurement.parameters], sort_keys=True)
        found[key] = _joined(found[key], measurement) if key in found else measurement
    notes = dict.fromkeys(note for reading in readings for note in reading.notes)
    bench = Bench(measurements=tuple(found.values()))
    return dataclasses.replace(first, bench=bench, notes=tuple(notes), where=_place(readings))


def _place(readings: Sequence[Reading]) -> str:
    places = dict.fromkeys(reading.where for reading in readings)
    return readings[0].where if len(places) == 1 else str(Path(readings[0].where).parent)


def text_of(path: Path) -> str:
    """Return the text of a file, unpacked where its name ends in .gz.  Raises BadInput."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.name.endswith(".gz") else data).decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def document_of(text: str, where: str) -> Any:
    """Return JSON as Python has it.  Raises BadInput."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "is empty" if not text.strip() else f"is not JSON, or was cut off: {error}"
        raise BadInput(f"{where}: {what}; results read here: {', '.join(KNOWN)}") from error


def _named(name: str) -> Tool:
    for tool in _TOOLS:
        if name == tool.NAME:
            return tool
    raise unknown("result format", name, KNOWN)


def _joined(one: Measurement, other: Measurement) -> Measurement:
    """Return the launches of both; what one of them could not measure is not measured."""
    return dataclasses.replace(
        one,
        launches=(*one.launches, *other.launches),
        skipped=one.skipped or other.skipped,
        deterministic=one.deterministic and other.deterministic,
    )


def _instead(document: Any) -> str:
    found = recognised(document)
    return f" but {found.NAME}" if found is not None else ""


def _why(reading: Reading) -> str:
    return f": {'; '.join(reading.notes)}" if reading.notes else ""


def _difference(first: Reading, other: Reading) -> str:
    hard = (first.machine.hard, other.machine.hard)
    name = next(n for n in sorted({*hard[0], *hard[1]}) if hard[0].get(n) != hard[1].get(n))
    return f" ({name}: {hard[0].get(name)} -> {hard[1].get(name)})"
