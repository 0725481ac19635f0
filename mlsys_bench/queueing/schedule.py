"""A rate and a number of servers as functions of time: a daily wave, steps, and when either jumps."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mlsys_bench.errors import BadInput

Rate = Callable[[float], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sinusoid:
    """The rate mean (1 + swing sin(2 pi t / period)): a day in one term."""

    mean_per_s: float
    swing: float
    period_s: float

    def __post_init__(self) -> None:
        if not (self.mean_per_s > 0 and abs(self.swing) <= 1 and self.period_s > 0):
            raise BadInput(f"a daily wave needs a mean and a period above 0 and a swing of at most 1: {self}")

    def __call__(self, t_s: float) -> float:
        """Return the rate at time t."""
        return self.mean_per_s * (1 + self.swing * math.sin(2 * math.pi * t_s / self.period_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """A value that jumps: `values[0]` before `at_s[0]`, `values[i + 1]` from `at_s[i]` on.  A rate, or a number of servers."""

    values: tuple[float, ...]
    at_s: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.at_s) + 1 or list(self.at_s) != sorted(set(self.at_s)) or min(self.values) < 0:
            raise BadInput(f"steps need rising times and one value >= 0 more than times: {self}")

    def __call__(self, t_s: float) -> float:
        """Return the value in force at time t, that after the jump where t is one."""
        return self.values[bisect.bisect_right(self.at_s, t_s)]


class Plan:
    """Rate and servers over time, and when either jumps."""

    def __init__(self, rate: Rate, service_s: float, servers: Steps, period_s: float | None) -> None:
        if min(servers.values) < 1 or any(c != int(c) for c in servers.values):
            raise BadInput(f"servers must be whole numbers from 1 up: {servers.values}")
        self._rate, self._servers, self.mu, self.period_s = rate, servers, 1 / service_s, period_s
        self.most_servers = int(max(servers.values))
        jumps = {*servers.at_s, *(rate.at_s if isinstance(rate, Steps) else ())}
        if period_s is not None:
            jumps = {t for t in jumps if 0 < t < period_s}
            last = (1 - 1e-6) * period_s
            if servers(last) != servers(0.0) or abs(rate(last) - rate(0.0)) > 1e-4 * rate(0.0):
                jumps.add(0.0)
        self._jumps = sorted(jumps)

    def rate(self, t_s: float) -> float:
        """Return the arrivals per second at time t."""
        return self._rate(self._phase_s(t_s))

    def rate_between(self, start_s: float, end_s: float) -> Rate:
        """Return the rate over a stretch without a jump: one number where it goes by steps, so that neither end reads the other side."""
        if not isinstance(self._rate, Steps):
            return self.rate
        level = self.rate((start_s + end_s) / 2)
        return lambda t: level

    def servers(self, t_s: float) -> int:
        """Return the servers in force at time t."""
        return int(self._servers(self._phase_s(t_s)))

    def _phase_s(self, t_s: float) -> float:
        """Return the time within the period; what is a rounding error before a jump counts as after it."""
        return t_s if self.period_s is None else (t_s + 1e-12 * self.period_s) % self.period_s

    def next_jump_s(self, t_s: float) -> float:
        """Return the first jump after t, infinity when there is none."""
        if self.period_s is None or not self._jumps:
            later = self._jumps[bisect.bisect_right(self._jumps, t_s) :]
            return later[0] if later else math.inf
        start = math.floor(t_s / self.period_s)
        jumps = (k * self.period_s + j for k in (start, start + 1, start + 2) for j in self._jumps)
        return next(s for s in jumps if s > t_s + 1e-11 * self.period_s)

    def pieces(self, start_s: float, end_s: float) -> Iterator[tuple[float, float]]:
        """Yield the stretches without a jump that make up the time from start to end."""
        while start_s < end_s:
            stop_s = min(end_s, self.next_jump_s(start_s))
            yield start_s, stop_s
            start_s = stop_s
