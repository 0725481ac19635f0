"""Paged attention in C by itself: against float64 over random ragged shapes, as compiled for this processor and for lesser ones."""

from __future__ import annotations

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsys_bench.engine.native import build, library
from mlsys_bench.engine.native.model import CacheStruct

pytestmark = pytest.mark.skipif(library.load() is None, reason="no C compiler on this machine")
IS_X86 = platform.machine() in ("x86_64", "AMD64")
LEVELS = ["own", "x86-64-v3"] if IS_X86 else ["own"]  # v3: AVX2 with FMA
Floats = npt.NDArray[np.float64]


class AttendStruct(ctypes.Structure):
    """`attend_t` of attention.h."""

    _fields_ = (
        ("q", c_void_p),
        ("out", c_void_p),
        *((name, c_int32) for name in ("ldq", "ldo", "heads", "tokens", "sequences", "width")),
        *((name, c_void_p) for name in ("position", "first", "block_table")),
        ("window", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
    )


@functools.cache
def compiled(level: str) -> ctypes.CDLL:
    """Return attention as compiled for a level."""
    if level == "own":
        return library.need()
    compiler = build.find_compiler()
    assert compiler is not None, "there was one a moment ago"
    folder = tempfile.mkdtemp()
    target = Path(folder) / "attention.so"
    flags = [*(flag for flag in build.FLAGS if flag not in ("-O3", "-shared")), "-O1", "-shared", f"-march={level}"]  # -O3 takes seconds
    files = [str(build.SOURCE / name) for name in ("attention.c", "kv.c")]
    subprocess.run([compiler, *flags, *files, "-o", str(target), "-lm"], check=True, capture_output=True)
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


def functions(level: str) -> ctypes.CDLL:
    c = compiled(level)
    c.kv_block_bytes.restype, c.kv_block_bytes.argtypes = c_int64, (c_int32, c_int32, c_int32, c_int32)
    c.kv_write.restype, c.kv_write.argtypes = None, (POINTER(CacheStruct), c_int32, c_int32, c_int32, c_void_p, c_void_p)
    c.attention_floats.restype, c.attention_floats.argtypes = c_int64, (c_int32,)
    c.attention_shared_floats.restype, c.attention_shared_floats.argtypes = c_int64, (c_int32, c_int32)
    c.attention_is_split.argtypes = (POINTER(AttendStruct), POINTER(CacheStruct), c_int32)
    c.attend.restype = c.attend_merge.restype = None
    c.attend.argtypes = (POINTER(AttendStruct), POINTER(CacheStruct), c_int32, c_int32, c_void_p, c_void_p, c_void_p)
    c.attend_merge.argtypes = (POINTER(AttendStruct), POINTER(CacheStruct), c_void_p, c_int32, c_int32)
    return c


class Case:
    """Some sequences with a past, blocks anywhere, NaN wherever nothing was written."""

    def __init__(self, seed: int, format_: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.kv_heads, self.block_tokens = int(rng.integers(1, 4)), int(rng.choice([1, 3, 16, 32]))
        self.heads, self.d = self.kv_heads * int(rng.integers(1, 6)), int(rng.choice([8, 16, 20, 64, 96]))
        self.window, self.softcap = int(rng.choice([0, 0, 1, 50, 200])), float(rng.choice([0, 0, 4.0]))
        self.new = rng.choice([1, 1, 2, 30], size=int(rng.integers(1, 4)))
        self.past = rng.choice([0, 5, 63, 64, 500, 1100], size=len(self.new))
        self.format = format_
        self.first = np.concatenate([[0], self.new.cumsum()]).astype(np.int32)
        self.position = np.concatenate([p + np.arange(n) for p, n in zip(self.past, self.new, strict=True)]).astype(np.int32)
        self.width = -(-int((self.past + self.new).max()) // self.block_tokens)
        self.table = rng.permutation(len(self.new) * self.width).reshape(len(self.new), -1).astype(np.int32)
        self.q = rng.standard_normal((len(self.position), self.heads * self.d), dtype=np.float32)
        self.kv = [
            rng.standard_normal((int(p + n), 2, self.kv_heads, self.d), dtype=np.float32) for p, n in zip(self.past, self.new, strict=True)
        ]

    def run(self, level: str, threads: int) -> npt.NDArray[np.float32]:
        """Return what attention gives: [T, heads head_dim]."""
        c = functions(level)
        block_bytes = c.kv_block_bytes(self.format, self.block_tokens, self.kv_heads, self.d)
        data = np.full(self.table.size * block_bytes + 64, 255, dtype=np.uint8)  # NaN, in fp32, bf16 and scales
        cache = CacheStruct(data.ctypes.data, 0, block_bytes, self.format, self.block_tokens, self.kv_heads, self.d)
        for s, kv in enumerate(self.kv):
            for at, (k, v) in enumerate(kv):
                slot = int(self.table[s, at // self.block_tokens]) * self.block_tokens + at % self.block_tokens
                for h in range(self.kv_heads):
                    c.kv_write(cache, 0, slot, h, k[h].ctypes.data, v[h].ctypes.data)
        out = np.full_like(self.q, np.nan)
        work = AttendStruct(
            self.q.ctypes.data, out.ctypes.data, self.q.shape[1], self.q.shape[1], self.heads, len(self.position), len(self.new),
            self.width, self.position.ctypes.data, self.first.ctypes.data, self.table.ctypes.data, self.window, 0.2, self.softcap,
        )  # fmt: skip
        own = np.full(c.attention_floats(self.d), np.nan, dtype=np.float32)
        shared = np.full(max(1, c.attention_shared_floats(threads, self.d)), np.nan, dtype=np.float32)
        split, taken = c.attention_is_split(work, cache, threads), c_int32(0)
        c.attend(work, cache, 0, split, ctypes.byref(taken), own.ctypes.data, shared.ctypes.data)
        for i in range(threads if split else 0):
            c.attend_merge(work, cache, shared.ctypes.data, i, threads)
        return out

    def wanted(self) -> Floats:
        """Return the same in float64."""
        parts = []
        for s, kv in enumerate(self.kv):
            k, v = (self.kept(kv[:, i].astype(np.float64)).repeat(self.heads // self.kv_heads, axis=1).swapaxes(0, 1) for i in (0, 1))
            here = slice(self.first[s], self.first[s + 1])
            q = self.q[here].reshape(-1, self.heads, self.d).astype(np.float64).swapaxes(0, 1)
            scores = 0.2 * q @ k.swapaxes(1, 2)  # [heads, tokens, keys]
            scores = self.softcap * np.tanh(scores / self.softcap) if self.softcap else scores
            distance = self.position[here, None] - np.arange(k.shape[1])
            scores[:, (distance < 0) | ((distance >= self.window) if self.window else False)] = -np.inf
            weight = np.exp(scores - scores.max(axis=2, keepdims=True))
            out = weight / weight.sum(axis=2, keepdims=True) @ v
            parts.append(out.swapaxes(0, 1).reshape(-1, self.heads * self.d))
        return np.concatenate(parts)

    def kept(self, x: Floats) -> Floats:
        """Return what the cache keeps of keys or values [keys, kv_heads, head_dim]."""
        if self.format == 0:
            return x
        if self.format == 1:
            bits = x.astype(np.float32).view(np.uint32).astype(np.int64)
            return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)
        scale = np.abs(x).max(axis=-1, keepdims=True) / 127
        return np.asarray(np.round(x / scale) * scale)


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 2**32 - 1), format_=st.integers(0, 2), threads=st.integers(1, 9))
@settings(max_examples=15, deadline=None)
def test_attention_agrees_with_float64(level: str, seed: int, format_: int, threads: int) -> None:
    """Weights sum to 1 and values are a few units: 1e-5 is some forty roundings of fp32; one step of int8 may fall on the other side."""
    case = Case(seed, format_)
    assert np.abs(case.run(level, threads) - case.wanted()).max() < (1e-5 if format_ < 2 else 0.03)


@given(seed=st.integers(0, 2**32 - 1), format_=st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_threads_that_share_a_context_change_no_bit(seed: int, format_: int) -> None:
    case = Case(seed, format_)
    assert np.array_equal(case.run("own", 1), case.run("own", 40))
