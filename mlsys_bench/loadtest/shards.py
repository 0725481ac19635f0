"""What workers wrote down -> the requests of one run.  Each worker has a file of its own (a shard); see `spool`."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import spool
from mlsys_bench.types import RequestRecord


def files(requests_file: Path | None, shares: int) -> list[Path]:
    """Return the files that records go to while the run lasts, beside the final one.  Raises BadInput where none can be written."""
    if requests_file is None:
        return [_temporary() for _ in range(shares)]
    parts = [""] if shares == 1 else [f".{share}" for share in range(shares)]
    found = [requests_file.with_name(f".{requests_file.name}.{os.getpid()}{part}.jsonl") for part in parts]
    try:
        requests_file.parent.mkdir(parents=True, exist_ok=True)
        for path in found:
            path.touch()
    except OSError as error:
        raise BadInput(f"{requests_file}: cannot be written: {error.strerror or error}") from error
    return found


def remove(paths: Sequence[Path]) -> None:
    """Remove shards that were joined, or never filled."""
    for path in paths:
        path.unlink(missing_ok=True)


def read_rows(rows: Path) -> list[RequestRecord]:
    """Return the records a worker wrote, in order; a last row that was cut off is left out."""
    with _without_collector():
        return spool.read(rows)


def join(shards: Sequence[Sequence[RequestRecord]]) -> tuple[RequestRecord, ...]:
    """Return the requests of all shards in the order of the one schedule."""
    return tuple(sorted((record for shard in shards for record in shard), key=_index))


def missing(records: Sequence[RequestRecord], scheduled_s: Sequence[float], before_s: float) -> int:
    """Return how many arrivals due before a moment nobody has a record of."""
    due = np.flatnonzero(np.asarray(scheduled_s) < before_s)
    return len(np.setdiff1d(due, np.fromiter((r.index for r in records), dtype=int, count=len(records))))


def _index(record: RequestRecord) -> int:
    return record.index


def _temporary() -> Path:
    handle, name = tempfile.mkstemp(prefix="mlsys-loadtest-", suffix=".jsonl")
    os.close(handle)
    return Path(name)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the collector from walking through every record already read, again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
