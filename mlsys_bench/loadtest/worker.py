"""The process that sends: a Locust runner whose users follow the schedule.  Started by `loadtest.parent`, never imported by it.

Locust comes first: importing it patches sockets and locks for gevent.  One job comes in on stdin, JSON lines go out on stdout, one record
per request goes to the job's file the moment the request ends, so that what was measured survives whatever comes next.
"""

from __future__ import annotations

import locust  # isort: skip  it must be the first: it patches the interpreter
import contextlib
import ctypes
import itertools
import logging
import os
import signal
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import gevent
import msgspec
from gevent.event import Event
from gevent.fileobject import FileObject
from gevent.hub import Waiter
from gevent.pool import Group
from locust.env import Environment

from mlsys_bench.loadtest import Progress, answers, endpoints, job, payloads, wire
from mlsys_bench.types import Outcome, RequestRecord

_clock = time.monotonic
_PREPARE_S = 0.001  # a request is built so long before it is due, which also wakes a sleeping core
_SPARE = 4  # idle connections to keep in hand while a run goes on
_AFTER_FAILURE_S = 0.1  # pause of a closed-loop user: a server that is gone would be asked 10,000 times a second
_REJECTED = (429, 503)


class EndedError(Exception):
    """Thrown into a request that may not go on: 'cancelled' by the person, or 'unfinished' when the drain is over."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


class Connections:
    """Idle keep-alive connections to one numeric address, opened before they are needed.  They do not block."""

    def __init__(self, work: job.Job) -> None:
        self._work = work
        self._family = socket.AF_INET6 if ":" in work.address else socket.AF_INET
        self._tls = ssl.create_default_context() if work.scheme == "https" else None
        self._idle: list[socket.socket] = []
        self._is_refilling = False
        self.opened = self.opened_late = 0

    def fill(self, count: int) -> None:
        """Open connections before the start.  A refusal ends it: the requests themselves will tell."""
        with contextlib.suppress(OSError):
            for _ in range(count):
                self._idle.append(self.open())

    def idle(self) -> socket.socket | None:
        """Return an open connection at once, or None when there is none; see that there will be one for the next."""
        if len(self._idle) <= _SPARE and not self._is_refilling:
            self._is_refilling = True
            gevent.spawn(self._refill)
        while self._idle:
            sock = self._idle.pop()
            if _is_live(sock):
                return sock
            sock.close()
        return None

    def give(self, sock: socket.socket) -> None:
        """Put a connection back that can carry another request."""
        self._idle.append(sock)

    def open(self) -> socket.socket:
        """Return a new connection.  Raises OSError."""
        sock = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._work.timeout_s)
            sock.connect((self._work.address, self._work.port))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_hostname=self._work.host)
            sock.settimeout(0.0)
        except BaseException:
            sock.close()
            raise
        self.opened += 1
        return sock

    def _refill(self) -> None:
        try:
            while len(self._idle) <= 2 * _SPARE:
                self._idle.append(self.open())
        except OSError:
            return  # the request that needs one will fail on its own account
        finally:
            self._is_refilling = False


def _is_live(sock: socket.socket) -> bool:
    """Say whether an idle connection is still open and silent: a closed one reads as end, one with left-overs as data."""
    try:
        sock.recv(1)
    except (BlockingIOError, ssl.SSLWantReadError):
        return True
    except OSError:
        return False
    return False


class Flight:
    """One request while it runs: what it asks and what is known of it so far."""

    __slots__ = ("connect_s", "error", "index", "request", "response", "scheduled_s", "sent_s", "sock", "written")

    def __init__(self, index: int, scheduled_s: float, request: bytes, sock: socket.socket | None) -> None:
        self.index, self.scheduled_s, self.request, self.sock = index, scheduled_s, request, sock
        self.response = wire.Response()
        self.sent_s: float | None = None
        self.connect_s = 0.0
        self.written = 0
        self.error: OSError | None = None


class Requester:
    """Sends requests and writes down what came of each."""

    def __init__(self, work: job.Job, environment: Environment, rows: IO[bytes]) -> None:
        self._work, self._rows = work, rows
        self._fire: Callable[..., None] = environment.events.request.fire
        self._endpoint, self._payload = endpoints.make(work.endpoint), payloads.make(work.payload)
        self._encode = msgspec.json.Encoder().encode
        self._head = _head(work)
        self.connections = Connections(work)
        self.flying = Group()
        self.t0 = self.t0_unix_s = 0.0
        self.sent = self.ok = self.failed = 0
        self.worst_late_s = 0.0

    def start_clock(self) -> None:
        """Make now the run's second zero."""
        self.t0, self.t0_unix_s = _clock(), time.time()

    def now_s(self) -> float:
        """Return seconds since the run's start."""
        return _clock() - self.t0

    def prepare(self, index: int, scheduled_s: float) -> Flight:
        """Return a request that only waits for its moment: bytes built, connection chosen."""
        body = self._endpoint.body(self._payload.ask(index))
        request = self._head % (self.t0_unix_s + scheduled_s, len(body)) + body
        return Flight(index, scheduled_s, request, self.connections.idle())

    def launch(self, flight: Flight) -> gevent.Greenlet:
        """Send a request this very moment, and leave the rest to a greenlet of its own."""
        if flight.sock is not None:
            self._send(flight, flight.sock)
        greenlet = gevent.Greenlet(self._finish, flight)
        self.flying.start(greenlet)
        return greenlet

    def _send(self, flight: Flight, sock: socket.socket) -> None:
        flight.sent_s = self.now_s()
        self.sent += 1
        self.worst_late_s = max(self.worst_late_s, flight.sent_s - flight.scheduled_s - flight.connect_s)
        try:
            flight.written = sock.send(flight.request)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            flight.written = 0
        except OSError as error:
            flight.error = error

    def _finish(self, flight: Flight) -> Outcome:
        outcome: Outcome
        try:
            with gevent.Timeout(self._work.timeout_s):
                outcome = self._exchange(flight)
        except gevent.Timeout:
            outcome = "timeout" if flight.sent_s is not None else "connect"
        except EndedError as ended:
            outcome = ended.outcome
        record = self._record(flight, outcome, self.now_s())
        self._write(record)
        return record.outcome

    def _exchange(self, flight: Flight) -> Outcome:
        reusable = False
        try:
            if flight.sock is None and not self._connect(flight):
                return "connect"
            assert flight.sock is not None
            if flight.error is not None:
                return "reset"
            _send_rest(flight.sock, flight)
            is_complete = _receive(flight.sock, flight.response)
            reusable = is_complete and flight.response.keep_alive
            return "ok" if is_complete else "reset"
        except wire.WireError:
            return "bad_response"
        except OSError:
            return "reset"
        finally:
            if reusable and flight.sock is not None:
                self.connections.give(flight.sock)
            elif flight.sock is not None:
                flight.sock.close()

    def _connect(self, flight: Flight) -> bool:
        began = _clock()
        try:
            flight.sock = self.connections.open()
        except OSError:
            return False
        self.connections.opened_late += 1
        flight.connect_s = _clock() - began
        self._send(flight, flight.sock)
        return True

    def _record(self, flight: Flight, outcome: Outcome, done_s: float) -> RequestRecord:
        response = flight.response
        answer = None
        try:
            answer = self._endpoint.read(response) if response.status == 200 else None
        except wire.WireError:
            outcome = "bad_response" if outcome == "ok" else outcome
        if outcome == "ok":
            outcome = _judge(response, answer)
        return RequestRecord(
            index=flight.index,
            scheduled_s=flight.scheduled_s,
            sent_s=flight.sent_s,
            headers_s=None if response.headers_at is None else response.headers_at - self.t0,
            token_s=tuple(at - self.t0 for at in answer.token_s) if answer else (),
            tokens_per_event=answer.tokens_per_event if answer else (),
            done_s=done_s,
            prompt_tokens=answer.prompt_tokens if answer else None,
            output_tokens=answer.output_tokens if answer else None,
            token_source=answer.token_source if answer else None,
            outcome=outcome,
            http_status=response.status or None,
            stage_s={"connect": flight.connect_s} if flight.connect_s else {},
            in_window=self._work.warmup_s <= flight.scheduled_s < self._work.duration_s and outcome != "cancelled",
        )

    def _write(self, record: RequestRecord) -> None:
        self._rows.write(self._encode(record) + b"\n")
        good = record.outcome == "ok"
        self.ok += good
        self.failed += not good
        self._fire(
            request_type="POST",
            name=self._work.endpoint.path,
            response_time=1e3 * ((record.done_s or 0.0) - record.scheduled_s),
            response_length=record.output_tokens or 0,
            exception=None if good else EndedError(record.outcome),
            context={},
        )


def _head(work: job.Job) -> bytes:
    """Return the head of a request as a template: (due, length) is all that changes."""
    head = [
        f"POST {work.endpoint.path} HTTP/1.1",
        f"Host: {f'[{work.host}]' if ':' in work.host else work.host}:{work.port}",
        "Content-Type: application/json",
        f"Accept: {'text/event-stream' if work.endpoint.streams else 'application/json'}",
        "User-Agent: mlsys-loadtest",
        *([f"Authorization: Bearer {work.api_key}"] if work.api_key else []),
    ]
    lines = "\r\n".join(head).encode().replace(b"%", b"%%")
    return lines + b"\r\nx-mlsys-sched: %.6f\r\nContent-Length: %d\r\n\r\n"


def _send_rest(sock: socket.socket, flight: Flight) -> None:
    if flight.written < len(flight.request):
        sock.settimeout(None)
        sock.sendall(flight.request[flight.written :])
        sock.settimeout(0.0)


def _receive(sock: socket.socket, response: wire.Response) -> bool:
    """Read until the response is whole (True) or the connection ends before it (False).  The stamp is taken right after recv.

    The hub calls us back for every event: waking a greenlet for each cost 20 µs more, which many streams at once add up.
    """
    waiter = Waiter()
    watcher = gevent.get_hub().loop.io(sock.fileno(), 1)
    pending: Callable[[], int] = getattr(sock, "pending", int)  # bytes a TLS layer holds back, of which the poll knows nothing

    def on_readable() -> None:
        try:
            while True:
                data = sock.recv(65536)
                at = _clock()
                if not data or response.feed(data, at):
                    watcher.stop()
                    waiter.switch(bool(data) or response.closed())
                    return
                if not pending():
                    return
        except (BlockingIOError, ssl.SSLWantReadError):
            return
        except (OSError, wire.WireError) as error:
            watcher.stop()
            waiter.throw(error)

    watcher.start(on_readable)
    try:
        return bool(waiter.get())
    finally:
        watcher.stop()
        watcher.close()


def _judge(response: wire.Response, answer: answers.Answer | None) -> Outcome:
    """Return what became of a response that came whole."""
    if response.status in _REJECTED:
        return "rejected"
    if answer is None or answer.is_whole:
        return "bad_response" if answer is None else "ok"
    return "reset" if response.closed() else "bad_response"  # a body without a length is cut off like this


# ---------------------------------------------------------------- waiting


class Alarm:
    """Waits for moments of the monotonic clock.  timerfd where there is one: gevent's own sleep is late by half a millisecond."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC) if self._libc else -1
        self._watcher = gevent.get_hub().loop.io(self._fd, 1) if self._fd >= 0 else None

    def wait_until(self, moment: float) -> None:
        """Return at this moment, or after other greenlets had a turn when it is past."""
        ahead = moment - _clock()
        if ahead <= 0:
            gevent.sleep(0)
        elif self._watcher is None or self._libc is None:
            gevent.sleep(ahead)
        else:
            whole = int(moment)
            setting = struct.pack("@qqqq", 0, 0, whole, int((moment - whole) * 1e9))
            self._libc.timerfd_settime(self._fd, 1, setting, None)  # 1: absolute
            gevent.get_hub().wait(self._watcher)
            with contextlib.suppress(BlockingIOError):
                os.read(self._fd, 8)

    def close(self) -> None:
        """Give the timer back."""
        if self._watcher is not None:
            self._watcher.close()
            os.close(self._fd)


# ---------------------------------------------------------------- the two loops, as Locust users


def open_loop(requester: Requester, work: job.Job) -> Callable[[locust.User], None]:
    """Return the task of the one user of an open loop: each request goes out when it is due, whatever became of the others."""

    def follow_the_schedule(_user: locust.User) -> None:
        alarm = Alarm()
        try:
            for index, due_s in enumerate(work.scheduled_s):
                due = requester.t0 + due_s
                if due - _clock() > 3 * _PREPARE_S:
                    alarm.wait_until(due - _PREPARE_S)
                flight = requester.prepare(index, due_s)
                alarm.wait_until(due)
                requester.launch(flight)
            alarm.wait_until(requester.t0 + work.duration_s)
        finally:
            alarm.close()
        raise locust.exception.StopUser

    return follow_the_schedule


def closed_loop(requester: Requester, work: job.Job) -> Callable[[locust.User], None]:
    """Return the task of each user of a closed loop: a request, its answer, a think; nothing new after the end."""
    numbers = itertools.count()

    def ask_and_wait(_user: locust.User) -> None:
        if requester.now_s() >= work.duration_s:
            raise locust.exception.StopUser
        asked = requester.launch(requester.prepare(next(numbers), requester.now_s()))
        asked.join()
        gevent.sleep(work.think_s if asked.value == "ok" else max(work.think_s, _AFTER_FAILURE_S))

    return ask_and_wait


def user_class(task: Callable[[locust.User], None]) -> type[locust.User]:
    """Return a Locust user with one task."""
    return type("Sender", (locust.User,), {"tasks": [task], "wait_time": locust.constant(0)})


# ---------------------------------------------------------------- the process


def main() -> int:
    """Do one job."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    logging.disable(logging.CRITICAL)
    commands = FileObject(sys.stdin.fileno(), "rb", closefd=False)
    work = job.decode_job(commands.readline())
    if work.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {work.core})
    _allow_many_files()
    with open(work.rows, "wb", buffering=0) as rows:  # noqa: PTH123  unbuffered: a row written is a row kept
        done = _run(work, rows, commands)
    _say(job.Said(done=done))
    return 0


def _run(work: job.Job, rows: IO[bytes], commands: Any) -> job.Done:
    stopped = Event()
    environment = Environment(catch_exceptions=False)
    requester = Requester(work, environment, rows)
    loop = closed_loop if work.users else open_loop
    environment.user_classes = [user_class(loop(requester, work))]
    runner = environment.create_local_runner()
    requester.connections.fill(work.connections)
    listening = gevent.spawn(_listen, commands, stopped)
    cpu_s = time.process_time()
    requester.start_clock()
    _say(job.Said(hello=requester.t0_unix_s))
    telling = gevent.spawn(_tell, requester)
    runner.start(work.users or 1, spawn_rate=work.users or 1)
    gevent.wait([stopped, gevent.spawn(_users_are_through, runner)], count=1)
    ran_s = requester.now_s()
    cpu_share = (time.process_time() - cpu_s) / max(ran_s, 1e-9)
    if stopped.is_set():
        runner.stop()  # nothing new goes out; only here, for it reads source files and would stall the answers still coming in
        gevent.sleep(0)  # what was sent a moment ago gets its greenlet started
    gevent.wait([stopped, gevent.spawn(requester.flying.join, work.drain_s)], count=1)
    requester.flying.kill(EndedError("cancelled" if stopped.is_set() else "unfinished"), timeout=5)
    gevent.killall([listening, telling], timeout=1)
    total = environment.stats.total
    runner.quit()
    return job.Done(
        cpu_share=cpu_share,
        stopped=stopped.is_set(),
        ran_s=ran_s,
        sent=requester.sent,
        locust_requests=total.num_requests,
        locust_failures=total.num_failures,
        connections=requester.connections.opened,
        late_connections=requester.connections.opened_late,
    )


def _users_are_through(runner: Any) -> None:
    """Return when Locust's last user has ended."""
    runner.spawning_greenlet.join()
    runner.user_greenlets.join()


def _listen(commands: Any, stopped: Event) -> None:
    """Stop on any word of the parent, or when the parent is gone: its end of the pipe closes."""
    commands.readline()
    stopped.set()


def _tell(requester: Requester) -> None:
    """Say how it stands, once a second."""
    before = 0
    for second in _seconds(requester):
        sent, late_s = requester.sent, requester.worst_late_s
        requester.worst_late_s = 0.0
        now = {"sent": sent, "ok": requester.ok, "failed": requester.failed, "in_flight": len(requester.flying)}
        progress = Progress(t_s=second, **now, sent_per_s=sent - before, lateness_s=late_s)
        before = sent
        _say(job.Said(progress=progress))


def _seconds(requester: Requester) -> Iterator[float]:
    second = 0
    while True:
        second += 1
        gevent.sleep(max(0.0, second - requester.now_s()))
        yield requester.now_s()


def _say(said: job.Said) -> None:
    os.write(1, job.encode(said) + b"\n")


def _allow_many_files() -> None:
    """Raise the limit of open files to what this process may have: each request in flight holds a connection."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    sys.exit(main())
