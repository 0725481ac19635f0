"""Laws with a density: gamma, Erlang, lognormal, bounded Pareto, uniform."""

from __future__ import annotations

import math

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws.base import Complexes, Floats, Law, Shape, check_scv, short
from mlsys_bench.queueing.laws.phases import PhaseType, erlang_phases


class Gamma(Law):
    """Gamma law by its SCV: shape 1/SCV."""

    def __init__(self, scv: float, mean_s: float = 1.0) -> None:
        check_scv("gamma", scv, above=0.0)
        super().__init__(scv, mean_s, mean_s=mean_s, variance_s2=scv * mean_s**2, third=(1 + scv) * (1 + 2 * scv))
        self.__dict__.update(_scv=scv, shape=1 / scv, scale_s=scv * mean_s)

    _scv: float
    shape: float
    scale_s: float

    def __str__(self) -> str:
        return f"gamma:{short(self._scv)}"

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
        return erlang_phases(k, self.mean_s, str(self)) if 1 <= k <= 200 and abs(self.shape - k) < 1e-9 * k else None


class Erlang(Gamma):
    """Sum of k equal exponential phases: SCV 1/k."""

    def __init__(self, k: int, mean_s: float = 1.0) -> None:
        if not 1 <= k < math.inf or k != int(k):
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
        return erlang_phases(self.k, self.mean_s, str(self))


class Lognormal(Law):
    """A time whose logarithm is normal, by its SCV."""

    def __init__(self, scv: float, mean_s: float = 1.0) -> None:
        check_scv("lognormal", scv, above=0.0)
        super().__init__(scv, mean_s, mean_s=mean_s, variance_s2=scv * mean_s**2, third=(1 + scv) ** 3)
        sigma = math.sqrt(math.log1p(scv))
        self.__dict__.update(_scv=scv, sigma=sigma, mu=math.log(mean_s) - sigma**2 / 2)

    _scv: float
    sigma: float
    mu: float

    def __str__(self) -> str:
        return f"logn:{short(self._scv)}"

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
        return f"bp:{short(self.alpha)}:{short(self.low_s)}:{short(self.high_s)}"

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
        return "unif" if self.low_s == 0 else f"unif:{short(self.low_s)}:{short(self.high_s)}"

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
