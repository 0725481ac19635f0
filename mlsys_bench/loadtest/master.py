"""The process that leads workers on several hosts: Locust's own master.  Started by `loadtest.fleet`, never imported by it.

It sends nothing to the target.  Workers report by Locust's messages; each gets its share of the job, learns the common start in its own
clock, and sends its records once its load is over.  Its parent hears of all that in JSON lines (`words.Word`).
"""

from __future__ import annotations

import locust  # isort: skip  it must be the first: it patches the interpreter
import os
import platform
import socket
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import gevent
import msgspec
from gevent.event import AsyncResult, Event
from locust.env import Environment
from locust.runners import STATE_MISSING, MasterRunner
from locust.stats import stats_history

from mlsys_bench.loadtest import Progress, child, clocks, job, words
from mlsys_bench.loadtest.client import authority

_clock = time.monotonic
_EXCHANGES = 16  # of stamps with each worker, before and after
_ANSWER_S = 5.0  # for one of them
_READY_S = 60.0  # for all workers to open their connections
_SILENCE_S = 60.0  # after the longest a run can take, and after each piece of records
_LEAD_S = 0.3  # from the word to start to the start, beside the slowest way to a worker


class Sender(locust.User):
    """Stands for the users of the workers, so that Locust can deal them out."""

    @locust.task
    def wait(self) -> None:
        """End at once: a master has no users of its own."""
        raise locust.exception.StopUser


class Once(MasterRunner):
    """Locust's master, but users are dealt out once.

    By itself it deals anew whenever a worker comes or goes, or when somebody asks for it in the browser.
    """

    is_dealt = False

    def start(self, user_count: int, spawn_rate: float, wait: bool = False, user_classes: Any = None) -> None:
        """Deal out users, the first time only."""
        if not self.is_dealt:
            self.is_dealt = True
            super().start(user_count, spawn_rate, wait, user_classes)


@dataclass(slots=True)
class Member:
    """One worker."""

    id: str
    share: int
    joined: words.Joined
    has_headers: bool
    before: clocks.Clock | None = None
    kept: bool = False  # all its records are here
    compared: bool = False  # its clock was looked at once more
    missing_since: float | None = None
    file: Any = None
    unpack: Any = field(default_factory=zlib.decompressobj)

    @property
    def through(self) -> bool:
        """Whether nothing more is to come."""
        return self.kept and self.compared


class Failed(Exception):
    """Why a run cannot begin."""


class Master:
    """One run."""

    def __init__(self, orders: words.Orders) -> None:
        self._orders = orders
        self._members: dict[str, Member] = {}
        self._stopped, self._is_full, self._ready = Event(), Event(), set[str]()
        self._all_ready = Event()
        self._back: dict[tuple[str, int], AsyncResult] = {}
        self._questions = 0
        self._patience_until = 0.0
        self._environment = Environment(user_classes=[Sender], catch_exceptions=False)
        self._runner = self._environment.runner = _bound(self._environment, orders)
        for name, hear in (
            (words.HELLO, self._greet), (words.TIME, self._time), (words.READY, self._note_ready), (words.TOLD, self._pass_on),
            (words.DONE, self._note_done), (words.ROWS, self._write),
        ):  # fmt: skip
            self._runner.register_message(name, hear)
        stopping: Any = self._environment.events.test_stopping
        stopping.add_listener(lambda **_: self.stop())
        words.say(words.Word(kind="listening", number=self._runner.server.port))

    def stop(self) -> None:
        """Ask every worker for an end."""
        self._stopped.set()
        self._runner.send_message(words.STOP)

    def dismiss(self, why: str) -> None:
        """Tell every worker that there is no run, and why."""
        self._runner.send_message(words.REFUSE, {"why": why})

    def lead(self, work: job.Job) -> None:
        """Wait for the workers, start them together, see them through."""
        gevent.spawn(_beat)
        self._environment.host = f"{work.scheme}://{work.host}:{work.port}"
        if self._orders.web is not None:
            words.say(words.Word(kind="web", text=_web(self._environment, *self._orders.web)))
            gevent.spawn(stats_history, self._runner)
        self._wait(self._is_full, self._orders.wait_s, "not all workers reported")
        members = sorted(self._members.values(), key=lambda m: m.share)
        _check_headers(work, members)
        _check_address(work, members)
        for member in members:
            member.before = self._compare(member)
            words.say(words.Word(kind="clock", share=member.share, clock=member.before))
        cores = Counter((m.joined.host, m.joined.core) for m in members)
        for member in members:
            self._send_job(work, member, is_crowded=cores[member.joined.host, member.joined.core] > 1)
        self._wait(self._all_ready, _READY_S, "not all workers opened their connections")
        self._start(work, members)
        self._see_through(work, members)

    def end(self) -> None:
        """Let the workers go."""
        self._runner.quit()

    # -------------------------------------------------------------- until the start

    def _wait(self, event: Event, seconds: float, why: str) -> None:
        gevent.wait([event, self._stopped], timeout=seconds, count=1)
        if self._stopped.is_set():
            raise Failed("stopped before the start")
        if not event.is_set():
            raise Failed(f"{why} within {seconds:g} s: {len(self._members)} of {self._orders.expect_workers} are here")

    def _greet(self, environment: Any, msg: Any, **_: Any) -> None:
        wrong = self._objection(msg.data)
        if wrong:
            self._runner.send_message(words.REFUSE, {"why": wrong}, msg.node_id)
            self._runner.clients.pop(msg.node_id, None)
            return
        joined = words.Joined(host=msg.data["host"], core=msg.data["core"])
        member = Member(msg.node_id, len(self._members), joined, msg.data["has_headers"])
        self._members[member.id] = member
        words.say(words.Word(kind="joined", share=member.share, joined=member.joined))
        if len(self._members) == self._orders.expect_workers:
            self._is_full.set()

    def _objection(self, hello: Any) -> str | None:
        if hello.get("protocol") != words.PROTOCOL:
            return f"this master speaks protocol {words.PROTOCOL}, the worker {hello.get('protocol')}: install the same version on both"
        return f"the run has its {self._orders.expect_workers} workers already" if self._is_full.is_set() else None

    def _compare(self, member: Member) -> clocks.Clock:
        """Return how far a worker's clock lies from ours."""
        found, walls = [], []
        for _ in range(_EXCHANGES):
            self._questions += 1
            key = (member.id, self._questions)
            answer = self._back[key] = AsyncResult()
            self._runner.send_message(words.ASK_TIME, {"k": self._questions, "t1": _clock()}, member.id)
            try:
                exchange, wall = answer.get(timeout=_ANSWER_S)
            except gevent.Timeout:
                break
            finally:
                del self._back[key]
            found.append(exchange)
            walls.append(wall)
        if not found:
            raise Failed(f"worker {member.share} on {member.joined.host} does not answer")
        clock = clocks.measured(found)
        return replace(clock, wall_offset_s=clock.offset_s + walls[-1] - (time.time() - _clock()))

    def _time(self, environment: Any, msg: Any, **_: Any) -> None:
        back_s, data = _clock(), msg.data
        waiting = self._back.get((msg.node_id, data["k"]))
        if waiting is not None:
            stamps = clocks.Exchange(sent_s=data["t1"], heard_s=data["t2"], answered_s=data["t3"], back_s=back_s)
            waiting.set((stamps, data["wall"]))

    def _send_job(self, work: job.Job, member: Member, *, is_crowded: bool) -> None:
        mine = replace(job.part(work, member.share, len(self._members)), headers=[], api_key=None)
        self._runner.send_message(words.JOB, {"job": zlib.compress(job.encode(mine), 1), "crowded": is_crowded}, member.id)
        if is_crowded:  # two commands on one host chose the same core: nobody keeps to it
            words.say(words.Word(kind="joined", share=member.share, joined=replace(member.joined, core=None)))

    def _note_ready(self, environment: Any, msg: Any, **_: Any) -> None:
        self._ready.add(msg.node_id)
        if self._ready >= set(self._members):
            self._all_ready.set()

    def _start(self, work: job.Job, members: list[Member]) -> None:
        slowest_s = max(m.before.error_s for m in members if m.before is not None)
        at = _clock() + _LEAD_S + 4 * slowest_s
        unix_s = time.time() + at - _clock()
        for member in members:
            assert member.before is not None
            self._runner.send_message(words.START, {"at": at + member.before.offset_s}, member.id)
        words.say(words.Word(kind="started", number=unix_s))
        users = work.users or len(members)
        gevent.spawn(self._runner.start, users, spawn_rate=users)

    # -------------------------------------------------------------- while it runs

    def _pass_on(self, environment: Any, msg: Any, **_: Any) -> None:
        member = self._members.get(msg.node_id)
        if member is not None:
            progress = msgspec.json.decode(msg.data["progress"], type=Progress)
            words.say(words.Word(kind="progress", share=member.share, progress=progress))

    def _see_through(self, work: job.Job, members: list[Member]) -> None:
        """Return when every worker has sent its records, or is given up."""
        self._patience_until = _clock() + work.duration_s + work.drain_s + work.timeout_s + _SILENCE_S
        while not all(member.through for member in members) and _clock() < self._patience_until:
            gevent.sleep(0.02)
            for member in members:
                self._look_after(member)
            if all(member.through or self._is_given_up(member) for member in members):
                return

    def _is_given_up(self, member: Member) -> bool:
        return member.missing_since is not None and _clock() - member.missing_since > self._orders.grace_s

    def _look_after(self, member: Member) -> None:
        client = self._runner.clients.get(member.id)
        is_missing = not member.through and (client is None or client.state == STATE_MISSING)
        if is_missing and member.missing_since is None:
            member.missing_since = _clock()
            words.say(words.Word(kind="lost", share=member.share))
        elif not is_missing and member.missing_since is not None:
            member.missing_since = None
            words.say(words.Word(kind="found", share=member.share))

    def _note_done(self, environment: Any, msg: Any, **_: Any) -> None:
        member = self._members[msg.node_id]
        last = msgspec.json.decode(msg.data["done"], type=job.Done)
        gevent.spawn(self._compare_again, member)
        words.say(words.Word(kind="done", share=member.share, done=last))

    def _compare_again(self, member: Member) -> None:
        """Say how the clock went meanwhile."""
        assert member.before is not None
        try:
            drift_s = self._compare(member).offset_s - member.before.offset_s
            words.say(words.Word(kind="clock", share=member.share, clock=replace(member.before, drift_s=drift_s)))
        except Failed:
            return  # it is gone; that is said elsewhere
        finally:
            member.compared = True

    def _write(self, environment: Any, msg: Any, **_: Any) -> None:
        """Write a piece of a worker's records, and ask for the next."""
        self._patience_until = max(self._patience_until, _clock() + _SILENCE_S)
        member = self._members[msg.node_id]
        if member.file is None:
            member.file = open(self._orders.rows[member.share], "wb")  # noqa: SIM115, PTH123  closed with the last piece
        member.file.write(member.unpack.decompress(msg.data["piece"]))
        if msg.data["last"]:
            member.file.write(member.unpack.flush())
            member.file.close()
            member.kept = True
            words.say(words.Word(kind="kept", share=member.share))
        self._runner.send_message(words.NEXT, None, member.id)


def _check_headers(work: job.Job, members: list[Member]) -> None:
    """Raise Failed where a worker could not get in.  What lets requests in is secret, and Locust's messages are not: it never travels."""
    without = [member for member in members if not member.has_headers]
    if without and (work.headers or work.api_key):
        raise Failed(
            f"worker {without[0].share + 1} on {without[0].joined.host} was given no headers: keys do not travel between hosts; "
            "start it with the same --api-key-env, --auth-file or --header"
        )


def _check_address(work: job.Job, members: list[Member]) -> None:
    """Raise Failed where a worker on another host would load itself."""
    away = [member.joined.host for member in members if member.joined.host != platform.node()]
    if away and (work.address.startswith("127.") or work.address == "::1"):
        raise Failed(f"{work.host} is this machine, and another one on {away[0]}: name the target by an address all workers can reach")


def _bound(environment: Environment, orders: words.Orders) -> Once:
    """Return a master that listens.  Raises Failed where it cannot."""
    try:
        return Once(environment, orders.bind, orders.port)
    except (SystemExit, Exception) as error:  # Locust exits on a port that is taken
        why = "the port is taken" if isinstance(error, SystemExit) else str(error)
        raise Failed(f"cannot listen for workers on {orders.bind}:{orders.port}: {why}") from error


def _web(environment: Environment, host: str, port: int) -> str:
    """Open Locust's pages and return where they are."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise Failed(f"the web UI cannot be had on {host}:{port}: {error.strerror or error}") from error
        port = trial.getsockname()[1]
    ui = environment.create_web_ui(host, port)
    while ui.server is None or not ui.server.started:
        gevent.sleep(0.005)
    return f"http://{authority(host, port)}"


def _seconds() -> Iterator[None]:
    while True:
        gevent.sleep(1.0)
        yield


def _beat() -> None:
    for _ in _seconds():
        words.say(words.Word(kind="beat"))


def _listen(commands: Any, stop: Callable[[], None]) -> None:
    """Stop on any word of the parent, or when it is gone."""
    commands.readline()
    stop()


def main() -> int:
    """Lead one run."""
    commands = child.commands()
    line = commands.readline()
    if not line:
        return 0
    try:
        master = Master(words.decode_orders(line))
        line = commands.readline()
        gevent.spawn(_listen, commands, master.stop)
        try:
            if line:
                master.lead(job.decode_job(line))
        except Failed as failed:
            master.dismiss(str(failed))
            raise
        finally:
            master.end()
    except Failed as failed:
        words.say(words.Word(kind="failed", text=str(failed)))
    return 0


if __name__ == "__main__":
    os._exit(main())  # all is said and written; to take Locust's modules apart in order would cost another 0.1 s
