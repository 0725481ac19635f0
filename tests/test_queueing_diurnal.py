"""Load and servers that change with time, against the truth table, steady states, a simulation and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.errors import BadInput, Infeasible, Overload
from mlsys_bench.queueing.diurnal import Moment, Sinusoid, Steps, backlog, cold_start, mt_g_inf, mt_m_c, recovery_s, staffing
from mlsys_bench.queueing.laws import Deterministic, Exponential, Lognormal, parse_law
from mlsys_bench.queueing.mmc import erlang_c, mmc
from mlsys_bench.queueing.schedule import Plan
from mlsys_bench.queueing.virtual_wait import VirtualWait
from tests import truth_table


def rows(model: str) -> list[tuple[dict[str, str], str, float]]:
    """Return (parameters, quantity, value) of one model's rows."""
    found = [row for row in truth_table.rows() if row["model"] == model]
    assert found
    parts = [[part for part in row["parameters"].split(";") if part.count("=") == 1] for row in found]
    return [(dict(p.split("=") for p in part), row["quantity"], float(row["value"])) for part, row in zip(parts, found, strict=True)]


def read(moment: Moment, quantity: str) -> float:
    if quantity.startswith("virtual_wait_p"):
        return moment.virtual_wait.quantile_s(int(quantity[-2:]) / 100)
    return {"p_delay": moment.p_delay, "mean_in_system": moment.mean_requests}[quantity]


def wave(p: dict[str, str]) -> Sinusoid:
    return Sinusoid(mean_per_s=float(p["lb"]), swing=float(p["beta"]), period_s=float(p["T"]))


def test_the_daily_wave_reproduces_the_truth_table() -> None:
    known: dict[str, Moment] = {}
    wrong = []
    for p, quantity, expected in rows("Mt/M/c"):
        key = str(p)
        if key not in known:
            (known[key],) = mt_m_c(wave(p), 1.0, int(p["c"]), [float(p["phase"]) * float(p["T"])], period_s=float(p["T"]))
        if not math.isclose(read(known[key], quantity), expected, rel_tol=1e-6, abs_tol=1e-9):
            wrong.append((p, quantity, expected, read(known[key], quantity)))
    assert wrong == []


def test_cold_starts_reproduce_the_truth_table() -> None:
    wrong = []
    for p, quantity, expected in rows("COLDSTART Mt/M/ct"):
        (moment,) = cold_start(
            before_per_s=float(p["lambda1"]),
            after_per_s=float(p["lambda2"]),
            service_s=1.0,
            servers=int(p["c1"]),
            servers_after=int(p["c2"]),
            cold_s=float(p["cold"]),
            times_s=[float(p["t"])],
        )
        if not math.isclose(read(moment, quantity), expected, rel_tol=1e-7):
            wrong.append((p, quantity, expected, read(moment, quantity)))
    assert wrong == []


def test_unlimited_servers_reproduce_the_truth_table() -> None:
    for p, _, expected in rows("Mt/M/inf"):
        assert mt_g_inf(wave(p), Exponential(1.0), [float(p["phase"]) * float(p["T"])])[0] == pytest.approx(expected, rel=1e-12)


def test_a_load_that_never_changes_is_the_stationary_queue() -> None:
    """Both as a period and from a stationary start: M/M/c at all times, the virtual wait that of Erlang C."""
    flat, steady = Sinusoid(mean_per_s=8.0, swing=0.0, period_s=3.0), mmc(8.0, 1.0, 10)
    for moments in (mt_m_c(flat, 1.0, 10, [1.0], period_s=3.0), mt_m_c(flat, 1.0, 10, [4.0], stationary_at_per_s=8.0)):
        (moment,) = moments
        assert moment.p_delay == pytest.approx(steady.p_wait, rel=1e-6)
        assert moment.virtual_wait.mean_s == pytest.approx(steady.wait_s, rel=1e-6)
        assert moment.virtual_wait.variance_s2 == pytest.approx(steady.wait.variance_s2, rel=1e-6)
        assert moment.virtual_wait.quantile_s(0.99) == pytest.approx(steady.wait_quantile_s(0.99), rel=1e-6)


def test_a_slow_day_is_a_row_of_steady_states() -> None:
    slow = Sinusoid(mean_per_s=6.0, swing=0.3, period_s=3e4)
    (peak,) = mt_m_c(slow, 1.0, 10, [7500.0], period_s=3e4)
    assert peak.p_delay == pytest.approx(mmc(7.8, 1.0, 10).p_wait, rel=1e-3)


def test_with_servers_to_spare_the_wave_is_that_of_unlimited_servers() -> None:
    busy = Sinusoid(mean_per_s=10.0, swing=0.5, period_s=7.0)
    moments = mt_m_c(busy, 2.0, 200, [0.0, 2.0, 5.0], period_s=7.0)
    assert [m.mean_requests for m in moments] == pytest.approx(list(mt_g_inf(busy, Exponential(2.0), [0.0, 2.0, 5.0])), rel=1e-6)
    assert all(m.p_delay < 1e-9 for m in moments)


def test_times_scale_with_the_unit() -> None:
    (slow,) = mt_m_c(Sinusoid(mean_per_s=3.0, swing=0.8, period_s=10.0), 1.0, 5, [2.5], period_s=10.0)
    (fast,) = mt_m_c(Sinusoid(mean_per_s=3000.0, swing=0.8, period_s=0.01), 1e-3, 5, [0.0025], period_s=0.01)
    assert fast.virtual_wait.quantile_s(0.99) * 1e3 == pytest.approx(slow.virtual_wait.quantile_s(0.99), rel=1e-6)
    assert fast.mean_requests == pytest.approx(slow.mean_requests, rel=1e-6)


def test_the_virtual_wait_knows_the_servers_that_come_and_go() -> None:
    """One server, two customers ahead of the newcomer at time 0, a second server at time 1: it starts when one is left (two after 1)."""
    (moment,) = mt_m_c(Steps(values=(1e-9,), at_s=()), 1.0, Steps(values=(1, 2, 1), at_s=(1.0, 3.0)), [0.0], stationary_at_per_s=0.0)
    assert moment.virtual_wait.p_over(0.0) == pytest.approx(0.0, abs=1e-9)
    plan = Plan(Steps(values=(0.0,), at_s=()), 1.0, Steps(values=(1, 2, 1), at_s=(1.0, 3.0)), None)
    wait = VirtualWait(np.array([0.0, 0.0, 1.0, 0.0]), plan, 0.0)
    assert wait.p_over(0.5) == pytest.approx(math.exp(-0.5) * 1.5)  # fewer than two of them done
    assert wait.p_over(1.5) == pytest.approx(math.exp(-1.0) * math.exp(-2 * 0.5))  # both still there at 1, and then until one is done
    grid = np.linspace(0, 30, 30_001)
    over = wait.survival(grid)
    assert wait.mean_s == pytest.approx(np.trapezoid(over, grid), rel=1e-3)
    assert wait.variance_s2 == pytest.approx(2 * np.trapezoid(grid * over, grid) - wait.mean_s**2, rel=1e-2)


def test_servers_that_follow_the_day_agree_with_a_simulation_of_the_chain() -> None:
    """A birth-death chain with a step in servers and in rate, by its jumps: the mean number and P(delay) at one time."""
    rate, servers = Steps(values=(3.0, 8.0), at_s=(2.0,)), Steps(values=(4, 10), at_s=(3.0,))
    (moment,) = mt_m_c(rate, 1.0, servers, [4.0])
    rng, runs = np.random.default_rng(1), 20_000
    n, step_s = np.zeros(runs), 0.002
    for k in range(2000):
        t = (k + 0.5) * step_s
        n += (rng.random(runs) < rate(t) * step_s).astype(float) - (rng.random(runs) < np.minimum(n, servers(t)) * step_s)
    assert abs(n.mean() - moment.mean_requests) < 4 * n.std() / math.sqrt(runs) + 0.02
    assert abs(float((n >= 10).mean()) - moment.p_delay) < 4 * math.sqrt(0.25 / runs) + 0.01


def test_a_wave_by_quadrature_equals_its_closed_form_for_any_service() -> None:
    day = Sinusoid(mean_per_s=5.0, swing=0.7, period_s=9.0)
    for service in (Exponential(2.0), Deterministic(1.5), Lognormal(2.0, 1.0), parse_law("erl:3"), parse_law("mix:0.9:1:5")):
        closed, numeric = mt_g_inf(day, service, [1.0, 4.0]), mt_g_inf(lambda t: day(t), service, [1.0, 4.0])
        assert numeric == pytest.approx(closed, rel=1e-6), service


def test_unlimited_servers_after_a_step_fill_up_exponentially() -> None:
    loads = mt_g_inf(Steps(values=(2.0, 10.0), at_s=(0.0,)), Exponential(3.0), [-1.0, 0.0, 3.0])
    assert loads == pytest.approx([6.0, 6.0, 30.0 - 24.0 * math.exp(-1.0)], rel=1e-9)


def test_staffing_by_the_modified_load_lags_the_arrivals_and_meets_its_promise() -> None:
    day = Sinusoid(mean_per_s=40.0, swing=0.5, period_s=12.0)
    times = [12.0 * k / 24 for k in range(24)]
    servers = staffing(day, Exponential(1.0), times, p=0.8)
    loads = mt_g_inf(day, Exponential(1.0), times)
    assert all(erlang_c(c, m) <= 0.2 < erlang_c(c - 1, m) for c, m in zip(servers, loads, strict=True))
    assert 3.0 < times[int(np.argmax(servers))] < 5.0  # arrivals peak at 3
    exact = mt_m_c(day, 1.0, Steps(values=(servers[-1], *map(float, servers)), at_s=tuple(times)), [3.1, 9.1], period_s=12.0)
    assert all(m.p_delay < 0.26 for m in exact)


def test_the_queue_after_a_cold_start_recovers_when_the_course_says_so() -> None:
    start = {"before_per_s": 7.0, "after_per_s": 14.0, "service_s": 1.0, "cold_s": 5.0}
    back_s = recovery_s(**start, servers=10, servers_after=20, limit_s=0.5)
    (before, after) = cold_start(**start, servers=10, servers_after=20, times_s=[back_s - 0.05, back_s + 0.05])
    assert before.virtual_wait.p_over(0.5) > 0.01 > after.virtual_wait.p_over(0.5)
    assert recovery_s(**start, servers=40, servers_after=41, limit_s=0.5) == 0.0
    with pytest.raises(Infeasible, match="never bring"):
        recovery_s(**start, servers=10, servers_after=15, limit_s=0.1)


def test_the_fluid_backlog_bounds_the_mean_from_below() -> None:
    start = {"before_per_s": 3.0, "after_per_s": 6.0, "service_s": 1.0, "servers": 4, "cold_s": 10.0}
    fluid = backlog(**start)
    (moment,) = cold_start(**start, servers_after=8, times_s=[10.0])
    assert fluid == pytest.approx((10 - math.log(3 / 2)) * 2)
    assert fluid < moment.mean_requests - 4
    assert backlog(before_per_s=1, after_per_s=3, service_s=1, servers=4, cold_s=9) == 0


@settings(max_examples=6)
@given(st.integers(1, 12), st.floats(0.1, 0.8), st.floats(0.0, 0.9), st.floats(1.0, 30.0))
def test_more_servers_hold_fewer_requests_at_every_phase(c: int, rho: float, swing: float, period_s: float) -> None:
    day = Sinusoid(mean_per_s=rho * c, swing=swing, period_s=period_s)
    few, many = (mt_m_c(day, 1.0, k, [0.0, 0.4 * period_s], period_s=period_s) for k in (c, c + 1))
    for a, b in zip(few, many, strict=True):
        assert b.mean_requests <= a.mean_requests * (1 + 1e-7)
        assert b.p_delay <= a.p_delay + 1e-9
        assert float(a.law.sum()) == pytest.approx(1.0, abs=1e-12)


def test_days_that_never_settle_and_nonsense_are_refused() -> None:
    with pytest.raises(Overload) as overload:
        mt_m_c(Sinusoid(mean_per_s=10.5, swing=0.5, period_s=20.0), 1.0, 10, [0.0], period_s=20.0)
    assert overload.value.enough == 11
    with pytest.raises(Overload):
        mt_m_c(lambda t: 1.0, 1.0, 2, [1.0], stationary_at_per_s=2.0)
    with pytest.raises(BadInput, match="beyond"):
        mt_m_c(lambda t: 9e4, 1.0, 2, [1.0])
    for bad in ({"values": (1.0,), "at_s": (2.0,)}, {"values": (1.0, 2.0, 3.0), "at_s": (2.0, 1.0)}, {"values": (-1.0,), "at_s": ()}):
        with pytest.raises(BadInput, match="steps need"):
            Steps(**bad)
    with pytest.raises(BadInput, match="whole numbers"):
        mt_m_c(lambda t: 1.0, 1.0, Steps(values=(1.5,), at_s=()), [1.0])
    with pytest.raises(BadInput, match="times"):
        mt_m_c(lambda t: 1.0, 1.0, 2, [])
    with pytest.raises(BadInput, match="daily wave"):
        Sinusoid(mean_per_s=1.0, swing=1.5, period_s=1.0)
