"""Laws of single values: one, two, or all that were measured."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws.base import Complexes, Floats, Law, Shape, short

FEW = 50  # different measured times up to which a sample is a law on points


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
        return f"mix:{short(self.p)}:{short(self.a_s / unit_s)}:{short(self.b_s / unit_s)}"

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


class Empirical(Law):
    """The law of measured times: each as likely as any other."""

    def __init__(self, samples_s: Sequence[float] | Floats) -> None:
        try:
            x = np.sort(np.array(samples_s, dtype=np.float64).ravel())
        except (TypeError, ValueError) as error:
            raise BadInput(f"an empirical law needs measured times, all of them numbers: {error}") from None
        if not len(x) or not np.isfinite(x).all() or x[0] < 0:
            raise BadInput("an empirical law needs at least one measured time, none of them negative or infinite")
        mean_s = float(x.mean())
        super().__init__(x.tobytes(), mean_s=mean_s, variance_s2=float(x.var()), third=float(((x / mean_s) ** 3).mean()) if mean_s else 0.0)
        x.setflags(write=False)
        values_s, counts = np.unique(x, return_counts=True)
        few = zip(values_s.tolist(), (counts / len(x)).tolist(), strict=True) if len(values_s) <= FEW else ()
        self.__dict__.update(samples_s=x, atoms=tuple(few))

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
