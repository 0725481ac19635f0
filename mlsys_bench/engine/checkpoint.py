"""A model in a folder as Hugging Face lays it out: config.json, *.safetensors, tokenizer.json.

    open_folder(path) -> Checkpoint    reads names and shapes only; says what is missing, extra or of another shape before anything is read
    load(checkpoint, ...) -> Weights   reads matrix by matrix, each from a mapping of its own, so that nothing stays in memory twice

Matrices that AWQ, GPTQ or compressed-tensors have quantised are taken as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlsys_bench.engine import packed, schemes, spec, weights
from mlsys_bench.engine.formats import Dense, Groups4
from mlsys_bench.engine.schemes import FLOATS, Scheme
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.weights import Matrix, Pack, Weights, unfilled
from mlsys_bench.errors import BadInput

_PREFIXES = (("model.", "lm_head"), ("language_model.model.", "language_model.lm_head"), ("model.language_model.", "lm_head"))
_NAMED = 3  # so many tensors are named where more are wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: BF16, F8_E4M3, I32 …


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A model on disk, not read yet."""

    folder: Path
    decoder: Decoder
    entries: Mapping[str, Entry]
    scheme: Scheme | None
    prefix: str  # of the decoder's tensors
    head: str  # name of the output matrix

    def stored(self, name: str) -> str:
        """Return what a tensor is called here that is `model. …` or `lm_head …` elsewhere."""
        if name.startswith("model."):
            return self.prefix + name.removeprefix("model.")
        return self.head + name.removeprefix("lm_head")


def open_folder(folder: str | Path) -> Checkpoint:
    """Return what a folder holds.  Raises BadInput for one that cannot be loaded, with the reason."""
    where = Path(folder).expanduser()
    if not where.is_dir():
        raise BadInput(f"{where}: not a folder; a checkpoint is one with config.json and *.safetensors")
    decoder = spec.of_config(where)
    entries = entries_of(where)
    prefix, head = next((pair for pair in _PREFIXES if f"{pair[0]}embed_tokens.weight" in entries), _PREFIXES[0])
    keys = json.loads((where / "config.json").read_text(encoding="utf-8"))
    found = Checkpoint(folder=where, decoder=decoder, entries=entries, scheme=schemes.of_config(keys, str(where)), prefix=prefix, head=head)
    _refuse_wrong(found)
    return found


def entries_of(folder: Path) -> dict[str, Entry]:
    """Return every tensor of a folder by name.  Raises BadInput where files are missing or broken."""
    return {name: entry for file in _files(folder) for name, entry in _entries(file)}


def read(entry: Entry, name: str) -> Tensor:
    """Return a tensor whose memory is its file, mapped: pages that are read count as this process's until it is given up."""
    with _opened(entry.file) as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def load(checkpoint: Checkpoint, *, precision: str, device: torch.device, pack: Pack | None = None) -> Weights:
    """Return the weights of a checkpoint, each matrix read once."""
    return weights.build(checkpoint.decoder, Reader(checkpoint), precision=precision, device=device, pack=pack)


def planned_bytes(checkpoint: Checkpoint, precision: str) -> int:
    """Return what the weights will take in memory, counted matrix by matrix; nothing is read."""
    return weights.planned_bytes(checkpoint.decoder, Checked(checkpoint), precision)


class Reader:
    """A checkpoint as a source of weights."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._from, self.is_quantised = checkpoint, checkpoint.scheme is not None

    def vector(self, name: str, size: int) -> Tensor:
        """Return a vector in fp32."""
        return self.stored_tensor(self._from.stored(name)).float()

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """Return the weight of a linear layer."""
        at, scheme = self._from.stored(name), self._from.scheme
        if scheme is None or not _is_packed(self._from, at):
            return Matrix(logical=Dense(weight=read(self._from.entries[f"{at}.weight"], f"{at}.weight")))  # copied when it is rounded
        parts = {part: self.stored_tensor(f"{at}.{part}") for part in scheme.layout(rows, columns)}
        if scheme.method == "awq":
            return Matrix(logical=packed.awq(parts["qweight"], parts["qzeros"], parts["scales"]))
        if scheme.method == "gptq":
            named = f"{at}.g_idx"  # counts wherever it is: what `desc_act` says of it is not always so
            g_idx = self.stored_tensor(named) if named in self._from.entries else None
            logical, order = packed.gptq(parts["qweight"], parts["qzeros"], parts["scales"], g_idx, is_v2=scheme.is_v2, name=at)
            return Matrix(logical=logical, order=order)
        if scheme.method == "fp8":
            return Matrix(logical=packed.compressed8f(parts["weight"], self.stored_tensor(f"{at}.weight_scale")))
        zeros = self.stored_tensor(f"{at}.weight_zero_point") if f"{at}.weight_zero_point" in self._from.entries else None
        return Matrix(logical=packed.compressed4(parts["weight_packed"], parts["weight_scale"], zeros, inputs=columns))

    def stored_tensor(self, name: str) -> Tensor:
        """Return a copy of a tensor by the name it has in its file."""
        return read(self._from.entries[name], name).clone()


class Checked:
    """A source of tensors without content: notes what is asked for, and what of it a checkpoint lacks or has in another shape."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._from, self.is_quantised = checkpoint, checkpoint.scheme is not None
        self.asked: set[str] = set()
        self.missing: list[str] = []
        self.misshapen: list[str] = []

    def vector(self, name: str, size: int) -> Tensor:
        """Return nothing of that size."""
        self._note(self._from.stored(name), (size,), FLOATS)
        return unfilled(size)

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """Return a matrix without content in the format it is stored in."""
        at, scheme = self._from.stored(name), self._from.scheme
        if scheme is None or not _is_packed(self._from, at):
            self._note(f"{at}.weight", (rows, columns), FLOATS)
            return Matrix(logical=Dense(weight=unfilled(rows, columns)))
        group = scheme.group or columns
        for part, (shape, dtypes) in scheme.layout(rows, columns).items():
            self._note(f"{at}.{part}", shape, dtypes)
        if scheme.method == "fp8":
            self._note(f"{at}.weight_scale", None, FLOATS)
            return Matrix(logical=packed.compressed8f(unfilled(rows, columns, dtype=torch.float8_e4m3fn), torch.ones(1)))
        scale = unfilled(rows, columns // group, dtype=torch.float16)
        has_zeros = scheme.method != "int4" or f"{at}.weight_zero_point" in self._from.entries
        if scheme.method == "int4" and has_zeros:
            self._note(f"{at}.weight_zero_point", (rows // 8, columns // group), ("I32",))
        nibbles, zero = (unfilled(rows, width, dtype=torch.uint8) for width in (columns // 2, columns // group))
        return Matrix(logical=Groups4(weight=nibbles, scale=scale, zero=zero if has_zeros else None, group=group))

    def _note(self, name: str, shape: tuple[int, ...] | None, dtypes: tuple[str, ...]) -> None:
        self.asked.add(name)
        entry = self._from.entries.get(name)
        if entry is None:
            self.missing.append(name)
        elif shape is not None and entry.shape != shape:
            self.misshapen.append(f"{name} is {list(entry.shape)}, the config says {list(shape)}")
        elif entry.dtype not in dtypes:
            self.misshapen.append(f"{name} is of type {entry.dtype}, not {' or '.join(dtypes)}")


def _is_packed(checkpoint: Checkpoint, at: str) -> bool:
    """Whether this matrix is quantised: some, such as the head, are left as they were."""
    entry = checkpoint.entries.get(f"{at}.weight")
    return entry is None or entry.dtype not in FLOATS


# ---------------------------------------------------------------- what must be right before anything is read


def _refuse_wrong(checkpoint: Checkpoint) -> None:
    """Raise BadInput that names tensors that are missing, of another shape, or without a place in this model."""
    checked = Checked(checkpoint)
    weights.planned_bytes(checkpoint.decoder, checked, "fp32")
    extra = [name for name in checkpoint.entries if name not in checked.asked and not _may_stay(checkpoint, name)]
    kinds = {"missing": checked.missing, "wrong": checked.misshapen, "without a place in this model": extra}
    wrong = "; ".join(f"{what}: {_some(names)}" for what, names in kinds.items() if names)
    if wrong:
        raise BadInput(f"{checkpoint.folder}: config.json and the tensors do not belong together; {wrong}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _may_stay(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor nobody asked for says nothing: derived ones, a tied head, another tower, GPTQ's order that is none, zero biases."""
    is_other = not name.startswith((checkpoint.prefix, checkpoint.head))
    is_derived = name.endswith(("rotary_emb.inv_freq", ".g_idx", ".weight_shape", ".input_scale"))
    is_tied = name.startswith(checkpoint.head) and checkpoint.decoder.shape.tied_embeddings
    is_zero_bias = checkpoint.scheme is not None and name.endswith(".bias") and not bool(Reader(checkpoint).stored_tensor(name).any())
    return is_other or is_derived or is_tied or is_zero_bias


def _files(folder: Path) -> list[Path]:
    """Return the files with tensors: those of the index, else model.safetensors, else every *.safetensors."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        return _shards(index)
    found = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    if found:
        return found
    if ggufs := sorted(folder.glob("*.gguf")):
        raise BadInput(f"{ggufs[0]}: GGUF is llama.cpp's format, which is not read; take the model's *.safetensors")
    if pickled := sorted((*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth"))):
        raise BadInput(
            f"{pickled[0]}: pickled weights run code when they are read, so they are not;"
            " take the model's *.safetensors, or save it again with save_pretrained"
        )
    raise BadInput(f"{folder}: no *.safetensors in it; a checkpoint has its weights there")


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{index}: not the index of a checkpoint ({type(error).__name__}: {error}); download it again") from error
    files = [index.parent / str(name) for name in names]
    gone = [file.name for file in files if not file.is_file()]
    if gone or not files:
        raise BadInput(f"{index}: {len(gone)} of its {len(files)} files are not there: {_some(gone)}; download them again")
    return files


def _entries(file: Path) -> Iterator[tuple[str, Entry]]:
    with _opened(file) as opened:
        for name in opened.keys():  # noqa: SIM118 (it is no mapping)
            part = opened.get_slice(name)
            yield name, Entry(file=file, shape=tuple(part.get_shape()), dtype=str(part.get_dtype()))


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise BadInput(f"{file}: not a whole safetensors file ({reason}); download it again") from error
