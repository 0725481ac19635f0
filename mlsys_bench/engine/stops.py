"""The text of an answer as it grows, up to a stop string: half-finished characters and half-finished stop strings are held back.

The engine ends an answer with it, and the HTTP process cuts the text with it: the same code over the same tokens, so both see the same end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Decoder(Protocol):
    """What a tokenizer's stream decoder does."""

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the text that is complete with these tokens."""

    def close(self) -> str:
        """Return what is left."""


class TextStream:
    """The text of one answer.  It ends before the first stop string that completes, or after it if `include_stop`."""

    __slots__ = ("_decoder", "_held", "_include_stop", "_stop", "decoded")

    def __init__(self, decoder: Decoder, stop: tuple[str, ...], *, include_stop: bool = False) -> None:
        self._decoder, self._stop, self._include_stop = decoder, stop, include_stop
        self._held = ""
        self.decoded = 0  # characters, shown and held back

    def feed(self, token: int, *, is_last: bool = False) -> tuple[str, bool]:
        """Return the text that may be shown after this token, and whether a stop string ended the answer."""
        text = self._decoder.feed((token,))
        if is_last:
            text += self._decoder.close()
        self.decoded += len(text)
        if not self._stop:
            return text, False
        held, text, self._held = self._held, self._held + text, ""
        cut = first_stop(text, self._stop, len(held), include_stop=self._include_stop)
        if cut is not None:
            return text[:cut], True
        shown = len(text) - (0 if is_last else partial_stop(text, self._stop))
        self._held = text[shown:]
        return text[:shown], False


def first_stop(text: str, stop: tuple[str, ...], known: int = 0, *, include_stop: bool = False) -> int | None:
    """Return where the text is to be cut: at the stop string that completes first (the earliest of those), or after it; None for none.

    No stop string ends within the first `known` characters: what is new decides which one completes first.
    """
    found = [(at + len(s), at) for s in stop if (at := text.find(s, max(known - len(s) + 1, 0))) >= 0]
    if not found:
        return None
    end = min(found)[0]
    return end if include_stop else min(at for e, at in found if e == end)


def partial_stop(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest end of the text that a stop string begins with."""
    return max((n for s in stop for n in range(1, min(len(s), len(text) + 1)) if text.endswith(s[:n])), default=0)
