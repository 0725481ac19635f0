"""The compiled kernels, loaded once."""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_int32, c_int64, c_void_p
from pathlib import Path

from mlsys_bench import errors
from mlsys_bench.engine.native import build
from mlsys_bench.errors import BadInput

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # cpu.h
F32, BF16, I8, I4 = range(4)  # linear.h


class LinearStruct(ctypes.Structure):
    """`linear_t` of linear.h."""

    _fields_ = (
        ("format", c_int32),
        ("int8_input", c_int32),
        ("n", c_int32),
        ("k", c_int32),
        ("group", c_int32),
        ("weight", c_void_p),
        ("scale", c_void_p),
        ("zero", c_void_p),
        ("start", c_void_p),
        ("bias", c_void_p),
    )


class ActStruct(ctypes.Structure):
    """`act_t` of linear.h."""

    _fields_ = (("x", c_void_p), ("ldx", c_int32), ("m", c_int32), ("room", c_void_p))


_SIGNATURES = {
    "linear_padded_k": (c_int32, c_int32, c_int32, c_int32),
    "act_bytes": (c_int64, POINTER(LinearStruct), c_int32),
    "linear_run": (None, POINTER(LinearStruct), POINTER(ActStruct), c_void_p, c_int32, c_int32),
    "pack_rows": (None, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p),
    "pack_starts": (None, c_void_p, c_int64, c_int64, c_void_p),
    "pack_nibbles": (None, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "pack_groups": (None, c_void_p, c_int64, c_int64, c_int64, c_int64, c_void_p),
    "advise_large_pages": (None, c_void_p, c_int64),
    "cpu_best": (c_int32,),
    "cpu_level": (c_int32,),
    "cpu_use": (c_int32, c_int32),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """Return the kernels, None where they cannot be had: `why_not` says why."""
    found = build.built()
    if found.path is None:
        return None
    try:
        loaded = opened(found.path)
    except OSError:  # on a volume that may not hold programs, for one
        return None
    asked = os.environ.get("MLSYS_NATIVE_LEVEL")
    if asked:
        loaded.cpu_use(level_of(asked))
    return loaded


def opened(path: Path) -> ctypes.CDLL:
    """Return a compiled library whose functions know their arguments."""
    loaded = ctypes.CDLL(str(path))
    for name, (result, *arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def built_path() -> str:
    """Return the file of the compiled kernels."""
    return str(need()._name)


def need() -> ctypes.CDLL:
    """Return the kernels.  Raises BadInput where they cannot be had, with the reason and what works instead."""
    loaded = load()
    if loaded is None:
        raise BadInput(f"the engine's C kernels are not available: {why_not()}; use --backend torch")
    return loaded


def why_not() -> str:
    """Return the reason why `load` gives None, or which compiler made the kernels."""
    found = build.built()
    if found.path is not None:
        try:
            opened(found.path)
        except OSError as error:
            return f"the system does not load them ({error}); set MLSYS_CACHE to a folder that may hold programs"
    return found.detail


def level_of(name: str) -> int:
    """Return the number of a level.  Raises UnknownName."""
    if name not in LEVELS:
        raise errors.unknown("level of the C kernels", name, LEVELS)
    return LEVELS.index(name)


def level() -> str:
    """Return the level that kernels are chosen for: that of the processor, or what MLSYS_NATIVE_LEVEL asks for, if lower."""
    return LEVELS[need().cpu_level()]
