"""Who computes a matrix: `pack` makes of a logical format what the chosen backend reads."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from mlsys_bench import errors
from mlsys_bench.engine import choices, formats, quant
from mlsys_bench.engine.choices import FORMATS, ROWS, Timing
from mlsys_bench.engine.formats import Dense, Logical, Precision, Rows8f
from mlsys_bench.engine.native import library
from mlsys_bench.engine.native import linears as native
from mlsys_bench.engine.quant import Linear

BACKENDS = ("auto", "native", "torch", "triton")
SIDE = 1024  # of the matrix that is measured: more would take more than a second in all
ENOUGH_S = 0.01  # of one backend, format and number of rows
MOST_CALLS = 5


def pack(logical: Logical, precision: str | Precision, device: torch.device, backend: str = "auto") -> Linear:
    """Return the holder of a matrix on a device.  `auto` is whoever was measured to be the fastest here with this format.

    Raises BadInput for a backend that cannot, UnknownName for one that nobody knows.
    """
    if backend not in BACKENDS:
        raise errors.unknown("backend", backend, BACKENDS)
    to = formats.precision(precision) if isinstance(precision, str) else precision
    chosen = choose(logical, to, device) if backend == "auto" else backend
    if chosen == "native":
        return native.pack(logical, to.name)
    if chosen == "triton":
        from mlsys_bench.engine.gpu import linears as gpu

        return gpu.pack(logical, to, device)
    return quant.pack(logical, to, device)


def choose(logical: Logical, precision: Precision, device: torch.device) -> str:
    """Return the backend that `auto` stands for."""
    if device.type == "cuda":
        return "triton"
    if device.type != "cpu" or isinstance(logical, Rows8f):
        return "torch"
    kept = formats.precision("fp32" if logical.weight.dtype == torch.float32 else "bf16") if isinstance(logical, Dense) else precision
    return choices.best(timings(), format_of(kept))


def is_worth_it(precision: Precision) -> bool:
    """Return whether a whole step in C is worth it: with vector instructions always, in plain C where its products were measured faster."""
    return library.level() != "portable" or choices.best(timings(), format_of(precision)) == "native"


def format_of(precision: Precision) -> str:
    """Return the name under which a precision was measured."""
    if precision.weight != "int4":
        return precision.name
    return "w4a8g32" if precision.int8_input else "int4g32"


def timings() -> tuple[Timing, ...]:
    """Return how long products take here, of each backend: measured on first use, a second at most, then out of a file."""
    return choices.known(measure)


def measure() -> tuple[Timing, ...]:
    """Measure every format with every number of rows, backends in turn."""
    return tuple(timing for name in FORMATS for timing in _measure(name))


def _measure(name: str) -> list[Timing]:
    device, weight = torch.device("cpu"), torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    logical = formats.quantise(weight, name)
    holders = (native.pack(logical, name), quant.pack(logical, name, device))
    found = []
    for rows in ROWS:
        x = torch.randn(rows, SIDE)
        native_s, torch_s = _in_turn(*(functools.partial(holder, x) for holder in holders))
        found.append(Timing(format=name, rows=rows, native_s=native_s, torch_s=torch_s))
    return found


def _in_turn(*calls: Callable[[], object]) -> list[float]:
    """Return the shortest time of each call: a disturbed one says nothing about the code."""
    best, began = [float("inf")] * len(calls), time.perf_counter()
    for done in range(MOST_CALLS):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
        if done and time.perf_counter() - began > ENOUGH_S * len(calls):
            break
    return best
