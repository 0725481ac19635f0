"""What all levels so far say of the highest rate within one limit: a posterior on a grid, by how a queue would have answered each level.

A limit's figure, over the limit, is taken to be  score = b + W:  b what an idle server shows, W what load adds.

Where load adds waiting (TTFT, E2E), W is made from the very arrivals that were sent.  A server of capacity mu that works requests off in
turn has V_n seconds of work before it when request n comes (Lindley (1952), The theory of queues with a single server):

    V_n = u_n - min(u_0 … u_n),   u_n = n / mu - t_n          W = s max(0, Q_p(V) - h) / limit

h is the backlog that does not delay yet, because several requests are served at once; s what uneven service adds to uneven arrivals
(1 where all requests take the same, 1 + Cs^2 in heavy traffic).  That the arrivals are known takes the largest part of the noise away:
a level near capacity shows what its own arrivals made of it, and starting empty is part of the model, not a bias.

Where load adds no waiting (TPOT, ITL), W = A rho / (1 - rho), which with A = b is processor sharing.

mu, s and h (or mu and A) are fitted on a grid by all levels at once.  The highest rate is the one at which a run that lasts for ever
shows a score of 1, by the same recursion over 120,000 arrivals.  Levels scatter by Student's law with 4 degrees of freedom, since
machines hiccup; what uneven service adds to the scatter is taken from the theory of heavy traffic: relative variance of a mean wait over
time T is 4 W^2 / (A T), A its mean times (1 - rho).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
_FREEDOM = 4.0
_FORM_SD = 0.05  # of log(score): what the model misses of a real server even without noise
_MOST_VARIANCE = 0.6  # relative, of the wait seen at critical load
_TOP = 100.0  # score beyond which nothing more is learned
_RATES = 200  # points of the grid of capacities
_UNEVEN = np.geomspace(0.7, 8.0, 13)  # s
_IDLE_SHARES = np.array([0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0])  # h over the time of one lone request
_STRENGTHS = np.geomspace(3e-3, 300.0, 70)  # A over b, of a figure that is no wait: 1 for processor sharing
_STRENGTH_LOG_SD = 1.7  # of what is known of A over b beforehand
_PARETO = 0.7  # by which power more uneven service is less likely
_LEAST_BURSTINESS = 0.02
_LEAST_UNEVEN = 0.1  # share of the scatter of waits that is put down to service, however even it seems
_EDGE_SD = 0.03  # of log(rate): how sharply falling behind tells rates above capacity
_FALSE_ALARM = 0.02
_CAPACITY_SD = 0.03  # of log(capacity) as completions show it, beside their counting error
_MEAN_AS = 1 - math.exp(-1)  # the quantile of an exponential law that is its mean
_MOST_ARRIVALS = 4000  # of a level; more are taken in groups
_REPLAYED = np.geomspace(0.4, 4.0, 240)  # capacities that a level is replayed at, over its rate
_LOADS = 1 - np.geomspace(0.9, 4e-4, 70)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """One level.  `backlog` are its arrivals replayed (`replay`); `score` is None where only saturation is known."""

    rate_per_s: float
    duration_s: float
    score: float | None
    effective: float  # independent requests
    over: bool = False
    backlog: Floats | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What is known of a limit beforehand."""

    idle: float  # score of an idle server, below 1
    p: float | None  # the quantile; None: the mean
    wait_s: float | None  # the limit in seconds of waiting; None where load adds none
    lone_s: float  # how long a lone request takes
    burstiness: float  # squared coefficient of variation of the gaps between arrivals
    settled: Floats | None = None  # backlog of a run that lasts for ever, in services, by `_LOADS` (`settled`)

    @property
    def tail(self) -> float:
        """Return the quantile of an exponential law over its mean."""
        return 1.0 if self.p is None else max(0.5, -math.log1p(-self.p))


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """Completions per second of a server that was never idle, and how many were counted; `at_least`: it may have been idle."""

    rate_per_s: float
    completed: int
    at_least: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Posterior:
    """The highest rate: its distribution over points of log(rate)."""

    log_rates: Floats
    weights: Floats
    relaxation_s: float  # posterior mean of the time that a queue at that rate needs to forget

    def quantile(self, share: float) -> float:
        """Return the rate below which this share of the probability lies."""
        return float(np.exp(np.interp(share, np.cumsum(self.weights) - self.weights / 2, self.log_rates)))


def posterior(evidence: Sequence[Evidence], capacities: Iterable[Capacity], shape: Shape, bounds_per_s: tuple[float, float]) -> Posterior:
    """Return what is known of the highest rate.  `bounds_per_s` hold the capacity."""
    known, model = list(capacities), (_Curve(shape) if shape.wait_s is None else _Queue(shape))
    low, high = (math.log(end) for end in bounds_per_s)
    for _ in range(3):  # a coarse look over all rates, finer ones where the probability is
        mu = np.exp(np.linspace(low, high, _RATES))[:, None, None]
        logs = np.broadcast_to(model.prior, (_RATES, *model.prior.shape[1:]))
        for level in evidence:
            logs = logs + _log_likelihood(level, mu, model, shape)
        for capacity in known:
            logs = logs + _log_capacity(capacity, mu)
        weights = np.exp(logs - logs.max())
        by_rate = weights.sum(axis=(1, 2))
        inside = np.flatnonzero(by_rate > 1e-5 * by_rate.max())
        step = (high - low) / (_RATES - 1)
        low, high = low + (inside[0] - 1) * step, low + (inside[-1] + 1) * step
    return _of_rate(mu, weights / weights.sum(), model, shape)


def _of_rate(mu: Floats, weights: Floats, model: _Queue | _Curve, shape: Shape) -> Posterior:
    rates = np.broadcast_to(np.log(mu * model.highest(mu)), weights.shape).ravel()
    order = np.argsort(rates)
    relaxation_s = float((weights * model.relaxation_s(mu)).sum())
    return Posterior(rates[order], weights.ravel()[order], relaxation_s)


# ---------------------------------------------------------------- two kinds of latency; grids are [mu, s, h] and [mu, A, 1]


class _Queue:
    """Load adds waiting."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._uneven, self._slack_s = _UNEVEN[None, :, None], (_IDLE_SHARES * shape.lone_s)[None, None, :]
        logs = np.log(_normal_cdf((self._uneven - 0.9) / 0.15)) - _PARETO * np.log(self._uneven)
        self.prior = np.broadcast_to(logs, (1, len(_UNEVEN), len(_IDLE_SHARES)))

    def added(self, level: Evidence, mu: Floats) -> Floats:
        """Return W of a level."""
        assert level.backlog is not None
        assert self._shape.wait_s is not None
        backlog_s = np.interp(mu / level.rate_per_s, _REPLAYED, level.backlog)
        return np.asarray(self._uneven * np.maximum(backlog_s - self._slack_s, 0.0) / self._shape.wait_s)

    def highest(self, mu: Floats) -> Floats:
        """Return the utilisation of the highest rate."""
        assert self._shape.settled is not None
        assert self._shape.wait_s is not None
        allowed = mu * ((1 - self._shape.idle) * self._shape.wait_s / self._uneven + self._slack_s)
        return np.asarray(np.interp(allowed, self._shape.settled, _LOADS))

    def variance(self, level: Evidence, load: Floats, mu: Floats) -> Floats:
        """Return the variance of log(score) that uneven service makes."""
        assert self._shape.wait_s is not None
        tail, wait_s = self._shape.tail, load * self._shape.wait_s
        strength_s = tail * self._uneven * max(self._shape.burstiness, _LEAST_BURSTINESS) / (2 * mu)
        rho = level.rate_per_s / mu
        in_time = 4 * wait_s**2 / (tail * strength_s * level.duration_s)
        beyond = np.where(rho > 1, 2 * strength_s / (tail * np.maximum(rho - 1, 1e-9) ** 2 * level.duration_s), np.inf)
        scale_s = np.maximum(strength_s / tail / np.maximum(1 - rho, 0.02), wait_s / tail)
        p = self._shape.p or _MEAN_AS
        of_tail = scale_s**2 * p / (1 - p) / max(level.effective, 1.0) / (self._shape.idle * self._shape.wait_s + wait_s) ** 2
        share = (load / (self._shape.idle + load)) ** 2
        by_service = np.clip(1 - 1 / self._uneven, _LEAST_UNEVEN, 1.0)
        in_time = np.minimum(np.minimum(in_time, beyond), _MOST_VARIANCE)
        return np.asarray(by_service * (share * in_time + np.minimum(of_tail, _MOST_VARIANCE)))

    def relaxation_s(self, mu: Floats) -> Floats:
        """Return the time a queue at the highest rate needs to forget: its variance over its drift squared."""
        rho = self.highest(mu)
        return np.minimum(self._uneven * max(self._shape.burstiness, _LEAST_BURSTINESS) / (mu * (1 - rho) ** 2), 1e3)


class _Curve:
    """Load slows every request."""

    def __init__(self, shape: Shape) -> None:
        self._shape, self._strength = shape, shape.idle * _STRENGTHS[None, :, None]
        self.prior = -0.5 * (np.log(_STRENGTHS[None, :, None]) / _STRENGTH_LOG_SD) ** 2

    def added(self, level: Evidence, mu: Floats) -> Floats:
        """Return W of a level."""
        rho = level.rate_per_s / mu
        return np.asarray(np.where(rho < 1, self._strength * rho / np.maximum(1 - rho, 1e-9), _TOP))

    def highest(self, mu: Floats) -> Floats:
        """Return the utilisation of the highest rate."""
        z = (1 - self._shape.idle) / self._strength
        return np.asarray(np.broadcast_to(z / (1 + z), (len(mu), *z.shape[1:])))

    def variance(self, level: Evidence, load: Floats, mu: Floats) -> Floats:
        """Return the variance of log(score) that so few independent requests give."""
        p = self._shape.p or _MEAN_AS
        of_tail = p / (1 - p) / max(level.effective, 1.0) / self._shape.tail**2
        return np.asarray((load / (self._shape.idle + load)) ** 2 * min(of_tail, _MOST_VARIANCE))

    def relaxation_s(self, mu: Floats) -> Floats:
        """Return nothing: what is slowed is fast again as soon as load is gone."""
        return np.zeros((len(mu), 1, 1))


def _log_likelihood(level: Evidence, mu: Floats, model: _Queue | _Curve, shape: Shape) -> Floats:
    found: Floats = np.zeros(mu.shape)
    if level.over:
        rho = level.rate_per_s / mu
        found = found + np.log(_FALSE_ALARM + (1 - _FALSE_ALARM) * _normal_cdf(np.log(rho) / _EDGE_SD + 1))
    if level.score is None:
        return found
    load = np.minimum(model.added(level, mu), _TOP)
    expected = np.log(shape.idle + load)
    sd = np.sqrt(_FORM_SD**2 + model.variance(level, load, mu))
    if level.over or level.score >= _TOP:  # cut short or failing: its figure is at least the limit
        return np.asarray(found + np.log(1e-4 + _student_cdf((expected - min(0.0, math.log(max(level.score, 1e-9)))) / sd)))
    off = (math.log(max(level.score, 1e-9)) - expected) / sd
    return np.asarray(found - np.log(sd) - (_FREEDOM + 1) / 2 * np.log1p(off**2 / _FREEDOM))


def _log_capacity(seen: Capacity, mu: Floats) -> Floats:
    sd = math.hypot(_CAPACITY_SD, 1 / math.sqrt(max(seen.completed, 1)))
    off = np.log(mu / seen.rate_per_s) / sd
    if seen.at_least:
        return np.log(1e-4 + _normal_cdf(off))
    return np.asarray(-(_FREEDOM + 1) / 2 * np.log1p(off**2 / _FREEDOM))


# ---------------------------------------------------------------- Lindley's recursion


def replay(due_s: Floats, window_s: tuple[float, float], rate_per_s: float, p: float | None) -> Floats:
    """Return the quantile of the backlog that these arrivals make, in seconds, by capacity over rate (`_REPLAYED`).

    due_s: every arrival of the level, from its start; of these the ones in the window count.
    """
    group = -(-len(due_s) // _MOST_ARRIVALS) if len(due_s) else 1
    at, count = due_s[::group], np.arange(0, len(due_s), group, dtype=float)
    inside = (at >= window_s[0]) & (at < window_s[1])
    if not inside.any():
        return np.zeros(len(_REPLAYED))
    return np.array([_quantile(_backlog(count / (x * rate_per_s) - at)[inside], p) for x in _REPLAYED])


def settled(gaps: Floats, p: float | None) -> Floats:
    """Return the quantile of the backlog that arrivals with these gaps, of mean 1, make for ever, in services, by utilisation."""
    at = np.cumsum(gaps) / gaps.mean()
    count = np.arange(len(at), dtype=float)
    found = np.array([_quantile(_backlog(count - at / rho), p) for rho in _LOADS])
    return np.asarray(np.maximum.accumulate(found) + np.arange(len(found)) * 1e-9)  # for interpolation it must rise


def _backlog(u: Floats) -> Floats:
    return np.asarray(u - np.minimum.accumulate(u))


def _quantile(values: Floats, p: float | None) -> float:
    at = int((p or _MEAN_AS) * (len(values) - 1))
    return float(np.partition(values, at)[at])


def _normal_cdf(x: Floats) -> Floats:
    from scipy.special import ndtr

    return np.asarray(ndtr(x))


def _student_cdf(x: Floats) -> Floats:
    from scipy.special import stdtr

    return np.asarray(stdtr(_FREEDOM, x))
