"""The worker's side of `gate run`: what is measured waits between turns, so that two versions of a program take turns on one machine.

    {"hello": name, "protocol": 1, "benchmark": name, "sources": folder, "machine": {hard, soft}}   once, ready to be measured
    turn N  ->  {"turn": N, "samples": [{name, unit, better, parameters, deterministic, values, cpu_s, involuntary}, …]}
    {"error": class, "text": …}                                                                     and its end

Standard input's end is the worker's.  `sources` is the folder that the measured code was imported from: whoever compares two versions
must know that each worker ran its own.  Any program that speaks this can be gated: see docs/gate.md.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec

import mlsys_bench
from mlsys_bench import __version__, hardware
from mlsys_bench.bench.harness import Sampled, Samples, Spec
from mlsys_bench.errors import BadInput, MlsysError
from mlsys_bench.types import Round

PROTOCOL = 1
TURN_S, LEAST = 0.02, 10  # a turn lasts so long and so many iterations,
LONGEST_TURN_S = 0.06  # but no longer than this, unless one iteration does: sides that change over often share what disturbs them
AGREE, AGREEING = 0.02, 3  # warm is what gives so many block medians in a row within this share
WARM_UP_S = 1.0  # at most
RESET = 8  # blocks of the warm-up, after which the state is set back
TURNS = 20  # of a launch


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """What a worker measures: work that is timed, and figures that are asked for after it.

    `iterations` is for work that changes its state: both versions must then do the same, whatever it takes them.  `before` sets the state
    back, untimed: before the first turn, and now and then in the warm-up.
    """

    spec: Spec | None = None  # of one iteration's time, divided by `per`
    work: Callable[[], object] | None = None
    per: int = 1
    iterations: int | None = None
    turns: int = TURNS  # later ones measure nothing: for work that takes long
    before: Callable[[], object] = lambda: None
    counted: Callable[[], list[tuple[Spec, float]]] = list  # once a launch
    peaks: Callable[[], list[tuple[Spec, float]]] = list  # after every turn


class Turns:
    """A benchmark in turns; the first one warms it up."""

    def __init__(self, benchmark: Benchmark) -> None:
        self._benchmark = benchmark
        self._iterations = benchmark.iterations or 0

    def take(self, number: int) -> list[Sampled]:
        """Return the samples of a turn."""
        b = self._benchmark
        sampled: list[Sampled] = []
        if number > b.turns:
            return sampled
        if b.spec is not None and b.work is not None:
            if not self._iterations or number == 1:
                self._warm_up(b.work)
                b.before()
            sampled.append((b.spec, self._timed(b.work)))
        if number == 1:
            sampled += [_figure(*counted) for counted in b.counted()]
        return sampled + [_figure(*peak) for peak in b.peaks()]

    def _timed(self, work: Callable[[], object]) -> Round:
        """Time the iterations of a turn, after one that is not, unless it alone would be a long turn."""
        if self._iterations > 1:
            work()
        samples = Samples(one_thread=True)
        for _ in range(self._iterations):
            samples.take(work)
        per = self._benchmark.per
        taken = samples.round(lambda seconds: seconds / per)
        return dataclasses.replace(taken, cpu_s=tuple(seconds / per for seconds in samples.cpu_s))

    def _warm_up(self, work: Callable[[], object]) -> None:
        """Repeat blocks until their medians agree, or patience ends."""
        medians: list[float] = []
        end = time.perf_counter() + WARM_UP_S
        while not settled(medians) and (time.perf_counter() < end or not medians):
            if len(medians) % RESET == 0:
                self._benchmark.before()
            medians.append(statistics.median(_seconds(work)))
        self._iterations = self._benchmark.iterations or iterations(medians[-1])


def settled(medians: list[float]) -> bool:
    """Say whether the last block medians agree."""
    last = medians[-AGREEING:]
    return len(last) == AGREEING and max(last) <= (1 + AGREE) * min(last)


def iterations(once_s: float) -> int:
    """Return the iterations of a turn of work that takes so long."""
    enough = max(LEAST, math.ceil(TURN_S / max(once_s, 1e-9)))
    return max(1, min(enough, int(LONGEST_TURN_S / max(once_s, 1e-9))))


def _seconds(work: Callable[[], object]) -> Iterator[float]:
    """Yield the time of each iteration of a block: so many or so long, but of slow work one is enough."""
    began = time.perf_counter()
    for done in itertools.count(1):
        start = time.perf_counter()
        work()
        yield time.perf_counter() - start
        spent_s = time.perf_counter() - began
        if spent_s >= LONGEST_TURN_S or (done >= LEAST and spent_s >= TURN_S):
            return


def _figure(spec: Spec, value: float) -> Sampled:
    return spec, Round(values=(float(value),))


# ---------------------------------------------------------------- the conversation


def serve(name: str, build: Callable[[], Benchmark]) -> int:
    """Be the worker of a benchmark on this process's standard streams until standard input ends; return the exit status of an error.

    `build` imports and makes what is measured.  What it prints goes to standard error: standard output is the conversation's.
    """
    out = _own_stdout()
    try:
        machine = hardware.machine()  # before pinning: it counts the cores
        benchmark = build()
        _pin()
        _say(
            out,
            hello=f"mlsys-bench {__version__}",
            protocol=PROTOCOL,
            benchmark=name,
            sources=_sources(),
            machine=msgspec.to_builtins(machine),
        )
        turns = Turns(benchmark)
        for line in sys.stdin:
            number = _number(line)
            _say(out, turn=number, samples=[_told(*sampled) for sampled in turns.take(number)])
    except MlsysError as error:
        _say(out, error=type(error).__name__, text=str(error))
        return error.exit_status
    os._exit(0)  # all is said; to take torch apart in order would cost each launch 0.2 s


def _number(line: str) -> int:
    word, _, number = line.strip().partition(" ")
    if word != "turn" or not number.isdecimal():
        raise BadInput(f"the worker was told {line.strip()!r}; it knows `turn N` of protocol {PROTOCOL}")
    return int(number)


def _own_stdout() -> IO[str]:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return out


def _say(out: IO[str], **message: Any) -> None:
    """Write one message.  When the reader is gone the process ends with it."""
    try:
        out.write(json.dumps(message) + "\n")
        out.flush()
    except BrokenPipeError:
        os._exit(1)


def _told(spec: Spec, taken: Round) -> dict[str, Any]:
    return {**msgspec.to_builtins(spec), **msgspec.to_builtins(taken)}


def _sources() -> str:
    return str(Path(mlsys_bench.__file__).resolve().parent)


def _pin() -> None:
    """Keep to the first core that may be used: both versions then run on the same one, by turns."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
