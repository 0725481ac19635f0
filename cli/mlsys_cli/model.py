"""Commands that model: plan, verify; fit and simulate have files of their own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.fit import fit
from mlsys_cli.grouped import grouped
from mlsys_cli.options import Arrivals, AsJson, Cluster, From, Html, Markdown, Model, Out, OutputTokens, PromptTokens, Qps, Seed, Slo
from mlsys_cli.show import alone, show, together, writable
from mlsys_cli.simulate import GROUPS, simulate


def register(app: typer.Typer) -> None:
    """Add these commands to the door."""
    app.command()(fit)
    app.command()(plan)
    app.command(cls=grouped(GROUPS))(simulate)
    app.command()(verify)


def one_blas_thread() -> None:
    """Load numpy with one BLAS thread, for this process alone: models multiply small matrices, and idle threads cost 0.1 s of CPU."""
    if "OPENBLAS_NUM_THREADS" not in os.environ:
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        import numpy  # noqa: F401  reads it once, here

        del os.environ["OPENBLAS_NUM_THREADS"]


def plan(
    ctx: typer.Context,
    scenario: Annotated[str | None, typer.Argument(help="A scenario; flags override it.")] = None,
    qps: Qps = None,
    measured: From = None,
    model: Model = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="Comma-separated GPUs to choose from; all priced ones when left out.")] = None,
    precision: Annotated[str | None, typer.Option(help="Comma-separated: bf16, fp8, int8, int4.")] = None,
    slo: Slo = None,
    arrivals: Arrivals = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences decoded together on one replica.", min=1)] = None,
    headroom: Annotated[str | None, typer.Option(help="Share of a replica's capacity kept free, e.g. 20%.")] = None,
    term: Annotated[str, typer.Option(help="on-demand, spot or reserved.")] = "on-demand",
    trace: Annotated[Path | None, typer.Option(help="The smallest fleet for this trace, replayed in simulation.", dir_okay=False)] = None,
    speed: Annotated[float, typer.Option(help="Play the trace so many times as fast.", min=0.0)] = 1.0,
    routing: Annotated[str, typer.Option(help="random, round_robin, least_loaded or power_of_two.")] = "random",
    availability: Annotated[str | None, typer.Option(help="Share of time with enough replicas up, e.g. 99.9%: adds spares.")] = None,
    zones: Annotated[int | None, typer.Option(help="Zones to spread replicas over; one when left out.", min=1)] = None,
    survive: Annotated[bool, typer.Option("--survive", help="Any one zone may go: the others hold the limits at peak.")] = False,
    spot: Annotated[
        str | None, typer.Option(help="life=6h,notice=2min,refill=30min: how spot goes and comes, with --term spot and an availability.")
    ] = None,
    autoscale: Annotated[bool, typer.Option("--autoscale", help="Replicas by the hour, and limits that protect the fleet.")] = False,
    growth: Annotated[str | None, typer.Option(help="Growth of traffic a month, e.g. 5%: when is the fleet full?")] = None,
    disaggregate: Annotated[
        str, typer.Option(help="auto, never or only[,link=50GB/s]: prefill and decode on pools of their own; the link is of each GPU.")
    ] = "auto",
    mixed: Annotated[bool, typer.Option("--mixed", help="Look for a fleet of two or more kinds by prompt length, too.")] = False,
    prices: Annotated[Path | None, typer.Option(help="Your own prices: commitments, discounts, quotas.", dir_okay=False)] = None,
    baseline: Annotated[
        Path | None, typer.Option(help="A plan record: what this plan saves or adds, cause by cause.", dir_okay=False)
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="What later limits, more traffic, INT8, caches and a cascade would save or cost.")
    ] = False,
    small: Annotated[str | None, typer.Option(help="The model that answers first in a cascade, for --sensitivity.")] = None,
    from_deployment: Annotated[
        str | None, typer.Option(help="Today's engine command line, or its manifest, set beside the plan's.")
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None, typer.Option(metavar="OLD NEW", help="Two plan records: why the second differs from the first.")
    ] = None,
    cluster: Cluster = None,
    export: Annotated[
        list[str] | None, typer.Option(help="k8s, keda, kserve, openslo or prometheus-rules[:DIR]: write manifests; repeatable.")
    ] = None,
    seed: Seed = 0,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Size the cheapest deployment that meets the limits, with intervals and a reason."""
    one_blas_thread()
    if diff is not None:
        from mlsys_bench.journeys import deploying

        alone("--diff", ctx, ("diff", "as_json"))
        print(deploying.explained(diff, as_json))
        return
    from mlsys_bench.journeys import comparing, planning

    writable(out, html, md)
    asked = planning.asked(
        scenario=scenario, qps=qps, measured=measured or [], model=model, gpu=gpu, precision=precision, slo=slo, arrivals=arrivals,
        prompt_tokens=prompt_tokens, output_tokens=output_tokens, max_batch=max_batch, headroom=headroom, term=term, seed=seed,
        trace=trace, speed=speed, routing=routing, prices=prices,
        availability=availability, zones=zones, survive=survive, spot=spot, autoscale=autoscale, growth=growth, mixed=mixed,
        disaggregate=disaggregate,
    )  # fmt: skip
    exports = export or []
    if exports or from_deployment is not None:
        from mlsys_bench.journeys import deploying

        deploying.check(asked, exports, from_deployment)
    made = comparing.planned(asked, cluster=cluster, baseline=baseline, changes=sensitivity, small=small, quiet=as_json)
    files = [*map(planning.measured_file, measured or []), *[given for given in (trace, prices, baseline) if given]]
    show(made, as_json, out, html, md, inputs=files)
    if exports or from_deployment:
        from mlsys_bench.journeys import deploying

        typer.echo(deploying.told(made, exports, from_deployment), err=as_json)
    raise typer.Exit(planning.exit_status(made))


def verify(
    plan: Annotated[Path, typer.Argument(help="A plan record.", dir_okay=False)],
    url: Annotated[str | None, typer.Argument(help="The server to test; the built-in engine when left out.")] = None,
    prometheus: Annotated[
        str | None, typer.Option(help="Score production's own metrics instead: a Prometheus server, or a file exported from one.")
    ] = None,
    range_: Annotated[str | None, typer.Option("--range", help="How far back its metrics go: 1h when left out.")] = None,
    until: Annotated[str | None, typer.Option(help="End of the range, a date; now when left out.")] = None,
    engine: Annotated[str | None, typer.Option(help="vllm, sglang or mlsys, where metrics are of several.")] = None,
    model: Annotated[str | None, typer.Option("--model", help="The served model, where metrics are of several.")] = None,
    selector: Annotated[str | None, typer.Option(help="More label matchers, e.g. 'namespace=\"prod\"'.")] = None,
    auth_file: Annotated[
        Path | None, typer.Option(help="File with a token or an Authorization header; else MLSYS_PROMETHEUS_TOKEN.")
    ] = None,
    duration: Annotated[str | None, typer.Option(help="How long requests are sent.  [default: 60s]")] = None,
    seed: Seed = 1,
    out: Out = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Load-test one replica at its planned load, or read production's metrics, and score every prediction; exit 1 outside its interval."""
    writable(out, html, md)
    source = {"--range": range_, "--until": until, "--engine": engine, "--model": model, "--selector": selector, "--auth-file": auth_file}
    if prometheus is None:
        together("--prometheus", source)
        from mlsys_bench.journeys import verify as journey

        result = journey.verify(plan, url, duration=duration or "60s", seed=seed, out=out, quiet=as_json)
        show(result, as_json, out, html, md, inputs=[plan])
        raise typer.Exit(journey.exit_status(result))
    from mlsys_bench.journeys import production

    asked = production.Source(
        where=prometheus, range_=range_, until=until, engine=engine, model=model, selector=selector, auth_file=auth_file
    )
    seen = production.production(plan, asked, url, duration=duration, seed=seed, out=out)
    show(seen, as_json, out, html, md, inputs=[plan, *production.files(asked)])
    raise typer.Exit(production.exit_status(seen))
