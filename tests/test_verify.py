"""verify: what a load test of one replica decides, and which servers it may be run against."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import hardware, record
from mlsys_bench.checked import Check, Verification
from mlsys_bench.errors import BadInput, NotComparable
from mlsys_bench.journeys import verify
from mlsys_bench.report import runs
from mlsys_bench.types import LatencySummary, Layout, LoadTest, Plan, Validity
from tests import loadtest_apis as apis
from tests.sample_records import plan, verification


def outcome(result: Verification, inside: tuple[bool | None, ...], verdict: Any = "valid") -> Verification:
    """Return the verification with these answers."""
    checks = tuple(dataclasses.replace(result.checks[0], inside=answer) for answer in inside)
    return dataclasses.replace(
        result,
        checks=checks,
        holds=all(answer is not False for answer in inside) and verdict != "invalid",
        measured=dataclasses.replace(result.measured, validity=Validity(verdict=verdict)),
    )


@pytest.mark.parametrize(
    ("inside", "verdict", "status", "says"),
    [
        ((True, True), "valid", 0, "The plan holds: 2 of 2 figures"),
        ((True, None), "degraded", 0, "The plan holds: 1 of 1 figure inside the 90 % interval, 1 not measured"),
        ((True, False), "valid", 1, "The plan does not hold: 1 of 2"),
        ((None, None), "valid", 3, "Undecided: too few answers"),
        ((True, False), "invalid", 3, "Undecided: the load test cannot be believed"),
    ],
)
def test_the_status_is_the_answer(inside: tuple[bool | None, ...], verdict: str, status: int, says: str) -> None:
    result = outcome(verification(), inside, verdict)
    assert verify.exit_status(result) == status
    assert runs.verification(result)[0].lead.startswith(says)


def test_a_prediction_holds_where_its_interval_meets_that_of_the_measurement() -> None:
    """Predicted 100 to 200 ms: 190 to 250 ms meets it, 210 to 250 ms does not, and without an interval the value decides."""
    asked = dataclasses.replace(plan(), predicted={"ttft_p50_s": 0.15}, intervals={"ttft_p50_s": (0.1, 0.2)})

    def seen(value: float, interval: tuple[float, float] | None) -> Check:
        found = LatencySummary(
            count=100, mean=value, p50=value, p90=None, p95=None, p99=None, intervals={"p50": interval} if interval else {}
        )
        measured: LoadTest = dataclasses.replace(verification().measured, ttft_s=found)
        return verify.checks(asked, measured)[0]

    assert [seen(0.22, i).inside for i in ((0.19, 0.25), (0.21, 0.25), None)] == [True, False, False]
    assert seen(0.15, None).error_percent == 0


class Refusing(apis.ChatOnly):
    """Answers at once, and turns every so-manyth stream away."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every, self.streams = every, 0

    def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
        """Answer."""
        if b'"stream":true' in body:
            with self.lock:
                self.streams += 1
                if self.streams % self.every == 0:
                    return apis.as_json({"error": "busy"}, 503)
        return super().answer(method, path, body)


@pytest.mark.e2e
@pytest.mark.parametrize(("every", "status", "says"), [(5, 1, "ttft_p95<500ms missed, "), (10**6, 0, "The plan holds")])
def test_a_replica_that_turns_requests_away_breaks_the_plan_though_the_others_are_as_predicted(
    tmp_path: Path, every: int, status: int, says: str
) -> None:
    """A fifth of the requests fail: the load test is invalid, for it says little of the others, and the limit is missed all the same."""
    keys = [f"{metric}_{stat}_s" for metric in ("ttft", "e2e") for stat in ("p50", "p95")]
    asked = plan(predicted=dict.fromkeys(keys, 0.1), intervals=dict.fromkeys(keys, (0.0, 60.0)), slo="ttft_p95<500ms", replicas=4)
    record.write(tmp_path / "plan.json", asked, hardware.machine())
    with apis.serving(Refusing(every)) as server:
        found = verify.verify(tmp_path / "plan.json", server.url, duration="4s", seed=0, out=None, quiet=True)
    assert all(check.inside for check in found.checks)
    assert verify.exit_status(found) == status, found
    assert says in runs.verification(found)[0].lead


class Health(BaseHTTPRequestHandler):
    """Says of itself what it is told."""

    body: bytes = b""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def saying() -> Iterator[Any]:
    """Start servers that say this at /health."""
    running = []

    def start(body: object) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Health,), {"body": json.dumps(body).encode()}))
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def limits(asked: Plan, max_seqs: int) -> dict[str, int]:
    return {"max_seqs": max_seqs, "max_step_tokens": 2048, "block_tokens": 1, "blocks": asked.kv_tokens_per_replica}


def test_a_server_of_another_layout_is_refused_before_any_load(saying: Any, tmp_path: Path) -> None:
    """What our own server says of itself counts; another kind of server is taken at its word."""
    asked = plan()
    record.write(tmp_path / "plan.json", asked, hardware.machine())
    other = dataclasses.asdict(Layout(model="nano", precision="fp32", device="cpu"))
    url = saying({"layout": other, "limits": limits(asked, 8)})
    with pytest.raises(NotComparable, match=r"another layout: .*model"):
        verify.verify(tmp_path / "plan.json", url, duration="1s", seed=0, out=None)
    assert verify.of_ours(saying({"status": "ok"})) == {}
    assert verify.of_ours("http://127.0.0.1:1") == {}


@pytest.mark.parametrize(
    "body",
    [
        {"layout": 5, "limits": {}},
        {"layout": {}, "limits": None},
        {"layout": {"model": "nano", "precision": "fp32", "device": "cpu"}, "limits": {"max_seqs": 8}},
        [[[]]],
    ],
)
def test_a_server_that_says_something_like_ours_is_another_kind_of_server(saying: Any, body: Any) -> None:
    assert verify.of_ours(saying(body)) == {}


@pytest.mark.parametrize("url", ["127.0.0.1:abc", "http://[::1", "http://a b", "http://127.0.0.1:99999"])
def test_an_address_that_is_none_is_left_to_the_load_test_to_refuse(url: str) -> None:
    assert verify.of_ours(url) == {}


def test_a_replica_whose_limits_nobody_knows_is_not_started() -> None:
    asked = plan()
    layout = dataclasses.replace(asked.profile.layout, device="cpu")
    unknown = dataclasses.replace(asked, profile=dataclasses.replace(asked.profile, layout=layout, constants={}))
    with (
        pytest.raises(BadInput, match=r"does not say which max_step_tokens and .* give its URL"),
        verify.replica(unknown, Path("steps.csv")),
    ):
        pass


def test_settings_that_are_not_the_plans_are_said(saying: Any) -> None:
    asked = dataclasses.replace(plan(), max_batch=16, max_step_tokens=2048)
    own = dataclasses.asdict(Layout(model="nano", precision="fp32", device="cpu"))
    told = verify.of_ours(saying({"layout": own, "limits": limits(asked, 8)}))
    assert verify.settings(asked, told) == ("the server is not set as planned: max batch 8, planned 16",)
    assert verify.settings(asked, {"limits": limits(asked, 16)}) == verify.settings(asked, {}) == ()
