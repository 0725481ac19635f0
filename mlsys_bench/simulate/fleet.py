"""N equal replicas behind a router, fed by one schedule of requests, in virtual time.

The clock is the profile and nothing else: no host time enters, so the same seed gives the same result anywhere.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from mlsys_bench import latency
from mlsys_bench.batching import Limits, StepFeatures
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.simulate.replica import Job, Replica, Timeline
from mlsys_bench.types import LatencyProfile, Outcome, RequestRecord
from mlsys_bench.workload import Schedule

Routing = Literal["random", "round_robin", "least_loaded"]
ROUTINGS: tuple[str, ...] = get_args(Routing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What became of every request, and what the replicas did meanwhile."""

    requests: tuple[RequestRecord, ...]  # in order of `scheduled_s`
    replicas: int
    busy_s: float  # summed over replicas
    steps: int
    preemptions: int
    timelines: tuple[Timeline, ...]  # one per replica

    @property
    def window(self) -> tuple[float, float]:
        """From the first request after the warm-up to the last one: the time in which the traffic is as asked for."""
        counted = [r.scheduled_s for r in self.requests if r.in_window]
        return (counted[0], counted[-1]) if counted else (0.0, 0.0)

    @property
    def end_s(self) -> float:
        """When the last step ended."""
        return max((float(t.end_s[-1]) for t in self.timelines if len(t.end_s)), default=0.0)

    @property
    def utilisation(self) -> float:
        """Share of the time until `end_s` in which a replica computes; 1 does not mean full, a batch of one keeps it busy too."""
        return self.busy_s / (self.replicas * self.end_s) if self.end_s > 0 else 0.0


def run(
    schedule: Schedule,
    profile: LatencyProfile,
    limits: Limits,
    *,
    replicas: int = 1,
    routing: str = "least_loaded",
    seed: int = 0,
    queue_limit: int | None = None,
    until_s: float | None = None,
    warmup_s: float | None = None,
    clock: Callable[[StepFeatures], float] | None = None,
) -> Simulation:
    """Return the fate of every request of a schedule.

    `queue_limit`: a replica that holds max_seqs + queue_limit requests answers 429 (outcome rejected).  A request that never
    fits the context or the KV cache answers 400.  `until_s` stops the run there: what is not done is unfinished.
    Requests scheduled before `warmup_s` (by default the first tenth of all) are not `in_window`.  `clock` replaces the profile's.
    Of the profile's constants, `request_overhead_s` delays the way to the engine and `token_overhead_s` the way back of every token.
    """
    if replicas < 1:
        raise BadInput(f"{replicas} replicas: a fleet needs at least 1")
    if routing not in ROUTINGS:
        raise unknown("routing", routing, ROUTINGS)
    scheduled_s: list[float] = schedule.scheduled_s.tolist()
    if any(b < a for a, b in itertools.pairwise(scheduled_s)):
        raise BadInput("a schedule must be in order of time")
    clock = clock or latency.clock(profile)
    fleet = [Replica(limits, clock) for _ in range(replicas)]
    full = None if queue_limit is None else limits.max_seqs + queue_limit
    there_s = profile.constants.get("request_overhead_s", 0.0)
    stop_s = math.inf if until_s is None else until_s
    prompts, outputs = schedule.prompt_tokens.tolist(), schedule.output_tokens.tolist()
    fates: list[Job | int | None] = []  # inside a replica, refused with this HTTP status, or never sent
    choose = _router(routing, fleet, len(scheduled_s), seed)
    for i, at_s in enumerate(scheduled_s):
        job = Job(i, at_s + there_s)
        fates.append(_send(job, prompts[i], outputs[i], choose(job), full) if job.arrived_s <= stop_s else None)
    for replica in fleet:
        replica.advance(stop_s)
    counted = _counted(scheduled_s, warmup_s)
    back_s = profile.constants.get("token_overhead_s", 0.0)
    token_s = _token_s(fleet, len(scheduled_s), stop_s, back_s)
    return Simulation(
        requests=tuple(_record(i, s, prompts[i], fates[i], token_s[i], back_s, counted[i]) for i, s in enumerate(scheduled_s)),
        replicas=replicas,
        busy_s=sum(r.busy_s for r in fleet),
        steps=sum(len(r.steps) for r in fleet),
        preemptions=sum(r.preemptions for r in fleet),
        timelines=tuple(r.timeline() for r in fleet),
    )


def _router(routing: str, fleet: Sequence[Replica], n: int, seed: int) -> Callable[[Job], Replica]:
    """Return the choice of a replica for each arriving request, which brings that replica to the present."""
    size = len(fleet)
    drawn = np.random.default_rng(seed).integers(0, size, n).tolist() if routing == "random" else [i % size for i in range(n)]

    def by_number(job: Job) -> Replica:
        replica = fleet[drawn[job.index]]
        replica.advance(job.arrived_s)
        return replica

    def least_loaded(job: Job) -> Replica:
        """Fewest in the system; ties go round."""
        for replica in fleet:
            replica.advance(job.arrived_s)
        return fleet[min(range(size), key=lambda r: (fleet[r].in_system, (r - job.index) % size))]

    return least_loaded if routing == "least_loaded" else by_number


def _send(job: Job, prompt_tokens: int, output_tokens: int, replica: Replica, full: int | None) -> Job | int:
    """Return the job once it is in, or the HTTP status of its refusal."""
    if full is not None and replica.in_system >= full:
        return 429
    try:
        replica.offer(job, prompt_tokens, output_tokens)
    except BadInput:
        return 400
    return job


def _counted(scheduled_s: Sequence[float], warmup_s: float | None) -> list[bool]:
    """Say of each request whether it comes after the warm-up."""
    if warmup_s is None:
        return [i >= len(scheduled_s) // 10 for i in range(len(scheduled_s))]
    return [s >= warmup_s for s in scheduled_s]


def _token_s(fleet: Sequence[Replica], requests: int, stop_s: float, back_s: float) -> list[tuple[float, ...]]:
    """Return by request when its tokens come back, those left out that are not computed by `stop_s`."""
    who, when_s = (np.concatenate(parts) for parts in zip(*(replica.tokens() for replica in fleet), strict=True))
    who, when_s = who[when_s <= stop_s], when_s[when_s <= stop_s]
    when = (when_s[np.argsort(who, kind="stable")] + back_s).tolist()
    ends = np.cumsum(np.bincount(who, minlength=requests)).tolist()
    return [tuple(when[start:end]) for start, end in itertools.pairwise([0, *ends])]


def _record(
    index: int,
    scheduled_s: float,
    prompt_tokens: int,
    fate: Job | int | None,
    token_s: tuple[float, ...],
    back_s: float,
    in_window: bool,
) -> RequestRecord:
    job = fate if isinstance(fate, Job) else None
    status = fate if isinstance(fate, int) else 200 if job and job.done_s is not None else None
    outcome: Outcome = "ok" if status == 200 else "unfinished" if status is None else "rejected"
    done_s = job.done_s + back_s if job and job.done_s is not None else scheduled_s if outcome == "rejected" else None
    return RequestRecord(
        index=index,
        scheduled_s=scheduled_s,
        sent_s=None if fate is None else scheduled_s,
        token_s=token_s,
        tokens_per_event=(1,) * len(token_s),
        done_s=done_s,
        prompt_tokens=prompt_tokens,
        output_tokens=len(token_s),
        token_source="simulated",  # noqa: S106  no secret
        outcome=outcome,
        http_status=status,
        stage_s={"queue": job.started_s - job.arrived_s} if job and job.started_s is not None else {},
        in_window=in_window,
    )
