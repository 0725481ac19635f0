"""Statistics: hand-computed cases, and intervals that cover as often as they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as reference

from mlsys_bench import stats


def agrees(hits: int, trials: int, share: float) -> bool:
    """Say whether hits of Binomial(trials, share) lie inside its central 99.99 %."""
    low, high = reference.binom.interval(0.9999, trials, share)
    return bool(low <= hits <= high)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_quantiles_are_numpy_s_to_the_last_bit(values: list[float], probabilities: list[float]) -> None:
    assert stats.quantiles(values, probabilities) == np.quantile(values, probabilities).tolist()


def test_an_empty_sample_has_no_quantiles() -> None:
    with pytest.raises(ValueError, match="empty"):
        stats.quantiles([], [0.5])


def test_a_quantile_lies_linearly_between_its_neighbours() -> None:
    """Type 7 of 1, 2, 3, 4 at 0.9: position 0.9 * 3 = 2.7, so 3 + 0.7."""
    assert stats.quantile([4, 1, 3, 2], 0.9) == pytest.approx(3.7)
    assert stats.quantile([5.0], 0.99) == 5.0


@pytest.mark.parametrize("p", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("n", [100, 200])
def test_a_quantile_interval_covers_the_true_quantile_at_least_as_often_as_it_says(p: float, n: int) -> None:
    """2,000 exponential samples: coverage is at least 90 %, short of that by no more than a binomial allows."""
    samples = np.random.default_rng(1).exponential(size=(2000, n))
    intervals = [stats.quantile_interval(sample, p) for sample in samples]
    true = -math.log(1 - p)
    hits = sum(i is not None and i[0] <= true <= i[1] for i in intervals)
    assert hits >= reference.binom.ppf(0.0001, 2000, 0.9)


def test_a_quantile_interval_misses_on_either_side_no_more_than_its_tail() -> None:
    """The exact chances of a miss below and above, for every n up to 150, from the binomial law."""
    for p in (0.5, 0.9, 0.99):
        for n in range(2, 151):
            interval = stats.quantile_interval(np.arange(n, dtype=float), p)
            if interval is not None:
                low, high = interval
                assert reference.binom.cdf(low, n, p) <= 0.05 + 1e-12
                assert reference.binom.sf(high, n, p) <= 0.05 + 1e-12


def test_a_quantile_interval_is_the_tightest_of_its_kind() -> None:
    """The median of 1 … 100 at 90 %: P(N <= 41) = 0.0443 and P(N <= 58) = 0.9557, so the 42nd and the 59th value."""
    assert stats.quantile_interval(np.arange(1.0, 101), 0.5) == (42, 59)


@pytest.mark.parametrize(("p", "enough"), [(0.5, 5), (0.9, 29), (0.95, 59), (0.99, 299)])
def test_enough_is_the_least_sample_with_an_answer(p: float, enough: int) -> None:
    """p**n <= 5 %: some value must lie above the quantile."""
    assert stats.enough_for_quantile(p) == enough
    assert stats.quantile_interval(np.arange(enough, dtype=float), p) is not None
    assert stats.quantile_interval(np.arange(enough - 1, dtype=float), p) is None


def test_small_samples_have_no_interval() -> None:
    assert stats.quantile_interval([], 0.5) is None
    assert stats.quantile_interval([1, 2, 3], 0.5) is None
    assert stats.mean_interval([1.0]) is None
    assert stats.wilson(0, 0) is None
    assert stats.bootstrap([1.0], np.mean) is None


def test_the_interval_of_a_mean_is_students() -> None:
    """1 … 5: mean 3, sd sqrt(2.5), t(4, 0.95) = 2.1318, so 3 ± 2.1318 * sqrt(2.5 / 5)."""
    low, high = stats.mean_interval([1, 2, 3, 4, 5]) or (0, 0)
    assert (low, high) == pytest.approx((3 - 2.131847 * math.sqrt(0.5), 3 + 2.131847 * math.sqrt(0.5)), rel=1e-6)


def test_the_interval_of_a_mean_covers_as_often_as_it_says() -> None:
    samples = np.random.default_rng(2).normal(5, 2, (3000, 8))
    hits = sum((i := stats.mean_interval(s)) is not None and i[0] <= 5 <= i[1] for s in samples)
    assert agrees(hits, 3000, 0.9)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (990, 1000)])
def test_wilson_agrees_with_scipy(successes: int, n: int) -> None:
    interval = reference.binomtest(successes, n).proportion_ci(0.9, "wilson")
    assert stats.wilson(successes, n) == pytest.approx((interval.low, interval.high), abs=1e-12)


def test_a_bootstrap_covers_about_as_often_as_it_says() -> None:
    """Percentile bootstrap of the mean of 40 normal values: 88-91 % in theory; 300 trials, wide by their binomial."""
    samples = np.random.default_rng(3).normal(0, 1, (300, 40))
    hits = sum((i := stats.bootstrap(s, np.mean, resamples=300)) is not None and i[0] <= 0 <= i[1] for s in samples)
    assert agrees(hits, 300, 0.89)


def test_a_bootstrap_repeats() -> None:
    values = np.random.default_rng(4).exponential(size=50)
    assert stats.bootstrap(values, np.median, seed=7) == stats.bootstrap(values, np.median, seed=7)


def test_the_scv_of_small_cases() -> None:
    """1, 3: mean 2, variance 2, so 0.5."""
    assert stats.scv([1, 3]) == pytest.approx(0.5)
    assert stats.scv([2, 2, 2]) == 0
    assert stats.scv([2]) == 0


def test_dispersion_counts_full_windows_only() -> None:
    """Arrivals at 0, 0.5, 1.5, 2.1, 2.2, 2.3, 3.9 in windows of 1 s: counts 2, 1, 3, the last window is not full; variance 1, mean 2."""
    assert stats.index_of_dispersion([0, 0.5, 1.5, 2.1, 2.2, 2.3, 3.9], 1.0) == pytest.approx(0.5)


def test_dispersion_does_not_depend_on_when_the_clock_started() -> None:
    times = np.cumsum(np.random.default_rng(5).exponential(size=500))
    assert stats.index_of_dispersion(times, 4.0) == stats.index_of_dispersion(np.round(times + 1024.0, 9), 4.0)


def test_a_poisson_process_has_dispersion_one() -> None:
    """(windows - 1) * dispersion is close to chi-squared with windows - 1 degrees of freedom."""
    times = np.cumsum(np.random.default_rng(6).exponential(1 / 50, size=100_000))
    windows = int((times.max() - times.min()) // 1.0)
    low, high = reference.chi2.interval(0.9999, windows - 1)
    assert low <= stats.index_of_dispersion(times, 1.0) * (windows - 1) <= high


def test_dispersion_needs_two_windows() -> None:
    with pytest.raises(ValueError, match="fewer than two windows"):
        stats.index_of_dispersion([0.0, 1.0, 2.5], 2.0)


POSITIVE = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=40)


@given(POSITIVE, st.sampled_from([0.25, 4.0]))
def test_ratios_do_not_know_the_unit(values: list[float], scale: float) -> None:
    """A change of unit by a power of two changes neither the SCV nor where the quantile lies."""
    scaled = [scale * v for v in values]
    assert stats.scv(scaled) == pytest.approx(stats.scv(values), rel=1e-9, abs=1e-12)
    assert stats.quantile(scaled, 0.9) == pytest.approx(scale * stats.quantile(values, 0.9))


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=200), st.sampled_from([0.5, 0.8, 0.95]))
def test_an_interval_holds_its_estimate(values: list[float], p: float) -> None:
    checks: list[tuple[Callable[[], tuple[float, float] | None], float]] = [
        (lambda: stats.quantile_interval(values, p), stats.quantile(values, p)),
        (lambda: stats.mean_interval(values), float(np.mean(values))),
    ]
    for interval, estimate in checks:
        found = interval()
        assert found is None or found[0] - 1e-9 <= estimate <= found[1] + 1e-9
