"""What the processes of a run over several hosts say to each other: parent and master, master and workers, a worker and its parent.

Parent and child speak JSON lines.  Master and workers speak Locust's custom messages (msgpack over ZMQ), named here.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from mlsys_bench.loadtest import Progress, job
from mlsys_bench.loadtest.clocks import Clock

PROTOCOL = 1  # of the messages below: master and workers must agree
PORT = 5557  # Locust's own

# messages of the workers
HELLO = "mlsys-hello"  # who I am
TIME = "mlsys-time"  # (k, t1) back with t2 and t3
READY = "mlsys-ready"  # connections are open
TOLD = "mlsys-told"  # how it stands, once a second
DONE = "mlsys-done"  # the last word on the load; rows follow
ROWS = "mlsys-rows"  # a piece of the shard, deflated

# messages of the master
ASK_TIME = "mlsys-ask-time"
JOB = "mlsys-job"
START = "mlsys-start"
STOP = "mlsys-stop"
NEXT = "mlsys-next"  # the piece is written, send another
REFUSE = "mlsys-refuse"  # this run has no use for you


@dataclass(frozen=True, slots=True, kw_only=True)
class Orders:
    """What a master is told first: where it listens, for whom it waits, where it writes what workers send."""

    bind: str
    port: int
    expect_workers: int
    rows: list[str]  # one file a worker
    web: tuple[str, int] | None = None
    wait_s: float = 600.0
    grace_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Errand:
    """What a worker on some host is told first: where its master is, which core is its own."""

    host: str
    port: int
    core: int | None
    folder: str  # for the records, until the master has them
    name: str  # of this host, for people
    wait_s: float = 600.0
    headers: list[tuple[str, str]] = field(default_factory=list, repr=False)  # of every request; the master's never travel


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """A worker that reported to the master."""

    host: str
    core: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One line of a master, or of a worker on some host, to its parent."""

    kind: Literal["listening", "web", "joined", "clock", "started", "progress", "lost", "found", "done", "kept", "failed", "beat"]
    share: int = 0
    number: float = 0.0  # a port, or t0 in unix seconds
    text: str = ""
    joined: Joined | None = None
    clock: Clock | None = None
    progress: Progress | None = None
    done: job.Done | None = None


encode = msgspec.json.Encoder().encode
decode_orders = msgspec.json.Decoder(Orders).decode
decode_errand = msgspec.json.Decoder(Errand).decode
decode_word = msgspec.json.Decoder(Word).decode


def say(word: Word) -> None:
    """Write a word to the parent, one line to standard output; where the parent is gone, nobody is left to hear it."""
    with contextlib.suppress(BrokenPipeError):  # what workers measured is kept all the same
        os.write(1, encode(word) + b"\n")
