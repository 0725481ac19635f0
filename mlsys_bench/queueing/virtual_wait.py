"""The wait a customer would have who arrives at a given time, while servers come and go."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np

from mlsys_bench.queueing.schedule import Plan
from mlsys_bench.queueing.times import Floats, Time


class VirtualWait(Time):
    """The wait of a customer who arrives at time t, first come first served: who is ahead must leave until a server is free.

    With n >= c found, j = n - c + 1 departures at rate c mu: an Erlang mixture.  Where the number of servers changes later, the mixture is
    carried to the change and j falls by the servers added.
    """

    def __init__(self, law: Floats, plan: Plan, time_s: float) -> None:
        self._plan, self._time_s, self._law = plan, time_s, law

    @cached_property
    def _pieces(self) -> list[tuple[float, float, float, Floats]]:
        """Stretches of constant servers: (from, to, departures per second, P(j more departures needed), j = 1, 2 …)."""
        plan, pieces, from_s = self._plan, [], 0.0
        c = plan.servers(self._time_s)
        needed = self._law[c:]
        while needed.sum() > 1e-15:
            to_s, after = from_s, c
            while after == c and to_s < math.inf:
                to_s = plan.next_jump_s(self._time_s + to_s) - self._time_s
                after = plan.servers(self._time_s + to_s) if to_s < math.inf else c
                if to_s > from_s + 60 * (len(needed) + 60) / (c * plan.mu):
                    to_s = math.inf
            pieces.append((from_s, to_s, c * plan.mu, needed))
            if to_s == math.inf:
                break
            needed = _left(needed, c * plan.mu * (to_s - from_s))
            needed = needed[after - c :] if after >= c else np.concatenate([np.zeros(c - after), needed])
            from_s, c = to_s, after
        return pieces

    @cached_property
    def _moments(self) -> tuple[float, float]:
        """E[T] and E[T^2]: integrals of P(T > t) and 2 t P(T > t) over the stretches."""
        from scipy.special import gammainc, gammaincc

        first = second = 0.0
        for from_s, to_s, per_s, needed in self._pieces:
            j, long_s = np.arange(1, len(needed) + 1), to_s - from_s
            one, two = j / per_s, j * (j + 1) / per_s**2
            if long_s < math.inf:
                x, beyond = per_s * long_s, gammaincc(j, per_s * long_s)
                one, two = one * gammainc(j + 1, x) + long_s * beyond, two * gammainc(j + 2, x) + long_s**2 * beyond
            first += float(needed @ one)
            second += float(needed @ (two + 2 * from_s * one))
        return first, second

    @property
    def mean_s(self) -> float:  # type: ignore[override]  # computed when asked for
        """Mean."""
        return self._moments[0]

    @property
    def variance_s2(self) -> float:  # type: ignore[override]
        """Variance."""
        return self._moments[1] - self._moments[0] ** 2

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t)."""
        return np.array([self._over(float(t)) for t in t_s])

    def _over(self, t_s: float) -> float:
        from scipy.special import gammaincc

        for from_s, to_s, per_s, needed in self._pieces:
            if t_s < to_s:
                return float(needed @ gammaincc(np.arange(1, len(needed) + 1), per_s * (t_s - from_s)))
        return 0.0


def _left(needed: Floats, mean_departures: float) -> Floats:
    """Return P(j departures are still needed), j = 1, 2 …, after a Poisson number of them."""
    from scipy.special import gammaln

    d = np.arange(len(needed))
    with np.errstate(divide="ignore"):
        weights = np.exp(d * np.log(mean_departures) - mean_departures - gammaln(d + 1))
    return np.convolve(needed[::-1], weights)[: len(needed)][::-1]
