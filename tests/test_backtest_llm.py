"""backtest llm: rows kept and filled, results never looked at, rows that were learned from judged apart, peers beside."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mlsys_bench import predict, record
from mlsys_bench.backtests import Backtest, Errors
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import backtest_llm
from mlsys_bench.predict.experiment import Experiment, Prediction
from mlsys_bench.report import content, markdown
from mlsys_bench.types import Machine, Provenance

CLOSED = (
    "model,system,backend,backend_version,precision,mode,isl,osl,tp,pp,attention_dp_size,moe_tp_size,moe_ep_size,concurrency,"
    "ttft_ms,tpot_ms\n"
)
QWEN = "Qwen/Qwen3-32B,{gpu},vllm,0.12,,agg,1024,128,{tp},1,,1,1,{users},{ttft},{tpot}\n"
BLIS = (
    "set,experiment,stage,model,gpu,tp,dp,precision,engine,max_num_batched_tokens,max_num_seqs,workload,system_prompt_len,question_len,"
    "output_len,arrivals,multi_turn_shared_prefix,rate_rps,e2e_mean_ms,itl_mean_ms,note\n"
)
STAGE = (
    "s,6-codegen,{stage},meta-llama/Llama-2-70b-hf,H100,4,1,FP16,vllm-0.15.1,2048,128,codegen,100,466,247,constant,11x4,{rate},{e2e},10,"
    '"a, b"\n'
)

pytestmark = pytest.mark.usefixtures("known_physics")


@pytest.fixture
def known_physics(monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """Give the journey a law that is easily checked, 10 ms a token and a millisecond per user, and return what it was taught."""
    taught: list[Experiment] = []

    def learn(experiments: Sequence[Experiment], **_: object) -> float:
        taught.extend(experiments)
        return 0.010

    def said(e: Experiment, tpot_s: float) -> Prediction:
        assert not e.measured, "a predictor must not see what it is asked for"
        tpot = tpot_s + 0.001 * (e.concurrency or e.rate_per_s or 0)
        e2e = tpot * e.output_tokens.mean
        points = {"tpot_mean_s": tpot, "itl_mean_s": tpot, "ttft_mean_s": 0.1, "e2e_mean_s": e2e}
        return Prediction(
            key=e.key,
            figures={name: (v, v / 1.2, v * 1.2) for name, v in points.items()},
            provenance=Provenance.ROOFLINE,
            notes=("by law",),
        )

    monkeypatch.setattr(predict, "learn", learn, raising=False)
    monkeypatch.setattr(predict, "as_found", lambda experiments, knowledge, **_: (said(e, knowledge) for e in experiments))
    return taught


def file(tmp_path: Path, text: str, name: str = "table.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def run(*files: Path, calibrate: Sequence[Path] = (), out: Path | None = None) -> Backtest:
    return backtest_llm.llm(files, calibrate=calibrate, out=out, quiet=True)


def qwen(users: int, ttft: object = 100, tpot: object = 20, gpu: str = "h100_sxm", tp: int = 2) -> str:
    return QWEN.format(users=users, ttft=ttft, tpot=tpot, gpu=gpu, tp=tp)


def errors(result: Backtest, split: str, value: str, column: str) -> Errors:
    (found,) = [e for e in result.errors if (e.split, e.value, e.column) == (split, value, column)]
    return found


# ---------------------------------------------------------------- the table


def test_input_columns_are_kept_as_they_stand_and_the_predictions_added(tmp_path: Path) -> None:
    run(file(tmp_path, BLIS + STAGE.format(stage=0, rate=5, e2e=3700)), out=tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as written:
        (row,) = csv.DictReader(written)
    assert row["note"] == "a, b"
    assert list(row)[: len(BLIS.split(","))] == BLIS.strip().split(",")
    assert float(row["predicted_itl_mean_ms"]) == pytest.approx(15.0)
    assert (float(row["low_itl_mean_ms"]), float(row["high_itl_mean_ms"])) == (pytest.approx(12.5), pytest.approx(18.0))
    assert row["predicted_e2e_p99_ms"] == ""  # the predictor has no such figure, and nothing is invented
    assert row["provenance"] == "roofline"


def test_results_are_not_needed_and_never_looked_at(tmp_path: Path) -> None:
    said = []
    for i, tpot in enumerate(("20", "9999", "")):
        result = run(file(tmp_path, CLOSED + qwen(8, tpot=tpot) + qwen(64, tpot=tpot), f"{i}.csv"))
        said.append([p["predicted_tpot_ms"] for p in result.predictions])
    assert said[0] == said[1] == said[2] == [pytest.approx(18.0), pytest.approx(74.0)]


def test_what_was_predicted_before_a_ctrl_c_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = predict.as_found

    def interrupted(asked: Sequence[Experiment], knowledge: predict.Knowledge, **_: object) -> Iterator[Prediction]:
        yield next(iter(every(asked, knowledge)))
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "as_found", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(file(tmp_path, CLOSED + qwen(8) + qwen(64)), out=tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as written:
        first, second = csv.DictReader(written)
    assert float(first["predicted_tpot_ms"]) == pytest.approx(18.0)
    assert first["provenance"] == "roofline"
    assert second["predicted_tpot_ms"] == ""
    assert second["provenance"] == "not predicted: interrupted before this row"


def test_a_table_counts_once(tmp_path: Path) -> None:
    table = file(tmp_path, CLOSED + qwen(8))
    with pytest.raises(BadInput, match=r"table\.csv is named twice; its rows would count double"):
        run(table, tmp_path / "." / "table.csv")


def test_a_summary_is_the_mixture_of_its_stages(tmp_path: Path) -> None:
    rows = [STAGE.format(stage=s, rate=r, e2e=4000) for s, r in (("0", "5"), ("1", "10"), ("summary", "5+10"))]
    result = run(file(tmp_path, BLIS + "".join(rows)))
    first, second, both = (float(p["predicted_e2e_mean_ms"] or 0) for p in result.predictions)
    assert both == pytest.approx((first + 2 * second) / 3)
    assert errors(result, "all", "all", "e2e_mean_ms").rows == 2  # the summary repeats its stages


def test_a_row_that_cannot_be_predicted_stays_and_says_why(tmp_path: Path) -> None:
    result = run(file(tmp_path, CLOSED + qwen(8) + qwen(8, gpu="h900")), out=tmp_path / "out.csv")
    assert (result.rows, result.answered) == (2, 1)
    (reason,) = result.unanswered
    assert "unknown GPU or CPU 'h900'" in reason
    with (tmp_path / "out.csv").open(newline="") as written:
        last = list(csv.DictReader(written))[-1]
    assert last["provenance"].startswith("not predicted: unknown GPU")
    assert last["predicted_tpot_ms"] == ""


def test_several_tables_are_written_each_to_its_own_file(tmp_path: Path) -> None:
    one, two = file(tmp_path, CLOSED + qwen(8), "one.csv"), file(tmp_path, BLIS + STAGE.format(stage=0, rate=5, e2e=1), "two.csv")
    run(one, two, out=tmp_path / "out.csv")
    assert (tmp_path / "out-one.csv").exists()
    assert (tmp_path / "out-two.csv").exists()
    assert not (tmp_path / "out.csv").exists()


def test_a_result_named_json_is_a_record(tmp_path: Path) -> None:
    result = run(file(tmp_path, CLOSED + qwen(8)), out=tmp_path / "out.json")
    assert record.read(tmp_path / "out.json", Backtest) == result


# ---------------------------------------------------------------- errors


def test_errors_by_hand(tmp_path: Path) -> None:
    """18 and 74 ms predicted where 20 and 74 were measured: 10 % and 0."""
    found = errors(run(file(tmp_path, CLOSED + qwen(8, tpot=20) + qwen(64, tpot=74))), "all", "all", "tpot_ms")
    assert (found.rows, found.groups) == (2, 1)
    assert (found.mape, found.bias) == (pytest.approx(0.05), pytest.approx(-0.05))
    assert found.mape_interval is None  # one sweep is one experiment
    assert found.coverage == 1.0


def test_errors_are_split_by_gpu_model_and_engine(tmp_path: Path) -> None:
    other = qwen(8).replace("Qwen/Qwen3-32B", "meta-llama/Llama-3.1-70B").replace("vllm", "sglang")
    result = run(file(tmp_path, CLOSED + qwen(8) + qwen(8, gpu="b200_sxm") + other))
    values = {split: {e.value for e in result.errors if e.split == split} for split in ("gpu", "model", "engine")}
    assert values["gpu"] == {"H100-SXM", "B200-SXM"}
    assert values["model"] == {"qwen3-32b", "llama-3.1-70b"}
    assert values["engine"] == {"vllm", "sglang"}


def test_rows_that_were_learned_from_are_judged_apart(tmp_path: Path, known_physics: list[Experiment]) -> None:
    """Of four rows one is in the calibration, one shares its layout, one its model: no figure but its own holds the first."""
    asked = file(tmp_path, CLOSED + qwen(8, tpot=18) + qwen(64, tpot=37) + qwen(64, tpot=37, tp=4) + qwen(64, tpot=37, gpu="b200_sxm"))
    known = file(tmp_path, CLOSED + qwen(8, tpot=18), "known.csv")
    result = run(asked, calibrate=[known])
    assert [e.concurrency for e in known_physics] == [8]
    assert known_physics[0].measured["tpot_mean_s"] == pytest.approx(0.018)
    seen = {e.value: e.rows for e in result.errors if e.split == "seen" and e.column == "tpot_ms"}
    assert seen == {"itself": 1, "layout": 1, "model and gpu": 1, "model": 1}
    assert errors(result, "all", "all", "tpot_ms").rows == 3
    assert errors(result, "all", "all", "tpot_ms").mape == pytest.approx(1.0)
    assert any("themselves learned from" in note for note in result.notes)


def test_a_calibration_without_results_is_refused(tmp_path: Path) -> None:
    empty = file(tmp_path, CLOSED + qwen(8, "", ""), "empty.csv")
    with pytest.raises(BadInput, match="holds no measured row to learn from"):
        run(file(tmp_path, CLOSED + qwen(8)), calibrate=[empty])


def test_other_simulators_are_compared_on_the_rows_they_predict(tmp_path: Path) -> None:
    head = "set,source,simulator,experiment,stage,metric,predicted_ms,actual_ms,ape_pct\n"
    file(tmp_path, head + "s,x,vidur,6-codegen,0,itl_mean,20,10,100\n", "simulator_predictions.csv")
    result = run(file(tmp_path, BLIS + STAGE.format(stage=0, rate=5, e2e=3700) + STAGE.format(stage=1, rate=10, e2e=3700)))
    theirs, ours, rows = errors(result, "all", "all", "itl_mean_ms").peers["vidur"]
    assert (theirs, ours, rows) == (pytest.approx(1.0), pytest.approx(0.5), 1)
    assert errors(result, "all", "all", "e2e_mean_ms").peers == {}


def test_a_broken_file_of_others_is_refused_by_line(tmp_path: Path) -> None:
    file(tmp_path, "set,simulator,experiment,stage,metric,predicted_ms\ns,vidur,x,0,itl_mean,fast\n", "simulator_predictions.csv")
    with pytest.raises(BadInput, match=r"simulator_predictions.csv: line 2"):
        run(file(tmp_path, BLIS + STAGE.format(stage=0, rate=5, e2e=3700)))


# ---------------------------------------------------------------- the report


def test_a_reader_finds_errors_by_gpu_and_what_was_not_predicted(tmp_path: Path) -> None:
    result = run(file(tmp_path, CLOSED + qwen(8) + qwen(8, gpu="b200_sxm") + qwen(8, gpu="h900")))
    (section,) = content.describe(result)
    assert section.lead == "2 of 3 rows predicted."
    titles = [table.title for table in section.tables]
    assert titles[:2] == ["all rows", "by GPU"]
    assert any("h900" in line for _, lines in section.notes for line in lines)
    text = markdown.render([("b", record.envelope(result, Machine(hard={}, soft={})), result)])
    assert "H100-SXM" in text
    assert "10" in text


def test_without_results_it_says_that_nothing_is_compared(tmp_path: Path) -> None:
    (section,) = content.describe(run(file(tmp_path, CLOSED + qwen(8, "", ""))))
    assert section.lead == "1 of 1 row predicted; the tables give no results to compare them with."
    assert section.tables == ()
