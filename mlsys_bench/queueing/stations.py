"""Which method answers one queue before equal servers: the choice, in the order it is made."""

from __future__ import annotations

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.answer import Answer, Effort, exact, poisson_rate, rate_of, stable
from mlsys_bench.queueing.laws import Deterministic, Exponential, Law
from mlsys_bench.queueing.simulated import formula_or_run, simulate
from mlsys_bench.queueing.station import Bursts, Station


def solve_station(station: Station, effort: Effort) -> Answer:
    """Return the answer for one station: those that lose customers first, for they need no stability."""
    if station.servers < 1:
        raise BadInput(f"{station.servers} servers: at least one is needed")
    if station.patience is not None:
        return _impatient(station, station.patience, effort)
    if station.capacity is not None:
        return _finite(station, station.capacity, effort)
    stable(rate_of(station.arrivals), station.service.mean_s, station.servers)
    if station.sharing:
        return _shared(station, effort)
    if isinstance(station.arrivals, Bursts):
        return _bursty(station, station.arrivals, effort)
    rate = poisson_rate(station.arrivals)
    return _renewal(station, station.arrivals, effort) if rate is None else _poisson(station, rate, effort)


def _impatient(station: Station, patience: Law, effort: Effort) -> Answer:
    rate, service = poisson_rate(station.arrivals), station.service
    if rate is None or not isinstance(service, Exponential) or station.capacity is not None or station.sharing:
        return simulate(station, effort, "customers who give up are computed for Poisson arrivals and exponential service only")
    from mlsys_bench.queueing import patience as room

    if isinstance(patience, Exponential):
        found = room.erlang_a(rate, service.mean_s, station.servers, patience.mean_s)
        return exact(found.queue, "M/M/c+M", "exponential patience: Erlang A, by the density of the wait offered")
    if isinstance(patience, Deterministic):
        found = room.fixed_patience(rate, service.mean_s, station.servers, patience.mean_s)
        return exact(found.queue, "M/M/c+D", "one timeout for all: by the density of the wait offered")
    found = room.impatient(rate, service.mean_s, station.servers, patience)
    return exact(found.queue, "M/M/c+G", f"patience of law {patience}: by the density of the wait offered")


def _finite(station: Station, capacity: int, effort: Effort) -> Answer:
    rate, service, servers = poisson_rate(station.arrivals), station.service, station.servers
    if capacity < servers:
        raise BadInput(f"a capacity of {capacity} is less than the {servers} servers")
    if rate is None or station.sharing:
        return simulate(station, effort, "finite queues are computed for Poisson arrivals only")
    from mlsys_bench.queueing import mmc

    if capacity == servers:
        return exact(mmc.loss(rate, service, servers), "M/G/c/c", "nobody waits: Erlang's loss formula, for any law of service")
    if isinstance(service, Exponential):
        return exact(mmc.mmck(rate, service.mean_s, servers, capacity), "M/M/c/K", "finite queue: a birth-death chain")
    if servers == 1:
        from mlsys_bench.queueing.single import mg1k

        return exact(mg1k(rate, service, capacity), "M/G/1/K", "finite queue, one server: the chain embedded at departures")
    return simulate(station, effort, "a finite queue with several servers and general service has no numerics here")


def _shared(station: Station, effort: Effort) -> Answer:
    rate = poisson_rate(station.arrivals)
    if rate is None or not isinstance(station.service, Exponential):
        return simulate(station, effort, "percentiles under processor sharing are computed for M/M/c only")
    from mlsys_bench.queueing.sharing import mmcps

    return exact(mmcps(rate, station.service.mean_s, station.servers), "M/M/c-PS", "processor sharing: the chain a tagged customer sees")


def _poisson(station: Station, rate: float, effort: Effort) -> Answer:
    service, servers = station.service, station.servers
    if isinstance(service, Exponential):
        from mlsys_bench.queueing.mmc import mmc

        return exact(mmc(rate, service.mean_s, servers), "M/M/c", "Poisson arrivals, exponential service: Erlang's closed form")
    if isinstance(service, Deterministic):
        from mlsys_bench.queueing.mdc import mdc

        return exact(mdc(rate, service.mean_s, servers), "M/D/c", "Poisson arrivals, constant service: Crommelin's chain, Franx's law")
    if servers == 1:
        from mlsys_bench.queueing.single import mg1

        return exact(mg1(rate, service), "M/G/1", "Poisson arrivals, one server: Pollaczek and Khinchine")
    from mlsys_bench.queueing.mgc import mgc

    queue, error, why = mgc(rate, service, servers)
    method = "M/PH/c" if service.phases() is not None else "M/G/c"
    return formula_or_run(Answer(queue=queue, method=method, why=why, expected_error=error), station, effort)


def _renewal(station: Station, arrivals: Law, effort: Effort) -> Answer:
    service, servers = station.service, station.servers
    if isinstance(service, Exponential):
        from mlsys_bench.queueing.gimc import gimc

        return exact(gimc(arrivals, service.mean_s, servers), "GI/M/c", "exponential service: Takacs's embedded chain")
    if servers == 1:
        from mlsys_bench.queueing.spitzer import gig1

        why = "one server: Spitzer's identity on a lattice"
        return formula_or_run(Answer(queue=gig1(arrivals, service), method="GI/G/1", why=why, expected_error=0.005), station, effort)
    from mlsys_bench.queueing.mgc import gigc

    queue, error, why = gigc(arrivals, service, servers)
    return formula_or_run(Answer(queue=queue, method="GI/G/c", why=why, expected_error=error), station, effort)


def _bursty(station: Station, bursts: Bursts, effort: Effort) -> Answer:
    if not isinstance(station.service, Exponential):
        return simulate(station, effort, "bursts with general service have no numerics here")
    from mlsys_bench.queueing.qbd import mmpp_mc

    queue = mmpp_mc(bursts, station.service.mean_s, station.servers)
    return exact(queue, "MMPP/M/c", "bursts in phases, exponential service: a quasi-birth-death chain")
