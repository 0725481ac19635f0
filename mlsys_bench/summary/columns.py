"""Requests as columns: numpy arrays of a whole run, so that a million requests are summarised in seconds and bounded memory.

What a request does not have is NaN.  Stamps of all requests lie flat behind each other; `offsets` says where each request's begin.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import numpy.typing as npt

from mlsys_bench.types import Outcome, RequestRecord

if TYPE_CHECKING:
    import pyarrow as pa

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

OUTCOMES: tuple[str, ...] = get_args(Outcome)
SOURCES = ("usage", "chunks", "tokenizer", "simulated")
NEEDED = (
    "scheduled_s",
    "sent_s",
    "token_s",
    "tokens_per_event",
    "done_s",
    "prompt_tokens",
    "output_tokens",
    "token_source",
    "outcome",
    "tenant",
    "stage_s",
    "in_window",
)  # fmt: skip  of a file of requests


@dataclass(frozen=True, kw_only=True, eq=False)  # no slots: what is derived is kept
class Columns:
    """The requests of a run, in the order of their schedule."""

    scheduled_s: Floats
    sent_s: Floats
    connect_s: Floats  # spent on a connection of its own after it was due
    done_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    in_window: Bools
    outcome: Ints  # index into OUTCOMES
    source: Ints  # index into SOURCES, -1 for none
    tenant: Ints  # index into tenants, -1 for none
    tenants: tuple[str, ...]
    offsets: Ints  # [n + 1], of token_s and tokens
    token_s: Floats  # arrival of each event that carried tokens
    tokens: Ints  # in each event

    def __len__(self) -> int:
        return len(self.scheduled_s)

    def where(self, mask: Bools) -> Columns:
        """Return some of the requests."""
        if mask.all():
            return self
        kept = np.repeat(mask, self.events)
        flat = {"token_s": self.token_s[kept], "tokens": self.tokens[kept], "tenants": self.tenants}
        offsets = np.concatenate([[0], np.cumsum(self.events[mask])])
        rest = (f.name for f in fields(self) if f.name not in (*flat, "offsets"))
        return Columns(**{name: getattr(self, name)[mask] for name in rest}, offsets=offsets, **flat)  # type: ignore[arg-type]

    @functools.cached_property
    def events(self) -> Ints:
        """Events with tokens, by request."""
        return np.diff(self.offsets)

    @property
    def ok(self) -> Bools:
        """Which were answered."""
        answered: Bools = self.outcome == OUTCOMES.index("ok")
        return answered

    @property
    def under_way(self) -> Bools:
        """Which were still on their way when the run was over: they take longer than they had taken by then."""
        waiting: Bools = self.outcome == OUTCOMES.index("unfinished")
        return waiting

    @property
    def told(self) -> Bools:
        """Which have a latency, or a bound of one: those answered, and those still under way."""
        return self.ok | self.under_way

    @functools.cached_property
    def first_s(self) -> Floats:
        """When the first token came; never, in an answer whose first stamp carries none, such as an embedding."""
        found = self._stamp(self.offsets[:-1])
        some = np.flatnonzero(self.events > 0)
        found[some[self.tokens[self.offsets[:-1][some]] == 0]] = np.nan
        return found

    @functools.cached_property
    def last_s(self) -> Floats:
        """When the last token came."""
        return self._stamp(self.offsets[1:] - 1)

    @functools.cached_property
    def first_so_far_s(self) -> Floats:
        """When the first token came; of a request still under way without one, the end of the run, where answers do have tokens."""
        waits = self.under_way & np.isnan(self.first_s)
        return np.where(waits, self.end_s, self.first_s) if (self.ok & ~np.isnan(self.first_s)).any() else self.first_s

    @functools.cached_property
    def last_so_far_s(self) -> Floats:
        """When the last token came; of a request still under way, the end of the run."""
        return np.where(self.under_way, self.end_s, self.last_s)

    def _stamp(self, at: Ints) -> Floats:
        found = np.full(len(self), np.nan)
        some = self.events > 0
        found[some] = self.token_s[at[some]]
        return found

    @functools.cached_property
    def end_s(self) -> Floats:
        """When a request was over, as far as is known."""
        return np.fmax(np.fmax(self.scheduled_s, self.done_s), self.last_s)

    @property
    def lateness_s(self) -> Floats:
        """How late the client itself sent."""
        return self.sent_s - self.scheduled_s - self.connect_s

    @property
    def ttft_s(self) -> Floats:
        """Scheduled send to first token; of a request still under way without one, at least so long."""
        return self.first_so_far_s - self.scheduled_s

    @property
    def e2e_s(self) -> Floats:
        """Scheduled send to last token; of a request still under way, at least so long."""
        return self.last_so_far_s - self.scheduled_s

    @property
    def counted_tokens(self) -> Floats:
        """Output tokens: as said by the answer, else as its events carried."""
        carried = np.add.reduceat(np.append(self.tokens, 0), self.offsets[:-1]) * (self.events > 0) if len(self) else np.zeros(0)
        counted: Floats = np.where(np.isnan(self.output_tokens), carried, self.output_tokens)
        return counted

    @property
    def tpot_s(self) -> Floats:
        """Time per token after the first; NaN for a single token, and for tokens that came all at once."""
        after = self.counted_tokens - 1
        found = np.full(len(self), np.nan)
        np.divide(self.last_s - self._stamp(self.offsets[:-1]), after, out=found, where=(after > 0) & (self.events > 1))
        return found

    @functools.cached_property
    def chunk_gaps_s(self) -> tuple[Floats, Ints]:
        """The gaps between neighbouring events of each request, flat, and how many each request has."""
        inner = self._later
        return np.subtract(self.token_s[1:], self.token_s[:-1])[inner], np.maximum(self.events - 1, 0)

    @functools.cached_property
    def gaps_s(self) -> tuple[Floats, Ints]:
        """The gaps between neighbouring tokens, flat, and how many each request has: k tokens in an event are k gaps of gap / k."""
        gaps, sizes = self.chunk_gaps_s
        if self.one_by_one:
            return gaps, sizes
        tokens = self.tokens[1:][self._later]
        counts = np.bincount(np.repeat(np.arange(len(self)), sizes), tokens, minlength=len(self)).astype(np.int64)
        return np.repeat(gaps / np.maximum(tokens, 1), tokens), counts

    @functools.cached_property
    def one_by_one(self) -> bool:
        """Whether every event carried one token."""
        return bool((self.tokens == 1).all())

    @property
    def _later(self) -> Bools:
        """Which events but the very first are not the first of their request."""
        later = np.ones(max(len(self.token_s) - 1, 0), dtype=bool)
        starts = self.offsets[:-1][self.events > 0]
        later[starts[starts > 0] - 1] = False
        return later


def of(records: Iterable[RequestRecord]) -> Columns:
    """Return records as columns, sorted by their scheduled send."""
    rows = sorted(records, key=lambda r: r.scheduled_s)
    sizes = np.fromiter((len(r.token_s) for r in rows), np.int64, len(rows))
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    tenants = tuple(sorted({r.tenant for r in rows if r.tenant is not None}))
    outcomes, sources, names = _index(OUTCOMES), _index(SOURCES), _index(tenants)
    return Columns(
        scheduled_s=np.fromiter((r.scheduled_s for r in rows), np.float64, len(rows)),
        sent_s=_floats([r.sent_s for r in rows]),
        connect_s=np.fromiter((r.stage_s.get("connect", 0.0) if r.stage_s else 0.0 for r in rows), np.float64, len(rows)),
        done_s=_floats([r.done_s for r in rows]),
        prompt_tokens=_floats([r.prompt_tokens for r in rows]),
        output_tokens=_floats([r.output_tokens for r in rows]),
        in_window=np.fromiter((r.in_window for r in rows), np.bool_, len(rows)),
        outcome=np.fromiter((outcomes[r.outcome] for r in rows), np.int64, len(rows)),
        source=np.fromiter((sources.get(r.token_source, -1) for r in rows), np.int64, len(rows)),
        tenant=np.fromiter((names.get(r.tenant, -1) for r in rows), np.int64, len(rows)),
        tenants=tenants,
        offsets=offsets,
        token_s=np.fromiter(itertools.chain.from_iterable(r.token_s for r in rows), np.float64, int(offsets[-1])),
        tokens=np.fromiter(itertools.chain.from_iterable(r.tokens_per_event for r in rows), np.int64, int(offsets[-1])),
    )


def read(paths: Sequence[Path]) -> Columns:
    """Return the requests of Parquet files, several being shards of one run, without a Python object per request."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    return of_table(pa.concat_tables([pq.read_table(path, columns=list(NEEDED)) for path in paths]))


def of_table(table: pa.Table) -> Columns:
    """Return a table of requests as columns, sorted by their scheduled send."""
    table = table.sort_by("scheduled_s").combine_chunks()
    stamps, counts = (_flat(table, name) for name in ("token_s", "tokens_per_event"))
    tenants = tuple(sorted({name for name in table["tenant"].unique().to_pylist() if name is not None}))
    return Columns(
        **{name: _numbers(table[name]) for name in ("scheduled_s", "sent_s", "done_s", "prompt_tokens", "output_tokens")},
        connect_s=_connects(table),
        in_window=table["in_window"].to_numpy(zero_copy_only=False).astype(bool),
        outcome=_codes(table["outcome"], OUTCOMES),
        source=_codes(table["token_source"], SOURCES),
        tenant=_codes(table["tenant"], tenants),
        tenants=tenants,
        offsets=stamps[0],
        token_s=stamps[1].astype(np.float64),
        tokens=counts[1].astype(np.int64),
    )


def _numbers(column: pa.ChunkedArray) -> Floats:
    import pyarrow as pa

    return np.array(column.cast(pa.float64()).to_numpy(zero_copy_only=False), dtype=np.float64)


def _flat(table: pa.Table, name: str) -> tuple[Ints, npt.NDArray[Any]]:
    """Return where the lists of a column begin, and all their values."""
    import pyarrow.compute as pc

    column = table[name]
    sizes = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return np.concatenate([[0], np.cumsum(sizes)]), pc.list_flatten(column).to_numpy(zero_copy_only=False)


def _codes(column: pa.ChunkedArray, names: Sequence[str]) -> Ints:
    import pyarrow as pa
    import pyarrow.compute as pc

    at = pc.index_in(column, value_set=pa.array(list(names), pa.string()))
    return np.array(pc.fill_null(at, -1).to_numpy(zero_copy_only=False), dtype=np.int64)


def _connects(table: pa.Table) -> Floats:
    """Return the time each request spent on a connection of its own: few have any."""
    import pyarrow.compute as pc

    found = pc.map_lookup(table["stage_s"], "connect", "first")
    return np.array(pc.fill_null(found, 0.0).to_numpy(zero_copy_only=False), dtype=np.float64)


def _floats(values: Sequence[float | None]) -> Floats:
    """Return numbers, NaN for None: numpy's own reading of None."""
    return np.array(values, dtype=np.float64)


def _index(names: Sequence[str]) -> dict[str | None, int]:
    return {name: i for i, name in enumerate(names)}
