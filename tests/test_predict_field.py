"""What measured rows say of others: the algebra of the field, each part in two independent ways."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from mlsys_bench.latency import coefficients as names
from mlsys_bench.predict import field
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.types import Lengths

Array = npt.NDArray[np.float64]
P = len(names.NAMES)
ONE = Experiment(
    key="one", group="one", model="llama-3-8b", device="H100-SXM", prompt_tokens=Lengths(mean=1000), output_tokens=Lengths(mean=200),
    concurrency=8,
)  # fmt: skip
GRID = tuple(
    replace(ONE, key=f"{model} {device} {users}", model=model, device=device, concurrency=users)
    for model in ("llama-3-8b", "llama-3-70b")
    for device in ("H100-SXM", "A100-80GB-SXM")
    for users in (1, 8, 64)
)


def points(rows: tuple[Experiment, ...], seed: int = 0) -> field.Points:
    """Return two observations of each experiment, with arbitrary slopes."""
    n = len(rows)
    slope = np.random.default_rng(seed).uniform(0, 1, (2 * n, P)) * np.random.default_rng(seed + 1).uniform(0, 1, (2 * n, P)) ** 3
    groups, place = field.codes(rows, {}), field.place(rows)
    return field.Points(row=np.tile(np.arange(n), 2), kind=np.repeat([0, 1], n), slope=slope, groups=groups, place=place)


def some(p: field.Points, where: npt.NDArray[np.int64]) -> field.Points:
    return replace(p, row=p.row[where], kind=p.kind[where], slope=p.slope[where])


@pytest.fixture(scope="module")
def grid() -> field.Points:
    return points(GRID)


@pytest.fixture(scope="module")
def misfit() -> Array:
    return np.random.default_rng(5).normal(0, 0.1, 2 * len(GRID))


# ---------------------------------------------------------------- known answers


def test_one_observation_moves_a_prediction_of_itself_by_its_share_of_the_variance() -> None:
    """Signal s^2 and noise n^2: the expected signal is y s^2 / (s^2 + n^2), its variance s^2 n^2 / (s^2 + n^2)."""
    p = some(points((ONE,)), np.array([0]))
    shared = sum(field.SCALES[name] ** 2 for name in field.GROUPS)
    by_groups = shared * float(np.sum((p.slope[0] * names.ASSUMED_SD) ** 2))
    by_curve = sum(field.SCALES[f"smooth {name}"] ** 2 for name in ("layout", "served", "spread"))
    signal, noise = by_groups + by_curve, field.SCALES["noise tpot"] ** 2
    given = field.posterior(p, np.array([0.2]), field.SCALES)
    curve, variance = field.kriged(given, p, whole=False)
    groups = float(p.slope[0] @ field.deviations(given, p, 1)[0])
    assert groups + curve[0] == pytest.approx(0.2 * signal / (signal + noise))
    assert groups / curve[0] == pytest.approx(by_groups / by_curve)
    assert variance[0] == pytest.approx(signal * noise / (signal + noise))


def test_the_kernel_is_a_scaled_product_of_slopes_in_shared_groups_and_a_bell_along_the_curve() -> None:
    """Another GPU shares what is of all, client, engine, version, model and spread; eight times the batch is log 8 away."""
    p = points((ONE, replace(ONE, device="A100-80GB-SXM"), replace(ONE, concurrency=64)))
    found = field.kernel(some(p, np.array([0])), p, field.SCALES)[0]
    same = ("all", "client", "engine", "version", "model", "model engine", "spread")
    across = p.slope[0] * names.ASSUMED_SD**2 @ p.slope[1]
    curve = field.SCALES["smooth spread"] ** 2
    assert found[1] == pytest.approx(sum(field.SCALES[name] ** 2 for name in same) * across + curve)
    near = math.exp(-0.5 * (math.log(8) / field.SCALES["per e-fold of batch"]) ** 2)
    every = sum(field.SCALES[name] ** 2 for name in field.GROUPS)
    curves = sum(field.SCALES[f"smooth {name}"] ** 2 for name in ("layout", "served", "spread"))
    assert found[2] == pytest.approx(every * float(p.slope[0] * names.ASSUMED_SD**2 @ p.slope[2]) + curves * near)


def test_with_nothing_measured_only_the_spread_is_left() -> None:
    p, none = points((ONE,)), np.zeros(0, dtype=np.int64)
    given = field.posterior(replace(some(p, none), slope=np.zeros((0, P))), np.zeros(0), field.SCALES)
    assert not field.deviations(given, p, 1).any()
    curve, variance = field.kriged(given, p, whole=False)
    assert not curve.any()
    assert variance == pytest.approx(np.diag(field.kernel(p, p, field.SCALES)))
    every = sum(field.SCALES[name] ** 2 for name in field.GROUPS)
    assert np.diag(field.spread(given, p)) == pytest.approx(every * names.ASSUMED_SD**2)


# ---------------------------------------------------------------- two ways


def test_kriging_is_the_conditional_of_the_joint_normal(grid: field.Points, misfit: Array) -> None:
    """Precision matrices: of a joint normal with precision L, the conditional of a given b has precision L_aa and mean -L_aa^-1 L_ab b."""
    given_rows, asked_rows = np.flatnonzero(grid.row < 9), np.flatnonzero(grid.row >= 9)
    a, b = some(grid, asked_rows), some(grid, given_rows)
    given = field.posterior(b, misfit[given_rows], field.SCALES)
    whole = field.kernel(grid, grid, field.SCALES)
    whole[given_rows, given_rows] += field.noise(b, field.SCALES)
    precision = np.linalg.inv(whole)
    inside = np.linalg.inv(precision[np.ix_(asked_rows, asked_rows)])
    mean = -inside @ precision[np.ix_(asked_rows, given_rows)] @ misfit[given_rows]
    curve, variance = field.kriged(given, a, whole=False)
    deviations = field.deviations(given, a, len(GRID))
    assert np.einsum("ij,ij->i", a.slope, deviations[a.row]) + curve == pytest.approx(mean, abs=1e-8)
    assert variance == pytest.approx(np.diag(inside), rel=1e-6)
    assert field.kriged(given, a, whole=True)[0] == pytest.approx(mean, abs=1e-8)


def test_the_spread_of_the_coefficients_is_their_conditional_covariance(grid: field.Points, misfit: Array) -> None:
    """By slopes of unit vectors: each coefficient is itself an observation without noise or curve."""
    rows = np.flatnonzero(grid.row >= 1)
    given = field.posterior(some(grid, rows), misfit[rows], field.SCALES)
    no_curve = {name: 0.0 if name.startswith("smooth") else value for name, value in field.SCALES.items()}
    unit = replace(grid, row=np.zeros(P, dtype=np.int64), kind=np.zeros(P, dtype=np.int64), slope=np.eye(P))
    across = field.kernel(unit, given.points, no_curve)
    expected = field.kernel(unit, unit, no_curve) - across @ given.inverse @ across.T
    assert field.spread(given, grid) == pytest.approx(expected, abs=1e-9)
    assert field.deviations(given, grid, 1)[0] == pytest.approx(across @ given.alpha, abs=1e-9)
    assert np.linalg.eigvalsh(expected).min() > -1e-12


@pytest.mark.parametrize("name", ["model", "device", "layout"])
def test_leaving_a_block_out_is_learning_without_it(grid: field.Points, misfit: Array, name: str) -> None:
    block = grid.groups[name][grid.row]
    error, sd = field.left_out(field.posterior(grid, misfit, field.SCALES), block)
    for value in np.unique(block):
        out, kept = np.flatnonzero(block == value), np.flatnonzero(block != value)
        given = field.posterior(some(grid, kept), misfit[kept], field.SCALES)
        asked = some(grid, out)
        curve, variance = field.kriged(given, asked, whole=False)
        predicted = np.einsum("ij,ij->i", asked.slope, field.deviations(given, grid, len(GRID))[asked.row]) + curve
        assert misfit[out] - predicted == pytest.approx(error[out], abs=1e-8)
        assert np.sqrt(variance + field.noise(asked, field.SCALES)) == pytest.approx(sd[out], rel=1e-6)


def test_the_likelihood_is_that_of_a_normal_law_and_its_gradient_its_slope(grid: field.Points, misfit: Array) -> None:
    from scipy.stats import multivariate_normal

    logs = np.log(list(field.SCALES.values()))
    trust = np.linspace(0.3, 1.0, len(misfit))

    def cost(at: Array) -> float:
        scales = dict(zip(field.SCALES, np.exp(at).tolist(), strict=True))
        covariance = field.kernel(grid, grid, scales) + np.diag(field.noise(grid, scales) / trust)
        return -float(multivariate_normal(np.zeros(len(misfit)), covariance).logpdf(misfit)) - 0.5 * len(misfit) * math.log(2 * math.pi)

    value, gradient = field.likelihood(logs, grid, misfit, trust)
    assert value == pytest.approx(cost(logs), abs=1e-8)
    numeric = [(cost(logs + 1e-4 * e) - cost(logs - 1e-4 * e)) / 2e-4 for e in np.eye(len(logs))]
    assert gradient == pytest.approx(numeric, rel=5e-3, abs=1e-3)


# ---------------------------------------------------------------- doubt


def test_a_row_that_its_neighbours_contradict_hardly_counts() -> None:
    """A sweep as the field itself would draw it, but one time per token is three times what it was."""
    sweep = points(tuple(replace(ONE, key=str(users), concurrency=users) for users in (4, 6, 8, 12, 16, 24, 32, 48)))
    sweep = replace(sweep, slope=np.repeat(sweep.slope[[0, 8]], 8, axis=0))
    covariance = field.kernel(sweep, sweep, field.SCALES) + np.diag(field.noise(sweep, field.SCALES))
    right = np.linalg.cholesky(covariance) @ np.random.default_rng(2).normal(size=len(covariance))
    wrong = right + math.log(3) * (np.arange(16) == 4)
    everyone, kept = np.arange(16), np.flatnonzero(np.arange(16) != 4)
    trust = field.trusted(sweep, wrong, field.SCALES, everyone)
    assert trust[4] == trust.min() < 0.01
    assert np.median(trust) > 0.5

    def said(which: npt.NDArray[np.int64], how_far: Array | None) -> Array:
        given = field.posterior(some(sweep, which), wrong[which], field.SCALES, how_far)
        curve, _ = field.kriged(given, sweep, whole=False)
        return np.asarray(np.einsum("ij,ij->i", sweep.slope, field.deviations(given, sweep, 8)[sweep.row]) + curve)

    doubting, trusting, without = said(everyone, trust), said(everyone, None), said(kept, trust[kept])
    assert np.abs(doubting - without).max() < 0.1 * np.abs(trusting - without).max()


def test_few_rows_are_all_trusted() -> None:
    p = points(GRID[:2])
    assert (field.trusted(p, np.array([0.0, 5.0, 0.0, 0.0]), field.SCALES, np.arange(4)) == 1).all()


def test_new_experiments_keep_the_groups_of_known_ones() -> None:
    known: dict[str, dict[object, int]] = {}
    first = field.codes((ONE,), known)
    again = field.codes((replace(ONE, device="L4"), ONE), known)
    assert [again[name][1] == first[name][0] for name in field.GROUPS] == [True] * len(field.GROUPS)
    assert again["device"][0] != first["device"][0]
    assert again["model"][0] == first["model"][0]


# ---------------------------------------------------------------- how far it reaches


def test_the_field_is_believed_as_it_is_near_rows_and_less_the_less_it_knows() -> None:
    """Half of a deviation holds halfway between knots with shares 1 and 0; sds are interpolated likewise, and end at the last."""
    reach = field.Reach(claimed=np.log([0.1, 0.4]), share=np.array([1.0, 0.0]), needed=np.log([0.1, 0.9]))
    shift, sd = reach.of(np.full(4, 2.0), np.array([0.01, 0.1, 0.2, 5.0]))
    assert shift == pytest.approx([2.0, 2.0, 1.0, 0.0])
    assert sd == pytest.approx([0.01, 0.1, 0.3, 0.9])


@pytest.mark.parametrize(("common", "least", "most"), [(0.3, 0.8, 1.0), (0.0, 0.0, 0.35)])
def test_what_is_left_out_says_how_far_the_field_is_to_be_believed(common: float, least: float, most: float) -> None:
    """60 GPUs with deviations that the field takes for those of their architecture: true of one world, of the other each has its own."""
    rng, gpus, each = np.random.default_rng(3), 60, 8
    code = np.repeat(np.arange(gpus), each)
    groups = {name: np.arange(len(code)) + 1000 for name in field.GROUPS} | {"generation": code // 6, "device": code}
    slope = np.zeros((len(code), P))
    slope[:, 0] = 1.0
    scales = field.SCALES | {f"smooth {name}": 1e-6 for name in ("layout", "served", "spread")} | {"generation": 2.0, "device": 1.0}
    p = field.Points(
        row=np.arange(len(code)), kind=np.zeros(len(code), dtype=np.int64), slope=slope, groups=groups, place=np.zeros((len(code), 3))
    )
    own = rng.normal(0, 0.2, gpus)
    misfit = rng.normal(0, common, gpus // 6)[code // 6] + own[code] + rng.normal(0, 0.02, len(code))
    reach = field.reach(field.posterior(p, misfit, scales), 0, 1.0, np.arange(len(code)), [code])
    assert reach.share[0] == 1.0
    assert least <= reach.share[-1] <= most
    wanted = math.sqrt(0.2**2 + 0.02**2)
    assert wanted < math.exp(reach.needed[-1]) < 1.6 * wanted
