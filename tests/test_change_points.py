"""Change points: planted ones are found where they are, noise alone shows none, outliers and a drifting machine neither."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import stats
from mlsys_bench.gate import changes

NOISE = 0.02
RUNS = 40
Series = Callable[[np.random.Generator], "np.ndarray[tuple[int], np.dtype[np.float64]]"]


def alarms(series: Series, seed: int, runs: int = RUNS) -> int:
    """Return in how many of so many series a change was found."""
    rng = np.random.default_rng(seed)
    return sum(bool(found(series(rng))) for _ in range(runs))


def found(logs: object) -> list[int]:
    fit = changes.steps(logs)  # type: ignore[arg-type]
    assert fit is not None
    return [change.at for change in fit.changes]


def at_most(count: int, runs: int, share: float) -> bool:
    """Say whether the count is compatible with a true share of at most this: the lower end of Wilson's interval lies below it."""
    interval = stats.wilson(count, runs, level=0.99)
    assert interval is not None
    return interval[0] <= share


# ---------------------------------------------------------------- steps


def test_a_step_without_noise_is_found_at_its_place_with_its_size() -> None:
    fit = changes.steps([0.0] * 30 + [math.log(1.05)] * 20)
    assert fit is not None
    (change,) = fit.changes
    assert change.at == 30
    assert change.size == pytest.approx(math.log(1.05))
    assert fit.noise.sd == changes.FLOOR_SD


def test_five_percent_in_noise_of_two_is_found_within_two_results() -> None:
    """Where the step stands is drawn, too.  More than 17 in 20 are found so near, by the lower end of the interval."""
    rng = np.random.default_rng(7)
    near, seen = 0, 0
    for _ in range(RUNS):
        at = int(rng.integers(15, 86))
        places = found(NOISE * rng.standard_normal(100) + math.log(1.05) * (np.arange(100) >= at))
        seen += bool(places)
        near += any(abs(place - at) <= 2 for place in places)
    intervals = [stats.wilson(count, RUNS, level=0.9) for count in (seen, near)]
    assert intervals[0] is not None
    assert intervals[1] is not None
    assert (intervals[0][0] > 0.85, intervals[1][0] > 0.85) == (True, True)


@pytest.mark.parametrize(
    ("series", "share"),
    [
        pytest.param(lambda rng: NOISE * rng.standard_normal(100), 0.05, id="normal"),
        pytest.param(lambda rng: NOISE * rng.standard_t(3, 100), 0.05, id="heavy tails"),
        pytest.param(lambda rng: NOISE * rng.standard_normal(100) + np.linspace(0, 0.1, 100), 0.05, id="10 % slower by and by"),
        pytest.param(lambda rng: NOISE * (rng.standard_normal(100) + np.cumsum(0.1 * rng.standard_normal(100))), 0.15, id="wandering"),
    ],
)
def test_noise_and_drift_alone_raise_few_alarms(series: Series, share: float) -> None:
    """One series in twenty of noise; a machine that wanders at random does make lasting changes, some as large as its noise."""
    assert at_most(alarms(series, seed=11), RUNS, share)


@settings(max_examples=15)
@given(at=st.integers(0, 59), size=st.sampled_from([-0.9, -0.2, 0.2, 3.0]), seed=st.integers(0, 5))
def test_a_single_outlier_changes_nothing(at: int, size: float, seed: int) -> None:
    logs = NOISE * np.random.default_rng(seed).standard_normal(60)
    before = found(logs)
    logs[at] += size
    assert found(logs) == before == []


@settings(max_examples=10)
@given(seed=st.integers(0, 20), scale=st.sampled_from([0.5, 3.0]), level=st.floats(-5, 5))
def test_changes_are_the_same_in_other_units_and_mirrored(seed: int, scale: float, level: float) -> None:
    rng = np.random.default_rng(seed)
    logs = NOISE * rng.standard_normal(50) + 0.1 * (np.arange(50) >= 20)
    assert found(scale * logs + level) == found(logs) == found(-logs) == [20]


def test_the_dynamic_program_finds_what_trying_everything_finds() -> None:
    """All ways of cutting nine values, each part at its best level of the grid, against one pass over them."""
    rng = np.random.default_rng(2)
    levels, price = np.linspace(-2, 6, 33), 6.0
    y = rng.standard_normal(9) + 4 * (np.arange(9) >= 5)

    def cost(cuts: tuple[int, ...]) -> float:
        parts = np.split(y, cuts)
        return sum(float(np.minimum((part[:, None] - levels) ** 2, 9).sum(axis=0).min()) for part in parts) + price * len(cuts)

    every = [cuts for n in range(4) for cuts in itertools.combinations(range(1, 9), n)]
    best = min(every, key=cost)
    value, jumped = changes._fit(y, levels, 0.0, price)
    assert value == pytest.approx(cost(best))
    assert tuple(np.flatnonzero(jumped)) == best == (5,)


def test_fewer_than_ten_results_are_not_judged() -> None:
    assert changes.steps([0.0] * 9) is None
    assert changes.steps([0.0] * 10) is not None


# ---------------------------------------------------------------- ratios of pairs


def test_a_ratio_counts_where_its_own_pairs_carry_it_among_all_that_were_looked_at() -> None:
    """3.5 standard errors are a change among ten ratios (Holm asks 0.05 / 10), 2.5 are not."""
    (change,) = changes.jumps([0.0] * 8 + [0.035, 0.025], changes.Errors(np.full(10, 0.01), 1e6))
    assert (change.at, change.size, change.error) == (8, 0.035, 0.01)


def test_ratios_of_the_same_program_raise_at_most_one_alarm_in_twenty_series() -> None:
    """Runs of 6 to 20 pairs, and a bias of the day that the pairs of one run share."""
    rng = np.random.default_rng(5)
    seen, runs = 0, 200
    for _ in range(runs):
        pairs = rng.choice([6, 10, 15, 20], 100)
        logs = [rng.normal(0, 0.005) + rng.normal(0, 0.026, n) for n in pairs]
        ratios, sds = [float(x.mean()) for x in logs], [float(x.std(ddof=1)) for x in logs]
        seen += bool(changes.jumps(ratios, changes.errors_of(ratios, sds, list(pairs))))
    assert at_most(seen, runs, 0.05)


def test_pairs_that_agree_by_chance_are_not_taken_for_certain() -> None:
    """Six pairs of sd 0 among runs of sd 2.6 % have the error of the others."""
    errors = changes.errors_of([0.0] * 4, [0.026, 0.026, 0.026, 0.0], [6] * 4)
    assert errors.each[3] == errors.each[0]


def test_what_days_add_to_the_error_is_found_from_the_runs_themselves() -> None:
    """Two percent a day beside pairs that explain 0.6 to 1.1 %; nothing is added where the pairs explain all."""
    rng = np.random.default_rng(3)
    pairs = [6, 10, 15, 20] * 250
    logs = [rng.normal(0, 0.02) + rng.normal(0, 0.026, n) for n in pairs]
    ratios, sds = [float(x.mean()) for x in logs], [float(x.std(ddof=1)) for x in logs]
    own = np.maximum(sds, changes.pooled_sd(sds, pairs)) ** 2 / pairs
    errors = changes.errors_of(ratios, sds, pairs)
    assert np.sqrt(errors.each**2 - own) == pytest.approx(0.02, rel=0.1)
    assert changes.errors_of([0.0] * 10, [0.026] * 10, [6] * 10).each == pytest.approx(0.026 / np.sqrt(6), rel=0.1)


def test_the_usual_sd_is_the_true_one_not_that_of_the_median_small_sample() -> None:
    rng = np.random.default_rng(1)
    sds = [float(rng.normal(0, 0.03, 6).std(ddof=1)) for _ in range(2000)]
    assert changes.pooled_sd(sds, [6] * 2000) == pytest.approx(0.03, rel=0.05)
