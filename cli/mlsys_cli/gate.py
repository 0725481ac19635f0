"""Commands that guard a build: gate run, compare, calibrate, history."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_bench.errors import NotBuilt
from mlsys_cli.options import AsJson, Html, Markdown, Out
from mlsys_cli.show import show

gate_app = typer.Typer(help="Fail a build on a real regression and on nothing else.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to the door."""
    app.add_typer(gate_app, name="gate")


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
