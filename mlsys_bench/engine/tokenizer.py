"""Text to tokens and back.

    ByteTokenizer          256 ids for the bytes of UTF-8 and three for begin, end and padding: no file, any text goes in and comes back
    vocabulary.Vocabulary  a model's own tokenizer.json
    TokenIds               no text at all: for checkpoints that come without a tokenizer
    open_tokenizer(...)    the one that belongs to a checkpoint

Loads no torch: the process that speaks HTTP needs the one and not the other.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mlsys_bench.engine import chat
from mlsys_bench.engine.stops import Decoder
from mlsys_bench.errors import BadInput

BOS, EOS, PAD = 256, 257, 258
VOCAB = 320  # padded to a multiple of 64, as matrix kernels like it; ids from 259 on stand for nothing
_NAMES = {BOS: b"<begin>", EOS: b"<end>", PAD: b"<pad>"}


class Tokenizer(Protocol):
    """Text to tokens and back, and what an engine must know of tokens."""

    @property
    def vocab(self) -> int:
        """How many ids a prompt may be made of: 0 to vocab - 1."""

    @property
    def generated(self) -> int:
        """Ids from here on are never generated: they pad the model's vocabulary."""

    @property
    def silent(self) -> tuple[int, ...]:
        """Nor are these below it."""

    @property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer."""

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt.  Raises BadInput where there is no text."""

    def chat(self, messages: Sequence[Mapping[str, Any]], /, **settings: Any) -> list[int]:
        """Return the tokens that the model continues with the assistant's answer.  Raises BadInput with what the template says."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, from the beginning of a text."""

    def stream(self, after: Sequence[int] = ()) -> Decoder:
        """Return a decoder that is fed token by token and goes on where the text of `after` ends."""

    def piece(self, token: int) -> bytes:
        """Return what one token stands for, or the name of one that stands for no text."""


class ByteTokenizer:
    """One token per byte of UTF-8."""

    bos, eos, pad, vocab = BOS, EOS, PAD, VOCAB
    generated, silent, ends = EOS + 1, (BOS,), frozenset({EOS})

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        """Return the tokens of a text."""
        return [BOS] * bos + list(text.encode("utf-8"))

    def chat(self, messages: Sequence[Mapping[str, Any]], /, **settings: Any) -> list[int]:
        """Return a chat as 'role: content' lines and an open 'assistant:'."""
        return self.encode(chat.PLAIN.render(messages, **settings))

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens.  What is no byte is left out; bytes that are no UTF-8 become U+FFFD."""
        return bytes(t for t in tokens if t < BOS).decode("utf-8", errors="replace")

    def stream(self, after: Sequence[int] = ()) -> StreamDecoder:
        """Return a decoder that is fed token by token."""
        return StreamDecoder()

    def piece(self, token: int) -> bytes:
        """Return the byte of a token, or its name."""
        return bytes([token]) if token < BOS else _NAMES.get(token, b"")


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


class TokenIds:
    """Tokens without text: prompts are lists of ids, answers too."""

    silent: tuple[int, ...] = ()

    def __init__(self, vocab: int, ends: frozenset[int], where: str) -> None:
        self.vocab = self.generated = vocab
        self.ends, self._where = ends, where

    def encode(self, text: str) -> list[int]:
        """Raise BadInput: nobody knows the tokens of a text."""
        raise BadInput(f"{self._where} has no tokenizer.json: give the prompt as a list of token ids, or put the file there")

    def chat(self, messages: Sequence[Mapping[str, Any]], /, **settings: Any) -> list[int]:
        """Raise BadInput."""
        return self.encode("")

    def decode(self, tokens: Sequence[int]) -> str:
        """Return no text."""
        return ""

    def stream(self, after: Sequence[int] = ()) -> Decoder:
        """Return a decoder that gives no text."""
        return _Silence()

    def piece(self, token: int) -> bytes:
        """Return nothing."""
        return b""


class _Silence:
    """The text of tokens that have none."""

    def feed(self, tokens: Sequence[int]) -> str:
        """Return no text."""
        return ""

    def close(self) -> str:
        """Return no text."""
        return ""


def open_tokenizer(checkpoint: Path | None, vocab: int) -> Tokenizer:
    """Return the tokenizer of a checkpoint's directory, for a model with so many ids; bytes where there is no checkpoint.

    A checkpoint without tokenizer.json has the byte tokenizer if its vocabulary is that one's, and else no text.
    """
    if checkpoint is None:
        return ByteTokenizer()
    from mlsys_bench.engine import vocabulary

    if (checkpoint / vocabulary.FILE).exists():
        return vocabulary.read(checkpoint, vocab)
    return ByteTokenizer() if vocab == VOCAB else TokenIds(vocab, vocabulary.end_ids(checkpoint), str(checkpoint))
