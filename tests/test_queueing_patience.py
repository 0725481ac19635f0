"""Customers who give up: the truth table, birth-death chains, textbook limits, and one simulation."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import stats
from mlsys_bench.errors import BadInput
from mlsys_bench.queueing.laws import Deterministic, Exponential, Law, TwoPoint
from mlsys_bench.queueing.mmc import birth_death, erlang_b, mmc
from mlsys_bench.queueing.patience import Abandonment, erlang_a, fixed_patience, impatient
from mlsys_bench.queueing.times import Time
from tests import truth_table

PUBLISHED = {"p_abandon_published": 5e-4, "wait_mean_all_published": 1e-3}  # to the digits printed


def quantity_of(answer: Abandonment, quantity: str) -> float:
    head, _, p = quantity.rpartition("_p")
    if p.isdigit():
        times = {"offered_wait": answer.offered_wait, "wait_all": answer.wait_all, "wait_served": answer.queue.wait}
        return times[head].quantile_s(int(p) / 100)
    queue = answer.queue
    return {"p_delay": queue.p_wait, "p_abandon": queue.p_abandoned, "wait_mean_all": answer.wait_all.mean_s}[
        quantity.removesuffix("_published")
    ]


@pytest.mark.parametrize("model", ["M/M/c+M", "M/M/c+D"])
def test_it_reproduces_the_truth_table(model: str) -> None:
    rows = [row for row in truth_table.rows() if row["model"] == model]
    wrong = []
    for row in rows:
        p = {name: float(value) for name, value in (part.split("=", 1) for part in row["parameters"].split(";"))}
        exponential = model.endswith("M")
        answer = (
            erlang_a(p["a"], 1.0, int(p["c"]), 1 / p["theta"]) if exponential else fixed_patience(p["a"], 1.0, int(p["c"]), p["patience"])
        )
        value, tolerance = quantity_of(answer, row["quantity"]), PUBLISHED.get(row["quantity"], 1e-12)
        if not math.isclose(value, float(row["value"]), rel_tol=1e-9, abs_tol=tolerance):
            wrong.append((row, value))
    assert (len(rows) >= 18, wrong) == (True, [])


@pytest.mark.parametrize(
    ("c", "offered", "theta"), [(1, 0.5, 1.0), (4, 8.0, 0.3), (50, 60.0, 5.0), (1000, 990.0, 0.5), (1000, 1300.0, 2.0), (20, 19.9, 1e-3)]
)
def test_erlang_a_agrees_with_its_birth_death_chain(c: int, offered: float, theta: float) -> None:
    """Who gives up: theta E[number waiting] / lambda; who waits: arrivals find c or more."""
    queueing = int(c + 60 / theta if theta < 0.1 else 3 * c + 400)
    n = np.arange(1, queueing + 1)
    law = birth_death(offered, np.minimum(n, c) + theta * np.maximum(n - c, 0))
    waiting = float(law[c:] @ np.arange(queueing + 1 - c))
    answer = erlang_a(offered, 1.0, c, 1 / theta)
    assert answer.queue.p_wait == pytest.approx(float(law[c:].sum()), rel=1e-9)
    assert answer.queue.p_abandoned == pytest.approx(theta * waiting / offered, rel=1e-8)
    assert answer.wait_all.mean_s == pytest.approx(waiting / offered, rel=1e-8)  # Little's law over all arrivals


def test_patience_as_long_as_service_makes_a_self_service_station() -> None:
    """With theta = mu every one present leaves at rate mu: the number present is Poisson."""
    answer, terms = erlang_a(7.0, 1.0, 5, 1.0), [math.exp(-7) * 7**n / math.factorial(n) for n in range(5)]
    assert answer.queue.p_wait == pytest.approx(1 - sum(terms), rel=1e-12)


def test_no_patience_loses_as_erlang_b_and_endless_patience_waits_as_m_m_c() -> None:
    for model in (erlang_a, fixed_patience):
        hasty, stoic = model(9.0, 1.0, 10, 1e-9), model(9.0, 1.0, 10, 1e12)
        assert hasty.queue.p_abandoned == pytest.approx(erlang_b(10, 9.0), rel=1e-7)
        assert stoic.queue.wait_quantile_s(0.99) == pytest.approx(mmc(9.0, 1.0, 10).wait_quantile_s(0.99), rel=1e-8)
        assert stoic.queue.sojourn_quantile_s(0.99) == pytest.approx(mmc(9.0, 1.0, 10).sojourn_quantile_s(0.99), rel=1e-8)


def test_a_fixed_timeout_by_hand() -> None:
    """M/M/1+D: below the timeout V has density prop. to exp(-(mu - lambda) x), beyond it exp(-mu x); here lambda = mu = timeout = 1."""
    answer = fixed_patience(1.0, 1.0, 1, 1.0)
    assert answer.queue.p_wait == pytest.approx(2 / 3, rel=1e-12)  # masses 1, 1 and 1: free, below, beyond
    assert answer.queue.p_abandoned == pytest.approx(1 / 3, rel=1e-12)
    assert answer.queue.wait_quantile_s(0.75) == pytest.approx(0.5, rel=1e-9)  # served: half at 0, half uniform
    assert (answer.queue.wait_s, answer.queue.wait.variance_s2) == pytest.approx((1 / 4, 1 / 6 - 1 / 16), rel=1e-9)
    assert answer.wait_all.quantile_s(0.99) == pytest.approx(1.0, rel=1e-9)  # those who give up, after the timeout sharp
    assert answer.queue.sojourn_p(2.0) == pytest.approx((math.exp(-2) + math.exp(-2) * (math.e - 1)) / 2, rel=1e-9)


def moments(time: Time, longest_s: float, bends_s: tuple[float, ...]) -> tuple[float, float]:
    """Return mean and variance by integrating P(T > t) and 2 t P(T > t)."""
    nodes, weights = np.polynomial.legendre.leggauss(16)
    edges = np.unique(np.concatenate([np.linspace(0, longest_s, 300), bends_s]))
    half = np.diff(edges) / 2
    t, w = (edges[:-1, None] + half[:, None] * (1 + nodes)).ravel(), (half[:, None] * weights).ravel()
    over = time.survival(t)
    mean = float(w @ over)
    return mean, float(2 * (w * t) @ over) - mean**2


@pytest.mark.parametrize(
    "answer", [erlang_a(3.6, 1.0, 4, 2.0), fixed_patience(5.0, 1.0, 4, 1.0), impatient(3.0, 1.0, 2, TwoPoint(0.5, 0.2, 3.0))]
)
def test_means_and_variances_are_those_of_the_laws(answer: Abandonment) -> None:
    for time in (answer.offered_wait, answer.wait_all, answer.queue.wait, answer.queue.sojourn):
        assert moments(time, 40.0, (0.2, 1.0, 3.0)) == pytest.approx((time.mean_s, time.variance_s2), rel=1e-8)


@pytest.mark.parametrize(("law", "special"), [(Exponential(0.7), erlang_a), (Deterministic(0.7), fixed_patience)])
def test_patience_of_any_law_contains_the_two(law: Law, special) -> None:  # type: ignore[no-untyped-def]
    general, known = impatient(12.0, 1.0, 10, law), special(12.0, 1.0, 10, 0.7)
    for quantity in ("p_delay", "p_abandon", "wait_mean_all", "offered_wait_p99", "wait_all_p90", "wait_served_p95"):
        assert quantity_of(general, quantity) == pytest.approx(quantity_of(known, quantity), rel=1e-8)


def simulated(rate: float, servers: int, patience: Law, customers: int, seed: int) -> tuple[float, float, float]:
    """Return the share that waits, the share that gives up and the mean wait of those served, in one run."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1 / rate, customers))
    free_at, left, waits = [0.0] * servers, 0, []
    for t, service, patient in zip(at, rng.exponential(1.0, customers), patience.sample(rng, customers), strict=True):
        wait = max(0.0, free_at[0] - t)
        if wait >= patient:
            left += 1
            continue
        heapq.heapreplace(free_at, t + wait + service)
        waits.append(wait)
    return (left + np.count_nonzero(waits)) / customers, left / customers, float(np.mean(waits))


def test_a_simulation_agrees_on_a_two_point_patience() -> None:
    """Half give up after 0.2 services, half after 3."""
    patience = TwoPoint(0.5, 0.2, 3.0)
    answer = impatient(3.0, 1.0, 2, patience).queue
    runs = np.array([simulated(3.0, 2, patience, 8000, seed) for seed in range(20)])
    for column, exact in zip(runs.T, (answer.p_wait, answer.p_abandoned, answer.wait_s), strict=True):
        low, high = stats.mean_interval(column, 0.9999) or (math.nan, math.nan)
        assert low < exact < high


anything = st.tuples(st.integers(1, 1000), st.floats(0.01, 3), st.floats(1e-3, 1e3))


@settings(max_examples=30)
@given(anything, st.sampled_from([erlang_a, fixed_patience]), st.floats(1e-3, 1e3))
def test_flow_and_units_hold_at_any_load(load: tuple[int, float, float], model, scale: float) -> None:  # type: ignore[no-untyped-def]
    c, rho, patience = load
    answer, stretched = model(rho * c, 1.0, c, patience), model(rho * c / scale, scale, c, patience * scale)
    queue = answer.queue
    assert queue.throughput_per_s == pytest.approx(rho * c * (1 - queue.p_abandoned), rel=1e-9)
    assert queue.mean_requests - queue.mean_waiting == pytest.approx(queue.throughput_per_s, rel=1e-9)
    assert queue.throughput_per_s <= c * (1 + 1e-9)
    assert stretched.queue.p_abandoned == pytest.approx(queue.p_abandoned, rel=1e-6, abs=1e-12)
    assert stretched.queue.wait_quantile_s(0.95) == pytest.approx(scale * queue.wait_quantile_s(0.95), rel=1e-6, abs=1e-9 * scale)
    if model is erlang_a:
        assert answer.wait_all.mean_s == pytest.approx(patience * queue.p_abandoned, rel=1e-8, abs=1e-15)


@settings(max_examples=30)
@given(anything, st.sampled_from([erlang_a, fixed_patience]), st.floats(0.3, 0.99))
def test_more_load_loses_more_and_more_servers_lose_less(load: tuple[int, float, float], model, less: float) -> None:  # type: ignore[no-untyped-def]
    c, rho, patience = load
    lost = model(rho * c, 1.0, c, patience).queue.p_abandoned
    assert model(less * rho * c, 1.0, c, patience).queue.p_abandoned <= lost * (1 + 1e-8) + 1e-15
    assert model(rho * c, 1.0, c + 1, patience).queue.p_abandoned <= lost * (1 + 1e-8) + 1e-15


def test_bad_input_is_refused() -> None:
    with pytest.raises(BadInput, match="patience of 0"):
        erlang_a(1.0, 1.0, 1, 0.0)
    with pytest.raises(BadInput, match="service time of -1"):
        fixed_patience(1.0, -1.0, 1, 1.0)
    with pytest.raises(BadInput, match="at least one"):
        erlang_a(1.0, 1.0, 0, 1.0)


def test_an_empty_station_waits_for_nothing() -> None:
    answer = erlang_a(0.0, 1.0, 3, 1.0)
    assert (answer.queue.p_wait, answer.queue.p_abandoned, answer.queue.wait_s) == (0.0, 0.0, 0.0)
    assert answer.queue.sojourn_p(2.0) == pytest.approx(math.exp(-2))
