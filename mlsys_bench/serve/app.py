"""The routes: each handler checks its request and hands it on."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mlsys_bench.batching import Limits
from mlsys_bench.engine.tokenizer import Tokenizer
from mlsys_bench.serve import bodies, embeddings
from mlsys_bench.serve import openai_api as api
from mlsys_bench.serve.answer import Answer
from mlsys_bench.serve.bodies import Bodies
from mlsys_bench.serve.link import Link
from mlsys_bench.serve.metrics import Metrics
from mlsys_bench.types import Layout

_BODY_LIMIT_BYTES = 8 << 20
_LONG_BYTES = 1 << 16
C = TypeVar("C")


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What is served.  `process` is what `/health` tells of the processes behind it."""

    layout: Layout
    limits: Limits
    queue_limit: int
    tokenizer: Tokenizer
    process: dict[str, Any]
    text_tokens: int = 0  # of an encoder: how long a text may be; 0 for models that generate
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def is_encoder(self) -> bool:
        """Whether vectors are served, and no text."""
        return self.text_tokens > 0

    @property
    def context(self) -> int:
        """How many tokens prompt and answer may have together."""
        return min(self.limits.max_context, self.limits.blocks * self.limits.block_tokens)


class Handlers:
    """One handler per route."""

    def __init__(self, served: Served, link: Link, metrics: Metrics) -> None:
        self.served, self.link, self.metrics = served, link, metrics
        self._ids = itertools.count(1)

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        return await self._answer(request, api.parse_completion)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        return await self._answer(request, api.parse_chat)

    async def embeddings(self, request: Request) -> Response:
        """`POST /v1/embeddings`."""
        arrived_s, served = time.perf_counter(), self.served
        if not served.is_encoder:
            raise api.ApiError(400, f"{served.layout.model} generates text: ask /v1/completions or /v1/chat/completions", param="model")
        call = await _parsed(
            embeddings.parse, await _body(request), model=served.layout.model, context=served.text_tokens, tokenizer=served.tokenizer
        )
        self.metrics.received.inc()
        self._check_room()
        piece = (await self.link.embed(call.texts).next())[0]
        if piece.error is not None:
            raise api.ApiError(piece.status, piece.error, kind="invalid_request_error" if piece.status == 400 else "server_error")
        self.metrics.prompt_tokens.inc(call.tokens)
        self.metrics.on_embedded(arrived_s=arrived_s, prompt_tokens=call.tokens)
        return _json(200, embeddings.body_of(call, piece.vectors, served.layout.model))

    async def _answer(self, request: Request, parse: Callable[..., api.Call]) -> Response:
        arrived_s, served = time.perf_counter(), self.served
        if served.is_encoder:
            raise api.ApiError(400, f"{served.layout.model} makes vectors, not text: ask /v1/embeddings", param="model")
        call = await _parsed(parse, await _body(request), model=served.layout.model, context=served.context, tokenizer=served.tokenizer)
        self.metrics.received.inc()
        self._check_room()
        generation = self.link.submit(
            call.prompt, max_tokens=call.max_tokens, choices=call.choices, ignore_eos=call.ignore_eos, priority=call.priority
        )
        self.metrics.prompt_tokens.inc(len(call.prompt))
        name = f"{'chatcmpl' if call.is_chat else 'cmpl'}-{next(self._ids)}"
        made = Bodies(id=name, created=int(time.time()), model=served.layout.model, call=call, piece=served.tokenizer.piece)
        return Answer(made, generation, served.tokenizer, self.link, self.metrics, arrived_s)

    def _check_room(self) -> None:
        """Raise 503 when the engine is gone, and 429 when as many requests wait as may.

        What waits is the larger of two views: ours, which knows at once of every request but not how many have a seat, and the
        engine's of its last step, which also knows of those that wait for KV blocks while seats are free.
        """
        if self.link.dead is not None:
            raise api.ApiError(503, self.link.dead, kind="server_error", code="engine_dead")
        beyond_seats = self.link.in_flight - self.served.limits.max_seqs
        waiting = max(beyond_seats, self.link.state.waiting)
        if beyond_seats >= self.served.queue_limit or waiting > self.served.queue_limit:
            raise api.queue_full(max(waiting, 0), self.served.queue_limit, self.metrics.retry_after_s(waiting))

    async def health(self, request: Request) -> Response:
        """`GET /health`: also the layout and the limits, so that a profile can be held against a live server."""
        dead, layout, limits = self.link.dead, asdict(self.served.layout), self.served.limits
        body = {
            "status": "ok" if dead is None else "dead",
            "detail": dead,
            **layout,
            "layout": layout,
            "limits": limits._asdict(),
            "max_batch": limits.max_seqs,
            "queue_limit": self.served.queue_limit,
            "blocks": limits.blocks,
            **self.link.state._asdict(),
            "in_flight": self.link.in_flight,
            **self.served.process,
        }
        return _json(200 if dead is None else 503, body)

    async def metrics_page(self, request: Request) -> Response:
        """`GET /metrics`."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return _json(200, {"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{name}`."""
        name = request.path_params["name"]
        if name != self.served.layout.model:
            raise api.unknown_model(name, self.served.layout.model)
        return _json(200, self._card())

    def _card(self) -> dict[str, Any]:
        return bodies.model_card(self.served.layout.model, self.served.created, self.served.context)

    async def on_api_error(self, request: Request, error: Exception) -> Response:
        """Return an error of ours, and count it if a generation was asked for."""
        assert isinstance(error, api.ApiError)
        if request.method == "POST":
            self.metrics.requests.labels({429: "rejected", 503: "error"}.get(error.status, "bad_request")).inc()
        return _json(error.status, error.body, error.headers)

    async def on_http_error(self, request: Request, error: Exception) -> Response:
        """Return a wrong path or method in OpenAI's shape."""
        assert isinstance(error, HTTPException)
        message = f"{request.method} {request.url.path}: {error.detail}"
        return _json(error.status_code, api.ApiError(error.status_code, message).body)

    async def on_bug(self, request: Request, error: Exception) -> Response:
        """Return 500; the traceback goes to the log."""
        if request.method == "POST":
            self.metrics.requests.labels("error").inc()
        return _json(500, api.ApiError(500, "internal error; the server's log has it", kind="server_error").body)


def _json(status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")


async def _body(request: Request) -> bytes:
    """Return the request's body, up to a limit."""
    data = bytearray()
    try:
        async for part in request.stream():
            data += part
            if len(data) > _BODY_LIMIT_BYTES:
                raise api.ApiError(413, f"the body is larger than {_BODY_LIMIT_BYTES} bytes")
    except ClientDisconnect:  # nobody reads this answer; it is counted, and the log stays free of a traceback
        raise api.ApiError(400, "the connection was closed before the whole body came") from None
    return bytes(data)


async def _parsed(parse: Callable[..., C], data: bytes, **how: Any) -> C:
    """Return what a body asks for.  A long one is read in a thread: its text takes seconds, in which all streams would stand still."""
    return parse(data, **how) if len(data) <= _LONG_BYTES else await asyncio.to_thread(parse, data, **how)


def create(served: Served, link: Link, metrics: Metrics) -> Starlette:
    """Return the ASGI application."""
    h = Handlers(served, link, metrics)
    routes = [
        Route("/v1/models", h.models),
        Route("/v1/models/{name:path}", h.model),
        Route("/v1/completions", h.completions, methods=["POST"]),
        Route("/v1/chat/completions", h.chat, methods=["POST"]),
        Route("/v1/embeddings", h.embeddings, methods=["POST"]),
        Route("/health", h.health),
        Route("/metrics", h.metrics_page),
    ]
    return Starlette(routes=routes, exception_handlers={api.ApiError: h.on_api_error, HTTPException: h.on_http_error, Exception: h.on_bug})
