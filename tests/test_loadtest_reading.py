"""Answers read to the token: as the openai client reads them, whoever counts, and event streams by the letter of their standard."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from mlsys_bench.errors import BadInput
from mlsys_bench.loadtest import answers, endpoints, form
from mlsys_bench.loadtest.endpoints import Spec
from tests import loadtest_apis as apis
from tests.asked_apis import ASK, answer_bytes, fed, probe

# ---------------------------------------------------------------- the openai client reads the same


def test_what_we_read_of_a_chat_is_what_the_openai_client_reads() -> None:
    with apis.serving(apis.ChatOnly()) as server:
        found = probe(server.url)
        ours = endpoints.make(found.endpoint).read(fed(answer_bytes(server.url, found)))
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
            stream = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": ASK.text}],
                max_tokens=3,
                stream=True,
                stream_options={"include_usage": True},
            )
            theirs = list(stream)
        mine, its = server.asked("/v1/chat/completions")[-2:]
    assert "".join(c.choices[0].delta.content or "" for c in theirs if c.choices) == ours.text
    assert theirs[-1].usage is not None
    assert (theirs[-1].usage.prompt_tokens, theirs[-1].usage.completion_tokens) == (ours.prompt_tokens, ours.output_tokens)
    assert {key: mine[key] for key in its} == its  # we ask what the client asks, and ignore_eos and temperature beside it


def test_what_we_read_of_a_response_is_what_the_openai_client_reads() -> None:
    adapter: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
    for event in apis.response_events(3, 5):  # the shapes we test with are lawful by the client's own types
        adapter.validate_json(event.split(b"data: ")[1])
    OpenAIResponse.model_validate(apis.response("completed", "a"))
    with apis.serving(apis.ResponsesOnly()) as server:
        found = probe(server.url)
        ours = endpoints.make(found.endpoint).read(fed(answer_bytes(server.url, found)))
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0) as client:
            theirs = list(client.responses.create(model="tiny", input=ASK.text, max_output_tokens=3, stream=True))
    assert "".join(event.delta for event in theirs if event.type == "response.output_text.delta") == ours.text == "aaa"
    assert theirs[-1].type == "response.completed"
    assert theirs[-1].response.usage is not None
    assert (theirs[-1].response.usage.input_tokens, theirs[-1].response.usage.output_tokens) == (ours.prompt_tokens, ours.output_tokens)


TOOL = [
    {"role": "assistant", "tool_calls": [{"index": 0, "id": "t", "type": "function", "function": {"name": "go", "arguments": ""}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
    {"tool_calls": [{"index": 0, "function": {"arguments": "1}"}}]},
]  # fmt: skip
DELTAS: list[tuple[str, Any, int, str]] = [
    ("role only", [{"role": "assistant"}, {"content": "a"}], 1, "a"),
    ("role with empty content", [{"role": "assistant", "content": ""}, {"content": "a"}], 1, "a"),
    ("half a character", [{"content": "a"}, {"content": ""}, {"content": "ä"}], 3, "aä"),
    ("a greeting without a token", [{"content": ""}, {"content": ""}, {"content": "a"}, {"content": "b"}], 2, "ab"),
    ("no text at all", [{"content": ""}, {"content": ""}], 2, ""),
    ("a tool", TOOL, 3, 'go{"x":1}'),
    ("an old function call", [{"function_call": {"name": "go", "arguments": ""}}, {"function_call": {"arguments": "1"}}], 2, "go1"),
    ("a refusal", [{"role": "assistant", "content": None, "refusal": ""}, {"refusal": "no"}], 1, "no"),
    (
        "thoughts",
        [{"role": "assistant", "content": ""}, {"reasoning_content": "hm"}, {"content": None, "reasoning": "so"}, {"content": "a"}],
        3,
        "a",
    ),
    ("empty deltas", [{"content": "a"}, {}, {"content": None}], 1, "a"),
]


@pytest.mark.parametrize(("what", "deltas", "events", "text"), DELTAS, ids=[case[0] for case in DELTAS])
def test_chunks_of_every_shape_count_what_they_carry(what: str, deltas: Any, events: int, text: str) -> None:
    chunks = [apis.chunk(delta) for delta in deltas]
    for made in chunks:
        ChatCompletionChunk.model_validate(made)  # lawful by the client's own type
    stream = [(float(i), b"data: " + json.dumps(made).encode() + b"\n\n") for i, made in enumerate([*chunks, apis.chunk({}, "stop")])]
    found = answers.read([*stream, (99.0, apis.DONE)])
    assert (len(found.token_s), found.text, found.is_whole) == (events, text, True), what


# ---------------------------------------------------------------- who counts


def chat_stream(*chunks: dict[str, Any]) -> list[tuple[float, bytes]]:
    return [(float(i), b"data: " + json.dumps(chunk).encode() + b"\n\n") for i, chunk in enumerate(chunks)]


@given(st.lists(st.integers(0, 5), min_size=3, max_size=20).filter(lambda gains: sum(g > 0 for g in gains) > 1))
def test_usage_in_each_chunk_gives_each_event_its_own_tokens(gains: list[int]) -> None:
    """As vLLM's and SGLang's continuous_usage_stats: every chunk holds the tokens so far."""
    sofar = list(itertools.accumulate(gains))
    chunks = [apis.chunk({"content": "x"}, usage=apis.spent(7, count)) for count in sofar]
    found = answers.read(chat_stream(*chunks, {**apis.chunk({}), "choices": [], "usage": apis.spent(7, sofar[-1])}))
    if sofar[0] == sofar[-1]:
        return
    assert found.tokens_per_event == tuple(gain for gain in gains if gain)
    assert found.token_s == tuple(float(i) for i, gain in enumerate(gains) if gain)
    assert (found.output_tokens, found.token_source) == (sofar[-1], "usage")


@pytest.mark.parametrize(
    ("texts", "tokens", "first"), [(["", "a", "b", "c"], 3, 1.0), (["", "ä", "b", "c"], 4, 0.0), (["", "", "a", "b"], 3, 1.0)]
)
def test_events_before_any_text_are_tokens_only_where_the_server_counts_them(texts: list[str], tokens: int, first: float) -> None:
    """A server that greets at once has made no token yet: TTFT is that of the first that its usage counts."""
    events = [{"choices": [{"index": 0, "text": text, "finish_reason": None}]} for text in texts]
    found = answers.read([*chat_stream(*events, {"choices": [], "usage": apis.spent(7, tokens)}), (99.0, apis.DONE)])
    assert (found.token_s[0], len(found.token_s), found.output_tokens) == (first, tokens, tokens)


def test_a_count_that_does_not_grow_to_the_total_is_only_a_total() -> None:
    chunks = [apis.chunk({"content": "x"}, usage=apis.spent(7, 8)) for _ in range(4)]
    assert answers.read(chat_stream(*chunks)).tokens_per_event == (2, 2, 2, 2)


def test_thoughts_that_are_counted_but_not_shown_are_no_tokens_of_the_stream() -> None:
    """OpenAI counts hidden reasoning in completion_tokens: four tokens were seen, not 104."""
    usage = {**apis.spent(7, 104), "completion_tokens_details": {"reasoning_tokens": 100}}
    seen = [apis.chunk({"content": "x"}) for _ in range(4)]
    found = answers.read(chat_stream(*seen, {**apis.chunk({}), "choices": [], "usage": usage}))
    assert (found.output_tokens, found.tokens_per_event) == (4, (1, 1, 1, 1))
    shown = [apis.chunk({"reasoning_content": "x"}) for _ in range(52)]
    assert answers.read(chat_stream(*shown, {**apis.chunk({}), "choices": [], "usage": usage})).output_tokens == 104


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_counts_where_the_server_does_not(tokenizer: Path) -> None:
    """Three words in the first event, none whole in the second, two in the third; usage of the server wins over it."""
    asked = form.checked(tokenizer=tokenizer)
    chat = endpoints.make(Spec(name="chat", path="/x", model="m", form=asked))
    body = b"".join(
        data for _, data in chat_stream(*(apis.chunk({"content": t}) for t in ("so it is", " stran", "ge indeed")), apis.chunk({}, "stop"))
    )
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
    found = chat.read(fed(head + body))
    assert (found.tokens_per_event, found.output_tokens, found.token_source) == ((3, 2), 5, "tokenizer")
    counted = b"data: " + json.dumps({"choices": [], "usage": apis.spent(1, 3)}).encode() + b"\n\n"
    assert chat.read(fed(head + body + counted)).token_source == "usage"


@given(st.lists(st.text(alphabet="ab ", max_size=6), min_size=1, max_size=8))
def test_tokens_by_event_add_up_to_the_tokens_of_the_text(texts: list[str]) -> None:
    from mlsys_bench.loadtest import tokens

    def ends(text: str) -> list[int]:
        return [i + 1 for i, c in enumerate(text) if c != " " and (i + 1 == len(text) or text[i + 1] == " ")]

    counts = tokens.per_event(texts, ends)
    assert sum(counts) == len("".join(texts).split())
    assert min(counts) >= 0
    first = next((i for i, text in enumerate(texts) if text), None)
    assert first is None or counts[first] >= 1 or not sum(counts)


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no tokenizer\.json; give"):
        form.checked(tokenizer=tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match=r"is no tokenizer\.json"):
        endpoints.make(Spec(name="chat", path="/x", model="m", form=form.checked(tokenizer=tmp_path)))


# ---------------------------------------------------------------- event streams by the letter


@given(st.lists(st.integers(0, 10_000), max_size=12), st.sampled_from([b"\n", b"\r\n", b"\r"]))
def test_event_streams_are_read_by_the_letter_of_the_standard(cuts: list[int], end: bytes) -> None:
    lines = [b": hello", b"event: a", b"data: one", b"data: two", b"", b"data:three", b"id: 7", b"", b"retry: 5", b"", b"data", b""]
    stream = end.join([*lines, b""])
    pieces = [
        (float(i), p)
        for i, p in enumerate(stream[a:b] for a, b in itertools.pairwise(sorted({0, len(stream), *(c % len(stream) for c in cuts)})))
    ]
    assert [(name, data) for _, name, data in answers.sse(pieces)] == [("a", b"one\ntwo"), ("", b"three"), ("", b"")]


@given(
    st.lists(
        st.lists(st.sampled_from([b"data: one", b"data:two", b": ping", b"event: e", b"data: ", b"id: 1"]), min_size=1, max_size=4),
        max_size=6,
    ),
    st.lists(st.integers(0, 10_000), max_size=8),
    st.sampled_from([b"\n", b"\r\n"]),
)
def test_event_streams_are_read_as_the_openai_client_reads_them(events: list[list[bytes]], cuts: list[int], end: bytes) -> None:
    """But for events without data, which the standard drops and which carry nothing."""
    from openai._streaming import SSEDecoder

    stream = b"".join(end.join([*lines, b"", b""]) for lines in events)
    bounds = sorted({0, len(stream), *(cut % (len(stream) + 1) for cut in cuts)})
    pieces = [stream[a:b] for a, b in itertools.pairwise(bounds)]
    theirs = [(e.event or "", e.data.encode()) for e in SSEDecoder().iter_bytes(iter(pieces))]
    ours = [(name, data) for _, name, data in answers.sse([(0.0, piece) for piece in pieces])]
    assert [event for event in ours if event[1]] == [event for event in theirs if event[1]]


def test_events_of_several_lines_and_of_carriage_returns_are_completions_too() -> None:
    pretty = json.dumps(apis.chunk({"content": "hi"}), indent=1).encode().replace(b"\n", b"\ndata: ")
    assert answers.read([(0.0, b"data: " + pretty + b"\n\n"), (1.0, apis.DONE)]).text == "hi"
    returns = b"".join(data for _, data in chat_stream(apis.chunk({"content": "a"}), apis.chunk({"content": "b"})))
    assert answers.read([(0.0, returns.replace(b"\n", b"\r"))]).text == "ab"
