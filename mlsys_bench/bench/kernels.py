"""What this machine can do at best: reading and copying memory, matrix products, and the model's own matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from mlsys_bench.bench.harness import Sampled, Samples, Spec, Task, warm_up
from mlsys_bench.bench.options import wants
from mlsys_bench.models import Architecture
from mlsys_bench.types import Scalar

BUFFER_BYTES = 2**28  # 256 MiB: beyond any cache of a CPU that rents by the core
GPU_BUFFER_BYTES = 2**30
SAMPLE_S = 4e-3  # a sample repeats short work until it lasts this long
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
TOKENS = (1, 16, 128)


def tasks(
    a: Architecture, *, device: str, common: dict[str, Scalar], precisions: tuple[str, ...], size: int, only: tuple[str, ...], visits: int
) -> list[Task]:
    """Return the tasks of all kernels that are asked for.  int8 weights are widened by the engine, so its linears count as fp32 here."""
    found: list[Task] = []
    if wants(only, "memory.read") or wants(only, "memory.copy"):
        found += _memory(device, common, only, visits)
    formats = tuple(dict.fromkeys(("fp32", *precisions)))
    if wants(only, "gemm"):
        found += [_gemm(device, common | {"precision": p, "n": size}, visits) for p in formats if _multiplies(p, device)]
    if wants(only, "linear"):
        for p in (p for p in formats if p != "int8"):
            found += _linears(a, device, common | {"precision": p}, visits)
    return found


def _memory(device: str, common: dict[str, Scalar], only: tuple[str, ...], visits: int) -> list[Task]:
    count = (BUFFER_BYTES if device == "cpu" else GPU_BUFFER_BYTES) // 4
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    matrix, vector = source.view(-1, 4096), torch.ones(4096, device=device)
    read = Spec(name="memory.read", unit="B/s", better="higher", parameters=common | {"bytes": count * 4})
    copy = Spec(name="memory.copy", unit="B/s", better="higher", parameters=common | {"bytes": count * 4})
    # a matrix-vector product reads as fast as a decode step can; it beat torch.sum on every CPU tried
    both = [(read, lambda: torch.mv(matrix, vector), 4.0 * count), (copy, lambda: target.copy_(source), 8.0 * count)]
    return [_task(spec, work, amount, device, visits) for spec, work, amount in both if wants(only, spec.name)]


def _gemm(device: str, parameters: dict[str, Scalar], visits: int) -> Task:
    n, precision = int(parameters["n"] or 0), str(parameters["precision"])
    a, b = (_random((n, n), DTYPES[precision], device) for _ in range(2))
    product = torch._int_mm if precision == "int8" else torch.mm
    spec = Spec(name="gemm", unit="FLOP/s", better="higher", parameters=parameters)
    return _task(spec, lambda: product(a, b), 2.0 * n**3, device, visits)


def _linears(a: Architecture, device: str, common: dict[str, Scalar], visits: int) -> list[Task]:
    """Return a task per matrix of a layer and number of tokens.  Weights rotate through copies, so that caches hold none of them."""
    dtype = DTYPES[str(common["precision"])]
    shapes = {
        "qkv": ((a.heads + 2 * a.kv_heads) * a.head_dim, a.hidden),
        "out": (a.hidden, a.heads * a.head_dim),
        "gate_up": (2 * a.ffn, a.hidden),
        "down": (a.hidden, a.ffn),
        "head": (a.vocab, a.hidden),
    }
    found = []
    for layer, (rows, columns) in shapes.items():
        copies = max(1, (BUFFER_BYTES // 2) // (rows * columns * dtype.itemsize))
        weight = _random((rows, columns), dtype, device)
        weights = [weight.clone() for _ in range(copies)]
        for m in TOKENS:
            x = _random((m, columns), dtype, device)
            spec = Spec(
                name="linear", unit="FLOP/s", better="higher",
                parameters=common | {"model": a.id, "layer": layer, "m": m, "n": rows, "k": columns},
            )  # fmt: skip
            found.append(_task(spec, _rotate(x, weights), 2.0 * m * rows * columns, device, visits))
    return found


def _rotate(x: torch.Tensor, weights: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    turn = itertools.cycle(weights)
    return lambda: torch.nn.functional.linear(x, next(turn))


def _task(spec: Spec, work: Callable[[], object], amount: float, device: str, visits: int) -> Task:
    """Return a task that samples `amount` of bytes or FLOPs per call as a rate."""

    def synchronise() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    def once() -> None:
        work()
        synchronise()

    once_s = warm_up(once, block=3, patience_s=0.3)
    repeat = max(1, round(SAMPLE_S / once_s))

    def sample() -> None:
        for _ in range(repeat):
            work()
        synchronise()

    def visit() -> list[Sampled]:
        samples = Samples(one_thread=torch.get_num_threads() == 1)
        for _ in range(visits):
            samples.take(sample)
        return [(spec, samples.round(lambda seconds: amount * repeat / seconds))]

    return Task(specs=(spec,), visit=visit, cost_s=visits * repeat * once_s)


def _random(shape: tuple[int, int], dtype: torch.dtype, device: str) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 127, shape, dtype=dtype, device=device)
    return torch.randn(shape, device=device).to(dtype)


def _multiplies(precision: str, device: str) -> bool:
    """Say whether torch has a matrix product of this format here."""
    if precision != "int8":
        return True
    try:
        torch._int_mm(_random((32, 32), torch.int8, device), _random((32, 32), torch.int8, device))
    except (RuntimeError, NotImplementedError):
        return False
    return True
