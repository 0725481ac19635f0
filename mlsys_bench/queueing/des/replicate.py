"""Replications of a simulator: warm-up found by a test, runs until the asked precision or the end of the budget, every figure with its interval."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.des.jit import HAVE_NUMBA
from mlsys_bench.queueing.des.tally import GROUPS, LEVEL, Measured, Tally
from mlsys_bench.queueing.times import Floats, Time

SHORTEST, LONGEST = 1024, 2**21  # customers in a run
CELLS = 2**21  # most customers simulated in one batch of runs: bounds memory
WINDOWS = 512  # of a run, looked at for its warm-up
MANY = 6.0  # warm-up over the time in which the mean comes within a tenth of its end, see `warm_up`
SHARE = 5  # a run is at least so many warm-ups long
NEGLIGIBLE = 0.01  # of a service time: waits below are held to an absolute width
THREADS = 2 if HAVE_NUMBA else 1


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
    wait: Measured
    sojourn: Measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a simulation took, and why it ended."""

    customers: int  # counted: without those of the warm-up
    runs: int
    run_length: int  # customers in a run, warm-up included
    warm_up: int  # customers left out at the start of every run
    settled: bool  # whether the warm-up was found before the budget ended; if not, the start still shows
    reached: bool  # whether every asked percentile is known to the asked half-width
    stopped_by: Literal["precision", "clock", "length"]  # `precision` alone repeats to the last digit
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A system in steady state, simulated: `wait` and `sojourn` of all customers answer any percentile with its interval."""

    wait: Time
    sojourn: Time
    p_wait: float
    p_wait_interval: tuple[float, float]
    effort: Effort
    kinds: Mapping[int, Kind]
