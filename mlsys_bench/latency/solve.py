"""Least squares on log(time) of engine steps: robust, with weak priors, the form's shape constants picked by leave-one-out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mlsys_bench.latency import step

FITTED = ("step_s", "sequence_s", "weights", "linear", "kv", "attention", "pack_s")
_NORMS = (None, 4.0, 2.0, 1.0)  # `roof_norm`
_MOST_PACK = 48  # `pack_tokens` is looked for up to here
_FINALISTS = 3  # shapes that fit best; of these, leave-one-out picks
_ROBUST = 2.0  # standard deviations from which on a cell counts by its misfit, not by its square
_FAR = 3.0  # standard deviations at which a width is held against the true misfit
_NARROWER, _NARROW = 0.9, 1e-2  # factor per try, and where to stop
_FORM_SD = 0.03  # of log(time): what so short a formula misses even without noise; keeps one quiet cell from ruling
_PRIOR_MULTIPLIER = (1.5, 1.2)  # median and sd of the logarithm: 0.15 to 16 within two sd, cut at 1
_PRIOR_SHARES = {"step_s": (0.3, 1.5), "sequence_s": (0.03, 2.0), "pack_s": (0.2, 1.5)}  # the same, as shares of the shortest step
Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measured size of step in one launch: its median, and the standard error of that median's logarithm."""

    key: str
    features: tuple[float, ...]
    median_s: float
    log_se: float


def best_shape(rows: list[Cell], constants: dict[str, float]) -> tuple[dict[str, float], Array]:
    """Return the constants with the shape that predicts held-out cells best, and those cells' log(measured / predicted)."""
    fits = [(k, least(rows, k)) for k in (constants | shape for shape in _shapes(rows))]
    fits.sort(key=lambda fit: float(np.abs(_misses(rows, fit[1], fit[0])).mean()))
    scored = [(k, _leave_one_out(rows, k, logs)) for k, logs in fits[:_FINALISTS]]
    return min(scored, key=lambda pair: float(np.abs(pair[1]).mean()))


def _shapes(rows: list[Cell]) -> list[dict[str, float]]:
    """Return the shapes that cells can tell apart: kernels change in the middle between any two sizes measured."""
    sizes = sorted({round(r.features[0] + r.features[2], 1) for r in rows if r.features[0] + r.features[2] <= _MOST_PACK})
    packs = [{"pack_tokens": (low + high) / 2} for low, high in itertools.pairwise(sizes)] or [{"pack_tokens": 1.0}]
    return [pack | ({} if norm is None else {"roof_norm": norm}) for norm in _NORMS for pack in packs]


def _misses(rows: list[Cell], logs: Array, k: dict[str, float]) -> Array:
    """Return log(measured / predicted) of every row."""
    predicted, _ = _predict(logs, list(np.array([r.features for r in rows]).T), k)
    return np.asarray(np.log([r.median_s for r in rows]) - predicted)


def _predict(logs: Array, features: Sequence[Array], k: dict[str, float]) -> tuple[Array, Array]:
    """Return log of the predicted times, and its derivatives by the log-coefficients.  The same formula as `step.step_s`."""
    host, sequence, weights, linear, kv, attention, pack = np.exp(logs)
    D, K, P, Q, S = features
    read_s, copied_s = weights * step.weights_s(k, D + P), pack * step.packed(k, D + P)
    memory_s, compute_s = read_s + copied_s, linear * step.linear_s(k, D + P, S)
    norm = k.get("roof_norm")
    matrices_s = step.roof(memory_s, compute_s, norm)
    by_memory, by_compute = ((s >= matrices_s) * 1.0 if norm is None else (s / matrices_s) ** (norm - 1) for s in (memory_s, compute_s))
    others = [np.full_like(D, host), sequence * S, kv * K * step.kv_s(k), attention * Q * step.pair_s(k)]
    total_s = matrices_s + sum(others)
    by_term = [*others[:2], by_memory * read_s, by_compute * compute_s, *others[2:], by_memory * copied_s]
    return np.asarray(np.log(total_s)), np.asarray(np.array(by_term) / total_s).T


def solve(rows: list[Cell], k: dict[str, float], start: Array | None = None) -> tuple[Array, Array, list[str]]:
    """Return the log-coefficients, their covariance, and the names that the cells leave open."""
    problem = _Problem(rows, k)
    logs = problem.least(start)
    covariance = problem.covariance(logs)
    spread = np.sqrt(np.diag(covariance))
    return logs, covariance, [name for name, sd, wide in zip(FITTED, spread, problem.width, strict=True) if sd > 0.5 * wide]


def least(rows: list[Cell], k: dict[str, float], start: Array | None = None) -> Array:
    """Return the log-coefficients alone."""
    return _Problem(rows, k).least(start)


class _Problem:
    """Cells and prior: how far coefficients are off, each misfit in standard deviations."""

    def __init__(self, rows: list[Cell], k: dict[str, float]) -> None:
        self.k, self.count = k, len(rows)
        self.features = list(np.array([r.features for r in rows]).T)
        self.measured = np.log([r.median_s for r in rows])
        self.sigma = np.hypot([r.log_se for r in rows], _FORM_SD)
        self.centre, self.width = _prior(min(r.median_s for r in rows))
        self.low = np.array([0.0 if name in step.MULTIPLIERS else -np.inf for name in FITTED])

    def misfit(self, logs: Array) -> Array:
        """Return the misfit of every cell, then of the prior."""
        return np.concatenate([(_predict(logs, self.features, self.k)[0] - self.measured) / self.sigma, (logs - self.centre) / self.width])

    def slope(self, logs: Array) -> Array:
        """Return its derivatives."""
        return np.concatenate([_predict(logs, self.features, self.k)[1] / self.sigma[:, None], np.diag(1 / self.width)])

    def least(self, start: Array | None = None) -> Array:
        """Return the log-coefficients of least misfit."""
        from scipy.optimize import least_squares

        found = least_squares(
            self.misfit, np.maximum(self.centre if start is None else start, self.low + 1e-3), jac=self.slope,
            bounds=(self.low, np.full(len(self.low), np.inf)), loss="soft_l1", f_scale=_ROBUST, ftol=1e-5, xtol=1e-5,
        )  # fmt: skip
        return np.asarray(found.x, dtype=np.float64)

    def covariance(self, logs: Array) -> Array:
        """Return the covariance of log-coefficients of least misfit: by curvature there, along each axis no wider than holds further out.

        Where one time hides behind a longer one, weights behind FLOPs, the misfit is flat at its least, and steep where the hidden one
        comes to light: curvature alone would let draws take it to many times the step.
        """
        scale = max(1.0, float(np.median(np.abs(self.misfit(logs)[: self.count])) * 1.4826))
        jacobian = self.slope(logs)
        jacobian[: self.count] /= scale  # cells that fit badly say less; the prior says what it said
        variances, axes = np.linalg.eigh(np.linalg.inv(jacobian.T @ jacobian))
        most = self._loss(logs, scale) + _FAR**2 / 2
        widths = [self._width(logs, sd * axis, scale, most) * sd for sd, axis in zip(np.sqrt(variances), axes.T, strict=True)]
        return np.asarray((axes * np.square(widths)) @ axes.T)

    def _width(self, logs: Array, stride: Array, scale: float, most: float) -> float:
        """Return the share of `_FAR` strides, to the worse side, within which the loss keeps below `most`; at most 1."""
        found = 1.0
        for side in (_FAR * stride, -_FAR * stride):
            while found > _NARROW and self._loss(logs + found * side, scale) > most:
                found *= _NARROWER
        return found

    def _loss(self, logs: Array, scale: float) -> float:
        """Return half the sum of squares, robust for cells, of coefficients that are never below the physics floor."""
        off = self.misfit(np.maximum(logs, self.low))
        cells, prior = off[: self.count] / scale, off[self.count :]
        return float((_ROBUST**2 * (np.sqrt(1 + (cells / _ROBUST) ** 2) - 1)).sum() + 0.5 * (prior**2).sum())


def _prior(shortest_s: float) -> tuple[Array, Array]:
    shares = {name: (share * shortest_s, sd) for name, (share, sd) in _PRIOR_SHARES.items()}
    pairs = [shares.get(name, _PRIOR_MULTIPLIER) for name in FITTED]
    return np.log([median for median, _ in pairs]), np.array([sd for _, sd in pairs])


def _leave_one_out(rows: list[Cell], k: dict[str, float], whole: Array) -> Array:
    """Return log(measured / predicted) of each cell by a fit, begun at that of all, that has not seen it in any launch."""
    found: list[float] = []
    for key in dict.fromkeys(r.key for r in rows):
        logs = least([r for r in rows if r.key != key], k, whole)
        found.extend(_misses([r for r in rows if r.key == key], logs, k))
    return np.array(found)
