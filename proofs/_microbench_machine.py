"""Part `ceilings` of `microbench.py`: memory and products as the suite measures them, beside programs that share no line with it.

    python proofs/_microbench_machine.py [--rounds 9] [--threads 1,2]

    memory    `_bandwidth.py`, a C program in STREAM's manner: its own threads, its own loops, its own buffers of 1 GiB
    gemm      torch.utils.benchmark's blocked_autorange of the same product, as torch's users measure oneDNN and MKL

Both are asked in turns, so that what the machine does in between meets both; a figure is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import _bandwidth

BAR = 0.05
ROUNDS = 9
SIZE = 2048  # of the products: `full`'s
Asked = Callable[[], float]


def ceilings(rounds: int = ROUNDS, threads: tuple[int, ...] = (1, 2)) -> bool:
    """Print each ceiling beside the other program's, and return whether all are within the bar."""
    cores = len(os.sched_getaffinity(0))
    good = True
    for many in threads:
        if many > cores:
            print(f"{many} threads: this process may use {cores} core(s), skipped")
            continue
        done = subprocess.run([sys.executable, __file__, "--child", str(many), str(rounds)], env=_environment(many))
        good &= done.returncode == 0
    return good


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _measured(threads: int, rounds: int) -> bool:
    """Compare with so many threads, each on a core of its own."""
    import torch

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    print(f"{threads} thread(s)")
    results = [
        _compared(name, unit, ours, theirs, rounds) for name, unit, ours, theirs in itertools.chain(_memory(threads), _products(threads))
    ]
    return all(results)


def _compared(name: str, unit: str, ours: Asked, theirs: Asked, rounds: int) -> bool:
    """Ask both in turns, after one round that warms them up."""
    ours(), theirs()
    pairs = [(ours(), theirs()) for _ in range(rounds)]
    ratio = statistics.median(a / b for a, b in pairs)
    mine, other = (statistics.median(column) for column in zip(*pairs, strict=True))
    is_near = abs(ratio - 1) <= BAR
    best = max(a for a, _ in pairs) / max(b for _, b in pairs)
    print(
        f"    {name:14} {mine / 1e9:8.1f} {unit}   other {other / 1e9:8.1f}   ratio {ratio:.3f} (of the best rounds {best:.3f})   "
        f"bar {BAR:.0%} {'ok' if is_near else 'MISSED'}",
        flush=True,
    )
    return is_near


def _memory(threads: int) -> Iterator[tuple[str, str, Asked, Asked]]:
    from mlsys_bench.bench import machine
    from mlsys_bench.bench.harness import Task

    for task in machine.memory("cpu", {}, threads):
        assert isinstance(task, Task), "every machine has memory"
        name = task.specs[0].name
        other = _Other(_bandwidth.command(threads), name.removeprefix("memory."))
        yield name, "GB/s", _asked(task), other.rate
        other.close()


def _products(threads: int) -> Iterator[tuple[str, str, Asked, Asked]]:
    from mlsys_bench.bench import machine
    from mlsys_bench.bench.harness import Task

    for task in machine.products("cpu", {}, SIZE, threads):
        if not isinstance(task, Task):
            continue
        precision = str(task.specs[0].parameters["precision"])
        yield f"gemm {precision}", "GF/s", _asked(task), _timer(precision)


def _asked(task: Any) -> Asked:
    """Return what visits a task once, and gives the median of its samples."""
    error = task.check()
    assert error <= task.tolerance, f"{task.specs[0].name} is off by {error:g}"
    return lambda: statistics.median(task.visit()[0][1].values)


def _timer(precision: str) -> Asked:
    """Return torch's own benchmark of its own matmul; of int8 oneDNN's, which multiplies as its units want it."""
    import torch
    from torch.utils.benchmark import Timer

    if precision == "int8":
        weight = torch.randint(-127, 128, (SIZE, SIZE), dtype=torch.int8)
        x = torch.randint(0, 256, (SIZE, SIZE), dtype=torch.uint8)
        about = {
            "x": x,
            "w": torch.ops.onednn.qlinear_prepack(weight, None),
            "s": torch.ones(SIZE),
            "z": torch.zeros(SIZE, dtype=torch.int64),
        }
        call = "torch.ops.onednn.qlinear_pointwise(x, 1.0, 128, w, s, z, None, 1.0, 0, torch.float32, 'none', [], '')"
        timer = Timer(call, globals={"torch": torch, **about}, num_threads=torch.get_num_threads())
    else:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
        timer = Timer("torch.mm(a, b)", globals={"torch": torch, "a": a, "b": b}, num_threads=torch.get_num_threads())
    return lambda: 2.0 * SIZE**3 / timer.blocked_autorange(min_run_time=0.1).median


class _Other:
    """The program of `_bandwidth.py`, which measures once for each line it is given."""

    def __init__(self, command: list[str], way: str) -> None:
        self._child = subprocess.Popen([*command, way], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        self._child.stdout.readline()

    def rate(self) -> float:
        """Return bytes a second."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()
        return float(json.loads(self._child.stdout.readline())["rate"])

    def close(self) -> None:
        """Give its memory back."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def main() -> int:
    """Run alone; return 1 where a bar is missed."""
    if sys.argv[1:2] == ["--child"]:
        return int(not _measured(int(sys.argv[2]), int(sys.argv[3])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", default="1,2")
    chosen = parser.parse_args()
    return int(not ceilings(chosen.rounds, tuple(map(int, chosen.threads.split(",")))))


if __name__ == "__main__":
    sys.exit(main())
