"""Text goes in and comes back, whole or byte by byte."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.engine.tokenizer import BOS, EOS, PAD, VOCAB, ByteTokenizer

tokenizer = ByteTokenizer()
any_tokens = st.lists(st.integers(0, VOCAB - 1), max_size=60)


@given(st.text())
def test_any_text_survives_the_round_trip(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_one_token_per_byte_and_begin_only_on_request(text: str) -> None:
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.encode(text, bos=True) == [BOS, *tokenizer.encode(text)]


@given(any_tokens, st.randoms(use_true_random=False))
def test_a_stream_says_what_the_whole_says_however_it_is_cut(tokens: list[int], random: object) -> None:
    """Broken and incomplete UTF-8 included."""
    stream, text, rest = tokenizer.stream(), "", tokens
    while rest:
        cut = random.randint(1, len(rest))  # type: ignore[attr-defined]
        text += stream.feed(rest[:cut])
        rest = rest[cut:]
    assert text + stream.close() == tokenizer.decode(tokens)


def test_a_character_is_held_back_until_it_is_whole() -> None:
    stream = tokenizer.stream()
    assert [stream.feed([byte]) for byte in "é€".encode()] == ["", "é", "", "", "€"]
    assert stream.close() == ""


def test_a_cut_character_ends_as_a_replacement() -> None:
    stream = tokenizer.stream()
    assert stream.feed("a€".encode()[:-1]) + stream.close() == "a\ufffd"


def test_tokens_without_text_say_nothing() -> None:
    assert tokenizer.decode([104, BOS, 105, EOS, PAD, VOCAB - 1]) == "hi"


def test_the_tokenizer_loads_no_torch() -> None:
    """The HTTP process needs the one and not the other."""
    script = "import sys; from mlsys_bench.engine.tokenizer import ByteTokenizer; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
