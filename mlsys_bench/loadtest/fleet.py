"""The parent's side of a run over several hosts: it starts Locust's master as a process of its own and hears what that has to say.

Also the side of a host that only lends its cores (`join`): it starts workers which report to a master elsewhere.
"""

from __future__ import annotations

import dataclasses
import platform
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest import job, payloads, words
from mlsys_bench.loadtest.auth import Headers
from mlsys_bench.loadtest.crew import OnProgress, Process, Report, Total, interrupts, listen

_SILENCE_S = 30.0  # master and workers speak every second
_CONNECT_S = 660.0  # a worker that looks for its master is silent

OnNote = Callable[[str], None] | None


class Fleet:
    """A master and its workers: on other hosts, or `local` ones of this machine.  Used like `crew.Crew`."""

    def __init__(self, orders: words.Orders, local: Sequence[int | None], on_note: OnNote) -> None:
        self.reports = [Report(share=i, rows=Path(path), host="") for i, path in enumerate(orders.rows)]
        self._orders, self._local, self._note = orders, local, on_note or _nothing
        self._master = Process("mlsys_bench.loadtest.master")
        self._master.tell(words.encode(orders) + b"\n")
        self._workers = [Process("mlsys_bench.loadtest.remote") for _ in local]
        self._why = ""
        self._headers: list[tuple[str, str]] = []
        self._lost: dict[int, str] = {}
        self._kept: set[int] = set()
        self._was_given = self._was_started = self._ended = False
        self._stops = 0

    def run(self, work: job.Job, on_progress: OnProgress = None) -> list[Report]:
        """Let the workers do a job together and return what became of each.

        One that is lost on the way has no `done`; the others go on.  Raises BadInput where the master cannot listen and MeasurementFailed
        where the run cannot begin.
        """
        total = Total(len(self.reports), on_progress, lambda: self._stop(1))
        whole = dataclasses.replace(work, payload=payloads.loaded(work.payload))  # the file it may lie in is on this host
        self._headers = [*work.headers, *([("Authorization", f"Bearer {work.api_key}")] if work.api_key else [])]
        with interrupts(self._stop):
            self._master.tell(job.encode(whole) + b"\n")
            self._was_given = True
            if self._stops:
                self._stop(self._stops)
            listen(
                [self._master, *self._workers],
                hear=lambda process, line: self._hear(process, line, total),
                gone=self._lose,
                patience_s=lambda: _SILENCE_S,
            )
        self.end()
        if not self._was_started:
            why = self._why or f"the master died {self._last_words}"
            raise BadInput(why) if why.startswith(("cannot listen", "the web UI")) else MeasurementFailed(f"the load never started: {why}")
        for report in self.reports:
            report.last_words = self._lost.get(report.share, f"with the master {self._last_words}")
            if report.share not in self._kept:
                report.done = None  # its last word came, its records did not
        return self.reports

    def end(self) -> None:
        """Leave no process behind."""
        if not self._ended:
            self._ended = True
            for process in (self._master, *self._workers):
                if not self._was_given:
                    process.kill()  # it may still be importing; nobody waits for that
            self._last_words = self._master.end()
            for process in self._workers:
                process.end()

    def _hear(self, process: Process, line: bytes, total: Total) -> None:
        word = words.decode_word(line)
        if process is self._master:
            self._hear_master(word, total)
        elif word.kind == "failed":
            self._why = self._why or word.text

    def _hear_master(self, word: words.Word, total: Total) -> None:
        report = self.reports[word.share]
        match word.kind:
            case "listening":
                self._send_out(int(word.number))
            case "web":
                self._note(f"Locust's web UI: {word.text}")
            case "joined" if word.joined is not None:
                is_new = not report.host
                report.host, report.core = word.joined.host, word.joined.core
                if is_new and not self._local:
                    self._note(f"worker {word.share + 1} of {len(self.reports)} is here: {report.host}")
            case "clock":
                report.clock = word.clock
            case "started":
                self._was_started = True
                for each in self.reports:
                    each.t0_unix_s = word.number
            case "progress" if word.progress is not None:
                report.hear(word.progress)
                total.add(word.share, word.progress)
            case "lost":
                total.without(word.share)
                self._lost[word.share] = "unheard by the master; what it recorded lies on its host"
                self._note(f"worker {word.share} on {report.host} is not heard any more")
            case "found":
                self._lost.pop(word.share, None)
                self._note(f"worker {word.share} on {report.host} is back")
            case "done":
                report.done = word.done
            case "kept":
                self._kept.add(word.share)
            case "failed":
                self._why = self._why or word.text
            case _:
                return  # a beat

    def _send_out(self, port: int) -> None:
        """Give workers of this machine their errand; tell people where others may report."""
        host = "127.0.0.1"
        for worker, core in zip(self._workers, self._local, strict=True):
            errand = words.Errand(
                host=host, port=port, core=core, folder=tempfile.gettempdir(), name=platform.node(), headers=self._headers
            )
            worker.tell(words.encode(errand) + b"\n")
        if not self._local:
            self._note(f"waiting for {len(self.reports)} workers: mlsys loadtest --worker {platform.node()}:{port}")

    def _lose(self, process: Process) -> None:
        """End the workers of this machine when their master is gone."""
        if process is self._master:
            for worker in self._workers:
                worker.tell(b"stop\n")
        elif not self._was_started:
            self._why = self._why or f"a load worker died {process.end()}"
            self._master.tell(b"stop\n")

    def _stop(self, count: int) -> None:
        """Ask for an end the first time, force it the second.  A word put into the middle of a job would spoil it: it waits."""
        self._stops = count
        if count > 1:
            for process in (self._master, *self._workers):
                process.kill()
        elif self._was_given:
            self._master.tell(b"stop\n")


def join(
    host: str, port: int, cores: Sequence[int | None], *, folder: Path, headers: Headers = (), on_progress: OnProgress, on_note: OnNote
) -> None:
    """Lend this host's cores to a master and return when its run is over.  `headers` are this host's: the master's never travel.

    Raises MeasurementFailed where no master answers, or where it went away before it had the records: those are named, and kept; and
    KeyboardInterrupt, once all is over, where a person ended it here.
    """
    workers = [Process("mlsys_bench.loadtest.remote") for _ in cores]
    note, total = on_note or _nothing, Total(len(cores), on_progress)
    kept: dict[Process, str] = {}
    failed: list[str] = []

    def hear(process: Process, line: bytes) -> None:
        word, at = words.decode_word(line), workers.index(process)
        if word.kind == "joined":
            note(f"worker {at + 1} of {len(workers)} reported to {host}:{port}")
        elif word.kind == "progress" and word.progress is not None:
            total.add(at, word.progress)
        elif word.kind == "done" and word.done is not None:
            note(f"worker {at + 1} of {len(workers)} sent {word.done.sent} requests")
        elif word.kind == "kept":
            kept[process] = word.text  # nothing, once the master has it
        elif word.kind == "failed":
            failed.append(word.text)

    stops: list[int] = []

    def stop(count: int) -> None:
        stops.append(count)
        for worker in workers:
            if count > 1:
                worker.kill()
            else:
                worker.tell(b"stop\n")

    try:
        with interrupts(stop):
            for worker, core in zip(workers, cores, strict=True):
                errand = words.Errand(host=host, port=port, core=core, folder=str(folder), name=platform.node(), headers=list(headers))
                worker.tell(words.encode(errand) + b"\n")
            listen(workers, hear=hear, gone=lambda worker: total.without(workers.index(worker)), patience_s=lambda: _CONNECT_S)
    finally:
        ends = [worker.end() for worker in workers]
    died = [end for end in ends if end != "with status 0"]
    files = ", ".join(text for text in kept.values() if text)
    if stops and not files:
        raise KeyboardInterrupt
    if failed or died or files:
        why = failed[0] if failed else f"a load worker died {died[0]}" if died else f"the master at {host}:{port} went away"
        raise MeasurementFailed(f"{why}; the records the master did not get are kept in {files}" if files else why)


def address(text: str) -> tuple[str, int]:
    """Return host and port of HOST[:PORT], [IPv6]:PORT.  Raises BadInput."""
    host, _, port = text.rpartition(":") if text.count(":") == 1 or "]:" in text else (text, "", str(words.PORT))
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise BadInput(f"--worker {text}: name the master as HOST or HOST:PORT, e.g. 10.0.0.5:{words.PORT}")
    return host.strip("[]"), int(port)


def _nothing(_: str) -> None:
    return
