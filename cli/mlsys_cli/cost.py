"""The command that prices a plan: cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.grouped import grouped
from mlsys_cli.options import AsJson, Html, Markdown, Out
from mlsys_cli.show import show, together, writable

GROUPS: dict[str, tuple[str, ...]] = {
    "Beside devices": ("vectors", "egress", "vcpus", "qps"),
    "Against an API": ("api", "cached", "batched", "least"),
    "Terms": ("prices", "hours", "floor", "spot"),
    "Changes": ("baseline", "what_if", "small"),
    "Energy": ("pue", "host_w", "grid_g", "kwh_usd"),
}


def register(app: typer.Typer) -> None:
    """Add the command to the door."""
    app.command(cls=grouped(GROUPS))(cost)


def cost(
    plan: Annotated[Path, typer.Argument(help="A plan record.", dir_okay=False)],
    baseline: Annotated[Path | None, typer.Option(help="The plan record to compare with.", dir_okay=False)] = None,
    qps: Annotated[float | None, typer.Option("--qps", help="Mean requests per second, where the plan is for a peak.")] = None,
    vectors: Annotated[str | None, typer.Option(help="Vectors kept: count x dimensions x copies, 10000000x1536x2.")] = None,
    egress: Annotated[str | None, typer.Option(help="Bytes that leave per request, e.g. 50kB.")] = None,
    vcpus: Annotated[float, typer.Option(help="vCPUs beside the devices.", min=0.0)] = 0.0,
    api: Annotated[list[str] | None, typer.Option(help="Hosted model to break even with; repeatable.")] = None,
    cached: Annotated[str | None, typer.Option(help="Share of the prompt that the API reads from its cache, e.g. 50%.")] = None,
    batched: Annotated[str | None, typer.Option(help="Share of the requests that can wait for a batch, e.g. 20%.")] = None,
    least: Annotated[int, typer.Option(help="Fewest replicas there may be.", min=1)] = 1,
    prices: Annotated[Path | None, typer.Option(help="Your own prices: commitments, discounts, rates.", dir_okay=False)] = None,
    hours: Annotated[str | None, typer.Option(help="Replicas wanted hour by hour: 2x8,4x8,10x8.")] = None,
    floor: Annotated[int | None, typer.Option(help="Replicas that keep the limits and never stand on spot; all when left out.")] = None,
    spot: Annotated[str | None, typer.Option(help="How spot goes: life=6h,pools=3,start=5min,refill=10min,waste=30s.")] = None,
    pue: Annotated[float | None, typer.Option(help="What the building draws over what machines draw.")] = None,
    host_w: Annotated[float | None, typer.Option(help="Watts of a host without its devices.")] = None,
    grid_g: Annotated[float | None, typer.Option(help="Grams of CO2 per kWh of your grid.")] = None,
    kwh_usd: Annotated[float | None, typer.Option(help="Dollars per kWh, for machines of your own.")] = None,
    what_if: Annotated[bool, typer.Option("--what-if", help="Plan again with changed limits, traffic, precision and a cache.")] = False,
    small: Annotated[str | None, typer.Option(help="The model that answers first in a cascade, for --what-if.")] = None,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Price a plan: per request and token, energy, terms, against an API and against a baseline."""
    if not api:
        together("--api", {"--cached": cached, "--batched": batched, "--least": least - 1})
    if hours is None:
        together("--hours", {"--floor": floor is not None, "--spot": spot})
    if not what_if:
        together("--what-if", {"--small": small})
    writable(out, html, md)
    from mlsys_bench.journeys import costing

    found = costing.cost(
        plan, baseline=baseline, requests_per_s=qps, vectors=vectors, egress=egress, vcpus=vcpus, apis=api or [], cached=cached,
        batched=batched, least=least, prices=prices, hours=hours, floor=floor, spot=spot,
        site=costing.site(pue, host_w, grid_g, kwh_usd), what_if=what_if, small=small, quiet=as_json,
    )  # fmt: skip
    show(found, as_json, out, html, md, inputs=[plan, *[given for given in (baseline, prices) if given]])
