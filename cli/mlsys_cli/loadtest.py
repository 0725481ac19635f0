"""The command that loads a server: loadtest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.options import Arrivals, AsJson, Html, Markdown, OutputTokens, PromptTokens, Qps, Seed, Slo
from mlsys_cli.show import refuse, show


def register(app: typer.Typer) -> None:
    """Add this command to the door."""
    app.command()(loadtest)


def loadtest(
    target: Annotated[str, typer.Argument(help="URL of an OpenAI-compatible server.")],
    qps: Qps = None,
    users: Annotated[int | None, typer.Option(help="Closed loop: users who wait for each answer.", min=1)] = None,
    trace: Annotated[Path | None, typer.Option(help="Replay this CSV of arrivals and lengths.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Not built yet.")] = False,
    find_max: Annotated[bool, typer.Option("--find-max", help="Not built yet.")] = False,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Not built yet.")] = False,
    arrivals: Arrivals = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    model: Annotated[str | None, typer.Option("--model", help="Model to ask for; the first of /v1/models when left out.")] = None,
    endpoint: Annotated[str, typer.Option(help="completions or chat.")] = "completions",
    duration: Annotated[str, typer.Option(help="How long requests are sent.")] = "60s",
    warmup: Annotated[str, typer.Option(help="auto, or a duration left out of the figures.")] = "auto",
    timeout: Annotated[str, typer.Option(help="Longest wait for one answer.")] = "60s",
    slo: Slo = None,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the schedule and send nothing.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Not built yet.")] = False,
    processes: Annotated[int, typer.Option(help="Load processes; only 1 is built.", min=1)] = 1,
    master: Annotated[bool, typer.Option("--master", help="Not built yet.")] = False,
    worker: Annotated[str | None, typer.Option("--worker", help="Not built yet.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the summary here, the requests beside it (.parquet).")] = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Load-test any OpenAI-compatible server; latency counts from the scheduled send."""
    refuse({
        "--sweep": sweep, "--find-max": find_max, "--calibrate": calibrate, "--web": web, "--processes above 1": processes > 1,
        "--master": master, "--worker": worker,
    })  # fmt: skip
    from mlsys_bench.journeys import load

    plan = load.options(
        target=target, qps=qps, users=users, trace=trace, arrivals=arrivals, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        model=model, endpoint=endpoint, duration=duration, warmup=warmup, timeout=timeout, slo=slo, seed=seed,
    )  # fmt: skip
    if dry_run:
        typer.echo(load.dry_run(plan))
        return
    result = load.run(plan, out=out, quiet=as_json)
    show(result, as_json, html=html, md=md)
    raise typer.Exit(load.exit_status(result))
