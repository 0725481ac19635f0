"""Servers as the sides of a gate: the client takes turns, a few seconds of the same load for one side, then for the other.

Two live URLs cannot be started again: they are one launch each, what launches differ by is not measured, and the verdict is at most
`suspect`.  With a restart command, or with commands that serve, each launch is a fresh server.  While the one is under load the other is
stopped (SIGSTOP to its process group): a server that waits for work often spins.  A stopped server misses what it has promised others in
the meantime (heartbeats of a cluster, leases); for such ones `idle="run"`.  Both sides of a pair are sent the same schedule.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import numpy as np
import numpy.typing as npt

from mlsys_bench import ahead, loadtest, slo, summary
from mlsys_bench.errors import BadInput, MeasurementFailed, NothingYet
from mlsys_bench.hardware import proc
from mlsys_bench.journeys.gating import running, servers
from mlsys_bench.journeys.gating.source import Metric, Sampled
from mlsys_bench.loadtest import crew, target, validity
from mlsys_bench.summary import promises
from mlsys_bench.types import LoadTest, Machine, Round
from mlsys_bench.verdicts import Subject

Floats = npt.NDArray[np.float64]

LATENCIES = {name: Metric(name=name, unit="s", better="lower") for name in ("ttft", "tpot", "itl", "e2e")}
AVAILABILITY = Metric(name="availability", unit="share", better="higher")  # one 0 or 1 a request: whether it was answered
GOODPUT = Metric(name="goodput", unit="share", better="higher")  # of all requests: answered, and within every limit
RATES = {name: Metric(name=name, unit=unit, better="higher") for name, unit in (("requests", "per_s"), ("output_tokens", "per_s"))}
MOST_GAPS = 2000  # of a turn that are kept; more say no more of a quantile that a launch can tell
FOR_P99 = 1000  # requests a launch from which a p99 says something
SETTLE_S = 0.5  # at most a quarter of a turn, which is not counted: connections, and a server that starts empty
STAMP_S = 1e-6  # what stamps tell apart
_TRIES = 3  # of a turn: two seconds of a busy machine must not end a gate of half an hour
_CURE = re.compile("[;:] lower the rate.*")  # of a load test: a gate has no --processes and no --busy-poll
CLIENT_S = 1.5  # what a turn takes beside its load: a client starts, and looks at the server


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What both sides are sent.  `options` is a load test whose address, length and seed are set turn by turn."""

    options: loadtest.Options
    each_s: float = 3.0
    turns: int = 5  # of a launch
    warm_turns: int = 1  # before them, that nobody counts
    ready_s: float = 300.0  # for a server to start
    idle: Literal["stop", "run"] = "stop"

    @property
    def settle_s(self) -> float:
        """Return how long each turn is not counted."""
        return min(SETTLE_S, self.each_s / 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One side: a URL, or a command that serves on {port}."""

    subject: Subject
    url: str | None = None
    restart: str | None = None  # command that starts what is behind the URL afresh, and ends
    serve: str | None = None
    folder: Path = Path()
    environment: Mapping[str, str] | None = None  # None: ours


def sources(base: Asked, cand: Asked, load: Load, *, alternate: bool = False) -> tuple[Server, Server]:
    """Return both sides.  `alternate`: never both servers at once, as where they cannot share a GPU.  Raises BadInput."""
    _check(base, cand, load, alternate)
    return Server(base, load, "baseline", alternate=alternate), Server(cand, load, "candidate", alternate=alternate)


def _check(base: Asked, cand: Asked, load: Load, alternate: bool) -> None:
    for asked, option in ((base, "--base"), (cand, "--cand")):
        if asked.serve is not None:
            assert running.words(asked.serve, f"{option}-serve")
            if servers.PORT not in asked.serve:
                raise BadInput(f"{option}-serve {asked.serve!r}: put {servers.PORT} where the port belongs: each launch has its own")
        elif asked.restart is not None:
            assert running.words(asked.restart, f"{option}-restart")
    if (base.restart is None) != (cand.restart is None):
        raise BadInput("give both sides a restart command or none: launches are counted in pairs")
    if alternate and None in (base.serve, cand.serve):
        raise BadInput("--alternate starts and ends servers itself: give it --base-serve and --cand-serve")
    if load.each_s <= 0 or load.turns < 1:
        raise BadInput("a turn must last, and a launch needs one at least")


class Server:
    """One side as a `Source`."""

    def __init__(self, asked: Asked, load: Load, name: str, *, alternate: bool = False) -> None:
        self.asked, self.load, self.name = asked, load, name
        self.together = not alternate
        self.turns = load.turns
        self.doubts: Counter[str] = Counter()
        self.loads = self.again = 0

    @property
    def subject(self) -> Subject:
        """Return what is measured, as the record names it."""
        return self.asked.subject

    @property
    def most_pairs(self) -> int | None:
        """Return how many launches there can be: one of a server that nobody starts again."""
        return None if self.asked.serve or self.asked.restart else 1

    def launch(self, pair: int) -> Launched:
        """Start a server, or have one started again; a live one is as it is."""
        return Launched(self, pair)

    def remarks(self) -> tuple[str, ...]:
        """Return what should stand beside the verdict."""
        return tuple(self._remarks())

    def _remarks(self) -> Iterator[str]:
        if self.most_pairs is not None:
            yield "live servers are one launch each: what launches differ by is not measured; give --base-restart and --cand-restart"
        doubted = sum(self.doubts.values())
        if doubted:
            (worst, _), *_ = self.doubts.most_common(1)
            why = _CURE.sub("; lower the rate, or give the client a core of its own", worst)
            yield f"{doubted} of {self.loads} turns of the {self.name} were degraded: {why}"
        if self.again:
            yield f"{self.again} turns of the {self.name} were sent again, because the client could not be believed"


class Launched:
    """One launch: a fresh server, or a live one."""

    def __init__(self, side: Server, pair: int) -> None:
        self._side, self._pair = side, pair
        self._url = side.asked.url or ""
        self._server = self._started() if side.asked.serve else None
        if side.asked.restart:
            self._restart(side.asked.restart)

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the server's first process, or, of a live URL of this machine, those that listen on its port."""
        if self._server is not None:
            return (self._server.process.pid,)
        parts = urlsplit(self._url if "://" in self._url else f"http://{self._url}")
        return proc.listeners(parts.port or 80) if crew.is_loopback(parts.hostname or "") else ()

    def hello(self) -> Machine:
        """Wait until the server answers, send it turns that nobody counts, and return the client's machine."""
        ahead.start("mlsys_bench.loadtest.worker")  # it imports Locust while the server starts
        if self._server is not None:
            self._server.wait_until(self._trouble, self._side.load.ready_s)
        elif self._side.asked.restart:
            servers.wait_until(self._trouble, self._side.load.ready_s, self._side.name)
        for number in range(self._side.load.warm_turns):
            self._load(-number)
        self._pause()
        return running.here()

    def turn(self, number: int) -> list[Sampled]:
        """Send the load of one turn.  Raises MeasurementFailed where its figures cannot be believed."""
        if self._server is not None:
            self._server.resume()
        try:
            result, run = self._load(number)
        except (BadInput, MeasurementFailed) as error:
            if self._server is not None:
                self._server.check()  # why it ended says more than that nothing answered
            raise MeasurementFailed(f"turn {number} of the {self._side.name}: {error}") from error
        finally:
            self._pause()
        return sampled(run, result, self._side.load.options)

    def close(self) -> None:
        """End the server, if it is ours."""
        if self._server is not None:
            self._server.close()

    def _started(self) -> servers.Server:
        asked = self._side.asked
        found = servers.Server(
            running.words(asked.serve or "", "--serve"), folder=asked.folder, environment=_environment(asked), name=self._side.name
        )
        self._url = found.url
        return found

    def _restart(self, command: str) -> None:
        asked = self._side.asked
        ran = running.run(
            running.words(command, "--restart"), folder=asked.folder, environment=_environment(asked), timeout_s=self._side.load.ready_s,
            sweeps=False,
        )  # fmt: skip
        if ran.status:
            raise MeasurementFailed(f"the restart command of the {self._side.name} ended with status {ran.status}: {ran.last_words}")

    def _pause(self) -> None:
        if self._server is not None and self._side.load.idle == "stop" and self._side.together:
            self._server.pause()

    def _trouble(self) -> str | None:
        """Return why the server cannot be loaded yet."""
        options = self._side.load.options
        try:
            target.probe(
                self._url, endpoint=options.endpoint, model=options.model, api_key=options.api_key, timeout_s=min(options.timeout_s, 60.0),
                seed=options.seed, headers=options.headers, form=options.form, client=options.client,
            )  # fmt: skip
        except BadInput as error:
            return str(error)
        return None

    def _load(self, number: int) -> tuple[LoadTest, summary.Columns]:
        """Send one turn of load, and the same again where a moment's trouble of the client spoilt it."""
        for _ in range(_TRIES):
            result, run = self._sent(number)
            if not _unbelieved(result):
                break
            self._side.again += 1
        self._judge(result)
        return result, run

    def _sent(self, number: int) -> tuple[LoadTest, summary.Columns]:
        load = self._side.load
        options = dataclasses.replace(
            load.options,
            url=self._url,
            duration_s=load.each_s + load.settle_s,
            warmup_s=load.settle_s,
            seed=load.options.seed + 1000 * self._pair + number + load.warm_turns,
            metrics=("off",),
        )
        try:
            result, requests = loadtest.run(options)
        except NothingYet:
            raise KeyboardInterrupt from None
        if result.validity.is_stopped:
            raise KeyboardInterrupt
        return result, summary.columns.of(requests.requests)

    def _judge(self, result: LoadTest) -> None:
        """Keep what makes a turn doubtful; refuse one that its own verdict refuses.  Failed requests are the server's, and are counted."""
        side = self._side
        reasons = result.validity.reasons or ("it does not say why",)
        if _unbelieved(result):
            raise MeasurementFailed(
                f"the load test is invalid: {_CURE.sub('; lower the rate, or give the client a core of its own', reasons[0])}"
            )
        side.loads += 1
        if result.validity.verdict != "valid":
            side.doubts[reasons[0]] += 1


def _unbelieved(result: LoadTest) -> bool:
    """Say whether the client's own verdict is that a turn says nothing of the server."""
    failed = 1 - result.ok / result.requests if result.requests else 1.0
    return result.validity.verdict == "invalid" and failed <= validity.FAILED_SHARE[1]


# ---------------------------------------------------------------- from a load test to samples


def sampled(run: summary.Columns, result: LoadTest, options: loadtest.Options) -> list[Sampled]:
    """Return one round of every metric that a turn of load has values of."""
    inside = run.where(run.in_window)
    ok = inside.where(inside.ok)
    values = {"ttft": _known(ok.ttft_s), "tpot": _known(ok.tpot_s), "itl": _thinned(_known(ok.gaps_s[0])), "e2e": _known(ok.e2e_s)}
    found = [(LATENCIES[name], _round(each)) for name, each in values.items() if len(each)]
    found.append((AVAILABILITY, _round(inside.ok.astype(float))))
    if options.slo is not None and slo.latencies(options.slo):
        good = inside.ok.astype(float)
        good[inside.ok] = promises.keeps_all(ok, options.slo)
        found.append((GOODPUT, _round(good)))
    if options.users is not None:  # in an open loop the rate is the client's
        rates = {"requests": result.request_rate_per_s, "output_tokens": result.output_tokens_per_s}
        found += [(RATES[name], Round(values=(rate,))) for name, rate in rates.items() if rate > 0]
    return found


def _round(values: Floats) -> Round:
    """Return values as they are.  A request is forced off no CPU: none is set aside, and the median of all stands for the launch."""
    return Round(values=tuple(values.tolist()), involuntary=(0,) * len(values))


def _known(values: Floats) -> Floats:
    """Return what is there.  Tokens that came in one piece have one stamp; a ratio needs more than nothing between them."""
    return np.maximum(values[~np.isnan(values)], STAMP_S)


def _thinned(values: Floats) -> Floats:
    """Return every k-th value where there are many."""
    return values[:: max(1, -(-len(values) // MOST_GAPS))]


def few_for_p99(load: Load) -> str | None:
    """Say where a launch has too few requests for a p99, and what to change; None where it has enough, or its rate is not known."""
    rate = load.options.qps
    if rate is None or rate * load.each_s * load.turns >= FOR_P99:
        return None
    needed = math.ceil(FOR_P99 / (rate * load.turns))
    return f"{rate * load.each_s * load.turns:.0f} requests a launch: a p99 needs {FOR_P99:,}; --duration-each {needed}s has them"


def _environment(asked: Asked) -> Mapping[str, str]:
    return os.environ if asked.environment is None else asked.environment
