"""Back-tests: a table of questions read, answered row by row, scored and written back."""

from __future__ import annotations

import csv
import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import record
from mlsys_bench.backtests import Backtest
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import backtest
from mlsys_bench.journeys.truth import known, models, scores, table
from mlsys_bench.journeys.truth.models import predict
from mlsys_bench.journeys.truth.parameters import Parameters
from mlsys_bench.queueing.answer import Effort
from mlsys_bench.report import content

TRUTH = Path(__file__).parents[2] / "shared" / "data" / "queueing" / "truth.csv"
QUICK = Effort(tolerance=math.inf, budget_s=0.3)  # formulas as they are: what simulation adds is tested where it is built
HEADER = "model,parameters,quantity,value,precision_abs,source\n"
MM1 = "M/M/c,c=1;rho=0.9;mean_service=1,wait_mean,9.0,1e-9,exact closed form\n"


def file(tmp_path: Path, text: str, name: str = "truth.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def run(path: Path, out: Path | None = None) -> Backtest:
    return backtest.queueing(path, out=out, tolerance="100%", budget="300ms", seed=0, quiet=True)


def one(model: str, parameters: str, quantity: str) -> float:
    (answer,) = predict(model, parameters, [quantity], QUICK)
    assert answer.value is not None, answer.method
    return answer.value


def refusal(model: str, parameters: str, quantity: str = "wait_mean") -> str:
    (answer,) = predict(model, parameters, [quantity], QUICK)
    assert (answer.value, answer.expected_error) == (None, None)
    return answer.method


# ---------------------------------------------------------------- the file


def test_input_columns_are_kept_as_they_stand_and_three_are_added(tmp_path: Path) -> None:
    """Order, spelling, quotes and a column nobody knows come back unchanged, whatever is in them."""
    head = "note,quantity,model,parameters,value\n"
    body = '"a, ""quoted"" note",wait_mean,M/M/c,c=1;rho=0.50;mean_service=1,1.000\n,wait_mean,M/M/c,c=1;rho=0.80,\n'
    run(file(tmp_path, head + body), tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as written:
        rows = list(csv.reader(written))
    assert rows[0] == ["note", "quantity", "model", "parameters", "value", "predicted", "expected_error", "method"]
    assert rows[1][:5] == ['a, "quoted" note', "wait_mean", "M/M/c", "c=1;rho=0.50;mean_service=1", "1.000"]
    assert [float(row[5]) for row in rows[1:]] == pytest.approx([1.0, 4.0])
    assert all(row[7].startswith("M/M/c: ") for row in rows[1:])


def test_values_are_not_needed_and_never_looked_at(tmp_path: Path) -> None:
    """The same predictions with true values, wrong values and none: nothing passes from the file's answers to ours."""
    rows = [f"M/M/c,c={c};rho=0.8,{q}" for c in (1, 4) for q in ("wait_mean", "sojourn_p99")]
    said = []
    for i, values in enumerate((["4.0"] * 4, ["-17"] * 4, [""] * 4)):
        text = "model,parameters,quantity,value\n" + "".join(f"{row},{value}\n" for row, value in zip(rows, values, strict=True))
        said.append([p["predicted"] for p in run(file(tmp_path, text, f"{i}.csv")).predictions])
    assert said[0] == said[1] == said[2]


def test_rows_do_not_depend_on_each_other(tmp_path: Path) -> None:
    """Alone, reversed or among the others, a row has the same answer."""
    rows = [f"M/M/c,c={c};rho={rho},{q}\n" for c, rho, q in itertools.product((1, 7), (0.5, 0.95), ("wait_p99", "sojourn_mean"))]
    head = "model,parameters,quantity\n"
    together = [p["predicted"] for p in run(file(tmp_path, head + "".join(rows))).predictions]
    reverse = [p["predicted"] for p in run(file(tmp_path, head + "".join(reversed(rows)))).predictions]
    alone = [run(file(tmp_path, head + row)).predictions[0]["predicted"] for row in rows]
    assert together == reverse[::-1] == alone


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (HEADER, "no rows"),
        ("model,quantity\nM/M/c,wait_mean\n", "line 1: column parameters is missing"),
        ("model,parameters,quantity,model\na,b,c,d\n", "line 1: column 'model' stands there twice"),
        ("model,parameters,quantity,predicted\na,b,c,d\n", "line 1: column predicted would be overwritten"),
        (HEADER + MM1 + "M/M/c,c=1,wait_mean\n", "line 3: has 3 fields where the header has 6 columns"),
        (HEADER + MM1 + MM1.replace("9.0", "nine"), "line 3, column value: 'nine' is no finite number"),
        (HEADER + MM1.replace("1e-9", "nan"), "line 2, column precision_abs: 'nan'"),
        (HEADER + MM1.replace("wait_mean", ""), "line 2, column quantity: is empty"),
        (HEADER + MM1 + 'M/M/c,"c=1', "line 3: is not CSV"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused_by_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadInput) as caught:
        table.read(file(tmp_path, text))
    assert says in str(caught.value)
    assert "truth.csv: " in str(caught.value)


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    """A quoted field may span lines; the line named is the one the bad row starts on."""
    spanning = 'M/M/c,"c=1;\nrho=0.5",wait_mean,,,\n'
    with pytest.raises(BadInput, match="line 4, column value"):
        table.read(file(tmp_path, HEADER + spanning + MM1.replace("9.0", "x")))


def test_bytes_that_are_no_text_name_their_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.csv"
    path.write_bytes(HEADER.encode() + MM1.encode() + "M/M/c,é".encode("latin-1"))
    with pytest.raises(BadInput, match="line 3: is not text in UTF-8"):
        table.read(path)


def test_what_was_answered_before_a_ctrl_c_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted_at_two(model: str, parameters: str, quantities: list[str], effort: Effort) -> list[models.Prediction]:
        if "c=2" in parameters:
            raise KeyboardInterrupt
        return predict(model, parameters, quantities, effort)

    monkeypatch.setattr(models, "predict", interrupted_at_two)
    text = HEADER + MM1 + MM1.replace("c=1", "c=2") + MM1.replace("c=1", "c=3")
    with pytest.raises(KeyboardInterrupt):
        run(file(tmp_path, text), tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as written:
        rows = list(csv.DictReader(written))
    assert [bool(row["predicted"]) for row in rows] == [True, False, False]
    assert rows[1]["method"] == rows[2]["method"] == "not answered: interrupted before this row"


def test_a_result_named_json_is_a_record(tmp_path: Path) -> None:
    result = run(file(tmp_path, HEADER + MM1), tmp_path / "out.json")
    assert record.read(tmp_path / "out.json", Backtest) == result


# ---------------------------------------------------------------- rows that cannot be answered


@pytest.mark.parametrize(
    ("model", "parameters", "says"),
    [
        ("M/X/c", "c=1;rho=0.5", "unknown model 'M/X/c'; did you mean"),
        ("M/M/c", "rho=0.5", "parameter c is missing"),
        ("M/M/c", "c=1", "the load is missing"),
        ("M/M/c", "c=two;rho=0.5", "parameter c='two' is no number"),
        ("M/M/c", "c=2.5;rho=0.5", "parameter c=2.5 must be a whole number"),
        ("M/M/c", "c=2;rho=-0.5", "parameter rho=-0.5 must be above 0"),
        ("M/M/c", "c=2;rho=0.5;c=3", "parameter c is given twice"),
        ("M/M/c", "c=2;rho=0.5;patience=3", "unknown parameter 'patience'"),
        ("M/M/c", "c=2;rho=0.5;service=det", "contradicts the M of the model's name"),
        ("M/M/c", "c=2;rho=0.5;a=1.5", "parameter a=1.5 contradicts the others, which make it 1"),
        ("M/G/1", "c=2;rho=0.5;service=det", "parameter c=2 contradicts"),
        ("M/G/c", "c=2;rho=0.5", "parameter service is missing"),
        ("M/G/c", "c=2;rho=0.5;service=gama:4", "parameter service"),
        ("MMPP/M/c", "c=2;l0=0.5;q01=1;q10=1", "at least two"),
        ("MMPP/M/c", "c=2;l0=0.5;l1=1;q01=1;q10=1;rho=0.9", "rho=0.9 contradicts"),
        ("LB", "N=4;rho=0.5;policy=jqs", "unknown policy 'jqs'; did you mean jsq"),
        ("TANDEM M/M/1", "lambda=1;mu=2|x", "stage 'x'"),
        ("LLM-BD", "max_batch=2;iter=alpha+beta*n*n;alpha=1;beta=1;tokens=2;lambda=0.1", "another model"),
        ("LLM", "max_batch=4;kv_tokens=9;prompt=300;output=det,mean 1", "is not of the form"),
    ],
)
def test_a_row_without_an_answer_says_why(model: str, parameters: str, says: str) -> None:
    assert refusal(model, parameters).startswith("not answered: ")
    assert says in refusal(model, parameters)


def test_an_unknown_quantity_names_its_neighbours() -> None:
    assert "unknown quantity 'wait_p9'; did you mean" in refusal("M/M/c", "c=2;rho=0.5", "wait_p9")


def test_an_unstable_row_says_its_utilisation_and_is_not_stable() -> None:
    said = refusal("M/M/c", "c=4;rho=1.2")
    assert "overload: utilisation is 1.20 with 4 server(s)" in said
    assert "5 would do" in said
    assert one("M/M/c", "c=4;rho=1.2", "stable") == 0.0
    assert one("M/M/c", "c=4;rho=0.9", "stable") == 1.0


def test_a_bad_row_costs_no_other_row(tmp_path: Path) -> None:
    result = run(file(tmp_path, HEADER + MM1.replace("c=1", "c=0") + MM1))
    assert [p["predicted"] is not None for p in result.predictions] == [False, True]
    assert (result.rows, result.answered) == (2, 1)
    assert list(result.unanswered.values()) == [1]


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(("percent", "share"), [("50", 0.5), ("99", 0.99), ("99.9", 0.999), ("999", 0.999), ("9999", 0.9999)])
def test_percentiles_are_read_as_they_are_spoken(percent: str, share: float) -> None:
    assert known.share_of(percent) == pytest.approx(share)


def test_the_load_may_be_given_in_three_ways() -> None:
    assert one("M/M/c", "c=4;rho=0.9;mean_service=2", "wait_p99") == one("M/M/c", "c=4;a=3.6;mean_service=2", "wait_p99")
    assert one("M/M/c", "c=4;lambda=1.8;mean_service=2", "wait_p99") == one("M/M/c", "c=4;a=3.6;mean_service=2", "wait_p99")


def test_a_number_in_the_name_is_the_number_of_servers() -> None:
    assert one("M/M/3", "rho=0.8", "wait_mean") == one("M/M/c", "c=3;rho=0.8", "wait_mean")


def test_parameters_that_spell_the_model_out_are_no_obstacle() -> None:
    p = Parameters("iter=alpha + beta*n;c=3;")
    p.spells_out("iter", "alpha+beta*n")
    assert p.whole("c") == 3
    p.all_read()


# ---------------------------------------------------------------- scores


def row(model: str, quantity: str, parameters: str = "c=1;rho=0.8", source: str = "simulation C") -> dict[str, str]:
    return {"model": model, "parameters": parameters, "quantity": quantity, "source": source}


def test_the_bar_of_a_row_follows_from_its_kind() -> None:
    """Exact 1e-4; simulated 2 %; general laws by their larger SCV; and 1.5 half-widths are always allowed."""
    station = "c=4;rho=0.8;arrival=exp;service={}"
    assert scores.allowance(row("M/M/c", "wait_mean", source="exact closed form"), 1e-9) == (1e-4, pytest.approx(1.5e-9))
    assert scores.allowance(row("LB", "wait_mean"), 0.2) == (0.02, pytest.approx(0.3))
    for law, bar in (("unif", 0.02), ("logn:1", 0.02), ("logn:4", 0.05), ("gamma:10", 0.10)):
        assert scores.allowance(row("M/G/c", "wait_mean", station.format(law)), 0.0) == (bar, 0.0)
    assert scores.allowance(row("GI/G/c", "wait_mean", "c=4;arrival=gamma:4;service=logn:1"), 0.0)[0] == 0.05
    assert scores.allowance(row("M/G/1", "wait_mean", station.format("gamma:4"), source="exact PK"), 1e-12)[0] == 1e-4


def test_a_wait_that_is_hardly_any_is_compared_in_service_times() -> None:
    small = row("M/G/c", "wait_p50", "c=4;rho=0.8;mean_service=10;service=unif")
    miss = scores.compare(small, 0.05, 0.0, 0.15)  # 1 % of a service time off, where 2 % are allowed
    assert (miss.error, miss.of_bar) == (pytest.approx(0.01), pytest.approx(0.5))
    assert scores.compare(small, 1.0, 0.0, 1.1).error == pytest.approx(0.1)  # a tenth of a service time is a wait
    exact = row("M/M/c", "wait_p50", source="exact")
    assert scores.compare(exact, 0.0, 0.0, 0.5e-9).of_bar == pytest.approx(0.5)  # 1e-9 absolute is allowed of an exact 0
    mean = scores.compare({**small, "quantity": "wait_mean"}, 0.05, 0.0, 0.15)
    assert mean.error == pytest.approx(2.0)


def test_scores_by_hand(tmp_path: Path) -> None:
    """M/M/1 at 0.9 waits 9: given 9, 9.0018 (2e-4 off, beyond 1e-4) and one row without an answer."""
    text = HEADER + MM1 + MM1.replace("9.0,", "9.0018,") + MM1.replace("c=1", "c=x")
    result = run(file(tmp_path, text))
    (by_model,), (by_quantity,) = result.by_model, result.scores
    assert (by_quantity.model, by_quantity.quantity, by_model.quantity) == ("M/M/c", "wait_mean", None)
    assert (by_quantity.rows, by_quantity.answered, by_quantity.within) == (3, 2, 1)
    assert by_quantity.worst_error == pytest.approx(0.0018 / 9.0018, rel=1e-6)
    assert by_quantity.median_error == pytest.approx(0.0009 / 9.0018, rel=1e-6)
    assert by_quantity.worst_of_bar == pytest.approx(2.0, rel=1e-3)
    assert by_quantity.bars == (1e-4, 1e-4)


@given(st.floats(1e-3, 1e3), st.floats(0, 1e3))
def test_an_exact_prediction_is_never_a_miss_and_errors_are_not_negative(value: float, predicted: float) -> None:
    this = row("M/M/c", "sojourn_mean", source="exact")
    right, other = scores.compare(this, value, 0.0, value), scores.compare(this, value, 0.0, predicted)
    assert (right.error, right.of_bar) == (0.0, 0.0)
    assert other.error is not None
    assert other.error >= 0


def test_the_report_says_what_is_outside_its_bar(tmp_path: Path) -> None:
    text = HEADER + MM1 + MM1.replace("9.0,", "10.0,")
    (section,) = content.describe(run(file(tmp_path, text)))
    assert section.lead == "2 of 2 rows answered; 1 of 2 with a value are within their bar (50.0 %)."
    assert [t.title for t in section.tables] == ["by model", "by model and quantity"]
    assert ("Furthest outside their bars", ("M/M/c wait_mean at c=1;rho=0.9;mean_service=1: 1,000 times its bar",)) in section.notes


def test_without_values_there_is_nothing_to_score(tmp_path: Path) -> None:
    result = run(file(tmp_path, "model,parameters,quantity\nM/M/c,c=1;rho=0.5,wait_mean\n"))
    (section,) = content.describe(result)
    assert (result.scores, result.by_model) == ((), ())
    assert "gives no values" in section.lead
    assert section.tables == ()
