"""Checkpoints with random weights, written as Hugging Face lays them out: a Llama, whole, in shards or quantised."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "float32",
}  # fmt: skip


def llama_tensors(
    config: Mapping[str, Any], *, dtype: torch.dtype = torch.float32, seed: int = 0, same_layers: bool = False
) -> dict[str, torch.Tensor]:
    """Return a Llama's state dict: norms between 0.5 and 1.5, logits of a spread that makes the first token stand out.

    same_layers: each layer is a copy of the first one, where only size matters.
    """
    H, F, D = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    generator = torch.Generator().manual_seed(seed)
    matrices = {"self_attn.q_proj": (q, H), "self_attn.k_proj": (kv, H), "self_attn.v_proj": (kv, H), "self_attn.o_proj": (H, q)}
    matrices |= {"mlp.gate_proj": (F, H), "mlp.up_proj": (F, H), "mlp.down_proj": (H, F)}
    sizes = {"model.embed_tokens": (config["vocab_size"], H), "model.norm": (H,)}
    for i in range(config["num_hidden_layers"]):
        sizes |= {f"model.layers.{i}.{name}": size for name, size in matrices.items()}
        sizes |= {f"model.layers.{i}.{name}": (H,) for name in ("input_layernorm", "post_attention_layernorm")}
    if not config["tie_word_embeddings"]:
        sizes["lm_head"] = (config["vocab_size"], H)

    def drawn(size: tuple[int, ...]) -> torch.Tensor:
        if len(size) == 1:
            return torch.empty(size).uniform_(0.5, 1.5, generator=generator).to(dtype)
        return torch.empty(size).normal_(0.0, 2 * size[1] ** -0.5, generator=generator).to(dtype)

    made: dict[str, torch.Tensor] = {}
    for name, size in sizes.items():
        first = re.sub(r"layers\.\d+\.", "layers.0.", name)
        made[name] = made[first].clone() if same_layers and first in made else drawn(size)
    return {f"{name}.weight": tensor for name, tensor in made.items()}


def write(folder: Path, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], *, shards: int = 1) -> Path:
    """Write config.json and the tensors, in so many files with an index; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {tensor: names[i % shards] for i, tensor in enumerate(tensors)}
    for name in names:
        save_file({t: tensors[t] for t, file in where.items() if file == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def tokenizer(folder: Path, vocab: int = 320) -> None:
    """Train a byte-level BPE on a few words and write its tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator(["how many replicas on which cards serve this traffic and at what cost " * 3], trainer)
    made.save(str(folder / "tokenizer.json"))


# ---------------------------------------------------------------- packing, word by word, as the formats' papers and programs define it


def words(nibbles: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Pack [..., 8 n] nibbles into int32 [..., n]: bits 4 i of a word are nibble order[i] of its eight."""
    eights = nibbles.to(torch.int64).reshape(*nibbles.shape[:-1], -1, 8)
    word = sum(eights[..., place] << (4 * i) for i, place in enumerate(order))
    assert isinstance(word, torch.Tensor)
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


State = dict[str, torch.Tensor]


def quantised(tensors: Mapping[str, torch.Tensor], method: str, *, group: int, seed: int = 0) -> tuple[State, State]:
    """Return a state dict whose layers' matrices are random 4-bit ones, and its plain twin.

    method: `awq`, `gptq` (the first version, in act-order) or `gptq_v2`.
    """
    generator = torch.Generator().manual_seed(seed)
    packed, plain = dict(tensors), dict(tensors)
    g_idx: dict[int, torch.Tensor] = {}  # one order for all that read the same inputs, as GPTQ has it
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        outputs, inputs = tensors[name].shape
        q = torch.randint(0, 16, (inputs, outputs), generator=generator)
        z = torch.randint(6, 11, (inputs // group, outputs), generator=generator)
        s = (torch.empty(inputs // group, outputs).uniform_(0.5, 1.5, generator=generator) * 0.4 * inputs**-0.5).half()
        groups = torch.arange(inputs) // group
        if method == "gptq":
            groups = g_idx.setdefault(inputs, groups[torch.randperm(inputs, generator=generator)])
        plain[name] = ((q - z[groups]) * s[groups].float()).t().contiguous()
        at = name.removesuffix(".weight")
        del packed[name]
        order = (0, 2, 4, 6, 1, 3, 5, 7)
        if method == "awq":
            packed |= {f"{at}.qweight": words(q, order), f"{at}.qzeros": words(z, order), f"{at}.scales": s}
        else:
            stored = z - 1 if method == "gptq" else z
            packed |= {f"{at}.qweight": words(q.t()).t().contiguous(), f"{at}.qzeros": words(stored), f"{at}.scales": s}
            packed |= {f"{at}.g_idx": groups.int(), f"{at}.bias": torch.zeros(outputs)}  # zero biases, as AutoGPTQ writes them
    return packed, plain


def config_of(method: str, group: int) -> dict[str, Any]:
    """Return the config.json of a quantised Llama."""
    if method == "awq":
        return LLAMA | {
            "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
        }
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group, "desc_act": method == "gptq", "checkpoint_format": method}
    return LLAMA | {"quantization_config": settings}


def compressed(tensors: Mapping[str, torch.Tensor], kind: str, *, group: int = 32, seed: int = 0) -> tuple[dict[str, Any], State, State]:
    """Return config.json, state dict and plain twin of a Llama as compressed-tensors writes it in `int4` or `fp8`."""
    generator = torch.Generator().manual_seed(seed)
    packed, plain = dict(tensors), dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        outputs, inputs = tensors[name].shape
        if kind == "fp8":
            scale = torch.empty(outputs, 1).uniform_(0.5, 1.5, generator=generator).bfloat16()
            packed[name] = tensors[name].to(torch.float8_e4m3fn)
            packed[f"{name}_scale"], plain[name] = scale, packed[name].float() * scale.float()
            continue
        q = torch.randint(-8, 8, (outputs, inputs), generator=generator)
        s = (torch.empty(outputs, inputs // group).uniform_(0.5, 1.5, generator=generator) * 0.4 * inputs**-0.5).half()
        del packed[name]
        packed |= {f"{name}_packed": words(q + 8), f"{name}_scale": s, f"{name}_shape": torch.tensor([outputs, inputs])}
        plain[name] = q * s.float().repeat_interleave(group, dim=1)
    kept = {"type": "float", "num_bits": 8, "strategy": "channel"} if kind == "fp8" else {"type": "int", "num_bits": 4, "strategy": "group"}
    settings = {
        "quant_method": "compressed-tensors", "format": "float-quantized" if kind == "fp8" else "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": kept | ({} if kind == "fp8" else {"group_size": group})}},
    }  # fmt: skip
    return LLAMA | {"quantization_config": settings}, packed, plain
