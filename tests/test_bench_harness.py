"""How a figure is taken: samples that count, the interval of a median, drift, flags, checks, the order of visits."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from mlsys_bench import samples
from mlsys_bench.bench import harness, parent, telemetry
from mlsys_bench.types import Launch, Measurement, Round, Work

CALM = telemetry.Disturbance(0, slowed=False)


def measured(*rounds: Round) -> Measurement:
    return Measurement(name="x", unit="s", better="lower", parameters={}, launches=(Launch(started_s=0.0, rounds=rounds),))


def spec(name: str = "x", unit: str = "s", work: Work | None = None) -> harness.Spec:
    return harness.Spec(name=name, unit=unit, better="lower" if unit == "s" else "higher", work=work)


# ---------------------------------------------------------------- samples that count


def test_flagged_samples_are_kept_in_the_record_and_left_out_of_what_counts() -> None:
    m = measured(Round(values=(1.0, 9.0, 1.1), flagged=(False, True, False)), Round(values=(1.2,)))
    assert samples.kept(m).tolist() == [1.0, 1.1, 1.2]
    assert (samples.flagged(m), samples.count(m)) == (1, 4)


def test_where_all_are_flagged_all_count() -> None:
    m = measured(Round(values=(1.0, 2.0), flagged=(True, True)))
    assert samples.kept(m).tolist() == [1.0, 2.0]
    assert samples.kept(measured()).tolist() == []


# ---------------------------------------------------------------- the interval of the median


def test_the_interval_lies_at_the_ranks_of_the_textbook() -> None:
    """100 samples, 95 %: ranks 50.5 -+ 1.96 * 5 = 40.7 and 60.3, as the table of Conover (40, 61) between its whole ranks."""
    low, high = samples.median_interval([np.arange(1.0, 101.0)]) or (0.0, 0.0)
    assert low == pytest.approx(50.5 - 1.95996 * 5, abs=1e-3)
    assert high == pytest.approx(50.5 + 1.95996 * 5, abs=1e-3)


def test_ranks_agree_with_the_binomial_law_within_half_a_rank() -> None:
    for n in (20, 50, 200, 1000):
        low, high = samples.median_interval([np.arange(1.0, n + 1)]) or (0.0, 0.0)
        assert low == pytest.approx(scipy_stats.binom.ppf(0.025, n, 0.5) + 0.5, abs=1.0)
        assert high == pytest.approx(n + 1 - low)


def test_too_few_samples_have_no_interval() -> None:
    assert samples.median_interval([np.arange(4.0)]) is None
    assert samples.median_interval([]) is None
    assert samples.half_width([np.arange(4.0)], 0.95) == math.inf


def test_samples_that_come_in_like_groups_widen_it() -> None:
    """Ten visits of five equal samples say no more than ten samples: the variance of the rank is five times as large."""
    levels = np.random.default_rng(0).permutation(10).astype(float)
    grouped = [np.full(5, level) + 1e-6 * np.arange(5) for level in levels]
    assert samples.design_effect(grouped) == pytest.approx(5 * 10 / 9, rel=0.2)
    mixed = [np.array([low, high]) for low, high in zip(range(10), range(19, 9, -1), strict=True)]
    assert samples.design_effect(mixed) == 1.0  # each visit spreads over both halves


@given(st.lists(st.floats(1e-6, 1e3), min_size=20, max_size=60), st.floats(1e-3, 1e3))
def test_the_interval_holds_the_median_and_scales_with_the_unit(values: list[float], scale: float) -> None:
    blocks = [np.array(values[i : i + 3]) for i in range(0, len(values), 3)]
    found = samples.median_interval(blocks, 0.5)
    if found is None:  # groups so alike that they are too few
        return
    assert found[0] <= np.median(values) * (1 + 1e-9)
    assert found[1] >= np.median(values) * (1 - 1e-9)
    scaled = samples.median_interval([block * scale for block in blocks], 0.5)
    assert scaled == pytest.approx((found[0] * scale, found[1] * scale), rel=1e-6)


@pytest.mark.parametrize("shape", ["normal", "bimodal", "heavy"])
def test_the_interval_covers_with_the_stop_rule_on(shape: str) -> None:
    """300 cases: 95 % of them +- 3.5 binomial deviations.  1,000 of six shapes: `nox -s bench -- microbench`."""
    rng, inside = np.random.default_rng(3), 0
    for _ in range(300):
        drawn = {
            "normal": lambda: 1 + 0.02 * rng.standard_normal(180),
            "bimodal": lambda: np.where(rng.random(180) < 0.5, 1.0, 1.05) + 0.005 * rng.standard_normal(180),
            "heavy": lambda: 1 + 0.01 * rng.standard_t(2, 180),
        }[shape]()
        blocks, count = list(drawn.reshape(60, 3)), samples.LEAST_BLOCKS
        while samples.ended(blocks[:count]) != "settled" and count < 60:
            count = min(60, math.ceil(harness.CHECK_GROWTH * count))
        low, high = samples.median_interval(blocks[:count]) or (math.nan, math.nan)
        inside += low <= (1.025 if shape == "bimodal" else 1.0) <= high
    assert inside / 300 == pytest.approx(0.95, abs=3.5 * math.sqrt(0.95 * 0.05 / 300))


# ---------------------------------------------------------------- drift


def test_the_trend_is_that_of_mann_and_kendall() -> None:
    """Kendall's tau against time is S over n (n - 1) / 2; a rise in order of ten values: S = 45, sd 11.18, z = 3.94."""
    found = samples.drift([np.array([1 + 0.01 * i]) for i in range(10)])
    assert found is not None
    assert found.p == pytest.approx(2 * scipy_stats.norm.sf(44 / math.sqrt(125)), rel=1e-9)
    assert found.change == pytest.approx(1.08 / 1.01 - 1)
    values = np.random.default_rng(1).standard_normal(30) + 10
    ours = samples.drift([np.array([v]) for v in values])
    assert ours is not None
    assert ours.p == pytest.approx(scipy_stats.kendalltau(range(30), values).pvalue, abs=0.02)


def test_steady_samples_settle_and_a_trend_is_refused() -> None:
    rng = np.random.default_rng(0)
    steady = [1 + 0.005 * rng.standard_normal(3) for _ in range(30)]
    rising = [block * (1 + 0.05 * i / 30) for i, block in enumerate(steady)]
    assert samples.ended(steady) == "settled"
    assert samples.ended(rising) == "drifting"
    assert samples.ended(steady[: samples.LEAST_BLOCKS - 1]) == "budget"  # too few to tell


def test_a_launch_that_drifted_is_kept_aside() -> None:
    rng = np.random.default_rng(0)
    steady = [Round(values=tuple(1 + 0.005 * rng.standard_normal(3))) for _ in range(30)]
    rising = [Round(values=tuple(v * (1 + 0.05 * i / 30) for v in r.values)) for i, r in enumerate(steady)]
    started = [10.0, 20.0]
    both = parent._measurement(parent._Cell(spec=spec(), launches={0: rising, 1: steady}, is_planned=True), started)
    assert (both.launches, both.drifted, both.skipped) == (
        (Launch(started_s=20.0, rounds=tuple(steady)),), (Launch(started_s=10.0, rounds=tuple(rising)),), None,
    )  # fmt: skip
    none = parent._measurement(parent._Cell(spec=spec(), launches={0: rising}, is_planned=True), started)
    assert (none.launches, len(none.drifted), none.ended) == ((), 1, "drifting")
    assert none.skipped is not None
    assert none.skipped.startswith("drifting: it changed by +")


# ---------------------------------------------------------------- a level that was left early


def stepped(at: int, count: int = 40, by: float = 0.2) -> list[Round]:
    rng = np.random.default_rng(0)
    return [Round(values=tuple((1 + by * (i < at)) * (1 + 0.005 * rng.standard_normal(3)))) for i in range(count)]


def test_first_visits_at_a_level_of_their_own_are_found_as_far_as_the_first_quarter() -> None:
    found = [samples.early(samples.blocks_of(stepped(at))) for at in (0, 4, 7, 10, 11, 20)]
    assert found == [0, 4, 7, 10, 0, 0]
    assert samples.early(samples.blocks_of(stepped(4, by=0.01))) == 0  # no larger than what two medians may differ by
    assert samples.early(samples.blocks_of(stepped(4, count=samples.LEAST_BLOCKS - 1))) == 0


def test_the_split_is_where_mann_and_whitneys_statistic_is_largest() -> None:
    """By scipy at each split, of a step of visible size."""
    medians = np.array([np.median(block) for block in samples.blocks_of(stepped(9, by=0.03))])
    places = range(samples.LEAST_EARLY, len(medians) - samples.LEAST_EARLY + 1)
    p = {k: scipy_stats.mannwhitneyu(medians[:k], medians[k:], method="asymptotic", use_continuity=False).pvalue for k in places}
    assert samples.early(samples.blocks_of(stepped(9, by=0.03))) == min(p, key=lambda k: p[k]) == 9


def test_a_level_that_was_left_is_warm_up_in_the_record_and_in_the_verdict() -> None:
    """Its samples stay in the record, flagged; rounds that were flagged before count for none."""
    rounds = stepped(6)
    rounds[2] = dataclasses.replace(rounds[2], flagged=(True,) * 3)
    marked = samples.without_early(rounds)
    assert [all(r.flagged or (False,)) for r in marked] == [True] * 6 + [False] * 34
    assert [r.values for r in marked] == [r.values for r in rounds]
    assert samples.ended(samples.blocks_of(rounds)) == samples.ended(samples.blocks_of(rounds[6:])) == "settled"
    kept = parent._measurement(parent._Cell(spec=spec(), launches={0: rounds}, is_planned=True), [0.0])
    assert np.median(samples.kept(kept)) == pytest.approx(1.0, abs=0.002)
    assert samples.without_early(rounds[6:]) == rounds[6:]


def test_what_is_left_after_a_step_must_be_long_enough_to_settle() -> None:
    assert samples.ended(samples.blocks_of(stepped(5, count=samples.LEAST_BLOCKS + 4))) == "budget"
    assert samples.ended(samples.blocks_of(stepped(5, count=samples.LEAST_BLOCKS + 5))) == "settled"


def test_wide_samples_end_by_the_budget_and_equal_ones_settle() -> None:
    rng = np.random.default_rng(0)
    assert samples.ended([1 + 0.2 * rng.standard_normal(3) for _ in range(30)]) == "budget"
    assert samples.ended([np.ones(3)] * samples.LEAST_BLOCKS) == "settled"


# ---------------------------------------------------------------- a sample


def test_a_sample_repeats_short_work_until_it_lasts() -> None:
    """Work of a microsecond by a clock that counts calls: 2 ms hold 2,000 of them."""
    assert harness.sample_s() == pytest.approx(harness.SAMPLE_S, rel=1.0)
    assert harness.repeats(lambda count: count * 1e-6) == round(harness.sample_s() / 1e-6)
    assert harness.repeats(lambda count: count * 1.0) == 1


def test_values_are_in_the_unit_that_was_asked_for() -> None:
    """A call of 0.5 s that moves 8 bytes and computes 4 FLOPs."""
    work = Work(bytes=8.0, flops=4.0)
    for unit, value in (("s", 0.5), ("B/s", 16.0), ("FLOP/s", 8.0)):
        assert harness._scale(spec(unit=unit, work=work))(0.5) == value
    with pytest.raises(ValueError, match=r"give Spec\.work"):
        harness.timed(spec(unit="B/s"), lambda: None, device="cpu")


def test_a_timed_call_gives_seconds_of_one_call() -> None:
    calls = itertools.count()
    task = harness.timed(spec(), lambda: next(calls), device="cpu")
    ((_, taken),) = task.visit()
    assert 1 <= len(taken.values) <= harness.VISIT_SAMPLES
    assert all(0 < value < 1e-3 for value in taken.values)
    assert next(calls) > 1000  # it was repeated


def test_flushing_leaves_one_cold_call_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(harness, "_flusher", lambda device: lambda: log.append("flush"))
    task = harness.timed(spec(), lambda: log.append("call"), device="cpu", flush=True)
    task.visit()
    log.clear()
    task.visit()
    assert log == ["flush", "call"] * (len(log) // 2)


def test_copies_rotate_and_together_exceed_the_caches() -> None:
    made = itertools.count()
    give = harness.rotated("first", lambda _: f"copy {next(made)}", each_bytes=100, total_bytes=350)
    assert [give() for _ in range(5)] == ["first", "copy 0", "copy 1", "copy 2", "first"]
    assert harness.rotated("only", str, each_bytes=1e9, total_bytes=350)() == "only"


# ---------------------------------------------------------------- flags


def test_so_many_of_the_slowest_are_flagged_as_were_forced_off() -> None:
    taken = Round(values=(1.0, 3.0, 2.0))
    assert harness.marked(taken, CALM, "lower") == taken
    assert harness.marked(taken, telemetry.Disturbance(1, slowed=False), "lower").flagged == (False, True, False)
    assert harness.marked(taken, telemetry.Disturbance(2, slowed=False), "higher").flagged == (True, False, True)
    assert harness.marked(taken, telemetry.Disturbance(9, slowed=False), "lower").flagged == (True, True, True)


def test_samples_that_know_their_own_switches_are_flagged_by_them() -> None:
    taken = Round(values=(1.0, 3.0), involuntary=(2, 0))
    assert harness.marked(taken, telemetry.Disturbance(5, slowed=False), "lower").flagged == (True, False)


def test_a_visit_that_was_stolen_from_or_throttled_is_flagged_whole() -> None:
    assert harness.marked(Round(values=(1.0, 1.0)), telemetry.Disturbance(0, slowed=True), "lower").flagged == (True, True)


# ---------------------------------------------------------------- warm-up


def test_warming_up_goes_on_while_blocks_lie_apart() -> None:
    """Times that halve: blocks overlap from the third on."""
    assert harness.drifts([4.0, 5.0], [2.0, 3.0], 0.01)
    assert not harness.drifts([4.0, 5.0], [4.5, 6.0], 0.01)
    assert not harness.drifts([1.0, 1.0], [1.001, 1.001], 0.01)  # apart, but by nothing of weight


def test_the_false_alarm_of_the_warm_up_is_what_its_page_says() -> None:
    """2 of C(10, 5) = 252 orders put five wholly before or behind five others."""
    orders = list(itertools.combinations(range(10), 5))
    alarms = sum(harness.drifts(list(map(float, one)), [float(i) for i in range(10) if i not in one], 0.0) for one in orders)
    assert (alarms, len(orders)) == (2, 252)


# ---------------------------------------------------------------- visits


class Log:
    """Remembers what it heard."""

    def __init__(self) -> None:
        self.visits: list[str] = []
        self.errors: list[float] = []
        self.why: dict[str, str] = {}
        self.done = 0

    def sampled(self, planned: harness.Spec, sampled: harness.Sampled) -> None:
        """Note the visit."""
        self.visits.append(planned.name)

    def checked(self, planned: harness.Spec, error: float, tolerance: float | None) -> None:
        """Note the error."""
        self.errors.append(error)

    def progressed(self, done: int, of: int, left_s: float) -> None:
        """Note how far it is."""
        self.done = done

    def refused(self, planned: harness.Spec, why: str) -> None:
        """Note the reason."""
        self.why[planned.name] = why


class Calm:
    """A machine where nothing disturbs."""

    def look(self) -> telemetry.Before:
        """Have nothing to count."""
        return telemetry.Before(0, 0)

    def since(self, before: telemetry.Before) -> telemetry.Disturbance:
        """Have seen nothing."""
        return CALM


def task(name: str, cost_s: float = 0.0, values: tuple[float, ...] = (1.0,), **more: object) -> harness.Task:
    planned = spec(name)
    made = harness.Task(specs=(planned,), visit=lambda: [(planned, Round(values=values))], cost_s=cost_s)
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def busy(seconds: float) -> list[harness.Sampled]:
    """Work for so long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass
    return [(spec("slow"), Round(values=(1.0, 2.0)))]


def visit(tasks: list[harness.Task], rounds: int, left_s: float = math.inf) -> tuple[Log, list[str]]:
    log = Log()
    missed = harness.visit_all(
        tasks, rounds=rounds, deadline=time.monotonic() + left_s, rng=np.random.default_rng(0), hearer=log, watch=Calm()
    )
    return log, [t.specs[0].name for t in missed]


def test_the_first_round_goes_from_cheap_to_dear_and_visits_all() -> None:
    log, missed = visit([task(name, cost_s) for name, cost_s in (("b", 0.2), ("a", 0.1), ("c", 0.3))], rounds=1)
    assert (log.visits, missed) == (["a", "b", "c"], [])


def test_later_rounds_go_in_random_order_until_all_have_settled() -> None:
    log, _ = visit([task(name) for name in "abcd"], rounds=1000)
    assert {log.visits.count(name) for name in "abcd"} == {samples.LEAST_BLOCKS}  # equal samples settle as soon as they may
    assert len({tuple(log.visits[i : i + 4]) for i in range(4, 40, 4)}) > 3


def test_one_that_takes_long_does_not_eat_the_time_of_the_others() -> None:
    slow = task("slow", visit=lambda: busy(0.02))
    log, _ = visit([slow, *(task(name, values=(1.0, 2.0)) for name in "abc")], rounds=40)
    assert log.visits.count("a") > 4 * log.visits.count("slow")
    assert log.visits.count("slow") >= 1


def test_what_would_overrun_the_budget_is_not_begun_and_is_named() -> None:
    log, missed = visit([task("cheap"), task("dear", cost_s=1e9)], rounds=3, left_s=60.0)
    assert (log.visits, missed) == (["cheap"] * 3, ["dear"])


@pytest.mark.parametrize(("error", "why"), [(math.nan, "not a number"), (0.5, "off by 0.5"), (math.inf, "off by inf")])
def test_an_operator_with_a_wrong_output_is_refused_with_the_reason(error: float, why: str) -> None:
    log, missed = visit([task("wrong", check=lambda: error, tolerance=0.1), task("right", check=lambda: 0.05, tolerance=0.1)], rounds=2)
    assert (set(log.visits), missed) == ({"right"}, [])
    assert why in log.why["wrong"]
    assert 0.05 in log.errors
    assert len(log.errors) == 2  # once in a launch


@settings(max_examples=25)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=6), st.integers(1, 5))
def test_every_task_that_fits_is_visited(costs: list[float], rounds: int) -> None:
    log, missed = visit([task(str(i), cost) for i, cost in enumerate(costs)], rounds)
    assert missed == []
    assert set(log.visits) == {str(i) for i in range(len(costs))}


# ---------------------------------------------------------------- crowded cores


def test_samples_beside_a_neighbour_are_left_out_by_what_the_core_is_without_one() -> None:
    quiet, shared = Round(values=(1.0, 1.1), crowding=(2.0, 2.0)), Round(values=(1.4, 1.5), crowding=(2.5, 2.5))
    least = samples.least_crowding([2.5] * 30 + [2.0] * 10)
    assert least == pytest.approx(2.0)
    assert samples.without_crowded([shared, quiet], least) == [dataclasses.replace(shared, flagged=(True, True)), quiet]
    assert samples.kept(measured(*samples.without_crowded([shared, quiet], least))).tolist() == [1.0, 1.1]


def test_one_low_reading_does_not_make_a_quiet_core_look_crowded() -> None:
    rounds = [Round(values=(1.0,), crowding=(c,)) for c in (1.2, *[2.0] * 99)]
    least = samples.least_crowding([c for r in rounds for c in r.crowding or ()])
    assert not any(samples.crowded(r, least) for r in rounds)


def test_where_nothing_tells_how_crowded_cores_are_nothing_is_left_out() -> None:
    rounds = [Round(values=(1.0,))]
    assert samples.without_crowded(rounds, samples.least_crowding([])) == rounds


def test_a_crowded_core_is_told_by_the_worse_of_the_looks_around_a_visit() -> None:
    told = iter((2.0, 2.5, 2.4, 2.1))
    watch = telemetry.Disturbances((), core=lambda: telemetry.Core(next(told), None))
    assert [watch.since(watch.look()).crowding for _ in range(2)] == [2.5, 2.4]
    assert harness.marked(Round(values=(1.0, 2.0)), CALM._replace(crowding=2.5), "lower").crowding == (2.5, 2.5)


class LeavingNeighbour(Calm):
    """A machine whose core is shared for the first visits, which take longer by a quarter."""

    def __init__(self, until: int) -> None:
        """Share it for so many visits."""
        self.left = until

    def since(self, before: telemetry.Before) -> telemetry.Disturbance:
        """Return how crowded the core was."""
        self.left -= 1
        return CALM._replace(crowding=2.5 if self.left >= 0 else 2.0)


def test_what_settled_beside_a_neighbour_is_measured_again_once_it_has_gone() -> None:
    """The first benchmark settles on a shared core; only the second, which never settles, sees it alone."""
    log, watch = Log(), LeavingNeighbour(until=2 * samples.LEAST_BLOCKS + 10)
    rounds: list[Round] = []
    noise = np.random.default_rng(0)

    def steady() -> list[harness.Sampled]:
        rounds.append(Round(values=((1.25 if watch.left > 0 else 1.0),)))
        return [(spec("steady"), rounds[-1])]

    def wild() -> list[harness.Sampled]:
        return [(spec("wild"), Round(values=(float(noise.uniform(1.0, 9.0)),)))]

    tasks = [harness.Task(specs=(spec(name),), visit=work, cost_s=0.0) for name, work in (("steady", steady), ("wild", wild))]
    harness.visit_all(tasks, rounds=200, deadline=math.inf, rng=np.random.default_rng(0), hearer=log, watch=watch)
    assert log.visits.count("wild") > samples.LEAST_BLOCKS  # as often as time is shared: it outlasts the neighbour
    assert [r.values for r in rounds].count((1.25,)) == samples.LEAST_BLOCKS  # then it had settled, until the core was seen alone
    assert [r.values for r in rounds].count((1.0,)) >= samples.LEAST_BLOCKS


def test_a_launch_says_how_much_of_it_a_neighbour_shared() -> None:
    shared = [Round(values=(1.3,), crowding=(2.5,))] * 30
    alone = [Round(values=(1.0,), crowding=(2.0,))] * 10
    cell = parent._Cell(spec=spec(), launches={0: shared + alone}, is_planned=True)
    assert parent._leave_out_crowded([cell], 0) == pytest.approx(0.75)
    assert samples.kept(parent._measurement(cell, [0.0])).tolist() == [1.0] * 10
    (said,) = telemetry.shared([0.75])
    assert "75.0 %" in said
    assert list(telemetry.shared([0.01])) == []


# ---------------------------------------------------------------- memory


def test_what_a_benchmark_takes_does_not_follow_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two launches are one only where both read as much; three buffers beyond a cache of 480 MiB take most of a fifth of 24 GB."""
    told = {"all": 24e9}
    monkeypatch.setattr(harness.memory, "total_bytes", lambda: told["all"])
    monkeypatch.setattr(harness.memory, "available_bytes", lambda: told["free"])

    def taken(free: float, wanted: float = 4.5e9) -> float:
        told["free"] = free
        return harness.steady_bytes(wanted)

    assert {taken(free) for free in (9.1e9, 15e9, 23e9)} == {4.5e9}
    assert taken(23e9, wanted=9e9) == harness.MEMORY_SHARE * 24e9
    assert {taken(free) for free in (4.4e9, 8.5e9)} == {2.0**31}
