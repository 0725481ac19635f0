"""The command fit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.options import AsJson, Html, Markdown, Out, Seed
from mlsys_cli.show import leave_out, show, together, writable


def fit(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Bench records, load tests, or results of vllm bench, AIPerf, guidellm, inference-perf, trtllm-bench.", dir_okay=False
        ),
    ] = None,
    probe: Annotated[str | None, typer.Option(help="URL of a live OpenAI-compatible server to measure from outside.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The model, where a file or a probed server does not say it.")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="The GPU, where a file or a probed server does not say it.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp8, int8 or int4.")] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs of one replica.", min=1)] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, sglang, trtllm or mlsys.")] = None,
    stage: Annotated[str | None, typer.Option(help="A stage that is no LLM: its service profile, by this name.")] = None,
    served_model: Annotated[str | None, typer.Option(help="Name to ask a probed server for; the first it lists when left out.")] = None,
    endpoint: Annotated[str, typer.Option(help="Of a probed server: completions or chat.")] = "completions",
    concurrency: Annotated[int, typer.Option(help="Most requests a probe has in flight.", min=2)] = 16,
    max_step_tokens: Annotated[int | None, typer.Option(help="Token budget of one step of a probed server, if known.", min=1)] = None,
    budget: Annotated[str, typer.Option(help="Time a probe may take, at most 10 minutes.")] = "5m",
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Turn measured latencies into a profile, with its residuals and valid range."""
    from mlsys_cli.model import one_blas_thread

    one_blas_thread()
    from mlsys_bench.journeys import fitting
    from mlsys_bench.predict.readers import Design

    writable(out, html, md)
    if probe is None:
        together("--probe", {
            "--served-model": served_model, "--endpoint": endpoint != "completions", "--concurrency": concurrency != 16,
            "--max-step-tokens": max_step_tokens, "--budget": budget != "5m",
        })  # fmt: skip
    else:
        leave_out("--probe, which measures a server itself", {"FILES": files, "--stage": stage})
    design = Design(model=model, device=gpu, precision=precision, tp=tp, engine=engine)
    if probe is None:
        found = fitting.fit(files or [], design, stage=stage)
    else:
        found = fitting.probe(
            probe, design=design, served_model=served_model, endpoint=endpoint, concurrency=concurrency, max_step_tokens=max_step_tokens,
            budget=budget, seed=seed, quiet=as_json,
        )  # fmt: skip
    show(found.profile, as_json, out, html, md, inputs=files or [], extra=found.checks)
    raise typer.Exit(found.exit_status)
