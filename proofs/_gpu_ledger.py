"""What the proofs on a GPU found, kept as it comes; work whose failure costs nothing else; times from replays of a graph."""

from __future__ import annotations

import dataclasses
import datetime
import re
import statistics
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mlsys_bench import record
from mlsys_bench.types import Bench, Launch, Machine, Measurement, Round, Scalar


@dataclasses.dataclass(slots=True)
class Ledger:
    """What was measured and what went wrong, kept as it comes."""

    folder: Path
    machine: Machine
    began_s: float
    copy_bytes_per_s: float = float("nan")
    product_flops_per_s: float = float("nan")
    found: list[Measurement] = dataclasses.field(default_factory=list)
    misses: int = 0
    failures: int = 0

    def add(self, name: str, values: Sequence[float], unit: str, better: str = "lower", **parameters: Scalar) -> float:
        """Keep samples; return their median."""
        samples = tuple(float(v) for v in values)
        self.found.append(Measurement(
            name=name, unit=unit, better="lower" if better == "lower" else "higher", parameters=parameters,
            launches=(Launch(started_s=self.began_s, rounds=(Round(values=samples),)),),
        ))  # fmt: skip
        return statistics.median(samples)

    def hold(self, what: str, share: float, bar: float | None) -> str:
        """Return a share beside its bar, counting a miss."""
        if bar is None:
            return f"{share:6.1%}"
        self.misses += not share >= bar
        return f"{share:6.1%} (bar {bar:.0%}{'' if share >= bar else ', MISSED'})"

    def failed(self, what: str) -> None:
        """Print and count the exception in hand."""
        self.failures += 1
        last = traceback.format_exc().strip().splitlines()
        print(f"FAILED {what}: {' | '.join(last[-6:])}", flush=True)

    def write(self, part: str) -> None:
        """Write what this part found as a record of its own, and start afresh."""
        if self.found:
            gpu = re.sub(r"[^a-z0-9]+", "-", str(self.machine.hard.get("gpu") or "gpu").lower()).strip("-")
            day = datetime.datetime.now(datetime.UTC).date().isoformat()
            path = record.write(self.folder / f"{day}-{gpu}-engine-{part}.json", Bench(measurements=tuple(self.found)), self.machine)
            print(f"-> {path.name}: {len(self.found)} measurements", flush=True)
        self.found = []


def guarded(ledger: Ledger, what: str, work: Callable[[], object]) -> None:
    """Do something whose failure costs nothing else."""
    try:
        work()
    except Exception:
        ledger.failed(what)
    torch.cuda.empty_cache()


def timed(work: Callable[[int], object], *, calls: int, samples: int = 20) -> list[float]:
    """Return seconds per call, from replays of a graph of so many: no launch costs, and, with work(i) on other memory each, no cache."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            work(i)
    graph.replay()
    taken = []
    for _ in range(samples):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end) / 1e3 / calls)
    return taken
