"""Stand-ins for an engine's model: one that lets its logits be seen, and one that computes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from mlsys_bench.engine import Engine
from mlsys_bench.engine.kv import Blocks
from mlsys_bench.engine.runner import Step


@contextlib.contextmanager
def logits_of(engine: Engine) -> Iterator[list[torch.Tensor]]:
    """Collect the logits [sampled, vocab] of every step that is computed inside."""
    model, seen = engine._model, list[torch.Tensor]()

    class Watched:
        backend, weights = model.backend, model.weights

        def forward(self, step: Step, cache: Blocks) -> torch.Tensor:
            seen.append(model.forward(step, cache).clone())
            return seen[-1].clone()

    engine._model = Watched()
    try:
        yield seen
    finally:
        engine._model = model


@contextlib.contextmanager
def absent(engine: Engine, meanwhile: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Have a model that computes nothing stand in: the scheduler seats, grows and ends sequences, and blocks keep what they hold.

    meanwhile: what is done in the place of computing.
    """
    model = engine._model

    class Nobody:
        backend, weights = model.backend, model.weights

        def forward(self, step: Step, cache: Blocks) -> torch.Tensor:
            meanwhile()
            return torch.zeros(len(step.sampled), engine.shape.vocab, device=cache.device)

    engine._model = Nobody()
    try:
        yield
    finally:
        engine._model = model
