"""Autoscaling: the rule played over a course, by hand, against the token-level simulator and against M_t/M/c_t."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import simulate, workload
from mlsys_bench.batching import Limits
from mlsys_bench.errors import BadInput
from mlsys_bench.plan import cold_start
from mlsys_bench.plan import course as courses
from mlsys_bench.plan.autoscale import Serving, autoscaled, desired, from_nothing, play, queue_violations_min, steepest, too_brief
from mlsys_bench.plan.course import Course
from mlsys_bench.plan.given import measured
from mlsys_bench.queueing import erlang_c
from mlsys_bench.report import surroundings
from mlsys_bench.simulate import Autoscaling, Conditions
from mlsys_bench.types import LatencyProfile, Layout, LengthSummary, Provenance, TrafficSummary
from mlsys_bench.workload import Schedule
from tests import sample_records

QUICK = cold_start.ColdStart(
    node=measured(60, "t"), image=measured(20, "t"), weights=measured(20, "t"), graphs=measured(10, "t"), warm_up=measured(10, "t")
)
SERVING = Serving(most_per_s=10, capacity_per_s=14, stay_s=6)


def ten(rate: float) -> int:
    """Ten requests per second a replica."""
    return math.ceil(rate / 10 - 1e-9)


def day(swing: str = "60%", rate: float = 100.0) -> Course:
    return courses.of(workload.synthetic(rate, arrivals=f"diurnal:24h:{swing}", prompt="512", output="128", source="t"))


def step(before: float, after: float, at: int, steps: int = 60) -> Course:
    """Return a rate that jumps once, in steps of a minute."""
    return Course(step_s=60.0, rates_per_s=tuple(before if k < at else after for k in range(steps)))


# ---------------------------------------------------------------- the course


def test_a_daily_wave_keeps_its_mean_and_its_peak() -> None:
    course = day()
    assert course.period_s == 86_400
    assert course.mean_per_s == pytest.approx(100)
    assert course.peak_per_s == pytest.approx(160, rel=1e-3)
    assert course.at(6 * 3600) == pytest.approx(160, rel=1e-3)  # a sine leaves its mean upwards at time 0
    assert course.at(6 * 3600 + 5 * 86_400) == course.at(6 * 3600)
    assert course.highest(0, 86_400) == course.peak_per_s


def test_levels_of_a_day_and_stages_and_steady_traffic() -> None:
    levels = courses.of(workload.synthetic(6.0, arrivals="diurnal:4h:1,2,4,5", prompt="8", output="8", source="t"))
    assert [levels.at((k + 0.5) * 3600) for k in range(4)] == pytest.approx([2, 4, 8, 10])
    stages = courses.of(workload.synthetic(10.0, arrivals="stages:1h@1,1h@3", prompt="8", output="8", source="t"))
    assert [stages.at(k * 3600 + 1) for k in range(2)] == pytest.approx([10, 30])
    assert courses.of(workload.synthetic(7.0, arrivals="gamma:2", prompt="8", output="8", source="t")).rates_per_s == (7.0,)


def test_hours_that_were_seen_are_a_course_and_unknown_ones_take_the_mean() -> None:
    tokens = LengthSummary(mean=1, cv=0, p50=1, p90=1, p99=1, max=1)
    seen = TrafficSummary(
        requests=1, duration_s=10800, rate_per_s=3, peak_rate_per_s=4, series_step_s=3600, series_per_s=(2.0, None, 4.0), gap_scv=None,
        dispersion={}, dispersion_intervals={}, prompt_tokens=tokens, output_tokens=tokens, length_correlation=None, prefix_hit_share=None,
    )  # fmt: skip
    plain = workload.synthetic(3.0, arrivals="poisson", prompt="8", output="8", source="t")
    from dataclasses import replace

    assert courses.of(replace(plain, observed=seen)) == Course(step_s=3600, rates_per_s=(2.0, 3.0, 4.0))
    with pytest.raises(BadInput, match="has none"):
        Course(step_s=60, rates_per_s=(0.0, 0.0))


def test_the_steepest_growth_is_read_over_the_lead() -> None:
    """1 to 2 in a minute, 2 to 3 in the next: 3 within two minutes; the fall is no growth."""
    course = Course(step_s=60, rates_per_s=(1.0, 2.0, 3.0, 3.0, 3.0))
    assert steepest(course, 60) == 2
    assert steepest(course, 61) == 3
    assert steepest(Course(step_s=60, rates_per_s=(5.0,)), 600) == 1


# ---------------------------------------------------------------- the rule


@settings(max_examples=40)
@given(st.floats(0, 1000), st.integers(0, 50), st.floats(0.1, 50), st.integers(1, 5), st.sampled_from(["in_flight", "rate"]))
def test_many_fleets_decide_as_the_rule_of_one(load: float, there: int, target: float, least: int, metric: str) -> None:
    rule = Autoscaling(metric=metric, target=target, least=least, most=40, cold_start_s=1)  # type: ignore[arg-type]
    if there and abs(abs(load / (there * target) - 1) - 0.1) < 1e-9:
        return  # on the edge of the tolerance rounding decides
    assert desired(rule, np.array([load]), np.array([there])).tolist() == [rule.desired(load, there)]


def test_a_step_in_load_launches_what_it_needs_once() -> None:
    """100/s after 20/s at 10/s a replica: 10 replicas, ready a cold start later; while they start, no more are launched."""
    rule = Autoscaling(metric="rate", target=10, least=1, most=99, interval_s=15, cold_start_s=120, down_delay_s=300)
    played = play(step(20, 100, at=30, steps=59), SERVING, rule, runs=4)
    there = played.ready + played.starting
    noise = math.ceil((1500 + 4 * math.sqrt(1500)) / 15 / 10)
    assert there.max() <= noise
    jump = 30 * 4
    assert (played.starting[jump + 1 : jump + 7] >= 5).all()
    assert (played.ready[jump + 7] < 6).all()
    assert (played.ready[jump + 12] >= 8).all()


def test_a_threshold_that_leaves_room_for_the_growth_keeps_the_limits() -> None:
    """A smooth day: the rule pays less than static peak, breaks nothing, never cascades; the schedule pays least."""
    found = autoscaled(day(), SERVING, ten, QUICK, runs=2)
    static, scheduled, followed = found.uses
    assert [u.way for u in found.uses] == ["static", "scheduled", "followed"]
    assert static.replica_h == 16 * 24
    assert scheduled.replica_h < followed.replica_h < static.replica_h
    assert followed.violation_min == 0
    assert not found.cascades
    assert found.lead_s == 135
    assert found.threshold == pytest.approx(1 / found.growth / 1.1)
    assert not any("static" in note for note in found.notes)
    assert found.provenance is Provenance.MEASURED
    assert [h.scheduled for h in found.hours][5] == 16
    assert all(h.scheduled == ten(h.rate_per_s) for h in found.hours)
    assert len(found.hours) == 24


def test_the_schedules_hours_by_hand() -> None:
    """Two hours of 10/s, two of 40/s: 1 and 4 replicas are 10 replica-hours, and three starts of 120 s are a tenth more."""
    course = Course(step_s=3600, rates_per_s=(10.0, 10.0, 40.0, 40.0))
    found = autoscaled(course, SERVING, ten, QUICK, metric="rate", runs=2)
    assert [h.scheduled for h in found.hours] == [1, 1, 4, 4]
    assert found.use("scheduled").replica_h == pytest.approx(10 + 3 * 120 / 3600)
    assert found.use("static").replica_h == 16


def test_a_jump_no_rule_can_follow_is_told() -> None:
    """Tenfold within a minute and a start of minutes: only the peak all day breaks nothing, so the schedule is told."""
    slow = cold_start.of(400e9)
    found = autoscaled(step(20, 200, at=20, steps=60), SERVING, ten, slow, runs=2, least=3)
    assert found.use("followed").replica_h >= found.use("static").replica_h
    assert any("follow the schedule" in note for note in found.notes)
    assert min(h.scheduled for h in found.hours) >= 3
    bounded = autoscaled(step(20, 200, at=20, steps=60), SERVING, ten, slow, runs=2, most=19)
    assert bounded.use("followed").violation_min > 1
    assert any("no threshold tried" in note for note in bounded.notes)
    with pytest.raises(BadInput, match="in_flight and rate"):
        autoscaled(day(), SERVING, ten, QUICK, metric="kv")
    with pytest.raises(BadInput, match="it cannot"):
        Serving(most_per_s=3, capacity_per_s=2, stay_s=1)


def test_traffic_out_of_nothing_is_left_to_the_schedule() -> None:
    """18 hours without a request, then 400/s: no threshold sees it before it comes, so none is lowered; the schedule is there at six."""
    quiet = Course(step_s=3600, rates_per_s=(0.0,) * 18 + (400.0,) * 6)
    assert (from_nothing(quiet, 135), from_nothing(day(), 135), steepest(quiet, 135)) == (400, 0, 1)
    found = autoscaled(quiet, SERVING, ten, QUICK, runs=2)
    assert found.from_nothing_per_s == 400
    assert found.threshold == pytest.approx(1 / 1.1)
    assert found.use("followed").violation_min > 1
    assert any("from nothing to 400/s within the lead" in note for note in found.notes)
    assert any("follow the schedule, which starts replicas ahead" in note for note in found.notes)
    assert found.use("scheduled").replica_h == pytest.approx(18 * 1 + 6 * 40 + 39 * 120 / 3600)
    section = next(surroundings.sections(dataclasses.replace(sample_records.plan(), scaled=found)))
    assert section.lead.startswith(
        "By the schedule 259 replica-hours a period in place of 960 (-73 %); a rule that follows the load breaks"
    )
    few = autoscaled(Course(step_s=3600, rates_per_s=(0.0, 8.0)), SERVING, ten, QUICK, runs=2)
    assert few.use("followed").violation_min == 0, "the one that is always there holds it"


def test_a_course_shorter_than_replicas_come_and_go_is_not_followed() -> None:
    """Two minutes to start and five until it is let go, twice: 14 minutes."""
    assert too_brief(Course(step_s=84, rates_per_s=(1.0, 2.0) * 5), 120) is None
    why = too_brief(Course(step_s=83, rates_per_s=(1.0, 2.0) * 5), 120)
    assert why is not None
    assert "lasts 13.8 min, a replica starts in 2.00 min" in why
    brief = autoscaled(Course(step_s=0.1, rates_per_s=(10.0, 20.0)), SERVING, ten, QUICK, runs=1)
    assert all(math.isfinite(hour.followed) for hour in brief.hours)


# ---------------------------------------------------------------- against the simulators


def test_the_token_level_simulator_pays_the_same_replica_hours() -> None:
    """Steps of 0.1 s, 20 tokens: each request stays 2.05 s on average, 8 at once.  The fleet follows a wave of twelve minutes."""
    levels = tuple(3 + 2 * math.sin(2 * math.pi * (k + 0.5) / 12) for k in range(12))
    course = Course(step_s=60, rates_per_s=levels)
    rule = Autoscaling(metric="in_flight", target=4, least=1, most=12, interval_s=15, cold_start_s=60, down_delay_s=60)
    ours = play(course, Serving(most_per_s=3, capacity_per_s=4, stay_s=2.05), rule, runs=16).replica_s
    theirs = np.array([simulated_replica_s(course, rule, seed) for seed in range(2)])
    mean, spread = float(ours.mean()), float(ours.std(ddof=1))
    assert abs(theirs.mean() - mean) < 3 * spread * math.sqrt(1 / 2 + 1 / 16)


def simulated_replica_s(course: Course, rule: Autoscaling, seed: int) -> float:
    """Return replica-seconds of one period, after five minutes of its end."""
    start_s = 300.0
    rng, times = np.random.default_rng(seed), []
    for k in range(-5, len(course.rates_per_s)):
        rate = course.rates_per_s[k]
        times.append(np.sort(rng.uniform(k * 60, (k + 1) * 60, rng.poisson(rate * 60))) + start_s)
    at_s = np.concatenate(times)
    rows = Schedule(scheduled_s=at_s, prompt_tokens=np.full(len(at_s), 16), output_tokens=np.full(len(at_s), 20))
    profile = LatencyProfile(
        form="step", layout=Layout(model="nano", precision="fp32", device="cpu"), stage=None, terms=(), coefficients=(), covariance=(),
        constants={}, residual_log_sd=0.0, valid={}, provenance=Provenance.ASSUMED,
    )  # fmt: skip
    limits = Limits(max_seqs=8, max_step_tokens=4096, block_tokens=16, blocks=10_000, max_context=4096)
    end_s = start_s + course.period_s
    run = simulate.run(
        rows, profile, limits, clock=lambda _: 0.1, replicas=2, seed=seed, until_s=end_s, conditions=Conditions(autoscaling=rule)
    )
    return sum(max(0.0, min(life.ended_s or end_s, end_s) - max(life.launched_s, start_s)) for life in run.lives)


def test_time_varying_queueing_counts_the_minutes_a_schedule_breaks() -> None:
    """Steady 8/s on 10 servers of 1 s: P(wait > 0) is Erlang C; a course that is one server short at its peak breaks there only."""
    steady = Course(step_s=600, rates_per_s=(8.0, 8.0))
    delayed = erlang_c(10, 8.0)
    assert queue_violations_min(steady, (10, 10), 1.0, limit_s=0.0, p=1 - delayed * 1.01) == 0
    assert queue_violations_min(steady, (10, 10), 1.0, limit_s=0.0, p=1 - delayed * 0.99) == pytest.approx(20)
    wave = Course(step_s=120, rates_per_s=(4.0, 8.0))
    short = queue_violations_min(wave, (8, 8), 1.0, limit_s=1.0)
    assert 0 < short <= 3  # two minutes of 8/s on 8 servers, and until the queue they leave has gone
    with pytest.raises(BadInput, match="numbers of servers"):
        queue_violations_min(wave, (8,), 1.0, limit_s=1.0)


def test_a_schedule_by_erlang_keeps_the_wait_in_the_exact_time_varying_queue() -> None:
    """Replicas by the hour from a stationary rule, at the peak of each hour, break no minute of M_t/M/c_t."""
    from mlsys_bench.queueing.mmc import fewest

    course = Course(step_s=600, rates_per_s=(3.0, 7.0, 4.0))
    servers = [fewest(max(rate, course.rates_per_s[k - 1]), 2.0, 0.5, 0.95) for k, rate in enumerate(course.rates_per_s)]
    assert queue_violations_min(course, servers, 2.0, limit_s=0.5, points=2) == 0
    assert queue_violations_min(course, [n - 3 for n in servers], 2.0, limit_s=0.5, points=2) > 0
