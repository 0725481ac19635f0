"""Records: types <-> files.  The only reader and writer of what the commands hand to each other.

A JSON record is the envelope (`schema`, `kind`, `created`, `machine`, `inputs`) with the fields of its type beside it.
Requests are Parquet, one row each, with the envelope in the file's metadata; a bench may be, one row a sample, where its file is named
so.  Files are replaced whole, so that an interrupted write leaves the old one.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from mlsys_bench import longform
from mlsys_bench.backtests import Backtest
from mlsys_bench.billing import Costs
from mlsys_bench.calibrations import Calibration
from mlsys_bench.checked import Demo, Verification
from mlsys_bench.claims import Claims
from mlsys_bench.errors import BadInput, RecordError, did_you_mean
from mlsys_bench.fleets import Fleet, FleetPlan
from mlsys_bench.histories import History
from mlsys_bench.loadlimits import LoadMax, LoadSweep
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.looked_up import Catalog, Doctor
from mlsys_bench.productions import Production
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import (
    Bench,
    LatencyProfile,
    LoadTest,
    Machine,
    Plan,
    RequestRecord,
    Requests,
    Scenario,
    Workload,
)
from mlsys_bench.verdicts import GateCalibration, GateRun, Verdict

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = "mlsys/1"
KINDS: dict[str, type] = {
    "bench": Bench,
    "requests": Requests,
    "loadtest": LoadTest,
    "loadtests": LoadTests,
    "calibration": Calibration,
    "loadsweep": LoadSweep,
    "loadmax": LoadMax,
    "profile": LatencyProfile,
    "workload": Workload,
    "plan": Plan,
    "verify": Verification,
    "demo": Demo,
    "verdict": Verdict,
    "gate": GateRun,
    "gate-calibration": GateCalibration,
    "gate-history": History,
    "scenario": Scenario,
    "stages": StageGraph,
    "doctor": Doctor,
    "catalog": Catalog,
    "backtest": Backtest,
    "claims": Claims,
    "costs": Costs,
    "production": Production,
    "fleet": Fleet,
    "fleet-plan": FleetPlan,
}
Record = (
    Bench
    | Requests
    | LoadTest
    | LoadTests
    | Calibration
    | LoadSweep
    | LoadMax
    | LatencyProfile
    | Workload
    | Plan
    | Verification
    | Demo
    | Verdict
    | GateRun
    | GateCalibration
    | History
    | Scenario
    | StageGraph
    | Doctor
    | Catalog
    | Backtest
    | Claims
    | Costs
    | Production
    | Fleet
    | FleetPlan
)
T = TypeVar("T", bound=Record)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What every file says of itself: its kind, when and where it was made, and the digests of the files it was made from."""

    schema: str
    kind: str
    created: str
    machine: Machine
    inputs: dict[str, str]


def kind_of(record: Record) -> str:
    """Return the kind a record is stored under."""
    return next(kind for kind, cls in KINDS.items() if type(record) is cls)


def envelope(record: Record, machine: Machine, inputs: Iterable[Path] = ()) -> Envelope:
    """Return the envelope of a record made now, on this machine, from these files."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Envelope(schema=SCHEMA, kind=kind_of(record), created=now, machine=machine, inputs={p.name: digest(p) for p in inputs})


def dumps(record: Record, machine: Machine, inputs: Iterable[Path] = ()) -> str:
    """Return a record as JSON text, envelope included.  Raises RecordError on NaN or infinity."""
    document = {**msgspec.to_builtins(envelope(record, machine, inputs)), **msgspec.to_builtins(record)}
    _refuse_non_finite(document, f"{document['kind']} record")
    return json.dumps(document, indent=1, allow_nan=False)


def write(path: Path, record: Record, machine: Machine, inputs: Iterable[Path] = ()) -> Path:
    """Write a record, Parquet for requests and for a bench named *.parquet, JSON for the rest, and return its path.  Raises RecordError."""
    if isinstance(record, Requests):
        return _write_requests(path, record, envelope(record, machine, inputs))
    if isinstance(record, Bench) and path.suffix == ".parquet":
        return _write_bench(path, record, envelope(record, machine, inputs))
    text = dumps(record, machine, inputs)
    return _replace(path, lambda temporary: temporary.write_text(text + "\n"))


def write_text(path: Path, text: str) -> Path:
    """Write a file that is no record (a table, say), whole or not at all, and return its path.  Raises RecordError."""
    return _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline=""))


def csv_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return the fields of each line of a CSV file with its number.  Raises BadInput naming the line that cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise BadInput(f"{path}: line {line}: is not text in UTF-8") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines, start = [], 1
    try:
        for fields in reader:
            lines.append((start, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        raise BadInput(f"{path}: line {start}: is not CSV: {error}") from error
    return lines


def write_csv(path: Path, columns: Iterable[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a table as CSV, whole or not at all; an empty cell for None."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return write_text(path, out.getvalue())


def check_writable(path: Path) -> None:
    """Raise RecordError when no file can be written there: measurements of minutes must not end in that."""
    if path.is_dir():
        raise RecordError(f"{path}: cannot be written: it is a folder; name a file in it")
    if is_stream(path):
        return
    trial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error.strerror or error}") from error


def is_stream(path: Path) -> bool:
    """Say whether this is a device or a pipe, /dev/null say: what goes there is written through it, never put in its place."""
    return path.exists() and not path.is_file() and not path.is_dir()


def requests_beside(out: Path | None, run: int | None = None) -> Path | None:
    """Return the file of the requests whose summary goes to `out`, of one of several runs where numbered; None where nothing is kept.

    Raises RecordError when either of the two cannot be written, or both would be one file.
    """
    if out is None:
        return None
    check_writable(out)
    if is_stream(out):
        return None
    if out.suffix == ".parquet":
        raise RecordError(f"{out}: the requests go to a .parquet beside the summary; name the summary, e.g. {out.with_suffix('.json')}")
    requests = out.with_suffix(".parquet" if run is None else f".{run + 1}.parquet")
    check_writable(requests)
    return requests


def read(path: Path, cls: type[T]) -> T:
    """Return the record of a file that must hold this type.  Raises RecordError saying what it holds instead."""
    stored, value = load(path)
    if not isinstance(value, cls):
        wanted = next(kind for kind, known in KINDS.items() if known is cls)
        raise RecordError(f"{path}: holds a {stored.kind!r} record; a {wanted!r} record is needed here")
    return value


def load(path: Path) -> tuple[Envelope, Record]:
    """Return envelope and record of any file of ours.  Raises RecordError for anything else."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise RecordError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start == b"PAR1":
        return _read_parquet(path)
    return loads(path.read_bytes(), str(path))


def loads(data: bytes | str, where: str) -> tuple[Envelope, Record]:
    """Return envelope and record of JSON text."""
    document = _json(data, where)
    if not isinstance(document, dict) or "schema" not in document:
        raise RecordError(f"{where}: is no mlsys record (no 'schema' at the top)")
    if document["schema"] != SCHEMA:
        raise RecordError(f"{where}: has schema {document['schema']!r}, this version reads {SCHEMA!r}; make the file again")
    kind = document.get("kind")
    if not isinstance(kind, str) or kind not in KINDS or kind == "requests":
        raise RecordError(f"{where}: unknown kind {kind!r}{did_you_mean(str(kind), KINDS)}")
    return _understood(document, where)


def _understood(document: dict[str, Any], where: str) -> tuple[Envelope, Any]:
    """Return envelope and record of a document of ours, every value checked."""
    _refuse_non_finite(document, where)
    names = {f.name for f in dataclasses.fields(Envelope)}
    head = _convert({k: v for k, v in document.items() if k in names}, Envelope, where)
    body = {k: v for k, v in document.items() if k not in names}
    record = _convert(body, KINDS[document["kind"]], where)
    _refuse_unknown(body, msgspec.to_builtins(record), where)
    return head, record


def digest(path: Path) -> str:
    """Return 'sha256:…' of a file."""
    with path.open("rb") as file:
        return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()


def _json(data: bytes | str, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{where}: is not JSON, or was cut off: {error}") from error


def _convert(data: Any, cls: type, where: str) -> Any:
    try:
        return msgspec.convert(data, cls)
    except msgspec.ValidationError as error:
        raise RecordError(f"{where}: {error}") from error


def _refuse_non_finite(value: Any, where: str, path: str = "") -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise RecordError(f"{where}: {path.lstrip('.')} is {value}; a measurement must be a finite number")
    if isinstance(value, dict):
        for key, item in value.items():
            _refuse_non_finite(item, where, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_non_finite(item, where, f"{path}[{i}]")


def _refuse_unknown(given: Any, understood: Any, where: str, path: str = "") -> None:
    """Raise on a key that the type does not have: dropping it would hide a mistake."""
    if isinstance(given, dict) and isinstance(understood, dict):
        for key, item in given.items():
            if key not in understood:
                raise RecordError(f"{where}: unknown key {f'{path}.{key}'.lstrip('.')}{did_you_mean(key, understood)}")
            _refuse_unknown(item, understood[key], where, f"{path}.{key}")
    elif isinstance(given, list) and isinstance(understood, list | tuple):
        for i, (item, known) in enumerate(zip(given, understood, strict=True)):
            _refuse_unknown(item, known, where, f"{path}[{i}]")


def _replace(path: Path, fill: Any) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if is_stream(path):  # a file in the place of /dev/null would break the machine
            fill(path)
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        fill(temporary)
        temporary.replace(path)
    except OSError as error:
        raise RecordError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):  # nothing is there when the folder could not be made
            temporary.unlink()
    return path


# ---------------------------------------------------------------- requests: Parquet


def _requests_schema() -> pa.Schema:
    import pyarrow as pa

    f, i, s = pa.float64(), pa.int64(), pa.string()
    kinds = {
        "index": i, "scheduled_s": f, "sent_s": f, "headers_s": f, "token_s": pa.list_(f), "tokens_per_event": pa.list_(i),
        "done_s": f, "prompt_tokens": i, "output_tokens": i, "token_source": s, "outcome": s, "http_status": i, "attempt": i,
        "tenant": s, "session": s, "stage_s": pa.map_(s, f), "in_window": pa.bool_(),
    }  # fmt: skip
    return pa.schema([(field.name, kinds[field.name]) for field in dataclasses.fields(RequestRecord)])


def _write_requests(path: Path, requests: Requests, head: Envelope) -> Path:
    """Write requests column by column: row by row takes four times as long, and a run may have a million."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    metadata = {"mlsys": json.dumps({**msgspec.to_builtins(head), "t0_unix_s": requests.t0_unix_s})}
    schema = _requests_schema().with_metadata(metadata)
    columns = {name: [getattr(r, name) for r in requests.requests] for name in schema.names}
    columns["stage_s"] = [list(stages.items()) for stages in columns["stage_s"]]
    table = pa.table(columns, schema=schema)
    if not _is_finite(table):
        _refuse_non_finite([msgspec.to_builtins(r) for r in requests.requests], str(path))
    return _replace(path, lambda temporary: pq.write_table(table, temporary))


def _is_finite(table: Any) -> bool:
    """Say whether every number of the requests' columns is finite."""
    import numpy as np

    found = []
    for column in table.columns:
        name = str(column.type)
        if name.startswith("map"):
            column = column.combine_chunks().items
        elif name.startswith("list"):
            column = column.combine_chunks().flatten()
        if str(column.type) == "double":
            found.append(np.isfinite(column.drop_null().to_numpy()).all())
    return all(found)


def _read_parquet(path: Path) -> tuple[Envelope, Requests | Bench]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise RecordError(f"{path}: is not Parquet, or was cut off: {error}") from error
    metadata = (table.schema.metadata or {}).get(b"mlsys")
    if metadata is None:
        raise RecordError(f"{path}: is Parquet, but no mlsys record (its metadata has no 'mlsys')")
    head = _json(metadata, str(path))
    schema = head.get("schema") if isinstance(head, dict) else None
    if schema != SCHEMA:
        raise RecordError(f"{path}: has schema {schema!r}, this version reads {SCHEMA!r}; make the file again")
    return _read_bench(table, head, str(path)) if head.get("kind") == "bench" else _read_requests(table, head, str(path))


def _read_requests(table: pa.Table, head: dict[str, Any], where: str) -> tuple[Envelope, Requests]:
    t0_unix_s = head.pop("t0_unix_s", None)
    rows = table.to_pylist()
    names = dict.fromkeys(_requests_schema().names)
    _refuse_unknown(dict.fromkeys(table.column_names), names, where)
    for row in rows:
        row["stage_s"] = dict(row.get("stage_s") or ())
    _refuse_non_finite(rows, where)
    requests = _convert({"t0_unix_s": t0_unix_s, "requests": rows}, Requests, where)
    return _convert(head, Envelope, where), requests


# ---------------------------------------------------------------- a bench sample by sample: Parquet


def _write_bench(path: Path, bench: Bench, head: Envelope) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    document = {**msgspec.to_builtins(head), **msgspec.to_builtins(bench)}
    _refuse_non_finite(document, str(path))
    schema = longform.schema().with_metadata({"mlsys": json.dumps(longform.skeleton(document), allow_nan=False)})
    table = pa.table(longform.columns(bench), schema=schema)
    return _replace(path, lambda temporary: pq.write_table(table, temporary))


def _read_bench(table: pa.Table, head: dict[str, Any], where: str) -> tuple[Envelope, Bench]:
    try:
        document = longform.filled(head, {name: table.column(name).to_pylist() for name in longform.COLUMNS})
    except (KeyError, TypeError) as error:
        raise RecordError(f"{where}: its samples do not fit its metadata ({error}); make the file again") from error
    return _understood(document, where)
