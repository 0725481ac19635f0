"""The operators of a model's step, each by itself: `op.*`, by the engine's own kernels, with the shapes of any model.

What an operator must move and compute at least is its `Work`: weights and KV as they are stored, activations in and out.  Each is held
against float64 before it is timed; a matrix, moreover, against the weights it was rounded from, which is what its number format costs.
Weights are a few hundred random rows over and over: a kernel's speed knows nothing of values, and float64 has less to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlsys_bench.bench.alone import Call, Computes
from mlsys_bench.bench.harness import COLD, MEMORY_SHARE, Sampled, Spec, Task, cache_bytes, free_bytes, timed
from mlsys_bench.bench.machine import several
from mlsys_bench.bench.paged import RANDOM_BLOCKS, Pool, attended, decode_steps, prefill_steps
from mlsys_bench.engine import formats, sampler
from mlsys_bench.engine.kv import name_of, token_bytes
from mlsys_bench.engine.quant import Linear
from mlsys_bench.engine.sampling import GREEDY, Sampling
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.tokenizer import Tokenizer
from mlsys_bench.types import Scalar, Work

NAMES = (
    "op.linear", "op.attention.decode", "op.attention.prefill", "op.norm", "op.rope_append", "op.swiglu", "op.embedding",
    "op.sample", "op.tokenize",
)  # fmt: skip
LAYERS = ("qkv", "out", "gate_up", "down", "head")
RANDOM_ROWS = 256  # of a matrix that differ
CHECKED_ROWS = 4  # tokens of an output that are held against float64
CHUNK = 512  # tokens of a prompt that a step takes at most
CONTEXT = 512  # tokens of each of the sequences that the rows of a matrix belong to: their cache is read between two reads of a matrix
TEXT_BYTES = 2**16
FIRST_POSITION = 100  # of tokens that are turned: at 0 nothing turns
POLICIES = {"argmax": GREEDY, "top_p": Sampling(temperature=0.8, top_p=0.95)}
# relative errors that are let pass: against the weights a format was rounded from (Gaussian), and against the weights as it keeps them
FORMAT_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2, "w8a8": 3e-2, "int4": 0.15, "w4a8": 0.15, "fp8": 0.06}
KERNEL_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 1e-2, "w8a8": 2e-2, "int4": 1e-2, "w4a8": 2e-2, "fp8": 0.05}
KV_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2, "int8": 2e-2, "fp8": 0.06}
ROW_TOLERANCE = {4: 1e-5, 2: 2e-2}  # by the bytes of an activation

Made = tuple[Call, Callable[[Tensor], float]]  # an operator, and the relative error of what it gave


class Sizes(NamedTuple):
    """What is measured of each operator."""

    tokens: tuple[int, ...]  # rows of matrices, norms, gates and choices
    contexts: tuple[int, ...]
    batches: tuple[int, ...]  # of decoding attention, at each of the contexts
    prefills: tuple[int, ...]  # contexts of a prompt whose last chunk attends
    links: tuple[int, ...]  # bytes between processes, beside those of the model


class Operators:
    """The operators of one model in one precision.  Memory is taken when an operator is first checked or timed."""

    def __init__(
        self, d: Decoder, who: Computes, *, precision: str, kv: torch.dtype, common: dict[str, Scalar], device: str, threads: int,
        block_tokens: int = 16,
    ) -> None:  # fmt: skip
        self.d, self.who, self.precision, self.kv, self.device, self.threads = d, who, precision, kv, device, threads
        self.common = common | {"model": d.shape.id, "precision": precision, "backend": who.backend}
        self.block_tokens, self.notes, self._matrices = block_tokens, list[str](), dict[str, tuple[list[Linear], Tensor, formats.Logical]]()
        self._most_blocks = 0  # of an attention case and what it rotates through
        self._random = torch.Generator().manual_seed(0)

    def cold_bytes(self, batch: int, context: int) -> float:
        """Return through how many bytes an operator's weights or blocks rotate: what a step reads, so that caches keep as much as there.

        No more than several last-level caches, beyond which they hold nothing, or what memory spares.
        """
        return min(self.step_bytes(batch, context), self._most_bytes)

    def step_bytes(self, batch: int, context: int) -> float:
        """Return what a decode step of such sequences reads: the matrices of all layers, the head, and the cache."""
        a, (*layer, head) = self.d.shape, (self.weight_bytes(n, k) for n, k in self.shapes().values())
        return a.layers * sum(layer) + head + batch * context * token_bytes(a, self.kv)

    @functools.cached_property
    def _most_bytes(self) -> float:
        """What rotates at most; a note says where memory spares less than several caches."""
        wanted, spared = COLD * cache_bytes(self.device), MEMORY_SHARE * free_bytes(self.device)
        if spared < min(wanted, self.step_bytes(1, 0)):
            self.notes.append(f"op.*: memory spares {spared / 2**20:.0f} MiB for what rotates, not {wanted / 2**20:.0f}: caches may help")
        return min(wanted, spared)

    def gaussian(self, *size: int) -> Tensor:
        """Return fp32 values."""
        return torch.empty(size).normal_(generator=self._random)

    def task(self, name: str, parameters: dict[str, Scalar], work: Work, tolerance: float, make: Callable[[], Made]) -> Task:
        """Return the task of an operator that is made when it is first needed.  A call is `times` operators, and a sample one's share."""
        what = Spec(name=name, unit="s", better="lower", parameters=self.common | parameters, work=work)
        made = functools.cache(make)

        def check() -> float:
            call, error = made()
            return error(call.once())

        inner = timed(what, lambda: made()[0].run(), device=self.device, check=check, tolerance=tolerance, threads=self.threads)

        def visit() -> list[Sampled]:
            call, _ = made()
            if call.before is not None:
                call.before()
            return several(inner, call.times).visit()

        return dataclasses.replace(inner, visit=visit)

    def _as_warm(self, call: Call, copies: int, batch: int, context: int) -> Call:
        """Return a call that goes through all copies ahead of each visit, where caches keep a part of them from step to step."""

        def go_through() -> None:
            for _ in range(math.ceil(copies / call.times)):
                call.run()

        keeps = self.cold_bytes(batch, context) < COLD * cache_bytes(self.device)
        return dataclasses.replace(call, before=go_through) if keeps and call.before is None else call

    # ------------------------------------------------------------ matrices

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return outputs and inputs of each matrix."""
        a = self.d.shape
        inner, kv = a.heads * a.head_dim, a.kv_heads * a.head_dim
        return {
            "qkv": (inner + 2 * kv, a.hidden), "out": (a.hidden, inner), "gate_up": (2 * a.ffn, a.hidden), "down": (a.hidden, a.ffn),
            "head": (a.vocab, a.hidden),
        }  # fmt: skip

    def linears(self, tokens: tuple[int, ...]) -> Iterator[Task]:
        """Yield a task per matrix and number of tokens."""
        for layer, (n, k) in self.shapes().items():
            for m in tokens:
                parameters: dict[str, Scalar] = {"layer": layer, "m": m, "n": n, "k": k}
                yield self.linear(parameters, functools.partial(self._linear, layer, m))

    def linear(self, parameters: dict[str, Scalar], make: Callable[[], Made]) -> Task:
        """Return the task of one matrix: its bytes as this precision keeps them, by the format alone."""
        m, n, k = (int(parameters[name] or 0) for name in ("m", "n", "k"))
        work = Work(bytes=self.weight_bytes(n, k) + m * (n + k) * self.who.act_bytes, flops=2.0 * m * n * k)
        return self.task("op.linear", parameters, work, FORMAT_TOLERANCE[_family(self.precision)], make)

    def weight_bytes(self, n: int, k: int) -> float:
        """Return what a matrix takes as it is stored."""
        kept = formats.precision(self.precision)
        scale_bytes = 2 * n * -(-k // kept.group) if kept.group else 0 if kept.weight in ("fp32", "bf16") else 4 * n
        return n * k * {"fp32": 4, "bf16": 2, "int8": 1, "int4": 0.5, "fp8": 1}[kept.weight] + scale_bytes

    def matrices(self, layer: str, m: int) -> tuple[list[Linear], Tensor, Tensor]:
        """Return copies of a matrix, together what a step of m tokens reads, the fp32 rows it repeats, and these as they are kept."""
        n, k = self.shapes()[layer]
        if layer not in self._matrices:
            rows = self.gaussian(min(n, RANDOM_ROWS), k) / math.sqrt(k)
            self._matrices[layer] = [], rows, formats.quantise(rows, self.precision)
        held, rows, kept = self._matrices[layer]
        copies = math.ceil(self.cold_bytes(sequences(m), CONTEXT) / self.weight_bytes(n, k)) or 1
        again = functools.partial(tiled, kept, n)
        if not held:
            held.append(self.who.pack(again()))
        held.extend(self.who.copy(held[0], number, again) for number in range(len(held), copies))
        return held[:copies], rows, kept.dequantise()

    def _linear(self, layer: str, m: int) -> Made:
        held, rows, kept = self.matrices(layer, m)
        x = self.gaussian(m, rows.shape[1])
        at = picked(m)
        exact, own = (torch.tile(x[at].double() @ w.double().T, (1, -(-self.shapes()[layer][0] // len(w)))) for w in (rows, kept))

        def error(found: Tensor) -> float:
            y = found[at] + 0 * found.sum()  # NaN anywhere is NaN here
            n = found.shape[1]
            by_kernel = relative_error(y, own[:, :n])
            return relative_error(y, exact[:, :n]) if by_kernel <= KERNEL_TOLERANCE[_family(self.precision)] else math.inf

        return self._as_warm(self.who.linear(held, x), len(held), sequences(m), CONTEXT), error

    # ------------------------------------------------------------ attention

    @functools.cached_property
    def pool(self) -> Pool:
        """The cache that attention reads, filled."""
        return self._pool(self._most_blocks)

    def _blocks_of(self, size: float) -> int:
        return math.ceil(size / self.attention_bytes(self.block_tokens, 1))

    def _pool(self, blocks: int) -> Pool:
        return Pool(self.d, self.who, self.gaussian, blocks=max(2 * RANDOM_BLOCKS, blocks), block_tokens=self.block_tokens)

    def decode(self, context: int, batch: int) -> Task:
        """Return the task of attention of one token in each of some sequences of one length."""
        parameters: dict[str, Scalar] = {"context_tokens": context, "batch": batch, "kv": name_of(self.kv)}
        work = self._attention_work(queries=batch, keys=batch * context, pairs=batch * context)
        make = self._reserved(context, batch, 1)
        return self.task("op.attention.decode", parameters, work, KV_TOLERANCE[name_of(self.kv)], make)

    def prefill(self, context: int) -> Task:
        """Return the task of attention of a prompt's last chunk."""
        chunk = min(CHUNK, context)
        parameters: dict[str, Scalar] = {"context_tokens": context, "chunk_tokens": chunk, "kv": name_of(self.kv)}
        pairs = chunk * (context - chunk) + chunk * (chunk + 1) // 2
        work = self._attention_work(queries=chunk, keys=context, pairs=pairs)
        make = self._reserved(context, 1, chunk)
        return self.task("op.attention.prefill", parameters, work, KV_TOLERANCE[name_of(self.kv)], make)

    def _reserved(self, context: int, batch: int, chunk: int) -> Callable[[], Made]:
        """Return what makes a case, for which the cache will have room: for whole cases, as many as it rotates through."""
        own, apart = batch * -(-context // self.block_tokens), self._apart(context, batch)
        self._most_blocks = max(self._most_blocks, own * apart)
        return functools.partial(self._attend, context, batch, chunk)

    def _attention_work(self, *, queries: int, keys: int, pairs: int) -> Work:
        a = self.d.shape
        inner = a.heads * a.head_dim
        kv_bytes = keys * token_bytes(a, self.kv) / a.layers
        return Work(bytes=kv_bytes + 2 * queries * inner * self.who.act_bytes, flops=4.0 * pairs * inner)

    def attention_bytes(self, context: int, batch: int) -> float:
        """Return what the cache of a case takes."""
        return batch * context * token_bytes(self.d.shape, self.kv) / self.d.shape.layers

    def _apart(self, context: int, batch: int) -> int:
        """Return how many cases on blocks of their own take the bytes that rotate."""
        return math.ceil(self.cold_bytes(batch, context) / self.attention_bytes(context, batch)) or 1

    def _attend(self, context: int, batch: int, chunk: int) -> Made:
        a = self.d.shape
        if self.pool.blocks < self._most_blocks:
            del self.pool  # made for smaller cases than have come since
        pool = self.pool
        steps = (decode_steps(pool, context, batch) if chunk == 1 else prefill_steps(pool, context, chunk))[: self._apart(context, batch)]
        qkv = self.gaussian(batch * chunk, (a.heads + 2 * a.kv_heads) * a.head_dim)
        at = picked(len(qkv))
        exact = torch.stack([attended(self.d, pool, steps[0], qkv, t) for t in at])
        call = self._as_warm(self.who.attend(qkv, steps, pool.cache), len(steps), batch, context)
        return call, lambda found: relative_error(found[at] + 0 * found.sum(), exact)

    def rope_append(self, m: int) -> Task:
        """Return the task of turning queries and keys of so many tokens, and storing keys and values."""
        a = self.d.shape
        width, turned = (a.heads + 2 * a.kv_heads) * a.head_dim, (a.heads + a.kv_heads) * a.head_dim
        stored = m * token_bytes(a, self.kv) / a.layers
        work = Work(bytes=m * (width + a.heads * a.head_dim) * self.who.act_bytes + stored, flops=3.0 * m * turned)
        parameters: dict[str, Scalar] = {"m": m, "kv": name_of(self.kv)}
        return self.task("op.rope_append", parameters, work, ROW_TOLERANCE[self.who.act_bytes], functools.partial(self._place, m))

    @functools.cached_property
    def _scribbled(self) -> Pool:
        """A cache to be written to: what attention is checked against stays as it is."""
        return self._pool(self._blocks_of(self.cold_bytes(1, CONTEXT)))

    def _place(self, m: int) -> Made:
        a, pool = self.d.shape, self._scribbled
        cos, sin = (torch.from_numpy(table) for table in self.d.rope.tables(FIRST_POSITION + m))
        qkv = self.gaussian(m, (a.heads + 2 * a.kv_heads) * a.head_dim)
        positions, slots = np.arange(FIRST_POSITION, FIRST_POSITION + m, dtype=np.int32), pool.slots(m)
        exact = turned(qkv.double(), cos[positions].double(), sin[positions].double(), a.heads + a.kv_heads, a.head_dim)
        return self.who.place(qkv, cos, sin, positions, slots, pool.cache), lambda found: relative_error(found, exact)

    # ------------------------------------------------------------ rows

    def norm(self, m: int) -> Task:
        """Return the task of the residual add and the norm after it."""
        n, act = self.d.shape.hidden, self.who.act_bytes
        work = Work(bytes=m * n * (8.0 + 2 * act), flops=5.0 * m * n)
        return self.task("op.norm", {"m": m, "n": n}, work, ROW_TOLERANCE[act], functools.partial(self._norm, m, n))

    def _norm(self, m: int, n: int) -> Made:
        x, added = self.gaussian(m, n), self.gaussian(m, n)
        both = x.double() + added.double()
        exact = both / (both.square().sum(1, keepdim=True) + n * self.d.norm_eps).sqrt()
        return self.who.norm(x, added), lambda found: relative_error(found, exact)

    def swiglu(self, m: int) -> Task:
        """Return the task of the gated activation."""
        n, act = self.d.shape.ffn, self.who.act_bytes
        work = Work(bytes=3.0 * m * n * act, flops=5.0 * m * n)
        return self.task("op.swiglu", {"m": m, "n": n}, work, ROW_TOLERANCE[act], functools.partial(self._gate, m, n))

    def _gate(self, m: int, n: int) -> Made:
        wide = self.gaussian(m, 2 * n)
        gate, up = wide.double().chunk(2, dim=1)
        is_gelu = self.d.activation == "gelu_tanh"
        exact = (torch.nn.functional.gelu(gate, approximate="tanh") if is_gelu else torch.nn.functional.silu(gate)) * up
        return self.who.gate(wide), lambda found: relative_error(found, exact)

    # ------------------------------------------------------------ ends of a step

    def embedding(self, m: int) -> Task:
        """Return the task of reading rows of the embedding table."""
        hidden, kept = self.d.shape.hidden, formats.precision(self.precision).activations.itemsize
        work = Work(bytes=m * hidden * (kept + 4.0))
        return self.task("op.embedding", {"m": m, "n": hidden}, work, ROW_TOLERANCE[kept], functools.partial(self._embed, m))

    def _embed(self, m: int) -> Made:
        vocab, hidden = self.d.shape.vocab, self.d.shape.hidden
        table = self.gaussian(min(vocab, RANDOM_ROWS), hidden).repeat(-(-vocab // RANDOM_ROWS), 1)[:vocab]
        tokens = np.random.default_rng(0).integers(0, vocab, (max(1, min(1024, vocab // m)), m)).astype(np.int32)
        return self.who.embed(table, tokens), lambda found: relative_error(found, table[tokens[0]].double())

    def sample(self, m: int, policy: str) -> Task:
        """Return the task of choosing tokens, from logits to integers on the host."""
        vocab = self.d.shape.vocab
        work = Work(bytes=4.0 * m * vocab, flops=1.0 * m * vocab)
        return self.task("op.sample", {"m": m, "n": vocab, "policy": policy}, work, 0.0, functools.partial(self._sample, m, policy))

    def _sample(self, m: int, policy: str) -> Made:
        logits = 3 * self.gaussian(m, self.d.shape.vocab)
        placed, rows = logits.to(self.device), [Chosen(POLICIES[policy], seed) for seed in range(m)]
        best = logits.double().sort(dim=1, descending=True)
        before = (
            (best.values / max(POLICIES[policy].temperature, 1e-3))
            .softmax(dim=1)
            .cumsum(dim=1)
            .roll(1, dims=1)
            .index_fill(1, torch.tensor(0), 0)
        )
        kept = (before < POLICIES[policy].top_p).sum(dim=1) if policy == "top_p" else torch.ones(m)

        def error(found: Tensor) -> float:
            rank = (best.indices == found.long()[:, None]).int().argmax(dim=1)
            return float((rank > kept).double().mean())  # a token in a hundred thousand may stand at the very edge

        def choose() -> list[int]:
            return sampler.sample(placed, rows).tokens

        return Call(run=choose, once=lambda: torch.tensor(choose(), dtype=torch.float64)), error


class Chosen(NamedTuple):
    """A request whose token is chosen."""

    sampling: Sampling
    seed: int
    tokens: tuple[int, ...] = (0,)
    given: int = 1


def tokenize(tokenizer: Tokenizer, common: dict[str, Scalar]) -> Task:
    """Return the task of turning a text into tokens."""
    text = Path(argparse.__file__).read_text(encoding="utf-8")[:TEXT_BYTES]
    size = len(text.encode())
    what = Spec(name="op.tokenize", unit="B/s", better="higher", parameters=common | {"bytes": size}, work=Work(bytes=size))
    return timed(
        what, lambda: tokenizer.encode(text), device="cpu", tolerance=0.0,
        check=lambda: float(tokenizer.decode(tokenizer.encode(text)).strip() != text.strip()),
    )  # fmt: skip


# ---------------------------------------------------------------- references


def sequences(m: int) -> int:
    """Return how many sequences the rows of a matrix belong to: each decodes one, or as many as a chunk has are one prompt's."""
    return m if m < CHUNK else 1


def tiled(kept: formats.Logical, n: int) -> formats.Logical:
    """Return a matrix of n rows that repeats the rows of another, in memory of its own."""

    def more(t: Tensor) -> Tensor:
        octets = t.contiguous().view(torch.uint8) if t.dtype.itemsize == 1 else t
        return octets.repeat(-(-n // len(t)), *(1,) * (t.dim() - 1))[:n].contiguous().view(t.dtype)

    tensors = {f.name: more(v) for f in dataclasses.fields(kept) if isinstance(v := getattr(kept, f.name), Tensor)}
    return dataclasses.replace(kept, **tensors)  # type: ignore[arg-type]


def turned(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, head_dim: int) -> Tensor:
    """Return the first heads of each row, turned: pairs are (i, i + rope_dim / 2).  cos, sin: [M, rope_dim / 2]."""
    x = qkv[:, : heads * head_dim].view(len(qkv), heads, head_dim).clone()
    half = cos.shape[1]
    a, b = x[..., :half].clone(), x[..., half : 2 * half].clone()
    c, s = cos[:, None], sin[:, None]
    x[..., :half], x[..., half : 2 * half] = a * c - b * s, b * c + a * s
    return x.flatten(1)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted|; NaN where any is missing."""
    return float((found - wanted).norm() / wanted.norm())


def picked(m: int) -> list[int]:
    """Return a few of m rows, first and last among them."""
    return sorted({round(i * (m - 1) / (CHECKED_ROWS - 1)) for i in range(CHECKED_ROWS)})


def _family(precision: str) -> str:
    return formats.precision(precision).name.partition("g")[0]
