"""gate compare: two recorded files, a fresh one against a recorded one, or a gate that measured decided again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from mlsys_bench import gate, hardware, record, summary, units
from mlsys_bench.errors import RecordError
from mlsys_bench.gate import loadtests, readers
from mlsys_bench.journeys import foreign
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.record import Envelope
from mlsys_bench.types import Bench, LoadTest
from mlsys_bench.verdicts import GateRun, Policy, Verdict


def compare(base: Path, cand: Path, tolerance: str, policy: Policy | None = None) -> Verdict:
    """Return the verdict on two bench files, on two load tests, or on results of other tools.  `policy` goes before `tolerance`."""
    accepted = units.fraction(tolerance, "--tolerance") if policy is None else policy.tolerance
    if foreign.is_foreign(base) or foreign.is_foreign(cand):
        before, after, notes = foreign.sides(base, cand)
        return foreign.remarked(gate.compare(before, after, tolerance=accepted, policy=policy), notes)
    sides = [_loaded(path) for path in (base, cand)]
    if all(side is not None for side in sides):
        return loadtests.compare(*(side for side in sides if side is not None), tolerance=accepted, policy=policy)
    return gate.compare(baseline(base), baseline(cand), tolerance=accepted, policy=policy)


def again(path: Path, tolerance: str | None = None, policy: Policy | None = None) -> Verdict:
    """Return the verdict on a gate that measured, decided again from its launches: the one it holds, unless something else is asked for.

    Raises RecordError for another record: its candidate is missing.
    """
    if foreign.is_foreign(path):
        raise RecordError(f"{path}: needs a CAND to compare with; a record of `gate run` stands alone")
    envelope, value = record.load(path)
    if not isinstance(value, GateRun):
        raise RecordError(
            f"{path}: holds a {envelope.kind!r} record; give a CAND to compare it with (only a record of `gate run` stands alone)"
        )
    asked = policy or value.policy
    if policy is None and tolerance is not None:
        asked = dataclasses.replace(asked, tolerance=units.fraction(tolerance, "--tolerance"))
    return gate.verdict_of(value.base_bench, value.cand_bench, asked, value.base_machine, value.cand_machine)


def files(*paths: Path) -> list[Path]:
    """Return the files that were compared: a folder's own."""
    return [file for path in paths for file in readers.files_of(path)]


def _loaded(path: Path) -> loadtests.Side | None:
    """Return a load test with its requests where they lie unchanged beside it, None for a file of another kind."""
    envelope, value = record.load(path)
    if not isinstance(value, LoadTest | LoadTests):
        return None
    runs = value.runs if isinstance(value, LoadTests) else (value,)
    files = [_beside(path, run.requests_file, envelope) for run in runs]
    found = [file for file in files if file is not None]
    requests = tuple(summary.columns.read([file]) for file in found) if len(found) == len(runs) else ()
    return loadtests.Side(envelope=envelope, record=value, requests=requests)


def _beside(path: Path, requests_file: str | None, envelope: Envelope) -> Path | None:
    """Return the requests of a run where they are those it was made from."""
    name = Path(requests_file).name if requests_file else ""
    places = (place for place in (path.parent / name, Path(requests_file or "")) if name and place.is_file())
    return next((place for place in places if record.digest(place) == envelope.inputs.get(name)), None)


def compare_fresh(base: tuple[Envelope, Bench], candidate: Bench) -> Verdict:
    """Return the verdict on what was just measured here, against what a bench file holds."""
    return gate.compare(base, (record.envelope(candidate, hardware.machine()), candidate))


def baseline(path: Path) -> tuple[Envelope, Bench]:
    """Return what a bench file holds.  Raises RecordError for any other file."""
    envelope, value = record.load(path)
    if not isinstance(value, Bench):
        hint = "; it stands alone: mlsys gate compare " + str(path) if isinstance(value, GateRun) else ""
        raise RecordError(f"{path}: holds a {envelope.kind!r} record; `mlsys gate compare` takes two bench files or two load tests{hint}")
    return envelope, value
