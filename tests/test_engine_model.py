"""The decoder against Hugging Face's, and against itself in other precisions."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np
import pytest
import torch

from mlsys_bench import models
from mlsys_bench.batching import StepPlan
from mlsys_bench.engine import runner, spec, weights
from mlsys_bench.engine.kv import KVCache
from mlsys_bench.engine.model import Model
from mlsys_bench.engine.quant import activation_dtype
from mlsys_bench.errors import BadInput
from mlsys_bench.models import Architecture

CPU = torch.device("cpu")
BLOCK_TOKENS, BLOCKS = 4, 40
TABLE = np.random.default_rng(5).permutation(BLOCKS).reshape(2, -1).astype(np.int32)  # two sequences, blocks anywhere in the pool


def shape(**changes: Any) -> Architecture:
    """Return a small grouped-query shape whose heads together are wider than the model."""
    nano = models.find("nano")
    small = {"layers": 3, "hidden": 64, "heads": 8, "kv_heads": 2, "head_dim": 16, "ffn": 96, "vocab": 320, "max_context": 256}
    return models.counted(dataclasses.replace(nano, **{**small, **changes}))


def built(a: Architecture, loaded: weights.Weights, precision: str = "fp32") -> tuple[Model, KVCache]:
    cache = KVCache(a, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, dtype=activation_dtype(precision), device=CPU)
    return Model(spec.plain(a), loaded, precision=precision, max_context=256, device=CPU), cache


def step(model: Model, cache: KVCache, known: list[list[int]], work: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Compute (sequence, start, tokens) for each in `work`; return the logits of each one's last token, in that order."""
    rows, start, tokens = np.array(work, dtype=np.int32).T
    plan = StepPlan(rows, start, tokens, np.ones(len(work), dtype=bool), np.array([], dtype=np.int32))
    ordered = runner.order_of(plan)
    logits = model.forward(runner.step_input(ordered, dict(enumerate(known)), TABLE, cache), cache)
    by_row = dict(zip(ordered.rows.tolist(), logits, strict=True))
    return [by_row[row] for row in rows.tolist()]


def text(seed: int, tokens: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, 256, tokens)]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def reference(request: pytest.FixtureRequest) -> tuple[Architecture, Any]:
    """Return a LlamaForCausalLM with random weights, norm gains included, and its shape here."""
    transformers = importlib.import_module("transformers")
    a = shape(tied_embeddings=request.param)
    config = transformers.LlamaConfig(
        vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.ffn, num_hidden_layers=a.layers, num_attention_heads=a.heads,
        num_key_value_heads=a.kv_heads, head_dim=a.head_dim, max_position_embeddings=256, rms_norm_eps=1e-5, rope_theta=10_000.0,
        tie_word_embeddings=a.tied_embeddings, initializer_range=0.125,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = transformers.LlamaForCausalLM(config).eval()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return a, model


def theirs(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


def ours(a: Architecture, model: Any) -> tuple[Model, KVCache]:
    return built(a, weights.from_state_dict(spec.plain(a), model.state_dict(), precision="fp32", device=CPU))


def test_prefill_agrees_with_transformers(reference: tuple[Architecture, Any]) -> None:
    a, model = reference
    tokens = text(0, 37)
    want = theirs(model, tokens)
    assert want.std() > 0.5, "logits of one size would agree whatever was computed"
    for length in (1, 2, 16, 37):
        (got,) = step(*ours(a, model), [tokens[:length]], [(0, 0, length)])
        assert (got - want[length - 1]).abs().max() < 1e-4


def test_every_step_through_the_paged_cache_agrees_with_transformers(reference: tuple[Architecture, Any]) -> None:
    """Two sequences of different lengths: chunks of uneven size, then token by token, one decoding while the other is in prefill."""
    a, model = reference
    engine, cache = ours(a, model)
    long, short = text(1, 40), text(2, 29)
    want = [theirs(model, long), theirs(model, short)]

    def agree(work: list[tuple[int, int, int]]) -> None:
        for (which, start, count), got in zip(work, step(engine, cache, [long, short], work), strict=True):
            assert (got - want[which][start + count - 1]).abs().max() < 1e-4

    agree([(0, 0, 7)])
    agree([(0, 7, 9), (1, 0, 3)])
    agree([(0, 16, 1), (1, 3, 5)])
    agree([(1, 8, 6), (0, 17, 1)])
    for i in range(15):
        agree([(0, 18 + i, 1), (1, 14 + i, 1)])


def test_a_checkpoint_that_does_not_fit_says_which_tensor(reference: tuple[Architecture, Any]) -> None:
    a, model = reference
    tensors = dict(model.state_dict())
    with pytest.raises(BadInput, match=r"q_proj.weight is \[128, 64\]; this shape needs \[64, 64\]"):
        weights.from_state_dict(spec.plain(dataclasses.replace(a, heads=4)), tensors, precision="fp32", device=CPU)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    with pytest.raises(BadInput, match=r"no tensor model.layers.2.mlp.up_proj"):
        weights.from_state_dict(spec.plain(a), tensors, precision="fp32", device=CPU)


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.05), ("int8", 0.1)])
@pytest.mark.parametrize("tied", [False, True])
def test_other_precisions_stay_near_fp32(precision: str, tolerance: float, tied: bool) -> None:
    """About 1 % per matrix (see the tests of quant) adds up over 3 layers of 4 to a few percent of the logits' norm."""
    a = shape(tied_embeddings=tied)
    tokens = text(3, 33)

    def logits(p: str) -> torch.Tensor:
        model, cache = built(a, weights.random(spec.plain(a), precision=p, device=CPU, seed=1), p)
        chunks = step(model, cache, [tokens], [(0, 0, 25)])
        return torch.stack(chunks + [step(model, cache, [tokens], [(0, i, 1)])[0] for i in range(25, 33)])

    want, got = logits("fp32"), logits(precision)
    assert float((got - want).norm() / want.norm()) < tolerance


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_take_what_models_says(precision: str, tied: bool) -> None:
    """Apart from gains, which are in the matrices here, and the scales of int8, which `models` neglects."""
    a = shape(tied_embeddings=tied, vocab=512)
    held = weights.random(spec.plain(a), precision=precision, device=CPU, seed=0).tensors()
    gains = (2 * a.layers + 1) * a.hidden * 4
    rows = a.layers * ((a.heads + 2 * a.kv_heads) * a.head_dim + a.hidden + 2 * a.ffn + a.hidden) + a.vocab
    slack = max(gains, 6 * rows if precision == "int8" else 0)
    assert abs(sum(t.numel() * t.element_size() for t in held) - models.weight_bytes(a, precision)) <= slack


def test_the_same_seed_gives_the_same_weights() -> None:
    a = shape()
    first, again, other = (weights.random(spec.plain(a), precision="bf16", device=CPU, seed=s).tensors() for s in (3, 3, 4))
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, other, strict=True) if x.dtype == torch.bfloat16)


def test_random_logits_have_a_sane_size() -> None:
    """Between 1 and 10, deep or shallow: neither uniform nor always the same token."""
    for layers in (1, 8):
        a = shape(layers=layers)
        model, cache = built(a, weights.random(spec.plain(a), precision="fp32", device=CPU, seed=0))
        (logits,) = step(model, cache, [text(4, 20)], [(0, 0, 20)])
        assert 1 < float(logits.std()) < 10


@pytest.mark.parametrize("name", ["nano", "small-160m", "tinyllama-1.1b", "llama-3-8b"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_cache_takes_what_models_says(name: str, precision: str) -> None:
    a = models.find(name)
    cache = KVCache(a, blocks=3, block_tokens=8, dtype=activation_dtype(precision), device=CPU)
    assert cache.allocated_bytes == models.kv_bytes_per_token(a, precision) * 24
