"""Take samples: warm up, then visit every task in random order, round after round, until the budget ends."""

from __future__ import annotations

import dataclasses
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import numpy as np

from mlsys_bench.types import Round, Scalar

_SLACK = 1.25  # a visit may take this much longer than the last one


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What is measured."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    parameters: dict[str, Scalar] = dataclasses.field(default_factory=dict)
    deterministic: bool = False  # a counter: the same program gives the same value


Sampled = tuple[Spec, Round]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something to visit once per round.  A visit returns its `specs`, in this order; `cost_s` is what the first one should take."""

    specs: tuple[Spec, ...]
    visit: Callable[[], list[Sampled]]
    cost_s: float


class Samples:
    """Times, CPU times and involuntary context switches, taken one by one."""

    def __init__(self, one_thread: bool) -> None:
        """Count for this thread alone, or for the whole process."""
        # getrusage counts CPU time in ticks of 4 ms on some kernels; these clocks count nanoseconds
        self.cpu_clock = time.thread_time if one_thread else time.process_time
        self.who = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF) if one_thread else resource.RUSAGE_SELF
        self.values: list[float] = []
        self.cpu_s: list[float] = []
        self.involuntary: list[int] = []

    def take(self, work: Callable[[], object]) -> None:
        """Time one call."""
        switches, cpu_s = resource.getrusage(self.who).ru_nivcsw, self.cpu_clock()
        start = time.perf_counter()
        work()
        self.values.append(time.perf_counter() - start)
        self.cpu_s.append(self.cpu_clock() - cpu_s)
        self.involuntary.append(resource.getrusage(self.who).ru_nivcsw - switches)

    def round(self, scale: Callable[[float], float] = float) -> Round:
        """Return the samples, each time turned into what the benchmark counts."""
        return Round(values=tuple(map(scale, self.values)), cpu_s=tuple(self.cpu_s), involuntary=tuple(self.involuntary))


def warm_up(work: Callable[[], object], *, block: int = 5, agree: float = 0.05, tries: int = 3, patience_s: float = 2.0) -> float:
    """Repeat until the medians of two successive blocks agree, or tries or patience end; return the last median in seconds."""
    deadline = time.perf_counter() + patience_s
    last_s = math.inf
    for _ in range(tries):
        median_s = statistics.median(seconds for seconds in _times(work, block, deadline))
        if abs(median_s / last_s - 1) <= agree or time.perf_counter() > deadline:
            return median_s
        last_s = median_s
    return last_s


def _times(work: Callable[[], object], count: int, deadline: float) -> Iterator[float]:
    for i in range(count):
        if i and time.perf_counter() > deadline:
            return
        start = time.perf_counter()
        work()
        yield time.perf_counter() - start


def visit_all(
    tasks: Sequence[Task], *, rounds: int, deadline: float, rng: np.random.Generator, emit: Callable[[Spec, Sampled], None]
) -> list[Task]:
    """Visit every task once per round, cheapest first, then in random order; return those that found no time at all.

    Random order spreads the drift of a machine over all tasks.  A visit is begun only if it should end before the deadline.
    """
    took_s = {id(task): task.cost_s for task in tasks}
    visited: set[int] = set()
    for number in range(rounds):
        order = sorted(tasks, key=lambda t: t.cost_s) if number == 0 else [tasks[i] for i in rng.permutation(len(tasks))]
        for task in order:
            start = time.monotonic()
            if start + _SLACK * took_s[id(task)] > deadline:
                continue
            for planned, sampled in zip(task.specs, task.visit(), strict=True):
                emit(planned, sampled)
            took_s[id(task)] = time.monotonic() - start
            visited.add(id(task))
    return [task for task in tasks if id(task) not in visited]
