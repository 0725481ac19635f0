"""An answer with its method, its reason and its expected error; and what every choice of a method needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlsys_bench.errors import Overload
from mlsys_bench.queueing.laws import Exponential, Law
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.station import Bursts

if TYPE_CHECKING:
    from mlsys_bench.queueing.des import Simulated
    from mlsys_bench.queueing.des.tokens_replicate import TokensSimulated

EXACT = 1e-6  # relative error of what is computed without approximation: rounding, truncation and inversion


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A system in steady state, how that was found, and how far off it may be."""

    queue: Queue  # of all customers
    method: str
    why: str
    expected_error: float  # relative, of means and percentiles
    classes: tuple[Queue, ...] = ()  # one per class, where there are classes
    simulated: Simulated | None = None  # the run behind it, with intervals of its own
    tokens: TokensSimulated | None = None  # of a replica token by token: TTFT, E2E, TPOT and ITL

    @property
    def exact(self) -> bool:
        """Whether nothing was approximated."""
        return self.expected_error <= EXACT

    def interval_s(self, p: float, of: Literal["wait", "sojourn"] = "sojourn") -> tuple[float, float]:
        """Return the interval around a percentile: that of the simulation where there was one, else the expected error either way."""
        time = self.queue.wait if of == "wait" else self.queue.sojourn  # of those served, not of all who came
        if self.simulated is not None:
            from mlsys_bench.queueing.des.tally import Estimate

            if isinstance(time, Estimate):
                return time.interval_s(p)
        value = time.quantile_s(p)
        return value * max(1 - self.expected_error, 0.0), value * (1 + self.expected_error)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much to spend: the relative error to reach, the seconds a simulation may take, and its seed."""

    tolerance: float = 0.02
    budget_s: float = 2.0
    seed: int = 0


def exact(queue: Queue, method: str, why: str, classes: tuple[Queue, ...] = ()) -> Answer:
    """Return an answer that approximates nothing."""
    return Answer(queue=queue, method=method, why=why, expected_error=EXACT, classes=classes)


def stable(rate_per_s: float, service_s: float, servers: int) -> None:
    """Raise Overload, with the servers that would do, when the load is at or above what the servers can take."""
    offered = rate_per_s * service_s
    if offered >= servers:
        raise Overload(offered / servers, servers, enough=math.floor(offered) + 1)


def rate_of(arrivals: Law | Bursts) -> float:
    """Return the mean arrivals per second."""
    return arrivals.rate_per_s if isinstance(arrivals, Bursts) else 1 / arrivals.mean_s


def poisson_rate(arrivals: Law | Bursts) -> float | None:
    """Return the rate of a Poisson stream, None for any other."""
    return 1 / arrivals.mean_s if isinstance(arrivals, Exponential) else None
