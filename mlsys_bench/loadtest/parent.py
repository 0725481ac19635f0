"""The side that plans a load test, watches its worker and reads what it wrote.  No gevent in here."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from mlsys_bench import summary, units, workload
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest import Options, Progress, endpoints, job, payloads, target, validity
from mlsys_bench.types import LoadTest, RequestRecord, Requests, Workload

if TYPE_CHECKING:
    from mlsys_bench.workload import Schedule

_CLOSED_LOOP_LENGTHS = 4096  # drawn once; users walk through them again and again
_MOST_CONNECTIONS = 512  # opened ahead; more are opened when needed
_START_S = 60.0  # for the worker to import Locust on a busy machine
_SILENCE_S = 30.0  # the worker speaks every second


def schedule(options: Options) -> Schedule:
    """Return every request the run will send: when it is due and how long it is."""
    _check(options)
    if options.trace is not None:
        return options.trace
    traffic = Workload(
        rate_per_s=options.qps or 1.0,
        arrivals=options.arrivals,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
    )
    if options.users is None:
        return workload.schedule(traffic, duration_s=options.duration_s, seed=options.seed)
    drawn = workload.schedule(traffic, n=_CLOSED_LOOP_LENGTHS, seed=options.seed)
    return dataclasses.replace(drawn, scheduled_s=np.zeros(_CLOSED_LOOP_LENGTHS))


def run(options: Options, on_progress: Callable[[Progress], None] | None = None) -> tuple[LoadTest, Requests]:
    """Probe the target, let a worker load it, return what its users saw."""
    plan = schedule(options)
    if not len(plan.scheduled_s):
        raise BadInput(f"no request falls into {units.show_s(_duration_s(options))}: ask for a longer duration or a higher rate")
    if importlib.util.find_spec("locust") is None:
        raise BadInput("load tests need Locust, which is not installed: pip install 'mlsys-bench[load]'")
    found = target.probe(
        options.url,
        endpoint=options.endpoint,
        model=options.model,
        api_key=options.api_key,
        timeout_s=min(options.timeout_s, 60.0),
        seed=options.seed,
    )
    rows = _rows_file(options.requests_file)
    work = _job(options, plan, found, rows)
    child = _Child(work)
    try:
        done = child.follow(on_progress)
    finally:
        child.end()
    requests = Requests(t0_unix_s=child.t0_unix_s, requests=tuple(read_rows(rows)))
    if options.requests_file is not None:
        _keep(options.requests_file, requests)
        rows.unlink()
    if done is None or not _agrees(done, requests):
        raise MeasurementFailed(_obituary(child, done, len(requests.requests), options.requests_file or rows))
    rows.unlink(missing_ok=True)
    return _result(options, plan, found, work, done, requests), requests


# ---------------------------------------------------------------- before


def _check(options: Options) -> None:
    if [options.qps, options.users, options.trace].count(None) != 2:
        raise BadInput("say how requests arrive: exactly one of --qps, --users and --trace")
    if options.qps is not None and not (math.isfinite(options.qps) and options.qps > 0):
        raise BadInput(f"--qps {options.qps:g}: a rate must be above zero")
    if options.users is not None and options.users < 1:
        raise BadInput(f"--users {options.users}: at least one user is needed")
    for name, value in (("duration", options.duration_s), ("timeout", options.timeout_s)):
        if not (math.isfinite(value) and value > 0):
            raise BadInput(f"--{name} {value:g}s: must be above zero")
    if min(options.drain_s, options.think_s) < 0:
        raise BadInput("a drain or think time cannot be negative")
    if options.warmup_s is not None and not 0 <= options.warmup_s < _duration_s(options):
        raise BadInput(f"--warmup {options.warmup_s:g}s: must lie within the {_duration_s(options):g} s of the run")


def _duration_s(options: Options) -> float:
    """Return the seconds of sending; a trace lasts until one mean gap after its last arrival."""
    if options.trace is None:
        return options.duration_s
    times = options.trace.scheduled_s
    return float(times[-1]) * (1 + 1 / len(times)) + 1e-3 if len(times) else options.duration_s


def _warmup_s(options: Options) -> float:
    return min(0.1 * _duration_s(options), 5.0) if options.warmup_s is None else options.warmup_s


def _offered_per_s(options: Options, plan: Schedule) -> float | None:
    if options.users is not None:
        return None
    return options.qps if options.qps is not None else len(plan.scheduled_s) / _duration_s(options)


def _core(wanted: object) -> int | None:
    """Return the core to pin the worker to: the last this process may use, where there are two."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if wanted == "auto":
        return allowed[-1] if len(allowed) >= 2 else None
    if wanted is None or wanted in allowed:
        return wanted
    raise BadInput(f"core {wanted} is not among the cores this process may use: {', '.join(map(str, allowed)) or 'unknown here'}")


def _job(options: Options, plan: Schedule, found: target.Target, rows: Path) -> job.Job:
    offered = _offered_per_s(options, plan)
    ahead = options.users or min(len(plan.scheduled_s), 8 + math.ceil(2 * (offered or 0)))
    return job.Job(
        scheme=found.scheme,
        host=found.host,
        address=found.address,
        port=found.port,
        endpoint=endpoints.Spec(name=options.endpoint, path=found.path, model=found.model, ignore_eos=found.ignore_eos),
        payload=payloads.Spec(
            prompt_chars=[found.chars(int(n)) for n in plan.prompt_tokens],
            output_tokens=[int(n) for n in plan.output_tokens],
            seed=options.seed,
        ),
        api_key=options.api_key,
        scheduled_s=[] if options.users else plan.scheduled_s.tolist(),
        users=options.users,
        think_s=options.think_s,
        duration_s=_duration_s(options),
        warmup_s=_warmup_s(options),
        timeout_s=options.timeout_s,
        drain_s=options.drain_s,
        connections=min(ahead, _MOST_CONNECTIONS),
        core=_core(options.core),
        seed=options.seed,
        rows=str(rows),
    )


def _rows_file(requests_file: Path | None) -> Path:
    """Return the file that records go to while the run lasts, beside the final one."""
    if requests_file is None:
        handle, name = tempfile.mkstemp(prefix="mlsys-loadtest-", suffix=".jsonl")
        os.close(handle)
        return Path(name)
    rows = requests_file.with_name(f".{requests_file.name}.{os.getpid()}.jsonl")
    try:
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.touch()
    except OSError as error:
        raise BadInput(f"{requests_file}: cannot be written: {error.strerror or error}") from error
    return rows


# ---------------------------------------------------------------- while it runs


class _Child:
    """The worker process.  Ctrl-C reaches only us (it has its own session); it stops by a word, or when our end of the pipe closes."""

    def __init__(self, work: job.Job) -> None:
        self.t0_unix_s = 0.0
        self.last_words = ""
        self._stops = 0
        self._has_job = False
        self._buffer = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlsys_bench.loadtest.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
        )
        is_main = threading.current_thread() is threading.main_thread()
        self._handler = signal.signal(signal.SIGINT, self._on_interrupt) if is_main else None
        self._tell(job.encode(work) + b"\n")
        self._has_job = True
        if self._stops:
            self._tell(b"stop\n")

    def follow(self, on_progress: Callable[[Progress], None] | None) -> job.Done | None:
        """Read what the worker says until its last word; None when it died before that."""
        for line in self._lines():
            said = job.decode_said(line)
            self.t0_unix_s = said.hello or self.t0_unix_s
            if said.progress is not None and on_progress is not None:
                on_progress(said.progress)
            if said.done is not None:
                return said.done
        return None

    def end(self) -> None:
        """Leave nothing behind: no process, no pipe, no signal handler."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
        with self._errors:
            self._errors.seek(0)
            wrote = self._errors.read().decode(errors="replace").strip()
        code = self._process.returncode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with status {code}"
        self.last_words = f"{how}{': ' + wrote.splitlines()[-1] if wrote else ''}"

    def _lines(self) -> Iterator[bytes]:
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        with selectors.DefaultSelector() as selector:
            selector.register(fd, selectors.EVENT_READ)
            patience_s = _START_S
            while True:
                if not selector.select(patience_s):
                    self._process.kill()
                    return
                patience_s = _SILENCE_S
                data = os.read(fd, 65536)
                if not data:
                    return
                *lines, self._buffer = (self._buffer + data).split(b"\n")
                yield from lines

    def _on_interrupt(self, *_: object) -> None:
        """Ask for an end the first time, force it the second."""
        self._stops += 1
        if self._stops > 1:
            self._process.kill()
        elif self._has_job:
            self._tell(b"stop\n")

    def _tell(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line)
            self._process.stdin.flush()


# ---------------------------------------------------------------- after


def read_rows(rows: Path) -> list[RequestRecord]:
    """Return the records a worker wrote, in order; a last line that was cut off is left out."""
    *lines, _cut = rows.read_bytes().split(b"\n")
    decode = msgspec.json.Decoder(RequestRecord).decode
    return sorted((decode(line) for line in lines), key=lambda r: r.index)


def _keep(requests_file: Path, requests: Requests) -> None:
    from mlsys_bench import hardware, record

    record.write(requests_file, requests, hardware.machine())


def _agrees(done: job.Done, requests: Requests) -> bool:
    """Say whether the records, what the worker sent and what Locust counted are the same requests."""
    failed = sum(r.outcome != "ok" for r in requests.requests)
    kept = len(requests.requests)
    return done.sent <= kept == done.locust_requests and failed == done.locust_failures


def _obituary(child: _Child, done: job.Done | None, kept: int, where: Path) -> str:
    """Say how a worker died, or what it lost."""
    what = (
        "died" if done is None else f"sent {done.sent} requests, Locust counted {done.locust_requests}, {kept} were written down; it ended"
    )
    return f"the load worker {what} {child.last_words}; {kept} requests are kept in {where}"


def _result(options: Options, plan: Schedule, found: target.Target, work: job.Job, done: job.Done, requests: Requests) -> LoadTest:
    end_s = min(work.duration_s, done.ran_s) if done.stopped else work.duration_s
    _check_answers(options, requests, done, work.warmup_s)
    sent = np.array([r.index for r in requests.requests if r.in_window]) % len(plan.prompt_tokens)
    flaws = []
    if done.stopped:
        flaws.append(f"stopped by hand after {done.ran_s:.1f} of {work.duration_s:.1f} s; requests in flight then are left out")
    unfinished = sum(r.outcome == "unfinished" for r in requests.requests)
    if unfinished:
        flaws.append(f"{unfinished} answers did not come within {options.drain_s:g} s after the last send: the server is behind")
    return summary.summarise(
        requests.requests,
        source="loadtest",
        target=f"{options.url} ({found.model})",
        arrivals=f"closed loop, {options.users} users" if options.users else "trace" if options.trace else options.arrivals,
        offered_rate_per_s=_offered_per_s(options, plan),
        slo=options.slo,
        validity=validity.judge(
            requests.requests,
            cpu_share=done.cpu_share,
            asked_prompt_tokens=float(plan.prompt_tokens[sent].mean()),
            asked_output_tokens=float(plan.output_tokens[sent].mean()),
            flaws=flaws,
            notes=found.notes,
        ),
        window=(work.warmup_s, end_s),
        requests_file=str(options.requests_file) if options.requests_file else None,
    )


def _check_answers(options: Options, requests: Requests, done: job.Done, warmup_s: float) -> None:
    inside: Sequence[RequestRecord] = [r for r in requests.requests if r.in_window]
    where = f"; every request is in {options.requests_file}" if options.requests_file else ""
    if done.stopped and not inside:
        raise MeasurementFailed(f"stopped after {done.ran_s:.1f} s: nothing was answered yet past the warm-up of {warmup_s:.1f} s{where}")
    if not any(r.outcome == "ok" for r in inside):
        kinds = Counter(f"{r.outcome}{f' (HTTP {r.http_status})' if r.http_status else ''}" for r in inside)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        raise MeasurementFailed(f"{options.url}: none of {len(inside)} requests was answered: {listed or 'none was sent'}{where}")
