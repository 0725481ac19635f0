"""The truth server: it sends what was asked, and its ledger tells what was really sent.  Nothing here asserts on speed."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import select
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.loadtest import answers
from mlsys_bench.loadtest.truth import Behaviour, Row, dialect
from mlsys_bench.loadtest.truth import __main__ as command
from mlsys_bench.loadtest.truth.client import Truth
from mlsys_bench.loadtest.truth.client import serving as in_a_process
from mlsys_bench.loadtest.truth.loop import Server

pytestmark = pytest.mark.skipif(not hasattr(select, "epoll"), reason="the truth server needs epoll")
AT_ONCE = {"ttft_s": 0.0, "itl_s": 0.0}


@contextmanager
def serving(**how: Any) -> Iterator[Truth]:
    """Serve in a thread of this process, until the other end of a pipe closes."""
    listener = command._listen(0)
    server = Server(Behaviour(**how), listener)
    ours, theirs = os.pipe()
    thread = threading.Thread(target=server.run, args=(ours,), daemon=True)
    thread.start()
    try:
        yield Truth(f"http://127.0.0.1:{listener.getsockname()[1]}")
    finally:
        os.close(theirs)
        thread.join()
        server.close()
        os.close(ours)


def ask(
    connection: http.client.HTTPConnection, path: str = "/v1/completions", headers: Any = None, **body: Any
) -> http.client.HTTPResponse:
    connection.request("POST", path, json.dumps({"model": "truth", "prompt": "a" * 62, **body}), headers or {})
    return connection.getresponse()


def connect(server: Truth, stack: ExitStack) -> http.client.HTTPConnection:
    return stack.enter_context(closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=20)))


def events(data: bytes) -> list[Any]:
    lines = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


# ---------------------------------------------------------------- what it says


def test_a_stream_has_the_tokens_that_were_asked_and_says_so() -> None:
    with serving(**AT_ONCE) as server, ExitStack() as stack:
        response = ask(connect(server, stack), stream=True, max_tokens=7, stream_options={"include_usage": True})
        said = events(response.read())
    assert (response.status, response.headers.get_content_type()) == (200, "text/event-stream")
    assert [e["choices"][0]["text"] for e in said[:-1]] == [" the"] * 7
    assert [e["choices"][0]["finish_reason"] for e in said[:-1]] == [None] * 6 + ["length"]
    assert said[-1]["usage"] == {"prompt_tokens": 16, "completion_tokens": 7, "total_tokens": 23}


@pytest.mark.parametrize(("role", "first"), [("with", "assistant"), ("early", "assistant"), ("none", None)])
def test_the_role_of_a_chat_comes_as_told(role: str, first: str | None) -> None:
    with serving(role=role, **AT_ONCE) as server, ExitStack() as stack:
        said = events(ask(connect(server, stack), "/v1/chat/completions", stream=True, max_tokens=2, messages=[]).read())
    assert said[0]["choices"][0]["delta"].get("role") == first
    assert [e["choices"][0]["delta"].get("content") for e in said if e["choices"][0]["delta"].get("content")] == [" the", " the"]


def test_answers_in_one_piece_embeddings_models_metrics_and_what_it_does_not_know() -> None:
    with serving(**AT_ONCE) as server, ExitStack() as stack:
        connection = connect(server, stack)
        whole = json.loads(ask(connection, max_tokens=3).read())
        chat = json.loads(ask(connection, "/v1/chat/completions", max_completion_tokens=2, messages=[]).read())
        vector = json.loads(ask(connection, "/v1/embeddings", input="a").read())
        assert ask(connection, "/v1/nothing").read() == b'{"error":{"message":"no such path: /v1/nothing","type":"truth"}}'
        connection.request("POST", "/v1/completions", "{oops")
        assert connection.getresponse().read().startswith(b'{"error":')
        connection.request("GET", "/metrics")
        metrics = connection.getresponse().read().decode()
        connection.request("GET", "/v1/models")
        assert json.loads(connection.getresponse().read())["data"][0]["id"] == "truth"
    assert (whole["choices"][0]["text"], whole["usage"]["completion_tokens"]) == (" the the the", 3)
    assert chat["choices"][0]["message"] == {"role": "assistant", "content": " the the"}
    assert len(vector["data"][0]["embedding"]) == 4
    assert 'vllm:num_requests_running{model_name="truth"} 0' in metrics


@given(tokens=st.integers(1, 70), per_event=st.integers(1, 9), chat=st.booleans(), role=st.sampled_from(["with", "early", "none"]))
def test_a_client_reads_back_every_token_however_they_are_bundled(tokens: int, per_event: int, chat: bool, role: Any) -> None:
    """The load client's own reader, fed with each write at a second of its own, finds as many events and tokens as were asked."""
    streams = dialect.Streams(Behaviour(tokens_per_event=per_event, role=role))
    what = dialect.Asked(kind="chat" if chat else "completions", streams=True, tokens=tokens, prompt_tokens=5, usage=True)
    written = [streams.on_arrival(what), *(streams.event(what, i) for i in range(streams.events(what)))]
    pieces = [(float(i), unchunked(data.split(b"\r\n\r\n", 1)[1] if data.startswith(b"HTTP") else data)) for i, data in enumerate(written)]
    found = answers.read(pieces)
    assert (found.output_tokens, found.prompt_tokens, found.token_source, found.is_whole) == (tokens, 5, "usage", True)
    assert found.token_s == tuple(float(i + 1) for i in range(-(-tokens // per_event)))
    assert sum(found.tokens_per_event) == tokens


def unchunked(data: bytes) -> bytes:
    out = b""
    while data:
        size, _, rest = data.partition(b"\r\n")
        out += rest[: int(size, 16)]
        data = rest[int(size, 16) + 2 :]
    return out


@given(cut=st.integers(0, 200), second=st.booleans())
def test_a_request_is_known_when_its_last_byte_is_there_and_not_before(cut: int, second: bool) -> None:
    head = b"POST /v1/completions?x=1 HTTP/1.1\r\nHost: a\r\nX-MLSYS-Sched: 12.500000\r\ncontent-LENGTH: 11\r\n\r\n"
    one = head + b'{"stream":1'
    assert dialect.cut(one[: min(cut, len(one) - 1)]) is None
    found = dialect.cut(one + b"POST" * second)
    assert found is not None
    request, size = found
    assert (size, request.path, request.body, request.due_unix_s) == (len(one), b"/v1/completions", b'{"stream":1', 12.5)
    assert request.kind() == "completions"


# ---------------------------------------------------------------- what it tells of itself


def test_the_ledger_has_each_request_with_its_moments_in_order() -> None:
    """No token goes out before its time: that is certain on any machine."""
    with serving(ttft_s=0.03, itl_s=0.01) as server, ExitStack() as stack:
        connection = connect(server, stack)
        for due in (5.25, 6.5):
            ask(connection, headers={"x-mlsys-sched": f"{due:.6f}"}, stream=True, max_tokens=4).read()
        rows, stats = server.rows(), server.stats()
        server.reset()
        assert (server.rows(), server.stats()["requests"], server.stats()["ttft_ms"]) == ([], 0, None)
    assert [(r.due_unix_s, r.tokens) for r in rows] == [(5.25, 4), (6.5, 4)]
    for row in rows:
        assert row.first_s is not None
        assert row.done_s is not None
        assert 0.03 <= row.first_s <= row.done_s >= 0.06
    assert rows[0].arrived_unix_s + (rows[0].done_s or 0) < rows[1].arrived_unix_s
    assert (stats["requests"], stats["answered"], stats["tokens"], stats["connections_accepted"]) == (
        2,
        2,
        8,
        3,
    )  # ours, and one for each question
    first_ms = [1e3 * (r.first_s or 0) for r in rows]
    assert stats["ttft_ms"]["max"] == pytest.approx(max(first_ms))
    assert stats["ttft_ms"]["mean"] == pytest.approx(np.mean(first_ms))
    assert 0 <= stats["server_late_ms"]["p50"] <= stats["server_late_ms"]["max"]
    span_s = sum((r.done_s or 0) - (r.first_s or 0) for r in rows)
    assert stats["itl_ms"]["mean"] == pytest.approx(1e3 * span_s / 6)  # six gaps of two streams


def test_slots_are_a_queue_and_who_leaves_frees_its_place() -> None:
    with serving(slots=1, ttft_s=0.05, itl_s=0.0) as server, ExitStack() as stack:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        leaving = stack.enter_context(closing(socket.create_connection(address)))
        body = b'{"stream":true,"max_tokens":2}'
        leaving.sendall(b"POST /v1/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        assert leaving.recv(100).startswith(b"HTTP/1.1 200")  # in service: its head has come
        waiting = [connect(server, stack) for _ in range(3)]
        for connection in waiting:
            connection.request("POST", "/v1/completions", body)
        leaving.close()
        said = [events(connection.getresponse().read()) for connection in waiting]
        rows, stats = server.rows(), server.stats()
    assert [len(each) for each in said] == [2, 2, 2]
    assert (stats["peak_in_service"], stats["answered"], stats["left"]) == (1, 3, 1)
    first = sorted(r.arrived_unix_s + r.first_s for r in rows if r.first_s is not None)
    assert min(np.diff(first)) >= 0.05 - 1e-3  # one after the other


def test_a_share_of_errors_is_seeded_and_counted_apart() -> None:
    with serving(error_share=0.5, seed=3, **AT_ONCE) as server, ExitStack() as stack:
        connection = connect(server, stack)
        statuses = []
        for _ in range(40):
            response = ask(connection, max_tokens=1)
            response.read()
            statuses.append(response.status)
        stats = server.stats()
    assert set(statuses) == {200, 500}
    assert 8 <= statuses.count(500) <= 32  # 20 on average; outside once in 10^4
    assert (stats["requests"], stats["answered"]) == (40, statuses.count(200))


def test_what_is_no_http_is_refused_and_a_slow_reader_gets_everything() -> None:
    with serving(**AT_ONCE) as server, ExitStack() as stack:
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        stranger = stack.enter_context(closing(socket.create_connection(address)))
        stranger.sendall(b"HELLO\r\n\r\n")
        assert stranger.recv(1000).startswith(b"HTTP/1.1 400")
        chunked = stack.enter_context(closing(socket.create_connection(address)))
        chunked.sendall(b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert b"in chunks" in chunked.recv(1000)
        large = events(ask(connect(server, stack), stream=True, max_tokens=60_000).read())  # more than a socket's buffer
    assert len(large) == 60_000


@given(
    st.builds(
        Behaviour,
        ttft_s=st.floats(0, 100), itl_s=st.floats(0, 10), tokens=st.none() | st.integers(1, 9999), tokens_per_event=st.integers(1, 99),
        role=st.sampled_from(["with", "early", "none"]), headers=st.sampled_from(["early", "late"]), slots=st.none() | st.integers(1, 99),
        stall_every_s=st.none() | st.floats(0.1, 99), error_share=st.floats(0, 1), seed=st.integers(0, 99),
    )
)  # fmt: skip
def test_every_behaviour_can_be_said_in_flags(how: Behaviour) -> None:
    given_ = command._parser().parse_args(command.flags(how))
    back = command._behaviour({name: value for name, value in vars(given_).items() if name in command._HELP and value is not None})
    for f in dataclasses.fields(Behaviour):
        wanted = getattr(how, f.name)
        assert getattr(back, f.name) == (pytest.approx(wanted, rel=1e-12) if isinstance(wanted, float) else wanted)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--ttft", "5"], "5"), (["--role", "late"], "with, early, none"), (["--tokens", "many"], "no number"),
        (["--tokens", "0"], "1 or more"),
        (["--error-share", "2"], "between 0 and 1"), (["--error-share", "nan"], "finite"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_one_line_and_status_2(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(flags) == 2
    complaint = capsys.readouterr().err
    assert says in complaint
    assert complaint.count("\n") == 1


# ---------------------------------------------------------------- as a process


@pytest.mark.e2e
def test_as_a_process_it_stalls_as_told_and_ends_with_the_block() -> None:
    """A freeze of 400 ms within the first second: somebody who came then waited for its end."""
    with in_a_process(Behaviour(ttft_s=0.0, itl_s=0.0, stall_every_s=0.5, stall_s=0.4)) as server, ExitStack() as stack:
        connection = connect(server, stack)
        server.reset()
        while server.stats()["span_s"] < 1.0:
            ask(connection, max_tokens=1, headers={"x-mlsys-sched": "1.0"}).read()
        rows = server.rows()
    gaps_s = np.diff([r.arrived_unix_s for r in rows])
    assert isinstance(rows[0], Row)
    assert max(gaps_s) >= 0.39
    with closing(socket.socket()) as sock:
        assert sock.connect_ex(("127.0.0.1", int(server.url.rpartition(":")[2]))) != 0


@pytest.mark.e2e
def test_a_server_that_cannot_start_says_why() -> None:
    with pytest.raises(MeasurementFailed, match=r"did not start.*slots are 1 or more"), in_a_process(Behaviour(slots=-1)):
        raise AssertionError("it must not get here")
