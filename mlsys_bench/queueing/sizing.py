"""The fewest servers that keep a percentile: a search that asks `solve` and assumes no formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from mlsys_bench.errors import BadInput, Infeasible
from mlsys_bench.queueing.answer import Answer, rate_of
from mlsys_bench.queueing.checks import check as check_system
from mlsys_bench.queueing.mmc import least, mmc
from mlsys_bench.queueing.solve import solve
from mlsys_bench.queueing.station import Bursts, Station
from mlsys_bench.queueing.times import Formula, check_share, total


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A promise: the p-quantile of the wait or the sojourn stays at or under a limit."""

    station: Station  # its `servers` is where the search may start, and no more
    limit_s: float
    p: float = 0.99
    of: Literal["wait", "sojourn"] = "sojourn"
    loss: float = 0.01  # most of the arrivals that may be turned away or give up; for stations where some are


@dataclass(frozen=True, slots=True, kw_only=True)
class Sized:
    """The least number of servers, and the numbers it would be were the answer off by its expected error either way."""

    servers: int
    low: int
    high: int
    answer: Answer  # of the station with `servers`
    tried: tuple[int, ...]  # numbers of servers that were solved, in order


def servers_for(target: Target, *, tolerance: float = math.inf, budget_s: float = 2.0, seed: int = 0, most: int = 100_000) -> Sized:
    """Return the fewest servers that meet a target, found by galloping and bisection over `solve`.

    Where customers are turned away or give up, no more than `target.loss` of them may: those who are served wait little when few are.
    Only one thing is assumed: that a server more never makes the percentile worse, which holds for first come first served with any
    arrivals and service.  The start is a guess (`Guess`); a wrong one costs steps, never the answer.
    `tolerance`, `budget_s` and `seed` go to `solve`: by default any formula is taken, and `low` and `high` say what its error may cost.
    Raises Infeasible when service alone breaks a sojourn limit, or `most` servers do not meet it.
    """
    check(target)
    answers: dict[int, Answer] = {}
    offered = rate_of(target.station.arrivals) * target.station.service.mean_s
    first = 1 if target.station.patience or target.station.capacity else math.floor(offered) + 1

    def answer(servers: int) -> Answer:
        if servers not in answers:
            answers[servers] = solve(with_servers(target.station, servers), tolerance=tolerance, budget_s=budget_s, seed=seed)
        return answers[servers]

    def over(servers: int, factor: float = 1.0) -> float:
        queue = answer(servers).queue
        return (queue.wait_p if target.of == "wait" else queue.sojourn_p)(target.limit_s * factor)

    def meets(servers: int, factor: float = 1.0) -> bool:
        queue = answer(servers).queue
        return queue.p_blocked + queue.p_abandoned <= target.loss and over(servers, factor) <= 1 - target.p

    guess = Guess(target)
    start = max(first, min(guess.first(), most))
    start = max(first, min(guess.after(start, over(start)), most))
    servers = search(meets, least=first, start=start, most=most)
    error = answer(servers).expected_error
    low = high = servers
    if error > 1e-4:  # true value 1 + error higher: as if the limit were that much lower
        low = search(lambda c: meets(c, 1 + error), least=first, start=servers, most=most)
        high = search(lambda c: meets(c, 1 / (1 + error)), least=first, start=servers, most=most, open_ended=True)
    return Sized(servers=servers, low=low, high=high, answer=answer(servers), tried=tuple(answers))


class Guess:
    """About how many servers are needed: M/M/c, its wait stretched by (SCV of arrivals + SCV of service) / 2, the service's own law added.

    Off by a few servers where laws are far from exponential, less once `after` has seen one answer; no answer to anything by itself.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.service, self.rate_per_s = target, target.station.service, rate_of(target.station.arrivals)
        arrivals = target.station.arrivals
        self.stretch = max((self.service.scv + (1.0 if isinstance(arrivals, Bursts) else arrivals.scv)) / 2, 0.01)

    def over(self, servers: int) -> float:
        """Return about what share is over the limit."""
        queue = mmc(self.rate_per_s, self.service.mean_s, servers)
        wait = Formula(lambda t_s: queue.wait.survival(t_s / self.stretch), mean_s=queue.wait_s * self.stretch, variance_s2=0.0)
        return (wait if self.target.of == "wait" else total(wait, self.service)).p_over(self.target.limit_s)

    def first(self) -> int:
        """Return the servers to try first."""
        return self._fewest(1 - self.target.p)

    def after(self, servers: int, over: float) -> int:
        """Return the servers to try next, given the true share over the limit with some others."""
        return self._fewest((1 - self.target.p) * self.over(servers) / over) if over > 0 else servers

    def _fewest(self, share: float) -> int:
        service = self.service.p_over(self.target.limit_s) if self.target.of == "sojourn" else 0.0
        allowed = max(share, service + 1e-3 * (1 - self.target.p))
        return least(lambda servers: self.over(servers) <= allowed, first=math.floor(self.rate_per_s * self.service.mean_s) + 1)


def with_servers(station: Station, servers: int) -> Station:
    """Return the station with another number of servers, its waiting room unchanged."""
    room = None if station.capacity is None else station.capacity - station.servers
    return replace(station, servers=servers, capacity=None if room is None else room + servers)


def check(target: Target) -> None:
    """Raise BadInput for a limit that is none, Infeasible when an idle server already breaks it."""
    if not isinstance(target.station, Station) or target.of not in ("wait", "sojourn"):
        raise BadInput(f"a target is for the 'wait' or the 'sojourn' of a Station, not for {target.of!r} of {target.station!r}")
    check_system(target.station)
    check_share(target.p)
    if not 0 <= target.loss <= 1:
        raise BadInput(f"a loss of {target.loss} is not a share of the arrivals, 0 to 1")
    if not target.limit_s > 0 and not (target.of == "wait" and target.limit_s == 0):
        raise BadInput(f"a limit of {target.limit_s} s is not a positive time")
    service = target.station.service
    if target.of == "sojourn" and service.p_over(target.limit_s) > 1 - target.p:
        raise Infeasible(
            f"no number of servers keeps p{100 * target.p:g} of the sojourn under {target.limit_s:g} s: "
            f"service alone takes {service.quantile_s(target.p):g} s"
        )


def search(meets: Callable[[int], bool], *, least: int, start: int, most: int, open_ended: bool = False) -> int:
    """Return the least integer >= `least` that meets a condition which, once met, stays met: gallop from `start`, then bisect.

    Raises Infeasible when nothing up to `most` does; `open_ended` then returns `most`.
    """
    below, above, step = least - 1, start, 1  # below: known not to meet, or out of range
    if meets(start):
        while above > least and meets(max(least, above - step)):
            above, step = max(least, above - step), 2 * step
        below = max(least, above - step) if above > least else least - 1
    else:
        below = start
        while not meets(min(most, below + step)):
            below, step = min(most, below + step), 2 * step
            if below == most:
                if open_ended:
                    return most
                raise Infeasible(f"not even {most} servers meet it")
        above = min(most, below + step)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (below, middle) if meets(middle) else (middle, above)
    return above
