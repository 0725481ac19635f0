"""Replicas to spare in every stage of a graph, chosen together: requests are answered within the limits for the share of time asked for."""

from __future__ import annotations

from collections.abc import Iterator

from mlsys_bench import slo, units
from mlsys_bench.plan import cold_start
from mlsys_bench.plan.around import weights_bytes
from mlsys_bench.plan.availability import YEAR_MIN
from mlsys_bench.plan.cold_start import ColdStart
from mlsys_bench.plan.graph import cuts
from mlsys_bench.plan.graph.allocation import Problem, Replicas
from mlsys_bench.plan.graph.work import FULL, Work, Writer
from mlsys_bench.plan.reliability import Reliability, Zones, replaced
from mlsys_bench.plan.together import Group, Standing, secure
from mlsys_bench.pricing import spread
from mlsys_bench.stage_fleets import StageSpare, StagesSecured
from mlsys_bench.types import Limit, Provenance


def start_of(work: Work) -> ColdStart:
    """Return how long a new replica of a stage takes until it serves."""
    if isinstance(work, Writer):
        return cold_start.of(weights_bytes(work.alone))
    resources = work.stage.resources
    if resources is not None and resources.gpu:
        return cold_start.of(0.0)
    return cold_start.of_service((resources.memory_bytes if resources else None) or 0.0)


def reliability_of(work: Work) -> Reliability:
    """Return how replicas of a stage fail: the process, and its GPUs where it has some."""
    return replaced(start_of(work))


def gpus_of(work: Work) -> int:
    """Return the GPUs of one replica."""
    if isinstance(work, Writer):
        return work.alone.devices_per_replica
    resources = work.stage.resources
    return resources.gpus if resources is not None and resources.gpu else 0


def standing(asked: Problem, needed: Replicas, zones: Zones) -> Standing:
    """Return the stages as groups that fail, with the cuts of the graph.  `needed` of each hold the limits at peak."""
    most = {name: FULL * work.capacity_per_s(needed[name]) for name, work in asked.works.items()}
    groups = tuple(
        Group(name=name, needed=needed[name], reliability=reliability_of(work), gpus=gpus_of(work), shards=work.stage.shards)
        for name, work in asked.works.items()
    )
    graph = asked.graph
    return Standing(groups=groups, cuts=cuts.minimal(graph, lambda stage: cuts.carried_without(graph, stage, most)), zones=zones)


def rented(asked: Problem, needed: Replicas, objective: float, zones: Zones) -> tuple[Standing, Replicas, str]:
    """Return the fleet with its spares, and what asked for them."""
    stands = standing(asked, needed, zones)
    found, binds = secure(stands, objective, lambda counts: sum(asked.usd_per_h(name, n) for name, n in counts.items()))
    return stands, found, binds


def promise(asked: Problem) -> Limit | None:
    """Return the availability among the limits, None where there is none."""
    return next((limit for limit in asked.graph.slo if limit.metric == "availability"), None)


def secured(asked: Problem, needed: Replicas, limit: Limit, zones: Zones) -> StagesSecured:
    """Return the fleet with its spares as a plan's record holds it."""
    stands, found, binds = rented(asked, needed, limit.limit, zones)
    held, low, high = stands.held(found), stands.at("low").held(found), stands.at("high").held(found)
    paid, without = asked.usd_of(found), asked.usd_of(needed)
    return StagesSecured(
        objective=limit.limit,
        availability=held,
        interval=(low, high),
        whole=stands.whole(found),
        downtime_min_per_year=(1 - held) * YEAR_MIN,
        downtime_interval=((1 - high) * YEAR_MIN, (1 - low) * YEAR_MIN),
        zones=zones.count,
        survives_zone=zones.survive,
        binds=binds,
        spare_usd_per_hour=None if paid is None or without is None else round(paid - without, 6),
        cuts=stands.cuts,
        stages=tuple(_spare(stands, group, found[group.name]) for group in stands.groups),
        provenance=Provenance.ASSUMED,
        assumptions=tuple(_assumptions(asked, stands)),
    )


def _spare(stands: Standing, group: Group, replicas: int) -> StageSpare:
    return StageSpare(
        stage=group.name,
        needed=group.needed,
        replicas=replicas,
        shards=group.shards,
        zones=spread(replicas, stands.zones.count),
        availability=stands.alone(group.name, replicas),
        replica_mtbf_s=group.reliability.mtbf_s(group.gpus),
        replica_repair_s=group.reliability.repair_s(group.gpus),
    )


def _assumptions(asked: Problem, stands: Standing) -> Iterator[str]:
    zones = stands.zones
    where = "in one zone (--zones says more)" if zones.count == 1 else f"over {zones.count} zones"
    yield f"replicas of every stage stand {where}; stages and replicas fail independently of each other, zones as a whole"
    for words in cuts.in_words(stands.cuts):
        yield f"{words}: one of them answers while the other is away"
    trusted = {name for cut in stands.cuts if len(cut) > 1 for name in cut}
    for stage in asked.graph.stages:
        if stage.fallback is not None and stage.name in asked.works and stage.name not in trusted and (stage.name,) in stands.cuts:
            yield f"{stage.name}: its fallback does not carry all that would come, so it counts for nothing here"
    yield "a stage that is away refuses at once; what stands in for it carries the load, headroom apart"
    if any(group.gpus == 0 for group in stands.groups):
        yield "replicas that share a machine go with it, and failures are counted replica by replica: keep those of one stage apart"
    group = max(stands.groups, key=lambda g: g.gpus)
    for name, given in group.reliability.figures():
        if group.gpus or name != "MTBF of a GPU":
            yield f"{name} of {group.name} {units.show_s(given.value)} ({given.provenance}): {given.source}"
    if zones.count > 1 or zones.up < 1:
        yield f"a zone is away {units.show_s(zones.mttr.value)} every {units.show_s(zones.mtbf.value)}: {zones.mttr.source}"


def binding(found: StagesSecured, limit: Limit) -> str:
    """Return what asks for the last replica, with the counts of all stages."""
    needed, spare = sum(s.needed * s.shards for s in found.stages), sum((s.replicas - s.needed) * s.shards for s in found.stages)
    what = f"the loss of one of {found.zones} zones" if found.binds == "zone" else slo.show_limit(limit)
    return f"{what} ({needed} + {spare} replicas)"
