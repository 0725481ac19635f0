"""Operators of a step by themselves, as the engine's own code computes them: who does it (`computes`), and what one can be asked for.

    native   the C kernels, several times in one run of their threads, a barrier after each as in a step (`csrc/alone.h`)
    torch    the holders and functions that `Model` calls
    triton   the GPU's kernels, launched as a captured graph, as a decode step is

A `Call` is an operator with everything it needs.  Weights and blocks of the cache rotate, so that caches hold of them no more than in a
step; activations are as warm as there, where they have just been computed.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_double, c_float, c_int32, c_int64, c_void_p
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mlsys_bench.bench.copies import Shared, pieces
from mlsys_bench.bench.harness import COLD, MEMORY_SHARE, cache_bytes, free_bytes
from mlsys_bench.bench.telemetry import Core
from mlsys_bench.engine import backend, formats, quant
from mlsys_bench.engine.kv import Blocks
from mlsys_bench.engine.native import library
from mlsys_bench.engine.native import linears as native
from mlsys_bench.engine.native.library import ActStruct, LinearStruct
from mlsys_bench.engine.native.model import KV_KINDS, CacheStruct
from mlsys_bench.engine.runner import Int32, Step
from mlsys_bench.engine.spec import Decoder

CALL_S = 200e-6  # a call repeats a short operator until it lasts about so long: entering C from Python costs some 3 us
MOST_TIMES = 2000
PAGE_BYTES = 4096


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """An operator to be timed: `run` computes it `times` times; `once` once over a poisoned output, and gives what came in float64.

    before: what is done ahead of each visit, for caches to hold what the step before would have left there.
    """

    run: Callable[[], object]
    once: Callable[[], Tensor]
    times: int = 1
    before: Callable[[], object] | None = None


class Computes(Protocol):
    """Who computes single operators.  Inputs are fp32; each takes them in the type in which a step would have them."""

    backend: str
    act_bytes: int  # of an activation

    def pack(self, logical: formats.Logical) -> quant.Linear:
        """Return a matrix as it is multiplied with."""

    def copy(self, first: quant.Linear, number: int, again: Callable[[], formats.Logical]) -> quant.Linear:
        """Return a matrix of the shape of another, the first, in memory apart from it and from copies of other numbers, counted from 1.

        What it holds takes as long to multiply with, but need not be what `again` gives.
        """

    def linear(self, held: Sequence[quant.Linear], x: Tensor) -> Call:
        """Multiply x [M, K] with each of the matrices in turn."""

    def norm(self, x: Tensor, added: Tensor) -> Call:
        """RMSNorm of x + added, both [M, hidden], without gain and sqrt(hidden)."""

    def gate(self, wide: Tensor) -> Call:
        """silu(gate) * up of [M, 2 ffn]."""

    def embed(self, table: Tensor, tokens: Int32) -> Call:
        """Read the rows of the table [vocab, hidden] that one row of tokens [count, M] after the other names."""

    def cache(self, blocks: int, block_tokens: int) -> Blocks:
        """Return the cache of one layer."""

    def place(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Int32, slots: Int32, cache: Blocks) -> Call:
        """Turn q and k of qkv [M, width] in place, store k and v to one row of slots [count, M] after the other; gives qkv's q and k."""

    def attend(self, qkv: Tensor, steps: Sequence[Step], cache: Blocks) -> Call:
        """Let q of qkv [M, width] see the cache through one step's block table after the other: [M, heads head_dim]."""


def computes(
    d: Decoder, *, precision: str, kv: torch.dtype, device: torch.device, asked: str, threads: int, deterministic: bool = False
) -> Computes:
    """Return who computes a decoder in a precision here, as the engine would choose.  Raises BadInput for a backend that cannot."""
    chosen = backend.choose(asked, d, precision=precision, device=device, kv=kv, deterministic=deterministic)
    if chosen == "native":
        return Native(d, precision=precision, kv=kv, threads=threads)
    if chosen == "triton":
        from mlsys_bench.bench.alone_gpu import Triton

        return Triton(d, precision=precision, kv=kv, device=device)
    from mlsys_bench.bench.alone_torch import Torch

    return Torch(d, precision=precision, kv=kv, device=device)


def poisoned(out: Tensor, compute: Callable[[], object]) -> Tensor:
    """Return what is in `out` after computing, having filled it with NaN before."""
    out.fill_(torch.nan)
    compute()
    return out.detach().to("cpu", torch.float64, copy=True)


# ---------------------------------------------------------------- the C kernels


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


class PlaceStruct(ctypes.Structure):
    """`place_t` of alone.h."""

    _fields_ = (
        ("qkv", c_void_p),
        *((name, c_int32) for name in ("m", "heads", "rope_dim", "count")),
        *((name, c_void_p) for name in ("position", "slot", "cos", "sin")),
    )


class CoreStruct(ctypes.Structure):
    """`core_t` of alone.h."""

    _fields_ = (("crowding", c_double), ("clock_hz", c_double))


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "alone_linear": (None, POINTER(LinearStruct), c_int32, c_int32, POINTER(ActStruct), c_void_p, c_int32, c_int32),
    "alone_norm": (None, c_void_p, c_void_p, c_void_p, c_int32, c_int32, c_float, c_int32, c_int32),
    "alone_gate": (None, c_void_p, c_void_p, c_int32, c_int32, c_int32, c_int32, c_int32),
    "alone_place": (None, POINTER(PlaceStruct), POINTER(CacheStruct), c_int32, c_int32, c_int32),
    "alone_attend_floats": (c_int64, c_int32, c_int32, c_int32),
    "alone_attend": (None, POINTER(AttendStruct), c_int32, c_int32, POINTER(CacheStruct), c_int32, c_int32, c_void_p),
    "alone_embed": (None, c_void_p, c_void_p, c_int32, c_void_p, *(c_int32,) * 6),
    "alone_nothing": (None, c_int32, c_int32),
    "alone_read": (c_double, c_void_p, c_int64, c_int32),
    "alone_copy": (None, c_void_p, c_void_p, c_int64, c_int32),
    "alone_triad": (None, c_void_p, c_void_p, c_void_p, c_float, c_int64, c_int32),
    "alone_core": (CoreStruct, c_int32),
}


@functools.cache
def kernels() -> ctypes.CDLL | None:
    """Return the C kernels with what is measured of them, None where they cannot be had: `library.why_not` says why."""
    loaded = library.load()
    for name, (result, *arguments) in _SIGNATURES.items() if loaded is not None else ():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def core(threads: int) -> Callable[[], Core] | None:
    """Return what looks at the cores of so many threads (csrc/alone.h), None where nothing can tell.  It takes 15 us."""
    c = kernels()
    if c is None or not c.alone_core(threads).crowding:
        return None

    def look() -> Core:
        seen = c.alone_core(threads)
        return Core(seen.crowding, seen.clock_hz or None)

    return look


class Native:
    """The C kernels."""

    backend, act_bytes = "native", 4

    def __init__(self, d: Decoder, *, precision: str, kv: torch.dtype, threads: int) -> None:
        c = kernels()
        assert c is not None, "chosen by backend.choose"
        self._c, self._d, self._precision, self._kv, self._threads = c, d, precision, kv, threads
        self._shared = Shared(int(min(COLD * cache_bytes(), MEMORY_SHARE * free_bytes())))

    def pack(self, logical: formats.Logical) -> native.NativeLinear:
        """Return a packed matrix."""
        return native.pack(logical, self._precision)

    def copy(self, first: quant.Linear, number: int, again: Callable[[], formats.Logical]) -> native.NativeLinear:
        """Return a matrix in memory that copies of all shapes share: only one shape at a time is gone through."""
        del again
        assert isinstance(first, native.NativeLinear), "made by `pack`"
        return self._shared.copy(first, number)

    def linear(self, held: Sequence[quant.Linear], x: Tensor) -> Call:
        """Multiply.  Ahead of a visit all of them are read, up to where it will begin: others go through the same memory in between."""
        packed = [h for h in held if isinstance(h, native.NativeLinear)]
        structs = [h.struct for h in packed]
        many, m = (LinearStruct * len(structs))(*structs), len(x)
        y = torch.empty(m, many[0].n)
        room = native.aligned(self._c.act_bytes(many[0], m))
        act = ActStruct(x=x.data_ptr(), ldx=x.stride(0), m=m, room=room.data_ptr())
        held_here = (held, x, room)

        def compute(first: int, times: int) -> object:
            self._c.alone_linear(many, len(many), first % len(many), act, y.data_ptr(), self._threads, times)
            return held_here

        def read_all(first: int) -> None:
            for address, size in pieces(packed, first % len(many)):
                self._c.alone_read(address, size // 4, self._threads)

        return _repeated(compute, y, read_all)

    def norm(self, x: Tensor, added: Tensor) -> Call:
        """Add and norm; what is added again and again while timed is 0."""
        (stream, out, y), (m, n) = _side_by_side(x, torch.zeros_like(x), torch.zeros_like(x)), x.shape

        def compute(first: int, times: int) -> None:
            self._c.alone_norm(y.data_ptr(), stream.data_ptr(), out.data_ptr(), m, n, self._d.norm_eps, self._threads, times)

        call = _repeated(compute, y)

        def once() -> Tensor:
            stream.copy_(x)
            out.copy_(added)
            found = call.once()
            out.zero_()
            return found

        return dataclasses.replace(call, once=once)

    def gate(self, wide: Tensor) -> Call:
        """Gate."""
        m, n, is_gelu = len(wide), wide.shape[1] // 2, self._d.activation == "gelu_tanh"
        wide, y = _side_by_side(wide, torch.zeros(m, n))

        def compute(first: int, times: int) -> None:
            self._c.alone_gate(y.data_ptr(), wide.data_ptr(), m, n, is_gelu, self._threads, times)

        return _repeated(compute, y)

    def embed(self, table: Tensor, tokens: Int32) -> Call:
        """Read rows."""
        kept, (count, m) = table.to(formats.precision(self._precision).activations).contiguous(), tokens.shape
        x, form = torch.empty(m, table.shape[1]), library.F32 if kept.dtype == torch.float32 else library.BF16

        def compute(first: int, times: int) -> None:
            self._c.alone_embed(
                x.data_ptr(), kept.data_ptr(), form, tokens.ctypes.data, count, first % count, m, x.shape[1], self._threads, times
            )

        return _repeated(compute, x)

    def cache(self, blocks: int, block_tokens: int) -> Blocks:
        """Allocate."""
        shape = dataclasses.replace(self._d.shape, layers=1)
        return Blocks(shape, blocks=blocks, block_tokens=block_tokens, dtype=self._kv, device=torch.device("cpu"))

    def place(self, qkv: Tensor, cos: Tensor, sin: Tensor, positions: Int32, slots: Int32, cache: Blocks) -> Call:
        """Turn and store."""
        a, rows, to = self._d.shape, qkv.clone(), _cache(cache)
        turned = (a.heads + a.kv_heads) * a.head_dim
        at, slot = np.ascontiguousarray(positions), np.ascontiguousarray(slots)
        work = PlaceStruct(
            rows.data_ptr(),
            len(rows),
            a.heads,
            2 * cos.shape[1],
            len(slot),
            at.ctypes.data,
            slot.ctypes.data,
            cos.data_ptr(),
            sin.data_ptr(),
        )
        held_here = (rows, at, slot, cos, sin, cache)

        def compute(first: int, times: int) -> object:
            self._c.alone_place(work, to, first % len(slot), self._threads, times)
            return held_here

        def once() -> Tensor:
            rows.copy_(qkv)
            compute(0, 1)
            return rows[:, :turned].double()

        return dataclasses.replace(_repeated(compute, rows), once=once)

    def attend(self, qkv: Tensor, steps: Sequence[Step], cache: Blocks) -> Call:
        """Attend.  Ahead of a visit one token of each sequence sees all of it, up to where the visit will begin."""
        to = _cache(cache)
        out = torch.empty(len(qkv), self._d.shape.heads * self._d.shape.head_dim)
        glances = [_last_tokens(step) for step in steps]
        many, briefly = (self._attends(qkv, out, each) for each in (steps, glances))
        room = native.aligned(4 * self._c.alone_attend_floats(self._threads, self._d.shape.head_dim, MOST_TIMES))
        held_here = (qkv, out, steps, glances, room, cache)

        def compute(first: int, times: int, of: ctypes.Array[AttendStruct] = many) -> object:
            self._c.alone_attend(of, len(of), first % len(of), to, self._threads, times, room.data_ptr())
            return held_here

        def see_all(first: int) -> None:
            for done in range(0, len(briefly), MOST_TIMES):
                compute(first + done, min(MOST_TIMES, len(briefly) - done), briefly)

        return _repeated(compute, out, see_all)

    def _attends(self, qkv: Tensor, out: Tensor, steps: Sequence[Step]) -> ctypes.Array[AttendStruct]:
        """Return the steps as C reads them: what they point to must live as long."""
        a, d = self._d.shape, self._d
        many = (AttendStruct * len(steps))()
        for work, step in zip(many, steps, strict=True):
            arrays = (step.positions, step.first, step.block_table)
            work.q, work.out, work.ldq, work.ldo, work.heads = qkv.data_ptr(), out.data_ptr(), qkv.stride(0), out.stride(0), a.heads
            work.tokens, work.sequences, work.width = len(step.tokens), len(step.first) - 1, step.block_table.shape[1]
            work.position, work.first, work.block_table = (array.ctypes.data for array in arrays)
            work.scale, work.softcap = d.scale, d.attention_softcap
        return many


def _last_tokens(step: Step) -> Step:
    """Return a step of the last token of each sequence, which sees all that its others do."""
    if step.rows == step.sequences:
        return step
    last, at = step.first[1:] - 1, np.arange(len(step.first) - 1, dtype=np.int32)
    return Step.of(
        tokens=at, positions=step.positions[last], slots=at, sequence_of=at, first=np.arange(len(at) + 1, dtype=np.int32),
        block_table=step.block_table, sampled=at,
    )  # fmt: skip


def products(held: Sequence[native.NativeLinear], m: int, threads: int) -> Callable[[], None]:
    """Return what multiplies m tokens with each of these matrices once, in this order: so a step reads its weights.

    Plain reads of as many bytes leave less of all else in the caches: the host's part of a step took 0.4 ms after them, not 0.3 (Zen 4).
    """
    c = kernels()
    assert c is not None, "they are packed for it"
    structs = [h.struct for h in held]
    x, y = torch.ones(m, max(s.k for s in structs)), torch.empty(m, max(s.n for s in structs))
    room = native.aligned(max(c.act_bytes(s, m) for s in structs))
    act = ActStruct(x=x.data_ptr(), ldx=x.stride(0), m=m, room=room.data_ptr())
    held_here = (held, x, room)

    def compute() -> None:
        assert held_here
        for struct in structs:
            c.alone_linear(struct, 1, 0, act, y.data_ptr(), threads, 1)

    return compute


def _repeated(compute: Callable[[int, int], object], out: Tensor, before: Callable[[int], object] | None = None) -> Call:
    """Return the call that repeats compute(first, times) inside C, so often that it lasts; `before` is given where a visit begins."""
    once = functools.partial(poisoned, out, lambda: compute(0, 1))
    compute(0, 1)
    took_s = min(_seconds(functools.partial(compute, turn, 1)) for turn in range(1, 4))
    times = max(1, min(MOST_TIMES, round(CALL_S / max(took_s, 1e-7))))
    begin = 0

    def run() -> object:
        nonlocal begin
        begin += times
        return compute(begin - times, times)

    return Call(run=run, once=once, times=times, before=None if before is None else lambda: before(begin))


def _side_by_side(*tensors: Tensor) -> list[Tensor]:
    """Return copies of fp32 tensors in one piece of memory from a page on, as a step's workspace holds them.

    Wherever an allocator put each, a norm of 3 KB took 133 or 175 ns, launch by launch: loads wait for stores 4 KB away (Zen 4).
    """
    each_bytes = [-(-4 * t.numel() // native.CACHE_LINE) * native.CACHE_LINE for t in tensors]
    rooms = torch.split(native.aligned(sum(each_bytes), PAGE_BYTES), each_bytes)
    return [room.view(torch.float32)[: t.numel()].view(t.shape).copy_(t) for room, t in zip(rooms, tensors, strict=True)]


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cache(cache: Blocks) -> CacheStruct:
    _, blocks, block_bytes = cache.raw.shape
    return CacheStruct(
        cache.raw.data_ptr(), blocks * block_bytes, block_bytes, KV_KINDS[cache.dtype], cache.block_tokens, cache.kv_heads, cache.head_dim
    )
