"""What requests look like to each kind of server and how its answers are read: bytes out, bytes in.  No socket and no clock in here.

A kind of server is a class in a file beside this one; `make` finds it by the name a person writes (`--endpoint chat`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from mlsys_bench import errors
from mlsys_bench.loadtest.answers import Answer
from mlsys_bench.loadtest.form import Form
from mlsys_bench.loadtest.wire import Response


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """What one request asks, whatever the API."""

    text: str
    output_tokens: int
    messages: tuple[Mapping[str, Any], ...] = ()  # a conversation so far; empty: `text` is all there is
    images: tuple[str, ...] = ()  # data URLs
    row: Mapping[str, Any] = field(default_factory=dict)  # of a data set, for templates
    priority: int | None = None  # lower goes first, as vLLM has it; None: nothing is said of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One endpoint of one server, as parent and worker agree on it."""

    name: str
    path: str
    model: str
    streams: bool = True
    ignore_eos: bool = True
    settings: dict[str, Any] = field(default_factory=dict)  # of this kind of endpoint alone
    form: Form = field(default_factory=Form)
    content_type: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()  # that this API wants; what a person gave (and may be secret) is in the job


class Endpoint(Protocol):
    """How requests are written and answers read."""

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        ...

    def read(self, response: Response) -> Answer:
        """Return what a whole or cut answer of status 200 said.  Raises WireError for what is no answer of this kind."""
        ...


@runtime_checkable
class Conversation(Endpoint, Protocol):
    """An endpoint that speaks over WebSocket: `body` is the message that asks, a response holds the messages as events of a stream."""

    def is_end(self, message: bytes) -> bool:
        """Say whether a message is the last of its answer."""
        ...


def is_answer(spec: Spec, status: int) -> bool:
    """Say whether a status is that of an answer: 200, and of an API that a person describes any that says it went well (201, 204 …)."""
    return status == 200 or (spec.name == "http" and 200 <= status < 300)


def kinds() -> dict[str, Callable[[Spec], Endpoint]]:
    """Return how to make each kind of endpoint, by name."""
    from mlsys_bench.loadtest.endpoints import huggingface, kserve, openai, predictors, template

    return {
        "completions": openai.Completions,
        "chat": openai.Chat,
        "responses": openai.Responses,
        "embeddings": openai.Embeddings,
        "rerank": openai.Rerank,
        "kserve": kserve.Infer,
        "triton-generate": kserve.Generate,
        "triton-stream": kserve.GenerateStream,
        "torchserve": predictors.TorchServe,
        "tfserving": predictors.TFServing,
        "tei-embed": huggingface.Embed,
        "tei-rerank": huggingface.Rerank,
        "tgi": huggingface.Generate,
        "http": template.Http,
        "websocket": template.WebSocket,
    }


def make(spec: Spec) -> Endpoint:
    """Return an endpoint.  Raises BadInput for a kind that is not known."""
    known = kinds()
    if spec.name not in known:
        raise errors.unknown("endpoint", spec.name, known)
    return known[spec.name](spec)


def texts(ask: Ask, count: int) -> list[str]:
    """Return so many texts of the length of the one that was drawn, no two with the same beginning: that text, begun elsewhere."""
    given = ask.row.get("texts") or ask.row.get("documents")
    if isinstance(given, list) and given:
        return [str(text) for text in given]
    size = len(ask.text)
    around = ask.text + ask.text
    return [around[i * size // count : i * size // count + size] for i in range(count)]
