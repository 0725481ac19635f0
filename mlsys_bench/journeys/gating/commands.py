"""Commands as the sides of a gate: one run is one launch.

What is measured is wall time (with CPU time and involuntary switches beside it), peak memory, and instructions where `perf` counts here.
With `{out}` in the command the figures are those of the file that it writes there instead, read as the result of a benchmark tool; peak
memory stays beside them.  How each figure is counted: `running`.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mlsys_bench import units
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.gate import readers
from mlsys_bench.journeys.gating import perf, running
from mlsys_bench.journeys.gating.source import Metric, Sampled
from mlsys_bench.types import Bench, Machine, Round
from mlsys_bench.verdicts import Subject

OUT = "{out}"
WALL = Metric(name="command.wall", unit="s", better="lower")
PEAK = Metric(name="command.peak_memory", unit="bytes", better="lower")
INSTRUCTIONS = Metric(name="command.instructions", unit="instructions", better="lower", deterministic=True)
SAME_COUNT = 0.002  # by which two runs of a program may differ and still count as the same: a fifth of the 1 % that counters gate at


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One side's command, and how it is run."""

    text: str  # as typed
    subject: Subject
    folder: Path = Path()
    environment: Mapping[str, str] | None = None  # None: ours
    read: str | None = None  # format of the file at {out}; None or auto: as it looks
    timeout_s: float = 600.0
    warmups: int = 1  # untimed runs before the first
    option: str = "--command"
    counters: bool = True

    @property
    def words(self) -> list[str]:
        """Return the command in words.  Raises BadInput."""
        return running.words(self.text, self.option)

    def placed(self, folder: Path, environment: Mapping[str, str]) -> Asked:
        """Return the same command in a folder and an environment."""
        return dataclasses.replace(self, folder=folder, environment=environment)


def sources(base: Asked, cand: Asked) -> tuple[Command, Command]:
    """Return both sides.  Raises BadInput where a command cannot be run as it is written."""
    for asked in (base, cand):
        if asked.read is not None and OUT not in asked.text:
            raise BadInput(f"--read {asked.read}: the command must say where it writes; put {OUT} in {asked.option}")
        assert asked.words
    both = _Both(base, cand)
    return Command(base, both, "base"), Command(cand, both, "cand")


class _Both:
    """What is done once, for both sides alike: untimed runs, and the counting of instructions."""

    def __init__(self, base: Asked, cand: Asked) -> None:
        self._asked = {"base": base, "cand": cand}
        self._is_ready = False
        self.instructions: dict[str, int] = {}
        self.remarks: list[str] = []

    def prepare(self) -> None:
        """Run both sides untimed, then count twice: what is not the same twice is no counter."""
        if self._is_ready:
            return
        self._is_ready = True
        for side, asked in self._asked.items():
            for _ in range(asked.warmups):
                _run(asked, side)
        if all(asked.counters for asked in self._asked.values()):
            self._count()

    def remark(self, text: str) -> None:
        """Keep a remark, once."""
        if text not in self.remarks:
            self.remarks.append(text)

    def _count(self) -> None:
        counts = {} if perf.missing() else {side: [_counted(asked, side) for _ in range(2)] for side, asked in self._asked.items()}
        why = f"instructions are not counted: {perf.missing()}" if perf.missing() else _uncounted(counts)
        if why is not None:
            self.remark(why)
        else:
            self.instructions = {side: first for side, (first, *_) in counts.items() if first is not None}


def _uncounted(counts: Mapping[str, list[int | None]]) -> str | None:
    """Return why the counts of two runs a side are no counters, None where they are."""
    for side, pair in counts.items():
        known = [count for count in pair if count]
        if len(known) < len(pair):
            return f"instructions are not counted: perf saw only a part of a run of the {_NAMES[side]}"
        apart = max(known) / min(known) - 1
        if apart > SAME_COUNT:
            return f"instructions are not gated: two runs of the {_NAMES[side]} differ by {100 * apart:.1f} %"
    return None


class Command:
    """A command as a `Source`."""

    together = False  # two runs at once would disturb each other
    turns = 1

    def __init__(self, asked: Asked, both: _Both, side: Literal["base", "cand"]) -> None:
        self.asked, self.side = asked, side
        self._both = both
        self._first: int | None = None  # pair

    @property
    def subject(self) -> Subject:
        """Return what is measured, as the record names it."""
        return self.asked.subject

    def launch(self, pair: int) -> Launched:
        """Return a run that starts with its turn."""
        self._first = pair if self._first is None else self._first
        return Launched(self.asked, self._both, self.side, counts=pair == self._first)

    def remarks(self) -> tuple[str, ...]:
        """Return what should stand beside the verdict."""
        return tuple(self._both.remarks)


class Launched:
    """One run of a command."""

    def __init__(self, asked: Asked, both: _Both, side: Literal["base", "cand"], *, counts: bool) -> None:
        self._asked, self._both, self._side, self._counts = asked, both, side, counts
        self._pid: int | None = None

    @property
    def pids(self) -> tuple[int, ...]:
        """Return the process group's leader while the command runs."""
        return () if self._pid is None else (self._pid,)

    def hello(self) -> Machine:
        """Return this machine; the first launch of all runs both sides untimed before."""
        self._both.prepare()
        return running.here()

    def turn(self, number: int) -> list[Sampled]:
        """Run once.  Raises MeasurementFailed where the command fails."""
        del number  # there is but one
        ran, bench = _run(self._asked, self._side, self._started)
        self._pid = None
        if ran.left_behind:
            self._both.remark(f"the {_NAMES[self._side]} left processes behind, which were ended: their CPU time is not counted")
        return [*(_read(bench) if bench is not None else _timed(ran)), *_peak(ran), *self._counted()]

    def close(self) -> None:
        """Forget the run: it ended with its turn."""
        self._pid = None

    def _started(self, pid: int) -> None:
        self._pid = pid

    def _counted(self) -> Iterator[Sampled]:
        count = self._both.instructions.get(self._side)
        if self._counts and count is not None:
            yield INSTRUCTIONS, Round(values=(float(count),))


_NAMES = {"base": "baseline", "cand": "candidate"}


def _timed(ran: running.Ran) -> Iterator[Sampled]:
    yield WALL, Round(values=(ran.wall_s,), cpu_s=(ran.cpu_s,), involuntary=(ran.involuntary,))


def _peak(ran: running.Ran) -> Iterator[Sampled]:
    if ran.peak_bytes is not None:
        yield PEAK, Round(values=(float(ran.peak_bytes),))


def _read(bench: Bench) -> Iterator[Sampled]:
    """Yield what a tool's file says, its processes as rounds of the one launch that this run is."""
    for m in bench.measurements:
        metric = Metric(name=m.name, unit=m.unit, better=m.better, parameters=m.parameters, deterministic=m.deterministic)
        for launch in m.launches if m.skipped is None else ():
            yield from ((metric, one) for one in launch.rounds if one.values)


# ---------------------------------------------------------------- one run


def _run(asked: Asked, side: str, on_start: Callable[[int], None] = lambda _: None) -> tuple[running.Ran, Bench | None]:
    """Run a command once and read what it wrote, if it says where."""
    with tempfile.TemporaryDirectory(prefix="mlsys-gate-") as folder:
        out = Path(folder) / "out.json"
        ran = _ended_well(asked, side, [word.replace(OUT, str(out)) for word in asked.words], on_start)
        return ran, _bench(asked, side, out) if OUT in asked.text else None


def _counted(asked: Asked, side: str) -> int | None:
    with tempfile.TemporaryDirectory(prefix="mlsys-gate-") as folder:
        words = [word.replace(OUT, str(Path(folder) / "out.json")) for word in asked.words]
        counts = Path(folder) / "perf"
        _ended_well(asked, side, perf.counting(words, counts))
        return perf.read(counts.read_text(encoding="utf-8"))


def _ended_well(asked: Asked, side: str, words: list[str], on_start: Callable[[int], None] = lambda _: None) -> running.Ran:
    environment = os.environ if asked.environment is None else asked.environment
    try:
        ran = running.run(words, folder=asked.folder, environment=environment, timeout_s=asked.timeout_s, on_start=on_start)
    except TimeoutError:
        said = f"the {_NAMES[side]} ran for more than {units.show_s(asked.timeout_s)}: {asked.text}"
        raise MeasurementFailed(f"{said}; does it wait for something? --run-timeout gives it longer") from None
    if ran.status:
        how = f"ended with status {ran.status}" if ran.status > 0 else f"was killed by signal {-ran.status}"
        raise MeasurementFailed(f"the {_NAMES[side]} {how}: {ran.last_words or 'it said nothing'} ({asked.text})")
    return ran


def _bench(asked: Asked, side: str, out: Path) -> Bench:
    if not out.is_file():
        raise MeasurementFailed(f"the {_NAMES[side]} wrote nothing to {OUT}: {asked.text}")
    try:
        text = out.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{OUT} of the {_NAMES[side]}: holds no text, so no result of a benchmark tool: {asked.text}") from error
    bench = readers.parse(text, f"{OUT} of the {_NAMES[side]}", None if asked.read == "auto" else asked.read).bench
    if not any(m.launches for m in bench.measurements if m.skipped is None):
        raise MeasurementFailed(f"the {_NAMES[side]} measured nothing: {OUT} holds no samples ({asked.text})")
    return bench
