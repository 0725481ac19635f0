"""What measured rows say of unmeasured ones: deviations of the coefficients by group, and of the figures along a curve.

The logarithm of a figure y of experiment i is taken to be

    y_i = f(x + sum over groups g of d_g(i)) + r_i + noise,

with f the physics of `figures`, x the coefficients of all, d_g a deviation of the coefficients shared by the experiments of a group (the
same GPU, engine, model, layout, …), normal with sd `scale_g` times the coefficient's own, and r a smooth deviation of the figure itself
over batch size and lengths within one layout.  Linear in d, this is a Gaussian process with the kernel

    cov(y_i, y_j) = sum_g scale_g^2 [g(i) = g(j)] J_i S J_j' + smooth terms,     J = df / d log(coefficient), S = diag(sd^2),

so that one formula serves hardware nobody measured (only the spread is left), one measured point, and a whole sweep.  Rows that their
neighbours contradict count less (Student's t with 4 degrees of freedom, by iterated reweighting), for published tables hold mistakes.
Kriging: Rasmussen and Williams, Gaussian Processes for Machine Learning, 2006, eq. 2.22; leaving blocks out: eq. 5.12 for blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlsys_bench import hardware
from mlsys_bench.latency import coefficients as names
from mlsys_bench.predict.experiment import Experiment

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
FREEDOM = 4.0  # of Student's t
Z90 = 1.645
_APART_SDS = 3.0  # of the noise: repeats that lie farther apart contradict each other
_ENOUGH = 30  # rows that say how heavy the noise's tails are
_PIECE = 400  # rows that say one knot of `Reach`
_APART = 0.1  # of log(sd), between its first two knots

GROUPS: dict[str, Callable[[Experiment], Hashable]] = {
    "all": lambda e: 0,
    "client": lambda e: (e.concurrency is None, e.greedy),
    "generation": lambda e: hardware.find(e.device).arch,
    "device": lambda e: e.device,
    "engine": lambda e: e.engine,
    "version": lambda e: (e.engine, e.engine_version),
    "model": lambda e: e.model,
    "device engine": lambda e: (e.device, e.engine),
    "model engine": lambda e: (e.model, e.engine, e.precision),
    "model device": lambda e: (e.model, e.device, e.precision),
    "served": lambda e: (e.model, e.device, e.engine, e.precision, e.speculative, e.disaggregated),
    "spread": lambda e: (e.engine, e.model, e.attention_dp > 1, e.ep > 1, e.speculative, e.disaggregated),
    "devices": lambda e: (e.gpus, e.engine, e.device),
    "layout": lambda e: (*e.layout, e.engine, e.engine_version, e.speculative, e.disaggregated, e.replicas, e.prefill_gpus, e.greedy),
}
SCALES: dict[str, float] = {
    "all": 0.5, "client": 0.2, "generation": 0.3, "device": 0.15, "engine": 0.3, "version": 0.2, "model": 0.3, "device engine": 0.2,
    "model engine": 0.2, "model device": 0.2, "served": 0.2, "spread": 0.2, "devices": 0.15, "layout": 0.15,
    "smooth layout": 0.08, "smooth served": 0.12, "smooth spread": 0.1, "ttft": 3.0,
    "per e-fold of batch": 1.6, "per e-fold of length": 3.5, "noise tpot": 0.02, "noise ttft": 0.05,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """Observations: the row of each, its kind (0 time per token, 1 TTFT), its slope by the coefficients, and its place on the curve."""

    row: Ints
    kind: Ints
    slope: Array  # [n, p]
    groups: dict[str, Ints]  # by row of the table, codes that agree within a group
    place: Array  # [rows, 3] log of batch size, prompt and output length


def codes(experiments: Sequence[Experiment], known: dict[str, dict[Hashable, int]]) -> dict[str, Ints]:
    """Return the group of each experiment as numbers; `known` is filled and keeps them the same for later experiments."""
    found = {}
    for name, key in GROUPS.items():
        seen = known.setdefault(name, {})
        found[name] = np.array([seen.setdefault(key(e), len(seen)) for e in experiments], dtype=np.int64)
    return found


def place(experiments: Sequence[Experiment]) -> Array:
    """Return where experiments lie on the curve of their layout."""
    return np.array([[math.log(_load(e)), math.log(e.prompt_tokens.mean), math.log(e.output_tokens.mean)] for e in experiments]).reshape(
        -1, 3
    )


def _load(e: Experiment) -> float:
    """Return the batch size, or for an open loop a number that grows as it does."""
    return max(e.concurrency or (e.rate_per_s or 1.0) * e.output_tokens.mean / 50.0, 0.1) / e.replicas


def sharing(a: Points, b: Points, scales: Mapping[str, float]) -> Array:
    """Return [len(a), len(b)] the sum over groups that two observations share of scale^2."""
    total = np.zeros((len(a.row), len(b.row)))
    for name in GROUPS:
        total += scales[name] ** 2 * (a.groups[name][a.row][:, None] == b.groups[name][b.row][None])
    return total


def smooth(a: Points, b: Points, scales: Mapping[str, float]) -> Array:
    """Return the covariance of the smooth deviations of two sets of observations."""
    pa, pb = a.place[a.row], b.place[b.row]
    lengths = np.array([scales["per e-fold of batch"], scales["per e-fold of length"], scales["per e-fold of length"]])
    far = sum(((pa[:, i][:, None] - pb[:, i][None]) / lengths[i]) ** 2 for i in range(3))
    near = np.exp(-0.5 * np.asarray(far))
    total = np.zeros_like(near)
    for name in ("layout", "served", "spread"):
        total += scales[f"smooth {name}"] ** 2 * (a.groups[name][a.row][:, None] == b.groups[name][b.row][None])
    size_a, size_b = (np.where(p.kind == 0, 1.0, scales["ttft"]) for p in (a, b))
    found: Array = total * near * (a.kind[:, None] == b.kind[None]) * size_a[:, None] * size_b[None]
    return found


def kernel(a: Points, b: Points, scales: Mapping[str, float]) -> Array:
    """Return the covariance of two sets of observations, noise left out."""
    found: Array = sharing(a, b, scales) * ((a.slope * names.ASSUMED_SD**2) @ b.slope.T) + smooth(a, b, scales)
    return found


def noise(p: Points, scales: Mapping[str, float]) -> Array:
    """Return the variance of each observation's own noise."""
    return np.where(p.kind == 0, scales["noise tpot"], scales["noise ttft"]) ** 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Posterior:
    """Observations with their misfit to f(x), and what is needed to say something of others."""

    points: Points
    misfit: Array
    inverse: Array  # of the covariance, noise included
    alpha: Array
    trust: Array
    scales: dict[str, float]


def posterior(p: Points, misfit: Array, scales: dict[str, float], trust: Array | None = None, clean: Array | None = None) -> Posterior:
    """Return the posterior given observations; `trust` in (0, 1] divides their noise variance, `clean` is their kernel if known."""
    covariance = kernel(p, p, scales) if clean is None else clean.copy()
    trust = np.ones(len(misfit)) if trust is None else trust
    covariance[np.diag_indices(len(misfit))] += noise(p, scales) / trust
    inverse = _inverse(covariance) if len(misfit) else covariance
    return Posterior(points=p, misfit=misfit, inverse=inverse, alpha=inverse @ misfit, trust=trust, scales=scales)


def _inverse(covariance: Array) -> Array:
    """Return the inverse of a symmetric positive definite matrix."""
    from scipy.linalg import lapack

    factor, trouble = lapack.dpotrf(covariance, lower=1, overwrite_a=1)
    if trouble:
        raise np.linalg.LinAlgError(f"covariance is not positive definite at row {trouble}")
    half, _ = lapack.dpotri(factor, lower=1, overwrite_c=1)
    lower = np.tril(half)
    return np.asarray(lower + np.tril(lower, -1).T)


def deviations(given: Posterior, p: Points, rows: int) -> Array:
    """Return [rows, p] the expected deviation of the coefficients of other experiments."""
    first = Points(row=np.arange(rows), kind=np.zeros(rows, dtype=np.int64), slope=np.zeros((rows, 0)), groups=p.groups, place=p.place)
    shared = sharing(first, given.points, given.scales)
    return np.asarray((shared * given.alpha) @ given.points.slope * names.ASSUMED_SD**2)


def spread(given: Posterior, p: Points) -> Array:
    """Return the covariance [p, p] of the log-coefficients of the first experiment of `p`."""
    first = Points(
        row=np.zeros(1, dtype=np.int64), kind=np.zeros(1, dtype=np.int64), slope=np.zeros((1, 0)), groups=p.groups, place=p.place
    )
    variance = names.ASSUMED_SD**2
    before = np.diag(variance) * sum(given.scales[name] ** 2 for name in GROUPS)
    if not len(given.misfit):
        return np.asarray(before)
    across = (sharing(first, given.points, given.scales)[0][:, None] * given.points.slope) * variance
    return np.asarray(before - across.T @ given.inverse @ across)


def kriged(given: Posterior, p: Points, *, whole: bool) -> tuple[Array, Array]:
    """Return the expected deviation of other observations, and the variance of all but their noise.

    `whole`: with what the deviations of the coefficients make of them, to first order; else the smooth deviation alone, for figures that
    were evaluated at the deviated coefficients.
    """
    across = kernel(p, given.points, given.scales)
    mean = (across if whole else smooth(p, given.points, given.scales)) @ given.alpha
    own = _own(p, given.scales) - np.einsum("ij,jk,ik->i", across, given.inverse, across, optimize=True)
    return mean, np.maximum(own, 0.0)


def left_out(given: Posterior, block: Ints) -> tuple[Array, Array]:
    """Return misfit minus prediction of each observation by all others outside its block, and the sd of that, noise included."""
    error, sd = np.zeros(len(block)), np.zeros(len(block))
    order = np.argsort(block, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(block[order])) + 1):
        inside = np.linalg.inv(given.inverse[np.ix_(members, members)])
        error[members], sd[members] = inside @ given.alpha[members], np.sqrt(np.diag(inside))
    return error, sd


def heavier(given: Posterior, repeats: Ints) -> Array:
    """Return by kind how much more the noise of a new row varies than that of trusted ones, so that 90 % intervals held 90 % of the rows.

    Each row is predicted without its repeats.  Mistakes of tables are noise of the next table too.
    """
    error, sd = left_out(given, repeats)
    own = noise(given.points, given.scales)
    known = np.maximum(sd**2 - own / given.trust, 0.0)
    found = np.ones(2)
    for kind in (0, 1):
        at = given.points.kind == kind
        if np.count_nonzero(at) >= _ENOUGH:
            needed = ((error[at] / Z90) ** 2 - known[at]) / own[at]
            found[kind] = max(1.0, float(np.quantile(needed, 0.9)))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far the field is to be believed, by the sd that it claims: the share of its deviation that holds, and the sd its intervals need.

    Interpolated between knots; below the first, where rows near by are known, the field is right as it is, above the last constant.
    """

    claimed: Array  # logarithms, rising
    share: Array  # in [0, 1], never rising
    needed: Array  # logarithms, never falling

    def of(self, deviation: Array, claimed: Array) -> tuple[Array, Array]:
        """Return what holds of deviations for which the field claims an sd, and the sd that their intervals need."""
        if not len(self.claimed):
            return deviation, claimed
        logs = np.log(claimed)
        sd = np.where(logs < self.claimed[0], claimed, np.exp(np.interp(logs, self.claimed, self.needed)))
        return deviation * np.interp(logs, self.claimed, self.share), sd


def reach(given: Posterior, kind: int, heavier: float, repeats: Ints, blocks: Sequence[Ints]) -> Reach:
    """Return how far the field is to be believed about a kind of figure, seen where whole groups (a layout, a GPU, a model) are left out.

    The left-out rows are put in order by the sd claimed for them and cut into pieces.  In each, the share of the field's deviation is taken
    that leaves the least absolute errors, and the sd whose 90 % interval holds 0.9 of these: stacking (Breiman 1996, Machine Learning 24)
    and conformal prediction scaled by the claimed sd (Lei et al. 2018, JASA 113, section 5.2), groups left out whole to be exchangeable.
    Few models do not say what a new one does, so the claimed sd stands where it is wider, up to the widest that was needed.
    """
    from scipy.optimize import isotonic_regression

    at = given.points.kind == kind
    if np.count_nonzero(at) < _PIECE:
        return Reach(claimed=np.zeros(0), share=np.zeros(0), needed=np.zeros(0))
    near = float(np.median(np.log(_claims(given, heavier, repeats)[0][at])))
    found = [_claims(given, heavier, block) for block in blocks]
    claimed, error = (np.concatenate([pair[i][at] for pair in found]) for i in (0, 1))
    misfit, models = np.tile(given.misfit[at], len(found)), given.points.groups["model"][given.points.row][at]
    knots = [(near, 1.0, near)]
    for piece in np.array_split(np.argsort(claimed, kind="stable"), max(1, len(claimed) // _PIECE)):
        centre = float(np.median(np.log(claimed[piece])))
        left = misfit[piece][:, None] - np.linspace(0, 1, 21) * (misfit - error)[piece][:, None]
        best = int(np.argmin(np.abs(left).mean(axis=0)))
        if centre > near + _APART:
            knots.append((centre, best / 20, math.log(_bound(np.abs(left[:, best]), np.tile(models, len(found))[piece]) / Z90)))
    at_sd, share, needed = np.array(knots).T
    wide = np.maximum(needed, np.minimum(at_sd, needed.max()))  # a claim stands where wider, up to what was needed at most
    return Reach(claimed=at_sd, share=-isotonic_regression(-share).x, needed=isotonic_regression(wide).x)


def _bound(errors: Array, groups: Ints, draws: int = 40) -> float:
    """Return what 0.9 of the errors of another draw of groups stay below nine times out of ten: few groups say little of a new one."""
    members = [errors[groups == group] for group in np.unique(groups)]
    rng = np.random.default_rng(0)
    found = [np.quantile(np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))]), 0.9) for _ in range(draws)]
    return float(np.quantile(found, 0.9))


def _claims(given: Posterior, heavier: float, block: Ints) -> tuple[Array, Array]:
    """Return the sd claimed for each observation as a new row with its block left out, and its error."""
    error, sd = left_out(given, block)
    own = noise(given.points, given.scales)
    return np.sqrt(np.maximum(sd**2 - own / given.trust, 0.0) + own * heavier), error


def likelihood(logs: Array, p: Points, misfit: Array, trust: Array) -> tuple[float, Array]:
    """Return minus the log of the marginal likelihood of scales, up to a constant, and its gradient by their logarithms (`SCALES`' order).

    Rasmussen and Williams 2006, eq. 5.9: dL/dh = tr((K^-1 - a a') dK/dh) / 2.
    """
    scales = dict(zip(SCALES, np.exp(logs).tolist(), strict=True))
    given = posterior(p, misfit, scales, trust)
    sign, size = np.linalg.slogdet(given.inverse)
    inner = given.inverse - np.outer(given.alpha, given.alpha)
    slopes = (p.slope * names.ASSUMED_SD**2) @ p.slope.T
    gradient = dict.fromkeys(SCALES, 0.0)
    for name in GROUPS:
        same = p.groups[name][p.row][:, None] == p.groups[name][p.row][None]
        gradient[name] = scales[name] ** 2 * float(np.sum(inner * slopes, where=same))
    for name in ("smooth layout", "smooth served", "smooth spread", "ttft", "per e-fold of batch", "per e-fold of length"):
        moved = scales | {name: scales[name] * 1.001}
        gradient[name] = 0.5 * float(np.sum(inner * (smooth(p, p, moved) - smooth(p, p, scales)))) / np.log(1.001)
    for kind, name in enumerate(("noise tpot", "noise ttft")):
        at = p.kind == kind
        gradient[name] = float(np.sum(np.diag(inner)[at] / trust[at])) * scales[name] ** 2
    return 0.5 * float(misfit @ given.alpha) - 0.5 * float(size) * sign, np.array([gradient[name] for name in SCALES])


def trusted(p: Points, misfit: Array, scales: dict[str, float], repeats: Ints, clean: Array | None = None, rounds: int = 3) -> Array:
    """Return how far to trust each observation, by how badly the others predict it."""
    trust = np.ones(len(misfit))
    if len(misfit) < 6:
        return trust
    clean = kernel(p, p, scales) if clean is None else clean
    for _ in range(rounds):
        error, sd = left_out(posterior(p, misfit, scales, trust, clean), repeats)
        square = (error / sd) ** 2
        trust = np.minimum(1.0, FREEDOM / (FREEDOM - 1 + square)) * np.where(square > FREEDOM, FREEDOM / square, 1.0)
    return trust


def agreeing(p: Points, misfit: Array, scales: Mapping[str, float], repeats: Ints) -> Array:
    """Return how far to trust observations that were made more than once: where they lie far apart, by the variance among them."""
    trust, own = np.ones(len(misfit)), noise(p, scales)
    for kind in (0, 1):
        for again in np.unique(repeats):
            at = np.flatnonzero((p.kind == kind) & (repeats == again))
            if len(at) > 1 and (apart := float(np.var(misfit[at], ddof=1))) > _APART_SDS**2 * own[at[0]]:
                trust[at] = own[at] / apart
    return trust


def _own(p: Points, scales: Mapping[str, float]) -> Array:
    """Return the prior variance of each observation."""
    by_groups = sum(scales[name] ** 2 for name in GROUPS) * np.einsum("ij,j,ij->i", p.slope, names.ASSUMED_SD**2, p.slope)
    by_curve = sum(scales[f"smooth {name}"] ** 2 for name in ("layout", "served", "spread"))
    return np.asarray(by_groups + by_curve * np.where(p.kind == 0, 1.0, scales["ttft"]) ** 2)
