"""Requests as a CSV table, one row each, with the latencies that reports are made of; stamps of single tokens stay in the Parquet file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mlsys_bench import record, summary
from mlsys_bench.types import RequestRecord, Requests

COLUMNS = (
    "index", "tenant", "session", "in_window", "outcome", "http_status", "attempt", "scheduled_s", "sent_s", "headers_s", "first_token_s",
    "last_token_s", "done_s", "events", "prompt_tokens", "output_tokens", "token_source", "ttft_s", "tpot_s", "e2e_s", "service_s",
    "lateness_s",
)  # fmt: skip


def write_csv(path: Path, requests: Requests) -> Path:
    """Write one row a request, times in seconds since the run's start, and return the path.  Raises RecordError."""
    return record.write_csv(path, COLUMNS, (tuple(_row(r)) for r in requests.requests))


def _row(r: RequestRecord) -> Iterator[object]:
    yield from (r.index, r.tenant, r.session, r.in_window, r.outcome, r.http_status, r.attempt, r.scheduled_s, r.sent_s, r.headers_s)
    yield from (r.token_s[0], r.token_s[-1]) if r.token_s else (None, None)
    yield from (r.done_s, len(r.token_s), r.prompt_tokens, r.output_tokens, r.token_source)
    yield from (_exact(of(r)) for of in (summary.ttft_s, summary.tpot_s, summary.e2e_s, summary.service_s, summary.lateness_s))


def _exact(value: float | None) -> float | None:
    """Return a difference of stamps to the nanosecond: what is beyond is rounding."""
    return None if value is None else round(value, 9)
