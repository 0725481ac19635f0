"""The command that loads a server: loadtest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlsys_bench import ahead
from mlsys_cli import typed
from mlsys_cli.grouped import grouped
from mlsys_cli.headings import LOADTEST
from mlsys_cli.options import Arrivals, AsJson, Html, Markdown, OutputTokens, PromptTokens, Qps, Seed, Slo
from mlsys_cli.show import alone, show, together, writable


def register(app: typer.Typer) -> None:
    """Add this command to the door."""
    app.command(cls=grouped(LOADTEST))(loadtest)


def loadtest(
    context: typer.Context,
    target: Annotated[str | None, typer.Argument(help="URL of an OpenAI-compatible server.")] = None,
    qps: Qps = None,
    users: Annotated[int | None, typer.Option(help="Closed loop: users who wait for each answer.", min=1)] = None,
    trace: Annotated[Path | None, typer.Option(help="Replay this trace: CSV, JSON lines or our requests file; --qps stretches it.")] = None,
    start: Annotated[str | None, typer.Option(help="Leave out what the trace holds before, e.g. 10min.")] = None,
    end: Annotated[str | None, typer.Option(help="Leave out what the trace holds after.")] = None,
    speed: Annotated[float | None, typer.Option(help="Let the trace run so many times as fast.")] = None,
    time_column: Annotated[str | None, typer.Option(help="Column of arrival times.")] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column of prompt tokens.")] = None,
    output_column: Annotated[str | None, typer.Option(help="Column of output tokens.")] = None,
    hash_column: Annotated[str | None, typer.Option(help="Column of the hashes of prefix blocks.")] = None,
    session_column: Annotated[str | None, typer.Option(help="Column of sessions.")] = None,
    tenant_column: Annotated[str | None, typer.Option(help="Column of tenants.")] = None,
    time_unit: Annotated[str | None, typer.Option(help="s, ms, us or ns, where the column does not tell.")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="Tokens of a prefix block; found from the data when left out.", min=1)] = None,
    preset: Annotated[str | None, typer.Option(help="MLPerf's single-stream, multi-stream, server (with --qps) or offline.")] = None,
    requests: Annotated[int | None, typer.Option(help="Requests of --preset offline, all sent at once.  [default: 24576]", min=1)] = None,
    think: Annotated[str | None, typer.Option(help="Pause of a user: 2s, exponential:2s, lognormal:MEAN:CV or uniform:MEAN:CV.")] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Latency and goodput at rising rates, with the knee.")] = False,
    rates: Annotated[str | None, typer.Option(help="Rates of --sweep, 1,2,4,8 or 1..64.  [default: around the capacity]")] = None,
    points: Annotated[int | None, typer.Option(help="Levels of --sweep.  [default: 10]", min=2, max=200)] = None,
    find_max: Annotated[bool, typer.Option("--find-max", help="The highest rate within --slo, with its interval.")] = False,
    budget: Annotated[str | None, typer.Option(help="Time for --sweep, --find-max or --calibrate.  [default: 2m]")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="How fast this machine's client can be trusted; no URL needed.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="Result of --calibrate.  [default: the last one here]", dir_okay=False)] = None,
    arrivals: Arrivals = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    lengths_from: Annotated[Path | None, typer.Option(help="Draw prompt and output lengths in pairs from this trace.")] = None,
    shared_prefix: Annotated[
        str | None, typer.Option(help="Tokens put before prompts, TOKENS[:GROUPS[:SHARE]]: 1000 or 1000:4:80%.")
    ] = None,
    turns: Annotated[str | None, typer.Option(help="Sessions of so many turns, 5 or uniform:5:0.3; they carry the answers.")] = None,
    gap: Annotated[str | None, typer.Option(help="Mean pause in a session after an answer, e.g. 3s.")] = None,
    tenant: Annotated[
        list[str] | None, typer.Option(help="NAME[:PRIORITY]=SHARE@PROMPT/OUTPUT, e.g. chat=70%@512/200; repeatable.")
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Prompts from a file: JSON lines, ShareGPT, OpenAI messages, Parquet, CSV, text.", dir_okay=False)
    ] = None,
    field: Annotated[str | None, typer.Option(help="Field of the data set that holds the prompt or the messages.")] = None,
    shuffle: Annotated[bool, typer.Option("--shuffle", help="Send the rows of the data set in a random order.")] = False,
    images: Annotated[Path | None, typer.Option(help="Image or folder of images that requests carry in turn.")] = None,
    image_size: Annotated[str | None, typer.Option(help="Make up images of this size, e.g. 512x512.")] = None,
    images_per_request: Annotated[int, typer.Option(help="Images of each request.", min=1)] = 1,
    same_words: Annotated[
        bool, typer.Option("--same-words", help="Send the words of earlier runs with this seed; a prefix cache may have them.")
    ] = False,
    model: Annotated[str | None, typer.Option("--model", help="Model to ask for; the first of /v1/models when left out.")] = None,
    endpoint: Annotated[
        str, typer.Option(help="auto, or a kind of API: completions, chat, responses, embeddings, rerank, kserve, torchserve, http, …")
    ] = "auto",
    path: Annotated[str | None, typer.Option(help="Path in place of the endpoint's own.")] = None,
    method: Annotated[str, typer.Option(help="HTTP method.")] = "POST",
    stream: Annotated[bool | None, typer.Option("--stream/--no-stream", help="Answers token by token, or whole.")] = None,
    batch: Annotated[int, typer.Option(help="Texts, documents or rows in one request.", min=1)] = 1,
    body_template: Annotated[Path | None, typer.Option(help="Jinja template of the body, for --endpoint http.")] = None,
    response_path: Annotated[str | None, typer.Option(help="JSONPath of the text in an answer or event, e.g. '$.x.y'.")] = None,
    finish_path: Annotated[str | None, typer.Option(help="JSONPath of what only the last event has.")] = None,
    usage_path: Annotated[str | None, typer.Option(help="JSONPath of the output tokens so far.")] = None,
    input_: Annotated[
        list[str] | None, typer.Option("--input", help="A tensor of kserve or tfserving, NAME:DATATYPE:SHAPE (repeatable).")
    ] = None,
    binary: Annotated[bool, typer.Option("--binary", help="Send kserve's tensors as binary data.")] = False,
    usage_per_event: Annotated[bool, typer.Option("--usage-per-event", help="Ask the server to count the tokens of each event.")] = False,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json that counts where the server does not.")] = None,
    header: Annotated[list[str] | None, typer.Option(help="'Name: value' of every request (repeatable); never stored.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Variable that holds the API key.")] = None,
    auth_file: Annotated[Path | None, typer.Option(help="File with a token or with header lines.")] = None,
    connect_timeout: Annotated[str | None, typer.Option(help="Longest wait for a connection.")] = None,
    first_byte_timeout: Annotated[str | None, typer.Option(help="Longest wait for an answer to begin.")] = None,
    retries: Annotated[int, typer.Option(help="Second attempts where the server refuses or breaks off; latency counts them all.")] = 0,
    cancel: Annotated[str | None, typer.Option(help="Give up a share of requests: 10%@2s, 10%@1s..5s, or 5%@20 (events).")] = None,
    keep_alive: Annotated[bool, typer.Option("--keep-alive/--no-keep-alive", help="Use a connection again, or open one each.")] = True,
    ca_file: Annotated[Path | None, typer.Option(help="Certificates to trust, PEM.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Trust any certificate.")] = False,
    proxy: Annotated[str | None, typer.Option(help="HTTP proxy, or none.  [default: HTTP_PROXY, HTTPS_PROXY, NO_PROXY]")] = None,
    locustfile: Annotated[Path | None, typer.Option(help="Your own Locust users send instead; with --users.")] = None,
    duration: Annotated[
        str | None, typer.Option(help="How long requests are sent.  [default: 60s; as long as stages, a series or a preset]")
    ] = None,
    warmup: Annotated[str, typer.Option(help="auto, or a duration left out of the figures.")] = "auto",
    timeout: Annotated[str, typer.Option(help="Longest wait for one answer.")] = "60s",
    metrics: Annotated[list[str] | None, typer.Option(help="The server's own metrics: auto, off, or page URLs (repeatable).")] = None,
    slo: Slo = None,
    repeats: Annotated[int, typer.Option(help="Run it so often, each with the next seed; shows how far runs lie apart.", min=1)] = 1,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the schedule and send nothing.")] = False,
    web: Annotated[bool, typer.Option("--web", help="Show the run in Locust's web UI while it lasts.")] = False,
    web_address: Annotated[str | None, typer.Option(help="Where the web UI listens.  [default: 127.0.0.1:8089]")] = None,
    processes: Annotated[str, typer.Option(help="Worker processes that share the one schedule, or auto: one per core.")] = "1",
    busy_poll: Annotated[bool, typer.Option("--busy-poll", help="Workers never sleep: truer stamps, for a core of its own each.")] = False,
    master: Annotated[bool, typer.Option("--master", help="Let workers on other hosts send; this one leads them.")] = False,
    expect_workers: Annotated[int | None, typer.Option(help="Worker processes a --master waits for.  [default: 1]", min=1)] = None,
    bind: Annotated[str | None, typer.Option(help="Address a --master listens on.  [default: * (all)]")] = None,
    port: Annotated[int | None, typer.Option(help="Port a --master listens on.  [default: 5557]", min=1, max=65535)] = None,
    worker: Annotated[
        str | None, typer.Option("--worker", help="Send for the master at HOST[:PORT], whose options hold, save keys.")
    ] = None,
    export: Annotated[str | None, typer.Option(help="k8s[:DIR]: write manifests of this run over several pods; send nothing.")] = None,
    image: Annotated[str | None, typer.Option(help="Container image of the exported pods.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the summary here, the requests beside it (.parquet).")] = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write a table of the requests.", dir_okay=False)] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write the run as one picture for a slide.", dir_okay=False)] = None,
    html: Html = None,
    md: Markdown = None,
    as_json: AsJson = False,
) -> None:
    """Load-test any OpenAI-compatible server; latency counts from the scheduled send."""
    if target is not None and not (dry_run or worker or master or web or export):
        ahead.start("mlsys_bench.loadtest.worker")  # it imports Locust for a second, we ourselves for half of one
    writable(html, md)
    if calibrate:
        alone("--calibrate", context, ("calibrate", "budget", "arrivals", "processes", "busy_poll", "seed", "out", "html", "md", "as_json"))
        from mlsys_bench.journeys import calibrating

        found = calibrating.run(
            budget=budget or "60s", arrivals=arrivals, processes=processes, busy_poll=busy_poll, seed=seed, out=out, quiet=as_json
        )
        show(found, as_json, html=html, md=md)
        raise typer.Exit(calibrating.exit_status(found))
    from mlsys_bench.journeys import asking, limits, load, spread
    from mlsys_bench.loadtest import auth, client, form

    if sweep or find_max:
        qps = limits.rate_of_none({
            "--sweep beside --find-max": sweep and find_max, "--qps": qps, "--users": users, "--trace": trace, "--preset": preset,
            "--repeats": repeats > 1, "--dry-run": dry_run, "--web": web, "--master": master, "--export": export, "--csv": csv,
            "--png": png, "--locustfile": locustfile, "--warmup": warmup != "auto", "--duration beside --find-max": find_max and duration,
            "--rates or --points beside --find-max": find_max and (rates or points),
        })  # fmt: skip
    else:
        together("--sweep", {"--rates": rates, "--points": points})
        together("--sweep, --find-max or --calibrate", {"--budget": not calibrate and budget})
    together("--export", {"--image": export is None and image})
    if worker is not None:
        alone("--worker", context, ("worker", "processes", "header", "api_key_env", "auth_file", "as_json"))
        own = auth.headers(header or (), key_variable=api_key_env, file=auth_file)
        spread.lend(worker, processes, headers=own, quiet=as_json)
        return
    traced = asking.Traced(
        file=trace, start=start, end=end, speed=speed, time_unit=time_unit, block_tokens=block_tokens,
        columns={
            "time": time_column, "prompt": prompt_column, "output": output_column, "hash": hash_column, "session": session_column,
            "tenant": tenant_column,
        },
    )  # fmt: skip
    carried = asking.Carried(
        lengths_from=lengths_from, shared_prefix=shared_prefix, turns=turns, gap=gap, tenants=tenant or (), dataset=dataset, field=field,
        shuffle=shuffle, images=images, image_size=image_size, images_per_request=images_per_request,
        same_words=same_words,
    )  # fmt: skip
    plan = load.options(
        target=load.target(target), qps=qps, users=users, traced=traced, carried=carried, preset=preset, requests=requests, think=think,
        arrivals=arrivals, prompt_tokens=prompt_tokens, output_tokens=output_tokens,
        model=model, endpoint=endpoint, duration=duration, warmup=warmup, timeout=timeout, slo=slo, seed=seed,
        metrics=metrics,
        form=form.checked(
            path=path, method=method, streams=stream, batch=batch, body_template=body_template, response_path=response_path,
            finish_path=finish_path, usage_path=usage_path, inputs=tuple(input_ or ()), binary=binary, usage_per_event=usage_per_event,
            tokenizer=tokenizer,
        ),
        client=client.checked(
            connect_timeout=connect_timeout, first_byte_timeout=first_byte_timeout, retries=retries, cancel=cancel, keep_alive=keep_alive,
            ca_file=ca_file, insecure=insecure, proxy=proxy,
        ),
        headers=auth.headers(header or (), key_variable=api_key_env, file=auth_file) if export is None else (), locustfile=locustfile,
        calibration=calibration, busy_poll=busy_poll,
    )  # fmt: skip
    plan = spread.scaled(
        plan,
        spread.Asked(
            processes=processes, master=master or export is not None, expect_workers=expect_workers, bind=bind, port=port, web=web,
            web_address=web_address,
        ),
    )  # fmt: skip
    if export is not None:
        typer.echo(spread.exported(export, plan, typed.words(context, *spread.NOT_EXPORTED), image=image, workers=expect_workers))
        return
    if sweep:
        curve = limits.sweep(plan, rates=rates, points=points, duration=duration, budget=budget, out=out, quiet=as_json)
        show(curve, as_json, html=html, md=md)
        raise typer.Exit(limits.sweep_status(curve))
    if find_max:
        highest = limits.find_max(plan, budget=budget, out=out, quiet=as_json)
        show(highest, as_json, html=html, md=md)
        raise typer.Exit(limits.max_status(highest))
    if dry_run:
        typer.echo(load.dry_run(plan, out=out, as_json=as_json))
        return
    result = load.run(plan, out=out, quiet=as_json, repeats=repeats, csv=csv, png=png)
    show(result, as_json, html=html, md=md)
    raise typer.Exit(load.exit_status(result))
