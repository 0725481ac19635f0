"""One replica that batches: a birth-death chain whose completion rate depends on how many requests it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.mmc import quantile_of

Floats = npt.NDArray[np.float64]


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
    Source: Kleinrock, Queueing Systems I (1975), ch. 3; the use for LLM servers as in llm-inferno/queue-analysis.
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

    def wait_p(self, t_s: float) -> float:
        """Return P(wait for a slot > t) over accepted requests.

        Whoever finds n >= B waits for n - B + 1 completions at rate r(B): an Erlang law, mixed over n.  Without a capacity the
        geometric mixture is exponential with rate r(B) - lambda.
        """
        if t_s < 0:
            return 1.0
        top = float(self.completions_per_s[-1])
        if self.capacity is None:
            return self.p_wait * math.exp(-(top - self.rate_per_s) * t_s)
        from scipy.special import gammaincc

        queued = self._law[self.slots : -1]
        return float(queued @ gammaincc(np.arange(1, len(queued) + 1), top * t_s)) / (1 - self.p_blocked)

    def wait_quantile_s(self, p: float) -> float:
        """Return the p-quantile of the wait for a slot: 0 when P(no wait) >= p."""
        if not 0 < p < 1:
            raise BadInput(f"a quantile needs a probability between 0 and 1, not {p}")
        if self.p_wait <= 1 - p:
            return 0.0
        top = float(self.completions_per_s[-1])
        if self.capacity is None:
            return math.log(self.p_wait / (1 - p)) / (top - self.rate_per_s)
        return quantile_of(self.wait_p, p, 1 / top)


def _check(rate_per_s: float, rates: Floats, capacity: int | None) -> None:
    if not (rate_per_s >= 0 and math.isfinite(rate_per_s)):
        raise BadInput(f"an arrival rate of {rate_per_s} per second is not a finite number from 0 up")
    if rates.ndim != 1 or len(rates) == 0 or not np.all(rates > 0) or not np.all(np.isfinite(rates)):
        raise BadInput("completion rates must be one positive, finite number for each batch size from 1 up")
    if capacity is not None and capacity < len(rates):
        raise BadInput(f"a capacity of {capacity} requests is less than the {len(rates)} slots")
