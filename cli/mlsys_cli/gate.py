"""Commands that guard a build: gate run, compare, calibrate, history."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli import ci, gate_history
from mlsys_cli import gate_sides as sides
from mlsys_cli.grouped import grouped
from mlsys_cli.headings import GATE_RUN
from mlsys_cli.lean import Door
from mlsys_cli.options import Arrivals, AsJson, Html, Markdown, Out, OutputTokens, PromptTokens, Qps, Seed, Slo
from mlsys_cli.show import show, writable

gate_app = Door(help="Fail a build on a real regression and on nothing else.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to the door."""
    gate_app.add_typer(gate_history.history_app, name="history")
    app.add_typer(gate_app, name="gate")


@gate_app.command("compare")
def compare(
    base: Annotated[Path, typer.Argument(help="Record, or result of another tool, of the baseline; a folder: a launch a file.")],
    cand: Annotated[Path | None, typer.Argument(help="The same of the candidate; none where BASE is a record of gate run.")] = None,
    tolerance: Annotated[
        str | None, typer.Option(help="How much worse is still accepted.  [default: 5%, or as gate run was asked]")
    ] = None,
    policy: sides.PolicyFile = None,
    metric: sides.Metric = None,
    slo: Slo = None,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    junit: ci.Junit = None,
    comment: ci.Comment = None,
    bmf: ci.Bmf = None,
    smaller: ci.Smaller = None,
    bigger: ci.Bigger = None,
    annotations: ci.Annotations = False,
    label: ci.Label = ci.LABEL,
    as_json: AsJson = False,
) -> None:
    """Compare two recorded files, or decide a record of gate run again.  Single launches can be suspect, never guilty."""
    from mlsys_bench import gate
    from mlsys_bench.gate import policy as policies
    from mlsys_bench.journeys import compare as journey

    asked = ci.outputs(junit, comment, bmf, smaller, bigger, annotations, label)
    rules = policies.given(policy, tolerance=tolerance, metrics=metric or (), budgets=[slo] if slo else ())
    with ci.failing(asked):
        if cand is None:
            verdict = journey.again(base, tolerance, rules if policy or metric or slo else None)
        else:
            verdict = journey.compare(base, cand, "5%", rules)
    ci.write(verdict, asked)
    show(verdict, as_json, out, html, md, inputs=journey.files(base, *([cand] if cand else [])))
    raise typer.Exit(gate.exit_status(verdict))


@gate_app.command("run", cls=grouped(GATE_RUN))
def run(
    context: typer.Context,
    base: Annotated[
        str | None, typer.Option(help="Baseline: a git ref, a wheel, '.' for the working tree, or a server's URL.", metavar="REF")
    ] = None,
    cand: Annotated[str | None, typer.Option(help="Candidate, named likewise.", metavar="REF")] = None,
    bench: Annotated[
        str | None, typer.Option(help="Only these benchmarks, e.g. engine.decode,planner.  [default: all]", metavar="NAMES")
    ] = None,
    worker: sides.Worker = None,
    budget: Annotated[
        str | None, typer.Option(help="Time for the whole run.  [default: 90s for each benchmark, 10min for commands, 20 pairs of servers]")
    ] = None,
    tolerance: sides.Tolerance = None,
    policy: sides.PolicyFile = None,
    metric: sides.Metric = None,
    tails: sides.Tails = None,
    counter_tolerance: sides.CounterTolerance = None,
    calibration: sides.Calibration = None,
    command: sides.Command = None,
    base_command: sides.BaseCommand = None,
    cand_command: sides.CandCommand = None,
    read: sides.Read = None,
    run_timeout: sides.RunTimeout = "10min",
    warm_runs: sides.WarmRuns = 1,
    instructions: sides.Instructions = True,
    base_serve: sides.BaseServe = None,
    cand_serve: sides.CandServe = None,
    base_restart: sides.BaseRestart = None,
    cand_restart: sides.CandRestart = None,
    alternate: sides.Alternate = False,
    idle: sides.Idle = "stop",
    ready: sides.Ready = "5min",
    qps: Qps = None,
    users: sides.Users = None,
    duration_each: sides.DurationEach = "3s",
    turns: sides.Turns = 5,
    slo: Slo = None,
    arrivals: Arrivals = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    model: sides.ServedModel = None,
    endpoint: sides.Endpoint = "auto",
    header: sides.Header = None,
    api_key_env: sides.ApiKeyEnv = None,
    seed: Seed = 0,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    junit: ci.Junit = None,
    comment: ci.Comment = None,
    bmf: ci.Bmf = None,
    smaller: ci.Smaller = None,
    bigger: ci.Bigger = None,
    annotations: ci.Annotations = False,
    label: ci.Label = ci.LABEL,
    history: gate_history.History = None,
    branch: gate_history.Branch = None,
    as_json: AsJson = False,
) -> None:
    """Measure two versions in interleaved launches until a regression is proven or ruled out."""
    from mlsys_bench.gate import history as past
    from mlsys_bench.gate import policy as policies
    from mlsys_bench.journeys.gating import calibrating, outside
    from mlsys_bench.journeys.gating import run as journey

    writable(html, md)
    files = ci.outputs(junit, comment, bmf, smaller, bigger, annotations, label)
    asked = journey.Asked(
        policy=policies.given(
            policy, tolerance=tolerance, metrics=metric or (), budgets=[slo] if slo else (), tails=tails, counters=counter_tolerance
        ),
        budget_s=journey.budget(budget), seed=seed, out=out, quiet=as_json,
    )  # fmt: skip
    typed = outside.typed(context.params)
    past.check(history) if history else None
    if calibration is not None:
        calibrating.check(calibration, asked.policy, asked.budget_s)
    with ci.failing(files):
        found = outside.run(typed, asked) if outside.is_asked(typed) else journey.refs(base, cand, bench=bench, worker=worker, asked=asked)
    past.keep(history, found, branch=branch) if history else None
    ci.write(found, files)
    show(found, as_json, None, html, md)
    raise typer.Exit(journey.exit_status(found))


@gate_app.command("calibrate")
def calibrate(
    ref: Annotated[str, typer.Option(help="What stands on both sides: a git ref, a wheel, or '.' for the working tree.")] = ".",
    bench: Annotated[str | None, typer.Option(help="Only these benchmarks.  [default: all]", metavar="NAMES")] = None,
    worker: sides.Worker = None,
    command: Annotated[str | None, typer.Option(help="A command that stands on both sides instead.", metavar="COMMAND")] = None,
    read: sides.Read = None,
    budget: Annotated[str, typer.Option(help="Time to measure, and the time a gate run may take.")] = "120s",
    tolerance: Annotated[str | None, typer.Option(help="The tolerance this runner should be able to decide.  [default: 5%]")] = None,
    policy: sides.PolicyFile = None,
    metric: sides.Metric = None,
    seed: Seed = 0,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Measure a program against itself: this runner's noise, its false alarms, and the smallest change it sees."""
    from mlsys_bench.gate import policy as policies
    from mlsys_bench.journeys.gating import calibrating as journey
    from mlsys_bench.journeys.gating import run as gating

    writable(html, md)
    rules = policies.given(policy, tolerance=tolerance, metrics=metric or ())
    asked = gating.Asked(policy=rules, budget_s=gating.budget(budget), seed=seed, out=out, quiet=as_json)
    found = journey.itself(ref, bench=bench, worker=worker, command=command, read=read, asked=asked)
    show(found, as_json, None, html, md)
    raise typer.Exit(journey.exit_status(found))


@gate_app.command("policy")
def policy_file(file: Annotated[Path | None, typer.Argument(help="A YAML file with a section `gate:`.", dir_okay=False)] = None) -> None:
    """Check the `gate:` section of a file; without one print its format as JSON Schema, for editors that check as you type."""
    import json

    from mlsys_bench.gate import policy

    typer.echo(json.dumps(policy.schema(), indent=1) if file is None else f"{file}: {policy.told(policy.load(file))}")
