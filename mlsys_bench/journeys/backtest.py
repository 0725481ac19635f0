"""backtest queueing: every row of a truth table predicted on its own, and the errors where the table gives values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mlsys_bench import hardware, record, units, workers
from mlsys_bench.backtests import Backtest
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys.progress import Line
from mlsys_bench.journeys.truth import models, scores, table
from mlsys_bench.journeys.truth.models import Prediction
from mlsys_bench.queueing.answer import Effort
from mlsys_bench.queueing.des.runs import THREADS
from mlsys_bench.types import Scalar

NOT_REACHED = Prediction(None, None, "not answered: interrupted before this row", "")


def queueing(
    path: Path, *, out: Path | None, tolerance: str, budget: str, seed: int, quiet: bool = False, cluster: str | None = None
) -> Backtest:  # fmt: skip
    """Predict every row of a table and write it, with the predictions beside it, when asked; after a Ctrl-C what is done is kept.

    Rows about one system share one solution; nothing else passes from row to row.
    """
    questions = table.read(path)
    effort = Effort(tolerance=units.fraction(tolerance, "--tolerance"), budget_s=units.seconds(budget, "--budget"), seed=seed)
    if effort.budget_s <= 0:
        raise BadInput(f"--budget {budget}: a simulation needs some time")
    if out is not None:
        record.check_writable(out)
    answers = [NOT_REACHED] * len(questions.rows)
    try:
        _answer(questions, effort, answers, Line(quiet), cluster)
    finally:
        result = _result(path, questions, answers)
        if out is not None:
            _write(out, path, questions, result)
    return result


def _answer(questions: table.Table, effort: Effort, answers: list[Prediction], line: Line, cluster: str | None) -> None:
    """Fill in the answers, one system after another, or several at a time."""
    systems: dict[tuple[str, str], list[int]] = {}
    for i, row in enumerate(questions.rows):
        systems.setdefault((row["model"].strip(), row["parameters"].strip()), []).append(i)
    asked = [(*system, tuple(questions.rows[i]["quantity"].strip() for i in rows)) for system, rows in systems.items()]
    places = list(systems.values())
    try:
        with workers.hired(cluster, threads=THREADS) as crew:
            for at, found in workers.as_done(_solved, asked, shared=effort, executor=crew, told=line.counted("systems solved")):
                for i, prediction in zip(places[at], found, strict=True):
                    answers[i] = prediction
    finally:
        line.clear()


def _solved(effort: Effort, asked: tuple[str, str, tuple[str, ...]]) -> list[Prediction]:
    """Return the answers about one system."""
    model, parameters, quantities = asked
    return models.predict(model, parameters, list(quantities), effort)


def _result(path: Path, questions: table.Table, answers: list[Prediction]) -> Backtest:
    compared = [
        scores.compare(row, value, table.number(row, "precision_abs") or 0.0, answer.value)
        for row, answer in zip(questions.rows, answers, strict=True)
        if (value := table.number(row, "value")) is not None
    ]
    by_model, by_quantity = scores.scores(compared)
    return Backtest(
        table="queueing",
        source=str(path),
        rows=len(answers),
        answered=sum(answer.value is not None for answer in answers),
        by_model=by_model,
        scores=by_quantity,
        methods=dict(Counter(answer.name for answer in answers if answer.value is not None)),
        unanswered=dict(Counter(answer.method.removeprefix("not answered: ") for answer in answers if answer.value is None)),
        predictions=tuple(_filled(row, answer) for row, answer in zip(questions.rows, answers, strict=True)),
    )


def _filled(row: dict[str, str], answer: Prediction) -> dict[str, Scalar]:
    return {**row, "predicted": answer.value, "expected_error": answer.expected_error, "method": answer.method}


def _write(out: Path, source: Path, questions: table.Table, result: Backtest) -> None:
    """Write the predictions as a table; as a record where the file is named .json."""
    if out.suffix == ".json":
        record.write(out, result, hardware.machine(), [source])
        return
    record.write_csv(out, [*questions.columns, *table.ADDED], (list(row.values()) for row in result.predictions))
