"""Many alike servers, described by how far their mix of states is from that of independent servers in equilibrium.

With a first mode p (see `modes`) and k - 1 others, the law of n busy servers is a symmetric tensor: m_a of the n "excited" to mode a, the
rest in p.  Arrivals, ends and moves raise or lower the m_a by one, as ladder operators do; in the orthonormal basis their entries are
square roots of counts.  Servers are nearly independent, so few excitations at a time suffice whatever n is: exact when up to n are kept,
and the error falls by a factor of three to five with each (measured at c = 8 to 500), while the states grow with k, not with c.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mlsys_bench.queueing.modes import Modes
from mlsys_bench.queueing.times import Floats

Counts = npt.NDArray[np.int64]


COSTS = (1.0, 1.0, 4 / 3, 4 / 3, 2.0, 2.0, 2.0, 2.0, 4.0)  # of an excited server by its mode: rarer in finer modes, and less felt


class Ladder(NamedTuple):
    """The kept excitations and how one mode's count changes into another's."""

    excited: Floats  # [N] number of excited servers
    lower: Floats  # [k - 1, N, N] sqrt(m_a) from m to m less one in mode a
    hops: Counts  # [H, 4] from, to, a, b: one server from mode a to b
    sizes: Floats  # [H] sqrt(m_a (m_b + 1)), or m_a where a is b


@lru_cache(maxsize=64)
def ladder(costs: tuple[float, ...], budget: float, most: int) -> Ladder:
    """Return the excitations of up to `most` servers whose costs, one for each excited server by its mode, are within the budget."""
    kept = sorted(_counts(costs, budget, most), key=lambda m: (sum(m), m))
    at = {m: i for i, m in enumerate(kept)}
    n, k = len(kept), len(costs)
    lower, hops, sizes = np.zeros((k, n, n)), [], []
    for m, i in at.items():
        for a in (a for a in range(k) if m[a]):
            less = (*m[:a], m[a] - 1, *m[a + 1 :])
            lower[a, i, at[less]] = math.sqrt(m[a])
            for b in range(k):
                j = at.get((*less[:b], less[b] + 1, *less[b + 1 :]))
                if j is not None:
                    hops.append((i, j, a + 1, b + 1))
                    sizes.append(math.sqrt(m[a] * (less[b] + 1)))
    excited = np.array([sum(m) for m in kept], dtype=np.float64)
    return Ladder(excited, lower, np.array(hops, dtype=np.int64).reshape(-1, 4), np.array(sizes, dtype=np.float64))


def affordable(costs: tuple[float, ...], servers: int, states: int) -> float:
    """Return the greatest budget (in thirds) for no more than this many states, up to that which keeps all excitations of the servers."""
    most, budget = servers * max(costs, default=1.0), 1.0
    while budget < most and len(_counts(costs, budget + 1 / 3, servers)) <= states:
        budget += 1 / 3
    return budget


def _counts(costs: tuple[float, ...], budget: float, most: int) -> list[tuple[int, ...]]:
    """Return all (m_1, m_2 …) within the budget."""
    if not costs:
        return [()]
    found = []
    for m in range(most + 1):
        left = budget - m * costs[0]
        if left < -1e-9:
            break
        found += [(m, *rest) for rest in _counts(costs[1:], left, most - m)]
    return found


class Crowd:
    """Moves of n busy servers on the states of a ladder: rows of measures, `row @ matrix` is what becomes of them per second."""

    def __init__(self, modes: Modes, steps: Ladder) -> None:
        self.modes, self.steps = modes, steps
        self.size = len(steps.excited)
        self._raise = np.tensordot(modes.start[1:], steps.lower, axes=1).T
        self._lower = np.tensordot(modes.ends[1:], steps.lower, axes=1)
        self._moves = self._lifted(modes.moves)
        self._swaps = self._lifted(np.outer(modes.ends, modes.start))

    def up(self, n: int) -> Floats:
        """Return what a start makes of n busy servers, n + 1 then."""
        return (np.diag(self.modes.start[0] * self._calm(n + 1)) + self._raise) / math.sqrt(n + 1)

    def down(self, n: int) -> Floats:
        """Return the ends among n busy servers, n - 1 then."""
        return math.sqrt(n) * (np.diag(self.modes.ends[0] * self._calm(n)) + self._lower)

    def within(self, n: int) -> Floats:
        """Return the moves of n busy servers without an end, what ends taken away."""
        return self._of(n, *self._moves)

    def swaps(self, n: int) -> Floats:
        """Return the ends among n busy servers, each at once followed by a start."""
        return self._of(n, *self._swaps)

    def _calm(self, n: int) -> Floats:
        """Return sqrt(m_0): the root of how many of n servers are in p."""
        return np.sqrt(np.maximum(n - self.steps.excited, 0.0))

    def _lifted(self, one: Floats) -> tuple[float, Floats, Floats, Floats]:
        """Return what a change of one server by the matrix `one` needs on the ladder: from and to p, and among the others."""
        among = np.zeros((self.size, self.size))
        hops = self.steps.hops
        np.add.at(among, (hops[:, 0], hops[:, 1]), one[hops[:, 2], hops[:, 3]] * self.steps.sizes)
        out = np.tensordot(one[0, 1:], self.steps.lower, axes=1).T
        back = np.tensordot(one[1:, 0], self.steps.lower, axes=1)
        return float(one[0, 0]), out, back, among

    def _of(self, n: int, same: float, out: Floats, back: Floats, among: Floats) -> Floats:
        calm = self._calm(n)
        return np.diag(same * calm**2) + calm[:, None] * out + back * calm[None, :] + among
