"""Whole runs against servers that are not ours: other APIs, a WebSocket, a person's own Locust file."""

# ruff: noqa: D101, D102  the little servers' methods are named for what they do

from __future__ import annotations

import base64
import hashlib
import json
import socketserver
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import loadtest
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest.form import Form
from mlsys_bench.types import Lengths
from tests import loadtest_apis as apis


def options(url: str, **more: Any) -> loadtest.Options:
    usual: dict[str, Any] = {
        "arrivals": "constant", "duration_s": 0.6, "warmup_s": 0.0, "prompt_tokens": Lengths(mean=50), "output_tokens": Lengths(mean=4),
        "timeout_s": 20.0, "metrics": ("off",),
    }  # fmt: skip
    return loadtest.Options(url=url, **{**usual, **more})


@pytest.mark.e2e
def test_a_batch_of_embeddings_is_measured_without_tokens_that_are_not_there() -> None:
    with apis.serving(apis.Embedder()) as server:
        found, requests = loadtest.run(options(server.url, qps=40, form=Form(batch=3)))
        sent = server.asked("/v1/embeddings")[-1]["input"]
    assert (found.ok, found.errors, found.target) == (24, {}, f"{server.url} (tiny, embeddings)")
    assert (found.ttft_s.count, found.tpot_s.count, found.e2e_s.count) == (0, 0, 24)
    assert [len(text) for text in sent] == [50, 50, 50]
    assert {(r.prompt_tokens, r.output_tokens, r.token_source) for r in requests.requests} == {(150, None, None)}
    assert not [reason for reason in found.validity.reasons if "prompts had" in reason]


@pytest.mark.e2e
def test_any_api_of_json_lines_is_measured_to_the_token() -> None:
    form = Form(
        template='{"say": {{ text | tojson }}, "length": {{ output_tokens }}}', response_path="$.out.words", finish_path="$.last",
        usage_path="$.made",
    )  # fmt: skip
    with apis.serving(apis.Homemade()) as server:
        found, requests = loadtest.run(options(server.url + "/say?now=1", qps=40, form=form))
    assert (found.ok, found.errors) == (24, {})
    assert {(r.output_tokens, r.tokens_per_event, r.token_source) for r in requests.requests} == {(8, (2, 2, 2, 2), "usage")}


@pytest.mark.e2e
@pytest.mark.parametrize(("method", "path"), [("POST", "/201"), ("PUT", "/204"), ("GET", "/empty"), ("HEAD", "/200")])
def test_any_api_answers_with_any_status_that_says_it_went_well(method: str, path: str) -> None:
    """Created, no content, an empty body, no body at all: each is an answer whose time is that of its end."""
    form = Form(method=method, template=None if method in ("GET", "HEAD") else '{"say": {{ text | tojson }}}')
    with apis.serving(apis.Plain()) as server:
        found, requests = loadtest.run(options(server.url + path, qps=40, timeout_s=3.0, endpoint="http", form=form))
    assert (found.ok, found.errors, found.e2e_s.count) == (24, {}, 24)
    assert {r.http_status for r in requests.requests} == {int(path[1:]) if path != "/empty" else 200}


def test_an_api_that_says_it_went_wrong_is_not_loaded() -> None:
    with apis.serving(apis.Plain()) as server, pytest.raises(BadInput, match="answers 302"):
        loadtest.run(options(server.url + "/302", qps=40, endpoint="http", form=Form(method="GET")))


# ---------------------------------------------------------------- WebSocket, RFC 6455


class Talker(socketserver.StreamRequestHandler):
    """Upgrades, then answers each message with as many messages as it asks for; the last says so."""

    def handle(self) -> None:
        key = ""
        while (line := self.rfile.readline().strip()) != b"":
            name, _, value = line.decode().partition(": ")
            key = value if name.lower() == "sec-websocket-key" else key
        if not key:
            return
        accept = base64.b64encode(hashlib.sha1(f"{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11".encode()).digest()).decode()
        upgrade = "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        self.wfile.write(f"{upgrade}Sec-WebSocket-Accept: {accept}\r\n\r\n".encode())
        while (message := self.message()) is not None:
            n = json.loads(message)["n"]
            for i in range(n):
                self.say({"t": "a", "end": i + 1 == n})

    def message(self) -> bytes | None:
        head = self.rfile.read(2)
        if len(head) < 2 or head[0] & 15 == 8:
            return None
        size = head[1] & 127
        size = int.from_bytes(self.rfile.read(2)) if size == 126 else size
        mask = self.rfile.read(4)
        return bytes(byte ^ mask[i % 4] for i, byte in enumerate(self.rfile.read(size)))

    def say(self, what: object) -> None:
        data = json.dumps(what).encode()
        self.wfile.write(bytes([0x81, len(data)]) + data)


@contextmanager
def talking() -> Iterator[str]:
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Talker) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"ws://127.0.0.1:{server.server_address[1]}/talk"
        server.shutdown()
        thread.join()


@pytest.mark.e2e
def test_messages_of_a_websocket_are_read_until_the_one_that_says_it_is_the_last() -> None:
    form = Form(template='{"n": {{ output_tokens }}, "text": {{ text | tojson }}}', response_path="$.t", finish_path="$.end")
    with talking() as url:
        found, requests = loadtest.run(options(url, qps=40, form=form))
    assert (found.ok, found.errors) == (24, {})
    assert {(r.output_tokens, len(r.token_s), r.token_source) for r in requests.requests} == {(4, 4, "chunks")}


# ---------------------------------------------------------------- a Locust file of one's own

LOCUSTFILE = """
import time
from locust import FastHttpUser, HttpUser, User, constant, events, task

class Fast(FastHttpUser):
    wait_time = constant(0.02)

    @task
    def models(self):
        self.client.get("/v1/models", name="models")

    @task
    def nothing(self):
        self.client.get("/nowhere")

class Plain(HttpUser):
    wait_time = constant(0.02)

    @task
    def chat(self):
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as answer:
            if answer.json()["usage"]["completion_tokens"] != 3:
                answer.failure("not three tokens")

class Unlucky(FastHttpUser):
    wait_time = constant(0.02)
    network_timeout = 0.15

    @task
    def fail(self):
        self.client.get("http://127.0.0.1:1/closed")
        self.client.get("/hang")
        self.client.get("/leave")
        self.client.get("/busy")

class UnluckyToo(HttpUser):
    wait_time = constant(0.02)

    @task
    def fail(self):
        self.client.get("http://127.0.0.1:1/closed")
        self.client.get("/hang", timeout=0.15)
        self.client.get("/leave")
        self.client.get("/busy")

class Own(User):
    wait_time = constant(0.02)

    @task
    def talk(self):
        context = {"ttft_s": 0.01, "output_tokens": 5, "session": 7}
        events.request.fire(request_type="TALK", name="hello", response_time=30.0, response_length=5, exception=None,
                            start_time=time.time(), context=context)

@events.test_start.add_listener
def _begin(environment, **_):
    assert environment.host.startswith("http://127.0.0.1")
"""


class Moody(apis.ChatOnly):
    def __init__(self) -> None:
        super().__init__()
        self.over = threading.Event()

    def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
        if path == "/hang":
            self.over.wait()
        if path == "/leave":
            raise ConnectionAbortedError  # http.server closes the connection
        return apis.as_json({"error": "later"}, 503) if path == "/busy" else super().answer(method, path, body)


@pytest.mark.e2e
def test_a_locust_file_of_ones_own_gives_our_records(tmp_path: Path) -> None:
    """Its users' requests are the server's, one for one; failures by kind; a first token only where the file tells of it."""
    file = tmp_path / "users.py"
    file.write_text(LOCUSTFILE)
    with apis.serving(Moody()) as server:
        found, requests = loadtest.run(options(server.url, users=10, locustfile=file, requests_file=tmp_path / "r.parquet"))
        server.over.set()
        seen = Counter(path for _, path, _, _ in server.seen)
    named = Counter(r.tenant for r in requests.requests)
    assert named["GET models"] == seen["/v1/models"] > 0
    assert named["GET /nowhere"] == seen["/nowhere"] > 0
    assert named["POST /v1/chat/completions"] == seen["/v1/chat/completions"] > 0
    kinds = {"/nowhere": "bad_response", "/closed": "connect", "/hang": "timeout", "/leave": "reset", "/busy": "rejected"}
    failed = {((r.tenant or "").rpartition("/")[2], r.outcome, r.http_status) for r in requests.requests if r.outcome != "ok"}
    assert {(f"/{name}", outcome) for name, outcome, _ in failed} == set(kinds.items())
    assert {status for _, _, status in failed} == {404, 503, None}
    assert set(found.errors) == set(kinds.values())
    told = [r for r in requests.requests if r.tenant == "TALK hello"]
    assert found.ttft_s.count == sum(r.in_window for r in told) > 0
    assert found.ttft_s.p50 == pytest.approx(0.01)
    assert found.tpot_s.p50 == pytest.approx(0.02 / 4)
    assert {(r.session, r.output_tokens) for r in told} == {("7", 5)}
    assert found.e2e_s.count == found.ok
    assert found.validity.reasons[-1].startswith("sent by your own users")
    assert found.arrivals == "closed loop, 10 users"


@pytest.mark.e2e
def test_a_locust_file_that_cannot_run_says_why(tmp_path: Path) -> None:
    file = tmp_path / "users.py"
    for text, why in (("import nothing_of_this_name", "cannot be imported: .*nothing_of_this_name"), ("x = 1", "has no User class")):
        file.write_text(text)
        with pytest.raises(BadInput, match=rf"--locustfile .*users\.py: {why}"):
            loadtest.run(options("http://127.0.0.1:9", users=2, locustfile=file))


def test_what_does_not_go_with_a_locust_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "users.py"
    file.write_text("def (")
    for more, says in (({"qps": 3.0}, "--users"), ({"users": 1}, "is no Python"), ({"users": 1, "headers": (("A", "b"),)}, "own headers")):
        with pytest.raises(BadInput, match=says):
            loadtest.dry_run(options("http://127.0.0.1:9", locustfile=file, **more))
    with pytest.raises(BadInput, match="cannot be read"):
        loadtest.dry_run(options("http://127.0.0.1:9", users=1, locustfile=tmp_path / "none.py"))
