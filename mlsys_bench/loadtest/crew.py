"""Worker processes of this machine, spoken to together: all import Locust at once, start at one instant, end with their parent."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlsys_bench import ahead, hardware
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest import Progress, job
from mlsys_bench.loadtest.clocks import Clock
from mlsys_bench.types import RequestRecord

_START_S = 60.0  # for a worker to import Locust on a busy machine and to open its connections
_SILENCE_S = 30.0  # a worker speaks every second
_LEAD_S = 0.02  # from the word to start to the start, for each worker: all must have heard it
_END_S = 5.0  # for a process to end by itself

OnProgress = Callable[[Progress], bool | None] | None  # True: end the run, as Ctrl-C does


@dataclasses.dataclass(slots=True, kw_only=True)
class Report:
    """What is known of one worker and its share; grows while the run lasts."""

    share: int
    rows: Path
    host: str
    core: int | None = None
    t0_unix_s: float = 0.0
    done: job.Done | None = None
    last_words: str = ""
    clock: Clock | None = None
    records: Sequence[RequestRecord] = ()
    cpu: list[tuple[float, float]] = dataclasses.field(default_factory=list)  # second of the run, share of a core in the one before

    def hear(self, progress: Progress) -> None:
        """Keep what belongs to the course of the run."""
        self.cpu.append((progress.t_s, progress.cpu_share))


class Process:
    """A Python module in a process and a session of its own: Ctrl-C reaches only us.  It ends when our end of its pipe closes."""

    def __init__(self, module: str, *arguments: str) -> None:
        self._process, self._errors = ahead.process(module, *arguments)
        self._buffer = b""
        self._ended = ""
        self.heard = time.monotonic()

    def fileno(self) -> int:
        """Return where its words come out."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def tell(self, line: bytes) -> None:
        """Say a line to it; a process that is gone does not mind."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def read(self) -> list[bytes] | None:
        """Return the lines that have come, or None when there will be no more."""
        data = os.read(self.fileno(), 1 << 20)
        self.heard = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        return lines if data else None

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def end(self) -> str:
        """Leave no process and no pipe, and return how it ended."""
        if not self._ended:
            self._ended = self._end()
        return self._ended

    def _end(self) -> str:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        with self._errors:
            self._errors.seek(0)
            wrote = self._errors.read().decode(errors="replace").strip()
        code = self._process.returncode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        return f"{how}{': ' + wrote.splitlines()[-1] if wrote else ''}"


def listen(
    processes: Sequence[Process],
    hear: Callable[[Process, bytes], None],
    gone: Callable[[Process], None],
    patience_s: Callable[[], float],
) -> None:
    """Hear what processes say until each has closed its pipe and is gone.  One that is silent for longer than our patience is killed."""
    by_pipe = {process.fileno(): process for process in processes}
    with selectors.DefaultSelector() as selector:
        for fd in by_pipe:
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select(1.0):
                process = by_pipe[key.fd]
                lines = process.read()
                for line in lines or ():
                    hear(process, line)
                if lines is None:
                    selector.unregister(key.fd)
                    gone(process)
            for process in [by_pipe[key.fd] for key in selector.get_map().values()]:
                if time.monotonic() - process.heard > patience_s():
                    process.kill()


@contextlib.contextmanager
def interrupts(on_stop: Callable[[int], None]) -> Iterator[None]:
    """Call with 1, 2, ... for each Ctrl-C or SIGTERM, instead of what they did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    count = 0

    def heard(*_: object) -> None:
        nonlocal count
        count += 1
        on_stop(count)

    before = {number: signal.signal(number, heard) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Crew:
    """Workers of one run on this machine.  They start on creation: importing Locust takes 0.8 s, in which the target can be looked at."""

    def __init__(self, rows: Sequence[Path], cores: Sequence[int | None]) -> None:
        self.reports = [
            Report(share=i, rows=path, host=platform.node(), core=core) for i, (path, core) in enumerate(zip(rows, cores, strict=True))
        ]
        self._workers = [Process("mlsys_bench.loadtest.worker") for _ in rows]
        self._ready: set[Process] = set()
        self._started = self._ended = False
        self._was_given = False
        self._stops = 0
        self._refused = ""

    def run(self, work: job.Job, on_progress: OnProgress = None) -> list[Report]:
        """Let each worker do its share of a job and return what became of each.

        One that dies on the way has no `done`; the others go on.  Raises MeasurementFailed when one dies before the start, and BadInput
        where it says that what a person gave cannot be used.
        """
        total = Total(len(self._workers), on_progress, lambda: self._stop(1))
        with interrupts(self._stop):
            for worker, report in zip(self._workers, self.reports, strict=True):
                mine = job.part(work, report.share, len(self._workers))
                worker.tell(job.encode(dataclasses.replace(mine, core=report.core, rows=str(report.rows))) + b"\n")
            self._was_given = True
            if self._stops:
                self._stop(self._stops)
            listen(
                self._workers,
                hear=lambda worker, line: self._hear(worker, line, total),
                gone=lambda worker: self._lose(worker, total),
                patience_s=lambda: _SILENCE_S if self._started else _START_S,
            )
        self.end()
        if self._refused:
            raise BadInput(self._refused)
        lost = [report for report in self.reports if report.done is None]
        if lost and not self._started:
            raise MeasurementFailed(f"a load worker died before the start {lost[0].last_words}")
        return self.reports

    def end(self) -> None:
        """Leave no process behind."""
        if not self._ended:
            self._ended = True
            for worker in self._workers:
                if not self._was_given:
                    worker.kill()  # it may still be importing; nobody waits for that
            for worker, report in zip(self._workers, self.reports, strict=True):
                report.last_words = worker.end()

    def _hear(self, worker: Process, line: bytes, total: Total) -> None:
        said, report = job.decode_said(line), self.reports[self._workers.index(worker)]
        report.t0_unix_s = said.hello or report.t0_unix_s
        report.done = said.done or report.done
        self._refused = said.refused or self._refused
        if said.ready:
            self._ready.add(worker)
            self._start()
        if said.progress is not None:
            report.hear(said.progress)
            total.add(report.share, said.progress)

    def _start(self) -> None:
        """Start all, once all are ready."""
        if len(self._ready) == len(self._workers) and not self._started:
            self._started = True
            line = job.start_line(time.monotonic() + _LEAD_S * len(self._workers))
            for worker in self._workers:
                worker.tell(line)

    def _lose(self, worker: Process, total: Total) -> None:
        """Go on without one that is gone; before the start nobody goes."""
        total.without(self._workers.index(worker))
        if not self._started:
            for other in self._workers:
                other.tell(b"stop\n")

    def _stop(self, count: int) -> None:
        """Ask for an end the first time, force it the second.  A word put into the middle of a job would spoil it: it waits."""
        self._stops = count
        for worker in self._workers:
            if count > 1:
                worker.kill()
            elif self._was_given:
                worker.tell(b"stop\n")


class Total:
    """Adds up what several workers say of the same second, and passes it on."""

    def __init__(self, workers: int, on_progress: OnProgress, stop: Callable[[], None] = lambda: None) -> None:
        self._on_progress, self._stop = on_progress, stop
        self._last: dict[int, Progress] = {}
        self._heard: set[int] = set()
        self._alive = set(range(workers))

    def add(self, share: int, progress: Progress) -> None:
        """Take what one worker says; tell the sum once each that is alive has spoken."""
        is_again = share in self._heard  # somebody else is slow, or gone
        self._last[share] = progress
        if is_again or self._heard | {share} >= self._alive:
            self._heard = set()
            self._tell()
        else:
            self._heard.add(share)

    def without(self, share: int) -> None:
        """Wait no longer for one that is gone; what it sent stays counted."""
        self._alive.discard(share)

    def _tell(self) -> None:
        if self._on_progress is not None and self._on_progress(summed(list(self._last.values()))):
            self._stop()


def summed(said: Sequence[Progress]) -> Progress:
    """Return the progress of all workers together: counts and rates add up, of times the worst holds."""
    added = {name: sum(getattr(p, name) for p in said) for name in ("sent", "ok", "failed", "in_flight", "sent_per_s")}
    worst = {name: max(getattr(p, name) for p in said) for name in ("t_s", "lateness_s", "cpu_share")}
    return dataclasses.replace(said[0], **added, **worst)


# ---------------------------------------------------------------- cores


def usable_cores() -> list[int]:
    """Return the cores this process may use; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _whole_cores() -> int:
    """Return how many cores this process may use at once: a container may see all of a host and be given two."""
    quota = hardware.cpu_quota()
    seen = len(usable_cores()) or os.cpu_count() or 1
    return seen if quota is None else max(1, min(seen, int(quota)))


def spare_cores(count: int) -> int:
    """Return how many cores are left beside so many workers."""
    return _whole_cores() - count


_MOST = 16  # workers on a machine however few its cores: more only take its memory


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine by its name."""
    return host in ("localhost", "::1") or host.startswith("127.")


def how_many(wanted: object, host: str, users: int | None) -> int:
    """Return how many workers to start.  auto: one per usable core, save one for a server on this machine; never more than users."""
    if wanted == "auto":
        count = max(1, _whole_cores() - is_loopback(host))
    elif isinstance(wanted, int) and wanted >= 1:
        count, most = wanted, max(_MOST, 4 * _whole_cores())
        if count > most:
            raise BadInput(f"--processes {wanted}: {_whole_cores()} core(s) here, and each worker wants one; {most} at most, or auto")
    else:
        raise BadInput(f"--processes {wanted}: give a number of worker processes, or auto for one per core")
    return min(count, users) if users else count


def cores(wanted: object, count: int) -> list[int | None]:
    """Return the core of each worker: the last ones this process may use, where there are two and enough; one asked for is for all.

    None of a container with a CPU quota below what it sees: its neighbours see the same cores and would choose the same.
    """
    allowed = usable_cores()
    if wanted == "auto":
        enough = len(allowed) >= max(2, count) and _whole_cores() == len(allowed)
        return list(reversed(allowed[-count:])) if enough else [None] * count
    if wanted is None or wanted in allowed:
        return [wanted if isinstance(wanted, int) else None] * count
    raise BadInput(f"core {wanted} is not among the cores this process may use: {', '.join(map(str, allowed)) or 'unknown here'}")
