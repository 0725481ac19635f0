"""The HTTP process's end of the pipe: requests go in, tokens come out of one queue per request."""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from mlsys_bench import errors
from mlsys_bench.serve import wire
from mlsys_bench.serve.options import Options

_STOP_S = 2.0


class Piece(NamedTuple):
    """A token, with the reason if it is the last one; or an error, which ends the request without a token."""

    token: int = -1
    reason: str | None = None
    error: str | None = None
    status: int = 503


class Generation:
    """One request in the engine.  `next` gives its tokens one at a time."""

    def __init__(self, request_id: int) -> None:
        self.id = request_id
        self._pieces: asyncio.Queue[Piece] = asyncio.Queue()

    def put(self, piece: Piece) -> None:
        """Add what came out."""
        self._pieces.put_nowait(piece)

    async def next(self) -> Piece:
        """Wait for the next piece."""
        return await self._pieces.get()


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
        self._requests: dict[int, Generation] = {}
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
        """Requests given to the engine and not finished."""
        return len(self._requests)

    def submit(self, prompt: tuple[int, ...], sampling: wire.Sampling) -> Generation:
        """Give the engine a request."""
        generation = Generation(next(self._ids))
        if self.dead is not None:
            generation.put(Piece(error=self.dead))
            return generation
        self._requests[generation.id] = generation
        self._send(wire.Add(generation.id, prompt, sampling))
        return generation

    def cancel(self, generation: Generation, why: str = "cancelled") -> None:
        """Take a request back, if it still runs; its blocks are free one step later."""
        if self._requests.pop(generation.id, None) is not None:
            generation.put(Piece(error=why))
            self._send(wire.Cancel(generation.id))

    def cancel_all(self, why: str) -> None:
        """Take every request back."""
        for generation in list(self._requests.values()):
            self.cancel(generation, why)

    def _send(self, command: wire.Command) -> None:
        if self.dead is None and self._transport is not None:
            self._transport.write(wire.frame(command))

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
                case wire.Refused():
                    self._end(event.id, Piece(error=event.message, status=400))

    def _deliver(self, event: wire.Stepped) -> None:
        """Put each token into its request's queue.  A request gets one token per step, so its end belongs to that token."""
        reasons = dict(event.finished)
        for request_id, token in event.tokens:
            reason = reasons.get(request_id)
            generation = self._requests.get(request_id) if reason is None else self._requests.pop(request_id, None)
            if generation is not None:  # else it was taken back and the word is still on its way
                generation.put(Piece(token, reason))
        self.state = State(free_blocks=event.free_blocks, running=event.running, waiting=event.waiting)
        self._on_step(event)

    def _end(self, request_id: int, piece: Piece) -> None:
        generation = self._requests.pop(request_id, None)
        if generation is not None:
            generation.put(piece)

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
            self._send(wire.Stop())
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
