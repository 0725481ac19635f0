"""Levels of load as load tests of a live server: each a run of its own, watched every second, ended early when the server falls behind.

A run that was ended gives up what is in flight, and before the next one sends anything the target is looked at with a few requests,
which a queue that is still there makes wait: no level starts behind the queue of the one before.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mlsys_bench import loadtest, stats, summary, workload
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest import validity, window
from mlsys_bench.loadtest.limits import clauses as clause_of
from mlsys_bench.loadtest.limits import saturation
from mlsys_bench.loadtest.limits.clauses import Floats
from mlsys_bench.loadtest.limits.search import Seen
from mlsys_bench.types import SLO, LoadTest, RequestRecord

USERS = 64  # of the closed loop that looks for the capacity
_LONE_S = (2.5, 20.0)  # of lone requests: so long, or so many answers as need, at most
_FULL_S = (4.0, 20.0)
_ANSWERS = 8  # times a lone request's time that the closed loop lasts
_OVERHEAD_S = 2.0  # of a level, before any was seen: its worker's start, its last answers, and what is made of it
_WARMUP_SHARE = 0.1
_LATE_SHARE_OF_LIMIT = 0.1
_LONG = 120_000  # arrivals that stand for a run without end
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ran:
    """One level as it was run.  `test` is None where nothing was answered."""

    seen: Seen
    test: LoadTest | None
    in_flight: int


class LiveServer:
    """A server behind a URL.  `traffic` says what is asked and how; rate, users, duration and seed are set level by level."""

    def __init__(self, traffic: loadtest.Options, budget_s: float, say: Say = lambda _: None, note: Say = lambda _: None) -> None:
        check(traffic)
        self.budget_s, self.users = budget_s, USERS
        self._traffic, self._say, self._note = traffic, say, note
        self._slo: SLO = traffic.slo or ()
        self._clauses = clause_of.clauses(self._slo) if self._slo else ()
        self._began, self._lone_s, self._run = time.monotonic(), 0.0, 0
        self._stopped, self._ended_s, self.overhead_s = False, 0.0, _OVERHEAD_S
        self.target = ""

    def left_s(self) -> float:
        """Return how long a level may still last: what is left of the budget without what starting and ending one has cost so far."""
        return self.budget_s - self.took_s() - self.overhead_s

    def took_s(self) -> float:
        """Return the time since the start."""
        return time.monotonic() - self._began

    def is_stopped(self) -> bool:
        """Say whether Ctrl-C came."""
        return self._stopped

    def on_interrupt(self, count: int) -> None:
        """Hear a Ctrl-C between runs: the first ends with what there is, the second at once."""
        self._stopped = True
        if count > 1:
            raise KeyboardInterrupt

    def lone(self) -> Seen:
        """Send single requests, one after the other."""
        ran = self._closed(1, _LONE_S[0], "lone requests")
        if ran.test is not None and ran.test.ok < 3 and not self._stopped:  # slow answers: a few of them
            ran = self._closed(1, _LONE_S[1], "lone requests")
        self._lone_s = 1 / max(ran.seen.completed_per_s, 1 / _LONE_S[1])
        return ran.seen

    def full(self, users: int) -> Seen:
        """Keep so many requests in flight."""
        duration_s = min(max(_FULL_S[0], _ANSWERS * self._lone_s), _FULL_S[1])
        return self._closed(users, duration_s, f"{users} at once").seen

    def level(self, rate_per_s: float, duration_s: float) -> Seen:
        """Offer a rate."""
        return self.offered(rate_per_s, duration_s).seen

    def gaps(self, rate_per_s: float, n: int = _LONG) -> Floats:
        """Return the gaps of a run without end at this rate."""
        return np.diff(workload.arrival_times(rate_per_s, self._traffic.arrivals, n=n, seed=self._traffic.seed))

    def offered(self, rate_per_s: float, duration_s: float, requests_file: Path | None = None) -> Ran:
        """Run a level in an open loop, ended early when the server falls behind."""
        looks: list[saturation.Look] = []
        settle_s, burstiness = 2 * self._lone_s + 0.5, self._burstiness(rate_per_s)
        over = False

        def watch(p: loadtest.Progress) -> bool:
            nonlocal over
            looks.append(saturation.Look(p.t_s, p.ok + p.failed, p.in_flight))
            self._say(f"{rate_per_s:.4g}/s  {p.t_s:.0f} of {duration_s:.0f} s  in flight {p.in_flight}")
            over = over or (p.t_s < duration_s and saturation.falls_behind(rate_per_s, looks, settle_s, burstiness))
            return over or self._stopped

        longest_s = max([each.wait_s or 0.0 for each in self._clauses], default=0.0)
        options = dataclasses.replace(
            self._traffic,
            qps=rate_per_s, users=None, duration_s=duration_s, warmup_s=_WARMUP_SHARE * duration_s, seed=self._seed(),
            drain_s=min(max(1.2 * longest_s, 4 * self._lone_s + 5), 60.0), requests_file=requests_file,
        )  # fmt: skip
        test, requests = self._ran(options, watch)
        self._stopped = self._stopped or (not over and (_was_stopped(test) or (test is None and _is_cut(looks, duration_s))))
        ran = self._read(rate_per_s, duration_s, test, requests, over, looks)
        now_s = self.took_s()
        self.overhead_s = max(self.overhead_s, now_s - self._ended_s - ran.seen.duration_s)
        self._ended_s = now_s
        return ran

    # ------------------------------------------------------------ one run

    def _closed(self, users: int, duration_s: float, what: str) -> Ran:
        def watch(p: loadtest.Progress) -> bool:
            self._say(f"{what}: {p.t_s:.0f} of {duration_s:.0f} s  answered {p.ok}")
            return self._stopped

        options = dataclasses.replace(
            self._traffic, qps=None, users=users, duration_s=duration_s, warmup_s=0.0 if users == 1 else 0.2 * duration_s,
            seed=self._seed(), drain_s=2 * self._lone_s + 1 if users > 1 else self._traffic.timeout_s,
        )  # fmt: skip
        test, requests = self._ran(options, watch)
        if test is None:
            raise MeasurementFailed(f"{self._traffic.url}: none of the {what} was answered")
        self._stopped = self._stopped or _was_stopped(test)
        self.target, self._ended_s = test.target, self.took_s()
        completed = test.request_rate_per_s
        if users == 1:  # as fast as answers come, however the last one was cut
            took = [r.done_s - r.scheduled_s for r in requests if r.outcome == "ok" and r.done_s is not None]
            completed = len(took) / sum(took) if took else completed
        ran = self._read(completed, duration_s, test, requests, False, [])
        return dataclasses.replace(ran, seen=dataclasses.replace(ran.seen, completed_per_s=completed))

    def _seed(self) -> int:
        self._run += 1
        return self._traffic.seed * 1000 + self._run

    def _ran(
        self, options: loadtest.Options, watch: Callable[[loadtest.Progress], bool]
    ) -> tuple[LoadTest | None, Sequence[RequestRecord]]:
        note = self._note if self._run == 1 else None
        try:
            test, requests = loadtest.run(options, watch, note)
        except MeasurementFailed:
            if self._run <= 2:  # lone requests and the closed loop: nothing is known without them
                raise
            return None, ()
        return test, requests.requests

    def _read(
        self, rate_per_s: float, duration_s: float, test: LoadTest | None, requests: Sequence[RequestRecord], over: bool,
        looks: Sequence[saturation.Look],
    ) -> Ran:  # fmt: skip
        end_s = looks[-1].t_s if over and looks else duration_s
        completed_per_s, completed = _completions(looks, self._lone_s, test)
        found = [clause_of.figure(c, clause_of.scores(c, self._slo, requests)) for c in self._clauses] if test is not None else []
        seen = Seen(
            rate_per_s=rate_per_s, duration_s=end_s, warmup_s=_WARMUP_SHARE * duration_s,
            due_s=np.sort([r.scheduled_s for r in requests]), completed_per_s=completed_per_s, completed=completed,
            over=over or test is None, trusted=test is None or self._is_trusted(test, requests), figures=tuple(found),
        )  # fmt: skip
        return Ran(seen=seen, test=test, in_flight=looks[-1].in_flight if looks else 0)

    def _is_trusted(self, test: LoadTest, requests: Sequence[RequestRecord]) -> bool:
        """Say whether the client kept its schedule and had CPU to spare."""
        busy = max((s.cpu_share or 0.0 for s in test.senders), default=0.0)
        late = [found for r in requests if r.in_window and (found := summary.lateness_s(r)) is not None]
        limits_s = [c.wait_s for c in self._clauses if c.wait_s is not None]
        most_s = max(validity.LATENESS_P99_S[1], _LATE_SHARE_OF_LIMIT * min(limits_s, default=0.0))
        return busy <= validity.CPU_SHARE[1] and (not late or stats.quantile(late, 0.99) <= most_s)

    def _burstiness(self, rate_per_s: float) -> float:
        return stats.scv(self.gaps(rate_per_s, 5000))


def check(traffic: loadtest.Options) -> None:
    """Raise BadInput for traffic that has no rate to be changed."""
    if traffic.trace is not None or traffic.users is not None or traffic.offline is not None:
        raise BadInput("a sweep and a search set the rate themselves: leave --users, --trace and --preset out")
    if not window.is_stationary(traffic):
        raise BadInput(f"--arrivals {traffic.arrivals}: a level needs a rate that stays; use poisson, constant, gamma:CV or mmpp:…")
    if traffic.hosts is not None:
        raise BadInput("a sweep and a search start their workers anew for each level: hosts cannot take part yet, use --processes")


def _was_stopped(test: LoadTest | None) -> bool:
    return test is not None and any(s.ended == "stopped" for s in test.senders)


def _is_cut(looks: Sequence[saturation.Look], duration_s: float) -> bool:
    return not looks or looks[-1].t_s < duration_s - 1.5


def _completions(looks: Sequence[saturation.Look], lone_s: float, test: LoadTest | None) -> tuple[float, int]:
    """Return completions per second since the first answers, and how many were counted."""
    since = [look for look in looks if look.t_s >= 2 * lone_s + 0.5]
    if len(since) >= 2:
        ended = since[-1].ended - since[0].ended
        return ended / (since[-1].t_s - since[0].t_s), ended
    return (test.request_rate_per_s, test.ok) if test is not None else (0.0, 0)
