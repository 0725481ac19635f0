"""Faults end to end: each request is counted by what became of it, the run ends in time, records are saved, no process stays."""

from __future__ import annotations

import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from mlsys_bench import loadtest, record
from mlsys_bench.errors import BadInput, MeasurementFailed
from mlsys_bench.loadtest.payloads.think import Think
from mlsys_bench.loadtest.truth import Behaviour
from mlsys_bench.loadtest.truth.client import serving as truth
from mlsys_bench.types import Lengths, Requests
from tests.fault_server import EXPECTED, serving

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
needs_proc = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs Linux's /proc")
needs_epoll = pytest.mark.skipif(sys.platform != "linux", reason="the truth server needs epoll")


def options(url: str, **more: object) -> loadtest.Options:
    usual: dict[str, object] = {
        "arrivals": "constant", "duration_s": 1.0, "warmup_s": 0.0, "prompt_tokens": Lengths(mean=20), "output_tokens": Lengths(mean=3),
        "timeout_s": 5.0,
    }  # fmt: skip
    return loadtest.Options(url=url, **{**usual, **more})  # type: ignore[arg-type]


def children() -> set[int]:
    return {int(child) for task in Path("/proc/self/task").iterdir() for child in (task / "children").read_text().split()}


@pytest.mark.e2e
@needs_proc
def test_every_fault_is_counted_by_kind_and_the_command_ends_in_time(tmp_path: Path) -> None:
    """Each kind three times, request by request as the server's ledger has it; the command's status, files and last words are right."""
    kinds = list(EXPECTED)
    out = tmp_path / "run.json"
    with serving(lambda n: kinds[n % len(kinds)]) as server:
        began = time.monotonic()
        command = [sys.executable, "-m", "mlsys_cli", "loadtest", server.url, "--qps", str(3 * len(kinds)), "--arrivals", "constant"]
        lengths = ["--prompt-tokens", "20", "--output-tokens", "3", "--duration", "1s", "--warmup", "0s", "--timeout", "1.5s"]
        done = subprocess.run([*command, *lengths, "-o", str(out), "--json"], capture_output=True, text=True, check=False, timeout=60)
        took_s = time.monotonic() - began
        did = {due: EXPECTED[kind] for due, kind in server.ledger}
    assert done.returncode == 3, done.stderr  # invalid: most of it failed
    assert "Traceback" not in done.stderr
    assert took_s < 50  # 1 s of sending, 1.5 s until the last timeout; the rest is this machine's
    requests = record.read(tmp_path / "run.parquet", Requests)
    assert len(requests.requests) == len(did) == 3 * len(kinds)
    wrong = []
    for r in requests.requests:
        due = min(did, key=lambda d: abs(d - requests.t0_unix_s - r.scheduled_s))
        expected = did.pop(due)
        if r.outcome != expected:
            wrong.append((r.index, kinds[r.index % len(kinds)], expected, r.outcome))
    assert wrong == []
    told = json.loads(out.read_text())
    assert told["errors"] == {kind: 3 * n for kind, n in Counter(EXPECTED.values()).items() if kind != "ok"}
    assert told["ttft_s"]["count"] == 3  # errors are in no latency
    assert told["validity"]["verdict"] == "invalid"
    assert {r.attempt for r in requests.requests} == {1}  # a 429 is not asked again unless retries are on
    assert {r.http_status for r in requests.requests if r.outcome == "rejected"} == {429}
    kept = {kind: [len(r.token_s) for r in requests.requests if kinds[r.index % len(kinds)] == kind] for kind in kinds}
    assert kept["half_a_stream"] == [1, 1, 1]  # what came before the cut
    assert max(kept["reset_in_the_stream"]) <= 1  # a reset also throws away what was not read yet
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "run.parquet"]


@pytest.mark.e2e
@needs_proc
@needs_epoll
def test_a_server_killed_in_mid_run_is_reset_and_then_unreachable(tmp_path: Path) -> None:
    """Streams of 600 ms are in the air when it dies; who comes after finds nobody; the run ends when it should and keeps everything."""
    before = children()
    with truth(Behaviour(ttft_s=0.1, itl_s=0.05, tokens=11)) as server:
        (its_pid,) = children() - before
        asked = options(server.url, qps=40, duration_s=2.5, requests_file=tmp_path / "r.parquet")
        found, requests = loadtest.run(asked, lambda p: os.kill(its_pid, 9) if 1.0 <= p.t_s < 2.0 else None)
        assert children() - before <= {its_pid}
    outcomes = Counter(r.outcome for r in requests.requests)
    assert set(outcomes) == {"ok", "reset", "connect"}
    assert found.requests == len(requests.requests) == 100
    assert min(outcomes.values()) >= 10
    assert found.validity.verdict == "invalid"
    cut = [r for r in requests.requests if r.outcome == "reset" and r.token_s]
    assert cut
    assert all(len(r.token_s) < 11 for r in cut)
    assert record.read(tmp_path / "r.parquet", Requests) == requests
    assert [p.name for p in tmp_path.iterdir()] == ["r.parquet"]


AUTHORITY = """
[ca]
default_ca = own
[own]
database = index
serial = serial
new_certs_dir = .
default_md = sha256
policy = any
[any]
commonName = supplied
[names]
subjectAltName = IP:127.0.0.1
"""


def certificate(folder: Path, years: str) -> ssl.SSLContext:
    """Return a server's side of TLS with a certificate of its own, good in the years 'YYYY-YYYY'."""
    begin, _, end = years.partition("-")
    folder.mkdir()
    for name, text in (("ca.cnf", AUTHORITY), ("index", ""), ("serial", "01\n")):
        (folder / name).write_text(text)
    for command in (
        f"req -new -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN={folder.name} -keyout key.pem -out request.pem",
        f"ca -batch -selfsign -config ca.cnf -in request.pem -keyfile key.pem -extensions names -startdate {begin}0101000000Z "
        f"-enddate {end}0101000000Z -notext -out cert.pem",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True, cwd=folder)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return tls


@pytest.mark.e2e
@needs_openssl
def test_a_certificate_that_expired_ends_the_run_before_it_begins_or_is_counted_when_it_expires_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, expired = certificate(tmp_path / "good", "2020-2060"), certificate(tmp_path / "expired", "2020-2021")
    trusted = tmp_path / "both.pem"
    trusted.write_text("".join((tmp_path / which / "cert.pem").read_text() for which in ("good", "expired")))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    with (
        serving(lambda _: "ok", tls=expired) as server,
        pytest.raises(BadInput, match="TLS certificate is refused: certificate has expired"),
    ):
        loadtest.run(options(server.url, qps=10))
    with serving(lambda _: "ok", tls=good) as server:

        def renew_badly(n: int) -> str:
            """From the tenth answer on, whoever opens a connection is shown the certificate that expired; every answer closes its own."""
            server.tls = expired if n >= 10 else good
            return "hang_up" if n >= 10 else "ok"

        server.plan = renew_badly
        found, requests = loadtest.run(options(server.url, users=3, think=Think(mean_s=0.02), duration_s=1.0))
    outcomes = Counter(r.outcome for r in requests.requests)
    assert outcomes["ok"] == 10
    assert set(outcomes) == {"ok", "reset", "connect"}
    assert found.errors["connect"] >= 3
    assert outcomes["reset"] <= 3 + 8  # those on connections of before: the users' own and a few spare ones


@pytest.mark.e2e
@needs_proc
def test_a_name_that_means_nothing_is_one_line_and_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The resolver says no; a name with an empty label is refused before any resolver is asked."""
    before = children()
    with pytest.raises(BadInput, match="cannot be reached") as caught:
        loadtest.run(options("http://a..b:9", qps=5, requests_file=tmp_path / "r.parquet"))
    assert "\n" not in str(caught.value)

    def nobody(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    with pytest.raises(BadInput, match="Name or service not known") as caught:
        loadtest.run(options("http://nobody.test:9", qps=5, requests_file=tmp_path / "r.parquet"))
    assert "\n" not in str(caught.value)
    assert children() <= before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.e2e
def test_a_server_that_only_fails_is_no_measurement_and_what_came_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "r.parquet"
    with (
        serving(lambda n: "garbage" if n % 2 else "status_429") as server,
        pytest.raises(MeasurementFailed, match=r"none of 20 .* answered"),
    ):
        loadtest.run(options(server.url, qps=40, duration_s=0.5, requests_file=file))
    assert Counter(r.outcome for r in record.read(file, Requests).requests) == {"rejected": 10, "bad_response": 10}
