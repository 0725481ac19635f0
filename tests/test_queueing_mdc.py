"""M/D/c against the truth table, textbook sums, a dense chain and a long simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.mdc import Wait, mdc
from tests import truth_table


def test_the_truth_table_is_reproduced() -> None:
    rows = [row for row in truth_table.rows() if row["model"] == "M/D/c"]
    wrong = []
    for row in rows:
        asked = dict(part.split("=", 1) for part in row["parameters"].split(";"))
        servers, quantity = int(asked["c"]), row["quantity"]
        queue = mdc(float(asked["rho"]) * servers, 1.0, servers)
        if "_p" in quantity:
            value = (queue.wait if quantity.startswith("wait") else queue.sojourn).quantile_s(int(quantity[-2:]) / 100)
        else:
            value = {"wait_mean": queue.wait_s, "sojourn_mean": queue.sojourn_s, "delay": queue.p_wait, "p_delay": queue.p_wait}[quantity]
        if not math.isclose(value, float(row["value"]), rel_tol=1e-9, abs_tol=1e-12):
            wrong.append((row["parameters"], quantity, row["value"], value))
    assert rows
    assert wrong == []


def test_p_delay_is_read_from_the_law_of_the_wait() -> None:
    queue = mdc(3.0, 1.0, 4)
    assert queue.p_wait == queue.wait.p_over(0.0)
    assert queue.wait_quantile_s(1 - queue.p_wait - 1e-9) == 0.0


@pytest.mark.parametrize("rho", [0.01, 0.3, 0.75, 0.9])
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0, 2.7, 5.5])
def test_one_server_waits_as_erlangs_sum_says(rho: float, t: float) -> None:
    """M/D/1: P(W <= t) = (1 - rho) sum over k <= t of (rho (k - t))^k / k! e^{-rho (k - t)}."""
    known = (1 - rho) * math.fsum((rho * (k - t)) ** k / math.factorial(k) * math.exp(-rho * (k - t)) for k in range(int(t) + 1))
    assert mdc(rho, 1.0, 1).wait_p(t) == pytest.approx(1 - known, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("rho", [0.01, 0.5, 0.9, 0.999])
def test_one_server_has_the_moments_of_pollaczek_and_khinchine(rho: float) -> None:
    """E[W] = rho / 2(1 - rho); E[W^2] = 2 E[W]^2 + rho / 3(1 - rho)."""
    queue, mean = mdc(rho, 1.0, 1), rho / (2 * (1 - rho))
    assert queue.wait_s == pytest.approx(mean, rel=1e-10)
    assert queue.wait.variance_s2 == pytest.approx(mean**2 + rho / (3 * (1 - rho)), rel=1e-9)


@pytest.mark.parametrize(("servers", "rho"), [(2, 0.1), (3, 0.8), (8, 0.6), (20, 0.9)])
def test_the_queue_agrees_with_a_dense_chain(servers: int, rho: float) -> None:
    """The same law from the balance equations of a chain cut at 600."""
    a, n = servers * rho, 600
    pmf = [math.exp(k * math.log(a) - a - math.lgamma(k + 1)) for k in range(n)]
    P = np.zeros((n, n))
    for i in range(n):
        start = max(i - servers, 0)
        P[i, start:] = pmf[: n - start]
    A = np.vstack([P.T - np.eye(n), np.ones(n)])
    in_system = np.linalg.lstsq(A, np.append(np.zeros(n), 1.0), rcond=None)[0]
    wait = Wait(servers, a, 1.0)
    known = np.array([in_system[: servers + 1].sum(), *in_system[servers + 1 : servers + 40]])
    assert wait.queued[:40] == pytest.approx(known, rel=1e-6, abs=1e-11)
    assert mdc(a, 1.0, servers).p_wait == pytest.approx(1 - in_system[:servers].sum(), rel=1e-7, abs=1e-12)


def test_two_hundred_servers_agree_with_a_long_simulation() -> None:
    """Constant service serves in turns: customer n + c follows customer n on the same server, so Lindley's recursion runs c abreast."""
    servers, rho, rounds, runs = 200, 0.96, 2500, 20
    rng = np.random.default_rng(7)
    queue = mdc(servers * rho, 1.0, servers)
    wait, waits = np.zeros((runs, servers)), np.empty((rounds, runs, servers))
    gaps = rng.exponential(1 / (servers * rho), (runs, servers))
    for i in range(rounds):
        later = rng.exponential(1 / (servers * rho), (runs, servers))
        between = gaps.sum(axis=1, keepdims=True) - np.cumsum(gaps, axis=1) + np.cumsum(later, axis=1)
        wait, gaps = np.maximum(wait + 1.0 - between, 0.0), later
        waits[i] = wait
    settled = waits[200:]
    at = [0.0, *(queue.wait_quantile_s(p) for p in (0.8, 0.95, 0.99))]
    for t in at:
        shares = (settled > t).mean(axis=(0, 2))
        assert abs(shares.mean() - queue.wait_p(t)) < 4 * shares.std(ddof=1) / math.sqrt(runs)
    means = settled.mean(axis=(0, 2))
    assert abs(means.mean() - queue.wait_s) < 4 * means.std(ddof=1) / math.sqrt(runs)


@given(st.integers(1, 500), st.floats(0.05, 0.999))
def test_any_number_of_servers_gives_a_law(servers: int, rho: float) -> None:
    """P(W > t) starts at P(delay), falls, carries its mean, and Little's law holds; light or heavy load."""
    queue = mdc(servers * rho, 1.0, servers)
    mean, p = queue.wait_s, queue.p_wait
    t = np.linspace(0.0, 40.0 * mean / p, 801) if p > 0 else np.zeros(2)
    over = queue.wait.survival(t)
    assert 0 <= p <= 1
    assert np.all(np.diff(over) <= 1e-12)
    area = float(np.sum((over[1:] + over[:-1]) / 2 * np.diff(t)))
    assert area == pytest.approx(mean, rel=2e-2)
    assert queue.mean_waiting == pytest.approx(servers * rho * queue.wait_s, rel=1e-12)
    assert queue.wait.variance_s2 >= 0


@given(st.integers(1, 200), st.floats(0.3, 0.98), st.floats(1e-4, 1e4))
def test_the_unit_of_time_does_not_matter(servers: int, rho: float, unit: float) -> None:
    one, other = mdc(servers * rho, 1.0, servers), mdc(servers * rho / unit, unit, servers)
    assert other.p_wait == pytest.approx(one.p_wait, rel=1e-7)
    assert other.wait_s == pytest.approx(one.wait_s * unit, rel=1e-7)
    assert other.sojourn_quantile_s(0.99) == pytest.approx(one.sojourn_quantile_s(0.99) * unit, rel=1e-7)


@given(st.integers(1, 100), st.floats(0.3, 0.97))
def test_more_load_waits_longer_and_more_servers_less(servers: int, rho: float) -> None:
    queue = mdc(servers * rho, 1.0, servers)
    busier, larger = mdc(servers * (rho + 0.01), 1.0, servers), mdc(servers * rho, 1.0, servers + 1)
    for p in (0.5, 0.99):
        assert larger.wait_quantile_s(p) <= queue.wait_quantile_s(p) + 1e-9
        assert queue.wait_quantile_s(p) <= busier.wait_quantile_s(p) + 1e-9
    assert larger.wait_s < queue.wait_s < busier.wait_s


def test_the_two_ways_to_the_ladder_agree() -> None:
    """Where the sum over steps is short and where the Fourier transform takes over, the mean is one smooth curve."""
    loads = np.linspace(0.80, 0.88, 41)  # c = 60: the change is near 0.85
    logs = np.log([mdc(60 * rho, 1.0, 60).wait_s for rho in loads])
    assert np.abs(np.diff(logs, 4)).max() < 1e-4


def test_nobody_comes_and_nobody_waits() -> None:
    queue = mdc(0.0, 2.0, 3)
    assert (queue.p_wait, queue.wait_s, queue.sojourn_s, queue.sojourn_quantile_s(0.99)) == (0.0, 0.0, 2.0, 2.0)


def test_saturation_is_an_error_that_names_enough_servers() -> None:
    with pytest.raises(Overload) as error:
        mdc(4.0, 1.0, 4)
    assert error.value.enough == 5
    with pytest.raises(BadInput):
        mdc(1.0, 0.0, 4)
    with pytest.raises(BadInput):
        mdc(1.0, 1.0, 0)
    with pytest.raises(BadInput):
        mdc(-1.0, 1.0, 1)
