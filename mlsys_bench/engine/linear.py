"""Who computes matrices here: which backend is the faster for a precision, measured once a machine, and what it makes of a matrix."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from mlsys_bench.engine import choices, formats, quant
from mlsys_bench.engine.choices import FORMATS, ROWS, Timing
from mlsys_bench.engine.formats import Precision
from mlsys_bench.engine.native import linears as native
from mlsys_bench.engine.weights import Pack

SIDE = 1024  # of the matrix that is measured: more would take more than a second in all
ENOUGH_S = 0.01  # of one backend, format and number of rows
MOST_CALLS = 5


def packer(backend: str, precision: str, device: torch.device) -> Pack | None:
    """Return what a backend makes of a matrix, None for what torch does."""
    if backend == "native":
        return lambda logical: native.pack(logical, precision)
    if backend == "triton":
        from mlsys_bench.engine.gpu import linears  # loads Triton

        return linears.packer(precision, device)
    return None


def fastest(precision: Precision) -> str:
    """Return who is to compute on a CPU that has the C kernels: `native`, or `torch` where its products were measured to be much faster."""
    return choices.best(timings(), format_of(precision))


def format_of(precision: Precision) -> str:
    """Return the name under which a precision was measured."""
    if precision.weight != "int4":
        return precision.name
    return "w4a8g32" if precision.int8_input else "int4g32"


def timings() -> tuple[Timing, ...]:
    """Return how long products take here, of each backend: measured on first use, half a second, then out of a file."""
    return choices.known(measure)


def measure() -> tuple[Timing, ...]:
    """Measure every format with every number of rows, backends in turn.

    By the CPU time of one thread: it does not depend on what else the machine does, and the engine may be starting on a busy one.
    """
    with _one_thread():
        return tuple(timing for name in FORMATS for timing in _measure(name))


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
    """Return the shortest time of each call: caches that others emptied say nothing about the code."""
    best, began = [float("inf")] * len(calls), time.thread_time()
    for done in range(MOST_CALLS):
        for i, call in enumerate(calls):
            start = time.thread_time()
            call()
            best[i] = min(best[i], time.thread_time() - start)
        if done and time.thread_time() - began > ENOUGH_S * len(calls):
            break
    return best
