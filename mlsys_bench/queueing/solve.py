"""One entry for every system: choose the method, say which and why, and answer with the error to expect.

Exact numerics where they exist; then a formula, where its expected error is within the tolerance; then simulation — beside a control
whose exact answer is known where there is one, from scratch where there is none.  `stations` and `systems` hold the choices.
"""

from __future__ import annotations

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing import stations, systems
from mlsys_bench.queueing.answer import Answer, Effort
from mlsys_bench.queueing.checks import check
from mlsys_bench.queueing.simulated import simulate
from mlsys_bench.queueing.station import Balanced, Batches, ForkJoin, Network, Priorities, Slots, Station, System, Tokens


def solve(system: System, *, tolerance: float = 0.02, budget_s: float = 2.0, seed: int = 0) -> Answer:
    """Return the steady state of a system with its method, the reason for it, and its expected relative error.

    `tolerance` is the relative error wanted of means and percentiles; a simulation that cannot reach it within `budget_s` says what it
    reached.  `tolerance=math.inf` takes any formula there is; 0 simulates, for the whole budget, whatever has no exact answer.
    Raises Overload at or above saturation, with the utilisation and the servers that would do; BadInput for a system that makes no sense.
    """
    if not tolerance >= 0:
        raise BadInput(f"a tolerance of {tolerance} is not a number from 0 up")
    if not budget_s >= 0 or not isinstance(seed, int) or seed < 0:
        raise BadInput(f"a budget of {budget_s} s and a seed of {seed!r}: seconds from 0 up and a whole number from 0 up are needed")
    check(system)
    effort = Effort(tolerance=tolerance, budget_s=budget_s, seed=seed)
    match system:
        case Station():
            return stations.solve_station(system, effort)
        case Priorities():
            return systems.solve_priorities(system, effort)
        case Balanced():
            return systems.solve_balanced(system, effort)
        case Batches():
            return systems.solve_batches(system, effort)
        case Slots():
            return systems.solve_slots(system, effort)
        case ForkJoin():
            return systems.solve_forkjoin(system, effort)
        case Network():
            return systems.solve_network(system, effort)
        case Tokens():
            return simulate(system, effort, "token by token there is no formula")
        case _:
            raise BadInput(f"solve takes a Station or another system of queueing.station, not {system!r}")
