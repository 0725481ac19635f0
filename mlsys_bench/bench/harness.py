"""Take samples: warm up, then visit every task in random order, round after round, until each has settled or the budget ends.

What a sample is, when a task has settled and what is flagged: docs/bench.md, "How a figure is taken"; why: ADR 0027.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import itertools
import math
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from mlsys_bench import samples as kept
from mlsys_bench.bench import telemetry
from mlsys_bench.errors import MlsysError
from mlsys_bench.hardware import memory
from mlsys_bench.types import Round, Scalar, Work

T = TypeVar("T")

SAMPLE_S = 2e-3  # a sample repeats short work until it lasts this long: a reading of the clock is then right to 1 in 10,000
STEPS_OF_CLOCK = 10_000  # ... where a step of the clock is longer than 0.2 us, a sample is so many of them
LEAD_S = 6e-3  # untimed before a visit's first sample: after another task clocks, caches and units take some 5 ms to be those of this one
LEAD_SHARE = 0.2  # ... where it is more than that of a sample
VISIT_SAMPLES, VISIT_S = 3, 10e-3  # a visit takes up to so many, about so long: many short visits tell a drift from noise
CHECK_GROWTH = 1.25  # a task is asked whether it has settled each time its visits have grown by this
WARM_BLOCK = 5  # samples
COLD = 3  # copies of the weights fill so many last-level caches
UNKNOWN_BYTES = 2**30  # of memory
MEMORY_SHARE = 0.2  # of what is free, at most, for the copies of one benchmark
_DEBT = 2.0  # median visits that a task may have had too many before it sits out
_SLACK = 1.25  # a visit may take this much longer than the last one


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What is measured."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    parameters: dict[str, Scalar] = dataclasses.field(default_factory=dict)
    deterministic: bool = False  # a counter: the same program gives the same value
    work: Work | None = None  # of one call; no part of a measurement's identity


Sampled = tuple[Spec, Round]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """Something to visit again and again.  A visit returns its `specs`, in this order; `cost_s` is what the first one should take.

    `check` gives the relative error of the output against a reference of higher precision; above `tolerance`, or NaN, nothing is timed.
    """

    specs: tuple[Spec, ...]
    visit: Callable[[], list[Sampled]]
    cost_s: float
    check: Callable[[], float] | None = None
    tolerance: float | None = None


# ---------------------------------------------------------------- samples


class Samples:
    """Times, CPU times and involuntary context switches, taken one by one: for work that lasts, as they cost 5 us together."""

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


class Timer(Protocol):
    """Times `repeat` calls as one sample, in seconds."""

    def __call__(self, call: Callable[[], object], repeat: int) -> float:
        """Return the time of all calls together."""


def on_cpu(call: Callable[[], object], repeat: int) -> float:
    """Time the calls by the monotonic clock."""
    calls = itertools.repeat(None, repeat)
    start = time.perf_counter()
    for _ in calls:
        call()
    return time.perf_counter() - start


def on_cuda(call: Callable[[], object], repeat: int) -> float:
    """Time the calls by events around them on the device, which is kept busy until all of them are queued: no gap of launches between."""
    from torch import cuda

    events: Any = cuda  # neither of the two is annotated in torch
    before, after = (events.Event(enable_timing=True) for _ in range(2))
    events._sleep(min(10_000_000, 20_000 * repeat))  # cycles: 10 us for each launch from Python
    before.record()
    for _ in range(repeat):
        call()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def timed(
    spec: Spec,
    call: Callable[[], object],
    *,
    device: str,
    check: Callable[[], float] | None = None,
    tolerance: float | None = None,
    threads: int = 1,
    flush: bool = False,
) -> Task:
    """Return the task that samples one call of an operator, as the unit says: s for a call, or B/s, FLOP/s of its `work`.

    The call rotates its own weights (`rotated`), so that caches hold none of them; `flush` empties the caches before every call instead.
    """
    del threads  # a process has as many as it was started with; the parameter says so at the call
    repeated = _Repeated(_scale(spec), call, on_cpu if device == "cpu" else on_cuda, _flusher(device) if flush else None)
    return Task(
        specs=(spec,), visit=lambda: [(spec, repeated.visit())], cost_s=_guess_s(spec, device), check=check, tolerance=tolerance
    )  # fmt: skip


class _Repeated:
    """A call, repeated so often that a sample lasts; the first visit warms it up and finds out how often that is."""

    def __init__(
        self, scale: Callable[[float], float], call: Callable[[], object], timer: Timer, flush: Callable[[], object] | None
    ) -> None:
        self._scale, self._call, self._timer, self._flush = scale, call, timer, flush
        self._repeat = self._samples = self._lead = 0

    def visit(self) -> Round:
        if not self._repeat:
            self._prepare()
        call, repeat, timer, flush = self._call, self._repeat, self._timer, self._flush
        taken = []
        with collected():
            if self._lead:
                timer(call, self._lead)
            for _ in range(self._samples):
                if flush is not None:
                    flush()
                taken.append(timer(call, repeat))
        return Round(values=tuple(self._scale(seconds / repeat) for seconds in taken))

    def _prepare(self) -> None:
        self._repeat = 1 if self._flush is not None else repeats(lambda n: self._timer(self._call, n))
        sample_s = warm_up(lambda: self._timer(self._call, self._repeat), block=WARM_BLOCK if self._repeat > 1 else 3, patience_s=0.5)
        self._samples = max(1, min(VISIT_SAMPLES, round(VISIT_S / max(sample_s, 1e-9))))
        is_short = sample_s < LEAD_S / LEAD_SHARE and self._flush is None  # a longer one hardly notices how it began
        self._lead = math.ceil(LEAD_S * self._repeat / max(sample_s, 1e-9)) if is_short else 0


@contextlib.contextmanager
def collected() -> Iterator[None]:
    """Keep Python's collector of cycles out of the samples."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def repeats(seconds_of: Callable[[int], float]) -> int:
    """Return how many calls last as long as a sample should: doubled until they nearly do, then in proportion."""
    wanted_s, count = sample_s(), 1
    while (took_s := seconds_of(count)) < wanted_s / 4:
        count *= 2
    return max(1, round(count * wanted_s / max(took_s, 1e-9)))


@functools.cache
def sample_s() -> float:
    """Return how long a sample should last: `SAMPLE_S`, or longer by a coarse clock."""
    return max(SAMPLE_S, STEPS_OF_CLOCK * min(_clock_steps(50)))


def _clock_steps(count: int) -> Iterator[float]:
    for _ in range(count):
        start = now = time.perf_counter()
        while now == start:
            now = time.perf_counter()
        yield now - start


def _scale(spec: Spec) -> Callable[[float], float]:
    """Return what turns the seconds of a call into the unit."""
    if spec.unit == "s":
        return float
    amount = {"B/s": spec.work.bytes, "FLOP/s": spec.work.flops}.get(spec.unit) if spec.work is not None else None
    if not amount:
        raise ValueError(f"{spec.name}: {spec.unit} needs what a call moves or computes: give Spec.work")
    return lambda seconds: amount / seconds


def _guess_s(spec: Spec, device: str) -> float:
    """Return what a first visit may take: a dozen calls on a slow machine, and no less than its samples."""
    work, scale = spec.work or Work(), 1.0 if device == "cpu" else 0.01
    return 0.05 + 12 * scale * max(work.bytes / 10e9, work.flops / 50e9)


# ---------------------------------------------------------------- cold caches


def rotated(
    first: T, copy: Callable[[T], T], *, each_bytes: float, device: str = "cpu", total_bytes: float | None = None
) -> Callable[[], T]:
    """Return what gives one of several copies at each call, in turn: together beyond any cache, as far as memory allows."""
    wanted = total_bytes if total_bytes is not None else COLD * cache_bytes(device)
    count = max(1, math.ceil(min(wanted, MEMORY_SHARE * free_bytes(device)) / max(each_bytes, 1.0)))
    turn = itertools.cycle([first, *(copy(first) for _ in range(count - 1))])
    return lambda: next(turn)


@functools.cache
def cache_bytes(device: str = "cpu") -> int:
    """Return the size of the last-level caches that this process's cores have: those of the first call count, once it is pinned."""
    if device != "cpu":
        import torch

        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", memory.UNKNOWN_CACHE_BYTES))
    return memory.cache_bytes()


def free_bytes(device: str = "cpu") -> float:
    """Return the memory that is free, 1 GiB where nothing tells it."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    return float(memory.available_bytes() or UNKNOWN_BYTES)


def steady_bytes(wanted: float, device: str = "cpu") -> float:
    """Return how much of `wanted` one benchmark may take: the same in each launch, though what is free changes from one to the next.

    A share of all memory, or half of what is free, down to a power of two, where others leave less than twice that.
    """
    free = free_bytes(device)
    if device != "cpu":
        return min(wanted, MEMORY_SHARE * free)
    asked = min(wanted, MEMORY_SHARE * float(memory.total_bytes() or UNKNOWN_BYTES))
    return asked if 2 * asked <= free else float(2 ** math.floor(math.log2(max(free / 2, 4096.0))))


def _flusher(device: str) -> Callable[[], object]:
    """Return what fills the caches with something else."""
    import torch

    room = torch.empty(COLD * cache_bytes(device), dtype=torch.int8, device=device)
    return room.zero_


# ---------------------------------------------------------------- warm-up


def warm_up(work: Callable[[], object], *, block: int = WARM_BLOCK, agree: float = 0.01, tries: int = 8, patience_s: float = 2.0) -> float:
    """Repeat blocks until two in a row overlap, or tries or patience end; return the last median in seconds.

    Blocks of `block` samples of one law lie wholly apart by chance in 2 of C(2 block, block) cases: 0.8 % for 5, 10 % for 3, which costs
    one block more.  Medians within `agree` count as overlapping.
    """
    deadline = time.perf_counter() + patience_s
    last: list[float] = []
    for _ in range(tries):
        times = list(_times(work, block, deadline))
        if (last and not drifts(last, times, agree)) or time.perf_counter() > deadline:
            break
        last = times
    return statistics.median(times)


def drifts(before: Sequence[float], after: Sequence[float], agree: float) -> bool:
    """Say whether two blocks lie wholly apart, and their medians by more than so much."""
    apart = max(after) < min(before) or min(after) > max(before)
    return apart and abs(statistics.median(after) / statistics.median(before) - 1) > agree


def _times(work: Callable[[], object], count: int, deadline: float) -> Iterator[float]:
    for i in range(count):
        if i and time.perf_counter() > deadline:
            return
        start = time.perf_counter()
        work()
        yield time.perf_counter() - start


# ---------------------------------------------------------------- rounds


class Hearer(Protocol):
    """Who is told what happens."""

    def sampled(self, planned: Spec, sampled: Sampled) -> None:
        """Hear of one round of samples."""

    def checked(self, planned: Spec, error: float, tolerance: float | None) -> None:
        """Hear of the error of an operator's output."""

    def refused(self, planned: Spec, why: str) -> None:
        """Hear that something is not measured in this launch."""

    def progressed(self, done: int, of: int, left_s: float) -> None:
        """Hear how many tasks are through, and how long the rest takes at most."""


class _Course:
    """One task on its way through a launch."""

    def __init__(self, task: Task) -> None:
        self.task, self.cost_s, self.credit_s, self.visits = task, task.cost_s, 0.0, 0
        self.is_refused = False
        self._settled_at: float | None = None  # the least crowding of the launch when it did; infinite where nothing tells
        self._rounds: list[list[Round]] = [[] for _ in task.specs]
        self._next_look = kept.LEAST_BLOCKS

    def is_done(self, least: float) -> bool:
        """Say whether there is nothing more to do; a core since seen much less crowded puts what had settled in doubt."""
        return self.is_refused or (self._settled_at is not None and self._settled_at <= kept.CROWDED * least)

    def visit(self, hearer: Hearer, watch: telemetry.Watch, crowdings: list[float]) -> None:
        """Check the output if that is still to be done, then take samples; note what that cost, and how crowded the cores were."""
        began_s = time.monotonic()
        if self.visits or self._is_right(hearer):
            before = watch.look()
            sampled = self.task.visit()
            disturbance = watch.since(before)
            for planned, found, (spec, taken) in zip(self.task.specs, self._rounds, sampled, strict=True):
                found.append(marked(taken, disturbance, spec.better))
                hearer.sampled(planned, (spec, found[-1]))
            self.visits += 1
            if disturbance.crowding is not None:
                crowdings.append(disturbance.crowding)
            self._look_whether_settled(crowdings)
        self.cost_s = time.monotonic() - began_s
        if self.visits > 1:  # the first one checks and warms up, which no later one does
            self.credit_s -= self.cost_s

    def _is_right(self, hearer: Hearer) -> bool:
        task = self.task
        if task.check is None:
            return True
        try:
            error = task.check()
        except (MlsysError, MemoryError, RuntimeError) as failed:  # torch's are the last; all else is measured all the same
            self.is_refused = True
            why = next(iter(str(failed).splitlines()), type(failed).__name__)
            for planned in task.specs:
                hearer.refused(planned, f"it cannot be computed here: {why}")
            return False
        for planned in task.specs:
            hearer.checked(planned, error, task.tolerance)
            if wrong := wrong_output(error, task.tolerance):
                self.is_refused = True
                hearer.refused(planned, wrong)
        return not self.is_refused

    def _look_whether_settled(self, crowdings: Sequence[float]) -> None:
        """Look at visits that grow by a quarter: asked after each, luck would say yes too often."""
        if self.visits >= self._next_look:
            self._next_look = math.ceil(CHECK_GROWTH * self.visits)
            least = kept.least_crowding(crowdings)
            clean = (kept.blocks_of(kept.without_crowded(rounds, least)) for rounds in self._rounds)
            self._settled_at = least if all(kept.ended(blocks) == "settled" for blocks in clean) else None


def visit_all(
    tasks: Sequence[Task],
    *,
    rounds: int,
    deadline: float,
    rng: np.random.Generator,
    hearer: Hearer,
    watch: telemetry.Watch | None = None,
) -> list[Task]:
    """Visit the tasks in rounds, the first cheapest first, then in random order, each until it has settled; return those never visited.

    Random order spreads the drift of a machine over all tasks.  Time is shared fairly: each round credits every task with the median
    visit's time, and one that is in debt sits out.  A visit is begun only if it should end before the deadline.
    """
    watch = watch or telemetry.Disturbances(())
    courses, crowdings = [_Course(task) for task in tasks], list[float]()
    for number in range(rounds):
        least = kept.least_crowding(crowdings)
        at_work = [course for course in courses if not course.is_done(least) and _fits(course, deadline)]
        if not at_work:
            break
        share_s = statistics.median(course.cost_s for course in at_work)
        for course in sorted(at_work, key=lambda c: c.cost_s) if number == 0 else [at_work[i] for i in rng.permutation(len(at_work))]:
            course.credit_s += share_s
            if (course.visits and course.credit_s < -_DEBT * share_s) or not _fits(course, deadline):
                continue
            course.visit(hearer, watch, crowdings)
            done = sum(course.is_done(least) for course in courses)
            hearer.progressed(done, len(courses), max(0.0, deadline - time.monotonic()))
    return [course.task for course in courses if not course.visits and not course.is_refused]


def _fits(course: _Course, deadline: float) -> bool:
    return time.monotonic() + _SLACK * course.cost_s <= deadline


def marked(taken: Round, seen: telemetry.Disturbance, better: Literal["lower", "higher"]) -> Round:
    """Return the round with its disturbed samples flagged.

    All of them where the hypervisor or a throttle slowed the visit.  Else those that were forced off their CPU, where each knows; where
    only their number is known, so many of the slowest: to ask before and after every sample would take 2 us each.  How crowded its cores
    were stays with the round: which crowding is that of a core by itself is known at the end.
    """
    n = len(taken.values)
    if seen.slowed:
        flags = np.ones(n, dtype=bool)
    elif taken.involuntary is not None:
        flags = np.asarray(taken.involuntary) > 0
    else:
        order = np.argsort(taken.values)
        slowest = order[::-1] if better == "lower" else order
        flags = np.isin(np.arange(n), slowest[: seen.involuntary])
    crowding, clock_hz = (None if of_visit is None else (of_visit,) * n for of_visit in (seen.crowding, seen.clock_hz))
    return dataclasses.replace(taken, flagged=tuple(flags.tolist()) if flags.any() else None, crowding=crowding, clock_hz=clock_hz)


def wrong_output(error: float, tolerance: float | None) -> str | None:
    """Return why an operator with this error is not reported, None where it is right."""
    if math.isnan(error):
        return "its output is not a number, so its speed means nothing"
    if tolerance is not None and error > tolerance:
        return f"its output is off by {error:.2g} of the reference, {tolerance:.2g} is allowed, so its speed means nothing"
    return None
