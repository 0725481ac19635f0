"""Results of other load generators -> experiments that a profile can be learned from.

Formats are told apart by content, versions by the fields that are there: `vllm bench serve` (and sglang's), AIPerf and GenAI-Perf (JSON
or CSV), guidellm, inference-perf, trtllm-bench, and our own load tests.  What a file does not say of the system comes from `Design`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsys_bench import hardware, models, record, units
from mlsys_bench.errors import BadInput, RecordError, UnknownName
from mlsys_bench.predict import floor
from mlsys_bench.predict.experiment import Experiment
from mlsys_bench.predict.readers import aiperf, guidellm, inference_perf, loadtests, trtllm, vllm
from mlsys_bench.predict.readers.parts import UNTOLD, Run, at
from mlsys_bench.types import LoadTest

_TOOLS = (trtllm, guidellm, inference_perf, vllm, aiperf)
KNOWN = (vllm.NAME, aiperf.NAME, guidellm.NAME, inference_perf.NAME, trtllm.NAME, loadtests.NAME)
_MOST = 1e7  # tokens, requests in flight, requests per second or seconds: what is beyond is a slip of the pen
_COUNTS = ("tp", "pp", "ep", "max_seqs", "max_step_tokens")
_MOST_FAILED = 0.01  # more failures than that: what was measured is not what users asked for
_CATCH_UP = 1.25  # an open-loop test that takes this much longer than its sending and its last answer: the queue grew


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """The system that was measured, as far as a person says; None is taken from the file."""

    model: str | None = None
    device: str | None = None
    engine: str | None = None
    precision: str | None = None
    tp: int | None = None
    pp: int | None = None
    ep: int | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One load level: what was measured, by which tool, on how many requests, and what to know about it."""

    experiment: Experiment
    tool: str
    where: str
    requests: int
    failed: int
    notes: tuple[str, ...]


def read(paths: Sequence[Path], design: Design | None = None) -> tuple[Reading, ...]:
    """Return every load level in these files.  Raises BadInput for a file of no known tool, or a system nobody named."""
    return tuple(reading for path in paths for reading in _readings(path, design or Design()))


def _readings(path: Path, design: Design) -> list[Reading]:
    tool, runs = _runs(path)
    if not runs:
        raise BadInput(f"{path}: no request was answered in it")
    where = [str(path)] if len(runs) == 1 else [f"{path}[{i}]" for i in range(len(runs))]
    return [_reading(run, tool, place, path, design) for run, place in zip(runs, where, strict=True)]


def _runs(path: Path) -> tuple[str, list[Run]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text.strip():
        raise BadInput(f"{path}: is empty")
    found: list[tuple[str, list[Run]]] = [_of(document, path) for document in _documents(text, path)]
    return found[0][0], [run for _, runs in found for run in runs]


def _of(document: Any, path: Path) -> tuple[str, list[Run]]:
    if at(document, "schema") is not None:
        value = record.load(path)[1]
        if not isinstance(value, LoadTest):
            raise RecordError(f"{path}: holds a {at(document, 'kind')!r} record; a load test is needed among results of other tools")
        return loadtests.NAME, [loadtests.run(value, path)]
    for tool in _TOOLS:
        if tool.knows(document):
            return tool.NAME, runs_of(tool, document, str(path))
    raise BadInput(f"{path}: is no result of a tool known here ({', '.join(KNOWN)}), nor a bench record")


def runs_of(tool: Any, document: Any, where: str) -> list[Run]:
    """Return the runs that a reader finds in a document, without those in which nothing was answered.

    Raises BadInput for a document that cannot be read, and for a number that no run has.
    """
    try:
        found: list[Run] = tool.runs(document, where)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise BadInput(f"{where}: looks like {tool.NAME} but cannot be read: {error!r}; was the file cut or edited?") from error
    for i, run in enumerate(found):
        _check(run, where if len(found) == 1 else f"{where}[{i}]")
    return [run for run in found if run.requests != 0]


def _documents(text: str, path: Path) -> list[Any]:
    """Return the JSON of a file: one object, an object a line, or a table of AIPerf's."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        table = aiperf.from_csv(text)
        if table is not None:
            return [table]
        try:
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise BadInput(f"{path}: is no JSON, JSON lines or AIPerf table: {error}; known results: {', '.join(KNOWN)}") from None
    return whole if isinstance(whole, list) and whole and all(isinstance(item, dict) for item in whole) else [whole]


def _check(run: Run, where: str) -> None:
    """Raise BadInput for a number that no run has: it would be believed, or simulated for hours."""
    if min(run.requests or 0, run.failed) < 0:
        raise BadInput(f"{where}: {run.requests} requests answered and {run.failed} failed; neither can be below 0")
    if run.requests == 0:
        return
    sizes = {
        "prompt tokens": run.prompt_tokens.mean,
        "output tokens": run.output_tokens.mean,
        "requests in flight": run.concurrency,
        "requests per second": run.rate_per_s,
        "seconds long": run.duration_s,
    }
    for what, value in sizes.items():
        if value is not None and not 0 < value <= _MOST:
            raise BadInput(f"{where}: {value:g} {what}; a run has more than 0 and at most {_MOST:,.0f}")
    for name, value in run.measured.items():
        if not 0 <= value <= floor.LONGEST_S:
            raise BadInput(f"{where}: {name.removesuffix('_s')} is {units.show_s(value)}; no time is below 0, and none here above a day")
    for name in _COUNTS:
        value = run.design.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MOST):
            raise BadInput(f"{where}: {name} is {value!r}; it must be a whole number of at least 1")


def _reading(run: Run, tool: str, where: str, path: Path, design: Design) -> Reading:
    system = {**run.design, **{k: v for k, v in dataclasses.asdict(design).items() if v is not None}}
    run = _steady(run)
    model = _model(system.get("model"), where)
    experiment = Experiment(
        key=where,
        group=str(path),
        prompt_tokens=run.prompt_tokens,
        output_tokens=run.output_tokens,
        rate_per_s=run.rate_per_s,
        arrivals=run.arrivals,
        concurrency=run.concurrency,
        requests=run.sent if run.concurrency is not None else None,
        measured=dict(run.measured),
        **{"precision": model.native_precision, **system, "model": model.id, "device": _device(system.get("device"), where)},
    )
    return Reading(experiment=experiment, tool=tool, where=where, requests=run.requests or 0, failed=run.failed, notes=run.notes)


def _steady(run: Run) -> Run:
    """Return the run, without its latencies where it was no steady state: they would say how long the test ran, not how fast it was."""
    share = run.failed / (run.requests + run.failed) if run.requests else 0.0
    if share > _MOST_FAILED:
        note = f"{100 * share:.0f} % of its requests failed: its latencies are of the lucky ones and are left out"
    elif run.uneven is not None:
        note = f"{run.uneven}: no one load stands for it; its latencies are left out"
    elif _fell_behind(run):
        done = (run.requests or 0) / (run.duration_s or 1.0)
        note = f"{done:.3g}/s were answered of {run.rate_per_s:g}/s sent: the queue grew to the end; its latencies are left out"
    elif run.rate_per_s is None and run.concurrency is None:
        note = UNTOLD
    else:
        return run
    return dataclasses.replace(run, measured={}, notes=(*run.notes, note))


def _fell_behind(run: Run) -> bool:
    """Say whether an open-loop test took longer than its sending and one answer: what had piled up was worked off after the last send."""
    ttft, e2e, tpot = (run.measured.get(f"{metric}_mean_s") for metric in ("ttft", "e2e", "tpot"))
    if run.rate_per_s is None or run.duration_s is None or run.requests is None or ttft is None or (e2e is None and tpot is None):
        return False
    decode_s = e2e - ttft if e2e is not None else (tpot or 0.0) * (run.output_tokens.mean - 1)
    return run.duration_s > _CATCH_UP * (run.requests / run.rate_per_s + decode_s)


def _model(name: Any, where: str) -> models.Architecture:
    """Return the catalogue's model as a tool names it: by its whole name, or the last part of a path."""
    if not name:
        raise BadInput(f"{where}: does not say which model was served; give --model NAME (`mlsys catalog models` lists names)")
    try:
        return models.find(str(name))
    except UnknownName:
        short = str(name).rstrip("/").rpartition("/")[2]
        if short == str(name):
            raise
        return models.find(short)


def _device(name: Any, where: str) -> str:
    if not name:
        raise BadInput(f"{where}: does not say on which GPU; give --gpu NAME (`mlsys catalog gpus` lists names)")
    return "cpu" if str(name) == "cpu" else hardware.find(str(name)).id
