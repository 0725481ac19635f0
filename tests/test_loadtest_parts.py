"""The parts of the load generator that need no server: the HTTP reader, the token counter, prompts, the verdict, options."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import loadtest
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import answers, prompts, validity, wire
from mlsys_bench.loadtest.client import authority
from mlsys_bench.loadtest.payloads.think import Think
from mlsys_bench.report import runs
from mlsys_bench.types import RequestRecord, Requests

# ---------------------------------------------------------------- HTTP, bytes in, pieces out

EVENTS = [b"data: one\n\n", b"data: two\r\n\r\n", b": ping\n\n", b"data: [DONE]\n\n"]
CHUNKED = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in EVENTS) + b"0\r\n\r\n"
HEADS = {
    "chunked": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED),
    "interim": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED),
    "trailer": (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", CHUNKED[:-2] + b"X-Sum: 1\r\n\r\n"),
    "length": (b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n", b"data"),
    "nothing": (b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 0\r\n\r\n", b""),
}


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    at = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(at)]


@given(st.sampled_from(sorted(HEADS)), st.lists(st.integers(0, 10_000), max_size=12))
def test_a_response_is_whole_at_its_last_byte_wherever_it_is_cut(kind: str, cuts: list[int]) -> None:
    head, body = HEADS[kind]
    response = wire.Response()
    told = [response.feed(piece, float(i)) for i, piece in enumerate(pieces_of(head + body, cuts))]
    assert told == [False] * (len(told) - 1) + [True]
    assert response.body() == (b"".join(EVENTS) if kind in ("chunked", "interim", "trailer") else body)
    assert response.keep_alive
    assert not response.closed()


@given(st.lists(st.integers(0, 10_000), max_size=12))
def test_a_body_without_a_length_ends_with_its_connection(cuts: list[int]) -> None:
    response = wire.Response()
    for piece in pieces_of(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n" + CHUNKED, cuts):
        assert not response.feed(piece, 0.0)
    assert response.closed()
    assert response.body() == CHUNKED
    assert not response.keep_alive


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"<html>hello</html>",
        b"HTTP/1.1 abc\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nabcd\r\n",
    ],
)
def test_what_is_no_http_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.Response().feed(data, 0.0)


def test_bytes_beyond_the_announced_end_cost_the_connection() -> None:
    response = wire.Response()
    assert response.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200", 0.0)
    assert response.body() == b"ok"
    assert not response.keep_alive


def test_connection_close_and_http_1_0_are_not_kept() -> None:
    for head in (b"HTTP/1.1 200 OK\r\nConnection: close", b"HTTP/1.0 200 OK"):
        response = wire.Response()
        assert response.feed(head + b"\r\nContent-Length: 0\r\n\r\n", 0.0)
        assert not response.keep_alive


# ---------------------------------------------------------------- events -> tokens


def event(choice: dict[str, Any] | None = None, **more: object) -> bytes:
    return b"data: " + json.dumps({"id": "x", "choices": [choice] if choice else [], **more}).encode() + b"\n\n"


def text(token: str, finish: str | None = None) -> bytes:
    return event({"index": 0, "text": token, "finish_reason": finish})


def delta(finish: str | None = None, **fields: object) -> bytes:
    return event({"index": 0, "delta": fields, "finish_reason": finish})


def usage(prompt: int, completion: int) -> bytes:
    return event(usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})


DONE = b"data: [DONE]\n\n"


def read(*events: bytes) -> answers.Answer:
    return answers.read([(float(i), data) for i, data in enumerate(events)])


def test_completions_count_every_choice_but_an_end_without_text() -> None:
    """The built-in server sends one event per token, with no text while half a character waits for its other half."""
    found = read(text("a"), text(""), text("ä"), text("", "length"), DONE)
    assert found.token_s == (0.0, 1.0, 2.0)
    assert (found.output_tokens, found.token_source, found.is_whole) == (3, "chunks", True)


def test_chat_counts_content_and_neither_the_role_nor_an_empty_end() -> None:
    found = read(
        delta(role="assistant", content=""), delta(role="assistant"), delta(content="a"), delta(content=""), delta(content="b"),
        delta(finish="stop"), DONE,
    )  # fmt: skip
    assert found.token_s == (2.0, 3.0, 4.0)


def test_thinking_tokens_are_tokens() -> None:
    assert read(delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(content="a"), DONE).token_s == (1.0, 2.0)


def test_usage_of_the_server_is_believed_first() -> None:
    found = read(text("a"), text("b"), text("", "length"), usage(7, 2), DONE)
    assert (found.prompt_tokens, found.output_tokens, found.token_source, found.tokens_per_event) == (7, 2, "usage", (1, 1))


def test_an_end_without_text_counts_when_the_server_counted_it() -> None:
    """A last token of half a character has no text of its own."""
    found = read(text("a"), text("", "length"), usage(7, 2), DONE)
    assert (found.token_s, found.tokens_per_event) == ((0.0, 1.0), (1, 1))


def test_several_tokens_per_event_are_spread_over_the_events() -> None:
    assert read(*[text("a b c d")] * 4, usage(1, 16), DONE).tokens_per_event == (4, 4, 4, 4)
    assert read(*[text("a b")] * 4, usage(1, 7), DONE).tokens_per_event == (1, 2, 2, 2)


@given(st.integers(1, 30), st.integers(0, 90))
def test_tokens_per_event_always_add_up_to_the_servers_count(events: int, tokens: int) -> None:
    found = read(*[text("a")] * events, usage(1, tokens), DONE)
    assert sum(found.tokens_per_event) == tokens == found.output_tokens
    assert len(found.token_s) == len(found.tokens_per_event) == min(events, tokens)
    assert all(count >= 1 for count in found.tokens_per_event)
    if tokens > 1:
        assert (found.token_s[0], found.token_s[-1]) == (0.0, events - 1.0)


@given(st.lists(st.integers(0, 10_000), max_size=20))
def test_a_token_is_stamped_when_its_last_byte_came(cuts: list[int]) -> None:
    stream = b"".join([text("a"), b": ping\r\n\r\n", text("b").replace(b"\n\n", b"\r\n\r\n"), text("c", "stop"), DONE])
    parts = pieces_of(stream, cuts)
    ends = np.cumsum([len(part) for part in parts])
    found = answers.read([(float(end), part) for end, part in zip(ends, parts, strict=True)])
    last_bytes = [m.end() for m in re.finditer(rb"data: \{[^\n]*\n", stream)]
    assert found.token_s == tuple(float(ends[np.searchsorted(ends, byte)]) for byte in last_bytes)
    assert found.is_whole


def test_a_stream_without_an_end_is_not_whole() -> None:
    assert not read(text("a"), text("b")).is_whole
    assert read(text("a"), b"data: [DONE]").is_whole


@pytest.mark.parametrize(
    "data", [b"data: {oops\n", b"data: 17\n", b'data: {"choices": 3}\n', b'data: {"error": {"message": "out of memory"}}\n']
)
def test_an_event_that_is_no_completion_is_refused(data: bytes) -> None:
    with pytest.raises(wire.WireError):
        read(text("a"), data)


# ---------------------------------------------------------------- prompts, verdict, options


def test_prompts_have_their_length_repeat_by_seed_and_share_no_beginning() -> None:
    made = prompts.Text(3)
    assert [len(made.prompt(i, n)) for i, n in enumerate((1, 7, 500, 400_000))] == [1, 7, 500, 400_000]
    assert made.prompt(5, 100) == prompts.Text(3).prompt(5, 100) != prompts.Text(4).prompt(5, 100)
    assert len({made.prompt(i, 6)[:6] for i in range(4000)}) == 4000
    assert set(made.prompt(0, 5000)) <= set("abcdefghijklmnopqrstuvwxyz ")


def sent(late_s: float, **more: Any) -> RequestRecord:
    return RequestRecord(index=0, scheduled_s=1.0, sent_s=1.0 + late_s, prompt_tokens=100, output_tokens=10, **more)


def verdict(records: list[RequestRecord], cpu_share: float = 0.1, **more: Any) -> tuple[str, str]:
    found = validity.judge(records, cpu_share=cpu_share, asked_prompt_tokens=100, asked_output_tokens=10, **more)
    return found.verdict, " | ".join(found.reasons)


def test_a_punctual_client_with_cpu_to_spare_is_valid() -> None:
    assert verdict([sent(0.0002)] * 100) == ("valid", "")
    assert verdict([sent(0.0002)] * 100, notes=["prompts were guessed"]) == ("valid", "prompts were guessed")


@pytest.mark.parametrize(
    ("records", "cpu_share", "level", "says"),
    [
        ([sent(0.0)] * 97 + [sent(0.02)] * 3, 0.1, "degraded", "p99"),
        ([sent(0.0)] * 97 + [sent(0.2)] * 3, 0.1, "invalid", "core of its own"),
        ([sent(0.0)] * 90 + [sent(0.002)] * 10, 0.1, "degraded", "10.0 %"),
        ([sent(0.002)] * 100, 0.1, "invalid", "1 ms late"),
        ([sent(0.0)] * 100, 0.75, "degraded", "75.0 %"),
        ([sent(0.0)] * 100, 0.95, "invalid", "lower the rate"),
        ([sent(0.0)] * 98 + [sent(0.0, outcome="reset")] * 2, 0.1, "degraded", "2 reset"),
        ([sent(0.0)] * 80 + [sent(0.0, outcome="timeout")] * 20, 0.1, "invalid", "20.0 %"),
        ([dataclasses.replace(sent(0.0), prompt_tokens=50)] * 9, 0.1, "degraded", "prompts had 50"),
        ([dataclasses.replace(sent(0.0), output_tokens=5)] * 9, 0.1, "degraded", "answers had 5"),
        ([sent(0.02, in_window=False)] * 9, 0.1, "valid", ""),
        ([sent(0.02, stage_s={"connect": 0.02})] * 9, 0.1, "valid", ""),
    ],
)
def test_the_verdict_says_what_is_wrong_and_what_to_change(records: list[RequestRecord], cpu_share: float, level: str, says: str) -> None:
    found, reasons = verdict(records, cpu_share)
    assert found == level
    assert says in reasons


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "exactly one"),
        ({"qps": 1.0, "users": 2}, "exactly one"),
        ({"qps": 0.0}, "above zero"),
        ({"qps": float("nan")}, "above zero"),
        ({"users": 0}, "at least one"),
        ({"qps": 1.0, "duration_s": 0.0}, "duration"),
        ({"qps": 1.0, "duration_s": 5.0, "warmup_s": 5.0}, "warmup"),
        ({"qps": 1.0, "timeout_s": -1.0}, "timeout"),
        ({"users": 1, "think": Think(mean_s=-1.0)}, "negative"),
        ({"qps": 1.0, "arrivals": "sometimes"}, "sometimes"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        loadtest.dry_run(loadtest.Options(url="http://127.0.0.1:1", **fields))
    assert "\n" not in str(caught.value)


def test_a_dry_run_shows_the_schedule_without_a_server() -> None:
    options = loadtest.Options(url="http://127.0.0.1:1", qps=50, duration_s=4.0, seed=7)
    drawn = loadtest.dry_run(options)
    assert np.array_equal(drawn.scheduled_s, loadtest.dry_run(options).scheduled_s)
    assert 0 <= drawn.scheduled_s[0] <= drawn.scheduled_s[-1] < 4.0
    assert not loadtest.dry_run(loadtest.Options(url="x", users=2)).scheduled_s.any()


def test_the_parent_never_imports_gevent() -> None:
    code = "import sys; from mlsys_bench.loadtest import parent; print({'gevent', 'locust'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert "gevent" not in sys.modules


def test_the_worker_starts_without_a_warning() -> None:
    """Locust patches the interpreter: whatever was imported before it must not mind."""
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-c",
            "import mlsys_bench.loadtest.worker, sys; print('torch' in sys.modules, 'pyarrow' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr) == ("False False", "")


@pytest.mark.parametrize(("host", "says"), [("127.0.0.1", "127.0.0.1:80"), ("::1", "[::1]:80"), ("a.example", "a.example:80")])
def test_an_ipv6_address_is_written_in_brackets(host: str, says: str) -> None:
    assert authority(host, 80) == says


def test_a_file_of_requests_has_the_times_of_the_load_test_it_came_from() -> None:
    """An answer ends with its last token (2 s), not its last byte (9 s); one without tokens has no time to the first."""
    seen: dict[str, Any] = {"scheduled_s": 0.0, "sent_s": 0.0, "outcome": "ok", "in_window": True, "done_s": 9.0}
    whole = [RequestRecord(index=i, token_s=(1.0, 2.0), tokens_per_event=(1, 1), **seen) for i in range(100)]
    without = [RequestRecord(index=i, token_s=(2.0,), tokens_per_event=(0,), **seen) for i in range(100, 150)]
    (table,) = runs.requests(Requests(t0_unix_s=0.0, requests=(*whole, *without))).tables
    shown = {name.text: (n.text, median.text[0]) for name, n, median, *_ in table.rows}
    assert shown == {"TTFT": ("100", "1"), "E2E": ("150", "2")}
