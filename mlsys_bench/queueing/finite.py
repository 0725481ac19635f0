"""One server with room for K customers, Poisson arrivals, any service: M/G/1/K by the chain embedded at departures."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws import Gamma, Law, Lognormal
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.times import Formula, Time, Zero, after_atoms, invert

Floats = npt.NDArray[np.float64]
Complexes = npt.NDArray[np.complex128]


def mg1k(rate_per_s: float, service: Law, capacity: int) -> Queue:
    """Return M/G/1/K, first come first served, K = `capacity` with the one in service; the load may be 1 or more.

    a_n = P(n arrivals in a service) are the coefficients of E[e^{-rate (1 - z) S}]; the chain of customers left behind is solved by level
    crossings, pi_{j+1} a_0 = pi_0 P(A > j) + sum_i pi_i P(A > j - i + 1), in which nothing is ever subtracted.  Of all arrivals
    1 - 1 / (pi_0 + rho) are turned away; the others find j customers with probability pi_j.  Their wait is the residual service they
    meet and j - 1 more: in closed form where a service has one or two possible times, else by Euler inversion, about 1e-6.

    Checked against the truth table (truth.csv): M/D/1/K blocking within 1e-12; against M/M/1/K: blocking 1e-10, percentiles 1e-7.
    """
    if not (rate_per_s > 0 and math.isfinite(rate_per_s)) or capacity < 1 or capacity != int(capacity):
        raise BadInput(f"M/G/1/K needs a positive arrival rate and room for at least one, not {rate_per_s} and {capacity}")
    rho = rate_per_s * service.mean_s
    chain = _Chain(rate_per_s, service, int(capacity))
    served = 1 / (chain.pi[0] + rho)
    wait, sojourn = chain.times()
    return Queue(
        utilisation=rho,
        p_wait=float(chain.pi[1:].sum()),
        wait=wait,
        sojourn=sojourn,
        throughput_per_s=rate_per_s * served,
        p_blocked=float(1 - served),
    )


class _Chain:
    """The customers an accepted arrival finds (as a departing one leaves behind), and the residual service it meets."""

    def __init__(self, rate: float, service: Law, capacity: int) -> None:
        self.rate, self.service, self.capacity = rate, service, capacity
        # z runs on a circle a little inside 1: what wraps around is 1e-13 of itself, while rounding grows 1e13^(1/8) at most
        self.size = max(64, 1 << (8 * capacity - 1).bit_length())
        self.radius = 1e-13 ** (1 / self.size)
        self.y = rate * (1 - self.radius * np.exp(2j * np.pi * np.arange(self.size) / self.size))
        self.lst = service.lst(self.y)
        self.pi = self._left_behind()
        self.starts = self.pi[1:].copy()  # services begun with i present, per customer served, i = 1 … K - 1
        if capacity > 1:
            self.starts[0] += self.pi[0]

    def coefficients(self, values: Complexes) -> Complexes:
        """Return the first K power-series coefficients of functions known on the circle, along the last axis."""
        return np.asarray(np.fft.fft(values)[..., : self.capacity] / self.size * self.radius ** -np.arange(self.capacity))

    def _left_behind(self) -> Floats:
        """Return pi_0 … pi_{K-1} by level crossings."""
        a = np.maximum(self.coefficients(self.lst).real, 0.0)
        over = np.maximum(1 - np.cumsum(a), 0.0)
        pi = np.zeros(self.capacity)
        pi[0] = 1.0
        for j in range(self.capacity - 1):
            pi[j + 1] = (pi[0] * over[j] + pi[1 : j + 1] @ over[j:0:-1]) / a[0]
            if pi[j + 1] > 1e200:
                pi /= pi[j + 1]
        return np.asarray(pi / pi.sum())

    def times(self) -> tuple[Time, Time]:
        """Return the laws of wait and sojourn."""
        if self.capacity == 1:
            return Zero(), self.service
        mean_s, variance_s2 = self._moments()
        if 1 <= len(self.service.atoms) <= 2:
            wait = Formula(lambda t: np.array([self._over_by_sum(float(x)) for x in t]), mean_s=mean_s, variance_s2=variance_s2)
            return wait, after_atoms(wait, self.service.atoms)
        wait = Formula(lambda t: self._invert(t, self._wait_lst), mean_s=mean_s, variance_s2=variance_s2)
        at_once = self.pi[0]
        sojourn = Formula(
            lambda t: at_once * self.service.survival(t) + self._invert(t, self._delayed_lst),
            mean_s=mean_s + self.service.mean_s,
            variance_s2=variance_s2 + self.service.variance_s2,
        )
        return wait, sojourn

    def _moments(self) -> tuple[float, float]:
        """Return mean and variance of the wait, from the moments of the residual service met together with the arrivals so far."""
        m, v = self.service.mean_s, self.service.variance_s2
        y, fall = self.y, self.lst - 1
        met = self.coefficients(-fall / y).real
        first = self.coefficients((fall / y + m) / y).real
        second = self.coefficients(2 / y * ((v + m**2) / 2 - m / y - fall / y**2)).real
        mean_s = square_s2 = 0.0
        for i, start in enumerate(self.starts, 1):
            n = np.arange(self.capacity - i)
            more = i - 1 + n
            mean_s += start * float((first[n] + met[n] * more * m).sum())
            square_s2 += start * float((second[n] + 2 * first[n] * more * m + met[n] * (more * v + (more * m) ** 2)).sum())
        mean_s, square_s2 = self.rate * mean_s, self.rate * square_s2
        return mean_s, square_s2 - mean_s**2

    def _invert(self, t_s: Floats, lst: Callable[[Complexes], Complexes]) -> Floats:
        """Return P(T > t, not served at once), T the wait or the sojourn, of which `lst` gives E[e^{-sT}; not served at once]."""
        terms = 30 if isinstance(self.service, Gamma | Lognormal) or self.service.phases() is not None else 240
        t = np.maximum(np.asarray(t_s, dtype=np.float64), 1e-9 * self.service.mean_s)
        return invert(lambda s: (1 - self.pi[0] - lst(s)) / s, t.ravel(), terms=terms).reshape(t.shape)

    def _delayed_lst(self, s: Complexes) -> Complexes:
        """Return the transform of the sojourn of those who wait."""
        return np.asarray(self._wait_lst(s) * self.service.lst(s))

    def _wait_lst(self, s: Complexes) -> Complexes:
        """Return the transform of the wait of those who wait.

        A service that began with i present and in which n arrived before the arrival has the residual transform c_n(s), the
        coefficients of (E[e^{-yS}] - E[e^{-sS}]) / (s - y), y = rate (1 - z).
        """
        flat = s.ravel()
        lst = self.service.lst(flat)
        c = self.coefficients((self.lst - lst[:, None]) / (flat[:, None] - self.y))
        powers = lst[:, None] ** np.arange(self.capacity)
        upto = np.cumsum(c * powers, axis=1)
        waits = (upto[:, self.capacity - 2 :: -1][:, : self.capacity - 1] * powers[:, :-1]) @ self.starts
        return np.asarray(self.rate * waits).reshape(s.shape)

    def _over_by_sum(self, t_s: float) -> float:
        """Return P(W > t) where a service takes one or two times: the service met is younger than what keeps the wait above t."""
        value = 0.0
        for (a, p), whole in zip(self.service.atoms, self._whole, strict=True):
            for j in range(1, self.capacity):
                rest_s, chance = self._rests(j - 1)
                age_s = a + rest_s - t_s
                partly = (age_s > 0) & (age_s < a)
                value += p * float(chance[age_s >= a].sum()) * whole[j - 1]
                value += p * float(chance[partly] @ self._met(j, age_s[partly]))
        return value

    def _met(self, j: int, age_s: Floats) -> Floats:
        """Return the chance to find j present and a service met younger than each age: sums over the i present when it began."""
        from scipy.special import gammainc

        arrivals = np.arange(j, 0, -1.0)  # j - i + 1 more until the next would be too many
        return np.asarray(gammainc(arrivals[None, :], self.rate * age_s[:, None]) @ self.starts[:j])

    @cached_property
    def _whole(self) -> list[list[float]]:
        """The same for a service of each possible time, met at any age."""
        return [[float(self._met(j, np.array([a]))[0]) for j in range(1, self.capacity)] for a, _ in self.service.atoms]

    def _rests(self, n: int) -> tuple[Floats, Floats]:
        """Return the possible sums of n services of one or two times, and their probabilities."""
        from scipy.special import comb

        (a, p), (b, q) = self.service.atoms[0], self.service.atoms[-1]
        if len(self.service.atoms) == 1:
            return np.array([n * a]), np.ones(1)
        k = np.arange(n + 1)
        return k * a + (n - k) * b, comb(n, k) * p**k * q ** (n - k)
