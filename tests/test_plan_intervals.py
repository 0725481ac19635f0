"""Intervals of plans: draws by how slow they are, two witnesses of a figure, even requests, replicas, and traces."""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import hardware, latency, models, slo, stats, workload
from mlsys_bench.plan import Request, candidates, confirm, demand, draws, evened, intervals, planner, replays, sizing, words
from mlsys_bench.plan import trial as trials
from mlsys_bench.plan.analytic import Replica
from mlsys_bench.plan.latencies import Latencies
from mlsys_bench.plan.search import Search
from mlsys_bench.plan.sizing import Design
from mlsys_bench.plan.trial import Trial
from mlsys_bench.pricing import Shelf, published
from mlsys_bench.types import SLO, LatencyProfile
from mlsys_bench.workload import Schedule

STEP = (8.0, 1600.0, 64.0, 2048.0, 9.0)
BARE = (8.0, 8.0 * 500.0, 0.0, 0.0, 8.0)  # decodes only
SMALL = workload.synthetic(12, prompt="uniform:96:0.4", output="uniform:8:0.4")
ENGINE = {"max_batch": 8, "max_step_tokens": 256, "block_tokens": 16, "kv_tokens": 4096, "max_context": 1024}


def profile(residual: float = 0.05, spread: float = 0.0) -> LatencyProfile:
    """Return a small model on a slow core, its multipliers far from their floor."""
    base = latency.roofline(models.find("small-160m"), hardware.find("cpu"), precision="fp32")
    return dataclasses.replace(
        base,
        coefficients=tuple(c if name.endswith("_s") else 3 * c for name, c in zip(base.terms, base.coefficients, strict=True)),
        covariance=tuple(tuple(row) for row in (np.eye(len(base.terms)) * spread**2).tolist()),
        constants={**base.constants, **ENGINE},
        residual_log_sd=residual,
    )


def request(**changes: object) -> Request:
    base = Request(model="small-160m", workload=SMALL, slo=slo.parse("e2e_p95<20s"), profiles=(profile(),))
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def design(asked: Request, replicas: int) -> Design:
    """Return so many replicas of the only candidate."""
    (candidate,) = candidates.every(asked)[0]
    traffic = demand.of(asked.workload) if asked.trace is None else demand.of_trace(asked.trace)
    replica = Replica(candidate.profile, candidate.limits, traffic.fitting(candidate.limits))
    rate = asked.workload.rate_per_s
    least = sizing.fewest(replica.capacity_per_s, rate, asked.headroom)
    return Design(candidate=candidate, replica=replica, rate_per_s=rate, replicas=replicas, fewest=least, binds=None, price=None)


# ---------------------------------------------------------------- draws


def test_a_few_draws_know_the_ends_of_a_normal_law() -> None:
    """The residual alone is uncertain: a step's log time is then normal, ends at 1.645 of what a mean of many kinds keeps of its sd."""
    found = draws.of(profile(), STEP, BARE, intervals.SHARES, seed=3)
    low, high = found.band(found.slowness.tolist())
    assert high == pytest.approx(1.645 * 0.05 * draws.COMMON**0.5, rel=0.12)
    assert low == pytest.approx(-1.645 * 0.05 * draws.COMMON**0.5, rel=0.12)


def test_what_is_unsure_of_coefficients_does_not_average_out() -> None:
    """Coefficients that are off together: any mean of steps is as much off as each."""
    base = profile(residual=1e-4)
    n = len(base.terms)
    together = dataclasses.replace(base, covariance=tuple((0.1**2,) * n for _ in range(n)))
    found = draws.of(together, STEP, BARE, intervals.SHARES, seed=3)
    assert found.band(found.slowness.tolist()) == pytest.approx((-1.645 * 0.1, 1.645 * 0.1), rel=0.12)


def test_a_gap_between_tokens_is_as_uncertain_as_a_step_that_only_decodes() -> None:
    """The residual is all that is uncertain, so every kind of step has the ends of a normal law."""
    low, high = draws.of(profile(), STEP, BARE, intervals.SHARES, seed=3).bare
    assert (low, high) == pytest.approx((-1.645 * 0.05, 1.645 * 0.05), rel=0.12)


def seen(ttft_s: list[float]) -> Trial:
    each = [Latencies(ttft_s=np.full(9, t), tpot_s=np.full(9, 0.02), e2e_s=np.full(9, t + 1), itl_s=np.full(9, 0.02)) for t in ttft_s]
    return Trial(batches=tuple(each), tokens_per_s=(1.0,) * 4, requests_per_s=(1.0,) * 4, preempted=0.0)


@pytest.mark.parametrize(("requests", "parts"), [(999, 1), (2_000, 2), (7_200, 4)])
def test_a_long_batch_tells_its_spread_by_parts_of_a_thousand_requests(requests: int, parts: int) -> None:
    """Half a width is Student's over the parts, as scipy has it; chance that four batches agree no longer narrows it."""
    rng = np.random.default_rng(5)
    runs = [rng.gamma(2.0, 0.1, requests) for _ in range(4)]
    whole = tuple(Latencies(ttft_s=t, tpot_s=0 * t + 0.02, e2e_s=t + 1, itl_s=np.full(9, 0.02)) for t in runs)
    found = Trial(batches=whole, tokens_per_s=(1.0,) * 4, requests_per_s=(1.0,) * 4, preempted=0.0).spread(slo.parse("ttft_p50<1s"))
    medians = [float(np.median(part)) for run in runs for part in np.array_split(run, parts)]
    interval = stats.mean_interval(medians)
    assert interval is not None
    assert found["ttft_p50_s"] == pytest.approx((interval[1] - interval[0]) / 2 / float(np.mean(medians)), rel=1e-4)


def test_parts_of_a_batch_keep_whose_each_request_and_gap_was() -> None:
    n, gaps = 2_500, 7_001
    batch = Latencies(
        ttft_s=np.arange(n) * 1.0, tpot_s=np.zeros(n), e2e_s=np.ones(n), itl_s=np.arange(gaps) * 1.0,
        tenant=np.arange(n) % 3, tenants=("a", "b", "c"), itl_tenant=np.arange(gaps) % 3,
    )  # fmt: skip
    parts = trials._parts(batch)
    assert [len(part.ttft_s) for part in parts] == [1_250, 1_250]
    for part in parts:
        assert part.tenant is not None
        assert part.itl_tenant is not None
        assert np.array_equal(part.tenant, part.ttft_s % 3)
        assert np.array_equal(part.itl_tenant, part.itl_s % 3)
    assert sum(len(part.itl_s) for part in parts) == gaps


def test_a_queue_that_grows_from_batch_to_batch_is_not_taken_for_stable() -> None:
    assert confirm.growing(seen([1.0, 2.0, 3.0, 4.0]))
    assert not confirm.growing(seen([1.0, 1.1, 1.2, 1.9])), "chance does as much"
    assert not confirm.growing(seen([1.0, 5.0, 2.0, 3.0])), "it went down again"


def test_no_fleet_is_planned_whose_queue_grows_though_all_limits_are_kept() -> None:
    five = design(request(), 5)
    five = dataclasses.replace(five, rate_per_s=5 * 0.95 * five.replica.capacity_per_s)
    efforts = []

    def play(fleet: Design, effort: int) -> Trial:
        efforts.append((fleet.replicas, effort))
        return seen([1.0, 2.0, 3.0, 4.0])

    found = confirm.fewest(five, slo.parse("ttft_p95<100s"), Shelf(market=published()), play, 7)
    assert found is not None
    assert found[0].replicas == 6, "five are busy to 95 %; six to 79 %, where theory is sure"
    assert (5, confirm.LONGER) in efforts, "a longer run decides"


def test_a_plan_says_that_its_limit_is_one_that_an_idle_replica_all_but_misses() -> None:
    four = design(request(), 4)
    idle_s = four.replica.predict(sizing.IDLE * four.replica.capacity_per_s).value("ttft", "p95")
    assert idle_s is not None
    tight, ample = (request(slo=slo.parse(f"ttft_p95<{1e3 * times * idle_s:.6g}ms")) for times in (1.2, 2.0))
    (said,) = words._near_idle(tight, dataclasses.replace(four, fewest=1))
    assert "is 1.20 times what an idle replica takes" in said
    assert not list(words._near_idle(ample, dataclasses.replace(four, fewest=1)))
    assert not list(words._near_idle(tight, dataclasses.replace(four, fewest=4))), "there capacity binds, not the limit"


def test_draws_come_from_fast_to_slow_and_their_steps_last_as_long_as_said() -> None:
    base = profile(spread=0.1)
    found = draws.of(base, STEP, BARE, intervals.SHARES, seed=1)
    assert np.all(np.diff(found.slowness) >= 0)
    ratios = [latency.step_s(p, STEP) / latency.step_s(base, STEP) for p in found.profiles]
    assert np.log(ratios) == pytest.approx(found.slowness, abs=1e-9)


def test_no_draw_is_faster_than_the_hardware() -> None:
    base = dataclasses.replace(profile(residual=0.3), coefficients=latency.roofline(
        models.find("small-160m"), hardware.find("cpu"), precision="fp32").coefficients)  # fmt: skip
    for drawn in draws.of(base, STEP, BARE, intervals.SHARES, seed=0).profiles:
        assert latency.check(drawn) is drawn


# ---------------------------------------------------------------- even requests


def test_even_requests_bring_the_load_asked_for_in_the_order_they_came() -> None:
    asked = request(workload=workload.synthetic(12, prompt="lognormal:96:1.0:400", output="lognormal:16:1.0:100"))
    replica = design(asked, 1).replica
    drawn = workload.schedule(asked.workload, n=600, seed=5)
    found = evened.evened(drawn, replica, 7.0)
    work, usual = (evened.work_s(replica, s.prompt, s.output).mean() for s in (_lengths(found), replica.demand))
    assert len(found) / found.scheduled_s[-1] * work == pytest.approx(7.0 * usual, rel=1e-9)
    assert found.prompt_tokens.mean() == pytest.approx(replica.demand.mean_prompt, rel=0.01)
    longer = np.argsort(drawn.output_tokens, kind="stable")
    assert np.all(np.diff(found.output_tokens[longer]) >= 0)
    assert np.diff(found.scheduled_s) / np.diff(drawn.scheduled_s) == pytest.approx(found.scheduled_s[-1] / drawn.scheduled_s[-1])


def _lengths(found: Schedule) -> demand.Demand:
    return demand.Demand(prompt=found.prompt_tokens.astype(float), output=found.output_tokens.astype(float))


def test_the_work_of_requests_saturates_a_replica_at_its_capacity() -> None:
    """Two ways to one figure: the mean work of a request is the time between two answers of a full replica."""
    replica = design(request(), 1).replica
    assert float(evened.work_s(replica, replica.demand.prompt, replica.demand.output).mean()) == pytest.approx(
        1 / replica.capacity_per_s, rel=0.15
    )


# ---------------------------------------------------------------- two witnesses


def test_two_witnesses_as_sure_as_each_other_meet_half_way() -> None:
    half = 1.645 * intervals.THEORY["ttft"][1] / intervals.EVENED["ttft"][1]
    found = intervals.centre("ttft_p95_s", 1.0, half, math.exp(0.06))
    assert found.log == pytest.approx(0.03, rel=1e-6)
    assert found.sd == pytest.approx(intervals.THEORY["ttft"][1] / math.sqrt(2), rel=1e-6)


@given(apart=st.floats(-1.5, 1.5), half=st.floats(0.01, 0.5))
def test_the_centre_lies_between_its_witnesses_and_contradiction_never_makes_it_surer(apart: float, half: float) -> None:
    found = intervals.centre("chat:e2e_p99_s", 2.0, half, 2.0 * math.exp(apart))
    assert min(0.0, apart) - 1e-9 <= found.log - math.log(2.0) <= max(0.0, apart) + 1e-9
    assert found.sd >= intervals.centre("chat:e2e_p99_s", 2.0, half, 2.0).sd - 1e-12
    assert intervals.centre("chat:e2e_p99_s", 2.0, half, None).sd == pytest.approx(intervals.EVENED["e2e"][2] * half / 1.645)


def test_a_rate_that_a_short_run_hardly_knows_is_not_below_zero() -> None:
    """All requests of a run in one of its four batches: a spread of 2.35 times their mean."""
    asked = request()
    lumpy = dataclasses.replace(confirm.trial(asked, design(asked, 2)), requests_per_s=(0.0, 0.0, 0.0, 4.0))
    assert intervals.of(design(asked, 2), lumpy, {}, asked).intervals["request_rate_per_s"] == pytest.approx((0.0, 1 + trials.STUDENT[4]))


# ---------------------------------------------------------------- replicas


@functools.cache
def capacity_per_s() -> float:
    return design(request(), 1).replica.capacity_per_s


@pytest.mark.parametrize(("needed", "inside"), [(4.99, (5.0, 6.0)), (4.02, (4.0, 5.0)), (4.5, (5.0, 5.0))])
def test_one_replica_fewer_is_inside_unless_it_can_be_ruled_out(needed: float, inside: tuple[float, float]) -> None:
    """Headroom binds; the engine is known to 1.645 x 2 % = 3.3 %, so 4.99 may be more than 5, 4.02 not more than 4, and 4.5 is 5."""
    traffic = dataclasses.replace(SMALL, rate_per_s=needed * 0.8 * capacity_per_s())
    asked = request(profiles=(profile(0.02),), workload=traffic, slo=slo.parse("e2e_p95<90s"))
    planned = design(asked, 5)
    assert intervals.of(planned, confirm.trial(asked, planned), {}, asked).intervals["replicas"] == inside


def test_a_worse_known_engine_has_wider_intervals() -> None:
    widths = []
    for residual in (0.02, 0.1):
        asked = request(profiles=(profile(residual),), workload=dataclasses.replace(SMALL, rate_per_s=3 * capacity_per_s()))
        planned = design(asked, 5)
        found = intervals.of(planned, confirm.trial(asked, planned), {}, asked).intervals
        widths.append([math.log(found[key][1] / found[key][0]) for key in ("tpot_p50_s", "e2e_p95_s", "utilisation")])
    assert np.all(np.array(widths[0]) < np.array(widths[1]))


# ---------------------------------------------------------------- traces


Played = list[tuple[int, int, Trial]]  # replicas, how long, what was seen


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Every simulation of a plan, in order; all of them short."""

    def watched(asked: Request, fleet: Design, effort: int = 1) -> Trial:
        found.append((fleet.replicas, effort, trial(asked, fleet, effort)))
        return found[-1][2]

    found, trial = Played(), confirm.trial
    monkeypatch.setattr(confirm, "trial", watched)
    monkeypatch.setattr(confirm, "MAX_STEPS", 400)
    return found


@pytest.mark.parametrize(
    ("compiled", "wide", "tokens", "longest"),
    [
        (True, 10.0, 2e7, confirm.SURER), (True, 0.0, 2e7, confirm.SUREST), (True, 0.0, 1e3, confirm.SURER),
        (False, 10.0, 2e7, confirm.LONGER), (False, 0.0, 2e7, confirm.LONGER),
    ],
)  # fmt: skip
def test_a_plan_shows_its_longest_run(
    monkeypatch: pytest.MonkeyPatch, played: Played, compiled: bool, wide: float, tokens: float, longest: int
) -> None:
    """The longest where its replicas are uncertain and that many tokens can be played; and no fleet is played twice for as long."""
    monkeypatch.setattr(confirm, "_SURELY_TOKENS", tokens)
    monkeypatch.setattr(planner, "WIDE", wide)
    monkeypatch.setattr(planner.jit, "HAVE_NUMBA", compiled)
    many = dataclasses.replace(SMALL, rate_per_s=150.0)
    asked = request(workload=many, slo=slo.parse("ttft_p95<900ms"), profiles=(profile(residual=0.1),))
    made = planner.plan(asked)
    shown = [found.keys(asked.slo) for replicas, effort, found in played if (replicas, effort) == (made.replicas, longest)]
    assert shown == [made.predicted]
    assert max(effort for _, effort, _ in played) == longest
    ways = [(replicas, effort) for replicas, effort, _ in played]
    assert len(ways) == len(set(ways))
    assert made.predicted["ttft_p95_s"] < 0.9


def test_replicas_are_sought_again_where_the_longer_run_misses_a_limit(monkeypatch: pytest.MonkeyPatch, played: Played) -> None:
    """A short run that saw nothing of the tail: its fleet misses in the longer one, and grows until it does not."""

    def of_longer() -> list[int]:
        return [replicas for replicas, effort, _ in played if effort == confirm.SURER]

    def worst(found: Trial, limits: SLO) -> float:
        replicas = next(replicas for replicas, _, one in played if one is found)
        return 0.5 if found.effort < confirm.SURER else 1.5 if replicas < 5 + of_longer()[0] else 0.9

    monkeypatch.setattr(planner.jit, "HAVE_NUMBA", True)
    monkeypatch.setattr(planner, "WIDE", 10.0)
    monkeypatch.setattr(confirm, "worst", worst)
    many = dataclasses.replace(SMALL, rate_per_s=150.0)
    made = planner.plan(request(workload=many, slo=slo.parse("ttft_p95<900ms"), profiles=(profile(residual=0.1),)))
    assert (of_longer()[0], 1) in [(replicas, effort) for replicas, effort, _ in played], "what the short run took for enough"
    assert made.replicas == of_longer()[0] + 5


@pytest.mark.parametrize("grown", [5, None])
def test_a_winner_that_longer_runs_refuse_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch, grown: int | None) -> None:
    """Two replicas become five, or never enough: the design of three wins, and nobody is told of two any more."""
    asked = request(workload=dataclasses.replace(SMALL, rate_per_s=capacity_per_s()))
    two, three, four = (design(asked, replicas) for replicas in (2, 3, 4))
    short = confirm.trial(asked, two)

    def confirmed(fleet: Design, asked: Request, effort: int, known: object = None) -> tuple[Design, Trial] | None:
        replicas = {2: grown, 3: 3}[fleet.replicas]
        return None if replicas is None else (design(asked, replicas), short)

    monkeypatch.setattr(confirm, "keeps", lambda *_: False)
    monkeypatch.setattr(confirm, "confirm", confirmed)
    found, _ = planner._surer(asked, Search(designs=(two, three, four), missed=(), passed_over=(), misfits=()), short)
    assert [d.replicas for d in found.designs] == ([3, 4] if grown is None else [3, 4, 5])
    assert [d.replicas for d in found.unconfirmed] == ([2] if grown is None else [])


def test_the_busiest_stretch_is_where_the_work_comes_fastest() -> None:
    rng = np.random.default_rng(0)
    gaps = np.where((np.arange(6000) > 3000) & (np.arange(6000) < 4500), 0.01, 0.1)
    trace = Schedule(
        scheduled_s=np.cumsum(gaps), prompt_tokens=rng.integers(50, 100, 6000), output_tokens=rng.integers(90, 110, 6000)
    )  # fmt: skip
    found = replays.busiest(trace, design(request(), 1).replica)
    assert int(found.output_tokens.sum()) == pytest.approx(replays.TOKENS, rel=0.01)
    assert trace.scheduled_s[3000] < found.scheduled_s[0] < found.scheduled_s[-1] < trace.scheduled_s[4500]


def test_a_trace_s_figures_have_intervals_from_its_replays() -> None:
    rate = 2.2 * capacity_per_s()
    trace = workload.schedule(dataclasses.replace(SMALL, rate_per_s=rate), n=400, seed=2)
    asked = request(workload=dataclasses.replace(SMALL, rate_per_s=rate), trace=trace, headroom=0.0)
    planned = design(asked, 3)
    trial = confirm.once(planned, asked)
    found = intervals.of(planned, trial, {}, asked)
    assert found.draws == len(replays.SHARES)
    for key, value in trial.keys(asked.slo).items():
        low, high = found.intervals[key]
        assert low <= value <= high, key
    low, high = found.intervals["tpot_p50_s"]
    assert 0.16 < math.log(high / low) < 0.8  # +- 1.645 x 5 % of the time a step takes, and more requests in it
    assert found.intervals["replicas"][0] <= 3 <= found.intervals["replicas"][1] <= 4
