"""A replica whose memory is full: how many requests it holds at once, and how much it computes anew for those that lost their cache.

The engine takes a request in as soon as its prompt fits, and each one seated takes a token more every step.  When nothing is left, the one
that came last gives all its memory back and waits at the head of the queue; its prompt and what it answered so far are read again.  With
whole prompts beside short answers that happens to every second request of a crowd, and costs a tenth or two of the capacity.

Nothing in it depends on how long a step takes, so steps are the clock: from one completion, or one pool that runs out, to the next.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass
from functools import lru_cache

from mlsys_bench.batching import Limits
from mlsys_bench.plan.demand import Demand

_WARM = 3  # fills of the pool that end before any request is counted
_MOST_ROWS = 4096
_MOST_PREEMPTED = 30_000  # after which what was seen is enough: answers that fill the memory by themselves are sent back without end


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """A full replica with requests waiting: mean of those seated, and per request answered: prompt tokens read again, times preempted."""

    seats: float
    answered_per_step: float
    again_tokens: float
    preemptions: float


@dataclass(slots=True)
class _Seated:
    """A request in memory: its row, tokens answered when it was seated, tokens of it still to be read and held, and since which step."""

    row: int
    done: float
    left: float
    held: float
    since: float = 0.0
    here: bool = True


class _Pool:
    """Memory in tokens, those seated in order, and those that wait."""

    def __init__(self, limits: Limits, demand: Demand) -> None:
        self.free, self.rest = float(limits.blocks * limits.block_tokens), limits.block_tokens / 2
        self.most, self.budget, self.now = limits.max_seqs, float(limits.max_step_tokens), 0.0
        self.prompt, self.output = (lengths[:_MOST_ROWS].tolist() for lengths in (demand.prompt, demand.output))
        self.order: list[_Seated] = []
        self.ends: list[tuple[float, int, _Seated]] = []
        self.back: deque[tuple[int, float]] = deque()
        self.reading: _Seated | None = None
        self.seated = self.came = self.preempted = self.pushed = 0
        self.seat_steps = self.read_tokens = 0.0

    def admit(self) -> None:
        """Seat who waits, in order, as long as the next one's first tokens fit into the step and into memory."""
        room = max(self.budget - self.seated, 1.0)
        while self.seated < self.most and self.reading is None and room > 0:
            row, done = self.back[0] if self.back else (self.came % len(self.prompt), 0.0)
            todo = self.prompt[row] + done
            chunk = min(todo, room)
            if chunk + self.rest > self.free and self.seated:
                return
            if self.back:
                self.back.popleft()
            else:
                self.came += 1
            seat = _Seated(row, done, todo, self.rest)
            self.free -= self.rest
            self.order.append(seat)
            self.seated += 1
            self.read(seat, chunk)
            room -= chunk

    def read(self, seat: _Seated, chunk: float) -> None:
        """Read some of a prompt; with the last of it the answer begins."""
        self.free -= chunk
        seat.held += chunk
        seat.left -= chunk
        self.read_tokens += chunk
        self.reading = seat if seat.left > 0 else None
        if self.reading is None:
            seat.since, self.pushed = self.now, self.pushed + 1
            heapq.heappush(self.ends, (self.now + max(self.output[seat.row] - seat.done, 1.0), self.pushed, seat))

    def until(self, then: float) -> None:
        """Let time pass in which everybody seated answers, but who is being read."""
        steps = then - self.now
        self.free -= (self.seated - (self.reading is not None)) * steps
        self.seat_steps += self.seated * steps
        self.now = then

    def leave(self, seat: _Seated) -> float:
        """Give the memory of one seated back; return the tokens that it has answered since it was seated."""
        answered = 0.0 if seat.left > 0 else self.now - seat.since
        seat.here = False
        self.free += seat.held + answered
        self.seated -= 1
        return answered

    def preempt(self) -> None:
        """Send the one that came last back to the head of the queue."""
        while not self.order[-1].here:
            self.order.pop()
        seat = self.order.pop()
        if seat is self.reading:
            self.reading = None
        self.back.appendleft((seat.row, seat.done + self.leave(seat)))
        self.preempted += 1

    def answer(self, requests: int) -> int:
        """Let so many requests be answered, fewer where most of the time goes into sending some back; return how many were."""
        most = self.preempted + _MOST_PREEMPTED
        for answered in range(requests):
            if self.preempted > most:
                return answered
            self.complete()
        return requests

    def complete(self) -> None:
        """Let time pass until a request is answered; those that find no memory on the way are sent back."""
        while True:
            self.admit()
            while self.ends and not self.ends[0][2].here:
                heapq.heappop(self.ends)
            end = self.ends[0][0] if self.ends else float("inf")
            full = self.now + max(self.free, 0.0) / max(self.seated - (self.reading is not None), 1)
            if end <= (full if self.reading is None else self.now + 1) or self.seated == 1 == len(self.ends):
                break
            if self.reading is None:
                self.until(full)
                self.preempt()
                self.until(self.now + 1)  # the step in which nobody is seated
            else:
                self._read_on(self.reading)
        self.until(max(end, self.now))
        self.leave(heapq.heappop(self.ends)[2])

    def _read_on(self, seat: _Seated) -> None:
        self.until(self.now + 1)
        chunk = min(seat.left, max(self.budget - self.seated, 1.0))
        if chunk <= self.free or self.seated == 1:
            self.read(seat, chunk)
            return
        self.preempt()
        self.until(self.now + 1)


def of(limits: Limits, demand: Demand) -> Crowd:
    """Return how a full replica fares under this demand."""
    return _of(limits, _Rows(demand))


class _Rows:
    """A demand that is equal to another of the same lengths."""

    def __init__(self, demand: Demand) -> None:
        self.demand, self._key = demand, (demand.prompt.tobytes(), demand.output.tobytes())

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and self._key == other._key


@lru_cache(maxsize=256)
def _of(limits: Limits, rows: _Rows) -> Crowd:
    pool = _Pool(limits, rows.demand)
    pool.admit()
    pool.answer(_WARM * pool.seated)
    start, steps, read, preempted = pool.now, pool.seat_steps, pool.read_tokens, pool.preempted
    answered = pool.answer(len(pool.prompt))
    return Crowd(
        seats=(pool.seat_steps - steps) / max(pool.now - start, 1e-9),
        answered_per_step=answered / max(pool.now - start, 1e-9),
        again_tokens=max((pool.read_tokens - read) / answered - sum(pool.prompt) / answered, 0.0),
        preemptions=(pool.preempted - preempted) / answered,
    )
