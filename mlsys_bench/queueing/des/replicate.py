"""Replications of a simulator: warm-up found by a test, runs until the asked precision or the end of the budget, intervals for all."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.des.jit import HAVE_NUMBA
from mlsys_bench.queueing.des.tally import GROUPS, Estimate, Tally
from mlsys_bench.queueing.times import Floats, check_share

SHORTEST, LONGEST = 2**10, 2**21  # customers in a run
CELLS = 2**20  # customers in a batch of runs: 0.1 s compiled
PILOT = 2**22  # most customers in the runs that show the warm-up: bounds memory
WINDOWS = 512  # of a run, looked at for its warm-up
CLOSE = 0.1  # how near its end a mean has to come, and
MANY = 8.0  # after how many times as long it has arrived: see `warm_up`
SHARE = 4  # a run is at least so many warm-ups long
KNOWN = 0.3  # a mean not known to this at its end says nothing about its start
NEGLIGIBLE = 0.01  # of a service time: waits below are held to an absolute width
THREADS = 2 if HAVE_NUMBA else 1

Stop = Literal["precision", "clock"]
Drawn = TypeVar("Drawn")


class Visits(NamedTuple):
    """What customers met, in order of arrival; each run begins with an empty station."""

    wait_s: Floats  # [runs, n]
    sojourn_s: Floats  # [runs, n]
    kind: npt.NDArray[np.int64] | None = None  # [runs, n] class or other label


Simulator = Callable[[np.random.Generator, int, int], Visits]  # (rng, runs, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Customers of one label: their share of all, and their times."""

    share: float
    wait: Estimate
    sojourn: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A system in steady state, simulated: `wait` and `sojourn` of all customers answer any percentile with its interval."""

    wait: Estimate
    sojourn: Estimate
    p_wait: float
    p_wait_interval: tuple[float, float]
    kinds: Mapping[int, Kind]  # empty where customers carry no label
    customers: int  # counted: without those of the warm-up
    runs: int
    warm_up: int  # customers left out at the start of every run
    settled: bool  # whether the warm-up was found in time; if not, the start still shows in every figure
    reached: bool  # whether every asked percentile is known to the asked half-width
    stopped_by: Stop
    seconds: float
    twins: tuple[str, ...] = ()  # stations simulated beside it to correct it, see `control`


def replicate(
    simulator: Simulator,
    *,
    seed: int,
    p: Sequence[float] = (0.5, 0.9, 0.95, 0.99),
    half_width: float = 0.02,
    budget_s: float = 2.0,
    first: int = SHORTEST,
) -> Simulated:
    """Return a system simulated until each percentile p of wait and sojourn is known to the relative half-width, or the budget ends.

    Runs are independent and start empty; their first `warm_up` customers are not counted (see `warm_up`).  Where customers carry
    labels each label has to be known, not all together; waits below a hundredth of a service time are held to that hundredth.
    `first` customers are the shortest run: enough to fill the system many times over, or its empty start looks like its steady state.
    What is drawn depends on the seed alone: a run that ends by `precision` repeats to the last digit, the clock is only a guard.
    Checked in the tests against M/M/c: 95 % intervals of p99 cover the exact value in 95 % of seeds, within what chance allows.
    """
    begun = time.perf_counter()
    check_asked(p, half_width)
    batches = Batches(simulator, seed=seed, until=begun + budget_s)
    pilot = find_warm_up(batches, lambda visits: visits, first)
    totals = Totals(pilot.drawn, pilot.warm_up)
    enough = run_until(batches, pilot.run_length, totals.add, lambda: totals.off_by(p, half_width))
    return totals.simulated(pilot, enough, time.perf_counter() - begun)


def run_until(batches: Batches[Drawn], n: int, add: Callable[[Drawn], None], off_by: Callable[[], float]) -> bool:
    """Add batches of runs at least n long until `off_by` - half-widths over what is allowed - is at most 1; return whether it came to that.

    Looking seldom keeps estimates honest: who looks after every batch stops when the noise happens to look small.  So the next look
    is when the width, falling with the square root of what was counted, should do, and the end is a quarter after it first does.
    """
    look, k, met = 1, 0, False
    for k, drawn in enumerate(batches.stream(max(n, CELLS // GROUPS)), 1):
        add(drawn)
        if k == look:
            off = off_by()
            if off <= 1 and met:
                return True
            met = off <= 1
            look = math.ceil(k * (1.25 if met else min(max(off**2, 1.25), 4.0)))
    return off_by() <= 1


def check_asked(p: Sequence[float], half_width: float) -> None:
    """Raise BadInput for a precision or a percentile that cannot be."""
    if not half_width >= 0:
        raise BadInput(f"a half-width of {half_width} is not a number from 0 up")
    for one in p:
        check_share(one)


class Batches(Generic[Drawn]):
    """Batches of runs, each from a stream of its own, two at a time where kernels are compiled; always handed out in order."""

    def __init__(self, simulate: Callable[[np.random.Generator, int, int], Drawn], *, seed: int, until: float) -> None:
        self.simulate, self.until, self.pilot_s, self.customer_s = simulate, until, 0.0, 0.0
        self._seeds = np.random.SeedSequence(seed)

    def _one(self, seed: np.random.SeedSequence, runs: int, n: int) -> tuple[Drawn, float]:
        begun = time.perf_counter()
        return self.simulate(np.random.default_rng(seed), runs, n), time.perf_counter() - begun

    def first(self, n: int) -> list[Drawn]:
        """Return batches that make up the runs of a pilot."""
        runs = max(1, min(GROUPS, PILOT // n))
        begun, per_batch = time.perf_counter(), max(1, min(runs // THREADS, CELLS // n))
        with ThreadPoolExecutor(THREADS) as pool:
            timed = list(pool.map(lambda seed: self._one(seed, per_batch, n), self._seeds.spawn(runs // per_batch)))
        self.pilot_s, self.customer_s = time.perf_counter() - begun, timed[-1][1] / (per_batch * n)
        return [drawn for drawn, _ in timed]

    def stream(self, n: int) -> Iterator[Drawn]:
        """Yield batches until the next would end too late."""
        runs, begun = max(1, CELLS // n), time.perf_counter()
        takes = min(self.customer_s * runs * n, (self.until - begun) / 2)  # the pilot may have waited for a compiler
        with ThreadPoolExecutor(THREADS) as pool:
            under_way: deque[Future[tuple[Drawn, float]]] = deque()
            while True:
                while len(under_way) < THREADS and time.perf_counter() + 1.2 * takes < self.until:
                    under_way.append(pool.submit(self._one, self._seeds.spawn(1)[0], runs, n))
                if not under_way:
                    return
                drawn, takes = under_way.popleft().result()
                yield drawn


class Pilot(NamedTuple, Generic[Drawn]):
    """The first batches long enough to show when their start is forgotten."""

    drawn: list[Drawn]
    run_length: int
    warm_up: int
    settled: bool


def long_enough(utilisation: float, scv: float, places: int) -> int:
    """Return how many customers a run needs before its warm-up can be looked for, a power of two.

    `places` (servers, slots) have to fill, and the queue of a loaded station forgets in about rho^2 scv / (1 - rho)^2 arrivals, scv
    that of arrivals and service added: the time unit of the Brownian motion near it.
    """
    rho = min(utilisation, 0.99)  # those that lose customers may be offered more
    needed = 24 * (rho**2 * scv / (1 - rho) ** 2 + places)
    return int(2 ** min(max(math.ceil(math.log2(needed)), 10), 17))


def find_warm_up(
    batches: Batches[Drawn], visits_of: Callable[[Drawn], Visits], *, first: int = SHORTEST, many: float = MANY
) -> Pilot[Drawn]:
    """Return batches whose warm-up is at most a quarter of their runs: runs grow until it is, or most of the budget is spent.

    A budget that ends before leaves out up to half of every run; when that is less than the warm-up, it is not settled.
    """
    begun, n = time.perf_counter(), first
    while True:
        drawn = batches.first(n)
        cut = warm_up([visits_of(one) for one in drawn], many)
        if cut * SHARE <= n:
            return Pilot(drawn, n, cut, True)
        longer = 2 * n if cut * SHARE <= 2 * n else 4 * n
        if longer > LONGEST or time.perf_counter() + longer / n * batches.pilot_s > begun + 0.7 * (batches.until - begun):
            return Pilot(drawn, n, min(cut, n // 2), 2 * cut <= n)
        n = longer


def warm_up(batches: Sequence[Visits], many: float = MANY) -> int:
    """Return after how many customers the empty start is forgotten, as many as the run has when it cannot tell.

    For each of three means over runs - wait, sojourn, share that waits - let m be where it first comes within a tenth of its end (the
    second half of the run).  The warm-up is `many` = 8 m for the slowest.  Why 8: noise lets m come early, and the queue of a loaded station is near
    a reflected Brownian motion, whose mean is a tenth short at 1.4 of its time units and 0.06 % short at 8.4; the 99th percentile is then
    0.14 % short (by its law when started at 0).  Runs are four warm-ups long, so what is left of the start is a small part of that in
    their average.  Then a last look: where the first third after the warm-up is lower than the rest by 3 standard errors, it was too short.
    """
    n = int(batches[0].wait_s.shape[1])
    per_window = n // WINDOWS
    wait, sojourn = _windows([one.wait_s for one in batches]), _windows([one.sojourn_s for one in batches])
    waits = _windows([(one.wait_s > 0).astype(np.float64) for one in batches])
    cut = math.ceil(many * max(_near_its_end(series) for series in (wait, sojourn, waits)))
    if cut * SHARE <= WINDOWS and any(_still_rises(series[:, cut:]) for series in (wait, sojourn)):
        return n
    return cut * per_window


def _windows(series: Sequence[Floats]) -> Floats:
    """Return the mean of each window of each run, [runs, WINDOWS]."""
    return np.concatenate([one.reshape(len(one), WINDOWS, -1).mean(axis=2) for one in series])


def _near_its_end(windows: Floats) -> int:
    """Return the first m where the mean over the runs and over windows m … 2m is within a tenth of that over the second half.

    Above it noise is forgiven, below it is not: runs rise from empty.  A series not known to 30 % at its end shows no start.
    """
    half = WINDOWS // 2
    end, last = float(windows[:, half:].mean()), windows[:, half:].mean(axis=1)
    if len(last) == GROUPS and float(last.std()) > KNOWN * math.sqrt(len(last)) * end:
        return 0
    summed = np.concatenate([np.zeros((len(windows), 1)), np.cumsum(windows, axis=1)], axis=1)
    m = np.arange(1, half)
    means = (summed[:, 2 * m] - summed[:, m]) / m
    error = means.std(axis=0) / math.sqrt(len(means))
    means = means.mean(axis=0)
    near = (means >= (1 - CLOSE) * end) & (means <= (1 + CLOSE) * end + 2 * error)
    return int(m[near][0]) if near.any() else WINDOWS


def _still_rises(windows: Floats) -> bool:
    """Return whether runs are lower in their first third than after it, by more than three standard errors."""
    third = windows.shape[1] // 3
    rise = windows[:, third:].mean(axis=1) - windows[:, :third].mean(axis=1)
    return len(rise) > 2 and float(rise.mean()) > 3 * float(rise.std(ddof=1)) / math.sqrt(len(rise))


class Totals:
    """Everything counted so far: all customers, and those of each label."""

    def __init__(self, pilot: Sequence[Visits], warm_up: int) -> None:
        self.warm_up, self.runs = warm_up, 0
        self.unit_s = float(pilot[0].sojourn_s[:, warm_up:].mean()) or 1.0
        self.all = self._pair()
        self.kinds: dict[int, tuple[Tally, Tally]] = {}
        for visits in pilot:
            self.add(visits)

    def _pair(self) -> tuple[Tally, Tally]:
        return Tally(self.unit_s), Tally(self.unit_s)

    def add(self, visits: Visits) -> None:
        """Count a batch of runs."""
        wait_s, sojourn_s = visits.wait_s[:, self.warm_up :], visits.sojourn_s[:, self.warm_up :]
        groups = (self.runs + np.arange(len(wait_s))) % GROUPS
        self.runs += len(wait_s)
        self.all[0].add(wait_s, groups)
        self.all[1].add(sojourn_s, groups)
        if visits.kind is not None:
            kind = visits.kind[:, self.warm_up :]
            for label in np.unique(kind):
                wait, sojourn = self.kinds.setdefault(int(label), self._pair())
                wait.add(wait_s, groups, kind == label)
                sojourn.add(sojourn_s, groups, kind == label)

    def off_by(self, p: Sequence[float], half_width: float) -> float:
        """Return the widest interval over what is allowed, of every label, or of all where there are none."""
        parts = list(self.kinds.values()) or [self.all]
        return max(off_by(wait.measured(), sojourn.measured(), p, half_width) for wait, sojourn in parts)

    def simulated(self, pilot: Pilot[Visits], reached: bool, seconds: float) -> Simulated:
        """Return what was counted."""
        wait, sojourn = (tally.measured() for tally in self.all)
        kinds = {
            label: Kind(share=float(one.n.sum() / wait.customers), wait=one.measured(), sojourn=other.measured())
            for label, (one, other) in sorted(self.kinds.items())
        }
        return Simulated(
            wait=wait,
            sojourn=sojourn,
            p_wait=wait.p_over(0.0),
            p_wait_interval=wait.p_over_interval(0.0),
            kinds=kinds,
            customers=wait.customers,
            runs=self.runs,
            warm_up=pilot.warm_up,
            settled=pilot.settled,
            reached=reached and pilot.settled,
            stopped_by="precision" if reached else "clock",
            seconds=seconds,
        )


def off_by(wait: Estimate, sojourn: Estimate, p: Sequence[float], half_width: float) -> float:
    """Return the largest half-width over what is allowed: a share of the percentile, or of a hundredth of a service time below that."""
    floor_s = NEGLIGIBLE * (sojourn.mean_s - wait.mean_s)
    worst = 0.0
    for estimate in (wait, sojourn):
        for one in p:
            low, high = estimate.interval_s(one)
            allowed = half_width * max(estimate.quantile_s(one), floor_s)
            if high > low:
                worst = max(worst, (high - low) / 2 / allowed if allowed > 0 else math.inf)
    return worst
