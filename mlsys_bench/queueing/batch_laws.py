"""Exact laws of wait and sojourn under dynamic batching with batch times that are always the same.

Every request's wait w comes with the size n of the batch it ends up in, and its sojourn is w + tau_n: so the joint law is kept, as a
density on Gauss panels plus atoms.  Shares are of all requests; a cycle, from one start of a batch to the next, brings E[b] of them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from mlsys_bench.queueing.batch_chain import convolve, poisson, poisson_table
from mlsys_bench.queueing.times import Floats, Formula, Time

NODES = 6
ROOM = 1.2e7  # numbers kept at most
LARGEST = 384  # batch, beyond which the laws take seconds


class WaitAndSize:
    """The joint law of a request's wait and the size of its batch, from `law` [g - 1] = P(G = g), G waiting when a batch starts."""

    def __init__(self, rate: float, taus: Floats, law: Floats, max_wait_s: float) -> None:
        self.rate, self.taus, self.hold = rate, taus, max_wait_s if len(taus) > 1 else 0.0
        B, tau = len(taus), float(taus[-1])
        self.mean_batch = float(law @ np.minimum(np.arange(1, len(law) + 1), B))
        self.clean, self.left = (
            law[:B] / self.mean_batch,
            np.append(0.0, law[B:]) / self.mean_batch,
        )  # cycles per request, by what a batch left
        x, weights = np.polynomial.legendre.leggauss(NODES)
        edges = self._edges()
        half = np.diff(edges) / 2
        r = (edges[:-1, None] + half[:, None] * (1 + x)).ravel()
        blocks = self._blocks()
        w = r + np.arange(blocks)[:, None] * tau  # [blocks, points]
        positions = self._positions(r, blocks * B).reshape(-1, blocks, B)
        density = np.stack([self._sizes(positions[:, k], w[k]) for k in range(blocks)])
        density[0] += self._held(r) if self.hold > 0 else 0.0
        self.density = density.reshape(blocks * len(half), NODES, B)
        self.starts, self.half = (np.arange(blocks)[:, None] * tau + edges[:-1]).ravel(), np.tile(half, blocks)
        self.w, self.weights = w.reshape(-1, NODES), weights
        masses = np.einsum("pin,i,p->pn", self.density, weights, self.half)
        self.later = np.vstack([np.cumsum(masses[::-1], axis=0)[::-1], np.zeros((1, B))])  # share with a wait past the start of a panel
        self.fit = np.linalg.inv(np.polynomial.legendre.legvander(x, NODES - 1))
        self.antiderivatives = _antiderivatives(NODES)
        self.at_hold, self.at_once = self._atoms()

    @staticmethod
    def fits(rate: float, taus: Floats, law: Floats) -> bool:
        """Return whether the joint law takes some 100 MB and a few seconds at most."""
        B, ahead = len(taus), rate * float(taus[-1])
        return B <= LARGEST and NODES * (B + ahead / 1.5) * (len(law) + ahead + 12 * math.sqrt(ahead) + 40) <= ROOM

    def _edges(self) -> Floats:
        """Return panel ends from 0 to tau_B: where a density jumps, and every 1.5 mean gaps between."""
        jumps = np.unique(np.concatenate([[0.0], self.taus, [self.hold]]))
        pieces = np.maximum(1, np.ceil(np.diff(jumps) * self.rate / 1.5)).astype(np.int64)
        ends = [np.linspace(a, b, n + 1)[:-1] for a, b, n in zip(jumps[:-1], jumps[1:], pieces, strict=True)]
        return np.concatenate([*ends, jumps[-1:]])

    def _blocks(self) -> int:
        """Return how many full batches a wait may span."""
        return math.ceil((len(self.left) + self._enough(float(self.taus[-1]))) / len(self.taus))

    def _enough(self, tau: float) -> int:
        """Return a number of arrivals that is all but never exceeded in tau."""
        return int(self.rate * tau + 12 * math.sqrt(self.rate * tau)) + 60

    def _positions(self, r: Floats, count: int) -> Floats:
        """Return the density of (rest r of the batch found, position p behind it), p = 1 … count: [points, count].

        The batch found was left alone or left some behind; Poisson(rate (tau_b - r)) came since it started.
        """
        density = np.zeros((len(r), count))
        for share, tau in zip(self.clean * self.rate, self.taus, strict=True):
            if share > 1e-16 * self.rate:
                inside, few = r < tau, min(self._enough(tau), count)
                density[inside, :few] += share * poisson_table(self.rate * (tau - r[inside]), few)
        if self.left.sum() > 0:
            tau = float(self.taus[-1])
            came = poisson_table(self.rate * (tau - r), self._enough(tau))
            behind = convolve(came, self.left * self.rate)[:, :count]
            density[:, : behind.shape[1]] += behind
        return np.maximum(density, 0.0)

    def _sizes(self, positions: Floats, w: Floats) -> Floats:
        """Return the density of (w, own batch n) where the batch starts when the server is free: n = p' + Poisson(rate w), at most B."""
        B = len(self.taus)
        sizes = np.maximum(convolve(positions, poisson_table(self.rate * w, B))[:, :B], 0.0)
        sizes[:, -1] = np.maximum(positions.sum(axis=1) - sizes[:, :-1].sum(axis=1), 0.0)
        return np.asarray(sizes)

    def _held(self, r: Floats) -> Floats:
        """Return what max_wait changes in the density: batches whose first request came later than s = tau_b - max_wait, or found no batch.

        Below B such a batch waits max_wait from its first request, the others of it come at uniform times; what `_sizes` said of them
        goes.  At B it starts with the B-th, y after the first, when the server is free by then, which has probability
        e^{-rate max(min(tau_b, max_wait) - y, 0)}.
        """
        B, m, rate = len(self.taus), self.hold, self.rate
        change, n = np.zeros((len(r), B)), np.arange(1, B)
        inside = r < m
        for share, tau in zip(self.clean, self.taus, strict=True):
            most = min(tau, m)
            late = share * math.exp(-rate * (tau - most))
            if late <= 1e-16:
                continue
            change[np.ix_(inside, n - 1)] += late * (n - 1) * poisson(n - 1, np.array(rate * m)) / m
            y_first = late * rate * poisson(np.array([B - 2]), rate * r) * np.exp(-rate * np.maximum(most - r, 0.0))
            change[inside, B - 1] += y_first[inside] + (B - 2) * late * self._middle(r[inside], most)
            # n in all by the time the server is free, none of them before s: p - 1 before this one, n - p after it
            early = r < most
            change[np.ix_(early, n - 1)] -= late * rate * poisson(n - 1, np.array(rate * most))
        return change

    def _middle(self, r: Floats, most: float) -> Floats:
        """Return the integral over y from r to max_wait of g(y) / y, g(y) = rate Poisson(B - 2; rate y) e^{-rate max(most - y, 0)}.

        With rate Poisson(B - 2; rate y) / y = rate^2 / (B - 2) Poisson(B - 3; rate y) both parts are known: above `most` an Erlang law,
        below it a power of y.
        """
        B, rate, m = len(self.taus), self.rate, self.hold
        if B < 3:
            return np.zeros_like(r)
        from scipy.special import gammaincc

        high = np.maximum(r, most)
        upper = gammaincc(B - 2, rate * high) - gammaincc(B - 2, rate * m)
        lower = poisson(np.array([B - 2]), np.array(rate * most)) - np.exp(-rate * (most - np.minimum(r, most))) * poisson(
            np.array([B - 2]), rate * np.minimum(r, most)
        )
        return np.asarray(rate / (B - 2) * (upper + lower))

    def _atoms(self) -> tuple[Floats, Floats]:
        """Return the shares, by size n, of requests that wait exactly max_wait (the first of a held batch) and of those that wait 0."""
        B, m, rate = len(self.taus), self.hold, self.rate
        most = np.minimum(self.taus, m)
        late = self.clean * np.exp(-rate * (self.taus - most))
        first, last = np.zeros(B), np.zeros(B)
        first[: max(B - 1, 1)] = late.sum() * poisson(np.arange(max(B - 1, 1)), np.array(rate * m))
        if m == 0:
            return np.zeros(B), first
        from scipy.special import gammaincc

        ended = gammaincc(B - 1, rate * most) - gammaincc(B - 1, rate * m)  # the B-th comes between `most` and max_wait,
        last[-1] = float(late @ (ended + poisson(np.array([B - 1]), rate * most)))  # or before, but after the server is free
        return first, last

    def _over(self, t: Floats) -> Floats:
        """Return the share with wait > t[n] and batch n, for one t per batch size."""
        at = np.clip(np.searchsorted(self.starts, t, side="right") - 1, 0, len(self.starts) - 1)
        n = np.arange(len(t))
        x = np.clip((t - self.starts[at]) / self.half[at] - 1, -1.0, 1.0)
        parts = np.polynomial.legendre.legvander(x, NODES) @ self.antiderivatives  # of each basis function, from -1 to x
        coefficients = np.einsum("ij,nj->ni", self.fit, self.density[at, :, n])
        within = np.einsum("ni,ni->n", parts, coefficients) * self.half[at]
        past = self.later[at, n] - within + self.at_hold * (t < self.hold)
        return np.asarray(np.where(t < 0, self.later[0] + self.at_hold + self.at_once, past))

    def wait(self) -> Time:
        """Return the law of the wait."""
        return self._law(np.zeros(len(self.taus)))

    def sojourn(self) -> Time:
        """Return the law of the sojourn."""
        return self._law(self.taus)

    def _law(self, then: Floats) -> Time:
        """Return the law of the wait and `then` [n - 1] after it."""
        masses = self.density * self.weights[None, :, None] * self.half[:, None, None]
        total = self.w[:, :, None] + then
        atoms = [(self.at_hold, self.hold + then), (self.at_once, then)]
        mean = float((masses * total).sum()) + sum(float(share @ at) for share, at in atoms)
        square = float((masses * total**2).sum()) + sum(float(share @ at**2) for share, at in atoms)

        def survival(t: Floats) -> Floats:
            return np.array([self._over(one - then).sum() for one in t], dtype=np.float64)

        return Formula(survival, mean_s=mean, variance_s2=square - mean**2)


def _antiderivatives(n: int) -> npt.NDArray[np.float64]:
    """Return [n + 1, n]: column k holds the integral of the Legendre polynomial P_k from -1, in Legendre polynomials."""
    table = np.zeros((n + 1, n))
    for k in range(n):
        whole = np.polynomial.legendre.legint(np.eye(k + 1)[k], lbnd=-1)
        table[: len(whole), k] = whole
    return table
