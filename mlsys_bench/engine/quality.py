"""What a way of keeping a model costs: loss in bit per byte on text it has not seen, computed by the engine's own kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from mlsys_bench import errors
from mlsys_bench.batching import Limits
from mlsys_bench.engine import build, formats, gptq, spec
from mlsys_bench.engine.build import Loaded
from mlsys_bench.engine.formats import Logical
from mlsys_bench.engine.kv import KVCache, kind_of
from mlsys_bench.engine.model import Model
from mlsys_bench.engine.runner import Step
from mlsys_bench.engine.train import CONTEXT, ByteModel
from mlsys_bench.engine.weights import Quantise, Weights
from mlsys_bench.errors import BadInput

Forward = Callable[[Step], Tensor]
Floats = npt.NDArray[np.float64]
Windows = npt.NDArray[np.int32]  # [W, CONTEXT + 1] tokens
QUANTIZERS = ("rtn", "search", "gptq")
CALIBRATION = 64  # windows of the training text that gptq sees
TOGETHER, BLOCK_TOKENS = 8, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How a model is kept.  quantizer: rtn rounds to the nearest, search tries scales, gptq looks at what inputs do to the outputs."""

    precision: str
    quantizer: str = "rtn"
    kv: str = "auto"


def way(precision: str, quantizer: str = "rtn", kv: str = "auto") -> Way:
    """Return a checked way.  Raises UnknownName; BadInput where a quantizer has nothing to choose."""
    to = formats.precision(precision)
    if quantizer not in QUANTIZERS:
        raise errors.unknown("quantizer", quantizer, QUANTIZERS)
    if quantizer != "rtn" and to.group is None:
        raise BadInput(f"quantizer {quantizer} is for 4 bit, and {precision} is not: leave it out")
    kind_of(kv, precision)  # an unknown one says so
    return Way(precision=to.name, quantizer=quantizer, kv=kv)


def windows(text: bytes, count: int) -> Windows:
    """Return windows that lie evenly in a text: CONTEXT tokens to read, each with the one that follows."""
    data = np.frombuffer(text, dtype=np.uint8).astype(np.int32)
    starts = np.linspace(0, len(data) - CONTEXT - 1, count).astype(np.int64)
    found: Windows = data[starts[:, None] + np.arange(CONTEXT + 1)]
    return found


class Quality:
    """Losses of one trained model, kept in one way after the other."""

    def __init__(self, model: ByteModel, *, count: int = 512, backend: str = "auto", threads: int | None = None) -> None:
        """Take `count` windows of the held-out text."""
        self.model, self.backend, self.threads = model, backend, threads
        self._windows = windows(model.corpus.held_out, count)
        self._tables: dict[int, dict[str, Logical]] = {}  # by group: what gptq made of every matrix

    def losses(self, how: Way) -> Floats:
        """Return the loss of each window, mean bit per byte."""
        model, cache = self._load(how)
        return losses(lambda step: model.forward(step, cache), self._windows)

    def _load(self, how: Way) -> Loaded:
        return build.load(
            self.model.shape, precision=how.precision, device="cpu", limits=_limits(), seed=0, state_dict=self.model.tensors,
            backend=self.backend, kv=how.kv, threads=self.threads, quantise=self._quantise(how),
        )  # fmt: skip

    def _quantise(self, how: Way) -> Quantise | None:
        group = formats.precision(how.precision).group
        if group is None or how.quantizer == "rtn":
            return None
        if how.quantizer == "search":
            return lambda _, weight: _searched(weight, group)
        table = self._calibrated(group)
        return lambda name, _: table[name]

    def _calibrated(self, group: int) -> dict[str, Logical]:
        if group not in self._tables:
            decoder, seen, cpu = spec.plain(self.model.shape), windows(self.model.corpus.train, CALIBRATION), torch.device("cpu")
            cache = KVCache(self.model.shape, blocks=_limits().blocks, block_tokens=BLOCK_TOKENS, dtype=torch.float32, device=cpu)

            def run(held: Weights) -> None:
                model = Model(decoder, held, precision="fp32", max_context=CONTEXT, device=cpu)
                losses(lambda step: model.forward(step, cache), seen)

            self._tables[group] = gptq.decoder(decoder, self.model.tensors, run, group=group)
        return self._tables[group]


def _searched(weight: Tensor, group: int) -> Logical:
    return formats.with_scales(weight, formats.searched_scales4(weight, group, torch.ones(weight.shape[1])), group)


def losses(forward: Forward, seen: Windows) -> Floats:
    """Return the mean loss of each window in bit per byte: each of its tokens but the first, predicted from all before it."""
    return np.concatenate([_losses(forward, seen[i : i + TOGETHER]) for i in range(0, len(seen), TOGETHER)])


def _losses(forward: Forward, seen: Windows) -> Floats:
    logits = forward(step_of(seen[:, :-1])).double()
    wanted = torch.from_numpy(np.ascontiguousarray(seen[:, 1:])).long().flatten()
    nats = functional.cross_entropy(logits, wanted, reduction="none").view(len(seen), -1)
    per_byte: Floats = (nats.mean(dim=1) / np.log(2)).numpy()
    return per_byte


def step_of(tokens: npt.NDArray[np.int32]) -> Step:
    """Return a step that computes whole sequences from their first token on, all logits wanted.  tokens: [S, T]"""
    count, length = tokens.shape
    blocks = -(-length // BLOCK_TOKENS)
    table = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)
    places = np.arange(count * length, dtype=np.int32)
    positions, sequence_of = places % length, places // length
    return Step.of(
        tokens=tokens.flatten(), positions=positions, sequence_of=sequence_of, first=np.arange(count + 1, dtype=np.int32) * length,
        slots=table[sequence_of, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS, block_table=table, sampled=places,
    )  # fmt: skip


def _limits() -> Limits:
    blocks = TOGETHER * CONTEXT // BLOCK_TOKENS
    return Limits(max_seqs=TOGETHER, max_step_tokens=TOGETHER * CONTEXT, block_tokens=BLOCK_TOKENS, blocks=blocks, max_context=CONTEXT)
