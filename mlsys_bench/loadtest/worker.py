"""The process that sends: a Locust runner whose users stand for the lanes of the load.  Started by `loadtest.crew`, never imported by it.

Locust comes first: importing it patches sockets and locks for gevent.  One job comes in on stdin, JSON lines go out on stdout, one row per
request goes to the job's file within 10 ms of being read, so that what was measured survives whatever comes next.
"""

from __future__ import annotations

import locust  # isort: skip  it must be the first: it patches the interpreter
import contextlib
import gc
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any, Protocol

import gevent
from gevent.event import Event
from locust import stats
from locust.env import Environment
from locust.runners import LocalRunner, Runner

from mlsys_bench.loadtest import Progress, child, job
from mlsys_bench.loadtest.alarm import clock
from mlsys_bench.loadtest.loops import Lane, lanes
from mlsys_bench.loadtest.sender import Sender
from mlsys_bench.types import Outcome

_BATCH = 200  # answers that Locust's statistics hear of together, within 0.3 ms
_OPENING_S = 10.0  # for the connections opened before the start, at most


class EndedError(Exception):
    """What Locust's statistics and listeners are told of a request that was not answered: its outcome."""


class Voice(Protocol):
    """How a worker hears and speaks: over pipes to a parent on this machine, or through Locust's messages to a master on another."""

    stopped: Event

    def begin(self, runner: Runner, users: int) -> None:
        """Have Locust's users spawned; without waiting for it."""
        ...

    def start(self) -> float | None:
        """Say that all is ready and return the moment to start at, of the monotonic clock; None: end at once."""
        ...

    def say(self, said: job.Said) -> None:
        """Say something."""
        ...


class Pipes:
    """The voice of a worker whose parent started it."""

    def __init__(self, commands: Any) -> None:
        self._commands, self.stopped = commands, Event()

    def begin(self, runner: Runner, users: int) -> None:
        """Have Locust's users spawned."""
        runner.start(users, spawn_rate=users)

    def start(self) -> float | None:
        """Say that all is ready; from the start on, any word of the parent, or its end, stops the run."""
        self.say(job.Said(ready=True))
        at = job.start_moment(self._commands.readline())
        gevent.spawn(self._listen)
        return at

    def say(self, said: job.Said) -> None:
        """Write a line."""
        os.write(1, job.encode(said) + b"\n")

    def _listen(self) -> None:
        self._commands.readline()
        self.stopped.set()


# ---------------------------------------------------------------- Locust's side


class Tally:
    """What Locust hears of requests.  Its own statistics are told in batches: one by one they cost more than sending.

    A listener that somebody else has added hears of every request by itself, as Locust's documentation promises.
    """

    def __init__(self, environment: Environment, work: job.Job) -> None:
        self._environment, self._name = environment, work.endpoint.path
        self._method = "WS" if work.transport == "websocket" else "POST"
        handlers = environment.events.request._handlers
        self._is_alone = all(getattr(handler, "__module__", "") == "locust.runners" for handler in handlers)
        self._answered: list[tuple[float, float, int]] = []  # moment of the run, milliseconds, tokens
        self.t0_unix_s = 0.0

    def hear(self, outcome: Outcome, at_s: float, took_s: float, tokens: int) -> None:
        """Take one request."""
        if outcome == "ok" and self._is_alone:
            self._answered.append((at_s, 1e3 * took_s, tokens))
            if len(self._answered) >= _BATCH:
                self.flush()
            return
        fire: Callable[..., None] = self._environment.events.request.fire
        fire(
            request_type=self._method,
            name=self._name,
            response_time=1e3 * took_s,
            response_length=tokens,
            exception=None if outcome == "ok" else EndedError(outcome),
            context={},
        )

    def hear_first(self, ttft_s: float) -> None:
        """Take the time to the first token of an answer: a line of its own in Locust's web UI, in no total."""
        entry: Any = self._environment.stats.get(self._name, "TTFT")
        entry.log(1e3 * ttft_s, 0)

    def flush(self) -> None:
        """Pass on what was taken, as Locust's master takes what a worker counted."""
        heard, self._answered, t0_unix_s = self._answered, [], self.t0_unix_s
        if not heard:
            return
        took_ms = [took for _, took, _ in heard]
        total = self._environment.stats.total
        entry: Any = stats.StatsEntry(self._environment.stats, self._name, self._method)
        entry.start_time = total.start_time
        entry.last_request_timestamp = t0_unix_s + max(at for at, _, _ in heard)
        entry.num_requests = len(heard)
        entry.total_response_time = sum(took_ms)
        entry.min_response_time, entry.max_response_time = min(took_ms), max(took_ms)
        entry.total_content_length = sum(tokens for _, _, tokens in heard)
        entry.response_times = Counter(map(stats.bucket_response_time, took_ms))
        entry.num_reqs_per_sec = Counter(int(t0_unix_s + at) for at, _, _ in heard)
        total.extend(entry)
        self._environment.stats.entries[(self._name, self._method)].extend(entry)


def user_class(waits: Iterator[Callable[[], object]]) -> type[locust.User]:
    """Return a Locust user that stands for a lane: it is there until the lane has ended."""

    def stand(_user: locust.User) -> None:
        for wait in waits:
            wait()
            break
        raise locust.exception.StopUser

    return type("Sender", (locust.User,), {"tasks": [stand], "wait_time": locust.constant(0)})


# ---------------------------------------------------------------- the run


def load(work: job.Job, rows: IO[bytes], environment: Environment, runner: Runner, voice: Voice) -> job.Done:
    """Do one job and return what it took."""
    tally = Tally(environment, work)
    sender = Sender(work, gevent.get_hub().loop, rows, tally.hear)
    if not isinstance(runner, LocalRunner):
        sender.tell_first = tally.hear_first  # a master shows it
    running = lanes(sender, work)
    ended = [Event() for _ in running]
    environment.user_classes = [user_class(iter([event.wait for event in ended]))]
    voice.begin(runner, len(running))
    filled = Event()
    sender.links.fill(work.connections, filled.set)
    filled.wait(min(work.timeout_s, _OPENING_S))
    broken = Event()
    with _collector() as pauses, _failures(broken) as failures:
        at = voice.start()
        sender.start_clock(clock() if at is None else at)
        tally.t0_unix_s = sender.t0_unix_s
        cpu_s = time.process_time()
        voice.say(job.Said(hello=sender.t0_unix_s))
        telling = gevent.spawn(_tell, sender, tally, voice)
        if at is not None:
            _begin(running, ended)
            gevent.wait([voice.stopped, broken, gevent.spawn(_all_ended, ended)], count=1)
        is_stopped = at is None or voice.stopped.is_set()
        ran_s = max(0.0, sender.now_s())
        polled_s = sender.polled_s
        cpu_share = min(1.0, max(0.0, time.process_time() - cpu_s - polled_s) / max(ran_s, 1e-3))
        lag_p99_s = sender.pulse.lag_p99_s()
        sender.is_stopped = is_stopped
        if not is_stopped:
            gevent.wait([voice.stopped, broken, gevent.spawn(_landed, sender, work.drain_s)], count=1)
            is_stopped = voice.stopped.is_set()
        telling.kill()
        sender.end_all("cancelled" if is_stopped else "unfinished")
    tally.flush()
    sender.close()
    for event in ended:
        event.set()
    if failures:
        raise failures[0]
    counted = environment.stats.total
    return job.Done(
        cpu_share=cpu_share,
        stopped=is_stopped,
        ran_s=ran_s,
        sent=sender.sent,
        locust_requests=counted.num_requests,
        locust_failures=counted.num_failures,
        connections=sender.links.opened,
        late_connections=sender.links.opened_late,
        lag_p99_s=lag_p99_s,
        gc_pause_max_s=pauses.longest_s,
        retries=sender.retries,
        polled_share=min(1.0, polled_s / max(ran_s, 1e-3)) if work.busy_poll else None,
    )


def _begin(running: list[Lane], ended: list[Event]) -> None:
    for lane, event in zip(running, ended, strict=True):
        lane.begin(event.set)


def _all_ended(ended: list[Event]) -> None:
    for event in ended:
        event.wait()


def _landed(sender: Sender, within_s: float) -> None:
    """Return when no request is on its way any more, or it took too long."""
    until = clock() + within_s
    while sender.in_flight and clock() < until:
        gevent.sleep(0.01)


class Pauses:
    """How long the garbage collector stood in the way."""

    def __init__(self) -> None:
        self.longest_s = self._began = 0.0

    def note(self, phase: str, _info: dict[str, int]) -> None:
        """Take what the collector says of itself."""
        if phase == "start":
            self._began = clock()
            return
        self.longest_s = max(self.longest_s, clock() - self._began)


@contextlib.contextmanager
def _collector() -> Iterator[Pauses]:
    """Give the pauses of the garbage collector.  What was made to set up is taken out of its sight: a walk through it finds nothing."""
    pauses = Pauses()
    gc.collect()
    gc.freeze()
    gc.callbacks.append(pauses.note)
    try:
        yield pauses
    finally:
        gc.callbacks.remove(pauses.note)


@contextlib.contextmanager
def _failures(broken: Event) -> Iterator[list[BaseException]]:
    """Give what callbacks of the hub let through.  gevent prints it and goes on, here with a lane that would never end."""
    hub = gevent.get_hub()
    usual: Callable[..., None] = hub.handle_error
    seen: list[BaseException] = []

    def note(context: Any, kind: type[BaseException], error: BaseException, traceback: Any) -> None:
        usual(context, kind, error, traceback)
        if not isinstance(context, gevent.Greenlet):
            seen.append(error)
            broken.set()

    hub.handle_error = note
    try:
        yield seen
    finally:
        hub.handle_error = usual


def _tell(sender: Sender, tally: Tally, voice: Voice) -> None:
    """Say how it stands, once a second."""
    before, cpu_s, at_s = 0, _worked_s(sender), 0.0
    for second in _seconds(sender):
        now_s = _worked_s(sender)
        used, cpu_s = max(0.0, now_s - cpu_s), now_s
        share, at_s = used / max(second - at_s, 1e-9), second
        sent, late_s = sender.sent, sender.worst_late_s
        sender.worst_late_s = 0.0
        now = {"sent": sent, "ok": sender.ok, "failed": sender.failed, "in_flight": sender.in_flight}
        voice.say(job.Said(progress=Progress(t_s=second, **now, sent_per_s=sent - before, lateness_s=late_s, cpu_share=share)))
        before = sent
        tally.flush()


def _worked_s(sender: Sender) -> float:
    """Return the CPU time so far, without what was spent looking for events in vain."""
    return time.process_time() - sender.polled_s


def _seconds(sender: Sender) -> Iterator[float]:
    second = 0
    while True:
        second += 1
        gevent.sleep(max(0.0, second - sender.now_s()))
        yield sender.now_s()


# ---------------------------------------------------------------- the process


def main() -> int:
    """Do one job."""
    commands = child.commands()
    line = commands.readline()
    if not line:
        return 0  # the parent found no target to load
    work = job.decode_job(line)
    if work.core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {work.core})
    allow_many_files()
    if work.endpoint.name == "locustfile":
        return _own_users(work, Pipes(commands))
    environment = Environment(catch_exceptions=False)
    runner = environment.create_local_runner()
    voice = Pipes(commands)
    with open(work.rows, "wb", buffering=0) as rows:  # noqa: PTH123  unbuffered: a row written is a row kept
        done = load(work, rows, environment, runner, voice)
    voice.say(job.Said(done=done))
    runner.quit()
    return 0


def _own_users(work: job.Job, voice: Voice) -> int:
    """Do one job with the users of a person's own Locust file."""
    from mlsys_bench.loadtest import locustfile

    try:
        with open(work.rows, "wb", buffering=0) as rows:  # noqa: PTH123  as above
            done = locustfile.load(work, rows, voice)
    except locustfile.RefusedError as refused:
        voice.say(job.Said(refused=str(refused)))
        return 0
    voice.say(job.Said(done=done))
    return 0


def allow_many_files() -> None:
    """Raise the limit of open files to what this process may have: each request in flight holds a connection."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    os._exit(main())  # all is said and written; to take Locust's modules apart in order would cost another 0.1 s
