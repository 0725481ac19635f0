"""Which simulator stands behind each system."""

from __future__ import annotations

from functools import partial

from mlsys_bench.queueing.des import balancing_sim, batches_sim, forkjoin_sim, network_sim, priorities_sim, station_sim, tokens
from mlsys_bench.queueing.des.replicate import Simulator
from mlsys_bench.queueing.station import Balanced, Batches, ForkJoin, Network, Priorities, Slots, Station, System, Tokens


def simulator(system: System) -> Simulator:
    """Return what simulates a system: a function of a generator, a number of runs and of customers in each.

    Every run starts empty.  Two systems simulated from equal generators meet the same customers with the same work.
    """
    match system:
        case Station(capacity=None, patience=None, sharing=False):
            from mlsys_bench.queueing.des import recursion

            return recursion.simulator(system)
        case Station():
            return partial(station_sim.simulate, system)
        case Slots():
            return partial(station_sim.slots, system)
        case Priorities():
            return partial(priorities_sim.simulate, system)
        case Balanced():
            return partial(balancing_sim.simulate, system)
        case Batches():
            return partial(batches_sim.simulate, system)
        case ForkJoin():
            return partial(forkjoin_sim.simulate, system)
        case Network():
            return partial(network_sim.simulate, system)
        case Tokens():
            return partial(tokens.visits, system)
