"""Who sends what, and what comes after an answer: schedules, sessions, and users of a closed loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.workload import Schedule, prefix
from mlsys_bench.workload.schedule import Ints


class Requests(NamedTuple):
    """Requests as plain lists, by number."""

    prompt_tokens: list[int]
    output_tokens: list[int]
    session: list[int]  # the request's own number where it belongs to none
    tenant: list[str | None]
    schedule: Schedule
    kept: tuple[Ints, Ints] | None  # hashes of the blocks that servers keep, and where those of each request begin and end

    def rank(self, request: int) -> int:
        """Return how many classes go before the request's own."""
        return 0 if self.schedule.rank is None else int(self.schedule.rank[request])

    def hashes(self, request: int) -> tuple[int, ...]:
        """Return the hashes of a prompt's blocks: what a router knows of it."""
        offsets, hashes = self.schedule.prefix_offsets, self.schedule.prefix_hashes
        if offsets is None or hashes is None:
            return ()
        return tuple(hashes[offsets[request] : offsets[request + 1]].tolist())

    def blocks(self, request: int) -> tuple[int, ...]:
        """Return the hashes of a prompt's blocks and, where they are known, of its answer's."""
        if self.kept is None:
            return ()
        offsets, hashes = self.kept
        return tuple(hashes[offsets[request] : offsets[request + 1]].tolist())


class Traffic(Protocol):
    """Where requests come from."""

    requests: Requests

    def first(self) -> Iterable[tuple[float, int]]:
        """Give (time, request) of those that wait for no other."""

    def after(self, request: int, at_s: float, answered: bool) -> Iterable[tuple[float, int]]:
        """Give those that follow on a request that is over; a time of infinity says that it will never be sent."""


def requests_of(schedule: Schedule) -> Requests:
    """Return the requests of a schedule, checked."""
    n = len(schedule.scheduled_s)
    names, tenant = schedule.tenants, schedule.tenant
    return Requests(
        prompt_tokens=schedule.prompt_tokens.tolist(),
        output_tokens=schedule.output_tokens.tolist(),
        session=list(range(n)) if schedule.session is None else schedule.session.tolist(),
        tenant=[None] * n if tenant is None else [names[t] if names else str(t) for t in tenant.tolist()],
        schedule=schedule,
        kept=None if schedule.prefix_hashes is None else prefix.with_answers(schedule),
    )


class Scheduled:
    """A schedule: requests at their times, turns of a session after the answer before."""

    def __init__(self, schedule: Schedule) -> None:
        """Chain the turns of each session."""
        self.requests = requests_of(schedule)
        waits = np.zeros(len(schedule.scheduled_s), dtype=bool)
        self.next: dict[int, int] = {}
        if schedule.gap_s is not None:
            waits = self._chain(schedule)
        at_s = schedule.scheduled_s[~waits]
        if np.isnan(at_s).any() or (np.diff(at_s) < 0).any():
            raise BadInput("a schedule must be in order of time, and only later turns of a session may have none")
        self.start = list(zip(at_s.tolist(), np.flatnonzero(~waits).tolist(), strict=True))
        self.gap_s: list[float] = [] if schedule.gap_s is None else schedule.gap_s.tolist()

    def _chain(self, schedule: Schedule) -> np.typing.NDArray[np.bool_]:
        """Note who follows whom; return who follows somebody."""
        if schedule.session is None or schedule.turn is None:
            raise BadInput("a schedule with gap_s needs session and turn")
        waits: np.typing.NDArray[np.bool_] = schedule.turn > 0
        last: dict[int, int] = {}
        for i, (session, turn) in enumerate(zip(schedule.session.tolist(), schedule.turn.tolist(), strict=True)):
            if turn > 0:
                if session not in last or schedule.turn[last[session]] != turn - 1:
                    raise BadInput(f"session {session}: turn {turn} does not follow turn {turn - 1}")
                self.next[last[session]] = i
            last[session] = i
        return waits

    def first(self) -> Iterable[tuple[float, int]]:
        """Give all that wait for no other."""
        return self.start

    def after(self, request: int, at_s: float, answered: bool) -> Iterator[tuple[float, int]]:
        """Give the next turn, or all that are left of a session that broke."""
        turn = self.next.get(request)
        while turn is not None:
            yield at_s + self.gap_s[turn] if answered else math.inf, turn
            turn = None if answered else self.next.get(turn)


class Users:
    """A closed loop: each of `concurrency` users sends the next request when the one before is over, after a time to think."""

    def __init__(self, schedule: Schedule, concurrency: int, think_s: float, seed: int) -> None:
        """Take lengths and the users' starts from the schedule; times to think are exponential, none where the mean is 0."""
        if concurrency < 1:
            raise BadInput(f"a concurrency of {concurrency}: a closed loop has at least 1 user")
        if not (think_s >= 0 and math.isfinite(think_s)):
            raise BadInput(f"a think time of {think_s:g} s: it must be zero or more")
        self.requests = requests_of(schedule)
        n = len(schedule.scheduled_s)
        self.start = list(zip(schedule.scheduled_s[:concurrency].tolist(), range(min(concurrency, n)), strict=True))
        self.think_s = (think_s * np.random.default_rng([seed, 5]).standard_exponential(n)).tolist()
        self.rest = itertools.islice(itertools.count(), min(concurrency, n), n)

    def first(self) -> Iterable[tuple[float, int]]:
        """Give the first request of every user."""
        return self.start

    def after(self, request: int, at_s: float, answered: bool) -> Iterator[tuple[float, int]]:
        """Give the next request there is."""
        following = next(self.rest, None)
        if following is not None:
            yield at_s + self.think_s[following], following
