"""The gate: launches decide, single launches at most raise suspicion, and nothing is compared across machines."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import gate
from mlsys_bench.errors import BadInput
from mlsys_bench.gate import decide as arithmetic
from mlsys_bench.record import Envelope
from mlsys_bench.summary import launches
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round, Scalar
from mlsys_bench.verdicts import Policy, Verdict

RECORDED = Path(__file__).parents[2] / "shared" / "data" / "gate" / "decode_bf16_visible.csv"
SAMPLES = 40


def head(hard: dict[str, Scalar] | None = None, soft: dict[str, Scalar] | None = None) -> Envelope:
    machine = Machine(hard={"cpu_model": "EPYC", "cores": 2} if hard is None else hard, soft=soft or {})
    return Envelope(schema="mlsys/1", kind="bench", created="2026-01-01T00:00:00+00:00", machine=machine, inputs={})


def launch(values: Any, involuntary: Any = None) -> Launch:
    return Launch(started_s=0.0, rounds=(Round(values=tuple(map(float, values)), involuntary=involuntary),))


def quiet(value: float, n: int = SAMPLES) -> Launch:
    """Return a launch of undisturbed samples that scatter evenly by 1 % around a value: its median is the value."""
    return launch(value * (1 + np.linspace(-0.01, 0.01, n)), (0,) * n)


def measurement(*launches: Launch, **changes: Any) -> Measurement:
    made = Measurement(name="decode", unit="s", better="lower", parameters={"batch": 8}, launches=launches)
    return dataclasses.replace(made, **changes)


def file(*measurements: Measurement, **machine: Any) -> tuple[Envelope, Bench]:
    return head(**machine), Bench(measurements=measurements)


def of(*values: float) -> tuple[Envelope, Bench]:
    """Return a file with one launch for each value."""
    return file(measurement(*map(quiet, values)))


def spread(centre: float, sd: float = 0.004, n: int = 6) -> list[float]:
    """Return n values whose logarithms have exactly this mean and standard deviation."""
    z = np.linspace(-1, 1, n)
    return [float(v) for v in centre * np.exp(sd * z / z.std(ddof=1))]


# ---------------------------------------------------------------- known answers


@pytest.mark.parametrize(
    ("slowdown", "verdict", "status"),
    [(1.0, "pass", 0), (1.02, "pass", 0), (1.10, "regression", 1), (1.30, "regression", 1), (0.90, "improved", 0)],
)
def test_six_quiet_launches_a_side_decide(slowdown: float, verdict: str, status: int) -> None:
    said = gate.compare(of(*spread(1.0)), of(*spread(slowdown)))
    assert (said.verdict, gate.exit_status(said)) == (verdict, status)
    assert said.findings[0].ratio == pytest.approx(slowdown)


def test_the_bounds_are_welchs() -> None:
    """Two samples of six with sd 0.01 and 0.02: by hand, se = sqrt((1e-4 + 4e-4)/6), df = 7.353, t = 3.43."""
    from scipy import stats

    base, cand = np.log(spread(1.0, 0.01)), np.log(spread(1.05, 0.02))
    bounds = arithmetic.welch(list(base), list(cand), 0.05)
    theirs = stats.ttest_ind(cand, base, equal_var=False).confidence_interval(0.99)
    assert (bounds.low, bounds.high) == pytest.approx((theirs.low, theirs.high))
    assert bounds.high - bounds.estimate == pytest.approx(stats.t.ppf(0.995, 5 * 25e-8 / 17e-8) * math.sqrt(5e-4 / 6))


def test_slower_within_tolerance_passes_and_says_so() -> None:
    said = gate.compare(of(*spread(1.0)), of(*spread(1.03)))
    assert said.verdict == "pass"
    assert said.findings[0].reason.startswith("slower, within tolerance")


def test_noisy_launches_are_inconclusive_with_what_they_could_have_found() -> None:
    said = gate.compare(of(*spread(1.0, 0.05)), of(*spread(1.05, 0.05)))
    assert (said.verdict, gate.exit_status(said)) == ("inconclusive", 3)
    assert "nine times in ten" in said.findings[0].reason
    assert "launches a side would find 5 %" in said.findings[0].reason


def test_launches_needed_would_find_the_tolerance_nine_times_in_ten() -> None:
    """The advice, held against simulated launches: power at the advised number, and less at half of it."""
    sd, tolerance = 0.025, 0.05
    n = arithmetic.launches_needed(sd, tolerance)
    assert n is not None
    rng = np.random.default_rng(1)

    def found(launches: int, runs: int = 400) -> float:
        hits = 0
        for _ in range(runs):
            base, cand = rng.normal(0, sd, launches), rng.normal(math.log1p(tolerance), sd, launches)
            hits += arithmetic.welch(list(base), list(cand), tolerance).low > math.log1p(tolerance) / 5
        return hits / runs

    assert found(n) > 0.9 - 3 * math.sqrt(0.09 / 400)
    assert found(n // 2) < 0.8


def test_the_same_program_is_almost_never_called_a_regression() -> None:
    """2,000 pairs of six launches with sd 2.6 %: the two bounds of 99.5 % and d0 leave at most 0.5 %."""
    rng = np.random.default_rng(0)
    said = collections.Counter()
    for _ in range(2000):
        bounds = arithmetic.welch(list(rng.normal(0, 0.026, 6)), list(rng.normal(0, 0.026, 6)), 0.05)
        said[arithmetic.decide(bounds.low, bounds.high, 0.05)] += 1
    assert said["regression"] <= 2000 * 0.005 + 3 * math.sqrt(2000 * 0.005)
    assert said["improved"] <= 2000 * 0.005 + 3 * math.sqrt(2000 * 0.005)


def test_the_chance_of_a_slowdown_is_that_of_welchs_test_against_a_fifth_of_the_tolerance() -> None:
    from scipy import stats

    base, cand = np.log(spread(1.0, 0.01)), np.log(spread(1.05, 0.02))
    theirs = stats.ttest_ind(cand - math.log1p(0.05) / 5, base, equal_var=False, alternative="greater").pvalue
    assert arithmetic.welch(list(base), list(cand), 0.05).chance == pytest.approx(theirs)
    assert [arithmetic.welch([0.0] * 6, [shift] * 6, 0.05).chance for shift in (0.0, 0.125)] == [1.0, 0.0]


def test_of_many_metrics_of_one_program_seldom_is_any_called_slower() -> None:
    """30 metrics of six launches a side with sd 10 %: by their own chance alone 8 % of comparisons fail, together at most 2 %."""
    rng, jobs = np.random.default_rng(3), 400
    alone = together = 0
    for base, cand in rng.normal(0, 0.1, (jobs, 2, 30, 6)):
        bounds = [arithmetic.welch(list(b), list(c), 0.05) for b, c in zip(base, cand, strict=True)]
        slower = [arithmetic.decide(b.low, b.high, 0.05) == "regression" for b in bounds]
        alone += any(slower)
        together += any(s and stands for s, stands in zip(slower, arithmetic.beyond_chance([b.chance for b in bounds]), strict=True))
    assert alone > 0.04 * jobs
    assert together <= 0.02 * jobs + 3 * math.sqrt(0.02 * jobs)


def test_a_slowdown_that_chance_brings_to_one_of_many_metrics_is_suspect() -> None:
    """At p = 0.3 % one metric fails alone, and beside three others that are reported only; of 30 that may fail it is suspect."""

    def said(others: int, policy: Policy | None = None) -> Verdict:
        sides = [
            file(
                measurement(*map(quiet, spread(math.exp(0.1125 * side), 0.05)), name="first"),
                *(measurement(*map(quiet, spread(1.0, 0.002)), name=f"other{i}") for i in range(others)),
            )
            for side in (0, 1)
        ]  # fmt: skip
        return gate.compare(*sides, policy=policy)

    assert said(0).verdict == "regression"
    assert said(3).verdict == "regression"
    of_many = said(29)
    assert (of_many.verdict, gate.exit_status(of_many)) == ("suspect", 3)
    assert of_many.findings[0].reason.startswith("beyond its own chance, not beyond that of 30 metrics together; 6 against 6 launches")
    assert said(29, Policy(reported=("other*",))).verdict == "regression"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.1, 0.02, "pass"),
        (0.011, 0.04, "pass"),
        (0.011, 0.2, "regression"),
        (-0.2, -0.02, "improved"),
        (-0.04, -0.011, "pass"),
        (0.0, 0.2, "inconclusive"),
    ],
)
def test_pass_is_tested_before_regression(low: float, high: float, verdict: str) -> None:
    assert arithmetic.decide(low, high, 0.05) == verdict


# ---------------------------------------------------------------- one number per launch


def test_disturbed_samples_do_not_count_when_enough_are_left() -> None:
    one = launch([1.0] * 20 + [9.0] * 30, (0,) * 20 + (1,) * 30)
    assert launches.statistic_for([one]) == "median"
    assert launches.number(one, "median", "lower") == 1.0


def test_with_too_few_undisturbed_samples_the_best_tenth_counts() -> None:
    one = launch(range(1, 102), (1,) * 101)
    assert launches.statistic_for([one]) == "best tenth"
    assert launches.number(one, "best tenth", "lower") == 11.0
    assert launches.number(one, "best tenth", "higher") == 91.0


def test_both_sides_use_the_same_statistic() -> None:
    """A median against a 10 % quantile would call one program two."""
    values = list(np.linspace(1, 2, 100))
    counted, uncounted = launch(values, (0,) * 100), launch(values)
    said = gate.compare(file(measurement(counted)), file(measurement(uncounted)))
    assert said.findings[0].ratio == pytest.approx(1.0)


# ---------------------------------------------------------------- single launches


def test_a_single_launch_is_at_most_suspect() -> None:
    said = gate.compare(of(1.0), of(1.5))
    assert (said.verdict, gate.exit_status(said)) == ("suspect", 3)
    finding = said.findings[0]
    assert finding.ratio == pytest.approx(1.5)
    assert finding.interval is not None
    assert finding.interval[0] > 1
    assert "within launches" in finding.reason
    assert "6 launch pairs" in finding.reason


@pytest.mark.parametrize("values", [(1.0, 1.0), (1.0, 1.04), (1.0, 0.5)])
def test_a_single_launch_never_passes_and_never_improves(values: tuple[float, float]) -> None:
    said = gate.compare(of(values[0]), of(values[1]))
    assert (said.verdict, gate.exit_status(said)) == ("inconclusive", 3)


def test_five_launches_are_still_too_few() -> None:
    assert gate.compare(of(*spread(1.0, n=5)), of(*spread(2.0, n=5))).verdict == "suspect"
    assert gate.compare(of(*spread(1.0, n=9)), of(*spread(2.0, n=5))).verdict == "suspect"


def test_a_bandwidth_that_falls_is_suspect_too() -> None:
    sides = [file(measurement(quiet(v), unit="B/s", better="higher")) for v in (2e10, 1e10)]
    assert gate.compare(sides[0], sides[1]).verdict == "suspect"
    assert gate.compare(sides[1], sides[0]).verdict == "inconclusive"


def test_a_jump_that_its_own_scatter_covers_is_not_suspect() -> None:
    rng = np.random.default_rng(2)
    sides = [file(measurement(launch(scale * rng.lognormal(0, 1.0, 25), (0,) * 25))) for scale in (1.0, 1.1)]
    said = gate.compare(sides[0], sides[1])
    assert said.verdict == "inconclusive"


# ---------------------------------------------------------------- properties

levels = st.lists(st.floats(0.5, 2.0), min_size=1, max_size=9)
MIRROR = {"regression": "improved", "improved": "regression"}


@settings(deadline=None, max_examples=60)
@given(levels, levels, st.sampled_from(["lower", "higher"]))
def test_swapping_the_sides_inverts_the_ratio_and_the_decision(a: list[float], b: list[float], better: Literal["lower", "higher"]) -> None:
    one, two = (file(measurement(*map(quiet, values), better=better)) for values in (a, b))
    there, back = gate.compare(one, two).findings[0], gate.compare(two, one).findings[0]
    assert there.ratio is not None
    assert back.ratio == pytest.approx(1 / there.ratio)
    if min(len(a), len(b)) >= arithmetic.ENOUGH_LAUNCHES:
        assert there.interval is not None
        assert back.interval == pytest.approx((1 / there.interval[1], 1 / there.interval[0]))
        for said, swapped in itertools.permutations((there.verdict, back.verdict)):
            if said in MIRROR:
                assert swapped == MIRROR[said]
    else:
        assert not (there.verdict == "suspect" and back.verdict == "suspect")


@settings(deadline=None, max_examples=60)
@given(levels)
def test_a_file_beside_itself_is_never_a_regression(values: list[float]) -> None:
    said = gate.compare(of(*values), of(*values))
    assert said.verdict in {"pass", "inconclusive"}
    assert said.findings[0].ratio == pytest.approx(1.0)
    if len(values) < arithmetic.ENOUGH_LAUNCHES:
        assert said.verdict == "inconclusive"


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.5, 2.0), min_size=6, max_size=8), st.lists(st.floats(0.5, 2.0), min_size=6, max_size=8), st.floats(1e-6, 1e6))
def test_the_unit_does_not_matter(a: list[float], b: list[float], scale: float) -> None:
    seconds = gate.compare(of(*a), of(*b)).findings[0]
    other = gate.compare(of(*(scale * v for v in a)), of(*(scale * v for v in b))).findings[0]
    assert other.verdict == seconds.verdict
    assert other.ratio == pytest.approx(seconds.ratio)


# ---------------------------------------------------------------- what must not be compared


@pytest.mark.parametrize(
    ("base", "cand", "named"),
    [
        ({"cpu_model": "EPYC"}, {"cpu_model": "Xeon"}, "cpu_model: EPYC -> Xeon"),
        ({"torch": None}, {"torch": "2.13"}, "torch: unknown -> 2.13"),
        ({"gpu": "H100"}, {}, "gpu: H100 -> unknown"),
    ],
)
def test_another_machine_gets_no_verdict(base: dict[str, Scalar], cand: dict[str, Scalar], named: str) -> None:
    one = measurement(quiet(1.0))
    said = gate.compare(file(one, hard=base), file(one, hard=cand))
    assert (said.verdict, gate.exit_status(said)) == ("not_comparable", 4)
    assert said.fingerprint_differences == (named,)
    assert said.findings == ()


def test_what_nobody_knows_is_only_noted() -> None:
    one = measurement(quiet(1.0))
    hard: dict[str, Scalar] = {"cpu_model": "EPYC", "power_limit_w": None}
    said = gate.compare(
        file(one, hard=hard, soft={"governor": "powersave", "load": 0.1}),
        file(one, hard=hard, soft={"governor": "performance", "load": 0.9}),
    )
    assert said.verdict == "inconclusive"
    assert any("power_limit_w" in reason for reason in said.reasons)
    assert any("governor powersave -> performance" in reason for reason in said.reasons)
    assert not any("load" in reason for reason in said.reasons)


@pytest.mark.parametrize("changes", [{"unit": "ms"}, {"better": "higher"}])
def test_another_unit_or_direction_is_not_comparable(changes: dict[str, Any]) -> None:
    said = gate.compare(file(measurement(quiet(1.0))), file(measurement(quiet(1.0), **changes)))
    assert (said.verdict, gate.exit_status(said)) == ("not_comparable", 4)
    assert said.findings[0].ratio is None


def test_other_parameters_are_another_metric() -> None:
    said = gate.compare(file(measurement(quiet(1.0))), file(measurement(quiet(9.0), parameters={"batch": 16})))
    assert {f.verdict for f in said.findings} == {"inconclusive", "not_comparable"}
    assert all(f.ratio is None for f in said.findings)


def test_a_metric_that_is_gone_is_inconclusive_and_a_new_one_does_no_harm() -> None:
    kept = measurement(*map(quiet, spread(1.0)))
    other = measurement(*map(quiet, spread(1.0)), name="prefill")
    gone, new = gate.compare(file(kept, other), file(kept)), gate.compare(file(kept), file(kept, other))
    assert (gone.verdict, new.verdict) == ("inconclusive", "pass")
    assert any("missing from the candidate: prefill" in r for r in gone.reasons)
    assert any("only in the candidate: prefill" in r for r in new.reasons)


def test_a_metric_skipped_in_the_candidate_is_gone_and_says_why() -> None:
    kept = measurement(*map(quiet, spread(1.0)))
    other = dataclasses.replace(kept, name="fp8")
    skipped = dataclasses.replace(other, launches=(), skipped="no GPU")
    assert "no GPU" in gate.compare(file(kept, other), file(kept, skipped)).findings[1].reason
    assert len(gate.compare(file(kept, skipped), file(kept, skipped)).findings) == 1


def test_nothing_in_common_is_not_comparable() -> None:
    assert gate.compare(file(), file()).verdict == "not_comparable"
    assert gate.compare(file(), file(measurement(quiet(1.0)))).verdict == "not_comparable"


@pytest.mark.parametrize("broken", [launch([0.0, 1.0]), launch([-1.0]), launch([])])
def test_values_without_a_ratio_are_not_comparable(broken: Launch) -> None:
    said = gate.compare(file(measurement(quiet(1.0))), file(measurement(broken)))
    assert said.verdict == "not_comparable"


def test_one_regression_outweighs_everything() -> None:
    good, bad = (measurement(*map(quiet, spread(1.0)), name=name) for name in ("good", "bad"))
    slow = measurement(*map(quiet, spread(1.3)), name="bad")
    fast = measurement(*map(quiet, spread(0.7)), name="good")
    said = gate.compare(file(good, bad), file(fast, slow))
    assert said.verdict == "regression"
    assert said.reasons[0] == "1 regression, 1 improved"


def test_the_same_metric_twice_in_a_file_is_refused() -> None:
    with pytest.raises(BadInput, match="twice"):
        gate.compare(file(measurement(quiet(1.0)), measurement(quiet(1.0))), of(1.0))


@pytest.mark.parametrize("tolerance", [0.0, -0.1, 1.0, math.nan])
def test_a_tolerance_that_cannot_be_is_refused(tolerance: float) -> None:
    with pytest.raises(BadInput, match="tolerance"):
        gate.compare(of(1.0), of(1.0), tolerance=tolerance)


def test_a_verdict_becomes_markdown_and_text() -> None:
    from mlsys_bench.report import content, markdown

    said = gate.compare(of(1.0), of(1.5))
    envelope = dataclasses.replace(head(), kind="verdict")
    text = markdown.render([("verdict.json", envelope, said)])
    assert "## Gate: suspect" in text
    assert "+50.0 %" in text
    assert content.describe(said)[0].tone == "unsure"


# ---------------------------------------------------------------- recorded launches of a real machine


@pytest.fixture(scope="module")
def recorded() -> dict[tuple[str, str], Launch]:
    """Each launch by session and arm: A, A2, A3 the same program, B20 truly 20 % slower."""
    if not RECORDED.exists():
        pytest.skip(f"{RECORDED} is not here: recorded launches lie beside the checkout, not in it")
    rounds: dict[tuple[str, str], list[Round]] = collections.defaultdict(list)
    for line in RECORDED.read_text().splitlines():
        session, _, arm, _, _, samples = line.split(",")
        walls, cpus, switches = zip(*(map(int, sample.split(":")) for sample in samples.split()), strict=True)
        one = Round(values=tuple(w * 1e-6 for w in walls), cpu_s=tuple(c * 1e-6 for c in cpus), involuntary=switches)
        rounds[session, arm].append(one)
    return {key: Launch(started_s=0.0, rounds=tuple(of)) for key, of in rounds.items()}


def sessions(recorded: dict[tuple[str, str], Launch]) -> list[str]:
    return sorted({session for session, _ in recorded}, key=int)


def singles(recorded: dict[tuple[str, str], Launch], pairs: list[tuple[str, str]]) -> list[Verdict]:
    return [
        gate.compare(file(measurement(recorded[s, a])), file(measurement(recorded[s, b]))) for s in sessions(recorded) for a, b in pairs
    ]


def test_recorded_single_launches_are_never_passed_nor_failed(recorded: dict[tuple[str, str], Launch]) -> None:
    """The same program is rarely suspect (at most one in ten); a true +20 % always is."""
    same = singles(recorded, [("A", "A2"), ("A", "A3"), ("A2", "A3")])
    slower = singles(recorded, [("A", "B20"), ("A2", "B20"), ("A3", "B20")])
    assert {v.verdict for v in (*same, *slower)} <= {"suspect", "inconclusive"}
    assert sum(v.verdict == "suspect" for v in same) <= 0.1 * len(same)
    assert all(v.verdict == "suspect" for v in slower)


@pytest.mark.parametrize(
    ("arm", "verdicts"),
    [("A2", {"pass", "inconclusive"}), ("A3", {"pass", "inconclusive"}), ("B10", {"regression"}), ("B20", {"regression"})],
)
def test_recorded_sessions_taken_as_launches_are_decided_rightly(
    recorded: dict[tuple[str, str], Launch], arm: str, verdicts: set[str]
) -> None:
    base, cand = (file(measurement(*(recorded[s, a] for s in sessions(recorded)))) for a in ("A", arm))
    assert gate.compare(base, cand).verdict in verdicts
