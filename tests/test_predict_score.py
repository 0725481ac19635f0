"""Scores of predictions, decisions by prediction, and what is held out: known answers and what must always be true."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench import hardware, models, stats
from mlsys_bench.predict import holdout, regret, score
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.predict.regret import Option
from mlsys_bench.predict.score import Judged
from mlsys_bench.types import Lengths

PROOFS = Path(__file__).parent.parent / "proofs"


def row(measured: float, predicted: float, low: float = 0.0, high: float = 1e9, group: str = "g", **tags: str) -> Judged:
    return Judged(figure="itl_mean_ms", measured=measured, predicted=predicted, low=low, high=high, group=group, tags=tags)


# ---------------------------------------------------------------- errors


def test_errors_by_hand() -> None:
    """Off by +10 %, -20 % and 0: mean 10 %, median 10 %, bias -3.3 %."""
    found = score.summary([row(10, 11, group="a"), row(10, 8, group="b"), row(10, 10, group="c")])
    assert (found.rows, found.groups) == (3, 3)
    assert found.mape == pytest.approx(0.1)
    assert found.median == pytest.approx(0.1)
    assert found.p90 == pytest.approx(0.18)
    assert found.bias == pytest.approx(-0.1 / 3)


def test_the_interval_of_the_mean_error_is_drawn_over_groups() -> None:
    """Copies of one experiment are no further evidence; a single experiment has no interval at all."""
    two = [row(10, 10, group="a"), row(10, 12, group="b")]
    copied = [*two[:1] * 50, *two[1:] * 50]
    assert score.summary(two).mape_interval == pytest.approx((0.0, 0.2))
    assert score.summary(copied).mape_interval == pytest.approx((0.0, 0.2))
    assert score.summary(two[:1] * 20).mape_interval is None


def test_coverage_counts_experiments_not_rows() -> None:
    """One experiment of 9 covered rows, one of a single row that is missed: half, and Wilson with two trials."""
    rows = [*[row(10, 10, 9, 11, group="a")] * 9, row(10, 20, 15, 25, group="b")]
    found = score.summary(rows)
    assert found.coverage == pytest.approx(0.5)
    assert found.coverage_interval == stats.wilson(1, 2)


@pytest.mark.parametrize(
    ("measured", "low", "high", "expected"),
    [(10, 9, 12, 0.3), (10, 11, 12, 0.1 + 20 * 0.1), (10, 5, 9, 0.4 + 20 * 0.1), (10, 10, 10, 0.0)],
)
def test_the_interval_score_by_hand(measured: float, low: float, high: float, expected: float) -> None:
    """Width over the weight, and 2 / 0.1 = 20 times what it misses by."""
    assert score.interval_score(measured, low, high, 10) == pytest.approx(expected)


@pytest.mark.parametrize("sd", [0.3, 1.0])
def test_the_interval_score_is_least_at_the_true_quantiles(sd: float) -> None:
    """Proper: on 20,000 draws no shifted, widened or narrowed interval earns less than the true 5th to 95th percentile.

    Over the measurement, which no prediction knows, an interval that lies sd^2 lower in the logarithm would earn less.
    """
    draws = np.random.default_rng(3).lognormal(0.0, sd, 20_000)
    low, high = (float(np.quantile(draws, q)) for q in (0.05, 0.95))

    def earned(low: float, high: float, *, over_measured: bool = False) -> float:
        return float(np.mean([score.interval_score(d, low, high, d if over_measured else 1.0) for d in draws]))

    best = earned(low, high)
    for factor_low, factor_high in ((0.9, 1.0), (1.1, 1.0), (1.0, 0.9), (1.0, 1.1), (0.8, 1.2)):
        assert earned(low * factor_low, high * factor_high) > best
    lower = math.exp(-(sd**2))
    assert earned(low * lower, high * lower, over_measured=True) < 0.97 * earned(low, high, over_measured=True)


def test_a_constant_band_is_scored_beside() -> None:
    """Both rows off by 10 %: the band of ± 10 % just holds them and costs its width."""
    rows = [row(11, 10, 9, 12, group="a"), row(9, 10, 9, 12, group="b")]
    found = score.summary(rows)
    assert found.mape == pytest.approx((1 / 11 + 1 / 9) / 2)
    width, best = score.best_band(rows)
    assert width == pytest.approx(0.1)
    assert best == pytest.approx(2 / 10)


def test_a_split_keeps_every_row_once() -> None:
    rows = [row(1, 1, gpu="H100"), row(1, 1, gpu="L40S"), row(1, 1, gpu="H100")]
    parts = score.split(rows, "gpu")
    assert {name: len(part) for name, part in parts.items()} == {"H100": 2, "L40S": 1}


# ---------------------------------------------------------------- decisions


def option(layout: str, cost: float, ttft: float, tpot: float, seen: tuple[float, float, float] | None = None) -> Option:
    """Return a configuration of so many dollars per million tokens; `seen` is the predicted (cost, TTFT, TPOT)."""
    said = seen or (cost, ttft, tpot)
    return Option(
        group="g", layout=layout, usd_per_h=3.6e-3, ttft_s=ttft, tpot_s=tpot, tokens_per_s=1 / cost,
        predicted_ttft_s=said[1], predicted_tpot_s=said[2], predicted_tokens_per_s=1 / said[0],
    )  # fmt: skip


def test_dollars_per_million_tokens_by_hand() -> None:
    """3.60 dollars an hour at 1,000 tokens per second: a dollar per million."""
    o = option("a", 1.0, 1, 1)
    assert o.cost == pytest.approx(1.0)
    hourly = Option(
        group="g", layout="a", usd_per_h=3.6, ttft_s=1, tpot_s=1, tokens_per_s=1000, predicted_ttft_s=1, predicted_tpot_s=1,
        predicted_tokens_per_s=500,
    )  # fmt: skip
    assert (hourly.cost, hourly.predicted_cost) == (pytest.approx(1.0), pytest.approx(2.0))


def test_a_dearer_choice_costs_its_surcharge() -> None:
    """The cheap layout is predicted to miss, so the dear one is taken: 50 % more."""
    cheap = option("cheap", 2.0, 0.5, 0.02, seen=(2.0, 0.5, 0.2))
    dear = option("dear", 3.0, 0.5, 0.02)
    decision = regret.decide([cheap, dear], 1.0, 0.05)
    assert decision is not None
    assert (decision.regret, decision.misses) == (pytest.approx(0.5), 0)


def test_a_choice_that_misses_is_scaled_out_and_pays_for_it() -> None:
    """Promised to meet the limit at 16 users, it does at 8 only, which costs 3 instead of 2; the best would have been 2.5."""
    chosen = [option("a", 2.0, 5.0, 0.02, seen=(2.0, 0.5, 0.02)), option("a", 3.0, 0.5, 0.02)]
    decision = regret.decide([*chosen, option("b", 2.5, 0.5, 0.02)], 1.0, 0.05)
    assert decision is not None
    assert (decision.regret, decision.misses) == (pytest.approx(0.2), 1)


def test_a_layout_that_never_meets_the_limits_is_given_up() -> None:
    """Two layouts are promised and neither holds at any load; the third is paid."""
    hopeless = [option(name, 1.0, 9.0, 0.02, seen=(1.0, 0.5, 0.02)) for name in ("a", "b") for _ in range(2)]
    decision = regret.decide([*hopeless, option("c", 4.0, 0.5, 0.02, seen=(4.0, 2.0, 0.02))], 1.0, 0.05)
    assert decision is not None
    assert (decision.regret, decision.misses) == (0.0, 2)


def test_a_choice_weighs_what_a_miss_would_come_to() -> None:
    """Cheap and at the limit (a coin's toss, else 10 x 1.2) or sure at 4: 6.5 expected against 4.  Where a miss comes to 3 x 1.2: 2.3."""
    sure = replace(option("sure", 4.0, 0.5, 0.02), users=8)
    risky = replace(option("a", 1.0, 5.0, 0.02, seen=(1.0, 1.0, 0.02)), users=16, ttft_sd=0.2, first_share=0.0)
    for fallback, wanted in ((10.0, (0.0, 0)), (3.0, (0.0, 1))):
        safe = replace(option("a", fallback, 0.1, 0.02), users=4)
        decision = regret.decide([risky, safe, sure], 1.0, 0.05)
        assert decision is not None
        assert (decision.regret, decision.misses) == (pytest.approx(wanted[0]), wanted[1])


def test_errors_of_one_layout_are_mostly_common() -> None:
    """Correlation of two options' logs: `TOGETHER` within a layout, 0 between layouts; the sd is the predicted one."""
    drawn = [regret.possible([replace(option(n, 1.0, 0.5, 0.02), ttft_sd=0.3) for n in "aab"], seed=i) for i in range(40)]
    logs = np.log(np.concatenate([p.ttft_s for p in drawn]) / 0.5)
    found = np.corrcoef(logs.T)
    assert np.std(logs, axis=0) == pytest.approx([0.3] * 3, rel=0.05)
    assert found[0, 1] == pytest.approx(regret.TOGETHER, abs=0.05)
    assert abs(found[0, 2]) < 0.06


def test_repeats_of_a_run_are_one_configuration() -> None:
    """Nobody can choose the faster of two repeats: they count as one, of their geometric mean."""
    runs = [replace(option("a", 1.0, ttft, 0.02), users=8) for ttft in (0.4, 0.9)] + [replace(option("a", 1.0, 0.5, 0.02), users=16)]
    found = regret.configurations(runs)
    assert [o.users for o in found] == [8, 16]
    assert found[0].ttft_s == pytest.approx(0.6)


def test_an_slo_that_nothing_meets_asks_nothing() -> None:
    assert regret.decide([option("a", 1.0, 5.0, 0.1)], 1.0, 0.05) is None


options = st.lists(
    st.tuples(
        st.sampled_from("abc"), st.floats(0.1, 10), st.floats(0.01, 5), st.floats(0.001, 0.2),
        st.tuples(st.floats(0.1, 10), st.floats(0.01, 5), st.floats(0.001, 0.2)),
    ),
    min_size=2, max_size=8,
)  # fmt: skip


@given(drawn=options)
def test_perfect_predictions_have_no_regret_and_no_misses(
    drawn: list[tuple[str, float, float, float, tuple[float, float, float]]],
) -> None:
    made = regret.decisions([option(*o[:4]) for o in drawn], slos=5)
    assert all(d.regret == pytest.approx(0.0) and d.misses == 0 for d in made)


@given(drawn=options)
def test_no_decision_is_cheaper_than_the_best(drawn: list[tuple[str, float, float, float, tuple[float, float, float]]]) -> None:
    made = regret.decisions([option(*o[:4], seen=o[4]) for o in drawn], slos=5)
    assert all(d.regret >= -1e-12 for d in made)
    assert made == regret.decisions([option(*o[:4], seen=o[4]) for o in drawn], slos=5)  # the same SLOs again


def test_the_regret_of_many_decisions() -> None:
    made = [regret.Decision(group=g, ttft_limit_s=1, tpot_limit_s=1, regret=r, misses=m) for g, r, m in (("a", 0.0, 0), ("b", 0.2, 1))]
    found = regret.summary(made, options=4)
    assert (found.groups, found.decisions, found.median, found.missed) == (2, 2, pytest.approx(0.1), 0.5)
    assert found.median_interval == (0.0, pytest.approx(0.2))


# ---------------------------------------------------------------- held out


def run(key: str, group: str, concurrency: int, model: str = "m", **measured: float) -> Experiment:
    lengths = Lengths(mean=100)
    return Experiment(
        key=key,
        group=group,
        model=model,
        device="d",
        prompt_tokens=lengths,
        output_tokens=lengths,
        concurrency=concurrency,
        measured=measured,
    )


def test_a_group_is_never_on_both_sides() -> None:
    """A run listed for two models leaves with either."""
    rows = [run("1", "a", 4, "x"), run("2", "a", 4, "y"), run("3", "b", 4, "y"), run("4", "c", 4, "z")]
    for train, test in holdout.leave_one_out(rows, lambda e: e.model).values():
        assert not {e.group for e in train} & {e.group for e in test}
    train, test = holdout.leave_one_out(rows, lambda e: e.model)["x"]
    assert ([e.key for e in train], [e.key for e in test]) == (["3", "4"], ["1"])


@settings(max_examples=50)
@given(levels=st.lists(st.lists(st.integers(1, 9), max_size=7), max_size=4))
def test_each_interior_concurrency_is_left_out_once_and_its_repeats_with_it(levels: list[list[int]]) -> None:
    rows = [run(f"{g}.{i}", f"g{g}", c) for g, sweep in enumerate(levels) for i, c in enumerate(sweep)]
    inner = {e.key for e in rows for sweep in [levels[int(e.group[1:])]] if min(sweep) < (e.concurrency or 0) < max(sweep)}
    tested = [e.key for _, test in holdout.interior(rows) for e in test]
    assert sorted(tested) == sorted(inner)
    for train, test in holdout.interior(rows):
        assert not {(e.group, e.concurrency) for e in train} & {(e.group, e.concurrency) for e in test}
        assert len(train) + len(test) == len(rows)
        assert all(len({e.concurrency for e in test if e.group == g}) <= 1 for g in {e.group for e in test})


def test_more_folds_leave_fewer_out_at_once() -> None:
    rows = [run(f"{group}.{c}", group, c) for group in "abc" for c in (1, 2, 4, 8)]
    assert [[e.key for e in test] for _, test in holdout.interior(rows)] == [["a.2", "b.2", "c.2"], ["a.4", "b.4", "c.4"]]
    assert [[e.key for e in test] for _, test in holdout.interior(rows, 4)] == [["a.2", "c.2"], ["a.4", "c.4"], ["b.2"], ["b.4"]]
    assert len(holdout.interior(rows, 99)) == 6


def test_the_first_point_of_each_layout_is_given_and_the_others_are_asked() -> None:
    rows = [run("1", "a", 4, "x"), run("2", "a", 8, "x"), run("3", "b", 4, "y")]
    points, rest = holdout.first_points(rows, lambda e: e.model)
    assert ([e.key for e in points], [e.key for e in rest]) == (["1", "3"], ["2"])


# ---------------------------------------------------------------- the baseline of the proof


@pytest.fixture(scope="module")
def toy() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_toy", PROOFS / "_toy.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["_toy"] = module
    spec.loader.exec_module(module)
    return module


def served(model: str, users: int, tp: int) -> Experiment:
    return Experiment(
        key=f"{model} {users} {tp}", group=model, model=model, device="H100-SXM", tp=tp, concurrency=users,
        prompt_tokens=Lengths(mean=512), output_tokens=Lengths(mean=256),
    )  # fmt: skip


def test_the_toy_recovers_the_coefficients_its_data_were_made_with(toy: ModuleType) -> None:
    truth = toy.Toy((1.25, 1.5, 3e-5, 2e-5), 0.0)
    runs = [served(m, users, tp) for m in ("llama-3.1-8b", "llama-2-70b", "qwen3-14b") for users in (1, 8, 64, 256) for tp in (1, 4)]
    told = toy.predict(truth, runs)
    measured = [
        Experiment(
            key=e.key, group=e.group, model=e.model, device=e.device, tp=e.tp, concurrency=e.concurrency, prompt_tokens=e.prompt_tokens,
            output_tokens=e.output_tokens, measured={"tpot_mean_s": told[e.key].figures["tpot_mean_s"][0]},
        )
        for e in runs
    ]  # fmt: skip
    assert toy.learn(measured).coefficients == pytest.approx(truth.coefficients, rel=1e-6)


def test_the_toy_reads_the_weights_once_per_token(toy: ModuleType) -> None:
    """One user of a dense model at TP 1, memory alone: bytes of weights and of its context over the bandwidth."""
    e = served("llama-3.1-8b", 1, 1)
    a, gpu = models.find("llama-3.1-8b"), hardware.find("H100-SXM")
    expected = models.step_weight_bytes(a, "bf16", 3) + models.kv_bytes(a, "bf16", 640)
    found = toy.predict(toy.Toy((1.0, 0.0, 0.0, 0.0), 0.0), [e])[e.key].figures["tpot_mean_s"][0]
    assert found == pytest.approx(expected / gpu.bandwidth_bytes_per_s)
