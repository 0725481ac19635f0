"""Stamped pieces of an answer -> when which tokens came.  Parsed after the stream has ended, never while it runs.

What is a token event: for completions every event with a choice, save one that carries an end and no text; for chat every event whose
delta has a `content`, reasoning, refusal or tool call, save one that only names the role.  An end without text is taken back when the
server's `usage` counts it.  Events before the first text count where `usage` counts as many tokens (the first may be half a character);
else they are a greeting, sent before any token was made.

Who counts: the server's `usage` (that of each event where events carry one), else a tokenizer if one was given, else one token an event.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from mlsys_bench.loadtest.tokens import Count
from mlsys_bench.loadtest.wire import WireError

Piece = tuple[float, bytes]
Emitted = tuple[float, bool, str, int | None]  # (when, whether it counts without being asked, text, tokens so far by the server's count)
Source = Literal["usage", "chunks", "tokenizer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one answer said.  `is_whole`: it came to an end by its own word (a finish reason or [DONE]).

    A stamp with 0 tokens is the moment of an answer that has no tokens, such as an embedding.
    """

    token_s: tuple[float, ...]
    tokens_per_event: tuple[int, ...]
    prompt_tokens: int | None
    output_tokens: int | None
    token_source: Source | None
    is_whole: bool
    text: str = ""  # what a conversation would go on with: thoughts are no part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens by the server's count."""

    prompt_tokens: int | None = None
    output_tokens: int | None = None


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | list[Any] | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None
    message: _Delta | None = None  # of an answer that is not streamed


class _Details(msgspec.Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    completion_tokens_details: _Details | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode
_decode_lines = msgspec.json.Decoder(_Event).decode_lines
_NO_USAGE = _Usage()


def read(pieces: Sequence[Piece], count: Count | None = None) -> Answer:
    """Return the tokens of a stream, whole or cut off.  Raises WireError for what is no stream of completion events."""
    try:
        found = _read(_at_once(pieces) or lines(pieces), count)
    except WireError:
        if not _is_unusual(pieces):
            raise
        return _read(((at, data) for at, _, data in sse(pieces)), count)
    if not found.token_s and not found.is_whole and _is_unusual(pieces):
        return _read(((at, data) for at, _, data in sse(pieces)), count)
    return found


def _is_unusual(pieces: Sequence[Piece]) -> bool:
    """Say whether a stream has events of several lines, or lines that end with a carriage return alone: lawful and rare."""
    return _SEVERAL_LINES.search(b"".join(piece for _, piece in pieces)) is not None


def _at_once(pieces: Sequence[Piece]) -> list[tuple[float, bytes | _Event]] | None:
    """Return the events of a stream, all decoded in one call, or None where it is not of the usual shape: whole events in every piece.

    Half the time of decoding them one by one.  A raw newline cannot stand inside JSON, so two of them end an event.
    """
    body = b"".join([piece for _, piece in pieces])
    if not body.startswith(b"data: ") or b"\r" in body or any(not piece.endswith(b"\n\n") for _, piece in pieces):
        return None
    is_done = body.endswith(b"\n\ndata: [DONE]\n\n")
    try:
        events: list[Any] = _decode_lines(body[6 : -16 if is_done else -2].replace(b"\n\ndata: ", b"\n"))
    except (msgspec.DecodeError, RecursionError):
        return None
    if is_done:
        events.append(b"[DONE]")
    moments = [at for at, _ in pieces]
    more = len(events) - len(moments)
    if more >= 0 and pieces[-1][1].count(b"\n") == 2 * (more + 1):  # one event in each, but for the last
        moments += moments[-1:] * more
    else:
        moments = [at for at, piece in pieces for _ in range(piece.count(b"\n") // 2)]
    return list(zip(moments, events, strict=True)) if len(moments) == len(events) else None


def _read(events: Iterable[tuple[float, bytes | _Event]], count: Count | None) -> Answer:
    emitted: list[Emitted] = []
    usage = _NO_USAGE
    is_whole = thinks = False
    thoughts: set[int] = set()  # which of the events carry no word of the answer itself
    for at, data in events:
        if isinstance(data, _Event):
            event = _checked(data)
        elif data == b"[DONE]":
            is_whole = True
            continue
        else:
            event = _event(data)
        usage = event.usage or usage
        if not event.choices:
            continue
        choice = event.choices[0]
        delta, ends = choice.delta, choice.finish_reason is not None
        text = choice.text if delta is None and choice.text else _text(choice)
        is_whole = is_whole or ends
        if delta is not None and (delta.reasoning_content or delta.reasoning):
            thinks = True
            if not delta.content:
                thoughts.add(len(emitted))
        if text is not None:
            emitted.append((at, True, text, event.usage.completion_tokens if event.usage else None))
        elif ends:
            emitted.append((at, False, "", event.usage.completion_tokens if event.usage else None))
    answer = assemble(emitted, usage=_usage(usage, thinks), is_whole=is_whole, count=count)
    return replace(answer, text="".join(text for i, (_, _, text, _) in enumerate(emitted) if i not in thoughts)) if thoughts else answer


def _usage(usage: _Usage, thinks: bool) -> Usage:
    """Return the tokens that were seen: thoughts that are counted but never streamed are no part of what arrived."""
    tokens = usage.completion_tokens
    hidden = usage.completion_tokens_details.reasoning_tokens if usage.completion_tokens_details else None
    if tokens is not None and hidden and not thinks and hidden < tokens:
        tokens -= hidden
    return Usage(prompt_tokens=usage.prompt_tokens, output_tokens=tokens)


def read_whole(pieces: Sequence[Piece], count: Count | None = None) -> Answer:
    """Return what an answer said that came in one piece of JSON: one stamp, that of its last byte.  Raises WireError."""
    event = _event(b"".join(data for _, data in pieces))
    if not event.choices:
        raise WireError("an answer without choices is no completion")
    usage, choice = event.usage or _NO_USAGE, event.choices[0]
    message = choice.message
    text = (choice.text if message is None else "".join(_spoken(message))) or ""
    return whole(pieces, usage=Usage(prompt_tokens=usage.prompt_tokens, output_tokens=usage.completion_tokens), text=text, count=count)


# ---------------------------------------------------------------- for every kind of answer


def assemble(emitted: Sequence[Emitted], *, usage: Usage, is_whole: bool, count: Count | None = None) -> Answer:
    """Return the answer that these events make, with their tokens counted by the best source there is."""
    text = "".join(text for _, _, text, _ in emitted)
    tokens = usage.output_tokens
    source: Source = "usage"
    if tokens is not None:
        stamps, spread = _by_usage(emitted, tokens)
    elif count is not None and text:
        source = "tokenizer"
        stamps, spread = _counted(emitted, count([text for _, _, text, _ in emitted]))
        tokens = sum(spread)
    else:
        source = "chunks"
        stamps = [at for at, counts, _, _ in emitted if counts][_silent(emitted) :]
        spread, tokens = (1,) * len(stamps), len(stamps)
    return Answer(
        token_s=tuple(stamps),
        tokens_per_event=spread,
        prompt_tokens=usage.prompt_tokens,
        output_tokens=tokens,
        token_source=source,
        is_whole=is_whole,
        text=text,
    )


def whole(pieces: Sequence[Piece], *, usage: Usage, text: str = "", count: Count | None = None) -> Answer:
    """Return an answer that is there at once, at its last byte: its tokens by usage, else by a tokenizer, else none are known."""
    tokens, source = usage.output_tokens, "usage"
    if tokens is None and count is not None and text:
        tokens, source = sum(count([text])), "tokenizer"
    return Answer(
        token_s=(pieces[-1][0],) if pieces else (),
        tokens_per_event=(tokens or 0,) if pieces else (),
        prompt_tokens=usage.prompt_tokens,
        output_tokens=tokens,
        token_source=None if tokens is None else "tokenizer" if source == "tokenizer" else "usage",
        is_whole=True,
        text=text,
    )


def lines(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Yield each `data:` line of an event stream with the moment its last byte came, wherever the pieces were cut."""
    rest: list[bytes] = []
    for at, piece in pieces:
        *ended, last = piece.split(b"\n")
        for line in ended:
            if rest:
                line = b"".join((*rest, line))
                rest = []
            if line.startswith(b"data:"):
                yield at, line[5:].strip()
        if last:
            rest.append(last)
    final = b"".join(rest)
    if final.startswith(b"data: [DONE]"):  # some servers end without the last newline
        yield pieces[-1][0], b"[DONE]"


def sse(pieces: Sequence[Piece]) -> Iterator[tuple[float, str, bytes]]:
    """Yield (moment of the last byte of its data, name, data) of each event, by the letter of the HTML standard's event streams.

    An event that the end cut off is left out, as the standard says, unless its last line of data is whole JSON: a server that ends without
    the empty line said all it had to say.
    """
    name, data, at_data = "", list[bytes](), 0.0
    for at, line in text_lines(pieces):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                yield at_data, name, b"\n".join(data)
            name, data = "", []
        elif field == b"data":
            data.append(value)
            at_data = at
        elif field == b"event":
            name = value.decode(errors="replace")
    last = b"\n".join(data)
    if last == b"[DONE]" or last.endswith(b"}"):
        yield at_data, name, last


def text_lines(pieces: Sequence[Piece]) -> Iterator[Piece]:
    r"""Yield each line with the moment its end came; lines end with \n, \r\n or \r.  What comes after the last end is a line too."""
    rest: list[bytes] = []
    after_return = False
    for at, piece in pieces:
        fresh = piece[1:] if after_return and piece.startswith(b"\n") else piece
        after_return = piece.endswith(b"\r")
        *ended, last = _LINE_END.split(fresh)
        for line in ended:
            yield at, b"".join((*rest, line)).removeprefix(b"\xef\xbb\xbf")
            rest = []
        if last:
            rest.append(last)
    if rest:
        yield pieces[-1][0], b"".join(rest)


_LINE_END = re.compile(rb"\r\n|\n|\r")
_SEVERAL_LINES = re.compile(rb"data:[^\r\n]*(?:\n|\r\n)data:|\r(?!\n)")


# ---------------------------------------------------------------- events of completions


def _event(data: bytes) -> _Event:
    try:
        event = _decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise WireError(f"an event is no completion: {data[:60]!r}") from error
    return _checked(event)


def _checked(event: _Event) -> _Event:
    if event.error is not None:
        raise WireError(f"the server says: {str(event.error)[:80]}")
    return event


def _text(choice: _Choice) -> str | None:
    """Return the text of a token event, maybe empty, or None for an event that carries no token."""
    delta = choice.delta
    if delta is None:
        return choice.text if choice.text or choice.finish_reason is None else None
    if type(delta.content) is str and delta.content:
        return delta.content
    spoken = _spoken(delta)
    if spoken:
        return "".join(spoken)
    return "" if delta.content == "" and delta.role is None and choice.finish_reason is None else None


def _spoken(delta: _Delta) -> list[str]:
    """Return what a message says, in whatever field: content, thoughts, a refusal, the call of a tool."""
    calls = [*(delta.tool_calls or ()), *([delta.function_call] if delta.function_call is not None else ())]
    parts = delta.content if isinstance(delta.content, list) else [delta.content] if isinstance(delta.content, str) else []
    said = [
        delta.reasoning_content or delta.reasoning or "",
        *(part if isinstance(part, str) else _inner_text(part) for part in parts),
        delta.refusal or "",
        *map(_called, calls),
    ]
    return [text for text in said if text]


def _inner_text(part: Any) -> str:
    """Return the text of a content part, e.g. {"type": "text", "text": "so"}."""
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else str(part)


def _called(call: Any) -> str:
    """Return what the model wrote to call a tool: a name, or a bit of the arguments."""
    function = call.get("function", call) if isinstance(call, dict) else None
    return f"{function.get('name') or ''}{function.get('arguments') or ''}" if isinstance(function, dict) else ""


# ---------------------------------------------------------------- counting


def _by_usage(emitted: Sequence[Emitted], tokens: int) -> tuple[list[float], tuple[int, ...]]:
    """Return moments and tokens per event by the server's count: of each event where it said so, else spread evenly."""
    if emitted and emitted[-1][3] is not None:
        gains = _gains([sofar for _, _, _, sofar in emitted], tokens)
        if gains is not None:
            return _counted(emitted, gains)
    stamps = _as_many_as(emitted, tokens)
    return stamps, _spread(tokens, len(stamps))


def _counted(emitted: Sequence[Emitted], counts: Sequence[int]) -> tuple[list[float], tuple[int, ...]]:
    kept = [(at, n) for (at, *_), n in zip(emitted, counts, strict=True) if n]
    return [at for at, _ in kept], tuple(n for _, n in kept)


def _gains(sofar: Sequence[int | None], tokens: int) -> list[int] | None:
    """Return the tokens of each event from counts that grow to the last, or None where the counts are no such thing.

    An event without a count says nothing was added; a count that only stands in the last event says nothing of the others.
    """
    known = [count for count in sofar if count is not None]
    if len(known) < 2 or known[-1] != tokens or 2 * len(known) < len(sofar) or known != sorted(known) or known[0] == tokens:
        return None
    before, gains = 0, []
    for count in sofar:
        gains.append(0 if count is None else count - before)
        before = before if count is None else count
    return gains


def _as_many_as(emitted: Sequence[Emitted], tokens: int) -> list[float]:
    """Return the moments of the token events, as many as the server counted tokens where that can be had.

    Too few: ends without text come back (the last token may be half a character).
    Too many: those that come before any text go first, as greetings of a server that has made no token yet; then events are left out
    evenly, the first and the last stay.
    """
    stamps = [at for at, counts, _, _ in emitted if counts]
    if len(stamps) > tokens:
        stamps = stamps[min(_silent(emitted), len(stamps) - tokens) :]
    if len(stamps) == tokens:
        return stamps
    if len(stamps) > tokens:
        return stamps[:tokens] if tokens <= 1 else [stamps[round(i * (len(stamps) - 1) / (tokens - 1))] for i in range(tokens)]
    keep = [counts for _, counts, _, _ in emitted]
    missing = tokens - len(stamps)
    for i in reversed(range(len(keep))):
        if missing > 0 and not keep[i]:
            keep[i] = True
            missing -= 1
    return [at for (at, *_), kept in zip(emitted, keep, strict=True) if kept]


def _silent(emitted: Sequence[Emitted]) -> int:
    """Return how many token events come before the first with text; none where no event has any."""
    return next((sum(counts for _, counts, _, _ in emitted[:i]) for i, (_, _, text, _) in enumerate(emitted) if text), 0)


def _spread(tokens: int, events: int) -> tuple[int, ...]:
    """Return tokens per event, as even as whole numbers go; sums to `tokens`."""
    if tokens == events:
        return (1,) * events
    return tuple((i + 1) * tokens // events - i * tokens // events for i in range(events))
