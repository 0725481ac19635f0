"""Text as bytes: 256 ids for the bytes of UTF-8, three for begin, end and padding; no vocabulary file, any text goes in and comes back."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

BOS, EOS, PAD = 256, 257, 258
VOCAB = 320  # padded to a multiple of 64, as matrix kernels like it; ids from 259 on stand for nothing


class ByteTokenizer:
    """One token per byte of UTF-8."""

    bos, eos, pad, vocab = BOS, EOS, PAD, VOCAB

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Return the tokens of a text."""
        return [BOS] * bos + list(text.encode("utf-8"))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens.  What is no byte is left out; bytes that are no UTF-8 become U+FFFD."""
        return bytes(t for t in tokens if t < BOS).decode("utf-8", errors="replace")

    def stream(self) -> StreamDecoder:
        """Return a decoder that is fed token by token."""
        return StreamDecoder()


class StreamDecoder:
    """Turn tokens into text as they come; a character whose bytes are not all there yet is held back."""

    __slots__ = ("_decoder",)

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete, perhaps none."""
        return self._decoder.decode(bytes(t for t in tokens if t < BOS))

    def close(self) -> str:
        """Return what is left: U+FFFD for a character that was cut off."""
        return self._decoder.decode(b"", final=True)
