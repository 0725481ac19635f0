"""The side that plans a load test, watches its worker and reads what it wrote.  No gevent in here."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import numpy as np

from mlsys_bench import units
from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import (
    Hosts,
    Options,
    Progress,
    auth,
    crew,
    fleet,
    job,
    outcome,
    own,
    payloads,
    serverside,
    shards,
    target,
    trust,
    window,
    words,
)
from mlsys_bench.loadtest import schedule as schedules
from mlsys_bench.loadtest.payloads import written
from mlsys_bench.loadtest.payloads.think import Think
from mlsys_bench.types import LoadTest, Requests

if TYPE_CHECKING:
    from mlsys_bench.workload import Schedule

_MOST_CONNECTIONS = 2048  # opened ahead; more are opened when needed


def schedule(options: Options) -> Schedule:
    """Return every request the run will send: when it is due and how long it is.  Raises BadInput where there is none."""
    _check(options)
    own.check(options)
    drawn = schedules.schedule(options)
    if not len(drawn.scheduled_s):
        raise BadInput(f"no request falls into {units.show_s(schedules.duration_s(options))}: ask for a longer duration or a higher rate")
    return drawn


def run(
    options: Options, on_progress: Callable[[Progress], bool | None] | None = None, on_note: Callable[[str], None] | None = None
) -> tuple[LoadTest, Requests]:
    """Probe the target, let workers load it, return what its users saw."""
    url, basic = auth.without_user(options.url)
    options = dataclasses.replace(options, url=url, headers=(*options.headers, *basic))
    plan = schedule(options)
    if importlib.util.find_spec("locust") is None:
        raise BadInput("load tests need Locust, which is not installed: pip install 'mlsys-bench[load]'")
    workers = _workers(options, on_note)  # they import Locust while we look at the target
    rows = [report.rows for report in workers.reports]
    given = contextlib.ExitStack()  # of files that carry what is too large for a line
    try:
        known = trust.load(options.calibration, busy_poll=options.busy_poll)
        found = own.target(options) if options.locustfile is not None else _probed(options)
        if on_note is not None:
            on_note(f"found {found.found}")
        work = _job(options, plan, found, _payload(options, plan, found, given))
        _import_for_the_end(options)
        watch = serverside.begin(
            options.metrics, base_url=serverside.base_url(found.scheme, found.host, found.port), address=found.address,
            headers=_own_headers(options), client=options.client,
            avoid_cores=[core for core in crew.cores(options.core, len(rows)) if core is not None],
        )  # fmt: skip
        with serverside.watching(watch) as seen:
            reports = workers.run(work, on_progress)
    except BaseException:
        _forget_empty(rows)
        raise
    finally:
        workers.end()
        given.close()
    for report in reports:
        report.records = shards.read_rows(report.rows)
    requests = Requests(t0_unix_s=max(r.t0_unix_s for r in reports), requests=shards.join([r.records for r in reports]))
    work, requests, steadiness = window.settle(options, work, requests, outcome.sent_until_s(work, reports))
    if options.requests_file is not None:
        _keep(options.requests_file, requests)
        shards.remove(rows)
    outcome.checked(reports, options.requests_file or ", ".join(map(str, rows)))
    shards.remove(rows)
    result = outcome.result(
        options, plan, found, work, reports, requests, offered_per_s=_offered_per_s(options, plan), known=known, steadiness=steadiness
    )
    return serverside.attach(result, seen, requests, warmup_s=work.warmup_s, model=found.model), requests


# ---------------------------------------------------------------- before


def _probed(options: Options) -> target.Target:
    """Return what is behind the URL."""
    return target.probe(
        options.url,
        endpoint=options.endpoint,
        model=options.model,
        api_key=options.api_key,
        timeout_s=min(options.timeout_s, 60.0),
        seed=options.seed,
        headers=options.headers,
        form=dataclasses.replace(options.form, streams=False) if not options.stream else options.form,
        client=options.client,
    )


def _own_headers(options: Options) -> tuple[tuple[str, str], ...]:
    """Return the headers of this run, the key among them."""
    return (*([("Authorization", f"Bearer {options.api_key}")] if options.api_key else []), *options.headers)


def _check(options: Options) -> None:
    target.parse(options.url)
    if [options.qps, options.users, options.trace, options.offline].count(None) != 3:
        raise BadInput("say how requests arrive: exactly one of --qps, --users and --trace")
    if options.qps is not None and not (math.isfinite(options.qps) and options.qps > 0):
        raise BadInput(f"--qps {options.qps:g}: a rate must be above zero")
    if options.users is not None and options.users < 1:
        raise BadInput(f"--users {options.users}: at least one user is needed")
    for name, value in (("duration", options.duration_s), ("timeout", options.timeout_s)):
        if not (math.isfinite(value) and value > 0):
            raise BadInput(f"--{name} {value:g}s: must be above zero")
    if options.at_once < 1 or (options.offline is not None and options.offline < 1):
        raise BadInput("at least one request is needed at once")
    if min(options.drain_s, options.think.mean_s if options.think else 0.0) < 0:
        raise BadInput("a drain or think time cannot be negative")
    if options.warmup_s is not None and not 0 <= options.warmup_s < schedules.duration_s(options):
        raise BadInput(f"--warmup {options.warmup_s:g}s: must lie within the {schedules.duration_s(options):g} s of the run")


def _warmup_s(options: Options) -> float:
    """Return the warm-up that was given; one that is to be found in the data is found after the run."""
    return options.warmup_s or 0.0


def _offered_per_s(options: Options, plan: Schedule) -> float | None:
    if options.users is not None or options.offline is not None:
        return None
    return options.qps if options.qps is not None else len(plan) / schedules.duration_s(options)


def _workers(options: Options, on_note: Callable[[str], None] | None) -> crew.Crew | fleet.Fleet:
    """Return worker processes that have begun to start."""
    hosts = options.hosts
    count = hosts.expect_workers if hosts else crew.how_many(options.processes, _host(options.url), options.users)
    if hosts and options.users is not None and options.users < count:
        raise BadInput(f"{count} workers cannot share {options.users} users: ask for more users or fewer workers")
    if options.busy_poll and not hosts and crew.spare_cores(count) < 1:
        raise BadInput(f"--busy-poll: {count} worker(s) would take a whole core each and leave none here for anything else; leave it out")
    cores = [] if hosts else crew.cores(options.core, count)
    rows = shards.files(options.requests_file, count)
    if hosts is None and options.web is None:
        return crew.Crew(rows, cores)
    where = hosts or Hosts(bind="127.0.0.1", port=0)
    orders = words.Orders(
        bind=where.bind, port=where.port, expect_workers=count, rows=[str(path) for path in rows], web=options.web,
        wait_s=where.wait_s, grace_s=where.grace_s,
    )  # fmt: skip
    return fleet.Fleet(orders, cores, on_note)


def _host(url: str) -> str:
    return urlsplit(url if "://" in url else f"http://{url}").hostname or ""


def _job(options: Options, plan: Schedule, found: target.Target, payload: payloads.Spec) -> job.Job:
    """Return the job of all workers together; each gets its share of it."""
    schedules.check_sockets(options)
    times = plan.scheduled_s[~np.isnan(plan.scheduled_s)]  # turns that wait for an answer have none, and come last
    offered = _offered_per_s(options, plan)
    ahead = (options.users or 0) * options.at_once or options.offline or min(len(times), 8 + math.ceil(2 * (offered or 0)))
    return job.Job(
        scheme=found.scheme,
        host=found.host,
        address=found.address,
        port=found.port,
        endpoint=found.endpoint,
        payload=payload,
        api_key=options.api_key,
        headers=[*found.endpoint.headers, *options.headers],
        transport="websocket" if found.is_websocket else "http",
        scheduled_s=[] if options.users else times.tolist(),
        users=options.users,
        think=options.think or Think(),
        busy_poll=options.busy_poll,
        at_once=options.at_once,
        duration_s=schedules.duration_s(options),
        warmup_s=_warmup_s(options),
        timeout_s=options.timeout_s if options.offline is None else max(options.timeout_s, options.duration_s),
        drain_s=options.drain_s if options.offline is None else options.duration_s,
        connections=min(ahead, _MOST_CONNECTIONS),
        client=options.client,
        proxy=found.proxy and dataclasses.replace(found.proxy, host=found.address),
        core=None,
        seed=options.seed,
        rows="",
    )


def _payload(options: Options, plan: Schedule, found: target.Target, given: contextlib.ExitStack) -> payloads.Spec:
    """Return what requests carry; where it is much it lies in a file while `given` is open.  Other hosts get it in full."""
    spec = written.spec(
        plan,
        chars=found.chars,
        chars_per_token=found.chars_per_token,
        seed=options.seed if options.content.same_words else int.from_bytes(os.urandom(5), "big"),
        data=options.content.dataset,
        images=options.content.images,
    )
    return given.enter_context(payloads.stowed(spec)) if options.hosts is None else spec


# ---------------------------------------------------------------- after


def _keep(requests_file: Path, requests: Requests) -> None:
    from mlsys_bench import hardware, record

    record.write(requests_file, requests, hardware.machine())


def _import_for_the_end(options: Options) -> None:
    """Import what only the end needs, while the workers still import Locust on cores of their own: later 0.5 s would be waited for."""
    importlib.import_module("scipy.special")
    if options.requests_file is not None:
        importlib.import_module("pyarrow.parquet")


def _forget_empty(rows: list[Path]) -> None:
    """Remove the files of a run that never began; what was measured stays where it is."""
    shards.remove([path for path in rows if path.exists() and not path.stat().st_size])
