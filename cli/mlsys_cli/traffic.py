"""The command about traffic: workload."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.options import Arrivals, AsJson, Html, Markdown, Out, OutputTokens, PromptTokens, Seed
from mlsys_cli.show import leave_out, show, together, writable


def register(app: typer.Typer) -> None:
    """Add these commands to the door."""
    app.command()(workload)


def workload(
    file: Annotated[Path | None, typer.Argument(help="A trace (CSV, JSON lines, our requests file) or exported metrics.")] = None,
    prometheus: Annotated[str | None, typer.Option(help="Address of a Prometheus server that scrapes vLLM, SGLang or mlsys serve.")] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Traffic from laws: --qps, --arrivals, --prompt-tokens, --output-tokens.")
    ] = False,
    range_: Annotated[str, typer.Option("--range", help="How far back the metrics go.")] = "14d",
    step: Annotated[str, typer.Option(help="auto reads every scrape; 60s, say, reads less.")] = "auto",
    until: Annotated[str | None, typer.Option(help="End of the range, a date; now when left out.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The served model, where metrics are of several.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, sglang or mlsys, where metrics are of several.")] = None,
    selector: Annotated[str | None, typer.Option(help="More label matchers, e.g. 'namespace=\"prod\"'.")] = None,
    auth_file: Annotated[
        Path | None, typer.Option(help="File with a token or an Authorization header; else MLSYS_PROMETHEUS_TOKEN.")
    ] = None,
    qps: Annotated[float | None, typer.Option("--qps", help="Requests per second; a trace is stretched to it.")] = None,
    arrivals: Arrivals = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    start: Annotated[str | None, typer.Option(help="Leave out what a trace holds before, e.g. 10min.")] = None,
    end: Annotated[str | None, typer.Option(help="Leave out what a trace holds after.")] = None,
    speed: Annotated[float | None, typer.Option(help="Let a trace run so many times as fast.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Column of arrival times.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of prompt tokens.")] = None,
    output_column: Annotated[str | None, typer.Option(help="Column of output tokens.")] = None,
    hash_column: Annotated[str | None, typer.Option(help="Column of the hashes of prefix blocks.")] = None,
    session_column: Annotated[str | None, typer.Option(help="Column of sessions.")] = None,
    tenant_column: Annotated[str | None, typer.Option(help="Column of tenants.")] = None,
    time_unit: Annotated[str | None, typer.Option(help="s, ms, us or ns, where the column does not tell.")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="Tokens of a prefix block; found from the data when left out.", min=1)] = None,
    draw: Annotated[Path | None, typer.Option(help="Write requests drawn from the laws here: a trace to replay.", dir_okay=False)] = None,
    requests: Annotated[int, typer.Option(help="How many --draw writes, about.", min=1)] = 1000,
    turns: Annotated[str | None, typer.Option(help="Draw sessions of so many turns, a law: 5 or uniform:5:0.3.")] = None,
    gap: Annotated[str | None, typer.Option(help="Mean pause in a session after an answer, e.g. 3s.")] = None,
    shared_prefix: Annotated[int, typer.Option(help="Tokens that every prompt of every session begins with.", min=0)] = 0,
    seed: Seed = 0,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Describe traffic as the planner sees it: rate, burstiness, lengths, prefixes."""
    from mlsys_bench.journeys import traffic

    traffic.check(file, prometheus, synthetic, out)
    writable(draw, html, md)
    laws: dict[str, object] = {"--arrivals": arrivals, "--prompt-tokens": prompt_tokens, "--output-tokens": output_tokens}
    server: dict[str, object] = {
        "--range": range_ != "14d",
        "--step": step != "auto",
        "--until": until,
        "--selector": selector,
        "--auth-file": auth_file,
    }
    of_metrics: dict[str, object] = {"--model": model, "--engine": engine}
    of_trace: dict[str, object] = {
        "--start": start, "--end": end, "--speed": speed, "--time-column": time_column, "--prompt-column": prompt_column,
        "--output-column": output_column, "--hash-column": hash_column, "--session-column": session_column,
        "--tenant-column": tenant_column, "--time-unit": time_unit, "--block-tokens": block_tokens,
    }  # fmt: skip
    if draw is None:
        together("--draw", {"--turns": turns, "--gap": gap, "--shared-prefix": shared_prefix, "--requests": requests != 1000})
    if file is not None:
        leave_out("a FILE, which is read whole", laws | server)
        leave_out(*((f"{file.name}, which holds metrics", of_trace) if traffic.is_metrics(file) else (f"{file.name}, a trace", of_metrics)))
    elif prometheus is not None:
        leave_out("--prometheus, whose metrics say it", laws | of_trace | {"--qps": qps})
    else:
        leave_out("--synthetic", server | of_metrics | of_trace)
    if file is not None:
        columns = {
            "time": time_column, "prompt": prompt_column, "output": output_column, "hash": hash_column, "session": session_column,
            "tenant": tenant_column,
        }  # fmt: skip
        described = traffic.from_file(
            file, columns=columns, time_unit=time_unit, block_tokens=block_tokens, start=start, end=end, speed=speed, qps=qps,
            engine=engine, model=model,
        )  # fmt: skip
    elif prometheus is not None:
        described = traffic.from_prometheus(
            prometheus, range_=range_, step=step, until=until, engine=engine, model=model, selector=selector, auth_file=auth_file
        )
    else:
        described = traffic.synthetic(qps=qps, arrivals=arrivals, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    if draw is not None:
        traffic.draw(described, draw, requests=requests, seed=seed, turns=turns, gap=gap, shared_prefix=shared_prefix)
    show(described, as_json, out, html, md, inputs=[file] if file else [])
