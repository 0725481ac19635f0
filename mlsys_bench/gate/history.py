"""Results over commits in one SQLite file: adding to it and reading it back.

One file and short transactions, so that a CI cache may copy it whole and two jobs may add to it at once: writers wait for each other
(`BEGIN IMMEDIATE`), and a write that is cut off leaves what was there.  A result added twice is there once.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np

from mlsys_bench import record, samples
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import rows
from mlsys_bench.summary import launches
from mlsys_bench.types import Bench, Machine, Measurement, Scalar
from mlsys_bench.verdicts import Finding, GateRun, Policy, Verdict

SCHEMA = 1
APPLICATION = 0x6D6C7379  # 'mlsy', in the file's header: whose database it is
WAIT_S = 30.0  # for another writer
_TABLES = """
CREATE TABLE result (
    id INTEGER PRIMARY KEY,
    digest TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL,
    created TEXT NOT NULL,
    source TEXT NOT NULL,
    machine TEXT NOT NULL,
    machine_name TEXT NOT NULL,
    branch TEXT,
    base_label TEXT,
    base_commit TEXT,
    label TEXT NOT NULL,
    commit_id TEXT,
    verdict TEXT
);
CREATE TABLE metric (
    result INTEGER NOT NULL REFERENCES result (id) ON DELETE CASCADE,
    name TEXT NOT NULL,
    parameters TEXT NOT NULL,
    unit TEXT NOT NULL,
    better TEXT NOT NULL,
    counted INTEGER NOT NULL,
    base TEXT NOT NULL,
    cand TEXT NOT NULL,
    paired INTEGER NOT NULL,
    verdict TEXT,
    PRIMARY KEY (result, name, parameters)
);
CREATE INDEX result_created ON result (created);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric of a result: a number for each launch; those of both sides go pair by pair where `paired`."""

    name: str
    parameters: dict[str, Scalar]
    unit: str
    better: Literal["lower", "higher"]
    counted: bool
    base: tuple[float, ...]
    cand: tuple[float, ...]
    paired: bool
    verdict: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one gate run, comparison or benchmark file leaves in the history."""

    digest: str
    kind: str
    created: str
    source: str
    machine: str
    machine_name: str
    branch: str | None
    base_label: str | None
    base_commit: str | None
    label: str
    commit: str | None
    verdict: str | None
    metrics: tuple[Metric, ...]


class Added(NamedTuple):
    """What adding did: results that are new, those that were there, and how many there are now."""

    new: int
    known: int
    results: int


# ---------------------------------------------------------------- records to results


def results_of(paths: Iterable[Path], *, branch: str | None = None, commit: str | None = None) -> tuple[Result, ...]:
    """Return what each file leaves in the history.  Raises BadInput for one that holds no gate run, verdict or benchmark."""
    return tuple(_of_file(path, branch, commit) for path in paths)


def _of_file(path: Path, branch: str | None, commit: str | None) -> Result:
    head, value = record.load(path)
    if isinstance(value, GateRun):
        if commit is not None and value.cand.commit is not None:
            raise BadInput(f"{path}: --commit {commit}: the run says itself which commit it measured ({value.cand.commit}); leave it out")
        return of_run(value, created=head.created, source=path.name, branch=branch, commit=commit)
    if isinstance(value, Verdict):
        return _of_verdict(value, head, path.name, branch, commit)
    if isinstance(value, Bench):
        return _of_bench(value, head, path.name, branch, commit)
    raise BadInput(f"{path}: holds a {head.kind!r} record; a history is of gate runs, verdicts and benchmarks")


def of_run(run: GateRun, *, created: str, source: str, branch: str | None = None, commit: str | None = None) -> Result:
    """Return what a gate run leaves in the history."""
    said = {_key(f.name, f.parameters): f.verdict for f in run.verdict.findings}
    base = {_key(m.name, m.parameters): m for m in run.base_bench.measurements}
    measured = [m for m in run.cand_bench.measurements if m.launches and not m.skipped]
    metrics = [row for m in measured for row in _metrics(base.get(_key(m.name, m.parameters)), m, run.policy)]
    kept = [replace(m, verdict=said.get(_key(m.name, m.parameters))) for m in metrics]
    return Result(
        digest=_digest("gate", run), kind="gate", created=created, source=source, machine=class_of(run.cand_machine),
        machine_name=_name_of(run.cand_machine), branch=branch, base_label=run.base.label, base_commit=run.base.commit,
        label=run.cand.label, commit=run.cand.commit or commit, verdict=run.verdict.verdict, metrics=tuple(kept),
    )  # fmt: skip


def _of_verdict(value: Verdict, head: record.Envelope, source: str, branch: str | None, commit: str | None) -> Result:
    return Result(
        digest=_digest("verdict", value, head.created), kind="verdict", created=head.created, source=source, machine=class_of(head.machine),
        machine_name=_name_of(head.machine), branch=branch, base_label=None, base_commit=None, label=commit or source, commit=commit,
        verdict=value.verdict, metrics=tuple(m for f in value.findings if (m := _of_finding(f)) is not None),
    )  # fmt: skip


def _of_bench(value: Bench, head: record.Envelope, source: str, branch: str | None, commit: str | None) -> Result:
    found = [row for m in samples.unflagged(value).measurements if m.launches and not m.skipped for row in _alone(m)]
    return Result(
        digest=_digest("bench", value, head.created), kind="bench", created=head.created, source=source, machine=class_of(head.machine),
        machine_name=_name_of(head.machine), branch=branch, base_label=None, base_commit=None, label=commit or source, commit=commit,
        verdict=None, metrics=tuple(found),
    )  # fmt: skip


def _metrics(base: Measurement | None, cand: Measurement, policy: Policy) -> tuple[Metric, ...]:
    """Return the rows that decide where both sides ran in pairs (CPU time and tails among them), else what the candidate measured."""
    if base is None or not _comparable(base, cand):
        return _alone(cand)
    return tuple(
        Metric(
            name=row.name, parameters=row.parameters, unit=row.unit, better=row.better, counted=cand.deterministic,
            base=tuple(before for before, _ in row.numbers), cand=tuple(after for _, after in row.numbers), paired=True,
        )
        for row in rows.of(base, cand, policy)
    )  # fmt: skip


def _comparable(base: Measurement, cand: Measurement) -> bool:
    if base.skipped or (base.unit, base.better) != (cand.unit, cand.better):
        return False
    return bool(rows.paired(base, cand)) and launches.usable([*base.launches, *cand.launches])


def _alone(m: Measurement) -> tuple[Metric, ...]:
    """Return a number for each launch; nothing where one holds no sample."""
    if not all(len(launches.samples(launch)) for launch in m.launches):
        return ()
    statistic = launches.statistic_for(m.launches)
    numbers = tuple(launches.number(launch, statistic, m.better) for launch in m.launches)
    made = Metric(
        name=m.name, parameters=m.parameters, unit=m.unit, better=m.better, counted=m.deterministic, base=(), cand=numbers, paired=False,
    )  # fmt: skip
    return (made,)


def _of_finding(f: Finding) -> Metric | None:
    """Return what a verdict kept of a metric: one number a side."""
    if f.candidate is None:
        return None
    base = () if f.baseline is None else (f.baseline,)
    return Metric(
        name=f.name, parameters=f.parameters, unit=f.unit, better=f.better, counted=f.kind == "counter", base=base, cand=(f.candidate,),
        paired=False, verdict=f.verdict,
    )  # fmt: skip


def class_of(machine: Machine) -> str:
    """Return the digest of the hard fields: results of machines that differ in one are never joined."""
    return hashlib.sha256(json.dumps(machine.hard, sort_keys=True).encode()).hexdigest()[:12]


def _name_of(machine: Machine) -> str:
    hard = machine.hard
    parts = (hard.get("gpu_name"), hard.get("cpu_name") or hard.get("cpu_model"), f"{hard['cores']} cores" if hard.get("cores") else None)
    return ", ".join(str(part) for part in parts if part) or "unnamed machine"


def _key(name: str, parameters: dict[str, Scalar]) -> tuple[str, str]:
    return name, json.dumps(parameters, sort_keys=True)


def _digest(kind: str, value: GateRun | Verdict | Bench, created: str = "") -> str:
    """Return what makes a result the same one: its content, and when it was made unless that is in it (a gate run never repeats)."""
    text = json.dumps([kind, created, msgspec.to_builtins(value)], sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


# ---------------------------------------------------------------- the file


def add(db: Path, results: Sequence[Result]) -> Added:
    """Add results to a database, made where there is none; all of them or, when anything fails, none.  Raises BadInput."""
    with _open(db, create=True) as connection:
        new = sum(_insert(connection, result) for result in results)
        (count,) = connection.execute("SELECT count(*) FROM result").fetchone()
    return Added(new=new, known=len(results) - new, results=count)


def keep(db: Path, run: GateRun, *, branch: str | None = None) -> Added:
    """Add a gate run that has just ended.  Raises BadInput."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return add(db, [of_run(run, created=now, source="gate run", branch=branch)])


def load(db: Path, *, branch: str | None = None) -> tuple[Result, ...]:
    """Return every result of a database, or of one branch, the oldest first.  Raises BadInput."""
    with _open(db, create=False) as connection:
        found = connection.execute("SELECT * FROM result WHERE ?1 IS NULL OR branch = ?1 ORDER BY created, id", (branch,)).fetchall()
        metrics: dict[int, list[Metric]] = {row["id"]: [] for row in found}
        for row in connection.execute("SELECT * FROM metric ORDER BY rowid"):
            if row["result"] in metrics:
                metrics[row["result"]].append(_metric_of(row))
    return tuple(_result_of(row, metrics[row["id"]]) for row in found)


def check(db: Path) -> None:
    """Raise BadInput where nothing could be added: minutes of measuring must not end in that."""
    with _open(db, create=True):
        pass


def _insert(connection: sqlite3.Connection, result: Result) -> bool:
    """Add one result and say whether it is new."""
    done = connection.execute(
        "INSERT OR IGNORE INTO result (digest, kind, created, source, machine, machine_name, branch, base_label, base_commit, label,"
        " commit_id, verdict) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (result.digest, result.kind, result.created, result.source, result.machine, result.machine_name, result.branch,
         result.base_label, result.base_commit, result.label, result.commit, result.verdict),
    )  # fmt: skip
    if done.rowcount == 0:
        return False
    connection.executemany(
        "INSERT INTO metric VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [(done.lastrowid, *_key(m.name, m.parameters), m.unit, m.better, m.counted, json.dumps(m.base), json.dumps(m.cand), m.paired,
          m.verdict) for m in result.metrics],
    )  # fmt: skip
    return True


def _metric_of(row: sqlite3.Row) -> Metric:
    return Metric(
        name=row["name"], parameters=json.loads(row["parameters"]), unit=row["unit"], better=row["better"], counted=bool(row["counted"]),
        base=tuple(json.loads(row["base"])), cand=tuple(json.loads(row["cand"])), paired=bool(row["paired"]), verdict=row["verdict"],
    )  # fmt: skip


def _result_of(row: sqlite3.Row, metrics: Sequence[Metric]) -> Result:
    same = ("digest", "kind", "created", "source", "machine", "machine_name", "branch", "base_label", "base_commit", "label", "verdict")
    fields: dict[str, Any] = {name: row[name] for name in same}
    return Result(**fields, commit=row["commit_id"], metrics=tuple(metrics))


@contextlib.contextmanager
def _open(db: Path, *, create: bool) -> Iterator[sqlite3.Connection]:
    """Give a connection inside one transaction: what fails in it changes nothing."""
    if not create and not db.exists():
        raise BadInput(f"{db}: there is no such history; `mlsys gate history add FILE --db {db}` begins one")
    connection = None
    try:
        db.parent.mkdir(parents=True, exist_ok=True) if create else None
        mode = "rwc" if create else "rw"  # where the file may not be written, rw reads it all the same
        connection = sqlite3.connect(f"{db.resolve().as_uri()}?mode={mode}", timeout=WAIT_S, isolation_level=None, uri=True)
        connection.row_factory = sqlite3.Row
        connection.execute("BEGIN IMMEDIATE" if create else "BEGIN")
        _check(db, connection, create)
        yield connection
        connection.execute("COMMIT")
    except sqlite3.DatabaseError as error:
        raise BadInput(f"{db}: {_said(error)}") from error
    except OSError as error:
        raise BadInput(f"{db}: cannot be opened: {error.strerror or error}") from error
    finally:
        if connection is not None:
            connection.close()  # what was not committed is undone


def _check(db: Path, connection: sqlite3.Connection, create: bool) -> None:
    """Raise for a file that is not ours or newer than this program; make the tables in an empty one."""
    (application,), (schema,) = (connection.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version"))
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == 0 and schema == 0 and tables == 0:
        if not create:
            raise BadInput(f"{db}: is empty; `mlsys gate history add FILE --db {db}` puts a result in")
        for statement in _TABLES.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA application_id = {APPLICATION}")
        connection.execute(f"PRAGMA user_version = {SCHEMA}")
    elif application != APPLICATION:
        raise BadInput(f"{db}: is an SQLite database of another program; nothing was changed: name another file with --db")
    elif schema > SCHEMA:
        raise BadInput(
            f"{db}: was made by a newer mlsys (its schema is {schema}, this one knows {SCHEMA}); nothing was changed: update mlsys"
        )


def _said(error: sqlite3.DatabaseError) -> str:
    text = str(error)
    if "not a database" in text:
        return "is no SQLite database; nothing was changed: name another file with --db"
    if "malformed" in text:
        return f"is damaged ({text}); nothing was changed: restore a copy, or begin a new one with --db"
    if "locked" in text:
        return f"is in use by another program for longer than {WAIT_S:g} s; try again"
    return f"cannot be used: {text}"


# ---------------------------------------------------------------- figures of a metric


def log_ratios(metric: Metric) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the log ratio of each pair of launches, + is more; one of the two means where they ran apart; none where there is none."""
    if not metric.base or not metric.cand or min(*metric.base, *metric.cand) <= 0:
        return np.array([])
    base, cand = np.log(metric.base), np.log(metric.cand)
    return cand - base if metric.paired else np.array([cand.mean() - base.mean()])


def middle(metric: Metric) -> float:
    """Return the candidate's figure: the geometric mean of its launches, or the mean where one is not above zero."""
    if min(metric.cand) > 0:
        return math.exp(float(np.mean(np.log(metric.cand))))
    return float(np.mean(metric.cand))
