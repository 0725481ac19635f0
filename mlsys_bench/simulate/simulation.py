"""What a run leaves behind: requests as records, and what the replicas did meanwhile."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench.batching import Limits
from mlsys_bench.simulate import core, kernel
from mlsys_bench.simulate.coordinator import Attempt, Coordinator, Fate
from mlsys_bench.simulate.core import Timeline
from mlsys_bench.simulate.member import Life
from mlsys_bench.simulate.replica import Replica
from mlsys_bench.simulate.traffic import Requests, requests_of
from mlsys_bench.types import Outcome, RequestRecord
from mlsys_bench.workload import Schedule

_OUTCOMES: dict[int, Outcome] = {kernel.ANSWERED: "ok", kernel.REFUSED: "rejected", kernel.FULL: "rejected"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What became of every request, and what the replicas did meanwhile."""

    requests: tuple[RequestRecord, ...]  # in order of `scheduled_s`
    replicas: int
    end_s: float  # when the last step ended
    busy_s: float  # summed over replicas
    steps: int
    preemptions: int
    timelines: tuple[Timeline, ...]  # one per replica, and one more for each that was launched later
    lives: tuple[Life, ...] = ()  # of the replicas, in the order of `timelines`; empty where all lived throughout
    attempts: int = 0  # sent, retries included
    retries: int = 0
    kv_tokens: int = 0  # that a replica can hold
    sequence_s: float = 0.0  # sum over steps of batch times duration: over `busy_s`, the mean batch
    kv_token_s: float = 0.0  # likewise of the memory held
    prefix_hit_tokens: int = 0  # of prompts, found in a cache
    prefix_asked_tokens: int = 0
    gaps: npt.NDArray[np.int64] | None = None  # histogram of the gaps between tokens, where their times were not kept (`core.Tracks`)

    @property
    def window(self) -> tuple[float, float]:
        """From the first request after the warm-up to the last one: the time in which the traffic is as asked for."""
        counted = [r.scheduled_s for r in self.requests if r.in_window]
        return (counted[0], counted[-1]) if counted else (0.0, 0.0)

    @property
    def replica_s(self) -> float:
        """Replica-seconds from launch to end, starts and repairs included: what is paid for."""
        if not self.lives:
            return self.replicas * self.end_s
        return sum(
            (self.end_s if life.ended_s is None else min(life.ended_s, self.end_s)) - min(life.launched_s, self.end_s)
            for life in self.lives
        )

    @property
    def utilisation(self) -> float:
        """Share of `replica_s` in which a replica computes; 1 does not mean full, a batch of one keeps it busy too."""
        return self.busy_s / self.replica_s if self.end_s > 0 else 0.0


def of_tracks(
    tracks: core.Tracks,
    schedule: Schedule,
    limits: Limits,
    scheduled_s: Sequence[float],
    counted: Sequence[bool],
    back_s: Sequence[float],
    replicas: int,
    stop_s: float = math.inf,
) -> Simulation:
    """Return a run that was played in one call.  `back_s`: what comes on top of the steps of each request, on the way back."""
    requests = requests_of(schedule)
    fates = np.where(tracks.arrived_s <= stop_s, tracks.fate, kernel.NEVER)  # impossible ones are known before they come
    return Simulation(
        requests=tuple(_records(tracks, fates.tolist(), requests, scheduled_s, counted, back_s, stop_s)),
        replicas=replicas,
        end_s=tracks.end_s,
        busy_s=tracks.busy_s,
        steps=tracks.steps,
        preemptions=tracks.preemptions,
        timelines=tracks.timelines,
        attempts=int(np.count_nonzero(fates)),
        kv_tokens=limits.blocks * limits.block_tokens,
        sequence_s=tracks.sequence_s,
        kv_token_s=tracks.kv_token_s,
        prefix_hit_tokens=tracks.hit_tokens,
        prefix_asked_tokens=tracks.asked_tokens,
        gaps=tracks.gaps if tracks.token_s is None else None,
    )


def _records(
    tracks: core.Tracks,
    fates: list[int],
    requests: Requests,
    scheduled_s: Sequence[float],
    counted: Sequence[bool],
    back_s: Sequence[float],
    stop_s: float,
) -> Iterator[RequestRecord]:
    """Yield the record of each request.  Where token times were not kept, one event carries all tokens after the first."""
    started_s = tracks.started_s - tracks.arrived_s
    rows = zip(fates, started_s.tolist(), tracks.last_s.tolist(), tracks.tokens.tolist(), strict=True)
    for i, (fate, queue_s, last_s, tokens) in enumerate(rows):
        when, counts = _events(tracks, i, tokens, back_s[i], stop_s)
        outcome = _OUTCOMES.get(fate, "unfinished")
        yield RequestRecord(
            index=i,
            scheduled_s=scheduled_s[i],
            sent_s=None if fate == kernel.NEVER else scheduled_s[i],
            token_s=when,
            tokens_per_event=counts,
            done_s=last_s + back_s[i] if outcome == "ok" else scheduled_s[i] if outcome == "rejected" else None,
            prompt_tokens=requests.prompt_tokens[i],
            output_tokens=sum(counts),
            token_source="simulated",  # noqa: S106  no secret
            outcome=outcome,
            http_status=fate if outcome != "unfinished" else None,
            tenant=requests.tenant[i],
            session=None if requests.schedule.session is None else str(requests.session[i]),
            stage_s={} if math.isnan(queue_s) else {"queue": queue_s},
            in_window=counted[i],
        )


def _events(tracks: core.Tracks, i: int, tokens: int, back_s: float, stop_s: float) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return when tokens of a request come back, and how many each time; a step may make several, all of them too late at the end."""
    if tracks.token_s is not None and tracks.token_at is not None:
        at = tracks.token_at[i]
        made_s = tracks.token_s[at : at + tokens]
        came_s = (made_s[made_s <= stop_s] + back_s).tolist()
        return tuple(came_s), (1,) * len(came_s)
    ends_s = (tracks.first_s[i] + back_s, tracks.last_s[i] + back_s)
    events = [(float(t), k) for t, k in zip(ends_s[:tokens], (1, tokens - 1), strict=False) if not math.isnan(t)]  # unfinished: no last
    return tuple(t for t, _ in events), tuple(k for _, k in events)


def of_events(events: Coordinator, replicas: int, until_s: float | None, counted: Callable[[Sequence[float]], list[bool]]) -> Simulation:
    """Return a run that was played event by event.  `counted` says which of the times of sending are in the window."""
    stop_s = math.inf if until_s is None else until_s
    members = [member for pool in events.pools.values() for member in pool.everyone]
    engines = [member.engine for member in members]
    token_s = _token_s(engines, len(events.jobs), stop_s)
    order = sorted(range(len(events.fates)), key=lambda i: (_due_s(events.fates[i], stop_s), i))
    inside = counted([_due_s(events.fates[i], stop_s) for i in order])
    limits = events.entry.limits
    return Simulation(
        requests=tuple(_settled(i, events, token_s, stop_s, counts) for i, counts in zip(order, inside, strict=True)),
        replicas=replicas,
        end_s=max((e.at_s for e in engines if e.steps), default=0.0),
        busy_s=sum(m.engine.busy_s - m.lost_s for m in members),
        steps=sum(e.steps for e in engines),
        preemptions=sum(e.preemptions for e in engines),
        timelines=tuple(e.timeline() for e in engines),
        lives=events.lives(),
        attempts=events.first_attempts + events.retries,
        retries=events.retries,
        kv_tokens=limits.blocks * limits.block_tokens,
        sequence_s=sum(m.engine.sequence_s - m.lost_s * m.engine.in_step[0] for m in members),
        kv_token_s=sum(m.engine.kv_token_s - m.lost_s * m.engine.in_step[1] for m in members),
        prefix_hit_tokens=sum(e.hit_tokens for e in engines),
        prefix_asked_tokens=sum(e.asked_tokens for e in engines),
    )


def _settled(index: int, events: Coordinator, token_s: Sequence[list[float]], stop_s: float, in_window: bool) -> RequestRecord:
    """Return the record of one request: tokens and times of its last attempt, latency from when it was first due."""
    fate, requests = events.fates[index], events.requests
    attempt = fate.last
    when_s = _came_s(events, fate, token_s)
    return RequestRecord(
        index=index,
        scheduled_s=_due_s(fate, stop_s),
        sent_s=fate.scheduled_s if fate.sent else None,
        token_s=when_s,
        tokens_per_event=(1,) * len(when_s),
        done_s=fate.done_s,
        prompt_tokens=requests.prompt_tokens[index],
        output_tokens=len(when_s),
        token_source="simulated",  # noqa: S106  no secret
        outcome=fate.outcome,
        http_status=fate.http_status,
        attempt=max(fate.attempts, 1),
        tenant=requests.tenant[index],
        session=None if requests.schedule.session is None else str(requests.session[index]),
        stage_s=_stages_s(attempt, stop_s) if attempt else {},
        in_window=in_window,
    )


def _came_s(events: Coordinator, fate: Fate, token_s: Sequence[list[float]]) -> tuple[float, ...]:
    """Return when the tokens of a request's last attempt came back, as far as they were computed in time and somebody waited for them."""
    attempt = fate.last
    if attempt is None or not attempt.jobs:
        return ()
    made_s = token_s[attempt.jobs[-1].index]
    if attempt.handed_s is not None:  # the first token came with the cache
        made_s = [attempt.handed_s, *made_s]
    elif events.conditions.disaggregation is not None and events.requests.output_tokens[attempt.request] > 1:  # or is still on its way
        return ()
    until_s = math.inf if fate.done_s is None else fate.done_s
    back_s = events.back_s(attempt)
    return tuple(t + back_s for t in made_s if t + back_s <= until_s)


def _stages_s(attempt: Attempt, stop_s: float) -> dict[str, float]:
    """Return how long an attempt waited for its first step, and its cache for the link and on it."""
    stages: dict[str, float] = {}
    if not attempt.jobs:
        return stages
    first = attempt.jobs[0]
    if first.started_s is not None and first.started_s <= stop_s:
        stages["queue"] = first.started_s - first.arrived_s
    if attempt.handed_s is not None and first.done_s is not None:
        stages["transfer"] = attempt.handed_s - first.done_s
    return stages


def _token_s(engines: Sequence[Replica], jobs: int, stop_s: float) -> list[list[float]]:
    """Return by job when its tokens were made, those left out that are not computed by `stop_s`."""
    who, when_s = (np.concatenate(parts) for parts in zip(*(engine.tokens() for engine in engines), strict=True))
    who, when_s = who[when_s <= stop_s], when_s[when_s <= stop_s]
    when = when_s[np.argsort(who, kind="stable")].tolist()
    ends = np.cumsum(np.bincount(who, minlength=jobs)).tolist()
    return [when[start:end] for start, end in itertools.pairwise([0, *ends])]


def _due_s(fate: Fate, stop_s: float) -> float:
    """Return when a request was due; one whose turn had not come when the run was stopped stands at its end."""
    return stop_s if math.isnan(fate.scheduled_s) else fate.scheduled_s
