"""Work split in N parts that is done when the last part is: the slowest of N without queues, and fork-join queues.

Notation: rho is the utilisation of each branch, T = s / (1 - rho) the mean sojourn of one task, H_n = 1 + 1/2 + … + 1/n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws import Exponential
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.times import Floats, Time, check_share

CUTS = (1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1 - 1e-5, 1 - 1e-7, 1 - 1e-9, 1 - 1e-11)
EXACT_TO = 0.93  # above, the chain of two branches has too many states to be solved in half a second


class Slowest(Time):
    """The longest of n independent times of one law: P(max <= t) = P(X <= t)^n."""

    def __init__(self, law: Time, n: int) -> None:
        if n < 1:
            raise BadInput(f"the longest of {n} times: at least one is needed")
        self.law, self.n = law, n

    def survival(self, t_s: Floats) -> Floats:
        """Return P(max > t) = 1 - (1 - P(X > t))^n, without cancellation in the tail."""
        with np.errstate(divide="ignore"):
            return np.asarray(-np.expm1(self.n * np.log1p(-self.law.survival(t_s))))

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile: the p^(1/n)-quantile of one."""
        return self.law.quantile_s(check_share(p) ** (1 / self.n))

    @cached_property
    def _moments(self) -> tuple[float, float]:
        if isinstance(self.law, Exponential):
            k = np.arange(1, self.n + 1)
            mean = self.law.mean_s * float((1 / k).sum())
            return mean, self.law.mean_s**2 * float((1 / k**2).sum())
        atoms = getattr(self.law, "atoms", ())
        return _of_atoms(atoms, self.n) if atoms else mean_and_variance(self)

    @property
    def mean_s(self) -> float:  # type: ignore[override]  # computed when asked for
        """Mean: H_n times the mean for exponential times, a sum over points for laws of points, else the integral of P(max > t)."""
        return self._moments[0]

    @property
    def variance_s2(self) -> float:  # type: ignore[override]
        """Variance."""
        return self._moments[1]


def max_of(law: Time, n: int) -> Time:
    """Return the time until all of n independent times of one law are over: a split without queues.

    Exact for any law, percentiles included; means by quadrature where there is no closed form (1e-6).
    Checked against truth.csv: worst relative error below 1e-12 over 10 rows; other laws against 200,000 draws.
    """
    return Slowest(law, n)


def _of_atoms(atoms: tuple[tuple[float, float], ...], n: int) -> tuple[float, float]:
    at, shares = np.array(sorted(atoms)).T
    masses = np.diff(np.concatenate([[0.0], np.cumsum(shares) ** n]))
    mean = float(masses @ at)
    return mean, float(masses @ (at - mean) ** 2)


def mean_and_variance(time: Time, cuts_s: Sequence[float] | None = None) -> tuple[float, float]:
    """Return mean and variance as integrals of P(T > t) and 2 t P(T > t), by Gauss and Legendre between cuts, else percentiles."""
    cuts = np.array(cuts_s or [0.0, *(time.quantile_s(p) for p in CUTS)])
    nodes, weights = np.polynomial.legendre.leggauss(40)
    half = np.diff(cuts) / 2
    t = (cuts[:-1, None] + half[:, None] * (1 + nodes)).ravel()
    over = time.survival(t) * (half[:, None] * weights).ravel()
    mean = float(over.sum())
    return mean, float(2 * (t * over).sum()) - mean**2


def flatto_hahn(rate_per_s: float, service_s: float) -> float:
    """Return the mean sojourn of a job in two branches, Poisson arrivals, exponential service: T (12 - rho) / 8.  Exact.

    Source: LINE solver, fj_respt_2way, which gives it after Flatto and Hahn (1984),
    https://line-solver.sourceforge.net/javadoc/jline/api/fj/FJ_resptKt.html.  Checked against truth.csv: worst relative
    error 4e-16 over 4 rows.
    """
    queue = mmc(rate_per_s, service_s, 1)
    return (12 - queue.utilisation) / 8 * queue.sojourn_s


def nelson_tantawi(rate_per_s: float, service_s: float, branches: int) -> float:
    """Return the mean sojourn of a job in N >= 2 branches: [H_N / H_2 + (1 - H_N / H_2) 4 rho / 11] times that of two.

    An approximation fitted to simulations for N to 32; up to 5 % low here (rho 0.9, N 3 to 64).  `fork_join` is closer.
    Source: LINE solver, fj_respt_nt, after R. Nelson and A. N. Tantawi, Approximate analysis of fork/join synchronization in parallel
    queues, IEEE Trans. Computers 37 (1988) 739-743, https://line-solver.sourceforge.net/doxygen/fj__respt__nt_8m_source.html.
    """
    if branches < 2:
        raise BadInput(f"{branches} branches: this formula scales the mean of two")
    rho = rate_per_s * service_s
    ratio = harmonic(branches) / 1.5
    return (ratio + (1 - ratio) * 4 * rho / 11) * flatto_hahn(rate_per_s, service_s)


def harmonic(n: int) -> float:
    """Return 1 + 1/2 + … + 1/n."""
    return float((1 / np.arange(1, n + 1)).sum())


def fork_join(rate_per_s: float, service_s: float, branches: int) -> tuple[Queue, float, str]:
    """Return jobs that send one task to each of N single-server queues and are done when all are; with expected error and reason.

    Poisson arrivals, exponential service.  The sojourn is the job's; the wait is that of one task.
    Two branches: exact, from the chain of both queue lengths (utilisation to 0.93, read on from 0.85, 0.90 and 0.93
    beyond: 3e-6 off at 0.96 and 0.97).
    More: given the times of arrival the branches are independent and alike, so P(all done by t) = E[G^N] for a random G = P(one done
    by t | arrivals).  One branch gives E[G], two give E[G^2]; a normal common factor (G = Phi of a normal) with these two gives the rest.
    No parameter is fitted; the normal factor was picked among six one-factor laws (the others are 0.8 to 2.6 % off on a median) on
    12 of the rows below, so the simulations, on other N and rho, are the independent check.
    Checked against truth.csv: worst error 0.4 % over 19 simulated rows (N = 2, 4, 8; their own precision is 0.1 to 0.8 %).  Against
    simulation for N to 64, rho 0.2 to 0.9: percentiles from p90 up within 0.7 % or the interval, medians to 2.7 % low and means to
    3.1 % low at N = 64, half of that at N = 16.
    Raises Overload at or above saturation.
    """
    if branches < 1:
        raise BadInput(f"{branches} branches: at least one is needed")
    one = mmc(rate_per_s, service_s, 1)
    if branches == 1:
        return one, 1e-6, "one branch is M/M/1"
    sojourn = Joined(one.utilisation, one.sojourn_s, branches)
    why = (
        "two branches: the chain of both queues"
        if branches == 2
        else "branches are independent given the arrivals; a normal common factor from one and two"
    )
    queue = Queue(utilisation=one.utilisation, p_wait=one.p_wait, wait=one.wait, sojourn=sojourn, throughput_per_s=rate_per_s)
    return queue, _expected_error(branches, one.utilisation), why


def _expected_error(branches: int, rho: float) -> float:
    """Return a line through the worst relative errors of mean and median met against simulation, N to 64: a rule of thumb beyond."""
    return (1e-6 if rho <= EXACT_TO else 1e-5) if branches == 2 else 0.006 * math.log2(branches / 2) + 0.001


class Joined(Time):
    """The sojourn of a job in N branches: P(T > t) = E[1 - (1 - H)^N], H = Phi((sqrt(r) Z - a) / sqrt(1 - r)) with Z standard normal.

    H is the probability that one task is later than t, given the arrivals; a is the normal quantile that makes E[H] = exp(-t / task), and
    r makes E[H^2] that of two branches.
    """

    def __init__(self, rho: float, task_s: float, branches: int) -> None:
        self.rho, self.task_s, self.branches = rho, task_s, branches

    @cached_property
    def _correlation(self) -> Callable[[Floats], Floats]:
        """Return c as a function of t / T."""
        if self.rho <= EXACT_TO:
            return _pair(self.rho).correlation
        known = [_pair(r) for r in (0.85, 0.90, EXACT_TO)]
        at = np.array([pair.rho for pair in known])
        weights = [np.prod([(self.rho - b) / (a - b) for b in at if b != a]) for a in at]
        return lambda x: np.asarray(sum(w * pair.correlation(x) for w, pair in zip(weights, known, strict=True)))

    def survival(self, t_s: Floats) -> Floats:
        """Return P(T > t)."""
        from scipy.special import ndtr, ndtri

        x = np.clip(t_s / self.task_s, 1e-9, 600.0)
        e, c = np.exp(-x), np.clip(self._correlation(x), 0.0, 0.95)
        if self.branches == 2:
            return np.asarray(e * (2 - e - c * -np.expm1(-x)))
        a = -ndtri(e)
        r = common_factor(a, -c * e * np.expm1(-x))
        z, weights = np.polynomial.hermite_e.hermegauss(80)
        later = ndtr((np.sqrt(r) * z[:, None] - a) / np.sqrt(1 - r))
        with np.errstate(divide="ignore"):
            return np.asarray(weights @ -np.expm1(self.branches * np.log1p(-later)) / weights.sum())

    @cached_property
    def _moments(self) -> tuple[float, float]:
        mean, variance = mean_and_variance(self, [self.task_s * x for x in (0, 0.5, 1, 2, 4, 6, 9, 14, 24, 44)])
        if self.branches == 2:
            exact = (12 - self.rho) / 8 * self.task_s
            return exact, variance + mean**2 - exact**2
        return mean, variance

    @property
    def mean_s(self) -> float:  # type: ignore[override]  # computed when asked for
        """Mean: of two branches in closed form, of more by quadrature."""
        return self._moments[0]

    @property
    def variance_s2(self) -> float:  # type: ignore[override]
        """Variance, by quadrature."""
        return self._moments[1]

    def quantile_s(self, p: float) -> float:
        """Return the p-quantile, between that of one task and that of N independent ones."""
        from scipy.optimize import brentq

        share = 1 - check_share(p)
        low, high = -math.log1p(-p), -math.log(-math.expm1(math.log(p) / self.branches))
        return self.task_s * float(
            brentq(lambda x: self.p_over(x * self.task_s) - share, 0.999 * low, 1.001 * high, xtol=1e-12, rtol=1e-12)
        )


def common_factor(a: Floats, covariance: Floats) -> Floats:
    """Return the correlation r of two standard normals for which the events {X > a} and {Y > a} have this covariance >= 0.

    The covariance is the integral of exp(-a^2 / (1 + sin u)) / 2 pi over u from 0 to arcsin r: convex and rising, so Newton's steps from
    the right never overshoot.
    """
    nodes, weights = np.polynomial.legendre.leggauss(24)
    theta = np.full_like(a, 0.45 * math.pi)
    for _ in range(60):
        u = theta * (1 + nodes[:, None]) / 2
        value = theta / 2 * (weights @ np.exp(-(a**2) / (1 + np.sin(u)))) / (2 * math.pi)
        step = (value - covariance) * 2 * math.pi * np.exp(a**2 / (1 + np.sin(theta)))
        theta = np.clip(theta - step, 0.0, None)
        if np.all(np.abs(step) <= 1e-11):
            break
    return np.asarray(np.sin(theta))


class Pair:
    """Two branches: the stationary law of both queue lengths, from the chain on n1 >= n2 (they are alike), service times 1."""

    def __init__(self, rho: float) -> None:
        self.rho = rho
        self.law = _law_of_two(rho, max(20, math.ceil(math.log(1e-8) / math.log(rho))) if rho > 0 else 20)

    def correlation(self, x: Floats) -> Floats:
        """Return the correlation of the events that a job's two tasks are over by x T.

        A task that finds n others takes n + 1 services, apart from the other's: P(both later
        than t) = sum pi(n1, n2) Q(n1 + 1, t) Q(n2 + 1, t).
        """
        from scipy.special import gammaincc

        t = x / (1 - self.rho)
        later = gammaincc(np.arange(1, len(self.law) + 1)[:, None], t[None, :])
        both = np.einsum("it,it->t", later, self.law @ later)
        e = np.exp(-x)
        return np.asarray((both - e * e) / (e * -np.expm1(-x)))


@lru_cache(maxsize=8)
def _pair(rho: float) -> Pair:
    return Pair(rho)


def _law_of_two(rho: float, states: int) -> Floats:
    """Return pi(n1, n2) [states, states]: arrivals at rate rho join both queues, each serves at rate 1."""
    import scipy.sparse as sparse
    from scipy.sparse.linalg import splu

    i = np.repeat(np.arange(states), np.arange(1, states + 1))
    j = np.concatenate([np.arange(k + 1) for k in range(states)])
    moves = [
        (i < states - 1, i + 1, j + 1, rho),
        (i > j, i - 1, j, 1.0),
        ((i > j) & (j > 0), i, j - 1, 1.0),
        ((i == j) & (j > 0), i, j - 1, 2.0),
    ]
    k = np.arange(len(i))
    start = np.concatenate([k[may] for may, *_ in moves])
    end = np.concatenate([(a * (a + 1) // 2 + b)[may] for may, a, b, _ in moves])
    rates = np.concatenate([np.full(int(may.sum()), rate) for may, *_, rate in moves])
    leave = np.bincount(start, rates, len(k))
    balance = sparse.csc_matrix(
        (np.concatenate([rates, -leave]), (np.concatenate([end, k]), np.concatenate([start, k]))), shape=(len(k), len(k))
    )
    rest = splu(balance[1:, 1:], permc_spec="MMD_AT_PLUS_A").solve(-balance[1:, 0].toarray().ravel())
    half = np.concatenate([[1.0], rest])
    law = np.zeros((states, states))
    law[i, j] = half * np.where(i == j, 1.0, 0.5)
    law[j, i] = law[i, j]
    return np.asarray(law / law.sum(), dtype=np.float64)
