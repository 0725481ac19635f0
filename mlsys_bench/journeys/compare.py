"""gate compare: two recorded files, or a fresh one against a recorded one."""

from __future__ import annotations

from pathlib import Path

from mlsys_bench import gate, hardware, record, units
from mlsys_bench.errors import RecordError
from mlsys_bench.record import Envelope
from mlsys_bench.types import Bench, Verdict


def compare(base: Path, cand: Path, tolerance: str) -> Verdict:
    """Return the verdict on two bench files."""
    return gate.compare(baseline(base), baseline(cand), tolerance=units.fraction(tolerance, "--tolerance"))


def compare_fresh(base: tuple[Envelope, Bench], candidate: Bench) -> Verdict:
    """Return the verdict on what was just measured here, against what a bench file holds."""
    return gate.compare(base, (record.envelope(candidate, hardware.machine()), candidate))


def baseline(path: Path) -> tuple[Envelope, Bench]:
    """Return what a bench file holds.  Raises RecordError for any other file."""
    envelope, value = record.load(path)
    if not isinstance(value, Bench):
        raise RecordError(f"{path}: holds a {envelope.kind!r} record; `mlsys gate compare` takes bench files")
    return envelope, value
