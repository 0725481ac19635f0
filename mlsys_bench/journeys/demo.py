"""demo: the whole loop on this machine. Measure, serve, calibrate, plan, load-test, compare, report."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mlsys_bench import bench, hardware, record, report, serve, units
from mlsys_bench import plan as planner
from mlsys_bench.checked import Causes, Check, Demo
from mlsys_bench.journeys import benchmark, causes, planning, served, verify
from mlsys_bench.types import Bench, LatencyProfile, LoadTest, Plan, Requests

SCENARIO = "demo"
ONLY = ("memory", "gemm", "engine.coldstart")  # the machine's ceilings; the steps are those of the served engine
LOAD_S = 160.0  # of load test; the demo must end within 6 minutes
BUDGET_S = 40.0  # of benchmarks
CALIBRATIONS = 2  # how they differ is what the machine drifts in a minute
STEPS = "steps.csv"  # the log of all steps the engine took, calibration and load test
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
    with stage("bench", "measuring what this machine can do (mlsys bench gpu)"):
        options = bench.Options(device=_device(), model="nano", precisions=("fp32",), only=ONLY, budget_s=BUDGET_S, seed=seed)
        ceilings, _ = benchmark.measure(options, None, quiet)
        if ceilings.stopped:
            raise KeyboardInterrupt
    asked = _ask(seed)
    with contextlib.ExitStack() as stack:
        out.mkdir(parents=True, exist_ok=True)
        log = out / STEPS
        with stage("serve", "starting the engine as an OpenAI-compatible server that logs its steps (mlsys serve --step-log)"):
            server = stack.enter_context(serve.start(_server(asked, str(log))))
            stage.say(server.url)
        with stage("fit", "calibrating it under load, fitting the latency profile (one user, a flood, a ramp)"):
            health = server.health()
            windows = [
                served.calibrate(server.url, log, asked.workload, users=_slots(asked), seed=seed + 10 * (i + 1))
                for i in range(CALIBRATIONS)
            ]
            steps = Bench(measurements=(*ceilings.measurements, *served.cells(health, windows)))
            record.write(files["bench.json"], steps, machine)
            profile = served.fit(health, windows, ceilings)
            record.write(files["profile.json"], profile, machine, [files["bench.json"]])
            stage.say(_profile_line(profile))
        with stage("plan", f"planning replicas and cost for the scenario {SCENARIO!r} (mlsys plan {SCENARIO} --from profile.json)"):
            plan = planning.plan(dataclasses.replace(asked, profiles=(profile,)))
            record.write(files["plan.json"], plan, machine, [files["profile.json"]])
            stage.say(_plan_line(plan))
        rate = units.show_rate(verify.rate_per_replica(plan))
        with stage("loadtest", f"load-testing one replica at {rate} for {LOAD_S:g} s (mlsys loadtest, Locust)"):
            requests_file = files["requests.parquet"]
            seen, requests = verify.trial(plan, server.url, duration_s=LOAD_S, seed=seed + 1, requests_file=requests_file, quiet=quiet)
            record.write(files["loadtest.json"], seen, machine, [requests_file])
            checks = verify.checks(plan, seen)
            why = causes.of(checks, profile, health, log, requests)
            stage.say(_seen_line(seen, why))
    with stage("report", "setting prediction beside measurement (mlsys verify, mlsys report)"):
        result = _result(plan, seen, checks, files, stage.took_s, why)
        record.write(files["demo.json"], result, machine, [p for n, p in files.items() if n not in ("demo.json", "report.html")])
        _report(files, result, requests)
    return result


def _device() -> str:
    return "cpu" if isinstance(hardware.nvml_gpus(), str) else "auto"


def _ask(seed: int) -> planner.Request:
    """Return what is planned: the scenario, once there is a profile."""
    asked = planning.ask(
        scenario=SCENARIO, qps=None, measured=[], model=None, gpu=None, precision=None, slo=None, arrivals=None,
        prompt_tokens=None, output_tokens=None, max_batch=None, headroom=None, term="on-demand", seed=seed,
    )  # fmt: skip
    return dataclasses.replace(asked, gpus=(), precisions=())  # those of the profile


def _slots(asked: planner.Request) -> int:
    return asked.max_batch or planner.MAX_BATCH


def _server(asked: planner.Request, log: str) -> serve.Options:
    """Return one replica of the scenario.  An open loop must see the queue, not its limit."""
    return serve.Options(model="nano", precision="fp32", device=_device(), max_batch=_slots(asked), port=0, queue_limit=1000, step_log=log)


def _profile_line(profile: LatencyProfile) -> str:
    layout = profile.layout
    where = f"{layout.device}, {layout.threads} thread(s)" if layout.threads else layout.device
    return f"{layout.model} {layout.precision} on {where}: residual {units.show_share(profile.residual_log_sd)} of a step"


def _plan_line(plan: Plan) -> str:
    cost = f"{units.show_usd(plan.usd_per_hour)}/h" if plan.usd_per_hour is not None else "unpriced"
    return f"{plan.replicas} replica(s) of one {plan.gpu}, {cost}, {plan.provenance.value}; binds: {plan.binding_constraint}"


def _seen_line(seen: LoadTest, why: Causes | None) -> str:
    others = f"; others had the engine's core for {units.show_share(why.others_share)} of its steps' time" if why else ""
    return f"{seen.ok:,} of {seen.requests:,} requests answered{others}"


def _result(
    plan: Plan, seen: LoadTest, checks: tuple[Check, ...], files: dict[str, Path], took_s: dict[str, float], why: Causes | None
) -> Demo:
    return Demo(
        plan=plan,
        measured=seen,
        prediction_error_percent=_errors(checks),
        checks=checks,
        files={name: str(path) for name, path in files.items()},
        took_s=dict(took_s),
        causes=why,
    )


def _errors(checks: tuple[Check, ...]) -> dict[str, float]:
    return {c.key: round(c.error_percent, 2) for c in checks if c.error_percent is not None}


def _report(files: dict[str, Path], result: Demo, requests: Requests) -> None:
    stored = [n for n in files if n.endswith(".json") and n not in ("plan.json", "loadtest.json")]
    items = [(name, *record.load(files[name])) for name in stored]
    items.append(("requests.parquet", record.envelope(requests, hardware.machine()), requests))
    report.write_html(files["report.html"], items)
