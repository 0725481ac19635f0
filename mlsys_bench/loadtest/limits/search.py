"""The highest rate within an SLO: which rate to try next, for how long, and when to stop.  Knows no server: a level is a function call.

1. Lone requests: what an idle server shows.  Limits that it breaks already hold at no rate.
2. Closed loop: about how much the server completes when it is never idle.
3. Levels in an open loop.  Each updates the posterior (`posterior`); the next is tried at its median or at its upper end, for as
   long as the percentile needs and as the queue at that rate needs to settle.
4. End when the 90 % interval is within 2.5 % of the median, or the time is up, or the client cannot send faster.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from mlsys_bench import stats
from mlsys_bench.loadtest.limits import posterior
from mlsys_bench.loadtest.limits.clauses import Clause, Figure
from mlsys_bench.loadtest.limits.posterior import Capacity, Evidence, Floats, Shape

NARROW = 0.025  # of the rate, to each side
LEAST_RATE_PER_S = 0.05  # below it nothing is tried: an answer would take hours
_LEAST_S = 5.0  # of a level
_WIDE = ((0.15, 5.0), (0.06, 9.0), (0.0, 15.0))  # half-width of the interval above which a level lasts so long
_SETTLES = 3.0  # times the queue's relaxation that a late level lasts
_LONGEST_SHARE = 0.5  # of what is left of the budget that a level may take
_TRIED = (0.5, 0.95)  # of the posterior, in turn: the median, and where misses teach what the capacity is
_MARGIN = 1.3  # over the requests a percentile needs
_LEAP = 2.0  # furthest step beyond what was seen to hold
_LEVELS_NEEDED = 4  # before the interval is believed
_INVALID_IN_A_ROW = 4
Why = Literal["narrow", "budget", "client", "stopped", "no rate holds"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Seen:
    """What came of one level.  `figures` stand in the order of the clauses; empty where nothing was answered.

    `trusted` is False where the client itself was late: such a level says nothing of the server.
    """

    rate_per_s: float
    duration_s: float  # of sending
    warmup_s: float = 0.0  # of that, left out of the figures
    due_s: Floats = dataclasses.field(default_factory=lambda: np.zeros(0))  # every arrival since its start
    completed_per_s: float
    completed: int
    over: bool
    trusted: bool
    figures: tuple[Figure, ...]


class Server(Protocol):
    """Where levels are run: a server, or a simulation of one."""

    def lone(self) -> Seen:
        """Send single requests, one after the other."""
        ...

    def full(self, users: int) -> Seen:
        """Keep so many requests in flight; the rate is what completes."""
        ...

    def level(self, rate_per_s: float, duration_s: float) -> Seen:
        """Offer a rate in an open loop."""
        ...

    def gaps(self, rate_per_s: float) -> Floats:
        """Return the gaps between arrivals of a very long run at this rate."""
        ...

    def left_s(self) -> float:
        """Return what is left of the budget."""
        ...

    def is_stopped(self) -> bool:
        """Say whether the person wants an end."""
        ...


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """How the search stands: the median and the 90 % interval of the highest rate, and every level so far."""

    rate_per_s: float
    interval_per_s: tuple[float, float]
    binding: int  # of the clauses: the one that most likely is broken first
    levels: tuple[Seen, ...]
    relaxation_s: float

    @property
    def half_width(self) -> float:
        """Return half the interval as a share of the rate."""
        low, high = self.interval_per_s
        return max(high / self.rate_per_s - 1, 1 - low / self.rate_per_s)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The end of a search."""

    why: Why
    state: State | None
    idle: Seen | None
    full: Seen | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Knowledge:
    """What the levels are read with: the limits, an idle server, completions at full load."""

    clauses: tuple[Clause, ...]
    idle: Seen
    full: Seen
    users: int
    gaps: Floats  # of a long run of this traffic's arrivals
    settled: tuple[Floats, ...]  # the backlog they make for ever, by clause


def search(
    clauses: Sequence[Clause], server: Server, *, users: int, on_state: Callable[[State], None] = lambda _: None,
    on_need: Callable[[float, int], None] = lambda _s, _n: None,
) -> Found:  # fmt: skip
    """Return the highest rate within all limits.

    `on_need` hears about what rate it will be, and how many requests a level needs for its percentile.
    """
    idle = server.lone()
    if server.is_stopped():
        return Found(why="stopped", state=None, idle=idle, full=None)
    if any(_hopeless(clause, f) for clause, f in zip(clauses, idle.figures, strict=False)):
        return Found(why="no rate holds", state=None, idle=idle, full=None)
    full = server.full(users)
    if server.is_stopped():
        return Found(why="stopped", state=None, idle=idle, full=full)
    gaps = server.gaps(max(full.completed_per_s, LEAST_RATE_PER_S))
    by_quantile = {p: posterior.settled(gaps, p) for p in {clause.p for clause in clauses}}
    known = Knowledge(
        clauses=tuple(clauses), idle=idle, full=full, users=users, gaps=gaps, settled=tuple(by_quantile[clause.p] for clause in clauses)
    )
    needed = needed_requests(clauses)
    on_need(max(full.completed_per_s, LEAST_RATE_PER_S), needed)
    return _levels(known, server, needed, on_state)


def needed_requests(clauses: Sequence[Clause]) -> int:
    """Return how many requests a level needs so that the percentile of every limit has an interval."""
    return max(20, *(stats.enough_for_quantile(c.p) for c in clauses if c.p is not None), 20)


def level_s(rate_per_s: float, needed: int) -> float:
    """Return how long a level must be for its percentile: with a margin for its warm-up and for chance."""
    return _MARGIN * needed / rate_per_s


def _hopeless(clause: Clause, shown: Figure) -> bool:
    """Say whether lone requests break a limit: most of them do, however few they are."""
    return shown.requests > 0 and shown.misses > min(max(0.5, 3 * (1 - (clause.p or 0.5))), 0.95) * shown.requests


def _levels(known: Knowledge, server: Server, needed: int, on_state: Callable[[State], None]) -> Found:
    state, why = read(known, []), None
    while why is None:
        rate = _next_rate(state, known)
        wanted_s = _duration_s(state, known, rate, needed)
        left_s = server.left_s()
        if left_s < max(_LEAST_S, needed / rate):
            return Found(why="budget", state=state, idle=known.idle, full=known.full)
        seen = server.level(rate, min(wanted_s, max(level_s(rate, needed), _LONGEST_SHARE * left_s, _LEAST_S), left_s))
        if server.is_stopped():  # a level that was cut by hand shows less waiting than one that ran its time
            return Found(why="stopped", state=state, idle=known.idle, full=known.full)
        state = read(known, (*state.levels, seen))
        on_state(state)
        why = _decided(state)
    return Found(why=why, state=state, idle=known.idle, full=known.full)


def _decided(state: State) -> Why | None:
    """Return why there is nothing more to try, or None."""
    if _client_is_the_limit(state.levels):
        return "client"
    if state.rate_per_s < LEAST_RATE_PER_S:
        return "no rate holds"
    if state.half_width <= NARROW and sum(s.trusted for s in state.levels) >= _LEVELS_NEEDED:
        return "narrow"
    return None


def _client_is_the_limit(levels: Sequence[Seen]) -> bool:
    """Say whether the client was late again and again, at rates it never kept: where it did, a neighbour disturbs it, and may go."""
    last = levels[-_INVALID_IN_A_ROW:]
    kept_per_s = max((s.rate_per_s for s in levels if s.trusted), default=0.0)
    return len(last) == _INVALID_IN_A_ROW and not any(s.trusted for s in last) and kept_per_s < min(s.rate_per_s for s in last)


# ---------------------------------------------------------------- what is known


def read(known: Knowledge, levels: Sequence[Seen]) -> State:
    """Return how the search stands after these levels: the least of what each limit allows."""
    trusted = [s for s in levels if s.trusted]
    capacities = _capacities(known, trusted)
    bounds = _bounds(known, trusted)
    found = [_of_clause(i, clause, known, trusted, capacities, bounds) for i, clause in enumerate(known.clauses)]
    low, middle, high = (_least(found, share) for share in (0.05, 0.5, 0.95))
    binding = min(range(len(found)), key=lambda i: found[i].quantile(0.5))
    relaxation_s = found[binding].relaxation_s
    return State(rate_per_s=middle, interval_per_s=(low, high), binding=binding, levels=tuple(levels), relaxation_s=relaxation_s)


def _of_clause(
    i: int, clause: Clause, known: Knowledge, levels: Sequence[Seen], capacities: Sequence[Capacity], bounds: tuple[float, float]
) -> posterior.Posterior:
    shape = Shape(
        idle=_idle_score(i, known, levels), p=clause.p, wait_s=clause.wait_s, lone_s=1 / max(known.idle.completed_per_s, 1e-9),
        burstiness=stats.scv(known.gaps), settled=None if clause.wait_s is None else known.settled[i],
    )  # fmt: skip
    return posterior.posterior([_evidence(s, i, clause) for s in levels], capacities, shape, bounds)


def _evidence(seen: Seen, i: int, clause: Clause) -> Evidence:
    shown = seen.figures[i] if seen.figures and seen.figures[i].requests else None
    backlog = None if clause.wait_s is None else _replayed(seen, clause.p)
    return Evidence(
        rate_per_s=seen.rate_per_s, duration_s=seen.duration_s, score=shown.score if shown else None,
        effective=shown.effective if shown else 0.0, over=seen.over, backlog=backlog,
    )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _replayed(seen: Seen, p: float | None) -> Floats:
    return posterior.replay(seen.due_s, (seen.warmup_s, seen.duration_s), seen.rate_per_s, p)


def _idle_score(i: int, known: Knowledge, levels: Sequence[Seen]) -> float:
    """Return what an idle server shows of a limit: the least of all levels, for load never makes it better."""
    shown = [known.idle, *(s for s in levels if not s.over)]
    scores = [s.figures[i].score for s in shown if s.figures and s.figures[i].requests]
    return min([*(max(score, 1e-3) for score in scores), 0.98])


def _capacities(known: Knowledge, levels: Sequence[Seen]) -> list[Capacity]:
    """Return what completions say of the capacity: of the closed loop, and of every level that the server fell behind."""
    full, alone = known.full, known.idle
    if not full.trusted or not full.completed:
        return []
    ideal = known.users * alone.completed_per_s  # lone requests, so many side by side
    busy = full.completed_per_s < 0.6 * ideal
    found = [Capacity(rate_per_s=full.completed_per_s, completed=full.completed, at_least=not busy)]
    return found + [Capacity(rate_per_s=s.completed_per_s, completed=s.completed) for s in levels if s.over and s.completed > 0]


def _bounds(known: Knowledge, levels: Sequence[Seen]) -> tuple[float, float]:
    """Return between which rates the capacity is looked for."""
    at = max(known.full.completed_per_s, known.idle.completed_per_s, LEAST_RATE_PER_S)
    most = max([at, *(s.rate_per_s for s in levels)])
    least = min([at, *(s.rate_per_s for s in levels)])
    return least / 30, most * 30


def _least(found: Sequence[posterior.Posterior], share: float) -> float:
    """Return a quantile of the least of several rates, taken as independent."""
    if len(found) == 1:
        return found[0].quantile(share)
    grid: Floats = np.unique(np.concatenate([[math.log(p.quantile(q)) for q in np.linspace(0.005, 0.995, 199)] for p in found]))
    above = np.ones(len(grid))
    for p in found:
        above *= 1 - np.interp(grid, p.log_rates, np.cumsum(p.weights))
    return float(np.exp(np.interp(share, 1 - above, grid)))


# ---------------------------------------------------------------- what to do next


def _next_rate(state: State, known: Knowledge) -> float:
    """Return the rate of the next level: in turn at the median and at the upper end, and no leap beyond what was seen to hold."""
    low, high = state.interval_per_s
    share = _TRIED[len(state.levels) % 2]
    rate = math.exp(np.interp(share, (0.05, 0.5, 0.95), np.log([low, state.rate_per_s, high])))
    held = [s.rate_per_s for s in state.levels if s.trusted and not s.over and all(f.score < 1 for f in s.figures)]
    return min(rate, _LEAP * max([*held, known.full.completed_per_s, known.idle.completed_per_s]))


def _duration_s(state: State, known: Knowledge, rate_per_s: float, needed: int) -> float:
    """Return how long the next level is to last."""
    by_width = next(s for width, s in _WIDE if state.half_width > width or width == 0.0)
    by_queue = _SETTLES * state.relaxation_s if state.half_width <= _WIDE[0][0] else 0.0
    by_answer = 4 / max(known.idle.completed_per_s, 1e-9)
    return max(_LEAST_S, by_width, min(by_queue, 2 * by_width), by_answer, level_s(rate_per_s, needed))
