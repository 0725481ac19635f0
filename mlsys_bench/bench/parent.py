"""The parent's side of a run: one child per launch, its rounds collected as they come, so that nothing measured is lost."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import msgspec

from mlsys_bench import errors, hardware, samples
from mlsys_bench.bench import telemetry
from mlsys_bench.bench.harness import Spec
from mlsys_bench.bench.options import Options, checked
from mlsys_bench.bench.telemetry import Seen, Telemeter
from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.types import Bench, Launch, Measurement, Round

_WORST = ("settled", "budget", "drifting")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run is.  `text` is a line to show, `rounds` the rounds of samples taken so far; the rest takes at most `left_s`."""

    text: str
    launch: int
    launches: int
    rounds: int
    left_s: float | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class _Cell:
    spec: Spec  # as planned; once sampled, with the features the engine reported
    launches: dict[int, list[Round]] = dataclasses.field(default_factory=dict)
    skipped: str | None = None
    is_planned: bool = False  # visited again and again; else it happens once a launch
    error: float | None = None  # the largest of the launches
    tolerance: float | None = None


@dataclasses.dataclass(slots=True, kw_only=True)
class _Run:
    """What a run has come to."""

    options: Options
    show: Callable[[Progress], None]
    cells: dict[str, _Cell] = dataclasses.field(default_factory=dict)
    started: list[float] = dataclasses.field(default_factory=list)
    seen: list[Seen] = dataclasses.field(default_factory=list)
    unread: list[str] = dataclasses.field(default_factory=list)
    cores: tuple[int, ...] = ()
    involuntary: int | None = None
    stopped: str | None = None

    def say(self, text: str, left_s: float | None = None) -> None:
        """Show a line."""
        rounds = sum(len(r) for cell in self.cells.values() for r in cell.launches.values())
        launch = max(1, len(self.started))
        self.show(Progress(text=text, launch=launch, launches=self.options.launches, rounds=rounds, left_s=left_s))

    def record(self) -> Bench:
        """Return the record of what there is."""
        shares = [_leave_out_crowded(self.cells.values(), launch) for launch in range(len(self.started))]
        measured = (_measurement(cell, self.started) for cell in self.cells.values() if cell.launches or cell.skipped)
        return Bench(
            measurements=tuple(measured),
            contended=tuple(dict.fromkeys([*(why for seen in self.seen for why in seen.contended), *telemetry.shared(shares)])),
            telemetry=tuple(seen.telemetry for seen in self.seen),
            unread=tuple(dict.fromkeys([*self.unread, *(text for seen in self.seen for text in seen.unread)])),
            stopped=self.stopped,
        )


def run(options: Options, progress: Callable[[Progress], None] | None = None) -> Bench:
    """Measure and return the record.  Ctrl-C ends the child and returns what there is, the rest marked 'interrupted'.

    Raises BadInput for options that make no sense, MeasurementFailed when a child breaks.
    """
    options = checked(options)
    if importlib.util.find_spec("torch") is None:
        raise MeasurementFailed("measuring needs torch, which is not installed; pip install 'mlsys-bench[engine]'")
    run = _Run(options=options, show=progress or (lambda _: None))
    gpus = hardware.nvml_gpus()
    run.say(gpus if isinstance(gpus, str) else f"{len(gpus)} GPU(s): {', '.join(str(g.get('name')) for g in gpus)}")
    try:
        for launch in range(options.launches):
            run.started.append(time.time())
            with _watched(run):
                _one_launch(run, launch)
    except KeyboardInterrupt:
        run.stopped = f"stopped by hand in launch {len(run.started)} of {options.launches}"
        for cell in run.cells.values():
            cell.skipped = None if cell.launches else "interrupted"
    return run.record()


@contextlib.contextmanager
def _watched(run: _Run) -> Iterator[None]:
    """Look at the machine meanwhile, also when a Ctrl-C ends it."""
    meter, run.involuntary = Telemeter(), None
    meter.start()
    try:
        yield
    finally:
        run.seen.append(meter.stop(run.cores, run.involuntary))


def _one_launch(run: _Run, launch: int) -> None:
    with tempfile.TemporaryFile("w+") as trouble:
        child = subprocess.Popen(
            [sys.executable, "-m", "mlsys_bench.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=trouble,
            text=True,
            env=_environment(run.options.threads),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends the child
        )
        try:
            is_done = _converse(child, run, launch)
            status = child.wait()
        finally:
            _end(child)
        if not is_done:
            raise MeasurementFailed(f"the measuring process ended early ({_status(status)}): {_last_line(trouble)}")


def _converse(child: subprocess.Popen[str], run: _Run, launch: int) -> bool:
    """Send the options and take in every message; return whether the child said it was done."""
    assert child.stdin is not None
    assert child.stdout is not None
    request = {"options": msgspec.to_builtins(run.options), "launch": launch, "spawned_s": time.time()}
    try:
        child.stdin.write(json.dumps(request))
        child.stdin.close()
    except BrokenPipeError:
        return False
    is_done = False
    for line in child.stdout:
        message = json.loads(line)
        _take(message, launch, run)
        is_done = is_done or "done" in message
    return is_done


def _take(message: dict[str, Any], launch: int, run: _Run) -> None:
    """Take in one message.  Raises the child's own error."""
    match message:
        case {"error": error, "text": text}:
            raise getattr(errors, error, MeasurementFailed)(text)
        case {"planned": specs}:
            for planned in specs:
                _cell(planned, run.cells).is_planned = True
        case {"cores": cores}:
            run.cores = tuple(cores)
        case {"sampled": spec, "of": planned, "round": taken}:
            cell = _cell(planned, run.cells)
            cell.spec = msgspec.convert(spec, Spec)
            cell.launches.setdefault(launch, []).append(msgspec.convert(taken, Round))
            run.say(cell.spec.name)
        case {"checked": planned, "error": error, "tolerance": tolerance}:
            cell = _cell(planned, run.cells)
            cell.error, cell.tolerance = max(filter(None, (cell.error, error)), default=error), tolerance
        case {"skipped": planned, "why": why}:
            cell = _cell(planned, run.cells)
            cell.skipped = None if cell.launches else why
        case {"settled": done, "of": of, "left_s": left_s}:
            run.say(f"{done} of {of} have settled; at most {left_s:.0f} s to go", left_s)
        case {"unread": text}:
            run.unread.append(text)
        case {"done": _, "involuntary": involuntary}:
            run.involuntary = involuntary
        case {"say": text}:
            run.say(text)


def _cell(planned: dict[str, Any], cells: dict[str, _Cell]) -> _Cell:
    key = json.dumps([planned["name"], planned["parameters"]], sort_keys=True)
    return cells.setdefault(key, _Cell(spec=msgspec.convert(planned, Spec)))


def _leave_out_crowded(cells: Iterable[_Cell], launch: int) -> float:
    """Flag a launch's samples around which a neighbour shared a core; return how large a share of its visits those were."""
    rounds = [r for cell in cells for r in cell.launches.get(launch, ())]
    least = samples.least_crowding([c for r in rounds for c in (r.crowding or ())[:1]])
    for cell in cells:
        if launch in cell.launches:
            cell.launches[launch] = samples.without_crowded(cell.launches[launch], least)
    asked = [samples.crowded(r, least) for r in rounds if r.crowding]
    return sum(asked) / len(asked) if asked else 0.0


def _measurement(cell: _Cell, started: list[float]) -> Measurement:
    """Return a cell as it is kept: launches that drifted are put aside, for their median is of no time in particular."""
    courses = {number: samples.ended(samples.blocks_of(rounds)) if cell.is_planned else None for number, rounds in cell.launches.items()}
    late = {number: tuple(samples.without_early(rounds)) for number, rounds in sorted(cell.launches.items())}
    launches = {number: Launch(started_s=started[number], rounds=rounds) for number, rounds in late.items()}
    steady = tuple(launch for number, launch in launches.items() if courses[number] != "drifting")
    drifted = tuple(launch for number, launch in launches.items() if courses[number] == "drifting")
    spec, skipped = cell.spec, cell.skipped
    if courses and not steady:
        skipped = _drift(cell.launches.values())
    return Measurement(
        name=spec.name, unit=spec.unit, better=spec.better, parameters=spec.parameters, launches=steady, skipped=skipped, drifted=drifted,
        deterministic=spec.deterministic, work=spec.work, error=cell.error, tolerance=cell.tolerance,
        ended=max((how for how in courses.values() if how is not None), key=_WORST.index, default=None),
    )  # fmt: skip


def _drift(launches: Iterable[list[Round]]) -> str:
    """Return why a measurement is refused."""
    trends = [found for rounds in launches if (found := samples.drift(samples.blocks_of(rounds))) is not None]
    worst = max(trends, key=lambda trend: abs(trend.change))
    return f"drifting: it changed by {worst.change:+.1%} while it was measured (p = {worst.p:.2g}), so no median stands for it"


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
