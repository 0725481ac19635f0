"""Text goes in and comes back, whole or token by token, with bytes and with models' own vocabularies; chats by their templates."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from mlsys_bench.engine import vocabulary
from mlsys_bench.engine.tokenizer import BOS, EOS, PAD, VOCAB, ByteTokenizer, TokenIds, Tokenizer, open_tokenizer
from mlsys_bench.errors import BadInput
from mlsys_bench.serve import openai_api as api
from tests.sample_tokenizers import byte_level, metaspace, sentencepiece

tokenizer = ByteTokenizer()
any_tokens = st.lists(st.integers(0, VOCAB - 1), max_size=60)


def test_a_name_that_was_added_beyond_the_model_s_vocabulary_has_no_place_in_a_prompt(tmp_path: Path) -> None:
    """Gemma 3 of 1 B has that of a picture there, CodeLlama of 34 B those for filling in.  Its text may not lie beyond."""
    made = byte_level()
    made.save(str(tmp_path / "tokenizer.json"))
    text = made.get_vocab_size(with_added_tokens=False)
    ours = open_tokenizer(tmp_path, text)
    assert ours.vocab == ours.generated == text < made.get_vocab_size()
    assert ours.decode(ours.encode("the fox")[1:]) == "the fox"
    with pytest.raises(api.ApiError, match=f"is outside the vocabulary of {text}"):
        api.parse_completion(b'{"model": "m", "prompt": "a <tool call>"}', model="m", context=64, tokenizer=ours)
    with pytest.raises(BadInput, match=f"its tokenizer has {text} ids and its model {text - 1}"):
        open_tokenizer(tmp_path, text - 1)


@pytest.mark.parametrize("ends", ["</s>", [[2]], [1.5], {}])
def test_an_end_that_is_no_id_is_refused(tmp_path: Path, ends: Any) -> None:
    """As a text it would be taken for its characters, and no answer would end."""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    with pytest.raises(BadInput, match="it must be an id or a list of ids"):
        vocabulary.end_ids(tmp_path)


def test_a_long_text_has_the_tokens_that_it_would_have_if_it_were_short() -> None:
    """It is read in another way, one that lets streams go on meanwhile."""
    made = byte_level()
    ours = vocabulary.Vocabulary(made, ends=frozenset(), template=vocabulary.chat.Template("{{ messages[0].content }}"), where="here")
    text = "the naïve fox\n" * 2000
    assert len(text) > vocabulary._LONG
    assert ours.encode(text) == made.encode(text).ids
    assert ours.chat([{"role": "user", "content": text}]) == made.encode(text, add_special_tokens=False).ids


# ---------------------------------------------------------------- bytes


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


def test_tokens_without_text_say_nothing_but_have_names() -> None:
    assert tokenizer.decode([104, BOS, 105, EOS, PAD, VOCAB - 1]) == "hi"
    assert [tokenizer.piece(t) for t in (104, 0xC3, EOS, VOCAB - 1)] == [b"h", b"\xc3", b"<end>", b""]


def test_tokenizers_load_no_torch() -> None:
    """The HTTP process needs the ones and not the other."""
    script = (
        "import sys; from mlsys_bench.engine import chat, vocabulary; from mlsys_bench.engine.tokenizer import ByteTokenizer;"
        "ByteTokenizer().chat([]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


# ---------------------------------------------------------------- models' own vocabularies

KINDS: dict[str, Callable[[], tokenizers.Tokenizer]] = {"byte-level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}


@functools.cache
def both(kind: str) -> tuple[tokenizers.Tokenizer, vocabulary.Vocabulary]:
    """Return the library's tokenizer and ours over it."""
    theirs = KINDS[kind]()
    return theirs, vocabulary.Vocabulary(theirs, ends=frozenset(), template=None, where="here")


def id_of(made: tokenizers.Tokenizer, name: str) -> int:
    found = made.token_to_id(name)
    assert found is not None
    return found


def streamed(ours: Tokenizer, tokens: Sequence[int], after: Sequence[int] = ()) -> str:
    stream = ours.stream(after)
    return "".join([stream.feed((token,)) for token in tokens]) + stream.close()


def is_utf8(ours: vocabulary.Vocabulary, tokens: Sequence[int]) -> bool:
    try:
        return bool(b"".join(ours.text_of(t) for t in tokens).decode() + " ")
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_random_tokens_read_the_same_streamed_as_whole_and_as_by_the_library(kind: str, data: st.DataObject) -> None:
    """The library's own text where the bytes are UTF-8; in byte-level vocabularies always."""
    theirs, ours = both(kind)
    tokens = data.draw(st.lists(st.integers(0, ours.vocab - 1), max_size=40))
    text = streamed(ours, tokens)
    assert text == ours.decode(tokens)
    if kind == "byte-level" or is_utf8(ours, tokens):
        assert text == theirs.decode(tokens)
    else:
        assert "\ufffd" in text


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@given(st.text(), st.text(min_size=1))
def test_an_answer_goes_on_where_the_prompt_ends(kind: str, before: str, after: str) -> None:
    """Prompt and answer together are the whole text, spaces and half-made characters included, wherever tokens are cut."""
    _, ours = both(kind)
    tokens = ours.encode(before + after)
    for cut in range(len(tokens) + 1):
        if is_utf8(ours, tokens[:cut]):
            assert ours.decode(tokens[:cut]) + streamed(ours, tokens[cut:], after=tokens[:cut]) == before + after


def test_a_word_after_a_prompt_keeps_its_space_and_one_that_begins_a_text_has_none() -> None:
    _, ours = both("sentencepiece")
    begin, the = 1, ours.encode("the")[1:]
    assert ours.encode("the") == [begin, *the]
    assert streamed(ours, the, after=[begin, *the]) == " the"
    assert streamed(ours, the, after=[begin]) == streamed(ours, [begin, *the]) == ours.decode([begin, *the]) == "the"


def test_a_stream_shows_only_whole_characters() -> None:
    for kind in ("byte-level", "sentencepiece"):
        _, ours = both(kind)
        stream = ours.stream([5])
        shown = [stream.feed((token,)) for token in ours.encode("🙂 日本")]
        assert "\ufffd" not in "".join(shown)
        assert "".join(shown).strip() == "🙂 日本"
        assert stream.close() == ""


def test_pieces_are_the_bytes_of_tokens_and_the_names_of_special_ones() -> None:
    theirs, ours = both("byte-level")
    assert b"".join(ours.piece(t) for t in ours.encode("né 🙂")) == b"<|begin|>" + "né 🙂".encode()
    assert ours.piece(id_of(theirs, "<tool call>")) == b"<tool call>"
    assert both("sentencepiece")[1].piece(3 + 0xC3) == b"\xc3"


def test_a_decoder_nobody_knows_still_reads() -> None:
    """An encoder's WordPiece has no use for writing."""
    made = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    ours = vocabulary.Vocabulary(made, ends=frozenset(), template=None, where="here")
    assert ours.encode("the dog") == [1, 0]
    with pytest.raises(BadInput, match="WordPiece is not known"):
        ours.stream()
    for wrong in (None, {"type": "Sequence", "decoders": [{"type": "Strip", "content": " ", "start": 0, "stop": 1}]}):
        assert isinstance(vocabulary.rules_of(wrong), str)


# ---------------------------------------------------------------- directories

CHATML = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('no role ' ~ m.role) }}{% endif %}<|im|>{{ m.role }}\n{{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant\n{% if thinking is defined %}<think>{% endif %}{% endif %}"
)


def write(directory: Path, made: tokenizers.Tokenizer | None = None, **files: Any) -> Path:
    """Write a checkpoint's files, their names with _ for the dot."""
    if made is not None:
        made.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        stem, _, kind = name.rpartition("_")
        (directory / f"{stem}.{kind}").write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


NAMES = {"bos_token": {"content": "<|begin|>"}, "eos_token": "<|end|>", "add_bos_token": False}


def test_a_directory_says_what_ends_an_answer_and_what_is_never_generated(tmp_path: Path) -> None:
    """As vLLM: the ids of generation_config.json and the tokenizer's own; ids that pad the model's vocabulary are never generated."""
    made = byte_level()
    end = id_of(made, "<|end|>")
    found = open_tokenizer(write(tmp_path, made, tokenizer_config_json=NAMES, config_json={"eos_token_id": 9}), 512)
    assert found.ends == {9, end}
    assert (found.vocab, found.generated, found.silent) == (end + 2, end + 2, ())
    assert open_tokenizer(write(tmp_path, generation_config_json={"eos_token_id": [7, 8]}), 512).ends == {7, 8, end}
    assert found.encode("the")[0] == id_of(made, "<|begin|>")


def test_ids_between_tokens_are_never_generated(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 3}, unk_token="a"))
    assert open_tokenizer(write(tmp_path, made), 4).silent == (1, 2)


def test_what_cuts_or_fills_texts_for_training_is_left_out(tmp_path: Path) -> None:
    made = byte_level()
    made.enable_truncation(4)
    made.enable_padding(length=64)
    text = "the quick brown fox " * 3
    found = open_tokenizer(write(tmp_path, made), 512)
    assert found.decode(found.encode(text)) == text


def test_directories_that_make_no_sense_say_so(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="ids and its model 320"):
        open_tokenizer(write(tmp_path, byte_level()), 320)
    with pytest.raises(BadInput, match=r"tokenizer_config\.json: is no JSON"):
        open_tokenizer(write(tmp_path, tokenizer_config_json="{"), 512)
    with pytest.raises(BadInput, match=r"tokenizer\.json: is no tokenizer"):
        open_tokenizer(write(tmp_path, tokenizer_json="{}"), 512)


def test_without_a_tokenizer_there_are_bytes_or_bare_ids(tmp_path: Path) -> None:
    assert isinstance(open_tokenizer(None, 32000), ByteTokenizer)
    assert isinstance(open_tokenizer(tmp_path, VOCAB), ByteTokenizer)
    bare = open_tokenizer(write(tmp_path, config_json={"eos_token_id": 2}), 64)
    assert isinstance(bare, TokenIds)
    assert (bare.generated, bare.ends, streamed(bare, [5, 6]), bare.piece(5)) == (64, frozenset({2}), "", b"")
    with pytest.raises(BadInput, match=r"no tokenizer\.json: give the prompt as a list"):
        bare.encode("the")
    with pytest.raises(BadInput, match=r"no tokenizer\.json"):
        bare.chat(CHAT)


# ---------------------------------------------------------------- chats

CHAT = [{"role": "system", "content": " be brief "}, {"role": "user", "content": "<b>&</b> the fox"}]


@pytest.mark.parametrize("where", ["settings", "list", "file"])
def test_a_chat_is_written_as_transformers_writes_it(tmp_path: Path, where: str) -> None:
    from transformers import PreTrainedTokenizerFast

    settings_of: dict[str, dict[str, Any]] = {
        "settings": {"tokenizer_config_json": {**NAMES, "chat_template": CHATML}},
        "list": {"tokenizer_config_json": {**NAMES, "chat_template": [{"name": "default", "template": CHATML}]}},
        "file": {"tokenizer_config_json": {**NAMES, "chat_template": "older"}, "chat_template_jinja": CHATML},
    }
    made = byte_level()
    ours = open_tokenizer(write(tmp_path, made, **settings_of[where]), 512)
    theirs: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=made, bos_token="<|begin|>", eos_token="<|end|>", chat_template=CHATML
    )
    assert ours.chat(CHAT) == theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert ours.chat(CHAT, add_generation_prompt=False) == theirs.apply_chat_template(CHAT, return_dict=False)
    assert ours.decode(ours.chat(CHAT, thinking=True)).endswith("<|im|>assistant\n<think>")


def test_what_a_template_objects_to_is_said(tmp_path: Path) -> None:
    found = open_tokenizer(write(tmp_path, byte_level(), tokenizer_config_json={**NAMES, "chat_template": CHATML}), 512)
    with pytest.raises(BadInput, match="no role pirate"):
        found.chat([{"role": "pirate", "content": "arr"}])
    plain = open_tokenizer(write(tmp_path, tokenizer_config_json=NAMES), 512)
    with pytest.raises(BadInput, match="no chat template"):
        plain.chat(CHAT)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set _ = messages[0].update({'a': 1}) %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ 1 / 0 }}",
        "{% if %}",
    ],
)
def test_a_template_is_a_strangers_program_and_stays_in_its_box(tmp_path: Path, source: str) -> None:
    found = open_tokenizer(write(tmp_path, byte_level(), tokenizer_config_json={"chat_template": source}), 512)
    with pytest.raises(BadInput, match="chat template"):
        found.chat([{"role": "user", "content": "hi"}])


def test_templates_have_what_those_of_hugging_face_use(tmp_path: Path) -> None:
    """JSON as it is, loops that break, the date, and no newline after a block."""
    source = (
        "{% for m in messages %}\n  {%- if loop.index > 1 %}{% break %}{% endif %}\n{{ m | tojson }}{% endfor %}"
        "{{ strftime_now('%Y') | length }}{{ tools is none }}"
    )
    found = open_tokenizer(write(tmp_path, byte_level(), tokenizer_config_json={"chat_template": source}), 512)
    assert found.decode(found.chat([{"role": "user", "content": "<é>"}] * 2)) == '{"role": "user", "content": "<é>"}4True'


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text()), max_size=4))
def test_bytes_have_a_plain_chat(messages: list[tuple[str, str]]) -> None:
    chat = [{"role": role, "content": content} for role, content in messages]
    want = "".join(f"{role}: {content}\n" for role, content in messages) + "assistant:"
    assert tokenizer.decode(tokenizer.chat(chat)) == want
