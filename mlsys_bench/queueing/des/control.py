"""A station confirmed beside stations that are known: the same arrivals, services long and short together, an exact answer to compare with.

Near saturation the noise of a simulation is mostly luck with arrivals and services, which such a twin shares.  Regression on it
(`corrected`) makes intervals 2 to 10 times narrower, worth 4 to 100 times the customers.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mlsys_bench.queueing.des import recursion
from mlsys_bench.queueing.des.corrected import Control, Corrected
from mlsys_bench.queueing.des.replicate import Simulated, check_asked, off_by, run_until
from mlsys_bench.queueing.des.runs import Batches, Pilot, Visits, find_warm_up, long_enough
from mlsys_bench.queueing.des.streams import arrival_times
from mlsys_bench.queueing.des.tables import Drawn
from mlsys_bench.queueing.des.tally import GROUPS, Tally
from mlsys_bench.queueing.des.twins import Twin, twins_of
from mlsys_bench.queueing.station import Bursts, Station
from mlsys_bench.queueing.times import Floats

MANY = 4.0  # warm-up as in `replicate.warm_up`, but shorter: twins begin empty too, and correct for most of what is left of that


def confirm(
    station: Station,
    *,
    seed: int,
    p: Sequence[float] = (0.5, 0.9, 0.95, 0.99),
    half_width: float = 0.02,
    budget_s: float = 2.0,
    twins: Sequence[Twin] | None = None,
) -> Simulated:
    """Return a G/G/c station, simulated beside its twins until each percentile p is known to the half-width or the budget ends.

    `twins` None: those of `twins_of`.  Otherwise as `replicate`: warm-up by a test, an interval for every figure, the same result for
    the same seed unless the clock stopped it.  Raises Overload at or above saturation.
    Checked in the tests: M/M/c beside twins that are not M/M/c covers the exact figures, as its intervals say.
    """
    begun = time.perf_counter()
    check_asked(p, half_width)
    recursion.check(station)
    beside = twins_of(station) if twins is None else tuple(twins)
    batches = Batches(_Pairs(station, beside), seed=seed, until=begun + budget_s)
    pilot = find_warm_up(batches, _visits, first=_first(station), many=MANY)
    totals = _Totals(station, beside, pilot)
    reached = run_until(batches, pilot.run_length, totals.add, lambda: off_by(*totals.corrected(), p, half_width))
    wait, sojourn = totals.corrected()
    return Simulated(
        wait=wait,
        sojourn=sojourn,
        p_wait=wait.p_over(0.0),
        p_wait_interval=wait.p_over_interval(0.0),
        kinds={},
        customers=wait.own.customers,
        runs=totals.runs,
        warm_up=pilot.warm_up,
        settled=pilot.settled,
        reached=reached and pilot.settled,
        stopped_by="precision" if reached else "clock",
        seconds=time.perf_counter() - begun,
        twins=tuple(str(twin) for twin in beside),
    )


def _first(station: Station) -> int:
    """Return how long a run has to be before its warm-up can be looked for."""
    scv = 1.0 if isinstance(station.arrivals, Bursts) else station.arrivals.scv
    rho = recursion.rate_per_s(station) * station.service.mean_s / station.servers
    return long_enough(rho, scv + station.service.scv, station.servers)


class Pair(NamedTuple):
    """Waits and services [runs, n] of a station, then of each twin, and when its customers came."""

    wait_s: list[Floats]
    service_s: list[Floats]
    arrive_s: Floats


def _visits(pair: Pair) -> Visits:
    return Visits(pair.wait_s[0], pair.wait_s[0] + pair.service_s[0])


class _Pairs:
    """Draws a station and its twins from the same uniform numbers."""

    def __init__(self, station: Station, twins: Sequence[Twin]) -> None:
        self.station = station
        self.services = [Drawn(station.service), *(Drawn(twin.service) for twin in twins)]
        self.arrivals = [None if twin.arrivals is None else Drawn(twin.arrivals) for twin in twins]
        self.own = None if isinstance(station.arrivals, Bursts) else Drawn(station.arrivals)

    def __call__(self, rng: np.random.Generator, runs: int, n: int) -> Pair:
        arrivals, services, _ = rng.spawn(3)
        if self.own is None or not any(self.arrivals):
            arrive_s = [arrival_times(self.station.arrivals, arrivals, runs, n)] * len(self.services)
        else:
            u = arrivals.random((runs, n))
            first = np.cumsum(self.own(u), axis=1)
            arrive_s = [first, *(first if law is None else np.cumsum(law(u), axis=1) for law in self.arrivals)]
        u = services.random((runs, n))
        service_s = [law(u) for law in self.services]
        wait_s = [recursion.waits(a, s, self.station.servers) for a, s in zip(arrive_s, service_s, strict=True)]
        return Pair(wait_s, service_s, arrive_s[0])


class _Totals:
    """Counts of the station and of its twins, group by group."""

    def __init__(self, station: Station, twins: Sequence[Twin], pilot: Pilot[Pair]) -> None:
        self.station, self.twins, self.warm_up, self.runs = station, twins, pilot.warm_up, 0
        unit_s = float((pilot.drawn[0].wait_s[0] + pilot.drawn[0].service_s[0]).mean())
        self.waits, self.sojourns = ([Tally(unit_s) for _ in range(1 + len(twins))] for _ in range(2))
        self.served_s, self.gaps_s = np.zeros(GROUPS), np.zeros(GROUPS)
        for pair in pilot.drawn:
            self.add(pair)

    def add(self, pair: Pair) -> None:
        """Count a batch of runs."""
        groups = (self.runs + np.arange(len(pair.arrive_s))) % GROUPS
        self.runs += len(groups)
        for k, (wait_s, service_s) in enumerate(zip(pair.wait_s, pair.service_s, strict=True)):
            self.waits[k].add(wait_s[:, self.warm_up :], groups)
            self.sojourns[k].add((wait_s + service_s)[:, self.warm_up :], groups)
        np.add.at(self.served_s, groups, pair.service_s[0][:, self.warm_up :].sum(axis=1))
        np.add.at(self.gaps_s, groups, pair.arrive_s[:, -1] - pair.arrive_s[:, self.warm_up])

    def corrected(self) -> tuple[Corrected, Corrected]:
        """Return wait and sojourn, corrected by the twins, and by how long services and gaps came out on average."""
        own = self.waits[0].measured(), self.sojourns[0].measured()
        n = own[0].n
        linear = [self.served_s[: len(n)] - n * self.station.service.mean_s, *self._gaps(n)]
        waits = [Control(tally.measured(), twin.exact.wait) for tally, twin in zip(self.waits[1:], self.twins, strict=True)]
        sojourns = [Control(tally.measured(), twin.exact.sojourn) for tally, twin in zip(self.sojourns[1:], self.twins, strict=True)]
        return Corrected(own[0], waits, linear), Corrected(own[1], sojourns, linear)

    def _gaps(self, n: Floats) -> list[Floats]:
        """Return by how much the times between arrivals add up to more than expected; nothing for bursts, which start between arrivals."""
        if isinstance(self.station.arrivals, Bursts):
            return []
        runs = np.bincount(np.arange(self.runs) % GROUPS, minlength=GROUPS)[: len(n)]
        return [self.gaps_s[: len(n)] - (n - runs) * self.station.arrivals.mean_s]
