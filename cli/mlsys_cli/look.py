"""Commands that look something up: doctor, catalog, scenario, report, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.lean import Door
from mlsys_cli.options import AsJson, Html, Markdown, Model, Seed
from mlsys_cli.show import show

catalog_app = Door(help="GPUs, models and prices that are known, with source and date.", no_args_is_help=True)
scenario_app = Door(help="Systems described in YAML.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add these commands to the door."""
    app.command()(demo)
    app.command()(doctor)
    app.command()(report)
    app.add_typer(catalog_app, name="catalog")
    app.add_typer(scenario_app, name="scenario")


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the records and the report.", file_okay=False)] = Path("demo"),
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Run the whole loop on this machine: measure, fit, plan, serve, load-test, compare."""
    from mlsys_bench.journeys import demo as journey

    show(journey.demo(out, seed=seed, quiet=as_json), as_json)


def doctor(as_json: AsJson = False) -> None:
    """Say what this machine is and what can be measured on it."""
    from mlsys_bench.journeys import doctor as journey

    show(journey.examine(), as_json)


def report(
    files: Annotated[list[Path], typer.Argument(help="Records of any kind.", dir_okay=False)],
    html: Html = None,
    md: Markdown = None,
    png: Annotated[
        Path | None, typer.Option("--png", help="Write a load test, a gate or a bench's roofline as a picture for a slide.", dir_okay=False)
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a table of requests, or of a bench's rows.", dir_okay=False)] = None,
) -> None:
    """Show records as text, or as one HTML or Markdown file, a picture or a table."""
    from mlsys_bench import report as reports

    items = reports.load(files)
    reports.write_html(html, items) if html else None
    reports.write_markdown(md, items) if md else None
    reports.write_png(png, items) if png else None
    reports.write_csv(csv, items) if csv else None
    if not (html or md or png or csv):
        reports.print_all(items)


@catalog_app.command()
def gpus(as_json: AsJson = False) -> None:
    """List GPUs and CPUs: memory, bandwidth, peak rates, the cheapest hour."""
    from mlsys_bench.journeys import catalog

    show(catalog.gpus(), as_json)


@catalog_app.command()
def models(model: Model = None, as_json: AsJson = False) -> None:
    """List models: shape, parameters, bytes of weights and of KV cache; --model counts one from its config.json."""
    from mlsys_bench.journeys import catalog

    show(catalog.models_(model), as_json)


@catalog_app.command()
def prices(as_json: AsJson = False) -> None:
    """List what instances cost, with source and date."""
    from mlsys_bench.journeys import catalog

    show(catalog.prices(), as_json)


@catalog_app.command()
def apis(as_json: AsJson = False) -> None:
    """List what hosted models ask per million tokens: the names that `mlsys cost --api` takes."""
    from mlsys_bench.journeys import catalog

    show(catalog.apis(), as_json)


@scenario_app.command("list")
def list_scenarios() -> None:
    """List the scenarios that ship with mlsys."""
    from mlsys_bench import scenario

    for name in scenario.names():
        typer.echo(f"{name:24} {scenario.load(name).description.strip().splitlines()[0]}")


@scenario_app.command("show")
def show_scenario(
    name: Annotated[str, typer.Argument(help="A shipped name, or a file.")],
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Show a scenario: its stages drawn, its traffic and its promises."""
    from mlsys_bench import scenario

    show(scenario.load(name), as_json, None, html, md)


@scenario_app.command("schema")
def schema() -> None:
    """Print the format of scenario files as JSON Schema, for editors that check as you type."""
    import json

    from mlsys_bench import scenario

    typer.echo(json.dumps(scenario.schema(), indent=1))


@scenario_app.command("check")
def check_scenario(file: Annotated[Path, typer.Argument(help="A scenario file.", dir_okay=False)]) -> None:
    """Check a scenario file: keys, units, names, and whether its stages fit together."""
    from mlsys_bench import scenario

    typer.echo(f"{file}: {scenario.check(file).name} holds together")
