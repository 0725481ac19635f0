"""Sessions, tenants, scenarios and images against a server that writes down what it was sent."""

# ruff: noqa: D102  the little server's methods are named for what they do

from __future__ import annotations

import http.server
import itertools
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import loadtest, workload
from mlsys_bench.loadtest import content, mlperf
from mlsys_bench.loadtest.content import Content
from mlsys_bench.loadtest.payloads import dataset
from mlsys_bench.loadtest.payloads.think import Think
from mlsys_bench.types import Lengths, LoadTest, Requests


class Chat(http.server.ThreadingHTTPServer):
    """Answers every chat with a word of its own, and keeps what it was asked: (connection, body, answer)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.numbers = itertools.count()
        self.asked: list[tuple[Any, dict[str, Any], str]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that leaves is part of these tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Chat

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  the standard library's name
        """Say nothing."""

    def do_GET(self) -> None:
        self._send(json.dumps({"data": [{"id": "tiny"}]}).encode(), "application/json")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = body.get("prompt") or "".join(m["content"] for m in body["messages"] if isinstance(m["content"], str))
        usage = {"prompt_tokens": len(given), "completion_tokens": body.get("max_tokens", 1)}
        word = f"word{next(self.server.numbers)}."
        if not body.get("stream"):
            choice = {"message": {"role": "assistant", "content": word}, "text": word, "finish_reason": "stop"}
            self._send(json.dumps({"choices": [choice], "usage": usage}).encode(), "application/json")
            return
        with self.server.lock:
            self.server.asked.append((self.client_address, body, word))
        pieces: list[dict[str, Any]] = [
            {"choices": [{"delta": {"content": part}, "text": part, "finish_reason": None}]} for part in (word[:3], word[3:])
        ]
        pieces += [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
        self._send(b"".join(b"data: " + json.dumps(p).encode() + b"\n\n" for p in pieces) + b"data: [DONE]\n\n", "text/event-stream")

    def _send(self, data: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving() -> Iterator[Chat]:
    server = Chat()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run(server: Chat, **more: Any) -> tuple[LoadTest, Requests]:
    usual: dict[str, Any] = {
        "duration_s": 1.5, "warmup_s": 0.0, "endpoint": "chat", "output_tokens": Lengths(mean=2), "prompt_tokens": Lengths(mean=40),
        "metrics": ("off",), "timeout_s": 20.0,
    }  # fmt: skip
    return loadtest.run(loadtest.Options(url=server.url, **{**usual, **more}))


LAW = workload.Sessions(turns=Lengths(mean=3), new_tokens=Lengths(mean=40), output_tokens=Lengths(mean=2), gap_mean_s=0.05)


def conversations_hold(server: Chat) -> int:
    """Hold every prompt of several turns against an earlier prompt, the answer the server gave to it, and new words; return how many."""
    answers = {json.dumps(body["messages"]): word for _, body, word in server.asked}
    later = [body["messages"] for _, body, _ in server.asked if len(body["messages"]) > 1]
    for messages in later:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]
        assert answers[json.dumps(messages[:-2])] == messages[-2]["content"]
        assert len(messages[-1]["content"]) == 40
    return len(later)


@pytest.mark.e2e
def test_turns_of_an_open_loop_carry_the_real_answers_after_their_gaps() -> None:
    """Turn k is due exactly its gap after the answer to turn k - 1 is complete, as the records say themselves."""
    with serving() as server:
        options = {"qps": 30.0, "content": Content(sessions=LAW), "seed": 3}
        found, requests = run(server, **options)
        assert conversations_hold(server) > 10
        ways = {json.dumps(body["messages"]): address for address, body, _ in server.asked}
        assert all(ways[json.dumps(b["messages"][:-2])] == a for a, b, _ in server.asked if len(b["messages"]) > 1)  # one connection each
    plan = loadtest.dry_run(
        loadtest.Options(url="x", duration_s=1.5, **options)  # type: ignore[arg-type]
    )
    assert plan.gap_s is not None
    by_session: dict[str | None, list[Any]] = {}
    for r in requests.requests:
        by_session.setdefault(r.session, []).append(r)
    assert found.errors == {}
    for turns in by_session.values():
        for before, after in itertools.pairwise(sorted(turns, key=lambda r: r.scheduled_s)):
            assert after.scheduled_s == pytest.approx(before.done_s + plan.gap_s[after.index], abs=1e-9)
    assert found.asked is not None
    assert found.asked.sessions == len(by_session)


@pytest.mark.e2e
def test_users_of_a_closed_loop_talk_and_think() -> None:
    with serving() as server:
        found, requests = run(server, users=2, content=Content(sessions=LAW), think=Think(mean_s=0.05), duration_s=1.0)
        assert conversations_hold(server) > 4
    most = max(sum(o.scheduled_s <= r.scheduled_s < (o.done_s or 0) for o in requests.requests) for r in requests.requests)
    assert most <= 2
    assert len({r.index for r in requests.requests}) == len(requests.requests) == found.requests


@pytest.mark.e2e
def test_multi_stream_sends_eight_at_once_and_waits_for_them() -> None:
    with serving() as server:
        found, requests = run(server, users=1, at_once=8, preset=mlperf.named("multi-stream"), duration_s=0.5)
    queries: dict[int, list[Any]] = {}
    for r in requests.requests:
        queries.setdefault(r.index // 8, []).append(r)
    assert all(len(samples) == 8 and len({r.scheduled_s for r in samples}) == 1 for samples in queries.values())
    order = sorted(queries)
    for a, b in itertools.pairwise(order):
        assert max(r.done_s for r in queries[a]) <= queries[b][0].scheduled_s
    assert found.scenario is not None
    assert found.scenario.queries == len(queries)


@pytest.mark.measures
def test_offline_sends_everything_at_once() -> None:
    with serving() as server:
        found, requests = run(server, offline=30, preset=mlperf.named("offline"), endpoint="completions")
        assert len(server.asked) == 30
    assert {r.scheduled_s for r in requests.requests} == {0.0}
    assert found.scenario is not None
    assert found.scenario.value == pytest.approx(30 / max(r.done_s or 0 for r in requests.requests))
    assert not any("late by the client" in reason for reason in found.validity.reasons)


@pytest.mark.e2e
def test_rows_images_and_tenants_arrive_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt number {i}\n" for i in range(7)))
    tenants = content.parse_tenants(["chat=50%@20/2", "batch=50%@60/2"])
    carried = Content(dataset=dataset.read(path), images=content.Images(pixels=(8, 8), each=2))
    with serving() as server:
        found, _ = run(server, qps=20.0, arrivals="constant", content=carried)
        parts = [body["messages"][0]["content"] for _, body, _ in server.asked]
        assert [[part["type"] for part in each] for each in parts] == [["text", "image_url", "image_url"]] * 30
        told = sorted(each[0]["text"] for each in parts)  # a busy server may take up neighbours in the other order
        assert told == sorted(f"prompt number {i % 7}" for i in range(30))
        assert len({part["image_url"]["url"] for each in parts for part in each[1:]}) == 2 * 30
        assert found.asked is not None
        assert "used 4.3 times" in found.asked.notes[0]
        found, requests = run(server, qps=40.0, content=Content(tenants=tenants), endpoint="completions", duration_s=1.0)
    lengths = {"chat": 20, "batch": 60}
    assert all(r.prompt_tokens == lengths[r.tenant or ""] for r in requests.requests)
    assert {t.name: t.requests for t in found.tenants} == {
        name: sum(r.tenant == name for r in requests.requests) for name in ("batch", "chat")
    }
