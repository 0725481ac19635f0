"""M/M/c with customers who give up waiting: Erlang A (exponential patience), one timeout for all, or any law of patience.

Notation: lambda = arrival rate, mu = 1 / service, G(x) = P(patience > x).  The offered wait V is how long a customer of endless
patience would wait.  Those who find a free server have V = 0; otherwise V has a density proportional to exp(-h(x)),

    h(x) = c mu x - lambda E[min(x, patience)],    h'(x) = c mu - lambda G(x):

at level x the work shrinks at rate c mu and grows by those arrivals who will still be there (the density of Baccelli and Hebuterne).
h is convex, so exp(-h) has one hump; everything here is an integral over it, at any load, for there is always a steady state.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.mmc import check_load, check_service, erlang_b
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.times import Floats, Formula, Time

if TYPE_CHECKING:
    from mlsys_bench.queueing.laws import Law

NODES, WEIGHTS = np.polynomial.legendre.leggauss(24)
DEEP = 80.0  # exp(-80) = 2e-35 of the peak: what lies beyond is left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandonment:
    """A queue some leave unserved."""

    queue: Queue  # wait and sojourn of those served; its p_wait is that of all arrivals, its p_abandoned their share that gives up
    offered_wait: Time  # what a customer of endless patience would wait
    wait_all: Time  # of all arrivals, until service or until they give up


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long customers wait before they give up, as the three functions of x the formulas need."""

    left: Callable[[Floats], Floats]  # P(patience > x)
    gone: Callable[[Floats], Floats]  # P(patience <= x), without cancellation
    spent_s: Callable[[Floats], Floats]  # E[min(x, patience)]
    edges_s: Floats  # where they bend: no panel of an integral reaches across


def erlang_a(rate_per_s: float, service_s: float, servers: int, patience_s: float) -> Abandonment:
    """Return M/M/c+M: every customer has an exponential patience with the given mean (Erlang A, Palm's model).  Any load.

    Exact, by quadrature.  Checked against truth.csv: worst relative error 2e-12 over its 60 exact rows, c to 100; the two published
    rows are met to their printed digits.  The tests solve the birth-death chain for c to 1000 beside it.
    """
    _check_patience(patience_s)
    theta = 1 / patience_s
    patience = Patience(
        left=lambda x: np.exp(-theta * x),
        gone=lambda x: -np.expm1(-theta * x),
        spent_s=lambda x: -np.expm1(-theta * x) / theta,
        edges_s=patience_s * np.array([0.1, 0.3, 0.6, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32]),
    )
    return abandonment(rate_per_s, service_s, servers, patience)


def fixed_patience(rate_per_s: float, service_s: float, servers: int, patience_s: float) -> Abandonment:
    """Return M/M/c+D: every customer gives up after the same time in queue, as with a client's timeout.  Any load.

    Exact, by quadrature.  Checked against truth.csv: worst relative error 3e-13 over its 18 rows, c to 50.
    """
    _check_patience(patience_s)
    patience = Patience(
        left=lambda x: (x < patience_s).astype(np.float64),
        gone=lambda x: (x >= patience_s).astype(np.float64),
        spent_s=lambda x: np.minimum(x, patience_s),
        edges_s=np.array([patience_s]),
    )
    return abandonment(rate_per_s, service_s, servers, patience)


def impatient(rate_per_s: float, service_s: float, servers: int, patience: Law) -> Abandonment:
    """Return M/M/c+G: patience of any law.  Any load.

    By quadrature with panels between the quantiles of patience.  The tests find it within 1e-8 of `erlang_a` and `fixed_patience`
    given their laws, and simulate a two-point law.
    """
    _check_patience(patience.mean_s)
    u = np.concatenate([np.linspace(0, 1, 33)[1:-1], 1 - 10.0 ** -np.arange(2, 13)])
    known = Patience(
        left=patience.survival,
        gone=lambda x: 1 - patience.survival(x),
        spent_s=lambda x: patience.mean_s - patience.stop_loss_s(x),
        edges_s=np.unique(patience.quantiles(u)),
    )
    return abandonment(rate_per_s, service_s, servers, known)


def abandonment(rate_per_s: float, service_s: float, servers: int, patience: Patience) -> Abandonment:
    """Return the queue for patience given by its functions; see the head of this file."""
    check_service(service_s)
    offered = rate_per_s * service_s
    check_load(servers, offered)
    hump = _Hump(rate_per_s, servers / service_s, patience)
    x, w = hump.x, hump.mass  # nodes and weights of E[f(V); V > 0] up to a factor
    with np.errstate(divide="ignore"):
        blocking = erlang_b(servers - 1, offered) if servers > 1 else 1.0
        log_odds = float(np.log(blocking) + np.log(rate_per_s) + np.log(w.sum())) - hump.low
    p_wait, p_free = _share(log_odds), _share(-log_odds)
    w = w * (p_wait / w.sum())
    p_served = p_free + float(w @ patience.left(x))

    beyond, served_beyond = hump.beyond(np.ones_like), hump.beyond(patience.left)

    def offered_over(t: Floats) -> Floats:
        return p_wait * beyond(t)

    def all_over(t: Floats) -> Floats:
        return patience.left(t) * offered_over(t)

    def served_over(t: Floats) -> Floats:
        return p_wait / p_served * served_beyond(t)

    def done_over(t: Floats) -> Floats:
        ends = [p_free * math.exp(-s / service_s) + p_wait * hump.share_before(s, 1 / service_s) for s in t]
        return served_over(t) + np.array(ends) / p_served

    served = w * patience.left(x) / p_served
    waits = hump.lengths * all_over(x)  # E[T] and E[T^2] are integrals of P(T > t) and 2 t P(T > t)
    offered_wait = _time(offered_over, float(w @ x), float(w @ x**2))
    wait_all = _time(all_over, float(waits.sum()), float(2 * waits @ x))
    wait = _time(served_over, float(served @ x), float(served @ x**2))
    queue = Queue(
        utilisation=offered / servers,
        p_wait=p_wait,
        wait=wait,
        sojourn=Formula(done_over, mean_s=wait.mean_s + service_s, variance_s2=wait.variance_s2 + service_s**2),
        throughput_per_s=rate_per_s * p_served,
        p_abandoned=float(w @ patience.gone(x)),
    )
    return Abandonment(queue=queue, offered_wait=offered_wait, wait_all=wait_all)


def _share(log_odds: float) -> float:
    """Return odds / (1 + odds)."""
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0


def _time(survival: Callable[[Floats], Floats], mean_s: float, second_s2: float) -> Formula:
    return Formula(survival, mean_s=mean_s, variance_s2=second_s2 - mean_s**2)


class _Hump:
    """The density exp(-(h(x) - min h)) of the offered wait, with Gauss-Legendre nodes on panels fit to its shape."""

    def __init__(self, rate_per_s: float, drain_per_s: float, patience: Patience) -> None:
        self.rate_per_s, self.drain_per_s, self.patience = rate_per_s, drain_per_s, patience
        self.low = 0.0
        peak = self._peak()
        self.low = float(self.h(np.array([peak]))[0])
        self.edges = self._edges(peak)
        self.x, self.lengths = panels(self.edges)
        self.mass = self.lengths * self.density(self.x)
        self.total = float(self.mass.sum())

    def h(self, x: Floats) -> Floats:
        """Give the exponent of the density, above its least value."""
        return self.drain_per_s * x - self.rate_per_s * self.patience.spent_s(x) - self.low

    def density(self, x: Floats) -> Floats:
        """Return exp(-h(x))."""
        return np.asarray(np.exp(-self.h(x)))

    def _peak(self) -> float:
        """Return where h is least: 0 below saturation, else where those still waiting load the servers to 1."""

        def falls(x: float) -> bool:
            return self.rate_per_s * float(self.patience.left(np.array([x]))[0]) > self.drain_per_s

        if not falls(0.0):
            return 0.0
        low, high = 0.0, 1 / self.drain_per_s
        while falls(high):
            low, high = high, 2 * high
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if falls(middle) else (low, middle)
        return high

    def _edges(self, peak: float) -> Floats:
        """Return panel edges from 0 to where the density has died: at the bends of patience, and where h has risen to 1, 4, 9 …"""
        end = peak + 1 / self.drain_per_s
        while float(self.h(np.array([end]))[0]) < DEEP:
            end = peak + 2 * (end - peak)
        levels = np.append(np.arange(1.0, math.sqrt(DEEP)) ** 2, DEEP)
        right = self._crossings(levels, np.full_like(levels, peak), np.full_like(levels, end))
        left = self._crossings(levels, np.full_like(levels, peak), np.zeros_like(levels))
        edges = np.concatenate([[0.0, peak], left, right, self.patience.edges_s])
        return np.unique(edges[edges <= right[-1]])

    def _crossings(self, levels: Floats, low: Floats, high: Floats) -> Floats:
        """Return where h reaches each level between `low`, where it is 0, and `high`; `high` itself where it does not."""
        for _ in range(50):
            middle = (low + high) / 2
            under = self.h(middle) < levels
            low, high = np.where(under, middle, low), np.where(under, high, middle)
        return high

    def beyond(self, weight: Callable[[Floats], Floats]) -> Callable[[Floats], Floats]:
        """Return t -> E[weight(V); V > t | V > 0]: the rest of the panel t lies in, and all panels after it."""
        after = np.append(np.cumsum((self.mass * weight(self.x)).reshape(-1, len(NODES)).sum(axis=1)[::-1])[::-1], 0.0)

        def share(t: Floats) -> Floats:
            k = np.clip(np.searchsorted(self.edges, t, side="right"), 1, len(self.edges) - 1)
            half = np.maximum(self.edges[k] - t, 0.0) / 2
            x = t[:, None] + half[:, None] * (1 + NODES)
            rest = (weight(x) * self.density(x)) @ WEIGHTS * half
            return np.asarray(np.where(t < self.edges[-1], rest + after[k], 0.0) / self.total)

        return share

    def share_before(self, t: float, mu: float) -> float:
        """Return E[exp(-mu (t - V)); V <= t, V <= patience | V > 0]: served by then, service still on."""
        kernel = t - np.array([0, 0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48]) / mu
        edges = np.concatenate([self.edges[self.edges < t], kernel[(kernel >= 0) & (kernel <= self.edges[-1])]])
        x, lengths = panels(np.unique(edges))
        return float(lengths @ (self.density(x) * self.patience.left(x) * np.exp(-mu * (t - x)))) / self.total


def panels(edges: Floats) -> tuple[Floats, Floats]:
    """Return Gauss-Legendre nodes and weights on the panels between `edges`."""
    half = np.diff(edges) / 2
    return (edges[:-1, None] + half[:, None] * (1 + NODES)).ravel(), (half[:, None] * WEIGHTS).ravel()


def _check_patience(patience_s: float) -> None:
    if not (patience_s > 0 and math.isfinite(patience_s)):
        raise BadInput(f"a patience of {patience_s} s is not positive and finite")
