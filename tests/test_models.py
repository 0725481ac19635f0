"""Architectures: counted from their shape, checked against what others publish and against arithmetic by hand."""

from __future__ import annotations

import csv
import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import models, resources
from mlsys_bench.errors import BadInput, UnknownName

ROWS = {row["id"]: row for row in csv.DictReader(resources.catalogue("models.csv").read_text(encoding="utf-8").splitlines())}
EVERY = models.every()
IDS = [a.id for a in EVERY]
ARCHITECTURES = st.sampled_from(EVERY)
PRECISIONS = st.sampled_from(models.PRECISIONS)


@pytest.mark.parametrize("a", EVERY, ids=IDS)
def test_parameters_by_formula_are_those_of_the_catalogue(a: models.Architecture) -> None:
    """Within 0.05 %: the formula leaves out Qwen's biases and head norms and Gemma's extra norms, 0.02 % at most.

    Published in billions with three digits after the point, which is 0.05 % of a billion.  MLA (DeepSeek) is taken from there.
    """
    published = float(ROWS[a.id]["params_b"]) * 1e9
    assert a.params == pytest.approx(published, rel=0.0005, abs=0.6e6)
    assert a.active_params == pytest.approx(float(ROWS[a.id]["active_params_b"]) * 1e9, rel=0.0005, abs=0.6e6)


@pytest.mark.parametrize("a", EVERY, ids=IDS)
def test_kv_bytes_are_those_of_the_catalogue(a: models.Architecture) -> None:
    assert models.kv_bytes_per_token(a, "fp16") == float(ROWS[a.id]["kv_bytes_per_token_fp16"])
    assert models.kv_bytes_per_token(a, "int4") == models.kv_bytes_per_token(a, "bf16")
    assert models.kv_bytes_per_token(a, "fp32") == 2 * models.kv_bytes_per_token(a, "bf16")


def test_llama_3_70b_takes_141_gb_in_bf16() -> None:
    assert models.weight_bytes(models.find("llama-3-70b"), "bf16") == pytest.approx(141.1e9, rel=0.0005)


def test_llama_3_8b_keeps_1_074_gb_for_8192_tokens() -> None:
    """2 (K and V) * 32 layers * 8 heads * 128 * 2 bytes = 131,072 bytes a token."""
    assert 8192 * models.kv_bytes_per_token(models.find("llama-3-8b"), "bf16") == pytest.approx(1.074e9, rel=0.0005)


def test_llama_3_8b_by_hand() -> None:
    """Layer: qkv 4096 * 6144, o 4096**2, mlp 3 * 4096 * 14336 = 218,103,808; head 4096 * 128,256."""
    a = models.find("llama-3-8b")
    layers, head = 32 * 218_103_808, 4096 * 128_256
    assert models.linear_params(a) == layers + head
    assert models.linear_flops_per_token(a) == 2 * layers
    assert models.head_flops(a) == 2 * head
    assert models.attention_flops_per_pair(a) == 4 * 32 * 32 * 128
    assert models.step_weight_bytes(a, "bf16") == 2 * (layers + head)
    assert models.weight_bytes(a, "int8") == (layers + head) + 2 * (head + 65 * 4096)
    assert models.step_weight_bytes(a, "int4") == pytest.approx((0.5 + 2 / 128) * (layers + head))


def test_a_tied_head_stays_in_16_bit_when_the_layers_are_quantized() -> None:
    a = models.find("llama-3.2-1b")
    head = a.vocab * a.hidden
    assert models.step_weight_bytes(a, "int8") == models.linear_params(a) - head + 2 * head
    assert models.weight_bytes(a, "int8") - models.step_weight_bytes(a, "int8") == 2 * 33 * 2048, "the norms alone are not read as matrices"


def test_mixtral_reads_the_experts_that_are_hit() -> None:
    """E (1 - (1 - 1/4)**n): 2 of 8 for one token, 98.99 % of 8 for 16."""
    a = models.find("mixtral-8x7b")
    assert models.experts_hit(a, 1) == 2
    assert models.experts_hit(a, 16) / 8 == pytest.approx(0.98998, abs=1e-5)
    experts = 32 * 3 * 4096 * 14336
    one, all_ = models.step_weight_bytes(a, "bf16", 1), models.step_weight_bytes(a, "bf16", 10_000)
    assert all_ - one == pytest.approx(2 * 6 * experts, rel=1e-9)
    assert all_ == pytest.approx(2 * models.linear_params(a), rel=1e-9)


def test_deepseeks_experts_follow_from_total_and_active() -> None:
    """58 layers * 3 * 7168 * 2048 = 2.555 B for one expert of each layer; (671 - 37) / 248 = 2.556 B."""
    a = models.find("deepseek-v3")
    grown = models.step_weight_bytes(a, "fp8", 1e9) - models.step_weight_bytes(a, "fp8", 1)
    assert grown / 248 == pytest.approx(58 * 3 * 7168 * 2048, rel=0.002)
    assert models.find("deepseek-r1") is a


@pytest.mark.parametrize(("name", "low", "high"), [("nano", 14e6, 16e6), ("small-160m", 155e6, 165e6), ("tinyllama-1.1b", 1.09e9, 1.11e9)])
def test_the_built_in_shapes_are_as_large_as_they_are_called(name: str, low: float, high: float) -> None:
    a = models.find(name)
    assert low <= a.params <= high
    assert a.head_dim % 8 == 0
    assert a.heads * a.head_dim == a.hidden
    assert a.heads % a.kv_heads == 0
    assert a.hidden % 128 == a.ffn % 128 == 0, "int4 groups of 128"
    assert "random weights" in a.source


def test_tinyllama_has_its_published_size() -> None:
    """1,100,048,384 parameters, as its checkpoint on the hub counts them."""
    assert models.find("tinyllama-1.1b").params == 1_100_048_384


@pytest.mark.parametrize(
    "name",
    ["llama-3-8b", "LLAMA-3-8B", "llama_3_8b", "Llama 3 8B", "llama3-8b", "meta-llama/Meta-Llama-3-8B", "Meta-Llama-3-8B-Instruct"],
)
def test_a_model_is_found_by_any_of_its_names(name: str) -> None:
    assert models.find(name).id == "llama-3-8b"


def test_no_name_means_two_models() -> None:
    owners: dict[str, set[str]] = {}
    for a in EVERY:
        for name in models.aliases(a):
            owners.setdefault(models.find(name).id, set()).add(a.id)
    assert all(ids == {owner} for owner, ids in owners.items())
    assert len(IDS) == len(set(IDS))


def test_an_unknown_model_names_its_neighbours() -> None:
    with pytest.raises(UnknownName, match=r"unknown model 'lama-3-8b'; did you mean llama-3"):
        models.find("lama-3-8b")
    with pytest.raises(UnknownName):
        models.find("")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(BadInput, match=r"unknown precision 'fp64'; did you mean"):
        models.bytes_per_param("fp64")


def test_every_model_says_where_it_is_from() -> None:
    assert all(a.source and a.date for a in EVERY)


@given(ARCHITECTURES, PRECISIONS)
def test_a_step_reads_no_more_than_there_is(a: models.Architecture, precision: str) -> None:
    assert 0 < models.step_weight_bytes(a, precision, 1) <= models.step_weight_bytes(a, precision, 1e6)
    assert models.step_weight_bytes(a, precision, 1e6) <= models.weight_bytes(a, precision) * (1 + 1e-12)


@given(ARCHITECTURES, PRECISIONS, st.integers(1, 10_000))
def test_more_tokens_never_read_fewer_bytes(a: models.Architecture, precision: str, tokens: int) -> None:
    assert models.step_weight_bytes(a, precision, tokens) <= models.step_weight_bytes(a, precision, tokens + 1) * (1 + 1e-12)


@given(ARCHITECTURES)
def test_fewer_bits_take_fewer_bytes(a: models.Architecture) -> None:
    sizes = [models.weight_bytes(a, p) for p in ("fp32", "bf16", "fp8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert models.weight_bytes(a, "fp32") == 4 * a.params


@given(ARCHITECTURES)
def test_active_matrices_and_embedding_make_the_active_parameters(a: models.Architecture) -> None:
    """FLOPs by shape and active parameters of the catalogue agree: 2 per parameter, embedding rows and norms (0.1 %) apart."""
    heads = models.head_flops(a) * (1 if a.tied_embeddings else 2)
    tolerance = 0.03 if a.attention.startswith("mla") else 0.001  # DeepSeek's 37 B is rounded and leaves the embedding out
    assert models.linear_flops_per_token(a) + heads == pytest.approx(2 * a.active_params, rel=tolerance)


def test_a_shape_of_ones_own_is_counted() -> None:
    nano = models.find("nano")
    assert models.counted(dataclasses.replace(nano, params=0.0, active_params=0.0)) == nano
