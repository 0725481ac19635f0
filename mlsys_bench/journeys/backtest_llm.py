"""backtest llm: every row of tables of measured serving runs predicted, and the errors where the tables give results."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from mlsys_bench import hardware, predict, record, workers
from mlsys_bench.backtests import Backtest, Errors
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys.progress import Line
from mlsys_bench.predict import score, tables
from mlsys_bench.predict.score import Judged
from mlsys_bench.types import Provenance, Scalar

PEERS = "simulator_predictions.csv"  # beside a table: what other simulators predict for its rows
SPLITS = ("all", "gpu", "model", "engine")  # always printed
LEARNED = (
    "shipped coefficients were learned from published runs of BLIS, AIConfigurator and InferenceX: where these are among the rows, errors "
    "are of what was learned from (docs/predictions.md has those of rows left out)"
)
FURTHER_SPLITS = ("seen", "speculation", "serving")  # where the rows differ in them
ITSELF = "itself"
NOT_REACHED = "interrupted before this row"
DIGITS = 7  # of what is written: a prediction has fewer that mean something
SEEN = (ITSELF, "layout", "model and gpu", "model", "gpu", "nothing")

Peers = dict[tuple[str, str, str, str], dict[str, float]]  # (set, experiment, stage, metric) -> simulator -> milliseconds


def llm(
    files: Sequence[Path], *, calibrate: Sequence[Path], out: Path | None, quiet: bool = False, cluster: str | None = None
) -> Backtest:  # fmt: skip
    """Predict every row of the tables, after learning from those of `calibrate`, and write them with the predictions when asked."""
    check(files, out)
    read = tables.read_all([*files, *calibrate])
    asked = read[: len(files)]
    known = [e for table in read[len(files) :] for e in tables.calibration(table)]
    if calibrate and not known:
        raise BadInput(f"--calibrate {calibrate[0]}: holds no measured row to learn from")
    found: dict[str, predict.Prediction] = {}

    def judged() -> Backtest:
        result = judge(asked, known, found)
        for table, path in zip(asked, outputs(files, out), strict=False):
            _write(path, table, found, result, [*files, *calibrate])
        return result

    with kept(found, judged):
        everything = [e for table in asked for e in tables.experiments(table)]
        predicted(everything, known, found, Line(quiet), cluster)
    return judged()


@contextlib.contextmanager
def kept(found: dict[str, predict.Prediction], write: Callable[[], object]) -> Iterator[None]:
    """Have what was found written after a Ctrl-C, which goes on."""
    try:
        yield
    except KeyboardInterrupt:
        if found:
            write()
        raise


def predicted(
    everything: Sequence[predict.Experiment],
    known: Sequence[predict.Experiment],
    found: dict[str, predict.Prediction],
    line: Line,
    cluster: str | None,
) -> None:
    """Put the predictions into `found`, by key, after learning from what is known.

    Experiments that ask the same share a prediction, and no result is in sight.
    """
    same: dict[str, list[predict.Experiment]] = {}
    for e in everything:
        same.setdefault(repr(tables.question(e)), []).append(e)
    alike = {some[0].key: some for some in same.values()}
    try:
        with workers.hired(cluster) as crew:
            line.show(f"learning from {len(known):,} measured runs" if known else "reading what is known of the hardware")
            knowledge = predict.learn(known, executor=crew, told=line.counted("highest rates learned from"))
            line.show(f"predicting {len(alike):,} runs")
            blind = [replace(some[0], measured={}) for some in alike.values()]
            for prediction in predict.as_found(blind, knowledge, executor=crew, told=line.counted("highest rates found")):
                found.update((e.key, prediction) for e in alike[prediction.key])
    finally:
        line.clear()


def check(files: Sequence[Path], out: Path | None) -> None:
    """Raise BadInput for a table named twice, whose rows would count double, and for an output that cannot be written."""
    twice = [str(path) for i, path in enumerate(files) if path.resolve() in [other.resolve() for other in files[:i]]]
    if twice:
        raise BadInput(f"{twice[0]} is named twice; its rows would count double")
    for path in outputs(files, out):
        record.check_writable(path)


def outputs(files: Sequence[Path], out: Path | None) -> list[Path]:
    """Return where each table's predictions go: one file is named by --out, of several each bears its table's name after it."""
    if out is None:
        return []
    return [out] if len(files) == 1 or out.suffix == ".json" else [out.with_name(f"{out.stem}-{path.stem}{out.suffix}") for path in files]


def judge(
    asked: Sequence[tables.Table], known: Sequence[predict.Experiment], predictions: dict[str, predict.Prediction]
) -> Backtest:  # fmt: skip
    """Return every row with its predictions, and the errors of those that have results, split in several ways.

    Rows that were themselves learned from are judged apart, under `seen: itself`, and in no other figure.
    """
    judged = [j for table in asked for j in judgements(table, known, predictions)]
    rows = [(table, row) for table in asked for row in table.rows]
    answers = [tables.predicted(table, row, predictions) for table, row in rows]
    reasons = [why_not(row, predictions) for (_, row), answer in zip(rows, answers, strict=True) if not answer]
    provenances = [_provenance(row, predictions) for (_, row), answer in zip(rows, answers, strict=True) if answer]
    return Backtest(
        table="llm",
        source=", ".join(str(table.path) for table in asked),
        rows=len(rows),
        answered=sum(bool(answer) for answer in answers),
        methods=dict(Counter(provenances)),
        unanswered=dict(Counter(reasons)),
        predictions=tuple(_filled(table, row, predictions) for table, row in rows),
        errors=tuple(_errors(judged)),
        notes=tuple(_notes(asked, judged, predictions)),
    )


# ---------------------------------------------------------------- rows


def _filled(table: tables.Table, row: tables.Row, predictions: dict[str, predict.Prediction]) -> dict[str, Scalar]:
    """Return a row's own cells, then predicted, low and high of every result column, then the provenance."""
    answer = tables.predicted(table, row, predictions)
    added: dict[str, Scalar] = {}
    for column in table.format.results:
        figure = answer.get(column)
        for name, value in zip(("predicted", "low", "high"), figure or (None, None, None), strict=True):
            added[f"{name}_{column}"] = None if value is None else float(f"{value:.{DIGITS}g}")
    provenance = _provenance(row, predictions) if answer else f"not predicted: {why_not(row, predictions)}"
    return {**row.cells, **added, "provenance": provenance}


def why_not(row: tables.Row, predictions: dict[str, predict.Prediction]) -> str:
    """Return why a row has no prediction."""
    if any(e.key not in predictions for e, _ in row.parts):
        return NOT_REACHED
    return row.problem or "no figure of its columns"


def _provenance(row: tables.Row, predictions: dict[str, predict.Prediction]) -> str:
    order = list(Provenance)
    return max((predictions[e.key].provenance for e, _ in row.parts), key=order.index).value


def _write(
    path: Path, table: tables.Table, predictions: dict[str, predict.Prediction], result: Backtest, inputs: Sequence[Path]
) -> None:  # fmt: skip
    """Write a table with its predictions; the whole record where the file is named .json."""
    if path.suffix == ".json":
        record.write(path, result, hardware.machine(), inputs)
        return
    rows = [_filled(table, row, predictions) for row in table.rows]
    record.write_csv(path, rows[0], (list(row.values()) for row in rows))


# ---------------------------------------------------------------- judging


def seen_before(known: Sequence[predict.Experiment]) -> Callable[[predict.Experiment], str]:
    """Return what says how much of an experiment was among those learned from."""
    questions = {repr(tables.question(e)) for e in known}
    layouts = {e.layout for e in known}
    both, model, gpu = {(e.model, e.device) for e in known}, {e.model for e in known}, {e.device for e in known}

    def seen(e: predict.Experiment) -> str:
        checks = (
            repr(tables.question(e)) in questions,
            e.layout in layouts,
            (e.model, e.device) in both,
            e.model in model,
            e.device in gpu,
        )
        return next((name for name, found in zip(SEEN, checks, strict=False) if found), SEEN[-1])

    return seen


def judgements(
    table: tables.Table, known: Sequence[predict.Experiment], predictions: dict[str, predict.Prediction]
) -> list[Judged]:  # fmt: skip
    """Return each prediction of a table beside its result, tagged with what it may be split by and with what peers predict."""
    seen, peers, twice = seen_before(known), peers_beside(table.path), repeats(table)
    return [j for row in table.rows if row.line not in twice for j in _judged(table, row, predictions, seen, peers)]


def _judged(
    table: tables.Table,
    row: tables.Row,
    predictions: dict[str, predict.Prediction],
    seen: Callable[[predict.Experiment], str],
    peers: Peers,
) -> Iterable[Judged]:
    answer = tables.predicted(table, row, predictions) if row.measured else {}
    if not answer:
        return
    e = row.parts[0][0]
    tags = {
        "all": "all",
        "gpu": e.device,
        "model": e.model,
        "engine": e.engine,
        "seen": min((seen(part) for part, _ in row.parts), key=SEEN.index),
        "speculation": e.speculative or "none",
        "serving": "disaggregated" if e.disaggregated else "in one place",
    }
    for column, measured in row.measured.items():
        if column not in answer:
            continue
        own = peers.get(
            (row.cells.get("set", ""), row.cells.get("experiment", ""), row.cells.get("stage", ""), column.removesuffix("_ms")), {}
        )
        said = {f"peer {name}": repr(value) for name, value in own.items()}
        point, low, high = answer[column]
        yield Judged(figure=column, measured=measured, predicted=point, low=low, high=high, group=row.group, tags=tags | said)


def repeats(table: tables.Table) -> set[int]:
    """Return the lines that sum up stages with rows of their own: judged with them, a result would count twice."""
    stages = {row.cells.get("experiment") for row in table.rows if row.cells.get("stage") not in (None, "summary")}
    return {row.line for row in table.rows if row.cells.get("stage") == "summary" and row.cells.get("experiment") in stages}


def _errors(judged: Sequence[Judged]) -> Iterable[Errors]:
    """Yield the errors by split and column."""
    fresh = [j for j in judged if j.tags["seen"] != ITSELF]
    for tag in (*SPLITS, *FURTHER_SPLITS):
        parts = score.split(judged if tag == "seen" else fresh, tag)
        if tag in FURTHER_SPLITS and len(parts) < 2 and ITSELF not in parts:
            continue
        for value, part in parts.items():
            for figure in dict.fromkeys(j.figure for j in part):
                yield _one(tag, value, figure, [j for j in part if j.figure == figure])


def _one(tag: str, value: str, figure: str, judged: Sequence[Judged]) -> Errors:
    found = score.summary(judged)
    return Errors(
        split=tag, value=value, column=figure, rows=found.rows, groups=found.groups, mape=found.mape, mape_interval=found.mape_interval,
        median=found.median, p90=found.p90, bias=found.bias, coverage=found.coverage, coverage_interval=found.coverage_interval,
        interval_score=found.interval_score, band_score=found.band_score, peers=_peers(judged),
    )  # fmt: skip


def _peers(judged: Sequence[Judged]) -> dict[str, tuple[float, float, int]]:
    """Return the mean error of each peer over the rows that it predicts, ours over the same rows, and how many those are."""
    errors: dict[str, list[tuple[float, float]]] = {}
    for j in judged:
        for tag, value in j.tags.items():
            if tag.startswith("peer "):
                errors.setdefault(tag.removeprefix("peer "), []).append((abs(float(value) / j.measured - 1), abs(j.error)))
    return {name: (fmean(e[0] for e in both), fmean(e[1] for e in both), len(both)) for name, both in sorted(errors.items())}


def peers_beside(path: Path) -> Peers:
    """Return what other simulators predict for the rows of a table, out of the file beside it; empty where there is none."""
    beside = path.with_name(PEERS)
    if not beside.exists():
        return {}
    (_, columns), *lines = record.csv_lines(beside)
    found: Peers = {}
    for number, fields in lines:
        row = dict(zip(columns, fields, strict=False))
        try:
            key = row["set"], row["experiment"], row["stage"], row["metric"]
            found.setdefault(key, {})[_simulator(row)] = float(row["predicted_ms"])
        except (KeyError, ValueError) as error:
            raise BadInput(f"{beside}: line {number}: is no prediction of a simulator: {error}") from error
    return found


def _simulator(row: dict[str, str]) -> str:
    """Return a simulator's name; one that came in several versions has the version with it."""
    return f"{row['simulator']} {row['source']}" if row["simulator"] == "blis-evolved" else row["simulator"]


def _notes(asked: Sequence[tables.Table], judged: Sequence[Judged], predictions: dict[str, predict.Prediction]) -> Iterable[str]:
    itself = sum(j.tags["seen"] == ITSELF for j in judged)
    if itself:
        yield f"{itself:,} results belong to rows that were themselves learned from: they are judged apart, as 'seen: {ITSELF}'"
    elif judged:
        yield LEARNED
    counted = Counter(note for table in asked for row in table.rows for note in row.notes)
    counted.update(note for prediction in predictions.values() for note in prediction.notes)
    for note, rows in counted.most_common(12):
        yield f"{rows:,} x {note}" if rows > 1 else note
    if len(counted) > 12:
        yield f"and {len(counted) - 12} more kinds of remarks"
