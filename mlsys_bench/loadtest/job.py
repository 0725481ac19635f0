"""What parent and worker say to each other: one job down, JSON lines up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

from mlsys_bench.loadtest import Progress, endpoints, payloads


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
    think_s: float
    duration_s: float
    warmup_s: float
    timeout_s: float
    drain_s: float
    connections: int  # opened before the start
    core: int | None
    seed: int
    rows: str  # file the records go to, one JSON line each, as requests end


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """One line of the worker."""

    hello: float | None = None  # t0 in unix seconds
    progress: Progress | None = None
    done: Done | None = None


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


encode = msgspec.json.Encoder().encode
decode_job = msgspec.json.Decoder(Job).decode
decode_said = msgspec.json.Decoder(Said).decode
