"""Samples at one clock: what counts of a launch, of several, and of two records that are held against each other."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import types

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import gate, record, samples
from mlsys_bench.bench import alone, harness, telemetry
from mlsys_bench.readings import flat, rows
from mlsys_bench.record import Envelope
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round

GHZ = 1e9
STEPS_GHZ = (3.6, 3.7, 3.8, 3.9, 4.0, 4.1)
WORK = 4.0  # cycles, in 1e9, of what is measured: 1 s at 4 GHz


def visits(clocks_ghz: list[float], seed: int = 0, slower: float = 1.0) -> tuple[Round, ...]:
    """Return visits of three samples of work whose time follows the clock, each read to 0.2 %."""
    rng = np.random.default_rng(seed)

    def visit(ghz: float) -> Round:
        values = slower * WORK / ghz * np.exp(rng.normal(0, 0.002, 3))
        return Round(values=tuple(values.tolist()), clock_hz=(float(ghz * GHZ * (1 + rng.uniform(-0.002, 0.002))),) * 3)

    return tuple(map(visit, clocks_ghz))


def launch(mix: dict[float, int], seed: int = 0, slower: float = 1.0) -> Launch:
    """Return a launch that made so many visits at each clock, in random order."""
    clocks = [ghz for ghz, count in mix.items() for _ in range(count)]
    np.random.default_rng(seed).shuffle(clocks)
    return Launch(started_s=float(seed), rounds=visits(clocks, seed, slower))


def measured(*launches: Launch, name: str = "gemm") -> Measurement:
    return Measurement(name=name, unit="s", better="lower", parameters={"precision": "fp32"}, launches=launches)


# ---------------------------------------------------------------- one launch


def test_a_launch_counts_at_its_usual_clock() -> None:
    m = measured(launch({3.6: 9, 4.1: 20, 4.0: 5}))
    assert samples.common_clock([m.launches[0].rounds]) == pytest.approx(4.1 * GHZ, rel=0.003)
    assert np.median(samples.kept(m)) == pytest.approx(WORK / 4.1, rel=0.001)
    assert len(samples.kept(m)) == 60
    assert (samples.flagged(m), samples.at_other_clocks(m), samples.count(m)) == (0, 42, 102)


def test_flagged_samples_have_no_say_in_what_is_usual() -> None:
    """The usual clock is that of undisturbed visits, and of those at it only the undisturbed count."""
    kept, disturbed = launch({3.6: 10}), launch({4.1: 30})
    flagged = tuple(dataclasses.replace(r, flagged=(True, True, True)) for r in disturbed.rounds)
    m = measured(dataclasses.replace(kept, rounds=kept.rounds + flagged))
    assert samples.kept(m).tolist() == [v for r in kept.rounds for v in r.values]
    assert (samples.flagged(m), samples.at_other_clocks(m)) == (90, 0)


def test_where_no_clock_is_known_all_count() -> None:
    plain = tuple(dataclasses.replace(r, clock_hz=None) for r in launch({3.6: 9, 4.1: 20}).rounds)
    m = measured(Launch(started_s=0.0, rounds=plain))
    assert samples.common_clock([plain]) is None
    assert len(samples.kept(m)) == samples.count(m) == 87
    assert samples.at_other_clocks(m) == 0


def test_a_clock_that_falls_half_way_is_no_drift_of_the_program() -> None:
    """The same program before and after the host slowed its cores: refused for a trend, were it not for the clock."""
    rounds = visits([4.1] * 30 + [3.8] * 25)
    plain = [dataclasses.replace(r, clock_hz=None) for r in rounds]
    assert samples.ended(samples.blocks_of(plain)) == "drifting"
    assert samples.ended(samples.blocks_of(rounds)) == "settled"


def test_first_visits_that_lie_apart_are_counted_among_those_that_count() -> None:
    """Five early visits at the usual clock are warm-up; visits at another clock between them are not what is counted."""
    warm, late = visits([4.1] * 5, slower=1.3), visits([4.1] * 40)
    other = visits([3.6] * 4)
    mixed = [r for pair in zip(warm[:4], other, strict=True) for r in pair] + [warm[4], *late]
    marked = samples.without_early(mixed)
    assert [bool(r.flagged) for r in marked] == [True] * 9 + [False] * 40


@settings(deadline=None)
@given(st.lists(st.sampled_from(STEPS_GHZ), min_size=1, max_size=60), st.integers(0, 3))
def test_what_counts_is_at_one_clock_and_no_other_has_more_unless_few_were_at_any(clocks: list[float], seed: int) -> None:
    rounds = visits(clocks, seed)
    m = measured(Launch(started_s=0.0, rounds=rounds))
    usual = max(clocks.count(ghz) for ghz in clocks)
    most = usual if usual >= samples.LEAST_VISITS else len(clocks)
    assert len(samples.kept(m)) == 3 * most
    assert samples.at_other_clocks(m) == samples.count(m) - 3 * most


# ---------------------------------------------------------------- several launches, and two records


def test_medians_of_launches_are_those_of_the_clock_they_share() -> None:
    """Each launch was mostly at a clock of its own; all were at 3.8 GHz now and then."""
    own = [launch({usual: 25, 3.8: 8}, seed) for seed, usual in enumerate((4.1, 3.6, 4.0, 3.7))]
    usual = [statistics.median(samples.kept(measured(one)).tolist()) for one in own]
    assert max(usual) / min(usual) > 1.1
    shared = samples.medians(own)
    assert len(shared) == 4
    assert max(shared) / min(shared) < 1.005
    assert shared[0] == pytest.approx(WORK / 3.8, rel=0.003)


def test_a_launch_that_was_never_at_the_clock_of_the_others_has_no_median_there() -> None:
    assert len(samples.medians([launch({3.8: 20}, 0), launch({3.8: 20}, 1), launch({4.1: 60}, 2)])) == 2
    assert len(samples.medians([launch({3.8: 20}, 0), launch({3.8: 1, 4.1: 60}, 1)])) == 1  # three samples of 183


def test_few_samples_are_enough_of_a_launch_that_has_no_more() -> None:
    assert len(samples.medians([launch({3.6: 1}, 0), launch({3.6: 1}, 1)])) == 2


HERE = Machine(hard={"cpu_model": "some", "cores": 2}, soft={})


def file(m: Measurement) -> tuple[Envelope, Bench]:
    bench = Bench(measurements=(m,))
    return record.envelope(bench, HERE), bench


def test_two_records_are_held_against_each_other_at_the_clock_both_knew() -> None:
    """The same program in an hour of 4.1 GHz and in one of 3.6 GHz: no slower at 3.8 GHz, and a slower program still is."""
    before = measured(*(launch({4.1: 25, 3.8: 6}, seed) for seed in range(8)))
    after = measured(*(launch({3.6: 25, 3.8: 6}, 10 + seed) for seed in range(8)))
    slower = measured(*(launch({3.6: 25, 3.8: 6}, 10 + seed, slower=1.1) for seed in range(8)))
    plain = dataclasses.replace(
        after, launches=tuple(dataclasses.replace(one, rounds=tuple(map(_clockless, one.rounds))) for one in after.launches)
    )
    assert gate.compare(file(before), file(plain)).verdict == "regression"
    same = gate.compare(file(before), file(after))
    assert same.verdict == "pass"
    assert same.findings[0].ratio == pytest.approx(1.0, abs=0.005)
    found = gate.compare(file(before), file(slower))
    assert found.verdict == "regression"
    assert found.findings[0].ratio == pytest.approx(1.1, abs=0.005)


def _clockless(r: Round) -> Round:
    return dataclasses.replace(r, clock_hz=None)


def test_records_without_a_clock_in_common_keep_all_their_samples() -> None:
    before, after = measured(launch({4.1: 10}, 0)), measured(launch({3.6: 10}, 1))
    sides = samples.comparable(Bench(measurements=(before,)), Bench(measurements=(after,)))
    assert [samples.count(side.measurements[0]) for side in sides] == [30, 30]


def test_what_only_one_record_measured_stays_in_it() -> None:
    both, alone_ = measured(launch({4.1: 10}, 0)), measured(launch({4.1: 10, 3.6: 4}, 1), name="op.norm")
    left, right = samples.comparable(Bench(measurements=(both, alone_)), Bench(measurements=(both,)))
    assert [m.name for m in left.measurements] == ["gemm", "op.norm"]
    assert samples.count(left.measurements[1]) == 42
    assert [m.name for m in right.measurements] == ["gemm"]


# ---------------------------------------------------------------- what the reader sees


def test_rows_and_their_table_name_the_clock() -> None:
    bench = Bench(measurements=(measured(launch({3.6: 9, 4.1: 20})),))
    (row,) = rows.table(bench, HERE)
    assert row.clock_hz == pytest.approx(4.1 * GHZ, rel=0.003)
    assert (row.samples, row.other_clocks) == (60, 27)
    assert {"clock_hz", "other_clocks"} <= set(flat.AFTER)


# ---------------------------------------------------------------- this machine


def test_this_machine_tells_a_clock_that_a_processor_may_have() -> None:
    look = alone.core(1)
    if look is None or look().clock_hz is None:
        pytest.skip("no C kernels, or a processor whose products take an unknown number of cycles")
    clocks = [clock_hz for _ in range(200) if (clock_hz := look().clock_hz) is not None]
    assert 0.5 * GHZ < statistics.median(clocks) < 8 * GHZ


def test_the_clock_of_a_visit_is_the_one_after_it() -> None:
    """Before it, it is that of the visit before."""
    told = iter((telemetry.Core(2.0, 3.6 * GHZ), telemetry.Core(2.1, 4.1 * GHZ)))
    watch = telemetry.Disturbances((), core=lambda: next(told))
    seen = watch.since(watch.look())
    assert (seen.crowding, seen.clock_hz) == (2.1, 4.1 * GHZ)
    assert harness.marked(Round(values=(1.0, 2.0)), seen, "lower").clock_hz == (4.1 * GHZ, 4.1 * GHZ)


def test_a_visit_of_short_work_begins_with_work_that_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After another task clocks, caches and units take a while: a sample of 2 ms would be half of that, one of 40 ms hardly notices."""
    now_s = 0.0
    calls: list[float] = []

    def look() -> float:
        nonlocal now_s
        now_s += 1e-9
        return now_s

    def work(each_s: float) -> None:
        nonlocal now_s
        now_s += each_s
        calls.append(each_s)

    monkeypatch.setattr(harness, "time", types.SimpleNamespace(perf_counter=look))  # what work takes is known, whatever the machine does
    short, long = (harness._Repeated(float, functools.partial(work, each_s), harness.on_cpu, None) for each_s in (1e-4, 0.04))
    for task in (short, long):
        task.visit()
        calls.clear()
        timed = len(task.visit().values) * task._repeat
        assert len(calls) - timed == task._lead
    assert short._lead == pytest.approx(harness.LEAD_S / 1e-4, abs=1)
    assert long._lead == 0
