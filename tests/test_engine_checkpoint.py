"""Checkpoints in folders: whole, sharded, quantised, broken; and what they take in memory."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlsys_bench import models
from mlsys_bench.batching import Limits
from mlsys_bench.engine import Engine, checkpoint, memory, schemes, spec, weights
from mlsys_bench.engine.formats import Dense, Groups4, Logical
from mlsys_bench.engine.native import library
from mlsys_bench.engine.quant import Linear
from mlsys_bench.errors import BadInput
from tests import sample_checkpoints as sample

CPU = torch.device("cpu")
LIMITS = Limits(max_seqs=4, max_step_tokens=32, block_tokens=8, blocks=64, max_context=128)
TENSORS = sample.llama_tensors(sample.LLAMA)
PROMPT = [int(t) for t in torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(3))]


def tokens_of(folder: Path, *, precision: str = "fp32", max_tokens: int = 24, backend: str = "auto") -> list[int]:
    """Return what the engine answers to a prompt, in chunks and then token by token."""
    return answer(Engine(models.find(str(folder)), precision=precision, limits=LIMITS, checkpoint=folder, backend=backend), max_tokens)


def answer(engine: Engine, max_tokens: int = 24) -> list[int]:
    engine.add(PROMPT, max_tokens=max_tokens, ignore_eos=True)
    found: list[int] = []
    while engine.busy:
        found += [token for _, token in engine.step().tokens]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample.write(tmp_path_factory.mktemp("llama"), sample.LLAMA, TENSORS)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[..., Path]:
    """Return what writes the checkpoint with some tensors changed (None: left out) and some keys of its config."""

    def write(*, config: dict[str, Any] | None = None, shards: int = 1, **tensors: torch.Tensor | None) -> Path:
        changed = {name: tensor for name, tensor in {**TENSORS, **tensors}.items() if tensor is not None}
        return sample.write(tmp_path / "model", sample.LLAMA | (config or {}), changed, shards=shards)

    return write


# ---------------------------------------------------------------- what is read


def test_a_folder_answers_as_its_state_dict_does(folder: Path) -> None:
    shape = dataclasses.replace(models.find(str(folder)), family="llama")
    want = answer(Engine(shape, limits=LIMITS, state_dict=dict(TENSORS)))
    assert len(set(want)) > 4, "an answer of one token would be the same whatever was computed"
    assert tokens_of(folder) == want


def test_shards_and_a_name_before_every_tensor_make_no_difference(folder: Path, tmp_path: Path) -> None:
    """The decoder of a model that also sees pictures lies under language_model; the other tower is left alone."""
    inner = {name.replace("model.", "language_model.model.", 1): t for name, t in TENSORS.items() if name != "lm_head.weight"}
    inner |= {"language_model.lm_head.weight": TENSORS["lm_head.weight"], "vision_tower.patches.weight": torch.zeros(3, 3)}
    sharded = sample.write(tmp_path / "sharded", sample.LLAMA, TENSORS, shards=3)
    assert tokens_of(sample.write(tmp_path / "inner", sample.LLAMA, inner)) == tokens_of(sharded) == tokens_of(folder)


def test_what_says_nothing_may_be_there(copy: Callable[..., Path]) -> None:
    """Old files keep the angles of the rope; tied ones sometimes a copy of the embedding as their head."""
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    assert checkpoint.open_folder(copy(config={"tie_word_embeddings": True}, **extra)).decoder.shape.tied_embeddings


# ---------------------------------------------------------------- quantised ones


@pytest.fixture(scope="module", params=["awq", "gptq", "gptq_v2"])
def four_bit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, torch.Tensor]]:
    """Return the method, the folder, and the same weights as floats."""
    packed, plain = sample.quantised(TENSORS, request.param, group=32)
    made = sample.write(tmp_path_factory.mktemp(request.param), sample.config_of(request.param, 32), packed)
    return request.param, made, plain


def logical_of(folder: Path, precision: str) -> tuple[list[Logical], weights.Weights]:
    found: list[Logical] = []

    def keep(logical: Logical) -> Linear:
        found.append(logical)
        return weights.Stacked(())

    return found, checkpoint.load(checkpoint.open_folder(folder), precision=precision, device=CPU, pack=keep)


def test_a_quantised_checkpoint_computes_what_its_floats_do(four_bit: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    """In fp32, that is with matrices as floats again, token for token."""
    _, made, plain = four_bit
    shape = models.find(str(made))
    assert tokens_of(made) == answer(Engine(shape, limits=LIMITS, state_dict=plain))


def test_its_matrices_are_taken_as_they_are(four_bit: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    """Groups of 4 bit, joined but not rounded again: gains stay apart, act-order becomes an order of inputs."""
    method, made, plain = four_bit
    assert schemes.own_precision(made) == "int4g32"
    found, held = logical_of(made, "int4g32")
    fours = [logical for logical in found if isinstance(logical, Groups4)]
    assert len(fours) == 4 * sample.LLAMA["num_hidden_layers"]  # type: ignore[operator]
    qkv = torch.cat([plain[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    linear = held.layers[0].qkv
    assert isinstance(linear, weights.Ordered) == (method == "gptq")
    want = qkv[:, linear.order] if isinstance(linear, weights.Ordered) else qkv
    assert any(torch.equal(four.dequantise(), want) for four in fours[:4])
    assert held.layers[0].attention_gain is not None
    assert torch.allclose(held.layers[0].attention_gain, TENSORS["model.layers.0.input_layernorm.weight"] * 8)


@pytest.mark.parametrize(("precision", "backend"), [("int4g32", "auto"), ("w4a8g32", "auto"), ("int4g32", "torch")])
def test_every_backend_computes_it_as_it_is(four_bit: tuple[str, Path, dict[str, torch.Tensor]], precision: str, backend: str) -> None:
    """The first token of the answer is that of fp32: its lead is far above what bf16 or int8 activations can turn."""
    _, made, _ = four_bit
    got, want = (tokens_of(made, max_tokens=2, **how) for how in ({"precision": precision, "backend": backend}, {}))
    assert got[0] == want[0]


@pytest.mark.parametrize(("kind", "precision"), [("int4", "int4g32"), ("fp8", "fp8")])
def test_compressed_tensors_are_taken_as_they_are(tmp_path: Path, kind: str, precision: str) -> None:
    config, packed, plain = sample.compressed(TENSORS, kind)
    made = sample.write(tmp_path, config, packed)
    assert schemes.own_precision(made) == precision
    assert tokens_of(made) == answer(Engine(models.find(str(made)), limits=LIMITS, state_dict=plain))
    found, _ = logical_of(made, precision)
    gate_up = torch.cat([plain[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert any(torch.equal(logical.dequantise(), gate_up) for logical in found if not isinstance(logical, Dense))
    assert checkpoint.planned_bytes(checkpoint.open_folder(made), precision) > 0
    assert tokens_of(made, precision=precision, max_tokens=2)[0] == tokens_of(made, max_tokens=2)[0]


def test_an_order_of_inputs_counts_whatever_the_config_says_of_it(tmp_path: Path) -> None:
    """Files with `desc_act: false` have been made with an order all the same; in the wrong groups every weight would be another."""
    packed, plain = sample.quantised(TENSORS, "gptq", group=32)
    config = sample.config_of("gptq", 32)
    config["quantization_config"] |= {"desc_act": False}
    made = sample.write(tmp_path, config, packed)
    assert tokens_of(made) == answer(Engine(models.find(str(made)), limits=LIMITS, state_dict=plain))


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels here")
def test_a_backend_that_cannot_compute_an_order_is_not_silently_another(tmp_path: Path) -> None:
    packed, _ = sample.quantised(TENSORS, "gptq", group=32)
    made = sample.write(tmp_path, sample.config_of("gptq", 32), packed)
    with pytest.raises(BadInput, match=r"native cannot compute .* in int4g32: .* order .*; use --backend torch"):
        tokens_of(made, precision="int4g32", backend="native")


def test_nothing_is_rounded_twice(four_bit: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    with pytest.raises(BadInput, match=r"is stored as int4g32; rounding it again to int8 would add errors: take --precision int4g32, bf16"):
        tokens_of(four_bit[1], precision="int8")


def test_a_bias_that_the_config_does_not_know_is_refused_unless_it_is_zero(tmp_path: Path) -> None:
    packed, _ = sample.quantised(TENSORS, "gptq_v2", group=32)
    packed["model.layers.1.mlp.up_proj.bias"] = torch.ones(128)
    with pytest.raises(BadInput, match=r"without a place in this model: model\.layers\.1\.mlp\.up_proj\.bias$"):
        checkpoint.open_folder(sample.write(tmp_path, sample.config_of("gptq_v2", 32), packed))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"quant_method": "gptq", "bits": 8, "group_size": 128}, "GPTQ in 8 bit, format gptq"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}, "AWQ in 4 bit, version gemv"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quant_method 'bitsandbytes'"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "quant_method 'fp8'"),
    ],
)
def test_other_schemes_are_refused_by_name(copy: Callable[..., Path], keys: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=f"quantised as {said}, which is not read; AWQ"):
        checkpoint.open_folder(copy(config={"quantization_config": keys}))


def test_a_context_that_yarn_stretches_is_its_whole_length(copy: Callable[..., Path]) -> None:
    """Qwen's files keep the length of before: 256 here, stretched four times."""
    stretched = copy(config={"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}})
    decoder = spec.of_config(stretched)
    assert decoder.shape.max_context == 1024
    assert decoder.rope.amplitude == pytest.approx(1 + 0.1 * math.log(4))


# ---------------------------------------------------------------- broken ones


def test_missing_extra_and_misshapen_tensors_are_all_named(copy: Callable[..., Path]) -> None:
    broken = copy(
        **{
            "model.norm.weight": None,
            "model.layers.1.self_attn.q_proj.weight": torch.zeros(32, 64),
            "model.layers.0.mlp.down_proj.weight": TENSORS["model.layers.0.mlp.down_proj.weight"].int(),
            "model.layers.0.self_attn.q_proj.bias": torch.zeros(64),
        }
    )
    with pytest.raises(BadInput) as raised:
        checkpoint.open_folder(broken)
    said = str(raised.value)
    assert "missing: model.norm.weight;" in said
    assert "model.layers.1.self_attn.q_proj.weight is [32, 64], the config says [64, 64]" in said
    assert "model.layers.0.mlp.down_proj.weight is of type I32, not F32 or F16 or BF16" in said
    assert "without a place in this model: model.layers.0.self_attn.q_proj.bias" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object"),
        ({"text_config": 7}, "text_config is 7; it must be an object"),
        ({"quantization_config": [1]}, r"quantization_config is \[1\]; it must be an object"),
        ({"rope_parameters": {"full_attention": 7}}, "rope parameters 7; they must be an object"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 layers, and there are 2"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": "32"}}, "a group of '32' inputs"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": [1]}}, "compressed-tensors None None bit"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"a": 7}}}, "compressed-tensors None None bit"),
    ],
)
def test_a_config_that_is_none_is_told_in_one_line(copy: Callable[..., Path], config: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said) as raised:
        checkpoint.open_folder(copy(config=config))
    assert "\n" not in str(raised.value)


def test_windows_that_begin_beyond_the_last_layer_are_none(copy: Callable[..., Path]) -> None:
    """Qwen 2.5's smaller files have been made from those of more layers."""
    sizes = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 28}
    assert spec.of_config(copy(config=sizes)).windows == ()


def test_many_missing_tensors_are_counted(copy: Callable[..., Path]) -> None:
    with pytest.raises(BadInput, match=r"missing: model\.layers\.2\.\S+, model\.layers\.2\.\S+, model\.layers\.2\.\S+ and 6 more$"):
        checkpoint.open_folder(copy(config={"num_hidden_layers": 3}))


def test_a_file_that_ends_too_early_is_named(copy: Callable[..., Path]) -> None:
    broken = copy(shards=2)
    file = broken / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match=r"model-00002-of-00002\.safetensors: not a whole safetensors file \(.*\); download it again"):
        checkpoint.open_folder(broken)


def test_an_empty_file_is_named(copy: Callable[..., Path]) -> None:
    broken = copy()
    (broken / "model.safetensors").write_bytes(b"")
    with pytest.raises(BadInput, match=r"model\.safetensors: not a whole safetensors file"):
        checkpoint.open_folder(broken)


def test_a_shard_that_is_not_there_is_named(copy: Callable[..., Path]) -> None:
    broken = copy(shards=3)
    (broken / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(BadInput, match=r"1 of its 3 files are not there: model-00003-of-00003\.safetensors; download them again"):
        checkpoint.open_folder(broken)


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', "no json"])
def test_an_index_that_is_none_is_named(copy: Callable[..., Path], index: str) -> None:
    broken = copy(shards=2)
    (broken / "model.safetensors.index.json").write_text(index)
    with pytest.raises(BadInput, match=r"model\.safetensors\.index\.json: (not the index of a checkpoint|0 of its 0 files)"):
        checkpoint.open_folder(broken)


def test_pickles_are_refused_with_the_reason(copy: Callable[..., Path]) -> None:
    broken = copy()
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin: pickled weights run code when they are read"):
        checkpoint.open_folder(broken)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"not a folder; a checkpoint is one with config\.json"):
        checkpoint.open_folder(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"config\.json: No such file"):
        checkpoint.open_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInput, match=r"config\.json: not JSON"):
        checkpoint.open_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sample.LLAMA))
    with pytest.raises(BadInput, match=r"no \*\.safetensors in it"):
        checkpoint.open_folder(tmp_path)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BadInput, match=r"model\.gguf: GGUF is llama\.cpp's format"):
        checkpoint.open_folder(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "gpt_neox"}, "is of model_type 'gpt_neox'"),
        (
            {
                "model_type": "deepseek_v3",
                "kv_lora_rank": 16,
                "q_lora_rank": 16,
                "qk_nope_head_dim": 8,
                "qk_rope_head_dim": 8,
                "v_head_dim": 8,
            },
            "MLA",
        ),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; the built-in engine computes silu"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "unknown .*rope_type 'longrope'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, "factor is '4'; rope_type yarn needs a positive number"),
    ],
)
def test_what_is_not_computed_is_refused(copy: Callable[..., Path], config: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput, match=said):
        spec.of_config(copy(config=config))


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4g32", "fp8"])
def test_bytes_are_known_before_anything_is_read(folder: Path, precision: str) -> None:
    """What is planned is what the formats hold, scales included, to the byte."""
    found, held = logical_of(folder, precision)
    vectors = sum(v.nbytes for layer in held.layers for v in layer.vectors()) + held.gain.nbytes
    opened = checkpoint.open_folder(folder)
    assert checkpoint.planned_bytes(opened, precision) == sum(m.nbytes for m in found) + held.embedding.nbytes + vectors
    assert weights.drawn_bytes(opened.decoder, precision) == checkpoint.planned_bytes(opened, precision)


def test_bytes_of_a_quantised_checkpoint_are_those_of_its_tensors(four_bit: tuple[str, Path, dict[str, torch.Tensor]]) -> None:
    found, held = logical_of(four_bit[1], "int4g32")
    opened = checkpoint.open_folder(four_bit[1])
    vectors = sum(v.nbytes for layer in held.layers for v in layer.vectors()) + held.gain.nbytes
    assert checkpoint.planned_bytes(opened, "int4g32") == sum(m.nbytes for m in found) + held.embedding.nbytes + vectors


def need(**changes: Any) -> memory.Need:
    return dataclasses.replace(
        memory.Need(name="big", precision="bf16", weights_bytes=100_000_000_000, token_bytes=1_000_000, tokens=20_000), **changes
    )


def test_what_does_not_fit_is_refused_with_the_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 119_000_000_000)
    with pytest.raises(BadInput, match=r"weights 100 GB \+ KV cache of 20,000 tokens x 1\.00 MB = 120 GB, and 119 GB of memory are free"):
        memory.refuse_misfit(need(), CPU)
    memory.refuse_misfit(need(tokens=19_000), CPU)
    with pytest.raises(BadInput, match=r"19,000 tokens x 1\.00 MB \+ as much for 5 preempted ones = 119 GB"):
        memory.refuse_misfit(need(tokens=19_000, host_tokens=5), CPU)


def test_a_gpu_and_its_host_are_looked_at_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    free = {"cpu": 10_000_000_000, "cuda": 121_000_000_000}
    monkeypatch.setattr(memory, "available_bytes", lambda device: free[device.type])
    gpu = torch.device("cuda:0")
    memory.refuse_misfit(need(host_tokens=10_000), gpu)
    with pytest.raises(BadInput, match=r"big: room for 10,001 preempted tokens is 10\.0 GB, and 10\.0 GB of host memory are free"):
        memory.refuse_misfit(need(host_tokens=10_001), gpu)
    with pytest.raises(BadInput, match=r"= 122 GB, and 121 GB on cuda:0 are free"):
        memory.refuse_misfit(need(tokens=22_000), gpu)
