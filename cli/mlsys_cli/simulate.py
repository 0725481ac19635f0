"""The simulate command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_cli.options import Arrivals, AsJson, Cluster, From, Html, Markdown, Model, OutputTokens, PromptTokens, Qps, Seed, Slo
from mlsys_cli.show import show, writable

GROUPS: dict[str, tuple[str, ...]] = {
    "Traffic": ("qps", "arrivals", "prompt_tokens", "output_tokens", "trace", "users", "think", "duration", "requests", "slo"),
    "One replica": (
        "measured",
        "model",
        "gpu",
        "precision",
        "tp",
        "engine",
        "max_batch",
        "batching",
        "preemption",
        "prefix_cache",
        "kv_offload",
        "speculate",
    ),
    "The fleet": ("replicas", "routing", "queue_limit", "autoscale", "failures", "disaggregate"),
    "Clients": ("timeout", "retries"),
    "Result": ("runs", "warmup", "cluster", "seed", "out", "html", "md", "as_json"),
}


def simulate(
    scenario: Annotated[str | None, typer.Argument(help="A scenario; flags override it.")] = None,
    qps: Qps = None,
    arrivals: Arrivals = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    trace: Annotated[Path | None, typer.Option(help="Replay a trace; --qps stretches it to a rate.", dir_okay=False)] = None,
    users: Annotated[int | None, typer.Option(help="Closed loop: so many users who wait for their answers.", min=1)] = None,
    think: Annotated[str | None, typer.Option(help="Their mean pause before the next request, e.g. 5s.")] = None,
    duration: Annotated[str | None, typer.Option(help="Simulated time of arrivals.  [default: 300s, or the whole trace]")] = None,
    requests: Annotated[int | None, typer.Option(help="So many requests instead of a duration.", min=1)] = None,
    slo: Slo = None,
    measured: From = None,
    model: Model = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="The GPU of the design.")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp8, int8 or int4.")] = None,
    tp: Annotated[int | None, typer.Option(help="GPUs of one replica; the fewest that fit when left out.", min=1)] = None,
    engine: Annotated[str | None, typer.Option(help="Limits and rules that vllm-v1, sglang or trtllm has by default.")] = None,
    max_batch: Annotated[int | None, typer.Option(help="Sequences decoded together on one replica.", min=1)] = None,
    batching: Annotated[
        str | None, typer.Option(help="continuous, prefill-first, dynamic,wait=50ms or static[,wait=60s].  [default: continuous]")
    ] = None,
    preemption: Annotated[str | None, typer.Option(help="recompute, or swap,link=25GB/s to host memory.  [default: recompute]")] = None,
    prefix_cache: Annotated[bool, typer.Option(help="Compute prefixes that a trace says are shared only once.")] = True,
    kv_offload: Annotated[str | None, typer.Option(help="Cached prefixes move to host memory: 64GB,link=25GB/s, of each GPU.")] = None,
    speculate: Annotated[str | None, typer.Option(help="Drafts per step and the chance that each is right: 3,acceptance=70%.")] = None,
    replicas: Annotated[int, typer.Option(help="Replicas, at the start where they are scaled.", min=1)] = 1,
    routing: Annotated[
        str, typer.Option(help="random, round_robin, least_loaded, power_of_two, prefix_aware or session_affinity.")
    ] = "random",
    queue_limit: Annotated[int | None, typer.Option(help="A replica with so many waiting answers 429.", min=0)] = None,
    autoscale: Annotated[
        str | None,
        typer.Option(help="in_flight=32,max=8,cold-start=90s[,min=1,every=15s,down-delay=5min]; or by queue=, kv=80%, rate=5/s."),
    ] = None,
    failures: Annotated[str | None, typer.Option(help="mtbf=100h,repair=5min, or at=60s:0,repair=5min (replica 0 after 60 s).")] = None,
    disaggregate: Annotated[
        str | None, typer.Option(help="prefill=2,link=50GB/s[,latency=1ms]: prefill apart; the link is of each GPU.")
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="Clients give up a request after so long, e.g. 30s.")] = None,
    retries: Annotated[
        str | None,
        typer.Option(help="Try again so often: 2[,first=500ms,most=8s,jitter=25%,budget=20%], after 429, 503, timeouts, resets."),
    ] = None,
    runs: Annotated[int, typer.Option(help="Independent runs, pooled; intervals come from what they differ in.", min=1)] = 1,
    warmup: Annotated[str | None, typer.Option(help="Leave out requests due before.  [default: the first tenth of all]")] = None,
    cluster: Cluster = None,
    seed: Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the summary here, the requests beside it (.parquet).")] = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Simulate one design request by request, in virtual time."""
    from mlsys_cli.model import one_blas_thread

    one_blas_thread()
    from mlsys_bench.journeys import simulation

    writable(html, md)
    asked = simulation.Asked(
        scenario=scenario, qps=qps, arrivals=arrivals, prompt_tokens=prompt_tokens, output_tokens=output_tokens, trace=trace, users=users,
        think=think, duration=duration, requests=requests, runs=runs, seed=seed, measured=measured or [], model=model, gpu=gpu,
        precision=precision, tp=tp, engine=engine, max_batch=max_batch, slo=slo, replicas=replicas, routing=routing,
        queue_limit=queue_limit, timeout=timeout, retries=retries, failures=failures, autoscale=autoscale, disaggregate=disaggregate,
        batching=batching, preemption=preemption, prefix_cache=prefix_cache, kv_offload=kv_offload, speculate=speculate, warmup=warmup,
        cluster=cluster, out=out,
    )  # fmt: skip
    result = simulation.simulate(asked)
    show(result, as_json, None, html, md, inputs=measured or [])
    raise typer.Exit(simulation.exit_status(asked, result))
