"""The parent's side of a run: one child per launch, its rounds collected as they come, so that nothing measured is lost."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import IO, Any

import msgspec

from mlsys_bench import errors, hardware
from mlsys_bench.bench.harness import Spec
from mlsys_bench.bench.options import Options, checked
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.types import Bench, Launch, Measurement, Round


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is.  `text` is a line to show, `rounds` the rounds of samples taken so far."""

    text: str
    launch: int
    launches: int
    rounds: int


@dataclasses.dataclass(slots=True, kw_only=True)
class _Cell:
    spec: Spec  # as planned; once sampled, with the features the engine reported
    launches: dict[int, list[Round]] = dataclasses.field(default_factory=dict)
    skipped: str | None = None


def run(options: Options, progress: Callable[[Progress], None] | None = None) -> Bench:
    """Measure and return the record.  Ctrl-C ends the child and returns what there is, the rest marked 'interrupted'.

    Raises BadInput for options that make no sense, MeasurementFailed when a child breaks.
    """
    options = checked(options)
    if importlib.util.find_spec("torch") is None:
        raise MeasurementFailed("measuring needs torch, which is not installed; pip install 'mlsys-bench[engine]'")
    show = progress or (lambda _: None)
    cells: dict[str, _Cell] = {}
    started: list[float] = []
    gpus = hardware.nvml_gpus()
    _say(show, gpus if isinstance(gpus, str) else f"{len(gpus)} GPU(s): {', '.join(str(g.get('name')) for g in gpus)}", options, 0, cells)
    try:
        for launch in range(options.launches):
            started.append(time.time())
            _one_launch(options, launch, cells, show)
    except KeyboardInterrupt:
        for cell in cells.values():
            cell.skipped = None if cell.launches else "interrupted"
    return Bench(measurements=tuple(_measurement(cell, started) for cell in cells.values() if cell.launches or cell.skipped))


def _one_launch(options: Options, launch: int, cells: dict[str, _Cell], show: Callable[[Progress], None]) -> None:
    with tempfile.TemporaryFile("w+") as trouble:
        child = subprocess.Popen(
            [sys.executable, "-m", "mlsys_bench.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=trouble,
            text=True,
            env=_environment(options.threads),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
        )
        try:
            is_done = _converse(child, options, launch, cells, show)
            status = child.wait()
        finally:
            _end(child)
        if not is_done:
            raise MeasurementFailed(f"the measuring process ended early ({_status(status)}): {_last_line(trouble)}")


def _converse(
    child: subprocess.Popen[str], options: Options, launch: int, cells: dict[str, _Cell], show: Callable[[Progress], None]
) -> bool:
    """Send the options and take in every message; return whether the child said it was done."""
    assert child.stdin is not None
    assert child.stdout is not None
    request = {"options": msgspec.to_builtins(options), "launch": launch, "spawned_s": time.time()}
    try:
        child.stdin.write(json.dumps(request))
        child.stdin.close()
    except BrokenPipeError:
        return False
    is_done = False
    for line in child.stdout:
        message = json.loads(line)
        text = _take(message, launch, cells)
        is_done = is_done or "done" in message
        if text:
            _say(show, text, options, launch, cells)
    return is_done


def _take(message: dict[str, Any], launch: int, cells: dict[str, _Cell]) -> str | None:
    """Take in one message; return a line worth showing, if it is one.  Raises the child's own error."""
    if "error" in message:
        raise getattr(errors, message["error"], MeasurementFailed)(message["text"])
    if "planned" in message:
        for planned in message["planned"]:
            _cell(planned, cells)
    if "sampled" in message:
        cell = _cell(message["of"], cells)
        cell.spec = msgspec.convert(message["sampled"], Spec)
        cell.launches.setdefault(launch, []).append(msgspec.convert(message["round"], Round))
        return cell.spec.name
    if "skipped" in message:
        cell = _cell(message["skipped"], cells)
        cell.skipped = None if cell.launches else message["why"]
    return message.get("say")


def _cell(planned: dict[str, Any], cells: dict[str, _Cell]) -> _Cell:
    key = json.dumps([planned["name"], planned["parameters"]], sort_keys=True)
    return cells.setdefault(key, _Cell(spec=msgspec.convert(planned, Spec)))


def _measurement(cell: _Cell, started: list[float]) -> Measurement:
    launches = [Launch(started_s=started[number], rounds=tuple(rounds)) for number, rounds in sorted(cell.launches.items())]
    spec = cell.spec
    return Measurement(
        name=spec.name, unit=spec.unit, better=spec.better, parameters=spec.parameters, launches=tuple(launches), skipped=cell.skipped
    )  # fmt: skip


def _say(show: Callable[[Progress], None], text: str, options: Options, launch: int, cells: dict[str, _Cell]) -> None:
    rounds = sum(len(r) for cell in cells.values() for r in cell.launches.values())
    show(Progress(text=text, launch=launch + 1, launches=options.launches, rounds=rounds))


def _environment(threads: int) -> dict[str, str]:
    """Return the child's environment: as many OpenMP threads as the layout says, before torch reads it."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _end(child: subprocess.Popen[str]) -> None:
    """Leave no process behind."""
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
    if child.stdout is not None:
        child.stdout.close()


def _status(status: int) -> str:
    return f"exit {status}" if status >= 0 else f"killed by signal {-status}, out of memory?" if status == -9 else f"signal {-status}"


def _last_line(trouble: IO[str]) -> str:
    trouble.seek(0)
    lines = [line.strip() for line in trouble if line.strip()]
    return lines[-1] if lines else "it left no message"
