"""The load generator against servers that know the truth, process against process."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import loadtest, stats, workload
from mlsys_bench.types import Lengths, LoadTest, Requests
from tests.planned_server import options, serving

TRUTH = Path(__file__).parent.parent.parent / "shared" / "tools" / "truth_server.py"
needs_truth = pytest.mark.skipif(
    not TRUTH.is_file() or shutil.which("gcc") is None, reason="needs shared/tools/truth_server.py beside the checkout, and gcc"
)


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


@pytest.mark.measures
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


@pytest.mark.measures
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


@pytest.mark.measures
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
