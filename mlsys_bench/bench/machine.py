"""What this machine can do at best, whatever is computed: its memory, its products, and the ways between its parts.

    memory.read, copy, triad   the C kernels on all threads (`csrc/alone.h`), torch's functions where there is no compiler and on a GPU
    gemm                       torch's products: oneDNN or MKL on a CPU, cuBLAS on a GPU
    pool.handoff               an empty job for the engine's threads
    device.*, copy.*           launches, waits and transfers of a GPU

Copy and triad count as STREAM does (McCalpin 1995): bytes read and bytes written, no more.  Where the processor can, they write past the
caches, which spares them the read of what is overwritten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mlsys_bench.bench.alone import kernels
from mlsys_bench.bench.harness import COLD, Sampled, Spec, Task, cache_bytes, steady_bytes, timed
from mlsys_bench.engine import quant
from mlsys_bench.engine.native import library
from mlsys_bench.engine.native.linears import LARGE_PAGE, aligned
from mlsys_bench.types import Scalar, Work

MEMORY_BYTES, MOST_MEMORY_BYTES = 3 * 2**28, 2**31  # what each way goes through; `COLD` last-level caches where that lies between
PARTED = 6 * 1024  # floats: two and three parts of whole rows
GPU_MEMORY_BYTES = 3 * 2**30
GPU_GEMM = 8192  # a square product that fills a GPU
PRODUCTS = ("fp32", "bf16", "int8", "fp8")
GEMM_TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2, "int8": 1e-6, "fp8": 1e-2}
TRIAD_SCALE = 3.0
HANDOFFS = 50  # in one call
COPIED_BYTES = 2**28
Lacking = tuple[Spec, str]  # what cannot be measured here, and why
Offers = Iterator[Task | Lacking]


def memory(device: str, common: dict[str, Scalar], threads: int) -> Offers:
    """Yield the three ways of going through memory: all of it is read, half copied to the other half, two thirds added into the last."""
    room = _Memory(device)
    ways: tuple[tuple[str, int, Callable[[], object], Callable[[], float]], ...] = (
        ("memory.read", 1, lambda: room.read(threads), lambda: room.read_error(threads)),
        ("memory.copy", 2, lambda: room.copy(threads), lambda: room.checked(2, lambda: room.copy(threads), 1.0)),
        ("memory.triad", 3, lambda: room.triad(threads), lambda: room.checked(3, lambda: room.triad(threads), 1 + TRIAD_SCALE)),
    )
    for name, parts, call, check in ways:
        size = room.count // parts * 4
        spec = Spec(name=name, unit="B/s", better="higher", parameters=common | {"bytes": size}, work=Work(bytes=parts * size))
        yield _ceiling(timed(spec, call, device=device, check=check, tolerance=1e-6, threads=threads), threads)


def _values() -> Tensor:
    return (torch.arange(1024) % 3).float()


class _Memory:
    """Floats beyond any cache, of which a way's buffers are equal parts.  Values are 0 to 2: fp32 sums of 2 GiB in 32 lanes are exact.

    Taken once for all ways: memory that a virtual machine has not used yet comes at 0.35 GB/s.
    """

    def __init__(self, device: str) -> None:
        wanted = GPU_MEMORY_BYTES if device != "cpu" else min(MOST_MEMORY_BYTES, max(MEMORY_BYTES, COLD * cache_bytes()))
        self.device, self.count = device, int(steady_bytes(wanted, device)) // 4 // PARTED * PARTED
        self.kernels = kernels() if device == "cpu" else None

    @functools.cached_property
    def whole(self) -> Tensor:
        """Take memory when it is first needed."""
        if self.kernels is None:
            return self._filled(torch.empty(self.count, device=self.device))
        room = aligned(4 * self.count, LARGE_PAGE)
        self.kernels.advise_large_pages(room.data_ptr(), 4 * self.count)
        return self._filled(room.view(torch.float32))

    def _filled(self, made: Tensor) -> Tensor:
        made.view(-1, 1024).copy_(_values())
        return made

    def parts(self, count: int) -> tuple[Tensor, ...]:
        """Return so many equal buffers."""
        return tuple(self.whole.chunk(count))

    @functools.cached_property
    def _ones(self) -> Tensor:
        return torch.ones(1024, device=self.device)

    def read(self, threads: int) -> object:
        """Read all; torch's sums of rows are left where they are, so that nothing waits for a GPU."""
        if self.kernels is not None:
            return self.kernels.alone_read(self.whole.data_ptr(), self.count, threads)
        # a matrix-vector product reads as fast as a decode step can; it beat torch.sum on every CPU tried
        return torch.mv(self.whole.view(-1, 1024), self._ones)

    def read_error(self, threads: int) -> float:
        """Return how far what was read is from what is there."""
        self._filled(self.whole)
        found = torch.as_tensor(self.read(threads), dtype=torch.float64).sum()
        return abs(float(found) / (float(_values().sum()) * self.count / 1024) - 1)

    def copy(self, threads: int) -> None:
        """Make a of b."""
        a, b = self.parts(2)
        if self.kernels is not None:
            self.kernels.alone_copy(a.data_ptr(), b.data_ptr(), len(a), threads)
        else:
            a.copy_(b)

    def triad(self, threads: int) -> None:
        """Make a of b + s c."""
        a, b, c = self.parts(3)
        if self.kernels is not None:
            self.kernels.alone_triad(a.data_ptr(), b.data_ptr(), c.data_ptr(), TRIAD_SCALE, len(a), threads)
        else:
            torch.add(b, c, alpha=TRIAD_SCALE, out=a)

    def checked(self, count: int, write: Callable[[], object], factor: float) -> float:
        """Return the error of what was written over NaN into the first of so many parts: each value times a factor."""
        self._filled(self.whole)
        written, *_ = self.parts(count)
        written.fill_(torch.nan)
        write()
        wanted = (_values() * factor).to(self.device)
        return float(torch.stack([(rows - wanted).abs().max() for rows in torch.split(written.view(-1, 1024), 4096)]).max())


# ---------------------------------------------------------------- products


def products(device: str, common: dict[str, Scalar], n: int, threads: int) -> Offers:
    """Yield a square product per format; what torch has none for here is lacking."""
    n = n if device == "cpu" else GPU_GEMM
    for precision in PRODUCTS:
        parameters = common | {"precision": precision, "n": n}
        spec = Spec(
            name="gemm", unit="FLOP/s", better="higher", parameters=parameters, work=Work(flops=2.0 * n**3, bytes=_moved(precision, n))
        )
        why = misfit(precision, device)
        if why is not None:
            yield spec, why
            continue
        yield _ceiling(_product(spec, device, threads), threads)


def _product(spec: Spec, device: str, threads: int) -> Task:
    precision, n = str(spec.parameters["precision"]), int(spec.parameters["n"] or 0)
    made = functools.cache(lambda: Product(precision, n, device))
    return timed(
        spec, lambda: made().run(), device=device, check=lambda: made().error(), tolerance=GEMM_TOLERANCE[precision], threads=threads
    )


def _moved(precision: str, n: int) -> float:
    size, out = {"fp32": (4, 4), "bf16": (2, 2), "int8": (1, 4), "fp8": (1, 2)}[precision]
    return (2.0 * size + out) * n * n


def misfit(precision: str, device: str) -> str | None:
    """Return why torch has no product of this format here, None where it has one."""
    if precision == "fp8" and (device == "cpu" or torch.cuda.get_device_capability(device) < (8, 9)):
        return "no units for fp8 products: those of NVIDIA GPUs from compute capability 8.9 on"
    try:
        Product(precision, 64, device).run()
    except (RuntimeError, NotImplementedError) as error:
        return f"torch {torch.__version__} has no such product here: {str(error).splitlines()[0]}"
    return None


class Product:
    """A B of random matrices [n, n]; B lies as its transpose where bytes are multiplied, as units for bytes want it."""

    def __init__(self, precision: str, n: int, device: str) -> None:
        random = torch.Generator().manual_seed(0)
        if precision in ("int8", "fp8"):
            self.a, self.b = (torch.randint(-100, 101, (n, n), generator=random).to(torch.int8).to(device) for _ in range(2))
        else:
            dtype = torch.float32 if precision == "fp32" else torch.bfloat16
            self.a, self.b = (torch.randn(n, n, generator=random).to(device, dtype) for _ in range(2))
        if precision == "fp8":
            self.a, self.b = (x.float().to(torch.float8_e4m3fn) for x in (self.a, self.b))
        self.run = self._way(precision, device)

    def _way(self, precision: str, device: str) -> Callable[[], Tensor]:
        a, b = self.a, self.b
        if precision == "fp8":
            one = torch.ones((), device=device)
            return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16)
        if precision != "int8":
            return lambda: torch.mm(a, b)
        if device == "cpu" and quant.Onednn in quant.exact_ways():  # twice as fast as _int_mm with VNNI: signed bytes are not its own
            packed, ones, zeros = torch.ops.onednn.qlinear_prepack(b, None), torch.ones(len(b)), torch.zeros(len(b), dtype=torch.int64)
            q = (a.short() + quant.UNSIGNED_ZERO).to(torch.uint8)
            return lambda: torch.ops.onednn.qlinear_pointwise(
                q, 1.0, quant.UNSIGNED_ZERO, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
            )  # fmt: skip
        return lambda: torch._int_mm(a, b.t())

    def error(self) -> float:
        """Return the relative error of a few rows against float64."""
        found, at = self.run(), [0, len(self.a) // 2, len(self.a) - 1]
        right = self.b.double()
        wanted = self.a.float()[at].double() @ (right.t() if self.b.dtype.itemsize == 1 else right)
        return float((found[at].double() - wanted).norm() / wanted.norm()) + 0 * float(found.double().sum())


# ---------------------------------------------------------------- the engine's threads


def handoff(common: dict[str, Scalar], threads: int) -> Offers:
    """Yield what it takes to hand an empty job to all threads and to know that they are done."""
    spec = Spec(name="pool.handoff", unit="s", better="lower", parameters=common)
    c = kernels()
    if c is None or threads < 2:
        yield (
            spec,
            f"the engine has no threads of its own: {library.why_not()}" if c is None else "one thread hands nothing over; try --threads 2",
        )
        return
    yield several(timed(spec, lambda: c.alone_nothing(threads, HANDOFFS), device="cpu", threads=threads), HANDOFFS)


# ---------------------------------------------------------------- ways to a GPU


def paths(device: str, common: dict[str, Scalar]) -> Offers:
    """Yield launches, waits and transfers; on a CPU all of them are lacking."""
    launches = [Spec(name="device.launch", unit="s", better="lower", parameters=common | {"by": by}) for by in ("operator", "graph")]
    sync = Spec(name="device.sync", unit="s", better="lower", parameters=common)
    copies = [
        Spec(
            name=f"copy.{way}", unit="B/s", better="higher", parameters=common | {"memory": memory, "bytes": COPIED_BYTES},
            work=Work(bytes=COPIED_BYTES),
        )
        for way in ("h2d", "d2h")
        for memory in ("pinned", "pageable")
    ]  # fmt: skip
    if device == "cpu":
        yield from ((spec, "no GPU: torch finds no CUDA device, or --device cpu was asked for") for spec in (*launches, sync, *copies))
        return
    one = torch.zeros(1, device=device)

    def wait() -> None:
        one.add_(1)
        torch.cuda.synchronize(device)

    # by the clock of the host, whose time it is
    yield timed(launches[0], lambda: one.add_(1), device="cpu")
    yield timed(launches[1], _graph(device), device="cpu")
    yield timed(sync, wait, device="cpu")
    for spec in copies:
        yield _transfer(spec, device)


def _graph(device: str) -> Callable[[], object]:
    from mlsys_bench.bench.alone_gpu import capture

    one = torch.zeros(1, device=device)
    return capture(lambda: one.add_(1), torch.device(device))


def _transfer(spec: Spec, device: str) -> Task:
    @functools.cache
    def ends() -> tuple[Tensor, Tensor]:
        host = torch.arange(COPIED_BYTES, dtype=torch.uint8, pin_memory=spec.parameters["memory"] == "pinned")
        there = torch.empty_like(host, device=device)
        return (there, host) if spec.name == "copy.h2d" else (host, there)

    def move() -> None:
        to, source = ends()
        to.copy_(source, non_blocking=True)

    def check() -> float:
        to, source = ends()
        source.copy_(torch.arange(COPIED_BYTES, dtype=torch.uint8))
        to.zero_()
        move()
        torch.cuda.synchronize(device)
        return float(not torch.equal(to.cpu(), source.cpu()))

    return timed(spec, move, device=device, check=check, tolerance=0.0)


# ---------------------------------------------------------------- tasks


def several(task: Task, times: int) -> Task:
    """Return the task whose call does something so many times: a sample is one's share of the seconds."""

    def visit() -> list[Sampled]:
        return [(spec, dataclasses.replace(r, values=tuple(value / times for value in r.values))) for spec, r in task.visit()]

    return dataclasses.replace(task, visit=visit)


def _ceiling(task: Task, threads: int) -> Task:
    """Return the task of a ceiling: it comes before all others, and torch has so many threads for it: an engine in C leaves one."""

    def visit() -> list[Sampled]:
        with torch_threads(threads):
            return task.visit()

    return dataclasses.replace(task, visit=visit, cost_s=0.0)


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Have torch compute on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
