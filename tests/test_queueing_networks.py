"""Networks of stations against the truth table, textbook sums, each other and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.des.network_sim import simulate
from mlsys_bench.queueing.laws import Deterministic, Exponential, Law, parse_law
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.networks import flows, gaps, jackson, network, qna, tandem_of_mmc, without_immediate_feedback
from mlsys_bench.queueing.single import mg1
from mlsys_bench.queueing.station import Network, Stage, tandem
from tests import truth_table


def rows(model: str) -> list[tuple[dict[str, str], str, float]]:
    """Return (parameters, quantity, value) of one model's rows."""
    found = [row for row in truth_table.rows() if row["model"].startswith(model)]
    assert found
    return [(dict(p.split("=") for p in row["parameters"].split(";")), row["quantity"], float(row["value"])) for row in found]


def stages(*services: Law, servers: int = 1) -> tuple[Stage, ...]:
    return tuple(Stage(service=service, servers=servers) for service in services)


def returning(rate: float, servers: int, again: float) -> Network:
    return Network(arrivals=Exponential(1 / rate), stages=stages(Exponential(1.0), servers=servers), entry=(1.0,), routing=((again,),))


def test_lines_reproduce_the_truth_table() -> None:
    for p, quantity, expected in rows("TANDEM"):
        text = p.get("stages(mu:c)") or "|".join(f"{mu}:1" for mu in p["mu"].split("|"))
        line = tuple((1 / float(mu), int(c)) for mu, c in (stage.split(":") for stage in text.split("|")))
        queue, error, _ = tandem_of_mmc(float(p["lambda"]), line)
        found = queue.sojourn_s if quantity == "sojourn_mean" else queue.sojourn_quantile_s(int(quantity[-2:]) / 100)
        assert found == pytest.approx(expected, rel=1e-9)
        assert error <= 1e-6


def test_feedback_reproduces_the_truth_table() -> None:
    for p, _, expected in rows("JACKSON"):
        queue, error, _ = network(returning(float(p["lambda"]), 1, float(p["p_feedback"])))
        assert queue.sojourn_s == pytest.approx(expected, rel=1e-12)
        assert error <= 1e-6


def test_two_equal_stages_take_an_erlang_time() -> None:
    queue, _, _ = tandem_of_mmc(0.5, ((1.0, 1), (1.0, 1)))
    assert queue.sojourn_p(7.0) == pytest.approx(math.exp(-3.5) * 4.5)
    assert queue.sojourn.variance_s2 == pytest.approx(8.0)


def test_a_tree_mixes_its_branches() -> None:
    """Half of the customers of an M/M/1 go on to a second one, half leave: half an exponential law, half an Erlang one."""
    tree = Network(
        arrivals=Exponential(2.0), stages=stages(Exponential(1.0), Exponential(4 / 3)), entry=(1.0, 0.0), routing=((0, 0.5), (0, 0))
    )
    queue, error, _ = network(tree)  # drains at 0.5 and at 0.75 - 0.25 = 0.5
    assert queue.sojourn_p(5.0) == pytest.approx(0.5 * math.exp(-2.5) + 0.5 * math.exp(-2.5) * 3.5)
    assert queue.sojourn_s == pytest.approx(3.0)
    assert queue.wait_s == pytest.approx(3.0 - 1.0 - 0.5 * 4 / 3)
    assert error <= 1e-6


def test_visits_with_feedback_solve_the_traffic_equations() -> None:
    """Stage 1 -> 2 with 0.8, 2 -> 1 with 0.4: 1 / (1 - 0.32) visits to the first, 0.8 times that to the second."""
    loop = Network(
        arrivals=Exponential(2.0), stages=stages(Exponential(1.0), Exponential(0.8)), entry=(1.0, 0.0), routing=((0, 0.8), (0.4, 0))
    )
    one, two = flows(loop)
    assert (one.visits, two.visits) == pytest.approx((1 / 0.68, 0.8 / 0.68))
    assert (one.arrival_scv, two.arrival_scv) == pytest.approx((1.0, 1.0))
    whole, error, _ = network(loop)
    first, second = jackson(loop)
    assert whole.sojourn_s == pytest.approx((first.sojourn_s + 0.8 * second.sojourn_s) / 0.68, rel=1e-12)
    assert whole.utilisation == pytest.approx(max(first.utilisation, second.utilisation))
    assert error > 0.1  # percentiles: those who return meet their own crowd


def test_departures_of_constant_servers_are_smoother() -> None:
    """c_d^2 = 1 - rho^2 behind M/D/1; a share p of it keeps p c^2 + 1 - p."""
    line = Network(
        arrivals=Exponential(2.0),
        stages=stages(Deterministic(1.0), Exponential(1.0)),
        entry=(1.0, 0.0),
        routing=((0.0, 0.4), (0.0, 0.0)),
    )
    assert flows(line)[1].arrival_scv == pytest.approx(0.4 * 0.75 + 0.6)


def test_feedback_percentiles_agree_with_a_simulation() -> None:
    """Exact, so the interval alone decides; waits too."""
    for system in (returning(0.4, 1, 0.3), returning(2.0, 4, 0.3)):
        queue, _, _ = network(system)
        visits = simulate(system, np.random.default_rng(5), 8, 15_000)
        for simulated, law in ((visits.wait_s[:, 1000:], queue.wait), (visits.sojourn_s[:, 1000:], queue.sojourn)):
            for p in (0.5, 0.95):
                each = np.quantile(simulated, p, axis=1)
                assert abs(law.quantile_s(p) - each.mean()) < 4 * each.std(ddof=1) / math.sqrt(8) + 1e-3
        assert abs(float((visits.wait_s[:, 1000:] > 0).mean()) - queue.p_wait) < 0.02


def test_feedback_without_returns_is_the_plain_queue() -> None:
    queue, _, _ = network(returning(1.5, 2, 1e-12))
    plain = mmc(1.5, 1.0, 2)
    for p in (0.5, 0.9, 0.99):
        assert queue.sojourn_quantile_s(p) == pytest.approx(plain.sojourn_quantile_s(p), rel=1e-6)
        assert queue.wait_quantile_s(p) == pytest.approx(plain.wait_quantile_s(p), rel=1e-6)
    assert queue.sojourn.variance_s2 == pytest.approx(plain.sojourn.variance_s2, rel=1e-6)
    assert queue.wait.variance_s2 == pytest.approx(plain.wait.variance_s2, rel=1e-6)


def test_adding_up_on_the_lattice_agrees_with_the_matrix_exponential() -> None:
    """The same line by both ways: exact phases, and stage laws added up numerically."""
    line = tandem(
        Exponential(1 / 8.0),
        (Stage(service=Exponential(1.0), servers=10), Stage(service=Exponential(0.1)), Stage(service=Exponential(0.4), servers=5)),
    )
    exact, added = network(line)[0], qna(line)[0]
    for p in (0.5, 0.9, 0.99):
        assert added.sojourn_quantile_s(p) == pytest.approx(exact.sojourn_quantile_s(p), rel=2e-4)
        assert added.wait_quantile_s(p) == pytest.approx(exact.wait_quantile_s(p), rel=2e-3)
    assert added.sojourn_s == pytest.approx(exact.sojourn_s, rel=1e-9)
    assert added.sojourn.variance_s2 == pytest.approx(exact.sojourn.variance_s2, rel=1e-9)
    assert added.p_wait == pytest.approx(exact.p_wait, rel=1e-9)


def test_one_stage_alone_is_its_own_station() -> None:
    """Jumps included: a constant service after an M/D/1 wait."""
    for law in (Deterministic(1.0), parse_law("logn:2"), parse_law("mix:0.9:1:5")):
        queue, _, _ = qna(tandem(Exponential(1 / 0.7), stages(law)))
        alone = mg1(0.7, law)
        assert queue.sojourn_s == pytest.approx(alone.sojourn_s, rel=1e-5)
        assert queue.sojourn_quantile_s(0.99) == pytest.approx(alone.sojourn_quantile_s(0.99), rel=5e-3)


def test_five_mixed_stages_agree_with_a_simulation_within_the_error_they_state() -> None:
    line = tandem(
        Exponential(1 / 6.0),
        (
            Stage(service=parse_law("logn:2"), servers=8),
            Stage(service=parse_law("gamma:0.3"), servers=7),
            Stage(service=parse_law("h2:4", 0.1)),
            Stage(service=Exponential(1.0), servers=9),
            Stage(service=parse_law("erl:2"), servers=8),
        ),
    )
    queue, error, _ = network(line)
    sojourn = simulate(line, np.random.default_rng(5), 4, 6000).sojourn_s[:, 1000:]
    assert abs(queue.sojourn_s / sojourn.mean() - 1) < error
    assert abs(queue.sojourn_quantile_s(0.99) / np.quantile(sojourn, 0.99) - 1) < error


def test_a_customer_that_returns_at_once_is_served_for_longer() -> None:
    merged = without_immediate_feedback(
        Network(
            arrivals=Exponential(9.0), stages=stages(parse_law("erl:2"), Exponential(1.0)), entry=(1.0, 0.0), routing=((0.25, 0.6), (0, 0))
        )
    )
    service = merged.stages[0].service
    assert (service.mean_s, service.scv) == pytest.approx((4 / 3, 0.25 + 0.75 * 0.5))
    assert merged.routing == ((0.0, pytest.approx(0.8)), (0.0, 0.0))


def test_gaps_have_the_moments_asked_for() -> None:
    for scv in (0.0, 0.3, 1.0, 2.5):
        law = gaps(2.0, scv)
        assert (law.mean_s, law.scv) == pytest.approx((2.0, scv))


@settings(max_examples=30)
@given(st.lists(st.floats(0.05, 0.95), min_size=1, max_size=6), st.floats(1e-2, 1e2))
def test_a_line_of_single_servers_adds_means_and_variances_not_percentiles(loads: list[float], rate: float) -> None:
    line = tuple((rho / rate, 1) for rho in loads)
    queue, _, _ = tandem_of_mmc(rate, line)
    alone = [mmc(rate, s, 1) for s, _ in line]
    assert queue.sojourn_s == pytest.approx(sum(q.sojourn_s for q in alone), rel=1e-9)
    assert queue.wait_s == pytest.approx(sum(q.wait_s for q in alone), rel=1e-9)
    assert queue.sojourn.variance_s2 == pytest.approx(sum(q.sojourn.variance_s2 for q in alone), rel=1e-6)
    p99 = queue.sojourn_quantile_s(0.99)
    assert max(q.sojourn_quantile_s(0.99) for q in alone) * (1 - 1e-9) <= p99 <= sum(q.sojourn_quantile_s(0.99) for q in alone) * (1 + 1e-9)
    assert queue.mean_requests == pytest.approx(rate * queue.sojourn_s, rel=1e-9)


def test_an_overloaded_stage_is_named_with_the_servers_that_would_do() -> None:
    with pytest.raises(Overload, match=r"stage 2.*4 would do") as overload:
        tandem_of_mmc(3.5, ((0.1, 1), (1.0, 3)))
    assert (overload.value.servers, overload.value.enough) == (3, 4)


def test_networks_that_make_no_sense_are_refused() -> None:
    one, two = stages(Exponential(1.0)), stages(Exponential(1.0), Exponential(1.0))
    bad = (
        Network(arrivals=Exponential(2.0), stages=one, entry=(1.0,), routing=((1.0,),)),
        Network(arrivals=Exponential(2.0), stages=two, entry=(1.0, 0.0), routing=((0.0, 1.0), (1.0, 0.0))),
        Network(arrivals=Exponential(2.0), stages=one, entry=(0.5,), routing=((0.0,),)),
        Network(arrivals=Exponential(2.0), stages=one, entry=(1.0,), routing=((-0.1,),)),
        Network(arrivals=Exponential(2.0), stages=two, entry=(1.0,), routing=((0.0,),)),
        Network(arrivals=Exponential(2.0), stages=(Stage(service=Exponential(1.0), servers=0),), entry=(1.0,), routing=((0.0,),)),
    )
    for system in bad:
        with pytest.raises(BadInput):
            network(system)
    with pytest.raises(BadInput, match="Jackson"):
        jackson(tandem(Exponential(2.0), stages(Deterministic(1.0))))
