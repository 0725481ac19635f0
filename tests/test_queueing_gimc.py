"""GI/M/c: the truth table, textbook cases, and chains solved numerically beside the formula."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.gimc import gimc
from mlsys_bench.queueing.laws import Deterministic, Exponential, Gamma, Law, Lognormal, PhaseType, balanced, parse_law
from mlsys_bench.queueing.mmc import mmc
from tests import truth_table


def test_gi_m_c_reproduces_the_truth_table() -> None:
    rows = [row for row in truth_table.rows() if row["model"] == "GI/M/c"]
    wrong = []
    for row in rows:
        parameters = dict(part.split("=", 1) for part in row["parameters"].split(";"))
        c = int(parameters["c"])
        queue = gimc(parse_law(parameters["arrival"], 1 / (float(parameters["rho"]) * c)), 1.0, c)
        found = re.search(r"_p(\d\d)$", row["quantity"])
        value = (
            queue.wait_quantile_s(int(found[1]) / 100) if found else {"p_delay": queue.p_wait, "wait_mean": queue.wait_s}[row["quantity"]]
        )
        if not math.isclose(value, float(row["value"]), rel_tol=1e-9, abs_tol=1e-9):
            wrong.append((row, value))
    assert (len(rows) > 100, wrong) == (True, [])


@given(st.integers(1, 500), st.floats(0.01, 0.99), st.floats(1e-3, 1e3))
def test_poisson_arrivals_make_it_m_m_c(servers: int, rho: float, service_s: float) -> None:
    rate = rho * servers / service_s
    general, erlang = gimc(Exponential(1 / rate), service_s, servers), mmc(rate, service_s, servers)
    assert general.p_wait == pytest.approx(erlang.p_wait, rel=1e-8, abs=1e-300)
    assert general.wait_s == pytest.approx(erlang.wait_s, rel=1e-8, abs=1e-300)
    assert general.sojourn_quantile_s(0.99) == pytest.approx(erlang.sojourn_quantile_s(0.99), rel=1e-8)


@pytest.mark.parametrize(("servers", "rho"), [(2, 0.5), (10, 0.5), (10, 0.9), (4, 0.75), (10, 0.9 + 1e-9), (10, 0.9 - 1e-6), (100, 0.37)])
def test_terms_that_are_0_over_0_are_no_trouble(servers: int, rho: float) -> None:
    """Where c (1 - sigma) is a whole number, or almost, one term of the sum is 0 / 0: sigma = rho for Poisson arrivals."""
    assert gimc(Exponential(1 / (rho * servers)), 1.0, servers).p_wait == pytest.approx(mmc(rho * servers, 1.0, servers).p_wait, rel=1e-10)


def test_a_lone_server_by_hand() -> None:
    """GI/M/1: P(wait) = sigma.  For hyperexponential arrivals sigma = phi(mu (1 - sigma)) can be put in and checked."""
    arrivals = balanced(4.0, 1.25)
    queue = gimc(arrivals, 1.0, 1)
    sigma = queue.p_wait
    assert float(arrivals.lst(np.array([1 - sigma + 0j]))[0].real) == pytest.approx(sigma, rel=1e-12)
    assert queue.wait_s == pytest.approx(sigma / (1 - sigma), rel=1e-12)
    assert queue.sojourn_p(3.0) == pytest.approx(math.exp(-3 * (1 - sigma)), rel=1e-12)


def p_wait_of_phases(arrivals: PhaseType, servers: int, most: int) -> float:
    """Return P(an arrival finds all servers busy) from the chain of (phase of the next arrival, number present), cut at `most`."""
    n, k = most + 1, len(arrivals.alpha)
    jumps = np.outer(arrivals.exits_per_s, arrivals.alpha)
    down = np.minimum(np.arange(n), servers).astype(float)
    pi, rates = np.zeros((n, k)), [np.eye(k)] * n  # pi_n = pi_(n-1) R_n, from the top down: level n is left only for its neighbours
    for level in range(n - 1, 0, -1):
        local = arrivals.S - down[level] * np.eye(k)
        upward = jumps if level == n - 1 else rates[level + 1] * down[level + 1]
        rates[level] = -jumps @ np.linalg.inv(local + upward)
    bottom = arrivals.S + rates[1] * down[1]
    pi[0] = np.linalg.svd(bottom.T)[2][-1]
    for level in range(1, n):
        pi[level] = pi[level - 1] @ rates[level]
    seen = pi @ arrivals.exits_per_s
    return float(seen[servers:].sum() / seen.sum())


@pytest.mark.parametrize(
    ("servers", "rho", "law"), [(3, 0.6, "erl:3"), (40, 0.9, "h2:4"), (120, 0.85, "h2:10"), (300, 0.95, "erl:2"), (30, 0.3, "h2:9")]
)
def test_it_agrees_with_the_chain_of_phases(servers: int, rho: float, law: str) -> None:
    arrivals = parse_law(law, 1 / (servers * rho))
    phases = arrivals.phases()
    assert phases is not None
    assert gimc(arrivals, 1.0, servers).p_wait == pytest.approx(p_wait_of_phases(phases, servers, servers + 1500), rel=1e-9)


def p_wait_of_embedded_chain(arrivals: Law, servers: int, most: int) -> float:
    """Return P(an arrival finds all servers busy) from the chain seen by arrivals, cut at `most`.

    Between arrivals only departures happen, at rate min(n, c): ticks of a clock of rate c, as many as a Poisson law mixed over the
    time between arrivals (a sum over its quantiles) says.
    """
    from scipy.special import gammaln

    nodes, weights = np.polynomial.legendre.leggauss(40)
    edges = np.concatenate([[0.0], 10.0 ** np.arange(-9, -1), [0.05, 0.2, 0.5, 0.8, 0.95], 1 - 10.0 ** -np.arange(2, 11), [1.0]])
    half = np.diff(edges) / 2
    u, w = (edges[:-1, None] + half[:, None] * (1 + nodes)).ravel(), (half[:, None] * weights).ravel()
    mean = servers * arrivals.quantiles(u)
    ticks = np.arange(int(mean.max() + 10 * math.sqrt(mean.max()) + 30))
    counts = w @ np.exp(ticks * np.log(mean)[:, None] - mean[:, None] - gammaln(ticks + 1))
    n = np.arange(most + 2)
    leave = np.minimum(n, servers) / servers
    row, P = np.eye(most + 2), np.zeros((most + 2, most + 2))
    for share in counts:
        P += share * row
        row = row * (1 - leave) + np.hstack([row[:, 1:] * leave[1:], np.zeros((most + 2, 1))])
    step = P[1:, : most + 1].copy()  # found n, so n + 1 after the arrival
    step[-1] = step[-2]  # whoever finds it full is lost
    balance = np.vstack([step.T - np.eye(most + 1), np.ones(most + 1)])
    pi = np.linalg.lstsq(balance, np.append(np.zeros(most + 1), 1.0), rcond=None)[0]
    return float(pi[servers:].sum())


@pytest.mark.parametrize(
    ("arrivals", "servers", "rho", "rel"),
    [(Deterministic(), 12, 0.85, 1e-9), (Gamma(0.3), 20, 0.8, 1e-8), (Gamma(3.0), 8, 0.5, 1e-6), (Lognormal(2.0), 6, 0.6, 1e-6)],
)
def test_it_agrees_with_the_chain_seen_by_arrivals(arrivals: Law, servers: int, rho: float, rel: float) -> None:
    law = arrivals.scaled(1 / (servers * rho))
    assert gimc(law, 1.0, servers).p_wait == pytest.approx(p_wait_of_embedded_chain(law, servers, servers + 130), rel=rel)


@given(
    st.sampled_from(["det", "erl:3", "gamma:0.25", "gamma:10", "h2:4", "logn:2"]),
    st.integers(1, 60),
    st.floats(0.05, 0.95),
    st.floats(0.5, 0.99),
)
def test_waiting_grows_with_load_and_falls_with_servers(law: str, servers: int, rho: float, less: float) -> None:
    rate = rho * servers
    queue = gimc(parse_law(law, 1 / rate), 1.0, servers)
    lighter, wider = gimc(parse_law(law, 1 / (less * rate)), 1.0, servers), gimc(parse_law(law, 1 / rate), 1.0, servers + 1)
    for other in (lighter, wider):
        assert other.p_wait <= queue.p_wait * (1 + 1e-9)
        assert other.wait_s <= queue.wait_s * (1 + 1e-9)
    assert queue.mean_requests == pytest.approx(queue.mean_waiting + rate, rel=1e-9)


@given(st.integers(1, 60), st.floats(0.05, 0.95), st.floats(1e-3, 1e3))
def test_it_has_no_unit(servers: int, rho: float, service_s: float) -> None:
    queue, stretched = (gimc(Gamma(4.0, s / (rho * servers)), s, servers) for s in (1.0, service_s))
    assert stretched.wait_s == pytest.approx(service_s * queue.wait_s, rel=1e-9)
    assert stretched.sojourn_quantile_s(0.99) == pytest.approx(service_s * queue.sojourn_quantile_s(0.99), rel=1e-9)


def test_steadier_arrivals_wait_less() -> None:
    waits = [gimc(parse_law(law, 1 / 45), 1.0, 50).wait_s for law in ("det", "erl:4", "exp", "gamma:2", "gamma:4", "gamma:10")]
    assert waits == sorted(waits)


def test_overload_and_bad_input_are_refused() -> None:
    with pytest.raises(Overload, match="6 would do"):
        gimc(Deterministic(0.2), 1.0, 5)
    with pytest.raises(BadInput, match="service time of 0"):
        gimc(Deterministic(1.0), 0.0, 5)
    with pytest.raises(BadInput, match="at least one"):
        gimc(Deterministic(1.0), 1.0, 0)
