"""Priority classes against the truth table, dense chains, conservation laws, and a small simulation."""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.laws import Deterministic, Erlang, Exponential, Gamma, Law
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.priorities import nonpreemptive, nonpreemptive_mg1, preemptive, preemptive_mg1
from mlsys_bench.queueing.times import Floats, Time, invert
from tests import truth_table


def test_the_truth_table_is_reproduced() -> None:
    rows = [row for row in truth_table.rows() if row["model"] in ("PRIO M/M/c", "PRIO-PR M/M/1")]
    wrong = []
    for row in rows:
        asked = dict(part.split("=", 1) for part in row["parameters"].split(";"))
        rates = [float(asked["lambda1"]), float(asked["lambda2"])]
        classes = preemptive(rates, 1.0, 1) if row["model"] == "PRIO-PR M/M/1" else nonpreemptive(rates, 1.0, int(asked["c"]))
        what, statistic = row["quantity"].split("_")
        queue = classes[int(what[-1]) - 1]
        time = queue.wait if what.startswith("wait") else queue.sojourn
        value = time.mean_s if statistic == "mean" else time.quantile_s(int(statistic[1:]) / 100)
        if not math.isclose(value, float(row["value"]), rel_tol=1e-8):
            wrong.append((row["parameters"], row["quantity"], row["value"], value))
    assert rows
    assert wrong == []


loads = st.lists(st.floats(0.02, 0.4), min_size=1, max_size=4).filter(lambda rates: sum(rates) < 0.97)


@given(loads, st.integers(1, 60), st.floats(1e-3, 1e3))
@settings(max_examples=40)
def test_priorities_move_waiting_between_classes_but_make_none(shares: list[float], servers: int, unit: float) -> None:
    """The wait of all customers together is that of M/M/c, whoever goes first; so is the number in the system with preemption."""
    rates = [share * servers / unit for share in shares]
    together = mmc(sum(rates), unit, servers)
    turns, interrupts = nonpreemptive(rates, unit, servers), preemptive(rates, unit, servers)
    assert sum(q.mean_waiting for q in turns) == pytest.approx(together.mean_waiting, rel=1e-9)
    assert sum(q.mean_requests for q in interrupts) == pytest.approx(together.mean_requests, rel=1e-8)
    for classes in (turns, interrupts):
        waits = [q.wait_s for q in classes]
        assert waits == sorted(waits)
        for q in classes:
            assert q.sojourn_s == pytest.approx(q.wait_s + unit, rel=1e-8)
            assert q.wait_quantile_s(0.99) <= q.sojourn_quantile_s(0.99)
    assert interrupts[0].wait_s <= turns[0].wait_s * (1 + 1e-9)


@given(loads, st.integers(1, 30))
@settings(max_examples=30)
def test_more_servers_wait_less_in_every_class(shares: list[float], servers: int) -> None:
    rates = [share * servers for share in shares]
    for model in (nonpreemptive, preemptive):
        for few, many in zip(model(rates, 1.0, servers), model(rates, 1.0, servers + 1), strict=True):
            assert many.wait_s < few.wait_s
            assert many.wait_quantile_s(0.95) <= few.wait_quantile_s(0.95) + 1e-9


@pytest.mark.parametrize(("servers", "higher", "own"), [(1, 0.5, 0.3), (3, 1.5, 1.0), (10, 7.0, 2.0), (10, 1.0, 8.0)])
def test_preemption_agrees_with_a_dense_chain(servers: int, higher: float, own: float) -> None:
    """The customers ahead, cut at 400, absorbed when the customer is done: P(T > t) by a matrix exponential."""
    from scipy.linalg import expm

    n = 400
    x = np.arange(n)
    falls, done = np.minimum(x, servers) * 1.0, np.where(x < servers, 1.0, 0.0)
    Q = np.diag(np.full(n - 1, higher), 1) + np.diag(falls[1:], -1)
    Q -= np.diag(Q.sum(axis=1) + done)
    offered = higher + own
    found = np.cumprod(np.concatenate([[1.0], offered / np.minimum(x[1:], servers)]))
    found /= found.sum()
    queue = preemptive([higher, own], 1.0, servers)[1]
    for t in (0.3, 2.0, 9.0):
        assert queue.sojourn_p(t) == pytest.approx(float(found @ expm(Q * t).sum(axis=1)), rel=1e-7, abs=1e-9)
    first = np.linalg.solve(-Q, np.ones(n))
    assert queue.sojourn_s == pytest.approx(float(found @ first), rel=1e-8)
    square = 2 * float(found @ np.linalg.solve(-Q, first))
    assert queue.sojourn.variance_s2 == pytest.approx(square - queue.sojourn_s**2, rel=1e-7)


def moments(time: Time) -> tuple[float, float]:
    """Return mean and variance as integrals of P(T > t)."""
    t = np.linspace(0, 1, 4001) ** 2 * (time.mean_s + 40 * math.sqrt(time.variance_s2))
    over = time.survival(t)
    mean = float(np.sum((over[1:] + over[:-1]) / 2 * np.diff(t)))
    square = float(np.sum((t[1:] * over[1:] + t[:-1] * over[:-1]) * np.diff(t)))
    return mean, square - mean**2


@pytest.mark.parametrize("queue", [*nonpreemptive([0.2, 0.3, 0.3], 1.0, 1), preemptive([1.0, 0.6], 1.0, 2)[1]])
def test_moments_are_those_of_the_tail(queue: object) -> None:
    from mlsys_bench.queueing.queue import Queue

    assert isinstance(queue, Queue)
    for time in (queue.wait, queue.sojourn):
        assert moments(time) == pytest.approx((time.mean_s, time.variance_s2), rel=2e-4)


def test_two_inversions_agree() -> None:
    """The lowest of three classes, by the contour and by Euler's sum on the same transform written out by hand."""
    rates, m = [6.0, 5.0, 6.0], 20.0
    wait = nonpreemptive(rates, 1.0, 20)[2].wait
    higher, sigma = 11.0, 17.0 / m
    p_wait = wait.p_over(0.0)

    def over(s: np.ndarray[tuple[int, ...], np.dtype[np.complex128]]) -> np.ndarray[tuple[int, ...], np.dtype[np.complex128]]:
        root = np.sqrt((m + higher + s) ** 2 - 4 * higher * m)
        B = (m + higher + s - root) / (2 * higher)
        return np.asarray(p_wait * (1 - (1 - sigma) * B / (1 - sigma * B)) / s)

    t = np.array([0.05, 0.3, 1.0, 2.5])
    assert wait.survival(t) == pytest.approx(invert(over, t), abs=3e-8)


def test_one_class_is_a_plain_queue() -> None:
    for servers in (1, 7):
        plain = mmc(0.8 * servers, 1.0, servers)
        for (queue,) in (nonpreemptive([0.8 * servers], 1.0, servers), preemptive([0.8 * servers], 1.0, servers)):
            assert queue.wait_quantile_s(0.95) == pytest.approx(plain.wait_quantile_s(0.95), rel=1e-9)
            assert queue.sojourn_quantile_s(0.95) == pytest.approx(plain.sojourn_quantile_s(0.95), rel=1e-9)
            assert queue.sojourn.variance_s2 == pytest.approx(plain.sojourn.variance_s2, rel=1e-9)


@pytest.mark.parametrize(("general", "exponential"), [(nonpreemptive_mg1, nonpreemptive), (preemptive_mg1, preemptive)])
def test_general_service_with_exponential_laws_is_the_exponential_model(general: object, exponential: object) -> None:
    rates = [0.3, 0.2, 0.4]
    assert callable(general)
    assert callable(exponential)
    for one, other in zip(general(rates, [Exponential(1.0)] * 3), exponential(rates, 1.0, 1), strict=True):
        for mine, known in ((one.wait, other.wait), (one.sojourn, other.sojourn)):
            assert (mine.mean_s, mine.variance_s2) == pytest.approx((known.mean_s, known.variance_s2), rel=1e-10)
            assert mine.quantile_s(0.9) == pytest.approx(known.quantile_s(0.9), rel=1e-7)
        assert one.p_wait == pytest.approx(other.p_wait, rel=1e-9)


def test_cobham_by_hand() -> None:
    """Two classes, 0.3 per second of constant 1 s and 0.2 of Erlang-2 with mean 2 s: residual work 0.3/2 + 0.2 * 6/2 = 0.75."""
    first, second = nonpreemptive_mg1([0.3, 0.2], [Deterministic(1.0), Erlang(2, 2.0)])
    assert (first.wait_s, second.wait_s) == pytest.approx((0.75 / 0.7, 0.75 / (0.7 * 0.3)))
    first, second = preemptive_mg1([0.3, 0.2], [Deterministic(1.0), Erlang(2, 2.0)])
    assert (first.sojourn_s, second.sojourn_s) == pytest.approx((1 + 0.15 / 0.7, (2 + 0.75 / 0.3) / 0.7))


def test_a_constant_service_keeps_its_jump() -> None:
    """Whoever finds nobody and is not interrupted takes exactly the constant: P(T = 1) = (1 - rho) e^{-l}."""
    queue = preemptive_mg1([0.2, 0.3], [Gamma(2.0, 1.0), Deterministic(1.0)])[1]
    at = queue.sojourn.survival(np.array([1 - 1e-9, 1.0]))
    assert at[0] == pytest.approx(1.0, abs=5e-3)  # a kink right at the jump
    assert at[0] - at[1] == pytest.approx(0.5 * math.exp(-0.2), abs=1e-6)


def simulated(rates: list[float], services: list[Law], preempt: bool, horizon_s: float, seed: int) -> list[Floats]:
    """Return sojourns per class from a single server's event list."""
    rng = np.random.default_rng(seed)
    coming = []
    for k, (rate, law) in enumerate(zip(rates, services, strict=True)):
        times = np.sort(rng.uniform(0, horizon_s, rng.poisson(rate * horizon_s)))
        coming += [(t, k, s) for t, s in zip(times.tolist(), law.sample(rng, len(times)).tolist(), strict=True)]
    coming.sort()
    queues: list[deque[list[float]]] = [deque() for _ in rates]
    done: list[list[float]] = [[] for _ in rates]
    now, at = 0.0, None  # in service: [class, arrival, rest]
    pending = deque(coming)
    while pending or at is not None:
        if at is None:
            now, k, s = pending.popleft()
            at = [float(k), now, s]
        elif pending and pending[0][0] < now + at[2]:
            t, k, s = pending.popleft()
            at[2] -= t - now
            now = t
            if preempt and k < at[0]:
                queues[int(at[0])].appendleft(at)
                at = [float(k), t, s]
            else:
                queues[k].append([float(k), t, s])
        else:
            now += at[2]
            done[int(at[0])].append(now - at[1])
            at = next((queue.popleft() for queue in queues if queue), None)
    return [np.array(d) for d in done]


@pytest.mark.parametrize("preempt", [False, True])
def test_a_simulation_agrees_with_different_laws_per_class(preempt: bool) -> None:
    rates, services = [0.5, 0.2, 0.15], [Gamma(2.0, 0.5), Deterministic(1.0), Erlang(2, 1.5)]
    model = preemptive_mg1 if preempt else nonpreemptive_mg1
    runs = [simulated(rates, services, preempt, 25_000.0, seed) for seed in range(10)]
    for k, queue in enumerate(model(rates, services)):
        means = np.array([run[k].mean() for run in runs])
        assert abs(means.mean() - queue.sojourn_s) < 4.5 * means.std(ddof=1) / math.sqrt(len(runs))
        for p in (0.5, 0.9, 0.97):
            shares = np.array([(run[k] > queue.sojourn_quantile_s(p) + 1e-9).mean() for run in runs])
            assert (
                abs(shares.mean() - queue.sojourn_p(queue.sojourn_quantile_s(p))) < 4.5 * shares.std(ddof=1) / math.sqrt(len(runs)) + 1e-3
            )


def test_what_cannot_be_is_an_error() -> None:
    with pytest.raises(Overload):
        nonpreemptive([2.0, 2.0], 1.0, 4)
    with pytest.raises(Overload):
        preemptive_mg1([0.5, 0.5], [Deterministic(1.0), Deterministic(1.0)])
    with pytest.raises(BadInput):
        preemptive([], 1.0, 1)
    with pytest.raises(BadInput):
        nonpreemptive([0.1, -0.1], 1.0, 1)
    with pytest.raises(BadInput):
        nonpreemptive([0.1], 0.0, 1)
    with pytest.raises(BadInput):
        nonpreemptive([0.1], 1.0, 0)
    with pytest.raises(BadInput):
        nonpreemptive_mg1([0.1, 0.2], [Deterministic(1.0)])
