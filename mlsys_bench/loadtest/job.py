"""What parent and worker say to each other: one job down, JSON lines up."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec

from mlsys_bench.loadtest import Progress, endpoints, payloads
from mlsys_bench.loadtest.client import Client, Proxy
from mlsys_bench.loadtest.payloads.think import Think


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything the worker needs to know."""

    scheme: Literal["http", "https"]
    host: str  # as in the URL
    address: str  # numeric: no resolver on the way of a request
    port: int
    endpoint: endpoints.Spec
    payload: payloads.Spec
    api_key: str | None
    scheduled_s: list[float]  # empty in a closed loop
    users: int | None
    duration_s: float
    warmup_s: float
    timeout_s: float
    drain_s: float
    connections: int  # opened before the start
    core: int | None
    seed: int
    rows: str  # file the records go to, as requests end; see `spool`
    share: int = 0  # this worker takes requests share, share + shares, ... of the one schedule; `users` are its own
    shares: int = 1
    headers: list[tuple[str, str]] = field(default_factory=list, repr=False)  # of every request; secrets: in no record, in no log
    transport: Literal["http", "websocket"] = "http"
    client: Client = field(default_factory=Client)
    proxy: Proxy | None = None  # on the way to `address`; its own host is numeric
    busy_poll: bool = False  # look for events all the time instead of sleeping until one comes
    think: Think = field(default_factory=Think)  # of a closed loop's users, between an answer and the next request
    at_once: int = 1  # requests a user of the closed loop sends at one moment, to wait for them all


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One line of the worker."""

    ready: bool = False  # connections are open; waits for a line "start T", T of the monotonic clock, common to all workers
    hello: float | None = None  # t0 in unix seconds
    progress: Progress | None = None
    done: Done | None = None
    refused: str | None = None  # what a person gave cannot be used; nothing was sent


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The worker's last word."""

    cpu_share: float
    stopped: bool  # by the parent, before its time
    ran_s: float  # until nothing new was sent
    sent: int
    locust_requests: int  # what Locust's own statistics counted
    locust_failures: int
    connections: int  # opened in all
    late_connections: int  # of these, opened while a request waited for one
    lag_p99_s: float = 0.0  # how late a beat of 10 ms was, the answers that came with it stamped: the hub's lag, in which stamps share
    gc_pause_max_s: float = 0.0  # the longest of the collector
    retries: int = 0  # attempts beyond the first, of all requests
    polled_share: float | None = None  # of the run, spent looking for events in vain; in no `cpu_share`.  None: it slept


encode = msgspec.json.Encoder().encode
decode_job = msgspec.json.Decoder(Job).decode
decode_said = msgspec.json.Decoder(Said).decode


def start_line(moment: float) -> bytes:
    """Return the line that starts every worker at one moment of the machine's monotonic clock."""
    return b"start %r\n" % moment


def start_moment(line: bytes) -> float | None:
    """Return the moment a start line names, or None for any other word of the parent: it wants an end."""
    word, _, moment = line.strip().partition(b" ")
    return float(moment) if word == b"start" else None


def own_headers(work: Job) -> list[tuple[str, str]]:
    """Return what every request or WebSocket handshake says beside what the protocol wants; what a person set wins."""
    usual = [("User-Agent", "mlsys-loadtest"), *([("Authorization", f"Bearer {work.api_key}")] if work.api_key else [])]
    set_by_hand = {name.lower() for name, _ in work.headers}
    return [*((name, value) for name, value in usual if name.lower() not in set_by_hand), *work.headers]


def part(work: Job, share: int, shares: int) -> Job:
    """Return one worker's share of a job: every `shares`-th request of the same schedule, or its part of the users."""
    users = None if work.users is None else work.users // shares + (share < work.users % shares)
    connections = work.connections // shares + (share < work.connections % shares)
    return replace(work, share=share, shares=shares, users=users, connections=connections)
