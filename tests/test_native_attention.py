"""Paged attention in C by itself: against float64 over random ragged shapes, as compiled for this processor and for lesser ones."""

from __future__ import annotations

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
LEVELS = ["own", "own, without pairs", "x86-64-v3", "x86-64"] if IS_X86 else ["own"]  # v3: AVX2 with FMA; x86-64: no more than SSE2
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
    if level.startswith("own"):
        return library.need()
    compiler = build.find_compiler()
    assert compiler is not None, "there was one a moment ago"
    folder = tempfile.mkdtemp()
    target = Path(folder) / "attention.so"
    flags = [*(flag for flag in build.FLAGS if flag not in ("-O3", "-shared")), "-O1", "-shared", f"-march={level}"]  # -O3 takes seconds
    files = [str(build.SOURCE / name) for name in ("attention.c", "attention_products.c", "attention_tile.c", "kv.c")]
    subprocess.run([compiler, *flags, *files, "-o", str(target), "-lm"], check=True, capture_output=True)
    loaded = ctypes.CDLL(str(target))
    shutil.rmtree(folder)
    return loaded


@contextmanager
def at(level: str) -> Iterator[None]:
    """Keep the processor from multiplying pairs of bf16, where that is what the level says."""
    if level != "own, without pairs":
        yield
        return
    c = library.need()
    before = c.cpu_level()
    c.cpu_use(min(before, library.level_of("avx512")))
    yield
    c.cpu_use(before)


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


def to_bf16(x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Round to the nearest bf16, ties to even."""
    bits = x.view(np.uint32).astype(np.int64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


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
        with at(level):
            return self._run(functions(level), threads)

    def _run(self, c: ctypes.CDLL, threads: int) -> npt.NDArray[np.float32]:
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

    def wanted(self, *, rounds_queries: bool = False) -> tuple[Floats, Floats]:
        """Return the same in float64, and what a rounding of all weights by 1 could change of it."""
        outs, changes = [], []
        for s, kv in enumerate(self.kv):
            k, v = (self.kept(kv[:, i].astype(np.float64)).repeat(self.heads // self.kv_heads, axis=1).swapaxes(0, 1) for i in (0, 1))
            here = slice(self.first[s], self.first[s + 1])
            q = np.float32(0.2) * self.q[here].reshape(-1, self.heads, self.d)
            q = (to_bf16(q) if rounds_queries else q).astype(np.float64).swapaxes(0, 1)
            scores = q @ k.swapaxes(1, 2)  # [heads, tokens, keys]
            scores = self.softcap * np.tanh(scores / self.softcap) if self.softcap else scores
            distance = self.position[here, None] - np.arange(k.shape[1])
            scores[:, (distance < 0) | ((distance >= self.window) if self.window else False)] = -np.inf
            weight = np.exp(scores - scores.max(axis=2, keepdims=True))
            weight /= weight.sum(axis=2, keepdims=True)
            out = weight @ v
            outs.append(out.swapaxes(0, 1).reshape(-1, self.heads * self.d))
            changes.append((weight @ np.abs(v) + np.abs(out)).swapaxes(0, 1).reshape(-1, self.heads * self.d))
        return np.concatenate(outs), np.concatenate(changes)

    def kept(self, x: Floats) -> Floats:
        """Return what the cache keeps of keys or values [keys, kv_heads, head_dim]."""
        if self.format == 0:
            return x
        if self.format == 1:
            return to_bf16(x.astype(np.float32)).astype(np.float64)
        scale = np.abs(x).max(axis=-1, keepdims=True) / 127
        return np.asarray(np.round(x / scale) * scale)


def has_pairs(level: str) -> bool:
    """Return whether bf16 is multiplied in pairs."""
    return level == "own" and bool(library.need().cpu_has_pairs())


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 9), is_bf16=st.booleans())
@settings(max_examples=12, deadline=None)
def test_attention_agrees_with_float64(level: str, seed: int, threads: int, is_bf16: bool) -> None:
    """Weights sum to 1, values are a few units: 1e-5 is some forty roundings of fp32.  In pairs weights are rounded by 2^-8 at most."""
    case = Case(seed, int(is_bf16))
    want, change = case.wanted(rounds_queries=is_bf16 and has_pairs(level))
    allowed = 1e-5 + (2**-8 * change if is_bf16 and has_pairs(level) else 0)
    assert (np.abs(case.run(level, threads) - want) <= allowed).all()


@pytest.mark.parametrize("level", LEVELS)
@given(seed=st.integers(0, 2**32 - 1), threads=st.integers(1, 9))
@settings(max_examples=8, deadline=None)
def test_attention_to_int8_agrees_with_float64(level: str, seed: int, threads: int) -> None:
    """Queries and weights are rounded by 1 / 65,000 of the largest; seldom one element of the cache falls on the other side, by 1 / 127."""
    case = Case(seed, 2)
    error = np.abs(case.run(level, threads) - case.wanted()[0])
    assert error.mean() < 1e-4
    assert error.max() < 0.03


@pytest.mark.parametrize("format_", range(3))
def test_what_is_no_number_is_not_hidden_and_harms_no_other(format_: int) -> None:
    """A query of NaN, then a key, then a value: in its own row or head, and nowhere else."""
    case = Case(5, format_)
    clean, rows = case.run("own", 1), len(case.q)
    case.q[0, 3] = np.nan
    broken = case.run("own", 1)
    assert np.isnan(broken[0, : case.d]).all()
    assert np.array_equal(broken[0, case.d :], clean[0, case.d :])
    assert np.array_equal(broken[1:], clean[1:])
    for part in (0, 1):
        case = Case(5, format_)
        case.kv[0][-1, part, 0, 1] = np.nan  # seen by the last query of the first sequence alone
        broken = case.run("own", 1)
        last = int(case.first[1]) - 1
        assert np.isnan(broken[last, 1])
        others = np.arange(rows) != last
        assert np.array_equal(broken[others], clean[others])


@given(seed=st.integers(0, 2**32 - 1), format_=st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_threads_that_share_a_context_change_no_bit(seed: int, format_: int) -> None:
    case = Case(seed, format_)
    assert np.array_equal(case.run("own", 1), case.run("own", 40))
