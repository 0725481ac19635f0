"""Many requests on equal replicas in one call, compiled where that pays; the result is arrays, a few numbers per request.

    tracks = play(schedule, limits, profile=profile, replicas=4, routing="least_loaded")
    tracks = circulate(schedule, limits, profile=profile, users=64)

Compiled or not, the same steps are simulated in the same order.  A process begins in plain Python, and compiles once its plain runs have
taken about as long as that would have: loading a kernel that an earlier process compiled takes a second, compiling half a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench import jit, latency
from mlsys_bench.batching import Limits, Policy, StepFeatures, check_limits, check_policy, check_ranks, misfit
from mlsys_bench.batching.arrays import (
    ASKED_TOKENS,
    FATE,
    FIELDS,
    FINAL,
    HASH_AT,
    HASH_END,
    HIT_TOKENS,
    KNOWN,
    LUCK,
    PREEMPTIONS,
    PROMPT,
    RANK,
    TOKEN_AT,
    Arrays,
    fresh,
)
from mlsys_bench.errors import BadInput, unknown
from mlsys_bench.simulate import kernel
from mlsys_bench.types import LatencyProfile
from mlsys_bench.workload import Schedule, prefix

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Clock = Callable[[StepFeatures], float]

ROUTINGS = {
    "random": kernel.RANDOM, "round_robin": kernel.RANDOM, "least_loaded": kernel.LEAST_LOADED, "power_of_two": kernel.POWER_OF_TWO,
}  # fmt: skip
VLLM = Policy()
LOAD_FROM, COMPILE_FROM = 1_000_000, 15_000_000  # output tokens of plain runs that take as long as that: some 0.9 M are done in a second
_plainly = [0]  # of this process
NO_LIMIT = 1 << 60
LINES = 1 << 16  # of a timeline, before it is thinned
AHEAD = 1024  # steps of one jump
_NO_HASHES = (0, np.zeros(0, dtype=np.int64), 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """What one replica did: every `stride`-th of its steps.

    `end_s`: when the step ended.  `batch`: sequences in it.  `kv_tokens`: memory of the blocks held, in tokens.
    `waiting`: requests without a seat when it began.  `busy_s`: sum of all steps until then.
    """

    end_s: Floats
    batch: Ints
    kv_tokens: Ints
    waiting: Ints
    busy_s: Floats
    stride: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracks:
    """What became of the requests, by row of the schedule, and what the replicas did meanwhile.

    Times are nan where it did not come to it; those of tokens are when they are computed, before any way back.  `fate`: 200 answered, 1
    still in the system, 0 never sent, 400 impossible, 429 refused by a full replica, 499 cancelled.
    """

    fate: npt.NDArray[np.int16]
    arrived_s: Floats
    started_s: Floats
    first_s: Floats
    last_s: Floats
    worst_gap_s: Floats  # between two tokens
    tokens: Ints
    token_s: Floats | None  # of all requests, one after another: `tokens[r]` valid ones from `token_at[r]`
    token_at: Ints | None
    gaps: Ints  # histogram of the gaps between tokens; `gap_quantile_s` reads it
    timelines: tuple[Timeline, ...]
    steps: int
    busy_s: float
    end_s: float  # of the last step
    sequence_s: float  # sum over steps of batch times duration: over busy_s, the mean batch
    kv_token_s: float
    preemptions: int
    hit_tokens: int
    asked_tokens: int
    replica: Ints | None = None  # which one took the request

    def late_s(self, prompt_tokens: Ints, overhead: latency.Overhead) -> Floats:
        """Return by request what comes on top of its steps: its prompt outside the engine, and steps planned before it came.

        It waits for those if it found the engine busy; each is as long as the steps it decodes in, or its own prefill where there are none.
        """
        outside_s = np.asarray(overhead.prompt_token_s * prompt_tokens, dtype=np.float64)
        if not overhead.planned_steps:
            return outside_s
        ended_s, several = np.nan_to_num(self.last_s), self.tokens > 1
        step_s = np.where(several & (ended_s > 0), (ended_s - self.first_s) / np.maximum(self.tokens - 1, 1), self.first_s - self.started_s)
        return np.asarray(outside_s + np.where(self.started_s > self.arrived_s, overhead.planned_steps * np.nan_to_num(step_s), 0.0))

    def gap_quantile_s(self, p: float) -> float:
        """Return a quantile of the gaps between tokens, to 0.2 %; nan where there was none."""
        return gap_quantile_s(self.gaps, p)


def gap_quantile_s(gaps: Ints, p: float) -> float:
    """Return a quantile of a histogram of gaps, to 0.2 %; nan of an empty one."""
    total = np.cumsum(gaps)
    if not total[-1]:
        return math.nan
    at = int(np.searchsorted(total, p * total[-1]))
    return kernel.LEAST_S * math.exp((at - 0.5) / kernel.BINS_PER_E) if at else 0.0


def share_of_gaps(gaps: Ints, up_to_s: float) -> float:
    """Return the share of the gaps of a histogram that are at most so long."""
    at = 0 if up_to_s < kernel.LEAST_S else 1 + int(math.log(up_to_s / kernel.LEAST_S) * kernel.BINS_PER_E)
    return float(gaps[: at + 1].sum() / gaps.sum())


def play(
    schedule: Schedule,
    limits: Limits,
    *,
    profile: LatencyProfile | None = None,
    clock: Clock | None = None,
    policy: Policy = VLLM,
    replicas: int = 1,
    routing: str = "least_loaded",
    seed: int = 0,
    queue_limit: int | None = None,
    stop_s: float = math.inf,
    delay_s: float = 0.0,
    gaps_from_s: float = 0.0,
    keep_tokens: bool = False,
    begun: bool = False,
    compiled: bool | None = None,
) -> Tracks:
    """Return what happens to a schedule of requests on equal replicas, `delay_s` after each is due.

    Time is told by a profile or, in plain Python only, by a `clock`.  `compiled` forces the compiled or the plain way.  With `begun` each
    request brings the cache of its prompt and its first token, computed elsewhere: `first_s` and the time of that token mean nothing.
    """
    if replicas < 1:
        raise BadInput(f"{replicas} replicas: a fleet needs at least 1")
    if routing not in ROUTINGS:
        raise unknown("routing", routing, tuple(ROUTINGS))
    if np.isnan(schedule.scheduled_s).any():
        raise BadInput("a schedule with turns that wait for an answer has no times of its own: `simulate.run` plays it")
    if np.any(np.diff(schedule.scheduled_s) < 0):
        raise BadInput("a schedule must be in order of time")
    way = _way(profile, clock, compiled, int(schedule.output_tokens.sum()))
    limits, policy = _typed(limits, policy)
    fleet = _Fleet(schedule, limits, policy, replicas, way.lists, schedule.scheduled_s + delay_s, gaps_from_s, keep_tokens, begun, seed)
    drawn, other = _draw(routing, len(schedule.scheduled_s), replicas, seed)
    places, taken = NO_LIMIT if queue_limit is None else queue_limit, way.ints(other)
    way.run(
        fleet.stations, replicas, fleet.shared, limits, policy, way.table, ROUTINGS[routing], way.ints(drawn), taken, places,
        0, 0.0, float(stop_s),
    )  # fmt: skip
    return replace(fleet.tracks(stop_s), replica=np.asarray(taken))


def circulate(
    schedule: Schedule,
    limits: Limits,
    *,
    users: int,
    profile: LatencyProfile | None = None,
    clock: Clock | None = None,
    policy: Policy = VLLM,
    seed: int = 0,
    pause_s: float = 0.0,
    stop_s: float = math.inf,
    gaps_from_s: float = 0.0,
    keep_tokens: bool = False,
    compiled: bool | None = None,
) -> Tracks:
    """Return what `users` see who each send the next request of the schedule `pause_s` after the one before has ended, on one replica.

    Only the first `users` times of the schedule are read.
    """
    if users < 1:
        raise BadInput(f"{users} users: a closed loop needs at least 1")
    way = _way(profile, clock, compiled, int(schedule.output_tokens.sum()))
    limits, policy = _typed(limits, policy)
    arrived_s = np.where(np.arange(len(schedule.scheduled_s)) < users, schedule.scheduled_s, 0.0)
    fleet = _Fleet(schedule, limits, policy, 1, way.lists, arrived_s, gaps_from_s, keep_tokens, seed=seed)
    turns = way.ints(np.zeros(len(arrived_s), dtype=np.int64))
    way.run(
        fleet.stations,
        1,
        fleet.shared,
        limits,
        policy,
        way.table,
        kernel.RANDOM,
        turns,
        turns,
        NO_LIMIT,
        users,
        float(pause_s),
        float(stop_s),
    )
    return fleet.tracks(stop_s)


def luck(seed: int, replica: int) -> int:
    """Return where a replica's draws of accepted drafts begin: another place for each seed and replica."""
    return 1 + int(np.random.SeedSequence([seed, replica]).generate_state(1)[0]) % (kernel.MODULUS - 1)


# ---------------------------------------------------------------- compiled or plain


@dataclass(frozen=True, slots=True, kw_only=True)
class _Way:
    lists: bool
    table: Any
    run: Callable[..., None]

    def ints(self, values: Ints) -> Any:
        return values.tolist() if self.lists else values


def _pays(tokens: int) -> bool:
    """Say whether to compile a run of so many output tokens, given all that this process has simulated before."""
    _plainly[0] += tokens
    return _plainly[0] >= COMPILE_FROM or (_plainly[0] >= LOAD_FROM and jit.kept(kernel.drive))


def _way(profile: LatencyProfile | None, clock: Clock | None, compiled: bool | None, tokens: int) -> _Way:
    """Return the kernel to run, and the clock it reads."""
    if (profile is None) == (clock is None):
        raise BadInput("a simulation needs a latency profile or a clock, and not both")
    if clock is not None:
        return _Way(lists=True, table=None, run=jit.plain(kernel.drive, one=_held, thin=lengthen, seconds=told_by(clock)))
    assert profile is not None
    table = latency.table(profile)
    if jit.HAVE_NUMBA and (_pays(tokens) if compiled is None else compiled):
        return _Way(lists=False, table=table, run=jit.fast(kernel.drive))
    return _Way(lists=True, table=table.tolist(), run=jit.plain(kernel.drive, one=_held, thin=lengthen))


def _typed(limits: Limits, policy: Policy) -> tuple[Limits, Policy]:
    """Return the same with numbers of the same types as ever: others would be compiled anew."""
    return Limits(*map(int, limits)), Policy._make(type(usual)(value) for usual, value in zip(VLLM, policy, strict=True))


def clocks(gaps_from_s: float = 0.0) -> list[float]:
    """Return the times of a replica that has done nothing."""
    times = [0.0] * kernel.TIMES
    times[kernel.FROM] = gaps_from_s
    return times


def short_lines() -> list[list[float]]:
    """Return a timeline that `lengthen` lets grow."""
    return [[0.0] * min(LINES, 256) for _ in range(kernel.SERIES)]


def lengthen(s: kernel.Station) -> None:
    """Make room in a timeline that is full, in place of `kernel.thin`: in plain Python it grows before it is thinned."""
    if len(s.lines[0]) >= LINES:
        kernel.thin(s)
        return
    for line in s.lines:
        line.extend([0.0] * len(line))


def _held(stations: list[kernel.Station], _: kernel.Station, r: int) -> kernel.Station:
    """Return replica r, in place of `kernel.one`: in plain Python each is made once."""
    return stations[r]


def told_by(clock: Clock) -> Callable[..., float]:
    """Return a clock as the kernels call it."""
    return lambda _, *features: clock(StepFeatures(*features))


def _draw(routing: str, n: int, replicas: int, seed: int) -> tuple[Ints, Ints]:
    """Return by request the replica, or the first and second candidate."""
    turns = np.arange(n) % replicas
    if routing == "random":
        return np.random.default_rng(seed).integers(0, replicas, n), turns
    if routing == "power_of_two":
        u, v = np.random.default_rng([seed, 2]).random((n, 2)).T
        first = (u * replicas).astype(np.int64)
        return first, (first + 1 + (v * (replicas - 1)).astype(np.int64)) % replicas
    return turns, turns


# ---------------------------------------------------------------- arrays in and out


class _Fleet:
    """The arrays of a run."""

    def __init__(
        self,
        schedule: Schedule,
        limits: Limits,
        policy: Policy,
        replicas: int,
        lists: bool,
        arrived_s: Floats,
        gaps_from_s: float,
        keep: bool,
        begun: bool = False,
        seed: int = 0,
    ) -> None:
        check_limits(limits)
        check_policy(policy)
        check_ranks(policy, schedule.rank is not None)
        self.limits, self.replicas, self.lists, self.keep = limits, replicas, lists, keep
        n = len(arrived_s)
        hashed = schedule.prefix_offsets is not None and policy.prefix_cache
        prompts, outputs = schedule.prompt_tokens.astype(np.int64), schedule.output_tokens.astype(np.int64)
        self.n, self.offsets = n, np.concatenate([[0], np.cumsum(outputs)])
        tokens = schedule.prefix_block_tokens if hashed else 0
        blocks, numbers, hash_at, hash_end = _hashes(schedule, tokens) if hashed else _NO_HASHES
        made = [fresh(limits, self.make, rows=0, prefixes=blocks, prefix_tokens=tokens) for _ in range(replicas)]
        rows = np.zeros((FIELDS, n), dtype=np.int64)
        rows[PROMPT], rows[KNOWN] = prompts, prompts + begun
        rows[FINAL] = prompts + outputs
        rows[HASH_AT], rows[HASH_END] = hash_at, hash_end
        rows[FATE] = self._refused(policy, prompts, outputs)
        rows[TOKEN_AT] = self.offsets[:-1]
        rows[RANK] = 0 if schedule.rank is None else schedule.rank
        books = np.zeros((kernel.BOOKS, n))
        books[kernel.ARRIVED], books[kernel.STARTED] = arrived_s, -1.0
        for r, a in enumerate(made):
            a.counts[kernel.STRIDE], a.counts[LUCK] = 1, luck(seed, r)
        self.shared = kernel.Station(
            a=made[0]._replace(
                rows=self.given(rows), hashes=self.given(np.stack([numbers, np.zeros_like(numbers)])),
                block_table=[] if lists else np.zeros((0, 0), dtype=np.int64),
            ),
            times=self.times(1)[0], needs=self.make(1, min(limits.block_tokens, AHEAD))[0], ends_s=self.times(1, AHEAD)[0],
            gaps=self.make(1, 0)[0], lines=self.times(kernel.SERIES), books=self.given(books), done=self.make(1, 0)[0],
            token_s=self.times(1, int(self.offsets[-1]) if keep else 0)[0],
        )  # fmt: skip
        self.stations = self._stack(made, gaps_from_s)

    def _stack(self, made: list[Arrays], gaps_from_s: float) -> Any:
        """Return the replicas: a list of stations, or arrays with an axis for them."""
        many = self.replicas
        if self.lists:
            return [
                self.shared._replace(
                    a=self.shared.a._replace(counts=a.counts, slots=a.slots, prefixes=a.prefixes),
                    times=clocks(gaps_from_s), gaps=[0] * kernel.BINS, lines=short_lines(), done=[0],
                )
                for a in made
            ]  # fmt: skip
        return kernel.Stations(
            **{name: np.stack([getattr(a, name) for a in made]) for name in ("counts", "slots", "prefixes")},
            times=np.array([clocks(gaps_from_s)] * many), gaps=np.zeros((many, kernel.BINS), dtype=np.int64),
            lines=np.zeros((many, kernel.SERIES, LINES)), done=np.zeros((many, 1), dtype=np.int64),
        )  # fmt: skip

    def station(self, r: int) -> kernel.Station:
        """Return one replica."""
        found: kernel.Station = self.stations[r] if self.lists else kernel.one(self.stations, self.shared, r)
        return found

    def _refused(self, policy: Policy, prompts: Ints, outputs: Ints) -> Ints:
        """Return the fates of the requests so far: REFUSED for those that can never run."""
        final = prompts + outputs
        room = min(self.limits.max_context, self.limits.blocks * self.limits.block_tokens)
        suspects = (prompts < 1) | (outputs < 1) | (final > room)
        if not policy.chunked:
            suspects |= prompts > self.limits.max_step_tokens
        fate = np.zeros(self.n, dtype=np.int64)
        for i in np.flatnonzero(suspects).tolist():
            assert misfit(self.limits, policy, int(prompts[i]), int(outputs[i]))
        fate[suspects] = kernel.REFUSED
        return fate

    def make(self, count: int, size: int) -> Any:
        """Return so many integer arrays of this length."""
        return [[0] * size for _ in range(count)] if self.lists else np.zeros((count, size), dtype=np.int64)

    def times(self, count: int, size: int = 0) -> Any:
        """Return so many arrays of numbers of this length."""
        return [[0.0] * size for _ in range(count)] if self.lists else np.zeros((count, size))

    def given(self, values: npt.NDArray[Any]) -> Any:
        """Return these arrays."""
        return values.tolist() if self.lists else values

    def tracks(self, stop_s: float) -> Tracks:
        """Return the result; what would be computed after `stop_s` is left out."""
        stations = [self.station(r) for r in range(self.replicas)]
        counts = np.array([s.a.counts for s in stations])
        times = np.array([s.times for s in stations])
        return Tracks(
            **requests_of(self.shared, self.n, stop_s),
            token_at=self.offsets[:-1] if self.keep else None,
            gaps=np.sum([s.gaps for s in stations], axis=0),
            timelines=tuple(timeline(s) for s in stations),
            steps=int(counts[:, kernel.STEPS].sum()),
            busy_s=float(times[:, kernel.BUSY].sum()),
            end_s=float(max((t[kernel.AT] for t, c in zip(times, counts, strict=True) if c[kernel.STEPS]), default=0.0)),
            sequence_s=float(times[:, kernel.SEQS_S].sum()),
            kv_token_s=float(times[:, kernel.KV_S].sum()),
            preemptions=int(counts[:, PREEMPTIONS].sum()),
            hit_tokens=int(counts[:, HIT_TOKENS].sum()),
            asked_tokens=int(counts[:, ASKED_TOKENS].sum()),
        )


def _hashes(schedule: Schedule, block_tokens: int) -> tuple[int, Ints, Ints, Ints]:
    """Return how many different prefix blocks there are, their numbers, and by row where those that it fills begin and end.

    A row has the hashes of its prompt, the last of which may be part-filled, or, where there are more, also of its answer: those of a trace
    that says so, and those that the next turn of its session tells.
    """
    offsets, hashes = prefix.with_answers(schedule)
    prompts, outputs = schedule.prompt_tokens.astype(np.int64), schedule.output_tokens.astype(np.int64)
    ids, numbers = np.unique(hashes, return_inverse=True)
    at, given = offsets[:-1], np.diff(offsets)
    beyond = given > -(-prompts // block_tokens)
    full = np.minimum(given, np.where(beyond, (prompts + outputs - 1) // block_tokens, prompts // block_tokens))
    return len(ids), numbers.ravel().astype(np.int64), at, at + full


def requests_of(s: kernel.Station, n: int, stop_s: float) -> dict[str, Any]:
    """Return by request what a run wrote down, in arrays."""
    a = s.a
    fate = np.array(a.rows[FATE][:n], dtype=np.int16)
    arrived_s, started_s, first_s, last_s, worst_s = (np.array(book[:n], dtype=float) for book in s.books)
    tokens = np.array(a.rows[KNOWN][:n], dtype=np.int64) - np.array(a.rows[PROMPT][:n], dtype=np.int64)
    late = (tokens > 0) & (last_s > stop_s)  # in flight when the time is up
    return {
        "fate": fate,
        "arrived_s": arrived_s,
        "started_s": np.where((started_s >= 0) & (started_s <= stop_s), started_s, np.nan),
        "first_s": np.where((tokens > 0) & (first_s <= stop_s), first_s, np.nan),
        "last_s": np.where(fate == kernel.ANSWERED, last_s, np.nan),
        "worst_gap_s": np.where(tokens > 1, worst_s, np.nan),
        "tokens": tokens - late,
        "token_s": np.array(s.token_s, dtype=float) if len(s.token_s) else None,
    }


def timeline(s: kernel.Station) -> Timeline:
    """Return the timeline of one replica."""
    n = s.a.counts[kernel.LINES]
    end_s, batch, kv_tokens, waiting, busy_s = (np.array(line[:n]) for line in s.lines)
    return Timeline(
        end_s=end_s, batch=batch.astype(np.int64), kv_tokens=kv_tokens.astype(np.int64), waiting=waiting.astype(np.int64),
        busy_s=busy_s, stride=int(s.a.counts[kernel.STRIDE]),
    )  # fmt: skip
