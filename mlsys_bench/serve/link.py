"""The HTTP process's end of the pipe: requests go in, tokens come out of one queue per request."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from mlsys_bench import errors
from mlsys_bench.engine.sampling import Logprobs, Sampling
from mlsys_bench.serve import wire
from mlsys_bench.serve.options import Options

_STOP_S = 2.0


class Piece(NamedTuple):
    """A token of one choice, with the reason if it is the last one; or an error, which ends the request without a token."""

    token: int = -1
    reason: str | None = None
    error: str | None = None
    status: int = 503
    choice: int = 0
    logprobs: Logprobs | None = None
    vectors: bytes = b""  # of an encoder


class Generation:
    """One request's choices in the engine.  `next` gives what has come since it was asked last."""

    def __init__(self, ids: tuple[int, ...]) -> None:
        self.ids = ids  # of its choices
        self._pieces: list[Piece] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, piece: Piece) -> None:
        """Add what came out."""
        self._pieces.append(piece)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def next(self) -> list[Piece]:
        """Wait for pieces, and return all there are: when the engine is faster than the client reads, they are written together."""
        if not self._pieces:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        pieces, self._pieces = self._pieces, []
        return pieces


class State(NamedTuple):
    """The engine as it last reported."""

    free_blocks: int = 0
    running: int = 0
    waiting: int = 0


class Link(asyncio.Protocol):
    """Starts the engine process, speaks to it, and notices when it dies."""

    def __init__(self, on_step: Callable[[wire.Stepped], None]) -> None:
        self.state = State()
        self.dead: str | None = None  # why, once it is
        self.on_death: Callable[[], object] = lambda: None
        self._on_step = on_step
        self._requests: dict[int, tuple[Generation, int]] = {}  # and which of its choices
        self._ids = itertools.count(1)
        self._frames = wire.Frames()
        self._is_ready = self._is_stopping = False
        self._transport: asyncio.Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self, options: Options) -> wire.Ready:
        """Start the engine process and wait until it is ready."""
        self._ready: asyncio.Future[wire.Ready] = asyncio.get_running_loop().create_future()
        ours, theirs = socket.socketpair()
        with theirs:
            # its own session, so that Ctrl-C in a terminal reaches only the HTTP process, which ends it in order
            command = [sys.executable, "-m", "mlsys_bench.serve.core", msgspec.json.encode(options).decode(), str(theirs.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True)
        transport, _ = await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)
        self._transport = transport
        return await self._ready

    # ------------------------------------------------------------ requests

    @property
    def pid(self) -> int:
        """Of the engine process."""
        assert self._process is not None
        return self._process.pid

    @property
    def in_flight(self) -> int:
        """Sequences given to the engine and not finished: one for each choice of a request."""
        return len(self._requests)

    def submit(
        self, prompt: tuple[int, ...], *, max_tokens: int, choices: Sequence[Sampling], ignore_eos: bool, priority: int = 0
    ) -> Generation:
        """Give the engine a request, one sequence for each of its choices."""
        generation = Generation(tuple(next(self._ids) for _ in choices))
        if self.dead is not None:
            generation.put(Piece(error=self.dead))
            return generation
        asked = zip(generation.ids, choices, strict=True)
        frames = [wire.frame(wire.Add(request_id, prompt, max_tokens, how, ignore_eos, priority)) for request_id, how in asked]
        for choice, (request_id, frame) in enumerate(zip(generation.ids, frames, strict=True)):  # all of them fit into a frame
            self._requests[request_id] = (generation, choice)
            self._write(frame)
        return generation

    def embed(self, texts: tuple[tuple[int, ...], ...]) -> Generation:
        """Give an encoder texts; one piece comes, with their vectors."""
        generation = Generation((next(self._ids),))
        if self.dead is not None:
            generation.put(Piece(error=self.dead))
            return generation
        frame = wire.frame(wire.Embed(generation.ids[0], texts))
        self._requests[generation.ids[0]] = (generation, 0)
        self._write(frame)
        return generation

    def cancel(self, generation: Generation, why: str = "cancelled") -> None:
        """Take back what of a request still runs; its blocks are free one step later."""
        for request_id in generation.ids:
            if self._requests.pop(request_id, None) is not None:
                generation.put(Piece(error=why))
                self._write(wire.frame(wire.Cancel(request_id)))

    def cancel_all(self, why: str) -> None:
        """Take every request back."""
        for generation, _ in list(self._requests.values()):
            self.cancel(generation, why)

    def _write(self, frame: bytes) -> None:
        if self.dead is None and self._transport is not None and not self._transport.is_closing():
            self._transport.write(frame)

    # ------------------------------------------------------------ what the engine says

    def data_received(self, data: bytes) -> None:
        """Hand on what arrived."""
        for body in self._frames.feed(data):
            event = wire.events.decode(body)
            match event:
                case wire.Stepped():
                    self._deliver(event)
                case wire.Ready():
                    self.state = State(free_blocks=event.free_blocks)
                    self._is_ready = True
                    self._ready.set_result(event)
                case wire.Failed():
                    self._ready.set_exception(errors.BadInput(event.message))
                case wire.Embedded():
                    self._end(event.id, Piece(vectors=event.vectors))
                case wire.Refused():
                    self._end(event.id, Piece(error=event.message, status=400))

    def _deliver(self, event: wire.Stepped) -> None:
        """Hand each token to its request; the reason of an end goes with the last one."""
        last = dict(event.finished)
        at = {request_id: i for i, (request_id, _) in enumerate(event.tokens)} if last else {}
        for i, (request_id, token) in enumerate(event.tokens):
            found = self._requests.get(request_id)
            if found is None:  # it was taken back and the word is still on its way
                continue
            generation, choice = found
            reason = last.get(request_id) if at.get(request_id) == i else None
            if reason is not None:
                del self._requests[request_id]
            generation.put(Piece(token, reason, choice=choice, logprobs=event.logprobs[i] if event.logprobs else None))
        self.state = State(free_blocks=event.free_blocks, running=event.running, waiting=event.waiting)
        self._on_step(event)

    def _end(self, request_id: int, piece: Piece) -> None:
        found = self._requests.pop(request_id, None)
        if found is not None:
            found[0].put(piece)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell everyone that the engine is gone."""
        if self._is_stopping:
            return
        assert self._process is not None
        self.dead = f"the engine process is gone ({_ended(self._process)})"
        if not self._ready.done():
            self._ready.set_exception(errors.MeasurementFailed(f"{self.dead} before it was ready; its own message is above"))
        for request_id in list(self._requests):
            self._end(request_id, Piece(error=self.dead))
        self.on_death()

    # ------------------------------------------------------------ the end

    def stop(self) -> None:
        """End the engine process and wait until it is gone."""
        self._is_stopping = True
        if self._process is None:
            return
        if self._is_ready:
            self._write(wire.frame(wire.Stop()))
        else:
            self._process.kill()  # still loading: it would not listen for seconds, and has nothing to lose
        if self._transport is not None:
            self._transport.close()
        _ended(self._process)


def _ended(process: subprocess.Popen[bytes]) -> str:
    """Return how a process ended; one that does not, is killed."""
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    code = process.returncode
    return f"signal {-code}" if code < 0 else f"exit status {code}"
