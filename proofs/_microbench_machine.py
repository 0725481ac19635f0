"""Part `ceilings` of `microbench.py`: memory and products as the suite measures them, beside programs that share no line with it.

    python proofs/_microbench_machine.py [--seconds 15] [--threads 1,2] [--only memory.copy]

    memory    `_bandwidth.py`, a C program in STREAM's manner: its own threads, its own loops, its own buffers of 1 GiB
    gemm      torch.utils.benchmark's Timer of the same product, as torch's users measure oneDNN and MKL

Both take turns in the order A B B A, one pass or product at a time, so that neighbours meet the same moment of the machine; two neighbours
are a pair.  The figure is the median of the pairs' ratios, with its 95 % interval between order statistics; there are more pairs until that
is known to a hundredth, or the time is over.  A pair counts if nothing outside disturbed either half: no time stolen by the hypervisor, no
switch forced on either process.  The kernel says that, not the ratio; how many pairs are left is shown; where hardly any, all count.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import _bandwidth
import numpy as np

from mlsys_bench import samples

BAR = 0.05
KNOWN = 0.01  # half of the interval's width at which there are pairs enough
LEAST, SECONDS = 40, 15.0  # pairs that count; time of a figure
# loads of 64 bytes, which compilers choose, read 4 to 7 % less than those of 32 (Zen 4, ADR 28)
FLAGS = ("-mprefer-vector-width=256",) if platform.machine() in ("x86_64", "AMD64") else ()
FEW = 10  # undisturbed pairs, below which all count
GIBIBYTE = 2**30  # of each of the other program's buffers
SIZE = 2048  # of the products: `full`'s


class Asked(NamedTuple):
    """What one pass gave, and how often its process was forced off its core meanwhile."""

    rate: float
    involuntary: int


Ask = Callable[[], Asked]


def ceilings(seconds: float = SECONDS, threads: tuple[int, ...] = (1, 2), only: str = "") -> bool:
    """Print each ceiling beside the other program's, and return whether all are within the bar."""
    cores = len(os.sched_getaffinity(0))
    good = True
    for many in threads:
        if many > cores:
            print(f"{many} threads: this process may use {cores} core(s), skipped")
            continue
        done = subprocess.run([sys.executable, __file__, "--child", str(many), str(seconds), only], env=_environment(many))
        good &= done.returncode == 0
    return good


def _environment(threads: int) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def _measured(threads: int, seconds: float, only: str) -> bool:
    """Compare with so many threads, each on a core of its own."""
    import torch

    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)
    print(f"{threads} thread(s)")
    good = True
    for name, unit, ours, theirs in itertools.chain(_memory(threads), _products(threads)):
        good &= not name.startswith(only) or _compared(name, unit, ours, theirs, seconds)
    return good


def _compared(name: str, unit: str, ours: Ask, theirs: Ask, seconds: float) -> bool:
    """Ask both in turns, after a few rounds that warm them up, and print how they compare."""
    list(itertools.islice(_pairs(ours, theirs), 4))
    pairs = _enough(_pairs(ours, theirs), time.monotonic() + seconds)
    quiet = [p.rates for p in pairs if not p.is_disturbed]
    mine, other = np.array(quiet if len(quiet) >= FEW else [p.rates for p in pairs]).T
    ratios = mine / other
    ratio, (low, high) = float(np.median(ratios)), samples.median_interval(_ones(ratios)) or (0.0, np.inf)
    best = float(np.quantile(mine, 0.75) / np.quantile(other, 0.75))
    is_near = abs(ratio - 1) <= BAR
    rates = f"{np.median(mine) / 1e9:6.1f} {unit}  other {np.median(other) / 1e9:6.1f}"
    known = f"ratio {ratio:.3f} [{low:.3f}, {high:.3f}]  {len(quiet)} of {len(pairs)} pairs undisturbed  best quartiles {best:.3f}"
    print(f"    {name:12} {rates}  {known}  bar {BAR:.0%} {'ok' if is_near else 'MISSED'}", flush=True)
    return is_near


class Pair(NamedTuple):
    """Our rate and the other's side by side, and whether something outside disturbed either."""

    rates: tuple[float, float]
    is_disturbed: bool


def _pairs(ours: Ask, theirs: Ask) -> Iterator[Pair]:
    """Yield pairs, who is first by turns."""
    from mlsys_bench.bench.telemetry import Disturbances

    watch = Disturbances(tuple(os.sched_getaffinity(0)))
    for turn in itertools.count():
        before = watch.look()
        first, second = (ask() for ask in ((ours, theirs) if turn % 2 == 0 else (theirs, ours)))
        is_disturbed = watch.since(before).slowed or first.involuntary + second.involuntary > 0
        rates = (first.rate, second.rate)
        yield Pair(rates if turn % 2 == 0 else rates[::-1], is_disturbed)


def _enough(pairs: Iterator[Pair], deadline: float) -> list[Pair]:
    """Return pairs until the ratio of those that count is known well enough, or the time is over."""
    found, look = list[Pair](), LEAST
    for pair in pairs:
        found.append(pair)
        kept = [p.rates for p in found if not p.is_disturbed]
        if time.monotonic() > deadline:
            break
        if len(kept) >= look:  # at growing distances: asked at each, luck would say yes too soon
            look = round(1.25 * look)
            if samples.half_width(_ones(np.divide(*np.array(kept).T)), samples.LEVEL) <= KNOWN:
                break
    return found


def _ones(values: samples.Array) -> list[samples.Array]:
    """Return blocks of one sample each."""
    return list(values[:, None])


def _memory(threads: int) -> Iterator[tuple[str, str, Ask, Ask]]:
    from mlsys_bench.bench import machine
    from mlsys_bench.bench.harness import Task

    for task in machine.memory("cpu", {}, threads):
        assert isinstance(task, Task), "every machine has memory"
        name = task.specs[0].name
        parts = max(1, GIBIBYTE // int(str(task.specs[0].parameters["bytes"])))  # a pass as long as ours: the other starts threads for each
        other = _Other(_bandwidth.command(threads, *FLAGS), name.removeprefix("memory."), parts)
        yield name, "GB/s", _asked(task), other.asked
        other.close()


def _products(threads: int) -> Iterator[tuple[str, str, Ask, Ask]]:
    from mlsys_bench.bench import machine
    from mlsys_bench.bench.harness import Task

    for task in machine.products("cpu", {}, SIZE, threads):
        if not isinstance(task, Task):
            continue
        precision = str(task.specs[0].parameters["precision"])
        yield f"gemm {precision}", "GF/s", _asked(task), _timer(precision)


def _asked(task: Any) -> Ask:
    """Return what visits a task once, and gives the median of its samples."""
    error = task.check()
    assert error <= task.tolerance, f"{task.specs[0].name} is off by {error:g}"
    return lambda: _watched(lambda: float(np.median(task.visit()[0][1].values)))


def _watched(work: Callable[[], float]) -> Asked:
    """Return a rate, and how often this process was forced off its core meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    rate = work()
    return Asked(rate, resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before)


def _timer(precision: str) -> Ask:
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
    return lambda: _watched(lambda: 2.0 * SIZE**3 / timer.timeit(1).median)


class _Other:
    """The program of `_bandwidth.py`, which measures once for each line it is given."""

    def __init__(self, command: list[str], way: str, parts: int) -> None:
        self._child = subprocess.Popen([*command, way, str(parts)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._child.stdout is not None
        self._child.stdout.readline()

    def asked(self) -> Asked:
        """Have it go through the next part."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.write("go\n")
        self._child.stdin.flush()
        return Asked(**json.loads(self._child.stdout.readline()))

    def close(self) -> None:
        """Give its memory back."""
        assert self._child.stdin is not None
        self._child.stdin.close()
        self._child.wait()


def main() -> int:
    """Run alone; return 1 where a bar is missed."""
    if sys.argv[1:2] == ["--child"]:
        return int(not _measured(int(sys.argv[2]), float(sys.argv[3]), sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of each figure, at most")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--only", default="", help="figures whose names begin so")
    chosen = parser.parse_args()
    return int(not ceilings(chosen.seconds, tuple(map(int, chosen.threads.split(","))), chosen.only))


if __name__ == "__main__":
    sys.exit(main())
