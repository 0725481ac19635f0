"""Stamped pieces of a streamed answer -> when which tokens came.  Parsed after the stream has ended, never while it runs.

What is a token event: for completions every event with a choice, save one that carries an end and no text; for chat every event whose
delta has a `content` (or reasoning) key, save one that only names the role.  An end without text is taken back when the server's `usage`
counts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from mlsys_bench.loadtest.wire import WireError

Piece = tuple[float, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one stream said.  `is_whole`: it came to an end by its own word (a finish reason or [DONE])."""

    token_s: tuple[float, ...]
    tokens_per_event: tuple[int, ...]
    prompt_tokens: int | None
    output_tokens: int
    token_source: Literal["usage", "chunks"]
    is_whole: bool


class _Delta(msgspec.Struct, gc=False):
    role: str | None = None
    content: str | msgspec.UnsetType | None = msgspec.UNSET
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(msgspec.Struct, gc=False):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None


class _Usage(msgspec.Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Event(msgspec.Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: msgspec.Raw | None = None


_decode = msgspec.json.Decoder(_Event).decode


def read(pieces: Sequence[Piece]) -> Answer:
    """Return the tokens of a stream, whole or cut off.  Raises WireError for what is no stream of completion events."""
    counted: list[tuple[float, bool]] = []  # (when, whether it counts without being asked)
    usage: _Usage | None = None
    is_whole = False
    for at, data in lines(pieces):
        if data == b"[DONE]":
            is_whole = True
            continue
        event = _event(data)
        usage = event.usage or usage
        for choice in event.choices[:1]:
            counts, ends = _carries_a_token(choice), choice.finish_reason is not None
            is_whole = is_whole or ends
            if counts or ends:
                counted.append((at, counts))
    if usage is None or usage.completion_tokens is None:
        stamps = [at for at, counts in counted if counts]
        spread, source = (1,) * len(stamps), "chunks"
    else:
        stamps = _as_many_as(counted, usage.completion_tokens)
        spread, source = _spread(usage.completion_tokens, len(stamps)), "usage"
    return Answer(
        token_s=tuple(stamps),
        tokens_per_event=spread,
        prompt_tokens=usage.prompt_tokens if usage else None,
        output_tokens=usage.completion_tokens if usage and usage.completion_tokens is not None else len(stamps),
        token_source="usage" if source == "usage" else "chunks",
        is_whole=is_whole,
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


def _event(data: bytes) -> _Event:
    try:
        event = _decode(data)
    except msgspec.DecodeError as error:
        raise WireError(f"an event is no completion: {data[:60]!r}") from error
    if event.error is not None and bytes(event.error) != b"null":
        raise WireError(f"the server says: {bytes(event.error)[:80]!r}")
    return event


def _carries_a_token(choice: _Choice) -> bool:
    delta = choice.delta
    if delta is None:
        return bool(choice.text) or (choice.text is not None and choice.finish_reason is None)
    if delta.reasoning_content or delta.reasoning:
        return True
    if not isinstance(delta.content, str):
        return False
    return bool(delta.content) or (delta.role is None and choice.finish_reason is None)


def _as_many_as(counted: Sequence[tuple[float, bool]], tokens: int) -> list[float]:
    """Return the moments of the token events, as many as the server counted tokens where that can be had.

    Too few: ends without text come back (the last token may be half a character).
    Too many: events are left out evenly, the first and the last stay.
    """
    missing = tokens - sum(counts for _, counts in counted)
    keep = [counts for _, counts in counted]
    for i in reversed(range(len(keep))):
        if missing > 0 and not keep[i]:
            keep[i] = True
            missing -= 1
    stamps = [at for (at, _), kept in zip(counted, keep, strict=True) if kept]
    if len(stamps) <= tokens:
        return stamps
    if tokens <= 1:
        return stamps[:tokens]
    return [stamps[round(i * (len(stamps) - 1) / (tokens - 1))] for i in range(tokens)]


def _spread(tokens: int, events: int) -> tuple[int, ...]:
    """Return tokens per event, as even as whole numbers go; sums to `tokens`."""
    if tokens == events:
        return (1,) * events
    return tuple((i + 1) * tokens // events - i * tokens // events for i in range(events))
