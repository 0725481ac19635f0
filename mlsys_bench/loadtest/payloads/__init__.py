"""What requests carry: one `Ask` per row of the schedule.  Pure: the same spec, index and answers give the same words, in every process.

A spec is written by the parent (`written.spec`) and read by workers (`make`).  Large ones travel in a file: `stowed` writes it, `loaded`
reads it back.  `Order` says who waits for whose answer; without sessions nobody does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest.endpoints import Ask

INLINE = 2000  # entries that still travel in the job's line


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What requests carry, as parent and worker agree on it.  Lists go row by row; a closed loop walks through them again and again.

    Rows before `arrivals` arrive by themselves.  A later one waits for the answer to another: `after[r]` is the row that waits for row r,
    -1 where none does, and `gap_s[r]` how long row r waits once that answer is there.
    """

    prompt_chars: list[int]  # of what is new in this row: all of a prompt, or what a turn adds
    output_tokens: list[int]
    seed: int
    block_chars: float = 0.0  # of a block that prompts share
    block_offsets: list[int] = field(default_factory=list)  # row r begins with the blocks [offsets[r], offsets[r + 1])
    blocks: list[int] = field(default_factory=list)
    tenants: list[str] = field(default_factory=list)
    tenant: list[int] = field(default_factory=list)  # of `tenants`
    rank: list[int] = field(default_factory=list)  # who goes first where tenants have priorities: what a request says as its own
    session: list[int] = field(default_factory=list)
    arrivals: int = 0  # 0: all of them
    after: list[int] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    records: list[msgspec.Raw] = field(default_factory=list)  # of a data set, as `dataset.Row`
    images: list[str] = field(default_factory=list)  # data URLs
    image_pixels: tuple[int, int] | None = None  # width and height of images that are made up
    images_each: int = 0
    bulk: str | None = None  # a file that holds the whole spec


class Source(Protocol):
    """Where what is asked comes from."""

    def ask(self, index: int, said: Sequence[str] = ()) -> Ask:
        """Return what request `index` of the whole run asks; `said` are the answers in its session so far, first to last."""
        ...


def make(spec: Spec) -> Source:
    """Return the source of a spec."""
    from mlsys_bench.loadtest.payloads import records, synthetic, talks
    from mlsys_bench.loadtest.payloads.images import WithImages

    given = loaded(spec)
    source: Source = records.Records(given) if given.records else talks.Talks(given) if given.after else synthetic.Synthetic(given)
    source = WithImages(given, source) if given.images_each else source
    return Ranked(given, source) if given.rank else source


class Ranked:
    """Another source's requests, each with the priority of its tenant."""

    def __init__(self, spec: Spec, source: Source) -> None:
        self._source, self._rank = source, spec.rank

    def ask(self, index: int, said: Sequence[str] = ()) -> Ask:
        """Return what request `index` asks."""
        return dataclasses.replace(self._source.ask(index, said), priority=self._rank[index % len(self._rank)])


class Order:
    """Which request comes after which, and whose they are."""

    def __init__(self, spec: Spec) -> None:
        given = loaded(spec)
        self._rows = len(given.output_tokens)
        self._arrivals = given.arrivals or self._rows
        self._after, self._gap_s = given.after, given.gap_s
        self._tenants, self._tenant, self._session = given.tenants, given.tenant, given.session
        self.waits = bool(given.after)

    def first(self, number: int) -> int:
        """Return the index of the request that arrives as number so and so, however often the rows have been walked through."""
        again, row = divmod(number, self._arrivals)
        return again * self._rows + row

    def after(self, index: int) -> tuple[int, float] | None:
        """Return the index of the request that waits for the answer to this one and how long it waits then, or None."""
        if not self.waits:
            return None
        again, row = divmod(index, self._rows)
        following = self._after[row]
        return None if following < 0 else (again * self._rows + following, self._gap_s[following])

    def tenant(self, index: int) -> str | None:
        """Return whose request this is."""
        return self._tenants[self._tenant[index % self._rows]] if self._tenant else None

    def session(self, index: int) -> str | None:
        """Return the session it belongs to; walked through again, it is another."""
        if not self._session:
            return None
        again, row = divmod(index, self._rows)
        return f"{self._session[row]}" if not again else f"{self._session[row]}.{again}"


@contextlib.contextmanager
def stowed(spec: Spec) -> Iterator[Spec]:
    """Give a spec that is small enough for a line: itself, or one that names a file, gone at the end."""
    entries = len(spec.output_tokens) + len(spec.blocks) + 100 * (len(spec.records) + len(spec.images))
    if entries <= INLINE:
        yield spec
        return
    with tempfile.TemporaryDirectory(prefix="mlsys-payload-") as folder:
        path = Path(folder) / "payload.json"
        path.write_bytes(msgspec.json.encode(spec))
        yield Spec(prompt_chars=[], output_tokens=[], seed=spec.seed, bulk=str(path))


def loaded(spec: Spec) -> Spec:
    """Return a spec with all its lists in hand.  Raises BadInput when its file is gone."""
    if spec.bulk is None:
        return spec
    try:
        return msgspec.json.decode(Path(spec.bulk).read_bytes(), type=Spec)
    except (OSError, msgspec.DecodeError) as error:
        raise BadInput(f"{spec.bulk}: what requests carry cannot be read: {error}; was the folder of temporary files emptied?") from error
