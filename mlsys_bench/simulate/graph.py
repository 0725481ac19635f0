"""A stage graph request by request: discrete events in virtual time, every construct of a scenario as it says.

A stage's replicas stand behind one queue, first come first served (a balancer that sends each request where there is room comes close to
it; one that sends at random does worse).  A stage that serves a language model is a delay whose law was simulated token by token.

    enter      a request comes to a stage: cache, then work, then the way on
    attempt    one try at a stage's work, with its timeout and hedge; each of its shards must answer
    branch     a request in a parallel stage is so many branches that meet in a join; a branch ends as a request does
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench.queueing import Law
from mlsys_bench.scenario.flow import after
from mlsys_bench.scenario.popularity import hit
from mlsys_bench.stages import DONE, Stage, StageGraph

Floats = npt.NDArray[np.float64]
_BLOCK = 4096  # draws made at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Station:
    """The replicas of a stage: `servers` in all, each taking (fixed_s + per_item_s n) x noise for a batch of n; `room` may wait."""

    servers: int
    fixed_s: float
    noise: Law  # mean 1
    per_item_s: float = 0.0
    max_batch: int = 1
    max_wait_s: float = 0.0
    room: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delay:
    """A stage that answers by itself: one sample of first token, time per token (NaN where there is none) and end for each visit."""

    ttft_s: Floats
    tpot_s: Floats
    e2e_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class StageUse:
    """What one stage saw.  `sojourn_s` is one time per visit that was worked on, retries included, by request."""

    visits: int  # requests that came by
    calls: int  # attempts that its replicas were given
    hits: int
    rejected: int
    timed_out: int
    failed: int
    retried: int
    hedged: int
    fell_back: int
    batches: int
    busy_s: float  # of all its servers and shards
    requests: Floats  # index of the request of each visit
    sojourn_s: Floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """One run: when each request was due, its first token and its end; infinite where it failed."""

    due_s: Floats
    first_s: Floats
    done_s: Floats
    tpot_s: Floats
    ends_s: float
    stages: dict[str, StageUse]


def play(graph: StageGraph, stations: Mapping[str, Station | Delay], due_s: Floats, seed: int = 0) -> Played:
    """Return what happens to requests that are due at these times.  The same seed gives the same run."""
    return _Run(graph, stations, due_s, seed).to_the_end()


# ---------------------------------------------------------------- what is in flight


@dataclass(slots=True, eq=False)
class _Join:
    """The branches of one request in a parallel stage.  `outer` is the join it is itself a branch of."""

    place: _Place
    outer: _Join | None
    left: int
    need: int
    waits: bool  # for all of them, so far
    answered: int = 0
    is_over: bool = False


@dataclass(slots=True, eq=False)
class _Attempt:
    """One try at a stage's work for one request.  `left` counts the shards still to answer, by copy."""

    place: _Place
    request: int
    join: _Join | None
    came_s: float
    number: int
    left: list[int]
    is_over: bool = False
    waiting: int = 0  # of its jobs, in queues
    sample: int = -1  # of a delay
    sent_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Queue:
    """One station: its free servers and who waits."""

    station: Station
    free: int
    draws: Callable[[], float]
    jobs: deque[tuple[float, _Attempt, int]] = field(default_factory=deque)
    waiting: int = 0
    alarm_s: float = math.inf  # when a batch that is not full has waited long enough


class _Place:
    """A stage at run time: where it leads, what it counts."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.hit = hit(stage.cache) if stage.cache else 0.0
        self.is_cache = stage.cache is not None and stage.cache.on_miss is not None
        self.works = stage.service is not None
        self.fails = stage.failure.p if stage.failure else 0.0
        self.tries = stage.retries.max if stage.retries else 0
        self.queues: list[_Queue] = []
        self.delay: Delay | None = None
        self.draw: Callable[[], float] = random.random
        self.on_hit: _Place | None = None
        self.on_miss: _Place | None = None
        self.on_fail: _Place | None = None
        self.branches: list[_Place] = []
        self.ways: list[tuple[float, _Place | None]] = []  # cumulated shares; the way on after work and join
        self.visits = self.calls = self.hits = self.rejected = self.timed_out = self.failed = 0
        self.retried = self.hedged = self.fell_back = self.batches = 0
        self.busy_s = 0.0
        self.seen: list[tuple[int, float]] = []

    def lead(self, places: Mapping[str, _Place]) -> None:
        """Look up the stages that this one names."""
        stage = self.stage
        if stage.cache is not None:
            self.on_hit = places.get(stage.cache.on_hit)
            self.on_miss = places.get(stage.cache.on_miss or DONE)
        if stage.fallback is not None:
            self.on_fail = places.get(stage.fallback.to)
        self.branches = [places[name] for name in stage.parallel]
        total = 0.0
        for target, share in after(stage)[len(self.branches) :]:
            total += share
            self.ways.append((total, places.get(target)))

    def use(self) -> StageUse:
        """Return what was counted."""
        requests, sojourn_s = zip(*self.seen, strict=True) if self.seen else ((), ())
        return StageUse(
            visits=self.visits, calls=self.calls, hits=self.hits, rejected=self.rejected, timed_out=self.timed_out, failed=self.failed,
            retried=self.retried, hedged=self.hedged, fell_back=self.fell_back, batches=self.batches, busy_s=self.busy_s,
            requests=np.array(requests, dtype=np.float64), sojourn_s=np.array(sojourn_s, dtype=np.float64),
        )  # fmt: skip


# ---------------------------------------------------------------- the run


class _Run:
    """The clock, the events and the places."""

    def __init__(self, graph: StageGraph, stations: Mapping[str, Station | Delay], due_s: Floats, seed: int) -> None:
        self.rng, self.random = np.random.default_rng([seed, 2]), random.Random(seed).random
        self.due_s = due_s
        self.first_s, self.done_s = [math.nan] * len(due_s), [math.inf] * len(due_s)
        self.tpot_s = [math.nan] * len(due_s)
        self.events: list[tuple[float, int, Callable[..., None], Any]] = []
        self.count = 0
        self.now_s = 0.0
        self.places = {stage.name: _Place(stage) for stage in graph.stages}
        for place in self.places.values():
            place.lead(self.places)
            self._equip(place, stations.get(place.stage.name))
        self.entry = self.places[graph.entry]

    def _equip(self, place: _Place, station: Station | Delay | None) -> None:
        if isinstance(station, Delay):
            place.delay = station
            count = len(station.e2e_s)
            place.draw = lambda: int(self.random() * count)
        elif station is not None:
            noise = _drawn(station.noise, self.rng)
            place.queues = [_Queue(station, station.servers, noise) for _ in range(place.stage.shards)]

    def to_the_end(self) -> Played:
        """Let all requests arrive and everything that they began come to its end."""
        events = self.events
        arrivals = enumerate(self.due_s.tolist())
        at = next(arrivals, None)
        while at is not None or events:
            if at is not None and (not events or at[1] <= events[0][0]):
                self.now_s = at[1]
                self.enter(self.entry, at[0], None)
                at = next(arrivals, None)
                continue
            self.now_s, _, happens, what = heapq.heappop(events)
            happens(what)
        done_s = np.array(self.done_s)
        first_s = np.array(self.first_s)
        return Played(
            due_s=self.due_s, first_s=np.where(np.isnan(first_s), done_s, np.minimum(first_s, done_s)), done_s=done_s,
            tpot_s=np.array(self.tpot_s), ends_s=self.now_s, stages={name: place.use() for name, place in self.places.items()},
        )  # fmt: skip

    def at(self, time_s: float, happens: Callable[..., None], what: Any) -> None:
        """Put an event on the heap."""
        self.count += 1
        heapq.heappush(self.events, (time_s, self.count, happens, what))

    # ------------------------------------------------------------ ways

    def enter(self, place: _Place | None, request: int, join: _Join | None) -> None:
        """Let a request come to a stage, or to its end."""
        if place is None:
            self.finish(request, join)
            return
        place.visits += 1
        if place.stage.is_async:  # nobody waits for it: a join of its own that nothing follows
            self.finish(request, join)
            join = _Join(place, None, 1, 1, waits=False, is_over=True)
        if place.hit and not place.is_cache and self.random() < place.hit:
            place.hits += 1
            self.enter(place.on_hit, request, join)
        elif place.works:
            self.attempt(_Attempt(place, request, join, self.now_s, 0, [place.stage.shards]))
        else:
            self.leave(place, request, join)

    def leave(self, place: _Place, request: int, join: _Join | None) -> None:
        """Let a request go on from a stage whose work is done."""
        if place.is_cache:
            is_hit = self.random() < place.hit
            place.hits += is_hit
            self.enter(place.on_hit if is_hit else place.on_miss, request, join)
        elif place.branches:
            self.fork(place, request, join)
        else:
            self.go_on(place, request, join)

    def go_on(self, place: _Place, request: int, join: _Join | None) -> None:
        """Choose one of the ways on."""
        ways = place.ways
        if len(ways) == 1:
            self.enter(ways[0][1], request, join)
            return
        u = self.random()
        self.enter(next((way for share, way in ways if u < share), ways[-1][1]), request, join)

    def fork(self, place: _Place, request: int, outer: _Join | None) -> None:
        """Start all branches of a parallel stage."""
        rule, count = place.stage.join, len(place.branches)
        join = _Join(place, outer, count, rule.k if rule else count, waits=rule is None or rule.by_s is not None)
        if rule is not None and rule.by_s is not None:
            self.at(self.now_s + rule.by_s, self._by, (request, join))
        for branch in place.branches:
            self.enter(branch, request, join)

    def _by(self, what: tuple[int, _Join]) -> None:
        request, join = what
        join.waits = False
        self.judge(request, join)

    def finish(self, request: int, join: _Join | None) -> None:
        """End a request, or a branch with its answer."""
        if join is None:
            self.done_s[request] = self.now_s
        elif not join.is_over:
            join.answered += 1
            join.left -= 1
            self.judge(request, join)

    def give_up(self, request: int, join: _Join | None) -> None:
        """End a request, or a branch, without an answer."""
        if join is not None and not join.is_over:
            join.left -= 1
            self.judge(request, join)

    def judge(self, request: int, join: _Join) -> None:
        """Go on from a parallel stage when enough branches have answered; give up when they no longer can."""
        if join.is_over:
            return
        if join.answered >= join.need and not (join.waits and join.left):
            join.is_over = True
            self.go_on(join.place, request, join.outer)
        elif join.answered + join.left < join.need:
            join.is_over = True
            self.give_up(request, join.outer)

    # ------------------------------------------------------------ work

    def attempt(self, attempt: _Attempt) -> None:
        """Give a stage's replicas a try at its work."""
        place, stage = attempt.place, attempt.place.stage
        place.calls += 1
        attempt.sent_s = self.now_s
        if stage.timeout_s is not None:
            self.at(self.now_s + stage.timeout_s, self._timeout, attempt)
        if stage.hedge is not None:
            self.at(self.now_s + stage.hedge.after_s, self._hedge, attempt)
        self.send(attempt, 0)

    def send(self, attempt: _Attempt, copy: int) -> None:
        """Send one copy of an attempt to every shard."""
        place = attempt.place
        if place.delay is not None:
            sample = int(place.draw())
            self.at(self.now_s + float(place.delay.e2e_s[sample]), self._delayed, (attempt, sample, self.now_s))
            return
        if any(q.station.room is not None and not q.free and q.waiting >= q.station.room for q in place.queues):
            place.rejected += 1
            if copy == 0:
                self.fail(attempt)
            return
        for queue in place.queues:
            if queue.station.max_batch == 1 and queue.free:
                self.serve(queue, (attempt, copy))
            else:
                queue.jobs.append((self.now_s, attempt, copy))
                queue.waiting += 1
                attempt.waiting += 1
                if queue.station.max_batch > 1:
                    self.start_batch(queue)

    def serve(self, queue: _Queue, job: tuple[_Attempt, int]) -> None:
        """Put one job into service."""
        queue.free -= 1
        time_s = queue.station.fixed_s * queue.draws()
        job[0].place.busy_s += time_s
        self.at(self.now_s + time_s, self._served, (queue, job))

    def _served(self, what: tuple[_Queue, tuple[_Attempt, int]]) -> None:
        queue, (attempt, copy) = what
        queue.free += 1
        while queue.jobs:
            _, waited, its_copy = queue.jobs.popleft()
            if not waited.is_over:
                queue.waiting -= 1
                waited.waiting -= 1
                self.serve(queue, (waited, its_copy))
                break
        self.answer(attempt, copy)

    def start_batch(self, queue: _Queue) -> None:
        """Start as many batches as are due, and set an alarm for the next."""
        station = queue.station
        while queue.free and queue.waiting:
            while queue.jobs[0][1].is_over:
                queue.jobs.popleft()
            due_s = queue.jobs[0][0] + station.max_wait_s
            if queue.waiting < station.max_batch and self.now_s < due_s:
                if queue.alarm_s != due_s:
                    queue.alarm_s = due_s
                    self.at(due_s, self._alarm, queue)
                return
            batch: list[tuple[_Attempt, int]] = []
            while queue.jobs and len(batch) < station.max_batch:
                _, attempt, copy = queue.jobs.popleft()
                if not attempt.is_over:
                    queue.waiting -= 1
                    attempt.waiting -= 1
                    batch.append((attempt, copy))
            queue.free -= 1
            time_s = (station.fixed_s + station.per_item_s * len(batch)) * queue.draws()
            place = batch[0][0].place
            place.busy_s += time_s
            place.batches += 1
            self.at(self.now_s + time_s, self._batch_served, (queue, batch))

    def _alarm(self, queue: _Queue) -> None:
        queue.alarm_s = math.inf
        self.start_batch(queue)

    def _batch_served(self, what: tuple[_Queue, list[tuple[_Attempt, int]]]) -> None:
        queue, batch = what
        queue.free += 1
        self.start_batch(queue)
        for attempt, copy in batch:
            self.answer(attempt, copy)

    def _delayed(self, what: tuple[_Attempt, int, float]) -> None:
        attempt, sample, sent_s = what
        attempt.sample, attempt.sent_s = sample, sent_s
        self.answer(attempt, 0)

    def answer(self, attempt: _Attempt, copy: int) -> None:
        """Take the answer of one shard; with the last of a copy the attempt is over."""
        if attempt.is_over:
            return
        attempt.left[copy] -= 1
        if attempt.left[copy] > 0:
            return
        place = attempt.place
        if place.fails and self.random() < place.fails:
            place.failed += 1
            self.fail(attempt)
            return
        self.over(attempt)
        if place.delay is not None and _is_waited_for(attempt.join):
            self.first_s[attempt.request] = attempt.sent_s + float(place.delay.ttft_s[attempt.sample])
            self.tpot_s[attempt.request] = float(place.delay.tpot_s[attempt.sample])
        place.seen.append((attempt.request, self.now_s - attempt.came_s))
        self.leave(place, attempt.request, attempt.join)

    def over(self, attempt: _Attempt) -> None:
        """End an attempt; what of it still waits leaves the queues."""
        attempt.is_over = True
        if attempt.waiting:
            for queue in attempt.place.queues:
                queue.waiting -= sum(job[1] is attempt for job in queue.jobs)
            attempt.waiting = 0

    def fail(self, attempt: _Attempt) -> None:
        """Retry, fall back, or give up."""
        self.over(attempt)
        place, retries = attempt.place, attempt.place.stage.retries
        first = place.calls - place.retried
        if retries is not None and attempt.number < place.tries and place.retried < retries.budget * first:
            place.retried += 1
            again = _Attempt(place, attempt.request, attempt.join, attempt.came_s, attempt.number + 1, [place.stage.shards])
            self.at(self.now_s + retries.backoff_s * 2**attempt.number, self.attempt, again)
            return
        place.seen.append((attempt.request, self.now_s - attempt.came_s))
        if place.stage.fallback is not None:
            place.fell_back += 1
            self.enter(place.on_fail, attempt.request, attempt.join)
        else:
            self.give_up(attempt.request, attempt.join)

    def _timeout(self, attempt: _Attempt) -> None:
        if not attempt.is_over:
            attempt.place.timed_out += 1
            self.fail(attempt)

    def _hedge(self, attempt: _Attempt) -> None:
        if not attempt.is_over:
            attempt.place.hedged += 1
            attempt.left.append(attempt.place.stage.shards)
            self.send(attempt, 1)


def _is_waited_for(join: _Join | None) -> bool:
    """Say whether what a branch answers still reaches the user: none of its joins has gone on, and no async stage is before it."""
    while join is not None and not join.is_over:
        join = join.outer
    return join is None


def _drawn(law: Law, rng: np.random.Generator) -> Callable[[], float]:
    """Return a function that gives one draw of a law after the other."""

    def blocks() -> Any:
        while True:
            yield from law.sample(rng, _BLOCK).tolist()

    draws = blocks()
    return lambda: next(draws)
