"""One schedule over several processes and hosts: the same requests as from one, and nobody is missed in silence."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from mlsys_bench import hardware, loadtest, record
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.journeys import spread
from mlsys_bench.loadtest import Hosts, Progress, clocks, crew, fleet, manifests, shards
from mlsys_bench.loadtest.content import Content
from mlsys_bench.loadtest.payloads.think import Think
from mlsys_bench.report import markdown
from mlsys_bench.senders import Sender
from mlsys_bench.types import RequestRecord, Requests
from mlsys_cli.main import app
from tests import manifest_schemas, sample_records
from tests.planned_server import children, needs_proc, options, serving, wait_for_exit

# ---------------------------------------------------------------- clocks


@given(
    offset_s=st.floats(-1e4, 1e4),
    ways_s=st.lists(st.tuples(st.floats(1e-6, 0.2), st.floats(1e-6, 0.2)), min_size=1, max_size=20),
)
def test_the_offset_of_a_clock_is_within_what_the_exchanges_say(offset_s: float, ways_s: list[tuple[float, float]]) -> None:
    """However lopsided the ways are: the true offset lies within the error that is given."""
    exchanges = [
        clocks.Exchange(
            sent_s=k, heard_s=k + there_s + offset_s, answered_s=k + there_s + 1e-4 + offset_s, back_s=k + there_s + 1e-4 + back_s
        )
        for k, (there_s, back_s) in enumerate(ways_s)
    ]
    found = clocks.measured(exchanges)
    assert abs(found.offset_s - offset_s) <= found.error_s + 1e-9
    assert found.error_s <= min(max(there_s + back_s for there_s, back_s in ways_s), 0.4) + 1e-9


def test_a_clock_over_an_even_way_is_known_exactly() -> None:
    """Three seconds ahead, 4 ms there and 4 ms back, once 4 ms and 12 ms: the median does not mind the one."""
    even = clocks.Exchange(sent_s=0.0, heard_s=3.004, answered_s=3.005, back_s=0.009)
    found = clocks.measured([even, even, clocks.Exchange(sent_s=1.0, heard_s=4.004, answered_s=4.005, back_s=1.017)])
    assert found.offset_s == pytest.approx(3.0, abs=1e-12)
    assert found.error_s == pytest.approx(0.004, abs=1e-12)


# ---------------------------------------------------------------- sharing out


def test_several_workers_say_together_what_one_would() -> None:
    heard: list[Progress] = []
    total = crew.Total(2, heard.append)
    first = Progress(t_s=1.0, sent=5, ok=3, failed=1, in_flight=1, sent_per_s=5.0, lateness_s=0.1)
    second = Progress(t_s=1.1, sent=4, ok=4, failed=0, in_flight=0, sent_per_s=4.0, lateness_s=0.3)
    total.add(0, first)
    assert heard == []
    total.add(1, second)
    assert heard == [Progress(t_s=1.1, sent=9, ok=7, failed=1, in_flight=1, sent_per_s=9.0, lateness_s=0.3)]
    total.without(1)
    total.add(0, first)
    assert heard[1].sent == 9, "what a worker sent before it was lost stays counted"


@pytest.mark.parametrize(
    ("wanted", "host", "users", "cores", "expected"),
    [
        (3, "10.0.0.1", None, 2, 3), ("auto", "10.0.0.1", None, 4, 4), ("auto", "127.0.0.1", None, 4, 3), ("auto", "localhost", None, 1, 1),
        (8, "10.0.0.1", 5, 2, 5),
    ],
)  # fmt: skip
def test_a_core_is_left_to_a_server_on_this_machine(
    wanted: object, host: str, users: int | None, cores: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(crew, "usable_cores", lambda: list(range(cores)))
    monkeypatch.setattr(hardware, "cpu_quota", lambda: None)
    assert crew.how_many(wanted, host, users) == expected


def test_workers_get_a_core_each_where_there_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "usable_cores", lambda: [2, 3, 5, 7])
    monkeypatch.setattr(hardware, "cpu_quota", lambda: None)
    assert crew.cores("auto", 3) == [7, 5, 3]
    assert crew.cores("auto", 5) == [None] * 5
    assert crew.cores(None, 2) == [None, None]
    with pytest.raises(BadInput, match="core 4 is not among"):
        crew.cores(4, 1)
    assert crew.how_many(16, "x", None) == 16
    for wrong in (0, -1, "many", 1.5, 17, 5000):
        with pytest.raises(BadInput, match="--processes"):
            crew.how_many(wrong, "x", None)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: 2.5)
    assert crew.how_many("auto", "x", None) == 2, "a container may see four cores and be given two and a half"
    assert crew.cores("auto", 2) == [None, None], "its neighbours see the same four, and would choose the same"


def test_arrivals_nobody_has_a_record_of_are_counted() -> None:
    records = [RequestRecord(index=i, scheduled_s=float(i)) for i in (0, 2, 3, 9)]
    assert shards.missing(records, [float(i) for i in range(10)], before_s=100.0) == 6
    assert shards.missing(records, [float(i) for i in range(10)], before_s=4.0) == 1
    assert [r.index for r in shards.join([records[2:], records[:2]])] == [0, 2, 3, 9]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10.0.0.5", ("10.0.0.5", 5557)), ("lead:99", ("lead", 99)), ("[fe80::1]:7", ("fe80::1", 7)), ("fe80::1", ("fe80::1", 5557))],
)
def test_a_master_is_named_by_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert fleet.address(text) == expected


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"expect_workers": 2}, "--expect-workers belongs to --master"), ({"web_address": "x:1"}, "belongs to --web"),
        ({"processes": "zero"}, "--processes zero"), ({"processes": "2", "master": True}, "it sends nothing"),
        ({"web": True, "web_address": "localhost"}, "HOST:PORT"),
    ],
)  # fmt: skip
def test_options_of_another_way_to_send_are_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        spread.scaled(options("http://x", qps=1), spread.Asked(**asked))
    with pytest.raises(BadInput, match="name the master"):
        fleet.address("host:port")


def test_the_report_and_the_record_tell_of_each_sender() -> None:
    near = Sender(
        share=0, host="a", core=1, sent=60, cpu_share=0.4, lateness_p99_s=2e-4, ended="done", clock_offset_s=0.0, clock_error_s=1e-4
    )
    far = Sender(
        share=1, host="b", core=None, sent=12, cpu_share=None, lateness_p99_s=None, ended="died by SIGKILL", clock_offset_s=-2.5,
        clock_error_s=3e-4, clock_drift_s=1e-5,
    )  # fmt: skip
    made = sample_records.loadtest(senders=(near, far))
    assert record.loads(record.dumps(made, sample_records.machine()), "here")[1] == made
    text = markdown.render([("run.json", record.envelope(made, sample_records.machine(), []), made)])
    assert "2 workers on 2 hosts" in text
    assert "1 did not come to the end" in text
    assert "-2.50 s" in text
    assert "± 300 µs" in text
    alone = markdown.render([("run.json", record.envelope(made, sample_records.machine(), []), sample_records.loadtest(senders=(near,)))])
    assert "Workers" not in alone


def test_a_process_that_was_started_ahead_is_taken_once_and_one_that_nobody_takes_ends(tmp_path: Path) -> None:
    (tmp_path / "echo.py").write_text("print(input())")
    code = f"""
import sys; sys.path.insert(0, {str(tmp_path)!r})
from mlsys_bench import ahead
ahead.start("echo")
first, second = ahead.process("echo"), ahead.process("echo")
for made in (first, second):
    out, _ = made.process.communicate(b"heard\\n")
    made.errors.close()
    print(out.decode().strip(), made.process.returncode)
ahead.start("echo")
print(ahead._waiting["echo"].process.pid)
"""
    surroundings = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, env=surroundings, check=True)
    *heard, left = done.stdout.split("\n")[:-1]
    assert (heard, done.stderr) == (["heard 0", "heard 0"], "")
    with pytest.raises(ProcessLookupError):
        os.kill(int(left), 0)


# ---------------------------------------------------------------- several processes


def sent_by(processes: int, **more: Any) -> tuple[Requests, dict[float, Any]]:
    """Return the records of a run and what the server was asked, by the moment it was due."""
    with serving() as server:
        found, requests = loadtest.run(
            options(server.url, duration_s=0.6, seed=5, content=Content(same_words=True), processes=processes, **more)
        )
        asked = {round(due - requests.t0_unix_s, 3): body for (due, _), body in zip(server.ledger, server.bodies, strict=True)}
    assert [(s.share, s.ended) for s in found.senders] == [(i, "done") for i in range(processes)]
    assert sum(s.sent for s in found.senders) == len(requests.requests)
    return requests, asked


@pytest.mark.e2e
def test_two_workers_send_what_one_would_request_for_request() -> None:
    one, asked_of_one = sent_by(1, qps=60, arrivals="gamma:0.5")
    two, asked_of_two = sent_by(2, qps=60, arrivals="gamma:0.5")
    assert [(r.index, r.scheduled_s, r.prompt_tokens, r.output_tokens) for r in one.requests] == [
        (r.index, r.scheduled_s, r.prompt_tokens, r.output_tokens) for r in two.requests
    ]
    assert [r.index for r in two.requests] == list(range(len(one.requests))), "no request is missing, none came twice"
    assert len(asked_of_one) == len(one.requests)
    assert asked_of_two == asked_of_one


@pytest.mark.measures
def test_users_of_a_closed_loop_are_split_over_workers() -> None:
    requests, _ = sent_by(3, users=4, think=Think(mean_s=0.02))
    indices = [r.index for r in requests.requests]
    assert len(set(indices)) == len(indices) > 20
    begun = [r.index % 3 for r in requests.requests if r.scheduled_s < 0.015]
    assert sorted(np.bincount(begun, minlength=3)) == [1, 1, 2]


@pytest.mark.measures
@needs_proc
def test_a_worker_that_dies_makes_the_run_invalid_and_its_requests_missing(tmp_path: Path) -> None:
    """One of two is killed after a second of three: the other goes on, and nobody believes the run was of the rate that was asked."""
    killed: list[int] = []

    def kill_one(_: Progress) -> None:
        if not killed:
            killed.append(children(os.getpid())[-1])
            os.kill(killed[0], signal.SIGKILL)

    with serving() as server:
        asked = options(server.url, qps=40, duration_s=2.0, processes=2, requests_file=tmp_path / "r.parquet")
        found, requests = loadtest.run(asked, kill_one)
    assert found.validity.verdict == "invalid"
    said = " ".join(found.validity.reasons)
    assert re.search(r"worker \d of 2 on \S+ died by SIGKILL", said)
    lost = 80 - len({r.index for r in requests.requests})
    assert f"{lost} of 80 scheduled requests are missing" in said
    assert 10 < lost < 40
    assert sorted(sender.ended for sender in found.senders) == ["died by SIGKILL", "done"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]
    assert record.read(tmp_path / "r.parquet", Requests) == requests


# ---------------------------------------------------------------- ends that nobody planned

PARENT = """
import sys
from pathlib import Path
from mlsys_bench import loadtest
from mlsys_bench.types import Lengths
asked = loadtest.Options(url=sys.argv[1], qps=40, arrivals="constant", duration_s=60, warmup_s=0, prompt_tokens=Lengths(mean=50),
                         output_tokens=Lengths(mean=4), requests_file=Path(sys.argv[2]), processes=2, web=("127.0.0.1", 0))
found, requests = loadtest.run(asked, lambda progress: print("progress", progress.sent, flush=True), lambda note: print(note, flush=True))
print("verdict", found.validity.verdict, len(requests.requests), [r for r in found.validity.reasons if "stopped" in r])
"""


@contextmanager
def running(url: str, file: Path, seconds: int) -> Iterator[tuple[subprocess.Popen[str], list[int], str]]:
    """Start a run with a web UI in a process of its own; give it after so many seconds of load, with its children and the address."""
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, url, str(file)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        try:
            assert parent.stdout is not None
            said: list[str] = []
            while sum(line.startswith("progress") for line in said) < seconds:
                said.append(parent.stdout.readline())
                assert said[-1], parent.communicate(timeout=5)
            yield parent, children(parent.pid), next(line.split()[-1] for line in said if "web UI" in line)
        finally:
            parent.kill()


def page(url: str, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()
    finally:
        connection.close()


@pytest.mark.e2e
@needs_proc
def test_locusts_web_ui_shows_the_run_and_a_word_from_outside_ends_it_and_keeps_what_was_measured(tmp_path: Path) -> None:
    """Two workers and a master; their pages show our requests and first tokens while they run, and go with them."""
    file = tmp_path / "r.parquet"
    with serving() as server, running(server.url, file, seconds=3) as (parent, started, address):
        status, html = page(address, "/")
        stats = json.loads(page(address, "/stats/requests")[1])
        assert len(started) == 3
        parent.send_signal(signal.SIGTERM)
        out, err = parent.communicate(timeout=30)
        assert all(wait_for_exit(pid, 5) for pid in started)
    assert status == 200
    assert "<title>Locust" in html
    shown = {(row["method"], row["name"]): row["num_requests"] for row in stats["stats"]}
    assert min(shown["POST", "/v1/completions"], shown["TTFT", "/v1/completions"]) >= 20
    assert shown["POST", "/v1/completions"] == shown["", "Aggregated"], "first tokens are no requests of their own"
    assert len(stats["workers"]) == 2
    with pytest.raises(ConnectionRefusedError):
        page(address, "/")
    assert (parent.returncode, err) == (0, "")
    assert "stopped by hand after" in out
    kept = record.read(file, Requests).requests
    assert len(kept) >= 100
    assert [r.index for r in kept] == list(range(len(kept)))
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


@pytest.mark.e2e
@needs_proc
def test_a_parent_that_is_killed_takes_master_and_workers_along(tmp_path: Path) -> None:
    with serving() as server, running(server.url, tmp_path / "r.parquet", seconds=1) as (parent, started, _):
        parent.kill()
        assert all(wait_for_exit(pid, 15) for pid in started)
    assert sum(len(shards.read_rows(path)) for path in tmp_path.iterdir()) >= 20


# ---------------------------------------------------------------- several hosts


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


SHIFT = ["unshare", "-T", "--monotonic", "1000", "--fork"]  # a clock of its own (Linux 5.6, util-linux 2.36), where we may


def shifted() -> list[str]:
    """Return what starts a command whose monotonic clock says 1000 s more; nothing where this machine does not let us."""
    if shutil.which("unshare") is None or subprocess.run([*SHIFT, "true"], capture_output=True).returncode:
        return []
    return SHIFT


@contextmanager
def helping(port: int, folder: Path, *before: str, key: str = "X-Key: mine") -> Iterator[subprocess.Popen[str]]:
    """Run `mlsys loadtest --worker`, as another host would."""
    command = [*before, sys.executable, "-m", "mlsys_cli", "loadtest", "--worker", f"127.0.0.1:{port}", *(["--header", key] if key else [])]
    surroundings = {**os.environ, "TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=surroundings) as worker:
        try:
            yield worker
        finally:
            worker.kill()


def led(url: str, port: int, **more: Any) -> loadtest.Options:
    hosts = Hosts(expect_workers=2, bind="127.0.0.1", port=port, wait_s=60, grace_s=0.5)
    return options(url, **{"qps": 50, "duration_s": 1.2, "seed": 3, "hosts": hosts, **more})


@pytest.mark.measures
def test_workers_on_other_hosts_send_the_one_schedule_and_their_records_come_home(tmp_path: Path) -> None:
    """The second worker's clock says 1000 seconds more, where this machine lets us set it: they start together all the same."""
    port, notes = free_port(), list[str]()
    with serving() as server, helping(port, tmp_path) as first, helping(port, tmp_path, *shifted()) as second:
        asked = led(server.url, port, arrivals="poisson", requests_file=tmp_path / "r.parquet", headers=(("X-Key", "of the master"),))
        drawn = loadtest.dry_run(asked)
        found, requests = loadtest.run(asked, None, notes.append)
        ends = [worker.communicate(timeout=20) for worker in (first, second)]
        due = sorted(at - requests.t0_unix_s for at, _ in server.ledger)
    assert [r.scheduled_s for r in requests.requests] == drawn.scheduled_s.tolist()
    assert [r.index for r in requests.requests] == list(range(len(drawn.scheduled_s)))
    assert due == pytest.approx(drawn.scheduled_s, abs=2e-3), "each request carried the moment it was due, by one clock"
    assert [sender.ended for sender in found.senders] == ["done", "done"]
    assert len(found.senders) == 2
    for sender in found.senders:
        assert sender.clock_error_s is not None
        assert sender.clock_offset_s is not None
        assert abs(sender.clock_offset_s) <= sender.clock_error_s + 1e-3, "the clock on the wall is the same: this is one machine"
    assert all(re.search(r"sent \d+ requests", err) for _, err in ends), ends
    assert [(first.returncode, second.returncode)] == [(0, 0)]
    assert any("--worker" in note for note in notes)
    assert [sender.core for sender in found.senders] == [None, None], "two commands on one host do not fight for one core"
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


@pytest.mark.e2e
@needs_proc
def test_a_host_that_is_lost_is_missed_and_one_that_leaves_is_named(tmp_path: Path) -> None:
    """Of three workers one is killed and one is interrupted on its own host: what they did not send is counted, and the run is invalid."""
    port, notes = free_port(), list[str]()
    with serving() as server, helping(port, tmp_path) as first, helping(port, tmp_path) as second, helping(port, tmp_path) as third:
        hosts = Hosts(expect_workers=3, bind="127.0.0.1", port=port, wait_s=60, grace_s=0.5)
        left: list[int] = []

        def strike(_: Progress) -> None:
            if not left:
                left.extend(children(first.pid))
                os.kill(left[0], signal.SIGKILL)
                second.send_signal(signal.SIGINT)

        found, requests = loadtest.run(led(server.url, port, hosts=hosts, qps=60, duration_s=2.0), strike, notes.append)
        _, told = first.communicate(timeout=20)
        third.communicate(timeout=20)
    assert found.validity.verdict == "invalid"
    said = " ".join(found.validity.reasons)
    assert "died unheard by the master" in said
    assert "was stopped after" in said
    assert f"{120 - len(requests.requests)} of 120 scheduled requests are missing" in said
    assert sorted(sender.ended for sender in found.senders)[1:] == ["done", "stopped"]
    assert any("is not heard any more" in note for note in notes)
    (lost,) = tmp_path.glob("*.rows")
    assert told.rstrip().endswith(f"a load worker died by SIGKILL; the records the master did not get are kept in {lost}")
    assert {r.index for r in shards.read_rows(lost)}.isdisjoint(r.index for r in requests.requests)


@pytest.mark.e2e
def test_keys_do_not_travel_and_a_worker_without_its_own_is_named(tmp_path: Path) -> None:
    port = free_port()
    with serving() as server, helping(port, tmp_path, key="") as worker:
        alone = Hosts(expect_workers=1, bind="127.0.0.1", port=port, wait_s=60)
        with pytest.raises(MeasurementFailed, match=r"worker 1 on .* was given no headers: keys do not travel"):
            loadtest.run(led(server.url, port, hosts=alone, headers=(("X-Key", "of the master"),)))
        out, err = worker.communicate(timeout=20)
    assert (worker.returncode, "was given no headers" in err) == (5, True), err
    assert "of the master" not in out + err
    assert server.ledger == []


@pytest.mark.e2e
def test_a_port_that_is_taken_and_workers_that_never_come_are_named() -> None:
    with serving() as server, socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadInput, match=r"cannot listen for workers on 127\.0\.0\.1"):
            loadtest.run(led(server.url, taken.getsockname()[1]))
        nobody = Hosts(expect_workers=2, bind="127.0.0.1", port=free_port(), wait_s=0.2)
        with pytest.raises(MeasurementFailed, match=r"not all workers reported within 0\.2 s: 0 of 2 are here"):
            loadtest.run(led(server.url, 0, hosts=nobody))


# ---------------------------------------------------------------- Kubernetes

WORDS = ["http://vllm.prod:8000", "--qps", "200", "--duration", "60s", "--tenant", "a=50%@1/1", "--tenant", "b=50%@1/1", "--no-stream"]


def manifest(words: list[str], **more: Any) -> manifests.Run:
    usual: dict[str, Any] = {"target": words[0], "name": None, "image": "mlsys-bench:1.0", "workers": 3, "lasts_s": 90.0}
    return manifests.run(words, **{**usual, **more})


def test_manifests_of_a_run_are_what_kubernetes_reads(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("time,prompt_tokens,output_tokens\n0,1,1\n")
    run = manifest([*WORDS, "--trace", str(tmp_path / "trace.csv"), "--auth-file", "token.txt"])
    found = manifests.documents(run)
    assert [line for document in found for line in manifest_schemas.wrong(document, manifest_schemas.schema_of(document))] == []
    assert [document["kind"] for document in found] == ["ConfigMap", "ConfigMap", "Service", "Job", "Job"]
    options_map, files, service, master, workers = found
    assert options_map["data"]["qps"] == "200"
    assert (options_map["data"]["tenant"], options_map["data"]["tenant-2"]) == ("a=50%@1/1", "b=50%@1/1")
    assert files["data"]["trace.csv"].startswith("time,")
    assert (workers["spec"]["completions"], workers["spec"]["parallelism"], workers["spec"]["completionMode"]) == (3, 3, "Indexed")
    pod = master["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items(), "the Service finds the master"
    assert not service["spec"]["selector"].items() <= workers["spec"]["template"]["metadata"]["labels"].items(), "and no worker"
    asked = workers["spec"]["template"]["spec"]["containers"][0]["args"]
    assert asked[:3] == ["loadtest", "--worker", f"{service['metadata']['name']}:5557"]


def test_the_pods_run_the_command_that_was_typed() -> None:
    """Put the ConfigMap's values where the container refers to them: the words come out again, and the door takes them."""
    options_map, _, master, _ = manifests.documents(manifest(WORDS))
    container = master["spec"]["template"]["spec"]["containers"][0]
    values = {
        each["name"]: options_map["data"][each["valueFrom"]["configMapKeyRef"]["key"]]
        for each in container["env"]
        if "configMapKeyRef" in each["valueFrom"]
    }
    words = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], word) for word in container["args"]]
    assert words[1 : len(WORDS) + 1] == WORDS
    assert words[len(WORDS) + 1 :] == ["--master", "--expect-workers", "3", "--port", "5557", "--json"]
    assert "PATH" not in values


def test_secrets_are_only_referred_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    typed = ["loadtest", "http://vllm.prod", "--qps", "2", "--api-key-env", "OPENAI_API_KEY", "--export", f"k8s:{tmp_path}"]
    done = CliRunner().invoke(app, typed, catch_exceptions=False)
    assert done.exit_code == 0
    (file,) = tmp_path.iterdir()
    text = file.read_text()
    assert "sk-very-secret" not in text + done.output
    for document in yaml.safe_load_all(text):
        assert manifest_schemas.wrong(document, manifest_schemas.schema_of(document)) == []
        if document["kind"] == "Job":
            env = document["spec"]["template"]["spec"]["containers"][0]["env"]
            reference = {"name": "loadtest-vllm-prod-auth", "key": "OPENAI_API_KEY"}
            assert {"name": "OPENAI_API_KEY", "valueFrom": {"secretKeyRef": reference}} in env


@pytest.mark.parametrize(
    ("words", "more", "says"),
    [
        ([*WORDS, "--header", "X-Key: 1"], {}, "--auth-file"), (WORDS, {"is_secret_url": True}, "password"),
        ([*WORDS, "--dataset", "nowhere.jsonl"], {}, "cannot go into a ConfigMap"),
    ],
)  # fmt: skip
def test_what_cannot_go_into_a_manifest_is_refused(words: list[str], more: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        manifest(words, **more)


def test_a_target_on_this_machine_is_no_target_for_pods(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="which pods cannot reach"):
        spread.exported(f"k8s:{tmp_path}", options("http://127.0.0.1:8000", qps=1), ["http://127.0.0.1:8000"], image=None, workers=None)
    assert not list(tmp_path.iterdir())
