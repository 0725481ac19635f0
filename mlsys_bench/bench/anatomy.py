"""A decode step taken apart by the engine's own clock: `engine.part`.

    step      all of it
    linears   products with weights, the rounding of their inputs and the wait for the last thread among them
    between   everything else inside the model: norms, rope, attention, gates, the embedding
    host      outside the model: the scheduler, the step's arrays, the choice of tokens

The last three add up to the step, sample by sample.  `mlsys_bench.anatomy` holds them against operators that were timed alone; like these,
they have no neighbour on the next core.  One operator is measured here: `engine.host`, a step whose model only reads as much memory as
a real one, so that caches hold as little of Python; the time of that does not count, as the clock does not count a model's.

Where the model does not tell its products apart (torch), `model` stands for the first two; on a GPU nothing is known before all of it ends,
and there is only `step`.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mlsys_bench.anatomy import HOST, PART, WHOLE
from mlsys_bench.bench.alone import kernels, products
from mlsys_bench.bench.harness import COLD, Sampled, Spec, Task, cache_bytes
from mlsys_bench.bench.stand_ins import absent
from mlsys_bench.bench.steps import Bench, fits
from mlsys_bench.engine.native.linears import NativeLinear
from mlsys_bench.types import Scalar

ALONE: dict[str, Scalar] = {"companion": False}
MOST_READ_BYTES = 2**28
WARM_STEPS = 2  # the first steps after a change are not like the others


class Watched:
    """A model that notes the time of each of its steps, and of the products in it."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.seen: list[tuple[float, float]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, *given: Any) -> Tensor:
        """Compute a step."""
        linears_s, begun_s = products_s(self._model), time.perf_counter()
        logits: Tensor = self._model.forward(*given)
        self.seen.append((time.perf_counter() - begun_s, products_s(self._model) - linears_s))
        return logits


def reader(bench: Bench, batch: int, context: int) -> Callable[[], object]:
    """Return what reads as a decode step of such sequences does, no more than caches hold several times.

    A model in C multiplies with its own matrices, the last of a step, and its cache is read; for others it is as many bytes of anything.
    """
    engine, threads, c = bench.engine, int(bench.parameters.get("threads") or 1), kernels()
    size = min(bench.work(batch, batch * context, 0, 0, batch).bytes, COLD * cache_bytes(), MOST_READ_BYTES)
    weights = engine._model.weights
    matrices = [*(linear for layer in weights.layers for linear in layer.linears()), weights.head]
    packed = [linear for linear in matrices if isinstance(linear, NativeLinear)]
    if c is None or len(packed) < len(matrices):
        return torch.ones(int(size) // 4).sum
    cached = engine._cache.raw.flatten()[: int(min(size, batch * context * bench.token_bytes))]
    multiply = products(_last(packed, size - cached.numel()), batch, threads)

    def read() -> object:
        multiply()
        return c.alone_read(cached.data_ptr(), cached.numel() // 64 * 16, threads)

    return read


def _last(matrices: Sequence[NativeLinear], size: float) -> list[NativeLinear]:
    """Return the last of these that have so many bytes together, at least one."""
    found: list[NativeLinear] = []
    for linear in reversed(matrices):
        found.insert(0, linear)
        size -= sum(t.numel() * t.element_size() for t in linear.tensors())
        if size <= 0:
            break
    return found


def products_s(model: Any) -> float:
    """Return the seconds a model has spent in products with weights, 0 for one that does not count them."""
    return float(getattr(model, "linears_s", 0.0))


def names(model: Any, device: str = "cpu") -> tuple[str, ...]:
    """Return the parts that a model's steps can be taken into."""
    if device != "cpu":
        return (WHOLE,)
    return (WHOLE, "linears", "between", "host") if hasattr(model, "linears_s") else (WHOLE, "model", "host")


def tasks(bench: Bench) -> list[Task]:
    """Return two tasks per batch and context of the suite that fits the engine: the step with its parts, and what the host takes of it."""
    return list(_tasks(bench))


def _tasks(bench: Bench) -> Iterator[Task]:
    limits, count = bench.engine.limits, bench.suite.decode_steps
    extra = count + WARM_STEPS + 2
    for batch, context in bench.suite.anatomy:
        if batch > limits.max_seqs or not fits(limits, [context + extra] * batch):
            continue
        specs = tuple(
            _part(bench.spec((batch, batch * context, 0, 0, batch)), name) for name in names(bench.engine._model, bench.engine.device)
        )
        cost_s = 1.5 * extra * bench.decode_s
        yield Task(specs=specs, visit=_visit(bench, batch, context, count), cost_s=cost_s)
        yield _host(bench, batch, context, count)


def _host(bench: Bench, batch: int, context: int, count: int) -> Task:
    parameters: dict[str, Scalar] = bench.parameters | ALONE | {"m": batch, "context_tokens": context}
    spec, read = Spec(name=HOST, unit="s", better="lower", parameters=parameters), functools.cache(lambda: reader(bench, batch, context))

    def visit() -> list[Sampled]:
        ids = bench.lay([max(1, context - count // 2)] * batch)
        with absent(bench.engine, read()):
            bench.engine.step()  # from here on each step begins with caches that the one before has emptied
            (_, whole), seen = _watched(bench, count)
        bench.drop(ids)
        return [(spec, dataclasses.replace(whole, values=parts_of(whole.values, seen, ("host",))["host"], cpu_s=None))]

    return Task(specs=(spec,), visit=visit, cost_s=(count + 1) * bench.decode_s)


def _part(step: Spec, name: str) -> Spec:
    return Spec(
        name=PART, unit="s", better="lower", parameters=step.parameters | ALONE | {"part": name}, work=step.work if name == WHOLE else None
    )


def _visit(bench: Bench, batch: int, context: int, count: int) -> Callable[[], list[Sampled]]:
    """Return what times steps around a context, by the engine's own count of it."""

    def visit() -> list[Sampled]:
        ids = bench.lay([max(1, context - WARM_STEPS - 2 - count // 2)] * batch)
        for _ in range(WARM_STEPS):
            bench.engine.step()
        (spec, whole), seen = _watched(bench, count)
        bench.drop(ids)
        parts = parts_of(whole.values, seen, names(bench.engine._model, bench.engine.device))
        rounds = {name: whole if name == WHOLE else dataclasses.replace(whole, values=values, cpu_s=None) for name, values in parts.items()}
        return [(_part(spec, name), taken) for name, taken in rounds.items()]

    return visit


def _watched(bench: Bench, count: int) -> tuple[Sampled, list[tuple[float, float]]]:
    engine, model = bench.engine, bench.engine._model
    watched = Watched(model)
    engine._model = watched
    try:
        return bench.timed(count), watched.seen
    finally:
        engine._model = model


def parts_of(steps_s: Sequence[float], seen: Sequence[tuple[float, float]], parts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Return the parts of each step, given the seconds of its model and of the products in it."""
    each = {
        WHOLE: list(steps_s),
        "linears": [products for _, products in seen],
        "between": [model - products for model, products in seen],
        "model": [model for model, _ in seen],
        "host": [whole - model for whole, (model, _) in zip(steps_s, seen, strict=True)],
    }
    return {name: tuple(each[name]) for name in parts}
