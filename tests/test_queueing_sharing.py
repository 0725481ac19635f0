"""Processor sharing: the truth table, a second way to the same chain, known moments, and one simulation."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import stats
from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing import tagged
from mlsys_bench.queueing.chain import Batching
from mlsys_bench.queueing.laws import Deterministic, Exponential, Law, balanced
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.sharing import mg1ps_mean_s, mm1ps, mmcps
from mlsys_bench.queueing.times import Time
from tests import truth_table


def test_m_m_1_ps_reproduces_the_truth_table() -> None:
    """The table's waits and blocking are those of a finite chain with a slot for all but 1e-20 of the customers: 0 here."""
    rows = [row for row in truth_table.rows() if row["model"] == "M/M/1-PS"]
    wrong = []
    for row in rows:
        queue = mm1ps(float(dict(part.split("=") for part in row["parameters"].split(";"))["rho"]), 1.0)
        quantity, p = row["quantity"], row["quantity"][-2:]
        means = {
            "blocking": queue.p_blocked,
            "sojourn_mean": queue.sojourn_s,
            "wait_mean": queue.wait_s,
            "mean_in_service": queue.mean_requests,
        }
        time = queue.wait if quantity.startswith("wait") else queue.sojourn
        value = time.quantile_s(int(p) / 100) if p.isdigit() else means[quantity]
        if not math.isclose(value, float(row["value"]), rel_tol=1e-8, abs_tol=1e-12):
            wrong.append((row, value))
    assert (len(rows), wrong) == (24, [])


@pytest.mark.parametrize(("servers", "rho", "most"), [(1, 0.5, 60), (1, 0.9, 400), (4, 0.8, 180), (30, 0.95, 700)])
def test_two_ways_to_the_sojourn_agree(servers: int, rho: float, most: int) -> None:
    """By a contour integral, and by uniformisation of a replica with `most` slots and no queue, where speeds are those of sharing."""
    shared = mmcps(rho * servers, 1.0, servers)
    slots = Batching(rho * servers, np.minimum(np.arange(1.0, most + 1), servers), capacity=most)
    assert slots.p_blocked < 1e-13
    clocked = _uniformised(slots)
    for p in (0.1, 0.5, 0.9, 0.99):
        assert shared.sojourn_quantile_s(p) == pytest.approx(clocked.quantile_s(p), rel=1e-9)
    assert shared.sojourn.variance_s2 == pytest.approx(slots.queue.sojourn.variance_s2, rel=1e-9)


def _uniformised(chain: Batching) -> Time:
    total = chain.completions_per_s
    law = np.array([chain.p(n) for n in range(chain.slots)])
    return tagged.sojourn(
        law / law.sum(),
        rate_per_s=chain.rate_per_s,
        total=lambda n: total[n.astype(int) - 1],
        own=lambda n: total[n.astype(int) - 1] / n,
        slots=chain.slots,
        most=chain.slots,
        clock_per_s=chain.rate_per_s + float(total.max()),
        waiting=None,
        mean_s=chain.sojourn_s,
        variance_s2=lambda: 0.0,
    )


@given(st.floats(0.01, 0.97), st.floats(1e-3, 1e3))
@settings(max_examples=30)
def test_m_m_1_ps_has_its_first_two_moments_in_closed_form(rho: float, service_s: float) -> None:
    """Finding n others, the mean is (n + 2) / (2 mu - lambda), as putting it in shows; so is Var T = mean^2 (2 + rho) / (2 - rho)."""
    queue, n = mm1ps(rho / service_s, service_s), np.arange(1.0, 1200.0)
    first, _ = tagged.moments(rho / service_s, np.full_like(n, 1 / service_s), 1 / (service_s * n))
    assert first[:6] == pytest.approx((n[:6] + 1) * service_s / (2 - rho), rel=1e-9)
    assert queue.sojourn.variance_s2 == pytest.approx(queue.sojourn_s**2 * (2 + rho) / (2 - rho), rel=1e-8)


@given(st.integers(1, 60), st.floats(0.02, 0.97), st.floats(1e-3, 1e3))
@settings(max_examples=30)
def test_sharing_has_the_mean_of_a_queue_no_unit_and_grows_with_load(servers: int, rho: float, service_s: float) -> None:
    rate = rho * servers / service_s
    shared, queued, lighter = mmcps(rate, service_s, servers), mmc(rate, service_s, servers), mmcps(0.9 * rate, service_s, servers)
    assert shared.sojourn_s == pytest.approx(queued.sojourn_s, rel=1e-9)
    assert shared.mean_requests == pytest.approx(queued.mean_requests, rel=1e-9)
    assert shared.sojourn_quantile_s(0.9) == pytest.approx(service_s * mmcps(rho * servers, 1.0, servers).sojourn_quantile_s(0.9), rel=1e-7)
    assert lighter.sojourn_quantile_s(0.9) <= shared.sojourn_quantile_s(0.9) * (1 + 1e-9)
    assert shared.sojourn.variance_s2 >= queued.sojourn.variance_s2 * (1 - 1e-9)


def test_alone_it_is_service_alone() -> None:
    queue = mmcps(1e-9, 2.0, 4)
    assert queue.sojourn_quantile_s(0.9) == pytest.approx(Exponential(2.0).quantile_s(0.9), rel=1e-7)
    assert queue.sojourn_p(0.0) == 1.0
    assert (queue.wait_quantile_s(0.99), queue.p_wait) == (0.0, 0.0)


def simulated_mean_s(rate: float, work: Law, customers: int, seed: int) -> float:
    """Return the mean sojourn in one run of processor sharing, on the clock that runs at the speed of each customer's own work."""
    rng = np.random.default_rng(seed)
    inside: list[tuple[float, float]] = []  # (own clock at the end, arrival)
    now, clock, total = 0.0, 0.0, 0.0
    for at, need in zip(np.cumsum(rng.exponential(1 / rate, customers)), work.sample(rng, customers), strict=True):
        while inside and now + (inside[0][0] - clock) * len(inside) <= at:
            now, clock = now + (inside[0][0] - clock) * len(inside), inside[0][0]
            total += now - heapq.heappop(inside)[1]
        clock += (at - now) / len(inside) if inside else 0.0
        now = at
        heapq.heappush(inside, (clock + need, at))
    while inside:
        now, clock = now + (inside[0][0] - clock) * len(inside), inside[0][0]
        total += now - heapq.heappop(inside)[1]
    return total / customers


@pytest.mark.parametrize("work", [Deterministic(), balanced(4.0, 1.0)], ids=str)
def test_the_mean_does_not_depend_on_the_law_of_work(work: Law) -> None:
    means = np.array([simulated_mean_s(0.5, work, 6000, seed) for seed in range(20)])
    low, high = stats.mean_interval(means, 0.9999) or (math.nan, math.nan)
    assert low < mg1ps_mean_s(0.5, 1.0) < high


def test_the_mean_is_in_proportion_to_the_work_brought() -> None:
    assert mg1ps_mean_s(0.8, 1.0) == pytest.approx(5.0)
    assert mg1ps_mean_s(0.8, 1.0, work_s=3.0) == pytest.approx(15.0)


def test_overload_and_bad_input_are_refused() -> None:
    with pytest.raises(Overload, match="3 would do"):
        mmcps(2.0, 1.0, 2)
    with pytest.raises(Overload, match="2 would do"):
        mg1ps_mean_s(1.0, 1.0)
    with pytest.raises(BadInput, match="service time of nan"):
        mm1ps(0.5, math.nan)
