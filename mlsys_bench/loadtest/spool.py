"""The file a worker writes while it runs: one short binary row per request, so that what was measured survives whatever comes next.

A row is its length and a msgpack array in the order of `Row`; a last row that was cut off is left out when the file is read.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

import msgspec

from mlsys_bench.types import Outcome, RequestRecord

_length = struct.Struct("<I")


class Row(msgspec.Struct, array_like=True, gc=False):
    """A `RequestRecord`, cheap to make: a frozen dataclass takes three times as long."""

    index: int
    scheduled_s: float
    sent_s: float | None
    headers_s: float | None
    token_s: tuple[float, ...]
    tokens_per_event: tuple[int, ...]
    done_s: float | None
    prompt_tokens: int | None
    output_tokens: int | None
    token_source: Literal["usage", "chunks", "tokenizer", "simulated"] | None
    outcome: Outcome
    http_status: int | None
    attempt: int
    tenant: str | None
    session: str | None
    stage_s: dict[str, float]
    in_window: bool


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Row).decode


def encode(row: Row) -> bytes:
    """Return a row as bytes."""
    data = _encode(row)
    return _length.pack(len(data)) + data


def read(path: Path) -> list[RequestRecord]:
    """Return the records of a file, in order of their index."""
    data = memoryview(path.read_bytes())
    rows, at = [], 0
    while at + 4 <= len(data):
        end = at + 4 + _length.unpack_from(data, at)[0]
        if end > len(data):
            break
        rows.append(_decode(data[at + 4 : end]))
        at = end
    return [_record(row) for row in sorted(rows, key=lambda r: r.index)]


def _record(row: Row) -> RequestRecord:
    return RequestRecord(
        index=row.index,
        scheduled_s=row.scheduled_s,
        sent_s=row.sent_s,
        headers_s=row.headers_s,
        token_s=row.token_s,
        tokens_per_event=row.tokens_per_event,
        done_s=row.done_s,
        prompt_tokens=row.prompt_tokens,
        output_tokens=row.output_tokens,
        token_source=row.token_source,
        outcome=row.outcome,
        http_status=row.http_status,
        attempt=row.attempt,
        tenant=row.tenant,
        session=row.session,
        stage_s=row.stage_s,
        in_window=row.in_window,
    )
