"""Load on any OpenAI-compatible endpoint, in an open or a closed loop -> one record per request.

`run` draws the schedule, probes the target and starts one worker process (`python -m mlsys_bench.loadtest.worker`), the only place
where Locust and gevent live.  This file stays light: the worker imports it before Locust patches the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlsys_bench.types import SLO, Lengths, LoadTest, Requests

if TYPE_CHECKING:
    from mlsys_bench.workload import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One load test.  Exactly one of `qps`, `users` and `trace` says how requests arrive."""

    url: str
    qps: float | None = None  # open loop: requests go out by a schedule, whatever the server does
    users: int | None = None  # closed loop: each waits for its answer, then thinks for `think_s`
    trace: Schedule | None = None  # open loop: these arrivals and lengths
    think_s: float = 0.0
    arrivals: str = "poisson"
    prompt_tokens: Lengths = field(default_factory=lambda: Lengths(mean=128))
    output_tokens: Lengths = field(default_factory=lambda: Lengths(mean=32))
    duration_s: float = 60.0  # of sending, warm-up included
    warmup_s: float | None = None  # of `duration_s`; None: the first 10 %, at most 5 s
    slo: SLO | None = None
    seed: int = 0
    timeout_s: float = 120.0  # of one request
    drain_s: float = 30.0  # how long answers still in flight at the end are waited for
    endpoint: Literal["completions", "chat"] = "completions"
    model: str | None = None  # None: the first of /v1/models
    api_key: str | None = None
    core: int | Literal["auto"] | None = "auto"  # the worker's; auto: the last one, where there are two
    requests_file: Path | None = None  # Parquet


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How a run stands, once a second."""

    t_s: float
    sent: int
    ok: int
    failed: int
    in_flight: int
    sent_per_s: float  # over the last second
    lateness_s: float  # worst of the last second


def run(options: Options, on_progress: Callable[[Progress], None] | None = None) -> tuple[LoadTest, Requests]:
    """Load the target and return what its users saw, with every request.

    Ctrl-C ends the run early and still returns what there is; the verdict says so.
    Raises BadInput where the target cannot be loaded, MeasurementFailed where nothing came of it.
    """
    from mlsys_bench.loadtest import parent

    return parent.run(options, on_progress)


def dry_run(options: Options) -> Schedule:
    """Return the requests that `run` would send; in a closed loop the lengths its users walk through, all at second 0."""
    from mlsys_bench.loadtest import parent

    return parent.schedule(options)
