"""OpenAI's API: completions, chat and responses as server-sent events or whole; embeddings; rerank as Jina, Cohere and vLLM have it."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from mlsys_bench.loadtest import answers, tokens
from mlsys_bench.loadtest.answers import Answer, Emitted, Usage
from mlsys_bench.loadtest.endpoints import Ask, Spec, texts
from mlsys_bench.loadtest.endpoints.reading import decoded
from mlsys_bench.loadtest.wire import Response, WireError

_encode = msgspec.json.Encoder().encode
_QUERY_CHARS = 64  # of a rerank: a question is short beside its documents


class Completions:
    """POST /v1/completions.  Text of letters and spaces goes into a template of bytes: a tenth of the time of encoding it."""

    def __init__(self, spec: Spec) -> None:
        fixed: dict[str, Any] = {"model": spec.model, "stream": spec.streams, **_greedy(spec)}
        if spec.streams:
            fixed["stream_options"] = {"include_usage": True, **({"continuous_usage_stats": True} if spec.form.usage_per_event else {})}
        if spec.ignore_eos:
            fixed["ignore_eos"] = True
        self._open_end = _encode(fixed)[:-1]
        self._limit = str(spec.settings.get("limit", "max_tokens")).encode()
        self._streams = spec.streams
        self._count = tokens.counter(spec.form.tokenizer) if spec.form.tokenizer else None

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        return b'%b%b,"max_tokens":%d,"prompt":%b}' % (self._open_end, _priority(ask), ask.output_tokens, _encode(ask.text))

    def read(self, response: Response) -> Answer:
        """Return the tokens of a stream, or those of a whole answer at its one moment."""
        if self._streams:
            return answers.read(response.pieces, self._count)
        return answers.read_whole(response.pieces, self._count)


class Chat(Completions):
    """POST /v1/chat/completions."""

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        messages = _messages(ask, "text", _image_url)
        return b'%b%b,"%b":%d,"messages":%b}' % (self._open_end, _priority(ask), self._limit, ask.output_tokens, messages)


class Responses:
    """POST /v1/responses: every event has a type of its own, and the stream ends with one of three, without [DONE]."""

    def __init__(self, spec: Spec) -> None:
        fixed: dict[str, Any] = {"model": spec.model, "stream": spec.streams, **_greedy(spec), "store": False}
        if spec.ignore_eos:
            fixed["ignore_eos"] = True
        self._open_end = _encode(fixed)[:-1]
        self._streams = spec.streams
        self._count = tokens.counter(spec.form.tokenizer) if spec.form.tokenizer else None

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        plain = not ask.messages and not ask.images
        asked = _encode(ask.text) if plain else _messages(ask, "input_text", _input_image)
        return b'%b,"max_output_tokens":%d,"input":%b}' % (self._open_end, ask.output_tokens, asked)

    def read(self, response: Response) -> Answer:
        """Return the tokens of the deltas, or of a whole answer."""
        if not self._streams:
            said = decoded(response.body(), _Response, "response")
            return answers.whole(response.pieces, usage=_spent(said, thinks=False, sees_all=True), text=_said(said), count=self._count)
        emitted: list[Emitted] = []
        end: _Response | None = None
        thinks = False
        for at, _, data in answers.sse(response.pieces):
            if data == b"[DONE]":  # some servers end like this too
                continue
            event = decoded(data, _ResponseEvent, "event of a response")
            if event.type in ("error", "response.failed"):
                raise WireError(f"the server says: {data[:160]!r}")
            if event.type in ("response.completed", "response.incomplete"):
                end = event.response or _Response()
            elif event.type.endswith(".delta") and isinstance(event.delta, str):
                thinks = thinks or event.type.startswith("response.reasoning")
                emitted.append((at, True, event.delta, None))
        usage = _spent(end, thinks=thinks, sees_all=False) if end is not None else Usage()
        return answers.assemble(emitted, usage=usage, is_whole=end is not None, count=self._count)


class Embeddings:
    """POST /v1/embeddings of one text or of several."""

    def __init__(self, spec: Spec) -> None:
        self._open_end = _encode({"model": spec.model})[:-1]
        self._batch = spec.form.batch

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        return b'%b,"input":%b}' % (self._open_end, _encode(texts(ask, self._batch)))

    def read(self, response: Response) -> Answer:
        """Return the moment of the vectors.  Their numbers are not parsed."""
        said = decoded(response.body(), _Vectors, "list of embeddings")
        if not said.data:
            raise WireError("an answer without data is no list of embeddings")
        return answers.whole(response.pieces, usage=_prompt_only(said.usage))


class Rerank:
    """POST /v1/rerank (Jina, vLLM) or /v2/rerank (Cohere): one query, several documents."""

    def __init__(self, spec: Spec) -> None:
        self._open_end = _encode({"model": spec.model})[:-1]
        self._batch = spec.form.batch

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        return b'%b,"query":%b,"documents":%b}' % (self._open_end, _encode(query(ask)), _encode(texts(ask, self._batch)))

    def read(self, response: Response) -> Answer:
        """Return the moment of the scores."""
        said = decoded(response.body(), _Ranks, "ranking")
        if not said.results:
            raise WireError("an answer without results is no ranking")
        return answers.whole(response.pieces, usage=_prompt_only(said.usage))


def query(ask: Ask) -> str:
    """Return what the documents are ranked by."""
    given = ask.row.get("query")
    return given if isinstance(given, str) else ask.text[-_QUERY_CHARS:]


def variants(spec: Spec) -> list[Spec]:
    """Return how else to ask a server that refuses a request: with less that only some understand, from the least loss on."""
    plain = dataclasses.replace(spec, ignore_eos=False)
    newer: dict[str, Any] = {"limit": "max_completion_tokens"} if spec.name == "chat" else {}
    ways: list[dict[str, Any]] = [{}, newer, {**newer, "temperature": False}]
    asked = [dataclasses.replace(plain, settings={**spec.settings, **way}) for way in ways]
    return [way for i, way in enumerate(asked) if way not in (spec, *asked[:i])]


def _greedy(spec: Spec) -> dict[str, Any]:
    return {"temperature": 0} if spec.settings.get("temperature", True) else {}


# ---------------------------------------------------------------- words out


def _priority(ask: Ask) -> bytes:
    return b"" if ask.priority is None else b',"priority":%d' % ask.priority


def _messages(ask: Ask, text_type: str, image: Any) -> bytes:
    if not ask.images:
        return _encode(ask.messages) if ask.messages else b'[{"role":"user","content":%b}]' % _encode(ask.text)
    *before, last = ask.messages or ({"role": "user", "content": ask.text},)
    parts = [{"type": text_type, "text": last["content"]}] if isinstance(last["content"], str) else list(last["content"])
    return _encode([*before, {**last, "content": [*parts, *map(image, ask.images)]}])


def _image_url(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _input_image(url: str) -> dict[str, Any]:
    return {"type": "input_image", "image_url": url}


# ---------------------------------------------------------------- words in


class _Details(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None
    output_tokens_details: _Details | None = None


class _Part(msgspec.Struct, gc=False):
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct, gc=False):
    content: list[_Part] | None = None
    arguments: str | None = None


class _Response(msgspec.Struct, gc=False):
    status: str | None = None
    output: list[_Item] | None = None
    usage: _Usage | None = None
    error: Any = None


class _ResponseEvent(msgspec.Struct, gc=False):
    type: str
    delta: Any = None
    response: _Response | None = None


class _Vectors(msgspec.Struct, gc=False):
    data: list[msgspec.Raw] = []
    usage: _Usage | None = None


class _Ranks(msgspec.Struct, gc=False):
    results: list[msgspec.Raw] = []
    usage: _Usage | None = None


def _spent(response: _Response, *, thinks: bool, sees_all: bool) -> Usage:
    """Return a response's tokens.  Thoughts that were counted but not streamed are no part of what arrived."""
    usage = response.usage or _Usage()
    out = usage.output_tokens
    hidden = usage.output_tokens_details.reasoning_tokens if usage.output_tokens_details else None
    if out is not None and hidden and not thinks and not sees_all and hidden < out:
        out -= hidden
    return Usage(prompt_tokens=usage.input_tokens, output_tokens=out)


def _said(response: _Response) -> str:
    if response.output is None or response.status == "failed":
        raise WireError(f"no finished response: status {response.status}, error {str(response.error)[:80]}")
    parts = [part.text or part.refusal or "" for item in response.output for part in item.content or ()]
    return "".join([*parts, *(item.arguments or "" for item in response.output)])


def _prompt_only(usage: _Usage | None) -> Usage:
    """Return what was read; nothing is written.  Jina and vLLM give a rerank's tokens as a total alone."""
    given = usage or _Usage()
    return Usage(prompt_tokens=given.total_tokens if given.prompt_tokens is None else given.prompt_tokens)
