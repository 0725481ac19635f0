"""One replica that batches: a birth-death chain whose completion rate depends on how many requests it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing import tagged
from mlsys_bench.queueing.contour import Contour
from mlsys_bench.queueing.mmc import Delayed, erlang_mixture
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.times import Complexes, Floats, Time


class Batching:
    """Continuous batching while slots bind: Poisson arrivals, completions at rate r(min(n, B)) with n requests in the replica.

    `completions_per_s` holds r(1) … r(B), B being the number of slots; requests beyond B wait, first come first served.
    With step time it(n) and outputs of mean length L, r(n) = n / (L it(n)).  `capacity`, when given, is the most requests the
    replica takes; the rest are turned away.

    The stationary law is a product of ratios, pi_n = pi_0 prod lambda / r(min(k, B)), taken in logarithms so that 10^4 slots
    do no harm; beyond B it is geometric.  Exact when the work of a request is exponential; the law of n depends on lengths
    only through their mean when all requests present are served at equal speed (processor sharing) and none waits.
    It does not know the KV pool: where memory binds rather than slots, simulate.
    Raises Overload when the rate is at or above r(B) and nobody is turned away.
    Source: llm-inferno, queue-analysis, pkg/queue/mm1modelstatedependent.go (the chain and its means, for LLM servers),
    https://github.com/llm-inferno/queue-analysis; the laws of wait and sojourn are derived at `wait` and `sojourn`.
    Checked against truth.csv: worst relative error 3e-11 over 36 rows of LLM-BD, sojourn percentiles included.
    """

    def __init__(self, rate_per_s: float, completions_per_s: Sequence[float] | Floats, capacity: int | None = None) -> None:
        rates = np.asarray(completions_per_s, dtype=np.float64)
        _check(rate_per_s, rates, capacity)
        self.rate_per_s = rate_per_s
        self.completions_per_s = rates
        self.slots = len(rates)
        self.capacity = capacity
        self.utilisation = rate_per_s / float(rates[-1])
        if capacity is None and self.utilisation >= 1:
            raise Overload(self.utilisation, 1, enough=math.floor(self.utilisation) + 1)
        self._law, self._tail = self._stationary()

    def _stationary(self) -> tuple[Floats, float]:
        """Return pi_0 … pi_B (… pi_K when finite) and the mass beyond the last."""
        rates = self.completions_per_s
        if self.capacity is not None:
            rates = np.concatenate([rates, np.full(self.capacity - self.slots, rates[-1])])
        with np.errstate(divide="ignore"):  # no arrivals: log 0 = -inf puts all mass on the empty state
            logs = np.concatenate([[0.0], np.cumsum(np.log(self.rate_per_s) - np.log(rates))])
        weights = np.exp(logs - logs.max())
        tail = 0.0 if self.capacity is not None else float(weights[-1]) * self.utilisation / (1 - self.utilisation)
        total = float(weights.sum()) + tail
        return weights / total, tail / total

    def p(self, n: int) -> float:
        """Return the probability that n requests are in the replica."""
        if n < len(self._law):
            return float(self._law[n])
        return float(self._law[-1]) * self.utilisation ** (n - self.slots) if self.capacity is None else 0.0

    @property
    def p_blocked(self) -> float:
        """Share of arrivals turned away: 0 without a capacity."""
        return 0.0 if self.capacity is None else float(self._law[-1])

    @property
    def p_wait(self) -> float:
        """Probability that an accepted arrival finds all slots taken (Poisson arrivals see time averages)."""
        return self._p_full / (1 - self.p_blocked)

    @property
    def _p_full(self) -> float:
        """Probability of n >= B, states that turn arrivals away left out."""
        last = len(self._law) if self.capacity is None else len(self._law) - 1
        return float(self._law[self.slots : last].sum()) + self._tail

    @property
    def throughput_per_s(self) -> float:
        """Requests completed per second."""
        return self.rate_per_s * (1 - self.p_blocked)

    @property
    def mean_requests(self) -> float:
        """Mean number of requests in the replica, waiting or running."""
        mean = float(self._law @ np.arange(len(self._law)))
        if self.capacity is None:  # sum over n > B of n pi_n, geometric
            mean += self._tail * (self.slots + 1 / (1 - self.utilisation))
        return mean

    @property
    def mean_batch(self) -> float:
        """Mean number of requests in a slot, over time, idle time included."""
        return float(self.batch_law @ np.arange(self.slots + 1))

    @property
    def batch_law(self) -> Floats:
        """Return P(batch = 0 … B) over time."""
        law = self._law[: self.slots + 1].copy()
        law[-1] += float(self._law[self.slots + 1 :].sum()) + self._tail
        return law

    @property
    def batch_law_of_tokens(self) -> Floats:
        """Return P(batch = 1 … B) as a token sees it: time in a state weighted by its token rate, which r(n) is proportional to."""
        weights = self.batch_law[1:] * self.completions_per_s
        total = float(weights.sum())
        return weights / total if total > 0 else np.eye(1, self.slots)[0]

    @property
    def wait_s(self) -> float:
        """Mean wait for a slot over accepted requests, by Little's law from the queue's length."""
        waiting = self.mean_requests - self.mean_batch
        return waiting / self.throughput_per_s if self.throughput_per_s > 0 else 0.0

    @property
    def sojourn_s(self) -> float:
        """Mean time in the replica of accepted requests, by Little's law."""
        return self.mean_requests / self.throughput_per_s if self.throughput_per_s > 0 else 1 / float(self.completions_per_s[0])

    @cached_property
    def wait(self) -> Time:
        """Wait for a slot over accepted requests.

        Whoever finds n >= B waits for n - B + 1 completions at rate r(B): an Erlang law, mixed over n.  Without a capacity the
        geometric mixture is exponential with rate r(B) - lambda.
        """
        if self.capacity is None:
            return Delayed(self.p_wait, self._top - self.rate_per_s)
        return erlang_mixture(self._queued, self._top)

    @cached_property
    def sojourn(self) -> Time:
        """Wait and service of accepted requests, when those in slots are served at equal speed: each of b at rate r(b) / b.

        The chain that a tagged request sees: while it waits, requests gather behind it; from then on the number present rises and
        falls, and with it the tagged request's own speed.  Exact for exponential work; by a contour integral without a capacity, by
        uniformisation with one (its time grows with the square of the waiting room when that is often full).
        """
        found, second_s2 = self._found, self._sojourn_second_s2
        if self._endless:
            n = np.arange(1.0, self.slots + 1)
            total, own = self._total(n), self._own(n)

            def transform(s: Complexes) -> Complexes:
                return tagged.endless_transform(s, found, self.p_wait, rate_per_s=self.rate_per_s, total=total, own=own)

            return Contour(transform, p_positive=1.0, mean_s=self.sojourn_s, variance_s2=second_s2() - self.sojourn_s**2)
        clock_per_s = self.rate_per_s + float(self.completions_per_s.max())
        queued = self._queued
        waiting = tagged.Bounded(queued, rate_per_s=self.rate_per_s, top_per_s=self._top, clock_per_s=clock_per_s) if queued.any() else None
        return tagged.sojourn(
            found,
            rate_per_s=self.rate_per_s,
            total=self._total,
            own=self._own,
            slots=self.slots,
            most=len(self._law) - 1,
            clock_per_s=clock_per_s,
            waiting=waiting,
            mean_s=self.sojourn_s,
            variance_s2=lambda: second_s2() - self.sojourn_s**2,
        )

    @property
    def _endless(self) -> bool:
        """Whether there is no capacity, or one that is never reached."""
        return self.capacity is None or (self.utilisation < 1 and self.p_blocked < 1e-14)

    @property
    def _found(self) -> Floats:
        """Probability that an accepted request finds n = 0 … B - 1, and so a slot."""
        return self._law[: self.slots] / (1 - self.p_blocked)

    def _sojourn_second_s2(self) -> float:
        """Return E[sojourn^2]: from where service starts at once, and from where it starts with q others behind."""
        behind = tagged.enough(self.utilisation) if self._endless else len(self._law) - 1 - self.slots
        n = np.arange(1.0, self.slots + behind + 1)
        first, second = tagged.moments(self.rate_per_s, self._total(n), self._own(n))
        at_once = float(self._found @ second[: self.slots])
        if not self._endless:
            start = slice(self.slots - 1, -1)
            return at_once + tagged.bounded_moments(self._queued, self.rate_per_s, self._top, first[start], second[start])
        # behind it q with probability (1 - rho) rho^q, and then its wait was Erlang with q + 1 stages of rate r(B)
        q = np.arange(behind + 1)
        share = self.p_wait * (1 - self.utilisation) * self.utilisation**q
        wait_s, from_q = (q + 1) / self._top, slice(self.slots - 1, None)
        return at_once + float(share @ (wait_s * (wait_s + 1 / self._top) + 2 * wait_s * first[from_q] + second[from_q]))

    def _total(self, n: Floats) -> Floats:
        """Return completions per second with n present."""
        return self.completions_per_s[np.minimum(n, self.slots).astype(np.int64) - 1]

    def _own(self, n: Floats) -> Floats:
        """Return completions per second of one request in a slot, n being present."""
        return np.asarray(self._total(n) / np.minimum(n, self.slots))

    @property
    def _top(self) -> float:
        """Completions per second with all slots taken: r(B)."""
        return float(self.completions_per_s[-1])

    @property
    def _queued(self) -> Floats:
        """Probability that an accepted request finds n = B, B + 1 … K - 1."""
        return self._law[self.slots : -1] / (1 - self.p_blocked)

    @property
    def queue(self) -> Queue:
        """What accepted requests meet, in the shape all models answer in."""
        return Queue(
            utilisation=self.utilisation,
            p_wait=self.p_wait,
            wait=self.wait,
            sojourn=self.sojourn,
            throughput_per_s=self.throughput_per_s,
            p_blocked=self.p_blocked,
        )

    def wait_p(self, t_s: float) -> float:
        """Return P(wait for a slot > t) over accepted requests."""
        return self.wait.p_over(t_s)

    def wait_quantile_s(self, p: float) -> float:
        """Return the p-quantile of the wait for a slot: 0 when P(no wait) >= p."""
        return self.wait.quantile_s(p)

    def sojourn_p(self, t_s: float) -> float:
        """Return P(wait + service > t) over accepted requests."""
        return self.sojourn.p_over(t_s)

    def sojourn_quantile_s(self, p: float) -> float:
        """Return the p-quantile of wait + service."""
        return self.sojourn.quantile_s(p)


def _check(rate_per_s: float, rates: Floats, capacity: int | None) -> None:
    if not (rate_per_s >= 0 and math.isfinite(rate_per_s)):
        raise BadInput(f"an arrival rate of {rate_per_s} per second is not a finite number from 0 up")
    if rates.ndim != 1 or len(rates) == 0 or not np.all(rates > 0) or not np.all(np.isfinite(rates)):
        raise BadInput("completion rates must be one positive, finite number for each batch size from 1 up")
    if capacity is not None and capacity < len(rates):
        raise BadInput(f"a capacity of {capacity} requests is less than the {len(rates)} slots")
