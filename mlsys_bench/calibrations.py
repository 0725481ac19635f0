"""The record of `mlsys loadtest --calibrate`: how far this machine's load client can be trusted against a server that knows the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mlsys_bench.loadtests import Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """One run held against what the server really sent, request by request.  Errors are shares: 0.05 is 5 % above the truth."""

    requests: int  # in the window and matched with the server's
    ttft_p50_error: float
    ttft_p99_error: float
    itl_p50_error: float | None  # None where no answer had two events
    bias_s: float  # median of what was reported minus what was true
    lateness_p50_s: float
    lateness_p99_s: float
    achieved: float  # requests per second at the server's door, as a share of the schedule's
    gap_cv: float  # of the arrivals at the server's door
    client_cpu_share: float | None  # of one core, the busiest process's
    server_cpu_share: float
    server_lateness_p99_s: float
    verdict: Literal["valid", "degraded", "invalid"] = "valid"  # what the run said of itself


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One rate that was tried.  `missed` names the limits that a run did not keep; `limit` is who was the narrow point then."""

    rate_per_s: float
    runs: tuple[Held, ...]
    missed: tuple[str, ...]
    limit: Literal["client", "server"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """What a number of load processes can be trusted at."""

    processes: int
    trusted_rate_per_s: float | None  # the highest at which every run kept every limit; None: not even the lowest one tried
    limited_by: Literal["client", "server", "budget"]  # what kept a higher rate from being trusted
    ttft_bias_s: Spread | None  # this and the next two: at the trusted rate, one value a run
    lateness_p50_s: Spread | None
    lateness_p99_s: Spread | None
    requests_per_s: Spread | None  # closed loop, answers in one piece without delay
    streams_per_s: Spread | None  # closed loop, streams of `Calibration.tokens` without delay
    ceiling_limited_by: Literal["client", "server"] | None  # of the two figures above
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The load client of one machine.  The envelope says which machine; it holds for no other."""

    clients: tuple[Client, ...]  # by number of processes
    arrivals: str
    tokens: int  # of every answer
    ttft_s: float
    itl_s: float
    repeats: int
    took_s: float
    notes: tuple[str, ...] = ()
    busy_poll: bool = False  # the client looked for events all the time; it holds for no client that sleeps
