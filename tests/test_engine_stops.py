"""Stop strings: an answer ends with the first that completes, none of it is ever shown, and the engine frees its blocks at once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import models
from mlsys_bench.engine import Engine, default_limits
from mlsys_bench.engine.sampler import sampling
from mlsys_bench.engine.stops import TextStream
from mlsys_bench.engine.tokenizer import EOS, ByteTokenizer, StreamDecoder

AB = st.text(alphabet="ab€", max_size=20)
STOPS = st.lists(st.text(alphabet="ab€", min_size=1, max_size=5), max_size=3).map(tuple)
CUTS = st.lists(st.integers(1, 4), min_size=1, max_size=5)


class Pieces:
    """A decoder whose tokens are numbers of pieces of a text, perhaps of several characters each, or of none."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def feed(self, tokens: Sequence[int]) -> str:
        """Return the text of these."""
        return "".join(self.pieces[t] for t in tokens)

    def close(self) -> str:
        """Return nothing: no character is cut."""
        return ""


def cut(text: str, cuts: list[int]) -> list[str]:
    """Return a text in pieces."""
    pieces, i = [], 0
    while text:
        n = cuts[i % len(cuts)]
        pieces.append(text[:n])
        text, i = text[n:], i + 1
    return pieces or [""]


def shown(text: str, stop: tuple[str, ...], cuts: list[int], *, include_stop: bool = False) -> list[str]:
    """Stream a text in pieces; return what a client has seen after each."""
    pieces = cut(text, cuts)
    stream = TextStream(Pieces(pieces), stop, include_stop=include_stop)
    seen = [""]
    for i in range(len(pieces)):
        new, is_stopped = stream.feed(i, is_last=i == len(pieces) - 1)
        seen.append(seen[-1] + new)
        if is_stopped:
            break
    return seen


def reference(text: str, stop: tuple[str, ...], *, include_stop: bool) -> str:
    """Return the shortest beginning that holds a stop string, cut where that string starts: the longest, if two end there."""
    for end in range(len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[:end] if include_stop else text[: end - max(map(len, ending))]
    return text


@given(AB, STOPS, CUTS, st.booleans())
def test_the_answer_ends_at_the_first_stop_string_that_completes_however_tokens_cut_it(
    text: str, stop: tuple[str, ...], cuts: list[int], include_stop: bool
) -> None:
    assert shown(text, stop, cuts, include_stop=include_stop)[-1] == reference(text, stop, include_stop=include_stop)


@given(AB, STOPS, CUTS)
def test_no_part_of_a_stop_string_is_ever_shown_and_nothing_is_held_back_without_need(
    text: str, stop: tuple[str, ...], cuts: list[int]
) -> None:
    """What was sent can never be taken back; what is held back is the beginning of a stop string."""
    seen, arrived = shown(text, stop, cuts), ""
    for piece, so_far in zip(cut(text, cuts), seen[1:-1], strict=False):
        arrived += piece
        assert seen[-1].startswith(so_far)
        held = arrived[len(so_far) :]
        assert not held or any(s.startswith(held) for s in stop)


@given(AB, STOPS)
def test_bytes_that_are_half_a_character_are_no_text_yet(text: str, stop: tuple[str, ...]) -> None:
    stream, seen = TextStream(StreamDecoder(), stop), ""
    data = text.encode()
    for i, byte in enumerate(data):
        new, is_stopped = stream.feed(byte, is_last=i == len(data) - 1)
        seen += new
        if is_stopped:
            break
    assert seen == reference(text, stop, include_stop=False)
    assert stream.decoded >= len(seen)


# ---------------------------------------------------------------- the engine

SHAPE = models.counted(
    dataclasses.replace(models.find("nano"), id="tiny", layers=1, hidden=32, heads=2, kv_heads=1, head_dim=16, ffn=48, max_context=128)
)
LIMITS = default_limits(SHAPE, max_batch=4)


def answer(*stop: str, max_tokens: int = 40) -> tuple[list[int], str, Engine, list[int]]:
    """Return tokens, reason, the engine, and its free blocks after each step."""
    engine = Engine(SHAPE, limits=LIMITS, seed=1)
    engine.add(list(b"hello"), max_tokens=max_tokens, sampling=sampling(temperature=1.0, seed=4, stop=stop), ignore_eos=True)
    tokens, reason, free = [], "", []
    while engine.busy:
        report = engine.step()
        tokens += [token for _, token in report.tokens]
        reason = report.finished[0][1] if report.finished else ""
        free.append(engine.free_blocks)
    return tokens, reason, engine, free


@pytest.fixture(scope="module")
def text() -> str:
    tokens, reason, _, _ = answer()
    assert (len(tokens), reason) == (40, "length")
    return ByteTokenizer().decode(tokens)


def test_generation_really_ends_at_a_stop_string_and_its_blocks_are_free(text: str) -> None:
    stop = text[10:13]
    tokens, reason, engine, free = answer(stop, "never to be seen")
    said = ByteTokenizer().decode(tokens)
    assert reason == "stop"
    assert said.endswith(stop)
    assert text.startswith(said)
    assert len(tokens) < 40
    assert free[-1] == engine.limits.blocks
    assert free[-2] < free[-1]


def test_a_stop_string_that_does_not_come_changes_nothing(text: str) -> None:
    tokens, reason, _, _ = answer("never to be seen")
    assert (ByteTokenizer().decode(tokens), reason) == (text, "length")


def test_the_end_itself_is_no_text() -> None:
    """Its name, shown nowhere, is no stop string either."""
    name = ByteTokenizer().piece(EOS).decode()
    assert answer(name)[1] == "length"
