"""demo: the whole loop on this machine. Measure, fit, plan, serve, load-test, compare, report."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mlsys_bench import bench, hardware, latency, record, report, units
from mlsys_bench import plan as planner
from mlsys_bench.journeys import benchmark, planning, verify
from mlsys_bench.types import Check, Demo, LatencyProfile, LoadTest, Plan, Requests

SCENARIO = "demo"
ONLY = ("memory", "gemm", "engine")  # what a profile is fitted to
LOAD_S = 100.0  # of load test; the demo must end within 6 minutes
BUDGET_S = 150.0  # of benchmarks, all launches together
LAUNCHES = 3  # two processes of the same program differ by several percent: one would be a guess
FILES = ("bench.json", "profile.json", "plan.json", "requests.parquet", "loadtest.json", "demo.json", "report.html")


class Stages:
    """Prints what is being done, and remembers how long each stage took."""

    def __init__(self, quiet: bool) -> None:
        self.took_s: dict[str, float] = {}
        self._quiet = quiet

    @contextlib.contextmanager
    def __call__(self, name: str, line: str) -> Iterator[None]:
        """Time one stage."""
        if not self._quiet:
            sys.stdout.write(f"{len(self.took_s) + 1}/6  {line}\n")
            sys.stdout.flush()
        start_s = time.monotonic()
        yield
        self.took_s[name] = round(time.monotonic() - start_s, 2)

    def say(self, line: str) -> None:
        """Print a result under its stage."""
        if not self._quiet:
            sys.stdout.write(f"     {line}\n")
            sys.stdout.flush()


def demo(out: Path, *, seed: int = 0, quiet: bool = False) -> Demo:
    """Run the loop and return its record; every file lands in `out`."""
    stage = Stages(quiet)
    files = {name: out / name for name in FILES}
    machine = hardware.machine()
    with stage("bench", "measuring the built-in engine on this machine (mlsys bench gpu)"):
        options = bench.Options(
            device=_device(), model="nano", precisions=("fp32",), only=ONLY, launches=LAUNCHES, budget_s=BUDGET_S, seed=seed
        )
        measured_steps, _ = benchmark.measure(options, files["bench.json"], quiet)
    with stage("fit", "fitting the latency profile (mlsys fit)"):
        profile = latency.fit(measured_steps)
        record.write(files["profile.json"], profile, machine, [files["bench.json"]])
        stage.say(_profile_line(profile))
    with stage("plan", f"planning replicas and cost for the scenario {SCENARIO!r} (mlsys plan {SCENARIO} --from profile.json)"):
        plan = planning.plan(_ask(files["profile.json"], seed))
        record.write(files["plan.json"], plan, machine, [files["profile.json"]])
        stage.say(_plan_line(plan))
    with stage("serve", "starting the engine as an OpenAI-compatible server (mlsys serve)"), contextlib.ExitStack() as stack:
        url = stack.enter_context(verify.replica(plan))
        stage.say(url)
        running = stack.pop_all()
    rate = units.show_rate(verify.rate_per_replica(plan))
    with running, stage("loadtest", f"load-testing one replica at {rate} for {LOAD_S:g} s (mlsys loadtest, Locust)"):
        seen, requests = verify.trial(plan, url, duration_s=LOAD_S, seed=seed + 1, requests_file=files["requests.parquet"], quiet=quiet)
        record.write(files["loadtest.json"], seen, machine, [files["requests.parquet"]])
    with stage("report", "setting prediction beside measurement (mlsys verify, mlsys report)"):
        result = _result(plan, seen, files, stage.took_s)
        record.write(files["demo.json"], result, machine, [p for n, p in files.items() if n not in ("demo.json", "report.html")])
        _report(files, result, requests)
    return result


def _device() -> str:
    return "cpu" if isinstance(hardware.nvml_gpus(), str) else "auto"


def _ask(profile: Path, seed: int) -> planner.Request:
    return planning.ask(
        scenario=SCENARIO, qps=None, measured=[profile], model=None, gpu=None, precision=None, slo=None, arrivals=None,
        prompt_tokens=None, output_tokens=None, max_batch=None, headroom=None, term="on-demand", seed=seed,
    )  # fmt: skip


def _profile_line(profile: LatencyProfile) -> str:
    layout = profile.layout
    where = f"{layout.device}, {layout.threads} thread(s)" if layout.threads else layout.device
    return f"{layout.model} {layout.precision} on {where}: residual {units.show_share(profile.residual_log_sd)} of a step"


def _plan_line(plan: Plan) -> str:
    cost = f"{units.show_usd(plan.usd_per_hour)}/h" if plan.usd_per_hour is not None else "unpriced"
    return f"{plan.replicas} replica(s) of one {plan.gpu}, {cost}, {plan.provenance.value}; binds: {plan.binding_constraint}"


def _result(plan: Plan, seen: LoadTest, files: dict[str, Path], took_s: dict[str, float]) -> Demo:
    checks = verify.checks(plan, seen)
    return Demo(
        plan=plan,
        measured=seen,
        prediction_error_percent=_errors(checks),
        checks=checks,
        files={name: str(path) for name, path in files.items()},
        took_s=dict(took_s),
    )


def _errors(checks: tuple[Check, ...]) -> dict[str, float]:
    return {c.key: round(c.error_percent, 2) for c in checks if c.error_percent is not None}


def _report(files: dict[str, Path], result: Demo, requests: Requests) -> None:
    stored = [n for n in files if n.endswith(".json") and n not in ("plan.json", "loadtest.json")]
    items = [(name, *record.load(files[name])) for name in stored]
    items.append(("requests.parquet", record.envelope(requests, hardware.machine()), requests))
    report.write_html(files["report.html"], items)
