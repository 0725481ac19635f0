"""A model's own tokenizer: a directory's tokenizer.json, read by the `tokenizers` library, with its special tokens and chat template.

Texts are put together from the bytes of each token, so that a stream shows a character when its last byte is there, and never a broken
one.  Three kinds of decoders are understood, those of decoder-only models: byte-level BPE (GPT-2, Llama 3, Qwen), SentencePiece with bytes
for what it does not know (Llama 2, Mistral, Gemma), and Metaspace.  Of bytes that are no UTF-8 the `tokenizers` library makes one U+FFFD
each, whatever complete characters stand beside them; here those characters are kept.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlsys_bench.engine import chat
from mlsys_bench.engine.stops import Decoder
from mlsys_bench.errors import BadInput

if TYPE_CHECKING:
    import tokenizers

FILE = "tokenizer.json"
_SETTINGS, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_LONG = 1 << 14  # characters
_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How a token's name becomes its bytes."""

    is_byte_level: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    has_bytes: bool = False  # names like <0x0A> are bytes
    strips: str = ""  # a text does not begin with this, once
    drops: str = ""  # nor has its first token any of this


class Vocabulary:
    """The tokenizer of a checkpoint."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, ends: frozenset[int], template: chat.Template | None, where: str, limit: int | None = None
    ) -> None:
        """Take a tokenizer.  limit: ids from here on have no place in the model; a prompt that has one is refused."""
        self._tokenizer, self._template, self._where = tokenizer, template, where
        self.ends = ends
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        own = max(ids, default=-1) + 1
        self.vocab = self.generated = own if limit is None else min(own, limit)
        self.silent = tuple(sorted(set(range(self.vocab)).difference(ids)))
        self._special = frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special)
        self._rules = rules_of(json.loads(tokenizer.to_str())["decoder"])
        self._pieces: dict[int, bytes] = {}

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt, with those that the model wants around it (begin of text)."""
        return self._ids(text)

    def chat(self, messages: Sequence[Mapping[str, Any]], /, **settings: Any) -> list[int]:
        """Return the tokens of a chat by the model's own template, which writes special tokens itself."""
        if self._template is None:
            raise BadInput(f"{self._where} has no chat template: ask /v1/completions, or put a {_TEMPLATE} there")
        return self._ids(self._template.render(messages, **settings), adds_special=False)

    def _ids(self, text: str, *, adds_special: bool = True) -> list[int]:
        # the library holds the interpreter's lock while it reads one text, for seconds if it is long, and not while it reads several
        if len(text) > _LONG:
            found = self._tokenizer.encode_batch([text], add_special_tokens=adds_special)[0]
        else:
            found = self._tokenizer.encode(text, add_special_tokens=adds_special)
        ids: list[int] = found.ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones."""
        stream = self.stream()
        return stream.feed(tokens) + stream.close()

    def stream(self, after: Sequence[int] = ()) -> Decoder:
        """Return a decoder that is fed token by token and goes on where the text of `after` ends.

        Where a text begins, SentencePiece has put a space that is not the text's own; where an answer goes on, a space is one.
        """
        return _Stream(self, self._known_rules(), is_start=all(token in self._special for token in after))

    def piece(self, token: int) -> bytes:
        """Return the bytes of one token; of a special one its name."""
        return self.text_of(token) if token not in self._special else (self._tokenizer.id_to_token(token) or "").encode()

    def text_of(self, token: int) -> bytes:
        """Return the bytes that a token adds to a text: none for special ones."""
        found = self._pieces.get(token)
        if found is None:
            name = None if token in self._special else self._tokenizer.id_to_token(token)
            found = self._pieces[token] = b"" if name is None else _bytes_of(name, self._known_rules())
        return found

    def is_special(self, token: int) -> bool:
        """Return whether a token stands for no text."""
        return token in self._special

    def _known_rules(self) -> Rules:
        if isinstance(self._rules, str):
            raise BadInput(f"{self._where}/{FILE}: {self._rules}: texts can be read with it but not written; is it of an encoder?")
        return self._rules


class _Stream:
    """The text of an answer, token by token."""

    __slots__ = ("_is_start", "_rules", "_utf8", "_vocabulary")

    def __init__(self, vocabulary: Vocabulary, rules: Rules, *, is_start: bool) -> None:
        self._vocabulary, self._rules, self._is_start = vocabulary, rules, is_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens complete, perhaps none."""
        return self._utf8.decode(b"".join([self._text_of(token) for token in tokens]))

    def close(self) -> str:
        """Return what is left: U+FFFD for a character that was cut off."""
        return self._utf8.decode(b"", final=True)

    def _text_of(self, token: int) -> bytes:
        text = self._vocabulary.text_of(token)
        if self._is_start and not self._vocabulary.is_special(token):
            rules = self._rules
            text = text.replace(rules.drops.encode(), b"") if rules.drops else text
            self._is_start = bool(rules.strips) and not text
            text = text.removeprefix(rules.strips.encode())
        return text


# ---------------------------------------------------------------- from files


def read(directory: Path, vocab: int) -> Vocabulary:
    """Return the tokenizer of a checkpoint's directory.  Raises BadInput for one that is none, or that has more ids than the model."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(directory / FILE))
    except Exception as error:  # the library raises bare Exception
        raise BadInput(f"{directory / FILE}: is no tokenizer.json: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    settings = _json(directory / _SETTINGS)
    text = max(tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
    if text > vocab:  # names that were added beyond may have no place: Gemma 3 of 1 B has that of a picture
        raise BadInput(f"{directory}: its tokenizer has {text} ids and its model {vocab}: they do not belong together")
    return Vocabulary(
        tokenizer, ends=end_ids(directory, tokenizer), template=_template(directory, settings), where=str(directory), limit=vocab
    )  # fmt: skip


def end_ids(directory: Path, tokenizer: tokenizers.Tokenizer | None = None) -> frozenset[int]:
    """Return the tokens that end an answer, as vLLM takes them: those of generation_config.json and the tokenizer's own.

    Without the first, config.json says.
    """
    generation, config = (_json(directory / name).get("eos_token_id") for name in ("generation_config.json", "config.json"))
    asked = config if generation is None else generation
    ids = asked if isinstance(asked, list) else [] if asked is None else [asked]
    if not all(isinstance(i, int) for i in ids):
        raise BadInput(f"{directory}: eos_token_id is {asked!r}; it must be an id or a list of ids")
    ends = set(ids)
    own = _name(_json(directory / _SETTINGS).get("eos_token"))
    token = tokenizer.token_to_id(own) if tokenizer is not None and own is not None else None
    return frozenset(ends if token is None else {*ends, token})


def _template(directory: Path, settings: Mapping[str, Any]) -> chat.Template | None:
    """Return the chat template: a file of its own, or among the settings, there perhaps one of several."""
    source = settings.get("chat_template")
    if (directory / _TEMPLATE).exists():
        source = (directory / _TEMPLATE).read_text(encoding="utf-8")
    if isinstance(source, list):
        source = next((s.get("template") for s in source if isinstance(s, dict) and s.get("name") == "default"), None)
    names = {key: name for key, value in settings.items() if key.endswith("_token") and (name := _name(value)) is not None}
    return None if source is None else chat.Template(source, names)


def _name(token: Any) -> str | None:
    """Return the text of a special token, which is written as one or as an object."""
    return token.get("content") if isinstance(token, dict) else token if isinstance(token, str) else None


def _json(path: Path) -> dict[str, Any]:
    """Return an object's fields; none where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise BadInput(f"{path}: is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: is no JSON object")
    return found


# ---------------------------------------------------------------- tokens as bytes


def rules_of(decoder: Mapping[str, Any] | None) -> Rules | str:
    """Return the rules of a tokenizer.json's decoder, or what about it is not understood."""
    steps = (decoder or {}).get("decoders", [decoder])
    kinds = [(step or {}).get("type", "none") for step in steps]
    if kinds == ["ByteLevel"]:
        return Rules(is_byte_level=True)
    if kinds == ["Metaspace"]:
        space, has_own = steps[0]["replacement"], steps[0].get("prepend_scheme", "always") != "never"
        return Rules(replaced=((space, " "),), drops=" " if has_own else "")
    replaced = tuple((s["pattern"]["String"], s["content"]) for s in steps if s and s["type"] == "Replace" and "String" in s["pattern"])
    rest = [kind for kind in kinds if kind not in ("Replace", "ByteFallback", "Fuse")]
    strips = [s for s in steps if s and s["type"] == "Strip"]
    if kinds.count("Replace") != len(replaced) or rest not in ([], ["Strip"]) or any((s["start"], s["stop"]) != (1, 0) for s in strips):
        return f"its decoder {' + '.join(kinds)} is not known"
    return Rules(replaced=replaced, has_bytes="ByteFallback" in kinds, strips=strips[0]["content"] if strips else "")


def _bytes_of(name: str, rules: Rules) -> bytes:
    """Return what the token of this name adds to a text."""
    if rules.is_byte_level:
        found = [_BYTES.get(c) for c in name]
        return name.encode() if None in found else bytes(b for b in found if b is not None)
    if rules.has_bytes and (byte := _BYTE.fullmatch(name)):
        return bytes.fromhex(byte[1])
    for old, new in rules.replaced:
        name = name.replace(old, new)
    return name.encode()


def _byte_names() -> dict[str, int]:
    """Return the byte that each character stands for in byte-level BPE: GPT-2's `bytes_to_unicode`.

    Printable bytes of Latin-1 are themselves; the others are numbered from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


_BYTES = _byte_names()
