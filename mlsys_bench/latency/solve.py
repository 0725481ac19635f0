"""Least squares on log(time) of engine steps: robust, with weak priors, the form's shape constants picked by leave-one-out."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import numpy.typing as npt

from mlsys_bench.latency import step

FITTED = ("step_s", "sequence_s", "weights", "linear", "kv", "attention", "pack_s")
SECOND_STAIR = "pass_s"  # beside these where the shape has `pass_tokens`
_NORMS = (None, 4.0, 2.0, 2 ** (2 / 3), 2 ** (1 / 3), 1.0)  # `roof_norm`; operators of GPUs have 1.4 (ADR 9), which 2 misses by 2 to 4 %
_MOST_PACK = 48  # `pack_tokens` is looked for up to here
_FINALISTS = 3  # shapes that fit best; of these, leave-one-out picks
_SURE = 18.0  # twice the log-likelihood that a second stair must bring: some fifty places are tried, and noise brought up to 15
_ROBUST = 2.0  # standard deviations from which on a cell counts by its misfit, not by its square
_FAR = 3.0  # standard deviations at which a width is held against the true misfit
_NARROWER, _NARROW = 0.9, 1e-2  # factor per try, and where to stop
_NUDGE = 1e-6  # of a log-coefficient, for slopes
_FORM_SD = 0.03  # of log(time): what so short a formula misses even without noise; keeps one quiet cell from ruling
_LEAST_FORM_SD = 0.003  # where the cells show that it misses less
_PRIOR_MULTIPLIER = (1.5, 1.2)  # median and sd of the logarithm: 0.15 to 16 within two sd, cut at 1
_PRIOR_STAIR = (0.2, 1.5)  # the same, as shares of the shortest step
_PRIOR_SHARES = {"step_s": (0.3, 1.5), "sequence_s": (0.03, 2.0), "pack_s": _PRIOR_STAIR, SECOND_STAIR: _PRIOR_STAIR}
Array = npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One measured size of step in one launch: its median, and the standard error of that median's logarithm."""

    key: str
    features: tuple[float, ...]
    median_s: float
    log_se: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Constants that the cells chose for the form, how well it then predicts held-out cells, and how far it may miss those it has."""

    constants: dict[str, float]
    held_out_logs: Array  # log(measured / predicted)
    form_sd: float

    @property
    def miss(self) -> float:
        """Return the mean miss of held-out cells."""
        return float(np.abs(self.held_out_logs).mean())

    def surer(self, than: Shape) -> float:
        """Return twice the log-likelihood that this shape brings over another; misses that no machine is steady enough for are alike."""
        return float(2 * len(self.held_out_logs) * np.log(max(than.miss, _LEAST_FORM_SD) / max(self.miss, _LEAST_FORM_SD)))


def names(k: dict[str, float]) -> tuple[str, ...]:
    """Return the coefficients that are fitted under constants `k`, in order."""
    return (*FITTED, SECOND_STAIR) if "pass_tokens" in k else FITTED


def best_shape(rows: list[Cell], constants: dict[str, float]) -> Shape:
    """Return the shape that predicts held-out cells best.

    Where they show that the form misses far less than is allowed for, it is looked for again with what they show: the prior bends less.
    """
    found = _best_shape(rows, constants, _FORM_SD)
    shown = residual_sd(rows, found)
    return found if shown > _FORM_SD / 2 else _best_shape(rows, constants, max(shown, _LEAST_FORM_SD))


def residual_sd(rows: list[Cell], shape: Shape) -> float:
    """Return the sd of held-out misses, each cell by how well it was measured: a few disturbed samples are no misfit of the form."""
    weights = 1 / (np.square([r.log_se for r in _by_key(rows)]) + shape.form_sd**2)
    return float(np.sqrt((weights * shape.held_out_logs**2).sum() / weights.sum()))


def _best_shape(rows: list[Cell], constants: dict[str, float], form_sd: float) -> Shape:
    finalists = _fitting(rows, [constants | shape for shape in _shapes(rows)], form_sd)[:_FINALISTS]
    one = min((_held_out(rows, *fit, form_sd) for fit in finalists), key=lambda shape: shape.miss)
    again = _fitting(rows, _second_stairs(rows, [k for k, _ in finalists]), form_sd)[:1]
    two = [_held_out(rows, *fit, form_sd) for fit in again]
    return next((shape for shape in two if shape.surer(one) > _SURE), one)


def _fitting(rows: list[Cell], shapes: list[dict[str, float]], form_sd: float) -> list[tuple[dict[str, float], Array]]:
    """Return shapes with their log-coefficients, those that miss least first."""
    fits = [(k, least(rows, k, form_sd=form_sd)) for k in shapes]
    return sorted(fits, key=lambda fit: float(np.abs(_misses(rows, fit[1], fit[0])).mean()))


def _held_out(rows: list[Cell], k: dict[str, float], logs: Array, form_sd: float) -> Shape:
    return Shape(constants=k, held_out_logs=_leave_one_out(rows, k, logs, form_sd), form_sd=form_sd)


def _stairs(rows: list[Cell]) -> list[float]:
    """Return where kernels may change: in the middle between any two sizes measured."""
    sizes = sorted({round(r.features[0] + r.features[2], 1) for r in rows if r.features[0] + r.features[2] <= _MOST_PACK})
    return [(low + high) / 2 for low, high in itertools.pairwise(sizes)]


def _shapes(rows: list[Cell]) -> list[dict[str, float]]:
    """Return the shapes of one stair that cells can tell apart."""
    packs = [{"pack_tokens": stair} for stair in _stairs(rows)] or [{"pack_tokens": 1.0}]
    return [pack | ({} if norm is None else {"roof_norm": norm}) for norm in _NORMS for pack in packs]


def _second_stairs(rows: list[Cell], shapes: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return shapes with one stair more, below or above the one they have."""
    pairs = [(k, sorted((k["pack_tokens"], stair))) for k in shapes for stair in _stairs(rows) if stair != k["pack_tokens"]]
    return [k | {"pack_tokens": low, "pass_tokens": high} for k, (low, high) in pairs]


def _misses(rows: list[Cell], logs: Array, k: dict[str, float]) -> Array:
    """Return log(measured / predicted) of every row."""
    return np.asarray(np.log([r.median_s for r in rows]) - predicted(logs, np.array([r.features for r in rows]).T, k))


def predicted(logs: Array, features: Array, k: dict[str, float]) -> Array:
    """Return log of the times that `step.step_s` gives steps, features [5, n], under log-coefficients in the order of `names`.

    It goes through `step.entries` and `step.many` itself, so that what is fitted is what a profile then says.
    """
    return np.asarray(np.log(step.many(step.entries(dict(zip(names(k), np.exp(logs), strict=True)), k), features)))


def _slopes(logs: Array, features: Array, k: dict[str, float]) -> Array:
    """Return its derivatives [n, coefficients]: all coefficients moved at once, each in a row of its own."""
    moved = np.vstack([logs, logs + _NUDGE * np.eye(len(logs))])
    found = predicted(moved.T[..., None], features, k)
    return np.asarray((found[1:] - found[0]).T / _NUDGE)


def solve(rows: list[Cell], shape: Shape) -> tuple[Array, Array, list[str]]:
    """Return the log-coefficients, their covariance, and the names that the cells leave open."""
    problem = _Problem(rows, shape.constants, shape.form_sd)
    logs = problem.least()
    covariance = problem.covariance(logs)
    spread = np.sqrt(np.diag(covariance))
    return logs, covariance, [name for name, sd, wide in zip(names(shape.constants), spread, problem.width, strict=True) if sd > 0.5 * wide]


def least(rows: list[Cell], k: dict[str, float], start: Array | None = None, form_sd: float = _FORM_SD) -> Array:
    """Return the log-coefficients alone."""
    return _Problem(rows, k, form_sd).least(start)


class _Problem:
    """Cells and prior: how far coefficients are off, each misfit in standard deviations."""

    def __init__(self, rows: list[Cell], k: dict[str, float], form_sd: float) -> None:
        self.k, self.count = k, len(rows)
        self.features = np.array([r.features for r in rows]).T
        self.measured = np.log([r.median_s for r in rows])
        self.sigma = np.hypot([r.log_se for r in rows], form_sd)
        self.centre, self.width = _prior(names(k), min(r.median_s for r in rows))
        self.low = np.array([0.0 if name in step.MULTIPLIERS else -np.inf for name in names(k)])

    def misfit(self, logs: Array) -> Array:
        """Return the misfit of every cell, then of the prior."""
        return np.concatenate([(predicted(logs, self.features, self.k) - self.measured) / self.sigma, (logs - self.centre) / self.width])

    def slope(self, logs: Array) -> Array:
        """Return its derivatives."""
        return np.concatenate([_slopes(logs, self.features, self.k) / self.sigma[:, None], np.diag(1 / self.width)])

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


def _prior(fitted: tuple[str, ...], shortest_s: float) -> tuple[Array, Array]:
    shares = {name: (share * shortest_s, sd) for name, (share, sd) in _PRIOR_SHARES.items()}
    pairs = [shares.get(name, _PRIOR_MULTIPLIER) for name in fitted]
    return np.log([median for median, _ in pairs]), np.array([sd for _, sd in pairs])


def _leave_one_out(rows: list[Cell], k: dict[str, float], whole: Array, form_sd: float) -> Array:
    """Return log(measured / predicted) of each cell, in the order of `_by_key`, by a fit, begun at that of all, that has not seen it."""
    found: list[float] = []
    for key in dict.fromkeys(r.key for r in rows):
        logs = least([r for r in rows if r.key != key], k, whole, form_sd)
        found.extend(_misses([r for r in rows if r.key == key], logs, k))
    return np.array(found)


def _by_key(rows: list[Cell]) -> list[Cell]:
    """Return the rows cell by cell, the launches of each together."""
    return [r for key in dict.fromkeys(row.key for row in rows) for r in rows if r.key == key]
