"""Load on any OpenAI-compatible endpoint, in an open or a closed loop -> one record per request.

`run` draws the schedule, probes the target and starts one worker process (`python -m mlsys_bench.loadtest.worker`), the only place
where Locust and gevent live.  This file stays light: the worker imports it before Locust patches the interpreter.

| step of a run | files |
|---|---|
| what is asked for | `client`, `content`, `form`, `auth`, `mlperf`; `schedule` draws every request, `payloads/` writes what each carries |
| what is there | `target` probes through `caller`, `detect` tells the API; `endpoints/` writes and reads each kind |
| the processes | `parent` leads; `crew` starts workers here, `fleet`, `master`, `remote` on other hosts; they speak by `job`, `words` |
| the worker | `child`, `worker`; `loops` says when, `sender` follows each, `links`, `layers` connect, `wire` reads, `alarm` keeps time |
| the records | `spool` (a row a request), `shards` joins them, `clocks` sets them to one time, `answers` tells tokens from pieces |
| the result | `window`, `asked`, `outcome`; `validity` judges, `trust` holds it against a calibration |
| a person's own Locust file | `own` in the parent, `locustfile` in the worker |
| beside a run | `serverside/` the server's own metrics; `limits/` sweeps and searches; `truth/`, `held`, `calibrate` test the client |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mlsys_bench.loadtest.client import Client
from mlsys_bench.loadtest.content import Content
from mlsys_bench.loadtest.form import Form
from mlsys_bench.types import SLO, Lengths, LoadTest, Requests

if TYPE_CHECKING:
    from mlsys_bench.loadtest.mlperf import Scenario
    from mlsys_bench.loadtest.payloads.think import Think
    from mlsys_bench.workload import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosts:
    """Workers on other hosts, which report to a master here: Locust's own way of spreading a load."""

    expect_workers: int = 1  # processes, on whatever hosts; the run waits for all
    bind: str = "*"  # address the master listens on; *: every one of this host
    port: int = 5557
    wait_s: float = 600.0  # for the workers to report
    grace_s: float = 10.0  # for a worker that is not heard any more, once all others are through


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One load test.  Exactly one of `qps`, `users`, `trace` and `offline` says how requests arrive."""

    url: str
    qps: float | None = None  # open loop: requests go out by a schedule, whatever the server does
    users: int | None = None  # closed loop: each waits for its answer, then pauses as `think` says
    trace: Schedule | None = None  # open loop: these arrivals and lengths
    offline: int | None = None  # so many requests, all of them at second 0
    think: Think | None = None  # pauses of a user, seconds between an answer and the next request; None: no pause
    at_once: int = 1  # requests that a user of a closed loop sends together, and waits for together
    arrivals: str = "poisson"
    content: Content = field(default_factory=Content)
    preset: Scenario | None = None  # of MLPerf, whose metric and minimum run the result is held against
    prompt_tokens: Lengths = field(default_factory=lambda: Lengths(mean=128))
    output_tokens: Lengths = field(default_factory=lambda: Lengths(mean=32))
    duration_s: float = 60.0  # of sending, warm-up included
    warmup_s: float | None = None  # of `duration_s`; None: as long as the data say, see `summary.steady`
    slo: SLO | None = None
    seed: int = 0
    busy_poll: bool = False  # workers look for events all the time, each on a core of its own, instead of sleeping until one comes
    timeout_s: float = 120.0  # of one request
    drain_s: float = 30.0  # how long answers still in flight at the end are waited for
    endpoint: str = "auto"  # a kind of `endpoints.kinds`; auto: the first that the server answers to, completions before chat
    model: str | None = None  # None: the first the server names
    stream: bool = True  # False: answers in one piece, where the endpoint can do both
    api_key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # of every request; may be secret: see `auth`
    form: Form = field(default_factory=Form)  # of requests and answers
    client: Client = field(default_factory=Client)  # patience, second attempts, TLS, proxy
    locustfile: Path | None = None  # a person's own Locust users send instead; needs `users`
    core: int | Literal["auto"] | None = "auto"  # the worker's; auto: the last one, where there are two
    requests_file: Path | None = None  # Parquet
    calibration: Path | None = None  # of `calibrate`, of this machine; None: the one in the user's cache, where there is one
    metrics: tuple[str, ...] = ("auto",)  # pages of metrics to look at beside the run; auto: the target's own; ("off",): none
    processes: int | Literal["auto"] = 1  # workers on this machine, each with its share of the one schedule; auto: one per core
    hosts: Hosts | None = None  # workers on other hosts instead
    web: tuple[str, int] | None = None  # address and port of Locust's pages while the run lasts


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
    cpu_share: float = 0.0  # of a core, over the last second, of the busiest worker


def run(
    options: Options, on_progress: Callable[[Progress], bool | None] | None = None, on_note: Callable[[str], None] | None = None
) -> tuple[LoadTest, Requests]:
    """Load the target and return what its users saw, with every request.

    `on_progress` may answer True: that ends the run early, as Ctrl-C does.
    `on_note` hears what people should know while the run lasts: where the web UI is, which workers came or went.
    Ctrl-C ends the run early and still returns what there is; the verdict says so.
    Raises BadInput where the target cannot be loaded, MeasurementFailed where nothing came of it.
    """
    from mlsys_bench.loadtest import parent

    return parent.run(options, on_progress, on_note)


def dry_run(options: Options) -> Schedule:
    """Return the requests that `run` would send; in a closed loop the lengths its users walk through, all at second 0."""
    from mlsys_bench.loadtest import parent

    return parent.schedule(options)


def sends_for_s(options: Options) -> float:
    """Return how long requests are sent, warm-up included: as asked, or as long as a trace lasts."""
    from mlsys_bench.loadtest import schedule

    return schedule.duration_s(options)
