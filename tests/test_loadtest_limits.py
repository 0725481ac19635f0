"""Where a server's limits lie: the search against queues whose answer theory knows, and the parts it decides by."""

from __future__ import annotations

import dataclasses
import math
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import record, slo, summary
from mlsys_bench.errors import BadInput, UnitError
from mlsys_bench.journeys import fitting
from mlsys_bench.journeys import limits as journey
from mlsys_bench.loadlimits import LoadMax, LoadSweep
from mlsys_bench.loadtest import Options
from mlsys_bench.loadtest.limits import clauses, levels, posterior, running, saturation, search
from mlsys_bench.loadtest.truth import Behaviour
from mlsys_bench.loadtest.truth.client import serving
from mlsys_bench.predict import opaque
from mlsys_bench.predict.readers import loadtests
from mlsys_bench.queueing.mdc import mdc
from mlsys_bench.queueing.mmc import mmc
from mlsys_bench.types import SLO, RequestRecord, Requests
from tests.queue_server import Floats, QueueServer, fifo, records
from tests.sample_limits import level, loadmax, sweep
from tests.sample_records import machine

SLOTS, SERVICE_S = 8, 0.082
LIMIT = slo.parse("ttft_p99<500ms")


def constant(_rng: np.random.Generator, n: int) -> Floats:
    return np.full(n, SERVICE_S)


def exponential(rng: np.random.Generator, n: int) -> Floats:
    return rng.exponential(SERVICE_S, n)


def highest(wait_s: Callable[[float], float], limit_s: float) -> float:
    """Return the rate at which a wait reaches its limit, by bisection."""
    low, high = 1.0, SLOTS / SERVICE_S * (1 - 1e-5)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if wait_s(middle) < limit_s else (low, middle)
    return low


def searched(server: QueueServer) -> search.Found:
    return search.search(server.clauses, server, users=64)


# ---------------------------------------------------------------- the search


@pytest.mark.parametrize("seed", range(3))
def test_the_highest_rate_of_a_server_with_slots_is_within_5_percent_in_two_minutes(seed: int) -> None:
    """8 slots of 82 ms carry 97.6/s; M/D/8 keeps a p99 wait of 480 ms up to 93.0/s."""
    truth = highest(lambda rate: mdc(rate, SERVICE_S, SLOTS).wait.quantile_s(0.99), 0.5 - 0.25 * SERVICE_S)
    server = QueueServer(LIMIT, SLOTS, constant, seed=seed)
    found = searched(server)
    assert found.state is not None
    assert found.state.rate_per_s == pytest.approx(truth, rel=0.05)
    assert found.state.interval_per_s[0] <= truth <= found.state.interval_per_s[1]
    assert server.used_s <= 125


def test_uneven_service_is_found_as_well() -> None:
    """M/M/8, whose waits are twice as long: one of two searches within 5 %, both within 9 % (of 200, 97 in 100 are within 5 %)."""
    truth = highest(lambda rate: mmc(rate, SERVICE_S, SLOTS).wait.quantile_s(0.99), 0.5)
    states = [searched(QueueServer(LIMIT, SLOTS, exponential, seed=seed, ttft_share=0.0)).state for seed in range(2)]
    errors = [abs(state.rate_per_s / truth - 1) for state in states if state is not None]
    assert min(errors) < 0.05
    assert max(errors) < 0.09


def test_constant_arrivals_are_carried_up_to_the_capacity() -> None:
    found = searched(QueueServer(LIMIT, SLOTS, constant, arrivals="constant"))
    assert found.why == "narrow"
    assert found.state is not None
    assert found.state.rate_per_s == pytest.approx(SLOTS / SERVICE_S, rel=0.02)


def test_a_limit_that_lone_requests_break_holds_at_no_rate() -> None:
    found = searched(QueueServer(slo.parse("ttft_p99<10ms"), SLOTS, constant))
    assert found.why == "no rate holds"
    assert found.state is None


def test_a_client_that_is_too_slow_is_said_and_not_taken_for_the_server() -> None:
    """No level beyond 30/s can be trusted: nothing is learned from them, and the search ends."""
    found = searched(QueueServer(LIMIT, SLOTS, constant, fastest_client=30.0))
    assert found.why == "client"


def test_a_client_that_a_neighbour_disturbs_for_a_while_goes_on() -> None:
    """Levels 3 to 6 say nothing, at rates the client kept before: the search outlasts them, and none of them counts."""
    found = searched(QueueServer(LIMIT, SLOTS, constant, disturbed=range(3, 7), budget_s=240.0))
    truth = highest(lambda rate: mdc(rate, SERVICE_S, SLOTS).wait.quantile_s(0.99), 0.5 - 0.25 * SERVICE_S)
    assert found.why in ("narrow", "budget")
    assert found.state is not None
    assert [seen.trusted for seen in found.state.levels][:7] == [True, True, False, False, False, False, True]
    assert found.state.rate_per_s == pytest.approx(truth, rel=0.05)


def test_goodput_is_searched_for_as_its_quantile_would_be() -> None:
    """Goodput > 99 % of ttft < 500 ms is the same promise as ttft p99 < 500 ms, by definition: the same evidence, the same answer."""
    one = searched(QueueServer(LIMIT, SLOTS, constant, seed=5, budget_s=60)).state
    both = searched(QueueServer(slo.parse("ttft_p50<500ms,goodput>99%"), SLOTS, constant, seed=5, budget_s=60)).state
    assert one is not None
    assert both is not None
    assert both.rate_per_s == pytest.approx(one.rate_per_s, rel=0.03)
    assert both.binding == 1


def test_a_search_that_is_stopped_keeps_what_it_knows() -> None:
    """Stopped in its third level: two are kept, with the interval they give."""
    server = QueueServer(LIMIT, SLOTS, constant, stopped_in=3)
    found = searched(server)
    assert found.why == "stopped"
    assert found.state is not None
    assert len(found.state.levels) == 2
    low, high = found.state.interval_per_s
    assert low < found.state.rate_per_s < high


# ---------------------------------------------------------------- what a level shows


def row(i: int, ttft_s: float, outcome: str = "ok") -> RequestRecord:
    due = float(i)
    return RequestRecord(
        index=i, scheduled_s=due, token_s=(due + ttft_s, due + ttft_s + 0.1), tokens_per_event=(1, 1), done_s=due + ttft_s + 0.1,
        output_tokens=2, outcome=outcome,  # type: ignore[arg-type]
    )  # fmt: skip


def figure(promise: str, rows: list[RequestRecord]) -> clauses.Figure:
    wanted = slo.parse(promise)
    clause = clauses.clauses(wanted)[-1]
    return clauses.figure(clause, clauses.scores(clause, wanted, rows))


def test_a_score_is_the_figure_over_its_limit() -> None:
    """TTFT of 0.1 … 1.0 s: the median is 0.55 s, 1.1 times the limit; six of ten are at or beyond it."""
    shown = figure("ttft_p50<500ms", [row(i, (i + 1) / 10) for i in range(10)])
    assert shown.score == pytest.approx(1.1)
    assert (shown.misses, shown.requests) == (6, 10)


def test_a_request_that_failed_has_kept_no_limit() -> None:
    """One of 50 failed: p99 is infinite, p90 is not; of a mean nothing is left."""
    rows = [row(i, 0.1, "rejected" if i == 7 else "ok") for i in range(50)]
    assert math.isinf(figure("ttft_p99<500ms", rows).score)
    assert figure("ttft_p90<500ms", rows).score == pytest.approx(0.2)
    assert math.isinf(figure("ttft_mean<500ms", rows).score)


def test_a_request_that_was_given_up_on_purpose_says_nothing() -> None:
    """Half of 50 users close the window: the others kept every limit."""
    rows = [row(i, 0.1, "cancelled" if i % 2 else "ok") for i in range(50)]
    shown = figure("ttft_p99<500ms,goodput>99%", rows)
    assert (shown.score, shown.requests, shown.misses) == (pytest.approx(0.2), 25, 0)


def test_goodput_takes_each_requests_worst_score() -> None:
    """E2E is 0.1 s more than TTFT; limits 0.5 and 1.0 s: TTFT is the worse one from 0.1 s on."""
    rows = [row(i, (i + 1) / 10) for i in range(10)]
    shown = figure("ttft_p95<500ms,e2e_p95<1s,goodput>50%", rows)
    assert shown.score == pytest.approx(1.1)
    kept = sum(summary.meets_all(r, slo.parse("ttft_p95<500ms,e2e_p95<1s,goodput>50%")) for r in rows)
    assert shown.misses == 10 - kept


@pytest.mark.parametrize("promise", ["chat:ttft_p95<500ms", "goodput>99%"])
def test_limits_that_one_traffic_cannot_decide_are_refused(promise: str) -> None:
    with pytest.raises(BadInput, match=r"tenant|latency limits"):
        clauses.clauses(slo.parse(promise))


def test_neighbours_that_depend_on_each_other_count_for_less() -> None:
    """An autoregression of coefficient a has a correlation time of (1 + a) / (1 - a): 19 at 0.9, 1 without."""
    rng = np.random.default_rng(3)
    noise, found = rng.normal(0, 0.1, 100_000), np.empty(100_000)
    last = 0.0
    for i, each in enumerate(noise):
        last = 0.9 * last + each
        found[i] = last
    assert clauses.correlation_time(np.exp(found)) == pytest.approx(19, rel=0.15)
    assert clauses.correlation_time(np.exp(noise)) == pytest.approx(1, abs=0.05)
    assert clauses.correlation_time(np.ones(50)) == 1


# ---------------------------------------------------------------- falling behind


def looks(rate: float, capacity: float, seconds: int, seed: int = 0) -> list[saturation.Look]:
    rng = np.random.default_rng(seed)
    sent, ended, seen = 0, 0, []
    for t in range(1, seconds + 1):
        sent += rng.poisson(rate)
        ended = min(sent, ended + rng.poisson(capacity))
        seen.append(saturation.Look(float(t), ended, sent - ended))
    return seen


def first_alarm_s(seen: list[saturation.Look], rate: float) -> float | None:
    return next((seen[k].t_s for k in range(len(seen)) if saturation.falls_behind(rate, seen[: k + 1], 1.0)), None)


def test_a_server_that_is_offered_half_as_much_again_is_found_out_in_seconds() -> None:
    alarms = [first_alarm_s(looks(150, 100, 60, seed), 150) for seed in range(20)]
    assert all(at is not None and at <= 8 for at in alarms)


def test_watching_a_critical_server_every_second_for_a_minute_hardly_ever_alarms() -> None:
    """Wald's bound is one in a hundred; 200 servers at critical load: more than 6 alarms would come once in 200 tests."""
    alarms = sum(first_alarm_s(looks(100, 100, 60, seed), 100) is not None for seed in range(200))
    assert alarms <= 6


def test_the_log_ratio_is_walds() -> None:
    """100/s for 4 s with 300 ended: drift 10/s, (10 · 100 - 100 · 4 / 2) / 100 = 8."""
    assert saturation.log_ratio(100.0, 4.0, 300) == pytest.approx(8.0)


# ---------------------------------------------------------------- the model


def test_a_replayed_level_is_lindleys_queue() -> None:
    """Arrivals at 0, 1, 1, 1 s on a server of 1/s: backlogs 0, 0, 1, 2 s before them; the median of type 'lower' is 0."""
    due = np.array([0.0, 1.0, 1.0, 1.0])
    at_one = posterior.replay(due, (0.0, 2.0), 1.0, 0.99)
    assert np.interp(1.0, posterior._REPLAYED, at_one) == pytest.approx(1.0, abs=0.03)
    assert np.all(np.diff(at_one) <= 1e-12)  # more capacity never waits longer


@settings(max_examples=8, deadline=None)
@given(st.floats(0.3, 0.97), st.integers(0, 1000))
def test_a_settled_backlog_grows_with_load(rho: float, seed: int) -> None:
    gaps = np.random.default_rng(seed).exponential(1.0, 3000)
    backlog = posterior.settled(gaps, 0.95)
    at = np.interp([rho, rho + 0.02], posterior._LOADS, backlog)
    assert at[1] >= at[0] >= 0


def test_the_settled_backlog_of_poisson_arrivals_is_that_of_an_m_d_1_queue() -> None:
    backlog = posterior.settled(np.random.default_rng(0).exponential(1.0, 150_000), 0.99)
    for rho in (0.6, 0.8, 0.9):
        exact = mdc(rho, 1.0, 1).wait.quantile_s(0.99)
        assert np.interp(rho, posterior._LOADS, backlog) == pytest.approx(exact, rel=0.12)


def test_tpot_needs_no_queue() -> None:
    """Score 0.4 / (1 - r / 100): 1 at 60/s.  Five levels on the curve tell it within 3 %."""
    shape = posterior.Shape(idle=0.4, p=0.95, wait_s=None, lone_s=1.0, burstiness=1.0)
    seen = [
        posterior.Evidence(rate_per_s=r, duration_s=10, score=0.4 / (1 - r / 100), effective=500.0) for r in (10.0, 30.0, 50.0, 65.0, 75.0)
    ]
    found = posterior.posterior(seen, [], shape, (10, 1000))
    assert found.quantile(0.5) == pytest.approx(60, rel=0.03)
    assert found.quantile(0.05) < 60 < found.quantile(0.95)


# ---------------------------------------------------------------- sweeps


def test_rates_are_written_as_a_list_or_a_range() -> None:
    assert levels.parse("8,1,2,4") == (1, 2, 4, 8)
    assert levels.parse("1..64", 7) == pytest.approx((1, 2, 4, 8, 16, 32, 64))
    for wrong in ("", "a", "0,1", "8..2", "1..inf"):
        with pytest.raises(BadInput):
            levels.parse(wrong)


def test_rates_around_a_capacity_go_up_and_beyond_it() -> None:
    rates = levels.around(100.0, 10)
    assert rates[0] == pytest.approx(10)
    assert rates[-1] == pytest.approx(110)
    assert all(np.diff(rates) > 0)
    assert np.diff(rates)[0] > np.diff(rates)[-1]


def test_low_rates_last_longer_and_all_the_time_is_used() -> None:
    shares = levels.share_out(100.0, (10.0, 40.0, 90.0), 5.0)
    assert sum(shares) == pytest.approx(100)
    assert shares[0] == pytest.approx(2 * shares[1])
    assert levels.seconds("2m", "--budget") == 120
    with pytest.raises(UnitError, match="above zero"):
        levels.seconds("0s", "--budget")


def test_the_knee_is_where_p95_doubles() -> None:
    """p95 100, 100, 150, 300 ms at 10, 20, 30, 40/s: 200 ms is crossed log(4/3) / log(2) of the way from 30 to 40."""
    found = levels.knee(tuple(level(rate, p95) for rate, p95 in ((10, 0.1), (20, 0.1), (30, 0.15), (40, 0.3))))
    assert found is not None
    assert found.rate_per_s == pytest.approx(30 + 10 * math.log(4 / 3) / math.log(2))
    assert found.interval_per_s is not None
    assert found.interval_per_s[0] <= found.rate_per_s <= found.interval_per_s[1]


def test_a_flat_curve_has_no_knee_and_one_that_falls_behind_has() -> None:
    flat = [level(rate, 0.1) for rate in (10, 20, 30)]
    assert levels.knee(flat) is None
    found = levels.knee([*flat, dataclasses.replace(level(40, 0.1), over=True)])
    assert found is not None
    assert 30 < found.rate_per_s < 40


def test_a_sweep_without_its_requests_is_not_fitted(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = record.write(tmp_path_factory.mktemp("sweep") / "sweep.json", sweep(), machine())
    with pytest.raises(BadInput, match="sweep again with -o"):
        fitting.fit([path])


# ---------------------------------------------------------------- options and status


def options(**changes: object) -> Options:
    return dataclasses.replace(Options(url="http://127.0.0.1:9", slo=LIMIT), **changes)  # type: ignore[arg-type]


def test_traffic_without_a_rate_of_its_own_is_refused() -> None:
    running.check(options())
    for changes in ({"users": 3}, {"arrivals": "stages:10s@1,10s@5"}, {"offline": 5}):
        with pytest.raises(BadInput, match=r"leave --users|a rate that stays"):
            running.check(options(**changes))
    with pytest.raises(BadInput, match="--qps"):
        journey.rate_of_none({"--users": None, "--qps": 5.0})
    with pytest.raises(BadInput, match="--slo"):
        journey.find_max(options(slo=None))


def test_the_exit_status_says_whether_there_is_an_answer() -> None:
    found = loadmax()
    status = {why: journey.max_status(dataclasses.replace(found, ended=why)) for why in ("narrow", "no rate holds", "budget", "client")}
    assert status == {"narrow": 0, "no rate holds": 1, "budget": 3, "client": 3}
    assert isinstance(found, LoadMax)


def test_the_time_a_percentile_needs_is_said_before_it_is_spent() -> None:
    """299 requests make an interval of p99 possible; at 5/s that is 78 s a level, with a margin of 1.3."""
    asked: SLO = LIMIT
    assert search.needed_requests(clauses.clauses(asked)) == 299
    said = journey._need(clauses.clauses(asked), 299, 5.0, 120.0, 480.0)
    assert "p99 needs 299 requests a level: 77.7 s at about 5.00/s" in said
    assert "--budget leaves 2.00 min" in said


# ---------------------------------------------------------------- from the sweep to a profile


def test_a_sweep_feeds_the_fit_of_an_opaque_endpoint(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Its levels become those of the latency curve, at the rates that came; the one that fell behind and a short one are left out."""
    folder, rng, swept = tmp_path_factory.mktemp("sweep"), np.random.default_rng(1), []
    for i, rate in enumerate((30.0, 70.0, 90.0)):
        due = np.cumsum(rng.exponential(1 / rate, 600))
        rows = records(due, fifo(due, np.full(600, SERVICE_S), SLOTS), np.full(600, SERVICE_S), 0.25, 0.0, 1e9, None)
        path = record.write(folder / f"sweep.{i}.parquet", Requests(t0_unix_s=0.0, requests=tuple(rows)), machine())
        test = dataclasses.replace(level(rate, 0.1).test, requests_file=f"gone/{path.name}", requests=600, ok=600)
        swept.append(dataclasses.replace(level(rate, 0.1), test=test))
    fell_behind = dataclasses.replace(swept[-1], over=True, rate_per_s=120.0)
    short = dataclasses.replace(swept[0], test=dataclasses.replace(swept[0].test, ok=100))
    path = record.write(folder / "sweep.json", dataclasses.replace(sweep(), levels=(short, *swept, fell_behind)), machine())
    curve = [opaque.level_of(test, loadtests.requests(test, where)) for where, test in fitting._tests(path)]
    assert [round(each.rate_per_s, -1) for each in curve] == [30, 70, 90]
    assert all(each.requests == 600 for each in curve)
    assert curve[0].figures["mean"] == pytest.approx(SERVICE_S, rel=0.02)
    assert curve[2].figures["mean"] > curve[1].figures["mean"]


# ---------------------------------------------------------------- a real server


@pytest.mark.measures
def test_a_sweep_of_a_real_server_stops_where_it_falls_behind(tmp_path_factory: pytest.TempPathFactory) -> None:
    """2 slots of 50 ms carry 40/s: 20/s is kept up with, at 120/s the level ends early and 160/s is left out."""
    out = tmp_path_factory.mktemp("sweep") / "sweep.json"
    with serving(Behaviour(ttft_s=0.04, itl_s=0.01, tokens=2, slots=2)) as server:
        traffic = Options(url=server.url, seed=1, metrics=("off",), slo=slo.parse("e2e_p50<200ms"))
        found = journey.sweep(traffic, rates="20,120,160", duration="5s", out=out)
    assert [each.over for each in found.levels] == [False, True]
    assert found.ended == "saturated"
    assert found.levels[1].test.request_rate_per_s < 60
    assert found.levels[1].in_flight > 50
    assert all((out.parent / f"sweep.0{i}.parquet").exists() for i in (1, 2))
    assert not [r for r in found.levels[1].test.validity.reasons if "by hand" in r]


@pytest.mark.e2e
def test_ctrl_c_ends_a_sweep_and_leaves_its_levels_in_the_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Interrupted after its first level: exit 3, and the record says stopped and holds that level."""
    out = tmp_path_factory.mktemp("sweep") / "sweep.json"
    with serving(Behaviour(ttft_s=0.01, itl_s=0.005, tokens=4)) as server:
        command = [sys.executable, "-m", "mlsys_cli", "loadtest", server.url, "--sweep", "--rates", "20,21,22", "--duration", "2s"]
        with subprocess.Popen([*command, "-o", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "completes" in line)
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
    assert "20.0/s" in line
    assert process.returncode == 3
    found = record.read(out, LoadSweep)
    assert found.ended == "stopped"
    assert [each.rate_per_s for each in found.levels] == [20.0]
