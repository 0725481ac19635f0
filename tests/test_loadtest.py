"""The load generator against servers that know the truth and servers that misbehave."""

# ruff: noqa: D102  the little servers' methods are named for what they do

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import loadtest, record, slo, stats, workload
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest import endpoints, job, payloads, spool, target
from mlsys_bench.loadtest.client import Cancel, Client
from mlsys_bench.loadtest.payloads.think import Think
from mlsys_bench.types import Lengths, LoadTest, Requests

TRUTH = Path(__file__).parent.parent.parent / "shared" / "tools" / "truth_server.py"
needs_truth = pytest.mark.skipif(
    not TRUTH.is_file() or shutil.which("gcc") is None, reason="needs shared/tools/truth_server.py beside the checkout, and gcc"
)
needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").is_dir() or not hasattr(os, "pidfd_open"), reason="needs Linux's /proc and pidfd"
)


# ---------------------------------------------------------------- a server that does what it is told


def event(choice: dict[str, Any] | None = None, **more: object) -> bytes:
    return b"data: " + json.dumps({"id": "x", "choices": [choice] if choice else [], **more}).encode() + b"\n\n"


def text(token: str, finish: str | None = None) -> bytes:
    return event({"index": 0, "text": token, "finish_reason": finish})


def usage(prompt: int, completion: int) -> bytes:
    return event(usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})


DONE = b"data: [DONE]\n\n"


class Server(socketserver.ThreadingTCPServer):
    """Answers streams by a plan of misdeeds and keeps a ledger: (due, kind) of each."""

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 256

    def __init__(
        self, plan: Callable[[int], str] = lambda _: "ok", count: Callable[[str], int] = len, refuses_ignore_eos: bool = False
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.count, self.refuses_ignore_eos = plan, count, refuses_ignore_eos
        self.ledger: list[tuple[float, str]] = []
        self.bodies: list[dict[str, Any]] = []
        self.lock, self.over = threading.Lock(), threading.Event()
        self.tls: ssl.SSLContext | None = None

    def get_request(self) -> tuple[Any, Any]:
        sock, address = super().get_request()
        return (self.tls.wrap_socket(sock, server_side=True) if self.tls else sock), address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that leaves is part of these tests."""

    @property
    def url(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(**how: Any) -> Iterator[Server]:
    server = Server(**how)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        server.server_close()
        thread.join()


class Handler(socketserver.StreamRequestHandler):
    """One connection."""

    server: Server
    disable_nagle_algorithm = True
    wbufsize = 0

    def handle(self) -> None:
        while line := self.rfile.readline():
            headers = http.client.parse_headers(self.rfile)
            body = json.loads(self.rfile.read(int(headers.get("Content-Length") or 0)) or b"{}")
            if not self.answer(line.decode(), headers, body):
                return

    def answer(self, line: str, headers: Any, body: dict[str, Any]) -> bool:
        if line.startswith("GET"):
            return self.json(200, {"data": [{"id": "tiny"}, {"id": "other"}]})
        if self.server.refuses_ignore_eos and "ignore_eos" in body:
            return self.json(400, {"error": {"message": "unknown field ignore_eos"}})
        prompt = self.server.count(body["prompt"] if "prompt" in body else body["messages"][0]["content"])
        if not body.get("stream"):
            return self.json(200, {"choices": [{"text": "a"}], "usage": {"prompt_tokens": prompt, "completion_tokens": 1}})
        with self.server.lock:
            kind = self.server.plan(len(self.server.ledger))
            self.server.ledger.append((float(headers["x-mlsys-sched"]), kind))
            self.server.bodies.append(body)
        return bool(getattr(self, kind)(prompt, body["max_tokens"]))

    def json(self, status: int, body: object) -> bool:
        data = json.dumps(body).encode()
        self.wfile.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (status, len(data), data))
        return True

    def head(self) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    def chunk(self, data: bytes) -> None:
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def ok(self, prompt: int, tokens: int) -> bool:
        self.head()
        for i in range(tokens):
            self.chunk(text("a", "length" if i + 1 == tokens else None))
        self.chunk(usage(prompt, tokens) + DONE)
        self.wfile.write(b"0\r\n\r\n")
        return True

    def ok_until_close(self, prompt: int, tokens: int) -> bool:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text("a") * tokens + usage(prompt, tokens) + DONE)
        return False

    def cut_until_close(self, *_: int) -> bool:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + text("a"))
        return False

    def status_429(self, *_: int) -> bool:
        return self.json(429, {"error": {"message": "queue is full"}})

    def status_503(self, *_: int) -> bool:
        return self.json(503, {"error": {"message": "loading"}})

    def status_500(self, *_: int) -> bool:
        return self.json(500, {"error": {"message": "boom"}})

    def no_http(self, *_: int) -> bool:
        self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
        return False

    def no_stream(self, prompt: int, tokens: int) -> bool:
        return self.json(200, {"choices": [{"text": "a" * tokens, "finish_reason": "length"}], "usage": {"prompt_tokens": prompt}})

    def bad_json(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a") + b"data: {oops\n\n")
        self.wfile.write(b"0\r\n\r\n")
        return True

    def error_event(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a") + b'data: {"error": {"message": "engine died"}}\n\n')
        self.wfile.write(b"0\r\n\r\n")
        return True

    def early_end(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a"))
        self.wfile.write(b"0\r\n\r\n")
        return True

    def half(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a"))
        self.chunk(text("a"))
        return False

    def reset(self, *_: int) -> bool:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        return False

    def hang(self, *_: int) -> bool:
        self.head()
        self.chunk(text("a"))
        self.server.over.wait()
        return False

    def leave(self, *_: int) -> bool:
        """Close the door: nobody else gets in, and this one gets nothing."""
        with suppress(OSError):  # somebody else did
            self.server.socket.shutdown(socket.SHUT_RDWR)
        self.server.socket.close()
        return False


def options(url: str, **more: Any) -> loadtest.Options:
    usual: dict[str, Any] = {
        "arrivals": "constant", "duration_s": 1.0, "warmup_s": 0.0, "prompt_tokens": Lengths(mean=50), "output_tokens": Lengths(mean=4),
        "timeout_s": 20.0,
    }  # fmt: skip
    return loadtest.Options(url=url, **{**usual, **more})


# ---------------------------------------------------------------- before the run


def probe(url: str, **more: Any) -> target.Target:
    usual: dict[str, Any] = {"endpoint": "completions", "model": None, "api_key": None, "timeout_s": 5.0, "seed": 0}
    return target.probe(url, **{**usual, **more})


def test_a_byte_tokenizer_makes_prompts_exact() -> None:
    with serving() as server:
        found = probe(server.url)
    assert (found.model, found.path, found.ignore_eos, found.notes) == ("tiny", "/v1/completions", True, ())
    assert [found.chars(n) for n in (1, 50, 777)] == [1, 50, 777]


def test_a_chat_template_and_bigger_tokens_are_learned() -> None:
    """Four characters a token and twelve tokens of template: a prompt of 112 tokens is 400 characters of text."""
    with serving(count=lambda prompt: len(prompt) // 4 + 12) as server:
        found = probe(server.url + "/v1/", endpoint="chat", model="other")
    assert (found.model, found.path) == ("other", "/v1/chat/completions")
    assert found.chars(112) == pytest.approx(400, abs=4)  # the server counts whole tokens


def test_a_server_that_refuses_ignore_eos_is_asked_without() -> None:
    with serving(refuses_ignore_eos=True) as server:
        found = probe(server.url)
    assert not found.ignore_eos
    assert "ignore_eos" in found.notes[0]


class Page(socketserver.StreamRequestHandler):
    """Answers everything with the same bytes."""

    data = b""

    def handle(self) -> None:
        while self.rfile.readline() not in (b"\r\n", b""):
            continue
        self.wfile.write(self.data)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\n<html>", "text/html, not JSON"),
        (b"HTTP/1.0 404 Not Found\r\nContent-Type: application/json\r\n\r\n{}", "no such endpoint"),
        (b"HTTP/1.0 401 No\r\nContent-Type: application/json\r\n\r\n{}", "API key"),
        (b'HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n{"data": []}', "lists no model"),
        (b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n[1]", "no JSON object"),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "no HTTP answer"),
        (b"", "no HTTP answer"),
    ],
)
def test_a_server_of_another_kind_is_named_in_one_line(data: bytes, says: str) -> None:
    handler = type("OnePage", (Page,), {"data": data})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with pytest.raises(BadInput, match=says) as caught:
            probe(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert "\n" not in str(caught.value)


def test_nobody_at_home_an_unknown_model_and_a_bad_url_are_bad_input() -> None:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        with pytest.raises(BadInput, match="cannot be reached"):
            loadtest.run(options(f"http://127.0.0.1:{sock.getsockname()[1]}", qps=5))
    with serving() as server, pytest.raises(BadInput, match="did you mean tiny"):
        probe(server.url, model="tyni")
    for url in ("ftp://127.0.0.1", "http://", "http://127.0.0.1:port"):
        with pytest.raises(BadInput, match=r"no http URL|no URL"):
            probe(url)


# ---------------------------------------------------------------- whole runs

EXPECTED = {
    "ok": "ok", "ok_until_close": "ok", "status_429": "rejected", "status_503": "rejected", "status_500": "bad_response",
    "no_http": "bad_response", "no_stream": "bad_response", "bad_json": "bad_response", "error_event": "bad_response",
    "early_end": "bad_response", "half": "reset", "cut_until_close": "reset", "reset": "reset", "hang": "timeout",
}  # fmt: skip


@pytest.mark.e2e
def test_every_fault_is_counted_by_its_kind(tmp_path: Path) -> None:
    """The server's ledger says what it did to which request; the records must say the same, request by request."""
    kinds = list(EXPECTED)
    heard: list[loadtest.Progress] = []
    with serving(plan=lambda i: kinds[i % len(kinds)]) as server:
        asked = options(
            server.url, qps=42, duration_s=1.0, timeout_s=1.5, slo=slo.parse("ttft_p95<30s"), requests_file=tmp_path / "r.parquet"
        )
        found, requests = loadtest.run(asked, heard.append)
        did = {due: EXPECTED[kind] for due, kind in server.ledger}
    assert len(requests.requests) == len(server.ledger) == 42
    for r in requests.requests:
        due = min(did, key=lambda d: abs(d - requests.t0_unix_s - r.scheduled_s))
        assert r.outcome == did.pop(due), r
    assert found.ok == 6
    assert found.errors == {"bad_response": 18, "rejected": 6, "reset": 9, "timeout": 3}
    assert found.ttft_s.count == 6
    assert found.goodput_ratio == pytest.approx(6 / 42)
    assert found.validity.verdict == "invalid"
    assert {len(r.token_s) for r in requests.requests if r.outcome == "timeout"} == {1}  # what came before is kept
    assert heard[-1].sent == 42
    assert record.read(tmp_path / "r.parquet", Requests) == requests
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]
    sample = server.bodies[0]
    assert (sample["model"], sample["max_tokens"], sample["ignore_eos"], sample["temperature"]) == ("tiny", 4, True, 0)
    assert len(sample["prompt"]) == 50


@pytest.mark.e2e
def test_a_server_that_goes_away_is_reset_first_and_then_unreachable() -> None:
    """Answers close their connection, so that requests need new ones once the few opened ahead are used up."""
    with serving(plan=lambda i: "ok_until_close" if i < 20 else "leave") as server:
        found, requests = loadtest.run(options(server.url, users=3, think=Think(mean_s=0.01), duration_s=1.2))
    assert found.ok == 20
    assert set(found.errors) == {"reset", "connect"}
    assert found.ok + sum(found.errors.values()) == found.requests == len(requests.requests)
    assert found.requests < 20 + 3 * 13  # a user who failed takes a breath


@pytest.mark.e2e
def test_answers_that_do_not_come_within_the_drain_are_unfinished() -> None:
    with serving(plan=lambda i: "ok" if i % 2 else "hang") as server:
        found, requests = loadtest.run(options(server.url, qps=20, duration_s=0.5, drain_s=0.3))
    assert (found.ok, found.errors) == (5, {"unfinished": 5})
    assert any(reason.startswith("5 answers did not come within 0.3 s") for reason in found.validity.reasons)
    assert all(r.token_s for r in requests.requests)


@pytest.mark.e2e
def test_a_run_without_one_answer_is_a_failed_measurement(tmp_path: Path) -> None:
    with (
        serving(plan=lambda _: "status_500") as server,
        pytest.raises(MeasurementFailed, match=r"none of 10 .* 10 bad_response \(HTTP 500\)"),
    ):
        loadtest.run(options(server.url, qps=20, duration_s=0.5, requests_file=tmp_path / "r.parquet"))
    assert len(record.read(tmp_path / "r.parquet", Requests).requests) == 10


@pytest.mark.e2e
@needs_openssl
def test_https_is_spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1"]
    named = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run([*new, *named], check=True, capture_output=True)
    with serving() as server:
        server.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(certificate, key)
        with pytest.raises(BadInput, match=r"self-signed certificate; .*--ca-file"):
            loadtest.run(options(server.url, qps=40, duration_s=0.5))
        named, _ = loadtest.run(options(server.url, qps=40, duration_s=0.5, client=Client(ca_file=str(certificate))))
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        found, requests = loadtest.run(options(server.url, qps=40, duration_s=0.5))
    assert (found.ok, found.errors) == (named.ok, named.errors) == (20, {})
    assert not any(r.stage_s for r in requests.requests)  # every one went over a connection opened ahead


@pytest.mark.e2e
def test_second_attempts_and_given_up_streams_are_told_apart(tmp_path: Path) -> None:
    """The first twenty sends are refused, one stream in five is given up: all other requests are answered, some at a later attempt.

    A fourth attempt comes 0.7 s after the first, when more than twenty were sent.
    """
    client = Client(retries=3, cancel=Cancel(share=0.2, after_events=(1, 1)))
    with serving(plan=lambda i: "status_429" if i < 20 else "ok") as server:
        found, requests = loadtest.run(options(server.url, qps=60, duration_s=1.0, client=client))
        sends = len(server.ledger)
    given_up = [r.index for r in requests.requests if r.outcome == "cancelled"]
    assert set(given_up) <= {i for i in range(60) if client.cancel is not None and client.cancel.draw(0, i) != (None, None)}
    assert found.ok + len(given_up) == 60
    assert sends == sum(r.attempt for r in requests.requests) > 60
    assert max(r.attempt for r in requests.requests) > 1
    assert not any("of the requests failed" in reason for reason in found.validity.reasons), found.validity.reasons
    for r in requests.requests:
        assert ("retry" in r.stage_s) == (r.attempt > 1)


# ---------------------------------------------------------------- ends that nobody planned

PARENT = """
import sys
from pathlib import Path
from mlsys_bench import loadtest
from mlsys_bench.types import Lengths
asked = loadtest.Options(url=sys.argv[1], qps=40, arrivals="constant", duration_s=60, warmup_s=0, prompt_tokens=Lengths(mean=50),
                         output_tokens=Lengths(mean=4), requests_file=Path(sys.argv[2]))
found, requests = loadtest.run(asked, lambda progress: print("progress", progress.sent, flush=True))
print("verdict", found.validity.verdict, found.ok, " | ".join(found.validity.reasons))
"""


@contextmanager
def running_parent(url: str, file: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a load test in a process of its own; give it, once it made progress, and its worker's pid."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, url, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline().startswith("progress")
            yield parent, children(parent.pid)[0]
        finally:
            parent.kill()


def children(pid: int) -> list[int]:
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def wait_for_exit(pid: int, within_s: float) -> bool:
    """Say whether a process that is not our child is gone, or goes, within some seconds."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], within_s)[0])
    finally:
        os.close(fd)


@pytest.mark.e2e
@needs_proc
def test_ctrl_c_keeps_what_was_measured_and_leaves_no_process(tmp_path: Path) -> None:
    """Every fourth answer hangs: those are in flight when the person has had enough."""
    file = tmp_path / "r.parquet"
    with serving(plan=lambda i: "ok" if i % 4 else "hang") as server, running_parent(server.url, file) as (parent, worker):
        parent.send_signal(signal.SIGINT)
        out, err = parent.communicate(timeout=20)
        assert wait_for_exit(worker, 5)
    assert (parent.returncode, err) == (0, "")
    assert "stopped by hand after" in out
    kept = record.read(file, Requests).requests
    assert {r.outcome for r in kept} == {"ok", "cancelled"}
    assert all(r.in_window == (r.outcome == "ok") for r in kept)
    assert [r.index for r in kept] == list(range(len(kept)))
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


@pytest.mark.e2e
@needs_proc
def test_a_parent_that_is_killed_takes_its_worker_along_and_leaves_the_rows(tmp_path: Path) -> None:
    with serving() as server, running_parent(server.url, tmp_path / "r.parquet") as (parent, worker):
        parent.kill()
        assert wait_for_exit(worker, 10)
    from mlsys_bench.loadtest.shards import read_rows

    (rows,) = tmp_path.iterdir()
    assert len(read_rows(rows)) >= 10


@pytest.mark.e2e
@needs_proc
def test_a_worker_that_dies_is_a_failed_measurement_and_its_rows_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "r.parquet"
    with serving() as server, pytest.raises(MeasurementFailed, match=r"died by SIGKILL; \d+ requests are kept in .*r\.parquet"):
        loadtest.run(
            options(server.url, qps=40, duration_s=60.0, requests_file=file), lambda _: os.kill(children(os.getpid())[-1], signal.SIGKILL)
        )
    assert len(record.read(file, Requests).requests) >= 10
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


BROKEN = """
from mlsys_bench.loadtest import sender, worker
usual = sender.Sender.prepare
def prepare(self, index, *more):
    if index == 5:
        raise KeyError("no such prompt")
    return usual(self, index, *more)
sender.Sender.prepare = prepare
worker.main()
"""


@pytest.mark.e2e
def test_a_flaw_in_a_callback_ends_the_worker_loudly_and_the_rows_are_kept(tmp_path: Path) -> None:
    """Gevent would print it and go on, with a schedule that never ends."""
    rows = tmp_path / "rows"
    with serving() as server, subprocess.Popen([sys.executable, "-c", BROKEN], stdin=-1, stdout=-1, stderr=-1) as worker:
        work = job.Job(
            scheme="http", host="127.0.0.1", address="127.0.0.1", port=int(server.url.rpartition(":")[2]),
            endpoint=endpoints.Spec(name="completions", path="/v1/completions", model="tiny"),
            payload=payloads.Spec(prompt_chars=[9], output_tokens=[2], seed=0), api_key=None, scheduled_s=[i / 50 for i in range(3000)],
            users=None, duration_s=60.0, warmup_s=0.0, timeout_s=9.0, drain_s=0.0, connections=2, core=None, seed=0,
            rows=str(rows),
        )  # fmt: skip
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(job.encode(work) + b"\n")
        worker.stdin.flush()
        assert job.decode_said(worker.stdout.readline()).ready
        worker.stdin.write(job.start_line(time.monotonic()))
        worker.stdin.flush()
        assert worker.stderr is not None
        wrote = worker.stderr.read()
    assert worker.returncode == 1
    assert wrote.splitlines()[-1] == b"KeyError: 'no such prompt'"
    assert [r.index for r in spool.read(rows)] == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- against the truth


@contextmanager
def truth(*how: str) -> Iterator[str]:
    with closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with subprocess.Popen([sys.executable, str(TRUTH), "--port", str(port), *how], stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            assert b"127.0.0.1" in process.stderr.readline()
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def ask(url: str, path: str) -> bytes:
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=5)) as connection:
        connection.request("GET", path)
        return connection.getresponse().read()


def against_truth(url: str, **more: Any) -> tuple[LoadTest, Requests, dict[str, Any]]:
    found, requests = loadtest.run(options(url, prompt_tokens=Lengths(mean=16), output_tokens=Lengths(mean=8), **more))
    return found, requests, json.loads(ask(url, "/stats"))


@pytest.mark.e2e
@needs_truth
@pytest.mark.parametrize(("endpoint", "bundle"), [("completions", 1), ("chat", 4)])
def test_what_is_reported_is_what_the_server_did(endpoint: str, bundle: int) -> None:
    """50 a second, first token after 100 ms, an event every 20 ms: medians within 5 % and 2 % of what the server says it sent.

    Four tokens in each event make the ITL 5 ms, not 20: bundling does not make a server look slow.
    """
    with truth("--ttft", "100", "--itl", "20", "--tokens", "8", "--role", "early", "--coalesce", str(bundle)) as url:
        found, requests, did = against_truth(url, qps=50, duration_s=1.2, endpoint=endpoint)
        arrivals = np.array([line.split() for line in ask(url, "/arrivals").decode().splitlines()], dtype=float)
    assert (found.requests, found.ok, found.errors) == (60, 60, {})
    assert found.ttft_s.p50 == pytest.approx(did["ttft_ms"]["p50"] / 1e3, rel=0.05)
    assert found.itl_s.p50 == pytest.approx(did["itl_ms"]["p50"] / 1e3 / bundle, rel=0.02)
    assert found.tpot_s.p50 == pytest.approx(7 * 0.02 / (8 * bundle - 1), rel=0.02)
    assert found.e2e_s.p50 == pytest.approx(0.24, rel=0.05)
    assert {(r.token_source, r.output_tokens, r.prompt_tokens) for r in requests.requests} == {("usage", 8 * bundle, 16)}
    assert {r.tokens_per_event for r in requests.requests} == {(bundle,) * 8}
    # the schedule that was drawn is the schedule that was followed: each request carried the moment it was due
    due = np.sort(arrivals[arrivals[:, 1] > 0, 1]) - requests.t0_unix_s
    assert due == pytest.approx(np.arange(60) / 50, abs=2e-6)
    # keep-alive works: no connection beyond those opened ahead, the probes and the questions of this test
    assert did["conns_accepted"] <= 60 + 8 + 8


@pytest.mark.e2e
@needs_truth
def test_a_drawn_schedule_is_followed_and_its_warm_up_left_out() -> None:
    with truth("--ttft", "5", "--itl", "1", "--tokens", "8") as url:
        asked = options(url, qps=80, arrivals="gamma:2", duration_s=1.0, warmup_s=0.3, seed=11)
        drawn = loadtest.dry_run(asked)
        found, requests = loadtest.run(asked)
    assert [r.scheduled_s for r in requests.requests] == drawn.scheduled_s.tolist()
    assert [r.output_tokens for r in requests.requests] == [8] * len(drawn.scheduled_s)
    assert [r.in_window for r in requests.requests] == (drawn.scheduled_s >= 0.3).tolist()
    assert found.requests == int((drawn.scheduled_s >= 0.3).sum())
    assert found.duration_s == pytest.approx(0.7)
    assert all(r.sent_s is not None and r.sent_s >= r.scheduled_s for r in requests.requests)


@pytest.mark.e2e
@needs_truth
def test_a_closed_loop_keeps_as_many_in_flight_as_it_has_users() -> None:
    with truth("--ttft", "30", "--itl", "5", "--tokens", "8") as url:
        found, requests, did = against_truth(url, users=6, duration_s=0.8)
    rows = requests.requests
    assert did["peak_concurrency"] == 6
    in_flight = [sum(r.scheduled_s <= t < (r.done_s or 0) for r in rows) for t in np.linspace(0.2, 0.7, 50)]
    assert max(in_flight) == 6
    assert stats.quantile(in_flight, 0.5) == 6
    assert found.offered_rate_per_s is None
    assert found.arrivals == "closed loop, 6 users"
    assert [r.index for r in rows] == list(range(len(rows)))
    busy_s = sum((r.done_s or 0) - r.scheduled_s for r in rows)  # Little's law: users are busy, or thinking for no time at all
    assert busy_s == pytest.approx(6 * 0.8, rel=0.2)


@pytest.mark.e2e
@needs_truth
def test_a_server_that_stalls_cannot_hide_it() -> None:
    """It answers within 10 ms, but freezes for 500 ms of every 1.5 s: a third of those who should have been served felt it."""
    with truth("--ttft", "5", "--itl", "1", "--tokens", "4", "--stall-every", "1.0", "--stall-ms", "500") as url:
        found, requests, _ = against_truth(url, qps=100, duration_s=2.0)
    felt = np.mean([r.token_s[0] - r.scheduled_s > 0.1 for r in requests.requests if r.token_s])
    assert felt > 0.15  # a closed loop would see one request in a hundred
    assert found.ttft_s.p90 is not None
    assert found.ttft_s.p90 > 0.15
    assert found.requests == 200


@pytest.mark.e2e
def test_a_trace_is_sent_as_it_is() -> None:
    trace = workload.Schedule(scheduled_s=np.array([0.0, 0.05, 0.3]), prompt_tokens=np.array([9, 20, 5]), output_tokens=np.array([1, 2, 3]))
    with serving() as server:
        found, requests = loadtest.run(options(server.url, trace=trace))
    assert [(r.scheduled_s, r.prompt_tokens, r.output_tokens) for r in requests.requests] == [(0.0, 9, 1), (0.05, 20, 2), (0.3, 5, 3)]
    assert (found.arrivals, found.ok) == ("trace", 3)
    assert Counter(len(r.token_s) for r in requests.requests) == {1: 1, 2: 1, 3: 1}
