"""Replicas behind a router, fed by a schedule or by users in a closed loop, in virtual time.

The clock is the profile and nothing else: no host time enters, so the same seed gives the same result anywhere.  Where nothing but routing
happens around the replicas, `run` plays them one arrival after another; everything else goes through `coordinator`, event by event, with
the same result to the last bit where both can do it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench import latency
from mlsys_bench.batching import Limits, Policy, StepFeatures
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.simulate import capacity, core
from mlsys_bench.simulate.conditions import Conditions
from mlsys_bench.simulate.coordinator import Coordinator
from mlsys_bench.simulate.core import Clock
from mlsys_bench.simulate.routing import ROUTINGS
from mlsys_bench.simulate.simulation import Simulation, of_events, of_tracks
from mlsys_bench.simulate.traffic import Scheduled, Traffic, Users
from mlsys_bench.types import LatencyProfile, Lengths
from mlsys_bench.workload import Schedule, draw_lengths, prefix

WINDOWS = ("steady", "all")
MOST_TOKENS = 5_000_000  # of which each time is kept: 32 bytes each


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
    policy: Policy = core.VLLM,
    conditions: Conditions | None = None,
    steady_clock: bool = True,
) -> Simulation:
    """Return the fate of every request of a schedule.

    `queue_limit`: a replica where so many wait that the next step will not seat answers 429 (outcome rejected).  A request that never
    fits the context or the KV cache answers 400.  `until_s` stops the run there: what is not done is unfinished.
    Requests scheduled before `warmup_s` (by default the first tenth of all) are not `in_window`.  `clock` replaces the profile's;
    for one and the same batch it must not fall when the cache grows.  `steady_clock`: it gives equal steps equal times, which is what the
    tokens a second are asserted by; not so one that plays back measured times, one a step.
    Of the profile's constants (`latency.overhead`), `request_overhead_s` delays the way to the engine and `token_overhead_s` the way back
    of every token; what its prompt takes outside the engine, and steps planned before it came, delay all tokens of a request.
    `conditions`: timeouts, retries, failures, autoscaling, disaggregation; `replicas` is then the number at the start, or of those that
    decode.  Turns of a session that wait for an answer get their `scheduled_s` when it is there.
    """
    _check(replicas, routing, queue_limit)
    around, schedule = conditions or Conditions(), prefix.in_blocks(schedule, limits.block_tokens)
    if around.plain and schedule.gap_s is None and routing in core.ROUTINGS:
        found = _plain(
            schedule, profile, limits, clock, policy=policy, replicas=replicas, routing=routing, seed=seed, queue_limit=queue_limit,
            until_s=until_s, warmup_s=warmup_s,
        )  # fmt: skip
    else:
        found = play(
            Scheduled(schedule), profile, limits, clock, policy=policy, replicas=replicas, routing=routing, seed=seed,
            queue_limit=queue_limit, until_s=until_s, counted=lambda scheduled_s: _counted(scheduled_s, warmup_s), conditions=around,
        )  # fmt: skip
    return _checked(found, profile, limits, clock, policy, around) if steady_clock else found


def closed(
    profile: LatencyProfile,
    limits: Limits,
    *,
    concurrency: int,
    prompt_tokens: Lengths | Sequence[int] | npt.NDArray[np.int64],
    output_tokens: Lengths | Sequence[int] | npt.NDArray[np.int64],
    n: int,
    think_s: float = 0.0,
    ramp_s: float = 0.0,
    replicas: int = 1,
    routing: str = "least_loaded",
    seed: int = 0,
    window: str = "steady",
    clock: Callable[[StepFeatures], float] | None = None,
    policy: Policy = core.VLLM,
    conditions: Conditions | None = None,
) -> Simulation:
    """Return what `concurrency` users see who each send the next of n requests as soon as the one before is over.

    They think in between for an exponential time of mean `think_s`, and start together, or spread evenly over `ramp_s`.  Lengths: laws, or
    n numbers each.  `window`: "steady" leaves out the first round of every user and at least the first tenth, as well as the last
    `concurrency` requests, which see users leave; "all" counts everything, as load generators do that run a fixed number of requests.
    """
    _check(replicas, routing, None)
    if window not in WINDOWS:
        raise unknown("window", window, WINDOWS)
    if n < 1 or not (ramp_s >= 0 and math.isfinite(ramp_s)):
        raise BadInput(f"a closed loop of {n} requests with a ramp of {ramp_s:g} s: at least 1, and no less than 0 s")
    prompts, outputs = np.random.SeedSequence(seed).spawn(2)
    users = min(concurrency, n)
    schedule = Schedule(
        scheduled_s=np.pad(np.arange(users) * (ramp_s / max(users, 1)), (0, n - users), constant_values=np.nan),
        prompt_tokens=_lengths(prompt_tokens, n, prompts),
        output_tokens=_lengths(output_tokens, n, outputs),
    )
    first, last = (max(users, n // 10), n - users) if window == "steady" and n > 2 * users else (0, n)
    inside = [first <= i < last for i in range(n)]
    around = conditions or Conditions()
    if around.plain and replicas == 1 and not think_s and not ramp_s and concurrency > 0:
        found = _circle(schedule, profile, limits, clock, policy, concurrency, inside, seed)
    else:
        found = play(
            Users(schedule, concurrency, think_s, seed), profile, limits, clock, policy=policy, replicas=replicas, routing=routing,
            seed=seed, queue_limit=None, until_s=None, counted=lambda _: inside, conditions=around, overhead=_of_closed_loops(profile),
        )  # fmt: skip
    return _checked(found, profile, limits, clock, policy, around)


def play(
    traffic: Traffic,
    profile: LatencyProfile,
    limits: Limits,
    clock: Clock | None,
    *,
    policy: Policy = core.VLLM,
    replicas: int,
    routing: str,
    seed: int,
    queue_limit: int | None,
    until_s: float | None,
    counted: Callable[[Sequence[float]], list[bool]],
    conditions: Conditions,
    overhead: latency.Overhead | None = None,
) -> Simulation:
    """Return the same for any traffic, event by event.  `counted` says which of the times of sending are in the window.

    `overhead`: what requests take beside their steps, where that is not what the profile says.
    """
    apart = conditions.disaggregation
    events = Coordinator(
        traffic, limits, clock or latency.clock(profile), policy, replicas=replicas, routing=routing, seed=seed, queue_limit=queue_limit,
        stop_s=math.inf if until_s is None else until_s, overhead=overhead or latency.overhead(profile), conditions=conditions,
        prefill_clock=latency.clock(apart.profile) if apart and apart.profile else None,
    )  # fmt: skip
    events.go()
    return of_events(events, replicas + (apart.prefill_replicas if apart else 0), until_s, counted)


def _checked(
    found: Simulation, profile: LatencyProfile, limits: Limits, clock: Clock | None, policy: Policy, around: Conditions
) -> Simulation:
    """Return the run, asserted to make no more tokens than its steps allow."""
    apart = around.disaggregation
    most = capacity.tokens_per_s(limits, clock or latency.clock(profile), policy.drafts)
    if apart and apart.profile:
        most = max(most, capacity.tokens_per_s(apart.limits or limits, latency.clock(apart.profile), policy.drafts))
    capacity.check(sum(r.output_tokens or 0 for r in found.requests), found.busy_s, most)
    return found


def _plain(
    schedule: Schedule,
    profile: LatencyProfile,
    limits: Limits,
    clock: Clock | None,
    *,
    policy: Policy,
    replicas: int,
    routing: str,
    seed: int,
    queue_limit: int | None,
    until_s: float | None,
    warmup_s: float | None,
) -> Simulation:
    """Return a run in which requests arrive, are routed once, and nothing else happens."""
    outside = latency.overhead(profile)
    stop_s = math.inf if until_s is None else until_s
    scheduled_s: list[float] = schedule.scheduled_s.tolist()
    counted = _counted(scheduled_s, warmup_s)
    tracks = core.play(
        schedule, limits, profile=None if clock else profile, clock=clock, policy=policy, replicas=replicas, routing=routing, seed=seed,
        queue_limit=queue_limit, stop_s=stop_s, delay_s=outside.there_s, gaps_from_s=_from_s(scheduled_s, counted),
        keep_tokens=_keeps(schedule),
    )  # fmt: skip
    back_s = outside.back_s + tracks.late_s(schedule.prompt_tokens, outside)
    return of_tracks(tracks, schedule, limits, scheduled_s, counted, back_s.tolist(), replicas, stop_s)


def _circle(
    schedule: Schedule,
    profile: LatencyProfile,
    limits: Limits,
    clock: Clock | None,
    policy: Policy,
    users: int,
    counted: list[bool],
    seed: int,
) -> Simulation:
    """Return a closed loop on one replica whose users do not think."""
    outside = _of_closed_loops(profile)
    there_s, back_s = outside.there_s, outside.back_s
    started = dataclasses.replace(schedule, scheduled_s=np.nan_to_num(schedule.scheduled_s) + there_s)
    tracks = core.circulate(
        started, limits, users=users, profile=None if clock else profile, clock=clock, policy=policy, seed=seed,
        pause_s=there_s + back_s, keep_tokens=_keeps(schedule),
    )  # fmt: skip
    return of_tracks(tracks, schedule, limits, (tracks.arrived_s - there_s).tolist(), counted, [back_s] * len(schedule), 1)


def _of_closed_loops(profile: LatencyProfile) -> latency.Overhead:
    """Return the two ways: what was learned of open loops beyond them is left out."""
    return dataclasses.replace(latency.overhead(profile), prompt_token_s=0.0, planned_steps=0.0)


def _keeps(schedule: Schedule) -> bool:
    """Say whether the time of every token is kept."""
    return int(schedule.output_tokens.sum()) <= MOST_TOKENS


def _from_s(scheduled_s: Sequence[float], counted: Sequence[bool]) -> float:
    return next((s for s, counts in zip(scheduled_s, counted, strict=True) if counts), 0.0)


def _counted(scheduled_s: Sequence[float], warmup_s: float | None) -> list[bool]:
    """Say of each request whether it comes after the warm-up."""
    if warmup_s is None:
        return [i >= len(scheduled_s) // 10 for i in range(len(scheduled_s))]
    return [s >= warmup_s for s in scheduled_s]


def _lengths(asked: Lengths | Sequence[int] | npt.NDArray[np.int64], n: int, seed: np.random.SeedSequence) -> npt.NDArray[np.int64]:
    """Return n token counts: drawn from a law, or as given."""
    if isinstance(asked, Lengths):
        return draw_lengths(asked, n, np.random.default_rng(seed))
    given = np.asarray(asked, dtype=np.int64)
    if len(given) != n:
        raise BadInput(f"{len(given)} lengths for {n} requests")
    return given


def _check(replicas: int, routing: str, queue_limit: int | None) -> None:
    if replicas < 1:
        raise BadInput(f"{replicas} replicas: a fleet needs at least 1")
    if routing not in ROUTINGS:
        raise unknown("routing", routing, ROUTINGS)
    if queue_limit is not None and queue_limit < 0:
        raise BadInput(f"a queue limit of {queue_limit}: it must be 0 or more")
