"""What the HTTP process and the engine process say to each other: msgpack frames over a socket pair.

A frame is four bytes of length (big endian) and one message.  Request ids are the HTTP process's own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

import msgspec

from mlsys_bench.engine.sampling import Logprobs, Sampling

_LENGTH = struct.Struct(">I")


class Add(msgspec.Struct, frozen=True, array_like=True, tag="add"):
    """Generate from this prompt."""

    id: int
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    ignore_eos: bool = False
    priority: int = 0


class Cancel(msgspec.Struct, frozen=True, array_like=True, tag="cancel"):
    """Forget this request and free its blocks."""

    id: int


class Embed(msgspec.Struct, frozen=True, array_like=True, tag="embed"):
    """Give the vectors of these texts."""

    id: int
    texts: tuple[tuple[int, ...], ...]


class Stop(msgspec.Struct, frozen=True, array_like=True, tag="stop"):
    """End the engine process."""


class Ready(msgspec.Struct, frozen=True, array_like=True, tag="ready"):
    """The model is loaded and warm, on this device."""

    device: str
    free_blocks: int
    text_tokens: int = 0  # of an encoder: how long a text may be


class Failed(msgspec.Struct, frozen=True, array_like=True, tag="failed"):
    """The engine could not be built; the process ends after this."""

    message: str


class Refused(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """The engine does not take this request."""

    id: int
    message: str


class Embedded(msgspec.Struct, frozen=True, array_like=True, tag="embedded"):
    """The vectors of a request's texts, one after the other: little-endian fp32."""

    id: int
    vectors: bytes


class Stepped(msgspec.Struct, frozen=True, array_like=True, tag="stepped"):
    """What one engine step gave.  `step_s` is None when only the state changed (a cancelled request).

    A request may get several tokens in a step; its end belongs to the last of them.
    """

    step_s: float | None
    tokens: tuple[tuple[int, int], ...]  # (request, token)
    finished: tuple[tuple[int, str], ...]  # (request, 'stop' or 'length')
    preempted: int
    free_blocks: int
    running: int
    waiting: int
    logprobs: tuple[Logprobs | None, ...] = ()  # of `tokens`, or none at all
    prefix_queries: int = 0  # tokens looked for in the prefix cache
    prefix_hits: int = 0
    drafted: int = 0  # tokens guessed
    accepted: int = 0


Command = Add | Embed | Cancel | Stop
Event = Ready | Failed | Refused | Embedded | Stepped

_encoder = msgspec.msgpack.Encoder()
commands = msgspec.msgpack.Decoder(Command)
events = msgspec.msgpack.Decoder(Event)


def frame(message: Command | Event) -> bytes:
    """Return the message as one frame."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Frames:
    """Cuts a byte stream back into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield every frame that is complete now."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                return
            yield bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
