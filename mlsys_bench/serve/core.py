"""The engine process: `python -m mlsys_bench.serve.core OPTIONS FD`, started by the HTTP process and by nobody else.

One loop: take what was asked, step the engine, tell what came out.  It waits only when there is nothing to compute, and it ends when
the other side of the pipe is gone, however that happened.
"""

from __future__ import annotations

import functools
import gc
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from mlsys_bench import errors, models
from mlsys_bench.engine import schemes
from mlsys_bench.serve import embeddings, wire
from mlsys_bench.serve import options as serve_options
from mlsys_bench.serve.steplog import StepLog

if TYPE_CHECKING:
    from mlsys_bench.batching import StepFeatures
    from mlsys_bench.engine import Engine
    from mlsys_bench.engine.encoder import Encoder
    from mlsys_bench.engine.engine import StepReport

_CHUNK_BYTES = 1 << 16


class Core:
    """An engine at one end of a pipe."""

    def __init__(self, engine: Engine, pipe: socket.socket, log: StepLog | None = None) -> None:
        self._engine, self._pipe, self._log = engine, pipe, log
        self._frames = wire.Frames()
        self._engine_id: dict[int, int] = {}  # request -> engine's id
        self._request: dict[int, int] = {}  # and back

    def run(self, device: str) -> None:
        """Serve until told to stop, or until the other side is gone (EOFError, BrokenPipeError)."""
        self._send(wire.Ready(device, self._engine.free_blocks))
        while True:
            was_busy, begun_s, cpu_s = self._engine.busy, time.perf_counter(), time.thread_time()
            data = self._receive(was_busy)
            if not was_busy:
                begun_s, cpu_s = time.perf_counter(), time.thread_time()
            added, changed = 0, False
            for body in self._frames.feed(data):
                command = wire.commands.decode(body)
                if isinstance(command, wire.Stop):
                    return
                if isinstance(command, wire.Embed):
                    self._send(wire.Refused(id=command.id, message="this server runs a model that generates, not an encoder"))
                    continue
                added += isinstance(command, wire.Add)
                changed |= self._obey(command)
            if self._engine.busy:
                features = self._step()
                if self._log is not None:
                    self._log.write(begun_s, time.perf_counter(), was_busy, added, features, time.thread_time() - cpu_s)
            elif changed:
                self._send(self._stepped(None))

    def _receive(self, is_busy: bool) -> bytes:
        """Return what was asked meanwhile; wait for something when the engine has nothing to do."""
        try:
            data = self._pipe.recv(_CHUNK_BYTES, socket.MSG_DONTWAIT if is_busy else 0)
        except BlockingIOError:
            return b""
        if not data:
            raise EOFError
        return data

    def _obey(self, command: wire.Add | wire.Cancel) -> bool:
        """Do it; return whether the engine's state changed in a way that no step will report."""
        if isinstance(command, wire.Add):
            self._add(command)
            return False
        engine_id = self._engine_id.pop(command.id, None)
        if engine_id is None:  # it finished while the word was on its way
            return False
        del self._request[engine_id]
        self._engine.cancel(engine_id)
        return True

    def _add(self, command: wire.Add) -> None:
        try:
            engine_id = self._engine.add(
                command.prompt, max_tokens=command.max_tokens, sampling=command.sampling, ignore_eos=command.ignore_eos,
                priority=command.priority,
            )  # fmt: skip
        except errors.BadInput as error:
            self._send(wire.Refused(id=command.id, message=str(error)))
            return
        self._engine_id[command.id] = engine_id
        self._request[engine_id] = command.id

    def _step(self) -> StepFeatures:
        report = self._engine.step()
        self._send(self._stepped(report))
        for engine_id, _ in report.finished:
            del self._engine_id[self._request.pop(engine_id)]
        return report.features

    def _stepped(self, report: StepReport | None) -> wire.Stepped:
        engine = self._engine
        return wire.Stepped(
            step_s=report.step_s if report else None,
            tokens=tuple((self._request[i], token) for i, token in report.tokens) if report else (),
            finished=tuple((self._request[i], reason) for i, reason in report.finished) if report else (),
            preempted=len(report.preempted) if report else 0,
            prefix_queries=report.prefix_queries if report else 0,
            prefix_hits=report.prefix_hits if report else 0,
            drafted=report.drafted if report else 0,
            accepted=report.accepted if report else 0,
            free_blocks=engine.free_blocks,
            running=engine.running,
            waiting=engine.waiting,
            logprobs=report.logprobs if report else (),
        )

    def _send(self, event: wire.Event) -> None:
        self._pipe.sendall(wire.frame(event))


def build(options: serve_options.Options) -> Engine:
    """Return a warm engine: the first steps of a process, which allocate and choose kernels, are done."""
    from mlsys_bench.engine import Engine

    limits, place = serve_options.limits(options), serve_options.placement(options)
    serve_options.pin(place.engine_cores)
    shape = models.find(options.model)
    engine = Engine(
        shape, precision=options.precision, device=options.device, limits=limits, seed=options.seed, threads=place.threads,
        checkpoint=schemes.checkpoint_of(options.model), backend=options.backend, kv=options.kv, deterministic=options.deterministic,
        prefix_cache=options.prefix_cache, preempt=options.preempt, speculative=options.speculate, ahead=True,
    )  # fmt: skip
    room = min(limits.max_context, limits.blocks * limits.block_tokens)
    prompt = max(min(limits.max_step_tokens, room - 2), 1)
    engine.add([min(65, shape.vocab - 1)] * prompt, max_tokens=min(room - prompt, 2), ignore_eos=True)
    while engine.busy:
        engine.step()
    gc.freeze()  # the model's objects live as long as the process: collections need not visit them
    return engine


def build_encoder(options: serve_options.Options) -> Encoder:
    """Return a warm encoder."""
    from mlsys_bench.engine.encoder import Encoder

    place = serve_options.placement(options)
    serve_options.pin(place.engine_cores)
    encoder = Encoder(options.model, precision=options.precision, device=options.device, threads=place.threads)
    encoder.embed([[0] * min(encoder.shape.max_tokens, 64)])
    gc.freeze()
    return encoder


def with_device(options: serve_options.Options) -> serve_options.Options:
    """Return the options with 'auto' resolved: the first GPU that torch can use, or the CPU."""
    if options.device != "auto":
        return options
    from mlsys_bench.engine import memory

    try:
        return replace(options, device=str(memory.device_of("cuda:0")))
    except errors.MlsysError:  # its way of saying that there is none
        return replace(options, device="cpu")


def main(argv: list[str]) -> int:
    """Run the engine process on the socket whose number is the second argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the HTTP process decides when this one ends
    options = msgspec.json.decode(argv[0], type=serve_options.Options)
    with socket.socket(fileno=int(argv[1])) as pipe:
        try:
            options = with_device(options)
            log = StepLog.open(options.step_log)
            run: Callable[[str], None]
            if serve_options.is_encoder(options.model):
                run = functools.partial(embeddings.run, build_encoder(options), pipe)
            else:
                run = Core(build(options), pipe, log).run
        except errors.MlsysError as error:
            pipe.sendall(wire.frame(wire.Failed(message=str(error))))
            return error.exit_status
        try:
            run(options.device)
        except (EOFError, ConnectionError):
            return 0  # the HTTP process is gone: nobody is left to tell
        finally:
            if log is not None:
                log.close()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(status)  # torch's own teardown takes a second and has nothing to save
