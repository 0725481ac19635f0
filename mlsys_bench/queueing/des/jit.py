"""`compiled`: kernels written once, compiled by numba where it is installed (extra `fast`), plain Python where it is not.

Only `des` imports this module, so `import mlsys_bench.queueing` never pays for numba.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

Kernel = TypeVar("Kernel", bound=Callable[..., Any])
Room = Any  # what a kernel reads and writes: a 1-D array where it is compiled, a list in plain Python (four times as fast to index there)

HAVE_NUMBA = importlib.util.find_spec("numba") is not None and os.environ.get("NUMBA_DISABLE_JIT", "0") in ("", "0")


def compiled(kernel: Kernel) -> Kernel:
    """Return the kernel compiled on its first call, free of the interpreter lock, and kept on disk between sessions.

    Kernels may call each other.  Without numba, or with NUMBA_DISABLE_JIT=1, they are returned as they are.
    """
    if not HAVE_NUMBA:
        return kernel
    import numba

    try:
        fast = numba.njit(cache=True, nogil=True)(kernel)
    except RuntimeError:  # nowhere to keep it: neither beside the source nor in the user's cache may be written
        fast = numba.njit(nogil=True)(kernel)
    return cast(Kernel, fast)
