"""Production metrics become a workload: by a real Prometheus that scrapes a real server, by a small one that keeps its limits, by hand."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlsys_bench import record, serve, workload
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys import traffic
from mlsys_bench.types import Workload
from mlsys_bench.workload import counters, prometheus
from mlsys_bench.workload.counters import Series
from tests.scraped_series import T0, series

BINARY = shutil.which("prometheus") if shutil.which("promtool") else None
needs_prometheus = pytest.mark.skipif(BINARY is None, reason="no prometheus here; on Debian: apt-get install prometheus")
PATIENCE_S = 60.0
SCRAPES = 4  # of a server before it is sent anything


# ---------------------------------------------------------------- a server with Prometheus' limits


def latest(held: Series, asked_s: Any) -> Series:
    """Return what Prometheus says at these times: the last sample, unless it is older than five minutes."""
    at = np.searchsorted(held.times_s, asked_s, side="right") - 1
    known = (at >= 0) & (asked_s - held.times_s[at] < 300)
    return Series(name=held.name, labels=held.labels, times_s=asked_s[known], values=held.values[at[known]])


class Answers(BaseHTTPRequestHandler):
    """The part of Prometheus' HTTP API that is asked for, on series in memory, with its limit of 11,000 points."""

    held: tuple[Series, ...] = ()
    asked: list[str]
    wants: str | None = None

    def do_GET(self) -> None:
        """Answer one question."""
        path, _, query = self.path.partition("?")
        given = dict(urllib.parse.parse_qsl(query))
        type(self).asked.append(self.path)
        if self.wants and self.headers.get("Authorization") != self.wants:
            return self.answer(401, {"status": "error", "error": "no"})
        if path.endswith("/label/__name__/values"):
            names = {
                s.name
                for s in self.held
                if f'model_name="{s.labels.get("model_name")}"' in given["match[]"] or "model_name" not in given["match[]"]
            }
            return self.answer(200, {"status": "success", "data": sorted(names)})
        if path.endswith("/label/model_name/values"):
            return self.answer(200, {"status": "success", "data": sorted({s.labels["model_name"] for s in self.held})})
        found = [s for s in self.held if s.name == given["query"].partition("{")[0]]
        if path.endswith("/query"):
            end_s, length_s = float(given["time"]), float(given["query"].rpartition("[")[2].rstrip("s]"))
            return self.matrix([(s, (s.times_s >= end_s - length_s) & (s.times_s <= end_s)) for s in found])
        start_s, end_s, step_s = (float(given[k]) for k in ("start", "end", "step"))
        if (end_s - start_s) / step_s > 11_000:
            return self.answer(400, {"status": "error", "error": "exceeded maximum resolution of 11,000 points per timeseries"})
        asked_s = np.arange(start_s, end_s + 1e-3, step_s)
        return self.matrix([(at, np.ones(len(at.times_s), dtype=bool)) for s in found for at in [latest(s, asked_s)]])

    def matrix(self, found: list[tuple[Series, Any]]) -> None:
        """Answer with these samples of these series."""
        rows = [
            {
                "metric": {"__name__": s.name, **s.labels},
                "values": [[t, f"{v:g}"] for t, v in zip(s.times_s[at], s.values[at], strict=True)],
            }
            for s, at in found
        ]
        assert all(len(row["values"]) <= 11_000 for row in rows)
        self.answer(200, {"status": "success", "data": {"resultType": "matrix", "result": rows}})

    def answer(self, status: int, body: Any) -> None:
        """Send JSON, or bytes as they are."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


Serve = Callable[..., str]


@pytest.fixture
def answering() -> Iterator[Serve]:
    """Start such servers."""
    running = []

    def start(*held: Series, wants: str | None = None, handler: type[Answers] = Answers) -> str:
        kind = type("Handler", (handler,), {"held": held, "asked": [], "wants": wants})
        server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv(traffic.TOKEN_VARIABLE, raising=False)


def ask(url: str, range_: str = "2h", until: str | None = None, **options: Any) -> Workload:
    given = {"engine": None, "model": None, "selector": None, "auth_file": None, "step": "auto"} | options
    return traffic.from_prometheus(url, range_=range_, until=until or "2023-11-15T02:00+00:00", **given)


def two_hours(**labels: str) -> list[Series]:
    """7,200 requests in two hours, counted at the first token and in histograms, every 15 s."""
    counts = 15.0 * np.arange(481)
    made = [series(counts, "vllm:time_to_first_token_seconds_count", **labels)]
    for what, mean in (("prompt", 300.0), ("generation", 80.0)):
        made.append(series(counts, f"vllm:request_{what}_tokens_count", **labels))
        made.append(series(counts * mean, f"vllm:request_{what}_tokens_sum", **labels))
        made += [series(counts, f"vllm:request_{what}_tokens_bucket", le=le, **labels) for le in ("500", "+Inf")]
        made.append(series(counts * 0, f"vllm:request_{what}_tokens_bucket", le="50", **labels))
    return made


def test_two_hours_of_a_server_are_read_over_http(answering: Serve) -> None:
    found = ask(answering(*two_hours(model_name="m")))
    assert (found.rate_per_s, found.arrivals) == (1.0, "poisson")
    assert found.observed is not None
    assert found.observed.requests == 7200
    assert (found.observed.prompt_tokens.mean, found.observed.output_tokens.mean) == (300, 80)  # type: ignore[union-attr]
    assert found.observed.dispersion["15s"] == 0
    assert found.source is not None
    assert "m, 7,200 requests in 2 h" in found.source


def test_long_ranges_are_asked_in_pieces_that_prometheus_accepts(answering: Serve) -> None:
    """30,000 scrapes of two replicas at their own phases: nothing twice, nothing lost; also at a step of the user's."""
    counts = 3.0 * np.arange(30_001)
    held = [series(counts, "vllm:request_success_total", every_s=5, start_s=T0 + phase, pod=pod) for phase, pod in ((0, "a"), (2.2, "b"))]
    totals = [series(90.0 * np.arange(1001), name, every_s=150) for name in ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")]
    url = answering(*held, *totals)
    for step_s, lost in ((None, 0), (10.0, 3)):  # at steps of 10 s the second replica's first scrape is not seen
        found = prometheus.fetched(
            prometheus.server(url), end_s=T0 + 150_010, range_s=150_010, step_s=step_s, engine=None, model=None, selector=None
        )
        every_s = counters.scrape_s(found.arrived)
        assert every_s == (step_s or 5.0)
        assert counters.counted(found.arrived, found.start_s, found.end_s, every_s)[1] == 180_000 - lost


def test_names_that_lost_their_colons_on_the_way_are_understood(answering: Serve) -> None:
    held = [Series(name=s.name.replace(":", "_"), labels=s.labels, times_s=s.times_s, values=s.values) for s in two_hours()]
    assert ask(answering(*held)).rate_per_s == 1.0


def test_metrics_of_several_models_want_a_choice(answering: Serve) -> None:
    url = answering(*two_hours(model_name="a"), *two_hours(model_name="b"))
    with pytest.raises(BadInput, match=r"holds metrics of 2 models \(a, b\); choose one with --model"):
        ask(url)
    with pytest.raises(MeasurementFailed, match=r"no metrics of model 'c' in the range; it has 'a', 'b'"):
        ask(url, model="c")


def test_metrics_of_several_engines_want_a_choice(answering: Serve) -> None:
    url = answering(*two_hours(), series(np.arange(9), "sglang:num_requests_total"))
    with pytest.raises(BadInput, match="holds metrics of vllm and sglang; choose one with --engine"):
        ask(url)
    assert ask(url, engine="vllm").rate_per_s == 1.0


def test_a_server_without_such_metrics_is_told_what_was_looked_for(answering: Serve) -> None:
    url = answering(series([1, 2], "vllm:num_requests_running"))
    with pytest.raises(MeasurementFailed) as caught:
        ask(url)
    for part in (
        "vllm:request_success_total",
        "sglang:num_requests_total",
        "mlsys_requests_total",
        "it has only vllm:num_requests_running",
    ):
        assert part in str(caught.value)
    assert caught.value.exit_status == 5


def test_a_counter_that_stands_still_is_no_traffic(answering: Serve) -> None:
    with pytest.raises(MeasurementFailed, match="did not grow in the range"):
        ask(answering(series(np.full(481, 7.0), "vllm:request_success_total")))


def test_credentials_are_sent_and_never_shown(answering: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "s3cret"
    url = answering(*two_hours(), wants=f"Bearer {secret}")
    with pytest.raises(BadInput, match="wants credentials; put a token into MLSYS_PROMETHEUS_TOKEN or --auth-file") as caught:
        ask(url)
    for text in (secret, f"Bearer {secret}\n", f"Authorization: Bearer {secret}\n"):
        (tmp_path / "token").write_text(text)
        assert secret not in str(ask(url, auth_file=tmp_path / "token"))
    monkeypatch.setenv(traffic.TOKEN_VARIABLE, secret)
    assert ask(url).rate_per_s == 1.0
    monkeypatch.setenv(traffic.TOKEN_VARIABLE, "wrong" + secret)
    with pytest.raises(BadInput) as caught:
        ask(url)
    assert secret not in str(caught.value)


def test_user_and_password_of_the_address_become_a_header_and_are_not_shown(answering: Serve) -> None:
    url = answering(*two_hours(), wants="Basic dTpwdw==")  # u:pw
    found = ask(url.replace("http://", "http://u:pw@"))
    assert found.source is not None
    assert "pw" not in found.source
    with pytest.raises(BadInput) as caught:
        ask(url.replace("http://", "http://u:wrong@"))
    assert "wrong" not in str(caught.value)


class Page(Answers):
    """Something that is no Prometheus."""

    def do_GET(self) -> None:
        """Greet."""
        self.answer(200, b"<html>hello</html>")


def test_what_is_no_prometheus_says_so(answering: Serve) -> None:
    with pytest.raises(BadInput, match="what came is not JSON; is it the address of a Prometheus server"):
        ask(answering(handler=Page))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(BadInput, match="cannot be reached"):
            ask(f"http://127.0.0.1:{taken.getsockname()[1]}")
    for url in ("prometheus:9090", "ftp://x", "file:///etc/passwd", ""):
        with pytest.raises(BadInput, match="write an address like http://prometheus:9090"):
            ask(url)


# ---------------------------------------------------------------- exported files


def export(path: Path, held: list[Series], form: str) -> Path:
    rows = [
        {"metric": {"__name__": s.name, **s.labels}, "values": [[t, f"{v:g}"] for t, v in zip(s.times_s, s.values, strict=True)]}
        for s in held
    ]
    answers = [{"status": "success", "data": {"resultType": "matrix", "result": [row]}} for row in rows]
    if form == "one":
        path.write_text(json.dumps({"status": "success", "data": {"resultType": "matrix", "result": rows}}, indent=2))
    elif form == "list":
        path.write_text(json.dumps(answers))
    elif form == "lines":
        path.write_text("\n".join(map(json.dumps, answers)))
    else:
        heads = [f"{s.name}{{{','.join(f'{k}={chr(34)}{v}{chr(34)}' for k, v in s.labels.items())}}}".replace('"', '""') for s in held]
        quoted = [f'"{head}"' for head in heads]
        lines = ["sep=,"] if form == "csv for Excel" else []
        lines += [",".join(["Time", *quoted])]
        lines += [",".join([f"{1000 * t:.0f}", *(f"{s.values[i]:g}" for s in held)]) for i, t in enumerate(held[0].times_s)]
        path.write_text("\n".join(lines))
    return path


@pytest.mark.parametrize("form", ["one", "list", "lines", "csv", "csv for Excel"])
def test_an_exported_file_says_what_the_server_would(tmp_path: Path, form: str) -> None:
    path = export(tmp_path / "metrics.json", two_hours(model_name="m"), form)
    given = {
        "columns": {},
        "time_unit": None,
        "block_tokens": None,
        "start": None,
        "end": None,
        "speed": None,
        "engine": None,
        "model": None,
    }
    found = traffic.from_file(path, qps=None, **given)  # type: ignore[arg-type]
    assert found.rate_per_s == 1.0
    assert found.observed is not None
    assert found.observed.requests == 7200
    assert found.observed.prompt_tokens is not None
    assert found.observed.prompt_tokens.mean == 300


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"status":"success","data":{"resultType":"vector","result":[]}}', "is no matrix"),
        (
            '{"data":{"resultType":"matrix","result":[{"metric":{"a":"b"},"values":[[1,"2"],[2,"3"]]}]}}',
            "its series have no names; export the counters",
        ),
        ('{"data":{"resultType":"matrix","result":[{"values":[[1,"2"]]}]}}', "is not the answer of query_range"),
        ("Time,vllm:request_success_total\nnoon,3\n", "'noon' is no time"),
        ("Time,vllm:request_success_total\n1,3 req\n", "'3 req' is no number"),
        ("when,vllm:request_success_total\n1,3\n", "is no export of metrics"),
    ],
)
def test_a_broken_export_says_what_is_wrong(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "export").write_text(text)
    with pytest.raises((BadInput, MeasurementFailed), match=says) as caught:
        prometheus.exported(tmp_path / "export", engine=None, model=None)
    assert str(caught.value).startswith(str(tmp_path))


# ---------------------------------------------------------------- a real Prometheus, a real server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answered(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
        return json.load(answer)


def now(url: str, query: str) -> list[float]:
    """Return what a query gives now."""
    return [float(row["value"][1]) for row in answered(f"{url}/api/v1/query?query={query}")["data"]["result"]]


def until(is_so: Callable[[], bool]) -> None:
    """Ask every tenth of a second."""
    pause = threading.Event()
    for _ in range(int(10 * PATIENCE_S)):
        if is_so():
            return
        pause.wait(0.1)
    raise AssertionError("it never came to that")


Start = Callable[[dict[str, Any]], str]


@pytest.fixture
def real(tmp_path: Path) -> Iterator[Start]:
    """Start a real Prometheus with these settings, on the blocks that are in `data`; ends it by its id."""
    running: list[subprocess.Popen[bytes]] = []

    def start(settings: dict[str, Any]) -> str:
        (tmp_path / "prometheus.yml").write_text(json.dumps(settings))
        url = f"http://127.0.0.1:{free_port()}"
        assert BINARY is not None
        options = [f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/data"]
        with (tmp_path / "log").open("wb") as log:
            running.append(subprocess.Popen([BINARY, *options, f"--web.listen-address={url[7:]}"], stdout=log, stderr=log))

        def is_ready() -> bool:
            assert running[0].poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(f"{url}/-/ready", timeout=PATIENCE_S) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False  # not up yet

        until(is_ready)
        return url

    yield start
    for process in running:
        process.terminate()
        process.wait(PATIENCE_S)


@needs_prometheus
@pytest.mark.e2e
def test_a_real_prometheus_gives_back_the_requests_that_were_sent(real: Start) -> None:
    """60 requests of known lengths through `mlsys serve`, scraped by Prometheus: counts and means are exactly those sent."""
    prompts, outputs = [20 + i % 7 for i in range(60)], [3 + i % 5 for i in range(60)]
    with serve.start(serve.Options(port=0, max_batch=4, seed=3)) as server:
        target = {"job_name": "llm", "static_configs": [{"targets": [server.url.removeprefix("http://")]}]}
        url = real({"global": {"scrape_interval": "500ms"}, "scrape_configs": [target]})
        seen = "count_over_time(mlsys_request_prompt_tokens_count[1m])"
        until(lambda: max(now(url, seen), default=0) >= SCRAPES)  # it grows from what was seen before: 60 requests may come within a scrape

        def send(i: int) -> None:
            body = {"model": "nano", "prompt": "x" * prompts[i], "max_tokens": outputs[i], "ignore_eos": True}
            request = urllib.request.Request(
                f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                answer.read()

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(send, range(60)))
        until(lambda: now(url, "mlsys_request_prompt_tokens_count") == [60])
        given = {"engine": None, "model": None, "selector": 'job="llm"', "auth_file": None}
        found = traffic.from_prometheus(url, range_="10min", step="auto", until=None, **given)  # type: ignore[arg-type]
        with pytest.raises(MeasurementFailed, match="no requests are counted there"):
            traffic.from_prometheus(url, range_="10min", step="auto", until=None, **given | {"selector": 'job="other"'})  # type: ignore[arg-type]
        with pytest.raises(BadInput, match=r"refuses the query: .*parse"):
            traffic.from_prometheus(url, range_="10min", step="auto", until=None, **given | {"selector": "job="})  # type: ignore[arg-type]
    summary = found.observed
    assert summary is not None
    assert summary.requests == 60
    assert summary.prompt_tokens is not None
    assert summary.output_tokens is not None
    assert summary.prompt_tokens.mean == pytest.approx(np.mean(prompts))
    assert summary.output_tokens.mean == pytest.approx(np.mean(outputs))
    for lengths, sent in ((summary.prompt_tokens, prompts), (summary.output_tokens, outputs)):
        assert lengths.cv_bounds is not None
        assert lengths.cv_bounds[0] <= np.std(sent) / np.mean(sent) <= lengths.cv_bounds[1]
    assert found.rate_per_s == pytest.approx(60 / summary.duration_s)
    told = re.search(r"every ([\d.]+) s:", summary.notes[0])
    assert told is not None
    assert float(told[1]) == pytest.approx(0.5, abs=0.05)  # as the server on a busy machine kept its interval


@needs_prometheus
@pytest.mark.e2e
def test_a_real_prometheus_answers_more_than_its_limit_of_points_in_pieces(real: Start, tmp_path: Path) -> None:
    """Two days of two replicas scraped every 10 s, one of which restarts: 17,280 samples each, in blocks made by promtool.

    What was counted is exactly what came, but for the 7 requests between the last scrape and the restart and the first scrape of each.
    """
    start_s = float(int(time.time()) // 86_400 * 86_400 - 3 * 86_400)
    arrived = [workload.arrival_times(0.5, "mmpp:3:20%:60s", duration_s=2 * 86_400, seed=seed) for seed in (1, 2)]
    at_s = np.arange(10.0, 2 * 86_400, 10.0)
    counts = [np.searchsorted(times_s, at_s) for times_s in arrived]
    known = sum(int(c[-1] - c[0]) for c in counts) - 7
    restart = int(np.flatnonzero((at_s > 86_400) & (np.diff(counts[1], prepend=0) >= 7))[0])
    counts[1][restart:] -= counts[1][restart - 1] + 7
    lines = [
        f'{name}{{model_name="m",pod="{pod}"}} {scale * count} {start_s + t:.0f}'
        for name, scale in (("vllm:request_success_total", 1), ("vllm:prompt_tokens_total", 300), ("vllm:generation_tokens_total", 80))
        for pod, held in zip("ab", counts, strict=True)
        for t, count in zip(at_s, held, strict=True)
    ]
    names = dict.fromkeys(line.partition("{")[0] for line in lines)
    text = [entry for name in names for entry in (f"# TYPE {name} unknown", *(x for x in lines if x.startswith(name)))]
    (tmp_path / "samples").write_text("\n".join([*text, "# EOF", ""]))
    made = ["promtool", "tsdb", "create-blocks-from", "openmetrics", "--max-block-duration=96h", tmp_path / "samples", tmp_path / "data"]
    subprocess.run(made, check=True, capture_output=True, timeout=PATIENCE_S)
    url = real({})
    end = datetime.datetime.fromtimestamp(start_s + 2 * 86_400, datetime.UTC).isoformat()
    with pytest.raises(urllib.error.HTTPError, match="400"):  # the server's own limit, in one piece
        answered(f"{url}/api/v1/query_range?query=up&start={start_s}&end={start_s + 2 * 86_400}&step=10")
    for step, seconds, unseen in (("auto", 10, 0), ("15s", 15, 60)):
        found = ask(url, "2d", end, step=step)
        assert found.observed is not None
        assert known - unseen <= found.observed.requests <= known
        assert f"every {seconds} s" in found.observed.notes[0]
        assert found.prompt_tokens.mean == pytest.approx(300, rel=0.01)
        assert found.source is not None
        assert ": m, " in found.source
    typed = [sys.executable, "-m", "mlsys_cli", "workload", "--prometheus", url, "--range", "2d", "--until", end, "--json"]
    said = subprocess.run([*typed, "-o", tmp_path / "t.json"], check=True, capture_output=True, text=True, timeout=PATIENCE_S)
    assert record.loads(said.stdout, "printed")[1] == record.read(tmp_path / "t.json", Workload) == ask(url, "2d", end)
