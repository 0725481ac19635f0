"""The sojourn of one customer among others: the chain that a tagged customer sees, ticking on a Poisson clock.

N counts those present, the tagged one included.  With N present the station completes total(N) per second, of which own(N) is the
tagged one's own completion once it is in service; other arrivals come at rate lambda while there is room.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from mlsys_bench.queueing.ticks import Ticks
from mlsys_bench.queueing.times import Complexes, Floats

Speed = Callable[[Floats], Floats]
CHUNK = 64
NOTHING = 1e-16  # probability below which a state is dropped


def sojourn(
    found: Floats,
    *,
    rate_per_s: float,
    total: Speed,
    own: Speed,
    slots: int,
    most: int,
    clock_per_s: float,
    waiting: Bounded | None,
    mean_s: float,
    variance_s2: Callable[[], float],
) -> Ticks:
    """Return the sojourn of a customer who finds n others in service with probability found[n], or waits first.

    `slots` are in service at most, `most` present at most; the clock ticks at lambda plus the highest completion rate.
    Uniformisation: exact but for states of probability below 1e-16.
    """
    chunks = _survivors(
        found, rate_per_s / clock_per_s, lambda n: total(n) / clock_per_s, lambda n: own(n) / clock_per_s, slots, most, waiting
    )
    return Ticks(chunks, per_s=clock_per_s, mean_s=mean_s, variance_s2=variance_s2)


def _survivors(found: Floats, up: float, total: Speed, own: Speed, slots: int, most: int, waiting: Bounded | None) -> Iterator[Floats]:
    """Yield P(the tagged customer is still there after i ticks), i = 0, 1, …; x[N-1] is the probability to be in service with N present."""
    x = found
    while True:
        behind = waiting.reach() if waiting else -slots
        size = min(most, max(_last(x), slots + behind) + CHUNK + 2)
        x = np.concatenate([x[:size], np.zeros(max(0, size - len(x)))])
        n = np.arange(1.0, size + 1)
        rises = np.full(size, up)
        rises[-1] = 0.0
        others, stays = total(n) - own(n), 1 - rises - total(n)
        alive = np.empty(CHUNK)
        for k in range(CHUNK):
            alive[k] = x.sum() + (waiting.mass() if waiting else 0.0)
            after = x * stays
            after[1:] += x[:-1] * rises[:-1]
            after[:-1] += x[1:] * others[1:]
            if waiting:
                q, starting = waiting.tick()
                after[slots - 1 + q : slots - 1 + q + len(starting)] += starting
            x = after
        yield alive


def _last(x: Floats) -> int:
    """Return the length of x without its tail of next to nothing."""
    carrying = np.flatnonzero(x > NOTHING)
    return int(carrying[-1]) + 1 if len(carrying) else 1


class Bounded:
    """A wait in a queue of at most M: p departures to go and s = p + those behind; an arrival that finds s = M is turned away.

    The probabilities are kept in a window w[p - p_low, s - s_low] that holds all but next to nothing.
    """

    def __init__(self, queued: Floats, *, rate_per_s: float, top_per_s: float, clock_per_s: float) -> None:
        first = int(np.argmax(queued > NOTHING))
        self._w, self._p, self._s, self._most = np.diag(queued[first : _last(queued)]), first + 1, first + 1, len(queued)
        self._arrival, self._departure = rate_per_s / clock_per_s, top_per_s / clock_per_s

    def mass(self) -> float:
        """Return the probability that the customer still waits."""
        return float(self._w.sum())

    def reach(self) -> int:
        """Fit the window to the next CHUNK ticks; return the most customers that may be behind at the end of the wait."""
        rows, columns = (np.flatnonzero(self._w.max(axis=axis) > NOTHING) for axis in (1, 0))
        if not len(rows):
            self._w, self._p, self._s = np.zeros((1, 1)), 1, 1
            return 0
        kept = self._w[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        p, s = self._p + int(rows[0]), self._s + int(columns[0])
        down, left = min(CHUNK, p - 1), min(CHUNK, s - 1)
        right = min(CHUNK, self._most - (s + kept.shape[1] - 1))
        self._w, self._p, self._s = np.pad(kept, ((down, 0), (left, right))), p - down, s - left
        return self._s + int(self._w.shape[1]) - 1

    def tick(self) -> tuple[int, Floats]:
        """Move one tick on; return the probability that service starts at it with q, q + 1 … others behind, and that q."""
        w = self._w
        after = w * (1 - self._arrival - self._departure)
        after[:, 1:] += self._arrival * w[:, :-1]
        after[:, -1] += self._arrival * w[:, -1]  # full; or nothing, when the window ends before
        after[:-1, :-1] += self._departure * w[1:, 1:]
        self._w = after
        return self._s - 1, w[0] * self._departure if self._p == 1 else w[0] * 0


def moments(rate_per_s: float, total: Floats, own: Floats) -> tuple[Floats, Floats]:
    """Return E[T] and E[T^2] of the rest of the service for N = 1 … len(total) present; no arrivals beyond that."""
    from scipy.linalg import solve_banded

    up = np.full(len(total), rate_per_s)
    up[-1] = 0.0
    bands = np.zeros((3, len(total)))
    bands[0, 1:], bands[1], bands[2, :-1] = -up[:-1], up + total, -(total - own)[1:]
    first = np.asarray(solve_banded((1, 1), bands, np.ones(len(total))), dtype=np.float64)
    return first, np.asarray(solve_banded((1, 1), bands, 2 * first), dtype=np.float64)


def bounded_moments(queued: Floats, rate_per_s: float, top_per_s: float, first: Floats, second: Floats) -> float:
    """Return E[T^2; waits] for a queue of at most M = len(queued).

    `first` and `second` are E[T] and E[T^2] of the service that starts with N = B … B + M - 1 present.  With p departures to go and s
    in the queue, (lambda + r) f(p, s) = g + lambda f(p, s + 1) + r f(p - 1, s - 1), where g = 1 for E[T] and 2 E[T] for E[T^2];
    at s = M arrivals are turned away.
    """
    from scipy.signal import lfilter

    a, r, both = rate_per_s, top_per_s, 0.0

    def back(given: Floats) -> Floats:
        """Solve over s = M … 1 for what is gained at each (lambda + r for s < M, r at M)."""
        scaled = given[::-1] / (a + r)
        scaled[0] = given[-1] / r
        return np.asarray(lfilter([1.0], [1.0, -a / (a + r)], scaled)[::-1])

    for p in range(_last(queued) if len(queued) else 0):
        now = back(1 + r * first)
        second = back(2 * now + r * second)
        both += float(queued[p] * second[p])
        first, second = np.append(0.0, now[:-1]), np.append(0.0, second[:-1])
    return both


def transform_of_survival(s: Complexes, rate_per_s: float, total: Floats, own: Floats, beyond: Complexes | None = None) -> Complexes:
    """Return integral of exp(-s t) P(still in service at t) for N = 1 … len(total) present, as [s, N].

    (s + lambda + total) m_N = 1 + lambda m_(N+1) + (total - own) m_(N-1).  At the last N: no arrivals; or, where speeds are constant
    from there on, m_(N+1) = 1 / (s + own) + x (m_N - 1 / (s + own)) with x = `beyond` [s].
    """
    from scipy.linalg import solve_banded

    size = len(total)
    bands = np.empty((3, size), dtype=np.complex128)
    bands[0, 1:], bands[2, :-1] = -rate_per_s, -(total - own)[1:]
    result = np.empty((len(s), size), dtype=np.complex128)
    for i, point in enumerate(s):
        bands[1], gains = point + rate_per_s + total, np.ones(size, dtype=np.complex128)
        if beyond is None:
            bands[1, -1] -= rate_per_s
        else:
            bands[1, -1] -= rate_per_s * beyond[i]
            gains[-1] += rate_per_s * (1 - beyond[i]) / (point + own[-1])
        result[i] = solve_banded((1, 1), bands, gains, check_finite=False)
    return result


def endless_transform(s: Complexes, found: Floats, p_wait: float, *, rate_per_s: float, total: Floats, own: Floats) -> Complexes:
    """Return integral of exp(-s t) P(T > t) for a queue without limit: `total` and `own` are those of N = 1 … B, constant beyond.

    The wait of those who wait is exponential with rate theta = r - lambda, r = r(B); q gather behind with probability
    (1 - rho) rho^q, and given q the wait is Erlang with q + 1 stages of rate r.  In service with N = B + q present,
    m_N = 1 / (s + e) + x^q (m_B - 1 / (s + e)), e = r / B, where x is the lesser root of lambda x^2 - (s + lambda + r) x + r - e = 0;
    so the sums over q are geometric.
    """
    a, r, e = rate_per_s, float(total[-1]), float(own[-1])
    middle = s + a + r
    root = np.sqrt(middle + 2 * math.sqrt(a * (r - e))) * np.sqrt(middle - 2 * math.sqrt(a * (r - e)))
    x = 2 * (r - e) / (middle + root)
    m = transform_of_survival(s, a, total, own, x)
    flat, start = 1 / (s + e), (r - a) / (r + s)
    waiting = 1 / (s + r - a)
    serving = start * (flat / (1 - a / (r + s)) + (m[:, -1] - flat) / (1 - a * x / (r + s)))
    return np.asarray(m @ found + p_wait * (waiting + serving))


def enough(ratio: float) -> int:
    """Return how many states a tail that falls by `ratio` per state needs to fall to 1e-16."""
    return min(10**6, 2 + math.ceil(math.log(NOTHING) / math.log(ratio))) if 0 < ratio < 1 else 2
