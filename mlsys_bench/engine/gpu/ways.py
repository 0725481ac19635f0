"""How a matrix is multiplied with how many rows: by which kernel, in tiles of which size."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from mlsys_bench.engine.gpu.tri import cdiv, power_of_2

Kind = Literal["gemv", "gemm", "wide"]
SMS = 132  # of an H100 or H200
FEW = {"int8": 4, "int4": 2, "fp8": 4, "dense": 4}  # rows up to which multiplying without tensor cores keeps up with the memory
SOME = 64  # rows up to which the tensor-core kernels read W once; beyond, a library's product
LOADS = 8  # of 16 bytes that a thread has in flight
THREADS = 128


@dataclass(frozen=True, slots=True)
class Way:
    """A kernel and its tile.  bn: rows of W; bk: words or elements of each; splits: programs that share K."""

    kind: Kind
    bm: int = 1
    bn: int = 8
    bk: int = 512
    splits: int = 1
    warps: int = 4
    stages: int = 3


@functools.lru_cache(maxsize=4096)
def default(form: str, rows: int, n: int, k: int, sms: int = SMS, element_bytes: int = 2) -> Way:
    """Return the way for a format ('int8', 'int4', 'fp8', 'dense'), by arithmetic: occupancy and bytes in flight, nothing measured.

    sms: multiprocessors; element_bytes: of dense weights.  fp32 never goes through tensor cores, which would round it to tf32.
    """
    if rows <= FEW[form]:
        return gemv(form, rows, n, k, sms, element_bytes)
    return gemm(form, rows, n, k, sms) if rows <= SOME and element_bytes < 4 else Way("wide")


def gemv(form: str, rows: int, n: int, k: int, sms: int = SMS, element_bytes: int = 2) -> Way:
    """Return the way without tensor cores: a tile is one 16-byte load of each thread and row of W, as many rows as registers allow."""
    bm = power_of_2(rows)
    bn = max(1, LOADS // bm)
    while bn > 1 and n // bn < 4 * sms:  # enough programs to fill the machine several times over
        bn //= 2
    if form in ("int8", "int4"):
        return Way("gemv", bm=bm, bn=bn, bk=min(4 * THREADS, power_of_2(words_of(form, k))))
    per_load = 16 if form == "fp8" else 16 // element_bytes
    return Way("gemv", bm=bm, bn=bn, bk=min(per_load * THREADS, max(16, power_of_2(k))))


def gemm(form: str, rows: int, n: int, k: int, sms: int = SMS) -> Way:
    """Return the way with tensor cores: 64 rows of W a tile, K split until two programs per multiprocessor have work."""
    bm, bn = max(16, power_of_2(rows)), 64
    bk = {"int8": 32, "int4": 16}.get(form, 128)  # words of 4 or 8 weights, or weights
    steps = cdiv(words_of(form, k) if form in ("int8", "int4") else k, bk)
    splits = max(1, min(cdiv(2 * sms, cdiv(n, bn)), steps // 4, 16))
    return Way("gemm", bm=bm, bn=bn, bk=bk, splits=splits, stages=4)


def words_of(form: str, k: int) -> int:
    """Return the packed words of a row of k inputs."""
    return 4 * cdiv(k, 16 if form == "int8" else 32)
