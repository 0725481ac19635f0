"""Tokens to text, one at a time: half-finished characters and half-finished stop strings are held back."""

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
    """The text of one answer.  It ends before the first stop string, which is never shown, nor is any part of it."""

    def __init__(self, decoder: Decoder, stop: tuple[str, ...]) -> None:
        self._decoder, self._stop = decoder, stop
        self._held = ""

    def feed(self, token: int, *, is_last: bool) -> tuple[str, bool]:
        """Return the text that may be shown after this token, and whether a stop string ended the answer."""
        self._held += self._decoder.feed((token,))
        if is_last:
            self._held += self._decoder.close()
        cut = first_stop(self._held, self._stop)
        if cut is not None:
            return self._held[:cut], True
        keep = 0 if is_last else partial_stop(self._held, self._stop)
        shown = len(self._held) - keep
        text, self._held = self._held[:shown], self._held[shown:]
        return text, False


def first_stop(text: str, stop: tuple[str, ...]) -> int | None:
    """Return where the earliest stop string begins, if there is one."""
    found = [at for s in stop if (at := text.find(s)) >= 0]
    return min(found, default=None)


def partial_stop(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest end of the text that a stop string begins with."""
    return max((n for s in stop for n in range(1, min(len(s), len(text)) + 1) if text.endswith(s[:n])), default=0)
