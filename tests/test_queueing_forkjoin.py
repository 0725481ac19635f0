"""The slowest of N, and fork-join queues, against the truth table, each other and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.des.forkjoin_sim import simulate
from mlsys_bench.queueing.forkjoin import Joined, common_factor, flatto_hahn, fork_join, harmonic, max_of, mean_and_variance, nelson_tantawi
from mlsys_bench.queueing.laws import Exponential, parse_law
from mlsys_bench.queueing.station import ForkJoin
from mlsys_bench.queueing.times import Time
from tests import truth_table


def rows(model: str) -> list[tuple[dict[str, str], str, float, float]]:
    """Return (parameters, quantity, value, precision) of one model's rows."""
    found = [row for row in truth_table.rows() if row["model"].startswith(model)]
    assert found
    return [
        (dict(p.split("=") for p in row["parameters"].split(";")), row["quantity"], float(row["value"]), float(row["precision_abs"]))
        for row in found
    ]


def read(time: Time, quantity: str) -> float:
    return time.mean_s if quantity.endswith("mean") else time.quantile_s(int(quantity[-2:]) / 100)


def test_the_slowest_of_n_reproduces_the_truth_table() -> None:
    for p, quantity, expected, _ in rows("MAX"):
        assert read(max_of(Exponential(float(p["mean"])), int(p["N"])), quantity) == pytest.approx(expected, rel=1e-12)


def test_fork_join_reproduces_the_truth_table() -> None:
    """Exact rows to 1e-6, simulated ones within 1 % or 1.5 times their precision."""
    wrong = []
    for p, quantity, expected, precision in rows("FORKJOIN"):
        found = read(fork_join(float(p["rho"]), 1.0, int(p["N"]))[0].sojourn, quantity)
        bar = 1e-6 * expected if precision < 1e-6 else max(0.01 * expected, 1.5 * precision)
        if abs(found - expected) > bar:
            wrong.append((p, quantity, expected, found))
    assert wrong == []


@pytest.mark.parametrize("notation", ["exp", "det", "erl:3", "gamma:0.3", "logn:1", "h2:4", "unif", "mix:0.9:1:10"])
def test_the_slowest_of_five_agrees_with_draws(notation: str) -> None:
    law = parse_law(notation)
    slowest = max_of(law, 5)
    drawn = law.sample(np.random.default_rng(1), (100_000, 5)).max(axis=1)
    assert abs(slowest.mean_s - drawn.mean()) <= 4 * drawn.std() / math.sqrt(len(drawn)) + 1e-12
    assert slowest.variance_s2 == pytest.approx(drawn.var(), rel=0.1, abs=1e-12)
    assert abs(float((drawn > slowest.quantile_s(0.9)).mean()) - slowest.p_over(slowest.quantile_s(0.9))) < 0.005


def test_the_slowest_of_exponentials_has_the_harmonic_mean() -> None:
    """By quadrature too: H_4 = 25 / 12, and the variance 1 + 1/4 + 1/9 + 1/16."""
    slowest = max_of(Exponential(2.0), 4)
    assert slowest.mean_s == pytest.approx(2 * 25 / 12, rel=1e-14)
    assert mean_and_variance(slowest) == pytest.approx((2 * 25 / 12, 4 * (1 + 1 / 4 + 1 / 9 + 1 / 16)), rel=1e-8)
    assert max_of(slowest, 2).quantile_s(0.9) == pytest.approx(max_of(Exponential(2.0), 8).quantile_s(0.9), rel=1e-9)


def test_the_chain_of_two_branches_gives_the_closed_mean() -> None:
    """The integral of P(T > t) from the chain against (12 - rho) / 8 T: solved to 0.93, read on from there at 0.97."""
    for rho in (0.2, 0.7, 0.93, 0.97):
        task_s = 1 / (1 - rho)
        cuts = [task_s * x for x in (0, 0.5, 1, 2, 4, 6, 9, 14, 24, 44)]
        assert mean_and_variance(Joined(rho, task_s, 2), cuts)[0] == pytest.approx(flatto_hahn(rho, 1.0), rel=1e-5)


def test_light_traffic_is_a_split_without_queues() -> None:
    """A task then waits for nobody: the slowest of N services."""
    for n in (2, 4):
        queue, _, _ = fork_join(1e-4, 1.0, n)
        assert queue.sojourn_s == pytest.approx(harmonic(n), rel=1e-3)
        assert queue.sojourn_quantile_s(0.99) == pytest.approx(max_of(Exponential(1.0), n).quantile_s(0.99), rel=1e-3)


def test_sixteen_branches_agree_with_a_simulation_within_the_error_it_states() -> None:
    queue, error, why = fork_join(0.5, 1.0, 16)
    visits = simulate(ForkJoin(arrivals=Exponential(2.0), service=Exponential(1.0), branches=16), np.random.default_rng(3), 10, 20_000)
    sojourn = visits.sojourn_s[:, 1000:]
    half_width = 2.3 * sojourn.mean(axis=1).std(ddof=1) / math.sqrt(10) / sojourn.mean()
    assert abs(queue.sojourn_s / sojourn.mean() - 1) < error + half_width
    for p in (0.5, 0.9, 0.99):
        each = np.quantile(sojourn, p, axis=1)
        assert abs(queue.sojourn_quantile_s(p) / each.mean() - 1) < error + 3 * each.std(ddof=1) / math.sqrt(10) / each.mean()
    assert "independent" in why


def test_the_scaling_formula_is_near_and_starts_from_two() -> None:
    assert nelson_tantawi(0.8, 1.0, 2) == pytest.approx(flatto_hahn(0.8, 1.0))
    for n in (4, 8, 32):
        assert nelson_tantawi(0.8, 1.0, n) == pytest.approx(fork_join(0.8, 1.0, n)[0].sojourn_s, rel=0.05)


def test_the_common_factor_has_the_arcsine_law_at_the_median() -> None:
    """P(X > 0, Y > 0) - 1/4 = arcsin(r) / 2 pi."""
    r = np.array([0.0, 0.1, 0.5, 0.9])
    assert common_factor(np.zeros(4), np.arcsin(r) / (2 * math.pi)) == pytest.approx(r, abs=1e-10)


@settings(max_examples=8)
@given(st.floats(0.01, 0.97), st.integers(2, 40), st.floats(1e-3, 1e3))
def test_jobs_take_longer_than_a_task_and_less_than_independent_ones(rho: float, n: int, service_s: float) -> None:
    queue, error, _ = fork_join(rho / service_s, service_s, n)
    task_s = service_s / (1 - rho)
    most = max_of(Exponential(task_s), n)
    assert task_s < queue.sojourn_s <= most.mean_s * (1 + 1e-9)
    for p in (0.5, 0.99):
        found = queue.sojourn_quantile_s(p)
        assert -task_s * math.log(1 - p) <= found <= most.quantile_s(p) * (1 + 1e-9)
        assert queue.sojourn_p(found) == pytest.approx(1 - p, rel=1e-6)
        assert fork_join(rho / service_s, service_s, n + 1)[0].sojourn_quantile_s(p) >= found
    assert 0 < error < 0.05
    assert queue.sojourn.variance_s2 > 0


def test_nonsense_and_saturation_are_refused() -> None:
    with pytest.raises(Overload):
        fork_join(1.0, 1.0, 4)
    for bad in (lambda: fork_join(0.5, 1.0, 0), lambda: max_of(Exponential(1.0), 0), lambda: nelson_tantawi(0.5, 1.0, 1)):
        with pytest.raises(BadInput):
            bad()
    assert fork_join(0.5, 1.0, 1)[0].sojourn_s == pytest.approx(2.0)
