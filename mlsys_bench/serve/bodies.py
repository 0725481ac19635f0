"""The bodies of answers, in OpenAI's shapes: whole ones and the events of streams, with log-probabilities in both APIs' ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec

from mlsys_bench.engine.sampling import Logprobs
from mlsys_bench.serve.openai_api import Call


class Token(NamedTuple):
    """A token of an answer, and where its text begins in that of the answer, in characters."""

    id: int
    offset: int
    logprobs: Logprobs | None


class Choice(NamedTuple):
    """One choice of a whole answer."""

    text: str
    tokens: Sequence[Token]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Bodies:
    """Builds the bodies of one answer: `id`, `created` and `model` are the same in all of them.  `piece` gives the bytes of a token."""

    id: str
    created: int
    model: str
    call: Call
    piece: Callable[[int], bytes]

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return a body that is not streamed."""
        kind = "chat.completion" if self.call.is_chat else "text_completion"
        made = [self._choice(i, self._content(c.text, is_whole=True), c.tokens, c.reason) for i, c in enumerate(choices)]
        spent = usage(len(self.call.prompt), sum(len(c.tokens) for c in choices))
        return {**self._head(kind), "choices": made, "usage": spent}

    def chunk(self, index: int, text: str, token: Token, reason: str | None, spent: int) -> bytes:
        """Return the event of one token, the `spent`th of the answer in all its choices.

        Each token has exactly one, even when its text is empty (half a character, or held back because a stop string may begin there),
        and the last one carries `finish_reason`: whoever counts events counts tokens.
        """
        return self._chunk([self._choice(index, self._content(text), (token,), reason)], spent)

    def opening(self) -> bytes:
        """Return what goes before the first token: in a chat, an event for each choice that names the role and carries no token."""
        if not self.call.is_chat:
            return b""
        content = {"delta": {"role": "assistant", "content": ""}}
        return b"".join(self._chunk([self._choice(i, content, (), None)], 0) for i in range(self.call.n))

    def usage_chunk(self, completion_tokens: int) -> bytes:
        """Return the event that `stream_options.include_usage` asks for."""
        return self._chunk([], completion_tokens)

    def _chunk(self, choices: list[dict[str, Any]], spent: int) -> bytes:
        body = {**self._head("chat.completion.chunk" if self.call.is_chat else "text_completion"), "choices": choices}
        if self.call.include_usage:
            body["usage"] = usage(len(self.call.prompt), spent) if self.call.usage_per_event or not choices else None
        return event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _content(self, text: str, *, is_whole: bool = False) -> dict[str, Any]:
        if not self.call.is_chat:
            return {"text": text}
        return {"message": {"role": "assistant", "content": text, "refusal": None}} if is_whole else {"delta": {"content": text}}

    def _choice(self, index: int, content: dict[str, Any], tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        logs = None
        if tokens and self.call.sampling.logprobs is not None:
            logs = chat_logprobs(tokens, self.piece) if self.call.is_chat else completion_logprobs(tokens, self.piece)
        choice = {"index": index, **content, "logprobs": logs, "finish_reason": reason}
        if self.call.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return choice


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's `usage`."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


# ---------------------------------------------------------------- log-probabilities


def completion_logprobs(tokens: Sequence[Token], piece: Callable[[int], bytes]) -> dict[str, Any]:
    """Return the `logprobs` of a completion: the chosen token is among the top ones, as OpenAI has it, so they may be one more."""
    logs = [(token, token.logprobs) for token in tokens if token.logprobs is not None]
    return {
        "tokens": [_shown(piece(token.id)) for token, _ in logs],
        "token_logprobs": [log.chosen for _, log in logs],
        "top_logprobs": [{_shown(piece(i)): value for i, value in (*log.top, (token.id, log.chosen))} for token, log in logs],
        "text_offset": [token.offset for token, _ in logs],
    }


def chat_logprobs(tokens: Sequence[Token], piece: Callable[[int], bytes]) -> dict[str, Any]:
    """Return the `logprobs` of a chat."""

    def one(token: int, value: float) -> dict[str, Any]:
        return {"token": _shown(piece(token)), "logprob": value, "bytes": list(piece(token))}

    logs = [(token.id, token.logprobs) for token in tokens if token.logprobs is not None]
    content = [{**one(token, log.chosen), "top_logprobs": [one(i, value) for i, value in log.top]} for token, log in logs]
    return {"content": content, "refusal": None}


def _shown(piece: bytes) -> str:
    r"""Return a token as text; bytes that are half a character as \xe2, the way OpenAI writes them."""
    return piece.decode(errors="backslashreplace")


# ---------------------------------------------------------------- streams

DONE = b"data: [DONE]\n\n"
_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def event(body: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


def model_card(model: str, created: int, max_context: int) -> dict[str, Any]:
    """Return one entry of `GET /v1/models`."""
    return {"id": model, "object": "model", "created": created, "owned_by": "mlsys", "max_model_len": max_context}
