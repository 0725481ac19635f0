"""A worker of a run over several hosts: the loop of `loadtest.worker` under Locust's own WorkerRunner.  Started by `loadtest.fleet`.

Its job comes from the master, by Locust's messages, and its users are started by Locust's dealing.  Records go to a file on this host while
the load runs and to the master once it is over; a file the master never got stays, and is named.
"""

from __future__ import annotations

from mlsys_bench.loadtest import worker  # isort: skip  it must be the first: it imports Locust, which patches the interpreter
import argparse
import os
import tempfile
import time
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import gevent
from gevent.event import Event
from locust import runners
from locust.env import Environment
from locust.runners import STATE_INIT, WorkerRunner

from mlsys_bench.loadtest import child, job, words

_clock = time.monotonic
_PIECE_BYTES = 1 << 20  # of records, deflated before they are sent
_UNHEARD_S = 10.0  # without a heartbeat of the master (one a second) it is gone, and the load with it
_BUSY_S = 60.0  # before the start it may be packing a large job


class Over(Exception):
    """Why this worker has nothing to do."""


class MasterVoice:
    """How a worker hears its master, and speaks to it."""

    def __init__(self, runner: WorkerRunner, stopped: Event, errand: words.Errand) -> None:
        self.stopped = stopped
        self._runner, self._errand = runner, errand
        self._job, self._start, self._next = Event(), Event(), Event()
        self._work: job.Job | None = None
        self._at = 0.0
        self._refused = ""
        self.is_crowded = False  # another worker of this host was given the same core
        self._reported = (0, 0)
        reports: Any = runner.environment.events.report_to_master
        reports.add_listener(self._note_report)
        for name, hear in (
            (words.ASK_TIME, self._tell_time), (words.JOB, self._take), (words.START, self._note_start), (words.STOP, self._stop),
            (words.NEXT, self._note_next), (words.REFUSE, self._refuse),
        ):  # fmt: skip
            runner.register_message(name, hear)

    def work(self) -> job.Job:
        """Report, and return the job once it comes.  Raises Over where there is none for us."""
        hello = {
            "protocol": words.PROTOCOL,
            "host": self._errand.name,
            "core": self._errand.core,
            "has_headers": bool(self._errand.headers),
        }
        self._send(words.HELLO, hello)
        gevent.wait([self._job, self.stopped], timeout=self._errand.wait_s, count=1)
        if self._work is None:
            raise Over(self._refused or ("stopped before the start" if self.stopped.is_set() else "the master sent no job"))
        return replace(self._work, headers=self._errand.headers)

    def start(self) -> float | None:
        """Say that we are ready and return the moment of the common start in our own clock; None: there is none."""
        self._send(words.READY, {})
        gevent.wait([self._start, self.stopped], count=1)
        return None if self.stopped.is_set() else self._at

    def begin(self, runner: Any, users: int) -> None:
        """Be ready for the users that Locust's master deals out at the start."""
        runner.target_user_count = users

    def say(self, said: job.Said) -> None:
        """Pass on what a worker says to its parent: to the master, and to the parent of this host."""
        if said.hello is not None:
            words.say(words.Word(kind="started", number=said.hello))
        if said.progress is not None:
            self._send(words.TOLD, {"progress": job.encode(said.progress)})
            words.say(words.Word(kind="progress", progress=said.progress))

    def counted(self, done: job.Done) -> job.Done:
        """Return the last word with all that Locust counted: what it reports to its master it forgets here."""
        requests, failures = self._reported
        return replace(done, locust_requests=done.locust_requests + requests, locust_failures=done.locust_failures + failures)

    def finish(self, done: job.Done, rows: Path) -> bool:
        """Send the last word and then all records; say whether the master has them."""
        if self._refused:
            return False
        self._send(words.DONE, {"done": job.encode(done)})
        pack = zlib.compressobj(1)
        with rows.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                if not self._hand_over(pack.compress(piece), is_last=False):
                    return False
        return self._hand_over(pack.flush(), is_last=True)

    def watch(self) -> None:
        """End the load when the master is not heard any more."""
        while True:
            gevent.sleep(1.0)
            words.say(words.Word(kind="beat"))
            if self._is_alone():
                self.stopped.set()

    def _is_alone(self) -> bool:
        heard = self._runner.last_heartbeat_timestamp
        patience_s = _UNHEARD_S if self._start.is_set() else _BUSY_S
        return heard is not None and time.time() - heard > patience_s

    def _note_report(self, client_id: str, data: dict[str, Any]) -> None:
        requests, failures = self._reported
        total = data["stats_total"]
        self._reported = requests + total["num_requests"], failures + total["num_failures"]

    def _hand_over(self, piece: bytes, *, is_last: bool) -> bool:
        self._next.clear()
        self._send(words.ROWS, {"piece": piece, "last": is_last})
        while not self._next.wait(timeout=1.0):
            if self._is_alone():
                return False
        return True

    def _send(self, name: str, data: dict[str, Any]) -> None:
        self._runner.send_message(name, data)

    def _tell_time(self, environment: Any, msg: Any, **_: Any) -> None:
        heard = _clock()
        data = {**msg.data, "t2": heard, "wall": time.time() - _clock()}
        self._send(words.TIME, {**data, "t3": _clock()})

    def _take(self, environment: Any, msg: Any, **_: Any) -> None:
        self._work = job.decode_job(zlib.decompress(msg.data["job"]))
        self.is_crowded = bool(msg.data["crowded"])
        self._job.set()

    def _note_start(self, environment: Any, msg: Any, **_: Any) -> None:
        self._at = msg.data["at"]
        self._start.set()

    def _note_next(self, environment: Any, msg: Any, **_: Any) -> None:
        self._next.set()

    def _stop(self, environment: Any, msg: Any, **_: Any) -> None:
        self.stopped.set()

    def _refuse(self, environment: Any, msg: Any, **_: Any) -> None:
        self._refused = msg.data["why"]
        self._job.set()
        self.stopped.set()


def _connected(environment: Environment, errand: words.Errand) -> WorkerRunner:
    """Return Locust's worker once a master has answered.  Raises Over where none does."""
    runner: list[Any] = []
    runners.WORKER_REPORT_INTERVAL = 1.0  # s; three make a web UI that lags behind
    runners.CONNECT_RETRY_COUNT = max(1, round(errand.wait_s / runners.CONNECT_TIMEOUT))

    def connect() -> None:
        try:
            runner.append(environment.create_worker_runner(errand.host, errand.port))
        except Exception as error:  # a name that does not resolve, a master that never answers: Locust names neither
            runner.append(error)

    with gevent.Timeout(errand.wait_s, False):
        gevent.spawn(connect).join()
    if not runner or isinstance(runner[0], Exception):
        why = f": {runner[0]}" if runner and str(runner[0]) else f" within {errand.wait_s:g} s"
        raise Over(f"no master answers on {errand.host}:{errand.port}{why}")
    found: WorkerRunner = runner[0]
    # with none, it would read the files of Locust's command line on the way to the start
    environment.parsed_options = argparse.Namespace(headless=True, web_base_path="")
    return found


def _listen(commands: Any, stopped: Event, before: Event) -> None:
    """Stop on any word of the parent, or when it is gone; before there is a master to tell, leave at once."""
    commands.readline()
    stopped.set()
    if not before.is_set():
        os._exit(0)


def _work(errand: words.Errand, commands: Any) -> None:
    stopped, connected = Event(), Event()
    gevent.spawn(_listen, commands, stopped, connected)
    environment = Environment(catch_exceptions=False)
    runner = _connected(environment, errand)
    connected.set()
    voice = MasterVoice(runner, stopped, errand)
    words.say(words.Word(kind="joined", joined=words.Joined(host=errand.name, core=errand.core)))
    gevent.spawn(voice.watch)
    work = voice.work()
    if errand.core is not None and not voice.is_crowded and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {errand.core})
    rows = _rows_file(errand)
    words.say(words.Word(kind="kept", share=work.share, text=str(rows)))
    is_kept = False
    worker.allow_many_files()
    try:
        with open(rows, "wb", buffering=0) as file:  # noqa: PTH123  unbuffered: a row written is a row kept
            done = voice.counted(worker.load(replace(work, core=errand.core, rows=str(rows)), file, environment, runner, voice))
        runner.worker_state = STATE_INIT
        is_kept = voice.finish(done, rows)
        words.say(words.Word(kind="done", share=work.share, done=done))
    finally:
        if is_kept or not rows.stat().st_size:
            rows.unlink()
            words.say(words.Word(kind="kept", share=work.share))  # nothing lies here any more
    runner.greenlet.join(timeout=5)  # until the master says quit


def _rows_file(errand: words.Errand) -> Path:
    handle, name = tempfile.mkstemp(prefix="mlsys-loadtest-", suffix=".rows", dir=errand.folder)
    os.close(handle)
    return Path(name)


def main() -> int:
    """Do one errand."""
    commands = child.commands()
    line = commands.readline()
    if not line:
        return 0
    errand = words.decode_errand(line)
    try:
        _work(errand, commands)
    except Over as over:
        words.say(words.Word(kind="failed", text=str(over)))
    return 0


if __name__ == "__main__":
    os._exit(main())  # all is said and written; to take Locust's modules apart in order would cost another 0.1 s
