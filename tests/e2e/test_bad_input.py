"""Whatever a person gets wrong: one clear line on stderr, the exit status of docs/commands.md, never a traceback."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    from conftest import Cli

pytestmark = pytest.mark.e2e

SIZE = "plan --model llama-3-8b --gpu l4 --qps 2"
CLOSED = "http://127.0.0.1:9"  # nothing listens on the discard port
SCENARIO = """mlsys: 1
name: chat
description: A small chat.
source: assumed
model: llama-3-8b
precision: [bf16]
gpus: [h100-sxm]
max_batch: 8
headroom: 20%
traffic: {rate: 2/s, arrivals: poisson, prompt: 100, output: 20, source: assumed}
slo: {ttft_p95: 500ms}
"""


class Case(NamedTuple):
    """What is typed, in the folder of `folder`, the exit status it must get, and words its one line must hold."""

    command: str
    status: int
    words: tuple[str, ...]


def bad(command: str, *words: str) -> Case:
    return Case(command, 2, words)


FILES = [
    bad("fit nowhere.json", "nowhere.json", "No such file"),
    bad("bench gpu --compare nowhere.json", "nowhere.json", "No such file"),
    bad("workload nowhere.csv", "nowhere.csv", "No such file"),
    bad("fit truncated.json", "truncated.json", "cut off"),
    bad("report truncated.parquet", "truncated.parquet", "cut off"),
    bad("report empty.json", "empty.json", "not JSON"),
    bad("report binary.json", "binary.json", "not JSON"),
    bad("report folder", "folder", "directory"),
    bad("fit version.json", "version.json", "'mlsys/9'", "reads 'mlsys/1'"),
    bad("fit plan.json", "plan.json", "'plan'", "'bench'"),
    bad("verify bench.json", "bench.json", "'bench'", "'plan'"),
    bad("gate compare plan.json bench.json", "plan.json", "'plan'", "bench files"),
    bad("plan --from plan.json --qps 2", "plan.json", "'plan'", "profile"),
    bad("report kind.json", "kind.json", "unknown kind", "did you mean bench"),
    bad("fit key.json", "key.json", "unknown key measurment", "did you mean measurements"),
    bad("report type.json", "type.json", "array", "str"),
    bad("fit nan.json", "nan.json", "measurements[", "nan", "finite"),
    bad("gate compare bench.json nan.json", "nan.json", "nan", "finite"),
    bad("fit nothing.json", "no engine.step"),
    bad("fit launchless.json", "no engine.step"),
    bad("fit bench.json bench.json", "bench.json", "twice"),
    bad("workload plan.json", "plan.json", "column"),
    bad("backtest queueing nowhere.csv", "nowhere.csv", "No such file"),
    bad("backtest queueing plan.json", "plan.json", "line 1", "column model is missing"),
    bad("backtest queueing binary.json", "binary.json", "line 2", "UTF-8"),
    bad("backtest queueing short.csv", "short.csv", "line 3: has 2 fields", "3 columns"),
    bad("backtest queueing wordy.csv", "wordy.csv", "line 2, column value", "'nine'"),
]
NAMES = [
    bad("plan --model lama-3-8b --qps 2", "unknown model 'lama-3-8b'", "did you mean llama-3-8b"),
    bad("plan --model llama-3-8b --gpu h1000 --qps 2", "'h1000'", "did you mean H100"),
    bad("plan llm-chta", "unknown scenario 'llm-chta'", "did you mean llm-chat"),
    bad(f"{SIZE} --precision bf17", "unknown precision 'bf17'", "did you mean bf16"),
    bad("bench gpu --only gemmm", "unknown benchmark 'gemmm'", "gemm"),
    bad("bench gpu --precision int3", "int3", "did you mean int8"),
    bad("serve nanno", "unknown model 'nanno'", "did you mean nano"),
    bad("serve llama-3-8b", "no weights"),
]
QUANTITIES = [
    *(bad(f"plan --model llama-3-8b --gpu h100 --qps {rate}", f"--qps {rate}", "above zero") for rate in ("0", "-1")),
    *(bad(f"plan --model llama-3-8b --qps {rate}", "--qps", repr(rate), "no plain number") for rate in ("nan", "inf", "many", "1_000")),
    bad(f"{SIZE} --slo ttft_p95<500", "'500' has no unit", "500ms"),
    bad(f"{SIZE} --slo ttfb_p95<500ms", "unknown metric 'ttfb'", "did you mean ttft"),
    bad(f"{SIZE} --slo tpot_p95<1ms", "below the physics floor", "L4"),
    bad(f"{SIZE} --arrivals mmpp:1", "mmpp"),
    bad(f"loadtest {CLOSED} --qps 5 --duration 5", "--duration", "no unit"),
    bad("bench gpu --budget 0s", "budget", "above 0"),
    bad("backtest queueing good.csv --budget 5", "--budget", "no unit"),
    bad("backtest queueing good.csv --tolerance tight", "--tolerance", "'tight' is no share"),
    Case(f"{SIZE} --slo tpot_p95<30ms", 1, ("tpot_p95<30ms", "nearest", "L4")),
]
NETWORK = [
    bad(f"loadtest {CLOSED} --qps 5 --duration 3s", CLOSED, "cannot be reached"),
    bad("loadtest {taken_url} --qps 5 --duration 3s --timeout 1s", "{taken_url}", "not answered within 1 s"),
    bad(f"verify plan.json {CLOSED}", CLOSED, "cannot be reached"),
    bad(f"workload --prometheus {CLOSED}", CLOSED, "cannot be reached"),
    bad(f"verify plan.json --prometheus {CLOSED}", CLOSED, "cannot be reached"),
    bad("workload --prometheus {html}", "{html}", "not JSON"),
    Case("workload --prometheus {sick}", 5, ("{sick}", "500")),
    bad("loadtest ftp://127.0.0.1 --qps 5 --duration 3s", "ftp://127.0.0.1", "no http URL"),
    bad("loadtest http://127.0.0.1:port --qps 5 --duration 3s", "http://127.0.0.1:port", "no URL"),
    bad("loadtest {html} --qps 5 --duration 3s", "{html}", "text/html", "speaks no API known here"),
    bad("verify plan.json {html}", "{html}", "text/html", "speaks no API known here"),
    bad(f"loadtest {CLOSED} --sweep", f"{CLOSED}: cannot be reached"),
    bad(f"loadtest {CLOSED} --find-max", "--find-max needs limits to search for"),
    bad(f"loadtest {CLOSED} --calibrate", "target does nothing beside --calibrate"),
    Case("loadtest {sick} --qps 5 --duration 3s", 5, ("{sick}", "500", "out of memory")),
    bad("serve --port {taken}", "{taken}", "in use"),
]
PLACES = [
    bad("plan --from profile.json {traffic} -o file/plan.json", "file/plan.json", "cannot be written"),
    bad("bench gpu -o file/bench.json", "file/bench.json", "cannot be written"),
    bad("verify plan.json -o file/verify.json", "file/verify.json", "cannot be written"),
    bad("backtest queueing good.csv -o file/out.csv", "file/out.csv", "cannot be written"),
    bad("plan --from profile.json --from bench.json {traffic}", "--from bench.json", "bound twice"),
    Case("plan --from profile.json {traffic} --gpu h100", 4, ("fp32 on cpu", "h100")),
    Case("plan --from profile.json {traffic} --model small-160m", 4, ("nano", "small-160m")),
]
SCENARIOS = [
    bad("scenario check unknown-key.yaml", "unknown-key.yaml", "unknown key headrom", "did you mean headroom"),
    bad("scenario check twice.yaml", "twice.yaml", "line ", "'max_batch' stands there twice"),
    bad("scenario check unitless.yaml", "unitless.yaml", "slo.ttft_p95: 500 has no unit", "500ms"),
    bad("scenario check broken.yaml", "broken.yaml", "line ", "not YAML"),
    bad("scenario check missing.yaml", "misses slo"),
]
USAGE = [
    bad("plan --bogus", "No such option: --bogus", "mlsys plan --help"),
    bad("bogus", "No such command 'bogus'", "mlsys --help"),
    bad("verify", "Missing argument"),
    bad("plan -o", "requires an argument"),
    bad("plan", "--model"),
    bad("fit", "bench file"),
    bad("backtest llm nowhere.csv", "nowhere.csv: cannot be read"),
    bad("fit --probe http://127.0.0.1:9", "cannot be reached"),
    bad("fit --probe http://127.0.0.1:9 --budget 11m", "at most 10 minutes"),
    bad("fit --probe http://127.0.0.1:9 --model nano", "both --model and --gpu"),
    bad("workload", "name one of a FILE", "--prometheus URL"),
    bad("workload plan.json --synthetic", "not a FILE and --synthetic"),
    bad("workload --synthetic --qps 3", "also needs --prompt-tokens, --output-tokens"),
    bad("workload --prometheus prometheus:9090", "http://prometheus:9090"),
    bad("workload --prometheus http://127.0.0.1:9 --range 14", "--range", "has no unit"),
    bad("workload --synthetic --qps 3 --prompt-tokens 9 --output-tokens 9 --arrivals mmpp:9:50%:1s", "PEAK lies between 1 and 2"),
    bad(f"loadtest {CLOSED}", "exactly one of --qps"),
    bad("claims 20-shard", "unknown claim '20-shard'; did you mean 20-shards?"),
    bad(f"{SIZE} --prices nowhere.yaml", "nowhere.yaml: cannot be read"),
    bad(f"{SIZE} --availability 2", "--availability"),
    bad(f"{SIZE} --zones 3", "e.g. --availability 99.9%"),
    bad(f"{SIZE} --baseline nowhere.json", "nowhere.json: cannot be read"),
    bad(f"{SIZE} --baseline profile.json", "profile.json: holds a 'profile' record"),
    bad(f"{SIZE} --small nano", "give that, too"),
    bad(f"{SIZE} --cluster localhost:8786", "write the scheduler's address with its protocol"),
    bad("plan chat-fleet --sensitivity", "for the plan of one scenario"),
    bad(f"{SIZE} --availability 99.9% --survive", "at least two"),
    bad(f"{SIZE} --availability 99.9% --term spot --zones 3 --survive", "everybody wants the spot capacity"),
    bad(f"{SIZE} --spot life=6h", "give --term spot and an --availability"),
    bad(f"{SIZE} --availability 99.9% --term spot --spot lives=6h", "write life=6h,notice=2min,refill=30min"),
    bad("plan rag-support-bot --mixed", "several stages"),
    bad("verify plan.json --range 1h", "--range belongs to --prometheus"),
    bad("loadtest", "say what to load"),
    bad(f"loadtest {CLOSED} --qps 5 --processes none", "--processes none", "or auto"),
    bad(f"loadtest {CLOSED} --qps 5 --expect-workers 2", "--expect-workers belongs to --master"),
    bad(f"loadtest {CLOSED} --qps 5 --web-address :1", "--web-address belongs to --web"),
    bad("loadtest --worker lead:port", "--worker lead:port", "HOST or HOST:PORT"),
    bad(f"loadtest {CLOSED} --qps 5 --export k8s", "which pods cannot reach"),
    bad("cost nowhere.json", "nowhere.json: cannot be read"),
    bad("cost plan.json --baseline nowhere.json", "nowhere.json: cannot be read"),
    bad("cost plan.json --vectors many", "--vectors many: write count x dimensions"),
    bad("backtest gate t.csv", "t.csv: cannot be read"),
    bad("backtest gate t.csv --tolerance 0%", "--tolerance 0%"),
    bad("gate compare bench.json", "bench.json", "give a CAND"),
]
NOT_BUILT = ["bench scenario rag", "serve --replicas 2"]
CASES = [*FILES, *NAMES, *QUANTITIES, *NETWORK, *PLACES, *SCENARIOS, *USAGE, *(bad(command, "not built yet") for command in NOT_BUILT)]


class Html(http.server.BaseHTTPRequestHandler):
    """A web site where an API is expected."""

    status, kind, body = 200, "text/html", b"<html><body>Welcome</body></html>"

    def do_GET(self) -> None:
        """Answer the same whatever is asked."""
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(self.status)
        self.send_header("Content-Type", self.kind)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        self.wfile.write(self.body)

    do_POST = do_GET  # noqa: N815  the name http.server looks for

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Sick(Html):
    """An API whose engine fails."""

    status, kind, body = 500, "application/json", b'{"error": {"message": "out of memory"}}'


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, str]]:
    """Return what stands for {html} and {sick}, servers that answer so, and {taken}, a port in use that never answers."""
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) for handler in (Html, Sick)]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    html, sick = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        traffic = "--qps 2 --prompt-tokens 60 --output-tokens 12 --slo ttft_p95<5s"
        yield {"html": html, "sick": sick, "taken": str(port), "taken_url": f"http://127.0.0.1:{port}", "traffic": traffic}
    for server, thread in zip(servers, threads, strict=True):
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def folder(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with good records and every kind of broken one."""
    here = tmp_path_factory.mktemp("broken")
    bench = json.loads((records / "bench.json").read_text())
    for name in ("bench", "profile", "plan"):
        (here / f"{name}.json").write_bytes((records / f"{name}.json").read_bytes())
    whole = json.dumps(bench)
    steps = next(m for m in bench["measurements"] if m["name"] == "engine.step" and m["launches"])
    others = [m for m in bench["measurements"] if m["name"] != "engine.step"]
    broken = {
        "truncated.json": whole[: len(whole) // 2],
        "empty.json": "",
        "version.json": json.dumps({**bench, "schema": "mlsys/9"}),
        "kind.json": json.dumps({**bench, "kind": "bensh"}),
        "key.json": json.dumps({**bench, "measurment": []}),
        "type.json": json.dumps({**bench, "measurements": "none"}),
        "nan.json": json.dumps({**bench, "measurements": [_nan(steps)]}),
        "nothing.json": json.dumps({**bench, "measurements": others}),
        "launchless.json": json.dumps({**bench, "measurements": [*others, {**steps, "launches": []}]}),
        "unknown-key.yaml": SCENARIO + "headrom: 10%\n",
        "twice.yaml": SCENARIO + "max_batch: 16\n",
        "unitless.yaml": SCENARIO.replace("500ms", "500"),
        "broken.yaml": SCENARIO.replace("[bf16]", "[bf16"),
        "missing.yaml": SCENARIO.partition("slo:")[0],
        "file": "",
        "good.csv": "model,parameters,quantity\nM/M/c,c=1;rho=0.5,wait_mean\n",
        "short.csv": "model,parameters,quantity\nM/M/c,c=1;rho=0.5,wait_mean\nM/M/c,c=1\n",
        "wordy.csv": "model,parameters,quantity,value\nM/M/c,c=1;rho=0.5,wait_mean,nine\n",
    }
    for name, text in broken.items():
        (here / name).write_text(text)
    (here / "binary.json").write_bytes(bytes(range(256)))
    (here / "truncated.parquet").write_bytes(b"PAR1" + bytes(100))
    (here / "folder").mkdir()
    return here


def _nan(measurement: dict[str, Any]) -> dict[str, Any]:
    first, *rest = measurement["launches"]
    return {**measurement, "launches": [{**first, "rounds": [{**first["rounds"][0], "values": [float("nan")]}]}, *rest]}


@pytest.fixture(scope="module")
def answers(
    request: pytest.FixtureRequest, folder: Path, places: dict[str, str], cli_in: Callable[[Path], Cli]
) -> dict[str, CompletedProcess[str]]:
    """Run the commands of all chosen cases, as many at once as there are cores, and return what each said."""
    chosen = [item.callspec.params["case"] for item in request.session.items if getattr(item, "originalname", "") == HERE]  # type: ignore[attr-defined]
    return dict(
        zip((case.command for case in chosen), cli_in(folder).warm(case.command.format(**places).split() for case in chosen), strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.command)
def test_one_clear_line_and_the_right_status(case: Case, answers: dict[str, CompletedProcess[str]], places: dict[str, str]) -> None:
    said = answers[case.command]
    assert said.returncode == case.status, said.stderr
    assert said.stdout == ""
    assert said.stderr.startswith("mlsys: ")
    assert said.stderr.count("\n") == 1
    assert said.stderr.endswith("\n")
    assert "Traceback" not in said.stderr
    assert all(word.format(**places) in said.stderr for word in case.words), said.stderr


HERE = test_one_clear_line_and_the_right_status.__name__


def test_a_good_scenario_is_what_the_broken_ones_were_made_from(mlsys: Cli) -> None:
    (mlsys.folder / "good.yaml").write_text(SCENARIO)
    said = mlsys("scenario", "check", "good.yaml")
    assert (said.returncode, said.stderr) == (0, "")


def test_a_reader_who_leaves_early_is_no_error(mlsys: Cli) -> None:
    """`mlsys catalog models | head -1`: the pipe's reader is gone before the first byte."""
    reading, writing = os.pipe()
    os.close(reading)
    with mlsys.start("catalog", "models", stdout=writing) as process:
        os.close(writing)
        _, err = process.communicate()
    assert (process.returncode, err) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, which only Linux has")
def test_a_full_disk_is_one_line(mlsys: Cli) -> None:
    with Path("/dev/full").open("w") as full, mlsys.start("catalog", "models", stdout=full.fileno()) as process:
        _, err = process.communicate()
    assert process.returncode == 2
    assert err == "mlsys: standard output: No space left on device\n"
