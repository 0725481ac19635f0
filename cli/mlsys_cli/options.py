"""Options that several commands share, each with its one help line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print the record as JSON and nothing else.")]
Out = Annotated[Path | None, typer.Option("--out", "-o", help="Write the record to this file.", dir_okay=False)]
Html = Annotated[Path | None, typer.Option("--html", help="Write a self-contained HTML report.", dir_okay=False)]
Markdown = Annotated[Path | None, typer.Option("--md", help="Write a Markdown report.", dir_okay=False)]
Seed = Annotated[int, typer.Option(min=0, help="Seed of everything drawn at random.")]
Slo = Annotated[str | None, typer.Option("--slo", help='Limits, e.g. "ttft_p95<500ms,tpot_p99<50ms".')]
Qps = Annotated[float | None, typer.Option("--qps", help="Requests per second that arrive.")]
Arrivals = Annotated[str | None, typer.Option(help="poisson, constant, gamma:CV, mmpp:…, diurnal:…, stages:…, series:FILE or trace:FILE.")]
PromptTokens = Annotated[
    str | None, typer.Option(help="Prompt lengths: 512, lognormal:MEAN:CV[:MAX], normal:…, uniform:… or mix:70%@512,…")
]
OutputTokens = Annotated[str | None, typer.Option(help="Output lengths, written like --prompt-tokens.")]
Model = Annotated[str | None, typer.Option("--model", help="A model of `mlsys catalog models`, a Hugging Face config.json, or its folder.")]
From = Annotated[
    list[Path] | None, typer.Option("--from", help="Measured profiles, bench files or a workload; repeatable.", dir_okay=False)
]
Cluster = Annotated[
    str | None, typer.Option("--cluster", help="A Dask scheduler whose workers do the work, tcp://HOST:PORT.  [default: this machine]")
]
