"""A replica that batches, whose arrivals come in clusters because they themselves slow its steps.

Seen step by step, the arrivals of a replica that mixes prefill into its steps excite each other: a prompt lengthens the step that reads
it, and during that time others come.  With b the share of a step's mean time that prefill takes, each arrival brings Poisson(b) others,
so that they come in clusters of total size Borel(b), with mean 1 / (1 - b) and index of dispersion 1 / (1 - b)^2: a Hawkes process with a
short memory (Hawkes and Oakes 1974, J. Appl. Prob. 11, 493-503, the cluster representation).  Requests in the replica then vary that
much more than in the chain of `chain.Batching`, to which this one comes down at b = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench.errors import Overload

Floats = npt.NDArray[np.float64]
LARGEST = 96  # of a cluster; the rest of its law is cut off and its mean kept
_MOST = 0.95  # of b


@dataclass(frozen=True, slots=True, kw_only=True)
class Clustered:
    """What the replica holds.  `batch_law` is P(batch = 0 … B) over time, `queue_law` P(n - B = 0, 1, … | n >= B), geometric beyond."""

    rate_per_s: float
    completions_per_s: Floats
    batch_law: Floats
    queue_law: Floats

    @property
    def p_wait(self) -> float:
        """Probability that all slots are taken."""
        return float(self.batch_law[-1])

    @property
    def utilisation(self) -> float:
        """Offered load over the rate at which a full replica completes."""
        return self.rate_per_s / float(self.completions_per_s[-1])

    @property
    def batch_law_of_tokens(self) -> Floats:
        """Return P(batch = 1 … B) as a token sees it: time weighted by completions, to which tokens are proportional."""
        weights = self.batch_law[1:] * self.completions_per_s
        total = float(weights.sum())
        return np.asarray(weights / total if total > 0 else np.eye(1, len(weights))[0])

    def queued(self, u: Floats) -> Floats:
        """Return how many wait, at each probability, where all slots are taken."""
        reached = np.cumsum(self.queue_law[:-1])
        found = np.searchsorted(reached, u).astype(np.float64)
        last = len(reached)
        if self.utilisation <= 0:
            return found
        beyond = np.log(np.maximum((1 - u) / max(float(self.queue_law[-1]), 1e-300), 1e-300)) / np.log(self.utilisation)
        return np.where(found >= last, last + np.maximum(beyond, 0.0), found)


def clustered(rate_per_s: float, completions_per_s: Floats, shares: Floats, mark_scv: float = 0.0, together: float = 0.5) -> Clustered:
    """Return the stationary law of n: arrivals in clusters below B slots, single ones at B and above, completions at r(min(n, B)).

    completions_per_s: r(1) … r(B).  shares: b with 0 … B - 1 present.  `mark_scv` is the SCV of the time that one arrival adds, `together`
    the chance that of two members of a cluster the first to leave finds the other one: 1/2 where lives are exponential as in this chain,
    1 where all are of one length.  Clusters are Borel with that b which disperses n as much.
    The law solves the cut equations r(n) pi_n = sum over m < n of a(m) P(cluster >= n - m) pi_m: all terms positive.
    Raises Overload at or above r(B).
    """
    return with_births(rate_per_s, completions_per_s, births(rate_per_s, shares, mark_scv, together))


def births(rate_per_s: float, shares: Floats, mark_scv: float = 0.0, together: float = 0.5) -> Floats:
    """Return the rates at which n rises by 1 or more, 2 or more, …, from each n = 0 … B - 1: [states, sizes]."""
    b = _effective(np.minimum(shares, _MOST), mark_scv, together)
    over = _at_least(b, _reach(float(b.max())))
    over *= np.arange(1, over.shape[1] + 1) <= np.arange(len(b), 0, -1)[:, None]  # who waits for a slot lengthens no step
    return np.asarray(rate_per_s * over / over.sum(axis=1, keepdims=True))


def with_births(rate_per_s: float, completions_per_s: Floats, births: Floats) -> Clustered:
    """Return the law where n rises at these rates: for several laws of completions that share their `births`."""
    slots, rho = len(completions_per_s), rate_per_s / float(completions_per_s[-1])
    if rho >= 1:
        raise Overload(rho, 1, enough=int(rho) + 1)
    law = _cuts(births, completions_per_s, rate_per_s)
    tail = law[-1] * rho / (1 - rho)
    law, tail = law / (law.sum() + tail), tail / (law.sum() + tail)
    full = max(float(law[slots:].sum() + tail), 1e-300)
    return Clustered(
        rate_per_s=rate_per_s,
        completions_per_s=np.asarray(completions_per_s),
        batch_law=np.append(law[:slots], full),
        queue_law=np.append(law[slots:], tail) / full,
    )


def _effective(shares: Floats, mark_scv: float, together: float) -> Floats:
    """Return the b of Borel clusters that disperse n as much as those of members that differ, and whose lives are not exponential.

    E[X^2] / E[X] = b (1 + b scv) / (1 - b)^2 + 1 / (1 - b); n has a dispersion of 1 + together x (that - 1), as in M^X/G/infinity.
    """
    of_sizes = shares * (1 + shares * mark_scv) / (1 - shares) ** 2 + 1 / (1 - shares)
    return np.asarray(1 - (1 + 2 * together * (of_sizes - 1)) ** -0.5)


def _at_least(b: Floats, reach: int) -> Floats:
    """Return P(cluster >= 1 … reach), [states, reach]; Borel: P(k) = exp(-b k) (b k)^(k - 1) / k!."""
    k = np.arange(1.0, reach + 1)
    log_k = np.log(k)
    logs = np.outer(np.log(np.maximum(b, 1e-300)), k - 1) - np.outer(b, k) + ((k - 1) * log_k - np.cumsum(log_k))
    law = np.exp(logs)
    return np.asarray(np.cumsum(law[:, ::-1], axis=1)[:, ::-1])


def _reach(b: float) -> int:
    """Return the largest cluster told apart: beyond it lies less than 1e-6 of Borel's law, which falls as exp(-k (b - 1 - log b))."""
    return int(min(LARGEST, 8 + 14 / max(b - 1 - np.log(max(b, 1e-9)), 1e-9)))


def _cuts(births: Floats, completions: Floats, rate_per_s: float) -> Floats:
    """Return the law of n = 0 … B + reach, not normalised.  Beyond B it is geometric, as clusters end there and arrivals come singly."""
    slots, reach = births.shape
    into = np.zeros((slots + 1, reach))  # into[n, j]: the rate at which state n - reach + j jumps to n or above
    for size in range(1, min(reach, slots) + 1):
        into[size:, reach - size] = births[: slots + 1 - size, size - 1]
    into[1:] /= completions[:, None]
    law = np.zeros(slots + reach + 1)  # `reach` zeros before state 0
    law[reach] = 1.0
    before = np.lib.stride_tricks.sliding_window_view(law, reach)
    for state, (jumps, already) in enumerate(zip(into[1:], before[1:], strict=False), reach + 1):
        law[state] = value = already.dot(jumps)
        if value > 1e200:
            law /= 1e200
    return np.append(law[reach:], law[-1] * (rate_per_s / completions[-1]) ** np.arange(1, reach + 1))
