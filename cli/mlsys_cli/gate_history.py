"""Commands that keep results over commits: gate history add, show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.lean import Door
from mlsys_cli.options import AsJson, Html, Markdown, Out
from mlsys_cli.show import show, writable

history_app = Door(help="Results over commits: keep them, and see where they changed for good.", no_args_is_help=True)

History = Annotated[Path | None, typer.Option("--history", help="Keep the result in this database, see gate history.", dir_okay=False)]
Branch = Annotated[str | None, typer.Option(help="The branch that is measured, for the history.")]
Db = Annotated[Path, typer.Option("--db", help="The database: one SQLite file, yours to copy and keep.", dir_okay=False)]
DEFAULT = Path(".mlsys/gate.sqlite")


@history_app.command("add")
def add(
    files: Annotated[list[Path], typer.Argument(help="Records of gate runs, verdicts or benchmarks.", dir_okay=False)],
    db: Db = DEFAULT,
    branch: Annotated[str | None, typer.Option(help="The branch they belong to.")] = None,
    commit: Annotated[str | None, typer.Option(help="The commit that was measured, where the file does not say.")] = None,
) -> None:
    """Add results to the history; one that is there already changes nothing."""
    from mlsys_bench.gate import history

    added = history.add(db, history.results_of(files, branch=branch, commit=commit))
    typer.echo(f"{db}: {added.new} added, {added.known} already there, {added.results} in all")


@history_app.command("show")
def show_history(
    db: Db = DEFAULT,
    metric: Annotated[list[str] | None, typer.Option(help="Only these metrics, e.g. engine.step or 'command.*'; repeatable.")] = None,
    since: Annotated[str | None, typer.Option(help="Leave out what is older: 30d, or a date.")] = None,
    branch: Annotated[str | None, typer.Option(help="Only results of this branch.")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write every result as a row of a table.", dir_okay=False)] = None,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Show how each metric went over commits, with its lasting changes."""
    from mlsys_bench.gate import trends
    from mlsys_bench.report import histories

    writable(csv, out, html, md)
    found = trends.trends(db, metrics=tuple(metric or ()), since=since, branch=branch)
    histories.write_csv(csv, found) if csv else None
    show(found, as_json, out, html, md, inputs=[db])
