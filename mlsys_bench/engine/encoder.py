"""BERT-type encoders: texts as tokens in, one vector each out.

Sequences are laid end to end, so that matrices see no padding; attention sees neighbours of about equal length together, padded to the
longest of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench.engine import checkpoint, formats, quant
from mlsys_bench.engine.checkpoint import Entry
from mlsys_bench.engine.groups import group_ends
from mlsys_bench.engine.quant import Linear
from mlsys_bench.errors import BadInput, unknown

FAMILIES = ("bert", "roberta", "xlm-roberta")
Pooling = Literal["mean", "cls"]
STEP_TOKENS = 4096  # computed together at most, but for a longer sequence: activations of more would only leave the caches
_WORTH_TOKENS = 64  # of padding cost as much as one more group of attention (see groups.py)
_GELUS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
_POOLINGS: dict[str, Pooling] = {"mean_tokens": "mean", "mean": "mean", "cls_token": "cls", "cls": "cls"}  # as sentence-transformers says
_MODULES = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers; others would make other vectors of what is computed here


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What computing an encoder needs to know."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    positions: int  # rows of the table of positions
    first_position: int  # of a text: RoBERTa begins after the padding's
    types: int  # of segments; all tokens are of the first one
    norm_eps: float
    gelu: str  # "none" or "tanh", as torch names the approximation

    @property
    def max_tokens(self) -> int:
        """How long a text can be."""
        return self.positions - self.first_position


Affine = tuple[Tensor, Tensor]  # gain and bias of a LayerNorm: [hidden] each


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: attention and MLP, each with a LayerNorm after its residual sum.  Biases are fp32."""

    qkv: Linear
    qkv_bias: Tensor
    o: Linear
    o_bias: Tensor
    attention_norm: Affine
    up: Linear
    up_bias: Tensor
    down: Linear
    down_bias: Tensor
    mlp_norm: Affine


class Encoder:
    """A model that turns token lists into vectors."""

    def __init__(self, folder: str | Path, *, precision: str = "fp32", device: str = "cpu", threads: int | None = None) -> None:
        """Load a folder with config.json and *.safetensors; `threads` holds for the whole process.

        Raises BadInput for one that is no encoder of `FAMILIES`, or is not whole.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        where = Path(folder).expanduser()
        self.shape, self.pooling = shape_of(where), own_pooling(where)
        self._to, self._device = formats.precision(precision), torch.device(device)
        self._load(_Files(where))

    def embed(self, texts: Sequence[Sequence[int]], *, pooling: Pooling | None = None, normalise: bool = True) -> Tensor:
        """Return a vector per text: [texts, hidden] fp32, of length 1 if `normalise`.

        pooling: the mean of all tokens, or the first one's (cls); None is the folder's own way, else the mean.
        """
        way = pooling or self.pooling
        if way not in get_args(Pooling):
            raise unknown("pooling", way, get_args(Pooling))
        lengths = self._lengths(texts)
        out = torch.empty(len(texts), self.shape.hidden, device=self._device)
        for places in _batches(lengths):
            out[places] = self._pooled([texts[i] for i in places], way)
        return functional.normalize(out, dim=1) if normalise else out

    @torch.inference_mode()
    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Return the last hidden state of every token, text after text, texts from short to long: [T, hidden] fp32."""
        a, lengths = self.shape, np.array([len(text) for text in texts])
        places = np.concatenate([np.arange(n) for n in lengths]) + a.first_position
        ids = torch.tensor([token for text in texts for token in text], device=self._device)
        x = self._words[ids] + self._places[torch.from_numpy(places).to(self._device)]
        x = functional.layer_norm(x.float(), (a.hidden,), *self._norm, a.norm_eps)
        groups = list(_groups(lengths, self._device))
        for layer in self._layers:
            attended = _affine(layer.o, self._attention(_affine(layer.qkv, x, layer.qkv_bias, self._to), groups), layer.o_bias, self._to)
            x = functional.layer_norm(x + attended, (a.hidden,), *layer.attention_norm, a.norm_eps)
            up = functional.gelu(_affine(layer.up, x, layer.up_bias, self._to), approximate=a.gelu)
            x = functional.layer_norm(x + _affine(layer.down, up, layer.down_bias, self._to), (a.hidden,), *layer.mlp_norm, a.norm_eps)
        return x

    def _attention(self, qkv: Tensor, groups: list[_Group]) -> Tensor:
        """qkv: [T, 3 hidden]; returns [T, hidden]."""
        parts = []
        for group in groups:
            n, longest = group.tokens.shape
            q, k, v = qkv[group.tokens].view(n, longest, 3, self.shape.heads, -1).permute(2, 0, 3, 1, 4)
            seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
            parts.append(seen.transpose(1, 2).flatten(2)[group.real])
        return torch.cat(parts)

    def _pooled(self, texts: list[Sequence[int]], pooling: str) -> Tensor:
        x, lengths = self.forward(texts), torch.tensor([len(text) for text in texts], device=self._device)
        ends = lengths.cumsum(0)
        if pooling == "cls":
            return x[ends - lengths]
        text_of = torch.arange(len(texts), device=self._device).repeat_interleave(lengths)
        return torch.zeros(len(texts), x.shape[1], device=self._device).index_add_(0, text_of, x) / lengths[:, None]

    def _lengths(self, texts: Sequence[Sequence[int]]) -> list[int]:
        """Return how long each is.  Raises BadInput for one that cannot be embedded."""
        for i, text in enumerate(texts):
            if not 0 < len(text) <= self.shape.max_tokens:
                raise BadInput(f"text {i} has {len(text)} tokens; this encoder takes 1 to {self.shape.max_tokens}")
            if not all(0 <= token < self.shape.vocab for token in text):
                raise BadInput(f"text {i} has a token outside the vocabulary of {self.shape.vocab}")
        return [len(text) for text in texts]

    def _load(self, files: _Files) -> None:
        a = self.shape

        def vector(name: str, size: int) -> Tensor:
            return files.tensor(name, size).float().to(self._device)

        def norm(at: str) -> Affine:
            return vector(f"{at}.weight", a.hidden), vector(f"{at}.bias", a.hidden)

        def matrix(names: Sequence[str], rows: int, columns: int) -> tuple[Linear, Tensor]:
            weight = torch.cat([files.tensor(f"{name}.weight", rows, columns).float() for name in names])
            bias = torch.cat([vector(f"{name}.bias", rows) for name in names])
            return quant.pack(formats.quantise(weight, self._to), self._to, self._device), bias

        def layer(at: str) -> Layer:
            qkv, qkv_bias = matrix([f"{at}.attention.self.{part}" for part in ("query", "key", "value")], a.hidden, a.hidden)
            o, o_bias = matrix([f"{at}.attention.output.dense"], a.hidden, a.hidden)
            up, up_bias = matrix([f"{at}.intermediate.dense"], a.ffn, a.hidden)
            down, down_bias = matrix([f"{at}.output.dense"], a.hidden, a.ffn)
            return Layer(
                qkv=qkv, qkv_bias=qkv_bias, o=o, o_bias=o_bias, attention_norm=norm(f"{at}.attention.output.LayerNorm"),
                up=up, up_bias=up_bias, down=down, down_bias=down_bias, mlp_norm=norm(f"{at}.output.LayerNorm"),
            )  # fmt: skip

        dtype = self._to.activations
        self._words = files.tensor("embeddings.word_embeddings.weight", a.vocab, a.hidden).to(self._device, dtype)
        places = files.tensor("embeddings.position_embeddings.weight", a.positions, a.hidden).float()
        places += files.tensor("embeddings.token_type_embeddings.weight", a.types, a.hidden)[0].float()
        self._places, self._norm = places.to(self._device, dtype), norm("embeddings.LayerNorm")
        self._layers = tuple(layer(f"encoder.layer.{i}") for i in range(a.layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Texts that attend together: tokens [n, longest] of the step, padding repeats the last; real: where there is no padding."""

    tokens: Tensor
    real: Tensor
    mask: Tensor | None  # [n, 1, 1, longest]


def _groups(lengths: np.ndarray[Any, np.dtype[np.int64]], device: torch.device) -> Iterator[_Group]:
    first, starts = 0, np.cumsum(lengths) - lengths
    for end in group_ends(lengths, _WORTH_TOKENS):
        own, place = lengths[first:end, None], np.arange(lengths[end - 1])
        tokens = torch.from_numpy(starts[first:end, None] + np.minimum(place, own - 1)).to(device)
        real = torch.from_numpy(place < own).to(device)
        yield _Group(tokens=tokens, real=real, mask=None if bool(real.all()) else real[:, None, None])
        first = end


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yield the places of texts from short to long, so many at a time that they have STEP_TOKENS tokens together, or one."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and tokens + lengths[i] > STEP_TOKENS:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def _affine(linear: Linear, x: Tensor, bias: Tensor, to: formats.Precision) -> Tensor:
    """Return x W^T + b in fp32."""
    return linear(x.to(to.activations)).float() + bias


class _Files:
    """The tensors of a folder, whatever stands before their names."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._entries = folder, checkpoint.entries_of(folder)
        prefixes = (name.removesuffix("embeddings.word_embeddings.weight") for name in self._entries)
        self._prefix = next((p for p, name in zip(prefixes, self._entries, strict=True) if p != name), "")

    def tensor(self, name: str, *size: int) -> Tensor:
        """Return a tensor.  Raises BadInput where it is missing or of another shape."""
        stored = self._prefix + name
        first = stored.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # as BERT was published
        stored = first if stored not in self._entries and first in self._entries else stored
        entry: Entry | None = self._entries.get(stored)
        if entry is None:
            raise BadInput(f"{self._folder}: the checkpoint has no tensor {stored}")
        if entry.shape != size:
            raise BadInput(f"{self._folder}: {stored} is {list(entry.shape)}; the config says {list(size)}")
        return checkpoint.read(entry, stored).clone()


def shape_of(folder: Path) -> Shape:
    """Return the shape of an encoder by its config.json.  Raises BadInput."""
    keys, where = _json(folder / "config.json"), folder / "config.json"
    if keys is None:
        raise BadInput(f"{where}: No such file; an encoder is a folder with config.json and *.safetensors")
    family = str(keys.get("model_type") or "")
    if family not in FAMILIES:
        raise BadInput(f"{where}: model_type {family!r} is no encoder that is computed here; those are {', '.join(FAMILIES)}")
    if keys.get("hidden_act", "gelu") not in _GELUS or keys.get("position_embedding_type", "absolute") != "absolute":
        raise BadInput(f"{where}: only gelu and absolute positions are computed")

    def whole(key: str) -> int:
        value = keys.get(key)
        if not isinstance(value, int) or value < 1:
            raise BadInput(f"{where}: {key} is {value!r}; it must be a whole number above 0")
        return value

    return Shape(
        layers=whole("num_hidden_layers"), hidden=whole("hidden_size"), heads=whole("num_attention_heads"), ffn=whole("intermediate_size"),
        vocab=whole("vocab_size"), positions=whole("max_position_embeddings"), types=whole("type_vocab_size"),
        first_position=0 if family == "bert" else int(keys.get("pad_token_id") or 1) + 1,
        norm_eps=float(keys.get("layer_norm_eps") or 1e-12), gelu=_GELUS[keys.get("hidden_act", "gelu")],
    )  # fmt: skip


def own_pooling(folder: Path) -> Pooling:
    """Return how sentence-transformers says this folder's vectors are made; the mean of all tokens where it says nothing.

    Raises BadInput for a way that is not computed: the largest or the last hidden state, several ways together, a layer after them.
    """
    modules = _parsed(folder / "modules.json") or []
    kinds = [str(m.get("type", "")).rpartition(".")[2] for m in modules if isinstance(m, dict)] if isinstance(modules, list) else []
    if odd := [kind for kind in kinds if kind not in _MODULES]:
        raise BadInput(f"{folder / 'modules.json'}: its vectors go through {odd[0]}, which is not computed here; {', '.join(_MODULES)} are")
    where = folder / "1_Pooling" / "config.json"
    keys = _json(where) or {}
    asked = [name.removeprefix("pooling_mode_") for name, is_on in keys.items() if name.startswith("pooling_mode_") and is_on is True]
    own = keys.get("pooling_mode") or []
    asked += map(str, own if isinstance(own, list) else [own])
    if len(asked) > 1 or any(name not in _POOLINGS for name in asked):
        raise BadInput(f"{where}: {' and '.join(asked)}: only the mean of all tokens or the first one's state is computed here")
    return _POOLINGS[asked[0]] if asked else "mean"


def _json(file: Path) -> dict[str, Any] | None:
    keys = _parsed(file)
    if keys is not None and not isinstance(keys, dict):
        raise BadInput(f"{file}: holds no object")
    return keys


def _parsed(file: Path) -> Any:
    """Return what a file of JSON holds, None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: not JSON: {error}") from error
