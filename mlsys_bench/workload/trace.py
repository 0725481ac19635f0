"""Traffic read from a trace: a CSV with one request per line."""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlsys_bench import stats
from mlsys_bench.errors import BadInput
from mlsys_bench.types import Lengths, Provenance, Workload
from mlsys_bench.workload.draw import Floats, Ints

_TIME_COLUMNS = ("TIMESTAMP", "timestamp_ms", "timestamp_s", "timestamp", "arrival_s", "arrived_at", "arrival_time", "time_s", "time")
_PROMPT_COLUMNS = ("ContextTokens", "input_length", "prompt_tokens", "num_prefill_tokens", "input_tokens", "prompt_len")
_OUTPUT_COLUMNS = ("GeneratedTokens", "output_length", "output_tokens", "num_decode_tokens", "completion_tokens", "output_len")
DISPERSION_WINDOWS_S = (1.0, 10.0, 60.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSummary:
    """Token counts of a trace."""

    mean: float
    cv: float
    p50: float
    p90: float
    p99: float
    max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficSummary:
    """What a trace shows.  `dispersion` is variance / mean of the counts in windows of so many seconds; 1 for a Poisson process."""

    requests: int
    duration_s: float
    rate_per_s: float
    gap_scv: float
    dispersion: dict[str, float]
    prompt_tokens: LengthSummary
    output_tokens: LengthSummary


def from_csv(
    path: Path, *, time_column: str | None = None, prompt_column: str | None = None, output_column: str | None = None
) -> tuple[Workload, TrafficSummary]:
    """Return the workload of a trace, and what the trace shows.  Azure's and Mooncake's columns are recognised, others can be named.

    The workload keeps rate, SCV of gaps (as a gamma law) and mean, CV and maximum of the lengths (as lognormal laws); what laws
    cannot keep (bursts longer than a gap, the dispersion) stands in the summary.  Times: ISO 8601, seconds, or milliseconds when
    the column's name ends in _ms.
    """
    times_s, prompts, outputs = read_trace(path, time_column=time_column, prompt_column=prompt_column, output_column=output_column)
    summary = summarise_trace(times_s, prompts, outputs)
    if not summary.rate_per_s > 0 or not math.isfinite(summary.rate_per_s):
        raise BadInput(f"{path}: all requests arrive at the same time; a rate needs a trace that lasts")
    workload = Workload(
        rate_per_s=summary.rate_per_s,
        arrivals="constant" if summary.gap_scv < 1e-6 else f"gamma:{math.sqrt(summary.gap_scv):.4g}",
        prompt_tokens=_law_of(summary.prompt_tokens),
        output_tokens=_law_of(summary.output_tokens),
        provenance=Provenance.MEASURED,
        source=f"{path.name}: {summary.requests:,} requests in {summary.duration_s:,.0f} s",
    )
    return workload, summary


def read_trace(
    path: Path, *, time_column: str | None = None, prompt_column: str | None = None, output_column: str | None = None
) -> tuple[Floats, Ints, Ints]:
    """Return arrival times (seconds, from the first request, in order), prompt and output tokens of a CSV trace.  Raises BadInput."""
    columns, rows = _read_csv(path)
    wanted = (
        _column(path, columns, time_column, _TIME_COLUMNS, "time"),
        _column(path, columns, prompt_column, _PROMPT_COLUMNS, "prompt"),
        _column(path, columns, output_column, _OUTPUT_COLUMNS, "output"),
    )
    if len(rows) < 2:
        raise BadInput(f"{path}: {len(rows)} request(s); traffic needs at least two")
    times_s = np.array([_time_s(path, i, row[wanted[0]], wanted[0]) for i, row in enumerate(rows, 2)])
    prompts, outputs = (np.array([_tokens(path, i, row[c], c) for i, row in enumerate(rows, 2)], dtype=np.int64) for c in wanted[1:])
    order = np.argsort(times_s, kind="stable")
    return times_s[order] - times_s[order[0]], prompts[order], outputs[order]


def summarise_trace(times_s: Floats, prompts: Ints, outputs: Ints) -> TrafficSummary:
    """Return what these requests show; windows that fit in fewer than twice are left out of `dispersion`."""
    duration_s = float(times_s[-1] - times_s[0])
    return TrafficSummary(
        requests=len(times_s),
        duration_s=duration_s,
        rate_per_s=(len(times_s) - 1) / duration_s if duration_s > 0 else math.inf,
        gap_scv=stats.scv(np.diff(times_s)) if duration_s > 0 else 0.0,
        dispersion={f"{w:g}s": stats.index_of_dispersion(times_s, w) for w in DISPERSION_WINDOWS_S if duration_s >= 2 * w},
        prompt_tokens=_summarise_lengths(prompts),
        output_tokens=_summarise_lengths(outputs),
    )


def _summarise_lengths(tokens: Ints) -> LengthSummary:
    values = tokens.astype(float)
    p50, p90, p99 = (stats.quantile(values, p) for p in (0.5, 0.9, 0.99))
    return LengthSummary(mean=float(values.mean()), cv=math.sqrt(stats.scv(values)), p50=p50, p90=p90, p99=p99, max=int(tokens.max()))


def _law_of(seen: LengthSummary) -> Lengths:
    """Return the lognormal law that has the trace's mean and CV before it is cut at the trace's maximum."""
    if seen.cv < 1e-9:
        return Lengths(mean=max(seen.mean, 1.0), max=seen.max)
    return Lengths(dist="lognormal", mean=max(seen.mean, 1.0), cv=seen.cv, max=max(seen.max, 1))


def _read_csv(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns, rows = list(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise BadInput(f"{path}: cannot be read as CSV: {getattr(error, 'strerror', None) or error}") from error
    if not columns:
        raise BadInput(f"{path}: is empty; a trace has a header line and one line per request")
    return columns, rows


def _column(path: Path, columns: Sequence[str], named: str | None, known: Sequence[str], what: str) -> str:
    present = {c.strip().lower(): c for c in columns}
    for candidate in [named] if named else known:
        if candidate.lower() in present:
            return present[candidate.lower()]
    missing = f"no column {named!r}" if named else f"no column of {what} that is known ({', '.join(known[:3])}, …)"
    raise BadInput(f"{path}: {missing}; it has {', '.join(columns)}; name one with --{what}-column")


def _time_s(path: Path, line: int, text: str | None, column: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = _iso_s(text or "")
    if not math.isfinite(value):
        raise BadInput(f"{path}: line {line}: {column} is {text!r}; write seconds or a date like 2023-11-16 18:15:46.68")
    return value / 1000 if column.lower().endswith("_ms") else value


def _iso_s(text: str) -> float:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _tokens(path: Path, line: int, text: str | None, column: str) -> int:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0 and value == int(value)):
        raise BadInput(f"{path}: line {line}: {column} is {text!r}; a number of tokens is needed")
    return int(value)
