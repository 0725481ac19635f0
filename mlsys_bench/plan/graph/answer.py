"""From a stage graph to a plan: works of all stages, replicas chosen together, their spares, and the record of it, with intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench import pricing, slo, workload
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.plan.graph import allocation, spread, words
from mlsys_bench.plan.graph.allocation import Allocation, Problem, Replicas, allocate
from mlsys_bench.plan.graph.estimate import FAILED_S
from mlsys_bench.plan.graph.purse import Paid, Purse, StagePrice
from mlsys_bench.plan.graph.spread import Spread
from mlsys_bench.plan.graph.work import FEW, FULL, Floats, Served, Work, Writer, hedged, late, profile_of, served, writer
from mlsys_bench.pricing import Market, published
from mlsys_bench.scenario import checks, flows
from mlsys_bench.stage_fleets import StageEngine, StageFleet, StagesSecured
from mlsys_bench.stages import Stage, StageGraph
from mlsys_bench.types import SLO, FleetItem, LatencyProfile, Limit, Plan, Provenance, StagePlan

if TYPE_CHECKING:
    from mlsys_bench.plan.growth import Growth

STATS = ("p50", "p95", "p99")
_FARTHEST = 1000.0  # times the traffic: the headroom of replicas that nobody needs


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRequest:
    """A stage graph to plan, with the profiles that were measured of its stages, by name, and where its replicas are rented.

    An availability among the limits adds replicas to spare, spread over `zones`; with `survive_zone` any one of them may go.  `around`
    asks for replicas hour by hour, `growth` for the month in which the first stage is full.  With `due_s` the requests of a trace come at
    these times, and `graph` holds the law that stands for it.
    """

    graph: StageGraph
    profiles: dict[str, LatencyProfile] = field(default_factory=dict)
    term: str = "on-demand"
    market: Market | None = None  # None: published prices
    seed: int = 0
    zones: int = 1
    survive_zone: bool = False
    around: bool = False
    growth: Growth | None = None
    due_s: Floats | None = None
    trace_notes: tuple[str, ...] = ()  # what was left out of the trace, what its times do not say

    @property
    def purse(self) -> Purse:
        """Where it buys."""
        return Purse(market=self.market or published(), term=self.term, cost=self.graph.cost, zones=self.zones)


def plan_graph(request: GraphRequest, executor: Executor | None = None) -> Plan:
    """Return the cheapest replicas of all stages that keep every limit; an executor takes the draws of the intervals.

    Raises BadInput, and Infeasible saying which limit and why.
    """
    _check(request)
    peak = workload.at_peak(request.graph.workload)
    graph = dataclasses.replace(request.graph, workload=peak)
    asked = allocation.problem(graph, works(dataclasses.replace(request, graph=graph)), request.seed, request.purse, request.due_s)
    made = allocate(asked)
    secured = _secured(request, asked, made.replicas)
    return _surrounded(request, asked, made, _assemble(request, asked, made, secured, executor))


def _check(request: GraphRequest) -> None:
    """Raise BadInput for terms and zones that make no sense."""
    if request.term not in pricing.TERMS:
        raise BadInput(f"unknown term {request.term!r}{did_you_mean(request.term, pricing.TERMS)}")
    if request.due_s is not None and (request.around or request.growth):
        raise BadInput(
            "a trace is served as it came: hours and months are planned for a law of traffic; leave --autoscale and --growth out"
        )
    if request.due_s is not None and len(request.due_s) < allocation.LEAST_OF_TRACE:
        few = f"{len(request.due_s)} requests"
        raise BadInput(f"--trace: {few} tell no percentile of a graph; give one of {allocation.LEAST_OF_TRACE} at least")
    promised = any(limit.metric == "availability" for limit in request.graph.slo)
    if not promised and (request.zones != 1 or request.survive_zone):
        raise BadInput("zones are planned for an availability; say which, e.g. --availability 99.9%")
    if promised and request.term == "spot":
        raise BadInput(
            "spot replicas of a pool are reclaimed together, so no stage stands on them for an availability; plan with --term on-demand"
        )


def _secured(request: GraphRequest, asked: Problem, needed: Replicas) -> StagesSecured | None:
    if not any(limit.metric == "availability" for limit in asked.graph.slo):
        return None
    from mlsys_bench.plan.graph import spares
    from mlsys_bench.plan.reliability import Zones

    limit = spares.promise(asked)
    assert limit is not None
    return spares.secured(asked, needed, limit, Zones(count=request.zones, survive=request.survive_zone))


def _surrounded(request: GraphRequest, asked: Problem, made: Allocation, plan: Plan) -> Plan:
    """Return the plan with hours and months, where they are asked for."""
    day = request.due_s is None and workload.at_peak(request.graph.workload) is not request.graph.workload
    if not (request.around or request.growth or day):
        return plan
    from mlsys_bench.plan.graph import times

    return times.surrounded(plan, asked, made, request.graph.workload, grows=request.growth, asks=request.around)


def works(request: GraphRequest) -> dict[str, Work]:
    """Return the work of every stage that does some."""
    graph = request.graph
    working = [stage for stage in graph.stages if stage.service is not None]
    if not working:
        raise BadInput(f"{graph.name}: no stage does any work, so there is nothing to plan; give one a service")
    for name in request.profiles:
        if name not in [stage.name for stage in working]:
            raise BadInput(f"--from {name}=FILE: {graph.name} has no such stage{did_you_mean(name, [s.name for s in working])}")
    made: dict[str, Work] = {}
    for stage in sorted(working, key=lambda s: -len(checks.reached(graph, s.name, escalated=False))):  # whoever calls before who is called
        made[stage.name] = _work(request, stage, made)
    return {stage.name: made[stage.name] for stage in working}


def _work(request: GraphRequest, stage: Stage, before: Mapping[str, Work]) -> Work:
    graph = request.graph
    profile = profile_of(stage, request.profiles.get(stage.name))
    if stage.engine is None:
        return served(stage, profile)
    calls = flows(graph.stages, graph.entry, late(before), hedged(before))[stage.name].calls or FEW
    return writer(stage, graph, calls, needed_alone(graph, stage, calls), profile, request.purse, request.seed)


def needed_alone(graph: StageGraph, stage: Stage, calls: float) -> SLO:
    """Return what a language model must keep whatever the other stages take: its own limits, and those of the whole at its visits.

    Where only some requests come by, so many more of those that do may be late: p95 of all is p90 of half of them.  Where nobody waits
    for it, only its own count.
    """
    metrics = slo.LATENCIES if len(graph.engines) == 1 else ("e2e",)  # of several, one writes the first token that the user sees
    found = {(limit.metric, limit.stat): limit for limit in stage.slo if limit.metric in slo.LATENCIES}
    for limit in graph.slo if stage.name in checks.waited_for(graph) else ():
        if limit.metric not in metrics or limit.stat == "mean":
            continue
        late = (1 - float(limit.stat[1:]) / 100) / min(calls, 1.0)
        if 1 - late >= 0.5:
            stat = f"p{100 * (1 - late):.6g}"
            tighter = found.get((limit.metric, stat))
            if tighter is None or limit.limit < tighter.limit:
                found[limit.metric, stat] = dataclasses.replace(limit, stat=stat)
    return tuple(found.values()) or (Limit(metric="e2e", stat="p50", limit=FAILED_S),)  # the load and the headroom decide


# ---------------------------------------------------------------- the record


def _assemble(
    request: GraphRequest, asked: Problem, made: Allocation, secured: StagesSecured | None, executor: Executor | None = None
) -> Plan:  # fmt: skip
    graph = asked.graph
    fleet = {s.stage: s.replicas for s in secured.stages} if secured else made.replicas
    whole = made if fleet == made.replicas else _all_up(asked, made, fleet)
    paid = asked.pay(fleet)
    stages = tuple(_stage(asked, whole, made, name, paid.stages[name]) for name in asked.works)
    writers = [work for work in asked.works.values() if isinstance(work, Writer)]
    predicted, analytic = _seen(whole.trial.all.keys(graph.slo), writers), whole.estimate.whole.keys(graph.slo)
    spreads = spread.of(asked, made, whole, predicted, _renting(secured), executor)
    items = tuple(item for name in asked.works for item in _items(asked.works[name], fleet[name], paid.stages[name]))
    busiest = max(stages, key=lambda s: s.utilisation)
    gpus = {item.gpu for item in items if item.gpu != "vcpu"}
    bottleneck, usd = asked.works[busiest.stage], paid.usd_per_h
    usual = request.graph.workload.rate_per_s / asked.rate_per_s  # tokens are those of the average load, whatever the peak
    tokens = usual * sum(asked.calls_per_s(w.stage.name) * workload.mean_tokens(w.traffic.output_tokens) for w in writers)
    held = {"availability": secured.availability} if secured else {}
    return Plan(
        model=", ".join(dict.fromkeys(w.alone.model for w in writers)) or graph.name,
        workload=request.graph.workload,
        slo=slo.show(graph.slo),
        fleet=items,
        replicas=sum(item.replicas for item in items),
        gpus=sum(item.replicas * item.tp * item.pp for item in items if item.gpu != "vcpu"),
        gpu=next(iter(gpus)) if len(gpus) == 1 else None,
        devices_per_replica=writers[0].alone.devices_per_replica if len(writers) == 1 else 1,
        usd_per_hour=usd,
        usd_per_month=None if usd is None else pricing.usd_per_month(usd),
        usd_per_million_tokens=None if usd is None or tokens <= 0 else pricing.usd_per_million_tokens(usd, tokens),
        utilisation=busiest.utilisation,
        binding_constraint=_binding(asked, made, secured, busiest.stage),
        headroom=_headroom(asked, made),
        provenance=Provenance.weakest(*(stage.provenance for stage in stages)),
        predicted=predicted | held,
        intervals=spreads.intervals | ({"availability": secured.interval} if secured else {}),
        analytic={key: value for key, value in analytic.items() if key in predicted},
        alternatives=(),
        profile=writers[0].profile() if writers else bottleneck.profile(),
        capacity_per_replica_per_s=bottleneck.capacity_per_s(1),
        max_batch=writers[0].alone.max_batch if writers else 1,
        kv_tokens_per_replica=writers[0].alone.kv_tokens_per_replica if writers else 0,
        assumptions=(*words.assumptions(request.graph, asked, paid, whole.trial), *(secured.assumptions if secured else ())),
        prices=paid.offers,
        notes=(*words.notes(asked, whole, paid, spreads), *request.trace_notes),
        max_step_tokens=writers[0].alone.max_step_tokens if writers else None,
        scenario=graph.name,
        stages=stages,
        bottleneck=busiest.stage,
        survivors=_seen(made.trial.all.keys(graph.slo), writers) if secured else {},
        stage_fleet=_fleet(asked, made, paid, spreads, secured),
    )


def _all_up(asked: Problem, made: Allocation, fleet: Replicas) -> Allocation:
    """Return what theory and simulation say of the fleet with its spares up."""
    return dataclasses.replace(
        made, replicas=fleet, estimate=asked.estimate(fleet), trial=allocation.simulate(asked, fleet, allocation.LONG)
    )


def _renting(secured: StagesSecured | None) -> spread.Rented:
    """Return what adds the plan's spares to another fleet."""
    spare = {s.stage: s.replicas - s.needed for s in secured.stages} if secured else {}
    return lambda fleet: {name: n + spare.get(name, 0) for name, n in fleet.items()}


def _seen(found: Mapping[str, float], writers: list[Writer]) -> dict[str, float]:
    """Return the figures that users of the whole see."""
    unseen = ("itl_",) if writers else ("itl_", "ttft_", "tpot_")
    return {key: value for key, value in found.items() if not key.startswith(unseen)}


def _fleet(asked: Problem, made: Allocation, paid: Paid, spreads: Spread, secured: StagesSecured | None) -> StageFleet:
    engines = {name: work.alone for name, work in asked.works.items() if isinstance(work, Writer)}
    memory = {name: asked.unit(name).memory_bytes for name in asked.works}
    graph = asked.graph
    usable = min(1 - graph.headroom, FULL)
    return StageFleet(
        bill=paid.bill,
        entry=graph.entry if graph.entry in asked.works else "",
        promises={stage.name: slo.show(stage.slo) for stage in graph.stages if stage.slo},
        components={stage.name: stage.component for stage in graph.stages if stage.component and stage.name in asked.works},
        carried={
            name: usable if made.binds[name] is None and not isinstance(work, Writer) else asked.utilisation(name, made.replicas[name])
            for name, work in asked.works.items()
        },
        replicas=spreads.replicas,
        engines={
            name: StageEngine(
                model=alone.model, max_batch=alone.max_batch, max_step_tokens=alone.max_step_tokens,
                kv_tokens_per_replica=alone.kv_tokens_per_replica,
            )
            for name, alone in engines.items()
        },
        memory_bytes={name: held for name, held in memory.items() if held},
        secured=secured,
    )  # fmt: skip


def _stage(asked: Problem, whole: Allocation, made: Allocation, name: str, price: StagePrice) -> StagePlan:
    work, replicas, use = asked.works[name], whole.replicas[name], whole.trial.played.stages[name]
    times = whole.trial.stages[name]
    count = len(whole.trial.played.due_s)
    calls = (use.calls + use.hedged) / count
    spare = replicas - made.replicas[name]
    return StagePlan(
        stage=name,
        visits=use.visits / count,
        calls=calls,
        replicas=replicas,
        shards=work.stage.shards,
        servers=work.servers(replicas) if isinstance(work, Served) else 0,
        service_s=work.service_s,
        utilisation=calls * asked.rate_per_s / work.capacity_per_s(replicas),
        latencies_s={stat: float(np.quantile(times, float(stat[1:]) / 100)) for stat in STATS} if len(times) else {},
        usd_per_hour=price.usd_per_h,
        binds=f"the availability ({spare} to spare)" if spare else words.one_fewer(made.binds[name], replicas),
        provenance=work.provenance,
        source=work.source,
        profile=work.profile(),
    )


def _items(work: Work, replicas: int, price: StagePrice) -> Iterator[FleetItem]:
    stage = work.stage
    resources = stage.resources
    assert resources is not None
    if isinstance(work, Writer):
        own = work.alone.fleet[0]
        yield dataclasses.replace(
            own, stage=stage.name, replicas=replicas, instances=price.instances, instance=price.instance, usd_per_hour=price.usd_per_h,
            devices=price.devices,
        )  # fmt: skip
        return
    yield FleetItem(
        stage=stage.name,
        gpu="vcpu" if resources.vcpu is not None else resources.gpu[0],
        precision="",
        tp=1 if resources.vcpu is not None else resources.gpus,
        pp=1,
        replicas=replicas * stage.shards,
        instances=price.instances,
        instance=f"{resources.vcpu:g} vCPU" if resources.vcpu is not None else price.instance,
        usd_per_hour=price.usd_per_h,
        devices=price.devices,
    )


def _binding(asked: Problem, made: Allocation, secured: StagesSecured | None, busiest: str) -> str:
    if secured is not None and secured.binds != "peak":
        from mlsys_bench.plan.graph import spares

        limit = spares.promise(asked)
        assert limit is not None
        return spares.binding(secured, limit)
    return words.binding(made, asked, busiest)


def _headroom(asked: Problem, made: Allocation) -> float:
    """Return the extra traffic, as a share, until a limit breaks or a stage saturates: theory, scaled to simulation.

    Retries of what waits make more wait, all at once: where there are some, simulation must keep the limits too.
    """
    by_simulation = asked.due_s is None and any(work.stage.retries for work in asked.works.values())
    most = min((FULL / u for name, n in made.replicas.items() if (u := asked.utilisation(name, n)) > 0), default=_FARTHEST)
    low, high = 1.0, max(most, 1.0)

    def keeps(more: float) -> bool:
        by_theory = max(allocation.judged(asked, made.replicas, made.corrections, more).values(), default=0.0) < 1
        return by_theory and not (by_simulation and more > 1 and _breaks(asked, made.replicas, more))

    if keeps(high):
        return high - 1
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low - 1


def _breaks(asked: Problem, replicas: Replicas, more: float) -> bool:
    """Say whether a simulation at so many times the traffic misses a limit."""
    traffic = asked.graph.workload
    graph = dataclasses.replace(asked.graph, workload=dataclasses.replace(traffic, rate_per_s=traffic.rate_per_s * more))
    trial = allocation.simulate(dataclasses.replace(asked, graph=graph), replicas)
    return max(allocation.excesses(asked, trial.all, trial.stages).values(), default=0.0) >= 1
