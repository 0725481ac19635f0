"""Which method answers a system that is more than one queue: classes, balancing, batches, slots, fork-join, networks."""

from __future__ import annotations

import math

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.answer import EXACT, Answer, Effort, exact, poisson_rate, stable
from mlsys_bench.queueing.chain import Batching
from mlsys_bench.queueing.laws import Exponential
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.simulated import formula_or_run, simulate
from mlsys_bench.queueing.station import Balanced, Batches, ForkJoin, Network, Priorities, Slots, Station


def solve_priorities(system: Priorities, effort: Effort) -> Answer:
    """Return classes by priority: exact for Poisson streams before one server, or several with one exponential law; else simulated."""
    if not system.arrivals or len(system.arrivals) != len(system.services):
        raise BadInput(f"{len(system.arrivals)} arrival streams, {len(system.services)} service laws: one of each per class is needed")
    stable(sum(s.mean_s / a.mean_s for a, s in zip(system.arrivals, system.services, strict=True)), 1.0, system.servers)
    rates = [rate for a in system.arrivals if (rate := poisson_rate(a)) is not None]
    if len(rates) < len(system.arrivals):
        return simulate(system, effort, "classes are computed for Poisson streams only")
    from mlsys_bench.queueing import priorities

    rule = "preemptive" if system.preemptive else "non-preemptive"
    if len(set(system.services)) == 1 and isinstance(system.services[0], Exponential):
        solve_classes = priorities.preemptive if system.preemptive else priorities.nonpreemptive
        classes = solve_classes(rates, system.services[0].mean_s, system.servers)
        return exact(merged(classes, rates), f"M/M/c, {rule} priorities", "each class waits out busy periods of those above", classes)
    if system.servers == 1:
        solve_laws = priorities.preemptive_mg1 if system.preemptive else priorities.nonpreemptive_mg1
        classes = solve_laws(rates, system.services)
        return exact(merged(classes, rates), f"M/G/1, {rule} priorities", "each class waits out busy periods of those above", classes)
    return simulate(system, effort, "several servers with general service have no exact classes")


def merged(classes: tuple[Queue, ...], rates: list[float]) -> Queue:
    """Return what a customer of any class meets: the classes mixed by their rates."""
    from mlsys_bench.queueing.times import mixture

    total = sum(rates)
    shares = [rate / total for rate in rates]
    return Queue(
        utilisation=classes[-1].utilisation,
        p_wait=sum(share * queue.p_wait for share, queue in zip(shares, classes, strict=True)),
        wait=mixture(shares, [queue.wait for queue in classes]),
        sojourn=mixture(shares, [queue.sojourn for queue in classes]),
        throughput_per_s=total,
    )


def solve_balanced(system: Balanced, effort: Effort) -> Answer:
    """Return a stream dealt to servers with a queue each: random and round robin by formula, the rest simulated."""
    if system.queues < 1:
        raise BadInput(f"{system.queues} queues: at least one is needed")
    stable(1 / system.arrivals.mean_s, system.service.mean_s, system.queues)
    from mlsys_bench.queueing import balancing

    rate = poisson_rate(system.arrivals)
    if system.queues == 1:
        from mlsys_bench.queueing.stations import solve_station

        return solve_station(Station(arrivals=system.arrivals, service=system.service), effort)
    if rate is not None and system.policy == "random":
        queue, error = balancing.random_routing(rate, system.service, system.queues)
        why = "random routing splits a Poisson stream into Poisson streams"
        return formula_or_run(Answer(queue=queue, method="M/G/1 each", why=why, expected_error=error), system, effort)
    if rate is not None and system.policy == "round_robin":
        queue, error = balancing.round_robin(rate, system.service, system.queues)
        why = f"each server takes one arrival in {system.queues}: Erlang times between arrivals"
        return formula_or_run(Answer(queue=queue, method="E_N/G/1 each", why=why, expected_error=error), system, effort)
    if rate is not None and system.policy == "least_work":
        queue, error = balancing.least_work(rate, system.service, system.queues)
        why = "the least work is the server that falls free first: one queue before all servers"
        return formula_or_run(Answer(queue=queue, method="M/G/c", why=why, expected_error=error), system, effort)
    if rate is not None and system.policy == "power_of_d" and isinstance(system.service, Exponential):
        queue, error = balancing.power_of_d_mean_field(rate, system.service.mean_s, system.queues, system.choices)
        why = "the limit of many queues, which is low for few"
        return formula_or_run(Answer(queue=queue, method="mean field", why=why, expected_error=error), system, effort)
    return simulate(system, effort, f"{system.policy} has no numerics")


def solve_batches(system: Batches, effort: Effort) -> Answer:
    """Return dynamic batching: exact for one server that never waits for a batch to fill, else simulated."""
    from mlsys_bench.queueing import batches

    rate = 1 / system.arrivals.mean_s
    limit = batches.capacity_per_s(system.fixed_s, system.per_request_s, system.max_batch, system.servers)
    if rate >= limit:
        raise Overload(rate / limit, system.servers, enough=math.floor(rate * system.servers / limit) + 1)
    if poisson_rate(system.arrivals) is None or system.servers > 1:
        return simulate(system, effort, "batching has numerics for Poisson arrivals and one server only")
    if system.noise is not None:
        return simulate(system, effort, "with batch times that vary only the mean is exact (queueing.batches)")
    if system.max_batch is not None and system.max_wait_s > system.fixed_s + system.per_request_s * system.max_batch:
        return simulate(system, effort, "a wait for company longer than a full batch takes has no numerics")
    found = batches.batches(
        rate,
        fixed_s=system.fixed_s,
        per_request_s=system.per_request_s,
        max_batch=system.max_batch,
        max_wait_s=system.max_wait_s,
    )
    if found.queue is None:
        return simulate(system, effort, "percentiles of batches this large are not computed")
    return exact(found.queue, "M/D[b]/1 batches", "the chain embedded at the ends of batches, and the law of the wait from it")


def solve_slots(system: Slots, effort: Effort) -> Answer:
    """Return a replica whose speed depends on how many it works on: always exact."""
    chain = Batching(system.rate_per_s, system.completions_per_s, capacity=system.capacity)
    return exact(chain.queue, "load-dependent chain", "completions at rate r(n): a birth-death chain, sojourns by a tagged request")


def solve_forkjoin(system: ForkJoin, effort: Effort) -> Answer:
    """Return jobs that are done when all their tasks are: exact for one branch; a formula when it is good enough, else simulated."""
    if system.branches < 1:
        raise BadInput(f"{system.branches} branches: at least one is needed")
    stable(1 / system.arrivals.mean_s, system.service.mean_s, 1)
    if system.branches == 1:
        from mlsys_bench.queueing.stations import solve_station

        return solve_station(Station(arrivals=system.arrivals, service=system.service), effort)
    rate = poisson_rate(system.arrivals)
    if rate is None or not isinstance(system.service, Exponential):
        return simulate(system, effort, "fork-join has formulas for M/M branches only")
    from mlsys_bench.queueing.forkjoin import fork_join

    queue, error, why = fork_join(rate, system.service.mean_s, system.branches)
    return formula_or_run(Answer(queue=queue, method="fork-join", why=why, expected_error=error), system, effort)


def solve_network(system: Network, effort: Effort) -> Answer:
    """Return an open network: exact where the stages are independent, a formula where it is good enough, else simulated."""
    from mlsys_bench.queueing import networks

    queue, error, why = networks.network(system)
    method = "product form" if error <= EXACT else "QNA"
    return formula_or_run(Answer(queue=queue, method=method, why=why, expected_error=error), system, effort)
