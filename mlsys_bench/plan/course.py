"""The course of traffic: a rate at equal steps that repeats, from a law of arrivals, from what was seen, or as given."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.types import Workload
from mlsys_bench.workload import Bursts, parse_arrivals
from mlsys_bench.workload.arrivals import Daily, Stages, level_steps
from mlsys_bench.workload.series import Series

STEP_S = 300.0
DAY_S = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """Rates per second, each for `step_s`, over and over."""

    step_s: float
    rates_per_s: tuple[float, ...]

    def __post_init__(self) -> None:
        """Refuse what is no course."""
        if not (self.step_s > 0 and self.rates_per_s and all(r >= 0 and math.isfinite(r) for r in self.rates_per_s)):
            raise BadInput(f"a course of {len(self.rates_per_s)} rates at steps of {self.step_s:g} s: rates are finite and from 0 up")
        if not max(self.rates_per_s) > 0:
            raise BadInput("a course of traffic that has none")

    @property
    def period_s(self) -> float:
        """How long until it repeats."""
        return self.step_s * len(self.rates_per_s)

    @property
    def peak_per_s(self) -> float:
        """The highest rate."""
        return max(self.rates_per_s)

    @property
    def mean_per_s(self) -> float:
        """The mean rate."""
        return float(np.mean(self.rates_per_s))

    @property
    def varies(self) -> bool:
        """Whether it is ever higher than its mean."""
        return self.peak_per_s > self.mean_per_s * (1 + 1e-9)

    def at(self, time_s: float) -> float:
        """Return the rate at a time."""
        return self.rates_per_s[int(time_s % self.period_s / self.step_s) % len(self.rates_per_s)]

    def highest(self, start_s: float, end_s: float) -> float:
        """Return the highest rate between two times."""
        first, last = math.floor(start_s / self.step_s), math.ceil(end_s / self.step_s - 1e-9)
        return max(self.rates_per_s[k % len(self.rates_per_s)] for k in range(first, max(last, first + 1)))


def of(traffic: Workload) -> Course:
    """Return the course of a workload: of its law of arrivals where that has a time of day or stages, else of the rates that were seen.

    Bursts are left out: they are part of any hour.  Steady traffic is one rate all day.  Hours about which nothing is known take the mean.
    """
    law = parse_arrivals(traffic.arrivals)
    slow = tuple(m for m in law.modulations if not isinstance(m, Bursts))
    if slow:
        period_s = max(_length_s(m) for m in slow)
        return _sampled(*level_steps(slow, period_s, np.random.SeedSequence(0)), period_s, traffic.rate_per_s)
    seen = traffic.observed
    if seen is not None and len(seen.series_per_s) > 1:
        known = [r for r in seen.series_per_s if r is not None]
        mean = float(np.mean(known)) if known else traffic.rate_per_s
        return Course(step_s=seen.series_step_s, rates_per_s=tuple(mean if r is None else r for r in seen.series_per_s))
    return Course(step_s=DAY_S, rates_per_s=(traffic.rate_per_s,))


def _length_s(modulation: object) -> float:
    if isinstance(modulation, Daily):
        return modulation.period_s
    assert isinstance(modulation, (Series, Stages))
    return modulation.lasts_s


def _sampled(edges: np.ndarray, levels: np.ndarray, period_s: float, mean_per_s: float) -> Course:
    """Return the mean level of each of equal steps, as many as keep them near five minutes."""
    n = max(1, round(period_s / STEP_S)) if period_s >= 12 * STEP_S else 12
    total = np.concatenate([[0.0], np.cumsum(levels * np.diff(edges))])
    at = np.interp(np.linspace(0.0, period_s, n + 1), edges, total)
    return Course(step_s=period_s / n, rates_per_s=tuple((mean_per_s * np.diff(at) * n / period_s).tolist()))
