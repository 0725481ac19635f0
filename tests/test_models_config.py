"""Shapes from `config.json`: counted to the parameter against what transformers builds, refused in one line where they cannot be read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlsys_bench import models
from mlsys_bench.errors import BadInput, UnknownName
from mlsys_bench.models.config import native_precision

PLAIN = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96,
    "vocab_size": 512, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
MLA = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12, "num_key_value_heads": 4,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip
INDEX = {"index_topk": 8, "index_head_dim": 8, "index_n_heads": 4}
DELTA = {
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_num_value_heads": 4, "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
GLM4 = {key: value for key, value in MLA.items() if key.startswith(("n_", "num_e", "moe", "first", "topk"))}
FALCON = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
GPTJ = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 512, "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (model_type, keys of the config)
    "llama": ("llama", PLAIN),
    "llama with biases": ("llama", {**PLAIN, "attention_bias": True, "mlp_bias": True}),
    "llama with a tied head": ("llama", {**PLAIN, "tie_word_embeddings": True}),
    "mistral": ("mistral", PLAIN),
    "mixtral": ("mixtral", {**PLAIN, **FEW}),
    "qwen2": ("qwen2", PLAIN),
    "qwen3": ("qwen3", PLAIN),
    "qwen3 mixture": ("qwen3_moe", {**PLAIN, **MOE, "mlp_only_layers": [1]}),
    "gemma": ("gemma", PLAIN),
    "gemma 2": ("gemma2", {**PLAIN, "sliding_window": 64}),
    "gemma 3": ("gemma3_text", {**PLAIN, "num_hidden_layers": 7, "sliding_window": 64}),
    "deepseek v2": ("deepseek_v2", {**PLAIN, **MLA}),
    "deepseek v3": ("deepseek_v3", {**PLAIN, **MLA}),
    "deepseek without query rank": ("deepseek_v3", {**PLAIN, **MLA, "q_lora_rank": None}),
    "deepseek v3.2": ("deepseek_v32", {**PLAIN, **MLA, **INDEX}),
    "glm 5": ("glm_moe_dsa", {**PLAIN, **MLA, **INDEX}),
    "glm 4.5": ("glm4_moe", {**PLAIN, **GLM4, "attention_bias": True, "use_qk_norm": True}),
    "gpt-oss": ("gpt_oss", {**PLAIN, **FEW, "sliding_window": 32}),
    "minimax m2": ("minimax_m2", {**PLAIN, **FEW}),
    "llama 4": (
        "llama4_text",
        {**PLAIN, "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2,
         "attention_chunk_size": 64},
    ),
    "phi 3": ("phi3", PLAIN),
    "gpt-j": ("gptj", GPTJ),
    "falcon": ("falcon", FALCON),
    "falcon with groups": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "qwen3-next": ("qwen3_next", {**PLAIN, **DELTA, **MOE, "shared_expert_intermediate_size": 24}),
    "qwen3.5 mixture": ("qwen3_5_moe_text", {**PLAIN, **DELTA, **MOE, "shared_expert_intermediate_size": 24}),
    "qwen3.5": ("qwen3_5_text", {**PLAIN, **DELTA}),
}  # fmt: skip
BUILD = """
import json, logging, sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
import transformers
transformers.logging.set_verbosity_error()
counts = {}
for name, (kind, keys) in json.loads(Path(sys.argv[1]).read_text()).items():
    config = CONFIG_MAPPING[kind](**keys)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    counts[name] = sum({id(p): p.numel() for p in model.parameters()}.values())
    config.save_pretrained(Path(sys.argv[2]) / name)
(Path(sys.argv[2]) / "counts.json").write_text(json.dumps(counts))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the config of a tiny model of each family, as transformers writes it, and `counts.json` with its counts.

    In a process of its own: transformers and torch warn, and none of it is ours.
    """
    pytest.importorskip("transformers", reason="the counts are compared with those of transformers")
    pytest.importorskip("torch", reason="transformers builds its models with torch")
    folder = tmp_path_factory.mktemp("families")
    (folder / "families.json").write_text(json.dumps(FAMILIES))
    subprocess.run([sys.executable, "-c", BUILD, str(folder / "families.json"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_are_counted_exactly(built: Path, name: str) -> None:
    """To the parameter: norms, biases, sinks and convolutions too."""
    a = models.from_config(built / name)
    assert a.params == json.loads((built / "counts.json").read_text())[name]
    assert a.note == ""
    assert a.active_params <= a.params


@pytest.mark.parametrize(
    ("name", "windows", "states", "dense"),
    [("gemma 2", 2, 0, 0), ("gemma 3", 6, 0, 0), ("gpt-oss", 2, 0, 0), ("llama 4", 3, 0, 2), ("qwen3-next", 0, 3, 0),
     ("deepseek v3", 0, 0, 1)],
)  # fmt: skip
def test_layers_are_told_apart(built: Path, name: str, windows: int, states: int, dense: int) -> None:
    a = models.from_config(built / name)
    assert (a.window_layers, a.linear_layers, a.dense_layers) == (windows, states, dense)
    assert a.window_tokens == {"gemma 2": 64, "gemma 3": 64, "gpt-oss": 32, "llama 4": 64}.get(name, 0)


def write(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(keys))
    return path


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gemma-2-9b", {
            "model_type": "gemma2", "num_hidden_layers": 42, "hidden_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8,
            "head_dim": 256, "intermediate_size": 14336, "vocab_size": 256000, "sliding_window": 4096, "max_position_embeddings": 8192,
        }),
        ("gpt-oss-120b", {
            "model_type": "gpt_oss", "num_hidden_layers": 36, "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8,
            "head_dim": 64, "intermediate_size": 2880, "vocab_size": 201088, "num_local_experts": 128, "num_experts_per_tok": 4,
            "sliding_window": 128, "max_position_embeddings": 131072, "tie_word_embeddings": False,
            "quantization_config": {"quant_method": "mxfp4"},
        }),
        ("qwen3.5-397b-a17b", {"model_type": "qwen3_5_moe", "vision_config": {"hidden_size": 1152}, "text_config": {
            "model_type": "qwen3_5_moe_text", "num_hidden_layers": 60, "hidden_size": 4096, "num_attention_heads": 32,
            "num_key_value_heads": 2, "head_dim": 256, "vocab_size": 248320, "num_experts": 512, "num_experts_per_tok": 10,
            "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024, "full_attention_interval": 4,
            "linear_num_key_heads": 16, "linear_key_head_dim": 128, "linear_num_value_heads": 64, "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4, "max_position_embeddings": 262144,
        }}),
        ("deepseek-v3", {
            "model_type": "deepseek_v3", "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128,
            "intermediate_size": 18432, "vocab_size": 129280, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64, "v_head_dim": 128, "num_nextn_predict_layers": 1, "quantization_config": {"quant_method": "fp8"},
        }),
    ],
)  # fmt: skip
def test_a_config_gives_the_shape_of_its_catalogue_row(tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    read, row = models.from_config(write(tmp_path, **keys)), models.find(name)
    assert read.params == pytest.approx(row.params, rel=1e-4), "the catalogue leaves out some vectors"
    assert read.native_precision == row.native_precision
    for precision in ("bf16", "fp8", "fp4"):
        assert models.step_weight_bytes(read, precision, 8) == models.step_weight_bytes(row, precision, 8)
    for context in (100, 10_000):
        assert models.kv_bytes(read, "bf16", context) == models.kv_bytes(row, "bf16", context)
    assert models.attention_flops_per_pair(read, absorbed=True) == models.attention_flops_per_pair(row, absorbed=True)
    assert [part.name for part in models.parts(read)] == [part.name for part in models.parts(row)]


def test_a_family_nobody_knows_is_read_as_a_llama_and_says_so(tmp_path: Path) -> None:
    a = models.from_config(write(tmp_path, model_type="brandnew", **PLAIN))
    assert a.note == "model_type 'brandnew' is not known here: read as a Llama by its keys"
    assert a.params == models.from_config(write(tmp_path, model_type="llama", **PLAIN)).params
    latent = models.from_config(write(tmp_path, model_type="brandnew", **{**PLAIN, **MLA}))
    assert latent.note.endswith("read as a DeepSeek by its keys")
    assert latent.kv_lora_rank == 16


@pytest.mark.parametrize(
    ("kind", "keys", "says"),
    [
        ("nemotron_h", {"hybrid_override_pattern": "M-M*", "ssm_state_size": 128, "n_routed_experts": 8, "num_experts_per_tok": 2},
         r"'nemotron_h' is not known here, and no Llama by its hybrid_override_pattern, ssm_state_size; name a model of the catalogue"),
        ("kimi_linear", {**MLA, "linear_attn_config": {"kda_layers": [1, 2, 3]}}, r"by its linear_attn_config;"),
        ("lfm2", {"layer_types": ["conv", "conv", "full_attention", "conv"]}, r"by its layer_types \(conv\);"),
        ("ernie4_5_moe", {"moe_num_experts": 64, "moe_k": 6}, r"by its moe_num_experts, moe_k;"),
        ("minimax", {**FEW, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}, r"the linear layers of model_type 'minimax'"),
    ],
)  # fmt: skip
def test_layers_that_are_not_known_are_refused(tmp_path: Path, kind: str, keys: dict[str, Any], says: str) -> None:
    """Nemotron 3 Nano has attention in 6 of 52 layers: as a Llama it would have nine times the cache, and twice the experts."""
    with pytest.raises(BadInput, match=says):
        models.from_config(write(tmp_path, model_type=kind, **{**PLAIN, **keys}))


def test_what_a_dense_model_says_of_experts_it_has_not_is_no_reason_to_refuse_it(tmp_path: Path) -> None:
    keys = {**PLAIN, "num_experts": None, "num_experts_per_tok": None, "moe_layer_freq": 1, "use_moe": False}
    assert models.from_config(write(tmp_path, model_type="brandnew", **keys)).note.endswith("read as a Llama by its keys")


def test_a_fine_tune_is_not_its_base(tmp_path: Path) -> None:
    """`_name_or_path` is what it was made of: a manifest would start that."""
    a = models.from_config(write(tmp_path, model_type="llama", **PLAIN, _name_or_path="meta-llama/Llama-3.1-8B"))
    assert (a.hf_id or a.id) == str(tmp_path)


def test_windows_begin_where_qwen_says(tmp_path: Path) -> None:
    """`max_window_layers` counts the layers without one."""
    keys = {**PLAIN, "sliding_window": 256, "use_sliding_window": True}
    some = models.from_config(write(tmp_path, model_type="qwen2", **{**keys, "max_window_layers": 3}))
    assert (some.full_layers, some.window_layers) == (3, 1)
    assert models.from_config(write(tmp_path, model_type="qwen2", **{**keys, "max_window_layers": 28})).window_layers == 0


def test_a_windowed_mistral_keeps_its_window(tmp_path: Path) -> None:
    a = models.from_config(write(tmp_path, model_type="mistral", **{**PLAIN, "sliding_window": 256}))
    assert (a.full_layers, a.window_layers, a.window_tokens) == (0, 4, 256)
    wide = models.from_config(write(tmp_path, model_type="mistral", **{**PLAIN, "sliding_window": 1024}))
    assert wide.window_layers == 0, "a window as long as the context is none"
    off = models.from_config(write(tmp_path, model_type="qwen2", **{**PLAIN, "sliding_window": 256, "use_sliding_window": False}))
    assert off.window_layers == 0


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"hidden_size": None}, r"config\.json: no hidden_size or n_embd or d_model; a model's shape needs it"),
        ({"num_attention_heads": 0}, r"num_attention_heads is 0; a model has at least 1"),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers is 2\.5; it must be a whole number"),
        ({"vocab_size": "many"}, r"vocab_size is 'many'; it must be a whole number"),
        ({"num_experts": 8}, r"no num_experts_per_tok"),
    ],
)
def test_a_config_that_cannot_be_read_names_key_and_file(tmp_path: Path, keys: dict[str, Any], says: str) -> None:
    path = write(tmp_path, model_type="llama", **{**PLAIN, **keys})
    with pytest.raises(BadInput, match=says) as raised:
        models.from_config(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("text", "says"), [("{", "not JSON"), ("[1]", "holds one object, this holds a list")])
def test_a_file_that_is_no_config_says_so(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(BadInput, match=says):
        models.find(str(path))


def test_a_path_is_a_file_a_folder_a_checkpoint_and_anything_else_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, model_type="llama", **PLAIN)
    other = tmp_path / "other.json"
    other.write_text(path.read_text())
    assert models.find(str(path)) == models.find(str(tmp_path)), "a config and the folder it lies in are one model"
    assert models.find(str(tmp_path)).id == str(tmp_path)
    assert models.find(models.find(str(other)).id).id == str(other), "its id finds it again"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert models.find("nano").source.startswith("mlsys"), "a folder without a config does not hide a name"
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"empty/config\.json: No such file"):
        models.find("empty")
    with pytest.raises(BadInput, match=r"missing\.json: No such file"):
        models.find("missing.json")
    with pytest.raises(UnknownName):
        models.find("llama-3.1-9b-of-nobody")


@pytest.mark.parametrize(
    ("quantization", "dtype", "precision"),
    [
        (None, "bfloat16", "bf16"),
        (None, "float16", "fp16"),
        (None, "float32", "fp32"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "bfloat16", "fp8"),
        ({"quant_method": "mxfp4"}, "bfloat16", "fp4"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "bfloat16", "fp4"),
        ({"quant_method": "gptq", "bits": 4}, "float16", "int4"),
        ({"quant_method": "awq", "bits": 4}, "float16", "int4"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}, None, "fp8"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}}}, None, "int4"),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "int"}}}}, None, "int8"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, "bfloat16", "int4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "float16", "int8"),
    ],
)
def test_the_precision_a_checkpoint_is_stored_in(quantization: dict[str, Any] | None, dtype: str | None, precision: str) -> None:
    assert native_precision({"quantization_config": quantization, "torch_dtype": dtype}) == precision


def mlsys(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "mlsys_cli", *map(str, args)], capture_output=True, text=True, check=False)


def test_a_config_can_be_planned_for_from_the_command_line(tmp_path: Path) -> None:
    """A checkpoint's folder goes wherever a name does; what had to be guessed about it is said in the plan's notes."""
    write(tmp_path, model_type="brandnew", **{**PLAIN, "hidden_size": 512, "head_dim": 128, "intermediate_size": 2048})
    plan = mlsys("plan", "--qps", 5, "--model", tmp_path, "--gpu", "h100", "--slo", "ttft_p95<1s", "--json")
    assert plan.returncode == 0, plan.stderr
    record = json.loads(plan.stdout)
    assert any("read as a Llama" in note for note in record["notes"])
    listed = mlsys("catalog", "models", "--model", tmp_path / "config.json", "--json")
    (row,) = json.loads(listed.stdout)["rows"]
    assert row["id"] == str(tmp_path)
    assert row["params"] == models.from_config(tmp_path).params


def test_a_config_that_is_not_there_ends_with_bad_input(tmp_path: Path) -> None:
    done = mlsys("plan", "--qps", 5, "--model", tmp_path / "nothing.json", "--gpu", "h100")
    assert done.returncode == 2
    assert "nothing.json: No such file" in done.stderr
