"""M/G/c and GI/G/c: the truth table within its bars, and modes of a law beside every queue that is known exactly."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.answer import EXACT
from mlsys_bench.queueing.crowd import COSTS, Crowd, affordable, ladder
from mlsys_bench.queueing.gimc import gimc
from mlsys_bench.queueing.laws import (
    Deterministic,
    Empirical,
    Erlang,
    Exponential,
    Gamma,
    Law,
    Lognormal,
    TwoPoint,
    balanced,
    marie,
    parse_law,
)
from mlsys_bench.queueing.mdc import mdc
from mlsys_bench.queueing.mgc import gigc, mgc
from mlsys_bench.queueing.modes import leading, of_law, of_phases, poisson
from mlsys_bench.queueing.qbd import crowd_wait, mphc
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.single import mg1
from mlsys_bench.queueing.times import MatrixExponential
from tests import truth_table

P = (0.5, 0.8, 0.9, 0.95, 0.99)


def by_modes(rate: float, service: Law, servers: int, budget: float = 4.0) -> MatrixExponential:
    """Return the wait by modes, whatever else is known of the law."""
    modes = of_law(service)
    crowd = Crowd(modes, ladder(COSTS[: len(modes.start) - 1], budget, servers))
    return crowd_wait(poisson(rate), crowd, servers, rate * service.mean_s)


def asked(queue: Queue, quantity: str) -> float:
    found = re.search(r"_p(\d\d)$", quantity)
    if found:
        p = int(found[1]) / 100
        return queue.wait_quantile_s(p) if quantity.startswith("wait") else queue.sojourn_quantile_s(p)
    return {"wait_p_delay": queue.p_wait, "wait_mean": queue.wait_s, "sojourn_mean": queue.sojourn_s}[quantity]


@pytest.mark.parametrize("model", ["M/G/c", "GI/G/c"])
def test_the_truth_table_is_met_within_its_bars(model: str) -> None:
    """2 % up to SCV 1, 5 % up to 4, 10 % at 10 (waits below 1 % of a service time: absolute), or 1.5 times the interval of the table."""
    rows = [row for row in truth_table.rows() if row["model"] == model]
    found: dict[str, Queue] = {}
    wrong = []
    for row in rows:
        p = dict(part.split("=", 1) for part in row["parameters"].split(";"))
        service, c = parse_law(p["service"]), int(p["c"])
        rate = float(p["rho"]) * c / service.mean_s
        if row["parameters"] not in found:
            found[row["parameters"]] = gigc(parse_law(p["arrival"], 1 / rate), service, c)[0]
        bar = 0.02 if service.scv <= 1 else 0.05 if service.scv <= 4 + 1e-9 else 0.1
        expected, value = float(row["value"]), asked(found[row["parameters"]], row["quantity"])
        allowed = max(bar * max(abs(expected), 0.01), 1.5 * float(row["precision_abs"]))
        if abs(value - expected) > allowed:
            wrong.append((row, value))
    assert (len(rows) > 50, wrong) == (True, [])


@pytest.mark.parametrize(
    "text", ["erl:4", "gamma:0.05", "logn:0.25", "logn:1", "logn:4", "gamma:4", "gamma:10", "unif", "h2:4", "mix:0.8:1:6"]
)
@pytest.mark.parametrize("rho", [0.6, 0.9])
def test_modes_at_one_server_are_m_g_1(text: str, rho: float) -> None:
    """The mean is kept by construction; percentiles come close (less so where the wait has kinks: two points, few customers)."""
    law = parse_law(text)
    wait, exact = by_modes(rho, law, 1), mg1(rho, law).wait
    assert wait.p_over(0.0) == pytest.approx(rho, rel=1e-4)
    assert wait.mean_s == pytest.approx(exact.mean_s, rel=1e-3)
    for p in P:
        assert wait.quantile_s(p) == pytest.approx(exact.quantile_s(p), rel=0.005, abs=0.02 if law.atoms else 0.002)


def test_modes_of_constant_service_are_m_d_c() -> None:
    for servers, rho in ((2, 0.6), (4, 0.8), (16, 0.9), (64, 0.95)):
        wait, exact = by_modes(rho * servers, Deterministic(1.0), servers), mdc(rho * servers, 1.0, servers)
        assert wait.p_over(0.0) == pytest.approx(exact.p_wait, rel=3e-3)
        assert wait.mean_s == pytest.approx(exact.wait_s, rel=3e-3)
        for p in P:
            assert wait.quantile_s(p) == pytest.approx(exact.wait_quantile_s(p), rel=0.01, abs=1e-3)


@pytest.mark.parametrize("law", [balanced(4.0), marie(0.7), Erlang(3)])
def test_modes_of_a_phase_type_law_are_its_phases(law: Law) -> None:
    """The projection finds that there are no more than two or three modes, and which."""
    phases = law.phases()
    assert phases is not None
    assert len(of_law(law).start) == len(of_phases(phases).start) == len(phases.alpha)
    exact = mphc(14.4, phases, 16)
    wait = by_modes(14.4, law, 16, budget=12.0)
    assert wait.p_over(0.0) == pytest.approx(exact.p_wait, rel=1e-4)
    for p in P:
        assert wait.quantile_s(p) == pytest.approx(exact.wait_quantile_s(p), rel=3e-4)


def test_modes_keep_the_mass_and_the_first_moments() -> None:
    for text in ("logn:2", "gamma:0.3", "bp:1.5:0.1:100", "mix:0.9:1:10"):
        law = parse_law(text)
        modes = of_law(law)
        first = np.linalg.solve(-modes.moves.T, modes.start)
        second = np.linalg.solve(-modes.moves.T, first)
        assert modes.moves[:, 0] == pytest.approx(-modes.ends)
        assert first[0] == pytest.approx(law.mean_s, rel=1e-6)
        assert 2 * second[0] - law.mean_s**2 == pytest.approx(law.variance_s2, rel=2e-3)
        assert np.linalg.eigvals(modes.moves + np.outer(modes.ends, modes.start)).real.max() < 1e-6  # a renewal process never grows


def test_measured_times_are_a_law_like_any_other() -> None:
    law = Empirical(Lognormal(2.0).sample(np.random.default_rng(5), 4000))
    wait, exact = by_modes(0.8 / law.mean_s, law, 1), mg1(0.8 / law.mean_s, law).wait
    for p in P:
        assert wait.quantile_s(p) == pytest.approx(exact.quantile_s(p), rel=0.01)
    queue, error, _ = mgc(7.2 / law.mean_s, law, 8)
    assert 0 < queue.p_wait < 1
    assert error <= 0.02


def test_few_excitations_are_enough() -> None:
    """Half as many states again change nothing that can be seen."""
    for law in (Lognormal(4.0), Gamma(0.3)):
        for servers in (4, 16):
            few, more = by_modes(0.9 * servers, law, servers), by_modes(0.9 * servers, law, servers, budget=14 / 3)
            for p in P:
                assert few.quantile_s(p) == pytest.approx(more.quantile_s(p), rel=1e-3)


@pytest.mark.parametrize("text", ["det", "unif", "gamma:0.25", "gamma:4", "logn:4", "mix:0.8:1:6"])
def test_modes_of_arrivals_are_gi_m_c(text: str) -> None:
    for servers, rho in ((2, 0.7), (16, 0.9)):
        gaps = parse_law(text, 1 / (rho * servers)).scaled(1 / (rho * servers))
        crowd = Crowd(poisson(1.0), ladder((), 1.0, servers))
        wait, exact = crowd_wait(leading(of_law(gaps), 5), crowd, servers, rho * servers), gimc(gaps, 1.0, servers)
        assert wait.p_over(0.0) == pytest.approx(exact.p_wait, rel=2e-3)
        for p in P:
            assert wait.quantile_s(p) == pytest.approx(exact.wait_quantile_s(p), rel=2e-3, abs=1e-4)


def test_each_law_goes_to_its_method() -> None:
    """Exact ones say so; the rest say how many modes they took."""
    assert mgc(0.8, Lognormal(4.0), 1)[1] == EXACT
    assert mgc(3.2, Deterministic(1.0), 4)[0].wait_s == mdc(3.2, 1.0, 4).wait_s
    assert mgc(14.4, balanced(4.0), 16)[0].wait_s == mphc(14.4, balanced(4.0).phases(), 16).wait_s
    assert gigc(Exponential(1 / 3.2), Lognormal(4.0), 4)[0].wait_s == mgc(3.2, Lognormal(4.0), 4)[0].wait_s
    assert gigc(Gamma(2.0, 1 / 3.2), Exponential(1.0), 4)[1] == EXACT
    assert "modes of the law" in gigc(Gamma(2.0, 1 / 3.2), Lognormal(4.0), 4)[2]
    assert "modes of the law" in mgc(3.2, Lognormal(4.0), 4)[2]
    assert gigc(Deterministic(0.3), Deterministic(1.0), 4)[0].wait_s == 0.0
    assert mgc(0.0, Lognormal(4.0), 4)[0].sojourn_quantile_s(0.9) == pytest.approx(Lognormal(4.0).quantile_s(0.9), rel=1e-6)


def test_the_wilder_the_law_the_wider_the_error() -> None:
    errors = [mgc(14.4, Lognormal(scv), 16)[1] for scv in (0.5, 4.0, 8.0, 20.0, 50.0)]
    assert errors == sorted(errors)
    assert errors[0] < 0.02 < errors[-1]
    assert mgc(14.4, parse_law("mix:0.8:1:6"), 16)[1] > errors[0]


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 30), st.floats(0.3, 0.95), st.floats(0.1, 6.0), st.floats(1e-3, 1e3))
def test_times_scale_and_more_servers_wait_less(servers: int, rho: float, scv: float, mean_s: float) -> None:
    queue, scaled = mgc(rho * servers, Lognormal(scv), servers)[0], mgc(rho * servers / mean_s, Lognormal(scv, mean_s), servers)[0]
    assert scaled.p_wait == pytest.approx(queue.p_wait, rel=1e-5, abs=1e-9)
    assert scaled.wait_quantile_s(0.99) == pytest.approx(queue.wait_quantile_s(0.99) * mean_s, rel=1e-5, abs=1e-9 * mean_s)
    roomier, busier = mgc(rho * servers, Lognormal(scv), servers + 1)[0], mgc(rho * servers * 1.03, Lognormal(scv), servers)[0]
    assert roomier.p_wait <= queue.p_wait + 1e-9 <= busier.p_wait + 2e-9
    assert roomier.wait_s <= queue.wait_s + 1e-9 <= busier.wait_s + 2e-9
    assert queue.mean_requests == pytest.approx(rho * servers * queue.sojourn_s, rel=1e-9)


def test_many_servers_pose_no_limit() -> None:
    """By sixteen times the servers at equal (1 - rho) sqrt(c), p_wait hardly moves and waits fall to a quarter: Halfin and Whitt."""
    few, many = (mgc((1 - 0.5 / c**0.5) * c, Lognormal(2.0), c)[0] for c in (100, 1600))
    assert many.p_wait == pytest.approx(few.p_wait, rel=0.03)
    assert many.wait_s * 4 == pytest.approx(few.wait_s, rel=0.05)


def test_ladders_keep_what_they_can_pay_for() -> None:
    assert len(ladder((1.0, 1.0), 3.0, 3).excited) == 10  # (3 + 2 over 2) mixes of three servers over three modes
    assert len(ladder((1.0, 2.0), 3.0, 9).excited) == 6  # 00 10 20 30 01 11
    assert affordable((1.0, 1.0), 3, 100) == pytest.approx(3.0)
    assert len(ladder(COSTS, affordable(COSTS, 50, 60), 50).excited) <= 60


def test_too_much_load_and_no_station_are_refused() -> None:
    with pytest.raises(Overload) as caught:
        mgc(4.0, Lognormal(2.0), 4)
    assert caught.value.enough == 5
    with pytest.raises(Overload):
        gigc(Gamma(2.0, 0.25), Lognormal(2.0), 4)
    with pytest.raises(BadInput):
        mgc(-1.0, Lognormal(2.0), 4)
    with pytest.raises(BadInput):
        mgc(1.0, Lognormal(2.0), 0)


@pytest.mark.parametrize("arrivals", [Exponential(1.9 / 3.2), Lognormal(2.0, 1.9 / 3.2)], ids=str)
def test_few_measured_times_are_the_law_of_those_times(arrivals: Law) -> None:
    """Samples 1, 1, ... 10 are two points: the rare long one may not be smeared over what lies between."""
    measured, found_error, _ = gigc(arrivals, Empirical([1.0] * 90 + [10.0] * 10), 4)
    law, true_error, _ = gigc(arrivals, TwoPoint(0.9, 1.0, 10.0), 4)
    assert found_error == true_error
    assert measured.wait_s == pytest.approx(law.wait_s, rel=1e-9)
    for p in P:
        assert measured.sojourn_quantile_s(p) == pytest.approx(law.sojourn_quantile_s(p), rel=1e-9)


@pytest.mark.parametrize("hit_s", [0.0, 0.1])
def test_a_time_measured_often_among_many_others_stays_a_jump(hit_s: float) -> None:
    """Cache hits all alike, misses far off: mean and second moment survive the modes, so one server meets Pollaczek and Khinchine."""
    service = Empirical(np.append(np.full(400, hit_s), np.linspace(5.0, 6.0, 600)))
    rate = 0.7 / service.mean_s
    modes, true = by_modes(rate, service, 1), mg1(rate, service)
    assert modes.mean_s == pytest.approx(true.wait_s, rel=2e-3)
    for p in (0.5, 0.9, 0.99):
        assert modes.quantile_s(p) == pytest.approx(true.wait_quantile_s(p), rel=0.01)


def test_zeros_among_samples_never_wait_longer_nor_hold_a_server() -> None:
    """A service of 0 holds nobody up: the others alone, at their own rate, give everybody's wait."""
    others = np.linspace(0.1, 2.0, 700)
    whole, alone = Empirical(np.append(np.zeros(300), others)), Empirical(others)
    rate = 3.2 / whole.mean_s
    with_zeros, without = mgc(rate, whole, 4)[0], mgc(0.7 * rate, alone, 4)[0]
    assert with_zeros.wait_s == pytest.approx(without.wait_s, rel=3e-3)
    assert with_zeros.wait_quantile_s(0.99) == pytest.approx(without.wait_quantile_s(0.99), rel=3e-3)
