"""What the load worker reads and writes without a socket: framing put off, events decoded at once, rows, WebSocket messages, options."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wsproto import ConnectionType, WSConnection, events

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import answers, client, endpoints, job, payloads, spool, wire
from mlsys_bench.loadtest.client import Cancel, Client, Proxy
from mlsys_bench.loadtest.websocket import Frames, Messages
from mlsys_bench.types import RequestRecord


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(c % (len(data) + 1) for c in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
bodies = st.lists(st.sampled_from([b"a", b"data: x\n\n", b"data: 0\r\n\r\n", b"\r\n\r\n", b"0\r\n\r\n", b"x" * 300]), max_size=6)


@given(bodies, st.lists(st.integers(0, 5000), max_size=14))
def test_putting_off_the_framing_changes_nothing(parts: list[bytes], cuts: list[int]) -> None:
    """Bodies that look like an end of a chunked body, cut anywhere: the lazy reader says the same as the eager one, at the same piece."""
    data = HEAD + b"".join(chunk(part) for part in parts) + b"0\r\n\r\n"
    eager, lazy = wire.Response(), wire.Response()
    for at, piece in enumerate(cut(data, cuts)):
        assert lazy.take(piece, float(at)) == eager.feed(piece, float(at))
    assert lazy.body() == eager.body() == b"".join(parts)
    assert lazy.pieces == eager.pieces
    assert lazy.keep_alive
    assert eager.keep_alive


@given(bodies, st.integers(0, 400), st.lists(st.integers(0, 5000), max_size=8))
def test_what_was_only_taken_is_there_once_it_is_settled(parts: list[bytes], lost: int, cuts: list[int]) -> None:
    data = HEAD + b"".join(chunk(part) for part in parts) + b"0\r\n\r\n"
    data = data[: max(len(HEAD), len(data) - 1 - lost)]
    eager, lazy = wire.Response(), wire.Response()
    for at, piece in enumerate(cut(data, cuts)):
        assert not eager.feed(piece, float(at))
        assert not lazy.take(piece, float(at))
    assert not lazy.settle()
    assert lazy.pieces == eager.pieces


ODD = [b"5\r\na", b"0\r\n\r\n", b"\r\n", b"data: x\r\n\r\n", b"x\r\n5"]


@given(
    st.integers(9, 80), st.dictionaries(st.integers(0, 79), st.sampled_from(ODD), max_size=2), st.lists(st.integers(0, 9000), max_size=2)
)
def test_many_reads_of_one_chunk_each_are_framed_like_any_other(count: int, odd: dict[int, bytes], cuts: list[int]) -> None:
    """What framing them all at once must not be fooled by: bodies with line ends, with what looks like sizes, and chunks cut in two."""
    chunks = [chunk(odd.get(i, b"data: %d\n\n" % 7**i)) for i in range(count)] + [b"0\r\n\r\n"]
    ends = list(itertools.accumulate(map(len, [HEAD, *chunks])))
    pieces = cut(HEAD + b"".join(chunks), ends + cuts)
    eager, lazy = wire.Response(), wire.Response()
    for at, piece in enumerate(pieces):
        assert lazy.take(piece, float(at)) == eager.feed(piece, float(at))
    assert lazy.pieces == eager.pieces
    assert lazy.keep_alive == eager.keep_alive
    assert lazy.body() == b"".join(odd.get(i, b"data: %d\n\n" % 7**i) for i in range(count))


def test_a_second_answer_behind_the_first_costs_the_connection() -> None:
    response = wire.Response()
    assert not response.take(HEAD, 0.0)
    assert response.take(chunk(b"a") + b"0\r\n\r\n" + HEAD, 1.0)
    assert not response.keep_alive
    assert response.body() == b"a"


# ---------------------------------------------------------------- events, decoded in one call

EVENTS = [
    b'{"choices":[{"index":0,"text":"a","finish_reason":null}]}', b'{"choices":[{"index":0,"text":"","finish_reason":"stop"}]}',
    b'{"choices":[{"delta":{"role":"assistant","content":""}}]}', b'{"choices":[{"delta":{"content":"data: \\n\\n"}}]}',
    b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}', b'{"choices":[{"delta":{"reasoning":"hm"}}]}', b"[DONE]",
    b'{"error":{"message":"no"}}', b'{"error":null,"choices":[]}', b"{oops",
]  # fmt: skip
ENDS = [b"\n\n", b"\r\n\r\n", b"\n\n\n", b"\n: ping\n\n", b"\n"]


def told(events: Any) -> Any:
    try:
        return answers._read(events, None)
    except wire.WireError:
        return "refused"


@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.sampled_from(ENDS)), max_size=8), st.lists(st.integers(0, 2000), max_size=4))
def test_events_decoded_at_once_say_what_they_say_one_by_one(stream: list[tuple[bytes, bytes]], cuts: list[int]) -> None:
    data = b"".join(b"data: " + event + end for event, end in stream)
    pieces = [(float(at), piece) for at, piece in enumerate(cut(data, cuts))]
    at_once = answers._at_once(pieces)
    if at_once is not None:
        assert told(at_once) == told(answers.lines(pieces))


def test_a_usual_stream_is_decoded_at_once() -> None:
    first, rest = b"data: %b\n\n" % EVENTS[0], b"".join(b"data: %b\n\n" % event for event in (EVENTS[0], EVENTS[4], EVENTS[6]))
    found = answers._at_once([(1.0, first), (2.0, rest)])
    assert found is not None
    assert [at for at, _ in found] == [1.0, 2.0, 2.0, 2.0]


# ---------------------------------------------------------------- rows

times = st.floats(0, 1e6)
records = st.builds(
    RequestRecord,
    index=st.integers(0, 2**40), scheduled_s=times, sent_s=st.none() | times, headers_s=st.none() | times,
    token_s=st.lists(times, max_size=4).map(tuple), tokens_per_event=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    done_s=st.none() | times, prompt_tokens=st.none() | st.integers(0, 9999), output_tokens=st.none() | st.integers(0, 9999),
    token_source=st.sampled_from([None, "usage", "chunks", "tokenizer"]), outcome=st.sampled_from(["ok", "reset", "cancelled"]),
    http_status=st.none() | st.integers(100, 599), attempt=st.integers(1, 9), tenant=st.none() | st.text(max_size=5),
    session=st.none() | st.text(max_size=5), stage_s=st.dictionaries(st.sampled_from(["connect", "retry"]), times), in_window=st.booleans(),
)  # fmt: skip


def row(record: RequestRecord) -> spool.Row:
    return spool.Row(*(getattr(record, name) for name in spool.Row.__struct_fields__))


@settings(max_examples=25)
@given(st.lists(records, max_size=5, unique_by=lambda r: r.index), st.integers(0, 60))
def test_rows_are_read_as_they_were_written_and_a_cut_one_is_left_out(
    tmp_path_factory: pytest.TempPathFactory, written: list[RequestRecord], lost: int
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows"
    parts = [spool.encode(row(record)) for record in written]
    path.write_bytes(b"".join(parts))
    assert spool.read(path) == sorted(written, key=lambda r: r.index)
    if parts:
        lost = 1 + lost % len(parts[-1])
        path.write_bytes(b"".join(parts)[:-lost])
        assert spool.read(path) == sorted(written[:-1], key=lambda r: r.index)


def test_a_row_has_every_field_of_a_record() -> None:
    assert spool.Row.__struct_fields__ == tuple(RequestRecord.__dataclass_fields__)


# ---------------------------------------------------------------- WebSocket


def a_job(**more: Any) -> job.Job:
    usual: dict[str, Any] = {
        "scheme": "http", "host": "127.0.0.1", "address": "127.0.0.1", "port": 80,
        "endpoint": endpoints.Spec(name="completions", path="/talk", model="tiny"),
        "payload": payloads.Spec(prompt_chars=[20], output_tokens=[3], seed=1), "api_key": None, "scheduled_s": [0.0], "users": None,
        "duration_s": 0.1, "warmup_s": 0.0, "timeout_s": 10.0, "drain_s": 5.0, "connections": 1, "core": None, "seed": 1,
        "rows": "", "transport": "websocket",
    }  # fmt: skip
    return job.Job(**{**usual, **more})


def opened(headers: list[tuple[str, str]]) -> tuple[Frames, WSConnection, list[tuple[bytes, bytes]]]:
    ours, theirs = Frames(a_job(headers=headers)), WSConnection(ConnectionType.SERVER)
    theirs.receive_data(ours.begin())
    (request,) = theirs.events()
    assert isinstance(request, events.Request)
    assert (request.host, request.target) == ("127.0.0.1", "/talk")
    assert not ours.is_open
    assert ours.unwrap(theirs.send(events.AcceptConnection())) == ([], b"")
    assert ours.is_open
    return ours, theirs, [(bytes(n), bytes(v)) for n, v in request.extra_headers]


@given(st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=5), st.lists(st.integers(0, 2000), max_size=6))
def test_messages_come_whole_wherever_frames_are_cut(texts: list[str], cuts: list[int]) -> None:
    """The peer is a server of the same library; text goes both ways, in two frames each on its way back."""
    ours, theirs, headers = opened([("Authorization", "Bearer x")])
    assert (b"authorization", b"Bearer x") in [(name.lower(), value) for name, value in headers]
    theirs.receive_data(ours.wrap(json.dumps({"prompt": "ä"}).encode()))
    assert [event.data for event in theirs.events()] == ['{"prompt": "\\u00e4"}']  # type: ignore[attr-defined]
    sent = b"".join(
        theirs.send(events.TextMessage(data=text[:1], message_finished=False)) + theirs.send(events.TextMessage(data=text[1:]))
        for text in texts
    )
    came = [message for piece in cut(sent, cuts) for message in ours.unwrap(piece)[0]]
    assert came == [text.encode() for text in texts]


def test_pings_are_answered_and_a_goodbye_ends_it() -> None:
    ours, theirs, _ = opened([])
    messages, back = ours.unwrap(theirs.send(events.Ping(payload=b"there?")))
    theirs.receive_data(back)
    assert messages == []
    assert [event.payload for event in theirs.events()] == [b"there?"]  # type: ignore[attr-defined]
    messages, back = ours.unwrap(theirs.send(events.TextMessage(data="last")) + theirs.send(events.CloseConnection(code=1000)))
    assert (messages, ours.is_over, bool(back)) == ([b"last"], True, True)


@pytest.mark.parametrize("data", [b"HTTP/1.1 404 No\r\nContent-Length: 0\r\n\r\n", b"SSH-2.0\r\n\r\n"])
def test_a_server_that_speaks_no_websocket_is_refused(data: bytes) -> None:
    frames = Frames(a_job())
    frames.begin()
    with pytest.raises(wire.WireError):
        frames.unwrap(data)


def test_messages_read_like_an_event_stream() -> None:
    response = Messages()
    assert not response.closed()
    assert [response.take(m, at) for m, at in ((EVENTS[0], 1.0), (EVENTS[0], 2.0), (EVENTS[4], 3.0), (b"[DONE]", 4.0))] == [False] * 3 + [
        True
    ]
    found = answers.read(response.pieces)
    assert (found.token_s, found.output_tokens, found.is_whole) == ((1.0, 2.0), 2, True)
    assert (response.status, response.headers_at, response.keep_alive) == (200, 1.0, True)


# ---------------------------------------------------------------- options of the client


def test_options_as_typed_become_a_client(tmp_path: Path) -> None:
    pem = tmp_path / "ca.pem"
    pem.write_text("x")
    found = client.checked(
        connect_timeout="2s", first_byte_timeout="500ms", retries=3, cancel="10%@1s..5s", ca_file=pem, proxy="http://p:1"
    )
    assert (found.connect_timeout_s, found.first_byte_timeout_s, found.retries, found.keep_alive) == (2.0, 0.5, 3, True)
    assert (found.cancel, found.ca_file, found.insecure) == (Cancel(share=0.1, after_s=(1.0, 5.0)), str(pem), False)
    assert client.checked() == Client()
    assert client.parse_cancel("5%@20") == Cancel(share=0.05, after_events=(20, 20))
    assert client.parse_cancel("1@1..40") == Cancel(share=1.0, after_events=(1, 40))
    assert client.parse_cancel("0.5@300ms") == Cancel(share=0.5, after_s=(0.3, 0.3))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"retries": -1}, "--retries"),
        ({"connect_timeout": "0s"}, "--connect-timeout"),
        ({"first_byte_timeout": "soon"}, "soon"),
        ({"ca_file": Path("/nowhere/ca.pem")}, "--ca-file"),
        ({"proxy": "socks5://p:1"}, "--proxy"),
        ({"proxy": "http://u:s3cret@:port"}, "--proxy"),
        *(({"cancel": text}, "SHARE@AFTER") for text in ("10%", "200%@2s", "0@2s", "10%@5s..1s", "10%@0", "x@2s", "10%@x")),
    ],
)
def test_options_that_cannot_be_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        client.checked(**fields)
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_the_environments_proxy_is_used_but_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert client.proxy_for(Client(), "http", "llm.example") is None
    monkeypatch.setenv("http_proxy", "http://u%40:pw@proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert client.proxy_for(Client(), "http", "llm.example") == Proxy(host="proxy", port=3128, credentials="u@:pw")
    assert client.proxy_for(Client(), "http", "inside.example") is None
    assert client.proxy_for(Client(), "http", "127.0.0.1") is None
    assert client.proxy_for(Client(proxy="none"), "http", "llm.example") is None
    assert client.proxy_for(Client(proxy="other:1"), "http", "127.0.0.1") == Proxy(host="other", port=1)
    assert "pw" not in repr(client.proxy_for(Client(), "http", "llm.example"))


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(BadInput, match=r"--ca-file .*ca\.pem"):
        client.tls_context(Client(ca_file=str(tmp_path / "ca.pem")))
