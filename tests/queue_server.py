"""A queue that stands in for a server in tests of the search: first come first served, so many slots, its own simulated clock."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench.loadtest.limits import clauses, saturation
from mlsys_bench.loadtest.limits.search import Seen
from mlsys_bench.types import SLO, RequestRecord

Floats = npt.NDArray[np.float64]
START_S = 1.3  # what starting a level costs


class QueueServer:
    """Levels of a G/G/c queue.  `service` draws the service times of n requests; the first token comes `ttft_share` into the service."""

    def __init__(
        self, slo: SLO, slots: int, service: Callable[[np.random.Generator, int], Floats], *, budget_s: float = 120.0, seed: int = 0,
        ttft_share: float = 0.25, arrivals: str = "poisson", fastest_client: float = 1e9,
        stopped_in: int = 10**9, disturbed: range = range(0),
    ) -> None:  # fmt: skip
        self.slo, self.slots, self.service, self.ttft_share, self.arrivals = slo, slots, service, ttft_share, arrivals
        self.rng, self.budget_s, self.used_s, self.fastest = np.random.default_rng(seed), budget_s, 0.0, fastest_client
        self.clauses = clauses.clauses(slo)
        self.levels, self.stopped_in, self.disturbed = 0, stopped_in, disturbed

    def left_s(self) -> float:
        """Return what is left of the budget, by the simulated clock."""
        return self.budget_s - self.used_s - START_S

    def gaps(self, rate_per_s: float) -> Floats:
        """Return the gaps of a long run."""
        n = 60_000
        return np.random.default_rng(9).exponential(1 / rate_per_s, n) if self.arrivals == "poisson" else np.full(n, 1 / rate_per_s)

    def is_stopped(self) -> bool:
        """Say whether somebody stopped it."""
        return self.levels >= self.stopped_in

    def lone(self) -> Seen:
        """Serve 30 requests, one after the other."""
        work = self.service(self.rng, 30)
        arrived = np.cumsum(work) - work
        self.used_s += float(min(work.sum(), 3.0)) + START_S
        return self._seen(1 / float(work.mean()), float(work.sum()), arrived, arrived, work, False, 0.0)

    def full(self, users: int) -> Seen:
        """Serve so many users who ask again at once."""
        n = 4000
        work = self.service(self.rng, n)
        _, ended = closed(work, self.slots, users)
        last_s = max(5.0, 3 * users / self.slots * float(work.mean()))
        inside = (ended > last_s * 0.2) & (ended <= last_s)
        rate = float(inside.sum() / (0.8 * last_s))
        self.used_s += last_s + START_S
        return Seen(
            rate_per_s=rate, duration_s=last_s, completed_per_s=rate, completed=int(inside.sum()), over=False, trusted=True, figures=()
        )

    def level(self, rate_per_s: float, duration_s: float) -> Seen:
        """Serve an open loop from an empty queue, ended early when it falls behind."""
        self.levels += 1
        n = int(rate_per_s * duration_s * 1.5 + 60)
        gaps = self.rng.exponential(1 / rate_per_s, n) if self.arrivals == "poisson" else np.full(n, 1 / rate_per_s)
        due = np.cumsum(gaps)
        due = due[due < duration_s]
        work = self.service(self.rng, len(due))
        began = fifo(due, work, self.slots)
        settle_s = 2 * float(work.mean())
        looks = looked_at(due, began + work, duration_s)
        stop_s = next(
            (t for k, t in enumerate(t for t, _, _ in looks) if saturation.falls_behind(rate_per_s, looks[: k + 1], settle_s)), None
        )
        end_s = stop_s or duration_s
        self.used_s += end_s + START_S + (0.0 if stop_s else float(min(max((began + work).max() - duration_s, 0), 30.0)))
        return self._seen(rate_per_s, end_s, due, began, work, stop_s is not None, min(0.1 * duration_s, 0.3 * duration_s))

    def _seen(self, rate: float, end_s: float, due: Floats, began: Floats, work: Floats, over: bool, warmup_s: float) -> Seen:
        rows = records(due, began, work, self.ttft_share, warmup_s, end_s, cut_s=end_s if over else None)
        ended = began + work
        settle = 2 * float(work.mean())
        done = int(((ended > settle) & (ended <= end_s)).sum())
        figures = tuple(clauses.figure(c, clauses.scores(c, self.slo, rows)) for c in self.clauses)
        return Seen(
            rate_per_s=rate, duration_s=end_s, warmup_s=warmup_s, due_s=due, completed_per_s=done / max(end_s - settle, 1e-9),
            completed=done, over=over, trusted=rate <= self.fastest and self.levels not in self.disturbed, figures=figures,
        )  # fmt: skip


def fifo(due: Floats, work: Floats, slots: int) -> Floats:
    """Return when each request is begun."""
    free = [0.0] * slots
    began = np.empty(len(due))
    for i in range(len(due)):
        began[i] = max(due[i], heapq.heappop(free))
        heapq.heappush(free, began[i] + work[i])
    return began


def closed(work: Floats, slots: int, users: int) -> tuple[Floats, Floats]:
    """Return when requests begin and end while so many users ask again at once."""
    free, asks = [0.0] * slots, [0.0] * users
    began, ended = np.empty(len(work)), np.empty(len(work))
    for i in range(len(work)):
        began[i] = max(heapq.heappop(asks), heapq.heappop(free))
        ended[i] = began[i] + work[i]
        heapq.heappush(free, ended[i])
        heapq.heappush(asks, ended[i])
    return began, ended


def looked_at(due: Floats, ended: Floats, duration_s: float) -> list[saturation.Look]:
    """Return how it stands every second."""
    done = np.sort(ended)
    seconds = np.arange(1.0, duration_s)
    gone, sent = np.searchsorted(done, seconds), np.searchsorted(due, seconds)
    return [saturation.Look(float(t), int(e), int(s - e)) for t, e, s in zip(seconds, gone, sent, strict=True)]


def records(
    due: Floats, began: Floats, work: Floats, ttft_share: float, warmup_s: float, end_s: float, cut_s: float | None
) -> Sequence[RequestRecord]:
    """Return the requests as a load test records them; those still in flight when it is cut short are left out."""
    return [
        RequestRecord(
            index=i, scheduled_s=d, token_s=(b + ttft_share * w, b + w), tokens_per_event=(1, 1), done_s=b + w, output_tokens=2,
            in_window=warmup_s <= d < end_s and (cut_s is None or b + w <= cut_s),
        )
        for i, (d, b, w) in enumerate(zip(due.tolist(), began.tolist(), work.tolist(), strict=True))
    ]  # fmt: skip
