"""Queueing formulas against truth tables, textbook answers, and each other."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Overload
from mlsys_bench.queueing.chain import Batching
from mlsys_bench.queueing.inferno import inferno
from mlsys_bench.queueing.laws import Exponential, Lognormal
from mlsys_bench.queueing.mmc import erlang_b, erlang_c, fewest, loss, mmc, mmck
from mlsys_bench.queueing.queue import Queue
from mlsys_bench.queueing.times import MatrixExponential
from tests import truth_table


def truth(model: str) -> list[tuple[dict[str, str], str, float]]:
    """Return (parameters, quantity, value) of one model's rows."""
    rows = [row for row in truth_table.rows() if row["model"] == model]
    assert rows
    return [(dict(part.split("=", 1) for part in row["parameters"].split(";")), row["quantity"], float(row["value"])) for row in rows]


def agrees(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=1e-7, abs_tol=1e-9)


def percentile(quantity: str) -> float | None:
    found = re.search(r"_p(\d\d)$", quantity)
    return int(found[1]) / 100 if found else None


# ---------------------------------------------------------------- Erlang and M/M/c


def of_queue(queue: Queue, quantity: str) -> float:
    """Return what a row of the table calls `quantity`."""
    p = percentile(quantity)
    if p is not None:
        return queue.wait_quantile_s(p) if quantity.startswith("wait") else queue.sojourn_quantile_s(p)
    names = {"p_delay": "p_wait", "wait_mean": "wait_s", "sojourn_mean": "sojourn_s", "blocking": "p_blocked"}
    return float(getattr(queue, names.get(quantity, "mean_waiting")))


def test_erlang_b_reproduces_the_truth_table() -> None:
    rows = truth("M/M/c/c")
    wrong = [(p, v) for p, _, v in rows if not agrees(erlang_b(int(p["c"]), float(p["a"])), v)]
    assert wrong == []


def test_m_m_c_reproduces_the_truth_table() -> None:
    wrong = []
    for parameters, quantity, expected in truth("M/M/c"):
        queue = mmc(float(parameters["rho"]) * int(parameters["c"]), 1.0, int(parameters["c"]))
        value = of_queue(queue, quantity)
        tolerance = 1e-6 if quantity == "Lq_mean_published" else 1e-9  # printed with six decimals
        if not math.isclose(value, expected, rel_tol=1e-8, abs_tol=tolerance):
            wrong.append((parameters, quantity, expected, value))
    assert wrong == []


def test_a_lone_server_waits_as_the_textbook_says() -> None:
    """M/M/1 at 80 % load: P(wait) = 0.8, mean wait four service times, sojourn exponential with mean five."""
    queue = mmc(0.8, 1.0, 1)
    assert (queue.p_wait, queue.wait_s, queue.sojourn_s) == pytest.approx((0.8, 4.0, 5.0))
    assert queue.sojourn_p(3.0) == pytest.approx(math.exp(-3 / 5))
    assert queue.sojourn_quantile_s(0.95) == pytest.approx(-5 * math.log(0.05))


def test_erlang_c_of_two_servers_by_hand() -> None:
    """For c = 2, C = 2 rho^2 / (1 + rho)."""
    assert erlang_c(2, 1.5) == pytest.approx(2 * 0.75**2 / 1.75)


def test_erlang_formulas_agree_with_direct_sums() -> None:
    """The definition with factorials, in exact integers, where they still fit."""
    from fractions import Fraction

    for c, a in itertools.product((1, 3, 20, 60), (Fraction(1, 2), Fraction(5, 2), Fraction(17))):
        terms = [a**k / math.factorial(k) for k in range(c + 1)]
        assert erlang_b(c, float(a)) == pytest.approx(float(terms[-1] / sum(terms)), rel=1e-12)
        if a < c:
            last = terms[-1] * c / (c - a)
            assert erlang_c(c, float(a)) == pytest.approx(float(last / (sum(terms[:-1]) + last)), rel=1e-12)


def test_ten_thousand_servers_stay_finite_and_near_the_halfin_whitt_limit() -> None:
    """With a = c - beta sqrt(c), C tends to 1 / (1 + beta Phi(beta) / phi(beta))."""
    beta, c = 1.0, 10_000
    density = math.exp(-beta * beta / 2) / math.sqrt(2 * math.pi)
    limit = 1 / (1 + beta * (0.5 * (1 + math.erf(beta / math.sqrt(2)))) / density)
    assert erlang_c(c, c - beta * math.sqrt(c)) == pytest.approx(limit, rel=0.02)  # corrections are of order 1 / sqrt(c)
    assert erlang_b(c, 100.0) == 0.0
    assert 0 < erlang_c(c, 9999.9) < 1


def test_the_sojourn_needs_no_special_case_where_both_rates_coincide() -> None:
    """Two servers at load one have c mu - lambda = mu: the law is continuous through that point."""
    inside = mmc(1.0, 1.0, 2)
    assert inside.sojourn_p(2.0) == pytest.approx(math.exp(-2) * (1 + inside.p_wait * 2), rel=1e-14)
    for rate in (1 - 1e-9, 1 + 1e-9):
        assert mmc(rate, 1.0, 2).sojourn_p(2.0) == pytest.approx(inside.sojourn_p(2.0), rel=1e-8)


loads = st.tuples(st.integers(1, 300), st.floats(0.01, 0.999), st.floats(1e-3, 1e3))


@given(loads)
def test_quantiles_invert_the_laws(load: tuple[int, float, float]) -> None:
    c, rho, service_s = load
    queue = mmc(rho * c / service_s, service_s, c)
    assert queue.sojourn_p(queue.sojourn_quantile_s(0.99)) == pytest.approx(0.01, rel=1e-9)
    wait_s = queue.wait_quantile_s(0.99)
    assert queue.wait_p(wait_s) == pytest.approx(0.01, rel=1e-9) if wait_s > 0 else queue.p_wait <= 0.01 + 1e-15


@given(loads, st.floats(0.001, 0.999))
def test_waiting_grows_with_load_falls_with_servers_and_has_no_unit(load: tuple[int, float, float], less: float) -> None:
    c, rho, scale = load
    queue = mmc(rho * c, 1.0, c)
    assert mmc(rho * c * less, 1.0, c).p_wait <= queue.p_wait
    assert mmc(rho * c, 1.0, c + 1).p_wait <= queue.p_wait
    assert mmc(rho * c / scale, scale, c).sojourn_quantile_s(0.9) == pytest.approx(scale * queue.sojourn_quantile_s(0.9), rel=1e-9)


@given(st.floats(0.05, 60), st.floats(0.01, 5))
def test_the_fewest_servers_are_those_of_brute_force(offered: float, limit_s: float) -> None:
    brute = next(c for c in itertools.count(math.floor(offered) + 1) if mmc(offered, 1.0, c).wait_p(limit_s) <= 1 - 0.95)
    assert fewest(offered, 1.0, limit_s, 0.95) == brute


@pytest.mark.parametrize(("offered", "enough"), [(4.0, 5), (4.7, 5), (9.99, 10)])
def test_overload_says_how_many_servers_would_do(offered: float, enough: int) -> None:
    with pytest.raises(Overload, match=f"{enough} would do") as caught:
        mmc(offered, 1.0, 4)
    assert caught.value.enough == enough
    assert mmc(offered, 1.0, enough).utilisation < 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: erlang_b(0, 1.0), "at least one"),
        (lambda: erlang_c(2, math.nan), "nan erlangs"),
        (lambda: mmc(1.0, 0.0, 2), "service time of 0"),
        (lambda: mmc(1.0, 1.0, 2).wait_quantile_s(1.0), "between 0 and 1"),
        (lambda: mmck(1.0, 1.0, 4, 3), "less than the 4 servers"),
        (lambda: mmck(math.nan, 1.0, 4, 5), "nan erlangs"),
        (lambda: Batching(1.0, []), "one positive"),
        (lambda: Batching(1.0, [2.0, -1.0]), "one positive"),
        (lambda: Batching(-1.0, [2.0]), "arrival rate of -1"),
        (lambda: Batching(1.0, [2.0, 3.0], capacity=1), "less than the 2 slots"),
        (lambda: Batching(1.0, [2.0]).wait_quantile_s(0.0), "between 0 and 1"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, says: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadInput, match=says):
        call()


# ---------------------------------------------------------------- finite queues and loss


def test_m_m_c_k_reproduces_the_truth_table() -> None:
    wrong = []
    for parameters, quantity, expected in truth("M/M/c/K"):
        c = int(parameters["c"])
        value = of_queue(mmck(float(parameters["rho"]) * c, 1.0, c, int(parameters["K"])), quantity)
        if not math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-12):
            wrong.append((parameters, quantity, expected, value))
    assert wrong == []


def test_a_full_house_at_saturation_by_hand() -> None:
    """M/M/1/K at rho = 1 is found in each state equally often: K blocks 1 in K + 1, and (K - 1) / 2 wait before whoever gets in."""
    queue = mmck(2.0, 0.5, 1, 10)
    assert queue.p_blocked == pytest.approx(1 / 11, rel=1e-13)
    assert queue.wait_s == pytest.approx(0.5 * 4.5, rel=1e-13)
    assert queue.p_wait == pytest.approx(0.9, rel=1e-13)


@pytest.mark.parametrize(("c", "capacity", "rho"), [(1, 5, 0.7), (3, 9, 1.0), (5, 12, 1.6), (4, 4, 2.0), (2, 3, 0.1)])
def test_finite_queues_agree_with_their_phase_type_form(c: int, capacity: int, rho: float) -> None:
    """The same laws as matrix exponentials: stages of rate c mu, then one's own service."""
    queue, found = mmck(rho * c, 1.0, c, capacity), np.cumprod(np.append(1.0, rho * c / np.minimum(np.arange(1, capacity), c)))
    found /= found.sum()
    stages = capacity - c  # entered so that k of them are left
    S = -c * np.eye(stages + 1) + c * np.eye(stages + 1, k=1)
    S[-1, -1] = -1.0
    alpha = np.append(found[c:][::-1], found[:c].sum())
    sojourn = MatrixExponential(alpha, S)
    assert (queue.sojourn_s, queue.sojourn.variance_s2) == pytest.approx((sojourn.mean_s, sojourn.variance_s2), rel=1e-10)
    for p in (0.1, 0.5, 0.99, 0.9999):
        assert queue.sojourn_quantile_s(p) == pytest.approx(sojourn.quantile_s(p), rel=1e-9)
    if stages:
        wait = MatrixExponential(alpha[:-1], S[:-1, :-1])
        assert (queue.wait_s, queue.wait.variance_s2) == pytest.approx((wait.mean_s, wait.variance_s2), rel=1e-10)
        assert queue.wait_quantile_s(0.99) == pytest.approx(wait.quantile_s(0.99), rel=1e-9)


@given(st.integers(1, 60), st.floats(0.01, 0.97), st.floats(1e-3, 1e3))
def test_a_large_waiting_room_is_an_endless_one(c: int, rho: float, service_s: float) -> None:
    finite, endless = mmck(rho * c / service_s, service_s, c, c + 1300), mmc(rho * c / service_s, service_s, c)
    assert finite.wait_quantile_s(0.99) == pytest.approx(endless.wait_quantile_s(0.99), rel=1e-9, abs=1e-12 * service_s)
    assert finite.sojourn_quantile_s(0.95) == pytest.approx(endless.sojourn_quantile_s(0.95), rel=1e-9)
    assert finite.sojourn.variance_s2 == pytest.approx(endless.sojourn.variance_s2, rel=1e-9)


@given(st.integers(1, 40), st.integers(0, 40), st.floats(0.01, 3))
def test_a_finite_queue_is_in_balance(c: int, room: int, rho: float) -> None:
    """Busy servers by flow (served x service) and by Little's law; more room blocks less, more load blocks more."""
    queue = mmck(rho * c, 1.0, c, c + room)
    assert queue.mean_requests - queue.mean_waiting == pytest.approx(rho * c * (1 - queue.p_blocked), rel=1e-9)
    assert mmck(rho * c, 1.0, c, c + room + 1).p_blocked <= queue.p_blocked * (1 + 1e-9)
    assert mmck(rho * c * 0.9, 1.0, c, c + room).p_blocked <= queue.p_blocked * (1 + 1e-9)


def test_a_loss_system_blocks_by_erlang_s_b_whatever_the_service() -> None:
    queue, bounded = loss(8.0, Lognormal(4.0), 10), mmck(8.0, 1.0, 10, 10)
    assert queue.p_blocked == pytest.approx(bounded.p_blocked, rel=1e-12)
    assert queue.throughput_per_s == pytest.approx(8.0 * (1 - erlang_b(10, 8.0)))
    assert (queue.wait_quantile_s(0.99), queue.sojourn_quantile_s(0.5)) == (0.0, Lognormal(4.0).quantile_s(0.5))
    assert loss(8.0, Exponential(), 10).sojourn_quantile_s(0.9) == pytest.approx(bounded.sojourn_quantile_s(0.9), rel=1e-9)


def test_ten_thousand_places_stay_exact() -> None:
    """Far above saturation the queue is all but full: the wait is that of K - c departures, less the few places free."""
    queue = mmck(1.5, 1.0, 1, 10_000)
    assert queue.p_blocked == pytest.approx(1 / 3, rel=1e-9)
    assert queue.wait_s == pytest.approx(9_999 - 2, rel=1e-9)  # an accepted customer finds geometric(2/3) fewer than K - 1: two on average
    assert abs(queue.wait_quantile_s(0.5) - queue.wait_s) < 0.02 * 100


@given(loads)
def test_variances_follow_from_the_law(load: tuple[int, float, float]) -> None:
    """E[T^2] = integral of 2 t P(T > t), here in closed form: p_wait 2 / theta^2 for the wait."""
    c, rho, service_s = load
    queue = mmc(rho * c / service_s, service_s, c)
    theta = c / service_s * (1 - rho)
    assert queue.wait.variance_s2 == pytest.approx(2 * queue.p_wait / theta**2 - queue.wait_s**2, rel=1e-9)
    assert queue.sojourn.variance_s2 == pytest.approx(queue.wait.variance_s2 + service_s**2, rel=1e-12)


# ---------------------------------------------------------------- the batching chain


def llm_chain(parameters: dict[str, str]) -> Batching:
    n = np.arange(1, int(parameters["max_batch"]) + 1)
    rates = n / (float(parameters["tokens"]) * (float(parameters["alpha"]) + float(parameters["beta"]) * n))
    return Batching(float(parameters["lambda"]), rates, capacity=int(parameters["K"]))


def test_the_chain_reproduces_the_truth_table() -> None:
    wrong, rows = [], truth("LLM-BD")
    chains = {parameters["lambda"] + parameters["K"]: llm_chain(parameters) for parameters, _, _ in rows}
    for parameters, quantity, expected in rows:
        chain = chains[parameters["lambda"] + parameters["K"]]
        value = chain.mean_batch if quantity == "mean_in_service" else of_queue(chain.queue, quantity)
        if not math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-9):
            wrong.append((parameters, quantity, expected, value))
    assert (len(rows), wrong) == (36, [])


def test_slot_bound_simulations_agree_with_the_chain_on_means() -> None:
    """Iteration-level simulations of others, whose lengths are not exponential; the chain's mean batch and ITL are within 3 %."""
    seen = 0
    for parameters, quantity, expected in truth("LLM"):
        if parameters.get("kv_tokens") != "1e+09" or quantity not in {"time_avg_batch", "itl_mean"}:
            continue
        prompt, output = mean_tokens(parameters["prompt"]), mean_tokens(parameters["output"])
        n = np.arange(1, int(parameters["max_batch"]) + 1)
        step = float(parameters["a0"]) + n * (float(parameters["b0"]) + float(parameters["pf"]) * prompt / output)
        chain = Batching(float(parameters["lambda"]), n / (output * step))
        value = chain.mean_batch if quantity == "time_avg_batch" else float(chain.batch_law_of_tokens @ step)
        assert value == pytest.approx(expected, rel=0.03), (parameters, quantity)
        seen += 1
    assert seen == 4


def mean_tokens(law: str) -> float:
    found = re.search(r"mean (\d+)", law)
    assert found is not None
    return float(found[1])


rates = st.lists(st.floats(0.05, 20), min_size=1, max_size=40).map(lambda steps: np.cumsum(np.sort(steps)[::-1]))


@given(rates, st.floats(0.01, 0.99), st.one_of(st.none(), st.integers(0, 30)))
def test_little_s_law_and_flow_balance_hold(completions: np.ndarray, rho: float, room: int | None) -> None:
    """L = lambda T; arrivals accepted = completions; and the mean wait from the law of the wait is the one from the queue's length."""
    chain = Batching(rho * completions[-1], completions, capacity=None if room is None else len(completions) + room)
    done = float(chain.batch_law[1:] @ completions)
    assert done == pytest.approx(chain.throughput_per_s, rel=1e-9)
    assert chain.mean_requests == pytest.approx(chain.throughput_per_s * chain.sojourn_s, rel=1e-9)
    assert float(chain.batch_law.sum()) == pytest.approx(1.0, rel=1e-12)
    if room is None:
        assert chain.p_wait / (completions[-1] - chain.rate_per_s) == pytest.approx(chain.wait_s, rel=1e-6, abs=1e-12 * chain.sojourn_s)


@given(st.integers(1, 80), st.floats(0.01, 0.98))
def test_equal_speeds_make_the_chain_an_m_m_c_queue(servers: int, rho: float) -> None:
    queue, chain = mmc(rho * servers, 1.0, servers), Batching(rho * servers, np.arange(1.0, servers + 1))
    assert chain.p_wait == pytest.approx(queue.p_wait, rel=1e-9)
    assert chain.wait_quantile_s(0.99) == pytest.approx(queue.wait_quantile_s(0.99), rel=1e-9, abs=1e-12)
    assert chain.wait_p(0.3) == pytest.approx(queue.wait_p(0.3), rel=1e-9)


@given(st.integers(1, 80), st.floats(0.01, 0.98))
def test_equal_speeds_make_its_sojourn_that_of_m_m_c(servers: int, rho: float) -> None:
    """With r(n) = n mu the tagged request's own speed never changes, though the chain does not know that."""
    queue, chain = mmc(rho * servers, 1.0, servers), Batching(rho * servers, np.arange(1.0, servers + 1)).queue
    assert chain.sojourn_s == pytest.approx(queue.sojourn_s, rel=1e-9)
    assert chain.sojourn.variance_s2 == pytest.approx(queue.sojourn.variance_s2, rel=1e-8)
    assert chain.wait.variance_s2 == pytest.approx(queue.wait.variance_s2, rel=1e-8)
    for p in (0.1, 0.5, 0.99):
        assert chain.sojourn_quantile_s(p) == pytest.approx(queue.sojourn_quantile_s(p), rel=1e-8)


@pytest.mark.parametrize(("servers", "room", "rho"), [(1, 9, 0.8), (4, 30, 1.1), (8, 1, 2.0), (5, 0, 0.9), (3, 80, 0.97)])
def test_equal_speeds_and_a_capacity_make_it_m_m_c_k(servers: int, room: int, rho: float) -> None:
    queue = mmck(rho * servers, 1.0, servers, servers + room)
    chain = Batching(rho * servers, np.arange(1.0, servers + 1), capacity=servers + room).queue
    assert (chain.wait_s, chain.sojourn_s) == pytest.approx((queue.wait_s, queue.sojourn_s), rel=1e-9)
    assert chain.sojourn.variance_s2 == pytest.approx(queue.sojourn.variance_s2, rel=1e-9)
    for p in (0.1, 0.5, 0.99):
        assert chain.sojourn_quantile_s(p) == pytest.approx(queue.sojourn_quantile_s(p), rel=1e-9)
        assert chain.wait_quantile_s(p) == pytest.approx(queue.wait_quantile_s(p), rel=1e-9)


def sublinear(slots: int) -> np.ndarray:
    n = np.arange(1.0, slots + 1)
    return n / (1 + 0.1 * n)


@pytest.mark.parametrize(("slots", "rho", "room"), [(1, 0.6, 58), (6, 0.8, 125), (20, 0.9, 260)])
def test_two_ways_to_the_sojourn_agree(slots: int, rho: float, room: int) -> None:
    """An endless queue by a contour integral; by uniformisation one that loses next to nothing, yet enough not to be taken for endless."""
    r = sublinear(slots)
    endless, bounded = Batching(rho * r[-1], r), Batching(rho * r[-1], r, capacity=slots + room)
    assert 1e-14 < bounded.p_blocked < 1e-11
    for p in (0.2, 0.9, 0.99):
        assert endless.sojourn_quantile_s(p) == pytest.approx(bounded.sojourn_quantile_s(p), rel=1e-9)
    assert endless.queue.sojourn.variance_s2 == pytest.approx(bounded.queue.sojourn.variance_s2, rel=1e-8)


@pytest.mark.parametrize(("slots", "rho", "capacity"), [(6, 0.8, None), (6, 1.2, 20), (6, 0.9, 6), (1, 0.5, None)])
def test_mean_and_variance_of_the_sojourn_are_those_of_its_law(slots: int, rho: float, capacity: int | None) -> None:
    """Mean by Little's law and variance by linear systems, against integrals of P(T > t)."""
    r = sublinear(slots)
    time = Batching(rho * r[-1], r, capacity=capacity).sojourn
    nodes, weights = np.polynomial.legendre.leggauss(20)
    edges = np.linspace(0, 60 * time.mean_s, 120)
    half = np.diff(edges) / 2
    t, w = (edges[:-1, None] + half[:, None] * (1 + nodes)).ravel(), (half[:, None] * weights).ravel()
    over = time.survival(t)
    assert float(w @ over) == pytest.approx(time.mean_s, rel=1e-7)
    assert float(2 * (w * t) @ over) - time.mean_s**2 == pytest.approx(time.variance_s2, rel=1e-6)


@given(rates, st.floats(0.05, 0.95), st.floats(1e-3, 1e3))
def test_its_sojourn_has_no_unit_and_grows_with_load(completions: np.ndarray, rho: float, scale: float) -> None:
    chain = Batching(rho * completions[-1], completions)
    stretched, lighter = Batching(rho * completions[-1] / scale, completions / scale), Batching(0.8 * rho * completions[-1], completions)
    assert stretched.sojourn_quantile_s(0.95) == pytest.approx(scale * chain.sojourn_quantile_s(0.95), rel=1e-7)
    assert lighter.sojourn_quantile_s(0.95) <= chain.sojourn_quantile_s(0.95) * (1 + 1e-9)


def test_llm_inferno_s_published_example_comes_out() -> None:
    """To the digits of the single precision it was computed in."""
    rows = truth("LLM-BD inferno README")
    p = {name: float(value) for name, value in rows[0][0].items()}
    got = inferno(
        p["RPS"],
        max_batch=int(p["maxBatch"]),
        max_queue=int(p["maxQueue"]),
        input_tokens=p["inTok"],
        output_tokens=p["outTok"],
        alpha_s=p["alpha"] / 1000,
        beta_s=p["beta"] / 1000,
        gamma_s=p["gamma"] / 1000,
    )
    ours = {
        "avgRespTime_ms": 1000 * got.sojourn_s,
        "avgWaitTime_ms": 1000 * got.wait_s,
        "avgNumInServ": got.mean_in_service,
        "avgTTFT_ms": 1000 * got.ttft_s,
        "avgITL_ms": 1000 * got.itl_s,
        "maxRPS": got.most_per_s,
    }
    assert {quantity: ours[quantity] for _, quantity, _ in rows} == pytest.approx(
        {quantity: value for _, quantity, value in rows}, rel=1e-5
    )


@given(rates, st.floats(0.01, 0.98), st.floats(0.1, 1), st.floats(1e-3, 1e3))
def test_the_chain_waits_longer_under_more_load_and_has_no_unit(completions: np.ndarray, rho: float, less: float, scale: float) -> None:
    chain = Batching(rho * completions[-1], completions)
    assert Batching(less * rho * completions[-1], completions).wait_s <= chain.wait_s * (1 + 1e-9) + 1e-12
    stretched = Batching(rho * completions[-1] / scale, completions / scale)
    assert stretched.wait_quantile_s(0.95) == pytest.approx(scale * chain.wait_quantile_s(0.95), rel=1e-6, abs=1e-12 * scale)


def test_a_token_sees_the_batch_that_an_arrival_leaves() -> None:
    """By flow balance the token-weighted batch is one more than what a Poisson arrival finds, cut at B."""
    chain = Batching(1.6, [1.0, 1.5, 1.9])
    found = [chain.p(0), chain.p(1), 1 - chain.p(0) - chain.p(1)]
    assert chain.batch_law_of_tokens == pytest.approx(found, rel=1e-12)


def test_a_large_capacity_is_no_capacity() -> None:
    free, bounded = Batching(1.5, [1.0, 1.5, 1.9]), Batching(1.5, [1.0, 1.5, 1.9], capacity=400)
    assert bounded.wait_quantile_s(0.99) == pytest.approx(free.wait_quantile_s(0.99), rel=1e-9)
    assert bounded.p(7) == pytest.approx(free.p(7), rel=1e-9)
    assert bounded.p_blocked < 1e-30


def test_ten_thousand_slots_stay_finite() -> None:
    n = np.arange(1.0, 10_001)
    chain = Batching(500.0, n / (1 + 0.001 * n))
    assert 0 < chain.mean_batch < 10_000
    assert math.isfinite(chain.wait_quantile_s(0.999))


def test_an_empty_replica_waits_for_nothing() -> None:
    chain = Batching(0.0, [1.0, 2.0])
    assert (chain.p(0), chain.wait_s, chain.p_wait, chain.mean_requests) == (1.0, 0.0, 0.0, 0.0)
    assert chain.sojourn_p(2.0) == pytest.approx(math.exp(-2))
    assert chain.batch_law_of_tokens.tolist() == [1.0, 0.0]


def test_an_overloaded_replica_says_how_many_would_do() -> None:
    with pytest.raises(Overload, match="3 would do"):
        Batching(5.0, [1.0, 2.0])
