"""The events around replicas, in order of time: arrivals, ends, timeouts, retries, failures, looks of the autoscaler, transfers.

A heap of (time, number, what to do), as in any event simulation; the engines inside run ahead to no event later than the next one.  A
replica's own next event is its milestone: a time before which none of its requests ends (`Engine.next_s`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from mlsys_bench.batching import Limits, Policy, misfit
from mlsys_bench.latency import Overhead
from mlsys_bench.simulate.conditions import Autoscaling, Conditions, Disaggregation, uniform
from mlsys_bench.simulate.member import Life, Member
from mlsys_bench.simulate.replica import Clock, Job, Replica
from mlsys_bench.simulate.routing import Ask, Choose
from mlsys_bench.simulate.routing import policy as routing_policy
from mlsys_bench.simulate.traffic import Traffic
from mlsys_bench.types import Outcome

SERVE, PREFILL, DECODE = "serve", "prefill", "decode"
_RETRY, _FAIL = 3, 4  # keys of random draws


@dataclass(slots=True)
class Attempt:
    """One try of one request: where it is, and what became of it."""

    request: int
    number: int
    sent_s: float
    jobs: list[Job] = field(default_factory=list)  # of the prefill and the decode replica, where these are apart
    member: Member | None = None
    handed_s: float | None = None  # when its cache had arrived
    over: bool = False


@dataclass(slots=True)
class Fate:
    """What became of a request in the end."""

    scheduled_s: float = math.nan
    sent: bool = False
    last: Attempt | None = None
    attempts: int = 0
    outcome: Outcome = "unfinished"
    http_status: int | None = None
    done_s: float | None = None
    over: bool = False


@dataclass(slots=True)
class Pool:
    """Replicas of one kind behind one router."""

    name: str
    limits: Limits
    policy: Policy
    clock: Clock
    choose: Choose
    ready: list[Member] = field(default_factory=list)
    starting: list[Member] = field(default_factory=list)
    everyone: list[Member] = field(default_factory=list)


class Coordinator:
    """One run.  `go` plays it; then `fates`, `jobs` and `pools` say what happened."""

    def __init__(
        self,
        traffic: Traffic,
        limits: Limits,
        clock: Clock,
        policy: Policy,
        *,
        replicas: int,
        routing: str,
        seed: int,
        queue_limit: int | None,
        stop_s: float,
        overhead: Overhead,
        conditions: Conditions,
        prefill_clock: Clock | None = None,
    ) -> None:
        """Start with replicas that are ready."""
        self.traffic, self.requests = traffic, traffic.requests
        self.seed, self.queue_limit, self.stop_s, self.overhead, self.there_s = seed, queue_limit, stop_s, overhead, overhead.there_s
        self.conditions, self.policy = conditions, policy
        self.now_s, self.numbers, self.heap = 0.0, 0, list[tuple[float, int, Callable[[], None]]]()
        self.fates = [Fate() for _ in self.requests.prompt_tokens]
        self.open = len(self.fates)
        self.jobs: list[Job] = []
        self.attempt_of: list[Attempt] = []  # by job
        self.first_attempts = self.retries = self.arrivals = 0
        self.wanted: list[tuple[float, int]] = []  # (time, replicas) the autoscaler asked for, while it matters
        n, apart = len(self.fates), conditions.disaggregation
        self.pools: dict[str, Pool] = {}
        if apart:
            self._build(PREFILL, apart.limits or limits, prefill_clock or clock, apart.prefill_replicas, routing, n)
            self._build(DECODE, limits, clock, replicas, "least_loaded", n)
        else:
            self._build(SERVE, limits, clock, replicas, routing, n)
        self.entry = self.pools[PREFILL if apart else SERVE]

    def _build(self, name: str, limits: Limits, clock: Clock, replicas: int, routing: str, requests: int) -> None:
        choose = routing_policy(routing, requests=requests, replicas=replicas, seed=self.seed)
        self.pools[name] = Pool(name, limits, self.policy, clock, choose)
        for slot in range(replicas):
            self._ready(self._launch(self.pools[name], slot, 0.0, 0.0))

    # ------------------------------------------------------------ the clock

    def go(self) -> None:
        """Play until every request is over, or the time is up."""
        for at_s, request in self.traffic.first():
            self._schedule_send(request, at_s)
        if self.conditions.failures:
            for at_s, slot in self.conditions.failures.times:
                self._at(at_s, lambda slot=slot: self._break(slot))  # type: ignore[misc]
        if self.conditions.autoscaling:
            self._at(self.conditions.autoscaling.interval_s, self._scale)
        while self.open and self.heap and self.heap[0][0] <= self.stop_s:
            self.now_s, _, act = heapq.heappop(self.heap)
            act()
        if math.isfinite(self.stop_s):
            self.now_s = self.stop_s
            for pool in self.pools.values():
                for member in pool.everyone:
                    if member.state != "gone":
                        member.advance(self.stop_s)
                        self._collect(member)
        else:
            assert not self.open, f"{self.open} requests are left without an event that could end them"

    def _at(self, at_s: float, act: Callable[[], None]) -> None:
        """Do this then."""
        self.numbers += 1
        heapq.heappush(self.heap, (at_s, self.numbers, act))

    def _watch(self, member: Member) -> None:
        """Come back to a replica when something of it may end."""
        member.version += 1
        version, at_s = member.version, member.engine.next_s()
        if at_s <= self.stop_s:
            self._at(at_s, lambda: self._look(member, version))

    def _look(self, member: Member, version: int) -> None:
        if member.version == version and member.state != "gone":
            member.advance(self.now_s)
            self._collect(member)
            self._watch(member)

    def _collect(self, member: Member) -> None:
        """Pass on what a replica has done."""
        done, member.engine.done = member.engine.done, []
        for job in done:
            self._computed(self.attempt_of[job.index], job)
        if member.state == "draining" and not member.in_system:
            member.end(self.now_s, "scaled down")

    # ------------------------------------------------------------ a request

    def _schedule_send(self, request: int, at_s: float) -> None:
        self.fates[request].scheduled_s = at_s
        self._at(at_s + self.there_s, lambda: self._arrive(Attempt(request, 1, at_s)))

    def _arrive(self, attempt: Attempt) -> None:
        """Route one attempt."""
        fate = self.fates[attempt.request]
        fate.sent, fate.last, fate.attempts = True, attempt, attempt.number
        self.first_attempts += attempt.number == 1
        self.arrivals += 1
        prompt, output = self.requests.prompt_tokens[attempt.request], self.requests.output_tokens[attempt.request]
        if not self.entry.ready:
            self._fail(attempt, "rejected", 503)
            return
        member = self._route(self.entry, attempt)
        if self.queue_limit is not None and member.engine.is_full(self.queue_limit):
            self._fail(attempt, "rejected", 429)
            return
        if any(misfit(pool.limits, pool.policy, prompt, output) for pool in self.pools.values()):
            self._fail(attempt, "rejected", 400)
            return
        output = 1 if self.conditions.disaggregation else output
        rank, hashes = self.requests.rank(attempt.request), self.requests.blocks(attempt.request)
        member.engine.offer(self._job(attempt, self.now_s), prompt, output, hashes=hashes, rank=rank)
        attempt.member = member
        self._watch(member)
        if self.conditions.timeout_s is not None:
            self._at(attempt.sent_s + self.conditions.timeout_s, lambda: self._give_up(attempt))

    def _route(self, pool: Pool, attempt: Attempt) -> Member:
        ask = Ask(attempt.request, self.requests.session[attempt.request], self.requests.hashes(attempt.request))
        member = pool.choose(ask, pool.ready, self.now_s)
        assert isinstance(member, Member)
        return member

    def _job(self, attempt: Attempt, at_s: float) -> Job:
        job = Job(len(self.jobs), at_s)
        self.jobs.append(job)
        self.attempt_of.append(attempt)
        attempt.jobs.append(job)
        return job

    def _computed(self, attempt: Attempt, job: Job) -> None:
        """Go on with an attempt whose replica is done with it."""
        apart = self.conditions.disaggregation
        if apart and len(attempt.jobs) == 1 and self.requests.output_tokens[attempt.request] > 1:
            self._transfer(attempt, apart)
        else:
            attempt.member = None
            assert job.done_s is not None
            at_s = job.done_s + self.back_s(attempt)
            if at_s > self.stop_s:  # computed in time, and only on its way back
                self._answered(attempt, at_s)
            else:
                self._at(at_s, lambda: self._answered(attempt, at_s))

    def back_s(self, attempt: Attempt) -> float:
        """Return what comes on top of an attempt's steps: `core.Tracks.late_s`, and the way back.  Of pools apart no plans are known."""
        outside_s = self.overhead.back_s + self.overhead.prompt_token_s * self.requests.prompt_tokens[attempt.request]
        if not self.overhead.planned_steps or self.conditions.disaggregation:
            return outside_s
        job, tokens = attempt.jobs[-1], self.requests.output_tokens[attempt.request]
        if job.first_s is None or job.started_s is None or job.started_s <= job.arrived_s:
            return outside_s
        several = tokens > 1 and job.done_s is not None
        step_s = (job.done_s - job.first_s) / (tokens - 1) if several and job.done_s else job.first_s - job.started_s
        return outside_s + self.overhead.planned_steps * step_s

    def _transfer(self, attempt: Attempt, apart: Disaggregation) -> None:
        """Send the cache of a prompt to where it is decoded, after those that wait for the same link."""
        sender = attempt.member
        assert sender is not None
        sender.link_free_s = max(self.now_s, sender.link_free_s) + apart.transfer_s(self.requests.prompt_tokens[attempt.request])
        attempt.member = None
        self._at(sender.link_free_s, lambda: self._hand_over(attempt))

    def _hand_over(self, attempt: Attempt) -> None:
        """Let decoding begin."""
        if attempt.over:
            return
        attempt.handed_s = self.now_s
        member = self._route(self.pools[DECODE], attempt)
        prompt, output = self.requests.prompt_tokens[attempt.request], self.requests.output_tokens[attempt.request]
        member.engine.offer(
            self._job(attempt, self.now_s), prompt, output, cached_tokens=prompt, known_tokens=1, rank=self.requests.rank(attempt.request)
        )
        attempt.member = member
        self._watch(member)

    def _answered(self, attempt: Attempt, at_s: float) -> None:
        if not attempt.over:
            attempt.over = True
            self._over(attempt, "ok", 200, at_s)

    def _give_up(self, attempt: Attempt) -> None:
        """Let the client of an attempt lose patience."""
        if attempt.over:
            return
        member = attempt.member
        if member is not None:
            member.advance(self.now_s)
            self._collect(member)
        if attempt.member is not None and attempt.member is member:  # still inside
            member.engine.cancel(attempt.jobs[-1])
            self._collect(member)
            self._watch(member)
        self._fail(attempt, "timeout", None)

    def _fail(self, attempt: Attempt, outcome: Outcome, status: int | None) -> None:
        """End an attempt without an answer; try again where the client would."""
        attempt.over, attempt.member = True, None
        rule = self.conditions.retries
        again = rule and status != 400 and attempt.number < rule.attempts and rule.affordable(self.retries, self.first_attempts)
        if not (rule and again):
            self._over(attempt, outcome, status, attempt.sent_s if outcome == "rejected" else self.now_s)
            return
        self.retries += 1
        known_s = attempt.sent_s if outcome == "rejected" else self.now_s
        at_s = known_s + rule.wait_s(attempt.number, uniform(self.seed, _RETRY, attempt.request, attempt.number))
        following = Attempt(attempt.request, attempt.number + 1, at_s)
        self._at(max(at_s + self.there_s, self.now_s), lambda: self._arrive(following))

    def _over(self, attempt: Attempt, outcome: Outcome, status: int | None, at_s: float) -> None:
        """Settle a request, and let those follow that waited for it."""
        fate = self.fates[attempt.request]
        fate.outcome, fate.http_status, fate.done_s, fate.over = outcome, status, at_s, True
        self.open -= 1
        for due_s, request in self.traffic.after(attempt.request, max(at_s, self.now_s), outcome == "ok"):
            if math.isinf(due_s):
                left = self.fates[request]
                left.scheduled_s, left.outcome, left.over = self.now_s, "cancelled", True
                self.open -= 1
            else:
                self._schedule_send(request, due_s)

    # ------------------------------------------------------------ the fleet

    def _launch(self, pool: Pool, slot: int, at_s: float, ready_s: float) -> Member:
        schedule = self.requests.schedule
        prefix_tokens = schedule.prefix_block_tokens if schedule.prefix_offsets is not None else 0
        number = len(pool.everyone)
        engine = Replica(pool.limits, pool.clock, pool.policy, prefix_tokens=prefix_tokens, seed=self.seed, number=number)
        member = Member(pool.name, slot, engine, prefix_tokens, launched_s=at_s, ready_s=ready_s)
        pool.everyone.append(member)
        pool.starting.append(member)
        return member

    def _ready(self, member: Member) -> None:
        """Let a replica take requests, unless it is not wanted any more."""
        if member.state != "starting":
            return
        pool = self.pools[member.pool]
        pool.starting.remove(member)
        pool.ready.append(member)
        pool.ready.sort(key=lambda m: m.slot)
        member.state = "ready"
        failures = self.conditions.failures
        if failures and failures.mtbf_s is not None:
            life_s = -failures.mtbf_s * math.log1p(-uniform(self.seed, _FAIL, member.slot, len(pool.everyone)))
            self._at(self.now_s + life_s, lambda: self._fall(member))

    def _break(self, slot: int) -> None:
        """Let the replica fail that has this number now, if there is one."""
        for member in self.entry.ready:
            if member.slot == slot:
                self._fall(member)
                return

    def _fall(self, member: Member) -> None:
        """Lose a replica with all it holds, and bring it back after the repair."""
        failures = self.conditions.failures
        assert failures is not None
        pool, was_ready = self.pools[member.pool], member.state == "ready"
        if member.state != "gone":
            member.advance(self.now_s)
            self._collect(member)
        if member.state == "gone":  # before, or with the last that it held
            return
        if was_ready:
            pool.ready.remove(member)
        member.end(self.now_s, "failed")
        for job in list(member.engine.jobs.values()):
            self._fail(self.attempt_of[job.index], "reset", None)
        if was_ready:
            back = self._launch(pool, member.slot, self.now_s, self.now_s + failures.repair_s)
            back.repaired = True
            self._at(back.ready_s, lambda: self._ready(back))

    def _scale(self) -> None:
        """Look at the load, and launch or release replicas."""
        rule = self.conditions.autoscaling
        assert rule is not None
        pool = self.entry
        for member in pool.ready:
            member.advance(self.now_s)
        load = self.arrivals / rule.interval_s if rule.metric == "rate" else sum(m.load(rule.metric) for m in pool.ready)
        self.arrivals = 0
        there = len(pool.ready) + len(pool.starting)
        self.wanted = [(t, n) for t, n in self.wanted if t >= self.now_s - rule.down_delay_s - 1e-9]
        self.wanted.append((self.now_s, rule.desired(load, there)))
        wanted = self.wanted[-1][1]
        for _ in range(wanted - there):
            self._add(pool, rule)
        for _ in range(there - max(n for _, n in self.wanted)):
            self._release(pool)
        self._at(self.now_s + rule.interval_s, self._scale)

    def _add(self, pool: Pool, rule: Autoscaling) -> None:
        """Launch a replica in the lowest free slot."""
        taken = {m.slot for m in (*pool.ready, *pool.starting)}
        slot = next(s for s in range(len(taken) + 1) if s not in taken)
        member = self._launch(pool, slot, self.now_s, self.now_s + rule.cold_start_s)
        self._at(member.ready_s, lambda: self._ready(member))

    def _release(self, pool: Pool) -> None:
        """Let go of a replica: one that is starting, else the least loaded, which finishes what it holds."""
        if pool.starting:
            member = pool.starting.pop()
            member.end(self.now_s, "scaled down")
            return
        member = min(pool.ready, key=lambda m: (m.in_system, -m.slot))
        pool.ready.remove(member)
        member.state = "draining"
        self._collect(member)

    def lives(self) -> tuple[Life, ...]:
        """Return what was launched when, and when it ended."""
        return tuple(member.life() for pool in self.pools.values() for member in pool.everyone)
