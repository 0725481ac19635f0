"""Results of other tools as a side of `gate compare`: benchmarks (gate/readers) and load tests (predict/readers)."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys_bench import record
from mlsys_bench.errors import BadInput, RecordError
from mlsys_bench.gate import readers
from mlsys_bench.gate.readers import Reading
from mlsys_bench.gate.readers.parts import measurement, skipped
from mlsys_bench.record import Envelope
from mlsys_bench.types import Bench, Machine, Measurement, Scalar
from mlsys_bench.verdicts import Verdict

if TYPE_CHECKING:
    from mlsys_bench.predict.readers import parts as loads

APART = (
    "the two were measured one after the other, not in pairs: what the machine changed in between counts as a difference; "
    "mlsys gate run --command measures in pairs"
)
_LENGTHS = ("mean_prompt_tokens", "mean_output_tokens")
_HEAD_BYTES = 64  # our records say their schema first: large ones are not parsed twice
_MOST_FAILED = 0.01  # of the requests, for its latencies to be those of the system
_SAME_LENGTHS = 0.05  # of the mean: lengths that differ by more are another load

Side = tuple[Envelope, Bench]


@functools.cache
def _load_tools() -> tuple[Any, ...]:
    """Return the readers of load tests, imported where a file asks for them: they bring all that predicts."""
    from mlsys_bench.predict.readers import aiperf, guidellm, inference_perf, trtllm, vllm

    return trtllm, guidellm, inference_perf, vllm, aiperf


def _known() -> str:
    return ", ".join((*readers.KNOWN, *(tool.NAME for tool in _load_tools())))


def is_foreign(path: Path) -> bool:
    """Say whether this is no record of ours: a folder of results, a table, or JSON, whole or by line, without our schema."""
    if path.is_dir() or path.suffix in (".csv", ".gz"):
        return True
    try:
        data = path.read_bytes()
        document = None if b'"schema"' in data[:_HEAD_BYTES] else _first_of(data)
    except (OSError, ValueError, RecursionError):
        return False  # `record.load` says what is wrong with it
    return document is not None and not (isinstance(document, dict) and "schema" in document)


def _first_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return json.loads(data.partition(b"\n")[0])


def sides(base: Path, cand: Path) -> tuple[Side, Side, tuple[str, ...]]:
    """Return both sides of a comparison, records of ours or results of other tools, and what to know about them.  Raises BadInput."""
    before, notes_before = _side(base)
    after, notes_after = _side(cand)
    for length in _LENGTHS:
        one, other = (side[0].machine.soft.get(length) for side in (before, after))
        if isinstance(one, float) and isinstance(other, float) and abs(other - one) > _SAME_LENGTHS * one:
            before, after = _told(before, length, one), _told(after, length, other)
    return before, after, tuple(dict.fromkeys((*notes_before, *notes_after, APART)))


def remarked(verdict: Verdict, notes: Sequence[str]) -> Verdict:
    """Return the verdict with these notes among its reasons."""
    return dataclasses.replace(verdict, reasons=(*verdict.reasons, *notes))


def _side(path: Path) -> tuple[Side, tuple[str, ...]]:
    if not is_foreign(path):
        envelope, value = record.load(path)
        if not isinstance(value, Bench):
            raise RecordError(f"{path}: holds a {envelope.kind!r} record; beside a result of another tool a bench record is needed")
        return (envelope, value), ()
    found = load(path)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    inputs = {path.name: record.digest(path)} if path.is_file() else {}
    envelope = Envelope(schema=record.SCHEMA, kind="bench", created=now, machine=found.machine, inputs=inputs)
    return (envelope, found.bench), (*found.notes, *_hints(found))


def _told(side: Side, name: str, value: float) -> Side:
    """Return a side whose machine must be like the other's in this, too."""
    envelope, bench = side
    machine = dataclasses.replace(envelope.machine, hard={**envelope.machine.hard, name: f"{value:.4g}"})
    return dataclasses.replace(envelope, machine=machine), bench


def load(path: Path) -> Reading:
    """Return what a result of a known tool holds, benchmark or load test; a folder holds one launch a file.  Raises BadInput."""
    if path.is_dir():
        return readers.merged([load(file) for file in readers.files_of(path)])
    found = [_of(document, path) for document in _documents(path)]
    return readers.merged(found) if len(found) > 1 else found[0]


def _documents(path: Path) -> list[Any]:
    """Return the JSON of a file: one object, an object a line (vLLM's --append-result: a run each), or AIPerf's table."""
    text = readers.text_of(path)
    if path.suffix == ".csv":
        from mlsys_bench.predict.readers import aiperf

        table = aiperf.from_csv(text)
        if table is None:
            raise BadInput(f"{path}: is no table of AIPerf; known results: {_known()}")
        return [table]
    lines = text.splitlines()
    if len(lines) > 1 and _is_json(lines[0]):
        return [readers.document_of(line, str(path)) for line in lines if line.strip()]
    return [readers.document_of(text, str(path))]


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _of(document: Any, path: Path) -> Reading:
    if readers.recognised(document) is not None:
        return readers.parse_document(document, str(path), folder=path.parent)
    for tool in _load_tools():
        if tool.knows(document):
            return _load_test(tool, document, str(path))
    raise BadInput(f"{path}: is no record of ours and no result of a tool known here; known: {_known()}")


def _hints(found: Reading) -> Iterator[str]:
    if found.tool == "hyperfine" and len(found.bench.measurements) == 1:
        yield "hyperfine: give both sides one --command-name, as commands are compared by name"


# ---------------------------------------------------------------- load tests


def _load_test(tool: Any, document: Mapping[str, Any], where: str) -> Reading:
    """Return a load test as measurements of one launch: a value a request where the file has them, else its figures."""
    from mlsys_bench.predict.readers import runs_of, vllm

    runs = runs_of(tool, document, where)
    try:
        requests = _requests(document) if tool is vllm else {}
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: looks like {tool.NAME} but cannot be read: {error!r}; was the file cut or edited?") from error
    if not runs:
        raise BadInput(f"{where}: no request was answered in it")
    found = tuple(m for run, load in zip(runs, _levels(runs), strict=True) for m in _measurements(run, load, requests))
    notes = tuple(dict.fromkeys(note for run in runs for note in run.notes))
    return Reading(tool=tool.NAME, where=where, bench=Bench(measurements=found), machine=_machine(runs), notes=notes)


def _requests(document: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return TTFT and ITL of the requests that were answered, as vLLM's --save-detailed keeps them; nothing without."""
    if not all(document.get(name) for name in ("output_lens", "ttfts", "itls")):
        return {}
    rows = zip(document["output_lens"], document["ttfts"], document["itls"], strict=True)
    answered = [(ttft, gaps) for tokens, ttft, gaps in rows if tokens and ttft]
    return {"ttft": [ttft for ttft, _ in answered], "itl": [gap for _, gaps in answered for gap in gaps if gap > 0]}


def _levels(runs: Sequence[loads.Run]) -> list[dict[str, Scalar]]:
    """Return what names the load of each run; runs of the same load are numbered."""
    found: list[dict[str, Scalar]] = []
    for run in runs:
        told: dict[str, Scalar] = {"concurrency": run.concurrency} if run.concurrency is not None else {}
        if run.rate_per_s is not None:
            told = {"rate_per_s": run.rate_per_s, "arrivals": run.arrivals}
        same = sum(1 for other in found if {**other, "run": None} == {**told, "run": None})
        found.append(told | {"run": same + 1} if same else told)
    return found


def _measurements(run: loads.Run, load: dict[str, Scalar], requests: Mapping[str, Sequence[float]]) -> Iterator[Measurement]:
    """Yield the requests' own values, and each figure that they do not give as a single value; none where too many failed."""
    lost = run.failed / ((run.requests or 0) + run.failed) if run.failed else 0.0
    if lost > _MOST_FAILED:
        why = f"{100 * lost:.0f} % of its requests failed: its latencies are of the lucky ones"
        yield from (skipped(name.removesuffix("_s"), why, load) for name in run.measured)
        return
    for name, values in requests.items():
        if values:
            yield measurement(name, [values], parameters=load)
    for name, value in run.measured.items():
        if name.split("_")[0] not in requests:
            yield measurement(name.removesuffix("_s"), [[value]], parameters=load)


def _machine(runs: Sequence[loads.Run]) -> Machine:
    """Return the system as far as the file names it.  The lengths of requests vary a little by themselves: `sides` looks at them."""
    design, first = runs[0].design, runs[0]
    hard: dict[str, Scalar] = {"model": design.get("model"), "gpu": design.get("device")}
    means = zip(_LENGTHS, (first.prompt_tokens.mean, first.output_tokens.mean), strict=True)
    return Machine(hard=hard, soft={"engine": design.get("engine"), **{name: float(mean) for name, mean in means}})
