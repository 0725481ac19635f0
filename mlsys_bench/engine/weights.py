"""The weights of a decoder: drawn at random from a seed, taken from a state dict, or read from a checkpoint.

All ways name the same tensors, as Hugging Face does, and go through `build`, matrix by matrix, so that never more than one matrix exists
twice: what is largest (embedding and head) comes first, while nothing else is there yet.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mlsys_bench.engine import formats, memory, quant
from mlsys_bench.engine.formats import Dense, Groups4, Logical, Precision, Rows8, Rows8f
from mlsys_bench.engine.quant import Linear
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.errors import BadInput
from mlsys_bench.models.precision import ENGINE_PRECISIONS

LOGIT_SD = 3.0  # spread of the logits of random weights: top tokens stand out, and sampling has a choice
_ROUNDED_ELEMENTS = 1 << 20  # rounded at a time: what that takes beside the matrix is some 16 times as many bytes
Read = Callable[..., Tensor]  # (name, *shape) -> tensor of that shape
Pack = Callable[[Logical], Linear]  # what a backend makes of a matrix
Quantise = Callable[[str, Tensor], Logical]  # (name of the matrix, fp32 weight) -> the matrix as it is kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of an MLP."""

    router: Tensor  # [experts, hidden], fp32
    gate_up: tuple[Linear, ...]  # [2 ffn, hidden] each
    down: tuple[Linear, ...]  # [hidden, ffn] each


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer: q, k, v in one matrix, gate and up in another.

    RMSNorm is gain * sqrt(n) * x / |x|.  Gain and sqrt(hidden) of the norms before attention and MLP are in the columns of the matrices
    that read them, so that x / |x| is all that is left to compute; a checkpoint that is quantised already keeps them apart
    (`attention_gain`, `mlp_gain`).  Every gain has its sqrt(n) in it.  Vectors are fp32.
    """

    qkv: Linear  # [(heads + 2 kv_heads) head_dim, hidden]
    o: Linear  # [hidden, heads head_dim]
    gate_up: Linear | None  # [2 ffn, hidden]; None where there are experts
    down: Linear | None  # [hidden, ffn]
    experts: Experts | None = None
    attention_gain: Tensor | None = None  # [hidden]; None: it is in qkv
    mlp_gain: Tensor | None = None  # [hidden]; None: it is in gate_up, or in router and experts
    qkv_bias: Tensor | None = None
    o_bias: Tensor | None = None
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    q_gain: Tensor | None = None  # [head_dim]
    k_gain: Tensor | None = None  # [head_dim]
    post_attention_gain: Tensor | None = None  # [hidden]
    post_mlp_gain: Tensor | None = None  # [hidden]

    def linears(self) -> tuple[Linear, ...]:
        """Return all matrices but the router."""
        mixture = (*self.experts.gate_up, *self.experts.down) if self.experts else ()
        return (self.qkv, self.o, *(linear for linear in (self.gate_up, self.down) if linear is not None), *mixture)

    def vectors(self) -> tuple[Tensor, ...]:
        """Return gains and biases, those that there are, and the router."""
        every = (
            self.attention_gain, self.mlp_gain, self.qkv_bias, self.o_bias, self.gate_up_bias, self.down_bias,
            self.q_gain, self.k_gain, self.post_attention_gain, self.post_mlp_gain, self.experts.router if self.experts else None,
        )  # fmt: skip
        return tuple(vector for vector in every if vector is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """All weights of a model."""

    embedding: Tensor  # [vocab, hidden], fp32 or bf16
    layers: tuple[Layer, ...]
    gain: Tensor  # [hidden], fp32, times sqrt(hidden)
    head: Linear  # [vocab, hidden]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return everything held in memory, each tensor once."""
        held = [self.embedding, self.gain, *self.head.tensors()]
        for layer in self.layers:
            held += layer.vectors()
            for linear in layer.linears():
                held += linear.tensors()
        return tuple({id(t) if t.is_meta else t.data_ptr(): t for t in held}.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix as a source has it.  order: [K], its column i multiplies input order[i]; None where columns are in order."""

    logical: Logical
    order: Tensor | None = None


class Source(Protocol):
    """Where weights come from.  Both ways of asking raise BadInput where a tensor is missing or has another shape."""

    @property
    def is_quantised(self) -> bool:
        """Whether matrices come in a quantised format, which is kept as it is."""
        ...

    def vector(self, name: str, size: int) -> Tensor:
        """Return a vector in fp32."""
        ...

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """Return the weight of a linear layer, `name` without '.weight'."""
        ...


@dataclass(frozen=True, slots=True)
class Tensors:
    """A source of float tensors by name."""

    read: Read
    is_quantised: bool = False

    def vector(self, name: str, size: int) -> Tensor:
        """Return a vector in fp32."""
        return self.read(name, size).float()

    def matrix(self, name: str, rows: int, columns: int) -> Matrix:
        """Return a weight."""
        return Matrix(logical=Dense(weight=self.read(f"{name}.weight", rows, columns)))


class Ordered:
    """A matrix whose columns are stored in another order than its inputs come (GPTQ's act-order)."""

    __slots__ = ("linear", "order")

    def __init__(self, linear: Linear, order: Tensor) -> None:
        self.linear, self.order = linear, order

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T."""
        return self.linear(x.index_select(1, self.order))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all that it holds in memory."""
        return (*self.linear.tensors(), self.order)


class Stacked:
    """Matrices that read the same input but are kept in formats of their own, one below the other."""

    __slots__ = ("linears",)

    def __init__(self, linears: tuple[Linear, ...]) -> None:
        self.linears = linears

    def __call__(self, x: Tensor) -> Tensor:
        """Return x W^T, the parts side by side."""
        return torch.cat([linear(x) for linear in self.linears], dim=1)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all that it holds in memory."""
        return tuple(t for linear in self.linears for t in linear.tensors())


def random(d: Decoder, *, precision: str, device: torch.device, seed: int, pack: Pack | None = None) -> Weights:
    """Return weights drawn from a seed, the same on every device and, up to rounding, in every precision.

    Matrices are Gaussian with the variance 1 / inputs, those that write to the residual stream 1 / (2 layers inputs), so that activations
    and logits keep a sane size at any depth.
    """

    def draw(name: str, *size: int) -> Tensor:
        if len(size) == 1:
            return torch.ones(size)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
        return torch.empty(size).normal_(0.0, _sd(d, name, size[1]), generator=generator)

    return build(d, Tensors(draw), precision=precision, device=device, pack=pack)


def _sd(d: Decoder, name: str, inputs: int) -> float:
    if "embed_tokens" in name:
        return LOGIT_SD / math.sqrt(inputs) if d.shape.tied_embeddings else 1.0
    if "lm_head" in name:
        return LOGIT_SD / math.sqrt(inputs)
    writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
    return 1.0 / math.sqrt(inputs * (2 * d.shape.layers if writes_residual else 1))


def from_state_dict(
    d: Decoder,
    tensors: Mapping[str, Tensor],
    *,
    precision: str,
    device: torch.device,
    pack: Pack | None = None,
    quantise: Quantise | None = None,
) -> Weights:
    """Return the weights of a state dict.  Raises BadInput where a tensor is missing or has another shape."""

    def read(name: str, *size: int) -> Tensor:
        if name not in tensors:
            raise BadInput(f"{d.shape.id}: the checkpoint has no tensor {name}")
        if tuple(tensors[name].shape) != size:
            raise BadInput(f"{d.shape.id}: {name} is {list(tensors[name].shape)}; this shape needs {list(size)}")
        return tensors[name].detach()

    return build(d, Tensors(read), precision=precision, device=device, pack=pack, quantise=quantise)


def build(
    d: Decoder, source: Source, *, precision: str, device: torch.device, pack: Pack | None = None, quantise: Quantise | None = None
) -> Weights:
    """Return a source's weights in a precision.

    pack: what a backend keeps of a matrix, by default torch's; quantise: how float matrices become the precision's format, by default
    rounded to nearest.
    """
    to = formats.precision(precision)
    maker = _Maker(
        decoder=d, source=source, precision=to, device=device, pack=pack or (lambda logical: quant.pack(logical, to, device)),
        quantise=quantise,
    )  # fmt: skip
    with memory.given_back():
        return maker.weights()


def planned_bytes(d: Decoder, source: Source, precision: str) -> int:
    """Return what the weights will take in memory, counted matrix by matrix, scales included; of matrices only the sizes are read.

    Raises BadInput for a matrix that cannot be kept in this precision.
    """
    to, counted = formats.precision(precision), list[int]()
    made = _Counter(
        decoder=d, source=source, precision=to, device=torch.device("cpu"), pack=lambda _: Stacked(()), quantise=None, counted=counted
    ).weights()
    return sum(counted) + sum(t.nbytes for t in (made.gain, *(vector for layer in made.layers for vector in layer.vectors())))


def drawn_bytes(d: Decoder, precision: str) -> int:
    """Return what `random` weights will take in memory."""
    return planned_bytes(d, Tensors(lambda name, *size: unfilled(*size)), precision)


def unfilled(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor that has a size and takes no memory: one value, everywhere."""
    return torch.zeros(1, dtype=dtype).expand(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Maker:
    """Makes what the engine holds of what a source gives."""

    decoder: Decoder
    source: Source
    precision: Precision
    device: torch.device
    pack: Pack
    quantise: Quantise | None

    def weights(self) -> Weights:
        a, table = self.decoder.shape, self.table()
        head = self.pack(Dense(weight=table)) if a.tied_embeddings else self.linear("lm_head", [("lm_head", a.vocab)], a.hidden)
        return Weights(
            embedding=table, head=head, gain=self.gain("model.norm", a.hidden), layers=tuple(self.layer(i) for i in range(a.layers))
        )  # fmt: skip

    def table(self) -> Tensor:
        """Return the embedding table."""
        embedding = self.source.matrix("model.embed_tokens", self.decoder.shape.vocab, self.decoder.shape.hidden).logical
        assert isinstance(embedding, Dense), "no checkpoint quantises its embedding table"
        return embedding.weight.to(device=self.device, dtype=self.precision.activations, copy=True)

    def layer(self, i: int) -> Layer:
        d, a, at = self.decoder, self.decoder.shape, f"model.layers.{i}"
        q, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        names = {part: f"{at}.self_attn.{part}_proj" for part in "qkvo"}
        before_mlp = f"{at}.pre_feedforward_layernorm" if d.post_norms else f"{at}.post_attention_layernorm"
        before, after = self.gain(f"{at}.input_layernorm", a.hidden), self.gain(before_mlp, a.hidden)
        is_apart, inputs = self.source.is_quantised, [(names["q"], q), (names["k"], kv), (names["v"], kv)]
        gate_up, down, experts = self.mlp(i, None if is_apart else after)
        return Layer(
            qkv=self.linear(f"{at}.self_attn.qkv", inputs, a.hidden, None if is_apart else before),
            o=self.linear(names["o"], [(names["o"], a.hidden)], q),
            gate_up=gate_up,
            down=down,
            experts=experts,
            attention_gain=before if is_apart else None,
            mlp_gain=after if is_apart else None,
            qkv_bias=self.biases(inputs) if d.qkv_bias else None,
            o_bias=self.biases([(names["o"], a.hidden)]) if d.o_bias else None,
            gate_up_bias=self.biases([(f"{at}.mlp.gate_proj", a.ffn), (f"{at}.mlp.up_proj", a.ffn)]) if d.mlp_bias else None,
            down_bias=self.biases([(f"{at}.mlp.down_proj", a.hidden)]) if d.mlp_bias else None,
            q_gain=self.gain(f"{at}.self_attn.q_norm", a.head_dim) if d.qk_norm else None,
            k_gain=self.gain(f"{at}.self_attn.k_norm", a.head_dim) if d.qk_norm else None,
            post_attention_gain=self.gain(f"{at}.post_attention_layernorm", a.hidden) if d.post_norms else None,
            post_mlp_gain=self.gain(f"{at}.post_feedforward_layernorm", a.hidden) if d.post_norms else None,
        )

    def mlp(self, i: int, gain: Tensor | None) -> tuple[Linear | None, Linear | None, Experts | None]:
        """Return gate_up, down and None, or None, None and experts."""
        a, at = self.decoder.shape, f"model.layers.{i}.mlp"
        if self.decoder.is_sparse(i):
            return None, None, self.experts(i, gain)
        return *self.gated(at, ("gate_proj", "up_proj", "down_proj"), a.dense_ffn if a.experts else a.ffn, gain), None

    def gated(self, at: str, names: tuple[str, str, str], ffn: int, gain: Tensor | None) -> tuple[Linear, Linear]:
        gate, up, down = (f"{at}.{name}" for name in names)
        hidden = self.decoder.shape.hidden
        return self.linear(f"{at}.gate_up", [(gate, ffn), (up, ffn)], hidden, gain), self.linear(down, [(down, hidden)], ffn)

    def experts(self, i: int, gain: Tensor | None) -> Experts:
        """Read a mixture; Mixtral names its parts w1 (gate), w3 (up) and w2 (down)."""
        a, is_mixtral = self.decoder.shape, self.decoder.shape.family == "mixtral"
        at = f"model.layers.{i}.{'block_sparse_moe' if is_mixtral else 'mlp'}"
        names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
        router = self.source.matrix(f"{at}.gate", a.experts, a.hidden).logical.dequantise()
        pairs = [self.gated(f"{at}.experts.{e}", names, a.ffn, gain) for e in range(a.experts)]
        return Experts(
            router=(router.clone() if gain is None else router * gain.to(router.device)).to(self.device),
            gate_up=tuple(gate_up for gate_up, _ in pairs),
            down=tuple(down for _, down in pairs),
        )

    def gain(self, name: str, size: int) -> Tensor:
        return (self.source.vector(f"{name}.weight", size) + self.decoder.gain_offset).mul_(math.sqrt(size)).to(self.device)

    def biases(self, parts: Sequence[tuple[str, int]]) -> Tensor:
        return torch.cat([self.source.vector(f"{name}.bias", rows) for name, rows in parts]).to(self.device)

    def linear(self, label: str, parts: Sequence[tuple[str, int]], columns: int, gain: Tensor | None = None) -> Linear:
        """Return the matrices of `parts` (name, rows) one below the other as one, columns times gain."""
        blocks = tuple(self.blocks(label, [self.source.matrix(name, rows, columns) for name, rows in parts], gain))
        return blocks[0] if len(blocks) == 1 else Stacked(blocks)

    def blocks(self, label: str, matrices: list[Matrix], gain: Tensor | None) -> Iterator[Linear]:
        """Yield one linear for neighbours of one format, as many as differ."""
        while matrices:
            end = next((i for i, m in enumerate(matrices) if not _are_alike(matrices[0], m)), len(matrices))
            order, parts, matrices = matrices[0].order, [m.logical for m in matrices[:end]], matrices[end:]
            linear = self.pack(self.logical(label, parts, gain))
            yield linear if order is None else Ordered(linear, order.to(self.device))

    def logical(self, label: str, parts: list[Logical], gain: Tensor | None) -> Logical:
        """Return the parts as one matrix in this precision.  Gives `parts` up one by one: they may be mapped files."""
        plain = [part.weight for part in parts if isinstance(part, Dense)]
        if not plain:
            return as_precision(joined(parts), self.precision, label)
        parts.clear()
        if self.source.is_quantised:
            return Dense(weight=torch.cat(plain).to(self.precision.activations))
        if self.quantise is not None:
            return self.quantise(label, torch.cat([_times(weight, gain) for weight in plain]))
        return joined([formats.quantise(_times(rows, gain), self.precision) for rows in _in_blocks(plain)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Counter(_Maker):
    """Counts the bytes of matrices and makes none."""

    counted: list[int]

    def table(self) -> Tensor:
        a = self.decoder.shape
        self.source.matrix("model.embed_tokens", a.vocab, a.hidden)
        self.counted.append(a.vocab * a.hidden * self.precision.activations.itemsize)
        return unfilled(0)

    def linear(self, label: str, parts: Sequence[tuple[str, int]], columns: int, gain: Tensor | None = None) -> Linear:
        for name, rows in parts:
            self.counted.append(self.kept_bytes(self.source.matrix(name, rows, columns).logical, rows, columns, label))
        return Stacked(())

    def kept_bytes(self, stored: Logical, rows: int, columns: int, label: str) -> int:
        to, is_stored = self.precision, not isinstance(stored, Dense)
        if is_stored and stays(stored, to, label):
            return stored.nbytes
        if is_stored or self.source.is_quantised or to.weight in ("fp32", "bf16"):
            return rows * columns * to.activations.itemsize
        if to.group is not None:
            return rows * (columns // 2 + 2 * -(-columns // to.group))
        return rows * (columns + 4)


def stays(stored: Logical, to: Precision, label: str) -> bool:
    """Return whether a quantised matrix is what a precision wants; floats take it too.  Raises BadInput: nothing is rounded twice."""
    if isinstance(stored, Groups4) and to.weight == "int4" and to.group == stored.group:
        return True
    if isinstance(stored, Rows8f) and to.weight == "fp8":
        return True
    if to.weight in ("fp32", "bf16"):
        return False
    own = f"int4g{stored.group}" if isinstance(stored, Groups4) else "fp8"
    take = ", ".join((*((own,) if own in ENGINE_PRECISIONS else ()), "bf16 or fp32"))
    raise BadInput(f"{label} is stored as {own}; rounding it again to {to.name} would add errors: take --precision {take}")


def as_precision(stored: Logical, to: Precision, label: str) -> Logical:
    """Return a quantised matrix as a precision wants it: as it is, or back as floats.  Raises BadInput."""
    return stored if stays(stored, to, label) else Dense(weight=stored.dequantise().to(to.activations))


def joined(parts: list[Logical]) -> Logical:
    """Return matrices of one format, one below the other."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Groups4):
        fours = [part for part in parts if isinstance(part, Groups4)]
        has_zeros = any(part.zero is not None for part in fours)
        return Groups4(
            weight=torch.cat([part.weight for part in fours]),
            scale=torch.cat([part.scale for part in fours]),
            zero=torch.cat([_zeros(part) for part in fours]) if has_zeros else None,
            group=fours[0].group,
        )
    if isinstance(parts[0], Dense):
        return Dense(weight=torch.cat([part.weight for part in parts]))
    eights = [part for part in parts if isinstance(part, Rows8 | Rows8f)]
    return type(eights[0])(weight=torch.cat([part.weight for part in eights]), scale=torch.cat([part.scale for part in eights]))


def _in_blocks(weights: list[Tensor]) -> Iterator[Tensor]:
    """Yield the rows of matrices, some at a time; a matrix is given up before the next one is touched."""
    while weights:
        weight = weights.pop(0)
        yield from torch.split(weight, max(1, _ROUNDED_ELEMENTS // weight.shape[1]))


def _times(weight: Tensor, gain: Tensor | None) -> Tensor:
    """Return a copy of a weight in fp32, its columns times gain."""
    wide = weight.to(torch.float32, copy=True)
    return wide if gain is None else wide.mul_(gain.to(weight.device))


def _zeros(part: Groups4) -> Tensor:
    return torch.full_like(part.scale, formats.ZERO, dtype=torch.uint8) if part.zero is None else part.zero


def _are_alike(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices can be one: the same format, the same order of columns."""
    if type(one.logical) is not type(other.logical) or (one.order is None) != (other.order is None):
        return False
    if isinstance(one.logical, Groups4) and isinstance(other.logical, Groups4) and one.logical.group != other.logical.group:
        return False
    return one.order is None or other.order is None or torch.equal(one.order, other.order)
