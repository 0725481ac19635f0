"""The load generator against servers that misbehave: what it looks at before a run, and what becomes of each request."""

# ruff: noqa: D102  the little servers' methods are named for what they do

from __future__ import annotations

import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import loadtest, record, slo
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest import target
from mlsys_bench.loadtest.client import Cancel, Client
from mlsys_bench.loadtest.payloads.think import Think
from mlsys_bench.types import Requests
from tests.planned_server import options, serving

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")


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
    host = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run([*new, *host], check=True, capture_output=True)
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
