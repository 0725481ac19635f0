"""The last resort: a system simulated until its percentiles are known to the tolerance, or the budget is spent."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from mlsys_bench.queueing.answer import EXACT, Answer, Effort, rate_of
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.station import Balanced, Batches, ForkJoin, Network, Priorities, Slots, Station, System, Tokens

if TYPE_CHECKING:
    from mlsys_bench.queueing.des import Simulated, Simulator
    from mlsys_bench.queueing.des.tally import Estimate

PERCENTILES = (0.5, 0.9, 0.95, 0.99)
DRAWING = 0.85  # share of the budget spent on drawing: the rest goes into the formula before and the reckoning after, as measured
COARSE = 0.05  # the half-width to reach where any formula would do and there is none


def simulate(system: System, effort: Effort, why: str) -> Answer:
    """Return a system's answer by simulation, its error the widest relative half-width (95 %) among the percentiles of wait and sojourn."""
    if isinstance(system, Tokens):
        return _tokens(system, effort, why)
    run = _run(system, effort)
    beside = f" beside {' and '.join(run.twins)}" if run.twins else ""
    return Answer(
        queue=_queue(system, run),
        method=f"simulation{beside}",
        why=f"{why}; {told(run.customers, run.seconds, run.stopped_by, run.settled)}",
        expected_error=widest(*_served(system, run)),
        classes=_classes(system, run),
        simulated=run,
    )


def formula_or_run(formula: Answer, system: System, effort: Effort) -> Answer:
    """Return a formula's answer where it is within the tolerance, else a simulation's, unless that knows even less.

    Tolerance 0 trusts no formula.
    """
    if formula.expected_error <= max(effort.tolerance, EXACT):
        return formula
    run = simulate(system, effort, f"{formula.method} by formula may be {100 * formula.expected_error:.2g} % off: {formula.why}")
    if run.expected_error <= formula.expected_error or effort.tolerance == 0:
        return run
    return replace(formula, why=f"{formula.why}; {effort.budget_s:g} s of simulation know it to {100 * run.expected_error:.2g} % only")


def _run(system: System, effort: Effort) -> Simulated:
    """Return the run: of a plain station beside twins whose answer is known, of anything else by itself."""
    seed, half_width, budget_s = effort.seed, _width(effort), DRAWING * effort.budget_s
    if isinstance(system, Station) and not (system.capacity or system.patience or system.sharing):
        from mlsys_bench.queueing.des.control import confirm

        return confirm(system, seed=seed, half_width=half_width, budget_s=budget_s)
    from mlsys_bench.queueing.des.events import simulator
    from mlsys_bench.queueing.des.replicate import long_enough, replicate

    first = long_enough(utilisation(system), 2.0, places(system))
    return replicate(_labelled(system, simulator(system)), seed=seed, half_width=half_width, budget_s=budget_s, first=first)


def _width(effort: Effort) -> float:
    return min(effort.tolerance, COARSE)


def _labelled(system: System, simulator: Simulator) -> Simulator:
    """Return the simulator without labels that mean nothing to the answer: each label would have to be known by itself."""
    if isinstance(system, Priorities | Slots) or (isinstance(system, Station) and (system.capacity or system.patience)):
        return simulator

    return lambda rng, runs, n: simulator(rng, runs, n)._replace(kind=None)


def _queue(system: System, run: Simulated) -> Queue:
    """Return what served customers meet, with the shares of those turned away (label 1) and of those who gave up (label 2)."""
    rate, lost = arrival_rate(system), {label: kind.share for label, kind in run.kinds.items()}
    if isinstance(system, Priorities) or not lost:
        return Queue(utilisation=utilisation(system), p_wait=run.p_wait, wait=run.wait, sojourn=run.sojourn, throughput_per_s=rate)
    served = run.kinds[0]
    return Queue(
        utilisation=utilisation(system),
        p_wait=served.wait.p_over(0.0),
        wait=served.wait,
        sojourn=served.sojourn,
        throughput_per_s=rate * served.share,
        p_blocked=lost.get(1, 0.0),
        p_abandoned=lost.get(2, 0.0),
    )


def _served(system: System, run: Simulated) -> tuple[Estimate, Estimate]:
    """Return wait and sojourn of those the answer is about: where labels tell the lost from the served, of the served."""
    if isinstance(system, Priorities) or not run.kinds:
        return run.wait, run.sojourn
    return run.kinds[0].wait, run.kinds[0].sojourn


def _classes(system: System, run: Simulated) -> tuple[Queue, ...]:
    """Return each class of a station with priorities."""
    if not isinstance(system, Priorities):
        return ()
    return tuple(
        Queue(
            utilisation=utilisation(system),
            p_wait=run.kinds[label].wait.p_over(0.0),
            wait=run.kinds[label].wait,
            sojourn=run.kinds[label].sojourn,
            throughput_per_s=1 / arrivals.mean_s,
        )
        for label, arrivals in enumerate(system.arrivals)
    )


def arrival_rate(system: System) -> float:
    """Return the arrivals per second of a system."""
    match system:
        case Priorities():
            return sum(1 / arrivals.mean_s for arrivals in system.arrivals)
        case Slots():
            return system.rate_per_s
        case _:
            return rate_of(system.arrivals)


def utilisation(system: System) -> float:
    """Return offered load over capacity; of a network, that of its busiest stage."""
    rate = arrival_rate(system)
    match system:
        case Station() | Balanced():
            return rate * system.service.mean_s / (system.servers if isinstance(system, Station) else system.queues)
        case Priorities():
            loads = (s.mean_s / a.mean_s for a, s in zip(system.arrivals, system.services, strict=True))
            return sum(loads) / system.servers
        case Slots():
            return rate / system.completions_per_s[-1]
        case Batches():
            from mlsys_bench.queueing.batches import capacity_per_s

            return rate / capacity_per_s(system.fixed_s, system.per_request_s, system.max_batch, system.servers)
        case ForkJoin():
            return rate * system.service.mean_s
        case Network():
            from mlsys_bench.queueing.networks import flows

            return max(flow.utilisation for flow in flows(system))
        case Tokens():
            from mlsys_bench.queueing.des.tokens_replicate import saturation

            return rate / saturation(system)


def places(system: System) -> int:
    """Return how many customers can be in service at once."""
    match system:
        case Station() | Priorities():
            return system.servers
        case Balanced():
            return system.queues
        case Slots():
            return len(system.completions_per_s)
        case Batches():
            return system.servers * (system.max_batch or 64)
        case Network():
            return sum(stage.servers for stage in system.stages)
        case ForkJoin():
            return 1
        case Tokens():
            return system.max_batch


def told(customers: int, seconds: float, stopped_by: str, settled: bool) -> str:
    """Return in words what a simulation took."""
    end = "" if stopped_by == "precision" else ", as much as the budget allowed"
    start = "" if settled else "; it never settled: the empty start still shows"
    return f"{customers:,} customers simulated in {seconds:.1f} s{end}{start}"


def widest(wait: Estimate, sojourn: Estimate) -> float:
    """Return the widest relative half-width among percentiles; waits below a hundredth of a service time are left out."""
    floor_s = (sojourn.mean_s - wait.mean_s) / 100
    widths = []
    for time in (wait, sojourn):
        for p in PERCENTILES:
            value, (low, high) = time.quantile_s(p), time.interval_s(p)
            if value > floor_s:
                widths.append((high - low) / 2 / value)
    return max(widths, default=math.inf)


def _tokens(system: Tokens, effort: Effort, why: str) -> Answer:
    """Return a replica step by step: `wait` is the time to first token, `sojourn` the time to the last."""
    from mlsys_bench.queueing.des.tokens_replicate import replicate_tokens

    run = replicate_tokens(system, seed=effort.seed, half_width=_width(effort), budget_s=effort.budget_s)
    queue = Queue(utilisation=run.utilisation, p_wait=1.0, wait=run.ttft, sojourn=run.e2e, throughput_per_s=arrival_rate(system))
    words = told(run.runs * run.requests, run.seconds, "precision" if run.reached else "clock", True)
    return Answer(queue=queue, method="simulation", why=f"{why}; {words}", expected_error=run.half_width, tokens=run)
