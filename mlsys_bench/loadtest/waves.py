"""A few requests sent together to an idle server, and when each of their tokens came.  Only the standard library; no schedule, no Locust.

For measuring a server from outside: while all requests of a wave decode, the gap between tokens is the server's step at that batch.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import ssl
import time
from collections.abc import Iterator, Sequence

from mlsys_bench.errors import MeasurementFailed
from mlsys_bench.loadtest import answers, prompts, wire
from mlsys_bench.loadtest.client import authority
from mlsys_bench.loadtest.target import Target
from mlsys_bench.types import Outcome, RequestRecord

_clock = time.perf_counter
_REJECTED = (429, 503)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Wave:
    """Requests that go out together, all of one length."""

    requests: int
    prompt_tokens: int
    output_tokens: int


class Sender:
    """Connections to one target, kept open between waves.  Every prompt it sends is new, so no prefix is ever cached."""

    def __init__(self, target: Target, *, is_chat: bool, api_key: str | None, seed: int) -> None:
        self._target, self._is_chat, self._api_key = target, is_chat, api_key
        self._text, self._next = prompts.Text(seed), 0
        self._loop = asyncio.new_event_loop()
        self._idle: list[_Connection] = []
        self._opened: list[_Connection] = []

    def send(self, wave: Wave, *, timeout_s: float) -> tuple[RequestRecord, ...]:
        """Send a wave and return its records once all are answered or the time is up.  Seconds since the first was sent.

        Ctrl-C ends it at once (KeyboardInterrupt).  Raises MeasurementFailed when the server cannot be reached any more.
        """
        try:
            return self._loop.run_until_complete(self._send(wave, timeout_s))
        except KeyboardInterrupt:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            self._loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
            raise

    def close(self) -> None:
        """Close every connection."""
        for connection in self._opened:
            connection.drop()
        self._loop.run_until_complete(asyncio.sleep(0))  # the transports close their sockets in the loop
        self._loop.close()

    async def _send(self, wave: Wave, timeout_s: float) -> tuple[RequestRecord, ...]:
        connections = [await self._connection(timeout_s) for _ in range(wave.requests)]
        bodies = [self._body(wave) for _ in connections]
        t0_s = _clock()
        waiting = [asyncio.ensure_future(c.ask(body)) for c, body in zip(connections, bodies, strict=True)]
        try:
            await asyncio.wait(waiting, timeout=timeout_s)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)  # each says itself that its time was up
        self._idle += [c for c in connections if c.is_open]
        return tuple(_record(i, c, t0_s) for i, c in enumerate(connections))

    async def _connection(self, timeout_s: float) -> _Connection:
        """Return a connection that is open and silent."""
        while self._idle:
            kept = self._idle.pop()
            if kept.is_open:
                return kept
        target = self._target
        tls = ssl.create_default_context() if target.scheme == "https" else None
        opening = self._loop.create_connection(
            _Connection, target.address, target.port, ssl=tls, server_hostname=target.host if tls else None
        )
        try:
            _, connection = await asyncio.wait_for(opening, timeout_s)
        except (OSError, TimeoutError) as error:
            raise MeasurementFailed(f"{target.host}:{target.port} took no further connection: {error or 'no answer'}") from error
        self._opened.append(connection)
        return connection

    def _body(self, wave: Wave) -> bytes:
        """Return one whole HTTP request with a prompt that was never sent before."""
        target = self._target
        text = self._text.prompt(self._next, target.chars(wave.prompt_tokens))
        self._next += 1
        asked: dict[str, object] = {"model": target.model, "max_tokens": wave.output_tokens, "temperature": 0, "stream": True}
        asked |= {"stream_options": {"include_usage": True}} | ({"ignore_eos": True} if target.ignore_eos else {})
        asked |= {"messages": [{"role": "user", "content": text}]} if self._is_chat else {"prompt": text}
        body = json.dumps(asked).encode()
        lines = [
            f"POST {target.path} HTTP/1.1",
            f"Host: {authority(target.host, target.port)}",
            "Content-Type: application/json",
            "Accept: text/event-stream",
            "User-Agent: mlsys-probe",
            *([f"Authorization: Bearer {self._api_key}"] if self._api_key else []),
            f"Content-Length: {len(body)}",
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class _Connection(asyncio.Protocol):
    """One connection and the answer that comes in on it."""

    def __init__(self) -> None:
        self.response = wire.Response()
        self.sent_s: float | None = None
        self.done_s: float | None = None
        self.outcome: Outcome = "ok"
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it can carry another request."""
        return self._transport is not None and not self._transport.is_closing()

    async def ask(self, request: bytes) -> None:
        """Send a request; return when its answer is whole or the connection ended."""
        assert self._transport is not None
        self.response, self.done_s, self.outcome = wire.Response(), None, "ok"
        self._done = asyncio.get_running_loop().create_future()
        self.sent_s = _clock()
        self._transport.write(request)
        try:
            await self._done
        except asyncio.CancelledError:
            self.outcome = "timeout"
            self.drop()
            raise

    def drop(self) -> None:
        """Close the connection, whatever it is doing: the server sees that nobody listens any more."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        at = _clock()
        if self._done is None or self._done.done():
            self.drop()  # more than was asked for: this connection can no longer be trusted
            return
        try:
            whole = self.response.feed(data, at)
        except wire.WireError:
            self._end(at, "bad_response")
            return
        if whole:
            self._end(at, "ok")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._end(_clock(), "ok" if self.response.closed() else "reset")

    def _end(self, at: float, outcome: Outcome) -> None:
        self.done_s, self.outcome = at, outcome
        if outcome != "ok" or not self.response.keep_alive:
            self.drop()
        if self._done is not None and not self._done.done():
            self._done.set_result(None)


def _record(index: int, connection: _Connection, t0_s: float) -> RequestRecord:
    """Return what became of one request."""
    response, sent_s = connection.response, (connection.sent_s or t0_s) - t0_s
    outcome = connection.outcome
    if outcome == "ok" and response.status != 200:
        outcome = "rejected" if response.status in _REJECTED else "bad_response"
    if outcome != "ok":
        return RequestRecord(index=index, scheduled_s=sent_s, sent_s=sent_s, outcome=outcome, http_status=response.status or None)
    try:
        said = answers.read(response.pieces)
    except wire.WireError:
        return RequestRecord(index=index, scheduled_s=sent_s, sent_s=sent_s, outcome="bad_response", http_status=response.status)
    return RequestRecord(
        index=index,
        scheduled_s=sent_s,
        sent_s=sent_s,
        token_s=tuple(at - t0_s for at in said.token_s),
        tokens_per_event=said.tokens_per_event,
        done_s=(connection.done_s or t0_s) - t0_s,
        prompt_tokens=said.prompt_tokens,
        output_tokens=said.output_tokens,
        token_source=said.token_source,
        outcome="ok" if said.is_whole and said.token_s else "bad_response",
        http_status=response.status,
    )


@contextlib.contextmanager
def pinned(core: int | None = None) -> Iterator[None]:
    """Keep this process on its last core for a while, as a load test's worker is: the built-in engine has the first to itself."""
    if not hasattr(os, "sched_getaffinity"):
        yield
        return
    before: Sequence[int] = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {before[-1] if core is None else core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
