"""Figures from other figures: the tail of a warm server, and a TTFT without the slow requests of a start."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from mlsys_bench.predict import ratios
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.types import Lengths, Provenance

WARM = Experiment(
    key="warm", group="warm", model="llama-3-8b", device="H100-SXM", prompt_tokens=Lengths(mean=500), output_tokens=Lengths(mean=101),
    rate_per_s=5.0, arrivals="constant",
)  # fmt: skip
ITL_S, TTFT_S = 0.010, 0.050
BASE_S = TTFT_S + 100 * ITL_S


def measured(e: Experiment, *, slow: float = 0.0, **e2e: float) -> Experiment:
    """Return a run with its figures: `slow` seconds that the first requests add to the mean TTFT, E2E figures over the base."""
    figures = {"itl_mean_s": ITL_S, "ttft_mean_s": TTFT_S + slow, "ttft_p90_s": 1.12 * TTFT_S}
    return replace(e, measured=figures | {f"e2e_{name}_s": value * BASE_S for name, value in e2e.items()})


def test_slow_first_requests_leave_the_mean_ttft_and_not_the_ninetieth_percentile() -> None:
    cold = replace(WARM, cold_start=True)
    rows = [*(measured(WARM) for _ in range(3)), measured(cold, slow=0.020), measured(cold), measured(WARM, slow=0.020)]
    assert [ttft for _, ttft in ratios.warm_times(rows)] == pytest.approx([TTFT_S] * 5 + [TTFT_S + 0.020])


def test_what_slow_first_requests_add_to_e2e_beyond_ttft_was_waited_for_between_tokens() -> None:
    """60 ms more in the mean E2E and its p90 as before: 20 ms of them were TTFT, 40 ms lie between 101 tokens.  A warm run keeps both."""
    cold = replace(WARM, cold_start=True)
    slow = 0.060 / BASE_S
    rows = [*(measured(WARM, mean=1.0, p90=1.02) for _ in range(3)), measured(cold, slow=0.020, mean=1 + slow, p90=1.02)]
    rows += [measured(cold, mean=1.0, p90=1.05), measured(replace(WARM, key="slow"), mean=1 + slow, p90=1.02)]
    itl = [further for further, _ in ratios.warm_times(rows)]
    assert itl == pytest.approx([ITL_S] * 3 + [ITL_S - 0.0004] + [ITL_S] * 2)
    assert ratios.without_start(rows)[3]["e2e_mean_s"] == pytest.approx(BASE_S)
    assert ratios.without_start(rows)[3]["ttft_mean_s"] == pytest.approx(TTFT_S)


def test_what_a_start_took_is_no_habit_of_the_model() -> None:
    """E2E over TTFT and tokens is learned from runs without their start: a cold row with 60 ms too much says what warm ones say."""
    cold = replace(WARM, cold_start=True)
    rows = [measured(replace(WARM, key=str(i), model="qwen3-14b"), mean=1 + 0.004 * (i % 2), p90=1.02) for i in range(9)]
    known = ratios.learn(
        [*rows, *(measured(replace(cold, key=f"cold {i}"), slow=0.060, mean=1 + 0.060 / BASE_S, p90=1.02) for i in range(3))]
    )
    assert ratios.ratio(WARM, "e2e_mean_s", known)[0] == pytest.approx(0.0, abs=0.006)


def test_what_poisson_arrivals_spread_says_nothing_of_a_start_under_even_ones() -> None:
    cold, poisson = replace(WARM, cold_start=True), replace(WARM, arrivals="poisson")
    wide = [replace(e, measured=e.measured | {"ttft_p90_s": 2 * TTFT_S}) for e in (measured(poisson, mean=1.0, p90=1.8) for _ in range(5))]
    assert ratios.warm_times([*wide, measured(cold, mean=1.0, p90=1.02)])[-1] == (ITL_S, TTFT_S)


@pytest.mark.parametrize(("output", "slow", "left"), [(1, 0.5, 1.0), (101, 0.9, 0.5), (101, 5.0, 0.5)])
def test_a_start_takes_at_most_half_of_a_time_per_token_and_nothing_where_there_is_none(output: float, slow: float, left: float) -> None:
    cold = replace(WARM, cold_start=True, output_tokens=Lengths(mean=output))
    rows = [*(measured(WARM, mean=1.0, p90=1.02) for _ in range(3)), measured(cold, mean=1 + slow, p90=1.02)]
    assert ratios.warm_times(rows)[-1][0] == pytest.approx(left * ITL_S)


def test_e2e_is_told_apart_only_where_it_is_known_what_of_it_is_ttft() -> None:
    cold = measured(replace(WARM, cold_start=True), slow=0.1, mean=1 + 0.1 / BASE_S, p90=1.02)
    cold.measured.pop("ttft_p90_s")
    rows = [*(measured(WARM, mean=1.0, p90=1.02) for _ in range(3)), cold]
    assert ratios.warm_times(rows)[-1] == (ITL_S, TTFT_S + 0.1)


def test_an_answer_of_one_token_ends_with_it() -> None:
    """No time per token, and E2E not below TTFT at any percentile."""
    found = ratios.complete(
        replace(WARM, output_tokens=Lengths(mean=1)), ratios.learn([]), (-4.6, 0.1), (-3.0, 0.3), Provenance.ROOFLINE
    ).figures
    assert not [name for name in found if name.startswith(("itl", "tpot"))]
    for stat in ("mean", "p50", "p90", "p95", "p99"):
        assert all(e2e >= ttft for e2e, ttft in zip(found[f"e2e_{stat}_s"], found[f"ttft_{stat}_s"], strict=True))


def test_a_median_e2e_has_the_habits_of_the_mean() -> None:
    """Answers that end 4 % early do so in the median too, where no median was measured; it stays below the 90th percentile."""
    known = ratios.learn([measured(replace(WARM, key=str(i)), mean=0.96, p90=0.98) for i in range(40)])
    for e in (WARM, replace(WARM, cold_start=True)):
        found = ratios.complete(e, known, (-4.6, 0.01), (-3.0, 0.01), Provenance.CALIBRATED).figures
        assert found["e2e_p50_s"] == pytest.approx(found["e2e_mean_s"])
        values = [found[f"e2e_{stat}_s"][0] for stat in ("p50", "p90", "p95", "p99")]
        assert values == sorted(values)


def test_few_rows_say_nothing_of_a_usual_start() -> None:
    cold = replace(WARM, cold_start=True)
    found = ratios.warm_times([measured(cold, slow=0.020, mean=1.1, p90=1.0), measured(cold)])
    assert found == [(ITL_S, TTFT_S + 0.020), (ITL_S, TTFT_S)]


def test_a_row_without_first_tokens_has_none() -> None:
    assert ratios.warm_times([WARM]) == [(None, None)]


def test_the_tail_of_a_warm_server_follows_from_the_percentile_that_cold_runs_share() -> None:
    """p90 4 % above the mean: p99 by a normal law is 2.3263 / 1.2816 times as far above, 7.3 %, whatever cold runs' own p99 was."""
    cold = [measured(replace(WARM, key=str(i), cold_start=True), mean=1.0, p90=1.04, p99=1.5) for i in range(200)]
    known = ratios.learn(cold)
    found = ratios.complete(WARM, known, (-4.6, 0.01), (-3.0, 0.01), Provenance.CALIBRATED).figures
    assert found["e2e_p90_s"][0] / found["e2e_mean_s"][0] == pytest.approx(1.04, rel=2e-3)
    assert found["e2e_p99_s"][0] / found["e2e_mean_s"][0] == pytest.approx(1.04 ** (2.3263 / 1.2816), rel=3e-3)
    starting = ratios.complete(replace(WARM, cold_start=True), known, (-4.6, 0.01), (-3.0, 0.01), Provenance.CALIBRATED).figures
    assert starting["e2e_p99_s"][0] / starting["e2e_mean_s"][0] == pytest.approx(1.5, rel=0.02)


def test_answers_that_end_early_are_a_habit_of_the_model() -> None:
    """One model's E2E is 4 % below TTFT and tokens, all others' is not: its runs on another GPU get most of that."""
    rows = [measured(replace(WARM, key=m, model=m), mean=1 + 0.005 * (i % 2)) for i, m in enumerate(("qwen3-14b", "mixtral-8x7b") * 20)]
    rows += [measured(replace(WARM, key=f"early {i}"), mean=0.96 + 0.005 * (i % 2)) for i in range(10)]
    known = ratios.learn(rows)
    early, usual = (ratios.ratio(replace(WARM, device="L40S", model=m), "e2e_mean_s", known)[0] for m in ("llama-3-8b", "qwen3-14b"))
    assert early < usual - 0.02


def test_no_time_per_token_is_below_reading_the_weights_whatever_was_learned() -> None:
    """llama-3-8b in 16 bit is 15 GB read per token, 4.48 ms at 3.35 TB/s; three accepted drafts are four tokens for one reading."""
    known = ratios.learn([])
    figures = ratios.complete(WARM, known, (-9.0, 0.01), (-3.0, 0.01), Provenance.CALIBRATED).figures
    for name in ("tpot_mean_s", "tpot_p50_s", "itl_p50_s"):
        assert figures[name][:2] == pytest.approx((4.48e-3, 4.48e-3), rel=0.01)
    near = ratios.complete(WARM, known, (math.log(5e-3), 0.3), (-3.0, 0.01), Provenance.CALIBRATED).figures["tpot_mean_s"]
    assert near[:2] == pytest.approx((5e-3, 4.48e-3), rel=0.01)
    assert near[2] > 8e-3
    assert figures["e2e_mean_s"][0] > 100 * 4.4e-3
    drafted = ratios.complete(replace(WARM, speculative="mtp", draft_tokens=3), known, (-9.0, 0.01), (-3.0, 0.01), Provenance.CALIBRATED)
    assert drafted.figures["tpot_mean_s"][0] == pytest.approx(1.12e-3, rel=0.01)
