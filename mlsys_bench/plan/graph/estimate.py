"""A stage graph by theory: every visit takes its stage's wait and work, as if stages knew nothing of each other.

The time of the whole is the law of these sums, maxima and detours, found on one fixed sample of requests: percentiles are taken of the
whole, never added.  The same random numbers serve every number of replicas, so that two fleets differ by what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mlsys_bench.plan.graph import numbers
from mlsys_bench.plan.graph.numbers import SAMPLES
from mlsys_bench.plan.graph.work import Served, Visits, Work
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.scenario import flows
from mlsys_bench.scenario.flow import after
from mlsys_bench.scenario.popularity import hit
from mlsys_bench.stages import DONE, Stage, StageGraph

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
FAILED_S = 1e9  # the time of a request that gets no answer: longer than any limit
_ROUNDS = 40  # times that a request comes back to one stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What users see, by theory; `FAILED_S` where a request fails.  `stages` are the times of each stage's visits."""

    whole: Latencies
    failed: float
    stages: dict[str, Floats]
    lost: dict[str, float]  # share of attempts that were rejected or timed out


def estimate(graph: StageGraph, works: Mapping[str, Work], replicas: Mapping[str, int], rate_per_s: float, arrival_scv: float) -> Estimate:
    """Return what users of so many replicas see at this rate."""
    lost: dict[str, float] = {}
    while True:
        made = _Walk(graph, works, replicas, rate_per_s, arrival_scv, lost).through()
        if not _changed(lost, made.lost):
            return made
        lost = made.lost


def _changed(before: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Say whether a first walk met so many lost attempts that their retries and fallbacks matter; one correction is made."""
    return not before and any(share > 1e-3 for share in now.values())


@dataclass(slots=True)
class _Walk:
    graph: StageGraph
    works: Mapping[str, Work]
    replicas: Mapping[str, int]
    rate_per_s: float
    arrival_scv: float
    lost: Mapping[str, float]
    first_s: Floats = field(default_factory=lambda: np.full(SAMPLES, np.nan))
    tpot_s: Floats = field(default_factory=lambda: np.full(SAMPLES, np.nan))
    came: dict[str, int] = field(default_factory=dict)
    seen: dict[str, list[Floats]] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)

    def through(self) -> Estimate:
        found = flows(self.graph.stages, self.graph.entry, self.lost)
        self.shares = {name: flow.calls for name, flow in found.items()}
        everybody = np.arange(SAMPLES)
        e2e_s = self.enter(self.graph.entry, everybody, np.zeros(SAMPLES))
        ended = np.isfinite(e2e_s)
        e2e_s = np.minimum(e2e_s, FAILED_S)
        ttft_s = np.where(np.isnan(self.first_s), e2e_s, np.minimum(self.first_s, e2e_s))
        whole = Latencies(ttft_s=ttft_s, tpot_s=self.tpot_s, e2e_s=e2e_s, itl_s=self.tpot_s[~np.isnan(self.tpot_s)])
        lost = {name: self.gone.get(name, 0) / count for name, count in self.attempts.items() if count}
        stages = {name: np.concatenate(times) for name, times in self.seen.items()}
        return Estimate(whole=whole, failed=1 - float(ended.mean()), stages=stages, lost=lost)

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
        branches = np.sort([self.enter(branch, who, at_s) for branch in stage.parallel], axis=0)
        if stage.join is None:
            return np.asarray(branches[-1])
        enough = branches[stage.join.k - 1]
        by_s = at_s if stage.join.by_s is None else at_s + stage.join.by_s
        return np.asarray(np.minimum(branches[-1], np.maximum(enough, by_s)))

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
            second_s, _ = self.visits(stage, number + 100)
            time_s = np.minimum(time_s, stage.hedge.after_s + second_s[who])
        work = self.works[stage.name]
        blocked = work.blocked(self.replicas[stage.name], self.calls_per_s(stage)) if isinstance(work, Served) else 0.0
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
        arrival_scv = 1 + min(self.shares[stage.name], 1.0) * (self.arrival_scv - 1)
        found = self.works[stage.name].visits(self.replicas[stage.name], self.calls_per_s(stage), arrival_scv, purpose)
        return found.e2e_s, found

    def calls_per_s(self, stage: Stage) -> float:
        return self.rate_per_s * self.shares[stage.name]

    def uniform(self, stage: Stage, what: str, number: int = 0) -> Floats:
        return numbers.uniform(f"{stage.name}/{self.came[stage.name]}/{number}/{what}")
