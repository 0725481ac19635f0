"""Work that waits for the next step: a server that takes, step by step, what arrived during the step before.

Parcels of random size arrive in a Poisson stream; a step takes up to `room` of what waits and lasts the longer the more it takes, so that
more arrives meanwhile.  The backlog at the start of a step is a Markov chain

    W' = max(W - room, 0) + compound Poisson(rate T(W))

whose law is found on a lattice: compound Poisson laws by FFT (their transform is exp(mu (phi - 1))) at a few lengths of step, those between
them interpolated, then power iteration.  What else a backlog of w brings (how many parcels, the sum of a function of their sizes) follows
from the Mecke formula E[sum h(X_i); W = w] = mu (h f * P_mu)(w).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_STEPS = 10  # of power iteration at most; a server with room to spare needs four or five
_SETTLED = 1e-3  # total change of a law that ends it
_TINY = 1e-12  # of probability: what FFT leaves of zero
_RARE = 1e-4  # of steps that fill their room: fewer leave no trace in a percentile


class Parcels:
    """Sizes of parcels on a lattice of `cells` points, `top` the largest backlog it holds.  Means are kept exactly."""

    def __init__(self, sizes: Floats, top: float, cells: int) -> None:
        self.cells = cells
        self.unit = max(1.0, max(top, float(sizes.max())) / (cells - 2))
        self.at = np.arange(cells) * self.unit
        self.law = self.split(sizes, np.full(len(sizes), 1 / len(sizes)))
        self.mean = float(self.law @ self.at)
        self._transform = np.fft.rfft(self.law)

    def split(self, values: Floats, weights: Floats) -> Floats:
        """Return weights of values as weights of lattice points, each value divided between its two neighbours."""
        place = np.minimum(values / self.unit, self.cells - 1.0)
        low = place.astype(np.int64)
        part = place - low
        found = np.bincount(low, weights * (1 - part), minlength=self.cells)
        found += np.bincount(np.minimum(low + 1, self.cells - 1), weights * part, minlength=self.cells)
        return np.asarray(found)

    def total(self, mu: Floats) -> Floats:
        """Return the law of the total size of Poisson(mu) parcels, one row per mu (any shape)."""
        return np.maximum(np.fft.irfft(np.exp(mu[..., None] * (self._transform - 1)), self.cells), 0.0)

    def given_total(self, mu: Floats, total: Floats) -> tuple[Floats, Floats]:
        """Return the mean number of parcels, and of the sum of size^2 / 2, in a total of each size.  total: `self.total(mu)`."""
        spread = np.exp(mu[..., None] * (self._transform - 1)) * mu[..., None]
        number = np.fft.irfft(spread * self._transform, self.cells)
        halves = np.fft.irfft(spread * np.fft.rfft(self.law * self.at**2 / 2), self.cells)
        known = total > _TINY
        usual = np.maximum(self.at / self.mean, 1.0) * (self.at > 0)
        number = np.where(known, number / np.where(known, total, 1.0), usual)
        halves = np.where(known, halves / np.where(known, total, 1.0), self.at**2 / 2 / np.maximum(usual, 1.0))
        return np.clip(number, (self.at > 0) * 1.0, np.maximum(self.at, 1.0)), np.clip(halves, 0.0, self.at**2 / 2)

    def leaving(self, room: Floats) -> tuple[Ints, Floats]:
        """Return where on the lattice a step leaves each backlog, row by row: the point below, all rows in one, and how far beyond it."""
        rest = np.maximum(self.at - room, 0.0) / self.unit
        low = rest.astype(np.int64)
        return (low + np.arange(len(rest))[:, None] * self.cells).ravel(), rest - low

    def left(self, law: Floats, leaving: tuple[Ints, Floats]) -> Floats:
        """Return the law of what a step leaves, row by row: the backlog less what it had room for.  leaving: `self.leaving(room)`."""
        at, part = leaving
        beyond = law * part
        found = np.bincount(at, (law - beyond).ravel(), minlength=law.size + 1)
        found[1:] += np.bincount(at, beyond.ravel(), minlength=law.size)[: law.size]
        return np.asarray(found[:-1].reshape(law.shape))

    def plus(self, one: Floats, other: Floats) -> Floats:
        """Return the law of a sum, row by row; what lies beyond the lattice is counted at its end."""
        size = 2 * self.cells
        found = np.fft.irfft(np.fft.rfft(one, size) * np.fft.rfft(other, size), size)
        found[..., self.cells - 1] += found[..., self.cells :].sum(axis=-1)
        return np.maximum(found[..., : self.cells], 0.0)


def settled(parcels: Parcels, rate_per_s: float, step_s: Floats, room: Floats, begin: Floats, lengths: int = 8) -> Floats:
    """Return the law of the backlog at the start of a step, row by row.

    step_s, room: [rows, cells], by the backlog.  `begin` is a first guess.  `lengths` steps are told apart per row.
    """
    nodes, hats = _interpolation(step_s, lengths)
    arrived = parcels.total(rate_per_s * nodes)  # [rows, lengths, cells]
    beyond, leave = parcels.at > room, parcels.leaving(room)
    masks = np.stack([~beyond, beyond], axis=1).astype(np.float64)  # what the step has room for, and the rest: [rows, 2, cells]
    law = begin
    for _ in range(_STEPS):
        parts = law[:, None] * masks
        met = parts @ hats @ arrived  # what arrives meanwhile
        new, share = met[:, 0], parts[:, 1].sum(axis=1)
        if (rows := np.flatnonzero(share > _RARE)).size:
            new[rows] += parcels.plus(parcels.left(parts[:, 1], leave)[rows], met[rows, 1] / share[rows, None])
        new /= new.sum(axis=1, keepdims=True)
        is_settled = np.abs(new - law).sum() < _SETTLED * len(law)
        law = new
        if is_settled:
            break
    return law


def flooded(parcels: Parcels, each_step: float, room: Floats) -> Floats:
    """Return the law of the backlog where Poisson(each_step) parcels come per step, however long it lasts.  room: [1, cells]."""
    arrived = parcels.total(np.array([each_step]))
    law, over, leave = arrived, parcels.at > room, parcels.leaving(room)
    for _ in range(_STEPS):
        if (law * over).sum() < _RARE:
            break
        new = parcels.plus(parcels.left(law, leave), arrived)
        new /= new.sum()
        is_settled = np.abs(new - law).sum() < _SETTLED
        law = new
        if is_settled:
            break
    return law


def _interpolation(step_s: Floats, lengths: int) -> tuple[Floats, Floats]:
    """Return lengths of step per row, close together near the shortest, and the weight of each for each step: [rows, cells, lengths]."""
    low, high = step_s.min(axis=1, keepdims=True), step_s.max(axis=1, keepdims=True)
    nodes = low + (high - low) * np.linspace(0, 1, lengths) ** 1.5
    place = ((step_s - low) / np.maximum(high - low, 1e-300)) ** (1 / 1.5) * (lengths - 1)
    index = np.minimum(place.astype(np.int64), lengths - 2)
    left, right = np.take_along_axis(nodes, index, 1), np.take_along_axis(nodes, index + 1, 1)
    part = np.minimum(np.maximum((step_s - left) / np.maximum(right - left, 1e-300), 0.0), 1.0)
    weights = np.zeros((*step_s.shape, lengths))
    np.put_along_axis(weights, index[..., None], 1 - part[..., None], 2)
    np.put_along_axis(weights, index[..., None] + 1, part[..., None], 2)
    return nodes, weights
