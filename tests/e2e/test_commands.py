"""Every command of docs/commands.md, run as a process: what it prints, what it writes, how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mlsys_bench import __version__, record
from mlsys_bench.checked import Verification
from mlsys_bench.journeys import verify
from mlsys_bench.looked_up import Catalog, Doctor
from mlsys_bench.serve import ServerProcess
from mlsys_bench.types import Bench, LatencyProfile, LoadTest, Plan, Requests, Scenario, Workload
from mlsys_bench.verdicts import Verdict

if TYPE_CHECKING:
    from conftest import Cli

pytestmark = pytest.mark.e2e

COMMANDS = (
    "demo", "doctor", "bench gpu", "bench list", "bench scenario", "serve", "loadtest", "workload", "fit", "plan", "simulate", "verify",
    "claims", "cost", "gate run", "gate compare", "gate calibrate", "gate history", "backtest queueing", "backtest llm", "backtest plan",
    "backtest gate", "report", "scenario list", "scenario show", "scenario schema", "scenario check",
    "catalog gpus", "catalog models", "catalog prices", "catalog apis",
)  # fmt: skip
SIZE = ("--model", "llama-3-8b", "--gpu", "h100-sxm,l4", "--qps", "5", "--slo", "ttft_p95<1s,tpot_p95<80ms")
SMALL = ("--prompt-tokens", "40", "--output-tokens", "6")
PROMISED = {
    "replicas", "gpus", "gpu", "devices_per_replica", "usd_per_hour", "usd_per_month", "usd_per_million_tokens", "utilisation",
    "binding_constraint", "headroom", "provenance", "predicted", "intervals", "alternatives", "fleet",
}  # fmt: skip
LATENCIES = {f"{metric}_{stat}_s" for metric in ("ttft", "tpot", "e2e") for stat in ("p50", "p95", "p99")}
TRACES = Path(__file__).parents[3] / "shared/data/traces"
PATIENCE_S = 120.0


def printed(said: subprocess.CompletedProcess[str], kind: type, *, status: int = 0) -> record.Record:
    """Return the one record that a command printed with --json: nothing before it, nothing after it, nothing on stderr."""
    assert (said.returncode, said.stderr) == (status, "")
    _, value = record.loads(said.stdout, "standard output")
    assert isinstance(value, kind)
    return value


# ---------------------------------------------------------------- what there is


def test_every_command_has_help(cli_in: Callable[[Path], Cli], tmp_path: Path) -> None:
    mlsys = cli_in(tmp_path)
    said = dict(zip(COMMANDS, mlsys.warm([*command.split(), "--help"] for command in COMMANDS), strict=True))
    assert {command: one.stderr for command, one in said.items() if one.returncode or one.stderr} == {}
    assert all(one.stdout.startswith(f"Usage: mlsys {command} ") for command, one in said.items())


def test_version_and_a_bare_mlsys(mlsys: Cli) -> None:
    version, bare = mlsys("--version"), mlsys()
    assert (version.returncode, version.stdout, version.stderr) == (0, f"mlsys {__version__}\n", "")
    assert (bare.returncode, bare.stderr) == (2, "")
    assert all(f"  {command.split()[0]} " in bare.stdout for command in COMMANDS)


def test_doctor_says_what_works_here(mlsys: Cli) -> None:
    found = printed(mlsys("doctor", "--json"), Doctor)
    assert isinstance(found, Doctor)
    assert {a.name for a in found.abilities} >= {"mlsys", "processor", "memory", "GPU"}
    assert all(a.cure for a in found.abilities if a.name.startswith("extra") and not a.works)


@pytest.mark.parametrize("catalog", ["gpus", "models", "prices", "apis"])
def test_catalogues_name_source_and_date(mlsys: Cli, catalog: str) -> None:
    found = printed(mlsys("catalog", catalog, "--json"), Catalog)
    assert isinstance(found, Catalog)
    assert found.rows
    assert all(row["source"] and row["date"] for row in found.rows)


def test_scenarios_are_listed_and_shown(mlsys: Cli) -> None:
    listed = mlsys("scenario", "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert [line.split()[0] for line in listed.stdout.splitlines()] == [
        "chat-and-batch", "chat-first", "chat-fleet", "demo", "embed-service", "llm-cascade", "llm-chat", "rag-support-bot", "recsys-feed",
    ]  # fmt: skip
    shown = printed(mlsys("scenario", "show", "llm-chat", "--json"), Scenario)
    assert isinstance(shown, Scenario)
    assert shown.name == "llm-chat"


def test_benchmarks_are_listed(mlsys: Cli) -> None:
    listed = mlsys("bench", "list")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert {"memory.read", "gemm", "engine.step"} <= {line.split()[0] for line in listed.stdout.splitlines() if line}


# ---------------------------------------------------------------- measure, fit, plan


@pytest.mark.parametrize(("name", "kind"), [("bench", Bench), ("profile", LatencyProfile), ("plan", Plan)])
def test_json_prints_what_the_file_holds(records: Path, name: str, kind: type) -> None:
    _, out = record.loads((records / f"{name}.printed").read_text(), "standard output")
    _, kept = record.load(records / f"{name}.json")
    assert out == kept
    assert isinstance(kept, kind)


def test_a_record_names_the_files_it_was_made_from(records: Path) -> None:
    fitted, _ = record.load(records / "profile.json")
    planned, _ = record.load(records / "plan.json")
    assert fitted.inputs == {"bench.json": record.digest(records / "bench.json")}
    assert planned.inputs == {"profile.json": record.digest(records / "profile.json")}


def test_a_plan_from_the_catalogue_holds_all_that_is_promised(mlsys: Cli) -> None:
    said = mlsys("plan", *SIZE, "-o", "plan.json", "--html", "plan.html", "--md", "plan.md")
    assert (said.returncode, said.stderr) == (0, "")
    stored = json.loads((mlsys.folder / "plan.json").read_text())
    assert stored.keys() >= PROMISED
    assert stored["predicted"].keys() >= LATENCIES
    assert all(low <= high for low, high in stored["intervals"].values())
    plan = record.read(mlsys.folder / "plan.json", Plan)
    assert plan.gpu is not None
    assert plan.gpus == plan.replicas * plan.devices_per_replica
    assert plan.provenance == "roofline"
    assert plan.gpu in said.stdout
    assert "<html" in (mlsys.folder / "plan.html").read_text()
    assert plan.gpu in (mlsys.folder / "plan.md").read_text()


def test_a_plan_from_a_bench_file_is_the_plan_from_its_profile(mlsys: Cli, records: Path) -> None:
    traffic = ("--qps", "2", "--prompt-tokens", "60", "--output-tokens", "12", "--slo", "ttft_p95<5s,tpot_p95<2s")
    fresh = printed(mlsys("plan", "--from", records / "bench.json", *traffic, "--json"), Plan)
    assert isinstance(fresh, Plan)
    assert fresh == record.read(records / "plan.json", Plan)
    assert fresh.profile.provenance == "calibrated"
    assert fresh.model == "nano"


def test_simulate_writes_the_summary_and_every_request(mlsys: Cli, records: Path) -> None:
    said = mlsys("simulate", "--from", records / "profile.json", "--qps", "3", *SMALL, "--duration", "60s", "-o", "run.json", "--json")
    result = printed(said, LoadTest)
    assert isinstance(result, LoadTest)
    requests = record.read(mlsys.folder / "run.parquet", Requests)
    assert record.read(mlsys.folder / "run.json", LoadTest) == result
    assert result.source == "simulation"
    assert sum(r.in_window for r in requests.requests) == result.requests > 0


@pytest.mark.skipif(not TRACES.exists(), reason="the shared traces are not beside this checkout")
def test_workload_describes_a_recorded_trace(mlsys: Cli) -> None:
    """The Azure conversation trace of 2023: 19,366 requests within an hour, 1,155 tokens in and 211 out on average."""
    found = printed(mlsys("workload", TRACES / "azure_llm_2023_conv.csv", "--json", "-o", "traffic.json"), Workload)
    assert isinstance(found, Workload)
    assert found == record.read(mlsys.folder / "traffic.json", Workload)
    assert round(found.prompt_tokens.mean) == 1155
    assert round(found.output_tokens.mean) == 211
    assert 5 < found.rate_per_s < 6


def test_a_file_compared_with_itself_is_never_pass_or_fail(mlsys: Cli, records: Path) -> None:
    """One launch a side is no evidence: at most suspect."""
    said = mlsys("gate", "compare", records / "bench.json", records / "bench.json", "--json")
    verdict = printed(said, Verdict, status=3)
    assert isinstance(verdict, Verdict)
    assert verdict.verdict in ("inconclusive", "suspect")
    assert {f.verdict for f in verdict.findings} <= {"inconclusive", "suspect"}


def test_reports_show_any_records_together(mlsys: Cli, records: Path) -> None:
    files = [records / f"{name}.json" for name in ("bench", "profile", "plan")]
    text = mlsys("report", *files)
    assert (text.returncode, text.stderr) == (0, "")
    assert "nano" in text.stdout
    assert "\x1b" not in text.stdout
    written = mlsys("report", *files, "--html", "all.html", "--md", "all.md")
    assert (written.returncode, written.stdout, written.stderr) == (0, "", "")
    html = (mlsys.folder / "all.html").read_text()
    assert "plan.json" in html
    assert not re.search(r'(?:src|href)="https?://', html), "one self-contained file"
    assert "plan.json" in (mlsys.folder / "all.md").read_text()


# ---------------------------------------------------------------- serve, load-test, verify


@pytest.mark.measures
def test_an_open_loop_load_test_keeps_every_request(mlsys: Cli, server: str) -> None:
    said = mlsys("loadtest", server, "--qps", "10", "--duration", "2s", "--warmup", "0s", *SMALL, "-o", "run.json", "--json")
    result = printed(said, LoadTest)
    assert isinstance(result, LoadTest)
    requests = record.read(mlsys.folder / "run.parquet", Requests).requests
    assert result == record.read(mlsys.folder / "run.json", LoadTest)
    assert result.offered_rate_per_s == 10
    assert result.ok == result.requests == len(requests)
    assert all(r.output_tokens == 6 and r.sent_s is not None and r.sent_s >= r.scheduled_s for r in requests)
    assert sorted(p.name for p in mlsys.folder.iterdir()) == ["run.json", "run.parquet"]


@pytest.mark.measures
def test_a_closed_loop_has_no_more_requests_at_once_than_users_and_a_missed_limit_is_exit_1(mlsys: Cli, server: str) -> None:
    """No machine answers in a nanosecond."""
    said = mlsys("loadtest", server, "--users", "2", "--duration", "2s", *SMALL, "--slo", "ttft_mean<1ns", "-o", "run.json")
    assert (said.returncode, said.stderr) == (1, "found completions at /v1/completions, model nano, streamed\n")
    requests = record.read(mlsys.folder / "run.parquet", Requests).requests
    changes = sorted((t, step) for r in requests if r.done_s is not None for t, step in ((r.scheduled_s, 1), (r.done_s, -1)))
    at_once, most = 0, 0
    for _, step in changes:
        at_once += step
        most = max(most, at_once)
    assert most == 2
    result = record.read(mlsys.folder / "run.json", LoadTest)
    assert (result.offered_rate_per_s, result.slo_met) == (None, {"ttft_mean": False})


def test_a_dry_run_prints_the_schedule_and_sends_nothing(mlsys: Cli) -> None:
    said = mlsys("loadtest", "http://127.0.0.1:9", "--qps", "50", "--duration", "4s", "--prompt-tokens", "40", "--dry-run")
    assert (said.returncode, said.stderr) == (0, "")
    table, figures = said.stdout.split("\n\n")
    header, *rows = table.splitlines()
    assert header.split() == ["scheduled_s", "prompt_tokens", "output_tokens"]
    assert figures.startswith(f"{len(rows)} arrivals in 4.00 s")
    assert abs(len(rows) - 200) < 5 * 200**0.5, "a Poisson count of mean 200"
    assert {row.split()[1] for row in rows} == {"40"}


def test_verify_sets_every_prediction_beside_a_measurement(mlsys: Cli, server: str, records: Path) -> None:
    said = mlsys("verify", records / "plan.json", server, "--duration", "4s", "-o", "verify.json", "--json")
    assert said.returncode in (0, 1, 3)
    result = printed(said, Verification, status=said.returncode)
    assert isinstance(result, Verification)
    assert result == record.read(mlsys.folder / "verify.json", Verification)
    assert {check.key for check in result.checks} >= LATENCIES
    believed = result.measured.validity.verdict != "invalid"
    assert said.returncode == (3 if not believed else 0 if result.holds else 1)
    assert result.causes is None, "of a server that was there before nobody sees the steps"


def test_verify_with_a_replica_of_its_own_says_where_errors_come_from(mlsys: Cli, records: Path) -> None:
    said = mlsys("verify", records / "plan.json", "--duration", "8s", "--json")
    result = printed(said, Verification, status=said.returncode)
    assert isinstance(result, Verification)
    assert result.causes is not None
    errors = {check.key: check.error_percent for check in result.checks}
    assert result.causes.figures
    for each in result.causes.figures:
        assert each.error_percent == errors[each.key]
        assert each.arrivals_percent + each.steps_percent + each.rest_percent == pytest.approx(each.error_percent)


def test_a_replica_that_dies_after_its_load_test_does_not_take_the_record_with_it(monkeypatch: pytest.MonkeyPatch, records: Path) -> None:
    replica, trial = verify.replica, verify.trial
    servers: list[ServerProcess] = []

    @contextlib.contextmanager
    def seen(plan: Plan, log: Path) -> Iterator[ServerProcess]:
        with replica(plan, log) as server:
            servers.append(server)
            yield server

    def last(*args: Any, **options: Any) -> tuple[LoadTest, Requests]:
        found = trial(*args, **options)
        servers[0].stop()
        return found

    monkeypatch.setattr(verify, "replica", seen)
    monkeypatch.setattr(verify, "trial", last)
    result = verify.verify(records / "plan.json", None, duration="8s", seed=0, out=None, quiet=True)
    assert result.measured.ok > 0
    assert result.causes is not None, "the log was written before"
    assert servers[0].process.poll() is not None


# ---------------------------------------------------------------- signals and terminals


def run_on_a_terminal(mlsys: Cli, *args: object, until: str) -> tuple[subprocess.Popen[str], str]:
    """Run a command whose stderr is a terminal, interrupt it once that shows `until`, and return it, ended, with all it showed there."""
    ours, theirs = pty.openpty()
    process = mlsys.start(*args, stderr=theirs)
    os.close(theirs)
    shown = ""
    has_interrupted = False
    while True:
        try:
            data = os.read(ours, 4096)
        except OSError:  # Linux's word for: no process holds the terminal any more
            break
        shown += data.decode(errors="replace")
        if not data:
            break
        if not has_interrupted and re.search(until, shown):
            process.send_signal(signal.SIGINT)
            has_interrupted = True
    process.communicate(timeout=PATIENCE_S)
    os.close(ours)
    assert has_interrupted, shown
    return process, shown


def test_an_interrupted_load_test_keeps_its_records_and_leaves_no_process(mlsys: Cli, server: str) -> None:
    command = ("loadtest", server, "--qps", "20", "--duration", "300s", "--warmup", "0s", *SMALL, "-o", "run.json")
    process, shown = run_on_a_terminal(mlsys, *command, until=r"ok (?:\d\d|[5-9])")
    assert process.returncode == 130, shown
    assert "Traceback" not in shown
    result = record.read(mlsys.folder / "run.json", LoadTest)
    requests = record.read(mlsys.folder / "run.parquet", Requests).requests
    assert len(requests) >= result.ok >= 5
    assert result.duration_s < 300
    assert any("stopped by hand" in reason for reason in result.validity.reasons)
    assert mlsys.alive() == []
    assert sorted(p.name for p in mlsys.folder.iterdir()) == ["run.json", "run.parquet"]


def test_an_interrupted_bench_keeps_what_was_measured_and_leaves_no_process(mlsys: Cli) -> None:
    command = ("bench", "gpu", "--only", "memory,gemm", "--budget", "300s", "-o", "bench.json")
    process, shown = run_on_a_terminal(mlsys, *command, until=r"memory\.|gemm")
    assert process.returncode == 130, shown
    assert "Traceback" not in shown
    found = record.read(mlsys.folder / "bench.json", Bench)
    measurements = found.measurements
    assert found.stopped == "stopped by hand in launch 1 of 1"
    assert any(m.launches for m in measurements)
    assert all(m.skipped == "interrupted" for m in measurements if not m.launches)
    assert mlsys.alive() == []


def test_an_interrupted_server_ends_in_order_and_leaves_no_process(mlsys: Cli) -> None:
    process = mlsys.start("serve", "nano", "--port", "0")
    assert process.stdout is not None
    assert " at http://" in process.stdout.readline()
    assert len(mlsys.alive()) == 2, "the HTTP process and its engine"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (0, "", "")
    assert mlsys.alive() == []
