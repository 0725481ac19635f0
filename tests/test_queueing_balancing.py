"""One stream dealt to many queues, against the truth table, each other and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.balancing import least_work, power_of_d_mean_field, random_routing, round_robin, shortest_queue_bounds
from mlsys_bench.queueing.des.balancing_sim import simulate
from mlsys_bench.queueing.laws import Deterministic, Exponential, parse_law
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.station import Balanced
from tests import truth_table


def rows(policy: str) -> list[tuple[dict[str, str], str, float, float]]:
    """Return (parameters, quantity, value, precision) of one policy's rows."""
    found = [row for row in truth_table.rows() if row["model"] == "LB" and f"policy={policy};" in row["parameters"]]
    assert found
    return [
        (dict(p.split("=") for p in row["parameters"].split(";")), row["quantity"], float(row["value"]), float(row["precision_abs"]))
        for row in found
    ]


def read(queue: Queue, quantity: str) -> float:
    time = queue.wait if quantity.startswith("wait") else queue.sojourn
    return time.mean_s if "mean" in quantity else time.quantile_s(int(quantity[-2:]) / 100)


@pytest.mark.parametrize(("policy", "rule"), [("random", random_routing), ("round_robin", round_robin), ("least_work", least_work)])
def test_policies_that_are_queues_in_disguise_reproduce_the_truth_table(policy: str, rule: object) -> None:
    """Exact rows to 1e-9; simulated ones within 2 % or 1.5 times their precision (SCV 4: 5 %)."""
    wrong, known = [], {}
    for p, quantity, expected, precision in rows(policy):
        key, n = str(p), int(p["N"])
        if key not in known:
            known[key] = rule(float(p["rho"]) * n, parse_law(p["service"]), n)[0]  # type: ignore[operator]
        found = read(known[key], quantity)
        bar = 1e-9 * expected if precision < 1e-6 and expected > 0 else max(0.02 * expected, 1.5 * precision, 1e-9)
        if abs(found - expected) > bar:
            wrong.append((p, quantity, expected, found))
    assert wrong == []


def test_two_choices_reproduce_the_truth_table_within_the_error_they_state() -> None:
    wrong = []
    for p, quantity, expected, precision in rows("po2"):
        if p["service"] != "exp" or quantity == "wait_p50":  # medians fall on the atom at 0
            continue
        n = math.inf if p["N"] == "inf" else int(p["N"])
        queue, error = power_of_d_mean_field(float(p["rho"]) * (1 if n == math.inf else n), 1.0, n, 2)
        if abs(read(queue, quantity) - expected) > error * expected + 1.5 * precision:
            wrong.append((p, quantity, expected, read(queue, quantity), error))
    assert wrong == []


def test_the_shortest_queue_lies_between_its_bounds() -> None:
    for p, quantity, expected, _ in rows("jsq"):
        if quantity == "sojourn_mean":
            below, above = shortest_queue_bounds(float(p["rho"]) * int(p["N"]), 1.0, int(p["N"]))
            assert below.sojourn_s < expected < above.sojourn_s


def test_many_queues_with_two_choices_by_hand() -> None:
    """x_i = rho^(2^i - 1): at rho = 1/2 one in two queues is busy, one in eight holds two; the mean sojourn is sum x_i / rho."""
    queue, error = power_of_d_mean_field(0.5, 1.0, math.inf, 2)
    assert error <= 1e-6
    assert queue.p_wait == pytest.approx(0.5**3 / 0.5)
    assert queue.sojourn_s == pytest.approx(sum(0.5 ** (2**i - 2) for i in range(1, 7)))
    assert queue.sojourn.p_over(3.0) == pytest.approx(  # Erlang laws, mixed over the queue found: 3/4, 3/4 (1/4 - 1/64) …
        sum(
            (0.5 ** (2 ** (i + 1) - 2) - 0.5 ** (2 ** (i + 2) - 2)) * sum(math.exp(-3) * 3**k / math.factorial(k) for k in range(i + 1))
            for i in range(6)
        )
    )


def test_one_choice_is_random_and_more_choices_wait_less() -> None:
    blind, _ = power_of_d_mean_field(70.0, 1.0, 100, 1)
    assert blind.sojourn_quantile_s(0.99) == pytest.approx(
        random_routing(70.0, Exponential(1.0), 100)[0].sojourn_quantile_s(0.99), rel=1e-9
    )
    waits = [power_of_d_mean_field(70.0, 1.0, 100, d)[0].wait_s for d in (1, 2, 3, 4)]
    assert waits == sorted(waits, reverse=True)


def test_twenty_queues_with_three_choices_agree_with_a_simulation_within_the_error_they_state() -> None:
    queue, error = power_of_d_mean_field(14.0, 1.0, 20, 3)
    system = Balanced(arrivals=Exponential(1 / 14), service=Exponential(1.0), queues=20, policy="power_of_d", choices=3)
    visits = simulate(system, np.random.default_rng(2), 6, 20_000)
    for simulated, law in ((visits.wait_s, queue.wait), (visits.sojourn_s, queue.sojourn)):
        each = np.quantile(simulated[:, 1000:], 0.99, axis=1)
        assert abs(law.quantile_s(0.99) / each.mean() - 1) < error + 3 * each.std(ddof=1) / math.sqrt(6) / each.mean()


def test_least_work_is_one_queue_for_all_in_every_path() -> None:
    """Same arrivals and work: joining the least work starts each customer when a shared queue would (Kiefer and Wolfowitz)."""
    rng = np.random.default_rng(4)
    system = Balanced(arrivals=Exponential(0.3), service=parse_law("logn:4"), queues=5, policy="least_work")
    visits = simulate(system, rng, 1, 3000)
    again = np.random.default_rng(4).spawn(3)
    arrive, service = np.cumsum(system.arrivals.sample(again[0], (1, 3000)), axis=1)[0], system.service.sample(again[1], (1, 3000))[0]
    free = np.zeros(5)
    for i in range(3000):
        first = int(free.argmin())
        start = max(arrive[i], free[first])
        free[first] = start + service[i]
        assert visits.wait_s[0, i] == pytest.approx(start - arrive[i], abs=1e-9)


@settings(max_examples=30)
@given(st.integers(2, 60), st.floats(0.05, 0.95), st.floats(1e-3, 1e3))
def test_the_more_a_policy_knows_the_shorter_the_wait(n: int, rho: float, service_s: float) -> None:
    rate, service = rho * n / service_s, Exponential(service_s)
    blind, turns, least = (rule(rate, service, n)[0] for rule in (random_routing, round_robin, least_work))
    assert blind.wait_s >= turns.wait_s >= least.wait_s * (1 - 1e-12)
    for queue in (blind, turns, least, power_of_d_mean_field(rate, service_s, n, 2)[0]):
        assert queue.throughput_per_s == rate
        assert queue.sojourn_s == pytest.approx(queue.wait_s + service_s, rel=1e-9)
        assert queue.utilisation == pytest.approx(rho)


def test_shares_of_queues_keep_littles_law() -> None:
    """Mean requests = rate x sojourn = N times the sum of the shares: the law of what customers find is the law of the queues."""
    queue, _ = power_of_d_mean_field(0.9 * 30, 1.0, 30, 2)
    found = np.array([queue.sojourn.p_over(t) for t in np.linspace(0, 60, 6001)])
    assert np.trapezoid(found, np.linspace(0, 60, 6001)) == pytest.approx(queue.sojourn_s, rel=1e-4)
    assert queue.mean_requests == pytest.approx(27 * queue.sojourn_s)


def test_constant_service_by_turns_never_waits_below_saturation_of_one_in_turn() -> None:
    """Round robin over 200 queues: gaps at a server are nearly constant, so the wait is far below that of blind routing."""
    turns, blind = (rule(160.0, Deterministic(1.0), 200)[0] for rule in (round_robin, random_routing))
    assert turns.wait_s < 0.02 * blind.wait_s
    assert blind.wait_s == pytest.approx(0.8 / (2 * 0.2), rel=1e-6)


def test_nonsense_and_saturation_are_refused() -> None:
    with pytest.raises(Overload) as overload:
        round_robin(5.0, Exponential(1.0), 4)
    assert overload.value.enough == 6
    with pytest.raises(Overload):
        power_of_d_mean_field(1.0, 1.0, math.inf, 2)
    for bad in (lambda: random_routing(1.0, Exponential(1.0), 0), lambda: power_of_d_mean_field(1.0, 1.0, 4, 0)):
        with pytest.raises(BadInput):
            bad()
    assert least_work(0.5, Exponential(1.0), 1)[0].sojourn_s == pytest.approx(mmc(0.5, 1.0, 1).sojourn_s)
