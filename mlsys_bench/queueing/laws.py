"""Laws of a service time or of the time between arrivals, each with moments, tail, quantiles, transform, draws and a short name.

Names are those of the truth table: `exp`, `det`, `erl:k`, `gamma:v`, `logn:v`, `h2:v` (balanced means), `cox2:v` (Marie) with SCV v,
`unif` (0 to twice the mean), `mix:p:a:b` (two points), `bp:alpha:low:high` (bounded Pareto).
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.times import MatrixExponential, Time, check_share

Floats = npt.NDArray[np.float64]
Complexes = npt.NDArray[np.complex128]
Shape = int | tuple[int, ...]


class Law(Time):
    """A law of a positive time: immutable, equal to another of the same kind and parameters."""

    third: float  # E[X^3] / mean^3
    atoms: tuple[tuple[float, float], ...] = ()  # (time, probability) where all the mass sits on a few points

    def __init__(self, *key: object, mean_s: float, variance_s2: float, third: float) -> None:
        if not (mean_s > 0 and math.isfinite(mean_s)):
            raise BadInput(f"a {type(self).__name__} law needs a positive, finite mean, not {mean_s}")
        self.__dict__.update(_key=(type(self).__name__, *key), mean_s=mean_s, variance_s2=variance_s2, third=third)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a law never changes: {name} cannot be set")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Law) and self.__dict__["_key"] == other.__dict__["_key"]

    def __hash__(self) -> int:
        return hash(self.__dict__["_key"])

    def __repr__(self) -> str:
        return f"<{self}, mean {self.mean_s:.6g} s>"

    @abstractmethod
    def quantiles(self, u: Floats) -> Floats:
        """Return the u-quantiles of an array of probabilities (the inverse of P(X <= t))."""

    @abstractmethod
    def lst(self, s: Complexes) -> Complexes:
        """Return E[e^{-sX}] for an array of complex s, Re(s) >= 0."""

    @abstractmethod
    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return E[(X - t)+] for an array of t >= 0; over the mean it is P(excess life > t)."""

    @abstractmethod
    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return independent draws."""

    @abstractmethod
    def scaled(self, mean_s: float) -> Law:
        """Return the same shape with another mean."""

    def phases(self) -> PhaseType | None:
        """Return the exact phase-type form, None where there is none."""
        return None

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile."""
        return float(self.quantiles(np.array([check_share(p)], dtype=np.float64))[0])


class Deterministic(Law):
    """Always the same time."""

    def __init__(self, mean_s: float = 1.0) -> None:
        super().__init__(mean_s, mean_s=mean_s, variance_s2=0.0, third=1.0)
        self.__dict__["atoms"] = ((mean_s, 1.0),)

    def __str__(self) -> str:
        return "det"

    def survival(self, t_s: Floats) -> Floats:
        """Return 1 before the time, 0 from it on."""
        return np.where(np.asarray(t_s) < self.mean_s, 1.0, 0.0)

    def quantiles(self, u: Floats) -> Floats:
        """Return the time itself."""
        return np.full(np.shape(u), self.mean_s)

    def lst(self, s: Complexes) -> Complexes:
        """Return e^{-s m}."""
        return np.exp(-np.asarray(s, dtype=np.complex128) * self.mean_s)

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return (m - t)+."""
        return np.maximum(self.mean_s - np.asarray(t_s), 0.0)

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return the time, over and over."""
        return np.full(size, self.mean_s)

    def scaled(self, mean_s: float) -> Deterministic:
        """Return another constant."""
        return Deterministic(mean_s)


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


class Gamma(Law):
    """Gamma law by its SCV: shape 1/SCV."""

    def __init__(self, scv: float, mean_s: float = 1.0) -> None:
        _check_scv("gamma", scv, above=0.0)
        super().__init__(scv, mean_s, mean_s=mean_s, variance_s2=scv * mean_s**2, third=(1 + scv) * (1 + 2 * scv))
        self.__dict__.update(_scv=scv, shape=1 / scv, scale_s=scv * mean_s)

    _scv: float
    shape: float
    scale_s: float

    def __str__(self) -> str:
        return f"gamma:{_short(self._scv)}"

    def survival(self, t_s: Floats) -> Floats:
        """Return the regularised upper incomplete gamma function Q(k, t/scale)."""
        from scipy.special import gammaincc

        return np.asarray(gammaincc(self.shape, np.asarray(t_s) / self.scale_s))

    def quantiles(self, u: Floats) -> Floats:
        """Return the inverse of the regularised incomplete gamma function."""
        from scipy.special import gammainccinv, gammaincinv

        u = np.asarray(u, dtype=np.float64)
        return np.asarray(np.where(u < 0.5, gammaincinv(self.shape, u), gammainccinv(self.shape, 1 - u)) * self.scale_s)

    def lst(self, s: Complexes) -> Complexes:
        """Return (1 + s scale)^{-k}."""
        return np.asarray(np.exp(-self.shape * np.log(1 + np.asarray(s, dtype=np.complex128) * self.scale_s)))

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return m Q(k + 1, t/scale) - t Q(k, t/scale)."""
        from scipy.special import gammaincc

        x = np.asarray(t_s) / self.scale_s
        return np.maximum(self.mean_s * gammaincc(self.shape + 1, x) - self.scale_s * x * gammaincc(self.shape, x), 0.0)

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return gamma draws."""
        return rng.standard_gamma(self.shape, size) * self.scale_s

    def scaled(self, mean_s: float) -> Gamma:
        """Return the same SCV with another mean."""
        return Gamma(self._scv, mean_s)

    def phases(self) -> PhaseType | None:
        """Return the Erlang phases where 1/SCV is a whole number (up to 200), None otherwise."""
        k = round(self.shape)
        return _erlang_phases(k, self.mean_s, str(self)) if 1 <= k <= 200 and abs(self.shape - k) < 1e-9 * k else None


class Erlang(Gamma):
    """Sum of k equal exponential phases: SCV 1/k."""

    def __init__(self, k: int, mean_s: float = 1.0) -> None:
        if k < 1 or k != int(k):
            raise BadInput(f"an Erlang law needs a whole number of phases, not {k}")
        super().__init__(1 / k, mean_s)
        self.__dict__["k"] = int(k)

    k: int

    def __str__(self) -> str:
        return f"erl:{self.k}"

    def scaled(self, mean_s: float) -> Erlang:
        """Return as many phases with another mean."""
        return Erlang(self.k, mean_s)

    def phases(self) -> PhaseType:
        """Return the k phases in a row."""
        return _erlang_phases(self.k, self.mean_s, str(self))


class Lognormal(Law):
    """A time whose logarithm is normal, by its SCV."""

    def __init__(self, scv: float, mean_s: float = 1.0) -> None:
        _check_scv("lognormal", scv, above=0.0)
        super().__init__(scv, mean_s, mean_s=mean_s, variance_s2=scv * mean_s**2, third=(1 + scv) ** 3)
        sigma = math.sqrt(math.log1p(scv))
        self.__dict__.update(_scv=scv, sigma=sigma, mu=math.log(mean_s) - sigma**2 / 2)

    _scv: float
    sigma: float
    mu: float

    def __str__(self) -> str:
        return f"logn:{_short(self._scv)}"

    def _standard(self, t_s: Floats) -> Floats:
        """Return (log t - mu) / sigma."""
        with np.errstate(divide="ignore"):
            return np.asarray((np.log(np.asarray(t_s, dtype=np.float64)) - self.mu) / self.sigma)

    def survival(self, t_s: Floats) -> Floats:
        """Return Phi(-(log t - mu) / sigma)."""
        from scipy.special import ndtr

        return np.asarray(ndtr(-self._standard(t_s)))

    def quantiles(self, u: Floats) -> Floats:
        """Return exp(mu + sigma Phi^{-1}(u))."""
        from scipy.special import ndtri

        return np.exp(self.mu + self.sigma * np.asarray(ndtri(np.asarray(u, dtype=np.float64))))

    def lst(self, s: Complexes) -> Complexes:
        """Return the transform by quadrature through the saddle point (`transforms.lognormal_lst`)."""
        from mlsys_bench.queueing.transforms import lognormal_lst

        return lognormal_lst(np.asarray(s, dtype=np.complex128), self.mu, self.sigma)

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return m Phi(sigma - z) - t Phi(-z) with z = (log t - mu) / sigma."""
        from scipy.special import ndtr

        z = self._standard(t_s)
        return np.maximum(self.mean_s * ndtr(self.sigma - z) - np.asarray(t_s) * ndtr(-z), 0.0)

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return lognormal draws."""
        return np.exp(rng.standard_normal(size) * self.sigma + self.mu)

    def scaled(self, mean_s: float) -> Lognormal:
        """Return the same SCV with another mean."""
        return Lognormal(self._scv, mean_s)


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
        name = notation or "hyper:" + ":".join(f"{_short(a)}:{_short(b)}" for a, b in zip(p, m, strict=True))
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


class TwoPoint(Law):
    """`a_s` with probability p, `b_s` otherwise: cache hit or miss, short or long prompt."""

    def __init__(self, p: float, a_s: float, b_s: float) -> None:
        if not 0 < p < 1 or min(a_s, b_s) < 0:
            raise BadInput(f"a two-point law needs a probability between 0 and 1 and times that are not negative: {p}, {a_s}, {b_s}")
        mean_s = p * a_s + (1 - p) * b_s
        third = (p * a_s**3 + (1 - p) * b_s**3) / mean_s**3 if mean_s else 0.0
        super().__init__(p, a_s, b_s, mean_s=mean_s, variance_s2=p * (1 - p) * (a_s - b_s) ** 2, third=third)
        self.__dict__.update(p=p, a_s=a_s, b_s=b_s, atoms=tuple(sorted([(a_s, p), (b_s, 1 - p)])))

    p: float
    a_s: float
    b_s: float

    def __str__(self) -> str:
        unit_s = min(x for x in (self.a_s, self.b_s) if x > 0)
        return f"mix:{_short(self.p)}:{_short(self.a_s / unit_s)}:{_short(self.b_s / unit_s)}"

    def survival(self, t_s: Floats) -> Floats:
        """Return the probability of the points above t."""
        t = np.asarray(t_s)
        return np.where(t < self.a_s, self.p, 0.0) + np.where(t < self.b_s, 1 - self.p, 0.0)

    def quantiles(self, u: Floats) -> Floats:
        """Return the lower point up to its probability, then the upper."""
        (low, share), (high, _) = self.atoms
        return np.where(np.asarray(u) <= share, low, high)

    def lst(self, s: Complexes) -> Complexes:
        """Return p e^{-s a} + (1 - p) e^{-s b}."""
        z = np.asarray(s, dtype=np.complex128)
        return np.asarray(self.p * np.exp(-z * self.a_s) + (1 - self.p) * np.exp(-z * self.b_s))

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return p (a - t)+ + (1 - p) (b - t)+."""
        t = np.asarray(t_s)
        return self.p * np.maximum(self.a_s - t, 0.0) + (1 - self.p) * np.maximum(self.b_s - t, 0.0)

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return draws of either point."""
        return np.where(rng.random(size) < self.p, self.a_s, self.b_s)

    def scaled(self, mean_s: float) -> TwoPoint:
        """Return both points scaled."""
        return TwoPoint(self.p, self.a_s * mean_s / self.mean_s, self.b_s * mean_s / self.mean_s)


class BoundedPareto(Law):
    """Density proportional to x^{-alpha-1} between `low_s` and `high_s`: file sizes, prompt lengths."""

    def __init__(self, alpha: float, low_s: float, high_s: float) -> None:
        if not (alpha > 0 and 0 < low_s < high_s and math.isfinite(high_s)):
            raise BadInput(f"a bounded Pareto law needs alpha > 0 and 0 < low < high: {alpha}, {low_s}, {high_s}")
        ratio = low_s / high_s
        self.__dict__.update(alpha=alpha, low_s=low_s, high_s=high_s, _cut=-math.expm1(alpha * math.log(ratio)))
        m1, m2, m3 = (self._moment(j) for j in (1, 2, 3))
        super().__init__(alpha, low_s, high_s, mean_s=m1, variance_s2=m2 - m1**2, third=m3 / m1**3)

    alpha: float
    low_s: float
    high_s: float
    _cut: float

    def _moment(self, j: int) -> float:
        """Return E[X^j] = alpha L^alpha / (1 - (L/H)^alpha) times the integral of x^{j - 1 - alpha}."""
        k, spread = j - self.alpha, math.log(self.high_s / self.low_s)
        integral = spread if abs(k) * spread < 1e-9 else math.expm1(k * spread) / k
        return self.alpha * self.low_s**j / self._cut * integral

    def __str__(self) -> str:
        return f"bp:{_short(self.alpha)}:{_short(self.low_s)}:{_short(self.high_s)}"

    def survival(self, t_s: Floats) -> Floats:
        """Return ((L/t)^alpha - (L/H)^alpha) / (1 - (L/H)^alpha) between the ends."""
        t = np.clip(np.asarray(t_s, dtype=np.float64), self.low_s, self.high_s)
        return np.asarray((self.low_s / t) ** self.alpha * -np.expm1(self.alpha * np.log(t / self.high_s)) / self._cut)

    def quantiles(self, u: Floats) -> Floats:
        """Return L (1 - u (1 - (L/H)^alpha))^{-1/alpha}."""
        return np.asarray(self.low_s * np.exp(-np.log1p(-np.asarray(u, dtype=np.float64) * self._cut) / self.alpha))

    def lst(self, s: Complexes) -> Complexes:
        """Return the transform as a difference of two power tails (`transforms.power_tail`), by moments where s is tiny."""
        from mlsys_bench.queueing.transforms import power_tail

        z = np.asarray(s, dtype=np.complex128)
        tiny = np.abs(z) * self.high_s < 1e-6
        safe = np.where(tiny, 1 / self.high_s, z)
        tails = power_tail(safe, self.alpha, self.low_s) - power_tail(safe, self.alpha, self.high_s)
        near_0 = 1 - z * self.mean_s + z**2 * (self.variance_s2 + self.mean_s**2) / 2
        return np.asarray(np.where(tiny, near_0, tails * self.alpha * self.low_s**self.alpha / self._cut))

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return the integral of P(X > x) from t to H, in closed form (log where alpha is 1); all of the mean less t below L."""
        t = np.asarray(t_s, dtype=np.float64)
        inside = np.clip(t, self.low_s, self.high_s)
        k, spread = 1 - self.alpha, np.log(self.high_s / inside)
        growth = spread if abs(k) < 1e-12 else np.expm1(k * spread) / k
        left = inside * ((self.low_s / inside) ** self.alpha * growth - (self.low_s / self.high_s) ** self.alpha * np.expm1(spread))
        return np.asarray(np.maximum(left / self._cut, 0.0) + np.maximum(self.low_s - t, 0.0))

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return draws by inversion."""
        return self.quantiles(rng.random(size))

    def scaled(self, mean_s: float) -> BoundedPareto:
        """Return both ends scaled."""
        return BoundedPareto(self.alpha, self.low_s * mean_s / self.mean_s, self.high_s * mean_s / self.mean_s)


class Uniform(Law):
    """Anything between two ends, all alike."""

    def __init__(self, low_s: float, high_s: float) -> None:
        if not 0 <= low_s < high_s:
            raise BadInput(f"a uniform law needs 0 <= low < high: {low_s}, {high_s}")
        mean_s, width_s = (low_s + high_s) / 2, high_s - low_s
        third = (low_s + high_s) * (low_s**2 + high_s**2) / 4 / mean_s**3
        super().__init__(low_s, high_s, mean_s=mean_s, variance_s2=width_s**2 / 12, third=third)
        self.__dict__.update(low_s=low_s, high_s=high_s)

    low_s: float
    high_s: float

    def __str__(self) -> str:
        return "unif" if self.low_s == 0 else f"unif:{_short(self.low_s)}:{_short(self.high_s)}"

    def survival(self, t_s: Floats) -> Floats:
        """Return (H - t) / (H - L) between the ends."""
        return np.clip((self.high_s - np.asarray(t_s)) / (self.high_s - self.low_s), 0.0, 1.0)

    def quantiles(self, u: Floats) -> Floats:
        """Return L + u (H - L)."""
        return self.low_s + np.asarray(u, dtype=np.float64) * (self.high_s - self.low_s)

    def lst(self, s: Complexes) -> Complexes:
        """Return (e^{-sL} - e^{-sH}) / (s (H - L))."""
        z = np.asarray(s, dtype=np.complex128)
        x = z * (self.high_s - self.low_s)
        safe = np.where(x == 0, 1.0, x)
        return np.asarray(np.exp(-z * self.low_s) * np.where(x == 0, 1.0, -np.expm1(-safe) / safe))

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return (H - t)^2 / (2 (H - L)) between the ends, mean - t below L."""
        t = np.asarray(t_s)
        inside = np.clip(t, self.low_s, self.high_s)
        return (self.high_s - inside) ** 2 / (2 * (self.high_s - self.low_s)) + np.maximum(self.low_s - t, 0.0)

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return uniform draws."""
        return rng.uniform(self.low_s, self.high_s, size)

    def scaled(self, mean_s: float) -> Uniform:
        """Return both ends scaled."""
        return Uniform(self.low_s * mean_s / self.mean_s, self.high_s * mean_s / self.mean_s)


class Empirical(Law):
    """The law of measured times: each as likely as any other."""

    def __init__(self, samples_s: Sequence[float] | Floats) -> None:
        x = np.sort(np.array(samples_s, dtype=np.float64).ravel())
        if not len(x) or not np.isfinite(x).all() or x[0] < 0:
            raise BadInput("an empirical law needs at least one measured time, none of them negative or infinite")
        mean_s = float(x.mean())
        super().__init__(x.tobytes(), mean_s=mean_s, variance_s2=float(x.var()), third=float(((x / mean_s) ** 3).mean()) if mean_s else 0.0)
        x.setflags(write=False)
        self.__dict__["samples_s"] = x

    samples_s: Floats

    def __str__(self) -> str:
        return f"samples:{len(self.samples_s)}"

    @cached_property
    def _above(self) -> Floats:
        """Sum of the k-th smallest and all larger, over n; one 0 more."""
        return np.append(np.cumsum(self.samples_s[::-1])[::-1], 0.0) / len(self.samples_s)

    def survival(self, t_s: Floats) -> Floats:
        """Return the share of samples above t."""
        return np.asarray(1 - np.searchsorted(self.samples_s, t_s, side="right") / len(self.samples_s))

    def quantiles(self, u: Floats) -> Floats:
        """Return the ceil(u n)-th smallest sample."""
        n = len(self.samples_s)
        return self.samples_s[np.clip(np.ceil(np.asarray(u, dtype=np.float64) * n - 1e-9).astype(np.int64) - 1, 0, n - 1)]

    def lst(self, s: Complexes) -> Complexes:
        """Return the mean of e^{-s x} over the samples."""
        flat = np.asarray(s, dtype=np.complex128).ravel()
        values, counts = np.unique(self.samples_s, return_counts=True)
        sums = np.zeros(len(flat), dtype=np.complex128)
        chunk = max(1, 2_000_000 // max(len(flat), 1))
        for k in range(0, len(values), chunk):
            sums += np.exp(-np.outer(flat, values[k : k + chunk])) @ counts[k : k + chunk]
        return np.asarray(sums / len(self.samples_s)).reshape(np.shape(s))

    def stop_loss_s(self, t_s: Floats) -> Floats:
        """Return the mean of (x - t)+ over the samples."""
        k = np.searchsorted(self.samples_s, t_s, side="right")
        return np.maximum(self._above[k] - np.asarray(t_s) * (1 - k / len(self.samples_s)), 0.0)

    def sample(self, rng: np.random.Generator, size: Shape) -> Floats:
        """Return samples drawn again, with replacement."""
        return self.samples_s[rng.integers(0, len(self.samples_s), size)]

    def scaled(self, mean_s: float) -> Empirical:
        """Return all samples scaled."""
        return Empirical(self.samples_s * (mean_s / self.mean_s))


def balanced(scv: float, mean_s: float = 1.0) -> Hyperexponential:
    """Return the two-phase hyperexponential law of this SCV >= 1 whose two phases carry half of the mean each."""
    _check_scv("balanced hyperexponential", scv, above=1.0, included=True)
    p = (1 + math.sqrt((scv - 1) / (scv + 1))) / 2
    return Hyperexponential((p, 1 - p), (mean_s / (2 * p), mean_s / (2 * (1 - p))), notation=f"h2:{_short(scv)}")


def marie(scv: float, mean_s: float = 1.0) -> PhaseType:
    """Return Marie's Coxian law of this SCV >= 0.5: phases at rates 2/m and 1/(m SCV), the second entered with probability 1/(2 SCV)."""
    _check_scv("Coxian", scv, above=0.5, included=True)
    first, second = 2 / mean_s, 1 / (mean_s * scv)
    return PhaseType([1.0, 0.0], [[-first, first / (2 * scv)], [0.0, -second]], notation=f"cox2:{_short(scv)}")


def parse_law(text: str, mean_s: float = 1.0) -> Law:
    """Return the law a name stands for, with this mean; `bp:alpha:low:high` has the mean its ends give.

    `exp`, `det`, `unif`, `erl:k` (or `erlk`), `gamma:v`, `logn:v`, `h2:v`, `cox2:v`, `mix:p:a:b`, `hyper:p1:m1:p2:m2…`.
    """
    kind, *parts = text.strip().lower().split(":")
    if kind.startswith("erl") and kind[3:].isdigit():
        kind, parts = "erl", [kind[3:], *parts]
    try:
        numbers = [float(part) for part in parts]
    except ValueError as error:
        raise BadInput(f"law {text!r}: {error}; write for example gamma:2.5") from error
    if kind not in _KINDS:
        raise BadInput(f"law {text!r}: unknown kind; known: {', '.join(sorted(_KINDS))}")
    count, build = _KINDS[kind]
    if len(numbers) != count and not (kind == "hyper" and len(numbers) >= 2 and len(numbers) % 2 == 0):
        raise BadInput(f"law {text!r}: {kind} takes {count} number(s) after colons, not {len(numbers)}")
    return build(mean_s, *numbers)


_KINDS: dict[str, tuple[int, Callable[..., Law]]] = {
    "exp": (0, lambda m: Exponential(m)),
    "det": (0, lambda m: Deterministic(m)),
    "unif": (0, lambda m: Uniform(0.0, 2 * m)),
    "erl": (1, lambda m, k: Erlang(k, m)),
    "gamma": (1, lambda m, v: Gamma(v, m)),
    "logn": (1, lambda m, v: Lognormal(v, m)),
    "h2": (1, lambda m, v: balanced(v, m)),
    "cox2": (1, lambda m, v: marie(v, m)),
    "mix": (3, lambda m, p, a, b: TwoPoint(p, a, b).scaled(m)),
    "bp": (3, lambda m, alpha, low, high: BoundedPareto(alpha, low, high)),
    "hyper": (4, lambda m, *numbers: Hyperexponential(numbers[::2], numbers[1::2]).scaled(m)),
}


def _erlang_phases(k: int, mean_s: float, notation: str) -> PhaseType:
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


def _check_scv(kind: str, scv: float, *, above: float, included: bool = False) -> None:
    """Raise BadInput unless this kind of law can have this SCV."""
    if not (scv > above or (included and scv == above)) or not math.isfinite(scv):
        limit = f"of at least {above:g}" if included else f"above {above:g}"
        raise BadInput(f"a {kind} law needs an SCV {limit}, not {scv}; a time that never varies is `det`")


def _short(x: float) -> str:
    """Return a number with no more digits than it needs."""
    return f"{x:.12g}"
