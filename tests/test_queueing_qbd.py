"""M/PH/c and MMPP/M/c: the truth table, chains written out state by state, and queues that have other formulas."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.gimc import gimc
from mlsys_bench.queueing.laws import Erlang, Hyperexponential, PhaseType, balanced, marie, parse_law
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.queueing.qbd import cut_error, mmpp_mc, mphc
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.single import mg1
from mlsys_bench.queueing.station import Bursts
from tests import truth_table


def truth(model: str) -> list[tuple[dict[str, str], str, float]]:
    rows = [row for row in truth_table.rows() if row["model"] == model]
    return [(dict(part.split("=", 1) for part in row["parameters"].split(";")), row["quantity"], float(row["value"])) for row in rows]


def asked(queue: Queue, quantity: str) -> float:
    found = re.search(r"_p(\d\d)$", quantity)
    if found:
        p = int(found[1]) / 100
        return queue.wait_quantile_s(p) if quantity.startswith("wait") else queue.sojourn_quantile_s(p)
    return {"p_delay": queue.p_wait, "wait_mean": queue.wait_s, "sojourn_mean": queue.sojourn_s}[quantity]


def written_out(rate: float, service: PhaseType, servers: int, most: int) -> tuple[float, float]:
    """Return P(wait) and the mean wait of M/PH/c with room for `most`, every mix of phases a state."""
    k = len(service.alpha)
    mixes = {n: [m for m in itertools.product(range(n + 1), repeat=k) if sum(m) == n] for n in range(servers + 1)}
    states = [(n, m) for n in range(most + 1) for m in mixes[min(n, servers)]]
    at = {state: i for i, state in enumerate(states)}
    Q = np.zeros((len(states), len(states)))

    def other(m: tuple[int, ...], take: int, put: int | None) -> tuple[int, ...]:
        return tuple(x - (i == take) + (i == put) for i, x in enumerate(m))

    for (n, m), i in at.items():
        if n < most:
            for j in range(k):
                goal = (n + 1, other(m, -1, j)) if n < servers else (n + 1, m)
                Q[i, at[goal]] += rate * (service.alpha[j])
        for a in range(k):
            for b in range(k):
                if a != b and m[a]:
                    Q[i, at[n, other(m, a, b)]] += m[a] * service.S[a, b]
                if m[a] and n > servers:
                    Q[i, at[n - 1, other(m, a, b)]] += m[a] * service.exits_per_s[a] * service.alpha[b]
            if m[a] and n <= servers:
                Q[i, at[n - 1, other(m, a, None)]] += m[a] * service.exits_per_s[a]
    Q -= np.diag(Q.sum(axis=1))
    law = np.linalg.lstsq(np.vstack([Q.T, np.ones(len(Q))]), np.append(np.zeros(len(Q)), 1.0), rcond=None)[0]
    number = np.array([n for n, _ in states])
    return float(law[number >= servers].sum()), float(law @ np.maximum(number - servers, 0)) / rate


def test_m_ph_c_reproduces_the_truth_table() -> None:
    rows, queues = truth("M/PH/c"), {}
    wrong = []
    for parameters, quantity, expected in rows:
        c, rho, law = int(parameters["c"]), float(parameters["rho"]), parameters["service"]
        if (c, rho, law) not in queues:
            phases = parse_law(law).phases()
            assert phases is not None
            queues[c, rho, law] = mphc(c * rho, phases, c)
        value = asked(queues[c, rho, law], quantity)
        if not math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12):
            wrong.append((parameters, quantity, expected, value))
    assert (len(rows) > 300, wrong) == (True, [])


def test_mmpp_m_c_reproduces_the_truth_table() -> None:
    wrong = []
    for p, quantity, expected in truth("MMPP/M/c"):
        bursts = Bursts(rates_per_s=(float(p["l0"]), float(p["l1"])), switches_per_s=((0.0, float(p["q01"])), (float(p["q10"]), 0.0)))
        value = asked(mmpp_mc(bursts, float(p["mean_service"]), int(p["c"])), quantity)
        if not math.isclose(value, expected, rel_tol=1e-9):
            wrong.append((p, quantity, expected, value))
    assert wrong == []


@pytest.mark.parametrize(
    ("service", "servers", "rho"),
    [
        (marie(0.7), 3, 0.5),
        (balanced(3.0).phases(), 4, 0.4),
        (Erlang(3).phases(), 3, 0.5),
        (Hyperexponential((0.5, 0.3, 0.2), (0.5, 1.0, 2.25)).phases(), 3, 0.4),
        (PhaseType([0.2, 0.5, 0.3], [[-3.0, 1.0, 0.5], [0.2, -2.0, 0.8], [0.0, 0.7, -1.5]]).scaled(1.0), 2, 0.4),
    ],
)
def test_modes_say_what_the_chain_written_out_says(service: PhaseType, servers: int, rho: float) -> None:
    p_wait, wait_s = written_out(rho * servers, service, servers, most=servers + 45)
    queue = mphc(rho * servers, service, servers)
    assert (queue.p_wait, queue.wait_s) == pytest.approx((p_wait, wait_s), rel=1e-6)
    assert queue.mean_waiting == pytest.approx(rho * servers * wait_s, rel=1e-6)


@pytest.mark.parametrize("servers", [1, 2, 7, 40, 300])
def test_two_phases_that_are_one_make_it_m_m_c(servers: int) -> None:
    rate = 0.9 * servers
    queue, erlang = mphc(rate, PhaseType([0.3, 0.7], [[-1.0, 0.0], [0.0, -1.0]]), servers), mmc(rate, 1.0, servers)
    assert queue.p_wait == pytest.approx(erlang.p_wait, rel=1e-9)
    assert queue.wait_s == pytest.approx(erlang.wait_s, rel=1e-9)
    assert queue.sojourn_quantile_s(0.99) == pytest.approx(erlang.sojourn_quantile_s(0.99), rel=1e-9)


def test_one_server_is_pollaczek_and_khinchine() -> None:
    for law in (Erlang(4), balanced(5.0), Hyperexponential((0.6, 0.3, 0.1), (0.4, 1.0, 4.6))):
        phases = law.phases()
        assert phases is not None
        queue, exact = mphc(0.8 / law.mean_s, phases, 1), mg1(0.8 / law.mean_s, law)
        assert queue.p_wait == pytest.approx(0.8, rel=1e-12)
        assert queue.wait.variance_s2 == pytest.approx(exact.wait.variance_s2, rel=1e-9)
        assert queue.wait_quantile_s(0.99) == pytest.approx(exact.wait_quantile_s(0.99), rel=1e-9)


def test_a_law_is_its_own_whatever_its_phases() -> None:
    """Exponentials of rates 3 and 1 side by side are also a row that may end early (and a phase nobody enters changes nothing)."""
    side = Hyperexponential((0.4, 0.6), (1 / 3, 1.0))
    row = PhaseType([1.0, 0.0], [[-3.0, 3.0 * (0.6 - 0.6 / 3)], [0.0, -1.0]])
    idle = PhaseType([0.4, 0.6, 0.0], [[-3.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, -9.0]])
    first = mphc(12.0, side.phases(), 12)
    for other in (mphc(12.0, row, 12), mphc(12.0, idle, 12)):
        assert other.p_wait == pytest.approx(first.p_wait, rel=1e-9)
        assert other.wait_quantile_s(0.95) == pytest.approx(first.wait_quantile_s(0.95), rel=1e-9)


def test_cutting_off_costs_no_more_than_it_says() -> None:
    """A third phase that hardly differs from the second: three phases, cut, beside two phases, whole."""
    two = Hyperexponential((0.7, 0.3), (0.5, 2.1666))
    three = Hyperexponential((0.7, 0.15, 0.15), (0.5, 2.1666 * (1 - 1e-9), 2.1666 * (1 + 1e-9)))
    for servers in (40, 120):
        rate = 0.9 * servers / two.mean_s
        whole, cut = mphc(rate, two.phases(), servers), mphc(rate, three.phases(), servers)
        error = cut_error(three.phases(), servers)
        assert 0 < error < 1e-5
        assert cut.p_wait == pytest.approx(whole.p_wait, rel=error)
        assert cut.wait_quantile_s(0.99) == pytest.approx(whole.wait_quantile_s(0.99), rel=error)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.floats(0.2, 0.97), st.floats(0.5, 10.0), st.floats(1e-3, 1e3))
def test_times_scale_and_more_load_waits_longer(servers: int, rho: float, scv: float, mean_s: float) -> None:
    service = marie(scv) if scv < 1 else balanced(scv).phases()
    queue, scaled = mphc(rho * servers, service, servers), mphc(rho * servers / mean_s, service.scaled(mean_s), servers)
    assert scaled.p_wait == pytest.approx(queue.p_wait, rel=1e-7, abs=1e-12)
    assert scaled.sojourn_quantile_s(0.95) == pytest.approx(queue.sojourn_quantile_s(0.95) * mean_s, rel=1e-7)
    busier, roomier = mphc(rho * servers * 1.02, service, servers), mphc(rho * servers, service, servers + 1)
    assert roomier.p_wait - 1e-12 <= queue.p_wait <= busier.p_wait + 1e-12
    assert roomier.sojourn_quantile_s(0.95) <= queue.sojourn_quantile_s(0.95) * (1 + 1e-9) <= busier.sojourn_quantile_s(0.95) * (1 + 2e-9)
    assert queue.sojourn_s == pytest.approx(queue.wait_s + 1.0, rel=1e-9)
    assert queue.mean_requests == pytest.approx(rho * servers * queue.sojourn_s, rel=1e-9)


def test_bursts_that_do_not_differ_are_poisson() -> None:
    bursts = Bursts(rates_per_s=(7.0, 7.0, 7.0), switches_per_s=((0.0, 1.0, 0.2), (0.5, 0.0, 0.5), (2.0, 0.1, 0.0)))
    queue, poisson = mmpp_mc(bursts, 0.5, 4), mmc(7.0, 0.5, 4)
    assert queue.p_wait == pytest.approx(poisson.p_wait, rel=1e-10)
    assert queue.wait_quantile_s(0.99) == pytest.approx(poisson.wait_quantile_s(0.99), rel=1e-10)
    assert queue.sojourn_quantile_s(0.99) == pytest.approx(poisson.sojourn_quantile_s(0.99), rel=1e-10)


def test_a_stream_switched_on_and_off_is_a_renewal_stream() -> None:
    """Interrupted Poisson: the gaps are a two-phase law, so GI/M/c has the same wait."""
    on, off, rate = 0.3, 0.2, 6.0
    gaps = PhaseType([1.0, 0.0], [[-(rate + on), on], [off, -off]])
    bursts = Bursts(rates_per_s=(rate, 0.0), switches_per_s=((0.0, on), (off, 0.0)))
    for servers in (1, 3, 12):
        mean_s = 0.8 * servers * gaps.mean_s
        queue, renewal = mmpp_mc(bursts, mean_s, servers), gimc(gaps, mean_s, servers)
        assert queue.p_wait == pytest.approx(renewal.p_wait, rel=1e-8)
        assert queue.wait_quantile_s(0.99) == pytest.approx(renewal.wait_quantile_s(0.99), rel=1e-8)


def test_too_much_load_says_how_many_servers_would_do() -> None:
    with pytest.raises(Overload) as caught:
        mphc(10.0, marie(0.7), 10)
    assert caught.value.enough == 11
    with pytest.raises(Overload) as caught:
        mmpp_mc(Bursts(rates_per_s=(2.0, 6.0), switches_per_s=((0.0, 1.0), (1.0, 0.0))), 1.0, 3)
    assert caught.value.enough == 5


def test_what_is_no_station_is_refused() -> None:
    with pytest.raises(BadInput, match="server"):
        mphc(1.0, marie(0.7), 0)
    with pytest.raises(BadInput, match="positive arrival rate"):
        mphc(0.0, marie(0.7), 2)
    with pytest.raises(BadInput, match="without arrivals"):
        mmpp_mc(Bursts(rates_per_s=(0.0, 0.0), switches_per_s=((0.0, 1.0), (1.0, 0.0))), 1.0, 3)
    with pytest.raises(BadInput, match="service time"):
        mmpp_mc(Bursts(rates_per_s=(1.0, 2.0), switches_per_s=((0.0, 1.0), (1.0, 0.0))), 0.0, 3)


def test_where_nobody_ever_waits_the_sojourn_is_the_service() -> None:
    queue = mphc(1.0, marie(0.7), 60)
    assert (queue.p_wait, queue.wait_s, queue.wait_quantile_s(0.999)) == (0.0, 0.0, 0.0)
    assert queue.sojourn_quantile_s(0.9) == pytest.approx(marie(0.7).quantile_s(0.9), rel=1e-9)
