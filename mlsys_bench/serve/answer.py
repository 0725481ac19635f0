"""One request on its way through the engine: each token is written out the moment it arrives."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlsys_bench.engine.stops import TextStream
from mlsys_bench.engine.tokenizer import Tokenizer
from mlsys_bench.serve import bodies
from mlsys_bench.serve import openai_api as api
from mlsys_bench.serve.bodies import Bodies, Token
from mlsys_bench.serve.link import Generation, Link, Piece
from mlsys_bench.serve.metrics import Metrics

_GONE = "the client went away"
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class _Growing:
    """One choice on its way."""

    __slots__ = ("parts", "prefix", "reason", "stream", "token_s", "tokens")

    def __init__(self, stream: TextStream, prefix: str) -> None:
        self.stream, self.prefix = stream, prefix
        self.parts: list[str] = []
        self.tokens: list[Token] = []
        self.token_s: list[float] = []
        self.reason: str | None = None

    def take(self, piece: Piece) -> str:
        """Note a token; return the text to show."""
        self.token_s.append(time.perf_counter())
        self.tokens.append(Token(piece.token, len(self.prefix) + self.stream.decoded, piece.logprobs))
        text, is_stopped = self.stream.feed(piece.token, is_last=piece.reason is not None)
        self.reason = "stop" if is_stopped else piece.reason
        if len(self.tokens) == 1:
            text = self.prefix + text
        self.parts.append(text)
        return text


class Answer(Response):
    """An answer, streamed or whole.  A client that goes away takes its request back."""

    def __init__(self, made: Bodies, generation: Generation, tokenizer: Tokenizer, link: Link, metrics: Metrics, arrived_s: float) -> None:
        self.bodies, self.call, self.generation, self.link, self.metrics = made, made.call, generation, link, metrics
        self.arrived_s = arrived_s
        self.choices = [
            _Growing(TextStream(tokenizer.stream(self.call.prompt), s.stop, include_stop=self.call.include_stop), self.call.echo)
            for s in self.call.choices
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, and whatever happens leave nothing behind in the engine."""
        watch = asyncio.create_task(_until_gone(receive))
        watch.add_done_callback(lambda _: self.link.cancel(self.generation, _GONE))
        outcome = "cancelled"
        try:
            outcome = await (self._stream(send) if self.call.stream else self._whole(send))
        finally:
            watch.cancel()
            self.link.cancel(self.generation, _GONE)
            times = [choice.token_s for choice in self.choices]
            self.metrics.on_end(outcome, arrived_s=self.arrived_s, token_s=times, prompt_tokens=len(self.call.prompt))

    @property
    def _goes_on(self) -> bool:
        return any(choice.reason is None for choice in self.choices)

    async def _whole(self, send: Send) -> str:
        while self._goes_on:
            for piece in await self.generation.next():
                if piece.error is not None:
                    return await self._fail(piece, send, is_open=False)
                self.choices[piece.choice].take(piece)
        made = [bodies.Choice("".join(c.parts), c.tokens, c.reason or "") for c in self.choices]
        await send_json(send, 200, self.bodies.whole(made))
        return "ok"

    async def _stream(self, send: Send) -> str:
        is_open, spent = False, 0
        while self._goes_on:
            events = b""
            for piece in await self.generation.next():
                if piece.error is not None:
                    return await self._fail(piece, send, is_open=is_open, before=events)
                if not is_open:  # not earlier, so that what goes wrong before the first token still has its own status
                    await send({"type": "http.response.start", "status": 200, "headers": _SSE})
                    is_open, events = True, self.bodies.opening()
                choice = self.choices[piece.choice]
                text, spent = choice.take(piece), spent + 1
                events += self.bodies.chunk(piece.choice, text, choice.tokens[-1], choice.reason, spent)
            await send({"type": "http.response.body", "body": events, "more_body": True})
        end = self.bodies.usage_chunk(spent) if self.call.include_usage else b""
        await send({"type": "http.response.body", "body": end + bodies.DONE, "more_body": False})
        return "ok"

    async def _fail(self, piece: Piece, send: Send, *, is_open: bool, before: bytes = b"") -> str:
        """Say what went wrong: with its status, or inside the stream when that has begun."""
        assert piece.error is not None
        if piece.error == _GONE:
            return "cancelled"
        error = api.ApiError(piece.status, piece.error, kind="invalid_request_error" if piece.status == 400 else "server_error")
        if is_open:
            await send({"type": "http.response.body", "body": before + bodies.event(error.body), "more_body": False})
        else:
            await send_json(send, error.status, error.body)
        return "bad_request" if piece.status == 400 else "error"


async def _until_gone(receive: Receive) -> None:
    """Wait until the client is gone, which is all that can arrive after a request's body."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def send_json(send: Send, status: int, body: dict[str, Any]) -> None:
    """Send a whole JSON response."""
    data = msgspec.json.encode(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
