"""Traffic read from a trace: one request per row of a CSV, of JSON lines, or of our own requests file.

Known by their columns: Azure (TIMESTAMP, ContextTokens, GeneratedTokens), Mooncake (timestamp in ms, input_length, output_length, mostly
with hash_ids of 512-token blocks), Qwen-Bailian (chat_id, parent_chat_id, hash_ids of 16-token blocks), BurstGPT (Timestamp, Request
tokens, Response tokens) and the requests of a load test or a simulation.  Of any other the columns are named.  Rows are read one by one
into arrays: a million requests take their arrays and no more.
"""

from __future__ import annotations

import array
import dataclasses
import datetime
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlsys_bench import record, units
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.workload.rows import opened
from mlsys_bench.workload.schedule import Floats, Ints, Labels, Schedule, scaled_to_rate, sliced, sped_up, take

KNOWN = {
    "time": ("TIMESTAMP", "timestamp_ms", "timestamp_s", "scheduled_s", "arrival_s", "arrived_at", "arrival_time", "time_s", "time"),
    "prompt": ("ContextTokens", "input_length", "prompt_tokens", "num_prefill_tokens", "input_tokens", "prompt_len", "Request tokens"),
    "output": (
        "GeneratedTokens", "output_length", "output_tokens", "num_decode_tokens", "completion_tokens", "output_len", "Response tokens"),
    "hash": ("hash_ids",),
    "session": ("session_id", "session", "Session ID", "conversation_id"),
    "tenant": ("tenant",),
    "attempt": ("attempt",),
    "gap": ("gap_s",),
}  # fmt: skip
NEEDED = ("time", "prompt", "output")
TIME_UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
EPOCH_S = (1e9, 4.1e9)  # Unix times of 2001 to 2099: as such a time in milliseconds or finer, a number is unmistakable
_NONE = (None, "", -1, "-1")
_MOST_TOKENS = 2**31  # of a request: more is no length, and would overflow where lengths are added up
_BLOCKS = (16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """A trace as it was read: its requests, and when the first came (Unix time, where the file says)."""

    schedule: Schedule
    start_unix_s: float | None


def from_trace(
    path: Path,
    *,
    columns: dict[str, str] | None = None,
    time_unit: str | None = None,
    block_tokens: int | None = None,
    start_s: float = 0.0,
    end_s: float | None = None,
    speed: float = 1.0,
    rate_per_s: float | None = None,
) -> Schedule:
    """Return the requests of a trace: those due in [start, end) of it, sped up, or stretched to a rate.  Raises BadInput.

    `columns` names columns that are not known by themselves: time, prompt, output, hash, session, tenant; None: nobody can name them here.
    """
    plan = read(path, columns=columns, time_unit=time_unit, block_tokens=block_tokens).schedule
    return cut(plan, str(path), start_s=start_s, end_s=end_s, speed=speed, rate_per_s=rate_per_s)


def cut(
    plan: Schedule, where: str, *, start_s: float = 0.0, end_s: float | None = None, speed: float = 1.0, rate_per_s: float | None = None
) -> Schedule:
    """Return the requests of a trace that are due in [start, end), sped up, or stretched to a rate.  Raises BadInput where none is left."""
    if start_s < 0 or (end_s is not None and end_s <= start_s):
        until = "" if end_s is None else f" to {end_s:g} s"
        raise BadInput(f"{where}: nothing of a trace lies from {start_s:g} s on{until}; its times count from 0, the end after the start")
    if start_s > 0 or end_s is not None:
        plan = sliced(plan, start_s, math.inf if end_s is None else end_s)
        if len(plan) < 2:
            raise BadInput(f"{where}: {len(plan)} request(s) are left from {start_s:g} s on{f' to {end_s:g} s' if end_s else ''}")
    plan = sped_up(plan, speed)
    return plan if rate_per_s is None else scaled_to_rate(plan, rate_per_s)


def read(path: Path, *, columns: dict[str, str] | None = None, time_unit: str | None = None, block_tokens: int | None = None) -> Trace:
    """Return what a file of requests holds, in order of arrival, times counted from the first.  Raises BadInput."""
    with opened(path) as table:
        names = _names(path, table.columns, columns)
        scale = _time_scale(path, names["time"], table.columns, time_unit)
        rows = _Rows(path=path, names=names, like_mooncake=_like_mooncake(names))
        for line, values in table.rows(list(names.values())):
            rows.add(line, values)
    return _trace(rows, rows.guessed_scale() if scale is None else scale, block_tokens, has_options=columns is not None)


# ---------------------------------------------------------------- columns


def _names(path: Path, columns: Sequence[str], asked: dict[str, str] | None) -> dict[str, str]:
    """Return which column holds what; what a trace may lack is left out.  `asked` None: whoever asks has no options to name columns by."""
    named = asked or {}
    present = {c.strip().lower(): c for c in columns}
    found: dict[str, str] = {}
    for what, known in KNOWN.items():
        for candidate in [named[what]] if what in named else known:
            if candidate.strip().lower() in present:
                found[what] = present[candidate.strip().lower()]
                break
        else:
            if what in named:
                raise BadInput(f"{path}: no column {named[what]!r}; it has {', '.join(columns)}; name one with --{what}-column")
            if what in NEEDED:
                few = f"no column of {what} that is known ({', '.join(known[:3])}, …)"
                now = f"name one with --{what}-column" if asked is not None else f"call it {known[0]} in the file's header"
                raise BadInput(f"{path}: {few}; it has {', '.join(columns)}; {now}")
    if {"chat_id", "parent_chat_id"} <= present.keys() and "session" not in named:
        found |= {"session": present["chat_id"], "parent": present["parent_chat_id"]}
    for name in found.values():
        if (count := sum(c.strip().lower() == name.strip().lower() for c in columns)) > 1:
            raise BadInput(f"{path}: {count} columns are called {name.strip()}; leave one of them")
    return found


def _time_scale(path: Path, column: str, columns: Sequence[str], unit: str | None) -> float | None:
    """Return the seconds of one unit of the time column, as an option, the end of its name or Mooncake's hashes say; else None."""
    if unit is not None:
        if unit not in TIME_UNITS:
            raise BadInput(f"{path}: times in {unit!r}; write s, ms, us or ns{did_you_mean(unit, TIME_UNITS)}")
        return TIME_UNITS[unit]
    suffix = column.lower().rpartition("_")[2]
    if suffix in TIME_UNITS:
        return TIME_UNITS[suffix]
    is_mooncake = column.lower() == "timestamp" and "hash_ids" in columns and "chat_id" not in columns
    return 1e-3 if is_mooncake else None


def _like_mooncake(names: dict[str, str]) -> bool:
    """Say whether columns are called as in Mooncake's traces, which are often passed on without their hashes."""
    return [names[what].lower() for what in NEEDED] == ["timestamp", "input_length", "output_length"] and "parent" not in names


# ---------------------------------------------------------------- rows


@dataclass(slots=True)
class _Rows:
    """The columns of a trace while it is read."""

    path: Path
    names: dict[str, str]
    like_mooncake: bool = False
    time: array.array[float] = field(default_factory=lambda: array.array("d"))
    prompt: array.array[int] = field(default_factory=lambda: array.array("q"))
    output: array.array[int] = field(default_factory=lambda: array.array("q"))
    counts: array.array[int] = field(default_factory=lambda: array.array("q"))
    hashes: array.array[int] = field(default_factory=lambda: array.array("q"))
    session: array.array[int] = field(default_factory=lambda: array.array("i"))
    tenant: array.array[int] = field(default_factory=lambda: array.array("i"))
    sessions: dict[str, int] = field(default_factory=dict)
    gap: array.array[float] = field(default_factory=lambda: array.array("d"))
    begun: int = 0  # sessions
    tenants: dict[str, int] = field(default_factory=dict)
    has_dates: bool = False
    has_numbers: bool = False
    without_tokens: int = 0
    retries: int = 0
    epoch: str | None = None  # the unit of its times, where they turned out to count from 1970 in it
    counts_ms: bool = False  # its times were taken for milliseconds by the names of its columns

    def guessed_scale(self) -> float:
        """Return the seconds of one unit of the times: 1, or less where that makes them Unix times of this century, or of Mooncake.

        Its milliseconds are whole numbers; what has fractions, is a date or counts seconds from 1970 on is not of it.
        """
        first = next((t for t in self.time if not math.isnan(t)), 0.0)
        for name, scale in TIME_UNITS.items():
            if not self.has_dates and name != "s" and EPOCH_S[0] <= first * scale <= EPOCH_S[1]:
                self.epoch = name
                return scale
        whole = not self.has_dates and first < EPOCH_S[0] and all(t == math.floor(t) for t in self.time if not math.isnan(t))
        self.counts_ms = self.like_mooncake and whole
        return 1e-3 if self.counts_ms else 1.0

    def add(self, line: int, values: Sequence[Any]) -> None:
        """Take one row in.  A retry is no arrival, a request without tokens (it failed) has no length: both are counted and left out."""
        row = dict(zip(self.names, values, strict=True))
        if row.get("attempt") not in (None, "", 1, "1"):
            self.retries += 1
            return
        waits = row.get("gap") not in _NONE and row["time"] in _NONE  # for the answer before it
        at_s = math.nan if waits else self._time(line, row["time"])
        prompt, output = self._tokens(line, "prompt", row["prompt"]), self._tokens(line, "output", row["output"])
        if not prompt or not output:
            self.without_tokens += 1
            return
        self.time.append(at_s)
        self.prompt.append(prompt)
        self.output.append(output)
        if "hash" in row:
            self._add_hashes(line, row["hash"])
        if "session" in row:
            self._add_session(row["session"], row.get("parent"))
        if "gap" in row:
            self.gap.append(0.0 if row["gap"] in _NONE else self._gap(line, row["gap"]))
        if "tenant" in row and row["tenant"] is not None:
            self.tenant.append(self.tenants.setdefault(str(row["tenant"]), len(self.tenants)))

    def _time(self, line: int, given: object) -> float:
        try:
            value = float(given)  # type: ignore[arg-type]
            is_date = False
        except (TypeError, ValueError):
            value = _iso_s(str(given))
            is_date = True
        column = self.names["time"]
        if not math.isfinite(value):
            raise BadInput(f"{self.path}: line {line}: {column} is {given!r}; write seconds or a date like 2023-11-16 18:15:46.68")
        if self.has_numbers if is_date else self.has_dates:
            kinds = ("a date", "numbers") if is_date else ("a number", "dates")
            raise BadInput(
                f"{self.path}: line {line}: {column} is {given!r}, {kinds[0]}, and above it stand {kinds[1]}; write one of the two"
            )
        self.has_dates, self.has_numbers = is_date, not is_date
        return value

    def _gap(self, line: int, given: object) -> float:
        """Return the seconds between an answer and the next request of its session."""
        try:
            value = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = math.nan
        if not 0 <= value < math.inf:
            raise BadInput(
                f"{self.path}: line {line}: {self.names['gap']} is {given!r}; write the seconds waited after the answer, from 0 up"
            )
        return value

    def _tokens(self, line: int, what: str, given: object) -> int:
        if given is None or given == "":
            return 0
        try:
            value = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            value = math.nan
        if not (0 <= value < _MOST_TOKENS and value == int(value)) or isinstance(given, bool):
            raise BadInput(f"{self.path}: line {line}: {self.names[what]} is {given!r}; a number of tokens is needed")
        return int(value)

    def _add_hashes(self, line: int, given: object) -> None:
        parts = given if isinstance(given, list) else str(given or "").replace(",", " ").strip("[] ").split()
        before = len(self.hashes)
        try:
            self.hashes.extend(map(int, parts))
        except (ValueError, OverflowError):
            del self.hashes[before:]
            self.hashes.extend(_number_of(str(part)) for part in parts)
        self.counts.append(len(parts))

    def _add_session(self, own: object, parent: object) -> None:
        """Put the request into its session, numbered as they begin; a chat that has a parent belongs to its parent's."""
        number = None if own in _NONE else self.sessions.get(str(own), self.sessions.get(str(parent)))
        if number is None:
            number, self.begun = self.begun, self.begun + 1
        if own not in _NONE:
            self.sessions[str(own)] = number
        self.session.append(number)


def _iso_s(text: str) -> float:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return math.nan
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _number_of(text: str) -> int:
    """Return 63 bits that stand for a hash written as text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _trace(rows: _Rows, scale: float, block_tokens: int | None, *, has_options: bool) -> Trace:
    n = len(rows.time)
    if n < 2:
        left_out = f" ({rows.without_tokens} without tokens left out)" if rows.without_tokens else ""
        raise BadInput(f"{rows.path}: {n} request(s){left_out}; traffic needs at least two")
    times_s = np.frombuffer(rows.time) * (1.0 if rows.has_dates else scale)
    session = np.frombuffer(rows.session, dtype=np.int32) if rows.begun < len(rows.session) else None
    start_s = _starts(rows, times_s, session)
    order = np.argsort(start_s, kind="stable")
    waits = bool(np.isnan(times_s).any())
    plan = Schedule(
        scheduled_s=times_s - start_s[order[0]],
        prompt_tokens=np.frombuffer(rows.prompt, dtype=np.int64),
        output_tokens=np.frombuffer(rows.output, dtype=np.int64),
        prefix_offsets=np.concatenate([[0], np.cumsum(np.frombuffer(rows.counts, dtype=np.int64))]) if len(rows.counts) else None,
        prefix_hashes=np.frombuffer(rows.hashes, dtype=np.int64) if len(rows.counts) else None,
        prefix_block_tokens=_block_tokens(rows, block_tokens, has_options=has_options) if len(rows.counts) else 0,
        tenant=np.frombuffer(rows.tenant, dtype=np.int32) if len(rows.tenant) == n else None,
        tenants=tuple(rows.tenants) if len(rows.tenant) == n else (),
        session=session,
        turn=None if session is None else _turns(session, order),
        gap_s=np.frombuffer(rows.gap) if waits else None,
    )
    first_s = float(start_s[order[0]])
    plan = dataclasses.replace(plan, notes=_notes(rows, plan))
    return Trace(
        schedule=plan if (np.diff(order) == 1).all() else take(plan, order),
        start_unix_s=first_s if rows.has_dates or first_s > 1e9 else None,
    )


def _starts(rows: _Rows, times_s: Floats, session: Labels | None) -> Floats:
    """Return when each request is due, or the first of its session where it waits for an answer.  Raises BadInput where none is."""
    if not np.isnan(times_s).any():
        return times_s
    if session is None:
        raise BadInput(f"{rows.path}: a request with gap_s and without a time follows one of its session; name it with --session-column")
    first = np.full(rows.begun, np.nan)
    first[session[::-1]] = times_s[::-1]  # the first row of each session is set last
    if np.isnan(first).any():
        raise BadInput(f"{rows.path}: the first request of a session has no time")
    return np.asarray(np.where(np.isnan(times_s), first[session], times_s))


def write(plan: Schedule, path: Path) -> Path:
    """Write requests as a trace that `read` gives back: a CSV with what the schedule has of prefixes, sessions and tenants."""
    columns: dict[str, Iterable[Any]] = {
        "time_s": ("" if math.isnan(t) else f"{t:.6f}" for t in plan.scheduled_s.tolist()),
        "input_tokens": plan.prompt_tokens.tolist(),
        "output_tokens": plan.output_tokens.tolist(),
    }
    if plan.prefix_offsets is not None and plan.prefix_hashes is not None:
        ends = itertools.pairwise(plan.prefix_offsets.tolist())
        columns["hash_ids"] = (" ".join(map(str, plan.prefix_hashes[a:b].tolist())) for a, b in ends)
    if plan.session is not None:
        columns["session_id"] = plan.session.tolist()
    if plan.gap_s is not None:
        columns["gap_s"] = (f"{gap:.6f}" for gap in plan.gap_s.tolist())
    if plan.tenant is not None:
        columns["tenant"] = (plan.tenants[t] for t in plan.tenant.tolist())
    lines = (",".join(map(str, row)) for row in zip(*columns.values(), strict=True))
    return record.write_text(path, "\n".join([",".join(columns), *lines, ""]))


def _turns(session: Labels, order: Ints) -> Labels:
    """Return each request's number within its session, in order of arrival."""
    by_session = order[np.argsort(session[order], kind="stable")]
    starts = np.flatnonzero(np.diff(session[by_session], prepend=-1))
    turn = np.empty(len(session), dtype=np.int32)
    turn[by_session] = np.arange(len(session)) - np.repeat(starts, np.diff(np.append(starts, len(session))))
    return turn


def _block_tokens(rows: _Rows, given: int | None, *, has_options: bool) -> int:
    """Return the block size that makes the number of hashes that of the prompt's blocks.  Raises BadInput."""
    prompts, counts = np.frombuffer(rows.prompt, dtype=np.int64), np.frombuffer(rows.counts, dtype=np.int64)
    if given is not None:
        if (counts > -(-prompts // given)).any():
            raise BadInput(f"{rows.path}: some prompts have more hashes than blocks of {given} tokens; check --block-tokens")
        return given
    for begun in (True, False):  # the last block counts once it is begun, as in Mooncake's trace; or only when it is full
        fits = {b: float(np.mean(counts == (prompts + (b - 1 if begun else 0)) // b)) for b in _BLOCKS}
        best = max(fits, key=lambda b: fits[b])
        if fits[best] >= 0.99:
            return best
    sizes = ", ".join(map(str, _BLOCKS))
    now = "give --block-tokens, e.g. 48" if has_options else "leave that column out, or ask a command that takes --block-tokens"
    raise BadInput(f"{rows.path}: {rows.names['hash']} fits no block size of {sizes} tokens; {now}")


def _notes(rows: _Rows, plan: Schedule) -> tuple[str, ...]:
    notes = []
    if rows.without_tokens:
        notes.append(f"{units.count(rows.without_tokens, 'request')} without prompt or output tokens (failed) left out, also of the rate")
    if rows.retries:
        notes.append(f"{rows.retries:,} retries are left out: they are no arrivals of their own")
    if rows.counts_ms:
        notes.append(f"{rows.names['time']} was taken to count ms, as in Mooncake's traces, whose columns these are")
    if rows.epoch:
        notes.append(f"{rows.names['time']} was taken to count {rows.epoch} from 1970 on")
    grid_s = 0.0 if plan.gap_s is not None else resolution_s(plan.scheduled_s)
    if grid_s > 0.5:
        notes.append(f"arrival times stand on a grid of about {grid_s:.3g} s; what happens within it is not known")
    return tuple(notes)


def resolution_s(times_s: Floats) -> float:
    """Return the typical gap between different arrival times where most requests share theirs with another, else 0."""
    different = np.unique(times_s)
    if len(different) < 2 or len(different) > 0.5 * len(times_s):
        return 0.0
    return float(np.median(np.diff(different)))
