"""Requests read and answers written: bytes in, bytes out.  What does not change from request to request is built once."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import msgspec

from mlsys_bench.loadtest.truth import Behaviour

MODEL = "truth"
_WORD = " the"
_USUAL_TOKENS = 16  # of an answer to a request that does not say
_CHARS_PER_TOKEN = 4
_KEPT = 64  # whole answers, for requests that ask the same
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
_encode = msgspec.json.Encoder().encode

Kind = Literal["chat", "completions", "embeddings"]
_PATHS: dict[bytes, Kind] = {
    b"/v1/chat/completions": "chat",
    b"/v1/completions": "completions",
    b"/v1/embeddings": "embeddings",
}


class _Wish(msgspec.Struct, gc=False):
    include_usage: bool = False


class _Body(msgspec.Struct, gc=False):
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: _Wish | None = None
    prompt: msgspec.Raw = msgspec.Raw(b"")
    messages: msgspec.Raw = msgspec.Raw(b"")
    input: msgspec.Raw = msgspec.Raw(b"")


_decode = msgspec.json.Decoder(_Body).decode


class Request(NamedTuple):
    """One HTTP request, whole.  A tuple, as `Asked` is: they are made for every request and frozen classes cost 2 µs each."""

    method: bytes
    path: bytes
    body: bytes
    due_unix_s: float | None  # when the client wanted to send it, by its header x-mlsys-sched
    stays: bool  # the connection is kept

    def kind(self) -> Kind | None:
        """Return what it asks to be generated; None when it asks something else."""
        return _PATHS.get(self.path) if self.method == b"POST" else None


def cut(buffer: bytes) -> tuple[Request, int] | None:
    """Return the first request of a buffer and its length in bytes; None while it is not whole.  Raises ValueError for what is no HTTP."""
    end = buffer.find(b"\r\n\r\n")
    if end < 0:
        return None
    line_end = buffer.find(b"\r\n", 0, end + 2)
    method, path, _version = buffer[:line_end].split(b" ", 2)
    head = buffer[line_end : end + 2].lower()
    size = end + 4 + int(_header(head, b"content-length") or 0)
    if len(buffer) < size:
        return None
    if b"\r\ntransfer-encoding:" in head:
        raise ValueError("a request body in chunks is not understood")
    due = _header(head, b"x-mlsys-sched")
    return Request(
        method=method,
        path=path.partition(b"?")[0],
        body=buffer[end + 4 : size],
        due_unix_s=None if due is None else float(due),
        stays=_header(head, b"connection") != b"close",
    ), size


def _header(head: bytes, name: bytes) -> bytes | None:
    at = head.find(b"\r\n%b:" % name)
    return None if at < 0 else head[at + len(name) + 3 : head.index(b"\r\n", at + 2)].strip()


class Asked(NamedTuple):
    """What one generation request wants."""

    kind: Kind
    streams: bool
    tokens: int
    prompt_tokens: int
    usage: bool


def asked(kind: Kind, body: bytes, fixed_tokens: int | None) -> Asked:
    """Return what a body asks.  Raises ValueError when it is no JSON of the kind."""
    said = _decode(body)
    prompt = said.messages if kind == "chat" else said.prompt if kind == "completions" else said.input
    wanted = said.max_tokens or said.max_completion_tokens or _USUAL_TOKENS
    return Asked(
        kind=kind,
        streams=said.stream and kind != "embeddings",
        tokens=fixed_tokens or wanted,
        prompt_tokens=max(1, len(bytes(prompt)) // _CHARS_PER_TOKEN),
        usage=said.stream_options is not None and said.stream_options.include_usage,
    )


def response(body: bytes, status: bytes = b"200 OK", kind: bytes = b"application/json") -> bytes:
    """Return a whole HTTP response."""
    return b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (status, kind, len(body), body)


def error(status: bytes, message: str) -> bytes:
    """Return a response that says what went wrong, as OpenAI's API does."""
    return response(_encode({"error": {"message": message, "type": "truth"}}), status)


def models() -> bytes:
    """Return the answer to GET /v1/models."""
    return response(_encode({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "mlsys"}]}))


@lru_cache(maxsize=256)
def whole(what: Asked) -> bytes:
    """Return an answer that is not streamed."""
    usage = {"prompt_tokens": what.prompt_tokens, "completion_tokens": what.tokens, "total_tokens": what.prompt_tokens + what.tokens}
    if what.kind == "embeddings":
        data = [{"object": "embedding", "index": 0, "embedding": [0.1, 0.2, 0.3, 0.4]}]
        return response(_encode({"object": "list", "model": MODEL, "data": data, "usage": usage}))
    text = _WORD * what.tokens
    said = {"message": {"role": "assistant", "content": text}} if what.kind == "chat" else {"text": text}
    choice = {"index": 0, **said, "finish_reason": "length"}
    return response(_encode({"id": "t", "object": _object(what.kind), "created": 1, "model": MODEL, "choices": [choice], "usage": usage}))


class Streams:
    """The bytes of streamed answers of one behaviour."""

    def __init__(self, how: Behaviour) -> None:
        self.per_event = how.tokens_per_event
        self._kinds = {kind: _Events(kind, how) for kind in ("completions", "chat")}
        self._whole: dict[tuple[Asked, int], bytes] = {}

    def on_arrival(self, what: Asked) -> bytes:
        """Return what goes out before any token."""
        return self._kinds[what.kind].on_arrival

    def events(self, what: Asked) -> int:
        """Return how many token events an answer has."""
        return -(-what.tokens // self.per_event)

    def token(self, what: Asked) -> bytes:
        """Return any token event but the first and the last."""
        return self._kinds[what.kind].token

    def event(self, what: Asked, i: int) -> bytes:
        """Return token event `i`, with what goes before the first and after the last."""
        events, last = self._kinds[what.kind], i + 1 == self.events(what)
        start = events.with_first if i == 0 else b""
        if not last:
            return start + events.token
        return start + events.token_event(what.tokens - i * self.per_event, "length") + self._end(what)

    def at_once(self, what: Asked, begin: int) -> bytes:
        """Return token event `begin` and all after it."""
        key = (what, begin)
        if key not in self._whole:
            if len(self._whole) >= _KEPT:
                self._whole.clear()
            self._whole[key] = b"".join(self.event(what, i) for i in range(begin, self.events(what)))
        return self._whole[key]

    def _end(self, what: Asked) -> bytes:
        counts = {"prompt_tokens": what.prompt_tokens, "completion_tokens": what.tokens, "total_tokens": what.prompt_tokens + what.tokens}
        usage = self._kinds[what.kind].made([], {"usage": counts}) if what.usage else b""
        return usage + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class _Events:
    def __init__(self, kind: Kind, how: Behaviour) -> None:
        self._kind = kind
        self.token = self.token_event(how.tokens_per_event, None)
        is_early = how.headers == "early" or how.role == "early"
        named = kind == "chat" and how.role != "none"
        role = self.made([{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]) if named else b""
        self.on_arrival = (_HEAD if is_early else b"") + (role if how.role == "early" else b"")
        self.with_first = (b"" if is_early else _HEAD) + (role if how.role == "with" else b"")

    def token_event(self, tokens: int, finish: str | None) -> bytes:
        text = _WORD * tokens
        said = {"delta": {"content": text}} if self._kind == "chat" else {"text": text, "logprobs": None}
        return self.made([{"index": 0, **said, "finish_reason": finish}])

    def made(self, choices: list[Any], more: Mapping[str, Any] | None = None) -> bytes:
        name = _object(self._kind, ".chunk")
        event = {"id": "t", "object": name, "created": 1, "model": MODEL, "choices": choices, **(more or {})}
        return _chunk(b"data: " + _encode(event) + b"\n\n")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _object(kind: Kind, part: str = "") -> str:
    return f"chat.completion{part}" if kind == "chat" else "text_completion"
