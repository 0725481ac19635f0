"""loadtest: from options as typed to records."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlsys_bench import errors, hardware, loadtest, record, report, slo, summary, units, workload
from mlsys_bench.errors import INTERRUPTED, BadInput, NothingYet, RecordError
from mlsys_bench.journeys import asking, dry
from mlsys_bench.journeys.progress import Line
from mlsys_bench.loadtest import endpoints
from mlsys_bench.loadtest.auth import Headers
from mlsys_bench.loadtest.client import Client
from mlsys_bench.loadtest.form import Form
from mlsys_bench.loadtest.mlperf import Scenario
from mlsys_bench.loadtest.payloads import think as think_law
from mlsys_bench.loadtests import LoadTests
from mlsys_bench.report import rows
from mlsys_bench.types import SLO, Lengths, LoadTest, Requests

_NO_TRACE, _NOTHING_MORE = asking.Traced(), asking.Carried()


def options(
    *,
    target: str,
    qps: float | None,
    users: int | None,
    traced: asking.Traced = _NO_TRACE,
    carried: asking.Carried = _NOTHING_MORE,
    preset: str | None = None,
    requests: int | None = None,
    think: str | None = None,
    arrivals: str | None,
    prompt_tokens: str | None,
    output_tokens: str | None,
    model: str | None,
    endpoint: str,
    duration: str | None,
    warmup: str,
    timeout: str,
    slo: str | None,
    seed: int,
    metrics: Sequence[str] | None = None,
    form: Form | None = None,
    client: Client | None = None,
    headers: Headers = (),
    locustfile: Path | None = None,
    calibration: Path | None = None,
    busy_poll: bool = False,
) -> loadtest.Options:
    """Return a checked load test."""
    scenario = asking.preset(preset, qps=qps, users=users, trace=traced.file, arrivals=arrivals, slo=slo)
    asking.check(traced, carried, users, arrivals=arrivals, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    arrive = _arrivals(qps, users, asking.replayed(traced, qps, duration), scenario, requests, arrivals)
    if think is not None and arrive["users"] is None:
        raise BadInput("--think belongs to --users N: in an open loop requests follow the schedule")
    if endpoint not in ("auto", *endpoints.kinds()):
        raise errors.unknown("endpoint", endpoint, ["auto", *endpoints.kinds()])
    return loadtest.Options(
        url=target,
        **arrive,
        think=think_law.parse(think) if think else None,
        preset=scenario,
        at_once=scenario.samples if scenario and arrive["users"] else 1,
        arrivals=arrivals or "poisson",
        content=asking.carried(carried, output_given=output_tokens is not None, seed=seed, prompt=prompt_tokens, output=output_tokens),
        prompt_tokens=workload.parse_lengths(prompt_tokens) if prompt_tokens else Lengths(mean=128),
        output_tokens=workload.parse_lengths(output_tokens) if output_tokens else Lengths(mean=32),
        model=model,
        endpoint=endpoint,
        form=form or Form(),
        client=client or Client(),
        headers=headers,
        locustfile=locustfile,
        calibration=calibration,
        duration_s=asking.duration_s(duration, arrivals, scenario),
        warmup_s=(0.0 if scenario else None) if warmup == "auto" else units.seconds(warmup, "--warmup"),
        timeout_s=units.seconds(timeout, "--timeout"),
        slo=_slo(slo),
        seed=seed,
        busy_poll=busy_poll,
        metrics=tuple(metrics or ("auto",)),
    )


def target(given: str | None) -> str:
    """Return what to load.  Raises BadInput where nothing was named."""
    if given is None:
        raise BadInput("say what to load: mlsys loadtest URL, e.g. http://127.0.0.1:8000")
    return given


def _slo(text: str | None) -> SLO | None:
    return slo.parse(text) if text else None


def _arrivals(
    qps: float | None,
    users: int | None,
    trace: workload.Schedule | None,
    scenario: Scenario | None,
    requests: int | None,
    arrivals: str | None,
) -> dict[str, Any]:
    """Return the one of qps, users, trace and offline that says how requests arrive."""
    offline = scenario is not None and scenario.name == "offline"
    if requests is not None and not offline:
        raise BadInput("--requests belongs to --preset offline: other runs last a --duration")
    if scenario is not None and scenario.name in ("single-stream", "multi-stream"):
        users = 1
    if trace is None and qps is None and users is None and arrivals:
        qps = workload.written_rate_per_s(arrivals)  # a series has a rate of its own
    if not offline and [qps if trace is None else None, users, trace].count(None) != 2:
        raise BadInput("give exactly one of --qps R (open loop), --users N (closed loop), --trace FILE and --preset NAME")
    return {
        "qps": None if qps is None or trace is not None else workload.checked_rate(qps),
        "users": users,
        "trace": trace,
        "offline": (requests or scenario.samples) if scenario is not None and offline else None,
    }


def dry_run(plan: loadtest.Options, *, out: Path | None = None, as_json: bool = False) -> str:
    """Return the schedule as text or JSON, and write it to a file when asked: JSON, or a CSV that `--trace` replays."""
    drawn = loadtest.dry_run(plan)
    if out is not None:
        dry.write(plan, drawn, out)
    return dry.as_json(plan, drawn) if as_json else dry.text(plan, drawn, in_full=not sys.stdout.isatty())


def run(
    plan: loadtest.Options, *, out: Path | None, quiet: bool = False, repeats: int = 1, csv: Path | None = None, png: Path | None = None
) -> LoadTest | LoadTests:
    """Run the load test, several times when asked, with a live line; write what was asked for.

    `out` holds the summary, with every request beside it (.parquet); one that ends in .csv is a table of the requests instead.
    Repeats take the seeds after the first; Ctrl-C ends them all, and what was measured is kept.
    """
    if out is not None and out.suffix == ".csv":
        out, csv = None, out
    _check(plan, repeats, out, csv, png)
    results: list[LoadTest] = []
    requests: list[Requests] = []
    line = Line(quiet)
    try:
        for at in range(repeats):
            label = f"run {at + 1} of {repeats}  " if repeats > 1 else ""
            once = dataclasses.replace(plan, seed=plan.seed + at, requests_file=record.requests_beside(out, at if repeats > 1 else None))
            try:
                result, seen = loadtest.run(once, lambda p, label=label: line.show(label + progress(p)), line.note)  # type: ignore[misc]
            except NothingYet as error:  # the runs before it stand
                if not results:
                    raise
                line.note(f"run {at + 1} {error}")
                break
            results.append(result)
            requests.append(seen)
            if result.validity.is_stopped:
                break
    finally:
        line.clear()
        found = _together(results, plan.seed, repeats)
        if found is not None:
            _keep(found, requests, out, csv, png, quiet)
    assert found is not None
    return found


def _check(plan: loadtest.Options, repeats: int, out: Path | None, csv: Path | None, png: Path | None) -> None:
    """Raise for what would only be found after minutes of measuring."""
    if repeats > 1 and plan.hosts is not None:
        raise BadInput("--repeats runs on this machine: workers of other hosts end with their run; start master and workers for each run")
    for path in (csv, png):
        if path is not None:
            record.check_writable(path)
    record.requests_beside(out)
    if png is not None:
        report.check_pictures(png)


def _together(results: Sequence[LoadTest], seed: int, repeats: int) -> LoadTest | LoadTests | None:
    if not results or repeats == 1:
        return results[0] if results else None
    return summary.repeated(results, range(seed, seed + len(results)))


def _keep(
    found: LoadTest | LoadTests, requests: Sequence[Requests], out: Path | None, csv: Path | None, png: Path | None, quiet: bool
) -> None:
    """Write what was asked for; what a full disk refuses is at least told, before the error goes on."""
    try:
        _write(found, requests, out, csv, png)
    except RecordError:
        machine = hardware.machine()
        if quiet:
            sys.stdout.write(record.dumps(found, machine) + "\n")
        else:
            report.print_all([("", record.envelope(found, machine), found)])
        raise


def _write(found: LoadTest | LoadTests, requests: Sequence[Requests], out: Path | None, csv: Path | None, png: Path | None) -> None:
    if out is not None:
        files = [found.requests_file] if isinstance(found, LoadTest) else [run.requests_file for run in found.runs]
        record.write(out, found, hardware.machine(), [Path(file) for file in files if file])
    for at, each in enumerate(requests if csv is not None else ()):
        assert csv is not None
        rows.write_csv(csv if len(requests) == 1 else csv.with_suffix(f".{at + 1}.csv"), each)
    if png is not None:
        report.write_png(png, [("", record.envelope(found, hardware.machine()), found)])


def progress(p: loadtest.Progress) -> str:
    """Print how a run stands."""
    return (
        f"{p.t_s:6.1f} s  sent {p.sent}  ok {p.ok}  failed {p.failed}  in flight {p.in_flight}  "
        f"{units.show_rate(p.sent_per_s)}  latest by {units.show_s(p.lateness_s)}"
        f"  client {units.show_share(p.cpu_share)} of a core"
    )


def exit_status(result: LoadTest | LoadTests) -> int:
    """Return 1 when a limit of the SLO is missed, 3 when the run cannot be believed or a limit cannot be decided, else 0; 130 for Ctrl-C.

    Of repeated runs that of the worst: missed in any, else undecided in any.  A run that was ended by hand and would have been 0 or 3 is
    130: what it was asked to find out it did not; a limit that was missed is missed.
    """
    if isinstance(result, LoadTests):
        statuses = {exit_status(run) for run in result.runs}
        return 1 if 1 in statuses else max(statuses)
    if any(met is False for met in result.slo_met.values()):
        return 1
    if result.validity.is_stopped:
        return INTERRUPTED
    if result.validity.verdict == "invalid" or any(met is None for met in result.slo_met.values()):
        return 3
    return 0
