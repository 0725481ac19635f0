"""Pieces of work for other processes, which import them by this module's own name: a stranger's package may be called `tests`, too."""

from __future__ import annotations

import multiprocessing
import os
import time

import numpy as np

from mlsys_bench.errors import Overload


def drawn(scale: float, seed: int) -> float:
    """Return a sum that depends on a seed alone."""
    return float(np.random.default_rng(seed).gamma(0.7, scale, 1000).sum())


def refusing(limit: float, item: int) -> int:
    """Fail from an item on."""
    if item >= limit:
        raise Overload(float(item), servers=1, enough=item)
    return item


def dying(shared: None, item: int) -> int:
    """Take the worker along, as the system does when memory runs out."""
    if multiprocessing.parent_process() is not None:
        os._exit(9)
    return item


def of_process(shared: None, item: int) -> int:
    """Return who does it."""
    return os.getpid()


def first_of(shared: np.ndarray, item: int) -> tuple[int, float]:
    """Return who does it, and something of what is shared."""
    return id(shared), float(shared[item])


_BEGUN: list[int] = []  # by this process


def slow_but_first(shared: None, item: int) -> int:
    """Take a while, counted."""
    _BEGUN.append(item)
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        sum(range(1000))
    return item


def begun(shared: None, item: int) -> tuple[int, int]:
    """Return which process this is, and how many pieces of `slow_but_first` it has begun."""
    return os.getpid(), len(_BEGUN)
