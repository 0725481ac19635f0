"""From a stage graph to a plan: works of all stages, replicas chosen together, and the record that says so, with intervals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from mlsys_bench import pricing, slo, units, workload
from mlsys_bench.errors import BadInput, did_you_mean
from mlsys_bench.plan.graph import allocation
from mlsys_bench.plan.graph.allocation import STUDENT, Allocation, Key, Problem, allocate
from mlsys_bench.plan.graph.estimate import FAILED_S
from mlsys_bench.plan.graph.work import FULL, Price, Served, Work, Writer, profile_of, served, writer
from mlsys_bench.plan.latencies import key_of
from mlsys_bench.scenario import flows
from mlsys_bench.stages import Cost, Stage, StageGraph
from mlsys_bench.types import SLO, FleetItem, LatencyProfile, Limit, Offer, Plan, Provenance, StagePlan

Interval = tuple[float, float]
STATS = ("p50", "p95", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphRequest:
    """A stage graph to plan, with the profiles that were measured of its stages, by name."""

    graph: StageGraph
    profiles: dict[str, LatencyProfile] = field(default_factory=dict)
    term: str = "on-demand"
    seed: int = 0


def plan_graph(request: GraphRequest) -> Plan:
    """Return the cheapest replicas of all stages that keep every limit.  Raises BadInput, and Infeasible saying which limit and why."""
    peak = workload.at_peak(request.graph.workload)
    graph = dataclasses.replace(request.graph, workload=peak)
    asked = allocation.problem(graph, works(dataclasses.replace(request, graph=graph)), request.seed)
    return _assemble(request, asked, allocate(asked))


def works(request: GraphRequest) -> dict[str, Work]:
    """Return the work of every stage that does some."""
    graph = request.graph
    working = [stage for stage in graph.stages if stage.service is not None]
    if not working:
        raise BadInput(f"{graph.name}: no stage does any work, so there is nothing to plan; give one a service")
    for name in request.profiles:
        if name not in [stage.name for stage in working]:
            raise BadInput(f"--from {name}=FILE: {graph.name} has no such stage{did_you_mean(name, [s.name for s in working])}")
    return {stage.name: _work(request, stage) for stage in working}


def _work(request: GraphRequest, stage: Stage) -> Work:
    graph = request.graph
    profile = profile_of(stage, request.profiles.get(stage.name))
    if stage.engine is None:
        return served(stage, profile, graph.cost or _usual_cost(), request.term)
    calls = flows(graph.stages, graph.entry)[stage.name].calls
    return writer(stage, graph, calls, needed_alone(graph, stage, calls), profile, request.term, request.seed)


def needed_alone(graph: StageGraph, stage: Stage, calls: float) -> SLO:
    """Return what a language model must keep whatever the other stages take: its own limits, and those of the whole at its visits.

    Where only some requests come by, so many more of those that do may be late: p95 of all is p90 of half of them.
    """
    metrics = slo.LATENCIES if len(graph.engines) == 1 else ("e2e",)  # of several, one writes the first token that the user sees
    found = {(limit.metric, limit.stat): limit for limit in stage.slo if limit.metric in slo.LATENCIES}
    for limit in graph.slo:
        if limit.metric not in metrics or limit.stat == "mean":
            continue
        late = (1 - float(limit.stat[1:]) / 100) / min(calls, 1.0)
        if 1 - late >= 0.5:
            stat = f"p{100 * (1 - late):.6g}"
            tighter = found.get((limit.metric, stat))
            if tighter is None or limit.limit < tighter.limit:
                found[limit.metric, stat] = dataclasses.replace(limit, stat=stat)
    return tuple(found.values()) or (Limit(metric="e2e", stat="p50", limit=FAILED_S),)  # the load and the headroom decide


def _usual_cost() -> Cost | None:
    """Return what a vCPU costs where the scenario does not say: the cheapest published one, None where none is."""
    offers = sorted(pricing.cpu_offers(), key=lambda offer: offer.usd_per_vcpu_h)
    if not offers:
        return None
    return Cost(usd_per_vcpu_h=offers[0].usd_per_vcpu_h, source=f"{offers[0].instance}, {offers[0].source}, {offers[0].date}")


# ---------------------------------------------------------------- the record


def _assemble(request: GraphRequest, asked: Problem, made: Allocation) -> Plan:
    graph = asked.graph
    prices = {name: work.price(made.replicas[name]) for name, work in asked.works.items()}
    stages = tuple(_stage(asked, made, name, prices[name]) for name in asked.works)
    writers = [work for work in asked.works.values() if isinstance(work, Writer)]
    usd = _total(prices)
    predicted, analytic = made.trial.all.keys(graph.slo), made.estimate.whole.keys(graph.slo)
    unseen = ("itl_",) if writers else ("itl_", "ttft_", "tpot_")
    predicted = {key: value for key, value in predicted.items() if not key.startswith(unseen)}
    fleet = tuple(item for name in asked.works for item in _items(asked.works[name], made.replicas[name], prices[name]))
    busiest = max(stages, key=lambda s: s.utilisation)
    gpus = {item.gpu for item in fleet if item.gpu != "vcpu"}
    offers = _offers(prices, graph.cost or _usual_cost(), fleet)
    bottleneck = asked.works[busiest.stage]
    tokens = sum(asked.calls_per_s(w.stage.name) * workload.mean_tokens(w.traffic.output_tokens) for w in writers)
    return Plan(
        model=", ".join(dict.fromkeys(w.alone.model for w in writers)) or graph.name,
        workload=request.graph.workload,
        slo=slo.show(graph.slo),
        fleet=fleet,
        replicas=sum(item.replicas for item in fleet),
        gpus=sum(item.replicas * item.tp * item.pp for item in fleet if item.gpu != "vcpu"),
        gpu=next(iter(gpus)) if len(gpus) == 1 else None,
        devices_per_replica=writers[0].alone.devices_per_replica if len(writers) == 1 else 1,
        usd_per_hour=usd,
        usd_per_month=None if usd is None else pricing.usd_per_month(usd),
        usd_per_million_tokens=None if usd is None or tokens <= 0 else pricing.usd_per_million_tokens(usd, tokens),
        utilisation=busiest.utilisation,
        binding_constraint=_binding(made, asked, busiest.stage),
        headroom=_headroom(asked, made),
        provenance=Provenance.weakest(*(stage.provenance for stage in stages)),
        predicted=predicted,
        intervals=_intervals(asked, made, predicted, analytic),
        analytic={key: value for key, value in analytic.items() if key in predicted},
        alternatives=(),
        profile=writers[0].profile() if writers else bottleneck.profile(),
        capacity_per_replica_per_s=bottleneck.capacity_per_s(1),
        max_batch=writers[0].alone.max_batch if writers else 1,
        kv_tokens_per_replica=writers[0].alone.kv_tokens_per_replica if writers else 0,
        assumptions=tuple(_assumptions(request, asked)),
        prices=offers,
        notes=tuple(_notes(asked, made)),
        max_step_tokens=writers[0].alone.max_step_tokens if writers else None,
        scenario=graph.name,
        stages=stages,
        bottleneck=busiest.stage,
    )


def _stage(asked: Problem, made: Allocation, name: str, price: Price) -> StagePlan:
    work, replicas, use = asked.works[name], made.replicas[name], made.trial.played.stages[name]
    times = made.trial.stages[name]
    count = len(made.trial.played.due_s)
    calls_per_s = use.calls / count * asked.rate_per_s
    return StagePlan(
        stage=name,
        visits=use.visits / count,
        calls=use.calls / count,
        replicas=replicas,
        shards=work.stage.shards,
        servers=work.servers(replicas) if isinstance(work, Served) else 0,
        service_s=work.service_s,
        utilisation=calls_per_s / work.capacity_per_s(replicas),
        latencies_s={stat: float(np.quantile(times, float(stat[1:]) / 100)) for stat in STATS} if len(times) else {},
        usd_per_hour=price.usd_per_h,
        binds=_one_fewer(made.binds[name], replicas),
        provenance=work.provenance,
        source=work.source,
        profile=work.profile(),
    )


def _one_fewer(key: Key | None, replicas: int) -> str:
    if key is None:
        return "load and headroom" if replicas > 1 else "the smallest fleet"
    name, limit = key
    return f"{slo.show_limit(limit)}" + (f" at {name}" if name else "")


def _items(work: Work, replicas: int, price: Price) -> Iterator[FleetItem]:
    stage = work.stage
    resources = stage.resources
    assert resources is not None
    if isinstance(work, Writer):
        own = work.alone.fleet[0]
        name = f"{price.offer.provider} {price.offer.instance}" if price.offer else None
        yield dataclasses.replace(
            own, stage=stage.name, replicas=replicas, instances=price.instances, instance=name, usd_per_hour=price.usd_per_h
        )
        return
    yield FleetItem(
        stage=stage.name,
        gpu="vcpu" if resources.vcpu is not None else resources.gpu[0],
        precision="",
        tp=1 if resources.vcpu is not None else resources.gpus,
        pp=1,
        replicas=replicas * stage.shards,
        instances=price.instances,
        instance=f"{resources.vcpu:g} vCPU" if resources.vcpu is not None else _instance(price.offer),
        usd_per_hour=price.usd_per_h,
    )


def _instance(offer: Offer | None) -> str | None:
    return f"{offer.provider} {offer.instance}" if offer else None


def _total(prices: Mapping[str, Price]) -> float | None:
    found = [price.usd_per_h for price in prices.values()]
    return None if any(usd is None for usd in found) else round(sum(usd for usd in found if usd is not None), 6)


def _offers(prices: Mapping[str, Price], cost: Cost | None, fleet: tuple[FleetItem, ...]) -> tuple[Offer, ...]:
    """Return the offers the fleet is rented by, that of a vCPU among them."""
    found = [price.offer for price in prices.values() if price.offer is not None]
    if cost is not None and any(item.gpu == "vcpu" for item in fleet):
        found.append(
            Offer(
                provider="any", instance="1 vCPU", device="vcpu", devices=1, region="any", term="on-demand",
                usd_per_h=cost.usd_per_vcpu_h, source=cost.source, date="", provenance=Provenance.ASSUMED,
            )
        )  # fmt: skip
    return tuple(dict.fromkeys(found))


# ---------------------------------------------------------------- how sure, how far


def _intervals(asked: Problem, made: Allocation, predicted: Mapping[str, float], analytic: Mapping[str, float]) -> dict[str, Interval]:
    """Return 90 % intervals: the spread between batches of the simulation, and how far theory lies from it, as if independent."""
    batches = [batch.keys(asked.graph.slo) for batch in made.trial.batches]
    found: dict[str, Interval] = {}
    for key, value in predicted.items():
        values = np.array([batch[key] for batch in batches if key in batch])
        if len(values) < 2 or value <= 0:
            continue
        half = STUDENT * float(values.std(ddof=1)) / math.sqrt(len(values)) / value
        if key == "goodput":
            found[key] = (max(value * (1 - half), 0.0), min(value * (1 + half), 1.0))
            continue
        apart = math.log(analytic[key] / value) if analytic.get(key, 0.0) > 0 else 0.0
        found[key] = (value * math.exp(-math.hypot(half, min(apart, 0.0))), value * math.exp(math.hypot(half, max(apart, 0.0))))
    return found | _replicas_interval(asked, made, found, predicted)


def _replicas_interval(
    asked: Problem, made: Allocation, spans: Mapping[str, Interval], predicted: Mapping[str, float]
) -> dict[str, Interval]:
    """Return the replicas and the cost if the latencies were those at the ends of their intervals."""
    fleets = [made.replicas]
    for end in (0, 1):
        corrections = dict(made.corrections)
        for name, limit in asked.limits:
            key = key_of(limit)
            if name is None and key in spans and predicted.get(key, 0.0) > 0:
                corrections[name, limit] = corrections.get((name, limit), 1.0) * spans[key][end] / predicted[key]
        other = allocation.greedy(asked, allocation.fewest(asked), corrections)
        if other is not None:
            fleets.append(other)
    counts = [sum(n * asked.works[name].stage.shards for name, n in fleet.items()) for fleet in fleets]
    found: dict[str, Interval] = {"replicas": (float(min(counts)), float(max(counts)))}
    costs = [_total({name: asked.works[name].price(n) for name, n in fleet.items()}) for fleet in fleets]
    known = [usd for usd in costs if usd is not None]
    if len(known) == len(costs):
        found["usd_per_hour"] = (min(known), max(known))
        found["usd_per_month"] = (pricing.usd_per_month(min(known)), pricing.usd_per_month(max(known)))
    return found


def _headroom(asked: Problem, made: Allocation) -> float:
    """Return the extra traffic, as a share, until a limit breaks or a stage saturates: theory, scaled to simulation."""
    most = min(FULL / u for name, n in made.replicas.items() if (u := asked.utilisation(name, n)) > 0)
    low, high = 1.0, max(most, 1.0)

    def keeps(more: float) -> bool:
        return max(allocation.judged(asked, made.replicas, made.corrections, more).values(), default=0.0) < 1

    if keeps(high):
        return high - 1
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if keeps(middle) else (low, middle)
    return low - 1


def _binding(made: Allocation, asked: Problem, busiest: str) -> str:
    """Return what keeps the dearest stage from having one replica fewer."""
    stages = sorted(made.replicas, key=lambda name: -asked.usd_per_h(name, made.replicas[name]))
    name = next((stage for stage in stages if made.binds[stage] is not None), None)
    if name is not None:
        return f"{_one_fewer(made.binds[name], made.replicas[name])} (one replica fewer of {name})"
    more = next((stage for stage in stages if made.replicas[stage] > 1), None)
    if more is None:
        return f"the smallest fleet (1 replica a stage; {busiest} is the busiest)"
    return f"{100 * asked.graph.headroom:g} % headroom over the load of {more}"


def _assumptions(request: GraphRequest, asked: Problem) -> Iterator[str]:
    graph = request.graph
    if asked.graph.workload is not graph.workload:
        peak, mean = asked.graph.workload.rate_per_s, graph.workload.rate_per_s
        yield f"sized for the busiest time of day or stage: {peak:.4g}/s where the mean is {mean:.4g}/s"
    yield "the replicas of a stage share one queue: a balancer that sends each request where there is room; at random they wait longer"
    if any(isinstance(work, Writer) for work in asked.works.values()):
        yield "a language model is simulated token by token at its share of the traffic; in the graph its visits are drawn from that run"
        yield "the first token reaches the user as soon as the last language model visited writes it; stages after it pass tokens on"
    for name, work in asked.works.items():
        if work.provenance is Provenance.ASSUMED:
            yield f"{name}: {units.show_s(work.service_s)} a visit, {' '.join(work.source.split())}"
    cost = graph.cost or _usual_cost()
    if cost is not None:
        yield f"a vCPU costs {units.show_usd(cost.usd_per_vcpu_h)}/h, whole machines are filled: {' '.join(cost.source.split())}"


def _notes(asked: Problem, made: Allocation) -> Iterator[str]:
    failed = made.trial.failed
    if failed > 0:
        yield f"{100 * failed:.2g} % of the simulated requests got no answer: rejected, timed out or failed, with no retry or fallback left"
    for name, use in made.trial.played.stages.items():
        share = [(use.timed_out, "timed out"), (use.rejected, "were rejected"), (use.retried, "were retries"), (use.fell_back, "fell back")]
        said = [f"{100 * n / use.calls:.2g} % {what}" for n, what in share if use.calls and n / use.calls > 1e-4]
        if said:
            yield f"{name}: of its calls {', '.join(said)}"
    if any(limit.metric == "availability" for limit in asked.graph.slo):
        yield "availability is not planned for here: the replicas hold the traffic, with none to spare for failures"
    yield f"intervals hold for the stage times as given; {made.simulated} simulations of the whole graph chose the replicas"
