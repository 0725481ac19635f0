"""Requests and answers of every API: found by itself, asked in its documented shape, read to the token."""

# ruff: noqa: D102  the little servers' one method is named for what it does

from __future__ import annotations

import dataclasses
import http.client
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench.askings import Asked
from mlsys_bench.errors import BadInput, MeasurementFailed, UnknownName
from mlsys_bench.loadtest import endpoints, form, wire
from mlsys_bench.loadtest.endpoints import Spec, kserve, reading
from mlsys_bench.loadtest.form import Form
from tests import loadtest_apis as apis
from tests.asked_apis import ASK, answer_bytes, fed, probe

# ---------------------------------------------------------------- found by itself, asked and read

FOUND: list[tuple[type[apis.Api], str, str, str, tuple[int, int | None, int | None, str | None]]] = [
    # API, kind, path, model, (events, prompt tokens, output tokens, who counted)
    (apis.ChatOnly, "chat", "/v1/chat/completions", "tiny", (3, len(ASK.text), 3, "usage")),
    (apis.ResponsesOnly, "responses", "/v1/responses", "tiny", (3, len(ASK.text), 3, "usage")),
    (apis.Embedder, "embeddings", "/v1/embeddings", "tiny", (1, len(ASK.text), None, None)),
    (apis.Reranker, "rerank", "/v1/rerank", "tiny", (1, 2 * len(ASK.text), None, None)),
    (apis.TextEmbeddings, "tei-embed", "/embed", "thenlper/gte-base", (1, 9, None, None)),
    (apis.TextRanks, "tei-rerank", "/rerank", "thenlper/gte-base", (1, 9, None, None)),
    (apis.TextGeneration, "tgi", "/generate_stream", "org/llm", (3, len(ASK.text), 3, "usage")),
    (apis.Triton, "kserve", "/v2/models/resnet/infer", "resnet", (1, None, None, None)),
    (apis.TritonText, "triton-stream", "/v2/models/resnet/generate_stream", "resnet", (3, None, 3, "chunks")),
    (apis.TorchServe, "torchserve", "/predictions/bert", "bert", (1, None, None, None)),
    (apis.TFServing, "tfserving", "/v1/models/model:predict", "model", (1, None, None, None)),
]


@pytest.mark.parametrize(("api", "kind", "path", "model", "said"), FOUND, ids=[case[1] for case in FOUND])
def test_an_api_is_found_by_itself_asked_and_read(
    api: type[apis.Api], kind: str, path: str, model: str, said: tuple[int, int | None, int | None, str | None]
) -> None:
    with apis.serving(api()) as server:
        found = probe(server.url)
        answer = endpoints.make(found.endpoint).read(fed(answer_bytes(server.url, found)))
        by_name = probe(server.url, endpoint=kind)
        by_url = probe(server.url + path, endpoint=kind)
    assert (found.endpoint.name, found.path, found.model) == (kind, path, model)
    assert found.found.startswith(f"{kind} at {path}, model {model}")
    assert (len(answer.token_s), answer.prompt_tokens, answer.output_tokens, answer.token_source) == said
    assert answer.is_whole
    assert sum(answer.tokens_per_event) == (answer.output_tokens or 0)
    assert dataclasses.replace(by_name, notes=()) == dataclasses.replace(found, notes=()) == dataclasses.replace(by_url, notes=())


@pytest.mark.parametrize(
    ("path", "kind", "base"),
    [
        ("/v1/chat/completions", "chat", ""),
        ("/v1/completions", "completions", ""),
        ("/proxy/v1/embeddings", "embeddings", "/proxy"),
        ("/v2/rerank", "rerank", ""),
        ("/v2/models/m/versions/3/infer", "kserve", ""),
        ("/a/v2/models/m/generate_stream", "triton-stream", "/a"),
        ("/predictions/m/2.0", "torchserve", ""),
        ("/v1/models/m:predict", "tfserving", ""),
        ("/somewhere", None, "/somewhere"),
    ],
)
def test_a_url_that_names_an_endpoint_is_taken_at_its_word(path: str, kind: str | None, base: str) -> None:
    from mlsys_bench.loadtest import detect

    place = detect.taken_apart(path)
    assert (place.kind, place.base.removesuffix("/v1").removesuffix("/v2")) == (kind, base)
    assert place.full == (path if kind else None)


def test_a_server_of_no_known_api_is_told_in_one_line() -> None:
    with apis.serving(apis.Homemade()) as server, pytest.raises(BadInput) as caught:
        probe(server.url)
    text = str(caught.value)
    assert "GET /v1/models answers 404 application/json" in text
    assert "GET /ping answers 404" in text
    assert "--body-template" in text
    assert "\n" not in text


def test_an_unknown_endpoint_gets_a_suggestion_and_a_failing_server_ends_the_search() -> None:
    class Broken(apis.ChatOnly):
        def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
            return super().answer(method, path, body) if path == "/v1/models" else apis.as_json({"error": {"message": "boom"}}, 500)

    class Closed(apis.ChatOnly):
        def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
            return super().answer(method, path, body) if path == "/v1/models" else apis.as_json({"error": "who are you"}, 401)

    class Refusing(apis.ChatOnly):
        def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
            return super().answer(method, path, body) if path == "/v1/models" else apis.as_json({"error": {"message": "not for you"}}, 400)

    with apis.serving(Broken()) as server:
        with pytest.raises(UnknownName, match="did you mean embeddings"):
            probe(server.url, endpoint="embedings")
        with pytest.raises(MeasurementFailed, match=r"POST /v1/completions answers 500 .* boom"):
            probe(server.url)
    with apis.serving(Closed()) as server, pytest.raises(BadInput, match="--api-key-env"):
        probe(server.url)
    with apis.serving(Refusing()) as server, pytest.raises(BadInput, match=r"5 endpoints were tried .*not for you"):
        probe(server.url)


class Azure(apis.ChatOnly):
    """Azure's OpenAI: the deployment in the path, the version after the question mark, no list of models."""

    def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
        usual = path == "/openai/deployments/mine/chat/completions?api-version=2024-10-21"
        return super().answer(method, "/v1/chat/completions", body) if usual else apis.NOT_FOUND


def test_a_deployment_that_the_url_names_in_full_needs_no_list_of_models() -> None:
    with apis.serving(Azure()) as server:
        url = f"{server.url}/openai/deployments/mine/chat/completions?api-version=2024-10-21"
        found = probe(url)
        answer = endpoints.make(found.endpoint).read(fed(answer_bytes(server.url, found)))
    assert (found.endpoint.name, found.model, answer.output_tokens) == ("chat", "", 3)
    assert "api-version" not in found.found


class Strict(apis.ChatOnly):
    """OpenAI's newer models: no max_tokens, no temperature, and nothing they do not know."""

    def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
        asked = json.loads(body) if path == "/v1/chat/completions" else {}
        for name in ("ignore_eos", "max_tokens", "temperature"):
            if name in asked:
                return apis.as_json({"error": {"message": f"Unsupported parameter: '{name}'", "code": "unsupported_parameter"}}, 400)
        return super().answer(method, path, json.dumps({**asked, "max_tokens": asked.get("max_completion_tokens")}).encode())


def test_a_server_that_refuses_parameters_is_asked_without_them() -> None:
    with apis.serving(Strict()) as server:
        found = probe(server.url)
        answer = endpoints.make(found.endpoint).read(fed(answer_bytes(server.url, found)))
        sent = server.asked("/v1/chat/completions")[-1]
    assert set(sent) == {"model", "stream", "stream_options", "max_completion_tokens", "messages"}
    assert (answer.output_tokens, answer.is_whole) == (3, True)
    assert "refuses ignore_eos" in found.notes[-1]


@pytest.mark.parametrize(
    ("kind", "asked", "says"),
    [
        ("chat", {"batch": 4}, "--batch 4: chat takes one prompt"),
        ("embeddings", {"streams": True}, "--stream: embeddings never streams"),
        ("chat", {"inputs": ("a:FP32:1",)}, "chat takes no tensors"),
        ("chat", {"template": "{}"}, "use --endpoint http"),
    ],
)
def test_an_option_an_endpoint_has_no_use_for_is_refused(kind: str, asked: dict[str, Any], says: str) -> None:
    with apis.serving(apis.ChatOnly()) as server, pytest.raises(BadInput, match=says):
        probe(server.url, endpoint=kind, form=Form(**asked))


def test_a_batch_is_sent_to_what_takes_batches() -> None:
    with apis.serving(apis.Embedder()) as server:
        assert probe(server.url, form=Form(batch=2)).endpoint.name == "embeddings"
        assert not server.asked("/v1/completions")


# ---------------------------------------------------------------- shapes


def test_a_batch_of_texts_has_as_many_as_were_asked_no_two_alike_and_a_length_each() -> None:
    with apis.serving(apis.Embedder()) as server:
        found = probe(server.url, form=Form(batch=5))
        answer = endpoints.make(found.endpoint).read(fed(answer_bytes(server.url, found)))
        sent = server.asked("/v1/embeddings")[-1]["input"]
    assert len(sent) == len(set(sent)) == 5
    assert {len(text) for text in sent} == {len(ASK.text)}
    assert answer.prompt_tokens == 5 * len(ASK.text)
    assert found.chars(40) == 40  # learned with one text, so it holds for each
    plain = Asked(what="words", prompt_tokens=40.0, prompt_tokens_counted=200.0, output_tokens=32.0, output_tokens_counted=None)
    assert found.as_sent(plain) == dataclasses.replace(plain, what="words, 5 in each request", prompt_tokens=200.0, output_tokens=None)


def test_rows_of_a_data_set_are_sent_as_they_are() -> None:
    row = {"query": "who", "documents": ["I", "you"]}
    body = endpoints.make(Spec(name="rerank", path="/v1/rerank", model="m")).body(dataclasses.replace(ASK, row=row))
    assert json.loads(body) == {"model": "m", **row}


def test_tensors_have_the_type_and_shape_that_the_server_describes() -> None:
    with apis.serving(apis.Triton()) as server:
        found = probe(server.url, form=Form(batch=2))
        (sent,) = server.asked("/v2/models/resnet/infer")
        written = probe(server.url, endpoint="kserve", form=Form(inputs=("ids:INT64:2x5", "words:BYTES:-1x1"), batch=3))
    image, flip = sent["inputs"]
    assert (image["name"], image["datatype"], image["shape"], len(image["data"])) == ("image", "FP32", [2, 3, 4], 24)
    assert (flip["datatype"], flip["shape"]) == ("BOOL", [2, 1])
    assert all(type(value) is bool for value in flip["data"])
    ids, words = json.loads(endpoints.make(written.endpoint).body(ASK))["inputs"]
    assert all(type(n) is int and 0 <= n < 100 for n in ids["data"])
    assert (words["shape"], len(set(words["data"]))) == ([3, 1], 3)
    assert list(found.endpoint.settings["inputs"][0]["shape"]) == [2, 3, 4]


def test_binary_tensors_are_the_same_numbers_after_a_head_of_one_length() -> None:
    """Triton's binary data extension: JSON first, its length in a header, then little-endian values."""
    spec = Spec(name="kserve", path="/x", model="m", form=Form(inputs=("a:FP32:2x2", "b:INT16:3"), binary=True))
    body, head = endpoints.make(spec).body(ASK), kserve.binary_head_bytes(spec)
    described = json.loads(body[:head])["inputs"]
    assert [tensor["parameters"]["binary_data_size"] for tensor in described] == [16, 6]
    assert len(body) == head + 22
    assert all(0 <= x < 1 for x in struct.unpack("<4f", body[head : head + 16]))
    assert all(0 <= n < 100 for n in struct.unpack("<3h", body[head + 16 :]))


def test_the_length_of_the_head_before_binary_tensors_stands_in_the_requests_head() -> None:
    with apis.serving(apis.Triton()) as server:
        found = probe(server.url, form=Form(batch=2, binary=True))
        _, _, headers, body = next(seen for seen in server.seen if seen[1].endswith("/infer"))
    head = int(headers["inference-header-content-length"])
    assert json.loads(body[:head])["inputs"][0]["shape"] == [2, 3, 4]
    assert len(body) == head + 24 * 4 + 2
    assert headers["content-type"] == found.endpoint.content_type == "application/octet-stream"
    assert found.endpoint.headers == (("Inference-Header-Content-Length", str(head)),)


def test_a_server_without_metadata_is_known_by_its_readiness() -> None:
    class Bare(apis.Triton):
        def answer(self, method: str, path: str, body: bytes) -> apis.Answer:
            if path in ("/v2", "/v2/repository/index"):
                return apis.NOT_FOUND
            return (200, "text/plain", [b""]) if path == "/v2/health/ready" else super().answer(method, path, body)

    with apis.serving(Bare()) as server:
        assert probe(server.url, model="resnet").endpoint.name == "kserve"
        with pytest.raises(BadInput, match="name one with --model"):
            probe(server.url)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [(("a:FP32:-1x-1",), "open dimension"), (("a:FP31:1",), "datatype"), (("a:FP32:1xb",), "shape"), ((":FP32:1",), "NAME")],
)
def test_tensors_that_cannot_be_are_refused_with_what_to_write(inputs: tuple[str, ...], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        endpoints.make(Spec(name="kserve", path="/x", model="m", form=Form(inputs=inputs)))


def test_torchserves_chunks_are_events_and_a_tokenizer_or_a_path_tells_more() -> None:
    """A handler's chunks have no mark between them; JSON ends where it ends, however it is cut."""
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [b'{"t": "so"}', b'{"t": " it', b'"}{"t": " is"}']
    data = head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\n"
    ends = [data.index(chunk) + len(chunk) + 2 for chunk in chunks]
    plain = endpoints.make(Spec(name="torchserve", path="/predictions/m", model="m", form=Form(streams=True)))
    assert plain.body(ASK) == ASK.text.encode()
    found = plain.read(fed(data, ends))
    assert (found.token_s, found.token_source, found.is_whole) == (tuple(map(float, ends)), "chunks", True)
    told = endpoints.make(Spec(name="torchserve", path="/predictions/m", model="m", form=Form(streams=True, response_path="$.t")))
    found = told.read(fed(data, ends))
    assert (found.token_s, found.text) == ((float(ends[0]), float(ends[2]), float(ends[2])), "so it is")


def test_tritons_generate_is_one_moment_and_an_error_inside_its_stream_is_an_error() -> None:
    with apis.serving(apis.TritonText()) as server:
        found = probe(server.url, endpoint="triton-generate", model="resnet")
        answer = endpoints.make(found.endpoint).read(fed(answer_bytes(server.url, found)))
        sent = server.asked("/v2/models/resnet/generate")[-1]
    assert (answer.text, len(answer.token_s), answer.output_tokens) == ("aaa", 1, None)
    assert (sent["text_input"], sent["max_tokens"], sent["parameters"]["max_tokens"]) == (ASK.text, 3, 3)
    stream = b'data: {"text_output": "a"}\n\ndata: {"error": "out of blocks"}\n\n'
    with pytest.raises(wire.WireError, match="out of blocks"):
        endpoints.make(Spec(name="triton-stream", path="/x", model="m")).read(fed(b"HTTP/1.1 200 OK\r\n\r\n" + stream))


def test_columns_of_tensors_for_tensorflow_are_nested() -> None:
    with apis.serving(apis.TFServing()) as server:
        found = probe(server.url, form=Form(inputs=("x:FP32:-1x2x3",), batch=4))
        sent = server.asked("/v1/models/model:predict")[-1]["inputs"]["x"]
    assert [len(sent), len(sent[0]), len(sent[0][0])] == [4, 2, 3]
    assert found.endpoint.name == "tfserving"


def test_images_join_the_last_message() -> None:
    chat = endpoints.make(Spec(name="chat", path="/x", model="m"))
    body = json.loads(chat.body(dataclasses.replace(ASK, images=("data:image/png;base64,AA==",))))
    parts = body["messages"][-1]["content"]
    assert [part["type"] for part in parts] == ["text", "image_url"]
    assert parts[1]["image_url"]["url"] == "data:image/png;base64,AA=="
    talk = dataclasses.replace(ASK, messages=({"role": "user", "content": "hi"}, {"role": "user", "content": "look"}), images=("data:,x",))
    assert json.loads(chat.body(talk))["messages"][0] == {"role": "user", "content": "hi"}


# ---------------------------------------------------------------- any HTTP

HOMEMADE = Form(
    template='{"say": {{ text | tojson }}, "length": {{ output_tokens }}}', response_path="$.out.words", finish_path="$.last",
    usage_path="$.made", streams=True,
)  # fmt: skip


def test_any_api_is_asked_by_template_and_read_by_jsonpath() -> None:
    with apis.serving(apis.Homemade()) as server:
        found = probe(server.url + "/say?fast=1", form=HOMEMADE)
        answer = endpoints.make(found.endpoint).read(fed(answer_bytes(server.url, found)))
    assert (found.endpoint.name, found.path) == ("http", "/say?fast=1")
    assert (answer.text, answer.output_tokens, answer.tokens_per_event, answer.token_source) == ("ababab", 6, (2, 2, 2), "usage")
    assert answer.is_whole


@pytest.mark.parametrize(
    ("template", "says"),
    [("{{ tex }}", "'tex' is undefined.*text, texts"), ("{{ text", "--body-template"), ("{{ row.city }}", "city"), ("{{ 1 / 0 }}", "zero")],
)
def test_a_template_that_cannot_be_rendered_says_what_it_may_use(template: str, says: str) -> None:
    with pytest.raises(BadInput, match=says):
        endpoints.make(Spec(name="http", path="/", model="", form=Form(template=template))).body(ASK)


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    spec = Spec(name="http", path="/", model="", form=Form(template="{{ text.__class__.__mro__[1].__subclasses__() }}"))
    with pytest.raises(BadInput, match="unsafe"):
        endpoints.make(spec).body(ASK)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "c d"]), inner, max_size=3),
        max_leaves=12,
    ),
    st.lists(st.sampled_from(["a", "b", "c d", 0, 1, -1]), min_size=1, max_size=4),
)
def test_plain_paths_find_what_the_jsonpath_library_finds(document: Any, steps: list[Any]) -> None:
    """Our own short cut and the library's RFC 9535 agree."""
    import jsonpath

    document = {"a": document, "b": [document]}  # at the top the library takes a text for JSON to parse
    path = "$" + "".join(f"[{step}]" if isinstance(step, int) else f"['{step}']" for step in steps)
    assert reading.finder(path)(document) == list(jsonpath.compile(path).findall(document))


def test_other_paths_are_the_librarys() -> None:
    document = {"choices": [{"i": 0, "text": "x"}, {"i": 1, "text": "y"}]}
    assert reading.finder("$..text")(document) == ["x", "y"]
    assert reading.finder("$.choices[?@.i==1].text")(document) == ["y"]
    assert reading.finder("$..text")("[no JSON") == reading.finder("$.text")("x") == []
    with pytest.raises(BadInput, match="JSONPath"):
        reading.finder("$.[")


def test_a_websockets_answer_ends_where_its_path_says() -> None:
    spec = Spec(name="websocket", path="/ws", model="", form=Form(response_path="$.t", finish_path="$.done"))
    endpoint = endpoints.make(spec)
    assert isinstance(endpoint, endpoints.template.WebSocket)
    assert [endpoint.is_end(m) for m in (b'{"t": "a", "done": false}', b'{"t": "b"}', b'{"done": true}', b"[DONE]")] == [
        False,
        False,
        True,
        True,
    ]


# ---------------------------------------------------------------- wherever the bytes are cut


def recorded() -> list[tuple[str, Spec, bytes]]:
    """Return one whole response of each API."""
    kept = []
    for api, kind, *_ in FOUND:
        with apis.serving(api()) as server:
            found = probe(server.url)
            kept.append((kind, found.endpoint, answer_bytes(server.url, found)))
    with apis.serving(apis.Homemade()) as server:
        found = probe(server.url + "/say", form=HOMEMADE)
        kept.append(("http", found.endpoint, answer_bytes(server.url, found)))
    return kept


@pytest.fixture(scope="module")
def responses() -> list[tuple[str, Spec, bytes]]:
    return recorded()


def test_wherever_the_bytes_are_cut_the_answer_is_the_same(responses: list[tuple[str, Spec, bytes]]) -> None:
    """And each event is stamped when its last byte came: a stamp is at most as early as in the uncut stream's finest cut."""
    rng = random.Random(3)
    for kind, spec, data in responses:
        endpoint = endpoints.make(spec)
        whole, finest = endpoint.read(fed(data)), endpoint.read(fed(data, list(range(len(data)))))
        for _ in range(25):
            cuts = [rng.randrange(len(data)) for _ in range(rng.randrange(12))]
            found = endpoint.read(fed(data, cuts))
            assert dataclasses.replace(found, token_s=()) == dataclasses.replace(whole, token_s=()), kind
            bounds = sorted({*cuts, len(data)})
            assert found.token_s == tuple(next(float(b) for b in bounds if b >= at) for at in finest.token_s), kind


def test_garbage_in_place_of_an_answer_is_refused_by_every_kind(responses: list[tuple[str, Spec, bytes]]) -> None:
    garbage = [b"<html>so sorry</html>\n", b'{"error": {"message": "out of memory"}}', b"\x00\xff\x00\n"]
    for kind, spec, _ in responses:
        if kind == "torchserve":
            continue  # its answers are whatever its handler says
        for body in garbage:
            data = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            try:
                is_whole = endpoints.make(spec).read(fed(data)).is_whole
            except wire.WireError:
                is_whole = False
            assert not is_whole, (kind, body)


def test_an_answer_that_was_cut_off_is_not_whole_and_keeps_what_came(responses: list[tuple[str, Spec, bytes]]) -> None:
    streams = [case for case in responses if case[0] in ("chat", "responses", "tgi", "http")]
    assert len(streams) == 4
    for kind, spec, data in streams:
        found = endpoints.make(spec).read(fed(data[: data.rindex(b"data:" if kind != "http" else b'{"out"') + 9]))
        assert len(found.token_s) >= 2, kind
        assert not found.is_whole or kind == "chat", kind  # a chat said its finish before its usage


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("given_", "says"),
    [
        ({"path": "v1"}, "slash"),
        ({"method": "PO ST"}, "--method"),
        ({"batch": 0}, "--batch"),
        ({"response_path": "x.y"}, "begins with"),
        ({"body_template": Path("/nowhere.j2")}, "cannot be read"),
        ({"tokenizer": Path("/nowhere.json")}, "tokenizer"),
    ],
)
def test_forms_that_cannot_be_are_refused_in_one_line(given_: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says) as caught:
        form.checked(**given_)
    assert "\n" not in str(caught.value)


def test_http_client_is_what_looks_at_a_target_and_a_form_survives_the_way_to_the_worker() -> None:
    import msgspec

    spec = Spec(name="http", path="/x", model="m", form=HOMEMADE, headers=(("A", "b"),), settings={"inputs": [1]})
    assert msgspec.json.decode(msgspec.json.encode(spec), type=Spec) == spec
    assert http.client.HTTPConnection.default_port == 80
