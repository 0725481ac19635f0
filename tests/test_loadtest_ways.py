"""Ways of a request: over TLS, through proxies, and over WebSockets, against real sockets."""

# ruff: noqa: D102  the little servers' methods are named for what they do

from __future__ import annotations

import base64
import dataclasses
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from wsproto import ConnectionType, WSConnection, events

from mlsys_bench.loadtest import payloads
from mlsys_bench.loadtest.client import Client, Proxy
from mlsys_bench.loadtest.payloads.think import Think
from tests.sent_requests import (
    OK,
    STREAM,
    a_job,
    chunk,
    one,
    read_request,
    sent,
    serving,
    text,
)

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")


# ---------------------------------------------------------------- TLS and proxies


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, made = folder / "key.pem", folder / "cert.pem"
    new = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    named = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(made)]
    subprocess.run([*new, *named], check=True, capture_output=True)
    return key, made


@pytest.fixture
def tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1], certificate[0])
    return context


@needs_openssl
def test_a_certificate_must_be_trusted_named_or_waved_through(certificate: tuple[Path, Path], tls: ssl.SSLContext, tmp_path: Path) -> None:
    with serving(OK, tls=tls) as server:
        outcomes = [
            one(a_job(server.port, scheme="https", client=client), tmp_path).outcome
            for client in (Client(), Client(ca_file=str(certificate[1])), Client(insecure=True))
        ]
    assert outcomes == ["connect", "ok", "ok"]


@needs_openssl
def test_much_goes_over_tls_both_ways(certificate: tuple[Path, Path], tls: ssl.SSLContext, tmp_path: Path) -> None:
    words = [*[text("a" * 900)] * 400, text("c", '"length"'), b"data: [DONE]\n\n"]
    long = STREAM + b"".join(map(chunk, words)) + b"0\r\n\r\n"
    work = a_job(0, scheme="https", client=Client(ca_file=str(certificate[1])), scheduled_s=[0.0, 0.05])
    work = dataclasses.replace(work, payload=payloads.Spec(prompt_chars=[1_000_000], output_tokens=[3], seed=1))
    with serving(long, tls=tls) as server:
        found = sent(dataclasses.replace(work, port=server.port), tmp_path)
    assert [(r.outcome, r.output_tokens) for r in found] == [("ok", 401)] * 2


class ProxyHandler(socketserver.BaseRequestHandler):
    """Tunnels, and passes plain requests on as they are."""

    server: socketserver.ThreadingTCPServer

    def handle(self) -> None:
        got = read_request(self.request)
        while got is not None:
            seen: list[bytes] = self.server.seen  # type: ignore[attr-defined]
            seen.append(got[0])
            method, where, _ = got[0].split(b"\r\n")[0].split(b" ")
            if b"cHc6dQ==" in got[0]:  # pw:u: the wrong way round
                self.request.sendall(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
                return
            host, port = where.removeprefix(b"http://").split(b"/")[0].split(b":")
            with socket.create_connection((host.decode(), int(port))) as there:
                if method == b"CONNECT":
                    self.request.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    thread = threading.Thread(target=pump, args=(self.request, there))
                    thread.start()
                    pump(there, self.request)
                    thread.join()
                    return
                there.sendall(got[0] + b"\r\n\r\n" + got[1])
                there.shutdown(socket.SHUT_WR)
                pump(there, self.request, ends=False)
            got = read_request(self.request)


def pump(source: socket.socket, sink: socket.socket, ends: bool = True) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
        if ends:
            sink.shutdown(socket.SHUT_WR)
    except OSError:
        return


@contextmanager
def proxying() -> Iterator[tuple[int, list[bytes]]]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), ProxyHandler) as server:
        server.daemon_threads = True
        seen: list[bytes] = []
        server.seen = seen  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield int(server.server_address[1]), seen
        finally:
            server.shutdown()
            thread.join()


def test_plain_http_names_the_whole_url_to_a_proxy(tmp_path: Path) -> None:
    with serving(OK) as server, proxying() as (port, seen):
        proxy = Proxy(host="127.0.0.1", port=port, credentials="u:pw")
        r = one(a_job(server.port, proxy=proxy, address="192.0.2.1"), tmp_path)
        assert seen[0].startswith(
            b"POST http://127.0.0.1:%d/v1/completions HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n" % (server.port, server.port)
        )
    assert b"Proxy-Authorization: Basic " + base64.b64encode(b"u:pw") in seen[0]
    assert r.outcome == "ok"


@needs_openssl
def test_https_goes_through_a_tunnel(certificate: tuple[Path, Path], tls: ssl.SSLContext, tmp_path: Path) -> None:
    with serving(OK, tls=tls) as server, proxying() as (port, seen):
        proxy = Proxy(host="127.0.0.1", port=port, credentials="u:pw")
        work = a_job(server.port, scheme="https", proxy=proxy, client=Client(ca_file=str(certificate[1])), scheduled_s=[0.0, 0.03])
        found = sent(work, tmp_path)
        refused = one(dataclasses.replace(work, proxy=dataclasses.replace(proxy, credentials="pw:u"), scheduled_s=[0.0]), tmp_path)
        assert seen[0].startswith(b"CONNECT 127.0.0.1:%d HTTP/1.1\r\n" % server.port)
        assert b"Proxy-Authorization" not in server.heads[0]
    assert [r.outcome for r in found] == ["ok", "ok"]
    assert refused.outcome == "connect"


# ---------------------------------------------------------------- WebSocket


class SocketHandler(socketserver.BaseRequestHandler):
    """Greets, pings, and answers a message with three tokens and an end; the fourth with a goodbye."""

    def handle(self) -> None:
        protocol, asked = WSConnection(ConnectionType.SERVER), 0
        while data := self.request.recv(65536):
            protocol.receive_data(data)
            for event in protocol.events():
                if isinstance(event, events.Request):
                    self.request.sendall(protocol.send(events.AcceptConnection()) + protocol.send(events.TextMessage(data='{"hello": 1}')))
                elif isinstance(event, events.TextMessage):
                    asked += 1
                    self.answer(protocol, asked)
                elif isinstance(event, events.CloseConnection):
                    return

    def answer(self, protocol: WSConnection, asked: int) -> None:
        for token in ("a", "b"):
            said = text(token).removeprefix(b"data: ").decode()
            self.request.sendall(protocol.send(events.Ping()) + protocol.send(events.TextMessage(data=said)))
        last = text("c", '"stop"').removeprefix(b"data: ").decode()
        end = events.TextMessage(data="[DONE]") if asked < 4 else events.CloseConnection(code=1000)
        self.request.sendall(protocol.send(events.TextMessage(data=last)) + protocol.send(end))


def test_requests_go_over_one_websocket_after_the_other(tmp_path: Path) -> None:
    """Greetings and pings are no tokens; [DONE] and a goodbye both end an answer; after a goodbye the next connection is used."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), SocketHandler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        work = a_job(
            int(server.server_address[1]), transport="websocket", scheduled_s=[], users=1, think=Think(mean_s=0.01), duration_s=0.2
        )
        found = sent(work, tmp_path)
        server.shutdown()
        thread.join()
    assert found
    assert {(r.outcome, r.http_status, r.tokens_per_event, r.token_source) for r in found} == {("ok", 200, (1, 1, 1), "chunks")}
    assert all(list(r.token_s) == sorted(r.token_s) for r in found)
