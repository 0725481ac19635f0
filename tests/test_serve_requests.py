"""Requests of OpenAI's API, checked, and the bodies of its answers."""

from __future__ import annotations

import json
from typing import Any

import openai.types
import openai.types.chat
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.engine import chat as chats
from mlsys_bench.engine.sampling import Logprobs, Sampling
from mlsys_bench.engine.tokenizer import ByteTokenizer, TokenIds
from mlsys_bench.engine.vocabulary import Vocabulary
from mlsys_bench.serve import openai_api as api
from mlsys_bench.serve.bodies import Bodies, Choice, Token

MODEL = "nano"
LIMITS: Any = {"model": MODEL, "context": 64, "tokenizer": ByteTokenizer()}


def completion(**fields: Any) -> api.Call:
    return api.parse_completion(json.dumps({"model": MODEL, "prompt": "hi", **fields}).encode(), **LIMITS)


def chat(**fields: Any) -> api.Call:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], **fields}
    return api.parse_chat(json.dumps(body).encode(), **LIMITS)


def test_defaults_are_those_of_openai() -> None:
    call = completion()
    assert (call.max_tokens, call.sampling, call.ignore_eos) == (16, Sampling(temperature=1.0), False)
    assert call.prompt == (104, 105)
    assert not call.stream


def test_a_chat_becomes_lines_and_goes_on_until_the_context_is_full() -> None:
    call = chat(messages=[{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "so"}]}])
    text = "system: be\nuser: so\nassistant:"
    assert bytes(call.prompt).decode() == text
    assert call.max_tokens == 64 - len(text)


@pytest.mark.parametrize("prompt", ["hi", ["hi"], [104, 105]])
def test_a_prompt_is_a_text_or_one_text_or_tokens(prompt: Any) -> None:
    assert completion(prompt=prompt).prompt == (104, 105)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": 1.5}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"echo": True, "logprobs": 1}, "echo"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 2**64}, "top_k"),
        ({"skip_special_tokens": False}, "skip_special_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"logit_bias": {"five": 1}}, "logit_bias"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"best_of": 2}, "best_of"),
        ({"priority": 2**31}, "priority"),
        ({"tempature": 1}, "tempature"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, "b"]}, "prompt"),
        ({"prompt": [320]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": 63}, "prompt"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(api.ApiError) as caught:
        completion(**fields)
    assert caught.value.status == 400
    assert caught.value.body["error"]["param"] == param
    assert param.split("[")[0].split(".")[0] in str(caught.value) or param == "prompt"


NO_MESSAGES: list[Any] = [
    [],
    "hi",
    [{"content": "hi"}],
    [{"role": "pirate", "content": "hi"}],
    [{"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "contnet": "hi"}],
    [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function"}]}],
]


@pytest.mark.parametrize("messages", NO_MESSAGES)
def test_messages_that_are_none_are_refused(messages: Any) -> None:
    with pytest.raises(api.ApiError) as caught:
        chat(messages=messages)
    assert str(caught.value.body["error"]["param"]).startswith("messages")


def test_an_answer_can_be_sent_back_as_the_client_has_it() -> None:
    body = bodies(chat()).whole([Choice("so", [], "stop")])
    said = openai.types.chat.ChatCompletion.model_validate(body).choices[0].message
    asked = [{"role": "user", "content": "hi"}, said.model_dump(), {"role": "user", "content": "and"}]
    assert bytes(chat(messages=asked).prompt).decode() == "user: hi\nassistant: so\nuser: and\nassistant:"


def test_what_a_template_is_told_cannot_stand_for_the_messages() -> None:
    assert chat(chat_template_kwargs={"self": []}) == chat()
    with pytest.raises(api.ApiError, match="chat_template_kwargs") as caught:
        chat(chat_template_kwargs={"messages": []})
    assert caught.value.status == 400


def test_usage_comes_with_every_event_where_it_is_asked_for() -> None:
    call = chat(stream=True, n=2, stream_options={"include_usage": True, "continuous_usage_stats": True})
    made = bodies(call)
    events = (made.opening() + made.chunk(1, "é", TOKENS[1], None, 3)).decode().split("\n\n")[:-1]
    assert [json.loads(e[6:])["usage"]["completion_tokens"] for e in events] == [0, 0, 3]
    plain = chat(stream=True, stream_options={"include_usage": True})
    assert json.loads(bodies(plain).chunk(0, "é", TOKENS[1], None, 3)[6:])["usage"] is None
    assert json.loads(bodies(plain).usage_chunk(3)[6:])["usage"] == {"prompt_tokens": 19, "completion_tokens": 3, "total_tokens": 22}
    assert "usage" not in json.loads(bodies(chat(stream=True)).chunk(0, "é", TOKENS[1], None, 3)[6:])


def test_priority_is_a_whole_number_and_nothing_where_it_is_not_given() -> None:
    assert [completion().priority, completion(priority=3).priority, chat(priority=-2).priority] == [0, 3, -2]


def test_a_slip_of_the_pen_is_answered_with_the_right_name() -> None:
    with pytest.raises(api.ApiError, match="did you mean temperature"):
        completion(tempature=1)


def test_fields_that_ask_for_nothing_are_let_through() -> None:
    harmless: dict[str, Any] = {
        "n": 1,
        "logprobs": None,
        "presence_penalty": 0,
        "user": "u",
        "echo": False,
        "logit_bias": {},
        "min_tokens": 0,
    }
    assert completion(**harmless) == completion()


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b'"text"'])
def test_a_body_that_is_no_json_object_is_a_bad_request(data: bytes) -> None:
    with pytest.raises(api.ApiError) as caught:
        api.parse_completion(data, **LIMITS)
    assert caught.value.status == 400


# ---------------------------------------------------------------- what is asked of the sampler


def test_all_settings_of_the_sampler_are_passed_on() -> None:
    asked: dict[str, Any] = {
        "temperature": 0.7, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "repetition_penalty": 1.1, "seed": 7,
    }  # fmt: skip
    want = Sampling(**asked, logprobs=3, logit_bias=((5, 100.0), (65, -1.5)), stop=("a", "b"))
    bias = {"65": -1.5, "5": 100}
    assert completion(**asked, logprobs=3, logit_bias=bias, stop=["a", "b"]).sampling == want
    assert chat(**asked, logprobs=True, top_logprobs=3, logit_bias=bias, stop=["a", "b"]).sampling == want


def test_logprobs_have_a_shape_of_their_own_in_each_api() -> None:
    assert completion(logprobs=0).sampling.logprobs == chat(logprobs=True).sampling.logprobs == 0
    assert completion().sampling.logprobs is chat(logprobs=False).sampling.logprobs is None


def test_choices_have_the_seeds_that_follow() -> None:
    assert [s.seed for s in completion(n=3, seed=5).choices] == [5, 6, 7]
    assert [s.seed for s in completion(n=2).choices] == [None, None]


def test_an_echo_is_the_prompt() -> None:
    assert completion(echo=True).echo == completion(echo=True, prompt=[104, 105]).echo == "hi"
    assert completion().echo == completion(echo=False).echo == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"echo": True}, "echo"),
        ({"chat_template_kwargs": 3}, "chat_template_kwargs"),
        ({"max_tokens": 63}, "messages"),
    ],
)
def test_chats_refuse_by_name_too(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(api.ApiError) as caught:
        chat(**fields)
    assert (caught.value.status, caught.value.body["error"]["param"]) == (400, param)


def vocabulary(template: str) -> Vocabulary:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer, made.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    made.train_from_iterator(["hi"], tokenizers.trainers.BpeTrainer(initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    return Vocabulary(made, ends=frozenset(), template=chats.Template(template), where="here")


def test_a_chat_goes_through_the_models_template_with_what_the_request_adds() -> None:
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}{{ mood }}"
    tokenizer = vocabulary(template)
    ask = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"mood": "!"}}
    for add, want in ((True, "uhi>!"), (False, "uhi!")):
        data = json.dumps({**ask, "add_generation_prompt": add}).encode()
        assert tokenizer.decode(api.parse_chat(data, model=MODEL, context=64, tokenizer=tokenizer).prompt) == want


def test_what_a_template_marks_for_trainers_is_text() -> None:
    template = "{% for m in messages %}{% generation %}{{ m.content }}!{% endgeneration %}{% endfor %}"
    assert chats.Template(template).render([{"role": "assistant", "content": "so"}]) == "so!"


@pytest.mark.parametrize(
    ("template", "says"),
    [("{{ raise_exception('no user first') }}", "no user first"), ("{{ 1 / 0 }}", "division by zero"), ("", "no text")],
)
def test_what_a_template_objects_to_is_a_bad_request(template: str, says: str) -> None:
    data = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()
    with pytest.raises(api.ApiError, match=says) as caught:
        api.parse_chat(data, model=MODEL, context=64, tokenizer=vocabulary(template))
    assert (caught.value.status, caught.value.body["error"]["param"]) == (400, "messages")


def test_without_a_tokenizer_only_ids_are_taken() -> None:
    ids: Any = {"model": MODEL, "context": 64, "tokenizer": TokenIds(100, frozenset(), "here")}
    assert api.parse_completion(json.dumps({"model": MODEL, "prompt": [1, 2]}).encode(), **ids).prompt == (1, 2)
    with pytest.raises(api.ApiError, match=r"no tokenizer\.json") as caught:
        api.parse_completion(json.dumps({"model": MODEL, "prompt": "hi"}).encode(), **ids)
    assert caught.value.status == 400


# ---------------------------------------------------------------- answers

TOKENS = [
    Token(104, 0, Logprobs(-0.5, ((104, -0.5), (105, -1.5)))),
    Token(0xC3, 1, Logprobs(-3.0, ((104, -0.25), (105, -1.5)))),
    Token(0xA9, 1, Logprobs(-0.1, ((0xA9, -0.1), (257, -4.0)))),
]


def bodies(call: api.Call) -> Bodies:
    return Bodies(id="x-1", created=5, model=MODEL, call=call, piece=ByteTokenizer().piece)


def test_logprobs_of_a_completion_by_hand() -> None:
    """Half a character is written as OpenAI writes it; the chosen token is among the top ones."""
    body = bodies(completion(logprobs=2)).whole([Choice("hé", TOKENS, "length")])
    got = openai.types.Completion.model_validate(body).choices[0].logprobs
    assert got is not None
    assert got.tokens == ["h", "\\xc3", "\\xa9"]
    assert got.token_logprobs == [-0.5, -3.0, -0.1]
    assert got.text_offset == [0, 1, 1]
    assert got.top_logprobs == [{"h": -0.5, "i": -1.5}, {"h": -0.25, "i": -1.5, "\\xc3": -3.0}, {"\\xa9": -0.1, "<end>": -4.0}]


def test_logprobs_of_a_chat_by_hand() -> None:
    body = bodies(chat(logprobs=True, top_logprobs=2)).whole([Choice("hé", TOKENS, "stop")])
    got = openai.types.chat.ChatCompletion.model_validate(body).choices[0].logprobs
    assert got is not None
    assert got.content is not None
    assert [(c.token, c.bytes, c.logprob) for c in got.content] == [("h", [104], -0.5), ("\\xc3", [0xC3], -3.0), ("\\xa9", [0xA9], -0.1)]
    assert [(t.token, t.logprob) for t in got.content[1].top_logprobs] == [("h", -0.25), ("i", -1.5)]


@given(st.text(), st.sampled_from([None, "stop", "length"]), st.booleans(), st.integers(0, 3), st.sampled_from([None, 2]))
def test_an_event_of_a_stream_says_what_the_client_expects(text: str, reason: Any, is_chat: bool, index: int, logprobs: int | None) -> None:
    call = chat(n=4, stream=True, logprobs=True, top_logprobs=2) if logprobs else chat(n=4, stream=True)
    if not is_chat:
        call = completion(n=4, stream=True, logprobs=logprobs)
    data = bodies(call).chunk(index, text, TOKENS[1], reason, 1)
    assert data.startswith(b"data: {")
    assert data.endswith(b"}\n\n")
    body = json.loads(data[6:])
    choice = body["choices"][0]
    assert (choice["index"], choice["finish_reason"], body["model"], body["created"], body["id"]) == (index, reason, MODEL, 5, "x-1")
    if is_chat:
        chunk = openai.types.chat.ChatCompletionChunk.model_validate(body).choices[0]
        assert chunk.delta.content == text
        assert (chunk.logprobs is None) == (logprobs is None)
    else:
        assert body["object"] == "text_completion"  # whose type in the client knows no chunk that is not the last
        assert choice["text"] == text
        assert (choice["logprobs"] is None) == (logprobs is None)
