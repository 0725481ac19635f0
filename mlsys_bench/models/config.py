"""A model's shape from its Hugging Face `config.json`, so that any checkpoint can be planned for.

Families differ in how they name things and in what they leave to defaults: what is common is read once, what is a family's own by its
function in `_FAMILIES`.  The counts agree to the parameter with what `transformers` builds from the same file
(tests/test_models_config.py).  A `model_type` that is not known is read as a Llama, and the architecture's `note` says so.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlsys_bench.errors import BadInput
from mlsys_bench.models.architecture import Architecture
from mlsys_bench.models.cost import counted

_ALIASES = {  # what we ask for, and what else it is called
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "hidden_size": ("n_embd", "d_model"),
    "num_attention_heads": ("n_head", "n_heads"),
    "num_key_value_heads": ("num_kv_heads", "multi_query_group_num"),
    "intermediate_size": ("ffn_hidden_size", "n_inner"),
    "max_position_embeddings": ("n_positions", "max_seq_len", "seq_length"),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_token", "moe_topk"),
}
_GEMMA3 = {  # what Gemma 3's files leave out where it is the family's default: those of 4 B give but four keys of their own
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 131_072,
}  # fmt: skip
_WINDOWS = ("sliding_attention", "chunked_attention")
_TIED = ("gemma", "gemma2", "gemma3", "gemma3_text", "falcon", "cohere", "cohere2", "gpt2")  # tied unless their file says otherwise


@dataclass(frozen=True, slots=True)
class _File:
    """The keys of one config, `text_config` laid over the rest, and where they came from."""

    keys: Mapping[str, Any]
    path: Path

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key or of any of its other names; `default` where all are missing or null."""
        found = (self.keys[name] for name in (key, *_ALIASES.get(key, ())) if self.keys.get(name) is not None)
        return next(found, default)

    def whole(self, key: str, default: int | None = None) -> int:
        """Return a whole number of at least 0, or raise BadInput that names the key and the file."""
        value = self.get(key, default)
        if value is None:
            known = " or ".join((key, *_ALIASES.get(key, ())))
            raise BadInput(f"{self.path}: no {known}; a model's shape needs it: is this the config.json of a text model?")
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 0:
            raise BadInput(f"{self.path}: {key} is {value!r}; it must be a whole number")
        return int(value)

    @property
    def family(self) -> str:
        """The `model_type`."""
        return str(self.keys.get("model_type") or "")


def from_config(path: str | Path) -> Architecture:
    """Return the shape that a `config.json`, or the folder it lies in, describes.  Raises BadInput that names the file and the key."""
    where = Path(path)
    file = _read(where / "config.json" if where.is_dir() else where)
    shape = _common(file) | _attention_layers(file) | _mixture(file)
    shape |= _FAMILIES.get(file.family, _unknown)(file, shape)
    if shape["linear_layers"] and not shape.get("linear_in"):
        raise BadInput(f"{file.path}: what the linear layers of model_type {file.family!r} keep and read is not known here; {_INSTEAD}")
    for name, value in shape.items():
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value < 1
            and name in ("layers", "hidden", "heads", "vocab", "head_dim")
        ):
            raise BadInput(f"{file.path}: {name} is {value}; a model has at least 1")
    return counted(Architecture(id=_id(where), **shape))


def layer_kinds(path: str | Path) -> list[str]:
    """Return what each layer attends to, as `layer_types` names it: full_attention, sliding_attention …  Raises BadInput."""
    where = Path(path)
    file = _read(where / "config.json" if where.is_dir() else where)
    return [str(kind) for kind in file.get("layer_types") or _layer_types(file, file.whole("num_hidden_layers"))]


def _id(path: Path) -> str:
    """Return what the shape is called from now on, and found by again: its folder, or its file where that has another name."""
    return str(path.parent) if path.name == "config.json" and path.parent.name else str(path)


def _read(path: Path) -> _File:
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}; --model takes a name, a config.json or the folder it lies in") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON: {error}") from error
    if not isinstance(keys, dict):
        raise BadInput(f"{path}: a config.json holds one object, this holds a {type(keys).__name__}")
    for name in ("text_config", "rope_scaling", "rope_parameters", "quantization_config"):
        if not isinstance(keys.get(name) or {}, dict):
            raise BadInput(f"{path}: {name} is {keys[name]!r}; it must be an object")
    text = keys.get("text_config")
    given = {**keys, **text} if isinstance(text, dict) else keys
    left_out = _GEMMA3 if given.get("model_type") in ("gemma3", "gemma3_text") else {}
    return _File({**left_out, **given}, path)


# ---------------------------------------------------------------- what all families have


def _common(file: _File) -> dict[str, Any]:
    hidden, heads = file.whole("hidden_size"), file.whole("num_attention_heads")
    if heads < 1:
        raise BadInput(f"{file.path}: num_attention_heads is {heads}; a model has at least 1")
    return {
        "hf_id": "",  # `_name_or_path` names what a checkpoint was made of, such as the base of a fine-tune
        "family": file.family,
        "layers": file.whole("num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": file.whole("num_key_value_heads", heads),
        "head_dim": file.whole("head_dim", hidden // heads),
        "vocab": file.whole("vocab_size"),
        "max_context": _context(file) or None,
        "tied_embeddings": bool(file.get("tie_word_embeddings", file.family in _TIED)),
        "attention": "gqa",
        "native_precision": native_precision(file.keys),
        "mtp_layers": file.whole("num_nextn_predict_layers", file.whole("mtp_num_hidden_layers", 0)),
        "params": 0.0,
        "active_params": 0.0,
        "source": f"{file.path}",
        "date": "",
    }


def _context(file: _File) -> int:
    """Return how long a text may be: YaRN's files often give the length before it was stretched, and the factor."""
    own, rope = file.whole("max_position_embeddings", 0), file.get("rope_parameters") or file.get("rope_scaling") or {}
    trained, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
    if "yarn" in (rope.get("rope_type"), rope.get("type")) and isinstance(trained, int) and isinstance(factor, int | float):
        return max(own, int(trained * factor))
    return own


def _attention_layers(file: _File) -> dict[str, Any]:
    """Return how many layers have a window and how many a state, from `layer_types` or from what each family leaves to it."""
    layers = file.whole("num_hidden_layers")
    kinds = file.get("layer_types") or _layer_types(file, layers)
    window = file.get("attention_chunk_size") if "chunked_attention" in kinds else file.get("sliding_window")
    windowed = sum(kind in _WINDOWS for kind in kinds)
    bounded = bool(window) and int(window) < file.whole("max_position_embeddings", 0)  # a window as long as the context is none
    return {
        "window_layers": windowed if bounded else 0,
        "window_tokens": int(window) if bounded and windowed else 0,
        "linear_layers": sum(kind == "linear_attention" for kind in kinds),
    }


def _layer_types(file: _File, layers: int) -> list[str]:
    """Return the kinds of layers where the config does not list them."""
    every = file.whole(
        "full_attention_interval",
        file.whole("sliding_window_pattern", file.whole("_sliding_window_pattern", _INTERVALS.get(file.family, 0))),
    )
    if file.family in ("qwen3_next", "qwen3_5_text", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text"):
        return ["full_attention" if (i + 1) % every == 0 else "linear_attention" for i in range(layers)]
    if file.family.startswith("llama4"):
        rope = file.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]
        return ["chunked_attention" if r else "full_attention" for r in rope]
    if every:
        return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(layers)]
    if file.get("sliding_window") and file.get("use_sliding_window", file.family in ("mistral", "mixtral", "phi3")):
        full = min(file.whole("max_window_layers", 0), layers)  # Qwen's first layers, which attend to everything
        return ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    return ["full_attention"] * layers


_INTERVALS = {"gemma2": 2, "gemma3": 6, "gemma3_text": 6, "gpt_oss": 2, "llama4": 4, "llama4_text": 4, "qwen3_next": 4} | dict.fromkeys(
    ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), 4
)


def _mixture(file: _File) -> dict[str, Any]:
    """Return the MLP: a dense one, or experts with their width, shared experts, and the layers that have none."""
    experts = file.whole("num_experts", 0)
    if not experts:
        return {"experts": 0, "experts_per_token": 0, "ffn": file.whole("intermediate_size", _wide(file))}
    ffn = file.whole("moe_intermediate_size", file.whole("intermediate_size", 0))
    layers = file.whole("num_hidden_layers")
    dense = _dense_layers(file, layers)
    shared = file.whole("shared_expert_intermediate_size", file.whole("n_shared_experts", 0) * ffn)
    return {
        "experts": experts,
        "experts_per_token": file.whole("num_experts_per_tok"),
        "ffn": ffn,
        "shared_ffn": shared,
        "dense_layers": dense,
        "dense_ffn": file.whole("intermediate_size", ffn) if dense else 0,
    }


def _wide(file: _File) -> int | None:
    """Return the MLP's width of the families that leave it to four times the hidden size."""
    return 4 * file.whole("hidden_size") if file.family in ("gptj", "falcon", "gpt2", "gpt_neox") else None


def _dense_layers(file: _File, layers: int) -> int:
    if (listed := file.get("mlp_layer_types")) is not None:
        return sum(kind == "dense" for kind in listed)
    every, listed = file.whole("decoder_sparse_step", 1), set(file.get("mlp_only_layers") or ())
    first = file.whole("first_k_dense_replace", 0)
    return sum(i < first or i in listed or (i + 1) % max(every, 1) != 0 for i in range(layers))


def native_precision(keys: Mapping[str, Any]) -> str:
    """Return what the checkpoint's weights are stored in, by `quantization_config`, else by its dtype."""
    quantization = keys.get("quantization_config") or {}
    method = f"{quantization.get('quant_method', '')} {quantization.get('quant_algo', '')}".lower()
    groups = quantization.get("config_groups")
    every = [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []
    weights: Mapping[str, Any] = next((group.get("weights") or {} for group in every), {})
    bits, kind = weights.get("num_bits") or quantization.get("bits"), weights.get("type", "int")
    if "fp4" in method or (bits == 4 and kind == "float"):
        return "fp4"
    if "fp8" in method or (bits == 8 and kind == "float"):
        return "fp8"
    if bits in (4, 8):
        return f"int{bits}"
    if "bitsandbytes" in method and (loaded := [b for b in (4, 8) if quantization.get(f"load_in_{b}bit")]):
        return f"int{loaded[0]}"
    if "awq" in method or "gptq" in method:
        return "int4"
    return {"float16": "fp16", "float32": "fp32"}.get(str(keys.get("dtype") or keys.get("torch_dtype")), "bf16")


# ---------------------------------------------------------------- what is a family's own

Shape = dict[str, Any]


def _norms(shape: Shape, per_layer: int = 2) -> int:
    return int((per_layer * shape["layers"] + 1) * shape["hidden"])


def _qkv_width(shape: Shape) -> int:
    return int((shape["heads"] + 2 * shape["kv_heads"]) * shape["head_dim"])


def _llama(file: _File, shape: Shape) -> Shape:
    """Llama, Mistral, Mixtral, Phi-3 and what is read as one: two norms a layer, biases where the config asks for them."""
    L, H = shape["layers"], shape["hidden"]
    biases = L * (_qkv_width(shape) + H) if file.get("attention_bias", False) else 0
    biases += L * (2 * shape["ffn"] + H) if file.get("mlp_bias", False) and not shape["experts"] else 0
    return {"vector_params": _norms(shape) + biases}


def _qwen2(file: _File, shape: Shape) -> Shape:
    return {"vector_params": _norms(shape) + shape["layers"] * _qkv_width(shape)}


def _with_head_norms(file: _File, shape: Shape) -> Shape:
    """Qwen3: each head's query and key are normed."""
    return {"vector_params": _llama(file, shape)["vector_params"] + 2 * shape["head_dim"] * shape["layers"]}


def _gemma2(file: _File, shape: Shape) -> Shape:
    return {"vector_params": _norms(shape, 4), "head_dim": file.whole("head_dim", 256)}


def _gemma3(file: _File, shape: Shape) -> Shape:
    dim = file.whole("head_dim", 256)
    return {"vector_params": _norms(shape, 4) + 2 * dim * shape["layers"], "head_dim": dim}


def _deepseek(file: _File, shape: Shape) -> Shape:
    """Latent attention with norms on both ranks; sparse with an indexer where `index_topk` is given."""
    q, kv, topk = file.whole("q_lora_rank", 0), file.whole("kv_lora_rank"), file.whole("index_topk", 0)
    nope, rope = file.whole("qk_nope_head_dim"), file.whole("qk_rope_head_dim")
    index_dim = file.whole("index_head_dim", 0)
    vectors = _norms(shape) + shape["layers"] * (q + kv + (2 * index_dim if topk else 0))
    if file.get("attention_bias", False):
        vectors += shape["layers"] * (q + kv + rope + shape["hidden"])
    return {
        "q_lora_rank": q, "kv_lora_rank": kv, "qk_nope_head_dim": nope, "qk_rope_head_dim": rope, "v_head_dim": file.whole("v_head_dim"),
        "head_dim": nope + rope, "index_topk": topk, "index_heads": file.whole("index_n_heads", 0) if topk else 0,
        "index_head_dim": index_dim if topk else 0, "attention": "mla, sparse" if topk else "mla", "vector_params": vectors,
    }  # fmt: skip


def _glm4_moe(file: _File, shape: Shape) -> Shape:
    """GLM-4.5: biases on q, k, v only, head norms where the config asks for them."""
    vectors = _norms(shape) + (shape["layers"] * _qkv_width(shape) if file.get("attention_bias", False) else 0)
    return {"vector_params": vectors + (2 * shape["head_dim"] * shape["layers"] if file.get("use_qk_norm", False) else 0)}


def _gpt_oss(file: _File, shape: Shape) -> Shape:
    """Biases everywhere, experts and router too, and one attention sink a head."""
    L, H, E = shape["layers"], shape["hidden"], shape["experts"]
    attention = (_qkv_width(shape) + H if file.get("attention_bias", True) else 0) + shape["heads"]
    return {"vector_params": _norms(shape) + L * (attention + E * (2 * shape["ffn"] + H) + E)}


def _minimax_m2(file: _File, shape: Shape) -> Shape:
    """Query and key are normed over all heads at once."""
    return {"vector_params": _norms(shape) + shape["layers"] * (shape["heads"] + shape["kv_heads"]) * shape["head_dim"]}


def _llama4(file: _File, shape: Shape) -> Shape:
    """Llama 4 has a shared expert as wide as a routed one, and dense layers of their own width between the mixtures."""
    listed = file.get("moe_layers")
    step = file.whole("interleave_moe_layer_step", 1)
    moe = len(listed) if listed is not None else shape["layers"] // step
    dense = shape["layers"] - moe
    return {
        "vector_params": _norms(shape), "shared_ffn": shape["ffn"], "dense_layers": dense,
        "dense_ffn": file.whole("intermediate_size_mlp", 0) if dense else 0,
    }  # fmt: skip


def _linear(file: _File, shape: Shape) -> Shape:
    """Qwen3-Next and Qwen3.5: gated delta net in most layers, gated attention in the rest.

    A state is value heads x key width x value width in fp32, and the last inputs of the short convolution in 16 bit.
    """
    keys = file.whole("linear_num_key_heads") * file.whole("linear_key_head_dim")
    value_heads, value_dim = file.whole("linear_num_value_heads"), file.whole("linear_value_head_dim")
    values, kernel = value_heads * value_dim, file.whole("linear_conv_kernel_dim", 4)
    own = (2 * keys + values) * kernel + 2 * value_heads + value_dim
    full = shape["layers"] - shape["linear_layers"]
    moe = shape["layers"] - shape.get("dense_layers", 0) if shape["experts"] else 0
    return {
        "gated_attention": True,
        "linear_in": 2 * keys + 2 * values + 2 * value_heads,
        "linear_out": values,
        "linear_state_bytes": float(
            value_heads * file.whole("linear_key_head_dim") * value_dim * 4 + (2 * keys + values) * (kernel - 1) * 2
        ),
        "attention": "gqa, gated delta net in most layers",
        "vector_params": _norms(shape) + full * 2 * shape["head_dim"] + shape["linear_layers"] * own + moe * shape["hidden"],
    }


def _gptj(file: _File, shape: Shape) -> Shape:
    """One LayerNorm a layer, biases in MLP and head, no gate."""
    vectors = shape["layers"] * (2 * shape["hidden"] + shape["ffn"] + shape["hidden"]) + 2 * shape["hidden"] + shape["vocab"]
    return {"mlp_matrices": 2, "vector_params": vectors, "kv_heads": shape["heads"], "attention": "mha"}


def _falcon(file: _File, shape: Shape) -> Shape:
    """No gate; one or two LayerNorms a layer; one KV head in the first models, groups in the later ones."""
    new = bool(file.get("new_decoder_architecture", False))
    kv = shape["kv_heads"] if new else 1 if file.get("multi_query", True) else shape["heads"]
    norms = file.whole("num_ln_in_parallel_attn", 2) if new else 1 if file.get("parallel_attn", True) else 2
    sized = shape | {"kv_heads": kv}
    biases = shape["layers"] * (_qkv_width(sized) + 2 * shape["hidden"] + shape["ffn"]) if file.get("bias", False) else 0
    return {"mlp_matrices": 2, "kv_heads": kv, "vector_params": 2 * _norms(shape, norms) + biases}


def _unknown(file: _File, shape: Shape) -> Shape:
    """Read a family nobody told us about as a Llama, or as DeepSeek where the keys are those of latent attention.

    Raises BadInput where its keys tell of layers that are neither: as a Llama it would have twice the weights, or ten times the cache.
    """
    if strange := _strange(file, shape):
        said = f"model_type {file.family!r} is not known here, and no Llama by its {', '.join(strange)}"
        raise BadInput(f"{file.path}: {said}; {_INSTEAD}")
    read = _deepseek if file.get("kv_lora_rank") else _llama
    kind = f"model_type {file.family!r}" if file.family else "a config without model_type"
    return {**read(file, shape), "note": f"{kind} is not known here: read as a {'DeepSeek' if read is _deepseek else 'Llama'} by its keys"}


_INSTEAD = "name a model of the catalogue that is like it (`mlsys catalog models`)"
_MIXED = re.compile(r"mamba|ssm_|rwkv|linear_attn|^hybrid_|layers_block_type|attn_type_list|attn_layer_period|conv_L_cache")
_EXPERTS = re.compile(r"^moe_|expert")


def _strange(file: _File, shape: Shape) -> list[str]:
    """Return the keys that tell of layers with a state in place of a cache, or of experts that were not read."""
    kinds = {str(kind) for kind in file.get("layer_types") or ()} - {"full_attention", *_WINDOWS}
    keys = [key for key, value in file.keys.items() if value and _MIXED.search(key)]
    if not shape["experts"]:
        given = {key: value for key, value in file.keys.items() if isinstance(value, int | list) and value not in (0, 1, [])}
        keys += [key for key in given if _EXPERTS.search(key)]
    return [*keys[:3], *([f"layer_types ({', '.join(sorted(kinds))})"] if kinds else [])]


_FAMILIES: dict[str, Callable[[_File, Shape], Shape]] = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "phi3", "gemma", "ministral", "Yi"), _llama),
    **dict.fromkeys(("qwen2",), _qwen2),
    **dict.fromkeys(("qwen3", "qwen3_moe", "qwen3_vl_moe", "qwen3_vl_moe_text", "qwen3_vl_text"), _with_head_norms),
    "gemma2": _gemma2,
    **dict.fromkeys(("gemma3", "gemma3_text"), _gemma3),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2", "kimi_k25", "glm_moe_dsa", "glm4_moe_lite"), _deepseek),
    "glm4_moe": _glm4_moe,
    "gpt_oss": _gpt_oss,
    **dict.fromkeys(("minimax_m2", "minimax"), _minimax_m2),
    **dict.fromkeys(("llama4", "llama4_text"), _llama4),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"), _linear),
    "gptj": _gptj,
    "falcon": _falcon,
}
