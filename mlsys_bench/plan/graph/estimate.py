"""A stage graph by theory: every visit takes its stage's wait and work, as if stages knew nothing of each other.

The time of the whole is the law of these sums, maxima and detours, found on one fixed sample of requests: percentiles are taken of the
whole, never added.  The same random numbers serve every number of replicas, so that two fleets differ by what they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mlsys_bench.plan.graph import numbers
from mlsys_bench.plan.graph.numbers import SAMPLES
from mlsys_bench.plan.graph.work import Served, Visits, Work, hedged, late
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.scenario import flows
from mlsys_bench.scenario.flow import after
from mlsys_bench.scenario.popularity import hit
from mlsys_bench.stages import DONE, Stage, StageGraph

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
FAILED_S = 1e9  # the time of a request that gets no answer: longer than any limit
_ROUNDS = 40  # times that a request comes back to one stage
_MATTERS = 1e-3  # of the attempts
_WALKS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What users see, by theory; `FAILED_S` where a request fails.  `stages` are the times of each stage's visits."""

    whole: Latencies
    failed: float
    stages: dict[str, Floats]
    lost: dict[str, float]  # share of attempts that were rejected or timed out
    hedged: dict[str, float]  # share of attempts that were sent a second time


def estimate(graph: StageGraph, works: Mapping[str, Work], replicas: Mapping[str, int], rate_per_s: float, arrival_scv: float) -> Estimate:
    """Return what users of so many replicas see at this rate.

    Attempts that are lost to waits, and hedges, make calls that make others wait: walks go on until one meets what it counts with.
    """
    lost, again = late(works), hedged(works)
    for _ in range(_WALKS):
        made = _Walk(graph, works, replicas, rate_per_s, arrival_scv, lost, again).through()
        if _apart(lost, made.lost) < _MATTERS and _apart(again, made.hedged) < _MATTERS:
            break
        lost, again = made.lost, made.hedged
    return made


def _apart(counted: Mapping[str, float], met: Mapping[str, float]) -> float:
    """Return how far shares of attempts lie apart, where they lie farthest."""
    return max((abs(counted.get(name, 0.0) - met.get(name, 0.0)) for name in {*counted, *met}), default=0.0)


@dataclass(slots=True)
class _Walk:
    graph: StageGraph
    works: Mapping[str, Work]
    replicas: Mapping[str, int]
    rate_per_s: float
    arrival_scv: float
    lost: Mapping[str, float]
    hedged: Mapping[str, float]
    first_s: Floats = field(default_factory=lambda: np.full(SAMPLES, np.nan))
    tpot_s: Floats = field(default_factory=lambda: np.full(SAMPLES, np.nan))
    came: dict[str, int] = field(default_factory=dict)
    seen: dict[str, list[Floats]] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)
    again: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def through(self) -> Estimate:
        found = flows(self.graph.stages, self.graph.entry, self.lost, self.hedged)
        self.shares = {name: flow.calls for name, flow in found.items()}
        everybody = np.arange(SAMPLES)
        e2e_s = self.enter(self.graph.entry, everybody, np.zeros(SAMPLES))
        ended = np.isfinite(e2e_s)
        e2e_s = np.minimum(e2e_s, FAILED_S)
        ttft_s = np.where(np.isnan(self.first_s), e2e_s, np.minimum(self.first_s, e2e_s))
        whole = Latencies(ttft_s=ttft_s, tpot_s=self.tpot_s, e2e_s=e2e_s, itl_s=self.tpot_s[~np.isnan(self.tpot_s)])
        lost, hedged = (
            {name: made[name] / count for name, count in self.attempts.items() if made.get(name)} for made in (self.gone, self.again)
        )
        stages = {name: np.concatenate(times) for name, times in self.seen.items()}
        return Estimate(whole=whole, failed=1 - float(ended.mean()), stages=stages, lost=lost, hedged=hedged)

    # ------------------------------------------------------------ ways

    def enter(self, name: str, who: Ints, at_s: Floats) -> Floats:
        """Return when these requests, at a stage at these times, end."""
        if name == DONE or not len(who):
            return at_s
        stage = self.graph.stage(name)
        self.came[name] = self.came.get(name, 0) + 1
        if stage.is_async:
            return at_s
        is_cache = stage.cache is not None and stage.cache.on_miss is not None
        if stage.cache is None or is_cache:
            return self.work(stage, who, at_s)
        return self.split(self.uniform(stage, "hit")[who] < hit(stage.cache), who, at_s, stage.cache.on_hit, None, stage)

    def split(self, yes: npt.NDArray[np.bool_], who: Ints, at_s: Floats, then: str, other: str | None, stage: Stage) -> Floats:
        """Send some one way, the rest another; `other` None: to the stage's own work."""
        ends = np.empty(len(who))
        ends[yes] = self.enter(then, who[yes], at_s[yes])
        rest = (stage, who[~yes], at_s[~yes])
        ends[~yes] = self.work(*rest) if other is None else self.enter(other, *rest[1:])
        return ends

    def leave(self, stage: Stage, who: Ints, at_s: Floats) -> Floats:
        """Return when requests end that have had the stage's work."""
        if not len(who):
            return at_s
        if stage.cache is not None and stage.cache.on_miss is not None:
            return self.split(self.uniform(stage, "hit")[who] < hit(stage.cache), who, at_s, stage.cache.on_hit, stage.cache.on_miss, stage)
        if stage.parallel:
            at_s = self.joined(stage, who, at_s)
        ways = after(stage)[len(stage.parallel) :]
        ends, u, below = np.full(len(who), np.inf), self.uniform(stage, "way")[who], 0.0
        alive = np.isfinite(at_s)
        if stage.escalate is not None and self.came[stage.name] > _ROUNDS:
            ways, u = ways[1:], u * sum(share for _, share in ways[1:])
        for target, share in ways:
            these = alive & (u >= below) & (u < below + share)
            below += share
            ends[these] = self.enter(target, who[these], at_s[these])
        return ends

    def joined(self, stage: Stage, who: Ints, at_s: Floats) -> Floats:
        """Return when a parallel stage goes on: with the slowest branch, or once enough have answered."""
        before, ends, said = (self.first_s[who], self.tpot_s[who]), [], []
        for branch in stage.parallel:
            self.first_s[who], self.tpot_s[who] = before
            ends.append(self.enter(branch, who, at_s))
            said.append((self.first_s[who], self.tpot_s[who]))
        branches = np.sort(ends, axis=0)
        goes_s = branches[-1]
        if stage.join is not None:
            by_s = at_s if stage.join.by_s is None else at_s + stage.join.by_s
            goes_s = np.minimum(goes_s, np.maximum(branches[stage.join.k - 1], by_s))
        self.heard(who, before, np.array(ends), np.array(said), goes_s)
        return np.asarray(goes_s)

    def heard(self, who: Ints, before: tuple[Floats, Floats], ends: Floats, said: Floats, goes_s: Floats) -> None:
        """Keep the tokens of the branch that answered last of those in time.  ends: [branch, request]; said: [branch, 2, request]."""
        spoke = (ends <= goes_s) & ~np.isnan(said[:, 0]) & (said[:, 0] != before[0])
        last = np.argmax(np.where(spoke, ends, -np.inf), axis=0)
        first_s, tpot_s = said[last, :, np.arange(len(who))].T
        self.first_s[who] = np.where(spoke.any(axis=0), first_s, before[0])
        self.tpot_s[who] = np.where(spoke.any(axis=0), tpot_s, before[1])

    # ------------------------------------------------------------ work

    def work(self, stage: Stage, who: Ints, at_s: Floats) -> Floats:
        """Return when requests end that ask for the stage's work at these times."""
        if stage.service is None or not len(who):
            return self.leave(stage, who, at_s)
        began_s, now_s, pending = at_s.copy(), at_s.copy(), np.arange(len(who))
        tries = stage.retries.max if stage.retries else 0
        served = np.zeros(len(who), dtype=bool)
        for number in range(tries + 1):
            time_s, ok = self.attempt(stage, who[pending], now_s[pending], number)
            now_s[pending] += time_s
            served[pending[ok]] = True
            pending = pending[~ok]
            if number < tries and stage.retries is not None:
                now_s[pending] += stage.retries.backoff_s * 2**number
        self.seen.setdefault(stage.name, []).append(now_s - began_s)
        ends = np.full(len(who), np.inf)
        ends[served] = self.leave(stage, who[served], now_s[served])
        if stage.fallback is not None:
            self.first_s[who[~served]] = np.nan
            ends[~served] = self.enter(stage.fallback.to, who[~served], now_s[~served])
        return ends

    def attempt(self, stage: Stage, who: Ints, at_s: Floats, number: int) -> tuple[Floats, npt.NDArray[np.bool_]]:
        """Return how long one attempt takes, and whether it is answered."""
        time_s, tokens = self.visits(stage, number)
        time_s = time_s[who]
        if stage.hedge is not None:
            until_s = math.inf if stage.timeout_s is None else stage.timeout_s
            if stage.hedge.after_s < until_s:
                self.again[stage.name] = self.again.get(stage.name, 0) + int((time_s > stage.hedge.after_s).sum())
            second_s, _ = self.visits(stage, number + 100)
            time_s = np.minimum(time_s, stage.hedge.after_s + second_s[who])
        work = self.works[stage.name]
        met = (self.replicas[stage.name], self.calls_per_s(stage), self.arrival_scv_at(stage))
        blocked = work.blocked(*met) if isinstance(work, Served) else 0.0
        rejected = self.uniform(stage, "room", number)[who] < blocked
        late = time_s > stage.timeout_s if stage.timeout_s is not None else np.zeros(len(who), dtype=bool)
        failed = self.uniform(stage, "fail", number)[who] < (stage.failure.p if stage.failure else 0.0)
        self.attempts[stage.name] = self.attempts.get(stage.name, 0) + len(who)
        self.gone[stage.name] = self.gone.get(stage.name, 0) + int((rejected | late).sum())
        taken_s = np.where(rejected, 0.0, np.minimum(time_s, stage.timeout_s) if stage.timeout_s is not None else time_s)
        ok = ~(rejected | late | failed)
        if tokens.ttft_s is not None and tokens.tpot_s is not None:
            self.first_s[who[ok]] = at_s[ok] + tokens.ttft_s[who[ok]]
            self.tpot_s[who[ok]] = tokens.tpot_s[who[ok]]
        return taken_s, ok

    def visits(self, stage: Stage, number: int) -> tuple[Floats, Visits]:
        purpose = f"{stage.name}/{self.came[stage.name]}/{number}"
        found = self.works[stage.name].visits(self.replicas[stage.name], self.calls_per_s(stage), self.arrival_scv_at(stage), purpose)
        return found.e2e_s, found

    def arrival_scv_at(self, stage: Stage) -> float:
        """Return the SCV between calls of a stage: of a share of the requests, drawn at random, it is nearer to 1."""
        return 1 + min(self.shares[stage.name], 1.0) * (self.arrival_scv - 1)

    def calls_per_s(self, stage: Stage) -> float:
        return self.rate_per_s * self.shares[stage.name]

    def uniform(self, stage: Stage, what: str, number: int = 0) -> Floats:
        return numbers.uniform(f"{stage.name}/{self.came[stage.name]}/{number}/{what}")
