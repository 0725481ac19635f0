"""Files of one request per row, read as a stream: CSV, JSON lines, Parquet."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mlsys_bench.errors import BadInput

_HEAD = 1000  # objects whose keys are the columns: a first request without a session must not hide that others have one


@dataclass(slots=True)
class Table:
    """A file as columns and a stream of rows: line number and the values of the columns asked for.  Closed at the end of a `with` block."""

    columns: list[str]
    rows: Callable[[list[str]], Iterator[tuple[int, Sequence[Any]]]]
    close: Callable[[], None] = lambda: None

    def __enter__(self) -> Table:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def opened(path: Path) -> Table:
    """Return a CSV, JSON lines or Parquet file, known by how it begins.  Raises BadInput."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror or error}") from error
    if start[:4] == b"PAR1":
        return _parquet(path)
    if start[:2] == b"\x1f\x8b":
        raise BadInput(f"{path}: is compressed; unpack it first: gunzip -k {path.name}")
    first = start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
    if first == b"[":
        raise BadInput(f"{path}: is one JSON array; a trace has one JSON object per line: jq -c '.[]' {path.name}")
    if first == b"{":
        return _json_lines(path)
    return _csv(path)


def _csv(path: Path) -> Table:
    file = path.open(newline="", encoding="utf-8-sig")
    reader = csv.reader(file)
    try:
        columns = next(reader, [])
    except (UnicodeDecodeError, csv.Error) as error:
        file.close()
        raise BadInput(f"{path}: cannot be read as CSV: {error}") from error
    if not columns:
        file.close()
        raise BadInput(f"{path}: is empty; a trace has a header line and one line per request")

    def rows(names: list[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        at = [columns.index(name) for name in names]
        try:
            for row in reader:
                if not row:
                    continue
                if len(row) < len(columns) or any(row[len(columns) :]):
                    odd = f"has {len(row)} fields where the header has {len(columns)}"
                    cause = "was the file cut off?" if len(row) < len(columns) else "is there a comma inside a number?"
                    raise BadInput(f"{path}: line {reader.line_num}: {odd}; {cause}")
                yield reader.line_num, [row[i] for i in at]
        except (UnicodeDecodeError, csv.Error) as error:
            raise BadInput(f"{path}: line {reader.line_num}: cannot be read as CSV: {error}") from error

    return Table(columns, rows, file.close)


def _json_lines(path: Path) -> Table:
    file = path.open(encoding="utf-8-sig")

    def parsed() -> Iterator[tuple[int, dict[str, Any]]]:
        for number, text in enumerate(_lines(file, path), 1):
            if text.strip():
                try:
                    row = json.loads(text)
                except (ValueError, RecursionError) as error:
                    wanted = "a trace has one JSON object per line, with columns of time, prompt and output"
                    raise BadInput(f"{path}: line {number}: is not JSON ({error}); {wanted}") from error
                if not isinstance(row, dict):
                    raise BadInput(f"{path}: line {number}: holds no object; a trace has one JSON object per request")
                yield number, row

    stream = parsed()
    try:
        head = list(itertools.islice(stream, _HEAD))
    except BadInput:
        file.close()
        raise

    def rows(names: list[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        for number, row in itertools.chain(head, stream):
            yield number, [row.get(name) for name in names]

    return Table(list(dict.fromkeys(name for _, row in head for name in row)), rows, file.close)


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    try:
        yield from file
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: is no UTF-8 text: {error}") from error


def _parquet(path: Path) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path}: is not Parquet, or was cut off: {error}") from error

    def rows(names: list[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        number = 0
        try:
            for batch in file.iter_batches(batch_size=10_000, columns=names):
                for row in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
                    number += 1
                    yield number, row
        except (pa.ArrowInvalid, OSError) as error:
            raise BadInput(f"{path}: row {number + 1}: is damaged: {error}") from error

    return Table(list(file.schema_arrow.names), rows, file.close)
