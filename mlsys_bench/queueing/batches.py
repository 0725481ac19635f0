"""Dynamic batching: a server that takes what waits, up to a limit, as one batch; the exact law of batch sizes, wait and sojourn.

Notation: a batch of b takes (fixed + per_request b) X, X the noise, mean 1; tau_b is its mean, B the most a batch holds,
G the number waiting when a batch starts, b = min(G, B).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.batch_chain import waiting_at_starts
from mlsys_bench.queueing.batch_laws import WaitAndSize
from mlsys_bench.queueing.laws import Law
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.times import Floats

LARGEST_CHAIN = 2500  # states solved as a dense system
LARGEST_NOISY_CHAIN = 400  # each state needs a transform


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchQueue:
    """A batching server in steady state."""

    batch_law: Floats | None  # P(a batch holds b), b = 1 … (as many as matter); None where endless batches get too large
    mean_batch: float  # per batch, not per request
    utilisation: float  # share of time a batch is in work; it nears 1 long before capacity is reached
    wait_s: float  # mean time until the batch starts
    sojourn_s: float  # mean time until the batch ends; infinite where it has no mean
    bound_s: float | None  # closed-form upper bound on sojourn_s, for batches without a limit
    queue: Queue | None  # None: percentiles are not known


def capacity_per_s(fixed_s: float, per_request_s: float, max_batch: int | None, servers: int = 1) -> float:
    """Return the requests per second that full batches can take: servers B / tau_B, or servers / per_request without a limit.

    Below it every rule that starts a full batch at once is stable, whatever it lets smaller ones wait for; at or above it none is.
    """
    _check(0.0, fixed_s, per_request_s, max_batch)
    if max_batch is None:
        return servers / per_request_s if per_request_s > 0 else math.inf
    return servers * max_batch / (fixed_s + per_request_s * max_batch)


def upper_bound_s(rate_per_s: float, fixed_s: float, per_request_s: float, noise_scv: float = 0.0) -> float:
    """Return a closed-form upper bound on the mean sojourn of batches without a limit; inf where the mean may be.

    With x the mean batch and y = E[b^2] / x = (1 + q (2 per_request fixed + fixed^2 / x)) / (1 - q per_request^2),
    q = rate^2 (1 + scv), the mean is per_request y + fixed + rate (1 + scv) / 2 (per_request^2 y + 2 per_request fixed + fixed^2 / x).
    It falls in x, and x >= max(1, rate fixed / (1 - rate per_request)), the second being the mean batch of a server never idle.
    At most 9 % above the mean without noise, over loads 0.05-0.99 and fixed / per_request 0.1-16; tight near saturation.
    Source: the bound phi of Y. Inoue, "Queueing analysis of GPU-based inference servers with dynamic batching", arXiv 1912.06322
    (abstract read; the argument above is ours); checked against the truth table (truth.csv): its three rows inoue_bound to 1e-13.
    """
    _check(rate_per_s, fixed_s, per_request_s, None)
    if rate_per_s * per_request_s >= 1:
        raise Overload(rate_per_s * per_request_s, 1, enough=math.floor(rate_per_s * per_request_s) + 1)
    least = max(1.0, rate_per_s * fixed_s / (1 - rate_per_s * per_request_s))
    return _unlimited_mean_s(rate_per_s, fixed_s, per_request_s, 1 + noise_scv, least)


def batches(
    rate_per_s: float,
    *,
    fixed_s: float,
    per_request_s: float,
    max_batch: int | None,
    max_wait_s: float = 0.0,
    noise: Law | None = None,
) -> BatchQueue:
    """Return one server with dynamic batching, Poisson arrivals, first come first served.

    A free server starts when `max_batch` wait or the oldest has waited `max_wait_s`.  The number waiting at starts of batches is a
    Markov chain, solved without cutting (batch_chain.py).  With max_wait 0 the mean sojourn follows by renewal reward: a cycle holds
    G tau_b + rate tau_b^2 E[X^2] / 2 request-seconds.  Without noise wait and sojourn have exact laws too (batch_laws.py): an arrival
    finds the batch in work at a uniform age, Poisson numbers come before and after it, which says when its batch starts, and its size.
    Exact for: noise with max_wait 0 (means; queue None), and no noise with max_wait up to the time of a full batch, so that those left
    behind by one have waited long enough.  Anything else raises BadInput: simulate it.  At or above B / tau_B: Overload.
    Error about 1e-10.  Checked against the truth table (truth.csv): worst relative error 3e-11 over the
    exact rows of sojourn_*; its simulated rows of these kinds all within 1.05 of their own precision (a 95 % interval).  B = 32 takes
    0.03 s, 128 0.3 s, 256 two seconds; above 384, or where waits span too many batches, queue is None.
    """
    _check(rate_per_s, fixed_s, per_request_s, max_batch)
    limit = capacity_per_s(fixed_s, per_request_s, max_batch)
    if rate_per_s >= limit:
        raise Overload(rate_per_s / limit, 1, enough=math.floor(rate_per_s / limit) + 1)
    square = 1.0 if noise is None else 1 + noise.scv
    most = max_batch if max_batch is not None else _never_reached(rate_per_s, fixed_s, per_request_s, square, max_wait_s)
    if max_batch is None and most > (LARGEST_CHAIN if noise is None else LARGEST_NOISY_CHAIN):
        if noise is None or max_wait_s > 0 or 2 * rate_per_s * fixed_s > LARGEST_NOISY_CHAIN * (1 - rate_per_s * per_request_s):
            return _huge(rate_per_s, fixed_s, per_request_s, square, max_wait_s)
        return _heavy(rate_per_s, fixed_s, per_request_s, noise)
    taus = np.asarray(fixed_s + per_request_s * np.arange(1, most + 1), dtype=np.float64)
    _check_wait(max_wait_s, noise, taus)
    # a panel that narrow would lose its digits; a wait as long as a full batch takes may be written with other last digits
    max_wait_s = min(max_wait_s, float(taus[-1])) if max_wait_s > 1e-9 * float(taus[0]) else 0.0
    law, empty = waiting_at_starts(rate_per_s, taus, noise, max_wait_s, limited=max_batch is not None)
    limited = max_batch is not None
    batch_law, left = _balanced(rate_per_s, taus, law, empty, square) if limited and noise is not None else _folded(law, most)
    sizes = np.arange(1, most + 1)
    mean_batch = float(batch_law @ sizes)
    queue = _queue(rate_per_s, taus, law, max_wait_s) if noise is None else None
    if max_wait_s > 0:
        sojourn_s = queue.sojourn_s if queue is not None else math.nan
    elif max_batch is None:  # with noise the tail may be a power law: only the share of idle times is taken from the chain
        mean_batch = (rate_per_s * fixed_s + empty) / (1 - rate_per_s * per_request_s)
        sojourn_s = _unlimited_mean_s(rate_per_s, fixed_s, per_request_s, square, mean_batch)
    else:
        held = float(batch_law @ (sizes * taus + rate_per_s * square * taus**2 / 2)) + left * float(taus[-1])
        sojourn_s = held / mean_batch
    return BatchQueue(
        batch_law=batch_law,
        mean_batch=mean_batch,
        utilisation=rate_per_s * (fixed_s / mean_batch + per_request_s),
        wait_s=sojourn_s - float(batch_law @ (sizes * taus)) / float(batch_law @ sizes),
        sojourn_s=sojourn_s,
        bound_s=upper_bound_s(rate_per_s, fixed_s, per_request_s, square - 1) if max_batch is None and max_wait_s == 0 else None,
        queue=queue,
    )


def _huge(rate: float, fixed_s: float, per_s: float, square: float, max_wait_s: float) -> BatchQueue:
    """Return means alone, for batches without a limit so large that the server as good as never idles.

    The bound is the mean then: with P(nobody waits) = 0 the mean batch is rate fixed / (1 - rate per_request).  It is exact to
    rounding without noise, to about that probability over the mean of rate fixed with it.
    """
    if max_wait_s > 0:
        raise BadInput("batches without a limit that wait and grow this large are not computed: set max_batch, or simulate")
    mean_batch, mean_s = rate * fixed_s / (1 - rate * per_s), upper_bound_s(rate, fixed_s, per_s, square - 1)
    batch2 = mean_batch * (1 + rate**2 * square * (2 * per_s * fixed_s + fixed_s**2 / mean_batch)) / (1 - rate**2 * square * per_s**2)
    wait_s = mean_s - (fixed_s + per_s * batch2 / mean_batch) if math.isfinite(mean_s) else math.inf
    return BatchQueue(batch_law=None, mean_batch=mean_batch, utilisation=1.0, wait_s=wait_s, sojourn_s=mean_s, bound_s=mean_s, queue=None)


def _heavy(rate: float, fixed_s: float, per_s: float, noise: Law) -> BatchQueue:
    """Return means alone, for batches without a limit whose size has a long tail but whose server does idle.

    The chain, cut at 400, gives the share of batches that end with nobody waiting; every mean follows from it.  At exponential noise,
    rate per_request 0.6, mean batch 9.3: 5e-6 of the mean batch and 2e-7 of the mean sojourn off a chain of 800.
    """
    taus = np.asarray(fixed_s + per_s * np.arange(1, LARGEST_NOISY_CHAIN + 1), dtype=np.float64)
    _, empty = waiting_at_starts(rate, taus, noise, 0.0, limited=False)
    x, square = (rate * fixed_s + empty) / (1 - rate * per_s), 1 + noise.scv
    mean_s = _unlimited_mean_s(rate, fixed_s, per_s, square, x)
    if math.isfinite(mean_s):
        y = (1 + rate**2 * square * (2 * per_s * fixed_s + fixed_s**2 / x)) / (1 - rate**2 * square * per_s**2)
        wait_s = mean_s - fixed_s - per_s * y
    else:
        wait_s = math.inf
    return BatchQueue(
        batch_law=None,
        mean_batch=x,
        utilisation=rate * (fixed_s / x + per_s),
        wait_s=wait_s,
        sojourn_s=mean_s,
        bound_s=upper_bound_s(rate, fixed_s, per_s, noise.scv),
        queue=None,
    )


def _folded(law: Floats, most: int) -> tuple[Floats, float]:
    """Return P(b), and E[G - b], from P(G)."""
    return np.append(law[: most - 1], law[most - 1 :].sum()), float(law[most:] @ np.arange(1, len(law) - most + 1))


def _balanced(rate: float, taus: Floats, law: Floats, empty: float, square: float) -> tuple[Floats, float]:
    """Return P(b), and E[G - b], from P(G = g), g <= B, alone: what lies above B follows from the balance of L and of L^2.

    L' = G - b + A, G = max(L, 1), so E[A] = E[b] - P(L = 0) and 2 E[(G - b)(b - rate tau_b)] = E[A^2] - E[b^2] + P(L = 0), where
    G - b is 0 but for b = B.  However heavy the noise's tail, none of it has been cut.
    """
    B, load = len(taus), rate * taus
    b = np.arange(1, B + 1)
    law = law[:B].copy()
    above = (float(law @ (load - b)) + empty) / (B - float(load[-1]))
    whole = float(law.sum()) + above
    law[-1] += above
    law, empty = law / whole, empty / whole
    return law, float(law @ (load + square * load**2 - b**2) + empty) / (2 * (B - float(load[-1])))


def _queue(rate_per_s: float, taus: Floats, law: Floats, max_wait_s: float) -> Queue | None:
    """Return the laws of wait and sojourn; None where they would take too much memory or time."""
    if not WaitAndSize.fits(rate_per_s, taus, law):
        return None
    joint = WaitAndSize(rate_per_s, taus, law, max_wait_s)
    busy = rate_per_s * float(law @ taus[np.minimum(np.arange(len(law)), len(taus) - 1)]) / joint.mean_batch
    wait = joint.wait()
    return Queue(utilisation=busy, p_wait=wait.p_over(0.0), wait=wait, sojourn=joint.sojourn(), throughput_per_s=rate_per_s)


def _unlimited_mean_s(rate: float, fixed_s: float, per_s: float, square: float, x: float) -> float:
    """Return the mean sojourn without a limit on batches, given their mean size x."""
    spread = 1 - rate**2 * square * per_s**2
    if spread <= 0:
        return math.inf
    y = (1 + rate**2 * square * (2 * per_s * fixed_s + fixed_s**2 / x)) / spread
    return per_s * y + fixed_s + rate * square / 2 * (per_s**2 * y + 2 * per_s * fixed_s + fixed_s**2 / x)


def _never_reached(rate: float, fixed_s: float, per_s: float, square: float, max_wait_s: float) -> int:
    """Return a batch size that a server without a limit all but never reaches."""
    slope = rate * per_s
    mean = max(1.0 + rate * max_wait_s, rate * fixed_s / (1 - slope)) + 1
    noise = (square - 1) * (slope * mean + rate * fixed_s) ** 2
    sd = math.sqrt((mean + noise) / max(1 - square * slope**2, 0.02))
    return int(mean + (9 if square == 1 else 30) * sd) + 25


def _check_wait(max_wait_s: float, noise: Law | None, taus: Floats) -> None:
    if not (max_wait_s >= 0 and math.isfinite(max_wait_s)):
        raise BadInput(f"a wait of at most {max_wait_s} s is not a finite time from 0 up")
    if max_wait_s > 0 and noise is not None:
        raise BadInput("batches that wait are computed for batch times without noise only: simulate this one")
    if max_wait_s > float(taus[-1]) * (1 + 1e-12):
        raise BadInput(
            f"batches that wait longer ({max_wait_s:g} s) than a full one takes ({float(taus[-1]):g} s) are not computed: simulate"
        )


def _check(rate_per_s: float, fixed_s: float, per_request_s: float, max_batch: int | None) -> None:
    if not (rate_per_s >= 0 and math.isfinite(rate_per_s)):
        raise BadInput(f"an arrival rate of {rate_per_s} per second is not a finite number from 0 up")
    if not (fixed_s >= 0 and per_request_s >= 0 and 0 < fixed_s + per_request_s < math.inf):
        raise BadInput(f"a batch of n taking {fixed_s} + {per_request_s} n seconds: both finite, from 0 up, and not both 0")
    if max_batch is not None and max_batch < 1:
        raise BadInput(f"a batch of at most {max_batch}: at least 1 is needed")
