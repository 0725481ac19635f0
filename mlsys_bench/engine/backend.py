"""Which code computes a step: the C kernels, torch, or Triton on a GPU; and a step that computes every token alone."""

from __future__ import annotations

import functools
import os
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from mlsys_bench import errors
from mlsys_bench.engine import formats, linear
from mlsys_bench.engine.kv import name_of
from mlsys_bench.engine.native import library
from mlsys_bench.engine.native import model as native
from mlsys_bench.engine.runner import Step
from mlsys_bench.engine.spec import Decoder
from mlsys_bench.engine.weights import Weights
from mlsys_bench.errors import BadInput

Backend = Literal["native", "torch", "triton"]
BACKENDS = ("auto", "native", "torch", "triton")


class Computes(Protocol):
    """A model as the engine steps it."""

    backend: str
    weights: Weights

    def forward(self, step: Step, cache: Any) -> Tensor:  # each reads a cache of its own layout
        """Compute a step, write its K and V to the cache, and return the fp32 logits [sampled, vocab]."""
        ...


def choose(name: str, d: Decoder, *, precision: str, device: torch.device, kv: torch.dtype, deterministic: bool = False) -> Backend:
    """Return who computes.  Raises BadInput for one that cannot.

    `auto` is Triton on a GPU, and on a CPU native, where that can, unless torch was measured to be much faster here (see `choices`); but
    deterministic, where torch would compute token by token.
    """
    if name not in BACKENDS:
        raise errors.unknown("backend", name, BACKENDS)
    if name == "torch":
        return "torch"
    if name == "triton" or (name == "auto" and device.type == "cuda"):
        from mlsys_bench.engine.gpu.model import misfit  # loads Triton, which the CPU engine never does

        why = misfit(d, device)
        if why is not None and name == "triton":
            raise BadInput(f"backend triton cannot compute {d.shape.id} on {device}: {why}; use --backend torch")
        return "torch" if why else "triton"
    why = native_misfit(d, precision=precision, device=device, kv=kv)
    if why is not None and name == "native":
        raise BadInput(f"backend native cannot compute {d.shape.id} in {precision}: {why}; use --backend torch")
    if why is not None or (name == "auto" and not deterministic and linear.fastest(formats.precision(precision)) == "torch"):
        return "torch"
    return "native"


def prefer_large_pages(name: str, device: torch.device) -> None:
    """Where torch will compute on a CPU, ask it to lay weights on large pages, off which it reads 1.15 times as fast.

    It asks the environment once, at the first tensor of the process: later this does nothing, which costs speed and no more.
    """
    if device.type == "cpu" and (name == "torch" or library.load() is None):
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def native_misfit(d: Decoder, *, precision: str, device: torch.device, kv: torch.dtype) -> str | None:
    """Return what keeps the C kernels from computing this, None where nothing does."""
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    if formats.precision(precision).weight == "fp8":
        return "it has no fp8 matrices"
    if kv not in native.KV_KINDS:
        return f"it has no {name_of(kv)} KV cache"
    return native.misfit(d) or (None if library.load() else library.why_not())


@functools.cache
def threads_at_start() -> int:
    """Return how many threads torch had taken for this process when it was first asked."""
    return torch.get_num_threads()


class OneByOne:
    """A model whose every token is computed by itself: slow, but what a token gets then cannot depend on batch or chunk.

    Matrix products and attention of torch add in another order for other numbers of rows; the C kernels do not and need no such help.
    Tokens go in order of position, so that a sequence finds what another one of the same step writes for both.
    """

    def __init__(self, model: Computes) -> None:
        """Wrap a model."""
        self._model, self.backend, self.weights = model, model.backend, model.weights

    def forward(self, step: Step, cache: Any) -> Tensor:
        """Compute a step token by token, and return the fp32 logits [sampled, vocab]."""
        order = np.argsort(step.positions, kind="stable")
        rows = {int(t): self._model.forward(_only(step, int(t)), cache) for t in order}
        kept = [rows[t] for t in step.sampled.tolist()]
        return torch.cat(kept) if kept else next(iter(rows.values()))[:0]


def _only(step: Step, t: int) -> Step:
    """Return the step of one token, its logits wanted."""
    here, s, zero = slice(t, t + 1), int(step.sequence_of[t]), np.zeros(1, dtype=np.int32)
    return Step.of(
        tokens=step.tokens[here], positions=step.positions[here], slots=step.slots[here], sequence_of=zero,
        first=np.array([0, 1], dtype=np.int32), block_table=step.block_table[s : s + 1], sampled=zero,
    )  # fmt: skip
