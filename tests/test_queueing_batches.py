"""Dynamic batching against the truth table, queues it contains, a dense chain and a small simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.batches import BatchQueue, batches, capacity_per_s, upper_bound_s
from mlsys_bench.queueing.laws import Exponential, Lognormal, parse_law
from mlsys_bench.queueing.mdc import mdc
from mlsys_bench.queueing.times import Floats
from tests import truth_table


def value_of(found: BatchQueue, quantity: str) -> float | None:
    known = {
        "sojourn_mean": found.sojourn_s,
        "wait_mean": found.wait_s,
        "sojourn_mean_batch": found.mean_batch,
        "sojourn_util": found.utilisation,
        "inoue_bound": found.bound_s,
    }
    if quantity in known:
        return known[quantity]
    if found.queue is None:
        return None
    return (found.queue.wait if quantity.startswith("wait") else found.queue.sojourn).quantile_s(int(quantity[-2:]) / 100)


def test_the_truth_table_is_reproduced() -> None:
    """Exact rows to 1e-9; simulated ones, percentiles too, within 1.5 of their 95 % interval."""
    rows = [row for row in truth_table.rows() if row["model"] == "BATCH" and row["parameters"].startswith("c=1;")]
    wrong, seen = [], 0
    solved: dict[str, BatchQueue] = {}
    for row in rows:
        asked = dict(part.split("=", 1) for part in row["parameters"].split(";"))
        if row["parameters"] not in solved:
            solved[row["parameters"]] = batches(
                float(asked["lambda"]),
                fixed_s=float(asked["beta"]),
                per_request_s=float(asked["alpha"]),
                max_batch=None if asked["max_batch"] == "inf" else int(asked["max_batch"]),
                max_wait_s=float(asked["max_wait"]),
                noise=None if asked["X"] == "det" else parse_law(asked["X"]),
            )
        value, known, precision = value_of(solved[row["parameters"]], row["quantity"]), float(row["value"]), float(row["precision_abs"])
        if value is None:
            continue
        seen += 1
        allowed = 1e-9 * known if precision < 1e-6 else 1.5 * precision
        if abs(value - known) > allowed:
            wrong.append((row["parameters"], row["quantity"], known, value))
    assert seen > 0.8 * len(rows)
    assert wrong == []


@pytest.mark.parametrize("rho", [0.3, 0.9])
def test_batches_of_one_are_m_d_1(rho: float) -> None:
    found, plain = batches(rho / 2, fixed_s=1.5, per_request_s=0.5, max_batch=1), mdc(rho / 2, 2.0, 1)
    assert found.queue is not None
    assert found.sojourn_s == pytest.approx(plain.sojourn_s, rel=1e-9)
    assert found.utilisation == pytest.approx(rho)
    assert found.queue.p_wait == pytest.approx(plain.p_wait, rel=1e-9)
    for p in (0.5, 0.9, 0.99):
        assert found.queue.wait_quantile_s(p) == pytest.approx(plain.wait_quantile_s(p), rel=1e-6, abs=1e-9)
    assert found.queue.wait.variance_s2 == pytest.approx(plain.wait.variance_s2, rel=1e-8)


def test_noisy_batches_of_one_are_m_m_1() -> None:
    found = batches(0.8, fixed_s=0.5, per_request_s=0.5, max_batch=1, noise=Exponential(1.0))
    assert (found.sojourn_s, found.wait_s) == pytest.approx((5.0, 4.0))
    assert found.queue is None


def dense(rate: float, taus: Floats, pmf: list[Floats]) -> tuple[float, float]:
    """Return mean batch and P(batch ends with nobody waiting) from a chain cut at len(pmf[0])."""
    B, n = len(taus), len(pmf[0])
    P = np.zeros((n, n))
    for L in range(n):
        left = max(L - B, 0)
        P[L, left:] = pmf[min(max(L, 1), B) - 1][: n - left]
        P[L, -1] += 1 - P[L].sum()
    A = np.vstack([P.T - np.eye(n), np.ones(n)])
    law = np.linalg.lstsq(A, np.append(np.zeros(n), 1.0), rcond=None)[0]
    return float(law @ np.clip(np.arange(n), 1, B)), float(law[0])


@pytest.mark.parametrize(("rate", "most"), [(0.3, 3), (0.6, 6), (0.8, 12)])
def test_exponential_noise_agrees_with_a_dense_chain(rate: float, most: int) -> None:
    """With exponential batch times the arrivals during one are geometric."""
    taus = np.asarray(2.0 + 0.7 * np.arange(1, most + 1), dtype=np.float64)
    n = np.arange(500)
    pmf = [(rate * tau / (1 + rate * tau)) ** n / (1 + rate * tau) for tau in taus]
    mean_batch, empty = dense(rate, taus, pmf)
    found = batches(rate, fixed_s=2.0, per_request_s=0.7, max_batch=most, noise=Exponential(1.0))
    assert found.mean_batch == pytest.approx(mean_batch, rel=1e-7)
    # E[arrivals during a batch] = E[b] - P(nobody waits)
    assert rate * (2.0 + 0.7 * found.mean_batch) == pytest.approx(found.mean_batch - empty, rel=1e-6)


def simulate(rate: float, fixed: float, per: float, most: int, hold: float, noise_scv: float, n: int, seed: int) -> tuple[Floats, Floats]:
    """Return waits and batch sizes of n requests served one batch at a time."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, n + most))
    waits, sizes, free, i = np.zeros(n), np.zeros(n), 0.0, 0
    law = Lognormal(noise_scv) if noise_scv > 0 else None
    while i < n:
        start = max(free, min(times[i] + hold, times[i + most - 1]))
        end = min(int(np.searchsorted(times, start, side="right")), i + most, n)
        waits[i:end], sizes[i:end] = start - times[i:end], end - i
        free = start + (fixed + per * (end - i)) * (1.0 if law is None else float(law.sample(rng, 1)[0]))
        i = end
    return waits, sizes


@pytest.mark.parametrize(("rate", "most", "hold"), [(0.4, 4, 0.0), (0.9, 6, 1.5), (0.25, 3, 3.0), (0.7, 2, 2.2), (0.5, 40, 2.0)])
def test_a_simulation_agrees(rate: float, most: int, hold: float) -> None:
    """Waits, batch sizes and sojourns, holding back for more or not, loaded or not."""
    fixed, per = 2.0, 0.4 if most > 2 else 0.2
    found = batches(rate, fixed_s=fixed, per_request_s=per, max_batch=most, max_wait_s=hold)
    assert found.queue is not None
    runs = [simulate(rate, fixed, per, most, hold, 0.0, 20_000, seed) for seed in range(8)]

    def agree(values: list[float], known: float) -> None:
        sample = np.array(values)
        assert abs(sample.mean() - known) < 5 * sample.std(ddof=1) / math.sqrt(len(sample)) + 1e-3 * known + 1e-4

    agree([w.mean() for w, _ in runs], found.wait_s)
    agree([float(1 / (1 / n).mean()) for _, n in runs], found.mean_batch)
    agree([(w > 1e-9).mean() for w, _ in runs], found.queue.p_wait)
    for t in (0.5, 1.5, 3.1, 4.5, 7.0):
        agree([(w > t).mean() for w, _ in runs], found.queue.wait_p(t))
        agree([(w + fixed + per * n > t).mean() for w, n in runs], found.queue.sojourn_p(t))


def test_a_simulation_agrees_with_noise() -> None:
    found = batches(0.9, fixed_s=2.0, per_request_s=0.4, max_batch=6, noise=Lognormal(0.5))
    runs = np.array([simulate(0.9, 2.0, 0.4, 6, 0.0, 0.5, 20_000, seed)[0].mean() for seed in range(10)])
    assert abs(runs.mean() - found.wait_s) < 5 * runs.std(ddof=1) / math.sqrt(len(runs))


@given(st.floats(0.05, 0.97), st.floats(0.0, 5.0), st.floats(0.05, 2.0), st.integers(1, 24), st.floats(0.0, 1.0), st.floats(1e-3, 1e3))
@example(0.5, 1.0544852059506007, 2.0, 8, 1.0, 1.5)
@settings(max_examples=30, deadline=None)
def test_the_joint_law_keeps_its_books(rho: float, fixed: float, per: float, most: int, hold: float, unit: float) -> None:
    """Probabilities sum to 1, throughput is the rate, and the unit of time does not matter."""
    rate, hold_s = rho * capacity_per_s(fixed, per, most), hold * (fixed + per * most)
    found = batches(rate, fixed_s=fixed, per_request_s=per, max_batch=most, max_wait_s=hold_s)
    other = batches(rate / unit, fixed_s=fixed * unit, per_request_s=per * unit, max_batch=most, max_wait_s=hold_s * unit)
    assert found.batch_law is not None
    assert found.batch_law.sum() == pytest.approx(1, rel=1e-9)
    assert found.queue is not None
    assert found.queue.sojourn_p(0.0) == pytest.approx(1, abs=1e-8)
    assert found.sojourn_s == pytest.approx(found.queue.sojourn_s, rel=1e-7)
    assert found.wait_s == pytest.approx(found.queue.wait_s, rel=1e-7, abs=1e-9)
    assert other.sojourn_s == pytest.approx(found.sojourn_s * unit, rel=1e-7)
    assert other.utilisation == pytest.approx(found.utilisation, rel=1e-7)
    assert rho - 1e-9 <= found.utilisation <= 1 + 1e-9


@given(st.floats(0.05, 0.95), st.floats(0.1, 8.0))
@settings(max_examples=25, deadline=None)
def test_the_bound_is_above_the_mean_and_near(rho: float, fixed: float) -> None:
    found = batches(rho, fixed_s=fixed, per_request_s=1.0, max_batch=None)
    assert found.bound_s is not None
    assert found.sojourn_s <= found.bound_s * (1 + 1e-9)
    assert found.bound_s < 1.35 * found.sojourn_s


def test_without_a_limit_is_the_limit_of_large_batches() -> None:
    endless, large = (
        batches(0.5, fixed_s=4.0, per_request_s=1.0, max_batch=None),
        batches(0.5, fixed_s=4.0, per_request_s=1.0, max_batch=70),
    )
    assert endless.sojourn_s == pytest.approx(large.sojourn_s, rel=1e-9)
    assert endless.queue is not None
    assert large.queue is not None
    assert endless.queue.sojourn_quantile_s(0.99) == pytest.approx(large.queue.sojourn_quantile_s(0.99), rel=1e-7)


def test_huge_batches_are_the_continuation_of_large_ones() -> None:
    """Near saturation without a limit the bound is the mean: the same curve on both sides of where the chain is left out."""
    chain, huge = (batches(rate, fixed_s=2.0, per_request_s=0.1, max_batch=None) for rate in (9.80, 9.90))
    assert chain.batch_law is not None
    assert huge.batch_law is None
    assert chain.sojourn_s == pytest.approx(chain.bound_s, rel=1e-9)
    assert huge.sojourn_s - huge.wait_s == pytest.approx((chain.sojourn_s - chain.wait_s) * (0.2 / 0.1), rel=0.05)
    assert huge.utilisation == pytest.approx(chain.utilisation, abs=1e-9)


def test_a_heavy_noise_leaves_no_mean() -> None:
    """Without a limit a batch breeds the next: E[L^2] needs (rate per_request)^2 E[X^2] < 1."""
    assert math.isinf(upper_bound_s(0.8, 1.0, 1.0, noise_scv=1.0))
    assert math.isinf(batches(0.8, fixed_s=1.0, per_request_s=1.0, max_batch=None, noise=Exponential(1.0)).sojourn_s)


@given(st.floats(0.1, 0.9), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_more_load_takes_longer(rho: float, most: int) -> None:
    rate = rho * capacity_per_s(3.0, 0.5, most)
    slow = batches(rate * 1.05, fixed_s=3.0, per_request_s=0.5, max_batch=most)
    fast = batches(rate, fixed_s=3.0, per_request_s=0.5, max_batch=most)
    assert fast.sojourn_s < slow.sojourn_s


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(Overload) as error:
        batches(5.0, fixed_s=4.0, per_request_s=1.0, max_batch=8)
    assert error.value.utilisation == pytest.approx(5 * 12 / 8)
    assert error.value.enough == 8
    with pytest.raises(Overload):
        batches(1.0, fixed_s=4.0, per_request_s=1.0, max_batch=None)
    with pytest.raises(BadInput, match="simulate"):
        batches(0.1, fixed_s=4.0, per_request_s=1.0, max_batch=8, max_wait_s=13.0)
    with pytest.raises(BadInput, match="simulate"):
        batches(0.1, fixed_s=4.0, per_request_s=1.0, max_batch=8, max_wait_s=1.0, noise=Exponential(1.0))
    with pytest.raises(BadInput):
        batches(0.1, fixed_s=4.0, per_request_s=1.0, max_batch=0)
    with pytest.raises(BadInput):
        batches(0.1, fixed_s=-4.0, per_request_s=1.0, max_batch=2)


def test_endless_batches_with_a_long_tail_still_find_the_server_idle() -> None:
    found = batches(1.2, fixed_s=3.0, per_request_s=0.5, max_batch=None, noise=Exponential(1.0))
    assert found.mean_batch == pytest.approx(9.32605, rel=2e-5)  # chains of 400 and 800, cut either way
    assert found.utilisation == pytest.approx(0.986015, abs=2e-6)  # 16 runs of 600,000 requests: 0.98613 +- 0.00022
    assert found.sojourn_s == pytest.approx(43.24179, rel=1e-5)
    assert found.wait_s == pytest.approx(found.sojourn_s - 3.0 - 0.5 * (1 + 2.88 * (3 + 9 / 9.32605)) / 0.28, rel=1e-4)
