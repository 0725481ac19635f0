"""Pages of metrics while they are looked at: servers that behave and those that do not, what was asked for, and a whole run."""

# ruff: noqa: D102  the little server's methods are named for what they do

from __future__ import annotations

import http.server
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlsys_bench import hardware, loadtest, record, serve
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import serverside
from mlsys_bench.loadtest.serverside import devices, page, text
from mlsys_bench.loadtest.serverside.watch import Looks, Watch
from mlsys_bench.report import content
from mlsys_bench.serve.options import Options
from mlsys_bench.types import Lengths, LoadTest
from tests import metric_pages as pages
from tests.fault_server import answering

# ---------------------------------------------------------------- servers that behave, and those that do not


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the server's own plan."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Authorization")))
        self.server.plan(self)

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def send(self, body: str, *, status: int = 200, kind: str = "text/plain", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body.encode())), "Content-Type": kind, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body.encode())


class Server(http.server.ThreadingHTTPServer):
    """A server with a plan."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, plan: Callable[[Handler], None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan, self.over = plan, threading.Event()
        self.asked: list[tuple[str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serving(plan: Callable[[Handler], None]) -> Iterator[Server]:
    with answering(Server(plan)) as server:
        yield server


def watched(plan: Callable[[Handler], None], looks: int = 3, *, may_be_absent: bool = False) -> tuple[Looks, float, Server]:
    """Watch a server until it was asked so often, or left alone; return what was seen and how long the end took."""
    with serving(plan) as server:
        watch = Watch([(page.Page(f"{server.url}/metrics"), may_be_absent)], interval_s=0.01)
        until = time.monotonic() + 10
        while len(server.asked) < looks and watch._threads[0].is_alive() and time.monotonic() < until:
            watch._threads[0].join(0.005)
        began = time.monotonic()
        (seen,) = watch.stop()
        took_s = time.monotonic() - began
        assert not watch._threads[0].is_alive()
        return seen, took_s, server


def test_a_page_is_looked_at_on_one_connection_again_and_again() -> None:
    peers = set()

    def plan(handler: Handler) -> None:
        peers.add(handler.client_address)
        handler.send(pages.vllm(100))

    seen, _, server = watched(plan)
    assert len(seen.times_s) >= 3
    assert seen.failed == 0
    assert len(peers) == 1
    assert {path for path, _ in server.asked} == {"/metrics"}


def test_a_server_that_closes_each_connection_is_no_failure() -> None:
    seen, _, _ = watched(lambda handler: handler.send(pages.vllm(100), Connection="close"))
    assert len(seen.times_s) >= 3
    assert seen.failed == 0


def test_a_page_that_moved_is_followed_and_remembered() -> None:
    def plan(handler: Handler) -> None:
        if handler.path == "/metrics":
            handler.send("", status=307, Location="/metrics/")
        else:
            handler.send(pages.vllm(100))

    seen, _, server = watched(plan, looks=4)
    assert seen.failed == 0
    assert [path for path, _ in server.asked].count("/metrics") == 1


def reset(handler: Handler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    handler.close_connection = True


def garble(handler: Handler) -> None:
    handler.wfile.write(b"\x16\x03\x01garbage" * 9)
    reset(handler)


def hang(handler: Handler) -> None:
    handler.server.over.wait(20)


BAD: dict[str, Callable[[Handler], None]] = {
    "HTTP 404": lambda handler: handler.send("no", status=404),
    "HTTP 500": lambda handler: handler.send("no", status=500),
    "no metrics but application/json": lambda handler: handler.send('{"data": []}', kind="application/json"),
    "metrics, but none with a name": lambda handler: handler.send("node_load1 0.5\n"),
    "it moved to http://elsewhere": lambda handler: handler.send("", status=302, Location="http://elsewhere/metrics"),
    "it moves in a circle": lambda handler: handler.send("", status=302, Location="/metrics"),
    "ended before|reset|broke": reset,
    "no HTTP response": garble,
}


@pytest.mark.parametrize("why", BAD)
def test_a_server_without_metrics_is_left_alone_after_one_try(why: str) -> None:
    seen, took_s, _ = watched(BAD[why], looks=99, may_be_absent=True)
    assert seen.failed == 1
    assert not seen.times_s
    assert re.search(why, seen.missed or "")
    assert took_s < 5


def test_a_page_that_hangs_holds_up_nobody() -> None:
    """The end of the run waits less than a second for an answer that never comes, and leaves no thread."""
    seen, took_s, _ = watched(hang, looks=1)
    assert not seen.times_s
    assert took_s < 5
    assert not [t for t in threading.enumerate() if t.name == "mlsys-metrics"]


def test_a_page_that_breaks_in_the_middle_of_the_run_keeps_what_was_seen() -> None:
    def plan(handler: Handler) -> None:
        handler.send(pages.vllm(100) if len(handler.server.asked) <= 2 else "<html>", status=200 if len(handler.server.asked) <= 2 else 503)

    seen, _, _ = watched(plan, looks=4)
    assert len(seen.times_s) == 2
    assert seen.failed >= 1
    assert seen.missed == "HTTP 503"


def test_looks_that_cost_much_become_rare() -> None:
    """An answer that takes 50 ms is asked for twice a second at most, whatever the interval."""
    looks = Looks(where="x")
    watch = Watch([])
    for i in range(3):
        looks.add(float(i), 0.05, {}, 0)
    looks.cpu_s = 0.03
    assert watch._pause_s(looks, 0) == pytest.approx(1.0)  # 10 ms of CPU each: a hundredth of a core
    looks.cpu_s = 0.0
    assert watch._pause_s(looks, 0) == pytest.approx(0.5)
    assert watch._pause_s(looks, 3) == pytest.approx(8.0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's affinities")
def test_the_thread_that_looks_keeps_off_the_load_workers_core() -> None:
    allowed = os.sched_getaffinity(0)
    seen: list[set[int]] = []

    class Here:
        where, bytes = "here", 0

        def look(self, timeout_s: float) -> dict[text.Key, float]:
            seen.append(os.sched_getaffinity(0))
            return {("vllm:num_requests_running", ""): 1.0}

        def close(self) -> None: ...

        def release(self) -> None: ...

    busy = {max(allowed)}
    watch = Watch([(Here(), False)], avoid_cores=busy)
    watch.stop()
    assert os.sched_getaffinity(0) == allowed
    assert all(cores == (allowed - busy or allowed) for cores in seen)


# ---------------------------------------------------------------- what was asked for


def test_off_looks_at_nothing_and_goes_with_nothing() -> None:
    assert serverside.begin(["off"], base_url="http://127.0.0.1:1", address="127.0.0.1") is None
    with pytest.raises(BadInput, match="goes with no other"):
        serverside.begin(["off", "auto"], base_url="http://127.0.0.1:1", address="127.0.0.1")


def test_an_address_without_metrics_is_refused_before_the_run() -> None:
    with serving(BAD["HTTP 404"]) as server, pytest.raises(BadInput, match="HTTP 404; is it the address"):
        serverside.begin([f"{server.url}/x"], base_url="http://127.0.0.1:1", address="192.0.2.1")
    with pytest.raises(BadInput, match="write auto, off, or an address"):
        serverside.begin(["on"], base_url="http://127.0.0.1:1", address="192.0.2.1")


def test_a_key_goes_to_the_target_only_and_a_password_is_never_shown() -> None:
    def plan(handler: Handler) -> None:
        handler.send(pages.vllm(100))

    with serving(plan) as target, serving(plan) as other:
        secret = f"http://me:pass@127.0.0.1:{other.server_address[1]}/metrics"
        watch = serverside.begin(
            ["auto", f"{other.url}/metrics", secret], base_url=target.url, address="192.0.2.1", headers=[("Authorization", "Bearer key")]
        )
        assert watch is not None
        looks = watch.stop()
    assert {key for _, key in target.asked} <= {"Bearer key"}
    assert {key for _, key in other.asked} == {None, "Basic bWU6cGFzcw=="}
    assert not any("pass" in one.where for one in looks)


def test_only_this_machines_addresses_are_local() -> None:
    assert devices.is_local("127.0.0.1")
    assert devices.is_local("::1")
    assert not devices.is_local("192.0.2.1")


# ---------------------------------------------------------------- a whole run


@pytest.mark.measures
def test_a_run_against_our_own_server_sees_both_sides_and_survives_a_page_that_hangs(tmp_path: Path) -> None:
    """The server counts the tokens that the client receives; a second page answers once and then never again."""

    def once(handler: Handler) -> None:
        handler.send(pages.dcgm(0.0)) if len(handler.server.asked) == 1 else hang(handler)

    with serve.start(Options(port=0, max_batch=8, seed=3)) as process, serving(once) as other:
        asked = loadtest.Options(
            url=process.url, qps=10, duration_s=4, warmup_s=1, seed=1, prompt_tokens=Lengths(mean=16), output_tokens=Lengths(mean=8),
            metrics=("auto", f"{other.url}/metrics"),
        )  # fmt: skip
        result, requests = loadtest.run(asked)
    assert result.server is not None
    own, hung, *_ = result.server.sources
    assert (own.kind, own.failed, own.skipped) == ("mlsys", 0, None)
    assert own.looks >= 5
    assert own.cpu_share < 0.05
    assert hung.looks == 0
    series = {s.name: s for s in result.server.series}
    made = sum(v for v in series["generation_tokens"].values if v is not None) * result.server.step_s
    assert made == pytest.approx(sum(r.output_tokens or 0 for r in requests.requests), rel=0.15)  # its ends lie between two looks
    assert [side.metric for side in result.server.two_sides] == ["ttft", "tpot"]
    assert all(side.server_count > 0 and side.client_count > 0 for side in result.server.two_sides)
    assert result.timeline is not None
    assert {extra.name: len(extra.values) for extra in result.timeline.extra}["waiting"] == len(result.timeline.offered)
    assert not [t for t in threading.enumerate() if t.name == "mlsys-metrics"]
    path = record.write(tmp_path / "run.json", result, hardware.machine())
    assert record.read(path, LoadTest).server == result.server
    assert [section.kind for section in content.describe(result)] == ["loadtest"]
