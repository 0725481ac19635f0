"""Every family of models against transformers, from a random checkpoint saved by transformers, through the paged cache.

The tolerance, 1e-4 on logits of a spread around 1 in fp32, is a hundred times the rounding of sums over three layers of 64 to 100 terms
and a thousandth of what any forgotten gain, bias, window, cap or scale would change.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlsys_bench import models
from mlsys_bench.batching import StepPlan
from mlsys_bench.engine import checkpoint, runner, spec
from mlsys_bench.engine.kv import KVCache
from mlsys_bench.engine.model import Model
from mlsys_bench.errors import BadInput

CPU = torch.device("cpu")
TOLERANCE = 1e-4
BLOCK_TOKENS, BLOCKS = 4, 40
TABLE = np.random.default_rng(5).permutation(BLOCKS).reshape(2, -1).astype(np.int32)  # two sequences, blocks anywhere in the pool
COMMON = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "initializer_range": 0.125,
    "pad_token_id": None, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", {}),
    "llama-3": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama, biases, linear rope": (
        "Llama",
        {"attention_bias": True, "mlp_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "llama, dynamic rope": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "qwen-2.5": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen-2.5, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen-2.5, windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen-3": ("Qwen3", {"head_dim": 24}),
    "mistral": ("Mistral", {"sliding_window": 7}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen-3 moe": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "mlp_only_layers": [1], "norm_topk_prob": False},
    ),
    "gemma-1": ("Gemma", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "gemma-2": ("Gemma2", {"tie_word_embeddings": True, "layer_types": SLIDING, "sliding_window": 6, "query_pre_attn_scalar": 20}),
    "gemma-3": ("Gemma3Text", {"tie_word_embeddings": True, "layer_types": SLIDING, "sliding_window": 6, "query_pre_attn_scalar": 20}),
}
CLASSES = {"Gemma3Text": "Gemma3ForCausalLM"}

Saved = tuple[Path, Any]  # the folder, and transformers' model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Saved]:
    """Return a maker of random checkpoints: every parameter random, norms and biases included."""
    made: dict[str, Saved] = {}
    transformers = importlib.import_module("transformers")

    def make(name: str) -> Saved:
        if name not in made:
            family, changes = FAMILIES[name]
            config = getattr(transformers, f"{family}Config")(**{**COMMON, **changes})
            config._attn_implementation = "eager"
            with torch.random.fork_rng():
                torch.manual_seed(11)
                model = getattr(transformers, CLASSES.get(family, f"{family}ForCausalLM"))(config).eval()
                for what, parameter in model.named_parameters():
                    if "norm" in what:
                        torch.nn.init.uniform_(parameter, 0.5, 1.5)
                    elif what.endswith("bias"):
                        torch.nn.init.normal_(parameter, 0, 0.5)
            folder = tmp_path_factory.mktemp("model")
            model.save_pretrained(folder)
            made[name] = (folder, model)
        return made[name]

    return make


def loaded(folder: Path, precision: str = "fp32") -> tuple[Model, KVCache]:
    opened = checkpoint.open_folder(folder)
    held = checkpoint.load(opened, precision=precision, device=CPU)
    model = Model(opened.decoder, held, precision=precision, max_context=64, device=CPU)
    return model, KVCache(opened.decoder.shape, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, dtype=model.dtype, device=CPU)


def step(model: Model, cache: KVCache, known: list[list[int]], work: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Compute (sequence, start, tokens) for each in `work`; return the logits of each one's last token, in that order."""
    rows, start, tokens = np.array(work, dtype=np.int32).T
    ordered = runner.order_of(StepPlan(rows, start, tokens, np.ones(len(work), dtype=bool), np.array([], dtype=np.int32)))
    logits = model.forward(runner.step_input(ordered, dict(enumerate(known)), TABLE, cache), cache)
    by_row = dict(zip(ordered.rows.tolist(), logits, strict=True))
    return [by_row[row] for row in rows.tolist()]


def text(seed: int, tokens: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, COMMON["vocab_size"], tokens)]  # type: ignore[call-overload]


def theirs(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_agrees_with_transformers(saved: Callable[[str], Saved], name: str) -> None:
    """Two prompts: whole, in chunks of uneven size, then token by token, one decoding while the other is in prefill."""
    folder, reference = saved(name)
    model, cache = loaded(folder)
    long, short = text(1, 40), text(2, 29)
    want = [theirs(reference, long), theirs(reference, short)]
    assert want[0].std() > 0.3, "logits of one size would agree whatever was computed"

    def agree(work: list[tuple[int, int, int]]) -> None:
        for (which, start, count), got in zip(work, step(model, cache, [long, short], work), strict=True):
            assert (got - want[which][start + count - 1]).abs().max() < TOLERANCE, f"{which} at {start} + {count}"

    agree([(0, 0, 37)])
    agree([(0, 0, 7)])
    agree([(0, 7, 9), (1, 0, 3)])
    agree([(0, 16, 1), (1, 3, 5)])
    agree([(1, 8, 6), (0, 17, 1)])
    for i in range(15):
        agree([(0, 18 + i, 1), (1, 14 + i, 1)])
