"""Random times — a wait, a service, a sojourn — each able to say its mean, its variance, P(T > t) and any percentile.

A model returns its answer as `Time`s: which subclass says how the tail is computed (in closed form, as a matrix exponential, by
inverting a transform, on a lattice, or from samples).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput

Floats = npt.NDArray[np.float64]
Complexes = npt.NDArray[np.complex128]


class Time(ABC):
    """A random time that is never negative.  `mean_s` and `variance_s2` are attributes or properties of each kind."""

    mean_s: float
    variance_s2: float

    @abstractmethod
    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t) for an array of t >= 0."""

    def p_over(self, t_s: float) -> float:
        """Return P(T > t)."""
        return 1.0 if t_s < 0 else float(self.survival(np.array([t_s], dtype=np.float64))[0])

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile: the least t with P(T > t) <= 1 - p; 0 when P(T > 0) is no more than that."""
        return quantile_of(self.p_over, check_share(p), self.mean_s or 1.0)

    @property
    def scv(self) -> float:
        """Variance over mean squared; 0 for a time that is always 0."""
        return self.variance_s2 / self.mean_s**2 if self.mean_s > 0 else 0.0


class Formula(Time):
    """A time whose P(T > t) is a function of an array of t; mean and variance come with it."""

    def __init__(self, survival: Callable[[Floats], Floats], *, mean_s: float, variance_s2: float) -> None:
        self._survival, self.mean_s, self.variance_s2 = survival, mean_s, variance_s2

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t)."""
        return np.clip(self._survival(t_s), 0.0, 1.0)


class Zero(Time):
    """No time at all: the wait where there is always a free server."""

    mean_s = 0.0
    variance_s2 = 0.0

    def survival(self, t_s: Floats) -> Floats:
        """Return 0 for every t >= 0."""
        return np.zeros_like(t_s)

    def quantile_s(self, p: float) -> float:
        """Return 0."""
        check_share(p)
        return 0.0


class Shifted(Time):
    """A time and a constant after it: wait + a service that is always the same."""

    def __init__(self, time: Time, by_s: float) -> None:
        self.time, self.by_s = time, by_s
        self.mean_s, self.variance_s2 = time.mean_s + by_s, time.variance_s2

    def survival(self, t_s: Floats) -> Floats:
        """Return P(time > t - constant)."""
        return np.where(t_s < self.by_s, 1.0, self.time.survival(np.maximum(t_s - self.by_s, 0.0)))

    def quantile_s(self, p: float) -> float:
        """Return the constant on top of the p-quantile of the time."""
        return self.by_s + self.time.quantile_s(p)


class MatrixExponential(Time):
    """P(T > t) = alpha e^{S t} 1: alpha [N] sums to P(T > 0), S [N, N] has its eigenvalues left of 0.

    Phase-type laws and the waits of M/PH/c and MMPP/M/c are of this form.  E[T] = alpha (-S)^-1 1, E[T^2] = 2 alpha (-S)^-2 1.
    Powers e^{S h 2^k} are squared up once and kept, so a percentile is a descent over them (vector times matrix) and a last
    Newton step on the Taylor series: relative error about 1e-12, N = 100 in milliseconds.
    """

    def __init__(self, alpha: Floats, S: Floats) -> None:
        self.alpha, self.S = np.asarray(alpha, dtype=np.float64), np.asarray(S, dtype=np.float64)
        ones = np.ones(len(self.alpha))
        first = np.linalg.solve(-self.S, ones)
        self.mean_s = float(self.alpha @ first)
        self.variance_s2 = float(2 * self.alpha @ np.linalg.solve(-self.S, first)) - self.mean_s**2
        norm = float(np.abs(self.S).sum(axis=1).max())
        self._step_s = 0.5 / norm
        self._powers: list[Floats] = []  # e^{S h}, e^{2 S h}, e^{4 S h} …

    def _power(self, k: int) -> Floats:
        """Return e^{S h 2^k}, squaring as far as needed."""
        if not self._powers:
            from scipy.linalg import expm

            self._powers.append(np.asarray(expm(self.S * self._step_s), dtype=np.float64))
        while len(self._powers) <= k:
            self._powers.append(self._powers[-1] @ self._powers[-1])
        return self._powers[k]

    def rows(self, t_s: Floats) -> Floats:
        """Return alpha e^{S t}, one row for each t >= 0 of an array [n]."""
        steps, rest_s = np.divmod(np.asarray(t_s, dtype=np.float64), self._step_s)
        whole = np.minimum(steps, 2.0**62).astype(np.int64)
        rows: Floats = np.repeat(self.alpha[None, :], len(whole), axis=0)
        for k in range(int(whole.max(initial=0)).bit_length()):
            at = (whole >> k & 1).astype(bool)
            if at.any():
                rows[at] = rows[at] @ self._power(k)
        return self._taylor(rows, np.asarray(rest_s, dtype=np.float64)[:, None])

    def _taylor(self, row: Floats, t_s: float | Floats) -> Floats:
        """Return row e^{S t} for t up to a step or so; for several rows, with a column of times."""
        total: Floats = row.copy()
        term: Floats = row
        for k in range(1, 20):
            term = np.asarray(term @ self.S * (t_s / k), dtype=np.float64)
            total += term
        return total

    def survival(self, t_s: Floats) -> Floats:
        """Return alpha e^{S t} 1."""
        t = np.asarray(t_s, dtype=np.float64)
        return np.asarray(np.clip(self.rows(t.ravel()).sum(axis=1).reshape(t.shape), 0.0, 1.0), dtype=np.float64)

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile by descending over the kept powers."""
        share = 1 - check_share(p)
        if float(self.alpha.sum()) <= share:
            return 0.0
        k = 0
        while float((self.alpha @ self._power(k)).sum()) > share:
            k += 1
        row, t_s = self.alpha, 0.0
        for j in range(k - 1, -1, -1):
            after = row @ self._power(j)
            if float(after.sum()) > share:
                row, t_s = after, t_s + self._step_s * 2**j
        rest_s = 0.0
        for _ in range(30):  # Newton on the rest, less than a step long
            here = self._taylor(row, rest_s)
            move_s = (float(here.sum()) - share) / -float((here @ self.S).sum())
            rest_s = min(max(rest_s + move_s, 0.0), self._step_s)
            if abs(move_s) <= 1e-14 * (t_s + rest_s):
                break
        return t_s + rest_s

    def then(self, other: MatrixExponential) -> MatrixExponential:
        """Return the sum of this time and an independent other: phases of the one, then of the other."""
        n, m = len(self.alpha), len(other.alpha)
        exits = -self.S @ np.ones(n)
        S = np.zeros((n + m, n + m))
        S[:n, :n], S[n:, n:] = self.S, other.S
        S[:n, n:] = np.outer(exits, other.alpha)
        none = 1 - float(self.alpha.sum())
        return MatrixExponential(np.concatenate([self.alpha, none * other.alpha]), S)


class Transform(Time):
    """A time known by E[e^{-sT}], inverted numerically where P(T > t) is asked.

    `lst` takes a complex array.  Euler summation of the Bromwich integral of (1 - lst(s)) / s; discretisation error below 1e-8 for
    laws that are smooth at t, some 1e-4 at a kink.  A jump of the law at t is a miss: such laws need another way.
    """

    def __init__(self, lst: Callable[[Complexes], Complexes], *, mean_s: float, variance_s2: float) -> None:
        self.lst, self.mean_s, self.variance_s2 = lst, mean_s, variance_s2

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t), by inversion at each t > 0; at 0 the limit from the right, found at a 1e-9th of the mean."""
        t = np.maximum(t_s, 1e-9 * (self.mean_s or 1.0))
        return np.clip(invert(lambda s: (1 - self.lst(s)) / s, t), 0.0, 1.0)


def invert(transform: Callable[[Complexes], Complexes], t_s: Floats, *, terms: int = 30, averaged: int = 14) -> Floats:
    """Return f(t) for an array of t > 0 from its Laplace transform, for f bounded by 1.

    f(t) ~ (e^{A/2} / t) [ Re F(A/2t) / 2 + sum (-1)^k Re F((A + 2 k pi i) / 2t) ], the alternating sum cut at `terms` and closed by
    binomial averages over `averaged` more (Euler summation).  A = 8 ln 10 = 18.4 bounds the discretisation error by 1e-8.
    """
    A = 8 * math.log(10)
    k = np.arange(terms + averaged + 1)
    s = (A + 2j * np.pi * k[:, None]) / (2 * t_s[None, :])
    values = np.real(transform(np.asarray(s, dtype=np.complex128)))
    values[0] /= 2
    sums = np.cumsum(values * ((-1.0) ** k)[:, None], axis=0)[terms:]
    weights = np.array([math.comb(averaged, j) for j in range(averaged + 1)], dtype=np.float64) / 2**averaged
    return np.asarray(np.exp(A / 2) / t_s * (weights @ sums), dtype=np.float64)


class Lattice(Time):
    """A time on the points 0, h, 2h … with `masses` [n]; between points P(T > t) is interpolated, but the atom at 0 stays whole."""

    def __init__(self, masses: Floats, step_s: float) -> None:
        self.masses, self.step_s = np.asarray(masses, dtype=np.float64), step_s
        self._over = np.maximum(1 - np.cumsum(self.masses), 0.0)  # P(T > k h)
        at = np.arange(len(self.masses)) * step_s
        self.mean_s = float(self.masses @ at)
        self.variance_s2 = float(self.masses @ at**2) - self.mean_s**2

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t), linear between the middles of neighbouring cells."""
        n = len(self._over)
        points = np.concatenate([[0.0], (np.arange(n - 1) + 0.5) * self.step_s])
        values = self._over[np.concatenate([[0], np.arange(n - 1)])]
        return np.asarray(np.interp(t_s, points, values, right=0.0), dtype=np.float64)


class Samples(Time):
    """A time known by draws (one run, or several pooled), kept sorted."""

    def __init__(self, samples: Floats) -> None:
        if len(samples) == 0:
            raise BadInput("no samples: nothing can be said about this time")
        self.samples = np.sort(np.asarray(samples, dtype=np.float64))
        self.mean_s = float(self.samples.mean())
        self.variance_s2 = float(self.samples.var())

    def survival(self, t_s: Floats) -> Floats:
        """Return the share of draws above t."""
        return 1 - np.searchsorted(self.samples, t_s, side="right") / len(self.samples)

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile of the draws."""
        return float(self.samples[min(len(self.samples) - 1, math.ceil(check_share(p) * len(self.samples)) - 1)])


def total(wait: Time, service: Any) -> Time:
    """Return wait + service for an independent service `Law`, P(W + S > t) = P(S > t) + E[P(W > t - S); S <= t].

    Exact where both are of phases (`MatrixExponential.then`) and where the service takes few values (a sum).  Otherwise the expectation
    runs over the service's quantiles, panel by panel (Gauss–Legendre), so it needs nothing but `wait.survival` and
    `service.quantiles`; about 1e-6 for smooth laws.
    """
    phases = service.phases() if isinstance(wait, MatrixExponential) else None
    if phases is not None and isinstance(wait, MatrixExponential):
        return wait.then(phases.time)
    if service.atoms:
        return after_atoms(wait, service.atoms)
    nodes, weights = np.polynomial.legendre.leggauss(24)
    variance_s2 = wait.variance_s2 + service.variance_s2

    def survival(t_s: Floats) -> Floats:
        return np.array([one(float(t)) for t in t_s])

    def one(t_s: float) -> float:
        over = service.p_over(t_s)
        ends = (1 - over) * np.array([0.0, 0.5, 0.8, 0.95, 0.99, 1.0])
        half = np.diff(ends) / 2
        u = (ends[:-1, None] + half[:, None] * (1 + nodes[None, :])).ravel()
        w = (half[:, None] * weights[None, :]).ravel()
        return float(over + w @ wait.survival(np.maximum(t_s - service.quantiles(u), 0.0)))

    return Formula(survival, mean_s=wait.mean_s + service.mean_s, variance_s2=variance_s2)


def after_atoms(wait: Time, atoms: tuple[tuple[float, float], ...]) -> Time:
    """Return wait + a service of few possible times, given as (time, probability)."""
    if len(atoms) == 1:
        return Shifted(wait, atoms[0][0])
    mean_s = sum(p * a for a, p in atoms)
    variance_s2 = wait.variance_s2 + sum(p * (a - mean_s) ** 2 for a, p in atoms)

    def survival(t_s: Floats) -> Floats:
        t = np.asarray(t_s, dtype=np.float64)
        parts = [p * np.where(t < a, 1.0, wait.survival(np.maximum(t - a, 0.0))) for a, p in atoms]
        return np.asarray(sum(parts), dtype=np.float64)

    return Formula(survival, mean_s=wait.mean_s + mean_s, variance_s2=variance_s2)


def mixture(shares: Sequence[float], parts: Sequence[Time]) -> Time:
    """Return a time that is one of several, each with its share."""
    pairs = list(zip(shares, parts, strict=True))
    mean_s = sum(share * part.mean_s for share, part in pairs)
    square = sum(share * (part.variance_s2 + part.mean_s**2) for share, part in pairs)

    def survival(t_s: Floats) -> Floats:
        return np.asarray(sum(share * part.survival(t_s) for share, part in pairs), dtype=np.float64)

    return Formula(survival, mean_s=mean_s, variance_s2=square - mean_s**2)


def quantile_of(survival: Callable[[float], float], p: float, scale_s: float) -> float:
    """Return the p-quantile of a law given P(T > t); 0 when P(T > 0) <= 1 - p.

    Doubling of `scale_s`, then inverse quadratic steps on log P wherever they are safe and bisection elsewhere (Chandrupatla's rule):
    five to eight evaluations after the doubling on smooth tails, and never lost on a law with jumps.
    """
    if survival(0.0) <= 1 - p:
        return 0.0
    goal = math.log1p(-p)

    def over(t_s: float) -> float:
        return math.log(max(survival(t_s), 1e-300)) - goal

    low, high = 0.0, scale_s
    above, below = math.inf, over(high)
    while below > 0:
        low, high, above = high, 2 * high, below
        below = over(high)
    if low == 0:
        above = over(0.0)
    return _crossing(over, (low, above), (high, below))


def _crossing(f: Callable[[float], float], a: tuple[float, float], b: tuple[float, float]) -> float:
    """Return the upper end of a bracket, 1e-12 narrow, of the point where a falling f passes 0; a and b are (x, f) on both sides."""
    (x1, f1), (x2, f2) = b, a
    share = f1 / (f1 - f2) if f1 < 0 < f2 else 0.5
    for _ in range(200):
        x = x1 + share * (x2 - x1)
        fx = f(x)
        (x3, f3), (x2, f2) = ((x1, f1), (x2, f2)) if (fx > 0) == (f1 > 0) else ((x2, f2), (x1, f1))
        x1, f1 = x, fx
        width, narrow = abs(x2 - x1), 1e-12 * max(x1, x2)
        if width <= narrow:
            break
        xi, phi = (x1 - x2) / (x3 - x2), (f1 - f2) / (f3 - f2) if f3 != f2 else 0.0
        share = 0.5
        if phi**2 < xi and (1 - phi) ** 2 < 1 - xi and f1 not in (f2, f3):
            share = f1 / (f2 - f1) * f3 / (f2 - f3) + (x3 - x1) / (x2 - x1) * f1 / (f3 - f1) * f2 / (f3 - f2)
        least = 0.5 * narrow / width
        share = min(max(share, least), 1 - least)
    return max(x1, x2)


def check_share(p: float) -> float:
    """Return p when it is a probability a quantile can have, raise BadInput otherwise."""
    if not 0 < p < 1:
        raise BadInput(f"a quantile needs a probability between 0 and 1, not {p}")
    return p
