"""What the plan of a stage graph says of itself in words: what binds, what it takes for granted, what its reader must know."""

from __future__ import annotations

from collections.abc import Iterator

from mlsys_bench import slo, units
from mlsys_bench.plan.graph.allocation import Allocation, Key, Problem, Trial
from mlsys_bench.plan.graph.purse import Paid
from mlsys_bench.plan.graph.spread import DRAWS, Spread, spread_of
from mlsys_bench.plan.graph.work import FEW, Served, Writer
from mlsys_bench.scenario import checks
from mlsys_bench.stage_fleets import NO_END_S
from mlsys_bench.stages import StageGraph
from mlsys_bench.types import Provenance

_NOTABLE = 0.005  # of the requests


def one_fewer(key: Key | None, replicas: int) -> str:
    """Return what one replica fewer of a stage would break."""
    if key is None:
        return "load and headroom" if replicas > 1 else "the smallest fleet"
    name, limit = key
    return f"{slo.show_limit(limit)}" + (f" at {name}" if name else "")


def binding(made: Allocation, asked: Problem, busiest: str) -> str:
    """Return what keeps the dearest stage from having one replica fewer."""
    stages = sorted(made.replicas, key=lambda name: -asked.usd_per_h(name, made.replicas[name]))
    name = next((stage for stage in stages if made.binds[stage] is not None), None)
    if name is not None:
        return f"{one_fewer(made.binds[name], made.replicas[name])} (one replica fewer of {name})"
    more = next((stage for stage in stages if made.replicas[stage] > 1), None)
    if more is None:
        return f"the smallest fleet (1 replica a stage; {busiest} is the busiest)"
    return f"{100 * asked.graph.headroom:g} % headroom over the load of {more}"


def assumptions(given: StageGraph, asked: Problem, paid: Paid, trial: Trial) -> Iterator[str]:
    """Yield what the plan takes for granted."""
    if asked.graph.workload is not given.workload:
        peak, mean = asked.graph.workload.rate_per_s, given.workload.rate_per_s
        yield f"sized for the busiest time of day or stage: {peak:.4g}/s where the mean is {mean:.4g}/s"
    if asked.due_s is not None:
        counted, n = len(trial.played.due_s), len(asked.due_s)
        what = "all of them" if counted == n else f"its busiest stretch of {counted:,}"
        yield f"the trace's {n:,} requests come at their own times, {what} through the graph; a language model meets the law fitted to them"
    yield "the replicas of a stage share one queue: a balancer that sends each request where there is room; at random they wait longer"
    if any(isinstance(work, Writer) for work in asked.works.values()):
        yield "a language model is simulated token by token at its share of the traffic; in the graph its visits are drawn from that run"
        yield "the first token reaches the user as soon as the last language model visited writes it; stages after it pass tokens on"
    there = checks.waited_for(asked.graph)
    if behind := [stage.name for stage in asked.graph.stages if stage.name not in there and not stage.is_async]:
        yield f"nobody waits for {', '.join(behind)} either: requests come there by an async stage alone"
    for name, work in asked.works.items():
        if isinstance(work, Writer) and not asked.flow[name].calls:
            yield f"{name}: no request is expected there; it is sized for {100 * FEW:g} % of them"
        if work.provenance is Provenance.ASSUMED:
            within = f" (within a factor of {spread_of(work):g}, 90 %)" if isinstance(work, Served) else ""
            yield f"{name}: {units.show_s(work.service_s)} a visit{within}, {' '.join(work.source.split())}"
    for line in paid.bill.rented:
        if line.unit == "vCPU":
            whole = line.holds != line.instances
            what = (
                f"{line.instances:g} x {line.provider} {line.instance}, filled by vCPUs and memory"
                if whole
                else f"{units.show_usd(line.usd_per_hour / line.holds)}/h a vCPU"
            )
            yield f"stages without a GPU: {what}: {' '.join(line.source.split())}"


def notes(asked: Problem, made: Allocation, paid: Paid, spread: Spread) -> Iterator[str]:
    """Yield what a reader must know before acting on the plan."""
    failed = made.trial.failed
    if failed > 0:
        yield f"{100 * failed:.2g} % of the simulated requests got no answer: rejected, timed out or failed, with no retry or fallback left"
    for name, use in made.trial.played.stages.items():
        share = [(use.timed_out, "timed out"), (use.rejected, "were rejected"), (use.retried, "were retries"), (use.fell_back, "fell back")]
        said = [f"{100 * n / use.calls:.2g} % {what}" for n, what in share if use.calls and n / use.calls > 1e-4]
        if said:
            yield f"{name}: of its calls {', '.join(said)}"
    yield from paid.notes
    beside = [what for what in paid.bill.unpriced if not what.startswith("replicas of ")]
    if beside:
        yield f"without a price and left out of the cost: {'; '.join(beside)}; a --prices file may give rates"
    if spread.overloaded:
        listed = ", ".join(f"{name} in {count}" for name, count in sorted(spread.overloaded.items(), key=lambda item: -item[1]))
        is_endless = any(high >= NO_END_S for _, high in spread.intervals.values())
        then = (
            "grow without end, so 'and more' stands for an upper end that nobody knows; measured times (--from STAGE=FILE) or more "
            "--headroom give one"
            if is_endless
            else "reach the upper ends of their intervals; measured times (--from STAGE=FILE) or more --headroom lower those"
        )
        overloaded = f"in {spread.overloads} of {DRAWS} draws of the stage times the replicas planned are overloaded ({listed})"
        yield f"{overloaded}: latencies then {then}"
    lost = [share for share in spread.unanswered if share > made.trial.failed + _NOTABLE]
    if lost:
        yield (
            f"in {len(lost)} of {DRAWS} draws more requests get no answer, {100 * max(lost):.2g} % at most: "
            "intervals of latencies are of those that get one"
        )
    if spread.infeasible:
        yield f"in {spread.infeasible} of {DRAWS} draws of the stage times no number of replicas keeps the limits"
    if asked.purse.term == "spot":
        yield "replicas of a spot pool are reclaimed together: this plan promises nothing while they are away"
    yield f"{made.simulated} simulations of the whole graph chose the replicas"
