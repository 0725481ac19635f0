"""A server that knows the truth: it answers like an OpenAI-compatible one, on an absolute schedule, and reports what it really sent.

`python -m mlsys_bench.loadtest.truth --ttft 100ms --itl 20ms` serves; `serving` starts one from Python and asks it afterwards.  One
thread, one epoll, one heap of timers: what a token costs is a timer, a `send` and two stamps.  Needs Linux.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How the server answers.  Times count from the moment the last byte of a request was read; token i is due at ttft + i * itl."""

    ttft_s: float = 0.1
    itl_s: float = 0.02  # 0: the rest of an answer goes out with its first token, in one write
    tokens: int | None = None  # of every answer; None: as many as each request asks
    tokens_per_event: int = 1
    role: Literal["with", "early", "none"] = "with"  # chat: the event that names the role comes with token 1, on arrival, or never
    headers: Literal["early", "late"] = "early"  # of streams: on arrival, or with token 1
    whole_s: float = 0.0  # what an answer that is not streamed takes, embeddings too
    slots: int | None = None  # so many requests in service, the others wait inside, first come first served
    stall_every_s: float | None = None  # the whole server freezes so often
    stall_s: float = 1.0  # for so long
    error_share: float = 0.0  # of the requests, answered 500
    seed: int = 0  # of the errors


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One request as the server saw it; times in unix seconds."""

    due_unix_s: float | None  # the header x-mlsys-sched
    arrived_unix_s: float
    first_s: float | None  # since the arrival; None: it was not streamed, or never began
    done_s: float | None  # since the arrival; None: the client left before, or still waits
    tokens: int  # sent
