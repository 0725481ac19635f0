"""Predictions against measurements that nobody here made: every figure beside its bar, its n and its interval.

What is predicted was never learned from: knowledge is learned from scratch for every figure (from the assumed coefficients, not from the
shipped ones), without the model, the GPU or the points that are then predicted.  Intervals are 90 %, bootstrap over experiments; a bar
applies where n >= 10, and fewer rows are reported.  Beside each: the four-coefficient toy (`_toy.py`), learned from the same rows, and the
best peer.

The tables are read from the folder beside this checkout; without them nothing is measured.  Arguments choose a part: `open`, `closed`,
`inferencex`, `mlperf`; the rest then prints nothing.
"""

from __future__ import annotations

import concurrent.futures
import functools
import math
import operator
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import _one_thread  # noqa: F401
import _toy

from mlsys_bench import models, predict, pricing, stats
from mlsys_bench.latency import coefficients
from mlsys_bench.predict import Experiment, Prediction, field, holdout, learning, regret, score, tables
from mlsys_bench.predict.score import Judged
from mlsys_bench.types import Provenance

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "llm"
PROCESSES = 2
CLOSED_FOLDS = 24  # 900 interior points: some 38 leave at once
ENOUGH = 10  # rows from which on a bar applies
MEANS = ("itl_mean_s", "e2e_mean_s", "ttft_mean_s")
PEER = "blis-trained-physics"
MODEL, GPU = operator.attrgetter("model"), operator.attrgetter("device")  # of an experiment: what is left out

Predictions = dict[str, Prediction]


@dataclass(slots=True)
class Sheet:
    """Prints figures beside their bars and counts the misses."""

    missed: int = 0
    started: float = 0.0

    def heading(self, text: str) -> None:
        """Print a heading and the columns."""
        print(f"\n{text}   [{time.perf_counter() - self.started:.0f} s]")
        print(f"{'':46}{'ours':>9} {'90 %':>15} {'n':>5} {'exp.':>5} {'bar':>8}  {'':9}{'toy':>8} {'peer':>8}", flush=True)

    def row(
        self,
        what: str,
        value: float,
        *,
        interval: tuple[float, float] | None = None,
        n: int,
        groups: int,
        bar: float | None = None,
        toy: float | None = None,
        peer: float | None = None,
    ) -> None:
        """Print a share that must not exceed its bar, as percent."""
        judged = bar is not None and n >= ENOUGH
        kept = not judged or value <= (bar or 0.0)
        self.missed += not kept
        verdict = "" if bar is None else "few rows" if not judged else "ok" if kept else "MISSED"
        print(
            f"{what:46}{percent(value):>9} {around(interval):>15} {n:>5} {groups:>5} "
            f"{'' if bar is None else '<= ' + format(100 * bar, 'g') + ' %':>8}  {verdict:9}{percent(toy):>8} {percent(peer):>8}",
            flush=True,
        )

    def holds(self, what: str, said: str, kept: bool) -> None:
        """Print a statement that must hold."""
        self.missed += not kept
        print(f"{what:46}{said}  {'ok' if kept else 'MISSED'}", flush=True)


def percent(value: float | None) -> str:
    """Print a share."""
    return "" if value is None else f"{100 * value:.1f} %"


def around(interval: tuple[float, float] | None) -> str:
    """Print an interval of shares."""
    return "" if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f} %"


# ---------------------------------------------------------------- learning


def solve(asked: dict[str, holdout.Fold]) -> dict[str, Predictions]:
    """Return the predictions of each fold by its name, learned in two processes."""
    started = time.perf_counter()
    found: dict[str, Predictions] = {}
    with concurrent.futures.ProcessPoolExecutor(PROCESSES) as pool:
        waiting = {pool.submit(learned, *fold): name for name, fold in asked.items()}
        for done in concurrent.futures.as_completed(waiting):
            found[waiting[done]] = done.result()
            print(f"  {waiting[done]}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return found


def learned(train: Sequence[Experiment], test: Sequence[Experiment]) -> Predictions:
    """Return the predictions of some rows after learning from others from scratch, nothing that is asked in sight."""
    knowledge = predict.learn(train, prior=predict.assumed())
    blind = [replace(e, measured={}) for e in test]
    return {p.key: p for p in predict.predict(blind, knowledge)}


def judged(test: Iterable[Experiment], found: Predictions, figures: Sequence[str], peers: dict[str, float] | None = None) -> list[Judged]:
    """Return predictions beside what was measured."""
    return [
        Judged(
            figure=figure,
            measured=e.measured[figure],
            predicted=found[e.key].figures[figure][0],
            low=found[e.key].figures[figure][1],
            high=found[e.key].figures[figure][2],
            group=e.group,
            tags=tags(e, (peers or {}).get(f"{e.key} {figure}")),
        )
        for e in test
        for figure in figures
        if e.key in found and figure in e.measured and figure in found[e.key].figures
    ]


def tags(e: Experiment, peer: float | None) -> dict[str, str]:
    """Return what a row may be split by."""
    served = "disaggregated" if e.disaggregated else "in one place"
    own = {"gpu": e.device, "model": e.model, "kind": f"{e.speculative or 'no speculation'}, {served}", "engine": e.engine}
    return own | ({"peer": repr(peer)} if peer else {})


# ---------------------------------------------------------------- the tables


def load(name: str) -> tuple[Experiment, ...]:
    """Return the measured experiments of a table."""
    return tables.calibration(tables.read(DATA / name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """All measured rows, table by table."""

    blis: tuple[Experiment, ...]
    raw: tuple[Experiment, ...]
    closed: tuple[Experiment, ...]
    inferencex: tuple[Experiment, ...]
    mlperf: tuple[Experiment, ...]

    @property
    def open(self) -> tuple[Experiment, ...]:
        """The open loop: BLIS, and stages of its raw file that the table does not hold."""
        return self.blis + tuple(e for e in self.raw if e.group not in {known.group for known in self.blis})

    @property
    def latencies(self) -> tuple[Experiment, ...]:
        """All but MLPerf, which gives rates."""
        return self.open + self.closed + self.inferencex


def main() -> int:
    """Print each figure beside its bar; return 1 when one is missed."""
    if not DATA.exists():
        print(f"{DATA} is not beside this checkout: nothing is measured")
        return 0
    evidence = Evidence(
        blis=load("blis_measured.csv"),
        raw=load("blis_training_raw_inference_perf.csv"),
        closed=load("closed_loop_measured.csv"),
        inferencex=load("inferencex_measured.csv"),
        mlperf=load("mlperf_inference_v41_llm.csv"),
    )
    sheet = Sheet(started=time.perf_counter())
    asked = {name: fold for name, fold in folds(evidence).items() if not sys.argv[1:] or name.startswith(tuple(sys.argv[1:]))}
    found = solve(asked)
    states: dict[str, list[Judged]] = {}
    blis(sheet, found, evidence, states)
    unknown = together(found, "closed model ")
    closed_loop_uncalibrated(sheet, unknown, evidence, states)
    known = together(found, tuple(f"closed {i}" for i in range(CLOSED_FOLDS)))
    closed_loop_held_out(sheet, known, evidence, states)
    first = together(found, "inferencex one point")
    inferencex(sheet, unknown, first, evidence, states)
    if not sys.argv[1:] or "inferencex" in sys.argv[1:]:
        configurations(sheet, evidence)
    decisions(sheet, {"closed loop": (evidence.closed, unknown, known), "InferenceX": (evidence.inferencex, unknown, first)})
    mlperf(sheet, together(found, "mlperf"), evidence)
    intervals(sheet, states)
    print(f"\n{sheet.missed} missed, in {time.perf_counter() - sheet.started:.0f} s")
    return 1 if sheet.missed else 0


def folds(evidence: Evidence) -> dict[str, holdout.Fold]:
    """Return everything that is learned and predicted, the slowest first.

    The open loop is learned from the open loop (another client, other versions of the engine); closed loops from all but InferenceX, some
    of whose runs are those of the closed-loop table.
    """
    asked: dict[str, holdout.Fold] = {"mlperf": (evidence.latencies, evidence.mlperf)}
    for i, (train, test) in enumerate(holdout.interior(evidence.closed, CLOSED_FOLDS)):
        asked[f"closed {i}"] = ((*train, *evidence.open), test)
    closed_loops = (*evidence.closed, *evidence.inferencex)
    for model in dict.fromkeys(e.model for e in closed_loops):
        train = without((*evidence.closed, *evidence.open), lambda e, model=model: e.model == model)
        asked[f"closed model {model}"] = (train, tuple(e for e in closed_loops if e.model == model))
    points, rest = holdout.first_points(evidence.inferencex, configuration)
    known = without((*evidence.closed, *evidence.open), lambda e: e.model in {other.model for other in evidence.inferencex})
    asked["inferencex one point"] = ((*known, *points), rest)
    for name, key in (("model", MODEL), ("gpu", GPU)):
        for value, (train, test) in holdout.leave_one_out(evidence.open, key).items():
            asked[f"open {name} {value}"] = (train, tuple(e for e in test if e in evidence.blis))
    points, rest = holdout.first_points(evidence.blis, place)
    places = {place(e) for e in evidence.blis}
    asked["open one point"] = ((*without(evidence.open, lambda e: place(e) in places), *points), rest)
    return {name: fold for name, fold in asked.items() if fold[1]}


def without(rows: Sequence[Experiment], forbidden: Callable[[Experiment], bool]) -> tuple[Experiment, ...]:
    """Return the rows to learn from without some, nor any of their groups."""
    gone = {e.group for e in rows if forbidden(e)}
    return tuple(e for e in rows if e.group not in gone)


def together(found: dict[str, Predictions], start: str | tuple[str, ...]) -> Predictions:
    """Return the predictions of all folds whose name starts so."""
    return {key: p for name, predictions in found.items() if name.startswith(start) for key, p in predictions.items()}


def place(e: Experiment) -> tuple[str, str, int]:
    """Return the model, GPU and TP of a run."""
    return e.model, e.device, e.tp


# ---------------------------------------------------------------- BLIS: open loop


def blis(sheet: Sheet, found: dict[str, Predictions], evidence: Evidence, states: dict[str, list[Judged]]) -> None:
    """Leave a model out, leave a GPU out, and give one point of each (model, GPU, TP)."""
    peers = peer_predictions()
    for left_out, key, step, first in (("model", MODEL, 0.05, 0.12), ("gpu", GPU, 0.10, 0.20)):
        rows = judged(evidence.blis, together(found, f"open {left_out} "), MEANS, peers)
        toys: list[Judged] = []
        for train, test in holdout.leave_one_out(evidence.blis, key).values():
            toys += judged(test, _toy.predict(_toy.learn(train), test), MEANS)
        states[f"open loop, {left_out} left out"] = rows
        sheet.heading(f"open loop (vLLM 0.15.1): a {left_out} that nobody measured")
        by_gpu(sheet, rows, toys, {"itl_mean_s": step, "e2e_mean_s": step, "ttft_mean_s": first})
    one_point(sheet, together(found, "open one point"), evidence, states, peers)


def one_point(sheet: Sheet, found: Predictions, evidence: Evidence, states: dict[str, list[Judged]], peers: dict[str, float]) -> None:
    """Give the first measured stage of each (model, GPU, TP), and nothing else measured there; predict the rest."""
    figures = (*MEANS, "e2e_p99_s")
    points, rest = holdout.first_points(evidence.blis, place)
    rows = judged(rest, found, figures, peers)
    toys = calibrated_toys(points, rest, _toy.learn(points), figures)
    states["open loop, one point known"] = rows
    sheet.heading("open loop (vLLM 0.15.1): one measured point of the (model, GPU, TP), the first stage")
    by_gpu(sheet, rows, toys, {"itl_mean_s": 0.025, "e2e_mean_s": 0.025, "ttft_mean_s": 0.08, "e2e_p99_s": 0.08})


def calibrated_toys(points: Sequence[Experiment], test: Sequence[Experiment], toy: _toy.Toy, figures: Sequence[str]) -> list[Judged]:
    """Return the toy's predictions, each figure scaled by what the layout's one point is off by."""
    at_points, at_test = _toy.predict(toy, points), _toy.predict(toy, test)
    scaled: Predictions = {}
    for e in test:
        point = next((p for p in points if place(p) == place(e)), None)
        ratios = {f: point.measured[f] / at_points[point.key].figures[f][0] for f in figures if f in point.measured} if point else {}
        own = at_test[e.key]
        moved = {f: (v[0] * ratios.get(f, 1.0), v[1] * ratios.get(f, 1.0), v[2] * ratios.get(f, 1.0)) for f, v in own.figures.items()}
        scaled[e.key] = replace(own, figures=moved)
    return judged(test, scaled, figures)


def by_gpu(sheet: Sheet, found: Sequence[Judged], toys: Sequence[Judged], bars: dict[str, float]) -> None:
    """Print the mean errors of each figure for each GPU, never pooled, beside the toy's and the best peer's."""
    for gpu, rows in score.split(found, "gpu").items():
        for figure, bar in bars.items():
            own = [j for j in rows if j.figure == figure]
            toy = [j for j in toys if j.figure == figure and j.tags["gpu"] == gpu]
            if not own:
                continue
            s = score.summary(own)
            baseline = score.summary(toy).mape if toy else None
            theirs = [abs(float(j.tags["peer"]) / j.measured - 1) for j in own if "peer" in j.tags]
            peer = sum(theirs) / len(theirs) if theirs else None
            what = f"{gpu} {figure.removesuffix('_s')}, mean error"
            sheet.row(what, s.mape, interval=s.mape_interval, n=s.rows, groups=s.groups, bar=bar, toy=baseline, peer=peer)
            if figure != "ttft_mean_s" and baseline is not None and s.rows >= ENOUGH and figure in MEANS:
                sheet.holds(
                    "", f"{percent(s.mape)} against {percent(baseline * 2 / 3)}: the toy beaten by a third", s.mape <= baseline * 2 / 3
                )


def peer_predictions() -> dict[str, float]:
    """Return what the best peer predicts, by experiment and figure, in seconds."""
    from mlsys_bench.journeys.backtest_llm import peers_beside

    table = tables.read(DATA / "blis_measured.csv")
    beside = peers_beside(table.path)
    found = {}
    for row in table.rows:
        for figure in MEANS:
            key = (row.cells["set"], row.cells["experiment"], row.cells["stage"], figure.removesuffix("_s"))
            if PEER in beside.get(key, {}):
                found[f"{row.parts[0][0].key} {figure}"] = beside[key][PEER] / 1000
    return found


# ---------------------------------------------------------------- closed loop


def closed_loop_uncalibrated(sheet: Sheet, predictions: Predictions, evidence: Evidence, states: dict[str, list[Judged]]) -> None:
    """Leave each model out of all tables and predict it."""
    toys: Predictions = {}
    for train, test in holdout.leave_one_out(evidence.closed, MODEL).values():
        toys |= _toy.predict(_toy.learn(train), test)
    found = judged(evidence.closed, predictions, ("tpot_mean_s", "ttft_mean_s"))
    theirs = judged(evidence.closed, toys, ("tpot_mean_s", "ttft_mean_s"))
    states["closed loop, model left out"] = found
    sheet.heading("closed loop (AIConfigurator's collection): a model that nobody measured")
    dense = {m for m in {e.model for e in evidence.closed} if not models.find(m).experts}
    for name, chosen in (("dense models", dense), ("mixtures of experts", {e.model for e in evidence.closed} - dense)):
        for figure, bar in (("tpot_mean_s", 0.15 if chosen is dense else None), ("ttft_mean_s", None)):
            own = [j for j in found if j.figure == figure and j.tags["model"] in chosen]
            medians(sheet, f"{name} {figure.removesuffix('_s')}", own, bar, None, toy_of(theirs, own))


def closed_loop_held_out(sheet: Sheet, predictions: Predictions, evidence: Evidence, states: dict[str, list[Judged]]) -> None:
    """Leave interior concurrencies of every sweep out, repeated keys together, and predict them from the rest."""
    toys: Predictions = {}
    for train, test in holdout.interior(evidence.closed, CLOSED_FOLDS):
        toys |= interpolated(train, test)
    tested = [e for e in evidence.closed if e.key in predictions]
    found = judged(tested, predictions, ("tpot_mean_s", "ttft_mean_s"))
    theirs = judged(tested, toys, ("tpot_mean_s", "ttft_mean_s"))
    states["closed loop, one concurrency left out"] = found
    sheet.heading("closed loop: one interior concurrency left out (in the column 'toy': interpolation between its neighbours)")
    for figure, median, p90 in (("tpot_mean_s", 0.02, 0.07), ("ttft_mean_s", 0.06, 0.30)):
        own = [j for j in found if j.figure == figure]
        medians(sheet, figure.removesuffix("_s"), own, median, p90, toy_of(theirs, own))


def interpolated(train: Sequence[Experiment], test: Sequence[Experiment]) -> Predictions:
    """Return plain interpolation within each sweep: log-log between the two neighbouring concurrencies."""
    import numpy as np

    found: Predictions = {}
    sweeps: dict[str, list[Experiment]] = {}
    for e in train:
        sweeps.setdefault(e.group, []).append(e)
    for e in test:
        figures = {}
        for figure in ("tpot_mean_s", "ttft_mean_s"):
            levels: dict[int, list[float]] = {}
            for other in sweeps.get(e.group, ()):
                levels.setdefault(other.concurrency or 0, []).append(other.measured[figure])
            at = sorted(levels)
            means = [float(np.mean(np.log(levels[level]))) for level in at]
            value = float(np.exp(np.interp(np.log(e.concurrency or 1), np.log(at), means))) if at else 1.0
            figures[figure] = (value, value, value)
        found[e.key] = Prediction(key=e.key, figures=figures, provenance=Provenance.CALIBRATED)
    return found


def toy_of(theirs: Sequence[Judged], own: Sequence[Judged]) -> list[Judged]:
    """Return the baseline's predictions of the same results."""
    wanted = {(j.figure, j.group, j.measured) for j in own}
    return [j for j in theirs if (j.figure, j.group, j.measured) in wanted]


def medians(sheet: Sheet, what: str, own: Sequence[Judged], bar: float | None, p90: float | None, toys: Sequence[Judged] = ()) -> None:
    """Print the median error, and the 90th percentile where it has a bar."""
    if not own:
        return
    s = score.summary(own)
    toy = score.summary(toys) if toys else None
    middle = score.interval(own, lambda errors: stats.quantile(errors, 0.5))
    sheet.row(f"{what}, median error", s.median, interval=middle, n=s.rows, groups=s.groups, bar=bar, toy=toy.median if toy else None)
    upper = score.interval(own, lambda errors: stats.quantile(errors, 0.9))
    sheet.row(f"{what}, p90 of errors", s.p90, interval=upper, n=s.rows, groups=s.groups, bar=p90, toy=toy.p90 if toy else None)


# ---------------------------------------------------------------- InferenceX


def inferencex(sheet: Sheet, unknown: Predictions, known: Predictions, evidence: Evidence, states: dict[str, list[Judged]]) -> None:
    """Predict DeepSeek-R1 on nine GPUs from other models, and from one point of each (GPU, framework, layout)."""
    test = evidence.inferencex
    asked = {e.model for e in test}
    toys = _toy.predict(_toy.learn([e for e in evidence.closed if e.model not in asked]), test)
    by_kind(sheet, "InferenceX: DeepSeek-R1, learned from other models", test, unknown, toys, 0.20, states, "InferenceX, model left out")
    points, rest = holdout.first_points(test, configuration)
    toys = {p.key: p for p in (_scaled(e, points, toys) for e in rest)}
    by_kind(sheet, "InferenceX: one point of the (GPU, framework, layout)", rest, known, toys, 0.06, states, "InferenceX, one point known")
    told = {(configuration(e), *load_of(e)) for e in points}
    new = [e for e in rest if (configuration(e), *load_of(e)) not in told]
    sheet.heading("the same, without runs that repeat the lengths and the concurrency of the point")
    for kind, own in score.split(judged(new, known, ("tpot_p50_s",)), "kind").items():
        medians(sheet, f"TPOT, {kind}", own, 0.06, None)


def load_of(e: Experiment) -> tuple[float, float, int | None]:
    """Return the lengths and the concurrency of a run."""
    return e.prompt_tokens.mean, e.output_tokens.mean, e.concurrency


def configurations(sheet: Sheet, evidence: Evidence) -> None:
    """Leave each GPU, engine and layout of DeepSeek-R1 out while all others are known, without and with its first point.

    The coefficients of all come from other models; the field is linear around them, so that what is left out has a closed form.  A layout's
    rows in the closed-loop table leave with it.
    """
    import numpy as np

    test = evidence.inferencex
    asked = {e.model for e in test}
    rows = [*evidence.closed, *test]
    others = without(evidence.closed, lambda e: e.model in asked)
    part = learning.learn_part(rows, coefficients.ASSUMED_LOG, predict.assumed().scales[coefficients.CLOSED], others)
    own = {e.key for e in test}
    point = {e.key for e in holdout.first_points(test, configuration)[0]}
    for known, title in ((False, "nothing of it"), (True, "one point of it")):
        sheet.heading(f"InferenceX: one (GPU, engine, layout) left out, all others known, {title}")
        names: dict[object, int] = {}
        keys = [placed(e) if e.model in asked and not (known and e.key in point) else e.key for e in rows]
        blocks = np.array([names.setdefault(key, len(names)) for key in keys])
        error, _ = field.left_out(part.given, blocks[part.given.points.row])
        taken: dict[str, list[tuple[str, float]]] = {}
        for i, row in enumerate(part.given.points.row):
            e = rows[row]
            if part.given.points.kind[i] == 0 and e.key in own and not (known and e.key in point):
                taken.setdefault(tags(e, None)["kind"], []).append((e.group, abs(float(np.expm1(-error[i])))))
        for kind, found in taken.items():
            median = stats.quantile([size for _, size in found], 0.5)
            sheet.row(f"TPOT, {kind}, median error", median, n=len(found), groups=len({g for g, _ in found}), bar=0.06)


def placed(e: Experiment) -> tuple[object, ...]:
    """Return the GPU, engine and layout, by which runs of both tables are told to be of one configuration."""
    return (*e.layout, e.engine, e.disaggregated, e.gpus, e.prefill_gpus)


def configuration(e: Experiment) -> str:
    """Return the GPU, framework and layout of an InferenceX run: its group without the lengths."""
    return e.group.rsplit(" ", 2)[0]


def _scaled(e: Experiment, points: Sequence[Experiment], toys: Predictions) -> Prediction:
    """Return the toy's prediction scaled by what it is off by at the configuration's one point."""
    point = next(p for p in points if configuration(p) == configuration(e))
    own = toys[e.key]
    ratio = next((point.measured[f] / toys[point.key].figures[f][0] for f in ("tpot_p50_s", "tpot_mean_s") if f in point.measured), 1.0)
    return replace(own, figures={f: (v[0] * ratio, v[1] * ratio, v[2] * ratio) for f, v in own.figures.items()})


def by_kind(
    sheet: Sheet,
    title: str,
    test: Sequence[Experiment],
    found: Predictions,
    toys: Predictions,
    bar: float,
    states: dict[str, list[Judged]],
    state: str,
) -> None:
    """Print the median TPOT errors by speculation and disaggregation, and by GPU without a bar."""
    sheet.heading(title)
    own, theirs = judged(test, found, ("tpot_p50_s",)), judged(test, toys, ("tpot_p50_s",))
    for kind, rows in score.split(own, "kind").items():
        medians(sheet, f"TPOT, {kind}", rows, bar, None, toy_of(theirs, rows))
    for gpu, rows in score.split(own, "gpu").items():
        s = score.summary(rows)
        sheet.row(f"  {gpu}, median error", s.median, n=s.rows, groups=s.groups)
    first = judged(test, found, ("ttft_p50_s",))
    medians(sheet, "TTFT", first, None, None)
    states[state] = own + first


# ---------------------------------------------------------------- decisions


def decisions(sheet: Sheet, known: dict[str, tuple[Sequence[Experiment], Predictions, Predictions]]) -> None:
    """Print what choosing by prediction costs more than choosing by measurement; the bar is for rows with points to learn from."""
    sheet.heading("decision regret: the cheapest configuration by prediction against the truly cheapest, over drawn SLOs")
    for table, (test, unknown, calibrated) in known.items():
        for name, found, bars in (("model left out", unknown, (0.05, 0.15)), ("points known", calibrated, (0.05, 0.15))):
            options = [o for e in test if (o := option(e, found)) is not None]
            made = regret.decisions(options)
            if not made:
                continue
            r = regret.summary(made, len(regret.configurations(options)))
            what = f"{table}, {name}"
            sheet.row(f"{what}: median", r.median, interval=r.median_interval, n=r.decisions, groups=r.groups, bar=bars[0])
            sheet.row(f"{what}: p90", r.p90, interval=r.p90_interval, n=r.decisions, groups=r.groups, bar=bars[1])
            print(f"{'':46}{r.options} configurations; the first choice misses the SLO in {percent(r.missed)} of cases", flush=True)


def option(e: Experiment, found: Predictions) -> regret.Option | None:
    """Return a measured run as a configuration to choose; None where it has no price or no prediction."""
    price = usd_per_gpu_h(e.device)
    stat = "mean" if "ttft_mean_s" in e.measured and "tpot_mean_s" in e.measured else "p50"
    names = f"ttft_{stat}_s", f"tpot_{stat}_s"
    if price is None or e.key not in found or any(n not in e.measured or n not in found[e.key].figures for n in names):
        return None
    ttft, tpot = (e.measured[n] for n in names)
    (own_ttft, ttft_sd), (own_tpot, tpot_sd) = (centre_and_sd(found[e.key].figures[n]) for n in names)
    more = e.output_tokens.mean - 1
    per_user = (e.concurrency or 1) * e.output_tokens.mean
    return regret.Option(
        group=f"{e.model} {e.prompt_tokens.mean:g}/{e.output_tokens.mean:g}",
        layout=layout_name(e),
        usd_per_h=price * e.gpus,
        ttft_s=ttft,
        tpot_s=tpot,
        tokens_per_s=per_user / (ttft + more * tpot),
        predicted_ttft_s=own_ttft,
        predicted_tpot_s=own_tpot,
        predicted_tokens_per_s=per_user / (own_ttft + more * own_tpot),
        users=e.concurrency or 0,
        ttft_sd=ttft_sd,
        tpot_sd=tpot_sd,
        first_share=own_ttft / (own_ttft + more * own_tpot),
    )


def centre_and_sd(figure: tuple[float, float, float]) -> tuple[float, float]:
    """Return a predicted figure and the sd of its logarithm."""
    return figure[0], math.log(figure[2] / figure[1]) / 2 / 1.645


def layout_name(e: Experiment) -> str:
    """Return what is deployed, whatever its load."""
    served = f"{e.speculative} {e.prefill_gpus}+{e.decode_gpus}"
    return f"{e.device} {e.engine} {e.engine_version} {e.precision} tp{e.tp} dp{e.attention_dp} {e.moe_tp}x{e.ep} x{e.replicas} {served}"


@functools.cache
def usd_per_gpu_h(device: str) -> float | None:
    """Return the lowest on-demand price of one GPU, None where nothing is priced."""
    return min((o.usd_per_h / o.devices for o in pricing.offers(device, "on-demand")), default=None)


# ---------------------------------------------------------------- MLPerf


def mlperf(sheet: Sheet, found: Predictions, evidence: Evidence) -> None:
    """Print the highest rate under the p99 limits, with no MLPerf result learned from."""
    sheet.heading("MLPerf Inference v4.1: the highest rate of a system, learned from other tables")
    for scenario, bar in (("Server", 0.30), ("Offline", None)):
        test = [e for e in evidence.mlperf if bool(e.slo) == (scenario == "Server")]
        own = once(judged(test, found, ("max_rate_per_s",)))
        medians(sheet, scenario, own, bar, None)
        for model, rows in score.split(own, "model").items():
            s = score.summary(rows)
            print(f"{'  ' + model:46}bias {100 * s.bias:+.0f} %, median error {percent(s.median)}, {s.rows} systems", flush=True)


def once(rows: Sequence[Judged]) -> list[Judged]:
    """Return each result once: one run is often submitted for two accuracy targets."""
    return list({(j.group, j.measured): j for j in rows}.values())


# ---------------------------------------------------------------- intervals


def intervals(sheet: Sheet, states: dict[str, list[Judged]]) -> None:
    """Print whether 90 % intervals hold 90 % of experiments, and whether they beat a constant band."""
    sheet.heading("90 % intervals: coverage of independent experiments, and the interval score (lower is better)")
    for state, rows in states.items():
        for figure in (None, *dict.fromkeys(j.figure for j in rows)):
            own = [j for j in rows if figure in (None, j.figure)]
            if not own:
                continue
            s = score.summary(own)
            low, high = s.coverage_interval or (0.0, 1.0)
            said = f"{percent(s.coverage):>9} {around((low, high)):>15} {s.rows:>5} {s.groups:>5}"
            name = f"{state}: {figure.removesuffix('_s') if figure else 'all figures'}"
            if figure is None:
                sheet.holds(name, said, low <= 0.9 <= high)
                best = score.best_band(own)
                score_said = f"interval score {s.interval_score:.3f}, ± mean error {s.band_score:.3f}, best band in hindsight {best[1]:.3f}"
                sheet.holds("", score_said, s.interval_score < s.band_score)
            else:
                print(f"{'  ' + name:46}{said}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
