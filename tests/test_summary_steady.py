"""Warm-up and steadiness, on processes whose transient is known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import summary
from mlsys_bench.summary import Columns, steady
from mlsys_bench.timelines import Steadiness
from mlsys_bench.types import RequestRecord
from tests.synthetic_runs import columns, decaying, poisson, station

RUNS = 25


def settled(run: Columns, duration_s: float = 60.0, warmup_s: float | None = None, **more: bool) -> Steadiness:
    return summary.settled(run, duration_s=duration_s, warmup_s=warmup_s, **more)


def bias(run: Columns, warmup_s: float, true_s: float) -> float:
    return float(run.ttft_s[run.scheduled_s >= warmup_s].mean()) / true_s - 1


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_a_decaying_start_is_cut_and_the_bias_with_it(phi: float) -> None:
    """TTFT starts three times as long and decays in 5 s: 17 % of bias over the minute without a cut, a tenth of that with it."""
    before, after = [], []
    for seed in range(RUNS):
        run = decaying(np.random.default_rng(seed), phi, times=2.0, decay_s=5.0)
        found = settled(run)
        assert found.verdict == "steady"
        assert found.decided_by in ("TTFT", "E2E")
        before.append(bias(run, 0.0, 0.1))
        after.append(bias(run, found.warmup_s, 0.1))
    assert float(np.mean(before)) == pytest.approx(2 * 5 / 60, abs=0.02)
    noise = 3 * float(np.std(after, ddof=1)) / RUNS**0.5
    assert abs(float(np.mean(after))) < 0.1 * 2 * 5 / 60 + noise


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9])
def test_a_steady_run_is_hardly_cut(phi: float) -> None:
    """What is cut of a run without a transient is the time its requests in flight take to fill: 0.6 s of 60."""
    cuts = [settled(decaying(np.random.default_rng(seed), phi, 0.0, 5.0)).warmup_s for seed in range(RUNS)]
    assert float(np.mean(cuts)) < 0.05 * 60
    assert max(cuts) < 0.15 * 60


def test_a_station_that_was_busy_before_loses_little_and_one_that_was_empty_gains() -> None:
    """M/M/1 at 80 % for 300 s: on average at most a tenth is cut, whether the station starts empty or in its steady state."""
    for before_s in (0.0, 200.0):
        cuts = [settled(station(np.random.default_rng(seed), 20, 300, 1, 0.04, before_s), 300).warmup_s for seed in range(10)]
        assert float(np.mean(cuts)) < 0.1 * 300


def test_an_empty_server_is_left_out_until_it_has_filled() -> None:
    """Answers of 5 s, no queue: the requests in flight rise for 5 s, and about as much is left out."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        due_s = poisson(rng, 20, 60)
        found = settled(columns(due_s, np.full(len(due_s), 0.1), rng.uniform(4.5, 5.5, len(due_s))))
        assert (found.verdict, found.decided_by) == ("steady", "requests in flight")
        assert 3.0 < found.warmup_s < 16.0


@pytest.mark.parametrize("load", [1.3, 1.8, 3.0])
def test_a_queue_that_grows_is_over_saturated_and_says_what_to_do(load: float) -> None:
    for seed in range(10):
        found = settled(station(np.random.default_rng(seed), 20, 60, 4, 4 * load / 20))
        assert found.verdict == "over_saturated"
        assert found.warmup_s == 0.0
        assert found.served_share is not None
        assert found.served_share == pytest.approx(1 / load, rel=0.25)
        assert "lower the rate" in found.reasons[0]


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_queue_that_does_not_grow_is_steady(load: float) -> None:
    verdicts = [settled(station(np.random.default_rng(seed), 20, 60, 4, 4 * load / 20)).verdict for seed in range(40)]
    assert verdicts.count("steady") >= 38  # one false alarm in 20 would be 5 %


def test_a_slow_decay_is_not_steady() -> None:
    """TTFT falls over the whole run: no cut makes it steady, and a longer run is asked for."""
    for seed in range(10):
        found = settled(decaying(np.random.default_rng(seed), 0.5, 2.0, 60.0))
        assert found.verdict == "not_steady"
        assert "falls" in found.reasons[0]


def test_a_closed_loop_is_never_over_saturated() -> None:
    found = settled(station(np.random.default_rng(0), 20, 60, 4, 0.4), open_loop=False)
    assert found.verdict == "not_steady"


@given(st.integers(0, 10_000), st.integers(0, 400), st.floats(0.0, 0.99), st.floats(0.0, 20.0))
def test_no_run_is_emptied(seed: int, n: int, phi: float, times: float) -> None:
    """Whatever the data: at most half of the run is cut, and what is cut was sent."""
    rng = np.random.default_rng(seed)
    due_s = np.sort(rng.uniform(0, 10, n))
    ttft_s = 0.1 * (1 + times * np.exp(-due_s / 2)) * rng.lognormal(0, phi, n)
    found = settled(columns(due_s, ttft_s, ttft_s), 10.0)
    assert 0 <= found.warmup_s <= 5.0
    assert found.verdict != "too_short" or n < steady.LEAST_REQUESTS


def test_a_few_requests_lose_a_tenth_and_say_so() -> None:
    run = columns(np.arange(20.0), np.full(20, 0.1), np.full(20, 0.2))
    found = settled(run, 20.0)
    assert (found.verdict, found.warmup_s) == ("too_short", 2.0)
    assert "20 answers" in found.reasons[0]


def test_users_who_all_still_wait_for_their_first_answer_are_no_warm_up() -> None:
    """Eight users and answers of 40 s in a run of 30: all requests are due at its start, and cutting a tenth would leave none."""
    rows = [RequestRecord(index=i, scheduled_s=0.001 * i, token_s=(20.0, 40.0), tokens_per_event=(1, 1), done_s=40.0) for i in range(8)]
    found = settled(summary.columns.of(rows), duration_s=30.0, open_loop=False)
    assert (found.verdict, found.warmup_s) == ("too_short", 0.0)
    assert settled(summary.columns.of(rows), duration_s=30.0, warmup_s=2.0).warmup_s == 2.0


def test_a_warm_up_that_was_given_is_taken() -> None:
    found = settled(decaying(np.random.default_rng(0), 0.0, 0.0, 5.0), warmup_s=7.5)
    assert (found.warmup_s, found.decided_by, found.verdict) == (7.5, "given", "steady")


def test_a_load_that_changes_by_design_is_not_cut() -> None:
    found = settled(decaying(np.random.default_rng(0), 0.0, 2.0, 5.0), stationary=False)
    assert (found.warmup_s, found.decided_by, found.verdict) == (0.0, "nothing", "steady")
    assert "schedule of their own" in found.reasons[0]


def test_mann_and_kendall_by_hand() -> None:
    """1..20 in order: score 190 of 190, variance 950: z = 189 / sqrt(950); and none at all for an alternation."""
    assert steady.trend(np.arange(20.0)) == pytest.approx(8.7e-10, rel=0.02)
    assert steady.trend(np.array([1.0, -1.0] * 10)) > 0.5


def test_mser_cuts_where_the_rest_is_most_precise() -> None:
    """Ten values of 5 before 90 around 1: the cut that MSER proposes is at 10, by trying every one."""
    values = np.concatenate([np.full(10, 5.0), 1 + 0.01 * np.random.default_rng(0).normal(size=90)])
    scores = [values[d:].var() / (100 - d) for d in range(51)]
    assert steady.truncation(values) == int(np.argmin(scores)) == 10


def test_requests_of_the_warm_up_do_not_count_and_no_other_changes() -> None:
    records = [RequestRecord(index=i, scheduled_s=float(i)) for i in range(5)]
    found = summary.windowed(records, 2.0)
    assert [r.in_window for r in found] == [False, False, True, True, True]
    assert found[3] is records[3]
