"""Architectures: counted from their shape, checked against what others publish and against arithmetic by hand."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlsys_bench import hardware, models, resources
from mlsys_bench.errors import BadInput, UnknownName

ROWS = {row["id"]: row for row in csv.DictReader(resources.catalogue("models.csv").read_text(encoding="utf-8").splitlines())}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
KNOWN = DATA / "catalogue" / "models.csv"
EVERY = models.every()
IDS = [a.id for a in EVERY]
ARCHITECTURES = st.sampled_from(EVERY)
PRECISIONS = st.sampled_from(models.PRECISIONS)


@pytest.mark.parametrize("a", EVERY, ids=IDS)
def test_parameters_by_formula_are_those_of_the_catalogue(a: models.Architecture) -> None:
    """Within 0.05 % of what was read beside the shape: the formula leaves out Qwen's biases and Gemma's extra norms, 0.02 %."""
    read = float(ROWS[a.id]["params_b"]) * 1e9
    assert a.params == pytest.approx(read, rel=0.0005, abs=0.6e6)
    assert a.active_params == pytest.approx(float(ROWS[a.id]["active_params_b"]) * 1e9, rel=0.02 if a.experts else 0.0005, abs=0.6e6)


@pytest.mark.parametrize(
    ("name", "billions", "tolerance"),
    [
        ("gpt-oss-120b", 116.83, 0.001),  # model card, table 1
        ("gpt-oss-20b", 20.91, 0.001),
        ("minimax-m2.5", 230, 0.01),
        ("qwen3.5-397b-a17b", 397, 0.01),  # with its vision tower
        ("qwen3-next-80b-a3b", 80, 0.01),
        ("deepseek-v3", 671, 0.001),
        ("glm-5", 744, 0.001),
        ("kimi-k2", 1040, 0.015),  # "1.04 trillion", arXiv 2507.20534
        ("llama-4-scout-17b-16e", 109, 0.01),  # with its vision tower
        ("mixtral-8x7b", 46.7, 0.001),
        ("mixtral-8x22b", 141, 0.01),
        ("codellama-34b", 33.7, 0.002),
        ("yi-34b", 34.4, 0.001),
        ("mistral-nemo-12b", 12.2, 0.005),
        ("qwen3-235b-a22b", 235, 0.001),
        ("gpt-j-6b", 6.05, 0.001),
    ],
)
def test_counted_parameters_are_those_the_makers_state(name: str, billions: float, tolerance: float) -> None:
    a = models.find(name)
    assert a.params + a.tower_params == pytest.approx(billions * 1e9, rel=tolerance)


@pytest.mark.parametrize(
    ("name", "billions", "with_embedding"),
    [("gpt-oss-120b", 5.13, False), ("gpt-oss-20b", 3.61, False), ("kimi-k2", 32.6, True), ("deepseek-v3", 37, True),
     ("qwen3.5-397b-a17b", 17, True), ("llama-4-scout-17b-16e", 17, True), ("mixtral-8x7b", 12.9, True), ("qwen3-235b-a22b", 22, True)],
)  # fmt: skip
def test_active_parameters_are_those_the_makers_state(name: str, billions: float, with_embedding: bool) -> None:
    """Within 2.5 %: most makers round to a billion.  Some leave the embedding table out, of which a token reads one row."""
    a = models.find(name)
    active = a.active_params - (0 if with_embedding else a.vocab * a.hidden)
    assert active == pytest.approx(billions * 1e9, rel=0.025)


@pytest.mark.parametrize("a", EVERY, ids=IDS)
def test_the_parts_make_the_whole(a: models.Architecture) -> None:
    """Every matrix is in exactly one part; vectors (norms, biases) are what is left, and little."""
    parts = models.parts(a)
    assert len({part.name for part in parts}) == len(parts)
    assert 0 < a.params - sum(part.total for part in parts) < 0.002 * a.params
    assert sum(part.total for part in parts if part.group != "embedding") == models.linear_params(a)
    assert a.full_layers >= 0
    assert a.moe_layers + a.dense_layers == (a.layers if a.experts else 0)


@pytest.mark.skipif(not KNOWN.exists(), reason="the catalogue facts this was checked against are not here")
def test_kv_bytes_are_those_others_computed() -> None:
    with KNOWN.open(newline="", encoding="utf-8") as file:
        rows = {row["id"]: float(row["kv_bytes_per_token_fp16"]) for row in csv.DictReader(file)}
    assert len(rows) > 30
    for name, expected in rows.items():
        a = models.find(name)
        assert models.kv_bytes_per_token(a, "fp16") == expected, name
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
    assert models.weight_bytes(a, "int8") == layers + 2 * (2 * head + 65 * 4096)
    assert models.step_weight_bytes(a, "int4") == pytest.approx((0.5 + 2 / 128) * layers + 2 * head)


def test_the_built_in_engine_quantizes_an_untied_head() -> None:
    a = models.find("nano")
    assert models.formats(a, "int8")["head"] == "int8"
    assert models.formats(dataclasses.replace(a, tied_embeddings=True), "int8")["head"] == "bf16"
    assert models.formats(models.find("llama-3-8b"), "int8")["head"] == "bf16", "published checkpoints leave it in 16 bit"


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


def test_deepseek_by_hand() -> None:
    """Per layer: down 7168 (1536 + 576), q 1536 * 128 * 192, kv 512 * 128 * 256, out 128 * 128 * 7168; experts 3 * 7168 * 2048 each."""
    a = models.find("deepseek-v3")
    parts = {part.name: part for part in models.parts(a)}
    assert (parts["attn_down"].params, parts["attn_q"].params) == (7168 * 2112, 1536 * 128 * 192)
    assert (parts["attn_kv_up"].params, parts["attn_out"].params) == (512 * 128 * 256, 128 * 128 * 7168)
    assert (parts["experts"].layers, parts["experts"].copies, parts["experts"].params) == (58, 256, 3 * 7168 * 2048)
    grown = models.step_weight_bytes(a, "fp8", 1e9) - models.step_weight_bytes(a, "fp8", 1)
    assert grown / 248 == pytest.approx(58 * 3 * 7168 * 2048, rel=1e-9)
    assert models.attention_flops_per_pair(a) == 61 * 2 * 128 * (192 + 128)
    assert models.attention_flops_per_pair(a, absorbed=True) == 61 * 2 * 128 * (576 + 512)
    assert models.kv_bytes_per_token(a, "fp8") == 61 * 576 * 2
    assert models.kv_bytes_per_token(a, "fp8", "fp8") == 61 * 576
    assert models.find("deepseek-r1") is a


def test_windows_and_states_bound_what_a_sequence_holds() -> None:
    """gpt-oss: 18 layers of everything, 18 of 128 tokens, 2 * 8 * 64 values; Qwen3.5: 15 layers of everything, 45 of a state."""
    a = models.find("gpt-oss-120b")
    assert models.kv_bytes(a, "bf16", 1000) == 2 * 1024 * (18 * 1000 + 18 * 128)
    assert models.kv_bytes(a, "bf16", 100) == models.kv_bytes_per_token(a, "bf16") * 100
    q = models.find("qwen3.5-397b-a17b")
    state = 45 * (64 * 128 * 128 * 4 + 12288 * 3 * 2)
    assert models.state_bytes(q) == state
    assert models.kv_bytes(q, "bf16", 1000) == 15 * 2 * 2 * 256 * 2 * 1000 + state
    assert models.kv_bytes(q, "bf16", 1000, tp=8) == 15 * 2 * 2 * 256 * 2 * 1000 / 2 + state / 8, "2 KV heads, repeated on 8 devices"
    m = models.find("deepseek-v3")
    assert models.kv_bytes(m, "bf16", 1000, tp=8) == models.kv_bytes(m, "bf16", 1000), "the latent cache is whole on every device"


@pytest.mark.parametrize(
    ("name", "precision", "gigabytes"),
    [("gpt-oss-120b", "fp4", 65.3), ("deepseek-v3", "fp8", 673), ("deepseek-v3", "fp4", 397), ("kimi-k2.5", "int4", 595),
     ("llama-3-70b", "fp4", 42.7), ("llama-4-scout-17b-16e", "fp8", 114.6)],
)  # fmt: skip
def test_checkpoints_are_as_large_as_they_are(name: str, precision: str, gigabytes: float) -> None:
    """gpt-oss-120b is a file of 65 GB, Kimi-K2.5 in int4 one of 595 GB, DeepSeek-V3 without its draft layer 671 GB."""
    assert models.weight_bytes(models.find(name), precision) == pytest.approx(gigabytes * 1e9, rel=0.005)


def test_a_shard_holds_its_part() -> None:
    a = models.find("llama-3-70b")
    whole = models.weight_bytes(a, "bf16")
    assert models.shard_weight_bytes(a, "bf16") == whole
    assert whole / 8 < models.shard_weight_bytes(a, "bf16", tp=8) < whole / 8 * 1.001, "norms are on every device"
    assert models.shard_weight_bytes(a, "bf16", tp=2, pp=2) == pytest.approx(whole / 4, rel=0.02)
    q = models.find("qwen3-235b-a22b")
    repeated = next(part for part in models.parts(q) if part.name == "attn_kv")
    assert repeated.share(2) == 0.5
    assert repeated.share(8) == 0.25, "4 KV heads"
    m = models.find("deepseek-v3")
    experts = next(part for part in models.parts(m) if part.name == "experts")
    alone = models.shard_weight_bytes(m, "fp8", tp=1, experts_over=32)
    assert alone == pytest.approx(models.weight_bytes(m, "fp8") - experts.total * (1 - 1 / 32), rel=1e-9), (
        "attention is copied to each rank"
    )


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
    sizes = [models.weight_bytes(a, p) for p in ("fp32", "bf16", "int8", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    assert models.weight_bytes(a, "fp4") <= models.weight_bytes(a, "fp8")
    assert models.weight_bytes(a, "fp32") == 4 * a.params + 2 * a.tower_params


@given(ARCHITECTURES)
def test_active_matrices_and_embedding_make_the_active_parameters(a: models.Architecture) -> None:
    """FLOPs by shape and active parameters of the catalogue agree: 2 per parameter, embedding rows and norms (0.1 %) apart."""
    heads = models.head_flops(a) * (1 if a.tied_embeddings else 2)
    vectors = a.params - sum(part.total for part in models.parts(a))
    assert models.linear_flops_per_token(a) + heads + 2 * vectors == pytest.approx(2 * a.active_params, rel=1e-9)


def test_a_shape_of_ones_own_is_counted() -> None:
    nano = models.find("nano")
    assert models.counted(dataclasses.replace(nano, params=0.0, active_params=0.0)) == nano


@pytest.mark.skipif(not (DATA / "llm").exists(), reason="the measured tables are not here")
def test_every_model_and_device_of_the_measured_tables_is_known() -> None:
    """Except `N/A`, which MLPerf writes for processors."""
    seen = set()
    for path in sorted((DATA / "llm").glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                device = row.get("accelerator") or row.get("gpu") or row.get("system")
                seen |= {("model", row["model"])} if "model" in row else set()
                seen |= {("device", device)} if device and device != "N/A" else set()
    assert len(seen) > 40
    for kind, name in seen:
        known = models.find(name) if kind == "model" else hardware.find(name)
        assert known.source


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8-dynamic", "fp8"),
        ("nvidia/DeepSeek-R1-NVFP4", "fp4"),
        ("Qwen/Qwen2.5-72B-Instruct-GPTQ-Int8", "int8"),
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "int4"),
        ("RedHatAI/Meta-Llama-3.1-70B-Instruct-quantized.w4a16", "int4"),
        ("unsloth/DeepSeek-V3-bf16", "bf16"),
        ("deepseek-ai/DeepSeek-V3-0324", "fp8"),
        ("meta-llama/Llama-3.1-8B-Instruct", "bf16"),
    ],
)
def test_a_copy_is_kept_in_what_its_name_says(name: str, precision: str) -> None:
    assert models.find(name).native_precision == precision
    assert models.find(models.find(name).id).params == models.find(name).params


@pytest.mark.parametrize(
    ("name", "tokens", "precision"),
    [
        ("llama-2-70b", 4096, "bf16"),
        ("gemma-7b", 8192, "bf16"),
        ("gemma-3-1b", 32_768, "bf16"),
        ("gemma-3-4b", 131_072, "bf16"),
        ("mistral-large-2411", 131_072, "bf16"),
        ("moonshotai/Kimi-K2-Instruct", 131_072, "fp8"),
        ("moonshotai/Kimi-K2-Instruct-0905", 262_144, "fp8"),
        ("moonshotai/Kimi-K2-Thinking", 262_144, "int4"),
    ],
)
def test_the_longest_context_is_the_makers(name: str, tokens: int, precision: str) -> None:
    """Later models of one shape have longer ones, and weights of another format: 594 GB of Kimi K2 Thinking, not 1,028."""
    a = models.find(name)
    assert (a.max_context, a.native_precision) == (tokens, precision)


def test_every_model_but_the_gpt_3_of_the_paper_has_a_longest_context() -> None:
    assert all(a.max_context for a in EVERY)
