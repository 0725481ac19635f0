"""backtest plan: replicas planned by prediction beside those that measured runs show to be needed, and what its choices cost."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from mlsys_bench import hardware, predict, pricing, record
from mlsys_bench.backtests import Backtest, Choosing, Sizing
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys import backtest_llm as rows
from mlsys_bench.journeys.progress import Line
from mlsys_bench.predict import Experiment, regret, saturation, score, sized, tables
from mlsys_bench.predict.score import Judged
from mlsys_bench.predict.sized import FLEET, Answer
from mlsys_bench.types import Provenance, Scalar

Predictions = dict[str, predict.Prediction]
Pair = tuple[Judged, Answer]
SPLITS = ("all", "steepness", "gpu", "model", "engine")
Z90 = 1.645
DIGITS = 7


def plan(
    files: Sequence[Path], *, calibrate: Sequence[Path], out: Path | None, quiet: bool = False, cluster: str | None = None
) -> Backtest:  # fmt: skip
    """Plan for the latencies that each row measured, after learning from those of `calibrate`; write the tables with their plans."""
    paths = rows.outputs(files, out)
    rows.check(files, out)
    read = tables.read_all([*files, *calibrate])
    asked = read[: len(files)]
    known = [e for table in read[len(files) :] for e in tables.calibration(table)]
    if calibrate and not known:
        raise BadInput(f"--calibrate {calibrate[0]}: holds no measured row to learn from")
    found: Predictions = {}

    def judged() -> Backtest:
        answers = found | {key.removesuffix("*1"): prediction for key, prediction in found.items() if key.endswith("*1")}
        result = judge(asked, known, answers)
        for table, path in zip(asked, paths, strict=False):
            _write(path, table, answers, result, [*files, *calibrate])
        return result

    with rows.kept(found, judged):
        everything = [q for table in asked for e in tables.experiments(table) for q in sized.questions(e)]
        rows.predicted(everything, known, found, Line(quiet), cluster)
    return judged()


def judge(asked: Sequence[tables.Table], known: Sequence[Experiment], found: Predictions) -> Backtest:
    """Return every row with its plans, how fleets were sized, and what choices cost.

    Rows that were themselves learned from are judged apart, under `seen: itself`, and in no other figure.
    """
    everything = [(table, row) for table in asked for row in table.rows]
    pairs = [pair for table in asked for pair in _pairs(table, known, found)]
    fresh = [pair for pair in pairs if pair[0].tags["seen"] != rows.ITSELF]
    filled = tuple(_filled(table, row, found) for table, row in everything)
    reasons = Counter(
        str(f["provenance"]).removeprefix("not predicted: ") for f in filled if str(f["provenance"]).startswith("not predicted")
    )
    return Backtest(
        table="plan",
        source=", ".join(str(table.path) for table in asked),
        rows=len(everything),
        answered=len(everything) - sum(reasons.values()),
        methods=dict(Counter(str(f["provenance"]) for f in filled if not str(f["provenance"]).startswith("not predicted"))),
        unanswered=dict(reasons),
        predictions=filled,
        sizing=tuple(_sizing(fresh, pairs)),
        choosing=tuple(_choosing(asked, known, found)),
        notes=tuple(_notes(pairs, fresh)),
    )


# ---------------------------------------------------------------- rows


def _filled(table: tables.Table, row: tables.Row, found: Predictions) -> dict[str, Scalar]:
    """Return a row's own cells, the predicted figures at its load, then for each limit the rate of a system and the replicas planned."""
    figures = tables.predicted(table, row, found)
    added: dict[str, Scalar] = {}
    for column in table.format.results:
        for name, value in zip(("predicted", "low", "high"), figures.get(column, (None,) * 3), strict=True):
            added[f"{name}_{column}"] = _short(value)
    answers = {answer.limit: answer for answer in sized.answers(row.parts[0][0], found)} if len(row.parts) == 1 else {}
    for limit in _limits(table):
        added |= _plan_cells(limit, answers.get(limit))
    return {**row.cells, **added, "provenance": _provenance(row, found, bool(figures or answers))}


def _limits(table: tables.Table) -> tuple[str, ...]:
    """Return what a table's rows are planned under: its own limits where the highest rate is asked for, else its latencies."""
    asked = [saturation.asks_for_rate(e) for e in tables.experiments(table)]
    return (sized.RATE,) if asked and all(asked) else tuple(sized.LIMITS)


def _plan_cells(limit: str, answer: Answer | None) -> dict[str, Scalar]:
    name = limit.partition(" ")[0]
    rates = answer.rate_per_s if answer else (None,) * 3
    fleets = answer.replicas if answer and answer.replicas else (None,) * 3
    cells: dict[str, Scalar] = {}
    if limit != sized.RATE:
        cells[f"{name}_limit_ms"] = _short(1000 * answer.limit_s if answer and answer.limit_s else None)
    cells[f"measured_{name}_rate_per_s"] = _short(answer.measured_per_s if answer else None)
    cells |= {f"{end}_{name}_rate_per_s": _short(v) for end, v in zip(("predicted", "low", "high"), rates, strict=True)}
    cells |= {f"{end}_{name}_replicas_of_{FLEET}": _short(v) for end, v in zip(("predicted", "low", "high"), fleets, strict=True)}
    return cells


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.{DIGITS}g}")


def _provenance(row: tables.Row, found: Predictions, is_answered: bool) -> str:
    if not is_answered:
        return f"not predicted: {rows.why_not(row, found)}"
    order = list(Provenance)
    return max((found[e.key].provenance for e, _ in row.parts), key=order.index).value


def _write(path: Path, table: tables.Table, found: Predictions, result: Backtest, inputs: Sequence[Path]) -> None:
    """Write a table with its plans; the whole record where the file is named .json."""
    if path.suffix == ".json":
        record.write(path, result, hardware.machine(), inputs)
        return
    filled = [_filled(table, row, found) for row in table.rows]
    record.write_csv(path, filled[0], (list(row.values()) for row in filled))


# ---------------------------------------------------------------- replicas


def _pairs(table: tables.Table, known: Sequence[Experiment], found: Predictions) -> Iterator[Pair]:
    """Yield each planned fleet beside the one needed, tagged with what it may be split by."""
    seen, twice = rows.seen_before(known), rows.repeats(table)
    for row in table.rows:
        if len(row.parts) != 1 or row.line in twice:
            continue
        e = row.parts[0][0]
        tags = {"all": "all", "gpu": e.device, "model": e.model, "engine": e.engine, "seen": seen(e)}
        yield from sized.judged(e, list(sized.answers(e, found)), tags)


def _sizing(fresh: Sequence[Pair], everything: Sequence[Pair]) -> Iterator[Sizing]:
    """Yield how fleets were sized, by limit and split."""
    limits = list(dict.fromkeys(answer.limit for _, answer in everything))
    for split in (*SPLITS, "seen"):
        pairs = everything if split == "seen" else fresh
        values = [v for v in score.split((j for j, _ in pairs), split) if v]
        if split == "seen" and len(values) < 2 and rows.ITSELF not in values:
            continue
        if split == "steepness":
            values = [words for _, words in sized.STEEP if words in values]
        for value in values:
            for limit in limits:
                own = [(j, a) for j, a in pairs if j.tags.get(split) == value and a.limit == limit]
                if own:
                    yield _one(split, value, limit, own)


def _one(split: str, value: str, limit: str, pairs: Sequence[Pair]) -> Sizing:
    errors, fleets = score.summary([j for j, _ in pairs]), sized.summary([a for _, a in pairs])
    return Sizing(
        split=split, value=value, limit=limit, rows=fleets.rows, groups=errors.groups, within=fleets.within, kept=fleets.kept,
        safe=fleets.safe, size=fleets.size, safe_size=fleets.safe_size, median_error=errors.median, p90_error=errors.p90,
        coverage=errors.coverage, coverage_interval=errors.coverage_interval,
    )  # fmt: skip


# ---------------------------------------------------------------- choices


def _choosing(asked: Sequence[tables.Table], known: Sequence[Experiment], found: Predictions) -> Iterator[Choosing]:
    """Yield what choosing a configuration by prediction costs, for tables of closed loops with results."""
    seen = rows.seen_before(known)
    for table in asked:
        fresh = [e for e in tables.experiments(table) if e.concurrency and e.measured and seen(e) != rows.ITSELF]
        options = [option for e in fresh if (option := as_option(e, found)) is not None]
        made = regret.decisions(options)
        if made:
            total = regret.summary(made, len(regret.configurations(options)))
            yield Choosing(
                table=table.path.name, options=total.options, groups=total.groups, decisions=total.decisions, median=total.median,
                median_interval=total.median_interval, p90=total.p90, p90_interval=total.p90_interval, mean=total.mean, missed=total.missed,
            )  # fmt: skip


def as_option(e: Experiment, found: Mapping[str, predict.Prediction]) -> regret.Option | None:
    """Return a measured run as a configuration to choose; None where it has no price or no prediction."""
    price = _usd_per_gpu_h(e.device)
    stat = "mean" if "ttft_mean_s" in e.measured and "tpot_mean_s" in e.measured else "p50"
    names = f"ttft_{stat}_s", f"tpot_{stat}_s"
    if price is None or e.key not in found or any(n not in e.measured or n not in found[e.key].figures for n in names):
        return None
    (ttft, ttft_sd), (tpot, tpot_sd) = (_centre_and_sd(found[e.key].figures[n]) for n in names)
    more, per_user = e.output_tokens.mean - 1, (e.concurrency or 1) * e.output_tokens.mean
    return regret.Option(
        group=f"{e.model} {e.prompt_tokens.mean:g}/{e.output_tokens.mean:g}",
        layout=_layout_name(e),
        usd_per_h=price * e.gpus,
        ttft_s=e.measured[names[0]],
        tpot_s=e.measured[names[1]],
        tokens_per_s=per_user / (e.measured[names[0]] + more * e.measured[names[1]]),
        predicted_ttft_s=ttft,
        predicted_tpot_s=tpot,
        predicted_tokens_per_s=per_user / (ttft + more * tpot),
        users=e.concurrency or 0,
        ttft_sd=ttft_sd,
        tpot_sd=tpot_sd,
        first_share=ttft / (ttft + more * tpot),
    )


def _centre_and_sd(figure: tuple[float, float, float]) -> tuple[float, float]:
    """Return a predicted figure and the sd of its logarithm."""
    return figure[0], math.log(figure[2] / figure[1]) / 2 / Z90


def _layout_name(e: Experiment) -> str:
    served = f"{e.speculative} {e.prefill_gpus}+{e.decode_gpus}"
    return f"{e.device} {e.engine} {e.engine_version} {e.precision} tp{e.tp} dp{e.attention_dp} {e.moe_tp}x{e.ep} x{e.replicas} {served}"


@functools.cache
def _usd_per_gpu_h(device: str) -> float | None:
    """Return the lowest on-demand price of one GPU, None where nothing is priced."""
    return min((o.usd_per_h / o.devices for o in pricing.offers(device, "on-demand")), default=None)


def _notes(pairs: Sequence[Pair], fresh: Sequence[Pair]) -> Iterable[str]:
    itself = len(pairs) - len(fresh)
    if itself:
        yield f"{itself:,} plans are for rows that were themselves learned from: they are judged apart, as 'seen: {rows.ITSELF}'"
    limits = {answer.limit for _, answer in pairs}
    if limits:
        yield f"a fleet is planned for {FLEET} times the rate that one system was measured to carry within the limit: {FLEET} of them do"
    if limits - {sized.RATE}:
        yield "a row's measured latency is the limit, so its load is the most that one system carries within it"
        yield "predicted rates end at a quarter and at four times the row's load: beyond that, they are known to be beyond"
