"""Laws made of exponential phases: one, one of several, several in any order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws.base import Complexes, Floats, Law, Shape, check_scv, short
from mlsys_bench.queueing.times import MatrixExponential


class Exponential(Law):
    """No memory: the time between arrivals of a Poisson stream."""

    def __init__(self, mean_s: float = 1.0) -> None:
        super().__init__(mean_s, mean_s=mean_s, variance_s2=mean_s**2, third=6.0)

    def __str__(self) -> str:
        return "exp"

    def survival(self, t_s: Floats) -> Floats:
        """Return e^{-t/m}."""
        return np.exp(-np.asarray(t_s) / self.mean_s)

    def quantiles(self, u: Floats) -> Floats:
        """Return -m log(1 - u)."""
        return -self.mean_s * np.log1p(-np.asarray(u, dtype=np.float64))

    def lst(self, s: Complexes) -> Complexes:
        """Return 1 / (1 + s m)."""
        return np.asarray(1 / (1 + np.asarray(s, dtype=np.complex128) * self.mean_s))

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return m e^{-t/m}."""
        return self.mean_s * self.survival(t_s)

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return exponential draws."""
        return rng.standard_exponential(size) * self.mean_s

    def scaled(self, mean_s: float) -> Exponential:
        """Return the exponential law of another mean."""
        return Exponential(mean_s)

    def phases(self) -> PhaseType:
        """Return one phase."""
        return PhaseType([1.0], [[-1 / self.mean_s]], notation="exp")


class Hyperexponential(Law):
    """One of several exponential times, picked with the given shares."""

    def __init__(self, shares: Sequence[float], means_s: Sequence[float], *, notation: str | None = None) -> None:
        p, m = np.array(shares, dtype=np.float64), np.array(means_s, dtype=np.float64)
        if p.shape != m.shape or p.ndim != 1 or not len(p) or (p < 0).any() or abs(p.sum() - 1) > 1e-9 or not (m > 0).all():
            raise BadInput(f"a hyperexponential law needs shares that add up to 1 and as many positive means: {shares}, {means_s}")
        mean_s = float(p @ m)
        super().__init__(
            tuple(p.tolist()),
            tuple(m.tolist()),
            mean_s=mean_s,
            variance_s2=float(2 * p @ m**2) - mean_s**2,
            third=float(6 * p @ m**3) / mean_s**3,
        )
        name = notation or "hyper:" + ":".join(f"{short(a)}:{short(b)}" for a, b in zip(p, m, strict=True))
        self.__dict__.update(shares=tuple(p.tolist()), means_s=tuple(m.tolist()), _p=p, _m=m, _notation=name)

    shares: tuple[float, ...]
    means_s: tuple[float, ...]
    _p: Floats
    _m: Floats
    _notation: str

    def __str__(self) -> str:
        return self._notation

    def survival(self, t_s: Floats) -> Floats:
        """Return the shares times e^{-t/m}, added up."""
        return np.asarray(np.exp(-np.asarray(t_s)[..., None] / self._m) @ self._p)

    def quantiles(self, u: Floats) -> Floats:
        """Return the inverse by Newton steps on log P(X > t), to about 1e-13."""

        def tail(t_s: Floats) -> tuple[Floats, Floats]:
            terms = np.exp(-t_s[:, None] / self._m)
            return terms @ self._p, terms @ (self._p / self._m)

        return _inverse(tail, u, self.mean_s)

    def lst(self, s: Complexes) -> Complexes:
        """Return the shares over (1 + s m), added up."""
        return np.asarray((self._p / (1 + np.asarray(s, dtype=np.complex128)[..., None] * self._m)).sum(axis=-1))

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return shares times m e^{-t/m}, added up."""
        return np.asarray(np.exp(-np.asarray(t_s)[..., None] / self._m) @ (self._p * self._m))

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return draws: pick a mean, then an exponential of it."""
        which = np.minimum(np.searchsorted(np.cumsum(self._p), rng.random(size), side="right"), len(self._p) - 1)
        return rng.standard_exponential(size) * self._m[which]

    def scaled(self, mean_s: float) -> Hyperexponential:
        """Return the same shares, every mean scaled."""
        notation = self._notation if self._notation.startswith("h2") else None
        return Hyperexponential(self.shares, tuple((self._m * (mean_s / self.mean_s)).tolist()), notation=notation)

    def phases(self) -> PhaseType:
        """Return one phase per mean, side by side."""
        return PhaseType(self._p, np.diag(-1 / self._m), notation=self._notation)


class PhaseType(Law):
    """The time a Markov chain takes to end: it starts in phase i with alpha[i] and moves by the rates S [n, n]."""

    def __init__(self, alpha: Any, S: Any, *, notation: str | None = None) -> None:
        a, A = np.array(alpha, dtype=np.float64), np.array(S, dtype=np.float64)
        n = len(a)
        if A.shape != (n, n) or not n or (a < -1e-12).any() or abs(a.sum() - 1) > 1e-9 or not _ends(A):
            raise BadInput(f"a phase-type law needs alpha that adds up to 1 and rates S [n, n] with rows adding up to 0 or less: {a}, {A}")
        first = np.linalg.solve(-A, np.ones(n))
        second = np.linalg.solve(-A, first)
        m1, m2, m3 = float(a @ first), float(2 * a @ second), float(6 * a @ np.linalg.solve(-A, second))
        super().__init__(tuple(a.tolist()), tuple(A.ravel().tolist()), mean_s=m1, variance_s2=m2 - m1**2, third=m3 / m1**3)
        a.setflags(write=False)
        A.setflags(write=False)
        self.__dict__.update(alpha=a, S=A, _notation=notation or f"ph{n}")

    alpha: Floats
    S: Floats
    _notation: str

    def __str__(self) -> str:
        return self._notation

    @cached_property
    def time(self) -> MatrixExponential:
        """The same law as a `MatrixExponential`, to be added to a wait by `then`."""
        return MatrixExponential(self.alpha, self.S)

    @property
    def exits_per_s(self) -> Floats:
        """Rate of ending from each phase: -S 1."""
        return np.asarray(np.maximum(-self.S.sum(axis=1), 0.0), dtype=np.float64)

    def survival(self, t_s: Floats) -> Floats:
        """Return alpha e^{St} 1."""
        return self.time.survival(np.asarray(t_s, dtype=np.float64))

    def quantiles(self, u: Floats) -> Floats:
        """Return the inverse by Newton steps on log P(X > t), to about 1e-12."""

        def tail(t_s: Floats) -> tuple[Floats, Floats]:
            rows = self.time.rows(t_s)
            return rows.sum(axis=1), rows @ self.exits_per_s

        return _inverse(tail, u, self.mean_s)

    def lst(self, s: Complexes) -> Complexes:
        """Return alpha (sI - S)^{-1} (-S 1)."""
        flat = np.asarray(s, dtype=np.complex128).ravel()
        systems = flat[:, None, None] * np.eye(len(self.alpha)) - self.S
        exits = np.broadcast_to(self.exits_per_s.astype(np.complex128)[:, None], (len(flat), len(self.alpha), 1))
        return np.asarray(np.linalg.solve(systems, exits)[..., 0] @ self.alpha).reshape(np.shape(s))

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return alpha e^{St} (-S)^{-1} 1."""
        rest_s = np.linalg.solve(-self.S, np.ones(len(self.alpha)))
        t = np.asarray(t_s, dtype=np.float64)
        return np.asarray(self.time.rows(t.ravel()) @ rest_s).reshape(t.shape)

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return draws: follow the chain of every draw until it ends."""
        n = len(self.alpha)
        rates = -np.diag(self.S)
        moves = self.S + np.diag(rates)
        ways = np.cumsum(np.column_stack([moves, self.exits_per_s]) / rates[:, None], axis=1)
        total = int(np.prod(size))
        times_s = np.zeros(total)
        phase = np.minimum(np.searchsorted(np.cumsum(self.alpha), rng.random(total), side="right"), n - 1)
        alive = np.arange(total)
        while len(alive):
            times_s[alive] += rng.standard_exponential(len(alive)) / rates[phase]
            phase = (rng.random(len(alive))[:, None] >= ways[phase]).sum(axis=1)
            alive, phase = alive[phase < n], phase[phase < n]
        return times_s.reshape(size)

    def scaled(self, mean_s: float) -> PhaseType:
        """Return the same phases at another speed."""
        return PhaseType(self.alpha, self.S * (self.mean_s / mean_s), notation=self._notation)

    def phases(self) -> PhaseType:
        """Return itself."""
        return self


def balanced(scv: float, mean_s: float = 1.0) -> Hyperexponential:
    """Return the two-phase hyperexponential law of this SCV >= 1 whose two phases carry half of the mean each."""
    check_scv("balanced hyperexponential", scv, above=1.0, included=True)
    p = (1 + math.sqrt((scv - 1) / (scv + 1))) / 2
    return Hyperexponential((p, 1 - p), (mean_s / (2 * p), mean_s / (2 * (1 - p))), notation=f"h2:{short(scv)}")


def marie(scv: float, mean_s: float = 1.0) -> PhaseType:
    """Return Marie's Coxian law of this SCV >= 0.5: phases at rates 2/m and 1/(m SCV), the second entered with probability 1/(2 SCV)."""
    check_scv("Coxian", scv, above=0.5, included=True)
    first, second = 2 / mean_s, 1 / (mean_s * scv)
    return PhaseType([1.0, 0.0], [[-first, first / (2 * scv)], [0.0, -second]], notation=f"cox2:{short(scv)}")


def erlang_phases(k: int, mean_s: float, notation: str) -> PhaseType:
    """Return k phases in a row."""
    rate = k / mean_s
    return PhaseType(np.eye(k)[0], rate * (np.eye(k, k=1) - np.eye(k)), notation=notation)


def _ends(S: Floats) -> bool:
    """Return whether S is a matrix of rates that end from everywhere."""
    scale = float(np.abs(S).max())
    moves = S - np.diag(np.diag(S))
    if not np.isfinite(S).all() or (moves < -1e-12 * scale).any() or (S.sum(axis=1) > 1e-9 * scale).any() or (np.diag(S) >= 0).any():
        return False
    return bool(np.linalg.matrix_rank(S) == len(S))


def _inverse(tail: Callable[[Floats], tuple[Floats, Floats]], u: Floats, scale_s: float) -> Floats:
    """Return t with P(X > t) = 1 - u for each u, given P(X > t) and the density: a bracket, then Newton on log P, kept inside it."""
    probabilities = np.asarray(u, dtype=np.float64)
    share = np.maximum(1 - probabilities.ravel(), 1e-17)
    edges = scale_s * np.concatenate([[0.0], 2.0 ** np.arange(-40, 4)])
    while tail(edges[-1:])[0][0] > share.min():
        edges = np.append(edges, 2 * edges[-1])
    over = np.minimum.accumulate(tail(edges)[0])
    k = np.clip(np.searchsorted(-over, -share, side="right"), 1, len(edges) - 1)
    low, high = edges[k - 1].copy(), edges[k].copy()
    t, goal = (low + high) / 2, np.log(share)
    for _ in range(100):
        value, density = tail(t)
        miss = np.log(np.maximum(value, 1e-300)) - goal
        low, high = np.where(miss > 0, t, low), np.where(miss > 0, high, t)
        step = t + miss * value / np.maximum(density, 1e-300)
        new = np.where((step >= low) & (step <= high), step, (low + high) / 2)
        settled = np.abs(new - t) <= 2e-15 * high
        t = new
        if settled.all():
            break
    return np.where(probabilities.ravel() <= 0, 0.0, t).reshape(probabilities.shape)
