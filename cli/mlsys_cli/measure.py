"""Commands that measure: bench gpu, bench quality, bench list, bench scenario, serve."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_bench.errors import INTERRUPTED, NotBuilt
from mlsys_cli.lean import Door
from mlsys_cli.options import AsJson, Out, Seed
from mlsys_cli.show import refuse, show

bench_app = Door(help="Microbenchmarks of this machine and of the built-in engine.", no_args_is_help=True, invoke_without_command=True)


def register(app: typer.Typer) -> None:
    """Add these commands to the door."""
    app.add_typer(bench_app, name="bench")
    app.command()(serve)


@bench_app.callback()
def worker(
    name: Annotated[str | None, typer.Option("--worker", metavar="NAME", help="Be a benchmark's process for `gate run`.")] = None,
) -> None:
    """Microbenchmarks of this machine and of the built-in engine."""
    if name is not None:
        from mlsys_bench.journeys.gating import benchmarks

        raise typer.Exit(benchmarks.work(name))


@bench_app.command("gpu")
def gpu(
    device: Annotated[str, typer.Option(help="auto, cuda:0 or cpu.")] = "auto",
    suite: Annotated[str, typer.Option(help="quick or full.")] = "quick",
    only: Annotated[str | None, typer.Option(help="Only these benchmarks, e.g. memory,engine.step.")] = None,
    model: Annotated[
        str, typer.Option("--model", help="nano, small-160m, tinyllama-1.1b, a Llama's config.json, or a checkpoint's folder.")
    ] = "nano",
    precision: Annotated[str, typer.Option(help="Comma-separated; auto is the checkpoint's own, fp32 for built-in shapes.")] = "auto",
    launches: Annotated[int, typer.Option(help="Processes to measure in; the launch is the unit of evidence.", min=1)] = 1,
    budget: Annotated[str | None, typer.Option(help="Time for all launches together, else the suite's own.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads on a CPU; 1, pinned to core 0, is how `serve` runs.", min=1)] = None,
    max_batch: Annotated[int, typer.Option(help="Sequences decoded together, as `serve` will run.", min=1)] = 8,
    max_step_tokens: Annotated[int, typer.Option(help="Token budget of one step, as `serve` will run.", min=1)] = 256,
    max_context: Annotated[int, typer.Option(help="Longest prompt plus output, in tokens.", min=2)] = 1024,
    backend: Annotated[str, typer.Option(help="Who computes: auto, native, torch or triton.")] = "auto",
    kv: Annotated[str, typer.Option(help="What the KV cache is kept in: auto, fp32, bf16, int8 or fp8.")] = "auto",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits whatever else is in the batch.")] = False,
    compare: Annotated[Path | None, typer.Option(help="A bench file to compare with; --json gives the verdict.", dir_okay=False)] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Write the record (.json, .parquet: a row per sample) or its rows (.csv).", dir_okay=False),
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Measure what this machine delivers to a transformer: bandwidth, GEMM, prefill, decode.  On the CPU when there is no GPU."""
    from mlsys_bench.journeys import benchmark
    from mlsys_bench.journeys import compare as comparison

    base = comparison.baseline(compare) if compare else None  # before minutes are spent measuring
    record, rows = benchmark.gpu(
        device=device, suite=suite, only=only, model=model, precision=precision, launches=launches, budget=budget,
        threads=threads, max_batch=max_batch, max_step_tokens=max_step_tokens, max_context=max_context, seed=seed, out=out, quiet=as_json,
        backend=backend, kv=kv, deterministic=deterministic,
    )  # fmt: skip
    if base is None or not as_json:
        show(record, as_json, extra=rows)
    if base is not None:
        from mlsys_bench import gate

        verdict = comparison.compare_fresh(base, record)
        show(verdict, as_json)
        raise typer.Exit(INTERRUPTED if record.stopped else gate.exit_status(verdict))
    raise typer.Exit(INTERRUPTED if record.stopped else 0)


@bench_app.command("quality")
def quality(
    precision: Annotated[
        str, typer.Option(help="Comma-separated precisions to compare with fp32.")
    ] = "fp32,bf16,int8,w8a8,int4g32,int4g64,int4g128,w4a8g32",
    quantizer: Annotated[str, typer.Option(help="How 4-bit weights are rounded, comma-separated: rtn, search, gptq.")] = "rtn,gptq",
    kv: Annotated[str, typer.Option(help="KV caches to compare, each beside fp32 weights: bf16, int8, fp8.")] = "int8",
    steps: Annotated[int | None, typer.Option(help="Train the byte model for so many steps instead of the recipe's.", min=1)] = None,
    windows: Annotated[int, typer.Option(help="Windows of 256 bytes of held-out text to score.", min=2)] = 512,
    backend: Annotated[str, typer.Option(help="Who computes: auto, native or torch.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads on a CPU.", min=1)] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Say what number formats cost: loss in bit per byte of a small model, trained here once in a few minutes and then kept."""
    from mlsys_bench.journeys import benchmark

    record = benchmark.quality(
        precision=precision, quantizer=quantizer, kv=kv, steps=steps, windows=windows, backend=backend, threads=threads,
        out=out, quiet=as_json,
    )  # fmt: skip
    show(record, as_json)
    raise typer.Exit(INTERRUPTED if record.stopped else 0)


@bench_app.command("list")
def list_benchmarks() -> None:
    """List the benchmarks by group, a line each, with unit and what a machine needs for it."""
    from mlsys_bench.report import lists

    typer.echo(lists.benchmarks())


@bench_app.command("scenario")
def scenario(name: Annotated[str, typer.Argument(help="A scenario.")]) -> None:
    """Measure the stages of a scenario.  (Not built yet.)"""
    raise NotBuilt(f"bench scenario {name}: stages beside the engine are not built yet; docs/roadmap.md says when")


def serve(
    model: Annotated[str, typer.Argument(help="nano, small-160m, tinyllama-1.1b, or the folder of a checkpoint.")] = "nano",
    precision: Annotated[
        str, typer.Option(help="fp32, bf16, int8, int4g32 ...; auto is the checkpoint's own, fp32 for built-in shapes.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cuda:0 or cpu.")] = "auto",
    replicas: Annotated[int, typer.Option(help="Engines behind one address; only 1 is built.", min=1)] = 1,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    max_batch: Annotated[int, typer.Option(help="Sequences decoded together.", min=1)] = 8,
    max_step_tokens: Annotated[int, typer.Option(help="Token budget of one step: prompts are cut into such chunks.", min=1)] = 256,
    max_context: Annotated[int, typer.Option(help="Longest prompt plus output, in tokens.", min=2)] = 1024,
    kv_tokens: Annotated[int | None, typer.Option(help="Tokens the KV cache holds.", min=16)] = None,
    queue_limit: Annotated[int, typer.Option(help="Requests that may wait before the server answers 429.", min=0)] = 64,
    threads: Annotated[int | None, typer.Option(help="Engine threads on a CPU; 1 is how profiles are measured.", min=1)] = None,
    backend: Annotated[str, typer.Option(help="Who computes: auto, native, torch or triton.")] = "auto",
    kv: Annotated[str, typer.Option(help="What the KV cache is kept in: auto, fp32, bf16, int8 or fp8.")] = "auto",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits whatever else is in the batch.")] = False,
    prefix_cache: Annotated[bool, typer.Option("--prefix-cache", help="Requests that begin alike share the KV cache of it.")] = False,
    swap: Annotated[bool, typer.Option("--swap", help="What a preempted sequence has cached waits in host memory.")] = False,
    speculate: Annotated[str | None, typer.Option(help="Guess tokens and verify them together: ngram:4, or a small model: nano:4.")] = None,
    step_log: Annotated[Path | None, typer.Option(help="Write a line per engine step here: what it computed, how long it took.")] = None,
    seed: Seed = 0,
) -> None:
    """Serve the built-in engine with an OpenAI-compatible API."""
    refuse({"--replicas above 1": replicas > 1})
    from mlsys_bench.journeys import benchmark

    benchmark.serve(
        model=model, precision=precision, device=device, host=host, port=port, max_batch=max_batch, max_step_tokens=max_step_tokens,
        max_context=max_context, kv_tokens=kv_tokens, queue_limit=queue_limit, threads=threads, step_log=step_log, seed=seed,
        backend=backend, kv=kv, deterministic=deterministic, prefix_cache=prefix_cache, swap=swap, speculate=speculate,
    )  # fmt: skip
