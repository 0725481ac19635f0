"""Which stations to simulate beside one: near enough to share its luck, simple enough to be known exactly."""

from __future__ import annotations

from dataclasses import dataclass

from mlsys_bench.queueing.crowd import Crowd, ladder
from mlsys_bench.queueing.fit import fit2, three_moments, two_moments
from mlsys_bench.queueing.gimc import gimc
from mlsys_bench.queueing.laws import Deterministic, Erlang, Exponential, Law, PhaseType
from mlsys_bench.queueing.mdc import mdc
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.modes import of_phases
from mlsys_bench.queueing.qbd import answer, crowd_wait, kept, mmpp_mc, mphc
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.station import Bursts, Station


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A station like the one asked about, whose exact answer is known.  `arrivals` None: the very same."""

    service: Law
    exact: Queue
    arrivals: Law | None = None

    def __str__(self) -> str:
        """Return the twin's laws."""
        return f"{self.arrivals or 'same arrivals'}, {self.service}"


def twins_of(station: Station) -> tuple[Twin, ...]:
    """Return the stations to simulate beside one: up to three, whose laws lie on either side of its own.

    Poisson arrivals: services of few phases (M/PH/c) or constant ones (M/D/c), see `stand_ins`.  Renewal arrivals: PH/PH/c with arrivals of
    few phases, that come early and late together with its own, and GI/M/c with the very same ones.  Bursts: MMPP/M/c.
    """
    service, servers, arrivals = station.service, station.servers, station.arrivals
    if isinstance(arrivals, Bursts):
        return (Twin(service=Exponential(service.mean_s), exact=mmpp_mc(arrivals, service.mean_s, servers)),)
    near = _few_phases(arrivals)
    asked = [(near, law) for law in stand_ins(service)]
    if not isinstance(near, Exponential):
        asked = [(a, s) for a, s in asked if not isinstance(s, Deterministic)]
    if near != arrivals:
        asked = [(arrivals, Exponential(service.mean_s)), *asked]
    return tuple(Twin(arrivals=None if a == arrivals else a, service=s, exact=known(a, s, servers)) for a, s in asked)


def known(arrivals: Law, service: Law, servers: int) -> Queue:
    """Return the exact station of a pair of laws that has one: two phases of service at most, or a constant one and Poisson arrivals."""
    if isinstance(service, Exponential):
        poisson = isinstance(arrivals, Exponential)
        return mmc(1 / arrivals.mean_s, service.mean_s, servers) if poisson else gimc(arrivals, service.mean_s, servers)
    if isinstance(arrivals, Exponential):
        constant, rate_per_s = isinstance(service, Deterministic), 1 / arrivals.mean_s
        return mdc(rate_per_s, service.mean_s, servers) if constant else mphc(rate_per_s, _phases(service), servers)
    rate_per_s, modes = 1 / arrivals.mean_s, of_phases(_phases(service))
    crowd = Crowd(modes, ladder(*kept(len(modes.start), servers)))
    wait = crowd_wait(of_phases(_phases(arrivals)), crowd, servers, rate_per_s * service.mean_s)
    return answer(rate_per_s, wait, service, servers)


def _phases(law: Law) -> PhaseType:
    phases = law.phases()
    assert phases is not None
    return phases


def _few_phases(arrivals: Law) -> Law:
    """Return the law itself where few phases make it, else a near one that is."""
    phases = arrivals.phases()
    if phases is not None and len(phases.alpha) <= 5:
        return arrivals
    if arrivals.scv >= 0.5:
        return fit2(arrivals)
    return Erlang(min(5, round(1 / max(arrivals.scv, 0.2))), arrivals.mean_s)


def stand_ins(service: Law) -> tuple[Law, ...]:
    """Return laws of service whose stations are known, on either side of the one given.

    Two phases at most: itself.  SCV below 0.5: constant, and two phases in a row of SCV 0.55 and 0.75.  To SCV 1.1: a more and a less
    regular law of two phases, the latter with a long tail.  Above: the two-moment and the three-moment fit (`fit.pair`).
    Measured on lognormal, uniform and gamma services, c = 4 to 64 and rho 0.8 to 0.97: two laws that bracket the law narrow the interval
    of p99 about 1.5 times more than the best one alone.
    """
    phases, mean_s, scv = service.phases(), service.mean_s, service.scv
    if phases is not None and len(phases.alpha) <= 2:
        return (service,)
    if scv < 0.5:
        return Deterministic(mean_s), two_moments(mean_s, 0.55), two_moments(mean_s, 0.75)
    if scv < 1.1:
        wide = 1.5 * scv
        irregular = two_moments(mean_s, wide) if wide <= 1 else three_moments(mean_s, wide, 2.25 * (1 + wide) ** 2)
        return two_moments(mean_s, max(0.55, 0.7 * scv)), irregular
    plain = two_moments(mean_s, scv)
    if 0.8 <= service.third / plain.third <= 1.25:
        return fit2(service), two_moments(mean_s, 1.5 * scv)
    return plain, three_moments(mean_s, scv, service.third)
