"""Hugging Face's servers by their own paths: text-embeddings-inference (/embed, /rerank) and text-generation-inference (/generate_stream).

Sources: the openapi.json of either project.  Both speak OpenAI's API too.
"""

from __future__ import annotations

import msgspec

from mlsys_bench.loadtest import answers, tokens
from mlsys_bench.loadtest.answers import Answer, Emitted, Usage
from mlsys_bench.loadtest.endpoints import Ask, Spec, texts
from mlsys_bench.loadtest.endpoints.openai import query
from mlsys_bench.loadtest.endpoints.reading import decoded
from mlsys_bench.loadtest.wire import Response, WireError

_encode = msgspec.json.Encoder().encode


class Embed:
    """POST /embed: a vector for each text."""

    def __init__(self, spec: Spec) -> None:
        self._batch = spec.form.batch

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        return _encode({"inputs": texts(ask, self._batch), "truncate": True})

    def read(self, response: Response) -> Answer:
        """Return the moment of the vectors."""
        if not decoded(response.body(), list[msgspec.Raw], "list of embeddings"):
            raise WireError("an empty answer is no list of embeddings")
        return answers.whole(response.pieces, usage=_computed(response))


class Rerank:
    """POST /rerank: a score for each text."""

    def __init__(self, spec: Spec) -> None:
        self._batch = spec.form.batch

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        return _encode({"query": query(ask), "texts": texts(ask, self._batch), "truncate": True})

    def read(self, response: Response) -> Answer:
        """Return the moment of the scores."""
        if not decoded(response.body(), list[_Rank], "ranking"):
            raise WireError("an empty answer is no ranking")
        return answers.whole(response.pieces, usage=_computed(response))


class Generate:
    """POST /generate_stream of text-generation-inference: an event for every token, the last with details."""

    def __init__(self, spec: Spec) -> None:
        self._count = tokens.counter(spec.form.tokenizer) if spec.form.tokenizer else None

    def body(self, ask: Ask) -> bytes:
        """Return the body of a request."""
        return _encode({"inputs": ask.text, "parameters": {"max_new_tokens": ask.output_tokens, "details": True, "do_sample": False}})

    def read(self, response: Response) -> Answer:
        """Return the tokens of a stream."""
        emitted: list[Emitted] = []
        end: _Event | None = None
        for at, _, data in answers.sse(response.pieces):
            event = decoded(data, _Event, "event of a generated text")
            if event.error is not None:
                raise WireError(f"the server says: {event.error[:80]}")
            if event.token is not None:
                emitted.append((at, True, event.token.text, None))
            if event.generated_text is not None:
                end = event
        details = end.details if end is not None else None
        usage = Usage(prompt_tokens=details.input_length, output_tokens=details.generated_tokens) if details else Usage()
        return answers.assemble(emitted, usage=usage, is_whole=end is not None, count=self._count)


class _Rank(msgspec.Struct, gc=False):
    index: int
    score: float


class _Token(msgspec.Struct, gc=False):
    text: str


class _Details(msgspec.Struct, gc=False):
    generated_tokens: int | None = None
    input_length: int | None = None


class _Event(msgspec.Struct, gc=False):
    token: _Token | None = None
    generated_text: str | None = None
    details: _Details | None = None
    error: str | None = None


def _computed(response: Response) -> Usage:
    """Return the tokens the server worked through, which it says in a header."""
    said = response.headers.get("x-compute-tokens", "")
    return Usage(prompt_tokens=int(said) if said.isdecimal() else None)
