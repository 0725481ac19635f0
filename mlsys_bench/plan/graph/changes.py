"""What a change of a stage graph would save or cost: each is the request again with one thing changed, planned as the first was.

More traffic, later limits, a stage that is a tenth slower, a cache that answers more or nothing, retries left out, INT8 weights of a
language model.  Times of a stage change in the law the scenario assumes, or in the profile that was measured; a language model keeps the
kind of device that it was planned on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from mlsys_bench import slo
from mlsys_bench.plan.graph.answer import GraphRequest
from mlsys_bench.plan.sensitivity import MORE_S, MORE_SHARE, Variant
from mlsys_bench.stages import Stage, StageGraph
from mlsys_bench.types import SLO, LatencyProfile, Limit, Plan

MORE_HITS = 0.1  # of the visits
MOST_HITS = 0.99


def variants(request: GraphRequest, plan: Plan) -> Iterator[Variant]:
    """Yield the changes, those of the whole first."""
    graph = request.graph
    yield Variant(what="10 % more traffic", requests=(_faster(request),))
    for limit in slo.latencies(graph.slo):
        for what, limit_s in (("1 ms later", limit.limit + MORE_S), ("10 % later", limit.limit * (1 + MORE_SHARE))):
            later = dataclasses.replace(graph, slo=_moved(graph.slo, limit, limit_s))
            yield Variant(what=f"{slo.key(limit)} {what}", requests=(dataclasses.replace(request, graph=later),))
    profiles = {stage.stage: stage.profile for stage in plan.stages}
    for stage in graph.stages:
        yield from _of_stage(request, stage, profiles.get(stage.name))


def _of_stage(request: GraphRequest, stage: Stage, profile: LatencyProfile | None) -> Iterator[Variant]:
    if stage.service is not None and profile is not None:
        same = "other devices than the one planned" if stage.engine is not None else ""
        yield Variant(what=f"{stage.name} 10 % slower", requests=(slower(request, stage, profile),), leaves_out=same)
    if stage.cache is not None:
        yield from _of_cache(request, stage)
    if stage.retries is not None:
        yield Variant(what=f"no retries at {stage.name}", requests=(_with(request, dataclasses.replace(stage, retries=None)),))
    if stage.engine is not None and stage.engine.precision != ("int8",) and stage.name not in request.profiles:
        engine = dataclasses.replace(stage.engine, precision=("int8",))
        service = dataclasses.replace(stage.service, roofline=engine)  # type: ignore[type-var]
        changed = _with(request, dataclasses.replace(stage, service=service))
        yield Variant(what=f"INT8 weights at {stage.name}", requests=(changed,), leaves_out="what INT8 does to answers")


def _of_cache(request: GraphRequest, stage: Stage) -> Iterator[Variant]:
    cache = stage.cache
    assert cache is not None
    if cache.popularity is not None:
        twice = dataclasses.replace(cache.popularity, size=2 * cache.popularity.size)
        larger = dataclasses.replace(cache, popularity=twice)
        yield Variant(what=f"a cache twice as large at {stage.name}", requests=(_with(request, dataclasses.replace(stage, cache=larger)),))
    elif cache.hit is not None:
        more = dataclasses.replace(cache, hit=min(cache.hit + MORE_HITS, MOST_HITS))
        yield Variant(
            what=f"{100 * (more.hit or 0.0):.0f} % hits at {stage.name} for {100 * cache.hit:.0f} %",
            requests=(_with(request, dataclasses.replace(stage, cache=more)),), leaves_out="the price of the cache",
        )  # fmt: skip
    none = dataclasses.replace(cache, hit=0.0, popularity=None)
    yield Variant(what=f"no hits at {stage.name}", requests=(_with(request, dataclasses.replace(stage, cache=none)),))


def slower(request: GraphRequest, stage: Stage, profile: LatencyProfile, times: float = 1 + MORE_SHARE) -> GraphRequest:
    """Return the request with a stage whose every visit takes so many times as long."""
    assumed = stage.service.assumed if stage.service else None
    if assumed is None or stage.name in request.profiles:
        return dataclasses.replace(request, profiles={**request.profiles, stage.name: _stretched(profile, times)})
    law = dataclasses.replace(assumed, mean_s=assumed.mean_s * times, per_item_s=assumed.per_item_s * times)
    return _with(request, dataclasses.replace(stage, service=dataclasses.replace(stage.service, assumed=law)))  # type: ignore[type-var]


def _stretched(profile: LatencyProfile, times: float) -> LatencyProfile:
    """Return the profile with all times multiplied; an SCV is none, and multipliers of full speed count as times."""
    pairs = zip(profile.terms, profile.coefficients, strict=True)
    return dataclasses.replace(profile, coefficients=tuple(value if name == "scv" else value * times for name, value in pairs))


def _faster(request: GraphRequest) -> GraphRequest:
    traffic = request.graph.workload
    graph = dataclasses.replace(request.graph, workload=dataclasses.replace(traffic, rate_per_s=traffic.rate_per_s * (1 + MORE_SHARE)))
    due_s = None if request.due_s is None else request.due_s / (1 + MORE_SHARE)
    return dataclasses.replace(request, graph=graph, due_s=due_s)


def _moved(limits: SLO, limit: Limit, limit_s: float) -> SLO:
    return tuple(dataclasses.replace(one, limit=limit_s) if one == limit else one for one in limits)


def _with(request: GraphRequest, stage: Stage) -> GraphRequest:
    """Return the request with this stage in place of the one of its name."""
    return dataclasses.replace(request, graph=with_stage(request.graph, stage))


def with_stage(graph: StageGraph, stage: Stage) -> StageGraph:
    """Return the graph with this stage in place of the one of its name."""
    return dataclasses.replace(graph, stages=tuple(stage if one.name == stage.name else one for one in graph.stages))
