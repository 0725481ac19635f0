"""Every family of models against transformers, from a random checkpoint saved by transformers, through the paged cache.

The tolerance, 1e-4 on logits of a spread around 1 in fp32, is a hundred times the rounding of sums over three layers of 64 to 100 terms
and a thousandth of what any forgotten gain, bias, window, cap or scale would change.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mlsys_bench.batching import StepPlan
from mlsys_bench.engine import checkpoint, runner, spec
from mlsys_bench.engine import encoder as encoders
from mlsys_bench.engine.encoder import Encoder
from mlsys_bench.engine.kv import Blocks, KVCache
from mlsys_bench.engine.model import Model
from mlsys_bench.engine.native import library, linears
from mlsys_bench.engine.native import model as native
from mlsys_bench.engine.rope import Rope
from mlsys_bench.errors import BadInput

CPU = torch.device("cpu")
TOLERANCE = 1e-4
BLOCK_TOKENS, BLOCKS = 4, 40
TABLE = np.random.default_rng(5).permutation(BLOCKS).reshape(2, -1).astype(np.int32)  # two sequences, blocks anywhere in the pool
COMMON: dict[str, Any] = {
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


def step(model: Model | native.NativeModel, cache: Any, known: list[list[int]], work: list[tuple[int, int, int]]) -> list[torch.Tensor]:
    """Compute (sequence, start, tokens) for each in `work`; return the logits of each one's last token, in that order."""
    rows, start, tokens = np.array(work, dtype=np.int32).T
    ordered = runner.order_of(StepPlan(rows, start, tokens, np.ones(len(work), dtype=bool), np.array([], dtype=np.int32)))
    logits = model.forward(runner.step_input(ordered, dict(enumerate(known)), TABLE, cache), cache)
    by_row = dict(zip(ordered.rows.tolist(), logits, strict=True))
    return [by_row[row] for row in rows.tolist()]


def text(seed: int, tokens: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(0, COMMON["vocab_size"], tokens)]


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


def test_a_decoder_inside_a_model_with_pictures_is_the_same(saved: Callable[[str], Saved], tmp_path: Path) -> None:
    """Gemma 3 as it is published from 4 B on: a text_config, tensors under language_model, a tower of vision that is left alone."""
    folder, _ = saved("gemma-3")
    config = json.loads((folder / "config.json").read_text())
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    whole = {"model_type": "gemma3", "text_config": config, "vision_config": {"hidden_size": 8}}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file(tensors | {"vision_tower.embeddings.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    tokens = text(3, 20)
    inner, plain = (step(*loaded(where), [tokens], [(0, 0, 20)])[0] for where in (tmp_path, folder))
    assert torch.equal(inner, plain)


def test_gemma_3_is_read_from_the_few_keys_that_it_is_published_with(tmp_path: Path) -> None:
    """Its config.json of 4 B leaves heads, vocabulary and context to the defaults of its family."""
    own = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
    keys = {
        "model_type": "gemma3",
        "text_config": own | {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(keys))
    theirs = importlib.import_module("transformers").AutoConfig.from_pretrained(tmp_path).text_config
    ours = spec.of_config(tmp_path)
    a = ours.shape
    assert (a.heads, a.kv_heads, a.head_dim) == (theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim)
    assert (a.vocab, a.max_context) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert ours.windows == tuple(1024 if kind == "sliding_attention" else 0 for kind in theirs.layer_types)
    assert (ours.scale, ours.norm_eps) == (theirs.query_pre_attn_scalar**-0.5, theirs.rms_norm_eps)
    assert (ours.rope.factor, ours.rope.theta) == (8.0, theirs.rope_parameters["full_attention"]["rope_theta"])
    assert a.params == pytest.approx(3.88e9, rel=1e-3)  # as published, without the tower of vision


def test_the_kernels_in_c_agree_with_transformers(saved: Callable[[str], Saved]) -> None:
    """Every family that they compute, from the same folders: the same prompt in two chunks, then token by token."""
    if library.load() is None:
        pytest.skip(f"no compiled kernels here: {library.why_not()}")
    computed = []
    tokens = text(1, 40)
    for name in FAMILIES:
        folder, reference = saved(name)
        opened = checkpoint.open_folder(folder)
        if native.misfit(opened.decoder) is not None:
            continue
        held = checkpoint.load(opened, precision="fp32", device=CPU, pack=lambda logical: linears.pack(logical, "fp32"))
        model = native.NativeModel(opened.decoder, held, max_context=64, threads=1)
        cache = Blocks(opened.decoder.shape, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, dtype=torch.float32, device=CPU)
        want = theirs(reference, tokens)
        for start, count in ((0, 9), (9, 22), *((i, 1) for i in range(31, 40))):
            (got,) = step(model, cache, [tokens], [(0, start, count)])
            assert (got - want[start + count - 1]).abs().max() < TOLERANCE, f"{name}: {start} + {count}"
        computed.append(name)
    assert len(computed) >= 8, f"only {computed}"


# ---------------------------------------------------------------- what each difference is worth

DIFFERENCES: list[tuple[str, dict[str, Any]]] = [
    ("llama-3", {"rope": Rope(dim=16, theta=500.0)}),
    ("llama, biases, linear rope", {"rope": Rope(dim=16)}),
    ("qwen-2.5, yarn", {"rope": Rope(dim=16, theta=1000.0)}),
    ("qwen-2.5, windows", {"windows": ()}),
    ("mistral", {"windows": (8, 8, 8)}),
    ("qwen-3 moe", {"norm_topk": True}),
    ("gemma-1", {"activation": "silu"}),
    ("gemma-1", {"embedding_scale": 1.0}),
    ("gemma-2", {"windows": (0, 6, 0)}),
    ("gemma-2", {"attention_softcap": 0.0}),
    ("gemma-2", {"logit_softcap": 0.0}),
    ("gemma-2", {"attention_scale": 0.0}),
    ("gemma-3", {"local_rope": None}),
    ("gemma-3", {"norm_eps": 1e-3}),
]


@pytest.mark.parametrize(("name", "changes"), DIFFERENCES)
def test_the_comparison_sees_every_difference(saved: Callable[[str], Saved], name: str, changes: dict[str, Any]) -> None:
    """Computed without it, logits are off by ten tolerances and more: the agreement above is not one of things too small to see."""
    folder, reference = saved(name)
    opened = checkpoint.open_folder(folder)
    decoder = dataclasses.replace(opened.decoder, **changes)
    model = Model(decoder, checkpoint.load(opened, precision="fp32", device=CPU), precision="fp32", max_context=64, device=CPU)
    cache = KVCache(decoder.shape, blocks=BLOCKS, block_tokens=BLOCK_TOKENS, dtype=torch.float32, device=CPU)
    tokens = text(1, 40)
    (got,) = step(model, cache, [tokens], [(0, 0, 40)])
    assert (got - theirs(reference, tokens)[-1]).abs().max() > 10 * TOLERANCE


# ---------------------------------------------------------------- encoders

ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66},
    "XLMRoberta": {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 66, "hidden_act": "gelu_new"},
}
ENCODER = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.125,
}  # fmt: skip


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    transformers = importlib.import_module("transformers")
    with torch.random.fork_rng():
        torch.manual_seed(12)
        config = getattr(transformers, f"{request.param}Config")(**{**ENCODER, **ENCODERS[request.param]})
        model = getattr(transformers, f"{request.param}Model")(config).eval()
        for name, parameter in model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, 0.0, 0.1)
    folder = tmp_path_factory.mktemp("encoder")
    model.save_pretrained(folder)
    return folder, model


def test_an_encoder_agrees_with_transformers(encoder: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token by token and pooled, for texts of 1 to 64 tokens in no order, in one batch, in several, and each alone."""
    folder, reference = encoder
    texts = [[max(t, 2) for t in text(seed, n)] for seed, n in enumerate((5, 64, 1, 33, 5, 6, 60, 2, 34))]
    with torch.no_grad():
        hidden = [reference(torch.tensor([tokens])).last_hidden_state[0] for tokens in texts]
    assert torch.stack([h[0] for h in hidden]).std(0).mean() > 0.1, "texts must differ in what becomes of them"
    ours = Encoder(folder)
    wanted: dict[encoders.Pooling, torch.Tensor] = {"mean": torch.stack([h.mean(0) for h in hidden])}
    for way, want in (wanted | {"cls": torch.stack([h[0] for h in hidden])}).items():
        assert (ours.embed(texts, pooling=way, normalise=False) - want).abs().max() < TOLERANCE
        unit = torch.nn.functional.normalize(want, dim=1)
        assert (ours.embed(texts, pooling=way) - unit).abs().max() < TOLERANCE
        for i in (1, 2, 7):
            assert (ours.embed([texts[i]], pooling=way) - unit[i]).abs().max() < TOLERANCE
    monkeypatch.setattr(encoders, "STEP_TOKENS", 40)
    assert (ours.embed(texts) - torch.nn.functional.normalize(torch.stack([h.mean(0) for h in hidden]), dim=1)).abs().max() < TOLERANCE
    pairs = sorted(zip(texts, hidden, strict=True), key=lambda pair: len(pair[0]))
    assert (ours.forward([tokens for tokens, _ in pairs]) - torch.cat([h for _, h in pairs])).abs().max() < TOLERANCE


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("int8", 0.03)])
def test_an_encoder_in_other_precisions_stays_near(encoder: Saved, precision: str, tolerance: float) -> None:
    """Vectors of length 1: about 0.5 % per matrix (see the tests of quant) adds up over 8 matrices."""
    texts = [[max(t, 2) for t in text(seed, 10 + seed)] for seed in range(5)]
    assert (Encoder(encoder[0], precision=precision).embed(texts) - Encoder(encoder[0]).embed(texts)).norm(dim=1).max() < tolerance


def test_an_encoder_pools_as_its_folder_says(encoder: Saved, tmp_path: Path) -> None:
    folder = shutil.copytree(encoder[0], tmp_path / "cls")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}')
    texts = [text(0, 9)]
    assert torch.equal(Encoder(folder).embed(texts), Encoder(encoder[0]).embed(texts, pooling="cls"))


@pytest.mark.parametrize(
    ("pooling", "modules", "says"),
    [
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, [], "max_tokens: only the mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, [], "lasttoken: only the mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, [], "mean_tokens and cls_token: only"),
        ({"pooling_mode": "weightedmean"}, [], "weightedmean: only"),
        ({"pooling_mode": ["cls", "max"]}, [], "cls and max: only"),
        ({"pooling_mode": 7}, [], "7: only"),
        ({"pooling_mode_mean_tokens": True}, ["Transformer", "Pooling", "Dense"], "go through Dense"),
    ],
)
def test_vectors_that_would_be_others_are_refused(
    encoder: Saved, tmp_path: Path, pooling: dict[str, Any], modules: list[str], says: str
) -> None:
    folder = shutil.copytree(encoder[0], tmp_path / "other")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 64, **pooling}))
    (folder / "modules.json").write_text(
        json.dumps([{"idx": i, "type": f"sentence_transformers.models.{m}"} for i, m in enumerate(modules)])
    )
    with pytest.raises(BadInput, match=says):
        Encoder(folder)


def test_an_encoder_s_norms_may_have_their_first_names(encoder: Saved, tmp_path: Path) -> None:
    """As gamma and beta: bert-base-uncased has them so to this day."""
    folder = shutil.copytree(encoder[0], tmp_path / "first")
    tensors = load_file(folder / "model.safetensors")
    first = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in tensors.items()
    }
    save_file({f"bert.{name}": tensor for name, tensor in first.items()}, folder / "model.safetensors")
    assert torch.equal(Encoder(folder).embed([text(0, 9)]), Encoder(encoder[0]).embed([text(0, 9)]))


def test_what_is_no_encoder_is_refused(saved: Callable[[str], Saved], encoder: Saved) -> None:
    with pytest.raises(BadInput, match="model_type 'llama' is no encoder that is computed here"):
        Encoder(saved("llama-2")[0])
    ours = Encoder(encoder[0])
    for wrong, said in (([], "0 tokens"), ([3] * 65, "65 tokens; this encoder takes 1 to 64"), ([128], "outside the vocabulary of 128")):
        with pytest.raises(BadInput, match=f"text 1 has .*{said}"):
            ours.embed([[5], wrong])
