"""loadtest over several processes and hosts: from options as typed to workers, a master, a worker elsewhere, manifests."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Literal

from mlsys_bench import errors, loadtest
from mlsys_bench.errors import BadInput
from mlsys_bench.journeys.progress import Line
from mlsys_bench.loadtest import auth, crew, fleet, manifests, target
from mlsys_bench.loadtest.auth import Headers


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Who sends, as typed."""

    processes: str = "1"
    master: bool = False
    expect_workers: int | None = None
    bind: str | None = None
    port: int | None = None
    web: bool = False
    web_address: str | None = None


def scaled(plan: loadtest.Options, asked: Asked) -> loadtest.Options:
    """Return a load test with the processes and hosts that were asked for."""
    given = {"--expect-workers": asked.expect_workers, "--bind": asked.bind, "--port": asked.port}
    alone = [name for name, value in given.items() if value is not None and not asked.master]
    if alone:
        raise BadInput(f"{alone[0]} belongs to --master: without it the load is sent from here")
    if asked.master and asked.processes != "1":
        raise BadInput("--processes belongs to the workers of a --master, not to the master: it sends nothing")
    if asked.web_address is not None and not asked.web:
        raise BadInput("--web-address belongs to --web")
    hosts = loadtest.Hosts(expect_workers=asked.expect_workers or 1, bind=asked.bind or "*", port=asked.port or 5557)
    return dataclasses.replace(
        plan,
        processes=_processes(asked.processes),
        hosts=hosts if asked.master else None,
        web=_address(asked.web_address or "127.0.0.1:8089") if asked.web else None,
    )


NOT_EXPORTED = (  # options of this machine, or that the manifests set themselves
    "export", "image", "processes", "master", "expect_workers", "bind", "port", "web", "web_address", "out", "html", "md", "as_json",
    "dry_run",
)  # fmt: skip


def exported(asked: str, plan: loadtest.Options, words: list[str], *, image: str | None, workers: int | None) -> str:
    """Write what `--export k8s[:DIR]` asks for and say where it is, and what to do with it."""
    from mlsys_bench import __version__
    from mlsys_bench.plan.export import files

    kind, _, folder = asked.partition(":")
    if kind != "k8s":
        raise errors.unknown("export", kind, ["k8s"])
    if crew.is_loopback(target.parse(plan.url).hostname or ""):
        raise BadInput(f"--export k8s: {plan.url} is this machine, which pods cannot reach; name the server's Service")
    url, own = auth.without_user(plan.url)
    run = manifests.run(
        words,
        target=url,
        name=None,
        image=image or f"mlsys-bench:{__version__}",
        workers=workers or 2,
        lasts_s=plan.duration_s + plan.drain_s + plan.timeout_s,
        is_secret_url=bool(own),
    )
    heading = manifests.heading(run)
    path = files.save(asked, folder, f"{run.name}-k8s.yaml", files.yaml_of(manifests.documents(run), heading))
    return "\n".join([f"{path}: one master and {run.workers} workers, image {run.image}", *heading[1:]])


def lend(master: str, processes: str, *, headers: Headers = (), quiet: bool = False) -> None:
    """Send for a master elsewhere until its run is over."""
    from mlsys_bench.journeys import load

    host, port = fleet.address(master)
    count = crew.how_many(_processes(processes), "", None)
    line = Line(quiet)
    line.note(f"waiting for the master at {host}:{port}")
    try:
        fleet.join(
            host,
            port,
            crew.cores("auto", count),
            folder=Path(tempfile.gettempdir()),
            headers=headers,
            on_progress=lambda p: line.show(load.progress(p)),
            on_note=line.note,
        )
    finally:
        line.clear()


def _processes(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"--processes {text}: give a number of worker processes, or auto for one per core")
    return int(text)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise BadInput(f"--web-address {text}: write it as HOST:PORT, e.g. 127.0.0.1:8089")
    return host.strip("[]") or "127.0.0.1", int(port)
