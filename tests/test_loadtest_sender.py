"""The load worker's own machinery against real sockets, on a hub that is not gevent's: connections, timeouts, attempts, cancellations."""

from __future__ import annotations

import dataclasses
import socket
import struct
from pathlib import Path

import pytest

from mlsys_bench.loadtest import endpoints, heads, payloads, sender, spool
from mlsys_bench.loadtest.alarm import clock
from mlsys_bench.loadtest.client import Cancel, Client
from mlsys_bench.loadtest.payloads.think import Think
from tests.sent_requests import (
    END,
    OK,
    STREAM,
    Answer,
    a_job,
    a_sender,
    chunk,
    one,
    sent,
    serving,
    text,
    whole,
)

# ---------------------------------------------------------------- what came of a request


def test_an_answer_becomes_a_record_with_its_stamps_in_order(tmp_path: Path) -> None:
    with serving(OK) as server:
        r = one(a_job(server.port), tmp_path)
    assert (r.outcome, r.http_status, r.prompt_tokens, r.output_tokens, r.token_source, r.attempt) == ("ok", 200, 7, 3, "usage", 1)
    assert r.tokens_per_event == (1, 1, 1)
    assert r.sent_s is not None
    assert r.headers_s is not None
    assert r.done_s is not None
    stamps = [r.scheduled_s, r.sent_s, r.headers_s, *r.token_s, r.done_s]
    assert stamps == sorted(stamps)
    assert r.stage_s == {}  # the connection was there before


def test_an_answer_in_one_piece_has_one_token_event(tmp_path: Path) -> None:
    body = b'{"choices":[{"text":"abc","finish_reason":"length"}],"usage":{"prompt_tokens":7,"completion_tokens":3}}'
    spec = endpoints.Spec(name="completions", path="/v1/completions", model="tiny", streams=False)
    with serving(whole(200, body)) as server:
        r = one(a_job(server.port, endpoint=spec), tmp_path)
        assert b"Accept: application/json" in server.heads[0]
    assert (r.outcome, r.tokens_per_event, r.output_tokens, len(r.token_s)) == ("ok", (3,), 3, 1)


def reset(_n: int, sock: socket.socket, _head: bytes) -> bool:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return False


def half(_n: int, sock: socket.socket, _head: bytes) -> bool:
    sock.sendall(STREAM + chunk(text("a")) + b"40\r\ndata: ")
    return False


def silent(_n: int, sock: socket.socket, _head: bytes) -> bool:
    return bool(sock.recv(1))  # until the client leaves


def never_ends(_n: int, sock: socket.socket, _head: bytes) -> bool:
    sock.sendall(STREAM + chunk(text("a")))
    return bool(sock.recv(1))


@pytest.mark.parametrize(
    ("answer", "outcome", "status", "events"),
    [
        (whole(429), "rejected", 429, 0),
        (whole(503), "rejected", 503, 0),
        (whole(500), "bad_response", 500, 0),
        (whole(200, b"{oops"), "bad_response", 200, 0),
        (b"SSH-2.0-OpenSSH_9.2\r\n", "bad_response", None, 0),
        (STREAM + chunk(text("a")) + chunk(b"data: {oops\n\n") + b"0\r\n\r\n", "bad_response", 200, 0),
        (STREAM + b"zz\r\n\r\n\r\n", "bad_response", 200, 0),
        (STREAM + chunk(text("a")) + b"0\r\n\r\n", "bad_response", 200, 1),
        (reset, "reset", None, 0),
        (half, "reset", 200, 1),
    ],
)
def test_each_failure_is_counted_by_its_kind(answer: bytes | Answer, outcome: str, status: int | None, events: int, tmp_path: Path) -> None:
    with serving(answer) as server:
        r = one(a_job(server.port), tmp_path)
    assert (r.outcome, r.http_status, len(r.token_s), r.attempt) == (outcome, status, events, 1)


def test_nobody_listening_is_a_failed_connection(tmp_path: Path) -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        r = one(a_job(sock.getsockname()[1]), tmp_path)
    assert (r.outcome, r.sent_s, r.http_status) == ("connect", None, None)


def ages(flight: sender.Flight, seconds: float) -> None:
    """Let a request be older than it is: patience is tested without waiting."""
    flight.began -= seconds


@pytest.mark.parametrize(("answer", "has_begun"), [(silent, False), (never_ends, True)])
def test_patience_ends_by_the_limit_that_was_set(answer: Answer, has_begun: bool) -> None:
    """An answer that has begun is no matter of the first byte any more: only the limit of the whole request ends it."""
    work = a_job(0, timeout_s=1000.0, client=Client(first_byte_timeout_s=100.0))
    with serving(answer) as server, a_sender(dataclasses.replace(work, port=server.port)) as (made, hub, _, heard):
        made.start_clock(clock())
        flight = made.prepare(0, 0.0)
        made.launch(flight)
        hub.run(lambda: bool(flight.response.pieces) if has_begun else bool(server.heads))
        ages(flight, 101.0)
        beats: list[float] = []
        made.pulse.each_beat(beats.append)
        hub.run(lambda: len(beats) == 3)
        assert bool(made.in_flight) == has_begun
        ages(flight, 1000.0)
        hub.run(lambda: bool(heard))
        assert heard == [("timeout", int(has_begun))]


def test_a_connection_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    """The server takes the connection and never says a word of TLS."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        work = a_job(listener.getsockname()[1], scheme="https", client=Client(connect_timeout_s=0.05), connections=0)
        r = one(work, tmp_path)
    assert (r.outcome, r.sent_s) == ("connect", None)


def test_what_is_in_flight_at_the_end_is_unfinished_and_keeps_its_tokens(tmp_path: Path) -> None:
    with serving(never_ends) as server, a_sender(a_job(server.port)) as (made, hub, rows, _):
        made.start_clock(clock())
        flight = made.prepare(0, 0.0)
        made.launch(flight)
        hub.run(lambda: bool(flight.response.pieces))
        made.end_all("unfinished")
        (tmp_path / "rows").write_bytes(rows.getvalue())
    (r,) = spool.read(tmp_path / "rows")
    assert (r.outcome, len(r.token_s), r.in_window) == ("unfinished", 1, True)


def test_a_request_that_does_not_fit_the_socket_is_sent_to_its_end(tmp_path: Path) -> None:
    work = a_job(0, payload=payloads.Spec(prompt_chars=[3_000_000], output_tokens=[3], seed=1))
    with serving(OK) as server:
        r = one(dataclasses.replace(work, port=server.port), tmp_path)
        assert len(server.bodies[0]) > 3_000_000
    assert r.outcome == "ok"


# ---------------------------------------------------------------- connections


def test_connections_are_opened_before_and_used_again(tmp_path: Path) -> None:
    with serving(OK) as server:
        found = sent(a_job(server.port, scheduled_s=[0.0, 0.02, 0.04, 0.06], connections=5), tmp_path)
        assert server.connections == 5
    assert [r.outcome for r in found] == ["ok"] * 4


def test_without_keep_alive_every_request_opens_its_own_connection(tmp_path: Path) -> None:
    with serving(OK) as server:
        found = sent(a_job(server.port, scheduled_s=[0.0, 0.02, 0.04], client=Client(keep_alive=False), connections=5), tmp_path)
        assert server.connections == 3
        assert all(b"Connection: close" in head for head in server.heads)
    assert all(r.outcome == "ok" and r.stage_s["connect"] > 0 for r in found)


def test_a_connection_that_the_server_closed_while_idle_is_not_used(tmp_path: Path) -> None:
    """Servers close idle connections after seconds; a request must not be lost to that."""

    def close_after(_n: int, sock: socket.socket, _head: bytes) -> bool:
        sock.sendall(OK)
        return False

    with serving(close_after) as server:
        found = sent(a_job(server.port, scheduled_s=[0.0, 0.05, 0.1], duration_s=0.2), tmp_path)
    assert [r.outcome for r in found] == ["ok"] * 3


def test_secrets_go_to_the_server_and_nowhere_else(tmp_path: Path) -> None:
    headers = [("Authorization", "Bearer s3cret"), ("X-Team", "100%"), ("user-agent", "mine")]
    with serving(OK) as server:
        work = a_job(server.port, headers=headers, api_key="other")
        sent(work, tmp_path)
        head = server.heads[0].decode()
    assert "Authorization: Bearer s3cret\r\n" in head
    assert "X-Team: 100%\r\n" in head
    assert "user-agent: mine" in head
    assert "mlsys-loadtest" not in head
    assert head.lower().count("authorization") == 1  # what a person set wins
    assert b"s3cret" not in (tmp_path / "rows").read_bytes()
    assert "s3cret" not in repr(work)


# ---------------------------------------------------------------- second attempts


def test_a_refused_request_is_tried_again_when_the_server_says_and_counted(tmp_path: Path) -> None:
    with serving(whole(429, head=b"Retry-After: 0\r\n"), whole(503, head=b"Retry-After: 0\r\n"), OK) as server:
        r = one(a_job(server.port, client=Client(retries=2)), tmp_path)
        moments = {line for head in server.heads for line in head.split(b"\r\n") if line.startswith(b"x-mlsys-sched")}
    assert (r.outcome, r.attempt, r.scheduled_s, r.output_tokens) == ("ok", 3, 0.0, 3)
    assert len(moments) == 1  # it was due once
    assert r.sent_s is not None
    assert 0 < r.sent_s < r.stage_s["retry"] < r.token_s[0]


def test_attempts_end(tmp_path: Path) -> None:
    with serving(whole(429, head=b"Retry-After: 0\r\n")) as server:
        r = one(a_job(server.port, client=Client(retries=2)), tmp_path)
        assert len(server.heads) == 3
    assert (r.outcome, r.http_status, r.attempt) == ("rejected", 429, 3)


def test_a_broken_connection_is_tried_again_only_before_the_answer_began(tmp_path: Path) -> None:
    with serving(reset, OK) as server:
        again = one(a_job(server.port, client=Client(retries=1)), tmp_path)
    with serving(half, OK) as server:
        once = one(a_job(server.port, client=Client(retries=1)), tmp_path)
    assert (again.outcome, again.attempt) == ("ok", 2)
    assert (once.outcome, once.attempt) == ("reset", 1)


def test_lateness_knows_that_waiting_for_another_attempt_is_not_the_clients_fault(tmp_path: Path) -> None:
    """The first connection is refused, so that nothing is sent before the second attempt, 0.1 s later."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        work = a_job(closed.getsockname()[1], client=Client(retries=1), connections=0, duration_s=0.5)
        with a_sender(work) as (made, hub, _, heard):
            made.start_clock(clock())
            flight = made.prepare(0, 0.0)
            made.launch(flight)
            hub.run(lambda: flight.attempt == 2)
            closed.listen()
            hub.run(lambda: flight.sent is not None)
            assert made.worst_late_s < 0.05
            assert flight.connect_s >= 0.1
            made.end_all("unfinished")
    assert heard == [("unfinished", 0)]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, None), ("", None), ("3", 3.0), ("soon", None), ("Thu, 01 Jan 1970 00:01:40 GMT", 40.0), ("Thu, 01 Jan 1970 00:00:01 GMT", 0.0)],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float | None) -> None:
    assert heads.retry_after_s(header, now_unix_s=60.0) == seconds


# ---------------------------------------------------------------- cancellations


def test_which_requests_are_given_up_follows_from_the_seed() -> None:
    cancel = Cancel(share=0.25, after_events=(2, 9), after_s=(1.0, 3.0))
    drawn = [cancel.draw(7, index) for index in range(4000)]
    chosen = [(events, seconds) for events, seconds in drawn if events is not None and seconds is not None]
    assert abs(len(chosen) - 1000) < 4 * (4000 * 0.25 * 0.75) ** 0.5  # 1 in 16,000 fair draws is further off
    assert {events for events, _ in chosen} == set(range(2, 10))
    assert all(1.0 <= seconds <= 3.0 for _, seconds in chosen)
    assert drawn == [cancel.draw(7, index) for index in range(4000)]
    assert drawn != [cancel.draw(8, index) for index in range(4000)]


def test_a_stream_is_given_up_after_the_drawn_events(tmp_path: Path) -> None:
    def two_events(_n: int, sock: socket.socket, _head: bytes) -> bool:
        sock.sendall(STREAM + chunk(text("a")) + chunk(text("b")))
        return bool(sock.recv(1))  # until the client leaves

    with serving(two_events) as server:
        found = sent(a_job(server.port, client=Client(cancel=Cancel(share=1.0, after_events=(2, 2))), scheduled_s=[0.0, 0.01]), tmp_path)
    assert [(r.outcome, len(r.token_s), r.in_window) for r in found] == [("cancelled", 2, True)] * 2


def test_seconds_end_a_stream_too(tmp_path: Path) -> None:
    with serving(never_ends) as server:
        r = one(a_job(server.port, client=Client(cancel=Cancel(share=1.0, after_s=(0.03, 0.03)))), tmp_path)
    assert r.outcome == "cancelled"
    assert r.done_s is not None
    assert r.sent_s is not None
    assert r.done_s - r.sent_s >= 0.03
    assert r.in_window


# ---------------------------------------------------------------- who sends when


def test_users_of_a_closed_loop_wait_for_their_answers(tmp_path: Path) -> None:
    with serving(OK) as server:
        found = sent(a_job(server.port, scheduled_s=[], users=3, think=Think(mean_s=0.02), duration_s=0.15, connections=3), tmp_path)
    assert [r.index for r in found] == list(range(len(found)))
    assert 3 <= len(found) <= 3 * 8
    starts = sorted((r.scheduled_s, r.done_s or 0.0) for r in found)
    assert all(sum(a <= t < done for a, done in starts) <= 3 for t, _ in starts)


def test_a_user_may_send_several_at_once_and_waits_for_all(tmp_path: Path) -> None:
    with serving(OK) as server:
        found = sent(a_job(server.port, scheduled_s=[], users=1, at_once=4, duration_s=0.03, connections=4), tmp_path)
    assert len(found) % 4 == 0
    for group in (found[i : i + 4] for i in range(0, len(found), 4)):
        assert len({r.scheduled_s for r in group}) == 1
    ends = [max(r.done_s or 0.0 for r in found[i : i + 4]) for i in range(0, len(found), 4)]
    assert all(found[4 * (i + 1)].scheduled_s >= end for i, end in enumerate(ends[:-1]))


def test_a_failing_server_is_not_hammered(tmp_path: Path) -> None:
    with serving(whole(500)) as server:
        found = sent(a_job(server.port, scheduled_s=[], users=2, duration_s=0.25, connections=2), tmp_path)
    assert 2 <= len(found) <= 6  # a breath of 0.1 s after each


@pytest.mark.parametrize("shares", [2, 3])
def test_workers_share_one_schedule_request_for_request(shares: int, tmp_path: Path) -> None:
    times = [i * 0.004 for i in range(7)]
    with serving(OK) as server:
        alone = sent(a_job(server.port, scheduled_s=times, connections=12), tmp_path)
        bodies = sorted(server.bodies)
        server.bodies.clear()
        together = [
            r
            for share in range(shares)
            for r in sent(a_job(server.port, scheduled_s=times, share=share, shares=shares, connections=12), tmp_path)
        ]
        assert sorted(server.bodies) == bodies  # the same words, too
    assert [(r.index, r.scheduled_s) for r in alone] == list(enumerate(times))
    assert sorted((r.index, r.scheduled_s) for r in together) == list(enumerate(times))


def test_turns_of_a_session_wait_for_their_answers_and_carry_them(tmp_path: Path) -> None:
    talk = payloads.Spec(
        prompt_chars=[20, 20, 20], output_tokens=[3, 3, 3], seed=1, arrivals=1, after=[1, 2, -1], gap_s=[0.0, 0.02, 0.03], session=[5, 5, 5]
    )
    spec = endpoints.Spec(name="chat", path="/v1/chat/completions", model="tiny")
    answer = STREAM + chunk(b'data: {"choices":[{"delta":{"content":"yes"},"finish_reason":"stop"}]}\n\n') + END
    with serving(answer) as server:
        found = sent(a_job(server.port, payload=talk, endpoint=spec, duration_s=0.3), tmp_path)
        assert [body.count(b'"yes"') for body in server.bodies] == [0, 1, 2]
        assert server.connections <= 1 + 8  # what was open was used again
    assert [(r.index, r.session) for r in found] == [(0, "5"), (1, "5"), (2, "5")]
    for before, after, gap_s in zip(found, found[1:], (0.02, 0.03), strict=False):
        assert after.scheduled_s == pytest.approx((before.done_s or 0.0) + gap_s, abs=1e-9)
