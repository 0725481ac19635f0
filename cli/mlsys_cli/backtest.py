"""Commands that score the models on known results: backtest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.lean import Door
from mlsys_cli.options import AsJson, Cluster, Html, Markdown, Seed
from mlsys_cli.show import show

backtest_app = Door(help="Score the models on tables of known results.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to the door."""
    app.add_typer(backtest_app, name="backtest")


@backtest_app.command("queueing")
def backtest_queueing(
    file: Annotated[Path, typer.Argument(help="Table with columns model, parameters, quantity and, where known, value.", dir_okay=False)],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table with its predictions here.", dir_okay=False)] = None,
    tolerance: Annotated[str, typer.Option(help="Relative error above which a formula is confirmed by simulation.")] = "1%",
    budget: Annotated[str, typer.Option(help="Time that one simulation may take.")] = "10s",
    seed: Seed = 0,
    cluster: Cluster = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Predict every row of a truth table by queueing theory; print the errors where it gives values."""
    from mlsys_bench.journeys import backtest

    result = backtest.queueing(file, out=out, tolerance=tolerance, budget=budget, seed=seed, quiet=as_json, cluster=cluster)
    show(result, as_json, None, html, md, inputs=[file])


@backtest_app.command("llm")
def backtest_llm(
    files: Annotated[list[Path], typer.Argument(help="Tables of serving runs; their result columns may be empty.", dir_okay=False)],
    calibrate: Annotated[list[Path] | None, typer.Option(help="Tables of measured runs to learn from; repeatable.", dir_okay=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table with its predictions here.", dir_okay=False)] = None,
    cluster: Cluster = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Predict every row of tables of serving runs, with intervals; print the errors where they give results."""
    from mlsys_bench.journeys import backtest_llm as journey

    result = journey.llm(files, calibrate=calibrate or [], out=out, quiet=as_json, cluster=cluster)
    show(result, as_json, None, html, md, inputs=[*files, *(calibrate or [])])


@backtest_app.command("plan")
def backtest_plan(
    files: Annotated[list[Path], typer.Argument(help="Tables of serving runs; their result columns may be empty.", dir_okay=False)],
    calibrate: Annotated[list[Path] | None, typer.Option(help="Tables of measured runs to learn from; repeatable.", dir_okay=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table with its plans here.", dir_okay=False)] = None,
    cluster: Cluster = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Plan replicas for the latencies that each row measured; print how far fleets and choices are from what the rows show."""
    from mlsys_bench.journeys import backtest_plan as journey

    result = journey.plan(files, calibrate=calibrate or [], out=out, quiet=as_json, cluster=cluster)
    show(result, as_json, None, html, md, inputs=[*files, *(calibrate or [])])


@backtest_app.command("gate")
def backtest_gate(
    files: Annotated[list[Path], typer.Argument(help="Lines of session, disturbed, arm, round, position, samples.", dir_okay=False)],
    tolerance: Annotated[list[str] | None, typer.Option(help="How much worse is still accepted; repeatable.  [default: 5%]")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the ratio of every launch pair here.", dir_okay=False)] = None,
    seed: Seed = 0,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Replay recorded launches through the looks of the gate; print how often each arm fails, passes or stays undecided."""
    from mlsys_bench.journeys import backtest_gate as journey

    result = journey.gate(files, tolerances=tolerance or ["5%"], out=out, seed=seed, quiet=as_json)
    show(result, as_json, None, html, md, inputs=files)
