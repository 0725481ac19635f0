"""Servers that die, hang or talk nonsense while they are probed, asked for metrics or gated: one line says so, what was measured stays."""

# ruff: noqa: D102  methods are named for what they do

from __future__ import annotations

import contextlib
import json
import shlex
import socketserver
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench.errors import BadInput, MeasurementFailed, MlsysError
from mlsys_bench.journeys import probe, traffic
from mlsys_bench.journeys.gating import outside, worker
from mlsys_bench.journeys.gating.run import Asked
from mlsys_bench.types import Layout
from mlsys_bench.verdicts import Subject
from mlsys_bench.workload import counters, prometheus
from mlsys_bench.workload.counters import Series
from mlsys_cli import main
from tests.fault_server import HEAD, Connection, answering, chunk, token
from tests.scraped_series import T0, series

LAYOUT = Layout(model="nano", precision="fp32", device="cpu", tp=1, pp=1, ep=1)
DONE = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


# ---------------------------------------------------------------- a server that is probed


class Probed(socketserver.ThreadingTCPServer):
    """Answers what it is asked before a probe; `does` is what the probe's own requests get."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, does: str, health: object = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.does, self.health = does, health
        self.streams, self.over = 0, threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that leave are part of these tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(Connection):
    """What the server does, by name; a method returns whether the connection stays open."""

    server: Probed

    def answer(self, line: bytes, headers: Any, body: dict[str, Any]) -> bool:
        if b"/health" in line:
            return self.whole(200, self.server.health)
        if line.startswith(b"GET"):
            return self.whole(200, {"data": [{"id": "tiny", "max_model_len": 0}]})
        if not body.get("stream"):
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 1}
            return self.whole(200, {"choices": [{"text": "a", "finish_reason": "length"}], "usage": usage})
        self.server.streams += 1
        does = self.server.does
        return self.whole(int(does), {"error": {"message": "no"}}) if does.isdigit() else bool(getattr(self, does)(body))

    def whole(self, status: int, body: object) -> bool:
        data = json.dumps(body).encode()
        self.wfile.write(b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(data)) + data)
        return True

    def at_once(self, body: dict[str, Any]) -> bool:
        """Send all tokens in one piece, as a proxy does that gathers them."""
        usage = {"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}}
        counted = chunk(b"data: " + json.dumps(usage).encode() + b"\n\n")
        self.wfile.write(HEAD + token() * (body["max_tokens"] - 1) + token("length") + counted + DONE)
        return True

    def limited(self, body: dict[str, Any]) -> bool:
        """Turn away every fifth request, whatever else is in flight, as a limit on requests a minute does."""
        return self.whole(429, {"error": {"message": "no"}}) if self.server.streams % 5 == 0 else self.at_once(body)

    def uncounted(self, body: dict[str, Any]) -> bool:
        self.wfile.write(HEAD + token() * (body["max_tokens"] - 1) + token("length") + DONE)
        return True

    def silence(self, _body: dict[str, Any]) -> bool:
        self.server.over.wait()
        return False

    def dies(self, body: dict[str, Any]) -> bool:
        """Answer a few, then be gone: no connection is taken any more."""
        if self.server.streams <= 6:
            return self.at_once(body)
        self.server.socket.close()
        return False


def probed(does: str, health: object = None, budget_s: float = 60.0, layout: Layout | None = LAYOUT) -> tuple[MlsysError, Probed]:
    """Return how a probe of such a server ends, and the server."""
    with answering(Probed(does, health)) as server:
        options = probe.Options(url=server.url, layout=layout, concurrency=2, longest_tokens=64, budget_s=budget_s, pauses_s=(0.001, 0.001))
        with pytest.raises(MlsysError) as caught:
            probe.probe(options, quiet=True)
    return caught.value, server


@pytest.mark.parametrize(
    ("does", "says"),
    [
        ("400", r"got no answer to fit: \d+ bad_response \(HTTP 400\)"),
        ("429", r"got no answer to fit: \d+ rejected \(HTTP 429\)"),
        ("500", r"got no answer to fit: \d+ bad_response \(HTTP 500\)"),
        ("uncounted", "its streams count no prompt tokens"),
        ("at_once", "no request decoded long enough to time a step: tokens of whole blocks came at one moment"),
        ("dies", "the server was gone after .*; too early for a profile"),
    ],
)
def test_a_probe_says_why_a_server_gave_no_profile(does: str, says: str) -> None:
    error, _ = probed(does)
    assert isinstance(error, MeasurementFailed)
    with pytest.raises(MeasurementFailed, match=says):
        raise error


def test_a_server_that_fails_a_whole_round_is_not_asked_for_eleven_more() -> None:
    _, server = probed("500")
    assert server.streams < 40


def test_a_limit_on_requests_a_minute_is_no_limit_on_those_at_a_time() -> None:
    """What is turned away now is answered after a pause; waves of two were given up after the first of them."""
    error, _ = probed("limited")
    assert "rejected (HTTP 429)" in str(error)
    assert "turned away" not in str(error)


def test_a_silent_server_costs_a_probe_no_more_than_its_budget() -> None:
    """The requests that warm it up have no patience of their own: three of them would take three minutes."""
    error, server = probed("silence", budget_s=0.1)
    assert "nothing came within --budget 100 ms" in str(error)
    assert server.streams == 1


@pytest.mark.parametrize("limits", [[1, 2], {"max_context": None, "max_seqs": "many", "max_step_tokens": 0}, {"max_seqs": 4}, "none"])
def test_limits_that_a_server_does_not_declare_as_numbers_are_not_known(limits: object) -> None:
    error, _ = probed("500", {"limits": limits})
    assert "HTTP 500" in str(error)


def test_a_layout_that_cannot_be_read_is_asked_of_the_person() -> None:
    error, server = probed("500", {"layout": {"model": 5}}, layout=None)
    assert isinstance(error, BadInput)
    assert "give --model NAME and --gpu NAME" in str(error)
    assert server.streams == 0


# ---------------------------------------------------------------- a server that is asked for metrics


class Metrics(socketserver.ThreadingTCPServer):
    """Answers every question with the same bytes; names are those of vLLM's counters, unless these bytes are for them."""

    daemon_threads = True

    def __init__(self, said: bytes, is_named: bool) -> None:
        super().__init__(("127.0.0.1", 0), Said)
        self.said, self.is_named, self.over = said, is_named, threading.Event()


class Said(socketserver.StreamRequestHandler):
    """One question."""

    server: Metrics

    def handle(self) -> None:
        path = self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        names = [
            "vllm:request_success_total",
            "vllm:prompt_tokens_total",
            "vllm:generation_tokens_total",
            "vllm:request_prompt_tokens_bucket",
        ]
        self.wfile.write(whole(names) if self.server.is_named and b"/label/" in path else self.server.said)


def whole(data: object, status: int = 200) -> bytes:
    body = json.dumps({"status": "success", "data": data}).encode()
    return b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n" % (status, len(body)) + body


def matrix(values: list[Any], **labels: str) -> bytes:
    row = {"metric": {"__name__": "vllm:request_success_total", **labels}, "values": values}
    return whole({"resultType": "matrix", "result": [row]})


def fetch(url: str, *, range_: str = "10min", step: str = "auto", until: str = "2023-11-15T00:10+00:00") -> None:
    traffic.from_prometheus(url, range_=range_, step=step, until=until, engine=None, model=None, selector=None, auth_file=None)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(traffic.TOKEN_VARIABLE, raising=False)


COUNTED = [[T0 + 10 * i, str(7 * i)] for i in range(1, 10)]


@pytest.mark.parametrize(
    ("said", "is_named", "says"),
    [
        (bytes(range(256)), False, "gives no whole HTTP answer: BadStatusLine"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5000\r\n\r\n{", False, "gives no whole HTTP answer: IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", False, "gives no whole HTTP answer: IncompleteRead"),
        (b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", False, "HTTP 500: no reason given"),
        (whole(None), False, "answers, but not as Prometheus does"),
        (whole({"a": 1}), False, "answers, but not as Prometheus does"),
        (whole(["up", None]), False, "answers, but not as Prometheus does"),
        (matrix([[10**400, "1"]]), True, "is not the answer of query_range"),
        (matrix([[1000 * at, value] for at, value in COUNTED]), True, "samples of another time than it was asked for"),
        (matrix([[at, "1e300"] for at, _ in COUNTED]), True, "which no server counted"),
        (matrix(COUNTED, __name__="vllm:request_prompt_tokens_bucket"), True, "le=None is no edge of a bucket"),
        (matrix([[T0 + 300, "5"], [T0 + 310, "5"], [T0 + 320, "5"]]), True, "no traffic to describe"),
    ],
)
def test_an_odd_answer_of_a_metrics_server_is_refused_in_one_line(said: bytes, is_named: bool, says: str) -> None:
    with answering(Metrics(said, is_named)) as server, pytest.raises((BadInput, MeasurementFailed), match=says):
        fetch(f"http://127.0.0.1:{server.server_address[1]}")


class Drips(Said):
    """An answer that never ends, every piece of it in time."""

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the client leaves
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                self.wfile.write(b" ")


def test_an_answer_that_never_ends_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "_WHOLE_S", 0.1)
    server = Metrics(b"", is_named=False)
    server.RequestHandlerClass = Drips
    with answering(server), pytest.raises(MeasurementFailed, match=r"an answer had not ended after 100 ms, .* of it came"):
        fetch(f"http://127.0.0.1:{server.server_address[1]}")


@pytest.mark.parametrize("url", ["http://a:b", "http://a:99999", "http://a/b c", "http://a/?q=1", "http://a/#x", "http://a/é"])
def test_what_is_no_address_of_a_metrics_server_is_told_before_it_is_asked(url: str) -> None:
    with pytest.raises(BadInput, match="write an address like http://prometheus:9090"):
        fetch(url)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"range_": "0s"}, "from above 0s to 730d"),
        ({"range_": "1e9d"}, "from above 0s to 730d"),
        ({"step": "0s"}, "is no step"),
        ({"step": "1us"}, "give a longer --step"),
        ({"step": "1h"}, "longer than the range"),
        ({"until": "0001-01-01"}, "is no date"),
    ],
)
def test_a_range_that_nobody_could_answer_is_not_asked_for(asked: dict[str, str], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        fetch("http://127.0.0.1:1", **asked)


def test_a_sample_from_just_before_the_range_hides_none_of_it() -> None:
    early: Series = series(range(10), "vllm:request_success_total", every_s=1.0)
    found, total = counters.counted([early], T0 + 4.5, T0 + 9.0, 1.0)
    assert total == 9
    assert found.known_s > 3


# ---------------------------------------------------------------- what a gate runs


def test_a_file_of_bytes_is_no_result_of_a_benchmark_tool() -> None:
    text = shlex.join([sys.executable, "-c", "import sys; open(sys.argv[1], 'wb').write(bytes(range(128, 256)))", "{out}"])
    with pytest.raises(BadInput, match="holds no text, so no result of a benchmark tool"):
        outside.run(outside.Typed(base_command=text, cand_command=text, instructions=False), Asked(quiet=True))


@pytest.mark.parametrize("patience", ["0s", "-1s"])
def test_a_run_that_may_take_no_time_is_bad_input_and_no_slow_command(patience: str) -> None:
    with pytest.raises(BadInput, match=r"--run-timeout .* a time above zero"):
        outside.run(outside.Typed(base_command="true", cand_command="true", run_timeout=patience), Asked(quiet=True))


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """Start workers that run a piece of Python."""
    running: list[worker.Process] = []

    def start(code: str) -> worker.Process:
        command = worker.Command(argv=(sys.executable, "-c", code), root=tmp_path, folder=tmp_path, environment={})
        running.append(worker.Process(Subject(kind="ref", label="cand"), "work", command))
        return running[-1]

    yield start
    for process in running:
        process.close()


def test_a_worker_that_writes_without_end_is_stopped(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_LONGEST_LINE", 10**6)
    with pytest.raises(MeasurementFailed, match="bytes without an end of line"):
        started("import sys\nwhile True: sys.stdout.write('0' * 65536)").hello()


def test_a_worker_that_dribbles_is_waited_for_no_longer_than_a_silent_one(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "PATIENCE_S", 0.2)
    with pytest.raises(MeasurementFailed, match=r"sent no line in 0\.2 s"):
        started("import os\nwhile True: os.write(1, b'0')").hello()


def test_a_worker_may_name_an_error_that_is_made_of_figures(started: Any) -> None:
    with pytest.raises(MeasurementFailed, match="cand: work: too much"):
        started("""print('{"error": "Overload", "text": "too much"}')""").hello()


# ---------------------------------------------------------------- before it begins


def status(line: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Return what the command line ends with."""
    monkeypatch.setattr(sys, "argv", ["mlsys", *line])
    with pytest.raises(SystemExit) as ended:
        main.run()
    return ended.value.code


@pytest.mark.parametrize(
    "line",
    [
        ["fit", "--probe", "http://127.0.0.1:1", "-o", "/proc/no/x.json"],
        ["gate", "run", "--base-command", "true", "--cand-command", "true", "--html", "/proc/no/x.html"],
        ["gate", "calibrate", "--command", "true", "--md", "/proc/no/x.md"],
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert status(line, monkeypatch) == 2
    assert capsys.readouterr().err.splitlines() == [f"mlsys: {line[-1]}: cannot be written: No such file or directory"]


@pytest.mark.parametrize(
    ("name", "cure"),
    [("demo", "`mlsys serve nano`"), ("rag-support-bot", "name the model of one of its stages"), ("x.yaml", "cannot be read")],
)
def test_a_scenario_is_no_model_to_serve(name: str, cure: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert status(["serve", name, "--port", "0"], monkeypatch) == 2
    assert cure in capsys.readouterr().err
