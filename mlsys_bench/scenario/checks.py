"""Whether a stage graph holds together: every complaint names file and key, and says what now."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from mlsys_bench import hardware, models, slo, units
from mlsys_bench.errors import ScenarioError, did_you_mean
from mlsys_bench.scenario.flow import flows
from mlsys_bench.scenario.one_stage import check_precisions, devices, precisions
from mlsys_bench.scenario.values import named
from mlsys_bench.stages import DONE, Stage, StageGraph

MOST_ZIPF = 5.0  # exponents of real traffic lie between 0.5 and 1.5
MOST_ITEMS = 10**15
MOST_SHARDS = 1000
EXACT = 1e-9  # how far shares may add up beside 1
_OF_WORK = ("concurrency", "batching", "shards", "queue", "timeout_s", "retries", "failure", "hedge", "fallback", "resources")
_NOT_OF_ENGINES = ("concurrency", "batching", "shards", "queue")


def check(graph: StageGraph, where: str) -> None:
    """Raise ScenarioError for the first thing that does not hold."""
    names = [stage.name for stage in graph.stages]
    if not names:
        raise ScenarioError(f"{where}: stages: holds no stage")
    if DONE in names:
        raise ScenarioError(f"{where}: stages.{DONE}: {DONE!r} is where requests end, name the stage otherwise")
    _exists(graph.entry, names, f"{where}: entry")
    for stage in graph.stages:
        here = f"{where}: stages.{stage.name}"
        for key, target in targets(stage):
            _exists(target, [*names, DONE], f"{here}.{key}")
        _check_stage(stage, here)
    check_promises(graph, where)
    _check_no_cycle(graph, where)
    _check_reached(graph, where)
    _check_branches(graph, where)
    named(lambda _: flows(graph.stages, graph.entry), graph.name, where)


def normal(stage: Stage) -> Stage:
    """Return the stage with catalogue ids for its model and devices."""
    resources, service = stage.resources, stage.service
    if resources is not None and resources.gpu:
        resources = dataclasses.replace(resources, gpu=tuple(hardware.find(gpu).id for gpu in resources.gpu))
    if service is not None and service.roofline is not None:
        model = models.find(service.roofline.model).id
        service = dataclasses.replace(service, roofline=dataclasses.replace(service.roofline, model=model))
    return dataclasses.replace(stage, resources=resources, service=service)


def targets(stage: Stage) -> Iterator[tuple[str, str]]:
    """Yield every stage that one names, with the key that names it."""
    if stage.next is not None:
        yield "next", stage.next
    yield from (("parallel", branch) for branch in stage.parallel)
    yield from ((f"route.to.{target}", target) for target in (stage.route.to if stage.route else ()))
    if stage.cache is not None:
        yield "cache.on_hit", stage.cache.on_hit
        if stage.cache.on_miss is not None:
            yield "cache.on_miss", stage.cache.on_miss
    if stage.fallback is not None:
        yield "fallback.to", stage.fallback.to
    if stage.escalate is not None:
        yield "escalate.to", stage.escalate.to


def _exists(name: str, names: list[str], here: str) -> None:
    if name not in names:
        raise ScenarioError(f"{here}: no stage is called {name!r}{did_you_mean(name, names)}")


# ---------------------------------------------------------------- one stage


def _check_stage(stage: Stage, here: str) -> None:
    for complaint in (*_about_ways(stage), *_about_cache(stage), *_about_work(stage), *_about_failures(stage)):
        raise ScenarioError(f"{here}{complaint}")
    _check_resources(stage, here)


def _about_ways(stage: Stage) -> Iterator[str]:
    if stage.route is not None:
        total = sum(stage.route.to.values())
        if abs(total - 1) > EXACT:
            yield f".route.to: the shares add up to {total:.12g}, they must add up to 1; change one, or send the rest to {DONE}"
        if stage.next is not None or stage.parallel:
            yield f": has route and {'next' if stage.next else 'parallel'}; a request goes on one way, drop one of them"
    if len(stage.parallel) == 1:
        yield ".parallel: one branch is not parallel; write next"
    if DONE in stage.parallel:
        yield f".parallel: {DONE!r} is no branch"
    if stage.join is not None and not stage.parallel:
        yield ".join: there is nothing to join; list the branches under parallel"
    if stage.join is not None and stage.parallel:
        if stage.join.of != len(stage.parallel):
            yield f".join.of: {stage.join.of}, but parallel lists {len(stage.parallel)} branches"
        if stage.join.k > stage.join.of:
            yield f".join.k: {stage.join.k} of {stage.join.of} can never answer; k is at most {stage.join.of}"
    if stage.service is None and not (stage.parallel or stage.route or stage.cache):
        yield ": does nothing; give it a service, a route, parallel branches or a cache"


def _about_cache(stage: Stage) -> Iterator[str]:
    if stage.cache is None:
        return
    if (stage.cache.hit is None) == (stage.cache.popularity is None):
        yield ".cache: needs hit or popularity, one of the two"
    if stage.cache.popularity is not None and stage.cache.popularity.zipf > MOST_ZIPF:
        yield f".cache.popularity.zipf: {stage.cache.popularity.zipf:g} is beyond what is known of any traffic; at most {MOST_ZIPF:g}"
    if stage.cache.popularity is not None and stage.cache.popularity.items > MOST_ITEMS:
        yield f".cache.popularity.items: {stage.cache.popularity.items:,} are more than anybody asks for; at most {MOST_ITEMS:,}"
    if stage.cache.on_miss is None and stage.service is None:
        yield ".cache: stands before the stage's own work, and there is none; give a service, or say on_miss where the stage is the cache"
    onward = [key for key, _ in targets(stage) if key.partition(".")[0] in ("next", "parallel", "route", "escalate")]
    if stage.cache.on_miss is not None and onward:
        yield f": has cache.on_miss and {onward[0].partition('.')[0]}; a cache goes on to on_hit or on_miss"


def _about_work(stage: Stage) -> Iterator[str]:
    service = stage.service
    if service is None:
        usual = Stage(name=stage.name)
        for name in _OF_WORK:
            if getattr(stage, name) != getattr(usual, name):
                yield f".{name.removesuffix('_s')}: belongs to a stage that does work; give it a service"
        return
    given = [kind for kind in ("assumed", "measured", "roofline") if getattr(service, kind) is not None]
    if len(given) != 1:
        yield f".service: has {' and '.join(given) or 'nothing'}; exactly one of assumed, measured and roofline is needed"
    if (law := service.assumed) is not None:
        if (law.cv is None) == (law.dist in ("lognormal", "gamma")):
            yield f".service.assumed: the {law.dist} law {'has no cv to choose' if law.cv else 'needs a cv'}"
        if law.mean_s <= 0 and law.per_item_s <= 0:
            yield ".service.assumed.mean: a visit takes no time at all; write a time above zero"
        if law.spread is not None and law.spread < 1:
            yield f".service.assumed.spread: {law.spread:g}; the true time lies between time / spread and time x spread: at least 1"
        if law.per_item_s > 0 and stage.batching is None:
            yield ".service.assumed.per_item: is the time of one more in a batch, and there is no batching"
    if service.roofline is not None:
        usual = Stage(name=stage.name)
        for name in _NOT_OF_ENGINES:
            if getattr(stage, name) != getattr(usual, name):
                yield f".{name}: a language model batches by itself (service.roofline.max_batch); drop it"
    if stage.shards > MOST_SHARDS:
        yield f".shards: {stage.shards:,}; a plan follows each visit to all of them, {MOST_SHARDS:,} at most"
    if service.measured is not None and not Path(service.measured.file).is_file():
        yield f".service.measured.file: {service.measured.file} is not there; `mlsys fit` writes it"


def _about_failures(stage: Stage) -> Iterator[str]:
    may_fail = stage.timeout_s is not None or stage.queue is not None or stage.failure is not None
    for name in ("retries", "fallback"):
        if getattr(stage, name) is not None and not may_fail and stage.service is not None:
            yield f".{name}: is never needed, as nothing goes wrong here; give a timeout, a queue limit or a failure"
    if stage.timeout_s is not None and stage.timeout_s <= 0:
        yield ".timeout: 0 s is no time for an answer"
    if stage.timeout_s is not None and stage.hedge is not None and stage.hedge.after_s >= stage.timeout_s:
        after, given_up = units.show_s(stage.hedge.after_s), units.show_s(stage.timeout_s)
        yield f".hedge.after: {after}, and an attempt is given up after {given_up}: no second copy is ever sent; write less"
    if stage.escalate is not None and stage.escalate.p >= 1:
        yield ".escalate.p: all requests escalate; write next instead"


def _check_resources(stage: Stage, here: str) -> None:
    if stage.service is None:
        return
    resources = stage.resources
    if resources is None or (resources.vcpu is None) == (not resources.gpu):
        what = "both" if resources is not None and resources.gpu else "neither"
        raise ScenarioError(f"{here}.resources: has {what} of vcpu and gpu; say what one replica runs on, e.g. {{vcpu: 2}}")
    if not resources.gpu and resources.gpus > 1:
        raise ScenarioError(f"{here}.resources.gpus: {resources.gpus} of no gpu; say which, e.g. {{gpu: l4, gpus: {resources.gpus}}}")
    gpus = devices(list(resources.gpu), f"{here}.resources.gpu") if resources.gpu else ()
    if stage.engine is not None:
        if not gpus:
            raise ScenarioError(f"{here}.resources: a language model needs a gpu of the catalogue (cpu-2core is one), not vCPUs")
        named(models.find, stage.engine.model, f"{here}.service.roofline.model")
        check_precisions(precisions(list(stage.engine.precision), f"{here}.service.roofline.precision"), gpus, f"{here}.resources")
    elif len(gpus) > 1:
        raise ScenarioError(f"{here}.resources.gpu: the service time is that of one device; name one of {', '.join(gpus)}")


# ---------------------------------------------------------------- the whole


def check_promises(graph: StageGraph, where: str) -> None:
    """Raise for a limit that no stage could have."""
    for stage in graph.stages:
        for limit in stage.slo:
            if limit.metric in slo.SHARES:
                here = f"{where}: stages.{stage.name}.slo"
                raise ScenarioError(f"{here}: {limit.metric} is a promise of the whole; put it into the scenario's slo")
            if limit.metric != "e2e" and stage.engine is None:
                raise ScenarioError(
                    f"{where}: stages.{stage.name}.slo: {limit.metric} is for stages that write tokens; a stage has e2e, its wait and work"
                )
    heard = waited_for(graph)
    for limit in graph.slo:
        if limit.metric == "itl":
            raise ScenarioError(f"{where}: slo: {slo.key(limit)} is a promise of the stage that writes the tokens; put it into its slo")
        if limit.metric in ("ttft", "tpot") and not any(stage.name in heard for stage in graph.engines):
            none = "nobody waits for the one there is" if graph.engines else "there is none"
            raise ScenarioError(f"{where}: slo: {limit.metric} needs a stage that writes tokens, and {none}; use e2e")


def _check_no_cycle(graph: StageGraph, where: str) -> None:
    """Raise for a way back to an earlier stage that is no escalation: by depth first search."""
    done: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        if name in path:
            loop = " -> ".join((*path[path.index(name) :], name))
            raise ScenarioError(f"{where}: stages.{path[-1]}: goes back to {name} ({loop}); only escalate may go back, or retries repeat")
        if name in done:
            return
        for key, target in targets(graph.stage(name)):
            if target != DONE and key != "escalate.to":
                walk(target, (*path, name))
        done.add(name)

    for stage in graph.stages:
        walk(stage.name, ())


def reached(graph: StageGraph, start: str, escalated: bool = True) -> set[str]:
    """Return the stages that requests can come to from one, itself included; or those that they come to without an escalation."""
    found, left = {start}, [start]
    while left:
        for key, target in targets(graph.stage(left.pop())):
            if target not in (DONE, *found) and (escalated or key != "escalate.to"):
                found.add(target)
                left.append(target)
    return found


def waited_for(graph: StageGraph) -> set[str]:
    """Return the stages that users may wait for: those that requests come to without passing an async one."""
    found: set[str] = set()
    left = [graph.entry]
    while left:
        name = left.pop()
        if name not in (DONE, *found) and not graph.stage(name).is_async:
            found.add(name)
            left += [target for _, target in targets(graph.stage(name))]
    return found


def _check_reached(graph: StageGraph, where: str) -> None:
    found = reached(graph, graph.entry)
    for stage in graph.stages:
        if stage.name not in found:
            raise ScenarioError(f"{where}: stages.{stage.name}: no request comes here from {graph.entry}; lead to it, or drop it")


def _check_branches(graph: StageGraph, where: str) -> None:
    """Raise where a branch leads to what comes after its join: it would be done once per branch and once more."""
    for fork in graph.stages:
        later = {fork.name} | (reached(graph, fork.next, escalated=False) if fork.next not in (None, DONE) else set())
        for branch in fork.parallel:
            twice = sorted(reached(graph, branch) & later)
            if twice:
                raise ScenarioError(
                    f"{where}: stages.{fork.name}.parallel: the branch {branch} leads to {twice[0]}, which comes after the join; "
                    f"end the branch before it (leave out its next)"
                )
