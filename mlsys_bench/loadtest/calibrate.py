"""How far this machine's load client can be trusted: the highest rate at which every run keeps every limit, held against the truth server.

| figure, of every run                        | limit  |
|---------------------------------------------|--------|
| TTFT p50 and p99, reported against true     | 5 %    |
| own lateness, p99                           | 1.5 ms |
| rate at the server's door against schedule  | 0.5 %  |

Rates double until one misses, then halve the gap (in logarithms); the highest that held is repeated.  Where the server is the narrow
point, the record says so: the client may be good for more, this machine cannot tell.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlsys_bench import loadtest, units
from mlsys_bench.calibrations import Calibration, Client, Held, Step
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import held
from mlsys_bench.loadtest.truth import Behaviour
from mlsys_bench.loadtest.truth.client import Truth, serving
from mlsys_bench.loadtests import Spread
from mlsys_bench.types import Lengths, LoadTest, Requests

ERROR = 0.05
LATENESS_P99_S = 0.0015
ACHIEVED = 0.005
REPEATS = 3
FIRST_PER_S, LEAST_PER_S, MOST_PER_S = 100.0, 12.5, 51_200.0
CLOSE_ENOUGH = 1.2  # between the highest rate that held and the lowest that did not
LEAST_BUDGET_S = 20.0
BUSY = 0.5  # of the cores
LEAST_RUN_S, CEILING_RUN_S = 1.5, 1.0
_CEILINGS = 0.25  # of the budget, for the two closed loops
_STREAM = Behaviour(ttft_s=0.1, itl_s=0.02)
_AT_ONCE = Behaviour(ttft_s=0.0, itl_s=0.0)
_TOKENS, _PROMPT = Lengths(mean=32), Lengths(mean=32)
_USERS = 32
_SERVER_BUSY = 0.85  # CPU share from which on the server is the narrow point
_SERVER_LATE_S = 0.001
POLLED = "the client polled instead of sleeping: this holds for runs with --busy-poll only"

Who = Literal["client", "server"]
Say = Callable[[str], None]
Attempt = Callable[[float], Held]


@dataclass(frozen=True, slots=True)
class Budget:
    """Seconds of wall time to spend, and since when."""

    seconds: float
    began: float

    @property
    def left_s(self) -> float:
        """Return what is left."""
        return self.seconds - (time.monotonic() - self.began)


def run(
    budget_s: float, *, arrivals: str = "poisson", processes: int = 1, busy_poll: bool = False, seed: int = 0, say: Say = lambda _: None
) -> Calibration:
    """Measure this machine's client, alone and, when asked, with several processes.  Raises BadInput, MeasurementFailed."""
    if budget_s < LEAST_BUDGET_S:
        raise BadInput(f"--budget {units.show_s(budget_s)}: a calibration needs {units.show_s(LEAST_BUDGET_S)} at least")
    began, load = time.monotonic(), os.getloadavg()[0]
    counts = sorted({1, processes})
    each = Budget(budget_s / len(counts), began)
    clients = []
    for i, count in enumerate(counts):
        share = Budget(each.seconds * (i + 1), began)
        clients.append(_client(share, each.seconds, arrivals, count, busy_poll, seed, say))
    return Calibration(
        clients=tuple(clients),
        arrivals=arrivals,
        tokens=round(_TOKENS.mean),
        ttft_s=_STREAM.ttft_s,
        itl_s=_STREAM.itl_s,
        repeats=REPEATS,
        took_s=time.monotonic() - began,
        notes=(*_notes(load, processes), *((POLLED,) * busy_poll)),
        busy_poll=busy_poll,
    )


def misses(run: Held) -> tuple[str, ...]:
    """Return the limits that a run did not keep, in words; none: it may be trusted."""
    found = []
    for name, error in (("TTFT p50", run.ttft_p50_error), ("TTFT p99", run.ttft_p99_error)):
        if abs(error) > ERROR:
            found.append(f"{name} {100 * error:+.1f} % off the truth")
    if run.lateness_p99_s > LATENESS_P99_S:
        found.append(f"lateness p99 {units.show_s(run.lateness_p99_s)}")
    if abs(run.achieved - 1) > ACHIEVED:
        found.append(f"{100 * run.achieved:.1f} % of the scheduled rate reached the server")
    return tuple(found)


def blame(run: Held) -> Who:
    """Say who was the narrow point of a run that missed a limit: the server where it was busy or late itself and the client was not."""
    server_full = run.server_cpu_share > _SERVER_BUSY or run.server_lateness_p99_s > _SERVER_LATE_S
    return "server" if server_full and run.lateness_p99_s <= LATENESS_P99_S else "client"


def search(attempt: Attempt, goes_on: Callable[[int], bool], repeats: int = 3) -> tuple[float | None, list[Step]]:
    """Return the highest rate at which `repeats` runs kept every limit, and all steps.  `goes_on(n)`: is there time for n more runs.

    Where the time was too short for so many, the highest at which those there were kept all.
    """
    runs: dict[float, list[Held]] = {}

    def holds(rate: float) -> bool:
        runs.setdefault(rate, []).append(attempt(rate))
        return not misses(runs[rate][-1])

    def good(rate: float) -> bool:
        return not any(misses(run) for run in runs[rate])

    rate, top = FIRST_PER_S, math.inf
    while rate <= MOST_PER_S and goes_on(repeats):  # up, leaving time to repeat the best
        if not holds(rate):
            top = rate
            break
        rate *= 2
    while not any(map(good, runs)) and rate / 2 >= LEAST_PER_S and goes_on(repeats):  # down, when the first was too much
        rate /= 2
        if not holds(rate):
            top = min(top, rate)
    while True:
        candidates = [r for r in runs if good(r) and r < top]
        if not candidates:
            break
        best = max(candidates)
        if len(runs[best]) < repeats and goes_on(1):  # first what is at hand is made sure of, then it is looked for more
            if not holds(best):
                top = best
        elif len(runs[best]) >= repeats and CLOSE_ENOUGH * best < top < math.inf and goes_on(repeats):
            middle = math.sqrt(top * best)
            if not holds(middle):
                top = middle
        else:
            break
    kept = {rate: len(found) for rate, found in runs.items() if good(rate) and rate < top}
    sure = [rate for rate, count in kept.items() if count >= repeats]
    return max(sure or kept, default=None), [_step(rate, runs[rate]) for rate in sorted(runs)]


def _step(rate: float, runs: Sequence[Held]) -> Step:
    missed = next(((found, blame(run)) for run in runs if (found := misses(run))), None)
    return Step(rate_per_s=rate, runs=tuple(runs), missed=missed[0] if missed else (), limit=missed[1] if missed else None)


# ---------------------------------------------------------------- with real processes


def _client(budget: Budget, whole_s: float, arrivals: str, processes: int, busy_poll: bool, seed: int, say: Say) -> Client:
    """Return what so many processes can be trusted at."""
    run_s = min(max(whole_s / 20, LEAST_RUN_S), 10.0)
    costs = [run_s + 2.5]  # seconds a run has taken so far: it is learned

    def attempt(rate: float) -> Held:
        began = time.monotonic()
        say(f"{processes} process{'es' * (processes > 1)} at {rate:,.0f}/s")
        found = against(
            server, qps=rate, arrivals=arrivals, duration_s=run_s, seed=seed + len(costs), processes=processes, busy_poll=busy_poll
        )
        costs.append(time.monotonic() - began)
        return found

    with serving(_STREAM, server_core()) as server:
        keep_s = _CEILINGS * whole_s
        trusted, steps = search(attempt, lambda n: budget.left_s - keep_s > n * max(costs[1:] or costs), REPEATS)
    whole, streams, who = _ceilings(budget, processes, busy_poll, say)
    best = next((step for step in steps if step.rate_per_s == trusted), None)
    above = next((step for step in steps if step.missed and (trusted is None or step.rate_per_s > trusted)), None)
    return Client(
        processes=processes,
        trusted_rate_per_s=trusted,
        limited_by=above.limit if above and above.limit else "budget",
        ttft_bias_s=held.spread(lambda r: r.bias_s, best.runs) if best else None,
        lateness_p50_s=held.spread(lambda r: r.lateness_p50_s, best.runs) if best else None,
        lateness_p99_s=held.spread(lambda r: r.lateness_p99_s, best.runs) if best else None,
        requests_per_s=whole,
        streams_per_s=streams,
        ceiling_limited_by=who,
        steps=tuple(steps),
    )


def against(server: Truth, **how: object) -> Held:
    """Load a truth server once and hold the result against it."""
    server.reset()
    options = loadtest.Options(url=server.url, prompt_tokens=_PROMPT, output_tokens=_TOKENS, drain_s=5.0, timeout_s=20.0, **how)  # type: ignore[arg-type]
    result, requests = _run(options)
    return held.hold(result, requests, server.rows(), server.stats())


def closed_loop(
    server: Truth, *, stream: bool, duration_s: float, users: int, processes: int = 1, busy_poll: bool = False
) -> tuple[float, Who]:
    """Return requests per second of a closed loop, and who was busier."""
    server.reset()
    options = loadtest.Options(
        url=server.url, users=users, stream=stream, duration_s=duration_s, warmup_s=0.2 * duration_s, prompt_tokens=_PROMPT,
        output_tokens=_TOKENS, processes=processes, busy_poll=busy_poll, drain_s=5.0, timeout_s=20.0,
    )  # fmt: skip
    result, _ = _run(options)
    busy = max((s.cpu_share for s in result.senders if s.cpu_share is not None), default=1.0)
    return result.request_rate_per_s, "server" if server.stats()["cpu_share"] > busy else "client"


def _run(options: loadtest.Options) -> tuple[LoadTest, Requests]:
    """Return one load test.  Raises KeyboardInterrupt when a person ended it: that ends the calibration too."""
    result, requests = loadtest.run(options)
    if any(sender.ended == "stopped" for sender in result.senders):
        raise KeyboardInterrupt
    return result, requests


def _ceilings(budget: Budget, processes: int, busy_poll: bool, say: Say) -> tuple[Spread | None, Spread | None, Who | None]:
    """Return the closed loop's request and stream rates over repeats, as many as the time allows, and who limited them."""
    figures: dict[bool, list[float]] = {False: [], True: []}
    blamed: list[Who] = []
    with serving(_AT_ONCE, server_core()) as server:
        for _ in range(REPEATS):
            began = time.monotonic()
            for stream in (False, True):
                say(f"closed loop, {'streams' if stream else 'whole answers'} without delay")
                per_s, who = closed_loop(
                    server, stream=stream, duration_s=CEILING_RUN_S, users=_USERS * processes, processes=processes, busy_poll=busy_poll
                )
                figures[stream].append(per_s)
                blamed.append(who)
            if budget.left_s < time.monotonic() - began:
                break
    return held.spread_of(figures[False]), held.spread_of(figures[True]), "server" if "server" in blamed else "client"


def server_core() -> int | None:
    """Return the core the truth server gets: the first, where there are two; clients take the others."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    return allowed[0] if len(allowed) >= 2 else None


def _notes(load: float, processes: int) -> tuple[str, ...]:
    """Return what to know of this machine; `load` is the average number of threads that wanted to run before we began."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (
        *(("client and server shared cores: the client alone is better than this",) * (cores <= processes)),
        *(
            (f"the machine was busy before this began (load {load:.1f} on {cores} cores): calibrate again when it is quiet",)
            * (load > BUSY * cores)
        ),
    )
