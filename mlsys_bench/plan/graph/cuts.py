"""Which stages must be up for a request to be answered: minimal cuts, the sets of stages that stop all of it when they are away together.

A stage is away when fewer replicas are up than hold the limits.  Then it refuses at once, and what stands in for it is looked at:

    a fallback          the request goes on there, if the replicas there carry what then comes
    k of n branches     enough of the others answer
    an async stage      nobody waits for it

A cache's hits, a route or an escalation send only a share of the requests elsewhere: the others would get no answer, so all ways count.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from mlsys_bench.scenario.flow import after, flows
from mlsys_bench.stages import DONE, Stage, StageGraph

MOST = 3  # stages of a cut: more of them away at once is left out
Able = Callable[[str], bool]


def minimal(graph: StageGraph, able: Able) -> tuple[tuple[str, ...], ...]:
    """Return the minimal cuts of a graph, of `MOST` stages at most.  `able(stage)`: the way of its fallback carries what then comes."""
    working = [stage.name for stage in graph.stages if stage.service is not None]
    trusted = {stage.name for stage in graph.stages if stage.fallback is not None and able(stage.name)}
    found: list[tuple[str, ...]] = []
    for size in range(1, MOST + 1):
        for down in itertools.combinations(working, size):
            if not any(set(cut) <= set(down) for cut in found) and not answered(graph, set(down), trusted):
                found.append(down)
    return tuple(found)


def answered(graph: StageGraph, down: set[str], trusted: set[str]) -> bool:
    """Say whether every request gets an answer with these stages away."""
    return _Walk(graph, down, trusted).ok(graph.entry)


class _Walk:
    """One look at a graph; a stage that is asked for while it is looked at, as by an escalation back, is taken to be there."""

    def __init__(self, graph: StageGraph, down: set[str], trusted: set[str]) -> None:
        self.graph, self.down, self.trusted = graph, down, trusted
        self.known: dict[str, bool] = {DONE: True}

    def ok(self, name: str) -> bool:
        """Say whether requests that come to a stage get an answer."""
        if name not in self.known:
            self.known[name] = True
            self.known[name] = self._looked_at(self.graph.stage(name))
        return self.known[name]

    def _looked_at(self, stage: Stage) -> bool:
        if stage.is_async:
            return True
        if stage.cache is not None and not self.ok(stage.cache.on_hit):
            return False
        if stage.name in self.down:
            return stage.fallback is not None and stage.name in self.trusted and self.ok(stage.fallback.to)
        if stage.cache is not None and stage.cache.on_miss is not None:
            return self.ok(stage.cache.on_miss)
        there = sum(self.ok(branch) for branch in stage.parallel)
        if there < (stage.join.k if stage.join else len(stage.parallel)):
            return False
        return all(self.ok(target) for target, share in after(stage)[len(stage.parallel) :] if share > 0)


def carried_without(graph: StageGraph, stage: str, most_per_s: Mapping[str, float]) -> bool:
    """Say whether all stages carry what comes to them when one is away and its fallback takes over."""
    found = flows(graph.stages, graph.entry, {stage: 1.0})
    rate_per_s = graph.workload.rate_per_s
    return all(rate_per_s * found[name].calls <= most for name, most in most_per_s.items() if name != stage)


def in_words(cuts: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield such as 'generate or extractive', for the stages that stand in for each other."""
    yield from (" or ".join(cut) for cut in cuts if len(cut) > 1)
