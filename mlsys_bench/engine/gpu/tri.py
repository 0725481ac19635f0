"""Triton, where it is installed; kernels can be named and imported without it, and say what is missing when they are launched.

Triton has no types and its kernels are a language of their own, so this is the only module that touches it: `jit` gives a `Kernel`, which
is launched as `kernel[grid](arguments)`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Protocol

from mlsys_bench.errors import MlsysError

IS_INSTALLED = importlib.util.find_spec("triton") is not None


class Kernel(Protocol):
    """A compiled kernel, waiting for its grid."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        """Return the function that launches it over a grid."""
        ...


class _Absent:
    """What stands for a kernel where there is no Triton."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        raise MlsysError(f"the GPU kernel {self.name} needs Triton, which is not installed; `pip install triton`, or take --backend torch")


triton: Any = importlib.import_module("triton") if IS_INSTALLED else None
tl: Any = importlib.import_module("triton.language") if IS_INSTALLED else None
jit: Callable[[Callable[..., Any]], Any] = triton.jit if IS_INSTALLED else _Absent


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """Return the smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


@functools.cache
def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU, to be tested where there is no GPU."""
    return IS_INSTALLED and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")
