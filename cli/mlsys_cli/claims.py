"""The command that checks common wisdom: claims."""

from __future__ import annotations

from typing import Annotated

import typer

from mlsys_cli.options import AsJson, Html, Markdown, Out
from mlsys_cli.show import show


def register(app: typer.Typer) -> None:
    """Add the command to the door."""
    app.command("claims")(recompute)


def recompute(
    keys: Annotated[list[str] | None, typer.Argument(help="Claims by key; all when left out.")] = None,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Recompute the numbers people quote in system design, each with a verdict, its formula and what was left out."""
    from mlsys_bench.plan import claims

    show(claims.recompute(keys or []), as_json, out, html, md)
