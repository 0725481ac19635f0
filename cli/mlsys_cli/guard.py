"""Commands that guard: gate, backtest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_bench.errors import NotBuilt
from mlsys_cli.options import AsJson, Cluster, Html, Markdown, Out, Seed
from mlsys_cli.show import show

gate_app = typer.Typer(help="Fail a build on a real regression and on nothing else.", no_args_is_help=True)
backtest_app = typer.Typer(help="Score the models on tables of known results.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to the door."""
    app.add_typer(gate_app, name="gate")
    app.add_typer(backtest_app, name="backtest")


@gate_app.command("compare")
def compare(
    base: Annotated[Path, typer.Argument(help="Bench or load-test record of the baseline.", dir_okay=False)],
    cand: Annotated[Path, typer.Argument(help="Bench or load-test record of the candidate.", dir_okay=False)],
    tolerance: Annotated[str, typer.Option(help="How much worse is still accepted.")] = "5%",
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Compare two recorded files.  Single launches can be suspect, never guilty."""
    from mlsys_bench import gate
    from mlsys_bench.journeys import compare as journey

    verdict = journey.compare(base, cand, tolerance)
    show(verdict, as_json, out, html, md, inputs=[base, cand])
    raise typer.Exit(gate.exit_status(verdict))


@gate_app.command("run")
def run(
    base: Annotated[str, typer.Option(help="Baseline git ref.")],
    cand: Annotated[str, typer.Option(help="Candidate git ref.")],
) -> None:
    """Measure two refs in interleaved launches and decide.  (Not built yet.)"""
    raise NotBuilt(f"gate run {base} {cand} is not built yet; record both with `mlsys bench gpu -o` and use `mlsys gate compare`")


@gate_app.command("calibrate")
def calibrate() -> None:
    """Measure this runner's own noise.  (Not built yet.)"""
    raise NotBuilt("gate calibrate is not built yet; docs/roadmap.md says when")


@gate_app.command("history")
def history() -> None:
    """Show verdicts over commits.  (Not built yet.)"""
    raise NotBuilt("gate history is not built yet; docs/roadmap.md says when")


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


def _backtest(name: str, line: str) -> None:
    def command(files: Annotated[list[Path], typer.Argument(help="Tables to score on.")]) -> None:
        raise NotBuilt(f"backtest {name} {files[0]} is not built yet; docs/roadmap.md says when")

    command.__doc__ = line
    backtest_app.command(name)(command)


_backtest("gate", "Score gate decisions on recorded launches.  (Not built yet.)")
