"""Vectors of texts: what `/v1/embeddings` takes and gives, and the engine process of an encoder."""

from __future__ import annotations

import base64
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mlsys_bench import errors
from mlsys_bench.engine.tokenizer import Tokenizer
from mlsys_bench.serve import openai_api as api
from mlsys_bench.serve import wire
from mlsys_bench.serve.bodies import usage

if TYPE_CHECKING:
    from mlsys_bench.engine.encoder import Encoder

_CHUNK_BYTES = 1 << 20
_MAX_TEXTS = 2048  # OpenAI's


class EmbeddingBody(api.Asked, frozen=True, kw_only=True):
    """`POST /v1/embeddings`."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] = "float"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingCall:
    """A request that can be served."""

    texts: tuple[tuple[int, ...], ...]
    is_base64: bool

    @property
    def tokens(self) -> int:
        """Of all texts together."""
        return sum(map(len, self.texts))


def parse(data: bytes, *, model: str, context: int, tokenizer: Tokenizer) -> EmbeddingCall:
    """Return the call, or raise ApiError.  `context` is how many tokens a text may have."""
    body = api.decode(data, EmbeddingBody, model)
    is_one = isinstance(body.input, str) or any(isinstance(t, int) for t in body.input)
    if is_one and not isinstance(body.input, str) and not all(isinstance(t, int) for t in body.input):
        raise _refused("give one text, one list of tokens, or a list of those")
    given = [body.input] if is_one else body.input
    texts = tuple(_tokens(text, tokenizer) for text in given)
    if not 0 < len(texts) <= _MAX_TEXTS:
        raise _refused(f"give 1 to {_MAX_TEXTS} texts, not {len(texts)}")
    for i, text in enumerate(texts):
        if not 0 < len(text) <= context:
            raise _refused(f"text {i} has {len(text)} tokens; this model takes 1 to {context}", "context_length_exceeded")
        wrong = next((t for t in text if not 0 <= t < tokenizer.vocab), None)
        if wrong is not None:
            raise _refused(f"text {i}: token {wrong} is outside the vocabulary of {tokenizer.vocab}")
    return EmbeddingCall(texts=texts, is_base64=body.encoding_format == "base64")


def _tokens(text: Any, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return a text, given as one or as tokens, as tokens."""
    try:
        return tuple(tokenizer.encode(text) if isinstance(text, str) else text)
    except errors.BadInput as error:
        raise _refused(str(error)) from None


def _refused(message: str, code: str = "invalid_value") -> api.ApiError:
    return api.ApiError(400, f"input: {message}", param="input", code=code)


def body_of(call: EmbeddingCall, vectors: bytes, model: str) -> dict[str, Any]:
    """Return the answer to a call.  vectors: fp32, one text after the other."""
    table = np.frombuffer(vectors, dtype="<f4").reshape(len(call.texts), -1)
    data = [
        {"object": "embedding", "index": i, "embedding": base64.b64encode(row.tobytes()).decode() if call.is_base64 else row.tolist()}
        for i, row in enumerate(table)
    ]
    spent = {key: value for key, value in usage(call.tokens, 0).items() if key != "completion_tokens"}
    return {"object": "list", "data": data, "model": model, "usage": spent}


# ---------------------------------------------------------------- the engine process


def run(encoder: Encoder, pipe: socket.socket, device: str) -> None:
    """Embed until told to stop, or until the other side is gone (EOFError).  What waits is computed together."""
    pipe.sendall(wire.frame(wire.Ready(device, 0, encoder.shape.max_tokens)))
    frames = wire.Frames()
    while True:
        data = pipe.recv(_CHUNK_BYTES)
        if not data:
            raise EOFError
        asked = [wire.commands.decode(body) for body in frames.feed(data)]
        if any(isinstance(command, wire.Stop) for command in asked):
            return
        gone = {command.id for command in asked if isinstance(command, wire.Cancel)}
        for event in _embedded(encoder, [c for c in asked if isinstance(c, wire.Embed) and c.id not in gone]):
            pipe.sendall(wire.frame(event))


def _embedded(encoder: Encoder, asked: Sequence[wire.Embed]) -> Iterator[wire.Event]:
    """Yield the vectors of each request; of a crowd that is refused, each request's own."""
    if not asked:
        return
    try:
        vectors = encoder.embed([text for command in asked for text in command.texts]).cpu().numpy().astype("<f4")
    except errors.BadInput as error:
        if len(asked) == 1:
            yield wire.Refused(asked[0].id, str(error))
        else:
            for command in asked:
                yield from _embedded(encoder, [command])
        return
    ends = np.cumsum([len(command.texts) for command in asked])
    for command, own in zip(asked, np.split(vectors, ends[:-1]), strict=True):
        yield wire.Embedded(command.id, own.tobytes())
