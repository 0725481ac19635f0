"""The HTTP process: bind, start the engine, serve until told to stop."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from dataclasses import replace
from types import FrameType
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette

from mlsys_bench import errors, hardware, models
from mlsys_bench.engine import schemes
from mlsys_bench.engine.tokenizer import open_tokenizer
from mlsys_bench.serve import app
from mlsys_bench.serve import options as serve_options
from mlsys_bench.serve.link import Link
from mlsys_bench.serve.metrics import Metrics
from mlsys_bench.serve.options import Options, Placement
from mlsys_bench.types import Layout

_DRAIN_S = 4.0  # in-flight requests may end by themselves for so long, then they are cut
_FAREWELL_S = 2.0  # after the engine's death the server still answers (503) for so long, so that whoever asks learns why
_BACKLOG = 1024


def run(options: Options) -> None:
    """Serve until SIGINT or SIGTERM.  Raises BadInput before anything starts, and MeasurementFailed when the engine dies."""
    serve_options.check(options)
    options = serve_options.settled(options)
    with bind(options.host, options.port) as listener:
        _end_quietly_on_signals()
        asyncio.run(_serve(replace(options, port=listener.getsockname()[1]), listener))


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket.  Listening at once, not when the model is loaded, is what makes a second server fail at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise errors.BadInput(f"{host}:{port}: cannot listen there: {error.strerror}; give another --host") from None
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        is_elsewhere = error.errno == errno.EADDRNOTAVAIL
        cure = "give an address of this machine as --host" if is_elsewhere else "stop what uses it or give another --port"
        raise errors.BadInput(f"{host}:{port}: cannot listen there: {error.strerror}; {cure}") from None
    return listener


def _end_quietly_on_signals() -> None:
    """Make SIGINT and SIGTERM end this process with status 0, whenever they come."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)


async def _serve(options: Options, listener: socket.socket) -> None:
    metrics = Metrics()
    link = Link(metrics.on_step)
    tokenizer = open_tokenizer(schemes.checkpoint_of(options.model), models.find(options.model).vocab)
    if not serve_options.is_encoder(options.model):
        tokenizer.stream()  # one that cannot write says so now, not to every request
    try:
        ready = await link.start(options)
        options = replace(options, device=ready.device)
        place, limits = serve_options.placement(options), serve_options.limits(options)
        serve_options.pin(place.http_cores)
        metrics.blocks.set(limits.blocks)
        metrics.free_blocks.set(ready.free_blocks)
        served = app.Served(
            layout=layout_of(options, place),
            limits=limits,
            queue_limit=options.queue_limit,
            tokenizer=tokenizer,
            text_tokens=ready.text_tokens,
            process={"pid": os.getpid(), "engine_pid": link.pid, "http_cores": place.http_cores},
        )
        server = _Server(app.create(served, link, metrics), link, ready_line(options, place), options.stop_with_stdin)
        await server.serve(sockets=[listener])
    finally:
        link.stop()
    if link.dead is not None:
        raise errors.MeasurementFailed(f"{link.dead}; what it said last is above, and /health told so for {_FAREWELL_S:g} s")


def layout_of(options: Options, place: Placement) -> Layout:
    """Return the layout that this server's latencies belong to, with the device by its name in the catalogue."""
    return Layout(
        model=models.find(options.model).id,
        precision=options.precision,
        device=_device_name(options.device),
        threads=place.threads,
        pinned_cores=place.engine_cores,
    )


def _device_name(device: str) -> str:
    """Return 'cpu', or a GPU's catalogue id, or what its driver calls it when the catalogue does not know it."""
    gpus = hardware.nvml_gpus()
    if device == "cpu" or isinstance(gpus, str):
        return device
    name = str(gpus[int(device.partition(":")[2] or 0)]["name"])
    try:
        return hardware.find(name).id
    except errors.UnknownName:
        return name


def ready_line(options: Options, place: Placement) -> str:
    """Return the line that says that requests are answered now."""
    threads = f"{place.threads} thread{'s' * (place.threads > 1)}"
    cores = place.engine_cores or ()
    where = f", core{'s' * (len(cores) > 1)} {'+'.join(map(str, cores))}" if cores else ""
    host = f"[{options.host}]" if ":" in options.host else options.host
    return f"mlsys serve: {options.model} {options.precision} on {options.device} ({threads}{where}) at http://{host}:{options.port}"


class _Server(uvicorn.Server):
    """Uvicorn, with our ready line, our farewell when the engine dies, and a limit on how long requests may hold up the end."""

    def __init__(self, application: Starlette, link: Link, ready: str, stop_with_stdin: bool) -> None:
        # The same event loop and parser everywhere: a profile measured over HTTP must not depend on what else is installed.
        super().__init__(
            uvicorn.Config(
                application,
                loop="asyncio",
                http="h11",
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="error",
                backlog=_BACKLOG,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=round(_DRAIN_S) + 1,
            )
        )
        self._link, self._ready, self._stop_with_stdin = link, ready, stop_with_stdin

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        loop = asyncio.get_running_loop()
        self._link.on_death = lambda: loop.call_later(_FAREWELL_S, self._leave)
        if self._stop_with_stdin:
            loop.add_reader(sys.stdin.fileno(), self._read_stdin, loop)
        sys.stdout.write(self._ready + "\n")
        sys.stdout.flush()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # asked twice: what is under way is cut off, of which the log need not tell
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        cut = asyncio.get_running_loop().call_later(_DRAIN_S, self._link.cancel_all, "the server is shutting down")
        await super().shutdown(sockets)
        cut.cancel()

    def _leave(self) -> None:
        self.should_exit = True

    def _read_stdin(self, loop: asyncio.AbstractEventLoop) -> None:
        if not os.read(sys.stdin.fileno(), 1):
            loop.remove_reader(sys.stdin.fileno())
            self._leave()


def main(argv: list[str]) -> int:
    """`python -m mlsys_bench.serve [OPTIONS AS JSON]`: what goes wrong is one line on stderr and an exit status."""
    try:
        run(options_from(argv[0]) if argv else Options())
    except errors.MlsysError as error:
        sys.stderr.write(f"mlsys serve: {error}\n")
        return error.exit_status
    return 0


def options_from(text: str) -> Options:
    """Return the options in a JSON object; one that is unknown is an error."""
    try:
        given = msgspec.json.decode(text, type=dict[str, Any])
        for name in given:
            if name not in Options.__dataclass_fields__:
                raise errors.unknown("option", name, Options.__dataclass_fields__)
        return msgspec.convert(given, Options)
    except msgspec.MsgspecError as error:
        raise errors.BadInput(f"options {text!r}: {error}") from None
