"""OpenAI's wire format: requests checked into a frozen `Call`, answers and errors put into its shapes.

Every field is checked by type and range, and an error names it.  A field that asks for something this server does not do is refused
unless it asks for nothing (`n: 1`, `presence_penalty: 0`); a field nobody knows is refused as well, so that a slip of the pen is not
silently ignored.  Two fields go beyond OpenAI, with the names vLLM gives them: `ignore_eos` and `return_token_ids`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol, TypeVar

import msgspec
from msgspec import Meta

from mlsys_bench.errors import did_you_mean
from mlsys_bench.serve.wire import Sampling

_COMPLETION_TOKENS = 16  # OpenAI's default
_CHAT_TOKENS = 256  # a chat goes on until the context is full, but not for ever
_MAX_STOPS = 4

# Fields that change nothing here, whatever they say.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "reasoning_effort"),
    *("verbosity", "request_id", "priority", "skip_special_tokens", "spaces_between_special_tokens"),
}
# Fields that ask for something this server does not do, and the values with which they do not ask for it (null always is one).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "top_k": (-1, 0),
    "min_p": (0,),
    "min_tokens": (0,),
    "use_beam_search": (False,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "add_generation_prompt": (True,),
    "stop_token_ids": ([],),
}

Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Role = Literal["system", "developer", "user", "assistant", "tool"]


class ApiError(Exception):
    """An answer that is an error: its HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class StreamOptions(msgspec.Struct, frozen=True):
    """What OpenAI's `stream_options` may hold."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False
    include_obfuscation: bool = False


class Body(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both endpoints share."""

    model: str
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    return_token_ids: bool | None = None


class CompletionBody(Body, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | int]


class Part(msgspec.Struct, frozen=True):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True):
    """One message of a chat."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None


class ChatBody(Body, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that can be served."""

    is_chat: bool
    prompt: tuple[int, ...]
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool


class Tokenizer(Protocol):
    """What is needed of a tokenizer."""

    vocab: int

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""


# ---------------------------------------------------------------- requests

B = TypeVar("B", bound=Body)


def parse_completion(data: bytes, *, model: str, context: int, tokenizer: Tokenizer) -> Call:
    """Return the call, or raise ApiError.  `context` is how many tokens prompt and answer may have together."""
    body = _decode(data, CompletionBody, model)
    prompt = _prompt_tokens(body.prompt, tokenizer)
    return _call(body, prompt, body.max_tokens or _room(context, prompt, _COMPLETION_TOKENS), context, is_chat=False, param="prompt")


def parse_chat(data: bytes, *, model: str, context: int, tokenizer: Tokenizer) -> Call:
    """Return the call, or raise ApiError."""
    body = _decode(data, ChatBody, model)
    prompt = tuple(tokenizer.encode(chat_text(body.messages)))
    asked = body.max_completion_tokens or body.max_tokens
    return _call(body, prompt, asked or _room(context, prompt, _CHAT_TOKENS), context, is_chat=True, param="messages")


def _room(context: int, prompt: tuple[int, ...], at_most: int) -> int:
    """Return how many tokens to generate when nobody says."""
    return max(min(context - len(prompt), at_most), 1)


def chat_text(messages: list[Message]) -> str:
    """Return a chat as the text the model continues: 'role: content' lines and an open 'assistant:'."""
    return "".join(f"{m.role}: {_content(m)}\n" for m in messages) + "assistant:"


def _content(message: Message) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""


def _decode(data: bytes, kind: type[B], model: str) -> B:
    """Return the body as this kind, with the first thing wrong named."""
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    known = set(kind.__struct_fields__)
    for name in fields.keys() - known:
        _check_unsupported(name, fields[name], known)
    try:
        body = msgspec.convert({name: fields[name] for name in fields if name in known}, kind)
    except msgspec.ValidationError as error:
        raise _invalid(str(error)) from None
    if body.model != model:
        raise ApiError(
            404, f"the model {body.model!r} does not exist here; this server runs {model!r}", param="model", code="model_not_found"
        )
    return body


def unknown_model(asked: str, served: str) -> ApiError:
    """Return the error for another model than the one served."""
    return ApiError(404, f"the model {asked!r} does not exist here; this server runs {served!r}", param="model", code="model_not_found")


def queue_full(waiting: int, limit: int, after_s: int) -> ApiError:
    """Return the error for a request that would have to wait behind too many."""
    message = f"{waiting} requests wait already, and at most {limit} may; try again in {after_s} s"
    return ApiError(429, message, kind="rate_limit_error", code="queue_full", headers={"retry-after": str(after_s)})


def _check_unsupported(name: str, value: Any, known: set[str]) -> None:
    """Refuse a field that asks for something this server does not do."""
    if name in _IGNORED or value is None:
        return
    if name not in _NEUTRAL:
        near = did_you_mean(name, known | set(_NEUTRAL))
        raise ApiError(400, f"unrecognized request argument: {name}{near}", param=name, code="unknown_parameter")
    allowed = _NEUTRAL[name]
    if not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in allowed):
        only = " or ".join(msgspec.json.encode(v).decode() for v in allowed) or "null"
        raise ApiError(400, f"{name}: this server supports only {only}", param=name, code="unsupported_value")


def _invalid(text: str) -> ApiError:
    """Return the error for what msgspec found: 'Expected `int`, got `str` - at `$.max_tokens`'."""
    what, _, path = text.partition(" - at `$")
    if what.startswith("Object missing required field"):
        name = what.split("`")[1]
        path = f"{path.rstrip('`')}.{name}"
        what = "it is required"
    param = path.rstrip("`").lstrip(".")
    return ApiError(400, f"{param or 'body'}: {what}", param=param or None, code="invalid_value")


def _prompt_tokens(prompt: str | list[str | int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the prompt as tokens: a text, a list with one text, or a list of tokens."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if isinstance(prompt, str):
        tokens = tuple(tokenizer.encode(prompt))
    else:
        tokens = tuple(t for t in prompt if isinstance(t, int))
        if len(tokens) != len(prompt):
            raise ApiError(
                400, "prompt: give one text or one list of tokens; several prompts in one request are not supported", param="prompt"
            )
    if not tokens:
        raise ApiError(400, "prompt: it is empty; give at least one token", param="prompt")
    wrong = next((t for t in tokens if not 0 <= t < tokenizer.vocab), None)
    if wrong is not None:
        raise ApiError(400, f"prompt: token {wrong} is outside the vocabulary of {tokenizer.vocab}", param="prompt")
    return tokens


def _call(body: Body, prompt: tuple[int, ...], max_tokens: int, context: int, *, is_chat: bool, param: str) -> Call:
    if len(prompt) + max_tokens > context:
        asked = f"{len(prompt)} in the prompt + {max_tokens} to generate = {len(prompt) + max_tokens}"
        message = f"this server's context is {context} tokens, not {asked}; shorten the prompt or ask for fewer"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream: true", param="stream_options")
    return Call(
        is_chat=is_chat,
        prompt=prompt,
        sampling=Sampling(
            max_tokens,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            ignore_eos=bool(body.ignore_eos),
        ),
        stop=_stops(body.stop),
        stream=bool(body.stream),
        include_usage=body.stream_options is not None and body.stream_options.include_usage,
        return_token_ids=bool(body.return_token_ids),
    )


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS or "" in stops:
        raise ApiError(400, f"stop: give up to {_MAX_STOPS} strings, none empty", param="stop", code="invalid_value")
    return stops


# ---------------------------------------------------------------- answers


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's `usage`."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Builds the bodies of one answer: `id`, `created` and `model` are the same in all of them."""

    id: str
    created: int
    model: str
    call: Call

    def whole(self, text: str, tokens: list[int], reason: str) -> dict[str, Any]:
        """Return a body that is not streamed."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.call.is_chat else {"text": text}
        choice = self._choice(content, tokens, reason)
        kind = "chat.completion" if self.call.is_chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": usage(len(self.call.prompt), len(tokens))}

    def chunk(self, text: str, token: int, reason: str | None) -> bytes:
        """Return the event of one token.

        Each token has exactly one, even when its text is empty (half a character, or held back because a stop string may begin there),
        and the last one carries `finish_reason`: whoever counts events counts tokens.
        """
        content = {"delta": {"content": text}} if self.call.is_chat else {"text": text}
        return self._chunk([self._choice(content, [token], reason)], None)

    def opening(self) -> bytes:
        """Return what goes before the first token: in a chat, an event that names the role and carries no token."""
        if not self.call.is_chat:
            return b""
        return self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, [], None)], None)

    def usage_chunk(self, completion_tokens: int) -> bytes:
        """Return the event that `stream_options.include_usage` asks for."""
        return self._chunk([], usage(len(self.call.prompt), completion_tokens))

    def _chunk(self, choices: list[dict[str, Any]], spent: dict[str, int] | None) -> bytes:
        body = {**self._head("chat.completion.chunk" if self.call.is_chat else "text_completion"), "choices": choices}
        if self.call.include_usage:
            body["usage"] = spent
        return event(body)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def _choice(self, content: dict[str, Any], tokens: list[int], reason: str | None) -> dict[str, Any]:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        if self.call.return_token_ids:
            choice["token_ids"] = tokens
        return choice


DONE = b"data: [DONE]\n\n"
_encode: Callable[[Any], bytes] = msgspec.json.Encoder().encode


def event(body: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _encode(body) + b"\n\n"


def model_card(model: str, created: int, max_context: int) -> dict[str, Any]:
    """Return one entry of `GET /v1/models`."""
    return {"id": model, "object": "model", "created": created, "owned_by": "mlsys", "max_model_len": max_context}
