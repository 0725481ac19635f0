"""A checkpoint with a tokenizer and a chat template of its own, served: text as its users see it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
import torch
from safetensors.torch import save_file

from mlsys_bench import serve
from mlsys_bench.engine.tokenizer import Tokenizer, open_tokenizer
from tests.sample_tokenizers import sentencepiece

pytestmark = pytest.mark.e2e
VOCAB, HIDDEN, FFN = 448, 32, 48
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system prompts here') }}{% endif %}"
    "{{ bos_token }}[{{ m.role }}] {{ m.content }}{% endfor %} [answer]"
)
ANY: dict[str, Any] = {"max_tokens": 40, "temperature": 1.0, "seed": 3}
IDS: dict[str, Any] = {"extra_body": {"return_token_ids": True, "ignore_eos": True}}


class Served(NamedTuple):
    """A checkpoint, its tokenizer, and a client of the server that runs it."""

    model: str
    tokenizer: Tokenizer
    client: openai.OpenAI


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Llama of one layer with random weights."""
    generator, at = torch.Generator().manual_seed(1), "model.layers.0."
    sizes = {f"{at}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
    sizes |= {f"{at}mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")} | {f"{at}mlp.down_proj.weight": (HIDDEN, FFN)}
    sizes |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    tensors = {name: torch.randn(size, generator=generator) * 0.3 for name, size in sizes.items()}
    tensors |= {
        name: torch.ones(HIDDEN) for name in (f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight", "model.norm.weight")
    }
    folder = tmp_path_factory.mktemp("llama")
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32", "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sentencepiece().save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    model = str(folder)
    with (
        serve.start(serve.Options(model=model, precision="fp32", port=0)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Served(model, open_tokenizer(folder, VOCAB), client)


def test_streamed_text_is_that_of_the_tokens_and_continues_the_prompt(served: Served) -> None:
    """Spaces and characters of several bytes included: prompt and answer together read as the tokens do."""
    model, tokenizer, client = served
    for prompt in ("the quick", "naïve "):
        whole = client.completions.create(model=model, prompt=prompt, **ANY, **IDS)
        parts = [c.choices[0].text for c in client.completions.create(model=model, prompt=prompt, **ANY, **IDS, stream=True)]
        choice, given = whole.choices[0], tokenizer.encode(prompt)
        assert choice.model_extra is not None
        ids = choice.model_extra["token_ids"]
        assert whole.usage is not None
        assert whole.usage.prompt_tokens == len(given)
        assert "".join(parts) == choice.text
        assert len(parts) == len(ids) == 40
        assert prompt + choice.text == tokenizer.decode([*given, *ids])
        assert max(ids) < tokenizer.generated < VOCAB


def test_a_stop_string_may_lie_across_tokens(served: Served) -> None:
    model, _, client = served
    ask: dict[str, Any] = {"model": model, "prompt": "the", **ANY, **IDS}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[12:18]
    cut = client.completions.create(**ask, stop=stop)
    assert cut.choices[0].text == whole[: whole.find(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None
    assert cut.usage.completion_tokens < 40


def test_a_chat_goes_through_the_models_template(served: Served) -> None:
    model, tokenizer, client = served
    messages: Any = [{"role": "user", "content": "the fox"}]
    chat = client.chat.completions.create(model=model, messages=messages, **ANY)
    same = client.completions.create(model=model, prompt=tokenizer.chat(messages), **ANY)
    assert chat.choices[0].message.content == same.choices[0].text
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(tokenizer.chat(messages))
    with pytest.raises(openai.BadRequestError, match="no system prompts here"):
        client.chat.completions.create(model=model, messages=[{"role": "system", "content": "be"}, *messages])


def test_the_models_own_end_ends_an_answer(served: Served) -> None:
    """Its name is nowhere in the text, but in the log-probabilities."""
    model, tokenizer, client = served
    end = next(iter(tokenizer.ends))
    found = client.completions.create(model=model, prompt="the", max_tokens=9, logit_bias={str(end): 100}, logprobs=0).choices[0]
    assert (found.text, found.finish_reason) == ("", "stop")
    assert found.logprobs is not None
    assert found.logprobs.tokens == ["</s>"]
