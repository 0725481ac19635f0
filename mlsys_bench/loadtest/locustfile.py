"""A person's own Locust file under our runner: their users send as they like, each of their requests becomes a record of ours.

Imported by the load worker alone, after Locust.  What Locust hears of a request is its start, how long it took and whether it failed; that
is all a record can hold, unless the file tells more in the event's `context`: `ttft_s`, `output_tokens`, `prompt_tokens`, `session`.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any

import gevent
import locust
from locust.argument_parser import default_args_dict
from locust.env import Environment
from locust.runners import Runner
from locust.util.load_locustfile import load_locustfile

from mlsys_bench.loadtest import Progress, job, spool
from mlsys_bench.loadtest.alarm import Alarm, Pulse, clock
from mlsys_bench.types import Outcome

_STATUS_REJECTED = (429, 503)
_SAID = ("ttft_s", "output_tokens", "prompt_tokens", "session")
_KINDS: tuple[tuple[Outcome, tuple[str, ...]], ...] = (  # by words in the name of an exception, or of what caused it
    ("timeout", ("ReadTimeout", "Timeout", "timed out")),
    ("connect", ("ConnectTimeout", "NewConnectionError", "ConnectionRefused", "ConnectError", "gaierror", "Name or service not known")),
    ("reset", ("ConnectionReset", "RemoteDisconnected", "BrokenPipe", "ChunkedEncodingError", "ProtocolError", "ConnectionAborted",
               "IncompleteRead", "HTTPConnectionClosed", "ConnectionError")),
)  # fmt: skip


class Ledger:
    """Writes a row for each request that Locust hears of."""

    def __init__(self, work: job.Job, rows: IO[bytes], t0: float) -> None:
        self._work, self._rows = work, rows
        self._numbers = itertools.count(work.share, work.shares)
        self.t0, self.t0_unix_s = t0, time.time() + t0 - clock()
        self.sent = self.ok = self.failed = 0

    def hear(
        self,
        *,
        request_type: str = "",
        name: str = "",
        response_time: float = 0.0,
        exception: object = None,
        context: dict[str, Any] | None = None,
        response: Any = None,
        start_time: float | None = None,
        **_: object,
    ) -> None:
        """Take one request, as `locust.events.request` passes it on."""
        took_s = (response_time or 0.0) / 1e3
        began_s = (time.time() - took_s if start_time is None else start_time) - self.t0_unix_s
        status = getattr(response, "status_code", None) or None
        outcome: Outcome = "ok" if exception is None else kind_of(exception, status)
        said = {key: (context or {}).get(key) for key in _SAID}
        token_s, per_event = _stamps(began_s, took_s, said) if outcome == "ok" else ((), ())
        self._rows.write(spool.encode(spool.Row(
            next(self._numbers), began_s, None, None, token_s, per_event, began_s + took_s, said["prompt_tokens"], said["output_tokens"],
            "usage" if said["output_tokens"] is not None else None, outcome, status, 1, f"{request_type} {name}".strip() or None,
            None if said["session"] is None else str(said["session"]), {}, self._work.warmup_s <= began_s < self._work.duration_s,
        )))  # fmt: skip
        self.sent += 1
        self.ok += outcome == "ok"
        self.failed += outcome != "ok"


def _stamps(began_s: float, took_s: float, said: dict[str, Any]) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Return the moments that are known: the end, which carries no token that we know of; and the first token where the file says so."""
    end_s = began_s + took_s
    if said["ttft_s"] is None:
        return (end_s,), (0,)
    tokens = said["output_tokens"]
    return (began_s + float(said["ttft_s"]), end_s), (1, max(0, tokens - 1) if tokens is not None else 0)


def kind_of(exception: object, status: int | None) -> Outcome:
    """Return what kind of failure an exception of somebody else's client is, by its own name or that of what caused it."""
    if status is not None:
        return "rejected" if status in _STATUS_REJECTED else "bad_response"
    if isinstance(exception, socket.gaierror):
        return "connect"
    text = f"{type(exception).__name__} {exception!r} {getattr(exception, '__cause__', '')!r} {getattr(exception, '__context__', '')!r}"
    for outcome, words in sorted(_KINDS, key=lambda kind: kind[0] != "connect"):
        if any(word in text for word in words):
            return outcome
    return "bad_response"


class RefusedError(Exception):
    """A person's file cannot be used."""


def load(work: job.Job, rows: IO[bytes], voice: Any) -> job.Done:
    """Let the users of a file do their work for the time of a job, and return what it took.  Raises RefusedError."""
    settings = work.endpoint.settings
    environment = _environment(settings["file"], settings["url"], work.drain_s)
    events: Any = environment.events
    runner = environment.create_local_runner()
    events.init.fire(environment=environment, runner=runner, web_ui=None)
    errors: list[str] = []
    events.user_error.add_listener(lambda exception, **_: errors.append(f"{type(exception).__name__}: {exception}"))
    loop = gevent.get_hub().loop
    alarm = Alarm(loop)
    pulse = Pulse(alarm, loop)
    at = voice.start()
    ledger = Ledger(work, rows, clock() if at is None else at)
    events.request.add_listener(ledger.hear)
    gevent.sleep(max(0.0, ledger.t0 - clock()))
    gc.freeze()
    voice.say(job.Said(hello=ledger.t0_unix_s))
    pulse.start()
    cpu_s = time.process_time()
    telling = gevent.spawn(_tell, ledger, runner, voice)
    if at is not None:
        runner.start(work.users or 1, spawn_rate=max(1, work.users or 1))
        voice.stopped.wait(max(0.0, ledger.t0 + work.duration_s - clock()))
    ran_s, is_stopped = clock() - ledger.t0, voice.stopped.is_set() or at is None
    cpu_share = (time.process_time() - cpu_s) / max(ran_s, 1e-9)
    environment.stop_timeout = 0.0 if is_stopped else work.drain_s
    runner.stop()
    telling.kill()
    lag_p99_s = pulse.lag_p99_s()
    pulse.close()
    alarm.close()
    counted = environment.stats.total
    if not ledger.sent and errors:
        sys.exit(f"no request was sent: the users of {settings['file']} raised {errors[0]}")
    runner.quit()
    return job.Done(
        cpu_share=cpu_share, stopped=is_stopped, ran_s=ran_s, sent=ledger.sent, locust_requests=counted.num_requests,
        locust_failures=counted.num_failures, connections=0, late_connections=0, lag_p99_s=lag_p99_s,
    )  # fmt: skip


def _environment(file: str, url: str, drain_s: float) -> Environment:
    """Return Locust's environment with the users of a file.  Raises RefusedError where there are none."""
    try:
        users, _shapes = load_locustfile(file)
    except SystemExit:
        raise
    except BaseException as error:  # whatever a file of somebody else's raises
        raise RefusedError(f"--locustfile {file}: cannot be imported: {type(error).__name__}: {error}") from error
    if not users:
        raise RefusedError(f"--locustfile {file}: has no User class; derive one from locust.HttpUser or locust.FastHttpUser")
    environment = Environment(
        user_classes=list(users.values()), events=locust.events, host=url, stop_timeout=drain_s,
        parsed_options=argparse.Namespace(**{**default_args_dict(), "host": url, "stop_timeout": drain_s}),
    )  # fmt: skip
    environment.locustfile = file
    return environment


def _tell(ledger: Ledger, runner: Runner, voice: Any) -> None:
    """Say how it stands, once a second."""
    before = 0
    for second in _seconds(lambda: clock() - ledger.t0):
        rate, before = ledger.sent - before, ledger.sent
        voice.say(job.Said(progress=Progress(
            t_s=second, sent=ledger.sent, ok=ledger.ok, failed=ledger.failed, in_flight=runner.user_count, sent_per_s=rate, lateness_s=0.0,
        )))  # fmt: skip


def _seconds(now_s: Callable[[], float]) -> Iterator[float]:
    for second in itertools.count(1):
        gevent.sleep(max(0.0, second - now_s()))
        yield now_s()
