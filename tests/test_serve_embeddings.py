"""Vectors of texts over HTTP: what `/v1/embeddings` takes and refuses, and a served encoder beside its model in transformers."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers, processors

from mlsys_bench import serve
from mlsys_bench.engine.tokenizer import ByteTokenizer
from mlsys_bench.serve import embeddings
from mlsys_bench.serve import openai_api as api

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"]


def parse(**fields: Any) -> embeddings.EmbeddingCall:
    return embeddings.parse(json.dumps({"model": "m", **fields}).encode(), model="m", context=8, tokenizer=ByteTokenizer())


def test_texts_come_as_one_as_several_or_as_tokens() -> None:
    assert parse(input="hi").texts == parse(input=["hi"]).texts == parse(input=[104, 105]).texts == ((104, 105),)
    assert parse(input=["hi", "a"]).texts == parse(input=[[104, 105], [97]]).texts == ((104, 105), (97,))
    assert parse(input=["hi", "a"]).tokens == 3
    assert parse(input="hi", encoding_format="base64").is_base64


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"input": []}, "1 to 2048 texts"),
        ({"input": ""}, "text 0 has 0 tokens"),
        ({"input": ["a", "x" * 9]}, "text 1 has 9 tokens; this model takes 1 to 8"),
        ({"input": [[320]]}, "token 320"),
        ({"input": [104, "i"]}, "one list of tokens"),
        ({"input": [[104], 105]}, "one list of tokens"),
        ({"input": 3}, "input"),
        ({}, "input: it is required"),
        ({"input": "hi", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "hi", "dimensions": 4}, "dimensions"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(api.ApiError, match=says) as caught:
        parse(**fields)
    assert caught.value.status == 400


def test_an_answer_holds_each_texts_vector() -> None:
    vectors = np.array([[1.0, -2.0], [0.5, 0.25]], dtype="<f4").tobytes()
    body = embeddings.body_of(parse(input=["hi", "a"]), vectors, "m")
    assert [d["embedding"] for d in body["data"]] == [[1.0, -2.0], [0.5, 0.25]]
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3}


# ---------------------------------------------------------------- a served encoder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, tokenizers.Tokenizer]:
    transformers = importlib.import_module("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = transformers.BertConfig(
            vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, initializer_range=0.2,
        )  # fmt: skip
        model = transformers.BertModel(config).eval()
    made = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    folder = tmp_path_factory.mktemp("bert")
    model.save_pretrained(folder)
    made.save(str(folder / "tokenizer.json"))
    return folder, model, made


@pytest.fixture(scope="module")
def client(bert: tuple[Path, Any, tokenizers.Tokenizer]) -> Iterator[openai.OpenAI]:
    with (
        serve.start(serve.Options(model=str(bert[0]), precision="fp32", port=0)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


@pytest.mark.e2e
def test_vectors_are_those_of_the_model_in_transformers(client: openai.OpenAI, bert: tuple[Path, Any, tokenizers.Tokenizer]) -> None:
    """The mean of the last hidden states, of length 1, within 1e-5; as floats and as base64, which the client asks for by itself."""
    folder, model, made = bert
    texts = ["the quick brown fox", "dog", "the lazy dog jumps over the fox"]
    asked = client.embeddings.create(model=str(folder), input=texts)
    floats = client.embeddings.create(model=str(folder), input=texts, encoding_format="float")
    assert asked.usage.prompt_tokens == sum(len(made.encode(text).ids) for text in texts) == 18
    for text, found, again in zip(texts, asked.data, floats.data, strict=True):
        with torch.inference_mode():
            hidden = model(torch.tensor([made.encode(text).ids])).last_hidden_state[0].mean(0)
        assert found.embedding == again.embedding == pytest.approx((hidden / hidden.norm()).tolist(), abs=1e-5)


@pytest.mark.e2e
def test_an_encoder_refuses_what_it_cannot_do(client: openai.OpenAI, bert: tuple[Path, Any, tokenizers.Tokenizer]) -> None:
    with pytest.raises(openai.BadRequestError, match="ask /v1/embeddings"):
        client.completions.create(model=str(bert[0]), prompt="the")
    with pytest.raises(openai.BadRequestError, match="takes 1 to 16"):
        client.embeddings.create(model=str(bert[0]), input="dog " * 20)
