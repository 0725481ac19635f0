"""backtest plan: replicas that follow from predictions beside those that measurements show to be needed."""

from __future__ import annotations

import csv
import dataclasses
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlsys_bench import record
from mlsys_bench.backtests import Backtest
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import backtest_plan
from mlsys_bench.predict import Experiment, Prediction, sized, tables
from mlsys_bench.predict.sized import FLEET, Answer
from mlsys_bench.types import Lengths, Provenance
from mlsys_cli.main import app

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "llm"
OPEN = Experiment(
    key="a:2",
    group="a",
    model="llama-3-8b",
    device="H100-SXM",
    prompt_tokens=Lengths(mean=500),
    output_tokens=Lengths(mean=101),
    rate_per_s=8.0,
)
CLOSED = dataclasses.replace(OPEN, rate_per_s=None, concurrency=16, requests=160)
LAW = 0.5  # latency grows with the square root of load


def predicted(e: Experiment, slower: float = 1.0, spread: float = 1.0) -> dict[str, Prediction]:
    """Return predictions of a law: TPOT 10 ms at the run's own load, TTFT ten times that, both with the square root of load."""
    found = {}
    for question in sized.questions(e):
        times = slower * (sized.load(question) / sized.load(e)) ** LAW
        figures = {
            f"{name}_mean_s": (v * times, v * times / spread, v * times * spread)
            for name, v in (("tpot", 0.01), ("ttft", 0.1), ("e2e", 1.1))
        }
        found[question.key] = Prediction(key=question.key, figures=figures, provenance=Provenance.ROOFLINE)
    return found


def answered(e: Experiment, found: dict[str, Prediction]) -> dict[str, Answer]:
    return {answer.limit: answer for answer in sized.answers(e, found)}


MEASURED = {"ttft_mean_s": 0.1, "tpot_mean_s": 0.01, "e2e_mean_s": 1.1}


def test_a_prediction_that_is_right_plans_the_replicas_needed() -> None:
    e = dataclasses.replace(OPEN, measured=MEASURED)
    for answer in answered(e, predicted(e)).values():
        assert answer.rate_per_s == pytest.approx((8.0, 8.0, 8.0))
        assert answer.replicas == pytest.approx((FLEET, FLEET, FLEET))
        assert answer.rented == (FLEET, FLEET)


def test_a_latency_foreseen_too_long_plans_too_many_replicas_by_its_slope() -> None:
    """20 % too slow, latency going with the square root of load: 1 / 1.2^2 of the load, 14.4 replicas, so 15."""
    e = dataclasses.replace(OPEN, measured=MEASURED)
    found = answered(e, predicted(e, slower=1.2))["tpot"]
    assert found.replicas is not None
    assert found.replicas[0] == pytest.approx(FLEET * 1.44)
    assert found.rented == (15, 15)


def test_users_of_a_closed_loop_count_by_the_requests_they_make() -> None:
    """By Little's law 16 users at 1.1 s make 14.5 requests/s; 10 % too slow, they are 13.2 users at the same 1.1 s."""
    e = dataclasses.replace(CLOSED, measured=MEASURED)
    found = answered(e, predicted(e, slower=1.1))["e2e"]
    assert found.measured_per_s == pytest.approx(16 / 1.1)
    assert found.rate_per_s[0] == pytest.approx(16 / 1.1**2 / 1.1)
    assert found.replicas is not None
    assert found.replicas[0] == pytest.approx(FLEET * 1.21)


def test_the_latency_of_a_closed_loop_is_made_up_of_its_parts() -> None:
    e = dataclasses.replace(CLOSED, measured={"ttft_mean_s": 0.1, "tpot_mean_s": 0.01})
    assert answered(e, predicted(e))["e2e"].limit_s == pytest.approx(0.1 + 100 * 0.01)


@given(st.floats(0.5, 2.0), st.floats(1.0, 1.3))
def test_the_interval_of_replicas_holds_the_plan(slower: float, spread: float) -> None:
    """And it is that of the latency, by the slope: at most a factor of four either way."""
    e = dataclasses.replace(OPEN, measured=MEASURED)
    found = answered(e, predicted(e, slower=slower, spread=spread))["tpot"]
    assert found.replicas is not None
    point, low, high = found.replicas
    assert low <= point * (1 + 1e-9)
    assert point <= high * (1 + 1e-9)
    assert math.isclose(high, FLEET * min((slower * spread) ** 2, 4.0), rel_tol=0.02) or slower * spread < 0.5


def test_how_much_latency_depends_on_load_is_told() -> None:
    e = dataclasses.replace(OPEN, measured=MEASURED)
    assert answered(e, predicted(e))["tpot"].steepness == "over 2 %"
    flat = {key: dataclasses.replace(p, figures=dict.fromkeys(p.figures, (0.01, 0.01, 0.01))) for key, p in predicted(e).items()}
    assert answered(e, flat)["tpot"].steepness == "under 0.5 %"


def test_a_run_without_a_load_is_asked_for_its_highest_rate() -> None:
    e = dataclasses.replace(OPEN, rate_per_s=None, slo=(("tpot_p99_s", 0.2),), measured={"max_rate_per_s": 90.0})
    assert [q.key for q in sized.questions(e)] == ["a:2"]
    found = {"a:2": Prediction(key="a:2", figures={"max_rate_per_s": (100.0, 80.0, 125.0)}, provenance=Provenance.ROOFLINE)}
    answer = answered(e, found)[sized.RATE]
    assert answer.replicas == pytest.approx((9.0, 7.2, 11.25))
    assert answer.rented == (9, 12)


def test_fleets_are_counted_by_hand() -> None:
    """Of 8, 9, 10 and 15 replicas rented where 10 are needed, two are within one, two keep the limit; upper ends are 2 more each."""
    fleets = [Answer(limit="e2e", limit_s=1.0, rate_per_s=(10 / n, 10 / (n + 2), 10 / n), measured_per_s=1.0) for n in (8, 9, 10, 15)]
    found = sized.summary(fleets)
    assert (found.rows, found.within, found.kept, found.safe) == (4, 2, 2, 4)
    assert (found.size, found.safe_size) == pytest.approx((0.95, 1.15))


# ---------------------------------------------------------------- the command

COLUMNS = (
    "model,system,backend,backend_version,precision,mode,isl,osl,tp,pp,attention_dp_size,"
    "moe_tp_size,moe_ep_size,concurrency,ttft_ms,tpot_ms"
)
LEVELS = (1, 4, 16, 64)


def closed_loop(path: Path, is_measured: bool = True, systems: tuple[str, ...] = ("h100_sxm", "h200_sxm")) -> Path:
    """Write a sweep of two GPUs, with figures made up for this test."""
    rows = [
        f"meta-llama/Meta-Llama-3.1-8B,{system},vllm,0.10.0,,agg,1024,128,1,1,1,1,1,{users},"
        + (f"{60 + 4 * users},{6 + 0.12 * users:.3f}" if is_measured else ",")
        for system in systems
        for users in LEVELS
    ]
    path.write_text("\n".join([COLUMNS, *rows]) + "\n")
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_of_closed_loops_is_planned_row_by_row(tmp_path: Path) -> None:
    path, out = closed_loop(tmp_path / "runs.csv"), tmp_path / "plans.csv"
    said = CliRunner().invoke(app, ["backtest", "plan", str(path), "-o", str(out)])
    assert said.exit_code == 0, said.output
    assert "Back-test of plans" in said.output
    rows = read(out)
    assert [list(r.values())[:16] for r in rows] == [line.split(",") for line in path.read_text().splitlines()[1:]]
    for row in rows:
        for limit in ("e2e", "tpot", "ttft"):
            low, point, high = (float(row[f"{end}_{limit}_replicas_of_10"]) for end in ("low", "predicted", "high"))
            assert low <= point <= high
        users, e2e_s = int(row["concurrency"]), float(row["ttft_ms"]) / 1000 + 127 * float(row["tpot_ms"]) / 1000
        assert float(row["measured_e2e_rate_per_s"]) == pytest.approx(users / e2e_s, rel=1e-5)
        assert float(row["e2e_limit_ms"]) == pytest.approx(1000 * e2e_s, rel=1e-5)
        assert row["provenance"] in ("roofline", "assumed", "calibrated")


def test_scores_and_choices_are_in_the_record(tmp_path: Path) -> None:
    found = backtest_plan.plan([closed_loop(tmp_path / "runs.csv")], calibrate=[], out=tmp_path / "b.json", quiet=True)
    assert found == record.read(tmp_path / "b.json", Backtest)
    assert {s.limit for s in found.sizing if s.split == "all"} == {"e2e", "tpot", "ttft"}
    assert all(s.rows == 2 * len(LEVELS) for s in found.sizing if s.split == "all")
    assert sum(s.rows for s in found.sizing if s.split == "gpu" and s.limit == "e2e") == 2 * len(LEVELS)
    (choice,) = found.choosing
    assert (choice.table, choice.options) == ("runs.csv", 2 * len(LEVELS))
    assert choice.median >= 0


def test_rows_that_were_learned_from_are_judged_apart(tmp_path: Path) -> None:
    path = closed_loop(tmp_path / "runs.csv", systems=("h100_sxm",))
    found = backtest_plan.plan([path], calibrate=[path], out=None, quiet=True)
    assert {s.split for s in found.sizing} == {"seen"}
    assert {s.value for s in found.sizing} == {"itself"}


def test_without_results_there_are_predictions_and_no_plans(tmp_path: Path) -> None:
    """Nothing says what the limit is; the figures at the row's own load are what one system can promise."""
    path, out = closed_loop(tmp_path / "runs.csv", is_measured=False), tmp_path / "plans.csv"
    found = backtest_plan.plan([path], calibrate=[], out=out, quiet=True)
    rows = read(out)
    assert (found.answered, found.sizing, found.choosing) == (len(rows), (), ())
    for row in rows:
        assert float(row["low_tpot_ms"]) <= float(row["predicted_tpot_ms"]) <= float(row["high_tpot_ms"])
        assert row["predicted_e2e_replicas_of_10"] == row["e2e_limit_ms"] == ""


def test_a_table_of_highest_rates_has_rates_and_no_latency_limits(tmp_path: Path) -> None:
    head = "round,division,submitter,system,accelerator,acc_per_node,nodes,framework,model,scenario,valid,samples_per_s"
    row = "v4.1,closed,Someone,1xH100,NVIDIA H100-SXM-80GB,8,1,TensorRT 10.2.0,gptj-99,Offline,VALID,{}"
    for name, rate in (("given", "200"), ("asked", "")):
        path = tmp_path / f"{name}.csv"
        path.write_text(f"{head}\n{row.format(rate)}\n")
        out = tmp_path / f"{name}-out.csv"
        found = backtest_plan.plan([path], calibrate=[], out=out, quiet=True)
        (filled,) = read(out)
        carried = float(filled["predicted_own_rate_per_s"])
        assert float(filled["low_own_rate_per_s"]) < carried < float(filled["high_own_rate_per_s"])
        assert [s.rows for s in found.sizing if s.split == "all"] == ([1] if rate else [])
        if rate:
            assert float(filled["predicted_own_replicas_of_10"]) == pytest.approx(FLEET * 200 / carried, rel=1e-5)


def test_a_table_of_no_known_kind_and_an_empty_calibration_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadInput, match="of no table known here"):
        backtest_plan.plan([tmp_path / "other.csv"], calibrate=[], out=None, quiet=True)
    empty = closed_loop(tmp_path / "empty.csv", is_measured=False)
    with pytest.raises(BadInput, match="holds no measured row"):
        backtest_plan.plan([empty], calibrate=[empty], out=None, quiet=True)


@pytest.mark.skipif(not DATA.is_dir(), reason="the measured tables are not beside this checkout")
def test_real_stages_are_planned_within_their_intervals() -> None:
    """BLIS: under limits as tight as what was measured, nine in ten intervals hold the replicas needed."""
    found = backtest_plan.plan([DATA / "blis_measured.csv"], calibrate=[], out=None, quiet=True)
    by_e2e = next(s for s in found.sizing if s.split == "all" and s.limit == "e2e")
    assert by_e2e.rows >= 30
    assert by_e2e.coverage_interval is not None
    assert by_e2e.coverage_interval[1] >= 0.9
    assert all(tables.read(DATA / "blis_measured.csv").rows[i].cells.items() <= row.items() for i, row in enumerate(found.predictions))
