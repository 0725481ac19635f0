"""OpenAI's requests, checked into a frozen `Call`, and errors in its shape.

Every field is checked by type and range, and an error names it.  A field that asks for something this server does not do is refused
unless it asks for nothing (`best_of: 1`, `tools: []`); a field nobody knows is refused as well, so that a slip of the pen is not silently
ignored.  Some fields go beyond OpenAI, with the names vLLM gives them: `top_k`, `min_p`, `repetition_penalty`, `ignore_eos`,
`include_stop_str_in_output`, `return_token_ids`, `priority` (lower goes first, 0 where none is given), in streams
`continuous_usage_stats`, and in chats `add_generation_prompt` and `chat_template_kwargs`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from mlsys_bench.engine.sampling import PENALTIES, Sampling, sampling
from mlsys_bench.engine.tokenizer import Tokenizer
from mlsys_bench.errors import BadInput, did_you_mean

_COMPLETION_TOKENS = 16  # OpenAI's default
_CHAT_TOKENS = 256  # a chat goes on until the context is full, but not for ever
_MAX_STOPS, _MAX_LOGPROBS, _MAX_CHOICES = 4, 20, 128

# Fields that change nothing here, whatever they say.
_IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls", "reasoning_effort"),
    *("verbosity", "request_id", "spaces_between_special_tokens"),
}
# Fields that ask for something this server does not do, and the values with which they do not ask for it (null always is one).
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "length_penalty": (1,),
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
    "stop_token_ids": ([],),
    "skip_special_tokens": (True,),
}

Count = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Priority = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Choices = Annotated[int, Meta(ge=1, le=_MAX_CHOICES)]
Top = Annotated[int, Meta(ge=0, le=_MAX_LOGPROBS)]
TopK = Annotated[int, Meta(ge=-1, le=2**63 - 1)]
Role = Literal["system", "developer", "user", "assistant", "tool"]
Nothing = Annotated[list[Any], Meta(max_length=0)] | None


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


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What OpenAI's `stream_options` may hold, and vLLM's: usage in every event, of what has come until then."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """The field that all endpoints share."""

    model: str


class Body(Asked, frozen=True, kw_only=True):
    """The fields that completions and chats share."""

    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: TopK | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(ge=PENALTIES[0], le=PENALTIES[1])] | None = None
    logit_bias: dict[str, Bias] | None = None
    n: Choices | None = None
    seed: Seed | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    priority: Priority | None = None
    return_token_ids: bool | None = None


class CompletionBody(Body, frozen=True, kw_only=True):
    """`POST /v1/completions`."""

    prompt: str | list[str | int]
    logprobs: Top | None = None
    echo: bool | None = None


class Part(msgspec.Struct, frozen=True):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a chat, with what an answer of ours has in it, so that it can be sent back as it came."""

    role: Role
    content: str | list[Part] | None = None
    name: str | None = None
    tool_call_id: str | None = None  # which call a tool answers
    refusal: str | None = None
    annotations: list[Any] | None = None
    tool_calls: Nothing = None
    function_call: None = None
    audio: None = None


class ChatBody(Body, frozen=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Top | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A request that can be served."""

    is_chat: bool
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    n: int
    ignore_eos: bool
    priority: int
    include_stop: bool
    echo: str  # what goes before the answer: the prompt, or nothing
    stream: bool
    include_usage: bool
    usage_per_event: bool
    return_token_ids: bool

    @property
    def choices(self) -> list[Sampling]:
        """How the tokens of each choice are chosen: a seed is that of the first, and the next ones follow it."""
        if self.sampling.seed is None:
            return [self.sampling] * self.n
        return [dataclasses.replace(self.sampling, seed=self.sampling.seed + i) for i in range(self.n)]


# ---------------------------------------------------------------- requests

B = TypeVar("B", bound=Asked)


def parse_completion(data: bytes, *, model: str, context: int, tokenizer: Tokenizer) -> Call:
    """Return the call, or raise ApiError.  `context` is how many tokens prompt and answer may have together."""
    body = decode(data, CompletionBody, model)
    prompt = _prompt_tokens(body.prompt, tokenizer)
    if body.echo and body.logprobs is not None:
        raise ApiError(400, "echo: not together with logprobs; nobody has computed those of the prompt", param="echo")
    call = _call(body, prompt, body.max_tokens or _room(context, prompt, _COMPLETION_TOKENS), context, tokenizer, body.logprobs)
    if not body.echo:
        return call
    return dataclasses.replace(call, echo=body.prompt if isinstance(body.prompt, str) else tokenizer.decode(prompt))


def parse_chat(data: bytes, *, model: str, context: int, tokenizer: Tokenizer) -> Call:
    """Return the call, or raise ApiError."""
    body = decode(data, ChatBody, model)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs: only with logprobs: true", param="top_logprobs")
    prompt = _chat_tokens(body, tokenizer)
    asked = body.max_completion_tokens or body.max_tokens or _room(context, prompt, _CHAT_TOKENS)
    return _call(body, prompt, asked, context, tokenizer, (body.top_logprobs or 0) if body.logprobs else None)


def _room(context: int, prompt: tuple[int, ...], at_most: int) -> int:
    """Return how many tokens to generate when nobody says."""
    return max(min(context - len(prompt), at_most), 1)


def _chat_tokens(body: ChatBody, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return a chat as the model's template writes it; what the template objects to is a bad request."""
    messages = [_message(m) for m in body.messages]
    settings = {"add_generation_prompt": body.add_generation_prompt is not False, **(body.chat_template_kwargs or {})}
    if "messages" in settings:
        raise ApiError(400, "chat_template_kwargs: the messages stand beside it", param="chat_template_kwargs", code="invalid_value")
    try:
        tokens = tuple(tokenizer.chat(messages, **settings))
    except BadInput as error:
        raise ApiError(400, f"messages: {error}", param="messages", code="invalid_value") from None
    if not tokens:
        raise ApiError(400, "messages: the model's chat template makes no text of them", param="messages", code="invalid_value")
    return tokens


def _message(m: Message) -> dict[str, str]:
    """Return a message as templates know it."""
    content = "".join(part.text for part in m.content) if isinstance(m.content, list) else m.content or ""
    named = {"name": m.name, "tool_call_id": m.tool_call_id}
    return {"role": m.role, "content": content, **{name: value for name, value in named.items() if value}}


def decode(data: bytes, kind: type[B], model: str) -> B:
    """Return the body as this kind, with the first thing wrong named."""
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested deeper than any request needs") from None
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
        tokens = _encoded(prompt, tokenizer)
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


def _encoded(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    try:
        return tuple(tokenizer.encode(text))
    except BadInput as error:
        raise ApiError(400, f"prompt: {error}", param="prompt", code="invalid_value") from None


def _call(body: Body, prompt: tuple[int, ...], max_tokens: int, context: int, tokenizer: Tokenizer, logprobs: int | None) -> Call:
    is_chat = isinstance(body, ChatBody)
    if len(prompt) + max_tokens > context:
        asked = f"{len(prompt)} in the prompt + {max_tokens} to generate = {len(prompt) + max_tokens}"
        message = f"this server's context is {context} tokens, not {asked}; shorten the prompt or ask for fewer"
        raise ApiError(400, message, param="messages" if is_chat else "prompt", code="context_length_exceeded")
    if body.stream_options is not None and not body.stream:
        raise ApiError(400, "stream_options: only with stream: true", param="stream_options")
    shown = body.stream_options or StreamOptions()
    return Call(
        is_chat=is_chat,
        prompt=prompt,
        max_tokens=max_tokens,
        sampling=_sampling(body, tokenizer, logprobs),
        n=body.n or 1,
        ignore_eos=bool(body.ignore_eos),
        priority=body.priority or 0,
        include_stop=bool(body.include_stop_str_in_output),
        echo="",
        stream=bool(body.stream),
        include_usage=bool(shown.include_usage),
        usage_per_event=bool(shown.include_usage and shown.continuous_usage_stats),
        return_token_ids=bool(body.return_token_ids),
    )


def _sampling(body: Body, tokenizer: Tokenizer, logprobs: int | None) -> Sampling:
    """Return how tokens are chosen: what is not said is OpenAI's default, a temperature of 1 and no filter."""
    names = ("top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed")
    given = {name: value for name in names if (value := getattr(body, name)) is not None}
    temperature = 1.0 if body.temperature is None else body.temperature
    bias = _bias(body.logit_bias or {}, tokenizer.vocab)
    try:
        return sampling(temperature=temperature, logprobs=logprobs, logit_bias=bias, stop=_stops(body.stop), **given)
    except BadInput as error:
        raise ApiError(400, str(error), param=str(error).split()[0], code="invalid_value") from None


def _bias(given: dict[str, float], vocab: int) -> dict[int, float]:
    """Return a bias by token: JSON has only texts for names."""
    wrong = next((name for name in given if not (name.isascii() and name.isdigit() and int(name[:20]) < vocab)), None)
    if wrong is not None:
        raise ApiError(400, f"logit_bias: {wrong!r} is no token: give ids from 0 to {vocab - 1}", param="logit_bias", code="invalid_value")
    return {int(name): value for name, value in given.items()}


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > _MAX_STOPS or "" in stops:
        raise ApiError(400, f"stop: give up to {_MAX_STOPS} strings, none empty", param="stop", code="invalid_value")
    return stops
