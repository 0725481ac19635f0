"""A checkpoint of TinyLlama's shape with random weights, as Hugging Face keeps it: written once, for `proofs/engine.py`."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
SHARD_LAYERS = 8


def folder() -> Path:
    """Return the folder (2.2 GB in three files), kept among the temporary ones."""
    path = Path(tempfile.gettempdir()) / f"mlsys-proof-checkpoint-{os.getuid()}"
    if not (path / "config.json").exists():
        print(f"writing {path}, once", flush=True)
        path.mkdir(exist_ok=True)
        _write(path)
        (path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")  # last: a folder without it is not finished
    return path


def _write(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    hidden, narrow, inner, vocab = 2048, 256, 5632, 32000
    torch.manual_seed(1)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0.0, columns**-0.5)

    layers = range(int(str(CONFIG["num_hidden_layers"])))
    place: dict[str, str] = {}

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path / name, metadata={"format": "pt"})
        place.update(dict.fromkeys(tensors, name))

    for begin in range(0, len(layers), SHARD_LAYERS):
        tensors = {}
        for i in layers[begin : begin + SHARD_LAYERS]:
            at = f"model.layers.{i}"
            for part, rows, columns in (
                ("self_attn.q", hidden, hidden), ("self_attn.k", narrow, hidden), ("self_attn.v", narrow, hidden),
                ("self_attn.o", hidden, hidden), ("mlp.gate", inner, hidden), ("mlp.up", inner, hidden), ("mlp.down", hidden, inner),
            ):  # fmt: skip
                tensors[f"{at}.{part}_proj.weight"] = drawn(rows, columns)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{at}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        save(f"layers-{begin}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": drawn(vocab, hidden), "lm_head.weight": drawn(vocab, hidden)}
    save("ends.safetensors", {**ends, "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)})
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}), encoding="utf-8")


if __name__ == "__main__":
    folder()
