"""Where requests go: how often each stage is visited, from the routing equations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mlsys_bench.errors import ScenarioError
from mlsys_bench.scenario import popularity
from mlsys_bench.stages import DONE, Retries, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What passes through one stage, per request of the scenario.

    `visits` is how often requests come by, `calls` how often its replicas work for them: hits of a cache before the stage are not worked
    on, retries are worked on again, and so are the second copies of hedges.  Each of the stage's shards sees every call.
    """

    visits: float
    calls: float


def flows(
    stages: Iterable[Stage], entry: str, lost: Mapping[str, float] | None = None, hedged: Mapping[str, float] | None = None
) -> dict[str, Flow]:
    """Return visits and calls of every stage, by name.

    Routing equations: V_j = [j is the entry] + sum over i of V_i m_ij, m_ij the moves from i to j that one visit to i makes on average;
    a parallel stage moves to all its branches, and then on.  `lost` is the share of a stage's attempts that are rejected or time out,
    beside those that fail; `hedged` is the share that is sent a second time.
    Raises ScenarioError where requests go round for ever.
    """
    every, lost, hedged = tuple(stages), lost or {}, hedged or {}
    at = {stage.name: i for i, stage in enumerate(every)}
    moves = np.zeros((len(every), len(every)))
    for stage in every:
        for target, times in ways(stage, lost.get(stage.name, 0.0)).items():
            moves[at[stage.name], at[target]] = times
    first = np.array([float(stage.name == entry) for stage in every])
    if max(abs(np.linalg.eigvals(moves)), default=0.0) >= 1 - 1e-12:
        raise ScenarioError("requests go round for ever: the escalations of a loop send back all that come; lower a p")
    visits = np.linalg.solve(np.eye(len(every)) - moves.T, first)
    calls = {s.name: worked(s) * attempts(s, lost.get(s.name, 0.0)) * (1 + hedged.get(s.name, 0.0)) for s in every}
    return {s.name: Flow(visits=float(v), calls=float(v) * calls[s.name]) for s, v in zip(every, visits, strict=True)}


def ways(stage: Stage, lost: float = 0.0) -> dict[str, float]:
    """Return where one visit to a stage goes on, and how often on average; visits that end here are left out."""
    answered = attempts(stage, lost) * (1 - failing(stage, lost))
    moves: list[tuple[str, float]] = []
    if stage.fallback is not None:
        moves.append((stage.fallback.to, worked(stage) * (1 - answered)))
    if stage.cache is not None:
        share = popularity.hit(stage.cache)
        moves.append((stage.cache.on_hit, share * (answered if stage.cache.on_miss is not None else 1.0)))
        if stage.cache.on_miss is not None:
            moves.append((stage.cache.on_miss, (1 - share) * answered))
    moves += [(target, worked(stage) * answered * share) for target, share in after(stage)]
    found: dict[str, float] = {}
    for target, times in moves:
        if target != DONE and times > 0:
            found[target] = found.get(target, 0.0) + times
    return found


def after(stage: Stage) -> list[tuple[str, float]]:
    """Return where a request goes from a stage that has done its own work, with shares; a parallel stage to all branches and on."""
    if stage.cache is not None and stage.cache.on_miss is not None:
        return []
    rest = 1 - (stage.escalate.p if stage.escalate else 0.0)
    escalated = [(stage.escalate.to, stage.escalate.p)] if stage.escalate else []
    branches = [(branch, 1.0) for branch in stage.parallel]
    if stage.route is not None:
        return [*escalated, *((target, rest * p) for target, p in stage.route.to.items())]
    return [*branches, *escalated, (stage.next or DONE, rest)]


def worked(stage: Stage) -> float:
    """Return the share of the visits on which the stage does its own work: those that no cache before it answers."""
    return 1.0 if stage.cache is None or stage.cache.on_miss is not None else 1 - popularity.hit(stage.cache)


def failing(stage: Stage, lost: float = 0.0) -> float:
    """Return the share of attempts that fail, lost ones included."""
    return 1 - (1 - (stage.failure.p if stage.failure else 0.0)) * (1 - lost)


def attempts(stage: Stage, lost: float = 0.0) -> float:
    """Return attempts per piece of work: 1 + f + f^2 … as far as retries and their budget go, 0 where the stage does no work."""
    if stage.service is None:
        return 1.0
    retries, f = stage.retries or Retries(max=0), failing(stage, lost)
    repeated = float(retries.max) if f >= 1 else f * (1 - f**retries.max) / (1 - f)
    return 1 + min(repeated, retries.budget)
